"""What stands around machines: blocks that can be undone, ensembles of a block, blocks that learn to be undone, and the page on all of it."""

import re
from pathlib import Path

import pytest
import torch
from conftest import batch, build, defaults, dense, learned, make_task, stepper, train
from sklearn.datasets import load_digits
from test_contracts import IN_SHAPES, small, updates
from torch import nn

from lbp import registry
from lbp.algos.targets import LearningMachine, Local
from lbp.algos.targets.halves import Place
from lbp.algos.targets.inputs import INPUTS
from lbp.algos.targets.theta import THETA
from lbp.archs.ensemble import AGGREGATES, Ensemble, drawn
from lbp.archs.network import Layer
from lbp.archs.reversible import Coupling
from lbp.errors import Refused
from lbp.training.setup import build_algo

PAGE = Path(__file__).parents[1] / "docs/zenkai.md"
HEAD_BY_GRADIENT = {"x": "exact", "blocks": {"head": {"x": "gradient"}}}


def values(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def network(arch, in_shape=(6,), **knobs):
    return small(arch, make_task(in_shape), "bp", **knobs)


# ---- reversible blocks

@pytest.mark.parametrize("norm", ["none", "layer"])
@pytest.mark.parametrize("activation", ["relu", "tanh", "gelu", "sigmoid"])
def test_a_coupling_is_undone_exactly(activation, norm):
    block = Coupling(10, activation, norm).double()
    for x in (values(7, 10), values(3, 5, 10)):      # tokens too
        torch.testing.assert_close(block.inverse(block(x)), x)
        torch.testing.assert_close(block(block.inverse(x)), x)
    first, second = block(x).chunk(2, -1)
    torch.testing.assert_close(first, x[..., :5] + block.f(x[..., 5:]))
    torch.testing.assert_close(second, x[..., 5:] + block.g(first))


def test_exact_targets_come_down_to_where_the_blocks_reach_them():
    net = network("reversible", width=8, depth=3)
    rule = build("machines", net, make_task((6,)), **HEAD_BY_GRADIENT)
    x = net.blocks["stem"](values(5, 6)).detach()
    t = goal = values(5, 8)
    for name in ("couple3", "couple2", "couple1"):
        local = Local(net.blocks[name], x)
        local.aim(t)
        t = rule.x[name].target(local)
    for name in ("couple1", "couple2", "couple3"):
        t = net.blocks[name](t)
    torch.testing.assert_close(t, goal)


def test_machines_with_exact_inverses_learn_in_every_block():
    net = network("reversible", depth=2)
    rule, (x, y) = build("machines", net, make_task((6,)), **HEAD_BY_GRADIENT), batch(make_task((6,)), 16)
    assert {n.split(".")[2] for n, g in updates(rule, x, y)[1].items() if g.any()} == {"stem", "couple1", "couple2", "head"}
    losses = [float(r.loss.mean()) for r in train(rule, [(x, y)] * 150, stepper(rule, "adam", lr=.01))]
    assert losses[-1] < .5 * losses[0]


def test_what_cannot_be_undone_is_refused():
    with pytest.raises(Refused, match=r"arch.width=7.*even"):
        network("reversible", width=7)
    with pytest.raises(Refused, match=r"block head: algo.x=exact needs a block that can be undone"):
        build("machines", network("reversible"), make_task((6,)), x="exact")


# ---- ensembles

class Says(nn.Module):
    """A block with the same answer for every row."""

    def __init__(self, *answer):
        super().__init__()
        self.answer = nn.Parameter(torch.tensor(answer, dtype=torch.float64))

    def forward(self, x):
        return self.answer.expand(len(x), -1)


@pytest.mark.parametrize("aggregate, expected", [
    ("mean", [0., .3, 1.]), ("sign", [1., 1., 1.]), ("vote", [2 / 3, 0., 1 / 3]), ("majority", [1., 0., 0.])])
def test_three_members_and_one_answer(aggregate, expected):
    members = [Says(1., -.5, .9), Says(1., .8, .1), Says(-2., .6, 2.)]      # the third unit has the greatest mean, the first most votes
    for name in {aggregate, f"{aggregate}_ste"} & set(AGGREGATES):
        torch.testing.assert_close(Ensemble(members, name)(values(2, 4)), torch.tensor([expected] * 2, dtype=torch.float64))


def test_the_mean_is_better_than_the_members_by_as_much_as_they_differ():
    """Krogh & Vedelsby 1995: (mean - t)^2 = mean (h_k - t)^2 - mean (h_k - mean)^2."""
    members, x, t = [nn.Linear(6, 3).double() for _ in range(5)], values(9, 6), values(9, 3)
    out, outs = Ensemble(members)(x), torch.stack([m(x) for m in members])
    torch.testing.assert_close((out - t).square(), (outs - t).square().mean(0) - (outs - out).square().mean(0))
    assert ((out - t).square() <= (outs - t).square().mean(0)).all()


def test_straight_through_derivatives_and_none():
    for aggregate in AGGREGATES:
        says = Says(.2, -.3, 2.)
        Ensemble([says, Says(.1, .1, 2.)], aggregate)(values(1, 4))[0, 2].backward()
        if aggregate == "mean":
            expected = [0., 0., .5]
        elif aggregate in ("sign_ste", "sign", "vote", "majority"):
            expected = [0., 0., 0.]                             # sign_ste: its mean lies beyond 1
        else:
            expected = None
        if expected:
            torch.testing.assert_close(says.answer.grad, torch.tensor(expected, dtype=torch.float64), msg=aggregate)
        else:
            p = torch.tensor([.2, -.3, 2.], dtype=torch.float64).softmax(0)
            slope = p[2] * (torch.tensor([0., 0., 1.]) - p) / 2             # of the vote, a softmax, in the mean of two
            assert torch.allclose(says.answer.grad, slope) == (aggregate == "vote_ste") and says.answer.grad.any()
    says = Says(.2, -.3, 2.)
    Ensemble([says, Says(.1, .1, 2.)], "sign_ste")(values(1, 4)).sum().backward()
    assert says.answer.grad.tolist() == [.5, .5, 0.]


def test_each_member_learns_from_rows_of_its_own():
    members, x, g = [nn.Linear(6, 3).double() for _ in range(2)], values(9, 6), values(9, 3)
    whole, resampled = Ensemble(members), Ensemble(members, bootstrap=True)
    expected = whole(x)
    torch.manual_seed(5)
    out = resampled(x)
    assert torch.equal(out, expected)
    (out * g).sum().backward()
    torch.manual_seed(5)
    counts = [drawn(m(x)) for m in members]
    assert not torch.equal(*counts)
    for member, times in zip(members, counts):
        torch.testing.assert_close(member.weight.grad, (times * g / 2).T @ x)
        torch.testing.assert_close(member.bias.grad, (times * g / 2).sum(0))
    state = torch.get_rng_state()
    assert torch.equal(resampled.eval()(x), expected)
    with torch.no_grad():
        resampled.train()(x)
    assert torch.equal(state, torch.get_rng_state())        # no draw where nothing is learned


def test_rows_are_drawn_with_replacement():
    """Multinomial: N in all, 1 on average with variance 1 - 1/N; a row is left out with (1 - 1/N)^N."""
    counts = torch.cat([drawn(values(10, 2)) for _ in range(3000)], 1)
    assert counts.shape == (10, 3000) and (counts.sum(0) == 10).all()
    assert counts.var().item() == pytest.approx(.9, abs=.03) and (counts == 0).double().mean().item() == pytest.approx(.9**10, abs=.01)
    assert drawn(values(4, 3, 2, 2)).shape == (4, 1, 1, 1)


@pytest.mark.parametrize("knobs", [{}, {"bootstrap": True}, {"aggregate": "sign_ste"}, {"norm": "batch"}, {"dropout": .2}], ids=str)
@pytest.mark.parametrize("algo", ["bp", "fa", "dfa", "local", "machines"])
def test_rules_train_every_member(algo, knobs):
    net, task = network("ensemble", **knobs), make_task((6,))
    rule, (x, y) = build(algo, net, task), batch(task, 16)
    before = {n: p.detach().clone() for n, p in net.named_parameters()}
    losses = [float(r.loss.mean()) for r in train(rule, [(x, y)] * 60, stepper(rule, "adam", lr=.02))]
    assert losses[-1] < losses[0]
    still = [n for n, p in net.named_parameters() if torch.equal(p, before[n])]
    assert not [n for n in still if "bias" not in n or "norm" not in knobs], still      # a bias before batch norm has no effect


@pytest.mark.parametrize("arch", ["ensemble", "reversible"])
@pytest.mark.parametrize("algo", ["bp", "dfa", "local", "machines"])
def test_parts_of_a_batch_add_up(arch, algo):
    """So that two ranks are one."""
    rule, (x, y) = build(algo, network(arch), make_task((6,))), batch(make_task((6,)), 16)
    whole, a, b = (updates(rule, x[rows], y[rows])[1] for rows in (slice(16), slice(6), slice(6, 16)))
    for n in whole:
        torch.testing.assert_close(a[n] + b[n], whole[n], rtol=1e-9, atol=1e-12)


def test_bagged_networks_answer_better_together_than_one_by_one():
    """Breiman 1996, on digits."""
    x, y = (torch.as_tensor(a) for a in load_digits(return_X_y=True))
    x, train_, test = x.double() / 16, slice(0, 300), slice(300, None)
    members = [nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10)).double() for _ in range(7)]
    optimizer = torch.optim.Adam([p for m in members for p in m.parameters()], 3e-2)
    counts = [drawn(x[train_])[:, 0] for _ in members]
    for _ in range(60):
        optimizer.zero_grad()
        sum((times * nn.functional.cross_entropy(m(x[train_]), y[train_], reduction="none")).mean() for m, times in zip(members, counts)).backward()
        optimizer.step()

    def accuracy(block):
        return float((block(x[test]).argmax(1) == y[test]).double().mean())

    alone = sum(map(accuracy, members)) / len(members)
    assert accuracy(Ensemble(members)) > alone + .01 and accuracy(Ensemble(members, "vote")) > alone + .01


