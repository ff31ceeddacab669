"""MNIST's file format, and the sets that come in it: torchvision's folder layout, its addresses and
checksums."""

import gzip
import math
import os
import struct
from pathlib import Path
from typing import BinaryIO

import numpy as np

from lbp.datasets.data import Arrays
from lbp.datasets.fetch import fetch_for
from lbp.datasets.sources import optional, reading

WHAT = "images-idx3", "labels-idx1"


def idx_images(name: str, root: Path, folder: str, classes: list[str]) -> Arrays:
    """
    Training and test images (N, 1, H, W) uint8 of `root/folder/raw/*-ubyte[.gz]`.

    Missing files are fetched from where `torchvision.datasets.<folder>` has them. Raises DataError.
    """
    raw = root / folder / "raw"
    stems = [f"{part}-{what}-ubyte" for part in ("train", "t10k") for what in WHAT]
    missing = [f"{stem}.gz" for stem in stems if present(raw, stem) is None]
    if missing:
        source = getattr(optional("torchvision.datasets", name), folder)
        md5 = dict(source.resources)
        for i, file in enumerate(missing):
            also = "".join(f", and {other} (md5 {md5[other]})" for other in missing[i + 1:])
            fetch_for(name, [mirror + file for mirror in source.mirrors], raw / file, md5[file],
                      f"{also}, packed or not (dataset.root or LBP_DATA is the folder that holds {folder}/)")
    x, y, x_test, y_test = (read_idx(present(raw, stem)) for stem in stems)
    return Arrays(x[:, None], y.astype(np.int64), x_test[:, None], y_test.astype(np.int64), "image", classes)


def read_idx(file: Path) -> np.ndarray:
    """
    The uint8 array of an IDX file, plain or gzipped.

    A .gz is held to the checksum inside it: the published MD5 would refuse the same images packed anew. A
    plain file has none, so its header must agree with its length. Raises DataError.
    """
    with reading(file), (gzip.open if file.suffix == ".gz" else open)(file, "rb") as f:
        return parse_idx(f, file.name)


def parse_idx(f: BinaryIO, name: str) -> np.ndarray:
    """Magic 0, 0, type 8, dimensions (as many as `name` says); big-endian sizes; bytes."""
    zero, kind, dims = struct.unpack(">HBB", f.read(4))
    if zero or kind != 8 or dims != int(name.split("idx")[1][0]):
        raise ValueError("its first bytes are not those of the format")
    shape = struct.unpack(f">{dims}I", f.read(4 * dims))
    if math.prod(shape) > 1 << 33:
        raise ValueError(f"it claims {shape} values")
    array = np.empty(shape, np.uint8)
    held = f.readinto(memoryview(array.reshape(-1)))
    if held != array.size:
        raise ValueError(f"it should hold {array.size:,} values and holds {held:,}")
    if f.read(1):
        raise ValueError(f"it should hold {array.size:,} values and holds more")
    return array


def present(raw: Path, stem: str) -> Path | None:
    return next((file for file in (raw / stem, raw / f"{stem}.gz") if os.path.isfile(file)), None)
