"""Truncated backpropagation through time, in float64: against plain backpropagation, hand-written loops and computations by hand; the
curriculum over length; and the script that sets both beside each other."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CLASSES, PATIENCE, build, changed, defaults, dense, learned, make_task, step, stepper, tensors, unrolled
from test_contracts import poisoned
from test_oracles import assert_same
from torch import nn

from lbp.archs.network import Network
from lbp.archs.rnn import Last, Recurrent
from lbp.datasets.data import load
from lbp.datasets.task import MASKED, Task
from lbp.errors import ConfigError, Refused
from lbp.training.setup import build_algo, build_arch

SCRIPT = Path(__file__).parents[1] / "scripts/copy_task.py"
CELLS = ["rnn", "lstm", "gru"]
KINDS = ["linear", "mlp", "recurrent"]
STEPS = 7


def symbols(sequence=True, steps=STEPS, dtype=torch.float64):
    return Task("classification", (steps,), CLASSES, CLASSES, "cross_entropy", 0.0, dtype, symbols=5, sequence=sequence)


def make(cell="lstm", sequence=True, **knobs):
    """(network, task, x, y): two layers over symbols; some targets masked."""
    task = symbols(sequence)
    network = build_arch(defaults("arch", cell) | {"width": 6, "layers": 2, "embedding": 5} | knobs, task).double()
    y = torch.randint(CLASSES, (8, STEPS))
    y[torch.rand(8, STEPS) < .4] = MASKED
    return network, task, torch.randint(5, (8, STEPS)), y if sequence else torch.arange(8) % CLASSES


def backprop(network, task, x, y):
    network.zero_grad()
    task.loss(network(x), y).sum().backward()
    found = {f"network.{n}": p.grad.clone() for n, p in network.named_parameters()}
    network.zero_grad()
    return found


def of_network(found):
    return {n: g for n, g in found.items() if n.startswith("network.")}


def speaking(rule):
    with torch.no_grad():
        for p in rule.groups()["feedback"]:
            p.copy_(torch.randn_like(p) / 3)
    return rule


def layers_of(network):
    return [block for block in network.blocks.values() if isinstance(block, Recurrent)]


def unroll(network, x, spans, cut):
    """Outputs at all tokens and, after each span, the states of all layers side by side, as `cut` gives them on to the next."""
    layers, outs, ends = layers_of(network), [], []
    states = [layer.state(len(x)) for layer in layers]
    for part in x.split(spans, 1):
        h = network.blocks["embed"](part) if "embed" in network.blocks else part
        for i, layer in enumerate(layers):
            h, states[i] = layer.run(h, states[i])
        outs.append(network.head(h))
        ends.append(torch.cat([t for state in states for t in state], 1))
        flat = list(cut(ends[-1]).split([layer.width for layer in layers for _ in range(layer.parts)], 1))
        states = [tuple(flat.pop(0) for _ in range(layer.parts)) for layer in layers]
    return torch.cat(outs, 1), ends


def true_gradients(network, task, x, y, span):
    """The gradients at the states where spans end, by plain autograd over the whole sequence."""
    ends = []

    def cut(end):
        ends.append(end)
        return end

    out, _ = unroll(network, x, span, cut)
    loss = task.loss(out if task.sequence else out[:, -1], y).sum()
    return torch.autograd.grad(loss, ends[:-1])


class Oracle(nn.Module):
    """In place of a synthesizer: says what it was given, cut by cut, and all at once where it is asked so."""

    def __init__(self, answers):
        super().__init__()
        self.answers, self.calls, self.nothing = answers, 0, nn.Parameter(torch.zeros((), dtype=torch.float64))

    def state(self, n):
        return ()

    def forward(self, states, memory):
        if len(states) > len(self.answers[0]) or torch.is_grad_enabled():
            return states * 0 + self.nothing, memory
        self.calls += 1
        return self.answers[self.calls - 1], memory


# ---- oracles

@pytest.mark.parametrize("schedule", ["joint", "streaming"])
@pytest.mark.parametrize("option", ["tbptt", "tbptt_dni"])
@pytest.mark.parametrize("sequence", [True, False], ids=["each", "one"])
@pytest.mark.parametrize("cell", CELLS)
def test_one_span_is_backprop(cell, sequence, option, schedule):
    network, task, x, y = make(cell, sequence)
    expected, loss = backprop(network, task, x, y), task.loss(network(x), y)
    for span in (STEPS, STEPS + 3):
        result, found = learned(build(option, network, task, span=span, schedule=schedule), x, y)
        assert_same(of_network(found), expected)
        torch.testing.assert_close(result.loss, loss.detach(), rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(result.out, network(x).detach(), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("schedule", ["joint", "streaming"])
@pytest.mark.parametrize("span", [1, 2, 4])
@pytest.mark.parametrize("sequence", [True, False], ids=["each", "one"])
@pytest.mark.parametrize("cell", CELLS)
def test_a_synthesizer_that_says_the_true_gradient_is_backprop(cell, sequence, span, schedule):
    """7 tokens: the last span is shorter than the others, or there is a single token left."""
    network, task, x, y = make(cell, sequence)
    answers = true_gradients(network, task, x, y, span)
    rule = build("tbptt_dni", network, task, span=span, schedule=schedule)
    rule.synthesizer = Oracle(answers)
    expected = backprop(network, task, x, y)
    result, found = learned(rule, x, y)
    assert rule.synthesizer.calls == len(answers) == math.ceil(STEPS / span) - 1
    assert_same(of_network(found), expected)
    assert set(result.blocks) == {"rnn1", "rnn2"}
    for values in result.blocks.values():
        assert values["synthetic_error"] < 1e-20 and values["synthetic_deg"] < 1e-6


@pytest.mark.parametrize("span", [1, 2, 4])
@pytest.mark.parametrize("sequence", [True, False], ids=["each", "one"])
@pytest.mark.parametrize("cell", CELLS)
def test_truncation_is_a_loop_that_detaches_and_so_is_a_synthesizer_that_says_0(cell, sequence, span):
    network, task, x, y = make(cell, sequence)
    out, _ = unroll(network, x, span, torch.Tensor.detach)
    network.zero_grad()
    task.loss(out if sequence else out[:, -1], y).sum().backward()
    expected = {f"network.{n}": p.grad.clone() for n, p in network.named_parameters()}
    network.zero_grad()
    for option in ("tbptt", "tbptt_dni"):       # whose last layer begins at 0
        assert_same(of_network(learned(build(option, network, task, span=span), x, y)[1]), expected)
    whole = backprop(network, task, x, y)
    assert any(not torch.allclose(whole[n], g) for n, g in expected.items())


def test_a_synthesizer_learns_the_bootstrapped_gradient():
    """One tanh unit, three tokens in spans of one, an answer at the end, by hand: h_t = tanh(u x_t + w h_{t-1} + b); s_t = m h_t + k.
    At cut 2 the gradient is the loss's, through h_3; at cut 1 it is s_2's, through h_2. M learns from both."""
    task = Task("regression", (3, 1), 1, None, "mse", 0.0, torch.float64)
    network = Network({"rnn1": Recurrent(1, 1, "rnn", read=Last()), "head": nn.Linear(1, 1)}, (3, 1)).double()
    rule = speaking(build("tbptt_dni", network, task, span=1))
    x, y = torch.randn(5, 3, 1, dtype=torch.float64), torch.randn(5, 1, dtype=torch.float64)
    found = learned(rule, x, y)[1]
    u, b, w, c, v, d = (p.detach().numpy().squeeze() for p in network.parameters())
    m, k = (p.detach().numpy().squeeze() for p in rule.synthesizer.parameters())
    h = [np.zeros(5)]
    for t in range(3):
        h.append(np.tanh(u * x[:, t, 0].numpy() + b + w * h[-1] + c))
    error = v * h[3] + d - y[:, 0].numpy()
    s = [None, m * h[1] + k, m * h[2] + k]
    signal = [None, s[1], s[2], error * v]                              # what teaches h_1, h_2, h_3
    a = [None, *(signal[t] * (1 - h[t]**2) for t in (1, 2, 3))]
    g = [None, a[2] * w, a[3] * w]
    gap = [None, s[1] - g[1], s[2] - g[2]]
    expected = {
        "network.blocks.rnn1.input.weight": sum((a[t] * x[:, t - 1, 0].numpy()).sum() for t in (1, 2, 3)),
        "network.blocks.rnn1.input.bias": sum(a[t].sum() for t in (1, 2, 3)),
        "network.blocks.rnn1.recurrent.weight": sum((a[t] * h[t - 1]).sum() for t in (1, 2, 3)),
        "network.blocks.rnn1.recurrent.bias": sum(a[t].sum() for t in (1, 2, 3)),
        "network.blocks.head.weight": (error * h[3]).sum(), "network.blocks.head.bias": error.sum(),
        "synthesizer.body.0.weight": 2 * sum((gap[t] * h[t]).sum() for t in (1, 2)),
        "synthesizer.body.0.bias": 2 * sum(gap[t].sum() for t in (1, 2)),
    }
    assert_same({n: g.squeeze() for n, g in found.items()}, {n: torch.tensor(v, dtype=torch.float64) for n, v in expected.items()})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cell", CELLS)
def test_streaming_finds_the_same_where_nothing_is_stepped_and_steps_after_each_span_where_it_is(cell, kind):
    network, task, x, y = make(cell)
    torch.manual_seed(1)
    rule = speaking(build("tbptt_dni", network, task, span=3, synthesizer=kind, hidden=5))
    joint, found = learned(rule, x, y)
    rule.schedule = "streaming"
    streaming, again = learned(rule, x, y)
    assert_same(again, found)
    for name, values in joint.blocks.items():
        for key, value in values.items():
            torch.testing.assert_close(streaming.blocks[name][key], value)
    seen, optimizers = [], stepper(rule, lr=.1)

    def apply(group, loss=None):
        before = tensors(rule)
        optimizers(group, loss)
        seen.append((group, bool(changed(before, rule))))

    step(rule, type("Both", (), {"__call__": staticmethod(apply), "finish": optimizers.finish})(), x, y)
    assert seen == [("forward", True), ("feedback", False), ("forward", True), ("feedback", True), ("forward", True), ("feedback", True)]


def test_the_memory_of_a_recurrent_synthesizer_goes_from_cut_to_cut_and_no_gradient_with_it():
    """What it says at the second cut depends on the first; each cut's gradient is that of a single step of its LSTM."""
    network, task, x, y = make()
    rule = speaking(build("tbptt_dni", network, task, span=3, synthesizer="recurrent", hidden=5))
    m = rule.synthesizer
    with torch.no_grad():
        _, ends = unroll(network, x, 3, torch.Tensor.detach)
    first, memory = m(ends[0], m.state(8))
    second, _ = m(ends[1], memory)
    assert not torch.allclose(second, m(ends[1], m.state(8))[0])
    assert not any(part.requires_grad for part in memory)
    _, begun = unroll(network, x, 3, lambda end: end.detach().requires_grad_())
    found = learned(rule, x, y)[1]
    gradients = []
    for cut, said in ((0, second), (1, None)):        # spans 2 and 3, from ends[cut] on
        start = ends[cut].clone().requires_grad_()
        h, parts = network.blocks["embed"](x[:, 3 * cut + 3 : 3 * cut + 6]), list(start.split([6] * 4, 1))
        end = []
        for i, layer in enumerate(layers_of(network)):
            h, state = layer.run(h, tuple(parts[2 * i : 2 * i + 2]))
            end += state
        loss = task.loss(network.head(h), y[:, 3 * cut + 3 : 3 * cut + 6]).sum()
        if said is not None:
            loss = loss + (torch.cat(end, 1) * said.detach()).sum()
        gradients.append(torch.autograd.grad(loss, start)[0])
    m.zero_grad()
    ((first - gradients[0]).square().sum() + (second - gradients[1]).square().sum()).backward()
    assert_same({n: g for n, g in found.items() if n.startswith("synthesizer.")}, {f"synthesizer.{n}": p.grad for n, p in m.named_parameters()})


