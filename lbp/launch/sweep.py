"""Many runs from one command: what they are called, which are done, and where they are run."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from lbp.config import Config, compose, quoted, slug
from lbp.errors import ConfigError, DataError
from lbp.launch import folder as folders
from lbp.launch import slots
from lbp.launch.slots import Job
from lbp.logs.console import say

ENGINES = ("ray", "slurm")
RECORD = "sweep.json"       # of a sweep's folder: its trials
FILE = "base.yaml"          # in it: what --config named
OF_A_RUN = ("ranks", "rank_timeout")         # of the keys of launch; on a cluster all others are the sweep's
OF_A_SWEEP = ("slots", "timeout", "fork")    # on one machine
HOW = f"{', '.join(f'launch.{key}' for key in OF_A_SWEEP)}, launch={', launch='.join(ENGINES)} with its own keys"


@dataclass
class Trial:
    """A run of a sweep: how it is called, its overrides, and the sweep's folder. A first try that left no checkpoint is kept, and the
    next is NAME-2."""

    sweep: Path
    name: str
    overrides: list[str]
    debug: bool = False
    now: Job | None = None      # what runs it on this node

    @property
    def log(self) -> Path:
        return self.sweep / f"{self.name}.log"

    @property
    def tries(self) -> list[Path]:
        found, number = [], 1
        while (one := self.sweep / (self.name if number == 1 else f"{self.name}-{number}")).exists():
            found.append(one)
            number += 1
        return found

    @property
    def run(self) -> Path:
        """The folder of its last try, or of the first to come."""
        return (self.tries or [self.sweep / self.name])[-1]

    @property
    def done(self) -> bool:
        return bool(self.tries) and folders.status(self.run) == "done"

    @property
    def held(self) -> bool:
        """Whether a process trains it: one that outlived its sweep."""
        if self.tries:
            try:
                with folders.locked(self.run):
                    pass
            except ConfigError:
                return True
        return False

    def job(self) -> Job:
        """Goes on from the last try's checkpoint, if it has one."""
        command = [sys.executable, "-m", "lbp"]
        if self.tries and list(self.run.glob("checkpoints/*.pt")):
            run = self.run
            command += ["resume", str(run), *(["--debug"] if self.debug else [])]
        else:
            run = self.sweep / f"{self.name}-{len(self.tries) + 1}" if self.tries else self.run
            file = self.sweep / FILE
            command += ["train", *(["--config", str(file)] if file.exists() else []), *(["--debug"] if self.debug else []),
                        *self.overrides, f"run.dir={quoted(str(run))}"]
        return Job(self.name, command, self.log, run, of=self)

    def here(self, timeout: float | None, folder: str) -> tuple[int, str, float]:
        """Runs it on this node of a cluster, in the folder that the sweep was started in; its exit code, how it ended, the seconds."""
        os.chdir(folder)
        while self.held:
            time.sleep(1)
        if self.done:
            return 0, "", 0.0
        self.now = self.job()
        job, = slots.run(iter([self.now]), 1, timeout)
        return job.failed, job.ended, job.seconds

    def settle(self, code: int) -> None:
        """A run that was killed cannot say so itself."""
        if code and self.tries and folders.status(self.run) == "running" and not self.held:
            folders.set_status(self.run, "failed")


def sweep(trials: list[Config], file: Path | None = None, debug: bool = False) -> int:
    """Run the trials; returns the command's exit code: 1 if any failed.

    The sweep's folder (`outputs/DATE/TIME-sweep-SUFFIX`, or `run.dir`) has a folder and a log a trial, and a record of them by
    which a sweep into the same `run.dir` leaves out what is done. Ctrl-C stops after the trials' own handling of it: 130;
    SIGTERM: 143. Raises ConfigError if the folder is no sweep's, or a sweep is at work in it.
    """
    launch = _of_sweep(trials)
    engine = launch["name"] if launch["name"] in ENGINES else None
    if engine:
        from lbp.launch import clusters

        clusters.check(engine, launch)
    folder, _ = folder_of(trials[0].values["run"])
    with folders.locked(folder):
        return _run(folder, _enlisted(folder, trials, file, debug), launch, engine)


