"""The network as every rule sees it: an ordered stack of named blocks that know nothing of rules."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor, nn

from lbp.archs.hard import Argmax, ArgmaxSTE, Bernoulli, BernoulliSTE, Sign, SignSTE, Step, StepSTE, without_derivative
from lbp.errors import Refused

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU, "leaky_relu": nn.LeakyReLU, "elu": nn.ELU, "gelu": nn.GELU, "silu": nn.SiLU,
    "softplus": nn.Softplus, "tanh": nn.Tanh, "sigmoid": nn.Sigmoid, "hardtanh": nn.Hardtanh,
    "softmax": nn.Softmax, "sign": Sign, "step": Step, "bernoulli": Bernoulli, "argmax": Argmax, "sign_ste": SignSTE,
    "step_ste": StepSTE, "bernoulli_ste": BernoulliSTE, "argmax_ste": ArgmaxSTE, "none": nn.Identity,
}
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.LayerNorm, nn.GroupNorm,
         nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
POOLS = (nn.MaxPool1d, nn.MaxPool2d, nn.AvgPool1d, nn.AvgPool2d, nn.AdaptiveAvgPool1d,
         nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.Flatten)


def activation(name: str) -> nn.Module:
    """A fresh activation module; softmax acts over the features (dimension 1)."""
    return nn.Softmax(dim=1) if name == "softmax" else ACTIVATIONS[name]()


def norm(name: str, features: int, dims: int) -> nn.Module:
    """The normalisation `name` over `features` channels of maps with `dims` spatial dimensions (0: vectors).

    Layer norm of feature maps is one group over channels and positions. Raises Refused for instance
    norm of vectors, which has nothing to average over.
    """
    if name == "none":
        return nn.Identity()
    if name == "batch":
        return (nn.BatchNorm1d if dims == 0 else nn.BatchNorm2d)(features)
    if name == "layer":
        return nn.LayerNorm(features) if dims == 0 else nn.GroupNorm(1, features)
    if dims == 0:
        raise Refused("arch.norm=instance: undefined for dense layers (one value a unit and sample); "
                      "use none, batch or layer")
    return nn.InstanceNorm2d(features, affine=True)


class Layer(nn.Module):
    """The plain block: `pool(activate(pre(x)))`, in parts for the rules that need them.

    `pre` is the pre-activation: the weight layer and its norm; `activate` the activation and dropout;
    `pool` pooling and flattening. `flatten` lets a dense layer take images; `transmit` is what inputs pass on their way
    from the block below, as a sign. Both are `incoming`.
    """

    def __init__(self, linear: nn.Module, norm: nn.Module | None = None, activation: nn.Module | None = None,
                 dropout: float = 0.0, pool: nn.Module | None = None, flatten: bool = False, transmit: nn.Module | None = None):
        super().__init__()
        # Absent parts are Identity, not None: layers then share one shape, and compile one way each.
        incoming = [*[nn.Flatten()] * flatten, *[transmit] * (transmit is not None)]
        self.incoming = nn.Sequential(*incoming) if len(incoming) > 1 else incoming[0] if incoming else nn.Identity()
        self.linear = linear
        self.norm = norm or nn.Identity()
        self.activation = activation or nn.Identity()
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.pooling = pool or nn.Identity()

    def pre(self, x: Tensor) -> Tensor:
        return self.norm(self.linear(self.incoming(x)))

    def activate(self, a: Tensor) -> Tensor:
        return self.dropout(self.activation(a))

    def pool(self, h: Tensor) -> Tensor:
        return self.pooling(h)

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(self.activate(self.pre(x)))


class Network(nn.Module):
    """A stack of named blocks whose output is their composition, to the bit.

    `blocks`: name -> module, from input to output. The last, the `head`, is exactly one `nn.Linear`;
    the others are `hidden`. `in_shape`: one sample's shape.
    """

    def __init__(self, blocks: Mapping[str, nn.Module], in_shape: Sequence[int]):
        super().__init__()
        if len(blocks) < 2 or not isinstance(list(blocks.values())[-1], nn.Linear):
            raise Refused("a network needs at least one hidden block and ends in exactly one nn.Linear, the head: "
                          f"got {', '.join(f'{n} ({type(b).__name__})' for n, b in blocks.items()) or 'nothing'}")
        self.blocks = nn.ModuleDict(blocks)
        self.in_shape = tuple(in_shape)

    @property
    def head(self) -> nn.Linear:
        return list(self.blocks.values())[-1]

    @property
    def hidden(self) -> dict[str, nn.Module]:
        return dict(list(self.blocks.items())[:-1])

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Each block's output shape for one sample."""
        with self.probe() as h, torch.no_grad():
            return {name: tuple((h := block(h)).shape[1:]) for name, block in self.blocks.items()}

    @contextmanager
    def probe(self) -> Iterator[Tensor]:
        """A sample of zeros, (1, *in_shape), to be run within: in eval mode, so that no statistic moves."""
        modes = {module: module.training for module in self.modules()}
        self.eval()
        try:
            yield self.head.weight.new_zeros(1, *self.in_shape)
        finally:
            for module, mode in modes.items():
                module.training = mode

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks.values():
            x = block(x)
        return x

    @classmethod
    def of(cls, modules: nn.Sequential, in_shape: Sequence[int] | None = None) -> Network:
        """Cuts a plain `nn.Sequential` into blocks; the modules are shared, not copied.

        A block begins at each layer with weights (norms excepted); what follows it joins it, and what
        stands before the first joins the first. `in_shape` may be left out when the first weight layer
        is a Linear. Raises Refused when the stack does not end in exactly one Linear.
        """
        flat = [m for module in modules for m in _unnested(module)]
        starts = [m for m in flat if has_weights(m)]
        if len(starts) < 2 or not isinstance(flat[-1], nn.Linear):
            raise Refused("Network.of: the stack needs a hidden layer with weights and must end in one nn.Linear "
                          f"(losses take logits, so without a last activation): it ends in {flat[-1] if flat else None}")
        if in_shape is None:
            if not isinstance(starts[0], nn.Linear):
                raise Refused("Network.of: give in_shape=(channels, height, width): "
                              f"it cannot be read off {type(starts[0]).__name__}")
            in_shape = (starts[0].in_features,)
        *groups, head = cut(flat)
        kinds: dict[str, int] = {}
        blocks: dict[str, nn.Module] = {}
        for main, group in zip(starts, groups):
            kind = "fc" if isinstance(main, nn.Linear) else "conv" if isinstance(main, CONVOLUTIONS) else "block"
            kinds[kind] = kinds.get(kind, 0) + 1
            blocks[f"{kind}{kinds[kind]}"] = as_block(group)
        return cls({**blocks, "head": head[0]}, in_shape)


