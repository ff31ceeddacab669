"""From what was typed to the values of a run: composed by Hydra, validated against the knobs.

A value comes from the strongest of: typed > the `--config` file > the experiment > the algo's `prefers` >
defaults. Choosing another option for a group drops what weaker sources said about the old one's knobs. No
other file knows Hydra, and this one only inside functions.
"""

import copy
import itertools
import math
import re
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Iterator, NamedTuple

from lbp import knobs, registry
from lbp.errors import ConfigError
from lbp.knobs import did_you_mean, nearest, show

GRADUAL = tuple(f"trainer.{key}" for key in (
    "epochs", "batch_size", "clip", "patience", "checkpoint_every", "on_nonfinite", "shuffle")) + tuple(f"dataset.{key}" for key in (
    "augment", "start_length", "grow_every"))  # nothing to who solves
MOST_TRIALS = 10_000  # of a sweep: each is validated before the first is started
LONGEST = 1_000_000  # characters of a configuration file
ABOUT_DATA = ("dataset", "arch")  # an algo's wishes for these hold for every option that has the knob


@dataclass
class Config:
    """A run's configuration: plain values, and how they came about."""

    values: dict[str, Any]  # every group a map with its `name`; seed, plugins, run
    options: dict[str, str]  # the option chosen in each group, and the experiment if any
    typed: list[str]
    chosen: list[tuple[str, Any, str]]  # (key, value, "algo=kp"): what the algo's `prefers` decided
    dropped: list[tuple[str, Any, str]] = field(default_factory=list)  # what fell away with another option

    def yaml(self) -> str:
        """The values as YAML that `compose([], file=...)` reads back to the same values."""
        from omegaconf import OmegaConf

        return OmegaConf.to_yaml(OmegaConf.create(self.values))


class Item(NamedTuple):
    """One `key=value`, as `text` was written in `source` ("" for the command line)."""

    key: str
    value: Any
    text: str
    source: str

    def __str__(self) -> str:
        return f"{self.key}={self.text}" + (f" (in {self.source})" if self.source else "")


def compose(overrides: list[str], file: Path | None = None) -> Config:
    """The configuration that the overrides ask for, or ConfigError with everything that is wrong with it."""
    problems: list[str] = []
    typed = [item for text in overrides for item in _items(text, problems)]
    in_file = _file_items(Path(file), str(file), problems) if file else []
    _use_plugins(typed, in_file)
    experiment, layers = _layers(typed, in_file, problems)
    chosen = [_choices(layer, registry.groups(), problems) for layer in layers]  # for each layer: settings, options
    options, wishes, decided = _options([picks for _, picks in chosen], problems)
    known = _known(options, problems)
    wishes = [item for item in wishes if _still_wished(item, chosen, known)]
    settings, dropped = _settings(wishes, chosen, options, decided)
    assignments = [
        assignment
        for item in settings
        if options.get(item.key.partition(".")[0], "") is not None  # of no option nothing more need be said
        for assignment in _assign(item, known, registry.groups(), problems)
    ]
    if problems:
        raise ConfigError(*dict.fromkeys(problems))

    values = _defaults(tuple(options.items()), registry.roots())
    plugins = next((i for layer in (typed, in_file) for i in reversed(layer) if i.key == "plugins"), None)
    for key, value in [*assignments, *([("plugins", plugins.value)] if plugins else [])]:
        *path, last = key.split(".")
        node = values
        for part in path:
            if not isinstance(node.get(part, {}), dict):  # a word where a map may stand: what the map is called
                node[part] = {"name": node[part]}
            node = node.setdefault(part, {})
        node[last] = value
    said = {item.key for items, _ in chosen for item in items}
    source = f"algo={options['algo']}"
    by_algo = [(group, option, source) for group, option in decided.items()]
    by_algo += [(item.key, item.value, source) for item in wishes if item.key not in said]
    if experiment:
        options["experiment"] = experiment
    config = Config(values, options, list(overrides), by_algo, [(i.key, i.value, i.source) for i in dropped])
    problems = _check(config, known) or _refusals(config, *chosen[-1])
    if problems:
        raise ConfigError(*dict.fromkeys(problems))
    return config


