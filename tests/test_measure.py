"""Measuring: what is measured is right, and nothing of the training changes by it."""

import math
import statistics

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import (ALGOS, CLASSES, RECURRENT, Log, arrays, batch, build, configuration, dense, make_task, solves, stepper,
                      task_of, tensors, unrolled)
from torch import nn

from lbp.algos.baseline.bp import BP
from lbp.algos.rule import Learned
from lbp.archs.network import Layer, Network
from lbp.errors import Diverged, Refused
from lbp.metrics.measure import Measure, _activity, angle, joint, norm, products_of
from lbp.training import loop
from lbp.training.setup import build as build_experiment


def measured(rule, x, y, learn=None, **settings):
    """One measured step, as the trainer takes it; (the record, what Measure held)."""
    apply, measure = stepper(rule, **settings), Measure(rule, rule.task)
    apply.count, apply.observe = len(x), measure.collect
    with measure.before(x, y):
        result = (learn or rule.learn)(x, y, apply)
    apply.finish(result.loss)
    return measure.record(result.blocks), measure


def network_with_everything():
    return dense((6, 9, 8, 7), activation=nn.ReLU, norm=nn.BatchNorm1d, dropout=.3)


@pytest.mark.parametrize("a, b, degrees", [
    ([3., 0.], [5., 0.], 0), ([1., 0.], [0., 2.], 90), ([1., 1.], [-2., -2.], 180), ([1., 0.], [1., 1.], 45),
    ([1., 0.], [math.sqrt(3), 1.], 30), ([1., 0.], [1., 1e-9], math.degrees(1e-9)), ([1., 2., 2.], [-1., -2., -2.], 180),
])
def test_angles_of_known_vectors(a, b, degrees):
    a, b = torch.tensor(a, dtype=torch.float64), torch.tensor(b, dtype=torch.float64)
    assert angle(products_of(a, b)) == pytest.approx(degrees, rel=1e-6, abs=1e-12)
    several = joint([products_of(a[:1], b[:1]), products_of(a[1:], b[1:])])      # several tensors are one vector
    assert angle(several) == pytest.approx(degrees, abs=1e-6)


def test_an_angle_to_nothing_is_undefined_and_norms_are_joint():
    assert angle(products_of(torch.zeros(2), torch.ones(2))) is None
    assert norm([torch.tensor([3.]), torch.tensor([[4.]])]) == pytest.approx(5)


def test_activity():
    h = torch.tensor([[1., 0., 2.], [3., 0., 2.]])
    found = _activity(h)
    assert found["activation_mean"] == pytest.approx(8 / 6) and found["activation_std"] == pytest.approx(statistics.pstdev(h.flatten().tolist()))
    assert found["dead_fraction"] == pytest.approx(2 / 3)     # two units that do not vary
    maps = torch.zeros(2, 4, 3, 3)
    maps[0, 1, 2, 2] = 1
    assert _activity(maps)["dead_fraction"] == pytest.approx(3 / 4)


def test_the_shadow_is_plain_autograd_under_the_same_dropout_mask_and_touches_nothing():
    network, task = network_with_everything(), make_task()
    rule = build("dfa", network, task)
    x, y = batch(task, 16)
    torch.manual_seed(7)
    state, before = torch.get_rng_state(), tensors(rule)
    measure = Measure(rule, task)
    measure.before(x, y)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(t, before[n]) for n, t in tensors(rule).items())
    assert all(p.grad is None for p in rule.parameters())
    loss = F.cross_entropy(network(x), y, reduction="sum")
    expected = dict(zip((n for n, _ in network.named_parameters()), torch.autograd.grad(loss, list(network.parameters()))))
    assert set(measure.shadow) == set(expected)
    assert all(torch.equal(measure.shadow[n], g) for n, g in expected.items())


