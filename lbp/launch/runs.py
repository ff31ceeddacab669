"""Finding the folder of a run."""

import difflib
import os
from pathlib import Path

from lbp.errors import ConfigError


def find_run(text: str, root: Path = Path("outputs")) -> Path:
    """The folder that RUN names: a path, the unique start of a run folder's name, or `last`, the newest.

    Raises ConfigError with the nearest names.
    """
    if text != "last" and text and os.path.isfile(os.path.join(text, "config.yaml")):
        return Path(text)
    runs = sorted(
        (f.parent for pattern in ("*/*", "*/*-sweep-*/*") for f in root.glob(f"{pattern}/config.yaml")),
        key=_age,
    )
    if text == "last":
        if not runs:
            raise ConfigError(f"last: there is no run under {root.absolute()}")
        return runs[-1]
    found = [
        run
        for run in runs
        if text and (run.name.startswith(text) or str(run.relative_to(root)).startswith(text))
    ]
    if len(found) == 1:
        return found[0]
    if found:
        raise ConfigError(
            f"{text}: {len(found)} runs begin so: {', '.join(run.name for run in found[-5:])}"
            f"{' and others' if len(found) > 5 else ''}; write more of the name"
        )
    near = next(iter(difflib.get_close_matches(text, [run.name for run in runs], 1)), None)
    some = ", ".join(run.name for run in runs[:-4:-1])
    raise ConfigError(
        f"{text}: no such run"
        + (" (a folder without config.yaml)" if os.path.isdir(text) else "")
        + f"; RUN is a folder, the start of its name under {root}/*/, or last"
        + (f"; did you mean {near}?" if near else f"; the newest: {some}" if some else "")
    )


def _age(run: Path) -> tuple:
    # DATE/TIME-...: of two in one second the one written later; a sweep's trials in their order
    date, *names = run.parts[-3:] if "-sweep-" in run.parent.name else run.parts[-2:]
    return date, names[0][:6], (run / "config.yaml").stat().st_mtime, run.name
