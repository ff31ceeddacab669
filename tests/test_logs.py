"""What a run shows on a terminal, and what it leaves in Weights & Biases."""

import contextlib
import fcntl
import io
import json
import os
import pty
import re
import select
import signal
import statistics
import struct
import subprocess
import sys
import termios
import threading
import time
import types
import warnings
from pathlib import Path

import pytest
import yaml
from conftest import PATIENCE

import lbp
from lbp import cli
from lbp.config import compose
from lbp.errors import LbpError
from lbp.launch import folder as folders
from lbp.launch.one import start
from lbp.launch.resume import resume
from lbp.launch.sync import sync
from lbp.logs import console, live
from lbp.logs import wandb as view
from lbp.logs.wandb import Wandb, flat, flat_summary, mode_of
from lbp.training.loop import Loop
from lbp.training.progress import State

ROOT = Path(__file__).parents[1]
QUICK = ("dataset=digits", "arch.widths=[16]", "algo=dfa", "metrics.every=5", "trainer.epochs=2", "logger.console=off")
SETTINGS, OPTIONS = {"project": "lbp", "mode": "offline"}, {"algo": "dfa", "dataset": "digits", "arch": "mlp"}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("WANDB_")] + ["COLUMNS", "NO_COLOR"]:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("HOME", str(tmp_path))


def records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# ---- the terminal

class Screen:
    """As much of a terminal as a live view may use; `broken`: how often a line was too long for it."""

    def __init__(self, columns):
        self.columns, self.rows, self.row, self.column, self.broken = columns, [""], 0, 0, []

    def feed(self, text):
        for part in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|\r|\n|[^\x1b\r\n]+|\x1b", text):
            if part == "\r":
                self.column = 0
            elif part == "\n":
                self._down()
            elif part[0] == "\x1b":
                count, kind = part[2:-1], part[-1:]
                assert kind in "AKm", f"{part!r} changes the terminal's state"  # no hidden cursor, no second screen
                if kind == "A":
                    self.row -= int(count)
                    assert self.row >= 0
                elif kind == "K":
                    self.rows[self.row] = ""
            else:
                for c in part:
                    if self.column == self.columns:
                        self.broken.append(self.rows[self.row])
                        self.column = 0
                        self._down()
                    self.rows[self.row] = self.rows[self.row][:self.column].ljust(self.column) + c
                    self.column += 1
        return self

    def _down(self):
        self.row += 1
        if self.row == len(self.rows):
            self.rows.append("")


