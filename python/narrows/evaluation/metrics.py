"""Measures of a latent space and of a reconstruction: neighbour accuracy, error per feature, the elbow of a loss curve.

- Sums are float64 and are cut at rows that depend on the shape alone: a memory limit changes no result.
- Nothing here trains or changes an estimator.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..data import Source
from ..data.columns import NO_VALUE
from ..data.scan import row_blocks
from ..rows.shifted import dense

__all__ = ["MAX_ROWS", "elbow", "feature_errors", "knn_accuracy", "missing_labels", "sample_rows"]

#: Larger data are measured on a random sample of this many rows.
MAX_ROWS = 20_000
#: Bytes of one float32 block of reconstructed rows. Several float64 copies of it exist at once.
ERROR_BYTES = 1 << 22


def sample_rows(n_rows: int, seed: int, max_rows: int = MAX_ROWS) -> np.ndarray:
    """Sorted row numbers: all of them, or a random `max_rows` of them, the same for the same seed."""
    if n_rows <= max_rows:
        return np.arange(n_rows)
    return np.sort(np.random.default_rng(seed).choice(n_rows, size=max_rows, replace=False))


def elbow(sizes: Sequence[int], losses: Sequence[float]) -> int | None:
    """The size after which more components bring little: the loss farthest below the line from the first to the last.

    The axis of sizes is logarithmic (Satopaa, Albrecht, Irwin and Raghavan, "Finding a kneedle in a haystack", ICDCS
    workshops 2011). None for fewer than three sizes, or if no loss lies below that line.
    """
    x, y = np.log(np.asarray(sizes, np.float64)), np.asarray(losses, np.float64)
    if len(x) < 3 or not np.isfinite(y).all() or y[0] <= y[-1]:
        return None
    below = y[0] + (y[-1] - y[0]) * (x - x[0]) / (x[-1] - x[0]) - y
    at = int(np.argmax(below))
    return int(sizes[at]) if below[at] > 1e-9 * (y[0] - y[-1]) else None


def feature_errors(
    source: Source, reconstruct: Callable[[Any, Any], np.ndarray], rows: np.ndarray | None = None
) -> np.ndarray:
    """Mean squared reconstruction error of each feature over some rows, by default all: float64 (n_features,).

    `reconstruct` gets a block of rows and a slice or an array of their row numbers.
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


def missing_labels(labels: Any) -> np.ndarray:
    """Which labels are missing: bool (n_rows,).

    Missing are NaN, None, pandas' NA and NaT, these words and blanks as text, and the code -1 of whole numbers. If all
    other labels are 1, -1 is a class: outliers have it.
    """
    array = np.asarray(labels)
    if array.dtype.kind in "mM":
        return np.asarray(np.isnat(array))
    if array.dtype.kind == "f":
        absent = np.asarray(np.isnan(array))
        whole = bool((array[~absent] == np.round(array[~absent])).all())
        return np.asarray(absent | _codes(array, absent)) if whole else absent
    if array.dtype.kind == "i":
        return _codes(array, np.zeros(len(array), bool))
    if array.dtype.kind in "OUTS":
        # str of an object tells NaN, None, NA and NaT apart from everything else.
        texts = [item.decode("latin-1") if isinstance(item, bytes) else str(item) for item in array.tolist()]
        return np.asarray([text.strip() in NO_VALUE for text in texts], bool)
    return np.zeros(len(array), bool)


def _codes(values: np.ndarray, absent: np.ndarray) -> np.ndarray:
    """The rows with the code -1, unless the others are all 1."""
    code: np.ndarray = values == -1
    return code & bool((values[~code & ~absent] != 1).any())


def knn_accuracy(codes: np.ndarray, labels: np.ndarray, *, seed: int = 0, k: int = 15, folds: int = 5) -> float | None:
    """Accuracy of a `k` nearest neighbour classifier on the codes, by stratified cross-validation.

    Rows without a label (`missing_labels`) and classes with fewer than `folds` rows are left out. None if too few
    classes or rows remain.
    """
    from sklearn.model_selection import StratifiedKFold
    from sklearn.neighbors import KNeighborsClassifier

    known = ~missing_labels(labels)
    if not known.all():
        codes, labels = np.asarray(codes)[known], np.asarray(labels)[known]
    if np.asarray(labels).dtype.kind == "O":
        labels = np.asarray([str(label) for label in labels])
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