@pytest.mark.parametrize("build_network", [dense, network_with_everything], ids=["plain", "batch norm, dropout"])
def test_backprop_is_aligned_with_itself(build_network):
    network, task = build_network(), make_task()
    x, y = batch(task, 16)
    gradients = {}
    torch.manual_seed(3)
    loss = F.cross_entropy(network(x), y, reduction="mean")
    for (name, p), g in zip(network.named_parameters(), torch.autograd.grad(loss, list(network.parameters()))):
        gradients.setdefault(name.split(".")[1], []).append(g)
    torch.manual_seed(3)
    record, _ = measured(build("bp", network, task), x, y, lr=.1)
    assert list(record["layers"]) == list(network.blocks)
    for block, values in [*record["layers"].items(), ("total", record["total"])]:
        assert values["alignment_deg"] == 0 and values["alignment_weight_deg"] == 0 and values["alignment_bias_deg"] == 0
        assert values["grad_norm_ratio"] == 1 and values["delta_alignment_deg"] == 0
        parts = gradients[block] if block != "total" else [g for gs in gradients.values() for g in gs]
        expected = math.sqrt(sum(float(g.square().sum()) for g in parts))     # of the mean loss
        assert values["grad_norm"] == pytest.approx(expected) and values["backprop_grad_norm"] == pytest.approx(expected)


def test_values_of_a_layer_by_hand():
    """fa: alignment from plain autograd, weight norm, update ratio of a plain step, feedback alignment with B."""
    network, task = dense((6, 7, 5)), make_task()
    rule = build("fa", network, task)
    x, y = batch(task)
    layer, lr = network.blocks["fc1"], .1
    true = torch.autograd.grad(F.cross_entropy(network(x), y, reduction="sum"), [layer.linear.weight, layer.linear.bias])
    w = [layer.linear.weight.detach().clone(), layer.linear.bias.detach().clone()]
    b = rule.blocks_fc2_linear_weight
    delta2 = (F.softmax(network(x), 1) - F.one_hot(y, CLASSES)) @ rule.blocks_head_weight * (1 - network.blocks["fc2"](network.blocks["fc1"](x)) ** 2)
    delta1 = (delta2 @ b * (1 - network.blocks["fc1"](x) ** 2)).detach()
    own = [delta1.T @ x, delta1.sum(0)]

    def flat(tensors):
        return torch.cat([t.flatten() for t in tensors])

    def degrees(p, q):
        return math.degrees(math.acos(float(F.cosine_similarity(flat(p), flat(q), dim=0))))

    alignment = degrees(own, true)
    used = network.blocks["fc2"].linear.weight.detach().clone()     # what the batch met, not what the step leaves
    feedback = degrees([used], [b])
    record, _ = measured(rule, x, y, lr=lr)
    values = record["layers"]["fc1"]
    assert values["alignment_deg"] == pytest.approx(alignment, abs=1e-6) and alignment > 1
    assert values["alignment_weight_deg"] == pytest.approx(degrees(own[:1], true[:1]), abs=1e-6)
    assert values["alignment_bias_deg"] == pytest.approx(degrees(own[1:], true[1:]), abs=1e-6)
    assert values["grad_norm"] == pytest.approx(float(flat(own).norm()) / len(x))
    assert values["grad_norm_ratio"] == pytest.approx(float(flat(own).norm() / flat(true).norm()))
    assert values["update_ratio"] == pytest.approx(lr * float(flat(own).norm()) / len(x) / float(flat(w).norm()))
    moved = flat([layer.linear.weight.detach(), layer.linear.bias.detach()])
    assert values["weight_norm"] == pytest.approx(float(moved.norm()))
    assert record["layers"]["fc2"]["feedback_alignment_deg"] == pytest.approx(feedback, abs=1e-6)
    assert record["layers"]["fc2"]["feedback_norm_ratio"] == pytest.approx(float(b.norm() / used.norm()))
    assert record["layers"]["fc2"]["feedback_distance"] == pytest.approx(float((used - b).norm() / used.norm()))
    assert "feedback_alignment_deg" not in values     # no feedback stands in for the first weight
    assert values["activation_mean"] == pytest.approx(float(torch.tanh(x @ w[0].T + w[1]).mean()))


class TwoApplies(BP):
    """Backprop that steps after each half of the batch."""

    def learn(self, x, y, apply):
        losses = []
        for rows in (slice(0, 3), slice(3, None)):
            loss = self.task.loss(self.network(x[rows]), y[rows])
            loss.sum().backward()
            apply("forward", loss.detach())
            losses.append(loss.detach())
        return Learned(None, torch.cat(losses))


