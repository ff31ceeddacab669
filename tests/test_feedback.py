"""The feedback family against its equations, in float64: sign symmetry, weight mirrors, and what is taught directly."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ARCHS, CLASSES, batch, build, changed, defaults, dense, learned, make_task, step, stepper, task_of, tensors
from test_contracts import in_shape_of, small, two_steps
from test_oracles import (NETWORKS, arrays_of, assert_same, backprop, buffer_name, by_hand, convolutional, softmax_error,
                          tanh_forward)
from torch import nn

import lbp
from lbp import registry
from lbp.algos.feedback.sign_symmetry import UNIFORM, redraw
from lbp.algos.rule import Rng
from lbp.archs.init import KINDS, draw, spread
from lbp.archs.network import Network
from lbp.errors import Refused
from lbp.metrics.measure import angle, products_of
from lbp.training.setup import build_algo

SIGNS = ("usf", "frsf", "brsf")
FAMILY = [name for name in registry.options("algo") if registry.entry("algo", registry.option("algo", name).name).facts["family"] == "feedback"]


def degrees(a, b):
    return angle(products_of(a, b))


def feedback_of(rule, name):
    return dict(rule.pairs())[name][1]


# ---- sign symmetry

@pytest.mark.parametrize("kind", ["dense", "stride, padding", "groups, dilation, no bias", "residual", "attention"])
@pytest.mark.parametrize("name", SIGNS)
def test_feedback_has_the_signs_of_the_weights_and_sizes_of_its_own(name, kind):
    network = NETWORKS[kind]()
    with torch.no_grad():
        list(network.parameters())[-2][0, :2] = 0.0     # of the head
    rule = build(name, network, make_task(network.in_shape))
    assert rule.sites
    for site, (weight, b) in rule.pairs().items():
        assert torch.equal(b.sign(), weight.sign()), site
        sizes = b[weight != 0].abs()
        if name == "usf":
            fan = weight[0].numel() + weight.shape[0] * weight[0, 0].numel()
            torch.testing.assert_close(sizes, torch.full_like(sizes, math.sqrt(2 / fan)))
        else:
            assert sizes.unique().numel() > .9 * min(sizes.numel(), 256) / 2


@pytest.mark.parametrize("name", SIGNS)
def test_sizes_are_kept_or_drawn_anew(name):
    network, task = dense(), make_task()
    rule = build(name, network, task)
    x, y = batch(task)
    sizes = [{site: b.abs() for site, (_, b) in rule.pairs().items()}]
    apply = stepper(rule, lr=5.0)
    signs = {site: weight.sign() for site, weight in rule.sites.items()}
    for _ in range(3):
        step(rule, apply, x, y)
        sizes.append({site: b.abs() for site, (_, b) in rule.pairs().items()})
    assert any(not torch.equal(weight.sign(), signs[site]) for site, weight in rule.sites.items())  # signs followed the weights
    for before, after in zip(sizes, sizes[1:]):
        for site in before:
            assert torch.equal(before[site], after[site]) == (name != "brsf")


@pytest.mark.parametrize("name", SIGNS)
def test_sign_symmetry_equals_its_equation(name):
    """delta_l = (delta_{l+1} |M| sign(W_{l+1})) * f'(a_l)  (Liao et al. 2016)."""
    network, task = dense(), make_task()
    rule = build(name, network, task)
    x, y = batch(task)
    found = learned(rule, x, y)[1]
    layers, values = arrays_of(network), tanh_forward(arrays_of(network), x.numpy())
    deltas = [softmax_error(values[-1], y.numpy())]
    for i in reversed(range(1, len(layers))):
        site = "blocks.head.weight" if i == len(layers) - 1 else f"blocks.fc{i + 1}.linear.weight"
        b = feedback_of(rule, site).abs().numpy() * np.sign(layers[i][0])
        deltas.insert(0, deltas[0] @ b * (1 - values[i] ** 2))
    assert_same(found, by_hand(deltas, values))


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("name", SIGNS)
def test_sizes_of_the_weights_make_it_backprop(name, kind, monkeypatch):
    network = NETWORKS[kind]()
    task = make_task(network.in_shape)
    rule = build(name, network, task)
    if name == "usf":
        with torch.no_grad():
            for site, weight in rule.sites.items():
                weight.copy_(weight.sign() * rule.sizes[site])
    else:
        monkeypatch.setattr("lbp.algos.feedback.sign_symmetry.redraw", lambda *_: None)
        for site, weight in rule.sites.items():
            (getattr(rule, buffer_name(site)) if name == "frsf" else rule.sizes[site]).copy_(weight.detach().abs())
    x, y = batch(task)
    torch.manual_seed(1)
    expected = backprop(network, x, y)
    torch.manual_seed(1)
    assert_same(learned(rule, x, y)[1], expected)


