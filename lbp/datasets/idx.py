"""MNIST's file format, and the sets that come in it: torchvision's folder layout, its addresses and
checksums."""

import gzip
import math
import os
import struct
import zlib
from pathlib import Path

import numpy as np

from lbp.datasets.data import Arrays
from lbp.datasets.fetch import fetch
from lbp.datasets.sources import line, optional
from lbp.errors import DataError


def idx_images(name: str, root: str, folder: str, classes: list[str], instead: str) -> Arrays:
    """
    Training and test images (N, 1, H, W) uint8 of `root/folder/raw/*-ubyte[.gz]`.

    Missing files are fetched from where `torchvision.datasets.<folder>` has them. Raises DataError, which
    names dataset=`instead`.
    """
    raw = Path(root).expanduser().absolute() / folder / "raw"
    stems = [f"{part}-{what}-ubyte" for part in ("train", "t10k") for what in ("images-idx3", "labels-idx1")]
    missing = [f"{stem}.gz" for stem in stems if _present(raw, stem) is None]
    if missing:
        source = getattr(optional("torchvision.datasets", name), folder)
        md5 = dict(source.resources)
        for i, file in enumerate(missing):
            try:
                fetch([mirror + file for mirror in source.mirrors], raw / file, md5[file])
            except DataError as cause:
                also = "".join(f", and {other} (md5 {md5[other]})" for other in missing[i + 1:])
                raise DataError(f"dataset={name}: {cause}{also}, packed or not (dataset.root or LBP_DATA is "
                                f"the folder that holds {folder}/), or use dataset={instead} meanwhile"
                                ) from cause
    x, y, x_test, y_test = (read_idx(_present(raw, stem)) for stem in stems)
    return Arrays(x[:, None], y.astype(np.int64), x_test[:, None], y_test.astype(np.int64), "image", classes)


def read_idx(file: Path) -> np.ndarray:
    """
    The uint8 array of an IDX file, plain or gzipped: magic 0, 0, type 8, dimensions; big-endian sizes; bytes.

    A .gz is held to the checksum inside it: the published MD5 would refuse the same images packed anew. A
    plain file has none, so its header must agree with its length. Raises DataError.
    """
    try:
        with (gzip.open if file.suffix == ".gz" else open)(file, "rb") as f:
            zero, kind, dims = struct.unpack(">HBB", f.read(4))
            if zero or kind != 8 or dims != int(file.name.split("idx")[1][0]):
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
    except (OSError, EOFError, ValueError, struct.error, zlib.error) as cause:
        raise DataError(f"{file} cannot be read: {line(cause)}. Replace it by a good copy, or delete it and "
                        "it is fetched again") from cause


def _present(raw: Path, stem: str) -> Path | None:
    return next((file for file in (raw / stem, raw / f"{stem}.gz") if os.path.isfile(file)), None)
