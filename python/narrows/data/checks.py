"""Checks of blocks of data. An error names the first bad value by row and column; nothing is repaired.

A message gives the row number in the whole data set, and the names of the row and the column if they are known.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import DataError
from ..rows.devices import to_host
from ..rows.sparse import is_sparse
from .readers import has_layers
from .source import Source

__all__ = ["check_counts", "check_finite", "check_representable", "check_within"]

Rows = int | npt.NDArray[np.integer[Any]]


def check_finite(block: Any, row_offset: Rows = 0, source: Source | str = "X", **labels: Any) -> None:
    """Raise for the first NaN or infinity of a block.

    Parameters
    ----------
    block : ndarray or SciPy CSR of shape (n_rows, n_columns), or CuPy's
        Any numeric dtype; integers always pass.
    row_offset : int or ndarray of shape (n_rows,)
        Row number of the block's first row in the data set, or of each of its rows.
    source : Source or str
        Gives the names of the data set, its rows and its columns, or only a name for the data set.
    columns : sequence of str, optional
        Names of the columns, if the source has none.
    name : str, optional
        Another name for the data set.

    Raises
    ------
    DataError
        Also a ``ValueError``. Names the row and the column, counted from 0, and says NaN or inf.
    """
    values = _stored(block)
    if values.dtype.kind != "f" or values.size == 0:
        return
    # The sum needs no temporary. If it is finite, so is every value; if it overflows, the search below decides.
    with np.errstate(over="ignore", invalid="ignore"):
        if np.isfinite(values.sum()):
            return
    bad = ~np.isfinite(values)
    if bad.any():
        row, column, value = _first(block, bad)
        what = "NaN" if np.isnan(value) else "inf" if value > 0 else "-inf"
        raise DataError(f"{_place(row, column, what, row_offset, source, **labels)}; remove or impute it")


def check_counts(block: Any, row_offset: Rows = 0, source: Source | str = "X", **labels: Any) -> None:
    """Raise for the first value of a block that is not a count: negative, fractional or not finite.

    Parameters
    ----------
    block, row_offset, source, columns, name
        As for `check_finite`.

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
        layers = isinstance(source, Source) and has_layers(source.path)
        raise DataError(
            f"{_place(row, column, f'{value:.9g}', row_offset, source, **labels)} is not a count"
            f"{': Negative values in data' if value < 0 else ''}; this loss needs raw counts (whole numbers "
            f"from 0){'; if a layer holds them, choose it with layer=NAME' if layers else ''}"
        )


def check_within(
    block: Any,
    low: float,
    high: float,
    needed: str,
    row_offset: Rows = 0,
    source: Source | str = "X",
    **labels: Any,
) -> None:
    """Raise for the first value of a finite block that is below `low` or above `high`.

    Parameters
    ----------
    block, row_offset, source, columns, name
        As for `check_finite`.
    low, high : float
    needed : str
        End of the message: what is needed instead.

    Raises
    ------
    DataError
        Also a ``ValueError``. Names row and column, counted from 0, and the value.
    """
    values = _stored(block)
    if values.size == 0 or (values.min() >= low and (high == np.inf or values.max() <= high)):
        return
    row, column, value = _first(block, (values < low) | (values > high))
    raise DataError(f"{_place(row, column, f'{value:.9g}', row_offset, source, **labels)}; {needed}")


def check_representable(
    block: Any, dtype: npt.DTypeLike, row_offset: Rows = 0, source: Source | str = "X", **labels: Any
) -> None:
    """Raise for the first value of a finite block that would be infinite in `dtype`.

    Parameters
    ----------
    block, row_offset, source, columns, name
        As for `check_finite`.
    dtype : dtype
        float32 or float64.

    Raises
    ------
    DataError
        Also a ``ValueError``. Names row and column, counted from 0, and the value.
    """
    values = _stored(block)
    if values.dtype.kind != "f" or values.dtype.itemsize <= np.dtype(dtype).itemsize or values.size == 0:
        return
    largest = float(np.finfo(dtype).max)
    if isinstance(values, np.ndarray):
        # If the sum of squares is below largest**2, so is every square. This takes one pass and no temporary.
        axes = "ij"[: values.ndim]
        if np.einsum(f"{axes},{axes}->", values, values) < largest**2:
            return
    needed = f"too large for {np.dtype(dtype).name}: scale the data, or set precision='float64'"
    check_within(block, -largest, largest, needed, row_offset, source, **labels)


def _stored(block: Any) -> npt.NDArray[Any]:
    values: npt.NDArray[Any] = block.data if is_sparse(block) else block
    return values


def _first(block: Any, bad: npt.NDArray[np.bool_]) -> tuple[int, int, Any]:
    """Row, column and value of the first True of `bad`, in row order and then column order."""
    at = int(bad.argmax())
    if is_sparse(block):
        indptr = to_host(block.indptr)
        row = int(np.searchsorted(indptr, at, side="right")) - 1
        inside = slice(at, int(indptr[row + 1]))  # the indices of a row may be unsorted
        columns, found = to_host(block.indices[inside]), np.flatnonzero(to_host(bad[inside]))
        at = int(found[columns[found].argmin()])
        return row, int(columns[at]), block.data[inside][at].item()
    row, column = divmod(at, bad.shape[1])
    return row, column, block[row, column].item()


def _place(
    row: int,
    column: int,
    what: str,
    row_offset: Rows,
    source: Source | str,
    columns: Any = None,
    name: str | None = None,
) -> str:
    """The start of a message: the data set, `what` it holds, and where."""
    number = row_offset + row if isinstance(row_offset, int | np.integer) else int(row_offset[row])
    obs, var = "", "" if columns is None else f" ({columns[column]!s})"
    if isinstance(source, Source):
        if source.obs_names is not None:
            obs = f" ({source.obs_names[number]!s})"
        if source.var_names is not None:
            var = f" ({source.var_names[column]!s})"
    if name is None:
        name = source.name if isinstance(source, Source) else source
    return f"{name}: {what} in row {number}{obs}, column {column}{var}"
