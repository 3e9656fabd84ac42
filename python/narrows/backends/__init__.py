"""Backends: which ones can run a plan here, which one runs it, and why others were skipped.

Promises: `probe` never raises. ``backend="auto"`` takes the first of `AUTO` that probes ok, never the reference. It
logs one line about the skipped ones, as a warning if the user can change that. An unknown name, or a backend that
cannot run here, is an error, never a substitution.

`protocol` defines a backend.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from functools import cache
from typing import Any

from .._extras import importing, load
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
    return load(f".{name}", __name__)


def probe(name: str) -> Probe:
    """Whether the backend `name` can run here."""
    try:
        with importing:  # a backend imports its libraries
            result: Probe = _module(name).probe()
        return result
    except Exception as error:
        return Probe(False, f"{type(error).__name__}: {error}")


def own_ops(name: str) -> frozenset[OpCode]:
    """The ops that a backend implements itself; the others run in the reference's form."""
    own: frozenset[OpCode] = _module(name).own_ops()
    return own


def probe_all() -> dict[str, Probe]:
    """`probe` of every backend, in order of preference."""
    return {name: probe(name) for name in BACKENDS}


_announced: set[str] = set()


def resolve(name: str = "auto", *, announce: bool = True) -> str:
    """The backend that will run: `name`, or the first of `AUTO` that can.

    ``NARROWS_BACKEND`` overrides ``"auto"``. If `announce`, the choice of ``"auto"`` is logged once. It is a warning if
    ``"auto"`` skipped hardware that this machine has, such as a GPU without CuPy.

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
    """The first of these backends that can run here."""
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
    """The backend for arrays in host memory that do not go to a GPU: the choice of "auto" without "cuda", made once."""
    forced = os.environ.get("NARROWS_BACKEND") or "auto"
    return _first([name for name in AUTO if name != "cuda"], True) if forced in ("auto", "cuda") else resolve(forced)


@cache
def layer_backend() -> Any:
    """The module with `dense_layer` and `dense_backward_layer` for `narrows.functional` on a CPU."""
    return _module(host_backend())


@cache
def gpu_layers() -> Any:
    """The module with the same functions for operands on a GPU."""
    return _module("cuda.layers")


def compile_plan(
    plan: Plan, backend: str, *, precision: Any = Precision.FLOAT32, n_threads: int | None = None
) -> Program:
    """Compile `plan` for the (resolved) backend, in a precision that `Precision.of` knows."""
    precision = check_precision(precision, backend)
    program: Program = _module(backend).compile(plan, precision=precision, n_threads=thread_count(n_threads))
    return program


def check_precision(precision: Any, backend: str) -> Precision:
    """The precision, if the (resolved) backend has it; else raise BackendError."""
    found = Precision.of(precision)
    if found is Precision.TF32 and backend != "cuda":
        raise BackendError(
            f"precision='tf32' needs backend='cuda', and this is {backend!r}: use precision='float32' or backend='cuda'"
        )
    return found
