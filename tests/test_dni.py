"""Synthetic gradients against their equations, in float64: what teaches a block, what a synthesizer learns from, and when."""

import json
import math
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CLASSES, batch, build, changed, dense, learned, make_task, regression, step, stepper, tensors
from test_oracles import NETWORKS, arrays_of, assert_same, backprop, by_hand, softmax_error, tanh_forward
from torch import nn

from lbp.algos.synthetic.dni import DNI, regress, segments
from lbp.algos.synthetic.synthesizers import KINDS, Cut, features_axis
from lbp.archs.network import Network
from lbp.errors import Diverged, Refused
from lbp.registry import defaults

FAMILY = ("dni", "cdni")


def ready(name="dni", network=None, speaking=True, **knobs):
    """(rule, x, y); `speaking`: synthesizers say something else than 0."""
    network = network or dense()
    task = make_task(network.in_shape)
    rule = build(name, network, task, **knobs)
    if speaking:
        with torch.no_grad():
            for p in rule.groups()["feedback"]:
                p.copy_(torch.randn_like(p) / 3)
    return rule, *batch(task)


def of_network(found):
    return {n: g for n, g in found.items() if n.startswith("network.")}


class Oracle(nn.Module):
    """In place of a synthesizer: says what it was given."""

    def __init__(self, answer):
        super().__init__()
        self.answer, self.nothing = answer, nn.Parameter(torch.zeros((), dtype=answer.dtype))

    def forward(self, h, context):
        return self.answer + self.nothing


def true_gradients(network, task, x, y):
    """{block: dL/dh of the summed loss}, by plain autograd."""
    outputs, h = {}, x
    for name, block in network.blocks.items():
        outputs[name] = h = block(h)
    return dict(zip(outputs, torch.autograd.grad(task.loss(h, y).sum(), list(outputs.values()))))


# ---- oracles

@pytest.mark.parametrize("knobs", [{}, {"cuts": 2}, {"schedule": "streaming"}, {"mixing": .3}], ids=str)
@pytest.mark.parametrize("kind", NETWORKS)
def test_a_synthesizer_that_says_the_true_gradient_is_backprop(kind, knobs):
    network = NETWORKS[kind]()
    try:
        rule, x, y = ready(network=network, speaking=False, **knobs)
    except Refused:
        assert len(network.hidden) < 2 and knobs == {"cuts": 2}
        return
    torch.manual_seed(5)
    answers = true_gradients(network, rule.task, x, y)
    for cut in rule.synthesizers:
        rule.synthesizers[cut] = Oracle(answers[cut])
    torch.manual_seed(5)
    expected = backprop(network, x, y)
    torch.manual_seed(5)
    result, found = learned(rule, x, y)
    assert_same(of_network(found), expected)
    for values in result.blocks.values():
        assert values["synthetic_error"] < 1e-20 and values["synthetic_deg"] < 1e-6


@pytest.mark.parametrize("name", FAMILY)
def test_a_synthesizer_that_has_learned_nothing_trains_the_last_part_alone(name):
    for cuts, last in (("all", ["head"]), (["fc1"], ["fc2", "fc3", "head"]), (2, ["fc3", "head"])):
        rule, x, y = ready(name, speaking=False, cuts=cuts)
        found, expected = learned(rule, x, y)[1], backprop(rule.network, x, y)
        for n, g in expected.items():
            block = n.split(".")[2]
            assert torch.equal(found[n], torch.zeros_like(g)) if block not in last else torch.allclose(found[n], g, rtol=1e-12, atol=0), n


@pytest.mark.parametrize("context", ["none", "label", "loss"])
@pytest.mark.parametrize("kind", NETWORKS)
def test_mixing_of_1_is_backprop_whatever_the_synthesizers_say(kind, context):
    network = NETWORKS[kind]()
    rule, x, y = ready(network=network, mixing=1.0, context=context)
    torch.manual_seed(5)
    expected = backprop(network, x, y)
    torch.manual_seed(5)
    assert_same(of_network(learned(rule, x, y)[1]), expected)


