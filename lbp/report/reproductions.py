"""Experiments with a published number, beside what runs of them measured here: `lbp reproduce`.

The number stands in the experiment's YAML under `published:`, a map that is no part of the run's configuration.
"""

import math
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from lbp import knobs, registry
from lbp.errors import ConfigError
from lbp.report.compare import dotted
from lbp.report.runs import Run, as_typed, measurements, options_of, read, within
from lbp.report.tables import Column, average, figure as shown_number, markdown, text

# What may differ from the experiment: the seed, where data and results lie, and what it is computed with.
FREE = re.compile(r"(seed|plugins|run\.(dir|name)|(logger|launch)\..*|dataset\.root|(trainer|metrics)\.name|"
                  r"trainer\.(device|threads|checkpoint_every))$")
OF_EPOCH = re.compile(r"(test|val|train)_\w+|layers\.[^.]+\.\w+|total\.\w+")
MAP = {"of": "str", "source": "str", "checked": "bool", "figures": "list[map]", "device": "cpu | cuda", "minutes": "float > 0",
       "seeds": "int >= 1", "note": "str"}
FIGURE = {"figure": "str", "value": "float", "tolerance": "float > 0", "epoch": "int >= 1"}


class Figure(NamedTuple):
    """A published number: `figure` at the end of an `epoch` of metrics.jsonl, or without one a key of summary.json."""

    figure: str
    value: float
    tolerance: float
    epoch: int | None = None

    def __str__(self) -> str:
        return self.figure + (f" (epoch {self.epoch})" if self.epoch else "")


class Published(NamedTuple):
    """What an experiment's `published:` says. The last of the figures is the main one; `minutes` are of one run."""

    of: str
    source: str
    checked: bool
    figures: list[Figure]
    device: str = "cpu"
    minutes: float | None = None
    seeds: int = 1
    note: str = ""


class Measured(NamedTuple):
    """A figure, and its values in the runs that have it."""

    figure: Figure
    values: list[float]

    @property
    def difference(self) -> float | None:
        return fmean(self.values) - self.figure.value if self.values else None

    @property
    def met(self) -> bool:
        distance, tolerance = abs(self.difference if self.values else math.inf), self.figure.tolerance
        return distance <= tolerance or math.isclose(distance, tolerance)


@dataclass
class Reproduction:
    """`runs`: those that count, by seed; `out`: the others of this experiment, and why they do not count."""

    name: str
    published: Published
    runs: dict[str, Run]
    out: list[tuple[Run, str]]
    measured: list[Measured]

    @property
    def state(self) -> str:
        if not self.runs:
            return "not yet run"
        if len(self.runs) < self.published.seeds:
            return f"{len(self.runs)} of {self.published.seeds} seeds"
        if not self.published.checked:
            return "published (unverified)"
        return "reproduced" if all(one.met for one in self.measured) else "not reproduced"

    @property
    def verdict(self) -> str:
        """In one line, with what is off."""
        count = len(self.runs)
        more = {"reproduced": f" ({count} seed{'s' * (count > 1)})", "published (unverified)": ": no verdict",
                "not reproduced": ": " + "; ".join(
                    f"{one.figure} {average(one.values) if one.values else 'is in none of the runs'}, "
                    f"published {one.figure.value:g} ± {one.figure.tolerance:g}" for one in self.measured if not one.met)}
        return f"{self.name}: {self.state}{more.get(self.state, '')}"


# ---- what is published


def experiments() -> list[str]:
    """The names of those with a `published:`."""
    return [name for name in registry.options("experiment")
            if any(key.partition(".")[0] == "published" for key in registry.option("experiment", name).knobs)]


def named(words: Sequence[str]) -> list[str]:
    """The experiments that names and globs stand for; all without words. Raises ConfigError with every word that is wrong."""
    known, found, problems = experiments(), {}, []
    for word in words:
        names = [name for name in known if fnmatchcase(name, word)]
        found |= dict.fromkeys(names)
        if not names and word in registry.options("experiment"):
            problems.append(f"{word}: has no published number to compare with; lbp train experiment={word} runs it")
        elif not names:
            problems.append(f"{word}: no experiment with a published number; there are: {', '.join(known) or 'none'}"
                            + knobs.did_you_mean(knobs.nearest(word, known)))
    if problems:
        raise ConfigError(*problems)
    return list(found) if words else known


