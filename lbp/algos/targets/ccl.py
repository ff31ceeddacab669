from __future__ import annotations

import copy
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lbp.algos import ops
from lbp.algos.rule import Facts, Learned, LearningRule
from lbp.archs.network import Layer, Network
from lbp.errors import Refused


class CCL(LearningRule):
    """Counter-current learning: a second network, from the classes down, meets the first one layer by layer.

    The feedback network mirrors the forward one, with weights of its own, and begins at the one-hot classes: S_l (classes,
    units) is its answer where the forward network has A_l (samples, units). A hidden block and the feedback layer opposite
    are trained on the same loss, the mean over classes of (A_l S_l^T - [sample is of the class])^2 times 256 scale / units; no
    gradient crosses a layer of either network. The head learns by its own loss, and the forward network alone predicts (Kao &
    Hariharan 2024). `match_input` also trains a last feedback layer on the inputs themselves; it teaches no block, and shares
    the feedback network's clipping, as in the authors' code.
    """

    facts = Facts(
        family="targets", paper="Kao & Hariharan, NeurIPS 2024, arXiv 2409.19841",
        weight_transport=False, backward_locked=False, update_locked=False)

    def __init__(self, network, task, *, scale: float, match_input: bool):
        super().__init__(network, task)
        ops.classification(task, "ccl")
        if len(list(network.shapes.values())[-1]) != 1:
            raise Refused("algo=ccl sends down one signal for each class, and block head answers each token apart; " + ops.elsewhere(network))
        self.scale = scale
        ops.plain_layers(network, "ccl", of=(nn.Linear, nn.Conv2d))
        # From the head down. Named by their place: a signal begins at the classes, whatever the blocks above do with a batch.
        self.downwards = nn.ModuleList(mirrored(network)[: None if match_input else -1])
        self.downwards.to(network.head.weight.device, network.head.weight.dtype)

    def groups(self):
        return {"forward": list(self.network.parameters()), "feedback": list(self.downwards.parameters())}

    def learn(self, x, y, apply):
        signals = self._signals()
        if len(signals) > len(self.network.hidden):
            self._match(x, signals.pop(), y)[0].sum().backward()
        blocks, h = {}, x
        for name, block in self.network.hidden.items():
            h = block(h)
            losses, agreement = self._match(h, signals.pop(), y)
            losses.sum().backward()
            h = h.detach()
            blocks[name] = {"local_loss": losses.detach().mean(), "local_accuracy": (agreement.argmax(1) == y).to(losses.dtype).mean()}
        out = self.network.head(h)
        loss = self.task.loss(out, y)
        loss.sum().backward()
        return Learned(out.detach(), loss.detach(), blocks)

    def _signals(self) -> list[Tensor]:
        """S of every hidden block, and of the inputs where these are matched; the lowest last, each with a graph of its own layer."""
        signal, signals = torch.eye(self.task.classes, dtype=self.task.dtype, device=self.network.head.weight.device), []
        for layer in self.downwards:
            signals.append(layer(signal.detach()))
            signal = signals[-1]
        return signals

    def _match(self, h: Tensor, signal: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        with ops.full_precision(h):
            agreement = ops.at_least_fp32(h.flatten(1)) @ ops.at_least_fp32(signal).T
            return matching_loss(agreement, self.task.onehot(y, agreement.dtype), signal.shape[1], self.scale), agreement.detach()

    def feedback(self):
        pairs = zip(reversed(self.network.blocks.items()), self.downwards)
        return {name: (getattr(block, "linear", block).weight, layer.weights.weight.T) for (name, block), layer in pairs
                if isinstance(layer.weights, nn.Linear)}


def matching_loss(agreement: Tensor, onehot: Tensor, units: int, scale: float) -> Tensor:
    """(N,): 256 scale / units times the mean over classes of (A S^T - onehot)^2, for the agreement A S^T (N, classes)."""
    return (agreement - onehot).square().mean(1) * (256 * scale / units)


class Downward(nn.Module):
    """One layer of the feedback network, on flat signals: repeats values up to the size of the maps below, if any, then a
    weight layer without bias, then the activation of the block below, whose output it stands opposite to."""

    def __init__(self, weights: nn.Module, maps: tuple[int, ...], size: tuple[int, ...], activation: nn.Module):
        super().__init__()
        self.weights, self.maps, self.size, self.activation = weights, maps, size, activation

    def forward(self, signal: Tensor) -> Tensor:
        if self.size:
            signal = F.interpolate(signal.unflatten(1, self.maps), self.size)
        return self.activation(self.weights(signal)).flatten(1)


def mirrored(network: Network) -> list[Downward]:
    """The feedback layers from the head's down to the first block's, which answers in the shape of the inputs."""
    layers, below, activation = [], tuple(network.in_shape), nn.Identity()
    for name, block in network.blocks.items():
        size, maps, units = (), (), math.prod(network.shapes[name])
        if isinstance(block, Layer) and isinstance(block.linear, nn.Conv2d):
            conv, size, maps = block.linear, below[1:], pooled_maps(network, name)
            kernel = tuple(d * (k - 1) // 2 * 2 + 1 for k, d in zip(conv.kernel_size, conv.dilation))   # odd, which keeps the size
            weights = nn.Conv2d(conv.out_channels, conv.in_channels, kernel, padding=tuple(k // 2 for k in kernel),
                                groups=conv.groups, bias=False)
        else:
            weights = nn.Linear(units, math.prod(below), bias=False)
        layers.insert(0, Downward(weights, maps, size, activation))
        below = maps or network.shapes[name]
        activation = copy.deepcopy(block.activation) if isinstance(block, Layer) else nn.Identity()
    return layers


def pooled_maps(network: Network, name: str) -> tuple[int, ...]:
    """The shape of a convolutional block's maps after its pooling and before they are flattened."""
    with network.probe() as h, torch.no_grad():
        for each, block in network.blocks.items():
            if each == name:
                break
            h = block(h)
        h = block.activate(block.pre(h))
        for module in block.pooling if isinstance(block.pooling, nn.Sequential) else [block.pooling]:
            if (after := module(h)).dim() == h.dim():
                h = after
    return tuple(h.shape[1:])
