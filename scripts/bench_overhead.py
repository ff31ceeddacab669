"""What lbp costs over a hand-written loop, and what rules and precisions cost against each other.

    python scripts/bench_overhead.py [--epochs 2] [--rounds 5] [NAME ...]

Both sides of a comparison run in turn, A B A B, each in its own process, on the full MNIST of $LBP_DATA at batch 128.
Prints the ratio A/B of each pair as minimum, median and maximum. A second busy process makes ratios worthless, so the
share of the machine that others used is printed beside them: repeat where it is not near 0.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = os.environ.get("LBP_DATA", "data")
LBP = [sys.executable, "-m", "lbp", "train", "dataset=mnist"]
THREE, EIGHT = "arch.widths=[1024,1024]", f"arch.widths=[{','.join(['1024'] * 7)}]"

# name: (command A, command B, figure, what is asked of A/B)
COMPARISONS = {
    "bp-1024": ([*LBP, "algo=bp", THREE], ["plain", "1024,1024"], "samples_per_s", ">= 0.95"),
    "bp-256": ([*LBP, "algo=bp", "arch.widths=[256,256]"], ["plain", "256,256"], "samples_per_s", ">= 0.88"),
    "memory": ([*LBP, "algo=bp", THREE], ["plain", "1024,1024"], "peak_memory_mb", "<= 1.2"),
    "dfa-3": ([*LBP, "algo=dfa", THREE], [*LBP, "algo=bp", THREE], "samples_per_s", ">= 1.08"),
    "dfa-8": ([*LBP, "algo=dfa", EIGHT], [*LBP, "algo=bp", EIGHT], "samples_per_s", ">= 1.20"),
    "bf16": ([*LBP, "algo=bp", THREE, "trainer.precision=bf16"], [*LBP, "algo=bp", THREE], "samples_per_s",
             ">= 1.5 with AMX"),
}


def run(command: list[str], epochs: int) -> dict[str, float]:
    """One process's figures."""
    with tempfile.TemporaryDirectory() as folder:
        if command[0] == "plain":
            command = [sys.executable, str(Path(__file__).with_name("plain_loop.py")), ROOT, command[1], str(epochs)]
            out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            return json.loads(out.splitlines()[-1])
        command = [*command, f"trainer.epochs={epochs}", f"run.dir={folder}/run"]
        subprocess.run(command, capture_output=True, text=True, check=True)
        return json.loads(Path(folder, "run", "summary.json").read_text())


def busy() -> tuple[float, float]:
    """Seconds of processor time that the whole machine, and our finished children, have used."""
    user, nice, system = map(int, Path("/proc/stat").read_text().split()[1:4])
    return (user + nice + system) / os.sysconf("SC_CLK_TCK"), sum(os.times()[:4])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(COMPARISONS), help=f"of {', '.join(COMPARISONS)}")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    print(f"{'':10} {'figure':>16} {'A':>10} {'B':>10}   A/B min  median  max    asked            others' share")
    for name in args.names:
        a, b, figure, asked = COMPARISONS[name]
        pairs, shares, before = [], [], busy()
        for _ in range(args.rounds):
            pairs.append((run(a, args.epochs), run(b, args.epochs)))
        after = busy()
        ours, all_of_it = after[1] - before[1], after[0] - before[0]
        ratios = sorted(x[figure] / y[figure] for x, y in pairs)
        left, right = (statistics.median(side[figure] for side in sides) for sides in zip(*pairs))
        print(f"{name:10} {figure:>16} {left:10,.0f} {right:10,.0f}   {ratios[0]:7.3f} {statistics.median(ratios):7.3f} "
              f"{ratios[-1]:5.3f}    {asked:16} {max(0.0, 1 - ours / all_of_it):.2f}", flush=True)
        shares = [x["metrics_share"] for x, _ in pairs if "metrics_share" in x]
        print(f"{'':10} metrics took {statistics.median(shares):.3f} of A's training time")


if __name__ == "__main__":
    main()
