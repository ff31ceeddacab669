from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lbp.algos import ops
from lbp.algos.rule import Facts, Learned, LearningRule, Phase
from lbp.archs.network import CONVOLUTIONS, NORMS, Layer
from lbp.errors import Refused

MOMENTUM = 0.1    # of running statistics, as torch's batch norms have it


class SoftHebb(LearningRule):
    """SoftHebb: units compete softly for each input, and the winner's weights move towards it; a linear read-out follows.

    At each position y = softmax(inverse_temperature u) over the units, negated for all but the winner, and the change
    is the sum of y (x - u w), over its greatest value, times ||w| - 1|^rate_power: norms of weights fall to 1 (Journe et
    al. 2023; Moraitis et al. 2022). A block's inputs are standardised, of its output the mean over units is taken off
    before the activation, and what is left is raised to a power. No labels: after `feature_epochs` all this stays,
    and the head, which begins at 0, learns alone, by its exact gradient.
    """

    facts = Facts(
        family="hebbian", paper="Journe et al., ICLR 2023, arXiv 2209.11883; Moraitis et al., Neuromorph. Comput. Eng. 2 (2022)",
        weight_transport=False, backward_locked=False, update_locked=False, needs_derivative=False, batch_coupled=True, in_place=True)

    def __init__(self, network, task, *, inverse_temperature: list[float], rates: list[float], rate_power: float,
                 power: list[float], standardise: str, feature_epochs: int, readout_norm: str, readout_dropout: float):
        super().__init__(network, task)
        plain_features(network, "softhebb", "it standardises each block's inputs itself")
        self.inverse_temperature = by_name(inverse_temperature, network.hidden, "inverse_temperature")
        self.rates, self.power = by_name(rates, network.hidden, "rates"), by_name(power, network.hidden, "power")
        self.rate_power, self.feature_epochs = rate_power, feature_epochs
        self.readout_norm, self.readout_dropout = readout_norm, readout_dropout
        with torch.no_grad():    # it would be drawn as far from 0 as the hidden weights have to be
            for p in network.head.parameters():
                p.zero_()
        for kind, start in (("mean", torch.zeros), ("var", torch.ones)):
            if readout_norm == "unit":
                weight = network.head.weight
                self.register_buffer(f"{kind}_head", start(weight.shape[1], dtype=weight.dtype, device=weight.device))
        for name, layer in network.hidden.items():
            maps = isinstance(layer.linear, CONVOLUTIONS)
            if standardise == "all" or standardise == "channels" and maps:
                weight, channels = layer.linear.weight.detach(), layer.linear.in_channels if maps else layer.linear.in_features
                self.register_buffer(f"mean_{name}", weight.new_zeros(channels))
                self.register_buffer(f"var_{name}", weight.new_ones(channels))

    def groups(self):
        return {"forward": [layer.linear.weight for layer in self.network.hidden.values()],
                "heads": list(self.network.head.parameters())}

    def phases(self):
        features = Phase("features", learn=self.learn_features, epochs=self.feature_epochs, restart=True)
        return [*[features] * (self.feature_epochs > 0), Phase("readout", learn=self.learn_readout, restart=True)]

    def learn(self, x, y, apply):
        """Features and read-out at once; a run trains one after the other."""
        return self._learn(x, y, True, True)

    def learn_features(self, x, y, apply):
        return self._learn(x, y, True, False)

    def learn_readout(self, x, y, apply):
        return self._learn(x, y, False, True)

    def _learn(self, x, y, features: bool, readout: bool):
        found, count = {} if features else None, self.task.count(y)
        with torch.no_grad(), ops.full_precision(x):
            h = self.features(x, found, count)
            statistics = batch_statistics(h, -1) if self.readout_norm == "unit" else ()
            h = normalised(h, -1, *statistics)
        out = self.network.head(F.dropout(h, self.readout_dropout if readout else 0.0))
        loss = self.task.loss(out, y)
        if readout:
            loss.sum().backward()
        self._keep(found or {}, statistics, loss)
        blocks = {name: {"norm_gap": (norms(self.network.blocks[name].linear.weight) - 1).abs().mean(), "winner_share": winner}
                  for name, (winner, *_) in (found or {}).items()}
        return Learned(out.detach(), loss.detach(), blocks)

    def features(self, x: Tensor, found: dict | None = None, count: int = 0) -> Tensor:
        """What the head reads. With `found`, statistics are those of the batch, each block's change is left in its `.grad` (times
        `count`, as it is no sum) before the next one runs, and `found` receives the winner's mean share and the statistics."""
        for name, layer in self.network.hidden.items():
            x, axis, statistics = ops.at_least_fp32(layer.incoming(x)), unit_axis(layer), ()
            if hasattr(self, f"mean_{name}"):
                running = getattr(self, f"mean_{name}"), getattr(self, f"var_{name}")
                statistics = running if found is None else batch_statistics(x, axis)
                x = normalised(x, axis, *statistics)
            if found is None:
                u = layer.linear(x)
            else:
                with torch.enable_grad():
                    u = layer.linear(x)
                y = soft_winner_take_all(u.detach(), self.inverse_temperature[name], axis)
                change = hebbian_change(u, y, layer.linear.weight, layer.linear.bias, axis)
                ops.over_ranks(change)
                weight = layer.linear.weight
                rate = self.rates[name] * ((norms(weight) - 1).abs() + 1e-10) ** self.rate_power
                weight.grad = change / change.abs().amax().clamp(min=1e-30) * along(rate, weight, 0) * -count
                found[name] = y.amax(axis).mean(), *statistics
                u = u.detach()
            h = layer.activate(triangle(ops.at_least_fp32(u), axis))
            x = layer.pool(h if self.power[name] == 1 else h.sign() * h.abs() ** self.power[name])
        return x

    @torch.no_grad()
    def _keep(self, found: dict, of_features: tuple, loss: Tensor) -> None:
        """Statistics into the running ones, unless the batch will be refused."""
        finite = ops.all_finite(loss) > 0
        kept = {name: statistics for name, (_, *statistics) in found.items()}
        for name, statistics in {**kept, "head": of_features}.items():
            for kind, new in zip(("mean", "var"), statistics):
                running = getattr(self, f"{kind}_{name}")
                running.copy_(torch.where(finite, torch.lerp(running, new.to(running.dtype), MOMENTUM), running))

    def predict(self, x):
        statistics = (self.mean_head, self.var_head) if self.readout_norm == "unit" else ()
        return self.network.head(normalised(self.features(x), -1, *statistics))


