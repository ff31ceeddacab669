"""Time of a training step under each rule, as a multiple of backprop's: one process, the rules in turn, medians of ratios.

    python scripts/bench_rules.py algo=fa,usf,dfa [--rounds 40] [key=value ...]

784-1024-1024-10 with adam unless said. A second process on the machine makes ratios worthless.
"""

import argparse
import statistics
import time

import torch

from lbp.config import compose
from lbp.training.setup import build

STEPS = 4   # of one rule before the next has its turn


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=40)
    args, overrides = parser.parse_known_args()
    algos = next((text.removeprefix("algo=").split(",") for text in overrides if text.startswith("algo=")), ["bp", "fa", "dfa"])
    rest = [text for text in overrides if not text.startswith("algo=")]
    steps = {name: stepper(name, rest) for name in ["bp", *(name for name in algos if name != "bp")]}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for round_ in range(args.rounds + 2):
        for name, step in steps.items():
            seconds = min(timed(step) for _ in range(STEPS))
            if round_ >= 2:
                times[name].append(seconds)
    print(f"{'rule':16} {'ms a step':>10} {'of bp':>7}   quartiles")
    for name, seconds in times.items():
        ratios = [a / b for a, b in zip(seconds, times["bp"])]
        low, middle, high = statistics.quantiles(ratios, n=4)
        print(f"{name:16} {1000 * statistics.median(seconds):10.2f} {middle:7.2f}   {low:.2f} to {high:.2f}")


def stepper(algo: str, overrides: list[str]):
    """A function that learns one batch of random images, as the trainer does where it does not measure."""
    config = compose(["dataset=mnist5k", "arch.widths=[1024,1024]", f"algo={algo}", *(
        [] if any(text.startswith("optimizer") for text in overrides) else ["optimizer=adam"]), *overrides])
    experiment = build(config.values)
    rule, apply = experiment.rule.train(), experiment.apply
    x, y = next(iter(experiment.data.train.batches(0)))
    apply.count = experiment.data.task.count(y)
    learn = rule.phases()[-1].learn

    def step() -> None:
        with experiment.environment.autocast():
            learned = learn(x, y, apply)
        apply.finish(learned.loss.sum())

    return step


def timed(step) -> float:
    start = time.perf_counter()
    step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
