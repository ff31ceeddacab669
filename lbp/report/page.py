"""`lbp report`: runs as one HTML page that needs nothing else: no script, no network, no file beside it."""

import json
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import lbp
from lbp.errors import ConfigError
from lbp.report.compare import CONTROLS, Comparison, Row, apart, as_cells, number
from lbp.report.plots import Line, heat, panel, scale
from lbp.report.runs import measurements
from lbp.report.tables import figure, rough

MARK = '<meta name="generator" content="lbp'  # a file that has it may be written again
DRAWN = 24  # rows at most: with more nobody could tell the lines apart
POINTS = 200  # of a curve at most
ALL_POINTS = 20_000  # of a figure's curves
LAYERS = 12  # up to so many are drawn as lines
COLOURS = 8  # --c0 to --c7 of page.html
GREY = "var(--faint)"
DASHES = ((), (6, 1.5), (1.5, 1.5), (6, 1.5, 1.5, 1.5))
WHOLE = "whole network"
PHASE = " of phase "
SPLITS = {"val": "validation", "test": "test", "train_epoch": "training, mean of an epoch", "train": "training, measured batches"}
MEASURES = {  # of layers, in the order of the page; what else there is comes after them, folded
    "alignment_deg": ("Alignment", "degrees between the rule's update and backprop's gradient of the same batch: 0 the same direction, 90 nothing in common"),
    "feedback_alignment_deg": ("Feedback alignment", "degrees between the weights and the feedback that stood in for them"),
    "local_accuracy": ("Local accuracy", "what a layer's own classifier gets right of the batch"),
    "local_loss": ("Local loss", "what a layer is taught by"),
    "grad_norm": ("Update norm", "length of the rule's update as a mean over targets, before clipping and the optimizer"),
    "weight_norm": ("Weight norm", "length of weights and biases after the step"),
    "update_ratio": ("Update to weights", "length of the step by that of the weights before it"),
    "dead_fraction": ("Dead units", "share of units that do not vary over the batch"),
}
ASIDE = {"step", "epoch", "samples_per_s", "learning_rate_factor", "alignment_weight_deg", "alignment_bias_deg", "backprop_grad_norm"}
COSTS = {"train_s": "training s", "wall_s": "whole s", "samples_per_s": "samples/s", "metrics_share": "share of measuring",
         "peak_memory_mb": "peak MB", "parameters": "parameters", "flops_per_sample": "FLOPs a sample"}


class Curve(NamedTuple):
    """Over the runs of a row that have a finite value at a step: mean, least and greatest."""

    x: list[float]
    y: list[float]
    low: list[float]
    high: list[float]


class Look(NamedTuple):
    """A row's label and its line, the same in every plot."""

    label: str
    colour: str
    dash: tuple[float, ...]


def place(folders: Sequence[Path]) -> Path:
    """Where a page goes that nobody gave a name: into the one run, or the sweep whose trials they are; else the working directory."""
    above = {folder.parent for folder in folders}
    if len(folders) == 1:
        return folders[0] / "report.html"
    sweep = folders[0].parent
    alone = len(above) == 1 and ("-sweep-" in sweep.name or any((sweep / record).exists() for record in ("sweep.json", "study.journal")))
    return (sweep if alone else Path()) / "report.html"