def test_what_has_no_derivative_is_refused_or_searched():
    with pytest.raises(Refused, match=r"algo=dfa needs the derivatives.*block fc1 has Sign.*arch.aggregate=.._ste"):
        build_algo(defaults("algo", "dfa"), network("ensemble", aggregate="sign"), make_task((6,)))
    with pytest.raises(Refused, match=r"arch.aggregate=sign of members that are never below 0.*arch.activation=tanh"):
        network("ensemble", aggregate="sign", activation="relu")
    with pytest.raises(ValueError, match="mean, sign"):
        Ensemble([nn.Linear(2, 2)], "median")
    net, task = network("ensemble", aggregate="sign"), make_task((6,))
    rule, (x, y) = build("machines", net, task, theta={"name": "es", "std": .3}, x={"name": "hill_climb", "std": 1.}), batch(task, 16)
    losses = [float(r.loss.mean()) for r in train(rule, [(x, y)] * 30, stepper(rule, "adam", lr=.05))]
    assert min(losses[-5:]) < .8 * losses[0]
    assert all(g.isfinite().all() for g in learned(build("es", net, task), x, y)[1].values())


# ---- autoencoding blocks

def autoencode(block, below, above, **knobs):
    kind = THETA["autoencode"]
    return kind(Place(block, below, above), **{k: knob.default for k, knob in kind.knobs.items()} | knobs).double()


