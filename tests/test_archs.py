"""Networks: blocks that compose to the bit, shapes found without a trace, and the refusals of every arch."""

import inspect
import math
import sys

import pytest
import torch
from conftest import ARCHS, CLASSES, batch, defaults, learned, make_task, tensors
from torch import nn

from lbp import registry
from lbp.algos.ops import feedback_sites
from lbp.archs.init import KINDS, draw, spread
from lbp.archs.network import ACTIVATIONS, Layer, Network
from lbp.archs.network import norm as make_norm
from lbp.errors import ConfigError, Refused
from lbp.training.setup import build_algo, build_arch

SHAPES = {"lenet": (1, 28, 28)}
WIDTH = {"resnet20": {"width": 2}, "resnet32": {"width": 2}, "resnet56": {"width": 2}, "resnet18": {"width": 1 / 32},
         "vgg8b": {"width": 1 / 64, "dense": [7]}, "vgg11b": {"width": 1 / 64, "dense": [7]},
         "vit": {"dim": 6, "depth": 2}, "torchvision": {"model": "mobilenet_v3_small"}}


def make(arch, in_shape=None, seed=0, **knobs):
    task = make_task(in_shape or SHAPES.get(arch, (3, 16, 16)), dtype=torch.float32)
    return build_arch({**defaults("arch", arch), **WIDTH.get(arch, {}), **knobs}, task, seed)


def words(arch, knob):
    """The words that a knob allows; none if it allows numbers."""
    found = registry.option("arch", arch).knobs[knob].spec.split(" | ")
    return found if all(w.isidentifier() and w not in ("int", "float", "bool", "str") for w in found) else []


# ---- every arch

@pytest.mark.parametrize("arch", ARCHS)
def test_blocks_compose_to_the_output_and_shapes_are_theirs(arch):
    network = make(arch)
    x = torch.randn(3, *network.in_shape)
    for mode in (True, False):
        network.train(mode)
        h = x
        with torch.no_grad():
            torch.manual_seed(1)
            for name, block in network.blocks.items():
                h = block(h)
                assert network.shapes[name] == h.shape[1:]
            torch.manual_seed(1)
            assert torch.equal(network(x), h)


@pytest.mark.parametrize("arch", ARCHS)
def test_the_head_is_one_linear(arch):
    network = make(arch)
    *hidden, last = network.blocks
    assert last == "head" and type(network.head) is nn.Linear and network.head is network.blocks["head"]
    assert network.head.out_features == CLASSES and list(network.hidden) == hidden
    assert network.shapes[hidden[-1]] == (network.head.in_features,)
    assert sum(p.numel() for block in network.blocks.values() for p in block.parameters()) == \
        sum(p.numel() for p in network.parameters())


@pytest.mark.parametrize("arch", ARCHS)
def test_weights_depend_on_the_seed_alone(arch):
    first, same, other = make(arch, seed=1), make(arch, seed=1), make(arch, seed=2)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), same.parameters()))
    assert not all(torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters()))


def test_shapes_leave_statistics_modes_and_random_state_alone():
    network = make("cnn", norm="batch", dropout=.5)
    network.blocks["conv2"].eval()
    modes, state, rng = [m.training for m in network.modules()], tensors(network), torch.get_rng_state()
    assert network.shapes["conv1"] == (32, 8, 8)
    assert [m.training for m in network.modules()] == modes and True in modes and False in modes
    assert all(torch.equal(t, state[n]) for n, t in tensors(network).items())
    assert torch.equal(rng, torch.get_rng_state())
    assert all(p.grad is None for p in network.parameters())


@pytest.mark.parametrize("kind, option", [(k, o) for k in ("algo", "arch") for o in registry.options(k)], ids=str)
def test_yaml_keys_are_the_constructors_parameters(kind, option):
    found = registry.option(kind, option)
    thing = registry.load(kind, found.name)
    parameters = [p for p in inspect.signature(thing).parameters.values() if p.name not in ("self", "network", "task")]
    assert {p.name for p in parameters if p.kind is p.KEYWORD_ONLY} == {key.split(".")[0] for key in found.knobs}
    assert all(p.kind is p.KEYWORD_ONLY and p.default is p.empty for p in parameters)     # defaults stand in the YAML alone
    assert found.doc and all(knob.spec and knob.doc for knob in found.knobs.values())


@pytest.mark.parametrize("kind", ["algo", "arch"])
def test_everything_registered_has_an_option(kind):
    assert {registry.option(kind, o).name for o in registry.options(kind)} == set(registry.names(kind))


@pytest.mark.parametrize("arch, knob, word", [(a, k, w) for a in ARCHS for k in registry.option("arch", a).knobs
                                              for w in words(a, k)], ids=str)
