"""Runs side by side: mean ± std over seeds of what is otherwise the same experiment, beside the controls."""

import re
import textwrap
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from statistics import fmean, stdev
from typing import Any

from lbp import knobs
from lbp.errors import ConfigError
from lbp.report.runs import STATUSES, Run
from lbp.report.tables import Column, average, comma_separated, markdown, rough, text

BY = ("algo", "dataset", "arch")
USUAL = ("test_accuracy", "test_r2", "test_loss")  # the first that a run has
CONTROLS = ("shallow", "elm")  # what frozen random layers reach
SMALL_IS_GOOD = re.compile(r"loss|error|bits|_deg$|_s$|_mb$|share|flops|parameters")
# What changes no number of a result, and where its files lie.
BESIDE = re.compile(r"(seed|plugins|run\.(dir|name)|(logger|launch)\..*|(trainer|metrics)\.name|trainer\.(device|checkpoint_every))$")


@dataclass
class Row:
    """Runs that differ in their seed alone, and `lost`: others of the kind that are not done. `differs`: from other rows with
    the same keys; `over`: by control, how far above it, and whether that was trained the same way."""

    keys: tuple[str, ...]
    runs: list[Run]
    lost: list[Run]
    metric: str
    values: list[float]
    differs: str = ""
    over: dict[str, tuple[float, bool]] = field(default_factory=dict)

    @property
    def kind(self) -> Run:
        return (self.runs or self.lost)[0]

    @property
    def mean(self) -> float | None:
        return fmean(self.values) if self.values else None

    @property
    def std(self) -> float | None:
        return stdev(self.values) if len(self.values) > 1 else None

    def average(self, key: str) -> float | None:
        found = [value for run in self.runs if (value := number(run, key)) is not None]
        return fmean(found) if found else None


@dataclass
class Comparison:
    """`out`: the runs that are in no row's mean; `notes`: what a reader must know besides."""

    by: list[str]
    rows: list[Row]
    out: list[Run]
    notes: list[str]


def number(run: Run, key: str) -> float | None:
    """A figure of the summary, also a dotted one: total.alignment_deg."""
    return dotted(run.summary, key)


def dotted(values: dict[str, Any], key: str) -> float | None:
    value: Any = values
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def setting(run: Run, key: str) -> str | None:
    """What `--by` can name: an option's group, the seed, or a key of the configuration."""
    value = run.options.get(key) or run.settings.get(key)
    return run.seed if key == "seed" else value


def compare(runs: Sequence[Run], by: Sequence[str] = BY, metric: str | None = None) -> Comparison:
    """Groups the runs that are done. What differs in more than the seed is never averaged: it is split, and says in what.

    Raises ConfigError for a key or a metric that none of the runs has."""
    done = [run for run in runs if run.status == "done"]
    out = [run for run in runs if run.status != "done"]
    _known(runs, done, by, metric)
    notes = []
    latest: dict[tuple, Run] = {}
    for run in done:  # oldest first
        latest[_experiment(run), run.seed] = run
    if len(latest) < len(done):
        again = len(done) - len(latest)
        notes.append(f"{again} of the runs {'was' if again == 1 else 'were'} made again with the same seed and settings: "
                     "of those only the newest counts")
    ended = {(kind[:-1], seed) for kind, seed in latest}
    parts: dict[tuple, list[Run]] = {}
    lost: dict[tuple, list[Run]] = {}
    for (kind, _), run in latest.items():
        parts.setdefault((_keys(run, by), kind), []).append(run)
    for run in out:
        if run.settings and ((kind := _experiment(run)[:-1]), run.seed) not in ended:  # else it was made again since
            lost.setdefault((_keys(run, by), kind), []).append(run)
    rows = [_row(keys, members, lost.pop((keys, kind[:-1]), []), metric) for (keys, kind), members in parts.items()]
    rows += [_row(keys, [], members, metric) for (keys, _), members in lost.items()]
    _tell_apart(rows, by)
    unmeasured = sum(len(row.runs) - len(row.values) for row in rows)
    if unmeasured:
        notes.append(f"{unmeasured} of the runs that are done {'has' if unmeasured == 1 else 'have'} no finite {metric or 'result'}")
    notes += _beside_controls(rows, list(latest.values()))
    rows.sort(key=lambda row: _order(row, by))
    return Comparison(list(by), rows, out, notes)