def on_a_terminal(*argv, columns=80, rows=24, act=None, env=None, code=None):
    """(exit code, all that came) of lbp, or of Python code, on a pseudo-terminal; `act(process, output)` is called after each read."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    environment = os.environ | {"TERM": "xterm-256color", "LC_ALL": "C.UTF-8", "COLUMNS": "200", "PYTHONPATH": f"{ROOT}:{os.environ['PYTHONPATH']}"}
    with subprocess.Popen([sys.executable, *(["-c", code] if code else ["-m", "lbp"]), *argv], stdin=slave, stdout=slave, stderr=slave,
                          env=environment | (env or {}), start_new_session=True) as process:
        os.close(slave)
        out, end = b"", time.monotonic() + PATIENCE
        try:
            while time.monotonic() < end:
                if select.select([master], [], [], 0.1)[0]:
                    try:
                        got = os.read(master, 1 << 16)
                    except OSError:     # the other end is closed
                        break
                    out += got
                    if act and act(process, out) == "hang up":
                        break
            return process.wait(60), out.decode()
        finally:
            os.close(master)
            process.kill()


TRAIN = (*QUICK[:4], "logger.wandb.mode=disabled", "run.dir=there")


@pytest.fixture
def terminal(monkeypatch):
    """Runs something here, with stdout and stderr on a pseudo-terminal of so many columns; gives back all that came."""
    def on(columns, work, hang_up=""):
        master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        got, gone = [], threading.Event()

        def read():
            while not (hang_up and hang_up in "".join(got)):
                try:
                    got.append(os.read(master, 1 << 16).decode())
                except OSError:
                    break
            os.close(master)
            gone.set()

        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        stream = open(slave, "w", encoding="utf-8")
        with monkeypatch.context() as patched:
            patched.setattr(sys, "stdout", stream)
            patched.setattr(sys, "stderr", stream)
            patched.setenv("TERM", "xterm-256color")
            patched.setenv("COLUMNS", "200")
            work(gone)
            if not hang_up:
                assert sys.stdout is stream and sys.stderr is stream
                stream.flush()
            elif sys.stdout is not stream:
                sys.stdout.close()
        with contextlib.suppress(OSError):
            stream.close()
        reader.join(PATIENCE)
        return "".join(got)

    monkeypatch.setattr(live, "EVERY", 0.05)
    return on


@pytest.mark.parametrize("columns, no_color", [(40, ""), (80, "1"), (160, "")])
def test_a_live_view_keeps_to_the_terminal(columns, no_color, terminal, monkeypatch):
    monkeypatch.setenv("NO_COLOR", no_color)
    out = terminal(columns, lambda _: lbp.run(*TRAIN, "trainer.epochs=20"))
    assert out.count("samples/s") >= 2 and "Traceback" not in out     # frames
    screen = Screen(columns).feed(out)
    shown = "\n".join(screen.rows)
    assert not [row for row in screen.broken if "loss" in row or "samples/s" in row or "fc1" in row]
    assert shown.count("epoch 20/20") == 1 and "fc1 " in shown and "val   loss" in shown and "MB" in shown
    assert shown.index("fc1 ") < shown.index("test accuracy") and screen.rows[-1] == ""
    assert bool(re.search(r"\x1b\[[0-9;]*3[0-7]", out)) is not bool(no_color)
    log = Path("there/log.txt").read_text()
    assert log.count("\nepoch ") == 20 and "\x1b" not in log


def test_what_others_print_comes_whole(terminal, monkeypatch):
    before = Loop.close_epoch

    def louder(self, phase):
        print("from a plugin")
        warnings.warn("look out")
        before(self, phase)

    monkeypatch.setattr(Loop, "close_epoch", louder)
    monkeypatch.setattr(warnings, "showwarning", lambda message, *_: print(f"warned: {message}", file=sys.stderr))
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        rows = Screen(80).feed(terminal(80, lambda _: lbp.run(*TRAIN, "trainer.epochs=3"))).rows
    assert rows.count("from a plugin") == rows.count("warned: look out") == 3
    assert sum(row.startswith("epoch ") for row in rows) == 1


def test_an_error_comes_below(terminal):
    rows = Screen(80).feed(terminal(80, lambda _: cli.main(["train", *TRAIN, "optimizer=sgd", "optimizer.lr=1e30"]))).rows
    assert rows[-1] == "" and any(row.startswith("lbp: ") for row in rows) and folders.status(Path("there")) == "diverged"


def test_a_terminal_that_goes_away_stops_no_run(terminal, monkeypatch):
    before = Loop.close_epoch
    def later(self, phase):
        if self.state.epoch == 2:
            assert gone.wait(20)
        before(self, phase)

    def work(event):
        nonlocal gone
        gone = event
        lbp.run(*TRAIN, "trainer.epochs=6")

    gone = None
    monkeypatch.setattr(Loop, "close_epoch", later)
    terminal(80, work, hang_up="samples/s")
    assert folders.status(Path("there")) == "done" and Path("there/log.txt").read_text().count("\nepoch ") == 6


def test_a_stopped_run_leaves_the_terminal_in_order():
    def act(process, out):
        if out.count(b"samples/s") == 2:
            process.send_signal(signal.SIGINT)

    got, out = on_a_terminal("train", *TRAIN, "trainer.epochs=100000", act=act)
    rows = Screen(80).feed(out).rows
    assert got == 130 and "Traceback" not in out
    first = next(i for i, row in enumerate(rows) if row.startswith("lbp: interrupted"))
    assert any("fc1" in row for row in rows[:first]) and rows[-1] == "" and rows[-2].startswith("lbp: ")


def test_leaving_at_once_gives_the_terminal_back():
    """Asked twice, deep in what no Python handler can stop."""
    script = ("import lbp.cli, os, signal, time\nfrom lbp.training.loop import Loop\n"
              "def stuck(self, phase):\n    time.sleep(1.2); os.kill(os.getpid(), 15); time.sleep(0.3); os.kill(os.getpid(), 15); pow(3, 10**9)\n"
              f"Loop.learn = stuck\nlbp.cli.main(['train', *{TRAIN!r}])")
    got, out = on_a_terminal(code=script)
    rows = Screen(80).feed(out).rows
    assert got == 143 and rows[-1] == "" and folders.status(Path("there")) == "interrupted"
    assert sum(row.startswith("epoch ") for row in rows) == 1 and not any("epoch" in row and "lbp:" in row for row in rows)


class Tty:
    encoding, closed = "utf-8", False

    def __init__(self, write=lambda text: None):
        self.write = write

    def isatty(self):
        return True

    def flush(self):
        pass


def test_plain_where_there_is_no_terminal(monkeypatch, tmp_path):
    assert not console.can_be_live()    # captured
    monkeypatch.setattr(sys, "stdout", Tty())
    for term, answer in (("xterm", True), ("dumb", False), ("", False), ("unknown", False)):
        monkeypatch.setenv("TERM", term)
        assert console.can_be_live() is answer
    monkeypatch.delenv("TERM")
    assert not console.can_be_live()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stdout", types.SimpleNamespace(encoding="utf-8"))  # a notebook's, with nothing else
    assert not console.can_be_live()


def test_asked_for_and_not_possible_is_told(capsys):
    lbp.run(*QUICK[:-1], "logger.console=live")
    out = capsys.readouterr().out
    assert "logger.console=live: stdout is no terminal" in out and out.count("\nepoch ") == 2 and "\x1b" not in out


def made(epochs=20, layers=4, name="fc{}", **values):
    shown = live.View(epochs, ["accuracy"])
    shown.state = State(step=1240, epoch=2, batch=24, samples=5000, targets=300, **values)
    shown.steps, shown.total, shown.memory_mb, shown.encoding = 101, 9000, lambda: 812.3, "utf-8"
    shown.began, shown.first, shown.samples = time.monotonic() - 9.3, 0, live.deque([(time.monotonic() - 1, 0)])
    for record in ({"split": "train", "loss": 0.4123, "accuracy": 0.89, "layers": {name.format(i): {"alignment_deg": 20.0 * i} for i in range(layers)}},
                   {"split": "train_epoch", "loss": 0.4, "accuracy": 0.9}, {"split": "val", "epoch": 2, "loss": 0.45, "accuracy": 0.88}):
        shown.write(record)
    return shown


@pytest.mark.parametrize("layers, name", [(0, ""), (4, "fc{}"), (60, "stage{}.units.unit_with_a_long_name"), (7, "层{}"), (300, "b{}")])
def test_every_size_of_terminal(layers, name):
    from rich.cells import cell_len

    shown = made(layers=layers, name=name)
    for width in (1, 2, 5, 10, 20, 39, 40, 80, 160, 400):
        for height in (1, 2, 4, 8, 24, 60):
            lines = shown.frame(width, height).plain.split("\n")
            assert len(lines) <= max(height - 1, 1) and all(cell_len(line) <= max(width - 1, 1) for line in lines)
            assert "nothing to show" not in lines[0]
    shown.encoding = "ascii"
    assert shown.frame(80, 24).plain.isascii()


def test_what_a_frame_says():
    text = made().frame(80, 24).plain
    for part in ("epoch 3/20", "batch 24/101", "14%", "0:58 left", "samples/s", "812 MB", "batch loss 0.4123", "val   loss 0.4500  accuracy 0.8800",
                 "best  accuracy 0.8800 in epoch 2", "fc3 "):
        assert part in text, part
    bars = [part.count("\u2501") for part in text.split("fc")[1:]]
    assert bars == sorted(bars, reverse=True) and bars[0] == live.BAR   # 0, 20, 40, 60 degrees
    many = made(layers=300, name="b{}").frame(80, 24).plain
    assert "b0 " in many and "b299" in many and "more)" in many
    assert [live.clock(s) for s in (0, 59.9, 61, 3723, 90000)] == ["0:00", "0:59", "1:01", "1:02:03", "1 d 1 h"]


def test_a_broken_view_shows_so_and_goes_on():
    shown = made()
    shown.state = None
    assert "nothing to show: AttributeError" in shown.frame(80, 24).plain


def test_a_terminal_that_takes_nothing_holds_nobody_up(monkeypatch):
    stuck = threading.Event()
    monkeypatch.setattr(sys, "stdout", tty := Tty())
    monkeypatch.setattr(sys, "stderr", Tty())
    shown = live.View(2, ["accuracy"])
    shown.follow(State(), 10, 20, lambda: 1.0)
    tty.write = lambda text: stuck.wait(300)     # Ctrl-S
    before = time.monotonic()
    shown.stop(0.2)
    assert time.monotonic() - before < 60
    stuck.set()


def test_a_frame_costs_under_a_hundredth(monkeypatch):
    shown = made(layers=20)
    terminal = live.Console(file=io.StringIO(), force_terminal=True, width=80, height=24)
    shown.live = live.Live(console=terminal, auto_refresh=False, get_renderable=lambda: shown.frame(80, 24), redirect_stdout=False, redirect_stderr=False)
    shown.live.start(refresh=True)
    took = []
    for _ in range(20):
        before = time.thread_time()
        shown.live.refresh()
        took.append(time.thread_time() - before)
    shown.live.stop()
    assert sorted(took)[10] < live.EVERY / 100


# ---- Weights & Biases: what is in the file of an offline run

def recorded(path):
    """The records of a .wandb file, which is a LevelDB log of W&B's own messages."""
    from wandb.proto import wandb_internal_pb2 as pb

    data, at, part, found = path.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        if not kind or at + 7 + length > len(data):     # W&B is in the middle of writing this one
            break
        part += data[at + 7:at + 7 + length]
        at += 7 + length
        if kind in (1, 4):      # whole, or its last part
            found.append(pb.Record.FromString(part))
            part = b""
    return found


