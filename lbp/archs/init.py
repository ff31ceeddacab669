"""How weights are drawn: one vocabulary for forward and feedback weights."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lbp.archs.network import CONVOLUTIONS

KINDS = ("default", "xavier", "kaiming", "lecun", "orthogonal")


def draw(weight: Tensor, kind: str, scale: float = 1.0) -> Tensor:
    """Fills `weight` (out, in, ...) in place and returns it; values are multiplied by `scale`.

    default: U(+-1/sqrt(fan_in)), torch's own for Linear and Conv; xavier: U(+-sqrt(6/(fan_in+fan_out)))
    (Glorot & Bengio 2010); kaiming: N(0, 2/fan_in) (He et al. 2015); lecun: N(0, 1/fan_in);
    orthogonal: Saxe et al. 2014.
    """
    with torch.no_grad():
        if kind == "default":
            nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
        elif kind == "xavier":
            nn.init.xavier_uniform_(weight)
        elif kind == "kaiming":
            nn.init.kaiming_normal_(weight, nonlinearity="relu")
        elif kind == "lecun":
            nn.init.kaiming_normal_(weight, nonlinearity="linear")
        elif kind == "orthogonal":
            nn.init.orthogonal_(weight)
        else:
            raise ValueError(f"init={kind}: must be one of {', '.join(KINDS)}")
        return weight.mul_(scale)


def initialise(network: nn.Module, kind: str) -> None:
    """Redraws every dense and convolutional weight; biases become 0. `default` leaves torch's own draw."""
    if kind == "default":
        return
    for module in network.modules():
        if isinstance(module, (nn.Linear, *CONVOLUTIONS)):
            draw(module.weight, kind)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
