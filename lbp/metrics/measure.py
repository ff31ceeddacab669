"""What is measured of every layer, beside backprop's gradient of the same batch, weights and dropout mask."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lbp import ranks
from lbp.archs.network import CONVOLUTIONS, block_of


class Measure:
    """One measured batch: `before` it is learned, `collect` at each apply, `record` after.

    Nothing of the training changes, to the bit: the shadow pass runs on copies of the buffers and gives the random state
    back. `deltas`: whether the errors at the layers are measured too; of compiled blocks they cannot be.
    """

    def __init__(self, rule, task, deltas: bool = True):
        self.rule, self.network, self.task = rule, rule.network, task
        self.parameters = dict(self.network.named_parameters())
        self.names = {id(p): name for name, p in self.parameters.items()}
        self.layers = {name: module for name, module in self.network.named_modules()
                       if deltas and isinstance(module, (nn.Linear, *CONVOLUTIONS))}

    def before(self, x: Tensor, y: Tensor, count: int | None = None) -> Deltas:
        """What the rule is to learn the batch within. `count`: targets of the whole batch, of which x and y are this
        rank's share."""
        devices = [x.device] if x.is_cuda else []
        with torch.random.fork_rng(devices), _buffers_kept(self.network), Deltas(self.layers) as self.true_deltas:
            self.activations, self.shadow = self._backprop(x, y)
        return self._begin(list(self.network.blocks), y, count)

    def before_some(self, blocks: list[str], y: Tensor, count: int) -> Deltas:
        """As `before`, where no more than some blocks are at hand: what backprop through all of them would say is absent."""
        self.activations, self.shadow, self.layers = {}, None, {}
        return self._begin(blocks, y, count)

    def _begin(self, blocks: list[str], y: Tensor, count: int | None) -> Deltas:
        self.members = {block: [name for name in self.parameters if block_of(name) == block] for block in blocks}
        self.weights = {name: self.parameters[name].detach().clone() for names in self.members.values() for name in names}
        self.left: dict[str, Tensor] = {}
        self.count = self.task.count(y) if count is None else count
        self.rows = len(y)
        self.feedback: dict[str, Products] | None = None
        self.deltas = Deltas(self.layers)
        return self.deltas

    def collect(self, moving: list[nn.Parameter]) -> None:
        """Adds up what the rule left in `.grad` of the network's parameters; called before any of them moves."""
        self._ask_feedback()
        for p in moving:
            name = self.names.get(id(p))
            if name is not None:
                self.left[name] = self.left[name] + p.grad if name in self.left else p.grad.clone()

    def record(self, blocks: dict[str, dict[str, Tensor]]) -> dict:
        """{"layers": {block: {metric: value}}, "total": {metric: value}}: angles in degrees, norms of gradients that are
        averaged over targets. What is undefined is absent."""
        blocks = self._over_ranks(blocks)
        feedback, deltas = self._ask_feedback(), self._compared_deltas()
        products = {name: products_of(left, self.shadow[name]) if self.shadow else Products(norm([left]) ** 2, 0.0, 0.0, 0.0)
                    for name, left in self.left.items()}
        layers = {}
        for block, names in self.members.items():
            values = dict(self.activations.get(block, {}))
            values["weight_norm"] = norm([self.parameters[n] for n in names])
            values.update(self._compared(products, names))
            before = [self.weights.pop(n) for n in names]
            size = norm(before)
            moved = norm([weight.sub_(self.parameters[n].detach()) for n, weight in zip(names, before)])
            if moved and size:
                values["update_ratio"] = moved / size
            if block in deltas:
                values["delta_alignment_deg"] = angle(deltas[block])
            if block in feedback:
                values.update(_of_feedback(feedback[block]))
            values.update(blocks.get(block, {}))
            layers[block] = {key: value for key, value in values.items() if value is not None and math.isfinite(value)}
        total = self._compared(products, list(self.parameters))
        if deltas:
            total["delta_alignment_deg"] = angle(joint(deltas.values()))
        if feedback:
            total.update(_of_feedback(joint(feedback.values())))
        return {"layers": layers, "total": {key: value for key, value in total.items() if value is not None}}

    def _compared(self, products: dict[str, Products], names: list[str]) -> dict[str, float | None]:
        """The rule's update beside backprop's gradient, over the parameters that the rule moved."""
        moved = {name: products[name] for name in names if name in products}
        if not moved:
            return {}
        together = joint(moved.values())
        rule, reference = math.sqrt(together.left) / self.count, math.sqrt(together.right) / self.count
        values = {"alignment_deg": angle(together), "grad_norm": rule, "backprop_grad_norm": reference if self.shadow else None}
        if reference:
            values["grad_norm_ratio"] = rule / reference
        for kind in ("weight", "bias"):
            part = [product for name, product in moved.items() if name.endswith(f".{kind}")]
            if part:
                values[f"alignment_{kind}_deg"] = angle(joint(part))
        return values

    def _ask_feedback(self) -> dict[str, Products]:
        """Weights beside feedback, of each block, as they are in this batch: asked once, before anything moves."""
        if self.feedback is None:
            self.feedback = {block: products_of(*pair) for block, pair in self.rule.feedback().items()}
        return self.feedback

    def _compared_deltas(self) -> dict[str, Products]:
        """The rule's errors beside backprop's, of each block: its layers and the rows of all ranks laid end to end. A layer
        counts where one error of the batch's shape arrived, on every rank."""
        if not self.layers:
            return {}
        parts = []
        for name in self.layers:
            rule, true = self.deltas.take(name), self.true_deltas.take(name)
            there = rule is not None and true is not None and rule.shape == true.shape
            parts.append([*(products_of(rule, true) if there else (0.0,) * 4), float(there)])
        parts = torch.tensor(parts, dtype=torch.float64)
        ranks.total([parts])
        found: dict[str, list[Products]] = {}
        for name, (*products, there) in zip(self.layers, parts.tolist()):
            if there == ranks.world():
                found.setdefault(block_of(name), []).append(Products(*products))
        return {block: joint(products) for block, products in found.items()}

    def _backprop(self, x: Tensor, y: Tensor):
        activations = {}
        with torch.enable_grad():
            h = x
            for name, block in self.network.blocks.items():
                h = block(h)
                activations[name] = _activity(h.detach())
            gradients = torch.autograd.grad(self.task.loss(h, y).sum(), list(self.parameters.values()), allow_unused=True)
        gradients = {name: torch.zeros_like(p) if g is None else g for (name, p), g in zip(self.parameters.items(), gradients)}
        ranks.total(gradients.values())
        return activations, gradients

    def _over_ranks(self, blocks: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, float]]:
        """A rule's own values, each a mean over this rank's rows, as means over the whole batch."""
        names = [(block, key) for block, values in blocks.items() for key in values]
        if not names:
            return {}
        means = torch.stack([blocks[block][key].double() for block, key in names] + [torch.ones((), dtype=torch.float64)
                             .to(next(self.network.parameters()).device)]) * self.rows
        ranks.total([means])
        found: dict[str, dict[str, float]] = {}
        for (block, key), value in zip(names, (means[:-1] / means[-1]).tolist()):
            found.setdefault(block, {})[key] = value
        return found


