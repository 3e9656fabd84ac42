"""The errors of the native vector functions over every float32, and their time.

Usage: ``python bench/accuracy/ulp.py [--functions exp Gelu::value ...] [--stride 1] [--threads 1] [--results DIR]``.
Each function takes about 90 seconds on one thread. The program measures each instruction set of this CPU against
float64 (NumPy and SciPy). A run over every number replaces the entries of its functions in the stored result. A stride
above 1 takes one bit pattern in so many, prints, and stores nothing. docs/accuracy.md shows the result.

The functions, their bounds and the measure of an error are in tests/support/native_functions.py.
"""

from __future__ import annotations

import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "support"))

import numpy as np
from numpy.typing import NDArray

from bench.support.results import header, load, path_of
from bench.support.scripts import finish, parser, script, with_threads
from native_functions import FUNCTIONS, INF, Function, sweep


def nanoseconds(function: Function, isa: str, rounds: int = 300) -> float:
    """Nanoseconds for an element: the least of many rounds, minus the time of the call itself."""
    x = np.abs(np.random.default_rng(0).normal(size=8192) / 10).astype(np.float32)

    def least(x: NDArray[np.float32]) -> int:
        times = []
        for _ in range(rounds):
            start = time.perf_counter_ns()
            function(x, isa)
            times.append(time.perf_counter_ns() - start)
        return min(times)

    return (least(x) - least(x[:16])) / len(x)


def record(function: Function, threads: int, stride: int) -> dict[str, Any]:
    measured = sweep(function, stride, threads)
    return asdict(measured) | {
        "domain": "all" if function.domain == (-INF, INF) else "{:g} to {:g}".format(*function.domain),
        "bound": {isa: function.bound_of(isa) for isa in measured.worst},
        "ns": {isa: nanoseconds(function, isa) for isa in measured.worst},
    }


def main() -> None:
    options_parser = with_threads(parser(__doc__), default=1)
    keys = [f.key for f in FUNCTIONS]
    options_parser.add_argument("--functions", nargs="+", default=keys)
    options_parser.add_argument("--stride", type=int, default=1)
    options = options_parser.parse_args()
    if unknown := [name for name in options.functions if name not in keys]:
        options_parser.error(f"--functions: {unknown[0]!r} is not one of {'; '.join(keys)}")
    report = header()
    functions = load(path_of(report, "ulp", options.results)).get("functions", {})
    for function in FUNCTIONS:
        if function.key in options.functions:
            found = functions[function.key] = record(function, options.threads, options.stride)
            figures = (f"{isa} {w['ulp']:.3f} ulp, {found['ns'][isa]:.3f} ns" for isa, w in found["worst"].items())
            print(f"{function.key}: {'; '.join(figures)}; same bits: {found['same_bits']}", flush=True)
            if options.stride == 1:
                finish(
                    report | {"functions": {key: functions[key] for key in keys if key in functions}}, "ulp", options
                )


if __name__ == "__main__":
    script(main)
