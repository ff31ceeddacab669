"""Several ranks train what one would, end together however they end, and leave nothing behind.

Run as a script this file is a rank of the first half: a pair of processes goes through its cases, and three through
theirs. What one rank gets is computed beside them.
"""

import json
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from contextlib import contextmanager, suppress
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ALGOS, CLASSES, PATIENCE, RECURRENT, Log, build, configuration, dense, make_task, prefers, stepper, unrolled

import lbp
from lbp import ranks, registry
from lbp.datasets.data import Arrays, Data, Split
from lbp.datasets.task import MASKED
from lbp.errors import ConfigError
from lbp.training import environment, loop
from lbp.training.setup import Experiment, build as build_experiment

TIMING = {"samples_per_s", "wall_s", "train_s", "metrics_share", "peak_memory_mb", "world_size"}


# ---- the same numbers: what is trained, in each process alike

def vectors(n=24, features=6, targets=None, tests=1025):
    """With 1025 test rows the last pass of 512 a rank has one row, and other ranks none."""
    g = torch.Generator().manual_seed(1)
    x, test = (torch.randn(rows, features, generator=g, dtype=torch.float64) for rows in (n, tests))
    if targets:
        return Arrays(x, x[:, :targets].sin(), test, test[:, :targets].sin(), "vector")
    return Arrays(x, torch.arange(n) % CLASSES, test, torch.arange(tests) % CLASSES, "vector", [str(c) for c in range(CLASSES)])


def mlp(algo, data=None, **knobs):
    knobs = {"arch__widths": [9, 8], "metrics__every": 1, "trainer__precision": "fp64", "trainer__epochs": 2, **knobs}
    return lambda: build_experiment(configuration(algo, **knobs), data or vectors())


def cnn(algo, **knobs):
    g = torch.Generator().manual_seed(2)
    x, y = torch.randn(24, 2, 8, 8, generator=g), torch.arange(24) % CLASSES
    data = Arrays(x, y, x[:7], y[:7], "image", [str(c) for c in range(CLASSES)])
    return lambda: build_experiment(configuration(algo, "cnn", arch__widths=[3, 4], arch__dense=[6], metrics__every=1,
                                                  trainer__precision="fp64", **knobs), data)


def masked(algo):
    """Sequences of labels, most of them masked: in the first batch all those of the second rank."""
    def made():
        values = configuration(algo, metrics__every=1, trainer__epochs=2)
        torch.manual_seed(3)
        network, task = unrolled((6, 7, 8), steps=5, each=True) if algo in RECURRENT else dense((6, 7, 8)), make_task((5, 6), sequence=algo in RECURRENT)
        network = type(network)(dict(network.blocks), (5, 6)).double()
        x, y = torch.randn(16, 5, 6, dtype=torch.float64), torch.randint(CLASSES, (16, 5))
        y[torch.rand(16, 5) < .4] = MASKED
        train = Split(x, y, batch_size=8)
        y[train.order(0)[4:8]] = MASKED
        rule = build(algo, network, task)
        data = Data("sequences", task, train, None, Split(x, y, batch_size=8), [str(c) for c in range(CLASSES)], "none")
        return Experiment(values, environment.prepare(values["trainer"], 0), data, network, rule, stepper(rule))
    return made


def with_nan(made):
    """One sample that is not a number: one rank's."""
    def spoiled():
        experiment = made()
        experiment.data.train.x[experiment.data.train.order(0)[5]] = math.nan
        return experiment
    return spoiled


