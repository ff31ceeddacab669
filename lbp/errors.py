"""What can go wrong, by who can mend it. The command line maps each kind to an exit code."""


class LbpError(Exception):
    """Base of every error that lbp explains itself; `code` is the exit code of the command."""

    code = 1


class ConfigError(LbpError):
    """The command or configuration is wrong. `problems` holds every one found, so that all are shown at once."""

    code = 2

    def __init__(self, *problems: str):
        super().__init__("\n".join(problems))
        self.problems = list(problems)


class Refused(ConfigError):
    """A rule cannot train this network or task, an arch cannot take these inputs: the message says why."""


class DataError(LbpError):
    """The data cannot be had or read."""

    code = 3


class Diverged(LbpError):
    """A loss or an update became non-finite; no weight has been touched by it."""

    code = 4


class OutOfResources(LbpError):
    """Memory or disk ran out."""

    code = 5


def out_of_resources(error: BaseException, now: str = "") -> OutOfResources | None:
    """What ran out, with the figures and the remedies; None if nothing did. `now`: the settings that matter."""
    import errno
    import os
    import shutil

    names = [kind.__name__ for kind in type(error).__mro__]
    if isinstance(error, OutOfResources):
        return None
    if "MemoryError" in names or "OutOfMemoryError" in names or "DefaultCPUAllocator" in str(error):
        what = str(error).strip().splitlines()
        return OutOfResources(f"out of memory{': ' + what[0] if what else ''}{_memory()}; "
                              f"try a smaller {now or 'trainer.batch_size'} or arch, trainer.precision=bf16, or more launch.ranks")
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        place = error.filename if isinstance(error.filename, str) and os.path.exists(error.filename) else os.getcwd()
        return OutOfResources(f"the disk is full: {error.filename or 'writing failed'} ({error.strerror}), "
                              f"{shutil.disk_usage(place).free / 2**20:,.1f} MiB free at {place}; make room, or set run.dir elsewhere")
    return None


def _memory() -> str:
    """What this machine has left, where it says so."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    try:
        with open("/proc/meminfo") as info:
            free = next(int(line.split()[1]) for line in info if line.startswith("MemAvailable")) / 2**10
        return f" (this process reached {peak:,.0f} MiB, {free:,.0f} MiB are free)"
    except (OSError, StopIteration):
        return f" (this process reached {peak:,.0f} MiB)"
