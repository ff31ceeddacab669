"""Learning machines: every half against what it should do, the rule built of them, and machines in plain PyTorch code."""

import io
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import batch, build, changed, defaults, dense, learned, make_task, regression, stepper, tensors, train
from sklearn.linear_model import Ridge
from sklearn.tree import DecisionTreeRegressor
from test_contracts import IN_SHAPES, draws_again, small, two_steps
from torch import nn

from lbp.algos.targets import Estimator, LearningMachine, StepTheta, StepX
from lbp.algos.targets.halves import Local, Place
from lbp.algos.targets.inputs import INPUTS
from lbp.algos.targets.theta import THETA
from lbp.archs.network import Layer, Network
from lbp.config import compose
from lbp.errors import ConfigError, Diverged, Refused
from lbp.training.setup import build_algo, build_arch

PAGE = Path(__file__).parents[1] / "docs/machines.md"
LEAKY = "leaky_relu"


def machines(network=None, task=None, **knobs):
    """(rule, x, y) on a dense tanh network."""
    network = network or dense()
    task = task or make_task(network.in_shape)
    return build("machines", network, task, **knobs), *batch(task, 16)


def backprop(network, task, x, y):
    task.loss(network(x), y).sum().backward()
    found = {f"network.{n}": p.grad.clone() for n, p in network.named_parameters()}
    network.zero_grad()
    return found


def place(block, below, above):
    return Place(block, below, above)


def local(block, x, t, half=None):
    """The problem of a block whose output is to become t."""
    found = Local(block, x, half and half.run(block))
    found.aim(t)
    return found


def half(kinds, name, block, below, above, **knobs):
    kind = kinds[name]
    return kind(place(block, below, above), **{k: knob.default for k, knob in kind.knobs.items()} | knobs)


def layer(inputs=5, outputs=4, activation=nn.Tanh):
    return Layer(nn.Linear(inputs, outputs), None, activation()).double()


