"""The loop of a network whose blocks are stages on several ranks: batches go up, nothing comes down, all stages work at once."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lbp import ranks
from lbp.algos.rule import Learned, Phase, learn_by_blocks
from lbp.metrics.measure import Deltas
from lbp.training.loop import Loop
from lbp.training.setup import Experiment

AHEAD = 2       # messages on their way between two stages, at either end


class Pipeline(Loop):
    """As Loop, but that of a batch each rank learns the blocks of its stage alone, while those below are at later batches.

    A batch reaches a stage when the batches before it have been learned there, which is all that its blocks see of the others:
    the numbers are those of one process that steps each block as soon as it has run. Where the first stage would end or save it
    sends a halt up in place of a batch, so that all stages stop at the same one. Then, and at an epoch's end, they tell each
    other what they learned; evaluation, checkpoints and what is written are as under other ranks.
    """

    def __init__(self, experiment: Experiment, log, folder: Path, content: dict[str, Any] | None):
        super().__init__(experiment, log, folder, content)
        stages, self.stage = experiment.stages, ranks.rank()
        self.state.stages, self.state.flops_per_sample = stages.counts, stages.flops
        self.noted: list[tuple[dict[str, Any], bool, bool]] = []
        hands = [list(turns.values())[-1].hands for turns in stages.turns]
        self.below = Channel(self.stage - 1, hands[self.stage - 1]) if self.stage else None
        self.above = Channel(self.stage + 1, hands[self.stage]) if self.stage + 1 < ranks.world() else None
        self.busy, self.wall = [0.0] * ranks.world(), 0.0

    def run(self) -> dict[str, Any]:
        return super().run() | {"stages": [{"blocks": list(turns), "idle_share": 1 - busy / max(self.wall, 1e-9)}
                                           for turns, busy in zip(self.experiment.stages.turns, self.busy)]}

    def learn(self, phase: Phase) -> None:
        mine, steps = replace(phase, learn=self.learn_stage), self.data.train.steps
        self.apply.still = self.state.still if self.state.batch else None
        while self.state.batch < steps:
            self.progress.start_lap()
            if self.progress.ends_before(0):
                return
            began, waited = time.perf_counter(), self.waited()
            with ranks.alone():
                for h, y in self.arriving(steps - self.state.batch) if self.below else self.entering():
                    self.apply.count = self.task.count(y)
                    self.step(mine, h, y)
                    if self.above:
                        self.above.put(self.up)
                if self.above:
                    for _ in range(min(AHEAD, steps - self.state.batch)):
                        self.above.put(None)
                    self.above.settle()
            took = time.perf_counter() - began
            busy, flow = ranks.gathered(took - self.waited() + waited, took)
            self.progress.lap()
            self.busy, self.wall = [a + b for a, b in zip(self.busy, busy)], self.wall + max(flow)
            self.share()

    def entering(self) -> Iterator[tuple[tuple[Tensor, ...], Tensor]]:
        for x, y in self.data.train.batches(self.state.epoch, self.state.batch):
            if any(self.progress.wishes()):
                return
            with self.env.autocast():
                h = self.rule.enter(x, y)
            yield h, y

    def arriving(self, left: int) -> Iterator[tuple[tuple[Tensor, ...], Tensor]]:
        """What the stage below hands up of at most `left` batches, and their labels, which every rank has."""
        split, asked = self.data.train, 0
        order = split.order(self.state.epoch).to(split.y.device).split(split.batch_size)[self.state.batch:]
        for number in range(left):
            while asked < min(number + AHEAD, left):
                self.below.ask()
                asked += 1
            h = self.below.take()
            if h is None:
                for _ in range(asked - number - 1):     # a halt comes for each that was asked for
                    self.below.take()
                return
            yield h, split.y.index_select(0, order[number])

    def learn_stage(self, h: tuple[Tensor, ...], y: Tensor, apply) -> Learned:
        self.up, learned = learn_by_blocks(self.rule, self.experiment.stages.turns[self.stage], h, y, apply)
        return learned

    def waited(self) -> float:
        return sum(channel.waited for channel in (self.below, self.above) if channel)

    def before(self, x: Any, y: Tensor) -> Deltas:
        return self.measure.before_some(list(self.experiment.stages.turns[self.stage]), y, self.apply.count)

    def measured(self, phase: Phase, learned: Learned, y: Tensor) -> dict[str, Any]:
        return {"step": self.state.step, "epoch": self.state.epoch + 1, "split": "train", "phase": phase.name,
                "loss": float(learned.loss) / self.apply.count, "score": None if learned.out is None else self.task.score(learned.out, y),
                "layers": self.measure.record(learned.blocks)["layers"]}

    def note(self, record: dict[str, Any], told: bool, averaged: bool) -> None:
        """Kept until the other stages' parts are at hand."""
        self.noted.append((record, told, averaged))

    def share(self) -> None:
        """Each rank gets what the others' blocks have learned and measured since; the first, which writes checkpoints, also what
        their optimizers keep."""
        state, optimizers = self.rule.state_dict(), list(self.apply.optimizers.values())
        moves = set().union(*(turn.moves for turn in self.experiment.stages.turns[self.stage].values()))
        parameters = dict(self.rule.named_parameters())
        mine = {"rule": {key: state[key] for key in moves}, "noted": self.noted, "still": self.apply.still,
                "optimizers": [{key: optimizer.state[p] for key, p in parameters.items() if key in moves and p in optimizer.state}
                               for optimizer in optimizers]}
        every = [ranks.from_rank(stage, mine) for stage in range(ranks.world())]
        for theirs in every[:self.stage] + every[self.stage + 1:]:
            self.rule.load_state_dict(theirs["rule"], strict=False)
            if self.stage == 0:
                for optimizer, kept in zip(optimizers, theirs["optimizers"]):
                    optimizer.state.update({parameters[key]: values for key, values in kept.items()})
        stills = {theirs["still"] for theirs in every} - {None}
        self.apply.still = all(stills) if stills else None
        for parts in zip(*(theirs["noted"] for theirs in every)):
            _, told, averaged = parts[0]
            super().note(self.together([record for record, *_ in parts]), told, averaged)
        self.noted = []

    def together(self, records: list[dict[str, Any]]) -> dict[str, Any]:
        """One record of a batch from the stages' own."""
        loss, layers = sum(record["loss"] for record in records), {}
        for record in records:
            layers |= record["layers"]
        score = next((record["score"] for record in records if record["score"] is not None), None)
        total = {"grad_norm": math.hypot(*(values["grad_norm"] for values in layers.values() if "grad_norm" in values))}
        for layer, values in layers.items():
            self.state.layers.setdefault(layer, {}).update(values)
        self.state.total.update(total)
        return {**{key: records[0][key] for key in ("step", "epoch", "split", "phase")}, "loss": loss,
                **({} if score is None else self.task.values(loss, score)), "layers": layers, "total": total}


