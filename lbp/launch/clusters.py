"""A sweep's trials on other machines: the engines are Ray and, through submitit, Slurm. All nodes must see the sweep's folder."""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from lbp.errors import ConfigError
from lbp.launch.slots import LOOK
from lbp.launch.sweep import Trial

NEEDS = {"ray": "ray", "slurm": "submitit"}
Ended = tuple[Trial, int, str, float]   # a trial, its exit code, how it ended, the seconds that it took


def check(engine: str, launch: dict) -> None:
    """Raises ConfigError where the engine is not installed, or there is no cluster."""
    if not find_spec(NEEDS[engine]):
        raise ConfigError(f"launch={engine}: needs {NEEDS[engine]}, which is not installed; pip install 'lbp[{engine}]', "
                          "or use launch.slots on this machine")
    if engine == "ray":
        _connect(launch["address"])
    elif launch["cluster"] == "slurm" and not shutil.which("sbatch"):
        raise ConfigError("launch=slurm: this machine has no sbatch; run it on a login node of the cluster, or set launch.cluster=local")


def run(engine: str, trials: list[Trial], launch: dict) -> Iterator[Ended]:
    """Runs the trials and gives each when it has ended; what is asked to end takes its jobs with it."""
    return (_ray if engine == "ray" else _slurm)([_absolute(trial) for trial in trials], launch)


def _absolute(trial: Trial) -> Trial:
    return Trial(trial.sweep.absolute(), trial.name, trial.overrides, trial.debug)


def _threads(launch: dict) -> dict[str, str]:
    return {"LBP_THREADS": str(max(1, int(launch["cpus"])))}


# ---- Ray


def _connect(address: str):
    import ray

    if not ray.is_initialized():
        try:
            ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False, include_dashboard=False if address == "local" else None)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise ConfigError(f"launch.address={address}: no Ray cluster there ({str(error).splitlines()[0]}); ray start --head begins one, "
                              "launch.address=local makes one of this machine") from None
    return ray


def _ray(trials: list[Trial], launch: dict) -> Iterator[Ended]:
    ray = _connect(launch["address"])
    here = ray.remote(Trial.here).options(
        num_cpus=launch["cpus"], num_gpus=launch["gpus"], max_retries=launch["retries"], name="lbp trial",
        **({"memory": int(launch["memory_gb"] * 2**30)} if launch["memory_gb"] else {}),
        runtime_env={"env_vars": _threads(launch)})
    waiting = {here.remote(trial, launch["timeout"], str(Path.cwd())): trial for trial in trials}
    try:
        while waiting:
            ready, _ = ray.wait(list(waiting), timeout=1)
            for one in ready:
                trial = waiting.pop(one)
                try:
                    yield trial, *ray.get(one)
                except ray.exceptions.RayError as error:
                    yield trial, 1, f"was lost: {str(error).strip().splitlines()[0]}", 0.0
    finally:
        for one in waiting:
            ray.cancel(one, force=True)
        ray.shutdown()


# ---- Slurm


class _Queued:
    """A trial as a job: what submitit pickles, and asks for itself again where the job's time is over."""

    def __init__(self, trial: Trial, timeout: float | None, folder: str):
        self.trial, self.timeout, self.folder = trial, timeout, folder

    def __call__(self) -> tuple[int, str, float]:
        return self.trial.here(self.timeout, self.folder)

    def checkpoint(self):
        from submitit.helpers import DelayedSubmission

        job, self.trial.now = self.trial.now, None
        if job:     # it writes its own checkpoint
            job.end()
            while not job.over():
                time.sleep(LOOK)
        return DelayedSubmission(self)


def _slurm(trials: list[Trial], launch: dict) -> Iterator[Ended]:
    import submitit

    if not trials:
        return
    executor = submitit.AutoExecutor(folder=trials[0].sweep / "jobs", cluster=launch["cluster"], slurm_max_num_timeout=launch["retries"])
    executor.update_parameters(
        name="lbp", timeout_min=launch["minutes"], cpus_per_task=launch["cpus"], gpus_per_node=launch["gpus"], mem_gb=launch["memory_gb"],
        slurm_array_parallelism=launch["at_once"], slurm_setup=[f"export {key}={value}" for key, value in _threads(launch).items()],
        slurm_additional_parameters={"requeue": True} | launch["options"],
        **({"slurm_partition": launch["partition"]} if launch["partition"] else {}))
    with executor.batch():
        jobs = [(executor.submit(_Queued(trial, launch["timeout"], os.getcwd())), trial) for trial in trials]
    try:
        while jobs:
            for job, trial in [pair for pair in jobs if pair[0].done()]:
                jobs.remove((job, trial))
                try:
                    yield trial, *job.result()
                except (submitit.core.utils.FailedJobError, submitit.core.utils.UncompletedJobError) as error:
                    yield trial, 1, f"was lost: {str(error).strip().splitlines()[-1]}", 0.0
            time.sleep(LOOK if launch["cluster"] == "local" else 2)
    finally:
        for job, _ in jobs:
            job.cancel()
