"""Training steps of two builds of the native extension, in turns: whether a change made a step slower.

Usage: ``python bench/speed/builds.py OLD NEW [--cases keras-deep,...] [--threads 2] [--rounds 31] [--results DIR]``.
OLD and NEW are compiled files (``_core*.so``). Both run the plans of the installed narrows, so both must read their
format.

The result says for each case whether both builds train to the same bits.
"""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np

from bench import counts
from bench.libraries.cases import CASES, SEED, Case
from bench.support.harness import Repeated, Worker, in_turns
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


def main() -> None:
    known = [*_CASES, *_COUNTS]
    options = comparing(__doc__, locked="for each case", rounds=31, known=known)
    options.add_argument("old", type=Path)
    options.add_argument("new", type=Path)
    given = parsed(options)
    for path in (given.old, given.new):
        if not path.is_file():
            options.error(f"{path} is not a file; name a compiled _core*.so")
    names = chosen(options, "--cases", given.cases, known)
    report = header(cases=[], rounds=given.rounds, threads=given.threads)
    for name in names:
        with lock(given.lock), Worker("speed.builds", "old") as old, Worker("speed.builds", "new") as new:
            bits = [
                worker.ask("start", core=str(path.resolve()), case=name, threads=given.threads)
                for worker, path in ((old, given.old), (new, given.new))
            ]
            found = in_turns([old, new], given.rounds)
        same = bits[0] == bits[1]
        print(
            f"{name}: {found['old']['median']:.4f} -> {found['new']['median']:.4f} ms a step, "
            f"ratio {found['new']['ratio']:.3f}" + ("" if same else ", OTHER BITS"),
            flush=True,
        )
        report["cases"].append({"case": name, "same_bits": same, **found})
    finish(report, "builds", given)


if __name__ == "__main__":
    script(main, Build)
