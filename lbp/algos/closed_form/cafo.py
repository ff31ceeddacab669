from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lbp.algos import ops
from lbp.algos.closed_form.least_squares import Gram, ridge_solution
from lbp.algos.rule import Facts, LearningRule, Phase
from lbp.errors import Diverged, Refused


class CaFo(LearningRule):
    """Cascaded forward: hidden blocks stay random, each has a linear predictor, and predictions are averaged.

    A predictor is the ridge regression of the targets on its block's output, (Phi^T Phi + ridge s I)^-1 Phi^T Y for s the mean
    of Phi^T Phi's diagonal, with a bias that is not penalised (Zhao et al. 2023, the squared loss); that of the last hidden
    block is the head. Batch norms in the blocks get the statistics of the training data. It is elm with a read-out for
    each block.
    """

    facts = Facts(
        family="closed_form", paper="Zhao, Wang, Jin, Lang, Li & Ling, arXiv 2303.09728 (2023)",
        weight_transport=False, backward_locked=False, update_locked=False, needs_derivative=False,
        in_place=True, optimized=False, closed_form=True)

    def __init__(self, network, task, *, ridge: float, head_features: int):
        super().__init__(network, task)
        if task.loss_name != "mse":
            raise Refused(f"algo=cafo solves a squared loss, not dataset.loss={task.loss_name}; leave it out, set "
                          "dataset.loss=mse, or use algo=cafo_gd")
        self.ridge, self.heads = ridge, predictors(network, task, head_features, "cafo")

    def groups(self):
        return {}

    def phases(self):
        return [Phase("fit", fit=self.fit)]

    @torch.no_grad()
    def fit(self, batches):
        self.network.eval()
        settle_batch_norms(self.network, batches)
        for name in self.network.hidden:
            *before, linear = self.heads[name] if name in self.heads else [self.network.head]
            found = Gram(linear.in_features, len(linear.weight), linear.weight, linear.weight.dtype)
            for x, y in batches(4096):
                for each, block in self.network.hidden.items():
                    x = block(x)
                    if each == name:
                        break
                for module in before:
                    x = module(x)
                found.add(x, self.task.onehot(y))
            found.gather()
            solution = ridge_solution(found.gram, found.cross, self.ridge * float(found.gram.diagonal()[:-1].mean()))
            linear.weight.copy_(solution[:-1].T)
            linear.bias.copy_(solution[-1])

    def predict(self, x):
        return combined([out for _, out in block_outputs(self.network, self.heads, x)], self.task.loss_name)


def predictors(network, task, features: int, rule: str) -> nn.ModuleDict:
    """A linear read-out for each hidden block but the last, whose own is the head."""
    last, shape = list(network.shapes.items())[-1]
    if len(shape) > 1:
        raise Refused(f"algo={rule} predicts from whole samples, and block {last} answers for each token; {ops.elsewhere(network)}")
    weight = network.head.weight
    return nn.ModuleDict({name: pooled_readout(network.shapes[name], task.outputs, features).to(weight.device, weight.dtype)
                          for name in list(network.hidden)[:-1]})


def pooled_readout(shape: tuple[int, ...], outputs: int, features: int) -> nn.Sequential:
    """Linear on a block's flattened output; maps are average-pooled to the largest square that leaves at most `features`."""
    if len(shape) != 3:
        return nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape), outputs))
    side = max(1, min(*shape[1:], math.isqrt(features // shape[0])))
    return nn.Sequential(nn.AdaptiveAvgPool2d(side), nn.Flatten(), nn.Linear(shape[0] * side * side, outputs))


def block_outputs(network, heads: nn.ModuleDict, x: Tensor) -> list[tuple[str, Tensor]]:
    """[(hidden block, what its predictor says)]; the blocks themselves are taught nothing."""
    outs = []
    for name, block in network.hidden.items():
        with torch.no_grad():
            x = block(x)
        outs.append((name, (heads[name] if name in heads else network.head)(x)))
    return outs


def combined(outs: list[Tensor], loss_name: str) -> Tensor:
    """The mean of the predictions: under cross entropy the logarithm of the mean of probabilities, else of the outputs."""
    if loss_name != "cross_entropy":
        return torch.stack(outs).mean(0)
    return torch.stack([ops.at_least_fp32(out).log_softmax(-1) for out in outs]).logsumexp(0) - math.log(len(outs))


def settle_batch_norms(network, batches) -> None:
    """Gives batch norms the mean statistics of a pass over the training data. Raises Diverged, and leaves them as they
    were, where those are not finite."""
    kinds = nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d
    found = [m for m in network.modules() if isinstance(m, kinds) and m.track_running_stats]
    if not found:
        return
    before = [(m, m.momentum, {key: value.clone() for key, value in m.state_dict().items()}) for m in found]
    for m in found:
        m.reset_running_stats()
        m.momentum = None    # torch then averages over batches
        m.train()
    for x, _ in batches(4096):
        for block in network.hidden.values():
            x = block(x)
    for m, momentum, state in before:
        m.eval()
        m.momentum = momentum
        count = m.running_mean.new_ones(())
        ops.over_ranks(m.running_mean, m.running_var, count)
        m.running_mean /= count
        m.running_var /= count
    if not all(m.running_var.isfinite().all() for m in found):
        for m, _, state in before:
            m.load_state_dict(state)
        raise Diverged("the statistics of a batch norm over the training data are not finite")
