"""What must not reach a weight, and what is said when memory or disk runs out (faults 15, 16)."""

import json
import subprocess
import sys

import pytest
import torch
from conftest import PATIENCE, Log, arrays, configuration

import lbp
from lbp.algos.baseline.bp import BP
from lbp.config import compose
from lbp.errors import Diverged, OutOfResources
from lbp.training import checkpoint
from lbp.training.loop import Loop
from lbp.training.setup import build

QUICK = ("dataset=digits", "algo=bp", "arch.widths=[16,12]", "trainer.epochs=2", "trainer.batch_size=100",
         "logger.wandb.mode=disabled", "logger.console=off", "metrics.every=0")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def bad(monkeypatch):
    """bad(step, how): the batch of that step (from 1) has a non-finite loss, or a non-finite number in one weight's gradient."""
    def spoil(*steps, how="loss"):
        done, learn = [0], BP.learn

        def spoiled(self, x, y, apply):
            done[0] += 1
            now = done[0] in steps
            if now and how == "input":
                x = torch.full_like(x, float("nan"))
            found = learn(self, x, y, apply)
            if now and how == "loss":
                found.loss = found.loss * float("nan")
            if now and how == "update":
                self.network.head.weight.grad[3, 2] = float("-inf")
            return found
        monkeypatch.setattr(BP, "learn", spoiled)
    return spoil


def weights(folder, which="last"):
    return {k: v for k, v in checkpoint.load(folder / f"checkpoints/{which}.pt")["rule"].items() if isinstance(v, torch.Tensor)}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("how", ["loss", "update", "input"])
def test_a_run_stops_before_a_weight_is_touched(bad, how, tmp_path):
    good = lbp.run(*QUICK, "arch.norm=batch", "trainer.max_minutes=100", "trainer.epochs=1")
    bad(12 + 3, how=how)  # the third step of the second epoch of 12 steps
    with pytest.raises(Diverged) as stopped:
        lbp.run(*QUICK, "arch.norm=batch", "trainer.checkpoint_every=1", "run.dir=bad")
    assert (tmp_path / "bad/STATUS").read_text() == "diverged\n"
    assert "step 15" in "".join(stopped.value.__notes__) and ("update" if how == "update" else "loss") in str(stopped.value)
    kept = weights(tmp_path / "bad")
    assert checkpoint.load(tmp_path / "bad/checkpoints/last.pt")["state"]["step"] == 14
    assert all(v.isfinite().all() for v in kept.values()) and not same(kept, weights(good.folder))
    (said,) = map(json.loads, (tmp_path / "bad/nonfinite.jsonl").read_text().splitlines())
    split = build(compose([*QUICK]).values).data.train
    assert said["step"] == 15 and said["epoch"] == 2
    assert said["samples"] == split.source[split.order(1)[200:300]].tolist()


def test_the_live_weights_and_statistics_are_those_before_the_batch(bad, tmp_path):
    def trained(*spoiled):
        experiment = build(configuration("bp", arch__norm="batch", arch__widths=[5], metrics__every=0), arrays((6,), n=16))
        bad(*spoiled, how="input")
        loop = Loop(experiment, Log(), tmp_path, None)
        with pytest.raises(Diverged):
            loop.run()
        return {k: v.clone() for k, v in experiment.rule.state_dict().items()}

    first, second = trained(1), trained(2)
    fresh = build(configuration("bp", arch__norm="batch", arch__widths=[5], metrics__every=0), arrays((6,), n=16)).rule.state_dict()
    moved = {k for k in fresh if not torch.equal(fresh[k], second[k])}
    assert {k for k in fresh if not torch.equal(fresh[k], first[k])} <= {"network.blocks.fc1.norm.num_batches_tracked"}
    assert any("running_mean" in k for k in moved) and all(v.isfinite().all() for v in second.values())


def test_exploding_feedback_is_caught_before_it_reaches_a_weight():
    with pytest.raises(Diverged, match="update"):
        lbp.run(*QUICK, "algo=dfa", "algo.scale=1e38", "run.dir=x")


@pytest.mark.parametrize("how", ["loss", "update", "input"])
def test_skip_leaves_the_batch_out(bad, how, capsys):
    bad(5, 6, how=how)
    result = lbp.run(*QUICK, "trainer.on_nonfinite=skip", "logger.console=plain", "arch.norm=batch")
    assert result.summary["steps"] == 24 and result.summary["nonfinite_batches"] == 2
    assert result.summary["test_accuracy"] > .3 and all(v.isfinite().all() for v in weights(result.folder).values())
    assert capsys.readouterr().out.count("left out") == 1  # once, though two batches were
    assert len((result.folder / "nonfinite.jsonl").read_text().splitlines()) == 2


def test_restore_goes_back_to_the_last_checkpoint(bad):
    bad(24)  # the very last batch: what is left is the checkpoint
    result = lbp.run(*QUICK, "trainer.on_nonfinite=restore", "trainer.checkpoint_every=5")
    bad()
    reference = lbp.run(*QUICK, "trainer.checkpoint_every=5", "trainer.on_nonfinite=skip")
    assert not same(weights(result.folder), weights(reference.folder))
    stopped = lbp.run(*QUICK, "trainer.checkpoint_every=5", "trainer.on_nonfinite=restore")
    assert same(weights(stopped.folder), weights(reference.folder))  # without a bad batch all are one
    assert result.summary["nonfinite_batches"] == 1 and result.summary["steps"] == 24


def test_an_epoch_without_a_finite_batch_ends_a_run_that_skips(bad):
    bad(*range(13, 100))
    with pytest.raises(Diverged, match="not one batch of epoch 2"):
        lbp.run(*QUICK, "trainer.on_nonfinite=skip", "trainer.epochs=9")


def test_an_epoch_of_zero_gradients_is_told_once(monkeypatch, capsys):
    learn = BP.learn

    def nothing(self, x, y, apply):
        found = learn(self, x, y, apply)
        for p in self.network.parameters():
            p.grad.zero_()
        return found
    monkeypatch.setattr(BP, "learn", nothing)
    lbp.run(*QUICK, "logger.console=plain")
    assert capsys.readouterr().out.count("exactly zero") == 1


def test_out_of_memory_says_the_figures_and_the_remedies(monkeypatch, tmp_path):
    learn, calls = BP.learn, []

    def full(self, x, y, apply):
        calls.append(1)
        if len(calls) == 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        return learn(self, x, y, apply)
    monkeypatch.setattr(BP, "learn", full)
    with pytest.raises(OutOfResources, match=r"20.00 GiB.*MiB.*free.*trainer.batch_size=100") as found:
        lbp.run(*QUICK, "run.dir=full")
    assert found.value.code == 5 and (tmp_path / "full/STATUS").read_text() == "failed\n"
    assert "OutOfMemoryError" in (tmp_path / "full/log.txt").read_text()


def test_in_a_sweep_the_other_trials_go_on(tmp_path):
    done = subprocess.run([sys.executable, "-m", "lbp", "train", "-m", *QUICK, "arch.widths=[16],[30000000,30000000]", "run.dir=s"],
                          capture_output=True, text=True, timeout=PATIENCE)
    first, second = sorted(p for p in (tmp_path / "s").iterdir() if p.is_dir())
    assert done.returncode == 1 and "exit code 5" in done.stderr
    assert [(f / "STATUS").read_text() for f in (first, second)] == ["done\n", "failed\n"]
    assert "out of memory" in (tmp_path / f"s/{second.name}.log").read_text()
