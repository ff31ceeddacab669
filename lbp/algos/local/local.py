from __future__ import annotations

import math

import torch
from torch import nn

from lbp.algos.rule import Facts, Learned, LearningRule


class Local(LearningRule):
    """Local prediction losses: each hidden block is trained by a linear classifier of its own on its output.

    No gradient crosses a block (Nokland & Eidnes 2019, the prediction loss; Belilovsky et al. 2020). Feature maps are
    average-pooled until at most `head_features` values are left. `schedule=joint` adds all the losses and takes one
    step; `streaming` steps each block as soon as it has run, so that one block's activations live at a time. Both
    give the same updates.
    """

    facts = Facts(
        family="local", paper="Nokland & Eidnes, ICML 2019, arXiv 1901.06656; Belilovsky et al., ICML 2020, arXiv 1901.08164",
        weight_transport=False, backward_locked=False, update_locked=False)

    def __init__(self, network, task, *, schedule: str, head_features: int):
        super().__init__(network, task)
        self.schedule = schedule
        weight = network.head.weight
        self.heads = nn.ModuleDict({
            name: local_head(network.shapes[name], task.outputs, head_features).to(weight.device, weight.dtype)
            for name in network.hidden})

    def groups(self):
        return {"forward": list(self.network.parameters()), "heads": list(self.heads.parameters())}

    def learn(self, x, y, apply):
        losses, blocks = [], {}
        for name, block in self.network.hidden.items():
            h = block(x)
            local = self.heads[name](h)
            loss = self.task.loss(local, y)
            x = h.detach()
            if self.schedule == "streaming":
                loss.sum().backward()
                apply("forward", loss.detach())
                apply("heads", loss.detach())
            else:
                losses.append(loss)
            blocks[name] = {"local_loss": loss.detach().mean(), **_local_accuracy(self.task, local, y)}
        out = self.network.head(x)
        loss = self.task.loss(out, y)
        torch.stack([part.sum() for part in (*losses, loss)]).sum().backward()
        return Learned(out.detach(), loss.detach(), blocks)


def _local_accuracy(task, out, y):
    if task.kind != "classification":
        return {}
    return {"local_accuracy": task.score(out.detach(), y)[0] / task.count(y)}


def local_head(shape: tuple[int, ...], outputs: int, features: int) -> nn.Module:
    """A linear read-out of a block's output; maps are pooled to the largest square that leaves at most `features`."""
    if len(shape) != 3:
        return nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape), outputs))
    channels, height, width = shape
    side = max(1, min(height, width, int((features / channels) ** 0.5)))
    return nn.Sequential(nn.AdaptiveAvgPool2d(side), nn.Flatten(), nn.Linear(channels * side * side, outputs))
