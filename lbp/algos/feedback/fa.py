from __future__ import annotations

import torch

from lbp.algos import ops
from lbp.algos.rule import Facts, LearningRule
from lbp.archs.init import draw


class FA(LearningRule):
    """Feedback alignment: errors come down through fixed random matrices B in place of the transposed weights.

    delta_l = (delta_{l+1} B_{l+1}) * f'(a_l), with B_l shaped as W_l (Lillicrap et al. 2016). Convolutions
    share B over positions as they share W. Norms, activations, pools and skips keep their exact derivative.
    """

    facts = Facts(
        family="feedback", paper="Lillicrap, Cownden, Tweed & Akerman, Nat. Commun. 7:13276 (2016), arXiv 1411.0247",
        weight_transport=False, backward_locked=True, update_locked=True)

    def __init__(self, network, task, *, init: str, scale: float):
        super().__init__(network, task)
        self.sites = ops.feedback_sites(network)
        for name, weight in self.sites.items():
            self.register_buffer(buffer_name(name), draw(torch.empty_like(weight, requires_grad=False), init, scale))

    def pairs(self) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """{parameter name: (W, B)}."""
        return {name: (weight, getattr(self, buffer_name(name))) for name, weight in self.sites.items()}

    def learn(self, x, y, apply):
        return ops.learn_through(self.network, self.task, x, y, list(self.pairs().values()))

    def feedback(self):
        return ops.by_block(self.pairs())


def buffer_name(parameter_name: str) -> str:
    return parameter_name.replace(".", "_")
