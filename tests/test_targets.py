"""Target propagation against its equations, in float64: inverses, what they learn, and the targets they bring down."""

import pytest
import torch
import torch.nn.functional as F
from conftest import CLASSES, batch, build, changed, dense, learned, make_task, regression, step, stepper, tensors
from test_contracts import FixedError, two_steps
from test_oracles import assert_same, backprop
from torch import nn

from lbp.algos.targets.inverses import bring_down, walk
from lbp.archs.network import ACTIVATIONS, Network
from lbp.datasets.task import Task
from lbp.errors import Diverged, Refused
from lbp.metrics.measure import Measure, angle, products_of

LEARNED = ["tp", "dtp", "dtp_drl", "ddtp_linear", "ldrl"]     # those whose way back learns
BY_DIFFERENCES = ["dtp", "dtp_drl", "fw_dtp", "ddtp_linear", "ldrl"]


def degrees(a, b):
    return angle(products_of(a, b))


def linear(network, name):
    block = network.blocks[name]
    return getattr(block, "linear", block)


def squares(activation=nn.Identity):
    """Invertible square blocks."""
    network = dense((5, 5, 5, 5), outputs=5, activation=activation)
    with torch.no_grad():
        for name in network.blocks:
            weight = linear(network, name).weight
            nn.init.orthogonal_(weight)
            weight += .1 * torch.randn_like(weight)
    return network


class Exact(nn.Module):
    """f^-1 of f(x) = activation(W x + b)."""

    def __init__(self, layer, activation):
        super().__init__()
        self.layer, self.undo = layer, torch.atanh if activation is nn.Tanh else lambda y: y

    def forward(self, y):
        return torch.linalg.solve(self.layer.weight, (self.undo(y) - self.layer.bias).T).T


# ---- targets

