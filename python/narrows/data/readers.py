"""Opening data files by their name: the one door to every format.

Promises: HDF5, zarr and npy are read block by block from disk, the other formats are parsed once; nothing is
unpickled; a file that is missing, unknown, damaged or empty is an error of one line that names it.
"""

from __future__ import annotations

import errno
import logging
import math
import os
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from .._extras import require
from ..errors import DataError, NarrowsError
from .source import ArraySource, Source, canonical_csr, check_indptr

__all__ = ["open"]

log = logging.getLogger("narrows")

_FORMATS = (
    ".h5ad",
    ".zarr",
    ".h5 (10x or AnnData)",
    "10x folder (matrix.mtx, features.tsv, barcodes.tsv)",
    ".mtx[.gz]",
    ".npy",
    ".npz",
    ".csv[.gz]",
    ".tsv[.gz]",
    ".parquet",
)


def open(path: str | os.PathLike[str], *, layer: str | None = None, genes_by_cells: bool = False) -> Source:
    """Open a data set.

    Parameters
    ----------
    path : path
        One of .h5ad, .zarr, .h5 (10x or AnnData), a 10x folder with matrix.mtx, .mtx, .npy, .npz, .csv, .tsv,
        .parquet, where .mtx, .csv and .tsv may be gzipped (.gz); or, where no file has that name, the bare
        name of a bundled data set such as ``"pbmc4k"``.
    layer : str, optional
        Which matrix to read: a layer of an AnnData file (or ``"raw"`` for its `raw.X`), an array of an .npz
        file, a feature type of 10x data (default: Gene Expression) or a genome of a 10x file of version 2.
    genes_by_cells : bool
        The table in the file is genes x cells; it is turned round, names included. 10x files, which are known
        to be that way, are turned round in any case.

    Returns
    -------
    Source
        Cells x genes.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    DataError
        If the extension is unknown, the layer does not exist, or the file is damaged, empty or not numeric.
    MissingExtraError
        If the format needs a package that is not installed; the message names the extra.
    """
    from .. import datasets

    path = Path(path)
    if not path.exists():
        if str(path) in datasets.NAMES:
            return _without_layer(datasets.open(str(path)), layer, genes_by_cells)
        bare = path.name == str(path) and not path.suffix
        hint = f"; bundled data sets: {', '.join(datasets.NAMES)}" if bare else ""
        missing = FileNotFoundError(f"{path}: no such file or folder{hint}")
        missing.errno = errno.ENOENT
        raise missing
    if (name := datasets.name_of(path)) is not None:
        return _without_layer(datasets.open(name), layer, genes_by_cells)
    suffix = path.name.removesuffix(".gz").lower()
    suffix = suffix[suffix.rfind(".") :] if "." in suffix else ""
    zipped = path.name.endswith(".gz")
    if path.is_dir():
        from . import mtx

        if suffix == ".zarr" or any((path / mark).exists() for mark in (".zgroup", "zarr.json")):
            reader = _hdf("open_zarr")
        elif mtx.find_mtx(path) is not None:
            reader = mtx.open_10x_folder
        else:
            raise DataError(f"{path}: a folder without matrix.mtx[.gz] that is not a zarr store either")
    else:
        with path.open("rb"):  # no permission: the operating system's own error
            pass
        if suffix == ".mtx":
            from . import mtx

            reader = mtx.open_mtx
        elif suffix in (".csv", ".tsv"):
            from . import text

            reader = text.open_table
        elif suffix in (".h5ad", ".h5", ".hdf5") and not zipped:
            reader = _hdf("open_hdf5")
        elif suffix in _READERS and not zipped:
            reader = _READERS[suffix]
        else:
            raise DataError(f"{path}: unknown extension {path.suffix!r}; known: {', '.join(_FORMATS)}")
    with reading(path):
        source: Source = reader(path, layer, genes_by_cells)
    log.debug("opened %r", source)
    return source


def _hdf(function: str) -> Any:
    from . import hdf

    return getattr(hdf, function)