@pytest.mark.parametrize("kind, expected", [("lecun", math.degrees(math.acos(math.sqrt(2 / math.pi)))),
                                            ("uniform", math.degrees(math.acos(math.sqrt(3) / 2)))])
def test_the_angle_between_weights_and_their_signs(kind, expected):
    """37.1 degrees for normal weights, 30 for uniform ones."""
    network = dense((40, 500, 400))
    draw(network.blocks["fc2"].linear.weight, kind)
    rule = build("usf", network, make_task((40,)))
    weight, b = rule.feedback()["fc2"]
    assert degrees(weight, b) == pytest.approx(expected, abs=.15)


@pytest.mark.parametrize("init", [kind for kind in KINDS if kind != "zeros"])
def test_redrawn_sizes_have_the_distribution_of_their_init(init):
    size, rng = torch.empty(300, 200, dtype=torch.float64), Rng()
    redraw(size, init, 2.0, rng.generator)
    std = draw(torch.empty(300, 200, dtype=torch.float64), init, 2.0).std().item()
    assert (size >= 0).all() and size.square().mean().sqrt().item() == pytest.approx(std, rel=.02) == pytest.approx(spread(size, init, 2.0), rel=.02)
    if init in UNIFORM:     # flat up to the bound
        counts = torch.histc(size, 16, 0, math.sqrt(3) * spread(size, init, 2.0))
        assert ((counts - counts.mean()).abs() < 5 * counts.mean().sqrt()).all() and counts.sum() == size.numel()
    first = size.clone()
    redraw(size, init, 2.0, rng.generator)
    assert abs(torch.corrcoef(torch.stack([first.flatten(), size.flatten()]))[0, 1]) < .02


# ---- weight mirrors

def mirrored(rule, steps, rows=64):
    x = torch.zeros(rows, *rule.network.in_shape, dtype=torch.float64)
    for _ in range(steps):
        rule.mirror(x, torch.zeros(rows, dtype=torch.float64))
    return {site: (weight, getattr(rule, buffer_name(site))) for site, weight in rule.sites.items()}


@pytest.mark.parametrize("kind", ["dense", "stride, padding", "groups, dilation, no bias", "1-d", "3-d", "residual", "attention"])
def test_mirrors_of_linear_layers_recover_the_weights(kind):
    """Direction to less than 5 degrees, and with equal rate and decay the size too (Akrout et al. 2019, section 4.1)."""
    network = NETWORKS[kind]()
    rule = build("wm", network, make_task(network.in_shape), rate=.005, decay=.005, noise=.3)
    for site, (weight, b) in mirrored(rule, 1000, rows=256).items():
        assert degrees(weight, b) < 5, site
        assert float(b.norm() / weight.detach().norm()) == pytest.approx(1, rel=.05)


def test_a_mirror_without_decay_grows_along_the_weights_times_the_rate():
    network = dense()
    rule = build("wm", network, make_task(), rate=.01, decay=0.0)
    before = {site: getattr(rule, buffer_name(site)).clone() for site in rule.sites}
    for site, (weight, b) in mirrored(rule, 3000, rows=32).items():
        torch.testing.assert_close((b - before[site]) / 30, weight.detach(), rtol=0, atol=.05)


