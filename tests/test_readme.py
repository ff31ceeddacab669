"""Every command of the README does what the README says."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import warm

ROOT = Path(__file__).parents[1]
LINES = [line.strip() for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("    ")]
COMMANDS = [line.partition("  #")[0] for line in LINES if line.startswith("lbp ")]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """One folder for all the commands, which follow one another."""
    return tmp_path_factory.mktemp("readme")


@pytest.mark.parametrize("command", COMMANDS)
def test_command(command, workplace):
    done = warm.lbp(shlex.split(command)[1:], workplace)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr and done.stdout


def test_there_are_two_make_commands_and_they_are_targets():
    named = {line.split()[1] for line in LINES if line.startswith("make ")}
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M))
    assert named == {"train", "test"} <= targets


def test_make_train(tmp_path):
    """With the environment that `make` made and these tests run in; making it is what `make test` began with."""
    if not Path(sys.prefix, "ready").exists():
        pytest.skip("these tests do not run in the environment that make makes")
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / ".venv").symlink_to(sys.prefix)
    done = subprocess.run(["make", "--no-print-directory", "train", "-o", "pyproject.toml"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *_, score, place = done.stdout.splitlines()
    assert re.match(r"test accuracy 0\.[89]\d+", score)
    assert (tmp_path / place.removeprefix("result: ") / "summary.json").exists()


def test_files_that_the_readme_links_to_exist():
    for path in re.findall(r"\]\(([^)]+)\)", (ROOT / "README.md").read_text()):
        assert (ROOT / path).exists(), path
