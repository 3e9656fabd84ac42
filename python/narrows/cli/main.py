"""The command ``narrows``: arguments in, exit code out.

- Parses, calls a job, and turns what it raises into one line on standard error and an exit code.
- Imports what a command needs when it runs, so that ``--help`` and ``--version`` are quick.
- Exit codes: 0 done; 1 unexpected; 2 usage; 3 bad input or output; 4 diverged; 5 resume mismatch; 6 not
  enough memory, or no such device; 128 + signal after a stop, with the checkpoint saved.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from .._version import __version__
from ..backends import AUTO, BACKENDS
from ..errors import NarrowsError
from ..plan.losses import LOSSES
from .settings import ESTIMATORS, FitSettings, UsageError, in_flags, parse_setting, parse_size, read_config

__all__ = ["main"]

_SIZES = (2, 4, 8, 16, 32)
_TRAINING = ("fit", "sweep")
_DEFAULTS = {f.name: f.default for f in dataclasses.fields(FitSettings)}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Parameters
    ----------
    argv : sequence of str, optional
        Arguments without the program's name; default ``sys.argv[1:]``.

    Returns
    -------
    int
        The exit code.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in argv
    try:
        parser, commands = _parser()
        if not argv:
            parser.print_help(sys.stderr)
            return 2
        args = parser.parse_args(argv)
        if getattr(args, "config", None) is not None:
            _apply_config(commands[args.command], read_config(Path(args.config)), args.config)
            args = parser.parse_args(argv)
        return _run(args, argv)
    except Exception as error:
        if debug:
            traceback.print_exc()
        text, code = _explain(error)
        print(f"narrows: error: {text}", file=sys.stderr)
        return code


def _run(args: argparse.Namespace, argv: list[str]) -> int:
    from ..training import Interrupted
    from .console import messages
    from .stopping import Stopped, Stopper, exit_code

    with messages(args.quiet or args.command == "doctor"), Stopper(getattr(args, "walltime_margin", 0.0)) as stop:
        try:
            _COMMANDS[args.command](args, argv, stop)
        except Interrupted as error:
            where = "" if args.command not in _TRAINING else "; the checkpoint is saved: repeat the command to go on"
            print(f"narrows: stopped by {error.reason}{where}", file=sys.stderr)
            return exit_code(error.reason)
        except Stopped as error:
            again = "" if args.command not in _TRAINING else ": repeat the command to go on from the last checkpoint"
            print(f"narrows: stopped by {error}{again}", file=sys.stderr)
            return exit_code(str(error))
        except KeyboardInterrupt:
            print("narrows: stopped by SIGINT", file=sys.stderr)
            return 130
        except BrokenPipeError:  # the reader of our output left, as `head` does
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
    return 0


def _explain(error: Exception) -> tuple[str, int]:
    """One line and an exit code for an error."""
    text = in_flags(" ".join(str(error).split()))
    if isinstance(error, UsageError):
        return text, 2
    if isinstance(error, NarrowsError):
        return text, error.exit_code
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror or type(error).__name__}", 3
    if isinstance(error, OSError):
        return text or type(error).__name__, 3
    if isinstance(error, MemoryError):
        return f"out of memory ({text or 'an allocation failed'}): set or lower --max-memory, --hidden, --batch-size", 6
    if isinstance(error, ValueError):  # what estimators and readers say of data
        return text, 3
    return f"{type(error).__name__}: {text} (unexpected: run again with --debug and report it)", 1


# --- commands -----------------------------------------------------------------------------------------------


def _settings(args: argparse.Namespace, **others: Any) -> FitSettings:
    for name in ("data", "out"):
        if getattr(args, name) is None:
            what = "DATA" if name == "data" else "--out"
            raise UsageError(f"{what} is missing: narrows {args.command} DATA --out DIR")
    given = {f.name: getattr(args, f.name) for f in dataclasses.fields(FitSettings)}
    return FitSettings(**given | {"set": dict(args.set or {})} | others)


def _fit(args: argparse.Namespace, argv: list[str], stop: Any) -> None:
    from . import console, jobs

    jobs.fit(_settings(args), stop, callbacks=console.progress(args.quiet), argv=["narrows", *argv])


def _sweep(args: argparse.Namespace, argv: list[str], stop: Any) -> None:
    from . import console
    from .sweep import sweep

    settings = _settings(args, components=args.components[0])
    sweep(settings, args.components, stop, callbacks=lambda: console.progress(args.quiet), argv=["narrows", *argv])


def _apply(args: argparse.Namespace, argv: list[str], stop: Any) -> None:
    from . import applying

    given = {f.name: getattr(args, f.name) for f in dataclasses.fields(applying.ApplySettings) if f.name in args}
    getattr(applying, args.command)(applying.ApplySettings(**given))


def _report(args: argparse.Namespace, argv: list[str], stop: Any) -> None:
    from . import report, sweep

    folder = Path(args.dir)
    if not folder.is_dir():
        raise FileNotFoundError(2, "no such folder", str(folder))
    print(sweep.build_report(folder) if (folder / "sweep.json").exists() else report.build(folder))


def _bench(args: argparse.Namespace, argv: list[str], stop: Any) -> None:
    from .bench import bench

    bench(
        cases=args.cases,
        ops=args.ops,
        backend=args.backend,
        threads=args.threads,
        seconds=args.seconds,
        json_file=None if args.json is None else Path(args.json),
    )


def _doctor(args: argparse.Namespace, argv: list[str], stop: Any) -> None:
    from ..config import show_config

    print(show_config())


_COMMANDS: dict[str, Callable[[argparse.Namespace, list[str], Any], None]] = {
    "fit": _fit,
    "sweep": _sweep,
    "encode": _apply,
    "decode": _apply,
    "score": _apply,
    "report": _report,
    "doctor": _doctor,
    "bench": _bench,
}


# --- arguments ----------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """Errors are raised, so that they end like all others: one line, exit code 2."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")


