from __future__ import annotations

import torch

from lbp.algos import ops
from lbp.algos.rule import Facts, LearningRule


class DFA(LearningRule):
    """Direct feedback alignment: the output's error reaches every block through its own fixed random matrix.

    dL/dh_l is taken to be e B_l, with e the error at the output and B_l (outputs, units of block l) (Nokland 2016).
    Within a block ordinary autograd goes on from there; between blocks nothing flows, also not through a skip. The
    head receives its exact gradient. `error=sign` sends the error's signs alone (sDFA: Frenkel et al. 2021). `shared`
    takes for every B_l the first columns of one matrix, made for the widest block (Launay et al. 2020, where `init=default`).
    """

    facts = Facts(
        family="feedback", paper="Nokland, NeurIPS 2016, arXiv 1609.01596",
        weight_transport=False, backward_locked=False, update_locked=True)

    def __init__(self, network, task, *, init: str, scale: float, error: str, shared: bool, maps: str):
        super().__init__(network, task)
        self.error, self.shared = error, shared
        if error == "sign":
            ops.bounded(network, "algo=sdfa (algo.error=sign)", "a signal of signs, which never vanishes,")
        self.projections = ops.projections(network, maps)
        widest = {"shared": max(self.projections.values(), key=lambda projection: projection.columns)}
        for name, matrix in ops.matrices(network, widest if shared else self.projections, init, scale).items():
            self.register_buffer(f"projection_{name}", matrix)

    def matrix(self, name: str) -> torch.Tensor:
        """B of a block."""
        return self.projection_shared[:, : self.projections[name].columns] if self.shared else getattr(self, f"projection_{name}")

    def learn(self, x, y, apply):
        outputs, out = ops.block_by_block(self.network, x)
        error, learned = ops.teach_head(self.task, out, y)
        signal = error.sign() if self.error == "sign" else error
        for name in reversed(self.network.hidden):
            ops.teach(outputs.pop(), self.projections[name](signal, self.matrix(name)))
        return learned

    def feedback(self):
        return ops.beside_the_head(self.network, self.matrix(list(self.network.hidden)[-1]))
