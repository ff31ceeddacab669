"""Plots, each a file or a picture within a page; matplotlib is imported where one is drawn."""

import io
import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

from lbp.errors import ConfigError

class Line(NamedTuple):
    """A curve and how it is drawn: shaded between `low` and `high`, its `colour` as CSS has it, the lengths of its `dash` and gaps."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]
    colour: str
    dash: tuple[float, ...] = ()


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


class Scale(NamedTuple):
    """The ends of both axes, which panels that are compared have in common; angles are marked at 30, 60, 90 degrees."""

    x: tuple[float, float]
    y: tuple[float, float]
    log: bool
    angle: bool


def scale(lines: Sequence[Line], figure: str) -> Scale:
    """What shows all of the lines. Logarithmic where the figure, no share and no angle, spans more than a decade above zero."""
    values = [value for line in lines for value in (*line.low, *line.high)]
    low, high = min(values), max(values)
    least = max(min((value for value in values if value > 0), default=1), 1e-200)
    angle = figure.endswith("_deg")
    log = low >= 0 and high > 10 * least and not angle and not re.search("accuracy|fraction|share", figure)
    pad = 0.04 * (math.log(high) - math.log(least) if log else (high - low) or abs(high) or 1)
    y = (0, max(92, high * 1.02)) if angle else (least / math.exp(pad), high * math.exp(pad)) if log else (low - pad, high + pad)
    return Scale((0, max(2, *(line.x[-1] for line in lines))), y, log, angle)


def panel(lines: Sequence[Line], alt: str, scale: Scale) -> str:
    """A small plot as an SVG element whose ink is that of the page; `alt` says in words what it shows. Raises ConfigError where
    matplotlib is missing."""
    colours = ["var(--grid)", *(line.colour for line in lines)]

    def draw(axes) -> None:
        axes.set(ylim=scale.y, yscale="log" if scale.log else "linear")
        _marked(axes.yaxis, scale)
        axes.grid(color="#000000", linewidth=0.6)
        for code, line in enumerate(lines, 1):
            colour = f"#00{code:04x}"    # matplotlib knows no CSS: it is given numbers that look like colours
            x, y, low, high = line.x, *([max(value, scale.y[0]) for value in of] for of in (line.y, line.low, line.high))
            if low != high:
                axes.fill([*x, *reversed(x)], [*low, *reversed(high)], color=colour, alpha=0.18, linewidth=0)
            if len(x) > 1:
                axes.plot(x, y, color=colour, linewidth=1.3, dashes=line.dash or (None, None))
            else:    # a dot
                axes.plot(2 * x, 2 * y, color=colour, linewidth=5, solid_capstyle="round")

    return _small(draw, scale, alt, colours)


def heat(lines: Sequence[Line], alt: str, scale: Scale) -> str:
    """The same of many lines, each a row of colours: the first at the bottom, where nothing is known the page shows through."""
    steps = sorted({x for line in lines for x in line.x})
    values = [[of.get(step, math.nan) for step in steps] for of in (dict(zip(line.x, line.y)) for line in lines)]

    def draw(axes) -> None:
        from matplotlib.colors import LogNorm, Normalize

        axes.figure.subplots_adjust(right=0.87)    # the bar has its figures beside it
        edges = [0, *((a + b) / 2 for a, b in zip(steps, steps[1:])), scale.x[1]]
        norm = (LogNorm if scale.log else Normalize)(*scale.y, clip=True)
        bar = axes.figure.colorbar(axes.pcolormesh(edges, range(len(lines) + 1), values, norm=norm, cmap="cividis", rasterized=True), fraction=0.05, pad=0.02)
        _marked(bar.ax.yaxis, scale)
        bar.ax.tick_params(length=0)
        bar.ax.minorticks_off()
        bar.outline.set_visible(False)
        shown = range(0, len(lines), math.ceil(len(lines) / 6))
        axes.set_yticks([i + 0.5 for i in shown], [name if len(name := lines[i].label) < 9 else f"…{name[-7:]}" for i in shown])

    return _small(draw, scale, alt, ["var(--grid)"])


def _marked(axis, scale: Scale) -> None:
    from matplotlib.ticker import LogLocator, MaxNLocator, MultipleLocator

    few = scale.log and scale.y[1] < 100 * scale.y[0]
    axis.set_major_locator(MultipleLocator(30) if scale.angle else LogLocator(subs=(1, 2, 5) if few else (1,)) if scale.log else MaxNLocator(5))
    axis.set_major_formatter(lambda value, _: f"{value:g}")


def _small(draw: Callable, scale: Scale, alt: str, colours: Sequence[str]) -> str:
    """What `draw` draws, over steps; `colours` are what the codes stand for that it takes for colours."""
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
        from matplotlib.ticker import EngFormatter, MaxNLocator
    except ImportError:
        raise ConfigError("plots need matplotlib: pip install matplotlib") from None
    with rc_context({"svg.fonttype": "none", "font.size": 8}):
        figure = Figure(figsize=(3.4, 2.0))
        figure.subplots_adjust(left=0.15, right=0.94, top=0.96, bottom=0.115)
        axes = figure.subplots()
        draw(axes)
        axes.set_xlim(scale.x)
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.xaxis.set_major_formatter(EngFormatter(sep="") if scale.x[1] >= 1e5 else lambda value, _: f"{value:,.0f}")
        axes.minorticks_off()
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.set_axisbelow(True)
        figure.patch.set_visible(False)
        axes.patch.set_visible(False)
        file = io.StringIO()
        figure.savefig(file, format="svg", dpi=144)
    return _slim(file.getvalue(), alt, colours)


def _slim(svg: str, alt: str, colours: Sequence[str]) -> str:
    """Without what only a file of its own needs: its head, names, clips (nothing is outside), fonts, digits of a hundredth of a pixel."""
    svg = re.sub(r"<metadata>.*?</metadata>|<defs>.*?</defs>|</?g\b[^>]*>", "", svg[svg.index("<svg"):], flags=re.DOTALL)
    svg = re.sub(r'<text style="[^"]*text-anchor: (\w+)[^"]*"([^>]*?) transform="[^"]*">', r'<text text-anchor="\1"\2>', svg)
    svg = re.sub(r' (?:clip-path|id)="[^"]*"', "", svg)
    svg = re.sub(r'(?<= )[dxy]="[^"]*"', lambda place: re.sub(r"-?\d+\.\d+", lambda number: f"{float(number[0]):.2f}".rstrip("0").rstrip("."), place[0]), svg)
    svg = re.sub(r"(?<=: )#00([0-9a-f]{4})", lambda found: colours[int(found[1], 16)], svg)
    svg = re.sub(r" *\n *", "", re.sub(r" *\nL ", " ", svg))
    return re.sub(r'^<svg [^>]*(viewBox="[^"]*")[^>]*>', lambda head: f'<svg {head[1]} role="img"><title>{escape(alt)}</title>', svg)