def check(path: Path) -> None:
    """Raises ConfigError where writing the page would destroy a file that is none."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            if MARK in file.read(500):
                return
    except OSError:  # not there; or writing says what is wrong
        return
    raise ConfigError(f"{path}: is there already, and no page of lbp; name another file")


def page(found: Comparison, plots: bool = True) -> str:
    """The page; without `plots` only the table and what is not in it, and no run's metrics are read. Raises ConfigError where
    matplotlib is missing."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    columns, cells = as_cells(found)
    used = [i for i in range(len(columns)) if any(line[i] for line in cells)]
    rows = _drawn(found.rows) if plots else []
    looks = _looks(rows, found)
    of = {id(row): look for row, look in zip(rows, looks)}
    curves = [_curves(row, len(rows)) for row in rows]
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined,
                              trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    return environment.get_template("page.html").render(
        mark=MARK, version=lbp.__version__, now=f"{datetime.now():%Y-%m-%d %H:%M}", found=found, title=_title(found),
        columns=[columns[i] for i in used],
        table=[(of.get(id(row)), [line[i] for i in used]) for row, line in zip(found.rows, cells)],
        rows=list(zip(rows, looks)), hidden=len(found.rows) - len(rows), points=POINTS,
        sections=[*_over_time(looks, curves), *_over_layers(looks, curves)],
        costs=_costs(rows), ran=_ran_on(rows), differing=_differing(rows, found.by), configurations=[_config(row) for row in rows],
        result=lambda run, row: figure(value) if (value := number(run, row.metric)) is not None else "-")


def _title(found: Comparison) -> str:
    runs = [run for row in found.rows for run in row.runs] + found.out
    if len(runs) == 1:
        return runs[0].folder.resolve().name
    names = list(dict.fromkeys(row.keys[0] for row in found.rows))
    return f"{len(runs)} runs" + (f": {', '.join(names)}" if 0 < len(names) <= DRAWN else "")


def _drawn(rows: Sequence[Row]) -> list[Row]:
    """The controls and the first of the others."""
    others = [row for row in rows if not _control(row)]
    keep = {id(row) for row in [*(row for row in rows if _control(row)), *others][:DRAWN]}
    return [row for row in rows if id(row) in keep]


def _control(row: Row) -> bool:
    return row.kind.options.get("algo") in CONTROLS