@pytest.mark.parametrize("response", ["sigmoid", "tanh", "relu"])
def test_a_mirror_through_an_activation_recovers_the_direction(response):
    """E[f(a) xi] = E[f'(a)] noise^2 W for normal noise (Stein's lemma): row by row along W, without the offset of f(0)."""
    network = dense((6, 7, 5))
    rule = build("wm", network, make_task(), rate=.005, decay=.005, response=response, noise=.05)
    (weight, b), *_ = mirrored(rule, 1500, rows=256).values()
    bias, slope = network.blocks["fc2"].linear.bias, {"sigmoid": lambda a: torch.sigmoid(a) * (1 - torch.sigmoid(a)),
                                                     "tanh": lambda a: 1 - a.tanh() ** 2, "relu": lambda a: (a > 0).double()}[response]
    assert degrees(weight * slope(bias)[:, None], b) < 5


def test_answers_without_their_mean_are_less_noisy():
    """sigmoid(0) = 1/2 adds to B what is noise to it."""
    network = dense((6, 7, 5))
    found = []
    for center in (True, False):
        rule = build("wm", network, make_task(), rate=.01, decay=.01, response="sigmoid", noise=.05, center=center)
        (weight, b), *_ = mirrored(rule, 600).values()
        found.append(degrees(weight, b))
    assert found[0] < 20 and found[1] > 1.5 * found[0]


def test_a_mirror_equals_its_equation():
    """B <- (1 - decay) B + rate / noise^2 mean of v xi^T, of both without their means  (Akrout et al. 2019, equation 7)."""
    network, task = dense((6, 7, 5)), make_task()
    rule = build("wm", network, task, rate=.3, decay=.1, noise=.2, response="tanh")
    before = {site: getattr(rule, buffer_name(site)).numpy().copy() for site in rule.sites}
    state = rule.rng.get_extra_state()
    found = mirrored(rule, 1, rows=9)
    rule.rng.set_extra_state(state)
    for site, (weight, b) in found.items():
        w = weight.detach().numpy()
        xi = .2 * rule.rng.normal(torch.empty(9, 1, w.shape[1], dtype=torch.float64)).numpy()[:, 0]
        bias = network.get_parameter(site.replace("weight", "bias")).detach().numpy()
        v = np.tanh(xi @ w.T + bias)
        expected = .9 * before[site] + .3 / .04 * ((v - v.mean(0)).T @ (xi - xi.mean(0)) / 9)
        np.testing.assert_allclose(b.numpy(), expected, rtol=1e-9)


def test_weight_mirrors_learn_through_their_feedback():
    """As feedback alignment with the B that stood when the batch came; the mirror then moves B and nothing else."""
    network, task = dense(), make_task()
    wm, fa = build("wm", network, task), build("fa", network, task)
    fa.load_state_dict({key: value for key, value in wm.state_dict().items() if "rng" not in key})
    x, y = batch(task)
    before = tensors(wm)
    found = learned(wm, x, y)[1]
    assert_same(found, learned(fa, x, y)[1])
    assert changed(before, wm) == {buffer_name(site) for site in wm.sites}


def test_a_warm_up_moves_feedback_alone():
    network, task = dense(), make_task()
    rule = build("wm", network, task, warmup_epochs=2)
    mirror, train = rule.phases()
    assert (mirror.name, mirror.epochs, train.name, train.epochs) == ("mirror", 2, "train", None)
    before, (x, y) = tensors(rule), batch(task)
    result = step(rule, stepper(rule), x, y, mirror.learn)
    assert changed(before, rule) == {buffer_name(site) for site in rule.sites}
    torch.testing.assert_close(result.loss, task.loss(network(x), y).detach())
    assert [phase.name for phase in build("wm", network, task, warmup_epochs=0).phases()] == ["train"]


# ---- taught directly

