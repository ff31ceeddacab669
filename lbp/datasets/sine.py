"""The sine over one period: bioflax's `sinreg`, with its law and sizes."""

import numpy as np

from lbp.datasets.data import Arrays


def sine(*, n: int, n_test: int, seed: int) -> Arrays:
    """x (N, 1) uniform in [-pi, pi), y (N, 1) = sin x."""
    x = np.random.RandomState(seed).uniform(-np.pi, np.pi, (n + n_test, 1))
    return Arrays(x[:n], np.sin(x[:n]), x[n:], np.sin(x[n:]))
