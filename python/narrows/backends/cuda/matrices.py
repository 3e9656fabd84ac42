"""Arrays of CuPy's as operands of launches: their strides, and whether they overlap.

Promises: an array is used in place, turned or not, if its rows or its columns have no gaps. Other arrays are copied
once on the GPU.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import numpy as np

from ..._extras import require
from ...rows.arrays import is_sparse
from .launches import Area, View

__all__ = ["Shape", "check_apart", "matrix", "require_cupy", "row", "shape_of", "view_of"]


def require_cupy() -> Any:
    return require("cupy", "cuda12", "a layer on a GPU")


class Shape(NamedTuple):
    """The shape of a matrix. It is stored `turned` if its columns have no gaps but its rows have."""

    rows: int
    cols: int
    ld: int
    turned: bool = False


def check_apart(results: dict[str, Any], operands: dict[str, Any]) -> None:
    """Refuse a result that shares memory with an operand or with another result."""
    others = {name: array.data if is_sparse(array) else array for name, array in operands.items()}
    for name, array in results.items():
        for other, theirs in others.items():
            if array is not None and theirs is not None and _overlap(array, theirs):
                raise ValueError(f"{name} must not share memory with {other}")
        others[name] = array


def _overlap(one: Any, other: Any) -> bool:
    """Decided by addresses alone: NumPy gets arrays that it never reads."""
    ends = []
    for array in (one, other):
        low = int(array.data.ptr) + sum((n - 1) * s for n, s in zip(array.shape, array.strides, strict=True) if s < 0)
        high = int(array.data.ptr) + sum((n - 1) * s for n, s in zip(array.shape, array.strides, strict=True) if s > 0)
        ends.append((low, high + array.dtype.itemsize))
    (low, high), (begin, end) = ends
    if not one.size or not other.size or high <= begin or end <= low:
        return False
    return bool(np.shares_memory(np.asarray(_Placed(one)), np.asarray(_Placed(other))))


class _Placed:
    """An address and a shape, as NumPy's array interface."""

    def __init__(self, array: Any) -> None:
        self.__array_interface__ = {
            "version": 3,
            "data": (int(array.data.ptr), True),
            "shape": array.shape,
            "strides": array.strides,
            "typestr": array.dtype.str,
        }


def matrix(array: Any, *, turned: bool = False) -> Any:
    """A matrix that kernels can read: the array itself if its rows have no gaps, else a copy.

    If it may be `turned`, columns without gaps suffice.
    """
    if array is None or ld_of(array) or (turned and ld_of(array.T)):
        return array
    return require_cupy().ascontiguousarray(array, array.dtype)


def row(array: Any) -> Any:
    """A vector as a matrix of one row."""
    return None if array is None else array[None]


def ld_of(array: Any) -> Any:
    """Elements from one row to the next; 0 if a row has gaps or rows overlap."""
    (rows, cols), (down, across), size = array.shape, array.strides, array.dtype.itemsize
    if cols > 1 and across != size:
        return 0
    if rows <= 1:
        return max(cols, 1)
    ld: int = down // size if down >= cols * size and down % size == 0 else 0
    return ld


def shape_of(array: Any) -> Any:
    if array is None:
        return None
    rows, cols = array.shape
    ld = ld_of(array)
    return Shape(rows, cols, ld) if ld else Shape(rows, cols, ld_of(array.T), turned=True)


def view_of(at: int, shape: Shape | None) -> Any:
    """A matrix as it is stored."""
    if shape is None:
        return None
    rows, cols = (shape.cols, shape.rows) if shape.turned else (shape.rows, shape.cols)
    return View(cast(Area, at), 0, rows, cols, shape.ld)