def _without_layer(source: Source, layer: str | None, genes_by_cells: bool) -> Source:
    if genes_by_cells:
        raise DataError(f"{source.name}: this bundled data set is cells x genes; drop genes_by_cells")
    no_layers(source.name, layer)
    return source


@contextmanager
def reading(path: Path, what: str = "") -> Iterator[None]:
    """Turn what libraries raise for damaged files into one line that names the file."""
    place = f"{path}, {what}" if what else str(path)
    try:
        yield
    except (NarrowsError, PermissionError):
        raise
    except MemoryError as error:
        raise MemoryError(f"{place}: not enough memory to read it") from error
    except Exception as error:  # parsers of other projects raise about anything on damaged bytes
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{place}: damaged or not readable as this format ({reason[:300]})") from error


def no_layers(name: object, layer: str | None) -> None:
    """Raise if a layer is asked of a format that has none."""
    if layer is not None:
        raise DataError(f"{name}: this format has no layers; drop layer={layer!r}")


def no_such_layer(path: Path, layer: str | None, existing: list[str], what: str = "layer") -> NoReturn:
    raise DataError(f"{path}: no {what} {layer!r}; there is {', '.join(map(repr, existing)) or 'none'}")


def held(
    path: Path,
    matrix: Any,
    genes_by_cells: bool,
    row_names: npt.ArrayLike | None = None,
    column_names: npt.ArrayLike | None = None,
    labels: npt.ArrayLike | None = None,
) -> ArraySource:
    """A source over a matrix in memory, turned round if it is genes x cells. Names are those of the file."""
    if genes_by_cells:
        matrix, row_names, column_names = matrix.T, column_names, row_names
        if isinstance(matrix, np.ndarray) and not isinstance(matrix, np.memmap):
            matrix = np.ascontiguousarray(matrix)
    return ArraySource(matrix, obs_names=row_names, var_names=column_names, labels=labels, path=path)


def _open_npy(path: Path, layer: str | None, genes_by_cells: bool) -> Source:
    no_layers(path, layer)
    with path.open("rb") as stream:
        _, _, end = _npy_header(stream, path)
    if end > path.stat().st_size:
        raise DataError(f"{path}: damaged: {path.stat().st_size} bytes where its header promises {end}")
    return held(path, np.load(path, mmap_mode="r", allow_pickle=False), genes_by_cells)


def _npy_header(stream: Any, name: object) -> tuple[tuple[int, ...], np.dtype[Any], int]:
    """Shape and dtype of an npy stream, and the length that they give it."""
    version = np.lib.format.read_magic(stream)
    if version == (1, 0):
        shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
    elif version == (2, 0):
        shape, _, dtype = np.lib.format.read_array_header_2_0(stream)
    else:
        raise DataError(f"{name}: npy format {version} is not read here")
    if dtype.hasobject:
        raise DataError(f"{name}: holds Python objects, which could run code; not read")
    return shape, dtype, stream.tell() + math.prod(shape) * dtype.itemsize


def open_npz(path: Path, layer: str | None = None, genes_by_cells: bool = False) -> Source:
    """One 2-D array or the parts of a sparse matrix, with the names and labels stored beside it."""
    headers = _npz_headers(path)
    with np.load(path, allow_pickle=False) as file:
        if headers.keys() >= {"data", "indices", "indptr", "shape"} or headers.keys() >= {"format", "shape"}:
            no_layers(path, layer)
            matrix = _npz_sparse(path, file)
        else:
            matrix = file[_npz_dense_key(path, headers, layer)]
        beside = {name: file[name] for name in headers if name in _BESIDE}
    genes = next((beside[name] for name in _BESIDE[2:] if name in beside), None)
    rows, columns = beside.get("obs_names"), genes
    if genes_by_cells:
        rows, columns = columns, rows
    return held(path, matrix, genes_by_cells, rows, columns, beside.get("labels"))


_BESIDE = ("labels", "obs_names", "var_names", "feature_names", "genes")


