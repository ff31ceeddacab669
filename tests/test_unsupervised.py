"""Random and unsupervised features with a linear read-out: cafo, softhebb and scff against their equations, in float64."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import CLASSES, batch, build, changed, dense, learned, make_task, step, stepper, task_of, tensors, train
from torch import nn

from lbp.algos.forward.scff import goodness, self_contrastive_loss, standard
from lbp.algos.hebbian.softhebb import batch_statistics, hebbian_change, norms, soft_winner_take_all
from lbp.archs.network import Layer, Network
from lbp.errors import Refused


def convolutional(norm=None):
    """Two convolutions with pools, of which the second is strided and grouped."""
    blocks = {"conv1": Layer(nn.Conv2d(2, 4, 3, padding=1), norm and norm(4), nn.ReLU(), pool=nn.MaxPool2d(2)),
              "conv2": Layer(nn.Conv2d(4, 6, 3, 2, 1, groups=2), None, nn.ReLU(), pool=nn.Flatten()), "head": nn.Linear(24, CLASSES)}
    return Network(blocks, (2, 8, 8)).double()


NETWORKS = {"dense": lambda: dense(activation=nn.ReLU), "convolutional": convolutional}


@pytest.fixture(params=NETWORKS)
def network(request):
    return NETWORKS[request.param]()


# ---- what they share

@pytest.mark.parametrize("name", ["cafo_gd", "softhebb", "scff"])
def test_no_gradient_crosses_a_block(name, network):
    """Each block's loss, and the read-out's, leaves every other block's weights alone: those above, redrawn, change nothing below."""
    task = task_of(name, network.in_shape)
    rule, (x, y) = build(name, network, task), batch(task)
    *_, last, head = network.blocks
    noise = [m.get_extra_state() for m in rule.modules() if hasattr(m, "generator")]

    def found():
        for m, state in zip([m for m in rule.modules() if hasattr(m, "generator")], noise):
            m.set_extra_state(state)
        torch.manual_seed(1)
        return learned(rule, x, y)[1]

    first = found()
    with torch.no_grad():
        for block in (last, head):
            for p in network.blocks[block].parameters():
                p.normal_()
    second = found()
    below = [n for n in first if not any(f".{block}." in n for block in (last, head)) and (n.startswith("network") or name == "cafo_gd")]
    assert below
    for n in below:
        torch.testing.assert_close(second[n], first[n], rtol=0, atol=0)


@pytest.mark.parametrize("name", ["softhebb", "scff"])
def test_features_come_first_and_then_the_read_out_alone(name, network):
    task = task_of(name, network.in_shape)
    rule, (x, y) = build(name, network, task), batch(task)
    *features, readout = rule.phases()
    assert features and readout.name == "readout" and readout.epochs is None
    apply, hidden = stepper(rule, lr=.01), {n for n in tensors(rule) if any(f"blocks.{block}." in n for block in network.hidden)}
    moved = set()
    for phase in features:
        before = tensors(rule)
        step(rule, apply, x, y, phase.learn)
        now = changed(before, rule)
        moved |= now & hidden
        assert not any(".head." in n or n.startswith("heads.") for n in now)
    assert {n for n in hidden if n.endswith("weight")} <= moved
    before = tensors(rule)
    step(rule, apply, x, y, readout.learn)
    now = changed(before, rule)
    assert "network.blocks.head.weight" in now and not now & hidden


@pytest.mark.parametrize("name", ["softhebb", "scff"])
def test_labels_enter_the_read_out_alone(name, network):
    task = task_of(name, network.in_shape)
    rule, (x, y) = build(name, network, task), batch(task)
    noise = [(m, m.get_extra_state()) for m in rule.modules() if hasattr(m, "generator")]
    first = learned(rule, x, y)[1]
    for m, state in noise:
        m.set_extra_state(state)
    second = learned(rule, x, torch.zeros_like(y))[1]
    for n in first:
        assert torch.equal(first[n], second[n]) == (".head." not in n and not n.startswith("heads.")), n


@pytest.mark.parametrize("name", ["softhebb", "scff"])
@pytest.mark.parametrize("more, said", [({"norm": nn.BatchNorm1d}, "arch.norm=none"), ({"dropout": .3}, "arch.dropout=0")])
def test_norms_and_dropout_are_refused_with_the_remedy(name, more, said):
    with pytest.raises(Refused, match=f"algo={name} .*block fc1.*{said}"):
        build(name, dense(**more), make_task())


