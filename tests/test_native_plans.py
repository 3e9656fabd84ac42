"""What the native backend is given is refused or harmless: plans, sizes, data, rows and numbers of batches. The tables
that it reads are those of the plan.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import pytest

from narrows.backends import BATCH, SHIFT, Hyper
from narrows.backends.cpp import CppProgram
from narrows.ops import SIGNATURES, OpCode
from narrows.plan import Mode, Plan
from narrows.spec import ACTIVATIONS, LOSSES, Activation, Loss, Precision
from native_plans import batches_plan, every_plan, rich_plan, started

pytestmark = pytest.mark.usefixtures("cpp")


def test_enumerations_are_those_of_the_plan() -> None:
    from narrows import _core

    info = _core.build_info()
    assert info["ops"] == [
        (
            op.name,
            len(s.slots),
            len(s.ints),
            len(s.floats),
            sum(1 << i for i, name in enumerate(s.slots) if name in s.reads),
            sum(1 << i for i, name in enumerate(s.slots) if name in s.writes),
        )
        for op in OpCode
        for s in [SIGNATURES[op]]
    ]
    assert info["activation_names"] == [a.name for a in Activation]
    assert info["loss_names"] == [loss.name for loss in Loss]
    assert info["op_size"] == rich_plan().op_table().dtype.itemsize
    assert {*ACTIVATIONS.values()} == {*Activation}
    assert {*LOSSES.values()} == {*Loss}
    assert {*SIGNATURES} == {*OpCode}


def compile_tables(plan: Plan, slots: np.ndarray, ops: np.ndarray, **changes: object) -> object:
    from narrows import _core

    arguments = {
        "batch": plan.batch,
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
    for _ in range(3000):
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
            program.bind_dense(0, SHIFT, X[:1])
            program.bind_dense(0, BATCH, X[:, 0])
            program.train(np.arange(40), 0, 0, np.full(2, 1e-3), None)
        except ValueError:
            refused += 1
    assert refused > 1000


@every_plan
def test_shapes_are_checked_op_by_op(make: Callable[[], Plan]) -> None:
    plan = make()
    for position, op in enumerate(plan.ops):
        for i, slot in enumerate(op.slots):
            if slot < 0:
                continue
            ops = plan.op_table()
            ops["slots"][position, i] = len(plan.slots)
            with pytest.raises(ValueError, match=rf"op {position} \({op.code.name}\).*operand {i}"):
                compile_tables(plan, plan.slot_table(), ops)


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
        with pytest.raises(ValueError, match=r"in row 41 is no number of one of 3 batches"):
            program._program.bind_dense(0, BATCH, numbers)
    with pytest.raises(ValueError, match="2 columns, the plan expects 1"):
        program._program.bind_dense(0, BATCH, np.zeros((60, 2)))
    index = np.zeros(61, np.int32)
    with pytest.raises(ValueError, match="must be dense"):
        program._program.bind_csr(0, BATCH, index, index[:0], np.zeros(0), 1)
    with pytest.raises(ValueError, match="source 5 has 30 rows, expected 31"):
        program.apply(np.ones((31, 37), np.float32), Mode.SCORE, batch=np.zeros(30))
    with pytest.raises(ValueError, match="source 5 is not bound"):
        program.apply(np.ones((31, 37), np.float32), Mode.SCORE)


@pytest.mark.parametrize("width", [5, 4, 3])
def test_a_slot_without_room_for_a_batch_is_refused(width: int) -> None:
    plan = batches_plan()
    slots = plan.slot_table()
    slots[plan.index["conditioned"], 2] = width
    with pytest.raises(ValueError, match=r"CONDITION.*out has shape"):
        compile_tables(plan, slots, plan.op_table())
