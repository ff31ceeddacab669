"""What a trained rule is worth: predictions on a split, and the summary of a run."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lbp.algos.rule import LearningRule
from lbp.datasets.data import Split
from lbp.datasets.task import Task
from lbp.errors import Diverged
from lbp.training import checkpoint
from lbp.training.environment import Environment
from lbp.training.setup import Experiment


@dataclass
class State:
    """Where a run stands. Times in seconds; `layers` and `total` hold what was measured last."""

    step: int = 0
    epoch: int = 0
    samples: int = 0
    train_s: float = 0.0
    measure_s: float = 0.0
    flops_per_sample: float | None = None
    best: float | None = None
    best_epoch: int | None = None
    train: dict[str, float] = field(default_factory=dict)
    layers: dict[str, dict[str, float]] = field(default_factory=dict)
    total: dict[str, float] = field(default_factory=dict)


@torch.no_grad()
def evaluate(rule: LearningRule, task: Task, split: Split, environment: Environment) -> dict[str, float]:
    """{"loss": mean over targets, metric: value} of the rule's predictions. Raises Diverged where there are none."""
    rule.eval()
    loss, score, count = 0.0, 0.0, 0
    for x, y in split.passes():
        with environment.autocast():
            out = rule.predict(x)
        loss = loss + task.loss(out, y).double().sum()
        score = score + task.score(out, y)
        count += task.count(y)
    if float(loss) != float(loss):
        raise Diverged("the loss of an evaluation is not a number: the weights have diverged; lower the learning rate")
    return {"loss": float(loss) / count, task.metric: task.metric_value(score)}


def summarise(experiment: Experiment, state: State, folder: Path, wall_s: float) -> dict[str, Any]:
    """The final weights on every split, and those of the best epoch on the test split."""
    data, rule, env = experiment.data, experiment.rule, experiment.environment
    task = data.task
    found = {"train": state.train}
    for split, part in (("val", data.val), ("test", data.test)):
        if part:
            found[split] = evaluate(rule, task, part, env)
    result = {"epochs": state.epoch, "steps": state.step,
              **{f"{split}_{name}": value for split, metrics in found.items() for name, value in metrics.items()}}
    if state.best_epoch is not None:
        best = found["test"]
        if state.best_epoch != state.epoch:
            last = {name: value.clone() if isinstance(value, Tensor) else value for name, value in rule.state_dict().items()}
            rule.load_state_dict(checkpoint.load(folder / "checkpoints/best.pt")["rule"])
            best = evaluate(rule, task, data.test, env)
            rule.load_state_dict(last)
        result |= {"best_epoch": state.best_epoch, f"best_test_{task.metric}": best[task.metric]}
    return result | {
        "parameters": sum(p.numel() for p in experiment.network.parameters()),
        "wall_s": wall_s, "train_s": state.train_s, "samples_per_s": state.samples / max(state.train_s, 1e-9),
        "metrics_share": state.measure_s / max(state.train_s, 1e-9), "peak_memory_mb": env.peak_memory_mb(),
        "flops_per_sample": state.flops_per_sample, "world_size": 1, "device": str(env.device),
        "layers": state.layers, "total": state.total,
    }
