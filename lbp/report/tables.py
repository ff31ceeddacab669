"""Tables as text that keeps to a width, as CSV and as Markdown."""

import csv
import io
import textwrap
from collections.abc import Sequence
from statistics import fmean, stdev
from typing import NamedTuple


class Column(NamedTuple):
    """`minor` columns go onto a second line where the table is too wide; `right`: set flush right."""

    name: str
    minor: bool = False
    right: bool = False


def text(columns: Sequence[Column], rows: Sequence[Sequence[str]], width: int) -> list[str]:
    """One line a row; where that is too wide, the minor columns below it, at last all but the first."""
    used = [i for i in range(len(columns)) if any(row[i] for row in rows)]
    for firsts in (used, [i for i in used if not columns[i].minor]):
        widths = {i: max(len(columns[i].name), *(len(row[i]) for row in rows)) for i in firsts}
        if sum(widths.values()) + 2 * (len(widths) - 1) <= width:
            break
    else:
        firsts = []
    seconds = [i for i in used if i not in firsts]
    lines = [_line(columns, widths, [column.name for column in columns])] if firsts else []
    for row in rows:
        if firsts:
            lines.append(_line(columns, widths, row))
            lines += _wrapped([f"{columns[i].name} {row[i]}" for i in seconds if row[i]], width)
        else:
            first, *others = [i for i in seconds if row[i]]
            lines += textwrap.wrap(row[first], max(width, 10), break_on_hyphens=False)
            lines += _wrapped([f"{columns[i].name} {row[i]}" for i in others], width)
    return lines


def _line(columns: Sequence[Column], widths: dict[int, int], cells: Sequence[str]) -> str:
    return "  ".join(cells[i].rjust(w) if columns[i].right else cells[i].ljust(w) for i, w in widths.items()).rstrip()


def _wrapped(parts: list[str], width: int) -> list[str]:
    """The parts in lines, none broken that fits into one."""
    whole = [part.replace(" ", "\0") if len(part) < width - 4 else part for part in parts]
    lines = textwrap.wrap(", ".join(whole), max(width, 12), initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)
    return [line.replace("\0", " ") for line in lines]


def markdown(columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> str:
    used = [i for i in range(len(columns)) if any(row[i] for row in rows)]
    lines = [[columns[i].name for i in used], ["---:" if columns[i].right else "---" for i in used]]
    lines += [[row[i].replace("|", "\\|") for i in used] for row in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def comma_separated(header: Sequence[str], rows: Sequence[Sequence]) -> str:
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows([header, *rows])
    return out.getvalue()


def figure(value: float) -> str:
    """A number as one reads it: 0.9612, 12.34, 71,189."""
    size = abs(value)
    return f"{value:.4f}" if size < 10 else f"{value:.2f}" if size < 1000 else f"{value:,.0f}"


def average(values: Sequence[float]) -> str:
    """0.9612 ± 0.0031: of several also the standard deviation, to as many decimals as the mean."""
    mean = figure(fmean(values))
    return mean + (f" ± {stdev(values):,.{len(mean.partition('.')[2])}f}" if len(values) > 1 else "")


def rough(value: float) -> str:
    """A duration or an amount, to about three figures."""
    size = abs(value)
    return f"{value:.2f}" if size < 10 else f"{value:.1f}" if size < 100 else f"{value:,.0f}"