@pytest.mark.parametrize("mixing", [0.0, 0.3])
@pytest.mark.parametrize("name", FAMILY)
def test_synthetic_gradients_equal_their_equations(name, mixing):
    """s_l = h_l A_l^T (+ Y C_l^T) + b_l; u_l = (1 - mixing) s_l + mixing g_l; g_l = (u_{l+1} * f') W_{l+1}; A's loss |s - g|^2."""
    rule, x, y = ready(name, mixing=mixing)
    layers, onehot = arrays_of(rule.network), np.eye(CLASSES)[y.numpy()]
    values = tanh_forward(layers, x.numpy())
    deltas, feedback, g = [softmax_error(values[-1], y.numpy())], {}, softmax_error(values[-1], y.numpy()) @ layers[-1][0]
    for l in (3, 2, 1):
        last, h = rule.synthesizers[f"fc{l}"].body[-1], values[l]
        seen = np.hstack([h, onehot]) if name == "cdni" else h
        s = seen @ last.weight.detach().numpy().T + last.bias.detach().numpy()
        place = f"synthesizers.fc{l}.body.0."
        feedback |= {place + "weight": torch.from_numpy(2 * (s - g).T @ seen), place + "bias": torch.from_numpy(2 * (s - g).sum(0))}
        deltas.insert(0, ((1 - mixing) * s + mixing * g) * (1 - h**2))
        g = deltas[0] @ layers[l - 1][0]
    assert_same(learned(rule, x, y)[1], by_hand(deltas, values) | feedback)


@pytest.mark.parametrize("knobs", [{}, {"cuts": 2}, {"synthesizer": "mlp"}, {"inputs": True}], ids=str)
def test_top_down_and_at_once_are_the_same_where_nothing_is_mixed_in(knobs):
    rule, x, y = ready("cdni", **knobs)
    at_once = learned(rule, x, y)[1]
    rule.learn = lambda x, y, apply: rule.learn_from_above(x, y, apply, 0.0, bool(rule.inputs))
    assert_same(learned(rule, x, y)[1], at_once)


@pytest.mark.parametrize("knobs", [{}, {"mixing": .5}, {"context": "loss"}, {"inputs": True}], ids=str)
def test_streaming_makes_the_same_updates(knobs):
    states = []
    for schedule in ("joint", "streaming"):
        torch.manual_seed(3)
        rule, x, y = ready(schedule=schedule, **knobs)
        step(rule, stepper(rule), x, y)
        states.append(tensors(rule))
    for n, t in states[0].items():
        torch.testing.assert_close(states[1][n], t, rtol=1e-12, atol=1e-14)


# ---- the order of events

@pytest.mark.parametrize("schedule", ["joint", "streaming"])
def test_a_block_is_taught_before_the_next_one_runs(schedule):
    rule, x, y = ready("cdni", schedule=schedule)
    events = []
    for name, block in rule.network.blocks.items():
        block.register_forward_pre_hook(lambda module, args, name=name: events.append(f"{name} runs"))
        next(block.parameters()).register_post_accumulate_grad_hook(lambda p, name=name: events.append(f"{name} is taught"))
    for name, synthesizer in rule.synthesizers.items():
        synthesizer.register_forward_pre_hook(lambda module, args, name=name: events.append(f"{name} is answered"))
        next(synthesizer.parameters()).register_post_accumulate_grad_hook(lambda p, name=name: events.append(f"synthesizer {name} learns"))
    rule.learn(x, y, stepper(rule))
    assert events == [
        "fc1 runs", "fc1 is answered", "fc1 is taught",
        "fc2 runs", "fc2 is answered", "fc2 is taught", "synthesizer fc1 learns",
        "fc3 runs", "fc3 is answered", "fc3 is taught", "synthesizer fc2 learns",
        "head runs", "head is taught", "synthesizer fc3 learns"]


