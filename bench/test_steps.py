"""Training steps on every backend: ``pytest bench`` (pytest-benchmark's options apply; nothing asserts on seconds).

Each benchmark reports the step's matrix-product work and the rate it was done at (``--benchmark-json``, extra_info).
"""

from __future__ import annotations

import numpy as np
import pytest

from cases import CASES, STEPS, Case, parameters
from narrows.backends import BACKENDS, Hyper, compile_plan, own_ops, probe

FLOAT32 = [case for case in CASES if case.precision == "float32"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", FLOAT32, ids=lambda c: c.name)
def test_training_step(benchmark, case: Case, backend: str) -> None:
    found = probe(backend)
    if not found.ok:
        pytest.skip(f"{backend}: {found.reason}")
    program, rows, hyper = prepared(case, backend)
    # The same 20 batches in one call: the median is of 20 steps.
    benchmark.pedantic(program.train, (rows, hyper), rounds=10, warmup_rounds=1)
    gflop = case.plan().flops / 1e9
    benchmark.extra_info |= {
        "steps": len(hyper.learning_rate),
        "gflop_per_step": gflop,
        "generic_ops": sorted(op.code.name for op in case.plan().ops if op.code not in own_ops(backend)),
        "isa": found.reason,
    }
    if benchmark.stats:
        benchmark.extra_info["gflop_per_s"] = gflop * len(hyper.learning_rate) / benchmark.stats["median"]


def prepared(case: Case, backend: str):
    """A program with parameters and data, and the arguments of `train`."""
    program = compile_plan(case.plan(), backend, dtype=np.float32)
    program.load(parameters(case))
    X = case.data()
    program.bind(X)
    return program, np.arange(len(X)), Hyper(0, 0, np.full(STEPS, case.learning_rate))
