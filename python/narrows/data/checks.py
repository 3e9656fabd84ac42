"""Checks of blocks of data: the first bad value is named by row and column, and nothing is repaired."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import DataError
from .source import Source

__all__ = ["check_counts", "check_finite"]

Rows = int | npt.NDArray[np.integer[Any]]


def check_finite(block: Any, row_offset: Rows = 0, source: Source | str = "X") -> None:
    """Raise for the first NaN or infinity of a block.

    Parameters
    ----------
    block : ndarray or SciPy CSR of shape (n_rows, n_columns)
        Any numeric dtype; integers always pass.
    row_offset : int or ndarray of shape (n_rows,)
        The number of the block's first row in the data set, or the number of each of its rows.
    source : Source or str
        Gives the name of the data set, and the names of rows and columns where it knows them.

    Raises
    ------
    DataError
        Also a ``ValueError``. Names row and column, counted from 0, and says NaN or inf.
    """
    values = _stored(block)
    if values.dtype.kind != "f" or values.size == 0:
        return
    # The sum is finite only if every value is; it needs no temporary. An overflowing sum is settled below.
    with np.errstate(over="ignore", invalid="ignore"):
        if np.isfinite(values.sum()):
            return
    bad = ~np.isfinite(values)
    if bad.any():
        row, column, value = _first(block, bad)
        what = "NaN" if np.isnan(value) else "inf" if value > 0 else "-inf"
        raise DataError(f"{_name(source)}: {what} in {_place(row, column, row_offset, source)}; remove or impute it")


def check_counts(block: Any, row_offset: Rows = 0, source: Source | str = "X", columns: Any = None) -> None:
    """Raise for the first value of a block that is not a count: negative, fractional or not finite.

    Parameters
    ----------
    block, row_offset, source
        As for `check_finite`.
    columns : sequence of str, optional
        The names of the columns, where the source does not know them.

    Raises
    ------
    DataError
        Also a ``ValueError``. Names row and column, counted from 0, and the value.
    """
    values = _stored(block)
    if values.dtype.kind in "bu" or values.size == 0:
        return
    bad = values < 0
    if values.dtype.kind == "f":
        with np.errstate(invalid="ignore"):
            bad |= values != np.floor(values)
        bad |= np.isinf(values)
    if bad.any():
        row, column, value = _first(block, bad)
        raise DataError(
            f"{_name(source)}: {value:.9g} in {_place(row, column, row_offset, source, columns)} is not a count"
            f"{': Negative values in data' if value < 0 else ''}; this likelihood needs raw counts (whole numbers "
            "from 0)"
        )


def _stored(block: Any) -> npt.NDArray[Any]:
    return np.asarray(block.data if hasattr(block, "indptr") else block)


def _first(block: Any, bad: npt.NDArray[np.bool_]) -> tuple[int, int, Any]:
    """Row, column and value of the first True of `bad`, in row order and then column order."""
    if hasattr(block, "indptr"):
        at = int(np.argmax(bad))
        row = int(np.searchsorted(block.indptr, at, side="right")) - 1
        inside = np.arange(at, int(block.indptr[row + 1]))  # indices of a row may be unsorted
        inside = inside[bad[inside]]
        at = int(inside[np.argmin(block.indices[inside])])
        return row, int(block.indices[at]), block.data[at]
    row, column = divmod(int(np.argmax(bad)), bad.shape[1])
    return row, column, np.asarray(block)[row, column]


def _name(source: Source | str) -> str:
    return source.name if isinstance(source, Source) else source


def _place(row: int, column: int, row_offset: Rows, source: Source | str, columns: Any = None) -> str:
    number = row_offset + row if isinstance(row_offset, int | np.integer) else int(row_offset[row])
    obs, var = "", "" if columns is None else f" ({columns[column]!s})"
    if isinstance(source, Source):
        if source.obs_names is not None:
            obs = f" ({source.obs_names[number]!s})"
        if source.var_names is not None:
            var = f" ({source.var_names[column]!s})"
    return f"row {number}{obs}, column {column}{var}"
