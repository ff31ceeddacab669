"""What the shell offers when a command is half typed: read from YAMLs and folders, no package imported."""

import os
import re
from collections.abc import Iterable

from lbp import knobs, registry
from lbp.errors import ConfigError

OVERRIDES = ("train", "resume", "eval", "rerun", "search", "doctor")  # commands that take key=value
NAMES = ("resume", "eval", "rerun", "export")  # that take one run
MANY = ("compare", "report", "sync")  # that take several
AFTER = {"--split": ("test", "val", "train"), "--checkpoint": ("last", "best"), "--seeds": ()}
FILES = ("--config", "--to", "--csv", "--markdown", "--html", "--output")
FIGURES = ("test_accuracy", "best_test_accuracy", "val_accuracy", "train_accuracy", "test_loss", "test_r2",
           "test_sequence_accuracy", "test_bits_per_character", "train_s",
           "samples_per_s", "peak_memory_mb")


def candidates(words: list[str], flags: dict[str, list[str]], lists: dict[str, str]) -> list[str]:
    """Whole words that the last of `words`, what was typed after `lbp`, can become; none where files are wanted.

    `flags`: the options of each command; `lists`: of `lbp list`, and the group of each."""
    *before, current = words or [""]
    try:
        found = _candidates(before, current, flags, lists)
    except (ConfigError, OSError):  # a broken option file: told when the command is run
        found = []
    return sorted({word for word in found if word.startswith(current)}, key=lambda word: (word.startswith("-"), word))


def _candidates(before: list[str], current: str, flags: dict[str, list[str]], lists: dict[str, str]) -> Iterable[str]:
    command = next((word for word in before if not word.startswith("-")), None)
    if command is None:
        return [*flags, *(["--help", "--version", "--debug"] if current.startswith("-") else [])]
    before = before[before.index(command) + 1 :]
    last = before[-1] if before else ""
    if command not in flags or last in FILES and last in flags[command]:
        return []
    if last in AFTER and last in flags[command]:
        return AFTER[last]
    if last == "--metric":
        return FIGURES
    if last == "--by":
        done, _, part = current.rpartition(",")
        keys = ["seed", *registry.groups(), *(key for key in _keys(part, before) if "." in key)]
        return [f"{done},{key}" if done else key for key in (key.rstrip("=") for key in keys)]
    if current.startswith("-"):
        return flags[command]
    given = [word for word in before if not word.startswith("-") and "=" not in word]
    if command == "list":
        return [*lists, "runs"] if not given else []
    if command == "show":
        group = current.partition("=")[0]
        return [f"{group}={name}" for name in registry.options(group)] if "=" in current else \
            [f"{group}=" for group in (*registry.groups(), "experiment")]
    if command == "completion":
        return SCRIPTS
    if command == "reproduce":
        from lbp.report.reproductions import experiments

        return experiments()
    if command in MANY or command in NAMES and not given:
        return _runs()
    return _overrides(current, before) if command in OVERRIDES else []


def _overrides(current: str, before: list[str]) -> Iterable[str]:
    sign = current[: len(current) - len(current.lstrip("+"))]
    key, equals, value = current[len(sign) :].partition("=")
    if not equals:
        return [sign + word for word in _keys(key, before)]
    done = value[: value.rfind(",") + 1] if not value.startswith(("[", "{")) else ""  # a sweep over several
    return [f"{sign}{key}={done}{word}" for word in _values(key, before)]


def _keys(typed: str, before: list[str]) -> Iterable[str]:
    """A group or key with its `=`; those inside a group once its name is there."""
    group, dot, _ = typed.partition(".")
    if dot:
        return [f"{key}=" for key in _knobs(group, before)]
    main = [f"{key}=" for key in registry.main().knobs if "." not in key]
    inside = [f"{group}." for group in (*registry.groups(), "run") if typed and group.startswith(typed)]
    return [*(f"{group}=" for group in (*registry.groups(), "experiment")), *main, *inside, *(["run."] if not typed else [])]


