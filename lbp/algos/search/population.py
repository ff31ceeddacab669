"""Tools of population search, as functions on tensors: a member of a population is a row, its score a number.

Scores are to be minimised (losses) unless `maximize`. Whatever is drawn comes from a generator on the CPU, so that a run is
the same on every device and alike on every rank.
"""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from lbp.algos import ops
from lbp.archs.network import Network

# Noise -----------------------------------------------------------------------------------------------------------


def gaussian(like: Tensor, generator: Generator, std: float | Tensor = 1.0, mean: float | Tensor = 0.0) -> Tensor:
    """Normal values, shaped as `like`."""
    return torch.randn(like.shape, generator=generator, dtype=like.dtype).to(like.device) * std + mean


def uniform(like: Tensor, generator: Generator) -> Tensor:
    """Values between 0 and 1, shaped as `like`."""
    return torch.rand(like.shape, generator=generator, dtype=like.dtype).to(like.device)


def flipped(bits: Tensor, p: float, generator: Generator, signed: bool = True) -> Tensor:
    """The bits, each the other one with probability p: of -1 and 1, or, not `signed`, of 0 and 1."""
    flip = uniform(bits, generator) < p
    return torch.where(flip, -bits if signed else 1 - bits, bits)


# Scores to weights -----------------------------------------------------------------------------------------------


def tamed(scores: Tensor, maximize: bool = False) -> Tensor:
    """The scores with those that are not finite set to the worst of the others (0 where none is finite)."""
    finite = scores.isfinite()
    worst = scores.where(finite, scores.new_full((), math.inf if maximize else -math.inf))
    worst = worst.amin(0) if maximize else worst.amax(0)
    return scores.where(finite, worst.where(worst.isfinite(), torch.zeros_like(worst)))


def ranks(scores: Tensor, maximize: bool = False) -> Tensor:
    """K for the best of K members down to 1 for the worst: minimised, [2, 1, 3] has [2, 3, 1]."""
    worst_first = scores.argsort(dim=0, descending=not maximize, stable=True)
    places = torch.arange(1, len(scores) + 1, device=scores.device).view(-1, *[1] * (scores.dim() - 1)).expand_as(worst_first)
    return torch.empty_like(worst_first).scatter_(0, worst_first, places)


def weights(scores: Tensor, kind: str, maximize: bool = False, temperature: float = 1.0) -> Tensor:
    """What each member is worth, from 0 up and summing to 1 over the members.

    normalise: the score's share of the sum; minimised, what is left of 1, shared out again. softmax: exp(score / temperature), of
    minus the score where minimised. rank: as `ranks`. Scores of `normalise` must not be negative; softmax and rank take any.
    """
    if kind == "softmax":
        return (scores / (temperature if maximize else -temperature)).softmax(0)
    if kind == "rank":
        worth = ranks(scores, maximize).to(scores.dtype)
    else:
        total = scores.sum(0)
        worth = scores if maximize else total - scores
        worth = worth.where(total > 0, torch.ones_like(worth))   # of scores that are all 0 none is better
    return worth / worth.sum(0)


# Selection -------------------------------------------------------------------------------------------------------


def best(scores: Tensor, k: int, maximize: bool = False) -> Tensor:
    """Which k members are the best, the best first."""
    return scores.argsort(dim=0, descending=maximize, stable=True)[:k]


def chosen(worth: Tensor, count: int, generator: Generator) -> Tensor:
    """`count` members, with replacement, each as likely as its share of `worth`, (K,)."""
    return torch.multinomial(worth.cpu(), count, replacement=True, generator=generator).to(worth.device)


def tournament(scores: Tensor, count: int, size: int, generator: Generator, maximize: bool = False) -> Tensor:
    """`count` members: each the best of `size` that are drawn alike, with replacement."""
    drawn = torch.randint(len(scores), (size, count), generator=generator).to(scores.device)
    return drawn.gather(0, best(scores[drawn], 1, maximize))[0]


# Crossover -------------------------------------------------------------------------------------------------------


def full_crossover(a: Tensor, b: Tensor, p: float, generator: Generator) -> Tensor:
    """A coin a member: all its values from `a` with probability p, else all from `b`."""
    coins = uniform(a.flatten(1)[:, :1], generator) < p
    return torch.where(coins.view(-1, *[1] * (a.dim() - 1)), a, b)


def hard_crossover(a: Tensor, b: Tensor, p: float, generator: Generator) -> Tensor:
    """A coin a value: from `a` with probability p, else from `b`."""
    return torch.where(uniform(a, generator) < p, a, b)


def smooth_crossover(a: Tensor, b: Tensor, preference: float, generator: Generator) -> Tensor:
    """A share u of `a` and 1 - u of `b`, value by value, with u = U^exp(-preference): the larger the more like `a`."""
    return torch.lerp(b, a, uniform(a, generator) ** math.exp(-preference))


# Aggregation -----------------------------------------------------------------------------------------------------