def test_several_applies_of_a_batch_are_added_up():
    network, task = dense(), make_task()
    record, _ = measured(TwoApplies(network, task), *batch(task), lr=1e-300)     # steps, but to the same weights
    assert record["total"]["alignment_deg"] < 1e-6 and record["total"]["grad_norm_ratio"] == pytest.approx(1, rel=1e-12)


def test_alignment_is_taken_before_clipping():
    network, task = dense(), make_task()
    record, _ = measured(build("bp", network, task), *batch(task), clip=1e-6)
    assert record["total"]["grad_norm_ratio"] == 1


def test_what_a_rule_does_not_move_has_no_alignment():
    network, task = dense(), make_task()
    record, _ = measured(build("shallow", network, task), *batch(task), lr=.1)
    assert record["layers"]["head"]["alignment_deg"] == record["layers"]["head"]["delta_alignment_deg"] == 0
    for block in network.hidden:
        assert not {"alignment_deg", "delta_alignment_deg", "grad_norm", "update_ratio", "backprop_grad_norm"} & set(record["layers"][block])
        assert record["layers"][block]["weight_norm"] > 0


def test_measuring_one_value_warns_of_nothing():
    """A batch of one sample under a network with one output: one value does not spread."""
    network = Network({"fc1": nn.Linear(6, 5), "head": nn.Linear(5, 1)}, (6,)).double()
    task = make_task()
    task = type(task)("regression", (6,), 1, None, "mse", 0.0, torch.float64)
    record, _ = measured(build("bp", network, task), *batch(task, 1))
    assert record["layers"]["head"]["activation_std"] == 0


# ---- feedback

def test_feedback_that_is_the_weight_is_at_distance_nought_exactly():
    network, task = dense(), make_task()
    rule = build("fa", network, task)
    for name, weight in rule.sites.items():
        getattr(rule, name.replace(".", "_")).copy_(weight)
    for values in _with(measured(rule, *batch(task), lr=.1)[0], "feedback_distance", 4):
        assert (values["feedback_alignment_deg"], values["feedback_norm_ratio"], values["feedback_distance"]) == (0, 1, 0)


def test_feedback_twice_as_long_and_none_at_all():
    network, task = dense((6, 7)), make_task()
    rule = build("fa", network, task)
    b = rule.blocks_head_weight
    for factor in (2.0, 0.0, -1.0):
        b.copy_(factor * network.head.weight.detach())
        values = measured(rule, *batch(task), lr=.1)[0]["layers"]["head"]
        assert values["feedback_norm_ratio"] == pytest.approx(abs(factor), abs=1e-12)
        assert values["feedback_distance"] == pytest.approx(abs(1 - factor), abs=1e-12)
        assert values.get("feedback_alignment_deg") == {2.0: 0, 0.0: None, -1.0: 180}[factor]


# ---- the errors at the layers

def _with(record, key, count):
    found = [values for values in (*record["layers"].values(), record["total"]) if key in values]
    assert len(found) == count
    return found


def plain_numbers(network, x, y):
    """Of a tanh network of Layers: inputs, activations and output error in float64, by numpy."""
    h, hs = x.numpy(), []
    for layer in network.hidden.values():
        h = np.tanh(h @ layer.linear.weight.detach().numpy().T + layer.linear.bias.detach().numpy())
        hs.append(h)
    out = h @ network.head.weight.detach().numpy().T + network.head.bias.detach().numpy()
    p = np.exp(out - out.max(1, keepdims=True))
    return hs, p / p.sum(1, keepdims=True) - np.eye(CLASSES)[y.numpy()]


def degrees_between(*pairs):
    a, b = (np.concatenate([side.ravel() for side in sides]) for sides in zip(*pairs))
    return math.degrees(math.acos(min(1.0, a @ b / np.linalg.norm(a) / np.linalg.norm(b))))


