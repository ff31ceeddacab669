"""Sweeps: several trials at a time, failures that cost their own trial alone, going on, and clusters."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from contextlib import closing
from pathlib import Path

import pytest
from conftest import PATIENCE

import lbp
from lbp import cli
from lbp.config import compose, grid
from lbp.errors import ConfigError
from lbp.launch import slots
from lbp.launch.forks import Forks
from lbp.launch.slots import Job
from lbp.launch.sweep import Trial, identity, record, resume, sweep, trial_names

ROOT = Path(lbp.__file__).parents[1]
begin = Forks.begin
QUICK = ("dataset=digits", "arch.widths=[16]", "trainer.epochs=1", "logger.wandb.mode=disabled", "trainer.device=cpu")


pytestmark = pytest.mark.usefixtures("elsewhere")


# ---- with a stand-in for python that takes the trial's overrides

@pytest.fixture
def trial(tmp_path, monkeypatch):
    stub = tmp_path / "python"
    stub.write_text("#!/bin/sh\n"
                    "[ $2 = lbp ] || exit 1\n"     # no forks of it: each trial is started anew
                    "echo \"args $*\"\n"
                    "echo \"threads $LBP_THREADS gpus $CUDA_VISIBLE_DEVICES\"\n"
                    "case \"$*\" in *seed=1*) echo broken >&2; exit 4;; *seed=2*) kill -9 $$;; *seed=3*)\n"
                    "  trap 'echo checkpoint; exit 130' INT; trap 'echo checkpoint; exit 143' TERM; echo ready; sleep 99 & wait;; esac\n")
    stub.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(stub))
    return stub


def swept(*words, **more):
    return sweep(grid(list(words)), **more)


def test_a_sweep_goes_on_after_failures(trial, capsys, tmp_path):
    assert swept("seed=0,1,2,4", "algo=bp") == 1
    out, err = capsys.readouterr()
    folder, = (tmp_path / "outputs").glob("*/*-sweep-*")
    assert [f.name for f in sorted(folder.glob("*.log"))] == [f"{i}-seed-{s}.log" for i, s in ((1, 0), (2, 1), (3, 2), (4, 4))]
    assert "broken" in (folder / "2-seed-1.log").read_text() and "broken" in out
    assert f"run.dir='{folder.relative_to(tmp_path)}/4-seed-4'" in (folder / "4-seed-4.log").read_text()
    assert "2-seed-1 failed (exit code 4)" in err and "3-seed-2 was killed by signal 9" in err and "2-seed-1.log" in err
    assert "2 of 4 trials done" in out
    assert swept("seed=0,4") == 0


def test_a_sweeps_folder_is_its_own(trial, tmp_path):
    assert swept("seed=0,4", "run.dir='a b/c'") == 0
    assert (tmp_path / "a b/c/1-seed-0.log").exists()
    (tmp_path / "run").mkdir()
    with pytest.raises(ConfigError, match="exists already"):
        swept("run.dir=run")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be made"):
        swept("run.dir=file/x")
    assert swept("run.name='../../up and away'") == 0
    assert [f.name for f in tmp_path.parent.iterdir() if f.name.startswith("up")] == []
    assert len(list(tmp_path.glob("outputs/*/*-sweep-up-and-away-*"))) == 1


def test_names_of_trials():
    trials = [[f"arch.widths=[{w}]", "algo=bp", f"run.name='../{w}'"] for w in range(10)]
    assert trial_names(trials)[3] == "04-arch.widths-3-run.name-..-3"
    assert trial_names([["algo=bp"]]) == ["1"] and trial_names([["seed=1"], ["seed=2"]], 9) == ["09-seed-1", "10-seed-2"]
    assert len(trial_names([["run.name=" + "x" * 300], ["run.name=y"]])[0]) < 100


@pytest.mark.parametrize("how, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_stopped_sweep_lets_its_trial_finish(trial, how, code, tmp_path):
    script = f"import sys; sys.executable = {str(trial)!r}\n" \
             "from lbp.config import grid\nfrom lbp.launch.sweep import sweep\nsys.exit(sweep(grid(['seed=3,0'])))"
    with subprocess.Popen([os.path.realpath("/proc/self/exe"), "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                          env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])}) as process:
        seen = ""
        while "ready" not in seen:
            seen = process.stdout.readline()
            assert seen
        time.sleep(0.1)
        process.send_signal(how)
        out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == code, err
    assert "checkpoint" in out and "2 of 2 trials are not done" in err and "seed=0" not in out


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """A trial that makes a run's folder of its own and ends as its seed says; what was called stands in `calls`."""
    stub = tmp_path / "python"
    stub.write_text(textwrap.dedent("""\
        #!/bin/sh
        [ $2 = lbp ] || exit 1      # no forks of it: each trial is started anew
        for word; do case "$word" in run.dir=*) run=${word#run.dir=};; resume) again=1;; esac; last=$word; done
        [ "$again" ] && run=$last; run=$(echo "$run" | tr -d "'")
        echo "$*" >> calls
        mkdir -p "$run/checkpoints" && touch "$run/config.yaml"; echo running > "$run/STATUS"
        case "$run" in
          *seed-1*) kill -SEGV $$;;
          *seed-2*) [ "$again" ] || { touch "$run/checkpoints/last.pt"; exit 1; };;
          *seed-3*) trap '' TERM; while :; do sleep 0.1; done;;
          *seed-4*) (setsid sleep 30 &) ;;
        esac
        echo done > "$run/STATUS"
        """))
    stub.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(stub))
    return lambda: Path("calls").read_text().splitlines() if Path("calls").exists() else []


