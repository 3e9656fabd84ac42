"""Arrays of a GPU beside those of the CPU: how they are told apart, and what is done to either.

Promises: CuPy is imported when an array of a GPU has come, not before; whatever is of the CPU is given back as it is;
nothing goes from one side to the other but by `to_host` and `like`.
Never: computes.

What works for both needs nothing of this: CuPy's arrays have the methods of NumPy's, and NumPy's functions of elements
(``np.isfinite``) are CuPy's where they are given its arrays.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from .._extras import require
from ..errors import OutOfMemoryError

__all__ = ["check_together", "copying", "device_of", "gpu_array", "gpu_of", "like", "on_gpu", "rows_of", "to_host"]

_CUDA = (2, 13)
"""DLPack's numbers for memory of CUDA, and for memory that CUDA moves as it is needed."""


def on_gpu(X: Any) -> bool:
    """Whether X is an array, or sparse rows, in the memory of an NVIDIA GPU: CuPy's or any other library's."""
    if isinstance(X, np.ndarray):
        return False
    if hasattr(X, "tocsr"):
        X = getattr(X, "data", None)
    device = getattr(X, "__dlpack_device__", None)
    if device is not None:
        return device()[0] in _CUDA
    return hasattr(X, "__cuda_array_interface__")


def gpu_array(X: Any, name: str = "X") -> Any:
    """X, which is on a GPU, as CuPy has it, without a copy: an array, or CSR.

    Raises
    ------
    TypeError
        Its library does not give it away, as PyTorch does not give a tensor that requires gradients.
    ValueError
        It is on another GPU than CuPy's current one.
    """
    cupy = require("cupy", "cuda12", f"{name} on a GPU")
    if hasattr(X, "tocsr"):
        X = X if X.format == "csr" else X.tocsr()
    elif not isinstance(X, cupy.ndarray):
        try:
            X = cupy.from_dlpack(X) if hasattr(X, "__dlpack__") else cupy.asarray(X)
        except (BufferError, RuntimeError, TypeError) as error:
            raise TypeError(f"{name}: {type(X).__name__} cannot be taken as a CuPy array ({error})") from None
    current, own = int(cupy.cuda.Device().id), gpu_of(X)
    if own != current:
        raise ValueError(
            f"{name} is on GPU {own} and CuPy's current one is GPU {current}: call this inside "
            f"`with cupy.cuda.Device({own}):`"
        )
    return X


def gpu_of(X: Any) -> int:
    """The number of the GPU that holds an array or CSR of CuPy's."""
    return int((X.data if hasattr(X, "indptr") else X).device.id)


def device_of(**arrays: Any) -> Any:
    """CuPy's device that holds these arrays, absent ones None, to be entered; None if they are of the CPU.

    Raises
    ------
    TypeError, ValueError
        Some are on a GPU and some are not, or on several.
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
    X = X.data if hasattr(X, "tocsr") else X
    if hasattr(X, "__dlpack_device__"):
        return int(X.__dlpack_device__()[1])
    return gpu_of(require("cupy", "cuda12", "an array on a GPU").asarray(X))


def to_host(X: Any) -> Any:
    """A copy in the memory of the CPU of what is on a GPU; itself if it is not."""
    if not on_gpu(X):
        return X
    return X.get() if hasattr(X, "get") else gpu_array(X).get()


def like(values: Any, X: Any, dtype: Any) -> Any:
    """Numbers as an array of their own on the side of X, wherever they are now."""
    if on_gpu(X):
        return require("cupy", "cuda12", "an array on a GPU").array(values, dtype=dtype)
    return np.array(to_host(values), dtype=dtype)


def rows_of(X: Any, rows: Any) -> Any:
    """X[rows] for a slice or an array of the CPU."""
    if isinstance(rows, np.ndarray) and on_gpu(X):
        with copying():
            return X[require("cupy", "cuda12", "rows on a GPU").asarray(rows)]
    return X[rows]


@contextlib.contextmanager
def copying() -> Iterator[None]:
    """While something of the size of the data may be allocated on a GPU."""
    try:
        yield
    except MemoryError as error:
        if not type(error).__module__.startswith("cupy"):
            raise
        raise OutOfMemoryError(
            f"there is no room on the GPU for a copy of some of the data ({error}): free some of it, or pass "
            "cupy.asnumpy(X), of which a part at a time is taken"
        ) from None


def check_together(X: Any, other: Any, name: str) -> None:
    """Refuse what belongs to rows X and is on another side."""
    if on_gpu(X) != on_gpu(other):
        raise TypeError(_apart(*(("X", name) if on_gpu(X) else (name, "X"))))


def _apart(there: str, here: str) -> str:
    return f"{there} is on a GPU and {here} is not: pass cupy.asarray({here}), or cupy.asnumpy({there})"
