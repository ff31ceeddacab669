from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any


def plain(value: Any) -> Any:
    """`value` as JSON can hold it: non-finite numbers become null, since JSON has none."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Jsonl:
    """metrics.jsonl: the record of a run, one object a line, each line written whole and at once."""

    def __init__(self, path: Path):
        self.file = open(path, "a", encoding="utf-8", buffering=1)

    def write(self, record: dict[str, Any]) -> None:
        self.file.write(json.dumps(plain(record)) + "\n")

    def close(self, status: str, summary: dict[str, Any]) -> None:
        self.file.close()