def published(name: str) -> Published:
    """What the experiment's YAML says is published. Raises ConfigError with everything that is wrong with it."""
    import yaml

    path = registry.option("experiment", name).path
    try:
        said = yaml.load(path.read_text("utf-8"), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))["published"]
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read: {' '.join(str(error).split())}") from None
    problems: list[str] = []
    values = _checked(said, MAP, Published, f"{path}: published", problems)
    figures = []
    for number, one in enumerate(values.get("figures", ())):
        where = f"{path}: published.figures[{number}]"
        one = _checked(one, FIGURE, Figure, where, problems)
        if one.get("epoch") and not OF_EPOCH.fullmatch(one.get("figure", "test_x")):
            problems.append(f"{where}.figure={one['figure']}: of an epoch there are test_X, val_X, train_X, layers.LAYER.X "
                            "and total.X")
        figures.append(one)
    if not figures and not problems:
        problems.append(f"{path}: published.figures: names no figure")
    if problems:
        raise ConfigError(*problems)
    return Published(**values | {"figures": [Figure(**one) for one in figures]})


def _checked(said: Any, specs: dict[str, str], kind: Any, where: str, problems: list[str]) -> dict[str, Any]:
    """The map's values as their specs ask, and the problems of the others."""
    if not isinstance(said, dict):
        problems.append(f"{where}: must be a map of {', '.join(specs)}")
        return {}
    problems += [f"{where}.{key}: is missing" for key in specs if key not in said and key not in kind._field_defaults]
    values = {}
    for key, value in said.items():
        if isinstance(value, str) and re.fullmatch(r"\d+\.?\d*e[-+]?\d+", value, re.IGNORECASE):
            value = float(value)  # YAML 1.1 takes 1e-3 for a text
        if key not in specs:
            near = knobs.did_you_mean(knobs.nearest(str(key), specs))
            problems.append(f"{where}.{key}: unknown key; there are: {', '.join(specs)}{near}")
        elif problem := knobs.check(f"{where}.{key}", value, specs[key]):
            problems.append(problem)
        else:
            values[key] = knobs.coerce(value, specs[key])
    return values


# ---- what was measured


def reproductions(names: Sequence[str], composed: Callable[[str], Mapping], root: Path = Path("outputs")) -> list[Reproduction]:
    """Each experiment and its runs below `root`. `composed(name)` gives the configuration that the experiment has today: of
    a run that was made with another only the folder is told."""
    found: dict[str, list[Run]] = {name: [] for name in names}
    for folder in within(root):  # oldest first
        name = options_of(folder, []).get("experiment")  # of most runs no more needs reading
        if name in found:
            found[name].append(read(folder))
    return [_reproduction(name, published(name), runs, composed) for name, runs in found.items()]


def _reproduction(name: str, said: Published, runs: list[Run], composed: Callable[[str], Mapping]) -> Reproduction:
    count, out = {}, []
    today = dict(as_typed(composed(name))) if any(run.status == "done" for run in runs) else {}
    for run in runs:
        changed = _differing(today, run.settings) if run.status == "done" else []
        if run.status != "done" or changed:
            out.append((run, run.why or run.status if run.status != "done" else ", ".join(changed)))
        else:
            if run.seed in count:
                out.append((count.pop(run.seed), "made again since"))
            count[run.seed] = run
    columns = [_values(run, said.figures) for run in count.values()]
    measured = [Measured(figure, [value for column in columns if (value := column[i]) is not None])
                for i, figure in enumerate(said.figures)]
    return Reproduction(name, said, count, out, measured)


def differing(one: Mapping, other: Mapping) -> list[str]:
    """What makes the second configuration another experiment than the first, as it is typed."""
    return _differing(dict(as_typed(one)), dict(as_typed(other)))


def _differing(today: Mapping[str, str], then: Mapping[str, str]) -> list[str]:
    return [f"{key}={then.get(key, '(nothing)')}" for key in dict.fromkeys((*today, *then))
            if today.get(key) != then.get(key) and not FREE.match(key)]


