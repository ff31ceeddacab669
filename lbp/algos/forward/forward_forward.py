from __future__ import annotations

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lbp.algos import ops
from lbp.algos.rule import Facts, Learned, LearningRule, Lesson, Rng, learn_by_blocks
from lbp.archs.network import NORMS
from lbp.errors import Refused

MOMENTUM = .9    # of the running means of peer normalisation


class ForwardForward(LearningRule):
    """Forward-Forward: each layer tells inputs that carry their own label from inputs that carry a wrong one.

    The label is written one-hot into the first pixels. A layer's goodness is the sum of its squared activities; it is
    pushed above `threshold` a unit for true labels and below for false ones, by logistic regression (Hinton 2022).
    A layer's output is brought to a mean square of one before the next layer sees it. The head is not used.

    `predict=goodness`: a class is predicted by the goodness that its label brings, summed over all layers but the first.
    `softmax`: in one pass, with the same value for every label, by a linear softmax on the layers' outputs, so scaled, all but the
    first's, that is trained alongside (group "heads"). `negatives=hard`: wrong labels are drawn as likely as the model itself
    takes them to be (by its prediction), `random`: all alike. `peer`: peer normalisation, a pull of each unit's mean activity on
    true samples (a running mean) towards that of its layer. `straight_through`: gradients pass the ReLU as if it were not there, so that silent units can learn.
    """

    facts = Facts(
        family="forward", paper="Hinton, arXiv 2212.13345 (2022)",
        weight_transport=False, backward_locked=False, update_locked=False, labels_at_input=True)

    def __init__(self, network, task, *, threshold: float, negatives: str, predict: str, peer: float, straight_through: bool):
        super().__init__(network, task)
        ops.classification(task, "forward_forward")
        for name, layer in ops.plain_layers(network, "forward_forward").items():
            if isinstance(layer.norm, NORMS):
                raise Refused(f"algo=forward_forward takes no norm (block {name} has {type(layer.norm).__name__}): batch "
                              "statistics would mix true and false samples, and it strips each output's length itself; "
                              "use arch.norm=none")
            if straight_through and not isinstance(layer.activation, nn.ReLU):
                raise Refused("algo=forward_forward with algo.straight_through=true passes gradients through a ReLU: "
                              f"block {name} has {type(layer.activation).__name__}; give it relu "
                              "(by arch.activation, arch.dense_activation or arch.layers)")
        if torch.Size(task.in_shape).numel() < task.classes:
            raise Refused(f"algo=forward_forward writes the label into the first {task.classes} inputs; "
                          f"samples have {torch.Size(task.in_shape).numel()}")
        self.threshold, self.negatives, self.peer, self.straight_through = threshold, negatives, peer, straight_through
        self.facts = replace(self.facts, update_locked=predict == "softmax" or negatives == "hard",    # a pass through all layers comes first
                             batch_coupled=peer > 0)
        self.rng = Rng()
        self.counted = list(network.hidden)[1:] or list(network.hidden)
        self.readout = None
        weight = network.head.weight
        if predict == "softmax":
            features = sum(math.prod(network.shapes[name]) for name in self.counted)
            self.readout = nn.Linear(features, task.classes, bias=False, device=weight.device, dtype=weight.dtype)
            nn.init.zeros_(self.readout.weight)
        if peer:
            for name in network.hidden:
                self.register_buffer(f"mean_{name}", weight.new_full((math.prod(network.shapes[name]),), .5).detach())

    def groups(self):
        return {"forward": [p for block in self.network.hidden.values() for p in block.parameters()],
                "heads": [] if self.readout is None else list(self.readout.parameters())}

    def learn(self, x, y, apply):
        if self.readout is None:
            return super().learn(x, y, apply)
        out = self.readout(self.features(x))     # before anything moves
        loss = self.task.loss(out, y)
        loss.sum().backward()
        learned = learn_by_blocks(self, self.network.blocks, self.enter(x, y, out.detach()), y, apply)[1]
        return Learned(out.detach(), learned.loss + loss.detach(), learned.blocks)

    def enter(self, x, y, belief: Tensor | None = None):
        wrong = self.wrong_labels(x, y, belief)
        return (torch.cat([with_label(x, y, self.task.classes), with_label(x, wrong, self.task.classes)]),)

    def learn_block(self, name, h, y):
        block = self.network.blocks[name]
        if block is self.network.head:
            return Lesson()
        h = self.answer(block, unit_length(*h))
        positive, negative = goodness_margin(h, self.threshold).chunk(2)
        loss = F.softplus(-positive) + F.softplus(negative)
        if self.peer:
            loss = loss + self.peer * self.uneven(name, h[: len(y)])
        values = {"local_loss": loss.detach().mean(), "local_accuracy": torch.cat([positive > 0, negative < 0]).to(loss.dtype).mean()}
        return Lesson(loss, (h.detach(),), values, loss.detach())

    def answer(self, block, h: Tensor) -> Tensor:
        if not self.straight_through:
            return block(h)
        a = block.pre(h)
        return block.pool(block.dropout(a + (block.activation(a) - a).detach()))

    def wrong_labels(self, x: Tensor, y: Tensor, belief: Tensor | None) -> Tensor:
        classes = self.task.classes
        if self.negatives == "random":
            return (y + 1 + self.rng.integers(classes - 1, y)) % classes
        with torch.no_grad():
            belief = self.goodness(x) if belief is None else belief
        return drawn_but(y, belief, (self.rng.integers(2**24, y).double() + .5) / 2**24)

    def uneven(self, name: str, h: Tensor) -> Tensor:
        """(N,) the variance over units of their running mean activities, for each sample of h (N, ...); these move on."""
        means = getattr(self, f"mean_{name}")
        h = ops.at_least_fp32(h.flatten(1))
        total, rows = h.detach().sum(0), h.new_tensor(float(len(h)))
        ops.over_ranks(total, rows)
        new = MOMENTUM * means + (1 - MOMENTUM) * total / rows
        means.copy_(torch.where(new.isfinite().all(), new, means))
        return variance_of_means(new, h)

    @torch.no_grad()
    def features(self, x: Tensor) -> Tensor:
        """(N, units): outputs of length one under no label, of all layers but the first."""
        h, found = with_label(x, None, self.task.classes), []
        for name, block in self.network.hidden.items():
            h = unit_length(block(unit_length(h)))
            if name in self.counted:
                found.append(h.flatten(1))
        return torch.cat(found, 1)

    def goodness(self, x: Tensor) -> Tensor:
        """(N, classes): what each label brings, summed over all layers but the first."""
        columns = []
        for label in range(self.task.classes):
            h = with_label(x, torch.full((x.shape[0],), label, device=x.device), self.task.classes)
            score = 0.0
            for name, block in self.network.hidden.items():
                h = block(unit_length(h))
                if name in self.counted:
                    score = score + goodness_margin(h, self.threshold)
            columns.append(score)
        return torch.stack(columns, 1)

    def predict(self, x):
        return self.goodness(x) if self.readout is None else self.readout(self.features(x))


