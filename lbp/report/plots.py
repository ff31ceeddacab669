"""Plots, each a file; matplotlib is imported where one is drawn."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from lbp.errors import ConfigError


def curves(path: Path, series: Mapping[str, tuple[Sequence[float], Sequence[float]]], x: str, y: str, *, title: str = "",
           log: tuple[bool, bool] = (False, False)) -> None:
    """Writes one plot of several curves, {label: (x values, y values)}; `log` says which axes are. Raises ConfigError where
    matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import NullFormatter, ScalarFormatter
    except ImportError:
        raise ConfigError(f"{path}: plots need matplotlib: pip install matplotlib") from None
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.subplots()
    for label, (xs, ys) in series.items():
        axes.plot(xs, ys, marker="o", markersize=4, label=label)
    axes.set(xlabel=x, ylabel=y, title=title, xscale="log" if log[0] else "linear", yscale="log" if log[1] else "linear")
    if log[0]:
        axes.set_xticks(sorted({value for xs, _ in series.values() for value in xs}))
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
