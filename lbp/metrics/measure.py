"""What is measured of every layer, beside backprop's gradient of the same batch, weights and dropout mask."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lbp import ranks
from lbp.archs.network import block_of


class Measure:
    """One measured batch: `before` it is learned, `collect` at each apply, `record` after.

    Nothing of the training changes, to the bit: the shadow pass runs on copies of the buffers and gives the random state
    back.
    """

    def __init__(self, rule, task):
        self.rule, self.network, self.task = rule, rule.network, task
        self.parameters = dict(self.network.named_parameters())
        self.names = {id(p): name for name, p in self.parameters.items()}

    def before(self, x: Tensor, y: Tensor, count: int | None = None) -> None:
        """`count`: targets of the whole batch, of which x and y are this rank's share."""
        devices = [x.device] if x.is_cuda else []
        with torch.random.fork_rng(devices), _buffers_kept(self.network):
            self.activations, self.shadow = self._backprop(x, y)
        self.weights = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.left: dict[str, Tensor] = {}
        self.count = self.task.count(y) if count is None else count
        self.rows = len(x)

    def collect(self, moving: list[nn.Parameter]) -> None:
        """Adds up what the rule left in `.grad` of the network's parameters."""
        for p in moving:
            name = self.names.get(id(p))
            if name is not None:
                self.left[name] = self.left[name] + p.grad if name in self.left else p.grad.clone()

    def record(self, blocks: dict[str, dict[str, Tensor]]) -> dict:
        """{"layers": {block: {metric: value}}, "total": {metric: value}}: angles in degrees, norms of gradients that are
        averaged over targets. What is undefined is absent."""
        blocks = self._over_ranks(blocks)
        feedback = {block: products_of(*pair) for block, pair in self.rule.feedback().items()}
        products = {name: products_of(left, self.shadow[name]) for name, left in self.left.items()}
        members: dict[str, list[str]] = {name: [] for name in self.network.blocks}
        for name in self.parameters:
            members[block_of(name)].append(name)
        layers = {}
        for block, names in members.items():
            values = dict(self.activations[block])
            values["weight_norm"] = norm([self.parameters[n] for n in names])
            values.update(self._compared(products, names))
            before = [self.weights.pop(n) for n in names]
            size = norm(before)
            moved = norm([weight.sub_(self.parameters[n].detach()) for n, weight in zip(names, before)])
            if moved and size:
                values["update_ratio"] = moved / size
            if block in feedback:
                values["feedback_alignment_deg"] = angle(feedback[block])
            values.update(blocks.get(block, {}))
            layers[block] = {key: value for key, value in values.items() if value is not None and math.isfinite(value)}
        total = self._compared(products, list(self.parameters))
        if feedback:
            total["feedback_alignment_deg"] = angle(joint(feedback.values()))
        return {"layers": layers, "total": {key: value for key, value in total.items() if value is not None}}

    def _compared(self, products: dict[str, Products], names: list[str]) -> dict[str, float | None]:
        """The rule's update beside backprop's gradient, over the parameters that the rule moved."""
        moved = {name: products[name] for name in names if name in products}
        if not moved:
            return {}
        together = joint(moved.values())
        rule, reference = math.sqrt(together.left) / self.count, math.sqrt(together.right) / self.count
        values = {"alignment_deg": angle(together), "grad_norm": rule, "backprop_grad_norm": reference}
        if reference:
            values["grad_norm_ratio"] = rule / reference
        for kind in ("weight", "bias"):
            part = [product for name, product in moved.items() if name.endswith(f".{kind}")]
            if part:
                values[f"alignment_{kind}_deg"] = angle(joint(part))
        return values

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
