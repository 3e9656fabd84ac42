"""Training steps of two builds of the native extension, in turns: whether a change made a step slower.

Usage: ``python bench/speed/builds.py OLD NEW [--cases keras-deep,...] [--threads 2] [--starts 4] [--rounds 9]
[--results DIR]``.
OLD and NEW are compiled files (``_core*.so``). Both run the plans of the installed narrows, so both must read their
format.

A process keeps the memory that it got at its start, and that alone can make a step 2 % slower. So each build is started
several times, and the first to start alternates. `ratios` has the median of each start.

The result says for each case whether both builds train to the same bits.
"""

from __future__ import annotations

import hashlib
import importlib.util
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np

from bench import counts
from bench.libraries.cases import CASES, SEED, Case
from bench.support.harness import Repeated, Worker, in_turns, spread
from bench.support.results import header
from bench.support.scripts import chosen, comparing, finish, lock, parsed, script

_CASES = {case.name: case for case in CASES if case.precision != "tf32"}
_COUNTS = {name: case for name, case in counts.CASES.items() if case.loss != "mse"}
GUARD_STEPS = 30
"""Steps before the bits of the two builds are compared."""


def load(path: str) -> None:
    """Make a compiled file the extension of narrows in this process."""
    import narrows

    spec = importlib.util.spec_from_file_location("narrows._core", path)
    if spec is None or spec.loader is None:
        raise RuntimeError(f"{path} is not a compiled extension (_core*.so)")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules["narrows._core"] = narrows._core = module


def program_of(name: str, threads: int) -> tuple[Any, Any, int, float]:
    """A program that is ready to train, its data, the rows of a step, and the learning rate."""
    from narrows.backends import compile_plan
    from narrows.plan.lowering import lower

    if name in _COUNTS:
        case = _COUNTS[name]
        X: Any = counts.counts(case.batch)
        spec, state = counts.network(case.loss, X)
        program = compile_plan(lower(spec, case.batch), "cpp", n_threads=threads)
        program.load(state)
        return program, X, case.batch, counts.RATE
    dense: Case = _CASES[name]
    program = compile_plan(dense.plan(), "cpp", precision=dense.precision, n_threads=threads)
    program.load(dense.parameters())
    return program, dense.data(), dense.batch, dense.learning_rate


class Build:
    """One build at one case."""

    def start(self, core: str, case: str, threads: int) -> str:
        """Train a few steps, and return a hash of the parameters."""
        load(core)
        from narrows.backends import Hyper

        program, X, batch, rate = program_of(case, threads)
        program.bind(X)
        rows = np.arange(X.shape[0] // batch * batch).reshape(-1, batch)
        done = 0

        def run(steps: int) -> None:
            nonlocal done
            numbers = rows[np.arange(done, done + steps) % len(rows)].reshape(-1)
            program.train(numbers, Hyper(SEED, done, np.full(steps, rate)))
            done += steps

        run(GUARD_STEPS)
        bits = hashlib.sha256(b"".join(np.ascontiguousarray(a).tobytes() for a in program.state().values()))
        ways: dict[str, Callable[[int], object]] = {"steps": run}
        self.ways = Repeated(ways)
        return bits.hexdigest()

    def turn(self) -> float:
        return self.ways.turn() * 1e3


def compared(paths: dict[str, Path], case: str, threads: int, rounds: int) -> tuple[bool, dict[str, dict[str, float]]]:
    """Whether both builds train to the same bits, and their milliseconds a step. They start in the given order."""
    with Worker("speed.builds", "old") as old, Worker("speed.builds", "new") as new:
        workers = {"old": old, "new": new}
        bits = {workers[name].ask("start", core=str(path), case=case, threads=threads) for name, path in paths.items()}
        return len(bits) == 1, in_turns([old, new], rounds)


def main() -> None:
    known = [*_CASES, *_COUNTS]
    options = comparing(__doc__, locked="for each case", rounds=9, known=known)
    options.add_argument("old", type=Path)
    options.add_argument("new", type=Path)
    options.add_argument("--starts", type=int, default=4, help="processes of each build, one after the other")
    given = parsed(options)
    if given.starts < 1:
        options.error("--starts must be at least 1")
    for path in (given.old, given.new):
        if not path.is_file():
            options.error(f"{path} is not a file; name a compiled _core*.so")
    names = chosen(options, "--cases", given.cases, known)
    paths = {"old": given.old.resolve(), "new": given.new.resolve()}
    backwards = dict(reversed(paths.items()))
    report = header(cases=[], starts=given.starts, rounds=given.rounds, threads=given.threads)
    for name in names:
        with lock(given.lock):
            starts = [
                compared(backwards if i % 2 else paths, name, given.threads, given.rounds) for i in range(given.starts)
            ]
        same = all(bits for bits, _ in starts)
        found = {build: spread([ms[build]["median"] for _, ms in starts]) for build in paths}
        ratios = [ms["new"]["ratio"] for _, ms in starts]
        ratio = statistics.median(ratios)
        print(
            f"{name}: {found['old']['median']:.4f} -> {found['new']['median']:.4f} ms a step, ratio {ratio:.3f} "
            f"({', '.join(f'{r:.3f}' for r in ratios)})" + ("" if same else ", OTHER BITS"),
            flush=True,
        )
        report["cases"].append({"case": name, "same_bits": same, "ratio": ratio, "ratios": ratios, **found})
    finish(report, "builds", given)


if __name__ == "__main__":
    script(main, Build)
