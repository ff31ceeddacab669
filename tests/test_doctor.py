"""What `lbp doctor` finds: each fault that it knows is made here, and told with its remedy."""

import importlib.metadata
import json
import os
from pathlib import Path

import pytest

from lbp import cli, registry
from lbp.launch import doctor

SEEN = {module: {"error": None} for module in doctor.PACKAGES.values()} | {
    "threads": {"count": 1}, "cuda": {"built": None, "there": False, "devices": []}}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("COLUMNS", "LBP_DATA", "WANDB_API_KEY", "WANDB_BASE_URL", "NETRC", "CXX", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    yield
    registry.use(())


def only(found):
    found = list(found)
    assert len(found) == 1
    return found[0]


def wrong(found):
    found = [finding for finding in found if finding.level == "wrong"]
    assert all(finding.remedy for finding in found)
    return found


# ---- the whole

def test_this_machine(capsys, monkeypatch):
    """The real probe, once."""
    assert cli.main(["doctor"]) == 0, capsys.readouterr().out
    lines = capsys.readouterr().out.splitlines()
    assert all(line[:6].strip() in ("ok", "note") for line in lines[:-1]) and lines[-1] == "nothing wrong"
    for package in doctor.PACKAGES:
        assert any(line.startswith(f"ok    {package} {importlib.metadata.version(package)}") for line in lines), package
    assert not Path("outputs").exists()


def test_one_wrong_thing_is_exit_code_1_and_lines_keep_to_the_width(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "probe", lambda: SEEN | {"rich": {"error": "ImportError: no rich"}})
    monkeypatch.setenv("COLUMNS", "40")
    assert cli.main(["doctor"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "1 wrong" and any(line.startswith("wrong rich") for line in lines)
    assert all(len(line) <= 40 or len(line.split()) == 1 for line in lines)


def test_overrides_go_with_repeat(capsys):
    assert cli.main(["doctor", "algo=bp"]) == 2
    assert "--repeat" in capsys.readouterr().err


# ---- packages

def test_a_crash_of_a_package_is_told_of_that_package(tmp_path, monkeypatch):
    (tmp_path / "crashes.py").write_text("import os; os.kill(os.getpid(), 11)\n")
    (tmp_path / "sound.py").write_text("")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(doctor, "PACKAGES", {"sound": "sound", "nothere": "nothere", "crashes": "crashes", "after": "after"})
    monkeypatch.setattr(doctor, "_version", lambda package: "1.0")
    seen = doctor.probe()
    assert seen["sound"]["error"] is None and "ModuleNotFoundError" in seen["nothere"]["error"]
    assert "crashed (exit code -11)" in seen["crashes"]["error"] and "after" not in seen
    said = [finding.text for finding in wrong(doctor.packages(seen))]
    assert [text.split()[0] for text in said] == ["nothere", "crashes", "after"] and "earlier package crashed" in said[2]


def test_a_torchvision_for_another_torch(monkeypatch):
    error = "RuntimeError: operator torchvision::nms does not exist"
    finding = only(wrong(doctor.packages(SEEN | {"torchvision": {"error": error}})))
    assert error in finding.text and importlib.metadata.version("torch") in finding.text
    assert "pip install --upgrade torch torchvision" in finding.remedy and "built for" in finding.remedy


def test_missing_and_old_packages(monkeypatch):
    monkeypatch.setattr(doctor, "_version", {"wandb": None, "rich": "1.0", "hydra-core": "1.4.0"}.get)
    monkeypatch.setattr(doctor, "PACKAGES", {"wandb": "wandb", "rich": "rich", "hydra-core": "hydra"})
    said = {finding.text: finding.remedy for finding in wrong(doctor.packages(SEEN))}
    assert said["wandb is not installed"].startswith("pip install --upgrade 'wandb>=")
    assert any(text.startswith("rich 1.0, and lbp needs >=") for text in said)
    assert any(text.startswith("hydra-core 1.4.0, and lbp needs ") for text in said)


@pytest.mark.parametrize("version, spec, fit", [
    ("2.15.0", ">=2.11", True), ("2.9", ">=2.11", False), ("1.3.8", ">=1.3.4,<1.4", True), ("1.4.0", ">=1.3.4,<1.4", False), ("2.15.0+cu132", ">=2.15", True),
    ("1.4", "<1.4.0", False), ("2.15.0", "==2.15.0", True), ("2.14.1", "==2.15.0", False), ("3", "", True), ("1.2.3", "==1.2.*", True)])
def test_bounds_of_versions(version, spec, fit):
    assert doctor.fits(version, spec) is fit


# ---- the machine

def test_a_gpu_that_torch_cannot_use(monkeypatch):
    monkeypatch.setattr(doctor.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    assert "without CUDA" in only(wrong(doctor.devices(SEEN))).text
    built = SEEN | {"cuda": {"built": "13.2", "there": False, "devices": []}}
    assert "too old" in only(wrong(doctor.devices(built))).text
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert not wrong(doctor.devices(built)) and any("hides" in finding.text for finding in doctor.devices(built))
    there = SEEN | {"cuda": {"built": "13.2", "there": True, "devices": [["H200", 140 << 30]]}, "matmul": {"error": None}}
    assert "1 CUDA device: H200 (140 GiB)" in list(doctor.devices(there))[1].text
    assert "no kernel image" in only(wrong(doctor.devices(there | {"matmul": {"error": "no kernel image"}}))).text


@pytest.mark.parametrize("omp, count, level", [("1", 1, "ok"), ("many", 1, "wrong"), ("0", 1, "wrong"), ("64", 4096, "note"), (None, 1, "ok")])
def test_threads(omp, count, level, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS") if omp is None else monkeypatch.setenv("OMP_NUM_THREADS", omp)
    finding = only(doctor.threads(count))
    assert finding.level == level and f"OMP_NUM_THREADS={omp or 'unset'}" in finding.text and bool(finding.remedy) == (level != "ok")


def test_a_container_with_less_time_than_cores(monkeypatch):
    monkeypatch.setattr(doctor, "_quota", lambda: 0.5)
    finding = only(doctor.threads(2))
    assert finding.level == "note" and "OMP_NUM_THREADS=1" in finding.remedy and "time on 0.5 of them" in finding.text


def test_where_runs_are_written(tmp_path, monkeypatch):
    assert only(doctor.disk()).level == "ok" and not Path("outputs").exists()
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 2**20}))
    assert "make room" in only(wrong(doctor.disk())).remedy
    Path("outputs").write_text("")
    assert "no folder" in only(wrong(doctor.disk())).text
    Path("outputs").unlink()

    def refuse(**_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(doctor.tempfile, "TemporaryFile", refuse)
    assert "Permission denied" in only(wrong(doctor.disk())).text


def test_data(tmp_path, monkeypatch):
    embedded = [finding.text for finding in doctor.data() if finding.level == "ok"]
    assert any("mnist5k" in text for text in embedded) and any("digits, iris" in text for text in embedded)
    assert list(doctor.data())[-1].level == "note"
    monkeypatch.setenv("LBP_DATA", str(tmp_path / "typo"))
    assert "typo is no folder" in only(wrong(doctor.data())).text
    (tmp_path / "typo/MNIST/raw").mkdir(parents=True)
    (tmp_path / "typo/cats/train").mkdir(parents=True)
    assert "mnist," not in list(doctor.data())[-1].text
    (tmp_path / "typo/MNIST/raw/train-images-idx3-ubyte.gz").touch()
    finding = list(doctor.data())[-1]
    assert finding.level == "ok" and "data: mnist, cats/ (dataset=imagefolder" in finding.text


def test_a_key_for_wandb_is_found_and_not_shown(tmp_path, monkeypatch):
    assert only(doctor.wandb()).level == "note"
    monkeypatch.setenv("WANDB_API_KEY", "s3cret")
    assert only(doctor.wandb()).level == "ok" and "s3cret" not in only(doctor.wandb()).text
    monkeypatch.delenv("WANDB_API_KEY")
    netrc = tmp_path / ".netrc"
    netrc.write_text("machine api.wandb.ai login user password s3cret\n")
    netrc.chmod(0o600)
    assert only(doctor.wandb()).level == "ok"
    netrc.write_text("machine [broken\n")
    assert only(doctor.wandb()).level == "note"


def test_a_compiler(monkeypatch):
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    assert doctor.compiler().level == "note"
    monkeypatch.setenv("CXX", "nope++")
    assert "CXX=nope++" in doctor.compiler().text


def test_a_broken_plugin(tmp_path, monkeypatch):
    assert only(doctor.configuration()).level == "ok"
    package = tmp_path / "brokenplugin"
    (package / "conf/algo").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "conf/algo/lonely.yaml").write_text("name: lonely\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    registry.use(["brokenplugin"])
    assert "algo=lonely" in only(wrong(doctor.configuration())).text


# ---- the same twice

def train(monkeypatch, weights, code=0, level="seeded"):
    """Stands in for `lbp train`: leaves a folder whose weights are the next of `weights`."""
    def run(command, **_):
        import torch

        from lbp.training import checkpoint

        folder = Path(json.loads(command[-1].removeprefix("run.dir=")))
        if not code:
            (folder / "checkpoints").mkdir(parents=True)
            checkpoint.write(folder / "checkpoints/last.pt",
                             dict.fromkeys(checkpoint.PARTS, {}) | {"rule": {"w": torch.tensor([weights.pop(0)])}})
            (folder / "meta.json").write_text(json.dumps({"options": {"algo": "dfa"}, "device": "cpu", "threads": 1,
                                                          "determinism": {"level": level, "caveats": ["c"]}}))
        return type("Done", (), {"returncode": code, "stderr": "lbp: algo=dfaa: no such algo\n", "stdout": ""})

    monkeypatch.setattr(doctor.subprocess, "run", run)


def test_repeat_tells_the_same_from_the_almost_same(monkeypatch):
    train(monkeypatch, [1.0, 1.0])
    same = doctor.repeated([])
    assert same.level == "ok" and "determinism seeded (c)" in same.text
    train(monkeypatch, [1.0, 1.0000001])
    other = doctor.repeated([])
    assert other.level == "wrong" and "different weights" in other.text and "strict" in other.remedy
    train(monkeypatch, [0.0, -0.0], level="off")
    assert doctor.repeated([]).level == "note"  # none was promised
    train(monkeypatch, [], code=2)
    failed = doctor.repeated(["algo=dfaa"])
    assert failed.level == "wrong" and "no such algo" in failed.text and "algo=dfaa" in failed.remedy


def test_repeat(monkeypatch, tmp_path):
    """Two real runs."""
    finding = doctor.repeated(["algo=fa", "trainer.device=cpu", "dataset.train_size=256"])
    assert finding.level == "ok" and "runs of fa" in finding.text and "determinism seeded" in finding.text
    assert list(tmp_path.iterdir()) == [] or os.listdir(tmp_path) == [".cache"]