def test_the_gradient_is_that_of_both_losses():
    block, x, t = Layer(nn.Linear(6, 4), None, nn.Tanh()).double(), values(9, 6), values(9, 4)
    half, local = autoencode(block, (6,), (4,), weight=.3), Local(block, x)
    local.aim(t)
    logged = half.step(local, None)
    parameters = [*block.parameters(), *half.decoder.parameters()]
    found = [p.grad for p in parameters]
    h = block(x)
    missing = (x - half.decoder(h)).square().sum()
    expected = torch.autograd.grad((h - t).square().sum() / 2 + .3 * missing / 2, parameters)
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(logged["reconstruction_error"], (missing / x.square().sum()).detach())


@pytest.mark.parametrize("arch, knobs", [("mlp", {}), ("cnn", {"norm": "batch"}), ("vit", {}), ("reversible", {}), ("ensemble", {})], ids=str)
def test_blocks_learn_their_task_and_to_be_undone(arch, knobs):
    task = make_task(IN_SHAPES.get(arch, (3, 16, 16)))
    net = small(arch, task, "machines", **knobs)
    rule, (x, y) = build("machines", net, task, theta="autoencode"), batch(task, 8)
    groups = rule.groups()
    assert {id(p) for half in rule.theta.values() for p in half.decoder.parameters()} == {id(p) for p in groups["feedback"]}
    results = train(rule, [(x, y)] * 60, stepper(rule, "adam", lr=.005))
    first, last = results[0], results[-1]
    assert last.loss.mean() < first.loss.mean() and set(last.blocks) == set(net.blocks)
    for name in net.blocks:
        assert last.blocks[name]["reconstruction_error"] < first.blocks[name]["reconstruction_error"], name


