from __future__ import annotations

from lbp.algos import ops
from lbp.algos.rule import Facts, Learned, LearningRule
from lbp.errors import Refused


class RandomReadout(LearningRule):
    """A rule from another package: each block is trained through a fixed random read-out of its output."""

    facts = Facts(
        family="local", paper="example",
        weight_transport=False, backward_locked=False, update_locked=False)

    def __init__(self, network, task, *, scale: float):
        super().__init__(network, task)
        ops.classification(task, "random_readout")
        if len(list(network.shapes.values())[-1]) > 1:
            raise Refused("algo=random_readout reads whole samples, and block head answers each token; use algo=local")
        for name, projection in ops.matrices(network, ops.projections(network), "xavier", scale).items():
            self.register_buffer(f"readout_{name}", projection)

    def learn(self, x, y, apply):
        for name, block in self.network.hidden.items():
            h = block(x)
            self.task.loss(h.flatten(1) @ getattr(self, f"readout_{name}").T.to(h.dtype), y).sum().backward()
            x = h.detach()
        out = self.network.head(x)
        loss = self.task.loss(out, y)
        loss.sum().backward()
        return Learned(out.detach(), loss.detach())
