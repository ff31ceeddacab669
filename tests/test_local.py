"""Local losses against hand computations and plain autograd, in float64: prediction, similarity, greedy stages."""

import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import (CLASSES, Log, arrays, batch, build, changed, configuration, dense, learned, make_task, step, stepper, tensors,
                      train)
from test_contracts import ready
from test_oracles import NETWORKS, arrays_of, assert_same, backprop, convolutional, softmax_error, tanh_forward
from torch import nn

from lbp.algos.local.greedy import auxiliary
from lbp.algos.local.local import pooling, tapped
from lbp.algos.local.sim import similarity, similarity_loss
from lbp.archs.network import Layer, Network
from lbp.errors import Refused
from lbp.training import loop
from lbp.training.setup import build as build_experiment

OF_HERE = ("local", "pred", "mono_forward", "sim", "predsim", "greedy", "dgl")


# ---- no gradient crosses a block

def own_losses(name, rule, x, y):
    """{block: its own loss, a sum over samples; its input is cut off}."""
    shares, losses = {"sim": (0, 1), "predsim": (.01, .99)}.get(name, (1, 0)), {}
    for block_name, block in rule.network.hidden.items():
        h, x = tapped(block, x.detach(), rule.tap)
        losses[block_name] = 0.0
        if shares[0]:
            losses[block_name] += shares[0] * F.cross_entropy(rule.heads[block_name](h), y, reduction="sum")
        if shares[1]:
            losses[block_name] += shares[1] * len(x) * similarity_loss(rule.maps[block_name](h), F.one_hot(y, CLASSES).double())
    head = F.cross_entropy(rule.network.head(x.detach()), y, reduction="sum")
    return losses | {"head": (shares[0] or 1) * head}


@pytest.mark.parametrize("schedule", ["joint", "streaming"])
@pytest.mark.parametrize("kind", ["dense", "dense, batch norm, dropout", "batch norm, pool", "residual", "attention"])
@pytest.mark.parametrize("name", OF_HERE)
def test_each_blocks_update_is_that_of_its_own_loss(name, kind, schedule):
    network = NETWORKS[kind]()
    task = make_task(network.in_shape)
    rule = build(name, network, task, schedule=schedule)
    with torch.no_grad():
        for n, p in rule.named_parameters():
            if n.startswith("heads."):
                p.normal_()     # heads that begin at zero teach nothing
    x, y = batch(task)
    torch.manual_seed(1)
    parameters, expected = dict(rule.named_parameters()), {}
    for block, loss in own_losses(name, rule, x, y).items():
        own = [n for n in parameters if n.startswith((f"network.blocks.{block}.", f"heads.{block}.", f"maps.{block}."))]
        expected |= dict(zip(own, torch.autograd.grad(loss, [parameters[n] for n in own])))
    torch.manual_seed(1)
    found = learned(rule, x, y)[1]
    assert set(found) == set(parameters)
    assert_same(found, expected)


@pytest.mark.parametrize("name", OF_HERE)
def test_joint_and_streaming_give_the_same_updates(name):
    ends = []
    for schedule in ("joint", "streaming"):
        torch.manual_seed(5)
        network = NETWORKS["batch norm, pool"]()
        task = make_task(network.in_shape)
        rule = build(name, network, task, schedule=schedule)
        apply = stepper(rule, "adam", lr=.01)
        for _ in range(3):
            step(rule, apply, *batch(task))
        ends.append(tensors(rule))
    for n, end in ends[0].items():
        torch.testing.assert_close(ends[1][n], end, rtol=1e-11, atol=1e-11, msg=lambda m: f"{n}: {m}")


@pytest.mark.parametrize("name", OF_HERE)
def test_streaming_steps_a_block_before_the_next_one_runs(name):
    """The order of events: a block has learned before its successor sees the batch."""
    network, events = dense(), []
    rule = build(name, network, make_task(), schedule="streaming")
    for block_name, block in network.blocks.items():
        block.register_forward_pre_hook(lambda module, args, n=block_name: events.append(f"run {n}"))
    x, y = batch(make_task())
    rule.learn(x, y, lambda group, loss=None: events.append(group))
    assert events == ["run fc1", "forward", "heads", "run fc2", "forward", "heads", "run fc3", "forward", "heads", "run head"]


