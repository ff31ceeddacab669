"""How a target of a module's output is made one of its input: the inverse map of each kind of module."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lbp import ranks
from lbp.algos.closed_form.least_squares import Coordinates
from lbp.algos.targets.solve import INVERSES as ELEMENTWISE
from lbp.algos.targets.solve import MARGIN
from lbp.archs.hard import Sign, Step
from lbp.archs.resnet import ResidualUnit
from lbp.errors import Diverged

FLOOR, CEILING = math.log(torch.finfo(torch.float64).eps), math.log(torch.finfo(torch.float32).max)   # where zorbjax clips logits
INSIDE = 1e-5       # zorb-numpy's margin
BOUNDED = {nn.Sigmoid: (0.0, 1.0), nn.Tanh: (-1.0, 1.0), nn.Hardtanh: (-1.0, 1.0), Sign: (-1.0, 1.0), Step: (0.0, 1.0)}
BATCH_NORMS = nn.BatchNorm1d, nn.BatchNorm2d
POOLS = nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d


class Stage:
    """One module on the way. `shape`: one sample's input. `x`, `h`: input and output of the samples that are asked about."""

    needs_samples = False       # whether a target for the input hangs on more than that for the output
    noise: torch.Generator      # for what is drawn

    def __init__(self, block: str, module: nn.Module, shape: tuple[int, ...]):
        self.block, self.module, self.shape = block, module, shape

    def run(self, x: Tensor) -> Tensor:
        return self.module(x)

    def prepare(self, rcond: float, ridge: float = 0.0) -> None:
        """Before targets are brought down: finds what that takes once, where it takes anything."""

    def target(self, t: Tensor, x: Tensor | None, h: Tensor | None) -> Tensor:
        """What the input should have been for the output to be t."""
        raise NotImplementedError

    def change(self, d: Tensor, x: Tensor, h: Tensor) -> Tensor:
        """By how much the input x has to change for the output h to change by d. As the target, where that is linear."""
        return self.target(d, x, h)


class Flatten(Stage):
    def target(self, t, x, h):
        return t.reshape(len(t), *self.shape)


class Weights(Stage):
    """A dense or convolutional layer. Its inputs are seen in the coordinates a h + c of the activation that feeds it; the weights themselves
    are for h.

    `norm`: the batch norm that follows at once, if one does. A layer without bias leaves its intercept to that, or has none.
    """

    def __init__(self, block, module, shape):
        super().__init__(block, module, shape)
        self.conv = isinstance(module, nn.Conv2d)
        self.features = module.weight[0].numel()
        self.feed: Activation | None = None
        self.norm: BatchNorm | None = None
        self.inverse: Tensor | None = None

    @property
    def intercept(self) -> bool:
        return self.module.bias is not None or self.norm is not None and self.norm.module.affine

    def rows(self, x: Tensor) -> Tensor:
        """(R, D): each sample, or each patch of it, as a row. Samples first, then positions."""
        if not self.conv:
            return x
        m = self.module
        return F.unfold(x, m.kernel_size, m.dilation, m.padding, m.stride).transpose(1, 2).flatten(0, 1)

    def flat(self, t: Tensor) -> Tensor:
        """Outputs (N, out, ...) as rows (R, out)."""
        return t.flatten(2).transpose(1, 2).flatten(0, 1) if self.conv else t

    def outputs(self, rows: Tensor) -> Tensor:
        """Rows (R, out) as outputs (N, out, ...)."""
        return rows.unflatten(0, (-1, *self.places)).movedim(-1, 1) if self.conv else rows

    @property
    def places(self) -> tuple[int, ...]:
        """(height, width) of a convolution's outputs."""
        m = self.module
        return tuple((side + 2 * p - d * (k - 1) - 1) // s + 1
                     for side, p, d, k, s in zip(self.shape[1:], m.padding, m.dilation, m.kernel_size, m.stride))

    @property
    def seen(self) -> Coordinates:
        """How its inputs are seen in solving: as a h + c where an activation's rescaling feeds it."""
        if self.feed is None or not self.feed.scaled:
            return Coordinates(constant=float(self.intercept))
        a, c = self.feed.scale.tolist()
        return Coordinates(a, c)

    def read(self) -> Tensor:
        """(D + 1, out) in double; the intercept in the last row."""
        weight = self.module.weight.detach().double().flatten(1).T
        bias = self.module.bias
        return torch.cat([weight, weight.new_zeros(1, weight.shape[1]) if bias is None else bias.detach().double()[None]])

    def write(self, rows: Tensor) -> None:
        """The other way round. Raises Diverged before anything is written where a value is not finite."""
        weight, bias = rows[:-1].T.reshape(self.module.weight.shape).to(self.module.weight.dtype), rows[-1].to(self.module.weight.dtype)
        if not (weight.isfinite().all() and bias.isfinite().all()):
            raise Diverged(f"block {self.block}: the solution is not finite, and nothing was written; raise algo.ridge")
        self.module.weight.copy_(weight)
        if self.module.bias is not None:
            self.module.bias.copy_(bias)
        elif self.intercept:
            self.norm.module.running_mean.sub_(bias)

    def fed(self) -> Tensor:
        """As read, for the inputs as they are seen."""
        rows, (a, c, _) = self.read(), self.seen
        rows[:-1] /= a
        rows[-1] -= c * rows[:-1].sum(0)
        return rows

    def prepare(self, rcond: float, ridge: float = 0.0) -> None:
        """Finds the inverse map of the weights as they are: the pseudo-inverse, or with a ridge."""
        self.weight = self.fed()
        w = self.weight[:-1]
        if ridge:
            gram = w.T @ w
            gram.diagonal().add_(ridge * gram.diagonal().mean())
            self.inverse = torch.linalg.solve(gram, w.T) if gram.any() else torch.zeros_like(w.T)
        else:
            self.inverse = torch.linalg.pinv(w, rtol=rcond)

    def back(self, rows: Tensor) -> Tensor:
        """Rows (R, out) through the inverse: (N, *shape); where patches overlap the mean of what they say."""
        rows = rows @ self.inverse.to(rows.dtype)
        if not self.conv:
            return rows
        m, sides = self.module, self.shape[1:]
        geometry = sides, m.kernel_size, m.dilation, m.padding, m.stride
        patches = rows.unflatten(0, (-1, math.prod(self.places))).transpose(1, 2)
        count = F.fold(torch.ones_like(patches[:1]), *geometry)
        return F.fold(patches, *geometry) / count.clamp(min=1)

    def target(self, t, x, h):
        return self.back(self.flat(t) - self.weight[-1])

    def change(self, d, x, h):
        back = self.back(self.flat(d))
        return back / self.seen.a


