"""Every rule learns real digits, beats chance, and by five points the control whose hidden layers stay random.

A rule whose YAML has a line `# control: elm; REASON` is set beside that control, random features of the same width with a
solved read-out, in place of the first. One with a line `# solves: EXPERIMENT; REASON` has to reach 95 % there, instead of digits.
"""

import re
from functools import cache

import pytest

import lbp
from lbp import registry

SETTING = ("dataset=mnist5k", "metrics.every=200", "logger.console=off")
LONG, SHORT = 10, 3     # epochs; what a rule has not learned in the short run it may learn in the long one


@cache
def summary(algo: str, folder: str, epochs: int = LONG) -> dict:
    solves = registry.entry("algo", registry.option("algo", algo).name).facts["closed_form"]
    steps = () if solves else (f"trainer.epochs={epochs}", "trainer.batch_size=32")
    return lbp.run(*SETTING, f"algo={algo}", *steps, f"run.dir={folder}/{algo}-{epochs}").summary


def reaches(algo: str, accuracy: float, folder: str) -> bool:
    return any(summary(algo, folder, epochs)["test_accuracy"] >= accuracy for epochs in (SHORT, LONG))


def control(algo: str) -> str | None:
    """The control that the algo's YAML names, where it names one."""
    found = re.search(r"^# control: (\w+); \S", registry.option("algo", algo).path.read_text("utf-8"), re.MULTILINE)
    return found and found.group(1)


def solves(algo: str) -> str | None:
    """The experiment that the algo's YAML names, where it names one."""
    found = re.search(r"^# solves: (\w+); \S", registry.option("algo", algo).path.read_text("utf-8"), re.MULTILINE)
    return found and found.group(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(tmp_path_factory.mktemp("runs"))


@pytest.mark.parametrize("algo", [a for a in registry.options("algo") if a != "shallow" and not control(a) and not solves(a)])
def test_it_learns_and_beats_frozen_hidden_layers(algo, folder):
    control = summary("shallow", folder)["test_accuracy"]
    assert 0.5 < control < 0.85  # well above chance: the control is one
    assert reaches(algo, control + 0.05, folder)


@pytest.mark.parametrize("algo", [a for a in registry.options("algo") if control(a)])
def test_it_learns_more_than_random_features_of_the_same_width(algo, folder):
    of = summary(control(algo), folder)["test_accuracy"]
    assert of > 0.7 and reaches(algo, of + 1e-9, folder)


@pytest.mark.parametrize("algo", [a for a in registry.options("algo") if solves(a)])
def test_it_solves_what_it_is_for(algo, folder):
    assert lbp.run(f"experiment={solves(algo)}", f"algo={algo}", "logger.console=off", f"run.dir={folder}/{algo}").summary["test_accuracy"] >= 0.95


@pytest.mark.parametrize("algo", ["fa", "dfa", "kp", "local", "ldrl"])
def test_hidden_layers_come_to_follow_backprop(algo, folder):
    layers = summary(algo, folder, SHORT)["layers"]
    assert all(layers[name]["alignment_deg"] < 85 for name in ("fc1", "fc2")), layers
