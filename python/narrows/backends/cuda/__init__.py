"""The backend for NVIDIA GPUs: kernels of ``csrc/cuda``, compiled at run time, over the launches of a plan.

Promises: needs neither nvcc nor a compiler; a plan runs the same launches step after step, without a copy or a choice
between them; `probe` says what is missing.
Never: chosen by itself. It has run on no GPU yet: kernels are compiled for GPUs and run on the host by the tests, so it
is not among `backends.BACKENDS`.

Reading order: `table` (what Python and C++ agree on), `launches`, `lowering` (op by op), `program`, `nvrtc`, `device`.
"""

from __future__ import annotations

import importlib
from importlib.util import find_spec

from ...plan import OpCode, Plan, Precision
from .. import Probe
from .device import CupyDevice
from .lowering import LOWER
from .nvrtc import source_folder
from .program import CudaProgram

__all__ = ["CudaProgram", "compile", "own_ops", "probe"]

LEAST_DRIVER = 12000
"""CUDA 12.0, the first driver that runs what the CuPy packages bring."""
LEAST_CAPABILITY = (7, 5)


def own_ops() -> frozenset[OpCode]:
    """Every op: nothing is left to the generic ones."""
    return frozenset(LOWER)


def compile(plan: Plan, *, precision: Precision, n_threads: int) -> CudaProgram:
    """For the first GPU; its threads are its own affair."""
    return CudaProgram(plan, precision, CupyDevice())


def probe() -> Probe:
    """Whether there is a GPU that the kernels are compiled for, and what is missing."""
    if not (source_folder() / "cuda" / "narrows.cu").is_file():
        return Probe(False, f"the package was installed without its kernels: {source_folder()} has none")
    if find_spec("cupy") is None:
        return Probe(False, "CuPy is missing: pip install 'narrows[cuda12]', or 'narrows[cuda13]' for CUDA 13")
    try:
        runtime = importlib.import_module("cupy").cuda.runtime
    except Exception as error:
        return Probe(False, f"CuPy does not import: {type(error).__name__}: {error}")
    try:
        driver = int(runtime.driverGetVersion())
        if driver == 0:
            return Probe(False, "no NVIDIA driver")
        if driver < LEAST_DRIVER:
            return Probe(
                False, f"the driver is of CUDA {_version(driver)}: it must be {_version(LEAST_DRIVER)} or newer"
            )
        if runtime.getDeviceCount() == 0:
            return Probe(False, "no NVIDIA GPU")
        found = runtime.getDeviceProperties(0)
    except Exception as error:
        return Probe(False, f"no NVIDIA GPU: {type(error).__name__}: {error}")
    name, capability = found["name"].decode(), (found["major"], found["minor"])
    if capability < LEAST_CAPABILITY:
        least = ".".join(map(str, LEAST_CAPABILITY))
        return Probe(
            False, f"{name} has compute capability {capability[0]}.{capability[1]}: it must be {least} or newer"
        )
    return Probe(True, f"{name}, CUDA {_version(driver)}")


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"
