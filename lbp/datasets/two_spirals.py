"""Two spirals, one the other's mirror image through the origin (Lang & Witbrock 1988), as ZORB draws them."""

import numpy as np

from lbp.datasets.data import Arrays

TEST_SHARE = 0.3


def two_spirals(*, n: int, noise: float, seed: int) -> Arrays:
    """Points (2n, 2) of 2 classes: (-r cos r, r sin r) with r = 780 degrees x sqrt(U), and their negatives.

    30% of each class are for testing, the same of both: a point and its mirror image are never on different
    sides."""
    rng = np.random.RandomState(seed)       # numpy's legacy generator: its numbers never change
    r = np.sqrt(rng.rand(n)) * np.deg2rad(780)
    arm = np.stack([-r * np.cos(r), r * np.sin(r)], 1)
    points = np.stack([arm, -arm]) + noise * rng.randn(2, n, 2)
    held = min(max(1, round(TEST_SHARE * n)), n - 1)
    x, x_test = points[:, held:], points[:, :held]
    return Arrays(x.reshape(-1, 2), np.repeat([0, 1], n - held),
                  x_test.reshape(-1, 2), np.repeat([0, 1], held), classes=["0", "1"])