def hard_inside(block: nn.Module) -> nn.Module | None:
    """A module within the block that has no derivative, if there is one; what a Layer's inputs pass stands before it, not within."""
    before = {id(m) for m in block.incoming.modules()} if isinstance(block, Layer) else ()
    return next((m for m in block.modules() if without_derivative(m) and id(m) not in before), None)


def hard_between(block: nn.Module) -> nn.Module | None:
    """A module without a derivative that a block's inputs pass, if there is one."""
    return next((m for m in block.incoming.modules() if without_derivative(m)), None) if isinstance(block, Layer) else None


def block_of(parameter_name: str) -> str:
    """The block that holds a network's parameter: "blocks.fc1.linear.weight" -> "fc1"."""
    return parameter_name.split(".")[1]


def _unnested(module: nn.Module) -> list[nn.Module]:
    return [m for child in module for m in _unnested(child)] if type(module) is nn.Sequential else [module]


def has_weights(module: nn.Module) -> bool:
    return not isinstance(module, NORMS) and any(True for _ in module.parameters())


def cut(modules: Sequence[nn.Module]) -> list[list[nn.Module]]:
    """The modules in groups: one begins at each with weights; what stands before the first joins the first."""
    bounds = [0, *[i for i, m in enumerate(modules) if has_weights(m)][1:], len(modules)]
    return [list(modules[a:b]) for a, b in pairwise(bounds)]


def as_block(group: Sequence[nn.Module]) -> nn.Module:
    """One module of a group: a Layer where it is plain."""
    return _as_layer(group) or (group[0] if len(group) == 1 else nn.Sequential(*group))


def _as_layer(group: Sequence[nn.Module]) -> Layer | None:
    """The group as a Layer when it reads [Flatten] weights [norm] [activation] [Dropout] [pools and Flatten]."""
    rest = list(group)

    def take(*types: type) -> nn.Module | None:
        return rest.pop(0) if rest and isinstance(rest[0], types) else None

    flatten = take(nn.Flatten)
    linear = take(nn.Linear, *CONVOLUTIONS)
    parts = take(*NORMS), take(*ACTIVATIONS.values()), take(nn.Dropout)
    if linear is None or not all(isinstance(m, POOLS) for m in rest):
        return None
    pool = rest[0] if len(rest) == 1 else nn.Sequential(*rest) if rest else None
    layer = Layer(linear, parts[0], parts[1], 0.0, pool, flatten is not None)
    if parts[2] is not None:
        layer.dropout = parts[2]
    return layer
