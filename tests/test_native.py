"""What only the native backend promises: hostile plans are refused, forks and signals are safe, every instruction set
is tested, and nothing is written outside its slot."""

from __future__ import annotations

import dataclasses
import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cases import CPU_PRECISIONS, GRAM_CASES, SHIFTED_CASES, SPARSE_CASES
from narrows.backends import BATCH, SHIFT, Hyper, probe
from narrows.backends.reference import ReferenceProgram
from narrows.images import Convolution
from narrows.lowering import lower
from narrows.ops import SIGNATURES, OpCode
from narrows.plan import Mode, Plan, Region
from narrows.spec import ACTIVATIONS, LOSSES, Activation, Corruption, LayerSpec, Loss, NetworkSpec, Precision, Solver
from networks import Case, network

if not probe("cpp").ok:
    pytest.skip(f"no native backend: {probe('cpp').reason}", allow_module_level=True)

from narrows import _core
from narrows.backends.cpp import CppProgram, probe_machine

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc or limits the address space")


def small_spec(**changes: object) -> NetworkSpec:
    layers = (
        LayerSpec(37, 70, Activation.GELU, dropout=0.2),
        LayerSpec(70, 19, Activation.SIGMOID),
        LayerSpec(19, 70, Activation.TANH, dropout=0.1),
        LayerSpec(70, 37, Activation.LINEAR),
    )
    return NetworkSpec(layers, 2, **changes)  # type: ignore[arg-type]


def rich_plan(batch: int = 29) -> Plan:
    return lower(
        small_spec(
            activity_l1=0.1,
            kl_sparsity=0.2,
            alpha=0.1,
            weight_l1=0.1,
            clip_norm=1.0,
            weighted=True,
            solver=Solver.ADAMW,
            corruption=Corruption.GAUSSIAN,
            corruption_level=0.3,
        ),
        batch,
    )


def variational_plan(batch: int = 29) -> Plan:
    layers = (
        LayerSpec(37, 70, Activation.GELU, dropout=0.2),
        LayerSpec(70, 38, Activation.LINEAR),
        LayerSpec(19, 37, Activation.TANH),
    )
    return lower(NetworkSpec(layers, 2, loss=Loss.GAUSSIAN, variational=True, weighted=True), batch)


def contractive_plan(batch: int = 29) -> Plan:
    layers = (
        LayerSpec(37, 70, Activation.GELU),
        LayerSpec(70, 33, Activation.SIGMOID),
        LayerSpec(33, 19, Activation.TANH),
        LayerSpec(19, 37, Activation.LINEAR),
    )
    penalties = {"contractive": 0.3, "contractive_hessian": 0.2, "n_corruptions": 2}
    return lower(NetworkSpec(layers, 3, weighted=True, **penalties), batch)  # type: ignore[arg-type]


def probing_plan(batch: int = 29) -> Plan:
    spec = dataclasses.replace(contractive_plan(batch).spec, contractive_hessian=0.0, contractive_probes=2)
    return lower(spec, batch)


def closed_plan(batch: int = 29) -> Plan:
    layers = (LayerSpec(37, 70, Activation.SOFTPLUS), LayerSpec(70, 37, Activation.LINEAR))
    return lower(NetworkSpec(layers, 1, contractive=0.3, contractive_hessian=0.2, weighted=True), batch)


def boltzmann_plan(batch: int = 29) -> Plan:
    layers = LayerSpec(37, 70, Activation.SIGMOID), LayerSpec(70, 37, Activation.LINEAR, tied_to=0)
    spec = NetworkSpec(layers, 1, n_gibbs=2, n_chains=batch + 3, weighted=True, alpha=0.1, solver=Solver.SGD)
    return lower(spec, batch)