@pytest.mark.parametrize("option", ["tbptt", "tbptt_dni"])
def test_an_image_is_cut_into_spans_of_rows(option):
    """`incoming`, the rows, is of the whole image, once."""
    task = make_task((2, 6, 3))
    network = build_arch(defaults("arch", "gru") | {"width": 5}, task).double()
    x, y = torch.randn(8, 2, 6, 3, dtype=torch.float64), torch.arange(8) % CLASSES
    assert_same(of_network(learned(build(option, network, task, span=6), x, y)[1]), backprop(network, task, x, y))
    rule = build(option, network, task, span=4)
    if option == "tbptt_dni":
        rows = x.transpose(1, 2).flatten(2)
        rule.synthesizer = Oracle(true_gradients(network, task, rows, y, 4))
        assert_same(of_network(learned(rule, x, y)[1]), backprop(network, task, x, y))
    else:
        late = learned(rule, x, y)[1]
        x[:, :, 0] += 1      # reaches the last span through its first state alone, where no gradient comes back
        assert all(torch.isfinite(g).all() for g in learned(rule, x, y)[1].values()) and late


def test_dropout_is_of_training_alone_and_of_what_goes_up():
    network, task, x, y = make(dropout=.5)
    rule = build("tbptt_dni", network, task, span=2)
    rule.eval()
    assert_same(of_network(learned(build("tbptt", network, task, span=STEPS).eval(), x, y)[1]), backprop(network, task, x, y))
    rule.train()
    first, second = (learned(rule, x, y)[0].out for _ in range(2))
    assert not torch.allclose(first, second)
    torch.testing.assert_close(rule.eval().predict(x), network(x), rtol=0, atol=0)