@pytest.mark.parametrize("rule", ["local", "predsim", "sigprop"])
def test_memory_does_not_grow_with_depth_where_blocks_are_streamed(rule):
    """As `scripts/bench_memory.py` counts it: all that lives at a step's peak beside parameters, gradients and optimizer state."""
    script = runpy.run_path(str(Path(__file__).parents[1] / "scripts/bench_memory.py"))
    few, many = (script["peak"]([f"algo={rule}", "algo.schedule=streaming"], depth, 32, 64) for depth in (4, 24))
    joint = script["peak"]([f"algo={rule}", "algo.schedule=joint"], 24, 32, 64)
    block = 64 * 32 * 4    # bytes of an activation
    assert many < few + block < joint - 8 * block


# ---- prediction

@pytest.mark.parametrize("name, knobs", [("pred", {}), ("local", {}), ("predsim", {"beta": 0.0}), ("dgl", {"k": 1})], ids=str)
def test_one_hidden_layer_and_a_linear_classifier_are_backprop(name, knobs):
    network, task = dense((6, 7)), make_task()
    rule = build(name, network, task, **knobs)
    linear = next(m for m in rule.heads["fc1"].modules() if isinstance(m, nn.Linear))
    with torch.no_grad():
        linear.weight.copy_(network.head.weight)
        linear.bias.copy_(network.head.bias)
    x, y = batch(task)
    found = learned(rule, x, y)[1]
    expected = backprop(network, x, y)
    assert_same({n: g for n, g in found.items() if n.startswith("network.")}, expected)


def test_mono_forward_is_the_local_classifier_without_bias():
    """And its gradients are those of G = h M^T under the cross entropy, in numpy."""
    ends = []
    for name, knobs in (("mono_forward", {}), ("local", {"bias": False})):
        torch.manual_seed(2)
        rule = build(name, dense(), make_task(), **knobs)
        x, y = batch(make_task())
        ends.append((tensors(rule), learned(rule, x, y)[1]))
    assert set(ends[0][0]) == set(ends[1][0]) and not any("heads" in n and "bias" in n for n in ends[0][0])
    for a, b in zip(*ends):
        assert all(torch.equal(b[n], t) for n, t in a.items())
    state, found = ends[0]
    values = tanh_forward(arrays_of(rule.network), x.numpy())
    for i, block in enumerate(rule.network.hidden, 1):
        M = state[f"heads.{block}.2.weight"].numpy()
        error = softmax_error(values[i] @ M.T, y.numpy())
        delta = error @ M * (1 - values[i] ** 2)
        for key, expected in ((f"heads.{block}.2.weight", error.T @ values[i]),
                              (f"network.blocks.{block}.linear.weight", delta.T @ values[i - 1]),
                              (f"network.blocks.{block}.linear.bias", delta.sum(0))):
            np.testing.assert_allclose(found[key].numpy(), expected, rtol=1e-9, atol=1e-12)


def test_pred_begins_with_classifiers_of_weight_zero():
    rule, *_ = ready("pred")
    assert all(not p.any() for n, p in rule.heads.named_parameters() if n.endswith("weight"))
    assert all(p.any() for n, p in rule.heads.named_parameters() if n.endswith("bias"))


@pytest.mark.parametrize("shape, features, sides", [
    ((128, 32, 32), 2048, (4, 4)), ((256, 32, 32), 2048, (2, 4)), ((512, 16, 16), 2048, (2, 2)), ((512, 4, 4), 2048, (2, 2)),
    ((8, 4, 4), 128, (4, 4)), ((4, 7, 7), 50, (2, 4)), ((64, 5, 1), 32, (1, 1))], ids=str)
