"""Blocks with rules of their own: each moved by its rule alone, as that rule would move it; and who cannot be one among others."""

import re
from pathlib import Path

import pytest
import torch
from conftest import (ALGOS, Log, arrays, batch, build, changed, configuration, defaults, dense, learned, make_task, prefers, step, stepper,
                      tensors, train)
from torch import nn

from lbp import registry
from lbp.algos.rule import Rng
from lbp.archs.network import ACTIVATIONS
from lbp.errors import ConfigError, Refused
from lbp.training import loop
from lbp.training.setup import build as build_experiment

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/mixed.md"


def spec(name):
    """A rule in its form that can be one among others, where it has one."""
    return {"name": name, "schedule": "joint"} if "schedule" in defaults("algo", name) else name


def mixed(network=None, task=None, **knobs):
    return build("mixed", network or dense(), task or make_task(), **knobs)


def refusal(name, block="fc1"):
    """Why a rule cannot have this block among others; None where it can."""
    try:
        mixed(dense(activation=ACTIVATIONS[prefers(name).get("arch.activation", "relu")]), blocks={block: spec(name)}, rest="bp")
    except Refused as refused:
        return str(refused)


MEMBERS = [name for name in ALGOS if name != "mixed" and refusal(name) is None]
OF_THE_HEAD = [name for name in ALGOS if name != "mixed" and refusal(name, "head") is None]


# ---- each block moves as its own rule says

@pytest.mark.parametrize("norm", [None, nn.BatchNorm1d], ids=["plain", "batch norm"])
@pytest.mark.parametrize("name", ["bp", "fa", "dfa", "local", "sigprop", "usf", "shallow", "kp"])
def test_one_rule_for_all_blocks_is_that_rule(name, norm):
    """To the bit, over steps of an optimizer: weights, and the statistics of norms."""
    ends = []
    for option, knobs in ((name, {}), ("mixed", {"blocks": {}, "rest": name})):
        torch.manual_seed(4)
        network = dense(norm=norm)
        torch.manual_seed(5)
        rule = build(option, network, make_task(), **knobs)
        torch.manual_seed(6)
        train(rule, [batch(make_task())] * 3, stepper(rule, "adam"))    # seeded: the same batch
        ends.append(tensors(network))
    assert all(torch.equal(ends[0][n], ends[1][n]) for n in ends[0])


def test_every_block_gets_its_own_rules_update_and_no_other():
    network, task = dense(), make_task()
    rule = mixed(network, task, blocks={"fc1": "sigprop", "fc3": {"name": "fa", "scale": 2}, "head": "bp"}, rest="dfa")
    x, y = batch(task)
    found = learned(rule, x, y)[1]
    owners = {"sigprop": {"fc1"}, "dfa": {"fc2"}, "fa": {"fc3"}, "bp": {"head"}}
    assert {part.name: part.blocks for part in rule.parts} == owners
    for part in rule.parts:
        network.zero_grad()
        part.rule.learn(x, y, lambda group, loss=None: None)
        for n, p in network.named_parameters():
            if n.split(".")[1] in part.blocks:
                assert torch.equal(found.pop(f"network.{n}"), p.grad)
    assert not any(n.startswith("network.") for n in found) and found     # the rest is sigprop's own


def test_statistics_of_a_norm_move_once_however_many_rules_look():
    networks, samples = [], batch(make_task())
    for option, knobs in (("bp", {}), ("mixed", {"blocks": {"fc1": "local", "fc2": "fa", "head": "dfa"}, "rest": "bp"})):
        torch.manual_seed(4)
        networks.append(dense(norm=nn.BatchNorm1d))
        rule = build(option, networks[-1], make_task(), **knobs)
        learned(rule, *samples)
    for (n, a), b in zip(networks[0].named_buffers(), networks[1].buffers(), strict=True):
        torch.testing.assert_close(a, b, msg=lambda m: f"{n}: {m}")


def test_what_a_rule_writes_in_place_stays_within_its_blocks():
    network, task = dense(), make_task()
    rule = mixed(network, task, blocks={"fc2": {"name": "kp", "decay": .25}}, rest="shallow")
    before = tensors(network)
    learned(rule, *batch(task))
    assert set(changed(before, network)) == {"blocks.fc2.linear.weight"}
    assert torch.equal(network.blocks["fc2"].linear.weight, .75 * before["blocks.fc2.linear.weight"])


def test_the_network_is_saved_once():
    rule = mixed(blocks={"fc1": "sigprop", "fc2": "ldrl"}, rest="dfa")
    keys = list(rule.state_dict())
    assert sorted(key for key in keys if "network." in key) == sorted(f"network.{key}" for key in rule.network.state_dict())
    assert any(key.startswith("rules.") for key in keys)


def test_a_frozen_blocks_parameters_are_in_no_group():
    rule = mixed(blocks={"fc1": "shallow"}, rest="dfa")
    listed = {id(p) for parameters in rule.groups().values() for p in parameters}
    assert {n.split(".")[1] for n, p in rule.network.named_parameters() if id(p) in listed} == {"fc2", "fc3", "head"}


def test_facts_are_those_of_the_rules_that_have_hidden_blocks():
    assert not mixed(blocks={"head": "bp"}, rest="dfa").facts.weight_transport
    facts = mixed(blocks={"fc1": "predsim", "fc2": "bp"}, rest="dfa").facts
    assert facts.weight_transport and facts.backward_locked and facts.batch_coupled
    assert not mixed(blocks={"fc1": "local", "fc2": "local", "fc3": "local"}, rest="bp").facts.update_locked


# ---- a least-squares head, last

