"""`lbp reproduce`: what an experiment's `published:` may say, which runs count, and what the verdict is."""

import json
import os
import shutil
import subprocess
import sys
import uuid
from pathlib import Path

import pytest
from conftest import PATIENCE

import lbp
from lbp import cli, registry
from lbp.config import compose
from lbp.errors import ConfigError
from lbp.launch import folder as folders, sweep
from lbp.report import reproductions as report

ROOT = Path(lbp.__file__).parents[1]
PUBLISHED = """\
published:
  of: "Nobody 1999, table 1"
  source: https://example.org/log.txt
  checked: true
  minutes: 30
  seeds: 2
  figures:
    - {figure: val_accuracy, epoch: 1, value: 0.5, tolerance: 0.1}
    - {figure: test_accuracy, value: 0.9, tolerance: 1e-2}
"""


class Lab:
    """A plugin with an experiment `tiny` whose `published:` a test can write, and runs of it."""

    def __init__(self):
        self.package = f"lab_{uuid.uuid4().hex}"  # what a package has is read once a process
        self.file = Path(self.package, "conf/experiment/tiny.yaml")
        self.file.parent.mkdir(parents=True)
        Path(self.package, "__init__.py").touch()
        self.plugins = f"plugins=[{self.package}]"
        self.says(PUBLISHED)

    def says(self, text, before="trainer.epochs: 1\n"):
        self.file.write_text(f"# Tiny\nalgo: bp\ndataset: digits\narch.widths: [8]\n{before}{text}")
        registry._option.cache_clear()
        registry.use([self.package])

    def run(self, seed=0, accuracy=0.9, status="done", *typed, lines=(), **summary):
        """A run's folder as a run leaves it."""
        place = folders.create(compose(["experiment=tiny", self.plugins, f"seed={seed}", *typed])).folder
        (place / ".lock").touch()
        folders.set_status(place, status)
        lines = lines or [{"step": 9, "epoch": 1, "split": "val", "accuracy": 0.55}]
        (place / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        if status == "done":
            folders.write_json(place / "summary.json", {"status": status, "seed": seed, "epochs": 1, "test_accuracy": accuracy} | summary)
        return place

    def found(self):
        one, = report.reproductions(["tiny"], lambda name: compose([f"experiment={name}", self.plugins]).values)
        return one

    def lbp(self, *argv):
        return cli.main(["reproduce", self.plugins, *argv])


@pytest.fixture
def lab(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield Lab()
    registry.use(())


@pytest.fixture
def trials(lab, monkeypatch):
    """What would be run, and is here a folder at once."""
    ran = []

    def stand_in(trials, file=None, debug=False):
        ran.extend(trial.typed for trial in trials)
        for trial in trials:
            lab.run(trial.typed[-1].partition("=")[2], 0.905)
        return 0

    monkeypatch.setattr(sweep, "sweep", stand_in)
    return ran


# ---- what is published

def test_every_shipped_experiments_published_is_in_order():
    registry.use(())
    names = report.experiments()
    assert {f"biotorch_lenet_mnist_{rule}" for rule in ("bp", "fa", "dfa")} <= set(names)
    for name in names:
        said = report.published(name)
        assert said.source.startswith("https://") and "\n" not in said.of
        layers = [figure for figure in said.figures if figure.epoch]
        values = compose([f"experiment={name}"]).values
        epochs = values["trainer"]["epochs"] + values["algo"].get("warmup_epochs", 0)
        assert all(figure.epoch <= epochs for figure in layers)


def test_published_is_read_and_is_no_part_of_the_configuration(lab):
    said = report.published("tiny")
    assert said == report.Published("Nobody 1999, table 1", "https://example.org/log.txt", True, [
        report.Figure("val_accuracy", 0.5, 0.1, 1), report.Figure("test_accuracy", 0.9, 0.01)], "cpu", 30.0, 2)
    config = compose(["experiment=tiny", lab.plugins])
    assert "published" not in config.values and config.options["experiment"] == "tiny"
    lab.says("")
    assert compose(["experiment=tiny", lab.plugins]).values == config.values and "tiny" not in report.experiments()


@pytest.mark.parametrize("old, new, said", [
    ("checked: true", "checked: perhaps", "published.checked=perhaps: must be bool"), ("  checked: true\n", "", "published.checked: is missing"),
    ("minutes: 30", "minuets: 30", "published.minuets: unknown key; there are: of, source"), ("minuets", "minuets", "did you mean minutes?"),
    ("minutes: 30", "minutes: -1", "minutes=-1: must be float > 0"), ("seeds: 2", "seeds: 0", "seeds=0: must be int >= 1"),
    ("seeds: 2", "device: tpu", "device=tpu: must be cpu | cuda"), ("value: 0.9,", "", "published.figures[1].value: is missing"),
    ("value: 0.9,", "value: much,", "figures[1].value=much: must be float"), ("1e-2", "0", "figures[1].tolerance=0: must be float > 0"),
    ("val_accuracy", "accuracy", "figures[0].figure=accuracy: of an epoch there are test_X"), ("epoch: 1", "epoch: 0", "epoch=0: must be int >= 1"),
    (PUBLISHED[PUBLISHED.index("  figures"):], "  figures: []\n", "names no figure"), ("{figure: val", "{figures: val", "did you mean figure?"),
    (PUBLISHED, "published: 3\n", "published: must be a map of of, source"), ("of: \"", "of: [\"", "cannot be read"),
])
def test_what_is_wrong_with_it_is_told_with_file_and_key(lab, old, new, said):
    lab.says(PUBLISHED.replace(old, new) if old != new else PUBLISHED.replace("minutes", new))
    with pytest.raises(ConfigError) as error:
        report.published("tiny")
    assert any(said in problem and "tiny.yaml" in problem for problem in error.value.problems), error.value


def test_list_and_show_tell_it(lab, capsys):
    assert cli.main(["list", "experiments", lab.plugins]) == cli.main(["show", "experiment=tiny", lab.plugins]) == 0
    out = capsys.readouterr().out
    assert "published: Nobody 1999, table 1" in out and "source: https://example.org/log.txt" in out


# ---- which runs count

def test_a_run_counts_that_differs_in_nothing_but_what_is_free(lab):
    lab.run(0, 0.9, "done", "trainer.device=cpu", "trainer.threads=1", "trainer.checkpoint_every=5", "run.name=x",
            "logger.wandb.mode=offline", "launch.ranks=1", "dataset.root=/data")
    others = [lab.run(1, 0.9, "done", typed) for typed in ("trainer.compile=true", "optimizer.lr=0.5", "metrics.every=7")]
    begun = lab.run(1, 0.9, "done", f"run.init_from='{lab.file}'")  # no run.* at all, but other weights to begin with
    failed = lab.run(1, 0.9, "failed")
    plain = folders.create(compose([lab.plugins, "algo=bp", "dataset=digits", "arch.widths=[8]", "trainer.epochs=1"])).folder
    one = lab.found()
    assert list(one.runs) == ["0"] and one.state == "1 of 2 seeds"
    why = {run.folder: said for run, said in one.out}
    assert [why[folder] for folder in others] == ["trainer.compile=true", "optimizer.lr=0.5", "metrics.every=7"]
    assert why[begun].startswith("run.init_from=") and why[failed] == "failed" and plain not in why and len(why) == 5


def test_a_run_made_before_the_experiment_changed_does_not_count(lab):
    lab.run()
    assert lab.found().runs
    lab.says(PUBLISHED, "trainer.epochs: 1\noptimizer.lr: 0.5\n")
    one = lab.found()
    assert not one.runs and one.state == "not yet run" and one.out[0][1] == "optimizer.lr=0.001"
    lab.says(PUBLISHED.replace("value: 0.9,", "value: 0.7,"))  # what is published is no part of it
    assert lab.found().runs


def test_of_one_seed_the_newest_counts(lab):
    lab.run(0, 0.1)
    lab.run(0, 0.8)
    lab.run(0, 0.9, "interrupted")
    one = lab.found()
    assert one.measured[-1].values == [0.8] and sorted(why for _, why in one.out) == ["interrupted", "made again since"]


def test_a_torn_record_does_not_count(lab):
    file = lab.run() / "metrics.jsonl"
    file.write_bytes(file.read_bytes()[:-9])
    one = lab.found()
    assert not one.runs and "ends within a line" in one.out[0][1]


# ---- figures

def test_where_figures_come_from(lab):
    lab.says("""\
published:
  of: x
  source: y
  checked: true
  figures:
    - {figure: test_accuracy, epoch: 1, value: 1, tolerance: 1}
    - {figure: test_accuracy, epoch: 10, value: 1, tolerance: 1}
    - {figure: train_loss, epoch: 10, value: 1, tolerance: 1}
    - {figure: layers.fc1.alignment_deg, epoch: 1, value: 1, tolerance: 1}
    - {figure: layers.fc1.alignment_deg, epoch: 10, value: 1, tolerance: 1}
    - {figure: total.alignment_deg, epoch: 10, value: 1, tolerance: 1}
    - {figure: layers.fc1.alignment_deg, value: 1, tolerance: 1}
    - {figure: test_loss, value: 1, tolerance: 1}
""")

    def measured(*values):
        return {"layers": {"fc1": {"alignment_deg": values[0]}}, "total": {"alignment_deg": values[1]}}

    lines = [{"epoch": 1, "split": "train", **measured(80.0, 1.0)}, {"epoch": 1, "split": "train", **measured(70.0, 2.0)},
             {"epoch": 1, "split": "train_epoch", "loss": 3.0}, {"epoch": 1, "split": "val", "accuracy": 0.1},
             {"epoch": 1, "split": "test", "accuracy": 0.2}, {"epoch": 10, "split": "train", **measured(60.0, 3.0)},
             {"epoch": 10, "split": "train_epoch", "loss": 4.0, **measured(50.0, 4.0)}, {"epoch": 10, "split": "test", "accuracy": 0.3}]
    lab.run(lines=lines, layers={"fc1": {"alignment_deg": 40.0}})
    *values, missing = [one.values for one in lab.found().measured]
    assert values == [[0.2], [0.3], [4.0], [70.0], [50.0], [4.0], [40.0]] and missing == []
    assert lab.found().verdict == "tiny: not reproduced: " + "; ".join(
        f"{name} {value}, published 1 ± 1" for name, value in (
            ("train_loss (epoch 10)", "4.0000"), ("layers.fc1.alignment_deg (epoch 1)", "70.00"),
            ("layers.fc1.alignment_deg (epoch 10)", "50.00"), ("total.alignment_deg (epoch 10)", "4.0000"),
            ("layers.fc1.alignment_deg", "40.00"), ("test_loss", "is in none of the runs")))


@pytest.mark.parametrize("values, met", [([0.9], True), ([0.91, 0.91], True), ([0.89], True), ([0.86, 0.94], True), ([0.9101], False),
                                         ([0.9, 0.93], False), ([], False)])
def test_a_figure_is_met_by_the_mean_within_the_tolerance(values, met):
    assert report.Measured(report.Figure("test_accuracy", 0.9, 0.01), values).met is met


def test_states_and_verdicts(lab):
    assert lab.found().verdict == "tiny: not yet run"
    lab.run(0, 0.905)
    assert lab.found().verdict == "tiny: 1 of 2 seeds"
    lab.run(1, 0.895)
    assert lab.found().verdict == "tiny: reproduced (2 seeds)"
    lab.run(5, 0.75)  # every seed there is counts: whoever chooses seeds chooses no verdict
    assert lab.found().verdict == "tiny: not reproduced: test_accuracy 0.8500 ± 0.0867, published 0.9 ± 0.01"
    lab.says(PUBLISHED.replace("checked: true", "checked: false"))
    assert lab.found().verdict == "tiny: published (unverified): no verdict"
    assert not any("ok" in line.split() or "off" in line.split() for line in report.shown(lab.found(), 200))


# ---- the command

def test_the_list(lab, capsys):
    assert lab.lbp() == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("tiny"))
    assert row.split("  ") == ["tiny", *row.split("  ")[1:]] and "0.9 " in row and "not yet run" in row and row.endswith("30 min cpu")
    lab.says(PUBLISHED.replace("checked: true", "checked: false"))
    lab.run(0, 0.9)
    lab.run(1, 0.8)
    assert lab.lbp() == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("tiny"))
    for text in ("0.9 (unverified)", "0.8500 ± 0.0707 (2)", "published (unverified)"):
        assert text in row


