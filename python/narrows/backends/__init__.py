"""Backends: what can run a plan, which one to take, and why the others were skipped.

Promises: `probe` never raises; ``backend="auto"`` takes the first of `AUTO` that probes ok, never the reference, and
logs one line about what it skipped, as a warning if something could be done about it; a name that is unknown or cannot
run here is an error, never a substitution.

A backend is a module with ``probe()`` and ``compile(plan, *, precision, n_threads)``; a `Program` is a plan compiled.
"""

from __future__ import annotations

import importlib
import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from .._extras import require
from ..arrays import on_gpu
from ..errors import BackendError
from ..ops import OpCode
from ..plan import Mode, Plan
from ..shifted import Shifted
from ..spec import NetworkSpec, Precision

__all__ = [
    "AUTO",
    "BACKENDS",
    "BATCH",
    "SHIFT",
    "Hyper",
    "Probe",
    "Program",
    "all_finite",
    "compile_plan",
    "copies",
    "own_ops",
    "probe_all",
    "resolve",
    "sparse_rows",
    "thread_count",
    "told_apart",
    "usable_cpus",
]

AUTO = ("cuda", "cpp", "numba")
"""Order of preference for ``backend="auto"``."""
BACKENDS = (*AUTO, "reference")

MOST_THREADS = 4096
"""That the native backend takes, and so all."""

log = logging.getLogger("narrows")


class Probe(NamedTuple):
    """Whether a backend can run here, and why (not)."""

    ok: bool
    reason: str
    absent: bool = False
    """Whether it cannot because this machine has not got what it is for, which nobody need be told."""
    denied: bool = False
    """Whether it cannot because of what the environment asks of it, for which no other stands in."""


@dataclass(frozen=True)
class Hyper:
    """What changes from step to step.

    Attributes
    ----------
    seed : int
        Key of the random numbers, below 2**64.
    step : int
        Updates done before this call; counts on inside it.
    learning_rate : ndarray of float64, shape (n_steps,)
    kl_factor : ndarray of float64, shape (n_steps,), optional
        What the KL term of a variational network is multiplied with besides its weight; 1 by default.
    momentum : ndarray of float64, shape (n_steps,), optional
        Of sgd, in place of the plan's.
    """

    seed: int
    step: int
    learning_rate: NDArray[np.float64]
    kl_factor: NDArray[np.float64] | None = None
    momentum: NDArray[np.float64] | None = None


State = dict[str, NDArray[Any]]
"""Parameters by slot name (``W0``, ``b0``, ...) and optimiser state (``moment1.W0``, ``moment2.W0``, ...)."""


