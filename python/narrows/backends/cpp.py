"""The native CPU backend: plans compiled by `narrows._core`.

Promises: the same bits for any number of threads. The result of a row does not depend on the rest of its batch. Data
are not copied. The GIL is free while a step runs.
Never: falls back to another backend.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..plan.ops import OpCode, Source
from ..plan.plan import FROM_CODES, Mode, Plan
from ..plan.spec import Precision
from ..rows.shifted import split_shift
from ..rows.sparse import sparse_rows
from . import Hyper, Probe, State
from .protocol import all_finite, copies

__all__ = ["CppProgram", "bfloat16", "compile", "isa", "own_ops", "probe", "probe_machine"]

_TRAIN, _APPLY = 0, 1


def probe() -> Probe:
    try:
        from .. import _core
    except ImportError as error:
        if importlib.util.find_spec("narrows._core") is None:
            return Probe(False, "not built: no C++ compiler worked when narrows was installed")
        return Probe(False, f"the extension cannot be loaded ({error})")
    try:
        return Probe(True, f"{_core.isa()}, {_core.build_info()['threads']}")
    except (ValueError, RuntimeError) as error:  # NARROWS_ISA has no usable value
        return Probe(False, str(error), denied=True)


def isa() -> str:
    """The instruction set whose kernels run, e.g. ``"avx512"``."""
    from .. import _core

    name: str = _core.isa()
    return name


def bfloat16() -> str:
    """What multiplies in ``precision="bfloat16"``, e.g. ``"vdpbf16ps"``."""
    from .. import _core

    found: str = _core.bfloat16()
    if found == "multiply-adds":
        found += ", slower than float32: this CPU has no instruction for bfloat16"
    if _core.tiles_refused():
        found += "; this CPU has AMX, but the operating system refuses its tile registers"
    return found


def probe_machine(n_threads: int) -> dict[str, float]:
    """The speed of the machine at this moment, to report with a timing. Takes about 50 ms.

    Returns
    -------
    dict
        ``"fma_gflops"``: float32 multiply-adds in registers, all threads at once, GFLOP/s. ``"exchange_gb_s"``: each
        thread reads memory that another has just written, GB/s. ``"barrier_us"``: all threads meet once.
    """
    from .. import _core

    figures: dict[str, float] = _core.probe_machine(n_threads)
    return figures


def own_ops() -> frozenset[OpCode]:
    """Every op has a kernel of its own here."""
    return frozenset(OpCode)


class Blocking(NamedTuple):
    """How the threads of a program share its products. The bits of results do not depend on it."""

    by_rows: bool
    """True if each thread takes the same rows of the batch through all layers, else threads share tiles of products."""
    turned: tuple[int, ...]
    """Numbers of the ops in the plan whose input gradient is a transposed product."""
    tuned: bool
    """True if trials have found this choice."""


class CppProgram:
    """A plan compiled for this CPU.

    Parameters
    ----------
    plan : Plan
    precision : Precision
    n_threads : int
    simulate_threads : int
        For tests: run the plan as that many threads, one after the other.
    tune : bool
        Whether the first steps try several ways to share products. This changes no bit. The process keeps the choice.
    """

    def __init__(
        self, plan: Plan, precision: Precision, n_threads: int, simulate_threads: int = 0, tune: bool = True
    ) -> None:
        from .. import _core

        self.plan = plan
        self.dtype = precision.dtype
        self._slot = _core.Program.slot
        self._views: State = {}
        # New memory is zero, and takes no memory of the machine until it is written.
        self._untouched = True
        self._program: Any = _core.Program(
            plan.slot_table(),
            plan.op_table(),
            plan.batch_rows,
            plan.parameter_size,
            plan.work_size,
            plan.n_moments,
            int(precision),
            n_threads,
            simulate_threads,
            tune,
        )

    def load(self, state: Mapping[str, NDArray[Any]]) -> None:
        for name, view in self.views().items():
            if name in state or not name.startswith("moment"):
                view[...] = np.reshape(state[name], view.shape)
            elif not self._untouched:
                view[...] = 0
        self._untouched = False

    def state(self, *, optimiser: bool = True) -> State:
        return copies(self.views(), optimiser)

    def views(self) -> State:
        if not self._views:
            for slot in self.plan.parameters:
                index = self.plan.index[slot.name]
                self._views[slot.name] = self._slot(self._program, index)
                for moment in range(self.plan.n_moments):
                    self._views[f"moment{moment + 1}.{slot.name}"] = self._slot(self._program, index, moment)
        return self._views

    def finite(self) -> bool:
        # The padding between the slots stays zero.
        arena, size = self.arena(), self.plan.parameter_size
        return all_finite(arena[:size], arena[2 * size : (2 + self.plan.n_moments) * size])

    def hand_over(self) -> State:
        self._program.release(_TRAIN)
        # Views keep all memory of the program alive. If that is more than twice the size of a copy, a copy is made.
        outweighed = self.plan.arena_size > 2 * (1 + self.plan.n_moments) * self.plan.parameter_size
        state = self.state() if outweighed else self.views()
        self.close()
        return state

    def bind(self, X: Any, target: Any = None, weight: Any = None, condition: Any = None) -> None:
        given = {Source.X: X, Source.TARGET: target, Source.WEIGHT: weight, Source.CONDITION: condition}
        for source, data in given.items():
            if data is not None:
                self._bind(_TRAIN, source, data)

    def _bind(self, bank: int, source: int, data: Any) -> None:
        if source == Source.X:
            data, shift = split_shift(self.plan.spec, data)
            if shift is not None:
                self._program.bind_dense(bank, Source.SHIFT, shift)
        if source in self.plan.spec.sparse_sources:
            data = sparse_rows(data)
        if hasattr(data, "indptr"):
            self._program.bind_csr(bank, source, *_index_pair(data), data.data, data.shape[1])
        else:
            self._program.bind_dense(bank, source, data)

    def train(
        self, rows: NDArray[np.int64], hyper: Hyper, poll: Callable[[], bool] | None = None
    ) -> NDArray[np.float64]:
        self._untouched = False
        terms: NDArray[np.float64] = self._program.train(
            rows, hyper.seed, hyper.step, hyper.learning_rate, poll, hyper.kl_factor, hyper.momentum
        )
        return terms[:, : len(self.plan.terms)]

    def gradient(self, rows: NDArray[np.int64], seed: int = 0, step: int = 0) -> tuple[NDArray[np.float64], State]:
        terms: NDArray[np.float64] = self._program.gradient(rows, seed, step)
        gradients = {s.name: self._slot(self._program, self.plan.index[f"d{s.name}"]).copy() for s in self.plan.learned}
        return terms[: len(self.plan.terms)], gradients

    def apply(self, X: Any, mode: Mode, target: Any = None, condition: Any = None) -> NDArray[Any]:
        result = self.plan.outputs[mode]
        out = np.empty((X.shape[0], self.plan.slots[result].cols), self.dtype)
        try:
            self._bind(_APPLY, Source.LATENT if mode in FROM_CODES else Source.X, X)
            # Without a separate target the loss compares with X. For codes, the target is bound in place of X.
            if target is not None and self.plan.spec.data.separate_target:
                self._bind(_APPLY, Source.TARGET, target)
            elif target is not None and mode in FROM_CODES:
                self._bind(_APPLY, Source.X, target)
            if condition is not None:
                self._bind(_APPLY, Source.CONDITION, condition)
            self._program.apply(int(mode), result, out)
        finally:
            # An estimator keeps the program for the next call, and it must not keep the data alive.
            self._program.release(_APPLY)
        return out

    @property
    def blocking(self) -> Blocking:
        """How threads share products now."""
        by_rows, turned, tuned = self._program.choice()
        return Blocking(by_rows, tuple(turned), tuned)

    def profile(self, rows: NDArray[np.int64], hyper: Hyper) -> NDArray[np.float64]:
        """Train as `train` does, then restore the state.

        Returns
        -------
        ndarray, shape (threads, ops + 1)
            Seconds that each thread spent in each op of the plan, over all steps. The last column is waiting.
        """
        state = self.state()
        try:
            seconds: NDArray[np.float64] = self._program.profile(rows, hyper.seed, hyper.step, hyper.learning_rate)
        finally:
            self.load(state)
        return seconds

    def arena(self) -> NDArray[Any]:
        """The whole memory of the program, for tests."""
        view: NDArray[Any] = type(self._program).arena(self._program)[0]
        return view

    def close(self) -> None:
        self._program = None
        self._views = {}


# --- single layers --------------------------------------------------------------------------------------------------
# The protocol of `narrows.functional`: outputs are C-contiguous arrays with the dtype of the operands.


@cache
def _native() -> Any:
    """The extension. An import statement would slow down calls that take a few microseconds."""
    from .. import _core

    return _core


def dense_layer(X: Any, W: Any, b: Any, activation: int, out: Any, Z: Any, n_threads: int) -> None:
    """out = activation(X @ W + b). Z, unless it is None, gets the pre-activation."""
    if hasattr(X, "indptr"):
        _native().activate(X @ W, b, activation, out, Z, n_threads)
    else:
        _native().dense(X, W, b, activation, out, Z, n_threads)


def dense_backward_layer(
    dA: Any, X: Any, W: Any, saved: Any, activation: int, dX: Any, dW: Any, db: Any, n_threads: int
) -> None:
    """Write the gradients of `dense_layer` into those of dX, dW and db that are not None. `saved` is the tensor that
    the derivative of the activation is taken from: the output, or the pre-activation.
    """
    if hasattr(X, "indptr") and dW is not None:
        dZ = np.empty(dA.shape, dA.dtype)
        _native().dense_backward(dA, None, W, saved, activation, dX, None, db, dZ, n_threads)
        dW[...] = X.T @ dZ
    else:
        _native().dense_backward(dA, X if dW is not None else None, W, saved, activation, dX, dW, db, None, n_threads)


def _index_pair(data: Any) -> tuple[NDArray[Any], NDArray[Any]]:
    """indptr and indices of CSR in one integer type."""
    kind = np.result_type(data.indptr, data.indices)
    return data.indptr.astype(kind, copy=False), data.indices.astype(kind, copy=False)


def compile(
    plan: Plan, *, precision: Precision, n_threads: int, simulate_threads: int = 0, tune: bool = True
) -> CppProgram:
    return CppProgram(plan, precision, n_threads, simulate_threads, tune)
