"""The command ``narrows``: it parses arguments, runs a job and returns an exit code.

- Any error becomes one line on standard error and an exit code.
- Standard output and standard error may fail: the job goes on. Only if the output is all that a command makes, as that
  of doctor, its loss is an error.
- A command imports its modules only when it runs, so ``--help`` and ``--version`` are quick.
- Exit codes: 0 done; 1 unexpected error; 2 wrong usage; 3 bad input or output; 4 training diverged; 5 the run to resume
  differs; 6 not enough memory, or no such device; 128 + signal after a stop with a checkpoint.
"""

from __future__ import annotations

import argparse
import dataclasses
import errno
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .._process import Tolerant, standard_streams
from ..errors import NarrowsError, OutputError
from .arguments import apply_config, build_parser
from .settings import FitSettings, UsageError, in_flags, read_config
from .stopping import Stopped, Stopper, exit_code

__all__ = ["main"]

_TRAINING = ("fit", "sweep")
_DISK = {getattr(errno, name, 0) for name in ("ENOSPC", "EIO", "EDQUOT", "EROFS", "EFBIG")}


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
    with standard_streams() as output:
        try:
            parser, commands = build_parser()
            if not argv:
                parser.print_help(sys.stderr)
                return 2
            try:
                args = parser.parse_args(argv)
                if getattr(args, "config", None) is not None:
                    apply_config(commands[args.command], read_config(Path(args.config)), args.config)
                    args = parser.parse_args(argv)
            except SystemExit:  # --help and --version
                _check_written(output)
                raise
            code = _run(args, argv)
            if code == 0 and _prints_only(args):
                _check_written(output)
            elif output.lost is not None:
                print(f"narrows: warning: standard output is not complete: {output.lost}", file=sys.stderr)
            return code
        except Stopped as error:
            print(f"narrows: stopped by {error}", file=sys.stderr)
            return exit_code(str(error))
        except Exception as error:
            if debug:
                traceback.print_exc()
            text, code = _explain(error)
            print(f"narrows: error: {text}", file=sys.stderr)
            return code


def _prints_only(args: argparse.Namespace) -> bool:
    """Whether standard output is all that a command makes."""
    return args.command in ("doctor", "info") or getattr(args, "dry_run", False) or getattr(args, "json", "") is None


def _check_written(output: Tolerant) -> None:
    if output.lost is not None:
        raise OutputError(f"cannot write to standard output: {output.lost}")


def _run(args: argparse.Namespace, argv: list[str]) -> int:
    from ..training import Interrupted
    from .console import messages

    with messages(args.quiet or args.command == "doctor"), Stopper(getattr(args, "walltime_margin", 0.0)) as stop:
        again = ": repeat the command; it continues from its last checkpoint, if it saved one"
        try:
            _COMMANDS[args.command](args, argv, stop)
            if stop.signal is None:
                return 0
            reason, again = stop.signal, " after the end of the job"
        except Interrupted as error:
            reason, again = error.reason, "; a checkpoint is saved: repeat the command to continue"
        except Stopped as error:
            reason = str(error)
        except KeyboardInterrupt:  # in a thread that cannot handle signals
            reason = "SIGINT"
        except Exception:
            if stop.signal is None:
                raise
            reason = stop.signal  # a library turned `Stopped` into an error of its own, as imports of extensions do
        print(f"narrows: stopped by {reason}{again if args.command in _TRAINING else ''}", file=sys.stderr)
        return exit_code(reason)


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
    if isinstance(error, RuntimeError) and "Symlink loop" in text:  # of pathlib before Python 3.13
        return text, 3
    if isinstance(error, MemoryError):
        return f"out of memory ({text or 'an allocation failed'}): lower --max-memory, --hidden or --batch-size", 6
    if isinstance(error, ValueError):  # estimators and readers raise it for data
        return text, 3
    if (disk := _of_disk(error)) is not None:
        return f"{disk.strerror or disk}: {type(error).__name__}: {text}", 3
    return f"{type(error).__name__}: {text} (unexpected: repeat with --debug, and report the traceback)", 1


def _of_disk(error: BaseException | None) -> OSError | None:
    """The error of a disk that a library has turned into another error."""
    while error is not None and not (isinstance(error, OSError) and error.errno in _DISK):
        error = error.__cause__ or error.__context__
    return error


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


def _info(args: argparse.Namespace, argv: list[str], stop: Any) -> None:
    import json

    from . import info

    found = info.describe(Path(args.path))
    print(json.dumps(found, indent=1, ensure_ascii=False) if args.json else info.as_text(found))


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
    "info": _info,
    "doctor": _doctor,
    "bench": _bench,
}
