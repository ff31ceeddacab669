"""Ctrl-C and SIGTERM: a run is asked to end, and ends where it can go on from. Imports no torch.

Outside `deferred` the first signal raises Interrupted at once. Within it the signal waits for `poll`, which training
calls between batches and passes. A command does not wait for ever: asked a second time, or when GRACE seconds passed
without a poll, it leaves at once, and the last checkpoint is where it stands.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

GRACE = 5.0     # seconds; supervisors (docker stop) kill after ten

_asked = 0          # the signal that came
_deferred = False
_answered = False   # Interrupted was raised
last_words: Callable[[], None] = lambda: None   # done before leaving at once: STATUS


class Interrupted(KeyboardInterrupt):
    """The user or the system asked the run to end. `code`: 130 for Ctrl-C, 143 for SIGTERM."""

    def __init__(self, signum: int):
        super().__init__("interrupted by " + {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}.get(signum, str(signum)))
        self.code = 128 + signum


def asked() -> int:
    """The signal that asks this process to end, or 0."""
    return _asked


def answer(signum: float) -> None:
    """Raises Interrupted for a signal, if it is one."""
    global _answered
    if signum:
        _answered = True
        raise Interrupted(int(signum))


def poll() -> None:
    """Raises Interrupted if this process or another rank is asked to end; all ranks must call it alike."""
    from lbp import ranks

    answer(max(ranks.gathered(_asked)[0]))


@contextmanager
def deferred() -> Iterator[None]:
    """Within it a signal waits for `poll`."""
    global _deferred
    answer(_asked)  # also where it was raised already, in a destructor, and came to nothing
    before, _deferred = _deferred, True
    try:
        yield
    finally:
        _deferred = before


@contextmanager
def left_to_others() -> Iterator[None]:
    """Within it other processes do the work and end it; here only the second signal counts."""
    global _answered
    _answered = True
    try:
        yield
    finally:
        _answered = False


@contextmanager
def listening(command: bool) -> Iterator[None]:
    """Takes the two signals over and gives them back. `command`: this process is the command's own, and may be left at
    once; else (a notebook, a script) the second Ctrl-C is a KeyboardInterrupt, and one that came too late to stop
    anything is raised at the end. Does nothing in another thread, or where somebody further out listens."""
    global _asked, _answered, last_words
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) is _handle:
        yield
        return
    _asked, _answered = 0, False
    before = {s: signal.signal(s, _handle) for s in (signal.SIGINT, signal.SIGTERM)}
    ears = _Ears() if command else None
    try:
        yield
    except Exception as error:
        if _asked and _answered:  # raised in the middle of a library, that made another error of it
            raise Interrupted(_asked) from error
        raise
    finally:
        if ears:
            ears.close()
        for s, handler in before.items():
            signal.signal(s, handler)
        missed = 0 if command or _answered else _asked
        _asked, _answered, last_words = 0, False, lambda: None  # what comes after is not asked to end
    answer(missed)


def _handle(signum: int, frame) -> None:
    global _asked
    again, _asked = bool(_asked) and not _among_ranks(), _asked or signum
    if not _deferred or again:
        answer(_asked)


def _among_ranks() -> bool:
    """A rank's launcher passes signals on, and so may the system: a second one says nothing new."""
    return "LOCAL_RANK" in os.environ


class _Ears(threading.Thread):
    """Hears signals also while the main thread is deep in a matrix product, where no Python handler runs."""

    def __init__(self):
        super().__init__(daemon=True, name="lbp-signals")
        self.hears, self.told = os.pipe()
        os.set_blocking(self.told, False)
        self.before = signal.set_wakeup_fd(self.told, warn_on_full_buffer=False)
        self.start()

    def run(self) -> None:
        heard = 0
        while True:
            wait = GRACE if heard and not _answered else None
            ready = select.select([self.hears], [], [], wait)[0]
            if not ready:
                if _answered:
                    continue
                break
            signum = os.read(self.hears, 1)
            if signum in (b"", b"\0"):
                return
            if signum[0] in (signal.SIGINT, signal.SIGTERM):
                if heard and not _among_ranks():
                    break
                heard = heard or signum[0]
        try:
            last_words()
            if not _among_ranks():  # there the launcher speaks
                print("\nlbp: left at once; the last checkpoint is where the run stands", file=sys.stderr, flush=True)
        finally:
            os._exit(128 + heard)

    def close(self) -> None:
        signal.set_wakeup_fd(self.before)
        os.write(self.told, b"\0")
        self.join()
        os.close(self.hears)
        os.close(self.told)
