from __future__ import annotations

import torch
from torch import nn

from lbp.algos import ops
from lbp.algos.rule import Facts, LearningRule
from lbp.archs.init import draw


class KP(LearningRule):
    """Kolen-Pollack: feedback alignment whose B receives the same update as its W, and both the same decay.

    W <- (1 - decay) W - step,  B <- (1 - decay) B - step: their difference is (1 - decay)^t of the first one, whatever
    the steps were (Akrout et al. 2019), as long as they were the same for W and B: weight decay of an adaptive optimizer
    enters each weight's own history, so leave `optimizer.weight_decay` at 0 there and use `decay`. And where no decay
    takes the difference away, W and B come to agree only as far as what they learn outgrows it: the steps of adam and its
    kind are bounded, and there they hardly do. As a rule decay times the number of steps should reach 4.
    """

    facts = Facts(
        family="feedback", paper="Kolen & Pollack (1994); Akrout et al., NeurIPS 2019, arXiv 1904.05391",
        weight_transport=False, backward_locked=True, update_locked=True, in_place=True)

    def __init__(self, network, task, *, init: str, scale: float, decay: float):
        super().__init__(network, task)
        self.decay = decay
        self.sites = ops.feedback_sites(network)
        self.backward_weights = nn.ParameterList(
            draw(torch.empty_like(weight, requires_grad=False), init, scale) for weight in self.sites.values())

    def groups(self):
        # One group with the forward weights: learning rate, momentum and clipping must be common to W and B.
        return {"forward": [*self.network.parameters(), *self.backward_weights]}

    def learn(self, x, y, apply):
        learned = ops.learn_through(self.network, self.task, x, y, list(zip(self.sites.values(), self.backward_weights)))
        if self.decay:
            keep = 1 - self.decay * ops.all_finite(learned.loss)
            with torch.no_grad():
                for weight in (*self.sites.values(), *self.backward_weights):
                    weight.mul_(keep.to(weight.dtype))
        return learned

    def feedback(self):
        return ops.by_block(dict(zip(self.sites, zip(self.sites.values(), self.backward_weights))))
