"""Optimizers and schedules, from their names in the configuration to torch's own classes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Set
from math import cos, pi

import torch
from torch.nn import Module, Parameter

OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD, "nesterov": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW,
    "rmsprop": torch.optim.RMSprop,
}


def biases_of(module: Module) -> Set[Parameter]:
    """Parameters named `bias` or `bias_...`, of norms too; gains, which have one dimension as well, are none."""
    return {p for name, p in module.named_parameters() if name.rpartition(".")[2].startswith("bias")}


def make_optimizers(config: Mapping, groups: Mapping[str, list[Parameter]],
                    biases: Set[Parameter] = frozenset()) -> dict[str, torch.optim.Optimizer]:
    """One optimizer for each non-empty group; `feedback` and `heads` override the settings of theirs. `biases`: the
    parameters whose learning rate is `bias_lr_factor` times the others'.

    Fused kernels where torch has them for the parameters' device and dtype.
    """
    common = {key: value for key, value in config.items() if key not in ("name", "feedback", "heads")}
    return {group: make_optimizer(config["name"], {**common, **config.get(group, {})}, parameters, biases)
            for group, parameters in groups.items() if parameters}


def make_optimizer(name: str, settings: dict, parameters: list[Parameter], biases: Set[Parameter]) -> torch.optim.Optimizer:
    cls = OPTIMIZERS[name]
    settings = {key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()}
    factor = settings.pop("bias_lr_factor", 1.0)
    if factor != 1:
        parts = [p for p in parameters if p not in biases], [p for p in parameters if p in biases]
        parameters = [{"params": part, "lr": settings["lr"] * f} for part, f in zip(parts, (1, factor)) if part]
    if name == "nesterov":
        settings["nesterov"] = True
    if "fused" in inspect.signature(cls).parameters:
        settings["fused"] = True
    return cls(parameters, **settings)


def schedule(config: Mapping, steps_per_epoch: int, total_steps: int) -> Callable[[int], float]:
    """The factor on every learning rate as a function of the steps taken; epochs may be fractions."""
    warmup = config["warmup_epochs"] * steps_per_epoch

    def factor(step: int) -> float:
        epoch = step / steps_per_epoch + 1e-9  # so that 3 * 0.1 epochs are reached at 0.3
        ramp = min(1.0, (step + 1) / warmup) if warmup else 1.0
        if config["name"] == "step":
            return ramp * config["gamma"] ** int(epoch // config["step_epochs"])
        if config["name"] == "multistep":
            return ramp * config["gamma"] ** sum(epoch >= milestone for milestone in config["milestones"])
        if config["name"] == "cosine":
            progress = min(1.0, max(0.0, step - warmup) / max(1, total_steps - warmup))
            return ramp * (config["min_factor"] + (1 - config["min_factor"]) * (1 + cos(pi * progress)) / 2)
        return ramp

    return factor
