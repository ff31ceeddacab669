"""What an epoch's line says of its first batches, the test split after every epoch, and batches in the data's order."""

import json
import math
import signal
from pathlib import Path

import pytest
import torch
from conftest import Log, arrays, configuration

import lbp
from lbp import cli
from lbp.datasets.data import Arrays, Split, load
from lbp.logs.console import Console
from lbp.logs.wandb import flat
from lbp.metrics.measure import add_up, means
from lbp.report import runs as reading
from lbp.training import loop, progress
from lbp.training.setup import build as build_experiment

QUICK = ("dataset=digits", "dataset.train_size=400", "arch.widths=[9]", "trainer.batch_size=100", "trainer.epochs=2", "logger.console=off")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def lines(folder="run", split=None):
    found = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
    assert len({(r["split"], r["step"]) for r in found}) == len(found)
    return [r for r in found if split in (None, r["split"])]


def trained(tmp_path, algo="fa", n=40, **knobs):
    """The lines of a run of 5 batches an epoch."""
    values = configuration(algo, "mlp", arch__widths=[6, 5], trainer__epochs=2, **knobs)
    log = Log()
    torch.manual_seed(1)    # of the data
    loop.train(build_experiment(values, arrays((1, 5, 5), n=n)), log, tmp_path)
    return log


# ---- means over the first batches of an epoch

def test_angles_are_averaged_by_their_cosines_and_the_rest_plainly():
    sums = {}
    for values in ({"a_deg": 0.0, "b": 1.0}, {"a_deg": 60.0, "b": 4.0, "c": 3.0}, {"a_deg": 90.0, "c": 5.0}):
        add_up(sums, {"layers": {"fc1": values}, "total": {}})
    found = means(sums)["layers"]["fc1"]
    assert found == {"a_deg": pytest.approx(60), "b": 2.5, "c": 4}      # cosines 1, 1/2 and 0
    assert means(sums)["total"] == {} and means({}) == {}


@pytest.mark.parametrize("angle", [0.0, 1e-7, 30.0, 90.0, 180.0])
def test_the_mean_of_equal_angles_is_that_angle(angle):
    sums = {}
    for _ in range(3):
        add_up(sums, {"a_deg": angle})
    assert means(sums)["a_deg"] == pytest.approx(angle, rel=1e-12, abs=0)


@pytest.mark.parametrize("batches", [2, 9])
def test_an_epochs_line_has_the_means_over_its_first_batches(batches, tmp_path):
    log = trained(tmp_path, metrics__every=1, metrics__batches=batches)
    for number, epoch in enumerate(r for r in log if r["split"] == "train_epoch"):
        measured = [r for r in log if r["split"] == "train"][5 * number:][:min(batches, 5)]
        for name, values in [*epoch["layers"].items(), ("total", epoch["total"])]:
            each = [r["total"] if name == "total" else r["layers"][name] for r in measured]
            assert set(values) == {key for one in each for key in one} and "delta_alignment_deg" in values
            for key, value in values.items():
                these = [one[key] for one in each if key in one]
                wanted = sum(these) / len(these)
                if key.endswith("_deg"):
                    wanted = math.degrees(math.acos(min(1.0, sum(math.cos(math.radians(v)) for v in these) / len(these))))
                assert value == pytest.approx(wanted, abs=2e-6 if key.endswith("_deg") else 1e-12), (name, key)


def test_lines_of_batches_are_written_as_every_asks_alone(tmp_path):
    never, rarely, always = (trained(tmp_path / str(every), metrics__every=every, metrics__batches=3) for every in (0, 4, 1))
    assert [[r["step"] for r in log if r["split"] == "train"] for log in (never, rarely, always)] == [[], [1, 4, 8, 10], list(range(1, 11))]
    said = [[{k: v for k, v in r.items() if k != "samples_per_s"} for r in log if r["split"] == "train_epoch"] for log in (never, rarely, always)]
    assert said[0] == said[1] == said[2] and all("layers" in r for r in said[0])
    assert not any("layers" in r for r in trained(tmp_path / "none", metrics__every=0))


