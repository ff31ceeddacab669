"""Gets one file from the first of its addresses that serves it: verified, all or nothing, by one process at a
time."""

import contextlib
import errno
import hashlib
import os
import queue
import threading
from collections.abc import Iterator
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from filelock import FileLock

from lbp.datasets.sources import line
from lbp.errors import DataError

TIMEOUT = 8.0       # seconds that a silent server is waited for
WAIT = 1800.0       # seconds that another process's download is waited for
FULL = errno.ENOSPC, errno.EDQUOT
EMBEDDED = "mnist5k"        # real images that need no network


def fetch(urls: list[str], to: Path, md5: str | None = None) -> None:
    """
    Downloads `to` unless it is there. Of several processes that ask, one downloads and the others wait.

    Nothing is put under the name `to` but the whole file with this `md5`; a failure leaves nothing behind.
    Raises DataError, which names the file, what is wrong with each address, and the checksum.
    """
    if os.path.isfile(to):      # before anything is written: the folder may be read-only
        return
    made = [folder for folder in to.parents if not os.path.exists(folder)]
    try:
        with _alone(to):
            if not os.path.isfile(to):
                _download(urls, to, md5)
    except OSError as cause:
        if cause.errno in FULL:     # no fault of the data
            raise OSError(cause.errno, os.strerror(cause.errno), str(to)) from cause
        raise _refusal(to, f"{' or '.join(urls)}: {line(cause)}", md5) from cause
    finally:
        with contextlib.suppress(OSError):      # what was made for nothing goes again
            for folder in made:
                folder.rmdir()


def fetch_for(dataset: str, urls: list[str], to: Path, md5: str | None, place: str) -> None:
    """`fetch` for a set: its refusal also says how `place` fits the configuration, and what needs no file."""
    try:
        fetch(urls, to, md5)
    except DataError as cause:
        raise DataError(f"dataset={dataset}: {cause}{place}, or use dataset={EMBEDDED} meanwhile") from cause


@contextlib.contextmanager
def _alone(to: Path) -> Iterator[None]:
    """Holds the lock beside `to`, which the kernel takes from a process that dies."""
    path = to.with_name(f".{to.name}.lock")
    lock = FileLock(path, timeout=WAIT, mode=0o666)     # writable: a shared folder has other users
    while not lock.is_locked:
        to.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):    # its holder failed and removed the folder
            lock.acquire()
    try:
        yield
    finally:
        # Removed while it is held. An old filelock may yet grant the removed file's lock to one process and
        # that of a new file to another: after a success both find `to` in place, after a failure both try.
        with contextlib.suppress(OSError):
            path.unlink()
        lock.release()


def _download(urls: list[str], to: Path, md5: str | None) -> None:
    for stale in to.parent.glob(f".{to.name}.*.part"):      # of processes that were killed
        stale.unlink(missing_ok=True)
    part, tried = to.with_name(f".{to.name}.{os.getpid()}.part"), []
    try:
        for url in urls:
            try:
                _copy(url, part, md5)
            except (OSError, HTTPException, ValueError) as cause:
                if isinstance(cause, OSError) and cause.errno in FULL:
                    raise
                tried.append(f"{url} ({line(cause)})")
            else:
                os.replace(part, to)
                return
        raise _refusal(to, " or ".join(tried), md5)
    finally:
        part.unlink(missing_ok=True)


def _copy(url: str, part: Path, md5: str | None) -> None:
    digest, size = hashlib.md5(usedforsecurity=False), 0
    with _opened(url) as response, open(part, "wb") as out:
        while block := response.read(1 << 20):
            digest.update(block)
            size += out.write(block)
    due, kind = response.headers["Content-Length"], response.headers["Content-Type"]
    if due and size != int(due):
        raise ValueError(f"it broke off after {size:,} of {int(due):,} bytes")
    if md5 and digest.hexdigest() != md5:
        raise ValueError(f"its {size:,} bytes of {kind} have another md5, {digest.hexdigest()}")


def _opened(url: str) -> HTTPResponse:
    """urlopen's own timeout counts anew for each address of a host, and not for its name's lookup: here it is
    for all."""
    answer = queue.SimpleQueue()

    def ask():
        try:
            answer.put(urlopen(Request(url, headers={"User-Agent": "lbp"}), timeout=TIMEOUT))
        except Exception as cause:      # raised below, in the thread that asked
            if isinstance(cause, HTTPError):
                cause.close()       # it is the response, with its page
            answer.put(cause)

    threading.Thread(target=ask, daemon=True).start()
    try:
        got = answer.get(timeout=TIMEOUT)
    except queue.Empty:
        raise TimeoutError(f"no answer within {TIMEOUT:g} s") from None
    if isinstance(got, Exception):
        raise got
    return got


def _refusal(to: Path, why: str, md5: str | None) -> DataError:
    return DataError(f"{to} is missing and cannot be fetched from {why}. Put it there by hand"
                     + f" (md5 {md5})" * bool(md5))
