from __future__ import annotations

import json
import netrc
import os
import queue
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from lbp.logs.console import say
from lbp.logs.jsonl import plain

START = 20.0        # seconds that the start may take; W&B is told 10, and where even that is not kept, nobody waits
FINISH = 30.0       # seconds that a run waits at its end for what is still to be sent
STOP = 5.0          # and one that was stopped: docker kills after ten
BEHIND = 10_000     # lines that W&B may lag behind the run
EPOCHS = ("train_epoch", "val", "test")     # splits whose axis is the epoch


class Wandb:
    """A view of the run in Weights & Biases, kept in the run's own folder; names are METRIC/LAYER and METRIC/SPLIT.

    It begins with what metrics.jsonl has already, under the run's one `id`: W&B puts a run in the place of an earlier one of
    that id, so that one that goes on is there once, whole and without a seam. All calls are made in a thread of its own
    and none is waited for long: whatever W&B does wrong, the run goes on, with one warning. `mode`: what came of the
    mode asked for; `problem`: what went wrong.
    """

    def __init__(self, settings: dict[str, Any], values: dict[str, Any], options: dict[str, str], folder: Path, id: str | None = None):
        self.run, self.problem, self.mode, self.folder, self.id = None, None, None, folder, id
        with _somewhere_to_log(folder):
            for mode in dict.fromkeys((mode_of(settings["mode"]), "offline")):
                try:
                    self.run = within(START, lambda mode=mode: self._begin(mode, settings, values, options))
                    self.mode = mode
                    break
                except Exception as error:
                    self.problem = self.problem or error
        if self.run:
            if self.problem:
                say(f"warning: W&B is offline for this run ({said(self.problem)}); lbp sync {folder} sends it later")
            past = list(lines(folder / "metrics.jsonl"))
            self.limit, self.queue = BEHIND + len(past), queue.SimpleQueue()
            for record in past:
                self.queue.put(record)
            self.thread = threading.Thread(target=self._work, daemon=True, name="lbp-wandb")
            self.thread.start()
        else:
            self._off(self.problem)

    def write(self, record: dict[str, Any]) -> None:
        if self.run:
            self.queue.put(record)
            if self.queue.qsize() > self.limit:
                self._off(TimeoutError(f"{BEHIND:,} lines behind"))

    def close(self, status: str, summary: dict[str, Any], seconds: float | None = None) -> None:
        """Waits for what is still to be sent, so many seconds at most."""
        seconds = seconds or (FINISH if status == "done" else STOP)
        if self.run:
            self.queue.put((status, summary))
            self.thread.join(seconds)
            if self.thread.is_alive():
                self._off(TimeoutError(f"not finished within {seconds:g} s"))

    def _begin(self, mode: str, settings: dict[str, Any], values: dict[str, Any], options: dict[str, str]):
        if "wandb" not in sys.modules:
            os.environ.pop("WANDB_SERVICE", None)  # W&B's process of whoever started this one: it may be gone
        import wandb

        if self.problem and not wandb.run:  # its process holds the id of the attempt that failed; a run of the calling script stays
            wandb.teardown()
        os.environ.setdefault("WANDB_SILENT", "true")
        tags = [f"{kind}:{options[kind]}"[:64] for kind in ("algo", "dataset", "arch")]
        # absolute: W&B's process stays in the folder that was current when it started
        run = wandb.init(
            project=settings["project"], name=self.folder.name, id=self.id, dir=str(self.folder.absolute()), mode=mode, config=values,
            group="-".join(options[kind] for kind in ("algo", "dataset", "arch"))[:128], tags=tags, job_type="train",
            reinit="create_new",    # a run that the calling script has open is its own
            settings=wandb.Settings(init_timeout=10, console="off", silent=True))
        for axis in ("step", "epoch"):
            run.define_metric(axis, hidden=True)
        run.define_metric("*", step_metric="step")
        run.log({}, commit=False)  # the first call is fifty times slower: not in a measured step
        return run

    def _work(self) -> None:
        known: set[str] = set()
        try:
            while not isinstance(record := self.queue.get(), tuple):
                values = flat(record)
                if record["split"] in EPOCHS:
                    for key in values.keys() - known - {"step", "epoch"}:
                        known.add(key)
                        self.run.define_metric(key, step_metric="epoch")
                self.run.log(values)
            status, summary = record
            self.run.summary.update({"status": status, **flat_summary(summary)})
            self.run.finish(exit_code=0 if status == "done" else 1)
            self._tidy()
        except Exception as error:
            self._off(error)

    def _off(self, error: BaseException) -> None:
        if self.run or not self.mode:
            self.run, self.problem, self.mode = None, error, "off"
            remedy = f"lbp sync {self.folder} sends it later" if "wandb" in sys.modules else "pip install --upgrade wandb brings it"
            say(f"warning: W&B is off for this run ({said(error)}); metrics.jsonl has everything; {remedy}")

    def _tidy(self) -> None:
        """Earlier and partial recordings of this run go: this one is whole."""
        with suppress(Exception):
            mine = Path(self.run.dir).resolve().parent
            for other in mine.parent.glob(f"*run-*-{self.id}*"):  # of one second: -1, -2 ...
                if other.resolve() != mine and not other.is_symlink():
                    shutil.rmtree(other, ignore_errors=True)


