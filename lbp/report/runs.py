"""Run folders as plain records: what is missing or damaged becomes a record that says so, never an error."""

import fnmatch
import glob
import json
import os
import re
from collections.abc import Iterator
from datetime import datetime
from fcntl import LOCK_NB, LOCK_SH, flock
from functools import lru_cache
from pathlib import Path
from time import time
from typing import Any, NamedTuple

from lbp import knobs
from lbp.errors import ConfigError

ENDED = ("done", "failed", "diverged", "interrupted")
STATUSES = (*ENDED, "running", "killed", "damaged")  # killed: says running, but nobody holds its lock
TAIL = 1 << 17  # of metrics.jsonl, which may be of any length, this much is looked at
DEEP = 5  # outputs/DATE/SWEEP/TRIAL, and some


class Run(NamedTuple):
    """`settings`: the configuration, dotted keys and values as they are typed; `why`: what is damaged, or what went wrong."""

    folder: Path
    status: str
    options: dict[str, str]
    seed: str
    settings: dict[str, str]
    summary: dict[str, Any]
    epoch: int
    why: str
    started: float


def find(words: list[str], root: Path = Path("outputs")) -> list[Path]:
    """The run folders that the words name, oldest first: runs, folders with runs in them, starts of names, globs, `last`; the
    whole of `root` where there are no words. Raises ConfigError with every word that names none, and the nearest names."""
    if not words:
        if found := within(root):
            return found
        raise ConfigError(f"{root.absolute()}: there is no run in it; name runs or a folder with runs")
    below: list[Path] | None = None
    found, problems = {}, []
    for word in words:
        runs = [run for path in sorted(glob.glob(word)) for run in within(Path(path))] if word else []
        if not runs:
            below = within(root) if below is None else below
            runs = below[-1:] if word == "last" else _called(word, root, below)
        found |= {os.path.realpath(run): run for run in runs}
        if not runs:
            near = knobs.nearest(word, [name for run in below for name in {run.name, run.parent.name}])
            problems.append(f"{word}: names no run; RUN is a folder that is a run or has runs in it, the start of a name under "
                            f"{root}/, a glob, or last" + knobs.did_you_mean(near))
    if problems:
        raise ConfigError(*problems)
    return sorted(found.values(), key=begun)


def _called(word: str, root: Path, runs: list[Path]) -> list[Path]:
    """Those of which a part of the path below `root`, or the path itself, begins so or fits the glob."""
    if not word:
        return []
    wild = re.compile(fnmatch.translate(word))
    found = []
    for run in runs:
        parts = run.relative_to(root).parts
        names = [*parts, *("/".join(parts[i:]) for i in range(len(parts) - 1))]
        if any(name.startswith(word) or wild.fullmatch(name) for name in names):
            found.append(run)
    return found


def within(folder: Path) -> list[Path]:
    """The run at or the runs below a folder, oldest first."""
    return sorted(map(Path, _walk(os.fspath(folder), DEEP)), key=begun)


def _walk(folder: str, deep: int) -> Iterator[str]:
    try:
        entries = list(os.scandir(folder))
    except OSError:  # no folder, or not ours to read
        return
    names = {entry.name for entry in entries}
    if "STATUS" in names or names >= {"config.yaml", "meta.json"} or names >= {"config.yaml", "metrics.jsonl"}:
        yield folder
    elif deep:
        for entry in entries:
            if not entry.name.startswith((".", "_")) and entry.is_dir():
                yield from _walk(entry.path, deep - 1)


def begun(run: Path) -> tuple:
    """To sort by: DATE/TIME of the name, of the sweep's for its trials, their number, the time at which it was written."""
    day = next((i for i, part in enumerate(run.parts) if re.fullmatch(r"\d{4}-\d\d-\d\d", part)), None)
    for name in ("overrides.yaml", "config.yaml", "."):  # the first is never written again
        try:
            written = os.stat(os.path.join(run, name)).st_mtime
            break
        except OSError:
            written = 0.0
    if day is None or len(run.parts) < day + 2:
        stamp = datetime.fromtimestamp(written)
        return f"{stamp:%Y-%m-%d}", f"{stamp:%H%M%S}", 0, written, run.name
    trial = re.match(r"\d+", run.name) if "-sweep-" in run.parent.name else None
    return run.parts[day], run.parts[day + 1][:6], int(trial[0]) if trial else 0, written, run.name


# ---- one folder


def read(folder: Path) -> Run:
    """The record of a run. Its result counts only where its folder is whole: else it is `damaged`."""
    faults: list[str] = []
    status = _content(folder / "STATUS").strip()
    summary = _summary(folder, faults)
    if status not in STATUSES:
        if status:
            faults.append(f"STATUS says {status[:20]!r}")
        status = str(summary.get("status", "running"))
    if status == "running" and not alive(folder):
        status = "killed"
    if status == "done" and not summary and not faults:
        faults.append("summary.json is missing")
    settings = _settings(folder, faults)
    options = options_of(folder, faults) | {k: str(summary[k]) for k in ("algo", "dataset", "arch") if k in summary}
    record, epoch = _record(folder / "metrics.jsonl")
    if record:
        faults.append(record)
    why = "; ".join(faults) if status == "done" else _last_words(folder) if status in ("failed", "diverged") else ""
    return Run(folder, "damaged" if faults and status == "done" else status, options,
               str(summary.get("seed", settings.get("seed", "?"))), settings, summary, summary.get("epochs", epoch), why, _started(folder))


