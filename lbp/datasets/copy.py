"""Copying: read symbols, then say them again, as pytorch-dni has it (Graves, Wayne & Danihelka 2014, arXiv 1410.5401)."""

import numpy as np

from lbp.datasets.data import Arrays
from lbp.datasets.drawn import curriculum, lengths, names, unasked


def copy(*, n: int, n_test: int, symbols: int, min_length: int, max_length: int, start_length: int | None, grow_every: int,
         seed: int) -> Arrays:
    """Inputs of 2 max_length + 1 tokens: L symbols, an end flag, blanks; the label at the i-th blank is the i-th symbol.

    L is uniform. Nothing else is asked, neither before the flag nor after the L-th blank. The seed's rows of bits are
    symbols here: b bits are 2^b of them."""
    rng = np.random.RandomState(seed)       # numpy's legacy generator: its numbers never change
    total = n + n_test
    flag, blank, steps = symbols, symbols + 1, 2 * max_length + 1
    sizes, drawn = lengths(rng, total, min_length, max_length, "copy"), rng.randint(0, symbols, (total, max_length))
    x, y = np.full((total, steps), blank), unasked(total, steps)
    for row, (size, values) in enumerate(zip(sizes, drawn)):
        x[row, :size], x[row, size] = values[:size], flag
        y[row, size + 1 : 2 * size + 1] = values[:size]
    growth = curriculum(sizes[:n], start_length, grow_every, min_length, max_length, "copy")
    return Arrays(x[:n], y[:n], x[n:], y[n:], "sequence", names(symbols), symbols=symbols + 2, **growth)
