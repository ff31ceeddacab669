"""A run's folder: made exclusively, and the truth about the run."""

from __future__ import annotations

import json
import secrets
import subprocess
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
import yaml

from lbp.config import Config, slug
from lbp.errors import ConfigError
from lbp.logs.jsonl import plain
from lbp.training.environment import Environment, hardware, versions


def create(config: Config) -> Path:
    """A new folder `outputs/DATE/TIME-ALGO-DATASET-sSEED-SUFFIX`, or `run.dir`. Raises ConfigError if that is taken."""
    values, run, now = config.values, config.values["run"], datetime.now()
    name = slug(run["name"] or f"{config.options['algo']}-{config.options['dataset']}")
    folder = Path(run["dir"]) if run["dir"] else (
        Path("outputs") / f"{now:%Y-%m-%d}" / f"{now:%H%M%S}-{name}-s{values['seed']}-{secrets.token_hex(3)}")
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        raise ConfigError(f"run.dir={folder}: exists already, and no run is ever overwritten; choose another") from None
    except OSError as error:
        raise ConfigError(f"{folder}: the run's folder cannot be made ({error.strerror}); set run.dir") from None
    return folder


def describe(folder: Path, config: Config, environment: Environment) -> None:
    """Writes config.yaml, overrides.yaml and meta.json."""
    (folder / "config.yaml").write_text(config.yaml(), encoding="utf-8")
    (folder / "overrides.yaml").write_text(yaml.safe_dump(config.typed), encoding="utf-8")
    write_json(folder / "meta.json", {
        "versions": versions(), "git": git(), "hardware": hardware(environment.device), "device": str(environment.device),
        "threads": torch.get_num_threads(), "precision": environment.precision,
        "determinism": {"level": environment.determinism, "caveats": list(environment.caveats)},
        "flush_denormal": environment.device.type == "cpu", "started": datetime.now().astimezone().isoformat()})


def set_status(folder: Path, status: str) -> None:
    """running | done | failed | interrupted | diverged"""
    (folder / "STATUS").write_text(status + "\n")


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(plain(content), indent=1) + "\n", encoding="utf-8")


def git() -> dict[str, str] | None:
    """Commit and uncommitted changes of the repository that lbp runs from; None when it is installed."""
    def ask(*command: str) -> str:
        return subprocess.run(["git", *command], cwd=Path(__file__).parent, capture_output=True, text=True,
                              check=True, timeout=10).stdout

    try:
        return {"commit": ask("rev-parse", "HEAD").strip(), "diff": ask("diff", "HEAD", "--", ".", ":/conf")[:1_000_000]}
    except (OSError, subprocess.SubprocessError):
        return None
