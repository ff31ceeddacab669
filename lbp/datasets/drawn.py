"""What the generated sets of sequences share."""

import numpy as np

from lbp.datasets.task import MASKED
from lbp.errors import ConfigError


def lengths(rng: np.random.RandomState, n: int, low: int, high: int, dataset: str) -> np.ndarray:
    """n lengths, low .. high equally often by chance. Raises ConfigError where low is above high."""
    if low > high:
        raise ConfigError(f"dataset.min_length={low} is above dataset.max_length={high} (dataset={dataset}): lower it")
    return rng.randint(low, high + 1, n)


def unasked(n: int, steps: int) -> np.ndarray:
    """Labels (n, steps) none of which counts yet."""
    return np.full((n, steps), MASKED, dtype=np.int64)


def names(*groups) -> list[str]:
    """The names of symbols, of counts and words: names(3, "end") is 0, 1, 2, end."""
    return [str(name) for group in groups for name in (range(group) if isinstance(group, int) else [group])]
