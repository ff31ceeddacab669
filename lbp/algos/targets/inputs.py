"""How a machine makes a target for its input, so that the block below has one: the `step_x` halves."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lbp.algos import ops
from lbp.algos.rule import Rng
from lbp.algos.search.population import best
from lbp.algos.targets.halves import Knob, Local, Place, StepX, gradients
from lbp.algos.targets.solve import Dense, gram_solution
from lbp.archs.init import draw
from lbp.archs.network import CONVOLUTIONS, Layer

RATE = Knob(1.0, "float > 0", "of the step; 1 is backprop's error")


class Gradient(StepX):
    """x' = x - lr dL/dx, `steps` times."""

    doc = "against the gradient of the local loss by the input"
    knobs = {"lr": RATE, "steps": Knob(1, "int >= 1", "steps of the input")}
    needs_derivative = True

    def __init__(self, place: Place, *, lr: float, steps: int):
        super().__init__()
        self.lr, self.steps = lr, steps
        if steps > 1:
            place.steady("runs the block on inputs that it moves")

    def target(self, local):
        x = ops.at_least_fp32(local.x.detach())
        moved = x - self.lr * local.gradients()[0].to(x.dtype)
        for _ in range(1, self.steps):
            with torch.enable_grad():
                at = moved.requires_grad_()
                slope, = gradients(local.loss(local.run(at)).sum(), [at])
            moved = (at - self.lr * slope).detach()
        return moved


class Feedback(StepX):
    """As the gradient, through fixed random matrices in place of the block's weights: x' = x - lr delta B."""

    doc = "feedback alignment: the error through fixed random matrices"
    knobs = {"init": Knob("xavier", "default | xavier | xavier_normal | kaiming | kaiming_uniform | lecun | uniform | variance_scaling"
                          " | orthogonal", "how the matrices are drawn"),
             "scale": Knob(1.0, "float > 0", "factor on the matrices"), "lr": RATE}
    needs_derivative, transports = True, False

    def __init__(self, place: Place, *, init: str, scale: float, lr: float):
        super().__init__()
        self.lr, self.weights, self.names = lr, [], []
        used = {id(m.weight): m for m in place.block.modules() if isinstance(m, (nn.Linear, *CONVOLUTIONS))}
        for name, p in place.block.named_parameters():
            if id(p) in used:
                self.weights.append(p)
                self.names.append(f"B_{name.replace('.', '_')}")
                self.register_buffer(self.names[-1], draw(torch.empty_like(p, requires_grad=False), init, scale))
            elif p.dim() > 1 and "weight" in name:
                raise place.refuse(f"has no matrix for {name}, which is no nn.Linear's or nn.Conv's; choose another half, or, where samples are numbers, arch=mlp")

    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        return [(weight, getattr(self, name)) for weight, name in zip(self.weights, self.names)]

    def run(self, block):
        def through(x: Tensor) -> Tensor:
            with ops.BackwardThrough(self.pairs()):
                return block(x)
        return through

    def target(self, local):
        x = ops.at_least_fp32(local.x.detach())
        return x - self.lr * local.gradients()[0].to(x.dtype)


