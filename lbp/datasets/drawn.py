"""What the generated sets of sequences share."""

from typing import Any

import numpy as np

from lbp.datasets.task import MASKED
from lbp.errors import ConfigError


def lengths(rng: np.random.RandomState, n: int, low: int, high: int, dataset: str) -> np.ndarray:
    """n lengths, low .. high equally often by chance. Raises ConfigError where low is above high."""
    if low > high:
        raise ConfigError(f"dataset.min_length={low} is above dataset.max_length={high} (dataset={dataset}): lower it")
    return rng.randint(low, high + 1, n)


def curriculum(sizes: np.ndarray, start: int | None, every: int, low: int, high: int, dataset: str) -> dict[str, Any]:
    """What Arrays are told of the training samples' lengths where short ones come first. Raises ConfigError where `start` is no
    length from low to high, or `every` is given without it."""
    if start is None:
        if every != 1:
            raise ConfigError(f"dataset.grow_every={every} (dataset={dataset}): without dataset.start_length all lengths come from the start "
                              "and nothing grows; give that too, or leave this out")
        return {}
    if not low <= start <= high:
        raise ConfigError(f"dataset.start_length={start} is {'below dataset.min_length' if start < low else 'above dataset.max_length'}="
                          f"{low if start < low else high} (dataset={dataset}): {'raise' if start < low else 'lower'} it")
    return {"lengths": sizes, "growth": (start, every)}


def unasked(n: int, steps: int) -> np.ndarray:
    """Labels (n, steps) none of which counts yet."""
    return np.full((n, steps), MASKED, dtype=np.int64)


def names(*groups) -> list[str]:
    """The names of symbols, of counts and words: names(3, "end") is 0, 1, 2, end."""
    return [str(name) for group in groups for name in (range(group) if isinstance(group, int) else [group])]
