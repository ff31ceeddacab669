"""How much of its time a stage waits: blocks that learn by themselves as a pipeline, beside backprop as one.

    nice -n -10 python scripts/bench_pipeline.py [--depth 8] [--width 1024] [--batch 256] [--steps 100] [--rounds 5] [RULE ...]

Two CPU ranks of one thread each, an mlp of equal hidden blocks on MNIST of $LBP_DATA, adam. A RULE is overrides joined by +. Each rule runs
as launch=pipeline and in one process of one thread; backprop in one process, and as two stages of torch.distributed.pipelining,
cut at the same place, by GPipe and 1F1B with several microbatches. A stage's idle share is the share of the steps' time, from the first
to the last on any rank, in which it waits for a message or has no more to do; the first batches and the last, when the pipeline
fills and empties, are in it. All run in turn, and medians of the rounds are printed; others on the machine make them worthless, so their
share of it is printed beside.
"""

import argparse
import json
import math
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import chain
from pathlib import Path

RULES = ("algo=local+algo.schedule=streaming", "algo=sigprop+algo.schedule=streaming", "algo=forward_forward")
WARM = 5        # steps of backprop's pipeline before it is timed


def lbp(words: list[str], args) -> dict:
    """The summary of a run of one epoch of `args.steps` batches."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "lbp", "train", *words, "dataset=mnist", "dataset.val_size=0", f"dataset.train_size={args.steps * args.batch}",
                   f"arch.widths=[{','.join([str(args.width)] * args.depth)}]", f"trainer.batch_size={args.batch}", "trainer.epochs=1", "trainer.threads=1",
                   "trainer.device=cpu", "metrics.every=0", "logger.wandb.mode=disabled", "logger.console=off", f"run.dir={folder}/run"]
        subprocess.run(command, capture_output=True, text=True, check=True)
        return json.loads(Path(folder, "run", "summary.json").read_text())


def backprop(schedule: str, parts: int, args) -> dict:
    """The same figures of two stages of torch.distributed.pipelining."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    ranks = [subprocess.Popen([sys.executable, __file__, "--as", schedule, str(parts), *(f"--{key}={getattr(args, key)}" for key in ("depth", "width", "batch", "steps"))],
                              env=os.environ | {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)},
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for rank in range(2)]
    told = [rank.communicate() for rank in ranks]
    if any(rank.returncode for rank in ranks):
        sys.exit(told[0][1] + told[1][1])
    found = [json.loads(out) for out, _ in told]
    wall = max(f["took"] for f in found)
    return {"samples_per_s": args.steps * args.batch / wall, "stages": [{"idle_share": 1 - f["busy"] / wall} for f in found], "loss": found[1]["loss"]}


def as_a_stage(schedule: str, parts: int, args) -> None:
    import torch
    import torch.distributed as dist
    from torch.distributed import pipelining

    from lbp import registry
    from lbp.datasets.data import load
    from lbp.training.setup import build_arch

    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    dist.init_process_group("gloo")
    rank, waited, wait = dist.get_rank(), 0.0, dist.Work.wait

    def timed(work, *timeout):
        nonlocal waited
        began = time.perf_counter()
        wait(work, *timeout)
        waited += time.perf_counter() - began

    dist.Work.wait = timed
    data = load(registry.defaults("dataset", "mnist") | {"root": os.environ.get("LBP_DATA", "data"), "val_size": 0, "train_size": args.steps * args.batch}, seed=0,
                batch_size=args.batch)
    network = build_arch(registry.defaults("arch", "mlp") | {"widths": [args.width] * args.depth}, data.task)
    half = math.ceil(args.depth / 2)
    module = torch.nn.Sequential(*list(network.blocks.values())[half * rank:][:half + rank])
    optimizer = torch.optim.Adam(module.parameters(), 1e-3, fused=True)
    stage = pipelining.PipelineStage(module, rank, 2, torch.device("cpu"))
    plan = getattr(pipelining, f"Schedule{schedule}")(stage, parts, lambda out, y: torch.nn.functional.cross_entropy(out, y))
    began, losses = 0.0, []
    for number, (x, y) in enumerate(chain(*(data.train.batches(epoch) for epoch in range(1 + WARM)))):
        if number == WARM:
            dist.barrier()
            waited, began = 0.0, time.perf_counter()
        if number == WARM + args.steps:
            break
        losses.clear()
        if rank == 0:
            plan.step(x)
        else:
            plan.step(target=y, losses=losses)
        optimizer.step()
        optimizer.zero_grad()
    took = time.perf_counter() - began
    print(json.dumps({"took": took, "busy": took - waited, "loss": float(sum(losses)) / parts if losses else None}), flush=True)
    dist.barrier()
    os._exit(0)


def used() -> tuple[float, float]:
    """Seconds of processor time that the whole machine, and our finished children, have used."""
    user, nice, system = map(int, Path("/proc/stat").read_text().split()[1:4])
    return (user + nice + system) / os.sysconf("SC_CLK_TCK"), sum(os.times()[:4])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rules", nargs="*", default=RULES)
    parser.add_argument("--depth", type=int, default=8, help="hidden blocks")
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--as", nargs=2, dest="part", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        return as_a_stage(args.part[0], int(args.part[1]), args)
    cut = f"launch.stages=[{math.ceil(args.depth / 2)},{args.depth // 2 + 1}]"
    sides = {}
    for rule in args.rules:
        words, name = rule.split("+"), rule.split("+")[0].removeprefix("algo=")
        sides[f"{name}, one process"] = lambda words=words: lbp([*words, "launch.ranks=1"], args)
        sides[f"{name}, launch=pipeline"] = lambda words=words: lbp([*words, "launch=pipeline", cut], args)
    sides["bp, one process"] = lambda: lbp(["algo=bp", "launch.ranks=1"], args)
    for schedule in ("GPipe", "1F1B"):
        for parts in (4, 8):
            sides[f"bp, {schedule}, {parts} microbatches"] = lambda schedule=schedule, parts=parts: backprop(schedule, parts, args)
    found: dict[str, list[dict]] = {name: [] for name in sides}
    shares: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(args.rounds):
        for name, side in sides.items():
            before = used()
            found[name].append(side())
            after = used()
            shares[name].append(max(0.0, 1 - (after[1] - before[1]) / (after[0] - before[0])))
    print(f"{'':34} {'idle: stage 1':>13} {'stage 2':>8} {'both':>6} {'(from - to)':>15} {'samples/s':>10} {'of one':>7} {'others':>7}")
    one = 1.0
    for name, rounds in found.items():
        speed = statistics.median(r["samples_per_s"] for r in rounds)
        one = speed if name.endswith("one process") else one
        idle = [[stage["idle_share"] for stage in r["stages"]] for r in rounds if "stages" in r]
        both = sorted(map(statistics.mean, idle))
        text = (f"{statistics.median(i[0] for i in idle):13.1%} {statistics.median(i[1] for i in idle):8.1%} {statistics.median(both):6.1%} "
                f"{f'{both[0]:.1%} - {both[-1]:.1%}':>15}" if idle else " " * 45)
        print(f"{name:34} {text} {speed:10,.0f} {speed / one:7.2f} {statistics.median(shares[name]):7.2f}", flush=True)


if __name__ == "__main__":
    main()