def _content(path: Path, head: int = -1) -> str:
    try:
        with open(path, "rb") as file:
            return file.read(head).decode("utf-8", "replace")
    except OSError:
        return ""


def _summary(folder: Path, faults: list[str]) -> dict[str, Any]:
    text = _content(folder / "summary.json")
    try:
        found = json.loads(text) if text else {}
        if isinstance(found, dict):
            return found
    except (ValueError, RecursionError):
        pass
    faults.append("summary.json is damaged")
    return {}


def options_of(folder: Path, faults: list[str]) -> dict[str, str]:
    """Of meta.json only the head is read: a git diff that is in it may have a megabyte."""
    head = _content(folder / "meta.json", 8192)
    match = re.search(r'"options": (\{[^{}]*\})', head)
    try:
        return {key: str(value) for key, value in json.loads(match[1]).items()}
    except (ValueError, TypeError):
        faults.append("meta.json is damaged" if head else "meta.json is missing")
        return {}


def _settings(folder: Path, faults: list[str]) -> dict[str, str]:
    text = _content(folder / "config.yaml")
    if not text:
        faults.append("config.yaml is missing")
    found: dict[str, str] = {}
    for section in re.split(r"^(?=\w+:)", text, flags=re.MULTILINE):
        if section.strip():
            pairs = _flat(section)
            if pairs is None:
                faults.append("config.yaml is damaged")
                return {}
            found.update(pairs)
    return found


@lru_cache(maxsize=None)
def _flat(section: str) -> tuple[tuple[str, str], ...] | None:
    """A top key of config.yaml and what is below it. Parsing is slow, and runs have most sections in common."""
    import yaml

    try:
        values = yaml.load(section, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except (yaml.YAMLError, ValueError, RecursionError):
        return None
    return tuple(as_typed(values)) if isinstance(values, dict) else None


def as_typed(values: dict, prefix: str = "") -> Iterator[tuple[str, str]]:
    """A configuration's dotted keys, and their values as they are typed."""
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from as_typed(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", knobs.show(value)


def _record(path: Path) -> tuple[str, int]:
    """(what is wrong with metrics.jsonl, the epoch of its last whole line)"""
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            file.seek(max(0, size - TAIL))
            data = file.read()
            if size > TAIL and data.count(b"\n") < 2:  # a line of a huge network
                file.seek(0)
                data = file.read()
            elif size > TAIL:
                data = data[data.find(b"\n") + 1 :]
    except OSError:
        return "metrics.jsonl is missing", 0
    wrong, epoch = "", 0
    if data and not data.endswith(b"}\n"):
        wrong = "metrics.jsonl ends within a line"
        data = data[: data.rfind(b"\n") + 1]
    lines = data.split(b"\n")[:-1]  # to parse each would take seconds for a thousand runs
    if b"\0" in data or not all(line.startswith(b"{") and line.endswith(b"}") for line in lines):
        wrong = "metrics.jsonl has damaged lines"
    try:
        if lines:
            epoch = int(json.loads(lines[-1])["epoch"])
    except (ValueError, KeyError, TypeError):
        wrong = "metrics.jsonl has damaged lines"
    return wrong, epoch


def measurements(folder: Path, wanted: re.Pattern[bytes] = re.compile(b"")) -> Iterator[dict[str, Any]]:
    """The lines of metrics.jsonl in which `wanted` is found; damaged ones are passed over: that there are some, `read` tells."""
    try:
        with open(folder / "metrics.jsonl", "rb") as file:
            for line in filter(wanted.search, file):
                try:
                    values = json.loads(line)
                except (ValueError, RecursionError):
                    continue
                if isinstance(values, dict):
                    yield values
    except OSError:
        pass


def _last_words(folder: Path) -> str:
    """The last line of log.txt, which of a failed run is its error."""
    lines = _tail(folder / "log.txt", 4096).split("\n")
    last = next((line for line in reversed(lines) if line.strip() and not line.startswith(" ")), "")
    return re.sub(r"^(\w+\.)+(?=\w*(Error|Exception|Diverged|OutOfResources)\b)", "", last)[:200]


def alive(folder: Path) -> bool:
    """Whether a process holds the run's lock (lbp.launch.folder.locked). Asks for no more than a shared lock, and for no
    longer than a moment."""
    try:
        with open(folder / ".lock", "rb") as file:
            flock(file, LOCK_SH | LOCK_NB)
        return False
    except BlockingIOError:
        return True
    except OSError:  # not locked yet: its process is still starting
        return time() - begun(folder)[3] < 300


def _started(folder: Path) -> float:
    """As meta.json has it, near its end; else what the folder's name and files tell."""
    date, clock, _, written, _ = begun(folder)
    said = re.findall(r'"started": "([^"]+)"', _tail(folder / "meta.json", 1024))
    for text in (*said[-1:], f"{date}T{clock}"):
        try:
            return datetime.fromisoformat(text).timestamp()
        except ValueError:
            pass
    return written


def _tail(path: Path, length: int) -> str:
    try:
        with open(path, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - length))
            return file.read().decode("utf-8", "replace")
    except OSError:
        return ""
