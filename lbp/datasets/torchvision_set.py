"""The image sets that torchvision knows: in its folders, from its addresses, held to its checksums. They are
read here, and no pickle is ever run."""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np

from lbp.datasets.archive import members, unpickled
from lbp.datasets.data import Arrays
from lbp.datasets.fetch import fetch_for
from lbp.datasets.idx import idx_images
from lbp.datasets.sources import optional, reading

DIGITS = [str(i) for i in range(10)]
CLOTHES = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag",
           "Ankle boot"]
KANA = ["o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo"]
THINGS = ["airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck"]
TORONTO = "https://www.cs.toronto.edu/~kriz/", "https://cave.cs.toronto.edu/kriz/"
HOLDS = "(dataset.root or LBP_DATA is the folder that holds {})"


def torchvision_set(*, root: str, set: str) -> Arrays:
    """Images (N, C, H, W) uint8 with the published test split, from `root` or fetched into it."""
    read, *facts = SETS[set]
    return replace(read(set, Path(root).expanduser().absolute(), *facts), name=set)


def _cifar(name: str, root: Path, stem: str, md5: str, folders: tuple[str, str], train: list[str], test: str,
           names: tuple[str, str], keys: tuple[bytes, bytes], labels: int) -> Arrays:
    """Of the binary or the Python version, unpacked or not; only the binary one is fetched."""
    archives = [f"{stem}-{kind}.tar.gz" for kind in ("binary", "python")]
    places = [root / file for file in (*folders, *archives)]
    at = next((i for i, place in enumerate(places) if os.path.exists(place)), 2)
    if at == 2:
        fetch_for(name, [f"{address}{archives[0]}" for address in TORONTO], places[at], md5,
                  f", or {archives[1]}, or {folders[0]} or {folders[1]} out of them " + HOLDS.format("it"))
    python = at % 2 == 1
    with reading(places[at]):
        files = [part if python else f"{part}.bin" for part in (*train, test)]
        *files, about = members(places[at], [*files, names[python]])
        pairs = [_batch(file, keys[0]) if python else _records(file, labels) for file in files]
        x, y = (np.concatenate(some) for some in zip(*pairs[:-1]))
        classes = unpickled(about)[keys[1]] if python else about.split()
        return Arrays(x, y, *pairs[-1], "image", [c.decode() for c in classes])


def _records(data: bytes, labels: int) -> tuple[np.ndarray, np.ndarray]:
    """The binary version: for each image its labels, of which the last is the finest, and 3,072 bytes of
    pixels."""
    rows = np.frombuffer(data, np.uint8).reshape(-1, labels + 3072)
    return rows[:, labels:].reshape(-1, 3, 32, 32), rows[:, labels - 1].astype(np.int64)


def _batch(data: bytes, label: bytes) -> tuple[np.ndarray, np.ndarray]:
    held = unpickled(data)
    return held[b"data"].array().reshape(-1, 3, 32, 32), np.array(held[label], np.int64)


def _svhn(name: str, root: Path) -> Arrays:
    """MATLAB files: X (32, 32, 3, N), y (N, 1) with 10 for the digit 0."""
    files = [root / f"{part}_32x32.mat" for part in ("train", "test")]
    if missing := [file for file in files if not os.path.isfile(file)]:
        known = {file: (url, md5) for url, file, md5 in
                 optional("torchvision.datasets", name).SVHN.split_list.values()}
        for i, file in enumerate(missing):
            url, md5 = known[file.name]
            also = "".join(f", and {other.name} (md5 {known[other.name][1]})" for other in missing[i + 1:])
            fetch_for(name, [url], file, md5, f"{also} " + HOLDS.format("them"))
    loadmat, parts = optional("scipy.io", name).loadmat, []
    for file in files:
        with reading(file):
            held = loadmat(file, variable_names=["X", "y"])
            parts += [held["X"].transpose(3, 2, 0, 1), held["y"].reshape(-1).astype(np.int64) % 10]
    return Arrays(*parts, "image", DIGITS)


def _stl10(name: str, root: Path) -> Arrays:
    """Images (3, 96, 96) column by column, labels 1 .. 10; the 100,000 without labels stay where they are."""
    place, md5 = root / "stl10_binary", None
    if not os.path.isdir(place):
        source, place = optional("torchvision.datasets", name).STL10, root / "stl10_binary.tar.gz"
        md5 = dict(source.train_list + source.test_list)
        fetch_for(name, [source.url], place, source.tgz_md5,
                  ", or stl10_binary/ out of it " + HOLDS.format("it"))
    with reading(place):
        x, y, x_test, y_test = (np.frombuffer(data, np.uint8) for data in members(
            place, [f"{part}_{letter}.bin" for part in ("train", "test") for letter in "Xy"], md5))
        x, x_test = (some.reshape(-1, 3, 96, 96).swapaxes(2, 3) for some in (x, x_test))
        return Arrays(x, y.astype(np.int64) - 1, x_test, y_test.astype(np.int64) - 1, "image", THINGS)


SETS = {
    "mnist": (idx_images, "MNIST", DIGITS),
    "fashion_mnist": (idx_images, "FashionMNIST", CLOTHES),
    "kmnist": (idx_images, "KMNIST", KANA),
    "cifar10": (_cifar, "cifar-10", "c32a1d4ab5d03f1284b67883e8d87530",
                ("cifar-10-batches-bin", "cifar-10-batches-py"), [f"data_batch_{i}" for i in range(1, 6)],
                "test_batch", ("batches.meta.txt", "batches.meta"), (b"labels", b"label_names"), 1),
    "cifar100": (_cifar, "cifar-100", "03b5dce01913d631647c71ecec9e9cb8",
                 ("cifar-100-binary", "cifar-100-python"), ["train"], "test",
                 ("fine_label_names.txt", "meta"), (b"fine_labels", b"fine_label_names"), 2),
    "svhn": (_svhn,),
    "stl10": (_stl10,),
}