# ---- facts and guards

@pytest.mark.parametrize("option", ["tbptt", "tbptt_dni"])
def test_weight_transport(option):
    """A tanh unit with the signs of all its weights turned is the same unit: by backpropagation its incoming gradients turn too."""
    network = unrolled(cell="rnn", each=True)
    task = make_task(network.in_shape, sequence=True)
    x, y = torch.randn(8, 6, 2, dtype=torch.float64), torch.randint(CLASSES, (8, 6))
    rule = build(option, network, task, span=2)
    before, out = learned(rule, x, y)[1], network(x)
    lower, upper = network.blocks["fc1"], network.blocks["fc2"]
    with torch.no_grad():
        for p in (lower.input.weight[3], lower.input.bias[3:4], lower.recurrent.weight[3], lower.recurrent.bias[3:4],
                  lower.recurrent.weight[:, 3], upper.input.weight[:, 3]):
            p.neg_()
    torch.testing.assert_close(network(x), out, rtol=0, atol=1e-15)
    after = learned(rule, x, y)[1]
    key = "network.blocks.fc1.input.weight"
    assert before[key][3].abs().max() > 1e-6 and rule.facts.weight_transport
    torch.testing.assert_close(after[key][3], -before[key][3], rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("option", ["tbptt", "tbptt_dni"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_batch_that_is_not_finite_moves_nothing_in_the_middle_either(bad, option):
    """The last token is bad: spans before it, which are finite, are not stepped."""
    network = unrolled()
    task = make_task(network.in_shape)
    rule = build(option, network, task, span=2, schedule="streaming")
    x, y = torch.randn(8, 6, 2, dtype=torch.float64), torch.arange(8) % CLASSES
    for before in poisoned(rule, x, y, bad):
        assert not changed(before, rule)


@pytest.mark.parametrize("option", ["tbptt", "tbptt_dni"])
def test_refusals(option):
    def refuses(network, task, says):
        with pytest.raises(Refused, match=rf"algo={option}\b.*{says}"):
            build_algo(defaults("algo", option), network, task)

    refuses(dense(), make_task(), "no recurrent block; use arch=lstm, gru or rnn")
    refuses(build_arch(defaults("arch", "transformer") | {"dim": 8, "heads": 2}, symbols()), symbols(), "arch=lstm, gru or rnn")
    blocks = {"rnn1": Recurrent(2, 4, "gru"), "fc": nn.Sequential(nn.Linear(4, 4), nn.ReLU()), "head": nn.Linear(4, CLASSES)}
    refuses(Network(blocks, (6, 2)), make_task((6, 2)), "block fc .Sequential.*arch=lstm")
    blocks = {"rnn1": Recurrent(2, 4, "gru"), "rnn2": Recurrent(4, 4, "gru", incoming=nn.Flatten()), "head": nn.Linear(4, CLASSES)}
    with pytest.raises(Refused, match="block rnn2 reads the whole sequence"):
        build(option, Network(blocks, (6, 2)), make_task((6, 2)))


# ---- it learns what truncation cannot

def recalled(option, **knobs):
    """Share of test sequences whose first symbol is said after six others, drawn alike: what is to be kept is known at the end alone."""
    torch.manual_seed(0)
    task = Task("classification", (STEPS,), 4, 4, "cross_entropy", 0.0, torch.float32, symbols=4, sequence=True)
    rule = build(option, build_arch(defaults("arch", "gru") | {"width": 16}, task), task, span=2, **knobs)
    apply, rng = stepper(rule, "adam", lr=.01), torch.Generator().manual_seed(1)

    def drawn(n):
        x, y = torch.randint(4, (n, STEPS), generator=rng), torch.full((n, STEPS), MASKED)
        y[:, -1] = x[:, 0]
        return x, y

    for _ in range(600):
        step(rule, apply, *drawn(32))
    x, y = drawn(512)
    return float((rule.predict(x)[:, -1].argmax(-1) == y[:, -1]).double().mean())


def test_a_synthetic_gradient_learns_what_truncation_cannot():
    """The same settings; chance is a quarter."""
    assert recalled("tbptt_dni", synthesizer="mlp") > .95
    assert recalled("tbptt") < .6


# ---- the curriculum

GENERATED = ["copy", "repeat_copy", "adding", "argmax"]


def grown(name, **knobs):
    return load(defaults("dataset", name) | {"n": 300, "n_test": 40, "max_length": 4, "start_length": 2} | knobs, seed=5, batch_size=16)


def lengths_of(name, x):
    """How many symbols or digits a sequence has, read off the tokens."""
    digits = defaults("dataset", name)["symbols" if "copy" in name else "digits"]
    return [next((i for i, t in enumerate(row) if t >= digits), len(row)) if "copy" in name else sum(t < digits for t in row) for row in x.tolist()]


@pytest.mark.parametrize("name", GENERATED)
def test_an_epoch_draws_from_what_is_short_enough(name):
    data, plain = grown(name, grow_every=2), grown(name, start_length=None)
    assert data.train.steps == plain.train.steps == 270 // 16
    for epoch, longest in enumerate((2, 2, 3, 3, 4, 4, 4)):
        order = data.train.order(epoch)
        sizes = lengths_of(name, data.train.x[order])
        assert len(order) == 270 and max(sizes) == longest and set(sizes) == set(range(1, longest + 1))
        assert torch.equal(order, grown(name, grow_every=2).train.order(epoch))       # of (seed, epoch) alone
        counts = torch.bincount(order, minlength=270)
        eligible = torch.tensor(lengths_of(name, data.train.x)) <= longest
        assert not counts[~eligible].any() and counts[eligible].max() - counts[eligible].min() <= 1
        batches = list(data.train.batches(epoch))
        assert len(batches) == data.train.steps and all(torch.equal(a, b) for (a, _), (b, _) in zip(data.train.batches(epoch, 3), batches[3:]))
    assert torch.equal(data.train.order(6), plain.train.order(6))     # all of them are long enough now
    assert not torch.equal(data.train.order(0), data.train.order(1))
    for part in ("val", "test"):
        assert all(torch.equal(a, b) for a, b in zip(next(getattr(data, part).passes()), next(getattr(plain, part).passes())))


@pytest.mark.parametrize("name", GENERATED)
@pytest.mark.parametrize("knobs, says", [
    ({"start_length": 5}, "dataset.start_length=5 is above dataset.max_length=4"),
    ({"start_length": 1, "min_length": 2}, "dataset.start_length=1 is below dataset.min_length=2"),
    ({"start_length": None, "grow_every": 3}, "dataset.grow_every=3"),
    ({"n": 3, "start_length": 1, "seed": 7, "max_length": 40}, "dataset.start_length=1: none of the"),
], ids=str)
def test_refusals_of_the_curriculum(name, knobs, says):
    with pytest.raises(ConfigError, match=says):
        grown(name, **knobs)


def test_a_curriculum_has_no_order_to_keep():
    with pytest.raises(ConfigError, match="trainer.shuffle=false.*dataset.start_length=2"):
        load(defaults("dataset", "copy") | {"start_length": 2}, seed=0, batch_size=4, shuffle=False)


def test_ranks_share_a_curriculums_batches(monkeypatch):
    from lbp import ranks
    whole = [x for x, _ in grown("copy").train.batches(1)]
    parts = []
    for rank in (0, 1):
        monkeypatch.setattr(ranks, "share", lambda size, rank=rank: slice(rank * size // 2, (rank + 1) * size // 2))
        parts.append([x for x, _ in grown("copy").train.batches(1)])
    for x, a, b in zip(whole, *parts, strict=True):
        assert torch.equal(torch.cat((a, b)), x)


def test_a_stopped_run_goes_on_with_its_lengths(tmp_path, capsys):
    """In the middle of the second epoch of three: the same weights as never stopping."""
    from lbp import cli
    from lbp.training import checkpoint
    words = ["algo=tbptt_dni", "algo.span=2", "dataset=copy", "dataset.n=120", "dataset.n_test=20", "dataset.start_length=1", "arch.width=5",
             "trainer.batch_size=20", "metrics.every=0", "logger.console=off", "trainer.checkpoint_every=2", "trainer.device=cpu"]
    assert cli.main(["train", *words, "trainer.epochs=3", f"run.dir={tmp_path}/whole"]) == 0
    assert cli.main(["train", *words, "trainer.epochs=2", f"run.dir={tmp_path}/parts"]) == 0
    assert cli.main(["resume", f"{tmp_path}/parts", "trainer.epochs=3"]) == 0
    whole, parts = (checkpoint.load(tmp_path / run / "checkpoints/last.pt")["rule"] for run in ("whole", "parts"))
    assert all(torch.equal(parts[n], t) for n, t in whole.items())


def test_the_script(tmp_path):
    """Lengths 1 and 2 over two symbols: something is counted, solved, written and drawn."""
    done = subprocess.run([sys.executable, SCRIPT, "--seeds", "0", "--minutes", ".05", "--max-length", "2", "--span", "2", "--n", "600",
                           "--n-test", "100", "--out", tmp_path / "found", "--set", "dataset.symbols=2", "arch.width=16", "trainer.batch_size=20",
                           "optimizer.lr=.01"], capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    runs = json.loads((tmp_path / "found.json").read_text())["runs"]
    assert list(runs) == ["algo=tbptt", "algo=tbptt_dni"]
    for (one,) in runs.values():
        assert set(one["shares"]) == {"1", "2"} and one["training"] and one["steps"] > 0
        assert one["longest"] == max([0] + [n for n in (1, 2) if all(one["shares"][str(k)] >= .99 for k in range(1, n + 1))])
    assert (tmp_path / "found_lengths.png").stat().st_size > 5000 and (tmp_path / "found_training.png").stat().st_size > 5000
    assert done.stdout.count("| tbptt") == 2