def test_a_closed_form_head_is_solved_in_a_last_phase(tmp_path):
    """By a squared loss under a task of cross entropy; until then the rest trains it."""
    values = configuration("mixed", arch__widths=[9, 8], algo__blocks={"head": {"name": "elm", "ridge": .5}}, trainer__epochs=2)
    experiment = build_experiment(values, arrays((1, 5, 5)))
    rule, network = experiment.rule, experiment.network
    assert [phase.name for phase in rule.phases()] == ["train", "elm: fit"]
    before = tensors(network)
    learned(rule, *next(iter(experiment.data.train.batches(0))))
    assert not changed(before, network)
    loop.train(experiment, Log(), tmp_path)
    x, y = experiment.data.train.x, experiment.data.train.y
    with torch.no_grad():
        phi = x
        for block in network.hidden.values():
            phi = block(phi)
    phi = torch.cat([phi.double(), torch.ones(len(phi), 1, dtype=torch.float64)], 1)
    penalty = torch.eye(phi.shape[1], dtype=torch.float64) * .5
    penalty[-1, -1] = 0
    expected = torch.linalg.solve(phi.T @ phi + penalty, phi.T @ experiment.data.task.onehot(y).double())
    torch.testing.assert_close(network.head.weight.double(), expected[:-1].T, rtol=1e-3, atol=1e-5)
    hidden = {n for n in changed(before, network) if ".head." not in n}
    assert hidden    # dfa trained these


# ---- who can stand beside whom

@pytest.mark.parametrize("first", MEMBERS)
@pytest.mark.parametrize("among", [("bp", "dfa", "sigprop"), pytest.param(MEMBERS, marks=pytest.mark.slow)], ids=["few", "all"])
def test_every_allowed_pair_trains_two_steps(first, among):
    for second in among:
        try:
            rule = mixed(dense(activation=nn.Tanh), blocks={"fc2": spec(first)}, rest=second)
        except Refused as refused:
            assert "rest=" in str(refused) and registry.entry("algo", registry.option("algo", second).name).facts["closed_form"]
            continue
        task, before = make_task(), tensors(rule.network)
        apply = stepper(rule, "adam")
        for phase in rule.phases():
            for _ in range(2):
                if not phase.fit:
                    step(rule, apply, *batch(task), phase.learn)
        assert changed(before, rule.network) and all(t.isfinite().all() for t in tensors(rule).values()), (first, second)


@pytest.mark.parametrize("name", [name for name, file in registry.options("algo").items() if name != "mixed" and file.is_relative_to(ROOT / "conf")])
def test_the_page_says_who_can_be_one_among_others(name):
    row = re.search(rf"^\| `{name}`[^|]*\|([^|]*)\|", PAGE.read_text(), re.M)
    assert row, f"{PAGE.name} has no row for {name}"
    said, why = row[1].strip(), refusal(name)
    if name in MEMBERS:
        assert said.startswith("any block")
    elif name in OF_THE_HEAD:
        assert said.startswith("the head")
    else:
        assert said.startswith("no:") and [word in said for word in ("stages", "own way", "whole networks", "every layer")] == [
            word in why for word in ("stages", "way of its own", "whole networks", "every layer")]


@pytest.mark.parametrize("knobs, message", [
    ({"blocks": {"fc9": "bp"}}, r"algo.blocks.fc9: the network has no such block; it has: fc1, fc2, fc3, head"),
    ({"blocks": {"fc1": "sigprob"}}, r"algo=sigprob: no such algo.*did you mean sigprop"),
    ({"blocks": {"fc1": {"name": "dfa", "scael": 2}}}, r"algo=dfa has no knob scael.*did you mean scale"),
    ({"blocks": {"fc1": {"name": "dfa", "scale": -2}}}, r"dfa.scale=-2: must be"),
    ({"blocks": {"fc1": {"scale": 2}}}, r"algo.blocks.fc1=\{scale: 2\}: must be a rule"),
    ({"blocks": {"fc1": {"name": "dni", "norm": "batch"}}}, r"dni.norm=batch: dni.synthesizer=linear would ignore it; set dni.synthesizer=mlp or conv"),
    ({"blocks": {"fc1": 3}}, r"algo.blocks.fc1=3: must be a rule"),
    ({"blocks": {"fc1": {"name": "local", "schedule": "streaming"}}}, r"local for block fc1 steps blocks in the middle.*schedule: joint"),
    ({"blocks": {"fc1": "mixed"}}, r"cannot be a part of it"),
    ({"blocks": {"fc1": "elm"}}, r"elm for block fc1 solves block head too"),
    ({"blocks": {}, "rest": "elm"}, r"algo.rest=elm is closed-form"),
], ids=str)
def test_refusals(knobs, message):
    with pytest.raises(ConfigError, match=message):
        mixed(**{"rest": "dfa", **knobs})


@pytest.mark.parametrize("name", ["wm", "kp", "ldrl", "local"])
def test_trying_a_rule_out_leaves_no_trace(name):
    """Neither in the network nor, but for its first draws, in the rule."""
    network = dense(norm=None if name == "ldrl" else nn.BatchNorm1d)
    before = tensors(network)
    torch.manual_seed(3)
    alone = build(name, network, make_task())
    torch.manual_seed(3)
    rule = mixed(network, blocks={"fc1": name}, rest=name).rules[0]
    assert not changed(before, network) and all(p.grad is None for p in (*network.parameters(), *rule.parameters()))
    own = {n: t for n, t in tensors(alone).items() if not n.startswith("network.")}
    assert own and all(torch.equal(t, tensors(rule)[n]) for n, t in own.items())
    assert all(torch.equal(a.get_extra_state(), b.get_extra_state()) for a, b in zip(alone.modules(), rule.modules()) if isinstance(a, Rng))
