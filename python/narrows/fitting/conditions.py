"""Conditions: the labels of batches, and the numbers that stand for them in a network.

- Lists, arrays, frames and categoricals of the same labels give the same numbers.
- A label that is missing, unknown or of another type is an error with the label and its row.
- A number never matches a string.

The public name of a condition is `batch`: ``fit(X, batch=labels)``.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError
from ..rows.devices import to_host

__all__ = ["condition_numbers", "declared_labels", "read_labels"]

_LARGEST = 2**63 - 1
_SHOWN = 10
"""Labels that a message lists."""


def read_labels(batch: Any, n_rows: int, name: str = "batch") -> NDArray[Any]:
    """Labels as an array of str or int64.

    Parameters
    ----------
    batch : array-like of str or int, shape (n_rows,), or one label for all rows
        Booleans become the strings ``"False"`` and ``"True"``.
    n_rows : int
    name : str
        The name of the argument in messages.

    Returns
    -------
    ndarray of str or int64, shape (n_rows,) or ()
        Shape () if there is one label for all rows.

    Raises
    ------
    ValueError
        The number of labels is not the number of rows.
    DataError
        A label is missing, or is not of the first label's type: string, or integer of 64 bits.
    """
    values = np.asarray(to_host(batch))
    if values.shape not in ((), (n_rows,)):
        raise ValueError(
            f"{name} has shape {values.shape}, but X has {n_rows} rows: pass shape ({n_rows},) or one label"
        )
    if values.dtype.kind in "iu" and (values.dtype != np.uint64 or values.max(initial=0) <= _LARGEST):
        return values.astype(np.int64)
    if values.dtype.kind in "bU":
        return values.astype(str)
    items = values.reshape(-1).tolist()
    kind = next((k for k in (bool, str, int) if items and isinstance(items[0], k)), str)
    for row, item in enumerate(items):
        fits = isinstance(item, kind) and isinstance(item, bool) == (kind is bool)
        if not fits or (kind is int and not -_LARGEST <= item <= _LARGEST):
            raise DataError(f"{name}: {item!r} in row {row}: labels must be all strings or all integers")
    labels: NDArray[Any] = np.array(items, np.int64 if kind is int else str).reshape(values.shape)
    return labels


def declared_labels(batch: Any) -> NDArray[Any] | None:
    """All categories of a pandas categorical, with or without rows; None for other labels."""
    known = getattr(getattr(batch, "cat", batch), "categories", None)
    return None if known is None else read_labels(known, len(known))


def condition_numbers(
    labels: NDArray[Any], known: NDArray[Any], n_rows: int, name: str = "batch"
) -> NDArray[np.float32]:
    """The index of each label among the sorted labels `known`.

    Returns
    -------
    ndarray of float32, shape (n_rows, 1)
        A read-only view of one number if there is one label for all rows.

    Raises
    ------
    DataError
        A label is not known.
    """
    flat = labels.reshape(-1)
    if flat.dtype.kind == known.dtype.kind:
        at = np.minimum(np.searchsorted(known, flat), len(known) - 1)
        found = known[at] == flat
    else:
        at, found = np.zeros(len(flat), np.int64), np.zeros(len(flat), bool)
    if not found.all():
        row = int(np.argmin(found))
        where = f" in row {row}" if labels.ndim else ""
        shown = ", ".join(repr(b) for b in known[:_SHOWN].tolist()) + (", ..." if len(known) > _SHOWN else "")
        raise DataError(f"{name}: {flat[row].item()!r}{where} is none of the batches of the fit: {shown}")
    column = at.astype(np.float32)[:, None]
    return column if labels.ndim else np.broadcast_to(column, (n_rows, 1))
