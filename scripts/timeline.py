"""The critical path of a training step when every block has a device of its own, from the measured times of its pieces.

    python scripts/timeline.py [--depth 8] [--width 1024] [--batch 256] [--rounds 20] [--json FILE] [--trace FILE] [--plot FILE] [RULE ...]

A RULE is overrides joined by +: algo=dni+algo.schedule=streaming; bp, dni, cdni and what they are options of. Measured, on the CPU:
the time of a whole step of each rule, in turns, without a profiler; and, by torch.profiler in the real rule's step, each of its pieces:
forward and backward pass of a block, synthesizer, what the synthesizer learns, update. Computed from the pieces: when each would run
if it waited for nothing but its block's device and what it truly needs (handing tensors over costs nothing; one step, not a
pipeline of several). Under bp a block is updated as soon as its gradient is there, under schedule=joint at the end of the batch.
A second process on the machine makes ratios worthless.
"""

import argparse
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

RULES = ("algo=bp", "algo=dni", "algo=dni+algo.schedule=streaming", "algo=cdni+algo.schedule=streaming",
         "algo=cdni+algo.schedule=streaming+algo.inputs=true")
NETWORK = ("forward", "backward", "update")       # the other kinds of pieces are synthesizers' and input models'


class Piece(NamedTuple):
    """A kind of work for a block (`regression`: a synthesizer learns), on whose device it runs, and the pieces it needs."""

    kind: str
    block: str
    device: str
    needs: tuple[tuple[str, str], ...]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rules", nargs="*", default=RULES)
    parser.add_argument("--depth", type=int, default=8, help="hidden blocks")
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=20, help="steps of each rule, in turns; half as many are profiled")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--trace", type=Path, help="what torch.profiler saw, for chrome://tracing or ui.perfetto.dev")
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    rules = ["algo=bp", *(rule for rule in args.rules if rule != "algo=bp")]
    found = measure(rules, args.depth, args.width, args.batch, args.rounds, args.trace)
    for rule, values in found.items():
        report(rule, values)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    if args.plot:
        from lbp.report.plots import timelines

        timelines(args.plot, {f"{short(rule)}: {values['path_ms']:.0f} ms, {values['path_of_bp']:.2f} of bp's": [
            (piece["device"], piece["kind"], piece["start_ms"], piece["end_ms"]) for piece in values["pieces"]]
            for rule, values in found.items()}, "ms, every block on a device of its own")


# ---- what is measured


