"""Where a run stands, and everything that it takes to go on from there."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from lbp import interrupt, ranks
from lbp.datasets.task import Task
from lbp.errors import ConfigError, DataError
from lbp.training.checkpoint import Checkpoints
from lbp.training.environment import generators, set_generators
from lbp.training.setup import Experiment

CHECKPOINT_S = 300      # seconds between checkpoints within an epoch, where no number of steps is asked for


@dataclass
class State:
    """Where a run stands: after `step` batches, `epoch` epochs of which `phase_epoch` in the current phase, and `batch`
    batches of the epoch that was begun. Times in seconds; `loss` and `score` add up over the epoch on this rank;
    `layers` and `total` hold what was measured last, `measured` sums over the epoch's first batches (measure.add_up);
    `lines` is the length of metrics.jsonl in bytes; `solving` what a fit is at, while it is; `stages` how many blocks each stage
    of a pipeline has."""

    step: int = 0
    epoch: int = 0
    phase: int = 0
    phase_epoch: int = 0
    batch: int = 0
    targets: int = 0
    epoch_s: float = 0.0
    loss: Tensor | float = 0.0
    score: Tensor | float = 0.0
    nonfinite: int = 0
    without_gain: int = 0
    wall_s: float = 0.0
    lines: int = 0
    samples: int = 0
    train_s: float = 0.0
    measure_s: float = 0.0
    flops_per_sample: float | None = None
    best: float | None = None
    best_epoch: int | None = None
    train: dict[str, float] = field(default_factory=dict)
    still: bool | None = None
    warned: list[str] = field(default_factory=list)
    layers: dict[str, dict[str, float]] = field(default_factory=dict)
    total: dict[str, float] = field(default_factory=dict)
    measured: dict[str, Any] = field(default_factory=dict)
    solving: str | None = None
    stages: list[int] | None = None

    def means(self, task: Task) -> dict[str, float]:
        """Loss and metric over the epoch so far, of all ranks."""
        loss, score = ranks.sums(self.loss, self.score)
        found = {"loss": float(loss) / max(self.targets, 1)}
        return found | (task.values(found["loss"], score) if isinstance(score, Tensor) else {})


class Progress:
    """The state of a run, the clock that counts its time, and its checkpoints. `late`: trainer.max_minutes are over."""

    def __init__(self, experiment: Experiment, log, folder: Path):
        self.experiment, self.log = experiment, log
        self.state, self.checkpoints = State(), Checkpoints(folder / "checkpoints")
        self.saved: int | None = None   # the step of the last checkpoint
        self.data, self.late = experiment.data.train.fingerprint(), False
        self.began = self.mark = self.saved_at = time.perf_counter()

    def start_lap(self) -> None:
        self.mark = time.perf_counter()

    def lap(self) -> None:
        """Counts the time since the lap's start as training."""
        self.experiment.environment.synchronize()
        now = time.perf_counter()
        self.state.epoch_s, self.mark = self.state.epoch_s + now - self.mark, now

    def tick(self) -> float:
        """Seconds that the run has taken, over all its sittings."""
        now = time.perf_counter()
        self.state.wall_s, self.began = self.state.wall_s + now - self.began, now
        return self.state.wall_s

    def wishes(self) -> tuple[int, bool, bool]:
        """Why this rank would end or save here, between two batches: the signal that came, the time that is over, a checkpoint that is due."""
        state, trainer = self.state, self.experiment.values["trainer"]
        every, minutes = trainer["checkpoint_every"], trainer["max_minutes"]
        late = bool(minutes) and self.tick() > 60 * minutes
        due = state.step % every == 0 if every else time.perf_counter() > self.saved_at + CHECKPOINT_S
        return interrupt.asked(), late and state.step > 0, due and state.batch > 0 and state.step != self.saved

    def ends_before(self, count: int) -> bool:
        """Between two batches, where a run is whole: hears what every rank has to say, saves where that is due, and raises
        Interrupted, or returns True, where the run ends here. `count`: this rank's targets of the next batch."""
        asked, late, due, counts = ranks.gathered(*self.wishes(), count)
        self.experiment.apply.count, self.late = int(sum(counts)), bool(max(late))
        try:
            interrupt.answer(max(asked))
        finally:
            if max(asked) or self.late or max(due):
                self.lap()
                self.save()
        if self.late and self.state.targets:
            self.state.train = self.state.means(self.experiment.data.task)
        return self.late

    def content(self) -> dict[str, Any]:
        """What a checkpoint holds: every rank gives its part. Tensors are the living ones, not copies."""
        self.tick()
        self.state.lines, self.state.still = self.log.length(), self.experiment.apply.still
        mine = {"generators": generators(), "loss": self.state.loss, "score": self.state.score}
        return {"values": self.experiment.values, "rule": self.experiment.rule.state_dict(),
                "apply": self.experiment.apply.state_dict(), "state": {**vars(self.state), "warned": [*self.state.warned]}, "data": self.data, "ranks": ranks.everyones(mine)}

    def save(self, content: dict[str, Any] | None = None, best: bool = False, begins_epoch: bool = False) -> None:
        """Writes a checkpoint of now, or of when `content` was taken; its time counts as no lap's."""
        content = content or self.content()
        if ranks.rank() == 0:
            self.log.sync()
            self.checkpoints.save(content, best)
            if begins_epoch:
                self.checkpoints.keep_for_epoch()
        self.saved = content["state"]["step"]
        self.saved_at = self.mark = time.perf_counter()

    def restore(self, content: dict[str, Any]) -> None:
        """Puts everything where it stood. Raises ConfigError for another number of ranks, DataError for other data."""
        if len(content["ranks"]) != ranks.world():
            raise ConfigError(f"launch.ranks={ranks.world()}: the run was trained by {len(content['ranks'])} rank(s), "
                              "and goes on with as many")
        if content["data"] != self.data:
            raise DataError(f"dataset={self.experiment.data.name}: its training samples are not those that the run was trained "
                            "with; put them back, or start over by lbp rerun")
        mine = content["ranks"][ranks.rank()]
        self.restore_weights(content)
        for key, value in {**content["state"], "loss": mine["loss"], "score": mine["score"]}.items():
            setattr(self.state, key, value.to(self.experiment.environment.device) if isinstance(value, Tensor) else value)
        set_generators(mine["generators"])
        self.saved = self.state.step

    def restore_weights(self, content: dict[str, Any]) -> None:
        try:
            self.experiment.rule.load_state_dict(content["rule"])
            self.experiment.apply.load_state_dict(content["apply"])
        except (RuntimeError, ValueError, KeyError) as error:
            raise DataError(f"{self.checkpoints.folder / 'last.pt'}: not of the network that this run's config.yaml builds "
                            f"({str(error).splitlines()[-1].strip()}); use the lbp that wrote it, or start over by lbp rerun") from error

    def warn(self, kind: str, text: str) -> None:
        """A line of the log, once for each kind of trouble."""
        if kind not in self.state.warned:
            self.state.warned.append(kind)
            self.log.write({"step": self.state.step, "epoch": self.state.epoch, "split": "warning", "warning": text})
