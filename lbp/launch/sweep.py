"""Many runs from one command, one after another, each in a process that cannot harm the others."""

import os
import secrets
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from datetime import datetime
from pathlib import Path

from lbp.config import compose, quoted, slug
from lbp.errors import ConfigError
from lbp.logs.console import say


def sweep(trials: list[list[str]], file: Path | None = None, debug: bool = False) -> int:
    """Run the trials (overrides, validated before); returns the command's exit code: 1 if any trial failed.

    The sweep's folder (`outputs/DATE/TIME-sweep-SUFFIX`, or `run.dir`) has a folder and a log a trial.
    Ctrl-C stops after the trial's own handling of it: 130; SIGTERM: 143. Raises ConfigError if it is taken.
    """
    folder = _create(compose(trials[0], file).values["run"])
    names = trial_names(trials)
    say(f"sweep of {len(trials)} trials: {folder}")
    failed = []
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        for number, (trial, name) in enumerate(zip(trials, names), 1):
            say(f"trial {number}/{len(trials)}: {' '.join(trial)}")
            command = [
                sys.executable,
                "-m",
                "lbp",
                "train",
                *(["--config", str(file)] if file else []),
                *(["--debug"] if debug else []),
                *trial,
                f"run.dir={quoted(str(folder / name))}",
            ]
            log = folder / f"{name}.log"
            code, stopped = _run(command, log)
            if code:
                failed.append((name, _said(code), log))
                _warn(f"trial {number}/{len(trials)} {_said(code)}; its log: {log}")
            if stopped:
                _warn(f"sweep stopped, {len(trials) - number} trials not started")
                return stopped
    finally:
        signal.signal(signal.SIGTERM, before)
    say(f"sweep: {len(trials) - len(failed)} of {len(trials)} trials done: {folder}")
    for name, what, log in failed:
        _warn(f"{name} {what}; its log: {log}")
    return 1 if failed else 0


def _warn(text: str) -> None:
    with suppress(OSError):  # nobody reads
        print(f"lbp: {text}", file=sys.stderr, flush=True)


def trial_names(trials: list[list[str]]) -> list[str]:
    """A folder name for each trial: its number, and what differs between them."""
    digits = len(str(len(trials)))
    varies = [i for i in range(len(trials[0])) if len({trial[i] for trial in trials}) > 1]
    return [
        "-".join(filter(None, [f"{number:0{digits}}", slug(" ".join(trial[i].lstrip("+") for i in varies))]))
        for number, trial in enumerate(trials, 1)
    ]


def _create(run: dict) -> Path:
    now = datetime.now()
    name = "-".join(filter(None, [f"{now:%H%M%S}-sweep", slug(run["name"] or ""), secrets.token_hex(3)]))
    folder = Path(run["dir"]) if run["dir"] else Path("outputs") / f"{now:%Y-%m-%d}" / name
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        raise ConfigError(
            f"run.dir={folder}: exists already, and nothing is ever overwritten; choose another"
        ) from None
    except OSError as error:
        raise ConfigError(
            f"{folder}: the sweep's folder cannot be made ({error.strerror}); set run.dir"
        ) from None
    return folder


def _run(command: list[str], log: Path) -> tuple[int, int]:
    """(exit code, 130 or 143 if the sweep was asked to stop meanwhile). Output is shown and kept in `log`."""
    stopped = 0
    # a group of its own: the terminal's Ctrl-C reaches the trial once, through us
    with (
        log.open("wb", buffering=0) as file,
        subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            process_group=0,
            env=os.environ | {"PYTHONUNBUFFERED": "1"},
        ) as child,
    ):
        reader = threading.Thread(target=_copy, args=(child.stdout, file), daemon=True)
        reader.start()
        while True:
            try:
                code = child.wait()
                break
            except (KeyboardInterrupt, SystemExit) as asked:
                terminated = isinstance(asked, SystemExit)
                if stopped:
                    child.kill()  # asked twice
                else:
                    child.send_signal(signal.SIGTERM if terminated else signal.SIGINT)
                stopped = stopped or (143 if terminated else 130)
        try:
            os.killpg(child.pid, signal.SIGKILL)  # what a trial that died left behind
        except ProcessLookupError:
            pass
        reader.join()
    return code, stopped


def _copy(lines, file) -> None:
    """To log and screen, as long as each takes it: a full disk or a closed pipe must not stop a trial."""
    for line in lines:
        for write in (file.write, _show):
            try:
                write(line)
            except OSError:
                pass


def _show(line: bytes) -> None:
    sys.stdout.write(line.decode("utf-8", "replace"))
    sys.stdout.flush()


def _said(code: int) -> str:
    return f"was killed by signal {-code}" if code < 0 else f"failed (exit code {code})"
