from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from lbp.archs.init import initialise
from lbp.archs.network import Layer, Network, activation as make_activation, norm as make_norm
from lbp.errors import Refused


class ResidualUnit(nn.Module):
    """Two 3x3 convolutions with norms, added to the shortcut, then the activation (He et al. 2016, figure 2).

    A shortcut that changes the shape has no weights (their option A): strided, and padded with zero channels; or, with
    `project`, is a strided 1x1 convolution with a norm (their option B).
    """

    def __init__(self, inputs: int, outputs: int, stride: int, norm: str, activation: str, pool: nn.Module | None = None,
                 project: bool = False):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = make_norm(norm, outputs, 2)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = make_norm(norm, outputs, 2)
        self.activation = make_activation(activation)
        self.pool = pool or nn.Identity()
        self.stride, self.more = stride, outputs - inputs
        self.projection = nn.Sequential(
            nn.Conv2d(inputs, outputs, 1, stride, bias=False), make_norm(norm, outputs, 2)) \
            if project and (stride != 1 or self.more) else None

    def shortcut(self, x: Tensor) -> Tensor:
        """What is added to the branch's output."""
        if self.projection is not None:
            return self.projection(x)
        if self.stride != 1 or self.more:
            return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.more // 2, self.more - self.more // 2))
        return x

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm2(self.conv2(self.activation(self.norm1(self.conv1(x)))))
        return self.pool(self.activation(h + self.shortcut(x)))


def resnet(task, *, depth: int, width: int, activation: str, norm: str, init: str, init_scale: float) -> Network:
    """The residual network for small images (He et al. 2016, section 4.2): a stem, three stages of `(depth-2)/6` units
    with `width`, 2 and 4 times `width` channels, global average pooling, the head. A block is a unit.

    Raises Refused for inputs that are no images of at least 8x8, or a depth that is not 6n+2.
    """
    if len(task.in_shape) != 3 or min(task.in_shape[1:]) < 8:
        raise Refused(f"arch=resnet takes images of at least 8x8, not inputs of shape {task.in_shape}; use arch=mlp")
    units, rest = divmod(depth - 2, 6)
    if rest or not units:
        raise Refused(f"arch.depth={depth}: must be 6n+2 (8, 14, 20, 32, 44, 56, 110)")
    blocks: dict[str, nn.Module] = {
        "stem": Layer(nn.Conv2d(task.in_shape[0], width, 3, 1, 1, bias=False), make_norm(norm, width, 2),
                      make_activation(activation))}
    inputs = width
    for stage in range(3):
        for unit in range(units):
            outputs, last = width * 2**stage, stage == 2 and unit == units - 1
            pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()) if last else None
            blocks[f"unit{stage + 1}_{unit + 1}"] = ResidualUnit(
                inputs, outputs, 2 if stage and not unit else 1, norm, activation, pool)
            inputs = outputs
    network = Network({**blocks, "head": nn.Linear(inputs, task.outputs)}, task.in_shape)
    initialise(network, init, init_scale)
    return network
