"""The loop: phases, epochs, batches. It knows nothing of any rule."""

from __future__ import annotations

import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lbp.algos.rule import LearningRule, Phase
from lbp.datasets.data import Split
from lbp.errors import Diverged
from lbp.metrics.measure import Measure
from lbp.training import checkpoint
from lbp.training.environment import Environment, seed_all
from lbp.training.optim import schedule
from lbp.training.setup import Experiment


@dataclass
class State:
    """Where a run stands."""

    step: int = 0
    epoch: int = 0
    samples: int = 0
    train_s: float = 0.0
    measure_s: float = 0.0
    flops_per_sample: float | None = None
    best: float | None = None
    best_epoch: int | None = None
    layers: dict[str, dict[str, float]] = field(default_factory=dict)
    total: dict[str, float] = field(default_factory=dict)
    train: dict[str, float] = field(default_factory=dict)


def train(experiment: Experiment, log, folder: Path) -> dict[str, Any]:
    """Trains to the end and returns the summary of results. `log.write(record)` receives every line of metrics.jsonl."""
    from torch.utils.flop_counter import FlopCounterMode  # imported here: it costs a second, and none of it is a step's

    values, data, rule, apply = experiment.values, experiment.data, experiment.rule, experiment.apply
    env, task, trainer = experiment.environment, experiment.data.task, experiment.values["trainer"]
    started, state, measure = time.monotonic(), State(), Measure(rule, task)
    deadline = started + 60 * trainer["max_minutes"] if trainer["max_minutes"] else float("inf")
    phases = rule.phases()
    epochs = [1 if phase.fit else trainer["epochs"] if phase.epochs is None else phase.epochs for phase in phases]
    total_steps = data.train.steps * sum(n for phase, n in zip(phases, epochs) if not phase.fit)
    factor = schedule(values["schedule"], data.train.steps, total_steps)
    schedulers = [torch.optim.lr_scheduler.LambdaLR(o, factor) for o in apply.optimizers.values()]
    seed_all(values["seed"], "training")

    def measuring() -> bool:
        every = values["metrics"]["every"]
        return bool(every) and (state.step in (0, total_steps - 1) or (state.step + 1) % every == 0)

    def learn_epoch(phase: Phase) -> None:
        """One pass over the training data."""
        losses, scores, batches, began, warm_up = 0.0, 0.0, 0, time.perf_counter(), 0.0
        for x, y in data.train.batches(state.epoch):
            measured, first = measuring(), state.flops_per_sample is None
            if measured:
                tick = time.perf_counter()
                with env.autocast():
                    measure.before(x, y)
                apply.observe = measure.collect
                state.measure_s += time.perf_counter() - tick
            apply.count = task.count(y)
            counter = FlopCounterMode(display=False) if first and not trainer["compile"] else nullcontext()
            with counter, env.autocast():
                learned = phase.learn(x, y, apply)
            apply.finish(learned.loss)
            apply.observe = None
            for scheduler in schedulers:
                scheduler.step()
            state.step += 1
            batches += apply.count
            losses += learned.loss.sum()
            if learned.out is not None:
                scores += task.score(learned.out, y)
            if first:
                state.flops_per_sample = counter.get_total_flops() / len(x) if not trainer["compile"] else None
                if trainer["compile"]:
                    env.synchronize()
                    warm_up, state.flops_per_sample = time.perf_counter() - began, float("nan")
            if measured:
                tick = time.perf_counter()
                record = {"step": state.step, "epoch": state.epoch + 1, "split": "train", "phase": phase.name,
                          "loss": float(learned.loss.sum()) / apply.count, **measure.record(learned.blocks)}
                if learned.out is not None:
                    record[task.metric] = task.metric_value(task.score(learned.out, y))
                for layer, found in record["layers"].items():
                    state.layers.setdefault(layer, {}).update(found)
                state.total.update(record.get("total", {}))
                state.measure_s += time.perf_counter() - tick
                log.write(record)
            if time.monotonic() > deadline:
                break
        env.synchronize()
        seconds = time.perf_counter() - began - warm_up
        state.train = {"loss": float(losses) / batches}
        if isinstance(scores, Tensor):
            state.train[task.metric] = task.metric_value(scores)
        state.samples += batches
        state.train_s += seconds
        state.epoch += 1
        log.write({"step": state.step, "epoch": state.epoch, "split": "train_epoch", "phase": phase.name, **state.train,
                   "samples_per_s": batches / seconds, "learning_rate": schedulers[0].get_last_lr()[0]})

    def fit(phase: Phase) -> None:
        """A phase that solves: the rule runs over the data as often as it needs."""
        began = time.perf_counter()
        counter = FlopCounterMode(display=False)
        with counter:
            phase.fit(data.train.passes)
        env.synchronize()
        state.train_s += time.perf_counter() - began
        state.samples += len(data.train)
        state.epoch += 1
        state.flops_per_sample = counter.get_total_flops() / len(data.train)
        state.train = evaluate(rule, task, data.train, env)
        log.write({"step": state.step, "epoch": state.epoch, "split": "train_epoch", "phase": phase.name, **state.train})

    for phase, count in zip(phases, epochs):
        since_best = 0
        for _ in range(count):
            rule.train()
            fit(phase) if phase.fit else learn_epoch(phase)
            content = {"rule": rule.state_dict(), "step": state.step, "epoch": state.epoch}
            checkpoint.save(folder / "checkpoints/last.pt", content)
            if data.val:
                found = evaluate(rule, task, data.val, env)
                log.write({"step": state.step, "epoch": state.epoch, "split": "val", **found})
                if state.best is None or found[task.metric] > state.best:
                    state.best, state.best_epoch, since_best = found[task.metric], state.epoch, 0
                    checkpoint.save(folder / "checkpoints/best.pt", content)
                else:
                    since_best += 1
            stop = trainer["patience"] and phase.epochs is None and since_best >= trainer["patience"]
            if stop or time.monotonic() > deadline:
                break
        if time.monotonic() > deadline:
            break
    return _summary(experiment, state, folder, log, started)


