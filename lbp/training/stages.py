"""A network cut into stages, one a rank: which rules bear it, and where it is cut."""

from __future__ import annotations

import time
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cache
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from lbp import ranks
from lbp.algos.rule import LearningRule, learn_by_blocks
from lbp.errors import ConfigError, Refused

TRIES = 4       # batches that each block is timed on; the fastest counts


@dataclass
class Turn:
    """One block's turn at a batch: what of the rule's state it moves, the shapes and dtypes of what it hands up, seconds."""

    moves: set[str] = field(default_factory=set)
    hands: list[tuple[tuple[int, ...], torch.dtype]] = field(default_factory=list)
    seconds: float = float("inf")


@dataclass
class Stages:
    """The blocks of each stage with their turns, from the input up; `flops` of a sample, None where they cannot be counted."""

    turns: list[dict[str, Turn]]
    flops: float | None
    measured: bool

    @property
    def counts(self) -> list[int]:
        return [len(stage) for stage in self.turns]

    def lines(self) -> list[str]:
        """What a run's header says of them."""
        names = " | ".join(" ".join(stage) for stage in self.turns)
        times = " | ".join(f"{1e3 * sum(turn.seconds for turn in stage.values()):.1f}" for stage in self.turns)
        return [f"pipeline: {names}; {times} ms a batch, {'balanced by these times' if self.measured else 'cut as asked'}",
                "a block hands a batch up as it was before its own step on it; what takes the whole network at once (angles to backprop, "
                "activations) is not measured"]


def asked(values: dict[str, Any]) -> bool:
    """Whether the ranks are to be stages."""
    return "stages" in values.get("launch", {})


def refuse(values: dict[str, Any], rule: LearningRule, device: torch.device) -> None:
    """Raises Refused for a rule whose blocks do not learn by themselves, and for what stages cannot do."""
    facts, trainer, algo = rule.facts, values["trainer"], values["algo"]["name"]
    reasons = {
        "it solves its blocks one after another, over all the data": facts.closed_form,
        "its blocks wait for an error that comes down through those above": facts.backward_locked,
        "its blocks wait for a whole forward pass": facts.update_locked,
        "it does not say what a block learns from what comes up alone (learn_block)": type(rule).learn_block is LearningRule.learn_block,
        "it trains in phases of its own": [phase.learn for phase in rule.phases()] != [rule.learn],
    }
    if why := next((why for why, true in reasons.items() if true), None):
        raise Refused(f"launch=pipeline algo={algo}: {why}, as it is set; use algo=local or another whose blocks learn at once (docs/pipeline.md), "
                      "or launch.ranks=N without a pipeline")
    if trainer["clip"] and getattr(rule, "schedule", "streaming") != "streaming":
        raise Refused(f"launch=pipeline trainer.clip={trainer['clip']}: algo.schedule={rule.schedule} bounds the gradient of all blocks "
                      "together, which no stage has; set algo.schedule=streaming, which bounds each block's, or leave trainer.clip out")
    if trainer["on_nonfinite"] != "stop":
        raise Refused(f"launch=pipeline trainer.on_nonfinite={trainer['on_nonfinite']}: when a stage finds that a batch is not finite, those "
                      "below have learned it; use trainer.on_nonfinite=stop")
    if device.type != "cpu":
        raise Refused(f"launch=pipeline trainer.device={trainer['device']}: stages hand their batches over on CPUs alone so far; "
                      "use trainer.device=cpu")


def plan(experiment, begun: list[int] | None = None) -> Stages:
    """Where to cut, alike on every rank. `begun`: as a run that goes on was cut. Raises ConfigError, and Refused where two
    blocks move the same."""
    names, wish, world = list(experiment.network.blocks), experiment.values["launch"]["stages"], ranks.world()
    if len(names) < world:
        raise ConfigError(f"launch.ranks={world}: the network has {len(names)} blocks ({', '.join(names)}), and a stage takes one at least; "
                          "use fewer ranks, or a deeper network")
    if wish != "auto" and (len(wish) != world or sum(wish) != len(names)):
        raise ConfigError(f"launch.stages={wish}: must be {world} numbers, one a rank, that add up to the network's {len(names)} blocks "
                          f"({', '.join(names)}); or auto")
    turns, flops = ranks.from_first(tried(experiment) if ranks.rank() == 0 else None)
    counts = begun or (balanced([turn.seconds for turn in turns.values()], world) if wish == "auto" else wish)
    cuts = [0, *accumulate(counts)]
    return Stages([{name: turns[name] for name in names[a:b]} for a, b in pairwise(cuts)], flops, wish == "auto")


def tried(experiment) -> tuple[dict[str, Turn], float | None]:
    """The turn of each block, and the flops of a sample. A few batches are learned, and all is put back but for torch's generator."""
    from torch.utils.flop_counter import FlopCounterMode

    rule, apply, trainer = experiment.rule, experiment.apply, experiment.values["trainer"]
    turns, names = {name: Turn() for name in experiment.network.blocks}, {id(p): name for name, p in rule.named_parameters()}
    kept, moving = deepcopy((rule.state_dict(), apply.state_dict())), []
    apply.observe = moving.extend
    apply.learning_rates(0.0)       # no step to diverge by
    rule.train()
    with ranks.alone(), experiment.environment.autocast():
        x, y = next(experiment.data.train.batches(0))
        apply.count = experiment.data.task.count(y)
        with FlopCounterMode(display=False) as counter:
            learn_by_blocks(rule, turns, rule.enter(x, y), y, apply)
        apply.clear()
        for _ in range(TRIES):
            moving.clear()
            h = None
            for name, turn in turns.items():
                before, began = noted(rule), time.perf_counter()
                h, learned = learn_by_blocks(rule, [name], rule.enter(x, y) if h is None else h, y, apply)
                apply.finish(learned.loss.sum())
                turn.seconds = min(turn.seconds, time.perf_counter() - began)
                turn.hands = [(tuple(part.shape), part.dtype) for part in h]
                turn.moves |= {names[id(p)] for p in moving} | {key for key, value in noted(rule).items() if not torch.equal(value, before[key])}
                moving.clear()
    rule.load_state_dict(kept[0])
    apply.load_state_dict(kept[1])
    apply.observe = apply.still = None
    owners: dict[str, str] = {}
    for name, turn in turns.items():
        for key in turn.moves:
            if (other := owners.setdefault(key, name)) != name:
                raise Refused(f"launch=pipeline: blocks {other} and {name} both move {key}, so that they cannot be on two ranks; "
                              "use launch=default")
    return turns, None if trainer["compile"] else counter.get_total_flops() / len(y)


def noted(rule: LearningRule) -> dict[str, Tensor]:
    """What of the rule's state is no parameter."""
    return {key: value.clone() for key, value in rule.state_dict(keep_vars=True).items() if not isinstance(value, Parameter)}


def balanced(seconds: list[float], stages: int) -> list[int]:
    """How many blocks, in their order, each stage takes, so that the slowest stage is as fast as can be."""
    @cache
    def best(start: int, left: int) -> tuple[float, tuple[int, ...]]:
        if left == 1:
            return sum(seconds[start:]), (len(seconds) - start,)
        ends = range(start + 1, len(seconds) - left + 2)
        return min((max(sum(seconds[start:end]), best(end, left - 1)[0]), (end - start, *best(end, left - 1)[1])) for end in ends)

    return list(best(0, stages)[1])
