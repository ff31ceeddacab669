"""What is done about a batch whose loss or update is not finite. No weight has been touched by it."""

from __future__ import annotations

import json
from pathlib import Path

from torch.nn import Module

from lbp import ranks
from lbp.archs.network import NORMS, Network
from lbp.datasets.data import Split
from lbp.errors import Diverged
from lbp.training.checkpoint import load
from lbp.training.progress import Progress


class Statistics:
    """The running statistics of a network's norms, and of those that a rule has beside it, which a mere forward pass moves."""

    def __init__(self, network: Network, rule: Module):
        norms = [m for m in rule.modules() if isinstance(m, NORMS)]
        buffers = {id(b): b for module in (network, *norms) for b in module.buffers() if b.is_floating_point()}
        self.buffers = list(buffers.values())

    def keep(self) -> None:
        self.kept = [b.clone() for b in self.buffers]

    def undo(self) -> None:
        for buffer, kept in zip(self.buffers, self.kept):
            buffer.copy_(kept)

    def agree(self) -> None:
        """The mean over the ranks, each of which saw its own share of the batch."""
        if ranks.world() > 1 and self.buffers:
            ranks.total(self.buffers)
            for buffer in self.buffers:
                buffer.div_(ranks.world())


def leave_out(error: Diverged, progress: Progress, split: Split, how: str, folder: Path) -> None:
    """`how`: "stop" raises; "skip" goes on after the batch; "restore" with the weights and optimizers that the epoch began with.

    nonfinite.jsonl receives the batch's samples, as they stand in the dataset. Raises Diverged too where nothing in an
    epoch was finite."""
    state = progress.state
    rows = split.order(state.epoch)[state.batch * split.batch_size:][:split.batch_size]
    if ranks.rank() == 0:
        with open(folder / "nonfinite.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": state.step + 1, "epoch": state.epoch + 1, "problem": str(error),
                                   "samples": split.source[rows].tolist()}) + "\n")
    if how == "stop":
        error.add_note("nonfinite.jsonl names the batch's samples" + (
            "" if state.stages else "; trainer.on_nonfinite=skip or restore goes on without such batches"))
        raise error
    state.step, state.batch, state.nonfinite = state.step + 1, state.batch + 1, state.nonfinite + 1
    progress.warn("nonfinite", f"step {state.step}: {error}; such batches are left out (trainer.on_nonfinite={how})")
    if how == "restore":
        progress.restore_weights(ranks.from_first(load(folder / "checkpoints/epoch.pt") if ranks.rank() == 0 else None))
    if state.batch == split.steps and not state.targets:
        raise Diverged(f"not one batch of epoch {state.epoch + 1} was finite; lower optimizer.lr")


def forget(folder: Path, step: int) -> None:
    """Takes back what nonfinite.jsonl says of steps that will come again."""
    path = folder / "nonfinite.jsonl"
    if path.exists():
        lines = path.read_text("utf-8").splitlines(keepends=True)
        path.write_text("".join(line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step), encoding="utf-8")
