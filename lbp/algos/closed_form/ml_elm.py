from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from lbp.algos import ops
from lbp.algos.closed_form.inverses import Weights
from lbp.algos.closed_form.least_squares import Gram, Solution, truncated
from lbp.algos.closed_form.stages import finish, look, rows_at_once
from lbp.algos.rule import Facts, LearningRule, Phase, Solved
from lbp.errors import Refused


class MLELM(LearningRule):
    """Multilayer extreme learning machine: each hidden layer rebuilds its own inputs, from random features; the head is solved.

    With the drawn weights R (D + 1, units), A = [X, 1] R, and B the least squares solution of A B = [X, 1], the layer becomes W = B^T; the
    head is pinv([H, 1]) T. Linear features, as in the baseline of Ranganathan & Lewandowski 2020, need no more than [X, 1]^T [X, 1]: one
    pass a layer. Kasun et al. 2013 have an activation there. No label reaches a hidden layer.
    """

    facts = Facts(
        family="closed_form", paper="Kasun, Zhou, Huang & Vong, IEEE Intelligent Systems 28 (2013); Ranganathan & Lewandowski, arXiv 2011.08895",
        weight_transport=False, backward_locked=False, update_locked=True, needs_derivative=False,
        in_place=True, optimized=False, closed_form=True)

    def __init__(self, network, task, *, rcond: float, ridge: float):
        super().__init__(network, task)
        if task.loss_name != "mse":
            raise Refused(f"algo=ml_elm solves a squared loss, not dataset.loss={task.loss_name}; leave it out or set dataset.loss=mse")
        self.rcond, self.ridge = rcond, ridge
        for name, layer in ops.plain_layers(network, "ml_elm", (nn.Linear, nn.Conv2d)).items():
            if not isinstance(layer.norm, nn.Identity):
                raise Refused(f"algo=ml_elm: block {name} has a norm, made for the inputs that it had before; use arch.norm=none")
            if getattr(layer.linear, "groups", 1) > 1:
                raise Refused(f"algo=ml_elm: block {name} has a convolution in groups; use arch=cnn or arch=mlp")
        inputs = [network.in_shape, *network.shapes.values()]
        self.layers = {name: Weights(name, getattr(block, "linear", block), shape) for (name, block), shape in zip(network.blocks.items(), inputs)}

    def groups(self):
        return {}

    def phases(self):
        return [Phase("as drawn", fit=partial(look, self.task))] + [Phase(name, fit=partial(self.solve, name)) for name in self.network.blocks]

    @torch.no_grad()
    def solve(self, name: str, batches) -> Solved:
        self.network.eval()
        stage, hidden = self.layers[name], name in self.network.hidden
        found = Gram(stage.features, 0 if hidden else self.task.outputs, self.network.head.weight)
        for x, y in batches(rows_at_once(stage)):
            for other, block in self.network.blocks.items():
                if other == name:
                    break
                x = block(x)
            rows = stage.rows(block.incoming(x) if hidden else x)
            found.add(rows, rows[:, :0] if hidden else self.task.onehot(y).view(len(y), -1))
        found.gather()
        solution = autoencoder(found.gram, stage.read(), self.rcond) if hidden else found.solve(self.rcond, self.ridge)
        return finish(stage, found, solution, solution.weight)


def autoencoder(gram: Tensor, drawn: Tensor, rcond: float) -> Solution:
    """W (D + 1, units) = B^T of least norm that minimises |X R B - X|^2, from X^T X (D + 1, D + 1) and R (D + 1, units)."""
    cross = drawn.T @ gram
    found = truncated(cross @ drawn, cross, rcond)
    return found._replace(weight=found.weight.T)