def read_back(folder):
    """(history rows, run, summary, metrics' axes) of the one recording in a run's folder."""
    file, = folder.glob("wandb/offline-run-*/*.wandb")
    end = time.monotonic() + PATIENCE
    while not any(r.WhichOneof("record_type") == "exit" for r in recorded(file)):   # W&B's process writes after finish() too
        assert time.monotonic() < end
        time.sleep(0.05)
    rows, summary, axes, run, code = [], {}, {}, None, None
    for record in recorded(file):
        kind = record.WhichOneof("record_type")
        if kind == "history":
            row = {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            rows.append({key: value for key, value in row.items() if not key.startswith("_")})
        elif kind == "summary":
            summary |= {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.summary.update}
        elif kind == "metric":
            axes[record.metric.name or record.metric.glob_name] = record.metric.step_metric
        elif kind == "run":
            run = record.run
        elif kind == "exit":
            code = record.exit.exit_code
    return [row for row in rows if row], run, summary, axes, code


def assert_whole(folder, status=0):
    rows, run, summary, axes, code = read_back(folder)
    assert rows == [flat(record) for record in records(folder)]
    assert run.run_id == folders.meta(folder)["id"] and run.display_name == folder.name and code == status
    return run, summary, axes


def test_an_offline_run_has_every_line_once():
    folder = lbp.run(*QUICK, "logger.wandb.mode=offline").folder
    run, summary, axes = assert_whole(folder)
    assert run.project == "lbp" and run.run_group == "dfa-digits-mlp" and run.job_type == "train"
    assert set(run.tags) == {"algo:dfa", "dataset:digits", "arch:mlp"}
    assert axes["*"] == "step" and axes["accuracy/val"] == axes["loss/train_epoch"] == axes["loss/test"] == "epoch"
    assert "alignment_deg/fc1" not in axes
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert config["algo"]["name"] == "dfa" and config["trainer"]["epochs"] == 2
    written = json.loads((folder / "summary.json").read_text())
    for key, value in flat_summary(written).items():
        assert summary[key] == pytest.approx(value), key
    assert summary["status"] == "done" and summary["alignment_deg/fc1"] == pytest.approx(written["layers"]["fc1"]["alignment_deg"])


def test_a_resumed_run_is_one_run_and_so_is_a_replay(capsys):
    first = lbp.run(*QUICK, "logger.wandb.mode=offline", "run.dir=there").folder
    before = read_back(first)[0]
    start(*resume(first, ["trainer.epochs=4"]))
    run, summary, _ = assert_whole(first)
    assert [row for row in before if "loss/test" not in row] == read_back(first)[0][:len(before) - 1] and summary["epochs"] == 4
    (first / "wandb/offline-run-20200101_000000-other").mkdir()     # not this run's
    capsys.readouterr()
    assert cli.main(["sync", "there"]) == 0
    out = capsys.readouterr().out
    assert f"{len(records(first))} lines, done, are in " in out and "wandb sync " in out
    (first / "wandb/offline-run-20200101_000000-other").rmdir()
    assert assert_whole(first)[0].run_id == run.run_id


@pytest.mark.parametrize("how", ["disabled", "killed"])
def test_sync_of_what_never_was_there(how, capsys):
    folder = lbp.run(*QUICK, "logger.wandb.mode=disabled").folder
    if how == "killed":
        (folder / "summary.json").unlink()
        folders.set_status(folder, "interrupted")
        whole = (folder / "metrics.jsonl").read_bytes()
        (folder / "metrics.jsonl").write_bytes(whole[:-30])     # the last line torn
        assert cli.main(["sync", "last", folder.name]) == 0     # twice is no harm
        (folder / "metrics.jsonl").write_bytes(whole[:whole[:-1].rindex(b"\n") + 1])
    else:
        assert cli.main(["sync", "last", "--offline"]) == 0
    _, summary, _ = assert_whole(folder, status=0 if how == "disabled" else 1)
    assert summary["status"] == ("done" if how == "disabled" else "interrupted")
    assert folders.status(folder) == summary["status"]


def test_sync_says_what_is_wrong(capsys, monkeypatch):
    folder = lbp.run(*QUICK, "logger.wandb.mode=disabled").folder
    assert cli.main(["sync", "nope"]) == 2 and cli.main(["sync"]) == 2 and cli.main(["sync", "last", "x=1"]) == 2
    with folders.locked(folder):
        assert cli.main(["sync", "last"]) == 2
    assert "another process" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace())
    with pytest.raises(LbpError, match="nothing was sent"):
        sync(folder)


