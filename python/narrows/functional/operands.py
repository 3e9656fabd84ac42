"""Operands of `functional` as arrays that the backends take, and results as arrays of the caller's library."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..plan.spec import ACTIVATIONS, Activation
from ..rows.arrays import check_unmasked
from ..rows.devices import gpu_array, host_array
from ..rows.sparse import any_sparse, check_csr, is_sparse

__all__ = ["FLOAT32", "FLOAT64", "cast", "elementwise", "in_namespace", "operand"]

FLOAT32, FLOAT64 = np.dtype(np.float32), np.dtype(np.float64)
_ELEMENTWISE = {name: act for name, act in ACTIVATIONS.items() if act is not Activation.SOFTMAX}


def elementwise(name: str) -> Activation:
    """The activation called `name`; a ValueError with the choices if it is not elementwise, as softmax."""
    act = _ELEMENTWISE.get(name)
    if act is None:
        raise ValueError(f"activation={name!r} is not an elementwise activation; choose from {', '.join(_ELEMENTWISE)}")
    return act


def operand(value: Any, name: str, ndim: int = 2, on_gpu: bool = False) -> Any:
    """`value` as an ndarray or CSR, of NumPy or CuPy, without a copy if possible."""
    if isinstance(value, np.ndarray):
        array = value
        if isinstance(value, np.ma.MaskedArray):
            check_unmasked(value, name)
    elif any_sparse(value):
        if value.format != "csr" or name != "X":
            raise TypeError(f"{name}: only X may be sparse, and only CSR; got {type(value).__name__}")
        if on_gpu:
            return value
        array = value
    elif on_gpu:
        array = gpu_array(value, name)
    elif hasattr(value, "__dlpack__"):
        array = host_array(value, name)
        if not isinstance(array, np.ndarray):
            raise TypeError(f"{name} is not in the memory of this CPU")
    else:
        array = np.asarray(value)
    if array.ndim != ndim:
        raise ValueError(f"{name} has {array.ndim} dimensions, expected {ndim}")
    if array.dtype.kind not in "fiub":
        raise TypeError(f"{name} has dtype {array.dtype}, expected numbers")
    if is_sparse(array):
        check_csr(array)
    return array


def cast(array: Any, dtype: np.dtype[Any]) -> Any:
    """An aligned array of this native dtype; `array` itself if it is that already."""
    if array.dtype is not dtype and (array.dtype != dtype or not array.dtype.isnative):
        return array.astype(dtype)
    if isinstance(array, np.ndarray) and not array.flags.aligned:
        return array.copy()
    return array


def in_namespace(X: Any, result: NDArray[Any]) -> Any:
    """`result` as an array of X's library."""
    if type(X) is type(result) or is_sparse(X) or not hasattr(X, "__dlpack__"):
        return result
    namespace = (
        X.__array_namespace__() if hasattr(X, "__array_namespace__") else sys.modules[type(X).__module__.split(".")[0]]
    )
    return namespace.from_dlpack(result) if hasattr(namespace, "from_dlpack") else result
