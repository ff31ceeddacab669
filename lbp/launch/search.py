"""Tuning: each rule over the space that its YAML declares, all with the same budget; Optuna chooses, trials are runs like any other.

What was asked and what came of it stand in the folder's journal, which any number of processes may share.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import textwrap
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lbp import registry
from lbp.config import Config, Dimension, compose, dimension
from lbp.errors import ConfigError, DataError
from lbp.launch import folder as folders
from lbp.launch import slots
from lbp.launch import sweep as sweeps
from lbp.launch.slots import Job
from lbp.logs.console import say

RECORD = "study.journal"    # of a search's folder
RESULT = "search.json"
PLOT = "search.png"
TRIALS = 30                 # a rule, where nothing is said of the budget
METRICS = ("accuracy", "r2")
ALIKE = ("dataset", "experiment", "seed", "plugins", "run", "launch", "logger")     # for all trials, or their values cannot be compared


@dataclass
class Plan:
    """A rule's search: what all its trials are told, and what each is told anew."""

    algo: str
    overrides: list[str]
    dimensions: list[Dimension]
    standing: dict[str, Any]    # the values that the rule has without a search, where they are in the space

    def words(self, params: dict[str, Any]) -> list[str]:
        """The overrides of a trial."""
        return [*self.overrides, *(f"{key}={_text(params[key])}" for key in (one.key for one in self.dimensions))]

    def record(self, asked: dict[str, Any]) -> dict[str, Any]:
        return {"overrides": self.overrides, "space": {one.key: one.text for one in self.dimensions}, "standing": self.standing, **asked}


def plans(overrides: list[str]) -> tuple[list[Plan], Config]:
    """A plan for each value of `algo=`, and the configuration that the first begins with.

    The space of a rule is what its YAML declares, without the keys that are typed with one value, and with those typed with
    several: KEY=interval(LOW, HIGH), tag(log, interval(...)), int(interval(...)), choice(...). Raises ConfigError.
    """
    problems: list[str] = []
    fixed, typed = [], {}
    for word in overrides:
        try:
            found = dimension(word)
        except ConfigError as error:
            problems += error.problems
            continue
        if not found:
            fixed.append(word)
        elif found.key.partition(".")[0] in ALIKE:
            problems.append(f"{word}: is one for all trials of a search"
                            + ("; lbp train -m tells seeds apart, with what the search has found" if found.key == "seed" else ""))
        else:
            typed[found.key] = found
        if word.partition("=")[2].lstrip().startswith("{"):
            problems.append(f"{word}: a search must know which keys are typed; write them one by one")
    algos = typed.pop("algo", None)
    names = algos.choices if algos else [None]
    if problems:
        raise ConfigError(*problems)
    made = []
    for name in dict.fromkeys(names):
        try:
            made.append(_plan([f"algo={name}", *fixed] if name else fixed, typed))
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(*dict.fromkeys(problems))
    return [plan for plan, _ in made], made[0][1]


def _plan(fixed: list[str], typed: dict[str, Dimension]) -> tuple[Plan, Config]:
    config = compose(fixed)
    algo, problems = config.options["algo"], []
    if config.values["dataset"].get("val_size") == 0:
        problems.append("dataset.val_size=0: a search chooses by validation, never by the test split; hold something out")
    if config.values["launch"]["name"] in sweeps.ENGINES:
        problems.append(f"launch={config.values['launch']['name']}: a search runs on this machine; others may join it by "
                        "lbp resume FOLDER, where the disk is shared")
    how = {"run.dir", "run.name", "algo", *(f"launch.{key}" for key in sweeps.OF_A_SWEEP)}
    own = [word for word in fixed if _key(word) not in how]
    base = [f"algo={algo}", *own]
    keys = {_key(word) for word in fixed}
    declared = {key: dimension(f"{key}={text}") for key, text in registry.option("algo", algo).search.items() if key not in keys | set(typed)}
    dimensions, standing = [], {}
    for key, one in (declared | typed).items():
        try:
            ends = one.choices or _tried(one)
            values = {end: _at(compose([*base, f"{key}={end}"]), key) for end in map(str, ends)}
        except ConfigError as error:
            if key in declared and key.partition(".")[0] in keys - {"algo"}:
                continue    # an option that was typed has no such knob, or not with these values
            problems += [f"{problem} (of {key}={one.text})" for problem in error.problems]
            continue
        dimensions.append(one)
        now = _at(config, key)
        if one.choices:
            standing |= {key: end for end, value in values.items() if value == now}
        elif isinstance(now, (int, float)) and one.low <= now <= one.high:
            standing[key] = type(one.low)(now)
    if not dimensions and not problems:
        problems.append(f"algo={algo}: nothing is left to search; its space is "
                        + (", ".join(registry.option("algo", algo).search) or "not declared") + "; type a key with several values: "
                        "optimizer.lr='tag(log, interval(1e-4, 1e-1))'")
    if problems:
        raise ConfigError(*problems)
    return Plan(algo, base, dimensions, standing), config


