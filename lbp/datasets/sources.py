"""What several datasets need to get at their files."""

import importlib
from types import ModuleType

from lbp.errors import DataError


def optional(package: str, name: str) -> ModuleType:
    """Imports a package that only some datasets need. Raises DataError, naming it, where it is missing or broken."""
    try:
        return importlib.import_module(package)
    except Exception as cause:      # a mismatched binary raises RuntimeError, OSError, AttributeError ...
        root = package.partition(".")[0]
        raise DataError(f"dataset={name} needs the package {root}, which cannot be imported ({line(cause)}): "
                        f"pip install --upgrade {root} (torchvision's version must match torch's)"
                        .replace("" if root == "torchvision" else " (torchvision's version must match torch's)", "")
                        ) from cause


def line(cause: BaseException) -> str:
    """An exception as one line for a message."""
    return f"{type(cause).__name__}: {' '.join(str(cause).split())}"[:300].rstrip(".: ")
