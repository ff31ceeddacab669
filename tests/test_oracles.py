"""Identities from the literature: each rule against a hand computation or plain autograd, in float64."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import CLASSES, batch, build, changed, dense, learned, make_task, regression, step, stepper, task_of, tensors
from torch import nn

from lbp.algos.closed_form.least_squares import ridge_solution
from lbp.algos.feedback.fa import buffer_name
from lbp.algos.forward.forward_forward import unit_length, with_label
from lbp.archs.network import Network
from lbp.archs.resnet import resnet
from lbp.errors import Diverged, Refused


# ---- networks that a backward operator must cope with

class Attention(nn.Module):
    """Two heads of self-attention with separate projections, a norm, and a skip; tokens are averaged."""

    def __init__(self, width=6, heads=2):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.norm, self.heads = nn.LayerNorm(width), heads

    def forward(self, x):
        n, t, d = x.shape
        q, k, v = (f(x).view(n, t, self.heads, -1).transpose(1, 2) for f in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, d)
        return self.norm(x + self.o(mixed)).mean(1)


def convolutional(*modules, in_shape=(2, 9, 9)):
    """The modules, flattened, with a head of the size that it takes."""
    body = nn.Sequential(*modules, nn.Flatten())
    with torch.no_grad():
        size = body(torch.zeros(2, *in_shape)).shape[1]
    return Network.of(nn.Sequential(*body, nn.Linear(size, CLASSES)), in_shape).double()


NETWORKS = {
    "dense": lambda: dense(),
    "dense, batch norm, dropout": lambda: dense(norm=nn.BatchNorm1d, dropout=.3, activation=nn.ReLU),
    "stride, padding": lambda: convolutional(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 6, 3, 2, 1), nn.Tanh(),
                                             nn.Conv2d(6, 5, (2, 3), (2, 1), (0, 1)), nn.ReLU()),
    "groups, dilation, no bias": lambda: convolutional(nn.Conv2d(2, 4, 3), nn.Tanh(), nn.Conv2d(4, 8, 3, groups=2, bias=False),
                                                       nn.Tanh(), nn.Conv2d(8, 8, 2, groups=8, dilation=2), nn.Tanh()),
    "same and valid": lambda: convolutional(nn.Conv2d(2, 4, 3, padding="same"), nn.Tanh(),
                                            nn.Conv2d(4, 4, (3, 5), padding="same", dilation=(2, 1)), nn.Tanh(),
                                            nn.Conv2d(4, 3, 3, padding="valid"), nn.Tanh()),
    "batch norm, pool": lambda: convolutional(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2),
                                              nn.Conv2d(4, 4, 2), nn.BatchNorm2d(4), nn.ReLU(), nn.AvgPool2d(2)),
    "1-d": lambda: convolutional(nn.Conv1d(2, 4, 3), nn.Tanh(), nn.Conv1d(4, 5, 3, 2, 1, groups=1), nn.Tanh(), in_shape=(2, 12)),
    "3-d": lambda: convolutional(nn.Conv3d(1, 2, 2), nn.Tanh(), nn.Conv3d(2, 3, 2), nn.Tanh(), in_shape=(1, 4, 4, 4)),
    "residual": lambda: resnet(make_task((3, 8, 8)), depth=8, width=4, activation="relu", norm="batch", init="default", init_scale=1.0).double(),
    "attention": lambda: Network({"embed": nn.Linear(3, 6), "attention": Attention(), "head": nn.Linear(6, CLASSES)}, (5, 3)).double(),
}


def give_weights_as_feedback(rule):
    with torch.no_grad():
        for i, (name, weight) in enumerate(rule.sites.items()):
            b = rule.backward_weights[i] if hasattr(rule, "backward_weights") else getattr(rule, buffer_name(name))
            b.copy_(weight)


def backprop(network, x, y):
    """{name: gradient of the summed cross entropy}, by plain autograd."""
    loss = F.cross_entropy(network(x), y, reduction="sum")
    return dict(zip((f"network.{n}" for n, _ in network.named_parameters()),
                    torch.autograd.grad(loss, list(network.parameters()))))


def assert_same(found, expected, rtol=1e-10):
    assert set(found) == set(expected)
    for name, g in expected.items():
        torch.testing.assert_close(found[name], g, rtol=rtol, atol=1e-12 * max(1, float(g.abs().max())), msg=lambda m: f"{name}: {m}")


def softmax_error(out, y):
    """The derivative of the summed cross entropy by the logits, in numpy."""
    p = np.exp(out - out.max(1, keepdims=True))
    return p / p.sum(1, keepdims=True) - np.eye(out.shape[1])[y]


def arrays_of(network):
    """[(W, b), ...] of a network of dense layers, in numpy, the head last."""
    layers = [getattr(block, "linear", block) for block in network.blocks.values()]
    return [(l.weight.detach().numpy(), l.bias.detach().numpy()) for l in layers]


def tanh_forward(layers, x):
    """The values of every layer, the input first, the logits last."""
    values = [x]
    for i, (w, b) in enumerate(layers):
        a = values[-1] @ w.T + b
        values.append(a if i == len(layers) - 1 else np.tanh(a))
    return values


def by_hand(deltas, values):
    """{parameter: gradient} from the error at every pre-activation."""
    found = {}
    for i, (delta, below) in enumerate(zip(deltas, values), 1):
        block = "head" if i == len(deltas) else f"fc{i}.linear"
        found[f"network.blocks.{block}.weight"] = torch.from_numpy(delta.T @ below)
        found[f"network.blocks.{block}.bias"] = torch.from_numpy(delta.sum(0))
    return found


# ---- backprop

@pytest.mark.parametrize("kind", NETWORKS)
def test_bp_is_plain_autograd(kind):
    network = NETWORKS[kind]()
    task = make_task(network.in_shape)
    x, y = batch(task)
    torch.manual_seed(1)
    expected = backprop(network, x, y)
    torch.manual_seed(1)
    assert_same(learned(build("bp", network, task), x, y)[1], expected)


# ---- feedback alignment

@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("name", ["fa", "kp"])
def test_feedback_equal_to_the_weights_is_backprop(name, kind):
    network = NETWORKS[kind]()
    task = make_task(network.in_shape)
    rule = build(name, network, task)
    give_weights_as_feedback(rule)
    x, y = batch(task)
    torch.manual_seed(1)
    expected = backprop(network, x, y)
    torch.manual_seed(1)
    found = learned(rule, x, y)[1]
    assert_same({n: g for n, g in found.items() if n in expected}, expected)


def test_fa_equals_its_equations():
    """delta_l = (delta_{l+1} B_{l+1}) * f'(a_l)  (Lillicrap et al. 2016, equation 2)."""
    network, task = dense(), make_task()
    rule = build("fa", network, task)
    x, y = batch(task)
    layers, values = arrays_of(network), tanh_forward(arrays_of(network), x.numpy())
    deltas = [softmax_error(values[-1], y.numpy())]
    for i in reversed(range(1, len(layers))):
        name = "head" if i == len(layers) - 1 else f"fc{i + 1}.linear"
        b = getattr(rule, buffer_name(f"blocks.{name}.weight")).numpy()
        assert b.shape == layers[i][0].shape and not np.allclose(b, layers[i][0])
        deltas.insert(0, deltas[0] @ b * (1 - values[i] ** 2))
    assert_same(learned(rule, x, y)[1], by_hand(deltas, values))


