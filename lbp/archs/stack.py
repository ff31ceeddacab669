from __future__ import annotations

import difflib

from torch import nn

from lbp.archs.init import initialise
from lbp.archs.network import ACTIVATIONS, Network, activation, norm
from lbp.errors import ConfigError, Refused

TOKENS = {
    "dense": "dense:UNITS", "conv": "conv:CHANNELS:KERNEL[:STRIDE[:PADDING]]", "flatten": "flatten",
    "maxpool": "maxpool:SIZE[:STRIDE]", "avgpool": "avgpool:SIZE[:STRIDE]", "norm": "norm:batch|layer|instance",
    "dropout": "dropout:RATE", **{name: name for name in ACTIVATIONS if name != "none"},
}


def stack(task, *, layers: list[str], init: str) -> Network:
    """A network typed as tokens, from input to the last hidden layer; the head is added.

    Tokens: dense:UNITS, conv:CHANNELS:KERNEL[:STRIDE[:PADDING]] (no padding by default), maxpool:SIZE[:STRIDE],
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
    initialise(network, init)
    return network


def _module(token: str, shape: tuple[int, ...]) -> tuple[nn.Module, tuple[int, ...]]:
    """The module of a token for inputs of `shape`, and the shape that leaves it."""
    name, *texts = token.split(":")
    if name not in TOKENS:
        near = difflib.get_close_matches(name, TOKENS, 1)
        raise ConfigError(f"arch.layers: {token}: unknown token; " + (f"did you mean {TOKENS[near[0]]}? " if near else "")
                          + f"allowed: {', '.join(TOKENS.values())}")
    if name in ACTIVATIONS and not texts:
        return activation(name), shape
    if name == "flatten" and not texts:
        size = 1
        for side in shape:
            size *= side
        return nn.Flatten(), (size,)
    if name == "norm" and texts in (["batch"], ["layer"], ["instance"]):
        return norm(texts[0], shape[0], len(shape) - 1), shape
    try:
        if name == "dropout":
            (rate,) = map(float, texts)
            if not 0 <= rate < 1:
                raise ValueError
            return nn.Dropout(rate), shape
        numbers = [int(text) for text in texts]
        if min(numbers[:-1] + numbers[-1:]) < (0 if len(numbers) == 4 else 1):
            raise ValueError
        if name == "dense":
            (units,) = numbers
            if len(shape) != 1:
                raise Refused(f"a dense layer takes vectors, not maps of shape {shape}; put flatten before it")
            return nn.Linear(shape[0], units), (units,)
        if name == "conv":
            channels, kernel, *more = numbers
            stride, padding = (more + [1, 0][len(more):])[:2] if len(more) < 2 else more
        else:
            kernel, *more = numbers
            (stride,), padding = more or [kernel], 0
    except (ValueError, IndexError):
        raise ConfigError(f"arch.layers: {token}: must be written {TOKENS[name]}") from None
    if len(shape) != 3:
        raise Refused(f"{name} takes maps (channels, height, width), not inputs of shape {shape}")
    height, width = ((side + 2 * padding - kernel) // stride + 1 for side in shape[1:])
    if min(height, width) < 1:
        raise Refused(f"a kernel of {kernel} does not fit maps of {shape[1]}x{shape[2]}")
    if name == "conv":
        return nn.Conv2d(shape[0], channels, kernel, stride, padding), (channels, height, width)
    return (nn.MaxPool2d if name == "maxpool" else nn.AvgPool2d)(kernel, stride), (shape[0], height, width)
