"""lbp search: spaces, budgets, trials that fail, are pruned or killed, several processes on one folder."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from conftest import PATIENCE, configuration
from lbp import knobs, registry
from lbp.config import compose, dimension
from lbp.errors import ConfigError, DataError
from lbp.launch.search import RECORD, RESULT, _table, plans, resume, search

ROOT = Path(__file__).parents[1]
# In place of a trial: three epochs whose accuracy falls with the distance of optimizer.lr from 0.01. STUB says how it ends (an exit
# code), SLEEP how long each epoch takes; both may depend on the trial's number.
STAND_IN = """#!{python} -S
import json, math, os, signal, sys, time
if sys.argv[2] != "lbp":    # no forks of it: each trial is started anew
    sys.exit(1)
verb, words = sys.argv[3], sys.argv[4:]
if verb == "resume":
    folder = words[0]
    lr = float(open(folder + "/lr").read())
else:
    words = dict(word.partition("=")[::2] for word in words)
    folder, lr = words["run.dir"].strip("'"), float(words.get("optimizer.lr", "0.01"))
    os.makedirs(folder + "/checkpoints")
    open(folder + "/lr", "w").write(str(lr))
open(folder + "/pid", "w").write(str(os.getpid()))
number = int(os.path.basename(folder)[:3])
def status(text):
    open(folder + "/STATUS", "w").write(text)
def end(*_):
    status("interrupted")
    os._exit(143)
signal.signal(signal.SIGTERM, end)
with open(os.path.dirname(folder) + "/started", "a") as file:
    file.write(f"{{verb}} {{os.path.basename(folder)}}\\n")
status("running")
code = eval(os.environ.get("STUB", "0"))
if code in (2, 3):
    print("lbp: something is refused")
if code == 9:
    os.kill(os.getpid(), 9)
elif code:
    status("diverged" if code == 4 else "failed")
    sys.exit(code)
value = 1 - abs(math.log10(lr) + 2) / 4
with open(folder + "/metrics.jsonl", "w", buffering=1) as file:
    for epoch in (1, 2, 3):
        time.sleep(eval(os.environ.get("SLEEP", "0")))
        file.write(json.dumps({{"step": epoch, "epoch": epoch, "split": "train_epoch", "phase": "train"}}) + "\\n")
        file.write(json.dumps({{"step": epoch, "epoch": epoch, "split": "val", "accuracy": value * epoch / 3}}) + "\\n")
        open(folder + "/checkpoints/last.pt", "w").close()