@pytest.mark.parametrize("kind, layers, in_shape", [
    ("stride", [nn.Conv2d(2, 4, 3), nn.Conv2d(4, 6, 3, 2, 1), nn.Conv2d(6, 3, (1, 2))], (2, 9, 9)),
    ("groups", [nn.Conv2d(2, 4, 3), nn.Conv2d(4, 6, 3, groups=2), nn.Conv2d(6, 6, 2, groups=6, dilation=2)], (2, 9, 9)),
    ("same", [nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, 3, padding="same", dilation=2)], (2, 9, 9)),
    ("1-d", [nn.Conv1d(2, 4, 3), nn.Conv1d(4, 4, 4, 3, 2)], (2, 11)),
], ids=lambda v: v if isinstance(v, str) else "")
def test_fa_of_linear_convolutions_is_backprop_of_a_network_with_the_feedback_as_weights(kind, layers, in_shape):
    """In a linear network under a linear loss, the weights above a layer reach its gradient through the way back alone."""
    network = convolutional(*layers, in_shape=in_shape)
    task = make_task(in_shape)
    rule = build("fa", network, task)
    x, y = batch(task)
    error = F.one_hot(y, CLASSES) - torch.full((CLASSES,), 1 / CLASSES, dtype=torch.float64)
    rule.task = LinearLoss(error)
    first = "network.blocks.conv1.linear.weight"
    found = learned(rule, x, y)[1][first]
    assert len(rule.sites) == len(layers)       # the weight that takes the input needs no feedback
    with torch.no_grad():
        for name, weight in rule.sites.items():
            weight.copy_(getattr(rule, buffer_name(name)))
    (network(x) * error).sum().backward()
    torch.testing.assert_close(found, network.blocks["conv1"].linear.weight.grad, rtol=1e-10, atol=1e-12)