def test_maps_are_halved_in_turn(shape, features, sides):
    """The sizes that the authors' code gives for vgg8b on CIFAR-10, and others by hand."""
    pool, size = pooling(shape, features)
    x = torch.randn(2, *shape)
    assert tuple(pool(x).shape) == (2, shape[0], *sides) and size == shape[0] * sides[0] * sides[1]
    assert isinstance(pool, nn.Identity) == (sides == shape[1:])


def noisy_layer():
    return Layer(nn.Conv2d(2, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), .5, nn.Sequential(nn.MaxPool2d(2), nn.Flatten())).double()


def test_losses_look_before_dropout_and_pooling():
    block, x = noisy_layer(), torch.randn(3, 2, 6, 6, dtype=torch.float64)
    torch.manual_seed(4)
    expected = block(x)
    torch.manual_seed(4)
    h, out = tapped(block, x, "activation")
    assert torch.equal(out, expected) and h.shape == (3, 5, 4, 4)
    assert torch.equal(h, block.activation(block.norm(block.linear(x))))
    torch.manual_seed(4)
    h, out = tapped(block, x, "output")
    assert h is out and torch.equal(out, expected)


# ---- similarity

def similarity_by_hand(z):
    z = z - z.mean(1, keepdims=True)
    z = z / np.sqrt((z**2).sum(1, keepdims=True))
    return z @ z.T


def test_similarity_loss_by_hand():
    rng = np.random.default_rng(0)
    z, labels = rng.normal(size=(5, 7)), np.eye(CLASSES)[[0, 1, 1, 2, 3]]
    expected = ((similarity_by_hand(z) - similarity_by_hand(labels)) ** 2).sum() / 25
    assert float(similarity_loss(torch.tensor(z), torch.tensor(labels))) == pytest.approx(expected, rel=1e-7)
    same, other = similarity_by_hand(labels)[1, 2], similarity_by_hand(labels)[0, 1]
    assert same == pytest.approx(1) and other == pytest.approx(-1 / (CLASSES - 1))


@pytest.mark.parametrize("shape", [(6, 4, 3), (6, 1, 4), (3, 4, 4), (5, 6), (1, 6)], ids=str)
def test_maps_and_tokens_are_compared_by_their_spread(shape):
    rng = np.random.default_rng(1)
    z = rng.normal(size=(5, *shape))
    if len(shape) == 2:
        rows = z.std(1, ddof=1) if shape[0] > 1 else z[:, 0]
    elif shape[0] > 3 and shape[1] > 1:
        rows = z.reshape(5, shape[0], -1).std(2, ddof=1)
    else:
        rows = z.reshape(5, -1)
    np.testing.assert_allclose(similarity(torch.tensor(z)).numpy(), similarity_by_hand(rows), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("value", [0.0, 1.0, 1e-30])
@pytest.mark.parametrize("shape", [(4, 6), (4, 5, 3, 3), (4, 3, 6)], ids=str)
def test_units_that_say_nothing_give_no_nan(shape, value):
    z = torch.full(shape, value, requires_grad=True)
    loss = similarity_loss(z, torch.eye(4))
    loss.backward()
    assert loss.isfinite() and z.grad.isfinite().all()


def test_similarities_are_in_fp32_under_autocast():
    z = torch.randn(64, 32).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        found = similarity_loss(z, torch.eye(64))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, similarity_loss(z.float(), torch.eye(64)))


@pytest.mark.parametrize("name", ["sim", "predsim"])
def test_losses_are_logged_as_they_are(name):
    rule, x, y = ready(name)
    result = learned(rule, x, y)[0]
    h = rule.network.blocks["fc1"](x)
    sim = similarity_by_hand(rule.maps["fc1"](h).detach().numpy())
    sim = ((sim - similarity_by_hand(np.eye(CLASSES)[y.numpy()])) ** 2).mean()
    values = result.blocks["fc1"]
    if name == "sim":
        assert values["local_loss"].item() == pytest.approx(sim, rel=1e-6)
    else:
        pred = F.cross_entropy(rule.heads["fc1"](h), y).item()
        assert values["similarity_loss"].item() == pytest.approx(sim, rel=1e-6)
        assert values["local_loss"].item() == pytest.approx(.01 * pred + .99 * sim, rel=1e-6)


