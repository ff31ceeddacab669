"""Memory of a training step over depth: what lives at its peak beside parameters, gradients and optimizer state.

    python scripts/bench_memory.py [--depths 4,8,16,32,64] [--width 1024] [--batch 1024] [--plot memory.png] [RULE ...]

A RULE is overrides joined by +: algo=local+algo.schedule=streaming. Each step runs in a process of its own. Counted are the
bytes of all tensors that a step makes, as they come and go, so that the figure is the same on every machine.
"""

import argparse
import json
import subprocess
import sys
import weakref
from pathlib import Path

RULES = ("algo=bp", "algo=dfa", "algo=local+algo.schedule=joint", "algo=local+algo.schedule=streaming",
         "algo=sigprop+algo.schedule=streaming")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rules", nargs="*", default=RULES)
    parser.add_argument("--depths", default="4,8,16,32,64")
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    depths = [int(depth) for depth in args.depths.split(",")]
    if args.one:
        print(json.dumps(peak(args.rules[0].split("+"), depths[0], args.width, args.batch)))
        return
    found = {}
    print(f"MiB beside parameters, gradients and optimizer state, {args.width} units, batch {args.batch}")
    print(f"{'blocks':44}" + "".join(f"{depth:>8}" for depth in depths))
    for rule in args.rules:
        found[rule] = []
        for depth in depths:
            command = [sys.executable, __file__, rule, "--one", "--depths", str(depth), "--width", str(args.width), "--batch", str(args.batch)]
            found[rule].append(json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout) / 2**20)
        print(f"{rule:44}" + "".join(f"{value:8.0f}" for value in found[rule]), flush=True)
    if args.rules[0] in found:
        print(f"of the first at {depths[-1]}: " + ", ".join(f"{rule} {values[-1] / found[args.rules[0]][-1]:.3f}" for rule, values in found.items()))
    if args.plot:
        from lbp.report.plots import curves

        curves(args.plot, {rule.replace("algo=", "").replace("algo.schedule=", "").replace("+", ", "): (depths, values)
                           for rule, values in found.items()}, "hidden blocks", "MiB at the peak of a step", log=(True, True))


def peak(overrides: list[str], depth: int, width: int, batch: int) -> int:
    """Bytes that the tensors of a step take at its peak, without gradients of parameters."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    from lbp.config import compose
    from lbp.training.setup import build

    config = compose([*overrides, "dataset=mnist5k", f"arch.widths=[{','.join([str(width)] * depth)}]", f"trainer.batch_size={batch}",
                      "trainer.device=cpu"])
    experiment = build(config.values)
    rule, apply = experiment.rule.train(), experiment.apply
    x, y = next(iter(experiment.data.train.batches(0)))
    apply.count = experiment.data.task.count(y)
    learn = rule.phases()[-1].learn
    parameters = list(rule.parameters())

    class Live(TorchDispatchMode):
        """Every storage that an operation makes, until it is freed."""

        def __init__(self):
            super().__init__()
            self.sizes: dict[int, int] = {}
            self.peak = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(tensor, torch.Tensor):
                    storage = tensor.untyped_storage()
                    key = storage.data_ptr()
                    if key and key not in self.sizes and key not in known:
                        self.sizes[key] = storage.nbytes()
                        weakref.finalize(storage, self.sizes.pop, key, None)
            gradients = {p.grad.untyped_storage().data_ptr() for p in parameters if p.grad is not None}
            self.peak = max(self.peak, sum(size for key, size in self.sizes.items() if key not in gradients))
            return out

    def step() -> None:
        apply.finish(learn(x, y, apply).loss.sum())

    step()  # makes the optimizers' state
    known = {t.untyped_storage().data_ptr() for t in (x, y, *rule.buffers(), *parameters)}
    known |= {t.untyped_storage().data_ptr() for o in apply.optimizers.values() for state in o.state.values()
              for t in state.values() if isinstance(t, torch.Tensor)}
    live = Live()
    with live:
        step()
    return live.peak


if __name__ == "__main__":
    main()