class Deltas:
    """The errors that arrive at the outputs of weight layers, dL/da of a = W x + b, while it is entered; no hook stays."""

    def __init__(self, layers: dict[str, nn.Module]):
        self.layers, self.handles = layers, []
        self.calls: dict[str, list[list[Tensor]]] = {name: [] for name in layers}   # of each, what arrived

    def __enter__(self) -> Deltas:
        self.handles = [layer.register_forward_hook(partial(self._called, name)) for name, layer in self.layers.items()]
        return self

    def __exit__(self, *_) -> None:
        for handle in self.handles:
            handle.remove()

    def _called(self, name: str, layer: nn.Module, inputs: tuple, output: Tensor) -> None:
        def arrive(error: Tensor | None) -> None:
            if error is not None:   # else cut off on its way; a copy: others may write into it
                arrived.append(error.detach().to(torch.promote_types(error.dtype, torch.float32), copy=True))

        if output.requires_grad:
            self.calls[name].append(arrived := [])
            self.handles.append(output.register_hook(arrive))

    def take(self, name: str) -> Tensor | None:
        """The error at a layer, once; None where it was called or taught more than once, or never."""
        calls = self.calls.pop(name, [])
        return calls[0][0] if len(calls) == 1 == len(calls[0]) else None


class _buffers_kept:
    """Gives a module's buffers (batch statistics) back as they were."""

    def __init__(self, module: nn.Module):
        self.buffers = list(module.buffers())

    def __enter__(self):
        self.saved = [b.clone() for b in self.buffers]

    def __exit__(self, *_):
        with torch.no_grad():
            for buffer, saved in zip(self.buffers, self.saved):
                buffer.copy_(saved)


