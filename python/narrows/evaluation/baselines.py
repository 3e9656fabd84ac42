"""PCA, the baseline of every model that is not fitted to counts.

- `pca` reads block by block, and never centres or densifies more than one block. CSR may be larger than memory.
- Sums are float64 and are cut at rows that depend on the shape alone: a memory limit changes no result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..data import Source
from ..data.scan import row_blocks
from ..rows.shifted import stored_rows
from ..rows.sparse import is_sparse

__all__ = ["PCABaseline", "pca", "pca_errors"]


@dataclass(frozen=True)
class PCABaseline:
    """A principal component analysis and its reconstruction error.

    Attributes
    ----------
    mse_per_feature : float
        Mean over rows and features of the squared reconstruction error.
    scores : ndarray of shape (n_rows, n_components), float64
        Coordinates of the rows, largest variance first.
    mean : ndarray of shape (n_features,), float64
    axes : ndarray of shape (n_features, n_components), float64
        Orthonormal; ``scores`` are the centred rows times ``axes``.
    n_rows : int
        Number of rows used.
    n_passes : int
        Number of passes over the rows until the captured variance settled.
    """

    mse_per_feature: float
    scores: np.ndarray
    mean: np.ndarray
    axes: np.ndarray
    n_rows: int
    n_passes: int


def _blocks_of(source: Source, rows: np.ndarray, room: int) -> Callable[[], Iterator[tuple[slice, Any]]]:
    """A function that yields the chosen rows block by block. Blocks stay in memory up to `room` bytes in all."""
    cuts = list(row_blocks(len(rows), source.shape[1]))
    cache: dict[int, Any] = {}

    def walk() -> Iterator[tuple[slice, Any]]:
        nonlocal room
        for i, cut in enumerate(cuts):
            block = cache.get(i)
            if block is None:
                # A shift changes neither the centred rows nor their principal components.
                block = stored_rows(source.read_stored(rows[cut]))
                size = block.data.nbytes + block.indices.nbytes if is_sparse(block) else block.nbytes
                if size <= room:
                    cache[i], room = block, room - size
            yield cut, block

    return walk


def pca(
    source: Source,
    n_components: int,
    *,
    rows: np.ndarray | None = None,
    seed: int = 0,
    tol: float = 1e-4,
    max_passes: int = 30,
    cache_bytes: int = 1 << 28,
) -> PCABaseline:
    """Principal components by block subspace iteration with Rayleigh-Ritz (Halko et al., SIAM Review 2011).

    Each pass multiplies the centred rows by an orthonormal basis of about ``2 * n_components`` directions, and the
    products by the transposed rows. The mean is subtracted from the small products, never from the rows.

    Parameters
    ----------
    source : Source
        Rows to analyse, already normalised.
    n_components : int
    rows : ndarray of int, optional
        Row numbers to use; all by default.
    seed : int
        Seed of the random start.
    tol : float
        Stop when a pass lowers the remaining error by less than this fraction.
    max_passes : int
    cache_bytes : int
        Bytes of blocks that may stay in memory between passes.
    """
    n_features = source.shape[1]
    rows = np.arange(source.shape[0]) if rows is None else rows
    walk = _blocks_of(source, rows, cache_bytes)
    n = len(rows)
    mean = np.zeros(n_features)
    for _, block in walk():
        mean += np.asarray(block.sum(axis=0, dtype=np.float64)).ravel()
    mean /= n
    total = _centred_energy(walk, mean)
    rank = min(n_components, n_features, n)
    width = min(2 * rank + 10, n_features, n)
    basis = np.linalg.qr(np.random.default_rng(seed).standard_normal((n_features, width)))[0]
    products = np.empty((n, width))
    residual = np.inf
    passes = 0
    while True:
        passes += 1
        back = np.zeros((n_features, width))
        offset = mean @ basis
        for cut, block in walk():
            products[cut] = block @ basis - offset
            back += block.T @ products[cut]
        back -= np.outer(mean, products.sum(axis=0))
        variance, rotation = np.linalg.eigh(products.T @ products)  # ascending
        # The captured energy is a sum of Ritz values: it only grows, and its error is the square of the basis error.
        previous, residual = residual, max(0.0, total - float(variance[::-1][:rank].sum()))
        if width == n_features or previous - residual <= tol * residual or passes == max_passes:
            break
        basis = np.linalg.qr(back)[0]
    leading = rotation[:, ::-1][:, :rank]
    return PCABaseline(residual / (n * n_features), products @ leading, mean, basis @ leading, n, passes)


def pca_errors(baseline: PCABaseline, source: Source, rows: np.ndarray) -> np.ndarray:
    """Mean squared reconstruction error per feature of some rows with the first 1, 2, ... components.

    For a fair comparison, give rows that `pca` did not use. Like `pca`, it centres and densifies nothing.

    Returns
    -------
    ndarray of float64, shape (n_components,)
    """
    walk = _blocks_of(source, rows, 0)
    captured = np.zeros(baseline.axes.shape[1])
    offset = baseline.mean @ baseline.axes
    for _, block in walk():
        captured += ((block @ baseline.axes - offset) ** 2).sum(axis=0)
    left = _centred_energy(walk, baseline.mean) - np.cumsum(captured)
    return np.maximum(left, 0.0) / (len(rows) * source.shape[1])


def _centred_energy(walk: Callable[[], Iterator[tuple[slice, Any]]], mean: np.ndarray) -> float:
    """Sum of squares of the centred rows. Dense blocks are centred first; CSR uses one formula for all zeros."""
    total = 0.0
    at_zero = mean**2
    for _, block in walk():
        if is_sparse(block):
            values = block.data.astype(np.float64)
            means = mean[block.indices]
            total += float(np.sum((values - means) ** 2 - means**2)) + block.shape[0] * float(at_zero.sum())
        else:
            centred = block - mean
            total += float(np.einsum("ij,ij->", centred, centred))
    return total
