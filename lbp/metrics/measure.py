"""What is measured of every layer, beside backprop's gradient of the same batch, weights and dropout mask."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

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

    def before(self, x: Tensor, y: Tensor) -> None:
        devices = [x.device] if x.is_cuda else []
        with torch.random.fork_rng(devices), _buffers_kept(self.network):
            self.activations, self.shadow = self._backprop(x, y)
        self.weights = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.left: dict[str, Tensor] = {}
        self.count = self.task.count(y)

    def collect(self, moving: list[nn.Parameter]) -> None:
        """Adds up what the rule left in `.grad` of the network's parameters."""
        for p in moving:
            name = self.names.get(id(p))
            if name is not None:
                self.left[name] = self.left[name] + p.grad if name in self.left else p.grad.clone()

    def record(self, blocks: dict[str, dict[str, Tensor]]) -> dict:
        """{"layers": {block: {metric: value}}, "total": {metric: value}}: angles in degrees, norms of gradients that are
        averaged over targets. What is undefined is absent."""
        feedback = self.rule.feedback()
        members: dict[str, list[str]] = {name: [] for name in self.network.blocks}
        for name in self.parameters:
            members[block_of(name)].append(name)
        layers = {}
        for block, names in members.items():
            values = dict(self.activations[block])
            values["weight_norm"] = _norm([self.parameters[n] for n in names])
            values.update(self._compared(names))
            moved = _norm([self.parameters[n].detach() - self.weights[n] for n in names])
            if moved:
                values["update_ratio"] = moved / max(_norm([self.weights[n] for n in names]), 1e-30)
            if block in feedback:
                w, b = feedback[block]
                values["feedback_alignment_deg"] = _angle([w], [b])
            values.update({key: float(value) for key, value in blocks.get(block, {}).items()})
            layers[block] = {key: value for key, value in values.items() if value is not None and math.isfinite(value)}
        total = {key: value for key, value in self._compared(list(self.parameters)).items() if value is not None}
        return {"layers": layers, **({"total": total} if total else {})}

    def _compared(self, names: list[str]) -> dict[str, float | None]:
        """The rule's update beside backprop's gradient, over the parameters that the rule moved."""
        moved = [n for n in names if n in self.left]
        if not moved:
            return {}
        rule, shadow = [self.left[n] for n in moved], [self.shadow[n] for n in moved]
        norm, reference = _norm(rule) / self.count, _norm(shadow) / self.count
        values = {"alignment_deg": _angle(rule, shadow), "grad_norm": norm, "backprop_grad_norm": reference}
        if reference:
            values["grad_norm_ratio"] = norm / reference
        for kind in ("weight", "bias"):
            part = [n for n in moved if n.endswith(f".{kind}")]
            if part:
                values[f"alignment_{kind}_deg"] = _angle([self.left[n] for n in part], [self.shadow[n] for n in part])
        return values

    def _backprop(self, x: Tensor, y: Tensor):
        activations = {}
        with torch.enable_grad():
            h = x
            for name, block in self.network.blocks.items():
                h = block(h)
                activations[name] = _activity(h.detach())
            gradients = torch.autograd.grad(self.task.loss(h, y).sum(), list(self.parameters.values()), allow_unused=True)
        return activations, {name: torch.zeros_like(p) if g is None else g
                             for (name, p), g in zip(self.parameters.items(), gradients)}


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
    dead = (units.amax(1) == units.amin(1)).to(h.dtype).mean()
    return dict(zip(("activation_mean", "activation_std", "dead_fraction"),
                    torch.stack([h.mean(), h.std(correction=0), dead]).tolist()))


def _norm(tensors: list[Tensor]) -> float:
    return float(torch.stack([t.detach().double().square().sum() for t in tensors]).sum().sqrt()) if tensors else 0.0


def _angle(left: list[Tensor], right: list[Tensor]) -> float | None:
    """The angle in degrees between two lists of tensors, each as one vector; None where one of them is zero.

    By the half-angle form, exact also near 0, where the arc cosine is not."""
    a = torch.cat([t.detach().double().flatten() for t in left])
    b = torch.cat([t.detach().double().flatten() for t in right])
    na, nb = a.norm(), b.norm()
    if not na or not nb:
        return None
    a, b = a / na, b / nb
    return math.degrees(2 * math.atan2(float((a - b).norm()), float((a + b).norm())))
