"""Population search: its tools against what they say, es and genetic against a computation by hand, in float64."""

import copy
import math

import pytest
import torch
from conftest import CLASSES, batch, build, changed, dense, learned, make_task, step, stepper, task_of, tensors
from torch import nn

import lbp
from lbp.algos import ops
from lbp.algos.search import population as pop
from lbp.archs.hard import Bernoulli
from lbp.errors import Diverged, Refused


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def many(*shape):
    return torch.zeros(*shape, dtype=torch.float64)


# ---- noise

def test_gaussian_noise_has_the_moments_that_are_asked_for():
    noise = pop.gaussian(many(200_000), rng(), std=.3, mean=-1.)
    assert abs(noise.mean() + 1) < .003 and abs(noise.std() - .3) < .002


@pytest.mark.parametrize("p", [0., .1, .5, 1.])
@pytest.mark.parametrize("signed", [True, False])
def test_as_many_bits_flip_as_are_asked_for(p, signed):
    bits = (pop.uniform(many(100_000), rng(1)) < .3).double()
    bits = 2 * bits - 1 if signed else bits
    other = pop.flipped(bits, p, rng(), signed)
    assert set(other.tolist()) <= set(bits.tolist())
    assert abs(float((other != bits).double().mean()) - p) <= (.004 if 0 < p < 1 else 0)


# ---- scores to weights

def test_ranks_belong_to_the_members_they_rank():
    scores = torch.tensor([2., 1., 3.])
    assert pop.ranks(scores).tolist() == [2, 3, 1]
    assert pop.ranks(scores, maximize=True).tolist() == [2, 1, 3]
    scores = torch.tensor([.4, .1, .2, .3])
    assert pop.ranks(scores).tolist() == [1, 4, 3, 2]


@pytest.mark.parametrize("kind", ["normalise", "softmax", "rank"])
@pytest.mark.parametrize("maximize", [False, True])
def test_weights_sum_to_one_and_prefer_the_better(kind, maximize):
    scores = torch.tensor([.5, 2., 1., 4.], dtype=torch.float64)
    worth = pop.weights(scores, kind, maximize)
    assert math.isclose(worth.sum(), 1, rel_tol=1e-12) and (worth >= 0).all()
    assert torch.equal(worth.argsort(), scores.argsort(descending=not maximize))


def test_weights_by_hand():
    scores = torch.tensor([1., 3.], dtype=torch.float64)
    for kind, maximize, expected in [("normalise", True, [1 / 4, 3 / 4]), ("normalise", False, [3 / 4, 1 / 4]), ("rank", False, [2 / 3, 1 / 3]),
                                     ("softmax", True, [1 / (1 + math.e), math.e / (1 + math.e)])]:
        assert pop.weights(scores, kind, maximize, temperature=2.).tolist() == pytest.approx(expected)
    assert pop.weights(many(4), "normalise").tolist() == [.25] * 4      # no loss anywhere: none is better


def test_scores_that_are_not_finite_are_the_worst():
    scores = torch.tensor([1., math.nan, 3., math.inf, -math.inf])
    assert pop.tamed(scores).tolist() == [1, 3, 3, 3, 3] and pop.tamed(scores, maximize=True).tolist() == [1, 1, 3, 1, 1]
    assert pop.tamed(torch.tensor([math.nan, math.inf])).tolist() == [0, 0]


# ---- selection

def test_the_best_and_the_k_best():
    scores = torch.tensor([2., 1., 3., 0.])
    assert pop.best(scores, 1).tolist() == [3] and pop.best(scores, 2).tolist() == [3, 1]
    assert pop.best(scores, 2, maximize=True).tolist() == [2, 0]


def test_members_are_chosen_as_often_as_their_weight_says():
    worth = torch.tensor([.1, .6, .3], dtype=torch.float64)
    often = pop.chosen(worth, 50_000, rng()).bincount(minlength=3) / 50_000
    torch.testing.assert_close(often.double(), worth, atol=.01, rtol=0)


@pytest.mark.parametrize("maximize", [False, True])
def test_a_tournament_is_won_by_the_best_of_those_drawn(maximize):
    """Of K members the r-th best (from 0) wins a tournament of m with probability ((K - r)^m - (K - r - 1)^m) / K^m."""
    scores, K, m = torch.tensor([5., 1., 4., 2.]), 4, 3
    often = pop.tournament(scores, 60_000, m, rng(), maximize).bincount(minlength=K) / 60_000
    for r, member in enumerate(scores.argsort(descending=maximize).tolist()):
        assert abs(often[member] - ((K - r) ** m - (K - r - 1) ** m) / K**m) < .01


