from __future__ import annotations

import torch

from lbp.algos import ops
from lbp.algos.rule import Facts, LearningRule
from lbp.algos.targets.inverses import bring_down, distances, inverses, teach, walk
from lbp.archs.init import draw


class FWDTP(LearningRule):
    """Fixed-weight difference target propagation: targets come down through random maps that never learn.

    As difference target propagation, t_{l-1} = h_{l-1} + g_l(t_l) - g_l(h_l) from t_L = h_L - beta dL/dh_L, where each g_l, of the
    shape of an inverse of the block, keeps the weights it was drawn with (Shibuya et al. 2023). The difference makes a target
    out of it: where the loss gradient is 0 each t_l is h_l, whatever g. No noise runs through the blocks, so that batch norm and
    dropout are as in any training. The head receives its exact gradient.
    """

    facts = Facts(
        family="targets", paper="Shibuya et al., AAAI 2023, arXiv 2212.10352",
        weight_transport=False, backward_locked=True, update_locked=True)

    def __init__(self, network, task, *, beta: float, init: str, scale: float, inverse_activation: str):
        super().__init__(network, task)
        self.beta = beta
        self.inverses = inverses(network, "fw_dtp", list(network.blocks), inverse_activation).requires_grad_(False)
        for weight in self.inverses.parameters():
            draw(weight, init, scale)

    def learn(self, x, y, apply):
        graphs = walk(self.network, x)
        values = {name: ops.at_least_fp32(h.detach()) for name, h in graphs.items()}
        *_, head = values
        error, learned = ops.teach_head(self.task, graphs[head], y)
        with torch.no_grad(), ops.full_precision(x):
            targets, _ = bring_down(values, self.inverses, values[head] - self.beta * error)
            del targets[head]
            learned.blocks = distances(values, targets)
        teach(graphs, values, targets, self.beta)
        return learned