def test_only_missing_seeds_are_run(lab, trials, capsys):
    lab.run(1, 0.905)
    assert lab.lbp("tiny", "--dry-run", "--seeds", "3") == 0 and trials == []
    assert "tiny: 2 runs (seeds 0, 2), about 60 min on two CPU cores" in capsys.readouterr().out
    assert lab.lbp("tiny", "trainer.device=cpu") == 0
    assert trials == [["experiment=tiny", lab.plugins, "trainer.device=cpu", "seed=0"]]
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "tiny: 1 run (seed 0), about 30 min on two CPU cores" and out[-1] == "tiny: reproduced (2 seeds)"
    row = next(line for line in out if line.startswith("test_accuracy"))
    assert row.split() == ["test_accuracy", "0.9", "0.01", "0.9050", "±", "0.0000", "(2)", "+0.0050", "ok"]
    trials.clear()
    assert lab.lbp("tiny") == 0 and trials == []
    out = capsys.readouterr().out.splitlines()
    assert "nothing to run" in out[0] and out[-1] == "tiny: reproduced (2 seeds)"
    assert lab.lbp("ti*", "--again") == 0 and [trial[-1] for trial in trials] == ["seed=0", "seed=1"]
    trials.clear()
    assert lab.lbp("tiny", "--seeds", "1,7") == 0 and [trial[-1] for trial in trials] == ["seed=7"]
    assert capsys.readouterr().out.splitlines()[-1] == "tiny: reproduced (3 seeds)"


