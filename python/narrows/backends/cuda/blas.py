"""Large products with cuBLAS. The handle is our own, because a graph cannot capture calls on CuPy's handle.

Promises: stream, workspace and mode of a handle are set once. So a call can be captured, waits for nothing, and gives
the same bits in each run. float32 is not rounded to TF32 unless the program asks for it.
Never: links against CUDA. The library is found and called at run time; `load` raises an error if there is none.

cuBLAS stores matrices by columns, narrows by rows, so each sees the transpose of the other's matrix. A product is
therefore computed as the product of the transposes in the other order.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import os
import sys
import weakref
from collections.abc import Callable, Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ...plan.spec import Precision
from .launches import BLAS
from .layout import layout

__all__ = ["WORKSPACE", "Blas", "described", "load"]

WORKSPACE = 32 << 20
"""Bytes of a handle's workspace: cuBLAS recommends this for Hopper, and less for other GPUs."""
OLDEST = 12
"""The first version of CUDA with a usable library."""
MISSING = "pip install nvidia-cublas-cu12, or nvidia-cublas for CUDA 13"

# Of cublas_api.h and library_types.h
SUCCESS, DEFAULT_MATH = 0, 0
MAJOR_VERSION, MINOR_VERSION = 0, 1
OP_N, OP_T = 0, 1
GEMM_DEFAULT = -1
R_32F, R_64F, R_16BF = 0, 1, 14
COMPUTE_32F, COMPUTE_64F, COMPUTE_32F_FAST_TF32 = 68, 70, 77

TYPES = {
    Precision.FLOAT32: (R_32F, R_32F, COMPUTE_32F),
    Precision.TF32: (R_32F, R_32F, COMPUTE_32F_FAST_TF32),
    Precision.BFLOAT16: (R_16BF, R_32F, COMPUTE_32F),
    Precision.FLOAT64: (R_64F, R_64F, COMPUTE_64F),
}
"""Types of the factors, of their product, and of the sums."""

_int, _pointer = ctypes.c_int, ctypes.c_void_p
_GEMM = (
    [_pointer, *[_int] * 5, _pointer]
    + [_pointer, _int, _int] * 2
    + [_pointer]
    + [_pointer, _int, _int]
    + [_int, _int]
)  # fmt: skip
SIGNATURES: dict[str, list[Any]] = {
    "cublasCreate_v2": [ctypes.POINTER(_pointer)],
    "cublasDestroy_v2": [_pointer],
    "cublasSetStream_v2": [_pointer, _pointer],
    "cublasSetWorkspace_v2": [_pointer, _pointer, ctypes.c_size_t],
    "cublasSetMathMode": [_pointer, _int],
    "cublasGetProperty": [_int, ctypes.POINTER(_int)],
    "cublasGemmEx": _GEMM,
}


@cache
def load(driver: int) -> ctypes.CDLL:
    """The library for a driver with this major version of CUDA.

    Raises
    ------
    OSError
        No library was found, or none loads.
    """
    said = []
    for path in _candidates(driver):
        try:
            library = ctypes.CDLL(path)
            version = _version(_declared(library))
        except (OSError, AttributeError) as error:
            said.append(f"{path}: {error}")
            continue
        if OLDEST <= int(version.split(".")[0]) <= driver:
            return library
        said.append(f"{path} is for CUDA {version}, the driver for {driver}")
    # Missing files get one message; a library that does not load gets its own error.
    there = [line for line in said if "cannot open shared object file" not in line and "not find module" not in line]
    raise OSError("; ".join(there) or f"cuBLAS was not found: {MISSING}")


def described(driver: int) -> str:
    """A line for the probe: the version of the library, or why there is none."""
    try:
        return f"cuBLAS {_version(load(driver))}"
    except OSError as error:
        return f"without cuBLAS, wide layers are slower: {error}"


