"""Signals of signal propagation: what turns labels (or errors), vectors (R, classes), into what the blocks can take."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lbp.errors import Refused

# The segments of a digit, clockwise from the top, then the middle one: rows and columns of a 7 x 7 field.
SEGMENTS = [(slice(0, 1), slice(0, 7)), (slice(0, 4), slice(6, 7)), (slice(3, 7), slice(6, 7)), (slice(6, 7), slice(0, 7)),
            (slice(3, 7), slice(0, 1)), (slice(0, 4), slice(0, 1)), (slice(3, 4), slice(0, 7))]
LIT = ["012345", "12", "01346", "01236", "1256", "02356", "023456", "012", "0123456", "012356"]


class LabelProjection(nn.Module):
    """Linear without bias, layer norm over all values, ReLU: a vector of `inputs` as values of `shape`."""

    def __init__(self, inputs: int, shape: tuple[int, ...]):
        super().__init__()
        self.shape = tuple(shape)
        self.linear = nn.Linear(inputs, math.prod(shape), bias=False)
        self.norm = nn.LayerNorm(math.prod(shape))

    def forward(self, context: Tensor) -> Tensor:
        return F.relu(self.norm(self.linear(context))).unflatten(1, self.shape)


class Digits(nn.Module):
    """Each class as an image of its number, (channels, height, width); a vector gives the sum of those images, weighted by it."""

    def __init__(self, classes: int, shape: tuple[int, ...]):
        super().__init__()
        self.register_buffer("images", torch.stack([draw(label, len(str(classes - 1)), shape) for label in range(classes)]))
        if len(self.images.flatten(1).unique(dim=0)) < classes:
            raise Refused(f"algo=sigprop with algo.signal=digits: in images of {shape[1]}x{shape[2]} the numbers of {classes} classes "
                          "cannot be told apart; use algo.signal=label, or a larger dataset.resize")

    def forward(self, context: Tensor) -> Tensor:
        return torch.einsum("rc,cijk->rijk", context, self.images)


def digit(number: int) -> Tensor:
    """(7, 7): 1 on the lit segments, -1 elsewhere."""
    field = torch.full((7, 7), -1.0)
    for segment in LIT[number]:
        field[SEGMENTS[int(segment)]] = 1.0
    return field


def draw(label: int, places: int, shape: tuple[int, ...]) -> Tensor:
    """The digits of `label`, with leading zeros to `places`, in squares from left to right and from the top, as large as they
    all fit; 0 where none is."""
    height, width = shape[1:]
    side = max((m for m in range(1, min(height, width) + 1) if (height // m) * (width // m) >= places), default=0)
    image = torch.zeros(shape)
    for place, number in enumerate(str(label).zfill(places) if side else ""):
        row, column = divmod(place, width // side)
        image[:, row * side : (row + 1) * side, column * side : (column + 1) * side] = F.adaptive_avg_pool2d(digit(int(number))[None], side)
    return image
