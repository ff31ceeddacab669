"""What holds for every rule by being registered, and for every rule on every arch."""

import io

import pytest
import torch
from conftest import (ALGOS, ARCHS, CLASSES, RECURRENT, Log, arrays, batch, build, changed, configuration, defaults, dense, learned, make_task, prefers,
                      regression, solves, step, stepper, task_of, tensors, train, unrolled)
from torch import nn

from lbp import registry
from lbp.algos.rule import GROUPS, Facts, LearningRule, Rng
from lbp.archs.init import KINDS
from lbp.archs.network import ACTIVATIONS, Network
from lbp.errors import Diverged, Refused
from lbp.metrics.measure import Measure
from lbp.training import loop
from lbp.training.setup import build as build_experiment
from lbp.training.setup import build_algo, build_arch

LEARNERS = [name for name in ALGOS if not registry.entry("algo", registry.option("algo", name).name).facts.get("closed_form")]
SIZES = (6, 16, 12, 8)


def plain(name, **more):
    """Dense layers of the activation that the rule prefers, else of relu; recurrent ones for a rule that takes no others."""
    if name in RECURRENT:
        return unrolled(**more)
    return dense(SIZES, activation=ACTIVATIONS[prefers(name).get("arch.activation", "relu")], **more)


def ready(name, network=None, **knobs):
    """(rule, x, y) on a dense network."""
    network = network or plain(name)
    task = task_of(name, network.in_shape)
    return build(name, network, task, **knobs), *batch(task, 16)


def updates(rule, x, y):
    """As `learned`, with what the rule writes in place taken back."""
    before = tensors(rule)
    result = learned(rule, x, y)
    with torch.no_grad():
        for n, t in (*rule.named_parameters(), *rule.named_buffers()):
            t.copy_(before[n])
    return result


def hidden_updates(rule, x, y):
    """What a batch would do to the hidden blocks, by parameter name."""
    return {n: g for n, g in updates(rule, x, y)[1].items() if n.startswith("network.") and ".head." not in n}


def draws_again(rule):
    """A function that sets the rule's noise, and torch's, back to where they are now."""
    states = [(m, m.get_extra_state()) for m in rule.modules() if isinstance(m, Rng)]

    def again():
        torch.manual_seed(11)
        for m, state in states:
            m.set_extra_state(state)

    return again


# ---- groups and gradients

@pytest.mark.parametrize("name", ALGOS)
def test_groups_are_named_and_disjoint(name):
    rule, x, y = ready(name)
    groups = rule.groups()
    assert set(groups) <= set(GROUPS)
    listed = [id(p) for parameters in groups.values() for p in parameters]
    assert len(listed) == len(set(listed)) and set(listed) <= {id(p) for p in rule.parameters()}


@pytest.mark.parametrize("name", ALGOS)
def test_only_grouped_parameters_move_and_nothing_keeps_a_gradient(name):
    rule, x, y = ready(name)
    grouped = {id(p) for parameters in rule.groups().values() for p in parameters}
    names = {n: id(p) in grouped for n, p in rule.named_parameters()}
    before = tensors(rule)
    train(rule, [(x, y)] * 2)
    assert all(p.grad is None for p in rule.parameters())
    moved = changed(before, rule)
    assert moved     # something was learned
    if not rule.facts.in_place:
        assert all(names[n] for n in moved)
    assert all(t.isfinite().all() for t in tensors(rule).values())


@pytest.mark.parametrize("name", LEARNERS)
def test_every_update_is_finite_and_covers_what_the_rule_trains(name):
    rule, x, y = ready(name)
    result, found = learned(rule, x, y)
    assert all(g.isfinite().all() for g in found.values())
    grouped = {id(p) for parameters in rule.groups().values() for p in parameters}
    assert {n for n, p in rule.named_parameters() if id(p) in grouped} == set(found)
    assert not result.loss.requires_grad and result.loss.isfinite().all() and result.loss.numel() in (1, len(x))
    if result.out is not None:
        assert not result.out.requires_grad and result.out.shape == (len(x), CLASSES)
    assert set(result.blocks) <= set(rule.network.blocks)
    assert all(v.dim() == 0 and not v.requires_grad for values in result.blocks.values() for v in values.values())