class Program(Protocol):
    """A compiled plan with its own memory. Not for two threads at once."""

    plan: Plan

    def load(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Set parameters, and optimiser state where present (zero otherwise)."""

    def state(self, *, optimiser: bool = True) -> State:
        """Copies of parameters and, if it is wanted, of optimiser state."""

    def views(self) -> State:
        """Parameters and optimiser state, not copied if they lie in this machine's memory, where they change with the
        program; valid until it is closed."""

    def finite(self) -> bool:
        """Whether all parameters and all optimiser state are finite."""

    def hand_over(self) -> State:
        """Close the program and return its parameters and optimiser state, without a copy where that takes less
        memory."""

    def bind(self, X: Any, target: Any = None, weight: Any = None, batch: Any = None) -> None:
        """Set the data that `train` and `gradient` take their rows from: ndarray (any strides) or CSR; X may be
        `Shifted` rows of such if the plan is of shifted rows.

        `batch` holds the number of each row's batch, from 0, where the plan has batches.
        """

    def train(
        self, rows: NDArray[np.int64], hyper: Hyper, poll: Callable[[], bool] | None = None
    ) -> NDArray[np.float64]:
        """One update for each consecutive `plan.batch` of `rows` (the last may be shorter).

        `poll` is called about every 50 ms between two steps; when it returns True, training stops there.

        Returns
        -------
        ndarray, shape (steps done, len(plan.terms))
        """

    def gradient(self, rows: NDArray[np.int64], seed: int = 0, step: int = 0) -> tuple[NDArray[np.float64], State]:
        """Terms and gradients of one training step, without the update."""

    def apply(self, X: Any, mode: Mode, target: Any = None, batch: Any = None) -> NDArray[Any]:
        """Run an inference mode over all rows of X; DECODE and LIKELIHOOD take latent codes for X. What decodes takes
        the `batch` of each row, as `bind` does."""

    def close(self) -> None:
        """Free the memory; further calls are errors."""


def sparse_rows(X: Any) -> Any:
    """X as a plan with a sparse input takes it: CSR of increasing columns, itself if it is that."""
    if getattr(X, "format", None) != "csr":
        if on_gpu(X):
            return require("cupyx.scipy.sparse", "cuda12", "sparse rows on a GPU").csr_matrix(X)
        import scipy.sparse as sp

        return sp.csr_array(X)
    if not X.has_canonical_format:
        X = X.copy()
        X.sum_duplicates()
    return X


SHIFT, BATCH = 4, 5
"""The numbers under which the shift of X and the batches of rows are bound, beside X (0), its target (1), weights (2)
and latent codes (3)."""


def told_apart(spec: NetworkSpec, X: Any) -> tuple[Any, NDArray[Any] | None]:
    """The rows of X as stored, and their shift as one row if the network has one: zeros, if X has none.

    Raises
    ------
    ValueError
        X has a shift and the network none.
    """
    if not spec.shifted:
        if isinstance(X, Shifted):
            raise ValueError("these rows have a shift, and the network takes none")
        return X, None
    if isinstance(X, Shifted):
        return X.rows, X.shift.reshape(1, -1)
    return X, np.zeros((1, spec.n_features))


def copies(views: State, optimiser: bool) -> State:
    """Of parameters and, if it is wanted, of optimiser state."""
    return {name: view.copy() for name, view in views.items() if optimiser or "." not in name}


def all_finite(*arrays: NDArray[Any]) -> bool:
    """Whether there is neither NaN nor infinity in them."""
    # A sum is finite only if every value is, and needs no temporary; whether it overflowed is asked then.
    with np.errstate(over="ignore", invalid="ignore"):
        return all(math.isfinite(array.sum()) or bool(np.isfinite(array).all()) for array in arrays)


@cache
def _module(name: str) -> Any:
    return importlib.import_module(f".{name}", __name__)


def probe(name: str) -> Probe:
    """Whether the backend `name` can run here."""
    try:
        result: Probe = _module(name).probe()
        return result
    except Exception as error:
        return Probe(False, f"{type(error).__name__}: {error}")


def own_ops(name: str) -> frozenset[OpCode]:
    """The ops for which a backend has a form of its own; the others are the reference's."""
    own: frozenset[OpCode] = _module(name).own_ops()
    return own


def probe_all() -> dict[str, Probe]:
    """`probe` of every backend, in order of preference."""
    return {name: probe(name) for name in BACKENDS}


_announced: set[str] = set()


def resolve(name: str = "auto", *, announce: bool = True) -> str:
    """The backend that will run: `name`, or the first of `AUTO` that can.

    ``NARROWS_BACKEND`` overrides ``"auto"``. What ``"auto"`` chose is logged once, unless this only asks: as a warning
    if it skipped what this machine has, such as a GPU without CuPy.

    Raises
    ------
    ValueError
        Unknown name.
    BackendError
        The backend cannot run here.
    """
    origin = "backend"
    if name == "auto" and (forced := os.environ.get("NARROWS_BACKEND")):
        name, origin = forced, "NARROWS_BACKEND"
    if name == "auto":
        return _first(AUTO, announce)
    if name not in BACKENDS:
        raise ValueError(f"{origin}={name!r} is not a backend; choose from {', '.join(('auto', *BACKENDS))}")
    found = probe(name)
    if not found.ok:
        raise BackendError(f"{origin}={name!r} cannot run here: {found.reason}; see `narrows doctor`")
    return name


def _first(names: Sequence[str], announce: bool) -> str:
    """The first of them that can run here."""
    skipped: list[str] = []
    level = logging.INFO
    for name in names:
        found = probe(name)
        if found.ok:
            note = f"backend {name}" + "".join(f"; skipped {s}" for s in skipped)
            if announce and note not in _announced:
                _announced.add(note)
                log.log(level, note)
            return name
        if found.denied:
            raise BackendError(f"backend {name} cannot run here: {found.reason}")
        skipped.append(f"{name} ({found.reason})")
        if not found.absent:
            level = logging.WARNING
    raise BackendError(f"no backend can run here: {'; '.join(skipped)}; see `narrows doctor`")


@cache
def host_backend() -> str:
    """The backend for arrays of the CPU that are worth no trip to a GPU: what "auto" takes but "cuda"; chosen once."""
    forced = os.environ.get("NARROWS_BACKEND") or "auto"
    return _first([name for name in AUTO if name != "cuda"], True) if forced in ("auto", "cuda") else resolve(forced)


@cache
def layer_backend() -> Any:
    """The module whose `dense_layer` and `dense_backward_layer` serve the layers of `narrows.functional` on a CPU."""
    return _module(host_backend())


@cache
def gpu_layers() -> Any:
    """The module that serves them where the operands are on a GPU; it makes their results, too."""
    return _module("cuda.layers")


def compile_plan(
    plan: Plan, backend: str, *, precision: Any = Precision.FLOAT32, n_threads: int | None = None
) -> Program:
    """Compile `plan` for the backend named `backend` (already resolved), in a precision that `Precision.of` knows."""
    precision = check_precision(precision, backend)
    program: Program = _module(backend).compile(plan, precision=precision, n_threads=thread_count(n_threads))
    return program


def check_precision(precision: Any, backend: str) -> Precision:
    """A precision that `Precision.of` knows, if the (resolved) backend has it, else a BackendError."""
    found = Precision.of(precision)
    if found is Precision.TF32 and backend != "cuda":
        raise BackendError(
            f"precision='tf32' is of the cuda backend, and this is {backend}: take 'float32' or backend='cuda'"
        )
    return found


def thread_count(n_threads: int | None = None) -> int:
    """Threads to use of the CPU: the argument, else ``NARROWS_NUM_THREADS``, else ``SLURM_CPUS_PER_TASK``, else what
    this process may use of the machine (affinity mask and cgroup quota); never simply the cores of the node.
    """
    return thread_choice(n_threads)[0]


def thread_choice(n_threads: int | None = None) -> tuple[int, str]:
    """`thread_count` and where the number comes from."""
    if n_threads is not None:
        if isinstance(n_threads, bool) or int(n_threads) != n_threads or not 1 <= n_threads <= MOST_THREADS:
            raise ValueError(f"n_threads={n_threads!r} must be a positive integer of at most {MOST_THREADS}, or None")
        return int(n_threads), "n_threads"
    for variable in ("NARROWS_NUM_THREADS", "SLURM_CPUS_PER_TASK"):
        if value := os.environ.get(variable):
            if not value.isdecimal() or not 1 <= int(value) <= MOST_THREADS:
                raise ValueError(f"{variable}={value!r} must be a positive integer of at most {MOST_THREADS}")
            return int(value), variable
    return usable_cpus()


def usable_cpus() -> tuple[int, str]:
    """What this process may use of the machine, and what says so: the affinity mask, the cgroup's quota, or OpenMP's
    limit, by which joblib, threadpoolctl and ``OMP_NUM_THREADS`` keep processes from taking each other's cores.
    """
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    found = allowed, "affinity mask"
    for limit, source in ((_cgroup_cpus(), "cgroup quota"), (_openmp_limit()(), "OpenMP limit")):
        if limit and limit < found[0]:
            found = limit, source
    return found


@cache
def _openmp_limit() -> Callable[[], int]:
    """A function that gives the threads that OpenMP would take by itself in the calling thread, 0 for no limit."""
    try:
        from .. import _core
    except ImportError:
        first = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
        number = int(first) if first.isascii() and first.isdecimal() else 0
        return lambda: number
    limit: Callable[[], int] = _core.thread_limit
    return limit


@cache
def _cgroup_cpus() -> int | None:
    """Whole CPUs of the cgroup's quota (v2, then v1), or None without a quota."""
    try:
        with open("/sys/fs/cgroup/cpu.max") as file:
            quota, period = file.read().split()
    except (OSError, ValueError):
        try:
            with (
                open("/sys/fs/cgroup/cpu/cpu.cfs_quota_us") as q,
                open("/sys/fs/cgroup/cpu/cpu.cfs_period_us") as p,
            ):
                quota, period = q.read().strip(), p.read().strip()
        except OSError:
            return None
    if quota in ("max", "-1"):
        return None
    return max(1, int(quota) // int(period))