def test_a_sweep_goes_on_with_what_is_not_done(stand_in, monkeypatch, capsys):
    """One is killed, one ends with a checkpoint, one hangs and does not hear; what left its trial's group does not hold it up."""
    monkeypatch.setattr(slots, "GRACE", 0.5)
    assert swept("algo=bp", "seed=0,1,2,3,4", "launch.slots=3", "launch.timeout=3", "run.dir=s") == 1
    out, err = capsys.readouterr()
    assert len(stand_in()) == 5 and "3 at a time" in out
    for said in ("2-seed-1 was killed by signal 11; its log: s/2-seed-1.log", "3-seed-2 failed (exit code 1)",
                 "4-seed-3 hung: no sign of life for 3 s (launch.timeout)", "lbp resume s "):
        assert said in err
    assert err.index("trial 2/5 2-seed-1 was killed") < err.index("lbp: 2-seed-1 was killed")     # when it happens, and at the end
    assert [Path(f"s/{name}/STATUS").read_text().strip() for name in ("1-seed-0", "2-seed-1", "3-seed-2", "4-seed-3", "5-seed-4")] == \
        ["done", "failed", "failed", "failed", "done"]
    assert cli.main(["resume", "s", "launch.slots=2", "launch.timeout=3"]) == 1
    calls = stand_in()[5:]
    assert len(calls) == 3 and f"-m lbp resume s/3-seed-2" in calls                      # from its checkpoint
    assert sum("run.dir='s/2-seed-1-2'" in call or "run.dir='s/4-seed-3-2'" in call for call in calls) == 2   # nothing is overwritten
    assert "5 trials, 2 at a time: s; 2 are done" in capsys.readouterr().out


def test_the_same_command_into_the_same_folder_does_what_is_missing(stand_in, capsys):
    assert swept("seed=0,5", "algo=bp", "run.dir=s") == 0
    assert swept("seed=0,5,6,6", "algo=bp", "launch.slots=2", "logger.console=plain", "run.dir=s") == 0
    assert len(stand_in()) == 2 + 3      # the logger is of the run; twice the same is one
    assert swept("algo=bp", "seed=5,0,7", "launch.slots=2", "run.dir=s") == 0
    assert [one["name"] for one in record(Path("s"))] == ["1-seed-0", "2-seed-5", "3-seed-0", "4-seed-5", "5-seed-6", "6-seed-7"]
    assert len(stand_in()) == 6 and "3 trials, 2 at a time: s; 2 are done" in capsys.readouterr().out
    Path("base").write_text("algo: fa\n")
    with pytest.raises(ConfigError, match="another --config file"):
        sweep(grid(["seed=1,2", "run.dir=s"], Path("base")), Path("base"))
    assert sweep(grid(["seed=0,5", "run.dir=t"], Path("base")), Path("base")) == 0
    Path("base").unlink()
    Path("t/1-seed-0/STATUS").write_text("interrupted")
    assert cli.main(["resume", "t"]) == 0 and "--config t/base.yaml" in stand_in()[-1]


