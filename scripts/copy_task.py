"""Copying under truncation: how long a sequence an LSTM learns to copy from spans of a few tokens, and what a synthetic gradient adds.

    python scripts/copy_task.py [--seeds 0,1,2] [--minutes 20] [--span 4] [--out copy_task] [--set KEY=VALUE ...] [RULE ...]

A RULE is overrides joined by +: algo=tbptt_dni+algo.synthesizer=mlp. Each trains on the same samples under the same curriculum, for so many
minutes. A length is solved where 99 % of its test sequences come without an error, and those of all shorter ones; by the final weights,
and by those that solved most of the validation split. Writes OUT.json, and the
plots OUT_lengths.png (share solved over length, the mean over seeds) and OUT_training.png (longest length solved of the validation
split over minutes of training, mean and spread over seeds).
"""

import argparse
import copy
import json
import statistics
import tempfile
from pathlib import Path

import torch

from lbp.config import compose
from lbp.report.plots import curves
from lbp.training import loop
from lbp.training.setup import build

RULES = ("algo=tbptt", "algo=tbptt_dni")
SOLVED = 0.99


class Watch:
    """The log of a run: at each epoch's end the longest length of the validation split that is solved."""

    def __init__(self, experiment, every: float):
        self.experiment, self.every, self.found = experiment, every, []
        self.best, self.weights = (0, 0.0), experiment.rule.state_dict()

    def follow(self, state, *_) -> None:
        self.state = state

    def write(self, record: dict) -> None:
        minutes = self.state.train_s / 60
        if record["split"] == "val" and minutes >= (self.found[-1]["minutes"] if self.found else -self.every) + self.every:
            shares = by_length(self.experiment, self.experiment.data.val)
            self.found.append({"minutes": minutes, "epoch": record["epoch"], "steps": record["step"], "longest": longest(shares),
                               "sequence_accuracy": record["sequence_accuracy"]})
            if (now := (longest(shares), record["sequence_accuracy"])) > self.best:
                self.best, self.weights = now, copy.deepcopy(self.experiment.rule.state_dict())

    def length(self) -> int:
        return len(self.found)

    def sync(self) -> None:
        """Nothing is written on the way."""


@torch.no_grad()
def by_length(experiment, split) -> dict[int, float]:
    """{length: share of its sequences without an error}."""
    experiment.rule.eval()
    right, sizes = [], []
    for x, y in split.passes():
        asked = y >= 0
        right.append(((experiment.rule.predict(x).argmax(-1) == y) | ~asked).all(1))
        sizes.append(asked.sum(1))
    experiment.rule.train()
    right, sizes = torch.cat(right).double(), torch.cat(sizes)
    return {int(size): float(right[sizes == size].mean()) for size in sizes.unique()}


def longest(shares: dict[int, float]) -> int:
    """The longest length that is solved as all shorter ones are; 0 where the shortest is not."""
    done = 0
    for size in sorted(shares):
        if shares[size] < SOLVED:
            return done
        done = size
    return done


def run(rule: str, seed: int, args) -> dict:
    """One training and what it came to."""
    config = compose([
        "dataset=copy", "dataset.start_length=1", f"dataset.max_length={args.max_length}", f"dataset.n={args.n}", f"dataset.n_test={args.n_test}",
        "arch=lstm", *rule.split("+"), f"algo.span={args.span}", f"trainer.max_minutes={args.minutes}", "trainer.epochs=1000000",
        f"seed={seed}", f"dataset.seed={seed}", "metrics.every=0", "trainer.threads=1", *args.set])
    experiment = build(config.values)
    watch = Watch(experiment, args.minutes / 200)
    with tempfile.TemporaryDirectory() as folder:
        summary = loop.train(experiment, watch, Path(folder))
    shares = by_length(experiment, experiment.data.test)
    experiment.rule.load_state_dict(watch.weights)
    best = longest(by_length(experiment, experiment.data.test))
    return {"rule": rule, "seed": seed, "longest": longest(shares), "best": best, "shares": shares, "training": watch.found,
            **{key: summary[key] for key in ("epochs", "steps", "train_s", "samples_per_s", "test_sequence_accuracy") if key in summary}}


def plots(found: dict[str, list[dict]], out: str) -> None:
    lengths = {rule: list(runs[0]["shares"]) for rule, runs in found.items()}
    curves(Path(f"{out}_lengths.png"), {label(rule): (lengths[rule], [100 * statistics.mean(run["shares"][size] for run in runs)
                                                                      for size in lengths[rule]]) for rule, runs in found.items()},
           "length", "test sequences without an error, %")
    over, spread = {}, {}
    for rule, runs in found.items():
        minutes = runs[0]["training"]
        each = [[latest(run["training"], point["minutes"]) for run in runs] for point in minutes]
        over[label(rule)] = ([point["minutes"] for point in minutes], [statistics.mean(values) for values in each])
        spread[label(rule)] = ([min(values) for values in each], [max(values) for values in each])
    curves(Path(f"{out}_training.png"), over, "minutes of training", "longest length solved, of validation", spread=spread)


def latest(training: list[dict], minutes: float) -> int:
    """The longest length that was solved at the last look up to so many minutes."""
    return ([0] + [point["longest"] for point in training if point["minutes"] <= minutes])[-1]


def label(rule: str) -> str:
    return rule.replace("algo=", "").replace("algo.", "").replace("+", ", ")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rules", nargs="*", default=RULES)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--span", type=int, default=4)
    parser.add_argument("--max-length", type=int, default=20)
    parser.add_argument("--n", type=int, default=20000, help="training and validation sequences")
    parser.add_argument("--n-test", type=int, default=10000)
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="overrides of all runs")
    parser.add_argument("--out", default="copy_task")
    args = parser.parse_args()
    found: dict[str, list[dict]] = {rule: [] for rule in args.rules}
    print("| rule | seed | longest length solved | of the best epoch | sequences without an error, % | minutes | steps |\n| --- | --- | --- | --- | --- | --- | --- |")
    for seed in map(int, args.seeds.split(",")):
        for rule in args.rules:
            result = run(rule, seed, args)
            found[rule].append(result)
            print(f"| {label(rule)} | {seed} | {result['longest']} | {result['best']} | {100 * statistics.mean(result['shares'].values()):.1f} | "
                  f"{result['train_s'] / 60:.1f} | {result['steps']} |", flush=True)
            Path(f"{args.out}.json").write_text(json.dumps({"arguments": vars(args), "runs": found}, indent=1))
    plots(found, args.out)


if __name__ == "__main__":
    main()
