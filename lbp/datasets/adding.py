"""Adding digits, as pytorch-dni has it: a number is asked at the end of a sequence, so a regression."""

import numpy as np

from lbp.datasets.data import Arrays
from lbp.datasets.drawn import curriculum, lengths


def digits_then_end(n: int, digits: int, low: int, high: int, seed: int, dataset: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(x (n, high + 1): blanks, L digits, an end flag, so that the end is the last token; the digits (n, high), -1 where
    there is none; L (n,), uniform)."""
    rng = np.random.RandomState(seed)       # numpy's legacy generator: its numbers never change
    sizes, drawn = lengths(rng, n, low, high, dataset), rng.randint(0, digits, (n, high))
    there = np.arange(high) >= high - sizes[:, None]
    x = np.concatenate([np.where(there, drawn, digits + 1), np.full((n, 1), digits)], 1)
    return x, np.where(there, drawn, -1), sizes


def adding(*, n: int, n_test: int, digits: int, min_length: int, max_length: int, start_length: int | None, grow_every: int,
           seed: int) -> Arrays:
    """x (N, max_length + 1) of `digits` + 2 symbols: blanks first, then L digits 0 .. digits - 1 and the end flag; y (N, 1)
    their sum. L is uniform."""
    x, drawn, sizes = digits_then_end(n + n_test, digits, min_length, max_length, seed, "adding")
    y = drawn.clip(0).sum(1, keepdims=True).astype(np.float64)
    growth = curriculum(sizes[:n], start_length, grow_every, min_length, max_length, "adding")
    return Arrays(x[:n], y[:n], x[n:], y[n:], "sequence", symbols=digits + 2, **growth)
