"""The half of a machine whose block learns to reach its target and to be undone."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lbp.algos import ops
from lbp.algos.forward.sigprop_parts import statistics_kept
from lbp.algos.targets.halves import Knob, Local, Place, StepTheta
from lbp.algos.targets.inverses import InverseConvolution
from lbp.archs.network import Layer


class Autoencode(StepTheta):
    """The gradient of L(h) + weight |x - D(h)|^2 / 2: the block is an encoder too, whose decoder D learns beside it.

    L is the block's local loss, of a hidden one |h - t|^2 / 2. D is one layer, dense or a transposed convolution, and
    has an optimizer as learned inverses have (group "feedback"). `decoder(block(x))` rebuilds x.
    """

    doc = "an autoencoder too: the gradient of the local loss and of what a decoder (group \"feedback\") fails to rebuild of the input"
    knobs = {"weight": Knob(0.001, "float > 0", "of the squared reconstruction error beside the local loss")}
    needs_derivative = True

    def __init__(self, place: Place, *, weight: float):
        super().__init__()
        if len(place.below) == 1 and any(isinstance(m, torch.nn.Embedding) for m in place.block.modules()):
            raise place.refuse("rebuilds numbers, and the inputs of this block are symbols; choose another half for it")
        self.weight = weight
        p = next(place.block.parameters(), torch.empty(0))
        self.decoder = decoder(place).to(p.device, p.dtype)

    def step(self, local, settle):
        with torch.enable_grad():
            loss, error = self.losses(local)
            loss.backward(inputs=[*local.parameters, *self.decoder.parameters()])
        if settle:
            settle()
            local.renew()
        return {"reconstruction_error": error}

    def losses(self, local: Local) -> tuple[Tensor, Tensor]:
        """(The loss summed over samples, |x - D(h)|^2 / |x|^2), in a pass of their own: the other half may have used up the block's graph."""
        x = ops.at_least_fp32(local.x.detach())
        with statistics_kept(local.block):
            h = local.run(local.x.detach())
        with ops.full_precision(x):
            missing = (x - self.decoder(ops.at_least_fp32(h))).square().sum()
            return local.loss(h).sum() + self.weight * missing / 2, (missing / x.square().sum()).detach()


def decoder(place: Place) -> nn.Module:
    """One layer from the block's outputs back to its inputs: as many maps, a vector, or a vector for each token."""
    below, above, block = place.below, place.above, place.block
    if not below:
        raise place.refuse("needs to know the size of the block's input; give in_shape=")
    if isinstance(block, Layer) and isinstance(block.linear, nn.Conv2d):
        return InverseConvolution(block.linear, below, above, "machines", place.where.split()[-1], True)
    if below[:-1] == above[:-1]:
        return nn.Linear(above[-1], below[-1])
    return nn.Sequential(nn.Flatten(), nn.Linear(torch.Size(above).numel(), torch.Size(below).numel()), nn.Unflatten(1, below))
