from __future__ import annotations

import torch

from lbp.algos.rule import Facts, Learned, LearningRule


class Shallow(LearningRule):
    """A control: the hidden blocks stay as drawn, only the head learns, by its exact gradient.

    A rule that does no better has taught its hidden layers nothing.
    """

    facts = Facts(
        family="baseline", paper="control",
        weight_transport=False, backward_locked=False, update_locked=True, needs_derivative=False)

    def groups(self):
        return {"forward": list(self.network.head.parameters())}

    def learn(self, x, y, apply):
        with torch.no_grad():
            for block in self.network.hidden.values():
                x = block(x)
        out = self.network.head(x)
        loss = self.task.loss(out, y)
        loss.sum().backward()
        return Learned(out.detach(), loss.detach())
