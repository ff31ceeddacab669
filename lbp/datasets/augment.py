"""Augmentation of image batches on their device; what is drawn is a pure function of (seed, epoch), on every
device."""

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor

from lbp import knobs
from lbp.errors import ConfigError


def generator(*key) -> torch.Generator:
    """A CPU generator that is a pure function of `key` (strings and numbers)."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest) >> 1)


def translate(x: Tensor, by: Tensor, reach: int, black: Tensor) -> Tensor:
    """Moves image i of x (N, C, H, W) by `reach - by[i]` = (down, right) pixels, `by` (N, 2) in 0 .. 2 *
    reach."""
    n, c, h, w = x.shape
    padded = black.expand(n, c, h + 2 * reach, w + 2 * reach).contiguous()
    padded[:, :, reach:reach + h, reach:reach + w] = x
    windows = padded.unfold(2, h, 1).unfold(3, w, 1)        # a view: (N, C, down, right, H, W)
    return windows[torch.arange(n, device=x.device), :, by[:, 0], by[:, 1]]


def mirror(x: Tensor, which: Tensor, _, black: Tensor) -> Tensor:
    """Flips left and right the images of x (N, C, H, W) that `which` (N,) marks."""
    return torch.where(which.view(-1, 1, 1, 1), x.flip(-1), x)


def cutout(x: Tensor, centre: Tensor, side: int, black: Tensor) -> Tensor:
    """Blackens in image i a square around `centre[i]` = (row, column), clipped by the border (DeVries &
    Taylor 2017)."""
    def inside(length, middle):
        offset = torch.arange(length, device=x.device) - middle.unsqueeze(1) + side // 2
        return (offset >= 0) & (offset < side)
    rows, columns = inside(x.shape[2], centre[:, 0]), inside(x.shape[3], centre[:, 1])
    return torch.where((rows.unsqueeze(2) & columns.unsqueeze(1)).unsqueeze(1), black, x)


def _draw_moves(n, shape, reach, rng):
    return torch.randint(0, 2 * reach + 1, (n, 2), generator=rng)


def _draw_coins(n, shape, _, rng):
    return torch.randint(0, 2, (n,), generator=rng).bool()


def _draw_centres(n, shape, side, rng):
    return torch.stack([torch.randint(0, length, (n,), generator=rng) for length in shape[1:]], 1)


KINDS = {   # token: what is drawn for an epoch, what it does to a batch, whether it takes a size in pixels
    "shift": (_draw_moves, translate, True),
    "crop": (_draw_moves, translate, True),     # padding by k and cropping at random is a shift by up to k
    "flip": (_draw_coins, mirror, False),
    "cutout": (_draw_centres, cutout, True),
}


class Augment:
    """The tokens of `dataset.augment`, in their order: `shift:2`, `crop:4`, `flip`, `cutout:8`. Raises
    ConfigError."""

    def __init__(self, tokens: list[str]):
        self.steps, problems = [], []
        for token in tokens:
            name, _, size = str(token).partition(":")
            if name not in KINDS:
                problems.append(f"dataset.augment: unknown {token!r}, allowed are shift:K, crop:K, flip, "
                                "cutout:K" + knobs.did_you_mean(knobs.nearest(name, KINDS)))
            elif KINDS[name][2] != (size.isdecimal() and int(size) > 0) or (size and not KINDS[name][2]):
                form = f"{name}:K with K pixels, an int > 0" if KINDS[name][2] else f"{name} alone"
                problems.append(f"dataset.augment: {token!r} is not of the form {form}")
            else:
                self.steps.append((name, int(size or 0)))
        if problems:
            raise ConfigError(*problems)

    def __bool__(self):
        return bool(self.steps)

    def epoch(self, n: int, shape, seed: int, epoch: int, device,
              black: Tensor) -> Callable[[Tensor, slice], Tensor]:
        """Draws for the n places of an epoch; the result takes a batch and its places. `black` (C, 1, 1)
        fills."""
        drawn = [(KINDS[name][1], size,
                  KINDS[name][0](n, shape, size, generator("augment", seed, epoch, i)).to(device))
                 for i, (name, size) in enumerate(self.steps)]

        def augmented(x: Tensor, places: slice) -> Tensor:
            for change, size, what in drawn:
                x = change(x, what[places], size, black)
            return x
        return augmented
