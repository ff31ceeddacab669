from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lbp.algos import ops
from lbp.algos.rule import Facts, Learned, LearningRule, Phase, Rng
from lbp.archs.network import Layer
from lbp.errors import Refused


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
        layers = ops.plain_layers(network, "ldrl", of=(nn.Linear, nn.Conv2d))
        for name, layer in layers.items():
            if isinstance(layer.norm, (nn.BatchNorm1d, nn.BatchNorm2d)):
                raise Refused(f"algo=ldrl runs a block on noisy inputs too, and block {name}'s batch norm would mix their "
                              "statistics; use arch.norm=none or layer")
            if isinstance(layer.dropout, nn.Dropout) and layer.dropout.p:
                raise Refused(f"algo=ldrl compares a block's outputs for two inputs, and block {name}'s dropout would drop "
                              "other units for each; use arch.dropout=0")
        names, weight = list(network.blocks), network.head.weight
        self.inverses = nn.ModuleDict({
            above: inverse(network.blocks[above], network.shapes[below], network.shapes[above])
            for below, above in zip(names, names[1:])}).to(weight.device, weight.dtype)
        self.rng = Rng()

    def groups(self):
        return {"forward": list(self.network.parameters()), "feedback": list(self.inverses.parameters())}

    def phases(self):
        before = [Phase("feedback", learn=self.learn_feedback, epochs=self.feedback_epochs)] if self.feedback_epochs else []
        return [*before, *super().phases()]

    def learn_feedback(self, x, y, apply):
        with torch.no_grad():
            values = {name: ops.at_least_fp32(h) for name, h in self._values(x).items()}
        return Learned(None, self._train_inverses(values, apply))

    def learn(self, x, y, apply):
        values = self._values(x)
        detached = {name: ops.at_least_fp32(h.detach()) for name, h in values.items()}
        for _ in range(self.feedback_steps):
            feedback_loss = self._train_inverses(detached, apply)
        *hidden, head = values
        out = detached[head]
        error = self.task.error(out, y)
        with torch.no_grad(), ops.full_precision(x):
            loss = self.task.loss(out, y)
            targets = {head: out - self.beta * error}
            for below, above in reversed(list(zip(values, hidden[1:] + [head]))):
                g = self.inverses[above]
                targets[below] = detached[below] + g(targets[above]) - g(detached[above])
        for name, h in values.items():
            # The derivative of |h - t|^2 / (2 beta): backprop's error at the output, close to it below.
            h.backward(((detached[name] - targets[name]) / self.beta).to(h.dtype))
        blocks = {name: {"target_distance": (targets[name] - detached[name]).flatten(1).norm(dim=1).mean()} for name in hidden}
        if self.feedback_steps:
            blocks[head] = {"feedback_loss": feedback_loss / len(x)}
        return Learned(out, loss, blocks)

    def _values(self, x: Tensor) -> dict[str, Tensor]:
        values = {}
        for name, block in self.network.blocks.items():
            values[name] = block(x)
            x = values[name].detach()
        return values

    def _train_inverses(self, values: dict[str, Tensor], apply) -> Tensor:
        loss = 0.0
        for below, above in zip(values, list(values)[1:]):
            x, y = values[below], values[above]
            dx, dy = self.noise * self.rng.normal(x), self.noise * self.rng.normal(y)
            with ops.full_precision(x):
                with torch.no_grad():
                    moved = self.network.blocks[above](x + dx)
                loss = loss + difference_reconstruction_loss(self.inverses[above], y, moved, dx, dy).sum() / self.noise**2
        loss.backward()
        apply("feedback", loss.detach())
        return loss.detach()


def difference_reconstruction_loss(g, y: Tensor, moved: Tensor, dx: Tensor, dy: Tensor) -> Tensor:
    """-2 <dx, g(f(x+dx)) - g(y)> + |g(y+dy) - g(y)|^2, (N,), for y = f(x) and moved = f(x+dx)."""
    r = g(y)
    return -2 * (dx * (g(moved) - r)).flatten(1).sum(1) + (g(y + dy) - r).square().flatten(1).sum(1)


def inverse(block: nn.Module, below: tuple[int, ...], above: tuple[int, ...]) -> nn.Module:
    """A map from outputs of `block` (shape `above`) back to its inputs (shape `below`): one layer, like the block's."""
    if isinstance(block, Layer) and isinstance(block.linear, nn.Conv2d):
        return InverseConvolution(block.linear, below, above)
    size = torch.Size(below).numel()
    flat = nn.Linear(torch.Size(above).numel(), size, bias=False)  # a bias would cancel in every difference
    return flat if len(below) == 1 else nn.Sequential(flat, nn.Unflatten(1, below))


class InverseConvolution(nn.Module):
    """Undoes flattening and pooling by repeating values, then a transposed convolution of the same geometry."""

    def __init__(self, conv: nn.Conv2d, below: tuple[int, ...], above: tuple[int, ...]):
        super().__init__()
        self.below = below[1:]
        with torch.no_grad():
            self.mapped = tuple(conv(conv.weight.new_zeros(1, *below)).shape[2:])
        padding = ops.padding_in_numbers(conv.padding, conv.kernel_size, conv.dilation)
        positions = torch.Size(above).numel() // conv.out_channels
        shrink = max(1, round((self.mapped[0] * self.mapped[1] / positions) ** 0.5))
        self.pooled = (conv.out_channels, self.mapped[0] // shrink, self.mapped[1] // shrink)
        if torch.Size(self.pooled).numel() != torch.Size(above).numel():
            raise Refused(f"algo=ldrl cannot undo the pooling of {conv.out_channels}x{self.mapped} to {above}; "
                          "pool by whole numbers, alike in both directions")
        self.conv = nn.ConvTranspose2d(conv.out_channels, conv.in_channels, conv.kernel_size, conv.stride, padding,
                                       groups=conv.groups, bias=False, dilation=conv.dilation)

    def forward(self, y: Tensor) -> Tensor:
        y = F.interpolate(y.reshape(len(y), *self.pooled), self.mapped)
        return self.conv(y, output_size=self.below)