@pytest.mark.parametrize("name", ["fa", "dfa"])
def test_deltas_are_those_of_a_computation_by_hand(name):
    network, task = dense((6, 7, 5)), make_task()
    rule = build(name, network, task)
    x, y = batch(task)
    (h1, h2), error = plain_numbers(network, x, y)
    w2, w3 = (w.detach().numpy().copy() for w in (network.blocks["fc2"].linear.weight, network.head.weight))
    if name == "fa":
        b2, b3 = rule.blocks_fc2_linear_weight.numpy(), rule.blocks_head_weight.numpy()
    true2 = error @ w3 * (1 - h2**2)
    true1 = true2 @ w2 * (1 - h1**2)
    if name == "fa":
        delta2 = error @ b3 * (1 - h2**2)
        delta1 = delta2 @ b2 * (1 - h1**2)
    else:
        delta2 = error @ rule.projection_fc2.numpy() * (1 - h2**2)
        delta1 = error @ rule.projection_fc1.numpy() * (1 - h1**2)
    record, _ = measured(rule, x, y, lr=.1)
    found = {block: values["delta_alignment_deg"] for block, values in record["layers"].items()}
    assert found["fc1"] == pytest.approx(degrees_between((delta1, true1)), abs=1e-6) and found["fc1"] > 10
    assert found["fc2"] == pytest.approx(degrees_between((delta2, true2)), abs=1e-6) and found["fc2"] > 10
    assert found["head"] < 1e-6
    assert record["total"]["delta_alignment_deg"] == pytest.approx(degrees_between((delta1, true1), (delta2, true2), (error, error)), abs=1e-6)


def test_deltas_of_a_convolution():
    """Under dfa one convolution, its bias and tanh: dL/da is what the bias adds up, place by place."""
    task = make_task((2, 6, 6))
    network = Network({"conv1": Layer(nn.Conv2d(2, 3, 3), None, nn.Tanh(), 0.0, nn.Flatten()), "head": nn.Linear(48, CLASSES)}, (2, 6, 6)).double()
    rule = build("dfa", network, task)
    x, y = batch(task)
    a = network.blocks["conv1"].linear(x).detach().requires_grad_()
    h = torch.tanh(a).flatten(1)
    true, = torch.autograd.grad(F.cross_entropy(network.head(h), y, reduction="sum"), a)
    error = task.error(network.head(h).detach(), y)
    own = (error @ rule.projection_conv1).view_as(a) * (1 - torch.tanh(a.detach()) ** 2)
    record, _ = measured(rule, x, y, lr=.1)
    assert record["layers"]["conv1"]["delta_alignment_deg"] == pytest.approx(degrees_between((own.numpy(), true.numpy())), abs=1e-6)
    assert measured(build("bp", network, task), x, y)[0]["total"]["delta_alignment_deg"] < 1e-6


def test_deltas_under_autocast_are_compared_in_fp32():
    network, task = dense((6, 7, 5)).float(), make_task(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        record, _ = measured(build("bp", network, task), *batch(task))
    assert all(values["delta_alignment_deg"] < 1e-3 for values in _with(record, "delta_alignment_deg", 4))


class Often(BP):
    """Backprop that calls the head twice, or teaches all twice."""

    def learn(self, x, y, apply):
        out = self.network(x)
        if self.how == "called twice":
            out = out + self.network.head(x.new_zeros(len(x), self.network.head.in_features))
        loss = self.task.loss(out, y)
        loss.sum().backward(retain_graph=self.how == "taught twice")
        if self.how == "taught twice":
            loss.sum().backward()
        return Learned(out.detach(), loss.detach())


@pytest.mark.parametrize("how, blocks", [("called twice", ["fc1"]), ("taught twice", []), ("as ever", ["fc1", "head"])])
def test_what_has_no_one_delta_has_none(how, blocks):
    network, task = dense((6, 7)), make_task()
    rule = Often(network, task)
    rule.how = how
    record, _ = measured(rule, *batch(task))
    assert [name for name, values in record["layers"].items() if "delta_alignment_deg" in values] == blocks
    assert ("delta_alignment_deg" in record["total"]) == bool(blocks)


def test_an_error_that_is_cut_off_on_its_way_is_none():
    class Cut(torch.autograd.Function):
        forward = staticmethod(lambda ctx, h: h.clone())
        backward = staticmethod(lambda ctx, error: None)

    class CutOff(BP):
        def learn(self, x, y, apply):
            out = self.network.head(Cut.apply(self.network.blocks["fc1"](x)))
            loss = self.task.loss(out, y)
            loss.sum().backward()
            return Learned(out.detach(), loss.detach())

    network, task = dense((6, 7)), make_task()
    record, _ = measured(CutOff(network, task), *batch(task))
    assert "delta_alignment_deg" not in record["layers"]["fc1"] and record["layers"]["head"]["delta_alignment_deg"] == 0


def test_forward_forward_has_no_delta_beside_backprops():
    network, task = dense(), make_task()
    record, _ = measured(build("forward_forward", network, task), *batch(task))
    assert not any("delta_alignment_deg" in values for values in (*record["layers"].values(), record["total"]))


def hooks(network):
    return [hook for module in network.modules() for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())]