@pytest.mark.parametrize("name", ALGOS)
def test_prediction_of_one_sample_without_gradients(name):
    rule, x, y = ready(name)
    rule.eval()
    with torch.no_grad():
        alone, together = rule.predict(x[:1]), rule.predict(x)
    assert alone.shape == (1, CLASSES) and together.shape == (len(x), CLASSES)
    torch.testing.assert_close(alone, together[:1])


@pytest.mark.parametrize("name", ALGOS)
def test_the_network_keeps_its_keys_under_every_rule(name):
    network = plain(name)
    keys = {f"network.{key}" for key in network.state_dict()}
    rule, *_ = ready(name, network)
    assert {key for key in rule.state_dict() if key.startswith("network.")} == keys


@pytest.mark.parametrize("name", ALGOS)
def test_feedback_pairs_are_of_one_shape_and_belong_to_blocks(name):
    rule, *_ = ready(name)
    for block, (w, b) in rule.feedback().items():
        assert block in rule.network.blocks and w.shape == b.shape


# ---- reproducibility

def run(name, optimizer="adam"):
    torch.manual_seed(3)
    try:
        rule, x, y = ready(name, plain(name, dropout=.2))
    except Refused:
        rule, x, y = ready(name)
    results = train(rule, list(zip(x.split(4), y.split(4))), stepper(rule, optimizer))
    return tensors(rule), [r.loss for r in results]


@pytest.mark.parametrize("name", ALGOS)
def test_the_same_seed_gives_the_same_numbers(name):
    (first, losses), (second, again) = run(name), run(name)
    assert all(torch.equal(first[n], second[n]) for n in first)
    assert all(torch.equal(a, b) for a, b in zip(losses, again, strict=True))


@pytest.mark.parametrize("name", ALGOS)
def test_a_loaded_rule_continues_as_if_never_stopped(name):
    """The state goes through a file, read with weights_only, into a rule that began elsewhere; its noise goes on too."""
    torch.manual_seed(3)
    rule, x, y = ready(name)
    batches = list(zip(x.split(4), y.split(4)))
    train(rule, batches[:2])
    file = io.BytesIO()
    torch.save(rule.state_dict(), file)
    file.seek(0)
    torch.manual_seed(99)
    other, *_ = ready(name)
    assert changed(tensors(rule), other)
    other.load_state_dict(torch.load(file, weights_only=True))
    torch.manual_seed(5)
    train(rule, batches[2:])
    torch.manual_seed(5)
    train(other, batches[2:])
    assert not changed(tensors(rule), other)


# ---- the sum convention

class GlobalNoise(nn.Module):
    """In place of a rule's Rng: call by call it draws for the whole batch of `total` rows and gives those from `start` on."""

    def __init__(self, total, start=0):
        super().__init__()
        self.total, self.start, self.calls = total, start, 0

    def _rows(self, like, draw):
        self.calls += 1
        rng = torch.Generator().manual_seed(self.calls)
        return draw((self.total, *like.shape[1:]), rng)[self.start : self.start + len(like)]

    def normal(self, like):
        return self._rows(like, lambda shape, rng: torch.randn(shape, generator=rng, dtype=like.dtype))

    def integers(self, high, like):
        return self._rows(like, lambda shape, rng: torch.randint(high, shape, generator=rng))

    @property
    def generator(self):
        """For what is no noise of samples: the same on every rank."""
        self.calls += 1
        return torch.Generator().manual_seed(self.calls)


@pytest.mark.parametrize("name", LEARNERS)
def test_two_half_batches_add_up_to_the_whole(name):
    """Noise is drawn for the whole batch and cut; nothing is stepped between."""
    rule, x, y = ready(name, None if name in RECURRENT else dense())
    if rule.facts.batch_coupled:
        pytest.skip("batch_coupled: its facts say that small batches change the result")

    def over(start, stop):
        for module in list(rule.modules()):
            for child, value in module.named_children():
                if isinstance(value, (Rng, GlobalNoise)):
                    setattr(module, child, GlobalNoise(len(x), start))
        result, found = updates(rule, x[start:stop], y[start:stop])
        return result.loss.sum(), found

    (loss, whole), (low, a), (high, b) = over(0, 16), over(0, 6), over(6, 16)
    torch.testing.assert_close(low + high, loss, rtol=1e-10, atol=1e-12)
    assert set(whole) == set(a) == set(b)
    for n in whole:
        torch.testing.assert_close(a[n] + b[n], whole[n], rtol=1e-10, atol=1e-12)


