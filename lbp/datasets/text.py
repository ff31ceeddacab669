"""Language modelling by characters over any text file."""

import hashlib
import importlib.util
from pathlib import Path

import numpy as np

from lbp.datasets.data import Arrays
from lbp.errors import DataError

DEFAULT = "pydoc_data.topics"       # what `help()` tells of Python's language: 0.7 MB of English that every Python brings along


def text(*, file: str | None, steps: int, test_share: float) -> Arrays:
    """x (N, steps) characters, y (N, steps) the next ones: the text cut into windows that follow each other, without overlap.

    The last `test_share` of the windows are for testing, and validation is the end of the others. The alphabet is that of
    the whole text. Characters that fill no window at the end are left out."""
    path = Path(file).expanduser() if file else _default()
    try:
        content = path.read_bytes()
        characters = np.array([ord(c) for c in content.decode("utf-8").replace("\r\n", "\n")])
    except (OSError, ValueError) as error:
        raise DataError(f"dataset=text: {path} cannot be read as UTF-8 text ({error}); give another by dataset.file") from None
    n = (len(characters) - 1) // steps
    held = max(1, round(test_share * n))
    if n - held < 2:
        raise DataError(f"dataset=text: {path} has {len(characters):,} characters, too few for windows of dataset.steps={steps}; "
                        "give a longer dataset.file or fewer steps")
    alphabet, coded = np.unique(characters, return_inverse=True)
    x, y = coded[: n * steps].reshape(n, steps), coded[1 : n * steps + 1].reshape(n, steps)
    return Arrays(x[:-held], y[:-held], x[-held:], y[-held:], "sequence", [chr(c) for c in alphabet], symbols=len(alphabet),
                  contiguous=True, read={str(path): hashlib.sha256(content).hexdigest()})


def _default() -> Path:
    found = importlib.util.find_spec(DEFAULT)
    if found is None or not found.origin:
        raise DataError(f"dataset=text: this Python comes without {DEFAULT}; give a text by dataset.file")
    return Path(found.origin)
