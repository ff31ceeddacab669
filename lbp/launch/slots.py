"""Commands at a time on this machine, each in a process that cannot harm the others."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lbp.launch.forks import Child, Forks

GRACE = 30.0    # seconds from the word to end until it is made to: a checkpoint may be large
LOOK = 0.05     # seconds between two looks
INTERRUPTED = (130, 143)    # the exit codes of what was asked to end


@dataclass
class Job:
    """A command, the file its output goes to, and the run's folder, in whose metrics signs of life are seen too."""

    name: str
    command: list[str]
    log: Path
    folder: Path
    of: Any = None                      # whatever the asker knows it by
    started: float = 0.0
    seconds: float = 0.0
    code: int | None = None             # its exit code; below 0: the signal that killed it
    why: str = ""                       # we ended it, and why
    slot: int = 0
    told: float = 0.0                   # when it was told to end
    _child: subprocess.Popen | Child | None = field(default=None, repr=False)
    _reader: threading.Thread | None = field(default=None, repr=False)
    _heard: float = 0.0

    @property
    def failed(self) -> int:
        """Its exit code; of one that we ended never 0."""
        return self.code or int(bool(self.why))

    @property
    def ended(self) -> str:
        """How it ended, as one says it of it; "" where it did what it should."""
        if self.why:
            return self.why
        if self.code in INTERRUPTED:
            return "was interrupted"
        return "" if self.code == 0 else f"was killed by signal {-self.code}" if self.code < 0 else f"failed (exit code {self.code})"

    def begin(self, slot: int, slots: int, show: bool, forks: Forks | None) -> None:
        self.slot, self.started = slot, time.time()
        self._heard = self.started
        variables = {"PYTHONUNBUFFERED": "1"} | _share(slot, slots)
        if forks and self.command[1:3] == ["-m", "lbp"]:
            with suppress(OSError):
                self._child = forks.begin(self.command[3:], variables)
        # a group of its own: the terminal's Ctrl-C reaches it once, through us
        self._child = self._child or subprocess.Popen(self.command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                                      process_group=0, env=os.environ | variables)
        self._reader = threading.Thread(target=self._copy, args=(show,), daemon=True)
        self._reader.start()

    def _copy(self, show: bool) -> None:
        """To log and screen, as long as each takes it: a full disk or a closed pipe must not stop a run."""
        with self._child.stdout as lines, self.log.open("ab", buffering=0) as file:
            for line in lines:
                self._heard = time.time()
                for write in (file.write, *([_show] if show else [])):
                    with suppress(OSError):
                        write(line)

    def silent(self) -> float:
        """Seconds without a sign of life: a line of output, or of metrics."""
        with suppress(OSError):
            self._heard = max(self._heard, (self.folder / "metrics.jsonl").stat().st_mtime)
        return time.time() - self._heard

    def end(self, why: str = "", signum: int = signal.SIGTERM) -> None:
        """Tells it to end; makes it where it was told before."""
        self.why = self.why or why
        with suppress(ProcessLookupError):
            os.killpg(self._child.pid, signal.SIGKILL) if self.told else self._child.send_signal(signum)
        self.told = self.told or time.time()

    def over(self) -> bool:
        """Whether it has ended; if so, nothing is left of it."""
        if self.told and time.time() - self.told > GRACE:
            self.end()
        self.code = self._child.poll()
        if self.code is None:
            return False
        with suppress(ProcessLookupError):
            os.killpg(self._child.pid, signal.SIGKILL)  # what a process that died left behind
        self._reader.join(1)    # what left the group may hold the pipe for longer
        self.seconds = time.time() - self.started
        return True


def run(jobs: Iterator[Job | None], slots: int, timeout: float | None = None, show: bool = False, fork: bool = False,
        watch: Callable[[Job], str] = lambda job: "") -> Iterator[Job]:
    """Runs the jobs, `slots` at a time, and gives each when it has ended. A job is asked for when a slot is free; None: there is none
    yet, ask again.

    One that shows no sign of life for `timeout` seconds is ended, and one of which `watch` says why. Ctrl-C and SystemExit are
    passed on to those that run, and raised when they have ended; a second one ends them at once. Closed before its end, it tells those
    that run to end, and waits for them too. `fork`: commands of lbp are forked from a process that has imported torch, where the
    system allows it.
    """
    forks = Forks() if fork and sys.platform == "linux" and not gpus() else None    # no fork of what has looked for a GPU can use one
    with closing(forks) if forks else nullcontext():
        yield from _run(jobs, slots, timeout, show, watch, forks)


def _run(jobs, slots, timeout, show, watch, forks) -> Iterator[Job]:
    running: list[Job] = []
    asked: BaseException | None = None
    more = True
    while True:
        try:
            while more and not asked and len(running) < slots:
                job = next(jobs, False)
                if not job:
                    more = job is None
                    break
                free = min(set(range(slots)) - {one.slot for one in running})
                job.begin(free, slots, show, forks)
                running.append(job)
            if not running and (asked or not more):
                break
            for job in list(running):
                if job.over():
                    running.remove(job)
                    yield job
                elif not job.told:
                    if timeout and job.silent() > timeout:
                        job.end(f"hung: no sign of life for {timeout:g} s (launch.timeout)")
                    elif why := watch(job):
                        job.end(why)
            time.sleep(LOOK)
        except (KeyboardInterrupt, SystemExit) as error:
            asked = asked or error
            for job in running:
                job.end(signum=signal.SIGTERM if isinstance(error, SystemExit) else signal.SIGINT)
        except GeneratorExit:       # whoever takes them was stopped, and takes no more
            for job in running:
                job.end()
            try:
                while running := [job for job in running if not job.over()]:
                    time.sleep(LOOK)
            finally:
                for job in running:
                    job.end()
                    while not job.over():
                        time.sleep(LOOK)
            raise
    if asked:
        raise asked


@contextmanager
def stoppable() -> Iterator[list[int]]:
    """Within it SIGTERM, and SIGHUP of a terminal that is closed, raise SystemExit, which `run` passes on as it does Ctrl-C. None goes
    further: the list then holds the exit code of a command so stopped."""
    main, codes = threading.current_thread() is threading.main_thread(), []
    before = {signum: signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGHUP) if main}
    for signum, handler in before.items():
        if handler != signal.SIG_IGN:   # as under nohup
            signal.signal(signum, lambda signum, _: sys.exit(128 + signum))
    try:
        yield codes
    except (KeyboardInterrupt, SystemExit) as asked:
        codes.append(asked.code if isinstance(asked, SystemExit) else 130)
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _share(slot: int, slots: int) -> dict[str, str]:
    """The variables that give a slot its part of the processors and GPUs."""
    if slots == 1:
        return {}
    shared = {"LBP_THREADS": str(max(1, processors() // slots))}
    if found := gpus():
        mine = found[slot::slots] if len(found) >= slots else [found[slot % len(found)]]
        shared["CUDA_VISIBLE_DEVICES"] = ",".join(mine)
    return shared


def processors() -> int:
    return int(os.environ.get("LBP_THREADS", 0)) or len(os.sched_getaffinity(0))


def gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES may name, without a library that would take hold of them."""
    if (seen := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [one for one in seen.split(",") if one.strip()]
    if not shutil.which("nvidia-smi"):
        return []
    asked = subprocess.run(["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"], capture_output=True, text=True)
    return asked.stdout.split() if asked.returncode == 0 else []


def _show(line: bytes) -> None:
    sys.stdout.write(line.decode("utf-8", "replace"))
    sys.stdout.flush()
