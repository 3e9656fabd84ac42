"""Writing tables of codes, reconstructions and losses as .npy, .csv or .h5ad.

- A file is either complete or absent.
- Rows arrive in blocks. A .npy or .csv table may be larger than memory; .h5ad is collected in memory first.
- Numbers keep every bit: .csv has the shortest text that reads back as the same float.
"""

from __future__ import annotations

import contextlib
import csv
import io
import logging
import re
import shutil
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from .._extras import require
from ..data.columns import Column, column_of
from ..errors import DataError, OutputError
from ..persistence import atomic_write, temporary

__all__ = ["check_output", "write_table"]

log = logging.getLogger("narrows")

Names = npt.NDArray[Any] | None


def check_output(path: Path, suffixes: Iterable[str]) -> None:
    """Check an output path before any work is done.

    Raises
    ------
    OutputError
        The extension is unknown, the folder is missing, or the path is a folder.
    MissingExtraError
        .h5ad needs the extra ``anndata``.
    """
    known = tuple(suffixes)
    if path.suffix.lower() not in known:
        raise OutputError(f"cannot write {path}: its extension must be one of {', '.join(known)}")
    if path.is_dir():
        raise OutputError(f"cannot write {path}: it is a folder; name a file")
    if not path.parent.is_dir():
        raise OutputError(f"cannot write {path}: the folder {path.parent} does not exist; create it first")
    if path.suffix.lower() == ".h5ad":
        require("anndata", "anndata", f"writing {path.name}")


def write_table(
    path: Path,
    blocks: Iterable[npt.NDArray[Any]],
    shape: tuple[int, ...],
    dtype: npt.DTypeLike,
    *,
    row_names: Names = None,
    column_names: Names = None,
    labels: Names = None,
    obs: Mapping[str, Any] | None = None,
    about: dict[str, Any] | None = None,
) -> None:
    """Write blocks of rows as one table, in the format of the extension.

    Parameters
    ----------
    path : Path
        .npy (numbers only), .csv (a header, and a first column of row names or numbers) or .h5ad.
    blocks : iterable of ndarray of shape (n, n_columns), or (n,) if `shape` has one entry
    shape : tuple of int
        Shape of the whole table.
    dtype : dtype
    row_names, column_names, labels : ndarray, optional
        Used by .csv and .h5ad; labels become ``obs["label"]`` in .h5ad.
    obs : mapping of str to ndarray or Column, optional
        More columns of `obs` in .h5ad. Text becomes categories, as anndata does it. A column that cannot be read or
        stored is left out with a warning.
    about : dict, optional
        Content of ``uns["narrows"]`` in .h5ad.
    """
    dtype = np.dtype(dtype)
    suffix = path.suffix.lower()
    if suffix == ".npy":
        atomic_write(path, lambda stream: _npy(stream, blocks, shape, dtype))
    elif suffix == ".csv":
        atomic_write(path, lambda stream: _csv(stream, blocks, row_names, column_names))
    elif suffix == ".h5ad":
        known = {} if labels is None else {"label": Column(np.asarray([str(label) for label in labels]))}
        known |= _columns(obs or {}, shape[0])
        X = np.concatenate([np.asarray(block, dtype=dtype) for block in blocks])
        atomic_write(path, lambda stream: _h5ad(stream, path, X, row_names, column_names, known, about))
    else:
        raise OutputError(f"cannot write {path}: unknown extension {path.suffix!r}")


def _npy(stream: BinaryIO, blocks: Iterable[npt.NDArray[Any]], shape: tuple[int, ...], dtype: Any) -> None:
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(stream, header)
    n_rows = 0
    for block in blocks:
        stream.write(np.ascontiguousarray(block, dtype=dtype).data)
        n_rows += len(block)
    if n_rows != shape[0]:
        raise ValueError(f"{n_rows} rows were written, the table has {shape[0]}")


def _csv(stream: BinaryIO, blocks: Iterable[npt.NDArray[Any]], row_names: Names, column_names: Names) -> None:
    text = io.TextIOWrapper(stream, encoding="utf-8", newline="", write_through=True)
    writer = csv.writer(text, lineterminator="\n")
    names: Iterator[Any] = iter(range(1 << 62)) if row_names is None else iter(row_names)
    first = True
    for block in blocks:
        table = block if block.ndim == 2 else block[:, None]
        if first:
            columns = range(table.shape[1]) if column_names is None else column_names
            writer.writerow(["", *columns])
            first = False
        # str of a NumPy float is the shortest text that reads back as the same bits of its dtype.
        writer.writerows([name, *map(str, row)] for row, name in zip(table, names, strict=False))
    text.detach()


