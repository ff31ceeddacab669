"""What a trained rule is worth: predictions on a split, and the summary of a run."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lbp import interrupt, ranks
from lbp.algos.rule import LearningRule
from lbp.datasets.data import Split
from lbp.datasets.task import Task
from lbp.errors import DataError, Diverged
from lbp.training import checkpoint
from lbp.training.environment import Environment
from lbp.training.progress import State
from lbp.training.setup import Experiment


@torch.no_grad()
def evaluate(rule: LearningRule, task: Task, split: Split, environment: Environment) -> dict[str, float]:
    """{"loss": mean over targets, metric: value, what else the task tells} of the rule's predictions. Raises Diverged where there are none."""
    rule.eval()
    loss, score, count = 0.0, 0.0, 0
    for x, y in split.passes():
        interrupt.poll()
        if not len(x):
            continue
        with environment.autocast():
            out = rule.predict(x)
        loss = loss + task.loss(out, y).double().sum()
        score = score + task.score(out, y)
        count += task.count(y)
    loss, score, count = ranks.sums(loss, score, count)
    if float(loss) != float(loss):
        raise Diverged("the loss of an evaluation is not a number: the weights have diverged; lower the learning rate")
    loss = float(loss) / count
    return {"loss": loss, **task.values(loss, score)}


def _best(folder: Path) -> dict[str, Tensor] | None:
    """The weights of best.pt; a damaged one costs a figure, not the run."""
    try:
        return checkpoint.load(folder / "checkpoints/best.pt")["rule"]
    except DataError as error:
        print(f"lbp: warning: no best_test: {error}", file=sys.stderr)
        return None


def summarise(experiment: Experiment, state: State, folder: Path) -> dict[str, Any]:
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
        best, result["best_epoch"] = found["test"], state.best_epoch
        if state.best_epoch != state.epoch and (content := ranks.from_first(_best(folder) if ranks.rank() == 0 else None)) is None:
            best = None
        elif state.best_epoch != state.epoch:
            last = {name: value.clone() if isinstance(value, Tensor) else value for name, value in rule.state_dict().items()}
            rule.load_state_dict(content)
            best = evaluate(rule, task, data.test, env)
            rule.load_state_dict(last)
        if best:
            result[f"best_test_{task.metric}"] = best[task.metric]
    train_s = state.train_s + state.epoch_s  # of an epoch that was cut short, too
    return result | {
        "parameters": sum(p.numel() for p in experiment.network.parameters()),
        "wall_s": state.wall_s, "train_s": train_s, "samples_per_s": (state.samples + state.targets) / max(train_s, 1e-9),
        "metrics_share": state.measure_s / max(train_s, 1e-9), "peak_memory_mb": max(ranks.gathered(env.peak_memory_mb())[0]),
        "flops_per_sample": state.flops_per_sample, "world_size": ranks.world(), "device": str(env.device),
        "layers": state.layers, "total": state.total, **({"nonfinite_batches": state.nonfinite} if state.nonfinite else {}),
    }
