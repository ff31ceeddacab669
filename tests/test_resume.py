"""A run may be stopped or killed at any moment: nothing is lost, nothing is silently wrong (faults 6 to 13).

`lbp` is called in this process, or in a fork of it where it is to be killed: starting Python anew takes seconds.
`scripts/kill_test.py` does the same to real processes.
"""

import errno
import hashlib
import io
import json
import os
import pickle
import random
import resource
import shutil
import signal
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from conftest import ALGOS, PATIENCE, RECURRENT

sys.path.append(str(Path(__file__).parents[1] / "scripts"))
from kill_test import STEPS, TINY, armed, fingerprint, sha

import lbp
from lbp import cli, interrupt, registry
from lbp.algos.baseline.bp import BP
from lbp.config import compose
from lbp.datasets.data import Split
from lbp.errors import ConfigError, DataError
from lbp.launch import folder as folders
from lbp.launch.resume import prepare
from lbp.logs.console import Console
from lbp.training import checkpoint
from lbp.training.checkpoint import Checkpoints, load, write

# One option of each class: a preset's state is kept and restored by the same lines.
CLASSES = list({registry.option("algo", name).name: name for name in reversed(ALGOS)}.values())[::-1]
SOLVERS = [name for name in ALGOS if registry.entry("algo", registry.option("algo", name).name).facts.get("closed_form")]
SPLITS = {1294: "train", 144: "val", 359: "test"}    # of digits, by size
WEIGHTS = ("rule", "optimizer", "generators", "best", "lines")
HERE = "here"   # a file: a child has come to the place where it is to be hit


@pytest.fixture(autouse=True)
def small_meta(monkeypatch):
    """The working tree's changes, which meta.json keeps, have any length: no business of these tests."""
    monkeypatch.setattr(folders, "git", lambda: None)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yield
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL and not interrupt.asked()


def command(*words):
    return cli.main([*words])


def settings(algo, *more):
    tiny = [word for word in TINY if not word.startswith("arch.widths")] + ["arch.width=12"] if algo in RECURRENT else TINY
    return (f"algo={algo}", *tiny, *(() if algo in SOLVERS else STEPS), *more)


def train(algo, *more, to="run"):
    return command("train", *settings(algo, *more), f"run.dir={to}")


def status(folder="run"):
    return Path(folder, "STATUS").read_text().strip()


def state(folder="run"):
    return load(Path(folder, "checkpoints/last.pt"))["state"]


_references = {}


@pytest.fixture
def reference(tmp_path_factory):
    """reference(algo, *settings): the fingerprint of a run that nobody stopped."""
    def of(algo, *more):
        if (algo, more) not in _references:
            folder = tmp_path_factory.mktemp("reference") / "run"
            assert train(algo, *more, to=str(folder)) == 0
            _references[algo, more] = fingerprint(folder)
        return _references[algo, more]
    return of


def assert_same(found, wanted, keys=None):
    for key in keys or wanted:      # one by one: the lines say best where two runs parted
        if key == "lines":
            for mine, other in zip(found[key], wanted[key]):
                assert mine == other
        assert found[key] == wanted[key], key
    assert not found["twice"] and not found["left over"]


@pytest.fixture
def moment(monkeypatch):
    """moment("batch 1 4", act): calls act() once, as the fifth batch of the second epoch is fetched; "val", "test", "train":
    as a pass over that split begins."""
    batches, passes, plan = Split.batches, Split.passes, []

    def at(place):
        if plan and plan[0][0] == place:
            plan.pop()[1]()

    def fetched(self, epoch, skip=0):
        for number, found in enumerate(batches(self, epoch, skip), skip):
            at(f"batch {epoch} {number}")
            yield found

    def passed(self, size=None):
        at(SPLITS.get(len(self)))
        yield from passes(self, size)

    monkeypatch.setattr(Split, "batches", fetched)
    monkeypatch.setattr(Split, "passes", passed)

    def set_up(place, act=lambda: signal.raise_signal(signal.SIGTERM)):
        plan[:] = [(place, act)]
    return set_up