def _knobs(group: str, before: list[str]) -> dict[str, knobs.Knob]:
    """The keys of the group's option that was chosen before, or of its default."""
    standard = registry.groups()
    if group not in standard:
        return {key: knob for key, knob in registry.main().knobs.items() if key.startswith(f"{group}.")}
    chosen = next((word.partition("=")[2] for word in reversed(before) if word.startswith(f"{group}=")), "").split(",")[0]
    option = chosen if chosen in registry.options(group) else standard[group]
    return {f"{group}.{key}": knob for key, knob in registry.option(group, option).knobs.items()}


def _values(key: str, before: list[str]) -> Iterable[str]:
    """A group's options, or the words that a knob's spec names."""
    if key in registry.groups() or key == "experiment":
        return registry.options(key)
    knob = registry.main().knobs.get(key) or _knobs(key.partition(".")[0], before).get(key)
    words = [part.strip() for part in knob.spec.split("|")] if knob else []
    if "bool" in words:
        words += ["true", "false"]
    return [word for word in words if re.fullmatch(r"[a-z]\w*", word) and word not in ("int", "float", "str", "bool", "map")]


def _runs() -> list[str]:
    """`last` and the names under outputs/; a sweep's trial has its only below the sweep's."""
    found = ["last"]
    for day in _folders("outputs"):
        for run in _folders(f"outputs/{day}"):
            trials = _folders(f"outputs/{day}/{run}") if "-sweep" in run else []
            found += [f"{day}/{run}/{trial}" for trial in trials] if trials else [run]
    return found


def _folders(path: str) -> list[str]:
    try:
        return sorted(entry.name for entry in os.scandir(path) if entry.is_dir() and not entry.name.startswith("."))
    except OSError:
        return []


# Readline breaks words at = and : and has to be given what comes after; a word that is not at its end gets no space.
BASH = r"""# lbp completion bash > ~/.local/share/bash-completion/completions/lbp, or: source <(lbp completion bash)
_lbp() {
    local line="${COMP_LINE:0:COMP_POINT}" words word cut
    read -r -a words <<< "$line"
    [[ "$line" == *[[:space:]] ]] && words+=("")
    word="${words[-1]}"
    cut="${word%"${word##*[=:]}"}"
    COMPREPLY=()
    while IFS= read -r word; do
        [[ "$word" == *[=.] ]] && compopt -o nospace 2>/dev/null
        COMPREPLY+=("${word#"$cut"}")
    done < <("${words[0]}" --complete "${words[@]:1}" 2>/dev/null)
}
complete -o bashdefault -o default -F _lbp lbp
"""

ZSH = r"""#compdef lbp
# lbp completion zsh > a folder of $fpath/_lbp, or: source <(lbp completion zsh)
_lbp() {
    local -a found open ended
    found=("${(@f)$("${words[1]}" --complete "${(@)words[2,CURRENT]}" 2>/dev/null)}")
    found=("${(@)found:#}")
    open=("${(@M)found:#*[=.]}")
    ended=("${(@)found:#*[=.]}")
    (( ${#found} )) || { _files; return }
    (( ${#open} )) && compadd -S '' -- "${open[@]}"
    (( ${#ended} )) && compadd -- "${ended[@]}"
}
if [[ "${funcstack[1]}" == _lbp ]]; then _lbp "$@"; else compdef _lbp lbp; fi
"""

FISH = r"""# lbp completion fish > ~/.config/fish/completions/lbp.fish, or: lbp completion fish | source
function __lbp
    set -l words (commandline -opc)
    set -l current (commandline -ct)
    set -l found ($words[1] --complete $words[2..-1] "$current" 2>/dev/null)
    if test (count $found) -gt 0
        printf '%s\n' $found
    else
        __fish_complete_path "$current"
    end
end
complete -c lbp -f -a '(__lbp)'
"""

SCRIPTS = {"bash": BASH, "zsh": ZSH, "fish": FISH}
