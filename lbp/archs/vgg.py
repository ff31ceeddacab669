from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from lbp.archs.init import initialise
from lbp.archs.network import Layer, Network, activation as make_activation, norm as make_norm
from lbp.errors import Refused


class ChannelDropout(nn.Dropout):
    """Drops whole maps: within one, neighbours say the same."""

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout2d(x, self.p, self.training)


def vgg(task, *, stages: list[list[int]], width: float, dense: list[int], activation: str, norm: str, dropout: float,
        init: str, init_scale: float) -> Network:
    """The VGG-like networks of the local losses (Nokland & Eidnes 2019): stages of 3x3 convolutions, each stage ending
    in a 2x2 max pool that drops an odd last row, then dense layers, the head.

    `width` multiplies the convolutions' channels, not the dense units. Images over 64 pixels begin with a 7x7
    convolution of stride 2. Raises Refused for inputs that are no images, or too small to be halved that often.
    """
    if len(task.in_shape) != 3:
        raise Refused(f"arch=vgg takes images (channels, height, width), not inputs of shape {task.in_shape}; use arch=mlp")
    if not stages or not all(stages):
        raise Refused(f"arch.stages={stages}: each stage needs a convolution, and there must be one; use arch=mlp for none")
    channels, *sides = task.in_shape
    large = max(sides) > 64
    sides = [(side + 1) // 2 if large else side for side in sides]
    if min(sides) >> len(stages) < 1:
        raise Refused(f"arch=vgg: {task.in_shape[1]}x{task.in_shape[2]} images cannot be halved {len(stages) + large} times; "
                      "give fewer arch.stages or a larger dataset.resize")
    blocks: dict[str, nn.Module] = {}
    for s, stage in enumerate(stages, 1):
        for i, unscaled in enumerate(stage, 1):
            out = max(1, int(unscaled * width))
            kernel, stride = (7, 2) if large and not blocks else (3, 1)
            pool = [nn.MaxPool2d(2)] * (i == len(stage)) + [nn.Flatten()] * (i == len(stage) and s == len(stages))
            layer = Layer(nn.Conv2d(channels, out, kernel, stride, kernel // 2), make_norm(norm, out, 2),
                          make_activation(activation), pool=nn.Sequential(*pool) if pool else None)
            if dropout:
                layer.dropout = ChannelDropout(dropout)
            blocks[f"conv{len(blocks) + 1}"] = layer
            channels = out
    features = channels * (sides[0] >> len(stages)) * (sides[1] >> len(stages))
    for i, out in enumerate(dense, 1):
        blocks[f"fc{i}"] = Layer(nn.Linear(features, out), make_norm("none" if norm == "instance" else norm, out, 0),
                                 make_activation(activation), dropout)
        features = out
    network = Network({**blocks, "head": nn.Linear(features, task.outputs)}, task.in_shape)
    initialise(network, init, init_scale)
    return network
