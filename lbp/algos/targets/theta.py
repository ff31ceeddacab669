"""How a block's parameters move towards its target: the `step_theta` halves of a learning machine."""

from __future__ import annotations

import torch
from torch import Tensor

from lbp import ranks
from lbp.algos import ops
from lbp.algos.rule import Rng
from lbp.algos.search import population
from lbp.algos.targets.autoencode import Autoencode
from lbp.algos.targets.estimator import Fit
from lbp.algos.targets.halves import Knob, Local, Place, StepTheta, add_gradient
from lbp.algos.targets.solve import Dense, gram_solution

MEMBERS = Knob(32, "int >= 2", "members of the population")
CHUNK = 16      # copies of a block that run at once


class Gradient(StepTheta):
    """The gradient of the local loss, in `steps` passes over the batch, in parts of `batch` samples."""

    doc = "the gradient of the local loss, for the optimizer"
    knobs = {"steps": Knob(1, "int >= 1", "passes over the batch, each with a step of the optimizer"),
             "batch": Knob(0, "int >= 0", "samples a step; 0: the whole batch")}
    needs_derivative = True

    def __init__(self, place: Place, *, steps: int, batch: int):
        super().__init__()
        self.steps, self.batch, self.batch_coupled, self.settles = steps, batch, batch > 0, steps > 1 or batch > 0
        if batch:
            place.steady("takes parts of a batch")
            self.rng = Rng()

    def step(self, local, settle):
        for _ in range(self.steps):
            if self.batch:
                self.parts(local, settle)
            else:
                local.leave()
                if settle:
                    settle()
                    local.renew()

    def parts(self, local: Local, settle) -> None:
        """A pass over the samples of all ranks in a drawn order; each rank has its own of every part."""
        total, mine = ranks.batch_rows(len(local.x))
        start, stop, _ = mine.indices(total)
        for part in torch.randperm(total, generator=self.rng.generator).split(self.batch):
            rows = (part[(part >= start) & (part < stop)] - start).to(local.x.device)
            with torch.enable_grad():
                # `apply` divides by the samples of the whole batch.
                loss = local.loss(local.run(local.x.detach()[rows]), rows).sum() * (total / len(part))
                loss.backward(inputs=local.parameters)
            settle()
            local.renew()


class LeastSquares(StepTheta):
    """W and b move to the least squares solution of the targets, taken back through the activation; whole or in part.

    The change minimises mean |x dW^T + db - (a_t - a)|^2 + ridge |dW, db|^2, with a_t the pre-activation that gives the
    target: at ridge 0 the solution of least squares itself, the one nearest to the weights where there are many.
    """

    doc = "least squares or ridge on the targets, for dense layers"
    knobs = {"ridge": Knob(1.0, "float >= 0", "penalty on the change, set against the mean over samples"),
             "relax": Knob(1.0, "float > 0 <= 1", "share of the way to the solution that is gone")}
    writes, leaves, batch_coupled = True, False, True

    def __init__(self, place: Place, *, ridge: float, relax: float):
        super().__init__()
        self.ridge, self.relax, self.dense = ridge, relax, Dense(place)

    @torch.no_grad()
    def step(self, local, settle):
        dense, bias = self.dense, self.dense.linear.bias
        x, change = dense.rows(local.x), dense.change(local.h, local.t)
        if bias is not None:
            x = torch.cat([x, x.new_ones(len(x), 1)], 1)
        gram, cross, count = x.T @ x, x.T @ change, x.new_tensor(float(len(x)))
        ops.over_ranks(gram, cross, count)
        solution = gram_solution(gram / count, cross / count, self.ridge) * self.relax
        dense.linear.weight += solution[: dense.linear.in_features].T.to(dense.linear.weight.dtype)
        if bias is not None:
            bias += solution[-1].to(bias.dtype)


class Population(StepTheta):
    """Base of halves that compare copies of the block by their local losses: no derivative is taken."""

    def __init__(self, place: Place):
        super().__init__()
        place.steady("runs copies of the block")
        self.rng = Rng()

    def score(self, local: Local, members: Tensor) -> Tensor:
        """(K, P) -> (K,): the local loss of the block with each member's parameters, summed over this rank's samples."""
        x = ops.at_least_fp32(local.x.detach())
        with ops.full_precision(x):      # members differ by less than bf16 can tell
            return population.losses(local.block, local, members, x, None, CHUNK)

    def score_all(self, local: Local, members: Tensor) -> Tensor:
        """The same over the samples of all ranks."""
        scores = self.score(local, members)
        ops.over_ranks(scores)
        return population.tamed(scores)

    def around(self, center: Tensor, members: int, std: float) -> Tensor:
        return center + population.gaussian(center.new_empty(members, center.shape[-1]), self.rng.generator, std)


