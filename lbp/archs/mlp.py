from __future__ import annotations

import math

from torch import nn

from lbp.archs.init import initialise
from lbp.archs.network import Layer, Network, activation as make_activation, norm as make_norm


def mlp(task, *, widths: list[int], activation: str, norm: str, dropout: float, transmit: str, init: str, init_scale: float) -> Network:
    """A multilayer perceptron: dense layers of `widths` units, then the head. Images are flattened.

    `transmit`: what a hidden layer's outputs pass on their way to the next hidden one, as a sign, while the layer itself still has them as they are.
    """
    blocks: dict[str, nn.Module] = {}
    features = math.prod(task.in_shape)
    for i, width in enumerate(widths, 1):
        blocks[f"fc{i}"] = Layer(nn.Linear(features, width), make_norm(norm, width, 0), make_activation(activation),
                                 dropout, flatten=i == 1 and len(task.in_shape) > 1,
                                 transmit=make_activation(transmit) if i > 1 and transmit != "none" else None)
        features = width
    network = Network({**blocks, "head": nn.Linear(features, task.outputs)}, task.in_shape)
    initialise(network, init, init_scale)
    return network
