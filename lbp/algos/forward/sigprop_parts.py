"""How a network is cut for signal propagation: parts that both streams pass, each with a loss of its own or none."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lbp.algos import ops
from lbp.archs.network import NORMS, Layer, Network
from lbp.errors import Refused


class Part(NamedTuple):
    """A layer with a loss of its own: `run` gives what the loss sees, `after` what the next one takes (nothing in it learns)."""

    block: str
    suffix: str                 # of the names of its metrics; none for the last of a block
    run: Callable
    after: Callable
    has_weights: bool


def parts(blocks: dict[str, nn.Module], granularity: str, projects_input: bool) -> Iterator[Part]:
    """The parts of the taught blocks, the signal's first: the first block whole, or the input as it is."""
    if not projects_input:
        yield Part(next(iter(blocks)), "_signal", _same, _same, False)
    for i, (name, block) in enumerate(blocks.items()):
        whole = granularity == "block" or projects_input and i == 0
        if not whole and not isinstance(block, Layer):
            raise Refused(f"algo=sigprop with algo.granularity=layer cuts plain layers (weights, norm, activation, pool); block {name} is a "
                          f"{type(block).__name__}: set algo.granularity=block")
        if not isinstance(block, Layer) or whole and isinstance(block.pooling, nn.Identity):
            yield Part(name, "", block, _same, _has_weights(block))
        elif whole:
            yield Part(name, "", lambda x, block=block: block.activate(block.pre(x)), block.pool, _has_weights(block))
        else:
            def after(a, block=block):
                return block.pool(block.activate(a))

            normed = _has_weights(block.norm)
            if normed:
                yield Part(name, "_linear", lambda x, block=block: block.linear(block.incoming(x)), _same, True)
            yield Part(name, "", block.norm if normed else block.pre, after, True)


def _same(h: Tensor) -> Tensor:
    return h


def _has_weights(module: nn.Module) -> bool:
    return any(True for _ in module.parameters())


def shapes_of(network: Network, found: list[Part]) -> list[tuple[int, ...]]:
    """Of what each part's loss sees, for one sample."""
    shapes = []
    with network.probe() as h, torch.no_grad():
        for part in found:
            shapes.append(tuple((h := part.run(h)).shape[1:]))
            h = part.after(h)
    return shapes


def channels_of(network: Network, part: Part, shape: tuple[int, ...]) -> int:
    """Values at one position."""
    if part.run is _same:
        return shape[1] if len(shape) == 2 else shape[0]
    return ops.Projection(network.hidden[part.block], shape, (), "channels").columns


@contextmanager
def statistics_kept(module: nn.Module) -> Iterator[None]:
    """Within it norms in training normalise by the batch as ever, but take none of it into their running statistics."""
    tracking = [m for m in module.modules() if isinstance(m, NORMS) and m.training and getattr(m, "track_running_stats", False)]
    for m in tracking:
        m.track_running_stats = False
    try:
        yield
    finally:
        for m in tracking:
            m.track_running_stats = True