def _key(word: str) -> str:
    return word.partition("=")[0].lstrip("+").replace("/", ".")


def _tried(one: Dimension) -> list[float]:
    """Ends of an interval, and what shows whether numbers between them are allowed too."""
    if isinstance(one.low, int):
        return [one.low, one.high]
    return [one.low, one.low + 0.618 * (one.high - one.low), one.high]


def _text(value: Any) -> str:
    """A value as it is typed; four digits of a number are enough to know it by."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _at(config: Config, key: str) -> Any:
    """A key's value. What an inner map leaves out (optimizer.feedback.lr) is as in the map around it."""
    if key in config.options:
        return config.options[key]
    value: Any = config.values
    for part in (parts := key.split(".")):
        if not isinstance(value, dict) or part not in value:
            return _at(config, ".".join([*parts[:-2], parts[-1]])) if len(parts) > 2 else None
        value = value[part]
    return value


# ---- what Optuna is told and asked


def _optuna():
    try:
        import optuna
    except ImportError as error:
        raise ConfigError(f"lbp search needs optuna ({error}): pip install 'lbp[search]'") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def enlist(study, plan: Plan, asked: dict[str, Any]) -> None:
    """Writes a plan into its new study, whose first trial has the rule's own settings."""
    study.set_user_attr("plan", plan.record(asked))
    if plan.standing:
        study.enqueue_trial(plan.standing)


def plan_of(study) -> tuple[Plan, dict[str, Any]]:
    """The plan of a study, and the rest that was asked: trials, minutes, sampler, pruner, seed."""
    asked = dict(study.user_attrs["plan"])
    overrides, space, standing = (asked.pop(key) for key in ("overrides", "space", "standing"))
    return Plan(study.study_name, overrides, [dimension(f"{key}={text}") for key, text in space.items()], standing), asked


def ask(study, plan: Plan, asked: dict[str, Any]):
    """The next trial, a function of the seed and of the trials there are: a search that was stopped goes on as it would have."""
    import numpy
    import optuna

    seed = int(numpy.random.SeedSequence([asked["seed"], len(study.get_trials(deepcopy=False))]).generate_state(1)[0])
    study.sampler = (optuna.samplers.RandomSampler(seed) if asked["sampler"] == "random" else
                     optuna.samplers.TPESampler(seed=seed, multivariate=True, constant_liar=True))
    return study.ask({one.key: _distribution(one) for one in plan.dimensions})


def _distribution(one: Dimension):
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if one.choices:
        return CategoricalDistribution(one.choices)
    return (IntDistribution if isinstance(one.low, int) else FloatDistribution)(one.low, one.high, log=one.log)


# ---- searching


def search(overrides: list[str], trials: int | None, minutes: float | None, sampler: str, pruner: str, debug: bool = False) -> int:
    """Tunes; returns the command's exit code: 1 if a rule has no trial that was completed, 130 or 143 if it was asked to stop.

    `trials` a rule; `minutes` of its trials' time; of both what is reached first. Into the `run.dir` of a search it goes on with
    that one. Raises ConfigError."""
    made, config = plans(overrides)
    _optuna()
    budget = {"trials": trials or (None if minutes else TRIALS), "minutes": minutes, "sampler": sampler, "pruner": pruner}
    folder, fresh = sweeps.folder_of(config.values["run"], "sweep-search", RECORD)
    asked = budget | {"seed": config.values["seed"]}
    with _held(folder / ".ask"):
        there = {} if fresh else {study.study_name: study for study in _studies(folder)}
        others = [plan.algo for plan in made if plan.algo in there and there[plan.algo].user_attrs["plan"] | budget != plan.record(asked)]
        if others:
            raise ConfigError(f"{folder}: was begun with other settings for {', '.join(others)}; choose another run.dir, or go on with "
                              f"it by lbp resume {folder}")
        for plan in made:
            if plan.algo in there:
                there[plan.algo].set_user_attr("plan", plan.record(asked))
            else:
                enlist(_study(folder, plan.algo), plan, asked)
    return Search(folder, config.values["launch"], debug).run()


