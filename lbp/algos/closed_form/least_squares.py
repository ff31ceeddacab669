"""Least squares with an intercept, from what a pass over the rows adds up."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lbp import ranks
from lbp.algos import ops
from lbp.errors import Diverged

STRIP = 96          # columns of a Gram matrix at once
TRUSTED = 3e-5      # of the greatest singular value: those above it keep six digits in the Gram matrix, which squares them
PRECISIONS = {"fp32": torch.float32, "fp64": torch.float64}


class Solution(NamedTuple):
    """`weight` (D + 1, C), the intercept in its last row; how many directions of the features it uses, and the greatest of their
    singular values over the least, where that was found."""

    weight: Tensor
    rank: int
    condition: float | None


class Coordinates(NamedTuple):
    """In which features [h, 1] are seen: [a h + c, constant]. A constant of 0 is that of a layer without intercept."""

    a: float = 1.0
    c: float = 0.0
    constant: float = 1.0

    def rows(self, x: Tensor) -> Tensor:
        """(R, D + 1) of [h, 1] -> the same rows, as they are seen."""
        seen = x * self.a
        seen[:, :-1] += self.c * x[:, -1:]
        seen[:, -1] = self.constant * x[:, -1]
        return seen

    def weight(self, w: Tensor) -> Tensor:
        """(D + 1, C) for what is seen -> for [h, 1]."""
        weight = self.a * w
        weight[-1] = self.constant * w[-1] + self.c * w[:-1].sum(0)
        return weight


AS_THEY_ARE = Coordinates()


class Gram:
    """X^T X and X^T T of rows X (R, D + 1), whose last feature is the constant 1, and T (R, C): O(D^2) memory, ranks add up.

    Each product is taken in `dtype`, their sum in double."""

    def __init__(self, features: int, targets: int, like: Tensor, dtype: torch.dtype = torch.float64):
        self.dtype = dtype
        self.sums = like.new_zeros(features + 1, features + 1 + targets, dtype=torch.float64)
        self.gram, self.cross = self.sums[:, : features + 1], self.sums[:, features + 1 :]

    def add(self, x: Tensor, t: Tensor) -> None:
        """More rows: x (R, D) without the constant, t (R, C)."""
        rows = with_constant(x, self.dtype, t)
        for start in range(0, len(self.sums), STRIP):   # the upper triangle alone, which is half the work
            strip, rest, total = rows[:, start : min(start + STRIP, len(self.sums))].T, rows[:, start:], self.sums[start : start + STRIP, start:]
            total.addmm_(strip, rest) if self.dtype == total.dtype else total.add_(strip @ rest)

    def gather(self) -> None:
        """When all rows are in: adds up over the ranks."""
        self.gram.triu_().add_(self.gram.triu(1).T)
        ops.over_ranks(self.sums)

    def solve(self, rcond: float, ridge: float = 0.0, seen: Coordinates = AS_THEY_ARE) -> Solution:
        """The least squares solution, of least norm, among directions whose singular value is above `rcond` of the greatest.

        `ridge` penalises squared weights but the intercept's, relative to the mean square of a feature. Cut, penalty and norm are meant
        of the features as they are `seen`; the solution is for X. Raises Diverged where what was added up is not finite.
        """
        gram, cross = self.gram, self.cross
        if seen != AS_THEY_ARE:
            gram, cross = seen.rows(seen.rows(gram).T), seen.rows(cross.T).T
        if ridge:
            gram = gram + penalty(gram.diagonal(), ridge).diag()
        if ridge and not rcond:
            finite(gram, cross)
            factor, info = torch.linalg.cholesky_ex(gram)
            if not info:    # a tenth of the time of the eigenvalues
                return Solution(seen.weight(torch.cholesky_solve(cross, factor)), len(gram), None)
        found = truncated(gram, cross, rcond, torch.finfo(self.dtype).eps)
        return found._replace(weight=seen.weight(found.weight))

    @property
    def count(self) -> float:
        """Rows."""
        return float(self.gram[-1, -1])


class QR:
    """The triangle of a QR decomposition of rows [X T], brought up to date by each batch: as little memory, less where rows are fewer than
    features, and no square is taken, so that also directions show which a Gram matrix in double loses (condition numbers above
    1e7)."""

    def __init__(self, features: int, targets: int, like: Tensor):
        self.features, self.rows = features, like.new_zeros(0, features + 1 + targets, dtype=torch.float64)

    def add(self, x: Tensor, t: Tensor) -> None:
        rows = torch.cat([self.rows, with_constant(x, torch.float64, t)])
        finite(rows)
        self.rows = torch.linalg.qr(rows, mode="r").R

    def gather(self) -> None:
        if ranks.world() > 1:
            every = self.rows.new_zeros(ranks.world(), self.rows.shape[1], self.rows.shape[1])
            every[ranks.rank(), : len(self.rows)] = self.rows
            ops.over_ranks(every)
            self.rows = torch.linalg.qr(every.flatten(0, 1), mode="r").R

    def solve(self, rcond: float, ridge: float = 0.0, seen: Coordinates = AS_THEY_ARE) -> Solution:
        """As a Gram matrix does."""
        x, t = seen.rows(self.x), self.rows[:, self.features + 1 :]
        if ridge:
            below = penalty(x.square().sum(0), ridge).sqrt().diag()
            x, t = torch.cat([x, below]), torch.cat([t, t.new_zeros(len(below), t.shape[1])])
        left, singular, right = torch.linalg.svd(x, full_matrices=False)
        keep = singular > singular[0] * max(rcond, 10 * torch.finfo(singular.dtype).eps)
        weight = right[keep].T @ ((left[:, keep].T @ t) / singular[keep, None])
        return Solution(seen.weight(weight), int(keep.sum()), spread(singular[keep]))

    @property
    def x(self) -> Tensor:
        return self.rows[:, : self.features + 1]

    @property
    def gram(self) -> Tensor:
        return self.x.T @ self.x

    @property
    def count(self) -> float:
        return round(float(self.x[:, -1].square().sum()))


class Exact(QR):
    """All rows are kept and their singular values decomposed, as ZORB does: the oracle of the two others."""

    def __init__(self, features: int, targets: int, like: Tensor):
        super().__init__(features, targets, like)
        self.kept: list[Tensor] = []

    def add(self, x, t):
        self.kept.append(with_constant(x, torch.float64, t))
        finite(self.kept[-1])

    def gather(self):
        self.rows = torch.cat(self.kept)
        self.kept = []


def ridge_solution(gram: Tensor, cross: Tensor, ridge: float) -> Tensor:
    """Solves (gram + ridge I') w = cross by Cholesky; I' leaves the last feature, the constant one, unpenalised.

    gram (D+1, D+1), cross (D+1, C) -> (D+1, C), all double. Raises Diverged where that is singular or not finite.
    """
    finite(gram, cross)
    diagonal = gram.new_full((len(gram),), ridge)
    diagonal[-1] = 0
    factor, info = torch.linalg.cholesky_ex(gram + diagonal.diag())
    solution = torch.cholesky_solve(cross, factor)
    if info or not solution.isfinite().all():
        raise Diverged(f"the {len(gram) - 1} features are linearly dependent at algo.ridge={ridge}: "
                       "raise algo.ridge")
    return solution


def with_constant(x: Tensor, dtype: torch.dtype | None = None, t: Tensor | None = None) -> Tensor:
    """x (R, D) and t (R, C) -> (R, D + 1 + C): x, the constant 1, t."""
    features, targets = x.shape[1], 0 if t is None else t.shape[1]
    rows = x.new_empty(len(x), features + 1 + targets, dtype=dtype)
    rows[:, :features], rows[:, features] = x, 1
    if t is not None:
        rows[:, features + 1 :] = t
    return rows


def penalty(squares: Tensor, ridge: float) -> Tensor:
    """The diagonal (D + 1,) that a relative ridge adds, from the features' sums of squares (D + 1,)."""
    diagonal = torch.full_like(squares, ridge * float(squares[:-1].mean()))
    diagonal[-1] = 0
    return diagonal


def finite(*sums: Tensor) -> None:
    if not all(t.isfinite().all() for t in sums):
        raise Diverged("a layer's features or targets are not finite: nothing was written; look at the data and its scale "
                       "(dataset.normalize), or raise algo.ridge")


def truncated(gram: Tensor, cross: Tensor, rcond: float, eps: float = torch.finfo(torch.float64).eps) -> Solution:
    """The w of least norm that minimises w^T gram w - 2 w^T cross among the directions of gram (D, D) whose singular value, the root of
    its eigenvalue, is above `rcond` of the greatest; cross (D, C), all double. `eps`: the precision that gram was added up in.
    Raises Diverged where a value is not finite."""
    finite(gram, cross)
    values, vectors = torch.linalg.eigh(gram)
    keep = values > values[-1] * max(rcond**2, 10 * eps)
    values, vectors = values[keep], vectors[:, keep]
    return Solution(vectors @ (vectors.T @ cross / values[:, None]), len(values), spread(values.sqrt()))


def spread(singular: Tensor) -> float:
    return float(singular.max() / singular.min()) if len(singular) else float("inf")
