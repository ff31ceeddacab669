"""What exists, found by reading folders: algos, archs and datasets by their sources, options by their YAMLs.

Nothing is imported for it: sources are read by `ast`. A thing lives in FILE.py and is called like the file,
compared in lower case without underscores. What is registered: of algos, a class with a literal `facts =
Facts(...)` in its body; of archs, a function annotated `-> Network`; of datasets, a function annotated `->
Arrays`. Plugin packages (entry points of the group `lbp.plugins`, and those given to `use`) have the same
folders: algos, archs, datasets, conf.
"""

import ast
import importlib
import importlib.util
import os
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any, Iterable, NamedTuple

from lbp import knobs
from lbp.errors import ConfigError

FOLDERS = {"algo": "algos", "arch": "archs", "dataset": "datasets"}
_MARK = {
    "algo": "Facts(",
    "arch": "Network",
    "dataset": "Arrays",
}  # a file without it holds nothing registered


class Root(NamedTuple):
    package: str
    folder: Path
    conf: Path


class Entry(NamedTuple):
    kind: str
    name: str
    module: str
    attr: str
    path: Path
    doc: str
    facts: dict[str, Any]


_typed: tuple[str, ...] = ()


def use(plugins: Iterable[str]) -> None:
    """Search these packages too, besides those with an entry point. Replaces what an earlier call said."""
    global _typed
    roots(tuple(plugins))  # refuses what is no package
    _typed = tuple(plugins)


@lru_cache(maxsize=None)
def _roots(plugins: tuple[str, ...], entry_points: tuple[str, ...]) -> tuple[Root, ...]:
    here = Path(__file__).resolve().parent
    inside, beside = (
        here / "conf",
        here.parent / "conf",
    )  # a wheel has its conf inside, a checkout beside the package
    found = {"lbp": Root("lbp", here, inside if inside.is_dir() else beside)}
    problems = []
    for package in dict.fromkeys(entry_points + plugins):
        folder = _folder(package)
        if folder:
            found.setdefault(package, Root(package, folder, folder / "conf"))
        elif package in plugins:
            problems.append(
                f"plugins=[{package}]: no package of this name is installed or lies in {os.getcwd()}"
            )
    if problems:
        raise ConfigError(*problems)
    return tuple(found.values())


def roots(plugins: tuple[str, ...] | None = None) -> tuple[Root, ...]:
    """lbp's own root, then the plugins'."""
    return _roots(_typed if plugins is None else plugins, _entry_points(tuple(sys.path)))


def _folder(package: str) -> Path | None:
    if not all(part.isidentifier() for part in package.split(".")):
        return None
    if os.getcwd() not in sys.path and "" not in sys.path and (Path.cwd() / package.split(".")[0]).is_dir():
        sys.path.append(os.getcwd())  # the installed script, unlike `python -m lbp`, does not look here
        importlib.invalidate_caches()
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        return None
    places = list(spec.submodule_search_locations or []) if spec else []
    return Path(places[0]).resolve() if places else None


@lru_cache(maxsize=None)
def _entry_points(path: tuple[str, ...]) -> tuple[str, ...]:
    # importlib.metadata costs 60 ms to import: ask it only where some installed package mentions the group
    for folder in path:
        try:
            files = [
                e.path for e in os.scandir(folder or ".") if e.name.endswith((".dist-info", ".egg-info"))
            ]
        except OSError:
            continue
        for file in files:
            try:
                with open(os.path.join(file, "entry_points.txt"), "rb") as stream:
                    if b"lbp.plugins" not in stream.read():
                        continue
            except OSError:
                continue
            from importlib.metadata import entry_points

            return tuple(sorted({e.module for e in entry_points(group="lbp.plugins")}))
    return ()


# ---- algos, archs, datasets


def _plain(name: str) -> str:
    return name.replace("_", "").lower()


@lru_cache(maxsize=None)
def _files(kind: str, of: tuple[Root, ...]) -> dict[str, list[tuple[Root, Path]]]:
    files: dict[str, list[tuple[Root, Path]]] = {}
    for root in of:
        for path in sorted((root.folder / FOLDERS[kind]).rglob("*.py")):
            if not path.stem.startswith("_"):
                files.setdefault(path.stem, []).append((root, path))
    return files


