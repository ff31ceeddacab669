from __future__ import annotations

import torch

from lbp.algos import ops
from lbp.algos.rule import Facts, Learned, LearningRule


class DFA(LearningRule):
    """Direct feedback alignment: the output's error reaches every block through its own fixed random matrix.

    dL/dh_l is taken to be e B_l, with e the error at the output and B_l (outputs, units of block l) (Nokland 2016).
    Within a block ordinary autograd goes on from there; between blocks nothing flows, also not through a skip. The
    head receives its exact gradient.
    """

    facts = Facts(
        family="feedback", paper="Nokland, NeurIPS 2016, arXiv 1609.01596",
        weight_transport=False, backward_locked=False, update_locked=True)

    def __init__(self, network, task, *, init: str, scale: float):
        super().__init__(network, task)
        for name, projection in ops.projections(network, init, scale).items():
            self.register_buffer(f"projection_{name}", projection)

    def learn(self, x, y, apply):
        outputs = []
        for block in self.network.hidden.values():
            outputs.append(block(x))
            x = outputs[-1].detach()
        out = self.network.head(x)
        error = self.task.error(out.detach(), y)
        with torch.no_grad():
            loss = self.task.loss(out, y)
        out.backward(error.to(out.dtype))
        for name in reversed(self.network.hidden):
            ops.teach(outputs.pop(), error, getattr(self, f"projection_{name}"))
        return Learned(out.detach(), loss)

    def feedback(self):
        # The weights that stand where a projection stands are known for the last hidden block only: the head's.
        last = list(self.network.hidden)[-1]
        projection, weight = getattr(self, f"projection_{last}"), self.network.head.weight
        return {last: (weight, projection)} if projection.shape == weight.shape else {}