def convolution_plan(batch: int = 29) -> Plan:
    def conv(shape: tuple[int, int, int], filters: int, kernel: int, **options: Any) -> Convolution:
        return Convolution.of(shape, filters, (1, kernel), **options)

    layers = (
        conv((1, 37, 1), 17, 2, padding="valid", pool=(1, 3)),
        conv((1, 12, 17), 5, 3, strides=(1, 2)),
        19,
        10,
        conv((1, 1, 10), 3, 2, upsample=(1, 19)),
        conv((1, 19, 3), 1, 1, strides=(1, 2), padding="valid", transposed=True),
    )
    specs, width = [], 37
    for i, layer in enumerate(layers):
        n_out = layer if isinstance(layer, int) else layer.n_out
        activation = Activation.GELU if i < len(layers) - 1 else Activation.LINEAR
        specs.append(LayerSpec(width, n_out, activation, convolution=None if isinstance(layer, int) else layer))
        width = n_out
    return lower(NetworkSpec(tuple(specs), 3, weighted=True, alpha=0.1), batch)


def probing_convolution_plan(batch: int = 29) -> Plan:
    return lower(dataclasses.replace(convolution_plan().spec, contractive=0.3, contractive_probes=2), batch)


def sparse_plan(batch: int = 20) -> Plan:
    noise = {"corruption": Corruption.MASKING, "corruption_level": 0.2}
    return lower(small_spec(sparse_input=True, weighted=True, alpha=0.1, weight_l1=0.01, **noise), batch)


def gram_plan(batch: int = 20) -> Plan:
    spec = small_spec(sparse_input=True, weighted=True, alpha=0.1, loss=Loss.MSE, gram_decoder=True)
    layers = (*spec.layers[:-1], dataclasses.replace(spec.layers[-1], activation=Activation.LINEAR, tied_to=None))
    return lower(dataclasses.replace(spec, layers=layers), batch)


def shifted_plan(batch: int = 20) -> Plan:
    return lower(dataclasses.replace(gram_plan().spec, shifted=True), batch)


def counts_plan(batch: int = 29) -> Plan:
    layers = (
        LayerSpec(37, 19, Activation.TANH),
        LayerSpec(19, 5, Activation.LINEAR),
        LayerSpec(5, 19, Activation.TANH),
        LayerSpec(19, 37, Activation.SOFTMAX),
    )
    options = {"loss": Loss.NB, "log_normalize": True, "library": 40.0}
    return lower(NetworkSpec(layers, 2, weighted=True, sparse_input=True, **options), batch)  # type: ignore[arg-type]


def inflated_plan(batch: int = 29) -> Plan:
    layers = LayerSpec(37, 19, Activation.TANH), LayerSpec(19, 3 * 37, Activation.EXP)
    options = {"loss": Loss.ZINB, "cell_dispersion": True, "log_normalize": True, "library": 40.0}
    return lower(NetworkSpec(layers, 1, weighted=True, **options), batch)  # type: ignore[arg-type]


def batches_plan(batch: int = 29) -> Plan:
    layers = (
        LayerSpec(37, 19, Activation.TANH),
        LayerSpec(19, 10, Activation.LINEAR),
        LayerSpec(5 + 3, 19, Activation.TANH),
        LayerSpec(19, 37, Activation.SOFTMAX),
    )
    options = {"loss": Loss.NB, "log_normalize": True, "library": 40.0, "variational": True, "n_batches": 3}
    return lower(NetworkSpec(layers, 2, weighted=True, **options), batch)  # type: ignore[arg-type]


def gram_batches_plan(batch: int = 29) -> Plan:
    layers = LayerSpec(37, 5, Activation.TANH), LayerSpec(5 + 17, 37, Activation.LINEAR)
    options = {"weighted": True, "sparse_input": True, "gram_decoder": True, "n_batches": 17}
    return lower(NetworkSpec(layers, 1, **options), batch)  # type: ignore[arg-type]


