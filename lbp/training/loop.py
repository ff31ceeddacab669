"""The loop: phases, epochs, batches. It knows nothing of any rule."""

from __future__ import annotations

import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lbp import interrupt, ranks
from lbp.algos.rule import Learned, Phase, Solved
from lbp.errors import ConfigError, Diverged
from lbp.metrics.measure import Deltas, Measure, add_up, means
from lbp.training.environment import seed_all
from lbp.training.guards import Statistics, forget, leave_out
from lbp.training.optim import schedule
from lbp.training.progress import Progress
from lbp.training.results import evaluate, summarise
from lbp.training.setup import Experiment


def epochs_of(phase: Phase, trainer: dict[str, Any]) -> int:
    return 1 if phase.fit else trainer["epochs"] if phase.epochs is None else phase.epochs


def train(experiment: Experiment, log, folder: Path, content: dict[str, Any] | None = None) -> dict[str, Any]:
    """Trains to the end, from the start or from a checkpoint's content, and returns the summary of results.

    `log.write(record)` receives every line of metrics.jsonl, `log.length()` says how long that is by now, and
    `log.follow` sees what moves in between. Raises interrupt.Interrupted, with a checkpoint written, where a signal asks for it.
    """
    return Loop(experiment, log, folder, content).run()


class Loop:
    def __init__(self, experiment: Experiment, log, folder: Path, content: dict[str, Any] | None):
        self.experiment, self.log, self.folder = experiment, log, folder
        self.data, self.rule, self.apply, self.env = experiment.data, experiment.rule, experiment.apply, experiment.environment
        self.task, self.trainer, self.metrics = self.data.task, experiment.values["trainer"], experiment.values["metrics"]
        self.progress, self.measure = Progress(experiment, log, folder), Measure(self.rule, self.task, not self.trainer["compile"])
        self.state, self.statistics = self.progress.state, Statistics(experiment.network, self.rule)
        self.phases = [(phase, epochs_of(phase, self.trainer)) for phase in self.rule.phases()]
        self.total_steps = self.data.train.steps * sum(epochs for phase, epochs in self.phases if not phase.fit)
        self.factor = schedule(experiment.values["schedule"], self.data.train.steps, self.total_steps)
        seed_all(experiment.values["seed"], f"training {ranks.rank()}" if ranks.rank() else "training")
        if content:
            self.progress.restore(content)
            past = sum(epochs for _, epochs in self.phases[: self.state.phase])
            if past + self.state.phase_epoch != self.state.epoch and not self.trainer["patience"]:
                raise ConfigError(f"trainer.epochs={self.trainer['epochs']}: phases of this run are over after another number of epochs; "
                                  "they cannot be lengthened, so start a new run")
            if self.trainer["on_nonfinite"] == "restore" and self.state.batch and not ranks.from_first(
                    self.progress.checkpoints.epoch_began(self.state.epoch) if ranks.rank() == 0 else None):
                raise ConfigError("trainer.on_nonfinite=restore: the weights that this epoch began with were not kept, as it began without; "
                                  "use trainer.on_nonfinite=skip")
            if ranks.rank() == 0:
                forget(folder, self.state.step)

    def run(self) -> dict[str, Any]:
        state = self.state
        self.log.follow(state, self.data.train.steps, self.total_steps, self.env.peak_memory_mb)
        if self.trainer["on_nonfinite"] == "restore" and not state.batch:
            self.progress.save(begins_epoch=True)
        for number, (phase, epochs) in enumerate(self.phases):
            if number > state.phase and not self.progress.late:
                state.phase, state.phase_epoch, state.without_gain = number, 0, 0
            while number == state.phase and state.phase_epoch < epochs and not self.enough():
                self.rule.train()
                try:
                    self.fit(phase) if phase.fit else self.learn(phase)
                    if not self.progress.late:
                        self.close_epoch(phase)
                except Diverged as error:
                    saved = self.progress.saved
                    error.add_note(f"at step {state.step + 1}, in epoch {state.epoch + 1}"
                                   + (f"; checkpoints/last.pt holds step {saved}" if saved is not None else ""))
                    raise
        if self.progress.late:
            self.progress.warn("late", self.ended())
        self.progress.tick()
        if self.progress.saved is None and not state.epoch:     # of no epochs: what can be evaluated and exported all the same
            self.progress.save()
        summary = summarise(self.experiment, state, self.folder)
        if not (self.metrics["test"] and state.epoch and not state.batch):  # else the last epoch wrote it
            self.log.write({"step": state.step, "epoch": state.epoch, "split": "test",
                            **{name: summary[f"test_{name}"] for name in ("loss", *self.task.metrics)}})
        return summary

    def ended(self) -> str:
        state, phase = self.state, self.phases[self.state.phase][0]
        where = f"batch {state.batch} of epoch {state.epoch + 1}" if state.batch else f"epoch {state.epoch}"
        left = [one.name for one, _ in self.phases[state.phase + (phase.fit is None) :]]
        return (f"trainer.max_minutes={self.trainer['max_minutes']} are over: ended after {where}"
                + (f"; not begun: {left[0]}" + f" and {len(left) - 1} more phases" * (len(left) > 1) if left else ""))

    def enough(self) -> bool:
        return self.progress.late or bool(self.trainer["patience"]) and self.state.without_gain >= self.trainer["patience"]

    def rate(self, phase: Phase, back: int = 0) -> float:
        """The factor on the learning rates at this step, or so many steps before it."""
        steps, state = self.data.train.steps, self.state
        if not phase.restart:
            return self.factor(state.step - back)
        own = schedule(self.experiment.values["schedule"], steps, steps * epochs_of(phase, self.trainer))
        return own(state.phase_epoch * steps + state.batch - back)

    def learn(self, phase: Phase) -> None:
        """The batches of an epoch that are still to come."""
        import torch.utils.flop_counter  # here: importing it costs a second, which is no step's time

        self.apply.still = self.state.still if self.state.batch else None
        self.progress.start_lap()
        for x, y in self.data.train.batches(self.state.epoch, self.state.batch):
            if self.progress.ends_before(self.task.count(y)):
                return
            self.step(phase, x, y)
        self.progress.lap()

    def step(self, phase: Phase, x: Tensor, y: Tensor) -> None:
        state, apply, env = self.state, self.apply, self.env
        every, averaged = self.metrics["every"], state.batch < self.metrics["batches"]
        told = every and ((state.step + 1) % every == 0 or state.step in (0, self.total_steps - 1))
        measuring, watching = told or averaged, nullcontext()
        if measuring:
            state.measure_s -= time.perf_counter()
            with env.autocast():
                watching = self.before(x, y)
            state.measure_s += time.perf_counter()
        apply.observe = self.measure.collect if measuring else None
        first = state.step == 0
        # A compiled block runs no operation that could be counted.
        counting = first and state.flops_per_sample is None and not self.trainer["compile"]
        counter = torch.utils.flop_counter.FlopCounterMode(display=False) if counting else nullcontext()
        apply.learning_rates(self.rate(phase))
        self.statistics.keep()
        try:
            with counter, env.autocast(), watching:
                learned = phase.learn(x, y, apply)
            learned.loss = learned.loss.sum()
            apply.finish(learned.loss)
        except Diverged as error:
            self.statistics.undo()
            leave_out(error, self.progress, self.data.train, self.trainer["on_nonfinite"], self.folder)
            return
        self.statistics.agree()
        state.step, state.batch, state.targets = state.step + 1, state.batch + 1, state.targets + apply.count
        state.loss += learned.loss
        if learned.out is not None:
            state.score += self.task.score(learned.out, y)
        if first and self.trainer["compile"]:
            env.synchronize()
            self.progress.start_lap()
        elif counting:
            state.flops_per_sample = counter.get_total_flops() / len(y)
        if measuring:
            state.measure_s -= time.perf_counter()
            self.note(self.measured(phase, learned, y), told, averaged)
            state.measure_s += time.perf_counter()

    def before(self, x: Tensor, y: Tensor) -> Deltas:
        return self.measure.before(x, y, self.apply.count)

    def note(self, record: dict[str, Any], told: bool, averaged: bool) -> None:
        if told:
            self.log.write(record)
        if averaged:
            add_up(self.state.measured, {key: record[key] for key in ("layers", "total")})

    def measured(self, phase: Phase, learned: Learned, y: Tensor) -> dict[str, Any]:
        loss, score = ranks.sums(learned.loss, 0.0 if learned.out is None else self.task.score(learned.out, y))
        record = {"step": self.state.step, "epoch": self.state.epoch + 1, "split": "train", "phase": phase.name,
                  "loss": float(loss) / self.apply.count}
        if isinstance(score, Tensor):
            record |= self.task.values(record["loss"], score)
        record |= self.measure.record(learned.blocks)
        for layer, values in record["layers"].items():
            self.state.layers.setdefault(layer, {}).update(values)
        self.state.total.update(record["total"])
        return record

    def fit(self, phase: Phase) -> None:
        """A phase that solves, which counts as one step: the rule runs over the data as often as it needs. Interrupted, it begins again."""
        from torch.utils.flop_counter import FlopCounterMode

        passes = 0

        def batches(rows: int):
            nonlocal passes
            passes, self.state.targets = passes + 1, 0
            self.state.solving = f"{phase.name}, pass {passes}"
            for x, y in self.data.train.passes(rows):
                interrupt.poll()
                if len(x):
                    yield x, y
                self.state.targets += len(x)    # to be seen on the way

        if self.progress.ends_before(0):
            return
        self.apply.still = None
        self.progress.save()
        counter = FlopCounterMode(display=False)
        with counter:
            torch.zeros(1).sum()    # its first operation imports for a second or two, which is no training
        self.progress.start_lap()
        with counter:
            solved = phase.fit(batches) or Solved()
        self.progress.lap()
        state = self.state
        state.step, state.targets, state.solving = state.step + 1, len(self.data.train), None
        state.flops_per_sample = (state.flops_per_sample or 0) + sum(ranks.gathered(counter.get_total_flops())[0]) / len(self.data.train)
        if solved.notes:
            self.progress.warn(text := "; ".join(solved.notes), text)
        for layer, values in solved.blocks.items():
            state.layers.setdefault(layer, {}).update(values)
        state.train = evaluate(self.rule, self.task, self.data.train, self.env)
        self.solved = solved.blocks

    def close_epoch(self, phase: Phase) -> None:
        """Evaluates, logs and saves."""
        state, values = self.state, {"layers": self.solved} if phase.fit and self.solved else {}
        whole = self.progress.content()  # where an interrupted evaluation goes on
        try:
            found = evaluate(self.rule, self.task, self.data.val, self.env) if self.data.val else None
            tested = evaluate(self.rule, self.task, self.data.test, self.env) if self.metrics["test"] else None
        except interrupt.Interrupted:
            if not phase.fit:
                self.progress.save(whole)
            raise
        if not phase.fit:
            state.train = state.means(self.task)
            values = {"samples_per_s": state.targets / state.epoch_s, "learning_rate_factor": self.rate(phase, back=1),
                      **means(state.measured)}
            if self.apply.still:
                self.progress.warn("still", "every gradient of this epoch was exactly zero: nothing is learned (dead units, or "
                                            "a teaching signal of zero)")
        state.epoch, state.phase_epoch = state.epoch + 1, state.phase_epoch + 1
        state.train_s, state.samples = state.train_s + state.epoch_s, state.samples + state.targets
        state.batch, state.targets, state.epoch_s, state.loss, state.score, state.measured = 0, 0, 0.0, 0.0, 0.0, {}
        self.log.write({"step": state.step, "epoch": state.epoch, "split": "train_epoch", "phase": phase.name, **state.train, **values})
        better = False
        if found:
            self.log.write({"step": state.step, "epoch": state.epoch, "split": "val", **found})
            better = state.best is None or found[self.task.metric] > state.best
            state.without_gain = 0 if better else state.without_gain + 1
            if better:
                state.best, state.best_epoch = found[self.task.metric], state.epoch
        if tested:
            self.log.write({"step": state.step, "epoch": state.epoch, "split": "test", **tested})
        self.progress.save(best=better, begins_epoch=self.trainer["on_nonfinite"] == "restore")
