"""Knobs, registry and composition: what a typed command becomes, and what is refused."""

import sys
import textwrap

import pytest
import yaml
from omegaconf import OmegaConf

from lbp import config, knobs, registry
from lbp.config import compose, grid
from lbp.errors import ConfigError

ALL = [(group, name) for group in (*registry.groups(), "experiment") for name in registry.options(group)]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield
    registry.use(())


@pytest.fixture
def package(tmp_path, request):
    """Make a plugin package of files {path: text}; returns its name, another one for every test."""
    def make(files, suffix=""):
        name = "plug_" + "".join(c if c.isalnum() else "_" for c in request.node.name)[:60] + suffix
        for path, text in {"__init__.py": "raise RuntimeError('imported')", **files}.items():
            file = tmp_path / name / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(textwrap.dedent(text), "utf-8")
        return name
    return make


def problems(*overrides, file=None):
    with pytest.raises(ConfigError) as caught:
        compose(list(overrides), file)
    return caught.value.problems


RULE = """
    '''A rule.'''
    class {name}:
        '''What it does.

        More of it.'''
        facts = Facts(family="feedback", paper="Somebody 2020", weight_transport=False, backward_locked=False,
                      update_locked=True, closed_form={closed})
    """


# ---- knobs

@pytest.mark.parametrize("spec, good, bad", [
    ("int >= 0", [0, 5], [-1, 2.5, 2.0, True, "3", None, float("nan")]),
    ("float > 0", [1, 0.5, 1e300], [0, -1.0, float("nan"), float("inf"), "abc", False, None, 10 ** 400]),
    ("float >= 0 < 1", [0, 0.999], [1, -0.1]),
    ("float > 0 <= 1", [1], [0]),
    ("float >= -1e-3", [-0.001], [-0.002]),
    ("bool", [True, False], [0, 1, "true", None]),
    ("str", ["", "a"], [None, [1]]),
    ("int >= 1 | null", [1, None], [0, "null"]),
    ("auto | cpu | cuda", ["auto", "cpu"], ["gpu", None, 1]),
    ("list[int >= 1]", [[], [1, 2]], [[0], 1, ["a"], [1.5]]),
    ("list[int | null]", [[1, None]], [["a"]]),
    ("list[float < 1, float < 1]", [[0.5, 0.9]], [[0.5], [0.5, 2], [0, 0, 0]]),
    ("map", [{}, {"a": {"b": 1}}], [1, []]),
])
def test_a_spec_allows_and_refuses(spec, good, bad):
    for value in good:
        assert knobs.check("k", value, spec) is None, value
    for value in bad:
        assert spec in knobs.check("k", value, spec), value


def test_values_become_what_the_spec_says():
    assert isinstance(knobs.coerce(1, "float"), float) and isinstance(knobs.coerce(1, "int | float"), int)
    assert knobs.coerce(False, "off | seeded") == "off"  # YAML reads off as a bool
    assert knobs.coerce(7, "str", "007") == "007"
    assert knobs.check("trainer.epochs", -1, "int >= 0") == "trainer.epochs=-1: must be int >= 0"
    assert knobs.check("a", "rellu", "relu | tanh").endswith("did you mean relu?")


def test_knob_lines(tmp_path):
    (tmp_path / "_base.yaml").write_text("scale: 1.0   # float > 0; how much\nblocks: {}  # map; by block\nkept: a  # a | b; word\n")
    (tmp_path / "child.yaml").write_text(textwrap.dedent("""\
        # What it is,
        # in two lines
        defaults:
          - _base
          - _self_
        name: thing
        # a remark
        scale: 2.0
        wandb:
          mode: "o # f"   # str; quoted # hash
          deep:
            er: [1, 2]    # list[int]; list
        tail: null  # int | null; last
        blocks:     # map; by block
          head: {name: elm}
        after: 3    # int; after a block default
        prefers: {optimizer: sgd, optimizer.betas: [0.5, 0.9]}
        """))
    option = knobs.read(tmp_path / "child.yaml")
    assert option.doc == "What it is, in two lines" and option.name == "thing"
    assert option.prefers == {"optimizer": "sgd", "optimizer.betas": "[0.5, 0.9]"}
    assert list(option.knobs) == ["scale", "blocks", "kept", "wandb.mode", "wandb.deep.er", "tail", "after"]
    assert option.knobs["scale"] == ("2.0", "float > 0", "how much")  # only the default is new
    assert option.knobs["wandb.mode"] == ('"o # f"', "str", "quoted # hash")