def test_a_batch_that_is_left_out_is_not_averaged(tmp_path):
    values = configuration("bp", "mlp", arch__widths=[5], metrics__every=1, metrics__batches=3, trainer__on_nonfinite="skip")
    experiment = build_experiment(values, arrays((1, 5, 5), n=40))
    experiment.data.train.x[experiment.data.train.order(0)[9]] = math.nan
    log = Log()
    loop.train(experiment, log, tmp_path)
    one, three = (r["total"]["grad_norm"] for r in log if r["split"] == "train" and r["step"] <= 3)
    epoch, = (r for r in log if r["split"] == "train_epoch")
    assert epoch["total"]["grad_norm"] == pytest.approx((one + three) / 2)


def at(place, monkeypatch, act=lambda: signal.raise_signal(signal.SIGTERM)):
    """Calls act() once, before the batch ("EPOCH BATCH") is learned, or as the test split is passed over so many times."""
    batches, passes, plan, seen = Split.batches, Split.passes, [place], []

    def fetched(self, epoch, skip=0):
        for number, found in enumerate(batches(self, epoch, skip), skip):
            if plan == [f"{epoch} {number}"]:
                plan.clear()
                act()
            yield found

    def passed(self, size=None):
        if len(self) == 359:        # of digits' 1,797 the test split
            seen.append(1)
            if plan == [len(seen)]:
                plan.clear()
                act()
        yield from passes(self, size)

    monkeypatch.setattr(Split, "batches", fetched)
    monkeypatch.setattr(Split, "passes", passed)


@pytest.mark.parametrize("place", ["0 2", "1 1", "1 3", 1, 2, 3])
def test_stopped_within_them_it_is_as_if_never_stopped(place, monkeypatch):
    words = (*QUICK, "algo=fa", "metrics.every=2", "metrics.batches=3", "metrics.test=true", "trainer.shuffle=false", "optimizer.bias_lr_factor=2")
    assert cli.main(["train", *words, "run.dir=whole"]) == 0
    with monkeypatch.context() as patch:
        at(place, patch)
        assert cli.main(["train", *words, "run.dir=run"]) == 143
    assert cli.main(["resume", "run"]) == 0
    assert [{k: v for k, v in r.items() if k != "samples_per_s"} for r in lines("run")] == [
        {k: v for k, v in r.items() if k != "samples_per_s"} for r in lines("whole")]


def test_out_of_time_within_them_it_ends_and_goes_on_when_given_more(monkeypatch):
    words = (*QUICK, "algo=fa", "metrics.batches=3", "metrics.test=true", "trainer.max_minutes=100")
    assert cli.main(["train", *words, "run.dir=whole"]) == 0
    with monkeypatch.context() as patch:
        at("1 2", patch, lambda: patch.setattr(progress.Progress, "tick", lambda self: 1e9))
        assert cli.main(["train", *words, "run.dir=run"]) == 0
    assert [r["step"] for r in lines(split="test")] == [4, 6] and len(lines(split="train_epoch")) == 1
    assert cli.main(["resume", "run", "trainer.max_minutes=200"]) == 0
    found, wanted = (lines(folder, "train_epoch") for folder in ("run", "whole"))
    assert [r["layers"] for r in found] == [r["layers"] for r in wanted] and [r["step"] for r in lines(split="test")] == [4, 8]


def test_wandb_has_them_apart_from_those_of_batches():
    record = {"step": 7, "epoch": 1, "loss": 0.5, "layers": {"fc1": {"alignment_deg": 40.0}}, "total": {"alignment_deg": 30.0}}
    batch, epoch = flat({**record, "split": "train"}), flat({**record, "split": "train_epoch"})
    assert batch.keys() & epoch.keys() == {"step", "epoch"}
    assert epoch["alignment_deg/fc1/epoch"] == 40 and epoch["alignment_deg/total/epoch"] == 30


def test_the_console_shows_them(tmp_path):
    console = Console(tmp_path / "log.txt", 3, ["accuracy"], False, "off")
    console.write({"step": 7, "epoch": 1, "split": "train_epoch", "loss": 0.5, "layers": {"fc1": {"alignment_deg": 41.2}, "head": {}}})
    console.close("done", {})
    assert "angle to bp fc1 41" in (tmp_path / "log.txt").read_text()


# ---- the test split after every epoch