DOUBLE = {"dzorb": {"algo__precision": "fp64"}}     # products in fp32 are rounded otherwise where the parts are others
PAIR = {
    # batch norms see each rank's own rows: without them where a rule prefers them
    **{algo: mlp(algo, **{"arch__norm": "none"} if prefers(algo).get("arch.norm") == "batch" else {}, **DOUBLE.get(algo, {}))
       for algo in ALGOS if algo not in RECURRENT},
    **{algo: cnn(algo, arch__width=6) for algo in RECURRENT},
    **{f"{algo} cnn": cnn(algo, **DOUBLE.get(algo, {})) for algo in ("bp", "ldrl", "local", "forward_forward", "elm", "zorb", "dzorb")},
    **{f"{algo} regression": mlp(algo, vectors(targets=2), arch__activation="tanh", **DOUBLE.get(algo, {}))
       for algo in ("bp", "dfa", "ldrl", "elm", "zorb", "dzorb")},
    **{f"{algo} masked": masked(algo) for algo in ("bp", "dfa", "tbptt_dni")},
    **{f"{algo} odd": mlp(algo, trainer__batch_size=7) for algo in ("bp", "local", "ldrl", "forward_forward")},
    **{f"{algo} nan": with_nan(mlp(algo, trainer__on_nonfinite="skip")) for algo in ("bp", "kp", "local", "forward_forward", "ldrl")},
    "small": mlp("dfa", vectors(5)),
    "clip": mlp("fa", trainer__clip=.05, optimizer="sgd"),
    "streaming": mlp("local", algo__schedule="streaming"),
    "means": mlp("fa", metrics__batches=2, metrics__test=True, trainer__shuffle=False, optimizer__bias_lr_factor=2.0),
    "feedback steps": mlp("ldrl", algo__feedback_steps=3, algo__feedback_epochs=1),
    "early": mlp("bp", dataset__val_size=8, trainer__epochs=60, trainer__patience=2, optimizer__lr=.1),
    "zorb by QR": mlp("zorb", algo__solver="qr"), "zorb by samples": mlp("zorb", dataset__loss="cross_entropy", arch__activation="tanh"),
    "elm parts": mlp("elm", vectors(8193)),  # of 4096 a rank: the last part has one row
}
TRIPLE = {f"{name} of three": case for name, case in {
    "dfa": mlp("dfa"), "forward_forward": mlp("forward_forward"), "kp": mlp("kp"), "elm": mlp("elm"),
    "ldrl": cnn("ldrl"), "seven": mlp("ldrl", trainer__batch_size=7)}.items()}


def statistics():
    """Weights that do not move, and the network as it began; every mean below is then known."""
    experiment = mlp("bp", arch__norm="batch", optimizer="sgd", optimizer__lr=0.0, trainer__epochs=3)()
    return experiment, deepcopy(experiment.network)


def outcome(experiment, folder):
    log = Log()
    summary = loop.train(experiment, log, folder)
    return {"state": dict(experiment.rule.state_dict()), "log": list(log), "summary": summary}


def as_a_rank(folder: Path) -> None:
    """What each process does. None leaves a group to join another: gloo was seen to hang in the second one."""
    number, world, found = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), {}
    own = folder / f"{world}{number}"
    ranks.join(PATIENCE, False)
    for name, case in (PAIR if world == 2 else TRIPLE).items():
        found[name] = outcome(case(), own)
    if world == 2:
        experiment, _ = statistics()
        found["statistics"] = outcome(experiment, own)
        minutes = 1e-3 if number else None  # one rank's clock alone
        found["minutes"] = outcome(mlp("bp", trainer__max_minutes=minutes, trainer__epochs=10**6, metrics__every=0)(), own)
        found["refused"] = ""
        try:
            mlp("bp", trainer__batch_size=1)()
        except ConfigError as error:
            found["refused"] = str(error)
    torch.save(found, folder / f"{world}{number}.pt")
    ranks.leave()


if __name__ == "__main__":
    try:
        as_a_rank(Path(sys.argv[1]))
    except BaseException:
        traceback.print_exc()
        os._exit(1)  # a group that lost a member hangs in its destructor


def free_port():
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="session")
def together(tmp_path_factory):
    """What each of the ranks found."""
    folder = tmp_path_factory.mktemp("together")
    stores = {world: torch.distributed.TCPStore("localhost", 0, is_master=True, wait_for_workers=False) for world in (2, 3)}
    common = os.environ | {"MASTER_ADDR": "localhost", "OMP_NUM_THREADS": "1", "TORCHELASTIC_USE_AGENT_STORE": "True",
                           "TORCHELASTIC_RESTART_COUNT": "0"}
    processes = [subprocess.Popen(
        [sys.executable, __file__, str(folder)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=common | {"RANK": str(r), "LOCAL_RANK": str(r), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world),
                      "MASTER_PORT": str(store.port)}) for world, store in stores.items() for r in range(world)]
    try:
        told = [p.communicate(timeout=2 * PATIENCE)[0] for p in processes]    # every rule there is
    finally:
        for p in processes:
            p.kill()
    assert not any(p.returncode for p in processes), "\n".join(told)
    return [torch.load(folder / name, weights_only=False) for name in ("20.pt", "21.pt", "30.pt", "31.pt", "32.pt")]