def values(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def distance(block, x, t):
    return (block(x) - t).square().sum(1) / 2


# ---- the default is backprop

@pytest.mark.parametrize("arch, knobs", [("mlp", {}), ("lenet", {}), ("cnn", {"norm": "batch"}), ("mlp", {"norm": "batch"}), ("mlp", {"dropout": .3}),
                                         ("vit", {}), ("resnet20", {})], ids=str)
def test_the_default_is_backprop(arch, knobs):
    task = make_task(IN_SHAPES.get(arch, (3, 16, 16)))
    network = small(arch, task, "machines", **knobs).double()
    rule, (x, y) = build("machines", network, task), batch(task, 6)
    statistics = {n: b.clone() for n, b in network.named_buffers()}
    torch.manual_seed(7)
    expected, after = backprop(network, task, x, y), {n: b.clone() for n, b in network.named_buffers()}
    for n, b in network.named_buffers():
        b.copy_(statistics[n])
    torch.manual_seed(7)
    result, found = learned(rule, x, y)
    assert set(found) == set(expected)
    for n in found:
        torch.testing.assert_close(found[n], expected[n], rtol=1e-9, atol=1e-14)
    for n, b in network.named_buffers():
        torch.testing.assert_close(b, after[n])      # statistics moved once, by the forward pass


def test_the_default_is_backprop_in_single_precision_too():
    task = make_task((6,), dtype=torch.float32)
    network = dense().float()
    x, y = batch(task, 16)
    expected = backprop(network, task, x, y)
    _, found = learned(build("machines", network, task), x, y)
    for n in found:
        torch.testing.assert_close(found[n], expected[n], rtol=1e-4, atol=1e-6)


# ---- halves that make a target for the input

def test_feedback_is_feedback_alignment():
    """Over a whole network, and of a linear block alone: x' = x - (h - t) B."""
    network = dense()
    task = make_task(network.in_shape)
    x, y = batch(task, 16)
    fa, rule = build("fa", network, task), build("machines", network, task, x="feedback")
    for name in list(network.blocks)[1:]:
        ours, = rule.x[name].buffers()
        ours.copy_(dict(fa.named_buffers())[f"blocks_{name}_{'weight' if name == 'head' else 'linear_weight'}"])
    expected, found = learned(fa, x, y)[1], learned(rule, x, y)[1]
    for n in expected:
        torch.testing.assert_close(found[n], expected[n], rtol=1e-9, atol=1e-14)
    for block, (w, b) in rule.feedback().items():
        torch.testing.assert_close(b, fa.feedback()[block][1])
    linear = nn.Linear(5, 4).double()
    one, x, t = half(INPUTS, "feedback", linear, (5,), (4,), lr=.5), values(7, 5), values(7, 4)
    torch.testing.assert_close(one.target(local(linear, x, t, one)), x - .5 * (linear(x) - t).detach() @ one.B_weight)


def test_a_gradient_step_on_the_input():
    block, x, t = layer(), values(7, 5), values(7, 4).tanh()
    x.requires_grad_()
    slope, = torch.autograd.grad(distance(block, x, t).sum(), x)
    torch.testing.assert_close(half(INPUTS, "gradient", block, (5,), (4,), lr=.3).target(local(block, x, t)), (x - .3 * slope).detach())
    near = block(x + .3).detach()
    many = half(INPUTS, "gradient", block, (5,), (4,), lr=.5, steps=300).target(local(block, x, near))
    assert (distance(block, many, near) < .1 * distance(block, x, near)).all()
    assert all(p.grad is None for p in block.parameters())


@pytest.mark.parametrize("activation", [nn.Tanh, nn.Sigmoid, nn.LeakyReLU, nn.ELU, nn.Softplus, nn.Identity])
def test_exact_and_least_squares_inputs_reach_the_target(activation):
    """f(x') = t of a square block, by both; of a wide one by least squares, with the least change that does."""
    square, wide = layer(5, 5, activation), layer(8, 3, activation)
    with torch.no_grad():
        square.linear.weight += torch.eye(5)
    x, t = values(7, 5), square(values(7, 5)).detach()
    for name, knobs in (("exact", {}), ("least_squares", {"ridge": 0.})):
        found = half(INPUTS, name, square, (5,), (5,), **knobs).target(local(square, x, t))
        torch.testing.assert_close(square(found), t, rtol=1e-7, atol=1e-9)
    x, t = values(7, 8), wide(values(7, 8)).detach()
    one = half(INPUTS, "least_squares", wide, (8,), (3,), ridge=0.)
    found = one.target(local(wide, x, t))
    torch.testing.assert_close(wide(found), t, rtol=1e-7, atol=1e-9)
    needed = one.dense.wanted(t) - wide.pre(x).detach()
    torch.testing.assert_close(found - x, torch.from_numpy(np.linalg.lstsq(wide.linear.weight.detach().numpy(), needed.numpy().T, rcond=None)[0].T))


def test_a_ridge_shortens_the_change_of_the_input():
    block, x, t = layer(8, 3), values(7, 8), values(7, 3).tanh()
    lengths = [(half(INPUTS, "least_squares", block, (8,), (3,), ridge=r).target(local(block, x, t)) - x).norm() for r in (0., .1, 10.)]
    assert lengths[0] > lengths[1] > lengths[2] > 0


def test_exact_asks_a_block_for_its_own_inverse():
    class Shift(nn.Module):
        def __init__(self):
            super().__init__()
            self.by = nn.Parameter(values(5))

        def forward(self, x):
            return torch.roll(x, 1, -1) + self.by

        def inverse(self, h):
            return torch.roll(h - self.by, -1, -1)

    block, x, t = Shift(), values(7, 5), values(7, 5)
    torch.testing.assert_close(block(half(INPUTS, "exact", block, (5,), (5,)).target(local(block, x, t))), t)


def test_a_learned_inverse_learns_to_rebuild():
    block, x = layer(5, 5), values(64, 5)
    one = half(INPUTS, "inverse", block, (5,), (5,), noise=.1)
    optimizer, errors = torch.optim.Adam(one.parameters(), 1e-2), []
    at = local(block, x, block(x))

    def settle(loss):
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(600):
        errors.append(one.learn(at, settle)["reconstruction_error"])
    assert errors[-1] < .3 * errors[0]
    torch.testing.assert_close(one.target(at), x)                            # t = h gives x' = x, whatever the inverse
    one.difference = False
    torch.testing.assert_close(one.target(at), one.g(block(x)))
    assert all(p.grad is None for p in block.parameters())


@pytest.mark.parametrize("name", ["population", "hill_climb", "hill_climb_binary"])
def test_searches_of_inputs_lower_every_samples_loss(name):
    block = layer()
    x = torch.where(values(9, 5) > 0, 1., -1.).double() if "binary" in name else values(9, 5)
    t = values(9, 4).tanh()
    found = half(INPUTS, name, block, (5,), (4,)).target(local(block, x, t))
    before, after = distance(block, x, t), distance(block, found, t)
    assert (after <= before).all() and after.sum() < .95 * before.sum() and found.shape == x.shape
    if "binary" in name:
        assert set(found.unique().tolist()) == {-1., 1.}
        bits = (x + 1) / 2
        found = half(INPUTS, name, block, (5,), (4,), values="bits").target(local(block, bits, t))
        assert set(found.unique().tolist()) == {0., 1.} and distance(block, found, t).sum() < distance(block, bits, t).sum()


def test_binary_neighbours_flip_the_share_asked_for():
    one, x = half(INPUTS, "hill_climb_binary", layer(), (5,), (4,), flip=.2), torch.ones(1000, 1, 50, dtype=torch.float64)
    assert (one.neighbours(x) == -1).double().mean() == pytest.approx(.2, abs=.01)


def test_without_a_target_nothing_below_is_taught():
    rule, x, y = machines(blocks={"fc3": {"x": "none"}})
    _, found = learned(rule, x, y)
    assert {n.split(".")[2] for n in found} == {"fc3", "head"}


# ---- halves that move parameters

@pytest.mark.parametrize("activation", [nn.Identity, nn.Tanh, nn.LeakyReLU])
def test_least_squares_reach_the_optimum(activation):
    block, x, t = layer(5, 4, activation), values(40, 5), layer(5, 4, activation)(values(40, 5)).detach()
    one = half(THETA, "least_squares", block, (5,), (4,), ridge=0.)
    expected = np.linalg.lstsq(np.hstack([x, np.ones((40, 1))]), one.dense.wanted(t).numpy(), rcond=None)[0]
    one.step(local(block, x, t), None)
    torch.testing.assert_close(block.linear.weight.detach(), torch.from_numpy(expected[:5].T))
    torch.testing.assert_close(block.linear.bias.detach(), torch.from_numpy(expected[5]))


def test_least_squares_go_part_of_the_way_and_not_far_under_a_ridge():
    x, t = values(40, 5), values(40, 4)
    changes = {}
    for ridge, relax in ((0., 1.), (0., .25), (1e3, 1.)):
        torch.manual_seed(1)
        block = layer(5, 4, nn.Identity)
        before = block.linear.weight.detach().clone()
        half(THETA, "least_squares", block, (5,), (4,), ridge=ridge, relax=relax).step(local(block, x, t), None)
        changes[ridge, relax] = block.linear.weight.detach() - before
    torch.testing.assert_close(changes[0., .25], .25 * changes[0., 1.])
    assert changes[1e3, 1.].norm() < .01 * changes[0., 1.].norm()


def test_the_change_under_a_ridge_by_hand_and_fewer_samples_than_inputs():
    block, x, t = layer(12, 3, nn.Identity), values(6, 12), values(6, 3)
    before = torch.cat([block.linear.weight, block.linear.bias[:, None]], 1).detach()
    one = torch.cat([x, x.new_ones(6, 1)], 1)
    half(THETA, "least_squares", block, (12,), (3,), ridge=.5).step(local(block, x, t), None)
    expected = torch.linalg.solve(one.T @ one / 6 + .5 * torch.eye(13), one.T @ (t - one @ before.T) / 6)
    torch.testing.assert_close(torch.cat([block.linear.weight, block.linear.bias[:, None]], 1).detach() - before, expected.T)
    half(THETA, "least_squares", block, (12,), (3,), ridge=0.).step(local(block, x, t), None)
    torch.testing.assert_close(block(x), t, rtol=1e-8, atol=1e-8)        # some solution of many


@pytest.mark.parametrize("name", ["genetic", "hill_climb"])
def test_searches_of_parameters_never_raise_the_loss(name):
    block, x, t = layer(), values(30, 5), values(30, 4).tanh()
    one, losses = half(THETA, name, block, (5,), (4,), std=.05), []
    for _ in range(30):
        losses.append(float(distance(block, x, t).detach().sum()))
        one.step(local(block, x, t), None)
    assert all(after <= before for before, after in zip(losses, losses[1:])) and losses[-1] < .8 * losses[0]


def test_evolution_strategies_guess_the_gradient():
    block, x, t = layer(), values(30, 5), values(30, 4).tanh()
    one = half(THETA, "es", block, (5,), (4,), members=2000)
    one.step(local(block, x, t), None)
    guessed = torch.cat([p.grad.flatten() for p in block.parameters()])
    block.zero_grad()
    distance(block, x, t).sum().backward()
    true = torch.cat([p.grad.flatten() for p in block.parameters()])
    assert torch.cosine_similarity(guessed, true, 0) > .95 and guessed.norm() / true.norm() == pytest.approx(1, abs=.15)


def test_inner_steps_and_inner_batches_fit_the_target_better():
    """With the optimizer of the trainer; each inner batch is divided by its own size."""
    def after(**theta):
        torch.manual_seed(1)
        rule, *_ = machines(theta={"name": "gradient", **theta})
        torch.manual_seed(2)
        x, y = batch(rule.task, 16)
        train(rule, [(x, y)] * 5, stepper(rule, lr=.05))
        return float(rule.task.loss(rule.network(x), y).detach().mean())

    one, five, parts = after(), after(steps=5), after(batch=4)
    assert five < one and parts < one


def test_an_inner_batch_is_a_step_of_its_own():
    """The part's mean gradient, for each of them once."""
    torch.manual_seed(3)
    block = nn.Linear(3, 2).double()
    x, t = values(8, 3), values(8, 2)
    one, seen = half(THETA, "gradient", block, (3,), (2,), batch=4), []
    one.step(local(block, x, t), lambda: (seen.append(block.weight.grad / 8), block.zero_grad()))
    assert len(seen) == 2
    whole = (block(x) - t).T.detach() @ x / 8
    torch.testing.assert_close((seen[0] + seen[1]) / 2, whole)


# ---- the rule

def test_the_order_decides_which_weights_make_the_target():
    """By hand, with SGD, on one hidden block: under parameters_first the head's new weights teach it."""
    for order in ("targets_first", "parameters_first"):
        torch.manual_seed(2)
        network = dense((6, 5))
        rule, x, y = machines(network, order=order)
        head, task = network.head, rule.task
        h = network.hidden["fc1"](x).detach()
        apply = stepper(rule, lr=.5)
        with torch.no_grad():
            weight, bias = head.weight.clone(), head.bias.clone()
            if order == "parameters_first":
                error = task.error(head(h), y)
                weight -= .5 * error.T @ h / len(x)
                bias -= .5 * error.sum(0) / len(x)
            delta = task.error(h @ weight.T + bias, y) @ weight * (1 - h * h)
            expected = network.hidden["fc1"].linear.weight - .5 * delta.T @ x / len(x)
        train(rule, [(x, y)], apply)
        torch.testing.assert_close(network.hidden["fc1"].linear.weight, expected)


@pytest.mark.parametrize("theta", ["gradient", "es", "hill_climb", "genetic", "least_squares"])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_units_that_were_not_drawn_stay_as_they_were(theta, optimizer):
    rule, x, y = machines(theta=theta, x={"name": "gradient", "lr": 50.}, features=.4)    # far enough for a search to come nearer
    apply = stepper(rule, optimizer)
    moved = []
    for _ in range(6):      # again and again: momentum moves nothing either
        before = {n: p.detach().clone() for n, p in rule.network.named_parameters()}
        train(rule, [(x, y)], apply)
        step = {n: (p.detach() != before[n]).flatten(1).any(1) if p.dim() > 1 else p.detach() != before[n]
                for n, p in rule.network.named_parameters()}
        for name, block in rule.network.blocks.items():
            rows = [step[n] for n in step if f".{name}." in n]
            either = torch.stack(rows).any(0)
            assert int(either.sum()) <= max(1, round(.4 * len(either)))
        moved.append(step["blocks.fc1.linear.weight"])
    assert any(not torch.equal(moved[0], later) for later in moved)
    assert any(step.any() for step in moved)


def test_iterations_are_rounds_on_one_batch():
    (one, x, y), (again, *_) = machines(iterations=3), machines()
    again.network.load_state_dict(one.network.state_dict())
    result, = train(one, [(x, y)], stepper(one, lr=.1))
    first, *_ = train(again, [(x, y)] * 3, stepper(again, lr=.1))
    torch.testing.assert_close(result.loss, first.loss)
    for a, b in zip(one.network.parameters(), again.network.parameters()):
        torch.testing.assert_close(a, b)


EVERY = [("theta", name) for name in THETA if name != "sklearn"] + [("x", name) for name in INPUTS]


@pytest.mark.parametrize("which, name", EVERY)
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("arch", ["mlp", "cnn"])
def test_every_half_trains(arch, which, name, bf16):
    task = make_task(IN_SHAPES.get(arch, (3, 16, 16)), dtype=torch.float32)
    knobs = {"widths": [8, 8]} if arch == "mlp" else {}
    network = small(arch, task, "machines", activation=LEAKY, **knobs)
    wish = {which: name} if name != "none" else {"blocks": {"head": {which: name}}}
    if name in ("exact", "least_squares"):      # dense blocks; the head is not square
        block = "fc2" if arch == "mlp" else "head"
        if arch == "cnn" and name == "exact":
            return
        wish = {"blocks": {block: wish}}
    rule = build("machines", network, task, **wish)
    two_steps(rule, *batch(task, 8), bf16=bf16)


@pytest.mark.parametrize("which, name", EVERY)
def test_every_half_resumes_and_says_what_is_true_of_it(which, name):
    def ready():
        wish = {"blocks": {"fc2": {which: name}}}
        rule, x, y = machines(dense((6, 6, 6)), **wish)
        return rule, x, y

    torch.manual_seed(3)
    rule, x, y = ready()
    batches = list(zip(x.split(4), y.split(4)))
    train(rule, batches[:2])
    file = io.BytesIO()
    torch.save(rule.state_dict(), file)
    file.seek(0)
    torch.manual_seed(99)
    other, *_ = ready()
    other.load_state_dict(torch.load(file, weights_only=True))
    train(rule, batches[2:])
    train(other, batches[2:])
    assert not changed(tensors(rule), other)
    before = tensors(rule.network)
    rule.learn(x, y, lambda group, loss=None: None)
    assert bool(changed(before, rule.network)) == rule.facts.in_place
    rule.zero_grad()
    spoiled = x.clone()
    spoiled[3, -1] = torch.nan
    before = tensors(rule.network)
    with pytest.raises(Diverged):
        train(rule, [(spoiled, y)])
    assert not changed(before, rule.network)
    rows = {}
    again = draws_again(rule)
    for start, stop in ((0, 16), (0, 8), (8, 16)):
        kept = tensors(rule)
        again()
        rows[start, stop] = learned(rule, x[start:stop], y[start:stop])[1]
        with torch.no_grad():
            for n, t in (*rule.named_parameters(), *rule.named_buffers()):
                t.copy_(kept[n])
    sums = all(torch.allclose(rows[0, 8][n] + rows[8, 16][n], g) for n, g in rows[0, 16].items() if n.startswith("network"))
    if not rule.facts.batch_coupled and name not in ("inverse", "population", "hill_climb", "hill_climb_binary"):   # their noise is cut by rank
        assert sums


def step_network():
    class Step(nn.Module):
        def __init__(self, inputs, outputs):
            super().__init__()
            self.linear = nn.Linear(inputs, outputs)

        def forward(self, x):
            return torch.sign(self.linear(x)).detach()

    return Network({"fc1": Step(6, 9), "fc2": Step(9, 7), "head": nn.Linear(7, 4)}, (6,)).double()


def test_blocks_without_a_derivative():
    searched = {"theta": "hill_climb", "x": "hill_climb_binary"}
    with pytest.raises(Refused, match="block fc1 has no derivative.*algo.blocks.fc1="):
        machines(step_network())
    rule, x, y = machines(step_network(), blocks={"fc1": {"theta": {"name": "hill_climb", "std": .3}}, "fc2": searched,
                                                  "head": {"x": "hill_climb_binary"}})
    assert rule.facts.needs_derivative
    first = rule.task.loss(rule.network(x), y).mean()
    train(rule, [(x, y)] * 150, stepper(rule, lr=.5))
    assert rule.task.loss(rule.network(x), y).mean() < .5 * first
    assert not machines(step_network(), theta="genetic", x="population")[0].facts.needs_derivative


def test_regression_with_least_squares_is_solved_in_a_step():
    network, task = dense((6, 5), outputs=2), regression()
    rule, x, y = machines(network, task, blocks={"head": {"theta": {"name": "least_squares", "ridge": 0.}, "x": "none"}})
    h = network.hidden["fc1"](x).detach()
    train(rule, [(x, y)])
    ones = torch.cat([h, h.new_ones(len(h), 1)], 1)
    assert torch.allclose(network.head(h), ones @ torch.linalg.lstsq(ones, y).solution)


def test_facts_are_those_of_the_halves():
    assert not machines(x="feedback")[0].facts.weight_transport
    assert not machines(x="inverse")[0].facts.weight_transport and list(machines(x="inverse")[0].groups()) == ["forward", "feedback"]
    assert machines(theta="least_squares")[0].facts.in_place and machines(theta="genetic")[0].facts.batch_coupled
    assert machines(theta={"name": "gradient", "batch": 4})[0].facts.batch_coupled
    assert not machines()[0].facts.batch_coupled
    rule, *_ = machines(blocks={"fc1": {"theta": "none"}})
    assert not {id(p) for p in rule.network.blocks["fc1"].parameters()} & {id(p) for p in rule.groups()["forward"]}


@pytest.mark.parametrize("knobs, named", [
    ({"theta": "gradeint"}, ["algo.theta=gradeint", "did you mean gradient", "least_squares"]),
    ({"theta": {"name": "gradient", "ridge": 1}}, ["algo.theta=gradient has no knob ridge", "steps, batch"]),
    ({"theta": {"name": "es", "members": 1}}, ["algo.theta.members=1", "int >= 2"]),
    ({"theta": {"name": "es", "members": 3}}, ["members=3", "even"]),
    ({"theta": {"name": "genetic", "elite": 32}}, ["elite=32"]),
    ({"theta": {"steps": 2}}, ["algo.theta=", "name"]),
    ({"x": {"name": "none", "lr": 1}}, ["has no knob lr", "none"]),
    ({"blocks": {"fc9": {}}}, ["algo.blocks.fc9", "fc1, fc2", "did you mean"]),
    ({"blocks": {"fc2": {"theat": "es"}}}, ["algo.blocks.fc2=", "theta, x"]),
    ({"blocks": {"fc2": {"x": {"name": "gradient", "lr": 0}}}}, ["algo.blocks.fc2.x.lr=0", "float > 0"]),
    ({"blocks": {"fc1": {"x": "gradient"}}}, ["algo.blocks.fc1.x", "first block"]),
    ({"x": "exact"}, ["block fc2", "as many outputs as inputs", "arch=mlp"]),
    ({"theta": "none"}, ["moves no block"]),
    ({"theta": "sklearn"}, ["block fc1", "Estimator", "Python"]),
])
def test_refusals_say_what_there_is(knobs, named):
    with pytest.raises(ConfigError) as refused:
        machines(**knobs)
    assert all(text in str(refused.value) for text in (*named, "algo=machines"))


@pytest.mark.parametrize("knobs, halves, named", [
    ({"norm": "batch"}, {"theta": "es"}, "arch.norm=none"), ({"norm": "batch"}, {"x": "population"}, "arch.norm=none"),
    ({"norm": "batch"}, {"theta": {"name": "gradient", "batch": 4}}, "arch.norm="), ({"dropout": .3}, {"x": "inverse"}, "arch.dropout=0"),
    ({"norm": "layer"}, {"theta": "least_squares"}, "arch.norm=none"), ({"activation": "relu"}, {"theta": "least_squares"}, "arch.activation"),
    ({"dropout": .3}, {"theta": "least_squares"}, "arch.dropout=0"), ({"activation": "bernoulli_ste"}, {"theta": "es"}, "arch.activation=step"),
], ids=str)
def test_blocks_that_a_half_cannot_take_are_refused(knobs, halves, named):
    task = make_task((6,), dtype=torch.float32)
    with pytest.raises(Refused, match="block fc1|block fc2") as refused:
        build("machines", small("mlp", task, "machines", **knobs), task, **halves)
    assert named in str(refused.value) and "algo=machines" in str(refused.value)


def test_features_of_blocks_without_units_are_refused():
    task = make_task((3, 16, 16), dtype=torch.float32)
    with pytest.raises(Refused, match="block .* no plain layer.*arch=mlp"):
        build("machines", small("resnet20", task, "machines"), task, features=.5)


def test_configurations():
    found = compose(["algo=machines", "algo.theta={name: es, members: 64}", "algo.blocks.head={theta: none}",
                     "algo.blocks.fc2.x={name: inverse, noise: 0.2}"]).values["algo"]
    assert found["theta"] == {"name": "es", "members": 64}
    assert found["blocks"] == {"head": {"theta": "none"}, "fc2": {"x": {"name": "inverse", "noise": .2}}}
    assert compose(["algo=machines", "algo.theta.steps=2"]).values["algo"]["theta"] == {"name": "gradient", "steps": 2}
    assert compose(["algo=machines", "algo.x=feedback", "algo.x.scale=2"]).values["algo"]["x"] == {"name": "feedback", "scale": 2}
    with pytest.raises(ConfigError, match="did you mean gradient"):
        compose(["algo=machines", "algo.theta=gradeint"])


# ---- machines in plain PyTorch

def stack(*blocks):
    return nn.Sequential(*blocks).double()


def test_machines_and_modules_in_one_graph_are_backprop():
    plain = stack(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3))
    mixed = stack(LearningMachine(plain[:2]), plain[2], LearningMachine(plain[3:5], in_shape=(5,)), LearningMachine(plain[5]))
    x, y = values(8, 6).requires_grad_(), torch.arange(8) % 3
    found = []
    for model in (plain, mixed):
        model.zero_grad()
        x.grad = None
        nn.functional.cross_entropy(model(x), y).backward()
        found.append([p.grad.clone() for p in plain.parameters()] + [x.grad])
    for a, b in zip(*found):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-14)


