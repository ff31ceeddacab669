"""Imports point one way, and what must answer at once imports no torch."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# folder or file of lbp -> what of lbp it may import (itself always); errors may be imported by all
ALLOWED = {
    "errors": set(),
    "ranks": set(),
    "interrupt": {"ranks"},
    "knobs": set(),
    "registry": {"knobs"},
    "config": {"knobs", "registry"},
    "datasets": {"knobs", "ranks", "registry"},
    "archs": set(),
    "algos": {"archs", "knobs", "ranks", "registry"},   # the registry for algo=mixed, which is made of other rules
    "metrics": {"archs", "ranks"},
    "logs": set(),
    "training": {"algos", "archs", "datasets", "interrupt", "logs", "metrics", "ranks", "registry"},
    "launch": {"config", "datasets", "interrupt", "knobs", "logs", "ranks", "registry", "report", "training"},    # report: a sweep's table
    "api": {"algos", "archs", "config", "datasets", "launch", "registry", "training"},
    "report": {"knobs", "registry"},
    "cli": {"config", "interrupt", "knobs", "registry", "launch", "report"},
}


def imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def modules():
    return [p for p in (ROOT / "lbp").rglob("*.py") if p.name not in ("__init__.py", "__main__.py")]


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_one_way(path):
    part = path.relative_to(ROOT / "lbp").parts[0].removesuffix(".py")
    ours = {name.split(".")[1] for name in imports(path) if name.startswith("lbp.")}
    assert ours <= ALLOWED[part] | {part, "errors"}


def test_only_config_knows_hydra():
    assert [p.name for p in modules() if any(n.startswith("hydra") for n in imports(p))] == ["config.py"]


def test_rules_know_no_configuration_and_no_logger():
    for path in (ROOT / "lbp/algos").rglob("*.py"):
        assert not any(n.split(".")[0] in ("hydra", "omegaconf", "wandb") for n in imports(path)), path


def test_reports_are_made_without_torch():
    for path in (ROOT / "lbp/report").rglob("*.py"):
        assert not {n.split(".")[0] for n in imports(path)} & {"torch", "numpy", "hydra", "omegaconf", "wandb"}, path


@pytest.mark.parametrize("command", ["--help", "--version", "list", "list archs", "show algo=dfa", "list runs", "compare", "completion bash",
                                     "--complete train trainer.ep"])
def test_quick_commands_import_no_torch(command):
    code = ("import sys; sys.argv = ['lbp', *sys.argv[1:]]\nfrom lbp.cli import main\n"
            "try: main()\nexcept SystemExit: pass\n"
            "print(sorted({m.split('.')[0] for m in sys.modules} & {'torch', 'hydra', 'wandb', 'torchvision', 'numpy'}))")
    out = subprocess.run([sys.executable, "-c", code, *command.split()], capture_output=True, text=True, check=True).stdout
    assert out.splitlines()[-1] == "[]"


def test_a_report_imports_no_torch(tmp_path):
    (tmp_path / "outputs/run").mkdir(parents=True)
    (tmp_path / "outputs/run/STATUS").write_text("failed\n")
    (tmp_path / "outputs/run/metrics.jsonl").write_text('{"step": 1, "epoch": 1, "split": "train", "loss": 1.0}\n')
    (tmp_path / "outputs/run/config.yaml").write_text("seed: 0\n")
    code = "import sys\nfrom lbp.cli import main\nmain(['report'])\nprint(sorted(set(sys.modules) & {'torch', 'hydra', 'wandb', 'matplotlib.pyplot'}), 'matplotlib' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}).stdout
    assert out.splitlines()[-1] == "[] True" and "<svg" in (tmp_path / "outputs/run/report.html").read_text()
