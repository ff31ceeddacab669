"""Where and how exactly a run computes: device, precision, threads, determinism, and what is known to break it."""

from __future__ import annotations

import hashlib
import os
import platform
import random
import resource
import sys
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass

import numpy as np
import torch

from lbp import ranks
from lbp.errors import ConfigError


@dataclass(frozen=True)
class Environment:
    """The device, the dtype of weights and data, and the determinism level with what it leaves open."""

    device: torch.device
    dtype: torch.dtype
    precision: str
    determinism: str
    caveats: tuple[str, ...]

    def autocast(self) -> AbstractContextManager:
        """bf16: matrix products in bfloat16, weights and sums in fp32."""
        return torch.autocast(self.device.type, torch.bfloat16) if self.precision == "bf16" else nullcontext()

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def peak_memory_mb(self) -> float:
        """The greatest memory so far: of the GPU's allocations on CUDA, else of the process."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**20
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / (2**20 if sys.platform == "darwin" else 2**10)

    def described(self) -> str:
        many = f"{ranks.world()} ranks of " if ranks.world() > 1 else ""
        return (f"{many}{hardware(self.device)}, {torch.get_num_threads()} threads, {self.precision}, "
                f"determinism {self.determinism} ({'; '.join(self.caveats)})")


def prepare(trainer: dict, seed: int) -> Environment:
    """Sets torch up for this process and says what it set. Raises ConfigError for a device that is not there."""
    device = trainer["device"]
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("trainer.device=cuda: this machine has no usable CUDA device; use trainer.device=cpu")
    number, beside = ranks.local()
    if device == "cuda" and beside > torch.cuda.device_count():
        raise ConfigError(f"launch.ranks={beside}: this machine has {torch.cuda.device_count()} CUDA device(s), one for each rank; "
                          "use fewer ranks, or trainer.device=cpu")
    if trainer["threads"]:
        torch.set_num_threads(trainer["threads"])
    elif beside > 1 or "LBP_THREADS" in os.environ:     # a trial's share, where several are run at a time
        torch.set_num_threads(max(1, int(os.environ.get("LBP_THREADS", len(os.sched_getaffinity(0)))) // beside))
    # Dead ReLU units leave optimizer moments that decay into denormal numbers, on which CPUs are several times slower.
    torch.set_flush_denormal(True)
    level = trainer["determinism"]
    torch.backends.cudnn.benchmark = level == "off"
    torch.backends.cudnn.deterministic = level == "strict"
    if level == "strict":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if torch.are_deterministic_algorithms_enabled() != (level == "strict"):     # the setting imports torch's compiler, 2.5 s
        torch.use_deterministic_algorithms(level == "strict")
    torch.set_float32_matmul_precision("high" if level == "off" else "highest")
    caveats = {
        "off": ("autotuned kernels and TF32 on a GPU",),
        "seeded": ("atomic additions on a GPU",) if device == "cuda" else (),
        "strict": (),
    }[level] + ("holds for this hardware, torch version and thread count",)
    seed_all(seed, "start")
    dtype = torch.float64 if trainer["precision"] == "fp64" else torch.float32
    if device == "cuda":
        torch.cuda.set_device(number)
    return Environment(torch.device(device, number) if device == "cuda" else torch.device(device), dtype, trainer["precision"], level, caveats)


def generators() -> dict:
    """The state of every ambient generator, as plain things."""
    kind, keys, *rest = np.random.get_state()
    state = {"torch": torch.get_rng_state(), "python": random.getstate(),
             "numpy": (kind, torch.from_numpy(keys.astype(np.int64)), *rest)}
    return state | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


def set_generators(state: dict) -> None:
    torch.set_rng_state(state["torch"])
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])


def seed_all(seed: int, purpose: str) -> None:
    """Seeds every ambient generator for one purpose, so that more draws for one never move another."""
    value = int.from_bytes(hashlib.sha256(f"{purpose}:{seed}".encode()).digest()[:4])
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)


def hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        with open("/proc/cpuinfo") as info:
            return next(line.split(":")[1].strip() for line in info if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version(), "platform": platform.platform()}
    for name in ("lbp", "torch", "numpy", "hydra-core", "omegaconf", "wandb"):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
