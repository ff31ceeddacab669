"""Dense blocks as linear problems: targets of the output taken back through the activation, and least squares."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lbp.algos.targets.halves import Place
from lbp.archs.network import Layer

MARGIN = 1e-3   # of a bounded activation's range: targets are clipped so far inside it, where its inverse is still of order one
INVERSES: dict[type[nn.Module], Callable[[nn.Module, Tensor], Tensor]] = {
    nn.Identity: lambda f, t: t,
    nn.Tanh: lambda f, t: t.clamp(MARGIN - 1, 1 - MARGIN).atanh(),
    nn.Sigmoid: lambda f, t: t.clamp(MARGIN, 1 - MARGIN).logit(),
    nn.Hardtanh: lambda f, t: t.clamp(f.min_val, f.max_val),
    nn.LeakyReLU: lambda f, t: torch.where(t < 0, t / f.negative_slope, t),
    nn.ELU: lambda f, t: torch.where(t < 0, (t / f.alpha).clamp(min=MARGIN - 1, max=0).log1p(), t),
    nn.Softplus: lambda f, t: (t.clamp(min=MARGIN) * f.beta).expm1().log() / f.beta,
}
NAMES = "tanh, sigmoid, hardtanh, leaky_relu, elu, softplus or none"


class Dense:
    """A dense block, activation(x W^T + b), read as a linear problem in double precision; refuses any other."""

    def __init__(self, place: Place):
        block = place.block
        self.linear = block.linear if isinstance(block, Layer) else block
        self.activation = block.activation if isinstance(block, Layer) else nn.Identity()
        if not isinstance(self.linear, nn.Linear):
            raise place.refuse(f"solves dense layers; this is a {type(self.linear).__name__}: choose another half, or, where samples are numbers, arch=mlp")
        if isinstance(block, Layer):
            if not isinstance(block.norm, nn.Identity) or not isinstance(block.pooling, nn.Identity):
                raise place.refuse("takes targets back through the activation to the dense layer itself, with no norm or pool between; "
                                   "use arch.norm=none")
            place.steady("compares outputs of the same samples")
        if type(self.activation) not in INVERSES or getattr(self.activation, "negative_slope", 1) <= 0:
            raise place.refuse(f"takes targets back through the activation, and {type(self.activation).__name__} has no inverse; set "
                               f"arch.activation to one of {NAMES}")

    def rows(self, x: Tensor) -> Tensor:
        """(R, in): a row for each sample, or token."""
        return x.detach().reshape(-1, self.linear.in_features).double()

    def wanted(self, t: Tensor) -> Tensor:
        """(R, out): the pre-activation that gives t, clipped to what the activation can give."""
        return INVERSES[type(self.activation)](self.activation, t.detach().double()).reshape(-1, self.linear.out_features)

    def change(self, h: Tensor, t: Tensor) -> Tensor:
        """(R, out): by how much the pre-activation is to change; exactly 0 where t = h, also outside of what can be had."""
        return self.wanted(t) - self.wanted(h)

    @property
    def weight(self) -> Tensor:
        return self.linear.weight.detach().double()


def gram_solution(gram: Tensor, cross: Tensor, ridge: float) -> Tensor:
    """The w of least norm that minimises w^T gram w - 2 w^T cross + ridge |w|^2: (D, D), (D, C) -> (D, C), double."""
    if ridge:
        factor, info = torch.linalg.cholesky_ex(gram + ridge * torch.eye(len(gram), dtype=gram.dtype, device=gram.device))
        if not info:
            return torch.cholesky_solve(cross, factor)
    values, vectors = torch.linalg.eigh(gram)
    keep = values > values[-1] * len(gram) * torch.finfo(gram.dtype).eps
    return vectors @ ((vectors.T @ cross) * torch.where(keep, 1 / (values + ridge), 0)[:, None])