def test_drtp_equals_its_equation():
    """delta_l = (y B_l) * f'(a_l), the head exact  (Frenkel et al. 2021)."""
    network, task = dense(), make_task()
    rule = build("drtp", network, task)
    x, y = batch(task)
    layers, values = arrays_of(network), tanh_forward(arrays_of(network), x.numpy())
    onehot = np.eye(CLASSES)[y.numpy()]
    deltas = [onehot @ getattr(rule, f"projection_fc{i}").numpy() * (1 - values[i] ** 2) for i in range(1, len(layers))]
    assert_same(learned(rule, x, y)[1], by_hand([*deltas, softmax_error(values[-1], y.numpy())], values))


def test_drtp_does_not_see_the_layers_above():
    network, task = dense(), make_task()
    rule = build("drtp", network, task)
    x, y = batch(task)
    before = learned(rule, x, y)[1]
    with torch.no_grad():
        for name in ("fc3", "head"):
            for p in network.blocks[name].parameters():
                p.normal_()
    after = learned(rule, x, y)[1]
    for name in before:
        assert torch.equal(after[name], before[name]) == (".fc3." not in name and ".head." not in name), name


@pytest.mark.parametrize("name", ["drtp", "sdfa"])
@pytest.mark.parametrize("activation", [nn.ReLU, nn.GELU, nn.ReLU6, nn.Identity])
def test_signals_that_never_vanish_need_bounds(name, activation):
    """A ReLU unit is driven along one line for ever: measured, its updates are no descent (94 degrees and below shallow)."""
    with pytest.raises(Refused, match=rf"algo={name}.*block fc1.*arch.activation=tanh"):
        build(name, dense(activation=activation), task_of(name))
    build(name, dense(activation=nn.Sigmoid), task_of(name))


def test_sdfa_sends_the_errors_signs():
    network, task = dense(), make_task(loss="mse")
    rule = build("sdfa", network, task)
    x, y = batch(task)
    layers, values = arrays_of(network), tanh_forward(arrays_of(network), x.numpy())
    e = values[-1] - np.eye(CLASSES)[y.numpy()]
    deltas = [np.sign(e) @ getattr(rule, f"projection_fc{i}").numpy() * (1 - values[i] ** 2) for i in range(1, len(layers))]
    assert_same(learned(rule, x, y)[1], by_hand([*deltas, e], values))


def test_one_matrix_serves_all_blocks():
    network, task = dense((6, 9, 5, 7)), make_task()
    rule = build("dfa", network, task, shared=True, init="default")
    assert [n for n, _ in rule.named_buffers() if "projection" in n] == ["projection_shared"]
    assert rule.projection_shared.shape == (CLASSES, 9) and rule.projection_shared.abs().max() <= 1 / 3  # 1/sqrt(widest)
    own = build("dfa", network, task)
    for name, width in (("fc1", 9), ("fc2", 5), ("fc3", 7)):
        getattr(own, f"projection_{name}").copy_(rule.projection_shared[:, :width])
    x, y = batch(task)
    assert_same(learned(rule, x, y)[1], learned(own, x, y)[1])