class ES(Population):
    """The gradient of the local loss, guessed from pairs of noisy copies of the block (antithetic evolution strategies)."""

    doc = "evolution strategies: the gradient guessed from noisy copies, for the optimizer"
    knobs = {"members": MEMBERS, "std": Knob(0.01, "float > 0", "of the noise on the parameters")}

    def __init__(self, place: Place, *, members: int, std: float):
        super().__init__(place)
        if members % 2:
            raise place.refuse(f"takes copies in pairs: members={members} must be even")
        self.members, self.std = members, std

    @torch.no_grad()
    def step(self, local, settle):
        center = population.genes(local.block)
        noise = self.around(torch.zeros_like(center), self.members // 2, 1.0)
        with ops.full_precision(center):
            scores = torch.cat([self.score(local, center + sign * self.std * noise) for sign in (1, -1)])
            gradient = population.es_gradient(noise, scores, self.std)      # linear in the scores: sums over samples add up
        for p, g in zip(local.block.parameters(), population.expressed(gradient, local.block).values()):
            add_gradient(p, g.clone())
        if settle:
            settle()
            local.renew()


class Genetic(Population):
    """A population of the block's parameters: a generation a step, of which the block holds the best.

    The best `elite` stay; the others are children of two tournaments' winners, each value from either, with N(0, std^2) added.
    """

    doc = "a genetic population of the block's parameters"
    knobs = {"members": MEMBERS, "elite": Knob(4, "int >= 1", "members that live on unchanged"),
             "std": Knob(0.02, "float > 0", "of the mutation"), "generations": Knob(1, "int >= 1", "a batch")}
    writes, leaves, batch_coupled = True, False, True

    def __init__(self, place: Place, *, members: int, elite: int, std: float, generations: int):
        super().__init__(place)
        if elite >= members:
            raise place.refuse(f"has elite={elite} of members={members}: none is left to be replaced")
        self.elite, self.std, self.generations = elite, std, generations
        first = population.genes(place.block)
        self.register_buffer("members", torch.cat([first[None], self.around(first, members - 1, std)]))

    @torch.no_grad()
    def step(self, local, settle):
        self.members[0] = population.genes(local.block)     # which something else may have moved
        scores = self.score_all(local, self.members)
        for _ in range(self.generations):
            kept, generator = population.best(scores, self.elite), self.rng.generator
            children = len(scores) - self.elite
            a, b = (self.members[population.tournament(scores, children, 2, generator)] for _ in range(2))
            mutated = population.hard_crossover(a, b, .5, generator)
            mutated = mutated + population.gaussian(mutated, generator, self.std)
            self.members.copy_(torch.cat([self.members[kept], mutated]))
            scores = torch.cat([scores[kept], self.score_all(local, mutated)])
        self.members.copy_(self.members[population.best(scores, len(scores))])
        write(local, self.members[0])


class HillClimb(Population):
    """The best of `members` neighbours of the parameters, where it is better than they are; `steps` times."""

    doc = "hill climbing: the best of some neighbours, if better"
    knobs = {"members": MEMBERS, "std": Knob(0.02, "float > 0", "of the neighbours' distance"), "steps": Knob(1, "int >= 1", "a batch")}
    writes, leaves, batch_coupled = True, False, True

    def __init__(self, place: Place, *, members: int, std: float, steps: int):
        super().__init__(place)
        self.members, self.std, self.steps = members, std, steps

    @torch.no_grad()
    def step(self, local, settle):
        center = population.genes(local.block)
        for _ in range(self.steps):
            members = torch.cat([center[None], self.around(center, self.members, self.std)])
            center = members[population.best(self.score_all(local, members), 1)[0]]
        write(local, center)


class Nothing(StepTheta):
    """The block stays as it is."""

    doc = "the block stays as it is"
    leaves = False

    def __init__(self, place: Place):
        super().__init__()

    def step(self, local, settle):
        pass


def write(local: Local, genes: Tensor) -> None:
    for p, value in zip(local.block.parameters(), population.expressed(genes, local.block).values()):
        p.copy_(value)


THETA = {"gradient": Gradient, "autoencode": Autoencode, "least_squares": LeastSquares, "sklearn": Fit, "es": ES, "genetic": Genetic,
         "hill_climb": HillClimb, "none": Nothing}
