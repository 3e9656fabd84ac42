"""Single ops on every backend, over the cases that the tests check: ``pytest bench/speed/test_ops.py``.

An op that runs alone in a loop finds its operands in its own cache, so these figures compare backends and kernels. The
command ``narrows bench --ops`` shows the ops inside whole steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from narrows.backends import Hyper, compile_plan, own_ops
from narrows.plan.plan import LEARN, Mode, Op, Plan, op_flops
from networks import Case
from op_cases import OP_CASES

STEPS = 20


def largest_ops() -> Iterator[tuple[Case, int]]:
    """In each case, the op of each kind that has the most work."""

    def work(case: Case, op: Op) -> tuple[int, int]:
        slots = [case.plan.slots[i] for i in op.slots if i >= 0]
        return op_flops(case.plan, op), max((s.rows * s.cols for s in slots), default=0)

    for case in OP_CASES:
        for code in dict.fromkeys(op.code for op in case.plan.ops):
            # An op that only decodes needs rows of codes, and training has none.
            ops = [i for i, op in enumerate(case.plan.ops) if op.code is code and op.modes & (LEARN | Mode.RECONSTRUCT)]
            if not ops:
                continue
            yield case, max(ops, key=lambda i: work(case, case.plan.ops[i]))


def alone(plan: Plan, index: int) -> Plan:
    """A plan that trains one op. Its gradient mode runs all ops before that, which fills the operands."""
    op = plan.ops[index]
    mode = Mode.GRADIENT if op.modes & LEARN else Mode.RECONSTRUCT
    before = (replace(o, modes=Mode.GRADIENT) for o in plan.ops[:index] if o.modes & mode)
    return replace(plan, ops=(*before, replace(op, modes=Mode.TRAIN)))


@pytest.mark.parametrize(
    ("case", "index"), [pytest.param(c, i, id=f"{c}-{c.plan.ops[i].code.name.lower()}") for c, i in largest_ops()]
)
def test_op(benchmark: Any, case: Case, index: int, backend: str) -> None:
    plan, op = case.plan, case.plan.ops[index]
    program = compile_plan(alone(plan, index), backend)
    program.load(case.state(np.float32))
    program.bind(*case.data(np.float32))
    rows = np.arange(case.batch)
    program.gradient(rows)
    # A learning rate of zero, so that the parameters stay the same in all repetitions.
    benchmark.pedantic(program.train, (np.tile(rows, STEPS), Hyper(0, 0, np.zeros(STEPS))), rounds=10, warmup_rounds=1)
    flops = op_flops(plan, op)
    benchmark.extra_info |= {"steps": STEPS, "gflop_per_step": flops / 1e9, "generic": op.code not in own_ops(backend)}
    if benchmark.stats and flops:
        benchmark.extra_info["gflop_per_s"] = flops * STEPS / benchmark.stats["median"] / 1e9