def test_the_modes():
    def run(mode, **more):
        torch.manual_seed(4)
        linear = nn.Linear(3, 2).double()
        machine = LearningMachine(linear, mode=mode, **more)
        x, t = values(5, 3).requires_grad_(), values(5, 2)
        old = linear.weight.detach().clone()
        ((machine(x) - t).square().sum() / 2).backward()
        return linear, old, x, t

    sgd = {"optimizer": lambda parameters: torch.optim.SGD(parameters, .1)}
    linear, old, x, t = run("accumulate")
    assert torch.equal(linear.weight, old) and linear.weight.grad is not None
    at_old = x.grad
    linear, old, x, t = run("step_x")
    assert torch.equal(linear.weight, old) and linear.weight.grad is None
    torch.testing.assert_close(x.grad, at_old)
    linear, old, x, t = run("step", **sgd)
    assert not torch.equal(linear.weight, old) and linear.weight.grad is None
    torch.testing.assert_close(x.grad, at_old)                      # made with the old weights
    linear, old, x, t = run("step_first", **sgd)
    torch.testing.assert_close(x.grad, ((linear(x) - t) @ linear.weight).detach())      # with the new ones
    assert not torch.allclose(x.grad, at_old)
    with pytest.raises(ValueError, match="optimizer="):
        run("step")
    with pytest.raises(ValueError, match="accumulate, step, step_first, step_x"):
        run("stop")
    with pytest.raises(ValueError, match="mode=step"):
        LearningMachine(nn.Linear(3, 2), theta="least_squares")