def resume(folder: Path, overrides: list[str], debug: bool = False) -> int:
    """Goes on with a sweep: runs what of it is not done. Overrides may say how (launch.*), not what."""
    problems = [f"{word}: a sweep goes on with its own trials; free are {HOW}" for word in overrides if not word.startswith("launch")]
    if problems:
        raise ConfigError(*problems)
    file, known = folder / FILE, record(folder)
    trials = [compose([*one["overrides"], *overrides, f"run.dir={quoted(str(folder))}"], file if file.exists() else None) for one in known]
    if overrides and any(identity(trial.values) != one["identity"] for trial, one in zip(trials, known)):
        raise ConfigError(f"{' '.join(overrides)}: makes other runs of its trials, and a sweep goes on with its own; free are {HOW}")
    return sweep(trials, file if file.exists() else None, debug)


def find_sweep(text: str, root: Path = Path("outputs"), record: str = RECORD) -> Path | None:
    """The folder of a sweep: a path, or the start of its name. Raises ConfigError where several names begin so."""
    if text and (Path(text) / record).is_file():
        return Path(text)
    found = [path.parent for path in root.glob(f"*/*/{record}") if text and path.parent.name.startswith(text)]
    if len(found) > 1:
        raise ConfigError(f"{text}: several begin so: {', '.join(map(str, sorted(found)))}; name one of them")
    return found[0] if found else None


def record(folder: Path) -> list[dict]:
    """The trials of a sweep: name, identity, overrides. Raises DataError."""
    try:
        return json.loads((folder / RECORD).read_text("utf-8"))["trials"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder / RECORD}: missing or damaged ({error}); start the sweep anew in another folder") from None


def identity(values: dict) -> str:
    """A hash of all that makes a run what it is: its whole configuration but where it lies and what launches it."""
    own = _own(values["launch"])
    kept = values | {"run": values["run"] | {"dir": None}, "launch": {key: value for key, value in values["launch"].items() if key not in own}}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def refuse_alone(config: Config) -> None:
    """Raises ConfigError where a single run is asked for by settings of a sweep."""
    launch = config.values["launch"]
    words = [f"launch={launch['name']}"] if launch["name"] in ENGINES else []
    words += [word for word in config.typed if word.partition("=")[0].lstrip("+") in {f"launch.{key}" for key in OF_A_SWEEP}]
    if words:
        raise ConfigError(*(f"{word}: is about the trials of a sweep; add -m, or leave it out" for word in words))


def _own(launch: dict) -> set[str]:
    """The keys of launch that are the sweep's and not a run's."""
    return set(launch) - set(OF_A_RUN) if launch["name"] in ENGINES else set(OF_A_SWEEP) | ({"name"} if launch["name"] == "default" else set())


def _of_sweep(trials: list[Config]) -> dict:
    """What all trials say of the sweep."""
    own = [{key: one.values["launch"][key] for key in _own(one.values["launch"])} for one in trials]
    for one in own:
        if one != own[0]:
            differ = sorted(key for key in set(one) | set(own[0]) if one.get(key) != own[0].get(key))
            raise ConfigError(*(f"launch.{key}: is of the whole sweep, and cannot have several values" for key in differ))
    return trials[0].values["launch"]


def _trained(overrides: list[str], launch: dict) -> list[str]:
    """What of the overrides the run itself is told."""
    own = {f"launch.{key}" for key in _own(launch)} | ({"launch"} if launch["name"] in ("default", *ENGINES) else set())
    return [word for word in overrides if word.partition("=")[0].lstrip("+") not in own]


def trial_names(trials: list[list[str]], first: int = 1) -> list[str]:
    """A folder name for each trial: its number, counted from `first`, and what differs between them."""
    digits = len(str(first - 1 + len(trials)))
    varies = [i for i in range(len(trials[0])) if len({trial[i] for trial in trials}) > 1]
    return [
        "-".join(filter(None, [f"{number:0{digits}}", slug(" ".join(trial[i].lstrip("+") for i in varies))]))
        for number, trial in enumerate(trials, first)
    ]


def folder_of(run: dict, kind: str = "sweep", record: str = RECORD) -> tuple[Path, bool]:
    """A new folder, or the sweep's that `run.dir` names; whether it is new."""
    now = datetime.now()
    name = "-".join(filter(None, [f"{now:%H%M%S}-{kind}", slug(run["name"] or ""), secrets.token_hex(3)]))
    folder = Path(run["dir"]) if run["dir"] else Path("outputs") / f"{now:%Y-%m-%d}" / name
    if (folder / record).is_file():
        return folder, False
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
    return folder, True


