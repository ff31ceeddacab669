"""Optimizers, schedules, the step that they are taken in, and the loop beside a plain one."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import Log, batch, build, configuration, defaults, dense, make_task, step, stepper, tensors
from torch import nn

from lbp import registry
from lbp.datasets.data import load
from lbp.errors import ConfigError, Diverged
from lbp.training import loop
from lbp.training.apply import Apply
from lbp.training.optim import biases_of, make_optimizers, schedule
from lbp.training.setup import build as build_experiment
from lbp.training.setup import build_arch

OPTIMIZERS = list(registry.options("optimizer"))
SCHEDULES = list(registry.options("schedule"))
KNOWN = {"sgd": torch.optim.SGD, "nesterov": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW,
         "rmsprop": torch.optim.RMSprop}


def parameters(*values):
    return [nn.Parameter(torch.tensor(v, dtype=torch.float64)) for v in values]


# ---- optimizers

@pytest.mark.parametrize("name", OPTIMIZERS)
def test_each_option_is_torchs_class_with_the_settings_of_its_yaml(name):
    config = defaults("optimizer", name)
    optimizer = make_optimizers(config, {"forward": parameters([1., 2.])})["forward"]
    assert type(optimizer) is KNOWN[config["name"]]
    settings = optimizer.param_groups[0]
    for key, value in config.items():
        if key not in ("name", "feedback", "heads", "bias_lr_factor"):
            assert settings[key] == (tuple(value) if isinstance(value, list) else value), key
    assert settings.get("nesterov", False) == (name == "nesterov")
    assert not settings.get("maximize") and not settings.get("amsgrad") and not settings.get("dampening")


def by_hand(name, w, gradients, lr, **s):
    """The weight after these gradients, by the papers' formulas."""
    m = v = 0.0
    for t, g in enumerate(gradients, 1):
        if name == "adamw":
            w -= lr * s["weight_decay"] * w
        else:
            g = g + s.get("weight_decay", 0) * w
        if name in ("sgd", "nesterov"):
            m = s["momentum"] * m + g
            w -= lr * (g + s["momentum"] * m if name == "nesterov" else m)
        elif name in ("adam", "adamw"):
            m, v = .9 * m + .1 * g, .999 * v + .001 * g * g
            w -= lr * (m / (1 - .9**t)) / (math.sqrt(v / (1 - .999**t)) + 1e-8)
        else:
            v = .99 * v + .01 * g * g
            m = s["momentum"] * m + g / (math.sqrt(v) + 1e-8)
            w -= lr * m
    return w


@pytest.mark.parametrize("name", [n for n in OPTIMIZERS if n in KNOWN])
def test_steps_follow_the_papers_formulas(name):
    settings = {"lr": .1, "weight_decay": .05} | ({} if name.startswith("adam") else {"momentum": .8})
    (p,) = group = parameters([2.0])
    optimizer = make_optimizers({**defaults("optimizer", name), **settings}, {"forward": group})["forward"]
    gradients = [.5, -1.0, .25, 2.0]
    for g in gradients:
        p.grad = torch.tensor([g], dtype=torch.float64)
        optimizer.step()
    assert p.item() == pytest.approx(by_hand(name, 2.0, gradients, **settings), rel=1e-12)


def test_groups_inherit_and_override():
    groups = {"forward": parameters([1.]), "feedback": parameters([1.]), "heads": parameters([1.])}
    config = defaults("optimizer", "sgd") | {"lr": .2, "momentum": .5, "feedback": {"lr": .7, "weight_decay": .1}, "heads": {"momentum": 0.0}}
    made = {name: o.param_groups[0] for name, o in make_optimizers(config, groups).items()}
    assert {n: (s["lr"], s["momentum"], s["weight_decay"]) for n, s in made.items()} == {
        "forward": (.2, .5, 0), "feedback": (.7, .5, .1), "heads": (.2, 0, 0)}
    assert all(made[n]["params"] == groups[n] for n in groups)


