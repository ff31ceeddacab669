"""Signal propagation: its losses against hand-computed values, and what the two streams must never do, in float64."""

import math
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ARCHS, CLASSES, batch, build, changed, defaults, dense, learned, make_task, step, stepper, tensors
from test_contracts import in_shape_of, small, two_steps
from torch import nn

import lbp
from lbp import registry
from lbp.algos.forward import sigprop_losses as losses
from lbp.algos.forward.sigprop import SigProp, class_means
from lbp.algos.forward.sigprop_parts import parts, statistics_kept
from lbp.algos.forward.sigprop_signals import Digits, digit, draw
from lbp.archs.network import Layer, Network
from lbp.errors import Refused
from lbp.training.setup import build_algo

LOSSES = registry.option("algo", "sigprop").knobs["loss"].spec.split(" | ")
SIGNALS = registry.option("algo", "sigprop").knobs["signal"].spec.split(" | ")


def ready(network=None, n=8, **knobs):
    network = network or dense()
    task = make_task(network.in_shape)
    return build("sigprop", network, task, **knobs), *batch(task, n)


def images(norm=None, dropout=0.0):
    """Two convolutions, the second with a pool, and a dense layer."""
    def normed(channels):
        return norm(channels) if norm else None

    return Network({
        "conv1": Layer(nn.Conv2d(2, 4, 3, padding=1), normed(4), nn.Tanh(), dropout),
        "conv2": Layer(nn.Conv2d(4, 3, 3), normed(3), nn.Tanh(), dropout, nn.Sequential(nn.MaxPool2d(2), nn.Flatten())),
        "fc1": Layer(nn.Linear(12, 7), None, nn.Tanh(), dropout), "head": nn.Linear(7, CLASSES)}, (2, 6, 6)).double()


# ---- losses by hand

def log_softmax(z):
    z = z - z.max(1, keepdims=True)
    return z - np.log(np.exp(z).sum(1, keepdims=True))


def streams(n=6, stream="samples", shape=(5,), below=(3,)):
    rng = np.random.default_rng(0)
    y = np.array([0, 2, 2, 1, 0, 2])[:n]
    of = y if stream == "samples" else np.arange(4)
    t0 = rng.normal(size=(4, *below))
    t0[1] = 2 * t0[0]       # a longer vector in the same direction: more similar to class 0 than class 0 is to itself
    t0 = t0[of]
    h, t = rng.normal(size=(n, *shape)), rng.normal(size=(len(of), *shape))
    logits = rng.normal(size=(n, len(of)))
    own = np.arange(n) if stream == "samples" else y
    made = losses.Streams(*map(torch.from_numpy, (h, t, rng.normal(size=(n, *below)), t0, y, of, own, logits)))
    return made, y, of, t0, logits


@pytest.mark.parametrize("shape, channels", [((5,), 5), ((3, 2, 4), 3), ((4, 3), 3)])
def test_similarity_is_a_dot_product_averaged_over_positions(shape, channels):
    h, t = torch.randn(3, *shape).double(), torch.randn(2, *shape).double()
    found = losses.similarity(h, t, channels)
    positions = math.prod(shape) // channels
    for i in range(3):
        for j in range(2):
            torch.testing.assert_close(found[i, j], (h[i] * t[j]).sum() / positions, rtol=1e-12, atol=0)


