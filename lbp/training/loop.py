"""The loop: phases, epochs, batches. It knows nothing of any rule."""

from __future__ import annotations

import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from torch import Tensor

from lbp.algos.rule import Learned, Phase
from lbp.errors import Diverged
from lbp.metrics.measure import Measure
from lbp.training import checkpoint
from lbp.training.environment import seed_all
from lbp.training.optim import schedule
from lbp.training.results import State, evaluate, summarise
from lbp.training.setup import Experiment


def epochs_of(phase: Phase, trainer: dict[str, Any]) -> int:
    return 1 if phase.fit else trainer["epochs"] if phase.epochs is None else phase.epochs


def train(experiment: Experiment, log, folder: Path) -> dict[str, Any]:
    """Trains to the end and returns the summary of results. `log.write(record)` receives every line of metrics.jsonl."""
    from torch.utils.flop_counter import FlopCounterMode  # here: importing it costs a second, which is no step's time

    data, rule, apply, env = experiment.data, experiment.rule, experiment.apply, experiment.environment
    task, trainer, every = data.task, experiment.values["trainer"], experiment.values["metrics"]["every"]
    started, state, measure = time.perf_counter(), State(), Measure(rule, task)
    deadline = started + 60 * trainer["max_minutes"] if trainer["max_minutes"] else float("inf")
    phases = [(phase, epochs_of(phase, trainer)) for phase in rule.phases()]
    total_steps = data.train.steps * sum(epochs for phase, epochs in phases if not phase.fit)
    factor = schedule(experiment.values["schedule"], data.train.steps, total_steps)
    seed_all(experiment.values["seed"], "training")

    def learn(phase: Phase) -> None:
        """One epoch of batches."""
        began, loss, score, targets, warm_up = time.perf_counter(), 0.0, 0.0, 0, 0.0
        for x, y in data.train.batches(state.epoch):
            measuring = every and ((state.step + 1) % every == 0 or state.step in (0, total_steps - 1))
            if measuring:
                state.measure_s -= time.perf_counter()
                with env.autocast():
                    measure.before(x, y)
                apply.observe = measure.collect
                state.measure_s += time.perf_counter()
            first, apply.count = state.step == 0, task.count(y)
            # A compiled block runs no operation that could be counted.
            counter = FlopCounterMode(display=False) if first and not trainer["compile"] else nullcontext()
            apply.learning_rates(factor(state.step))
            with counter, env.autocast():
                learned = phase.learn(x, y, apply)
            learned.loss = learned.loss.sum()
            apply.finish(learned.loss)
            state.step += 1
            targets += apply.count
            loss += learned.loss
            if learned.out is not None:
                score += task.score(learned.out, y)
            if first and trainer["compile"]:
                env.synchronize()
                warm_up = time.perf_counter() - began
            elif first:
                state.flops_per_sample = counter.get_total_flops() / len(x)
            if measuring:
                state.measure_s -= time.perf_counter()
                apply.observe = None
                log.write(measured(phase, learned, y))
                state.measure_s += time.perf_counter()
            if time.perf_counter() > deadline:
                break
        env.synchronize()
        seconds = time.perf_counter() - began - warm_up
        state.train_s += seconds
        state.samples += targets
        state.train = {"loss": float(loss) / targets}
        if isinstance(score, Tensor):
            state.train[task.metric] = task.metric_value(score)
        ended(phase, samples_per_s=targets / seconds, learning_rate_factor=factor(state.step - 1))

    def measured(phase: Phase, learned: Learned, y: Tensor) -> dict[str, Any]:
        record = {"step": state.step, "epoch": state.epoch + 1, "split": "train", "phase": phase.name,
                  "loss": float(learned.loss) / apply.count}
        if learned.out is not None:
            record[task.metric] = task.metric_value(task.score(learned.out, y))
        record |= measure.record(learned.blocks)
        for layer, values in record["layers"].items():
            state.layers.setdefault(layer, {}).update(values)
        state.total.update(record["total"])
        return record

    def fit(phase: Phase) -> None:
        """A phase that solves: the rule runs over the data as often as it needs."""
        began, counter = time.perf_counter(), FlopCounterMode(display=False)
        with counter:
            phase.fit(data.train.passes)
        env.synchronize()
        state.train_s += time.perf_counter() - began
        state.samples += len(data.train)
        state.flops_per_sample = counter.get_total_flops() / len(data.train)
        state.train = evaluate(rule, task, data.train, env)
        ended(phase)

    def ended(phase: Phase, **values: float) -> None:
        state.epoch += 1
        log.write({"step": state.step, "epoch": state.epoch, "split": "train_epoch", "phase": phase.name,
                   **state.train, **values})

    for phase, epochs in phases:
        without_gain = 0
        for _ in range(epochs):
            rule.train()
            try:
                fit(phase) if phase.fit else learn(phase)
            except Diverged as error:
                error.add_note(f"at step {state.step + 1}, in epoch {state.epoch + 1}"
                               + (f"; checkpoints/last.pt holds epoch {state.epoch}" if state.epoch else ""))
                raise
            content = {"rule": rule.state_dict(), "step": state.step, "epoch": state.epoch}
            checkpoint.save(folder / "checkpoints/last.pt", content)
            if data.val:
                found = evaluate(rule, task, data.val, env)
                log.write({"step": state.step, "epoch": state.epoch, "split": "val", **found})
                without_gain += 1
                if state.best is None or found[task.metric] > state.best:
                    state.best, state.best_epoch, without_gain = found[task.metric], state.epoch, 0
                    checkpoint.save(folder / "checkpoints/best.pt", content)
            if trainer["patience"] and without_gain >= trainer["patience"] or time.perf_counter() > deadline:
                break
    summary = summarise(experiment, state, folder, time.perf_counter() - started)
    log.write({"step": state.step, "epoch": state.epoch, "split": "test", "loss": summary["test_loss"],
               task.metric: summary[f"test_{task.metric}"]})
    return summary
