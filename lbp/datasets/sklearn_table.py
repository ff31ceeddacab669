"""The small real sets that scikit-learn ships: no network, no account."""

import numpy as np

from lbp.datasets.data import Arrays
from lbp.datasets.sources import line, optional
from lbp.errors import DataError


def sklearn_table(*, table: str) -> Arrays:
    """Vectors with classes (iris, wine, breast_cancer) or a real target (diabetes); digits: images (1797, 1,
    8, 8), 0 .. 16.

    Features are raw (diabetes too, whose packaged scaling knows the test samples). No test split of its
    own."""
    datasets = optional("sklearn.datasets", table)
    try:
        bunch = getattr(datasets, f"load_{table}")(**({"scaled": False} if table == "diabetes" else {}))
    except (OSError, EOFError, ValueError) as cause:
        raise DataError(f"dataset={table}: scikit-learn cannot read its own files ({line(cause)}): "
                        "pip install --force-reinstall scikit-learn") from cause
    if table == "digits":
        return Arrays(bunch.images.astype(np.uint8)[:, None], bunch.target, kind="image",
                      classes=[str(c) for c in bunch.target_names], white=16.0, name=table)
    classes = None if table == "diabetes" else [str(c) for c in bunch.target_names]
    return Arrays(bunch.data, bunch.target, classes=classes, name=table)