def _looks(rows: Sequence[Row], found: Comparison) -> list[Look]:
    """A colour a rule, whose rows differ in their dashes; where that is not enough to tell them apart, a look a row. Controls are grey."""
    told = [i for i in range(len(found.by)) if len({row.keys[i] for row in rows}) > 1]
    algos: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        if not _control(row):
            algos[row.kind.options.get("algo", "")].append(row)
    by_algo = 1 < len(algos) <= COLOURS and max(map(len, algos.values())) <= len(DASHES)
    groups = list(algos.values()) if by_algo else [[row] for members in algos.values() for row in members]
    styles = {id(row): (f"var(--c{i % COLOURS})", DASHES[(i + i // COLOURS + j) % len(DASHES)])
              for i, members in enumerate(groups) for j, row in enumerate(members)}
    for i, row in enumerate(filter(_control, rows)):
        styles[id(row)] = GREY, DASHES[1 + i % 3]
    labels = [" ".join(filter(None, [*(_named(found.by[i], row.keys[i]) for i in told), row.differs])) or row.keys[0] for row in rows]
    return [Look(label, *styles[id(row)]) for label, row in zip(labels, rows)]


def _named(key: str, value: str) -> str:
    return f"{key}={value}" if "." in key or key == "seed" else value


# ---- curves


def _curves(row: Row, rows: int) -> dict[tuple[str, str, str], Curve]:
    """By (split, layer, figure) what the row's runs have measured; of a row of which none is done, what they got to."""
    runs = [_measured(run.folder) for run in row.runs or row.lost]
    keys = dict.fromkeys(key for run in runs for key in run)
    most = max(20, min(POINTS, ALL_POINTS // (rows * len({layer for _, layer, _ in keys} or "-"))))
    steps: dict[str, set[int]] = defaultdict(set)
    for run in runs:
        for (split, *_), values in run.items():
            steps[split].update(values)
    places = {split: _places(sorted(found), most) for split, found in steps.items()}
    return {key: _mean([run[key] for run in runs if key in run], places[key[0]]) for key in keys}


def _places(steps: Sequence[int], most: int) -> dict[int, float]:
    """Where on the axis a step is drawn: neighbours at one place, where there are more steps than places."""
    size = math.ceil(len(steps) / most)
    return {step: fmean(near) for near in (steps[i : i + size] for i in range(0, len(steps), size)) for step in near}


def _measured(folder: Path) -> dict[tuple[str, str, str], dict[int, float]]:
    """{(split, layer or "", figure): {step: value}}, of finite numbers alone that an axis can hold. What an earlier phase is taught by,
    as inverses are, is no loss of the task: a figure apart."""
    found: dict[tuple[str, str, str], dict[int, float]] = defaultdict(dict)
    phase = ""
    for line in measurements(folder):
        split, step = line.get("split"), line.get("step")
        if not isinstance(split, str) or split not in SPLITS or not isinstance(step, int):
            continue
        if "phase" in line:
            phase = f"{PHASE}{line['phase']}"
        layers = line.get("layers") if isinstance(line.get("layers"), dict) else {}
        for layer, values in [("", line), *layers.items(), (WHOLE, line.get("total"))]:
            for figure, value in values.items() if isinstance(values, dict) else ():
                if figure not in ASIDE and isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e200:
                    found[split, layer, figure if layer or "phase" not in line else figure + phase][step] = float(value)
    return {(split, layer, figure.removesuffix(phase)): values for (split, layer, figure), values in found.items()}


def _mean(runs: Sequence[dict[int, float]], places: dict[int, float]) -> Curve:
    near: dict[float, list[list[float]]] = defaultdict(list)
    for step in sorted({step for run in runs for step in run}):
        near[places[step]].append([run[step] for run in runs if step in run])
    return Curve(list(near), *([fmean([of(values) for values in at]) for at in near.values()] for of in (fmean, min, max)))


def _over_time(looks: Sequence[Look], curves: Sequence[dict]) -> Iterator[dict[str, Any]]:
    """The section of what is measured of the network as it learns, a panel a figure and split; earlier phases folded."""
    keys = sorted({key for of in curves for key in of if not key[1]}, key=lambda key: (list(SPLITS).index(key[0]), key[2] == "loss", key[2]))
    for title, early in (("Curves", False), ("Earlier phases", True)):
        panels, used = [], set()
        for split, _, name in (key for key in keys if (PHASE in key[2]) == early):
            there = [of.get((split, "", name)) for of in curves]
            if split != "test" or any(curve and len(curve.x) > 1 for curve in there):  # else it is in the table
                caption, lines = f"{name.replace('_', ' ')}, {SPLITS[split]}", _lines(looks, there)
                panels.append((caption, panel(lines, _alt(caption, lines), scale(lines, name))))
                used |= {line.label for line in lines}
        if panels:
            yield {"title": title, "about": "", "panels": panels, "legend": [look for look in looks if look.label in used], "open": not early}


def _over_layers(looks: Sequence[Look], curves: Sequence[dict]) -> Iterator[dict[str, Any]]:
    """A section a figure: a panel a layer; where there is one row alone, or more layers than one can look at, a panel a row."""
    found: dict[str, dict[str, list[Curve | None]]] = defaultdict(dict)  # figure, layer, then as the rows
    for i, of in enumerate(curves):
        for (split, layer, name), curve in sorted(of.items(), key=lambda item: item[0][0] == "train"):
            if layer:  # of single batches rather than of an epoch
                found[name].setdefault(layer, [None] * len(curves))[i] = curve
    orders = [list(dict.fromkeys(layer for _, layer, _ in of if layer and layer != WHOLE)) for of in curves]
    order = list(dict.fromkeys(layer for layers in sorted(orders, key=len, reverse=True) for layer in layers))
    depths = [Look(layer, f"color-mix(in oklab, var(--low), var(--high) {100 * i / max(1, len(order) - 1):.0f}%)", ())
              for i, layer in enumerate(order)]
    for name in sorted(found, key=lambda name: list(MEASURES).index(name) if name in MEASURES else len(MEASURES)):
        title, about = MEASURES.get(name, (name.replace("_", " "), ""))
        there = found[name]
        many = len(there) > LAYERS
        if len(looks) > 1 and not many:
            groups = [(layer, _lines(looks, there[layer])) for layer in [*order, WHOLE] if layer in there]
            legend = [look for i, look in enumerate(looks) if any(of[i] for of in there.values())]
        else:
            groups = [(look.label, _lines(depths, [there.get(layer, [None] * len(looks))[i] for layer in order])) for i, look in enumerate(looks)]
            legend = [] if many else [look for look in depths if look.label in there]
        groups = [(caption, lines) for caption, lines in groups if lines]
        if groups:
            shared = scale([line for _, lines in groups for line in lines], name)
            draw = heat if many else panel
            yield {"title": title, "about": about, "legend": legend, "open": name in MEASURES,
                   "panels": [(caption, draw(lines, _alt(f"{title}, {caption}", lines), shared)) for caption, lines in groups]}


def _lines(looks: Sequence[Look], curves: Sequence[Curve | None]) -> list[Line]:
    """What is not there is not drawn; what a control reaches at once is a level."""
    there = [(look, curve) for look, curve in zip(looks, curves) if curve]
    last = max((curve.x[-1] for _, curve in there), default=0)
    level = [Curve([0, last], *(2 * part for part in curve[1:])) if look.colour == GREY and len(curve.x) == 1 else curve
             for look, curve in there]
    return [Line(look.label, *curve, look.colour, look.dash) for (look, _), curve in zip(there, level)]


def _alt(title: str, lines: Sequence[Line]) -> str:
    said = ", ".join(f"{line.label} {line.y[-1]:.4g}" for line in lines[:DRAWN])
    return f"{title}, over steps. At the end: {said}" + (f" and {len(lines) - DRAWN} more" if len(lines) > DRAWN else "")


# ---- tables


def _costs(rows: Sequence[Row]) -> list[tuple[str, list[tuple[str, float]]]]:
    """[(column, [(mean over the row's runs, its share of the column's greatest), ...]), ...]"""
    found = []
    for key, name in COSTS.items():
        values = [row.average(key) for row in rows]
        if greatest := max((value for value in values if value), default=0):
            shown = (lambda value: f"{100 * value:.1f} %") if key == "metrics_share" else rough
            found.append((name, [("", 0.0) if value is None else (shown(value), value / greatest) for value in values]))
    return found


def _ran_on(rows: Sequence[Row]) -> list[str]:
    """Machines, versions and commits, each once."""
    found = {}
    for run in (run for row in rows for run in row.runs or row.lost):
        try:
            meta = json.loads((run.folder / "meta.json").read_bytes())
            git = meta.get("git") or {}
            commit = f"commit {git['commit'][:8]}{' and changes' * bool(git.get('diff'))}" if git.get("commit") else ""
            parts = [meta["hardware"], meta["device"], f"threads {meta['threads']}", f"ranks {meta['ranks']}", meta["precision"],
                     f"torch {meta['versions']['torch']}", f"lbp {meta['versions']['lbp']}", commit]
        except (OSError, ValueError, KeyError, TypeError, AttributeError):  # that it is damaged stands in the table
            continue
        found[", ".join(filter(None, map(str, parts)))] = None
    return list(found)


def _differing(rows: Sequence[Row], by: Sequence[str]) -> list[tuple[str, list[str]]]:
    """The keys in which the rows' configurations differ, but for those by which they are told apart."""
    settings = [apart(row.kind) for row in rows]
    keys = dict.fromkeys(key for values in settings for key in values if key not in by)
    return [(key, [values.get(key, "") for values in settings]) for key in keys if len({values.get(key) for values in settings}) > 1]


def _config(row: Row) -> str:
    try:
        return (row.kind.folder / "config.yaml").read_text("utf-8", "replace")
    except OSError:
        return "config.yaml is missing"
