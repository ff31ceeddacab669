"""A run from its overrides to its folder, and what can be done with the folder."""

import json
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import PATIENCE
from data_fixtures import write_mnist

import lbp
from lbp import cli, registry
from lbp.config import compose
from lbp.errors import ConfigError, DataError, Diverged, Refused
from lbp.launch.trained import evaluate_run, export_run
from lbp.logs.wandb import flat

ROOT = Path(__file__).parents[1]
KEYS = """status algo dataset arch seed epochs steps train_loss val_accuracy val_loss test_accuracy test_loss best_epoch
parameters wall_s train_s samples_per_s peak_memory_mb flops_per_sample world_size device layers""".split()
QUICK = ("dataset=digits", "arch.widths=[32,24]", "trainer.epochs=2", "logger.console=off")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_the_folder_says_everything():
    result = lbp.run(*QUICK, "algo=dfa", "metrics.every=5")
    folder, summary = result.folder, json.loads((result.folder / "summary.json").read_text())
    assert (folder / "STATUS").read_text().strip() == "done" == summary["status"]
    assert set(KEYS) <= set(summary) and summary["test_accuracy"] == result.summary["test_accuracy"]
    assert (summary["algo"], summary["dataset"], summary["arch"], summary["seed"]) == ("dfa", "digits", "mlp", 0)
    assert list(summary["layers"]) == ["fc1", "fc2", "head"]
    for name in ("alignment_deg", "grad_norm", "weight_norm", "update_ratio", "activation_mean", "dead_fraction"):
        assert name in summary["layers"]["fc1"]
    assert summary["epochs"] == 2 and summary["steps"] == 2 * (1294 // 128)
    assert summary["parameters"] == 64 * 32 + 32 + 32 * 24 + 24 + 24 * 10 + 10
    assert yaml.safe_load((folder / "overrides.yaml").read_text()) == [*QUICK, "algo=dfa", "metrics.every=5"]
    meta = json.loads((folder / "meta.json").read_text())
    assert meta["determinism"]["level"] == "seeded" and meta["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    for checkpoint in ("last", "best"):
        torch.load(folder / f"checkpoints/{checkpoint}.pt", weights_only=True)
    assert not list(folder.rglob("*.tmp"))


def test_lines_are_unique_and_measured_when_asked():
    result = lbp.run(*QUICK, "algo=bp", "metrics.every=7")
    records = lines(result.folder)
    assert len({(r["split"], r["step"]) for r in records}) == len(records)
    steps = result.summary["steps"]
    assert [r["step"] for r in records if r["split"] == "train"] == sorted({1, *range(7, steps + 1, 7), steps})
    assert [r["epoch"] for r in records if r["split"] == "train_epoch"] == [1, 2]
    assert [r["split"] for r in records][-1] == "test"
    for record in records:
        if record["split"] == "train":  # backprop beside itself
            assert all(layer["alignment_deg"] == 0 for layer in record["layers"].values())
            assert record["total"]["grad_norm_ratio"] == 1


def test_training_flops_are_those_of_the_products():
    summary = lbp.run(*QUICK, "algo=bp").summary
    products = 64 * 32 + 32 * 24 + 24 * 10
    assert summary["flops_per_sample"] == 2 * (3 * products - 64 * 32)  # forward, weights, inputs but the first layer's


def test_best_epoch_is_chosen_on_validation():
    result = lbp.run(*QUICK, "algo=bp", "trainer.epochs=6", "optimizer.lr=0.05")
    validated = [r["accuracy"] for r in lines(result.folder) if r["split"] == "val"]
    assert result.summary["best_epoch"] == 1 + validated.index(max(validated))
    best = torch.load(result.folder / "checkpoints/best.pt", weights_only=True)
    assert best["state"]["epoch"] == result.summary["best_epoch"]
    without = lbp.run(*QUICK, "algo=bp", "dataset.val_size=0").summary
    assert "best_epoch" not in without and "val_accuracy" not in without


def test_same_seed_same_numbers_other_seed_others():
    first, again, other = (lbp.run(*QUICK, "algo=fa", f"seed={seed}").summary for seed in (3, 3, 4))
    assert first["test_loss"] == again["test_loss"] != other["test_loss"]


def test_regression_has_its_own_metric():
    summary = lbp.run("dataset=diabetes", "algo=bp", "trainer.epochs=30", "logger.console=off").summary
    assert "test_accuracy" not in summary and 0.2 < summary["test_r2"] < 0.8


def test_a_rule_that_diverges_says_so_and_keeps_the_weights():
    with pytest.raises(Diverged):
        lbp.run(*QUICK, "algo=bp", "optimizer=sgd", "optimizer.lr=1e30", "run.dir=there")
    assert Path("there/STATUS").read_text().strip() == "diverged"
    assert "Diverged" in Path("there/log.txt").read_text()


@pytest.mark.parametrize("wrong", [
    ("algo=elm", "dataset.loss=cross_entropy"), ("algo=forward_forward", "arch.norm=batch"),
    ("algo=forward_forward", "dataset=diabetes"), ("arch=lenet",), ("optimizer.feedback.lr=1", "algo=dfa"),
    ("algo=bp", "trainer.device=cuda") if not torch.cuda.is_available() else ("algo=elm", "dataset.loss=bce"),
])
def test_what_is_refused_writes_nothing(wrong):
    with pytest.raises(ConfigError):
        lbp.run("dataset=digits", *wrong)
    assert not Path("outputs").exists()


def test_a_taken_folder_is_refused():
    Path("mine").mkdir()
    with pytest.raises(ConfigError, match="exists already"):
        lbp.run(*QUICK, "run.dir=mine")
    assert not list(Path("mine").iterdir())


def test_rerun_gives_the_same_numbers():
    first = lbp.run(*QUICK, "algo=kp", "seed=5")
    from lbp.launch.one import run

    again = run(compose([], file=first.folder / "config.yaml"))
    for key in ("test_loss", "dataset", "algo", "arch"):
        assert again.summary[key] == first.summary[key]
    assert again.folder != first.folder


def test_eval_repeats_the_summary(capsys):
    result = lbp.run(*QUICK, "algo=local")
    evaluate_run(result.folder, "test", "last", [])
    assert f"accuracy {result.summary['test_accuracy']:.4f}" in capsys.readouterr().out
    with pytest.raises(ConfigError):
        evaluate_run(result.folder, "test", "last", ["algo.schedule=streaming"])
    (result.folder / "checkpoints/last.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(DataError, match="last.pt"):
        evaluate_run(result.folder, "test", "last", [])


@pytest.mark.parametrize("algo", ["dfa", "forward_forward"])
def test_the_export_predicts_as_the_rule_does_without_lbp(algo, tmp_path):
    result = lbp.run(*QUICK, f"algo={algo}")
    path = export_run(result.folder, "last", tmp_path / "net.pt2")
    x = torch.randn(7, 1, 8, 8)
    result.rule.eval()
    with torch.no_grad():
        assert torch.allclose(torch.export.load(path).module()(x), result.rule.predict(x), atol=1e-5)


def test_arrays_from_python():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(600, 6, generator=g)
    assert lbp.run("algo=dfa", "trainer.epochs=30", "logger.console=off", dataset=(x, (x[:, 0] > 0).long())).summary["test_accuracy"] > 0.9
    assert lbp.run("algo=bp", "trainer.epochs=30", "logger.console=off", dataset=(x.numpy(), (2 * x[:, 0]).numpy())).summary["test_r2"] > 0.9
    with pytest.raises(ConfigError, match="twice"):
        lbp.run("dataset=digits", dataset=(x, x[:, 0]))


def test_a_rule_on_a_users_own_network(capsys):
    runpy.run_path(str(ROOT / "examples/own_loop.py"), run_name="__main__")
    assert float(capsys.readouterr().out.split()[-1]) > 0.85


def test_rule_from_python_refuses_what_it_does_not_know():
    net = lbp.Network.of(torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)))
    task = lbp.Task(kind="classification", in_shape=(4,), outputs=2, classes=2)
    with pytest.raises(ConfigError, match="scale"):
        lbp.rule("dfa", net, task, scal=1.0)
    with pytest.raises(ConfigError, match="dfa"):
        lbp.rule("dfaa", net, task)
    with pytest.raises(Refused, match="elm"):
        lbp.rule("elm", net, task)


@pytest.mark.parametrize("precision", ["bf16", "fp64"])
def test_precisions_train(precision):
    summary = lbp.run(*QUICK, "algo=bp", f"trainer.precision={precision}", "optimizer.lr=0.01").summary
    assert summary["test_accuracy"] > 0.6


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # torch's compiler looks at it itself
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # and these are torch 2.13's compiler's own
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("algo", ["dfa", "fa"])
def test_compiled_blocks_give_the_same_network(algo):
    plain, compiled = (lbp.run(*QUICK, f"algo={algo}", f"trainer.compile={on}") for on in ("false", "true"))
    assert set(plain.rule.state_dict()) == set(compiled.rule.state_dict())
    assert compiled.summary["test_loss"] == pytest.approx(plain.summary["test_loss"], rel=1e-3)


def test_compile_without_a_compiler_is_refused(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(Refused, match="compiler"):
        lbp.run(*QUICK, "trainer.compile=true")
    assert not Path("outputs").exists()


def test_early_stopping_and_time_budget():
    stopped = lbp.run(*QUICK, "algo=bp", "trainer.epochs=200", "trainer.patience=2", "optimizer.lr=0.01").summary
    assert stopped["epochs"] == stopped["best_epoch"] + 2 < 200


@pytest.mark.parametrize("words, ended", [
    ([*QUICK, "algo=bp", "trainer.epochs=100000"], ""), ([*QUICK, "algo=readout", "trainer.epochs=100000"], "; not begun: read-out"),
    (["dataset=digits", "logger.wandb.mode=disabled", "algo=dzorb", "algo.sweeps=300", "arch.widths=[16,16]"], "; not begun: ")])
def test_a_time_budget_says_what_it_left_out(words, ended, capsys):
    run = lbp.run(*words, "trainer.max_minutes=0.005", "run.dir=run")
    said, = [line["warning"] for line in lines(run.folder) if "are over" in line.get("warning", "")]
    assert run.summary["train_s"] < 60 and said.startswith("trainer.max_minutes=0.005 are over: ended after ") and ended in said
    capsys.readouterr()
    assert cli.main(["resume", "run"]) == 0 and "trainer.max_minutes=N trains it for longer" in capsys.readouterr().out


def test_a_run_of_no_epochs_can_be_evaluated(capsys):
    lbp.run("dataset=digits", "logger.wandb.mode=disabled", "trainer.epochs=0", "arch.widths=[6]", "run.dir=run")
    evaluate_run(Path("run"), "test", "last", [])
    assert "checkpoint (epoch 0)" in capsys.readouterr().out


def test_without_validation_there_is_nothing_to_be_patient_with():
    with pytest.raises(ConfigError, match="trainer.patience=1: there is no validation"):
        lbp.run(*QUICK, "dataset.val_size=0", "trainer.patience=1")
    assert not Path("outputs").exists()


def test_an_export_is_whole_or_not_there(capsys, monkeypatch):
    lbp.run(*QUICK, "algo=bp", "run.dir=run")
    Path("net.pt2").write_text("earlier")
    for to, said in (("no/where.pt2", "cannot be written"), (".", "is there already, and no file")):
        assert cli.main(["export", "run", "--to", to]) == 2 and said in capsys.readouterr().err
    def full(*_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr("os.replace", full)
    assert cli.main(["export", "run", "--to", "net.pt2"]) == 5 and "the disk is full" in capsys.readouterr().err
    assert Path("net.pt2").read_text() == "earlier" and not list(Path().glob("*.tmp"))


def test_what_is_evaluated_is_normalised_as_it_was_trained(capsys):
    lbp.run(*QUICK, "algo=bp", "run.dir=run")
    for word in ("dataset.train_size=20", "dataset.normalize=unit", "trainer.epochs=9", "algo=fa"):
        with pytest.raises(ConfigError, match="cannot be changed for a trained run; free are trainer.device"):
            evaluate_run(Path("run"), "test", "last", [word])
    evaluate_run(Path("run"), "test", "last", ["trainer.device=cpu"])
    assert "normalised by" not in capsys.readouterr().out
    evaluate_run(Path("run"), "test", "last", ["dataset=digits"])
    assert "normalised by the mean and deviation of its own training split" in capsys.readouterr().out


def test_what_is_solved_is_not_trained_for_longer(capsys):
    lbp.run("dataset=digits", "algo=elm", "arch.widths=[16]", "run.dir=run", "logger.wandb.mode=disabled")
    capsys.readouterr()
    assert cli.main(["resume", "run"]) == 0 and capsys.readouterr().out == "run: done already, after 1 epochs\n"


@pytest.mark.parametrize("loss", ["cross_entropy", "mse", "bce"])
def test_losses_train(loss):
    assert lbp.run(*QUICK, "algo=bp", f"dataset.loss={loss}", "optimizer.lr=0.01", "trainer.epochs=5").summary["test_accuracy"] > 0.8


def test_wandb_offline_keeps_what_was_logged_in_the_run(tmp_path):
    result = lbp.run(*QUICK, "algo=dfa", "logger.wandb.mode=offline")
    assert list((result.folder / "wandb").rglob("*.wandb"))


def test_wandb_failing_costs_one_warning(monkeypatch, capsys):
    import wandb

    def broken(*args, **kwargs):
        raise RuntimeError("no service")

    monkeypatch.setattr(wandb, "init", broken)
    result = lbp.run(*QUICK[:-1], "algo=dfa", "logger.wandb.mode=offline")
    assert result.summary["status"] == "done" and capsys.readouterr().out.count("warning: W&B") == 1


def test_wandb_names_are_metric_and_layer():
    names = flat({"step": 7, "epoch": 1, "split": "train", "phase": "train", "loss": 0.5,
                  "layers": {"fc1": {"alignment_deg": 40.0}}, "total": {"alignment_deg": 30.0}})
    assert names == {"step": 7, "epoch": 1, "loss/train": 0.5, "alignment_deg/fc1": 40.0, "alignment_deg/total": 30.0}


def test_feedback_alignment_is_measured_a_layer_and_in_total():
    summary = lbp.run(*QUICK, "algo=fa").summary
    assert {name for name, layer in summary["layers"].items() if "feedback_alignment_deg" in layer} == {"fc2", "head"}
    assert 60 < summary["total"]["feedback_alignment_deg"] < 100  # two independent draws, hardly trained
    assert "feedback_alignment_deg" not in lbp.run(*QUICK, "algo=local").summary["total"]


@pytest.fixture(scope="session")
def noise(tmp_path_factory):
    """Noise in the files of MNIST and CIFAR-10, fewer images of it."""
    root = tmp_path_factory.mktemp("noise")
    write_mnist(root, 300, 50)
    folder = root / "cifar-10-batches-bin"
    folder.mkdir()
    for part in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        records = np.random.default_rng(0).integers(0, 256, (60, 3073), np.uint8)
        records[:, 0] %= 10
        (folder / f"{part}.bin").write_bytes(records.tobytes())
    (folder / "batches.meta.txt").write_text("".join(f"c{i}\n" for i in range(10)))
    return root


@pytest.mark.parametrize("name", registry.options("experiment"))
def test_every_experiment_composes_and_runs_two_steps(name, noise):
    config = compose([f"experiment={name}"])
    assert config.options["experiment"] == name
    batch = min(config.values["trainer"]["batch_size"], 32)     # two steps of fewer, for their time
    data = [f"dataset.root='{noise}'", "dataset.val_size=0"] if config.options["dataset"] in ("mnist", "cifar10") else []
    small = {"vgg8b": ["arch.width=0.0625"],     # at their widths a step takes half a minute
             "stack": ["arch.layers=['conv:4:3:2', relu, 'conv:4:3:2', relu, flatten]"]}.get(config.options["arch"], [])
    vectors = config.options["arch"] == "stack" and not data
    if vectors or "stop" in config.values["algo"] or isinstance(config.values["algo"].get("cuts"), list):   # cwc's, an epoch for each of its blocks; dni's
        small = []
    solves = registry.entry("algo", config.values["algo"]["name"]).facts["closed_form"]
    steps = [] if solves else [f"trainer.batch_size={batch}", "trainer.epochs=1"]
    result = lbp.run(f"experiment={name}", f"dataset.train_size={2 * batch}", *steps, "logger.console=off", *small, *data)
    assert result.summary["steps"] == (1 if solves else 2) * result.summary["epochs"]      # of rules with stages an epoch each


def test_an_interrupted_run_says_so(tmp_path):
    command = [sys.executable, "-m", "lbp", "train", "dataset=digits", "trainer.epochs=100000", "run.dir=there",
               "logger.wandb.mode=disabled"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        while not run.stdout.readline().startswith("epoch"):
            assert run.poll() is None
        run.send_signal(signal.SIGINT)
        _, errors = run.communicate(timeout=PATIENCE)
    assert run.returncode == 130 and "Traceback" not in errors
    assert Path("there/STATUS").read_text().strip() == "interrupted"


def test_a_closed_pipe_is_no_error():
    command = f"{sys.executable} -m lbp train dataset=digits trainer.epochs=3 logger.wandb.mode=disabled run.dir=there | head -n 1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert done.stdout.count("\n") == 1 and "Traceback" not in done.stderr and "Broken" not in done.stderr
    assert Path("there/STATUS").read_text().strip() == "done"
