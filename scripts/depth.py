"""Accuracy over depth: rules on MNIST with more and more hidden layers, and the plot of it.

    LBP_DATA=... python scripts/depth.py [--depths 2,4,8,16,32] [--width 256] [--epochs 3] [--seeds 1] [--plot depth.png] [RULE ...] [KEY=VALUE ...]

A RULE may have settings of its own, joined by +: dni+algo.synthesizer=mlp+algo.norm=batch. KEY=VALUE is for all: arch.norm=batch.
"""

import argparse
import statistics
from math import isnan, nan
from pathlib import Path

import lbp
from lbp.errors import Diverged
from lbp.report.plots import curves

RULES = ("bp", "dfa", "sigprop", "predsim", "forward_forward", "shallow")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rules", nargs="*", default=RULES)
    parser.add_argument("--depths", default="2,4,8,16,32")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_intermixed_args()
    depths = [int(depth) for depth in args.depths.split(",")]
    everywhere = [text for text in args.rules if "=" in text.split("+")[0]]
    found = {}
    print("| rule | " + " | ".join(f"{depth} hidden layers" for depth in depths) + " |\n| --- |" + " --- |" * len(depths))
    for rule in [text for text in args.rules if text not in everywhere] or RULES:
        found[rule] = []
        for depth in depths:
            settings = ["dataset=mnist", f"arch.widths=[{','.join([str(args.width)] * depth)}]", f"trainer.epochs={args.epochs}",
                        "metrics.every=0", "logger.console=off", *everywhere]
            found[rule].append(statistics.mean(accuracy([*f"algo={rule}".split("+"), *settings, f"seed={seed}"]) for seed in range(args.seeds)))
        print(f"| {rule} | " + " | ".join("diverged" if isnan(value) else f"{value:.1f}" for value in found[rule]) + " |", flush=True)
    if args.plot:
        curves(args.plot, {rule: (depths, values) for rule, values in found.items()}, "hidden layers", "test accuracy, %",
               log=(True, False))


def accuracy(settings: list[str]) -> float:
    """On the test split in %, nan where the training diverges."""
    try:
        return 100 * lbp.run(*settings).summary["test_accuracy"]
    except Diverged:
        return nan


if __name__ == "__main__":
    main()