@pytest.mark.parametrize("group, name", ALL, ids="=".join)
def test_every_option_composes_and_documents_its_knobs(group, name):
    config_ = compose([f"{group}={name}"])
    option = registry.option(group, name)
    assert option.doc, f"{option.path} does not begin with a line that says what it is"
    if group == "experiment":
        return
    known = {f"{group}.{k}" for k in option.knobs}
    assert {k for k, _ in config._flat({group: config_.values[group]}, known)} - {f"{group}.name"} == known
    assert all(knob.spec and knob.doc for knob in option.knobs.values())
    assert (group, name) in config_.options.items()


# ---- registry

def test_registered_is_what_the_source_says(package):
    name = package({
        "algos/own/my_rule.py": RULE.format(name="MyRule", closed=False),
        "algos/own/helper.py": "class Other: facts = Facts()",          # not called like its file
        "algos/own/base.py": "class Base: pass",                        # no facts
        "algos/own/computed.py": "class Computed: facts = Facts(family=1 + x)",
        "algos/own/broken.py": "class Broken: facts = Facts(",
        "archs/wide_net.py": "def wide_net(task) -> 'Network': ...",
        "archs/tools.py": "def tools(): ...",
        "datasets/toy.py": "def toy() -> data.Arrays:\n    'Toys.'",
    })
    registry.use([name])
    assert {"my_rule", "wide_net", "toy"} <= {n for kind in registry.FOLDERS for n in registry.names(kind)}
    assert not {"helper", "base", "computed", "broken"} & set(registry.names("algo"))
    assert "tools" not in registry.names("arch")
    entry = registry.entry("algo", "my_rule")
    assert (entry.module, entry.attr) == (f"{name}.algos.own.my_rule", "MyRule")
    assert entry.doc.startswith("What it does.") and entry.facts["family"] == "feedback"
    assert entry.facts["needs_derivative"] is True  # the default of Facts
    assert name not in sys.modules
    with pytest.raises(ConfigError, match="did you mean my_rule"):
        registry.entry("algo", "my_rul")
    for broken in ("computed", "broken"):
        with pytest.raises(ConfigError, match=f"{broken}.py"):
            registry.entry("algo", broken)


def test_a_clash_names_both_files(package):
    files = {"algos/twice.py": RULE.format(name="Twice", closed=False), "conf/algo/twice.yaml": "# Twice\nname: twice\n"}
    one, two = package(files, "_a"), package(files, "_b")
    registry.use([one, two])
    with pytest.raises(ConfigError, match=f"(?s){one}.*{two}"):
        registry.entry("algo", "twice")
    assert one in problems(f"plugins=[{one},{two}]", "algo=twice")[0]


@pytest.mark.parametrize("source, said", [
    ("import no_such_package_xyz", "needs the package 'no_such_package_xyz'"),
    ("from json import no_such_name", "broken or does not match"),
    ("import re; re.compile('(')", None),  # neither import nor runtime error: a bug, left alone
])
def test_a_missing_or_broken_package_is_named(package, source, said):
    name = package({"__init__.py": "", "algos/__init__.py": "", "algos/needy.py": source + "\n" + textwrap.dedent(
        RULE.format(name="Needy", closed=False))})
    registry.use([name])
    if said is None:
        with pytest.raises(Exception, match="unterminated"):
            registry.load("algo", "needy")
    else:
        with pytest.raises(ConfigError, match=said):
            registry.load("algo", "needy")