class _Help(argparse.HelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30, width=min(100, _terminal_width()))


def _terminal_width() -> int:
    import shutil

    return shutil.get_terminal_size((100, 24)).columns - 2


def _integer(low: int, high: int | None = None) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
        if value < low or (high is not None and value >= high):
            bound = f"at least {low}" if high is None else f"at least {low} and below {high}"
            raise argparse.ArgumentTypeError(f"{text} must be {bound}")
        return value

    return parse


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} must not be negative or infinite")
    return value


def _sizes(text: str) -> tuple[int, ...]:
    return tuple(_integer(1)(part.strip()) for part in text.split(","))


def _widths(text: str) -> tuple[int, ...]:
    return () if text.strip().lower() in ("", "none") else _sizes(text)


def _as_argument(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """A parser whose ValueError argparse shows as it is."""

    def wrapped(text: str) -> Any:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return wrapped


def _parser() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    parser = _Parser(
        prog="narrows",
        description="Autoencoders for data matrices: train, sweep, encode, decode, score, report.",
        epilog="Each command has its own --help. Exit codes: 0 done, 2 usage, 3 bad input or output, "
        "4 diverged, 5 resume mismatch, 6 not enough memory, 128+signal after a stop, with a checkpoint.",
        formatter_class=_Help,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"narrows {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=_Parser)
    made: dict[str, argparse.ArgumentParser] = {}

    def command(name: str, summary: str, text: str = "") -> argparse.ArgumentParser:
        made[name] = subparsers.add_parser(
            name, help=summary, description=text or summary, formatter_class=_Help, allow_abbrev=False
        )
        return made[name]

    _add_fit(command("fit", "train on a data set and write codes, model and report", _FIT_TEXT))
    _add_fit(command("sweep", "fit several numbers of components, beside PCA", _SWEEP_TEXT), sweep=True)
    for name, summary in (
        ("encode", "write the latent codes of a data set (.npy, .h5ad, .csv)"),
        ("decode", "write the reconstruction of latent codes (.npy, .h5ad, .csv)"),
        ("score", "write the reconstruction loss of each row (.csv, .npy)"),
    ):
        _add_apply(command(name, summary), name)
    report = command("report", "write report.html of a finished fit again")
    report.add_argument("dir", metavar="DIR", help="what was given to `narrows fit --out`")
    _add_common(report)
    _add_common(command("doctor", "say what this installation is and can do"))
    _add_bench(command("bench", "time training steps on this machine, beside what it could do at best"))
    return parser, made


_FIT_TEXT = """Train an autoencoder on DATA and write everything under --out: model.safetensors, latent codes
(latent.h5ad or latent.npy), metrics.json, history.jsonl, report.html, run.log, config.toml, and _SUCCESS
last. The same command again resumes an interrupted run, bit for bit."""


_SWEEP_TEXT = """Fit an autoencoder to DATA for each number of components, and write the losses of held-out rows beside
those of PCA under --out: sweep.json, report.html with the elbow, the folder of each fit, and _SUCCESS last. The same
command again goes on with the sizes that are not finished; other sizes may be added."""


def _add_common(parser: argparse._ActionsContainer) -> None:
    parser.add_argument("--quiet", action="store_true", help="no progress and no messages but warnings and errors")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")


def _add_backend(parser: argparse._ActionsContainer, default: str | None, shown: str) -> None:
    parser.add_argument(
        "--backend", choices=("auto", *BACKENDS), default=default, metavar="NAME",
        help=f"auto, {', '.join(BACKENDS[:-1])} or {BACKENDS[-1]} (default: {shown})",
    )  # fmt: skip
    parser.add_argument(
        "--threads", type=_integer(1), metavar="N",
        help="default: NARROWS_NUM_THREADS, SLURM_CPUS_PER_TASK, or what this process may use of the machine",
    )  # fmt: skip


def _add_memory(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--max-memory", type=_as_argument(parse_size), metavar="SIZE",
        help="such as 8GB; less data is held at once, and a job that cannot fit is refused (exit 6)",
    )  # fmt: skip


def _add_input(parser: argparse._ActionsContainer, layer: str) -> None:
    parser.add_argument("--layer", metavar="NAME", help=f"layer of an .h5ad or .zarr file (default: {layer})")
    parser.add_argument("--genes-by-cells", action="store_true", help="the table is genes x cells: turn it round")


def _add_apply(parser: argparse.ArgumentParser, name: str) -> None:
    parser.add_argument("model", metavar="MODEL", type=Path, help="model.safetensors, or the folder of a fit")
    if name == "decode":
        parser.add_argument("data", metavar="LATENT", help="latent codes: .npy, .h5ad or .csv")
    else:
        parser.add_argument("data", metavar="DATA", help="a path in any format that fit reads, or a bundled name")
        _add_input(parser, "that of the fit")
    formats = ".csv or .npy" if name == "score" else ".npy, .h5ad or .csv"
    if name != "encode":
        of = parser.add_mutually_exclusive_group()
        of.add_argument(
            "--batch-key", metavar="NAME",
            help="column of obs that says which batch a row is of (.h5ad, .zarr; default: that of the fit)",
        )  # fmt: skip
        of.add_argument("--batch", metavar="LABEL", help="take all rows to be of this batch")
    parser.add_argument("-o", "--output", required=True, type=Path, metavar="OUT", help=f"the file to write: {formats}")
    _add_backend(parser, None, "that of the model")
    _add_memory(parser)
    _add_common(parser)


def _add_bench(parser: argparse.ArgumentParser) -> None:
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--cases", metavar="NAME,NAME", help="which of the standard cases (default: all)")
    what.add_argument("--ops", metavar="CASE", help="time the ops inside the steps of one case (cpp only)")
    _add_backend(parser, None, f"each of {', '.join(AUTO)} that can run")
    parser.add_argument(
        "--seconds", type=_seconds, default=20.0, metavar="SEC", help="time for all timings together (default: 20)"
    )
    parser.add_argument("--json", metavar="FILE.json", help="also write the figures to a file")
    _add_common(parser)


def _add_fit(parser: argparse.ArgumentParser, *, sweep: bool = False) -> None:
    def add(group: argparse._ArgumentGroup, flag: str, text: str, **options: Any) -> None:
        default = _DEFAULTS[flag.strip("-").replace("-", "_")]
        shown = f"{default:g}" if isinstance(default, float) else str(default)
        group.add_argument(
            flag, default=default, help=text if default is None else f"{text} (default: {shown})", **options
        )

    parser.add_argument(
        "data",
        nargs="?",
        metavar="DATA",
        help="a path (.h5ad, .zarr, .h5, 10x folder, folder of CSR parts, .mtx, .npy, .npz, .csv, .tsv, .parquet) or "
        "a bundled name (pbmc4k, digits)",
    )
    parser.add_argument("--out", metavar="DIR", help="the folder to write: new, empty, or of an earlier run")

    model = parser.add_argument_group("model")
    if sweep:
        model.add_argument(
            "--components", type=_sizes, default=_SIZES, metavar="N,N",
            help=f"widths of the latent layer (default: {','.join(map(str, _SIZES))})",
        )  # fmt: skip
    else:
        add(model, "--components", "width of the latent layer", type=_integer(1), metavar="N")
    add(
        model,
        "--hidden",
        "widths of the encoder's hidden layers, such as 512,128; none for none (default: 128; none for "
        "linear, sparse, contractive, conv and rbm; 1000,500,250 for deep)",
        type=_widths,
        metavar="N,N",
    )
    add(model, "--estimator", ", ".join(ESTIMATORS), choices=tuple(ESTIMATORS), metavar="NAME")
    add(model, "--loss", f"{', '.join(LOSSES)} (default: mse; of count: nb)", choices=LOSSES, metavar="NAME")
    model.add_argument(
        "--set",
        action="append",
        type=_as_argument(parse_setting),
        metavar="NAME=VALUE",
        help="any other parameter of the estimator, such as learning_rate_init=3e-4, activation=gelu or "
        "corruption_level=0.2; may be repeated",
    )

    training = parser.add_argument_group("training")
    add(training, "--epochs", "at most this many; held-out rows may end it", type=_integer(1), metavar="N")
    add(training, "--batch-size", "rows per step", type=_integer(1), metavar="N")
    add(
        training,
        "--precision",
        "float32, float64, bfloat16; on a GPU also tf32",
        choices=("float32", "float64", "bfloat16", "tf32"),
        metavar="NAME",
    )
    add(training, "--seed", "the same seed gives the same bits", type=_integer(0, 2**64), metavar="N")

    inputs = parser.add_argument_group("input")
    add(
        inputs,
        "--normalize",
        "log1p (rows to a common total, then log), standard, minmax, none; auto takes log1p for counts and "
        "standard otherwise, for bce minmax, and none for counts with a count loss",
        choices=("auto", "log1p", "standard", "minmax", "none"),
        metavar="KIND",
    )
    _add_input(inputs, "X")
    inputs.add_argument(
        "--batch-key", metavar="NAME",
        help="column of obs (.h5ad, .zarr) that says which batch a row is of: the decoder is told, so that codes need "
        "not tell it",
    )  # fmt: skip

    machine = parser.add_argument_group("machine")
    _add_backend(machine, "auto", "auto")
    _add_memory(machine)
    add(
        machine,
        "--resume",
        "auto goes on from an earlier run of the same settings and data, never starts afresh, require fails "
        "if there is none",
        choices=("auto", "never", "require"),
        metavar="HOW",
    )
    add(machine, "--checkpoint-minutes", "least time between two checkpoints", type=_seconds, metavar="MIN")
    add(
        machine,
        "--walltime-margin",
        "seconds before SLURM_JOB_END_TIME at which to save and stop",
        type=_seconds,
        metavar="SEC",
    )

    other = parser.add_argument_group("other")
    other.add_argument(
        "--config", metavar="FILE.toml", help="defaults for these flags, by their names; flags given here win"
    )
    other.add_argument("--dry-run", action="store_true", help="print what would be done, and write nothing")
    _add_common(other)


def _apply_config(parser: argparse.ArgumentParser, values: dict[str, Any], path: str) -> None:
    """Make the values of a config file the parser's defaults, judged as if they were typed."""
    actions = {action.dest: action for action in parser._actions}
    for name, value in values.items():
        where = f"--config {path}: {name.replace('_', '-')}"
        action = actions[name]
        if name == "set":
            converted: Any = [(key, tuple(item) if isinstance(item, list) else item) for key, item in value.items()]
        elif isinstance(action, argparse._StoreTrueAction):
            if not isinstance(value, bool):
                raise UsageError(f"{where} must be true or false, not {value!r}")
            converted = value
        else:
            if isinstance(value, bool) or not isinstance(value, str | int | float | list):
                raise UsageError(f"{where}: {value!r} is not a value for it")
            text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
            try:
                converted = text if action.type is None else action.type(text)  # type: ignore[operator]
            except argparse.ArgumentTypeError as error:
                raise UsageError(f"{where}: {error}") from None
            if action.choices is not None and converted not in action.choices:
                raise UsageError(f"{where}: {value!r} is not one of {', '.join(map(str, action.choices))}")
        parser.set_defaults(**{name: converted})
