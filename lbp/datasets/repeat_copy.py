"""Copying several times, as often as is asked, and saying when it is over (Graves, Wayne & Danihelka 2014, arXiv 1410.5401)."""

import numpy as np

from lbp.datasets.data import Arrays
from lbp.datasets.drawn import curriculum, lengths, names, unasked


def repeat_copy(*, n: int, n_test: int, symbols: int, min_length: int, max_length: int, max_repeats: int,
                start_length: int | None, grow_every: int, seed: int) -> Arrays:
    """Inputs: L symbols, a token that says R (1 .. max_repeats, each a token of its own), blanks; labels at the blanks are
    the L symbols R times, then `end`. L and R are uniform; what comes after the end is not asked."""
    rng = np.random.RandomState(seed)       # numpy's legacy generator: its numbers never change
    total = n + n_test
    blank, steps = symbols + max_repeats, max_length + 1 + max_length * max_repeats + 1
    sizes, drawn = lengths(rng, total, min_length, max_length, "repeat_copy"), rng.randint(0, symbols, (total, max_length))
    repeats = rng.randint(1, max_repeats + 1, total)
    x, y = np.full((total, steps), blank), unasked(total, steps)
    for row, (size, values, often) in enumerate(zip(sizes, drawn, repeats)):
        x[row, :size], x[row, size] = values[:size], symbols + often - 1
        answer = np.append(np.tile(values[:size], often), symbols)      # the class after the symbols: end
        y[row, size + 1 : size + 1 + len(answer)] = answer
    growth = curriculum(sizes[:n], start_length, grow_every, min_length, max_length, "repeat_copy")
    return Arrays(x[:n], y[:n], x[n:], y[n:], "sequence", names(symbols, "end"), symbols=symbols + max_repeats + 1, **growth)
