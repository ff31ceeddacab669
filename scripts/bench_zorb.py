"""ZORB on 784-512-256-10 sigmoid units: time, memory and accuracy of its solvers over the number of MNIST's training images.

    LBP_DATA=... python scripts/bench_zorb.py [--sizes 10000,20000,30000,40000,50000,60000] [--exact 20000] [--rounds 3] [--plot zorb_time.png]

Each fit is a process of its own, solvers in turn, medians over the rounds; memory is what the fit has at its highest above what the
process had before it, data included; beside them two epochs of backprop on the same network, as the trainer runs them.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

SETTINGS = ("experiment=zorb_mnist", "logger.console=off")


def resident(key: str) -> float:
    """MiB of this process, now (VmRSS) or at the highest (VmHWM)."""
    return next(int(line.split()[1]) / 1024 for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))


def fit(solver: str, size: int) -> dict[str, float]:
    """In this process."""
    import torch

    from lbp.config import compose
    from lbp.training.results import evaluate
    from lbp.training.setup import build

    experiment = build(compose([*SETTINGS, f"algo.solver={solver}", f"dataset.train_size={size}"]).values)
    torch.linalg.eigh(torch.eye(64, dtype=torch.float64))   # libraries are no part of it
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")           # the highest starts anew
    start = time.perf_counter()
    for phase in experiment.rule.phases():
        phase.fit(experiment.data.train.passes)
    seconds = time.perf_counter() - start
    memory = resident("VmHWM") - before
    found = evaluate(experiment.rule, experiment.data.task, experiment.data.test, experiment.environment)
    return {"seconds": seconds, "MiB": memory, "accuracy": 100 * found["accuracy"]}


def backprop() -> dict[str, float]:
    import lbp

    return {"seconds": lbp.run(*SETTINGS, "algo=bp", "trainer.epochs=2", "metrics.every=0").summary["train_s"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="10000,20000,30000,40000,50000,60000")
    parser.add_argument("--exact", default="20000", help="sizes that the exact solver is run on too")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        solver, size = args.one
        print(json.dumps(backprop() if solver == "bp" else fit(solver, int(size))))
        return
    sizes, exact = ([int(size) for size in text.split(",") if size] for text in (args.sizes, args.exact))
    pairs = [("auto", size) for size in sizes] + [("exact", size) for size in exact] + [("bp", 60000)]
    found = {pair: [] for pair in pairs}
    for _ in range(args.rounds):
        for solver, size in pairs:
            done = subprocess.run([sys.executable, __file__, "--one", solver, str(size)], check=True, capture_output=True, text=True)
            found[solver, size].append(json.loads(done.stdout.splitlines()[-1]))
    print("| solver | images | seconds | MiB | test accuracy |\n| --- | --- | --- | --- | --- |")
    middle = {pair: {key: statistics.median(one[key] for one in runs) for key in runs[0]} for pair, runs in found.items()}
    for (solver, size), values in middle.items():
        cells = [f"{values[key]:.{digits}f}" if key in values else "–" for key, digits in (("seconds", 2), ("MiB", 0), ("accuracy", 2))]
        print(f"| {'two epochs of bp' if solver == 'bp' else solver} | {size:,} | {' | '.join(cells)} |")
    if args.plot:
        from lbp.report.plots import curves

        curves(args.plot, {"zorb": (sizes, [middle["auto", size]["seconds"] for size in sizes])}, "training images", "seconds of the fit")


if __name__ == "__main__":
    main()
