from __future__ import annotations

import difflib
import math
import re

from torch import nn

from lbp.archs.init import initialise
from lbp.archs.network import ACTIVATIONS, Network, activation, norm
from lbp.errors import ConfigError, Refused

TOKENS = {
    "dense": "dense:UNITS", "conv": "conv:CHANNELS:KERNEL[:STRIDE[:PADDING[:GROUPS]]]", "flatten": "flatten",
    "maxpool": "maxpool:SIZE[:STRIDE]", "avgpool": "avgpool:SIZE[:STRIDE]", "norm": "norm:batch|layer|instance",
    "dropout": "dropout:RATE", **{name: name for name in ACTIVATIONS if name != "none"},
}
COUNT = "[1-9][0-9]*"
PATTERNS = {  # what follows the name; nothing where there is no entry
    "dense": COUNT, "conv": f"{COUNT}:{COUNT}(:{COUNT}(:[0-9]+(:{COUNT})?)?)?", "maxpool": f"{COUNT}(:{COUNT})?",
    "avgpool": f"{COUNT}(:{COUNT})?", "norm": "batch|layer|instance", "dropout": r"0?\.[0-9]+|0",
}


def stack(task, *, layers: list[str], init: str, init_scale: float) -> Network:
    """A network typed as tokens, from input to the last hidden layer; the head is added.

    Tokens: dense:UNITS, conv:CHANNELS:KERNEL[:STRIDE[:PADDING[:GROUPS]]] (no padding by default), maxpool:SIZE[:STRIDE],
    avgpool:SIZE[:STRIDE], flatten, norm:batch|layer|instance, dropout:RATE, and the activations.
    A dense layer on images flattens them only where the tokens say so. Raises ConfigError for a token that
    is none, Refused for tokens that do not fit the shape that reaches them.
    """
    shape, modules = tuple(task.in_shape), []
    for place, token in enumerate(map(str, layers), 1):
        try:
            module, shape = _module(token, shape)
        except Refused as refused:
            raise Refused(f"arch.layers, token {place} ({token}): {refused}") from None
        modules.append(module)
    if len(shape) != 1:
        raise Refused(f"arch.layers: the last token leaves maps of shape {shape}; add flatten at the end")
    network = Network.of(nn.Sequential(*modules, nn.Linear(shape[0], task.outputs)), task.in_shape)
    initialise(network, init, init_scale)
    return network


def _module(token: str, shape: tuple[int, ...]) -> tuple[nn.Module, tuple[int, ...]]:
    """The module of a token for inputs of `shape`, and the shape that leaves it."""
    name, *arguments = token.split(":")
    if name not in TOKENS:
        near = difflib.get_close_matches(name, TOKENS, 1)
        raise ConfigError(f"arch.layers: {token}: unknown token; " + (f"did you mean {TOKENS[near[0]]}? " if near else "")
                          + f"allowed: {', '.join(TOKENS.values())}")
    if not re.fullmatch(PATTERNS.get(name, ""), ":".join(arguments)):
        raise ConfigError(f"arch.layers: {token}: must be written {TOKENS[name]}")
    if name in ACTIVATIONS:
        return activation(name), shape
    if name == "flatten":
        return nn.Flatten(), (math.prod(shape),)
    if name == "norm":
        return norm(arguments[0], shape[0], len(shape) - 1), shape
    if name == "dropout":
        return nn.Dropout(float(arguments[0])), shape
    size, *more = map(int, arguments)
    if name == "dense":
        if len(shape) != 1:
            raise Refused(f"a dense layer takes vectors, not maps of shape {shape}; put flatten before it")
        return nn.Linear(shape[0], size), (size,)
    if len(shape) != 3:
        raise Refused(f"{name} takes maps (channels, height, width), not inputs of shape {shape}")
    if name == "conv":
        kernel, stride, padding, groups = (*more, *(1, 0, 1)[len(more) - 1:])
        if shape[0] % groups or size % groups:
            raise Refused(f"{groups} groups do not divide {shape[0]} channels into {size}")
        module, channels = nn.Conv2d(shape[0], size, kernel, stride, padding, groups=groups), size
    else:
        kernel, stride, padding, channels = size, more[0] if more else size, 0, shape[0]
        module = (nn.MaxPool2d if name == "maxpool" else nn.AvgPool2d)(kernel, stride)
    height, width = ((side + 2 * padding - kernel) // stride + 1 for side in shape[1:])
    if min(height, width) < 1:
        raise Refused(f"a kernel of {kernel} does not fit maps of {shape[1]}x{shape[2]}")
    return module, (channels, height, width)
