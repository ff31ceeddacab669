"""lbp from Python: whole runs, and single rules on a user's own network in his own loop."""

from __future__ import annotations

import re
from typing import Any

from lbp.algos.rule import LearningRule
from lbp.archs.network import Network
from lbp.config import compose
from lbp.datasets.data import Arrays
from lbp.datasets.task import Task
from lbp.errors import ConfigError
from lbp.launch.one import Result, run as run_config
from lbp.training.setup import build_algo


def run(*overrides: str, dataset: tuple | None = None) -> Result:
    """One run, as `lbp train` with these overrides; returns its summary, folder, network and rule.

    `dataset=(x, y)` or `(x, y, x_test, y_test)`: arrays or tensors in place of a dataset by name, x (N, features) or
    (N, channels, height, width), y (N,) integers for classes or floats for regression. W&B is off unless asked for.
    Raises what lbp.errors names.
    """
    typed = list(overrides)
    if dataset is not None and any(text.split("=")[0] == "dataset" for text in typed):
        raise ConfigError("dataset=: given twice, by name and as arrays; give one")
    config = compose(["dataset=files", "dataset.file=arrays", *typed] if dataset is not None else typed)
    if not any(re.match(r"logger\.wandb\.mode=|logger(\.wandb)?=.*\bmode\s*:", text) for text in typed):
        config.values["logger"]["wandb"]["mode"] = "disabled"
    return run_config(config, None if dataset is None else Arrays.of(*dataset))


def rule(name: str, network: Network, task: Task, **knobs: Any) -> LearningRule:
    """The learning rule `name` on `network`; knobs that are left out have the defaults of its YAML.

    Train with it by `rule.learn(x, y, apply)` and optimizers over `rule.groups()`; `lbp.Apply` is a ready `apply`.
    Raises ConfigError for an unknown rule or knob, Refused for a network that it cannot train.
    """
    defaults = compose([f"algo={name}"]).values["algo"]
    unknown = set(knobs) - (known := set(defaults) - {"name"})
    if unknown:
        raise ConfigError(f"algo={name} has no knob {', '.join(sorted(unknown))}; it has: {', '.join(sorted(known)) or 'none'}")
    return build_algo(defaults | knobs, network, task)