@pytest.mark.parametrize("argv, said", [
    (["tiny", "trainer.epochs=3"], "trainer.epochs=3: it would be another experiment; lbp train experiment=tiny plugins=["),
    (["tiny", "algo=dfa"], "algo.name=dfa"), (["tiny", "run.init_from=x"], "another experiment"), (["tiny", "trainer.compile=true"], "another experiment"),
    (["tiny", "seed=1"], "--seeds"), (["tiny", "run.dir=x"], "outputs/"), (["tiny", "trainer.epoch=3"], "did you mean trainer.epochs?"),
    (["tiny", "--gpu", "3"], "no such flag"), (["tiny", "trainer.threads=1,2"], "-m"), (["tinny"], "did you mean tiny?"), (["x*"], "there are: "),
    (["plain"], "lbp train experiment=plain"), (["tiny", "--seeds", "two"], "how many"), (["tiny", "--seeds", "0"], "how many"),
    (["tiny", "--seeds", "1,,x"], "how many"), (["tiny", "--seeds", "5000000000,"], "< 4294967296"), (["tiny", "--seeds", "9" * 20], "10,000"),
    (["--seeds", "2"], "goes with the NAME"), (["--dry-run"], "goes with the NAME"), (["trainer.device=cpu"], "goes with the NAME"),
])
def test_refused(lab, trials, capsys, argv, said):
    (lab.file.parent / "plain.yaml").write_text("# Without a number\nalgo: bp\n")
    registry._options.cache_clear()
    assert lab.lbp(*argv) == 2
    out, err = capsys.readouterr()
    assert said in err and "Traceback" not in err and out == "" and trials == [] and not Path("outputs").exists()