class Inverse(StepX):
    """A learned inverse g: x' = x + g(t) - g(h), or without `difference` g(t).

    Each batch g learns `steps` times to rebuild the input from the output, at noisy inputs: |g(f(x + e)) - x - e|^2 / 2.
    """

    doc = "a learned inverse (group \"feedback\")"
    knobs = {"difference": Knob(True, "bool", "take off what the inverse gets wrong of the output itself"),
             "noise": Knob(0.1, "float >= 0", "standard deviation of that on the inputs from which the inverse learns"),
             "steps": Knob(1, "int >= 1", "steps of the inverse a batch")}
    transports = False

    def __init__(self, place: Place, *, difference: bool, noise: float, steps: int):
        super().__init__()
        place.steady("runs the block on noisy inputs")
        self.difference, self.noise, self.steps, self.rng = difference, noise, steps, Rng()
        weight = next(place.block.parameters())
        g = place.inverse(True) if place.inverse else self.dense(place)
        self.g = g.to(weight.device, weight.dtype)

    def dense(self, place: Place) -> nn.Module:
        flat = nn.Linear(torch.Size(place.above).numel(), torch.Size(place.below).numel())
        return nn.Sequential(nn.Flatten(), flat, nn.Unflatten(1, place.below))

    def learn(self, local, settle):
        x = ops.at_least_fp32(local.x.detach())
        for _ in range(self.steps):
            noisy = x + self.noise * self.rng.normal(x)
            with ops.full_precision(x):
                with torch.no_grad():
                    h = local.block(noisy)
                with torch.enable_grad():
                    loss = (self.g(h) - noisy).square().flatten(1).sum(1) / 2
                    loss.sum().backward(inputs=list(self.g.parameters()))
            if settle:
                settle(loss.detach())
        return {"reconstruction_error": 2 * loss.detach().sum() / noisy.square().sum()}

    @torch.no_grad()
    def target(self, local):
        x, h = ops.at_least_fp32(local.x.detach()), ops.at_least_fp32(local.h)
        with ops.full_precision(x):
            return x + self.g(local.t) - self.g(h) if self.difference else self.g(local.t)


class Exact(StepX):
    """x' = f^-1(t): by the block's own `inverse`, or of a square dense layer without norm and pool."""

    doc = "the exact inverse of a reversible block"

    def __init__(self, place: Place):
        super().__init__()
        self.dense, self.inverse = None, getattr(place.block, "inverse", None)
        if self.inverse is None:
            linear = getattr(place.block, "linear", None) if isinstance(place.block, Layer) else place.block
            if not isinstance(linear, nn.Linear) or linear.in_features != linear.out_features:
                raise place.refuse("needs a block that can be undone: one with a method inverse(h), or a dense layer with as many outputs "
                                   "as inputs; choose another half, as for the head (algo.blocks={head: {x: gradient}}), or, where samples "
                                   "are numbers, arch=mlp with equal arch.widths")
            self.dense = Dense(place)

    @torch.no_grad()
    def target(self, local):
        x = ops.at_least_fp32(local.x.detach())
        with ops.full_precision(x):
            if self.dense is None:
                return self.inverse(local.t)
            bias = 0 if self.dense.linear.bias is None else self.dense.linear.bias.double()
            found = torch.linalg.solve(self.dense.weight, (self.dense.wanted(local.t) - bias).T).T
            return found.view_as(x).to(x.dtype)


class LeastSquares(StepX):
    """x' = x + dx, where dx is the least change that brings the pre-activation to the target's: W dx = a_t - a, with a ridge."""

    doc = "least squares: the least change of the input that reaches the target, for dense layers"
    knobs = {"ridge": Knob(0.01, "float >= 0", "penalty on the change")}

    def __init__(self, place: Place, *, ridge: float):
        super().__init__()
        self.ridge, self.dense = ridge, Dense(place)

    @torch.no_grad()
    def target(self, local):
        x, weight = ops.at_least_fp32(local.x.detach()), self.dense.weight
        change = self.dense.change(local.h, local.t)
        return x + (gram_solution(weight @ weight.T, change.T, self.ridge).T @ weight).view_as(x).to(x.dtype)


class Search(StepX):
    """Base of halves that try inputs out: each sample keeps the best that it met, which may be the input as it is."""

    def __init__(self, place: Place):
        super().__init__()
        place.steady("tries many inputs")
        self.rng = Rng()

    def score(self, local: Local, tried: Tensor) -> Tensor:
        """The local loss of each of a sample's inputs: (N, members, *in) -> (N, members)."""
        rows = torch.arange(len(tried), device=tried.device).repeat_interleave(tried.shape[1])
        with ops.full_precision(tried):
            losses = local.loss(local.block(tried.flatten(0, 1)), rows).view(tried.shape[:2])
        return torch.nan_to_num(losses, nan=torch.inf)


def taken(tried: Tensor, places: Tensor) -> Tensor:
    """Of each sample's members those at `places`: (N, members, *in), (N, k) -> (N, k, *in)."""
    return tried[torch.arange(len(tried), device=tried.device)[:, None], places]