@pytest.mark.parametrize("more, steps", [
    ((), [4, 8]), (("dataset.val_size=0",), [4, 8]), (("algo=elm",), [1]), (("algo=ldrl", "algo.feedback_epochs=1"), [4, 8, 12]),
    (("trainer.epochs=0",), [0])], ids=str)
def test_after_every_epoch_and_once(more, steps):
    if "algo=elm" in more:
        words = [word for word in QUICK if "batch_size" not in word and "epochs" not in word]
    else:
        words = QUICK
    result = lbp.run(*words, *more, "metrics.test=true", "run.dir=run")
    tests = lines(split="test")
    assert [r["step"] for r in tests] == steps and lines()[-1]["split"] == "test"
    assert tests[-1]["accuracy"] == result.summary["test_accuracy"] and tests[-1]["loss"] == result.summary["test_loss"]
    assert [r["epoch"] for r in tests] == ([0] if "trainer.epochs=0" in more else list(range(1, len(steps) + 1)))
    without = lbp.run(*words, *more, "run.dir=without").summary
    assert without["test_loss"] == result.summary["test_loss"] and [r["step"] for r in lines("without", "test")] == steps[-1:]
    found = reading.read(Path("run"))
    assert found.status == "done" and not found.why and found.epoch == tests[-1]["epoch"]


def test_with_early_stopping_every_epoch_has_its_line_once():
    words = (*QUICK, "algo=bp", "optimizer.lr=0.05", "trainer.patience=2", "trainer.epochs=60", "metrics.test=true")
    result = lbp.run(*words, "run.dir=run")
    assert result.summary["epochs"] < 60
    assert [r["epoch"] for r in lines(split="test")] == list(range(1, result.summary["epochs"] + 1))
    best = lines(split="test")[result.summary["best_epoch"] - 1]
    assert best["accuracy"] == result.summary["best_test_accuracy"]


def test_a_finished_run_that_goes_on_has_each_line_once():
    words = (*QUICK, "algo=dfa", "metrics.test=true")
    assert cli.main(["train", *words, "run.dir=run"]) == 0 and [r["step"] for r in lines(split="test")] == [4, 8]
    assert cli.main(["resume", "run", "trainer.epochs=4"]) == 0 and [r["step"] for r in lines(split="test")] == [4, 8, 12, 16]
    assert cli.main(["train", *words, "trainer.epochs=4", "run.dir=whole"]) == 0
    assert lines(split="test") == lines("whole", "test")


# ---- batches in the order of the data

def ordered(val_size, train_size, shuffle):
    x = torch.arange(40.)[:, None]
    return load({"val_size": val_size, "train_size": train_size, "normalize": "none"}, seed=3, batch_size=5, shuffle=shuffle,
                arrays=Arrays(x, torch.arange(40) % 4, x[:8], torch.arange(8) % 4, "vector", list("abcd"))).train


@pytest.mark.parametrize("val_size, train_size", [(0, None), (12, None), (8, 20)])
def test_without_shuffle_samples_come_as_they_stand_in_the_data(val_size, train_size):
    plain, shuffled = (ordered(val_size, train_size, shuffle) for shuffle in (False, True))
    for epoch in (0, 7):
        rows = torch.cat([x for x, _ in plain.batches(epoch)])[:, 0].long().tolist()
        assert rows == sorted(rows) == sorted(shuffled.source.tolist())[:len(rows)]      # the same samples
        assert plain.source[plain.order(epoch)].tolist()[:len(rows)] == rows
        assert all((y == x[:, 0].long() % 4).all() for x, y in plain.batches(epoch))
    if not val_size:
        assert rows == list(range(40))
    later, = {x[0].item() for x, _ in list(plain.batches(0, skip=2))[:1]}
    assert later == rows[10]


def test_the_trainer_says_whether_to_shuffle():
    values = configuration("bp", "mlp", arch__widths=[5], trainer__shuffle=False)
    experiment = build_experiment(values, arrays((1, 5, 5), n=40))
    assert experiment.data.train.source.tolist() == list(range(40)) == experiment.data.train.order(3).tolist()
    assert build_experiment(configuration("bp", "mlp", arch__widths=[5]), arrays((1, 5, 5), n=40)).data.train.shuffle