# ---- whatever W&B does

def test_modes(monkeypatch, tmp_path):
    assert [mode_of(mode) for mode in ("auto", "online", "offline", "disabled")] == ["offline", "online", "offline", "disabled"]
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    assert mode_of("auto") == "online" and mode_of("offline") == "offline"
    for said in ("disabled", "offline"):
        monkeypatch.setenv("WANDB_MODE", said)
        assert mode_of("auto") == said and mode_of("online") == "online"
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.delenv("WANDB_API_KEY")
    (tmp_path / "netrc").write_text("machine api.wandb.ai\n  login user\n  password " + "0" * 40 + "\n")
    assert mode_of("auto") == "online"
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert mode_of("auto") == "offline"
    (tmp_path / "netrc").write_text("not a netrc {")
    assert mode_of("auto") == "offline"


class Fake:
    """wandb, whose calls do what the test says; `calls` counts them."""

    def __init__(self, monkeypatch, **does):
        self.does, self.calls, self.rows, self.modes, self.summary, self.dir, self.url = does, [], [], [], self, "/nowhere/files", "https://there"
        self.run = None
        monkeypatch.setitem(sys.modules, "wandb", self)

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)

        def call(*args, **kwargs):
            self.calls.append(name)
            if name == "init":
                self.modes.append(kwargs["mode"])
            if name in self.does:
                self.does[name](self)
            if name == "log" and args[0]:
                self.rows.append(args[0])
            return self if name == "init" else None
        return call