# ---- cuts

def test_where_the_cuts_are():
    blocks = ["a", "b", "c", "d", "head"]
    assert segments(blocks, "all", "dni") == [["a"], ["b"], ["c"], ["d"], ["head"]]
    assert segments(blocks, 2, "dni") == [["a", "b"], ["c", "d"], ["head"]]
    assert segments(blocks, 3, "dni") == [["a", "b", "c"], ["d", "head"]]
    assert segments(blocks, ["c", "a"], "dni") == [["a"], ["b", "c"], ["d", "head"]]
    for cuts, said in ((5, "use algo=bp"), ([], "use algo=bp"), (["e"], "there are: a, b, c, d"), (["head"], "no hidden block head")):
        with pytest.raises(Refused, match=said):
            segments(blocks, cuts, "dni")


# ---- synthesizers

MAPS = {"vector": (nn.Linear(3, 7), (7,), 0), "maps": (nn.Conv2d(1, 4, 3), (4, 5, 6), 0), "1-d maps": (nn.Conv1d(1, 4, 3), (4, 5), 0),
        "3-d maps": (nn.Conv3d(1, 4, 3), (4, 3, 2, 5), 0), "tokens": (nn.Linear(3, 6), (5, 6), 1)}


@pytest.mark.parametrize("where", MAPS)
@pytest.mark.parametrize("norm", ["none", "batch", "layer"])
@pytest.mark.parametrize("kind", KINDS)
def test_synthesizers_answer_in_the_blocks_shape_and_see_all_of_the_context(kind, norm, where):
    block, shape, axis = MAPS[where]
    assert features_axis(block, shape) == axis
    made = KINDS[kind](Cut(shape, axis, 3, [6, 5], "relu", norm, 3)).double()
    h, context = torch.randn(4, *shape, dtype=torch.float64, requires_grad=True), torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    said = made(h, context)
    assert said.shape == h.shape and not said.any()      # nothing before it has learned
    last = [m for m in made.modules() if hasattr(m, "weight")][-1]
    nn.init.normal_(last.weight)
    g_h, g_context = torch.autograd.grad(made(h, context).square().sum(), (h, context))
    assert g_h.flatten(1).any(1).all() and g_context.any()
    alone = KINDS[kind](Cut(shape, axis, 0, [6, 5], "relu", norm, 3)).double()
    assert alone(h, None).shape == h.shape


def test_dense_synthesizers_are_the_same_at_every_position():
    made = KINDS["mlp"](Cut((4, 5, 6), 0, 2, [8], "sigmoid", "none", 3)).double()
    nn.init.normal_(made.body[-1].weight)
    h, context = torch.randn(3, 4, 5, 6, dtype=torch.float64), torch.randn(3, 2, dtype=torch.float64)
    said = made(h, context)
    torch.testing.assert_close(said[1, :, 2, 3], made.body(torch.cat([h[1, :, 2, 3], context[1]])[None])[0])
    torch.testing.assert_close(made(h.flip(2), context), said.flip(2))


def test_tokens_have_a_context_each():
    made = KINDS["linear"](Cut((5, 6), 1, 2, [], "relu", "none", 3)).double()
    nn.init.normal_(made.body[-1].weight)
    h, context = torch.randn(3, 5, 6, dtype=torch.float64), torch.randn(3, 5, 2, dtype=torch.float64)
    torch.testing.assert_close(made(h, context), torch.cat([h, context], -1) @ made.body[-1].weight.T)


def test_even_kernels_are_refused():
    with pytest.raises(Refused, match="odd kernel"):
        ready(network=NETWORKS["stride, padding"](), synthesizer="conv", kernel=4)


def test_batch_norm_in_a_synthesizer_couples_the_samples():
    for knobs in ({}, {"synthesizer": "mlp"}, {"synthesizer": "mlp", "norm": "batch"}):
        assert ready(**knobs)[0].facts.batch_coupled == (knobs.get("norm") == "batch")


