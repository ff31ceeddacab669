"""The commands. Imports no torch: `--help`, `--version`, `list` and `show` answer at once."""

import argparse
import contextlib
import os
import shutil
import sys
import textwrap
from pathlib import Path

import lbp
from lbp import knobs, registry
from lbp.errors import ConfigError, LbpError, out_of_resources

LISTS = {
    "algos": "algo",
    "datasets": "dataset",
    "archs": "arch",
    "optimizers": "optimizer",
    "schedules": "schedule",
    "experiments": "experiment",
}


def main(argv: list[str] | None = None) -> int:
    """Run a command and return its exit code; errors become one readable line a problem on stderr."""
    argv = sys.argv[1:] if argv is None else argv
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed (>&-): else the next file opened takes its number, and its text
            setattr(sys, name, open(os.devnull, mode))
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(
                errors="backslashreplace"
            )  # a terminal without our characters is no reason to fail
    try:
        try:
            code = _command(list(argv))
        finally:
            sys.stdout.flush()
        return code or 0
    except BrokenPipeError:
        os.dup2(
            os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno()
        )  # else Python complains again at its exit
        return 0
    except KeyboardInterrupt as error:
        return _fail(error, getattr(error, "code", 130), [str(error) or "interrupted"])
    except LbpError as error:
        return _fail(error, error.code, str(error).splitlines() or [type(error).__name__])
    except Exception as error:
        if resource := out_of_resources(error):
            return _fail(error, resource.code, [str(resource)])
        return _fail(
            error,
            1,
            [
                f"a bug in lbp or a plugin: {type(error).__name__}: {error}".splitlines()[0]
                + ("" if "--debug" in argv else " (--debug shows the traceback)")
            ],
        )


def _fail(error: BaseException, code: int, lines: list[str]) -> int:
    try:
        if "--debug" in sys.argv:
            import traceback

            traceback.print_exception(error)
        for line in [*lines, *getattr(error, "__notes__", [])]:
            # what was typed may hold what drives a terminal
            shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
            print(f"lbp: {shown}", file=sys.stderr, flush=True)
    except OSError:  # nobody reads; the exit code still tells
        sys.stderr = open(os.devnull, "w")
    return code


