"""One run, from a configuration to a folder that says everything about it."""

from __future__ import annotations

import json
import traceback
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lbp import interrupt, ranks
from lbp.config import Config
from lbp.datasets.data import Arrays
from lbp.errors import ConfigError, DataError, Diverged, out_of_resources
from lbp.launch import folder as folders
from lbp.launch.ranks import spread
from lbp.launch.runs import find_run
from lbp.launch.sweep import refuse_alone
from lbp.launch.sync import wandb_id
from lbp.logs.console import Console, say
from lbp.logs.jsonl import Jsonl
from lbp.logs.wandb import Wandb, mode_of
from lbp.training import stages
from lbp.training.checkpoint import Checkpoints
from lbp.training.loop import Loop, epochs_of
from lbp.training.pipeline import Pipeline
from lbp.training.setup import Experiment, build


@dataclass
class Result:
    """What a run left: `summary` as in summary.json, its `folder`, and the trained `network` and `rule`."""

    summary: dict[str, Any]
    folder: Path
    network: Any
    rule: Any


class Logs:
    """Every logger of a run behind one; the first is the record. Of the first rank alone: elsewhere there are none."""

    def __init__(self, *logs):
        self.logs = logs

    def write(self, record: dict[str, Any]) -> None:
        for log in self.logs:
            log.write(record)

    def follow(self, state, steps: int, total: int, memory_mb) -> None:
        """What moves between records, for a live view: see logs.live."""
        if self.logs:
            self.logs[1].follow(state, steps, total, memory_mb)

    def length(self) -> int:
        return self.logs[0].length() if self.logs else 0

    def sync(self) -> None:
        self.logs[0].sync()

    def close(self, status: str, summary: dict[str, Any]) -> None:
        for log in self.logs:
            with suppress(OSError):
                log.close(status, summary)


def run(config: Config, arrays: Arrays | None = None) -> Result:
    """Builds, trains and records one run; its folder goes again where the configuration or the data is refused.

    Raises what lbp.errors names, and interrupt.Interrupted; STATUS and log.txt of the run's folder then say what happened.
    """
    if ranks.expected() > 1:
        raise ConfigError(f"lbp.run in each of {ranks.expected()} ranks would be as many runs; start one process with "
                          "launch.ranks=N, or torchrun ... -m lbp train KEY=VALUE")
    with interrupt.listening(command=False):
        place = create(config)
        experiment = start(config, place.folder, place, arrays=arrays)
    if experiment is None:  # other processes trained it
        from lbp.launch.trained import restored

        experiment, _ = restored(place.folder, "last", [])
    summary = json.loads((place.folder / "summary.json").read_text("utf-8"))
    return Result(summary, place.folder, experiment.network, experiment.rule)


def create(config: Config) -> folders.Place:
    """The folder of a new run. A run to begin with, by name, is looked up now, so that config.yaml says which it is."""
    source = config.values["run"]["init_from"]
    if source and not Path(source).is_file():
        source = find_run(source) / "checkpoints" / "last.pt"
    config.values["run"]["init_from"] = str(Path(source).absolute()) if source else None
    refuse_alone(config)
    with interrupt.deferred():
        place = folders.create(config)
    interrupt.answer(interrupt.asked())
    return place


def start(config: Config, folder: Path, place: folders.Place | folders.Earlier | None, world: int = 0,
          arrays: Arrays | None = None) -> Experiment | None:
    """Trains a run in its folder, new or not: here, or in as many processes as it takes (then there is no Experiment
    to return). `place`: what to take back where it is refused; `world`: ranks that an old one was trained by."""
    new = isinstance(place, folders.Place)
    try:
        count = world or how_many(config.values)
        if count > 1 and ranks.expected() == 1:
            if arrays is not None:
                raise ConfigError(f"launch.ranks={count}: other processes cannot see these arrays; write them by "
                                  "np.savez(PATH, x=x, y=y) and use dataset=files dataset.file=PATH")
            return spread(folder, count, new)
        return train(config, folder, arrays, new)
    except (ConfigError, DataError):
        if place:
            place.take_back()
        raise


