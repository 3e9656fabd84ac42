"""Rows less a shift: what moves every zero of sparse rows, and is told once in place of being done to each.

Promises: nothing is subtracted before it is asked for, a few rows at a time. Never: reads files or knows a network.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..plan.spec import NetworkSpec

__all__ = ["Shifted", "dense", "split_shift", "stored_rows"]


@dataclass(frozen=True)
class Shifted:
    """The rows of a table less a shift.

    Attributes
    ----------
    rows : CSR or ndarray of shape (n_rows, n_columns)
        As stored.
    shift : ndarray of shape (n_columns,)
        What each row is less than it.
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
        """The rows themselves, in the type of those stored."""
        rows: NDArray[Any] = np.array(dense(self.rows), self.dtype)
        rows -= self.shift.astype(self.dtype)
        return rows

    def extremes(self) -> tuple[float, float]:
        """Least and greatest value of the rows, which must be CSR and not empty."""
        X = self.rows
        absent = np.bincount(X.indices, minlength=X.shape[1]) < X.shape[0]
        values = np.concatenate([X.data - self.shift[X.indices], -self.shift[absent]])
        return float(values.min()), float(values.max())


def stored_rows(X: Any) -> Any:
    """X without its shift, if it has one."""
    return X.rows if isinstance(X, Shifted) else X


def dense(X: Any) -> Any:
    """An array as it is, or that of rows which are not one."""
    return X.toarray() if hasattr(X, "toarray") else X


def split_shift(spec: NetworkSpec, X: Any) -> tuple[Any, NDArray[Any] | None]:
    """The rows of X as stored, and their shift as one row if the network takes shifted rows: zeros if X has none.

    Raises
    ------
    ValueError
        X has a shift and the network takes none.
    """
    if not spec.data.shifted:
        if isinstance(X, Shifted):
            raise ValueError("these rows have a shift, and the network takes none")
        return X, None
    if isinstance(X, Shifted):
        return X.rows, X.shift.reshape(1, -1)
    return X, np.zeros((1, spec.n_features))
