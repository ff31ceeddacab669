"""Going on with a run that was stopped: in its folder, with its settings, as if it had never stopped."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any, Iterator

from lbp import ranks, registry
from lbp.config import Config, compose
from lbp.errors import ConfigError
from lbp.knobs import show
from lbp.launch import folder as folders
from lbp.logs.console import say
from lbp.training import stages
from lbp.training.checkpoint import Checkpoints

BUDGET = ("trainer.epochs", "trainer.max_minutes", "trainer.patience")
FREE = (*BUDGET, "trainer.checkpoint_every", "trainer.on_nonfinite", "launch.rank_timeout")  # and logger.*: they change no number


def prepare(run: Path, overrides: list[str]) -> tuple[Config, int] | None:
    """The configuration to go on with and the number of ranks (0: as for a new run), or None for a run that is done.

    Raises ConfigError with every setting that differs from those that the run was trained with, DataError where its
    checkpoints are damaged."""
    config = compose(overrides, run / "config.yaml")
    content, damaged = Checkpoints(run / "checkpoints").latest()
    if content:
        before = content["values"]
    else:
        before = compose([], run / "config.yaml").values
    changed = {key: (old, new) for key, old, new in differences(before, config.values)}
    free = [key for key in FREE if key != "trainer.on_nonfinite" or not stages.asked(before)]   # of a pipeline it has one value
    problems = [f"{key}={show(new)}: the run was trained with {show(old)}" for key, (old, new) in changed.items()
                if key not in free and not key.startswith("logger.")]
    if problems:
        raise ConfigError(*problems, f"a run goes on with its own settings; free are {', '.join(free)}, logger.*; for another "
                          f"experiment use lbp rerun {run} KEY=VALUE, or lbp train run.init_from={run}")
    old, new = changed.get("trainer.epochs", (0, 0))
    if new < old:
        raise ConfigError(f"trainer.epochs={new}: the run is to have {old} epochs already; give more, or leave it out")
    if new > old and config.values["schedule"]["name"] != "constant":
        say(f"schedule={config.values['schedule']['name']} is from now on that of {new} epochs")
    if folders.status(run) == "done" and not set(changed) & set(BUDGET) and not damaged:  # what was damaged is trained again
        say(f"{run}: done already, after {content['state']['epoch'] if content else 0} epochs{_longer(run, config, content)}")
        return None
    if folders.status(run) == "done" and content and not damaged and _settled(config.values["trainer"], content["state"]):
        raise ConfigError(f"trainer.patience={config.values['trainer']['patience']}: ended the run, which had no better epoch for so many; "
                          f"lbp resume {run} trainer.patience=N trains it for longer")
    world = len(content["ranks"]) if content else 0
    if world and ranks.expected() not in (1, world):
        raise ConfigError(f"--nproc-per-node: {ranks.expected()} ranks were started, but the run was trained by {world} and goes on with as many")
    written = folders.read(run)
    config = Config(config.values, written.options, written.typed, written.chosen, written.dropped)
    return config, world


def _longer(run: Path, config: Config, content: dict[str, Any] | None) -> str:
    """How to train on, if there is a way. Phases that are over have had their epochs."""
    trainer, state = config.values["trainer"], content["state"] if content else {}
    if trainer["max_minutes"] and state.get("wall_s", 0) > 60 * trainer["max_minutes"]:
        key = "max_minutes"
    elif _settled(trainer, state):
        key = "patience"
    elif state.get("phase") or registry.entry("algo", config.values["algo"]["name"]).facts.get("closed_form"):
        return ""
    else:
        key = "epochs"
    return f"; lbp resume {run} trainer.{key}=N trains it for longer"


def _settled(trainer: dict[str, Any], state: dict[str, Any]) -> bool:
    """Whether trainer.patience is over."""
    return bool(trainer["patience"]) and state.get("without_gain", 0) >= trainer["patience"]


def resume(run: Path, overrides: list[str]) -> tuple[Config, Path, folders.Earlier, int] | None:
    """`lbp resume`: what one.start takes, or None for a run that is done."""
    with folders.locked(run):
        prepared = prepare(run, overrides)
        if not prepared:
            return None
        (config, world), earlier = prepared, folders.Earlier(run)
        again(run, config, overrides)
    return config, run, earlier, world


def again(run: Path, config: Config, overrides: list[str]) -> None:
    """Writes down what changed, and takes back the result of a run that goes on."""
    folders.text(run / "config.yaml", config.yaml())
    (run / "summary.json").unlink(missing_ok=True)
    earlier = folders.meta(run).get("resumed", [])
    folders.add_meta(run, resumed=[*earlier, {"at": datetime.now().astimezone().isoformat(), "overrides": overrides}])


def differences(old: Any, new: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(key, old value, new value) of each setting that is not the same in two maps of settings."""
    if isinstance(old, dict) and isinstance(new, dict):
        for name in dict.fromkeys((*old, *new)):
            yield from differences(old.get(name), new.get(name), f"{key}.{name}" if key else name)
    elif old != new or type(old) is not type(new):
        yield key, old, new
