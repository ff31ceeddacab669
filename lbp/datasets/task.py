"""What is to be learned: shapes, loss, metric. The trainer, archs and rules know the data through this
alone."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lbp.errors import ConfigError

MASKED = -100   # the label of a sequence's token that does not count (torch's ignore_index)
LOSSES = {"classification": ("cross_entropy", "mse", "bce"), "regression": ("mse",)}


@dataclass(frozen=True)
class Task:
    """
    Losses follow the sum convention: one value a target, never averaged over the batch.

    Plain labels are y (N,) beside out (N, C); a sequence's are y (N, T), -100 where masked, beside out (N, T,
    C); real targets are y (N, k) beside out (N, k). `loss_name` is `cross_entropy`; `mse`, half the squared
    distance to the one-hot label or real target, summed over outputs (so its derivative is out - target); or
    `bce`, binary cross entropy of logits against the one-hot label, summed over outputs. Raises ConfigError
    where these do not fit.
    """

    kind: str                       # "classification" | "regression"
    in_shape: tuple[int, ...]       # of one sample
    outputs: int                    # width of the network's output
    classes: int | None = None      # None for regression
    loss_name: str = "cross_entropy"
    label_smoothing: float = 0.0    # share of the target spread evenly over all classes; cross_entropy only
    dtype: torch.dtype = torch.float32      # of the data, and of one-hot labels
    symbols: int | None = None      # inputs are sequences of integers 0 .. symbols - 1, in_shape is (T,); None: real numbers
    sequence: bool = False          # a target at every token, so y (N, T) and out (N, T, C); else one a sample

    def __post_init__(self):
        problems = []
        if self.loss_name not in LOSSES[self.kind]:
            problems.append(f"dataset.loss={self.loss_name} does not fit {self.kind}: "
                            f"use {' | '.join(LOSSES[self.kind])}")
        if not 0 <= self.label_smoothing < 1:
            problems.append(f"dataset.label_smoothing={self.label_smoothing} must be >= 0 and < 1")
        if self.label_smoothing and self.loss_name != "cross_entropy":
            problems.append(f"dataset.label_smoothing={self.label_smoothing} needs "
                            f"dataset.loss=cross_entropy, not {self.loss_name}: set it to 0")
        if problems:
            raise ConfigError(*problems)

    @property
    def metric(self) -> str:
        return "accuracy" if self.kind == "classification" else "r2"

    @property
    def metrics(self) -> tuple[str, ...]:
        """The names of all that `values` tells, the metric first."""
        bits = self.loss_name == "cross_entropy" and not self.label_smoothing
        return (self.metric, *["sequence_accuracy"] * self.sequence, *["bits_per_character"] * (self.sequence and bits))

    def onehot(self, y: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """The target as a vector: one-hot labels (..., C) without smoothing, zeros where masked; real targets
        as they are."""
        if self.classes is None:
            return y.to(dtype or self.dtype)
        return (y.unsqueeze(-1) == torch.arange(self.classes, device=y.device)).to(dtype or self.dtype)

    def count(self, y: Tensor) -> int:
        """Targets that count: samples, or the unmasked tokens of sequences."""
        return int((y != MASKED).sum()) if self._sequence(y) else y.shape[0]

    def loss(self, out: Tensor, y: Tensor) -> Tensor:
        """One value a target, (N,) or (N * T,), in fp32 (fp64 for fp64 outputs); 0 where masked."""
        out = _at_least_fp32(out)
        if self.loss_name == "cross_entropy":
            return F.cross_entropy(out.flatten(0, -2), y.flatten(), reduction="none", ignore_index=MASKED,
                                   label_smoothing=self.label_smoothing)
        target = self.onehot(y, out.dtype).view_as(out)
        if self.loss_name == "mse":
            each = (out - target).square().sum(-1) / 2
        else:
            each = F.binary_cross_entropy_with_logits(out, target, reduction="none").sum(-1)
        return (each * (y != MASKED)).flatten() if self._sequence(y) else each

    def error(self, out: Tensor, y: Tensor) -> Tensor:
        """The derivative of loss(out, y).sum() by out: out's shape, detached, in fp32 (fp64 for fp64
        outputs)."""
        out = _at_least_fp32(out.detach())
        target = self.onehot(y, out.dtype).view_as(out)
        if self.loss_name == "cross_entropy":
            if self.label_smoothing:
                target = torch.lerp(target, torch.full_like(target, 1 / self.classes), self.label_smoothing)
            error = out.softmax(-1).sub_(target)
        elif self.loss_name == "mse":
            error = out - target
        else:
            error = out.sigmoid().sub_(target)
        return error.mul_((y != MASKED).unsqueeze(-1)) if self._sequence(y) else error

    @torch.no_grad()
    def score(self, out: Tensor, y: Tensor) -> Tensor:
        """
        What the metric needs of a batch, to be added up over batches on the device (fp64, no
        synchronisation): accuracy (2,): hits, targets, and of sequences (4,): beside them, sequences all of
        whose unmasked tokens are hit, sequences that have one; r2 (4, k): count, sums of y, of y squared, of
        the squared error, per output.
        """
        if self.classes is None:
            out, y = out.double(), y.double().view_as(out)
            each = torch.ones_like(y), y, y.square(), (out - y).square()
            return torch.stack([values.sum(0) for values in each])
        hit = out.argmax(-1) == y       # a masked label equals no class
        if not self._sequence(y):
            hits = hit.sum(dtype=torch.float64)
            return torch.stack((hits, hits.new_full((), y.shape[0])))
        counts = y != MASKED
        some = counts.flatten(1).any(1)
        right = some & (hit | ~counts).flatten(1).all(1)
        return torch.stack([found.sum(dtype=torch.float64) for found in (hit, counts, right, some)])

    def metric_value(self, stats: Tensor) -> float:
        """The metric from added-up scores; nan where it is undefined (no target; r2 of targets that do not
        vary).

        r2 is 1 - squared error / variance, averaged over outputs, against the mean of the same targets."""
        if self.classes is not None:
            hits, count = stats[:2].tolist()
            return hits / count if count else float("nan")
        n, total, squares, residual = stats.cpu()
        spread = squares - total.square() / n
        spread = spread.masked_fill(spread <= 1e-12 * squares, float("nan"))
        return float((1 - residual / spread).mean())

    def values(self, loss: float, stats: Tensor) -> dict[str, float]:
        """{metric: value} of added-up scores, and of sequences beside it `sequence_accuracy`, the share of those without
        an error, and `bits_per_character`, the mean `loss` over tokens in bits (cross entropy without smoothing)."""
        found = {self.metric: self.metric_value(stats)}
        if self.classes is not None and len(stats) == 4:
            right, count = stats[2:].tolist()
            found["sequence_accuracy"] = right / count if count else float("nan")
            if self.loss_name == "cross_entropy" and not self.label_smoothing:
                found["bits_per_character"] = loss / math.log(2)
        return found

    def _sequence(self, y: Tensor) -> bool:
        return self.classes is not None and y.dim() > 1


def _at_least_fp32(out: Tensor) -> Tensor:
    return out if out.dtype in (torch.float32, torch.float64) else out.float()
