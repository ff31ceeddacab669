from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def say(line: str = "") -> None:
    """Prints a line; characters that the terminal's encoding lacks become question marks; that nobody can read it (a
    closed pipe, a full disk) is no error: a run's files have everything."""
    try:
        encoding = sys.stdout.encoding or "ascii"
        print(line.encode(encoding, "replace").decode(encoding), flush=True)
    except OSError:
        sys.stdout = open(os.devnull, "w")


def can_be_live() -> bool:
    """Whether stdout is a terminal that can go back to a line: no file, pipe, notebook or dumb one."""
    try:
        return sys.stdout.isatty() and os.environ.get("TERM", "dumb").lower() not in ("dumb", "unknown", "")
    except (AttributeError, ValueError):    # none, or closed
        return False


class Console:
    """One plain line an epoch in log.txt; on stdout the same (plain), a live view (live), or nothing (off)."""

    def __init__(self, log: Path, epochs: int, metrics: Sequence[str], validated: bool, how: str):
        self.file = open(log, "a", encoding="utf-8", buffering=1)
        self.epochs, self.metrics, self.validated, self.quiet = epochs, metrics, validated, how == "off"
        self.angles: dict[str, float] = {}
        self.train: dict[str, Any] = {}
        self.view = None
        if how in ("auto", "live") and can_be_live():
            from lbp.logs.live import (
                View,  # here: rich takes a while, and where nobody looks it is not needed
            )

            self.view = View(epochs, metrics)
        elif how == "live":
            self.line("logger.console=live: stdout is no terminal that could show it; plain lines instead")

    def line(self, text: str) -> None:
        """What stands before or after the training; the terminal is given back for it."""
        self.leave()
        self._line(text)

    def _line(self, text: str) -> None:
        self.file.write(text + "\n")
        if not self.quiet:
            say(text)

    def follow(self, state, steps: int, total: int, memory_mb) -> None:
        if self.view:
            self.view.follow(state, steps, total, memory_mb)

    def write(self, record: dict[str, Any]) -> None:
        split = record["split"]
        if self.view and split != "warning":
            self.view.write(record)
        if split == "warning":
            self._line(f"warning: {record['warning']}")
        if "layers" in record:
            self.angles = {name: values["alignment_deg"] for name, values in record["layers"].items()
                           if "alignment_deg" in values}
        if split == "train_epoch":
            self.train = record
            if not self.validated:
                self._epoch({})
        elif split == "val":
            self._epoch(record)

    def leave(self, seconds: float | None = None) -> None:
        """Gives the terminal back, within so many seconds."""
        if self.view:
            self.view.stop(seconds)

    def close(self, status: str, summary: dict[str, Any]) -> None:
        self.leave()
        self.file.close()

    def _epoch(self, val: dict[str, Any]) -> None:
        train, parts = self.train, [f"epoch {self.train['epoch']:>{len(str(self.epochs))}}/{self.epochs}"]
        for name, record in (("train", train), ("val", val)):
            if record:
                told = self.metrics if record is (val or train) else self.metrics[:1]     # the others once a line
                values = "".join(f" {metric} {record[metric]:.4f}" for metric in told if metric in record)
                parts.append(f"{name} loss {record['loss']:.4f}{values}")
        if "samples_per_s" in train:
            parts.append(f"{train['samples_per_s']:,.0f} samples/s")
        if self.angles:
            parts.append("angle to bp " + " ".join(f"{name} {angle:.0f}" for name, angle in self.angles.items()))
        if self.view:
            self.file.write("  ".join(parts) + "\n")
        else:
            self._line("  ".join(parts))
