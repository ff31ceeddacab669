from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from lbp import ranks
from lbp.algos.closed_form.inverses import INSIDE, Activation, Fork, Sum, Weights
from lbp.algos.closed_form.least_squares import PRECISIONS, TRUSTED, QR, Exact, Gram, finite
from lbp.algos.closed_form.stages import ROWS, Kept, finish, look, pulled, rows_at_once, sites, stages, trace
from lbp.algos.ops import over_ranks
from lbp.algos.rule import Facts, LearningRule, Phase, Solved
from lbp.errors import Refused

MANY = 2048     # features beyond which it is worth a look whether there are as many rows


class Zorb(LearningRule):
    """Zeroth-order relaxed backpropagation: each layer once, from input to output, by least squares; no gradient and no learning rate.

    A layer's target is the label, brought down through the layers above as they are now: T <- (T - b) pinv(W) through weights, and
    through an activation its inverse, after T was brought from the range that it has into the activation's. The layer then is
    W = pinv([X, 1]) T (Ranganathan & Lewandowski 2020). The affine map by which an activation's outputs reach their
    targets' range is folded into the weights above. Everything is as in eval mode.

    Labels have as many targets as there are classes, so that these come down, not the samples'; real targets, and all that hangs on a
    sample, come down batch by batch. Least squares take a Gram matrix or, where `rcond` asks for directions that it would
    lose, a QR decomposition, so that memory does not grow with the samples; what reaches a layer is kept for the next one's passes as
    far as `keep_mb` MiB go, and made anew beyond.
    """

    facts = Facts(
        family="closed_form", paper="Ranganathan & Lewandowski, NeurIPS 2020 workshop, arXiv 2011.08895",
        weight_transport=True, backward_locked=True, update_locked=True, needs_derivative=False,
        in_place=True, optimized=False, closed_form=True)

    def __init__(self, network, task, *, rcond: float, inverse_rcond: float, ridge: float, sweeps: int, solver: str, precision: str,
                 variant: str, keep_mb: int):
        super().__init__(network, task)
        if solver == "exact" and ranks.world() > 1:
            raise Refused("algo.solver=exact keeps all samples in one process; use algo.solver=auto with launch.ranks")
        self.rcond, self.inverse_rcond, self.ridge, self.sweeps, self.solver = rcond, inverse_rcond, ridge, sweeps, solver
        self.precision = PRECISIONS[precision]
        self.stages = stages(network, "zorb", variant)
        self.kept = Kept(keep_mb << 20)
        self.bounded = [stage for stage in self.stages if isinstance(stage, Activation) and stage.ends is not None and stage.above is not None]
        like = network.head.weight
        self.register_buffer("scales", torch.tensor([[1.0, 0.0]] * len(self.bounded), dtype=torch.float64, device=like.device).view(-1, 2))
        self.register_buffer("noise_seed", torch.randint(2**31, (), device=like.device))

    def groups(self):
        return {}

    def phases(self):
        """A look at the data, after which the metrics are those of the network as drawn; then a layer at a time."""
        return [Phase("as drawn", fit=partial(look, self.task))] + [
            Phase(f"{name}, sweep {sweep}" if self.sweeps > 1 else name, fit=partial(self.solve, site))
            for sweep in range(1, self.sweeps + 1) for site, name in sites(self.stages).items()]

    @torch.no_grad()
    def solve(self, site: int, batches) -> Solved:
        self.network.eval()
        for stage, scale in zip(self.bounded, self.scales):
            stage.scale = scale
        stage, above = self.stages[site], self.stages[site + 1 :]
        for other in above:
            other.prepare(self.inverse_rcond)
        by_class = self.task.classes is not None and self.task.loss_name != "cross_entropy" and not any(other.needs_samples for other in above)
        classes = torch.arange(self.task.outputs, device=self.scales.device)

        def samples():
            """(what reaches the layer; their trace, where targets hang on it; labels), in passes that all see the same noise."""
            for i, other in enumerate(above):
                other.noise = torch.Generator().manual_seed(int(self.noise_seed) + site * len(self.stages) + i)
            for i, (x, y) in enumerate(batches(rows_at_once(stage))):
                path = None if by_class else trace(self.stages, x)
                yield path[site] if path else self.kept.reaching(site, i, x, self.stages), path, y

        def targets():
            yield from [(None, self.wanted(classes, None))] if by_class else ((path, self.wanted(y, path[-1])) for _, path, y in samples())

        self.settle(site, targets)
        codes = pulled(self.stages, self.wanted(classes, None), site, None) if by_class else None
        dense = by_class and not stage.conv     # then the labels themselves are solved for, and their targets are multiplied with after
        columns = self.task.outputs if dense else len(stage.module.weight)

        def least_squares(kind: str):
            found = {"gram": partial(Gram, dtype=self.precision), "qr": QR, "exact": Exact}[kind](stage.features, columns, self.network.head.weight)
            for h, path, y in samples():
                if dense:
                    t = self.task.onehot(y, torch.float64)
                else:
                    t = stage.flat(codes[y] if by_class else pulled(self.stages, self.wanted(y, path[-1]), site, path))
                found.add(stage.rows(h), t)
            found.gather()
            return found

        kind, why = self.solver, ""
        if kind == "auto":
            kind = "gram"
            if stage.features > MANY and (rows := self.rows(stage, batches)) < stage.features:
                kind, why = "qr", f"its {rows:,} rows are fewer than its features"
        found = least_squares(kind)
        solution = found.solve(self.rcond, self.ridge, stage.seen)
        if self.solver == "auto" and kind == "gram" and (solution.condition or 0) > 1 / TRUSTED and self.precision == torch.float64:
            found, why = least_squares("qr"), "a Gram matrix would lose directions that algo.rcond keeps"
            solution = found.solve(self.rcond, self.ridge, stage.seen)
        weight = solution.weight @ codes if dense else solution.weight
        finite(weight)
        for other in above:
            if isinstance(other, Activation):
                other.fold()
        solved = finish(stage, found, solution, weight)
        if why:
            solved.notes.append(f"{stage.block}: solved by QR, since {why}")
        return solved

    def rows(self, stage: Weights, batches) -> int:
        """How many rows a layer has, over the ranks."""
        count = torch.zeros((), dtype=torch.float64)
        for x, _ in batches(ROWS):
            count += len(x)
        over_ranks(count)
        return int(count) * (math.prod(stage.places) if stage.conv else 1)

    def wanted(self, y: Tensor, out: Tensor | None) -> Tensor:
        """(N, outputs) in double: what the head is to give for labels or real targets y, the inverse of the loss's own output function;
        that of softmax keeps the logarithm of the sum that the outputs have now."""
        t = self.task.onehot(y, torch.float64).view(len(y), -1)
        if self.task.loss_name == "cross_entropy":
            t = t + self.task.label_smoothing * (1 / self.task.outputs - t)
            return (t + INSIDE).log() + out.double().logsumexp(1, keepdim=True)
        return t.clamp(INSIDE, 1 - INSIDE).logit() if self.task.loss_name == "bce" else t

    def settle(self, site: int, targets) -> None:
        """Finds, from the top down, the range of the targets that reach each activation with ends, over all of them."""
        for i in reversed(range(site + 1, len(self.stages))):
            stage = self.stages[i]
            if isinstance(stage, Activation) and stage.scaled and site >= self.around(i):
                reach = self.scales.new_full((2,), -torch.inf)
                for path, t in targets():
                    t = pulled(self.stages, t, i, path)
                    reach = torch.maximum(reach, torch.stack((-t.min(), t.max())))
                finite(reach := ranks.most(reach))
                stage.span = -float(reach[0]), float(reach[1])

    def around(self, i: int) -> int:
        """The first stage from which targets pass stage i: of one within a residual unit the unit's."""
        for stage in self.stages[i:]:
            if isinstance(stage, Fork):
                break
            if isinstance(stage, Sum):
                return self.stages.index(stage.fork)
        return 0