def _npz_headers(path: Path) -> dict[str, tuple[tuple[int, ...], np.dtype[Any]]]:
    """Shape and dtype of each array, checked against its size in the archive: no absurd allocation later."""
    headers = {}
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            with archive.open(info) as stream:
                shape, dtype, end = _npy_header(stream, f"{path}, {info.filename}")
            if end != info.file_size:
                raise DataError(f"{path}: damaged: {info.filename} is not as long as its shape {shape} says")
            headers[info.filename.removesuffix(".npy")] = (shape, dtype)
    return headers


def _npz_dense_key(path: Path, headers: dict[str, tuple[tuple[int, ...], np.dtype[Any]]], layer: str | None) -> str:
    tables = [name for name, (shape, dtype) in headers.items() if len(shape) == 2 and dtype.kind in "biuf"]
    if layer is not None:
        if layer not in tables:
            no_such_layer(path, layer, tables, "table")
        return layer
    if len(tables) == 1:
        return tables[0]
    if "X" in tables:
        return "X"
    found = ", ".join(f"{name} {shape} {dtype}" for name, (shape, dtype) in headers.items()) or "no array"
    if not tables:
        raise DataError(f"{path}: no 2-D array of numbers in it; it holds {found}")
    raise DataError(f"{path}: several tables; choose one with layer=NAME among {', '.join(tables)}")


def _npz_sparse(path: Path, file: Any) -> Any:
    """CSR or CSC from its parts (those of `scipy.sparse.save_npz`, whose `format` may be missing: CSR)."""
    from scipy import sparse

    form = "csr"
    if "format" in file.files:
        value = file["format"].item()
        form = value.decode("ascii") if isinstance(value, bytes) else str(value)
    if form not in ("csr", "csc"):
        return sparse.load_npz(path).tocsr()
    shape = tuple(int(n) for n in file["shape"])
    if len(shape) != 2:
        raise DataError(f"{path}: a sparse matrix of {len(shape)} dimensions")
    data, indices, indptr = file["data"], file["indices"], file["indptr"]
    n_major, n_minor = shape if form == "csr" else shape[::-1]
    check_indptr(indptr, n_major, len(data), len(indices), str(path))
    block = canonical_csr(data, indices, indptr, n_minor, where=str(path))
    return block if form == "csr" else block.T.tocsr()


def _open_parquet(path: Path, layer: str | None, genes_by_cells: bool) -> Source:
    """Numeric columns as they are; one column of text, or the index that pandas stored, names the rows."""
    no_layers(path, layer)
    parquet = require("pyarrow.parquet", "frames", "reading .parquet files")
    types = require("pyarrow.types", "frames", "reading .parquet files")
    with parquet.ParquetFile(path) as file:
        schema = file.schema_arrow
        index = [name for name in (schema.pandas_metadata or {}).get("index_columns", []) if isinstance(name, str)]
        numeric = [types.is_integer(t) or types.is_floating(t) or types.is_boolean(t) for t in schema.types]
        texts = [n for n, ok in zip(schema.names, numeric, strict=True) if not ok and n not in index]
        label = index[0] if index else texts.pop(0) if texts else None
        if texts:
            raise DataError(f"{path}: column {texts[0]!r} is not numeric ({schema.field(texts[0]).type})")
        columns = [n for n, ok in zip(schema.names, numeric, strict=True) if ok and n not in index]
        dtype = np.float64 if any(types.is_float64(schema.field(name).type) for name in columns) else np.float32
        X = np.empty((file.metadata.num_rows, len(columns)), dtype)
        names: list[str] = []
        start = 0
        for batch in file.iter_batches(batch_size=4096, columns=columns + ([label] if label else [])):
            for j, name in enumerate(columns):
                # A null becomes NaN, which the check for finite values names later.
                X[start : start + len(batch), j] = batch.column(name).to_numpy(zero_copy_only=False)
            if label:
                names += map(str, batch.column(label).to_pylist())
            start += len(batch)
    return held(path, X, genes_by_cells, names or None, columns)


_READERS = {".npy": _open_npy, ".npz": open_npz, ".parquet": _open_parquet}