class LinearLoss:
    """A task whose error at the output is always `error`."""

    kind, classes, outputs = "classification", CLASSES, CLASSES

    def __init__(self, error):
        self.fixed = error

    def loss(self, out, y):
        return (out * self.fixed).sum(-1)

    def error(self, out, y):
        return self.fixed.clone()


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("name", ["fa", "kp"])
def test_only_weights_that_an_error_passes_have_feedback(name, kind):
    network = NETWORKS[kind]()
    rule = build(name, network, make_task(network.in_shape))
    weights = [n for n, p in network.named_parameters() if p.dim() > 1]
    assert list(rule.sites) == weights[1:]     # in each of these networks the first weight alone takes the input
    feedback = sum(b.numel() for n, b in tensors(rule).items() if not n.startswith("network."))
    assert feedback == sum(network.get_parameter(n).numel() for n in weights[1:])


@pytest.mark.parametrize("name", ["fa", "kp"])
def test_packed_attention_is_refused(name):
    class Packed(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(6, 2, batch_first=True)

        def forward(self, x):
            return self.attention(x, x, x, need_weights=False)[0].mean(1)

    network = Network({"embed": nn.Linear(3, 6), "packed": Packed(), "head": nn.Linear(6, CLASSES)}, (5, 3)).double()
    with pytest.raises(Refused, match=r"blocks\.packed\.attention\.in_proj_weight.*separate projections"):
        build(name, network, make_task((5, 3)))


@pytest.mark.parametrize("name", ["fa", "kp"])
def test_uneven_padding_is_refused(name):
    network = convolutional(nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, 3), in_shape=(2, 9, 9))
    network.blocks["conv2"].linear = nn.Conv2d(4, 4, 2, padding="same").double()
    with pytest.raises(Refused, match="same"):
        build(name, network, make_task((2, 9, 9)))


@pytest.mark.parametrize("name", ["fa", "kp"])
def test_a_positional_parameter_needs_no_feedback(name):
    """It is added, not multiplied: the error passes it unchanged, so there is nothing to stand in for."""
    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.where = nn.Linear(3, 6), nn.Parameter(torch.randn(5, 6))

        def forward(self, x):
            return self.linear(x) + self.where

    network = Network({"embed": Positions(), "attention": Attention(), "head": nn.Linear(6, CLASSES)}, (5, 3)).double()
    task = make_task((5, 3))
    rule = build(name, network, task)
    give_weights_as_feedback(rule)
    x, y = batch(task)
    expected = backprop(network, x, y)
    assert_same({n: g for n, g in learned(rule, x, y)[1].items() if n in expected}, expected)


# ---- direct feedback alignment

def test_dfa_with_one_hidden_layer_is_fa():
    network, task = dense((6, 7)), make_task()
    dfa, fa = build("dfa", network, task), build("fa", network, task)
    fa.blocks_head_weight.copy_(dfa.projection_fc1)
    x, y = batch(task)
    assert_same(learned(dfa, x, y)[1], learned(fa, x, y)[1])


@pytest.mark.parametrize("loss", ["cross_entropy", "mse", "bce"])
def test_dfa_equals_its_equations(loss):
    """delta_l = (e B_l) * f'(a_l)  (Nokland 2016, equation 7)."""
    network, task = dense(), make_task(loss=loss)
    rule = build("dfa", network, task)
    x, y = batch(task)
    layers, values = arrays_of(network), tanh_forward(arrays_of(network), x.numpy())
    out, onehot = values[-1], np.eye(CLASSES)[y.numpy()]
    e = {"cross_entropy": softmax_error(out, y.numpy()), "mse": out - onehot, "bce": 1 / (1 + np.exp(-out)) - onehot}[loss]
    deltas = [e @ getattr(rule, f"projection_fc{i}").numpy() * (1 - values[i] ** 2) for i in range(1, len(layers))] + [e]
    assert_same(learned(rule, x, y)[1], by_hand(deltas, values))


