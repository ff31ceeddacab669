from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lbp.algos.rule import Facts, LearningRule, Lesson
from lbp.archs.init import draw
from lbp.archs.network import Layer, Network
from lbp.errors import Refused


class Local(LearningRule):
    """Local prediction losses: each hidden block is trained by a linear classifier of its own.

    No gradient crosses a block, and the head learns on the last block's detached output (Nokland & Eidnes 2019, the
    prediction loss; Mono-Forward: Gong et al. 2025, with classifiers without bias on the blocks' outputs). `tap` says where
    in a plain layer the classifier looks; of other blocks it sees the output. Feature maps are average-pooled, rows and
    columns halved in turn, until at most `head_features` values are left. `schedule=joint` adds all the losses and takes
    one step; `streaming` steps each block as soon as it has run, so that one block's activations live at a time. Both
    give the same updates.
    """

    facts = Facts(
        family="local", paper="Nokland & Eidnes, ICML 2019, arXiv 1901.06656; Gong, Li & Abdulla, arXiv 2501.09238 (2025)",
        weight_transport=False, backward_locked=False, update_locked=False)

    def __init__(self, network, task, *, schedule: str, tap: str, head_features: int, bias: bool, init: str):
        super().__init__(network, task)
        self.schedule, self.tap = schedule, tap
        self.heads = local_heads(network, task, "local", tap, head_features, bias, init)

    def groups(self):
        return {"forward": list(self.network.parameters()), "heads": list(self.heads.parameters())}

    def learn_block(self, name, h, y):
        return lesson_of(self, name, *h, y)

    def local_loss(self, name: str, h: Tensor, y: Tensor):
        return prediction_loss(self.task, self.heads[name](h), y)


def lesson_of(rule, name: str, x: Tensor, y: Tensor, head_factor: float = 1.0) -> Lesson:
    """A block's by `rule.local_loss(name, h, y)`, which gives losses to be summed and values to be logged, h being found where
    `rule.tap` says; the head's by its own loss times `head_factor`."""
    block = rule.network.blocks[name]
    if block is rule.network.head:
        out = block(x)
        loss = rule.task.loss(out, y)
        return Lesson(head_factor * loss, told=loss.detach(), out=out.detach())
    h, x = tapped(block, x, rule.tap)
    loss, values = rule.local_loss(name, h, y)
    return Lesson(loss, (x.detach(),), values)


def tapped(block: nn.Module, x: Tensor, tap: str) -> tuple[Tensor, Tensor]:
    """Where a local loss looks, and the block's output. `tap=activation`: before a plain layer's dropout and pooling."""
    if tap == "output" or not isinstance(block, Layer) or all(type(m) is nn.Identity for m in (block.dropout, block.pooling)):
        out = block(x)
        return out, out
    h = block.activation(block.pre(x))
    return h, block.pool(block.dropout(h))


def tapped_shapes(network: Network, tap: str) -> dict[str, tuple[int, ...]]:
    """The shape, for one sample, of what a local loss sees of each hidden block."""
    shapes = {}
    with network.probe() as x, torch.no_grad():
        for name, block in network.hidden.items():
            h, x = tapped(block, x, tap)
            shapes[name] = tuple(h.shape[1:])
    return shapes


def prediction_loss(task, local: Tensor, y: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The task's loss of a local classifier's outputs, one value a target, and what is logged of it."""
    loss = task.loss(local, y)
    values = {"local_loss": loss.detach().sum() / max(1, task.count(y))}
    if task.kind == "classification":
        values["local_accuracy"] = task.score(local.detach(), y)[0] / max(1, task.count(y))
    return loss, values


def local_heads(network: Network, task, rule: str, tap: str, features: int, bias: bool = True, init: str = "default") -> nn.ModuleDict:
    """A linear classifier for each hidden block, on the network's device; one for each token where the network answers tokens."""
    lead, heads = leading(network, rule), {}
    for name, shape in tapped_shapes(network, tap).items():
        pool, size = pooling(shape, features) if len(shape) == 3 and not lead else (nn.Identity(), math.prod(shape[len(lead):]))
        linear = nn.Linear(size, task.outputs, bias)
        draw(linear.weight, init)
        heads[name] = nn.Sequential(pool, nn.Flatten(1 + len(lead)), linear)
    return nn.ModuleDict(heads).to(network.head.weight.device, network.head.weight.dtype)


def leading(network: Network, rule: str) -> tuple[int, ...]:
    """The dimensions, before the last, of the network's outputs: () or (tokens,). Refuses blocks that lack them."""
    lead = list(network.shapes.values())[-1][:-1]
    for name, shape in network.shapes.items():
        if shape[: len(lead)] != lead:
            raise Refused(f"algo={rule}: the network answers {lead[0]} tokens, and block {name} has outputs of shape {shape}: a local "
                          "classifier cannot answer each of them; use algo=bp or algo=fa")
    return lead


def pooling(shape: tuple[int, ...], features: int) -> tuple[nn.Module, int]:
    """Average pooling of maps that leaves at most `features` values, or one a map, by halving rows and columns in turn; and how
    many it leaves."""
    channels, *sides = shape
    turn = 0
    while channels * sides[0] * sides[1] > features and max(sides) > 1:
        sides[turn] = math.ceil(sides[turn] / 2)
        turn = 1 - turn
    pool = nn.Identity() if sides == list(shape[1:]) else nn.AdaptiveAvgPool2d(tuple(sides))
    return pool, channels * sides[0] * sides[1]