class BatchNorm(Stage):
    """As in eval mode: one affine map a channel."""

    def factor(self) -> tuple[Tensor, Tensor]:
        """(gain, offset), each (channels, 1, ...), in double."""
        m = self.module
        gain = (m.running_var.double() + m.eps).rsqrt() * (m.weight.detach().double() if m.affine else 1)
        offset = (m.bias.detach().double() if m.affine else 0) - m.running_mean.double() * gain
        return tuple(v.view(-1, *[1] * (len(self.shape) - 1)) for v in (gain, offset))

    def target(self, t, x, h):
        gain, offset = self.factor()
        return (t - offset) / gain

    def change(self, d, x, h):
        return d / self.factor()[0]

    def settle(self, mean: Tensor, variance: Tensor) -> None:
        """Takes the data's own statistics (channels,), and a gain and bias under which the map stays what it was."""
        m, (gain, offset) = self.module, (v.flatten() for v in self.factor())
        if m.affine and m.track_running_stats:
            m.weight.copy_(gain * (variance + m.eps).sqrt())
            m.bias.copy_(offset + gain * mean)
            m.running_mean.copy_(mean)
            m.running_var.copy_(variance)


class Activation(Stage):
    """Whole targets are brought from the range `span` that they have into the activation's own, less a margin; what this costs is an
    affine map of its outputs, `scale` = (a, c), which the weights above take in (`fold`). Where none can, and where there is no range,
    targets are clipped to what the activation can give.

    `variant`: `numpy` keeps 1e-5 away from the range's ends, and draws from -1 to 0 for negative targets of a ReLU, by `noise`;
    `jax` goes to the ends and clips what the inverse gives there, and takes 0.
    """

    def __init__(self, block, module, shape, variant: str = "numpy"):
        super().__init__(block, module, shape)
        self.kind, self.jax, self.above = type(module), variant == "jax", None
        self.needs_samples = self.kind is nn.ReLU and not self.jax
        self.ends = next((ends for kind, ends in BOUNDED.items() if isinstance(module, kind)), None)
        if self.kind is nn.Hardtanh:
            self.ends = module.min_val, module.max_val
        self.scale: Tensor | None = None        # (2,), a buffer of the rule's
        self.span: tuple[float, float] | None = None

    @property
    def scaled(self) -> bool:
        """Whether its outputs reach the weights above as a h + c."""
        return self.scale is not None and self.ends is not None and self.above is not None

    @property
    def range(self) -> tuple[float, float]:
        low, high = self.ends
        margin = 0 if self.jax or self.kind not in (nn.Sigmoid, nn.Tanh) else INSIDE * (high - low)
        return low + margin, high - margin

    def fold(self) -> None:
        """From now on the outputs are rescaled to reach over `span`; the weights above are multiplied out anew."""
        if self.span is not None:
            rows, (low, high) = self.above.fed(), self.range
            a = (self.span[1] - self.span[0]) / (high - low) or 1.0
            self.scale.copy_(torch.tensor([a, (sum(self.span) - a * (low + high)) / 2]))
            self.above.write(self.above.seen.weight(rows))
            self.span = None

    def target(self, t, x, h):
        if self.ends is not None:
            low, high = self.range
            if self.scaled:
                a = (self.span[1] - self.span[0]) / (high - low) or 1.0
                t = (t - sum(self.span) / 2) / a + (low + high) / 2
            t = t.clamp(low, high)
        return self.inverse(t)

    def inverse(self, t: Tensor) -> Tensor:
        if self.kind in (nn.Sigmoid, nn.Tanh):
            return (t.logit() if self.kind is nn.Sigmoid else t.atanh()).clamp(FLOOR, CEILING)
        if self.kind is nn.ReLU:
            return t.clamp(min=0) if self.jax else torch.where(t < 0, -self.drawn(t), t)
        if self.kind is nn.Softmax:     # up to a constant a row, which softmax does not see
            return t.clamp(min=0).log().clamp(min=FLOOR) if self.jax else (t.clamp(min=0) + INSIDE).log()
        if isinstance(self.module, Step):
            return 2 * t - 1
        if self.kind in ELEMENTWISE:
            return ELEMENTWISE[self.kind](self.module, t)
        return t

    def drawn(self, like: Tensor) -> Tensor:
        rows, mine = ranks.batch_rows(len(like))
        return torch.rand((rows, *like.shape[1:]), generator=self.noise, dtype=like.dtype)[mine].to(like.device)

    def change(self, d, x, h):
        """A unit that a ReLU silences stays so; what has no derivative lets the change through."""
        if self.kind is nn.ReLU:
            return torch.where(x > 0, d, 0)
        if self.kind is nn.Softmax:
            return (h + d).clamp(min=MARGIN).log() - h.clamp(min=MARGIN).log()
        if self.kind in ELEMENTWISE:
            inverse = ELEMENTWISE[self.kind]
            return inverse(self.module, h + d) - inverse(self.module, h)
        return d


