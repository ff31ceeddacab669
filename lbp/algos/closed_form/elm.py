from __future__ import annotations

import torch

from lbp.algos.closed_form.least_squares import Gram, ridge_solution
from lbp.algos.rule import Facts, LearningRule, Phase
from lbp.errors import Refused


class ELM(LearningRule):
    """Extreme learning machine: random hidden blocks, and a head solved by ridge regression on the targets.

    head = argmin sum |phi(x) W^T + b - t|^2 / 2 + ridge/2 |W|^2, with one-hot targets for classes; the bias is not
    penalised (Huang, Zhu & Siew 2006; Hoerl & Kennard 1970). A control: what random features alone reach.
    """

    facts = Facts(
        family="closed_form", paper="Huang, Zhu & Siew, Neurocomputing 70 (2006)",
        weight_transport=False, backward_locked=False, update_locked=True, needs_derivative=False,
        in_place=True, optimized=False, closed_form=True)

    def __init__(self, network, task, *, ridge: float):
        super().__init__(network, task)
        if task.loss_name != "mse":
            raise Refused(f"algo=elm solves a squared loss, not dataset.loss={task.loss_name}; leave it out or set "
                          "dataset.loss=mse")
        self.ridge = ridge

    def groups(self):
        return {}

    def phases(self):
        return [Phase("fit", fit=self.fit)]

    def fit(self, batches):
        solve_head(self.network, self.task, self.ridge, batches)


@torch.no_grad()
def solve_head(network, task, ridge: float, batches) -> None:
    """Writes the ridge regression of one-hot labels, or real targets, on the hidden blocks' output into the head. Raises Diverged,
    and writes nothing, where it has no finite solution."""
    network.eval()
    head = network.head
    found = Gram(head.in_features, len(head.weight), head.weight, head.weight.dtype)
    for x, y in batches(4096):
        for block in network.hidden.values():
            x = block(x)
        target = task.onehot(y).to(x.dtype)
        if x.dim() > 2:     # an answer at each token: they are the samples, those that count
            x, target = x[target.any(-1)], target[target.any(-1)]
        found.add(x, target)
    found.gather()
    solution = ridge_solution(found.gram, found.cross, ridge)
    head.weight.copy_(solution[:-1].T)
    head.bias.copy_(solution[-1])
