"""The contract of a learning rule: given the network and a batch, say in which direction each parameter should move."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from lbp import ranks
from lbp.archs.network import Network

GROUPS = ("forward", "feedback", "heads")
Batches = Callable[[int], Iterator[tuple[Tensor, Tensor]]]


@dataclass(frozen=True)
class Facts:
    """What is known of a rule without running it. Literals only: they are read without importing torch."""

    family: str
    paper: str
    weight_transport: bool           # an update uses the forward weights of the layers above
    backward_locked: bool            # a block waits for an error that comes down through the blocks above
    update_locked: bool              # a block waits for the whole forward pass
    labels_at_input: bool = False    # the label is part of the input in training
    needs_derivative: bool = True    # the blocks must be differentiable
    batch_coupled: bool = False      # ranks, accumulation and small batches change the result
    in_place: bool = False           # writes weights itself, beside what it leaves in .grad
    optimized: bool = True           # an optimizer steps something of it
    closed_form: bool = False        # solves; knows neither optimizer nor schedule nor epochs


@dataclass
class Learned:
    """What one batch taught. `out`: the network's output, None where there is none; `loss`: one value a target,
    or their sum; both detached. `blocks`: values worth logging, {block: {metric: 0-dim mean over the batch}}."""

    out: Tensor | None
    loss: Tensor
    blocks: dict[str, dict[str, Tensor]] = field(default_factory=dict)


@dataclass
class Lesson:
    """What one block makes of a batch by itself. `loss`: what it learns by, one value a target or their sum, with its graph;
    None where it learns nothing. `up`: what the block above is handed, detached. `values`: worth logging. `told`: its part of
    Learned.loss. `out`: the network's output, from the block that gives it. Both detached."""

    loss: Tensor | None = None
    up: tuple[Tensor, ...] = ()
    values: dict[str, Tensor] = field(default_factory=dict)
    told: Tensor | None = None
    out: Tensor | None = None


@dataclass
class Solved:
    """What a fit came to. `blocks`: values worth logging, {block: {metric: number}}; `notes`: what a user should know, as a
    solution that had to be regularised."""

    blocks: dict[str, dict[str, float]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


@dataclass
class Phase:
    """A stretch of training. Either `learn(x, y, apply)` batch by batch for `epochs` (None: the trainer's), or
    `fit(batches)` once, where `batches(rows)` starts a pass over the training data, so many rows at a time, in order and
    to the last sample. `restart`: whether the schedule of the learning rate begins anew, over this phase's own epochs."""

    name: str
    learn: Callable[[Tensor, Tensor, Callable], Learned] | None = None
    fit: Callable[[Batches], Solved | None] | None = None
    epochs: int | None = None
    restart: bool = False


class LearningRule(nn.Module):
    """Base of every rule. A subclass makes all its state in `__init__`, as parameters and buffers, and refuses there,
    with the reason, what it cannot train (raise `Refused`).

    Losses and errors are per target and summed: `apply` divides once, by the number of targets that count.
    """

    facts: ClassVar[Facts]

    def __init__(self, network: Network, task):
        super().__init__()
        self.network = network
        self.task = task

    def groups(self) -> dict[str, list[Parameter]]:
        """The parameters that move, by group: one optimizer each. No other names than GROUPS."""
        return {"forward": list(self.network.parameters())}

    def learn(self, x: Tensor, y: Tensor, apply: Callable) -> Learned:
        """Leaves in `.grad` how parameters should move, as a sum over targets. What still has a `.grad` on return is
        stepped. `apply(group, loss)` steps at once whatever in the group has one, and clears it; `loss` (optional) is
        what must be finite for the step to be taken, the gradient itself being tested where it is left out.

        A rule that has `learn_block` need not have this."""
        streaming = getattr(self, "schedule", "streaming") == "streaming"
        return learn_by_blocks(self, self.network.blocks, self.enter(x, y), y, apply, streaming)[1]

    def enter(self, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        """What `learn_block` is handed for the first block."""
        return (x,)

    def learn_block(self, name: str, h: tuple[Tensor, ...], y: Tensor) -> Lesson:
        """What a block, or the head, learns from what the one below handed up, and the labels alone. It neither reads nor moves
        what another block moves: such a rule trains as a pipeline too."""
        raise NotImplementedError

    def predict(self, x: Tensor) -> Tensor:
        """(N, outputs): what the trained rule answers."""
        return self.network(x)

    def phases(self) -> list[Phase]:
        return [Phase("train", learn=self.learn)]

    def feedback(self) -> dict[str, tuple[Tensor, Tensor]]:
        """{block: (forward weights, feedback weights)}, of one shape each, where the rule has feedback to compare."""
        return {}


def learn_by_blocks(rule: LearningRule, names: Iterable[str], h: tuple[Tensor, ...], y: Tensor, apply: Callable,
                    streaming: bool = True) -> tuple[tuple[Tensor, ...], Learned]:
    """Some blocks one after the other, the first handed `h`: what the last hands up, and what was learned. `streaming`: each hidden one
    is stepped as soon as it has run; what moves the others is left in `.grad`."""
    losses, groups, learned = [], [group for group, members in rule.groups().items() if members], Learned(None, torch.zeros(()))
    for name in names:
        lesson = rule.learn_block(name, h, y)
        h = lesson.up
        learned.blocks |= {name: lesson.values} if lesson.values else {}
        learned.out = learned.out if lesson.out is None else lesson.out
        learned.loss = learned.loss if lesson.told is None else learned.loss + lesson.told
        if lesson.loss is not None and streaming and rule.network.blocks[name] is not rule.network.head:
            lesson.loss.sum().backward()
            for group in groups:
                apply(group, lesson.loss.detach())
        elif lesson.loss is not None:
            losses.append(lesson.loss.sum())
    if losses:
        torch.stack(losses).sum().backward()
    return h, learned


class Rng(nn.Module):
    """Noise that a rule draws while it trains. The generator's state is part of the rule's state_dict.

    Drawn on the CPU, so that a run is the same on every device; and for the whole batch on every rank, each of which
    takes its own rows. Seeded from torch's generator when made.
    """

    def __init__(self):
        super().__init__()
        self.generator = torch.Generator().manual_seed(int(torch.randint(2**62, ())))

    def normal(self, like: Tensor) -> Tensor:
        """Standard normal values, shaped as `like`, which has a row for each sample of this rank's batch."""
        rows, mine = ranks.batch_rows(len(like))
        return torch.randn((rows, *like.shape[1:]), generator=self.generator, dtype=like.dtype)[mine].to(like.device)

    def integers(self, high: int, like: Tensor) -> Tensor:
        """Integers from 0 to high - 1, shaped as `like`, which has a row for each sample of this rank's batch."""
        rows, mine = ranks.batch_rows(len(like))
        return torch.randint(high, (rows, *like.shape[1:]), generator=self.generator)[mine].to(like.device)

    def get_extra_state(self) -> Tensor:
        return self.generator.get_state()

    def set_extra_state(self, state: Tensor) -> None:
        self.generator.set_state(state.cpu())
