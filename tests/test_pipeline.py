"""Blocks on several ranks as stages learn, to the bit, what one process does that steps each block as soon as it has run."""

import json
import os
import time
import traceback
from itertools import pairwise

import pytest
import torch
from conftest import PATIENCE, Log, arrays, configuration

import warm
from lbp import ranks
from lbp.algos.rule import learn_by_blocks
from lbp.datasets.data import Arrays
from lbp.errors import ConfigError, Diverged, Refused
from lbp.training import stages
from lbp.training.checkpoint import load
from lbp.training.loop import Loop
from lbp.training.pipeline import AHEAD, Channel, Pipeline
from lbp.training.setup import build as build_experiment


def case(algo, cut="auto", arch="mlp", regression=False, **knobs):
    """An experiment of five blocks (mlp) or four (cnn), three batches an epoch."""
    torch.manual_seed(1)
    data = arrays((2, 8, 8) if arch == "cnn" else (6,))
    if regression:
        data = Arrays(data.x, data.x[:, :2].sin(), data.x[:8], data.x[:8, :2].sin(), "vector")
    sizes = {"arch__widths": [3, 4], "arch__dense": [6]} if arch == "cnn" else {"arch__widths": [9, 8, 7, 6]}
    values = configuration(algo, arch, **{**sizes, "trainer__precision": "fp64", "trainer__epochs": 2, "metrics__every": 2, **knobs})
    return values | {"launch": {"stages": cut}}, data


def made(values, data):
    return build_experiment(values, data)


STREAM = {"algo__schedule": "streaming"}
PAIR = {
    **{algo: case(algo, **STREAM) for algo in ("local", "mono_forward", "pred", "sim", "predsim", "dgl", "sigprop")},
    "forward_forward": case("forward_forward", algo__peer=.1), "cwc": case("cwc"), "cwc goodness": case("cwc", algo__predict="goodness"),
    "joint": case("local", [1, 4]), "norms": case("local", arch="cnn", arch__norm="batch", **STREAM),
    "clip": case("local", [4, 1], trainer__clip=.05, optimizer="nesterov", optimizer__momentum=.9, **STREAM),
    "means": case("predsim", metrics__batches=2, schedule="cosine", **STREAM),
    "auxiliary": case("dgl", algo__readout="auxiliary", algo__norm="batch", arch="cnn", **STREAM),
    "samples": case("sigprop", algo__stream="samples", algo__signal="label", algo__granularity="layer", **STREAM),
    "regression": case("local", [2, 3], regression=True, **STREAM),
    "bf16": case("local", trainer__precision="bf16", **STREAM), "saved": case("local", [2, 3], trainer__checkpoint_every=2, **STREAM),
}
TRIPLE = {"local of three": case("local", [1, 1, 3], **STREAM), "sigprop of three": case("sigprop", [1, 3, 1], **STREAM),
          "forward_forward of three": case("forward_forward", [2, 2, 1]), "balanced": case("predsim", **STREAM)}


def piped(name, folder):
    values, data = (PAIR | TRIPLE)[name]
    experiment = made(values, data)
    experiment.stages, log = stages.plan(experiment), Log()
    summary = Pipeline(experiment, log, folder, None).run()
    return {"state": dict(experiment.rule.state_dict()), "apply": experiment.apply.state_dict(), "log": list(log), "summary": summary}


# ---- what the ranks do

def run_cases(folder):
    found = {name: piped(name, folder / str(ranks.rank())) for name in (PAIR if ranks.world() == 2 else TRIPLE)}
    return found | ({"resumed": resumed(folder / "resumed")} if ranks.world() == 2 else {})


def resumed(folder):
    """What a run with masks of its own on each stage comes to: whole, and gone on with from the middle of its second epoch, cut the same."""
    values, data = case("local", arch__dropout=.3, trainer__checkpoint_every=2, **STREAM)
    states, content = [], None
    for _ in range(2):
        experiment = made(values, data)
        experiment.stages = stages.plan(experiment, content and content["state"]["stages"])
        Pipeline(experiment, Log(), folder, content).run()
        states.append(dict(experiment.rule.state_dict()))
        content = content or ranks.from_first(load(folder / "checkpoints/previous.pt") if ranks.rank() == 0 else None)
    return states, content["state"]