@pytest.mark.parametrize("name", ["dfa", "drtp"])
@pytest.mark.parametrize("kind, maps", [("conv", {"conv1": (4, 7, 7), "conv2": (6, 4, 4)}), ("tokens", {"embed": (5, 6)})])
def test_maps_are_taught_alike_at_all_positions(name, kind, maps):
    """Channels: the same e B at every position, over the root of their number; so of the size of what vectors receive."""
    if kind == "conv":
        network = convolutional(nn.Conv2d(2, 4, 3), nn.Tanh(), nn.Conv2d(4, 6, 3, 2, 1), nn.Tanh())
        network.blocks["conv2"].pooling = nn.Identity()
        network = Network({**network.hidden, "flat": nn.Sequential(nn.Flatten(), nn.Linear(96, 5), nn.Tanh()),
                           "head": nn.Linear(5, CLASSES)}, (2, 9, 9)).double()
    else:
        network = Network({"embed": nn.Sequential(nn.Linear(3, 6), nn.Tanh()), "mix": nn.Sequential(nn.Flatten(), nn.Linear(30, 5), nn.Tanh()),
                           "head": nn.Linear(5, CLASSES)}, (5, 3)).double()
    task = make_task(network.in_shape)
    rule = build(name, network, task, maps="channels")
    x, y = batch(task)
    found = learned(rule, x, y)[1]
    h, signal = x, F.one_hot(y, CLASSES).double()
    if name == "dfa":
        signal = torch.from_numpy(softmax_error(network(x).detach().numpy(), y.numpy()))
    for block, module in network.hidden.items():
        out = module(h)
        taught = signal @ getattr(rule, f"projection_{block}")
        if block in maps:
            shape, positions = maps[block], math.prod(maps[block]) / taught.shape[1]
            assert out.shape[1:] == shape
            taught = (taught / math.sqrt(positions))
            taught = taught[:, :, None, None].expand_as(out) if kind == "conv" else taught[:, None].expand_as(out)
        for (n, _), g in zip(module.named_parameters(), torch.autograd.grad(out, list(module.parameters()), taught)):
            torch.testing.assert_close(found[f"network.blocks.{block}.{n}"], g)
        h = out.detach()


# ---- direct Kolen-Pollack

def test_dkp_equals_its_equations():
    """The network as dfa with the same matrices; B receives e^T h  (Webster et al. 2021)."""
    network, task = dense(), make_task()
    rule, dfa = build("dkp", network, task), build("dfa", network, task)
    for name, matrix in rule.matrices.items():
        getattr(dfa, f"projection_{name}").copy_(matrix.detach())
    x, y = batch(task)
    found, values = learned(rule, x, y)[1], tanh_forward(arrays_of(network), x.numpy())
    assert_same({n: g for n, g in found.items() if n.startswith("network.")}, learned(dfa, x, y)[1])
    e = softmax_error(values[-1], y.numpy())
    for i, h in enumerate(values[1:-1], 1):
        torch.testing.assert_close(found[f"matrices.fc{i}"], torch.from_numpy(e.T @ h))


@pytest.mark.parametrize("settings", [{}, {"momentum": .9}], ids=["plain", "momentum"])
def test_dkp_of_the_last_hidden_block_is_kolen_pollack(settings):
    """W - B shrinks by 1 - lr * weight_decay a step, the head's own pair alone."""
    network, task, lr, decay, steps = dense(), make_task(), .1, .2, 15
    rule = build("dkp", network, task)
    apply = stepper(rule, lr=lr, weight_decay=decay, **settings)
    x, y = batch(task)
    first = (network.head.weight - rule.matrices["fc3"]).detach().clone()
    for _ in range(steps):
        step(rule, apply, x, y)
    now = (network.head.weight - rule.matrices["fc3"]).detach()
    # momentum: the difference alone obeys v <- m v + decay d, d <- d - lr v
    factor, v = 1.0, 0.0
    for _ in range(steps):
        v = settings.get("momentum", 0.0) * v + decay * factor
        factor -= lr * v
    torch.testing.assert_close(now, first * factor, rtol=1e-9, atol=1e-13)


# ---- one hidden layer, the matrices of the head

@pytest.mark.parametrize("name", ["dfa", "dkp"])
def test_with_one_hidden_layer_and_the_heads_weights_it_is_backprop(name):
    network, task = dense((6, 7)), make_task()
    rule = build(name, network, task)
    matrix = rule.matrices["fc1"] if name == "dkp" else rule.projection_fc1
    with torch.no_grad():
        matrix.copy_(network.head.weight)
    x, y = batch(task)
    expected, found = backprop(network, x, y), learned(rule, x, y)[1]
    assert_same({n: g for n, g in found.items() if n in expected}, expected)


def test_with_the_weights_as_feedback_weight_mirrors_are_backprop():
    network, task = dense(), make_task()
    rule = build("wm", network, task)
    for site, weight in rule.sites.items():
        getattr(rule, buffer_name(site)).copy_(weight.detach())
    x, y = batch(task)
    expected = backprop(network, x, y)
    assert_same(learned(rule, x, y)[1], expected)


