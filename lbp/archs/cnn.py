from __future__ import annotations

from torch import nn

from lbp.archs.init import initialise
from lbp.archs.network import Layer, Network, activation as make_activation, norm as make_norm
from lbp.errors import Refused


def cnn(task, *, widths: list[int], kernel: int, dense: list[int], activation: str, norm: str, dropout: float,
        init: str, init_scale: float) -> Network:
    """Convolutions of `widths` channels, each followed by a 2x2 max pool, then dense layers of `dense` units.

    Convolutions with odd kernels keep the size of the map (zero padding). Raises Refused for inputs that are no images, or
    too small to be halved that often.
    """
    if len(task.in_shape) != 3:
        raise Refused(f"arch=cnn takes images (channels, height, width), not inputs of shape {task.in_shape}; use arch=mlp")
    channels, height, width = task.in_shape
    if not widths:
        raise Refused("arch.widths=[]: arch=cnn needs a convolution; use arch=mlp")
    blocks: dict[str, nn.Module] = {}
    for i, out in enumerate(widths, 1):
        pool = [nn.MaxPool2d(2)] + [nn.Flatten()] * (i == len(widths))
        blocks[f"conv{i}"] = Layer(nn.Conv2d(channels, out, kernel, padding=kernel // 2), make_norm(norm, out, 2),
                                   make_activation(activation), dropout, nn.Sequential(*pool))
        grown = 1 - kernel % 2  # an even kernel with this padding adds one position
        channels, height, width = out, (height + grown) // 2, (width + grown) // 2
        if min(height, width) < 1:
            raise Refused(f"arch=cnn: {task.in_shape[1]}x{task.in_shape[2]} images cannot be halved {len(widths)} times; "
                          "give fewer arch.widths or a larger dataset.resize")
    features = channels * height * width
    for i, out in enumerate(dense, 1):
        blocks[f"fc{i}"] = Layer(nn.Linear(features, out), make_norm("none" if norm == "instance" else norm, out, 0),
                                 make_activation(activation), dropout)
        features = out
    network = Network({**blocks, "head": nn.Linear(features, task.outputs)}, task.in_shape)
    initialise(network, init, init_scale)
    return network
