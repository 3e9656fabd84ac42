"""The backend for NVIDIA GPUs: it runs a plan as a list of launches of the kernels in ``csrc/cuda``.

Promises: needs neither nvcc nor a compiler, because kernels are compiled at run time. Every step runs the same
launches, without a decision on the host. `probe` says what is missing, and imports nothing on a machine without a GPU.
No GPU has run it yet. The tests compile the kernels for GPUs and run them on the host.

Reading order: `table` (what Python and C++ agree on), `layout` (operands by name), `launches`, `emit` (op by op),
`schedule`, `program`, `sources`, `blas`, `device`, `layers`.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import os
import re
from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from ...plan.ops import OpCode
from ...plan.plan import Plan
from ...plan.spec import Precision
from .. import Probe

if TYPE_CHECKING:
    from .program import CudaProgram

__all__ = ["compile", "own_ops", "probe"]

LEAST_DRIVER = 12000
"""CUDA 12.0: older drivers do not run the CuPy packages."""
LEAST_CAPABILITY = (7, 5)
LEAST_CUPY = (13, 0)
KEEPING_CUPY = (14, 2)
"""The first CuPy that keeps compiled templates on disk. With older ones each process compiles its kernels again."""
EXTRA = "pip install 'narrows[cuda12]', or 'narrows[cuda13]' for CUDA 13"


def own_ops() -> frozenset[OpCode]:
    """Every op."""
    from .emit import LOWER

    return frozenset(LOWER)


def compile(plan: Plan, *, precision: Precision, n_threads: int) -> CudaProgram:
    """Compile for CuPy's current GPU; `n_threads` has no effect."""
    from .device import CupyDevice
    from .program import CudaProgram

    return CudaProgram(plan, precision, CupyDevice())


def probe() -> Probe:
    """Whether CuPy's current GPU can run the kernels, and what is missing if not.

    The hardware counts as absent if GPUs are hidden on purpose, or if there is neither a GPU nor CuPy.
    """
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if hidden is not None and hidden.strip() in ("", "-1", "NoDevFiles"):
        return Probe(False, f"CUDA_VISIBLE_DEVICES={hidden!r} hides every GPU", absent=True)
    gpu, found_cupy = has_gpu(), find_spec("cupy") is not None
    if not gpu:
        return Probe(False, "no NVIDIA GPU, or no driver for it", absent=not found_cupy)
    if not found_cupy:
        return Probe(False, f"CuPy is missing: {EXTRA}")
    from ...plan.ops import source_folder

    if not (source_folder() / "cuda" / "narrows.cu").is_file():
        return Probe(False, f"the package was installed without its kernels: there are none in {source_folder()}")
    try:
        cupy = importlib.import_module("cupy")
        runtime, version = cupy.cuda.runtime, str(cupy.__version__)
    except Exception as error:
        return Probe(False, f"CuPy does not import ({_line(error)}): {EXTRA}")
    numbers = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    if numbers < LEAST_CUPY:
        return Probe(False, f"CuPy {version} is too old, it must be {_dotted(LEAST_CUPY)} or newer: {EXTRA}")
    try:
        driver, built = int(runtime.driverGetVersion()), int(runtime.runtimeGetVersion())
        if driver == 0:
            return Probe(False, "no NVIDIA driver: install one, or in a container make it visible (--gpus all, --nv)")
        if driver < LEAST_DRIVER:
            least = _version(LEAST_DRIVER)
            return Probe(
                False, f"the NVIDIA driver is for CUDA {_version(driver)}: install a driver for CUDA {least} or newer"
            )
        if driver // 1000 < built // 1000:
            return Probe(
                False,
                f"the NVIDIA driver is for CUDA {_version(driver)}, CuPy for CUDA {built // 1000}: install a newer "
                f"driver, or CuPy for CUDA {driver // 1000}, {EXTRA}",
            )
        if runtime.getDeviceCount() == 0:
            return Probe(False, "no NVIDIA GPU")
        found = runtime.getDeviceProperties(runtime.getDevice())
    except Exception as error:
        why = _line(error)
        forked = "; a forked process cannot use CUDA if its parent does: start the process with the method spawn"
        return Probe(False, f"no usable NVIDIA GPU: {why}{forked if 'InitializationError' in why else ''}")
    name, capability = found["name"].decode(), (found["major"], found["minor"])
    if capability < LEAST_CAPABILITY:
        own, least = _dotted(capability), _dotted(LEAST_CAPABILITY)
        return Probe(False, f"{name} has compute capability {own}; narrows needs {least} or newer")
    if lacking := _lacking(cupy):
        return Probe(False, lacking)
    from .blas import described

    said = f"{name}, CUDA {_version(driver)}, {described(driver // 1000)}"
    if numbers < KEEPING_CUPY:
        said += f"; CuPy {version} compiles the kernels in each process, CuPy {_dotted(KEEPING_CUPY)} keeps them"
    return Probe(True, said)


DEVICE_FILES = ("nvidiactl", "nvidia0", "dxg", "nvgpu", "nvhost-gpu")
"""Files in /dev of NVIDIA's graphics cards, of GPUs under WSL, and of a Jetson."""


def has_gpu(dev: str = "/dev", driver: str = "libcuda.so.1") -> bool:
    """Whether this machine has an NVIDIA GPU. Takes microseconds if it has none.

    Some sandboxes pass a GPU on without its device files. So the driver is asked, too, if it loads.
    """
    windows = os.name == "nt"
    if not windows and any(os.path.exists(f"{dev}/{name}") for name in DEVICE_FILES):
        return True
    try:
        library = ctypes.CDLL("nvcuda.dll" if windows else driver)
        return bool(library.cuInit(0) == 0)
    except (OSError, AttributeError):
        return False


def _lacking(cupy: Any) -> str:
    """The part of CUDA's run-time compiler that is missing; empty if nothing is. CuPy cannot compile without it."""
    try:
        cupy.cuda.nvrtc.getVersion()
    except Exception as error:
        return f"NVRTC, the compiler of the kernels, does not load: {EXTRA} ({_line(error)})"
    with contextlib.suppress(ImportError, AttributeError):  # CuPy from other packagers may find them without it
        if importlib.import_module("cuda.pathfinder").find_nvidia_header_directory("cudart") is None:
            return f"CUDA's headers, which CuPy needs, are missing: {EXTRA}"
    return ""


def _line(error: Exception) -> str:
    """An error as one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def _dotted(version: Sequence[int]) -> str:
    return ".".join(map(str, version))


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"