PLANS = (
    rich_plan, variational_plan, contractive_plan, probing_plan, closed_plan, boltzmann_plan, convolution_plan,
    probing_convolution_plan,
    sparse_plan, gram_plan, shifted_plan, counts_plan, inflated_plan, batches_plan, gram_batches_plan,
)  # fmt: skip
every_plan = pytest.mark.parametrize("make", PLANS, ids=lambda make: make.__name__)


def started(plan: Plan, dtype: Any = np.float32, n_rows: int = 60, **options: int) -> CppProgram:
    """A program with parameters and data."""
    rng = np.random.default_rng(0)
    precision = Precision.of(dtype)
    program = CppProgram(plan, precision, **{"n_threads": 2, **options})
    program.load({s.name: rng.normal(size=(s.rows, s.cols)) * 0.3 for s in plan.parameters})
    data = rng.random((n_rows, plan.spec.n_features)).astype(precision.dtype)
    if plan.spec.loss.of_counts:
        data = np.floor(2 * data / (1.1 - data))
    program.bind(data, weight=np.ones(n_rows, precision.dtype), batch=numbers_of(plan, n_rows))
    return program


def numbers_of(plan: Plan, n_rows: int) -> np.ndarray | None:
    """Of batches."""
    return np.arange(n_rows, dtype=np.float32) % plan.spec.n_batches if plan.spec.n_batches else None


def test_enumerations_are_those_of_the_plan() -> None:
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


# --- hostile plans --------------------------------------------------------------------------------------------------


def compile_tables(plan: Plan, slots: np.ndarray, ops: np.ndarray, **changes: object) -> object:
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


# --- memory ---------------------------------------------------------------------------------------------------------


@every_plan
@pytest.mark.parametrize("dtype", CPU_PRECISIONS, ids=str)
def test_no_stray_write(dtype: Precision, make: Callable[[], Plan]) -> None:
    """Every element of the arena that belongs to no slot still holds its poison after training and inference."""
    plan = make()
    program = started(plan, dtype)
    arena = program.arena()
    owned = np.zeros(arena.size, bool)
    base = {r: r * plan.parameter_size for r in range(2 + plan.n_moments)}
    work = (2 + plan.n_moments) * plan.parameter_size
    for slot in plan.slots:
        starts = (
            [work] if slot.region >= Region.BATCH else base.values()  # moments mirror parameters
        )
        for start in starts:
            owned[start + slot.offset : start + slot.offset + slot.size] = True
    # The padding of parameters must stay zero: the update runs over it.
    for slot in plan.parameters:
        for start in base.values():
            rows = arena[start + slot.offset : start + slot.offset + slot.size].reshape(slot.rows, slot.ld)
            assert not rows[:, slot.cols :].any()
    arena[~owned] = 12345.0
    program.train(np.arange(60), Hyper(3, 0, np.full(3, 1e-2)))
    X = np.random.default_rng(2).random((31, 37)).astype(dtype.dtype)
    for mode in (Mode.ENCODE, Mode.RECONSTRUCT, Mode.SCORE):
        program.apply(X, mode, batch=numbers_of(plan, 31))
    assert (arena[~owned] == 12345.0).all()
    for slot in plan.parameters:
        for start in base.values():
            rows = arena[start + slot.offset : start + slot.offset + slot.size].reshape(slot.rows, slot.ld)
            assert not rows[:, slot.cols :].any()


def test_rows_beyond_int32_are_reached(tmp_path: Path) -> None:
    """A sparse file of 17 GB apparent size: element offsets need 64 bits."""
    n, k = 2**26 + 1, 64
    path = tmp_path / "huge.f4"
    with path.open("wb") as file:
        try:
            file.truncate(n * k * 4)
        except OSError as error:
            pytest.skip(f"no sparse files here: {error}")
    data = np.memmap(path, np.float32, "r+", shape=(n, k))
    rows = np.array([0, 2**25, 2**26])
    data[rows] = np.arange(3)[:, None] + 1
    spec = NetworkSpec((LayerSpec(k, 3, Activation.LINEAR), LayerSpec(3, k, Activation.LINEAR)), 1)
    program = CppProgram(lower(spec, 3), Precision.FLOAT32, 1)
    program.load({s.name: np.zeros((s.rows, s.cols)) for s in program.plan.parameters})
    program.bind(data)
    terms, _ = program.gradient(rows)
    assert terms[0] == pytest.approx(k * (1 + 4 + 9) / 3)