class Child:
    """A command in a fork of this process; what it prints is in the files out and err."""

    def __init__(self, *words, before=lambda: None):
        Path(HERE).unlink(missing_ok=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")     # other tests' threads, none of which holds a lock that matters here
            self.pid = os.fork()
        if self.pid:
            return
        code = 70
        try:
            sys.stdout, sys.stderr = open("out", "w"), open("err", "w")
            torch.cuda.is_available = lambda: False     # CUDA does not survive a fork
            interrupt.GRACE = PATIENCE      # a busy machine's batch may take long
            before()
            code = command(*words)
        finally:
            sys.stderr.flush()
            os._exit(code)

    def hit(self, number):
        """Sends a signal when the child has come to its place."""
        end = time.monotonic() + PATIENCE
        while not Path(HERE).exists():
            assert time.monotonic() < end, "the child never came to its place"
            time.sleep(0.005)
        os.kill(self.pid, number)

    def end(self):
        """The exit code; minus the signal that killed it."""
        end = time.monotonic() + PATIENCE
        while not (found := os.waitpid(self.pid, os.WNOHANG))[0]:
            if time.monotonic() > end:
                os.kill(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)
                pytest.fail(f"the child did not end within {PATIENCE} s")
            time.sleep(0.005)
        return os.waitstatus_to_exitcode(found[1])


def forked(*words, before=lambda: None):
    return Child(*words, before=before).end()


def here():
    Path(HERE).touch()


def pause(over=interrupt.asked):
    here()
    while not over():
        time.sleep(0.005)


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def errors():
    return Path("err").read_text()


# ---- fault 11: stop anywhere, resume, and nobody can tell

FIT = ["train", "val", "test"]
EPOCHS = ["batch 0 0", "batch 0 4", "batch 0 9", "val", "batch 1 0", "batch 1 7", "val"]


def stop_and_resume(moment, places, algo, *more):
    """One run, stopped at each of the places in turn."""
    words = ("train", *settings(algo, *more), "run.dir=run")
    for place in places:
        moment(place)
        assert command(*words) == 143, f"{place} never came"
        assert status() == "interrupted"
        words = "resume", "run"
    assert command(*words) == 0 and status() == "done"
    return fingerprint(Path("run"))


def taken(algo):
    """What of dropout and batch norm the rule trains with, and the knobs that make its phases short."""
    short = {"ldrl": ("algo.feedback_epochs=1",), "scff": ("algo.feature_epochs=[1,0]",)}.get(algo, ())
    for more in (("arch.dropout=0.3", "arch.norm=batch"), ("arch.dropout=0.3",), ("arch.norm=batch",), ()):
        if command("train", "--dry-run", *settings(algo, *more, *short)) == 0:
            return more + short


# fault 11
@pytest.mark.parametrize("algo", CLASSES)
def test_every_rule_stopped_everywhere_is_as_if_never_stopped(algo, moment, reference):
    more = taken(algo)
    wanted = reference(algo, *more)
    extra = [place for epoch in range(2, wanted["summary"]["epochs"]) for place in (f"batch {epoch} 0", f"batch {epoch} 5", "val")]  # further phases
    if algo == "readout":   # its last phase solves
        extra = FIT[:2]
    places = FIT if algo in SOLVERS else [*EPOCHS, *extra, "test"]
    assert_same(stop_and_resume(moment, places, algo, *more), wanted)


# fault 11
@pytest.mark.parametrize("optimizer", registry.options("optimizer"))
def test_every_optimizer_goes_on(optimizer, moment, reference):
    more = (f"optimizer={optimizer}", "arch.dropout=0.3", "optimizer.weight_decay=0.01", "trainer.clip=0.5")
    assert_same(stop_and_resume(moment, ["batch 0 4", "batch 1 7"], "bp", *more), reference("bp", *more))


# fault 11
@pytest.mark.parametrize("more", [
    ("dataset.augment=['shift:1',flip]",), ("schedule=cosine", "schedule.warmup_epochs=0.5"), ("trainer.max_minutes=100",),
    ("dataset.val_size=0",), ("trainer.precision=fp64",), ("trainer.precision=bf16",), ("optimizer.lr=1e-5",),
    ("trainer.patience=1", "trainer.epochs=8", "optimizer.lr=0.2")], ids=lambda more: more[0])
def test_what_a_run_may_have_beside_goes_on(more, moment, reference):
    places = ["batch 0 4", "batch 1 9"] if more[0] == "dataset.val_size=0" else ["batch 0 4", "val", "batch 1 2", "val"]
    wanted = reference("dfa", *more)
    assert_same(stop_and_resume(moment, places, "dfa", *more), wanted)
    if "trainer.patience=1" in more:
        assert wanted["summary"]["epochs"] < 8      # else it shows nothing


# fault 11
def test_bad_batches_are_left_out_and_told_as_if_never_stopped(moment, monkeypatch):
    learn, bad = BP.learn, []

    def spoiled(self, x, y, apply):
        found = learn(self, x, y, apply)
        if bad and any(torch.equal(x, b) for b in bad):
            found.loss = found.loss * float("nan")
        return found

    config = lbp.config.compose([*settings("bp")])
    from lbp.training.setup import build
    batches = [x.clone() for x, _ in build(config.values).data.train.batches(0)]
    bad += [batches[2], batches[7]]
    monkeypatch.setattr(BP, "learn", spoiled)
    assert train("bp", "trainer.on_nonfinite=skip", to="whole") == 0
    found = stop_and_resume(moment, ["batch 0 5"], "bp", "trainer.on_nonfinite=skip")
    assert_same(found, fingerprint(Path("whole")))


# fault 11
def test_a_dead_second_half_is_told_as_if_never_stopped(moment, monkeypatch):
    """The warning of an epoch without a gradient is of the whole epoch, not of what was left of it."""
    learn, seen = BP.learn, []

    def dying(self, x, y, apply):
        found = learn(self, x, y, apply)
        seen.append(1)
        if 5 < len(seen) <= 10:
            for p in self.parameters():
                p.grad.zero_()
        return found

    monkeypatch.setattr(BP, "learn", dying)
    assert train("bp", to="whole") == 0
    seen.clear()
    assert_same(stop_and_resume(moment, ["batch 0 5"], "bp"), fingerprint(Path("whole")))


def test_a_run_out_of_time_goes_on_when_given_more(moment, reference):
    from lbp.training import progress

    moment("batch 1 3", lambda: setattr(progress.Progress, "tick", lambda self: 1e9))
    tick = progress.Progress.tick
    try:
        assert train("bp", "trainer.max_minutes=100") == 0
    finally:
        progress.Progress.tick = tick
    assert status() == "done" and state()["step"] == 13
    assert command("resume", "run", "trainer.max_minutes=200") == 0
    assert_same(fingerprint(Path("run")), reference("bp"), WEIGHTS)


# ---- fault 8: killed

# fault 8
@pytest.mark.parametrize("algo, seed", [("bp", 1), ("kp", 2), ("forward_forward", 3), ("elm", 4), ("zorb", 5)])
def test_killed_again_and_again(algo, seed, reference):
    wanted, rng, kills = reference(algo), random.Random(seed), 0
    words = ("train", *settings(algo), "run.dir=run")
    while True:
        at = rng.randrange(1, 20 if algo in SOLVERS else 70) if kills < 4 else 10**9
        code = forked(*words, before=lambda: armed(at))
        assert code in (0, -signal.SIGKILL), errors()
        if code == 0:
            break
        assert status() == "running"
        kills, words = kills + 1, ("resume", "run")
    assert kills >= 2
    assert_same(fingerprint(Path("run")), wanted)


# fault 8
@pytest.mark.parametrize("place", ["batch 0 0", "train"])
def test_killed_before_the_first_checkpoint_it_starts_anew(place, moment, reference):
    algo = "elm" if place == "train" else "bp"
    more = () if algo == "elm" else ("metrics.every=1",)
    if algo == "elm":   # before the checkpoint that a fit begins with
        before = lambda: setattr(checkpoint.Checkpoints, "save", lambda *_: kill())
    else:
        before = lambda: moment("batch 0 2", kill)
    assert forked("train", *settings(algo, *more), "run.dir=run", before=before) == -9
    assert status() == "running" and not Path("run/checkpoints").exists()
    assert command("resume", "run") == 0
    assert_same(fingerprint(Path("run")), reference(algo, *more))


# fault 8
def test_what_a_kill_left_of_a_checkpoint_is_not_the_best_one():
    """A file left by a kill may be best.pt by another name: it is not written into."""
    kept = Checkpoints(Path("kept"))
    content = {key: {} for key in checkpoint.PARTS}
    kept.save(content | {"state": {"epoch": 1}})
    replace = os.replace

    def dies(source, target):
        if Path(target).name == "last.pt":
            raise KeyboardInterrupt
        replace(source, target)

    os.replace = dies
    try:
        with pytest.raises(KeyboardInterrupt):
            kept.save(content | {"state": {"epoch": 2}}, best=True)
    finally:
        os.replace = replace
    assert load(Path("kept/best.pt"))["state"] == {"epoch": 2}
    Checkpoints(Path("kept")).save(content | {"state": {"epoch": 1.5}})
    assert load(Path("kept/best.pt"))["state"] == {"epoch": 2}
    assert [load(Path(f"kept/{name}.pt"))["state"]["epoch"] for name in ("previous", "last")] == [1, 1.5]
    assert not list(Path("kept").glob("*.tmp"))


# ---- fault 7: damaged checkpoints

def damaged(data, how):
    middle = len(data) // 2
    return {"truncated": data[:middle], "cut at the end": data[:-1], "empty": b"", "html": b"<!DOCTYPE html><html>404</html>" * 40,
            "flipped": data[:middle] + bytes([data[middle] ^ 16]) + data[middle + 1:], "longer": data + b"\0", "doubled": data + data[:-1]}[how]


DAMAGE = ["truncated", "cut at the end", "empty", "html", "flipped", "longer", "doubled"]


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run that was killed in its second epoch, with last, previous and best."""
    folder, here = tmp_path_factory.mktemp("stopped"), Path.cwd()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        batches = Split.batches

        def fetched(self, epoch, skip=0):
            for number, found in enumerate(batches(self, epoch, skip), skip):
                if (epoch, number) == (1, 8):
                    signal.raise_signal(signal.SIGTERM)
                yield found

        patch.setattr(Split, "batches", fetched)
        assert train("bp") == 143
    assert state(folder / "run")["step"] == 18
    return folder / "run"


@pytest.fixture
def run(stopped):
    shutil.copytree(stopped, "run")
    return Path("run")


# fault 7
@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over(how, run, reference):
    last = run / "checkpoints/last.pt"
    last.write_bytes(damaged(last.read_bytes(), how))
    with pytest.raises(DataError, match="last.pt: not a readable checkpoint"):
        load(last)
    assert command("resume", "run") == 0
    log = (run / "log.txt").read_text()
    assert "passed over run/checkpoints/last.pt" in log and "goes on at step 15: epoch 2, batch 6" in log
    assert_same(fingerprint(run), reference("bp"))


# fault 7
def test_one_flipped_byte_is_never_taken(run):
    good = (run / "checkpoints/last.pt").read_bytes()
    rng, bad = random.Random(0), Path("bad.pt")
    for place in {0, 1, 30, len(good) - 1, len(good) - 64, len(good) - 65, len(good) - 76, len(good) - 78, *(rng.randrange(len(good)) for _ in range(100))}:
        bad.write_bytes(good[:place] + bytes([good[place] ^ 1 << rng.randrange(8)]) + good[place + 1:])
        with pytest.raises(DataError, match="bad.pt"):
            load(bad)


# fault 7
def test_another_format_and_what_is_no_checkpoint(run):
    good = load(run / "checkpoints/last.pt")
    torch.save(good, "plain.pt")
    with pytest.raises(DataError, match="checksum"):
        load(Path("plain.pt"))
    write(Path("part.pt"), {"rule": {}})
    with pytest.raises(DataError, match="it has no values"):
        load(Path("part.pt"))
    write(Path("other.pt"), good | {"format": 7})
    with pytest.raises(DataError, match="format 7, this lbp reads 1"):
        load(Path("other.pt"))
    shutil.copy("other.pt", run / "checkpoints/last.pt")
    assert command("resume", "run") == 0 and "format 7" in (run / "log.txt").read_text()


# fault 7
def test_weights_of_another_shape_are_refused_by_file_and_cause(run, capsys, reference):
    last = run / "checkpoints/last.pt"
    content = load(last)
    content["rule"]["network.blocks.head.weight"] = torch.zeros(10, 13)
    write(last, content)
    code = command("resume", "run")
    assert code in (0, 3)
    told = capsys.readouterr().err + (run / "log.txt").read_text()
    assert "last.pt" in told and "head.weight" in told and "a bug in lbp" not in told
    if code == 0:
        assert_same(fingerprint(run), reference("bp"))


# fault 7
def test_none_good_is_refused_naming_each(run, capsys):
    for name in ("last", "previous", "best"):
        (run / f"checkpoints/{name}.pt").write_bytes(b"")
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    assert command("resume", "run") == 3
    told = capsys.readouterr().err
    assert all(f"{name}.pt" in told for name in ("last", "previous", "best")) and "lbp rerun" in told
    assert before == {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}


# fault 7, 8
def test_a_damaged_checkpoint_does_not_push_out_the_good_one(run, reference):
    (run / "checkpoints/last.pt").write_bytes(b"")
    (run / "checkpoints/best.pt").unlink()

    def before():
        replace = os.replace
        os.replace = lambda source, target: kill() if Path(target).name == "last.pt" else replace(source, target)

    assert forked("resume", "run", before=before) == -9
    assert command("resume", "run") == 0
    assert_same(fingerprint(run), reference("bp"), ("rule", "optimizer", "generators", "lines"))


# fault 7
def test_a_damaged_best_checkpoint_does_not_end_a_run_for_ever(moment, capsys):
    """The validation's choice is lost, the run is not: its weights need nothing of best.pt."""
    moment("test")
    assert train("bp", "trainer.epochs=8", "optimizer.lr=0.2", "trainer.patience=1") == 143
    assert state()["best_epoch"] < state()["epoch"]
    Path("run/checkpoints/best.pt").write_bytes(b"")
    code = command("resume", "run")
    assert "best.pt" in capsys.readouterr().err + Path("run/log.txt").read_text()
    assert code == 0 and status() == "done"


# fault 7
def test_a_finished_run_whose_last_checkpoint_is_damaged_is_mended(reference):
    assert train("bp") == 0
    Path("run/checkpoints/last.pt").write_bytes(b"")
    assert command("eval", "run") == 3 and command("resume", "run") == 0 and command("eval", "run") == 0
    assert_same(fingerprint(Path("run")), reference("bp"))


# fault 7
def test_lost_lines_are_not_passed_over_in_silence(run, capsys, reference):
    lines = run / "metrics.jsonl"
    text = lines.read_bytes()
    lines.write_bytes(text[:500])
    assert command("resume", "run") == 3
    assert "metrics.jsonl: has 500 bytes" in capsys.readouterr().err and lines.read_bytes() == text[:500]
    lines.write_bytes(text)
    assert command("resume", "run") == 0
    assert_same(fingerprint(run), reference("bp"))


# ---- fault 6: checkpoints from strangers

class Payload:
    def __reduce__(self):
        return Path.touch, (Path("marker"),)


def malicious(kind):
    if kind == "pickle":
        return pickle.dumps({"format": 1, "rule": Payload()})
    if kind == "torch":
        torch.save({"format": 1, "rule": Payload()}, file := io.BytesIO())
        return file.getvalue()
    write(Path("evil.pt"), {key: {} for key in checkpoint.PARTS} | {"rule": Payload()})     # with a checksum that fits
    return Path("evil.pt").read_bytes()


# fault 6
@pytest.mark.parametrize("kind", ["pickle", "torch", "checksummed"])
def test_a_malicious_checkpoint_runs_nothing(kind, run, capsys):
    data = malicious(kind)
    for name in ("last", "previous", "best"):
        (run / f"checkpoints/{name}.pt").write_bytes(data)
    with pytest.raises(DataError):
        load(run / "checkpoints/last.pt")
    for words in (("resume", "run"), ("eval", "run"), ("eval", "run", "--checkpoint", "best"), ("export", "run"),
                  ("train", *settings("bp"), "run.init_from=run", "run.dir=new"),
                  ("train", *settings("bp"), "run.init_from=run/checkpoints/best.pt", "run.dir=new")):
        assert command(*words) == 3, words
        assert "not a readable checkpoint" in capsys.readouterr().err
    assert not Path("marker").exists() and not Path("new").exists()
    if kind == "pickle":    # it would have, had anybody loaded it
        pickle.loads(data)
        assert Path("marker").exists()


# ---- faults 9 and 10: signals

def slow(self, x, y, apply):
    here()
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        time.sleep(0.01)


def deaf(self, x, y, apply):
    """Deep in C, where no Python handler runs."""
    here()
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)


