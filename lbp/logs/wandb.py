from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lbp.logs.console import say


class Wandb:
    """A view of the run in Weights & Biases, kept in the run's own folder; names are METRIC/LAYER and METRIC/SPLIT. A run
    that goes on keeps its `id`, and so stays one run there.

    Nothing that it does wrong stops a run: it is dropped, with one warning.
    """

    def __init__(self, config: dict[str, Any], values: dict[str, Any], folder: Path, id: str | None = None):
        self.run = None
        with _warned(self), _somewhere_to_log(folder):
            import wandb

            os.environ.setdefault("WANDB_SILENT", "true")
            self.run = wandb.init(
                project=config["project"], name=folder.name, id=id, dir=str(folder), mode=config["mode"], config=values,
                group=values["algo"]["name"], settings=wandb.Settings(init_timeout=10, console="off", silent=True))
            self.run.define_metric("*", step_metric="step")
            self.run.log({}, commit=False)  # the first call is fifty times slower: not in a measured step

    def write(self, record: dict[str, Any]) -> None:
        if self.run:
            with _warned(self):
                self.run.log(flat(record))

    def close(self, status: str, summary: dict[str, Any]) -> None:
        if self.run:
            with _warned(self):
                self.run.summary.update({key: value for key, value in summary.items() if not isinstance(value, dict)})
                self.run.finish(exit_code=0 if status == "done" else 1)


def flat(record: dict[str, Any]) -> dict[str, Any]:
    """A line of metrics.jsonl as W&B names: {"loss/val": ..., "alignment_deg/fc1": ..., "alignment_deg/total": ...}."""
    split = record["split"]
    values = {"step": record["step"], "epoch": record["epoch"]}
    for key, value in record.items():
        if isinstance(value, (int, float)) and key not in values:
            values[f"{key}/{split}"] = value
    for layer, metrics in {**record.get("layers", {}), "total": record.get("total", {})}.items():
        values.update({f"{metric}/{layer}": value for metric, value in metrics.items()})
    return values


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


class _warned:
    def __init__(self, owner: Wandb):
        self.owner = owner

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if kind is not None and issubclass(kind, Exception):
            self.owner.run = None
            remedy = "" if "wandb" in sys.modules else "; pip install --upgrade wandb brings it"
            say(f"warning: W&B is off for this run ({kind.__name__}: {str(error).splitlines()[0] if str(error) else ''}); "
                f"metrics.jsonl has everything{remedy}")
            return True
        return False
