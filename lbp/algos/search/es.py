from __future__ import annotations

import torch

from lbp.algos import ops
from lbp.algos.rule import Facts, Learned, LearningRule, Rng
from lbp.algos.search import population
from lbp.errors import Refused


class ES(LearningRule):
    """Evolution strategies: the gradient is guessed from the losses of many noisy copies of the whole network.

    Each batch, `members` copies have N(0, std^2) added to every parameter; the gradient is their noise, weighted by how their
    losses compare (Salimans et al. 2017). `antithetic`: noise comes in pairs of both signs. `utility=rank` puts the place of a
    loss among the others for it, which keeps the gradient's direction and drops its scale. No derivative is taken, so that
    blocks need none. The angle to the gradient of P parameters is about acos sqrt(K / (K + P + 1)) for K draws of noise: what
    learns well is small, or has many members.
    """

    facts = Facts(
        family="search", paper="Salimans, Ho, Chen, Sidor & Sutskever, arXiv 1703.03864 (2017)",
        weight_transport=False, backward_locked=False, update_locked=True, needs_derivative=False, batch_coupled=True)

    def __init__(self, network, task, *, members: int, std: float, antithetic: bool, utility: str, chunk: int | None):
        super().__init__(network, task)
        population.refuse_what_members_share(network, "es")
        if antithetic and members % 2:
            raise Refused(f"algo=es with algo.members={members}: antithetic sampling takes pairs; use an even number, or "
                          "algo.antithetic=false")
        self.members, self.std, self.antithetic, self.utility, self.chunk = members, std, antithetic, utility, chunk
        self.rng = Rng()

    @torch.no_grad()
    def learn(self, x, y, apply):
        with ops.full_precision(x):      # members differ by less than bf16 can tell
            center = population.genes(self.network)
            draws = self.members // 2 if self.antithetic else self.members
            noise = population.gaussian(center.new_empty(draws, len(center)), self.rng.generator)
            signs = (1, -1) if self.antithetic else (1,)
            scores = torch.cat([population.losses(self.network, self.task, center + sign * self.std * noise, x, y, self.chunk)
                                for sign in signs])
            mine = self.task.count(y)
            count = scores.new_tensor(float(mine))
            ops.over_ranks(scores, count)
            utilities = population.utilities(population.tamed(scores / count.clamp_min(1)), self.utility)
            gradient = population.es_gradient(noise, utilities, self.std)
            out = self.network(x)
            loss = self.task.loss(out, y)
        for p, g in zip(self.network.parameters(), population.expressed(gradient, self.network).values()):
            p.grad = g * mine            # no sum over samples: `apply` divides by their number
        return Learned(out, loss)
