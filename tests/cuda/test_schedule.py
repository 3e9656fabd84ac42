"""Combined launches of the CUDA backend: they give the same bits as single launches, and a step takes few.

The tests compare the memory of the host's device before and after each launch with what `schedule` knows of it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp

from agreement import inference
from cases import CASES, MODEL_CASES
from cuda_device import HostDevice, program_on, thinned
from narrows.backends import Hyper
from narrows.backends.cuda import program as programs
from narrows.backends.cuda.emit import launches
from narrows.backends.cuda.launches import Area, Launch, Sink, View, stored
from narrows.backends.cuda.layout import Operands
from narrows.backends.cuda.program import CudaProgram
from narrows.backends.cuda.schedule import by_rows, grouped, independent, schedule, touched
from narrows.backends.cuda.table import KERNELS, MAX_STAGES
from narrows.plan.plan import Mode
from narrows.plan.spec import Activation, Corruption, Loss, Precision, Solver
from networks import ELEMENTWISE, Case, network
from oracle import SEED, STEP

_DEEP = (9, *(8, 7) * 7)
STACK_CASES = (
    *(Case(f"act-{a.name}", network((7, 6, 3, 6, 7), a, a, a, weighted=True)) for a in ELEMENTWISE),
    *(
        Case(f"huber-{a.name}", network((7, 6, 3, 6, 7), output=a, loss=Loss.HUBER))
        for a in (Activation.LINEAR, Activation.SILU, Activation.TANH)
    ),
    Case("bce", network((7, 6, 3, 6, 7), output=Activation.SIGMOID, loss=Loss.BCE)),
    # On both sides of the limits: threads per column, slices of a weight, stages of a stack.
    Case("widths", network((40, 128, 65, 64, 33, 32, 33, 64, 65, 128, 40))),
    Case("slices", network((33, 31, 1, 31, 33), tied=True)),
    Case("wide", network((129, 128, 30, 128, 129))),
    Case("deep", network(_DEEP + _DEEP[-2::-1])),
    Case("rows", network((17, 9, 4, 9, 17), weight_l1=0.1, alpha=0.1), batch=1100, rows=1100),
    Case(
        "apart", network((17, 9, 4, 9, 17), separate_target=True, corruption=Corruption.MASKING, corruption_level=0.3)
    ),
    Case("dropout", network((17, 9, 4, 9, 17), Activation.GELU, dropout=0.3, solver=Solver.SGD)),
    Case("clipped", network((17, 9, 4, 9, 17), clip_norm=1.0)),
)
SCHEDULED = (*STACK_CASES, *CASES[::5])
dtypes = pytest.mark.parametrize("dtype", [np.float32, np.float64, Precision.BFLOAT16], ids=["f32", "f64", "bf16"])

Schedule = Callable[[Sequence[Launch], Launch, Launch], Sequence[Launch]]


def one_by_one(launches: Sequence[Launch], begin: Launch, end: Launch) -> tuple[Launch, ...]:
    return begin, *launches, end


def programs_of(libraries: Any, case: Case, dtype: Any, patch: pytest.MonkeyPatch, how: Schedule) -> CudaProgram:
    patch.setattr(programs, "schedule", how)
    return program_on(HostDevice(libraries), case, dtype)


def results(program: CudaProgram, case: Case, sparse: bool) -> list[Any]:
    data = case.data(program.dtype)
    if sparse:
        program.bind(sp.csr_array(data.X), data.target, data.weight, data.condition)
    steps = -(-case.rows // case.batch)
    terms, gradient = program.gradient(np.arange(min(case.batch, case.rows)), SEED, STEP)
    found = [terms, *gradient.values()]
    found.append(program.train(np.arange(case.rows), Hyper(SEED, STEP, np.full(steps, 1e-2))))
    found += program.state().values()
    return found + [program.apply(data.X, mode, data.target, data.condition) for mode in inference]


@dtypes
@pytest.mark.parametrize("case", thinned(SCHEDULED, 3), ids=str)
def test_bits_are_those_of_launches_one_by_one(
    libraries: Any, case: Case, dtype: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    sparse = case.name == "widths"
    found, expected = (
        results(programs_of(libraries, case, dtype, monkeypatch, how), case, sparse) for how in (schedule, one_by_one)
    )
    assert [np.asarray(a).tobytes() for a in found] == [np.asarray(a).tobytes() for a in expected]


def test_a_stack_of_many_rows_has_more_rows_per_block(libraries: Any) -> None:
    kernels = {
        launch.kernel
        for name in ("rows", "deep")
        for case in STACK_CASES
        if case.name == name
        for launch in program_on(HostDevice(libraries), case).steps(Mode.TRAIN, case.batch)
    }
    assert {"stack<4>", "stack<16>"} <= kernels


# --- what launches touch ----------------------------------------------------------------------------------------------


def watch(program: CudaProgram) -> Counter[str]:
    """Make a program run launch by launch and check its memory after each. Returns the kernels that ran."""
    [(memory, _, _)] = [entry for address, entry in program.device.memory.items() if address == program._base]  # type: ignore[attr-defined]
    step = program.arena.begins["step"], program.arena.begins["begun"]
    ran: Counter[str] = Counter()

    def graph(mode: Mode, m: int, n: int = 1) -> Callable[[], None]:
        steps = program.steps(mode, m) * n
        runs = [program.device.graph([program._planned(launch, mode, m)], program.precision) for launch in steps]

        def run() -> None:
            for launch, once in zip(steps, runs, strict=True):
                before = memory.copy()
                once()
                known = np.zeros(len(memory), bool)
                for part in touched(launch):
                    begin, size = program._address(part.view) - program._base, program.dtype.itemsize
                    doubles = 2 if part.view.area in (Area.TEMPORARY, Area.KEPT) else 1
                    end = (part.view.rows - 1) * part.view.ld + part.view.cols
                    known[begin : begin + end * size * doubles] |= part.written
                if launch.kernel == "begin_step" or any(member.kernel == "begin_step" for member in launch.members):
                    known[slice(*step)] = True
                assert not ((before != memory) & ~known).any(), launch
                ran[launch.kernel] += 1

        return run

    program._graph = graph  # type: ignore[method-assign]
    return ran


@pytest.mark.parametrize("case", [*STACK_CASES[::3], *MODEL_CASES[::7], *CASES[1::13]], ids=str)
def test_launches_write_only_their_known_memory(libraries: Any, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    for how in (schedule, one_by_one):
        program = programs_of(libraries, case, np.float32, monkeypatch, how)
        ran = watch(program)
        program.gradient(np.arange(min(case.batch, case.rows)), SEED, STEP)
        program.train(np.arange(case.rows), Hyper(SEED, STEP, np.full(-(-case.rows // case.batch), 1e-2)))
        assert ran


# --- the order of launches --------------------------------------------------------------------------------------------


def begin_and_end() -> tuple[Launch, Launch]:
    names = ("records", "begun", "terms", "kept")
    operands = Operands("step", **{name: View(Area.CONTROL, 64 * i, 1, 16, 16) for i, name in enumerate(names)})
    return Launch("begin_step", 1, 32, operands), Launch("end_step", 1, 32, operands)


@pytest.mark.parametrize("case", thinned([*STACK_CASES, *CASES], 2), ids=str)
def test_launches_that_depend_on_each_other_keep_their_order(case: Case) -> None:
    begin, end = begin_and_end()
    for m in {1, case.batch}:
        for mode in Mode:
            written = launches(case.plan, m, mode)
            steps = schedule(written, begin, end)
            places: dict[tuple[Any, ...], list[tuple[int, int]]] = {}
            for i, launch in enumerate(steps):
                assert launch.kernel in KERNELS
                for k, member in enumerate(launch.members or (launch,)):
                    places.setdefault(identity(member), []).append((i, k))
            order = [places[identity(launch)].pop(0) for launch in (begin, *written, end)]
            assert not any(places.values()), "nothing else runs"
            for (one, a), (other, b) in combinations(zip(order[1:-1], written, strict=True), 2):
                if independent(a, b):
                    continue
                together = one[0] == other[0] and one < other
                kernel = steps[one[0]].kernel
                ends = {a.kernel, b.kernel} <= {"reduce"}
                assert one[0] < other[0] or (together and (ends or (kernel.startswith("stack") and by_rows(a, b))))


def identity(launch: Launch) -> tuple[str, frozenset[View]]:
    """What a launch and its stage in a stack have in common."""
    return launch.kernel, frozenset(launch.views.values())


def product(to: Sink, left: View, right: View, sides: str = "Turned, Turned") -> Launch:
    sizes = {"rows": left.cols, "cols": right.cols, "depth": left.rows}
    if sides != "Turned, Turned":
        sizes |= {"rows": left.rows, "depth": left.cols}
    own = Operands("gemm", left=left, right=right, **sizes, rounds=1)
    return Launch(f"gemm<Small, {sides}, {to.epilogue}>", 1, 256, (own + to.operands).checked())


def product_of(W: int, x: int) -> Launch:
    to = stored(View(Area.GRADIENT, W, 4, 4, 16))
    return product(to, View(Area.WORK, x, 4, 4, 16), View(Area.WORK, x + 64, 4, 4, 16))


def copy(x: View, out: View) -> Launch:
    return Launch("copy", 1, 32, Operands("KEEP", x=x, out=out))


def test_launches_pass_only_independent_launches() -> None:
    reader = copy(View(Area.GRADIENT, 64, 4, 4, 16), View(Area.WORK, 512, 4, 4, 16))
    one, two, three = (product_of(64 * i, 128 * i) for i in range(3))
    assert [len(launch.members) for launch in grouped([one, two, three])] == [3]
    # `reader` reads the second gradient, so its writer stays before it; later launches may pass.
    assert [len(launch.members) for launch in grouped([one, two, reader, three])] == [3, 0]
    assert [len(launch.members) for launch in grouped([one, reader, two, three])] == [0, 0, 2]
    assert [len(launch.members) for launch in grouped([one, one, two])] == [0, 2]
    many = [product_of(64 * i, 128 * i) for i in range(11)]
    assert [len(launch.members) for launch in grouped(many)] == [8, 3]


def test_temporaries_count_as_one_area() -> None:
    """Their sizes are in elements, but the elements may be doubles."""
    one, other = (copy(View(Area.WORK, i, 1, 16, 16), View(Area.TEMPORARY, i, 1, 16, 16)) for i in (0, 64))
    assert not independent(one, other)


def test_rows_that_share_memory_end_a_stack() -> None:
    """A slot that reuses the memory of another one, with other rows."""
    x, W, a = View(Area.WORK, 0, 8, 32, 32), View(Area.PARAMETER, 0, 32, 16, 16), View(Area.WORK, 256, 8, 16, 16)
    V, over = View(Area.PARAMETER, 512, 16, 16, 16), View(Area.WORK, 0, 8, 16, 16)
    name = "gemm<Small, Rows, Turned, Activate<Relu>>"

    def activated(x: View, W: View, out: View) -> Launch:
        to = Sink("Activate<Relu>", Operands("Activate", b=None, out=out, pre=None))
        return product(to, x, W, "Rows, Turned")

    first, second = activated(x, W, a), activated(a, V, over)
    assert not by_rows(first, second)
    begin, end = begin_and_end()
    kernels = [launch.kernel for launch in schedule([first, second], begin, end)]
    assert kernels == ["begin_step", name, name, "end_step"]
    apart = activated(a, V, View(Area.WORK, 512, 8, 16, 16))
    assert [launch.kernel for launch in schedule([first, apart], begin, end)] == ["stack<4>", "end_step"]


def test_a_stack_has_room_for_the_beginning_of_a_step() -> None:
    case = next(case for case in STACK_CASES if case.name == "deep")
    steps = schedule(launches(case.plan, 8, Mode.TRAIN), *begin_and_end())
    stacks = [launch for launch in steps if launch.kernel.startswith("stack")]
    assert len(stacks) == 3
    assert len(stacks[0].members) == MAX_STAGES
