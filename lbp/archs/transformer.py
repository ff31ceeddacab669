from __future__ import annotations

import torch
from torch import Tensor, nn

from lbp.archs.init import initialise
from lbp.archs.network import Network
from lbp.archs.rnn import Last, Tokens, entrance
from lbp.archs.vit import TransformerLayer
from lbp.errors import Refused

SPREAD = 0.02   # of the vectors of symbols and positions at the start, as GPT-2's (Radford et al. 2019)


class Positioned(nn.Module):
    """Sequences -> tokens (N, T, dim): a learned vector for each symbol, or a linear map of each token, and a learned position."""

    def __init__(self, tokens: nn.Module, steps: int, dim: int, incoming: nn.Module | None):
        super().__init__()
        self.incoming, self.tokens = incoming or nn.Identity(), tokens
        self.positions = nn.Embedding(steps, dim)
        nn.init.normal_(self.positions.weight, std=SPREAD)

    def forward(self, x: Tensor) -> Tensor:
        h = self.tokens(self.incoming(x))
        return h + self.positions(torch.arange(h.shape[1], device=h.device))


def transformer(task, *, dim: int, depth: int, heads: int, mlp_ratio: int, activation: str, dropout: float, init: str,
                init_scale: float) -> Network:
    """A causal transformer with pre-norm layers and learned positions: a token sees itself and those before it.

    Where a target stands at each token, so does an output; else that at the last token is read. The last norm (and that
    reading) is part of the last layer's block. Sequences may be shorter than the task's, not longer. Raises Refused for
    samples that are no sequences, or heads that do not divide `dim`.
    """
    incoming, steps, inputs = entrance(task, "transformer")
    if dim % heads:
        raise Refused(f"arch.heads={heads} does not divide arch.dim={dim}: arch=transformer cuts a token into heads; choose one that does")
    tokens = Tokens(task.symbols, dim, SPREAD) if task.symbols else nn.Linear(inputs, dim)
    blocks: dict[str, nn.Module] = {"embed": Positioned(tokens, steps, dim, incoming)}
    for i in range(1, depth + 1):
        pool = None if i < depth else nn.LayerNorm(dim) if task.sequence else nn.Sequential(nn.LayerNorm(dim), Last())
        blocks[f"layer{i}"] = TransformerLayer(dim, heads, mlp_ratio, activation, dropout, pool, causal=True)
    network = Network({**blocks, "head": nn.Linear(dim, task.outputs)}, task.in_shape)
    initialise(network, init, init_scale)
    return network
