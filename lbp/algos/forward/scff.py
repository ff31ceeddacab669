from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lbp.algos import ops
from lbp.algos.closed_form.cafo import pooled_readout
from lbp.algos.hebbian.softhebb import by_name, plain_features, triangle, unit_axis
from lbp.algos.rule import Facts, Learned, LearningRule, Phase, Rng
from lbp.errors import Refused


class SCFF(LearningRule):
    """Self-contrastive Forward-Forward: a sample beside itself is a positive pair, beside another one a negative.

    Both halves of a pair meet the same weights: z = f(x_i) + f(x_j) for a block's linear part f. The goodness g at each
    position is the mean over units of relu(z)^2; the loss is softplus(theta+ - g+) + softplus(g- - theta-), averaged over
    positions, plus a penalty times |g+| (Chen et al. 2025). A block's inputs are standardised sample by sample. Blocks
    of `pairs` pair what the positive samples made below; the others take what both kinds made. No labels: after the
    `feature_epochs` all this stays, and a linear read-out of the blocks' standardised outputs learns alone.
    """

    facts = Facts(
        family="forward", paper="Chen, Liu, Laydevant & Grollier, Nature Communications 2025, arXiv 2409.11593",
        weight_transport=False, backward_locked=False, update_locked=False, needs_derivative=False, batch_coupled=True)

    def __init__(self, network, task, *, positive_threshold: list[float], negative_threshold: list[float], penalty: list[float],
                 pairs: list[bool], triangle: list[bool], schedule: str, feature_epochs: list[int], readout_features: int,
                 readout_dropout: float):
        super().__init__(network, task)
        plain_features(network, "scff", "batch statistics would mix both kinds of pairs, and it standardises each block's "
                       "inputs itself")
        (last, shape), weight = list(network.shapes.items())[-1], network.head.weight
        if len(shape) > 1:
            raise Refused(f"algo=scff contrasts whole samples, and block {last} answers for each token; {ops.elsewhere(network)}")
        names = list(network.hidden)
        above, below = by_name(positive_threshold, names, "positive_threshold"), by_name(negative_threshold, names, "negative_threshold")
        self.thresholds = {name: (above[name], below[name]) for name in names}
        self.penalty, self.triangle = by_name(penalty, names, "penalty"), by_name(triangle, names, "triangle")
        self.feature_epochs = by_name(feature_epochs, names, "feature_epochs")
        self.pairs = by_name(pairs, names, "pairs") | {names[0]: True}
        self.schedule, self.readout_dropout, self.rng = schedule, readout_dropout, Rng()
        self.heads = nn.ModuleDict({
            name: pooled_readout(network.shapes[name], task.outputs, readout_features).to(weight.device, weight.dtype)
            for name in (names[:-1] if readout_features else ())})

    def groups(self):
        return {"forward": [p for layer in self.network.hidden.values() for p in layer.parameters()],
                "heads": [*self.heads.parameters(), *self.network.head.parameters()]}

    def phases(self):
        names = list(self.network.hidden)
        ends = self.feature_epochs
        if self.schedule == "greedy":
            stages = [([name], ends[name]) for name in names]
        else:    # all begin at once; those of fewer epochs stop while the others go on
            bounds = sorted({0, *ends.values()})
            stages = [([name for name in names if ends[name] >= end], end - begin) for begin, end in zip(bounds, bounds[1:])]
        before = [Phase("features of " + ", ".join(of), learn=partial(self._learn, training=of, readout=False), epochs=epochs,
                        restart=True) for of, epochs in stages if epochs]
        return [*before, Phase("readout", learn=self.learn_readout, restart=True)]

    def learn(self, x, y, apply):
        """Features of all blocks and the read-out at once; a run trains one after the other."""
        return self._learn(x, y, apply, self.network.hidden, True)

    def learn_readout(self, x, y, apply):
        return self._learn(x, y, apply, (), True)

    def _learn(self, x, y, apply, training, readout: bool):
        outputs, blocks, losses = {}, {}, []
        # A partner for each sample, never itself but in a batch of one.
        further = self.rng.integers(max(1, len(x) - 1), y[:, 0] if y.dim() > 1 else y)
        other = (torch.arange(len(x), device=x.device) + 1 + further) % len(x)
        positive = negative = x
        for name in self.network.hidden:
            with torch.set_grad_enabled(name in training):
                z, z_negative = self.pre(name, positive, negative, other)
                if name in training:
                    axis = unit_axis(self.network.blocks[name])
                    good, bad = goodness(z, axis), goodness(z_negative, axis)
                    loss = self_contrastive_loss(good, bad, *self.thresholds[name], self.penalty[name])
                    loss.sum().backward()
                    losses.append(loss.detach().sum())
                    values = {"local_loss": loss, "goodness_positive": good, "goodness_negative": bad}
                    blocks[name] = {key: value.detach().mean() for key, value in values.items()}
            with torch.no_grad():
                positive, negative = self.post(name, z), self.post(name, z_negative)
            outputs[name] = positive
        out = self.read(outputs, self.readout_dropout if readout else 0.0)
        loss = self.task.loss(out, y)
        if readout:
            loss.sum().backward()
        return Learned(out.detach(), sum(losses) + loss.detach().sum() * readout, blocks)

    def pre(self, name: str, positive: Tensor, negative: Tensor, other: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The block's z of positive and negative samples; without `other`, of the positive ones alone."""
        layer = self.network.blocks[name]

        def f(x):
            x = ops.at_least_fp32(layer.incoming(x))
            return ops.at_least_fp32(layer.linear(standard(x, tuple(range(1, x.dim())))))

        a = f(positive)
        if self.pairs[name]:
            return a + a, None if other is None else a + a[other]
        return a, None if other is None else f(negative)

    def post(self, name: str, z: Tensor) -> Tensor:
        layer = self.network.blocks[name]
        return layer.pool(layer.activate(triangle(z, unit_axis(layer)) if self.triangle[name] else z))

    def read(self, outputs: dict[str, Tensor], dropout: float = 0.0) -> Tensor:
        """The sum of linear read-outs, that is one of all the outputs laid end to end."""
        last, out = list(outputs)[-1], 0.0
        for name, h in outputs.items():
            if name == last or name in self.heads:
                head = self.network.head if name == last else self.heads[name]
                out = out + head(F.dropout(standard(h, tuple(range(1, h.dim()))), dropout))
        return out

    def predict(self, x):
        outputs = {}
        for name in self.network.hidden:
            x = outputs[name] = self.post(name, self.pre(name, x, x, None)[0])
        return self.read(outputs)


def standard(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """x less its mean over the dimensions, over its standard deviation there; nothing of the batch enters."""
    centred = x - x.mean(dims, keepdim=True)
    return centred / (centred.square().mean(dims, keepdim=True).sqrt() + 1e-6)


def goodness(z: Tensor, axis: int) -> Tensor:
    """(N, positions): the mean over the units at `axis` of relu(z)^2; one position for vectors."""
    return F.relu(z).square().mean(axis).reshape(len(z), -1)


def self_contrastive_loss(positive: Tensor, negative: Tensor, threshold: float, negative_threshold: float,
                          penalty: float) -> Tensor:
    """(N,): softplus(threshold - g+) + softplus(g- - negative_threshold), averaged over positions, plus penalty |g+|."""
    apart = F.softplus(threshold - positive) + F.softplus(negative - negative_threshold)
    return apart.mean(1) + penalty * positive.norm(dim=1)
