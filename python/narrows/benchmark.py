"""Times training steps on this machine: the standard cases, their speed, and the speed that the machine allows.

Promises: every round trains the same steps from the same start. The floor comes from a probe of the machine next to its
timing. Values that could not be measured are None.
Never: imports another library (``bench/peers.py`` compares), changes the state of an estimator.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from .backends import Hyper, Program, compile_plan, own_ops, probe, resolve
from .machine import thread_count, usable_cpus
from .plan.lowering import lower
from .plan.ops import SIGNATURES, OpCode
from .plan.plan import PRODUCTS, Mode, Op, Plan, Region, op_flops, product_size
from .plan.spec import Activation, LayerSpec, Loss, NetworkSpec

__all__ = ["CASES", "Case", "OpTiming", "StepTiming", "machine", "prepared", "profile_ops", "time_steps"]

BATCHES = 20
"""Number of different batches; the steps cycle through them."""
ROUND_SECONDS = 0.02
MIN_ROUNDS = 3
MAX_STEPS = 500
"""Most steps of a round. The moments of a dead unit decay by 0.9 a step; after 830 they are subnormal, so slow."""


@dataclass(frozen=True)
class Case:
    """A fully connected autoencoder with ReLU hidden layers, trained by Adam.

    Attributes
    ----------
    name : str
    widths : tuple of int
        Features, hidden layers with the code in their middle, features.
    batch : int
        Rows of a step.
    loss : Loss
        ``BCE`` has sigmoid outputs, ``MSE`` linear ones.
    """

    name: str
    widths: tuple[int, ...]
    batch: int
    loss: Loss

    @property
    def spec(self) -> NetworkSpec:
        last = len(self.widths) - 2
        link = Activation.SIGMOID if self.loss is Loss.BCE else Activation.LINEAR
        layers = tuple(
            LayerSpec(n_in, n_out, link if i == last else Activation.RELU)
            for i, (n_in, n_out) in enumerate(zip(self.widths, self.widths[1:], strict=False))
        )
        return NetworkSpec(layers, len(layers) // 2, loss=self.loss)

    def plan(self) -> Plan:
        return lower(self.spec, self.batch)


_DEEP = (784, 128, 64, 32, 64, 128, 784)
CASES = (
    Case("keras-simple", (784, 32, 784), 256, Loss.BCE),
    Case("keras-deep", _DEEP, 256, Loss.BCE),
    Case("keras-deep-32", _DEEP, 32, Loss.BCE),
    Case("hinton", (784, 1000, 500, 250, 30, 250, 500, 1000, 784), 256, Loss.BCE),
    Case("tabular", (30, 16, 8, 16, 30), 128, Loss.MSE),
)
"""The standard cases. Two networks are of the Keras tutorial, one of them at two batch sizes. The wide one is of Hinton
and Salakhutdinov (Science 313, 2006). The last one is for a small table."""


@dataclass(frozen=True)
class StepTiming:
    """Training steps of a case on a backend.

    Attributes
    ----------
    case, backend : str
    threads, rounds, steps : int
        `steps` counts the steps of one round.
    ms, ms_q1, ms_q3 : float
        Milliseconds of a step: median and quartiles over the rounds.
    examples_per_s : float
    gflop, gflop_per_s : float
        Work of a step's matrix products, and its rate.
    machine : dict or None
        `probe_machine` of the C++ backend: the better of two probes, before and after. None without that backend.
    floor_ms, peak_share : float or None
        Milliseconds of the products at the measured multiply-add peak, and the share of that peak that was reached.
    generic_ops : tuple of str
        Ops that the backend runs in the reference's form.
    """

    case: str
    backend: str
    threads: int
    rounds: int
    steps: int
    ms: float
    ms_q1: float
    ms_q3: float
    examples_per_s: float
    gflop: float
    gflop_per_s: float
    machine: dict[str, float] | None
    floor_ms: float | None
    peak_share: float | None
    generic_ops: tuple[str, ...]


@dataclass(frozen=True)
class OpTiming:
    """An op inside training steps, or the waiting of threads for each other (`op` is ``"waiting"``).

    Attributes
    ----------
    op, operands, size : str
        As ``"dense"``, ``"a0 <- x W0 b0"``, ``"256 x 784 x 128"`` (rows, in, out; otherwise the largest operand).
    ms, share : float
        Milliseconds of a step (mean over threads), and their share of the step; the shares add up to 1.
    gflop_per_s : float or None
        For matrix products.
    """

    op: str
    operands: str
    size: str
    ms: float
    share: float
    gflop_per_s: float | None


def prepared(
    case: Case, backend: str, n_threads: int | None = None, steps: int = BATCHES
) -> tuple[Program, NDArray[np.int64], Hyper]:
    """A program with parameters and data, and the arguments for `steps` steps of `Program.train`."""
    program = compile_plan(case.plan(), backend, n_threads=n_threads)
    rng = np.random.default_rng(0)
    program.load({s.name: rng.normal(0, 0.05, (s.rows, s.cols)).astype(np.float32) for s in program.plan.parameters})
    X = rng.random((BATCHES * case.batch, case.widths[0]), dtype=np.float32)
    program.bind(X)
    return program, *_steps(case, steps)


def _steps(case: Case, n: int) -> tuple[NDArray[np.int64], Hyper]:
    rows = np.resize(np.arange(BATCHES * case.batch), n * case.batch)
    return rows, Hyper(0, 0, np.full(n, 1e-3))


def time_steps(case: Case, backend: str, *, n_threads: int | None = None, seconds: float = 2.0) -> StepTiming:
    """Time training steps.

    Parameters
    ----------
    case : Case
    backend : str
        As for an estimator.
    n_threads : int, optional
    seconds : float
        How long to go on with rounds of about 20 ms; at least three are done. Compiling and warming up come on top.

    Raises
    ------
    BackendError
        The backend cannot run here.
    """
    backend, n_threads = resolve(backend), thread_count(n_threads)
    program, _, _ = prepared(case, backend, n_threads)
    start = program.state()

    def train(n: int) -> float:
        program.load(start)
        rows, hyper = _steps(case, n)
        begin = time.perf_counter()
        program.train(rows, hyper)
        return (time.perf_counter() - begin) / n

    try:
        # The CPU's speed is no floor for a GPU.
        probed = backend != "cuda"
        before = _probe_machine(n_threads) if probed else None
        steps, rounds = _rounds(train, seconds)
        after = _probe_machine(n_threads) if probed else None
    finally:
        program.close()
    gflop = program.plan.flops / 1e9
    q1, median, q3 = (float(q) for q in np.quantile(rounds, (0.25, 0.5, 0.75)))
    found = {}
    if before and after:
        found = {name: (min if name == "barrier_us" else max)(v, after[name]) for name, v in before.items()}
    floor = gflop / found["fma_gflops"] if found else None
    return StepTiming(
        case.name, backend, n_threads, len(rounds), steps,
        median * 1e3, q1 * 1e3, q3 * 1e3, case.batch / median, gflop, gflop / median,
        found or None, None if floor is None else floor * 1e3, None if floor is None else floor / median,
        tuple(sorted({op.code.name.lower() for op in program.plan.ops if op.code not in own_ops(backend)})),
    )  # fmt: skip


def profile_ops(case: Case, *, n_threads: int | None = None, seconds: float = 2.0) -> list[OpTiming]:
    """Time each op of a training step inside whole steps, on the C++ backend; the last entry is waiting.

    Raises
    ------
    BackendError
        The C++ backend cannot run here.
    """
    from .backends.cpp import CppProgram

    program, _, _ = prepared(case, resolve("cpp"), n_threads)
    assert isinstance(program, CppProgram)
    try:
        _, rounds = _rounds(lambda n: program.profile(*_steps(case, n)).mean(axis=0) / n, seconds)
    finally:
        program.close()
    plan, times = program.plan, np.median(rounds, axis=0)
    result = []
    for op, t in zip(plan.ops, times[:-1], strict=True):
        if op.modes & Mode.TRAIN:
            flops = op_flops(plan, op)
            rate = flops / t / 1e9 if flops and t > 0 else None
            share = float(t / times.sum())
            result.append(OpTiming(op.code.name.lower(), *_described(plan, op), float(t) * 1e3, share, rate))
    return [*result, OpTiming("waiting", "", "", float(times[-1]) * 1e3, float(times[-1] / times.sum()), None)]


def _described(plan: Plan, op: Op) -> tuple[str, str]:
    """Operands and size for `OpTiming`."""
    signature = SIGNATURES[op.code]
    slots = {role: plan.slots[i] for role, i in zip(signature.slots, op.slots, strict=True) if i >= 0}
    # Optimiser state is left out.
    named = {role: s.name for role, s in slots.items() if s.region not in (Region.MOMENT1, Region.MOMENT2)}
    written = [name for role, name in named.items() if role in signature.writes]
    read = [name for role, name in named.items() if role in signature.reads]
    if op.code is OpCode.UPDATE:
        parameters = [s for s in plan.slots if s.region is Region.PARAMETER]
        return "all parameters", str(sum(s.rows * s.cols for s in parameters))
    operands = f"{' '.join(written)} <- {' '.join(read)}" if read else " ".join(written)
    if op.code in PRODUCTS:
        return operands, " x ".join(map(str, product_size(plan, op)))
    largest = max(slots.values(), key=lambda s: s.rows * s.cols)
    return operands, f"{largest.rows} x {largest.cols}"


T = TypeVar("T")


def _rounds(run: Callable[[int], T], seconds: float) -> tuple[int, list[T]]:
    """Steps of a round, and the result of `run(steps)` for each round, after a warm-up."""
    # Threads of an earlier program spin for a while and would take the cores.
    time.sleep(0.05)
    run(1)  # compiles kernels and touches pages
    steps = 1
    while True:
        begin = time.perf_counter()
        run(steps)
        if steps == MAX_STEPS or time.perf_counter() - begin >= ROUND_SECONDS / 2:
            break
        steps = min(2 * steps, MAX_STEPS)
    results: list[T] = []
    end = time.perf_counter() + seconds
    while len(results) < MIN_ROUNDS or time.perf_counter() < end:
        results.append(run(steps))
    return steps, results


def _probe_machine(n_threads: int) -> dict[str, float] | None:
    if not probe("cpp").ok:
        return None
    from .backends.cpp import probe_machine

    # Threads that share a core do not run at once, and the clock would see only some of them.
    return probe_machine(min(n_threads, usable_cpus()[0]))


_ISAS = {"amx_bf16": "amx", "avx512f": "avx512", "avx2": "avx2"}
"""CPU flags and their instruction sets, best first."""


def machine() -> dict[str, Any]:
    """The CPU, its instruction set and cores, the system, and Python, to store with a timing."""
    try:
        with open("/proc/cpuinfo") as file:
            fields = {k.strip(): v.strip() for k, v in (line.split(":", 1) for line in file if ":" in line)}
    except OSError:
        fields = {"model name": platform.processor()}
    flags = fields.get("flags", "").split()
    return {
        "cpu": {k: v for k, v in fields.items() if k in ("model name", "cpu family", "model")},
        "isa": next((isa for flag, isa in _ISAS.items() if flag in flags), platform.machine()),
        "cores": os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
    }