def assert_alike(found, expected, path="", tolerance=1e-6):
    """Every number, whatever it lies in, but for times; texts to the letter."""
    if isinstance(expected, dict):
        assert set(found) == set(expected), path
        for key in expected:
            if key not in TIMING:
                # an angle near zero is known to the square root of what the lengths are known to
                assert_alike(found[key], expected[key], f"{path}.{key}", max(tolerance, 1e-5) if key.endswith("_deg") else tolerance)
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected), path
        for i, (a, b) in enumerate(zip(found, expected)):
            assert_alike(a, b, f"{path}[{i}]", tolerance)
    elif isinstance(expected, torch.Tensor):
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance, equal_nan=True, msg=lambda m: f"{path}: {m}")
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=tolerance, abs=tolerance, nan_ok=True), path
    else:
        assert found == expected, path


def coupled(name):
    option = name.split()[0]
    return option in ALGOS and registry.entry("algo", registry.option("algo", option).name).facts.get("batch_coupled") is True


@pytest.mark.parametrize("name", [*PAIR, *TRIPLE])
def test_ranks_train_what_one_trains(name, together, tmp_path):
    """Weights and every number of metrics.jsonl, in float64."""
    mine = [found[name] for found in together if name in found]
    for other in mine[1:]:
        assert_alike(other["state"], mine[0]["state"], "ranks differ", 0)
    if coupled(name):
        pytest.skip("its facts say that the batch is coupled")
    alone = outcome((PAIR | TRIPLE)[name](), tmp_path)
    # Beside its share of the samples each rank runs the targets of all classes, or solves each layer.
    if name.split()[0] in ("sigprop", "ccl", "zorb", "dzorb", "ml_elm"):
        assert mine[0]["summary"].pop("flops_per_sample") > alone["summary"].pop("flops_per_sample")
    assert_alike(mine[0], alone, name)


def test_statistics_of_norms_are_the_mean_over_ranks(together):
    experiment, network = statistics()
    names = [name for name, buffer in network.named_buffers() if buffer.is_floating_point()]
    assert names
    split = experiment.data.train
    for epoch in range(3):
        order = split.order(epoch)
        for start in range(0, 24, 8):
            parts = []
            for rows in (order[start:start + 4], order[start + 4:start + 8]):
                part = deepcopy(network).train()
                part(split.x[rows])
                parts.append(dict(part.named_buffers()))
            for name, buffer in network.named_buffers():
                buffer.copy_((parts[0][name] + parts[1][name]) / 2 if name in names else parts[0][name])
    for found in together[:2]:
        for name, buffer in network.named_buffers():
            torch.testing.assert_close(found["statistics"]["state"][f"network.{name}"], buffer, rtol=1e-12, atol=1e-12)


def test_early_stopping_and_the_end_of_time_are_agreed_on(together):
    for name in ("early", "minutes"):
        first, second = ({key: found[name]["summary"][key] for key in ("steps", "epochs", "test_loss")} for found in together[:2])
        assert first == second and first["steps"] > 0
    assert together[0]["early"]["summary"]["epochs"] < 60


def test_a_batch_with_fewer_samples_than_ranks_is_refused(together):
    assert all("launch.ranks=2" in found["refused"] and "trainer.batch_size" in found["refused"] for found in together[:2])


# ---- whole runs

