"""What the pages say is done by these tests as it stands there: files are written, commands are run, in their order."""

import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import PATIENCE

import warm

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
FILE = re.compile(r"^`([\w./-]+)`\n\n```\w+\n(.*?)```$", re.M | re.S)
TOOLS = {"lbp": ["-m", "lbp"], "torchrun": ["-m", "torch.distributed.run"], "pip": ["-m", "pip"]}


def commands(page: Path) -> list[str]:
    return [line.strip() for line in page.read_text().splitlines() if re.match(f"    ({'|'.join(TOOLS)}) ", line)]


@pytest.mark.parametrize("page", [p for p in PAGES if commands(p)], ids=lambda p: p.stem)
def test_following_a_page_works(page, tmp_path, monkeypatch):
    for name, text in FILE.findall(page.read_text()):
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    installs = any(command.startswith("pip ") for command in commands(page))     # for interpreters that start later
    for command in commands(page):
        tool, *words = shlex.split(command)
        if tool == "pip":  # beside the environment of these tests, not into it
            words += ["--quiet", "--disable-pip-version-check", "--target", str(tmp_path / "installed")]
            monkeypatch.setenv("PYTHONPATH", str(tmp_path / "installed"))
        if tool == "lbp" and not installs and "wandb" not in page.stem:     # whose last words come as an interpreter ends
            done = warm.lbp(words, tmp_path)
        else:
            done = subprocess.run([sys.executable, *TOOLS[tool], *words], cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"


def test_links_lead_somewhere():
    for page in PAGES:
        for path in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            assert path.startswith("http") or (page.parent / path).exists(), f"{page.name}: {path}"


def test_the_catalogue_is_what_the_registries_say():
    """Out of date? python scripts/catalogue.py > docs/catalogue.md"""
    spec = importlib.util.spec_from_file_location("catalogue", ROOT / "scripts/catalogue.py")
    spec.loader.exec_module(catalogue := importlib.util.module_from_spec(spec))
    assert (ROOT / "docs/catalogue.md").read_text() == catalogue.page()
