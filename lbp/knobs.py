"""The knobs of an option, read from the comments of its YAML: `lr: 0.001   # float > 0; learning rate`.

Needs no package, so that `lbp list` and `lbp show` answer at once. A spec is a list of alternatives, ` | `
between them: `int`, `float`, `bool`, `str` (numbers may be followed by comparisons: `>= 0 < 1`),
`list[SPEC]` (`list[A, B]`: exactly two), `map` (open: any keys), `map like ..` (keys and specs of the map
around it), or a literal word (`relu`, `null`, `auto`).
"""

import difflib
import math
import operator
import re
from functools import lru_cache
from pathlib import Path
from typing import Any, Callable, NamedTuple

from lbp.errors import ConfigError


class Knob(NamedTuple):
    default: str
    spec: str
    doc: str


class Option(NamedTuple):
    """An option file: `knobs` by dotted key, what it `prefers` for other groups, the values that a `search` of it tries by key of the
    whole configuration, and what a knob `needs` to be of use, another's value: {"hidden": "synthesizer=mlp|conv"}; all as the file's
    own text."""

    path: Path
    doc: str
    name: str | None
    knobs: dict[str, Knob]
    prefers: dict[str, str]
    defaults: list[str]
    search: dict[str, str]
    needs: dict[str, str]


ABOUT = ("prefers", "search", "needs")  # what of a file are no knobs
_LINE = re.compile(r"( *)(?:- +)?([\w.-]+) *:(?: +(.*))?$")
_TAIL = re.compile(
    r"""((?:[^"'#]|"[^"]*"|'[^']*'|(?<=\S)['"#])*)(?:#\s*(.*))?$"""
)  # a value, and its comment
_COMPARE = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}
_YAML_BOOLS = {True: ("on", "yes"), False: ("off", "no")}  # words that YAML reads as a bool


def read(path: Path, find: Callable[[str], Path] | None = None) -> Option:
    """Read an option file with what it inherits; `find` says where a parent lies (default: beside it)."""
    try:
        lines = Path(path).read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from None
    doc, name, knobs, defaults = "", None, {}, []
    about: dict[str, dict[str, str]] = {section: {} for section in ABOUT}
    while lines and (not lines[0].strip() or lines[0].startswith("#")):
        line = lines.pop(0)
        if line.startswith("#"):
            doc += " " + line.lstrip("# ").rstrip()
        elif doc:
            break
    above: list[tuple[int, str]] = []  # the maps around the line: their indent and key
    section = closed = (
        None  # a top key that is no knob; the indent of an open map, whose lines are its default
    )
    for number, line in enumerate(lines):
        bare = line.strip()
        if not bare or bare.startswith("#"):
            continue
        indent = len(line) - len(line.lstrip())
        if closed is not None and (indent > closed or bare.startswith("- ")):
            continue
        closed = None
        if section == "defaults" and bare.startswith("- "):
            defaults.append(_TAIL.match(bare[2:]).group(1).strip())
            continue
        match = _LINE.match(line)
        if not match:
            continue  # the inside of a list; Hydra reads the file in earnest and would complain
        key, rest = match.group(2), _TAIL.match(match.group(3) or "")
        value, comment = (rest.group(1).strip(), rest.group(2)) if rest else (match.group(3).strip(), None)
        if indent == 0:
            section, above = key, []
        if section == "defaults":
            defaults += [x.strip() for x in value.strip("[]").split(",") if x.strip()]
        elif section in about:
            about[section] |= {key: value} if indent else _flow(value)
        elif section == "name":
            name = value.strip("'\"") or None
        else:
            above = [(i, k) for i, k in above if i < indent]
            dotted = ".".join([k for _, k in above] + [key])
            spec, _, text = (comment or "").partition(";")
            following = next(
                (x for x in lines[number + 1 :] if x.strip() and not x.strip().startswith("#")), ""
            )
            heading = (
                not value
                and len(following) - len(following.lstrip()) > indent
                and not following.strip().startswith("- ")
            )
            if heading and not comment:
                above.append((indent, key))
                continue
            if not value:
                closed = indent
            knobs[dotted] = Knob(value or ("{...}" if heading else "null"), spec.strip(), text.strip())
    find = find or (lambda parent: Path(path).parent / f"{parent}.yaml")
    inherited = [read(find(p), find) for p in defaults if p != "_self_" and ":" not in p]
    merged: dict[str, Knob] = {}
    sections: dict[str, dict[str, str]] = {section: {} for section in ABOUT}
    for parent in inherited:
        merged |= parent.knobs
        for section in ABOUT:
            sections[section] |= getattr(parent, section)
        name = name or parent.name
        doc = doc or parent.doc
    for key, knob in knobs.items():
        if key in merged and not knob.spec:
            knob = merged[key]._replace(default=knob.default)
        merged[key] = knob
    return Option(Path(path), doc.strip(), name, merged, defaults=defaults, **{section: sections[section] | about[section] for section in ABOUT})