TRICKY = """
import json, os, sys, time
from pathlib import Path
from lbp import ranks
from lbp.algos.baseline.bp import BP
from lbp.algos.rule import Facts

class Tricky(BP):
    \"""Backpropagation that does what TRICK says: "HOW RANK STEP".\"""
    facts = Facts(family="test", paper="none", weight_transport=True, backward_locked=True, update_locked=True)
    steps = 0

    def learn(self, x, y, apply):
        self.steps += 1
        how, rank, step = os.environ.get("TRICK", "none 0 0").split()
        if int(rank) in (ranks.rank(), 9) and self.steps >= int(step):
            (Path(os.environ["SEEN"]) / f"pid{ranks.rank()}").write_text(str(os.getpid()))
            if how == "raise":
                raise ValueError("this rank's own trouble")
            if how == "exit":
                os._exit(9)
            if how in ("hang", "slow"):
                time.sleep(.1 if how == "slow" else 1000)
        return super().learn(x, y, apply)

    def predict(self, x):
        modules = [name for name in sys.modules if name.split(".")[0] in ("hydra", "omegaconf")]
        (Path(os.environ["SEEN"]) / f"modules{ranks.rank()}").write_text(json.dumps(modules))
        return super().predict(x)
"""
RUN = ("plugins=[rankplug]", "algo=tricky", "dataset=files", "dataset.file=made.npz", "arch.widths=[16,12]", "arch.norm=batch",
       "arch.dropout=0.1", "trainer.epochs=3", "trainer.batch_size=33", "metrics.every=7")
TWO = ("launch.ranks=2", "logger.console=off")
LBP = (sys.executable, "-m", "lbp")
TORCHRUN = (sys.executable, "-m", "torch.distributed.run")


@pytest.fixture(scope="session")
def plugin(tmp_path_factory):
    place = tmp_path_factory.mktemp("plugin")
    for path, content in {"__init__.py": "", "algos/tricky.py": TRICKY, "conf/algo/tricky.yaml": "# tricks\nname: tricky\n"}.items():
        (place / "rankplug" / path).parent.mkdir(parents=True, exist_ok=True)
        (place / "rankplug" / path).write_text(content)
    return place


@pytest.fixture
def here(plugin, tmp_path, monkeypatch):
    """A working directory, where the plugin is found and tells what it saw."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(plugin))
    for key, value in {"PYTHONPATH": f"{plugin}{os.pathsep}{os.environ['PYTHONPATH']}", "SEEN": str(tmp_path),
                       "WANDB_MODE": "offline", "OMP_NUM_THREADS": "1"}.items():
        monkeypatch.setenv(key, value)
    g = np.random.default_rng(0)
    np.savez("made.npz", x=g.normal(size=(460, 8)), y=np.arange(460) % 5)
    yield tmp_path
    registry.use(())


@contextmanager
def within(seconds):
    """Ends a test that hangs in this process."""
    def enough(*_):
        raise TimeoutError(f"not over after {seconds} s")

    before = signal.signal(signal.SIGALRM, enough)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    began = time.monotonic()
    try:
        yield lambda: time.monotonic() - began
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def command(*words):
    """Exit code of a command, in this process: its ranks are others."""
    from lbp.cli import main

    with within(PATIENCE):
        return main(list(words))


def of_a_run(folder):
    """Processes that train the run: ranks of our launcher or of torchrun."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            words = (process / "cmdline").read_bytes()
            if b"lbp" in words and os.fsencode(folder) in words and int(process.name) != os.getpid():
                found.append(int(process.name))
    return found


def waited(condition):
    end = time.monotonic() + PATIENCE
    while not (found := condition()):
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(.05)
    return found


def status(folder):
    return (Path(folder) / "STATUS").read_text().strip()


def checkpoint(folder):
    return torch.load(Path(folder) / "checkpoints/last.pt", weights_only=True)


def lines(folder):
    records = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in record.items() if key not in TIMING} for record in records]


