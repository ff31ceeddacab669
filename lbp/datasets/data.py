"""Configuration -> tensors on the device and a task. Data is checked and normalised once, then only
indexed."""

import inspect
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lbp import ranks, registry
from lbp.datasets.augment import Augment, generator
from lbp.datasets.task import MASKED, Task
from lbp.errors import ConfigError, DataError

COMMON = {      # the knobs of every dataset: conf/dataset/_common.yaml says the same, with their docs
    "root": "data", "train_size": None, "val_size": 0.1, "normalize": "standard", "resize": None,
    "augment": [], "loss": "auto", "label_smoothing": 0.0,
}
TEST_SHARE = 0.2    # of a set that comes without a test split
CHUNK = 1 << 20     # values converted at a time, which bounds what loading needs beside source and result


@dataclass
class Arrays:
    """
    What a dataset's function returns; arrays or tensors on the CPU.

    x (N, C, H, W) if kind is "image", (N, D) if "vector"; uint8 or float; (N, T) integers 0 .. `symbols` - 1 if
    "sequence". y (N,) integer labels where `classes` names the classes, of sequences also (N, T), MASKED where
    nothing is asked; else (N,) or (N, k) real targets. Without x_test and y_test, `load` cuts a
    fixed fifth for testing. `white` is an image's greatest possible value: 255 for uint8, and by default what
    the training split reaches. `contiguous`: samples are parts of one whole, in order, and validation is their
    end. `read`: {file: sha256} of what meta.json should tell. `lengths` (N,) of the training samples and `growth` go together:
    (start, every) has epoch e drawn from those of length <= start + e // every alone.
    """

    x: np.ndarray | Tensor
    y: np.ndarray | Tensor
    x_test: np.ndarray | Tensor | None = None
    y_test: np.ndarray | Tensor | None = None
    kind: str = "vector"
    classes: list[str] | None = None
    white: float | None = None
    name: str | None = None     # for messages, where one function serves several options
    symbols: int | None = None
    contiguous: bool = False
    read: dict[str, str] | None = None
    lengths: np.ndarray | None = None
    growth: tuple[int, int] | None = None

    @classmethod
    def of(cls, x, y, x_test=None, y_test=None) -> "Arrays":
        """From plain arrays: 2-D x are vectors, 3-D (N, H, W) and 4-D images; integer y labels, real y
        targets.

        Raises DataError unless the labels are 0 .. C-1 with every class present."""
        x, y = _tensor(x, "x"), _tensor(y, "y", target=True)
        x_test = None if x_test is None else _tensor(x_test, "x_test")
        if not 2 <= x.dim() <= 4:
            raise DataError(f"x has shape {tuple(x.shape)}: allowed are (N, D), (N, H, W) and (N, C, H, W)")
        if x.dim() == 3:
            x, x_test = x.unsqueeze(1), None if x_test is None else x_test.unsqueeze(1)
        classes = None
        if not y.is_floating_point():
            found = y.unique().tolist()
            if found != list(range(len(found))):
                raise DataError(f"labels must be 0 .. C-1 with every class present, y holds {_few(found)}: "
                                "number them by np.unique(y, return_inverse=True), or pass floats as targets")
            classes = [str(c) for c in found]
        return cls(x, y, x_test, y_test, "vector" if x.dim() == 2 else "image", classes)


