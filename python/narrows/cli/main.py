"""The command ``narrows``: it parses arguments, runs a job and returns an exit code.

- Any error becomes one line on standard error and an exit code.
- A command imports its modules only when it runs, so ``--help`` and ``--version`` are quick.
- Exit codes: 0 done; 1 unexpected error; 2 wrong usage; 3 bad input or output; 4 training diverged; 5 the run to resume
  differs; 6 not enough memory, or no such device; 128 + signal after a stop with a checkpoint.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..errors import NarrowsError
from .arguments import apply_config, build_parser
from .settings import FitSettings, UsageError, in_flags, read_config

__all__ = ["main"]

_SIZES = (2, 4, 8, 16, 32)
_TRAINING = ("fit", "sweep")
_DEFAULTS = {f.name: f.default for f in dataclasses.fields(FitSettings)}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Parameters
    ----------
    argv : sequence of str, optional
        Arguments without the program's name; ``sys.argv[1:]`` by default.

    Returns
    -------
    int
        The exit code.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in argv
    try:
        parser, commands = build_parser()
        if not argv:
            parser.print_help(sys.stderr)
            return 2
        args = parser.parse_args(argv)
        if getattr(args, "config", None) is not None:
            apply_config(commands[args.command], read_config(Path(args.config)), args.config)
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
            where = "" if args.command not in _TRAINING else "; a checkpoint is saved: repeat the command to continue"
            print(f"narrows: stopped by {error.reason}{where}", file=sys.stderr)
            return exit_code(error.reason)
        except Stopped as error:
            again = "" if args.command not in _TRAINING else ": repeat the command to continue from the last checkpoint"
            print(f"narrows: stopped by {error}{again}", file=sys.stderr)
            return exit_code(str(error))
        except KeyboardInterrupt:
            print("narrows: stopped by SIGINT", file=sys.stderr)
            return 130
        except BrokenPipeError:  # the reader of standard output closed it, as `head` does
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
        return f"out of memory ({text or 'an allocation failed'}): lower --max-memory, --hidden or --batch-size", 6
    if isinstance(error, ValueError):  # estimators and readers raise it for data
        return text, 3
    return f"{type(error).__name__}: {text} (unexpected: repeat with --debug, and report the traceback)", 1


# --- commands -----------------------------------------------------------------------------------------------


def _settings(args: argparse.Namespace, **others: Any) -> FitSettings:
    for name in ("data", "out"):
        if getattr(args, name) is None:
            what = "DATA" if name == "data" else "--out"
            raise UsageError(f"{what} is missing; usage: narrows {args.command} DATA --out DIR")
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
