"""Each op of a plan as launches.

Promises: each op has one function, which gives kernels their operands by name.
Never: touches data, or knows a device.
"""

from __future__ import annotations

from collections.abc import Sequence

from ....plan.ops import SIGNATURES, OpCode
from ....plan.plan import Mode, Op, Plan
from ....plan.spec import Precision
from ..launches import BLAS, Area, Launch, Writer
from . import contractive, dense, images, sparse, updates  # noqa: F401  (each registers its ops)
from .registry import LOWER

__all__ = ["LOWER", "launches", "working_sizes"]


def launches(
    plan: Plan, m: int, mode: Mode, precision: Precision = Precision.FLOAT32, *, blas: bool = False
) -> tuple[Launch, ...]:
    """The launches of a run over m rows, in order; with `blas`, cuBLAS does large products."""
    return tuple(_written(plan, m, mode, precision, blas).launches)


def working_sizes(plan: Plan, precision: Precision = Precision.FLOAT32, *, blas: bool = False) -> dict[Area, int]:
    """Elements for temporaries and for results that stay through a run, for up to `plan.batch_rows` rows."""
    written = [_written(plan, plan.batch_rows, mode, precision, blas) for mode in Mode]
    return {Area.TEMPORARY: max(w.most_used for w in written), Area.KEPT: max(w.most_kept for w in written)}


def wants_blas(plan: Plan, precision: Precision) -> bool:
    """Whether a product of the plan is large enough for cuBLAS."""
    written = (launches(plan, plan.batch_rows, mode, precision, blas=True) for mode in Mode)
    return any(launch.kernel == BLAS for found in written for launch in found)


def _written(plan: Plan, m: int, mode: Mode, precision: Precision, blas: bool) -> Writer:
    w = Writer(plan, m, mode, precision, blas=blas)
    ops = [op for op in plan.ops if op.modes & mode]
    biases = _biases(ops)
    for i, op in enumerate(ops):
        if i in biases:
            LOWER[op.code](w, w.operands(op), w.operands(ops[biases[i]]))
        elif i not in biases.values():
            LOWER[op.code](w, w.operands(op))
    return w


def _biases(ops: Sequence[Op]) -> dict[int, int]:
    """For weight gradients, by position, the op that sums the same dz for the bias: one more row of the product can do
    it. The ops between the two touch neither dz nor the bias."""
    sums_of = {
        OpCode.WGRAD: OpCode.COLSUM,
        OpCode.WGRAD_UPDATE: OpCode.COLSUM_UPDATE,
        OpCode.SPARSE_WGRAD: OpCode.COLSUM,
        OpCode.SPARSE_WGRAD_UPDATE: OpCode.COLSUM_UPDATE,
    }
    between = {OpCode.COLUMN_DECAY, OpCode.DECAY}
    out = {}
    for i, op in enumerate(ops):
        if op.code in sums_of:
            j = next((j for j in range(i + 1, len(ops)) if ops[j].code not in between), i)
            dz, sums = op.slots[_slot(op, "dz")], ops[j]
            plain = sums.code is sums_of[op.code] and sums.slots[_slot(sums, "x")] == dz
            # A gradient of shifted rows needs the sums itself.
            plain = plain and ("shift" not in SIGNATURES[op.code].slots or op.slots[_slot(op, "shift")] < 0)
            if plain and (sums.code is OpCode.COLSUM_UPDATE or not _scaled(sums)):
                out[i] = j
    return out


def _slot(op: Op, name: str) -> int:
    return SIGNATURES[op.code].slots.index(name)


def _scaled(colsum: Op) -> bool:
    return colsum.slots[_slot(colsum, "weight")] >= 0 or bool(colsum.ints[SIGNATURES[colsum.code].ints.index("mean")])
