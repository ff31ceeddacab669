"""TPE against random search for dfa on mnist5k with the same budget: python scripts/bench_search.py > table.md

The space, the samplers and the first trial are those of `lbp search`; the trials run in this process, by lbp.run. Figures: the best
validation accuracy of a search, and the test accuracy of that trial's best epoch, for each repeat (of another seed of the sampler;
the runs' own seed stays) and as medians. Takes N trials x 2 samplers x 5 repeats x 2 spaces.
"""

import argparse
import contextlib
import io
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from statistics import median

import torch

import lbp
from lbp.launch.search import _optuna, ask, enlist, plan_of, plans
from lbp.errors import Diverged

SPACES = {
    "declared": [],
    "wide": ["optimizer.lr=tag(log, interval(1e-5, 1))", "algo.scale=tag(log, interval(1e-3, 1e+3))", "trainer.batch_size=choice(16,64,256,1024)",
             "arch.activation=choice(relu,tanh,sigmoid)", "optimizer.weight_decay=tag(log, interval(1e-7, 1e-1))"],
}
BASE = ["algo=dfa", "dataset=mnist5k", "trainer.epochs=2", "trainer.threads=1", "trainer.device=cpu", "metrics.every=0"]


def once(space: list[str], sampler: str, repeat: int, trials: int) -> list[tuple[float | None, float | None]]:
    """(validation, test) of each trial; of one that diverged None."""
    (plan,), _ = plans([*BASE, *space])
    study = _optuna().create_study(study_name="dfa", direction="maximize")
    enlist(study, plan, {"sampler": sampler, "seed": repeat})
    plan, asked = plan_of(study)
    found = []
    for _ in range(trials):
        trial = ask(study, plan, asked)
        folder = tempfile.mkdtemp()
        try:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                result = lbp.run(*plan.words(trial.params), f"run.dir='{folder}/run'")
            values = [record["accuracy"] for line in (result.folder / "metrics.jsonl").read_text().splitlines()
                      if (record := json.loads(line))["split"] == "val"]
            found.append((max(values), result.summary["best_test_accuracy"]))
            study.tell(trial, max(values))
        except Diverged:
            found.append((None, None))
            study.tell(trial, state=_optuna().trial.TrialState.PRUNED)
        finally:
            shutil.rmtree(folder)
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--trials", type=int, default=25)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--space", choices=SPACES, nargs="*", default=list(SPACES))
    parser.add_argument("--samplers", nargs="*", default=["tpe", "random"])
    parser.add_argument("--keep", type=Path, help="every trial's figures, as JSON")
    args = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["LBP_THREADS"] = "1"
    kept = []
    print(f"| space | sampler | best validation, median of {args.repeats} | each | its test, median | after 10, 15, 20 trials |\n|{' --- |' * 6}")
    for name in args.space:
        for sampler in args.samplers:
            runs = []
            for repeat in range(args.repeats):
                runs.append(once(SPACES[name], sampler, repeat, args.trials))
                kept.append({"space": name, "sampler": sampler, "repeat": repeat, "trials": runs[-1]})
                if args.keep:
                    args.keep.write_text(json.dumps(kept))
                print(name, sampler, repeat, max(v for v, _ in runs[-1] if v), file=sys.stderr, flush=True)
            best = [max((t for t in run if t[0] is not None), key=lambda t: t[0]) for run in runs]
            on_the_way = [median(max(v for v, _ in run[:n] if v is not None) for run in runs) for n in (10, 15, 20)]
            print(f"| {name} | {sampler} | {median(v for v, _ in best):.3f} | {' '.join(f'{v:.3f}' for v, _ in best)} | "
                  f"{median(t for _, t in best):.3f} | {' '.join(f'{v:.3f}' for v in on_the_way)} |", flush=True)