# fault 9
@pytest.mark.parametrize("place, algo", [("batch 0 4", "bp"), ("val", "bp"), ("test", "bp"), ("train", "elm"), ("val", "elm")])
def test_sigterm_leaves_a_checkpoint(place, algo, moment, reference):
    child = Child("train", *settings(algo), "run.name=x", before=lambda: moment(place, pause))
    child.hit(signal.SIGTERM)
    began = time.monotonic()
    assert child.end() == 143 and time.monotonic() - began < 60
    run, = Path("outputs").glob("*/*")
    assert status(run) == "interrupted" and "Traceback" not in errors() and "lbp resume " in errors() and run.name in errors()
    load(run / "checkpoints/last.pt")
    assert command("resume", "last") == 0
    assert_same(fingerprint(run), reference(algo))


# fault 9
def test_sigterm_while_the_data_is_prepared(monkeypatch, reference):
    from lbp.training import setup
    whole = setup.load

    def loading(*args, **kwargs):
        pause(lambda: False)
        return whole(*args, **kwargs)

    child = Child("train", *settings("bp"), "run.dir=run", before=lambda: setattr(setup, "load", loading))
    child.hit(signal.SIGTERM)
    began = time.monotonic()
    assert child.end() == 143 and time.monotonic() - began < 60
    assert status() == "interrupted" and "Traceback" not in errors() and "left at once" not in errors()
    assert command("resume", "run") == 0
    assert_same(fingerprint(Path("run")), reference("bp"))


