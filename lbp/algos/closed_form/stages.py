"""A network as the row of its stages, for rules that bring targets down through all of them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lbp.algos import ops
from lbp.algos.closed_form.inverses import (BATCH_NORMS, ELEMENTWISE, POOLS, Activation, BatchNorm, Flatten, Fork, Pool, Stage, Sum,
                                            Weights)
from lbp.algos.closed_form.least_squares import QR, Gram, Solution, finite
from lbp.algos.rule import Solved
from lbp.archs.hard import Argmax, Sign, Step
from lbp.archs.network import Layer, Network
from lbp.archs.resnet import ResidualUnit
from lbp.errors import Refused

ROWS = 512          # samples at once
PATCHES = 1 << 23   # values of their patches at once


def stages(network: Network, rule: str, variant: str = "numpy") -> list[Stage]:
    """The network's modules in the order in which they run, head included. Raises Refused, with the block, for what has no inverse map."""
    found: list[Stage] = []
    shape = network.in_shape

    def refuse(block: str, why: str) -> Refused:
        return Refused(f"algo={rule} goes back through each layer: block {block} {why}")

    def add(stage: Stage) -> None:
        nonlocal shape
        found.append(stage)
        if isinstance(stage, Weights):
            shape = (len(stage.module.weight), *(stage.places if stage.conv else ()))
        elif isinstance(stage, (Flatten, Pool)):
            shape = tuple(stage.module(torch.zeros(1, *shape)).shape[1:])

    def walk(block: str, module: nn.Module) -> None:
        kind = type(module)
        if isinstance(module, nn.Identity) or isinstance(module, nn.Dropout) and not module.p:
            return
        if isinstance(module, Layer):
            for part in (module.incoming, module.linear, module.norm, module.activation, module.dropout, module.pooling):
                walk(block, part)
        elif isinstance(module, nn.Sequential):
            for part in module:
                walk(block, part)
        elif isinstance(module, ResidualUnit):
            add(fork := Fork(block, module, shape))
            for part in (module.conv1, module.norm1, module.activation, module.conv2, module.norm2):
                walk(block, part)
            add(Sum(block, module, shape, fork))
            walk(block, module.activation)
            walk(block, module.pool)
        elif isinstance(module, (nn.Linear, nn.Conv2d)):
            if isinstance(module, nn.Conv2d) and (module.groups > 1 or isinstance(module.padding, str) or module.padding_mode != "zeros"):
                raise refuse(block, "has a convolution in groups or with padding of another kind than zeros; use arch=cnn or arch=mlp")
            if isinstance(module, nn.Linear) and len(shape) != 1:
                raise refuse(block, f"has a dense layer on inputs of shape {shape}; {ops.elsewhere(network)}")
            add(Weights(block, module, shape))
        elif isinstance(module, BATCH_NORMS) and module.track_running_stats:
            add(BatchNorm(block, module, shape))
        elif isinstance(module, nn.Flatten):
            add(Flatten(block, module, shape))
        elif isinstance(module, POOLS):
            if isinstance(module, nn.AdaptiveAvgPool2d) and module.output_size not in (1, (1, 1)) or getattr(module, "ceil_mode", False) \
                    or isinstance(module, nn.MaxPool2d) and module.dilation not in (1, (1, 1)):
                raise refuse(block, f"has a {kind.__name__} of a kind that has no inverse map here; use arch=cnn")
            add(Pool(block, module, shape))
        elif kind in (nn.ReLU, nn.Softmax) or kind in ELEMENTWISE or isinstance(module, (Sign, Step, Argmax)):
            add(Activation(block, module, shape, variant))
        elif isinstance(module, nn.Dropout):
            raise refuse(block, "draws units, and nothing is drawn in solving; use arch.dropout=0")
        elif "Norm" in kind.__name__:
            raise refuse(block, f"has a {kind.__name__}, which forgets each sample's own scale; use arch.norm=none or arch.norm=batch")
        elif kind.__module__.startswith(("torch.nn.modules.activation", "lbp.archs.hard")):
            raise refuse(block, f"has a {kind.__name__}, which has no inverse; use relu, leaky_relu, tanh, sigmoid, hardtanh, elu, softplus, "
                                "sign, step or none")
        else:
            raise refuse(block, f"is or has a {kind.__name__}, whose inverse map is not known; {ops.elsewhere(network)}")

    for name, block in network.blocks.items():
        walk(name, block)
    _connect(found)
    return found


def _connect(found: list[Stage]) -> None:
    """Which weights take in the rescaling of which activation, and which batch norm follows on which weights."""
    feed = None
    for i, stage in enumerate(found):
        if isinstance(stage, Weights):
            if i + 1 < len(found) and isinstance(found[i + 1], BatchNorm):
                stage.norm = found[i + 1]
            if feed is not None and stage.intercept and feed.ends is not None:
                stage.feed, feed.above = feed, stage
            feed = None
        elif isinstance(stage, Activation):
            feed = stage
        elif not isinstance(stage, (Flatten, Pool)) or isinstance(stage, Pool) and padded(stage.module):
            feed = None     # a norm, or a shortcut, would see the rescaling too; zeros at a pool's border would not


