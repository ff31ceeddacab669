"""Synthesizers: networks that say what will come to the output of a block, from that output and a context.

One of your own is a function that takes a `Cut` and gives a module with `forward(h, context)`, and a subclass of the rule in a plugin:

    class Mine(DNI):
        facts = Facts(family="synthetic", paper="...", weight_transport=False, backward_locked=False, update_locked=False)
        kinds = {**DNI.kinds, "gated": gated}

with a YAML beside it: `defaults: [dni, _self_]`, `name: mine`, `synthesizer: gated   # gated | linear; ...`. Let its last layer
begin at 0: what an untrained one says would be many times the true gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lbp.algos import ops
from lbp.archs.network import CONVOLUTIONS, activation, norm
from lbp.errors import Refused

CONVOLUTION_OF = dict(zip((2, 3, 4), CONVOLUTIONS))     # by the dimensions of maps with their channels


class Cut(NamedTuple):
    """Where a synthesizer stands: outputs of `shape` for one sample, whose features (units, channels of maps, width of tokens) are
    dimension `axis` of it; a context of so many values; and what its hidden layers are like."""

    shape: tuple[int, ...]
    axis: int
    context: int
    hidden: list[int]
    activation: str
    norm: str
    kernel: int


def features_axis(block: nn.Module, shape: tuple[int, ...]) -> int:
    """Maps (channels, ...) come out of convolutions of as many dimensions; tokens are (positions, width)."""
    maps_of = CONVOLUTION_OF.get(len(shape))
    return 0 if any(type(m) is maps_of for m in block.modules()) else len(shape) - 1


def linear(cut: Cut) -> nn.Module:
    """What is linear in features and context."""
    return mlp(cut._replace(hidden=[]))


def mlp(cut: Cut) -> nn.Module:
    """Dense hidden layers."""
    features = cut.shape[cut.axis]
    return Features(dense(features + cut.context, cut.hidden, features, cut.activation, cut.norm), cut.axis)


def conv(cut: Cut) -> nn.Module:
    """Convolutions over maps; what has none is taken as `mlp` takes it."""
    dims = len(cut.shape) - 1
    if cut.axis or not dims:
        return mlp(cut)
    if cut.kernel % 2 == 0:
        raise Refused(f"algo.kernel={cut.kernel}: a synthesizer answers each position of maps, which takes an odd kernel")
    kind, layers, width = CONVOLUTION_OF[dims + 1], [], cut.shape[0] + cut.context
    for size in cut.hidden:
        layers += [kind(width, size, cut.kernel, padding=cut.kernel // 2), *between(cut.activation, cut.norm, size, kind)]
        width = size
    last = kind(width, cut.shape[0], cut.kernel, padding=cut.kernel // 2)
    return Maps(nn.Sequential(*layers, zeroed(last)))


KINDS: dict[str, Callable[[Cut], nn.Module]] = {"linear": linear, "mlp": mlp, "conv": conv}


def dense(inputs: int, hidden: list[int], outputs: int, activation: str, norm: str) -> nn.Sequential:
    layers: list[nn.Module] = []
    for size in hidden:
        layers += [nn.Linear(inputs, size), *between(activation, norm, size, nn.Linear)]
        inputs = size
    return nn.Sequential(*layers, zeroed(nn.Linear(inputs, outputs)))


def between(activation_name: str, norm_name: str, size: int, kind: type[nn.Module]) -> list[nn.Module]:
    """The norm and the activation of a hidden layer."""
    if norm_name == "batch" and kind in CONVOLUTIONS:
        found = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[CONVOLUTIONS.index(kind)](size)
    else:
        found = norm(norm_name, size, 2 if kind in CONVOLUTIONS else 0)
    return [found, activation(activation_name)]


def zeroed(layer: nn.Module) -> nn.Module:
    """A layer that says 0 until it has learned."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class Features(nn.Module):
    """A dense network over features and context, the same at every position of maps and tokens."""

    def __init__(self, body: nn.Module, axis: int):
        super().__init__()
        self.body, self.axis = body, axis

    def forward(self, h: Tensor, context: Tensor | None) -> Tensor:
        rows = h.movedim(self.axis + 1, -1)
        if context is not None:
            places = [1] * (rows.dim() - context.dim())
            context = context.view(*context.shape[:-1], *places, context.shape[-1]).to(rows.dtype)
            rows = torch.cat([rows, context.expand(*rows.shape[:-1], -1)], -1)
        said = self.body(rows.flatten(0, -2))   # so that a batch norm has a row for each position
        return said.unflatten(0, rows.shape[:-1]).movedim(-1, self.axis + 1)


class Maps(nn.Module):
    """A convolutional network over maps, the context added as channels that are the same everywhere."""

    def __init__(self, body: nn.Module):
        super().__init__()
        self.body = body

    def forward(self, h: Tensor, context: Tensor | None) -> Tensor:
        if context is not None:
            channels = context.to(h.dtype).view(*context.shape, *[1] * (h.dim() - 2))
            h = torch.cat([h, channels.expand(-1, -1, *h.shape[2:])], 1)
        return self.body(h)


class Inputs(nn.Module):
    """What a block will be given, from the network's own input."""

    def __init__(self, in_shape: tuple[int, ...], cut: Cut):
        super().__init__()
        self.shape = cut.shape
        self.body = dense(math.prod(in_shape), cut.hidden, math.prod(cut.shape), cut.activation, cut.norm)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x.flatten(1)).unflatten(1, self.shape)


def regress(said: Tensor, true: Tensor, what: str) -> dict[str, Tensor]:
    """Backpropagates |said - true|^2, summed over the batch, into what said it; and tells how close the two are."""
    pull(said, true)
    return closeness(said, true, what)


def pull(said: Tensor, true: Tensor) -> None:
    """Backpropagates |said - true|^2, summed over the batch, into what said it."""
    (ops.at_least_fp32(said) - ops.at_least_fp32(true.detach())).square().sum().backward()


@torch.no_grad()
def closeness(said: Tensor, true: Tensor, what: str) -> dict[str, Tensor]:
    """The error |said - true|^2 relative to |true|^2 and the angle between the two, over the batch of all ranks, in degrees (nan, and
    then not logged, where one of them is zero)."""
    said, true = ops.at_least_fp32(said), ops.at_least_fp32(true)
    squares = torch.stack([part.square().sum() for part in (said, true, said - true)])
    ops.over_ranks(squares)
    apart = (said / squares[0].sqrt() - true / squares[1].sqrt()).square().sum()
    ops.over_ranks(apart)
    half = (apart.sqrt() / 2).clamp(max=1.0)        # the sine of half of the angle, which is exact near 0
    return {f"{what}_error": squares[2] / squares[1], f"{what}_deg": 2 * torch.rad2deg(torch.asin(half))}
