"""Checks of blocks of data. An error names the first bad value by row and column; nothing is repaired.

A loss of digits in float32 is a warning, which names the column.

A message gives the row number in the whole data set, and the names of the row and the column if they are known.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import DataError
from ..rows.arrays import WHOLE, holds_floats
from ..rows.devices import on_gpu, to_host
from ..rows.sparse import is_sparse
from .readers import has_layers
from .source import Source

__all__ = ["check_counts", "check_finite", "check_representable", "check_within", "warn_collapsed"]

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

    Examples
    --------
    >>> import numpy as np
    >>> from narrows.data import check_finite
    >>> check_finite(np.array([[1.0, np.nan]]), source="table")
    Traceback (most recent call last):
    narrows.errors.DataError: ...
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

    Examples
    --------
    >>> import numpy as np
    >>> from narrows.data import check_counts
    >>> check_counts(np.array([[1.0, 2.0], [0.0, 3.0]]))
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


COLLAPSE_ROWS = 1024
"""Rows at the start, and as many over the whole block, whose distinct values `warn_collapsed` counts."""
COLLAPSE_BYTES = 1 << 20
"""Bytes of the sample that it copies at once."""


def warn_collapsed(block: Any, columns: Any = None, name: str = "X") -> bool:
    """Warn if distinct values of a column become equal in float32, which the network is about to use.

    Whole numbers above 2**24 and values with a large offset, such as times, do that. It looks at a sample of the rows.
    A column counts if more than a hundredth of its distinct values in the sample are lost.

    Parameters
    ----------
    block : ndarray or SciPy CSR of shape (n_rows, n_columns)
        Any numeric dtype.
    columns : sequence of str, optional
        Names of the columns.
    name : str
        Name of the data.

    Returns
    -------
    bool
        Whether it warned.
    """
    values = _stored(block)
    if on_gpu(values) or values.size == 0 or values.dtype.kind not in "iuf" or values.dtype.itemsize < 4:
        return False
    if holds_floats(values.dtype) and values.dtype.itemsize == 4:
        return False
    n_rows, n_columns = block.shape
    rows = np.unique(np.r_[: min(n_rows, COLLAPSE_ROWS), np.linspace(0, n_rows - 1, COLLAPSE_ROWS).astype(np.int64)])
    columns_of = np.arange(n_columns)
    if is_sparse(block):
        # Zeros between the values make offsets harmless; large whole numbers remain.
        if max(-int(values.min()), int(values.max())) <= WHOLE:
            return False
        large = np.abs(values.astype(np.float64)) > WHOLE
        columns_of = np.unique(block.indices[: len(values)][large])
        block = block[rows]
    step = max(1, COLLAPSE_BYTES // (8 * len(rows)))
    found: list[tuple[int, int, int]] = []
    for at in range(0, len(columns_of), step):
        part = columns_of[at : at + step]
        dense = block[:, part].toarray() if is_sparse(block) else np.asarray(block[rows, part[0] : part[-1] + 1])
        found += [(int(part[j]), before, after) for j, before, after in _collapsed(dense)]
    if not found:
        return False
    first, before, after = found[0]
    called = "" if columns is None else f" ({columns[first]!s})"
    more = f", and {len(found) - 1} more column(s)" if len(found) > 1 else ""
    warnings.warn(
        f"{name}: column {first}{called} has {before} distinct values in {len(rows)} rows, and {after} in "
        f"float32{more}: standardise the data before, or set precision='float64'",
        UserWarning,
        stacklevel=2,
    )
    return True


def _collapsed(sample: npt.NDArray[Any]) -> Iterator[tuple[int, int, int]]:
    """The columns whose values become equal in float32, with their numbers of distinct values before and after."""
    with np.errstate(over="ignore", invalid="ignore"):
        low, high = sample.min(axis=0).astype(np.float64), sample.max(axis=0).astype(np.float64)
        most = np.maximum(np.abs(low), np.abs(high))
        for j in np.flatnonzero((most > WHOLE) | (most > 4 * (high - low))).tolist():
            ordered = np.sort(sample[:, j])
            before = 1 + int(np.count_nonzero(np.diff(ordered)))
            after = 1 + int(np.count_nonzero(np.diff(ordered.astype(np.float32))))
            if before - after > before // 100:
                yield j, before, after


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
