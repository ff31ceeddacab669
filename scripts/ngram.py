"""Bits per character of an n-gram model with interpolated Kneser-Ney smoothing, on the split of dataset=text.

    python scripts/ngram.py [--order 3] [--json] [dataset.file=PATH ...]

Trains on the training split and is asked what a network is asked: each next character of the test split; of the
validation split too. Its contexts reach back over the ends of windows, where a network begins anew, so it is not put at
a disadvantage. About ten seconds.
"""

import argparse
import json
import math
from collections import Counter, defaultdict

import torch

from lbp.config import compose
from lbp.datasets.data import Split, load


class KneserNey:
    """Interpolated Kneser-Ney (Kneser & Ney 1995; Chen & Goodman 1999): the highest order counts, those below count in how
    many contexts a word was seen, each less a discount n1 / (n1 + 2 n2) of its order; below the first lies the uniform law."""

    def __init__(self, characters: list[int], order: int, symbols: int):
        self.order, self.symbols = order, symbols
        grams = Counter(zip(*(characters[i:] for i in range(order))))
        self.counts, self.discounts, self.totals, self.kinds = {}, {}, {}, {}
        for n in range(order, 0, -1):
            of = Counter(grams.values())
            self.counts[n] = grams
            self.discounts[n] = of[1] / (of[1] + 2 * of[2]) if of[1] else 0.0
            self.totals[n], self.kinds[n] = defaultdict(int), defaultdict(int)
            for gram, count in grams.items():
                self.totals[n][gram[:-1]] += count
                self.kinds[n][gram[:-1]] += 1
            grams = Counter(gram[1:] for gram in grams)     # in how many contexts: each gram of this order is one

    def probability(self, gram: tuple[int, ...]) -> float:
        """Of its last character after the others, at most order - 1 of them."""
        p = 1 / self.symbols
        for n in range(1, len(gram) + 1):
            part = gram[-n:]
            total = self.totals[n].get(part[:-1], 0)
            if total:       # an unseen context says nothing: the shorter one speaks alone
                discount = self.discounts[n]
                p = (max(self.counts[n].get(part, 0) - discount, 0) + discount * self.kinds[n][part[:-1]] * p) / total
        return p

    def bits(self, characters: list[int]) -> float:
        """The mean cost of each character but the first."""
        grams = Counter(tuple(characters[max(0, i + 1 - self.order) : i + 1]) for i in range(1, len(characters)))
        return -sum(count * math.log2(self.probability(gram)) for gram, count in grams.items()) / (len(characters) - 1)


def stream(split: Split) -> list[int]:
    """A split's windows, put together again."""
    return torch.cat((split.x.flatten(), split.y[-1, -1:])).tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="of the dataset, as lbp train takes them")
    parser.add_argument("--order", type=int, default=3, help="characters of a gram (3: two of context)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    values = compose(["dataset=text", *options.overrides]).values
    data = load(values["dataset"], seed=values["seed"], batch_size=1)
    model = KneserNey(stream(data.train), options.order, data.task.symbols)
    found = {f"{name}_bits_per_character": model.bits(stream(split)) for name, split in (("val", data.val), ("test", data.test)) if split}
    if options.json:
        print(json.dumps({"order": options.order, "symbols": data.task.symbols, **found}))
    else:
        print(data.described())
        print(f"order {options.order}, Kneser-Ney: " + ", ".join(f"{name} {value:.4f}" for name, value in found.items()))


if __name__ == "__main__":
    main()
