"""One pass over the rows of a data set: how it is cut into blocks, and the statistics a `Normalizer` learns from.

- The cuts depend on the shape alone and sums are float64, so no memory limit or thread count changes a result.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from ..rows.sparse import is_sparse

__all__ = ["LEVELS", "Scan", "row_blocks", "row_totals"]

LEVELS = 128
"""Whole numbers below this one are counted one by one, in a sample, while all values are below it."""
SAMPLE = 1 << 16
"""Most values of a block in this sample."""

#: Bytes of one block of the pass as dense float32. A fixed size keeps the cuts, and so the sums, the same.
SCAN_BYTES = 1 << 24


def row_blocks(n_rows: int, n_features: int, block_bytes: int = SCAN_BYTES) -> Iterator[slice]:
    """Cut `n_rows` into slices of at most `block_bytes` as dense float32 (one row at least)."""
    step = max(1, block_bytes // (4 * max(1, n_features)))
    for start in range(0, n_rows, step):
        yield slice(start, min(start + step, n_rows))


def row_totals(block: Any) -> np.ndarray:
    """The float64 sum of each row."""
    if is_sparse(block):
        return np.asarray(block @ np.ones(block.shape[1]))
    return np.asarray(np.ascontiguousarray(block).sum(axis=1, dtype=np.float64))


class Scan:
    """Statistics of one pass: totals of rows, moments and extremes of columns, and what kind of numbers they are.

    Attributes
    ----------
    totals : ndarray of shape (n_rows,)
        Sums of the rows.
    least, greatest : float
        Smallest and largest value, zeros of sparse rows among them.
    whole : bool
        Whether every value is a whole number, and none is negative.
    filled : ndarray of shape (n_features,)
        Numbers of nonzeros of the columns; up to date only if `whole`.
    levels : ndarray of shape (LEVELS,)
        How often each whole number occurs in a sample; up to date only if `whole` and `greatest` is below `LEVELS`.
    mean, m2, low, high : ndarray of shape (n_features,)
        Means, centred sums of squares, and extremes of the columns, if asked for.
    """

    def __init__(self, n_rows: int, n_features: int, *, moments: bool, extremes: bool) -> None:
        self.n_rows = 0
        self.totals = np.zeros(n_rows)
        self.least, self.greatest = np.inf, -np.inf
        self.whole = True
        self.filled = np.zeros(n_features, np.int64)
        self.levels = np.zeros(LEVELS, np.int64)
        self.mean = np.zeros(n_features) if moments else None
        self.m2 = np.zeros(n_features)
        self.low = np.full(n_features, np.inf) if extremes else None
        self.high = np.full(n_features, -np.inf)

    def add(self, block: Any, start: int) -> None:
        """Include a canonical block whose first row is row `start` of the data."""
        n = block.shape[0]
        values = block.data if is_sparse(block) else block
        low, high = (values.min(), values.max()) if values.size else (0.0, 0.0)
        zeros_stored = low <= 0
        if is_sparse(block) and block.nnz < n * block.shape[1]:
            low, high = min(low, 0.0), max(high, 0.0)
        self.least, self.greatest = min(self.least, low), max(self.greatest, high)
        self.whole = self.whole and self.least >= 0 and _integral(values)
        stored = np.bincount(block.indices, minlength=block.shape[1]) if is_sparse(block) else None
        if self.whole:
            self.filled += np.count_nonzero(block, axis=0) if stored is None else stored
            if stored is not None and zeros_stored:
                self.filled -= np.bincount(block.indices[values == 0], minlength=block.shape[1])
            if self.greatest < LEVELS:
                self.levels += np.bincount(
                    values.ravel()[:: 1 + values.size // SAMPLE].astype(np.intp), minlength=LEVELS
                )
        self.totals[start : start + n] = row_totals(block)
        if self.mean is not None:
            mean, m2 = _moments(block, stored)
            # Chan, Golub and LeVeque (1979): merge two sets of centred sums without cancellation.
            delta = mean - self.mean
            total = self.n_rows + n
            self.m2 += m2 + delta**2 * (self.n_rows * n / total)
            self.mean += delta * (n / total)
        if self.low is not None:
            low, high = block.min(axis=0), block.max(axis=0)
            if is_sparse(block):
                low, high = low.toarray().ravel(), high.toarray().ravel()
            np.minimum(self.low, low, out=self.low)
            np.maximum(self.high, high, out=self.high)
        self.n_rows += n


def _integral(values: np.ndarray) -> bool:
    return values.dtype.kind in "iub" or bool(np.array_equal(values, np.floor(values)))


def _moments(block: Any, stored: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Column means and centred sums of squares of one block, float64; implicit zeros count as values.

    `stored` holds the numbers of stored values of the columns of a sparse block.
    """
    n, n_features = block.shape
    if stored is None:
        dense = block.astype(np.float64)
        mean = dense.mean(axis=0)
        dense -= mean
        return mean, np.einsum("ij,ij->j", dense, dense)
    values = block.data.astype(np.float64)
    mean = np.bincount(block.indices, weights=values, minlength=n_features) / n
    m2 = np.bincount(block.indices, weights=(values - mean[block.indices]) ** 2, minlength=n_features)
    return mean, m2 + (n - stored) * mean**2
