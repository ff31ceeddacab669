from __future__ import annotations

import itertools
import json
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import torch
from torch.nn import Parameter

from lbp import knobs, ranks, registry
from lbp.algos.rule import Facts, Learned, LearningRule, Phase, Rng
from lbp.archs.network import block_of
from lbp.errors import ConfigError, Diverged, Refused


@dataclass
class Part:
    """A rule, as its option is called, and the blocks that it owns."""

    name: str
    rule: LearningRule
    blocks: set[str]


class Mixed(LearningRule):
    """Blocks with learning rules of their own: each rule sees the whole network and batch, and only its own blocks are moved by it.

    Whatever a rule does to blocks of others is undone: their `.grad`, their norms' statistics, what it writes in place. What
    belongs to a rule alone (feedback, local classifiers) learns as it does there. The head's rule gives the output and the loss.
    A closed-form rule solves its block in a last phase, by a squared loss whatever the task's; until then `rest` trains it.
    Refused are rules that step the network in the middle of a batch, that go through it in stages, or that answer in a way
    of their own: the blocks above would not see in training what they see at test time.
    """

    facts = Facts(family="mixed", paper="none: a composition", weight_transport=False, backward_locked=False, update_locked=True)

    def __init__(self, network, task, *, blocks: dict[str, Any], rest: str):
        super().__init__(network, task)
        unknown = [name for name in blocks if name not in network.blocks]
        if unknown:
            raise Refused(f"algo.blocks.{unknown[0]}: the network has no such block; it has: {', '.join(network.blocks)}"
                          + knobs.did_you_mean(knobs.nearest(unknown[0], network.blocks)))
        self.parts, self.solvers = [], []
        shares: dict[str, set[str]] = {json.dumps({"name": rest}): set()}
        for block in network.blocks:
            said = blocks.get(block, rest)
            spec = {"name": said} if isinstance(said, str) else said
            if not isinstance(spec, dict) or not isinstance(spec.get("name"), str):
                raise Refused(f"algo.blocks.{block}={knobs.show(said)}: must be a rule, or a map of its name and its knobs, as "
                              "{name: dfa, scale: 2}")
            shares.setdefault(json.dumps(spec, sort_keys=True), set()).add(block)
        for text, own in shares.items():
            part = Part(json.loads(text)["name"], member("mixed", **json.loads(text), network=network, task=task), own)
            (self.solvers if part.rule.facts.closed_form else self.parts).append(part)
        if not self.parts or self.parts[0].name != rest:
            raise Refused(f"algo.rest={rest} is closed-form and would leave blocks untrained until the end; use a rule that learns "
                          "batch by batch, as bp or dfa")
        self.parts[0].blocks |= {block for solver in self.solvers for block in solver.blocks}
        self.parts = [part for part in self.parts if part.blocks]
        self.rules = torch.nn.ModuleList(part.rule for part in (*self.parts, *self.solvers))
        self.owner = {id(p): block_of(name) for name, p in network.named_parameters()}
        for part in (*self.parts, *self.solvers):
            self.try_out(part)
        hidden = [part.rule.facts for part in self.parts if part.blocks & set(network.hidden)]
        said = {f.name: any(getattr(facts, f.name) for facts in hidden) for f in fields(Facts) if f.type == "bool"}
        self.facts = replace(self.facts, **said | {key: any(getattr(rule.facts, key) for rule in self.rules) for key in ("in_place", "batch_coupled")})

    def groups(self):
        """Of the network what a block's owner moves, and all that belongs to the rules alone."""
        groups: dict[str, list[Parameter]] = {}
        for part in self.parts:
            for group, parameters in part.rule.groups().items():
                groups.setdefault(group, []).extend(p for p in parameters if self.owner.get(id(p)) in (None, *part.blocks))
        return groups

    def phases(self):
        before = [replace(phase, name=f"{part.name}: {phase.name}", learn=partial(self.together, [(part, phase.learn)]))
                  for part in self.parts for phase in part.rule.phases()[:-1]]
        after = [replace(phase, name=f"{part.name}: {phase.name}", fit=phase.fit) for part in self.solvers for phase in part.rule.phases()]
        return [*before, Phase("train", learn=self.learn), *after]

    def learn(self, x, y, apply):
        return self.together([(part, part.rule.learn) for part in self.parts], x, y, apply)

    def together(self, members, x, y, apply) -> Learned:
        """A batch under one rule after the other, each beginning where the first began; what they did to their own blocks comes last."""
        head, blocks, gradients, written = list(self.network.blocks)[-1], {}, [], []
        for part, learn in members:
            state = {n: t for n, t in self.network.state_dict(keep_vars=True).items()
                     if part.rule.facts.in_place or not isinstance(t, Parameter)}
            begun = {n: t.detach().clone() for n, t in state.items()}
            found = learn(x, y, apply)
            if head in part.blocks or len(members) == 1:
                learned = found
            blocks |= {name: values for name, values in found.blocks.items() if name in part.blocks}
            with torch.no_grad():
                written += [(t, t.detach().clone()) for n, t in state.items() if block_of(n) in part.blocks]
                for n, t in state.items():
                    t.copy_(begun[n])
            for p in itertools.chain(self.network.parameters(), part.rule.parameters()):
                if p.grad is not None and self.owner.get(id(p)) in (None, *part.blocks):
                    gradients.append((p, p.grad))
                p.grad = None
        with torch.no_grad():
            for tensor, value in written:
                tensor.copy_(value)
        for p, gradient in gradients:
            p.grad = gradient
        return Learned(learned.out, learned.loss, blocks)

    def feedback(self):
        return {name: pair for part in self.parts for name, pair in part.rule.feedback().items() if name in part.blocks}

    def try_out(self, part: Part) -> None:
        """Raises Refused for a rule that does not bear being one among others. Runs it on one sample, and leaves no trace."""
        where, rule = f"algo=mixed: {part.name} for block {', '.join(sorted(part.blocks))}", part.rule
        if type(rule).predict is not LearningRule.predict:
            raise Refused(f"{where} answers in a way of its own, not by the network's forward pass; use another rule there")
        if part not in self.solvers and not rule.groups():
            raise Refused(f"{where} searches over whole networks, not blocks; use another rule there")
        *before, last = rule.phases()
        if part in self.solvers and before:
            raise Refused(f"{where} solves every layer in turn; use another rule there, or algo={part.name}")
        if part not in self.solvers and (last.learn != rule.learn or last.epochs is not None):
            raise Refused(f"{where} goes through the network in stages; use another rule there")

        def apply(group, loss=None):
            if any(p.grad is not None for p in self.network.parameters()):
                raise Refused(f"{where} steps blocks in the middle of a batch, when other rules need them as they were; use "
                              + ("{name: " + part.name + ", schedule: joint}" if hasattr(rule, "schedule") else "another rule there"))

        tensors = [*self.network.state_dict(keep_vars=True).values(), *rule.buffers(), *rule.parameters()]
        kept, noise = [t.detach().clone() for t in tensors], [(m, m.get_extra_state()) for m in rule.modules() if isinstance(m, Rng)]
        ranks.share(ranks.world())
        with torch.random.fork_rng(), self.network.probe() as x:
            tokens = list(self.network.shapes.values())[-1][:-1]
            y = x.new_zeros(1, self.task.outputs) if self.task.classes is None else x.new_zeros(1, *tokens, dtype=torch.long)
            try:
                for phase in rule.phases():
                    phase.fit(lambda rows: iter([(x, y)])) if phase.fit else phase.learn(x, y, apply)
            except Diverged:
                pass    # one sample may be too few to solve for
        with torch.no_grad():
            moved = {self.owner[id(t)] for t, value in zip(tensors, kept) if id(t) in self.owner and not torch.equal(t, value)}
            for tensor, value in zip(tensors, kept):
                tensor.copy_(value)
        for module, value in noise:
            module.set_extra_state(value)
        for p in itertools.chain(self.network.parameters(), rule.parameters()):
            p.grad = None
        if part in self.solvers and moved - part.blocks:
            raise Refused(f"{where} solves block {', '.join(sorted(moved - part.blocks))} too; name that one as well, or use "
                          f"algo={part.name}")