@pytest.mark.parametrize("n", [4, 16])
def test_the_change_does_not_grow_with_the_batch(n):
    """A batch laid out twice gives twice the sum, so the same change after the division by its size."""
    rule, x, y = ready("sim")
    x, y = x[:n], y[:n]
    once, twice = learned(rule, x, y)[1], learned(rule, torch.cat([x, x]), torch.cat([y, y]))[1]
    for n_, g in once.items():
        torch.testing.assert_close(twice[n_], 2 * g, rtol=1e-9, atol=1e-12)


def sequences():
    return Network({"fc1": Layer(nn.Linear(6, 7)), "fc2": Layer(nn.Linear(7, 8)), "head": nn.Linear(8, CLASSES)}, (5, 6)).double()


def test_labels_of_tokens():
    """A classifier answers each token; samples that have many labels are not compared."""
    task = make_task((5, 6))
    x, y = torch.randn(3, 5, 6, dtype=torch.float64), torch.randint(CLASSES, (3, 5))
    y[0, 2] = -100
    for name in ("local", "pred", "mono_forward", "greedy", "dgl"):
        rule = build(name, sequences(), task)
        assert rule.heads["fc1"](rule.network.blocks["fc1"](x)).shape == (3, 5, CLASSES)
        before = tensors(rule)
        train(rule, [(x, y)] * 2)
        assert all(t.isfinite().all() for t in tensors(rule).values()) and changed(before, rule)
    for name in ("sim", "predsim"):
        with pytest.raises(Refused, match=f"algo={name}.*token"):
            build(name, sequences(), task)


@pytest.mark.parametrize("name", ["sim", "predsim"])
def test_maps_of_three_dimensions_are_refused(name):
    network = NETWORKS["3-d"]()
    with pytest.raises(Refused, match=f"algo={name}.*block conv1"):
        build(name, network, make_task(network.in_shape))


# ---- greedy stages

def stages(rule):
    phases = rule.phases()
    assert [phase.name for phase in phases] == list(rule.network.hidden)
    return phases


def normed():
    return dense((6, 7, 5, 8), activation=nn.ReLU, norm=nn.BatchNorm1d, dropout=.2)


def test_frozen_stages_stay_as_they_are_to_the_bit():
    """Weights, biases and batch statistics of all but the block whose turn it is, and of all other heads; momentum and weight decay
    do not reach them."""
    network, task = normed(), make_task()
    rule = build("greedy", network, task)
    x, y = batch(task, 16)
    apply = stepper(rule, "sgd", lr=.1, momentum=.9, weight_decay=.01)
    for turn, phase in enumerate(stages(rule)):
        rule.train()
        before = tensors(rule)
        for _ in range(4):
            step(rule, apply, x, y, phase.learn)
        name = phase.name
        moving = (f"network.blocks.{name}.", f"heads.{name}.") + (("network.blocks.head.",) if turn == 2 else ())
        moved = changed(before, rule)
        assert moved and all(n.startswith(moving) for n in moved), moved
        assert all(any(n.startswith(m) for n in moved) for m in moving)
        assert not any(m.training for below in list(network.hidden)[:turn] for m in network.blocks[below].modules())
        assert network.blocks[name].training


def test_a_stage_learns_on_what_the_frozen_blocks_give_in_evaluation_mode():
    network, task = normed(), make_task()
    rule = build("greedy", network, task, k=1)
    x, y = batch(task, 16)
    train(rule, [(x, y)] * 3)      # statistics that are not those of the batch
    rule.train()
    h = network.blocks["fc2"].eval()(network.blocks["fc1"].eval()(x)).detach()
    torch.manual_seed(1)
    block, head = network.blocks["fc3"], rule.heads["fc3"]
    loss = F.cross_entropy(head(tapped(block, h, "activation")[0]), y, reduction="sum")
    expected = torch.autograd.grad(loss, list(block.parameters()))
    torch.manual_seed(1)
    rule.phases()[2].learn(x, y, None)
    for p, g in zip(block.parameters(), expected):
        torch.testing.assert_close(p.grad, g, rtol=1e-10, atol=1e-12)


