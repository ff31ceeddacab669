"""Plots, each a file; matplotlib is imported where one is drawn."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

from lbp.errors import ConfigError


def curves(path: Path, series: Mapping[str, tuple[Sequence[float], Sequence[float]]], x: str, y: str, *, title: str = "",
           log: tuple[bool, bool] = (False, False), spread: Mapping[str, tuple[Sequence[float], Sequence[float]]] | None = None) -> None:
    """Writes one plot of several curves, {label: (x values, y values)}; `log` says which axes are, `spread` from where to where
    a curve is shaded, {label: (lower y values, upper)}. Raises ConfigError where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import ScalarFormatter
    except ImportError:
        raise ConfigError(f"{path}: plots need matplotlib: pip install matplotlib") from None
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.subplots()
    for (label, (xs, ys)), style in zip(series.items(), itertools.cycle(("-", "--", "-.", ":"))):    # curves may coincide
        line, = axes.plot(xs, ys, style, marker="o", markersize=4, label=label)
        if spread and label in spread:
            axes.fill_between(xs, *spread[label], color=line.get_color(), alpha=0.2, linewidth=0)
    axes.set(xlabel=x, ylabel=y, title=title)
    for axis, scale, logarithmic in ((axes.xaxis, axes.set_xscale, log[0]), (axes.yaxis, axes.set_yscale, log[1])):
        if logarithmic:
            scale("log", base=2)    # depths, widths and what grows with them double
            axis.set_major_formatter(ScalarFormatter())
    if log[0]:
        axes.set_xticks(sorted({value for xs, _ in series.values() for value in xs}))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def timelines(path: Path, panels: Mapping[str, Sequence[tuple[str, str, float, float]]], x: str) -> None:
    """Writes one plot of who does what when, a panel above the other: {title: (row, kind of work, start, end)}, the first row at the
    top. Raises ConfigError where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch
    except ImportError:
        raise ConfigError(f"{path}: plots need matplotlib: pip install matplotlib") from None
    rows = list(dict.fromkeys(row for bars in panels.values() for row, *_ in bars))
    kinds = list(dict.fromkeys(kind for bars in panels.values() for _, kind, *_ in bars))
    colours = {kind: f"C{i}" for i, kind in enumerate(kinds)}
    figure = Figure(figsize=(8.0, 0.6 + len(panels) * (0.55 + 0.17 * len(rows))), layout="constrained")
    for axes, (title, bars) in zip(figure.subplots(len(panels), sharex=True, squeeze=False)[:, 0], panels.items()):
        for row, kind, start, end in bars:
            axes.barh(rows.index(row), end - start, 0.8, start, color=colours[kind], linewidth=0)
        axes.set_title(title, fontsize="medium", loc="left")
        axes.set_yticks(range(len(rows)), rows, fontsize="small")
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.grid(axis="x", alpha=0.3)
        axes.set_axisbelow(True)
    axes.set_xlabel(x)
    figure.legend(handles=[Patch(color=colour, label=kind) for kind, colour in colours.items()], loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=150)