def _layers(
    typed: list[Item], in_file: list[Item], problems: list[str]
) -> tuple[str | None, list[list[Item]]]:
    """The experiment's name, and what was said by it, by the file, by the command line: the strongest last."""
    experiment = next((i.value for i in reversed(in_file + typed) if i.key == "experiment"), None)
    in_experiment: list[Item] = []
    if experiment is not None:
        found = _try(problems, registry.option, "experiment", experiment)
        in_experiment = _file_items(found.path, f"experiment={experiment}", problems) if found else []
    in_experiment = [i for i in in_experiment if i.key != "published"]  # about it, no part of it: report.reproductions
    apart = ("experiment", "plugins")
    problems += [f"{i}: an experiment cannot have this key" for i in in_experiment if i.key in apart]
    return experiment, [
        [i for i in layer if i.key not in apart] for layer in (in_experiment, in_file, typed)
    ]


def _options(
    picks: list[dict[str, str | None]], problems: list[str]
) -> tuple[dict[str, str | None], list[Item], dict[str, str | None]]:
    """The option of every group, what the algo wishes for their knobs, and the options that the algo decided."""
    options: dict[str, str | None] = dict(registry.groups())
    for picked in picks:
        options |= picked
    algo = options["algo"] and _try(problems, registry.option, "algo", options["algo"])
    source = f"algo={options['algo']}"
    wishes = [
        Item(key, _yaml(f"v: {text}", source, problems).get("v"), text, source)
        for key, text in (algo.prefers.items() if algo else ())
    ]
    wishes, preferred = _choices(wishes, registry.groups(), problems)
    decided = {group: option for group, option in preferred.items() if not any(group in p for p in picks)}
    return options | decided, wishes, decided


def _known(options: dict[str, str | None], problems: list[str]) -> dict[str, knobs.Knob]:
    """Every key that these options have; an option that cannot be read becomes None."""
    known = dict(registry.main().knobs)
    for group, name in options.items():
        option = name and _try(problems, registry.option, group, name)
        if option:
            known |= {f"{group}.{key}": knob for key, knob in option.knobs.items()}
        else:
            options[group] = None
    return known


def _still_wished(item: Item, chosen: list[tuple[list[Item], dict]], known: dict[str, knobs.Knob]) -> bool:
    """An algo's wish for data or arch holds where that option has the knob; others fall away where somebody chose that group."""
    group = item.key.partition(".")[0]
    if group in ABOUT_DATA:
        return item.key in known and not knobs.check(item.key, item.value, known[item.key].spec)
    return not any(group in picks for _, picks in chosen)


def _settings(
    wishes: list[Item],
    chosen: list[tuple[list[Item], dict[str, str | None]]],
    options: dict[str, str | None],
    decided: dict[str, str | None],
) -> tuple[list[Item], list[Item]]:
    """The settings of knobs, the strongest last, and those that were for an option which a stronger source replaced."""
    settings, dropped = list(wishes), []
    at_the_time = registry.groups() | decided
    for number, (items, picks) in enumerate(chosen):
        at_the_time |= picks
        later = {group for _, more in chosen[number + 1 :] for group in more}
        for item in items:
            group = item.key.partition(".")[0]
            stale = group in later and options[group] != at_the_time[group]
            (dropped if stale else settings).append(item)
    return settings, dropped


def grid(overrides: list[str], file: Path | None = None) -> list[Config]:
    """Hydra's sweep grammar (commas, choice, range, glob) spelt out: every trial's configuration."""
    problems: list[str] = []
    axes = []
    for text in overrides:
        override = _parse(text, problems)
        if override is not None:
            axes.append(_axis(override, text, problems))
    if math.prod(map(len, axes)) > MOST_TRIALS:
        problems.append(f"{' '.join(overrides)}: more than {MOST_TRIALS:,} trials in one sweep; split it")
    if problems:
        raise ConfigError(*problems)
    trials = [_try(problems, compose, list(trial), file) for trial in itertools.product(*axes)]
    if problems:
        raise ConfigError(*dict.fromkeys(problems))
    return trials


def _try(problems: list[str], function, *args):
    try:
        return function(*args)
    except ConfigError as error:
        problems += error.problems


class Dimension(NamedTuple):
    """What a search tries for a key: one of `choices`, as they are typed, or a number of the type of `low`, from `low` to `high`."""

    key: str
    text: str       # as it was typed
    choices: tuple[str, ...] = ()
    low: float = 0.0
    high: float = 0.0
    log: bool = False


