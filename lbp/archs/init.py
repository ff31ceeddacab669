"""How weights are drawn: one vocabulary for forward and feedback weights."""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor, nn

from lbp.archs.network import CONVOLUTIONS

KINDS = ("default", "xavier", "xavier_normal", "kaiming", "kaiming_uniform", "lecun", "uniform", "variance_scaling",
         "orthogonal", "zeros")


def draw(weight: Tensor, kind: str, scale: float = 1.0, generator: Generator | None = None) -> Tensor:
    """Fills `weight` (out, in, ...) in place and returns it; values are multiplied by `scale`.

    default: U(+-1/sqrt(fan_in)), torch's own for Linear and Conv; xavier: U(+-sqrt(6/(fan_in+fan_out))), xavier_normal:
    N(0, 2/(fan_in+fan_out)) (Glorot & Bengio 2010); kaiming: N(0, 2/fan_in), kaiming_uniform: U(+-sqrt(6/fan_in)) (He et
    al. 2015); lecun: N(0, 1/fan_in); uniform: U(-1, 1); variance_scaling: N(0, scale/fan_in), where the scale is the
    variance's, as in JAX; orthogonal: Saxe et al. 2014; zeros.
    """
    if kind == "variance_scaling":
        kind, scale = "lecun", math.sqrt(scale)
    with torch.no_grad():
        if kind == "default":
            nn.init.kaiming_uniform_(weight, a=math.sqrt(5), generator=generator)
        elif kind == "xavier":
            nn.init.xavier_uniform_(weight, generator=generator)
        elif kind == "xavier_normal":
            nn.init.xavier_normal_(weight, generator=generator)
        elif kind == "kaiming":
            nn.init.kaiming_normal_(weight, nonlinearity="relu", generator=generator)
        elif kind == "kaiming_uniform":
            nn.init.kaiming_uniform_(weight, nonlinearity="relu", generator=generator)
        elif kind == "lecun":
            nn.init.kaiming_normal_(weight, nonlinearity="linear", generator=generator)
        elif kind == "uniform":
            nn.init.uniform_(weight, -1, 1, generator=generator)
        elif kind == "orthogonal":
            nn.init.orthogonal_(weight, generator=generator)
        elif kind == "zeros":
            nn.init.zeros_(weight)
        else:
            raise ValueError(f"init={kind}: must be one of {', '.join(KINDS)}")
        return weight.mul_(scale)


def spread(weight: Tensor, kind: str, scale: float = 1.0) -> float:
    """The standard deviation of what `draw` would fill `weight` with."""
    fan_in, fan_out = weight[0].numel(), weight.shape[0] * weight[0, 0].numel()
    variance = {"default": 1 / (3 * fan_in), "xavier": 2 / (fan_in + fan_out), "xavier_normal": 2 / (fan_in + fan_out),
                "kaiming": 2 / fan_in, "kaiming_uniform": 2 / fan_in, "lecun": 1 / fan_in, "uniform": 1 / 3,
                "variance_scaling": 1 / (scale * fan_in), "orthogonal": 1 / max(fan_in, weight.shape[0]), "zeros": 0.0}[kind]
    return scale * math.sqrt(variance)


def initialise(network: nn.Module, kind: str, scale: float = 1.0) -> None:
    """Redraws every dense and convolutional weight; biases become 0. `default` leaves torch's own draw, but for the scale."""
    for module in network.modules():
        if isinstance(module, (nn.Linear, *CONVOLUTIONS)):
            if kind == "default":
                with torch.no_grad():
                    module.weight.mul_(scale)
                continue
            draw(module.weight, kind, scale)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