def slow_reader(folder):
    """Times at which each of 12 messages was handed over, and taken."""
    channel, times, first = Channel(1 - ranks.rank(), [((3,), torch.float64)]), [], ranks.rank() == 0
    for number in range(12):
        if first:
            channel.put((torch.full((3,), float(number), dtype=torch.float64),))
        else:
            channel.ask()
            assert channel.take()[0].tolist() == [number] * 3
        times.append(time.monotonic())
        time.sleep(0 if first else .3)
    channel.settle()
    return times


def fails(how):
    """One stage ends, hangs, or meets what is not finite, in its fifth batch."""
    def trouble(folder):
        values, data = case("local", [2, 3], trainer__epochs=3, **STREAM)
        experiment = made(values, data)
        experiment.stages, learn, steps = stages.plan(experiment), experiment.rule.learn_block, []

        def learn_block(name, h, y):
            steps.append(name)
            if steps.count("fc3") == 5:
                if how == "exit":
                    os._exit(9)
                if how == "hang":
                    time.sleep(PATIENCE)
                if how == "nan":
                    h = (h[0] * float("nan"),)
            return learn(name, h, y)

        experiment.rule.learn_block = learn_block
        folder = folder / str(ranks.rank())
        folder.mkdir()
        began = time.monotonic()
        try:
            Pipeline(experiment, Log(), folder, None).run()
        except (ranks.RankLost, Diverged) as error:
            return {"error": type(error).__name__, "text": str(error), "seconds": time.monotonic() - began,
                    "samples": json.loads(path.read_text()) if (path := folder / "nonfinite.jsonl").exists() else None}
    return trouble


WORK = {"pair": run_cases, "triple": run_cases, "slow reader": slow_reader, **{how: fails(how) for how in ("exit", "hang", "nan")}}


def as_a_rank(what, folder, rank, world, port):
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True", "RANK": str(rank),
                   "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "TORCHELASTIC_RESTART_COUNT": "0"}
    torch.set_num_threads(1)
    try:
        ranks.join(8 if what in ("exit", "hang", "nan") else PATIENCE, False)
        torch.save(WORK[what](folder), folder / f"{what}{rank}.pt")
    except BaseException:
        (folder / f"{what}{rank}.txt").write_text(traceback.format_exc())
    os._exit(0)     # a group that lost a member hangs in its destructor


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """{work: what each rank found}; all at once, since most of it is waiting."""
    root, processes, stores = tmp_path_factory.mktemp("pipeline"), {}, []
    for what in WORK:
        world = 3 if what == "triple" else 2
        stores.append(torch.distributed.TCPStore("localhost", 0, is_master=True, wait_for_workers=False))
        (root / what).mkdir()
        processes |= {(what, rank): warm.PROCESSES.Process(target=as_a_rank, args=(what, root / what, rank, world, stores[-1].port))
                      for rank in range(world)}
    for process in processes.values():
        process.start()
    until = time.monotonic() + PATIENCE
    hung = processes.pop(("hang", 1))
    for process in processes.values():
        process.join(max(0, until - time.monotonic()))
        process.kill()
    hung.kill()
    assert not (told := [path.read_text() for path in root.rglob("*.txt")]), "\n".join(told)
    return {what: [torch.load(path, weights_only=False) for path in sorted((root / what).glob("*.pt"))] for what in WORK}