def dimension(text: str) -> Dimension | None:
    """What an override says of values to choose among (commas, choice, range, glob, interval); None where it has one. Raises ConfigError."""
    problems: list[str] = []
    override = _parse(text, problems)
    found = None
    if override is not None and override.is_sweep_override():
        key, written, value = override.key_or_group.replace("/", "."), text.partition("=")[2].strip(), override.value()
        log = "log" in getattr(value, "tags", ())
        if not override.is_interval_sweep():
            if log:
                problems.append(f"{text}: tag(log, ...) is about an interval")
            found = Dimension(key, written, tuple(word.partition("=")[2] for word in _axis(override, text, problems)))
        elif not (-math.inf < value.start < value.end < math.inf) or log and value.start <= 0:
            problems.append(f"{text}: an interval goes from a smaller number to a greater one, and above 0 where it is tag(log, ...)")
        else:
            found = Dimension(key, written, (), value.start, value.end, log)
    if problems:
        raise ConfigError(*problems)
    return found


# ---- reading what was typed


@lru_cache(maxsize=1)
def _parser():
    from hydra.core.override_parser.overrides_parser import OverridesParser

    return OverridesParser.create()


def _parse(text: str, problems: list[str]):
    """Hydra's Override, or None and what is wrong."""
    from hydra.core.override_parser.types import OverrideType
    from hydra.errors import HydraException

    key = text.partition("=")[0].lstrip("+~")
    if text.startswith("-"):
        name, _, value = text.lstrip("-").partition("=")
        near = suggest(name)
        problems.append(
            f"{text}: no such flag; options are written key=value: "
            + (f"write {near}={value or 'VALUE'}" if near else "lbp show trainer and lbp list name them")
        )
    elif text.startswith("~"):
        problems.append(f"{text}: nothing can be deleted from a configuration; set another value")
    elif "=" not in text:
        problems.append(f"{text}: an override is written key=value")
    elif re.match(r"hydra\b", key):
        problems.append(
            f"{text}: hydra's own keys have no meaning here; run.dir and run.name say where a run goes"
        )
    elif "@" in key:
        problems.append(f"{text}: packages (@) have no meaning here; write group=option")
    elif "${" in text:
        problems.append(f"{text}: interpolations (${{...}}) are not allowed; write the value")
    elif not text.isprintable() or not text.isascii() and "\udc80" <= max(text) <= "\udfff":
        problems.append(f"{text!r}: has characters that cannot be printed")
    elif "_target_" in text:
        problems.append(f"{text}: _target_ is not allowed; things are chosen by their names")
    else:
        try:
            override = _parser().parse_override(text)
            if override.type is not OverrideType.DEL:
                return override
        except (HydraException, ValueError, RecursionError) as error:
            why = str(error).strip().splitlines() or [type(error).__name__]
            problems.append(
                f"{text}: cannot be read ({why[0]}); quote what has special characters: {key}='\"...\"'"
            )
    return None


def _items(text: str, problems: list[str]) -> list[Item]:
    override = _parse(text, problems)
    if override is None:
        return []
    key = override.key_or_group.replace("/", ".")
    written = text.partition("=")[2].strip()
    if override.is_sweep_override():
        problems.append(
            f"{text}: several values make a sweep, which needs -m; for a list write {key}=[{written}], "
            f"for a text {key}='\"{written}\"'"
        )
        return []
    value = override.value()
    if isinstance(value, str):
        written = value
    return [Item(key, _plain(value), written, "")]


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def _axis(override, text: str, problems: list[str]) -> list[str]:
    """The overrides that one override of a sweep stands for."""
    from hydra.core.override_parser.types import Glob
    from hydra.errors import HydraException

    if not override.is_sweep_override():
        return [text]
    key = override.key_or_group
    prefix = text.partition("=")[0]
    try:
        value = override.value()
        if isinstance(value, Glob):
            if key not in registry.groups() and key != "experiment":
                raise HydraException("glob chooses among the options of a group")
            values = value.filter(list(registry.options(key)))
        elif override.is_interval_sweep():
            raise HydraException("an interval has no end of values; write choice or range, or let lbp search choose")
        else:
            values = list(itertools.islice(override.sweep_string_iterator(), MOST_TRIALS + 1))
    except (HydraException, ValueError, ArithmeticError) as error:
        problems.append(f"{text}: {error}")
        return []
    if not values:
        problems.append(f"{text}: stands for no value at all")
    return [f"{prefix}={value}" for value in values]


# ---- reading files