class Split:
    """x (N, *in_shape) and y (N,) labels or (N, k) targets, both resident on the device. `source` (N,): where each
    sample stands in the dataset. Without `shuffle` every epoch takes them as they stand here. With `lengths` (N,) and
    `growth`, (start, every), epoch e takes those of length <= start + e // every alone, as often as it needs to be as long as others."""

    def __init__(self, x: Tensor, y: Tensor, *, batch_size: int, seed: int = 0, augment: Augment | None = None,
                 black: Tensor | None = None, source: Tensor | None = None, shuffle: bool = True, lengths: Tensor | None = None,
                 growth: tuple[int, int] | None = None):
        self.x, self.y, self.seed, self.augment, self.black, self.shuffle = x, y, seed, augment, black, shuffle
        self.lengths, self.growth = lengths, growth
        self.source = torch.arange(len(x)) if source is None else source
        self.batch_size = min(batch_size, len(x))

    def __len__(self) -> int:
        return len(self.x)

    @property
    def steps(self) -> int:
        """Batches an epoch."""
        return len(self.x) // self.batch_size

    def fingerprint(self) -> list[int]:
        """A few numbers that tell these samples from others, whatever the device: sums of their bits."""
        parts = [self.x, self.y, self.source]
        return [len(self.x), *(int(p.view({4: torch.int32, 8: torch.int64}[p.element_size()]).sum(dtype=torch.int64)) for p in parts)]

    def order(self, epoch: int) -> Tensor:
        """The samples in the order of an epoch's batches."""
        if not self.shuffle:
            return torch.arange(len(self.x))
        rng = generator("order", self.seed, epoch)
        if self.growth is None:
            return torch.randperm(len(self.x), generator=rng)
        start, every = self.growth
        rows = (self.lengths <= start + epoch // every).nonzero().flatten()
        again = -(-len(self.x) // len(rows))
        return torch.cat([rows[torch.randperm(len(rows), generator=rng)] for _ in range(again)])[: len(self.x)]

    def batches(self, epoch: int, skip: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Full batches in an order that is a pure function of (seed, epoch), augmented; the tail is dropped. Of
        each batch this rank's share.

        A set smaller than a batch is one batch. `skip` leaves out the first batches and changes none of the
        others."""
        n, size, device = len(self.x), self.batch_size, self.x.device
        order = self.order(epoch).to(device)
        augmented = (self.augment.epoch(n, self.x.shape[1:], self.seed, epoch, device, self.black)
                     if self.augment else None)
        for start in range(skip * size, self.steps * size, size):
            mine = ranks.share(size)
            places = slice(start + mine.start, start + mine.stop)
            rows = order[places]
            x, y = self.x.index_select(0, rows), self.y.index_select(0, rows)
            yield (augmented(x, places) if augmented else x), y

    def passes(self, size: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Every sample once, in order, never augmented, `size` at a time (512) on each rank, which get equally
        many parts; the last may be empty. Views: not to be written into."""
        whole = (size or 512) * ranks.world()
        for x, y in zip(self.x.split(whole), self.y.split(whole)):
            mine = ranks.share(len(x))
            yield x[mine], y[mine]


@dataclass
class Data:
    """A dataset ready to train on; `val` is None with val_size=0. `classes` are names, None for
    regression."""

    name: str
    task: Task
    train: Split
    val: Split | None
    test: Split
    classes: list[str] | None
    normalize: str
    read: dict[str, str] | None = None      # {file: sha256}

    def described(self) -> str:
        """One line for the header of a run."""
        splits = {"train": self.train, "val": self.val, "test": self.test}
        sizes = ", ".join(f"{len(split):,} {name}" for name, split in splits.items() if split)
        what = f"{self.task.classes} classes" if self.task.classes else f"{self.task.outputs} real target(s)"
        shape = "x".join(map(str, self.task.in_shape)) + (f" of {self.task.symbols} symbols" if self.task.symbols else "")
        return f"{self.name}: {sizes}; {shape}, {what}, {self.task.loss_name}, normalize={self.normalize}"


def load(cfg: dict, *, seed: int, batch_size: int, device="cpu", dtype: torch.dtype = torch.float32,
         arrays: Arrays | None = None, shuffle: bool = True) -> Data:
    """
    The dataset that `cfg` (the dataset group of a configuration) names, or `arrays` under the same knobs.

    `seed` decides validation split, subset, order and augmentation, never the test split. Without `shuffle`
    the training samples, whichever those are, come in the order of the data. Raises DataError
    for data that cannot be had or used, ConfigError for knobs that do not fit it.
    """
    cfg = COMMON | cfg
    augment = Augment(cfg["augment"])
    arrays = _read(cfg) if arrays is None else arrays
    name = arrays.name or cfg.get("name", "arrays")
    arrays = _checked(arrays, name)
    if arrays.kind != "image" and (augment or cfg["resize"]):
        raise ConfigError(f"dataset.augment and dataset.resize need images, dataset={name} has "
                          f"{arrays.kind}s: remove them")
    if arrays.kind == "sequence" and arrays.classes is not None and cfg["normalize"] != "none":
        raise ConfigError(f"dataset.normalize={cfg['normalize']}: symbols of dataset={name} have no scale; set it to none")
    if arrays.growth and not shuffle:
        raise ConfigError(f"trainer.shuffle=false: dataset.start_length={arrays.growth[0]} draws each epoch's samples from those that are "
                          "short enough, so there is no order to keep; leave one of the two out")
    if cfg["resize"]:
        arrays = replace(arrays, x=_resized(arrays.x, cfg["resize"]),
                         x_test=None if arrays.x_test is None else _resized(arrays.x_test, cfg["resize"]))
    x, y, x_test, y_test, kind = arrays.x, arrays.y, arrays.x_test, arrays.y_test, arrays.kind

    pool, held = torch.arange(len(x)), torch.arange(0 if x_test is None else len(x_test))
    if x_test is None:
        held, pool = stratified(y, pool, round(TEST_SHARE * len(x)), generator("test"))
        x_test, y_test = x, y
    train, val = _divided(y, pool, cfg, seed, name, arrays.contiguous)
    if not shuffle:
        train = train.sort().values     # a split is cut off at random, which mixes
    growth: dict = {}
    if arrays.growth:
        growth = {"growth": arrays.growth, "lengths": torch.as_tensor(arrays.lengths)[train]}
        if int(growth["lengths"].min()) > arrays.growth[0]:
            raise ConfigError(f"dataset.start_length={arrays.growth[0]}: none of the {len(train):,} training samples of dataset={name} is so "
                              "short; raise it, or dataset.n")

    if kind != "sequence":
        shift, scale = _scaling(x, train, cfg["normalize"], kind, arrays.white)
    regression = arrays.classes is None
    if regression:
        how = "standard" if cfg["normalize"] == "standard" else "none"
        y_shift, y_scale = _scaling(y, train, how, "vector")

    def split(x, y, rows, **how):
        targets = _filled(y, rows, y_shift, y_scale, device, dtype) if regression else y[rows].to(device)
        samples = x[rows].to(device) if kind == "sequence" else _filled(x, rows, shift, scale, device, dtype)
        return Split(samples, targets,
                     batch_size=batch_size, seed=seed, source=rows, **how)

    classes = None if regression else len(arrays.classes)
    loss = cfg["loss"] if cfg["loss"] != "auto" else "mse" if regression else "cross_entropy"
    task = Task("regression" if regression else "classification", tuple(x.shape[1:]), classes or y.shape[1],
                classes, loss, cfg["label_smoothing"], dtype, arrays.symbols, classes is not None and y.dim() > 1)
    black = (-shift / scale)[0].to(device, dtype) if kind == "image" else None
    return Data(name, task, split(x, y, train, augment=augment or None, black=black, shuffle=shuffle, **growth),
                split(x, y, val) if len(val) else None, split(x_test, y_test, held), arrays.classes,
                cfg["normalize"], arrays.read)


def stratified(y: Tensor, rows: Tensor, size: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Cuts `rows` at random into exactly `size` and the rest; integer labels keep their proportions in both.

    Sainte-Lague: each class's k-th sample, in random order, ranks by (k + 1/2) / (size of the class)."""
    rows = rows[torch.randperm(len(rows), generator=rng)]
    if y.is_floating_point() or y.dim() > 1:
        return rows[:size], rows[size:]
    labels = y[rows]
    by_class = labels.argsort(stable=True)
    counts = torch.bincount(labels)
    place = torch.arange(len(rows)) - (counts.cumsum(0) - counts)[labels[by_class]]
    rank = torch.empty(len(rows), dtype=torch.float64)
    rank[by_class] = (place + 0.5).double() / counts[labels[by_class]]
    order = rank.argsort(stable=True)
    rest = rows[order[size:]]       # in random order again: rank order goes class by class
    return rows[order[:size]], rest[torch.randperm(len(rest), generator=rng)]


def _read(cfg: dict) -> Arrays:
    function = registry.load("dataset", cfg["name"])
    return function(**{knob: cfg[knob] for knob in inspect.signature(function).parameters})


def _divided(y: Tensor, pool: Tensor, cfg: dict, seed: int, name: str, contiguous: bool) -> tuple[Tensor, Tensor]:
    """Rows of the training and of the validation split."""
    n, val_size, train_size = len(pool), cfg["val_size"], cfg["train_size"]
    held = max(1, round(val_size * n)) if isinstance(val_size, float) and val_size > 0 else int(val_size)
    if held >= n:
        raise ConfigError(f"dataset.val_size={val_size} leaves nothing to train on: dataset={name} has "
                          f"{n:,} training samples")
    val, train = (pool[n - held:], pool[:n - held]) if contiguous else stratified(y, pool, held, generator("val", seed))
    if train_size is not None:
        if train_size > len(train):
            raise ConfigError(f"dataset.train_size={train_size} is more than the {len(train):,} "
                              f"training samples that dataset={name} has beside {held:,} for validation "
                              "(dataset.val_size)")
        train, _ = stratified(y, train, train_size, generator("subset", seed))
    if not y.is_floating_point() and y.dim() == 1 and len(y[train].unique()) < 2:
        raise ConfigError(f"the {len(train):,} training sample(s) of dataset={name} hold one class only: "
                          "raise dataset.train_size or lower dataset.val_size")
    return train, val


def _tensor(a, what: str, target: bool = False) -> Tensor:
    """A tensor without a copy where possible: x uint8, fp32 or fp64, y int64 or floating."""
    if not isinstance(a, Tensor):
        a = np.asarray(a)
        if a.dtype.kind not in "fiub":
            raise DataError(f"{what} holds {a.dtype}, not numbers")
        if not (a.flags.writeable and a.dtype.isnative and min(a.strides, default=0) >= 0):
            a = np.array(a, dtype=a.dtype.newbyteorder("="))
        a = torch.from_numpy(a)
    a = a.detach().cpu()
    if target:
        return a if a.is_floating_point() else a.long()
    if a.dtype in (torch.uint8, torch.float32, torch.float64):
        return a
    return a.to(torch.float64 if a.element_size() > 2 else torch.float32)


def _checked(arrays: Arrays, name: str) -> Arrays:
    """The arrays as tensors, with real targets (N, k). Raises DataError."""
    def refuse(why):
        raise DataError(f"dataset={name}: {why}")

    parts = {"": (arrays.x, arrays.y)}
    if (arrays.x_test is None) != (arrays.y_test is None):
        refuse("x_test and y_test go together, one of them is missing")
    if arrays.x_test is not None:
        parts["_test"] = arrays.x_test, arrays.y_test
    for part, (x, y) in parts.items():
        sequence = arrays.kind == "sequence"
        x, y = _tensor(x, "x" + part, target=sequence), _tensor(y, "y" + part, target=True)
        if x.dim() != (4 if arrays.kind == "image" else 2):
            refuse(f"x{part} has shape {tuple(x.shape)}, {arrays.kind}s need "
                   f"{'(N, C, H, W)' if arrays.kind == 'image' else '(N, T)' if sequence else '(N, D)'}")
        if len(x) != len(y):
            refuse(f"x{part} has {len(x):,} samples, y{part} {len(y):,}")
        if x.numel() == 0:
            refuse(f"x{part} is empty, its shape is {tuple(x.shape)}")
        if sequence and (x.is_floating_point() or not arrays.symbols or int(x.min()) < 0 or int(x.max()) >= arrays.symbols):
            refuse(f"x{part} must hold integers 0 .. symbols - 1, with `symbols` given ({arrays.symbols}): it is {x.dtype}, "
                   f"{x.min()} .. {x.max()}")
        for values, letter in ((x, "x"), (y, "y")):
            if values.is_floating_point():
                bad = sum(int((~chunk.isfinite()).sum()) for chunk in values.split(_rows(values)))
                if bad:
                    refuse(f"{bad:,} of the {values.numel():,} values of {letter}{part} are not finite: "
                           "repair or drop them")
        if arrays.classes is None:
            if not y.is_floating_point():
                y = y.double()
            y = y.unsqueeze(1) if y.dim() == 1 else y
            if y.dim() != 2:
                refuse(f"y{part} has shape {tuple(y.shape)}, real targets need (N,) or (N, k)")
        else:
            tokens = sequence and y.shape == x.shape
            if y.is_floating_point() or y.dim() != 1 and not tokens:
                refuse(f"y{part} is {y.dtype} of shape {tuple(y.shape)}, labels need integers of shape (N,)"
                       + (" or (N, T)" if sequence else ""))
            asked = y[y != MASKED] if tokens else y
            if not len(asked):
                refuse(f"all labels of y{part} are masked")
            low, high, c = int(asked.min()), int(asked.max()), len(arrays.classes)
            if low < 0 or high >= c:
                wrong = int(((asked < 0) | (asked >= c)).sum())
                refuse(f"{wrong:,} label(s) of y{part} are out of range: found {low} .. {high}, "
                       f"allowed 0 .. {c - 1}")
            if not part and low == high:
                refuse(f"all {len(y):,} training samples are of class {low} ({arrays.classes[low]}): "
                       "classification needs two classes or more")
        parts[part] = x, y
    (x, y), (x_test, y_test) = parts[""], parts.get("_test", (None, None))
    if x_test is None and len(x) < 3:
        refuse(f"{len(x)} samples cannot be cut into training and test samples")
    if x_test is not None and (x.shape[1:] != x_test.shape[1:] or y.shape[1:] != y_test.shape[1:]):
        refuse("training and test samples differ in shape: "
               f"{tuple(x.shape[1:])} and {tuple(x_test.shape[1:])}, "
               f"targets {tuple(y.shape[1:])} and {tuple(y_test.shape[1:])}")
    white = 255.0 if arrays.white is None and x.dtype == torch.uint8 else arrays.white
    return replace(arrays, x=x, y=y, x_test=x_test, y_test=y_test, white=white)


def _rows(x: Tensor) -> int:
    return max(1, CHUNK // max(1, x[0].numel()))


def _chunks(x: Tensor, rows: Tensor) -> Iterator[Tensor]:
    """x[rows], some at a time, in fp64 (uint8 in fp32, which holds it exactly)."""
    work = torch.float32 if x.dtype == torch.uint8 else torch.float64
    return (x[some].to(work) for some in rows.split(_rows(x)))


def _scaling(x: Tensor, rows: Tensor, how: str, kind: str,
             white: float | None = None) -> tuple[Tensor, Tensor]:
    """(shift, scale) so that (x - shift) / scale is normalised by x[rows]: (1, C, 1, 1) for images, (1, D)
    for vectors."""
    image, ones = kind == "image", (1, -1) + (1,) * (x.dim() - 2)
    axes = [0] + list(range(2, x.dim()))
    shift, scale = torch.zeros(x.shape[1], dtype=torch.float64), torch.ones(x.shape[1], dtype=torch.float64)
    if how == "standard":
        count = len(rows) * x[0, 0].numel()
        mean = sum(c.sum(axes, dtype=torch.float64) for c in _chunks(x, rows)) / count
        pivot = mean.round() if x.dtype == torch.uint8 else mean        # whole numbers keep fp32 exact
        square = sum((c - pivot.view(ones).to(c.dtype)).square_().sum(axes, dtype=torch.float64)
                     for c in _chunks(x, rows))
        shift, scale = mean, (square / count - (mean - pivot).square()).clamp(min=0).sqrt()
        scale = scale.masked_fill(scale <= 1e-12 * mean.abs(), 1.0)       # constant
    elif how == "unit" and image and white is not None:
        scale = scale * white
    elif how == "unit":
        low = torch.stack([c.amin(axes) for c in _chunks(x, rows)]).amin(0)
        high = torch.stack([c.amax(axes) for c in _chunks(x, rows)]).amax(0)
        if image:       # colours keep their balance
            low, high = low.min().expand_as(low), high.max().expand_as(high)
        shift, scale = low, (high - low).masked_fill(high == low, 1.0)
    return shift.double().view(ones), scale.double().view(ones)


def _filled(x: Tensor, rows: Tensor, shift: Tensor, scale: Tensor, device, dtype) -> Tensor:
    """(x[rows] - shift) / scale on the device, with nothing held beside it but a chunk."""
    out = torch.empty((len(rows), *x.shape[1:]), dtype=dtype, device=device)
    for chunk, place in zip(_chunks(x, rows), out.split(_rows(x))):
        if dtype == torch.float64:
            chunk = chunk.double()
        place.copy_(chunk.sub_(shift.to(chunk.dtype)).div_(scale.to(chunk.dtype)))
    return out


def _resized(x: Tensor, side: int) -> Tensor:
    out = torch.empty((*x.shape[:2], side, side), dtype=x.dtype)
    for chunk, place in zip(_chunks(x, torch.arange(len(x))), out.split(_rows(x))):
        chunk = F.interpolate(chunk, size=(side, side), mode="bilinear", antialias=True, align_corners=False)
        place.copy_(chunk.round_().clamp_(0, 255) if x.dtype == torch.uint8 else chunk)
    return out


def _few(values: list) -> str:
    return ", ".join(map(str, values[:12])) + (", ..." if len(values) > 12 else "")