# fault 9
@pytest.mark.parametrize("made_of_it", ["another error", "nothing"])
def test_sigterm_in_a_library_that_takes_it_for_something_else(made_of_it, reference):
    from lbp.training import setup
    whole = setup.load

    def loading(*args, **kwargs):
        try:
            pause(lambda: False)
        except BaseException:
            if made_of_it == "another error":
                raise ValueError("the file") from None
        return whole(*args, **kwargs)

    child = Child("train", *settings("bp"), "run.dir=run", before=lambda: setattr(setup, "load", loading))
    child.hit(signal.SIGTERM)
    assert child.end() == 143 and status() in ("interrupted", "failed") and "Traceback" not in errors()
    assert command("resume", "run") == 0
    assert_same(fingerprint(Path("run")), reference("bp"))


# fault 9
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("where", ["write", "add_meta", "how_many", "locked", "describe"])
def test_stopped_while_the_folder_is_made(where, number, reference):
    """What is there after is a run that can be resumed, or no run: nothing in between."""
    from lbp.launch import one

    def before():
        home = folders if hasattr(folders, where) else one
        whole = getattr(home, where)

        def stopped(*args, **kwargs):
            setattr(home, where, whole)     # once: a second signal leaves at once
            os.kill(os.getpid(), number)
            return whole(*args, **kwargs)

        setattr(home, where, stopped)

    assert forked("train", *settings("bp"), "run.dir=run", before=before) in (-9, 143, 0)
    if Path("run/config.yaml").exists():
        assert number == signal.SIGKILL or Path("run/STATUS").exists() and status() == "interrupted"
        assert command("resume", "run") == 0
        assert_same(fingerprint(Path("run")), reference("bp"))
    else:
        assert number == signal.SIGKILL or not Path("run").exists()