def test_every_word_that_a_knob_allows_builds(arch, knob, word):
    try:
        network = make(arch, **{knob: word})
    except Refused as refused:
        assert arch in ("mlp", "lenet") and word == "instance" and "arch.norm=instance" in str(refused)
    else:
        assert network(torch.randn(2, *network.in_shape)).isfinite().all()


@pytest.mark.parametrize("norm, kind", [("batch", nn.BatchNorm2d), ("layer", nn.GroupNorm), ("instance", nn.InstanceNorm2d)])
def test_norms_of_maps(norm, kind):
    x = 3 + 2 * torch.randn(4, 6, 5, 5)
    module = make_norm(norm, 6, 2)
    assert isinstance(module, kind)
    axes = {"batch": (0, 2, 3), "layer": (1, 2, 3), "instance": (2, 3)}[norm]
    mean, var = x.mean(axes, keepdim=True), x.var(axes, keepdim=True, unbiased=False)
    torch.testing.assert_close(module(x), (x - mean) / (var + 1e-5).sqrt())


@pytest.mark.parametrize("name", ["relu", "tanh", "sigmoid", "hardtanh", "softplus", "none"])
def test_activations_are_what_they_are_called(name):
    x = torch.linspace(-3, 3, 13)
    expected = {"relu": x.clamp(min=0), "tanh": torch.tanh(x), "sigmoid": 1 / (1 + (-x).exp()), "hardtanh": x.clamp(-1, 1),
                "softplus": (1 + x.exp()).log(), "none": x}[name]
    torch.testing.assert_close(ACTIVATIONS[name]()(x), expected)


# what a hard activation gives for X, and the slope that the straight-through one pretends
X = [-1.5, -.5, 0.0, .5, 1.5]
P = [1 / (1 + math.exp(-x)) for x in X]
SOFT = [math.exp(x) / sum(math.exp(z) for z in X) for x in X]
HARD = {"sign": ([-1, -1, 1, 1, 1], [0, 1, 1, 1, 0]), "step": ([0, 0, 1, 1, 1], [0, 1, 1, 1, 0]),
        "bernoulli": ([0, 0, 1, 1, 1], [p * (1 - p) for p in P]), "argmax": ([0, 0, 0, 0, 1], [-s * SOFT[-1] for s in SOFT[:-1]] + [SOFT[-1] * (1 - SOFT[-1])])}


@pytest.mark.parametrize("name", HARD)
@pytest.mark.parametrize("ste", ["", "_ste"])
def test_hard_activations_and_their_straight_through_derivatives(name, ste):
    """Of the last unit's output for argmax, which is a softmax straight through; else of each unit's own."""
    module = ACTIVATIONS[name + ste]().eval()
    x = torch.tensor([X], dtype=torch.float64, requires_grad=True)
    out = module(x)
    values, slopes = (torch.tensor([v], dtype=torch.float64) for v in HARD[name])
    assert torch.equal(out, values)
    (out[0, -1] if name == "argmax" else out.sum()).backward()
    torch.testing.assert_close(x.grad, slopes if ste else torch.zeros_like(x))


def test_a_bernoulli_unit_fires_with_its_probability():
    module = ACTIVATIONS["bernoulli"]()
    x = torch.tensor(X).expand(20_000, -1)
    found = module(x)
    assert set(found.unique().tolist()) == {0.0, 1.0}
    torch.testing.assert_close(found.mean(0), torch.tensor(P), rtol=0, atol=.02)


def test_what_is_transmitted_is_hard_while_the_layer_keeps_its_own_values():
    network = make("mlp", widths=[9, 8, 7], activation="tanh", transmit="sign")
    x = torch.randn(4, *network.in_shape)
    h = network.blocks["fc1"](x)
    assert len(h.unique()) > 2
    layer = network.blocks["fc2"]
    assert torch.equal(layer(h), torch.tanh(layer.linear(h.sign())))
    assert torch.equal(network.head(network.blocks["fc3"](layer(h))), network(x))


@pytest.mark.parametrize("knobs, algo, message", [
    ({"activation": "sign"}, "dfa", r"algo=dfa needs the derivatives of blocks, and block fc1 has Sign.*arch.activation=sign_ste"),
    ({"transmit": "step"}, "bp", r"arch.transmit=step: what block fc2 receives has no derivative.*arch.transmit=step_ste"),
    ({"transmit": "step"}, "fa", r"arch.transmit=step: what block fc2 receives has no derivative"),
])
def test_what_cannot_be_taught_through_a_hard_activation_is_refused(knobs, algo, message):
    task = make_task((6,))
    with pytest.raises(Refused, match=message):
        build_algo(defaults("algo", algo), build_arch({**defaults("arch", "mlp"), **knobs}, task), task)


