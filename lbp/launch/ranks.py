"""A run on several ranks: processes that torch's elastic launcher starts and watches, or that torchrun started."""

from __future__ import annotations

import logging
import os
import pickle
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

from lbp import interrupt, registry
from lbp.errors import ConfigError, DataError, Diverged, LbpError, OutOfResources
from lbp.launch import folder as folders

KINDS = {kind.code: kind for kind in (ConfigError, DataError, Diverged, OutOfResources)}


class RankFailed(LbpError):
    """A rank ended in an error that lbp does not explain, or was killed."""


def spread(folder: Path, count: int, new: bool) -> None:
    """Trains the run in a folder by `count` ranks on this machine, each a process of its own, and waits for them.

    Raises the error of the rank that failed first; the others are gone by then."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)  # it tells what we tell below
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)}
    interrupt.last_words = lambda: folders.set_status(folder, "interrupted")
    try:
        with interrupt.left_to_others(), tempfile.TemporaryDirectory(prefix="lbp-ranks-") as errors:
            launch = LaunchConfig(min_nodes=1, max_nodes=1, nproc_per_node=count, run_id=folder.name, max_restarts=0,
                                  rdzv_backend="c10d", rdzv_endpoint="localhost:0", local_addr="localhost",
                                  logs_specs=DefaultLogsSpecs(log_dir=errors), monitor_interval=0.1)
            elastic_launch(launch, sys.executable)(
                "-m", "lbp.launch.ranks", str(folder), "new" if new else "old", str(os.getpid()))
    except SignalException as error:
        _settle(folder, "interrupted", "running")
        _interrupted(folder, error.sigval)
    except KeyboardInterrupt:  # before there were ranks
        _settle(folder, "interrupted", "running")
        raise
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        told = failure.message if isinstance(failure.message, dict) else {}
        text = told.get("message", "").partition(": ")[2]
        if failure.exitcode in (130, 143):
            _settle(folder, "interrupted", "running")
            _interrupted(folder, failure.exitcode - 128)
        # The others were told to end, or missed this one; a stage of a pipeline diverges by itself.
        _settle(folder, "diverged" if failure.exitcode == Diverged.code else "failed", "running", "interrupted", "failed")
        how = f"was killed by signal {failure.signal_name()}" if failure.exitcode < 0 else f"ended with exit code {failure.exitcode}"
        with suppress(OSError), open(folder / "log.txt", "a", encoding="utf-8") as log:
            log.write(f"rank {rank} {how}\n{told.get('extraInfo', {}).get('py_callstack', '')}")
        if text and (kind := KINDS.get(failure.exitcode)):
            raise kind(*text.splitlines()) if kind is ConfigError else kind(text) from None
        raise RankFailed(f"rank {rank}: {text or how} (its traceback, if any: {folder / 'log.txt'})") from None
    finally:
        for number, handler in handlers.items():
            if threading.current_thread() is threading.main_thread():
                signal.signal(number, handler)


def _settle(folder: Path, status: str, *over: str) -> None:
    if folders.status(folder) in over:
        folders.set_status(folder, status)


def _interrupted(folder: Path, signum: int) -> None:
    error = interrupt.Interrupted(signum)
    error.add_note(f"lbp resume {folder} goes on")
    raise error from None


def among(begin: Callable[[], tuple | None]) -> int:
    """This process's part of a run that torchrun started: the first rank composes the configuration and finds or makes
    the folder by `begin`, which gives what `one.start` takes; the others are handed it. Returns the exit code."""
    import torch.distributed as dist

    from lbp.launch.one import start

    watch(os.getppid())

    def work() -> None:
        store, rank, _ = next(dist.rendezvous("env://"))
        first_to_say.append(lambda text: store.add(f"lbp/told/{text}", 1) == 1)
        if rank == 0:
            try:
                thing = begin()
            except LbpError as error:
                _report(error, first_to_say)  # before the others end: their launcher then ends this one
                thing = error
            store.set("lbp/run", pickle.dumps(thing))
        else:
            store.set_timeout(timedelta(minutes=10))
            thing = pickle.loads(store.get("lbp/run"))
        if isinstance(thing, LbpError):
            sys.exit(thing.code)
        if thing:
            config, folder, place, *world = thing
            registry.use(config.values["plugins"])
            start(config, folder, place if rank == 0 else None, *world)

    first_to_say: list[Callable[[str], bool]] = []
    return _shielded(work, first_to_say)


def main(folder: str, age: str, launcher: str) -> int:
    """One rank of `spread`."""
    watch(int(launcher))

    def work() -> None:
        from lbp.launch.one import train

        config = folders.read(Path(folder))
        registry.use(config.values["plugins"])
        train(config, Path(folder), new=age == "new")

    return _shielded(work)


def watch(launcher: int) -> None:
    """No rank outlives its launcher, however and whenever that ended."""
    def wait() -> None:
        while os.getppid() == launcher:
            time.sleep(0.3)
        os._exit(1)

    threading.Thread(target=wait, daemon=True, name="lbp-launcher").start()


def _shielded(work: Callable[[], None], first_to_say: list[Callable[[str], bool]] | None = None) -> int:
    """Does a rank's work; its error goes to the launcher, and becomes the exit code."""
    try:
        with interrupt.listening(command=True):
            work()
        return 0
    except KeyboardInterrupt as error:
        return getattr(error, "code", 130)
    except Exception as error:
        _report(error, first_to_say)
        if first_to_say and os.environ["RANK"] != "0" and isinstance(error, (ConfigError, DataError)):
            time.sleep(1)   # the first rank takes its folder back; the launcher ends it when this one ends
        return getattr(error, "code", 1)


def _report(error: Exception, first_to_say: list[Callable[[str], bool]] | None) -> None:
    """Through torch's error file, and by `first_to_say` (a launcher that is not ours) on stderr too: what all ranks
    have to say is said once."""
    from torch.distributed.elastic.multiprocessing.errors import get_error_handler

    text = str(error) if isinstance(error, LbpError) else f"{type(error).__name__}: {error}"
    lines = "\n".join([text, *getattr(error, "__notes__", [])]).splitlines()
    get_error_handler().record_exception(RankFailed("\n".join(lines)))
    if first_to_say is None:
        return
    with suppress(RuntimeError):  # the store is gone: said twice is better than not at all
        if not all(first(text) for first in first_to_say):
            return
    for line in lines:
        print(f"lbp: rank {os.environ['RANK']}: {line}", file=sys.stderr, flush=True)
    if not isinstance(error, LbpError):
        traceback.print_exception(error, file=sys.stderr)


if __name__ == "__main__":
    code = main(*sys.argv[1:])
    sys.stdout.flush()
    os._exit(code)  # a process group that lost a member hangs in its destructor