# ---- crossover

def test_crossover_takes_the_share_that_is_asked_for():
    a, b = many(20_000, 5) + 1, many(20_000, 5)
    full = pop.full_crossover(a, b, .3, rng())
    assert torch.equal(full.amin(1), full.amax(1)) and abs(full[:, 0].mean() - .3) < .01      # whole members
    hard = pop.hard_crossover(a, b, .3, rng())
    assert set(hard.flatten().tolist()) == {0., 1.} and abs(hard.mean() - .3) < .005
    assert (hard.amin(1) < hard.amax(1)).double().mean() > .5


def test_smooth_crossover_lies_between_and_prefers_as_asked():
    a, b = many(20_000, 5) + 1, many(20_000, 5)
    means = [pop.smooth_crossover(a, b, preference, rng()).mean() for preference in (-1., 0., 1.)]
    assert [float(m) for m in means] == pytest.approx([1 / (1 + math.e), .5, 1 / (1 + 1 / math.e)], abs=.005)     # E U^c = 1 / (1 + c)


# ---- aggregation

def members(k=7):
    return torch.randn(k, 4, 3, dtype=torch.float64)


@pytest.mark.parametrize("k", [1, 6, 7])
def test_aggregates_of_equal_weights_are_torchs(k):
    x, worth = members(k), torch.full((k,), 1 / k, dtype=torch.float64)
    for weight in (None, worth):
        torch.testing.assert_close(pop.mean(x, weight), x.mean(0))
        torch.testing.assert_close(pop.median(x, weight), x.median(0).values)
        for q in (0., .2, .5, .83, 1.):
            torch.testing.assert_close(pop.quantile(x, q, weight), x.quantile(q, 0))


def test_weighted_aggregates():
    x = torch.tensor([[1.], [2.], [10.]], dtype=torch.float64)
    worth = torch.tensor([.7, .2, .1], dtype=torch.float64)
    assert pop.mean(x, worth).item() == pytest.approx(2.1)
    assert pop.median(x, worth).item() == 1 and pop.median(x, torch.tensor([.1, .2, .7])).item() == 10
    # Places: .35, .8, .95, stretched to 0, .75, 1.
    assert [pop.quantile(x, q, worth).item() for q in (0., .375, .75, .875, 1.)] == pytest.approx([1, 1.5, 2, 6, 10])


# ---- the ES gradient

def quadratic(P, seed=0):
    """(f, its gradient at x, x) with curvatures from 1 to 10."""
    g = rng(1000 + seed)
    a, x = torch.linspace(1, 10, P, dtype=torch.float64), torch.randn(P, generator=g, dtype=torch.float64)
    return lambda v: (a * v**2).sum(-1) / 2, a * x, x


def angle(a, b):
    return math.degrees(math.acos(float(a @ b / a.norm() / b.norm())))


@pytest.mark.parametrize("antithetic", [False, True])
@pytest.mark.parametrize("utility", ["none", "standard", "rank"])
def test_the_angle_to_the_gradient_of_a_quadratic_is_under_25_degrees_at_500_members(antithetic, utility):
    """In 32 dimensions, where acos sqrt(K / (K + P + 1)) is 14 degrees for 500 draws of noise and 20 for 250 pairs."""
    f, gradient, x = quadratic(32)
    for seed in range(5):
        noise = pop.gaussian(many(250 if antithetic else 500, 32), rng(seed))
        scores = torch.cat([f(x + .01 * noise), f(x - .01 * noise)]) if antithetic else f(x + .01 * noise)
        estimate = pop.es_gradient(noise, pop.utilities(scores, utility), .01)
        assert angle(estimate, gradient) < 25
        if utility == "none":       # and its length is the gradient's
            assert .7 < estimate.norm() / gradient.norm() < 1.4


@pytest.mark.parametrize("K", [10, 100])
def test_the_cosine_is_the_one_that_theory_gives(K):
    f, gradient, x = quadratic(1000)
    found = []
    for seed in range(40):
        noise = pop.gaussian(many(K, 1000), rng(seed))
        estimate = pop.es_gradient(noise, torch.cat([f(x + 1e-4 * noise), f(x - 1e-4 * noise)]), 1e-4)
        found.append(math.cos(math.radians(angle(estimate, gradient))))
    assert sum(found) / len(found) == pytest.approx(math.sqrt(K / (K + 1001)), rel=.1)