@pytest.mark.parametrize("kind", NETWORKS)
def test_dfa_teaches_each_block_at_its_output_and_leaks_nothing(kind):
    """Each block alone, its input cut off, under the gradient e B at its output; the head under e itself."""
    network = NETWORKS[kind]()
    task = make_task(network.in_shape)
    rule = build("dfa", network, task)
    x, y = batch(task)
    torch.manual_seed(1)
    found = learned(rule, x, y)[1]
    torch.manual_seed(1)
    inputs, outputs = {}, {}
    h = x
    for name, block in network.blocks.items():
        inputs[name] = h
        outputs[name] = block(h)
        h = outputs[name].detach()
    error = torch.from_numpy(softmax_error(h.numpy(), y.numpy()))
    expected = {}
    for name, block in network.blocks.items():
        out = outputs[name]
        signal = error if name == "head" else error @ getattr(rule, f"projection_{name}")
        gradients = torch.autograd.grad(out, list(block.parameters()), signal.reshape(out.shape))
        expected |= dict(zip((f"network.blocks.{name}.{n}" for n, _ in block.named_parameters()), gradients))
    assert_same(found, expected)


@pytest.mark.parametrize("kind", ["dense", "batch norm, pool", "residual", "attention"])
def test_dfa_without_projections_teaches_the_head_alone(kind):
    """A leak between blocks, through a skip or otherwise, would move hidden blocks even then."""
    network = NETWORKS[kind]()
    task = make_task(network.in_shape)
    rule = build("dfa", network, task)
    for b in [b for n, b in rule.named_buffers() if n.startswith("projection_")]:
        b.zero_()
    x, y = batch(task)
    expected, found = backprop(network, x, y), learned(rule, x, y)[1]
    for name, g in found.items():
        if ".head." in name:
            torch.testing.assert_close(g, expected[name])
        else:
            assert not g.any() and expected[name].any(), name


# ---- Kolen-Pollack

@pytest.mark.parametrize("kind", ["dense", "stride, padding"])
@pytest.mark.parametrize("optimizer, settings, clip", [("sgd", {}, None), ("sgd", {"momentum": .9}, None),
                                                       ("sgd", {"momentum": .9}, .05), ("adam", {}, None)],
                         ids=["plain", "momentum", "clipped", "adam"])
def test_kp_differences_shrink_by_the_decay_alone(kind, optimizer, settings, clip):
    """W - B after t steps is (1 - decay)^t of the first one (Akrout et al. 2019, equations 16 and 17), whatever function
    of the common gradients the steps are."""
    network, decay, steps = NETWORKS[kind](), .01, 12
    task = make_task(network.in_shape)
    rule = build("kp", network, task, decay=decay)
    apply = stepper(rule, optimizer, lr=.05, clip=clip, **settings)

    def differences():
        return [(w - b).detach().clone() for w, b in zip(rule.sites.values(), rule.backward_weights, strict=True)]

    first, start = differences(), tensors(network)
    for _ in range(steps):
        step(rule, apply, *batch(task))
    for now, then in zip(differences(), first):
        torch.testing.assert_close(now, (1 - decay) ** steps * then, rtol=1e-11, atol=1e-14)
    assert all((w - start[n]).norm() > 1e-2 * start[n].norm() for n, w in rule.sites.items())     # it did learn


def test_kp_feedback_receives_the_weights_gradient():
    network = NETWORKS["stride, padding"]()
    task = make_task(network.in_shape)
    rule = build("kp", network, task)
    found = learned(rule, *batch(task))[1]
    for i, name in enumerate(rule.sites):
        assert torch.equal(found[f"backward_weights.{i}"], found[f"network.{name}"])
    assert {p for g in rule.groups() if g != "forward" for p in rule.groups()[g]} == set()


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_kp_from_equal_weights_without_decay_is_backprop_for_ever(optimizer):
    task, batches = make_task(), [batch(make_task()) for _ in range(8)]
    ends = []
    for name in ("kp", "bp"):
        torch.manual_seed(3)
        network = dense()
        rule = build(name, network, task, **({"decay": 0.0} if name == "kp" else {}))
        if name == "kp":
            give_weights_as_feedback(rule)
        apply = stepper(rule, optimizer, lr=.05)
        for x, y in batches:
            step(rule, apply, x, y)
        ends.append(tensors(network))
    for name, end in ends[1].items():
        torch.testing.assert_close(ends[0][name], end, rtol=1e-9, atol=1e-12)


def test_kp_decays_before_the_step():
    """One plain step: W becomes (1 - decay) W - lr G / n, biases are not decayed."""
    network, task, decay, lr = dense(), make_task(), .1, .5
    rule = build("kp", network, task, decay=decay)
    x, y = batch(task)
    before = tensors(network)
    g = learned(build("fa", network, task), x, y)[1]     # the head's gradient needs no feedback
    step(rule, stepper(rule, lr=lr), x, y)
    head = before["blocks.head.weight"] * (1 - decay) - lr / len(x) * g["network.blocks.head.weight"]
    torch.testing.assert_close(network.head.weight.detach(), head)
    torch.testing.assert_close(network.head.bias.detach(), before["blocks.head.bias"] - lr / len(x) * g["network.blocks.head.bias"])