def mode_of(asked: str) -> str:
    """auto: what WANDB_MODE says, else online where there is a key (WANDB_API_KEY, or `wandb login`'s in netrc)."""
    if asked != "auto":
        return asked
    said = os.environ.get("WANDB_MODE", "").lower()
    if said in ("online", "offline", "disabled"):
        return said
    return "online" if os.environ.get("WANDB_API_KEY") or _in_netrc() else "offline"


def _in_netrc() -> bool:
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname or ""
    for name in filter(None, (os.environ.get("NETRC"), "~/.netrc", "~/_netrc")):
        with suppress(OSError, netrc.NetrcParseError, UnicodeDecodeError):
            if host in netrc.netrc(os.path.expanduser(name)).hosts:
                return True
    return False


def flat(record: dict[str, Any]) -> dict[str, Any]:
    """A line of metrics.jsonl as W&B names: {"loss/val": ..., "alignment_deg/fc1": ..., "alignment_deg/total": ...}; means
    over an epoch's batches, which have another axis, are "alignment_deg/fc1/epoch"."""
    split, record = record["split"], plain(record)
    values = {"step": record["step"], "epoch": record["epoch"]}
    if split == "warning":
        values["warning"] = record["warning"]
    for key, value in record.items():
        if isinstance(value, (int, float)) and key not in values:
            values[f"{key}/{split}"] = value
    end = "/epoch" if split == "train_epoch" else ""
    return values | {name + end: value for name, value in _by_layer(record).items()}


def flat_summary(summary: dict[str, Any]) -> dict[str, Any]:
    """summary.json with its layers under the names that their curves have."""
    summary = plain(summary)
    return {key: value for key, value in summary.items() if not isinstance(value, dict) and value is not None} | _by_layer(summary)


def _by_layer(record: dict[str, Any]) -> dict[str, float]:
    layers = {**record.get("layers", {}), "total": record.get("total", {})}
    return {f"{metric}/{layer}": value for layer, metrics in layers.items() for metric, value in metrics.items() if value is not None}


def lines(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a metrics.jsonl; the last may have been cut off by a kill."""
    if path.exists():
        with open(path, encoding="utf-8") as file, suppress(ValueError):
            for line in file:
                yield json.loads(line)


def within(seconds: float, call: Callable[[], Any]) -> Any:
    """What the call returns or raises; TimeoutError where it takes longer: it is then left to itself in its thread."""
    box: list[tuple[Any, BaseException | None]] = []

    def work() -> None:
        try:
            box.append((call(), None))
        except BaseException as error:
            box.append((None, error))

    thread = threading.Thread(target=work, daemon=True, name="lbp-wandb-start")
    thread.start()
    thread.join(seconds)
    result, error = box[0] if box else (None, TimeoutError(f"no answer within {seconds:g} s"))
    if error:
        raise error if isinstance(error, Exception) else RuntimeError(said(error))
    return result


def said(error: BaseException) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"


@contextmanager
def _somewhere_to_log(folder: Path) -> Iterator[None]:
    """W&B's own process logs into the user's cache, and onto the terminal where there is none (no HOME, as in containers)."""
    before = os.environ.get("XDG_CACHE_HOME")
    try:
        cache = Path(before or os.environ["HOME"] + "/.cache")
        cache.mkdir(parents=True, exist_ok=True)
        usable = os.access(cache, os.W_OK)
    except (KeyError, OSError):
        usable = False
    if not usable:
        os.environ["XDG_CACHE_HOME"] = str((folder / "wandb").absolute())
    try:
        yield
    finally:
        if before is not None:
            os.environ["XDG_CACHE_HOME"] = before
        elif not usable:
            del os.environ["XDG_CACHE_HOME"]