def member(of: str, /, name: str, network, task, **given) -> LearningRule:
    """A rule that is part of the rule `of`, by its option's name and knobs, with the option's defaults for the rest. The network is no part
    of its state."""
    option = registry.option("algo", name)
    values = registry.defaults("algo", name)
    if registry.load("algo", values["name"]) is Mixed:
        raise Refused(f"algo={of}: algo=mixed cannot be a part of it; algo=mixed takes a rule for each block in algo.blocks, of the head elm too")
    problems = [f"algo={name} has no knob {knob}; it has: {', '.join(option.knobs) or 'none'}"
                + knobs.did_you_mean(knobs.nearest(knob, option.knobs)) for knob in given if knob not in option.knobs]
    problems += [problem for knob, value in given.items() if knob in option.knobs
                 and (problem := knobs.check(f"{name}.{knob}", value, option.knobs[knob].spec))]
    if not problems:
        standing = dict(values)
        values |= {knob: knobs.coerce(value, option.knobs[knob].spec) for knob, value in given.items()}
        problems = knobs.useless(name, option, values, standing)
    if problems:
        raise ConfigError(*(f"algo={of}: {problem}" for problem in problems))
    kind = registry.load("algo", values.pop("name"))
    rule = kind(network, replace(task, loss_name="mse", label_smoothing=0.0) if kind.facts.closed_form else task, **values)
    del rule.network
    rule.__dict__["network"] = network    # a plain attribute: its weights are saved once, under their usual keys
    return rule