@contextmanager
def begun(command, **environment):
    process = subprocess.Popen(command, env=os.environ | environment, start_new_session=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate(timeout=PATIENCE)


def started(*words, **environment):
    return begun([*LBP, "train", *RUN, *TWO, *words], **environment)


def test_a_run_is_one_and_resumes_as_if_it_had_not_stopped(here, monkeypatch, capfd):
    with within(PATIENCE):
        whole = lbp.run(*RUN, *TWO, "run.dir=whole", "logger.wandb.mode=offline")
    assert whole.summary["world_size"] == 2 and status("whole") == whole.summary["status"] == "done"
    assert [p.name for p in here.iterdir() if p.is_dir()] == ["whole"] and whole.summary["steps"] == 30
    assert len(list(Path("whole").rglob("*.wandb"))) == 1 and len(list(Path("whole").rglob("*.jsonl"))) == 1
    assert len({(r["split"], r["step"]) for r in lines("whole")}) == len(lines("whole"))
    for name, tensor in checkpoint("whole")["rule"].items():
        assert torch.equal(whole.rule.state_dict()[name], tensor)
    assert whole.network is whole.rule.network and not of_a_run(here)
    for rank in range(2):
        assert json.loads((here / f"modules{rank}").read_text()) == []

    monkeypatch.setenv("TRICK", "slow 9 14")
    threading.Thread(target=lambda: waited((here / "pid1").exists) and os.kill(os.getpid(), signal.SIGTERM), daemon=True).start()
    assert command("train", *RUN, *TWO, f"run.dir={here / 'parts'}", "logger.wandb.mode=disabled") == 143
    monkeypatch.setenv("TRICK", "none 0 0")
    errors = capfd.readouterr().err
    assert errors.count("\n") == 2 and f"lbp resume {Path('parts').absolute()} goes on" in errors
    assert status("parts") == "interrupted" and not of_a_run(here / "parts")
    assert checkpoint("parts")["state"]["batch"] in range(3, 10) and len(checkpoint("parts")["ranks"]) == 2
    assert command("resume", "parts") == 0
    assert status("parts") == "done" and lines("parts") == lines("whole")
    for name, tensor in checkpoint("whole")["rule"].items():
        assert torch.equal(checkpoint("parts")["rule"][name], tensor)


def test_ctrl_c_of_a_terminal_ends_it_with_a_checkpoint(here):
    with started(f"run.dir={here / 'run'}", TRICK="slow 9 3") as run:
        waited((here / "pid1").exists)
        os.killpg(run.pid, signal.SIGINT)
        _, errors = run.communicate(timeout=PATIENCE)
    assert run.returncode == 130 and "Traceback" not in errors and errors.startswith("lbp: interrupted by Ctrl-C") and errors.count("\n") == 2
    assert status("run") == "interrupted" and checkpoint("run")["state"]["step"] >= 2 and not of_a_run(here / "run")


def test_a_second_ctrl_c_and_a_killed_launcher_leave_nothing(here):
    """Ranks that hang cannot answer; both runs hang at once, to save time."""
    (here / "a").mkdir()
    (here / "b").mkdir()
    with started(f"run.dir={here / 'a/run'}", TRICK="hang 9 1", SEEN=str(here / "a")) as twice, \
            started(f"run.dir={here / 'b/run'}", TRICK="hang 9 1", SEEN=str(here / "b")) as killed:
        waited(lambda: all((here / place / f"pid{rank}").exists() for place in "ab" for rank in range(2)))
        assert len(of_a_run(here / "a/run")) == len(of_a_run(here / "b/run")) == 3
        killed.kill()
        twice.send_signal(signal.SIGINT)
        time.sleep(.5)
        twice.send_signal(signal.SIGINT)
        began = time.monotonic()
        assert twice.wait(PATIENCE) == 130
        waited(lambda: not of_a_run(here / "a/run") and not of_a_run(here / "b/run"))
        assert time.monotonic() - began < 40
    assert status("a/run") == "interrupted"


def test_asked_to_end_while_it_starts(here):
    with started(f"run.dir={here / 'run'}") as run:
        waited((here / "run/config.yaml").exists)
        time.sleep(.5)
        run.terminate()
        _, errors = run.communicate(timeout=PATIENCE)
    assert run.returncode == 143 and "Traceback" not in errors
    assert status("run") == "interrupted"
    waited(lambda: not of_a_run(here / "run"))


@pytest.mark.parametrize("trick, named", [
    ("raise 1 3", "lbp: rank 1: ValueError: this rank's own trouble"),
    ("exit 0 3", "lbp: rank 0: ended with exit code 9"),
    ("slow 1 3", "lbp: rank 1: was killed by signal SIGKILL"),
    ("hang 0 3", "lbp: rank 1: RankLost: rank 0 did not take part in an exchange: it ended, or hung for 8 s (launch.rank_timeout)"),
])
def test_a_rank_that_fails_ends_the_run_with_its_own_error(here, monkeypatch, capfd, trick, named):
    def kill():
        os.kill(int(waited(lambda: (here / "pid1").exists() and (here / "pid1").read_text())), signal.SIGKILL)

    monkeypatch.setenv("TRICK", trick)
    if trick.startswith("slow"):
        threading.Thread(target=kill, daemon=True).start()
    pid = here / f"pid{trick.split()[1]}"
    assert command("train", *RUN, *TWO, "launch.rank_timeout=8", f"run.dir={here / 'run'}", "logger.wandb.mode=disabled") == 1
    assert time.time() - pid.stat().st_mtime < 8 + 60
    errors = capfd.readouterr().err
    assert named in errors and "Traceback" not in errors
    assert [line for line in errors.splitlines() if line.startswith("lbp: rank ")][0].startswith(named[:11])
    assert status("run") == "failed" and not of_a_run(here / "run")
    log = (here / "run/log.txt").read_text()
    assert f"{named[5:11]} {'was killed' if 'slow' in trick else 'ended with exit code'}" in log
    assert not trick.startswith("raise") or "ValueError: this rank's own trouble" in log


def test_what_ranks_refuse_leaves_nothing_and_keeps_its_exit_code(here, capfd):
    quiet = (*TWO, "logger.wandb.mode=disabled", f"run.dir={here / 'run'}")
    assert command("train", "dataset=files", "dataset.file=made.npz", "algo=bp", "optimizer=sgd", "optimizer.lr=1e30", *quiet) == 4
    assert status("run") == "diverged" and "non-finite" in capfd.readouterr().err
    np.savez("bad.npz", x=np.full((30, 4), np.nan), y=np.arange(30) % 2)
    assert command("train", "dataset=files", "dataset.file=bad.npz", *quiet[:-1], "run.dir=other") == 3
    errors = capfd.readouterr().err
    assert "not finite" in errors and errors.count("\n") == 1 and not Path("other").exists()
    assert command("train", "dataset=digits", "trainer.epohs=3", *quiet[:-1], "run.dir=other") == 2
    assert capfd.readouterr().err.count("\n") == 1 and not Path("other").exists()
    assert not of_a_run(here / "run")


def test_arrays_of_this_process_are_refused(here):
    with pytest.raises(ConfigError, match="launch.ranks=2"):
        lbp.run("launch.ranks=2", dataset=(torch.randn(30, 4), torch.arange(30) % 2))
    assert not Path("outputs").exists()


def test_torchrun(here):
    """On two nodes, and with a mistake, both at once."""
    words = ("-m", "lbp", "train", *RUN, f"launch.rank_timeout={PATIENCE:g}", "logger.wandb.mode=offline")
    node = (*TORCHRUN, "--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-id", "two",
            "--rdzv-endpoint", f"localhost:{free_port()}")
    one = (*TORCHRUN, "--standalone", "--nproc-per-node", "2")
    with (begun((*node, *words, "run.dir=run")) as first, begun((*node, *words, "run.dir=run")) as second,
          begun((*one, *words, "trainer.epohs=3", "run.dir=wrong")) as third):
        runs = [first, second, third]
        told = [run.communicate(timeout=PATIENCE) for run in runs]
    assert [bool(run.returncode) for run in runs] == [False, False, True], told
    errors = [line for line in told[2][1].splitlines() if line.startswith("lbp: ")]
    assert len(errors) == 1 and errors[0].startswith("lbp: rank 0: trainer.epohs=3: unknown key")
    assert [p.name for p in here.iterdir() if p.is_dir()] == ["run"] and status("run") == "done"
    assert json.loads((here / "run/summary.json").read_text())["world_size"] == 2
    assert len(list(Path("run").rglob("*.wandb"))) == 1 and len({(r["split"], r["step"]) for r in lines("run")}) == len(lines("run"))
