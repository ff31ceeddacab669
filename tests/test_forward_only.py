"""The forward-only family against its equations, in float64: Forward-Forward's variants, channel-wise competition, PEPITA."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import CLASSES, batch, build, changed, dense, learned, make_task, regression, stepper, tensors, train
from test_contracts import GlobalNoise
from test_oracles import Given, arrays_of, convolutional, forward_forward_by_hand, softmax_error
from torch import nn

from lbp.algos.forward.cwc import class_goodness
from lbp.algos.forward.forward_forward import MOMENTUM, drawn_but, unit_length, variance_of_means
from lbp.archs.hard import Bernoulli
from lbp.archs.network import Layer, Network
from lbp.errors import Refused
from lbp.metrics.measure import angle, products_of


# ---- PEPITA

class Masks(nn.Module):
    """In place of a dropout: gives the mask that it was given, and counts how often it is asked for one."""

    def __init__(self, mask):
        super().__init__()
        self.mask, self.asked = mask, 0

    def forward(self, x):
        self.asked += 1
        return x * self.mask


def pepita_by_hand(layers, masks, x, y, projection):
    """{parameter: -its movement}: both passes under the same masks, in numpy."""
    def run(x):
        values = [x]
        for (w, b), mask in zip(layers[:-1], masks):
            values.append(np.tanh(values[-1] @ w.T + b) * mask)
        return values, values[-1] @ layers[-1][0].T + layers[-1][1]

    first, out = run(x)
    second, again = run(x + softmax_error(out, y) @ projection)
    differences = [*(a - b for a, b in zip(first[1:], second[1:])), softmax_error(again, y)]
    found = {}
    for i, (difference, below) in enumerate(zip(differences, second), 1):
        block = "head" if i == len(layers) else f"fc{i}.linear"
        found[f"network.blocks.{block}.weight"] = difference.T @ below
        found[f"network.blocks.{block}.bias"] = difference.sum(0)
    return found, out


@pytest.mark.parametrize("dropout", [False, True])
def test_pepita_equals_its_equations(dropout):
    network, task = dense(), make_task()
    rule = build("pepita", network, task, scale=.7)
    x, y = batch(task)
    masks = [np.ones(1)] * 3
    if dropout:
        for i, block in enumerate(network.hidden.values()):
            block.dropout = Masks((torch.rand(len(x), network.shapes[f"fc{i + 1}"][0]) < .7).double() / .7)
            masks[i] = block.dropout.mask.numpy()
            assert (masks[i] == 0).any()
        network.__dict__.pop("shapes", None)
    result, found = learned(rule, x, y)
    expected, out = pepita_by_hand(arrays_of(network), masks, x.numpy(), y.numpy(), rule.projection.numpy())
    assert set(found) == set(expected)
    for name, g in expected.items():
        np.testing.assert_allclose(found[name].numpy(), g, rtol=1e-9, atol=1e-12, err_msg=name)
    np.testing.assert_allclose(result.out.numpy(), out, rtol=1e-10)
    if dropout:
        assert all(block.dropout.asked == 1 for block in network.hidden.values())   # one mask for both passes


def test_pepita_draws_one_mask_for_both_passes():
    """Without modulation both passes are the same, so no hidden layer moves: true dropout included."""
    network, task = dense(dropout=.5), make_task()
    found = learned(build("pepita", network, task, scale=0.0), *batch(task))[1]
    for name, g in found.items():
        assert bool(g.any()) == (".head." in name), name


def test_pepita_without_modulation_trains_the_last_layer_alone():
    network, task = dense(), make_task()
    rule = build("pepita", network, task, scale=0.0)
    x, y = batch(task)
    before = tensors(rule)
    train(rule, [(x, y)] * 2)
    assert changed(before, rule) == {"network.blocks.head.weight", "network.blocks.head.bias"}
    network = dense()
    expected = torch.autograd.grad(F.cross_entropy(network(x), y, reduction="sum"), network.head.weight)[0]
    found = learned(build("pepita", network, task, scale=0.0), x, y)[1]["network.blocks.head.weight"]
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)     # the head learns by its true gradient


@pytest.mark.parametrize("positions", ["mean", "root", "sum"])
def test_pepita_convolutions_take_the_product_at_every_position_before_pooling(positions):
    network = convolutional(nn.Conv2d(2, 3, 3, 2, 1), nn.Tanh(), nn.MaxPool2d(2), in_shape=(2, 9, 9))
    task = make_task((2, 9, 9))
    rule = build("pepita", network, task, scale=.7, positions=positions)
    x, y = batch(task, 5)
    found = learned(rule, x, y)[1]
    conv = next(m for m in network.modules() if isinstance(m, nn.Conv2d))
    with torch.no_grad():
        error = torch.from_numpy(softmax_error(network(x).numpy(), y.numpy()))
        modulated = x + (error @ rule.projection).view_as(x)
        difference = torch.tanh(conv(x)) - torch.tanh(conv(modulated))
        expected, padded = torch.zeros_like(conv.weight), F.pad(modulated, (1, 1, 1, 1))
        for r in range(5):
            for c in range(5):
                patch = padded[:, :, 2 * r : 2 * r + 3, 2 * c : 2 * c + 3]
                expected += torch.einsum("no,nikl->oikl", difference[:, :, r, c], patch)
    assert difference.shape[2:] == (5, 5)
    expected /= {"mean": 25, "root": 5, "sum": 1}[positions]
    torch.testing.assert_close(found[next(n for n in found if "conv1" in n and "weight" in n)], expected, rtol=1e-9, atol=1e-12)


def test_pepita_brings_the_path_from_error_to_output_against_itself():
    """Over training W_2 W_1 F comes to point against the identity: the modulation then lowers the error that it carries."""
    task = make_task((12,))
    network = dense((12, 40), activation=nn.ReLU)
    rule = build("pepita", network, task, scale=.5)
    x = torch.randn(256, 12, dtype=torch.float64)
    y = (x @ torch.randn(12, CLASSES, dtype=torch.float64)).argmax(1)

    def degrees():
        path = network.head.weight @ network.blocks["fc1"].linear.weight @ rule.projection.T
        return angle(products_of(path.detach(), torch.eye(CLASSES, dtype=torch.float64)))

    before = degrees()
    train(rule, [(x, y)] * 150, stepper(rule, lr=.1))
    assert degrees() > max(100, before)


def test_pepita_refuses_what_it_cannot_train():
    with pytest.raises(Refused, match=r"algo=pepita .*block fc1 has BatchNorm1d.*arch.norm=none"):
        build("pepita", dense(norm=nn.BatchNorm1d), make_task())
    tokens = Network({"fc1": Layer(nn.Linear(6, 5), None, nn.Tanh()), "head": nn.Linear(5, CLASSES)}, (3, 6)).double()
    for name in ("pepita", "cwc"):
        with pytest.raises(Refused, match=f"algo={name} .*block head answers each token"):
            build(name, tokens, make_task((3, 6)))


def test_pepita_learns_real_targets():
    task = regression()
    rule = build("pepita", dense(outputs=2), task, scale=.1)
    x, y = batch(task, 32)
    first, *_, last = train(rule, [(x, y)] * 60, stepper(rule, lr=.05))
    assert last.loss.sum() < first.loss.sum()


# ---- channel-wise competition

def test_goodness_of_class_groups_by_hand():
    h = torch.randn(3, 6, 2, 2, dtype=torch.float64)
    expected = np.stack([(h.numpy()[:, a:b] ** 2).reshape(3, -1).mean(1) for a, b in ((0, 2), (2, 4), (4, 6))], 1)
    np.testing.assert_allclose(class_goodness(h, 3, 1).numpy(), expected, rtol=1e-12)
    np.testing.assert_allclose(class_goodness(h.movedim(1, -1), 3, 3).numpy(), expected, rtol=1e-12)
    uneven = class_goodness(h[:, :, 0, 0], 4, 1).numpy()        # two classes with two units, two with one
    squares = h.numpy()[:, :, 0, 0] ** 2
    np.testing.assert_allclose(uneven, np.stack([squares[:, :2].mean(1), squares[:, 2:4].mean(1), squares[:, 4], squares[:, 5]], 1))


def cwc_by_hand(network, x, y):
    """Each block's losses, in numpy: cross entropy over the mean squares of each class's units."""
    h, losses = x.numpy(), []
    for w, b in arrays_of(network)[:-1]:
        h = np.tanh(h @ w.T + b)
        shares = min(CLASSES, h.shape[1])
        g = np.stack([(part**2).mean(1) for part in np.array_split(h, shares, 1)], 1)
        losses.append(np.log(np.exp(g).sum(1)) - g[np.arange(len(y)), y.numpy() * shares // CLASSES])
    return losses


def test_cwc_losses_by_hand_and_no_gradient_crosses_a_block():
    """fc2 has three units for four classes: the first two classes share one."""
    network, task, eps = dense((6, 9, 3, 8)), make_task(), 1e-5
    rule = build("cwc", network, task)
    x, y = batch(task)
    result, found = learned(rule, x, y)
    expected = cwc_by_hand(network, x, y)
    head = F.cross_entropy(network(x), y, reduction="none").detach().numpy()
    for name, losses in zip(network.hidden, expected):
        assert result.blocks[name]["local_loss"].item() == pytest.approx(losses.mean(), rel=1e-9)
    np.testing.assert_allclose(result.loss.numpy(), sum(expected) + head, rtol=1e-9)
    for place, name in enumerate(network.hidden):
        weight, values = network.blocks[name].linear.weight, []
        for sign in (1, -1):
            with torch.no_grad():
                weight[1, 2] += sign * eps
                values.append(cwc_by_hand(network, x, y)[place].sum())
                weight[1, 2] -= sign * eps
        numerical = (values[0] - values[1]) / (2 * eps)
        assert found[f"network.blocks.{name}.linear.weight"][1, 2].item() == pytest.approx(numerical, rel=1e-5)


def test_cwc_predicts_by_goodness_or_by_the_head():
    network, task = dense(), make_task()
    x, y = batch(task)
    assert torch.equal(build("cwc", network, task).predict(x), network(x))
    rule = build("cwc", network, task, predict="goodness")
    h = x
    for block in network.hidden.values():
        h = block(h)
    assert torch.equal(rule.predict(x), class_goodness(h, CLASSES, 1))
    assert not any(".head." in name for name in learned(rule, x, y)[1])
    with pytest.raises(Refused, match="algo=cwc .*block fc2 has 3 channels for 4 classes"):
        build("cwc", dense((6, 9, 3)), task, predict="goodness")


def test_cwc_blocks_stop_learning_one_after_another():
    network, task = dense(norm=nn.BatchNorm1d), make_task()
    rule = build("cwc", network, task, stop=[2, 3, 3])
    x, y = batch(task)
    phases = rule.phases()
    assert [phase.epochs for phase in phases] == [2, 1, None]
    for phase, still in zip(phases, (set(), {"fc1"}, {"fc1", "fc2", "fc3"})):
        rule.train()
        before = tensors(network)
        apply = stepper(rule, lr=.1)
        apply.count = len(x)
        apply.finish(phase.learn(x, y, apply).loss)
        moved = {name.split(".")[1] for name in changed(before, network)}
        assert moved == set(network.blocks) - still     # the statistics of batch norm too
    for stop, predict in (([3, 2], "head"), ([1, 1, 1, 1], "head"), ([1, 1, 1], "goodness")):
        with pytest.raises(Refused, match="algo.stop"):
            build("cwc", network, task, stop=stop, predict=predict)


# ---- Forward-Forward's variants

def test_forward_forward_softmax_prediction_uses_no_label():
    """One pass with every label's input at 1 / classes; what stood there before does not matter, and the first layer is left out."""
    network, task = dense(), make_task()
    rule = build("forward_forward", network, task, predict="softmax")
    with torch.no_grad():
        rule.readout.weight.normal_()
    x, y = batch(task)
    seen = []
    hook = network.blocks["fc1"].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    out = rule.predict(x)
    hook.remove()
    assert len(seen) == 1
    h, features = x.numpy().copy(), []
    h[:, :CLASSES] = 1 / CLASSES
    for w, b in arrays_of(network)[:-1]:
        h = np.tanh(h / np.sqrt((h**2).mean(1, keepdims=True)) @ w.T + b)
        features.append(h / np.sqrt((h**2).mean(1, keepdims=True)))
    expected = np.concatenate(features[1:], 1) @ rule.readout.weight.detach().numpy().T
    np.testing.assert_allclose(out.detach().numpy(), expected, rtol=1e-6)
    other = x.clone()
    other[:, :CLASSES] = torch.randn(len(x), CLASSES)
    assert torch.equal(rule.predict(other), out)
    # trained alongside, on the outputs as they are before the batch, and on nothing else
    rule.rng = Given(torch.zeros(len(x), dtype=torch.long))
    result, found = learned(rule, x, y)
    assert torch.equal(result.out, out)
    gradient = torch.autograd.grad(F.cross_entropy(out, y, reduction="sum"), rule.readout.weight)[0]
    torch.testing.assert_close(found["readout.weight"], gradient)
    plain = build("forward_forward", network, task)
    plain.rng = rule.rng
    alone = learned(plain, x, y)[1]
    assert set(found) - set(alone) == {"readout.weight"} and all(torch.equal(found[n], g) for n, g in alone.items())


