"""From a configuration to the objects of a run: data, network, rule, optimizers."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lbp import ranks, registry
from lbp.algos import ops
from lbp.algos.rule import GROUPS, LearningRule
from lbp.archs.network import Network, hard_inside
from lbp.datasets.data import Arrays, Data, load
from lbp.datasets.task import Task
from lbp.errors import ConfigError, Refused
from lbp.training import checkpoint, stages
from lbp.training.apply import Apply
from lbp.training.environment import Environment, prepare, seed_all
from lbp.training.optim import biases_of, make_optimizers

SEQUENTIAL = "arch=rnn, arch=lstm, arch=gru or arch=transformer"


@dataclass
class Experiment:
    """Everything that one run trains with. `values`: the resolved configuration."""

    values: dict[str, Any]
    environment: Environment
    data: Data
    network: Network
    rule: LearningRule
    apply: Apply
    stages: stages.Stages | None = None     # that the ranks are, under launch=pipeline


def build(values: dict[str, Any], arrays: Arrays | None = None, begun: bool = False) -> Experiment:
    """Builds a run's objects; raises ConfigError, Refused or DataError. `begun`: the weights will come from a checkpoint of
    the run itself, so that run.init_from is not asked."""
    seed, trainer = values["seed"], values["trainer"]
    environment = prepare(trainer, seed)
    if arrays is None:
        refuse_early(values)
    data = load(values["dataset"], seed=seed, batch_size=trainer["batch_size"], device=environment.device,
                dtype=environment.dtype, arrays=arrays, shuffle=trainer["shuffle"])
    if data.train.batch_size < ranks.world() and not stages.asked(values):
        raise ConfigError(f"launch.ranks={ranks.world()}: a batch of {data.train.batch_size} samples has not one for each rank; "
                          "use fewer ranks or a larger trainer.batch_size")
    if trainer["patience"] and not data.val:
        raise ConfigError(f"trainer.patience={trainer['patience']}: there is no validation to stop by (dataset.val_size=0); set dataset.val_size, "
                          "or leave it out")
    network = build_arch(values["arch"], data.task, seed).to(environment.device, environment.dtype)
    if values["run"]["init_from"] and not begun:
        init_from(network, Path(values["run"]["init_from"]))
    rule = build_algo(values["algo"], network, data.task, seed)
    groups = {name: parameters for name, parameters in rule.groups().items() if parameters}
    for group in ("feedback", "heads"):
        if values["optimizer"][group] and group not in groups:
            raise ConfigError(f"optimizer.{group}={values['optimizer'][group]}: algo={values['algo']['name']} has no parameters in "
                              f"a group {group!r} (it has: {', '.join(groups) or 'none'}); leave it out")
    if stages.asked(values):
        stages.refuse(values, rule, environment.device)
    if trainer["compile"]:
        compile_blocks(network)
    return Experiment(values, environment, data, network, rule,
                      Apply(groups, make_optimizers(values["optimizer"], groups, biases_of(rule)), trainer["clip"]))


def refuse_early(values: dict[str, Any]) -> None:
    """Raises Refused, before data is loaded or fetched, where the rule takes this arch on no kind of data."""
    first, loss = None, values["dataset"].get("loss", "auto")
    numbers = [(kind, shape, {}) for kind in ("classification", "regression") for shape in ((3, 32, 32), (1, 28, 28), (64,))]
    symbols = [("classification", (16,), {"symbols": 10, "sequence": sequence}) for sequence in (False, True)]
    for kind, shape, of in numbers + symbols:
        try:
            task = Task(kind, shape, 10, 10 if kind == "classification" else None,
                        loss if loss != "auto" else "mse" if kind == "regression" else "cross_entropy", **of)
            network = build_arch(values["arch"], task)
        except ConfigError:
            continue  # not this arch's data
        try:
            build_algo(values["algo"], network, task)
            return
        except Refused as refused:
            first = first or refused
    if first and ops.MLP in str(first) and takes_symbols(values["arch"]):    # the dataset may have them, which an mlp does not take
        first = Refused(f"{str(first).rpartition(';')[0]}; {ops.ANY_ARCH}")
    if first:
        raise first


def takes_symbols(arch: dict[str, Any]) -> bool:
    try:
        return bool(build_arch(arch, Task("classification", (16,), 10, 10, symbols=10)))
    except ConfigError:
        return False


def build_arch(config: dict[str, Any], task: Task, seed: int = 0) -> Network:
    """The network that the arch group describes, on the CPU in fp32; its weights depend on `seed` alone."""
    seed_all(seed, "network")
    try:
        network = registry.load("arch", config["name"])(task, **_knobs(config))
    except Refused as refused:      # of symbols, too, an arch only says that they are no images
        if not task.symbols or "arch=mlp" not in str(refused):
            raise
        raise Refused(f"{str(refused).rpartition(';')[0]}; use {SEQUENTIAL}") from None
    embeds = any(isinstance(m, nn.Embedding) for m in next(iter(network.blocks.values())).modules())
    if task.symbols and not embeds or task.sequence and list(network.shapes.values())[-1][:-1] != task.in_shape[:1]:
        asks = f"asks for an answer at each of {task.in_shape[0]} tokens" if task.sequence else "has symbols as inputs"
        raise Refused(f"arch={config['name']} takes numbers and answers once a sample, and the dataset {asks}; use {SEQUENTIAL}")
    return network


def build_algo(config: dict[str, Any], network: Network, task: Task, seed: int = 0) -> LearningRule:
    """The rule that the algo group describes; what it draws depends on `seed` alone."""
    seed_all(seed, "rule")
    rule = registry.load("algo", config["name"])(network, task, **_knobs(config))
    unknown = set(rule.groups()) - set(GROUPS)
    if unknown:
        raise ValueError(f"algo={config['name']} names groups {sorted(unknown)}; allowed: {', '.join(GROUPS)}")
    for name, block in network.hidden.items():
        if rule.facts.needs_derivative and (found := hard_inside(block)):
            word = type(found).__name__.lower()
            raise Refused(f"algo={config['name']} needs the derivatives of blocks, and block {name} has {type(found).__name__}, which has none; "
                          f"use arch.activation={word}_ste (straight through; an ensemble has arch.aggregate=.._ste too), or tanh with "
                          f"arch.transmit={word} for what passes between blocks, or a rule that needs none")
    return rule


def init_from(network: Network, path: Path) -> None:
    """A warm start: the weights and norm statistics that a run's checkpoint has for its network, and nothing else of it."""
    state = {key.removeprefix("network."): value for key, value in checkpoint.load(path)["rule"].items() if key.startswith("network.")}
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise ConfigError(f"run.init_from={path}: its network is another one than this arch builds for this dataset: "
                          f"{str(error).splitlines()[1].strip()}") from None


def compile_blocks(network: Network) -> None:
    """Compiles each block for itself, which leaves the rule and the names of the state alone."""
    if not torch.cuda.is_available() and not any(map(shutil.which, ("cc", "gcc", "g++", "clang", "clang++", "cl"))):
        raise Refused("trainer.compile=true: torch.compile needs a C++ compiler on a CPU and none is on the PATH; "
                      "install one (Debian: apt install g++) or leave trainer.compile out")
    # Blocks of one class share their code; after 8 variants of it torch would run the rest as they are, without a word.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 8 * len(network.blocks))
    for block in network.blocks.values():
        block.compile()


def _knobs(config: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key != "name"}