@pytest.mark.parametrize("stream", ["samples", "classes"])
def test_losses_have_their_values(stream):
    s, y, of, t0, logits = streams(stream=stream)
    logp = log_softmax(logits)
    same = y[:, None] == of[None]
    np.testing.assert_allclose(losses.labels(s), -(logp * same / same.sum(1, keepdims=True)).sum(1), rtol=1e-12)
    # what the seed's literal losses take for alike: scalar products of what came in, which favour long vectors
    alike = np.array([[float(t0[a] @ t0[b]) for b in range(len(of))] for a in range(len(of))])
    alike = alike if stream == "samples" else alike[y]
    assert of[alike.argmax(1)].tolist() == [1, 2, 2, 1, 1, 2]       # as the seed has it: wrong where another is longer
    best = alike >= alike.max(1, keepdims=True) * (1 - 1e-12) if stream == "samples" else alike == alike.max(1, keepdims=True)
    first = alike.argmax(1)
    np.testing.assert_allclose(losses.max_random(s), [-logp[i, first[i]] for i in range(6)], rtol=1e-12)
    np.testing.assert_allclose(losses.max_all(s), -(logp * best).sum(1), rtol=1e-12)
    for k in (1, 2, 3):
        ranked = np.argsort(-alike, axis=1, kind="stable")[:, :k]
        if stream == "classes":     # no ties there
            np.testing.assert_allclose(losses.top_k(s, k), [-logp[i, ranked[i]].sum() for i in range(6)], rtol=1e-12)
    np.testing.assert_allclose(losses.top_k(s, 50), -logp.sum(1), rtol=1e-12)
    if stream == "classes":
        np.testing.assert_allclose(losses.direct(s), [-logp[i, y[i]] for i in range(6)], rtol=1e-12)
        torch.testing.assert_close(losses.direct(s), losses.labels(s))      # one target a class: the same
        torch.testing.assert_close(losses.top_k(s, 1), losses.max_random(s))


def test_one_class_and_equal_similarities():
    """The seed's v9 then is N log N, v15 k log N; normalised positives give log N, whatever the batch."""
    for n in (3, 8):
        y, flat = torch.zeros(n, dtype=torch.long), torch.zeros(n, n, dtype=torch.float64)
        onehot = F.one_hot(y, 3).double()
        s = losses.Streams(onehot, onehot, onehot, onehot, y, y, torch.arange(n), flat)
        for loss, expected in ((losses.max_all, n), (losses.labels, 1), (losses.max_random, 1), (lambda s: losses.top_k(s, 2), 2)):
            torch.testing.assert_close(loss(s), torch.full((n,), expected * math.log(n), dtype=torch.float64))


def test_literal_top_k_takes_wrong_classes_where_a_class_is_rare():
    y = torch.tensor([0, 0, 1])
    onehot = F.one_hot(y, 2).double()
    logits = torch.tensor([[0., 0., 5.]] * 3, dtype=torch.float64)
    s = losses.Streams(onehot, onehot, onehot, onehot, y, y, torch.arange(3), logits)
    logp = log_softmax(logits.numpy())
    np.testing.assert_allclose(losses.top_k(s, 2)[:2], [-logp[0, :2].sum()] * 2)
    assert losses.top_k(s, 2)[2] > losses.labels(s)[2] + 1      # a sample of class 0 is among its positives


# ---- the update by hand

