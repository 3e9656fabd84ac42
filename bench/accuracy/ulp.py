"""How far the native vector functions are from the truth, over every float32, and how long they take.

Usage: ``python bench/accuracy/ulp.py [--functions exp Gelu::value ...] [--stride 1] [--threads 1]``. All functions take
about 90 seconds each and thread. The program measures each instruction set of this CPU against float64 (NumPy and
SciPy). Results over every number go into bench/results/ulp.json, which keeps the results of the other functions, and
docs/accuracy.md is written from it. A stride above 1 takes one bit pattern in so many and only prints.

The functions, their bounds and the measure of an error are in tests/support/native_functions.py.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "support"))

import numpy as np
from numpy.typing import NDArray

from bench.pages import accuracy as accuracy_page
from bench.pages.benchmarks import RESULTS
from narrows import __version__
from narrows.benchmark import machine
from native_functions import FUNCTIONS, INF, Function, sweep

OUT = RESULTS / "ulp.json"


def nanoseconds(function: Function, isa: str, rounds: int = 300) -> float:
    """Time for an element, the least of many rounds, less that of the call itself."""
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    keys = [f.key for f in FUNCTIONS]
    parser.add_argument("--functions", nargs="+", default=keys)
    parser.add_argument("--stride", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    if unknown := [name for name in options.functions if name not in keys]:
        parser.error(f"--functions: {unknown[0]!r} is not one of {'; '.join(keys)}")
    report: dict[str, Any] = {"functions": {}}
    if OUT.exists():
        report = json.loads(OUT.read_text())
    report |= {"date": date.today().isoformat(), "machine": machine(), "narrows": __version__}
    for function in FUNCTIONS:
        if function.key in options.functions:
            found = report["functions"][function.key] = record(function, options.threads, options.stride)
            figures = (f"{isa} {w['ulp']:.3f} ulp, {found['ns'][isa]:.3f} ns" for isa, w in found["worst"].items())
            print(f"{function.key}: {'; '.join(figures)}; same bits: {found['same_bits']}", flush=True)
            if options.stride == 1:
                report["functions"] = {key: report["functions"][key] for key in keys if key in report["functions"]}
                OUT.write_text(json.dumps(report, indent=1) + "\n")
                accuracy_page.write()


if __name__ == "__main__":
    main()