def resume(folder: Path, overrides: list[str], debug: bool = False) -> int:
    """Goes on with a search up to its budget, or takes part in it. Overrides may say how (launch.*), not what."""
    free = [f"launch.{key}" for key in sweeps.OF_A_SWEEP]
    problems = [f"{word}: a search goes on with its own settings; free are {', '.join(free)}; another budget: the same command again, "
                f"with --trials and run.dir={folder}" for word in overrides if _key(word) not in free]
    if problems:
        raise ConfigError(*problems)
    return Search(folder, compose(overrides).values["launch"], debug).run()


def _storage(folder: Path):
    from filelock import FileLock
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    path, lock = folder / RECORD, FileLock(folder / ".journal")
    try:
        with lock:      # nobody writes: a line without an end is what a full disk or a lost machine left
            lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
            if lines and not lines[-1].endswith(b"\n"):
                os.truncate(path, sum(map(len, lines[:-1])))
            elif lines:
                json.loads(lines[-1])   # Optuna would only see it once another line follows
        return JournalStorage(JournalFileBackend(str(path), lock))
    except (ValueError, KeyError, AssertionError) as error:
        raise DataError(f"{path}: damaged ({error}); the trials that are there remain runs; start the search anew in "
                        "another folder") from None


def _study(folder: Path, name: str):
    return _optuna().create_study(storage=_storage(folder), study_name=name, direction="maximize", load_if_exists=True)


def _studies(folder: Path) -> list:
    """The studies of a search, as they were begun; without one that was killed before its plan was written."""
    found = [_study(folder, name) for name in _optuna().get_all_study_names(_storage(folder))]
    return [study for study in found if "plan" in study.user_attrs]


@contextmanager
def _held(path: Path) -> Iterator[None]:
    from filelock import FileLock

    with FileLock(path):
        yield


@dataclass
class Running:
    """A trial that this process runs or looks at, and what its metrics have said so far."""

    rule: Rule
    trial: Any      # optuna.Trial
    run: sweeps.Trial
    lock: Any
    told: int = 0       # the epoch up to which the study knows the values, from before an interruption
    pruned: bool = False
    metric: str = ""
    values: dict[int, float] = field(default_factory=dict)     # of the validation, by epoch
    begins: int = 0     # epochs before the phase that it is in
    _phase: str = ""
    _read: int = 0

    def look(self) -> bool:
        """Reads what is new in the metrics; whether there were values of an epoch."""
        before = len(self.values)
        with suppress(OSError), open(self.run.run / "metrics.jsonl", "rb") as file:
            size = file.seek(0, 2)
            file.seek(0 if size < self._read else self._read)   # a run that goes on drops what its checkpoint does not know
            text = file.read()
            self._read = file.tell() - len(text) + text.rfind(b"\n") + 1
            for line in text[: text.rfind(b"\n") + 1].splitlines():
                self._take(json.loads(line))
        return len(self.values) > before

    def _take(self, record: dict[str, Any]) -> None:
        if record["split"] == "train_epoch" and record["phase"] != self._phase:
            self.begins, self._phase = record["epoch"] - 1, record["phase"]
        elif record["split"] == "val":
            self.metric = next(name for name in METRICS if name in record)
            if (value := record[self.metric]) is not None:
                self.values[record["epoch"]] = value
                if record["epoch"] > self.told:
                    self.trial.report(value, record["epoch"])


