"""Plots, each a file; matplotlib is imported where one is drawn."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

from lbp.errors import ConfigError


def curves(path: Path, series: Mapping[str, tuple[Sequence[float], Sequence[float]]], x: str, y: str, *, title: str = "",
           log: tuple[bool, bool] = (False, False)) -> None:
    """Writes one plot of several curves, {label: (x values, y values)}; `log` says which axes are. Raises ConfigError where
    matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import ScalarFormatter
    except ImportError:
        raise ConfigError(f"{path}: plots need matplotlib: pip install matplotlib") from None
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.subplots()
    for (label, (xs, ys)), style in zip(series.items(), itertools.cycle(("-", "--", "-.", ":"))):    # curves may coincide
        axes.plot(xs, ys, style, marker="o", markersize=4, label=label)
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
