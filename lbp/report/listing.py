"""`lbp list runs`: what was run, newest first."""

from collections.abc import Sequence
from time import time

from lbp.report.compare import USUAL, number
from lbp.report.runs import Run
from lbp.report.tables import Column, figure, text


def listing(runs: Sequence[Run], width: int) -> list[str]:
    """A table, under the folder of its runs; oldest first is how they come."""
    columns = [Column("run"), Column("status"), Column("test"), Column("epoch", right=True), Column("age", right=True),
               *(Column(name, minor=True) for name in ("algo", "dataset", "arch", "seed"))]
    rows, heads = [], {}
    for run in reversed(runs):
        heads.setdefault(str(run.folder.parent), []).append(len(rows))
        rows.append([run.folder.name, run.status, result(run), epochs(run), age(run.started),
                     *(run.options.get(k, "") for k in ("algo", "dataset", "arch")), run.seed])
    lines = []
    for head, members in heads.items():
        lines += [*([""] if lines else []), head]
        lines += text(columns, [rows[i] for i in members], width)
    return lines


def result(run: Run) -> str:
    name = next((m for m in USUAL if number(run, m) is not None), None)
    return f"{'' if name == USUAL[0] else name.removeprefix('test_') + ' '}{figure(number(run, name))}" if name else ""


def epochs(run: Run) -> str:
    """Trained / asked for."""
    asked = run.settings.get("trainer.epochs", "")
    return f"{run.epoch}/{asked}" if asked and str(run.epoch) != asked else str(run.epoch)


def age(started: float) -> str:
    seconds = max(0.0, time() - started)
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