# ---- controls

@pytest.mark.parametrize("kind", ["dense", "batch norm, pool", "residual"])
def test_shallow_moves_the_head_alone_by_its_exact_gradient(kind):
    network = NETWORKS[kind]()
    task = make_task(network.in_shape)
    rule = build("shallow", network, task)
    x, y = batch(task)
    expected, before = backprop(network, x, y), dict(tensors(network))
    assert_same(learned(rule, x, y)[1], {n: g for n, g in expected.items() if ".head." in n})
    apply = stepper(rule)
    for _ in range(3):
        step(rule, apply, x, y)
    parameters = {n for n, _ in network.named_parameters()}
    assert changed(before, network) & parameters == {"blocks.head.weight", "blocks.head.bias"}


@pytest.mark.parametrize("ridge", [0.0, 1.0, 50.0])
@pytest.mark.parametrize("real", [False, True], ids=["classes", "real targets"])
def test_elm_is_ridge_regression_with_a_free_intercept(ridge, real):
    """Least squares of [phi 1; sqrt(ridge) I 0] on [t; 0]: numpy's answer."""
    network, task = dense((6, 7, 5)), regression(outputs=3) if real else make_task(loss="mse")
    if real:
        network.blocks["head"] = nn.Linear(5, 3).double()
    x, y = batch(task, 43)
    rule = build("elm", network, task, ridge=ridge)
    hidden = {n: t for n, t in tensors(network).items() if ".head." not in n}
    for phase in rule.phases():
        phase.fit(lambda rows: zip(x.split(10), y.split(10)))      # the last batch has 3 rows
    phi = tanh_forward(arrays_of(network), x.numpy())[2]
    t = y.numpy() if real else np.eye(CLASSES)[y.numpy()]
    rows = np.hstack([phi, np.ones((43, 1))]), np.hstack([math.sqrt(ridge) * np.eye(5), np.zeros((5, 1))])
    solution = np.linalg.lstsq(np.vstack(rows), np.vstack([t, np.zeros((5, t.shape[1]))]), rcond=None)[0]
    np.testing.assert_allclose(network.head.weight.detach().numpy(), solution[:-1].T, rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(network.head.bias.detach().numpy(), solution[-1], rtol=1e-8, atol=1e-10)
    now = tensors(network)
    assert all(torch.equal(now[name], value) for name, value in hidden.items())


@pytest.mark.parametrize("how", ["dead unit", "twin units"])
def test_elm_with_singular_features_writes_nothing_and_says_what_to_do(how):
    network, task = dense((6, 7, 5), activation=nn.ReLU), make_task(loss="mse")
    with torch.no_grad():
        layer = network.blocks["fc2"].linear
        if how == "dead unit":
            layer.bias[1] = -1e3
        else:
            layer.weight[1], layer.bias[1] = layer.weight[0], layer.bias[0]
    x, y = batch(task, 40)
    rule = build("elm", network, task, ridge=0.0)
    before = tensors(rule)
    with pytest.raises(Diverged, match=r"raise algo\.ridge"):
        for phase in rule.phases():
            phase.fit(lambda rows: iter([(x, y)]))
    assert not changed(before, rule)


def test_ridge_solution_refuses_what_is_not_finite():
    gram = torch.eye(3, dtype=torch.float64)
    with pytest.raises(Diverged):
        ridge_solution(gram, torch.full((3, 2), torch.nan, dtype=torch.float64), 1.0)
    with pytest.raises(Diverged):
        ridge_solution(gram * torch.nan, torch.ones(3, 2, dtype=torch.float64), 1.0)


# ---- local losses

def local_losses(rule, x, y):
    """{parameter: gradient of its own block's local loss}, each block alone, its input cut off."""
    expected = {}
    for name, block in rule.network.blocks.items():
        h = block(x.detach())
        head = None if name == "head" else rule.heads[name]
        loss = F.cross_entropy(h if head is None else head(h), y, reduction="sum")
        own = [(f"network.blocks.{name}.{n}", p) for n, p in block.named_parameters()]
        own += [(f"heads.{name}.{n}", p) for n, p in head.named_parameters()] if head else []
        expected |= dict(zip((n for n, _ in own), torch.autograd.grad(loss, [p for _, p in own])))
        x = h
    return expected


@pytest.mark.parametrize("schedule", ["joint", "streaming"])
@pytest.mark.parametrize("kind", NETWORKS)
def test_local_gradients_are_those_of_each_blocks_own_loss(kind, schedule):
    network = NETWORKS[kind]()
    task = make_task(network.in_shape)
    rule = build("local", network, task, schedule=schedule)
    x, y = batch(task)
    torch.manual_seed(1)
    expected = local_losses(rule, x, y)
    torch.manual_seed(1)
    assert_same(learned(rule, x, y)[1], expected)


@pytest.mark.parametrize("schedule", ["joint", "streaming"])
def test_a_block_with_a_blind_head_learns_nothing_from_the_blocks_above(schedule):
    network, task = dense(), make_task()
    rule = build("local", network, task, schedule=schedule)
    with torch.no_grad():
        for p in rule.heads["fc2"].parameters():
            p.zero_()
    found = learned(rule, *batch(task))[1]
    for name, g in found.items():
        if name.startswith("network."):
            assert bool(g.any()) == (".fc2." not in name), name


def test_local_heads_see_maps_pooled_to_at_most_so_many_values():
    network = convolutional(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 3), nn.ReLU())     # 7x7 maps, then 5x5 flattened
    task = make_task((2, 9, 9))
    rule = build("local", network, task, head_features=50)
    x, _ = batch(task)
    h = network.blocks["conv1"](x)
    linear = next(m for m in rule.heads["conv1"].modules() if isinstance(m, nn.Linear))
    assert linear.in_features == 4 * 2 * 4      # rows, then columns halved: 4x7 are 112 values, 4x4 64, 2x4 32
    torch.testing.assert_close(rule.heads["conv1"](h), linear(F.adaptive_avg_pool2d(h, (2, 4)).flatten(1)))


