"""Processes forked from one that has imported what every run needs, which takes a fresh one seconds.

Run as a script this is that process: over a socket it is told what to start, and tells when that has ended.
"""

from __future__ import annotations

import io
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import warnings
from contextlib import suppress
from typing import Any

LONGEST = 1 << 20   # bytes of a message


class Child:
    """A forked process, with what slots need of subprocess.Popen."""

    def __init__(self, forks: Forks, pid: int, stdout: int):
        self.forks, self.pid, self.stdout = forks, pid, open(stdout, "rb")

    def poll(self) -> int | None:
        """Its exit code, once it has ended; below 0: the signal that killed it."""
        return self.forks.code(self.pid)

    def send_signal(self, signum: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, signum)


class Forks:
    """Starts commands of lbp in forks of a process of its own; that one ends with this object's `close`, or this process."""

    def __init__(self):
        self.socket, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with its:
            self.server = subprocess.Popen([sys.executable, "-m", "lbp.launch.forks", str(its.fileno())], pass_fds=(its.fileno(),),
                                           stdin=subprocess.DEVNULL, process_group=0)
        self.codes: dict[int, int] = {}
        self.ready = self.lost = False

    def begin(self, words: list[str], variables: dict[str, str]) -> Child:
        """`lbp WORDS` in a process group of its own, with these environment variables beside those that were set when this object was made.
        Raises OSError if the process to fork is gone, or the system allows no other."""
        while not self.ready and not self.lost:     # Ctrl-C meanwhile: nothing was asked for yet
            self._hear()
        out, its = os.pipe()
        try:
            socket.send_fds(self.socket, [json.dumps([words, variables]).encode()], [its])
            while (told := self._hear()) and "began" not in told:
                pass
            if told.get("began", -1) < 0:
                raise ChildProcessError("nothing could be forked")
        except OSError:
            os.close(out)
            raise
        finally:
            os.close(its)
        return Child(self, told["began"], out)

    def code(self, pid: int) -> int | None:
        while not self.lost and select.select([self.socket], [], [], 0)[0]:
            self._hear()
        if self.lost and pid not in self.codes:     # nobody else would ever tell of it
            with suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
            self.codes[pid] = -signal.SIGKILL
        return self.codes.get(pid)

    def _hear(self) -> dict[str, Any]:
        """What the process says next; nothing if it is no more."""
        with suppress(ConnectionError):
            if text := self.socket.recv(LONGEST):
                told = json.loads(text)
                self.ready = True
                if "ended" in told:
                    self.codes[told["ended"]] = told["code"]
                return told
        self.lost = True
        return {}

    def close(self) -> None:
        self.socket.close()
        self.server.terminate()
        self.server.wait()


def _serve(connection: socket.socket) -> None:
    """Returns in each child, as what it is to do; ends when nobody is left who could ask."""
    hears, told = os.pipe()
    for end in (hears, told):
        os.set_blocking(end, False)
    before = signal.signal(signal.SIGCHLD, lambda *_: None), signal.set_wakeup_fd(told, warn_on_full_buffer=False)
    warnings.filterwarnings("ignore", "This process .* is multi-threaded")     # numpy's threads, which hold no lock between products
    _tell(connection, {})
    while True:
        ready = select.select([connection, hears], [], [])[0]
        if hears in ready:
            os.read(hears, LONGEST)
            with suppress(ChildProcessError):
                while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                    _tell(connection, {"ended": ended[0], "code": os.waitstatus_to_exitcode(ended[1])})
        if connection in ready:
            text, descriptors, _, _ = socket.recv_fds(connection, LONGEST, 1)
            if not text:
                sys.exit()
            words, variables = json.loads(text)
            try:
                pid = os.fork()
            except OSError:     # too many processes, too little memory: whoever asked starts one, and hears why not
                pid = -1
            if pid:
                with suppress(OSError):
                    os.setpgid(pid, pid)    # here and there: done before it is told of
                os.close(descriptors[0])
                _tell(connection, {"began": pid})
            else:
                os.setpgid(0, 0)
                signal.signal(signal.SIGCHLD, before[0])
                signal.set_wakeup_fd(before[1])
                connection.close()
                for mine in (hears, told):
                    os.close(mine)
                return _become(words, variables, descriptors[0])


def _tell(connection: socket.socket, what: dict[str, int]) -> None:
    with suppress(ConnectionError):     # nobody listens: the next look at the connection finds out
        connection.send(json.dumps(what).encode())


def _become(words: list[str], variables: dict[str, str], output: int) -> None:
    os.environ.update(variables)
    sys.argv[1:] = words
    for stream in (1, 2):
        os.dup2(output, stream)
    os.close(output)
    for number, name in enumerate(("stdout", "stderr"), 1):
        encoding = getattr(getattr(sys, name), "encoding", None)
        setattr(sys, name, io.TextIOWrapper(io.FileIO(number, "w", closefd=False), encoding, write_through=True))


def _preload() -> None:
    import lbp.launch.one  # noqa: F401
    import torch._dynamo  # noqa: F401     torch's optimizers import it
    from lbp.config import compose

    os.environ.pop("WANDB_SERVICE", None)   # of the process that started this one
    with suppress(Exception):
        compose([])
        import wandb  # noqa: F401


if __name__ == "__main__":
    _preload()
    _serve(socket.socket(fileno=int(sys.argv[1])))
    runpy.run_module("lbp", run_name="__main__")