def _columns(obs: Mapping[str, Any], n_rows: int) -> dict[str, Column]:
    """The columns that can be carried along; a warning names the others."""
    found = {}
    for name in obs:
        try:
            if not name.strip("./") or name == "_index":
                raise DataError("its name cannot be stored")
            found[name] = column = column_of(obs, name, "obs")
            if len(column) != n_rows:
                raise DataError(f"it has {len(column)} values for {n_rows} rows")
        except (DataError, OSError) as error:
            found.pop(name, None)
            log.warning("column %r of obs is left out of the output: %s", name, error)
    return found


def _as_pandas(pandas: Any, column: Column) -> Any:
    """The column with the dtype that anndata reads from the file of the data."""
    values, missing = column.values, column.missing
    if column.categories is not None:
        return pandas.Categorical.from_codes(values, column.categories, ordered=column.ordered)
    if values.dtype.kind == "U":  # anndata makes categories of text that repeats, and cannot store missing text
        texts = values.astype(object)
        texts[missing] = None
        return pandas.Categorical(texts) if missing.any() else texts
    if column.mask is not None and values.dtype.kind == "b":
        return pandas.arrays.BooleanArray(values, missing.copy())
    if column.mask is not None and values.dtype.kind in "iu":
        return pandas.arrays.IntegerArray(values, missing.copy())
    return np.where(missing, np.nan, values).astype(values.dtype) if missing.any() else values


def _h5ad(
    stream: BinaryIO,
    path: Path,
    X: npt.NDArray[Any],
    row_names: Names,
    column_names: Names,
    known: Mapping[str, Column],
    about: dict[str, Any] | None,
) -> None:
    anndata = require("anndata", "anndata", "writing .h5ad files")
    pandas = require("pandas", "anndata", "writing .h5ad files")
    index = [str(i) for i in (range(len(X)) if row_names is None else row_names)]
    columns = [str(i) for i in (range(X.shape[1]) if column_names is None else column_names)]
    obs = pandas.DataFrame(index=pandas.Index(index, dtype=object))
    for name, column in known.items():
        try:
            obs[name] = _as_pandas(pandas, column)
        except (ValueError, TypeError) as error:  # such as two categories of one name
            log.warning("column %r of obs is left out of the output: %s", name, error)
    whole = Path(temporary(path.parent, path.name))  # HDF5 needs a path; the bytes are then copied to the atomic file
    with warnings.catch_warnings():
        # anndata warns at every step if the user's row names repeat.
        warnings.simplefilter("ignore")
        adata = anndata.AnnData(X, obs=obs, var=pandas.DataFrame(index=pandas.Index(columns, dtype=object)))
        if about:
            adata.uns["narrows"] = about
        try:
            with contextlib.redirect_stderr(io.StringIO()):  # errors inside destructors, which the comparison finds
                adata.write_h5ad(whole)
            if not _same(anndata.read_h5ad(whole), adata):
                raise OutputError(f"cannot write {path}: the file does not hold what was written; is the disk full?")
            with whole.open("rb") as written:
                shutil.copyfileobj(written, stream, 1 << 20)
        except (OutputError, MemoryError):
            raise
        except Exception as error:  # HDF5 reports a failing disk by many types
            text = " ".join(str(error).split())
            system = re.search(r"error message = '([^']+)'", text)  # the words of the system, inside those of HDF5
            text = system[1] if system else text
            raise OutputError(f"cannot write {path}: {text or type(error).__name__}") from error
        finally:
            whole.unlink(missing_ok=True)


def _same(read: Any, written: Any) -> bool:
    """Whether a file holds the table that was given to the library. A failed write may leave zeros without an error."""
    frames = (read.obs, written.obs), (read.var, written.var)
    return (
        np.asarray(read.X).tobytes() == np.ascontiguousarray(written.X).tobytes()
        and all(
            list(a.index) == list(b.index) and list(a) == list(b) and all(_same_column(a[c], b[c]) for c in b)
            for a, b in frames
        )
        and dict(read.uns.get("narrows", {})) == dict(written.uns.get("narrows", {}))
    )


def _same_column(read: Any, written: Any) -> bool:
    """Whether two columns have the same values, and lack the same ones: a missing value does not equal itself."""
    return list(read.isna()) == list(written.isna()) and list(read.dropna()) == list(written.dropna())