@pytest.mark.parametrize("name, knob", [("softhebb", "power"), ("scff", "penalty")])
def test_an_empty_list_is_refused(name, knob):
    with pytest.raises(Refused, match=rf"algo.{knob}=\[\]: needs a value at least"):
        build(name, dense(), make_task(), **{knob: []})


# ---- cafo

def features_of(network, name, x):
    for each, block in network.hidden.items():
        x = block(x)
        if each == name:
            return x.flatten(1).detach().numpy()


@pytest.mark.parametrize("ridge", [1e-7, 1e-2])
def test_cafo_solves_each_block_by_least_squares_and_averages_the_predictions(network, ridge):
    task = task_of("cafo", network.in_shape)
    rule, (x, y) = build("cafo", network, task, ridge=ridge), batch(task, 300)
    before = tensors(network)
    train(rule, [(x[:100], y[:100]), (x[100:], y[100:])])
    assert {n.split(".")[1] for n in changed(before, network)} == {"head"}
    said = 0.0
    for name in network.hidden:
        phi = features_of(network, name, x)
        phi, target = np.hstack([phi, np.ones((300, 1))]), np.eye(CLASSES)[y]
        width = phi.shape[1] - 1
        scale = math.sqrt(ridge * (phi[:, :-1] ** 2).sum() / width)
        penalty = np.hstack([scale * np.eye(width), np.zeros((width, 1))])     # rows of their own for it, none for the bias
        w = np.linalg.lstsq(np.vstack([phi, penalty]), np.vstack([target, np.zeros((width, CLASSES))]), rcond=None)[0]
        said = said + phi @ w / len(network.hidden)
    rule.eval()
    np.testing.assert_allclose(rule.predict(x).detach().numpy(), said, atol=1e-8)


def test_cafo_gives_batch_norms_the_statistics_of_the_data():
    network = convolutional(nn.BatchNorm2d)
    task = task_of("cafo", network.in_shape)
    rule, (x, y) = build("cafo", network, task), batch(task, 40)
    train(rule, [(x, y)])
    a, found = network.blocks["conv1"].linear(x), network.blocks["conv1"].norm
    torch.testing.assert_close(found.running_mean, a.mean((0, 2, 3)))
    torch.testing.assert_close(found.running_var, a.var((0, 2, 3)))
    assert found.momentum == .1