def test_under_torchrun_nothing_is_started(lab, trials, monkeypatch, capsys):
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert lab.lbp("tiny") == 2 and trials == [] and "in each rank" in capsys.readouterr().err


def test_the_sweeps_exit_code_is_the_commands(lab, monkeypatch, capsys):
    for code, last in ((1, "tiny: not yet run"), (143, "tiny: 2 runs (seeds 0, 1), about 60 min on two CPU cores")):
        monkeypatch.setattr(sweep, "sweep", lambda *_, **__: code)
        assert lab.lbp("tiny") == code
        assert capsys.readouterr().out.splitlines()[-1] == last


def test_markdown(lab, trials, capsys):
    lab.says(PUBLISHED.replace("val_accuracy", "test_accuracy"))  # in none of the runs
    assert lab.lbp("tiny", "--markdown", "-") == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[2:] == [
        "| tiny | [Nobody 1999, table 1](https://example.org/log.txt) | test_accuracy (epoch 1) | 0.5 | 0.1 | - | 0 | not reproduced |",
        "| tiny | [Nobody 1999, table 1](https://example.org/log.txt) | test_accuracy | 0.9 | 0.01 | 0.9050 ± 0.0000 | 2 | reproduced |"]
    assert "about 60 min" in err and "tiny: not reproduced: test_accuracy (epoch 1) is in none of the runs" in err
    assert lab.lbp("--markdown", "all.md") == 0 and "tiny" in capsys.readouterr().out
    assert out.splitlines()[2] in Path("all.md").read_text() and "biotorch" in Path("all.md").read_text()
    assert lab.lbp("--markdown", "no/where.md") == 2


