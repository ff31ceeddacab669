"""MNIST-1D: ten hand-drawn curves, moved, bent and hidden in noise (Greydanus & Kobak, arXiv 2011.14439).

Made here from the published recipe, not downloaded: the package's own download is a pickle. The draws come in
the package's order, so with its seed of 42 the samples are those of its `make_dataset`."""

import numpy as np

from lbp.datasets.data import Arrays
from lbp.datasets.sources import optional

CURVES = (      # the digits 0 .. 9, drawn as heights at twelve places
    (5, 6, 6.5, 6.75, 7, 7, 7, 7, 6.75, 6.5, 6, 5), (5, 3, 3, 3.4, 3.8, 4.2, 4.6, 5, 5.4, 5.8, 5, 5),
    (5, 6, 6.5, 6.5, 6, 5.25, 4.75, 4, 3.5, 3.5, 4, 5), (5, 6, 6.5, 6.5, 6, 5, 5, 6, 6.5, 6.5, 6, 5),
    (5, 4.4, 3.8, 3.2, 2.6, 2.6, 5, 5, 5, 5, 5, 5), (5, 3, 3, 3, 3, 5, 6, 6.5, 6.5, 6, 4.5, 5),
    (5, 4, 3.5, 3.25, 3, 3, 3, 3, 3.25, 3.5, 4, 5), (5, 7, 7, 6.6, 6.2, 5.8, 5.4, 5, 4.6, 4.2, 5, 5),
    (5, 4, 3.5, 3.5, 4, 5, 5, 4, 3.5, 3.5, 4, 5), (5, 4, 3.5, 3.5, 4, 5, 5, 5, 5, 4.7, 4.3, 5))
PADDING, LENGTH, FINAL = (36, 60), 72, 40       # zeros appended; then stretched to LENGTH, at last to FINAL
SCALE, SHIFT, SHEAR = 0.4, 48, 0.75             # factor 1 +- 0.2; rolled by 0 .. 47; slope +- 0.375
SMOOTH, IID, WIDTH = 0.25, 0.02, 2              # noise beside the curve, blurred by WIDTH places; everywhere
TRAIN_SHARE = 0.8


def mnist1d(*, n: int, seed: int) -> Arrays:
    """x (n, 40) of mean 0 and variance 1 over everything, 10 classes; the last fifth is for testing."""
    blur = optional("scipy.ndimage", "mnist1d").gaussian_filter1d
    curves = np.array(CURVES)
    curves = (curves - curves.mean(1, keepdims=True)) / curves.std(1, keepdims=True)
    curves = (curves - curves[:, :1]) / 6 + 1e-8        # starts at 0, and yet differs from the padding
    rng = np.random.RandomState(seed)       # numpy's legacy generator: its numbers never change

    x = np.empty((n // 10 * 10, FINAL))
    y = np.repeat(np.arange(10), n // 10)
    for i, label in enumerate(y):
        zeros = PADDING[0] + int(rng.rand() * (PADDING[1] - PADDING[0] + 1))
        wave = _stretched(np.pad(curves[label], (0, zeros)), LENGTH) * (1 + SCALE * (rng.rand() - 0.5))
        wave = np.roll(wave, rng.randint(SHIFT))
        wave = np.where(wave != 0, wave, blur(SMOOTH * rng.randn(LENGTH), WIDTH)) + IID * rng.randn(LENGTH)
        slope = SHEAR * (rng.rand() - 0.5)
        x[i] = _stretched(wave - slope * np.linspace(-0.5, 0.5, LENGTH), FINAL)
    order = rng.permutation(len(y))
    x, y = (x[order] - x.mean()) / x.std(), y[order]
    cut = int(TRAIN_SHARE * len(y))
    return Arrays(x[:cut], y[:cut], x[cut:], y[cut:], classes=[str(i) for i in range(10)])


def _stretched(wave: np.ndarray, length: int) -> np.ndarray:
    return np.interp(np.linspace(0, 1, length), np.linspace(0, 1, len(wave)), wave)
