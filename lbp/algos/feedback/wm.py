from __future__ import annotations

import torch
from torch import nn

from lbp.algos import ops
from lbp.algos.feedback.fa import buffer_name
from lbp.algos.rule import Facts, Learned, LearningRule, Phase, Rng
from lbp.archs.init import draw
from lbp.archs.network import CONVOLUTIONS, activation


class WM(LearningRule):
    """Weight mirrors: feedback alignment whose matrices learn the weights from how layers answer to noise.

    After each batch every layer alone is shown noise xi of variance noise^2 and answers v = f(xi W^T + b); then
    B <- (1 - decay) B + rate / noise^2 * mean of v xi^T (Akrout et al. 2019, equation 7). For a linear f (`response=none`)
    the mean is noise^2 W: B tends to (rate / decay) W, and with decay 0 grows along W. `center` takes the batch's mean
    off v, which else adds noise of the size of f(b). A convolution is shown single patches, as many as the batch has
    samples. For `warmup_epochs` before the training, layers are mirrored alone.
    """

    facts = Facts(
        family="feedback", paper="Akrout et al., NeurIPS 2019, arXiv 1904.05391",
        weight_transport=False, backward_locked=True, update_locked=True, in_place=True)

    def __init__(self, network, task, *, init: str, scale: float, noise: float, rate: float, decay: float, response: str,
                 center: bool, warmup_epochs: int):
        super().__init__(network, task)
        self.noise, self.rate, self.decay, self.center, self.warmup_epochs = noise, rate, decay, center, warmup_epochs
        self.response, self.rng = activation(response), Rng()
        self.sites = ops.feedback_sites(network)
        modules = {id(m.weight): m for m in network.modules() if isinstance(m, (nn.Linear, *CONVOLUTIONS))}
        self.biases = {name: getattr(modules.get(id(weight)), "bias", None) for name, weight in self.sites.items()}
        self.cut = {name: getattr(modules.get(id(weight)), "groups", 1) for name, weight in self.sites.items()}
        for name, weight in self.sites.items():
            self.register_buffer(buffer_name(name), draw(torch.empty_like(weight, requires_grad=False), init, scale))

    def phases(self):
        warmup = [Phase("mirror", learn=self.only_mirror, epochs=self.warmup_epochs)] if self.warmup_epochs else []
        return [*warmup, Phase("train", learn=self.learn)]

    def only_mirror(self, x, y, apply):
        with torch.no_grad():
            out = self.network(x)
            learned = Learned(out, self.task.loss(out, y))
        self.mirror(x, learned.loss)
        return learned

    def pairs(self) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """{parameter name: (W, B)}."""
        return {name: (weight, getattr(self, buffer_name(name))) for name, weight in self.sites.items()}

    def learn(self, x, y, apply):
        learned = ops.learn_through(self.network, self.task, x, y, list(self.pairs().values()))
        self.mirror(x, learned.loss)
        return learned

    @torch.no_grad()
    def mirror(self, x: torch.Tensor, loss: torch.Tensor) -> None:
        """One step of all B, with as many rows of noise as the batch has samples; none where the loss is not finite."""
        step = ops.all_finite(loss)
        with ops.full_precision(x):
            for name, weight in self.sites.items():
                groups, bias = self.cut[name], self.biases[name]
                xi = self.noise * self.rng.normal(weight.new_empty(len(x), groups, weight[0].numel()))
                a = torch.einsum("ngi,goi->ngo", xi, weight.view(groups, -1, xi.shape[2]))
                v = self.response(a if bias is None else a + bias.view(groups, -1))
                found = covariance(v, xi) if self.center else mean_product(v, xi)
                B = getattr(self, buffer_name(name))
                B.add_((found.view_as(B) * (self.rate / self.noise**2) - B * self.decay) * step.to(B.dtype))

    def feedback(self):
        return ops.by_block(self.pairs())


def mean_product(v: torch.Tensor, xi: torch.Tensor) -> torch.Tensor:
    """The mean over the rows of all ranks of v xi^T: (N, groups, out), (N, groups, in) -> (groups, out, in)."""
    return _means(torch.einsum("ngo,ngi->goi", v, xi), len(v))[0]


def covariance(v: torch.Tensor, xi: torch.Tensor) -> torch.Tensor:
    """The same of v and xi without their means."""
    product, mean_v, mean_xi = _means(torch.einsum("ngo,ngi->goi", v, xi), len(v), v.sum(0), xi.sum(0))
    return product - mean_v[:, :, None] * mean_xi[:, None]


def _means(product: torch.Tensor, rows: int, *sums: torch.Tensor) -> list[torch.Tensor]:
    count = product.new_tensor(float(rows))
    ops.over_ranks(product, count, *sums)
    return [each / count for each in (product, *sums)]
