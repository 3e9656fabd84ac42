"""The roles of the columns of a table: row names, left out, numbers, text. The rules hold for every format of tables.

- A column is given by its name, or by its number from 0 if no column has that name.
- Text columns beside numbers become columns of `obs`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DataError
from .columns import listed
from .layout import ROW_LABEL, rises

__all__ = ["TAKES", "Wish", "describe_roles", "split_columns", "warn_of_row_numbers"]

log = logging.getLogger("narrows")

TAKES = ("index_column", "drop_columns", "roles")
"""What every format of tables takes, as fields of `Wish`. Text takes ``header`` too."""


@dataclass(frozen=True)
class Wish:
    """What the caller says about the columns of a table.

    Attributes
    ----------
    header : bool, optional
        Whether the first line is a header; None: find out.
    index_column : str or int, optional
        The column with the row names; False for none; None: find out.
    drop_columns : sequence of str or int, optional
    roles : mapping
        Roles of an earlier table (`Source.roles`), used where the others are None and this table has the columns.
    """

    header: bool | None = None
    index_column: str | int | None = None
    drop_columns: Sequence[str | int] | None = None
    roles: Mapping[str, Any] | None = None


def find_columns(path: Path, names: Sequence[str], named: bool, column: str | int, what: str) -> list[int]:
    """The positions of a column that is given by name or number. Several columns may share a name."""
    if isinstance(column, str):
        found = [j for j, name in enumerate(names) if name == column]
        if found and (named or not column.isdecimal()):
            return found
    if (isinstance(column, int) or column.isdecimal()) and 0 <= int(column) < len(names):
        return [int(column)]
    has = f"it has {listed(str(column), names)}" if named else f"it has no header, and columns 0 to {len(names) - 1}"
    raise DataError(f"{path}: no column {column!r} for {what}; {has}")


@dataclass
class Columns:
    """The roles of the columns of one table.

    Attributes
    ----------
    names : list of str
    named : bool
        Whether the names stand in the file.
    index : int or None
    dropped : set of int
    text : set of int
        Columns of text other than the index.
    """

    names: list[str]
    named: bool
    index: int | None
    dropped: set[int]
    text: set[int]

    @property
    def numbers(self) -> list[int]:
        return [j for j in range(len(self.names)) if j != self.index and j not in self.dropped and j not in self.text]

    def label(self, j: int) -> str:
        """Column `j` in a message."""
        return f"column {j} ({self.names[j]})" if self.named and self.names[j] else f"column {j}"

    def key(self, j: int) -> str | int:
        """How a caller names column `j`: by its name, or by its number if the name is empty or not the only one."""
        return self.names[j] if self.named and self.names[j] and self.names.count(self.names[j]) == 1 else j

    def listed(self, which: set[int]) -> str:
        """Some columns for the log."""
        return ", ".join(str(self.key(j)) for j in sorted(which)[:10]) + (", ..." if len(which) > 10 else "")

    def stored(self, header: bool | None) -> dict[str, Any]:
        """The content of `Source.roles`. The index may have an empty name."""
        index = None if self.index is None else self.key(self.index)
        if isinstance(index, int) and self.named and self.names.count(self.names[index]) == 1:
            index = self.names[index]
        return {
            "header": header,
            "index_column": index,
            "drop_columns": [self.key(j) for j in sorted(self.dropped)],
            "text_columns": [self.key(j) for j in sorted(self.text)],
        }


def split_columns(
    path: Path, names: Sequence[str], named: bool, wish: Wish, text: set[int], index: int | None
) -> Columns:
    """Give each column its role. `text` are the columns of text, `index` that of row names if nobody says otherwise."""
    known = wish.roles or {}
    places: dict[str | int, int] = dict(enumerate(range(len(names))))
    if named:
        places |= {name: j for j, name in reversed(list(enumerate(names)))}

    def earlier(role: str) -> set[int]:
        return {places[key] for key in known.get(role, ()) if key in places}

    dropped = {j for c in wish.drop_columns or () for j in find_columns(path, names, named, c, "drop_columns")}
    if wish.drop_columns is None:
        dropped = earlier("drop_columns")
    if wish.index_column is None:
        index = places.get(known.get("index_column", ()), index)
        if index in dropped:
            index = None
    elif wish.index_column is False:
        index = None
    else:
        found = find_columns(path, names, named, wish.index_column, "index_column")
        if len(found) > 1:
            raise DataError(f"{path}: {len(found)} columns are called {wish.index_column!r}; give a number from 0")
        index = found[0]
        if index in dropped:
            raise DataError(f"{path}: column {wish.index_column!r} is in both index_column and drop_columns")
    text = {j for j in text | earlier("text_columns") if j not in dropped and j != index}
    columns = Columns(list(names), named, index, dropped, text)
    if not columns.numbers:
        raise DataError(f"{path}: no column of numbers among {len(names)} column(s)")
    return columns


def describe_roles(path: Path, columns: Columns, genes_by_cells: bool, *first: str) -> str:
    """One line for the log: what became row names, header and text columns."""
    parts = list(first)
    names = "column names" if genes_by_cells else "row names"
    parts.append(f"{names}: {'none' if columns.index is None else columns.label(columns.index)}")
    if columns.text:
        parts.append(f"text columns {'left out' if genes_by_cells else 'kept in obs'}: {columns.listed(columns.text)}")
    if columns.dropped:
        parts.append(f"dropped: {columns.listed(columns.dropped)}")
    return "; ".join(parts)


def warn_of_row_numbers(path: Path, columns: Columns, values: Any) -> None:
    """Warn if the first column is a feature and looks like a number or a time of the rows.

    `values` are the numbers of the first feature.
    """
    j = columns.numbers[0]
    if columns.index is not None or j != 0:
        return
    name = columns.names[0] if columns.named else ""
    plain = "".join(c for c in name.lower() if c.isalnum())
    steps = np.diff(np.asarray(values[:100_000], dtype=np.float64))
    numbered = len(steps) > 3 and values[0] in (0, 1) and bool((steps == 1).all())
    rising = len(steps) > 8 and rises(np.asarray(values[:100_000], dtype=np.float64).tolist())
    if (columns.named and (not plain or ROW_LABEL.fullmatch(plain))) or numbered or rising:
        key = columns.key(0)
        log.warning(
            "%s: %s is used as a feature; if it only tells rows apart, give index_column=%r or drop_columns=[%r]",
            path, columns.label(0), key, key,
        )  # fmt: skip
