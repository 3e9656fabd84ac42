"""Backends: what can run a plan, which one to take, and why the others were skipped.

Promises: `probe` never raises; ``backend="auto"`` takes the first of `AUTO` that probes ok, never the reference, and
logs one line about what it skipped, as a warning if something could be done about it; a name that is unknown or cannot
run here is an error, never a substitution.

`protocol` says what a backend is.
"""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Sequence
from functools import cache
from typing import Any

from ..errors import BackendError
from ..machine import thread_count
from ..plan.ops import OpCode
from ..plan.plan import Plan
from ..plan.spec import Precision
from .protocol import Hyper, Probe, Program, State

__all__ = [
    "AUTO",
    "BACKENDS",
    "Hyper",
    "Probe",
    "Program",
    "State",
    "check_precision",
    "compile_plan",
    "gpu_layers",
    "host_backend",
    "layer_backend",
    "own_ops",
    "probe",
    "probe_all",
    "resolve",
]

AUTO = ("cuda", "cpp", "numba")
"""Order of preference for ``backend="auto"``."""
BACKENDS = (*AUTO, "reference")

log = logging.getLogger("narrows")


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
