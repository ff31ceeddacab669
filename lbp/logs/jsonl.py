from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from lbp.errors import DataError


def plain(value: Any) -> Any:
    """`value` as JSON can hold it: non-finite numbers become null, since JSON has none."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Jsonl:
    """metrics.jsonl: the record of a run, one object a line, each line written whole and at once.

    `length`: bytes to keep of a file that is there: what came later will come again. Raises DataError where it has less."""

    def __init__(self, path: Path, length: int = 0):
        size = path.stat().st_size if path.exists() else 0
        if size < length:
            raise DataError(f"{path}: has {size:,} bytes, and the checkpoint knows of {length:,}: lines were lost since; put the "
                            "file back, or start over by lbp rerun")
        self.file = open(path, "ab", buffering=0)
        self.file.truncate(length)

    def write(self, record: dict[str, Any]) -> None:
        line = (json.dumps(plain(record)) + "\n").encode()
        try:
            while line:
                line = line[self.file.write(line):]
        except OSError as error:  # of a full disk; which one
            error.filename = str(self.file.name)
            raise

    def length(self) -> int:
        return os.fstat(self.file.fileno()).st_size

    def sync(self) -> None:
        """What was written survives a loss of power."""
        os.fdatasync(self.file.fileno())

    def close(self, status: str, summary: dict[str, Any]) -> None:
        self.file.close()