def _values(run: Run, figures: list[Figure]) -> list[float | None]:
    epochs = {figure.epoch for figure in figures if figure.epoch}
    wanted = re.compile(rb'"epoch": (%b)\b' % b"|".join(b"%d" % epoch for epoch in epochs))    # to parse all would take seconds
    lines = list(measurements(run.folder, wanted)) if epochs else []
    return [dotted(run.summary, figure.figure) if figure.epoch is None else _at_epoch(lines, figure) for figure in figures]


def _at_epoch(lines: list[dict], figure: Figure) -> float | None:
    """Measurements of layers stand in the line of the epoch, else they are those of its last measured batch."""
    here = [line for line in lines if line.get("epoch") == figure.epoch]
    split, _, key = figure.figure.partition("_")
    places = [(f"{split}_epoch" if split == "train" else split, key)] if split in ("test", "val", "train") else \
        [("train_epoch", figure.figure), ("train", figure.figure)]
    found = [value for split, key in places for line in reversed(here)
             if line.get("split") == split and (value := dotted(line, key)) is not None]
    return found[0] if found else None


# ---- as text


def listed(found: Sequence[Reproduction], width: int) -> list[str]:
    """A line an experiment, with its main figure."""
    columns = [Column("experiment"), Column("figure", minor=True), Column("published"), Column("measured"), Column("state"),
               Column("a run", minor=True)]
    rows = []
    for one in found:
        main, said = one.measured[-1], one.published
        rows.append([one.name, str(main.figure), _claimed(main.figure, said), _shown(main), one.state,
                     f"{duration(said.minutes)} {said.device}".strip()])
    return text(columns, rows, width) if rows else ["no experiment has a published number"]


def announced(one: Reproduction, missing: Sequence[int]) -> str:
    """What is going to be run, and how long it takes."""
    if not missing:
        return f"{one.name}: nothing to run, these seeds are there already"
    said, count = one.published, len(missing)
    time = f"about {duration(said.minutes * count)}" if said.minutes else "nobody wrote down how long it takes"
    return (f"{one.name}: {count} run{'s' * (count > 1)} (seed{'s' * (count > 1)} {', '.join(map(str, missing))}), "
            f"{time} on {'two CPU cores' if said.device == 'cpu' else 'one GPU'}")


def shown(one: Reproduction, width: int) -> list[str]:
    """What is published where, every figure beside what was measured, and the verdict."""
    said, width = one.published, max(width, 12)
    lines = [f"{one.name}: {said.of}", said.source, *([said.note] if said.note else [])]
    lines = [line for part in lines for line in textwrap.wrap(part, width, break_on_hyphens=False, break_long_words=False)]
    columns = [Column("figure"), Column("published"), Column("tolerance", minor=True), Column("measured"),
               Column("difference", minor=True), Column("verdict")]
    rows = []
    for measured in one.measured:
        figure, difference = measured.figure, measured.difference
        apart = "" if difference is None else f"{'+' * (difference >= 0)}{shown_number(difference)}"
        verdict = ("ok" if measured.met else "off") if one.runs and said.checked else ""
        rows.append([str(figure), _claimed(figure, said), f"{figure.tolerance:g}", _shown(measured), apart, verdict])
    lines += ["", *text(columns, rows, width), ""]
    lines += [f"not counted: {run.folder} ({why})" for run, why in one.out]
    return [*lines, one.verdict]


def as_markdown(found: Sequence[Reproduction]) -> str:
    """A row a figure."""
    columns = [Column("experiment"), Column("source"), Column("figure"), Column("published", right=True),
               Column("tolerance", right=True), Column("measured", right=True), Column("seeds", right=True), Column("verdict")]
    rows = [[one.name, f"[{one.published.of}]({one.published.source})", str(measured.figure), f"{measured.figure.value:g}",
             f"{measured.figure.tolerance:g}", average(measured.values) if measured.values else "-", str(len(measured.values)),
             {"not reproduced": "reproduced" if measured.met else "not reproduced"}.get(one.state, one.state)]
            for one in found for measured in one.measured]
    return markdown(columns, rows)


def duration(minutes: float | None) -> str:
    return "" if minutes is None else f"{minutes:g} min" if minutes < 120 else f"{minutes / 60:.1f} h"


def _claimed(figure: Figure, said: Published) -> str:
    return f"{figure.value:g}" + ("" if said.checked else " (unverified)")


def _shown(measured: Measured) -> str:
    return f"{average(measured.values)} ({len(measured.values)})" if measured.values else "-"
