"""What the rules of target propagation share: inverses of blocks, the walk of values, and targets that come down."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lbp.algos import ops
from lbp.algos.rule import Phase
from lbp.archs.network import Layer, Network
from lbp.errors import Refused

# Inverses --------------------------------------------------------------------------------------------------------


def no_noise_in(network: Network, rule: str) -> None:
    """Raises Refused where a block would answer a noisy input otherwise than by the noise."""
    ops.refuse_unsteady(network, {
        "batch norm": f"algo={rule} runs a block on noisy inputs too, and block {{}}'s batch norm would mix their statistics; "
                      "use arch.norm=none or layer",
        "dropout": f"algo={rule} compares a block's outputs for two inputs, and block {{}}'s dropout would drop other units for each; "
                   "use arch.dropout=0",
        "draws": f"algo={rule} compares a block's outputs for two inputs, and block {{}} would draw others for each; "
                 "use arch.activation=step_ste"})


def inverses(network: Network, rule: str, chain: list[str], activation: str = "none", bias: bool = False) -> nn.ModuleDict:
    """A map from outputs to inputs of each block of `chain` above its first, named by it, on the network's device.

    `activation=same`: ends in that of the block whose output it rebuilds. Where inverses count in differences alone, a
    `bias` before no activation would cancel. Raises Refused where a hidden block is no plain layer.
    """
    ops.plain_layers(network, rule, of=(nn.Linear, nn.Conv2d))
    found = {}
    for below, above in zip(chain, chain[1:]):
        parts = [_inverse(network, rule, below, above, bias)]
        if activation == "same" and not isinstance(network.blocks[below].activation, nn.Identity):
            parts.append(copy.deepcopy(network.blocks[below].activation))
        found[above] = nn.Sequential(*parts) if len(parts) > 1 else parts[0]
    weight = network.head.weight
    return nn.ModuleDict(found).to(weight.device, weight.dtype)


def _inverse(network: Network, rule: str, below: str, above: str, bias: bool) -> nn.Module:
    """One layer, like the block's."""
    block, inputs, outputs = network.blocks[above], network.shapes[below], network.shapes[above]
    if isinstance(block, Layer) and isinstance(block.linear, nn.Conv2d):
        return InverseConvolution(block.linear, inputs, outputs, rule, above, bias)
    if inputs[:-1] == outputs[:-1]:     # a vector, or one a token
        return nn.Linear(outputs[-1], inputs[-1], bias)
    parts = [nn.Linear(torch.Size(outputs).numel(), torch.Size(inputs).numel(), bias), nn.Unflatten(1, inputs)]
    return nn.Sequential(*([nn.Flatten()] if len(outputs) > 1 else []), *parts)


class InverseConvolution(nn.Module):
    """Undoes flattening and pooling by repeating values, then a transposed convolution of the same geometry."""

    def __init__(self, conv: nn.Conv2d, below: tuple[int, ...], above: tuple[int, ...], rule: str, name: str, bias: bool):
        super().__init__()
        self.below = below[1:]
        with torch.no_grad():
            self.mapped = tuple(conv(conv.weight.new_zeros(1, *below)).shape[2:])
        padding = ops.padding_in_numbers(conv.padding, conv.kernel_size, conv.dilation)
        positions = torch.Size(above).numel() // conv.out_channels
        shrink = max(1, round((self.mapped[0] * self.mapped[1] / positions) ** 0.5))
        self.pooled = (conv.out_channels, self.mapped[0] // shrink, self.mapped[1] // shrink)
        if torch.Size(self.pooled).numel() != torch.Size(above).numel():
            raise Refused(f"algo={rule} cannot undo block {name}'s pooling of {conv.out_channels}x{self.mapped} to {above}; "
                          "pool by whole numbers, alike in both directions, or use arch=mlp")
        self.conv = nn.ConvTranspose2d(conv.out_channels, conv.in_channels, conv.kernel_size, conv.stride, padding,
                                       groups=conv.groups, bias=bias, dilation=conv.dilation)

    def forward(self, y: Tensor) -> Tensor:
        y = F.interpolate(y.reshape(len(y), *self.pooled), self.mapped)
        return self.conv(y, output_size=self.below)


# Values and targets ----------------------------------------------------------------------------------------------


def walk(network: Network, x: Tensor) -> dict[str, Tensor]:
    """Each block's output, with a graph of its own block alone."""
    values = {}
    for name, block in network.blocks.items():
        values[name] = block(x)
        x = values[name].detach()
    return values


def exact(network: Network, x: Tensor, values: dict[str, Tensor]) -> dict[str, Tensor]:
    """The values of `walk`, detached and in at least fp32. Where they are bf16 they come of a pass of their own: noisy values are
    set against them, and bf16 would round away what the noise has done."""
    if all(h.dtype != torch.bfloat16 for h in values.values()):
        return {name: h.detach() for name, h in values.items()}
    with torch.no_grad(), ops.full_precision(x):
        return walk(network, x)


def bring_down(values: dict[str, Tensor], inverses: nn.ModuleDict, target: Tensor,
               difference: bool = True) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(Targets of all blocks of `values`, of which the last has `target`; what the inverses rebuild of each but the last):
    t_{l-1} = h_{l-1} + g_l(t_l) - g_l(h_l), or without `difference` g_l(t_l)."""
    names = list(values)
    targets, rebuilt = {names[-1]: target}, {}
    for below, above in reversed(list(zip(names, names[1:]))):
        g = inverses[above]
        rebuilt[below], targets[below] = g(values[above]), g(targets[above])
        if difference:
            targets[below] += values[below] - rebuilt[below]
    return targets, rebuilt


def feedback_first(rule) -> list[Phase]:
    """The phases of a rule that learns its way back alone for `feedback_epochs`, by `learn_feedback`, before it trains."""
    before = [Phase("feedback", learn=rule.learn_feedback, epochs=rule.feedback_epochs)] if rule.feedback_epochs else []
    return [*before, Phase("train", learn=rule.learn)]


def step_feedback(loss: Tensor, x: Tensor, apply) -> Tensor:
    """One step of the inverses down their loss, which is returned; none where `x` is not finite, which bounded units hide."""
    loss.backward()
    apply("feedback", loss.detach() + 0 * x.sum().to(loss.dtype))
    return loss.detach()


def teach(graphs: dict[str, Tensor], values: dict[str, Tensor], targets: dict[str, Tensor], beta: float) -> None:
    """Each block that has a target learns by the derivative of |h - t|^2 / (2 beta): backprop's error where t = h - beta dL/dh."""
    for name, target in targets.items():
        ops.teach(graphs.pop(name), (values[name] - target) / beta)


def distances(values: dict[str, Tensor], targets: dict[str, Tensor],
              rebuilt: dict[str, Tensor] | None = None) -> dict[str, dict[str, Tensor]]:
    """What is logged of each block: |t - h|, and |g(f(h)) - h|^2 / |h|^2 where something was rebuilt; means over the batch."""
    found = {}
    for name, target in targets.items():
        h = values[name].flatten(1)
        found[name] = {"target_distance": (target.flatten(1) - h).norm(dim=1).mean()}
        if name in (rebuilt or {}):
            found[name]["reconstruction_error"] = ((rebuilt[name].flatten(1) - h).square().sum(1) / h.square().sum(1)).mean()
    return found
