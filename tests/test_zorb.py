"""Closed-form rules: least squares, inverse maps, ZORB against a plain NumPy of it, what is said of bad data."""

import numpy as np
import pytest
import torch
from conftest import CLASSES, Log, arrays, batch, build, changed, configuration, defaults, dense, make_task, regression, task_of, tensors
from torch import nn

from lbp.algos.closed_form import inverses
from lbp.algos.closed_form.inverses import Activation, BatchNorm, Flatten, Pool, Weights
from lbp.algos.closed_form.least_squares import QR, Coordinates, Exact, Gram
from lbp.algos.closed_form.ml_elm import autoencoder
from lbp.algos.closed_form.stages import Kept, pulled, sites, stages, trace
from lbp.archs.hard import Sign, Step
from lbp.archs.network import ACTIVATIONS, Layer, Network
from lbp.archs.resnet import ResidualUnit
from lbp.errors import Diverged, Refused
from lbp.training import loop
from lbp.training.setup import build as build_experiment
from lbp.training.setup import build_arch

DOUBLE = torch.float64


def solved(rule, x, y, rows=7):
    """Every phase, the data in batches of a few rows; what each said."""
    return [phase.fit(lambda size: zip(x.split(rows), y.split(rows))) for phase in rule.phases()]


# ---- least squares

def problem(condition, n=60, d=8, c=3):
    """Rows whose constant-free part has singular values from 1 down to 1/condition, and targets."""
    rng = np.random.RandomState(0)
    left, _ = np.linalg.qr(rng.randn(n, d))
    right, _ = np.linalg.qr(rng.randn(d, d))
    return torch.tensor(left * np.geomspace(1, 1 / condition, d) @ right.T), torch.tensor(rng.randn(n, c))


def added(kind, x, t, rows=7):
    found = kind(x.shape[1], t.shape[1], x)
    for a, b in zip(x.split(rows), t.split(rows)):
        found.add(a, b)
    found.gather()
    return found


@pytest.mark.parametrize("rcond", [1e-2, 1e-4, 1e-6])
@pytest.mark.parametrize("condition", [1e1, 1e3])
def test_gram_qr_and_exact_are_numpys_least_squares(condition, rcond):
    x, t = problem(condition)
    ones = np.hstack([x.numpy(), np.ones((len(x), 1))])
    expected = np.linalg.pinv(ones, rcond) @ t.numpy()
    for kind in (Gram, QR, Exact):
        weight, rank, _ = added(kind, x, t).solve(rcond)
        assert rank == np.linalg.matrix_rank(ones, rcond * np.linalg.norm(ones, 2))
        np.testing.assert_allclose(ones @ weight.numpy(), ones @ expected, rtol=0, atol=1e-6)


def test_qr_keeps_directions_that_a_gram_matrix_loses():
    x, t = problem(1e9)
    exact = added(Exact, x, t).solve(1e-12)
    assert added(QR, x, t).solve(1e-12).rank == exact.rank == 9
    np.testing.assert_allclose(added(QR, x, t).solve(1e-12).weight, exact.weight, rtol=1e-5, atol=1e-5 * float(exact.weight.abs().max()))
    assert added(Gram, x, t).solve(1e-12).rank < 9


