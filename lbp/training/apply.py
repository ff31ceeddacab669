"""The one place where weights move: sums over ranks, guards, averages, clips and steps what a rule left in `.grad`."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import Parameter

from lbp import ranks
from lbp.errors import Diverged


class Apply:
    """`apply(group)` steps the parameters of a group that have a gradient, and clears them.

    Gradients come in as sums over this rank's targets; they are summed over the ranks and divided here, once, by
    `count`, the whole batch's number of targets; set it before each batch. Where a gradient or the `loss` that a caller
    gives is not finite nothing of the group moves, all gradients are cleared and Diverged is raised. `clip` bounds the norm of a
    group's averaged gradient. `observe`, if set, is called with the group's parameters before anything is changed.

    `still`: whether every gradient since it was set to None was exactly zero.

    Works with any torch optimizers, one a group; groups without one are an error.
    """

    def __init__(self, groups: Mapping[str, list[Parameter]], optimizers: Mapping[str, torch.optim.Optimizer],
                 clip: float | None = None):
        if set(groups) != set(optimizers):
            raise ValueError(f"groups {sorted(groups)} need one optimizer each, got {sorted(optimizers)}")
        self.groups, self.optimizers, self.clip = groups, optimizers, clip
        self.count = 1
        self.observe = None
        self.tested = False     # since the last batch
        self.still: bool | None = None
        self.base = {name: [g["lr"] for g in o.param_groups] for name, o in optimizers.items()}

    def __call__(self, group: str, loss: Tensor | None = None) -> None:
        moving = [p for p in self.groups[group] if p.grad is not None]
        if not moving:
            return
        tested = moving[0].new_zeros(()) if loss is None else loss.detach().sum().to(moving[0].dtype)
        ranks.total([*(p.grad for p in moving), tested])
        self.tested = True
        # A sum is finite where its terms are, and takes one pass; all of them are read back at once.
        *sums, loss_sum = torch.stack([*(p.grad.sum() for p in moving), tested]).tolist()
        self._guard(group, "loss", loss_sum)
        self._guard(group, "update", sum(sums))
        self.still = self.still is not False and not any(sums)
        if self.observe:
            self.observe(moving)
        if self.count:  # a batch whose targets are all masked moves nothing
            for p in moving:
                p.grad.div_(self.count)
            if self.clip:
                self._guard(group, "update", torch.nn.utils.clip_grad_norm_(moving, self.clip))
            self.optimizers[group].step()
        for p in moving:
            p.grad = None

    def _guard(self, group: str, what: str, value: Tensor | float) -> None:
        if not math.isfinite(value):
            self.clear()
            raise Diverged(f"the {what} of group {group!r} became non-finite; lower optimizer.lr, or set trainer.clip")

    def learning_rates(self, factor: float) -> None:
        """Sets every learning rate to `factor` times what its optimizer began with."""
        for name, optimizer in self.optimizers.items():
            for settings, base in zip(optimizer.param_groups, self.base[name]):
                settings["lr"] = base * factor

    def finish(self, loss: Tensor) -> None:
        """Steps every group that still has gradients: the end of a batch. A batch in which none ever had one is tested too."""
        for group in self.groups:
            self(group, loss)
        if not self.tested:
            total = loss.detach().sum()
            ranks.total([total])
            self._guard(next(iter(self.groups), "forward"), "loss", total)
        self.tested = False

    def clear(self) -> None:
        for parameters in self.groups.values():
            for p in parameters:
                p.grad = None

    def state_dict(self) -> dict[str, dict]:
        return {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()}

    def load_state_dict(self, state: Mapping[str, dict]) -> None:
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state[name])
