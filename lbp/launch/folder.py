"""A run's folder: made exclusively, and the truth about the run."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Iterator

import yaml

from lbp.config import Config, slug
from lbp.errors import ConfigError, DataError
from lbp.logs.jsonl import plain


@dataclass
class Place:
    """The folder of a new run, and what was made for it, from the outermost on."""

    folder: Path
    made: list[Path]

    def take_back(self) -> None:
        """Takes everything back, where nothing was run."""
        if (self.folder / "metrics.jsonl").exists():
            return
        shutil.rmtree(self.folder, ignore_errors=True)
        with suppress(OSError):
            for path in reversed(self.made[:-1]):
                path.rmdir()


class Earlier:
    """What of a run is written anew when it goes on, as it was before."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.record = self._recorded()
        self.files = {name: (folder / name).read_bytes() if (folder / name).exists() else None
                      for name in ("config.yaml", "meta.json", "summary.json", "STATUS")}

    def _recorded(self) -> tuple[int, int]:
        with suppress(OSError):
            found = (self.folder / "metrics.jsonl").stat()
            return found.st_size, found.st_mtime_ns
        return 0, 0

    def take_back(self) -> None:
        """Puts everything back, where the run did not go on."""
        if self._recorded() == self.record:
            for name, content in self.files.items():
                if content is None:
                    (self.folder / name).unlink(missing_ok=True)
                else:
                    whole(self.folder / name, content)


def create(config: Config) -> Place:
    """A new folder `outputs/DATE/TIME-ALGO-DATASET-sSEED-SUFFIX`, or `run.dir`, with the configuration in it.

    Raises ConfigError if it is taken or cannot be made."""
    values, run, now = config.values, config.values["run"], datetime.now()
    name = slug(run["name"] or f"{config.options['algo']}-{config.options['dataset']}")
    folder = Path(run["dir"]) if run["dir"] else (
        Path("outputs") / f"{now:%Y-%m-%d}" / f"{now:%H%M%S}-{name}-s{values['seed']}-{secrets.token_hex(3)}")
    place = Place(folder, [p for p in reversed((folder, *folder.parents)) if not p.exists()])
    try:
        folder.mkdir(parents=True)
        set_status(folder, "interrupted")  # until training begins
        (folder / "overrides.yaml").write_text(yaml.safe_dump(config.typed), encoding="utf-8")
        add_meta(folder, id=secrets.token_hex(8))
        write(config, folder)
    except FileExistsError:
        raise ConfigError(f"run.dir={folder}: exists already, and no run is ever overwritten; choose another, "
                          "or go on with it by lbp resume") from None
    except OSError as error:
        raise ConfigError(f"{folder}: the run's folder cannot be made ({error.strerror}); set run.dir") from None
    return place


def write(config: Config, folder: Path) -> None:
    """In meta.json how the configuration came about, and config.yaml: the last, for a folder that has it is a run."""
    add_meta(folder, options=config.options, chosen=config.chosen, dropped=config.dropped)
    text(folder / "config.yaml", config.yaml())


def read(folder: Path) -> Config:
    """The configuration as it was written: neither composed nor checked again. Raises DataError."""
    try:
        how = meta(folder)
        values = yaml.safe_load((folder / "config.yaml").read_text("utf-8"))
        typed = yaml.safe_load((folder / "overrides.yaml").read_text("utf-8"))
        return Config(values, how["options"], typed, *([tuple(row) for row in how[key]] for key in ("chosen", "dropped")))
    except (OSError, ValueError, KeyError, yaml.YAMLError) as error:
        raise DataError(f"{folder}: its config.yaml, meta.json or overrides.yaml is missing, damaged, or of another lbp "
                        f"({type(error).__name__}: {error}); lbp rerun starts the experiment over") from None


def describe(folder: Path, environment, world: int) -> None:
    """In meta.json: with what the run is computed."""
    import torch

    from lbp.training.environment import hardware, versions

    add_meta(folder, versions=versions(), git=git(), hardware=hardware(environment.device), device=str(environment.device),
             ranks=world, threads=torch.get_num_threads(), precision=environment.precision,
             determinism={"level": environment.determinism, "caveats": list(environment.caveats)},
             flush_denormal=environment.device.type == "cpu", started=datetime.now().astimezone().isoformat())


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds the folder while a run writes into it; the system lets go of it when the process ends, however it does.

    Raises ConfigError where another process holds it."""
    from filelock import FileLock, Timeout

    lock = FileLock(folder / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise ConfigError(f"{folder}: another process is training this run; wait for it, or stop it first") from None
    try:
        yield
    finally:
        lock.release()


def status(folder: Path) -> str:
    with suppress(OSError):
        return (folder / "STATUS").read_text().strip()
    return "running"


def set_status(folder: Path, status: str) -> None:
    """running | done | failed | interrupted | diverged"""
    with suppress(OSError):  # a full disk: the error itself is told elsewhere
        text(folder / "STATUS", status + "\n")


def text(path: Path, content: str) -> None:
    """Writes a file of text, whole or not at all."""
    whole(path, content.encode("utf-8"))


def whole(path: Path, content: bytes) -> None:
    """Writes a file, whole or not at all: what was there stays where it fails."""
    beside = path.with_name(path.name + ".tmp")
    try:
        beside.write_bytes(content)
        os.replace(beside, path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        error.filename = str(path)
        raise


def write_json(path: Path, content: dict[str, Any]) -> None:
    text(path, json.dumps(plain(content), indent=1) + "\n")


def meta(folder: Path) -> dict[str, Any]:
    path = folder / "meta.json"
    return json.loads(path.read_text("utf-8")) if path.exists() else {}


def add_meta(folder: Path, **more: Any) -> None:
    write_json(folder / "meta.json", meta(folder) | more)


def git() -> dict[str, str] | None:
    """Commit and uncommitted changes of the repository that lbp runs from; None when it is installed."""
    def ask(*command: str) -> str:
        return subprocess.run(["git", *command], cwd=Path(__file__).parent, capture_output=True, text=True,
                              check=True, timeout=10).stdout

    try:
        return {"commit": ask("rev-parse", "HEAD").strip(), "diff": ask("diff", "HEAD", "--", ".", ":/conf")[:1_000_000]}
    except (OSError, subprocess.SubprocessError):
        return None