def _known(runs: Sequence[Run], done: Sequence[Run], by: Sequence[str], metric: str | None) -> None:
    problems = []
    keys = dict.fromkeys(["seed", *(key for run in runs for key in (*run.options, *run.settings))])
    for key in by:
        if runs and key not in keys and key not in BY:  # all may be damaged
            leaves = {name.rpartition(".")[2]: name for name in keys}
            near = leaves.get(key) or knobs.nearest(key, keys)
            problems.append(f"--by {key}: no such key in these runs; it is one of {', '.join(k for k in keys if '.' not in k)}, or a "
                            f"key of their configuration, as optimizer.lr{knobs.did_you_mean(near)}")
    if metric and done and all(number(run, metric) is None for run in done):
        names = metrics(done)
        if not any(_at(run.summary, metric) for run in done):
            near = next((n for n in names if n.endswith(metric)), None) or knobs.nearest(metric, names)
            problems.append(f"--metric {metric}: no such figure in the summary of these runs; there are: {', '.join(names)}"
                            + knobs.did_you_mean(near))
    if problems:
        raise ConfigError(*problems)


def metrics(runs: Iterable[Run]) -> list[str]:
    """The figures of the runs' summaries; those of layers, `layers.NAME.FIGURE`, are too many to name."""
    found: dict[str, None] = {}
    for run in runs:
        for key, value in run.summary.items():
            if isinstance(value, (int, float)) and not isinstance(value, bool) and key != "seed":
                found[key] = None
            elif key == "total" and isinstance(value, dict):
                found |= {f"total.{name}": None for name in value}
    return list(found)


def _at(summary: dict, key: str) -> bool:
    """Whether the key is there, if only as the null of a number that was not finite."""
    value: Any = summary
    for part in key.split("."):
        if not isinstance(value, dict) or part not in value:
            return False
        value = value[part]
    return value is None


def _keys(run: Run, by: Sequence[str]) -> tuple[str, ...]:
    return tuple(value if (value := setting(run, key)) is not None else "-" for key in by)


def apart(run: Run) -> dict[str, str]:
    """The settings that make it another experiment."""
    folder = run.options.get("dataset") != "imagefolder"  # elsewhere it only says where the same files lie
    found = {k: v for k, v in run.settings.items() if not BESIDE.match(k) and not (folder and k == "dataset.root")}
    return {k: run.options[k] for k in BY if k in run.options} | found


def _experiment(run: Run) -> tuple:
    """What runs that may be averaged have in common; last the device, which a run that never began does not know."""
    return *sorted(apart(run).items()), str(run.summary.get("device", "")).partition(":")[0]


def _row(keys: tuple[str, ...], runs: list[Run], lost: list[Run], metric: str | None) -> Row:
    name = metric or next((m for m in USUAL if any(number(run, m) is not None for run in runs)), "")
    return Row(keys, runs, lost, name, [value for run in runs if (value := number(run, name)) is not None])


def _tell_apart(rows: list[Row], by: Sequence[str]) -> None:
    """In rows with the same keys: what differs. Options first; a key only where the options are the same."""
    alike: dict[tuple, list[Row]] = {}
    for row in rows:
        alike.setdefault(row.keys, []).append(row)
    for group in alike.values():
        told = [k for k in group[0].kind.options if k not in by and k not in ("logger", "launch", "trainer", "metrics")
                and len({row.kind.options.get(k) for row in group}) > 1]
        kinds: dict[tuple, list[Row]] = {}
        for row in group:
            kinds.setdefault(tuple(f"{k}={row.kind.options.get(k, '-')}" for k in told), []).append(row)
        for words, same in kinds.items():
            settings = {id(row): apart(row.kind) for row in same}
            keys = dict.fromkeys(k for values in settings.values() for k in values if k not in (*by, *told))
            differing = [k for k in keys if len({values.get(k) for values in settings.values()}) > 1]
            devices = {row.kind.summary.get("device") for row in same if row.runs}
            for row in same:
                parts = [*words, *(f"{k}={settings[id(row)].get(k, '-')}" for k in differing)]
                if len(devices) > 1 and row.runs:
                    parts.append(f"device={row.kind.summary.get('device')}")
                row.differs = " ".join(parts)


def _beside_controls(rows: list[Row], done: list[Run]) -> list[str]:
    """By how much each row is over what a control reaches on the same data and arch, trained as similarly as there is."""
    kinds: dict[tuple, list[Run]] = {}
    for run in done:
        if run.options.get("algo") in CONTROLS:
            kinds.setdefault(_experiment(run), []).append(run)
    notes = []
    for row in rows:
        if not row.values:
            continue
        here = row.kind
        for control in CONTROLS:
            fitting = [runs for runs in kinds.values() if runs[0].options["algo"] == control
                       and all(runs[0].options.get(k) == here.options.get(k) for k in ("dataset", "arch"))]
            if here.options.get("algo") == control or not fitting:
                continue
            runs = min(fitting, key=lambda runs: (len(_unlike(here, runs[0])), -len(runs)))
            values = [value for run in runs if (value := number(run, row.metric)) is not None]
            if not values:
                continue
            unlike = _unlike(here, runs[0])
            row.over[control] = row.mean - fmean(values), not unlike
            if unlike:
                notes.append(f"* {control} of {here.options.get('dataset')}, {here.options.get('arch')} was trained otherwise: "
                             f"{', '.join(f'{k}={apart(runs[0]).get(k)}' for k in unlike)}")
    return list(dict.fromkeys(notes))