def test_hard_negatives_are_never_the_true_label_and_follow_belief():
    n = 4000
    y = torch.arange(n) % CLASSES
    belief = torch.tensor([[2.0, 1.0, 0.0, -1.0]], dtype=torch.float64).expand(n, -1)
    u = ((torch.arange(n) * 7919 % n).double() + .5) / n
    drawn = drawn_but(y, belief, u)
    assert (drawn != y).all()
    shares = torch.bincount(drawn[y == 1], minlength=CLASSES) / (y == 1).sum()
    odds = belief[0].exp() * torch.tensor([1, 0, 1, 1])
    torch.testing.assert_close(shares.double(), odds / odds.sum(), rtol=0, atol=.03)
    one, ends = torch.eye(CLASSES), [torch.full((n,), end, dtype=torch.float64) for end in (.5 / 2**24, 1 - .5 / 2**24)]
    for logits in (torch.full((n, CLASSES), -1e30), one[y] * 1e4, torch.zeros(n, CLASSES), one[(y + 1) % CLASSES] * -1e4):
        for u in ends:
            drawn = drawn_but(y, logits, u)
            assert (drawn != y).all() and (drawn >= 0).all() and (drawn < CLASSES).all()


@pytest.mark.parametrize("predict", ["goodness", "softmax"])
def test_forward_forward_shows_hard_negatives(predict):
    network, task = dense(), make_task()
    rule = build("forward_forward", network, task, negatives="hard", predict=predict)
    if predict == "softmax":
        with torch.no_grad():
            rule.readout.weight.normal_()
    x, y = batch(task, 64)
    rule.rng = GlobalNoise(len(x))
    expected = drawn_but(y, rule.predict(x).detach(), (GlobalNoise(len(x)).integers(2**24, y).double() + .5) / 2**24)
    seen = []
    hook = network.blocks["fc1"].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    rule.rng = GlobalNoise(len(x))
    learned(rule, x, y)
    hook.remove()
    shown = seen[-1][:, :CLASSES].argmax(1)
    assert torch.equal(shown[:64], y) and torch.equal(shown[64:], expected) and (shown[64:] != y).all()