@pytest.mark.parametrize("name", [*PAIR, *TRIPLE])
def test_stages_learn_what_one_process_learns(name, together, tmp_path):
    """Weights, statistics, optimizers, and every number of the log that both have, to the bit; but for what is added up otherwise."""
    values, data = (PAIR | TRIPLE)[name]
    values = values | {"algo": values["algo"] | ({"schedule": "streaming"} if "schedule" in values["algo"] else {})}
    alone, log = made(values, data), Log()
    summary = Loop(alone, log, tmp_path, None).run()
    found = [parts[name] for parts in together["pair" if name in PAIR else "triple"]]
    for part in found:
        assert set(part["state"]) == set(alone.rule.state_dict())
        assert all(torch.equal(part["state"][key], value) for key, value in alone.rule.state_dict().items())
    for group, expected in alone.apply.state_dict().items():
        kept = found[0]["apply"][group]["state"]
        assert set(kept) == set(expected["state"]) and kept
        assert all(torch.equal(kept[i][key], value) for i, state in expected["state"].items() for key, value in state.items())
    first = found[0]
    assert [(r["split"], r["step"], r.get("phase")) for r in first["log"]] == [(r["split"], r["step"], r.get("phase")) for r in log]
    for record, expected in zip(first["log"], log):
        assert record["loss"] == pytest.approx(expected["loss"], rel=1e-12) and record.get("accuracy") == expected.get("accuracy")
        for layer, numbers in expected.get("layers", {}).items():
            mine = record["layers"][layer]
            left = {"alignment_deg", "alignment_weight_deg", "alignment_bias_deg", "delta_alignment_deg", "activation_mean", "activation_std",
                    "dead_fraction", "backprop_grad_norm", "grad_norm_ratio"}
            assert set(numbers) - left == set(mine) and {"weight_norm"} <= set(mine)
            assert all(mine[key] == pytest.approx(numbers[key], rel=1e-12) for key in mine)
            assert record["total"]["grad_norm"] == pytest.approx(expected["total"]["grad_norm"], rel=1e-12)
    assert [block for stage in first["summary"]["stages"] for block in stage["blocks"]] == list(alone.network.blocks)
    assert all(0 <= stage["idle_share"] < 1 for stage in first["summary"]["stages"])
    assert first["summary"]["world_size"] == len(found) and first["summary"]["flops_per_sample"] == summary["flops_per_sample"]
    if isinstance(cut := values["launch"]["stages"], list):
        assert [len(stage["blocks"]) for stage in first["summary"]["stages"]] == cut


def test_a_run_goes_on_as_if_it_had_not_stopped(together):
    for (whole, parts), state in (found["resumed"] for found in together["pair"]):
        assert state["step"] == 4 and state["batch"] == 1 and sum(state["stages"]) == 5
        assert all(torch.equal(parts[key], value) for key, value in whole.items())


def test_what_is_on_its_way_is_bounded(together):
    put, taken = together["slow reader"]
    ahead = [sum(t < taken[n] - .02 for t in put) - n for n in range(12)]
    assert 1 < max(ahead) <= 2 * AHEAD


@pytest.mark.parametrize("how", ["exit", "hang"])
def test_a_stage_that_is_lost_ends_the_others(how, together):
    found, = [part for part in together[how] if part]
    assert found["error"] == "RankLost" and "rank 1 did not take part" in found["text"] and "launch.rank_timeout" in found["text"]
    assert found["seconds"] < 8 + ranks.ROLL_CALL + 60


def test_a_stage_that_diverges_says_so(together):
    lost, diverged = together["nan"]
    assert diverged["error"] == "Diverged" and diverged["samples"]["step"] == 5 and len(diverged["samples"]["samples"]) == 8
    assert lost["error"] == "RankLost" and lost["samples"] is None


# ---- where it is cut

def test_the_slowest_stage_is_as_fast_as_can_be():
    assert stages.balanced([1.] * 8 + [.1], 2) == [4, 5]
    assert stages.balanced([5., 1., 1., 1., 1.], 2) == [1, 4]
    assert stages.balanced([1., 1., 1., 5.], 3) == [1, 2, 1]
    seconds = torch.rand(9).tolist()
    every = [[a, b - a, 9 - b] for a in range(1, 8) for b in range(a + 1, 9)]

    def slowest(counts):
        cuts = [0, *torch.tensor(counts).cumsum(0).tolist()]
        return max(sum(seconds[a:b]) for a, b in pairwise(cuts))
    assert slowest(stages.balanced(seconds, 3)) == min(map(slowest, every))