def test_plugins_by_entry_point(package, tmp_path, monkeypatch):
    name = package({"algos/entered.py": RULE.format(name="Entered", closed=False),
                    "conf/algo/entered.yaml": "# Came in by itself\nname: entered\n"})
    info = tmp_path / "plug-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: plug\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[lbp.plugins]\nplug = {name}\ngone = no_such_package_xyz\n")
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    assert "entered" in registry.names("algo")
    assert compose(["algo=entered"]).options["algo"] == "entered"
    assert name not in sys.modules


# ---- composition

def test_defaults():
    got = compose([])
    assert got.options == {"dataset": "mnist5k", "arch": "mlp", "algo": "dfa", "optimizer": "adam", "schedule": "constant",
                           "trainer": "default", "metrics": "default", "logger": "default", "launch": "default"}
    values = got.values
    assert values["arch"]["widths"] == [256, 256] and values["arch"]["activation"] == "relu"
    assert values["optimizer"] == {"name": "adam", "lr": 1e-3, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.0,
                                   "bias_lr_factor": 1.0, "feedback": {}, "heads": {}}
    assert values["trainer"]["batch_size"] == 128 and values["seed"] == 0
    assert all(values[group]["name"] for group in got.options)
    assert "prefers" not in values["algo"] and "${" not in got.yaml()


def test_the_data_folder_comes_from_the_environment(monkeypatch):
    config._composed.cache_clear()
    monkeypatch.setenv("LBP_DATA", "/somewhere/else")
    assert compose([]).values["dataset"]["root"] == "/somewhere/else"
    config._composed.cache_clear()


def test_typed_values():
    values = compose(["optimizer.lr=1e-3", "+trainer.epochs=2", "++trainer.clip=1", "run.name=007", "arch.widths=[8]",
                      "optimizer.feedback.lr=0.5", "optimizer.heads={lr: 1}", "trainer.determinism=off",
                      "logger={console: off, wandb: {mode: disabled}}", "dataset={name: iris, train_size: 9}"]).values
    assert values["optimizer"]["lr"] == 0.001 and values["trainer"]["epochs"] == 2
    assert values["trainer"]["clip"] == 1.0 and values["run"]["name"] == "007" and values["arch"]["widths"] == [8]
    assert values["optimizer"]["feedback"] == {"lr": 0.5} and values["optimizer"]["heads"] == {"lr": 1.0}
    assert values["trainer"]["determinism"] == "off" and values["logger"]["console"] == "off"
    assert values["logger"]["wandb"] == {"mode": "disabled", "project": "lbp"}
    assert values["dataset"]["train_size"] == 9 and values["dataset"]["table"] == "iris"


def test_a_preset_is_its_parent_but_for_what_it_says():
    default, smoke = compose([]).values["trainer"], compose(["trainer=smoke"]).values["trainer"]
    assert smoke == default | {"epochs": 1, "name": "smoke"}


@pytest.mark.parametrize("typed", [
    [], ["algo=kp"], ["trainer=smoke", "optimizer=sgd", "optimizer.feedback.lr=1", "schedule=multistep"],
    ["run.name=a b", "run.dir=x/y", "dataset=iris", "seed=3"], ["algo=elm"], ["trainer.determinism=off", "logger.console=off"],
])
@pytest.mark.parametrize("dump", [lambda c: c.yaml(), lambda c: yaml.safe_dump(c.values, sort_keys=False)], ids=["own", "yaml"])
def test_a_resolved_configuration_comes_back_the_same(tmp_path, typed, dump):
    first = compose(typed)
    (tmp_path / "config.yaml").write_text(dump(first), "utf-8")
    again = compose([], tmp_path / "config.yaml")
    assert again.values == first.values and again.chosen == []
    assert OmegaConf.to_container(OmegaConf.load(tmp_path / "config.yaml")) == first.values


def test_numbers_as_names_come_back_the_same(tmp_path):
    first = compose(["run.name=1e-3"])
    (tmp_path / "config.yaml").write_text(first.yaml())
    assert compose([], tmp_path / "config.yaml").values["run"]["name"] == "1e-3"


# ---- who wins

