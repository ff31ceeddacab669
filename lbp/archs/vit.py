from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lbp.archs.init import initialise
from lbp.archs.network import Network, activation as make_activation
from lbp.errors import Refused


class Embedding(nn.Module):
    """Images (N, C, H, W) -> tokens (N, patches, dim): a linear map of each patch, and a learned position."""

    def __init__(self, channels: int, patch: int, patches: int, dim: int):
        super().__init__()
        self.linear = nn.Conv2d(channels, dim, patch, patch)
        self.positions = nn.Parameter(0.02 * torch.randn(patches, dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).flatten(2).transpose(1, 2) + self.positions


class Attention(nn.Module):
    """Multi-head self-attention with projections of their own, so that each can have its feedback."""

    def __init__(self, dim: int, heads: int, causal: bool = False):
        super().__init__()
        self.heads, self.causal = heads, causal     # causal: a token sees itself and those before it
        self.query, self.key, self.value, self.out = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part(x).unflatten(2, (self.heads, -1)).transpose(1, 2) for part in (self.query, self.key, self.value))
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=self.causal).transpose(1, 2).flatten(2))


class MeanOverTokens(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


class TransformerLayer(nn.Module):
    """Attention, then two dense layers at each token; each branch normalises what it reads and adds to its input."""

    def __init__(self, dim: int, heads: int, mlp_ratio: int, activation: str, dropout: float, pool: nn.Module | None = None,
                 causal: bool = False):
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(dim), Attention(dim, heads, causal)
        self.norm2 = nn.LayerNorm(dim)
        self.up, self.activation, self.down = nn.Linear(dim, mlp_ratio * dim), make_activation(activation), nn.Linear(mlp_ratio * dim, dim)
        self.dropout = nn.Dropout(dropout)
        self.pool = pool or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.attention(self.norm1(x)))
        x = x + self.dropout(self.down(self.activation(self.up(self.norm2(x)))))
        return self.pool(x)


def vit(task, *, patch: int, dim: int, depth: int, heads: int, mlp_ratio: int, activation: str, dropout: float,
        init: str, init_scale: float) -> Network:
    """A vision transformer (Dosovitskiy et al. 2021) without class token: patches with learned positions, `depth` pre-norm
    layers, a last norm and the mean over tokens (part of the last layer's block), the head.

    Raises Refused for inputs that are no images cut evenly by `patch`, or heads that do not divide `dim`.
    """
    if len(task.in_shape) != 3:
        raise Refused(f"arch=vit takes images (channels, height, width), not inputs of shape {task.in_shape}; use arch=mlp")
    channels, height, width = task.in_shape
    if height % patch or width % patch:
        raise Refused(f"arch.patch={patch} does not divide {height}x{width} images; choose one that does, or set "
                      f"dataset.resize={max(1, round(height / patch)) * patch}")
    if dim % heads:
        raise Refused(f"arch.heads={heads} does not divide arch.dim={dim}")
    blocks: dict[str, nn.Module] = {"embed": Embedding(channels, patch, (height // patch) * (width // patch), dim)}
    for i in range(1, depth + 1):
        pool = nn.Sequential(nn.LayerNorm(dim), MeanOverTokens()) if i == depth else None
        blocks[f"layer{i}"] = TransformerLayer(dim, heads, mlp_ratio, activation, dropout, pool)
    network = Network({**blocks, "head": nn.Linear(dim, task.outputs)}, task.in_shape)
    initialise(network, init, init_scale)
    return network
