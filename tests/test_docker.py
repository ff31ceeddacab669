"""What can be said of the image without an engine to build it: docs/docker.md tells what was tried."""

import fnmatch
import json
import re
import shlex
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "docker.md").read_text()
LINES = [line for line in (ROOT / "Dockerfile").read_text().splitlines() if not line.startswith("#")]
STEPS = [step.split(None, 1) for step in "\n".join(LINES).replace("\\\n", " ").splitlines() if step]


def the(word: str) -> list[str]:
    return [rest for name, rest in STEPS if name == word]


def ignored(path: str) -> bool:
    """As Docker reads .dockerignore: the last pattern that fits the path or a folder of it decides."""
    parts, result = path.split("/"), False
    heads = ["/".join(parts[:i]) for i in range(1, len(parts) + 1)]
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        if line and not line.startswith("#"):
            pattern = line.lstrip("!")
            anywhere, pattern = pattern.startswith("**/"), pattern.removeprefix("**/")
            tried = parts if anywhere else [h for h in heads if h.count("/") == pattern.count("/")]
            if any(fnmatch.fnmatchcase(h, pattern) for h in tried):
                result = not line.startswith("!")
    return result


def copied() -> list[tuple[str, str]]:
    return [(source, words[-1]) for words in map(str.split, the("COPY")) for source in words[:-1]]


def test_the_image_gets_all_that_the_wheel_is_made_of_and_nothing_else():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert sorted(s for s, _ in copied()) == sorted(
        {"pyproject.toml", project["project"]["readme"], *wheel["packages"], *wheel["force-include"]})
    for source, to in copied():
        assert (ROOT / source).exists() and not ignored(source), source
        assert to == ("/src/" if (ROOT / source).is_file() else f"/src/{source}")
        assert not ignored(f"{source}/a/b.py") and ignored(f"{source}/a/__pycache__")
    for path in (".git", ".venv", "outputs", "data", "data/MNIST", "tests/test_docker.py", "docs", "wandb", ".env", "shared"):
        assert ignored(path), path


def test_it_installs_lbp_on_the_torch_that_was_asked_for():
    needs = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    torch, lbp = (shlex.split(run) for run in the("RUN") if "pip install" in run)
    assert lbp[:5] == ["pip", "install", "--no-cache-dir", "/src", "&&"]
    assert torch[:5] == ["pip", "install", "--no-cache-dir", "--index-url", "$TORCH_INDEX"]
    assert torch[5:7] == [n for n in needs if re.match("torch(vision)?>", n)]   # else pip would fetch another with lbp
    assert the("ARG")[0] == "TORCH_INDEX=https://download.pytorch.org/whl/cpu"
    first = STEPS.index(["COPY", the("COPY")[0]])
    assert first > next(i for i, step in enumerate(STEPS) if "$TORCH_INDEX" in step[1])    # an edit does not fetch torch again


def test_docker_run_is_the_command_line_of_a_user_without_rights():
    assert [json.loads(e) for e in the("ENTRYPOINT")] == [["lbp"]] and not the("CMD")     # exec form: lbp hears SIGTERM
    user, = the("USER")
    assert int(user) > 0 and f"useradd --uid {user} " in " ".join(the("RUN"))    # a number: Kubernetes sees that it is not root
    assert STEPS.index(["USER", user]) > max(i for i, step in enumerate(STEPS) if step[0] in ("RUN", "COPY"))


def test_mounts_and_environment_are_what_the_page_says():
    env = dict(pair.split("=") for pair in the("ENV")[0].split())
    volumes, workdir = json.loads(the("VOLUME")[0]), the("WORKDIR")[0]
    assert volumes == [env["LBP_DATA"], f"{workdir}/outputs"]
    writable = next(run for run in the("RUN") if "chmod 1777" in run).split("chmod 1777")[1].split()
    assert {*volumes, workdir} <= {*writable} and env["HOME"] == "/tmp"
    assert {"HOME", "USER", "PYTHONUNBUFFERED"} <= env.keys()
    runs = re.findall("^    docker run .*", PAGE, re.MULTILINE)
    assert {to for run in runs for to in re.findall(r'-v "[^":]+:([^":]+)"', run)} == {*volumes}
    for name in re.findall(r"\b(LBP_\w+|PYTHON[A-Z]+)\b", PAGE):
        assert name in env, name
    args = {a.split("=")[0] for a in the("ARG")}
    assert args == {*re.findall(r"--build-arg (\w+)=", PAGE)}


def test_the_pages_commands_are_commands_of_lbp():
    from lbp import config

    runs = [shlex.split(line) for line in PAGE.splitlines() if line.startswith("    docker run ")]
    assert len(runs) >= 5
    for words in runs:
        image = next(i for i, word in enumerate(words) if word in ("lbp", "lbp-gpu"))
        command, *rest = words[image + 1 :]
        assert command in ("train", "resume", "doctor"), words
        if command == "train":
            config.compose(rest)    # raises where a name or a value is wrong
