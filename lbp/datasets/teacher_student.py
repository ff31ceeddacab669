"""What a random network answers: bioflax's `teacher`, with its law and sizes."""

import numpy as np

from lbp.datasets.data import Arrays

HIDDEN = 64, 32
ACTIVATIONS = {"sigmoid": lambda a: 1 / (1 + np.exp(-a)), "tanh": np.tanh,
               "relu": lambda a: np.maximum(a, 0)}


def teacher_student(*, n: int, n_test: int, inputs: int, outputs: int, activation: str, seed: int) -> Arrays:
    """x (N, inputs) uniform in [-1, 1), y (N, outputs) of a network inputs-64-32-outputs, never trained.

    Its weights are LeCun normal (variance 1 / fan-in, cut at two sigma before scaling), its biases 0, its
    output linear: flax's defaults."""
    rng = np.random.RandomState(seed)
    x = h = rng.uniform(-1, 1, (n + n_test, inputs))
    for i, width in enumerate((*HIDDEN, outputs)):
        size = h.shape[1] * width
        draws = rng.randn(2 * size + 100)       # 95% of them pass
        weight = draws[np.abs(draws) < 2][:size].reshape(h.shape[1], width)
        h = h @ weight / np.sqrt(0.7737413 * h.shape[1])       # the variance of a normal cut at two sigma
        h = ACTIVATIONS[activation](h) if i < len(HIDDEN) else h
    return Arrays(x[:n], h[:n], x[n:], h[n:])
