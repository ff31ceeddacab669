"""A run on a terminal: a few lines that renew themselves twice a second, drawn by rich in a thread of their own.

The terminal is left as it is: no second screen, and the cursor is never hidden, so that also a run that is killed leaves
nothing to put right. Nothing that goes wrong in here stops a run.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from rich.cells import cell_len, set_cell_size
from rich.console import Console, ConsoleDimensions
from rich.live import Live
from rich.text import Text

EVERY = 0.5     # seconds between two frames
WINDOW = 20     # frames over which the speed is taken
NAME, BAR = 16, 8   # cells of a layer's name at most, and of its bar


class Terminal(Console):
    """stdout, as wide as it is now: neither COLUMNS, which is of when the shell last looked, nor 80."""

    def __init__(self):
        environment = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "LINES")}
        super().__init__(file=sys.stdout, force_terminal=True, force_interactive=True, force_jupyter=False, legacy_windows=False,
                         highlight=False, markup=False, emoji=False, _environ=environment)

    @property
    def size(self) -> ConsoleDimensions:
        columns, rows = 0, 0
        with suppress(OSError, ValueError, AttributeError):
            columns, rows = os.get_terminal_size(self.file.fileno())
        return ConsoleDimensions(columns or 80, rows or 24)

    def show_cursor(self, show: bool = True) -> bool:
        return False

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError   # rich would leave the process


class View:
    """What is to be seen of a run; `write` takes the lines of metrics.jsonl, `follow` what moves between them."""

    def __init__(self, epochs: int, metrics: Sequence[str]):
        self.epochs, (self.metric, *self.others) = epochs, metrics
        self.losses: dict[str, dict[str, Any]] = {}     # split -> its last line
        self.angles: dict[str, float] = {}
        self.best: tuple[float, int] | None = None
        self.state, self.live, self.done = None, None, threading.Event()

    def write(self, record: dict[str, Any]) -> None:
        split = record["split"]
        self.losses = self.losses | {split: record}
        if "layers" in record:
            self.angles = angles(record["layers"])
        if split == "val" and (self.best is None or record.get(self.metric, 0) > self.best[0]):
            self.best = record.get(self.metric, 0), record["epoch"]

    def follow(self, state, steps: int, total: int, memory_mb) -> None:
        """Shows it from now on. `state`: the loop's own, with step, epoch, batch, samples and targets; `steps` of an epoch,
        `total` of all of them; `memory_mb()` is asked for each frame."""
        self.state, self.steps, self.total, self.memory_mb = state, steps, total, memory_mb
        self.angles = angles(state.layers)
        if state.best is not None:
            self.best = state.best, state.best_epoch
        self.began, self.first, self.samples = time.monotonic(), state.step, deque(maxlen=WINDOW)
        with suppress(Exception):
            terminal = Terminal()
            self.encoding = terminal.encoding
            self.live = Live(console=terminal, auto_refresh=False, get_renderable=lambda: self.frame(*terminal.size),
                             redirect_stdout=True, redirect_stderr=bool(sys.stderr) and sys.stderr.isatty())
            self.live.start(refresh=True)
            self.thread = threading.Thread(target=self._draw, daemon=True, name="lbp-live")
            self.thread.start()

    def stop(self, seconds: float | None = None) -> None:
        """Leaves the last frame where it is; what is printed next comes below it. `seconds` that it may take: a terminal
        that was stopped by Ctrl-S takes nothing."""
        if not self.live or self.done.is_set():
            return
        self.done.set()

        def end() -> None:
            with suppress(Exception):
                self.live.stop()

        if seconds is None:
            return end()
        thread = threading.Thread(target=end, daemon=True)
        thread.start()
        thread.join(seconds)

    def _draw(self) -> None:
        with suppress(Exception):   # the terminal went away
            while not self.done.wait(EVERY):
                if _in_front(self.live.console.file):
                    self.live.refresh()

    # ---- one frame

    def frame(self, width: int, height: int) -> Text:
        """Lines that are narrower than the terminal, and fewer than it has."""
        try:
            lines = self._lines(max(width - 1, 1), max(height - 1, 1))
        except Exception as error:
            lines = [Text(f"(nothing to show: {type(error).__name__}: {error})")]
        for line in lines:
            line.truncate(max(width - 1, 1))
        return Text("\n", no_wrap=True).join(lines[:max(height - 1, 1)])

    def _lines(self, width: int, height: int) -> list[Text]:
        lines = [*flow(self._progress(width), width), *flow(self._results(), width)]
        if self.angles and height > len(lines) + 1:
            lines += [Text("angle to backprop's gradient, degrees", "dim"), *self._layers(width, height - len(lines) - 1)]
        return lines

    def _progress(self, width: int) -> list[Text]:
        state, now = self.state, time.monotonic()
        epoch = min(state.epoch + 1, self.epochs)
        pieces = [Text(f"epoch {epoch}/{self.epochs}", "bold")]
        if state.solving:
            pieces.append(Text(f"{state.solving}, {state.targets:,} samples"))
        if self.total:
            share = min(state.step / self.total, 1.0)
            pieces += [*([Text(f"batch {min(state.batch, self.steps):,}/{self.steps:,}")] if share < 1 else []),
                       Text.assemble(*self._bar(share, min(max(width // 4, 8), 30), "cyan"), f" {100 * share:.0f}%")]
        made = state.step - self.first
        if made and self.total > state.step:
            pieces.append(Text(f"{clock((now - self.began) * (self.total - state.step) / made)} left"))
        elif self.total > state.step or not self.total:
            pieces.append(Text(f"{clock(now - self.began)} so far"))
        self.samples.append((now, state.samples + state.targets))
        (then, before), (_, after) = self.samples[0], self.samples[-1]
        if now > then and after > before:
            pieces.append(Text(f"{(after - before) / (now - then):,.0f} samples/s"))
        pieces.append(Text(f"{self.memory_mb():,.0f} MB", "dim"))
        return pieces

    def _results(self) -> list[Text]:
        pieces = []
        for split, name, style in (("train", "batch", ""), ("train_epoch", "train", ""), ("val", "val", "green"), ("test", "test", "bold green")):
            if record := self.losses.get(split):
                metric = f"  {self.metric} {record[self.metric]:.4f}" if self.metric in record else ""
                pieces.append(Text(f"{name:<5} loss {record['loss']:.4f}{metric}", style))
                if split in ("val", "test"):
                    pieces += [Text(f"{name:<5} {other} {record[other]:.4f}", style) for other in self.others if other in record]
        if self.best:
            pieces.append(Text(f"best  {self.metric} {self.best[0]:.4f} in epoch {self.best[1]}"))
        return pieces

    def _layers(self, width: int, height: int) -> list[Text]:
        """A bar a layer, in as many columns as there is room for: full where the rule goes backprop's way, empty at 90
        degrees and beyond. Of too many the first and the last."""
        names = [name.encode(self.encoding, "replace").decode(self.encoding) for name in self.angles]
        wide = min(max(map(cell_len, names)), NAME)
        cells = []
        for name, angle in zip(names, self.angles.values()):
            style = "green" if angle < 45 else "yellow" if angle < 90 else "red"
            short = name if cell_len(name) <= wide else "." + name[1 - wide:]
            cells.append(Text.assemble(set_cell_size(short, wide), " ", *self._bar(1 - angle / 90, BAR, style), f" {angle:3.0f}"))
        columns = max(1, (width + 2) // (cells[0].cell_len + 2))
        room = columns * height
        if len(cells) > room:
            half = room // 2
            left_out = Text(set_cell_size(f"({len(cells) - room + 1} more)", cells[0].cell_len), "dim")
            cells = [*cells[:room - half - 1], left_out, *cells[len(cells) - half:]]
        rows = -(-len(cells) // columns)
        return [Text("  ").join(cells[row::rows]) for row in range(rows)]

    def _bar(self, share: float, width: int, style: str) -> tuple:
        full, empty = ("\u2501", "\u2500") if self.encoding.lower().startswith("utf") else ("#", "-")
        filled = round(min(max(share, 0.0), 1.0) * width)
        return (full * filled, style), (empty * (width - filled), "dim")


def angles(layers: dict[str, dict[str, float]]) -> dict[str, float]:
    return {name: values["alignment_deg"] for name, values in layers.items() if "alignment_deg" in values}


def flow(pieces: list[Text], width: int) -> list[Text]:
    """The pieces side by side, and in a new line where they would be too wide."""
    lines: list[Text] = []
    for piece in pieces:
        if lines and lines[-1].cell_len + 3 + piece.cell_len <= width:
            lines[-1] = Text.assemble(lines[-1], "   ", piece)
        else:
            lines.append(piece)
    return lines


def clock(seconds: float) -> str:
    """0:07, 1:02:03, 2 d 3 h"""
    minutes, hours = seconds // 60, seconds // 3600
    if hours >= 24:
        return f"{hours // 24:.0f} d {hours % 24:.0f} h"
    return (f"{hours:.0f}:{minutes % 60:02.0f}" if hours else f"{minutes:.0f}") + f":{int(seconds) % 60:02}"


def _in_front(file) -> bool:
    """A job in the background leaves the terminal to the one in front."""
    try:
        return os.tcgetpgrp(file.fileno()) == os.getpgrp()
    except (OSError, ValueError):   # not the terminal that this process could be in the background of
        return True
