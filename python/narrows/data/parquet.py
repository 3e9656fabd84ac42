"""Reading parquet tables, batch by batch, into one array in memory. Needs pyarrow, not pandas.

A folder of parquet files is one table in parts, in the order of their names; numbers in names count as numbers.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from .._extras import require
from ..errors import DataError
from ..rows.arrays import narrowed
from .columns import Column
from .formats import Format, in_memory, reading
from .roles import TAKES, Wish, describe_roles, split_columns, warn_of_row_numbers
from .source import Source

log = logging.getLogger("narrows")

_SHORT = frozenset(["bool", "int8", "int16", "uint8", "uint16", "halffloat", "float", "null"])
"""Types whose numbers float32 holds."""


def open_parquet(path: Path, layer: str | None, genes_by_cells: bool, **said: Any) -> Source:
    """Read the columns of numbers, decimals and booleans.

    The type of a column gives its role. The row names are the column that the caller names, else the index that pandas
    stored, else the first column if it is text. Other columns of text, dates and categories become `obs`.
    """
    parquet = require("pyarrow.parquet", "frames", "reading .parquet files")
    with ExitStack() as stack:
        files = []
        for part in _parts(path):
            with reading(part):
                files.append(stack.enter_context(parquet.ParquetFile(part)))
        schema = files[0].schema_arrow
        for part, file in zip(_parts(path), files, strict=True):
            _check_same(part, schema, file.schema_arrow)
        stored = (schema.pandas_metadata or {}).get("index_columns", [])
        index = next((schema.names.index(name) for name in stored if name in schema.names), None)
        roles = [_role(field.type) for field in schema]
        if index is None and len(roles) > 1 and roles[0] == "text":
            index = 0
        levels = {j for j, name in enumerate(schema.names) if name in stored}  # all but one are text
        text = {j for j, role in enumerate(roles) if role == "text"} | levels
        # pandas calls an index without a name so.
        names = ["" if re.fullmatch(r"__index_level_\d+__", name) else name for name in schema.names]
        columns = split_columns(path, names, True, Wish(**said), text, index)
        for j in columns.numbers:
            if roles[j] == "other":
                raise DataError(
                    f"{path}: {columns.label(j)} holds {schema.field(j).type}, neither numbers nor text; "
                    f"leave it out with drop_columns=[{columns.key(j)!r}]"
                )
        numbers = columns.numbers
        kinds = [str(schema.field(j).type) for j in numbers]
        doubles, floats, short = "double" in kinds, "float" in kinds, all(kind in _SHORT for kind in kinds)
        X = np.empty((sum(file.metadata.num_rows for file in files), len(numbers)), np.float32 if short else np.float64)
        kept: dict[int, list[str | None]] = {j: [] for j in (*columns.text, columns.index) if j is not None}
        start = 0
        for batch in (batch for file in files for batch in _batches(file, sorted({*numbers, *kept}))):
            for k, j in enumerate(numbers):
                X[start : start + len(batch[j]), k] = _numbers(batch[j], roles[j])
            for j, cells in kept.items():
                cells += [_text(value) for value in batch[j].to_pylist()]
            start += len(next(iter(batch.values())))
    if not genes_by_cells and len(X):
        warn_of_row_numbers(path, columns, X[:, 0])
    parts = [f"{len(files)} parts"] if path.is_dir() else []
    log.info("%s: %s", path, describe_roles(path, columns, genes_by_cells, *parts))
    row_names = None if columns.index is None else [cell or "" for cell in kept[columns.index]]
    # Whole numbers and decimals are float64 only if float32 would change one of them.
    X = X if short or doubles else narrowed(X)
    columns_of = [names[j] for j in numbers]
    obs = {} if genes_by_cells else {str(columns.key(j)): _column(kept[j]) for j in sorted(columns.text)}
    source = in_memory(
        path, X, genes_by_cells, row_names, columns_of, holds_floats=doubles or (floats and short), obs=obs
    )
    source.roles = columns.stored(None)
    return source


def _parts(path: Path) -> list[Path]:
    """The files of a table; ``part-10`` comes after ``part-9``."""
    if not path.is_dir():
        return [path]
    if any("=" in inner.name and inner.is_dir() for inner in path.iterdir()):
        raise DataError(f"{path}: partitioned by folders such as column=value, which is not read; write it without")
    natural = {part: [(len(n), n) if n.isdecimal() else (0, n) for n in re.split(r"(\d+)", part.name)]
               for part in path.glob("*.parquet")}  # fmt: skip
    return sorted(natural, key=natural.__getitem__)


def _check_same(part: Path, expected: Any, found: Any) -> None:
    for j in range(max(len(expected), len(found))):
        here = f"{found.field(j).name} ({found.field(j).type})" if j < len(found) else "absent"
        there = f"{expected.field(j).name} ({expected.field(j).type})" if j < len(expected) else "absent"
        if here != there:
            raise DataError(f"{part}: column {j} is {here}, but {there} in the first part: the parts are not one table")


def _role(kind: Any) -> str:
    """``number``, ``decimal``, ``text`` or ``other``."""
    types = require("pyarrow.types", "frames", "reading .parquet files")
    if types.is_dictionary(kind):
        return "other" if types.is_nested(kind.value_type) else "text"
    if types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind) or types.is_null(kind):
        return "number"
    if types.is_decimal(kind):
        return "decimal"
    words = types.is_string(kind) or types.is_large_string(kind) or str(kind) in ("string_view", "binary_view")
    bytes_ = types.is_binary(kind) or types.is_large_binary(kind) or types.is_fixed_size_binary(kind)
    return "text" if words or bytes_ or types.is_temporal(kind) else "other"


def _batches(file: Any, wanted: list[int]) -> Any:
    """The wanted columns of each batch, by position."""
    names = file.schema_arrow.names
    unique = len({*names}) == len(names) and not any("." in name for name in names)  # dots select in structs
    chosen = [names[j] for j in wanted] if unique else None
    for batch in file.iter_batches(batch_size=4096, columns=chosen):
        places = [batch.schema.names.index(names[j]) for j in wanted] if unique else wanted
        yield {j: batch.column(place) for j, place in zip(wanted, places, strict=True)}


def _numbers(column: Any, role: str) -> Any:
    """A null becomes NaN; `check_finite` reports it later."""
    if role == "decimal":
        column = column.cast("string").cast("float64")  # the nearest float; a direct cast is not
    elif str(column.type) == "bool":
        column = column.cast("uint8")
    return np.asarray(column.to_numpy(zero_copy_only=False), dtype=np.float64 if column.null_count else None)


def _text(value: Any) -> str | None:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else None if value is None else str(value)


def _column(cells: list[str | None]) -> Column:
    """A column of `obs`, whose missing values are marked."""
    missing = np.asarray([cell is None for cell in cells])
    return Column(np.asarray([cell or "" for cell in cells], str), missing if missing.any() else None)


def _obs_of_parquet(path: Path, **said: Any) -> Mapping[str, Any]:
    """The columns of text."""
    return open_parquet(path, None, False, **said).obs


def _is_folder(path: Path) -> bool:
    return any(path.glob("*.parquet")) or any(path.glob("*=*/*.parquet"))


FORMATS = (
    Format(
        ".parquet", open_parquet, (".parquet",), is_folder=_is_folder, contents="or a folder of the parts",
        read_obs=_obs_of_parquet, takes=TAKES,
    ),
)  # fmt: skip
