"""Training steps of the standard cases on every backend: ``pytest bench/speed/test_steps.py``.

Each benchmark reports the work of a step's matrix products and its rate (``--benchmark-json``, extra_info).
"""

from __future__ import annotations

from typing import Any

import pytest

from narrows.backends import own_ops, probe
from narrows.benchmark import CASES, Case, prepared


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_training_step(benchmark: Any, case: Case, backend: str) -> None:
    program, rows, hyper = prepared(case, backend)
    # One call runs the same 20 batches, so the median is of 20 steps.
    benchmark.pedantic(program.train, (rows, hyper), rounds=10, warmup_rounds=1)
    steps, gflop = len(hyper.learning_rate), program.plan.flops / 1e9
    benchmark.extra_info |= {
        "steps": steps,
        "gflop_per_step": gflop,
        "generic_ops": sorted(op.code.name for op in program.plan.ops if op.code not in own_ops(backend)),
        "isa": probe(backend).reason,
    }
    if benchmark.stats:
        benchmark.extra_info["gflop_per_s"] = gflop * steps / benchmark.stats["median"]
