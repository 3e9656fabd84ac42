"""Reading parquet tables, batch by batch, into one array in memory. Needs pyarrow, not pandas."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from .._extras import require
from ..errors import DataError
from .formats import Format, in_memory
from .source import Source


def open_parquet(path: Path, layer: str | None, genes_by_cells: bool) -> Source:
    """Read the numeric columns. The index that pandas stored, or the first text column, names the rows."""
    parquet = require("pyarrow.parquet", "frames", "reading .parquet files")
    types = require("pyarrow.types", "frames", "reading .parquet files")
    with parquet.ParquetFile(path) as file:
        schema = file.schema_arrow
        index = [name for name in (schema.pandas_metadata or {}).get("index_columns", []) if isinstance(name, str)]
        numeric = [types.is_integer(t) or types.is_floating(t) or types.is_boolean(t) for t in schema.types]
        texts = [n for n, ok in zip(schema.names, numeric, strict=True) if not ok and n not in index]
        label = index[0] if index else texts.pop(0) if texts else None
        if texts:
            kind = schema.field(texts[0]).type
            raise DataError(f"{path}: column {texts[0]!r} is not numeric ({kind}); drop or encode it")
        columns = [n for n, ok in zip(schema.names, numeric, strict=True) if ok and n not in index]
        dtype = np.float64 if any(types.is_float64(schema.field(name).type) for name in columns) else np.float32
        X = np.empty((file.metadata.num_rows, len(columns)), dtype)
        names: list[str] = []
        start = 0
        for batch in file.iter_batches(batch_size=4096, columns=columns + ([label] if label else [])):
            for j, name in enumerate(columns):
                # A null becomes NaN; `check_finite` reports it later.
                X[start : start + len(batch), j] = batch.column(name).to_numpy(zero_copy_only=False)
            if label:
                names += map(str, batch.column(label).to_pylist())
            start += len(batch)
    return in_memory(path, X, genes_by_cells, names or None, columns)


FORMATS = (Format(".parquet", open_parquet, (".parquet",)),)
