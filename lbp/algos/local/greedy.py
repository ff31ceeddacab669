from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from lbp.algos.local.local import leading, lesson_of, prediction_loss, tapped, tapped_shapes
from lbp.algos.rule import Facts, Learned, LearningRule, Phase
from lbp.archs.network import norm as make_norm


class Greedy(LearningRule):
    """Greedy layer-wise learning: each hidden block with an auxiliary network of its own, which is thrown away in the end.

    With the block the auxiliary classifier is a network of `k` hidden layers: its own are k - 1 convolutions of 3x3 (dense
    layers for what is no map), as wide as the block, then pooling and a linear layer. `schedule=greedy` trains one block
    after another, for the trainer's epochs and schedule each; those below are frozen, in evaluation mode (Belilovsky et al. 2019).
    `joint` and `streaming` train all at once (decoupled greedy learning, Belilovsky et al. 2020). No gradient crosses a block.
    The head learns on the last block's detached output, with that block. Until the last block's turn the prediction is the
    auxiliary classifier's of the block in training, and with `readout=auxiliary` it stays the last one's.
    """

    facts = Facts(
        family="local", paper="Belilovsky et al., ICML 2019, arXiv 1812.11446; ICML 2020, arXiv 1901.08164",
        weight_transport=False, backward_locked=False, update_locked=False)

    tap = "activation"

    def __init__(self, network, task, *, schedule: str, k: int, side: int, norm: str, readout: str):
        super().__init__(network, task)
        self.facts = replace(self.facts, batch_coupled=norm == "batch")
        self.schedule, self.readout = schedule, readout
        self.names = list(network.hidden)
        self.turn = -1  # whose turn it is, after which all below are frozen; -1: all at once
        lead = leading(network, "greedy")
        self.heads = nn.ModuleDict({
            name: auxiliary(shape, len(lead), task.outputs, k, side, norm) for name, shape in tapped_shapes(network, self.tap).items()
        }).to(network.head.weight.device, network.head.weight.dtype)

    def groups(self):
        return {"forward": list(self.network.parameters()), "heads": list(self.heads.parameters())}

    def phases(self):
        if self.schedule != "greedy":
            return super().phases()
        return [Phase(name, learn=partial(self.learn_stage, turn), restart=True) for turn, name in enumerate(self.names)]

    def learn_block(self, name, h, y):
        lesson = lesson_of(self, name, *h, y)
        if self.readout == "auxiliary":
            lesson.out = self.last if name == self.names[-1] else None
            lesson.told = None if lesson.out is None else self.task.loss(self.last, y)
        return lesson

    def learn_stage(self, turn: int, x: Tensor, y: Tensor, apply) -> Learned:
        """One block, and with the last one the head; the blocks below are frozen."""
        if turn != self.turn:
            self.turn = turn
            self.train(self.training)
        name, *above = self.names[turn:]
        with torch.no_grad():
            for below in self.names[:turn]:
                x = self.network.blocks[below](x)
        h, x = tapped(self.network.blocks[name], x, self.tap)
        out = self.heads[name](h)
        loss, values = prediction_loss(self.task, out, y)
        total = loss.sum()
        if not above:
            answer = self.network.head(x.detach())
            total = total + self.task.loss(answer, y).sum()
            out = out if self.readout == "auxiliary" else answer
        total.backward()
        out = out.detach()
        return Learned(out, self.task.loss(out, y), {name: values})

    def local_loss(self, name: str, h: Tensor, y: Tensor):
        out = self.heads[name](h)
        self.last = out.detach()
        return prediction_loss(self.task, out, y)

    def predict(self, x):
        name, *above = self.names[self.turn:]
        if not above and self.readout == "head":
            return self.network(x)
        for below in self.names[: self.names.index(name)]:
            x = self.network.blocks[below](x)
        return self.heads[name](tapped(self.network.blocks[name], x, self.tap)[0])

    def train(self, mode: bool = True):
        super().train(mode)
        for name in self.names[: max(0, self.turn)]:
            self.network.blocks[name].eval()
        return self

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.turn)

    def set_extra_state(self, state: Tensor) -> None:
        self.turn = int(state)


def auxiliary(shape: tuple[int, ...], lead: int, outputs: int, k: int, side: int, norm: str) -> nn.Sequential:
    """k - 1 hidden layers of the width of what comes in, then maps are averaged to `side` x `side` and tokens to one, and a linear
    layer. The first `lead` dimensions are kept."""
    layers: list[nn.Module] = []
    if len(shape) == 3 and not lead:
        width, *sides = shape
        kept = [min(side, length) for length in sides]
        for _ in range(k - 1):
            layers += [nn.Conv2d(width, width, 3, padding=1, bias=norm == "none"), make_norm(norm, width, 2), nn.ReLU()]
        pooled = [nn.AdaptiveAvgPool2d(tuple(kept)), make_norm(norm, width, 2), nn.Flatten()]
        return nn.Sequential(*layers, *pooled, nn.Linear(width * math.prod(kept), outputs))
    width = shape[-1]
    for _ in range(k - 1):
        layers += [nn.Linear(width, width), nn.ReLU()]
    return nn.Sequential(*layers, *[MeanOverTokens() for _ in shape[lead:-1]], nn.Linear(width, outputs))


class MeanOverTokens(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(-2)