def test_the_prediction_is_that_of_the_stage_and_in_the_end_the_networks():
    network, task = dense(), make_task()
    rule = build("greedy", network, task)
    x, y = batch(task)
    assert torch.equal(rule.predict(x), network(x))
    for turn, phase in enumerate(stages(rule)):
        phase.learn(x, y, None)
        h = x
        for name in list(network.hidden)[: turn + 1]:
            h = network.blocks[name](h)
        assert torch.equal(rule.predict(x), network(x) if turn == 2 else rule.heads[phase.name](h))
    rule.readout = "auxiliary"
    assert torch.equal(rule.predict(x), rule.heads["fc3"](h))


def test_a_rule_in_its_second_stage_is_loaded_as_such():
    network, task = normed(), make_task()
    rule = build("greedy", network, task)
    x, y = batch(task, 16)
    step(rule, stepper(rule), x, y, rule.phases()[1].learn)
    other = build("greedy", normed(), task)
    other.load_state_dict(rule.state_dict())
    other.train()
    assert not other.network.blocks["fc1"].training and other.network.blocks["fc2"].training
    assert torch.equal(other.eval().predict(x), rule.eval().predict(x))


@pytest.mark.parametrize("readout", ["head", "auxiliary"])
@pytest.mark.parametrize("name", ["greedy", "dgl"])
def test_what_is_learned_tells_of_what_is_predicted(name, readout):
    network, task = dense(), make_task()
    rule = build(name, network, task, readout=readout)
    x, y = batch(task)
    expected = None
    for phase in rule.phases():
        result = phase.learn(x, y, lambda group, loss=None: None)
        rule.zero_grad()
        expected = rule.predict(x)
        torch.testing.assert_close(result.out, expected)
        torch.testing.assert_close(result.loss, F.cross_entropy(expected, y, reduction="none"))


@pytest.mark.parametrize("norm", ["none", "batch", "layer"])
@pytest.mark.parametrize("k", [1, 3])
def test_auxiliary_networks_have_k_minus_1_hidden_layers(k, norm):
    head = auxiliary((6, 8, 5), 0, 10, k, 2, norm)
    assert sum(isinstance(m, nn.Conv2d) for m in head) == k - 1
    assert head[-1].in_features == 6 * 2 * 2 and head(torch.randn(3, 6, 8, 5)).shape == (3, 10)
    dense_head = auxiliary((9,), 0, 10, k, 2, norm)
    assert [m.out_features for m in dense_head if isinstance(m, nn.Linear)] == [9] * (k - 1) + [10]
    tokens = auxiliary((4, 9), 0, 10, k, 2, norm)
    assert tokens(torch.randn(3, 4, 9)).shape == (3, 10)


def test_the_trainer_gives_each_stage_its_epochs_and_a_schedule_of_its_own(tmp_path):
    values = configuration("greedy", "mlp", optimizer="sgd", schedule="multistep", schedule__milestones=[1], schedule__gamma=.5,
                           arch__widths=[9, 8], trainer__epochs=2)
    experiment = build_experiment(values, arrays((1, 5, 5)))
    log = Log()
    summary = loop.train(experiment, log, tmp_path)
    epochs = [record for record in log if record["split"] == "train_epoch"]
    assert [record["phase"] for record in epochs] == ["fc1", "fc1", "fc2", "fc2"] and summary["epochs"] == 4
    assert [record["learning_rate_factor"] for record in epochs] == [1, .5, 1, .5]


def test_convolutional_stages_and_statistics_of_auxiliary_norms():
    network = convolutional(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 5, 2), nn.ReLU())
    task = make_task((2, 9, 9))
    rule = build("greedy", network, task, norm="batch", k=3)
    x, y = batch(task)
    train(rule, [(x, y)] * 2)
    norms = [m for m in rule.heads["conv1"] if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == 3 and all(m.running_mean.any() for m in norms)
    assert rule.eval().predict(x).isfinite().all()