@pytest.fixture
def layered(package):
    """A rule `own` that prefers sgd, an experiment `exp`, and the plugins= that brings them."""
    return "plugins=[" + package({
        "algos/own.py": RULE.format(name="Own", closed=False),
        "algos/solver.py": RULE.format(name="Solver", closed=True),
        "conf/algo/own.yaml": """\
            # Own rule
            name: own
            knob: 1   # int; a knob
            blocks: {}   # map; rules by block
            prefers: {optimizer: sgd, optimizer.lr: 0.02, trainer.epochs: 7, dataset.loss: mse}
            """,
        "conf/algo/own_big.yaml": "# Own, bigger\ndefaults: [own, _self_]\nknob: 100\n",
        "conf/algo/solver.yaml": "# Solves\nname: solver\n",
        "conf/experiment/exp.yaml": """\
            # An experiment
            algo: {name: own, knob: 2}
            optimizer.lr: 0.3
            trainer: {batch_size: 10}
            """,
        "conf/experiment/bad.yaml": "# Bad\nalgo: dfaa\ntrainer.epoch: 3\nplugins: [x]\n",
    }) + "]"


def test_preferences_apply_until_something_stronger_speaks(layered):
    got = compose([layered, "algo=own"])
    assert got.options["optimizer"] == "sgd" and got.values["optimizer"]["lr"] == 0.02
    assert got.values["trainer"]["epochs"] == 7 and got.values["dataset"]["loss"] == "mse"
    assert ("optimizer", "sgd", "algo=own") in got.chosen and ("optimizer.lr", 0.02, "algo=own") in got.chosen
    typed = compose([layered, "algo=own", "optimizer.lr=5", "dataset=iris"])
    assert typed.values["optimizer"]["lr"] == 5 and typed.options["optimizer"] == "sgd"
    assert typed.values["dataset"]["loss"] == "mse"  # what a rule needs of its data holds for any data
    assert "optimizer.lr" not in [key for key, *_ in typed.chosen]
    other = compose([layered, "algo=own", "optimizer=adam", "trainer=smoke"])
    assert other.options["optimizer"] == "adam" and other.values["optimizer"]["lr"] == 0.001
    assert other.values["trainer"]["epochs"] == 1
    preset = compose([layered, "algo=own_big"])
    assert preset.values["algo"]["name"] == "own" and preset.values["algo"]["knob"] == 100
    assert preset.options["optimizer"] == "sgd"  # inherited


def test_typed_beats_file_beats_experiment_beats_preference(layered, tmp_path):
    file = tmp_path / "f.yaml"
    file.write_text("optimizer.lr: 0.4\nalgo.knob: 3\n")
    got = compose([layered, "experiment=exp"])
    assert (got.values["optimizer"]["lr"], got.values["algo"]["knob"], got.values["trainer"]["batch_size"]) == (0.3, 2, 10)
    assert got.options["optimizer"] == "sgd" and got.values["trainer"]["epochs"] == 7
    got = compose([layered, "experiment=exp"], file)
    assert (got.values["optimizer"]["lr"], got.values["algo"]["knob"]) == (0.4, 3)
    got = compose([layered, "experiment=exp", "algo.knob=4"], file)
    assert (got.values["optimizer"]["lr"], got.values["algo"]["knob"]) == (0.4, 4)
    file.write_text("experiment: exp\n")
    assert compose([layered], file).values["algo"]["knob"] == 2


def test_another_option_drops_what_weaker_sources_said_of_the_old(layered):
    got = compose([layered, "experiment=exp", "algo=bp", "optimizer=rmsprop"])
    assert got.options["algo"] == "bp" and got.values["optimizer"]["lr"] == 0.001
    assert {key for key, *_ in got.dropped} == {"algo.knob", "optimizer.lr"}
    same = compose([layered, "experiment=exp", "algo=own"])
    assert same.values["algo"]["knob"] == 2 and same.dropped == []


def test_a_map_may_name_the_class_instead_of_the_option(layered, tmp_path):
    (tmp_path / "f.yaml").write_text("algo:\n  name: own\n  knob: 9\narch: {name: resnet}\n")
    got = compose([layered], tmp_path / "f.yaml")
    assert got.options["algo"] == "own" and got.values["algo"]["knob"] == 9
    assert got.values["arch"]["name"] == "resnet"


