from __future__ import annotations

import torch
from torch import Tensor
from torch.func import functional_call

from lbp.algos import ops
from lbp.algos.rule import Facts, Learned, LearningRule, Rng
from lbp.algos.search import population
from lbp.errors import Refused


class Genetic(LearningRule):
    """A genetic algorithm over whole networks: each batch is a generation, and the network holds its best member.

    Members are ranked by their loss on the batch. The best `elite` live on unchanged; every other place is taken by a child of
    two members that `selection` chose, put together by `crossover` (hard: each weight from either; full: each weight matrix or
    bias from either; smooth: each weight between the two; none: the first's) and mutated: N(0, strength^2) is added to a share
    `rate` of its weights. A child's strength is its first parent's times exp(adapt N(0, 1)), so that what works is inherited
    (self-adaptation, Schwefel 1981); every member's first one is `mutation`. The first member is the network as drawn, the
    others redraw every weight from its matrix's own mean and deviation. No derivative is taken, so that blocks need none.
    """

    facts = Facts(
        family="search", paper="Holland, Adaptation in Natural and Artificial Systems (1975); Schwefel (1981)",
        weight_transport=False, backward_locked=False, update_locked=True, needs_derivative=False, batch_coupled=True, in_place=True, optimized=False)

    def __init__(self, network, task, *, members: int, elite: int, selection: str, tournament: int, crossover: str, mutation: float,
                 rate: float, adapt: float, chunk: int | None):
        super().__init__(network, task)
        population.refuse_what_members_share(network, "genetic")
        if elite >= members:
            raise Refused(f"algo=genetic with algo.elite={elite}: of algo.members={members} none is left to be replaced; use a smaller "
                          "algo.elite")
        self.members, self.elite, self.chunk = members, elite, chunk
        self.selection, self.tournament, self.crossover = selection, tournament, crossover
        self.rate, self.adapt, self.rng = rate, adapt, Rng()
        first = population.genes(network)
        spread = torch.cat([p.detach().std(correction=0).expand(p.numel()) for p in network.parameters()])
        mean = torch.cat([p.detach().mean().expand(p.numel()) for p in network.parameters()])
        others = population.gaussian(first.expand(members - 1, -1), self.rng.generator, spread, mean)
        self.register_buffer("population", torch.cat([first[None], others]))
        self.register_buffer("strength", first.new_full((members, 1), mutation))

    def groups(self):
        return {}

    @torch.no_grad()
    def learn(self, x, y, apply):
        with ops.full_precision(x):      # members differ by less than bf16 can tell
            scores = population.losses(self.network, self.task, self.population, x, y, self.chunk)
            ops.over_ranks(scores)
            scores = population.tamed(scores)
            best = self.population[population.best(scores, 1)[0]]
            out = functional_call(self.network, population.expressed(best, self.network), (x,))
            loss = self.task.loss(out, y)
            sound = ops.all_finite(loss) > 0
            for p, value in zip(self.network.parameters(), population.expressed(best, self.network).values()):
                p.copy_(torch.where(sound, value, p))
            members, strength = self.next_generation(scores)
            self.population.copy_(torch.where(sound, members, self.population))
            self.strength.copy_(torch.where(sound, strength, self.strength))
        return Learned(out, loss)

    def next_generation(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Members and mutation strengths: the elite of these, then children."""
        kept, generator = population.best(scores, self.elite), self.rng.generator
        first, second = self.parents(scores, 2 * (self.members - self.elite), generator).chunk(2)
        strength = self.strength[first]
        strength = strength * (self.adapt * population.gaussian(strength, generator)).exp()
        children = self.crossed(self.population[first], self.population[second], generator)
        mutation = population.gaussian(children, generator, strength)
        children = children + torch.where(population.uniform(children, generator) < self.rate, mutation, 0)
        return torch.cat([self.population[kept], children]), torch.cat([self.strength[kept], strength])

    def parents(self, scores: Tensor, count: int, generator: torch.Generator) -> Tensor:
        if self.selection == "tournament":
            return population.tournament(scores, count, self.tournament, generator)
        if self.selection == "softmax":
            scores = population.utilities(scores, "standard")    # losses have no scale of their own
        elif self.selection == "normalise":
            scores = scores - scores.amin().clamp_max(0)
        return population.chosen(population.weights(scores, self.selection), count, generator)

    def crossed(self, a: Tensor, b: Tensor, generator: torch.Generator) -> Tensor:
        if self.crossover == "hard":
            return population.hard_crossover(a, b, .5, generator)
        if self.crossover == "smooth":
            return population.smooth_crossover(a, b, 0., generator)
        if self.crossover == "full":
            sizes = [p.numel() for p in self.network.parameters()]
            return torch.cat([population.full_crossover(*pair, .5, generator) for pair in zip(a.split(sizes, 1), b.split(sizes, 1))], 1)
        return a
