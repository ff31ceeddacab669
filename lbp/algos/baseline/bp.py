from __future__ import annotations

from lbp.algos import ops
from lbp.algos.rule import Facts, Learned, LearningRule


class BP(LearningRule):
    """Backpropagation: the exact gradient of the loss, the reference for every other rule."""

    facts = Facts(
        family="baseline", paper="Rumelhart, Hinton & Williams, Nature 323 (1986)",
        weight_transport=True, backward_locked=True, update_locked=True)

    def __init__(self, network, task):
        super().__init__(network, task)
        ops.let_errors_pass(network)

    def learn(self, x, y, apply):
        out = self.network(x)
        loss = self.task.loss(out, y)
        loss.sum().backward()
        return Learned(out.detach(), loss.detach())