@pytest.mark.parametrize("knobs, algo", [({"activation": "sign"}, "shallow"), ({"activation": "sign_ste"}, "bp"),
                                         ({"activation": "tanh", "transmit": "sign"}, "dfa"), ({"activation": "tanh", "transmit": "sign"}, "ldrl"),
                                         ({"activation": "tanh", "transmit": "sign_ste"}, "fa")], ids=str)
def test_what_can_be_is_taught_in_every_block(knobs, algo):
    task = make_task((6,), dtype=torch.float32)
    network = build_arch({**defaults("arch", "mlp"), "widths": [9, 8], **knobs}, task)
    rule = build_algo(defaults("algo", algo), network, task)
    gradients = learned(rule, *batch(task))[1]
    moved = {n.split(".")[2] for n, g in gradients.items() if n.startswith("network.") and g.any()}
    assert moved == ({"head"} if algo == "shallow" else {"fc1", "fc2", "head"})


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_drawn_with_the_spread_of_their_papers(kind):
    out, fan_in, scale = 300, 400, 2.0
    weight = draw(torch.empty(out, fan_in), kind, scale)
    std = {"default": (1 / 3 / fan_in) ** .5, "xavier": (2 / (fan_in + out)) ** .5, "xavier_normal": (2 / (fan_in + out)) ** .5,
           "kaiming": (2 / fan_in) ** .5, "kaiming_uniform": (2 / fan_in) ** .5, "lecun": (1 / fan_in) ** .5, "uniform": 3 ** -.5,
           "variance_scaling": (1 / scale / fan_in) ** .5, "orthogonal": fan_in ** -.5, "zeros": 0.0}[kind] * scale
    assert weight.std().item() == pytest.approx(std, rel=.02) and abs(weight.mean().item()) <= .2 * std
    assert spread(weight, kind, scale) == pytest.approx(std)
    flat = kind in ("default", "xavier", "kaiming_uniform", "uniform", "zeros")
    assert (weight.abs().max().item() <= 3 ** .5 * std * 1.0001) == flat
    if kind == "orthogonal":
        torch.testing.assert_close(weight @ weight.T, scale**2 * torch.eye(out), atol=1e-5, rtol=0)
    kernel = draw(torch.empty(64, 32, 3, 3), kind)
    assert kernel.std().item() == pytest.approx(spread(kernel, kind), rel=.03)