@pytest.mark.parametrize("kind", [Gram, QR, Exact])
def test_a_ridge_is_rows_below(kind):
    x, t = problem(1e2)
    ones = np.hstack([x.numpy(), np.ones((len(x), 1))])
    size = np.sqrt(.3 * (ones[:, :-1] ** 2).sum() / 8)
    rows = np.vstack([ones, np.hstack([size * np.eye(8), np.zeros((8, 1))])])
    expected = np.linalg.lstsq(rows, np.vstack([t.numpy(), np.zeros((8, 3))]), rcond=None)[0]
    np.testing.assert_allclose(added(kind, x, t).solve(0.0, .3).weight, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", [Gram, QR, Exact])
def test_coordinates_say_where_norms_are_meant(kind):
    """Least norm in the coordinates 5 x + 2, as an answer for x."""
    x, t = (rows[:6] for rows in problem(1e1))      # fewer than the features
    basis = np.eye(9) * 5
    basis[-1, :-1], basis[-1, -1] = 2, 1
    ones = np.hstack([x.numpy(), np.ones((len(x), 1))]) @ basis
    expected = basis @ np.linalg.pinv(ones) @ t.numpy()
    np.testing.assert_allclose(added(kind, x, t).solve(1e-6, seen=Coordinates(5.0, 2.0)).weight, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", [Gram, QR, Exact])
def test_without_an_intercept_there_is_none(kind):
    x, t = problem(1e1)
    weight, rank, _ = added(kind, x, t).solve(1e-6, seen=Coordinates(constant=0.0))
    np.testing.assert_allclose(weight[:-1], np.linalg.lstsq(x.numpy(), t.numpy(), rcond=None)[0], rtol=1e-6, atol=1e-7)
    assert rank == 8 and not weight[-1].any()


@pytest.mark.parametrize("kind", [Gram, QR, Exact])
def test_sums_that_are_not_finite_are_refused(kind):
    x, t = problem(1e1)
    x[3, 2] = torch.nan
    with pytest.raises(Diverged):
        added(kind, x, t).solve(1e-6)


# ---- inverse maps

def stage(kind, module, shape, **more):
    found = kind("fc1", module.double().eval(), shape, **more)
    if isinstance(found, Weights):
        found.prepare(1e-15)
    found.noise = torch.Generator()
    return found


def uniform(*shape, low=0.0, high=1.0):
    return torch.rand(*shape, dtype=DOUBLE) * (high - low) + low


def batch_norm(channels, kind=nn.BatchNorm2d):
    module = kind(channels)
    with torch.no_grad():
        for t in (module.weight, module.running_var):
            t.uniform_(.5, 2)
        for t in (module.bias, module.running_mean):
            t.normal_()
    return module


RANGES = {  # name: (stage, outputs that it can give)
    "sigmoid": lambda: (stage(Activation, nn.Sigmoid(), (5,)), uniform(9, 5, low=.01, high=.99)),
    "sigmoid jax": lambda: (stage(Activation, nn.Sigmoid(), (5,), variant="jax"), uniform(9, 5)),
    "tanh": lambda: (stage(Activation, nn.Tanh(), (5,)), uniform(9, 5, low=-.99, high=.99)),
    "tanh jax": lambda: (stage(Activation, nn.Tanh(), (5,), variant="jax"), uniform(9, 5, low=-1)),
    "hardtanh": lambda: (stage(Activation, nn.Hardtanh(), (5,)), uniform(9, 5, low=-1)),
    "relu": lambda: (stage(Activation, nn.ReLU(), (5,)), uniform(9, 5).relu()),
    "relu jax": lambda: (stage(Activation, nn.ReLU(), (5,), variant="jax"), (uniform(9, 5) - .5).relu()),
    "leaky_relu": lambda: (stage(Activation, nn.LeakyReLU(), (5,)), uniform(9, 5, low=-1)),
    "elu": lambda: (stage(Activation, nn.ELU(), (5,)), uniform(9, 5, low=-.9)),
    "softplus": lambda: (stage(Activation, nn.Softplus(), (5,)), uniform(9, 5, low=.01)),
    "softmax jax": lambda: (stage(Activation, nn.Softmax(1), (5,), variant="jax"), torch.randn(9, 5, dtype=DOUBLE).softmax(1)),
    "sign": lambda: (stage(Activation, Sign(), (5,)), Sign()(torch.randn(9, 5, dtype=DOUBLE))),
    "step": lambda: (stage(Activation, Step(), (5,)), Step()(torch.randn(9, 5, dtype=DOUBLE))),
    "flatten": lambda: (stage(Flatten, nn.Flatten(), (2, 3, 3)), torch.randn(9, 18, dtype=DOUBLE)),
    "batch norm": lambda: (stage(BatchNorm, batch_norm(3), (3, 4, 4)), torch.randn(9, 3, 4, 4, dtype=DOUBLE)),
    "max pool": lambda: (stage(Pool, nn.MaxPool2d(2), (3, 5, 4)), torch.randn(9, 3, 2, 2, dtype=DOUBLE)),
    "average pool": lambda: (stage(Pool, nn.AvgPool2d(2), (3, 5, 4)), torch.randn(9, 3, 2, 2, dtype=DOUBLE)),
    "global pool": lambda: (stage(Pool, nn.AdaptiveAvgPool2d(1), (3, 5, 4)), torch.randn(9, 3, 1, 1, dtype=DOUBLE)),
    "dense": lambda: (stage(Weights, nn.Linear(5, 5), (5,)), torch.randn(9, 5, dtype=DOUBLE)),
    "narrow dense": lambda: (stage(Weights, nn.Linear(7, 5), (7,)), torch.randn(9, 5, dtype=DOUBLE)),
}


@pytest.mark.parametrize("name", RANGES)
def test_an_inverse_map_undoes_its_module(name):
    """run(target(t)) = t for every t that the module can give."""
    found, t = RANGES[name]()
    with torch.no_grad():
        torch.testing.assert_close(found.run(found.target(t, None, None)), t, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("stride, padding", [(1, 0), (2, 0), (1, 1), (3, 1)])
def test_a_convolution_with_as_many_maps_as_its_patches_have_values_is_undone(stride, padding):
    """Then each patch is known, and patches that overlap agree; pixels that no patch covers get 0."""
    found = stage(Weights, nn.Conv2d(2, 18, 3, stride, padding), (2, 7, 6))
    x = torch.randn(4, 2, 7, 6, dtype=DOUBLE)
    with torch.no_grad():
        h = found.run(x)
        back = found.target(h, None, None)
    covered = nn.functional.fold(nn.functional.unfold(torch.ones_like(x), 3, 1, padding, stride), (7, 6), 3, 1, padding, stride) > 0
    torch.testing.assert_close(back, x * covered, rtol=1e-8, atol=1e-8)
    with torch.no_grad():
        torch.testing.assert_close(found.outputs(found.rows(x) @ found.read()[:-1] + found.read()[-1]), h)
        torch.testing.assert_close(found.outputs(found.flat(h)), h)


SMOOTH = ["sigmoid", "tanh", "leaky_relu", "elu", "softplus", "softmax jax", "batch norm", "average pool", "max pool", "dense", "narrow dense", "flatten"]


@pytest.mark.parametrize("name", SMOOTH)
def test_a_small_change_of_the_input_makes_that_of_the_output(name):
    found, h = RANGES[name]()
    x = found.target(h, None, None)
    if name == "max pool":
        x = torch.randn(9, 3, 5, 4, dtype=DOUBLE)      # one position of each is the greatest
    with torch.no_grad():
        h = found.run(x)
        d = 1e-4 * (torch.randn_like(h) if name != "softmax jax" else h * (torch.randn_like(h) - torch.randn_like(h).mean()))
        if name == "softmax jax":
            d = d - h * d.sum(1, keepdim=True)     # outputs go on to sum to 1
        torch.testing.assert_close(found.run(x + found.change(d, x, h)), h + d, rtol=0, atol=1e-6)


@pytest.mark.parametrize("inputs, outputs, stride, project", [(4, 4, 1, False), (2, 6, 2, False), (2, 6, 2, True)])
def test_targets_pass_a_residual_units_sum(inputs, outputs, stride, project):
    unit = ResidualUnit(inputs, outputs, stride, "batch", "leaky_relu", nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()), project)
    network = Network({"stem": nn.Conv2d(inputs, inputs, 1), "unit": unit, "head": nn.Linear(outputs, CLASSES)}, (inputs, 6, 6)).double().eval()
    row = stages(network, "zorb")
    x = torch.randn(5, inputs, 6, 6, dtype=DOUBLE)
    with torch.no_grad():
        path = trace(row, x)
        torch.testing.assert_close(path[-1], network(x))
        total = next(i for i, found in enumerate(row) if isinstance(found, inverses.Sum))
        for found in row:
            if isinstance(found, (Weights, inverses.Sum)):
                found.prepare(1e-15)
        t = torch.randn_like(path[total + 1])
        # for the branch: what the shortcut leaves
        torch.testing.assert_close(row[total].target(t, path[total], path[total + 1]) + unit.shortcut(path[1]), t)
        # for the unit's input: with it the shortcut gives what the branch leaves, as far as it can
        below = row[total].below(t, path[total], path[1], change=False)
        if stride == 1:
            torch.testing.assert_close(unit.shortcut(below) + path[total], t)
        elif not project:
            kept = slice(unit.more // 2, unit.more // 2 + inputs)
            torch.testing.assert_close((unit.shortcut(below) + path[total])[:, kept], t[:, kept])
        assert pulled(row, network(x), 0, path).shape == path[1].shape


# ---- zorb

def numpy_zorb(weights, activations, x, y, rcond, margin=1e-5):
    """ZORB as the paper has it, on dense layers: `weights` (D + 1, out), activations "sigmoid" or "tanh"; all targets are kept, and an
    activation's range is a part of it. Returns the outputs."""
    forward = {"sigmoid": lambda a: 1 / (1 + np.exp(-a)), "tanh": np.tanh}
    inverse = {"sigmoid": lambda h: np.log(h / (1 - h)), "tanh": np.arctanh}
    ends = {"sigmoid": (margin, 1 - margin), "tanh": (2 * margin - 1, 1 - 2 * margin)}
    weights, scale = [w.copy() for w in weights], {}

    def activate(i, a):
        low, high = ends[activations[i]]
        bottom, top = scale.get(i, (low, high))
        return (forward[activations[i]](a) - low) / (high - low) * (top - bottom) + bottom

    h = x
    for i in range(len(weights)):
        t = y
        for j in range(len(weights) - 1, i, -1):
            t = (t - weights[j][-1]) @ np.linalg.pinv(weights[j][:-1])
            (low, high), scale[j - 1] = ends[activations[j - 1]], (t.min(), t.max())
            t = inverse[activations[j - 1]](np.clip((t - t.min()) / (t.max() - t.min()) * (high - low) + low, low, high))
        ones = np.hstack([h, np.ones((len(h), 1))])
        weights[i] = np.linalg.pinv(ones, rcond) @ t
        h = ones @ weights[i]
        if i < len(weights) - 1:
            h = activate(i, h)
    return h


@pytest.mark.parametrize("solver", ["gram", "qr", "exact", "auto"])
@pytest.mark.parametrize("real", [False, True], ids=["classes", "real targets"])
@pytest.mark.parametrize("activation", ["sigmoid", "tanh"])
def test_zorb_is_the_papers_and_its_ranges_are_in_the_saved_network(activation, real, solver):
    network, task = dense((6, 9, 7, 5), activation=ACTIVATIONS[activation]), regression(outputs=CLASSES) if real else make_task(loss="mse")
    x, y = batch(task, 80)
    weights = [np.vstack([m.weight.detach().numpy().T, m.bias.detach().numpy()]) for m in network.modules() if isinstance(m, nn.Linear)]
    targets = y.numpy() if real else np.eye(CLASSES)[y.numpy()]
    expected = numpy_zorb(weights, [activation] * 3, x.numpy(), targets, 1e-4)
    rule = build("zorb", network, task, solver=solver, rcond=1e-4)
    solved(rule, x, y)
    fresh = dense((6, 9, 7, 5), activation=ACTIVATIONS[activation])
    fresh.load_state_dict(network.state_dict())     # nothing but the network
    np.testing.assert_allclose(fresh(x).detach().numpy(), expected, rtol=0, atol=1e-6)


def test_after_the_first_layer_the_network_gives_its_targets_where_it_can():
    """Classes that are linearly separable into their own targets: as many units as samples, and upper layers that can be undone."""
    network, task = dense((30, 6, 5), outputs=CLASSES, activation=nn.Tanh), make_task((30,), loss="mse")
    x, y = batch(task, 12)
    rule = build("zorb", network, task, rcond=1e-12)
    rule.phases()[1].fit(lambda rows: iter([(x, y)]))
    torch.testing.assert_close(network(x), task.onehot(y), rtol=0, atol=1e-6)


def test_a_linear_stack_reaches_the_global_optimum():
    network, task = dense((6, 9, 7), activation=nn.Identity), regression(outputs=3)
    network.blocks["head"] = nn.Linear(7, 3).double()
    x, y = batch(task, 50)
    solved(build("zorb", network, task, rcond=1e-12), x, y)
    ones = np.hstack([x.numpy(), np.ones((50, 1))])
    best = ones @ np.linalg.lstsq(ones, y.numpy(), rcond=None)[0]
    np.testing.assert_allclose(network(x).detach().numpy(), best, rtol=0, atol=1e-10)


@pytest.mark.parametrize("solver, digits", [("auto", 6), ("qr", 8)])      # as many as a Gram matrix promises, and a QR decomposition
def test_the_head_is_numpys_least_squares(solver, digits):
    network, task = dense((6, 9), activation=nn.Sigmoid), make_task(loss="mse")
    x, y = batch(task, 50)
    solved(build("zorb", network, task, rcond=1e-12, solver=solver), x, y)
    with torch.no_grad():
        ones = np.hstack([network.blocks["fc1"](x).numpy(), np.ones((50, 1))])
    expected = ones @ np.linalg.lstsq(ones, np.eye(CLASSES)[y.numpy()], rcond=None)[0]
    np.testing.assert_allclose(network(x).detach().numpy(), expected, rtol=0, atol=10**-digits)


def test_a_convolution_is_least_squares_over_all_patches():
    """A linear network of one convolution over whole images, then the head."""
    conv = nn.Conv2d(2, 5, 3, stride=2, padding=1)
    network = Network({"conv1": Layer(conv, pool=nn.Flatten()), "head": nn.Linear(5 * 9, CLASSES)}, (2, 6, 6)).double()
    task = make_task((2, 6, 6), loss="mse")
    x, y = batch(task, 40)
    w = network.head.weight.detach().numpy()
    t = ((np.eye(CLASSES)[y.numpy()] - network.head.bias.detach().numpy()) @ np.linalg.pinv(w.T)).reshape(40, 5, 9).transpose(0, 2, 1).reshape(-1, 5)
    patches = nn.functional.unfold(x, 3, 1, 1, 2).transpose(1, 2).reshape(-1, 18).numpy()
    ones = np.hstack([patches, np.ones((len(patches), 1))])
    expected = np.linalg.lstsq(ones, t, rcond=None)[0]
    rule = build("zorb", network, task, rcond=1e-10)
    for phase in rule.phases()[:2]:
        phase.fit(lambda rows: zip(x.split(7), y.split(7)))
    np.testing.assert_allclose(conv.weight.detach().flatten(1).T, expected[:-1], rtol=1e-7, atol=1e-9)
    np.testing.assert_allclose(conv.bias.detach(), expected[-1], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("bias", [True, False])
def test_batch_norm_takes_the_datas_statistics_and_the_network_stays_what_was_solved(bias):
    def make():
        conv = Layer(nn.Conv2d(1, 4, 3, bias=bias), nn.BatchNorm2d(4), nn.Tanh(), pool=nn.Flatten())
        return Network({"conv1": conv, "head": nn.Linear(4 * 16, CLASSES)}, (1, 6, 6)).double()

    network, task = make(), make_task((1, 6, 6), loss="mse")
    x, y = batch(task, 40)
    rule = build("zorb", network, task)
    solved(rule, x, y)
    layer = network.blocks["conv1"]
    with torch.no_grad():
        a = layer.linear(x)
        torch.testing.assert_close(layer.norm.running_mean, a.mean((0, 2, 3)), rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(layer.norm.running_var, a.var((0, 2, 3), unbiased=False), rtol=1e-5, atol=1e-8)
        evaluated = network.eval()(x)
        layer.norm.momentum = 0.0
        torch.testing.assert_close(network.train()(x), evaluated, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("arch, shape", [("resnet20", (3, 8, 8)), ("resnet18", (3, 8, 8)), ("cnn", (1, 8, 8)), ("lenet", (1, 28, 28))])
def test_it_solves_networks_of_convolutions(arch, shape):
    task = make_task(shape, loss="mse")
    config = defaults("arch", arch) | ({"width": 4} if arch == "resnet20" else {"width": 1 / 16} if arch == "resnet18" else {"widths": [3, 4], "dense": [6]}
                                       if arch == "cnn" else {"widths": [2, 3, 8], "dense": 7})
    network = build_arch(config, task).double()
    x = torch.randn(60, *shape, dtype=DOUBLE)
    y = (x.flatten(1)[:, :2] > 0).long() @ torch.tensor([1, 2])
    before = task.loss(network.eval()(x), y).mean()
    rule = build("zorb", network, task, ridge=1e-3)
    solved(rule, x, y, rows=20)
    assert all(t.isfinite().all() for t in tensors(rule).values())
    assert task.loss(network.eval()(x), y).mean() < before
    assert task.loss(network(x), y).mean() < (1 - 1 / CLASSES) / 2      # what the classes' shares alone would give


def test_layers_without_a_derivative_learn():
    network, task = dense((8, 40, 30), activation=Sign), make_task((8,), loss="mse")
    x = torch.randn(300, 8, dtype=DOUBLE)
    y = (x[:, :2] > 0).long() @ torch.tensor([1, 2])
    for name in ("zorb", "dzorb"):
        rule = build(name, network, task, **{"ridge": 1e-3})
        solved(rule, x, y, rows=100)
        assert (network(x).argmax(1) == y).double().mean() > .8


def test_every_sweep_solves_each_layer_once():
    rule = build("zorb", dense((6, 7, 5)), make_task(loss="mse"), sweeps=2)
    assert [phase.name for phase in rule.phases()] == ["as drawn", *(f"{name}, sweep {sweep}" for sweep in (1, 2) for name in ("fc1", "fc2", "head"))]
    assert [phase.name for phase in build("zorb", dense((6, 7)), make_task(loss="mse")).phases()] == ["as drawn", "fc1", "head"]


@pytest.mark.parametrize("megabytes", [0, 1])
def test_what_reaches_a_layer_is_that_of_its_data_kept_or_not(megabytes):
    """One MiB holds some batches of these and not others; other data in the next pass are gone through from the start."""
    network = dense((6, 90, 80, 70))
    row, kept = stages(network, "zorb"), Kept(megabytes << 20)
    runs = []
    row[0].run = lambda x, run=row[0].run: runs.append(len(x)) or run(x)
    data, others = torch.randn(2, 5, 500, 6, dtype=DOUBLE)
    with torch.no_grad():
        for site in (2, 4, 6, 2):       # a second sweep starts below what is kept
            for i, x in enumerate(data.clone()):
                torch.testing.assert_close(kept.reaching(site, i, x, row), trace(row[:site], x)[-1], rtol=0, atol=0)
            held = [h.nbytes for _, _, h in kept.batches.values()]
            assert sum(held) + kept.room == megabytes << 20
            assert len(held) == (0 if not megabytes else {90: 2, 80: 3, 70: 3}[row[site].features])
        torch.testing.assert_close(kept.reaching(2, 0, others[0], row), trace(row[:2], others[0])[-1], rtol=0, atol=0)
    assert len(runs) == 2 * 21 - megabytes * (2 + 3)    # each is run a second time here, to compare with


def test_layers_of_a_residual_unit_have_names_of_their_own():
    network = Network({"unit": ResidualUnit(2, 2, 1, "none", "relu", nn.Flatten()), "head": nn.Linear(32, CLASSES)}, (2, 4, 4))
    assert list(sites(stages(network, "zorb")).values()) == ["unit.1", "unit.2", "head"]


def test_the_same_noise_in_every_pass_and_in_batches_of_any_size():
    """Of the NumPy variant's relu, whose negative targets are drawn."""
    found = []
    for rows in (40, 7):
        torch.manual_seed(1)
        network, task = dense((6, 9, 7), activation=nn.ReLU), make_task(loss="mse")
        x, y = batch(task, 40)
        solved(build("zorb", network, task), x, y, rows)
        found.append(network(x))
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("loss", ["cross_entropy", "bce"])
def test_the_outputs_target_is_what_the_losss_own_function_undoes(loss):
    rule = build("zorb", dense(), make_task(loss=loss))
    y, out = torch.arange(CLASSES), torch.randn(CLASSES, CLASSES, dtype=DOUBLE)
    wanted = rule.wanted(y, out)
    given = wanted.softmax(1) if loss == "cross_entropy" else wanted.sigmoid()
    torch.testing.assert_close(given, torch.eye(CLASSES, dtype=DOUBLE), rtol=0, atol=1e-4)
    if loss == "cross_entropy":     # it keeps the outputs' own size
        torch.testing.assert_close(wanted.logsumexp(1), out.logsumexp(1), rtol=0, atol=1e-3)


# ---- metrics, notes, bad data

def test_each_layers_figures_come_before_the_next_layers_update(tmp_path):
    values = configuration("zorb", arch__widths=[9, 8], arch__activation="tanh", metrics__test=True)
    log = Log()
    summary = loop.train(build_experiment(values, arrays((1, 5, 5), n=48)), log, tmp_path)
    for split in ("train_epoch", "test"):
        assert [(line["step"], line["epoch"]) for line in log if line["split"] == split] == [(i, i) for i in (1, 2, 3, 4)]
    lines = [line for line in log if line["split"] == "train_epoch"]
    assert [line["phase"] for line in lines] == ["as drawn", "fc1", "fc2", "head"]
    assert [list(line.get("layers", {})) for line in lines] == [[], ["fc1"], ["fc2"], ["head"]]
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert set(summary["layers"]["fc1"]) == {"rank", "condition"} and summary["steps"] == 4


def notes(rule, x, y):
    return [note for said in solved(rule, x, y) if said for note in said.notes]


@pytest.mark.parametrize("name", ["zorb", "dzorb", "ml_elm"])
@pytest.mark.parametrize("trouble, word", [("few", "fewer than"), ("constant", "constant"), ("one class", "no training sample"), ("twins", "follow from others")])
def test_bad_data_is_solved_with_a_note_and_nothing_becomes_infinite(name, trouble, word):
    task = make_task((20,), loss="mse")
    x, y = torch.randn(60, 20, dtype=DOUBLE), torch.arange(60) % CLASSES
    if trouble == "few":
        x, y = x[:8], y[:8]
    elif trouble == "constant":
        x[:, 3:5] = 7.0
    elif trouble == "twins":
        x[:, 4] = x[:, 3]
    else:
        x, y = x[y != 2], y[y != 2]
    network = dense((20, 6, 5), activation=nn.Tanh)
    rule = build(name, network, task)
    said = notes(rule, x, y)
    assert all(t.isfinite().all() for t in tensors(rule).values()) and network(x).isfinite().all()
    if name != "dzorb" or trouble == "one class":       # whose ridge makes every direction a good one
        assert any(word in note for note in said), said


@pytest.mark.parametrize("name", ["zorb", "dzorb"])
def test_targets_that_do_not_vary_are_solved(name):
    task = regression(outputs=CLASSES)
    network = dense((6, 7, 5), activation=nn.Sigmoid)
    rule = build(name, network, task)
    solved(rule, torch.randn(40, 6, dtype=DOUBLE), torch.ones(40, CLASSES, dtype=DOUBLE))
    assert all(t.isfinite().all() for t in tensors(rule).values())


@pytest.mark.parametrize("layers, word", [
    ([nn.Linear(6, 5), nn.GELU()], "GELU"), ([nn.Linear(6, 5), nn.LayerNorm(5)], "arch.norm=none"), ([nn.Linear(6, 5), nn.Dropout(.2)], "arch.dropout=0"),
    ([nn.Conv2d(2, 4, 3, groups=2), nn.Flatten()], "groups")], ids=["gelu", "layer norm", "dropout", "groups"])
def test_what_has_no_inverse_map_is_refused_by_its_block(layers, word):
    conv = isinstance(layers[0], nn.Conv2d)
    network = Network({"fc1": nn.Sequential(*layers), "head": nn.Linear(16 if conv else 5, CLASSES)}, (2, 4, 4) if conv else (6,))
    for name in ("zorb", "dzorb"):
        with pytest.raises(Refused, match=word) as refused:
            build(name, network, task_of(name, network.in_shape))
        assert "block fc1" in str(refused.value)


# ---- dzorb

@pytest.mark.parametrize("shape, make", [
    ((6,), lambda: dense((6, 12, 10), activation=nn.ReLU)),
    ((1, 6, 6), lambda: Network({"conv1": Layer(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), pool=nn.Sequential(nn.MaxPool2d(2), nn.Flatten())),
                                 "head": nn.Linear(36, CLASSES)}, (1, 6, 6)).double())], ids=["dense", "convolution"])
def test_a_sweep_of_dzorb_brings_the_loss_down(shape, make):
    network, task = make(), make_task(shape, loss="mse")
    x = torch.randn(200, *shape, dtype=DOUBLE)
    y = (x.flatten(1)[:, :2].prod(1) > 0).long() + 2 * (x.flatten(1)[:, 2] > 0).long()
    rule, losses = build("dzorb", network, task, sweeps=4, head_ridge=1e-6), []
    for phase in rule.phases():
        phase.fit(lambda rows: zip(x.split(50), y.split(50)))
        losses.append(float(task.loss(network.eval()(x), y).detach().mean()))
    per_sweep = losses[1 :: len(network.blocks)]     # after the read-out, and after each sweep's head
    assert all(after < before for before, after in zip(per_sweep, per_sweep[1:])), per_sweep
    assert per_sweep[-1] < .9 * per_sweep[0]


def test_dzorb_reaches_what_the_output_asks_for_where_a_layer_can_give_it():
    """A linear hidden layer under a head that can be undone: one sweep ends at the least squares of the inputs."""
    network, task = dense((6, CLASSES), activation=nn.Identity), regression(outputs=CLASSES)
    x, y = batch(task, 40)
    rule = build("dzorb", network, task, sweeps=1, ridge=0.0, inverse_ridge=1e-12, precision="fp64", head_ridge=0.0)
    solved(rule, x, y)
    ones = np.hstack([x.numpy(), np.ones((40, 1))])
    best = ones @ np.linalg.lstsq(ones, y.numpy(), rcond=None)[0]
    np.testing.assert_allclose(network(x).detach().numpy(), best, rtol=0, atol=1e-7)


# ---- ml_elm and the read-out

def test_ml_elm_rebuilds_its_inputs():
    """W = B^T for the least squares B of A B = [X, 1], A = [X, 1] R: numpy's answer, from the Gram matrix alone."""
    rng = np.random.RandomState(0)
    x, drawn = rng.randn(40, 6), rng.randn(7, 4)
    ones = np.hstack([x, np.ones((40, 1))])
    found = autoencoder(torch.tensor(ones.T @ ones), torch.tensor(drawn), 1e-10)
    np.testing.assert_allclose(found.weight, (np.linalg.pinv(ones @ drawn) @ ones).T, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("inner", ["dfa", {"name": "forward_forward"}, {"name": "local", "schedule": "streaming"}], ids=str)
def test_a_read_out_ends_any_rule(inner, tmp_path):
    values = configuration("readout", arch__widths=[9, 8], algo__rule=inner, algo__ridge=.5, trainer__epochs=2)
    experiment = build_experiment(values, arrays((1, 5, 5)))
    rule, network, before = experiment.rule, experiment.network, tensors(experiment.network)
    assert rule.phases()[-1].name == "read-out" and not rule.solved
    loop.train(experiment, Log(), tmp_path)
    moved = changed(before, network)
    assert any(".fc1." in n for n in moved) and any(".fc2." in n for n in moved) and rule.solved
    x, y = experiment.data.train.x, experiment.data.train.y
    with torch.no_grad():
        phi = network.blocks["fc2"](network.blocks["fc1"](x)).double()
        phi = torch.cat([phi, torch.ones(len(phi), 1, dtype=DOUBLE)], 1)
        penalty = torch.eye(9, dtype=DOUBLE) * .5
        penalty[-1, -1] = 0
        expected = torch.linalg.solve(phi.T @ phi + penalty, phi.T @ experiment.data.task.onehot(y).double())
        torch.testing.assert_close(network.head.weight.double(), expected[:-1].T, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(rule.predict(x), network(x))


@pytest.mark.parametrize("inner, word", [("elm", "solves the head itself"), ("zorb", "solves the head itself"), ("sigprob", "did you mean sigprop"),
                                         ({"scale": 2}, "must be a rule")], ids=str)
def test_a_read_out_of_what_is_none_is_refused(inner, word):
    with pytest.raises(Exception, match=word):
        build("readout", dense(), make_task(), rule=inner)


# ---- how a layer is solved

def test_a_ridge_alone_keeps_every_direction():
    network, task = dense((6, 9, 7)), make_task(loss="mse")
    x, y = batch(task, 40)
    said = solved(build("zorb", network, task, rcond=0.0, ridge=1e-3), x, y)
    assert [one.blocks for one in said[1:]] == [{"fc1": {"rank": 7.0}}, {"fc2": {"rank": 10.0}}, {"head": {"rank": 8.0}}]
    assert not any(one.notes for one in said)


def test_auto_says_when_it_takes_qr(monkeypatch):
    """Where rcond keeps what a Gram matrix would lose, and where a layer has fewer rows than (many) features; the answer is exact's."""
    task = make_task((12,), loss="mse")
    for few, rcond, word in ((False, 1e-10, "would lose directions"), (True, 1e-4, "fewer than its features")):
        monkeypatch.setattr("lbp.algos.closed_form.zorb.MANY", 8 if few else 2048)
        found = []
        for solver in ("auto", "exact"):
            torch.manual_seed(2)
            network, (x, y) = dense((12, 6), activation=nn.Tanh), batch(task, 9 if few else 40)
            x[:, :6] *= 1e-7
            said = [note for one in solved(build("zorb", network, task, solver=solver, rcond=rcond), x, y) for note in one.notes]
            assert any(word in note for note in said) == (solver == "auto"), said
            found.append(network(x))
        torch.testing.assert_close(*found, rtol=1e-6, atol=1e-6)
