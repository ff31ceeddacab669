"""The processes that train one run together: which one this is, and what they tell each other.

Where there is but one process every function gives its own answer, without a process group.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

BUCKET = 1 << 23    # values that travel together: enough to hide the latency, little beside the gradients
START = 60.0        # seconds that ranks may take at least to start: they read libraries, one perhaps from a slow disk
ROLL_CALL = 3.0     # seconds within which those that are alive notice that one is not

_store = None
_timeout = 0.0
_batch = 0          # rows of the batch that was shared out last
_alone = False


class RankLost(RuntimeError):
    """Another rank did not take part in an exchange."""


def rank() -> int:
    return dist.get_rank() if _store and not _alone else 0


def world() -> int:
    return dist.get_world_size() if _store and not _alone else 1


@contextmanager
def alone() -> Iterator[None]:
    """Within it this process takes whole batches and adds nothing up, as if there were no others; what they hand each other
    still goes by `send` and `receive`."""
    global _alone
    _alone = True
    try:
        yield
    finally:
        _alone = False


def send(tensor: Tensor, to: int) -> dist.Work:
    """Begins to; the tensor is to be left as it is until `wait` has returned."""
    return _exchange(dist.isend, tensor, to)


def receive(tensor: Tensor, of: int) -> dist.Work:
    return _exchange(dist.irecv, tensor, of)


def wait(work: dist.Work) -> None:
    _exchange(work.wait)


def local() -> tuple[int, int]:
    """This rank's number on its machine, and how many there are."""
    return (int(os.environ["LOCAL_RANK"]), int(os.environ.get("LOCAL_WORLD_SIZE", 1))) if _store else (0, 1)


def expected() -> int:
    """How many ranks the launcher (ours or torchrun) started this process among; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", 1)) if "LOCAL_RANK" in os.environ else 1


def join(timeout: float, cuda: bool) -> None:
    """Meets the other ranks at the address in the environment. `timeout`: seconds that an exchange may take; all are
    given longer to start in."""
    global _store, _timeout
    if expected() == 1 or _store:
        return
    start = timedelta(seconds=max(timeout, START))
    store, own, of = next(dist.rendezvous("env://", timeout=start))
    everyone = [f"lbp/here/{r}" for r in range(of)]
    try:
        store.set(everyone[own], "1")
        store.wait(everyone, start)
    except RuntimeError as error:
        raise RankLost(f"not all of the {of} ranks were there within {start.total_seconds():g} s") from error
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", store=store, rank=own, world_size=of,
                            timeout=timedelta(seconds=timeout))
    _store, _timeout = store, timeout


def leave() -> None:
    global _store
    if _store:
        dist.destroy_process_group()
        _store = None


def share(rows: int) -> slice:
    """This rank's rows of a batch; shares differ by one row at most."""
    global _batch
    _batch = rows
    return slice(rank() * rows // world(), (rank() + 1) * rows // world())


def batch_rows(mine: int) -> tuple[int, slice]:
    """Rows of the whole batch of which this rank has `mine`, and which of them they are: for noise that is drawn alike
    on every rank. Raises ValueError for a tensor that has not a row for each sample."""
    if world() == 1:
        return mine, slice(None)
    place = share(_batch)
    if place.stop - place.start != mine:
        raise ValueError(f"noise for {mine} rows, but this rank has {place.stop - place.start} of the batch's {_batch}")
    return _batch, place


def total(tensors: Iterable[Tensor]) -> None:
    """Sums each tensor over the ranks, in place: few exchanges, of flat buckets of one dtype and device."""
    if world() == 1:
        return
    kinds: dict[tuple, list[list[Tensor]]] = {}
    for t in tensors:
        buckets = kinds.setdefault((t.dtype, t.device), [[]])
        if buckets[-1] and sum(b.numel() for b in buckets[-1]) + t.numel() > BUCKET:
            buckets.append([])
        buckets[-1].append(t)
    for bucket in (bucket for buckets in kinds.values() for bucket in buckets):
        flat = torch.cat([t.detach().reshape(-1) for t in bucket])
        _exchange(dist.all_reduce, flat)
        for t, summed in zip(bucket, flat.split([t.numel() for t in bucket])):
            t.detach().copy_(summed.view(t.shape))


def most(t: Tensor) -> Tensor:
    """The greatest over the ranks, value by value, in place."""
    if world() > 1:
        _exchange(dist.all_reduce, t, dist.ReduceOp.MAX)
    return t


def gathered(*values: float) -> list[list[float]]:
    """For each of a few numbers what every rank has, in one exchange."""
    if world() == 1:
        return [[value] for value in values]
    mine = torch.tensor(values, dtype=torch.float64)
    every = [torch.empty_like(mine) for _ in range(world())]
    _exchange(dist.all_gather, every, mine)
    return torch.stack(every, 1).tolist()


def sums(*values: Tensor | float) -> list[Tensor | float]:
    """Each number or tensor summed over the ranks, of which some may have a plain 0; on the CPU where there are several."""
    if world() == 1:
        return list(values)
    plain = [value.detach().cpu() if isinstance(value, Tensor) else value for value in values]
    return [sum(parts) for parts in zip(*everyones(plain))]


def everyones(thing: Any) -> list[Any]:
    """What each rank has, on every rank: small plain things."""
    if world() == 1:
        return [thing]
    every = [None] * world()
    _exchange(dist.all_gather_object, every, thing)
    return every


def from_first(thing: Any) -> Any:
    """What the first rank has, on every rank."""
    return from_rank(0, thing)


def from_rank(which: int, thing: Any) -> Any:
    """What one rank has, on every rank."""
    if world() == 1:
        return thing
    box = [thing]
    _exchange(dist.broadcast_object_list, box, which)
    return box[0]


def _exchange(operation, *arguments) -> Any:
    """Raises RankLost, naming those that did not answer the roll that the others then call."""
    try:
        return operation(*arguments)
    except RuntimeError as error:
        try:
            _store.set(f"lbp/missed/{dist.get_rank()}", "1")
            time.sleep(ROLL_CALL)
            silent = [r for r in range(dist.get_world_size()) if not _store.check([f"lbp/missed/{r}"])]
        except RuntimeError:  # the store went with the process that held it
            silent = []
        who = f"rank {', '.join(map(str, silent))}" if silent else "another rank"
        raise RankLost(f"{who} did not take part in an exchange: it ended, or hung for {_timeout:g} s "
                       f"(launch.rank_timeout): {str(error).splitlines()[0]}") from error