class Population(Search):
    """A genetic search over each sample's input: the better half stay, and their crossed and mutated children join them."""

    doc = "a genetic search over each sample's input"
    knobs = {"members": Knob(16, "int >= 4", "inputs tried for a sample"), "generations": Knob(4, "int >= 1", "a batch"),
             "std": Knob(0.1, "float > 0", "of the first members' distance, and of mutation")}

    def __init__(self, place: Place, *, members: int, generations: int, std: float):
        super().__init__(place)
        self.members, self.generations, self.std = members, generations, std

    @torch.no_grad()
    def target(self, local):
        x, keep = ops.at_least_fp32(local.x.detach())[:, None], self.members // 2
        like = x.expand(-1, self.members - 1, *x.shape[2:])
        tried = torch.cat([x, x + self.std * self.rng.normal(like)], 1)
        scores = self.score(local, tried)
        for _ in range(self.generations):
            kept = best(scores.T, keep).T
            tried, scores = taken(tried, kept), scores.gather(1, kept)
            like = x.expand(-1, self.members - keep, *x.shape[2:])
            a, b = (taken(tried, self.rng.integers(keep, like.flatten(2)[..., 0])) for _ in range(2))
            children = torch.where(self.rng.integers(2, like) == 0, a, b) + self.std * self.rng.normal(like)
            tried, scores = torch.cat([tried, children], 1), torch.cat([scores, self.score(local, children)], 1)
        return taken(tried, scores.argmin(1, keepdim=True))[:, 0]


class HillClimb(Search):
    """The best of `members` Gaussian neighbours of each sample's input, where it is better; `steps` times."""

    doc = "hill climbing on each sample's input"
    knobs = {"members": Knob(8, "int >= 1", "neighbours tried"), "steps": Knob(4, "int >= 1", "a batch"),
             "std": Knob(0.1, "float > 0", "of a neighbour's distance")}

    def __init__(self, place: Place, *, members: int, steps: int, std: float):
        super().__init__(place)
        self.members, self.steps, self.std = members, steps, std

    @torch.no_grad()
    def target(self, local):
        x = ops.at_least_fp32(local.x.detach())[:, None]
        score = self.score(local, x)
        for _ in range(self.steps):
            tried = self.neighbours(x.expand(-1, self.members, *x.shape[2:]))
            tried, score = torch.cat([x, tried], 1), torch.cat([score, self.score(local, tried)], 1)
            found = score.argmin(1, keepdim=True)
            x, score = taken(tried, found), score.gather(1, found)
        return x[:, 0]

    def neighbours(self, x: Tensor) -> Tensor:
        return x + self.std * self.rng.normal(x)


class HillClimbBinary(HillClimb):
    """The same on inputs that are 0 and 1, or -1 and 1: a neighbour has some of them flipped."""

    doc = "hill climbing on each sample's binary input"
    knobs = {"values": Knob("signs", "bits | signs", "of the input: 0 and 1, or -1 and 1"),
             **{name: knob for name, knob in HillClimb.knobs.items() if name != "std"},
             "flip": Knob(0.1, "float > 0 < 1", "share of the values that a neighbour has flipped")}

    def __init__(self, place: Place, *, values: str, flip: float, **knobs):
        super().__init__(place, **knobs, std=0.)
        self.values, self.flip = values, flip

    def neighbours(self, x: Tensor) -> Tensor:
        flip = self.rng.integers(1 << 20, x) < self.flip * (1 << 20)
        return torch.where(flip, 1 - x if self.values == "bits" else -x, x)


class Nothing(StepX):
    """x' = x: nothing below is taught."""

    doc = "no target: nothing below is taught"
    transports = passes = False

    def __init__(self, place: Place):
        super().__init__()

    def target(self, local):
        return ops.at_least_fp32(local.x.detach())


INPUTS = {"gradient": Gradient, "feedback": Feedback, "inverse": Inverse, "exact": Exact, "least_squares": LeastSquares,
          "population": Population, "hill_climb": HillClimb, "hill_climb_binary": HillClimbBinary, "none": Nothing}
