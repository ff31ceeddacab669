from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lbp.algos import ops
from lbp.algos.rule import Facts, Learned, LearningRule, Rng
from lbp.archs.network import NORMS
from lbp.errors import Refused


class ForwardForward(LearningRule):
    """Forward-Forward: each layer tells inputs that carry their own label from inputs that carry a wrong one.

    The label is written one-hot into the first pixels. A layer's goodness is the sum of its squared activities; it is
    pushed above `threshold` a unit for true labels and below for false ones, by logistic regression (Hinton 2022).
    The length of a layer's output is removed before the next layer sees it. A class is predicted by the goodness that its
    label brings, summed over all layers but the first. The head is not used.
    """

    facts = Facts(
        family="forward", paper="Hinton, arXiv 2212.13345 (2022)",
        weight_transport=False, backward_locked=False, update_locked=False, labels_at_input=True)

    def __init__(self, network, task, *, threshold: float):
        super().__init__(network, task)
        ops.classification(task, "forward_forward")
        for name, layer in ops.plain_layers(network, "forward_forward").items():
            if isinstance(layer.norm, NORMS):
                raise Refused(f"algo=forward_forward takes no norm (block {name} has {type(layer.norm).__name__}): batch "
                              "statistics would mix true and false samples, and it strips each output's length itself; "
                              "use arch.norm=none")
        if torch.Size(task.in_shape).numel() < task.classes:
            raise Refused(f"algo=forward_forward writes the label into the first {task.classes} inputs; "
                          f"samples have {torch.Size(task.in_shape).numel()}")
        self.threshold = threshold
        self.rng = Rng()

    def groups(self):
        return {"forward": [p for block in self.network.hidden.values() for p in block.parameters()]}

    def learn(self, x, y, apply):
        wrong = (y + 1 + self.rng.integers(self.task.classes - 1, y)) % self.task.classes
        h = torch.cat([with_label(x, y, self.task.classes), with_label(x, wrong, self.task.classes)])
        total, blocks = x.new_zeros(()), {}
        for name, block in self.network.hidden.items():
            h = block(unit_length(h))
            positive, negative = goodness_margin(h, self.threshold).chunk(2)
            loss = F.softplus(-positive) + F.softplus(negative)
            loss.sum().backward()
            apply("forward", loss.detach())
            h = h.detach()
            total = total + loss.detach().sum()
            blocks[name] = {"local_loss": loss.detach().mean(),
                            "local_accuracy": torch.cat([positive > 0, negative < 0]).to(x.dtype).mean()}
        return Learned(None, total, blocks)

    def predict(self, x):
        counted = list(self.network.hidden)[1:] or list(self.network.hidden)
        columns = []
        for label in range(self.task.classes):
            h = with_label(x, torch.full((x.shape[0],), label, device=x.device), self.task.classes)
            score = 0.0
            for name, block in self.network.hidden.items():
                h = block(unit_length(h))
                if name in counted:
                    score = score + goodness_margin(h, self.threshold)
            columns.append(score)
        return torch.stack(columns, 1)


def with_label(x: Tensor, y: Tensor, classes: int) -> Tensor:
    """x (N, ...) with its first `classes` values replaced by the one-hot label."""
    flat = x.flatten(1)
    return torch.cat([F.one_hot(y, classes).to(x.dtype), flat[:, classes:]], 1).view_as(x)


def unit_length(h: Tensor) -> Tensor:
    """Each sample divided by the root mean square of its values; the mean stays."""
    flat = ops.at_least_fp32(h.flatten(1))
    return (flat / (flat.square().mean(1, keepdim=True).sqrt() + 1e-8)).view_as(h)


def goodness_margin(h: Tensor, threshold: float) -> Tensor:
    """(N,): the sum of squared activities less `threshold` for each unit."""
    flat = ops.at_least_fp32(h.flatten(1))
    return flat.square().sum(1) - threshold * flat.shape[1]
