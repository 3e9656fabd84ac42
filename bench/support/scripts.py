"""What the scripts of bench share: their options, a lock, and how a run ends."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError
from pathlib import Path

from bench.data.images import Split, mnist
from bench.pages import write
from bench.support.harness import DEVICES, Contender, prepare, serve
from bench.support.results import DOCS, RESULTS, Report, store


def parser(doc: str | None, *, locked: str | None = None) -> argparse.ArgumentParser:
    """A parser with the options of every script: ``--results``, and ``--lock`` if the script says what it locks."""
    found = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument(
        "--results", type=Path, default=RESULTS, help="folder for results and pages, instead of bench/results and docs"
    )
    if locked is not None:
        found.add_argument("--lock", type=Path, help=f"file to lock, as flock(1) does, {locked}")
    return found


def comparing(
    doc: str | None, *, locked: str, rounds: int, known: Sequence[str], devices: Sequence[str] = DEVICES[:1]
) -> argparse.ArgumentParser:
    """A parser for a script that compares libraries: ``--cases``, ``--threads``, ``--rounds`` and ``--device``."""
    found = parser(doc, locked=locked)
    found.add_argument("--cases", help=f"comma-separated, by default all: {', '.join(known)}")
    found.add_argument("--rounds", type=int, default=rounds)
    found.add_argument("--device", choices=devices, default=devices[0])
    return with_threads(found)


def with_threads(found: argparse.ArgumentParser, default: int = 2) -> argparse.ArgumentParser:
    found.add_argument("--threads", type=int, default=default)
    return found


def parsed(found: argparse.ArgumentParser) -> argparse.Namespace:
    """The options; this process and its workers are prepared for ``--threads`` and ``--device``."""
    options = found.parse_args()
    if getattr(options, "rounds", 1) < 1:
        found.error("--rounds must be at least 1")
    try:
        prepare(options.threads, getattr(options, "device", DEVICES[0]))
    except ValueError as error:
        found.error(str(error))
    return options


def chosen(found: argparse.ArgumentParser, option: str, text: str | None, known: Sequence[str]) -> list[str]:
    """The names in a comma-separated option; all that are known if the option is absent."""
    names = list(known) if text is None else text.split(",")
    if unknown := [name for name in names if name not in known]:
        found.error(f"{option}: {unknown[0]!r} is not one of {', '.join(known)}")
    return names


def with_data(found: argparse.ArgumentParser) -> argparse.ArgumentParser:
    found.add_argument(
        "--data", type=Path, default=os.environ.get("NARROWS_DATA"), help="by default the folder in NARROWS_DATA"
    )
    return found


def images(found: argparse.ArgumentParser, options: argparse.Namespace, folder: str = "mnist") -> Split:
    """The images in a folder of ``--data``."""
    if options.data is None or not (options.data / folder).is_dir():
        found.error(f"--data or NARROWS_DATA must name a folder that holds {folder}/")
    return mnist(options.data, folder)


def finish(report: Report, name: str, options: argparse.Namespace) -> None:
    """Store the report in the folder of its machine, and write all pages again."""
    store(report, name, options.results)
    write(options.results, DOCS if options.results == RESULTS else options.results / "docs")


def script(main: Callable[[], None], contender: Callable[[], Contender] | None = None) -> None:
    """Run a script; where a `Worker` started this process, run the script's contender instead."""
    if contender is not None and sys.argv[1:] == ["--serve"]:
        runs = contender()
        serve({"start": runs.start, "turn": runs.turn})
        return
    try:
        main()
    except PackageNotFoundError as error:
        sys.exit(f"error: {error.name} is not installed")
    except RuntimeError as error:
        sys.exit(f"error: {error}")


@contextlib.contextmanager
def lock(path: Path | None) -> Iterator[None]:
    """Hold the lock on a file, as flock(1) does, so that timings on a shared machine do not overlap."""
    if path is None:
        yield
        return
    import fcntl

    with open(path, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
