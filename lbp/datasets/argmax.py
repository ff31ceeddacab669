"""Where the greatest digit stood, as pytorch-dni has it: one answer at the end of a sequence."""

from lbp.datasets.adding import digits_then_end
from lbp.datasets.data import Arrays
from lbp.datasets.drawn import curriculum, names


def argmax(*, n: int, n_test: int, digits: int, min_length: int, max_length: int, start_length: int | None, grow_every: int,
           seed: int) -> Arrays:
    """x as in `adding`; y the place of the greatest of the L digits, counted from the first, the last of several: a class
    out of max_length."""
    x, drawn, sizes = digits_then_end(n + n_test, digits, min_length, max_length, seed, "argmax")
    y = sizes - 1 - drawn[:, ::-1].argmax(1)        # from the end, where the first of several is the last
    growth = curriculum(sizes[:n], start_length, grow_every, min_length, max_length, "argmax")
    return Arrays(x[:n], y[:n], x[n:], y[n:], "sequence", names(max_length), symbols=digits + 2, **growth)
