"""`Table`: rows of X with their targets, weights and conditions, in memory or read from a `Source`.

Data are made dense, copied or changed only where they must be.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..data.checks import check_counts, check_finite, check_representable, check_within, warn_collapsed
from ..data.source import ArraySource, Source
from ..plan.spec import Loss
from ..rows.devices import copying, on_gpu, rows_of, to_host
from ..rows.readahead import read_ahead
from ..rows.shifted import Shifted, stored_rows
from ..rows.sparse import is_sparse

__all__ = ["BLOCK_BYTES", "Rows", "Table", "Totals", "check_values", "density", "fingerprint", "value_range"]

BLOCK_BYTES = 256 << 20
"""Bytes of a source that are in memory at once."""


def density(X: Any, *, implicit: bool = True) -> float:
    """The part of the elements of an array, CSR or Source that is stored.

    `implicit` rows of a source are read without their shift.
    """
    X = stored_rows(X)
    stored = X.nnz if is_sparse(X) else _stored(X, implicit)
    return 1.0 if stored is None else float(stored) / max(1, int(X.shape[0]) * int(X.shape[1]))


class Totals(NamedTuple):
    """Sums of counts by row and by column."""

    rows: NDArray[np.float64]
    columns: NDArray[np.float64]

    @property
    def size_sum(self) -> float:
        """The median sum of the rows that have counts: the sum of a row with size factor 1."""
        filled = self.rows[self.rows > 0]
        return float(np.median(filled)) if filled.size else 1.0

    @property
    def shares(self) -> NDArray[np.float64]:
        """Each column's share of all counts. Half a count is added to each, so that no share is zero."""
        columns = self.columns + 0.5
        shares: NDArray[np.float64] = columns / columns.sum()
        return shares


class Rows(NamedTuple):
    """Some rows of a `Table`, in memory, in the order of the arguments of `Program.bind`."""

    X: Any
    target: Any
    weight: NDArray[np.float64] | None
    condition: NDArray[np.float32] | None


