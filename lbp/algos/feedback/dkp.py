from __future__ import annotations

from torch import nn

from lbp.algos import ops
from lbp.algos.rule import Facts, LearningRule


class DKP(LearningRule):
    """Direct Kolen-Pollack: direct feedback alignment whose matrices learn, each as a read-out of its block would.

    dL/dh_l is taken to be e B_l, and B_l (outputs, units of block l) receives the gradient e^T h_l, which for the last
    hidden block is the head's own (Webster, Choi & Ahn 2021): with sgd and a common weight decay, B and the head's weight
    then become the same, as in Kolen-Pollack. B are the group "feedback": `optimizer.feedback.lr` and `.weight_decay`.
    """

    facts = Facts(
        family="feedback", paper="Webster, Choi & Ahn, Learning the Connections in Direct Feedback Alignment (2021)",
        weight_transport=False, backward_locked=False, update_locked=True)

    def __init__(self, network, task, *, init: str, scale: float):
        super().__init__(network, task)
        self.projections = ops.projections(network)
        self.matrices = nn.ParameterDict(ops.matrices(network, self.projections, init, scale))

    def groups(self):
        return {"forward": list(self.network.parameters()), "feedback": list(self.matrices.values())}

    def learn(self, x, y, apply):
        outputs, out = ops.block_by_block(self.network, x)
        error, learned = ops.teach_head(self.task, out, y)
        rows = error.flatten(0, -2)
        for name in reversed(self.network.hidden):
            h, matrix = outputs.pop(), self.matrices[name]
            ops.teach(h, self.projections[name](error, matrix.detach()))
            matrix.grad = (rows.T @ h.detach().reshape(len(rows), -1).to(rows.dtype)).to(matrix.dtype)
        return learned

    def feedback(self):
        return ops.beside_the_head(self.network, self.matrices[list(self.network.hidden)[-1]])