def test_step_and_step_x_by_hand():
    linear = nn.Linear(3, 2).double()
    machine, x, t = LearningMachine(linear), values(5, 3), values(5, 2)
    torch.testing.assert_close(machine.step_x(x, t), (x - (linear(x) - t) @ linear.weight).detach())
    assert linear.weight.grad is None
    machine.step(x, t)
    torch.testing.assert_close(linear.weight.grad, ((linear(x) - t).T @ x).detach())
    solver = LearningMachine(linear, {"name": "least_squares", "ridge": 0.}, {"name": "least_squares", "ridge": 0.}, mode="step")
    torch.testing.assert_close(linear(solver.step_x(x, t)), t)
    solver.step(x, t)
    ones = torch.cat([x, x.new_ones(5, 1)], 1)
    torch.testing.assert_close(linear(x), ones @ torch.linalg.lstsq(ones, t).solution)


@pytest.mark.parametrize("name", ["population", "hill_climb", "feedback", "inverse", "exact", "least_squares"])
def test_every_way_to_teach_the_input_works_in_a_graph(name):
    below, block = nn.Linear(6, 5).double(), layer(5, 5)
    machine = LearningMachine(block, x=name)
    x, t = values(8, 6), values(8, 5).tanh()
    (machine(below(x)) - t).square().sum().backward()
    assert below.weight.grad.isfinite().all() and below.weight.grad.any() and block.linear.weight.grad.any()
    assert name != "inverse" or all(p.grad is not None for p in machine.x.parameters())


