"""What the native backend is given is refused or harmless: plans, sizes, data, rows and numbers of batches. The tables
that it reads are those of the plan.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from functools import cache

import numpy as np
import pytest

from cases import CASES
from narrows.backends import Hyper
from narrows.backends.cpp import CppProgram
from narrows.plan.ops import SIGNATURES, OpCode, Source
from narrows.plan.plan import Mode, Plan, Region, Slot
from narrows.plan.spec import ACTIVATIONS, LOSSES, Activation, Loss, Precision
from native_plans import batches_plan, every_plan, rich_plan, started
from networks import Case, network

pytestmark = pytest.mark.usefixtures("cpp")


def test_enumerations_are_those_of_the_plan() -> None:
    from narrows import _core

    info = _core.build_info()
    signatures = [SIGNATURES[op] for op in OpCode]
    assert info["ops"] == [
        (op.name, list(s.slots), [name for name in s.slots if name in s.writes], list(s.ints), list(s.floats))
        for op, s in zip(OpCode, signatures, strict=True)
    ]
    assert info["activation_names"] == [a.name for a in Activation]
    assert info["loss_names"] == [loss.name for loss in Loss]
    assert info["op_size"] == rich_plan().op_table().dtype.itemsize
    assert {*ACTIVATIONS.values()} == {*Activation}
    assert {info.loss for info in LOSSES.values()} == {*Loss}


Tables = tuple[np.ndarray, np.ndarray]
"""The slots and the ops of a plan, as the native backend reads them."""


def compile_tables(plan: Plan, slots: np.ndarray, ops: np.ndarray, **changes: object) -> object:
    from narrows import _core

    arguments = {
        "batch": plan.batch_rows,
        "parameter_size": plan.parameter_size,
        "work_size": plan.work_size,
        "moments": plan.n_moments,
        "precision": 0,
        "n_threads": 1,
    } | changes
    return _core.Program(slots, ops, **arguments)


@pytest.mark.parametrize(
    "changes",
    [
        {"batch": 0},
        {"batch": -1},
        {"batch": 2**40},
        {"batch": 30},
        {"parameter_size": 16},
        {"parameter_size": -16},
        {"parameter_size": 2**60},
        {"work_size": 17},
        {"work_size": 2**62},
        {"moments": 0},
        {"moments": 1},
        {"moments": 3},
        {"n_threads": 0},
        {"n_threads": 10**6},
    ],
)
def test_absurd_sizes_are_refused_at_once(changes: dict[str, int]) -> None:
    plan = rich_plan()
    start = time.perf_counter()
    with pytest.raises(ValueError, match=r"plan|threads"):
        compile_tables(plan, plan.slot_table(), plan.op_table(), **changes)
    assert time.perf_counter() - start < 5, "refused before any work"


@every_plan
def test_random_damage_to_a_plan_is_refused_or_harmless(make: Callable[[], Plan]) -> None:
    """Fuzz: any table either raises ValueError or runs within its memory (guarded by the address sanitizer build)."""
    plan = make()
    rng = np.random.default_rng(1)
    refused = 0
    for _ in range(1000):
        slots, ops = plan.slot_table(), plan.op_table()
        flat = [slots.reshape(-1), ops.view(np.uint8)][int(rng.integers(2))]
        if flat.dtype == np.int64:
            flat[rng.integers(len(flat))] = rng.choice([-1, 0, 1, 15, 16, 48, 2**31, 2**40, 2**62, -(2**62)])
        else:
            flat[rng.integers(len(flat))] = rng.integers(256)
        try:
            program = compile_tables(plan, slots, ops)
        except ValueError:
            refused += 1
            continue
        X = np.zeros((40, 37), np.float32)
        try:
            for source, columns in enumerate((37, 37, 1, plan.spec.n_components)):
                program.bind_dense(0, source, X[:, :columns] if columns > 1 else X[:, 0])
            program.bind_dense(0, Source.SHIFT, X[:1])
            program.bind_dense(0, Source.CONDITION, X[:, 0])
            program.train(np.arange(40), 0, 0, np.full(2, 1e-3), None)
        except ValueError:
            refused += 1
    assert refused > 350


@every_plan
def test_shapes_are_checked_op_by_op(make: Callable[[], Plan]) -> None:
    plan = make()
    for position, op in enumerate(plan.ops):
        for i, slot in enumerate(op.slots):
            if slot < 0:
                continue
            ops = plan.op_table()
            ops["slots"][position, i] = len(plan.slots)
            name = SIGNATURES[op.code].slots[i]
            with pytest.raises(ValueError, match=rf"op {position} \({op.code.name}\).*operand {name} is slot"):
                compile_tables(plan, plan.slot_table(), ops)


SQUARE = Case("square", network((9, 9, 9, 9), hidden=Activation.GELU, output=Activation.GELU))
"""Whose slots have one shape."""


@cache
def each_form() -> list[tuple[Plan, Tables, int]]:
    """A plan, its tables and a position in it for each form of an op: its present operands and its integers."""
    forms = {}
    for plan in (case.plan for case in (*CASES, SQUARE)):
        tables = plan.slot_table(), plan.op_table()
        for position, op in enumerate(plan.ops):
            there = tuple(slot >= 0 for slot in op.slots)
            forms.setdefault((op.code, there, op.ints, plan is SQUARE.plan), (plan, tables, position))
    return list(forms.values())


ANY_SHAPE = {
    OpCode.CONDITION: {"out", "z"},
    OpCode.CONTRACTIVE: {"W"},
    OpCode.CORRUPT: {"x"},
    OpCode.COTANGENT: {"slopes", "dslopes"},
    OpCode.COUNTS: {"z"},
    OpCode.CURVES: {"dslopes"},
    OpCode.DRAW: {"mean"},
    OpCode.DROPOUT: {"x"},
    OpCode.GATHER: {"out"},
    OpCode.GRAIN_SUM: {"partial", "out"},
    OpCode.GRAIN_UPDATE: {"partial"},
    OpCode.GRAM: {"W"},
    OpCode.KEEP: {"out"},
    OpCode.LINK: {"z"},
    OpCode.LOG_NORMALIZE: {"x"},
    OpCode.MEANS: {"z", "out"},
    OpCode.PROBE: {"out"},
    OpCode.REDUCE: {"x", "terms"},
    OpCode.SHIFT: {"out"},
    OpCode.SHRINK: {"W"},
    OpCode.SLOPES: {"saved", "out"},
    OpCode.SPARSE_DENSE: {"W"},
    OpCode.SPARSE_WGRAD: {"dW"},
    OpCode.SQUARED_NORM: {"x"},
    OpCode.TANGENT: {"slopes"},
}
"""Operands that may have another shape: nothing else says which, or they have room for more than is used."""
MAY_BE_ONE = {(OpCode.LOSS, "rowloss", "weight"), (OpCode.ACTIVITY_L1, "rowpenalty", "weight")}
"""Operands of which a row is read before it is written, by one thread."""


def takes(plan: Plan, tables: Tables, position: int, operand: int, slot: int) -> bool:
    """Whether the plan is accepted with another slot in place of an operand."""
    slots, ops = tables[0], tables[1].copy()
    ops["slots"][position, operand] = slot
    try:
        compile_tables(plan, slots, ops)
    except ValueError:
        return False
    return True


def test_operands_of_another_shape_are_refused() -> None:
    def shape(slot: Slot) -> tuple[bool, int, int]:
        of_batch = slot.region is Region.BATCH
        return of_batch, 0 if of_batch else slot.rows, slot.cols

    accepted = set()
    for plan, tables, position in each_form():
        op, others = plan.ops[position], {shape(slot): j for j, slot in enumerate(plan.slots)}
        for i, name in enumerate(SIGNATURES[op.code].slots):
            for found, j in others.items():
                other = op.slots[i] >= 0 and found != shape(plan.slots[op.slots[i]])
                if other and takes(plan, tables, position, i, j):
                    accepted.add((op.code, name))
    assert accepted <= {(code, name) for code, names in ANY_SHAPE.items() for name in names}


def test_what_is_written_is_no_other_operand() -> None:
    accepted, tried = set(), set()
    for plan, tables, position in each_form():
        op = plan.ops[position]
        signature = SIGNATURES[op.code]
        for i, j in itertools.permutations(range(len(op.slots)), 2):
            one, other = signature.slots[i], signature.slots[j]
            a, b = (None if op.slots[k] < 0 else plan.slots[op.slots[k]] for k in (i, j))
            if a is None or b is None or a is b or not {one, other} & set(signature.writes):
                continue
            if (a.region, a.rows, a.cols) != (b.region, b.rows, b.cols):
                continue
            tried.add((op.code, *sorted((one, other))))
            if takes(plan, tables, position, i, op.slots[j]):
                accepted.add((op.code, *sorted((one, other))))
    assert accepted <= MAY_BE_ONE
    assert len(tried) > 50


def test_bad_bindings_and_rows() -> None:
    program = started(rich_plan())
    one = Hyper(0, 0, np.ones(1))
    with pytest.raises(ValueError, match="38 columns, the plan expects 37"):
        program.bind(np.zeros((3, 38), np.float32))
    with pytest.raises(IndexError, match="row 60 of a source with 60 rows"):
        program.train(np.array([0, 60]), one)
    with pytest.raises(IndexError, match="row -1"):
        program.train(np.array([-1]), one)
    with pytest.raises(TypeError, match="float16"):
        program.bind(np.zeros((3, 37), np.float16))
    with pytest.raises(ValueError, match="learning rates"):
        program.train(np.arange(60), Hyper(0, 0, np.ones(2)))
    with pytest.raises(ValueError, match="not bound"):
        CppProgram(rich_plan(), Precision.FLOAT32, 1).train(np.arange(3), one)


@pytest.mark.parametrize(
    ("indptr", "indices", "message"),
    [
        ([0, 2, 1], [0, 1], "decreases at row 1"),
        ([1, 1, 2], [0, 1], "start at 0"),
        ([0, 1, 9], [0, 1], "past the 2 stored"),
        ([0, 1, 2], [0, 37], "column 37 of 37"),
        ([0, 1, 2], [0, -1], "column -1"),
    ],
)
def test_damaged_csr_is_refused(indptr: list[int], indices: list[int], message: str) -> None:
    program = started(rich_plan())
    for kind in (np.int32, np.int64):
        with pytest.raises(ValueError, match=message):
            program._program.bind_csr(0, 0, np.array(indptr, kind), np.array(indices, kind), np.ones(2, np.float32), 37)


@pytest.mark.parametrize("number", [-1, 3, 0.5, np.nan, np.inf])
def test_numbers_of_batches_are_checked(number: float) -> None:
    program = started(batches_plan())
    for kind in (np.float32, np.float64):
        numbers = np.zeros(60, kind)
        numbers[41] = number
        with pytest.raises(ValueError, match=r"batch number .* in row 41 is outside 0\.\.2"):
            program._program.bind_dense(0, Source.CONDITION, numbers)
    with pytest.raises(ValueError, match="2 columns, the plan expects 1"):
        program._program.bind_dense(0, Source.CONDITION, np.zeros((60, 2)))
    index = np.zeros(61, np.int32)
    with pytest.raises(ValueError, match="must be dense"):
        program._program.bind_csr(0, Source.CONDITION, index, index[:0], np.zeros(0), 1)
    with pytest.raises(ValueError, match="source 5 has 30 rows, expected 31"):
        program.apply(np.ones((31, 37), np.float32), Mode.SCORE, condition=np.zeros(30))
    with pytest.raises(ValueError, match="source 5 is not bound"):
        program.apply(np.ones((31, 37), np.float32), Mode.SCORE)


@pytest.mark.parametrize("width", [5, 4, 3])
def test_a_slot_without_room_for_a_batch_is_refused(width: int) -> None:
    plan = batches_plan()
    slots = plan.slot_table()
    slots[plan.index["conditioned"], 2] = width
    with pytest.raises(ValueError, match=r"CONDITION.*operand out has shape"):
        compile_tables(plan, slots, plan.op_table())