def test_utilities_forget_scale_or_all_but_order():
    scores = torch.tensor([1., 4., 2., 100.], dtype=torch.float64)
    assert pop.utilities(scores, "rank").tolist() == pytest.approx([-.5, 1 / 6, -1 / 6, .5])
    torch.testing.assert_close(pop.utilities(7 * scores + 3, "standard"), pop.utilities(scores, "standard"))
    assert pop.utilities(scores, "none") is scores


# ---- populations of networks

NETWORKS = {
    "dense": lambda: dense(), "layer norm": lambda: dense(norm=nn.LayerNorm),
    "convolution": lambda: lbp.Network.of(nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(27, CLASSES)),
                                          (2, 8, 8)).double()}


@pytest.mark.parametrize("chunk", [None, 2])
@pytest.mark.parametrize("kind", NETWORKS)
def test_a_population_is_as_many_separate_networks(kind, chunk):
    network = NETWORKS[kind]()
    task = make_task(network.in_shape)
    x, y = batch(task)
    vectors = pop.genes(network) + .3 * pop.gaussian(many(5, len(pop.genes(network))), rng())
    found = pop.losses(network, task, vectors, x, y, chunk)
    for vector, loss in zip(vectors, found):
        one = copy.deepcopy(network)
        nn.utils.vector_to_parameters(vector, one.parameters())
        torch.testing.assert_close(task.loss(one(x), y).sum(), loss)
    for name, p in network.named_parameters():
        assert torch.equal(pop.expressed(pop.genes(network), network)[name], p)


# ---- es

@pytest.mark.parametrize("antithetic", [True, False])
def test_es_leaves_the_estimate_times_the_rows(antithetic):
    network, task = dense(), make_task()
    rule = build("es", network, task, members=6, std=.1, antithetic=antithetic, utility="none")
    x, y = batch(task, 8)
    noise = torch.randn(3 if antithetic else 6, len(pop.genes(network)), dtype=torch.float64, generator=copy.deepcopy(rule.rng.generator))

    def mean_loss(move):
        one = copy.deepcopy(network)
        nn.utils.vector_to_parameters(pop.genes(network) + move, one.parameters())
        return task.loss(one(x), y).mean().detach()

    plus = [mean_loss(.1 * e) for e in noise]
    if antithetic:
        expected = sum((p - mean_loss(-.1 * e)) / .2 * e for p, e in zip(plus, noise)) / 3
    else:
        expected = sum((p - sum(plus) / 6) / .1 * e for p, e in zip(plus, noise)) / 6
    result, found = learned(rule, x, y)
    torch.testing.assert_close(torch.cat([g.flatten() for g in found.values()]), 8 * expected)
    torch.testing.assert_close(result.loss, task.loss(network(x), y).detach())