def useless(of: str, option: Option, values: dict[str, Any], defaults: dict[str, Any]) -> list[str]:
    """What is wrong with an option's values of which others make no use, where they are not as they stand; `of` comes before each key."""
    problems = []
    for knob, need in option.needs.items():
        other, _, allowed = need.partition("=")
        if values[knob] != defaults[knob] and str(values[other]) not in allowed.split("|"):
            problems.append(f"{of}.{knob}={show(values[knob])}: {of}.{other}={show(values[other])} would ignore it; "
                            f"set {of}.{other}={allowed.replace('|', ' or ')}, or leave it out")
    return problems


def _flow(text: str) -> dict[str, str]:
    """{"a": "1", "b": "[1, 2]"} of "{a: 1, b: [1, 2]}"."""
    pairs = (x.partition(":") for x in _split(text.strip()[1:-1], ",") if ":" in x)
    return {key.strip(): value.strip() for key, _, value in pairs}


def _split(text: str, at: str) -> list[str]:
    """Split where no bracket is open."""
    parts, depth = [""], 0
    for char in text:
        depth += (char in "[{(") - (char in "]})")
        if char == at and not depth:
            parts.append("")
        else:
            parts[-1] += char
    return parts


@lru_cache(maxsize=None)
def _alternatives(spec: str) -> tuple[str, ...]:
    return tuple(x.strip() for x in _split(spec, "|") if x.strip())


@lru_cache(maxsize=None)
def _number(alternative: str) -> tuple[str, tuple] | None:
    """("int", ((ge, 0.0),)) of "int >= 0"; None where the alternative is no number."""
    match = re.fullmatch(r"(int|float)((?:\s*(?:<=|>=|<|>)\s*[-+.\deE]+)*)", alternative)
    if not match:
        return None
    bounds = re.findall(r"(<=|>=|<|>)\s*([-+.\deE]+)", match.group(2))
    return match.group(1), tuple((_COMPARE[sign], float(bound)) for sign, bound in bounds)


def is_map(spec: str) -> bool:
    """Whether keys may be set inside the knob: an open map, or one like the map around it."""
    return any(a.startswith("map") for a in _alternatives(spec))


class Misfit(ValueError):
    """The value is none of what the spec allows."""


def coerce(value: Any, spec: str, text: str | None = None) -> Any:
    """The value as the spec has it (an int becomes a float where a float is asked), or Misfit.

    `text` is how the value was written, which is what a `str` knob takes where YAML saw a number in it.
    """
    fits = [_coerce(value, alternative) for alternative in _alternatives(spec)]
    for fit in fits:
        if fit:
            return fit[0]
    if "str" in _alternatives(spec) and isinstance(value, (int, float)):
        return str(value) if text is None else text
    raise Misfit(spec)


def _coerce(value: Any, alternative: str) -> tuple | None:
    number = _number(alternative)
    if number:
        kind, bounds = number
        if isinstance(value, bool) or not isinstance(value, int if kind == "int" else (int, float)):
            return None
        try:
            finite = math.isfinite(value) and (kind == "float" or abs(value) < 2**63)  # torch's integers
        except OverflowError:
            finite = False
        if not (finite and all(compare(value, bound) for compare, bound in bounds)):
            return None
        return (value if kind == "int" else float(value),)
    if alternative == "bool":
        return (value,) if isinstance(value, bool) else None
    if alternative == "str":
        return (value,) if isinstance(value, str) else None
    if alternative == "null":
        return (None,) if value is None else None
    if alternative.startswith("map"):
        return (dict(value),) if isinstance(value, dict) else None
    if alternative.startswith("list["):
        if not isinstance(value, (list, tuple)):
            return None
        inside = _split(alternative[5:-1], ",")
        if len(inside) == 1:
            inside *= len(value)
        try:
            return ([coerce(x, spec) for x, spec in zip(value, inside, strict=True)],)
        except ValueError:  # a Misfit, or another length
            return None
    if isinstance(value, bool):
        return (alternative,) if alternative in _YAML_BOOLS[value] else None
    return (
        (alternative,) if isinstance(value, (str, int)) and str(value) == alternative.strip("'\"") else None
    )


def check(key: str, value: Any, spec: str, text: str | None = None) -> str | None:
    """What is wrong with the value, in one line, or None."""
    try:
        coerce(value, spec, text)
    except Misfit:
        near = (
            nearest(value, [a for a in _alternatives(spec) if a.isidentifier()])
            if isinstance(value, str)
            else None
        )
        allowed = spec.replace("map like ..", "a map of the keys beside it")
        return (
            f"{key}={show(value) if text is None else text}: must be {allowed}"
            + did_you_mean(near)
        )
    return None


def show(value: Any) -> str:
    """A value as it is typed."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k}: {show(v)}" for k, v in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(show, value)) + "]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def nearest(word: str, among) -> str | None:
    """The most similar of some words, or None where none is similar."""
    lower = {other.lower(): other for other in among}
    return next((lower[near] for near in difflib.get_close_matches(word.lower(), lower, 1)), None)


def did_you_mean(near: str | None) -> str:
    return f"; did you mean {near}?" if near else ""
