"""What several datasets need to get at their files."""

import contextlib
import importlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np

from lbp.errors import DataError


def optional(module: str, dataset: str) -> ModuleType:
    """Imports what only some datasets need. Raises DataError, naming the package, where it is missing or
    broken."""
    try:
        return importlib.import_module(module)
    except Exception as cause:      # a mismatched binary raises RuntimeError, OSError, AttributeError ...
        package = {"sklearn": "scikit-learn", "PIL": "pillow"}.get(top := module.partition(".")[0], top)
        fits = ", in the version that belongs to this torch" if package == "torchvision" else ""
        raise DataError(f"dataset={dataset} needs the package {package}, which cannot be imported "
                        f"({line(cause)}): pip install --upgrade {package}{fits}") from cause


def line(cause: BaseException) -> str:
    """An exception as one line for a message."""
    return f"{type(cause).__name__}: {' '.join(str(cause).split())}"[:300].rstrip(".: ")


@contextlib.contextmanager
def reading(file: Path) -> Iterator[None]:
    """Raises DataError, naming the file and the remedy, for whatever is wrong with one that was published."""
    try:
        yield
    except (DataError, MemoryError):
        raise
    except Exception as cause:      # decoders raise errors of many kinds
        raise DataError(f"{file} cannot be read: {line(cause)}. Replace it by a good copy, or delete it and "
                        "it is fetched again") from cause


def read_npz(file: Path) -> dict[str, np.ndarray]:
    """The arrays of an .npz file, checked against their checksums. Raises whatever is wrong with it; never
    unpickles."""
    with open(file, "rb") as f:     # opened here, since np.load leaves a damaged file open
        stored = np.load(f, allow_pickle=False)
        if not isinstance(stored, np.lib.npyio.NpzFile):
            raise ValueError("it is no .npz archive")
        with stored:
            return {key: stored[key] for key in stored.files}
