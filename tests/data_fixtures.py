"""Small sets and files for tests of data."""

import os
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lbp.datasets.data import Arrays


def real_root(*needs: str) -> Path:
    """The folder with real data that holds all of `needs`; skips the test by name where there is none."""
    places = [os.environ.get("LBP_DATA"), Path(__file__).resolve().parents[2] / "shared" / "data"]
    for place in places:
        if place and all((Path(place) / need).exists() for need in needs):
            return Path(place)
    pytest.skip(f"needs {', '.join(needs)} in $LBP_DATA or ../shared/data")


def images(n=60, classes=3, size=6, channels=2, seed=0) -> Arrays:
    rng = np.random.default_rng(seed)
    return Arrays(rng.integers(0, 256, (n, channels, size, size), dtype=np.uint8), np.arange(n) % classes,
                  kind="image", classes=[f"c{i}" for i in range(classes)])


def vectors(n=60, width=4, classes=3, seed=0) -> Arrays:
    rng = np.random.default_rng(seed)
    return Arrays(rng.normal(3, 2, (n, width)), np.arange(n) % classes,
                  classes=[f"c{i}" for i in range(classes)])


def idx_bytes(array: np.ndarray) -> bytes:
    head = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    return head + array.astype(np.uint8).tobytes()


def write_mnist(root: Path, n=30, n_test=10) -> dict[str, np.ndarray]:
    """A tiny set in MNIST's files; returns what was written."""
    rng, raw, made = np.random.default_rng(0), root / "MNIST" / "raw", {}
    raw.mkdir(parents=True)
    for part, count in (("train", n), ("t10k", n_test)):
        made[f"{part}-images-idx3-ubyte"] = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        made[f"{part}-labels-idx1-ubyte"] = (np.arange(count) % 10).astype(np.uint8)
    for name, array in made.items():
        (raw / name).write_bytes(idx_bytes(array))
    return made


def write_tree(base: Path, counts: dict[str, int], size=(8, 8), seed=0) -> dict[Path, np.ndarray]:
    """PNGs in a folder for each class; returns each file's (H, W, 3) pixels."""
    rng, made = np.random.default_rng(seed), {}
    for name, count in counts.items():
        (base / name).mkdir(parents=True)
        for i in range(count):
            pixels = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(base / name / f"{i:03d}.png")
            made[base / name / f"{i:03d}.png"] = pixels
    return made