@pytest.mark.parametrize("kind", ["default", "lecun", "variance_scaling", "zeros"])
@pytest.mark.parametrize("arch", [a for a in ARCHS if "init_scale" in registry.option("arch", a).knobs])
def test_forward_weights_have_a_scale_of_their_own(arch, kind):
    plain, scaled = (make(arch, init=kind, init_scale=scale) for scale in (1.0, 9.0))
    factor = 3 if kind == "variance_scaling" else 9
    weights = {id(m.weight) for n in (plain, scaled) for m in n.modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
    for a, b in zip(plain.parameters(), scaled.parameters(), strict=True):
        torch.testing.assert_close(b, factor * a if id(b) in weights else a)
        assert kind != "zeros" or id(b) not in weights or not b.any()


@pytest.mark.parametrize("arch", ["mlp", "cnn"])
def test_a_drawn_network_starts_without_biases(arch):
    network = make(arch, init="kaiming")
    assert all(not p.any() for n, p in network.named_parameters() if n.endswith(".bias"))


# ---- each arch

def test_mlp_layers():
    network = make("mlp", (1, 4, 5), widths=[9, 8], norm="batch", dropout=.5)
    assert network.shapes == {"fc1": (9,), "fc2": (8,), "head": (CLASSES,)}
    layer = network.blocks["fc1"]
    x = torch.randn(6, 1, 4, 5)
    torch.manual_seed(1)
    h = layer(x)
    torch.manual_seed(1)
    a = layer.pre(x)
    torch.testing.assert_close(a, layer.norm(x.flatten(1) @ layer.linear.weight.T + layer.linear.bias))
    assert torch.equal(h, layer.pool(layer.activate(a))) and ((h > 0) == (h != 0)).all()
    assert layer.dropout.p == .5


def test_cnn_keeps_maps_and_halves_them():
    network = make("cnn", (3, 28, 28), widths=[5, 7], dense=[11, 6], kernel=5)
    assert network.shapes == {"conv1": (5, 14, 14), "conv2": (7 * 7 * 7,), "fc1": (11,), "fc2": (6,), "head": (CLASSES,)}
    assert make("cnn", (3, 28, 28), dense=[]).shapes["conv2"] == (64 * 49,)


@pytest.mark.parametrize("knobs", [{"kernel": 2, "widths": [4, 4, 4]}, {"kernel": 4, "widths": [4, 4, 4]}, {"widths": []},
                                   {"kernel": 1}, {"kernel": 7, "widths": [2, 2, 2]}, {"widths": [], "dense": []}], ids=str)
def test_cnn_of_any_size_is_built_right_or_refused(knobs):
    try:
        network = make("cnn", (3, 28, 28), **knobs)
    except ConfigError as refused:
        assert "arch." in str(refused) or "hidden block" in str(refused)
    else:
        assert network(torch.randn(2, 3, 28, 28)).shape == (2, CLASSES)


@pytest.mark.parametrize("side", [28, 32])
def test_lenet_is_lenet_5(side):
    """LeCun et al. 1998: maps of 14x14 and 5x5, a third convolution that sees all of it, 84 units."""
    network = make("lenet", (1, side, side))
    assert network.shapes == {"conv1": (6, 14, 14), "conv2": (16, 5, 5), "conv3": (120,), "fc1": (84,), "head": (CLASSES,)}
    counts = [sum(p.numel() for p in block.parameters()) for block in network.blocks.values()]
    assert counts == [6 * 26, 16 * (6 * 25 + 1), 120 * (16 * 25 + 1), 84 * 121, CLASSES * 85]


@pytest.mark.parametrize("shape", [(1, 30, 40), (3, 64, 64)])
def test_lenet_takes_larger_images(shape):
    assert make("lenet", shape)(torch.randn(2, *shape)).shape == (2, CLASSES)


@pytest.mark.parametrize("option, layers, millions", [("resnet20", 20, .27), ("resnet32", 32, .46), ("resnet56", 56, .85)])
def test_resnets_have_the_depth_and_size_of_their_paper(option, layers, millions):
    """He et al. 2016, section 4.2 and table 6."""
    task = make_task((3, 32, 32), outputs=10, dtype=torch.float32)
    network = build_arch(defaults("arch", option), task)
    weights = [m for m in network.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert len(weights) == layers
    n = (layers - 2) // 6
    by_hand = 3 * 16 * 9 + 16 * 2      # the stem: kernel and norm
    for stage, width in enumerate((16, 32, 64)):
        below = width // 2 if stage else width
        by_hand += 9 * (below * width + (2 * n - 1) * width * width) + 2 * n * 2 * width
    by_hand += 64 * 10 + 10
    found = sum(p.numel() for p in network.parameters())
    assert found == by_hand and round(found / 1e6, 2) == millions
    shapes = list(network.shapes.values())
    assert shapes[:1] + shapes[n : n + 2] == [(16, 32, 32), (16, 32, 32), (32, 16, 16)] and shapes[-2] == (64,)


def test_a_residual_unit_adds_a_strided_padded_shortcut():
    """Their option A: with the residual branch silenced, what is left is the input, subsampled, between zero channels."""
    network = make("resnet20", (3, 16, 16), width=2, norm="none")
    unit = network.blocks["unit2_1"]
    with torch.no_grad():
        unit.conv2.weight.zero_()
    x = torch.rand(2, 2, 16, 16)
    h = unit(x)
    assert h.shape == (2, 4, 8, 8)
    assert torch.equal(h[:, 1:3], x[:, :, ::2, ::2]) and not h[:, [0, 3]].any()


def whole(arch, in_shape, **knobs):
    """At full size, with ten classes and no values."""
    with torch.device("meta"):
        return build_arch({**defaults("arch", arch), **knobs}, make_task(in_shape, outputs=10, dtype=torch.float32))


def parameters(network):
    return sum(p.numel() for p in network.parameters())


@pytest.mark.parametrize("arch, channels, pools", [
    ("vgg8b", [128, 256, 256, 512, 512, 512], [2, 4, 5, 6]),
    ("vgg11b", [128, 128, 128, 256, 256, 512, 512, 512, 512], [4, 6, 8, 9])])
@pytest.mark.parametrize("shape, sides", [((1, 28, 28), (28, 14, 7, 3, 1)), ((3, 32, 32), (32, 16, 8, 4, 2)),
                                          ((3, 96, 96), (48, 24, 12, 6, 3))], ids=str)
def test_vggs_are_those_of_the_local_losses(arch, channels, pools, shape, sides):
    """Nokland & Eidnes 2019, and the layer lists, stem and rounding of their code."""
    network = whole(arch, shape)
    expected, below, by_hand, pooled = [], shape[0], 0, 0
    for i, out in enumerate(channels, 1):
        pooled += i in pools
        expected.append((out, sides[pooled], sides[pooled]))
        kernel = 7 if shape[1] > 64 and i == 1 else 3
        by_hand += out * (kernel**2 * below + 1) + 2 * out      # and the norm
        below = out
    flat = 512 * sides[-1] ** 2
    assert list(network.shapes.values()) == [*expected[:-1], (flat,), (1024,), (10,)]
    assert parameters(network) == by_hand + 1024 * (flat + 3) + 1025 * 10
    layer = network.blocks["conv2"]
    assert isinstance(layer.norm, nn.BatchNorm2d) and layer.activation.negative_slope == .01 and layer.linear.padding == (1, 1)
    narrow = whole(arch, shape, width=.25)
    assert [s[0] for s in list(narrow.shapes.values())[: len(channels) - 1]] == [c // 4 for c in channels[:-1]]
    assert narrow.shapes["fc1"] == (1024,)


def test_a_vgg_drops_whole_maps_and_single_dense_units():
    network = make("vgg8b", (3, 16, 16), width=1 / 8, dense=[400], dropout=.5, activation="sigmoid", norm="none")
    layer = network.blocks["conv1"]
    assert isinstance(layer.dropout, nn.Dropout)     # as which rules that refuse dropout know it
    maps = layer.activate(torch.zeros(5, 16, 4, 4)).flatten(2)
    assert ((maps == 0).all(2) | (maps == 1).all(2)).all() and {0., 1.} == set(maps.flatten().tolist())
    dense = network.blocks["fc1"].activate(torch.zeros(1, 400))
    assert 100 < (dense == 0).sum() < 300


def test_resnet18_is_the_papers_and_torchvisions():
    """He et al. 2016, table 1, with the paper's stem: equal to torchvision's forward with its weights, to the bit."""
    from torchvision import models

    theirs = models.resnet18(weights=None, num_classes=CLASSES)
    for module in theirs.modules():     # or the norms would do nothing
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(1, 2)
    network = build_arch({**defaults("arch", "resnet18"), "stem": "large"}, make_task((3, 48, 48), dtype=torch.float32))
    ours, values = network.state_dict(), list(theirs.state_dict().values())
    network.load_state_dict(dict(zip(ours, values, strict=True)))
    x = torch.randn(2, 3, 48, 48)
    assert torch.equal(network.eval()(x), theirs.eval()(x))


@pytest.mark.parametrize("shape, stem, first, last", [
    ((3, 32, 32), "auto", 32, 4), ((3, 64, 64), "auto", 64, 8), ((3, 65, 65), "auto", 17, 3), ((3, 224, 224), "auto", 56, 7),
    ((3, 32, 32), "large", 8, 1), ((3, 224, 224), "small", 224, 28)], ids=str)
def test_resnet18_has_a_stem_for_each_size(shape, stem, first, last):
    network = whole("resnet18", shape, stem=stem)
    assert network.shapes["stem"] == (64, first, first) and network.shapes["unit4_1"] == (512, last, last)
    if first == shape[1]:
        assert parameters(network) == 11_173_962      # known of the usual one for CIFAR-10
    weights = [n for n, m in network.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear)) and "projection" not in n]
    assert len(weights) == 18
    assert whole("resnet18", shape, width=.25).shapes["unit3_2"][0] == 64


def test_a_layer_of_the_vit_is_the_usual_pre_norm_one():
    """Against nn.TransformerEncoderLayer with the same weights."""
    layer = make("vit", dim=12, depth=2, heads=3).blocks["layer1"].eval()
    theirs = nn.TransformerEncoderLayer(12, 3, 48, 0.0, "gelu", batch_first=True, norm_first=True)
    a = layer.attention
    with torch.no_grad():
        theirs.self_attn.in_proj_weight.copy_(torch.cat([a.query.weight, a.key.weight, a.value.weight]))
        theirs.self_attn.in_proj_bias.copy_(torch.cat([a.query.bias, a.key.bias, a.value.bias]))
    theirs.self_attn.out_proj, theirs.linear1, theirs.linear2 = a.out, layer.up, layer.down
    x = torch.randn(2, 16, 12)
    torch.testing.assert_close(layer(x), theirs(x), rtol=1e-5, atol=1e-6)


def test_the_vits_blocks():
    network = make("vit", (3, 28, 28), patch=7, dim=12, depth=2, heads=3)
    assert network.shapes == {"embed": (16, 12), "layer1": (16, 12), "layer2": (12,), "head": (CLASSES,)}
    x = torch.randn(2, 3, 28, 28)
    embed, last = network.blocks["embed"], network.blocks["layer2"]
    torch.testing.assert_close(embed(x)[:, 6] - embed.positions[6], embed.linear(x)[:, :, 1, 2])     # row by row
    h, pool = network.blocks["layer1"](embed(x)), last.pool
    last.pool = nn.Identity()
    torch.testing.assert_close(pool(last(h)), nn.functional.layer_norm(last(h), (12,)).mean(1))
    # The error passes every projection but the patches'; positions are no weight that feedback could stand in for.
    assert set(feedback_sites(network)) == {
        f"blocks.layer{i}.{part}.weight" for i in (1, 2) for part in
        ("attention.query", "attention.key", "attention.value", "attention.out", "up", "down")} | {"blocks.head.weight"}


# ---- torchvision

@pytest.mark.parametrize("model", [
    "alexnet", "vgg11_bn", "resnet18", "resnext50_32x4d", "densenet121", "mobilenet_v2", "mobilenet_v3_small",
    "efficientnet_b0", "efficientnet_v2_s", "convnext_tiny", "regnet_x_400mf", "regnet_y_400mf"])
def test_torchvisions_classifiers_are_cut_without_changing_a_bit(model, monkeypatch):
    from torchvision import models

    theirs = models.get_model(model, weights=None, num_classes=CLASSES, **{"init_weights": False} if "vgg" in model else {})
    x, outputs = torch.randn(2, 3, 64, 64), {}
    state = {key: value.clone() for key, value in theirs.state_dict().items() if "running" in key or "tracked" in key}
    for mode in (True, False):
        torch.manual_seed(1)
        with torch.no_grad():
            outputs[mode] = theirs.train(mode)(x)
    theirs.load_state_dict(state, strict=False)
    known = {id(p) for p in theirs.parameters()}
    monkeypatch.setattr(models, "get_model", lambda *args, **kwargs: theirs)
    network = make("torchvision", (3, 64, 64), model=model)
    assert {id(p) for p in network.parameters()} == known
    for mode in (True, False):
        network.train(mode)
        torch.manual_seed(1)
        h = x
        with torch.no_grad():
            for block in network.blocks.values():
                kept, below = h.clone(), h
                h = block(below)
                assert torch.equal(below, kept)     # or what a rule keeps of a block would be another block's
            assert torch.equal(h, outputs[mode])
    assert sum(1 for _ in network.blocks) >= 8 and not feedback_sites(network).keys() - dict(network.named_parameters()).keys()


def test_every_listed_model_is_one_of_torchvisions():
    from torchvision import models

    from lbp.archs.torchvision import STEPS
    assert STEPS.keys() <= set(models.list_models(module=models))


@pytest.mark.parametrize("model", ["inception_v3", "googlenet", "vit_b_16", "swin_t", "squeezenet1_0", "resnet19", "fcn_resnet50", ""])
def test_other_models_are_refused_by_name(model):
    with pytest.raises(ConfigError, match=f"arch.model={model}: .*" + "did you mean resnet1.*" * (model == "resnet19") + "regnet_x_400mf"):
        make("torchvision", model=model)


class Broken:
    def __getattr__(self, name):
        raise RuntimeError("operator torchvision::nms does not exist")


@pytest.mark.parametrize("module, says", [(None, "ModuleNotFoundError|ImportError"), (Broken(), "nms")], ids=["missing", "broken"])
def test_a_missing_torchvision_is_named(module, says, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", module)
    with pytest.raises(ConfigError, match=f"needs the package torchvision.*({says}).*pip install"):
        make("torchvision")


@pytest.mark.parametrize("arch, in_shape, knobs, says", [
    ("vgg8b", (7,), {}, r"arch=mlp"), ("vgg8b", (3, 15, 32), {}, r"15x32.*4 times.*dataset\.resize"),
    ("vgg8b", (3, 16, 16), {"stages": []}, r"arch\.stages"), ("vgg11b", (3, 16, 16), {"stages": [[4], []]}, r"arch\.stages"),
    ("resnet18", (7,), {}, r"arch=mlp"), ("resnet18", (3, 7, 7), {}, r"8x8.*dataset\.resize"),
    ("resnet18", (3, 8, 8), {"norm": "instance"}, r"none, batch or layer"),
    ("resnet18", (3, 32, 32), {"norm": "instance", "stem": "large"}, r"none, batch or layer"),
    ("vit", (7,), {}, r"arch=mlp"), ("vit", (3, 16, 16), {"patch": 5}, r"arch\.patch=5.*dataset\.resize=15"),
    ("vit", (3, 16, 16), {"heads": 4}, r"arch\.heads=4.*arch\.dim=6"),
    ("torchvision", (7,), {}, r"arch=mlp"), ("torchvision", (1, 32, 32), {}, r"3 channels.*arch=resnet18"),
    ("torchvision", (3, 32, 32), {"model": "alexnet"}, r"alexnet: 32x32.*dataset\.resize \(64"),
    ("cnn", (7,), {}, r"arch=mlp"), ("lenet", (7,), {}, r"arch=(cnn|mlp)"), ("resnet20", (7,), {}, r"arch=mlp"),
    ("cnn", (3, 3, 3), {}, r"arch\.widths|dataset\.resize"), ("cnn", (3, 16, 16), {"widths": [4] * 5}, r"arch\.widths"),
    ("lenet", (3, 16, 16), {}, r"dataset\.resize=32"), ("resnet20", (3, 4, 4), {}, r"8x8"),
    ("resnet20", (3, 16, 16), {"depth": 21}, r"6n\+2.*20"), ("resnet20", (3, 16, 16), {"depth": 9}, r"6n\+2"),
    ("mlp", (7,), {"norm": "instance"}, r"none, batch or layer"), ("mlp", (7,), {"widths": []}, r"hidden"),
    ("lenet", (1, 28, 28), {"widths": [6, 16]}, r"widths"), ("lenet", (1, 28, 28), {"widths": [6, 16, 120, 9]}, r"widths"),
], ids=str)
def test_refusals_say_what_to_do(arch, in_shape, knobs, says):
    with pytest.raises(ConfigError, match=says):
        make(arch, in_shape, **knobs)


# ---- typed stacks

@pytest.mark.parametrize("layers, shapes", [
    (["flatten", "dense:5", "relu"], [(5,)]),
    (["conv:4:3", "relu", "flatten", "dense:6", "sigmoid"], [(4 * 14 * 14,), (6,)]),
    (["conv:4:3:2:1", "norm:batch", "tanh", "maxpool:2", "conv:5:3", "norm:layer", "relu", "avgpool:2:1", "flatten"],
     [(4, 4, 4), (5,)]),
    (["conv:4:5:1:2", "norm:instance", "leaky_relu", "dropout:0.2", "flatten", "dense:9", "norm:layer", "gelu", "dropout:0"],
     [(4 * 256,), (9,)]),
    (["conv:4:3", "relu", "conv:6:3:1:1:2", "tanh", "avgpool:14", "flatten"], [(4, 14, 14), (6,)]),
    (["maxpool:3:2", "conv:2:3:2:0", "hardtanh", "flatten", "dense:3", "softmax"], [(18,), (3,)]),
    (["norm:batch", "flatten", "dense:4", "elu", "dense:4", "silu", "dense:4", "softplus"], [(4,), (4,), (4,)]),
], ids=lambda v: "-".join(v) if isinstance(v[0], str) else "")
def test_stacks(layers, shapes):
    network = make("stack", (3, 16, 16), layers=layers)
    assert list(network.shapes.values()) == [*shapes, (CLASSES,)]
    assert network(torch.randn(2, 3, 16, 16)).isfinite().all()


@pytest.mark.parametrize("token, says", [
    ("conv:8:3:0:1", "conv:CHANNELS:KERNEL"), ("conv:0:3", "conv:CHANNELS"), ("conv:0:3:1:0", "conv:CHANNELS"),
    ("conv:8:0:1:0", "conv:CHANNELS"), ("conv:8", "conv:CHANNELS"), ("conv", "conv:CHANNELS"), ("conv:8:3:1:-1", "conv:CHANNELS"),
    ("conv:8:3:1:0:0", "conv:CHANNELS"), ("conv:8:3:1:0:2:1", "conv:CHANNELS"), ("conv:8:3:1:0:2", "2 groups do not divide 3"),
    ("conv:a:3", "conv:CHANNELS"), ("conv:8:3.5", "conv:CHANNELS"), ("conv::3", "conv:CHANNELS"),
    ("maxpool", "maxpool:SIZE"), ("maxpool:0", "maxpool:SIZE"), ("maxpool:2:0", "maxpool:SIZE"), ("maxpool:2:2:2", "maxpool:SIZE"),
    ("avgpool:x", "avgpool:SIZE"), ("flatten:2", "flatten"), ("relu:2", "must be written relu"), ("tanh:1:1", "must be written tanh"),
    ("norm", "norm:batch"), ("norm:group", "norm:batch"), ("norm:2", "norm:batch"), ("norm:batch:2", "norm:batch"),
    ("dropout", "dropout:RATE"), ("dropout:1", "dropout:RATE"), ("dropout:-.1", "dropout:RATE"), ("dropout:nan", "dropout:RATE"),
    ("dropout:.1:.2", "dropout:RATE"), ("cov:8:3", "conv:CHANNELS"), ("Relu", "relu"), ("none", "allowed"), ("", "allowed"),
    ("dense:8", "flatten"), ("conv:8:17", "17"), ("maxpool:17", "17"),
])
def test_bad_tokens_of_images(token, says):
    with pytest.raises(ConfigError, match=says) as caught:
        make("stack", (3, 16, 16), layers=[token, "conv:2:3", "relu", "flatten"])
    assert "arch.layers" in str(caught.value)


@pytest.mark.parametrize("token, says", [
    ("dense", "dense:UNITS"), ("dense:0", "dense:UNITS"), ("dense:-3", "dense:UNITS"), ("dense:3:3", "dense:UNITS"),
    ("dense:x", "dense:UNITS"), ("conv:4:3", "maps"), ("maxpool:2", "maps"), ("avgpool:2", "maps"), ("norm:instance", "batch or layer"),
])
def test_bad_tokens_of_vectors(token, says):
    with pytest.raises(ConfigError, match=says) as caught:
        make("stack", (7,), layers=["dense:5", token, "relu"])
    assert "arch.layers" in str(caught.value)


@pytest.mark.parametrize("layers, says", [
    (["conv:2:3", "relu"], "flatten"), (["flatten", "relu"], "hidden"), ([], "flatten|hidden"),
], ids=str)
def test_stacks_that_are_no_network(layers, says):
    with pytest.raises(ConfigError, match=says):
        make("stack", (3, 16, 16), layers=layers)


# ---- networks of the user's own

class Odd(nn.Module):
    """A block that reads like none of ours."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(5, 5), nn.Linear(5, 5)

    def forward(self, x):
        return x + self.b(self.a(x).relu())


USERS = {
    "plain": lambda: (nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, CLASSES)), (6,), {"fc1": Layer}),
    "two in a row": lambda: (nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 7), nn.Linear(7, CLASSES)), (6,), {"fc1": Layer, "fc2": Layer}),
    "flatten first": lambda: (nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.Tanh(), nn.Linear(5, CLASSES)), (3, 2, 2), {"fc1": Layer}),
    "nested": lambda: (nn.Sequential(nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Sequential(nn.GELU(), nn.Dropout(.3))),
                                     nn.Sequential(nn.Linear(5, 5), nn.LayerNorm(5)), nn.ReLU(), nn.Sequential(nn.Linear(5, CLASSES))),
                       (6,), {"fc1": Layer, "fc2": Layer}),
    "images": lambda: (nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2),
                                     nn.Conv2d(4, 5, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                                     nn.Dropout(.5), nn.Linear(5, 6), nn.Sigmoid(), nn.Linear(6, CLASSES)),
                       (3, 12, 12), {"conv1": Layer, "conv2": nn.Sequential, "fc1": Layer}),
    "norm after the activation": lambda: (nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.BatchNorm1d(5), nn.Linear(5, CLASSES)), (6,),
                                          {"fc1": nn.Sequential}),
    "norm first": lambda: (nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, CLASSES)), (6,), {"fc1": nn.Sequential}),
    "odd block": lambda: (nn.Sequential(nn.Linear(6, 5), nn.ReLU(), Odd(), nn.ELU(), nn.Linear(5, CLASSES)), (6,),
                          {"fc1": Layer, "block1": nn.Sequential}),
    "one activation shared": lambda: (lambda act: (nn.Sequential(nn.Linear(6, 5), act, nn.Linear(5, 5), act, nn.Linear(5, CLASSES)), (6,),
                                                   {"fc1": Layer, "fc2": Layer}))(nn.ReLU()),
}


@pytest.mark.parametrize("kind", USERS)
def test_a_users_sequential_keeps_its_outputs_to_the_bit(kind):
    modules, in_shape, blocks = USERS[kind]()
    x = torch.randn(4, *in_shape)
    modules.eval()
    plain = modules(x)
    network = Network.of(modules, in_shape)
    assert torch.equal(network(x), plain)
    assert {name: type(block) for name, block in network.hidden.items()} == blocks
    modules.train()
    network.train()
    torch.manual_seed(1)
    plain = modules(x)
    torch.manual_seed(1)
    assert torch.equal(network(x), plain)
    assert {id(p) for p in network.parameters()} == {id(p) for p in modules.parameters()}     # shared, not copied


def test_the_shape_of_vectors_is_read_off_the_first_linear():
    assert Network.of(USERS["plain"]()[0]).in_shape == (6,)
    assert Network.of(USERS["nested"]()[0]).shapes == {"fc1": (5,), "fc2": (5,), "head": (CLASSES,)}


@pytest.mark.parametrize("modules, says", [
    ([nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4), nn.Softmax(1)], "end in one nn.Linear.*logits"),
    ([nn.Linear(6, 5), nn.ReLU()], "hidden layer|end in one nn.Linear"),
    ([nn.Linear(6, 4)], "hidden layer"), ([], "hidden layer"), ([nn.ReLU()], "hidden layer"),
    ([nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4, 4)], "in_shape"),
], ids=lambda v: v if isinstance(v, str) else "")
def test_sequentials_that_are_no_network(modules, says):
    with pytest.raises(Refused, match=says):
        Network.of(nn.Sequential(*modules))


def test_a_network_needs_a_head_and_a_hidden_block():
    with pytest.raises(Refused, match="head"):
        Network({"head": nn.Linear(6, 4)}, (6,))
    with pytest.raises(Refused, match="head"):
        Network({"fc1": nn.Linear(6, 4), "last": nn.ReLU()}, (6,))