@pytest.mark.parametrize("activation", [nn.Identity, nn.Tanh])
@pytest.mark.parametrize("name", ["tp", "dtp"])
def test_exact_inverses_reach_the_targets_above_in_one_step(name, activation):
    network, task = squares(activation), make_task((5,), 5)
    rule = build(name, network, task, top="gradient", feedback_steps=0)
    for block in rule.inverses:
        rule.inverses[block] = Exact(linear(network, block), nn.Identity if block == "head" else activation)
    x, y = batch(task)
    values = {n: h.detach() for n, h in walk(network, x).items()}
    top = values["head"] - .01 * task.error(values["head"], y)
    with torch.no_grad():
        targets, rebuilt = bring_down(values, rule.inverses, top, rule.difference)
        blocks = list(network.blocks)
        for i, block in enumerate(blocks[:-1]):
            torch.testing.assert_close(rebuilt[block], values[block], rtol=1e-8, atol=1e-10)
            reached = targets[block]
            for above in blocks[i + 1 :]:
                reached = network.blocks[above](reached)
                torch.testing.assert_close(reached, targets[above], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("difference", [True, False])
def test_the_step_towards_a_target_by_hand(difference):
    network, task, beta = dense((6, 5), activation=nn.Tanh), make_task(), .3
    rule = build("dtp", network, task, difference=difference, beta=beta, feedback_steps=0)
    x, y = batch(task)
    found = learned(rule, x, y)[1]
    g, layer = rule.inverses["head"], linear(network, "fc1")
    assert isinstance(g[1], nn.Tanh)
    h = torch.tanh(x @ layer.weight.T + layer.bias).detach()
    out = h @ network.head.weight.T + network.head.bias
    error = out.softmax(1) - F.one_hot(y, CLASSES)
    back, here = (torch.tanh(o @ g[0].weight.T + g[0].bias) for o in (out - beta * error, out))
    target = back + (h - here if difference else 0)
    delta, error = ((h - target) / beta * (1 - h**2)).detach(), error.detach()
    assert_same(found, {"network.blocks.fc1.linear.weight": delta.T @ x, "network.blocks.fc1.linear.bias": delta.sum(0),
                        "network.blocks.head.weight": error.T @ h, "network.blocks.head.bias": error.sum(0)})


@pytest.mark.parametrize("name", BY_DIFFERENCES)
def test_a_block_whose_loss_gradient_is_zero_has_reached_its_target(name):
    rule = build(name, dense(), make_task())
    x, y = batch(rule.task)
    rule.task = FixedError(rule.task, torch.zeros(len(x), CLASSES, dtype=torch.float64))
    result, found = learned(rule, x, y)
    for n, g in found.items():
        if n.startswith("network."):
            assert float(g.abs().max()) < 1e-12, n
    assert all(float(values["target_distance"]) < 1e-12 for values in result.blocks.values() if "target_distance" in values)


def test_target_propagation_moves_towards_what_its_inverses_make_of_it_even_then():
    rule = build("tp", dense(), make_task(), top="gradient")
    x, y = batch(rule.task)
    rule.task = FixedError(rule.task, torch.zeros(len(x), CLASSES, dtype=torch.float64))
    assert all(g.abs().max() > 1e-3 for n, g in learned(rule, x, y)[1].items() if ".fc" in n and n.startswith("network."))


def test_the_label_is_the_target_of_the_probabilities():
    """With beta 1 the head's inverse is given the label itself; otherwise so much of the way from the probabilities."""
    network, task = dense((6, 5)), make_task()
    x, y = batch(task)
    h = network.blocks["fc1"](x).detach()
    p = network.head(h).softmax(1).detach()
    for beta in (1.0, .25):
        rule = build("tp", network, task, beta=beta, feedback_steps=0)
        target = rule.inverses["head"]((1 - beta) * p + beta * F.one_hot(y, CLASSES)).detach()
        layer = linear(network, "fc1")
        expected = (((h - target) / beta) * (1 - h**2)).T @ x
        assert_same({"w": learned(rule, x, y)[1]["network.blocks.fc1.linear.weight"]}, {"w": expected})
    for loss in ("bce", "mse"):      # of a squared error both are the same
        rule = build("dtp", network, make_task(loss=loss), feedback_steps=0)
        by_gradient = learned(rule, x, y)[1]
        rule = build("dtp", network, make_task(loss=loss), feedback_steps=0, top="label")
        other = build("dtp", network, make_task(loss=loss), feedback_steps=0)
        other.inverses.load_state_dict(rule.inverses.state_dict())
        by_gradient, by_label = (learned(r, x, y)[1]["network.blocks.fc1.linear.weight"] for r in (other, rule))
        assert torch.allclose(by_gradient, by_label) == (loss == "mse")


def test_from_the_last_hidden_block_on_the_heads_own_weights_bring_the_target_down():
    network, task = dense(), make_task()
    rule = build("dtp", network, task, top="hidden", beta=.01)
    assert set(rule.inverses) == {"fc2", "fc3"}
    x, y = batch(task)
    found, expected = learned(rule, x, y)[1], backprop(network, x, y)
    for part in ("blocks.fc3.linear.weight", "blocks.fc3.linear.bias", "blocks.head.weight"):
        torch.testing.assert_close(found[f"network.{part}"], expected[f"network.{part}"])
    assert not torch.allclose(found["network.blocks.fc2.linear.weight"], expected["network.blocks.fc2.linear.weight"])
    with pytest.raises(Refused, match="algo=dtp with algo.top=hidden.*arch.widths"):
        build("dtp", dense((6, 5)), task, top="hidden")


def test_targets_of_target_propagation_carry_no_weights():
    """A unit's incoming weights times -1 and outgoing times -1: the targets of all blocks stay as they were."""
    network, task = dense(), make_task()
    rule, (x, y) = build("tp", network, task), batch(task)

    def targets():
        with torch.no_grad():
            values = rule._values(x, walk(network, x))
            return bring_down(values, rule.inverses, values["head"] - task.error(network(x), y), False)[0]

    before = targets()
    with torch.no_grad():
        lower, upper = linear(network, "fc2"), linear(network, "fc3")
        lower.weight[1] *= -1
        lower.bias[1] *= -1
        upper.weight[:, 1] *= -1
    after = targets()
    for name in before:
        torch.testing.assert_close(after[name], before[name], rtol=1e-12, atol=1e-14)


def test_fixed_linear_maps_by_hand():
    network, task = dense(), make_task()
    rule = build("fw_dtp", network, task, inverse_activation="none")
    x, y = batch(task)
    start = tensors(rule.inverses)
    found = learned(rule, x, y)[1]
    values = {n: h.detach() for n, h in walk(network, x).items()}
    signal, inputs = task.error(values["head"], y), {"fc1": x, "fc2": values["fc1"], "fc3": values["fc2"]}
    expected = {}
    for below, above in (("fc3", "head"), ("fc2", "fc3"), ("fc1", "fc2")):
        signal = signal @ rule.inverses[above].weight.T
        expected[below] = (signal * (1 - values[below] ** 2)).T @ inputs[below]
    assert_same({n: found[f"network.blocks.{n}.linear.weight"] for n in expected}, expected)
    step(rule, stepper(rule), x, y)
    assert not changed(start, rule.inverses) and set(rule.groups()) == {"forward"}


def test_the_direct_signal_is_the_error_through_one_matrix():
    network, task = dense(), make_task()
    rule = build("ddtp_linear", network, task)
    x, y = batch(task)
    found = learned(rule, x, y)[1]
    values = {n: h.detach() for n, h in walk(network, x).items()}
    error, inputs = task.error(values["head"], y), {"fc1": x, "fc2": values["fc1"], "fc3": values["fc2"]}
    expected = {n: (error @ rule.matrices[n].detach() * (1 - values[n] ** 2)).T @ inputs[n] for n in inputs}
    assert_same({n: found[f"network.blocks.{n}.linear.weight"] for n in expected}, expected)


# ---- what inverses learn

def stretched(sizes, outputs):
    """Linear blocks; what reaches fc2 is white; the singular values of fc2 and of the head are 1.5, 1, 1/1.5 ..."""
    network = dense(sizes, outputs, activation=nn.Identity)
    with torch.no_grad():
        for name in network.blocks:
            weight = linear(network, name).weight
            u, s, v = torch.linalg.svd(weight, full_matrices=False)
            s = torch.ones_like(s) if name == "fc1" else 1.5 ** (1 - torch.arange(len(s)).to(s))
            weight.copy_(u @ torch.diag(s) @ v)
            linear(network, name).bias.zero_()
    return network


def trained(name, network, task, steps=800, **knobs):
    rule = build(name, network, task, **knobs)
    apply = stepper(rule, "adam", lr=.01)
    for i in range(steps):
        apply.learning_rates(1 - i / steps)
        step(rule, apply, *batch(task, 64), learn=rule.learn_feedback)
    return rule


@pytest.mark.parametrize("name", ["tp", "dtp"])
def test_reconstruction_leads_to_the_pseudo_inverse_and_not_to_the_transpose(name):
    network = stretched((6, 5, 4), CLASSES)
    rule = trained(name, network, make_task(), top="gradient")
    g, weight = rule.inverses["fc2"].weight.detach(), linear(network, "fc2").weight.detach()
    assert degrees(g, torch.linalg.pinv(weight)) < 3
    assert degrees(g, weight.T) > 30
    assert float(g.norm() / torch.linalg.pinv(weight).norm()) == pytest.approx(1, rel=.05)


def test_reconstruction_through_a_tanh_leads_to_the_inverse_of_its_slope():
    """At small values tanh is the identity; here it bends. The Jacobian of g at f(0) = 0 beside those of f."""
    network = dense((6, 4, 4), activation=nn.Tanh)
    with torch.no_grad():
        for name in network.blocks:
            linear(network, name).bias.zero_()
        u, _, v = torch.linalg.svd(linear(network, "fc2").weight)
        linear(network, "fc2").weight.copy_(u @ torch.diag(torch.tensor([1.6, 1, .6, .4]).double()) @ v)
        linear(network, "fc1").weight.mul_(.5)
    rule = trained("dtp", network, make_task(), noise=.3)
    zero = torch.zeros(4, dtype=torch.float64)
    back = torch.autograd.functional.jacobian(lambda t: rule.inverses["fc2"](t[None])[0], network.blocks["fc2"](zero[None])[0].detach())
    forth = torch.autograd.functional.jacobian(lambda h: network.blocks["fc2"](h[None])[0], zero)
    assert degrees(back, torch.linalg.pinv(forth)) < 10
    assert degrees(back, forth.T) > 30


def test_the_way_back_from_the_output_learns_to_invert_the_way_to_it():
    """Linear blocks of 5, 5, 4: what comes down to fc1 through both inverses, beside the pseudo-inverse of head and fc2 together."""
    network = stretched((6, 5, 5), CLASSES)
    rule = trained("dtp_drl", network, make_task())
    back = (rule.inverses["fc2"].weight @ rule.inverses["head"].weight).detach()
    forth = (linear(network, "head").weight @ linear(network, "fc2").weight).detach()
    assert degrees(back, torch.linalg.pinv(forth)) < 5
    assert degrees(back, forth.T) > 30


def test_a_direct_matrix_learns_to_invert_all_that_is_above():
    network = stretched((6, 5, 5), CLASSES)
    rule = trained("ddtp_linear", network, make_task(), steps=1500)
    forth = linear(network, "head").weight.detach()
    for name, above in (("fc2", forth), ("fc1", forth @ linear(network, "fc2").weight.detach())):
        assert degrees(rule.matrices[name].T, torch.linalg.pinv(above)) < 5
        assert degrees(rule.matrices[name].T, above.T) > 30


# ---- how they are trained

@pytest.mark.parametrize("epochs", [0, 2])
@pytest.mark.parametrize("name", LEARNED)
def test_a_first_phase_moves_feedback_alone(name, epochs):
    rule = build(name, dense(), make_task(), feedback_epochs=epochs)
    phases = rule.phases()
    assert [(p.name, p.epochs) for p in phases] == [("feedback", epochs)] * bool(epochs) + [("train", None)]
    before = tensors(rule)
    step(rule, stepper(rule), *batch(rule.task), learn=phases[0].learn)
    moved = changed(before, rule)
    groups = {id(p): group for group, parameters in rule.groups().items() for p in parameters}
    names = {n: groups[id(p)] for n, p in rule.named_parameters()}
    assert {n for n, group in names.items() if group == "feedback"} <= moved
    assert any(names[n] == "forward" for n in moved) == (epochs == 0)


@pytest.mark.parametrize("steps", [0, 1, 3])
@pytest.mark.parametrize("name", LEARNED)
def test_the_way_back_is_trained_so_many_times_a_batch(name, steps):
    rule, seen = build(name, dense(), make_task(), feedback_steps=steps), []
    rule.learn(*batch(rule.task), lambda group, loss=None: seen.append(group))
    assert seen == ["feedback"] * steps


@pytest.mark.parametrize("name", LEARNED)
def test_noise_is_neither_normalised_nor_dropped(name):
    for network, knob in ((dense(norm=nn.BatchNorm1d), "arch.norm="), (dense(dropout=.3), "arch.dropout="),
                          (dense(activation=ACTIVATIONS["bernoulli_ste"]), "would draw others for each; use arch.activation=step_ste")):
        with pytest.raises(Refused, match=f"algo={name} .*block fc1.*{knob}"):
            build(name, network, make_task())


def test_fixed_maps_take_batch_norm_and_dropout():
    rule = build("fw_dtp", dense(norm=nn.BatchNorm1d, dropout=.3), make_task())
    before = tensors(rule)
    step(rule, stepper(rule), *batch(rule.task))
    assert {n.split(".")[2] for n in changed(before, rule) if n.startswith("network.blocks")} == set(rule.network.blocks)


@pytest.mark.parametrize("name", LEARNED)
def test_bounded_units_do_not_hide_an_input_that_is_not_finite(name):
    rule = build(name, dense(), make_task())
    x, y = batch(rule.task)
    x[2, 1] = torch.inf
    before = tensors(rule)
    for learn in (rule.learn_feedback, rule.learn):
        with pytest.raises(Diverged):
            step(rule, stepper(rule), x, y, learn=learn)
        assert not changed(before, rule)


# ---- what is measured

@pytest.mark.parametrize("name", [*BY_DIFFERENCES, "tp"])
def test_what_is_logged(name):
    rule, (x, y) = build(name, dense(), make_task()), batch(make_task())
    measure = Measure(rule, rule.task)
    with measure.before(x, y):
        result = rule.learn(x, y, lambda group, loss=None: None)
    layers = measure.record(result.blocks)["layers"]
    rebuilds = name in ("tp", "dtp")
    for block in rule.network.hidden:
        assert {"target_distance", "delta_alignment_deg"} <= set(layers[block])
        assert ("reconstruction_error" in layers[block]) == (rebuilds and block != "head")
    assert layers["head"]["delta_alignment_deg"] < 1e-5
    assert ("feedback_loss" in layers["head"]) == (name != "fw_dtp")
    if rebuilds:
        h = rule.network.blocks["fc1"](x)
        back = rule.inverses["fc2"](rule.network.blocks["fc2"](h))
        expected = ((back - h).square().sum(1) / h.square().sum(1)).mean()
        assert layers["fc1"]["reconstruction_error"] == pytest.approx(float(expected.detach()))


def test_the_angle_of_displacements_to_backprop_is_that_of_the_deltas():
    network, task = dense(activation=nn.Identity), make_task()
    rule = build("fw_dtp", network, task)
    x, y = batch(task)
    measure = Measure(rule, task)
    with measure.before(x, y):
        result = rule.learn(x, y, lambda group, loss=None: None)
    layers = measure.record(result.blocks)["layers"]
    error = task.error(network(x), y)
    displacement, truth = error @ rule.inverses["head"].weight.T, error @ network.head.weight.detach()
    assert layers["fc3"]["delta_alignment_deg"] == pytest.approx(degrees(displacement, truth))
    assert layers["fc3"]["target_distance"] == pytest.approx(float((rule.beta * displacement).norm(dim=1).mean()))


# ---- other shapes

@pytest.mark.parametrize("name", [*BY_DIFFERENCES, "tp"])
def test_tokens(name):
    """A network that answers each token: one inverse for all tokens."""
    network = Network.of(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, CLASSES)), (3, 4)).double()
    task = Task("classification", (3, 4), CLASSES, CLASSES, "cross_entropy", 0.0, torch.float64)
    rule = build(name, network, task)
    x, y = torch.randn(6, 3, 4, dtype=torch.float64), torch.arange(18).view(6, 3) % CLASSES
    y[0, 1] = -100
    if hasattr(rule, "inverses"):
        assert {tuple(p.shape) for p in rule.inverses["fc2"].parameters() if p.dim() > 1} == {(6, 5)}
    two_steps(rule, x, y)


@pytest.mark.parametrize("name", [*BY_DIFFERENCES, "tp"])
def test_real_targets_train(name):
    task = regression()
    rule = build(name, dense(outputs=2), task)
    two_steps(rule, *batch(task))


def test_pooling_that_cannot_be_undone_is_refused():
    network = Network.of(nn.Sequential(nn.Conv2d(1, 2, 3), nn.Tanh(), nn.Conv2d(2, 3, 3), nn.Tanh(), nn.AdaptiveAvgPool2d((2, 1)),
                                       nn.Flatten(), nn.Linear(6, CLASSES)), (1, 9, 9)).double()
    for name in ("dtp", "fw_dtp"):
        with pytest.raises(Refused, match=f"algo={name} cannot undo block conv2's pooling"):
            build(name, network, make_task((1, 9, 9)))
