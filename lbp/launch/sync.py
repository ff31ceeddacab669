"""`lbp sync`: a run's whole record as one run in Weights & Biases, in place of whatever was there of it."""

from __future__ import annotations

import json
import os
from pathlib import Path

from lbp.errors import LbpError
from lbp.launch import folder as folders
from lbp.logs import wandb
from lbp.logs.console import say

SEND = 600.0    # seconds that sending may take


def sync(run: Path, project: str | None = None, mode: str = "auto") -> None:
    """Replays metrics.jsonl: online where there is a key, else into RUN/wandb. Raises LbpError where W&B fails."""
    config = folders.read(run)
    with folders.locked(run):
        status, path = folders.status(run), run / "summary.json"
        summary = json.loads(path.read_text("utf-8")) if path.exists() else {}
        count = sum(1 for _ in wandb.lines(run / "metrics.jsonl"))
        settings = {"project": project or config.values["logger"]["wandb"]["project"], "mode": {"disabled": "offline"}.get(found := wandb.mode_of(mode), found)}
        log = wandb.Wandb(settings, config.values, config.options, run, wandb_id(run))
        there = getattr(log.run, "url", None) if log.mode == "online" else log.run and str(Path(log.run.dir).parent)
        log.close(status, summary, SEND)
    if log.mode == "off":
        raise LbpError(f"{run}: nothing was sent ({wandb.said(log.problem)}); try again, or use lbp sync --offline")
    if log.mode == "online":
        say(f"{run}: {count:,} lines, {status}, are at {there}")
    else:
        say(f"{run}: {count:,} lines, {status}, are in {there}; wandb sync {there} sends them, and so does lbp sync where there is "
            "a key (WANDB_API_KEY, or wandb login)")


def wandb_id(run: Path) -> str:
    """The run's id there, for good: its own, or that which a W&B sweep's agent chose for it."""
    meta = folders.meta(run)
    if "wandb_id" not in meta and os.environ.get("WANDB_SWEEP_ID") and os.environ.get("WANDB_RUN_ID") and not meta.get("resumed"):
        folders.add_meta(run, wandb_id=os.environ["WANDB_RUN_ID"])
        return os.environ["WANDB_RUN_ID"]
    return meta.get("wandb_id") or meta.get("id") or run.name