# ---- reading the command


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise ConfigError(f"{message}; see {self.prog} --help")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        "lbp",
        description="Learning beyond backprop: experiments with learning rules other than backpropagation.",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="lbp train algo=dfa dataset=digits      one run\n"
        "lbp train -m algo=bp,fa,dfa seed=1,2   a sweep\n"
        "lbp list algos; lbp show algo=dfa      what there is",
    )
    parser.add_argument("--version", action="version", version=f"lbp {lbp.__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")

    def add(name: str, text: str, usage: str, epilog: str = "") -> argparse.ArgumentParser:
        command = commands.add_parser(
            name,
            help=text,
            description=text[0].upper() + text[1:] + ".",
            allow_abbrev=False,
            usage=f"lbp {name} {usage}",
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_argument(
            "--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error"
        )
        return command

    train = add(
        "train",
        "train one run, or a sweep with -m",
        "[-m] [--dry-run] [--config FILE] [--debug] [key=value ...]",
        epilog="overrides:\n  group=option and key=value: algo=dfa arch.widths=[512,512] trainer.epochs=10\n"
        "  `lbp list` has the options of a group, `lbp show trainer` the keys of one",
    )
    train.add_argument(
        "-m",
        "--multirun",
        action="store_true",
        help="a sweep over lists: seed=1,2,3 algo=glob(f*) range choice",
    )
    train.add_argument(
        "--dry-run", action="store_true", help="show the configuration and the network, train nothing"
    )
    train.add_argument(
        "--config", metavar="FILE", type=Path, help="YAML with overrides, as a run's own config.yaml"
    )
    search = add(
        "search",
        "tune rules over the spaces that their YAMLs declare",
        "[--trials N] [--minutes M] [--sampler tpe | random] [--pruner median | none] [--debug] [key=value ...]",
        epilog="lbp search algo=bp,fa,dfa              each with the same budget\n"
        "lbp search optimizer.lr=0.01           fixed, not searched\n"
        "lbp search 'arch.widths=choice([256],[256,256])' 'optimizer.lr=tag(log,interval(1e-4,1))'\n"
        "lbp search launch.slots=4              four trials at a time; lbp resume FOLDER goes on, or takes part",
    )
    search.add_argument("--trials", metavar="N", type=_positive(int), help="of each rule; default: 30, or as many as fit into --minutes")
    search.add_argument("--minutes", metavar="M", type=_positive(float), help="of training each rule, all its trials together")
    search.add_argument("--sampler", choices=("tpe", "random"), default="tpe", help="what chooses the values; default: tpe")
    search.add_argument("--pruner", choices=("median", "none"), default="median", help="what ends hopeless trials; default: median")
    evaluate = add(
        "eval", "evaluate a checkpoint of a run", "RUN [--split SPLIT] [--checkpoint WHICH] [key=value ...]"
    )
    evaluate.add_argument("--split", choices=("test", "val", "train"), default="test")
    rerun = add("rerun", "run the same experiment again", "RUN [key=value ...]")
    rerun.add_argument(
        "--dry-run", action="store_true", help="show the configuration and the network, train nothing"
    )
    resume = add(
        "resume",
        "go on with a run, a sweep or a search that was stopped",
        "RUN [key=value ...]",
        epilog="free to change: of a run trainer.epochs (more), max_minutes, patience, checkpoint_every, on_nonfinite; logger.*\n"
        "of a sweep or a search launch.slots, timeout, fork, of a sweep also launch=ray or slurm; RUN is then its folder, or the start of its name",
    )
    export = add(
        "export", "write the trained network, loadable without lbp", "RUN [--checkpoint WHICH] [--to PATH]"
    )
    export.add_argument("--to", metavar="PATH", type=Path)
    sync = add(
        "sync",
        "send runs to Weights & Biases, each whole and as one run there",
        "RUN [RUN ...] [--project NAME] [--offline]",
        epilog="online where there is a key (WANDB_API_KEY, or wandb login), else into RUN/wandb",
    )
    sync.add_argument("runs", metavar="RUN", nargs="+", help="a run's folder, the start of its name, or last")
    sync.add_argument("--project", metavar="NAME", help="there; default: the run's logger.wandb.project")
    sync.add_argument("--offline", action="store_true", help="into RUN/wandb, whatever keys there are")
    for command in (evaluate, rerun, resume, export):
        command.add_argument("run", metavar="RUN", help="a run's folder, the start of its name, or last")
    for command in (evaluate, export):
        command.add_argument("--checkpoint", choices=("last", "best"), default="last")
    listing = add("list", "list what there is", f"[{' | '.join(LISTS)} | runs [FOLDER]] [--matrix]")
    listing.add_argument("what", nargs="?", metavar="WHAT")
    listing.add_argument("folder", nargs="?", metavar="FOLDER")
    listing.add_argument("--matrix", action="store_true", help="which algo trains which arch, found by trying")
    show = add("show", "show an option: doc, paper, knobs and defaults", "[--yaml] GROUP=OPTION ...")
    show.add_argument("what", nargs="+", metavar="GROUP=OPTION")
    show.add_argument("--yaml", action="store_true", help="its YAML file")
    compare = add(
        "compare",
        "compare runs: mean ± std over seeds, beside the controls",
        "[RUN ...] [--by KEY,..] [--metric NAME] [--csv FILE] [--markdown FILE] [--html FILE]",
        epilog="RUN: a run, a folder with runs in it, the start of a name, a glob, or last; without it all of outputs/\n"
        "lbp compare --by optimizer.lr --metric best_test_accuracy",
    )
    report = add(
        "report",
        "what happened in each layer of runs, as one HTML page",
        "[RUN ...] [--by KEY,..] [--metric NAME] [--output FILE]",
        epilog="RUN: a run, a folder with runs in it, the start of a name, a glob, or last; without it all of outputs/\n"
        "lbp report last; lbp report outputs/2026-11-21 --by algo,optimizer.lr --output lr.html",
    )
    for command in (compare, report):
        command.add_argument("runs", nargs="*", metavar="RUN")
        command.add_argument(
            "--by", metavar="KEY,..", help="algo, dataset, arch, seed, or a key of the configuration"
        )
        command.add_argument("--metric", metavar="NAME", help="a figure of summary.json, as test_accuracy")
    for form in ("csv", "markdown", "html"):
        compare.add_argument(f"--{form}", metavar="FILE", help="write the table there; - is stdout")
    report.add_argument(
        "--output", metavar="FILE",
        help="- is stdout; default: report.html in the folder of the one run or sweep, else in the working directory",
    )
    reproduce = add(
        "reproduce",
        "run experiments with a published number: reproduced or not, over seeds",
        "[NAME ...] [--seeds N | --seeds 1,2,3] [--dry-run] [--again] [--markdown FILE] [key=value ...]",
        epilog="without NAME: what is published, and what runs under outputs/ measured; a NAME may be a glob\n"
        "free to change: run.name, trainer.device, trainer.threads, trainer.checkpoint_every, dataset.root, logger.*, launch.*",
    )
    reproduce.add_argument("names", nargs="*", metavar="NAME", help="an experiment of lbp list experiments")
    reproduce.add_argument("--seeds", metavar="N", help="how many, or which: 1,2,3; default: as many as the experiment asks for")
    reproduce.add_argument("--dry-run", action="store_true", help="say what would be run, and run nothing")
    reproduce.add_argument("--again", action="store_true", help="run also what is there already")
    reproduce.add_argument("--markdown", metavar="FILE", help="write a table of all figures there; - is stdout")
    doctor = add(
        "doctor",
        "say what this machine has, what is wrong with it and how to mend it",
        "[--repeat [key=value ...]]",
    )
    doctor.add_argument(
        "--repeat", action="store_true", help="train a small run twice and compare the weights, bit for bit"
    )
    completion = add("completion", "print a script that completes lbp's commands", "bash | zsh | fish")
    completion.add_argument("shell", metavar="SHELL", choices=("bash", "zsh", "fish"))
    parser.commands = list(commands.choices)
    parser.flags = {name: list(command._option_string_actions) for name, command in commands.choices.items()}
    return parser


def _positive(kind: type):
    def number(text: str):
        value = kind(text)
        if not 0 < value < float("inf"):
            raise ValueError
        return value

    number.__name__ = "number above 0" if kind is float else "number from 1"  # argparse: invalid NAME value
    return number


def _command(argv: list[str]) -> int | None:
    parser = _parser()
    if argv[:1] == ["--complete"]:  # asked by the shell, at every press of the key
        from lbp.report.complete import candidates

        print("".join(f"{word}\n" for word in candidates(argv[1:], parser.flags, LISTS)), end="")
        return 0
    words = [word for word in argv if not word.startswith("-")]
    if not argv:
        parser.print_help()
        return 2
    if words and words[0] not in parser.commands:
        hint = (
            f"; did you mean lbp train {words[0]}?"
            if "=" in words[0]
            else knobs.did_you_mean(knobs.nearest(words[0], parser.commands))
        )
        raise ConfigError(f"{words[0]}: no such command; there are: {', '.join(parser.commands)}{hint}")
    if words and words[0] in ("list", "show", "reproduce"):  # before anything is composed plugins say what there is
        named = [word.partition("=")[2].strip("[]") for word in argv if word.startswith("plugins=")]
        if words[0] != "reproduce":
            argv = [word for word in argv if not word.startswith("plugins=")]
        registry.use([name.strip() for names in named for name in names.split(",") if name.strip()])
    args, overrides = parser.parse_known_args(argv)
    if not args.command:
        raise ConfigError(
            f"{' '.join(overrides) or 'nothing to do'}: give a command: {', '.join(parser.commands)}"
        )
    overrides = _joined(overrides)
    if overrides and args.command in ("list", "show", "export", "sync", "compare", "report", "completion"):
        raise ConfigError(*(f"{word}: lbp {args.command} takes no such argument" for word in overrides))
    return globals()[f"_{args.command}"](args, overrides)


def _joined(words: list[str]) -> list[str]:
    """An unknown flag and its value as one, `--epochs 5` -> `--epochs=5`, for the message about it."""
    joined: list[str] = []
    for word in words:
        if (
            joined
            and joined[-1].startswith("-")
            and "=" not in joined[-1]
            and "=" not in word
            and not word.startswith("-")
        ):
            joined[-1] += f"={word}"
        elif word != "--":
            joined.append(word)
    return joined


# ---- running


def _train(args, overrides: list[str]) -> int | None:
    from lbp import config

    overrides = _elsewhere(args.config, overrides)
    if not args.multirun:
        return _start(lambda: config.compose(overrides, args.config), args.dry_run)
    _alone("-m")
    trials = config.grid(overrides, args.config)
    if args.dry_run:
        for number, trial in enumerate(trials, 1):
            print(f"trial {number}/{len(trials)}: {' '.join(trial.typed)}")
        return 0
    from lbp.launch.sweep import sweep

    return sweep(trials, args.config, args.debug)


def _search(args, overrides: list[str]) -> int:
    _alone("lbp search")
    from lbp.launch.search import search

    return search(overrides, args.trials, args.minutes, args.sampler, args.pruner, args.debug)


def _alone(what: str) -> None:
    if "LOCAL_RANK" in os.environ:
        raise ConfigError(f"{what} under torchrun would be a sweep in each rank; start the sweep alone, "
                          "with launch.ranks=N for its trials")


def _reproduce(args, overrides: list[str]) -> int:
    from lbp.report import reproductions as report

    words = [*args.names, *overrides]
    overrides = [word for word in words if "=" in word or word.startswith("-")]
    names = [word for word in words if word not in overrides]
    plugins = [word for word in overrides if word.startswith("plugins=")]

    def composed(name: str, more: list[str] = plugins) -> dict:
        from lbp.config import compose  # knows Hydra, which takes a while: only where there is something to compare

        return compose([f"experiment={name}", *more]).values

    seeds = _seeds(args.seeds)
    found = report.reproductions(report.named(names), composed)
    if names:
        return _reproduce_these(args, found, seeds, overrides, composed)
    vain = [word for word, typed in (("--seeds", seeds), ("--dry-run", args.dry_run), ("--again", args.again)) if typed]
    vain += [word for word in overrides if word not in plugins]
    if vain:
        raise ConfigError(*(f"{word}: goes with the NAME of an experiment; lbp reproduce lists them" for word in vain))
    if not _written((args.markdown, lambda: report.as_markdown(found))):
        print("\n".join(report.listed(found, _width())))
    return 0


def _reproduce_these(args, found: list, seeds: list[int], overrides: list[str], composed) -> int:
    """Runs what is missing of each experiment, and says what came of it."""
    from lbp import config
    from lbp.launch.sweep import sweep
    from lbp.report import reproductions as report

    _refuse_others(found, overrides, composed)
    missing = [[seed for seed in seeds or range(one.published.seeds) if args.again or str(seed) not in one.runs] for one in found]
    plans = [config.grid([f"experiment={one.name}", *overrides, f"seed={','.join(map(str, those))}"]) if those else []
             for one, those in zip(found, missing)]
    code = 0
    with contextlib.redirect_stdout(sys.stderr if args.markdown == "-" else sys.stdout):
        for one, those in zip(found, missing):
            print(report.announced(one, those), flush=True)
        if args.dry_run:
            return 0
        _alone("lbp reproduce")
        for number, (one, trials) in enumerate(zip(found, plans)):
            if trials:
                ended = sweep(trials, debug=args.debug)
                if ended > 128:  # asked to stop
                    return ended
                code = code or ended
                found[number], = report.reproductions([one.name], composed)
            print("\n".join(["", *report.shown(found[number], _width())]), flush=True)
    _written((args.markdown, lambda: report.as_markdown(found)))
    return code


def _seeds(text: str | None) -> list[int]:
    """0, 1 and 2 of `3`; those of `1,2,3`; none where nothing was typed."""
    if text is None:
        return []
    parts = [part.strip() for part in text.split(",") if part.strip()]
    seeds = [int(part) for part in parts if part.isdecimal()]
    if "," not in text:
        seeds = list(range(min(*seeds, 10_001))) if seeds else []
    if not seeds or len(seeds) > 10_000 or not all(part.isdecimal() for part in parts):
        raise ConfigError(f"--seeds {text}: must be how many, from 1 to 10,000, or which: 1,2,3")
    return list(dict.fromkeys(seeds))


def _refuse_others(found: list, overrides: list[str], composed) -> None:
    """Raises ConfigError where the overrides would make other experiments of these."""
    from lbp.report.reproductions import differing

    own = {"seed": "write --seeds N, or --seeds 1,2,3",
           "run.dir": "runs are counted where they lie, under outputs/; leave it out"}
    problems = [f"{word}: {own[key]}" for word in overrides if (key := word.lstrip("+").partition("=")[0]) in own]
    for one in found if not problems else ():
        if changed := differing(composed(one.name), composed(one.name, overrides)):
            problems.append(f"{', '.join(changed)}: it would be another experiment; "
                            f"lbp train experiment={one.name} {' '.join(overrides)} runs that")
    if problems:
        raise ConfigError(*problems)


def _rerun(args, overrides: list[str]) -> int | None:
    from lbp import config
    from lbp.launch.runs import find_run

    file = find_run(args.run) / "config.yaml"
    return _start(lambda: config.compose(_elsewhere(file, overrides), file), args.dry_run)


def _elsewhere(file: Path | None, overrides: list[str]) -> list[str]:
    # a run's own config.yaml may say where that run lies, which is no part of the experiment
    return ["run.dir=null", *overrides] if file and (file.parent / "STATUS").exists() else overrides


def _start(compose, dry: bool) -> int | None:
    if dry:
        config = compose()
        from lbp.launch.one import dry_run

        return dry_run(config)

    def new() -> tuple:
        config = compose()
        from lbp.launch.one import create

        place = create(config)
        return config, place.folder, place

    return _trained(new)


def _resume(args, overrides: list[str]) -> int | None:
    from lbp.launch import search, sweep

    for many in (sweep, search):
        if folder := sweep.find_sweep(args.run, record=many.RECORD):
            _alone("lbp resume of a sweep")
            return many.resume(folder, overrides, args.debug)

    def old() -> tuple | None:
        from lbp.launch.resume import resume
        from lbp.launch.runs import find_run

        return resume(find_run(args.run), overrides)

    return _trained(old)


def _trained(begin) -> int | None:
    """Trains the run that `begin` prepares, here or as a rank among others that torchrun started."""
    from lbp import interrupt

    with interrupt.listening(command=True):
        if "LOCAL_RANK" in os.environ and int(os.environ.get("WORLD_SIZE", 1)) > 1:
            from lbp.launch.ranks import among

            return among(begin)
        if prepared := begin():
            from lbp.launch.one import start

            start(*prepared)


def _eval(args, overrides: list[str]) -> None:
    from lbp.launch.runs import find_run

    run = find_run(args.run)
    from lbp.launch.trained import evaluate_run

    evaluate_run(run, args.split, args.checkpoint, overrides)


def _export(args, _) -> None:
    from lbp.launch.runs import find_run

    run = find_run(args.run)
    from lbp.launch.trained import export_run

    export_run(run, args.checkpoint, args.to)


def _sync(args, _) -> None:
    from lbp.launch.runs import find_run

    runs = [find_run(run) for run in args.runs]
    from lbp.config import wandb_project
    from lbp.launch.sync import sync

    if problem := wandb_project(args.project or ""):
        raise ConfigError(f"--project {problem}")

    for run in runs:
        sync(run, args.project, "offline" if args.offline else "auto")


# ---- looking


def _list(args, _) -> None:
    if args.what == "runs":
        return _list_runs(args.folder)
    if args.folder:
        raise ConfigError(f"{args.folder}: lbp list takes no such argument")
    if args.matrix:
        from lbp.launch.matrix import lines

        print("\n".join(lines()))
        return
    if args.what and args.what not in LISTS:
        plural = {kind: kinds for kinds, kind in LISTS.items()}.get(args.what) or knobs.nearest(
            args.what, [*LISTS, "runs"]
        )
        raise ConfigError(
            f"{args.what}: no such list; there are: {', '.join(LISTS)}, runs{knobs.did_you_mean(plural)}"
        )
    for kinds in [args.what] if args.what else LISTS:
        group = LISTS[kinds]
        rows = [(name, *_about(group, name)) for name in registry.options(group)]
        if not args.what:
            print(f"{kinds} ({group}=)")
        _table(rows)
        if not args.what:
            print()


def _list_runs(folder: str | None) -> None:
    from lbp.report import runs
    from lbp.report.listing import listing

    print("\n".join(listing([runs.read(run) for run in runs.find([folder] if folder else [])], _width())))


def _compare(args, _) -> None:
    from lbp.report import compare, page

    found, _ = _compared(args)
    if args.html:
        page.check(Path(args.html))
    written = _written((args.csv, lambda: compare.as_csv(found)), (args.markdown, lambda: compare.as_markdown(found)),
                       (args.html, lambda: page.page(found, plots=False)))
    if not written:
        print("\n".join(compare.shown(found, _width())))
    for line in compare.left_out(found):
        print(line, file=sys.stderr if written else sys.stdout)


def _report(args, _) -> None:
    from lbp.report import compare, page

    found, folders = _compared(args)
    path = args.output or str(page.place(folders))
    page.check(Path(path))
    written = _written((path, lambda: page.page(found)))
    if not written:
        print(f"report: {path}")
    for line in compare.left_out(found):
        print(line, file=sys.stderr if written else sys.stdout)


def _compared(args) -> tuple:
    """(the comparison of the runs that are named, their folders)"""
    from lbp.report import compare, runs

    by = [key for key in (args.by or "").replace(" ", "").split(",") if key]
    folders = runs.find(args.runs)
    return compare.compare([runs.read(run) for run in folders], by or compare.BY, args.metric), folders


def _written(*wanted) -> bool:
    """Writes each content to the file asked for, if any; whether one went to stdout, which is no place for more then."""
    from lbp.launch import folder as folders

    for path, content in wanted:
        if path == "-":
            print(content(), end="")
        elif path:
            there, text = Path(path), content()
            try:
                if there.is_file() or not there.exists():
                    folders.text(there.resolve(), text)    # through a link, as into a file
                else:       # a pipe, a device
                    there.write_text(text, encoding="utf-8")
            except OSError as error:
                if out_of_resources(error):
                    raise
                raise ConfigError(f"{path}: cannot be written ({error.strerror}); name another file") from None
    return any(path == "-" for path, _ in wanted)


def _doctor(args, overrides: list[str]) -> int:
    if overrides and not args.repeat:
        raise ConfigError(f"{overrides[0]}: goes with --repeat, as an override of the run that is repeated")
    from lbp.launch.doctor import doctor

    return doctor(overrides if args.repeat else None, _width())


def _completion(args, _) -> None:
    from lbp.report.complete import SCRIPTS

    print(SCRIPTS[args.shell], end="")


def _about(group: str, name: str) -> list[str]:
    """What is said of an option in a list: its doc, and for an algo family, paper and facts."""
    option = registry.option(group, name)
    if group not in registry.FOLDERS:
        of = option.knobs.get("published.of")
        return [option.doc, *(["published: " + of.default.strip("'\"")] if of else [])]
    try:
        entry = registry.entry(group, option.name or name)
    except ConfigError as error:
        return [f"(cannot be used: {error})"]
    doc = option.doc or entry.doc.partition("\n")[0]
    return [doc, *([_facts(entry.facts)] if group == "algo" else [])]


def _facts(facts: dict) -> str:
    """family; paper; the facts that hold."""
    said = [str(facts[key]) for key in ("family", "paper") if facts.get(key)]
    return "; ".join(said + [", ".join(key for key, value in facts.items() if value is True)]).removesuffix(
        "; "
    )


def _table(rows: list[tuple[str, ...]]) -> None:
    """First cells in a column, the others beside it or, where that is too narrow, below."""
    width = _width()
    column = max((len(row[0]) for row in rows), default=0) + 2
    for first, *cells in rows:
        indent = column if width - column >= 30 else 2
        lines = [
            line
            for cell in cells
            if cell
            for line in textwrap.wrap(cell, max(width - indent, 10), break_on_hyphens=False)
        ]
        if indent == 2:
            print(first)
        for number, line in enumerate(lines or [""]):
            print(((first if not number and indent == column else "").ljust(indent) + line).rstrip())


def _width() -> int:
    """Of the terminal; lines into a pipe are not broken, unless COLUMNS asks for it."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() or os.environ.get("COLUMNS") else 100_000


def _show(args, _) -> None:
    problems, found = [], []
    for word in args.what:
        group, _, name = word.partition("=")
        group = LISTS.get(group, group)
        known = {**registry.groups(), "experiment": ""}
        try:
            if group not in known:
                raise ConfigError(
                    f"{word}: no such group; there are: {', '.join(known)}"
                    + knobs.did_you_mean(knobs.nearest(group, known))
                )
            found.append((group, name or known[group], registry.option(group, name or known[group])))
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(*problems)
    for number, (group, name, option) in enumerate(found):
        if number:
            print()
        if args.yaml:
            print(option.path.read_text("utf-8").rstrip())
        else:
            _show_option(group, name, option)


def _show_option(group: str, name: str, option: knobs.Option) -> None:
    about = [("", option.doc)]
    if group in registry.FOLDERS:
        entry = registry.entry(group, option.name or name)
        about += [("", part) for part in entry.doc.split("\n\n")]
        about += [
            (key.replace("_", " "), ("yes" if value else "no") if isinstance(value, bool) else str(value))
            for key, value in entry.facts.items()
        ]
        about += [("source", str(entry.path))]
    about += [("yaml", str(option.path))]
    if option.prefers:
        about += [("prefers", ", ".join(f"{key}={value}" for key, value in option.prefers.items()))]
    about += [("search", f"{key}={text}") for key, text in option.search.items()]
    about += [("needs", f"algo.{other} for {key}") for key, other in option.needs.items()]
    width = min(_width(), 110)
    print(f"{group}={name}")
    for key, text in about:
        text = f"{key}: {text}" if key else text
        if text:
            print(
                textwrap.fill(
                    " ".join(text.split()),
                    width,
                    initial_indent="  ",
                    subsequent_indent="    " if key else "  ",
                    break_on_hyphens=False,
                    break_long_words=False,
                )
            )
    if group == "experiment":
        print(option.path.read_text("utf-8").rstrip())
    elif option.knobs:
        print()
        _table([(f"{group}.{key}={knob.default}", knob.spec, knob.doc) for key, knob in option.knobs.items()])