def test_open_maps_take_any_key(layered):
    got = compose([layered, "algo=own", "algo.blocks.head={name: elm, ridge: 1e-3}", "+algo.blocks.fc1=bp"])
    assert got.values["algo"]["blocks"] == {"head": {"name": "elm", "ridge": 0.001}, "fc1": "bp"}


def test_experiments_are_validated_with_their_source(layered):
    found = problems(layered, "experiment=bad")
    assert len(found) == 3 and all("experiment=bad" in problem for problem in found)
    assert "did you mean exp?" in problems(layered, "experiment=ex")[0]


@pytest.mark.parametrize("typed", ["optimizer.lr=1", "optimizer=sgd", "schedule=cosine", "trainer.epochs=3",
                                   "schedule.warmup_epochs=1", "optimizer={lr: 1}", "trainer.shuffle=false", "trainer.precision=bf16"])
def test_what_a_solver_would_ignore_is_refused(layered, typed):
    assert "closed form" in problems(layered, "algo=solver", typed)[0]


@pytest.mark.parametrize("typed, said", [
    (["algo=cdni", "algo.norm=batch"], "algo.norm=batch: algo.synthesizer=linear would ignore it; set algo.synthesizer=mlp or conv"),
    (["algo=dni", "algo.synthesizer=mlp", "algo.kernel=3"], "set algo.synthesizer=conv, or leave it out"),
    (["algo=tbptt", "algo.hidden=7"], "algo.synthesizer=none would ignore it; set algo.synthesizer=mlp or recurrent"),
    (["algo=zorb", "algo.solver=exact", "algo.precision=fp32"], "set algo.solver=auto or gram"),
    (["algo=zorb", "dataset=digits", "dataset.augment=[flip]"], "solves in closed form"),
    (["algo=genetic", "optimizer.lr=0.5"], "has nothing that an optimizer steps"), (["algo=genetic", "schedule=cosine"], "has nothing that"),
    (["logger.wandb.project='a/b'"], "logger.wandb.project=a/b: must have no /")])
def test_what_another_knobs_value_makes_useless_is_refused(typed, said):
    found, = problems(*typed)
    assert said in found


def test_what_is_of_use_or_as_it_stands_is_not_refused():
    for typed in (["algo=dni", "algo.synthesizer=mlp", "algo.norm=batch"], ["algo=dni", "algo.norm=none", "algo.hidden=[256]"]):
        assert compose(typed).values["algo"]["name"] == "dni"
    assert "needs" not in compose(["algo=dni"]).values["algo"]


# ---- wrong