def test_a_group_without_parameters_has_no_optimizer():
    assert set(make_optimizers(defaults("optimizer", "adam"), {"forward": parameters([1.]), "heads": []})) == {"forward"}


def test_biases_are_known_by_name_not_by_shape():
    module = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 3, bias=False), nn.RNN(3, 1))
    wanted = [module[0].bias, module[1].bias, module[3].bias_ih_l0, module[3].bias_hh_l0]
    assert biases_of(module) == set(wanted) and module[1].weight not in biases_of(module)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_without_a_factor_the_optimizer_has_one_group(name):
    network = dense()
    parameters = list(network.parameters())
    made = make_optimizers(defaults("optimizer", name), {"forward": parameters}, biases_of(network))["forward"]
    assert len(made.param_groups) == 1 and all(a is b for a, b in zip(made.param_groups[0]["params"], parameters, strict=True))


@pytest.mark.parametrize("factor", [0.0, 2.0])
def test_biases_have_a_learning_rate_of_their_own(factor):
    """Also under a schedule: of two steps of plain descent, the second at half the rate."""
    network, task = dense((6, 5), norm=nn.BatchNorm1d), make_task()
    rule, (x, y) = build("bp", network, task), batch(task)
    groups = rule.groups()
    config = defaults("optimizer", "sgd") | {"lr": .1, "bias_lr_factor": factor}
    apply = Apply(groups, make_optimizers(config, groups, biases_of(rule)))
    for rate in (1.0, .5):
        before = tensors(network)
        gradients = dict(zip(before, torch.autograd.grad(F.cross_entropy(network(x), y), list(network.parameters()))))
        apply.learning_rates(rate)
        step(rule, apply, x, y)
        for name, p in network.named_parameters():
            own = .1 * rate * (factor if name.endswith("bias") else 1)
            torch.testing.assert_close(p.detach(), before[name] - own * gradients[name], rtol=1e-9, atol=1e-12)


def test_a_group_may_have_a_bias_factor_of_its_own_and_none_but_biases():
    p, q = parameters([1.]), parameters([2.])
    config = defaults("optimizer", "adam") | {"lr": .1, "feedback": {"bias_lr_factor": 3.0, "lr": .2}}
    made = make_optimizers(config, {"forward": p, "feedback": q}, {*p, *q})
    assert [g["lr"] for o in made.values() for g in o.param_groups] == [.1, pytest.approx(.6)]


@pytest.mark.parametrize("group", ["feedback", "heads"])
def test_settings_for_a_group_that_the_rule_lacks_are_refused(group):
    values = configuration("bp", "mlp", arch__widths=[5], dataset__name="mnist5k", **{f"optimizer__{group}": {"lr": .1}})
    with pytest.raises(ConfigError, match=f"optimizer.{group}"):
        build_experiment(values)


# ---- schedules

def factors(config, steps=10, epochs=4):
    f = schedule({"warmup_epochs": 0.0, **config}, steps, steps * epochs)
    return [f(i) for i in range(steps * epochs + 1)]


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_begin_with_the_full_rate_and_stay_within_it(name):
    found = factors(defaults("schedule", name))
    assert found[0] == 1 and all(0 <= f <= 1 for f in found) and found == sorted(found, reverse=True)


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_warms_up(name):
    """Linearly from lr / w to lr over the first w steps."""
    found = factors({**defaults("schedule", name), "warmup_epochs": .5})
    assert found[:5] == pytest.approx([.2, .4, .6, .8, 1])


def test_constant():
    assert factors({"name": "constant"}) == [1] * 41


