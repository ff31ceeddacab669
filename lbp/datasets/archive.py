"""Files of a set out of its folder, or out of its tar archive without unpacking it; pickles without running
them."""

import gzip
import hashlib
import pickle
import tarfile
from io import BytesIO
from pathlib import Path

import numpy as np

_ARRAY = {("numpy.core.multiarray", "_reconstruct"), ("numpy._core.multiarray", "_reconstruct"),
          ("numpy", "ndarray"), ("numpy", "dtype")}


def members(place: Path, names: list[str], md5: dict[str, str] | None = None) -> list[bytes]:
    """
    The files called `names` of a folder or of a .tar.gz, in whose folder they lie. Raises what is wrong.

    With the files' own checksums, an archive is read only as far as the last of them; without, it is read to
    its end, where gzip's checksum is.
    """
    if place.is_dir():
        found = {name: (place / name).read_bytes() for name in names}
    else:
        found = {}
        with gzip.open(place) as f, tarfile.open(fileobj=f, mode="r:") as tar:
            for member in tar:
                name = member.name.rpartition("/")[2]
                if name in names and member.isfile():
                    found[name] = tar.extractfile(member).read()
                if md5 and len(found) == len(names):
                    break
            else:
                while f.read(1 << 20):
                    pass
    if lost := [name for name in names if name not in found]:
        raise ValueError(f"it holds no {', '.join(lost)}")
    for name in md5 or ():
        if name in found and hashlib.md5(found[name], usedforsecurity=False).hexdigest() != md5[name]:
            raise ValueError(f"its {name} has another md5 than {md5[name]}")
    return [found[name] for name in names]


def unpickled(data: bytes) -> dict:
    """
    Containers, numbers, bytes and uint8 arrays of a pickle; its Python 2 strings come as bytes.

    Nothing that it names is imported or called: the names that an array needs stand for `_Stub`, any other is
    refused.
    """
    return _Unpickler(BytesIO(data), encoding="bytes").load()


class _Stub:
    """Holds what numpy would have been called with."""

    def __init__(self, *args):
        self.args, self.state = args, None

    def __setstate__(self, state):
        self.state = state

    def array(self) -> np.ndarray:
        _, shape, dtype, by_column, data = self.state
        if dtype.args[0] not in (b"u1", "u1"):
            raise ValueError(f"its array is of type {dtype.args[0]!r}, not uint8")
        return np.frombuffer(data, np.uint8).reshape(shape, order="F" if by_column else "C")


class _Unpickler(pickle.Unpickler):
    def find_class(self, module, name):
        if (module, name) not in _ARRAY:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no array needs: refused")
        return _Stub