@pytest.mark.parametrize("kind", ["dense", "stride, padding"])
def test_streaming_equals_joint(kind):
    ends = []
    for schedule in ("joint", "streaming"):
        torch.manual_seed(5)
        network = NETWORKS[kind]()
        task = make_task(network.in_shape)
        rule = build("local", network, task, schedule=schedule)
        apply = stepper(rule, "adam", lr=.01)
        for _ in range(3):
            step(rule, apply, *batch(task))
        ends.append(tensors(rule))
    for name, end in ends[0].items():
        torch.testing.assert_close(ends[1][name], end, rtol=1e-12, atol=1e-12)


# ---- forward-forward

class Given(nn.Module):
    """In place of a rule's Rng: the same integers again and again."""

    def __init__(self, integers):
        super().__init__()
        self.given = integers

    def integers(self, high, like):
        return self.given


def forward_forward_by_hand(network, x, y, wrong, threshold):
    """Each layer's loss, in numpy: softplus(-(G - theta d)) of the true, softplus(G - theta d) of the false samples."""
    def labelled(labels):
        x_ = x.numpy().copy()
        x_[:, :CLASSES] = np.eye(CLASSES)[labels]
        return x_

    true, false, losses = labelled(y.numpy()), labelled(wrong), []
    for w, b in arrays_of(network)[:-1]:
        true, false = (np.tanh(h / np.sqrt((h**2).mean(1, keepdims=True)) @ w.T + b) for h in (true, false))
        margin = [(h**2).sum(1) - threshold * h.shape[1] for h in (true, false)]
        losses.append(np.log1p(np.exp(-margin[0])) + np.log1p(np.exp(margin[1])))
    return losses


def test_forward_forward_losses_by_hand():
    network, task = dense(), make_task()
    rule = build("forward_forward", network, task, threshold=.3)
    x, y = batch(task)
    shift = torch.tensor([0, 1, 2, 2, 1, 0, 0, 1])
    rule.rng = Given(shift)
    wrong = (y.numpy() + 1 + shift.numpy()) % CLASSES
    expected = forward_forward_by_hand(network, x, y, wrong, .3)
    result, _ = learned(rule, x, y)
    for name, losses in zip(("fc1", "fc2", "fc3"), expected):
        assert result.blocks[name]["local_loss"].item() == pytest.approx(losses.mean(), rel=1e-6)
    assert result.loss.sum().item() == pytest.approx(sum(l.sum() for l in expected), rel=1e-6)


def test_forward_forward_blocks_are_isolated():
    """Each block's gradient is that of its own loss: its numerical derivative, with the blocks below as they are."""
    network, task, eps = dense(), make_task(), 1e-5
    rule = build("forward_forward", network, task, threshold=.3)
    x, y = batch(task)
    shift = torch.tensor([0, 1, 2, 2, 1, 0, 0, 1])
    rule.rng = Given(shift)
    wrong = (y.numpy() + 1 + shift.numpy()) % CLASSES
    found = learned(rule, x, y)[1]
    assert not any(".head." in name for name in found)
    for place, name in enumerate(("fc1", "fc2", "fc3")):
        weight = network.blocks[name].linear.weight
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                weight[1, 2] += sign * eps
                values.append(forward_forward_by_hand(network, x, y, wrong, .3)[place].sum())
                weight[1, 2] -= sign * eps
        numerical = (values[0] - values[1]) / (2 * eps)
        assert found[f"network.blocks.{name}.linear.weight"][1, 2].item() == pytest.approx(numerical, rel=1e-4)


