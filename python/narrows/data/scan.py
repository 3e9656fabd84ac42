"""One pass over the rows of a data set: how it is cut into blocks, and the statistics a `Normalizer` learns.

- The cuts depend on the shape alone and sums are float64, so no memory limit or thread count changes a result.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from ..rows.sparse import is_sparse

__all__ = ["Scan", "row_blocks", "row_totals"]

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
    """Statistics of one pass: totals of rows, moments and extremes of columns, whether all values are counts."""

    def __init__(self, n_rows: int, n_features: int, *, moments: bool, extremes: bool) -> None:
        self.n_rows = 0
        self.totals = np.zeros(n_rows)
        self.counts = True  # every value so far is a non-negative integer
        self.mean = np.zeros(n_features) if moments else None
        self.m2 = np.zeros(n_features)
        self.low = np.full(n_features, np.inf) if extremes else None
        self.high = np.full(n_features, -np.inf)

    def add(self, block: Any, start: int) -> None:
        """Include a canonical block whose first row is row `start` of the data."""
        n = block.shape[0]
        values = block.data if is_sparse(block) else block
        self.counts = self.counts and bool(values.size == 0 or (values.min() >= 0 and _integral(values)))
        self.totals[start : start + n] = row_totals(block)
        if self.mean is not None:
            mean, m2 = _moments(block)
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


def _moments(block: Any) -> tuple[np.ndarray, np.ndarray]:
    """Column means and centred sums of squares of one block, float64; implicit zeros count as values."""
    n, n_features = block.shape
    if not is_sparse(block):
        dense = block.astype(np.float64)
        mean = dense.mean(axis=0)
        dense -= mean
        return mean, np.einsum("ij,ij->j", dense, dense)
    values = block.data.astype(np.float64)
    mean = np.bincount(block.indices, weights=values, minlength=n_features) / n
    stored = np.bincount(block.indices, minlength=n_features)
    m2 = np.bincount(block.indices, weights=(values - mean[block.indices]) ** 2, minlength=n_features)
    return mean, m2 + (n - stored) * mean**2
