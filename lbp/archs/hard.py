"""Activations without a derivative, and the same with a straight-through one."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Hard(nn.Module):
    """Base: `values(x)` are the outputs; their derivative is 0 everywhere, or the stand-in `slope(x)` where `straight_through`
    is set (Bengio, Leonard & Courville 2013, arXiv 1308.3432)."""

    straight_through = False

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            values, slope = self.values(x), self.slope(x) if self.straight_through else torch.zeros_like(x)
        return values + (x - x.detach()) * slope        # adds 0: a gradient comes back times the slope


class Sign(Hard):
    """1 where x >= 0, else -1. Straight through: 1 where |x| <= 1 (Hubara et al. 2016, arXiv 1602.02830)."""

    def values(self, x):
        return torch.where(x >= 0, 1.0, -1.0).to(x.dtype)

    def slope(self, x):
        return (x.abs() <= 1).to(x.dtype)


class Step(Sign):
    """1 where x >= 0, else 0; straight through as the sign."""

    def values(self, x):
        return (x >= 0).to(x.dtype)


class Bernoulli(Hard):
    """1 with the probability sigmoid(x), else 0; in eval mode the likelier of the two. Straight through: the probability's derivative."""

    def values(self, x):
        p = torch.sigmoid(x)
        return (torch.rand_like(p) < p if self.training else p >= 0.5).to(x.dtype)

    def slope(self, x):
        p = torch.sigmoid(x)
        return p * (1 - p)


class Argmax(nn.Module):
    """One-hot of the greatest feature (dimension 1), for each sample and position; the first where several are greatest.
    Straight through: the gradient of the softmax."""

    straight_through = False

    def forward(self, x: Tensor) -> Tensor:
        values = torch.zeros_like(x).scatter(1, x.argmax(1, keepdim=True), 1.0)
        soft = x.softmax(1) if self.straight_through else x * 0
        return values + (soft - soft.detach())


class SignSTE(Sign):
    straight_through = True


class StepSTE(Step):
    straight_through = True


class BernoulliSTE(Bernoulli):
    straight_through = True


class ArgmaxSTE(Argmax):
    straight_through = True


def without_derivative(module: nn.Module) -> bool:
    """Whether the module's outputs change in jumps, so that no gradient passes it."""
    return isinstance(module, (Hard, Argmax)) and not module.straight_through
