"""Sequences: recurrent blocks and the causal transformer, the generated sets and text, their metrics, and which rules train on them."""

import hashlib
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ALGOS, configuration, defaults, task_of
from test_contracts import two_steps
from torch import nn

from lbp import registry
from lbp.archs.rnn import Recurrent
from lbp.datasets.data import COMMON, Arrays, load
from lbp.datasets.task import MASKED, Task
from lbp.errors import ConfigError, DataError, Refused
from lbp.training.results import evaluate
from lbp.training.setup import build, build_algo, build_arch

CELLS = {"rnn": nn.RNN, "lstm": nn.LSTM, "gru": nn.GRU}
SEQUENTIAL = [*CELLS, "transformer"]
SMALL = {name: {"width": 6, "layers": 2, "embedding": 5} for name in CELLS} | {"transformer": {"dim": 8, "heads": 2}}
GENERATED = ["copy", "repeat_copy", "adding", "argmax"]


def words(sequence=True, steps=6, loss="cross_entropy", dtype=torch.float64):
    return Task("classification", (steps,), 4, 4, loss, 0.0, dtype, symbols=5, sequence=sequence)


def make(arch, task, **knobs):
    return build_arch(defaults("arch", arch) | SMALL[arch] | knobs, task).to(task.dtype)


def read(option, **knobs) -> Arrays:
    own = {key: value for key, value in defaults("dataset", option).items() if key not in COMMON}
    return registry.load("dataset", own.pop("name"))(**own | knobs)


# ---- blocks

def both(cell, inputs=3, width=5):
    """A block and torch's layer with the same weights."""
    block, layer = Recurrent(inputs, width, cell).double(), CELLS[cell](inputs, width, batch_first=True).double()
    for mine, letters in ((block.input, "ih"), (block.recurrent, "hh")):
        getattr(layer, f"weight_{letters}_l0").data.copy_(mine.weight)
        getattr(layer, f"bias_{letters}_l0").data.copy_(mine.bias)
    return block, layer