class Pool(Stage):
    """Each position is to have what its pool is to have, the mean over those that it belongs to. A change goes to the positions that made
    the pool's maximum alone."""

    def target(self, t, x, h):
        m, sides = self.module, self.shape[1:]
        if isinstance(m, nn.AdaptiveAvgPool2d):
            return F.interpolate(t, sides, mode="nearest")
        return _spread(t, sides, m)

    def change(self, d, x, h):
        m = self.module
        if not isinstance(m, nn.MaxPool2d):
            return self.target(d, x, h)
        _, places = F.max_pool2d(x, m.kernel_size, m.stride, m.padding, return_indices=True)
        return d.new_zeros(x.flatten(2).shape).scatter_add(2, places.flatten(2), d.flatten(2)).view(x.shape)


class Fork(Stage):
    """Where a residual unit's shortcut leaves. Its input gets its target at the unit's sum."""

    def run(self, x):
        self.kept = x
        return x


class Sum(Stage):
    """A residual unit's branch and its shortcut, added. A target for the branch is what the shortcut leaves; one for the unit's input
    what the branch leaves, back through the shortcut. Of a projection, which stays as drawn, that is the pseudo-inverse."""

    needs_samples = True

    def __init__(self, block, unit: ResidualUnit, shape, fork: Fork):
        super().__init__(block, unit, shape)
        self.fork = fork
        self.projection = None
        if unit.projection is not None:
            conv, norm = unit.projection
            self.projection = [Weights(block, conv, fork.shape), *([BatchNorm(block, norm, shape)] if isinstance(norm, BATCH_NORMS) else [])]

    def run(self, x):
        return x + self.module.shortcut(self.fork.kept)

    def prepare(self, rcond: float, ridge: float = 0.0) -> None:
        if self.projection:
            self.projection[0].prepare(rcond, ridge)

    def target(self, t, x, h):
        """For the branch's output."""
        return t - (h - x).to(t.dtype)

    def change(self, d, x, h):
        return d

    def below(self, t: Tensor, x: Tensor, below: Tensor, change: bool) -> Tensor:
        """For the unit's input, which was `below`; the branch gave x."""
        rest = t if change else t - x.to(t.dtype)
        if self.projection:
            for stage in reversed(self.projection):
                rest = (stage.change if change else stage.target)(rest, None, None)
            return rest
        unit = self.module
        left = unit.more // 2
        rest = rest[:, left : left + below.shape[1]]
        if unit.stride == 1:
            return rest
        full = torch.zeros_like(below, dtype=t.dtype) if change else below.to(t.dtype).clone()
        full[:, :, :: unit.stride, :: unit.stride] = rest
        return full


def _spread(t: Tensor, sides: tuple[int, int], pool: nn.Module) -> Tensor:
    """The mean, at each position, of the pools that it belongs to; positions of none get their channel's mean."""
    kernel, stride, padding = pool.kernel_size, pool.stride, pool.padding
    size = math.prod(kernel) if isinstance(kernel, tuple) else kernel**2
    n, channels = t.shape[:2]
    patches = t.flatten(2).reshape(n * channels, 1, -1).expand(-1, size, -1)
    count = F.fold(torch.ones_like(patches[:1]), sides, kernel, 1, padding, stride)
    summed = F.fold(patches, sides, kernel, 1, padding, stride).view(n, channels, *sides)
    return torch.where(count[0] > 0, summed / count[0].clamp(min=1), t.mean((2, 3), keepdim=True))
