"""Labels of batches, and the numbers by which a network knows them.

Promises: a label has the same number whatever holds it, list, array, frame or categorical; one that is missing, of
another kind or unknown is an error that names it and its row. Never: takes a number for a string, or a string for a
number.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError
from ..rows.devices import to_host

__all__ = ["declared_batches", "numbers", "read_labels"]

_LARGEST = 2**63 - 1
_SHOWN = 10
"""Batches that a message names."""


def read_labels(batch: Any, n_rows: int, name: str = "batch") -> NDArray[Any]:
    """Labels as an array of str or int64.

    Parameters
    ----------
    batch : array-like of str or int, shape (n_rows,), or one of them for all rows
        Booleans are taken for the strings ``"False"`` and ``"True"``.
    n_rows : int
    name : str
        What messages call them.

    Returns
    -------
    ndarray of str or int64, shape (n_rows,) or ()
        Without dimensions if it is one for all.

    Raises
    ------
    ValueError
        There are more or fewer labels than rows.
    DataError
        A label is missing, or is neither a string nor a whole number (of 64 bits) as the first one is.
    """
    values = np.asarray(to_host(batch))
    if values.shape not in ((), (n_rows,)):
        raise ValueError(f"{name} has shape {values.shape}, X has {n_rows} rows: ({n_rows},) is needed, or one label")
    if values.dtype.kind in "iu" and (values.dtype != np.uint64 or values.max(initial=0) <= _LARGEST):
        return values.astype(np.int64)
    if values.dtype.kind in "bU":
        return values.astype(str)
    items = values.reshape(-1).tolist()
    kind = next((k for k in (bool, str, int) if items and isinstance(items[0], k)), str)
    for row, item in enumerate(items):
        fits = isinstance(item, kind) and isinstance(item, bool) == (kind is bool)
        if not fits or (kind is int and not -_LARGEST <= item <= _LARGEST):
            raise DataError(f"{name}: {item!r} in row {row}: labels must all be strings, or all whole numbers")
    labels: NDArray[Any] = np.array(items, np.int64 if kind is int else str).reshape(values.shape)
    return labels


def declared_batches(batch: Any) -> NDArray[Any] | None:
    """The categories that a pandas categorical knows, with or without rows; None of other labels."""
    known = getattr(getattr(batch, "cat", batch), "categories", None)
    return None if known is None else read_labels(known, len(known))


def numbers(labels: NDArray[Any], batches: NDArray[Any], n_rows: int, name: str = "batch") -> NDArray[np.float32]:
    """The numbers of labels among the sorted `batches`.

    Returns
    -------
    ndarray of float32, shape (n_rows, 1)
        Read-only and without memory of its own if there is one label for all rows.

    Raises
    ------
    DataError
        A label is none of them.
    """
    flat = labels.reshape(-1)
    if flat.dtype.kind == batches.dtype.kind:
        at = np.minimum(np.searchsorted(batches, flat), len(batches) - 1)
        known = batches[at] == flat
    else:
        at, known = np.zeros(len(flat), np.int64), np.zeros(len(flat), bool)
    if not known.all():
        row = int(np.argmin(known))
        where = f" in row {row}" if labels.ndim else ""
        shown = ", ".join(repr(b) for b in batches[:_SHOWN].tolist()) + (", ..." if len(batches) > _SHOWN else "")
        raise DataError(f"{name}: {flat[row].item()!r}{where} is none of the batches of the fit: {shown}")
    column = at.astype(np.float32)[:, None]
    return column if labels.ndim else np.broadcast_to(column, (n_rows, 1))