# ---- batches that are not finite

def poisoned(rule, x, y, bad):
    """Each phase learns a good batch, then one with `bad` in it, which must raise; yields the tensors from before that."""
    apply, spoiled = stepper(rule, "sgd", momentum=.9, lr=.01), x.clone()
    spoiled[3, -1] = bad
    for phase in rule.phases():
        rule.train()
        if not phase.fit:
            step(rule, apply, x, y, phase.learn)
        before = tensors(rule)
        with pytest.raises(Diverged):
            phase.fit(lambda rows: iter([(x, y), (spoiled, y)])) if phase.fit else step(rule, apply, spoiled, y, phase.learn)
        yield before


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ALGOS)
def test_a_batch_that_is_not_finite_raises_and_moves_nothing(name, bad):
    rule, x, y = ready(name)
    for before in poisoned(rule, x, y, bad):
        assert not changed(before, rule)
        assert all(p.grad is None for p in rule.parameters())


@pytest.mark.parametrize("name", ALGOS)
def test_a_real_target_that_is_not_finite_reaches_no_forward_weight(name):
    network = plain(name, outputs=2)
    task = regression(network.in_shape)
    try:
        rule = build(name, network, task)
    except Refused:
        pytest.skip(f"{name} takes no real targets")
    x, y = batch(task)
    y[2, 0] = torch.nan
    before = tensors(network)
    with pytest.raises(Diverged):
        train(rule, [(x, y)])
    assert not changed(before, network) and all(t.isfinite().all() for t in tensors(rule).values())


# ---- facts

@pytest.mark.parametrize("name", ALGOS)
def test_facts_are_read_as_the_class_has_them(name):
    entry = registry.entry("algo", registry.option("algo", name).name)
    rule, *_ = ready(name)
    assert isinstance(rule, LearningRule) and Facts(**entry.facts) == rule.facts
    assert rule.facts.closed_form == solves(rule)
    assert rule.facts.optimized == any(rule.groups().values())


def above(rule, block, head):
    """Parameters and buffers whose names mention a block above `block` (the head only if asked)."""
    blocks = list(rule.network.blocks)
    later = blocks[blocks.index(block) + 1 :]
    later = later if head else later[:-1]
    state = dict((*rule.named_parameters(), *rule.named_buffers()))
    return [t for n, t in state.items() if any(part in n.replace("_", ".").split(".") for part in later)]


def changes_with(rule, x, y, tensors_above):
    """Whether the first hidden block's update is another one after these tensors were redrawn."""
    again = draws_again(rule)
    again()
    before = {n: g for n, g in hidden_updates(rule, x, y).items() if ".fc1." in n}
    assert before
    with torch.no_grad():
        for t in tensors_above:
            t.copy_(torch.randn_like(t))
    again()
    after = hidden_updates(rule, x, y)
    return any(not torch.equal(after[n], g) for n, g in before.items())


class FixedError:
    """A task with the same error at the output whatever the output is: a linear loss."""

    def __init__(self, task, error):
        self.task, self.fixed = task, error

    def __getattr__(self, name):
        return getattr(self.task, name)

    def loss(self, out, y):
        return (out * self.fixed).sum(-1)

    def error(self, out, y):
        return self.fixed.clone()


def give(rule, task):
    """The task for a rule, and for the rules that it is made of."""
    for module in rule.modules():
        if isinstance(module, LearningRule):
            module.task = task


@pytest.mark.parametrize("name", LEARNERS)
def test_backward_locked(name):
    """Under one error at the output, what stands in the hidden blocks above reaches a block's update just if it is locked."""
    rule, x, y = ready(name)
    if rule.facts.family == "search":
        pytest.skip("told of the whole network's loss, which changes with every weight, though nothing comes down")
    give(rule, FixedError(rule.task, torch.randn(len(x), CLASSES, dtype=torch.float64)))
    if not hidden_updates(rule, x, y):
        pytest.skip(f"{name} teaches no hidden block")
    assert changes_with(rule, x, y, above(rule, "fc1", head=False)) == rule.facts.backward_locked


