from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from lbp.archs.hard import Argmax, ArgmaxSTE, Sign, SignSTE
from lbp.archs.init import initialise
from lbp.archs.network import Layer, Network, activation as make_activation, norm as make_norm
from lbp.errors import Refused

# aggregate -> (what each member's output becomes, what becomes of their mean)
AGGREGATES: dict[str, tuple[type[nn.Module], type[nn.Module]]] = {
    "mean": (nn.Identity, nn.Identity), "sign": (nn.Identity, Sign), "sign_ste": (nn.Identity, SignSTE),
    "vote": (Argmax, nn.Identity), "vote_ste": (ArgmaxSTE, nn.Identity),
    "majority": (Argmax, Argmax), "majority_ste": (ArgmaxSTE, ArgmaxSTE),
}
NEVER_BELOW_0 = {"relu", "softplus", "sigmoid", "step", "bernoulli", "argmax", "step_ste", "bernoulli_ste", "argmax_ste"}


class Ensemble(nn.Module):
    """Several blocks of one shape on the same input, and one output of theirs.

    `aggregate`: mean; sign (of the mean); vote (each member's greatest unit is its vote: the shares of the votes); majority (one-hot of
    the unit with most votes, the first of several). Those with _ste have a straight-through derivative, the others than mean none.
    `bootstrap`: in training each member learns from rows of its own, drawn anew each batch with replacement (Breiman 1996): what
    comes back to it counts a row as often as it was drawn. Values forwards are those of all rows.
    """

    def __init__(self, members: Iterable[nn.Module], aggregate: str = "mean", bootstrap: bool = False):
        super().__init__()
        if aggregate not in AGGREGATES:
            raise ValueError(f"aggregate={aggregate}: must be one of {', '.join(AGGREGATES)}")
        self.members, self.bootstrap = nn.ModuleList(members), bootstrap
        self.each, self.joint = (make() for make in AGGREGATES[aggregate])

    def forward(self, x: Tensor) -> Tensor:
        outputs = [member(x) for member in self.members]
        if self.bootstrap and self.training and outputs[0].requires_grad:
            outputs = [counted(h, drawn(h)) for h in outputs]
        return self.joint(torch.stack([self.each(h) for h in outputs]).mean(0))


def drawn(h: Tensor) -> Tensor:
    """How often each row of h is among as many rows drawn from it with replacement, (N, 1, ...)."""
    rows = torch.randint(len(h), (len(h),), device=h.device)
    return torch.zeros(len(h), dtype=h.dtype, device=h.device).scatter_add_(0, rows, h.new_ones(len(h))).view(-1, *[1] * (h.dim() - 1))


def counted(h: Tensor, times: Tensor) -> Tensor:
    """h, to the bit; its gradient is `times` what comes back."""
    values = h.detach()
    return values + (h - values) * times


def ensemble(task, *, widths: list[int], members: int, aggregate: str, bootstrap: bool, activation: str, norm: str, dropout: float,
             init: str, init_scale: float) -> Network:
    """A multilayer perceptron each of whose hidden blocks is an ensemble of dense layers. Images are flattened."""
    if aggregate.startswith("sign") and activation in NEVER_BELOW_0:
        raise Refused(f"arch.aggregate={aggregate} of members that are never below 0 is always 1; set arch.activation=tanh, sign or none")
    blocks: dict[str, nn.Module] = {}
    features = math.prod(task.in_shape)
    for i, width in enumerate(widths, 1):
        layers = [Layer(nn.Linear(features, width), make_norm(norm, width, 0), make_activation(activation), dropout,
                        flatten=i == 1 and len(task.in_shape) > 1) for _ in range(members)]
        blocks[f"fc{i}"] = Ensemble(layers, aggregate, bootstrap)
        features = width
    network = Network({**blocks, "head": nn.Linear(features, task.outputs)}, task.in_shape)
    initialise(network, init, init_scale)
    return network
