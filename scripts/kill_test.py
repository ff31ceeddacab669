"""Kills runs by SIGKILL at seeded moments, most of them inside the writing of a checkpoint or a line, resumes each time,
and compares what comes out with a run that nobody killed: weights, optimizer, generators, metrics.jsonl, summary.

    python scripts/kill_test.py [--kills 6] [--seed 0] [ALGO ...]
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
TINY = ("dataset=digits", "arch.widths=[16,12]", "metrics.every=5", "logger.wandb.mode=disabled", "logger.console=off",
        "trainer.device=cpu")
STEPS = ("trainer.epochs=2", "trainer.checkpoint_every=3")   # nothing to a rule that solves
TIMES = {"samples_per_s", "wall_s", "train_s", "epoch_s", "measure_s", "metrics_share", "peak_memory_mb", "lines"}


def armed(at: int) -> None:
    """From now on this process kills itself at its `at`-th operation on a file: before it, half-way or after it."""
    from lbp.logs.jsonl import Jsonl
    from lbp.training.checkpoint import _Hashed

    seen = [0]

    def deadly(place, name: str, half=None) -> None:
        whole = getattr(place, name)

        def operation(*args, **kwargs):
            seen[0] += 1
            if seen[0] != at:
                return whole(*args, **kwargs)
            if at % 3 == 1 and half:
                half(*args)
            elif at % 3:
                whole(*args, **kwargs)
            os.kill(os.getpid(), signal.SIGKILL)

        setattr(place, name, operation)

    for name in ("replace", "link", "fsync", "fdatasync"):
        deadly(os, name)
    deadly(_Hashed, "write", lambda self, data: (self.file.write(bytes(data)[:len(data) // 2]), self.file.flush()))
    deadly(Jsonl, "write", lambda self, record: self.file.write(json.dumps(record).encode()[:40]))


def fingerprint(folder: Path) -> dict:
    """Everything of a run that is to be the same to the bit."""
    from lbp.training.checkpoint import load

    last, best = (load(path) if path.exists() else {} for path in (folder / "checkpoints/last.pt", folder / "checkpoints/best.pt"))
    generators = [part["generators"] for part in last["ranks"]]
    lines = [timeless(json.loads(line)) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]
    places = [(line["split"], line["step"]) for line in lines]
    return {"lines": lines, "twice": sorted({p for p in places if places.count(p) > 1}), "rule": sha(last["rule"]),
            "optimizer": sha(last["apply"]), "generators": sha(generators), "best": sha([best["rule"], best["apply"]]) if best else None,
            "state": timeless(last["state"]) | {"loss": None, "score": None},
            "summary": timeless(json.loads((folder / "summary.json").read_text("utf-8"))), "status": (folder / "STATUS").read_text().strip(),
            "left over": sorted(path.name for path in folder.rglob("*.tmp"))}


def timeless(thing: dict) -> dict:
    return {key: value for key, value in thing.items() if key not in TIMES}


def sha(thing) -> str:
    """Of all tensors and values in nested containers, with their places."""
    import torch

    found = hashlib.sha256()

    def add(thing) -> None:
        if isinstance(thing, torch.Tensor):
            found.update(f"{thing.dtype}{tuple(thing.shape)}".encode() + thing.contiguous().numpy().tobytes())
        elif isinstance(thing, dict):
            for key, value in thing.items():
                found.update(repr(key).encode())
                add(value)
        elif isinstance(thing, (list, tuple)):
            found.update(f"[{len(thing)}".encode())
            for value in thing:
                add(value)
        else:
            found.update(repr(thing).encode())

    add(thing)
    return found.hexdigest()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=6, help="of each algo")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("algos", nargs="*", default=["bp", "kp", "forward_forward", "elm"])
    args = parser.parse_args()
    rng, bad = random.Random(args.seed), 0
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def lbp(*words: str, at: int = 0, after: float = 120) -> int:
        """The exit code of a command; -9 where it was killed, at an operation or after so many seconds."""
        with subprocess.Popen([sys.executable, __file__, "--at", str(at), *words], cwd=place, env=environment,
                              stderr=subprocess.PIPE, text=True) as process:
            try:
                errors = process.communicate(timeout=after)[1]
            except subprocess.TimeoutExpired:
                process.kill()
                errors = process.communicate()[1]
        if process.returncode not in (0, -9):
            sys.exit(f"{words}: exit code {process.returncode}: {errors}")
        return process.returncode

    for algo in args.algos:
        with tempfile.TemporaryDirectory() as place:
            train = ("train", f"algo={algo}", *TINY, *(() if algo == "elm" else STEPS))
            lbp(*train, "run.dir=whole")
            want, killed, runs, run = fingerprint(Path(place, "whole")), 0, 0, None
            while killed < args.kills or run:
                if not run:
                    runs += 1
                    run, words = Path(place, f"killed{runs}"), (*train, f"run.dir=killed{runs}")
                if killed == args.kills:
                    how, kill = "left alone", {}
                elif killed % 4 == 3:
                    kill = {"after": rng.uniform(1, 5)}
                    how = f"after {kill['after']:.1f} s"
                else:
                    kill = {"at": rng.randrange(1, 15 if algo == "elm" else 60)}
                    how = f"at file operation {kill['at']}"
                code = lbp(*words, **kill)
                killed += code == -9
                print(f"{algo:16} run {runs}, {words[0]:6} {how:24} {'KILLED ' + str(killed) if code else 'done'}", flush=True)
                if (run / "config.yaml").exists():
                    words = ("resume", run.name)
                elif code:  # killed before there was a run
                    shutil.rmtree(run, ignore_errors=True)
                if not code:
                    got = fingerprint(run)
                    wrong = [key for key in want if got[key] != want[key]]
                    bad += bool(wrong)
                    print(f"{algo:16} run {runs}: {'DIFFERS in ' + ', '.join(wrong) if wrong else 'identical'}, "
                          f"{len(got['lines'])} lines, weights {got['rule'][:12]}", flush=True)
                    run = None
    print(f"{len(args.algos) * args.kills} kills: {f'{bad} runs DIFFER' if bad else 'every run identical to the one never killed'}")
    return bool(bad)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--at"]:
        from lbp import cli

        if int(sys.argv[2]):
            armed(int(sys.argv[2]))
        sys.exit(cli.main(sys.argv[3:]))
    sys.exit(main())
