"""Questions to an array alone: is it sparse, which float type holds its values, is it a table of numbers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import DataError

__all__ = [
    "any_sparse",
    "check_numbers",
    "check_unmasked",
    "exact",
    "exact_dtype",
    "float_dtype",
    "holds_floats",
    "is_sparse",
    "narrowed",
    "placing",
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


def check_numbers(X: Any, name: str = "X") -> None:
    """Raise `DataError`, in one line, if X cannot be a table of numbers by its type, dtype, columns or shape.

    Objects pass; `placing` says which of them is no number, if they cannot be converted.
    """
    check_unmasked(X, name)
    nested = isinstance(X, list | tuple)
    if not (nested or hasattr(X, "shape") or hasattr(X, "__array__")):
        raise DataError(f"{name} is a {type(X).__name__}; an array of rows and columns is needed")
    dtype = getattr(X, "dtype", None)
    kind = getattr(dtype, "kind", "")
    remedy = _REMEDIES.get(kind)
    if remedy is not None:
        kind = "Complex data not supported: " if kind == "c" else ""
        raise DataError(f"{name}: {kind}numbers expected, got dtype {dtype}; {remedy.format(name)}")
    for column, dtype in zip(X.columns, X.dtypes, strict=True) if hasattr(X, "columns") else ():
        if getattr(dtype, "kind", "") in ("m", "M", "c") or getattr(dtype, "is_temporal", bool)():
            raise DataError(f"{name}: column {column!r} is {dtype}, not a number; drop or encode it")
    shape = getattr(X, "shape", (0, 0))
    if len(shape) == 1 or (nested and len(X) > 0 and not np.ndim(X[0])):
        values = f"{name}.to_numpy()" if hasattr(X, "to_numpy") else f"np.asarray({name})" if dtype is None else name
        raise DataError(
            f"{name}: Expected 2D array, got 1D array instead. Reshape your data: {values}.reshape(-1, 1) for one "
            f"feature, {values}.reshape(1, -1) for one sample"
        )


_REMEDIES = {
    "c": "pass its absolute value, or the two parts as columns",
    "M": "pass {0}.astype('int64')",
    "m": "pass {0}.astype('int64')",
    "S": "pass {0}.astype(float)",
    "U": "pass {0}.astype(float)",
    "V": "pass {0}.astype('float32')",
}
"""What to do about the kinds of dtypes that are no numbers."""


@contextlib.contextmanager
def placing(X: Any, name: str = "X") -> Iterator[None]:
    """Say where the first object is that is no number, if X cannot be converted to numbers."""
    try:
        yield
    except (TypeError, ValueError) as error:
        found = None if isinstance(error, DataError) else _text_in(X, name)
        if found is None:
            raise
        raise (TypeError if isinstance(error, TypeError) else ValueError)(found) from None


def _text_in(X: Any, name: str) -> str | None:
    """Where the first object of X is that is no number, as a message; None if there is none."""
    columns = getattr(X, "columns", None)
    if (columns is None and not isinstance(X, np.ndarray)) or len(X.shape) != 2:
        return None
    for i, row in enumerate(np.asarray(X, dtype=object)):
        for j, value in enumerate(row):
            try:
                if value is not None and type(value).__name__ != "NAType":
                    float(value)
            except (TypeError, ValueError) as error:
                called = "" if columns is None else f" ({columns[j]!s})"
                return f"{name}: {value!r} in row {i}, column {j}{called} is not a number ({error})"
    return None
