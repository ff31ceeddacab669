from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lbp.algos import ops
from lbp.algos.forward.sigprop_parts import statistics_kept
from lbp.algos.rule import Facts, Learned, LearningRule, Rng
from lbp.algos.targets.halves import Local, Place, choose
from lbp.algos.targets.inputs import INPUTS, Feedback
from lbp.algos.targets.inverses import inverses
from lbp.algos.targets.theta import THETA
from lbp.archs.network import Layer, hard_between, hard_inside
from lbp.errors import Diverged, Refused
from lbp.knobs import did_you_mean, nearest


class Machines(LearningRule):
    """Every block is a learning machine: one half of it moves its parameters to a target, the other makes a target for its input.

    The head's local loss is the task's, with t = h - dL/dh for halves that need a target; a hidden block's is |h - t|^2 / 2. Targets come
    down block by block. With both halves `gradient`, targets first, x' = x - dL/dx makes it backprop (Short 2023; with a
    learned inverse, Lee et al. 2015). `parameters_first` moves a block's parameters before they make the target. `iterations`:
    rounds on the same batch. `features`: the share of a block's units that a step moves, drawn anew each time; the others
    stay to the bit. The halves and their knobs: docs/machines.md. The facts are of the default, a rule's own of its halves.
    """

    facts = Facts(
        family="targets", paper="Short, arXiv 2311.09663 (2023)",
        weight_transport=True, backward_locked=True, update_locked=True)

    def __init__(self, network, task, *, theta: str | dict, x: str | dict, blocks: dict[str, Any], order: str, iterations: int, features: float):
        super().__init__(network, task)
        refuse_unknown(network, blocks)
        self.first, self.iterations, self.features = order == "parameters_first", iterations, features
        names, shapes = list(network.blocks), {"": network.in_shape, **network.shapes}
        halves = {"theta": {}, "x": {}}
        for below, name in zip(["", *names], names):
            def inverse(bias: bool, chain=(below, name)) -> nn.Module:
                return inverses(network, "machines", list(chain), bias=bias)[chain[1]]

            place = Place(network.blocks[name], shapes[below], shapes[name], f"algo=machines: block {name}", inverse=inverse)
            for half, kinds, default in (("theta", THETA, theta), ("x", INPUTS, x)):
                if half == "theta" or below:
                    own = half in blocks.get(name, {})
                    key = f"algo.blocks.{name}.{half}" if own else f"algo.{half}"
                    halves[half][name] = choose(kinds, blocks[name][half] if own else default, place, key)
        self.theta, self.x = nn.ModuleDict(halves["theta"]), nn.ModuleDict(halves["x"])
        if any(isinstance(half, Feedback) for half in self.x.values()):
            ops.feedback_sites(network)     # refuses what no matrix can stand in for
        if not any(half.leaves or half.writes for half in self.theta.values()):
            raise Refused("algo=machines: theta=none moves no block at all; choose another half for some of them")
        refuse_without_derivative(network, self.theta, self.x)
        if features < 1:
            self.units, self.rng = {name: units(name, block) for name, block in network.blocks.items()}, Rng()
        every = [*self.theta.values(), *self.x.values()]
        self.writes = any(half.writes for half in self.theta.values())
        self.facts = replace(
            self.facts, weight_transport=any(half.transports for half in list(self.x.values())),
            # Of blocks that have none, no half wants it: that was just seen to.
            needs_derivative=any(half.needs_derivative for half in every) and not any(map(hard_inside, network.blocks.values())),
            in_place=self.writes,
            batch_coupled=any(half.batch_coupled for half in every))

    def groups(self):
        moving = [p for name, half in self.theta.items() if half.leaves for p in self.network.blocks[name].parameters()]
        learned = [*self.x.parameters(), *self.theta.parameters()]
        return {"forward": moving} | ({"feedback": learned} if learned else {})

    def learn(self, x, y, apply):
        learned = self.round(x, y, apply)
        for _ in range(1, self.iterations):
            apply("forward", learned.loss)
            torch.clear_autocast_cache()
            with statistics_kept(self.network):
                self.round(x, y, apply)
        return learned

    def round(self, x: Tensor, y: Tensor, apply) -> Learned:
        """Forwards, then targets and steps from the head down."""
        work, names = {}, list(self.network.blocks)
        for name, block in self.network.blocks.items():
            half = self.x[name] if name in self.x else None
            work[name] = Local(block, x, half and half.run(block), bool(half and half.needs_derivative), self.theta[name].needs_derivative)
            x = work[name].h
        loss = self.task.loss(x, y)
        if self.writes and not ops.all_finite(loss + sum(ops.at_least_fp32(local.x.detach()).sum() for local in work.values())):
            raise Diverged("the loss or an activation is not finite, and nothing has moved; look at the data, or lower optimizer.lr")
        learned = Learned(x, loss)
        self.aim_at_labels(work[names[-1]], x, y)
        for below, name in reversed(list(zip([None, *names], names))):
            local, values = work.pop(name), {}
            if name != names[-1]:
                values["target_distance"] = (local.t - local.h).flatten(1).norm(dim=1).mean()
            if self.first:
                values |= self.move(name, local, apply, loss)
            teaches = below is not None and self.x[name].passes
            if teaches:
                values |= self.x[name].learn(local, lambda own: apply("feedback", own))
                work[below].aim(self.x[name].target(local))
            if not self.first:
                values |= self.move(name, local, apply, loss)
            if values:
                learned.blocks[name] = values
            if not teaches:
                break
        return learned

    def aim_at_labels(self, local: Local, out: Tensor, y: Tensor) -> None:
        def loss(h: Tensor, rows: Tensor | None) -> Tensor:
            return self.task.loss(h, y if rows is None else y[rows]).view(len(h), -1).sum(1)

        local.aim(ops.at_least_fp32(out) - self.task.error(out, y), loss)

    def move(self, name: str, local: Local, apply, loss: Tensor) -> dict[str, Tensor]:
        """The block's parameters, or its drawn units alone; its gradients wait for the end of the batch where they can. Returns what is
        worth logging."""
        half = self.theta[name]
        early = half.leaves and (half.settles or self.first or self.features < 1)

        def settle() -> None:
            apply("forward", loss)

        with self.some_units(name) if self.features < 1 else nullcontext():
            values = half.step(local, settle if early else None)
        if early or half.writes:
            local.renew()
        return values or {}

    @contextmanager
    def some_units(self, name: str) -> Iterator[None]:
        """What happens within it happens to a drawn share of the block's units alone: the others get back what they had."""
        parameters, count = list(self.network.blocks[name].parameters()), self.units[name]
        before = [p.detach().clone() for p in parameters]
        yield
        drawn = torch.randperm(count, generator=self.rng.generator)[: max(1, round(self.features * count))]
        rest = torch.ones(count, dtype=torch.bool).index_fill(0, drawn, False)
        with torch.no_grad():
            for p, old in zip(parameters, before):
                p[rest.to(p.device)] = old[rest.to(p.device)]

    def feedback(self):
        pairs = {name: half.pairs() for name, half in self.x.items() if isinstance(half, Feedback)}
        return {name: tuple(torch.cat([t.detach().flatten() for t in side]) for side in zip(*found)) for name, found in pairs.items()}