@pytest.mark.parametrize("columns", [20, 60, 80])
def test_a_narrow_terminal(lab, columns, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    lab.run(0, 0.9)
    lab.run(1, 0.8)
    assert lab.lbp() == lab.lbp("tiny") == 0
    lines = capsys.readouterr().out.splitlines()
    lines = lines[:lines.index("tiny: nothing to run, these seeds are there already")] + lines[-8:-1]
    assert all(len(line) <= columns or len(line.split()) <= 2 for line in lines), "\n".join(lines)


def test_the_shell_is_offered_names(lab, capsys):
    assert cli.main(["--complete", "reproduce", "biotorch_lenet_mnist_d"]) == 0
    assert capsys.readouterr().out == "biotorch_lenet_mnist_dfa\n"
    assert cli.main(["--complete", "reproduce", "--seeds", ""]) == 0 and capsys.readouterr().out == ""
    assert cli.main(["--complete", "reproduce", "--a"]) == 0 and capsys.readouterr().out == "--again\n"


def cpu_of(*argv):
    """Seconds of the best of three, and whether torch or Hydra was imported."""
    code = ("import sys\nfrom lbp.cli import main\ncode = main(sys.argv[1:])\n"
            "print(sorted({'torch', 'numpy', 'hydra', 'rich'} & set(sys.modules)), file=sys.stderr)\nsys.exit(code)")
    best = 9.0
    for _ in range(3):
        before = os.times()
        done = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True, timeout=PATIENCE, check=True,
                              env=os.environ | {"PYTHONPATH": str(ROOT)})
        after = os.times()
        best = min(best, after.children_user + after.children_system - before.children_user - before.children_system)
    return best, done.stderr.splitlines()[-1], done.stdout


def test_listing_is_quick(lab):
    best, heavy, _ = cpu_of("reproduce")
    assert best < 0.3 and heavy == "[]"
    first = lab.run()
    for i in range(1000):
        folder = first.with_name(f"{i:06}-x-{i:06x}")
        shutil.copytree(first, folder)
        if i % 2:
            meta = (folder / "meta.json").read_text()
            (folder / "meta.json").write_text(meta.replace('"tiny"', '"other"'))
    best, heavy, out = cpu_of("reproduce", lab.plugins)
    assert best < 2 and heavy == "['hydra']" and "1 of 2 seeds" in out


def test_from_nothing_to_a_verdict(lab):
    lab.says(PUBLISHED.replace("tolerance: 0.1", "tolerance: 0.5").replace("1e-2", "0.9"))
    command = [sys.executable, "-m", "lbp", "reproduce", "tiny", lab.plugins, "trainer.threads=1", "logger.wandb.mode=disabled"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False,
                          env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("tiny: 2 runs (seeds 0, 1), about 60 min") and lines[-1] == "tiny: reproduced (2 seeds)"
    assert [line.split()[-1] for line in lines if line.startswith(("val_acc", "test_acc"))] == ["ok", "ok"]
    assert len(list(Path("outputs").glob("*/*-sweep-*/*/summary.json"))) == 2
