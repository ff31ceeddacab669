"""The commands: exit codes, what they print, and that they answer without torch."""

import errno
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from conftest import PATIENCE

import lbp
from lbp import cli, registry
from lbp.errors import ConfigError, DataError, Diverged, OutOfResources
from lbp.launch.runs import find_run

ROOT = Path(lbp.__file__).parents[1]


pytestmark = pytest.mark.usefixtures("elsewhere")


def command(*argv, env=None):
    """`lbp argv` in a process of its own."""
    return subprocess.run([sys.executable, "-m", "lbp", *argv], capture_output=True, timeout=PATIENCE, text=True,
                          env=os.environ | {"PYTHONPATH": str(ROOT)} | (env or {}))


# ---- wrong commands

WRONG = [  # typed, what stderr has
    (["train", "algo=dfaa"], "did you mean dfa?"), (["train", "dataset=mnits"], "did you mean mnist"),
    (["train", "algo.lrr=1"], "there are: algo."), (["train", "epoch=5"], "did you mean trainer.epochs?"),
    (["train", "+epoch=5"], "did you mean trainer.epochs?"), (["train", "--epochs", "5"], "write trainer.epochs=5"),
    (["train", "--epochs=5"], "write trainer.epochs=5"), (["train", "--batch-size", "5"], "write trainer.batch_size=5"),
    (["train", "-lr", "5"], "write optimizer.lr=5"),
    (["train", "algo=bp,dfa"], "needs -m"), (["train", "-m", "algo=bp,dfaa"], "did you mean dfa?"),
    (["train", "--config", "none.yaml"], "none.yaml"), (["train", "--config"], "--config"),
    (["train", "5"], "key=value"), (["train", "trainer.epochs=-1", "--debug"], "must be int >= 0"),
    (["trian"], "did you mean train?"), (["algo=bp"], "lbp train algo=bp"), (["--nonsense"], "give a command"),
    (["list", "algo"], "did you mean algos?"), (["list", "trains"], "there are: algos"), (["list", "algos", "more"], "no such argument"),
    (["show"], "GROUP=OPTION"), (["show", "algo=dfaa"], "did you mean dfa?"), (["show", "algos=bp", "agol=bp"], "did you mean algo?"),
    (["eval"], "RUN"), (["eval", "last"], "no run"), (["eval", "last", "--split", "tset"], "--split"), (["rerun", "nope"], "no such run"),
    (["export", "last"], "no run"), (["export", "last", "--checkpoint", "first"], "--checkpoint"),
]


@pytest.mark.parametrize("argv, said", WRONG, ids=[" ".join(argv) for argv, _ in WRONG])
def test_wrong_commands(argv, said, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["lbp"])
    assert cli.main(argv) == 2
    out, err = capsys.readouterr()
    assert said in err and all(line.startswith("lbp: ") for line in err.splitlines()) and out == ""
    assert list(tmp_path.iterdir()) == []