# fault 9
def test_sigterm_after_the_last_line(monkeypatch):
    close = Console.close

    def closing(self, *args):
        close(self, *args)
        signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Console, "close", closing)
        assert train("bp") in (0, 143) and status() == "done"
    assert command("resume", "run") == 0


# fault 9
@pytest.mark.parametrize("learn", [slow, deaf])
def test_sigterm_in_a_batch_without_end(learn, run, reference):
    assert 0 < interrupt.GRACE < 8      # seconds; supervisors wait for ten
    before = (run / "checkpoints/last.pt").read_bytes()

    def start():
        interrupt.GRACE, BP.learn = 0.3, learn

    child = Child("resume", "run", before=start)
    child.hit(signal.SIGTERM)
    began = time.monotonic()
    assert child.end() == 143 and 0.2 < time.monotonic() - began < 60
    assert status() == "interrupted" and "left at once" in errors()
    assert (run / "checkpoints/last.pt").read_bytes() == before
    assert command("resume", "run") == 0
    assert_same(fingerprint(run), reference("bp"))


# fault 10
def test_ctrl_c_once_saves(moment, reference):
    child = Child("train", *settings("bp", "trainer.checkpoint_every=1000"), "run.dir=run", before=lambda: moment("batch 0 4", pause))
    child.hit(signal.SIGINT)
    assert child.end() == 130 and status() == "interrupted" and "Traceback" not in errors()
    assert state()["step"] == 4
    assert command("resume", "run") == 0
    assert_same(fingerprint(Path("run")), reference("bp"))