@pytest.mark.parametrize("every", [1.0, 2.0, .5, .1, .3])
def test_step(every):
    """gamma ** k from the step on with which k * step_epochs epochs are over; epochs count 10 steps."""
    found = factors({"name": "step", "step_epochs": every, "gamma": .5})
    assert found == pytest.approx([.5 ** (i // round(10 * every)) for i in range(41)])


def test_multistep():
    found = factors({"name": "multistep", "milestones": [1, 2.5], "gamma": .1})
    assert found == pytest.approx([1] * 10 + [.1] * 15 + [.01] * 16)


@pytest.mark.parametrize("least", [0.0, .2])
def test_cosine(least):
    found = factors({"name": "cosine", "min_factor": least})
    assert found == pytest.approx([least + (1 - least) * (1 + math.cos(math.pi * i / 40)) / 2 for i in range(41)])
    assert found[40] == pytest.approx(least)
    warm = factors({"name": "cosine", "min_factor": least, "warmup_epochs": 1.0})
    after = [least + (1 - least) * (1 + math.cos(math.pi * i / 30)) / 2 for i in range(31)]
    assert warm == pytest.approx([(i + 1) / 10 for i in range(10)] + after)


# ---- apply

def applied(clip=None, lr=1.0):
    group = parameters([1., 1.], [[2.]])
    return group, Apply({"forward": group}, {"forward": torch.optim.SGD(group, lr=lr)}, clip)


def test_apply_divides_sums_by_the_count_and_clears():
    group, apply = applied()
    group[0].grad, group[1].grad = torch.tensor([8., 4.]).double(), torch.tensor([[-2.]]).double()
    apply.count = 4
    apply("forward")
    assert group[0].tolist() == [-1, 0] and group[1].tolist() == [[2.5]]
    assert all(p.grad is None for p in group)
    apply("forward")     # nothing has a gradient
    assert group[0].tolist() == [-1, 0]


@pytest.mark.parametrize("clip, scale", [(None, 1), (100., 1), (6.5, .5), (1.3, .1)])
def test_apply_clips_the_joint_norm_of_the_averaged_gradient(clip, scale):
    group, apply = applied(clip)
    group[0].grad, group[1].grad = torch.tensor([6., 8.]).double(), torch.tensor([[24.]]).double()     # 3, 4, 12: norm 13
    apply.count = 2
    apply("forward")
    moved = [1 - group[0][0].item(), 1 - group[0][1].item(), 2 - group[1].item()]
    assert moved == pytest.approx([3 * scale, 4 * scale, 12 * scale], rel=1e-5)


def test_apply_observes_sums_before_anything_is_changed():
    group, apply = applied(clip=.1)
    seen = []
    apply.observe = lambda moving: seen.extend((p, p.grad.clone(), p.detach().clone()) for p in moving)
    group[0].grad, apply.count = torch.tensor([6., 8.]).double(), 2
    apply("forward")
    (p, g, w), = seen
    assert p is group[0] and g.tolist() == [6, 8] and w.tolist() == [1, 1]


@pytest.mark.parametrize("loss", [None, torch.tensor([1.0, math.nan]), torch.tensor(math.inf)], ids=["no loss", "nan", "inf"])
def test_apply_refuses_what_is_not_finite(loss):
    group, apply = applied()
    group[0].grad = torch.tensor([1., math.nan if loss is None else 1.]).double()
    with pytest.raises(Diverged, match="forward"):
        apply("forward", loss)
    assert group[0].tolist() == [1, 1] and all(p.grad is None for p in group)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_is_caught_where_its_norm_is_computed(bad):
    """A finite loss may have one (a root at 0, an overflow); clipping would spread it over all weights."""
    group, apply = applied(clip=1.0)
    group[0].grad, group[1].grad = torch.tensor([1., bad]).double(), torch.tensor([[1.]]).double()
    with pytest.raises(Diverged):
        apply("forward", torch.tensor(1.0))
    assert group[0].tolist() == [1, 1] and group[1].tolist() == [[2]]


def test_a_batch_without_targets_that_count_moves_no_weight_to_nan():
    """All tokens masked: the loss and its gradient are 0, and so is the number to divide by."""
    group, apply = applied()
    group[0].grad, apply.count = torch.zeros(2).double(), 0
    try:
        apply("forward", torch.tensor(0.))
    except Diverged:
        pass
    assert group[0].tolist() == [1, 1]


def test_a_group_without_gradients_leaves_the_others_alone():
    a, b = parameters([1.]), parameters([1.])
    apply = Apply({"forward": a, "heads": b}, {n: torch.optim.SGD(p, lr=1.) for n, p in (("forward", a), ("heads", b))})
    a[0].grad = torch.tensor([1.]).double()
    apply("heads", torch.tensor(0.))
    assert a[0].grad.item() == 1 and a[0].item() == 1


def test_finish_steps_every_group_and_groups_need_optimizers():
    a, b = parameters([1.]), parameters([1.])
    apply = Apply({"forward": a, "heads": b}, {n: torch.optim.SGD(p, lr=1.) for n, p in (("forward", a), ("heads", b))})
    a[0].grad, b[0].grad = torch.tensor([1.]).double(), torch.tensor([2.]).double()
    apply.finish(torch.tensor(0.))
    assert (a[0].item(), b[0].item()) == (0, -1)
    with pytest.raises(ValueError, match="optimizer"):
        Apply({"forward": a, "heads": b}, {"forward": torch.optim.SGD(a, lr=1.)})


def test_a_mean_loss_is_what_the_optimizer_sees():
    """Three steps through Apply are three steps under the mean loss, clipping and decay included."""
    ends = []
    for plain in (True, False):
        torch.manual_seed(1)
        network, task = dense(), make_task()
        rule = build("bp", network, task)
        apply = stepper(rule, "adam", lr=.01, weight_decay=.1, clip=.05)
        optimizer = torch.optim.Adam(network.parameters(), lr=.01, weight_decay=.1)
        for _ in range(3):
            x, y = batch(task)
            if plain:
                optimizer.zero_grad()
                F.cross_entropy(network(x), y).backward()
                nn.utils.clip_grad_norm_(network.parameters(), .05)
                optimizer.step()
            else:
                step(rule, apply, x, y)
        ends.append(tensors(network))
    for n, t in ends[0].items():
        torch.testing.assert_close(ends[1][n], t, rtol=1e-9, atol=1e-12)


# ---- the loop

@pytest.mark.parametrize("optimizer, arch_knobs", [
    ("adam", {}), ("nesterov", {"norm": "batch"}),
], ids=["adam", "nesterov, batch norm"])
def test_the_loop_is_a_plain_loop_to_the_last_bit(optimizer, arch_knobs, tmp_path):
    values = configuration("bp", "mlp", optimizer, schedule="cosine", dataset__name="mnist5k", arch__widths=[32, 16],
                           trainer__epochs=2, trainer__batch_size=64, metrics__every=5, seed=3,
                           **{f"arch__{k}": v for k, v in arch_knobs.items()})
    values["dataset"] |= {"train_size": 600, "val_size": 100}
    experiment = build_experiment(values)
    assert len(experiment.data.train) == 600
    loop.train(experiment, Log(), tmp_path)

    data = load(values["dataset"], seed=3, batch_size=64)
    network = build_arch(values["arch"], data.task, 3)
    network.train()
    classes = {"adam": lambda p: torch.optim.Adam(p, lr=1e-3, fused=True),
               "nesterov": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=.9, nesterov=True, fused=True)}
    plain = classes[optimizer](network.parameters())
    rate, t, total = plain.param_groups[0]["lr"], 0, 2 * (600 // 64)
    for epoch in range(2):
        for x, y in data.train.batches(epoch):
            plain.param_groups[0]["lr"] = rate * (1 + math.cos(math.pi * t / total)) / 2
            F.cross_entropy(network(x), y, reduction="none").sum().backward()
            for p in network.parameters():
                p.grad /= len(x)
            plain.step()
            plain.zero_grad()
            t += 1
    assert t == total
    trained = tensors(experiment.network)
    assert all(torch.equal(trained[n], value) for n, value in tensors(network).items())
