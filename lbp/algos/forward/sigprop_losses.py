"""Local losses of signal propagation: how well a layer's output of each sample matches its targets.

Each takes `Streams` and gives one value a sample. A loss of your own is such a function and a subclass of the rule in a plugin:

    class Mine(SigProp):
        facts = Facts(family="forward", paper="...", weight_transport=False, backward_locked=False, update_locked=False)
        losses = {**SigProp.losses, "margin": margin}

with a YAML beside it: `defaults: [sigprop, _self_]`, `name: mine`, `loss: margin   # margin | labels; ...`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from lbp.algos import ops


class Streams(NamedTuple):
    """What a layer sees of N samples and R targets.

    `h` (N, ...), `t` (R, ...): its outputs for the input's and the label's stream; `h0`, `t0`: what went in. At the signal `t0` is
    the label one-hot (or the error). `y` (N,): the labels; `labels` (R,): those of the targets; `own` (N,): which target is
    the sample's own. `logits` (N, R): the similarity of h and t over the temperature.
    """

    h: Tensor
    t: Tensor
    h0: Tensor
    t0: Tensor
    y: Tensor
    labels: Tensor
    own: Tensor
    logits: Tensor


def similarity(h: Tensor, t: Tensor, channels: int) -> Tensor:
    """(N, R): the dot product of channels, averaged over positions. h: (N, ...), t: (R, ...)."""
    h, t = ops.at_least_fp32(h).flatten(1), ops.at_least_fp32(t).flatten(1)
    with ops.full_precision(h):
        return h @ t.T * (channels / h.shape[1])


def soft_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """(N,): - sum over j of target_ij log softmax(logits_i)_j."""
    return -(target * F.log_softmax(logits, 1)).sum(1)


def labels(s: Streams) -> Tensor:
    """All targets of the sample's class share its probability evenly."""
    positive = (s.y[:, None] == s.labels).to(s.logits.dtype)
    return soft_cross_entropy(s.logits, positive / positive.sum(1, keepdim=True))


def direct(s: Streams) -> Tensor:
    """The seed's v1: cross entropy over one target a class."""
    return F.cross_entropy(s.logits, s.own, reduction="none")


def alike(s: Streams) -> Tensor:
    """(N, R): how similar each sample's own target was to all targets, before the layer. Its scale is immaterial."""
    t0 = ops.at_least_fp32(s.t0).flatten(1)
    with ops.full_precision(t0):
        return (t0 @ t0.T)[s.own]


def max_all(s: Streams) -> Tensor:
    """The seed's v9: positives are all targets that were most similar to the sample's own, each with weight 1."""
    before = alike(s)
    return soft_cross_entropy(s.logits, (before == before.amax(1, keepdim=True)).to(s.logits.dtype))


def max_random(s: Streams) -> Tensor:
    """The seed's v14: the first of the targets that were most similar; random only in that batches are shuffled."""
    return F.cross_entropy(s.logits, alike(s).argmax(1), reduction="none")


def top_k(s: Streams, k: int) -> Tensor:
    """The seed's v15: the k targets that were most similar, each with weight 1, whatever their class; all where there are fewer."""
    best = alike(s).topk(min(k, len(s.t0)), 1).indices
    return soft_cross_entropy(s.logits, s.logits.new_zeros(s.logits.shape).scatter_(1, best, 1.0))


LOSSES = {"labels": labels, "direct": direct, "max_all": max_all, "max_random": max_random, "top_k": top_k}