@torch.no_grad()
def evaluate(rule: LearningRule, task, split: Split, env: Environment) -> dict[str, float]:
    """{"loss": mean over targets, metric: value} of the rule's predictions on a split."""
    rule.eval()
    losses, scores, count = 0.0, 0.0, 0
    for x, y in split.passes():
        with env.autocast():
            out = rule.predict(x)
        losses = losses + task.loss(out, y).double().sum()
        scores = scores + task.score(out, y)
        count += task.count(y)
    loss = float(losses) / count
    if loss != loss:
        raise Diverged("the loss of an evaluation is not a number: the weights have diverged; lower the learning rate")
    return {"loss": loss, task.metric: task.metric_value(scores)}


def _summary(experiment: Experiment, state: State, folder: Path, log, started: float) -> dict[str, Any]:
    """The final weights on every split, and the best epoch's on the test split."""
    values, data, rule, env = experiment.values, experiment.data, experiment.rule, experiment.environment
    task = data.task
    found = {split: evaluate(rule, task, part, env) for split, part in (("val", data.val), ("test", data.test)) if part}
    result: dict[str, Any] = {"epochs": state.epoch, "steps": state.step}
    for split, metrics in {"train": state.train, **found}.items():
        result.update({f"{split}_{name}": value for name, value in metrics.items()})
    record = {"step": state.step, "epoch": state.epoch, "split": "test", **found["test"]}
    if state.best_epoch is not None:
        best = found["test"]
        if state.best_epoch != state.epoch:
            last = {name: value.clone() if isinstance(value, Tensor) else value for name, value in rule.state_dict().items()}
            rule.load_state_dict(checkpoint.load(folder / "checkpoints/best.pt")["rule"])
            best = evaluate(rule, task, data.test, env)
            rule.load_state_dict(last)
        result |= {"best_epoch": state.best_epoch, f"best_test_{task.metric}": best[task.metric]}
        record[f"best_{task.metric}"] = best[task.metric]
    log.write(record)
    flops = state.flops_per_sample
    return result | {
        "parameters": sum(p.numel() for p in experiment.network.parameters()),
        "wall_s": time.monotonic() - started, "train_s": state.train_s,
        "samples_per_s": state.samples / state.train_s if state.train_s else None,
        "metrics_share": state.measure_s / state.train_s if state.train_s else None,
        "peak_memory_mb": env.peak_memory_mb(), "flops_per_sample": flops if flops == flops else None,
        "world_size": 1, "device": str(env.device), "layers": state.layers, "total": state.total,
    }