def test_halves_of_ones_own():
    class Hebb(StepTheta):
        writes = True

        def step(self, local, settle):
            local.block.weight.data += .1 * local.t.T @ local.x.detach()

    class Half(StepX):
        def target(self, local):
            return local.x.detach() / 2

    linear = nn.Linear(3, 2).double()
    machine, old = LearningMachine(linear, Hebb(), Half(), mode="step"), linear.weight.detach().clone()
    x = values(4, 3).requires_grad_()
    out = machine(x)
    out.sum().backward()
    torch.testing.assert_close(x.grad, x.detach() / 2)
    torch.testing.assert_close(linear.weight.detach(), old + .1 * (out.detach() - 1).T @ x.detach())


def test_a_machine_evaluates_like_its_block_and_can_be_taught_twice():
    linear = nn.Linear(3, 2).double()
    machine, x = LearningMachine(linear), values(4, 3)
    with torch.no_grad():
        assert torch.equal(machine(x), linear(x))
    out = machine(x)
    out.sum().backward(retain_graph=True)
    once = linear.weight.grad.clone()
    out.sum().backward()
    torch.testing.assert_close(linear.weight.grad, 2 * once)


def test_an_estimator_is_a_block_with_a_state_of_tensors():
    block, x, t = Estimator(DecisionTreeRegressor(max_depth=3), 2), values(40, 3), values(40, 2)
    assert torch.equal(block(x), torch.zeros(40, 2, dtype=torch.float64))
    machine = LearningMachine(block, "sklearn", "hill_climb", mode="step", in_shape=(3,))
    before = distance(block, x, t).sum()
    machine.step(x, t)
    assert distance(block, x, t).sum() < before and block(x).dtype == torch.float64
    better = machine.step_x(x, t)
    assert distance(block, better, t).sum() <= distance(block, x, t).sum()
    file = io.BytesIO()
    torch.save(machine.state_dict(), file)
    file.seek(0)
    other = LearningMachine(Estimator(DecisionTreeRegressor(max_depth=3), 2), "sklearn", "hill_climb", mode="step", in_shape=(3,))
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other.block(x), block(x))
    with pytest.raises(Refused, match="no partial_fit"):
        LearningMachine(Estimator(Ridge(), 2), {"name": "sklearn", "partial": True}, mode="step")


