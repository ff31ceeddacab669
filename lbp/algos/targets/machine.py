"""Learning machines for plain PyTorch code: blocks that learn from targets, in one graph with ordinary modules."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lbp.algos.targets.halves import Local, Place, StepTheta, StepX, choose
from lbp.algos.targets.inputs import INPUTS
from lbp.algos.targets.theta import THETA

MODES = ("accumulate", "step", "step_first", "step_x")


class LearningMachine(nn.Module):
    """A block that learns from targets in a way of its own, and yet stands in a graph with ordinary modules.

    `loss(machine(x), t).backward()`: the gradient g that reaches the machine becomes the target y - g of its output y; its half
    `theta` moves the parameters towards that, and its half `x` makes a target x' for the input, whose difference x - x' goes on
    as the input's gradient. With the halves' defaults this is backprop. **This is the one class that runs a backward inside a
    backward**: its own, over a graph that holds this block alone; derivatives of derivatives are refused.

    `theta`, `x`: a name, a map with a name and knobs, or a half of one's own (a StepTheta, a StepX). `mode`:
    accumulate: gradients are left in `.grad`, and one's own optimizer steps; step: the input's target is made with the old
    parameters, then they move; step_first: they move, then it is made with the new ones; step_x: parameters stay.
    `optimizer`: for the modes that step, a function of a list of parameters; not needed by halves that write parameters
    themselves. `in_shape`: of one sample, where the block does not begin with an nn.Linear and a half needs it.
    """

    def __init__(self, block: nn.Module, theta: str | dict[str, Any] | StepTheta = "gradient", x: str | dict[str, Any] | StepX = "gradient",
                 *, mode: str = "accumulate", optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer] | None = None,
                 in_shape: Sequence[int] | None = None):
        super().__init__()
        if mode not in MODES:
            raise ValueError(f"mode={mode}: must be one of {', '.join(MODES)}")
        place = _place(block, in_shape)
        self.block, self.mode = block, mode
        self.theta = theta if isinstance(theta, StepTheta) else choose(THETA, theta, place, "theta")
        self.x = x if isinstance(x, StepX) else choose(INPUTS, x, place, "x")
        moving = [p for p in block.parameters() if p.requires_grad] if not self.theta.writes else []
        moving += self.theta.parameters()
        if mode == "accumulate" and (self.theta.writes or self.theta.settles):
            raise ValueError(f"mode=accumulate leaves gradients alone, and theta={theta} moves the parameters itself; use mode=step")
        self.optimizers = {}
        if mode in ("step", "step_first"):
            groups = {"block": moving, "x": list(self.x.parameters())}
            if any(groups.values()) and optimizer is None:
                raise ValueError(f"mode={mode} needs optimizer=, such as lambda parameters: torch.optim.SGD(parameters, 0.1)")
            self.optimizers = {name: optimizer(parameters) for name, parameters in groups.items() if parameters}

    def forward(self, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return self.block(x)
        # Something that requires a gradient must go in, or autograd would pass by a machine whose input does not.
        return _Bridge.apply(x, x.new_empty(0, dtype=torch.float32, requires_grad=True), self)

    def step(self, x: Tensor, t: Tensor) -> None:
        """Moves the parameters towards f(x) = t; in mode accumulate leaves the gradients of |f(x) - t|^2 / 2, summed, in `.grad`."""
        self._step(self._local(x, t, inputs=False))

    def step_x(self, x: Tensor, t: Tensor) -> Tensor:
        """A target x' for the input, given the target t of the output."""
        return self._step_x(self._local(x, t, parameters=False)).to(x.dtype)

    def _local(self, x: Tensor, t: Tensor | None = None, inputs: bool = True, parameters: bool = True) -> Local:
        local = Local(self.block, x, self.x.run(self.block), inputs and self.x.needs_derivative, parameters and self.theta.needs_derivative)
        if t is not None:
            local.aim(t)
        return local

    def _step(self, local: Local) -> None:
        settle = (lambda: self._settle("block")) if "block" in self.optimizers and self.mode != "accumulate" else None
        self.theta.step(local, settle if self.theta.settles else None)
        if settle and not self.theta.settles:
            settle()
        local.renew()

    def _step_x(self, local: Local) -> Tensor:
        if self.mode != "step_x":
            self.x.learn(local, (lambda loss: self._settle("x")) if "x" in self.optimizers else None)
        return self.x.target(local)

    def _settle(self, name: str) -> None:
        self.optimizers[name].step()
        self.optimizers[name].zero_grad()

    def _learn(self, local: Local, wanted: bool) -> Tensor | None:
        """Both halves in the mode's order; the input's target, where it is wanted."""
        if self.mode == "step_first":
            self._step(local)
        target = self._step_x(local) if wanted else None
        if self.mode in ("accumulate", "step"):
            self._step(local)
        return target


class _Bridge(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, anchor, machine):
        ctx.machine = machine
        ctx.local = machine._local(x, inputs=ctx.needs_input_grad[0], parameters=machine.mode != "step_x")
        return ctx.local.h

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        local = ctx.local
        local.aim(local.h - g)
        target = ctx.machine._learn(local, ctx.needs_input_grad[0])
        return None if target is None else (local.x.detach() - target).to(local.x.dtype), None, None


def _place(block: nn.Module, in_shape: Sequence[int] | None) -> Place:
    """Shapes are found by a sample of zeros; without `in_shape`, of the size that the first nn.Linear takes."""
    first = next((m for m in block.modules() if isinstance(m, nn.Linear)), None)
    below = tuple(in_shape) if in_shape is not None else (first.in_features,) if first is not None else ()
    if not below or not math.prod(below):
        return Place(block, (), ())
    modes = {module: module.training for module in block.modules()}
    p = next(block.parameters(), torch.empty(0))
    try:
        with torch.no_grad():
            above = tuple(block.eval()(p.new_zeros(1, *below)).shape[1:])
    finally:
        for module, mode in modes.items():
            module.training = mode
    return Place(block, below, above)
