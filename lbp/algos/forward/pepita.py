from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lbp.algos import ops
from lbp.algos.rule import Facts, Learned, LearningRule
from lbp.archs.init import draw
from lbp.archs.network import CONVOLUTIONS, NORMS, Layer, Network
from lbp.errors import Refused


class Pepita(LearningRule):
    """PEPITA: a second forward pass, its input modulated by the output's error, stands in for the backward pass.

    The first pass gives activities h_l and the error e = dL/do; the second begins at x' = x + e F, with a fixed random
    F, and gives h'_l and o'. A hidden layer moves along (h_l - h'_l)^T h'_{l-1}, with h'_0 = x', the head along its own error
    (o' - Y)^T h'_{L-1} (Dellaferrera & Kreiman 2022). Dropout drops the same units in both. A convolution's product is taken
    at every position, before pooling: `positions` says how they are put together. Biases, which the paper has none of, move
    along h_l - h'_l. One or two hidden layers learn well; with more the modulation is lost on its way up.
    """

    facts = Facts(
        family="forward", paper="Dellaferrera & Kreiman, ICML 2022, arXiv 2201.11665",
        weight_transport=False, backward_locked=False, update_locked=True, labels_at_input=True, needs_derivative=False)

    def __init__(self, network, task, *, init: str, scale: float, positions: str):
        super().__init__(network, task)
        self.positions = positions
        for name, block in network.hidden.items():
            _check(network, name, block)
        if len(list(network.shapes.values())[-1]) != 1:
            raise Refused("algo=pepita adds one output's error to the whole input: block head answers each token apart; "
                          + ops.elsewhere(network))
        weight = network.head.weight
        self.register_buffer("projection", draw(weight.new_empty(task.outputs, math.prod(network.in_shape)).detach(), init, scale))

    def learn(self, x, y, apply):
        hidden, head = self.network.hidden.values(), self.network.head
        with ops.full_precision(x):      # the two passes differ by less than bf16 can tell
            with torch.no_grad():
                h, activities, masks = x, [], []
                for block in hidden:
                    activity = answer(block, h)[1]
                    masks.append(_part(block, "dropout")(torch.ones_like(activity)))
                    activities.append(activity * masks[-1])
                    h = _part(block, "pooling")(activities[-1])
                out = head(h)
                h = modulated(x, self.task.error(out, y), self.projection)
            for block, activity, mask in zip(hidden, activities, masks):
                a, second = answer(block, h)
                second = (second * mask).detach()
                a.backward(self.per_position(activity - second))
                h = _part(block, "pooling")(second)
            again = head(h)
            again.backward(self.task.error(again, y))
            return Learned(out, self.task.loss(out, y))

    def per_position(self, difference: Tensor) -> Tensor:
        """What each position of a map brings in: (N, C, ...) over the number of positions, its root, or 1."""
        count = difference[0, 0].numel()
        return difference / {"mean": count, "root": math.sqrt(count), "sum": 1}[self.positions]


def modulated(x: Tensor, error: Tensor, projection: Tensor) -> Tensor:
    """x + e F, with F (outputs, inputs)."""
    return x + (error.to(projection.dtype) @ projection).view_as(x)


def answer(block: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """(what the block's weights make of x, the activity that follows: before dropout and pooling)."""
    if not isinstance(block, Layer):
        return block.linear(x), block(x)
    a = block.linear(block.incoming(x))
    return a, block.activation(a)


def _part(block: nn.Module, name: str) -> nn.Module:
    return getattr(block, name, nn.Identity())


def _check(network: Network, name: str, block: nn.Module) -> None:
    """Raises Refused for a block that is neither a plain Layer without norm nor one weight layer, `linear`, and what it answers."""
    norm = next((type(m).__name__ for m in block.modules() if isinstance(m, NORMS)), None)
    if norm:
        raise Refused(f"algo=pepita takes no norm (block {name} has {norm}): its weights learn from the difference of two "
                      "activities, which a norm would rescale sample by sample, and its gain would learn nothing; use arch.norm=none")
    if ops.unsteady(block) == "draws":
        raise Refused(f"algo=pepita: weights learn from the difference of two activities, and block {name} would draw each anew; "
                      "use arch.activation=step")
    linear = getattr(block, "linear", None)
    if not isinstance(linear, (nn.Linear, *CONVOLUTIONS)) or not isinstance(block, Layer) and list(block.children()) != [linear]:
        raise Refused("algo=pepita needs plain layers (one Linear or convolution, activation, pool): "
                      f"block {name} is a {type(block).__name__}; {ops.elsewhere(network)}")
