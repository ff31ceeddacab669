"""XOR on the plane: do the signs of two whole numbers differ? As ZORB has it: 1,000 + 1,000 points."""

import numpy as np

from lbp.datasets.data import Arrays

REACH = 100


def xor(*, n: int, seed: int) -> Arrays:
    """Points (n, 2) drawn from {-100 .. 100} squared, scaled to [0, 1], and as many for testing.

    Class 1 where one of the two is positive and the other is not."""
    points = np.random.RandomState(seed).randint(-REACH, REACH + 1, (2 * n, 2))
    y = ((points[:, 0] > 0) ^ (points[:, 1] > 0)).astype(np.int64)
    x = (points + REACH) / (2 * REACH)
    return Arrays(x[:n], y[:n], x[n:], y[n:], classes=["same", "different"])
