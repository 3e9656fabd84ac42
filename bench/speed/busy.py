"""Training steps while other processes want the same cores: one thread and several, in turns.

Usage: ``python bench/speed/busy.py [--cases keras-deep,...] [--threads 2] [--rounds 9] [--results DIR]``.

The other processes compute without end on the CPUs that the libraries may use: none, one, and so on up to one for each
thread. PyTorch is compared too where it is installed.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from bench.libraries.cases import CASES
from bench.libraries.contenders import taking_part
from bench.support.harness import Worker, in_turns
from bench.support.results import header
from bench.support.scripts import chosen, comparing, finish, lock, parsed, script

_CASES = {case.name: case for case in CASES if case.precision != "tf32"}


@contextmanager
def busy(count: int) -> Iterator[None]:
    """As many processes that compute without end."""
    found = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in found:
            process.send_signal(signal.SIGKILL)
            process.wait()


class Steps(Worker):
    """One library with one number of threads."""

    def __init__(self, library: str, threads: int) -> None:
        super().__init__("libraries.training", f"{library}, {threads}")
        self.library, self.threads = library, threads

    def ask(self, call: str, **arguments: Any) -> Any:
        answer = super().ask(call, **arguments)
        return answer["ms"] if call == "turn" else answer


def measure(name: str, libraries: list[str], threads: int, rounds: int) -> dict[str, Any]:
    """Milliseconds of a step for each number of busy processes; ratios to the library's own single thread."""
    found: dict[str, Any] = {}
    with ExitStack() as stack:
        teams = {
            library: [stack.enter_context(Steps(library, n)) for n in (1, threads)]
            for library in libraries
            if library in taking_part(_CASES[name])
        }
        for workers in teams.values():
            for worker in workers:
                worker.ask("start", contender=worker.library, case=name, threads=worker.threads)
        for count in range(threads + 1):
            with busy(count):
                found[str(count)] = {
                    library: dict(zip(("one", "team"), in_turns(workers, rounds).values(), strict=True))
                    for library, workers in teams.items()
                }
    return found


def main() -> None:
    options = comparing(__doc__, locked="for each case", rounds=9, known=list(_CASES))
    given = parsed(options)
    if given.threads < 2:
        options.error("--threads must be at least 2, because the result is several threads beside one")
    names = chosen(options, "--cases", given.cases, list(_CASES))
    libraries = ["narrows", *(["pytorch"] if find_spec("torch") else [])]
    versions = ["torch"] if find_spec("torch") else []
    report = header(versions, cases={}, rounds=given.rounds, threads=given.threads)
    for name in names:
        with lock(given.lock):
            report["cases"][name] = measure(name, libraries, given.threads, given.rounds)
        for count, found in report["cases"][name].items():
            ratios = ", ".join(f"{library} {one['team']['ratio']:.2f}" for library, one in found.items())
            print(f"{name}, {count} busy: {given.threads} threads beside one: {ratios}", flush=True)
    finish(report, "busy", given)


if __name__ == "__main__":
    script(main)