@pytest.mark.parametrize("knobs", [{"synthesizer": "mlp", "activation": "sigmoid"}, {"synthesizer": "mlp", "norm": "batch"},
                                   {"synthesizer": "conv", "norm": "batch", "kernel": 3}, {"inputs": True}], ids=str)
@pytest.mark.parametrize("name", FAMILY)
def test_all_that_is_learned_moves(name, knobs):
    network = NETWORKS["stride, padding"]()
    rule, x, y = ready(name, network, speaking=False, hidden=[6], **knobs)
    before, apply = tensors(rule), stepper(rule, "adam")
    for _ in network.blocks:      # what is said comes down one cut a batch
        step(rule, apply, x, y)
    named = {n for n, p in rule.named_parameters()}
    # What a batch norm takes off again never moves by more than rounding.
    assert named - changed(before, rule) <= {n for n in named if knobs.get("norm") == "batch" and n.endswith("bias")}


@pytest.mark.parametrize("context, angle", [("label", 1.0), ("none", None)])
def test_a_linear_synthesizer_learns_the_gradient_of_a_quadratic_loss_of_linear_layers(context, angle):
    """There dL/dh = W^T (W h + b - y), linear in h and y together, and not in h alone."""
    network, task = dense((6, 5, 4), outputs=2, activation=nn.Identity), regression((6,), 2)
    rule = build("dni", network, task, context=context)
    apply = stepper(rule, "adam", lr=.03)
    apply.groups["forward"] = []
    for _ in range(500):
        x, y = batch(task, 64)
        for p in network.parameters():
            p.grad = None
        result = step(rule, apply, x, y)
    found = [float(values["synthetic_deg"]) for values in result.blocks.values()]
    assert all(deg < angle for deg in found) if angle else all(deg > 10 for deg in found)


def test_the_loss_is_a_context_too():
    rule, x, y = ready(context="loss")
    seen = []
    rule.synthesizers["fc2"].register_forward_pre_hook(lambda module, args: seen.append(args[1]))
    result, _ = learned(rule, x, y)
    torch.testing.assert_close(seen[0], result.loss[:, None], rtol=0, atol=0)


class Constant(nn.Module):
    def __init__(self, cut):
        super().__init__()
        self.value = nn.Parameter(torch.ones(cut.shape))

    def forward(self, h, context):
        return self.value.expand_as(h)


class Mine(DNI):
    kinds = {**DNI.kinds, "constant": Constant}


def test_a_synthesizer_of_ones_own():
    network, task = dense(), make_task()
    knobs = defaults("algo", "dni") | {"synthesizer": "constant"}
    knobs.pop("name")
    rule = Mine(network, task, **knobs)
    x, y = batch(task)
    _, found = learned(rule, x, y)
    h1 = network.blocks["fc1"](x).detach()
    torch.testing.assert_close(found["network.blocks.fc1.linear.bias"], (1 - h1**2).sum(0))
    assert found["synthesizers.fc1.value"].shape == (7,)


# ---- synthetic inputs, warm-up

def test_with_synthetic_inputs_a_block_waits_for_no_block_below():
    rule, x, y = ready("cdni", inputs=True)
    _, before = learned(rule, x, y)
    with torch.no_grad():
        for p in rule.network.blocks["fc1"].parameters():
            p.normal_()
    _, after = learned(rule, x, y)
    for n in before:      # fc1's own, its model's and its synthesizer's see it
        assert torch.equal(before[n], after[n]) == (".fc1." not in n), n