def test_more_weight_leaves_less_unrebuilt():
    def error(weight):
        torch.manual_seed(1)
        net = dense((6, 5))
        rule, (x, y) = build("machines", net, make_task((6,)), blocks={"fc1": {"theta": {"name": "autoencode", "weight": weight}}}), batch(make_task((6,)), 32)
        return train(rule, [(x, y)] * 150, stepper(rule, "adam", lr=.01))[-1].blocks["fc1"]["reconstruction_error"]

    assert error(10.) < .8 * error(1e-3)


@pytest.mark.parametrize("mode", ["accumulate", "step", "step_first"])
def test_an_autoencoding_machine_in_a_graph(mode):
    machine = LearningMachine(nn.Linear(6, 6).double(), "autoencode", mode=mode, optimizer=lambda ps: torch.optim.Adam(ps, .02))
    optimizer, x, t = torch.optim.Adam(machine.parameters(), .02), values(20, 6), values(20, 6)
    machine.theta.double()

    def rebuilt():
        return float((machine.theta.decoder(machine.block(x)) - x).square().mean().detach())

    before, far = rebuilt(), float((machine.block(x) - t).square().sum().detach())
    for _ in range(100):
        ((machine(x) - t).square().sum() / 2).backward()
        if mode == "accumulate":
            optimizer.step()
            optimizer.zero_grad()
        else:
            assert all(p.grad is None for p in machine.parameters())
    assert rebuilt() < .6 * before and float((machine.block(x) - t).square().sum().detach()) < far


def test_a_machine_that_does_not_know_its_input_is_refused():
    with pytest.raises(Refused, match="in_shape="):
        LearningMachine(nn.Sequential(nn.Conv2d(1, 2, 3)), "autoencode")


# ---- the page

def test_what_the_page_names_is_there():
    text = PAGE.read_text()
    root = PAGE.parents[1]
    for path in set(re.findall(r"`((?:lbp|docs|conf)/[\w/.]+)`", text)):
        assert (root / path).exists(), path
    for kind, option in set(re.findall(r"\b(algo|arch|dataset)=(\w+)", text)):
        assert option in registry.options(kind), (kind, option)
    for module, names in re.findall(r"`(lbp(?:\.\w+)+): ([\w, ]+)`", text):
        found = __import__(module, fromlist=["_"])
        assert all(hasattr(found, name) for name in names.split(", ")), (module, names)
    for which, names in re.findall(r"`algo\.(theta|x)=(\w+)`", text):
        assert names in (THETA if which == "theta" else INPUTS), names
    assert 1 <= len(re.findall(r"\| left out", text)) <= 5


def test_the_example_of_the_page_comes_nearer(capsys):
    exec(compile(re.search(r"```python\n(.*?)```", PAGE.read_text(), re.S)[1], str(PAGE), "exec"), {})
    before, after = (float(n) for n in capsys.readouterr().out.split(" -> "))
    assert after < before