def fails(fake):
    raise ConnectionError("no network\nat all")


def test_from_python_wandb_is_off_unless_a_mode_is_asked_for(monkeypatch):
    Fake(monkeypatch)
    for word, mode in (("logger.wandb={project: model}", "disabled"), ("logger.wandb={mode: offline}", "offline")):
        folder = lbp.run(*QUICK, word).folder
        assert folders.read(folder).values["logger"]["wandb"]["mode"] == mode


@pytest.mark.parametrize("how", ["raises", "hangs"])
def test_an_online_start_that_fails_falls_back_to_offline(how, monkeypatch, capsys):
    monkeypatch.setattr(view, "START", 2)
    def begin(fake):
        if fake.modes[-1] == "online":
            fails(fake) if how == "raises" else time.sleep(120)
    fake = Fake(monkeypatch, init=begin)
    folder = lbp.run(*QUICK, "logger.wandb.mode=online").folder
    out = capsys.readouterr().out
    assert out.count("warning") == 1 and "W&B is offline for this run" in out and f"lbp sync {folder} sends" in out
    assert fake.modes == ["online", "offline"] and fake.rows == [flat(record) for record in records(folder)]


def test_a_server_that_is_not_there(monkeypatch, capsys):
    """W&B itself, with a key and no network: ten seconds at the start, then all of it offline."""
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    folder = lbp.run(*QUICK, "logger.wandb.mode=auto").folder
    assert_whole(folder)
    assert capsys.readouterr().out.count("W&B is offline for this run") == 1


