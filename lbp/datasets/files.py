"""Arrays of your own in one .npz file: x and y, and x_test and y_test if there is a test split."""

import zipfile
import zlib
from pathlib import Path

from lbp.datasets.data import Arrays
from lbp.datasets.sources import line, read_npz
from lbp.errors import ConfigError, DataError


def files(*, file: str | None) -> Arrays:
    """x (N, D) vectors or (N, H, W), (N, C, H, W) images; integer y (N,) are labels 0 .. C-1, real y (N,),
    (N, k) targets."""
    if file is None:
        raise ConfigError("dataset=files needs dataset.file=PATH, an .npz with x and y [x_test, y_test]")
    path = Path(file).expanduser().absolute()
    try:
        stored = read_npz(path)
        if not {"x", "y"} <= stored.keys():
            raise ValueError(f"it holds {', '.join(stored) or 'nothing'}; x and y are needed")
        arrays = {key: stored[key] for key in ("x", "y", "x_test", "y_test") if key in stored}
        return Arrays.of(**arrays)
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile, zlib.error) as cause:
        raise DataError(f"{path} cannot be read: {line(cause)}. "
                        "Write it by np.savez(path, x=x, y=y), with plain numbers") from cause
    except DataError as cause:
        raise DataError(f"{path}: {cause}") from cause