def _version(library: ctypes.CDLL) -> str:
    numbers = [_int(), _int()]
    for which, number in zip((MAJOR_VERSION, MINOR_VERSION), numbers, strict=True):
        library.cublasGetProperty(which, ctypes.byref(number))
    return ".".join(str(number.value) for number in numbers)


def _declared(library: ctypes.CDLL) -> ctypes.CDLL:
    for name, arguments in SIGNATURES.items():
        getattr(library, name).argtypes = arguments
    library.cublasGetStatusString.argtypes, library.cublasGetStatusString.restype = [_int], ctypes.c_char_p
    return library


def _candidates(driver: int) -> Iterator[str]:
    """Paths and names to try: from NVIDIA's own search, if installed; in wheels; in the system; in a toolkit."""
    with contextlib.suppress(Exception):  # there are other places to look
        yield str(importlib.import_module("cuda.pathfinder").load_nvidia_dynamic_lib("cublas").abs_path)
    versions = range(driver, OLDEST - 1, -1)
    windows = sys.platform == "win32"
    names = [f"cublas64_{v}.dll" if windows else f"libcublas.so.{v}" for v in versions]
    found = find_spec("nvidia")
    for folder in found.submodule_search_locations or [] if found else []:
        for name in names:
            yield from map(str, sorted(Path(folder).glob(f"*/{'bin' if windows else 'lib'}/{name}")))
    yield from names
    if toolkit := os.environ.get("CUDA_PATH"):
        yield from (str(Path(toolkit, "bin" if windows else "lib64", name)) for name in names)


class Blas:
    """
    Parameters
    ----------
    library : ctypes.CDLL
        See `load`.
    stream : int
        The stream of the products.
    allocate : callable
        Allocates device memory that lives as long as the handle.

    Raises
    ------
    RuntimeError
        cuBLAS cannot make a handle.
    """

    def __init__(self, library: ctypes.CDLL, stream: int, allocate: Callable[[int], int]) -> None:
        self._library = _declared(library)
        self._handle = _pointer()
        self._call("cublasCreate_v2", ctypes.byref(self._handle))
        weakref.finalize(self, library.cublasDestroy_v2, self._handle).atexit = False
        # In this order, because a new stream removes the workspace.
        self._call("cublasSetStream_v2", self._handle, stream)
        self._call("cublasSetWorkspace_v2", self._handle, allocate(WORKSPACE), WORKSPACE)
        self._call("cublasSetMathMode", self._handle, DEFAULT_MATH)

    def _call(self, name: str, *arguments: Any) -> None:
        status = getattr(self._library, name)(*arguments)
        if status != SUCCESS:
            raise RuntimeError(f"{name}: {self._library.cublasGetStatusString(status).decode()}")

    def product(self, operands: Any) -> None:
        """Run a launch of `launches.BLAS`; its operands are `blas` of ``launches.def``."""
        known = layout((BLAS,))

        def of(name: str) -> Any:
            return operands[known[name].kind][known[name].position]

        left, right, out = map(of, ("left", "right", "out"))
        of_factors, of_product, sums = TYPES[Precision(of("precision"))]
        number = ctypes.c_double if sums == COMPUTE_64F else ctypes.c_float
        alpha, beta = number(of("alpha")), number(of("beta"))
        # Strides count elements of 32 bits; bfloat16 has two numbers in each.
        unit = 2 if of_factors == R_16BF else 1
        self._call(
            "cublasGemmEx", self._handle, OP_T if of("right_rows") else OP_N, OP_T if of("left_turned") else OP_N,
            int(of("cols")), int(of("rows")), int(of("depth")), ctypes.addressof(alpha),
            int(right["data"]), of_factors, unit * int(right["ld"]),
            int(left["data"]), of_factors, unit * int(left["ld"]),
            ctypes.addressof(beta), int(out["data"]), of_product, int(out["ld"]), sums, GEMM_DEFAULT,
        )  # fmt: skip
