"""MNIST: 60,000 + 10,000 handwritten digits, 28 x 28 grey (LeCun, Bottou, Bengio & Haffner 1998)."""

from lbp.datasets.data import Arrays
from lbp.datasets.idx import idx_images


def mnist(*, root: str) -> Arrays:
    """Images (N, 1, 28, 28) uint8, 10 classes, from `root`/MNIST/raw or fetched into it."""
    return idx_images("mnist", root, "MNIST", [str(i) for i in range(10)], instead="mnist5k")
