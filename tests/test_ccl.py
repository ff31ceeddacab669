"""Counter-current learning: the two networks against a hand computation in float64, and what does not cross a layer."""

import numpy as np
import pytest
import torch
from conftest import CLASSES, arrays, batch, build, configuration, defaults, dense, learned, make_task, regression, step, stepper, tensors
from torch import nn

from lbp.archs.network import Network
from lbp.errors import Refused
from lbp.training.setup import build_algo, build_arch
from lbp.training.setup import build as build_experiment


def numbers(network):
    layers = [getattr(block, "linear", block) for block in network.blocks.values()]
    return [(layer.weight.detach().numpy(), layer.bias.detach().numpy()) for layer in layers]


@pytest.mark.parametrize("match_input", [False, True])
def test_both_networks_equal_their_equations(match_input):
    """Each pair of layers has the loss (128 / units) x the mean over classes of (A S^T - Y)^2, a sum over samples; its derivative in each
    network ends at that layer's weights; the head has the cross entropy's."""
    network, task = dense((6, 7, 5, 8)), make_task()
    rule = build("ccl", network, task, scale=.5, match_input=match_input)
    x, y = batch(task)
    found = learned(rule, x, y)[1]
    layers, down = numbers(network), [layer.weights.weight.detach().numpy() for layer in rule.downwards]
    assert [g.shape for g in down] == [(8, CLASSES), (5, 8), (7, 5), (6, 7)][: None if match_input else -1]
    Y, h = np.eye(CLASSES)[y.numpy()], [x.numpy()]
    for w, b in layers[:-1]:
        h.append(np.tanh(h[-1] @ w.T + b))
    signals, inputs = [], [np.eye(CLASSES)]      # S of fc3, fc2, fc1 (and the inputs), and what each comes from
    for i, g in enumerate(down):
        signals.append(inputs[-1] @ g.T if i == 3 else np.tanh(inputs[-1] @ g.T))
        inputs.append(signals[-1])
    for level, (A, S) in enumerate(zip(h, reversed(signals if match_input else [*signals, None]))):
        if S is None:
            continue
        error = 256 * .5 / A.shape[1] * 2 / CLASSES * (A @ S.T - Y)
        if level:
            delta = error @ S * (1 - A**2)
            np.testing.assert_allclose(found[f"network.blocks.fc{level}.linear.weight"], delta.T @ h[level - 1], rtol=1e-10)
            np.testing.assert_allclose(found[f"network.blocks.fc{level}.linear.bias"], delta.sum(0), rtol=1e-10)
        place = 3 - level
        delta = error.T @ A * (1 - S**2 if level else 1)
        np.testing.assert_allclose(found[f"downwards.{place}.weights.weight"], delta.T @ inputs[place], rtol=1e-10)
    w, b = layers[-1]
    out = h[-1] @ w.T + b
    p = np.exp(out - out.max(1, keepdims=True))
    e = p / p.sum(1, keepdims=True) - Y
    np.testing.assert_allclose(found["network.blocks.head.weight"], e.T @ h[-1], rtol=1e-10)
    np.testing.assert_allclose(found["network.blocks.head.bias"], e.sum(0), rtol=1e-10)
    assert len(found) == 8 + len(down)


def mixed_network():
    """Convolutions with pools, strides, groups and an even kernel, then dense layers."""
    return Network.of(nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.Tanh(), nn.MaxPool2d(2), nn.Conv2d(4, 6, 3, 2, 1, groups=2), nn.Tanh(),
                                    nn.Conv2d(6, 4, 2), nn.Tanh(), nn.Flatten(), nn.Linear(16, 5), nn.Tanh(), nn.Linear(5, CLASSES)),
                      (2, 11, 12)).double()


@pytest.mark.parametrize("match_input", [False, True])
def test_signals_have_the_shapes_of_the_blocks_opposite(match_input):
    network = mixed_network()
    rule = build("ccl", network, make_task(network.in_shape), match_input=match_input)
    sizes = [int(np.prod(shape)) for shape in [network.in_shape, *network.shapes.values()]][not match_input : -1]
    assert [tuple(s.shape) for s in rule._signals()] == [(CLASSES, size) for size in reversed(sizes)]
    x, y = batch(rule.task)
    found = learned(rule, x, y)[1]
    assert set(found) == {n for n, _ in rule.named_parameters()} and all(g.any() for g in found.values())


@pytest.mark.parametrize("make", [dense, mixed_network])
def test_no_gradient_crosses_a_block(make):
    """What stands in other blocks reaches a block's gradient through its input and its signal alone: those below and the feedback layers above."""
    network = make()
    rule = build("ccl", network, make_task(network.in_shape))
    x, y = batch(rule.task)
    before, names = learned(rule, x, y)[1], list(network.blocks)
    for i, name in enumerate(names):
        state = tensors(rule)
        with torch.no_grad():
            for p in network.blocks[name].parameters():
                p.normal_()
        after = learned(rule, x, y)[1]
        kept = [n for n in before if any(f".{below}." in n for below in names[:i])]
        # The feedback layer opposite to a block learns from that block's values, those further up (the first in the list) not.
        kept += [f"downwards.{place}.weights.weight" for place in range(len(names) - 1) if len(names) - 2 - place < i]
        assert all(torch.equal(after[n], before[n]) for n in kept)
        rule.load_state_dict({**rule.state_dict(), **state})
    with torch.no_grad():      # and the last feedback layer, which answers opposite to the first block, teaches that alone
        rule.downwards[-1].weights.weight.normal_()
    after = learned(rule, x, y)[1]
    assert {n for n in before if not torch.equal(after[n], before[n])} == {
        n for n in before if f".{names[0]}." in n or n == f"downwards.{len(names) - 2}.weights.weight"}


def test_the_loss_of_a_pair_vanishes_where_they_agree():
    from lbp.algos.targets.ccl import matching_loss
    onehot = torch.eye(3, dtype=torch.float64)
    assert not matching_loss(onehot, onehot, 10, .5).any()
    torch.testing.assert_close(matching_loss(torch.zeros_like(onehot), onehot, 10, .5), torch.full((3,), 12.8 / 3, dtype=torch.float64))


def test_the_forward_network_alone_predicts():
    network, task = dense(), make_task()
    rule = build("ccl", network, task)
    x, y = batch(task)
    apply = stepper(rule, lr=.1)
    for _ in range(3):
        step(rule, apply, x, y)
    assert torch.equal(rule.predict(x), network(x))


def test_each_net_is_clipped_by_itself():
    """The groups forward and feedback are those of the two networks, so trainer.clip is the paper's bound on each."""
    rule = build("ccl", dense(), make_task())
    assert {key: len(parameters) for key, parameters in rule.groups().items()} == {"forward": 8, "feedback": 3}


def test_refusals():
    with pytest.raises(Refused, match="algo=ccl needs classes"):
        build("ccl", dense(outputs=2), regression())
    task = make_task((3, 16, 16), dtype=torch.float32)
    with pytest.raises(Refused, match="algo=ccl .*block .*use arch=mlp"):
        build_algo(defaults("algo", "ccl"), build_arch(defaults("arch", "resnet20") | {"width": 2}, task), task)


def test_its_preferences_are_the_papers_optimizer():
    values = configuration("ccl")
    assert values["optimizer"]["name"] == "sgd" and values["optimizer"]["lr"] == 1.0 and values["trainer"]["clip"] == 1.0
    assert build_experiment(values, arrays((1, 5, 5))).apply.clip == 1.0