def how_many(values: dict[str, Any]) -> int:
    """The number of ranks that launch.ranks asks for."""
    asked, started = values["launch"]["ranks"], ranks.expected()
    if started > 1 and asked not in ("auto", started):
        raise ConfigError(f"launch.ranks={asked}: {started} ranks were started from outside; use launch.ranks=auto")
    if started > 1 or asked != "auto":
        return started if started > 1 else asked
    on_gpu = values["trainer"]["device"] != "cpu" and torch.cuda.is_available()
    return max(1, torch.cuda.device_count()) if on_gpu else 1


def train(config: Config, folder: Path, arrays: Arrays | None = None, new: bool = True) -> Experiment:
    """This rank's part of a run: the whole where there is but one."""
    values, status, summary, log = config.values, "failed", {}, Logs()
    on_gpu = values["trainer"]["device"] != "cpu" and torch.cuda.is_available()
    ranks.join(values["launch"]["rank_timeout"], on_gpu)
    first = ranks.rank() == 0
    with folders.locked(folder) if first else nullcontext():
        content, problems = Checkpoints(folder / "checkpoints").latest() if first and not new else (None, [])
        try:
            if first:
                interrupt.last_words = lambda: folders.set_status(folder, "interrupted")
                folders.set_status(folder, "running")
            content = ranks.from_first(content)
            experiment = build(values, arrays, begun=content is not None)
            if stages.asked(values):
                experiment.stages = stages.plan(experiment, content and content["state"]["stages"])
            with interrupt.deferred():
                loop = (Pipeline if experiment.stages else Loop)(experiment, log, folder, content)  # what it refuses: before any log is opened
                if first:
                    log.logs = logs_of(config, experiment, folder, content, problems)
                found = loop.run()
                if first:
                    status = "done"
                    summary = {"status": status, **{kind: config.options[kind] for kind in ("algo", "dataset", "arch")},
                               "seed": values["seed"], **found}
                    folders.write_json(folder / "summary.json", summary)
                    for line in result_lines(summary, experiment.data.task.metrics, folder):
                        log.logs[1].line(line)
            return experiment
        except BaseException as error:
            status = ("diverged" if isinstance(error, Diverged) else
                      "interrupted" if isinstance(error, (KeyboardInterrupt, SystemExit)) or interrupt.asked() else "failed")
            if first and not (isinstance(error, (ConfigError, DataError)) and not log.logs):
                with suppress(OSError), open(folder / "log.txt", "a", encoding="utf-8") as file:
                    file.write(traceback.format_exc())
                error.add_note(f"lbp resume {folder} goes on" if status == "interrupted" and arrays is None else
                               f"the run's folder: {folder} (log.txt has the traceback)")
            if resource := out_of_resources(error, f"trainer.batch_size={values['trainer']['batch_size']}"):
                raise resource from error
            raise
        finally:
            if first:
                folders.set_status(folder, status)
            log.close(status, summary)
            ranks.leave()


def logs_of(config: Config, experiment: Experiment, folder: Path, content: dict[str, Any] | None, problems: list[str]) -> list:
    """Opens the logs, tells what is to be trained, and where it goes on."""
    values, task, before = config.values, experiment.data.task, _surroundings(folder)
    if experiment.data.read:
        folders.add_meta(folder, read=experiment.data.read)
    folders.describe(folder, experiment.environment, ranks.world())
    epochs = sum(epochs_of(phase, values["trainer"]) for phase in experiment.rule.phases())
    record = Jsonl(folder / "metrics.jsonl", content["state"]["lines"] if content else 0)
    console = Console(folder / "log.txt", epochs, task.metrics, experiment.data.val is not None,
                      values["logger"]["console"])
    interrupt.last_words = lambda: (folders.set_status(folder, "interrupted"), console.leave(0.5))
    for line in header(config, experiment, folder):
        console.line(line)
    for problem in problems:
        console.line(f"warning: passed over {problem}")
    if content:
        state = content["state"]
        console.line(f"goes on at step {state['step']}: epoch {state['epoch'] + 1}, batch {state['batch'] + 1}")
        other = [f"{key} {old} -> {new}" for (key, old), new in zip(before.items(), _surroundings(folder).values()) if old != new]
        if other:
            console.line(f"warning: no longer bit for bit what it would have been: {', '.join(other)}")
    logs = [record, console]
    if mode_of(values["logger"]["wandb"]["mode"]) != "disabled":
        logs.append(view := Wandb(values["logger"]["wandb"], values, config.options, folder, wandb_id(folder)))
        if view.mode == "online":
            console.line(f"W&B: {view.run.url}")
    return logs