def test_nothing_but_training_imports_torch(tmp_path):
    script = textwrap.dedent("""
        import sys
        from lbp.cli import main
        for argv in (["list"], ["show", "algo=dfa", "optimizer=adam"], ["list", "algos"], ["trian"], []):
            main(argv)
        assert not {"torch", "hydra", "omegaconf", "yaml", "rich", "importlib.metadata"} & set(sys.modules)
        for argv in (["train", "algo=dfaa", "epoch=5"], ["train", "-m", "algo=bp,dfaa"], ["eval", "last"], ["rerun", "x"],
                     ["train", "-m", "--dry-run", "algo=bp,dfa"]):
            print(main(argv))
        assert "hydra" in sys.modules and not {"torch", "numpy", "wandb", "rich"} & set(sys.modules)
        """)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=PATIENCE,
                          env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-7:] == ["2", "2", "2", "2", "trial 1/2: algo=bp", "trial 2/2: algo=dfa", "0"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("argv", [["--version"], ["--help"], ["list"], ["show", "algo=dfa"]], ids=" ".join)
def test_looking_takes_under_three_tenths_of_a_second(argv):
    best = 9.0
    for _ in range(2):
        before = os.times()
        assert command(*argv).returncode == 0
        after = os.times()
        best = min(best, after.children_user + after.children_system - before.children_user - before.children_system)
    assert best < 0.3


# ---- looking

def test_list(capsys):
    for kinds, kind in cli.LISTS.items():
        assert cli.main(["list", kinds]) == 0
        out = capsys.readouterr().out
        assert all(any(line.split()[0] == name for line in out.splitlines()) for name in registry.options(kind))
    assert cli.main(["list"]) == 0
    out = capsys.readouterr().out
    assert all(f"({kind}=)" in out for kind in cli.LISTS.values())
    cli.main(["list", "algos"])
    assert "feedback; Nokland" in capsys.readouterr().out


@pytest.mark.parametrize("columns", [20, 40, 80])
def test_lists_keep_to_the_width(columns, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    for argv in (["list", "optimizers"], ["list", "algos"], ["show", "trainer"]):
        assert cli.main(argv) == 0
        words = [line for line in capsys.readouterr().out.splitlines() if len(line) > columns]
        assert all(len(line.split()) <= 2 for line in words), words  # only what cannot be broken sticks out


def test_show(capsys):
    assert cli.main(["show", "algo=kp", "trainer", "--yaml"]) == 0
    assert registry.options("algo")["kp"].read_text().rstrip() in capsys.readouterr().out
    assert cli.main(["show", "algo=kp"]) == 0
    out = capsys.readouterr().out
    knob = registry.option("algo", "kp").knobs["scale"]
    for text in ("family: feedback", "paper: ", "weight transport: no", "prefers: optimizer=sgd", f"algo.scale={knob.default}",
                 knob.spec, knob.doc):
        assert text in out


def test_help_and_version():
    assert command("--version").stdout.strip() == f"lbp {lbp.__version__}"
    for argv in (["--help"], ["train", "--help"], ["eval", "-h"]):
        done = command(*argv)
        assert done.returncode == 0 and "usage: lbp" in done.stdout and done.stderr == ""
    assert command().returncode == 2


@pytest.mark.parametrize("env", [{"LC_ALL": "C", "PYTHONIOENCODING": "ascii"}, {"TERM": "dumb"}, {"NO_COLOR": "1"}], ids=str)
def test_any_terminal_will_do(env):
    done = command("train", "run.name=größe", "epöch=3", env=env)
    assert done.returncode == 2 and "Traceback" not in done.stderr and "lbp: ep" in done.stderr
    done = command("list", env=env)
    assert done.returncode == 0 and "\x1b" not in done.stdout and done.stderr == ""


def test_a_closed_pipe_is_quiet():
    done = subprocess.run(f'"{sys.executable}" -m lbp list | head -1', shell=True, capture_output=True, text=True, timeout=PATIENCE,
                          env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"})
    assert done.stderr == "" and len(done.stdout.splitlines()) == 1


# ---- exit codes

class OutOfMemoryError(RuntimeError):
    """Called like torch's."""


@pytest.mark.parametrize("error, code, said", [
    (ConfigError("one", "two"), 2, "lbp: one\nlbp: two\n"), (DataError("no file"), 3, "lbp: no file\n"), (Diverged("nan"), 4, "lbp: nan\n"),
    (OutOfResources("full"), 5, "lbp: full\n"), (MemoryError(), 5, "trainer.batch_size"), (OutOfMemoryError("CUDA"), 5, "CUDA"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 5, "out of memory"),
    (OSError(errno.ENOSPC, "No space left", "/x"), 5, "disk is full: /x"), (KeyboardInterrupt(), 130, "lbp: interrupted"),
    (ZeroDivisionError("x / 0"), 1, "lbp: a bug in lbp or a plugin: ZeroDivisionError: x / 0 (--debug"), (OSError(13, "denied"), 1, "denied"),
])
def test_errors_become_exit_codes(error, code, said, capsys, monkeypatch):
    def fail(*_):
        raise error
    monkeypatch.setattr(cli, "_start", fail)
    assert cli.main(["train"]) == code
    err = capsys.readouterr().err
    assert said in err and "Traceback" not in err
    for argv in (["train", "--debug", "seed=1"], ["--debug", "train"], ["train", "seed=1", "--debug"]):
        monkeypatch.setattr(sys, "argv", ["lbp", *argv])
        assert cli.main(argv) == code
        assert "Traceback" in capsys.readouterr().err


def test_train_and_rerun_hand_over_what_was_typed(monkeypatch, tmp_path):
    got = []
    monkeypatch.setattr(cli, "_start", lambda compose, dry: got.append((compose(), dry)))
    assert cli.main(["train", "algo=bp", "--dry-run", "seed=3", "--debug"]) == 0
    assert got[0][0].typed == ["algo=bp", "seed=3"] and got[0][1] is True
    run = tmp_path / "outputs" / "2026-01-01" / "101010-bp"
    run.mkdir(parents=True)
    got[0][0].values["run"]["dir"] = str(run)
    (run / "config.yaml").write_text(got[0][0].yaml())
    (run / "STATUS").write_text("done\n")
    assert cli.main(["rerun", "last", "trainer.epochs=2"]) == 0
    values = got[1][0].values
    assert values["seed"] == 3 and values["trainer"]["epochs"] == 2 and values["run"]["dir"] is None
    assert cli.main(["train", "--config", str(run / "config.yaml"), "run.dir=x"]) == 0
    assert got[2][0].values["run"]["dir"] == "x" and got[2][0].options["algo"] == "bp"


# ---- finding runs

def test_find_run(tmp_path):
    for name in ("2026-01-01/101010-bp-iris-s0-aaaaaa", "2026-01-01/101010-bp-iris-s1-bbbbbb", "2026-01-02/090000-fa-iris-s0-cccccc",
                 "2026-01-01/120000-sweep-dddddd/1-seed-0"):
        (tmp_path / "outputs" / name).mkdir(parents=True)
        (tmp_path / "outputs" / name / "config.yaml").write_text("seed: 0")
    assert find_run("last").name == "090000-fa-iris-s0-cccccc"
    assert find_run("09").name == find_run("2026-01-02/").name == find_run("outputs/2026-01-02/090000-fa-iris-s0-cccccc").name
    assert find_run("1-seed").name == "1-seed-0"
    for text, said in (("101010", "2 runs begin so"), ("090000-fb-iris-s0-cccccc", "did you mean 090000-fa"), ("outputs", "config.yaml"),
                       ("", "no such run"), ("../x", "no such run"), ("x" * 300, "no such run")):
        with pytest.raises(ConfigError, match=said):
            find_run(text)


def test_the_matrix_says_who_trains_what_and_why_not():
    from lbp.launch.matrix import lines, matrix

    archs = registry.options("arch")
    found = matrix(["bp", "ldrl"])     # test_contracts tries all of them
    assert all(found["bp", arch] is None for arch in archs) and "ResidualUnit" in found["ldrl", "resnet20"]
    shown = lines(["ldrl", "random_readout"])
    assert len(shown[0].split()) == len(archs) and any(line.startswith("ldrl with resnet20: ") for line in shown)