def _activity(h: Tensor) -> dict[str, float]:
    """Mean, std, and the share of units (channels of maps) that are dead: that do not vary over batch and positions."""
    h = h.float() if h.dtype == torch.bfloat16 else h
    units = h.transpose(0, 1).flatten(1) if h.dim() > 1 else h[None]
    ends = ranks.most(torch.stack([units.amax(1), -units.amin(1)]))
    mean, spread = h.mean(), h.std(correction=0)
    if ranks.world() > 1:  # of several parts as of the whole
        sums = torch.stack([mean.new_ones(()), mean, spread.square() + mean.square()]).double() * h.numel()
        ranks.total([sums])
        mean = sums[1] / sums[0]
        spread = (sums[2] / sums[0] - mean.square()).clamp(min=0).sqrt()
    dead = (ends[0] == -ends[1]).to(h.dtype).mean()
    return dict(zip(("activation_mean", "activation_std", "dead_fraction"),
                    torch.stack([mean.to(h.dtype), spread.to(h.dtype), dead]).tolist()))


def norm(tensors: list[Tensor]) -> float:
    """The length of several tensors as one vector."""
    return math.sqrt(sum(float(torch.linalg.vector_norm(t.detach())) ** 2 for t in tensors))


class Products(NamedTuple):
    """What an angle needs of two vectors a and b, each part adding up over vectors laid end to end:
    |a|^2, |b|^2, |a||b|, and |a||b| |a/|a| - b/|b||^2, which unlike a scalar product is exact where they are alike."""

    left: float
    right: float
    lengths: float
    apart: float


def products_of(left: Tensor, right: Tensor) -> Products:
    """Few passes over the memory: this runs over every weight."""
    left, right = left.detach(), right.detach()
    a, b = float(torch.linalg.vector_norm(left)), float(torch.linalg.vector_norm(right))
    if not a or not b:
        return Products(a * a, b * b, 0.0, 0.0)
    apart = float(torch.linalg.vector_norm(torch.sub(left, right, alpha=a / b))) / a
    return Products(a * a, b * b, a * b, a * b * apart * apart)


def joint(products: Iterable[Products]) -> Products:
    """The products of vectors laid end to end."""
    return Products(*(math.fsum(part) for part in zip(*products)))


def angle(products: Products) -> float | None:
    """In degrees, by half of it, whose sine is exact near 0; None where one of the two vectors is zero."""
    length = math.sqrt(products.left * products.right)
    if not length:
        return None
    gap = 2 * (length - products.lengths) + products.apart  # 2 |a||b| (1 - cos)
    return math.degrees(2 * math.asin(math.sqrt(min(1.0, max(0.0, gap / (4 * length))))))


def _of_feedback(products: Products) -> dict[str, float | None]:
    """Weights W beside their feedback B: the angle between them, |B| / |W| and |W - B| / |W|."""
    values = {"feedback_alignment_deg": angle(products)}
    if products.left:
        apart = products.left + products.right - 2 * products.lengths + products.apart     # |W - B|^2, exactly 0 where B = W
        values["feedback_norm_ratio"] = math.sqrt(products.right / products.left)
        values["feedback_distance"] = math.sqrt(max(0.0, apart) / products.left)
    return values


def add_up(sums: dict[str, Any], values: dict[str, Any]) -> None:
    """Adds a batch's values, nested as they are, to an epoch's [sum, number of values]; of an angle 1 - its cosine, which
    by half of the angle is exact near 0."""
    for key, value in values.items():
        if isinstance(value, dict):
            add_up(sums.setdefault(key, {}), value)
        else:
            total, number = sums.get(key, (0.0, 0))
            sums[key] = [total + (2 * math.sin(math.radians(value) / 2) ** 2 if key.endswith("_deg") else value), number + 1]


def means(sums: dict[str, Any]) -> dict[str, Any]:
    """Of what was added up, over the batches that had the value: means, and angles whose cosine is the mean cosine."""
    def mean(key: str, total: float, number: int) -> float:
        return math.degrees(2 * math.asin(math.sqrt(min(1.0, total / number / 2)))) if key.endswith("_deg") else total / number

    return {key: means(found) if isinstance(found, dict) else mean(key, *found) for key, found in sums.items()}
