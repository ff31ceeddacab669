from __future__ import annotations

import torch

from lbp.algos.closed_form.cafo import block_outputs, combined, predictors
from lbp.algos.rule import Facts, Learned, LearningRule


class CaFoGD(LearningRule):
    """Cascaded forward by gradient descent: hidden blocks stay random, each has a linear predictor trained on its own loss.

    As `cafo`, with predictors that learn under any loss, by its exact gradient in batches: under cross entropy the
    paper's better variant (Zhao et al. 2023). A class is predicted by the mean of the predictors' probabilities.
    """

    facts = Facts(
        family="local", paper="Zhao, Wang, Jin, Lang, Li & Ling, arXiv 2303.09728 (2023)",
        weight_transport=False, backward_locked=False, update_locked=False, needs_derivative=False)

    def __init__(self, network, task, *, head_features: int):
        super().__init__(network, task)
        self.heads = predictors(network, task, head_features, "cafo_gd")

    def groups(self):
        return {"forward": list(self.network.head.parameters()), "heads": list(self.heads.parameters())}

    def learn(self, x, y, apply):
        outs = block_outputs(self.network, self.heads, x)
        losses = {name: self.task.loss(out, y) for name, out in outs}
        torch.stack([loss.sum() for loss in losses.values()]).sum().backward()
        with torch.no_grad():
            out = combined([out for _, out in outs], self.task.loss_name)
            blocks = {name: {"local_loss": loss.detach().mean()} for name, loss in losses.items()}
            return Learned(out, self.task.loss(out, y), blocks)

    def predict(self, x):
        return combined([out for _, out in block_outputs(self.network, self.heads, x)], self.task.loss_name)