@pytest.mark.parametrize("cell", CELLS)
def test_a_recurrent_block_is_torchs(cell):
    block, layer = both(cell)
    x = torch.randn(4, 7, 3, dtype=torch.float64, requires_grad=True)
    mine, theirs = block(x), layer(x)[0]
    torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)
    signal = torch.randn_like(mine)
    wrt = [block.input.weight, block.recurrent.weight, block.input.bias, block.recurrent.bias, x]
    others = [*(getattr(layer, f"{kind}_l0") for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")), x]
    for a, b in zip(torch.autograd.grad(mine, wrt, signal), torch.autograd.grad(theirs, others, signal)):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("cell", CELLS)
def test_steps_and_spans_are_the_whole(cell):
    block = Recurrent(3, 5, cell).double()
    x = torch.randn(4, 7, 3, dtype=torch.float64)
    state, outputs = block.state(4), []
    assert len(state) == (2 if cell == "lstm" else 1)
    for token in x.unbind(1):
        h, state = block.step(token, state)
        outputs.append(h)
    whole = block(x)
    torch.testing.assert_close(torch.stack(outputs, 1), whole, rtol=1e-12, atol=1e-12)
    first, between = block.run(x[:, :3], block.state(4))
    second, end = block.run(x[:, 3:], between)
    torch.testing.assert_close(torch.cat((first, second), 1), whole, rtol=1e-12, atol=1e-12)
    for a, b in zip(end, state, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("arch", SEQUENTIAL)
def test_no_later_token_changes_an_earlier_output(arch):
    network = make(arch, words())
    x = torch.randint(0, 5, (3, 6))
    out = network(x)
    assert out.shape == (3, 6, 4)
    for t in range(6):
        other = x.clone()
        other[:, t] = (other[:, t] + 1) % 5
        changed = network(other)
        torch.testing.assert_close(changed[:, :t], out[:, :t], rtol=1e-12, atol=1e-12)
        assert all((changed[:, s] != out[:, s]).any() for s in range(t, 6))     # and each reaches all from itself on


@pytest.mark.parametrize("arch", SEQUENTIAL)
def test_one_answer_is_read_at_the_last_token(arch):
    """Both networks have the same weights: their keys are the same, but for the place in the pool of the transformer's norm."""
    each, one = make(arch, words()), make(arch, words(sequence=False))
    one.load_state_dict({key.replace("pool.", "pool.0."): value for key, value in each.state_dict().items()})
    x = torch.randint(0, 5, (3, 6))
    torch.testing.assert_close(one(x), each(x)[:, -1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("arch", SEQUENTIAL)
def test_an_image_is_the_sequence_of_its_rows(arch):
    """Rows above the last reach the answer; the block sees C W numbers at each of H steps."""
    task = Task("classification", (2, 6, 3), 4, 4, dtype=torch.float64)
    network = build_arch(defaults("arch", arch) | SMALL[arch] | ({"embedding": None} if arch in CELLS else {}), task).double()
    x = torch.randn(3, 2, 6, 3, dtype=torch.float64, requires_grad=True)
    network(x).sum().backward()
    assert (x.grad.abs().sum((0, 1, 3)) > 0).all()
    first = next(iter(network.blocks.values()))
    torch.testing.assert_close(first.incoming(x)[1, 2], torch.cat((x[1, 0, 2], x[1, 1, 2])))


def test_refusals_of_archs():
    vector = Task("classification", (6,), 4, 4)
    for arch in SEQUENTIAL:
        with pytest.raises(Refused, match=f"arch={arch}.*arch=mlp"):
            build_arch(defaults("arch", arch), vector)
    with pytest.raises(Refused, match="arch.embedding=5"):
        build_arch(defaults("arch", "gru") | {"embedding": 5}, Task("classification", (1, 6, 6), 4, 4))
    with pytest.raises(Refused, match="arch.heads=3"):
        build_arch(defaults("arch", "transformer") | {"heads": 3}, words())
    for task in (words(), words(sequence=False)):
        with pytest.raises(Refused, match="arch=mlp .*use arch=rnn"):
            build_arch(defaults("arch", "mlp"), task)


# ---- sets

@pytest.mark.parametrize("option", GENERATED)
def test_the_same_seed_draws_the_same_and_another_another(option):
    a, b, c = read(option), read(option), read(option, seed=1)
    assert all((getattr(a, part) == getattr(b, part)).all() for part in ("x", "y", "x_test", "y_test"))
    assert (a.x != c.x).any() and len(a.x) == 10000 and len(a.x_test) == 2000


def symbols_before(row, symbols):
    """The symbols up to the first token that is none."""
    return row[: next(i for i, token in enumerate(row) if token >= symbols)].tolist()


def test_copy():
    a = read("copy", n=300, n_test=20, symbols=8, min_length=2, max_length=5)
    assert a.x.shape == a.y.shape == (300, 11) and a.symbols == 10
    sizes = set()
    for x, y in zip(a.x, a.y):
        said = symbols_before(x, 8)
        size = len(said)
        sizes.add(size)
        assert x[size] == 8 and (x[size + 1 :] == 9).all()
        assert y.tolist() == [MASKED] * (size + 1) + said + [MASKED] * (10 - 2 * size)
    assert sizes == {2, 3, 4, 5}
    assert set(a.x[a.x < 8]) == set(range(8))


def test_repeat_copy():
    a = read("repeat_copy", n=300, n_test=20, symbols=6, min_length=1, max_length=3, max_repeats=4)
    assert a.x.shape == (300, 3 + 1 + 12 + 1) and len(a.classes) == 7 and a.symbols == 11
    repeats = set()
    for x, y in zip(a.x, a.y):
        said = symbols_before(x, 6)
        often = x[len(said)] - 6 + 1
        repeats.add(int(often))
        assert (x[len(said) + 1 :] == 10).all()
        answer = said * often + [6]
        assert y[len(said) + 1 :].tolist() == answer + [MASKED] * (16 - len(said) - len(answer))
        assert (y[: len(said) + 1] == MASKED).all()
    assert repeats == {1, 2, 3, 4}


def test_adding_and_argmax():
    a, b = (read(option, n=300, n_test=20, digits=5, min_length=1, max_length=6) for option in ("adding", "argmax"))
    assert (a.x == b.x).all() and a.x.shape == (300, 7) and (a.x[:, -1] == 5).all()
    for x, total, place in zip(a.x, a.y, b.y):
        digits = [int(token) for token in x[:-1] if token != 6]
        assert x[:-1].tolist() == [6] * (6 - len(digits)) + digits
        assert total.tolist() == [sum(digits)]
        assert digits[place] == max(digits) and all(d < max(digits) for d in digits[place + 1 :])
    assert set(b.y) == set(range(6)) and len(b.classes) == 6


def test_text_is_cut_into_windows_in_order(tmp_path):
    file = tmp_path / "some.txt"
    content = "".join(chr(97 + i * i % 23) for i in range(1003))
    file.write_text(content)
    cfg = defaults("dataset", "text") | {"file": str(file), "steps": 10, "val_size": .1}
    data = load(cfg, seed=3, batch_size=4)
    splits = [data.train, data.val, data.test]
    assert [len(split) for split in splits] == [81, 9, 10] and data.task.symbols == data.task.classes == len(set(content))
    joined, following = (["".join(data.classes[c] for split in splits for c in part(split).flatten().tolist())]
                         for part in (lambda s: s.x, lambda s: s.y))
    assert joined == [content[:1000]] and following == [content[1:1001]]
    assert data.read == {str(file): hashlib.sha256(content.encode()).hexdigest()}


def test_text_by_default_is_this_pythons_own_help():
    import pydoc_data.topics
    a = read("text")
    assert list(a.read) == [pydoc_data.topics.__file__] and len(a.x) * 100 > 300_000


@pytest.mark.parametrize("knobs, error, says", [
    ({"name": "copy", "min_length": 5}, ConfigError, "dataset.min_length=5"),
    ({"name": "copy", "normalize": "standard"}, ConfigError, "dataset.normalize=standard"),
    ({"name": "copy", "augment": ["shift:2"]}, ConfigError, "dataset.augment"),
    ({"name": "text", "file": "/nowhere/a.txt"}, DataError, "dataset.file"),
    ({"name": "text", "steps": 10**6}, DataError, "dataset.steps=1000000"),
], ids=str)
def test_refusals_of_sets(knobs, error, says):
    with pytest.raises(error, match=says):
        load(defaults("dataset", knobs["name"]) | knobs, seed=0, batch_size=4)


@pytest.mark.parametrize("change, says", [
    ({"x": torch.zeros(5, 6)}, "integers"), ({"x": torch.full((5, 6), 5)}, "0 .. 5|5 .. 5"),
    ({"y": torch.full((5, 6), 4)}, "out of range"), ({"y": torch.full((5, 6), MASKED)}, "masked"),
    ({"y": torch.zeros(5, 3, dtype=torch.long)}, r"\(N, T\)")], ids=str)
def test_sequences_are_checked(change, says):
    arrays = Arrays(torch.arange(30).view(5, 6) % 5, torch.arange(30).view(5, 6) % 4, kind="sequence", classes=list("abcd"), symbols=5)
    load({"normalize": "none"}, seed=0, batch_size=2, arrays=arrays)
    for key, value in change.items():
        setattr(arrays, key, value)
    with pytest.raises(DataError, match=says):
        load({"normalize": "none"}, seed=0, batch_size=2, arrays=arrays)


# ---- metrics

def test_sequence_accuracy_and_bits():
    """A sequence is right where all its unmasked tokens are; one without any does not count."""
    task = words(steps=3)
    y = torch.tensor([[0, 1, MASKED], [2, MASKED, 3], [MASKED] * 3, [1, 1, 1]])
    out = torch.zeros(4, 3, 4, dtype=torch.float64)
    out[0, 0, 0] = out[0, 1, 1] = out[1, 0, 2] = out[3, :, 1] = 1.0     # sequence 1: its last token stays at class 0
    scores = task.score(out[:2], y[:2]) + task.score(out[2:], y[2:])
    loss = float(task.loss(out, y).sum()) / task.count(y)
    found = task.values(loss, scores)
    assert found["accuracy"] == pytest.approx(6 / 7) and found["sequence_accuracy"] == pytest.approx(2 / 3)
    assert task.values(math.log(4), scores)["bits_per_character"] == pytest.approx(2)
    plain = Task("classification", (3,), 4, 4)
    assert set(plain.values(1.0, plain.score(torch.eye(4), torch.arange(4)))) == {"accuracy"}


# ---- learning

def trained(arch, epochs, lr, batch_size=50, **knobs):
    """What an arch under bp makes of a set's test split."""
    values = configuration("bp", arch, optimizer__lr=lr, trainer__epochs=epochs, trainer__batch_size=batch_size, metrics__every=0)
    values["dataset"] = defaults("dataset", knobs["name"]) | knobs
    experiment = build(values)
    apply, rule = experiment.apply, experiment.rule
    for epoch in range(epochs):
        for x, y in experiment.data.train.batches(epoch):
            apply.count = experiment.data.task.count(y)
            apply.finish(rule.learn(x, y, apply).loss)
    return evaluate(rule, experiment.data.task, experiment.data.test, experiment.environment)


def test_an_lstm_learns_to_copy_three_symbols():
    found = trained("lstm", 12, .01, name="copy", n=2000, n_test=300, symbols=4, min_length=3, max_length=3)
    assert found["sequence_accuracy"] > .9      # chance: 1/64


# ---- rules

MUST = {name: set(SEQUENTIAL) for name in ("bp", "fa", "dfa", "local", "shallow")}


@pytest.mark.parametrize("sequence", [True, False], ids=["each", "one"])
@pytest.mark.parametrize("arch", SEQUENTIAL)
@pytest.mark.parametrize("name", ALGOS)
def test_every_rule_trains_on_symbols_or_says_why_not(name, arch, sequence):
    wanted = task_of(name)
    task = words(sequence, loss=wanted.loss_name, dtype=torch.float32)
    try:
        rule = build_algo(defaults("algo", name), make(arch, task), task)
    except Refused as refused:
        assert f"algo={name}" in str(refused) and ("block " in str(refused) or "arch=" in str(refused))
        assert arch not in MUST.get(name, ()), str(refused)
        return
    y = torch.randint(0, 4, (4, 6))
    y[:, 0] = MASKED
    two_steps(rule, torch.randint(0, 5, (4, 6)), y if sequence else y[:, 1])


def test_the_ngram_script_on_a_text_whose_answer_is_known(tmp_path):
    """A text that repeats itself every three characters costs an order-3 model almost nothing."""
    file = tmp_path / "abc.txt"
    file.write_text("abcd" * 2000)
    script = Path(__file__).parents[1] / "scripts/ngram.py"
    done = subprocess.run([sys.executable, script, f"dataset.file={file}", "--json"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["test_bits_per_character"] < .05
