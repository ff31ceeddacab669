"""EMNIST: handwritten letters and digits, 28 x 28 grey (Cohen, Afshar, Tapson & van Schaik 2017)."""

import gzip
import os
import zipfile
from pathlib import Path
from string import ascii_lowercase, ascii_uppercase, digits

import numpy as np

from lbp.datasets.data import Arrays
from lbp.datasets.fetch import fetch_for
from lbp.datasets.idx import WHAT, parse_idx, present, read_idx
from lbp.datasets.sources import optional, reading

MERGED = digits + ascii_uppercase + "abdefghnqrt"       # the other small letters look like their capitals
CLASSES = {"balanced": MERGED, "bymerge": MERGED, "byclass": digits + ascii_uppercase + ascii_lowercase,
           "letters": ascii_lowercase, "digits": digits, "mnist": digits}


def emnist(*, root: str, split: str) -> Arrays:
    """Images (N, 1, 28, 28) uint8 of one of the six splits.

    From `root`/EMNIST/raw/emnist-SPLIT-*[.gz], else out of gzip.zip beside them, which holds all splits, is
    fetched, and is never unpacked."""
    raw = Path(root).expanduser().absolute() / "EMNIST" / "raw"
    stems = [f"emnist-{split}-{part}-{what}-ubyte" for part in ("train", "test") for what in WHAT]
    files = [present(raw, stem) for stem in stems]
    if all(files):
        arrays = [read_idx(file) for file in files]
    else:
        archive = raw / "gzip.zip"
        if not os.path.isfile(archive):
            source = optional("torchvision.datasets", "emnist").EMNIST
            fetch_for("emnist", [source.url], archive, source.md5, f", or {stems[0]} and the other three of "
                      "this split (dataset.root or LBP_DATA is the folder that holds EMNIST/)")
        with reading(archive), zipfile.ZipFile(archive) as packed:
            arrays = [_member(packed, stem) for stem in stems]
    x, y, x_test, y_test = arrays
    first = 1 if split == "letters" else 0      # their labels are 1 .. 26
    return Arrays(x.transpose(0, 2, 1)[:, None], y.astype(np.int64) - first,      # stored column by column
                  x_test.transpose(0, 2, 1)[:, None], y_test.astype(np.int64) - first, "image",
                  list(CLASSES[split]))


def _member(packed: zipfile.ZipFile, stem: str) -> np.ndarray:
    with packed.open(f"gzip/{stem}.gz") as held, gzip.open(held) as f:
        return parse_idx(f, stem)