@pytest.mark.parametrize("stream", ["classes", "samples"])
@pytest.mark.parametrize("temperature", ["auto", 0.7])
def test_updates_equal_the_equations(stream, temperature):
    """L = sum_i CE(h_i . t_j / s): dL/dh = E t / s and dL/dt = E' h / s, with E = softmax - target, through one layer."""
    rule, x, y = ready(stream=stream, temperature=temperature)
    found = learned(rule, x, y)[1]
    with torch.no_grad():
        of = torch.arange(CLASSES) if stream == "classes" else y
        h = [x.numpy()]
        layers = [rule.network.blocks[f"fc{i}"].linear for i in (1, 2, 3)]
        for layer in layers:
            h.append(np.tanh(h[-1] @ layer.weight.numpy().T + layer.bias.numpy()))
        t = [None, rule.projection(F.one_hot(of, CLASSES).double()).numpy()]
        for layer in layers[1:]:
            t.append(np.tanh(t[-1] @ layer.weight.numpy().T + layer.bias.numpy()))
    target = (y.numpy()[:, None] == of.numpy()[None]).astype(float)
    target /= target.sum(1, keepdims=True)
    for i in (1, 2, 3):
        scale = math.sqrt(h[i].shape[1]) if temperature == "auto" else temperature
        e = (np.exp(log_softmax(h[i] @ t[i].T / scale)) - target) / scale
        a, b = e @ t[i] * (1 - h[i] ** 2), (e.T @ h[i] * (1 - t[i] ** 2) if i > 1 else None)
        weight, bias = a.T @ h[i - 1], a.sum(0)
        if i > 1:
            weight, bias = weight + b.T @ t[i - 1], bias + b.sum(0)
        np.testing.assert_allclose(found[f"network.blocks.fc{i}.linear.weight"], weight, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(found[f"network.blocks.fc{i}.linear.bias"], bias, rtol=1e-9, atol=1e-12)
    out = rule.network.head(torch.from_numpy(h[3])).detach()
    np.testing.assert_allclose(found["network.blocks.head.weight"], (out.softmax(1) - F.one_hot(y, CLASSES)).numpy().T @ h[3], rtol=1e-9)


# ---- what crosses a layer, and what does not

@pytest.mark.parametrize("granularity", ["block", "layer"])
@pytest.mark.parametrize("signal", SIGNALS)
def test_no_gradient_crosses_a_layer_and_each_is_stepped_before_the_next_runs(signal, granularity):
    rule, x, y = ready(images(), signal=signal, schedule="streaming", granularity=granularity)
    names, events = {id(p): n for n, p in rule.named_parameters()}, []

    def apply(group, loss=None):
        moving = {names[id(p)] for p in rule.groups()[group] if p.grad is not None}
        if moving:
            events.append({"projection" if n.startswith("projection") else n.split(".")[2] for n in moving})
        for p in rule.groups()[group]:
            p.grad = None

    hooks = [block.linear.register_forward_hook(lambda *_, name=name: events.append(name)) for name, block in rule.network.hidden.items()]
    rule.learn(x, y, apply)
    for hook in hooks:
        hook.remove()
    assert {n.split(".")[2] for n, p in rule.named_parameters() if p.grad is not None} == {"head"}
    assert all(len(e) == 1 for e in events if isinstance(e, set))
    flat = [next(iter(e)) + "!" if isinstance(e, set) else e for e in events]
    expected = {"both": ["conv1", "conv1!", "projection!"], "fixed_both": ["conv1"], "label": ["conv1", "conv1", "conv1!", "projection!"],
                "fixed_label": ["conv1", "conv1", "conv1!"], "digits": ["conv1", "conv1", "conv1!"]}[signal]
    assert flat == [*expected, "conv2", "conv2", "conv2!", "fc1", "fc1", "fc1!"]


@pytest.mark.parametrize("knobs", [{}, {"stream": "samples"}, {"signal": "label"}, {"granularity": "layer"}, {"mode": "loop_back"}], ids=str)
def test_joint_and_streaming_give_the_same_updates(knobs):
    network = images(nn.InstanceNorm2d)
    rule, x, y = ready(network, **knobs)
    joint = learned(rule, x, y)
    rule.schedule = "streaming"
    streamed = learned(rule, x, y)
    assert set(joint[1]) == set(streamed[1])
    for n, g in joint[1].items():
        torch.testing.assert_close(streamed[1][n], g, rtol=1e-12, atol=1e-14)
    assert joint[0].blocks == streamed[0].blocks


@pytest.mark.parametrize("norm", [None, nn.InstanceNorm2d, nn.BatchNorm2d], ids=lambda n: n.__name__ if n else "none")
@pytest.mark.parametrize("knobs", [{}, {"stream": "samples"}, {"signal": "label"}, {"mode": "loop_back"}, {"granularity": "layer"}], ids=str)
def test_the_prediction_is_the_same_with_and_without_the_label_stream(norm, knobs):
    """Also the running statistics of batch norm are those of the input alone."""
    network = images(norm)
    rule, x, y = ready(network, **knobs)
    before = tensors(network)
    out = learned(rule, x, y)[0].out
    after = tensors(network)
    with torch.no_grad():
        for n, t in (*network.named_parameters(), *network.named_buffers()):
            t.copy_(before[n])
    torch.testing.assert_close(network(x), out, rtol=1e-12, atol=1e-14)
    assert not changed(after, network)
    assert all(getattr(m, "track_running_stats", True) for m in network.modules() if isinstance(m, nn.BatchNorm2d))


def test_no_label_enters_at_test_time(monkeypatch):
    rule, x, y = ready()
    rule.eval()
    expected = rule.network(x)
    monkeypatch.setattr(rule.projection, "forward", lambda *_: pytest.fail("the signal was asked"))
    assert torch.equal(rule.predict(x), expected)


def test_statistics_kept_normalises_by_the_batch():
    norm = nn.BatchNorm1d(3).double()
    x = torch.randn(5, 3).double()
    with statistics_kept(norm):
        y = norm(x)
    torch.testing.assert_close(y.mean(0), torch.zeros(3).double(), rtol=0, atol=1e-12)
    assert norm.num_batches_tracked == 0 and torch.equal(norm.running_mean, torch.zeros(3).double()) and norm.track_running_stats


# ---- one target a class, or one a sample

@pytest.mark.parametrize("network", [dense, images], ids=lambda n: n.__name__)
@pytest.mark.parametrize("signal", SIGNALS)
def test_a_target_for_each_class_is_a_target_for_each_sample_of_a_balanced_batch(network, signal):
    """n equal targets a class add log n to the normalised loss and leave every gradient as it is."""
    if signal == "digits" and network is dense:
        pytest.skip("no images")
    rule, x, y = ready(network(), n=12, signal=signal)
    (one, classes) = learned(rule, x, y)
    rule.stream = "samples"
    (each, samples) = learned(rule, x, y)
    for n, g in classes.items():
        torch.testing.assert_close(samples[n], g, rtol=1e-9, atol=1e-12)
    for block in one.blocks:
        for key, value in one.blocks[block].items():
            if "loss" in key:
                torch.testing.assert_close(each.blocks[block][key], value + math.log(12 / CLASSES))
            else:
                torch.testing.assert_close(each.blocks[block][key], value)
    y = y.clamp(max=1)      # no longer balanced
    samples = learned(rule, x, y)[1]
    rule.stream = "classes"
    assert any(not torch.allclose(g, samples[n]) for n, g in learned(rule, x, y)[1].items())


def test_one_class_alone_among_samples_teaches_nothing_with_the_labels_loss():
    """All targets are then equal and right."""
    rule, x, y = ready(stream="samples")
    found = learned(rule, x, torch.zeros_like(y))[1]
    assert all(float(g.abs().max()) < 1e-14 for n, g in found.items() if "head" not in n)


@pytest.mark.parametrize("knobs", [{}, {"loss": "direct"}, {"loss": "max_all"}, {"loss": "max_random"}, {"loss": "top_k", "k": 2},
                                   {"signal": "label"}, {"granularity": "layer"}, {"passed": ["fc3"]}, {"stream": "samples"},
                                   {"mode": "loop_back"}, {"mode": "forward_loop_back"}], ids=str)
def test_what_the_facts_of_an_instance_say_of_small_batches(knobs):
    rule, x, y = ready(n=16, **knobs)
    whole = learned(rule, x, y)[1]
    a, b = learned(rule, x[:6], y[:6])[1], learned(rule, x[6:], y[6:])[1]
    adds_up = all(torch.allclose(a[n] + b[n], g, rtol=1e-9, atol=1e-12) for n, g in whole.items())
    assert adds_up == (not rule.facts.batch_coupled)
    assert SigProp.facts.batch_coupled is False


@pytest.mark.parametrize("knobs", [{}, {"mode": "loop_back"}, {"mode": "forward_loop_back", "stream": "samples"}, {"signal": "label"},
                                   {"passed": ["fc3"]}, {"passed": ["fc2", "fc3"]}], ids=str)
def test_what_the_facts_of_an_instance_say_of_locks(knobs):
    """Whether some hidden block's update is another one with another head, or other hidden blocks above."""
    rule, x, y = ready(**knobs)
    blocks = list(rule.network.hidden)

    def moved_by(above, block):
        def update():
            return {n: g for n, g in learned(rule, x, y)[1].items() if f".{block}." in n}

        before, kept = update(), tensors(rule)
        with torch.no_grad():
            for name in above:
                for p in rule.network.blocks[name].parameters():
                    p.copy_(torch.randn_like(p))
        after = update()
        with torch.no_grad():
            for n, p in rule.named_parameters():
                p.copy_(kept[n])
        return any(not torch.equal(after[n], g) for n, g in before.items())

    assert any(moved_by(["head"], block) for block in blocks) == rule.facts.update_locked
    looped = rule.mode != "forward"     # the error is then new by whatever changes the output
    if not looped:
        assert any(moved_by(blocks[i + 1 :], block) for i, block in enumerate(blocks[:-1])) == rule.facts.backward_locked
    assert rule.facts.labels_at_input == (knobs.get("signal") == "label")


# ---- loops back

@pytest.mark.parametrize("stream", ["samples", "classes"])
def test_a_loop_back_sends_the_output_s_error_as_the_target(stream):
    rule, x, y = ready(mode="loop_back", stream=stream)
    seen = []
    hook = rule.projection.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    learned(rule, x, y)
    hook.remove()
    error = (rule.network(x).softmax(1) - F.one_hot(y, CLASSES)).detach()
    if stream == "classes":
        error = torch.stack([error[y == c].mean(0) for c in range(CLASSES)])
    assert len(seen) == 1
    torch.testing.assert_close(seen[0], error, rtol=1e-12, atol=1e-14)


def test_forward_and_loop_back_learn_after_each_other():
    """At the same weights (joint) its change is that of the one and of the other; the classifier's is its own, once."""
    rule, x, y = ready(mode="forward_loop_back", stream="samples")
    both = learned(rule, x, y)[1]
    rule.mode = "forward"
    forward = learned(rule, x, y)[1]
    rule.mode = "loop_back"
    back = learned(rule, x, y)[1]
    for n, g in both.items():
        expected = forward[n] if ".head." in n else forward[n] + back[n]
        torch.testing.assert_close(g, expected, rtol=1e-10, atol=1e-13)
    assert any(not torch.equal(forward[n], back[n]) for n in both)


def test_means_of_classes():
    values = torch.tensor([[1., 2.], [3., 4.], [10., 20.]]).double()
    y = torch.tensor([3, 3, 1])
    means, present, own = class_means(values, y, F.one_hot(y, 5).double())
    assert means.tolist() == [[10, 20], [2, 3]] and present.tolist() == [1, 3] and own.tolist() == [1, 1, 0]


# ---- parts

def test_every_layer_alone_has_the_update_of_its_own_loss():
    rule, x, y = ready(dense(norm=nn.LayerNorm), granularity="layer")
    result, found = learned(rule, x, y)
    assert set(result.blocks["fc1"]) == {"local_loss", "local_accuracy"}       # the first is the input's signal, whole
    assert set(result.blocks["fc2"]) == {"local_loss", "local_accuracy", "local_loss_linear", "local_accuracy_linear"}
    h, t = rule.network.blocks["fc1"](x).detach(), rule.projection(torch.eye(CLASSES).double()).detach()
    layer = rule.network.blocks["fc2"]
    for name, module in (("linear", layer.linear), ("norm", layer.norm)):
        h, t = module(h), module(t)
        loss = F.cross_entropy(h @ t.T / math.sqrt(h.shape[1]), y, reduction="sum")
        for n, g in zip(("weight", "bias"), torch.autograd.grad(loss, list(module.parameters()))):
            torch.testing.assert_close(found[f"network.blocks.fc2.{name}.{n}"], g, rtol=1e-10, atol=1e-13)
        h, t = h.detach(), t.detach()


@pytest.mark.parametrize("granularity", ["block", "layer"])
@pytest.mark.parametrize("projects_input", [True, False])
@pytest.mark.parametrize("norm", [None, nn.BatchNorm2d, nn.InstanceNorm2d], ids=lambda n: n.__name__ if n else "none")
def test_parts_after_each_other_are_the_blocks(norm, granularity, projects_input):
    network = images(norm).eval()
    x = h = torch.randn(3, 2, 6, 6).double()
    for part in parts(network.hidden, granularity, projects_input):
        h = part.after(part.run(h))
    torch.testing.assert_close(network.head(h), network(x), rtol=0, atol=0)


def test_a_loss_stands_before_the_pool():
    rule, x, y = ready(images())
    assert rule.channels == [4, 3, 7]
    seen = []
    rule.loss = lambda s: (seen.append(tuple(s.h.shape[1:])), losses.labels(s))[1]
    learned(rule, x, y)
    assert seen == [(4, 6, 6), (3, 4, 4), (7,)]


def test_fixed_blocks_pass_both_streams_and_stay():
    rule, x, y = ready(fixed=["fc2"])
    result, found = learned(rule, x, y)
    assert not any(".fc2." in n for n in found) and "fc2" not in result.blocks
    with torch.no_grad():
        fc2 = rule.network.blocks["fc2"]
        h, t = fc2(rule.network.blocks["fc1"](x)), fc2(rule.projection(torch.eye(CLASSES).double()))
    fc3 = rule.network.blocks["fc3"]
    loss = F.cross_entropy(fc3(h) @ fc3(t).T / math.sqrt(8), y, reduction="sum")
    torch.testing.assert_close(found["network.blocks.fc3.linear.weight"], torch.autograd.grad(loss, fc3.linear.weight)[0], rtol=1e-10, atol=1e-13)
    before = tensors(rule)
    step(rule, stepper(rule), x, y)
    assert not any(".fc2." in n for n in changed(before, rule)) and all(p.grad is None for p in rule.parameters())
    first = ready(fixed=["fc1"])
    assert any(n.startswith("projection") for n in learned(*first)[1]) and not any(".fc1." in n for n in learned(*first)[1])


def test_passed_blocks_learn_with_the_head():
    rule, x, y = ready(passed=["fc3"])
    result, found = learned(rule, x, y)
    network = rule.network
    h = network.blocks["fc2"](network.blocks["fc1"](x)).detach()
    loss = F.cross_entropy(network.head(network.blocks["fc3"](h)), y, reduction="sum")
    above = {n: p for n, p in network.named_parameters() if ".fc3." in f".{n}" or "head" in n}
    for n, g in zip(above, torch.autograd.grad(loss, list(above.values()))):
        torch.testing.assert_close(found[f"network.{n}"], g, rtol=1e-10, atol=1e-13)
    assert set(result.blocks) == {"fc1", "fc2"}
    assert torch.equal(result.out, network(x))


# ---- signals

@pytest.mark.parametrize("signal", SIGNALS)
def test_which_projections_learn(signal):
    rule, x, y = ready(images(), signal=signal)
    before = tensors(rule)
    step(rule, stepper(rule), x, y)
    moved = changed(before, rule)
    assert any(n.startswith("projection") for n in moved) == (signal in ("both", "label"))
    assert any(".conv1." in n for n in moved) == (signal != "fixed_both")
    assert ("heads" in rule.groups()) == (signal in ("both", "label"))
    assert rule.projection(torch.eye(CLASSES).double()).shape[1:] == ((4, 6, 6) if "both" in signal else (2, 6, 6))


def test_the_projection_of_a_label():
    """Linear without bias, a layer norm over all values, ReLU."""
    rule, *_ = ready(images())
    w = rule.projection.linear.weight.detach().numpy()
    for c, image in enumerate(rule.projection(torch.eye(CLASSES).double()).detach().numpy()):
        values = w[:, c]
        expected = np.maximum((values - values.mean()) / np.sqrt(values.var() + 1e-5), 0)
        np.testing.assert_allclose(image.ravel(), expected, rtol=1e-10, atol=1e-12)


def test_digits_are_drawn():
    assert "\n".join("".join("#" if v > 0 else "." for v in row) for row in digit(4)) == "\n".join(
        ("#.....#", "#.....#", "#.....#", "#######", "......#", "......#", "......#"))
    assert len({tuple(digit(n).flatten().tolist()) for n in range(10)}) == 10
    assert all(digit(n).unique().tolist() == [-1, 1] for n in range(10))
    image = draw(47, 2, (3, 14, 20))
    assert image.shape == (3, 14, 20)
    for channel in image:        # two squares of 10 in a row of 20
        torch.testing.assert_close(channel[:10, :10], F.adaptive_avg_pool2d(digit(4)[None], 10)[0])
        torch.testing.assert_close(channel[:10, 10:], F.adaptive_avg_pool2d(digit(7)[None], 10)[0])
        assert not channel[10:].any()
    assert torch.equal(draw(3, 1, (1, 7, 7))[0], digit(3))
    assert torch.equal(draw(3, 2, (1, 7, 14))[0, :, :7], digit(0))


def test_digits_carry_a_vector_as_a_sum_of_images():
    signal = Digits(12, (1, 14, 14)).double()
    assert signal(torch.eye(12).double()).flatten(1).unique(dim=0).shape[0] == 12
    mix = torch.zeros(1, 12).double()
    mix[0, 3], mix[0, 11] = .5, -2
    torch.testing.assert_close(signal(mix)[0], .5 * signal.images[3] - 2 * signal.images[11])
    assert not list(signal.parameters())
    with pytest.raises(Refused, match="cannot be told apart"):
        Digits(12, (1, 3, 3))


# ---- archs, losses of one's own, refusals

@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("knobs", [{}, {"signal": "label", "stream": "samples", "mode": "forward_loop_back"}], ids=["default", "all else"])
def test_every_arch_trains(arch, knobs):
    task = make_task(in_shape_of(arch), dtype=torch.float32)
    two_steps(build_algo(defaults("algo", "sigprop") | knobs, small(arch, task, "sigprop"), task), *batch(task, 8))


@pytest.mark.parametrize("loss", [loss for loss in LOSSES if loss != "direct"])
@pytest.mark.parametrize("signal", SIGNALS)
def test_losses_of_samples_train_with_every_signal(loss, signal):
    rule, x, y = ready(images(nn.InstanceNorm2d, dropout=.2), stream="samples", loss=loss, signal=signal, k=2)
    two_steps(rule, x, y)


def test_it_separates_a_made_up_set_without_labels_at_test_time():
    """The seed's smoke test: 16 samples, 20 values, 4 classes, one hidden block, 300 passes."""
    network = dense((20, 32), norm=nn.LayerNorm, activation=nn.ReLU)
    rule, x, y = ready(network, n=16)
    apply = stepper(rule, "adam", lr=.005)
    for _ in range(300):
        result = step(rule, apply, x, y)
    rule.eval()
    assert (rule.predict(x).argmax(1) == y).all() and result.blocks["fc1"]["local_accuracy"] == 1


def test_a_loss_of_one_s_own_is_a_subclass_in_a_plugin(tmp_path, monkeypatch):
    package = tmp_path / "signalplug"
    (package / "algos").mkdir(parents=True)
    (package / "conf" / "algo").mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "algos" / "margin_propagation.py").write_text("""
import torch
from lbp.algos.forward.sigprop import SigProp
from lbp.algos.rule import Facts

def margin(s):
    own = s.logits.gather(1, s.own[:, None])
    return (1 + s.logits - own).relu().sum(1)

class MarginPropagation(SigProp):
    '''Signal propagation with a margin.'''
    facts = Facts(family="forward", paper="nobody", weight_transport=False, backward_locked=False, update_locked=False)
    losses = {**SigProp.losses, "margin": margin}
""")
    (package / "conf" / "algo" / "margin_propagation.yaml").write_text(
        "# Signal propagation with a margin\ndefaults: [sigprop, _self_]\nname: margin_propagation\nloss: margin   # margin | labels; local\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    try:
        result = lbp.run("plugins=[signalplug]", "algo=margin_propagation", "dataset=digits", "trainer.epochs=4", "optimizer.lr=0.003", "logger.console=off",
                         f"run.dir={tmp_path}/run")
        assert result.summary["test_accuracy"] > .8
        assert result.summary["layers"]["fc1"]["local_accuracy"] > .8
        assert result.rule.loss.__name__ == "margin" and isinstance(result.rule, SigProp)
    finally:
        registry.use([])
        for name in [n for n in sys.modules if n.startswith("signalplug")]:
            del sys.modules[name]


@pytest.mark.parametrize("knobs, said", [
    ({"loss": "direct", "stream": "samples"}, "algo.stream=classes"), ({"signal": "digits"}, "algo.signal=label"),
    ({"fixed": ["fc9"]}, "no hidden block fc9"), ({"passed": ["fc2"]}, "right below the head"),
    ({"passed": ["fc1", "fc2", "fc3"]}, "not all"), ({"passed": ["fc3"], "fixed": ["fc3"]}, "algo.fixed"),
], ids=str)
def test_what_cannot_be_is_refused(knobs, said):
    with pytest.raises(Refused, match="algo=sigprop") as refused:
        ready(**knobs)
    assert said in str(refused.value)


def test_blocks_that_are_no_plain_layers_are_not_cut():
    task = make_task((3, 16, 16), dtype=torch.float32)
    with pytest.raises(Refused, match="algo=sigprop.*block .*granularity=block"):
        build_algo(defaults("algo", "sigprop") | {"granularity": "layer"}, small("resnet20", task, "sigprop"), task)


def test_outputs_for_each_token_are_refused():
    network = Network({"fc1": nn.Linear(3, 6), "head": nn.Linear(6, CLASSES)}, (5, 3)).double()
    with pytest.raises(Refused, match="algo=sigprop.*each token.*algo=local"):
        build("sigprop", network, make_task((5, 3)))