def test_forward_forward_negatives_are_uniform_over_the_wrong_labels():
    network, n = dense((CLASSES + 2, 3)), 3000
    task = make_task((CLASSES + 2,))
    rule = build("forward_forward", network, task)
    x = torch.randn(n, CLASSES + 2, dtype=torch.float64)
    for label in range(CLASSES):
        y, seen = torch.full((n,), label), []
        hook = network.blocks["fc1"].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        learned(rule, x, y)
        hook.remove()
        shown = seen[0][:, :CLASSES]
        assert ((shown != 0).sum(1) == 1).all()
        counts = torch.bincount(shown.argmax(1)[n:], minlength=CLASSES)
        assert (shown.argmax(1)[:n] == label).all() and counts[label] == 0
        others = counts[torch.arange(CLASSES) != label].double()
        share = 1 / (CLASSES - 1)
        assert (others - n * share).abs().max() < 5 * math.sqrt(n * share * (1 - share))


@pytest.mark.parametrize("sizes", [(6, 7), (6, 7, 5, 8)], ids=["one layer", "three layers"])
def test_forward_forward_predicts_by_the_goodness_of_each_label(sizes):
    """All layers but the first count, or the only one."""
    network, task = dense(sizes), make_task()
    rule = build("forward_forward", network, task)
    x, _ = batch(task)
    expected = np.zeros((len(x), CLASSES))
    for n in range(len(x)):
        for label in range(CLASSES):
            h = x[n].numpy().copy()
            h[:CLASSES] = np.eye(CLASSES)[label]
            for i, (w, b) in enumerate(arrays_of(network)[:-1]):
                h = np.tanh(w @ (h / math.sqrt((h**2).mean())) + b)
                if i or len(sizes) == 2:
                    expected[n, label] += (h**2).sum()
    scores = rule.predict(x).detach().numpy()
    # A constant (the threshold) may be taken off every label's score alike.
    np.testing.assert_allclose(scores - scores[:, :1], expected - expected[:, :1], rtol=1e-6, atol=1e-7)


def test_labels_overwrite_exactly_the_first_inputs():
    for shape in ((6,), (2, 3, 3)):
        x = torch.randn(5, *shape)
        y = torch.tensor([0, 3, 1, 2, 2])
        flat = with_label(x, y, CLASSES).flatten(1)
        assert torch.equal(flat[:, :CLASSES], F.one_hot(y, CLASSES).float())
        assert torch.equal(flat[:, CLASSES:], x.flatten(1)[:, CLASSES:])


def test_forward_forward_inputs_are_normalised_in_the_precision_of_the_data():
    h = 1e3 * torch.randn(3, 5, dtype=torch.float64)     # large beside any guard against division by 0
    torch.testing.assert_close(unit_length(h), h / h.square().mean(1, keepdim=True).sqrt(), rtol=1e-10, atol=0)


# ---- difference target propagation

def give_transposed_jacobians(rule):
    """For dense layers without activation the transposed Jacobian is W^T."""
    with torch.no_grad():
        for name, g in rule.inverses.items():
            block = rule.network.blocks[name]
            g.weight.copy_(getattr(block, "linear", block).weight.T)


@pytest.mark.parametrize("beta", [.01, .7])
@pytest.mark.parametrize("loss", ["mse", "cross_entropy"])
def test_ldrl_with_transposed_jacobians_is_backprop_in_a_linear_network(loss, beta):
    network, task = dense(activation=nn.Identity), make_task(loss=loss)
    rule = build("ldrl", network, task, beta=beta, feedback_steps=0)
    give_transposed_jacobians(rule)
    x, y = batch(task)
    found = learned(rule, x, y)[1]
    out = network(x)
    value = F.cross_entropy(out, y, reduction="sum") if loss == "cross_entropy" else (out - F.one_hot(y, CLASSES)).square().sum() / 2
    expected = dict(zip((f"network.{n}" for n, _ in network.named_parameters()),
                        torch.autograd.grad(value, list(network.parameters()))))
    assert_same(found, expected, rtol=1e-9)


