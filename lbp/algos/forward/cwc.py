from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from lbp.algos import ops
from lbp.algos.rule import Facts, LearningRule, Lesson, Phase, learn_by_blocks
from lbp.errors import Refused


class Cwc(LearningRule):
    """Channel-wise competition: each block's channels are shared out among the classes, which compete by their activity.

    A class's goodness is the mean of the squares of its channels over all positions; the block's loss is the cross entropy
    of the softmax over goodnesses, so no negative samples are needed (Papachristodoulou et al. 2024). No gradient crosses a
    block. Where the channels are no multiple of the classes some classes have one more; where they are fewer, neighbouring
    classes share a channel.
    `predict=head`: the head is a linear softmax on the last block's output, trained alongside; `goodness`: the last block's
    goodnesses answer, and the head is not used. `stop`: interleaved training; after so many epochs the first, the second ... block
    stops learning (and runs in eval mode); what is left learns for `trainer.epochs` more.
    """

    facts = Facts(
        family="forward", paper="Papachristodoulou et al., AAAI 2024, arXiv 2312.12668",
        weight_transport=False, backward_locked=False, update_locked=False)

    def __init__(self, network, task, *, predict: str, stop: list[int]):
        super().__init__(network, task)
        ops.classification(task, "cwc")
        if len(list(network.shapes.values())[-1]) != 1:
            raise Refused("algo=cwc gives a whole sample to one class: block head answers each token apart; " + ops.elsewhere(network))
        self.answers, self.stop = predict, list(stop)
        self.axes, self.shares = {}, {}
        for name, projection in ops.projections(network, "channels").items():
            self.axes[name] = 1 + (projection.axis or 0)
            self.shares[name] = min(task.classes, projection.columns)
        last = list(network.hidden)[-1]
        if predict == "goodness" and self.shares[last] < task.classes:
            raise Refused(f"algo=cwc with algo.predict=goodness: block {last} has {self.shares[last]} channels for {task.classes} "
                          "classes; give the last layer more units (arch=mlp: arch.widths), or take algo.predict=head")
        if self.stop != sorted(self.stop) or len(self.stop) > len(network.hidden) - (predict == "goodness"):
            goes_on = f", of which the last, block {last}, goes on" if predict == "goodness" else ""
            raise Refused(f"algo=cwc with algo.stop={self.stop}: epochs must not fall, and are for the {len(network.hidden)} "
                          f"hidden blocks{goes_on}; use algo.stop=[]")

    def groups(self):
        blocks = self.network.blocks if self.answers == "head" else self.network.hidden
        return {"forward": [p for block in blocks.values() for p in block.parameters()]}

    def phases(self):
        """A phase for each time that blocks stop at; `done` blocks learn no more in it."""
        if not self.stop:
            return super().phases()
        stages, past = [], 0
        for end in sorted(set(self.stop)):
            done = sum(at <= past for at in self.stop)
            stages.append(Phase(f"epoch {end}", learn=partial(self.learn, done=done), epochs=end - past))
            past = end
        return [*stages, Phase("train", learn=partial(self.learn, done=len(self.stop)))]

    def learn(self, x, y, apply, done: int = 0):
        below, names = list(self.network.blocks)[:done], list(self.network.blocks)[done:]
        with torch.no_grad():
            for name in below:
                x = self.network.blocks[name].eval()(x)
        return learn_by_blocks(self, names, (x,), y, apply)[1]

    def learn_block(self, name, h, y):
        block, (x,) = self.network.blocks[name], h
        if block is not self.network.head:
            h = block(x)
            goodness = class_goodness(h, self.shares[name], self.axes[name])
            target = y * self.shares[name] // self.task.classes
            loss = F.cross_entropy(goodness, target, reduction="none")
            values = {"local_loss": loss.detach().mean(), "local_accuracy": (goodness.detach().argmax(1) == target).to(loss.dtype).mean()}
            answers = self.answers == "goodness" and block is list(self.network.hidden.values())[-1]
            return Lesson(loss, (h.detach(),), values, loss.detach(), goodness.detach() if answers else None)
        if self.answers == "goodness":
            return Lesson()
        out = block(x)
        loss = self.task.loss(out, y)
        return Lesson(loss, told=loss.detach(), out=out.detach())

    def predict(self, x):
        if self.answers == "head":
            return self.network(x)
        for block in self.network.hidden.values():
            x = block(x)
        name = list(self.network.hidden)[-1]
        return class_goodness(x, self.shares[name], self.axes[name])


def class_goodness(h: Tensor, classes: int, axis: int) -> Tensor:
    """(N, classes): the mean square of each class's channels; `axis` holds the channels."""
    squares = ops.at_least_fp32(h).square().movedim(axis, -1)
    return torch.stack([part.flatten(1).mean(1) for part in squares.tensor_split(classes, -1)], 1)