# fault 10
@pytest.mark.parametrize("learn", [slow, deaf])
@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_the_second_signal_leaves_at_once(learn, first, run, reference):
    before = (run / "checkpoints/last.pt").read_bytes()
    child = Child("resume", "run", before=lambda: setattr(BP, "learn", learn))
    child.hit(first)
    time.sleep(0.2)
    began = time.monotonic()
    child.hit(signal.SIGINT)
    assert child.end() == 128 + first and time.monotonic() - began < 60
    assert (run / "checkpoints/last.pt").read_bytes() == before and status() == "interrupted"
    assert command("resume", "run") == 0
    assert_same(fingerprint(run), reference("bp"))


# fault 10
def test_ctrl_c_from_python(moment):
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    for place, step in (("batch 0 4", 4), ("val", 10), ("test", 20)):
        moment(place, lambda: signal.raise_signal(signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            lbp.run(*settings("bp"), f"run.dir={step}")
        assert state(str(step))["step"] == step and status(str(step)) == "interrupted"
        assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == handlers
        interrupt.poll()    # nothing that comes after is asked to end


# fault 10
def test_two_ctrl_c_from_python(monkeypatch):
    def twice(self, x, y, apply):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        pytest.fail("the second came to nothing")

    monkeypatch.setattr(BP, "learn", twice)
    with pytest.raises(KeyboardInterrupt):
        lbp.run(*settings("bp"), "run.dir=run")
    assert status() == "interrupted" and signal.getsignal(signal.SIGINT) is signal.default_int_handler


# fault 10
def test_ctrl_c_that_comes_too_late_is_not_lost(monkeypatch):
    """A script that trains run after run is ended by one Ctrl-C, also by one in the last moment of a run."""
    written = folders.write_json

    def late(path, content):
        if path.name == "summary.json":
            signal.raise_signal(signal.SIGINT)
        written(path, content)

    monkeypatch.setattr(folders, "write_json", late)
    with pytest.raises(KeyboardInterrupt):
        lbp.run(*settings("bp"), "run.dir=run")
    assert status() == "done" and not interrupt.asked()


def test_interrupts_of_one_run_are_not_those_of_another_in_a_thread(moment):
    from threading import Thread
    moment("batch 0 4", lambda: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        lbp.run(*settings("bp"), "run.dir=first")
    thread = Thread(target=lbp.run, args=(*settings("bp"), "run.dir=second"))
    thread.start()
    thread.join(20)
    assert status("second") == "done"


# ---- fault 12: changed settings

# fault 12
@pytest.mark.parametrize("algo, change, told", [
    ("dfa", ["algo.scale=0.5"], ["algo.scale"]), ("bp", ["optimizer.lr=0.5", "seed=1"], ["optimizer.lr", "seed"]),
    ("bp", ["arch.widths=[8,8]"], ["arch.widths"]), ("bp", ["optimizer=sgd"], ["optimizer.name"]),
    ("bp", ["dataset=wine"], ["dataset"]), ("bp", ["algo=fa"], ["algo.name"]), ("bp", ["trainer.batch_size=32"], ["trainer.batch_size"]),
    ("bp", ["trainer.epochs=1"], ["trainer.epochs"]), ("bp", ["run.init_from=run"], ["run.init_from"])])
def test_changed_settings_are_refused(algo, change, told, moment, capsys):
    moment("batch 0 4")
    if algo == "dfa":
        change = [f"algo.{next(k for k in registry.option('algo', 'dfa').knobs)}=" + change[0].split("=")[1]]
        told = [change[0].split("=")[0]]
    assert train(algo) == 143
    capsys.readouterr()
    before = {p: p.read_bytes() for p in Path("run").rglob("*") if p.is_file()}
    assert command("resume", "run", *change) == 2
    found = capsys.readouterr().err
    assert all(key in found for key in told), found
    assert before == {p: p.read_bytes() for p in Path("run").rglob("*") if p.is_file()}


# fault 12
def test_settings_changed_in_the_file_are_refused(run, capsys):
    file = run / "config.yaml"
    text = file.read_text()
    edited = text.replace("seed: 0", "seed: 3").replace("- 12", "- 13").replace("lr: 0.001", "lr: 0.002")
    file.write_text(edited)
    assert command("resume", "run") == 2
    told = capsys.readouterr().err
    assert all(key in told for key in ("seed=3", "arch.widths=[16, 13]", "optimizer.lr=0.002"))
    assert file.read_text() == edited and status() == "interrupted"
    file.write_text(text.replace("epochs: 2", "epochs: 3"))
    assert command("resume", "run") == 0 and state()["epoch"] == 3


# fault 12
def test_free_settings_pass(run, reference):
    assert command("resume", "run", "logger.console=plain", "trainer.max_minutes=50", "trainer.patience=9", "trainer.checkpoint_every=1",
                   "trainer.on_nonfinite=skip") == 0
    assert_same(fingerprint(run), reference("bp"))
    assert "patience: 9" in (run / "config.yaml").read_text()
    assert json.loads((run / "meta.json").read_text())["resumed"][0]["overrides"][0] == "logger.console=plain"


# fault 12
@pytest.mark.parametrize("algo", [a for a in CLASSES if a not in SOLVERS])
def test_a_finished_run_says_so_or_goes_on(algo, reference, capsys):
    constant = ["schedule=constant"] if registry.entry("algo", registry.option("algo", algo).name).facts["optimized"] else []     # others hang on the number of epochs
    assert train(algo, *constant) == 0
    before = {p: p.read_bytes() for p in Path("run").rglob("*") if p.is_file() and p.name != ".lock"}
    capsys.readouterr()
    assert command("resume", "run") == 0 and command("resume", "run", "logger.console=off") == 0
    assert "done already, after" in capsys.readouterr().out
    assert before == {p: p.read_bytes() for p in Path("run").rglob("*") if p.is_file() and p.name != ".lock"}
    assert command("resume", "run", "trainer.epochs=1") == 2
    if algo in ("greedy", "readout"):    # whose first stages are over, after trainer.epochs each
        assert command("resume", "run", "trainer.epochs=3") == 2 and "trainer.epochs=3: " in capsys.readouterr().err
        assert before == {p: p.read_bytes() for p in Path("run").rglob("*") if p.is_file() and p.name != ".lock"}
        return
    assert command("resume", "run", "trainer.epochs=3") == 0
    wanted, found = reference(algo, *constant, "trainer.epochs=3"), fingerprint(Path("run"))
    assert_same(found, wanted, ("rule", "optimizer", "generators", "best", "twice"))
    last = wanted["lines"][-1]
    assert found["lines"][-1] == last and found["summary"]["test_loss"] == wanted["summary"]["test_loss"]
    assert [line for line in found["lines"] if line["split"] != "train"] == [line for line in wanted["lines"] if line["split"] != "train"]


# fault 12
def test_a_run_stopped_by_patience_goes_on_when_given_more(reference):
    more = ("trainer.epochs=8", "optimizer.lr=0.2")
    assert train("bp", *more, "trainer.patience=1") == 0
    assert (stopped := state()["epoch"]) < 8
    assert command("resume", "run", "trainer.patience=3") == 0 and state()["epoch"] > stopped
    assert_same(fingerprint(Path("run")), reference("bp", *more, "trainer.patience=3"), WEIGHTS[:4])


# fault 12
def test_a_finished_run_whose_longer_life_is_killed(reference):
    assert train("bp") == 0
    assert forked("resume", "run", "trainer.epochs=3", before=lambda: armed(3)) == -9
    assert command("resume", "run") == 0
    assert_same(fingerprint(Path("run")), reference("bp", "trainer.epochs=3"), WEIGHTS[:4])


def test_a_finished_solver_says_so(capsys):
    assert train("elm") == 0 and command("resume", "run") == 0
    assert "done already" in capsys.readouterr().out


# ---- fault 13: no room

# fault 13
def test_no_room_for_a_checkpoint(run, reference):
    size = (run / "checkpoints/last.pt").stat().st_size
    before = (run / "checkpoints/last.pt").read_bytes()
    folders.add_meta(run, git=None)
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, size // 2))
    assert forked("resume", "run", before=limit) == 5
    told = errors()
    assert "needs" in told and "MiB" in told and "free at run/checkpoints" in told and "Traceback" not in told
    assert status() == "failed" and (run / "checkpoints/last.pt").read_bytes() == before
    assert not list(run.rglob("*.tmp"))
    assert command("resume", "run") == 0
    assert_same(fingerprint(run), reference("bp"))


# fault 13
@pytest.mark.parametrize("at", [1, 9, 17])
def test_no_room_while_a_checkpoint_is_written(at, run, reference, monkeypatch, capsys):
    put, seen = checkpoint._Hashed.write, []

    def full(self, data):
        seen.append(1)
        if len(seen) >= at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return put(self, data)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint._Hashed, "write", full)
        assert command("resume", "run") == 5
    assert "disk is full" in capsys.readouterr().err
    assert command("resume", "run") == 0
    assert_same(fingerprint(run), reference("bp"))


# fault 13
def test_no_room_for_a_line(reference):
    def limit():
        folders.git = lambda: None      # its diff may be longer
        resource.setrlimit(resource.RLIMIT_FSIZE, (8000, 8000))

    more = ("metrics.every=1", "trainer.checkpoint_every=1000")
    assert forked("train", *settings("bp", *more), "run.dir=run", before=limit) == 5
    told = errors()
    assert "disk is full: run/metrics.jsonl" in told and "MiB free" in told and "Traceback" not in told
    assert status() == "failed"
    assert command("resume", "run") == 0
    assert_same(fingerprint(Path("run")), reference("bp", *more))


# ---- one folder, one run

def test_two_at_once_are_refused(run, moment, reference):
    child = Child("resume", "run", before=lambda: moment("batch 1 9", lambda: pause(Path("go").exists)))
    while not Path(HERE).exists():
        time.sleep(0.01)
    assert command("resume", "run") == 2 and command("resume", "run", "trainer.epochs=5") == 2
    Path("go").touch()
    assert child.end() == 0
    assert_same(fingerprint(run), reference("bp"))


def test_a_new_run_holds_its_folder_too(moment, capsys):
    child = Child("train", *settings("bp"), "run.dir=run", before=lambda: moment("batch 1 9", lambda: pause(Path("go").exists)))
    while not Path(HERE).exists():
        time.sleep(0.01)
    assert command("resume", "run") == 2 and "another process is training" in capsys.readouterr().err
    Path("go").touch()
    assert child.end() == 0 and status() == "done"


# ---- run.init_from

def test_a_warm_start_has_the_weights_and_nothing_else(run):
    source = load(run / "checkpoints/last.pt")
    begun = lbp.run(*settings("fa", "trainer.epochs=0"), "run.init_from=run", "run.dir=zero").network.state_dict()
    assert sha({f"network.{k}": v for k, v in begun.items()}) == sha({k: v for k, v in source["rule"].items() if k.startswith("network.")})
    assert train("bp", "run.init_from=run", "trainer.epochs=1", to="one") == 0
    found = load(Path("one/checkpoints/last.pt"))
    assert found["state"]["step"] == 10 and found["state"]["epoch"] == 1
    assert {int(s["step"]) for s in found["apply"]["forward"]["state"].values()} == {10}
    assert json.loads((Path("one/metrics.jsonl")).read_text().splitlines()[0])["step"] == 1


def test_a_warm_start_of_another_shape_is_refused(run, capsys):
    assert train("bp", "arch.widths=[16,13]", "run.init_from=run", to="new") == 2
    told = capsys.readouterr().err
    assert "fc2" in told and "[12, 16]" in told and "[13, 16]" in told and not Path("new").exists()
    assert train("bp", "run.init_from=nowhere", to="new") == 2 and not Path("new").exists()
    shutil.rmtree(run / "checkpoints")
    assert train("bp", "run.init_from=run", to="new") == 3 and not Path("new").exists()


def test_a_warm_start_needs_its_source_no_more(moment, capsys):
    assert command("train", *settings("fa")) == 0
    source, = Path("outputs").glob("*/*")
    for to in ("whole", "run"):
        if to == "run":
            moment("batch 1 2")
        assert train("bp", "run.init_from=last", to=to) == (143 if to == "run" else 0)
        assert f"init_from: {source.absolute()}/checkpoints/last.pt" in Path(to, "config.yaml").read_text()
    shutil.rmtree("outputs")
    assert command("resume", "run") == 0, capsys.readouterr().err
    assert_same(fingerprint(Path("run")), fingerprint(Path("whole")))
    assert command("eval", "run") == 0


def test_a_pipeline_goes_on_with_what_it_can(tmp_path):
    """What stages would refuse is refused before anything of the run is touched."""
    (tmp_path / "run").mkdir()
    folders.text(tmp_path / "run/config.yaml", compose(["launch=pipeline", "algo=local"]).yaml())
    with pytest.raises(ConfigError, match=r"trainer.on_nonfinite=skip: the run was trained with stop") as refused:
        prepare(tmp_path / "run", ["trainer.on_nonfinite=skip"])
    assert "free are trainer.epochs" in str(refused.value) and "checkpoint_every, launch" in str(refused.value)


def files_of(folder):
    return {name: (folder / name).read_bytes() for name in ("config.yaml", "meta.json", "summary.json", "STATUS", "metrics.jsonl", "log.txt")}


def test_what_is_refused_leaves_a_run_as_it_was(tmp_path, capsys):
    """Settings that it cannot go on with, and data that are gone."""
    import numpy as np

    quick = ("trainer.epochs=1", "arch.widths=[6,6]", "logger.wandb.mode=disabled", "run.dir=run")
    np.savez("data.npz", x=np.random.default_rng(0).normal(size=(60, 5)), y=np.arange(60) % 2)
    for words, missing, more, code, said in (
            (("dataset=digits", "algo=greedy"), None, "trainer.epochs=3", 2, "cannot be lengthened"),
            (("dataset=files", "dataset.file=data.npz"), Path("data.npz"), "trainer.epochs=3", 3, "data.npz")):
        assert command("train", *words, *quick) == 0
        before = files_of(Path("run"))
        if missing:
            missing.rename("away")
        capsys.readouterr()
        assert command("resume", "run", more) == code and said in capsys.readouterr().err
        assert files_of(Path("run")) == before
        shutil.rmtree("run")


def test_a_run_without_gain_goes_on_with_more_patience(capsys):
    assert command("train", "dataset=digits", "arch.widths=[6]", "trainer.epochs=30", "trainer.patience=1", "optimizer.lr=0.3",
                   "logger.wandb.mode=disabled", "run.dir=run") == 0
    capsys.readouterr()
    assert command("resume", "run") == 0 and "trainer.patience=N trains it for longer" in capsys.readouterr().out
    assert command("resume", "run", "trainer.epochs=60") == 2 and "trainer.patience=1: ended the run" in capsys.readouterr().err
    epochs = json.loads(Path("run/summary.json").read_text())["epochs"]
    assert command("resume", "run", "trainer.patience=4") == 0 and json.loads(Path("run/summary.json").read_text())["epochs"] > epochs


def test_an_epoch_is_begun_again_only_where_it_was_kept(capsys):
    words = ("dataset=digits", "algo=bp", "arch.widths=[6]", "arch.activation=leaky_relu", "optimizer=sgd", "optimizer.lr=1.0e+15",
             "trainer.checkpoint_every=1", "trainer.epochs=2", "logger.wandb.mode=disabled")
    assert command("train", *words, "run.dir=run") == 4
    assert command("resume", "run", "trainer.on_nonfinite=restore") == 2
    assert "use trainer.on_nonfinite=skip" in capsys.readouterr().err and Path("run/STATUS").read_text() == "diverged\n"
    kept = Checkpoints(Path("run/checkpoints"))
    assert not kept.epoch_began(0)
    kept.keep_for_epoch()       # of a checkpoint within the epoch
    assert not kept.epoch_began(0)