def test_cafo_by_gradient_descent_is_softmax_regression_on_each_block(network):
    task = task_of("cafo_gd", network.in_shape)
    rule, (x, y) = build("cafo_gd", network, task), batch(task)
    result, found = learned(rule, x, y)
    assert not any("blocks." in n and ".head." not in n for n in found)
    probabilities = 0.0
    for name in network.hidden:
        phi = features_of(network, name, x)
        linear = rule.heads[name][-1] if name in rule.heads else network.head
        logits = phi @ linear.weight.detach().numpy().T + linear.bias.detach().numpy()
        p = np.exp(logits - logits.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        probabilities = probabilities + p / len(network.hidden)
        of = "network.blocks.head" if name not in rule.heads else next(n[:-7] for n in found if n.startswith(f"heads.{name}.") and n.endswith("weight"))
        np.testing.assert_allclose(found[f"{of}.weight"].numpy(), (p - np.eye(CLASSES)[y]).T @ phi, atol=1e-10)
    np.testing.assert_allclose(result.out.exp().numpy(), probabilities, atol=1e-12)


# ---- softhebb

def test_the_winner_is_hebbian_and_the_others_are_anti_hebbian():
    u = torch.tensor([[1.0, 3.0, 2.0], [0.0, -1.0, -4.0]]).double()
    p = np.exp(2 * u.numpy())
    p /= p.sum(1, keepdims=True)
    signs = np.array([[-1, 1, -1], [1, -1, -1]])
    np.testing.assert_allclose(soft_winner_take_all(u, 2.0, -1).numpy(), signs * p, rtol=1e-12)
    np.testing.assert_allclose(soft_winner_take_all(u.T, 2.0, 0).numpy(), (signs * p).T, rtol=1e-12)


def test_softhebbs_change_by_hand():
    """Row by row: y (x - u w), with u = w x; a bias shifts the competition alone."""
    layer, x = nn.Linear(5, 4).double(), torch.randn(7, 5).double()
    u = layer(x)
    y = soft_winner_take_all(u.detach(), 1.5, -1)
    expected = torch.zeros_like(layer.weight)
    for n in range(7):
        for i in range(4):
            w = layer.weight[i].detach()
            expected[i] += y[n, i] * (x[n] - (w @ x[n]) * w)
    torch.testing.assert_close(hebbian_change(u, y, layer.weight, layer.bias, -1), expected, rtol=1e-12, atol=1e-12)


def test_a_convolutions_change_is_a_dense_layers_on_its_patches():
    conv, x = nn.Conv2d(2, 4, 3, stride=2, padding=1, bias=False).double(), torch.randn(3, 2, 7, 7).double()
    u = conv(x)
    found = hebbian_change(u, soft_winner_take_all(u.detach(), 1.0, 1), conv.weight, None, 1)
    patches = F.unfold(x, 3, stride=2, padding=1).transpose(1, 2).reshape(-1, 18)
    flat = conv.weight.detach().flatten(1).requires_grad_()
    u = patches @ flat.T
    expected = hebbian_change(u, soft_winner_take_all(u.detach(), 1.0, -1), flat, None, -1)
    torch.testing.assert_close(found.flatten(1), expected, rtol=1e-10, atol=1e-12)


def test_softhebbs_update_is_scaled_by_its_greatest_value_and_by_how_far_norms_are_from_1():
    network = dense((6, 5), activation=nn.ReLU)
    rule = build("softhebb", network, make_task(), rates=[0.5], rate_power=0.5)
    x, y = batch(rule.task)
    layer = network.blocks["fc1"].linear
    u = layer(x)
    change = hebbian_change(u, soft_winner_take_all(u.detach(), 1.0, -1), layer.weight, layer.bias, -1)
    rate = 0.5 * (layer.weight.detach().norm(dim=1) - 1).abs().sqrt()
    expected = -len(x) * rate[:, None] * change / change.abs().max()     # apply divides by the batch's size
    torch.testing.assert_close(learned(rule, x, y)[1]["network.blocks.fc1.linear.weight"], expected, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("begin", [3.0, 25.0])
def test_norms_of_weights_converge_to_1(begin):
    """Also from the great norms that they are drawn with; lesser ones may fall, since a unit that never wins is pushed away from its inputs."""
    network = dense((6, 5), activation=nn.ReLU)
    rule = build("softhebb", network, make_task())
    weight = network.blocks["fc1"].linear.weight
    with torch.no_grad():
        weight.mul_(begin / norms(weight)[:, None])
    apply = stepper(rule, lr=.05)
    for _ in range(1500):
        step(rule, apply, *batch(rule.task, 64), rule.learn_features)
    assert (norms(weight) - 1).abs().max() < 0.02


def test_softhebb_standardises_maps_over_samples_and_positions():
    network = convolutional()
    rule = build("softhebb", network, make_task(network.in_shape))
    x, y = batch(rule.task)
    mean, var = batch_statistics(x, 1)
    torch.testing.assert_close(mean, x.mean((0, 2, 3)))
    torch.testing.assert_close(var, x.var((0, 2, 3), correction=0))
    for _ in range(200):     # the running statistics come to those of the batch, and so do predictions
        rule.learn_features(x, y, None)
    torch.testing.assert_close(rule.mean_conv1, mean)
    torch.testing.assert_close(rule.var_conv1, var)
    out = rule.learn_readout(x, y, None).out
    rule.eval()
    torch.testing.assert_close(rule.predict(x).detach(), out, rtol=1e-5, atol=1e-7)


# ---- scff

def test_scffs_loss_by_hand():
    positive, negative = torch.tensor([[2.0, 1.0]]).double(), torch.tensor([[0.5, 3.0]]).double()
    by_hand = (math.log1p(math.exp(4 - 2)) + math.log1p(math.exp(4 - 1)) + math.log1p(math.exp(.5 - 1)) + math.log1p(math.exp(3 - 1))) / 2
    torch.testing.assert_close(self_contrastive_loss(positive, negative, 4.0, 1.0, .3), torch.tensor([by_hand + .3 * math.sqrt(5)]).double())
    z = torch.tensor([[[1.0, -1.0], [3.0, 2.0]]]).double()     # two channels, two positions
    torch.testing.assert_close(goodness(z, 1), torch.tensor([[5.0, 2.0]]).double())
    torch.testing.assert_close(goodness(z[:, :, 0], -1), torch.tensor([[5.0]]).double())


def test_swapping_the_halves_of_a_pair_changes_nothing(network):
    rule = build("scff", network, make_task(network.in_shape))
    x, _ = batch(rule.task)
    first, order = list(network.hidden)[0], torch.tensor([1, 0, 3, 2, 5, 4, 7, 6])     # partners of each other
    good, pair = rule.pre(first, x, x, order)
    swapped_good, swapped = rule.pre(first, x[order], x[order], order)
    assert torch.equal(pair, swapped) and torch.equal(swapped_good, good[order])
    assert torch.equal(good, rule.pre(first, x, x, torch.arange(8))[1])     # a sample beside itself is a positive pair


def test_a_pair_is_what_shared_weights_make_of_both_halves_laid_end_to_end():
    network = dense((6, 5), activation=nn.ReLU)
    rule, layer = build("scff", network, make_task()), network.blocks["fc1"].linear
    x, _ = batch(rule.task)
    x, other = standard(x, (1,)), torch.arange(8).roll(1)
    both = torch.cat([x, x[other]], 1)
    both = (both - both.mean(1, keepdim=True)) / both.std(1, correction=0, keepdim=True)     # the paper's: over the pair
    expected = F.linear(both, torch.cat([layer.weight, layer.weight], 1), 2 * layer.bias)
    torch.testing.assert_close(rule.pre("fc1", x, x, other)[1], expected, rtol=1e-4, atol=1e-4)


def test_scff_takes_partners_that_are_others():
    rule = build("scff", dense((6, 5), activation=nn.ReLU), make_task())
    seen, pre = [], rule.pre
    rule.pre = lambda name, positive, negative, other: (seen.append(other), pre(name, positive, negative, other))[1]
    for _ in range(40):
        rule.learn_features = learned(rule, *batch(rule.task))
    assert not any((other == torch.arange(8)).any() for other in seen)
    assert {int(other[0]) for other in seen} == set(range(1, 8))


def test_scffs_blocks_train_one_after_the_other_or_together():
    network = dense(activation=nn.ReLU)
    named = lambda **knobs: [(p.name, p.epochs) for p in build("scff", network, make_task(), **knobs).phases()]
    assert named(feature_epochs=[3, 2]) == [("features of fc1", 3), ("features of fc2", 2), ("features of fc3", 2), ("readout", None)]
    assert named(feature_epochs=[3, 2], schedule="joint") == [("features of fc1, fc2, fc3", 2), ("features of fc1", 1), ("readout", None)]
    assert named(feature_epochs=[0]) == [("readout", None)]
    rule = build("scff", network, make_task())
    x, y = batch(rule.task)
    before = tensors(rule)
    step(rule, stepper(rule, lr=.1), x, y, rule.phases()[1].learn)
    assert {n.split(".")[2] for n in changed(before, rule) if n.startswith("network")} == {"fc2"}


def test_scffs_read_out_is_one_of_all_blocks_outputs_laid_end_to_end():
    network = dense((6, 7, 5), activation=nn.ReLU)
    rule = build("scff", network, make_task())
    x, _ = batch(rule.task)
    rule.eval()
    a = network.blocks["fc1"].linear(standard(x, (1,))) * 2
    h1 = F.relu(a - a.mean(1, keepdim=True))
    a = network.blocks["fc2"].linear(standard(h1, (1,)))
    h2 = F.relu(a - a.mean(1, keepdim=True))
    weights = torch.cat([rule.heads["fc1"][-1].weight, network.head.weight], 1)
    expected = torch.cat([standard(h1, (1,)), standard(h2, (1,))], 1) @ weights.T + rule.heads["fc1"][-1].bias + network.head.bias
    torch.testing.assert_close(rule.predict(x), expected)
