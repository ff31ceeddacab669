from __future__ import annotations

import torch
from torch import Tensor, nn

from lbp.algos import ops
from lbp.algos.rule import Facts, Learned, LearningRule, Rng
from lbp.algos.targets.inverses import distances, exact, feedback_first, no_noise_in, step_feedback, teach, walk


class DDTPLinear(LearningRule):
    """Direct difference target propagation: a matrix from the output to each block, learned as an inverse of all that is above.

    t_l = h_l + (t_L - h_L) B_l with t_L = h_L - dL/dh_L (Meulemans et al. 2020, DDTP-linear): the signal of direct feedback
    alignment, whose matrices learn. `feedback_steps` times a batch, and before that alone for `feedback_epochs`, noise is added to
    each block's output and run up to the network's, and B_l is trained on |(h_L(h_l + noise) - h_L) B_l - noise|^2 / deviation^2. With
    optimizer.feedback.weight_decay B_l tends to a damped pseudo-inverse of the Jacobian, averaged over the samples. Being linear,
    a longer step at the output would move all targets further in the same direction, and is therefore no knob. The head receives
    its exact gradient.
    """

    facts = Facts(
        family="targets", paper="Meulemans et al., NeurIPS 2020, arXiv 2006.14331",
        weight_transport=False, backward_locked=False, update_locked=True)

    def __init__(self, network, task, *, noise: float, init: str, scale: float, maps: str, feedback_steps: int,
                 feedback_epochs: int):
        super().__init__(network, task)
        self.noise, self.feedback_steps, self.feedback_epochs = noise, feedback_steps, feedback_epochs
        self.projections = ops.projections(network, maps)
        no_noise_in(network, "ddtp_linear")
        self.matrices = nn.ParameterDict(ops.matrices(network, self.projections, init, scale))
        self.rng = Rng()

    def groups(self):
        return {"forward": list(self.network.parameters()), "feedback": list(self.matrices.parameters())}

    def phases(self):
        return feedback_first(self)

    def learn_feedback(self, x, y, apply):
        with torch.no_grad():
            values = exact(self.network, x, walk(self.network, x))
        return Learned(None, self._train_matrices(x, values, apply))

    def learn(self, x, y, apply):
        graphs = walk(self.network, x)
        values = exact(self.network, x, graphs)
        for _ in range(self.feedback_steps):
            feedback_loss = self._train_matrices(x, values, apply)
        *hidden, head = values
        error, learned = ops.teach_head(self.task, graphs[head], y)
        with torch.no_grad(), ops.full_precision(x):
            targets = {name: values[name] - self.projections[name](error, self.matrices[name]) for name in hidden}
            learned.blocks = distances(values, targets)
        teach(graphs, values, targets, 1.0)
        if self.feedback_steps:
            learned.blocks[head] = {"feedback_loss": feedback_loss / len(x)}
        return learned

    def _train_matrices(self, x: Tensor, values: dict[str, Tensor], apply) -> Tensor:
        loss, (*hidden, head) = 0.0, values
        for i, name in enumerate(hidden):
            noise = self.noise * self.rng.normal(values[name])
            with ops.full_precision(noise):
                with torch.no_grad():
                    moved = values[name] + noise
                    for above in (*hidden[i + 1 :], head):
                        moved = self.network.blocks[above](moved)
                back = self.projections[name](moved - values[head], self.matrices[name])
                loss = loss + (back - noise).square().sum() / self.noise**2
        return step_feedback(loss, x, apply)

    def feedback(self):
        return ops.beside_the_head(self.network, self.matrices[list(self.network.hidden)[-1]])
