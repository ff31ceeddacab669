from __future__ import annotations

import torch
from torch import Tensor, nn

from lbp.archs.init import initialise
from lbp.archs.network import Network
from lbp.errors import Refused

GATES = {"rnn": 1, "lstm": 4, "gru": 3}


class Tokens(nn.Module):
    """Symbols (N, T) -> vectors (N, T, width), one for each symbol. One symbol a sample, (N,), gives (N, width)."""

    def __init__(self, symbols: int, width: int, spread: float = 1.0):
        super().__init__()
        self.embedding = nn.Embedding(symbols, width)
        nn.init.normal_(self.embedding.weight, std=spread)

    def forward(self, x: Tensor) -> Tensor:
        return self.embedding(x.long())     # a network is probed with zeros that are no integers


class Rows(nn.Module):
    """An image (N, C, H, W) as the sequence of its rows, (N, H, C W)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2).flatten(2)


class Last(nn.Module):
    """Of a sequence its last token."""

    def forward(self, x: Tensor) -> Tensor:
        return x[:, -1]


class Recurrent(nn.Module):
    """A recurrent layer over (N, T, inputs), giving (N, T, width), as torch's nn.RNN (tanh), nn.LSTM and nn.GRU.

    Its weights are two nn.Linear, each for all gates in torch's order, so that a feedback rule finds them. Inputs pass
    `incoming`, outputs dropout and `read`. `step(x, state)` takes one token (N, inputs) on, without `incoming` and
    `read`: as `forward` steps, from `state(n)`.
    """

    bounded = True      # outputs lie between -1 and 1, whatever the weights

    def __init__(self, inputs: int, width: int, cell: str, dropout: float = 0.0, incoming: nn.Module | None = None,
                 read: nn.Module | None = None):
        super().__init__()
        self.cell, self.width, self.parts = cell, width, 2 if cell == "lstm" else 1
        self.incoming, self.read = incoming or nn.Identity(), read or nn.Identity()
        self.input, self.recurrent = nn.Linear(inputs, GATES[cell] * width), nn.Linear(width, GATES[cell] * width)
        for p in self.parameters():
            nn.init.uniform_(p, -width**-0.5, width**-0.5)      # torch's own law for recurrent layers
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()

    def state(self, n: int) -> tuple[Tensor, ...]:
        """What n sequences begin from: zeros, (h,) or the LSTM's (h, c), each (n, width)."""
        return tuple(self.recurrent.weight.new_zeros(n, self.width) for _ in range(self.parts))

    def step(self, x: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """(output, next state) at the token x (N, inputs)."""
        state = self._next(self.input(x), state)
        return self.dropout(state[0]), state

    def run(self, x: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """(outputs (N, T, width), state after them) of x (N, T, inputs), from `state` on."""
        outputs = []
        for a in self.input(x).unbind(1):
            state = self._next(a, state)
            outputs.append(state[0])
        return self.dropout(torch.stack(outputs, 1)), state

    def forward(self, x: Tensor) -> Tensor:
        x = self.incoming(x)
        return self.read(self.run(x, self.state(x.shape[0]))[0])      # not len(x), which torch.export would fix

    def _next(self, a: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The state after a token whose part in the gates, by the input weights, is `a`."""
        h, b = state[0], self.recurrent(state[0])
        if self.cell == "rnn":
            return (torch.tanh(a + b),)
        if self.cell == "lstm":
            i, f, g, o = (a + b).chunk(4, 1)
            c = torch.sigmoid(f) * state[1] + torch.sigmoid(i) * torch.tanh(g)
            return torch.sigmoid(o) * torch.tanh(c), c
        (r, z, n), (r_h, z_h, n_h) = a.chunk(3, 1), b.chunk(3, 1)
        z, n = torch.sigmoid(z + z_h), torch.tanh(n + torch.sigmoid(r + r_h) * n_h)
        return (n + z * (h - n),)


def entrance(task, arch: str) -> tuple[nn.Module | None, int, int]:
    """How samples become sequences: (a module or None, steps, numbers at each; 0 for symbols). Raises Refused."""
    if task.symbols:
        return None, task.in_shape[0], 0
    if len(task.in_shape) == 3:
        return Rows(), task.in_shape[1], task.in_shape[0] * task.in_shape[2]
    if len(task.in_shape) == 2:
        return None, *task.in_shape
    raise Refused(f"arch={arch} takes sequences: of symbols, or the rows of images; a sample of shape {task.in_shape} is neither; use arch=mlp")


def rnn(task, *, cell: str, width: int, layers: int, embedding: int | None, dropout: float, init: str, init_scale: float) -> Network:
    """Recurrent layers over sequences of symbols, which get a learned vector each, or over the rows of an image.

    Where a target stands at each token, so does an output; else the last layer's output at the last token is read.
    Raises Refused for samples that are no sequences.
    """
    incoming, _, inputs = entrance(task, cell)
    blocks: dict[str, nn.Module] = {}
    if task.symbols:
        inputs = embedding or width
        blocks["embed"] = Tokens(task.symbols, inputs)
    elif embedding:
        raise Refused(f"arch.embedding={embedding}: samples of shape {task.in_shape} hold no symbols to embed (arch={cell}); leave it out")
    for i in range(1, layers + 1):
        read = Last() if i == layers and not task.sequence else None
        blocks[f"rnn{i}"] = Recurrent(inputs, width, cell, dropout, incoming if i == 1 else None, read)
        inputs = width
    network = Network({**blocks, "head": nn.Linear(width, task.outputs)}, task.in_shape)
    initialise(network, init, init_scale)
    return network