@pytest.mark.parametrize("name", LEARNERS)
def test_update_locked(name):
    """A block that waits for the whole forward pass is told of the output; others learn the same whatever comes above."""
    rule, x, y = ready(name)
    if not hidden_updates(rule, x, y):
        pytest.skip(f"{name} teaches no hidden block")
    give(rule, make_task(rule.network.in_shape, loss="mse"))    # the signs of other losses' errors are known from the label
    assert changes_with(rule, x, y, above(rule, "fc1", head=True)) == rule.facts.update_locked


UNLOCKED = [name for name in LEARNERS if not registry.entry("algo", registry.option("algo", name).name).facts["update_locked"]]


@pytest.mark.parametrize("unlocked", UNLOCKED)
def test_blocks_that_wait_for_nothing_learn_before_the_next_one_runs(unlocked):
    """The order of events: when a block first sees a batch, the block below has learned from it. (The joint schedule, which is faster
    where memory is no matter, leaves that aside: the same updates, all at the end.)"""
    streaming = {"schedule": "streaming"} if "schedule" in defaults("algo", unlocked) else {}
    rule, x, y = ready(unlocked, **streaming)
    blocks, start, met, taught = rule.network.blocks, tensors(rule), {}, False

    def has_learned(block):
        return any(p.grad is not None or not torch.equal(p, start[f"network.blocks.{block}.{n}"]) for n, p in blocks[block].named_parameters())

    def note(below):
        def first_run(module, args):
            met.setdefault(below, has_learned(below))
        return first_run

    if not hidden_updates(rule, x, y):
        pytest.skip(f"{unlocked} teaches no hidden block")
    for below, above in zip(blocks, list(blocks)[1:]):
        blocks[above].register_forward_pre_hook(note(below))
    train(rule, [(x, y)])     # classifiers that begin at 0 teach nothing yet
    for phase in rule.phases():
        start, apply = tensors(rule), stepper(rule)
        met.clear()
        rule.train()
        phase.learn(x, y, apply)
        learns = [block for block in rule.network.hidden if has_learned(block)]
        taught = taught or bool(learns)
        assert all(met.get(block, True) for block in learns), met
        apply.finish(torch.zeros(()))
    assert taught


# A unit's incoming weights times c and outgoing weights over c leave the network as it was, to the bit.
ALIKE = {"relu": 4.0, "tanh": -1.0}     # tanh is odd: what sends down the weights' signs alone is found by it
# Inverses with an activation have another slope where a unit has another scale, which is no transport: they are taken linear.
LINEAR_INVERSES = dict.fromkeys(("dtp", "dtp_drl", "fw_dtp"), {"inverse_activation": "none"})


def carried(name, activation):
    """Whether a unit's incoming gradient is divided by c where its weights are multiplied and the upper ones divided by it; None where
    the rule teaches no hidden block or refuses such units. Else it has to be the same as before."""
    try:
        rule, x, y = ready(name, dense(SIZES, activation=ACTIVATIONS[activation]), **LINEAR_INVERSES.get(name, {}))
    except Refused:
        return None
    own = name == "pepita"               # waits for the output's error, and then goes by the units' own activities
    if own:
        give(rule, FixedError(rule.task, torch.randn(len(x), CLASSES, dtype=torch.float64)))
    again, c = draws_again(rule), ALIKE[activation]
    again()
    before, out = hidden_updates(rule, x, y), rule.network(x)
    with torch.no_grad():
        lower, upper = rule.network.blocks["fc2"].linear, rule.network.blocks["fc3"].linear
        unit = rule.network.blocks["fc2"](rule.network.blocks["fc1"](x)).sum(0).argmax()     # the most active
        lower.weight[unit] *= c
        lower.bias[unit] *= c
        upper.weight[:, unit] /= c
    assert torch.equal(rule.network(x), out)
    again()
    after = hidden_updates(rule, x, y)
    key = "network.blocks.fc2.linear."
    if not before or not before[key + "weight"][unit].any():
        return None
    scaled, same = (all(torch.allclose(after[key + part][unit], before[key + part][unit] / factor, rtol=1e-9, atol=0)
                        for part in ("weight", "bias")) for factor in (c, 1.0))
    if own or not rule.facts.update_locked:     # a unit's own goodness or head sees its scale; the weights above must not reach it at all
        for n in before:
            if ".fc1." in n:
                assert torch.equal(after[n], before[n]), n
        with torch.no_grad():
            upper.weight.normal_()
        again()
        later = hidden_updates(rule, x, y)
        assert all(torch.equal(later[n], after[n]) for n in after if ".fc3." not in n)
        return False
    if not scaled:
        assert same
        for n in before:
            if ".fc3." not in n:      # the layer above sees other inputs
                scale = float(before[n].abs().max())
                torch.testing.assert_close(after[n], before[n], rtol=0, atol=2e-14 * scale, msg=lambda m: f"{n}: {m}")
    return scaled