def soft_winner_take_all(u: Tensor, inverse_temperature: float, axis: int) -> Tensor:
    """The softmax of u over the units at `axis`, negative for all but the greatest."""
    y = (inverse_temperature * u).softmax(axis)
    return torch.scatter(-y, axis, u.argmax(axis, keepdim=True), y.amax(axis, keepdim=True))


def hebbian_change(u: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None, axis: int) -> Tensor:
    """The sum over samples and positions of y (x - u w), in the weight's shape, for u = w x + bias with its graph. The sum
    of y x is what autograd gives for the weight of a layer, dense or convolution, whose output has the gradient y."""
    toward, = torch.autograd.grad(u, weight, y)
    wx = u.detach() if bias is None else u.detach() - along(bias.detach(), u, axis)
    return toward - along((y * wx).sum(others(u, axis)), weight, 0) * weight.detach()


def triangle(u: Tensor, axis: int) -> Tensor:
    """u less its mean over the units; a relu of it is the triangle activation."""
    return u - u.mean(axis, keepdim=True)


def normalised(x: Tensor, axis: int, mean: Tensor | None = None, var: Tensor | None = None) -> Tensor:
    return x if mean is None else (x - along(mean, x, axis)) / (along(var, x, axis) + 1e-5).sqrt()


def norms(weight: Tensor) -> Tensor:
    """The length of each unit's incoming weights."""
    return weight.detach().flatten(1).norm(dim=1)


def batch_statistics(x: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """Mean and variance of each channel over samples, positions and ranks."""
    total, count = x.sum(others(x, axis)), x.new_tensor(float(x.numel() // x.shape[axis]))
    ops.over_ranks(total, count)
    mean = total / count
    squares = (x - along(mean, x, axis)).square().sum(others(x, axis))
    ops.over_ranks(squares)
    return mean, squares / count


def unit_axis(layer: Layer) -> int:
    """Where a layer's units are in its inputs and outputs: the channels of maps, the last axis of vectors and tokens."""
    return 1 if isinstance(layer.linear, CONVOLUTIONS) else -1


def others(x: Tensor, axis: int) -> list[int]:
    return [d for d in range(x.dim()) if d != axis % x.dim()]


def along(values: Tensor, x: Tensor, axis: int) -> Tensor:
    """A vector shaped to go along one axis of x."""
    return values.view([-1 if d == axis % x.dim() else 1 for d in range(x.dim())])


def by_name(values: list, hidden: Iterable[str], knob: str) -> dict[str, Any]:
    """A value for each block; the last of the list is for all further ones. Raises Refused for an empty list."""
    if not values:
        raise Refused(f"algo.{knob}=[]: needs a value at least, the last being for all further blocks")
    return {name: values[min(i, len(values) - 1)] for i, name in enumerate(hidden)}


def plain_features(network, rule: str, why: str) -> None:
    """Raises Refused for hidden blocks that are no plain layers, or have a norm or dropout."""
    for name, layer in ops.plain_layers(network, rule).items():
        if isinstance(layer.norm, NORMS):
            raise Refused(f"algo={rule} takes no norm (block {name} has {type(layer.norm).__name__}): {why}; use arch.norm=none")
        if isinstance(layer.dropout, nn.Dropout) and layer.dropout.p:
            raise Refused(f"algo={rule} takes no dropout in hidden blocks (block {name} has it), whose units compete or are "
                          "compared; use arch.dropout=0, and algo.readout_dropout for the head's inputs")