def with_label(x: Tensor, y: Tensor | None, classes: int) -> Tensor:
    """x (N, ...) with its first `classes` values replaced by the one-hot label; without one by 1 / classes each."""
    flat = x.flatten(1)
    label = flat.new_full((len(x), classes), 1 / classes) if y is None else F.one_hot(y, classes).to(x.dtype)
    return torch.cat([label, flat[:, classes:]], 1).view_as(x)


def drawn_but(y: Tensor, belief: Tensor, u: Tensor) -> Tensor:
    """(N,) labels other than y, by the softmax of the logits `belief` (N, classes) over these. `u` (N,) chooses: from 0 to 1, in
    fp64, since a 1 would choose what lies beyond the last."""
    others = belief.double().scatter(1, y[:, None], -math.inf).softmax(1).cumsum(1)
    return (others <= u[:, None] * others[:, -1:]).sum(1)


def variance_of_means(means: Tensor, h: Tensor) -> Tensor:
    """(N,) mean((mean(means) - means)^2); its sum's gradient by h (N, units) is what the batch's mean, a share 1 - MOMENTUM of
    `means`, passes on, times the rows of the whole batch."""
    apart = means - means.mean()
    pull = (h * (2 * (1 - MOMENTUM) / len(means) * apart)).sum(1)
    return apart.square().mean() + pull - pull.detach()


def unit_length(h: Tensor) -> Tensor:
    """Each sample divided by the root mean square of its values; the mean stays."""
    flat = ops.at_least_fp32(h.flatten(1))
    return (flat / (flat.square().mean(1, keepdim=True).sqrt() + 1e-8)).view_as(h)


def goodness_margin(h: Tensor, threshold: float) -> Tensor:
    """(N,): the sum of squared activities less `threshold` for each unit."""
    flat = ops.at_least_fp32(h.flatten(1))
    return flat.square().sum(1) - threshold * flat.shape[1]
