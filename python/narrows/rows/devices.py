"""Arrays on the CPU and on a GPU: which device an array is on, and how to move it.

- CuPy is imported when the first array on a GPU arrives.
- Functions return arrays on the CPU as they are. Only `to_host` and `like` move data between devices.

Much code needs nothing of this. CuPy arrays have NumPy's methods, and NumPy's elementwise functions (``np.isfinite``)
take CuPy arrays.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from .._extras import require
from ..errors import OutOfMemoryError
from .arrays import any_sparse, is_sparse

__all__ = [
    "check_together",
    "copying",
    "device_of",
    "gpu_array",
    "gpu_of",
    "host_array",
    "like",
    "on_gpu",
    "rows_of",
    "to_host",
]

_CUDA = (2, 13)
"""DLPack's numbers for CUDA memory, and for managed memory, which CUDA moves when needed."""


def on_gpu(X: Any) -> bool:
    """Whether X is an array or a sparse matrix on an NVIDIA GPU, of CuPy or another library."""
    if isinstance(X, np.ndarray):
        return False
    if any_sparse(X):
        X = getattr(X, "data", None)
    device = getattr(X, "__dlpack_device__", None)
    if device is not None:
        return device()[0] in _CUDA
    return hasattr(X, "__cuda_array_interface__")


def gpu_array(X: Any, name: str = "X") -> Any:
    """X on a GPU as a CuPy array or CuPy CSR, without a copy.

    Raises
    ------
    TypeError
        Its library does not share the array. PyTorch, for example, does not share a tensor that requires gradients.
    ValueError
        X is not on CuPy's current GPU.
    """
    cupy = require("cupy", "cuda12", f"{name} on a GPU")
    if any_sparse(X):
        X = X if X.format == "csr" else X.tocsr()
    elif not isinstance(X, cupy.ndarray):
        try:
            X = cupy.from_dlpack(X) if hasattr(X, "__dlpack__") else cupy.asarray(X)
        except (BufferError, RuntimeError, TypeError) as error:
            raise TypeError(f"{name}: {type(X).__name__} cannot be taken as a CuPy array ({error})") from None
    current, own = int(cupy.cuda.Device().id), gpu_of(X)
    if own != current:
        raise ValueError(
            f"{name} is on GPU {own}, but CuPy's current GPU is {current}: call this inside "
            f"`with cupy.cuda.Device({own}):`"
        )
    return X


def host_array(X: Any, name: str = "X") -> Any:
    """X as a NumPy array, without a copy, if it is an array of another library on the CPU; anything else as it is.

    Raises
    ------
    TypeError
        Its library does not share the array, or NumPy lacks its dtype.
    """
    if isinstance(X, np.ndarray | np.generic) or not hasattr(X, "__dlpack__") or on_gpu(X):
        return X
    if getattr(X, "requires_grad", False):
        raise TypeError(f"{name} requires gradients, which are not traced here: pass {name}.detach()")
    try:
        return np.from_dlpack(X)
    except (AttributeError, BufferError, RuntimeError, TypeError, ValueError) as error:
        dtype = str(getattr(X, "dtype", ""))
        if any(kind in dtype for kind in ("bfloat16", "float8", "float4")):
            raise TypeError(f"{name} is {dtype}, which NumPy lacks: pass it as float32") from None
        reason = " ".join(str(error).split())
        raise TypeError(f"{name}: {type(X).__name__} cannot be taken as a NumPy array ({reason})") from None


def gpu_of(X: Any) -> int:
    """The number of the GPU that holds a CuPy array or CuPy CSR."""
    return int((X.data if is_sparse(X) else X).device.id)


def device_of(**arrays: Any) -> Any:
    """CuPy's device of these arrays, as a context manager; None if they are on the CPU. Arrays may be None.

    Raises
    ------
    TypeError, ValueError
        The arrays are on several devices.
    """
    given = {name: X for name, X in arrays.items() if X is not None}
    there = {name: _device_of(X) for name, X in given.items() if on_gpu(X)}
    if not there:
        return None
    (first, gpu), *_ = there.items()
    for name in given:
        if name not in there:
            raise TypeError(_apart(first, name))
        if there[name] != gpu:
            raise ValueError(
                f"{first} is on GPU {gpu} and {name} on GPU {there[name]}: move one, by cupy.asarray({name}) inside "
                f"`with cupy.cuda.Device({gpu}):`"
            )
    return require("cupy", "cuda12", f"{first} on a GPU").cuda.Device(gpu)


def _device_of(X: Any) -> int:
    """The number of the GPU that holds X, which is on one."""
    X = X.data if any_sparse(X) else X
    if hasattr(X, "__dlpack_device__"):
        return int(X.__dlpack_device__()[1])
    return gpu_of(require("cupy", "cuda12", "an array on a GPU").asarray(X))


def to_host(X: Any) -> Any:
    """X on the CPU: a copy if X is on a GPU, otherwise X itself."""
    if not on_gpu(X):
        return X
    return X.get() if hasattr(X, "get") else gpu_array(X).get()


def like(values: Any, X: Any, dtype: Any) -> Any:
    """`values` as a new array on the device of X."""
    if on_gpu(X):
        return require("cupy", "cuda12", "an array on a GPU").array(values, dtype=dtype)
    return np.array(to_host(values), dtype=dtype)


def rows_of(X: Any, rows: Any) -> Any:
    """X[rows] for a slice, or for row numbers on the CPU."""
    if isinstance(rows, np.ndarray) and on_gpu(X):
        with copying():
            return X[require("cupy", "cuda12", "rows on a GPU").asarray(rows)]
    return X[rows]


@contextlib.contextmanager
def copying() -> Iterator[None]:
    """Turn a GPU's lack of memory, while data are copied there, into an error that says what to do."""
    try:
        yield
    except MemoryError as error:
        if not type(error).__module__.startswith("cupy"):
            raise
        raise OutOfMemoryError(
            f"the GPU has no room for a copy of some of the data ({error}): free memory there, or pass "
            "cupy.asnumpy(X), which is copied to the GPU in parts"
        ) from None


def check_together(X: Any, other: Any, name: str) -> None:
    """Raise TypeError if X and `other` are on different devices."""
    if on_gpu(X) != on_gpu(other):
        raise TypeError(_apart(*(("X", name) if on_gpu(X) else (name, "X"))))


def _apart(there: str, here: str) -> str:
    return f"{there} is on a GPU and {here} is not: pass cupy.asarray({here}), or cupy.asnumpy({there})"