def mean(members: Tensor, worth: Tensor | None = None) -> Tensor:
    """The mean over members, weighted by `worth` (K,), which sums to 1."""
    return members.mean(0) if worth is None else torch.tensordot(worth.to(members.dtype), members, 1)


def quantile(members: Tensor, q: float, worth: Tensor | None = None) -> Tensor:
    """The q-quantile over members, value by value, between neighbours linearly; of equal weights it is torch's. Each member stands
    at the sum of the weights below it and half of its own, and these places are stretched to reach from 0 to 1."""
    if worth is None:
        return torch.quantile(members, q, 0)
    ordered, order = members.sort(0)
    share = worth.to(members.dtype)[order]
    place = share.cumsum(0) - share / 2
    place = (place - place[:1]) / (place[-1:] - place[:1]).clamp_min(torch.finfo(place.dtype).tiny)
    upper = (place < q).sum(0, keepdim=True).clamp(1, len(members) - 1) if len(members) > 1 else torch.zeros_like(order[:1])
    lower = (upper - 1).clamp_min(0)
    low, high = place.gather(0, lower), place.gather(0, upper)
    part = ((q - low) / (high - low).clamp_min(torch.finfo(place.dtype).tiny)).clamp(0, 1)
    return torch.lerp(ordered.gather(0, lower), ordered.gather(0, upper), part)[0]


def median(members: Tensor, worth: Tensor | None = None) -> Tensor:
    """The least value with half of the weight at or below it, value by value: of equal weights torch's, the lower of two."""
    if worth is None:
        return members.median(0).values
    ordered, order = members.sort(0)
    below = worth.to(members.dtype)[order].cumsum(0) / worth.sum()
    first = (below < .5 - 8 * torch.finfo(below.dtype).eps).sum(0, keepdim=True)
    return ordered.gather(0, first)[0]


# Evolution strategies --------------------------------------------------------------------------------------------


def utilities(scores: Tensor, kind: str) -> Tensor:
    """What stands for the scores in an ES gradient. none: they themselves; standard: without their mean, over their deviation;
    rank: places from -1/2 (lowest) to 1/2, which know no scale and no outliers."""
    if kind == "none" or len(scores) < 2:
        return scores
    if kind == "standard":
        return (scores - scores.mean()) / (scores.std(correction=0) + 1e-8)
    return (len(scores) - ranks(scores)).to(scores.dtype) / (len(scores) - 1) - .5


def es_gradient(noise: Tensor, scores: Tensor, std: float) -> Tensor:
    """An estimate of the gradient of the scores at x, from the scores of the members x + std * noise, (K, P) and (K,) -> (P,):
    mean over k of noise_k (score_k - mean score) / std.

    With 2 K scores those of x - std * noise stand behind the others (antithetic sampling): mean over k of noise_k (score+_k - score-_k) / (2 std).
    """
    if len(scores) == 2 * len(noise):
        difference = (scores[: len(noise)] - scores[len(noise) :]) / 2
    else:
        difference = scores - scores.mean()
    return difference.to(noise.dtype) @ noise / (len(noise) * std)


# Populations of networks -----------------------------------------------------------------------------------------


def refuse_what_members_share(network: Network, rule: str) -> None:
    """Raises Refused for blocks whose answer is not a function of genes and inputs alone."""
    ops.refuse_unsteady(network, {
        "batch norm": f"algo={rule} runs many copies of the network, and block {{}}'s batch norm would keep the statistics of none of "
                      "them; use arch.norm=none or layer",
        "dropout": f"algo={rule} compares copies of the network by their losses, and block {{}}'s dropout would decide which is better; "
                   "use arch.dropout=0",
        "draws": f"algo={rule} compares copies of the network by their losses, and what block {{}} draws would decide which is better; "
                 "use arch.activation=step"})


def genes(network: nn.Module) -> Tensor:
    """All parameters in one vector, copied."""
    return torch.cat([p.detach().flatten() for p in network.parameters()])


def expressed(vectors: Tensor, network: nn.Module) -> dict[str, Tensor]:
    """Vectors of genes (..., P) as parameters by name, (..., *shape), without copies."""
    named = dict(network.named_parameters())
    parts = vectors.split([p.numel() for p in named.values()], -1)
    return {name: part.unflatten(-1, p.shape) if p.dim() else part.squeeze(-1) for (name, p), part in zip(named.items(), parts)}


def losses(network: nn.Module, task, members: Tensor, x: Tensor, y: Tensor, chunk: int | None) -> Tensor:
    """The loss, summed over the targets, of the network with each member's genes: (K, P) -> (K,). All run at once, or `chunk` at a time."""
    def loss(parameters):
        return task.loss(functional_call(network, parameters, (x,)), y).sum()

    with sdpa_kernel(SDPBackend.MATH):      # the one attention that runs for many members at once
        return vmap(loss, chunk_size=chunk)(expressed(members, network))
