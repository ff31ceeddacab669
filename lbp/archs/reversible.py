from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lbp.archs.init import initialise
from lbp.archs.network import Layer, Network, activation as make_activation, norm as make_norm
from lbp.errors import Refused


class Coupling(nn.Module):
    """Additive coupling (Dinh et al. 2015; Gomez et al. 2017, arXiv 1707.04585): with the units in two halves, y1 = x1 + F(x2) and
    y2 = x2 + G(y1). Whatever F and G are, `inverse` undoes it exactly."""

    def __init__(self, width: int, activation: str, norm: str):
        super().__init__()
        half = width // 2
        self.f, self.g = (nn.Sequential(Layer(nn.Linear(half, half), make_norm(norm, half, 0), make_activation(activation)), nn.Linear(half, half))
                          for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x1, x2 = x.chunk(2, -1)
        y1 = x1 + self.f(x2)
        return torch.cat([y1, x2 + self.g(y1)], -1)

    def inverse(self, h: Tensor) -> Tensor:
        """The x with forward(x) = h."""
        y1, y2 = h.chunk(2, -1)
        x2 = y2 - self.g(y1)
        return torch.cat([y1 - self.f(x2), x2], -1)


def reversible(task, *, width: int, depth: int, activation: str, norm: str, init: str, init_scale: float) -> Network:
    """A dense layer to `width` units, then `depth` blocks that can be undone, then the head. Images are flattened."""
    if width % 2:
        raise Refused(f"arch.width={width}: arch=reversible couples two halves of the units, so it must be even")
    features = math.prod(task.in_shape)
    stem = Layer(nn.Linear(features, width), make_norm(norm, width, 0), make_activation(activation), flatten=len(task.in_shape) > 1)
    couplings = {f"couple{i}": Coupling(width, activation, norm) for i in range(1, depth + 1)}
    network = Network({"stem": stem, **couplings, "head": nn.Linear(width, task.outputs)}, task.in_shape)
    initialise(network, init, init_scale)
    return network
