"""Which rule trains which architecture, found by trying."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from lbp import registry
from lbp.config import compose
from lbp.datasets.task import Task
from lbp.errors import Refused
from lbp.training.apply import Apply
from lbp.training.setup import build_algo, build_arch


def matrix(algos: Iterable[str] | None = None) -> dict[tuple[str, str], str | None]:
    """{(algo, arch): None if it learns a batch of two images, else why it is refused}, of these algos or all."""
    return {(algo, arch): _refusal(algo, arch) for algo in algos or registry.options("algo") for arch in registry.options("arch")}


def _refusal(algo: str, arch: str) -> str | None:
    # What a rule takes does not hang on the width: where that is a factor, a slim network answers sooner.
    width = registry.option("arch", arch).knobs.get("width")
    slim = ["arch.width=0.125"] if width and width.spec.startswith("float") else []
    values = compose([f"algo={algo}", f"arch={arch}", *slim]).values
    loss = values["dataset"]["loss"]
    task = Task("classification", (3, 32, 32), 10, 10, "cross_entropy" if loss == "auto" else loss)
    x, y = torch.rand(4, *task.in_shape), torch.arange(4)
    network = build_arch(values["arch"], task)
    try:
        rule = build_algo(values["algo"], network, task)
    except Refused as refused:
        return str(refused)
    groups = {name: parameters for name, parameters in rule.groups().items() if parameters}
    apply = Apply(groups, {name: torch.optim.SGD(parameters, lr=1e-3) for name, parameters in groups.items()})
    apply.count = len(x)
    for phase in rule.phases():
        if phase.fit:
            phase.fit(lambda rows=None: iter([(x, y)]))
        else:
            apply.finish(phase.learn(x, y, apply).loss)
    return None


def lines(algos: Iterable[str] | None = None) -> list[str]:
    """The table for the terminal, and each reason once."""
    found = matrix(algos)
    algos, archs = (list(dict.fromkeys(names)) for names in zip(*found))
    width = max(map(len, algos))
    rows = [" " * width + "  " + "  ".join(archs)]
    for algo in algos:
        marks = ("-" if found[algo, arch] else "yes" for arch in archs)
        rows.append(f"{algo:<{width}}  " + "  ".join(f"{mark:<{len(arch)}}" for mark, arch in zip(marks, archs)))
    reasons = {f"{algo} with {arch}: {why}" for (algo, arch), why in found.items() if why}
    return [*(row.rstrip() for row in rows), "", *sorted(reasons)]
