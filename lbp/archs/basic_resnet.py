from __future__ import annotations

from torch import nn

from lbp.archs.init import initialise
from lbp.archs.network import Layer, Network, activation as make_activation, norm as make_norm
from lbp.archs.resnet import ResidualUnit
from lbp.errors import Refused


def basic_resnet(task, *, units: list[int], width: float, stem: str, activation: str, norm: str, init: str, init_scale: float) -> Network:
    """The residual network of basic units (He et al. 2016, table 1: 18 and 34 layers): a stem, four stages with 64, 128,
    256 and 512 channels times `width`, projections where the shape changes, global average pooling, the head.

    The paper's stem, which quarters the sides, is for large images; small ones get a 3x3 convolution that keeps them.
    Raises Refused for inputs that are no images of at least 8x8.
    """
    if len(task.in_shape) != 3 or min(task.in_shape[1:]) < 8:
        raise Refused(f"arch=basic_resnet takes images of at least 8x8, not inputs of shape {task.in_shape}; "
                      "set dataset.resize=32 for smaller images, or use arch=mlp")
    channels = [max(1, int(64 * 2**stage * width)) for stage in range(4)]
    large = stem == "large" or stem == "auto" and max(task.in_shape[1:]) > 64
    if norm == "instance" and max(task.in_shape[1:]) <= (32 if large else 8):
        raise Refused(f"arch.norm=instance: {task.in_shape[1]}x{task.in_shape[2]} images leave the last stage one position, "
                      "nothing to normalise over; use none, batch or layer, or a larger dataset.resize")
    kernel, stride, pool = (7, 2, nn.MaxPool2d(3, 2, 1)) if large else (3, 1, None)
    blocks: dict[str, nn.Module] = {
        "stem": Layer(nn.Conv2d(task.in_shape[0], channels[0], kernel, stride, kernel // 2, bias=False),
                      make_norm(norm, channels[0], 2), make_activation(activation), pool=pool)}
    inputs = channels[0]
    for stage, (count, outputs) in enumerate(zip(units, channels), 1):
        for unit in range(1, count + 1):
            last = stage == 4 and unit == count
            blocks[f"unit{stage}_{unit}"] = ResidualUnit(
                inputs, outputs, 2 if stage > 1 and unit == 1 else 1, norm, activation,
                nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()) if last else None, project=True)
            inputs = outputs
    network = Network({**blocks, "head": nn.Linear(inputs, task.outputs)}, task.in_shape)
    initialise(network, init, init_scale)
    return network
