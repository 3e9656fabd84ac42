"""A column of `obs`: numbers, text or categories, and which of its values are missing."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import DataError

__all__ = ["NO_VALUE", "Column", "cells_of", "column_of", "complete", "listed"]

NO_VALUE = frozenset(["", "nan", "NaN", "None", "NA", "#N/A", "N/A", "n/a", "<NA>", "NaT", "null", "NULL"])
"""Texts that stand for a missing value: what Python writes for one, and what pandas reads as one."""

_SHOWN = 20  # names that a message lists


@dataclass(frozen=True)
class Column:
    """Values of all rows.

    Attributes
    ----------
    values : ndarray of shape (n_rows,)
        Numbers, booleans or strings; for categories their numbers, -1 if missing.
    mask : ndarray of bool, shape (n_rows,), or None
        The missing values of a column that marks them apart. Such a column is nullable even if it lacks none.
    categories : ndarray, or None
    ordered : bool
        Whether the categories have an order.

    Examples
    --------
    >>> import numpy as np
    >>> from narrows.data import Column
    >>> kinds = Column(np.array([1, 0, -1]), categories=np.array(["B", "T"]))
    >>> kinds.missing.tolist()
    [False, False, True]
    >>> kinds.decoded()[~kinds.missing].tolist()
    ['T', 'B']
    """

    values: npt.NDArray[Any]
    mask: npt.NDArray[np.bool_] | None = None
    categories: npt.NDArray[Any] | None = None
    ordered: bool = False

    @property
    def missing(self) -> npt.NDArray[np.bool_]:
        """Whether the value of each row is missing: marked so, without category, or NaN."""
        missing: npt.NDArray[np.bool_] = np.zeros(len(self.values), bool)
        if self.mask is not None:
            missing = self.mask
        elif self.categories is not None:
            missing = self.values < 0
        elif self.values.dtype.kind == "f":
            missing = np.isnan(self.values)
        return missing

    def decoded(self) -> npt.NDArray[Any]:
        """Numbers, booleans or strings of all rows; any value where it is missing."""
        if self.categories is None:
            return self.values
        if len(self.categories) == 0:
            return np.zeros(len(self.values), self.categories.dtype)
        decoded: npt.NDArray[Any] = self.categories[np.maximum(self.values, 0)]
        return decoded

    def __len__(self) -> int:
        return len(self.values)


def cells_of(texts: npt.ArrayLike) -> Column:
    """A column of the cells of a text file, where these words stand for a missing value: `NO_VALUE`."""
    values = np.asarray(texts, str)
    missing = np.asarray([text.strip() in NO_VALUE for text in values.tolist()], bool)
    return Column(values, missing if missing.any() else None)


def column_of(obs: Mapping[str, Any], name: str, where: str) -> Column:
    """A column of `obs` by its name.

    Raises
    ------
    DataError
        There is no such column; the message suggests near names.
    """
    if not obs:
        raise DataError(f"{where}: this file has no column {name!r} of obs; it has no obs")
    if name not in obs:
        raise DataError(f"{where}: obs has no column {name!r}; it has {listed(name, obs)}")
    column = obs[name]
    return column if isinstance(column, Column) else Column(np.asarray(column))


def complete(column: Column, where: str) -> npt.NDArray[Any]:
    """The values of a column that must have one in each row.

    Raises
    ------
    DataError
        A value is missing; the message names its row.
    """
    missing = column.missing
    if missing.any():
        raise DataError(f"{where} has a missing value in row {int(np.argmax(missing))}")
    return column.decoded()


def listed(name: str | None, existing: Iterable[str]) -> str:
    """Existing names for a message about one that does not exist: the near ones, and the list."""
    names = [str(each) for each in existing]
    text = ", ".join(map(repr, names[:_SHOWN])) or "none"
    if len(names) > _SHOWN:
        text += f" and {len(names) - _SHOWN} more"
    lower = {each.lower(): each for each in reversed(names)}
    near = [] if name is None else [lower[each] for each in difflib.get_close_matches(name.lower(), lower, 3)]
    return text + (f"; did you mean {' or '.join(map(repr, near))}?" if near else "")