def units(name: str, block: nn.Module) -> int:
    """How many units a block has, one a row of each of its parameters; raises Refused where that cannot be said."""
    linear = block.linear if isinstance(block, Layer) else block
    found = {len(p) for p in block.parameters()}
    if not hasattr(linear, "weight") or len(found) != 1:
        raise Refused(f"algo=machines with algo.features below 1 moves some units of a block, and block {name} is no plain layer whose "
                      "parameters have a row for each; set algo.features=1, or use arch=mlp")
    return found.pop()


def refuse_unknown(network, blocks: dict[str, Any]) -> None:
    names = list(network.blocks)
    for name, halves in blocks.items():
        if name not in network.blocks:
            raise Refused(f"algo=machines: algo.blocks.{name}: there is no such block; there are: {', '.join(names)}"
                          + did_you_mean(nearest(name, names)))
        if not isinstance(halves, dict) or not set(halves) <= {"theta", "x"}:
            raise Refused(f"algo=machines: algo.blocks.{name}={halves}: must be a map of theta, x or both")
        if name == names[0] and "x" in halves:
            raise Refused(f"algo=machines: algo.blocks.{name}.x={halves['x']}: the first block's input needs no target; leave it out")


def refuse_without_derivative(network, theta: nn.ModuleDict, x: nn.ModuleDict) -> None:
    """Raises Refused where a half needs the derivative of a block whose output has none."""
    with network.probe() as h, torch.enable_grad():
        for name, block in network.blocks.items():
            h = block(h.detach().requires_grad_())
            hard = bool(hard_inside(block)) or not h.requires_grad
            needing = [half for half, found, stopped in (("theta", theta, hard), ("x", x, hard or bool(hard_between(block))))
                       if stopped and name in found and found[name].needs_derivative]
            if needing:
                raise Refused(f"algo=machines: block {name} has no derivative, which its halves {', '.join(needing)} need; choose others, such as "
                              f"algo.blocks.{name}={{theta: genetic{', x: hill_climb' * (name in x)}}}, or another arch=")
