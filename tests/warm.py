"""Commands as a user types them, each in a process of its own, forked from one that has imported what takes seconds."""

import multiprocessing
import os
import subprocess
import sys
import tempfile
from pathlib import Path

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["lbp.cli", "lbp.launch.one", "sklearn.datasets", "torch._dynamo", "torch.utils.flop_counter"])


def lbp(words: list[str], cwd: Path, timeout: float = 300) -> subprocess.CompletedProcess:
    """What `lbp WORDS` does in the folder `cwd`. Fresh interpreters are started by tests of starting, of signals and of streams."""
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, name) for name in ("out", "err")]
        process = PROCESSES.Process(target=_run, args=(words, str(cwd), dict(os.environ), [str(file) for file in files]))
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            raise subprocess.TimeoutExpired(words, timeout)
        return subprocess.CompletedProcess(words, process.exitcode, *(file.read_text() for file in files))


def _run(words: list[str], cwd: str, environment: dict[str, str], files: list[str]) -> None:
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    for number, file in enumerate(files, 1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), number)
    from lbp.cli import main

    sys.exit(main(words))
