"""What families of rules share, as functions."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lbp import ranks
from lbp.algos.rule import Learned
from lbp.archs.hard import Bernoulli
from lbp.archs.init import draw
from lbp.archs.network import CONVOLUTIONS, Layer, Network, block_of, hard_between
from lbp.errors import Refused

MLP, ANY_ARCH = "use arch=mlp", "use algo=dfa or algo=local, which train any arch"
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
BOUNDED = {nn.Tanh, nn.Sigmoid, nn.Hardtanh, nn.Softsign, nn.Softmax}

# Another backward operator ---------------------------------------------------------------------------------------


class _Linear(torch.autograd.Function):
    """y = x W^T + b forwards; backwards the input's gradient comes through B (out, in) instead of W."""

    @staticmethod
    def forward(ctx, x, weight, bias, feedback):
        ctx.save_for_backward(x, feedback)
        ctx.has_bias = bias is not None
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx, g):
        x, feedback = ctx.saved_tensors
        rows, inputs = g.flatten(0, -2), x.flatten(0, -2).to(g.dtype)  # under autocast g is bf16, x need not be
        weight = rows.T @ inputs
        return (g @ feedback.to(g.dtype), weight, rows.sum(0) if ctx.has_bias else None,
                weight if ctx.needs_input_grad[3] else None)


class _Convolution(torch.autograd.Function):
    """The same for a convolution of 1 to 3 dimensions, grouped or not; B has the kernel's shape."""

    @staticmethod
    def forward(ctx, x, weight, bias, feedback, function, geometry):
        ctx.save_for_backward(x, feedback)
        ctx.has_bias, ctx.function, ctx.geometry = bias is not None, function, geometry
        return function(x, weight, bias, *geometry)

    @staticmethod
    def backward(ctx, g):
        x, feedback = ctx.saved_tensors
        x, feedback = x.to(g.dtype), feedback.to(g.dtype)
        input_gradient, weight_gradient = _CONVOLUTION_GRADIENTS[ctx.function]
        weight = weight_gradient(x, feedback.shape, g, *ctx.geometry)
        return (input_gradient(x.shape, feedback, g, *ctx.geometry), weight,
                g.sum([d for d in range(g.dim()) if d != 1]) if ctx.has_bias else None,
                weight if ctx.needs_input_grad[3] else None, None, None)


_CONVOLUTION_GRADIENTS = {
    F.conv1d: (torch.nn.grad.conv1d_input, torch.nn.grad.conv1d_weight),
    F.conv2d: (torch.nn.grad.conv2d_input, torch.nn.grad.conv2d_weight),
    F.conv3d: (torch.nn.grad.conv3d_input, torch.nn.grad.conv3d_weight),
}