# ---- every network, in bf16 too

@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("arch", ["lenet", "resnet20", "vit", "resnet18 of torchvision"])
@pytest.mark.parametrize("name", FAMILY)
def test_the_family_trains_the_usual_networks(name, arch, bf16):
    option, knobs = ("torchvision", {"model": "resnet18"}) if "torchvision" in arch else (arch, {})
    # 32 pixels: torch's own bf16 convolution with stride 2 leaves weight gradients of a 1x1 map unwritten on a CPU
    task = task_of(name, (3, 32, 32) if knobs else in_shape_of(option), torch.float32)
    try:
        rule = build_algo(defaults("algo", name), small(option, task, name, **knobs), task)
    except Refused as refused:
        assert name in ("drtp", "sdfa") and option in ("vit", "torchvision") and "bounded activations" in str(refused)
    else:
        two_steps(rule, *batch(task, 4), bf16=bf16)


# ---- bioflax's default experiment: its documentation says that alignment rises, with Kolen-Pollack faster and higher

@pytest.mark.parametrize("data", ["teacher", "sine"])
def test_alignment_rises_as_bioflax_says(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first, last = {}, {}
    for name in ("fa", "kp"):
        run = lbp.run(f"experiment=bioflax_{data}_{name}", "logger.console=off")
        lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
        epochs = [line["total"] for line in lines if line["split"] == "train_epoch"]
        first[name], last[name] = epochs[0], epochs[-1]
    assert last["kp"]["alignment_deg"] < first["kp"]["alignment_deg"] - 10 and last["kp"]["alignment_deg"] < last["fa"]["alignment_deg"] - 10
    assert last["kp"]["feedback_alignment_deg"] < 89 < last["fa"]["feedback_alignment_deg"]
    if data == "teacher":   # of the sine, feedback alignment comes no nearer to backprop
        assert last["fa"]["alignment_deg"] < first["fa"]["alignment_deg"] - 5


# ---- compiled

QUICK = [(name, arch) for name in ("fa", "usf", "dfa") for arch in ("mlp", "lenet", "vit")]
SLOW = [(name, arch) for name in FAMILY for arch in ARCHS if (name, arch) not in QUICK]


@pytest.mark.filterwarnings("ignore")  # torch's compiler's own
@pytest.mark.parametrize("name, arch", [*QUICK, *(pytest.param(*pair, marks=pytest.mark.slow) for pair in SLOW)])
def test_blocks_compile_whole_with_the_backward_operators_in_them(name, arch, backend="aot_eager"):
    """Each block one graph without a break; the gradients of a batch are those of before."""
    torch._dynamo.reset()
    task = task_of(name, in_shape_of(arch))
    try:
        network = small(arch, task, name)
        rule = build_algo(defaults("algo", name), network, task)
    except Refused as refused:
        pytest.skip(str(refused))
    state = {key: value.clone() if isinstance(value, torch.Tensor) else value for key, value in rule.state_dict().items()}
    x, y = batch(task, 4)

    def gradients():
        torch.manual_seed(1)
        rule.load_state_dict(state)
        return learned(rule, x, y)[1]

    plain = gradients()
    for block in network.blocks.values():
        block.compile(fullgraph=True, backend=backend)
    with torch._dynamo.config.patch(recompile_limit=8 * len(network.blocks)):     # as the trainer sets it
        compiled = gradients()
    assert set(plain) == set(compiled)
    if name != "brsf":      # whose sizes are drawn in between
        for n, g in plain.items():
            torch.testing.assert_close(compiled[n], g, rtol=1e-8, atol=1e-10 * max(1.0, float(g.abs().max())))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(not any(map(shutil.which, ("cc", "gcc", "clang"))), reason="inductor needs a compiler")
@pytest.mark.parametrize("name", ["fa", "dfa"])
def test_lenets_blocks_compile_to_kernels(name):
    test_blocks_compile_whole_with_the_backward_operators_in_them(name, "lenet", "inductor")
