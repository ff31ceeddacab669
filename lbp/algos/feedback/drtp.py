from __future__ import annotations

from lbp.algos import ops
from lbp.algos.rule import Facts, LearningRule


class DRTP(LearningRule):
    """Direct random target projection: every block is taught by the label, through its own fixed random matrix.

    dL/dh_l is taken to be y B_l, with y the one-hot label and B_l (classes, units of block l), whose sign is immaterial as
    it is drawn symmetrically (Frenkel, Lefebvre & Bol 2021). Nothing of it waits for the output, so that a block learns
    in the forward pass; the head receives its exact gradient. A label, unlike an error, never vanishes: units are driven
    until they saturate. Where the activation does not saturate they grow without end, and the updates are no descent.
    """

    facts = Facts(
        family="feedback", paper="Frenkel, Lefebvre & Bol, Front. Neurosci. 15:629892 (2021), arXiv 1909.01311",
        weight_transport=False, backward_locked=False, update_locked=False)

    def __init__(self, network, task, *, init: str, scale: float, maps: str):
        super().__init__(network, task)
        ops.classification(task, "drtp")
        ops.bounded(network, "algo=drtp", "a label, which never vanishes,")
        self.projections = ops.projections(network, maps)
        for name, matrix in ops.matrices(network, self.projections, init, scale).items():
            self.register_buffer(f"projection_{name}", matrix)

    def learn(self, x, y, apply):
        label = self.task.onehot(y)
        for name, block in self.network.hidden.items():
            h = block(x)
            x = h.detach()
            ops.teach(h, self.projections[name](label, getattr(self, f"projection_{name}")))
        return ops.teach_head(self.task, self.network.head(x), y)[1]