@dataclass
class Table:
    """Rows to train on, to score or to apply a network to.

    `check` checks the values in memory. The values of a source are checked when they are read.

    Attributes
    ----------
    X : ndarray, CSR, Source or Shifted of shape (n_rows, n_features); if X is on a GPU, all parts are
    target : the same, of shape (n_rows, n_outputs), or None
        None if X is its own target.
    weight : ndarray of float64, shape (n_rows,), or None
    condition : ndarray of float32, shape (n_rows, 1), or None
        Number of each row's batch, if the decoder is conditioned on batches.
    domains : pair of Loss
        Losses whose domain X and the target are checked against.
    columns : pair of sequences of str, or None
        Names of the columns of X and of the target, if X and the target do not hold them.
    implicit : bool
        Whether rows of X from a source with a shift come as `Shifted`. Rows of the target and of counts never do.
    names : pair of str
        Names of X and of the target in messages.
    dtype : dtype
        The network's dtype, which must be able to hold the values. Rows of whole numbers and of text take it.
    warns : bool
        Whether to warn of values in the first block that become equal in float32.
    """

    X: Any
    target: Any = None
    weight: NDArray[np.float64] | None = None
    condition: NDArray[np.float32] | None = None
    domains: tuple[Loss, Loss] = (Loss.MSE, Loss.MSE)
    columns: tuple[Any, Any] = (None, None)
    implicit: bool = True
    names: tuple[str, str] = ("X", "y")
    dtype: Any = np.float64
    warns: bool = False
    _totals: Totals | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        self.implicit = self.implicit and not any(loss.info.of_counts for loss in self.domains)

    @property
    def n_rows(self) -> int:
        return int(self.X.shape[0])

    @property
    def in_memory(self) -> bool:
        return not isinstance(self.X, Source) and not isinstance(self.target, Source)

    @property
    def row_bytes(self) -> int:
        """Bytes of an average row in memory."""
        target = 0 if self.target is None else _row_bytes(self.target, False, self._dtype_of(self.target))
        return _row_bytes(self.X, self.implicit, self.result_dtype) + target

    @property
    def result_dtype(self) -> np.dtype[Any]:
        """The dtype of results: that of X, or the network's if X holds whole numbers or text."""
        return self._dtype_of(self.X)

    def _dtype_of(self, part: Any) -> np.dtype[Any]:
        dtype: np.dtype[Any] = np.dtype(
            self.dtype if isinstance(part, Source) and not part.holds_floats else part.dtype
        )
        return dtype

    @property
    def shifted(self) -> bool:
        """Whether rows of X come as `Shifted`."""
        return isinstance(self.X, Shifted) or (
            self.implicit and isinstance(self.X, Source) and self.X.shift is not None
        )

    def loaded(self, block_bytes: int) -> Table:
        """The table in memory if it fits into a block, else the table itself."""
        if self.in_memory or self.n_rows * self.row_bytes > block_bytes:
            return self
        return Table(*self.read(slice(None)))

    def read(self, rows: slice | NDArray[np.int64]) -> Rows:
        """Some rows of each part; the rows of a source are checked."""
        return Rows(
            self._read(self.X, 0, rows),
            None if self.target is None else self._read(self.target, 1, rows),
            None if self.weight is None else rows_of(self.weight, rows),
            None if self.condition is None else self.condition[rows],
        )

    def _read(self, part: Any, i: int, rows: slice | NDArray[np.int64]) -> Any:
        if not isinstance(part, Source):
            return rows_of(part, rows)
        block = part.read_stored(rows) if self.implicit and i == 0 else part.read_rows(rows)
        first = (rows.start or 0) if isinstance(rows, slice) else rows
        # Sources are named "X" by default.
        called = {"columns": self.columns[i], "name": self.names[i] if part.name == "X" else None}
        check_finite(stored_rows(block), first, part, **called)
        check_representable(stored_rows(block), self.dtype, first, part, **called)
        check_values(block, self.domains[i], first, part, **called)
        if self.warns and i == 0 and self.dtype == np.float32:
            self.warns = False
            warn_collapsed(stored_rows(block), self.columns[0] if part.var_names is None else part.var_names, part.name)
        dtype = self._dtype_of(part)
        if isinstance(block, Shifted) or block.dtype == dtype:
            return block
        return block.astype(dtype)

    def check(self) -> None:
        """Raise for the first value in memory outside its domain; finiteness was checked before."""
        for i, (name, part) in enumerate(zip(self.names, (self.X, self.target), strict=True)):
            if part is not None and not isinstance(part, Source):
                with copying():
                    check_representable(stored_rows(part), self.dtype, 0, name, columns=self.columns[i])
                    check_values(part, self.domains[i], 0, name, columns=self.columns[i])

    def blocks(self, block_rows: int, rows: NDArray[np.int64] | None = None) -> Iterator[Rows]:
        """All rows, or the sorted `rows`, in order and `block_rows` at a time; a source is read one block ahead."""
        starts = range(0, self.n_rows if rows is None else len(rows), block_rows)
        parts = (slice(at, at + block_rows) if rows is None else rows[at : at + block_rows] for at in starts)
        if self.in_memory or len(starts) == 1:
            yield from map(self.read, parts)
        else:
            yield from read_ahead(partial(self.read, part) for part in parts)

    def totals(self, rows: NDArray[np.int64], block_bytes: int) -> Totals:
        """Sums of the target in `rows`. The first call reads them; later calls return the same sums."""
        if self._totals is None:
            by_row: list[NDArray[np.float64]] = []
            by_column: Any = 0.0
            for part in self.blocks(max(1, block_bytes // max(1, self.row_bytes)), rows):
                block = part.X if part.target is None else part.target
                by_row.append(_sums(block, 1))
                by_column = by_column + _sums(block, 0)
            self._totals = Totals(np.concatenate(by_row), by_column)
        return self._totals


def _sums(X: Any, axis: int) -> NDArray[np.float64]:
    """Sums by row or column, on the host. float64 adds whole numbers without rounding, so the order does not matter."""
    if not (on_gpu(X) and is_sparse(X)):
        return np.asarray(to_host(X.sum(axis=axis, dtype=np.float64))).reshape(-1)
    indptr, values = to_host(X.indptr), X.data.astype(np.float64)
    if axis == 1:
        ends: NDArray[np.float64] = np.append(0.0, to_host(values.cumsum()))[indptr]
        return np.diff(ends)
    columns: NDArray[np.float64] = to_host(np.bincount(X.indices, weights=values, minlength=X.shape[1]))
    return columns


def _row_bytes(X: Any, implicit: bool, dtype: np.dtype[Any]) -> int:
    X = stored_rows(X)
    itemsize = dtype.itemsize
    if (stored := _stored(X, implicit)) is not None:
        return int(8 + stored * (itemsize + 4) // X.shape[0])
    if is_sparse(X):
        return int(8 + X.nnz * (itemsize + X.indices.dtype.itemsize) // X.shape[0])
    return int(X.shape[1] * itemsize)


def _stored(X: Any, implicit: bool) -> int | None:
    """Number of stored values of a sparse source; None for others."""
    if not isinstance(X, Source):
        return None
    return X.n_stored if implicit else X.nnz


def check_values(
    X: Any, loss: Loss, row_offset: int | NDArray[np.int64] = 0, source: Source | str = "X", **called: Any
) -> None:
    """Raise for the first value outside the domain of the loss; the values must be finite (see `check_finite`)."""
    info = loss.info
    if info.whole:
        check_counts(X.toarray() if isinstance(X, Shifted) else X, row_offset, source, **called)
        return
    if not info.needs:
        return
    if isinstance(X, Shifted):
        least, greatest = X.extremes()
        slack = 4 * float(np.finfo(X.dtype).eps) * (1 + float(np.abs(X.shift).max()))
        if least >= info.low - slack and greatest <= info.high + slack:
            return
        X = X.toarray()
    check_within(X, info.low, info.high, info.needs, row_offset, source, **called)


def value_range(table: Table, rows: NDArray[np.int64], block_bytes: int) -> tuple[float, float]:
    """Smallest and largest value of some rows of X; zeros that are not stored count."""
    low, high = np.inf, -np.inf
    step = max(1, block_bytes // max(1, table.row_bytes))
    for X, *_ in table.blocks(step, rows):
        if isinstance(X, Shifted):
            ends = X.extremes()
            low, high = min(low, ends[0]), max(high, ends[1])
            continue
        values = X.data if is_sparse(X) else X
        if values.size:
            low, high = min(low, float(values.min())), max(high, float(values.max()))
        if is_sparse(X) and X.nnz < X.shape[0] * X.shape[1]:
            low, high = min(low, 0.0), max(high, 0.0)
    return low, high


def fingerprint(table: Table) -> dict[str, Any]:
    """Shapes, dtypes and hashes by which a checkpoint recognises data."""
    found: dict[str, Any] = {}
    parts = ("X", table.X), ("y", table.target), ("sample_weight", table.weight), ("batch", table.condition)
    for name, part in parts:
        if part is None:
            continue
        found[name] = {"shape": tuple(int(n) for n in part.shape), "dtype": np.dtype(part.dtype).name}
        if not isinstance(part, Source):
            found[name]["sha256"] = ArraySource(to_host(part if part.ndim == 2 else part[:, None])).sha256()
    return found