# --- instruction sets -----------------------------------------------------------------------------------------------

TRAIN_AND_HASH = """
import hashlib, numpy as np, sys
sys.path[:0] = {path!r}
from test_native import *
from narrows.backends import Hyper
for make in PLANS:
    p = started(make())
    for i in range(25):
        p.train(np.arange(60), Hyper(3, 3 * i, np.full(3, 1e-3)))
    print(hashlib.sha256(b"".join(a.tobytes() for a in p.state().values())).hexdigest())
"""


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_isa_is_chosen_by_environment_and_the_fma_ones_agree_bitwise() -> None:
    code = TRAIN_AND_HASH.format(path=[str(Path(__file__).parent)])
    hashes = {}
    for name, supported in _core.build_info()["isa_tables"]:
        result = run_python(code, NARROWS_ISA=name)
        if supported:
            assert result.returncode == 0, result.stderr
            hashes[name] = result.stdout
        else:
            assert "this CPU does not have it" in result.stderr
    fused = {hashes[name] for name in ("avx2", "avx512") if name in hashes}
    assert len(fused) <= 1, "AVX2 and AVX-512 trained to different bits"


def test_every_isa_draws_the_same_numbers() -> None:
    code = f"""
import sys, numpy as np
sys.path[:0] = {[str(Path(__file__).parent)]!r}
from test_backends import NOISE_WIDTHS, Corruption, test_corruption_is_philox
for n in NOISE_WIDTHS:
    for kind in Corruption:
        for dtype in (np.float32, np.float64):
            test_corruption_is_philox("cpp", n, kind, dtype)
"""
    for name, supported in _core.build_info()["isa_tables"]:
        if supported:
            result = run_python(code, NARROWS_ISA=name)
            assert result.returncode == 0, f"{name}: {result.stderr}"


@pytest.mark.parametrize(
    "code",
    [
        "from narrows.backends import resolve; resolve('cpp')",
        "from narrows.backends import resolve; resolve('auto')",
        "import narrows; narrows.functional.dense([[1.0]], [[1.0]])",
    ],
    ids=["cpp", "auto", "layer"],
)
def test_unknown_isa_is_an_error(code: str) -> None:
    result = run_python(code, NARROWS_ISA="sse9")
    assert result.returncode != 0
    assert "NARROWS_ISA='sse9' is not an instruction set; choose from" in result.stderr


# --- processes, threads, signals ------------------------------------------------------------------------------------


def train_hash(_: int = 0) -> bytes:
    program = started(rich_plan(256), n_rows=2000)
    program.train(np.arange(2000), Hyper(1, 0, np.full(8, 1e-3)))
    return b"".join(a.tobytes() for a in program.state().values())


def nested_hash(_: int) -> bytes:
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=lambda: sender.send_bytes(train_hash()))
    child.start()
    result = receiver.recv_bytes()
    child.join(30)
    return result


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_fork_after_training_and_nested() -> None:
    here = train_hash()
    context = multiprocessing.get_context("fork")
    for worker in (train_hash, nested_hash):
        ready: list[bytes] = []
        receiver, sender = context.Pipe(duplex=False)
        child = context.Process(target=lambda s, w: s.send_bytes(w(0)), args=(sender, worker))
        child.start()
        watchdog = threading.Timer(60, child.kill)
        watchdog.start()
        try:
            ready.append(receiver.recv_bytes())
        finally:
            watchdog.cancel()
            child.join(30)
        assert ready == [here], f"{worker.__name__} in a forked child"
    assert train_hash() == here


