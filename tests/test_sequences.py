"""Sequences: recurrent blocks and the causal transformer, the generated sets and text, their metrics, and which rules train on them."""

import hashlib
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ALGOS, PATIENCE, Log, changed, configuration, defaults, learned, stepper, task_of, tensors, train
from test_contracts import two_steps
from test_oracles import assert_same
from torch import nn

from lbp import cli, registry
from lbp.archs.rnn import Recurrent
from lbp.datasets.data import COMMON, Arrays, load
from lbp.datasets.task import MASKED, Task
from lbp.errors import ConfigError, DataError, Refused
from lbp.launch.one import result_lines
from lbp.logs.console import Console
from lbp.logs.live import View, flow
from lbp.logs.wandb import flat
from lbp.report.compare import SMALL_IS_GOOD
from lbp.training import loop
from lbp.training.results import evaluate
from lbp.training.setup import build, build_algo, build_arch, refuse_early

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

MUST = {name: set(SEQUENTIAL) for name in ("bp", "fa", "dfa", "dkp", "kp", "wm", "usf", "frsf", "brsf", "local", "mono_forward", "greedy", "dgl",
                                           "ddtp_linear", "machines", "mixed", "dni", "cdni", "es", "genetic", "elm", "shallow")}
MUST |= {name: set(CELLS) for name in ("drtp", "sdfa")}      # of images by rows: vectors of symbols have no bounds
# What a sample asks for: an answer at each token (copy, text), one (argmax), a number (adding), one of an image by rows.
ASKED = {"each": lambda loss, dtype: words(True, 5, loss, dtype), "one": lambda loss, dtype: words(False, 5, loss, dtype),
         "real": lambda loss, dtype: Task("regression", (5,), 1, None, "mse", 0.0, dtype, symbols=5),
         "rows": lambda loss, dtype: Task("classification", (1, 5, 6), 4, 4, loss, 0.0, dtype)}


def asked(kind, loss="cross_entropy", dtype=torch.float64, n=4):
    """(task, x, y); where each token is asked, the first two are masked."""
    task = ASKED[kind](loss, dtype)
    x = torch.randint(0, 5, (n, 5)) if task.symbols else torch.randn(n, *task.in_shape, dtype=dtype)
    y = torch.randn(n, 1, dtype=dtype) if kind == "real" else torch.randint(0, 4, (n, 5) if kind == "each" else (n,))
    if kind == "each":
        y[:, :2] = MASKED
    return task, x, y


def network_for(arch, task):
    return make(arch, task, **{} if task.symbols or arch == "transformer" else {"embedding": None})


def follow(said, name, arch, task):
    """Builds what a refusal says to use in place of the rule, or of the arch: of each, what it names."""
    remedy = said.rpartition("use ")[2]
    algos, archs, knobs = (re.findall(rf"{group}=(\w+)", remedy) for group in ("algo", "arch", r"arch\.\w+"))
    assert algos or archs, said
    for other in algos:
        build_algo(defaults("algo", other), network_for(arch, task), task)
    for other in archs:
        settings = dict(zip(re.findall(r"arch\.(\w+)=", remedy), knobs))
        build_algo(defaults("algo", name), build_arch(defaults("arch", other) | settings, task).to(task.dtype), task)


@pytest.mark.parametrize("kind", ASKED)
@pytest.mark.parametrize("arch", SEQUENTIAL)
@pytest.mark.parametrize("name", ALGOS)
def test_every_rule_trains_on_sequences_or_says_why_not_and_what_does(name, arch, kind):
    task, x, y = asked(kind, task_of(name).loss_name, torch.float32)
    try:
        rule = build_algo(defaults("algo", name), network_for(arch, task), task)
    except Refused as refused:
        said = str(refused)
        assert f"algo={name}" in said and ("block " in said or "arch=" in said or "regression" in said)
        assert arch not in MUST.get(name, ()) or name in ("drtp", "sdfa") and kind != "rows", said
        follow(said, name, arch, task)
        return
    two_steps(rule, x, y)
    two_steps(build_algo(defaults("algo", name), network_for(arch, task), task), x, y, bf16=True)


def test_refusals_of_rules_on_symbols():
    task = words(False)
    for knobs, says in (({"name": "sigprop", "signal": "label"}, "algo.signal=label.*block embed.*algo.signal=both"),
                        ({"name": "dni", "inputs": True}, "algo=dni with algo.inputs=true.*symbols.*algo.inputs=false"),
                        ({"name": "machines", "theta": "autoencode"}, "block embed: algo.theta=autoencode rebuilds numbers.*symbols")):
        with pytest.raises(Refused, match=says):
            build_algo(defaults("algo", knobs["name"]) | knobs, make("lstm", task), task)
    for arch in ("cnn", "lenet", "vit", "resnet20", "vgg8b", "torchvision", "mlp", "reversible", "ensemble"):
        with pytest.raises(Refused, match=rf"arch={arch.rstrip('0123456789b')}.* use arch=rnn, arch=lstm, arch=gru or arch=transformer$"):
            build_arch(defaults("arch", arch), task)
    # Before any data is read it is not known whether they are symbols: what is said then is true of both.
    with pytest.raises(Refused, match="algo=dtp .*block rnn1.* use algo=dfa or algo=local, which train any arch$"):
        refuse_early({"algo": defaults("algo", "dtp"), "arch": defaults("arch", "lstm"), "dataset": {}})
    with pytest.raises(Refused, match="algo=dtp .*use arch=mlp$"):
        refuse_early({"algo": defaults("algo", "dtp"), "arch": defaults("arch", "resnet20"), "dataset": {}})
    refuse_early({"algo": defaults("algo", "dni") | {"cuts": ["embed"]}, "arch": defaults("arch", "lstm"), "dataset": {}})    # of symbols alone