@lru_cache(maxsize=None)
def _read(kind: str, root: Root, path: Path) -> Entry | None:
    try:
        text = path.read_text("utf-8")
        if _MARK[kind] not in text:
            return None
        tree = ast.parse(text)
    except (OSError, ValueError, SyntaxError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from None
    for node in tree.body:
        facts = {}
        if _plain(getattr(node, "name", "")) != _plain(path.stem):
            continue
        if kind == "algo":
            if not isinstance(node, ast.ClassDef) or (facts := _facts(node, path)) is None:
                continue
        elif not isinstance(node, ast.FunctionDef) or _returns(node) != _MARK[kind]:
            continue
        module = ".".join((root.package, *path.relative_to(root.folder).with_suffix("").parts))
        return Entry(
            kind,
            path.stem,
            module,
            node.name,
            path,
            ast.get_docstring(node) or ast.get_docstring(tree) or "",
            facts,
        )
    return None


def _returns(node: ast.FunctionDef) -> str:
    note = node.returns
    text = note.value if isinstance(note, ast.Constant) else ast.unparse(note) if note else ""
    return str(text).rpartition(".")[2]


def _facts(node: ast.ClassDef, path: Path) -> dict[str, Any] | None:
    for line in node.body:
        target = line.targets[0] if isinstance(line, ast.Assign) else getattr(line, "target", None)
        call = getattr(line, "value", None)
        if (
            getattr(target, "id", "") == "facts"
            and isinstance(call, ast.Call)
            and ast.unparse(call.func) == "Facts"
        ):
            try:
                if call.args:
                    raise ValueError
                return _usual_facts() | {k.arg: ast.literal_eval(k.value) for k in call.keywords}
            except (ValueError, TypeError):
                raise ConfigError(
                    f"{path}:{call.lineno}: facts must be keywords with literal values"
                ) from None
    return None


@lru_cache(maxsize=None)
def _usual_facts() -> dict[str, Any]:
    """The defaults of `Facts`, which a rule need not repeat."""
    tree = ast.parse((Path(__file__).parent / "algos" / "rule.py").read_text("utf-8"))
    facts = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Facts")
    return {
        line.target.id: ast.literal_eval(line.value) if line.value else None
        for line in facts.body
        if isinstance(line, ast.AnnAssign)
    }


def _entries(kind: str, name: str) -> list[Entry]:
    """Those called so: none, one, or several in a clash. Raises ConfigError where a file cannot be read."""
    return [e for root, path in _files(kind, roots()).get(name, ()) if (e := _read(kind, root, path))]


def names(kind: str) -> list[str]:
    """The registered names, sorted. A file that cannot be read is left out, until it is asked for."""
    found = []
    for name in sorted(_files(kind, roots())):
        try:
            found += [name] * bool(_entries(kind, name))
        except ConfigError:
            pass
    return found


def entry(kind: str, name: str) -> Entry:
    """What is called so; ConfigError with the nearest name, or with both files of a clash."""
    found = _entries(kind, name)
    if len(found) > 1:
        raise ConfigError(f"{kind} {name!r} stands in two files: " + " and ".join(str(e.path) for e in found))
    if not found:
        known = names(kind)
        raise ConfigError(
            f"no {kind} is registered as {name!r}; there are: {', '.join(known) or 'none'}"
            + knobs.did_you_mean(knobs.nearest(name, known))
        )
    return found[0]


def load(kind: str, name: str) -> Any:
    """The class or function itself; ConfigError where a package that it needs is missing or broken."""
    known = entry(kind, name)
    try:
        return getattr(importlib.import_module(known.module), known.attr)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in {root.package.partition(".")[0] for root in roots()}:
            raise  # ours: a bug, not a missing package
        raise ConfigError(
            f"{kind}={name} needs the package {package!r}, which is not installed: pip install {package}"
        ) from error
    except (ImportError, RuntimeError, OSError, AttributeError) as error:
        trace = error.__traceback__
        while trace.tb_next:
            trace = trace.tb_next
        where = Path(trace.tb_frame.f_code.co_filename)
        if any(where.is_relative_to(root.folder) for root in roots()) and not isinstance(error, ImportError):
            raise
        raise ConfigError(
            f"{kind}={name}: a package that it needs is broken or does not match the others: "
            f"{type(error).__name__}: {error} (in {where})"
        ) from error


# ---- options


@lru_cache(maxsize=None)
def _options(group: str, of: tuple[Root, ...]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for root in of:
        for path in sorted((root.conf / group).glob("*.yaml")):
            if path.stem in found:
                raise ConfigError(f"{group}={path.stem} stands in two files: {found[path.stem]} and {path}")
            found[path.stem] = path
    return found


def options(group: str) -> dict[str, Path]:
    """A group's options and their files, sorted by name, without those made to be inherited (`_common`)."""
    return {name: path for name, path in sorted(_options(group, roots()).items()) if not name.startswith("_")}


@lru_cache(maxsize=None)
def _option(group: str, name: str, of: tuple[Root, ...]) -> knobs.Option:
    files = _options(group, of)

    def find(parent: str) -> Path:
        if parent not in files:
            raise ConfigError(f"{files[name]}: inherits {parent!r}, which is no file of {group}/")
        return files[parent]

    return knobs.read(files[name], find)


def option(group: str, name: str) -> knobs.Option:
    """An option's doc, knobs and preferences, or ConfigError with the choices and the nearest one."""
    known = options(group)
    if not isinstance(name, str) or name not in known:
        raise ConfigError(
            f"{group}={knobs.show(name)}: no such {group}; there are: {', '.join(known) or 'none'}"
            + knobs.did_you_mean(knobs.nearest(str(name), known))
        )
    return _option(group, name, roots())


def defaults(group: str, name: str) -> dict[str, Any]:
    """An option's knobs with their defaults, nested, and the `name` of its class."""
    import yaml

    found = option(group, name)
    values = {"name": found.name or name}
    for key, knob in found.knobs.items():
        *above, last = key.split(".")
        place = values
        for part in above:
            place = place.setdefault(part, {})
        place[last] = {} if knob.default == "{...}" else yaml.safe_load(knob.default)
    return values


@lru_cache(maxsize=None)
def main() -> knobs.Option:
    """conf/config.yaml."""
    return knobs.read(roots(())[0].conf / "config.yaml")


def groups() -> dict[str, str]:
    """The groups of which every run has one option, and their defaults."""
    return dict(x.split(": ") for x in main().defaults if ": " in x)