def test_peer_normalisation_pulls_units_to_their_layers_mean():
    """Its gradient, divided by the rows, is that of the variance of the running means, by autograd; its value is that variance."""
    means, h = torch.rand(5, dtype=torch.float64), torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    new = MOMENTUM * means + (1 - MOMENTUM) * h.mean(0)
    value = (new.mean() - new).square().mean()
    expected = torch.autograd.grad(value, h)[0]
    found = variance_of_means(new.detach(), h)
    torch.testing.assert_close(found, value.detach().expand(7))
    torch.testing.assert_close(torch.autograd.grad(found.sum(), h)[0] / 7, expected)


def test_peer_normalisation_counts_true_samples_alone_and_moves_its_means():
    network, task = dense(), make_task()
    rule = build("forward_forward", network, task, threshold=.3, peer=.5)
    x, y = batch(task)
    shift = torch.tensor([0, 1, 2, 2, 1, 0, 0, 1])
    rule.rng = Given(shift)
    result, found = learned(rule, x, y)
    hand = forward_forward_by_hand(network, x, y, (y.numpy() + 1 + shift.numpy()) % CLASSES, .3)[0]
    w, b = arrays_of(network)[0]
    true = x.numpy().copy()
    true[:, :CLASSES] = np.eye(CLASSES)[y.numpy()]
    mean = np.tanh(true / np.sqrt((true**2).mean(1, keepdims=True)) @ w.T + b).mean(0)
    np.testing.assert_allclose(rule.mean_fc1.numpy(), MOMENTUM * .5 + (1 - MOMENTUM) * mean, rtol=1e-6)
    expected = hand.mean() + .5 * rule.mean_fc1.var(unbiased=False).item()
    assert result.blocks["fc1"]["local_loss"].item() == pytest.approx(expected, rel=1e-6)
    before, x[0, -1] = tensors(rule), torch.nan
    learned(rule, x, y)
    assert not changed(before, rule)    # what is not finite reaches no running mean