@pytest.mark.parametrize("name", ["bp", "dfa", "forward_forward"])
def test_no_hook_stays_behind(name):
    network, task = dense(), make_task()
    _, measure = measured(build(name, network, task), *batch(task))
    assert not hooks(network) and not measure.deltas.calls and not measure.true_deltas.calls


def test_no_hook_stays_behind_a_batch_that_is_refused(tmp_path):
    values = configuration("bp", "mlp", arch__widths=[5], metrics__every=1, trainer__on_nonfinite="skip")
    experiment = build_experiment(values, arrays((1, 5, 5), n=40))
    experiment.data.train.x[experiment.data.train.order(0)[9]] = math.nan
    log = Log()
    loop.train(experiment, log, tmp_path)
    assert [r["step"] for r in log if r["split"] == "train"] == [1, 3, 4, 5] and not hooks(experiment.network)
    values["trainer"]["on_nonfinite"] = "stop"
    experiment = build_experiment(values, arrays((1, 5, 5), n=40))
    experiment.data.train.x[:] = math.nan
    with pytest.raises(Diverged):
        loop.train(experiment, Log(), tmp_path)
    assert not hooks(experiment.network)


@pytest.mark.parametrize("knobs", [{"norm": "batch", "dropout": .3}, {"dropout": .3}], ids=["batch norm, dropout", "dropout"])
@pytest.mark.parametrize("name", ALGOS)
def test_measuring_changes_nothing_of_the_training(name, knobs, tmp_path):
    ends, data = [], arrays((1, 5, 5))
    for every in (1, 0):
        values = configuration(name, "mlp", arch__widths=[9, 8], metrics__every=every, metrics__batches=2 * every, trainer__clip=.5,
                               **{f"arch__{k}": v for k, v in knobs.items()})
        try:
            experiment = build_experiment(values, data)
        except Refused:
            pytest.skip(f"{name} takes no {' '.join(knobs)}")
        log = Log()
        loop.train(experiment, log, tmp_path / str(every))
        ends.append(tensors(experiment.rule))
        per_layer = [record for record in log if "layers" in record and record["split"] == "train"]    # a solver tells its own at epochs' ends
        assert bool(per_layer) == (every == 1 and not solves(experiment.rule)) and not hooks(experiment.network)
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(ends[0][n], t) for n, t in ends[1].items())


@pytest.mark.parametrize("name", ALGOS)
def test_every_measured_value_is_a_finite_number(name):
    network = unrolled() if name in RECURRENT else dense()
    task = task_of(name, network.in_shape)
    rule = build(name, network, task)
    if solves(rule):
        pytest.skip(f"{name} solves: no batch of it is measured")
    record, _ = measured(rule, *batch(task), lr=.01)
    assert list(record["layers"]) == list(rule.network.blocks)
    for values in [*record["layers"].values(), record.get("total", {})]:
        for key, value in values.items():
            assert isinstance(value, float) and math.isfinite(value), key
            assert not key.endswith("_deg") or 0 <= value <= 180


def test_every_so_many_steps_and_the_first_and_last(tmp_path):
    values = configuration("bp", "mlp", arch__widths=[5], metrics__every=4, trainer__epochs=2)
    log = Log()
    loop.train(build_experiment(values, arrays((1, 5, 5), n=40)), log, tmp_path)      # 5 batches of 8 an epoch
    assert [r["step"] for r in log if r["split"] == "train"] == [1, 4, 8, 10]
