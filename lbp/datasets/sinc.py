"""sin(x) / x on a grid, tested far outside of where it was learned, as ZORB has it."""

import numpy as np

from lbp.datasets.data import Arrays


def sinc(*, step: float, reach: float, test_reach: float) -> Arrays:
    """x (N, 1) from -reach to reach by `step`, y (N, 1) = sin(x) / x and 1 at 0; the test split goes to
    test_reach, and so holds the training points too."""
    def grid(end: float) -> np.ndarray:
        k = int(end / step * (1 + 1e-12))       # symmetric, and 0 is met exactly
        return np.arange(-k, k + 1)[:, None] * step
    x, x_test = grid(reach), grid(test_reach)
    return Arrays(x, np.sinc(x / np.pi), x_test, np.sinc(x_test / np.pi))