def _operands(input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    return input, weight, bias, (stride, padding_in_numbers(padding, weight.shape[2:], dilation), dilation, groups)


def padding_in_numbers(padding, kernel: tuple[int, ...], dilation) -> int | tuple[int, ...]:
    """A convolution's padding, where it may be a word. Raises Refused for one that differs from side to side."""
    if not isinstance(padding, str):
        return padding
    dilations = dilation if isinstance(dilation, (tuple, list)) else (dilation,) * len(kernel)
    total = [d * (k - 1) if padding == "same" else 0 for d, k in zip(dilations, kernel)]
    if any(size % 2 for size in total):
        raise Refused("padding='same' with an even kernel pads unevenly: no feedback operator for it; "
                      "pad with a layer of its own")
    return tuple(size // 2 for size in total)


class BackwardThrough(TorchFunctionMode):
    """Within it, linear and convolution run forwards with their weight and backwards through another one.

    `feedback`: (weight, its feedback) pairs, of one shape. The network is not modified, so the true gradient can be
    taken beside it. The weight's own gradient stays exact; a feedback that requires a gradient receives the
    weight's. Weights are known by identity.
    """

    def __init__(self, feedback: list[tuple[Tensor, Tensor]]):
        super().__init__()
        self.feedback = {id(weight): b for weight, b in feedback}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.linear or func in _CONVOLUTION_GRADIENTS:
            x, weight, bias, geometry = _operands(*args, **kwargs)
            feedback = self.feedback.get(id(weight))
            if feedback is not None and x.requires_grad:
                if func is F.linear:
                    return _Linear.apply(x, weight, bias, feedback)
                return _Convolution.apply(x, weight, bias, feedback, func, geometry)
        return func(*args, **kwargs)


def learn_through(network: Network, task, x: Tensor, y: Tensor, feedback: list[tuple[Tensor, Tensor]]) -> Learned:
    """Backpropagates the loss through `feedback`, (weight, its feedback) pairs, in place of the weights."""
    with BackwardThrough(feedback):
        out = network(x)
        loss = task.loss(out, y)
    loss.sum().backward()
    return Learned(out.detach(), loss.detach())


class _Record(TorchFunctionMode):
    """Which tensors serve as weights and whether an error must pass them; which only are added (embeddings) or scale
    one axis (a norm's gain, also outside a norm)."""

    ADDITIVE = {"add", "add_", "__add__", "__radd__", "__iadd__", "embedding", "expand", "cat"}
    SCALING = {"mul", "mul_", "__mul__", "__rmul__", "__imul__"}

    def __init__(self):
        super().__init__()
        self.met: dict[int, bool] = {}
        self.added: set[int] = set()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.linear or func in _CONVOLUTION_GRADIENTS:
            x, weight, *_ = _operands(*args, **kwargs)
            self.met[id(weight)] = self.met.get(id(weight), False) or x.requires_grad
        elif func.__name__ in self.ADDITIVE:
            self.added |= {id(a) for a in (*args, *(args[0] if isinstance(args[0], (list, tuple)) else ()))}
        elif func.__name__ in self.SCALING:
            self.added |= {id(a) for a in args if isinstance(a, Tensor) and a.squeeze().dim() < 2}
        return func(*args, **kwargs)


def let_errors_pass(network: Network) -> None:
    """Raises Refused where no error can come down through the blocks, as their inputs pass something without a derivative."""
    for name, block in network.hidden.items():
        if found := hard_between(block):
            word = type(found).__name__.lower()
            raise Refused(f"arch.transmit={word}: what block {name} receives has no derivative, so no error comes down through it; use "
                          f"arch.transmit={word}_ste (straight through), or a rule that teaches each block apart, as dfa, local or ldrl")


def feedback_sites(network: Network) -> dict[str, nn.Parameter]:
    """The weights that an error passes on its way down: {parameter name: weight}, from input to output.

    Found by one forward pass in eval mode. Raises Refused for a dense or convolutional weight that the pass never
    met as such (transposed convolutions, nn.MultiheadAttention's packed projections): its error would silently be
    backprop's.
    """
    let_errors_pass(network)
    with network.probe() as x, _Record() as record, torch.enable_grad():
        network(x)
    names = {id(p): name for name, p in network.named_parameters()}
    unmet = [name for name, p in network.named_parameters() if p.dim() > 1 and id(p) not in record.met.keys() | record.added]
    if unmet:
        raise Refused(f"{', '.join(unmet)}: no linear or convolution used it in a forward pass, so no feedback can stand "
                      "in for it; write the layer with nn.Linear or nn.Conv (attention: separate projections)")
    parameters = {id(p): p for p in network.parameters()}
    return {names[key]: parameters[key] for key, passed in record.met.items() if passed}


def by_block(pairs: dict[str, tuple[Tensor, Tensor]]) -> dict[str, tuple[Tensor, Tensor]]:
    """{parameter name: (W, B)} -> {block: (all its W in one vector, all its B)}."""
    blocks: dict[str, list] = {}
    for name, pair in pairs.items():
        blocks.setdefault(block_of(name), []).append(pair)
    return {block: tuple(torch.cat([side.detach().flatten() for side in sides]) for sides in zip(*members))
            for block, members in blocks.items()}


# Teaching at block outputs ---------------------------------------------------------------------------------------


class Projection(nn.Module):
    """Carries signals of the output's shape, (N, *lead, outputs), to a block's output through one matrix.

    `maps=units`: the matrix has a column for each unit of the block, (outputs, units). `maps=channels`: one for each
    channel or width of a token, and every position of a map receives the same, over the root of their number. Where
    outputs and block both have leading token dimensions the matrix is shared over tokens.
    """

    def __init__(self, block: nn.Module, shape: tuple[int, ...], lead: tuple[int, ...], maps: str):
        super().__init__()
        if shape[: len(lead)] != lead:
            raise Refused(f"a block with outputs of shape {shape} cannot be taught by errors of leading shape {lead}")
        self.shape = shape[len(lead):]
        self.axis = None
        if maps == "channels" and len(self.shape) > 1:
            # Maps (channels, ...) come out of convolutions of as many dimensions; tokens are (positions, width).
            maps_of = dict(zip((2, 3, 4), CONVOLUTIONS)).get(len(self.shape))
            self.axis = 0 if any(type(m) is maps_of for m in block.modules()) else len(self.shape) - 1
        self.columns = math.prod(self.shape) if self.axis is None else self.shape[self.axis]

    def forward(self, signal: Tensor, matrix: Tensor) -> Tensor:
        """`matrix`: (outputs, columns). Returns (N, *lead, *block's own shape), without copies of what is repeated."""
        taught = signal.to(matrix.dtype) @ matrix
        if self.axis is None:
            return taught.unflatten(-1, self.shape) if len(self.shape) != 1 else taught
        places = [self.columns if i == self.axis else 1 for i in range(len(self.shape))]
        scale = math.sqrt(self.columns / math.prod(self.shape))
        return (taught * scale).unflatten(-1, places).expand(*taught.shape[:-1], *self.shape)


def projections(network: Network, maps: str = "units") -> dict[str, Projection]:
    """How the output's signals reach each hidden block, {block: Projection}; raises Refused where they cannot."""
    lead = list(network.shapes.values())[-1][:-1]
    return {name: Projection(block, network.shapes[name], lead, maps) for name, block in network.hidden.items()}


def matrices(network: Network, projections: dict[str, Projection], init: str, scale: float) -> dict[str, Tensor]:
    """A random matrix (outputs, columns) for each projection."""
    weight = network.head.weight.detach()
    return {name: draw(weight.new_empty(len(weight), projection.columns), init, scale) for name, projection in projections.items()}


def beside_the_head(network: Network, matrix: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """The last hidden block's matrix with the weights that it stands for, which are known of that block alone: the head's."""
    weight = network.head.weight
    return {list(network.hidden)[-1]: (weight, matrix)} if matrix.shape == weight.shape else {}


def teach(h: Tensor, signal: Tensor) -> None:
    """Backpropagates `signal`, as the gradient at the block output `h`, into its block, and drops the graph."""
    h.backward(signal.to(h.dtype))


def teach_head(task, out: Tensor, y: Tensor) -> tuple[Tensor, Learned]:
    """Backpropagates the loss into the head, whose output is `out`; returns the error at the output, and what was learned."""
    error = task.error(out.detach(), y)
    with torch.no_grad():
        learned = Learned(out.detach(), task.loss(out, y))
    out.backward(error.to(out.dtype))
    return error, learned


def block_by_block(network: Network, x: Tensor) -> tuple[list[Tensor], Tensor]:
    """The hidden blocks' outputs, each with a graph of its own block alone, and the head's."""
    outputs = []
    for block in network.hidden.values():
        outputs.append(block(x))
        x = outputs[-1].detach()
    return outputs, network.head(x)


# Ranks -----------------------------------------------------------------------------------------------------------


def over_ranks(*sums: Tensor) -> None:
    """Adds up, in place and over the ranks, sums over data that are no gradients: Gram matrices, fitness."""
    ranks.total(sums)


def all_finite(loss: Tensor) -> Tensor:
    """1 where the loss of the whole batch, over all ranks, is finite, else 0: what a rule that writes in place multiplies its
    writing by, since a batch that will be refused must move nothing, on no rank."""
    total = loss.detach().sum()
    over_ranks(total)
    return total.isfinite().to(total.dtype)


# Precision -------------------------------------------------------------------------------------------------------


def at_least_fp32(h: Tensor) -> Tensor:
    """Block outputs are bf16 under autocast; sums of squares and small differences of them need more."""
    return h.float() if h.dtype == torch.bfloat16 else h


def full_precision(x: Tensor) -> torch.autocast:
    """A context in which nothing is cast down, for differences that bf16 would round away."""
    return torch.autocast(x.device.type, enabled=False)


# Stacks of blocks ------------------------------------------------------------------------------------------------


def elsewhere(network: Network) -> str:
    """How a refusal ends that wants plain layers, or one answer a sample. Symbols, and answers at each token, leave no other arch."""
    symbols = len(network.in_shape) == 1 and any(isinstance(m, nn.Embedding) for m in next(iter(network.blocks.values())).modules())
    tokens = len(list(network.shapes.values())[-1]) > 1
    return ANY_ARCH if symbols or tokens else MLP


def plain_layers(network: Network, rule: str, of: tuple[type, ...] = (nn.Linear, *CONVOLUTIONS)) -> dict[str, Layer]:
    """The hidden blocks, all of them plain Layers around a module of the types `of`; raises Refused otherwise."""
    for name, block in network.hidden.items():
        if not isinstance(block, Layer) or not isinstance(block.linear, of):
            kinds = " or ".join(t.__name__ for t in of)
            raise Refused(f"algo={rule} needs plain layers ({kinds}, norm, activation, pool); "
                          f"block {name} is a {type(getattr(block, 'linear', block)).__name__}; {elsewhere(network)}")
    return network.hidden


def unsteady(block: nn.Module) -> str:
    """What in the block makes its output for a sample hang on other samples, or on chance: batch norm, dropout, draws (Bernoulli units); else ""."""
    for module in block.modules():
        if isinstance(module, BATCH_NORMS):
            return "batch norm"
        if isinstance(module, DROPOUTS) and module.p:
            return "dropout"
        if isinstance(module, Bernoulli):
            return "draws"
    return ""


def refuse_unsteady(network: Network, said: dict[str, str]) -> None:
    """Raises Refused for a block that is `unsteady`: what is said of its kind, with the block's name in place of {}."""
    for name, block in network.blocks.items():
        if found := unsteady(block):
            raise Refused(said[found].format(name))


def bounded(network: Network, rule: str, why: str) -> None:
    """Raises Refused where a hidden block has an activation without bounds on both sides, or none at all. A block of another kind, as
    a recurrent one, may say itself that it is `bounded`."""
    plain = all(isinstance(block, Layer) for block in network.hidden.values())
    for name, block in network.hidden.items():
        if getattr(block, "bounded", False):
            continue
        kinds = {type(m) for m in block.modules() if type(m).__module__ == nn.Tanh.__module__}
        if not kinds or not kinds <= BOUNDED:
            found = ", ".join(sorted(kind.__name__ for kind in kinds)) or "none"
            raise Refused(f"{rule} needs bounded activations (tanh, sigmoid, hardtanh): block {name} has {found}, and {why} then drives "
                          "its units without end, which is no direction of descent; "
                          + ("set arch.activation=tanh (arch.dense_activation, or the token of arch.layers, where it is that one), or use arch=mlp with it"
                             if plain else
                             elsewhere(network).replace(MLP, f"{MLP} with arch.activation=tanh")))


def classification(task, rule: str) -> None:
    """Raises Refused where the task has no classes."""
    if task.kind != "classification":
        raise Refused(f"algo={rule} needs classes; this dataset is a {task.kind} task: use algo=dfa or algo=local, which take real targets")