def padded(pool: nn.Module) -> bool:
    return getattr(pool, "padding", 0) not in (0, (0, 0))


def sites(row: list[Stage]) -> dict[int, str]:
    """{place in the row: name} of what can be solved: the block's, and where it has several layers their number."""
    places = [i for i, stage in enumerate(row) if isinstance(stage, Weights)]
    blocks = [row[i].block for i in places]
    return {i: block if blocks.count(block) == 1 else f"{block}.{blocks[:n].count(block) + 1}" for n, (i, block) in enumerate(zip(places, blocks))}


def pulled(stages, t: Tensor, to: int, path: list[Tensor] | None, change: bool = False) -> Tensor:
    """Targets, or changes, of the network's output as those of the output of stage `to`; `path`: the inputs of all stages, and the output."""
    i = len(stages) - 1
    while i > to:
        stage, (x, h) = stages[i], (path[i], path[i + 1]) if path else (None, None)
        if isinstance(stage, Sum) and to < (fork := stages.index(stage.fork)):
            t, i = stage.below(t, x, path[fork], change), fork
        elif not isinstance(stage, Fork):
            t = (stage.change if change else stage.target)(t, x, h)
        i -= 1
    return t


def trace(stages, x: Tensor) -> list[Tensor]:
    """The input of each stage, and the output of the last."""
    path = [x]
    for stage in stages:
        path.append(stage.run(path[-1]))
    return path


class Kept:
    """What reaches a stage, of as many batches as `room` bytes hold, so that the next stage's passes need not start from the data."""

    def __init__(self, room: int):
        self.room, self.batches = room, {}      # {its number: (stage, data, what reaches the stage)}

    def reaching(self, site: int, number: int, x: Tensor, row: list[Stage]) -> Tensor:
        """The input of stage `site` of the row, for the pass's batch `number`, whose data are x."""
        at, known, h = self.batches.pop(number, (0, None, None))
        self.room += size(known, h) if known is not None else 0
        if known is None or at > site or known.shape != x.shape or known.dtype != x.dtype or known.device != x.device or not known.equal(x):
            at, h = 0, x
        for stage in row[at:site]:
            h = stage.run(h)
        if size(x, h) <= self.room:
            self.room -= size(x, h)
            self.batches[number] = site, x, h
        return h


def size(x: Tensor, h: Tensor) -> int:
    """Bytes that keeping h, made from x, takes; a view of the dataset takes none."""
    return sum(t.nbytes for t in (x, h) if t.nbytes == t.untyped_storage().nbytes())


def rows_at_once(stage: Weights) -> int:
    """Samples to be taken together, so that a layer's rows are not too many."""
    if not stage.conv:
        return ROWS
    return max(1, min(ROWS, PATCHES // stage.rows(stage.module.weight.new_zeros(1, *stage.shape)).numel()))


def look(task, batches) -> Solved:
    """Goes over the data once. Raises Diverged where a value is not finite; says which classes have no sample."""
    counts = torch.zeros(task.outputs, dtype=torch.float64)
    for x, y in batches(ROWS):
        finite(x.sum(dtype=torch.float64), y.sum(dtype=torch.float64))     # one pass: a sum is finite where its terms are
        if task.classes is not None:
            counts += torch.bincount(y.cpu(), minlength=task.outputs)
    ops.over_ranks(counts)
    missing = [str(c) for c in (counts == 0).nonzero().flatten().tolist()] if task.classes is not None else []
    return Solved({}, [f"class {', '.join(missing)}: no training sample, so nothing is asked for there but 0"] if missing else [])


def finish(stage: Weights, found: Gram | QR, solution: Solution, weight: Tensor) -> Solved:
    """Writes a layer's solution (D + 1, out), in the coordinates of its inputs as they are, and says how it was found."""
    stage.write(weight)
    count, features, notes = found.count, stage.features + stage.intercept, []
    if stage.norm is not None:
        rows = weight.clone()
        if stage.module.bias is None:
            rows[-1] = 0
        stage.norm.settle(*moments(found.gram, count, rows))
    if solution.rank < features:
        few = f"{count:,.0f} rows are fewer than its {features:,} features" if count < features else \
            f"{features - solution.rank:,} of its {features:,} features are constant, or all but follow from others"
        notes.append(f"{stage.block}: {few}; took the solution of least norm in {solution.rank:,} directions")
    values = {"rank": float(solution.rank)} | ({} if solution.condition is None else {"condition": solution.condition})
    return Solved({stage.block: values}, notes)


def moments(gram: Tensor, count: float, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance (out,) of X weight, from X^T X and the number of rows; X's last feature is the constant 1."""
    mean = gram[-1] @ weight / count
    return mean, ((weight * (gram @ weight)).sum(0) / count - mean.square()).clamp(min=0)
