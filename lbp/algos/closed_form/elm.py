from __future__ import annotations

import torch
from torch import Tensor

from lbp.algos import ops
from lbp.algos.rule import Facts, LearningRule, Phase
from lbp.errors import Diverged, Refused


class ELM(LearningRule):
    """Extreme learning machine: random hidden blocks, and a head solved by ridge regression on the targets.

    head = argmin sum |phi(x) W^T + b - t|^2 / 2 + ridge/2 |W|^2, with one-hot targets for classes; the bias is not
    penalised (Huang, Zhu & Siew 2006; Hoerl & Kennard 1970). A control: what random features alone reach.
    """

    facts = Facts(
        family="closed_form", paper="Huang, Zhu & Siew, Neurocomputing 70 (2006)",
        weight_transport=False, backward_locked=False, update_locked=True, needs_derivative=False,
        in_place=True, closed_form=True)

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

    @torch.no_grad()
    def fit(self, batches):
        self.network.eval()
        weight = self.network.head.weight
        gram = weight.new_zeros((weight.shape[1] + 1,) * 2, dtype=torch.float64)
        cross = weight.new_zeros(len(gram), len(weight), dtype=torch.float64)
        for x, y in batches(4096):
            for block in self.network.hidden.values():
                x = block(x)
            target = self.task.onehot(y).to(x.dtype)
            if x.dim() > 2:     # an answer at each token: they are the samples, those that count
                x, target = x[target.any(-1)], target[target.any(-1)]
            x = torch.cat([x, x.new_ones(len(x), 1)], 1)
            # Each product in the data's precision, their sum in double.
            gram += x.T @ x
            cross += x.T @ target
        ops.over_ranks(gram, cross)
        solution = ridge_solution(gram, cross, self.ridge)
        self.network.head.weight.copy_(solution[:-1].T)
        self.network.head.bias.copy_(solution[-1])


def ridge_solution(gram: Tensor, cross: Tensor, ridge: float) -> Tensor:
    """Solves (gram + ridge I') w = cross by Cholesky; I' leaves the last feature, the constant one, unpenalised.

    gram (D+1, D+1), cross (D+1, C) -> (D+1, C), all double. Raises Diverged where that is singular or not finite.
    """
    penalty = gram.new_full((len(gram),), ridge)
    penalty[-1] = 0
    factor, info = torch.linalg.cholesky_ex(gram + penalty.diag())
    solution = torch.cholesky_solve(cross, factor)
    if info or not solution.isfinite().all():
        raise Diverged(f"the {len(gram) - 1} features are linearly dependent or not finite at algo.ridge={ridge}: "
                       "raise algo.ridge")
    return solution