WRONG = [  # typed, what the message has
    ("algo=dfaa", "did you mean dfa?"), ("dataset=mnits", "did you mean mnist"), ("optimizer=adm", "did you mean adam"),
    ("algo=", "there are: "), ("schedule=null", "there are: "), ("algo=[bp]", "no such algo"),
    ("algo.scal=1", "did you mean algo.scale?"), ("epoch=5", "did you mean trainer.epochs?"),
    ("+epoch=5", "did you mean trainer.epochs?"), ("++epoch=5", "did you mean trainer.epochs?"),
    ("~trainer.epochs", "nothing can be deleted"), ("--epochs=5", "write trainer.epochs=5"),
    ("lr=0.1", "did you mean optimizer.lr?"), ("optimizer.lrr=1", "did you mean optimizer.lr?"), ("model=cnn", "did you mean arch=cnn?"),
    ("trainer.epochs=-1", "must be int >= 0"), ("trainer.epochs=2.5", "must be int >= 0"), ("trainer.epochs=abc", "=abc: must be"),
    ("trainer.epochs=true", "must be int"), ("trainer.batch_size=0", "must be int >= 1"), ("optimizer.lr=nan", "must be float > 0"),
    ("optimizer.lr=inf", "must be float > 0"), ("optimizer.lr=-1", "must be float > 0"), ("optimizer.lr=[1]", "must be float"),
    ("arch.widths=256", "must be list[int"), ("arch.widths=[0]", "must be list[int"), ("arch.activation=rellu", "did you mean relu?"),
    ("algo=bp,dfa", "needs -m"), ("seed=range(0,3)", "needs -m"), ("optimizer=glob(*)", "needs -m"),
    ("algo._target_=os.system", "not allowed"), ("algo={_target_: os.system}", "not allowed"),
    ("optimizer.feedback={_target_: os.system}", "not allowed"), ("trainer=${oc.env:HOME}", "interpolations"),
    ("run.name=${oc.env:HOME}", "interpolations"), ("run.name='${seed}'", "interpolations"),
    ("hydra.run.dir=x", "run.dir"), ("hydra/launcher=joblib", "hydra"), ("optimizer@x=adam", "group=option"),
    ("epochs", "key=value"), ("algo.name=bp", "write algo=bp"), ("logger.wandb=offline", "is a map of"),
    ("optimizer.feedback.lrr=1", "did you mean optimizer.feedback.lr?"), ("optimizer.feedback.lr=-1", "must be float > 0"),
    ("optimizer.feedback={lrr: 1}", "unknown key"), ("optimizer.feedback=1", "must be a map"), ("optimizer.betas=[0.9]", "must be list"),
    ("plugins=[no_such_package]", "no package of this name"), ("plugins=x", "write plugins=[x]"), ("plugins=[a/b]", "no package"),
    ("run.name=a=b", "quote"), ("run.name=..", "at least one letter"), ("run.dir=''", "cannot be a folder"),
    ("run.dir=" + "x" * 300, "cannot be a folder"), ("seed=-1", "must be int >= 0"), ("run.name=a\x00b", "cannot be printed"),
    ("run.name=\udcff", "cannot be printed"), ("trainer=default,smoke", "needs -m"), ("experiment=nope", "no such experiment"),
    ("arch.widths.0=3", "did you mean arch.widths?"), ("algo.lr=1", "did you mean optimizer.lr?"), ("=3", "unknown key"),
    ("prefers={optimizer: sgd}", "unknown key"), ("algo.prefers={optimizer: sgd}", "unknown key"),
]


@pytest.mark.parametrize("typed, said", WRONG, ids=[repr(typed) for typed, _ in WRONG])
def test_wrong_overrides(typed, said):
    found = problems(typed)
    assert len(found) == 1 and said in found[0]


def test_all_problems_are_told_together():
    found = problems("algo=dfaa", "epoch=5", "optimizer.lr=nan", "trainer.epochs=-1", "algo.x=1", "dataset=mnits")
    assert len(found) == 5  # algo.x is not judged, there being no algo
    for text in ("dfaa", "epoch=5", "nan", "-1", "mnits"):
        assert any(text in problem for problem in found)


@pytest.mark.parametrize("text, said", [
    ("algo:\n  _target_: os.system\n", "_target_"), ("run: {name: '${oc.env:HOME}'}", "interpolations"),
    ("run:\n  name: !!python/object/apply:os.system ['touch marker']\n", "f.yaml:2"),
    ("algo: bp\nalgo: fa\n", "f.yaml:2"), ("a: [1,\nb: 2", "f.yaml:"), ("- a\n- b\n", "map"), ("just words", "map"),
    ("trainer: {epochs: many}", "trainer.epochs=many"), ("trainer: {epoch: 1}", "did you mean trainer.epochs"),
    ("optimizer: {name: adm}", "did you mean adam"), ("optimizer: {name: [1]}", "no such optimizer"), ("algo: bp,fa", "no such algo"),
    ("seed: nan_", "must be int"), ("optimizer.lr: .nan", "must be float"), ("1: 2", "unknown key"),
    ("a: &a [1, 1]\nb: &b [*a, *a]\n", "aliases"),
])
def test_wrong_files(tmp_path, text, said):
    (tmp_path / "f.yaml").write_text(text)
    found = problems(file=tmp_path / "f.yaml")
    assert said in found[0] and "f.yaml" in found[0]
    assert not (tmp_path / "marker").exists()


