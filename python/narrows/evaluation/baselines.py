"""How good a latent space is: PCA baseline, nearest-neighbour accuracy, reconstruction error per feature.

- `pca` streams over row blocks and never centres or densifies more than one block, so CSR and data larger
  than memory are fine; it returns the scores and the error of reconstructing every row asked for.
- Sums are float64 and the block borders depend on the shape alone: the same numbers for any memory limit.
- Nothing here trains or changes an estimator.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse as sp

from ..data import Source
from ..data.normalize import row_blocks
from ..rows.shifted import dense, stored_rows

__all__ = ["PCABaseline", "elbow", "feature_errors", "knn_accuracy", "pca", "pca_errors", "sample_rows"]

#: Rows on which the baseline and the neighbours are computed; beyond it a sample stands for the data.
MAX_ROWS = 20_000
#: Bytes of dense float32 rows whose reconstruction is compared at once: several copies are made of them, in float64.
ERROR_BYTES = 1 << 22


@dataclass(frozen=True)
class PCABaseline:
    """A principal component analysis and how well it reconstructs.

    Attributes
    ----------
    mse_per_feature : float
        Mean over rows and features of the squared reconstruction error.
    scores : ndarray of shape (n_rows, n_components), float64
        Coordinates of the rows, largest variance first.
    mean : ndarray of shape (n_features,), float64
    axes : ndarray of shape (n_features, n_components), float64
        Orthonormal; ``scores`` are the centred rows times these.
    n_rows : int
        Rows used.
    n_passes : int
        Passes over the rows until the captured variance settled.
    """

    mse_per_feature: float
    scores: np.ndarray
    mean: np.ndarray
    axes: np.ndarray
    n_rows: int
    n_passes: int


def sample_rows(n_rows: int, seed: int, max_rows: int = MAX_ROWS) -> np.ndarray:
    """Sorted row numbers: all of them, or a random `max_rows` of them, the same for the same seed."""
    if n_rows <= max_rows:
        return np.arange(n_rows)
    return np.sort(np.random.default_rng(seed).choice(n_rows, size=max_rows, replace=False))


def _blocks_of(source: Source, rows: np.ndarray, room: int) -> Callable[[], Iterator[tuple[slice, Any]]]:
    """A function that walks the chosen rows in blocks; blocks are kept in memory while they are small."""
    cuts = list(row_blocks(len(rows), source.shape[1]))
    cache: dict[int, Any] = {}

    def walk() -> Iterator[tuple[slice, Any]]:
        nonlocal room
        for i, cut in enumerate(cuts):
            block = cache.get(i)
            if block is None:
                # Principal components are those of the centred rows, whatever their shift.
                block = stored_rows(source.read_stored(rows[cut]))
                size = block.data.nbytes + block.indices.nbytes if sp.issparse(block) else block.nbytes
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

    Each pass multiplies the centred rows with an orthonormal basis of about ``2 * n_components`` directions,
    block by block, and back; centring is applied to the small products, never to the rows.

    Parameters
    ----------
    source : Source
        Rows to analyse, normalised already if they are to be.
    n_components : int
    rows : ndarray of int, optional
        Row numbers to use; default all.
    seed : int
        Of the random start.
    tol : float
        Stop when a pass lowers the error that remains by less than this fraction of it.
    max_passes : int
    cache_bytes : int
        Blocks up to this size in all are kept in memory between passes.
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
        # The captured energy is a Ritz value: it only grows, and its error is the square of the basis' error.
        previous, residual = residual, max(0.0, total - float(variance[::-1][:rank].sum()))
        if width == n_features or previous - residual <= tol * residual or passes == max_passes:
            break
        basis = np.linalg.qr(back)[0]
    leading = rotation[:, ::-1][:, :rank]
    return PCABaseline(residual / (n * n_features), products @ leading, mean, basis @ leading, n, passes)


def pca_errors(baseline: PCABaseline, source: Source, rows: np.ndarray) -> np.ndarray:
    """Mean squared reconstruction error per feature of some rows by the first 1, 2, ... components.

    Rows apart from those of the analysis are what it is to be compared on. Like `pca`, it centres and densifies
    nothing.

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


def elbow(sizes: Sequence[int], losses: Sequence[float]) -> int | None:
    """The size after which more components bring little: the loss farthest below the line from the first to the last.

    On a logarithmic axis of sizes (Satopaa, Albrecht, Irwin and Raghavan, "Finding a kneedle in a haystack", ICDCS
    workshops 2011). None for fewer than three sizes, or where no loss lies below that line.
    """
    x, y = np.log(np.asarray(sizes, np.float64)), np.asarray(losses, np.float64)
    if len(x) < 3 or not np.isfinite(y).all() or y[0] <= y[-1]:
        return None
    below = y[0] + (y[-1] - y[0]) * (x - x[0]) / (x[-1] - x[0]) - y
    at = int(np.argmax(below))
    return int(sizes[at]) if below[at] > 1e-9 * (y[0] - y[-1]) else None


def _centred_energy(walk: Callable[[], Iterator[tuple[slice, Any]]], mean: np.ndarray) -> float:
    """Sum of squares of the centred rows, without cancellation on dense blocks and exact zeros on CSR."""
    total = 0.0
    at_zero = mean**2
    for _, block in walk():
        if sp.issparse(block):
            values = block.data.astype(np.float64)
            means = mean[block.indices]
            total += float(np.sum((values - means) ** 2 - means**2)) + block.shape[0] * float(at_zero.sum())
        else:
            centred = block - mean
            total += float(np.einsum("ij,ij->", centred, centred))
    return total


def feature_errors(
    source: Source, reconstruct: Callable[[Any, Any], np.ndarray], rows: np.ndarray | None = None
) -> np.ndarray:
    """Mean over rows, by default all, of the squared reconstruction error of each feature, float64 (n_features,).

    `reconstruct` is given a block and which rows it holds, a slice or their numbers.
    """
    n_features = source.shape[1]
    n_rows = source.shape[0] if rows is None else len(rows)
    total = np.zeros(n_features)
    for cut in row_blocks(n_rows, n_features, ERROR_BYTES):
        chosen = cut if rows is None else rows[cut]
        block = source.read_stored(chosen)
        difference = reconstruct(block, chosen).astype(np.float64)
        difference -= dense(block)
        total += np.einsum("ij,ij->j", difference, difference)
    return total / n_rows


def knn_accuracy(codes: np.ndarray, labels: np.ndarray, *, seed: int = 0, k: int = 15, folds: int = 5) -> float | None:
    """Share of rows whose label their `k` nearest neighbours tell, by stratified cross-validation.

    Classes with fewer than `folds` rows are left out. None where too few classes or rows remain.
    """
    from sklearn.model_selection import StratifiedKFold
    from sklearn.neighbors import KNeighborsClassifier

    _, classes, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    kept = sizes[classes] >= folds
    if np.count_nonzero(sizes >= folds) < 2 or np.count_nonzero(kept) * (folds - 1) // folds < k + 1:
        return None
    points, classes = np.asarray(codes, dtype=np.float64)[kept], classes[kept]
    right = 0
    for train, test in StratifiedKFold(folds, shuffle=True, random_state=seed).split(points, classes):
        model = KNeighborsClassifier(k).fit(points[train], classes[train])
        right += int(np.count_nonzero(model.predict(points[test]) == classes[test]))
    return right / len(classes)
