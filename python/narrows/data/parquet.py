"""Reading parquet tables, batch by batch, into one array in memory. Needs pyarrow, not pandas."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from .._extras import require
from ..errors import DataError
from ..rows.arrays import narrowed
from .formats import Format, in_memory
from .source import Source


def open_parquet(path: Path, layer: str | None, genes_by_cells: bool) -> Source:
    """Read the numeric columns. The index that pandas stored, or the first text column, names the rows."""
    parquet = require("pyarrow.parquet", "frames", "reading .parquet files")
    types = require("pyarrow.types", "frames", "reading .parquet files")
    with parquet.ParquetFile(path) as file:
        schema = file.schema_arrow
        index = [name for name in (schema.pandas_metadata or {}).get("index_columns", []) if isinstance(name, str)]
        numeric = [
            types.is_integer(t) or types.is_floating(t) or types.is_boolean(t) or types.is_decimal(t)
            for t in schema.types
        ]
        texts = [n for n, ok in zip(schema.names, numeric, strict=True) if not ok and n not in index]
        label = index[0] if index else texts.pop(0) if texts else None
        if texts:
            kind = schema.field(texts[0]).type
            raise DataError(f"{path}: column {texts[0]!r} is not numeric ({kind}); drop or encode it")
        columns = [n for n, ok in zip(schema.names, numeric, strict=True) if ok and n not in index]
        kinds = [schema.field(name).type for name in columns]
        short = all(types.is_float32(t) or types.is_float16(t) or t.bit_width <= 16 for t in kinds)
        X = np.empty((file.metadata.num_rows, len(columns)), np.float32 if short else np.float64)
        names: list[str] = []
        start = 0
        for batch in file.iter_batches(batch_size=4096, columns=columns + ([label] if label else [])):
            for j, name in enumerate(columns):
                # A null becomes NaN; `check_finite` reports it later.
                column = batch.column(name)
                if types.is_decimal(column.type):
                    column = column.cast("float64")
                X[start : start + len(batch), j] = column.to_numpy(zero_copy_only=False)
            if label:
                names += map(str, batch.column(label).to_pylist())
            start += len(batch)
    doubles, floats = (any(map(is_kind, kinds)) for is_kind in (types.is_float64, types.is_float32))
    # Whole numbers and decimals are float64 only if float32 would change one of them.
    X = X if short or doubles else narrowed(X)
    return in_memory(path, X, genes_by_cells, names or None, columns, holds_floats=doubles or (floats and short))


FORMATS = (Format(".parquet", open_parquet, (".parquet",)),)