def test_a_service_of_a_process_that_is_gone():
    """W&B leaves the address of its process to every child of a script; the child outlives it."""
    folder = lbp.run(*QUICK, "logger.wandb.mode=disabled").folder
    done = subprocess.run([sys.executable, "-m", "lbp", "sync", "last", "--offline"], capture_output=True, text=True, timeout=PATIENCE,
                          env=os.environ | {"WANDB_SERVICE": f"3-{os.getpid()}-unix-{folder}/none"})
    assert done.returncode == 0 and "warning" not in done.stdout, done.stdout + done.stderr
    assert_whole(folder)


def test_online_says_where(monkeypatch, capsys):
    Fake(monkeypatch)
    folder = lbp.run(*QUICK[:-1], "logger.wandb.mode=online").folder
    assert "W&B: https://there" in capsys.readouterr().out and "W&B: https://there" in (folder / "log.txt").read_text()


@pytest.mark.parametrize("call", ["log", "finish"])
def test_a_call_that_hangs_holds_nobody_up(call, monkeypatch, capsys):
    monkeypatch.setattr(view, "FINISH", 0.3)
    monkeypatch.setattr(view, "START", 2)
    Fake(monkeypatch, **{call: lambda fake: time.sleep(120)})
    before = time.monotonic()
    log = Wandb(SETTINGS, {}, OPTIONS, Path("there"), "id")
    for step in range(100):
        log.write({"step": step, "epoch": 1, "split": "train", "loss": 0.5})
    log.close("done", {})
    out = capsys.readouterr().out
    assert time.monotonic() - before < 60 and out.count("warning") == 1 and "W&B is off" in out