class Rule:
    """A study and its plan."""

    def __init__(self, study, folder: Path):
        self.study, self.folder = study, folder
        self.plan, self.asked = plan_of(study)
        self.vain = ""      # why its trials cannot be run at all

    def trials(self, *states: str) -> list:
        """Those that count: one that was killed before all its values were chosen is none."""
        whole = {one.key for one in self.plan.dimensions}
        return [one for one in self.study.get_trials(deepcopy=False) if set(one.params) >= whole and (not states or one.state.name in states)]

    def spent(self) -> float:
        """Minutes of ended trials."""
        return sum(one.user_attrs.get("seconds", 0.0) for one in self.trials()) / 60

    def used(self) -> tuple[float, int]:
        """The share of the budget, and the trials, by which rules take turns."""
        trials, asked = len(self.trials()), self.asked
        return max(trials / (asked["trials"] or float("inf")), self.spent() / (asked["minutes"] or float("inf"))), trials

    def run(self, number: int, params: dict[str, Any], debug: bool) -> sweeps.Trial:
        return sweeps.Trial(self.folder, f"{number + 1:03}-{self.plan.algo}", self.plan.words(params), debug)

    def best(self):
        done = self.trials("COMPLETE")
        return max(done, key=lambda one: one.value) if done else None


class Search:
    """What one process does for the search in a folder."""

    def __init__(self, folder: Path, launch: dict[str, Any], debug: bool):
        self.optuna, self.folder, self.launch, self.debug = _optuna(), folder, launch, debug
        self.rules = [Rule(study, folder) for study in _studies(folder)]
        if not self.rules:
            raise DataError(f"{folder / RECORD}: no search was begun in it; start one: lbp search algo=NAME run.dir={folder}")
        self.mine: set[tuple[str, int]] = set()

    def run(self) -> int:
        self._announce()
        ended = slots.run(self._jobs(), self.launch["slots"], self.launch["timeout"], fork=self.launch["fork"], watch=self._watch)
        with slots.stoppable() as stopped, closing(ended):
            for job in ended:
                self._settle(job.of, job)
        with _held(self.folder / ".conclusion"):    # of several processes the one that comes last has seen everything
            lines = conclude(self.folder, self.rules)
        for line in lines:
            say(line)
        if stopped:
            sweeps.warn(f"search stopped; lbp resume {self.folder} goes on")
            return stopped[0]
        for rule in self.rules:
            if not rule.best():
                sweeps.warn(f"{rule.plan.algo}: no trial was completed" + (f"; {rule.vain}" if rule.vain else ""))
        return 0 if all(rule.best() for rule in self.rules) else 1

    def _announce(self) -> None:
        at_a_time = f", {self.launch['slots']} at a time" if self.launch["slots"] > 1 else ""
        say(f"search: {self.folder}{at_a_time}")
        for rule in self.rules:
            asked, there = rule.asked, len(rule.trials())
            budget = " or ".join(f"{asked[unit]:g} {unit}" for unit in ("trials", "minutes") if asked[unit])
            say(f"{rule.plan.algo}: {budget} by {asked['sampler']}" + (f", {there} are there" if there else ""))
            for one in rule.plan.dimensions:
                say(f"  {one.key}={one.text}")

    def _jobs(self) -> Iterator[Job | None]:
        while True:
            with _held(self.folder / ".ask"):
                found = self._next()
            if found is False:
                return
            yield found

    def _next(self) -> Job | None | bool:
        """A trial that another process left behind, else a new one of the rule that has had the least; None: wait; False: no more."""
        wait = False
        for rule in self.rules:
            for one in rule.study.get_trials(deepcopy=False, states=(self.optuna.trial.TrialState.RUNNING,)):
                if (rule.plan.algo, one.number) not in self.mine:
                    job = self._left(rule, one.number)
                    if isinstance(job, Job):
                        return job
                    wait = wait or job
        for rule in sorted(self.rules, key=Rule.used):
            if rule.used()[0] < 1 and not rule.vain:
                trial = ask(rule.study, rule.plan, rule.asked)
                return self._job(rule, trial, self._lock(rule, trial.number))
        return None if wait else False

    def _left(self, rule: Rule, number: int) -> Job | bool:
        """The job that ends a trial of a process that is no more; True: its run still goes on by itself; False: there is none to end."""
        lock = self._lock(rule, number)
        if not lock:
            return False
        one = rule.study.get_trials(deepcopy=False)[number]
        trial = self.optuna.trial.Trial(rule.study, one._trial_id)
        if one.state.is_finished():     # between two looks
            lock.release()
        elif set(one.params) < {dim.key for dim in rule.plan.dimensions}:
            rule.study.tell(number, state=self.optuna.trial.TrialState.FAIL)
            lock.release()
        elif (run := rule.run(number, one.params, self.debug)).held:
            lock.release()
            return True
        elif run.done:
            self._settle(Running(rule, trial, run, lock, one.last_step or 0), None)
        else:
            return self._job(rule, trial, lock, one.last_step or 0)
        return False

    def _lock(self, rule: Rule, number: int):
        """Held by the process that a trial is of, for as long as it lives; None: by another."""
        from filelock import FileLock, Timeout

        lock = FileLock(self.folder / f".{number + 1:03}-{rule.plan.algo}")
        with suppress(Timeout):
            return lock.acquire(timeout=0) and lock
        return None

    def _job(self, rule: Rule, trial, lock, told: int = 0) -> Job:
        self.mine.add((rule.plan.algo, trial.number))
        running = Running(rule, trial, rule.run(trial.number, trial.params, self.debug), lock, told)
        job = running.run.job()
        job.of = running
        return job

    def _watch(self, job: Job) -> str:
        """Why a trial is not worth its time, by the values of others at the same epoch of its last phase."""
        running = job.of
        if not running.look() or running.rule.asked["pruner"] == "none":
            return ""
        done = running.rule.trials("COMPLETE")
        epoch, last = max(running.values), max((one.last_step or 0 for one in done), default=0)
        begins = max([running.begins, *(one.user_attrs.get("begins", 0) for one in done)])
        pruner = self.optuna.pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=begins + 1)
        frozen = running.rule.study.get_trials(deepcopy=False)[running.trial.number]
        running.pruned = epoch < last and pruner.prune(running.rule.study, frozen)
        return f"pruned after epoch {epoch}" if running.pruned else ""

    def _settle(self, running: Running, job: Job | None) -> None:
        """Tells what became of a trial. One that was asked to end stays open: whoever goes on with the search goes on with it."""
        rule, trial, run = running.rule, running.trial, running.run
        seconds = (job.seconds if job else 0.0) + trial.user_attrs.get("seconds", 0.0)
        seconds = max(seconds, _summary(run).get("wall_s", 0.0))    # what passed before a search was killed its run alone knows
        trial.set_user_attr("seconds", seconds)
        running.look()
        run.settle(job.code if job else 0)
        said = f"{rule.plan.algo} {trial.number + 1}" + (f"/{rule.asked['trials']}" if rule.asked["trials"] else "")
        said += ": " + " ".join(f"{one.key}={_text(trial.params[one.key])}" for one in rule.plan.dimensions)
        states = self.optuna.trial.TrialState
        if run.done and running.values:
            value = max(running.values.values())
            best = rule.best()
            for key in ("metric", "begins"):
                trial.set_user_attr(key, getattr(running, key))
            rule.study.tell(trial.number, value)
            say(f"{said}: {running.metric} {_figure(value)}, {seconds:.0f} s" + ("" if best and best.value >= value else ", the best so far"))
        elif job and not job.why and (job.code in slots.INTERRUPTED or job.told):
            self.mine.discard((rule.plan.algo, trial.number))
        elif running.pruned or job and job.code == 4:
            trial.set_user_attr("ended", job.why if running.pruned else "diverged")
            rule.study.tell(trial.number, state=states.PRUNED)
            say(f"{said}: {trial.user_attrs['ended']}, {seconds:.0f} s")
        else:
            how = (job.ended if job else "") or "tells no validation"
            trial.set_user_attr("ended", how)
            rule.study.tell(trial.number, state=states.FAIL)
            sweeps.warn(f"{said}: {how}; its log: {run.log}")
            if job and job.code in (2, 3) and not rule.best():
                rule.vain = "".join(run.log.read_text("utf-8", "replace").splitlines()[-1:]).removeprefix("lbp: ")
        running.lock.release()