@pytest.mark.parametrize("name", LEARNERS)
def test_weight_transport(name):
    if registry.entry("algo", registry.option("algo", name).name).facts["family"] == "search":
        pytest.skip("its noise, of one size for all weights, is another perturbation of a network rescaled")
    if name == "tp":
        pytest.skip("its targets are values, not differences, and a unit's distance from one sees its scale: test_targets has a test of its own")
    if name in RECURRENT:
        pytest.skip("a unit of a recurrent block has weights to itself: test_tbptt has a test of its own")
    found = [carried(name, activation) for activation in ALIKE]
    assert any(found) == ready(name)[0].facts.weight_transport
    if all(found):      # whole weights, not their signs alone
        assert name not in ("usf", "frsf", "brsf")


@pytest.mark.parametrize("name", LEARNERS)
def test_labels_at_input(name):
    """Whether the first block sees another input when only the label is another one."""
    rule, x, y = ready(name)
    again, seen = draws_again(rule), []
    first = rule.network.blocks["fc1"]
    hook = (first.input if name in RECURRENT else first.linear).register_forward_pre_hook(lambda module, args: seen.append(args[0].detach().clone()))
    for labels in (y, (y + 1) % CLASSES):
        again()
        seen.append(None)
        learned(rule, x, labels)
    hook.remove()
    halves = seen[1 : len(seen) // 2], seen[len(seen) // 2 + 1 :]
    assert halves[0] and len(halves[0]) == len(halves[1])
    assert any(not torch.equal(a, b) for a, b in zip(*halves)) == rule.facts.labels_at_input


class Step(nn.Module):
    """A dense layer of threshold units: 0 or 1, and no derivative."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)

    def forward(self, x):
        return (self.linear(x) > 0).to(x.dtype)


@pytest.mark.parametrize("name", ALGOS)
def test_rules_that_need_no_derivative_train_networks_without_one(name):
    rule, x, y = ready(name)
    if rule.facts.needs_derivative:
        pytest.skip("its facts say that the blocks must be differentiable")
    network = Network({"fc1": Step(6, 9), "fc2": Step(9, 7), "head": nn.Linear(7, CLASSES)}, (6,)).double()
    try:
        rule, x, y = ready(name, network)
    except Refused as refused:      # one that has to look inside of a block wants lbp's own threshold units
        assert "inverse map" in str(refused) or "plain layers" in str(refused)
        rule, x, y = ready(name, dense((6, 9, 7), activation=ACTIVATIONS["step"]))
    before = tensors(rule)
    train(rule, [(x, y)] * 2)
    moved = changed(before, rule)
    assert moved and all(t.isfinite().all() for t in tensors(rule).values())


@pytest.mark.parametrize("name", ALGOS)
def test_in_place(name):
    """Whether weights are other ones after learning, though nothing was stepped."""
    rule, x, y = ready(name)
    before = tensors(rule)
    for phase in rule.phases():
        if phase.fit:
            phase.fit(lambda rows: iter([(x, y)]))
        else:
            phase.learn(x, y, lambda group, loss=None: None)
    assert bool(changed(before, rule)) == rule.facts.in_place


# ---- every rule on every arch

IN_SHAPES = {"mlp": (7,), "lenet": (1, 28, 28)}
SMALL = {"mlp": {"widths": [9, 8]}, "cnn": {"widths": [3, 4], "dense": [6]}, "lenet": {"widths": [2, 3, 8], "dense": 7},
         "resnet20": {"width": 2}, "resnet32": {"width": 2}, "resnet56": {"width": 2}, "resnet18": {"width": 1 / 32},
         "vgg8b": {"width": 1 / 64, "dense": [7]}, "vgg11b": {"width": 1 / 64, "dense": [7]},
         "vit": {"dim": 6, "depth": 2}, "torchvision": {"model": "mobilenet_v3_small"},
         "reversible": {"width": 8}, "ensemble": {"widths": [9, 8], "members": 3},
         "rnn": {"width": 6}, "lstm": {"width": 6}, "gru": {"width": 6}, "transformer": {"dim": 8, "heads": 2}}
# algorithms known to work there (reference, section 12): the others may be refused, with a reason
PLAIN = {"mlp", "cnn", "lenet", "stack"}
SEQUENTIAL = {"rnn", "lstm", "gru", "transformer"}
MUST = {name: set(ARCHS) for name in ("bp", "shallow", "fa", "kp", "dfa", "local", "usf", "frsf", "brsf", "wm", "dkp",
                                              "pred", "mono_forward", "sim", "predsim", "greedy", "dgl", "sigprop", "machines", "mixed", "dni", "cdni")} | {
    "tbptt": {"rnn", "lstm", "gru"}, "tbptt_dni": {"rnn", "lstm", "gru"},
    "ldrl": PLAIN, "tp": PLAIN, "dtp": PLAIN, "dtp_drl": PLAIN, "fw_dtp": PLAIN, "ddtp_linear": PLAIN | {"vit"},
    **dict.fromkeys(("zorb", "dzorb"), PLAIN | {"resnet20", "resnet32", "resnet56", "resnet18", "vgg8b", "vgg11b"}), "ml_elm": PLAIN,
    "readout": set(ARCHS), "forward_forward": PLAIN, "elm": PLAIN, "pepita": PLAIN, "cwc": PLAIN, "cafo": PLAIN, "cafo_gd": PLAIN,
    "softhebb": PLAIN, "scff": PLAIN, "ccl": PLAIN, "es": {*PLAIN, "vit"}, "genetic": {*PLAIN, "vit"},
    "drtp": set(ARCHS) - {"vit", "torchvision", "stack", *SEQUENTIAL}, "sdfa": set(ARCHS) - {"vit", "torchvision", "stack", *SEQUENTIAL}}


def home(name, arch="mlp"):
    """The arch, or a recurrent one for a rule that takes no others."""
    return "lstm" if name in RECURRENT else arch


def in_shape_of(arch):
    return IN_SHAPES.get(arch, (3, 16, 16))


def small(arch, task, name, **knobs):
    """The arch with few units and the knobs that the rule prefers, on this task, in the task's precision."""
    config = defaults("arch", arch)
    wishes = {key.removeprefix("arch."): value for key, value in prefers(name).items() if key.startswith("arch.")}
    config |= {key: value for key, value in wishes.items() if key in config} | SMALL.get(arch, {}) | knobs
    return build_arch(config, task).to(task.dtype)


def test_knobs_that_couple_the_samples():
    for name, knobs in (("greedy", {"norm": "batch"}), ("forward_forward", {"peer": .03}), ("mixed", {"blocks": {"fc1": "predsim"}})):
        assert not ready(name)[0].facts.batch_coupled and ready(name, **knobs)[0].facts.batch_coupled, name


def two_steps(rule, x, y, bf16=False):
    """Two batches of each phase as the trainer runs them, measured; asserts that all stays finite and something moves."""
    apply, measure, before = stepper(rule, lr=.01), Measure(rule, rule.task), tensors(rule)
    for phase in rule.phases():
        rule.train()
        if phase.fit:
            phase.fit(lambda rows: iter([(x, y)] * 2))
            continue
        for _ in range(2):
            apply.count, apply.observe = len(x), measure.collect
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                measure.before(x, y)
                result = phase.learn(x, y, apply)
            apply.finish(result.loss)
            record = measure.record(result.blocks)
            assert set(record["layers"]) == set(rule.network.blocks)
            assert result.loss.isfinite().all()
    now = tensors(rule)
    assert all(t.isfinite().all() for t in now.values()) and changed(before, rule)
    rule.eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        assert rule.predict(x).isfinite().all()


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("name", ALGOS)
def test_every_rule_trains_every_arch_or_says_why_not(name, arch):
    task = task_of(name, in_shape_of(arch), torch.float32)
    network = small(arch, task, name)
    try:
        rule = build_algo(defaults("algo", name), network, task)
    except Refused as refused:
        assert any(f"block {block}" in str(refused) for block in network.blocks) or "arch=" in str(refused)
        assert f"algo={name}" in str(refused)
        assert arch not in MUST.get(name, ()), str(refused)
    else:
        two_steps(rule, *batch(task, 4))


@pytest.mark.parametrize("knobs", [{"norm": "batch"}, {"norm": "layer"}, {"dropout": .3}], ids=str)
@pytest.mark.parametrize("arch", ["mlp", "cnn"])
@pytest.mark.parametrize("name", ALGOS)
def test_norms_and_dropout_train_or_are_refused(name, arch, knobs):
    task = task_of(name, in_shape_of(arch), torch.float32)
    network = small(arch, task, name, **knobs)
    try:
        rule = build_algo(defaults("algo", name), network, task)
    except Refused as refused:
        assert name in RECURRENT or "block" in str(refused) and all(f"arch.{knob}=" in str(refused) for knob in knobs)
    else:
        two_steps(rule, *batch(task, 4))


# How a matrix is drawn is one function's affair, which tests/test_archs.py looks at word by word; here the extremes are enough.
DRAWN_ALIKE = set(KINDS) - {"orthogonal", "zeros"}
WORDS = [(name, knob, word) for name in ALGOS for knob, found in registry.option("algo", name).knobs.items()
         for word in found.spec.split(" | ") if all(w.isidentifier() for w in found.spec.split(" | "))
         and not {"int", "float", "bool", "str", "map"} & set(found.spec.split(" | ")) and not (knob == "init" and word in DRAWN_ALIKE)]


@pytest.mark.parametrize("name, knob, word", WORDS, ids=str)
def test_every_word_that_a_knob_allows_trains(name, knob, word):
    task = task_of(name, in_shape_of("cnn"), torch.float32)
    config = defaults("algo", name) | {knob: word}
    try:
        rule = build_algo(config, small(home(name, "cnn"), task, name), task)
    except Refused as refused:
        assert "arch.activation=tanh" in str(refused)
        rule = build_algo(config, small("cnn", task, name, activation="tanh"), task)
    two_steps(rule, *batch(task, 4))


@pytest.mark.parametrize("arch", ["mlp", "cnn"])
@pytest.mark.parametrize("name", ALGOS)
def test_bf16_autocast(name, arch):
    arch = home(name, arch)
    task = task_of(name, in_shape_of(arch), torch.float32)
    two_steps(build_algo(defaults("algo", name), small(arch, task, name), task), *batch(task, 4), bf16=True)


@pytest.mark.parametrize("name", ALGOS)
def test_regression_is_trained_or_refused(name):
    task = regression(in_shape_of(home(name)), outputs=2, dtype=torch.float32)
    try:
        rule = build_algo(defaults("algo", name), small(home(name), task, name), task)
    except Refused as refused:
        assert f"algo={name}" in str(refused) and "regression" in str(refused)
        assert name not in {"bp", "shallow", "fa", "kp", "dfa", "local", "elm", "ldrl", "zorb", "dzorb", "ml_elm"}
    else:
        assert name != "forward_forward"
        x, y = batch(task)
        two_steps(rule, x, y)


@pytest.mark.parametrize("name", ALGOS)
def test_the_trainer_runs_every_rule(name, tmp_path):
    """Configuration to summary, measured at every step, on made-up images."""
    values = configuration(name, "mlp", arch__widths=[9, 8], metrics__every=1, trainer__epochs=1)
    experiment = build_experiment(values, arrays((1, 5, 5)))
    before = tensors(experiment.rule)
    log = Log()
    summary = loop.train(experiment, log, tmp_path)
    assert changed(before, experiment.rule)
    assert 0 <= summary["test_accuracy"] <= 1 and summary["test_loss"] == summary["test_loss"]
    places = [(record["split"], record["step"]) for record in log]
    assert len(places) == len(set(places)) and ("test", summary["steps"]) in places
    fits = sum(bool(phase.fit) for phase in experiment.rule.phases())     # a step each, at the end
    assert [step for split, step in places if split == "train"] == list(range(1, summary["steps"] - fits + 1))