def test_input_models_learn_the_blocks_outputs_from_x():
    rule, x, y = ready(inputs=True)
    blocks, h = rule.network.blocks, x
    result, found = learned(rule, x, y)
    for cut, model in rule.inputs.items():
        guess, true = model(x), blocks[cut](h).detach()
        expected = torch.autograd.grad((guess - true).square().sum(), model.body[-1].weight)[0]
        torch.testing.assert_close(found[f"inputs.{cut}.body.{len(model.body) - 1}.weight"], expected)
        torch.testing.assert_close(result.blocks[cut]["input_error"], (guess - true).square().sum().detach() / true.square().sum())
        h = guess.detach()
    torch.testing.assert_close(result.out, blocks["head"](h))
    torch.testing.assert_close(rule.predict(x), rule.network(x))


def test_batch_norm_above_a_synthetic_input_is_refused():
    with pytest.raises(Refused, match="block fc2 has batch norm.*arch.norm=layer"):
        ready(network=dense(norm=nn.BatchNorm1d), inputs=True)
    ready(network=dense(norm=nn.LayerNorm), inputs=True)


@pytest.mark.parametrize("inputs", [False, True])
def test_warming_up_is_backprop_with_models_that_learn(inputs):
    rule, x, y = ready("cdni", warmup_epochs=3, inputs=inputs, schedule="streaming")
    warmup, main = rule.phases()
    assert (warmup.name, warmup.epochs, main.name, main.epochs) == ("warmup", 3, "train", None)
    rule.learn = warmup.learn
    _, found = learned(rule, x, y)
    assert_same(of_network(found), backprop(rule.network, x, y))
    assert set(found) == {n for n, _ in rule.named_parameters()} and all(g.any() for g in found.values())
    assert len(build("dni", dense(), make_task()).phases()) == 1


# ---- what is logged, what is refused

def test_errors_and_angles():
    said, true = torch.tensor([[3.0, 0], [0, 0]], requires_grad=True), torch.tensor([[0, 0], [4.0, 0]])
    values = regress(said, true, "synthetic")
    assert torch.equal(said.grad, 2 * (said.detach() - true))
    assert float(values["synthetic_error"]) == pytest.approx(25 / 16) and float(values["synthetic_deg"]) == pytest.approx(90)
    values = regress(torch.zeros(2, 2, requires_grad=True), true, "synthetic")
    assert values["synthetic_error"] == 1 and math.isnan(values["synthetic_deg"])     # no angle: not logged


@pytest.mark.parametrize("inputs", [False, True])
def test_a_label_that_is_no_number_moves_nothing(inputs):
    task = regression((6,), 2)
    rule = build("cdni", dense(outputs=2), task, inputs=inputs)
    x, y = batch(task)
    step(rule, apply := stepper(rule, "adam"), x, y)
    before = tensors(rule)
    y[1, 0] = torch.nan
    with pytest.raises(Diverged):
        step(rule, apply, x, y)
    assert not changed(before, rule)


def test_blocks_without_the_networks_tokens_are_refused_a_context():
    class Repeat(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 5)

        def forward(self, x):
            return self.linear(x)[:, None].expand(-1, 3, -1)

    network = Network({"a": nn.Linear(6, 4), "b": Repeat(), "head": nn.Linear(5, CLASSES)}, (6,)).double()
    build("dni", network, make_task())
    with pytest.raises(Refused, match="algo=cdni.*block a"):
        build("cdni", network, make_task())


# ---- the critical path, as scripts/timeline.py finds it

@pytest.fixture(scope="module")
def timeline():
    return runpy.run_path(str(Path(__file__).parents[1] / "scripts/timeline.py"))


@pytest.fixture(scope="module")
def measured(timeline, tmp_path_factory):
    """(what was found, the profiler's trace) of four small blocks and a head."""
    rules = (*timeline["RULES"], "algo=dni+algo.cuts=2+algo.schedule=streaming")
    trace = tmp_path_factory.mktemp("timeline") / "trace.json"
    return timeline["measure"](rules, depth=4, width=24, batch=16, rounds=2, trace=trace), trace