def test_the_package_imports_no_torch():
    import subprocess
    import sys

    code = ("import sys, lbp.algos.targets; print('torch' in sys.modules); from lbp.algos.targets import LearningMachine; "
            "print('torch' in sys.modules)")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split() == ["False", "True"]


# ---- the page

def test_the_example_of_the_page_does_what_the_page_says(capsys):
    code, said = re.search(r"```python\n(.*?)```\n\n.*?\n\n```text\n(.*?)```", PAGE.read_text(), re.S).groups()
    torch.manual_seed(0)
    exec(compile(code, str(PAGE), "exec"), {})
    printed, claimed = (dict(re.findall(r"^(.*?)\s+([\d.]+)$", text, re.M)) for text in (capsys.readouterr().out, said))
    assert set(printed) == set(claimed) and all(float(printed[k]) == pytest.approx(float(v), abs=.05) for k, v in claimed.items())


def test_the_table_of_the_page_lists_every_half_and_knob():
    rows = {tuple(cell.strip(" `") for cell in line.split("|")[1:3]): line for line in PAGE.read_text().splitlines() if line.startswith("| `")}
    assert set(rows) == {("theta", name) for name in THETA} | {("x", name) for name in INPUTS}
    for (which, name), line in rows.items():
        kind = (THETA if which == "theta" else INPUTS)[name]
        assert all(f"`{knob}` = {str(k.default).lower()}" in line for knob, k in kind.knobs.items()), line
        assert line.count("` = ") == len(kind.knobs)


@pytest.mark.parametrize("knobs, halves, needing", [
    ({"activation": "sign"}, {}, "block fc1 has no derivative, which its halves theta need"),
    ({"activation": "tanh", "transmit": "sign"}, {}, "block fc2 has no derivative, which its halves x need"),
    ({"activation": "sign"}, {"theta": "genetic", "x": "hill_climb_binary"}, None),
    ({"activation": "tanh", "transmit": "sign"}, {"x": "inverse"}, None),
    ({"activation": "sign"}, {"blocks": {"fc1": {"theta": "genetic"}, "fc2": {"theta": "hill_climb", "x": "hill_climb"}}}, None),
], ids=str)
def test_layers_without_a_derivative_are_taught_by_halves_that_need_none(knobs, halves, needing):
    task = make_task((6,), dtype=torch.float32)
    network = build_arch({**defaults("arch", "mlp"), "widths": [9, 8], **knobs}, task)
    config = {**defaults("algo", "machines"), **halves}
    if needing:
        with pytest.raises(Refused, match=needing):
            build_algo(config, network, task)
        return
    rule, before = build_algo(config, network, task), tensors(network)
    train(rule, [batch(task)] * 4)
    assert changed(before, network)