def test_straight_through_lets_silent_units_learn():
    network, task = dense(activation=nn.ReLU), make_task()
    with torch.no_grad():
        network.blocks["fc1"].linear.bias[0] = -1e3
    x, y = batch(task)
    found = {}
    for through in (False, True):
        rule = build("forward_forward", network, task, straight_through=through, peer=.1)
        rule.rng = Given(torch.zeros(len(x), dtype=torch.long))
        result, found[through] = learned(rule, x, y)
        found[through]["loss"] = result.loss
    assert torch.equal(found[False]["loss"], found[True]["loss"])       # the outputs are the ReLU's
    silent = [found[through]["network.blocks.fc1.linear.weight"][0] for through in (False, True)]
    assert not silent[0].any() and silent[1].any()
    with pytest.raises(Refused, match="straight_through=true .*block fc1 has Tanh; give it relu"):
        build("forward_forward", dense(), task, straight_through=True)


def test_pepita_compares_no_draws():
    with pytest.raises(Refused, match="algo=pepita.*block fc1 would draw each anew; use arch.activation=step"):
        build("pepita", dense(activation=Bernoulli), make_task())


def test_forward_forward_variants_learn_together():
    """All at once, as in the published setting, on classes that can be told apart."""
    network, task = dense((16, 30, 30, 30), activation=nn.ReLU), make_task((16,))
    rule = build("forward_forward", network, task, negatives="hard", predict="softmax", peer=.06, straight_through=True)
    centres = torch.randn(CLASSES, 16, dtype=torch.float64)
    y = torch.arange(128) % CLASSES
    x = centres[y] + .5 * torch.randn(128, 16, dtype=torch.float64)
    train(rule, [(x, y)] * 80, stepper(rule, "adam", lr=.003))
    assert (rule.predict(x).argmax(1) == y).double().mean() > .9
    assert math.isclose(float(unit_length(rule.features(x)).square().mean()), 1, rel_tol=1e-6)
