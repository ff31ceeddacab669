"""Optimizers and schedules, from their names in the configuration to torch's own classes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from math import cos, pi

import torch
from torch.nn import Parameter

OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD, "nesterov": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW,
    "rmsprop": torch.optim.RMSprop,
}


def make_optimizers(config: Mapping, groups: Mapping[str, list[Parameter]]) -> dict[str, torch.optim.Optimizer]:
    """One optimizer for each non-empty group; `feedback` and `heads` override the settings of theirs.

    Fused kernels where torch has them for the parameters' device and dtype.
    """
    common = {key: value for key, value in config.items() if key not in ("name", "feedback", "heads")}
    return {group: make_optimizer(config["name"], {**common, **config.get(group, {})}, parameters)
            for group, parameters in groups.items() if parameters}


def make_optimizer(name: str, settings: dict, parameters: list[Parameter]) -> torch.optim.Optimizer:
    cls = OPTIMIZERS[name]
    settings = {key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()}
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
