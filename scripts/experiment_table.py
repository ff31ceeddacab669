"""Experiments side by side: test and training figures, seconds of training and peak memory, mean and spread over seeds.

    LBP_DATA=... python scripts/experiment_table.py [--seeds 3] EXPERIMENT ... [KEY=VALUE ...]

An EXPERIMENT may have settings of its own, joined by +: zorb_mnist+algo.solver=exact. KEY=VALUE is for all. Prints a markdown row
as soon as an experiment's seeds are done. Memory is the whole process's highest so far: give --seeds 1 and one experiment to compare it.
"""

import argparse
import statistics

import lbp
from lbp.errors import Diverged


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiments", nargs="+")
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_intermixed_args()
    everywhere = [text for text in args.experiments if "=" in text.split("+")[0]]
    print("| experiment | test | best epoch's test | training | seconds | MiB |\n| --- | --- | --- | --- | --- | --- |")
    for text in args.experiments:
        if text in everywhere:
            continue
        experiment, *own = text.split("+")
        runs = []
        for seed in range(args.seeds):
            try:
                runs.append(lbp.run(f"experiment={experiment}", *everywhere, *own, f"seed={seed}", "logger.console=off").summary)
            except Diverged as error:
                print(f"{text}, seed {seed}: {error}", flush=True)
        if not runs:
            continue
        metric = next(key for key in ("accuracy", "r2") if f"test_{key}" in runs[0])
        cells = [shown([run[key] for run in runs if key in run], metric == "accuracy") for key in (f"test_{metric}", f"best_test_{metric}", f"train_{metric}")]
        seconds, memory = (statistics.mean(run[key] for run in runs) for key in ("train_s", "peak_memory_mb"))
        print(f"| {text} | {' | '.join(cells)} | {seconds:.2f} | {memory:.0f} |", flush=True)


def shown(values: list[float], percent: bool) -> str:
    """mean ± standard deviation; accuracies in %"""
    if not values:
        return "–"
    values = [100 * value for value in values] if percent else values
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.2f} ± {spread:.2f}"


if __name__ == "__main__":
    main()
