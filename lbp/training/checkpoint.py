"""Checkpoints: plain dicts with a checksum, written so that a kill at any moment leaves a good one, loaded without
running anything that they contain."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import shutil
import struct
from pathlib import Path
from typing import Any

import torch

from lbp.errors import DataError, OutOfResources

FORMAT = 1      # of the content; another one is refused by name
PARTS = ("values", "rule", "apply", "state", "data", "ranks")
PREFIX = b"lbp sha256 "


class Checkpoints:
    """A run's folder of checkpoints: `last.pt`, the one before it as `previous.pt`, the validation's choice `best.pt`, and
    `epoch.pt`, the last that was made between two epochs, where a run asks for it."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.trusted = False    # last.pt is of this process, or was found good

    def save(self, content: dict[str, Any], best: bool = False) -> None:
        """Writes the content as last.pt, and as best.pt if it is that; at every moment last.pt is a whole one."""
        self.folder.mkdir(parents=True, exist_ok=True)
        new, last = self.folder / "new.tmp", self.folder / "last.pt"
        write(new, content)
        if best:  # before last.pt: going on from the older one comes here again
            _also(new, self.folder / "best.pt")
        if self.trusted or _good(last):  # a damaged one must not push out the good one before it
            _also(last, self.folder / "previous.pt")
        os.replace(new, last)
        self.trusted = True
        _settle(self.folder)

    def keep_for_epoch(self) -> None:
        """Remembers last.pt as what an epoch began with."""
        _also(self.folder / "last.pt", self.folder / "epoch.pt")

    def epoch_began(self, epoch: int) -> bool:
        """Whether what is remembered is what this epoch, counted from 0, began with."""
        try:
            state = load(self.folder / "epoch.pt")["state"]
        except DataError:
            return False
        return state["epoch"] == epoch and not state["batch"]

    def latest(self) -> tuple[dict[str, Any] | None, list[str]]:
        """The newest good checkpoint, None if there is none, and what is wrong with those that had to be passed over.

        Raises DataError where there are some and not one is good."""
        problems = []
        for name in ("last", "previous", "best"):
            try:
                return load(self.folder / f"{name}.pt"), problems
            except DataError as error:
                if (self.folder / f"{name}.pt").exists():
                    problems.append(str(error))
        if problems:
            raise DataError("\n".join([*problems, f"{self.folder} holds no good checkpoint; start over by lbp rerun"]))
        return None, problems


def write(path: Path, content: dict[str, Any]) -> None:
    """A file that torch.load reads; the SHA-256 of its bytes stands in the comment at the end of the zip archive.

    Raises OutOfResources, with the figures, where the disk is full."""
    try:
        path.unlink(missing_ok=True)  # left by a kill, it may be best.pt by another name: never written into
        with open(path, "wb") as file:
            hashed = _Hashed(file)
            torch.save({"format": FORMAT, **content}, hashed)
            file.seek(-2, os.SEEK_END)  # the comment's length, so far 0
            comment = PREFIX + hashed.sha.hexdigest().encode()
            file.write(struct.pack("<H", len(comment)) + comment)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:
        path.unlink(missing_ok=True)
        if not (cause := _full(error)):
            raise
        need = sum(t.numel() * t.element_size() for t in _tensors(content))
        raise OutOfResources(f"the disk is full ({cause.strerror}): a checkpoint needs {need / 2**20:,.1f} MiB, "
                             f"{shutil.disk_usage(path.parent).free / 2**20:,.1f} MiB are free at {path.parent}; make room, "
                             "then lbp resume; the checkpoints before it are whole") from error


def load(path: Path) -> dict[str, Any]:
    """Raises DataError, naming the file and the cause, for one that is missing, damaged, or of another format."""
    try:
        data = path.read_bytes()
        data, comment, told = data.rpartition(struct.pack("<H", len(PREFIX) + 64) + PREFIX)
        if not comment:
            raise ValueError("it does not end in a checksum: cut off, or not written by this lbp")
        data += b"\0\0"
        if hashlib.sha256(data).hexdigest().encode() != told:
            raise ValueError("its checksum does not fit: it was damaged after it was written")
        content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise ValueError(f"it has format {content.get('format') if isinstance(content, dict) else None}, this lbp reads "
                             f"{FORMAT}: use the lbp that wrote it, or train again")
        if missing := [part for part in PARTS if part not in content]:
            raise ValueError(f"it has no {', '.join(missing)}: not a checkpoint of a run")
        return content
    except MemoryError:
        raise
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such checkpoint") from None
    except Exception as error:  # torch raises half a dozen types for a damaged file
        why = ": ".join([type(error).__name__, *str(error).splitlines()[:1]])
        raise DataError(f"{path}: not a readable checkpoint ({why})") from error


class _Hashed:
    """A file that is only written to, and hashed on the way."""

    def __init__(self, file):
        self.file, self.sha = file, hashlib.sha256()

    def write(self, data) -> int:
        self.sha.update(data)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


def _also(source: Path, name: Path) -> None:
    """Makes `name` the same file as `source`: old or new at every moment."""
    beside = name.with_suffix(".tmp")
    beside.unlink(missing_ok=True)
    try:
        os.link(source, beside)
    except OSError:  # some file systems have no links
        shutil.copyfile(source, beside)
    os.replace(beside, name)
    beside.unlink(missing_ok=True)  # two names of one file: replacing did nothing


def _good(path: Path) -> bool:
    try:
        return bool(load(path))
    except DataError:
        return False


def _settle(folder: Path) -> None:
    """Makes the new names survive a loss of power."""
    try:
        place = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(place)
    finally:
        os.close(place)


def _full(error: BaseException | None) -> OSError | None:
    """The error behind this one that says that there is no room; torch hides it behind its own."""
    while error and not (isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)):
        error = error.__cause__ or error.__context__
    return error


def _tensors(content: Any):
    if isinstance(content, torch.Tensor):
        yield content
    elif isinstance(content, dict):
        for item in content.values():
            yield from _tensors(item)
    elif isinstance(content, (list, tuple)):
        for item in content:
            yield from _tensors(item)
