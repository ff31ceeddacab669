"""Small networks and tasks, and rules built by name with the defaults of their YAML. Everything in float64."""

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
# An installed package with a rule of its own: every test over the registries takes it in.
PLUGIN = str(Path(__file__).parent / "plugin")
sys.path.append(PLUGIN)
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), PLUGIN)))

import pytest
import torch
import yaml
from torch import nn

from lbp import registry
from lbp.archs.network import Layer, Network
from lbp.archs.rnn import Last, Recurrent
from lbp.datasets.data import Arrays
from lbp.datasets.task import Task
from lbp.registry import defaults
from lbp.training.apply import Apply
from lbp.training.optim import make_optimizers

torch.set_num_threads(1)
ALGOS = list(registry.options("algo"))
ARCHS = list(registry.options("arch"))
CLASSES = 4
PATIENCE = 300.0    # seconds after which another process is said to hang: no busy machine takes so long


# Files whose tests wait for other processes take longest: first, so that no worker is left alone with one at the end.
FIRST = ("test_docs.py", "test_ranks.py", "test_readme.py", "test_logs.py")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: FIRST.index(item.path.name) if item.path.name in FIRST else len(FIRST))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """In an empty folder, in a terminal of any width, and without the plugins that a command named when it is over."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("COLUMNS", raising=False)
    yield
    registry.use(())


# ---- configuration

def prefers(algo):
    """What the algo's YAML chooses for other groups: {"dataset.loss": "mse", ...}."""
    return {key: yaml.safe_load(value) for key, value in registry.option("algo", algo).prefers.items()}


# Rules for recurrent networks alone: their YAMLs choose such an arch.
RECURRENT = [name for name in ALGOS if "arch" in prefers(name)]


def configuration(algo="bp", arch="mlp", optimizer="adam", schedule="constant", **overrides):
    """A resolved configuration; overrides are written group__knob=value, algo's preferences apply."""
    wishes = prefers(algo)
    optimizer, schedule, arch = wishes.pop("optimizer", optimizer), wishes.pop("schedule", schedule), wishes.pop("arch", arch)
    values = {"seed": 0, "plugins": [], "run": {"dir": None, "name": None, "init_from": None}, "dataset": {"name": "arrays", "val_size": 0},
              "arch": defaults("arch", arch), "algo": defaults("algo", algo), "optimizer": defaults("optimizer", optimizer),
              "schedule": defaults("schedule", schedule), "trainer": defaults("trainer", "default"),
              "metrics": defaults("metrics", "default")}
    values["trainer"] |= {"device": "cpu", "epochs": 1, "batch_size": 8}
    for key, value in (wishes | {key.replace("__", "."): value for key, value in overrides.items()}).items():
        *above, last = key.split(".")
        place = values
        for part in above:
            place = place[part]
        if above != ["arch"] or last in place:     # a preference for a knob that this arch lacks
            place[last] = value
    return values


class Log(list):
    """A logger that keeps what is written."""

    write = list.append
    length = list.__len__

    def sync(self):
        pass

    def follow(self, *_):
        pass


# ---- tasks, networks, rules

def make_task(in_shape=(6,), outputs=CLASSES, loss="cross_entropy", dtype=torch.float64, sequence=False):
    return Task("classification", tuple(in_shape), outputs, outputs, loss, 0.0, dtype, sequence=sequence)


def regression(in_shape=(6,), outputs=2, dtype=torch.float64):
    return Task("regression", tuple(in_shape), outputs, None, "mse", 0.0, dtype)


def task_of(algo, in_shape=(6,), dtype=torch.float64):
    """A classification task with the loss that the algo prefers."""
    return make_task(in_shape, loss=prefers(algo).get("dataset.loss", "cross_entropy"), dtype=dtype)


def dense(sizes=(6, 7, 5, 8), outputs=CLASSES, activation=nn.Tanh, norm=None, dropout=0.0):
    """A network of plain dense Layers fc1, fc2, ... with biases that are not zero."""
    blocks = {}
    for i, (a, b) in enumerate(zip(sizes, sizes[1:]), 1):
        blocks[f"fc{i}"] = Layer(nn.Linear(a, b), norm(b) if norm else None, activation(), dropout)
    return Network({**blocks, "head": nn.Linear(sizes[-1], outputs)}, sizes[:1]).double()


def unrolled(sizes=(2, 8, 6), outputs=CLASSES, cell="lstm", dropout=0.0, steps=6, each=False):
    """A network of recurrent blocks, called as dense's, over sequences of vectors; an answer at the last token, or at each."""
    blocks = {}
    for i, (a, b) in enumerate(zip(sizes, sizes[1:]), 1):
        blocks[f"fc{i}"] = Recurrent(a, b, cell, dropout, read=None if each or i < len(sizes) - 1 else Last())
    return Network({**blocks, "head": nn.Linear(sizes[-1], outputs)}, (steps, sizes[0])).double()


def build(option, network, task, **knobs):
    """The rule of an algo option with its YAML's defaults, some overridden, on the network's device and dtype."""
    values = defaults("algo", option)
    return registry.load("algo", values.pop("name"))(network, task, **{**values, **knobs})


def batch(task, n=8):
    x = torch.randn(n, *task.in_shape, dtype=task.dtype)
    if task.classes is None:
        return x, torch.randn(n, task.outputs, dtype=task.dtype)
    return x, torch.arange(n) % task.classes


def arrays(in_shape, n=24, classes=CLASSES):
    """A made-up data set: images or vectors, with a test split."""
    x, y = torch.randn(n, *in_shape), torch.arange(n) % classes
    return Arrays(x, y, x[:8], y[:8], "image" if len(in_shape) == 3 else "vector", [str(c) for c in range(classes)])


# ---- learning

def learned(rule, x, y):
    """(Learned, {parameter name: what the rule left in .grad, all applies together}); nothing is stepped."""
    found, names = {}, {id(p): name for name, p in rule.named_parameters()}
    groups = rule.groups()

    def collect(group, loss=None):
        for p in groups[group]:
            if p.grad is not None:
                name = names[id(p)]
                found[name] = found[name] + p.grad if name in found else p.grad.clone()
                p.grad = None

    result = rule.learn(x, y, collect)
    for group in groups:
        collect(group)
    return result, found


def stepper(rule, optimizer="sgd", clip=None, **settings):
    """Apply with real optimizers over the rule's groups."""
    config = {**defaults("optimizer", optimizer), **settings}
    groups = {name: parameters for name, parameters in rule.groups().items() if parameters}
    return Apply(groups, make_optimizers(config, groups), clip)


def step(rule, apply, x, y, learn=None):
    """One batch, as the trainer does it."""
    apply.count = rule.task.count(y)
    result = (learn or rule.learn)(x, y, apply)
    apply.finish(result.loss)
    return result


def train(rule, batches, apply=None):
    """Each phase once over the batches, as the trainer does it."""
    apply = apply or stepper(rule)
    results = []
    for phase in rule.phases():
        rule.train()
        if phase.fit:
            phase.fit(lambda rows: iter(batches))
        else:
            results += [step(rule, apply, x, y, phase.learn) for x, y in batches]
    return results


def solves(rule):
    """Whether the rule learns by `fit` alone."""
    return all(phase.fit for phase in rule.phases())


def tensors(module):
    """Parameters and buffers, copied."""
    return {name: t.detach().clone() for name, t in (*module.named_parameters(), *module.named_buffers())}


def changed(before, module):
    """Names of parameters and buffers that are no longer what they were, to the bit."""
    return {name for name, t in tensors(module).items() if not torch.equal(t, before[name])}
