from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import torch

from lbp.algos.closed_form.elm import solve_head
from lbp.algos.mixed.mixed import member
from lbp.algos.rule import Facts, LearningRule, Phase
from lbp.errors import Refused


class Readout(LearningRule):
    """Any other rule but mixed, and at its end the head solved by ridge regression on what the hidden blocks have become.

    head = argmin sum |phi(x) W^T + b - t|^2 / 2 + ridge/2 |W|^2, with one-hot targets for classes whatever the loss (Hoerl & Kennard
    1970). Until then the rule answers in its own way, afterwards the network. `algo=mixed` has it for a head beside rules of
    single blocks; this one also takes rules that step in the middle of a batch, go in stages, or answer in a way of their own.
    """

    facts = Facts(
        family="closed_form", paper="Hoerl & Kennard, Technometrics 12 (1970)",
        weight_transport=False, backward_locked=False, update_locked=True, in_place=True)

    def __init__(self, network, task, *, rule: str | dict[str, Any], ridge: float):
        super().__init__(network, task)
        spec = {"name": rule} if isinstance(rule, str) else rule
        if not isinstance(spec.get("name"), str):
            raise Refused(f"algo.rule={rule}: must be a rule, or a map of its name and its knobs, as {{name: dfa, scale: 2}}")
        self.rule, self.ridge = member("readout", **spec, network=network, task=task), ridge
        if self.rule.facts.closed_form or isinstance(self.rule, Readout):
            raise Refused(f"algo=readout: {spec['name']} solves the head itself; use algo={spec['name']}, or another algo.rule")
        self.register_buffer("solved", torch.tensor(False))
        own = {f.name: getattr(self.rule.facts, f.name) for f in fields(Facts) if f.type == "bool"}
        self.facts = replace(self.facts, **own | {"in_place": True})

    def groups(self):
        return self.rule.groups()

    def learn(self, x, y, apply):
        return self.rule.learn(x, y, apply)

    def phases(self):
        return [*self.rule.phases(), Phase("read-out", fit=self.fit)]

    def fit(self, batches) -> None:
        solve_head(self.network, self.task, self.ridge, batches)
        self.solved.fill_(True)

    def predict(self, x):
        return self.network(x) if self.solved else self.rule.predict(x)

    def feedback(self):
        return self.rule.feedback()
