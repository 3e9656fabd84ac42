"""Shifted rows: sparse rows minus one vector, such as standardised sparse data.

The vector is kept apart, because subtracting it would turn zeros into values. It is subtracted when rows are made
dense.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..plan.spec import NetworkSpec
from .arrays import any_sparse

__all__ = ["Shifted", "dense", "split_shift", "stored_rows"]


@dataclass(frozen=True)
class Shifted:
    """Rows of a table minus a shift.

    Attributes
    ----------
    rows : CSR or ndarray of shape (n_rows, n_columns)
        The stored rows.
    shift : ndarray of shape (n_columns,)
        Vector subtracted from every row.
    """

    rows: Any
    shift: NDArray[Any]
    ndim = 2

    @property
    def shape(self) -> tuple[int, int]:
        n_rows, n_columns = self.rows.shape
        return int(n_rows), int(n_columns)

    @property
    def dtype(self) -> np.dtype[Any]:
        dtype: np.dtype[Any] = self.rows.dtype
        return dtype

    def __getitem__(self, rows: slice | NDArray[Any]) -> Shifted:
        return Shifted(self.rows[rows], self.shift)

    def toarray(self) -> NDArray[Any]:
        """The rows minus the shift, dense, in the dtype of the stored rows."""
        rows: NDArray[Any] = np.array(dense(self.rows), self.dtype)
        rows -= self.shift.astype(self.dtype)
        return rows

    def extremes(self) -> tuple[float, float]:
        """Smallest and largest value of the rows, which must be CSR and not empty."""
        X = self.rows
        absent = np.bincount(X.indices, minlength=X.shape[1]) < X.shape[0]
        values = np.concatenate([X.data - self.shift[X.indices], -self.shift[absent]])
        return float(values.min()), float(values.max())


def stored_rows(X: Any) -> Any:
    """The stored rows of X, without a shift."""
    return X.rows if isinstance(X, Shifted) else X


def dense(X: Any) -> Any:
    """X as a dense array; a dense array is returned as it is."""
    return X.toarray() if isinstance(X, Shifted) or any_sparse(X) else X


def split_shift(spec: NetworkSpec, X: Any) -> tuple[Any, NDArray[Any] | None]:
    """The stored rows of X, and their shift as one row if the network takes shifted rows (zeros if X has no shift).

    Raises
    ------
    ValueError
        X has a shift and the network does not take shifted rows.
    """
    if not spec.data.shifted:
        if isinstance(X, Shifted):
            raise ValueError("these rows have a shift, but the network does not take shifted rows")
        return X, None
    if isinstance(X, Shifted):
        return X.rows, X.shift.reshape(1, -1)
    return X, np.zeros((1, spec.n_features))