def test_unreadable_files(tmp_path):
    assert "No such file" in problems(file=tmp_path / "none.yaml")[0]
    assert "directory" in problems(file=tmp_path)[0]
    (tmp_path / "latin.yaml").write_bytes(b"run: {name: \xe9\xff}")
    assert "cannot be read" in problems(file=tmp_path / "latin.yaml")[0]
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    assert compose([], tmp_path / "empty.yaml").values == compose([]).values


def test_numbers_mean_the_same_in_files_and_typed(tmp_path):
    (tmp_path / "f.yaml").write_text("optimizer.lr: 1e-3\ntrainer: {determinism: off}\n")
    got = compose([], tmp_path / "f.yaml").values
    assert got["optimizer"]["lr"] == 0.001 and got["trainer"]["determinism"] == "off"


@pytest.mark.parametrize("text, said", [
    ("knob: -1   # int >= 0; a knob\n", "knob=-1: must be int >= 0"), ("knob: 1\n", "no comment"),
    ("knob: ${oc.env:NO_SUCH_VARIABLE}   # str; a knob\n", "broken"), ("sub: {_target_: os.system}   # map; m\n", "not allowed"),
])
def test_a_bad_option_file_is_caught(package, text, said):
    name = package({"algos/flawed.py": RULE.format(name="Flawed", closed=False), "conf/algo/flawed.yaml": "# Flawed\nname: flawed\n" + text})
    found = problems(f"plugins=[{name}]", "algo=flawed")
    assert said in found[0]


def test_an_option_of_nothing_registered_is_caught(package):
    name = package({"conf/algo/ghost.yaml": "# Ghost\nname: dfaa\n"})
    assert "did you mean dfa?" in problems(f"plugins=[{name}]", "algo=ghost")[0]


@pytest.mark.parametrize("text, slugged", [("a b", "a-b"), ("../x", "x"), ("é–ü", "e-u"), ("--rm", "rm"), ("x" * 300, "x" * 60), ("..", "")])
def test_names_of_folders(text, slugged):
    assert config.slug(text) == slugged


# ---- grids

def test_a_grid_is_the_product_in_order():
    def typed(words):
        return [trial.typed for trial in grid(words)]

    assert typed(["algo=bp,dfa", "seed=range(0,2)", "trainer=smoke"]) == [
        ["algo=bp", "seed=0", "trainer=smoke"], ["algo=bp", "seed=1", "trainer=smoke"],
        ["algo=dfa", "seed=0", "trainer=smoke"], ["algo=dfa", "seed=1", "trainer=smoke"]]
    assert typed(["optimizer=glob(adam*)"]) == [["optimizer=adam"], ["optimizer=adamw"]]
    assert [t[0] for t in typed(["arch.widths=[8],[8,8]"])] == ["arch.widths=[8]", "arch.widths=[8,8]"]
    assert [trial.values["run"]["name"] for trial in grid(["run.name=choice('a b','c')"])] == ["a b", "c"]
    assert len(grid(["optimizer.lr=range(0.1,0.5,0.1)"])) == 4


@pytest.mark.parametrize("typed, said", [
    (["algo=bp,dfaa"], "did you mean dfa?"), (["seed=1,2", "optimizer.lr=0.1,-1"], "-1"), (["optimizer.lr=interval(0,1)"], "interval"),
    (["optimizer=glob(zzz*)"], "no value"), (["seed=glob(*)"], "glob"), (["seed=range(3,3)"], "no value"), (["epoch=1,2"], "trainer.epochs"),
])
def test_a_grid_is_validated_whole(typed, said):
    with pytest.raises(ConfigError) as caught:
        grid(typed)
    assert any(said in problem for problem in caught.value.problems)
    assert len(set(caught.value.problems)) == len(caught.value.problems)


@pytest.mark.parametrize("text", ["a b", "it's", "back\\", "x,y", "a='b'", "(", "ü"])
def test_any_text_can_be_quoted(text):
    assert compose([f"run.dir={config.quoted(text)}"]).values["run"]["dir"] == text