# ---- what came of it


def conclude(folder: Path, rules: list[Rule]) -> list[str]:
    """Writes search.json and the plot; the lines that say the same."""
    found = {rule.plan.algo: _result(rule) for rule in rules}
    folders.write_json(folder / RESULT, {"algos": found})
    lines = ["", *_table(found)]
    for algo, one in found.items():
        if one["importance"]:
            lines.append(f"{algo}: importance " + ", ".join(f"{key} {share:.2f}" for key, share in one["importance"].items()))
        if one["best"]:
            lines.append(f"{algo}: {one['best']['command']}")
    try:
        if curves := {algo: _progress(one["values"]) for algo, one in found.items() if one["best"]}:
            from lbp.report.plots import curves as draw

            metric = next(one["best"]["metric"] for one in found.values() if one["best"])
            draw(folder / PLOT, curves, "trial", f"best validation {metric} so far")
            lines.append(f"plot: {folder / PLOT}")
    except (ConfigError, OSError) as error:
        lines.append(f"no plot: {error}")
    return lines


def _result(rule: Rule) -> dict[str, Any]:
    trials, best = rule.trials(), rule.best()
    own = rule.plan.standing if len(rule.plan.standing) == len(rule.plan.dimensions) else None
    first = next((one for one in rule.trials("COMPLETE") if one.system_attrs.get("fixed_params") == own), None) if own else None
    result = {"trials": len(trials), "completed": len(rule.trials("COMPLETE")), "pruned": len(rule.trials("PRUNED")),
              "failed": len(rule.trials("FAIL")), "minutes": rule.spent(), "sampler": rule.asked["sampler"],
              "space": {one.key: one.text for one in rule.plan.dimensions}, "standing": first and first.value,
              "values": [one.value if one.state.name == "COMPLETE" else None for one in trials], "importance": _importance(rule), "best": None}
    if best:
        run, metric = rule.run(best.number, best.params, False), best.user_attrs["metric"]
        result["best"] = {
            "trial": best.number + 1, "run": str(run.run), "metric": metric, "value": best.value, "test": _summary(run).get(f"best_test_{metric}"),
            "settings": {key: _text(value) for key, value in best.params.items()},
            "command": shlex.join(["lbp", "train", *rule.plan.words(best.params)])}
    return result


