"""Questions to an array alone: is it sparse, which float type holds its values, are values masked."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import DataError

__all__ = [
    "any_sparse",
    "check_unmasked",
    "exact",
    "exact_dtype",
    "float_dtype",
    "holds_floats",
    "is_sparse",
    "narrowed",
]

WHOLE = 2**24
"""float32 holds every whole number up to this one."""


def is_sparse(X: Any) -> bool:
    """Whether X is CSR, of SciPy or CuPy."""
    return hasattr(X, "indptr")


def any_sparse(X: Any) -> bool:
    """Whether X is sparse in any layout, of SciPy or CuPy."""
    # Duck typing avoids the import of scipy.sparse for dense data.
    return hasattr(X, "tocsr") and hasattr(X, "nnz")


def float_dtype(dtype: npt.DTypeLike) -> np.dtype[Any]:
    """The dtype of results from numbers of `dtype`: float64 (or wider) gives float64, everything else float32."""
    given = np.dtype(dtype)
    if given.kind not in "biuf":
        raise DataError(f"numbers expected, got dtype {given}")
    return np.dtype(np.float64 if given.kind == "f" and given.itemsize >= 8 else np.float32)


def holds_floats(dtype: npt.DTypeLike) -> bool:
    """Whether `dtype` is float32 or wider. Results keep such a type; other results have the network's type."""
    given = np.dtype(dtype)
    return given.kind == "f" and given.itemsize >= 4


def exact_dtype(values: npt.NDArray[Any]) -> np.dtype[Any]:
    """The dtype in which `values` are read without a change: float32, or float64 where float32 would lose digits.

    It depends on the values only for whole numbers of 32 bits and more.
    """
    wide = values.dtype.kind in "iu" and values.dtype.itemsize >= 4 and values.size > 0
    if wide and max(-int(values.min()), int(values.max())) > WHOLE:
        return np.dtype(np.float64)
    return float_dtype(values.dtype)


def exact(block: Any) -> npt.NDArray[Any]:
    """A dense block in its `exact_dtype`, without a copy if it has that already."""
    return np.asarray(block, dtype=exact_dtype(block))


def narrowed(values: npt.NDArray[np.float64]) -> npt.NDArray[Any]:
    """`values` as float32 if that changes none of them, else `values`. For numbers that were parsed as float64."""
    with np.errstate(over="ignore", invalid="ignore"):
        small = values.astype(np.float32)
    return small if np.array_equal(small, values, equal_nan=True) else values


def check_unmasked(X: Any, where: str = "X") -> None:
    """Raise `DataError` for a masked array with masked values, whose hidden numbers would be used otherwise."""
    if isinstance(X, np.ma.MaskedArray) and np.ma.is_masked(X):
        raise DataError(f"{where}: a masked array with masked values; fill them first")
