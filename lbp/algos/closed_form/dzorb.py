from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from lbp.algos import ops
from lbp.algos.closed_form.inverses import Weights
from lbp.algos.closed_form.least_squares import PRECISIONS, Gram, with_constant
from lbp.algos.closed_form.stages import finish, look, pulled, rows_at_once, sites, stages, trace
from lbp.algos.rule import Facts, LearningRule, Phase, Solved
from lbp.errors import Refused


class DZorb(LearningRule):
    """ZORB with difference targets: a layer is asked for the change of its outputs that the network's error still asks for.

    The head is solved first. Then, `sweeps` times from input to output, a layer moves by W <- W + step (X^T X + ridge)^-1 X^T dA, where
    dA is the samples' error y - f(x) brought down from the head to the layer: through weights by their pseudo-inverse, of which
    `inverse_ridge` bounds the gain, through an activation by the difference of its inverse; and the head is solved anew. So a
    layer keeps what it was drawn as, beside what labels make of it, where ZORB's own has no more directions than there are
    classes. No gradient is taken. Lbp's own: difference targets as Lee et al. 2015 have them, on Ranganathan & Lewandowski's layerwise
    least squares.
    """

    facts = Facts(
        family="closed_form", paper="none: after Ranganathan & Lewandowski, arXiv 2011.08895, and Lee et al., ECML 2015, arXiv 1412.7525",
        weight_transport=True, backward_locked=True, update_locked=True, needs_derivative=False,
        in_place=True, optimized=False, closed_form=True)

    def __init__(self, network, task, *, step: float, sweeps: int, ridge: float, head_ridge: float, inverse_ridge: float,
                 precision: str):
        super().__init__(network, task)
        if task.loss_name != "mse":
            raise Refused(f"algo=dzorb solves a squared loss, not dataset.loss={task.loss_name}; leave it out or set dataset.loss=mse")
        self.step, self.sweeps, self.ridge, self.head_ridge, self.inverse_ridge = step, sweeps, ridge, head_ridge, inverse_ridge
        self.precision = PRECISIONS[precision]
        self.stages = stages(network, "dzorb")

    def groups(self):
        return {}

    def phases(self):
        """A look at the data; the head alone, which makes it random features with a read-out; the sweeps."""
        places = sites(self.stages)
        head = list(places)[-1]
        return [Phase("as drawn", fit=partial(look, self.task)), Phase("read-out", fit=partial(self.solve, head))] + [
            Phase(f"{name}, sweep {sweep}", fit=partial(self.solve, site)) for sweep in range(1, self.sweeps + 1) for site, name in places.items()]

    @torch.no_grad()
    def solve(self, site: int, batches) -> Solved:
        self.network.eval()
        stage, head = self.stages[site], site == len(self.stages) - 1
        for above in self.stages[site + 1 :]:
            above.prepare(0.0, self.inverse_ridge)
        found = Gram(stage.features, len(stage.module.weight), self.network.head.weight, self.precision)
        for x, y in batches(rows_at_once(stage)):
            path = trace(self.stages, x)
            wanted = self.task.onehot(y, self.precision).view(len(y), -1)
            t = wanted if head else pulled(self.stages, wanted - path[-1], site, path, change=True)
            found.add(stage.rows(path[site]), stage.flat(t))
        found.gather()
        solution = found.solve(0.0, self.head_ridge if head else self.ridge, stage.seen)
        weight = solution.weight if head else stage.read() + self.step * self.reach(stage, solution.weight, batches) * solution.weight
        return finish(stage, found, solution, weight)

    def reach(self, stage: Weights, move: Tensor, batches) -> float:
        """The multiple of a layer's move under which the output, if it went on as over the move itself, would come nearest to the target."""
        sums, place = move.new_zeros(2), self.stages.index(stage)
        move = move.to(self.network.head.weight.dtype)
        for x, y in batches(rows_at_once(stage)):
            path = trace(self.stages, x)
            moved = trace(self.stages[place + 1 :], path[place + 1] + stage.outputs(with_constant(stage.rows(path[place])) @ move))[-1]
            d, wanted = (moved - path[-1]).double(), self.task.onehot(y).view_as(moved)
            sums += torch.stack([(d * (wanted - path[-1])).sum(), d.square().sum()])
        ops.over_ranks(sums)
        return max(0.0, float(sums[0] / sums[1])) if sums[1] > 0 else 0.0