@pytest.mark.parametrize("typed, code, says", [
    (["arch=mlp", "dataset=copy"], 2, "use arch=rnn"), (["arch=lstm", "dataset=iris"], 2, "use arch=mlp"),
    (["arch=lstm", "dataset=copy", "algo=ccl"], 2, "use algo=dfa"),
    (["arch=lstm", "dataset=copy", "dataset.normalize=standard"], 2, "dataset.normalize=standard"),
    (["arch=lstm", "dataset=text", "dataset.file=/nonexistent"], 3, "/nonexistent")], ids=str)
def test_what_cannot_be_is_told_before_anything_is_written(typed, code, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", *typed]) == code
    assert says in capsys.readouterr().err and not list(tmp_path.iterdir())


def backprop_of(network, task, x, y):
    task.loss(network(x), y).sum().backward()
    found = {f"network.{name}": p.grad for name, p in network.named_parameters()}
    network.zero_grad()
    return found


@pytest.mark.parametrize("kind", ASKED)
@pytest.mark.parametrize("arch", ["lstm", "gru", "transformer"])
@pytest.mark.parametrize("name", ["fa", "kp", "wm", "frsf", "machines"])
def test_feedback_by_the_weights_is_backprop(name, arch, kind):
    """Of every parameter: embeddings, both matrices of each recurrent layer through all steps, and attention's."""
    task, x, y = asked(kind)
    network = network_for(arch, task)
    rule = build_algo(defaults("algo", name) | ({"decay": 0.0} if name == "kp" else {}), network, task)
    if name != "machines":      # whose way down is the transposed weights themselves
        pairs = zip(rule.sites.values(), rule.backward_weights) if name == "kp" else rule.pairs().values()
        with torch.no_grad():
            for weight, b in pairs:
                b.copy_(weight)
            if name == "frsf":  # of which B is made, by the weights' signs
                for site, weight in rule.sites.items():
                    getattr(rule, site.replace(".", "_")).copy_(weight.abs())
        for part in ("input", "recurrent") if arch != "transformer" else ("query",):
            assert any(f".{part}." in site for site in rule.sites)
    expected = backprop_of(network, task, x, y)
    found = {n: g for n, g in learned(rule, x, y)[1].items() if n.startswith("network.")}
    assert_same(found, expected)


@pytest.mark.parametrize("kind", ["each", "one"])
@pytest.mark.parametrize("name", ["dfa", "dkp", "ddtp_linear"])
def test_direct_feedback_reaches_each_token_by_one_matrix(name, kind):
    """The signal at a token is that token's own error through B, and nothing where the token is masked; a recurrent block carries it
    back through its own steps. Where one answer is asked, the tokens of blocks below have columns of B of their own."""
    task, x, y = asked(kind)
    network = make("lstm", task)
    rule = build_algo(defaults("algo", name) | ({"feedback_steps": 0} if name == "ddtp_linear" else {}), network, task)
    found = learned(rule, x, y)[1]
    error = task.error(network(x), y)
    assert kind == "one" or not error[:, :2].any()
    h = x
    for block, module in network.hidden.items():
        matrix = rule.matrix(block) if name == "dfa" else rule.matrices[block]
        out = module(h)
        assert matrix.shape == (4, out[0].numel() if kind == "one" else out.shape[-1])
        signal = torch.stack([torch.stack([e @ matrix for e in row]) if kind == "each" else (row @ matrix).view(out.shape[1:]) for row in error])
        expected = torch.autograd.grad(out, list(module.parameters()), signal.detach())
        h = out.detach()
        for (parameter, _), g in zip(module.named_parameters(), expected, strict=True):
            torch.testing.assert_close(found[f"network.blocks.{block}.{parameter}"], g, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", ["each", "one"])
@pytest.mark.parametrize("arch", ["lstm", "transformer"])
@pytest.mark.parametrize("name", ["local", "mono_forward", "dgl"])
def test_local_losses_answer_each_token_and_cross_no_block(name, arch, kind):
    """Each block's gradient is that of its own classifier's loss over the tokens that count, whatever stands above."""
    task, x, y = asked(kind)
    network = make(arch, task)
    rule = build_algo(defaults("algo", name), network, task)
    result, found = learned(rule, x, y)
    h = x
    for block, module in network.hidden.items():
        out = module(h)
        answer = rule.heads[block](out)
        assert answer.shape == ((4, 5, 4) if kind == "each" else (4, 4))
        loss = nn.functional.cross_entropy(answer.flatten(0, -2), y.flatten(), ignore_index=MASKED, reduction="sum")
        for (parameter, p), g in zip(module.named_parameters(), torch.autograd.grad(loss, list(module.parameters()), retain_graph=True)):
            torch.testing.assert_close(found[f"network.blocks.{block}.{parameter}"], g, rtol=1e-9, atol=1e-12)
        assert result.blocks[block]["local_loss"].item() == pytest.approx(float(loss.detach()) / task.count(y))
        h = out.detach()


LEARNERS = [name for name in ALGOS if not registry.entry("algo", registry.option("algo", name).name).facts.get("closed_form")]


@pytest.mark.parametrize("kind", ["each", "one"])
@pytest.mark.parametrize("name", LEARNERS)
def test_all_that_a_rule_says_it_trains_learns(name, kind):
    """The embedding, both recurrent matrices of all layers, heads and feedback: none is left where it was, or out of the batch."""
    task, x, y = asked(kind, task_of(name).loss_name, n=16)
    try:
        rule = build_algo(defaults("algo", name), make("lstm", task), task)
    except Refused:
        pytest.skip("refused, as another test says")
    names = {id(p): n for n, p in rule.named_parameters()}
    grouped = {names[id(p)] for parameters in rule.groups().values() for p in parameters}
    before = tensors(rule)
    train(rule, [(x, y)] * 6, stepper(rule, lr=.1))     # synthesizers begin at 0: what they say sinks a block a step
    assert grouped <= changed(before, rule)
    # A rule that moves a hidden block moves all of them, but for what its own page calls frozen.
    moved = {n.split(".")[2] for n in changed(before, rule) if n.startswith("network.blocks.")} - {"head"}
    assert moved in (set(), set(rule.network.hidden))


# ---- what a user sees

def small_run(tmp_path, **overrides):
    values = configuration("bp", "lstm", arch__width=6, metrics__every=1, **overrides)
    values["dataset"] = defaults("dataset", "copy") | {"name": "copy", "n": 40, "n_test": 10}
    experiment, log = build(values), Log()
    return experiment, log, loop.train(experiment, log, tmp_path)


@pytest.mark.parametrize("each_epoch", [True, False])
def test_all_that_the_task_tells_is_in_each_record(each_epoch, tmp_path, capsys):
    experiment, log, summary = small_run(tmp_path, metrics__test=each_epoch)
    told = experiment.data.task.metrics
    assert told == ("accuracy", "sequence_accuracy", "bits_per_character")
    assert {record["split"] for record in log} >= {"train", "train_epoch", "val", "test"}
    for record in log:
        assert {"loss", *told} <= set(record), record["split"]
        assert {f"{name}/{record['split']}" for name in told} <= set(flat(record))
    for split in ("train", "val", "test"):
        assert {f"{split}_{name}" for name in told} <= set(summary)
    assert summary["test_bits_per_character"] == pytest.approx(summary["test_loss"] / math.log(2))
    line, _ = result_lines(summary, told, tmp_path)
    console = Console(tmp_path / "log.txt", 1, told, True, "auto")
    view = View(1, told)
    for record in log:
        console.write(record)
        view.write(record)
    console.close("done", summary)
    epoch = capsys.readouterr().out
    for name in told[1:]:
        assert f"{name} {summary[f'test_{name}']:.4f}" in line and epoch.count(f" {name} {summary[f'val_{name}']:.4f}") == 1
    rows = [row.plain for row in flow(view._results(), 79)]
    assert all(len(row) < 80 for row in rows)
    assert all(f"{split:<5} {name} {summary[f'{split}_{name}']:.4f}" in "\n".join(rows) for split in ("val", "test") for name in told[1:])
    assert SMALL_IS_GOOD.search("test_bits_per_character") and not SMALL_IS_GOOD.search("test_sequence_accuracy")


def test_regression_tells_its_own_metric_alone():
    assert ASKED["real"]("mse", torch.float32).metrics == ("r2",)
    assert words(loss="mse").metrics == ("accuracy", "sequence_accuracy")      # bits are of the cross entropy


@pytest.mark.parametrize("arch", SEQUENTIAL)
def test_a_trained_network_is_exported_for_any_batch(arch):
    task, x, _ = asked("each", dtype=torch.float32)
    network = make(arch, task).eval()
    program = torch.export.export(network, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},)).module()
    more = torch.randint(0, 5, (7, 5))
    torch.testing.assert_close(program(more), network(more))


def test_the_ngram_script_on_a_text_whose_answer_is_known(tmp_path):
    """A text that repeats itself every three characters costs an order-3 model almost nothing."""
    file = tmp_path / "abc.txt"
    file.write_text("abcd" * 2000)
    script = Path(__file__).parents[1] / "scripts/ngram.py"
    done = subprocess.run([sys.executable, script, f"dataset.file={file}", "--json"], capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["test_bits_per_character"] < .05