def test_interrupt_stops_between_steps_and_soon() -> None:
    """SIGINT during one long call: KeyboardInterrupt well within a second, a whole number of steps done."""
    plan = lower(small_spec(), 64)
    program = started(plan, n_rows=64)
    n = 10**6
    rates = np.full(n, 1e-6)
    for delay in np.random.default_rng(0).uniform(0.05, 0.3, 5):
        sent = []
        timer = threading.Timer(
            delay, lambda sent=sent: (sent.append(time.monotonic()), os.kill(os.getpid(), signal.SIGINT))
        )
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            program.train(np.zeros(64 * n, np.int64), Hyper(0, 0, rates))
        assert time.monotonic() - sent[0] < 2.0
        timer.join()
        assert all(np.isfinite(a).all() for a in program.state().values())


def test_a_program_in_two_threads_at_once_is_an_error() -> None:
    program = started(lower(small_spec(), 64), n_rows=64)
    n = 20000
    errors: list[str] = []

    def work() -> None:
        try:
            program.train(np.zeros(64 * n, np.int64), Hyper(0, 0, np.full(n, 1e-6)), lambda: bool(errors))
        except RuntimeError as error:
            errors.append(str(error))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert errors == ["this program is already running in another thread"]


def test_two_programs_in_two_threads_equal_serial() -> None:
    results: dict[int, bytes] = {}
    threads = [threading.Thread(target=lambda i=i: results.update({i: train_hash()})) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert results == {0: train_hash(), 1: train_hash()}


@linux_only
def test_out_of_memory_is_an_exception() -> None:
    code = """
import resource, numpy as np
from narrows.backends.cpp import CppProgram
from narrows.backends.reference import ReferenceProgram
from narrows.lowering import lower
from narrows.spec import Activation, LayerSpec, NetworkSpec, Precision
resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
wide = NetworkSpec((LayerSpec(2**16, 2**17, Activation.LINEAR), LayerSpec(2**17, 2**16, Activation.LINEAR)), 1)
try:
    CppProgram(lower(wide, 4), Precision.FLOAT32, 1)
except MemoryError:
    print("MemoryError")
"""
    result = run_python(code)
    assert result.stdout.strip() == "MemoryError", result.stderr


@linux_only
def test_threads_that_cannot_be_started_are_done_without() -> None:
    """Where there is no memory for their stacks a step runs on those there are, to the same bits; nothing ends here."""
    code = f"""
import resource, sys, numpy as np
sys.path[:0] = {[str(Path(__file__).parent)]!r}
from test_native import Hyper, rich_plan, started
def bits(program):
    program.train(np.arange(2000), Hyper(1, 0, np.full(8, 1e-3)))
    return [a.tobytes() for a in program.state().values()]
one = bits(started(rich_plan(256), n_rows=2000, n_threads=1, tune=False))
many = started(rich_plan(256), n_rows=2000, n_threads=128, tune=False)
pages = int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (24 << 20),) * 2)
print("same" if bits(many) == one else "other")
"""
    result = run_python(code)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "same\n"


@linux_only
def test_import_is_a_good_citizen() -> None:
    """Importing starts no thread, takes no signal, draws no random number and leaves the rounding mode alone."""
    code = """
import random, signal, threading
import numpy as np
np.random.seed(0); random.seed(0)
def state():
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    return handlers, np.random.get_state()[1].tolist(), random.getstate()
before = state()
import narrows, narrows._core
assert before == state()
assert threading.active_count() == 1
assert len(__import__("os").listdir("/proc/self/task")) <= {tasks}, "threads were started"
assert np.float32(1e-40) * np.float32(1) > 0, "subnormals are flushed"
"""
    plain = run_python("import numpy, os; print(len(os.listdir('/proc/self/task')))")
    result = run_python(code.replace("{tasks}", plain.stdout.strip()))
    assert result.returncode == 0, result.stderr


def test_apply_lets_go_of_its_data() -> None:
    program = started(rich_plan())
    X = np.zeros((4, 37), np.float32)
    kept = weakref.ref(X)
    program.apply(X, Mode.ENCODE)
    del X
    gc.collect()
    assert kept() is None


def test_profile_times_the_ops_of_a_step_and_leaves_no_trace() -> None:
    plan = rich_plan()
    program = started(plan)
    program.train(np.arange(60), Hyper(3, 0, np.full(3, 1e-2)))
    before = program.state()
    seconds = program.profile(np.arange(60), Hyper(3, 0, np.full(3, 1e-2)))
    assert seconds.shape[1] == len(plan.ops) + 1
    assert [t > 0 for t in seconds[0, :-1]] == [bool(op.modes & Mode.TRAIN) for op in plan.ops]
    after = program.state()
    assert all((before[name] == after[name]).all() for name in before)


@pytest.mark.parametrize("n_threads", [1, 2])
def test_probe_of_the_machine_gives_figures_that_can_be(n_threads: int) -> None:
    figures = probe_machine(n_threads)
    # A core does between one and 128 float32 operations in a cycle of 0.5 to 8 GHz.
    assert 0.5 < figures["fma_gflops"] < 1024 * n_threads
    assert 0 < figures["exchange_gb_s"] < 1000
    assert 0 <= figures["barrier_us"] < 1e5


# --- sparse input ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", [Precision.FLOAT32, Precision.FLOAT64], ids=str)
@pytest.mark.parametrize("case", SPARSE_CASES, ids=str)
def test_sparse_rows_train_to_the_bits_of_dense_ones(case: Case, precision: Precision) -> None:
    dense = dataclasses.replace(case, spec=dataclasses.replace(case.spec, sparse_input=False))
    data = case.data(precision.dtype)
    rows, rates = np.arange(case.rows)[::-1].copy(), np.full(-(-case.rows // case.batch), 1e-2)
    found = []
    for which, threads in ((dense, 1), (case, 1), (case, 3), (case, 64)):
        program = CppProgram(which.plan, precision, threads, threads)
        program.load(case.state(precision.dtype))
        program.bind(*data)
        terms = program.train(rows, Hyper(7, 2, rates))
        found.append(program.state() | {"terms": terms, "codes": program.apply(data.X, Mode.ENCODE)})
    for other in found[1:]:
        for name, value in found[0].items():
            np.testing.assert_array_equal(other[name], value, err_msg=name)


@pytest.mark.parametrize("case", SPARSE_CASES + GRAM_CASES + SHIFTED_CASES, ids=str)
def test_bits_of_sparse_rows_for_any_number_of_threads(case: Case) -> None:
    rows, rates = np.arange(case.rows), np.full(-(-case.rows // case.batch), 1e-2)

    def bits(threads: int, simulated: int) -> list[bytes]:
        program = CppProgram(case.plan, Precision.BFLOAT16, threads, simulated)
        program.load(case.state(np.float32))
        program.bind(*case.data(np.float32))
        terms = program.train(rows, Hyper(7, 2, rates))
        return [terms.tobytes(), *(a.tobytes() for a in program.state().values())]

    expected = bits(1, 0)
    for threads, simulated in ((2, 0), (3, 0), (1, 2), (1, 7), (1, 64)):
        assert bits(threads, simulated) == expected, (threads, simulated)


def test_a_sparse_layer_refuses_rows_it_cannot_walk() -> None:
    case = next(c for c in SPARSE_CASES if c.name == "sparse-plain-3")
    program = CppProgram(case.plan, Precision.FLOAT32, 1)._program
    values = np.ones(3, np.float32)
    with pytest.raises(ValueError, match="source 0 is dense, the plan expects CSR"):
        program.bind_dense(0, 0, np.zeros((4, 23), np.float32))
    for columns in ([1, 5, 5], [1, 5, 2]):
        with pytest.raises(ValueError, match="columns of row 1 do not increase"):
            program.bind_csr(0, 0, np.array([0, 0, 3], np.int32), np.array(columns, np.int32), values, 23)
    with pytest.raises(ValueError, match="has 22 columns, the plan expects 23"):
        program.bind_csr(0, 0, np.array([0, 0, 3], np.int32), np.array([1, 5, 6], np.int32), values, 22)
    with pytest.raises(ValueError, match="source 0 is not bound"):
        program.gradient(np.arange(2), 0, 0)


# --- squared error in Gram form -------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", [0.5, 1e-1, 1e-2, 2e-3, 5e-4, 1e-4, 1e-6])
@pytest.mark.parametrize("inner", [32, 128])
def test_the_gram_form_is_as_accurate_as_documented(inner: int, part: float) -> None:
    """Where the residuals are a `part` of |y|^2: a row's loss to 5e-7 |y|^2 and, below the guard, as the dense form's;
    gradients to 5e-6 |y| / |residual|. Rows that are all stored are the hardest: nothing of their sums is left out."""
    rng, batch, n_outputs = np.random.default_rng(0), 64, 4000
    spec = network((20, inner, n_outputs), separate_target=True, gram_decoder=True)
    state = {
        "W0": rng.normal(size=(20, inner)) / 4,
        "b0": rng.normal(size=(1, inner)),
        "W1": rng.normal(size=(inner, n_outputs)) / np.sqrt(inner),
        "b1": rng.normal(size=(1, n_outputs)),
    }
    state = {name: values.astype(np.float32) for name, values in state.items()}
    X = rng.normal(size=(batch, 20)).astype(np.float32)
    y = (X @ state["W0"].astype(np.float64) + state["b0"]) @ state["W1"] + state["b1"]
    noise = rng.normal(size=y.shape)
    y = (y + noise * np.sqrt(part * (y**2).sum() / (noise**2).sum())).astype(np.float32)

    reference = ReferenceProgram(lower(dataclasses.replace(spec, gram_decoder=False), batch))
    program = CppProgram(lower(spec, batch), Precision.FLOAT32, 2)
    wide = X.astype(np.float64), y.astype(np.float64)
    for p, data in ((reference, wide), (program, (X, y))):
        p.load(state)
        p.bind(*data)
    rows = np.arange(batch)
    (expected_terms, expected), (terms, gradient) = reference.gradient(rows), program.gradient(rows)
    square = (wide[1] ** 2).sum(axis=1)
    loss = reference.apply(wide[0], Mode.SCORE, wide[1])[:, 0]
    error = np.abs(program.apply(X, Mode.SCORE, y)[:, 0] - loss)
    assert (error <= 5e-7 * square).all()
    assert (error[loss < 0.9e-3 * square] <= 3e-5 * loss[loss < 0.9e-3 * square]).all()
    assert abs(terms[0] - expected_terms[0]) <= 5e-7 * square.mean()
    for name, g in expected.items():
        allowed = 5e-6 * np.sqrt(square.sum() / loss.sum())
        assert np.linalg.norm(gradient[name] - g) <= allowed * np.linalg.norm(g), name


def test_a_decoder_in_gram_form_refuses_rows_it_cannot_walk() -> None:
    case = next(c for c in GRAM_CASES if c.name == "gram-target-3")
    program = CppProgram(case.plan, Precision.FLOAT32, 1)._program
    with pytest.raises(ValueError, match="source 1 is dense, the plan expects CSR"):
        program.bind_dense(0, 1, np.zeros((4, 23), np.float32))
    with pytest.raises(ValueError, match="columns of row 1 do not increase"):
        program.bind_csr(0, 1, np.array([0, 0, 2], np.int32), np.array([5, 2], np.int32), np.ones(2, np.float32), 23)