def test_what_a_sweep_goes_on_with_is_its_own(stand_in, capsys):
    swept("seed=0,5", "run.dir=s")
    assert cli.main(["resume", "s", "seed=3"]) == 2 and "seed=3: a sweep goes on with its own trials" in capsys.readouterr().err
    for words in (["launch.ranks=2"], ["launch=pipeline"]):
        assert cli.main(["resume", "s", *words]) == 2 and f"{words[0]}: makes other runs of its trials" in capsys.readouterr().err
    for i in range(2):
        folder = Path(f"outputs/2026-11-30/17000{i}-sweep-aaaaaa")
        folder.mkdir(parents=True)
        (folder / "sweep.json").touch()
    assert cli.main(["resume", "17"]) == 2 and "several begin so: " in capsys.readouterr().err
    with slots_held("s"):
        assert cli.main(["resume", "s"]) == 2 and "another process" in capsys.readouterr().err
    Path("s/sweep.json").write_text("{")
    assert cli.main(["resume", "s"]) == 3 and "sweep.json" in capsys.readouterr().err


def slots_held(folder):
    from lbp.launch.folder import locked

    return locked(Path(folder))


def test_a_trial_that_outlived_its_sweep_is_waited_for(stand_in):
    swept("seed=0,5", "run.dir=s")
    Path("s/1-seed-0/STATUS").write_text("running")
    script = ("import sys, time\nfrom pathlib import Path\nfrom lbp.launch.folder import locked\n"
              "with locked(Path('s/1-seed-0')):\n print('held', flush=True); time.sleep(1); Path('s/1-seed-0/STATUS').write_text('done')")
    with subprocess.Popen([os.path.realpath("/proc/self/exe"), "-c", script], stdout=subprocess.PIPE, text=True,
                          env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])}) as process:
        assert process.stdout.readline() == "held\n"
        assert resume(Path("s"), ["launch.slots=2"]) == 0
    assert len(stand_in()) == 2


def test_a_slot_has_its_share(trial, monkeypatch, tmp_path):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(9)))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,7")
    assert swept("seed=0,5,6", "launch.slots=2", "run.dir=s") == 0
    said = {(tmp_path / f"s/{i}-seed-{s}.log").read_text().splitlines()[1] for i, s in ((1, 0), (2, 5))}
    assert said == {"threads 4 gpus 4,7", "threads 4 gpus 5"}
    assert [slots._share(slot, 5)["CUDA_VISIBLE_DEVICES"] for slot in range(5)] == ["4", "5", "7", "4", "5"]
    assert slots._share(0, 1) == {}


def test_the_share_is_what_a_run_computes_with(monkeypatch):
    import torch

    from lbp.training.environment import prepare

    before = torch.get_num_threads()
    monkeypatch.setenv("LBP_THREADS", "1")
    torch.set_num_threads(2)
    try:
        prepare(compose([]).values["trainer"] | {"device": "cpu"}, 0)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_identity_is_what_makes_a_run():
    same = [identity(compose(words).values) for words in ([], ["run.dir=x"], ["launch.slots=3", "launch.timeout=9"], ["launch=slurm", "launch.cpus=2"])]
    others = [identity(compose(words).values) for words in (["seed=1"], ["launch.ranks=2"], ["trainer.threads=1"], ["algo=bp"])]
    assert len(set(same)) == 1 and len({same[0], *others}) == 5


def test_what_is_of_a_sweep_is_refused_elsewhere(capsys, tmp_path):
    for word in ("launch.slots=2", "launch.timeout=9", "launch=ray"):
        assert cli.main(["train", *QUICK, word]) == 2
        assert f"{word}: is about the trials of a sweep; add -m" in capsys.readouterr().err
    assert cli.main(["train", "-m", "seed=1,2", "launch.slots=1,2"]) == 2
    assert "launch.slots: is of the whole sweep" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("engine, package", [("ray", "ray"), ("slurm", "submitit")])