open(folder + "/summary.json", "w").write(json.dumps({{"best_test_accuracy": value / 2}}))
status("done")
"""


@pytest.fixture
def trial(tmp_path, monkeypatch):
    stub = tmp_path / "python"
    stub.write_text(STAND_IN.format(python=sys.executable))
    stub.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(stub))
    monkeypatch.chdir(tmp_path)
    return stub


def of(folder, algo="dfa"):
    return json.loads((folder / RESULT).read_text())["algos"][algo]


def tuned(*words, trials=8, minutes=None, sampler="random", pruner="none", folder="s"):
    return search([*words, f"run.dir={folder}"], trials, minutes, sampler, pruner)


# ---- spaces

@pytest.mark.parametrize("algo", [name for name, path in registry.options("algo").items() if path.is_relative_to(ROOT / "conf")])
def test_every_rule_declares_its_space(algo):
    """Keys that it has, values that they allow, its own settings among them: a control without a search would be compared unfairly."""
    declared, values = registry.option("algo", algo).search, configuration(algo)
    assert 1 <= len(declared) <= 4
    for key, text in declared.items():
        one, (group, *inside) = dimension(f"{key}={text}"), key.split(".")
        spec = registry.option(group, algo if group == "algo" else values[group]["name"]).knobs[inside[-1]].spec
        choices = [yaml.safe_load(choice) for choice in one.choices]
        assert not any(knobs.check(key, value, spec) for value in choices or (one.low, one.high))
        now = (values[group] | (values[group][inside[0]] if len(inside) == 2 else {}))[inside[-1]]
        assert now in choices if choices else one.low <= now <= one.high, key


def test_what_is_typed_narrows_and_widens_the_space():
    (plan,), _ = plans(["algo=dfa", "optimizer.lr=0.01", "seed=3"])
    assert [one.key for one in plan.dimensions] == ["algo.scale"] and plan.standing == {"algo.scale": 1.0}
    assert plan.words({"algo.scale": 0.123456}) == ["algo=dfa", "optimizer.lr=0.01", "seed=3", "algo.scale=0.1235"]
    (plan,), _ = plans(["algo=dfa", "optimizer.lr=tag(log, interval(1e-2, 1))", "arch.widths=choice([8],[8, 8])", "trainer.batch_size=int(interval(8, 64))",
                        "optimizer=adam,sgd"])
    assert {one.key: (one.low, one.high, one.log) for one in plan.dimensions if not one.choices} == {
        "optimizer.lr": (0.01, 1.0, True), "trainer.batch_size": (8, 64, False), "algo.scale": (0.1, 10.0, True)}
    assert {one.key: one.choices for one in plan.dimensions if one.choices} == {"arch.widths": ("[8]", "[8,8]"), "optimizer": ("adam", "sgd")}
    assert plan.standing == {"algo.scale": 1.0, "optimizer": "adam"}  # the learning rate lies outside, widths are others
    (bp, kp), _ = plans(["algo=bp,kp", "optimizer=adam", "launch.slots=2"])
    assert [one.key for one in kp.dimensions] == ["optimizer.lr", "algo.scale", "algo.decay"] and bp.overrides == ["algo=bp", "optimizer=adam"]
    assert plans(["algo=dni"])[0][0].standing["optimizer.feedback.lr"] == 0.001     # as the optimizer's


@pytest.mark.parametrize("words, said", [
    (["algo=dfa", "optimizer.lr=0.1", "algo.scale=1"], "nothing is left to search"), (["algo=dfa", "seed=1,2"], "seed=1,2: is one for all trials"),
    (["dataset.val_size=0"], "a search chooses by validation"), (["algo.scale=interval(-1,1)"], r"algo.scale=-1.0: must be float > 0 \(of algo.scale"),
    (["algo.scale=interval(2,1)"], "from a smaller number to a greater"), (["algo.scale=tag(log,interval(0,1))"], "above 0"),
    (["trainer.batch_size=interval(8,64)"], "must be int >= 1"), (["algo.error=full,sgn"], "algo.error=sgn: must be full"),
    (["algo=dfa,dfaa"], "no such algo"), (["optimizer.rl=interval(0,1)"], "unknown key"), (["launch=slurm"], "a search runs on this machine"),
    (["algo={name: dfa, scale: 2}"], "one by one"), (["algo=elm", "optimizer.lr=interval(0.1,1)"], "solves in closed form"),
    (["algo=random_readout"], "its space is not declared"), (["algo.scale=tag(log,choice(1,2))"], "about an interval"), (["--epochs=5"], "no such flag"), (["dataset=iris,wine"], "is one for all"),
])
def test_wrong_spaces(words, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=said):
        search(words, 5, None, "tpe", "none")
    assert not list(tmp_path.iterdir())


def test_without_optuna_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ConfigError, match=r"pip install 'lbp\[search\]'"):
        search(["algo=dfa"], 5, None, "tpe", "none")
    assert not list(tmp_path.iterdir())


# ---- searches

def test_a_search_from_end_to_end(trial, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("STUB", "{2: 1, 3: 4, 4: 9}.get(number, 0)")
    assert tuned("algo=dfa", "dataset=digits", "seed=1", sampler="tpe", trials=9) == 0
    out, err = capsys.readouterr()
    found, folder = of(tmp_path / "s"), tmp_path / "s"
    assert (found["trials"], found["completed"], found["pruned"], found["failed"]) == (9, 6, 1, 2)
    assert "dfa 2/9" in err and "failed (exit code 1); its log: s/002-dfa.log" in err and "was killed by signal 9" in err and "dfa 3/9" in out
    best = found["best"]
    assert best["value"] == max(value for value in found["values"] if value is not None) and best["test"] == pytest.approx(best["value"] / 2)
    assert found["standing"] == pytest.approx(0.75)     # the first trial is the rule as it stands: 0.001
    assert found["importance"]["optimizer.lr"] > found["importance"]["algo.scale"] and sum(found["importance"].values()) == pytest.approx(1)
    command = best["command"].split()
    assert command[:2] == ["lbp", "train"] and best["command"] in out and (folder / "search.png").stat().st_size > 5000
    assert compose(command[2:]).values["optimizer"]["lr"] == float((folder / f"{best['trial']:03}-dfa/lr").read_text())
    assert {"-".join(run.split()) for run in (folder / "started").read_text().splitlines()} == {f"train-{n:03}-dfa" for n in range(1, 10)}

    # the same command with a greater budget goes on with it; its own order of trials does not depend on where it was stopped
    written = {run: (run / "metrics.jsonl").stat().st_mtime_ns for run in folder.glob("*-dfa") if (run / "metrics.jsonl").exists()}
    assert tuned("algo=dfa", "dataset=digits", "seed=1", sampler="tpe", trials=11) == 0
    assert all((run / "metrics.jsonl").stat().st_mtime_ns == at for run, at in written.items()) and of(folder)["trials"] == 11
    assert tuned("algo=dfa", "dataset=digits", "seed=1", sampler="tpe", trials=11, folder="t") == 0
    assert of(tmp_path / "t")["values"] == of(folder)["values"]
    assert resume(folder, []) == 0 and len((folder / "started").read_text().splitlines()) == 11     # nothing is left to do
    with pytest.raises(ConfigError, match="other settings for dfa"):
        tuned("algo=dfa", "dataset=digits", "seed=2", sampler="tpe", trials=11)
    with pytest.raises(ConfigError, match="goes on with its own settings"):
        resume(folder, ["seed=2"])


def test_the_best_rule_stands_first():
    one = {"best": None, "standing": None, "trials": 1, "pruned": 0, "failed": 0, "minutes": 0.0}
    found = {"fa": one | {"best": {"value": -0.1048}}, "lost": one, "bp": one | {"best": {"value": 0.2}}, "dfa": one | {"best": {"value": -0.0896}}}
    assert [line.split()[0] for line in _table(found) if line.split()[0] in found] == ["bp", "dfa", "fa", "lost"]


def test_rules_take_turns_and_get_the_same_budget(trial, tmp_path, capsys):
    assert tuned("algo=bp,dfa,elm", trials=3) == 0
    assert [line[10:] for line in (tmp_path / "s/started").read_text().splitlines()] == ["bp", "dfa", "elm"] * 3
    out = capsys.readouterr().out
    assert all(of(tmp_path / "s", algo)["trials"] == 3 for algo in ("bp", "dfa", "elm")) and out.count(": lbp train algo=") == 3
    assert tuned("algo=bp,dfa", trials=None, minutes=0.005, folder="m") == 0    # 0.3 s of trials each
    assert all(of(tmp_path / "m", algo)["minutes"] >= 0.005 and of(tmp_path / "m", algo)["trials"] < 30 for algo in ("bp", "dfa"))


def test_what_is_refused_once_is_not_tried_thirty_times(trial, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("STUB", "2")
    assert tuned("algo=dfa") == 1
    assert of(tmp_path / "s")["trials"] == 1 and "no trial was completed; something is refused" in capsys.readouterr().err


def test_hopeless_trials_are_pruned(trial, tmp_path, monkeypatch, capsys):
    """Once five are there, one below their median ends after its first epoch: with 1e-6 it would sleep for a minute."""
    monkeypatch.setenv("SLEEP", "60 * (lr < 1e-5 and epoch == 2 and number > 5)")
    assert tuned("algo=bp", "optimizer.lr=choice(0.01,0.02,0.005,1e-6)", pruner="median", trials=10) == 0
    found, out = of(tmp_path / "s", "bp"), capsys.readouterr().out
    assert found["pruned"] >= 1 and found["pruned"] + found["completed"] == 10
    assert out.count("optimizer.lr=1e-06: pruned after epoch 1") == found["pruned"] and (tmp_path / "s/started").read_text().count("\n") == 10


# ---- killed, and several at once: processes of their own

def test_a_damaged_journal(trial, tmp_path):
    """Half a line is what a full disk left, and is dropped; other damage is told, and what came of the search stays."""
    assert search(["algo=dfa", "run.dir=s"], 3, None, "random", "median") == 0
    journal = tmp_path / "s" / RECORD
    whole = journal.read_bytes()
    journal.write_bytes(whole + b'{"op_code":6,"wor')
    assert search(["algo=dfa", "run.dir=s"], 4, None, "random", "median") == 0 and journal.read_bytes().startswith(whole) and of(tmp_path / "s")["completed"] == 4
    with pytest.raises(ConfigError, match="launch.ranks=2: a search goes on with its own settings; free are launch.slots"):
        resume(tmp_path / "s", ["launch.ranks=2"])
    found = (tmp_path / "s" / RESULT).read_text()
    for damaged, said in ((whole + b"x\n", "damaged"), (b"x\n" + whole, "damaged"), (b"", "no search was begun")):
        journal.write_bytes(damaged)
        with pytest.raises(DataError, match=said):
            resume(tmp_path / "s", [])
        assert (tmp_path / "s" / RESULT).read_text() == found


def begin(trial, *words, **environment):
    script = f"import sys\nsys.executable = {str(trial)!r}\nfrom lbp.launch import search\n" \
             "search._importance = lambda rule: {}\nfrom lbp.cli import main\nsys.exit(main(sys.argv[1:]))"
    return subprocess.Popen([os.path.realpath("/proc/self/exe"), "-c", script, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            process_group=0, env=os.environ | environment | {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])})


def test_two_processes_share_a_search_and_one_is_killed(trial, tmp_path):
    """No number twice, none lost, what is done stays, and what the dead one left is gone on with from its checkpoint."""
    words = ("search", "--trials", "10", "--sampler", "random", "--pruner", "none", "algo=dfa", "run.dir=s", "launch.slots=2")
    killed = begin(trial, *words, SLEEP="0 if number < 4 else 60 if epoch == 2 else 0")
    started = tmp_path / "s/started"
    while not started.exists() or started.read_text().count("\n") < 5 or not (tmp_path / "s/005-dfa/checkpoints/last.pt").exists():
        assert killed.poll() is None
        time.sleep(0.02)
    killed.kill()   # with two trials in their second epoch, which live on
    killed.communicate()
    for run in ("004-dfa", "005-dfa"):
        os.kill(int((tmp_path / "s" / run / "pid").read_text()), signal.SIGKILL)
    done = {run: (run / "metrics.jsonl").stat().st_mtime_ns for run in (tmp_path / "s").glob("00[123]-dfa")}
    both = [begin(trial, "resume", "s", "launch.slots=2", SLEEP="0.1"), begin(trial, *words, SLEEP="0.1")]
    ended = [process.communicate(timeout=PATIENCE) for process in both]
    assert [process.returncode for process in both] == [0, 0], ended
    assert "locked" not in str(ended) and all((run / "metrics.jsonl").stat().st_mtime_ns == at for run, at in done.items())
    assert sorted(started.read_text().splitlines()) == sorted(
        [*(f"train {number:03}-dfa" for number in range(1, 11)), "resume 004-dfa", "resume 005-dfa"])
    found = of(tmp_path / "s")
    assert found["trials"] == found["completed"] == 10


def test_a_stopped_search_leaves_its_trials_to_be_gone_on_with(trial, tmp_path):
    stopped = begin(trial, "search", "--trials", "3", "--sampler", "random", "algo=dfa", "run.dir=s", SLEEP="60 if number == 2 and epoch == 2 else 0")
    while not (tmp_path / "s/002-dfa/checkpoints/last.pt").exists():
        assert stopped.poll() is None
        time.sleep(0.02)
    stopped.send_signal(signal.SIGTERM)
    out, err = stopped.communicate(timeout=PATIENCE)
    assert stopped.returncode == 143 and "lbp resume s goes on" in err and of(tmp_path / "s")["completed"] == 1
    assert resume(tmp_path / "s", []) == 0 and of(tmp_path / "s")["completed"] == 3
    assert (tmp_path / "s/started").read_text().split("\n")[1:4] == ["train 002-dfa", "resume 002-dfa", "train 003-dfa"]
