"""Any tree of images with a folder for each class, decoded once and cached."""

import hashlib
import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from lbp.datasets.data import Arrays
from lbp.datasets.sources import line, optional, read_npz
from lbp.errors import DataError

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".ppm", ".pgm", ".tif", ".tiff")


def imagefolder(*, root: str, image_size: int | None, channels: str) -> Arrays:
    """
    Images (N, 3 or 1, H, W) uint8 of `root`/CLASS, or of `root`/train/CLASS and `root`/test/CLASS (else
    `root`/val/CLASS).

    Classes are the folders' names, sorted. `image_size` scales the shorter side and crops the middle; null
    asks that all images agree. What is decoded is cached under $XDG_CACHE_HOME/lbp (~/.cache/lbp), by the
    names, sizes and times of the files. Raises DataError, naming the image that cannot be read.
    """
    base = Path(root).expanduser().absolute()
    train = base / "train" if (base / "train").is_dir() else base
    test = None if train == base else next((base / p for p in ("test", "val") if (base / p).is_dir()), None)
    classes = _folders(train)
    listings = [_listing(train, classes)]
    if len(listings[0]) == 0 or len(classes) < 2:
        raise DataError(f"dataset=imagefolder: {train} holds {len(classes)} class folder(s) with "
                        f"{len(listings[0])} image(s): dataset.root must hold CLASS/* or train/CLASS/* and "
                        f"test/CLASS/* ({' '.join(SUFFIXES)})")
    labels = {label for _, label, *_ in listings[0]}
    if empty := [c for i, c in enumerate(classes) if i not in labels]:
        raise DataError(f"dataset=imagefolder: no image in {', '.join(str(train / c) for c in empty[:5])}")
    if test:
        if unknown := sorted(set(_folders(test)) - set(classes)):
            raise DataError(f"dataset=imagefolder: {test} has classes that {train} lacks: "
                            f"{', '.join(unknown[:5])}")
        listings.append(_listing(test, classes))
        if not listings[1]:
            raise DataError(f"dataset=imagefolder: no image in {test}: fill it or remove it")

    made_of = repr((1, str(base), listings, image_size, channels))
    key = hashlib.blake2b(made_of.encode("utf-8", "surrogateescape"), digest_size=12).hexdigest()
    caches = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    cache = caches / "lbp" / f"imagefolder-{key}.npz"
    images = _cached(cache, [len(listing) for listing in listings])
    if images is None:
        images = [_decoded([Path(file) for file, *_ in listing], image_size, channels)
                  for listing in listings]
        _keep(cache, images)
    y = [np.array([label for _, label, *_ in listing], np.int64) for listing in listings]
    held = (images[1], y[1]) if test else (None, None)
    return Arrays(images[0], y[0], *held, kind="image", classes=classes)


def _folders(base: Path) -> list[str]:
    try:
        return sorted(e.name for e in os.scandir(base) if e.is_dir() and not e.name.startswith("."))
    except OSError as cause:
        raise DataError(f"dataset=imagefolder: cannot read {base} ({line(cause)}): set dataset.root to the "
                        "folder that holds CLASS/* or train/CLASS/*") from cause


def _listing(base: Path, classes: list[str]) -> list[tuple[str, int, int, int]]:
    """(file, label, bytes, time) of every image, in a fixed order."""
    found = []
    for label, name in enumerate(classes):
        for folder, _, names in os.walk(base / name, followlinks=True):
            for file in names:
                if file.lower().endswith(SUFFIXES) and not file.startswith("."):
                    path = os.path.join(folder, file)
                    try:
                        stat = os.stat(path)
                    except OSError as cause:
                        raise DataError(f"dataset=imagefolder: cannot read {path} ({line(cause)})") from cause
                    found.append((path, label, stat.st_size, stat.st_mtime_ns))
    return sorted(found, key=lambda entry: (entry[1], entry[0]))


def _decoded(paths: list[Path], side: int | None, channels: str) -> np.ndarray:
    Image, ops = optional("PIL.Image", "imagefolder"), optional("PIL.ImageOps", "imagefolder")

    def pixels(path: Path) -> np.ndarray:
        try:
            with Image.open(path) as image:
                if image.mode.startswith(("I", "F")):
                    raise ValueError("it has more than 8 bits a channel: convert it")
                image = image.convert("L" if channels == "gray" else "RGB")
            if side is not None:
                image = ops.fit(image, (side, side), Image.Resampling.BILINEAR)
        except Exception as cause:      # Pillow's decoders raise errors of many kinds
            raise DataError(f"dataset=imagefolder: {path} cannot be read: {line(cause)}. "
                            "Repair or remove it") from cause
        values = np.asarray(image)
        return values[None] if channels == "gray" else values.transpose(2, 0, 1)

    first = pixels(paths[0])
    out = np.empty((len(paths), *first.shape), np.uint8)

    def fill(i: int) -> None:
        values = pixels(paths[i])
        if values.shape != first.shape:
            raise DataError(f"dataset=imagefolder: {paths[i]} has {values.shape[2]} x {values.shape[1]} "
                            f"pixels, {paths[0]} has {first.shape[2]} x {first.shape[1]}: "
                            "set dataset.image_size=N")
        out[i] = values

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:    # Pillow releases the lock
        for _ in pool.map(fill, range(len(paths))):
            pass
    return out


def _cached(file: Path, counts: list[int]) -> list[np.ndarray] | None:
    """The images, or None where there is no whole cache: it is then made anew."""
    try:
        stored = read_npz(file)
        images = [stored[f"x{i}"] for i in range(len(counts))]
    except Exception:       # whatever is wrong with it, the images themselves are there
        return None
    good = all(x.dtype == np.uint8 and x.ndim == 4 and len(x) == n for x, n in zip(images, counts))
    return images if good else None


def _keep(file: Path, images: list[np.ndarray]) -> None:
    scratch = None
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, scratch = tempfile.mkstemp(prefix=".", suffix=".npz", dir=file.parent)
        with os.fdopen(handle, "wb") as out:
            np.savez(out, **{f"x{i}": x for i, x in enumerate(images)})
        os.replace(scratch, file)
    except OSError:         # no room or no right to write: works without
        if scratch and os.path.exists(scratch):
            os.unlink(scratch)