def test_a_missing_engine_says_how_to_install_it(engine, package, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("lbp.launch.clusters.find_spec", lambda name: None)
    assert cli.main(["train", "-m", "seed=1,2", f"launch={engine}"]) == 2
    assert f"needs {package}, which is not installed; pip install 'lbp[{engine}]'" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_slurm_without_slurm_is_refused(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert cli.main(["train", "-m", "seed=1,2", "launch=slurm"]) == 2
    assert "has no sbatch" in capsys.readouterr().err


# ---- slots themselves

def test_jobs_are_asked_for_as_slots_become_free(tmp_path):
    asked = []

    def jobs():
        for i in range(5):
            asked.append(i)
            wait = "sleep 0.2" if i else f"until [ -e {tmp_path}/over ]; do sleep 0.05; done"    # the first ends after all others
            yield Job(str(i), ["sh", "-c", f"{wait}; exit {i}"], tmp_path / "log", tmp_path)

    order = []
    for job in slots.run(jobs(), 2):
        order.append(int(job.name))
        assert len(asked) <= len(order) + 2
        assert job.code == order[-1] and job.seconds > 0.2
        if len(order) == 4:
            (tmp_path / "over").touch()
    assert order == [1, 2, 3, 4, 0]


def test_a_job_that_is_watched_ends_when_it_is_said(tmp_path):
    one, = slots.run(iter([Job("a", ["sleep", "300"], tmp_path / "log", tmp_path)]), 1, watch=lambda job: "enough")
    assert one.ended == "enough" and one.code == -signal.SIGTERM and one.seconds < 60


@pytest.mark.parametrize("again", (False, True))
def test_ctrl_c_while_a_result_is_written_down(tmp_path, again):
    """The others are told to end and waited for, with their checkpoints; told twice, they are killed."""
    def script(name, text):
        return Job(name, ["sh", "-c", text], tmp_path / "log", tmp_path)

    meanwhile = f"touch {tmp_path}/told; while {str(again).lower()}; do sleep 0.1; done; touch {tmp_path}/saved"
    slow = script("slow", f"trap '{meanwhile}; exit' TERM; touch {tmp_path}/ready; while :; do sleep 0.1; done")
    quick = script("quick", f"until [ -e {tmp_path}/ready ]; do sleep 0.05; done")
    if again:
        def press():
            while not (tmp_path / "told").exists():
                time.sleep(0.05)
            os.kill(os.getpid(), signal.SIGINT)
        threading.Thread(target=press, daemon=True).start()
    with slots.stoppable() as stopped, closing(slots.run(iter([slow, quick]), 2)) as ended:
        for _ in ended:
            raise KeyboardInterrupt
    assert stopped == [130] and (tmp_path / "told").exists() and (tmp_path / "saved").exists() == (not again)
    assert slow.over() and slow.code == (-signal.SIGKILL if again else 0)


def test_metrics_are_a_sign_of_life(tmp_path):
    script = "for i in 1 2 3 4 5 6 7 8; do sleep 0.5; echo {} >> metrics.jsonl; done"
    one, = slots.run(iter([Job("a", ["sh", "-c", f"cd {tmp_path}; {script}"], tmp_path / "log", tmp_path)]), 1, timeout=3)
    assert one.ended == "" and one.seconds > 3.5


@pytest.fixture
def forks():
    with closing(Forks()) as found:
        yield found


RULE = """
from lbp.algos.baseline.bp import BP
from lbp.algos.rule import Facts
class Told(BP):
    \"\"\"Backprop.\"\"\"
    facts = Facts(family="baseline", paper="none", weight_transport=True, backward_locked=True, update_locked=True, needs_derivative=True)
"""


def plugin(name, rule, config):
    """A package in the current folder that brings an algo of its own name."""
    for folder in ("algos", "conf/algo"):
        Path(name, folder).mkdir(parents=True)
    Path(name, "__init__.py").touch()
    Path(name, f"algos/{name}.py").write_text(rule)
    Path(name, f"conf/algo/{name}.yaml").write_text(config)


def ended(child):
    """(what it has said since, its exit code)"""
    with child.stdout as out:
        text = out.read().decode()
    until = time.monotonic() + PATIENCE
    while (code := child.poll()) is None:
        assert time.monotonic() < until
        time.sleep(0.01)
    return text, code


def test_a_fork_is_as_a_process_started_anew(forks, tmp_path):
    """Its folder, variables, words, streams, exit code and group; and of two none waits for the other."""
    plugin("told", RULE + "import os, sys\nprint(sys.argv[1:], os.getcwd(), os.environ['LBP_THREADS'], os.getpgid(0) == os.getpid(), sys.stdin.read(), flush=True)\n"
                   "if 'torch' in sys.modules: raise RuntimeError('in time')\n", "# Says how it was started\nname: told\n")
    child = forks.begin(["train", "plugins=[told]", "algo=told"], {"LBP_THREADS": "3"})
    other = forks.begin(["--version"], {})
    assert child.pid != other.pid and ended(other) == (f"lbp {lbp.__version__}\n", 0)
    text, code = ended(child)
    said = text.splitlines()
    assert code == 1 and said[0] == f"['train', 'plugins=[told]', 'algo=told'] {tmp_path} 3 True " and "RuntimeError: in time" in said[1]


def test_what_kills_a_fork_or_what_it_is_forked_from(forks):
    plugin("stuck", RULE.replace("Told", "Stuck") + "import time\nprint('here', flush=True)\ntime.sleep(600)\n", "# Does not come to an end\nname: stuck\n")
    one, two = (forks.begin(["train", "plugins=[stuck]", "algo=stuck"], {}) for _ in range(2))
    assert one.stdout.readline() == two.stdout.readline() == b"here\n"
    one.send_signal(signal.SIGKILL)
    assert ended(one) == ("", -signal.SIGKILL) and two.poll() is None
    one.send_signal(signal.SIGKILL)     # to nobody
    forks.server.kill()
    forks.server.wait()
    assert two.poll() == -signal.SIGKILL and ended(two) == ("", -signal.SIGKILL)
    with pytest.raises(OSError):
        forks.begin(["--version"], {})


def test_a_job_starts_anew_where_there_is_nothing_to_fork(tmp_path, monkeypatch):
    def job(name):
        return Job(name, [sys.executable, "-m", "lbp", "--version"], tmp_path / name, tmp_path)

    begun = []
    monkeypatch.setattr(Forks, "begin", lambda self, words, variables: begun.append(words) or self.server.kill() or begin(self, words, variables))
    assert [job.code for job in slots.run(iter([job("a"), job("b")]), 1, fork=True)] == [0, 0] and begun == [["--version"]] * 2
    monkeypatch.setattr(slots, "gpus", lambda: ["0"])
    monkeypatch.setattr(slots, "Forks", None)
    assert [job.code for job in slots.run(iter([job("c")]), 1, fork=True)] == [0]
    monkeypatch.setattr(slots, "gpus", list)
    assert [job.code for job in slots.run(iter([job("d")]), 1, fork=False)] == [0]
    assert len({(tmp_path / name).read_text() for name in "abcd"}) == 1


def test_ctrl_c_while_there_is_nothing_to_fork_yet(tmp_path):
    def enough(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, enough)
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    try:
        with pytest.raises(KeyboardInterrupt):
            list(slots.run(iter([Job("a", [sys.executable, "-m", "lbp", "--version"], tmp_path / "log", tmp_path)]), 1, fork=True))
    finally:
        signal.signal(signal.SIGALRM, before)
    assert not (tmp_path / "log").exists()


# ---- real trials

SABOTAGE = """
import errno, os, signal, time
import torch
from lbp.algos.baseline.bp import BP
from lbp.algos.rule import Facts

class Sabotage(BP):
    \"\"\"Backprop that meets with a fault.\"\"\"
    facts = Facts(family="baseline", paper="none", weight_transport=True, backward_locked=True, update_locked=True, needs_derivative=True)
    def __init__(self, network, task, *, how: str):
        super().__init__(network, task)
        self.how = how
    def learn(self, x, y, apply):
        if self.how == "raise":
            raise RuntimeError("as ordered")
        if self.how == "segfault":
            os.kill(os.getpid(), signal.SIGSEGV)
        if self.how == "hang":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            time.sleep(600)
        if self.how == "memory":
            torch.empty(2 ** 50)
        if self.how == "disk":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/results")
        if self.how == "infinite":
            x = x * float("nan")
        return super().learn(x, y, apply)
"""


def test_six_sabotaged_trials_leave_the_others_untouched(tmp_path, monkeypatch, capsys):
    plugin("sabotage", SABOTAGE, "# Backprop that meets with a fault\nname: sabotage\nhow: none    # none | raise | segfault | hang | memory | disk | infinite; which\n")
    monkeypatch.setattr(slots, "GRACE", 0.5)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(tmp_path)]))
    monkeypatch.syspath_prepend(tmp_path)
    words = ["plugins=[sabotage]", "algo=sabotage", *QUICK]
    assert cli.main(["train", "-m", *words, "algo.how=hang,raise,segfault,memory,disk,infinite,none", "seed=0", "launch.slots=3", "launch.timeout=60",
                     "run.dir=s"]) == 1
    out, err = capsys.readouterr()
    ended = {one["overrides"][2 + len(QUICK)].partition("=")[2]: Trial(Path("s"), one["name"], []) for one in record(Path("s"))}
    for how, said in (("raise", "failed (exit code 1)"), ("segfault", "was killed by signal 11"), ("hang", "hung: no sign of life for 60 s"),
                      ("memory", "failed (exit code 5)"), ("disk", "failed (exit code 5)"), ("infinite", "failed (exit code 4)")):
        assert f"{ended[how].name} {said}" in err and ended[how].log.exists() and str(ended[how].log) in err
        assert (ended[how].run / "STATUS").read_text().strip() == ("diverged" if how == "infinite" else "failed")
    left, = [trial for trial in ended.values() if trial.done]
    alone = lbp.run(*words, "algo.how=none", "seed=0", "trainer.threads=1", "logger.console=off")
    found = json.loads((left.run / "summary.json").read_text())
    assert {key: found[key] for key in ("test_accuracy", "train_loss", "val_loss")} == \
        {key: alone.summary[key] for key in ("test_accuracy", "train_loss", "val_loss")}
    assert "1 of 7 trials done" in out


