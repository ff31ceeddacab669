"""What the two halves of a learning machine have in common: the block's own small problem, and how a half is chosen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from lbp.algos import ops
from lbp.algos.forward.sigprop_parts import statistics_kept
from lbp.errors import Refused
from lbp.knobs import check, coerce, did_you_mean, nearest


class Local:
    """One block on one batch: its input, its output, and what the output is to become. Both halves work on it.

    `x` (N, *in), detached; `h` (N, *out), the block's output; `t`, the target, in at least fp32, once `aim` was called.
    `run` is the block, or the block with another backward operator. `inputs`, `parameters`: whose gradients will be asked for.
    """

    def __init__(self, block: nn.Module, x: Tensor, run: Callable | None = None, inputs: bool = True, parameters: bool = True):
        self.block, self.run = block, run or block
        self.x = x.detach().requires_grad_(inputs)
        self.parameters = [p for p in block.parameters() if p.requires_grad] if parameters else []
        with torch.set_grad_enabled(inputs or bool(self.parameters)):
            self.graph = self.run(self.x)
        self.h = self.graph.detach()
        self.t, self.criterion, self.found = None, None, None

    def aim(self, t: Tensor, criterion: Callable | None = None) -> None:
        """Sets the target. `criterion(h, rows)`: a loss for each sample, where it is not half the squared distance to the target;
        `rows` are the samples that h has outputs of, None for all in their order."""
        self.t = t = t.detach()
        self.criterion = criterion or (lambda h, rows: (h - (t if rows is None else t[rows])).square().flatten(1).sum(1) / 2)
        self.found = None

    def loss(self, h: Tensor, rows: Tensor | None = None) -> Tensor:
        """(len(h),): the local loss of each output, in at least fp32."""
        return self.criterion(ops.at_least_fp32(h), rows)

    def gradients(self) -> tuple[Tensor | None, list[Tensor | None]]:
        """Of the summed local loss by the input and by the parameters: found together, once for all who ask."""
        if self.found is None:
            if self.graph is None:
                with torch.enable_grad(), statistics_kept(self.block):
                    self.graph = self.run(self.x)
            by = [self.x] * self.x.requires_grad + self.parameters
            with torch.enable_grad():
                found = gradients(self.loss(self.graph).sum(), by)
            self.graph = None
            self.found = found.pop(0) if self.x.requires_grad else None, found
        return self.found

    def leave(self) -> None:
        """Adds the gradients by the parameters to their `.grad`."""
        for p, g in zip(self.parameters, self.gradients()[1]):
            add_gradient(p, g)

    def renew(self) -> None:
        """To be called when the parameters have moved: what follows is found with the new ones."""
        torch.clear_autocast_cache()     # which holds the old weights, cast down
        self.graph = self.found = None


def gradients(loss: Tensor, by: list[Tensor]) -> list[Tensor | None]:
    """The loss's derivatives by some leaves, whose `.grad` stays; not by autograd.grad, in which torch's FLOP counter fails."""
    held = [leaf.grad for leaf in by]
    for leaf in by:
        leaf.grad = None
    loss.backward(inputs=by)
    found = [leaf.grad for leaf in by]
    for leaf, grad in zip(by, held):
        leaf.grad = grad
    return found


def add_gradient(p: nn.Parameter, g: Tensor | None) -> None:
    if g is not None:
        p.grad = g if p.grad is None else p.grad + g


class Knob(NamedTuple):
    """A half's knob, as a line of an option's YAML has it."""

    default: Any
    spec: str
    doc: str


@dataclass
class Place:
    """Where a half is to work: the block, the shapes of one sample's input and output, and how to speak of it."""

    block: nn.Module
    below: tuple[int, ...]
    above: tuple[int, ...]
    where: str = "LearningMachine: the block"       # begins every refusal
    half: str = ""                                  # the key that chose the half
    inverse: Callable[[bool], nn.Module] | None = None      # (bias) -> a map from outputs back to inputs, to be learned

    def refuse(self, reason: str) -> Refused:
        return Refused(f"{self.where}: {self.half} {reason}")

    def steady(self, why: str) -> None:
        """Refuses blocks whose output for a sample depends on other samples, or on chance."""
        if found := ops.unsteady(self.block):
            raise self.refuse(why + {"batch norm": ", whose statistics would enter its batch norm; use arch.norm=none or layer",
                                     "dropout": ", of which dropout would drop other units each time; use arch.dropout=0",
                                     "draws": ", for which its units would be drawn anew each time; use arch.activation=step"}[found])


class Half(nn.Module):
    """Base of both halves: `knobs` by name, `doc` in a line, and what the choice of it makes of the rule's facts."""

    knobs: ClassVar[dict[str, Knob]] = {}
    doc: ClassVar[str]
    needs_derivative: ClassVar[bool] = False
    batch_coupled: bool = False


class StepTheta(Half):
    """How a block's parameters move towards its target."""

    writes: ClassVar[bool] = False      # parameters, itself
    settles: bool = False               # needs its gradients stepped in the middle
    leaves: ClassVar[bool] = True       # gradients, for the optimizer

    def step(self, local: Local, settle: Callable[[], None] | None) -> dict[str, Tensor] | None:
        """Moves the parameters, or leaves their gradients, summed over samples, in `.grad`; `settle` steps those at once. May return what
        is worth logging."""
        raise NotImplementedError


class StepX(Half):
    """How a target is made for a block's input. `transports`: by the block's own weights."""

    transports: ClassVar[bool] = True
    passes: ClassVar[bool] = True       # whether the blocks below are to be taught at all

    def run(self, block: nn.Module) -> Callable[[Tensor], Tensor]:
        """The block, as it is to be run forwards."""
        return block

    def learn(self, local: Local, settle: Callable[[Tensor], None] | None) -> dict[str, Tensor]:
        """Trains what the half learns itself, before it is asked; `settle(loss)` steps that. Returns what is worth logging."""
        return {}

    def target(self, local: Local) -> Tensor:
        """x' (N, *in), in at least fp32."""
        raise NotImplementedError


def choose(kinds: dict[str, type[Half]], wish: str | dict[str, Any], place: Place, key: str) -> Half:
    """The half that a name, or a map with a name and knobs, stands for; raises Refused where it is none or a knob is not its own."""
    name, *_ = (wish.get("name"),) if isinstance(wish, dict) else (wish,)
    place.half = f"{key}={name}"
    if name not in kinds:
        raise Refused(f"{place.where}: {key}={wish}: a half is a name, or {{name: .., knobs}}; there are: {', '.join(kinds)}"
                      + did_you_mean(nearest(str(name), kinds)))
    kind, given = kinds[name], {k: v for k, v in wish.items() if k != "name"} if isinstance(wish, dict) else {}
    values = {knob: default for knob, (default, *_) in kind.knobs.items()}
    for knob, value in given.items():
        if knob not in kind.knobs:
            raise place.refuse(f"has no knob {knob}; it has: {', '.join(kind.knobs) or 'none'}{did_you_mean(nearest(knob, kind.knobs))}")
        if problem := check(f"{key}.{knob}", value, kind.knobs[knob].spec):
            raise Refused(f"{place.where}: {problem}")
        values[knob] = coerce(value, kind.knobs[knob].spec)
    return kind(place, **values)