def _surroundings(folder: Path) -> dict[str, Any]:
    """What the last bits of a result depend on."""
    meta = folders.meta(folder)
    return {"torch": meta.get("versions", {}).get("torch"), **{key: meta.get(key) for key in ("hardware", "device", "threads")}}


def dry_run(config: Config) -> None:
    """`lbp train --dry-run`: the resolved configuration and the table of blocks; writes nothing."""
    experiment = build(config.values)
    say(config.yaml().rstrip())
    for line in chosen_lines(config):
        say(line)
    say()
    rows = [("block", "output", "parameters")]
    for name, block in experiment.network.blocks.items():
        rows.append((name, "x".join(map(str, experiment.network.shapes[name])), f"{sum(p.numel() for p in block.parameters()):,}"))
    rows.append(("total", "", f"{sum(p.numel() for p in experiment.network.parameters()):,}"))
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    for row in rows:
        say(f"{row[0]:<{widths[0]}}  {row[1]:<{widths[1]}}  {row[2]:>{widths[2]}}")


def header(config: Config, experiment: Experiment, folder: Path) -> list[str]:
    values, groups = config.values, experiment.apply.optimizers
    parameters = sum(p.numel() for p in experiment.network.parameters())
    optimizer = ", ".join(f"{group} {values['optimizer']['name']} lr {o.param_groups[0]['lr']:g}" for group, o in groups.items())
    return [
        f"{config.options['algo']} on {experiment.data.described()}",
        f"{config.options['arch']}: {' - '.join('x'.join(map(str, s)) for s in experiment.network.shapes.values())}, "
        f"{parameters:,} parameters; {optimizer or 'no optimizer'}; seed {values['seed']}",
        experiment.environment.described(),
        *chosen_lines(config),
        *(experiment.stages.lines() if experiment.stages else ["each rank's norms see its own share of a batch alone"]
          if ranks.world() > 1 and any(b.is_floating_point() for b in experiment.network.buffers()) else []),
        *(["batch_coupled: small batches, ranks and accumulation change this rule's result"]
          if experiment.rule.facts.batch_coupled else []),
        f"run: {folder}",
    ]


def chosen_lines(config: Config) -> list[str]:
    """What was chosen by others than the user."""
    by: dict[str, list[str]] = {}
    for key, value, who in config.chosen:
        by.setdefault(who, []).append(f"{key}={value}")
    return [*(f"{who} chose {', '.join(what)}" for who, what in by.items()),
            *(f"{key}={value} of {source} fell away: it was for another option" for key, value, source in config.dropped)]


def result_lines(summary: dict[str, Any], metrics: Sequence[str], folder: Path) -> list[str]:
    metric, *others = metrics
    beside = "".join(f", {name} {summary[f'test_{name}']:.4f}" for name in others)
    best = f", of the best epoch ({summary['best_epoch']}) {summary[f'best_test_{metric}']:.4f}" if f"best_test_{metric}" in summary else ""
    idle = "; idle " + " | ".join(f"{stage['idle_share']:.1%}" for stage in summary["stages"]) if "stages" in summary else ""
    return [f"test {metric} {summary[f'test_{metric}']:.4f}{best}{beside}; {summary['train_s']:.1f} s of training{idle}", f"result: {folder}"]