def _enlisted(folder: Path, trials: list[Config], file: Path | None, debug: bool) -> list[Trial]:
    """The trials of this command, each under the name that the folder's record has for its identity, or a new one, which is written down."""
    text, base = file.read_bytes() if file else None, folder / FILE
    if (folder / RECORD).exists():
        if (base.read_bytes() if base.exists() else None) != text:
            raise ConfigError(f"{file or folder}: the sweep in this folder was started with another --config file; choose another run.dir")
    elif text is not None:
        base.write_bytes(text)
    known = {one["identity"]: one for one in record(folder)} if (folder / RECORD).exists() else {}
    asked = {identity(one.values): one for one in trials}      # the same run twice is one
    new = [key for key in asked if key not in known]
    if new:
        overrides = {key: _trained(asked[key].typed, asked[key].values["launch"]) for key in new + [key for key in asked if key in known]}
        for key, name in zip(new, trial_names(list(overrides.values()), len(known) + 1)):
            known[key] = {"name": name, "identity": key, "overrides": [word for word in overrides[key] if not word.startswith("run.dir=")]}
        folders.write_json(folder / RECORD, {"trials": list(known.values())})
    return [Trial(folder, known[key]["name"], known[key]["overrides"], debug) for key in asked]


def _run(folder: Path, trials: list[Trial], launch: dict, engine: str | None) -> int:
    count, left = len(trials), [trial for trial in trials if not trial.done]
    alone = not engine and launch["slots"] == 1
    how = f" by {engine}" if engine else "" if alone else f", {launch['slots']} at a time"
    say(f"sweep of {count} trials{how}: {folder}" + (f"; {count - len(left)} are done" if len(left) < count else ""))
    number = {trial.name: i for i, trial in enumerate(trials, 1)}
    failed: list[tuple[Trial, str]] = []
    if engine:
        from lbp.launch import clusters

        events = clusters.run(engine, left, launch)
    else:
        events = _local(left, launch, number if alone else None, count)
    with slots.stoppable() as stopped, closing(events):
        for trial, code, how, seconds in events:
            trial.settle(code)
            if code:
                failed.append((trial, how))
                warn(f"trial {number[trial.name]}/{count} {'' if alone else trial.name + ' '}{how}; its log: {trial.log}")
            elif not alone:
                say(f"trial {number[trial.name]}/{count} {trial.name}: {_result(trial.run)}, {seconds:.0f} s")
    if stopped:
        for trial in left:      # of which nothing was told
            trial.settle(stopped[0])
        warn(f"sweep stopped, {sum(not trial.done for trial in trials)} of {count} trials are not done; lbp resume {folder} goes on")
        return stopped[0]
    say(f"sweep: {count - len(failed)} of {count} trials done: {folder}")
    for line in _table(trials):
        say(line)
    for trial, how in failed:
        warn(f"{trial.name} {how}; its log: {trial.log}")
    if failed:
        warn(f"lbp resume {folder} runs what is not done")
    return 1 if failed else 0


def _local(trials: list[Trial], launch: dict, numbers: dict[str, int] | None, count: int) -> Iterator[tuple[Trial, int, str, float]]:
    """On this machine; `numbers`: one after another, and all that they say is shown."""
    def jobs() -> Iterator[Job | None]:
        waiting = list(trials)
        while waiting:
            trial = waiting.pop(0)
            if trial.held:      # by a process that outlived the sweep: wait for what it makes of it
                waiting.append(trial)
                yield None
            elif trial.done:
                finished.append(trial)
                yield None
            else:
                if numbers:
                    say(f"trial {numbers[trial.name]}/{count}: {' '.join(trial.overrides)}")
                yield trial.job()

    finished: list[Trial] = []
    with closing(slots.run(jobs(), launch["slots"], launch["timeout"], bool(numbers), launch["fork"])) as ended:
        for job in ended:
            yield job.of, job.failed, job.ended, job.seconds
    for trial in finished:
        yield trial, 0, "", 0.0


def _result(run: Path) -> str:
    from lbp.report import runs
    from lbp.report.listing import result

    found = result(runs.read(run))
    return f"done, test {found}" if found else "done"


def _table(trials: list[Trial]) -> list[str]:
    from lbp.report import runs
    from lbp.report.listing import listing

    there = [trial.run for trial in reversed(trials) if (trial.run / "config.yaml").exists()]
    return listing([runs.read(run) for run in there], shutil.get_terminal_size().columns) if len(there) > 1 else []


def warn(text: str) -> None:
    with suppress(OSError):  # nobody reads
        print(f"lbp: {text}", file=sys.stderr, flush=True)
