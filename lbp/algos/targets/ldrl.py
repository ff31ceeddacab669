from __future__ import annotations

import torch
from torch import Tensor

from lbp.algos import ops
from lbp.algos.rule import Facts, Learned, LearningRule, Rng
from lbp.algos.targets.inverses import bring_down, distances, exact, feedback_first, inverses, no_noise_in, step_feedback, teach, walk


class LDRL(LearningRule):
    """Difference target propagation with the local difference reconstruction loss: targets that follow backprop.

    Each block above the first, and the head, has a learned inverse g. Targets come down by t_{l-1} = h_{l-1} +
    g_l(t_l) - g_l(h_l) from t_L = h_L - beta dL/dh_L, and each block moves its output towards its target. The inverses
    are trained, `feedback_steps` times a batch, on -2 <dx, g(f(x+dx)) - g(y)> + |g(y+dy) - g(y)|^2, whose minimum has the
    transposed Jacobian of f (Ernoult et al. 2022); before that alone for `feedback_epochs`.
    """

    facts = Facts(
        family="targets", paper="Ernoult et al., ICML 2022, arXiv 2201.13415",
        weight_transport=False, backward_locked=True, update_locked=True)

    def __init__(self, network, task, *, beta: float, noise: float, feedback_steps: int, feedback_epochs: int):
        super().__init__(network, task)
        self.beta, self.noise = beta, noise
        self.feedback_steps, self.feedback_epochs = feedback_steps, feedback_epochs
        self.inverses = inverses(network, "ldrl", list(network.blocks))
        no_noise_in(network, "ldrl")
        self.rng = Rng()

    def groups(self):
        return {"forward": list(self.network.parameters()), "feedback": list(self.inverses.parameters())}

    def phases(self):
        return feedback_first(self)

    def learn_feedback(self, x, y, apply):
        with torch.no_grad():
            values = exact(self.network, x, walk(self.network, x))
        return Learned(None, self._train_inverses(x, values, apply))

    def learn(self, x, y, apply):
        graphs = walk(self.network, x)
        values = exact(self.network, x, graphs)
        for _ in range(self.feedback_steps):
            feedback_loss = self._train_inverses(x, values, apply)
        *_, head = values
        error, learned = ops.teach_head(self.task, graphs[head], y)
        with torch.no_grad(), ops.full_precision(x):
            targets, _ = bring_down(values, self.inverses, values[head] - self.beta * error)
            del targets[head]
            learned.blocks = distances(values, targets)
        teach(graphs, values, targets, self.beta)
        if self.feedback_steps:
            learned.blocks[head] = {"feedback_loss": feedback_loss / len(x)}
        return learned

    def _train_inverses(self, x: Tensor, values: dict[str, Tensor], apply) -> Tensor:
        loss = 0.0
        for below, above in zip(values, list(values)[1:]):
            h, y = values[below], values[above]
            dx, dy = self.noise * self.rng.normal(h), self.noise * self.rng.normal(y)
            with ops.full_precision(x):
                with torch.no_grad():
                    moved = self.network.blocks[above](h + dx)
                loss = loss + difference_reconstruction_loss(self.inverses[above], y, moved, dx, dy).sum() / self.noise**2
        return step_feedback(loss, x, apply)


def difference_reconstruction_loss(g, y: Tensor, moved: Tensor, dx: Tensor, dy: Tensor) -> Tensor:
    """-2 <dx, g(f(x+dx)) - g(y)> + |g(y+dy) - g(y)|^2, (N,), for y = f(x) and moved = f(x+dx)."""
    r = g(y)
    return -2 * (dx * (g(moved) - r)).flatten(1).sum(1) + (g(y + dy) - r).square().flatten(1).sum(1)