def test_submitits_local_executor_runs_a_sweep(capsys):
    pytest.importorskip("submitit")
    assert cli.main(["train", "-m", *QUICK, "algo=bp,nonesuch", "launch=slurm"]) == 2
    assert cli.main(["train", "-m", *QUICK, "seed=0,1", "launch=slurm", "launch.cluster=local", "run.dir=s"]) == 0
    assert "2 of 2 trials done" in capsys.readouterr().out
    assert all(Trial(Path("s"), one["name"], []).done for one in record(Path("s")))


def test_a_ray_cluster_runs_a_sweep_and_the_loss_of_a_node_costs_no_result(tmp_path):
    """In processes of their own, as Ray leaves threads and open files behind."""
    pytest.importorskip("ray")
    script = """
        import subprocess, sys, time
        from pathlib import Path
        from ray.cluster_utils import Cluster

        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
        command = [sys.executable, "-m", "lbp", "train", "-m", *sys.argv[1:], "seed=0,1", "launch=ray", f"launch.address={cluster.address}",
                   "trainer.epochs=60", "trainer.checkpoint_every=5", "run.dir=s"]
        with subprocess.Popen(command) as sweep:
            while len(list(Path("s").glob("*/checkpoints/last.pt"))) < 2:
                time.sleep(0.1)
                assert sweep.poll() is None
            cluster.remove_node(nodes[0], allow_graceful=False)
        print("ended", sweep.returncode)
        cluster.shutdown()
        """
    ran = subprocess.run([sys.executable, "-c", textwrap.dedent(script), *QUICK], capture_output=True, text=True, timeout=PATIENCE,
                         env=os.environ | {"PYTHONPATH": str(ROOT), "RAY_DEDUP_LOGS": "0"})
    assert "ended 0" in ran.stdout and "2 of 2 trials done" in ran.stdout, ran.stdout[-3000:] + ran.stderr[-3000:]
    for one in record(Path("s")):
        trial = Trial(Path("s"), one["name"], [])
        assert trial.done
        whole = lbp.run(*QUICK, "trainer.epochs=60", "trainer.checkpoint_every=5", "trainer.threads=1", f"seed={one['overrides'][-3][-1]}", "logger.console=off")
        assert json.loads((trial.run / "summary.json").read_text())["test_loss"] == whole.summary["test_loss"]
