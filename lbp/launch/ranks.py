"""A run on several ranks: processes that torch's elastic launcher starts and watches, or that torchrun started."""

from __future__ import annotations

import logging
import os
import pickle
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

from lbp import interrupt, ranks, registry
from lbp.errors import ConfigError, DataError, Diverged, LbpError, OutOfResources
from lbp.launch import folder as folders

KINDS = {kind.code: kind for kind in (ConfigError, DataError, Diverged, OutOfResources)}


class RankFailed(LbpError):
    """A rank ended in an error that lbp does not explain, or was killed."""


def spread(folder: Path, count: int, new: bool) -> None:
    """Trains the run in a folder by `count` ranks on this machine, each a process of its own, and waits for them.

    Raises the error of the rank that failed first; the others are gone by then."""
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # it tells what we tell below
    launch = LaunchConfig(min_nodes=1, max_nodes=1, nproc_per_node=count, run_id=folder.name, max_restarts=0,
                          rdzv_backend="c10d", rdzv_endpoint="localhost:0", monitor_interval=0.1)
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)}
    interrupt.last_words = lambda: folders.set_status(folder, "interrupted")
    try:
        with interrupt.left_to_others():
            elastic_launch(launch, sys.executable)("-m", "lbp.launch.ranks", str(folder), "new" if new else "old")
    except SignalException as error:
        _settle(folder, "interrupted")
        _interrupted(folder, error.sigval)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        told = failure.message if isinstance(failure.message, dict) else {}
        text = told.get("message", "").partition(": ")[2]
        if failure.exitcode in (130, 143):
            _settle(folder, "interrupted")
            _interrupted(folder, failure.exitcode - 128)
        _settle(folder, "failed")
        with suppress(OSError), open(folder / "log.txt", "a", encoding="utf-8") as log:
            log.write(f"rank {rank}:\n{told.get('extraInfo', {}).get('py_callstack') or failure.message}\n")
        if kind := KINDS.get(failure.exitcode):
            raise kind(*text.splitlines()) if kind is ConfigError else kind(text) from None
        how = f"was killed by signal {failure.signal_name()}" if failure.exitcode < 0 else f"ended with exit code {failure.exitcode}"
        raise RankFailed(f"rank {rank}: {text or how} (its traceback, if any: {folder / 'log.txt'})") from None
    finally:
        for number, handler in handlers.items():
            if threading.current_thread() is threading.main_thread():
                signal.signal(number, handler)


def _settle(folder: Path, status: str) -> None:
    if folders.status(folder) == "running":
        folders.set_status(folder, status)


def _interrupted(folder: Path, signum: int) -> None:
    error = interrupt.Interrupted(signum)
    error.add_note(f"lbp resume {folder.name} goes on")
    raise error from None


def among(begin: Callable[[], tuple | None]) -> int:
    """This process's part of a run that torchrun started: the first rank composes the configuration and finds or makes
    the folder by `begin`, which gives what `one.start` takes; the others are handed it. Returns the exit code."""
    import torch.distributed as dist

    from lbp.launch.one import start

    def work() -> None:
        store, rank, _ = next(dist.rendezvous("env://"))
        if rank == 0:
            try:
                thing = begin()
            except LbpError as error:
                thing = error
            store.set("lbp/run", pickle.dumps(thing))
        else:
            store.set_timeout(timedelta(minutes=10))
            thing = pickle.loads(store.get("lbp/run"))
            if isinstance(thing, LbpError):
                sys.exit(thing.code)  # the first rank tells
        if isinstance(thing, LbpError):
            raise thing
        if thing:
            config, folder, place, world = thing
            registry.use(config.values["plugins"])
            start(config, folder, place if rank == 0 else None, world)

    return _shielded(work, quiet=False)


def main(folder: str, age: str) -> int:
    """One rank of `spread`."""
    threading.Thread(target=_gone_with, args=(os.getppid(),), daemon=True).start()

    def work() -> None:
        from lbp.launch.one import train

        config = folders.read(Path(folder))
        registry.use(config.values["plugins"])
        train(config, Path(folder), new=age == "new")

    return _shielded(work, quiet=True)


def _gone_with(parent: int) -> None:
    """No rank outlives its launcher, however that ended."""
    while os.getppid() == parent:
        time.sleep(0.3)
    os._exit(1)


def _shielded(work: Callable[[], None], quiet: bool) -> int:
    """Does a rank's work; its error goes to the launcher, through torch's error file, and becomes the exit code."""
    from torch.distributed.elastic.multiprocessing.errors import get_error_handler

    try:
        with interrupt.listening(command=True):
            work()
        return 0
    except KeyboardInterrupt as error:
        return getattr(error, "code", 130)
    except Exception as error:
        lines = [str(error) if isinstance(error, LbpError) else f"{type(error).__name__}: {error}", *getattr(error, "__notes__", [])]
        get_error_handler().record_exception(RankFailed("\n".join(lines)))
        if not quiet:
            for line in lines:
                print(f"lbp: rank {ranks.rank()}: {line}", file=sys.stderr)
        if not isinstance(error, LbpError):
            traceback.print_exc(file=sys.stderr) if not quiet else None
        return getattr(error, "code", 1)


if __name__ == "__main__":
    code = main(*sys.argv[1:])
    sys.stdout.flush()
    os._exit(code)  # a process group that lost a member hangs in its destructor
