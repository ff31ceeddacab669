from __future__ import annotations

import math

import torch

from lbp.algos import ops
from lbp.algos.feedback.fa import buffer_name
from lbp.algos.rule import Facts, LearningRule, Rng
from lbp.archs.init import draw, spread


UNIFORM = ("default", "xavier", "kaiming_uniform", "uniform")


class SignSymmetry(LearningRule):
    """Sign symmetry: errors come down through matrices that share with the weights their signs alone.

    B = |M| * sign(W) (Liao, Leibo & Poggio 2016), by `magnitude`: `uniform`, the standard deviation of `init` everywhere
    (uSF); `fixed`, M drawn once (frSF); `batch`, M drawn anew for every batch (brSF). A weight of zero has zero feedback.
    Norms, activations, pools and skips keep their exact derivative.
    """

    facts = Facts(
        family="feedback", paper="Liao, Leibo & Poggio, AAAI 2016, arXiv 1510.05067; Xiao et al., ICLR 2019, arXiv 1811.03567",
        weight_transport=True, backward_locked=True, update_locked=True)

    def __init__(self, network, task, *, init: str, scale: float, magnitude: str):
        super().__init__(network, task)
        self.init, self.scale, self.magnitude = init, scale, magnitude
        self.sites = ops.feedback_sites(network)
        self.sizes: dict[str, torch.Tensor | float] = {}    # |M| of the batch, or what it always is
        for name, weight in self.sites.items():
            if magnitude == "uniform":
                self.sizes[name] = spread(weight, init, scale)
            else:
                self.sizes[name] = draw(torch.empty_like(weight, requires_grad=False), init, scale).abs_()
            if magnitude == "fixed":
                self.register_buffer(buffer_name(name), self.sizes.pop(name))
        # Written anew for every batch: memory of that size is expensive to ask for.
        self.signed = {name: torch.empty_like(weight, requires_grad=False) for name, weight in self.sites.items()}
        if magnitude == "batch":
            self.rng = Rng()

    def pairs(self) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """{parameter name: (W, B)} at the present weights."""
        sizes = self.sizes or {name: getattr(self, buffer_name(name)) for name in self.sites}
        return {name: (weight, torch.sign(weight.detach(), out=self.signed[name]).mul_(sizes[name]))
                for name, weight in self.sites.items()}

    def learn(self, x, y, apply):
        if self.magnitude == "batch":
            for name in self.sites:
                redraw(self.sizes[name], self.init, self.scale, self.rng.generator)
        return ops.learn_through(self.network, self.task, x, y, list(self.pairs().values()))

    def feedback(self):
        return ops.by_block(self.pairs())


def redraw(size: torch.Tensor, init: str, scale: float, generator: torch.Generator) -> None:
    """Fills `size` with |M| anew, the same on every rank and device.

    A uniform M in steps of 1/16 of its bound, whose mean is that of the whole interval and whose variance is 0.996 of it: half a
    byte is drawn in a sixteenth of a float's time, which else would be half of a training step.
    """
    if init not in UNIFORM:
        size.copy_(draw(torch.empty(size.shape, dtype=size.dtype), init, scale, generator).abs_())
        return
    half = -(-size.numel() // 2)
    words = torch.empty(-(-half // 8), dtype=torch.int64).random_(-(2**63), None, generator=generator)
    pairs, flat = words.view(torch.uint8)[:half].to(size.device), size.view(-1)
    flat[:half].copy_(pairs & 15)
    flat[half:].copy_((pairs >> 4)[: size.numel() - half])
    step = math.sqrt(3) * spread(size, init, scale) / 16
    torch.add(size.new_tensor(step / 2), size, alpha=step, out=size)