@pytest.mark.parametrize("name", ["es", "genetic"])
def test_fitness_is_that_of_all_ranks(name, monkeypatch):
    """Two ranks with a share of the batch each do what one does with all of it."""
    task, sums = make_task(), []
    network = dense()
    x, y = batch(task, 12)
    parts, whole = [(x[:5], y[:5]), (x[5:], y[5:])], build(name, network, task, members=6)
    halves = [copy.deepcopy(whole) for _ in parts]
    _, expected = learned(whole, x, y)
    monkeypatch.setattr(ops, "over_ranks", lambda *tensors: sums.append([t.clone() for t in tensors]))
    for rule, part in zip([copy.deepcopy(h) for h in halves], parts):
        learned(rule, *part)                       # each rank's own sums, exchange by exchange
    for own, rule, part in zip((0, 1), halves, parts):
        others = iter(sums[(1 - own) * len(sums) // 2:])
        monkeypatch.setattr(ops, "over_ranks", lambda *tensors: [t.add_(o) for t, o in zip(tensors, next(others))])
        rule.found = learned(rule, *part)[1]
    for n, g in expected.items():
        torch.testing.assert_close(halves[0].found[n] + halves[1].found[n], g)
    for rule in halves:
        for n, t in tensors(whole).items():
            torch.testing.assert_close(tensors(rule)[n], t)


# ---- genetic

def test_the_network_holds_the_best_member_and_the_elite_lives_on():
    network, task = dense(), make_task()
    rule = build("genetic", network, task, members=12, elite=2)
    x, y = batch(task)
    apply, best = stepper(rule), []
    for _ in range(40):
        before = rule.population.clone()
        scores = pop.losses(network, task, before, x, y, None)
        result = step(rule, apply, x, y)
        first, second = scores.argsort()[:2]
        assert torch.equal(pop.genes(network), before[first]) and torch.equal(rule.population[:2], before[torch.stack([first, second])])
        torch.testing.assert_close(result.loss.sum(), scores.min())
        best.append(float(scores.min()))
    assert best == sorted(best, reverse=True) and best[-1] < .85 * best[0]


def test_the_first_member_is_the_network_and_the_others_are_drawn_like_it():
    network = dense((6, 40, 30))
    start = pop.genes(network)
    rule = build("genetic", network, make_task(), members=5)
    assert torch.equal(rule.population[0], start)
    for name, values in pop.expressed(rule.population[1:], network).items():
        own = network.get_parameter(name)
        if own.numel() > 100:
            assert values.std() == pytest.approx(float(own.detach().std()), rel=.1)
        assert not torch.equal(values[0], values[1])


@pytest.mark.parametrize("crossover", ["hard", "full", "smooth", "none"])
def test_children_come_from_their_parents(crossover):
    network = dense()
    rule = build("genetic", network, make_task(), members=40, elite=0, crossover=crossover, mutation=1e-12)
    old = rule.population.clone()
    children, _ = rule.next_generation(torch.arange(40.).double())
    near = (children[:, None] - old[None]).abs() < 1e-10              # child, parent, gene
    if crossover == "smooth":
        assert (children >= old.amin(0) - 1e-9).all() and (children <= old.amax(0) + 1e-9).all() and not near.all(2).any(1).all()
    elif crossover == "none":
        assert near.all(2).any(1).all()
    else:
        assert near.any(1).all() and not near.all(2).any(1).all()
        whole = [part.all(2).any(1).all() for part in near.split([p.numel() for p in network.parameters()], 2)]
        assert all(whole) if crossover == "full" else not any(whole)


def test_only_the_share_that_is_asked_for_mutates_and_strengths_are_inherited():
    network = dense((6, 40, 30))
    rule = build("genetic", network, make_task(), members=30, elite=0, crossover="none", rate=.2, mutation=.5, adapt=.3)
    rule.population.zero_()
    children, strength = rule.next_generation(torch.arange(30.).double())
    moved = children != 0
    assert abs(float(moved.double().mean()) - .2) < .01
    spread = torch.stack([child[m].std() for child, m in zip(children, moved)])
    torch.testing.assert_close(spread, strength[:, 0], rtol=.25, atol=0)
    assert strength.log().std() == pytest.approx(.3, rel=.5) and (strength.log().mean() - math.log(.5)).abs() < .2


def test_a_batch_that_is_not_finite_leaves_the_population():
    rule = build("genetic", dense(), make_task(), members=6)
    x, y = batch(rule.task)
    x[2, 1] = torch.nan
    before = tensors(rule)
    with pytest.raises(Diverged):
        step(rule, stepper(rule), x, y)
    assert not changed(before, rule)


# ---- refusals, and what they solve

@pytest.mark.parametrize("name", ["es", "genetic"])
def test_what_members_would_share_is_refused(name):
    for network, words in [(dense(norm=nn.BatchNorm1d), "block fc1's batch norm.*arch.norm="), (dense(dropout=.1), "block fc1's dropout.*arch.dropout=0"),
                           (dense(activation=Bernoulli), "block fc1 draws.*arch.activation=step")]:
        with pytest.raises(Refused, match=f"algo={name} .*{words}"):
            build(name, network, task_of(name))


def test_numbers_that_do_not_fit_are_refused():
    with pytest.raises(Refused, match="algo=es with algo.members=7.*even"):
        build("es", dense(), make_task(), members=7)
    with pytest.raises(Refused, match="algo=genetic with algo.elite=8.*algo.members=8"):
        build("genetic", dense(), make_task(), members=8, elite=8)


@pytest.mark.slow
@pytest.mark.parametrize("experiment", ["es_two_spirals", "genetic_two_spirals"])
def test_it_solves_two_spirals(experiment, tmp_path):
    summary = lbp.run(f"experiment={experiment}", "logger.console=off", f"run.dir={tmp_path}/run").summary
    assert summary["test_accuracy"] >= .95
