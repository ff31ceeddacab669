from __future__ import annotations

from torch import nn

from lbp.archs.init import initialise
from lbp.archs.network import Layer, Network, activation as make_activation, norm as make_norm
from lbp.errors import Refused


def lenet(task, *, widths: list[int], dense: int, activation: str, dense_activation: str, pool: str, norm: str,
          init: str, init_scale: float) -> Network:
    """LeNet-5 (LeCun et al. 1998) for images of 28 pixels or more: three 5x5 convolutions, pools after the first two,
    a dense layer, the head. 28x28 images are padded by 2, so that the third convolution sees 5x5 as in the paper.

    Raises Refused for other inputs.
    """
    if len(task.in_shape) != 3 or min(task.in_shape[1:]) < 28:
        raise Refused(f"arch=lenet takes images of at least 28x28, not inputs of shape {task.in_shape}; "
                      "set dataset.resize=32 for smaller images, or use arch=cnn or arch=mlp")
    if len(widths) != 3:
        raise Refused(f"arch.widths={widths}: arch=lenet has three convolutions; give three channel counts, or use arch=cnn")
    channels, height, width = task.in_shape
    pad = 2 if min(height, width) < 32 else 0
    pooling = nn.MaxPool2d if pool == "max" else nn.AvgPool2d

    def conv(inputs: int, outputs: int, after: nn.Module, padding: int = 0) -> Layer:
        return Layer(nn.Conv2d(inputs, outputs, 5, padding=padding), make_norm(norm, outputs, 2),
                     make_activation(activation), pool=after)

    def side(size: int) -> int:  # of the third convolution's map
        return ((size + 2 * pad - 4) // 2 - 4) // 2 - 4

    if norm == "instance" and side(height) * side(width) == 1:
        raise Refused(f"arch.norm=instance: arch=lenet's third convolution leaves one position of {height}x{width} images, "
                      "nothing to normalise over; use none, batch or layer")
    features = widths[2] * side(height) * side(width)
    network = Network({
        "conv1": conv(channels, widths[0], pooling(2), pad),
        "conv2": conv(widths[0], widths[1], pooling(2)),
        "conv3": conv(widths[1], widths[2], nn.Flatten()),
        "fc1": Layer(nn.Linear(features, dense), make_norm("none" if norm == "instance" else norm, dense, 0),
                     make_activation(dense_activation)),
        "head": nn.Linear(dense, task.outputs),
    }, task.in_shape)
    initialise(network, init, init_scale)
    return network
