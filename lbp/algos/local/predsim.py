from __future__ import annotations

from torch import Tensor

from lbp.algos.local.local import lesson_of, local_heads, prediction_loss
from lbp.algos.local.sim import similarity_loss, similarity_maps
from lbp.algos.rule import Facts, LearningRule


class PredSim(LearningRule):
    """Prediction and similarity matching together: each hidden block by (1 - beta) pred + beta sim.

    `pred` is the loss of a linear classifier of the block's own, `sim` that of algo=sim (Nokland & Eidnes 2019). Both look
    before dropout and pooling; maps are average-pooled for the classifier alone, which begins with weights of 0. The loss of
    the head, on the last block's detached output, counts (1 - beta) too.
    """

    facts = Facts(
        family="local", paper="Nokland & Eidnes, ICML 2019, arXiv 1901.06656",
        weight_transport=False, backward_locked=False, update_locked=False, batch_coupled=True)

    tap = "activation"

    def __init__(self, network, task, *, schedule: str, beta: float, head_features: int):
        super().__init__(network, task)
        self.schedule, self.beta = schedule, beta
        self.maps = similarity_maps(network, task, "predsim")
        self.heads = local_heads(network, task, "predsim", self.tap, head_features, init="zeros")

    def groups(self):
        return {"forward": list(self.network.parameters()), "heads": [*self.heads.parameters(), *self.maps.parameters()]}

    def learn_block(self, name, h, y):
        return lesson_of(self, name, *h, y, 1 - self.beta)

    def local_loss(self, name: str, h: Tensor, y: Tensor):
        pred, values = prediction_loss(self.task, self.heads[name](h), y)
        sim = similarity_loss(self.maps[name](h), self.task.onehot(y))
        values["similarity_loss"] = sim.detach()
        values["local_loss"] = (1 - self.beta) * values["local_loss"] + self.beta * values["similarity_loss"]
        return (1 - self.beta) * pred.sum() + self.beta * len(h) * sim, values