def test_ldrl_approaches_backprop_linearly_in_beta():
    """g(t) = W^T (t - t^3/3) has the transposed Jacobian W^T (1 - h^2) of tanh(W x + b): update = BP + O(beta)."""
    class Transposed(nn.Module):
        def __init__(self, weight, bends):
            super().__init__()
            self.weight, self.bends = weight, bends

        def forward(self, t):
            return (t - t**3 / 3 if self.bends else t) @ self.weight

    network, task = dense(), make_task()
    x, y = batch(task)
    expected = backprop(network, x, y)
    errors = []
    for beta in (1e-2, 1e-3, 1e-4):
        rule = build("ldrl", network, task, beta=beta, feedback_steps=0)
        for name in rule.inverses:
            block = network.blocks[name]
            rule.inverses[name] = Transposed(getattr(block, "linear", block).weight.detach(), name != "head")
        found = learned(rule, x, y)[1]
        errors.append(math.sqrt(sum(float((found[n] - g).square().sum()) for n, g in expected.items())))
    scale = math.sqrt(sum(float(g.square().sum()) for g in expected.values()))
    assert errors[0] < .02 * scale
    assert errors[0] / errors[1] == pytest.approx(10, rel=.1) and errors[1] / errors[2] == pytest.approx(10, rel=.1)


def angle(a, b):
    return math.degrees(math.acos(float(F.cosine_similarity(a.flatten(), b.flatten(), dim=0))))


def test_ldrl_inverses_become_transposes_not_inverses():
    network, task = dense((6, 5, 4), activation=nn.Identity), make_task()
    with torch.no_grad():       # singular values 2, 1, .5, .25: the pseudo-inverse points elsewhere
        u, _, v = torch.linalg.svd(network.blocks["fc2"].linear.weight, full_matrices=False)
        weight = network.blocks["fc2"].linear.weight
        weight.copy_(u @ torch.diag(2.0 ** torch.arange(1, -3, -1).double()) @ v)
    rule = build("ldrl", network, task)
    apply = stepper(rule, "sgd", lr=.05)
    for _ in range(400):
        step(rule, apply, *batch(task, 32), learn=rule.learn_feedback)
    g, weight = rule.inverses["fc2"].weight.detach(), weight.detach()
    assert angle(g, weight.T) < 10
    assert angle(weight.T, torch.linalg.pinv(weight)) > 40 and angle(g, torch.linalg.pinv(weight)) > 30
    assert float(g.norm() / weight.norm()) == pytest.approx(1, rel=.15)


@pytest.mark.parametrize("epochs", [0, 2])
def test_ldrl_feedback_phase_moves_feedback_alone(epochs):
    network, task = dense(), make_task()
    rule = build("ldrl", network, task, feedback_epochs=epochs)
    phases = rule.phases()
    assert [(p.name, p.epochs) for p in phases] == [("feedback", epochs)] * bool(epochs) + [("train", None)]
    before = tensors(rule)
    apply = stepper(rule)
    step(rule, apply, *batch(task), learn=phases[0].learn)
    # Biases of the inverses cancel in every difference, and need not move.
    weights = {n for n, p in rule.named_parameters() if n.startswith("inverses.") and p.dim() > 1}
    moved = changed(before, rule)
    assert moved >= weights
    assert any(n.startswith("network.") for n in moved) == (epochs == 0)


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_ldrl_trains_its_inverses_so_many_times_a_batch(steps):
    network, task, seen = dense(), make_task(), []
    rule = build("ldrl", network, task, feedback_steps=steps)
    rule.learn(*batch(task), lambda group, loss=None: seen.append(group))
    assert seen == ["feedback"] * steps


def test_ldrl_refuses_dropout():
    """f(x + dx) - f(x) is of the size of dx only if one mask made both: else the loss per squared noise has no bound."""
    with pytest.raises(Refused, match="dropout"):
        build("ldrl", dense(dropout=.5), make_task())


def test_ldrl_takes_every_convolution_of_a_chain():
    """A user's padding='same' is as good as its number: trained or refused, never a crash."""
    network = convolutional(nn.Conv2d(2, 4, 3), nn.Tanh(), nn.Conv2d(4, 4, 3, padding="same"), nn.Tanh())
    task = make_task((2, 9, 9))
    try:
        rule = build("ldrl", network, task)
    except Refused as refused:
        assert "conv2" in str(refused)
    else:
        assert all(g.isfinite().all() for g in learned(rule, *batch(task))[1].values())


def test_task_of_follows_the_yaml():
    assert task_of("elm").loss_name == "mse" and task_of("bp").loss_name == "cross_entropy"
