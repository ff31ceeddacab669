"""Checkpoints: plain dicts, written atomically, loaded without running anything that they contain."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from lbp.errors import DataError


def save(path: Path, content: dict[str, Any]) -> None:
    """Writes `content` (tensors and plain values) so that `path` is either the old file or the whole new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    with open(temporary, "wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def load(path: Path) -> dict[str, Any]:
    """Raises DataError, naming the file and the cause, for one that is missing or damaged."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such checkpoint") from None
    except Exception as error:  # torch raises half a dozen types for a damaged file
        raise DataError(f"{path}: not a readable checkpoint ({type(error).__name__}: {str(error).splitlines()[0]})") from error