def test_trying_leaves_no_trace():
    experiment, beside = made(*case("forward_forward", algo__peer=.1)), made(*case("forward_forward", algo__peer=.1))
    turns, flops = stages.tried(experiment)
    for key, value in beside.rule.state_dict().items():
        assert torch.equal(experiment.rule.state_dict()[key], value)
    assert all(not o.state for o in experiment.apply.optimizers.values()) and experiment.apply.observe is None and flops > 0
    assert turns["fc2"].moves == {"network.blocks.fc2.linear.weight", "network.blocks.fc2.linear.bias", "mean_fc2"}
    assert "rng._extra_state" in turns["fc1"].moves and not turns["head"].moves
    assert turns["fc2"].hands == [((16, 8), torch.float64)]


def test_blocks_that_move_the_same_are_refused():
    experiment = made(*case("local"))
    experiment.rule.heads["fc2"], experiment.rule.heads["fc3"] = experiment.rule.heads["fc1"], experiment.rule.heads["fc1"]
    experiment.rule.local_loss = lambda name, h, y: ((h[:, :4] * experiment.rule.heads["fc1"][-1].bias).sum(1), {})
    with pytest.raises(Refused, match="blocks fc1 and fc2 both move heads.fc1.2.bias"):
        stages.plan(experiment)


@pytest.mark.parametrize("name", ["local", "predsim", "sim", "dgl", "sigprop", "forward_forward", "cwc"])
def test_a_block_reads_nothing_that_others_move(name):
    """Everything else is not a number while it learns."""
    found = []
    for spoil in (False, True):
        experiment = made(*case(name))
        rule, apply = experiment.rule, experiment.apply
        moves = {block: turn.moves for block, turn in stages.tried(experiment)[0].items()}
        x, y = next(experiment.data.train.batches(0))
        h, outcome = rule.enter(x, y), []
        for block in experiment.network.blocks:
            kept = {key: value.clone() for key, value in rule.state_dict().items()}
            if spoil:
                with torch.no_grad():
                    for key, value in rule.state_dict().items():
                        if value.is_floating_point() and key not in moves[block] and key in set().union(*moves.values()):
                            value.fill_(float("nan"))
            h, learned = learn_by_blocks(rule, [block], h, y, apply)
            apply.finish(learned.loss.sum())
            outcome += [*h, *(rule.state_dict()[key].clone() for key in sorted(moves[block]))]
            rule.load_state_dict(kept)
        found.append(outcome)
    assert all(torch.equal(a, b) for a, b in zip(*found)) and len(found[0]) > 10


# ---- what is refused

@pytest.mark.parametrize("algo, knobs, why", [
    ("bp", {}, "wait for an error that comes down"), ("dfa", {}, "wait for a whole forward pass"), ("elm", {}, "solves its blocks"),
    ("dni", {}, "learn_block"), ("greedy", {}, "phases of its own"), ("cwc", {"algo__stop": [1]}, "phases of its own"),
    ("sigprop", {"algo__mode": "loop_back"}, "whole forward pass"), ("sigprop", {"algo__passed": ["fc4"]}, "whole forward pass"),
    ("forward_forward", {"algo__predict": "softmax"}, "whole forward pass"), ("forward_forward", {"algo__negatives": "hard"}, "whole forward pass"),
    ("local", {"trainer__clip": 1.0}, "algo.schedule=streaming"), ("local", {"trainer__on_nonfinite": "skip"}, "on_nonfinite=stop"),
])
def test_what_stages_cannot_do_is_refused_with_the_reason(algo, knobs, why):
    with pytest.raises(Refused, match=f"launch=pipeline.*{why}"):
        made(*case(algo, **knobs))


def test_a_cut_that_does_not_fit_is_refused(monkeypatch):
    for cut in ([5, 1], [2, 2, 2], [5]):
        monkeypatch.setattr(ranks, "world", lambda: 2)
        with pytest.raises(ConfigError, match=r"launch.stages=.*2 numbers.*5 blocks"):
            stages.plan(made(*case("local", cut)))
    monkeypatch.setattr(ranks, "world", lambda: 6)
    with pytest.raises(ConfigError, match="launch.ranks=6: the network has 5 blocks"):
        stages.plan(made(*case("local")))