def _yaml(text: str, source: str, problems: list[str]) -> dict:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import AliasEvent, YAMLError, parse

    try:
        if any(
            isinstance(event, AliasEvent) for event in parse(text)
        ):  # a few of them can stand for gigabytes
            raise ValueError("aliases (*name) are not allowed")
        node = OmegaConf.create(text)
        values = OmegaConf.to_container(node, resolve=False) if text.strip() else {}
        if not isinstance(values, dict) or (len(values) == 1 and values == {text: None}):
            raise ValueError("it should be a map of keys and values")
        return values
    except (YAMLError, OmegaConfBaseException, ValueError, AttributeError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f":{mark.line + 1}" if mark else ""
        what = getattr(error, "problem", None) or str(error).strip().splitlines()[0]
        problems.append(f"{source}{where}: cannot be read: {what}")
        return {}


def _file_items(path: Path, source: str, problems: list[str]) -> list[Item]:
    """What a `--config` file or an experiment says."""
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(LONGEST + 1)
        if len(text) > LONGEST:
            raise OSError(0, f"longer than {LONGEST:,} characters")
    except (OSError, UnicodeDecodeError) as error:
        problems.append(f"{source}: cannot be read ({getattr(error, 'strerror', None) or error})")
        return []
    items = []
    for key, value in _yaml(text, source, problems).items():
        bad = next(_forbidden(str(key), value), None)
        if bad:
            problems.append(f"{source}: {bad}")
        else:
            items.append(Item(str(key), _plain(value), show(value), source))
    return items


def _forbidden(key: str, value: Any) -> Iterator[str]:
    """Whatever could run code or read what is not in the configuration."""
    if re.search(r"(^|\.)_[a-z]+_(\.|$)", key):
        yield f"{key}: not allowed; things are chosen by their names"
    if isinstance(value, dict):
        for k, v in value.items():
            yield from _forbidden(f"{key}.{k}", v)
    elif isinstance(value, (list, tuple)):
        for v in value:
            yield from _forbidden(key, v)
    elif isinstance(value, str) and "${" in value:
        yield f"{key}={value}: interpolations (${{...}}) are not allowed; write the value"


def _use_plugins(typed: list[Item], in_file: list[Item]) -> None:
    items = [i for layer in (typed, in_file) for i in reversed(layer) if i.key == "plugins"]
    if not items:
        return registry.use(())
    item = items[0]
    problem = knobs.check("plugins", item.value, "list[str]", item.text)
    if problem:
        raise ConfigError(problem + f"; write plugins=[{item.text}]")
    registry.use(item.value)


# ---- choosing options and setting knobs


def _choices(
    items: list[Item], groups: dict[str, str], problems: list[str]
) -> tuple[list[Item], dict[str, str | None]]:
    """Part the items into settings of knobs, and the options chosen (None: there is no such option)."""
    settings, choices = [], {}
    for item in items:
        group = item.key
        if group.endswith(".name") and (owner := group.partition(".")[0]) in groups and group.count(".") == 1:
            if not item.source:
                problems.append(f"{item}: write {owner}={item.text}")
                continue
            group, item = owner, item._replace(key=owner, value={"name": item.value})
        if group not in groups:
            settings.append(item)
            continue
        name = item.value
        if isinstance(item.value, dict):
            rest = dict(item.value)
            name = rest.pop("name", None)
            settings += [Item(f"{group}.{k}", v, show(v), item.source) for k, v in rest.items()]
            if "name" not in item.value:
                continue
            name = _by_registry_name(group, str(name), rest)
        elif not isinstance(name, str):
            name = item.text
        where = f" (in {item.source})" if item.source else ""
        try:
            registry.option(group, name)
        except ConfigError as error:
            problems += [problem + where for problem in error.problems]
            name = None
        choices[group] = name
    return settings, choices


def _by_registry_name(group: str, name: str, rest: dict[str, Any]) -> str:
    """A map's `name` is an option, or else what an option's class is called; of several presets of one class, the one
    with the most knobs in common with the rest of the map."""
    known = registry.options(group)
    if name in known:
        return name
    presets = [option for option in known if registry.option(group, option).name == name]

    def alike(option: str) -> int:
        own = registry.option(group, option).knobs
        return sum(key in own and show(value) == own[key].default.strip("'\"") for key, value in rest.items())

    return max(presets, key=alike, default=name)


def _assign(
    item: Item, known: dict[str, knobs.Knob], groups: dict[str, str], problems: list[str]
) -> list[tuple[str, Any]]:
    """The plain assignments that an item stands for, coerced to what the knobs' specs say."""
    key, value = item.key, item.value
    where = f" (in {item.source})" if item.source else ""
    bad = next(_forbidden(key, value), None)
    if bad:
        problems.append(bad + where)
        return []
    if key in known and not (known[key].spec.startswith("map like") and isinstance(value, dict)):
        problem = knobs.check(key, value, known[key].spec, item.text)
        if problem:
            problems.append(problem + where)
            return []
        return [(key, knobs.coerce(value, known[key].spec, item.text))]
    if key in known:  # like the map around it
        inside = [
            _assign(Item(f"{key}.{k}", v, show(v), item.source), known, groups, problems)
            for k, v in value.items()
        ]
        return [(key, {}), *itertools.chain(*inside)]
    around = next((k for k in known if key.startswith(k + ".") and knobs.is_map(known[k].spec)), None)
    if around and known[around].spec.startswith("map like"):
        sibling = around.rpartition(".")[0] + key[len(around) :]
        if sibling in known and not knobs.is_map(known[sibling].spec):
            problem = knobs.check(key, value, known[sibling].spec, item.text)
            problems += [problem + where] if problem else []
            return [] if problem else [(key, knobs.coerce(value, known[sibling].spec, item.text))]
        near = suggest(sibling, known)
        problems.append(
            f"{item}: unknown key" + did_you_mean(near and around + near[len(around.rpartition(".")[0]) :])
        )
        return []
    if around:
        return [(key, value)]
    if any(k.startswith(key + ".") for k in known):
        if not isinstance(value, dict):
            inside = [k for k in known if k.startswith(key + ".")]
            problems.append(f"{item}: {key} is a map of {', '.join(inside)}")
            return []
        return [
            x
            for k, v in value.items()
            for x in _assign(Item(f"{key}.{k}", v, show(v), item.source), known, groups, problems)
        ]
    group = key.partition(".")[0]
    owner = (
        next((g for g in groups if "." not in key and value in registry.options(g)), None)
        if isinstance(value, str)
        else None
    )
    near = f"{owner}={value}" if owner else suggest(key, known)
    top = [*groups, "experiment", *(k for k in known if "." not in k), "run.*"]
    there = [k for k in known if k.startswith(group + ".")] or (["none"] if group in groups else top)
    problems.append(f"{item}: unknown key; there are: {', '.join(there)}{did_you_mean(near)}")
    return []


def suggest(key: str, known=None) -> str | None:
    """The known key that a mistyped one most likely stands for, if any."""
    if known is None:
        known = dict(registry.main().knobs)
        for group, option in registry.groups().items():
            if option in registry.options(group):
                known |= {f"{group}.{k}": knob for k, knob in registry.option(group, option).knobs.items()}
    key = key.replace("-", "_").replace("/", ".")
    words = [*known, *registry.groups(), "experiment"]
    if key in words:
        return key
    leaf, group = key.rpartition(".")[2], key.partition(".")[0]
    leaves: dict[str, list[str]] = {}
    for word in words:
        leaves.setdefault(word.rpartition(".")[2], []).append(word)
    near = leaf if leaf in leaves else nearest(leaf, leaves)
    here = near and any(word.startswith(group + ".") for word in leaves[near])
    if "." in key and leaf not in leaves and not here:
        if near_key := nearest(key, known):
            return near_key
    if near:
        return next((w for w in leaves[near] if w.startswith(group + ".")), leaves[near][0])
    return nearest(key, known if "." in key else words)


# ---- composing and checking


@lru_cache(maxsize=64)
def _composed(options: tuple[tuple[str, str], ...], of: tuple[registry.Root, ...]) -> dict[str, Any]:
    from hydra import compose as hydra_compose, initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    standard = registry.groups()
    choices = [f"{group}={name}" for group, name in options if standard[group] != name]
    path = [f"file://{root.conf}" for root in of[1:] if root.conf.is_dir()]
    where = [f"hydra.searchpath={path!r}"] if path else []
    try:
        with initialize_config_dir(str(of[0].conf), job_name="lbp", version_base="1.3"):
            node = hydra_compose("config", [*choices, *where])
            if found := re.search(r"\$\{\s*oc\.env\s*:\s*(?!LBP_DATA\b)[^}]*}?", OmegaConf.to_yaml(node)):
                raise HydraException(f"{found[0]}: of the environment only LBP_DATA is read")  # a secret would be kept
            return OmegaConf.to_container(node, resolve=True)
    except FileNotFoundError as error:  # Hydra asks where it is
        raise ConfigError("the current folder no longer exists; change to another") from error
    except (HydraException, OmegaConfBaseException, YAMLError) as error:
        raise ConfigError(
            f"{' '.join(f'{g}={o}' for g, o in options)}: an option's file is broken: {error}"
        ) from error


def _defaults(options: tuple[tuple[str, str], ...], of: tuple[registry.Root, ...]) -> dict[str, Any]:
    """What the options' files say, composed by Hydra."""
    values = copy.deepcopy(_composed(options, of))
    for group, name in options:
        inside = values.get(group) or {}
        for about in knobs.ABOUT:
            inside.pop(about, None)
        values[group] = {"name": inside.pop("name", name), **inside}
    return values


def _flat(values: dict, known: dict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        key = prefix + key
        if isinstance(value, dict) and key not in known:
            yield from _flat(value, known, key + ".")
        else:
            yield key, value


def _check(config: Config, known: dict[str, knobs.Knob]) -> list[str]:
    """Problems of the composed values, which only an option's file can cause; coerces them to their specs."""
    problems = []
    for key, value in list(_flat(config.values, known)):
        group, _, rest = key.partition(".")
        files = (
            f" (in {registry.option(group, config.options[group]).path})" if group in config.options else ""
        )
        problems += [problem + files for problem in _forbidden(key, value)]
        if group in config.options and rest == "name":
            continue
        if key not in known or not known[key].spec:
            problems.append(f"{key}={show(value)}: has no comment that says its type{files}")
        elif problem := knobs.check(key, value, known[key].spec):
            problems.append(problem + files)
        else:
            *path, last = key.split(".")
            node = config.values
            for part in path:
                node = node[part]
            node[last] = knobs.coerce(value, known[key].spec)
    for kind in registry.FOLDERS:
        _try(problems, registry.entry, kind, config.values[kind]["name"])
    name, folder = config.values["run"]["name"], config.values["run"]["dir"]
    if name is not None and not slug(name):
        problems.append(f"run.name={name}: needs at least one letter a-z or digit")
    if folder is not None and (
        not folder.strip() or "\0" in folder or any(len(p.encode()) > 255 for p in Path(folder).parts)
    ):
        problems.append(f"run.dir={folder!r}: cannot be a folder")
    elif folder is not None and folder.startswith("~"):
        problems.append(f"run.dir={folder}: a folder named ~ is nobody's wish; write the home folder out")
    if problem := wandb_project(config.values["logger"]["wandb"]["project"]):
        problems.append(f"logger.wandb.project={problem}")
    return problems


def _refusals(config: Config, typed: list[Item], choices: dict[str, str]) -> list[str]:
    """What an algo would ignore, by its file and its facts, without asking torch."""
    algo = config.values["algo"]
    problems = knobs.useless("algo", registry.option("algo", config.options["algo"]), algo, registry.defaults("algo", config.options["algo"]))
    facts = registry.entry("algo", algo["name"]).facts
    solves, optimized = facts.get("closed_form"), facts.get("optimized", True)
    if problems or optimized and not solves:
        return problems
    vain = [
        str(i)
        for i in typed
        if i.key.partition(".")[0] in ("optimizer", "schedule") or i.key in (GRADUAL if solves else ("trainer.clip",))
    ]
    vain += [f"{group}={choices[group]}" for group in ("optimizer", "schedule") if group in choices]
    if solves and config.values["trainer"]["precision"] == "bf16":
        problems.append(f"trainer.precision=bf16: algo={config.options['algo']} solves in closed form, which takes more digits; use fp32 or fp64")
    return problems + [
        f"{text}: algo={config.options['algo']} {'solves in closed form' if solves else 'has nothing that an optimizer steps'} "
        "and would ignore it; leave it out"
        for text in vain
    ]


def wandb_project(name: str) -> str:
    """What is wrong with the name of a W&B project; "" if nothing."""
    return f"{name}: must have no / \\ # ? % : in it, and at most 128 characters" if re.search(r"[/\\#?%:]", name) or len(name) > 128 else ""


def slug(text: str, longest: int = 60) -> str:
    """A text made safe as part of a folder's name: letters, digits and `._-`; "" where nothing is left."""
    import unicodedata

    plain = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    return re.sub(r"[^A-Za-z0-9._]+", "-", plain)[:longest].strip("-._")


def quoted(text: str) -> str:
    """A text as an override's value, whatever is in it."""
    from hydra.core.override_parser.types import Quote, QuotedString

    return QuotedString(text, Quote.single).with_quotes()