def measure(rules: Sequence[str], depth: int, width: int, batch: int, rounds: int, trace: Path | None = None) -> dict[str, dict]:
    """{rule: what is known of its step}; the first rule is the one that others are compared with."""
    from torch.profiler import ProfilerActivity, profile

    steps = {rule: Step(rule, depth, width, batch) for rule in rules}
    seconds: dict[str, list[float]] = defaultdict(list)
    for round_ in range(rounds + 2):        # the first makes the optimizers' state
        for rule, step in steps.items():
            start = time.perf_counter()
            step.run()
            if round_ >= 2:
                seconds[rule].append(time.perf_counter() - start)
    profiled = max(3, rounds // 2)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(profiled):
            for step in steps.values():
                step.run_in_pieces()
    if trace:
        profiler.export_chrome_trace(str(trace))
    spans: dict[str, list[float]] = defaultdict(list)
    for event in profiler.events():
        spans[event.name].append(event.time_range.elapsed_us() / 1000)
    found = {}
    for rule, step in steps.items():
        mine = {name: values for name, values in spans.items() if name.startswith(f"{step.name}: ")}
        whole = sum(mine.pop(f"{step.name}: step"))
        times = step.times({name: min(values) for name, values in mine.items()})       # what else the machine does only adds
        run = schedule(step.pieces(), times)
        found[rule] = {
            "step_ms": 1000 * statistics.median(seconds[rule]),
            "step_of_bp": statistics.median(a / b for a, b in zip(seconds[rule], seconds[rules[0]])),
            "work_ms": sum(times.values()), "covered": sum(map(sum, mine.values())) / whole,
            "models_share": sum(ms for (kind, _), ms in times.items() if kind not in NETWORK) / sum(times.values()),
            "forward_ms": max(run["forward", block][1] for block in step.blocks), "path_ms": max(end for _, end in run.values()),
            "pieces": [{**piece._asdict(), "start_ms": run[piece[:2]][0], "end_ms": run[piece[:2]][1]} for piece in step.pieces()],
            "blocks": [{"block": block, "forward_starts_ms": run["forward", block][0], "update_done_ms": run["update", block][1],
                        "waits_for": waits(step, "update", block),
                        "synthesizer_waits_for": waits(step, "regression", block) if ("regression", block) in run else None}
                       for block in step.blocks]}
        found[rule]["path_of_bp"] = found[rule]["path_ms"] / found[rules[0]]["path_ms"]
    return found


class Step:
    """A step of the real rule on real images; also with a span for the profiler around every piece of it.

    Backward passes are seen by tensor hooks: a block's begins when the gradient reaches its output, and is over when those of its
    parameters and of its input are there."""

    def __init__(self, rule: str, depth: int, width: int, batch: int):
        from lbp.config import compose
        from lbp.training.setup import build

        config = compose([*rule.split("+"), "dataset=mnist5k", f"arch.widths=[{','.join([str(width)] * depth)}]",
                          f"trainer.batch_size={batch}", "trainer.device=cpu"])
        experiment = build(config.values)
        self.name, self.rule, self.apply = short(rule), experiment.rule.train(), experiment.apply
        self.dni = hasattr(self.rule, "synthesizers")
        if not self.dni and config.values["algo"]["name"] != "bp" or self.dni and (self.rule.mixing or self.rule.context == "loss"):
            raise SystemExit(f"{rule}: what needs what is known here of bp, and of dni and cdni where nothing of the true gradient or "
                             "loss is handed down; use algo.mixing=0, algo.context=none or label")
        self.x, self.y = next(iter(experiment.data.train.batches(0)))
        self.apply.count = experiment.data.task.count(self.y)
        self.learn = self.rule.phases()[-1].learn
        self.blocks = list(self.rule.network.blocks)
        self.owners = {id(p): owner(name) for name, p in self.rule.named_parameters()}
        self.updates: dict[str, dict[tuple[str, str], float]] = {}      # span -> whose it is, by shares
        self.said: dict[int, str] = {}
        self.open = None

    def run(self) -> None:
        self.apply.finish(self.learn(self.x, self.y, self.apply).loss.sum())

    # ---- with spans

    def run_in_pieces(self) -> None:
        from torch.profiler import record_function

        from lbp.algos.synthetic import dni

        network, regress, hooks = self.rule.network, dni.regress, []
        models = {"synthesizer": getattr(self.rule, "synthesizers", {}), "input model": getattr(self.rule, "inputs", {})}
        wrapped = [*network.blocks.values(), *(model for kind in models.values() for model in kind.values())]
        for name, block in network.blocks.items():
            block.forward = self.block_in_spans(name, block.forward, block, hooks)
        for kind, found in models.items():
            for cut, model in found.items():
                model.forward = self.model_in_span(kind, cut, model.forward)
        dni.regress = self.regress_in_span(regress)
        try:
            with record_function(f"{self.name}: step"):
                learned = self.learn(self.x, self.y, self.update)
                self.close()
                for group in self.apply.groups:
                    self.update(group, learned.loss.sum())
                self.apply.finish(learned.loss.sum())
        finally:
            dni.regress = regress
            for module in wrapped:
                del module.forward
            for hook in hooks:
                hook.remove()
            self.said.clear()

    def begin(self, kind: str, block: str) -> None:
        from torch.profiler import record_function

        self.close()
        self.open = (kind, block), record_function(f"{self.name}: {kind} {block}")
        self.open[1].__enter__()

    def close(self, piece: tuple[str, str] | None = None) -> None:
        """Ends the open span, or only if it is that piece's."""
        if self.open and piece in (None, self.open[0]):
            self.open[1].__exit__(None, None, None)
            self.open = None

    def block_in_spans(self, name, forward, block, hooks):
        def run(h):
            self.begin("forward", name)
            out = forward(h)
            self.close()
            waiting = [*block.parameters(), *[h] * h.requires_grad]
            left = [len(waiting)]

            def there(_):
                left[0] -= 1
                if not left[0]:
                    self.close(("backward", name))

            for t in waiting:
                hooks.append(t.register_post_accumulate_grad_hook(there) if t.is_leaf else t.register_hook(there))
            if name == self.blocks[-1]:
                self.begin("backward", name)        # with the loss
            else:
                hooks.append(out.register_hook(lambda _: self.begin("backward", name)))
            return out
        return run

    def model_in_span(self, kind, cut, forward):
        def run(*args):
            self.begin(kind, cut)
            out = forward(*args)
            self.close()
            self.said[id(out)] = cut
            return out
        return run

    def regress_in_span(self, regress):
        def run(said, true, what):
            self.begin("regression" if what == "synthetic" else "input regression", self.said[id(said)])
            values = regress(said, true, what)
            self.close()
            return values
        return run

    def update(self, group, loss=None) -> None:
        """`apply`, in a span: one step of an optimizer, for whatever has a gradient."""
        moving = defaultdict(int)
        for p in self.apply.groups[group]:
            if p.grad is not None:
                moving[self.owners[id(p)]] += p.numel()
        if moving:
            of = f"of {min(moving)[1]}" if len(moving) < len(self.blocks) - 1 else "of all"
            self.begin(f"{group} update", of)
            self.updates[f"{self.name}: {group} update {of}"] = {piece: n / sum(moving.values()) for piece, n in moving.items()}
        self.apply(group, loss)
        self.close()

    def times(self, spans: Mapping[str, float]) -> dict[tuple[str, str], float]:
        """{(kind, block): ms} of every piece. An update of several at once is theirs by their parameters."""
        times = {}
        for piece in self.pieces():
            kind, block = piece[:2]
            times[kind, block] = sum(spans[span] * shares.get((kind, block), 0) for span, shares in self.updates.items()) + spans.get(
                f"{self.name}: {kind} {block}", 0)
            if not times[kind, block]:
                raise RuntimeError(f"{self.name}: no time was measured of {kind} {block}")
        return times

    # ---- what needs what

    def pieces(self) -> list[Piece]:
        """What a step consists of, each device's in the order in which it runs them."""
        segments = self.rule.segments if self.dni else [self.blocks]
        streaming = self.dni and self.rule.schedule == "streaming"
        inputs = self.dni and bool(self.rule.inputs)
        backward = [Piece("backward", b, b, (("forward", b), *([("backward", above)] if above else [("synthesizer", b)] * (b != self.blocks[-1]))))
                    for segment in segments for b, above in zip(segment, [*segment[1:], ""])]
        learned = [("backward", b) for b in self.blocks]
        cuts = {segment[-1]: after[0] for segment, after in pairwise(segments)}
        regressions = [Piece("regression", cut, cut, (("synthesizer", cut), ("backward", above))) for cut, above in cuts.items()]
        learned += [r[:2] for r in regressions]
        models = [Piece("input model", cut, above, ()) for cut, above in cuts.items() if inputs]
        taught = [Piece("input regression", cut, above, (("input model", cut), ("forward", cut))) for cut, above in cuts.items() if inputs]
        learned += [t[:2] for t in taught]
        from_below = {above: ("input model", cut) if inputs else ("forward", cut) for cut, above in cuts.items()}
        forward = [Piece("forward", b, b, (from_below.get(b, ("forward", self.blocks[i - 1])),) if i else ()) for i, b in enumerate(self.blocks)]
        barrier = learned if self.dni and not streaming else []
        return [*models, *forward, *(Piece("synthesizer", cut, cut, (("forward", cut),)) for cut in cuts), *backward,
                *(Piece("update", b, b, (("backward", b), *barrier)) for b in self.blocks if streaming or not self.dni), *taught, *regressions,
                *(Piece("update", b, b, (("backward", b), *barrier)) for b in self.blocks if self.dni and not streaming),
                *(Piece("synthesizer's update", cut, cut, (("regression", cut), *barrier)) for cut in cuts),
                *(Piece("input model's update", cut, above, (("input regression", cut), *barrier)) for cut, above in cuts.items() if inputs)]


def owner(name: str) -> tuple[str, str]:
    """The update that moves a parameter of this name."""
    part, *rest = name.split(".")
    return {"network": ("update", rest[1]), "synthesizers": ("synthesizer's update", rest[0]), "inputs": ("input model's update", rest[0])}[part]


def short(rule: str) -> str:
    return rule.replace("algo.", "").replace("algo=", "").replace("schedule=", "").replace("inputs=true", "synthetic inputs").replace("+", ", ")


# ---- what is computed from it


def schedule(pieces: Sequence[Piece], times: Mapping[tuple[str, str], float]) -> dict[tuple[str, str], tuple[float, float]]:
    """{piece: (start, end)}: each begins when its device has done what stands before it there, and what it needs is there."""
    found: dict[tuple[str, str], tuple[float, float]] = {}
    by_name = {piece[:2]: piece for piece in pieces}
    before, last = {}, {}
    for piece in pieces:
        before[piece[:2]] = last.get(piece.device)
        last[piece.device] = piece[:2]

    def end(name: tuple[str, str]) -> float:
        if name not in found:
            waited = [end(other) for other in (*by_name[name].needs, *[before[name]] * (before[name] is not None))]
            start = max(waited, default=0.0)
            found[name] = start, start + times[name]
        return found[name][1]

    for name in by_name:
        end(name)
    return found


def waits(step: Step, kind: str, block: str) -> list[str]:
    """The other blocks' devices on which something must be done before this piece, above the block."""
    by_name = {piece[:2]: piece for piece in step.pieces()}
    needed, todo = set(), [(kind, block)]
    while todo:
        name = todo.pop()
        if name not in needed:
            needed.add(name)
            todo += by_name[name].needs
    devices = {by_name[name].device for name in needed}
    return [b for b in step.blocks[step.blocks.index(block) + 1:] if b in devices]


def report(rule: str, values: Mapping) -> None:
    def above(blocks: Sequence[str] | None) -> str:
        return "-" if blocks is None else "nothing above" if not blocks else blocks[0] if len(blocks) == 1 else f"{blocks[0]} to {blocks[-1]}"

    print(f"\n{short(rule)}: a step takes {values['step_ms']:.1f} ms, {values['step_of_bp']:.2f} of bp's; its pieces, each at its fastest, {values['work_ms']:.1f} ms "
          f"({100 * values['covered']:.0f} % of a profiled step is in pieces), {100 * values['models_share']:.0f} % of them for synthesizers and input models")
    print(f"critical path with a device for every block: {values['path_ms']:.1f} ms, {values['path_of_bp']:.2f} of bp's; "
          f"the forward pass ends at {values['forward_ms']:.1f} ms")
    print(f"{'block':8}{'forward starts':>16}{'update done':>14}{'of forward pass':>17}  {'waits for':16}{'its synthesizer learns after':30}")
    for line in values["blocks"]:
        print(f"{line['block']:8}{line['forward_starts_ms']:16.2f}{line['update_done_ms']:14.2f}{line['update_done_ms'] / values['forward_ms']:17.2f}  "
              f"{above(line['waits_for']):16}{above(line['synthesizer_waits_for']):30}")


if __name__ == "__main__":
    main()