class Channel:
    """Messages between this rank and another, of tensors of such shapes and dtypes or a halt, each one flat buffer. AHEAD
    buffers take turns, which bounds what is on its way. `waited`: seconds."""

    def __init__(self, peer: int, hands: list[tuple[tuple[int, ...], torch.dtype]]):
        self.peer, self.hands, self.waited = peer, hands, 0.0
        size = 64 + sum(padded(shape, dtype) for shape, dtype in hands)
        self.buffers = [torch.zeros(size, dtype=torch.uint8) for _ in range(AHEAD)]
        self.works: list[dist.Work | None] = [None] * AHEAD
        self.asked = self.done = 0

    def put(self, tensors: tuple[Tensor, ...] | None) -> None:
        """Begins to send these, or a halt."""
        turn = self.asked % AHEAD
        self.wait(turn)
        self.buffers[turn][0] = tensors is not None
        for place, tensor in zip(self.views(turn), tensors or ()):
            place.copy_(tensor)
        self.works[turn] = ranks.send(self.buffers[turn], self.peer)
        self.asked += 1

    def settle(self) -> None:
        for turn in range(AHEAD):
            self.wait(turn)

    def ask(self) -> None:
        """Begins to receive, in place of what was taken AHEAD messages ago."""
        self.works[self.asked % AHEAD] = ranks.receive(self.buffers[self.asked % AHEAD], self.peer)
        self.asked += 1

    def take(self) -> tuple[Tensor, ...] | None:
        """The next message, None for a halt; to be used before the next but AHEAD - 1 is asked for."""
        turn = self.done % AHEAD
        self.wait(turn)
        self.done += 1
        return tuple(self.views(turn)) if self.buffers[turn][0] else None

    def wait(self, turn: int) -> None:
        if self.works[turn]:
            self.waited -= time.perf_counter()
            ranks.wait(self.works[turn])
            self.waited += time.perf_counter()
            self.works[turn] = None

    def views(self, turn: int) -> Iterator[Tensor]:
        start = 64
        for shape, dtype in self.hands:
            yield self.buffers[turn][start:][:math.prod(shape) * dtype.itemsize].view(dtype).view(shape)
            start += padded(shape, dtype)


def padded(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Bytes in a message: the next tensor begins where a cache line does."""
    return -(-math.prod(shape) * dtype.itemsize // 64) * 64