def _summary(run: sweeps.Trial) -> dict[str, Any]:
    with suppress(OSError, ValueError):
        return json.loads((run.run / "summary.json").read_text("utf-8"))
    return {}


def _importance(rule: Rule) -> dict[str, float]:
    """The share of each knob in what the values differ by (fANOVA), the greatest first; {} where too few trials tell."""
    import optuna

    done = rule.trials("COMPLETE")
    if len(done) < 4 or len({one.value for one in done}) < 2:
        return {}
    keys = [one.key for one in rule.plan.dimensions]
    if len(keys) == 1:
        return {keys[0]: 1.0}
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=rule.asked["seed"])
    return {key: float(share) for key, share in optuna.importance.get_param_importances(rule.study, evaluator=evaluator, params=keys).items()}


def _table(found: dict[str, dict[str, Any]]) -> list[str]:
    from lbp.report.tables import Column, text

    columns = [Column("algo"), Column("validation"), Column("as it stands"), Column("test"), Column("trials", right=True),
               *(Column(name, minor=True, right=True) for name in ("pruned", "failed", "minutes")), Column("run", minor=True)]
    rows = []
    for algo, one in sorted(found.items(), key=lambda item: (item[1]["best"] or {}).get("value", float("-inf")), reverse=True):
        best = one["best"] or {}
        rows.append([algo, *(_figure(value) for value in (best.get("value"), one["standing"], best.get("test"))), str(one["trials"]),
                     str(one["pruned"]), str(one["failed"]), f"{one['minutes']:.1f}", Path(best.get("run", "")).name])
    width = shutil.get_terminal_size().columns
    lines = text(columns, rows, width)
    legend = "validation: of the best epoch of the best trial; as it stands: of the rule's own settings; test: at that epoch, of one seed"
    return [*lines, *textwrap.wrap(legend * any(one["best"] is not None for one in found.values()), max(width, 12))]


def _figure(value: float | None) -> str:
    from lbp.report.tables import figure

    return "" if value is None else figure(value)


def _progress(values: list[float | None]) -> tuple[list[int], list[float]]:
    """The best value after each trial, from the first that has one."""
    xs, ys = [], []
    for number, value in enumerate(values, 1):
        if value is not None or ys:
            xs.append(number)
            ys.append(max([*ys[-1:], *([value] if value is not None else [])]))
    return xs, ys