def test_no_block_with_a_synthesizer_waits_for_a_block_above_it(measured):
    """Read off the schedule of what was measured: bp waits for all above, the first block longest; dni for none, its synthesizer for one."""
    found, _ = measured
    bp, joint, streaming, conditional, unlocked, pairs = found.values()
    names = [line["block"] for line in bp["blocks"]]
    assert names == ["fc1", "fc2", "fc3", "fc4", "head"]
    for rule in found.values():
        ends = {(piece["kind"], piece["block"]): (piece["start_ms"], piece["end_ms"]) for piece in rule["pieces"]}
        assert all(ends[tuple(need)][1] <= piece["start_ms"] for piece in rule["pieces"] for need in piece["needs"])
        assert rule["path_ms"] <= rule["work_ms"] * (1 + 1e-9) and 0 < rule["covered"] <= 1
    done = [line["update_done_ms"] for line in bp["blocks"]]
    assert done[0] == max(done) == bp["path_ms"] and all(value > bp["forward_ms"] for value in done)
    others = sum(p["end_ms"] - p["start_ms"] for p in bp["pieces"] if p["kind"] == "update" and p["block"] != "fc1")
    assert bp["path_ms"] == pytest.approx(bp["work_ms"] - others)      # nothing but their updates is done meanwhile
    for i, name in enumerate(names):
        assert bp["blocks"][i]["waits_for"] == names[i + 1:]
        assert joint["blocks"][i]["waits_for"] == names[i + 1:]        # one step at the end
        for rule in (streaming, conditional, unlocked):
            assert rule["blocks"][i]["waits_for"] == []
            assert rule["blocks"][i]["synthesizer_waits_for"] == (names[i + 1:i + 2] if name != "head" else None)
    assert [line["waits_for"] for line in pairs["blocks"]] == [["fc2"], [], ["fc4"], [], []]
    assert [line["forward_starts_ms"] > 0 for line in streaming["blocks"]] == [False, True, True, True, True]
    of = {(p["kind"], p["block"]): p for p in unlocked["pieces"]}
    for above, cut in zip(names[1:], names):    # a block's forward pass needs its model's guess alone
        assert of["forward", above]["needs"] == (("input model", cut),) and not of["input model", cut]["needs"]


def test_the_real_steps_order_is_in_the_profilers_trace(measured):
    """The spans, in the order in which a streaming step of the rule made them."""
    name, (_, trace) = "cdni, streaming", measured
    spans = sorted((event["ts"], event["name"].removeprefix(f"{name}: ")) for event in json.loads(trace.read_text())["traceEvents"]
                   if event.get("cat") == "user_annotation" and event["name"].startswith(f"{name}: "))
    step = [span for _, span in spans][: len(spans) // 3][1:]       # three were profiled; the first span is the whole
    expected = []
    for block, below in zip(("fc1", "fc2", "fc3", "fc4", "head"), ("", "fc1", "fc2", "fc3", "fc4")):
        expected += [f"forward {block}", *[f"synthesizer {block}"] * (block != "head"), f"backward {block}"]
        expected += [f"regression {below}"] * bool(below) + [f"forward update of {block}"] + [f"feedback update of {below}"] * bool(below)
    assert step == expected


def test_a_schedule_by_hand(timeline):
    """Two devices: b needs a and waits for nothing else; c waits until its device is free; d for both."""
    piece = timeline["Piece"]
    pieces = [piece("forward", "a", "one", ()), piece("backward", "c", "two", ()), piece("forward", "b", "two", (("forward", "a"),)),
              piece("update", "d", "one", (("forward", "b"), ("backward", "c")))]
    times = {("forward", "a"): 2., ("backward", "c"): 5., ("forward", "b"): 1., ("update", "d"): 4.}
    assert timeline["schedule"](pieces, times) == {("forward", "a"): (0, 2), ("backward", "c"): (0, 5), ("forward", "b"): (5, 6),
                                                   ("update", "d"): (6, 10)}