def test_w_and_b_that_lags_behind_is_left_behind(monkeypatch, capsys):
    monkeypatch.setattr(view, "BEHIND", 50)
    Fake(monkeypatch, log=lambda fake: fake.calls.count("log") > 1 and time.sleep(120))
    log = Wandb(SETTINGS, {}, OPTIONS, Path("there"), "id")
    for step in range(200):
        log.write({"step": step, "epoch": 1, "split": "train", "loss": 0.5})
    log.close("done", {})
    assert log.run is None and capsys.readouterr().out.count("warning") == 1


@pytest.mark.parametrize("failing", [("log",), ("finish",), ("init",), ("define_metric", "log", "update", "finish")])
def test_failures_cost_under_a_hundredth_of_the_time(failing, monkeypatch, capsys):
    spent = []

    class Timed(Wandb):
        def write(self, record):
            before = time.perf_counter()
            super().write(record)
            spent.append(time.perf_counter() - before)

    monkeypatch.setattr("lbp.launch.one.Wandb", Timed)
    fake = Fake(monkeypatch, **dict.fromkeys(failing, fails))
    summary = lbp.run(*QUICK[:4], "trainer.epochs=30", "logger.console=off", "logger.wandb.mode=offline").summary
    assert statistics.median(spent) * len(spent) < summary["train_s"] / 100     # others hold the processor now and then
    assert capsys.readouterr().out.count("warning") == 1
    assert fake.calls.count(failing[-1]) <= 2     # none after the first


def test_numbers_that_json_lacks_are_left_out():
    record = {"step": 1, "epoch": 1, "split": "train", "loss": float("nan"), "layers": {"fc1": {"grad_norm": float("inf"), "dead_fraction": 0.0}}}
    assert flat(record) == {"step": 1, "epoch": 1, "dead_fraction/fc1": 0.0}
    assert flat({"step": 1, "epoch": 1, "split": "warning", "warning": "look"}) == {"step": 1, "epoch": 1, "warning": "look"}


# ---- W&B sweeps

def test_the_sweep_in_the_docs_is_one_that_lbp_runs():
    from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

    sweep = yaml.safe_load((ROOT / "docs/wandb_sweep.yaml").read_text())
    assert sweep["method"] in ("grid", "random", "bayes") and sweep["program"]
    choices = [{key: spec.get("value", spec.get("values", [spec.get("min")])[0]) for key, spec in sweep["parameters"].items()},
               {key: spec.get("value", spec.get("values", [spec.get("max")])[-1]) for key, spec in sweep["parameters"].items()}]
    for choice in choices:
        words = create_sweep_command_args({"args": {key: {"value": value} for key, value in choice.items()}})
        line = [word for part in create_sweep_command(list(sweep["command"])) for word in (
            words[part[2:-1]] if part == "${args_no_hyphens}" else [] if part == "${env}" else [part])]
        assert line[:2] == ["lbp", "train"]
        values = compose(line[2:]).values
        assert values["algo"]["name"] == choice["algo"] and values["optimizer"]["lr"] == choice["optimizer.lr"]
        assert values["logger"]["wandb"]["mode"] == "online" and values["arch"]["widths"] == yaml.safe_load(choice["arch.widths"])
    result = lbp.run(*QUICK, "logger.wandb.mode=disabled")
    metric, split = sweep["metric"]["name"].split("/")
    assert any(record["split"] == split and metric in record for record in records(result.folder))


def test_a_run_of_a_sweep_has_the_agents_id(monkeypatch):
    monkeypatch.setenv("WANDB_RUN_ID", "other")
    assert read_back(lbp.run(*QUICK, "logger.wandb.mode=offline", "run.dir=alone").folder)[1].run_id != "other"
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep")
    folder = lbp.run(*QUICK, "logger.wandb.mode=offline").folder
    monkeypatch.delenv("WANDB_SWEEP_ID")
    monkeypatch.delenv("WANDB_RUN_ID")
    sync(folder)
    assert read_back(folder)[1].run_id == "other" == folders.meta(folder)["wandb_id"]