def _unlike(run: Run, control: Run) -> list[str]:
    """In what they differ, but for what is the rule's own."""
    one, other = apart(run), apart(control)
    return [k for k in dict.fromkeys((*one, *other)) if one.get(k) != other.get(k)
            and k.partition(".")[0] not in ("algo", "optimizer", "schedule")]


def _order(row: Row, by: Sequence[str]) -> tuple:
    """Data and arch, then the best first; or by the keys, where they say more than the algo."""
    first = [_natural(row.keys[i]) for i, key in enumerate(by) if key in ("dataset", "arch")]
    others = [_natural(row.keys[i]) for i, key in enumerate(by) if key not in ("dataset", "arch")]
    score = float("inf") if row.mean is None else row.mean if SMALL_IS_GOOD.search(row.metric) else -row.mean
    return first, others if set(by) - set(BY) else [], row.mean is None, score, others, row.differs


def _natural(word: str) -> tuple:
    try:
        return 0, float(word), ""
    except ValueError:
        return 1, 0.0, word


# ---- as a table


def shown(found: Comparison, width: int) -> list[str]:
    """The table within the width; what all rows have in common stands above it."""
    columns, cells = as_cells(found)
    lines = []
    common = [i for i in range(1, len(found.by)) if len(cells) > 1 and len({row[i] for row in cells}) == 1]
    if common:
        lines = textwrap.wrap(", ".join(f"{found.by[i]} {cells[0][i]}" for i in common), max(width, 10))
    keep = [i for i in range(len(columns)) if i not in common]
    lines += text([columns[i] for i in keep], [[row[i] for i in keep] for row in cells], width) if cells else ["no run is done"]
    return lines


def as_markdown(found: Comparison) -> str:
    return markdown(*as_cells(found))


def as_cells(found: Comparison) -> tuple[list[Column], list[list[str]]]:
    names = {row.metric for row in found.rows if row.metric}
    controls = [control for control in CONTROLS if any(control in row.over for row in found.rows)]
    columns = [*(Column(key) for key in found.by), Column("settings", minor=True),
               Column(next(iter(names)) if len(names) == 1 else "test metric"),
               *(Column(f"over {control}", right=True) for control in controls),
               *(Column(name, minor=True, right=True) for name in ("train s", "samples/s", "MB"))]
    cells = []
    for row in found.rows:
        count = f"({len(row.values)}{f' of {len(row.runs) + len(row.lost)}' if row.lost else ''})"
        name = f"{row.metric.removeprefix('test_')} " if len(names) > 1 and row.metric else ""
        result = f"{name}{average(row.values)} {count}" if row.values else f"- {count}"
        over = [_over(row.metric, *row.over[control]) if control in row.over else "" for control in controls]
        costs = [rough(value) if (value := row.average(key)) is not None else ""
                 for key in ("train_s", "samples_per_s", "peak_memory_mb")]
        cells.append([*row.keys, row.differs, result, *over, *costs])
    return columns, cells


def _over(metric: str, by: float, same: bool) -> str:
    return (f"{by * 100:+.1f} points" if "accuracy" in metric else f"{by:+.4f}") + ("" if same else "*")


def left_out(found: Comparison) -> list[str]:
    """The runs that are in no mean, counted and then each by its folder; before them the notes."""
    counts = Counter(run.status for run in found.out)
    lines = list(found.notes)
    if counts:
        lines.append("not in the means: " + ", ".join(f"{counts[s]} {s}" for s in STATUSES if counts[s]))
    for status in STATUSES:
        for run in found.out:
            if run.status == status:
                at = f", epoch {run.epoch}" if run.epoch and status != "damaged" else ""
                lines.append(f"  {status}{at}: {run.folder}{f' ({run.why})' if run.why else ''}")
    return lines


def as_csv(found: Comparison) -> str:
    """Every figure in full; one line a row of the table."""
    header = [*found.by, "settings", "metric", "n", "mean", "std", "not_done", "seeds", *(f"over_{c}" for c in CONTROLS),
              "train_s", "samples_per_s", "peak_memory_mb"]
    rows = [[*row.keys, row.differs, row.metric, len(row.values), row.mean, row.std, len(row.lost),
             " ".join(sorted((run.seed for run in row.runs), key=_natural)), *(row.over.get(c, (None,))[0] for c in CONTROLS),
             *(row.average(key) for key in ("train_s", "samples_per_s", "peak_memory_mb"))] for row in found.rows]
    return comma_separated(header, rows)
