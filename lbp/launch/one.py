"""One run, from a configuration to a folder that says everything about it."""

from __future__ import annotations

import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lbp.config import Config
from lbp.datasets.data import Arrays
from lbp.errors import Diverged
from lbp.launch import folder as folders
from lbp.logs.console import Console, say
from lbp.logs.jsonl import Jsonl
from lbp.logs.wandb import Wandb
from lbp.training.loop import epochs_of, train as train_loop
from lbp.training.setup import Experiment, build


@dataclass
class Result:
    """What a run left: `summary` as in summary.json, its `folder`, and the trained `network` and `rule`."""

    summary: dict[str, Any]
    folder: Path
    network: Any
    rule: Any


class Logs:
    """Every logger of a run behind one `write` and one `close`."""

    def __init__(self, *logs):
        self.logs = logs

    def write(self, record: dict[str, Any]) -> None:
        for log in self.logs:
            log.write(record)

    def close(self, status: str, summary: dict[str, Any]) -> None:
        for log in self.logs:
            log.close(status, summary)


def run(config: Config, arrays: Arrays | None = None) -> Result:
    """Builds, trains and records one run. Nothing is written before everything is built.

    Raises what lbp.errors names; STATUS and log.txt of the run's folder then say what happened.
    """
    values = config.values
    experiment = build(values, arrays)
    folder = folders.create(config)
    folders.set_status(folder, "running")
    folders.describe(folder, config, experiment.environment)
    trainer, task = values["trainer"], experiment.data.task
    epochs = sum(epochs_of(phase, trainer) for phase in experiment.rule.phases())
    console = Console(folder / "log.txt", epochs, task.metric, experiment.data.val is not None,
                      quiet=values["logger"]["console"] == "off")
    for line in header(config, experiment, folder):
        console.line(line)
    logs = [Jsonl(folder / "metrics.jsonl"), console]
    if values["logger"]["wandb"]["mode"] != "disabled":
        logs.append(Wandb(values["logger"]["wandb"], values, folder))
    log, status, summary = Logs(*logs), "failed", {}
    try:
        found = train_loop(experiment, log, folder)
        status = "done"
        summary = {"status": status, **{kind: config.options[kind] for kind in ("algo", "dataset", "arch")},
                   "seed": values["seed"], **found}
        folders.write_json(folder / "summary.json", summary)
        for line in result_lines(summary, task.metric, folder):
            console.line(line)
    except BaseException as error:
        status = ("diverged" if isinstance(error, Diverged) else
                  "interrupted" if isinstance(error, (KeyboardInterrupt, SystemExit)) else "failed")
        console.file.write(traceback.format_exc())
        error.add_note(f"the run's folder: {folder} (log.txt has the traceback)")
        raise
    finally:
        log.close(status, summary)
        folders.set_status(folder, status)
    return Result(summary, folder, experiment.network, experiment.rule)


def train(config: Config) -> None:
    """`lbp train`: one run."""
    run(config)


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


def result_lines(summary: dict[str, Any], metric: str, folder: Path) -> list[str]:
    best = f", of the best epoch ({summary['best_epoch']}) {summary[f'best_test_{metric}']:.4f}" if "best_epoch" in summary else ""
    return [f"test {metric} {summary[f'test_{metric}']:.4f}{best}; {summary['train_s']:.1f} s of training", f"result: {folder}"]
