"""AnnData files (.h5ad, .zarr) and 10x .h5 files, read block by block from disk.

- CSR and dense matrices stay on disk; only the requested rows are read. A matrix stored by columns is converted once,
  in memory, and a log line says so.
- An HDF5 file and a zarr store are the same tree of groups and arrays, so the same code reads both.
- Needs h5py or zarr, not anndata.
- HDF5's own C library can hang on a file with altered metadata. Nothing here can prevent that.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .._extras import require
from ..errors import DataError
from ..rows.arrays import exact, holds_floats
from ..rows.sparse import canonical_csr, check_indptr
from .formats import Format, in_memory, no_such_layer, reading
from .mtx import GENE_EXPRESSION, select_features, unique_names
from .source import Source

log = logging.getLogger("narrows")

_RANGE_BYTES = 64 << 10  # in an array without chunks, reading a gap of this size is cheaper than skipping it


class _DiskSource(Source):
    """A source with an open file."""

    def __init__(self, shape: tuple[int, int], dtype: Any, *, closer: Callable[[], None], path: Path, **kwargs: Any):
        super().__init__(shape, dtype, path=path, **kwargs)
        self._file_path = path
        self._closer = closer

    def close(self) -> None:
        """Close the file."""
        if not self._closed:
            super().close()
            self._closer()


class DenseDiskSource(_DiskSource):
    """Rows of a 2-D HDF5 dataset or zarr array."""

    def __init__(self, array: Any, **kwargs: Any) -> None:
        super().__init__(array.shape, array.dtype, **kwargs)
        self._array = array

    def _slice(self, start: int, stop: int) -> Any:
        with reading(self._file_path, f"rows {start}..{stop - 1}"):
            return exact(self._array[start:stop])

    def _extent(self, rows: npt.NDArray[np.int64]) -> tuple[npt.NDArray[Any], npt.NDArray[Any], int]:
        chunk = self._array.chunks[0] if self._array.chunks else _RANGE_BYTES // self._unit_bytes()
        return rows, rows + 1, chunk


class CSRDiskSource(_DiskSource):
    """Rows of a CSR matrix whose values and indices stay on disk. `indptr` is in memory, 8 bytes per row."""

    def __init__(
        self,
        data: Any,
        indices: Any,
        indptr: npt.NDArray[Any],
        n_columns: int,
        *,
        keep: npt.NDArray[np.intp] | None = None,
        path: Path,
        **kwargs: Any,
    ) -> None:
        check_indptr(indptr, len(indptr) - 1, data.shape[0], indices.shape[0], str(path))
        shape = (len(indptr) - 1, n_columns if keep is None else len(keep))
        super().__init__(shape, data.dtype, nnz=data.shape[0], path=path, **kwargs)
        self._data, self._indices, self._indptr = data, indices, indptr.astype(np.int64)
        self._n_columns, self._keep = n_columns, keep

    def _slice(self, start: int, stop: int) -> Any:
        first, last = int(self._indptr[start]), int(self._indptr[stop])
        with reading(self._file_path, f"rows {start}..{stop - 1}"):
            data = np.asarray(self._data[first:last])
            indices = np.asarray(self._indices[first:last])
        indptr = self._indptr[start : stop + 1] - first
        block = canonical_csr(data, indices, indptr, self._n_columns, where=str(self._file_path), row_offset=start)
        return block if self._keep is None else block[:, self._keep]

    def _extent(self, rows: npt.NDArray[np.int64]) -> tuple[npt.NDArray[Any], npt.NDArray[Any], int]:
        chunk = self._data.chunks[0] if self._data.chunks else _RANGE_BYTES // self._unit_bytes()
        return self._indptr[rows], self._indptr[rows + 1], chunk

    def _unit_bytes(self) -> int:
        return int(self._data.dtype.itemsize + self._indices.dtype.itemsize)


def open_hdf5(path: Path, layer: str | None, genes_by_cells: bool) -> Source:
    """Read an AnnData file, or a 10x file of version 2 or 3."""
    h5py = require("h5py", "anndata", f"reading {path.suffix} files")
    file = h5py.File(path, "r", locking="best-effort")  # cluster file systems often refuse locks
    try:
        if "X" in file or "layers" in file:
            source = _open_anndata(path, file, layer, genes_by_cells, file.close)
        else:
            source = _open_10x(path, file, layer, file.close)
    except BaseException:
        file.close()
        raise
    if not isinstance(source, _DiskSource):
        file.close()
    return source


def open_zarr(path: Path, layer: str | None, genes_by_cells: bool) -> Source:
    """Read an AnnData object stored as zarr."""
    zarr = require("zarr", "anndata", "reading .zarr stores")
    return _open_anndata(path, zarr.open_group(str(path), mode="r"), layer, genes_by_cells, lambda: None)


def _open_anndata(path: Path, root: Any, layer: str | None, genes_by_cells: bool, closer: Callable[[], None]) -> Source:
    layers = sorted(root["layers"]) if _has(root, "layers") else []
    choices = {name: (root["layers"][name], root) for name in layers}
    # scanpy keeps the counts of all genes in `raw`, with its own `var`.
    if _has(root, "raw"):
        choices.setdefault("raw", (root["raw"]["X"], root["raw"]))
    if layer is None and _has(root, "X"):
        node, owner = root["X"], root
    elif layer in choices:
        node, owner = choices[layer]
    elif layer is None:
        raise DataError(f"{path}: it has no X; choose a layer with layer=NAME: {', '.join(choices)}")
    else:
        no_such_layer(path, layer, list(choices))
    obs, var = _index(root, "obs"), _index(owner, "var")
    if not hasattr(node, "shape"):
        return _open_sparse(path, node, genes_by_cells, obs, var, closer)
    if node.ndim != 2:
        raise DataError(f"{path}: the matrix must have 2 dimensions, it has shape {node.shape}")
    if genes_by_cells:
        return in_memory(path, node[:], True, obs, var)
    return DenseDiskSource(node, path=path, obs_names=obs, var_names=var, closer=closer)


def _has(group: Any, name: str) -> bool:
    return name in group and group[name].attrs.get("encoding-type") != "null"


def _open_sparse(
    path: Path, group: Any, genes_by_cells: bool, rows: Any, columns: Any, closer: Callable[[], None]
) -> Source:
    encoding = str(group.attrs.get("encoding-type", group.attrs.get("h5sparse_format", "")))
    shape = group.attrs.get("shape", group.attrs.get("h5sparse_shape"))
    by_rows = encoding.startswith("csr")
    if not (by_rows or encoding.startswith("csc")) or shape is None or len(shape) != 2:
        raise DataError(
            f"{path}: the matrix is stored as {encoding or 'an unknown layout'}; dense, CSR or CSC is needed"
        )
    n_rows, n_columns = int(shape[0]), int(shape[1])
    data, indices, indptr = group["data"], group["indices"], group["indptr"][:]
    if by_rows != genes_by_cells:  # stored along the rows of the result
        n_major, n_minor = (n_rows, n_columns) if by_rows else (n_columns, n_rows)
        names = (rows, columns) if by_rows else (columns, rows)
        check_indptr(indptr, n_major, data.shape[0], indices.shape[0], str(path))
        return CSRDiskSource(
            data, indices, indptr, n_minor, path=path, obs_names=names[0], var_names=names[1], closer=closer
        )
    n_major, n_minor = (n_rows, n_columns) if by_rows else (n_columns, n_rows)
    check_indptr(indptr, n_major, data.shape[0], indices.shape[0], str(path))
    log.info("%s: stored by %s; converted to CSR in memory", path, "genes" if by_rows else "columns (CSC)")
    matrix = canonical_csr(data[:], indices[:], indptr, n_minor, where=str(path))
    matrix = matrix if by_rows else matrix.T.tocsr()
    return in_memory(path, matrix, genes_by_cells, rows, columns, holds_floats=holds_floats(data.dtype))


def _index(root: Any, axis: str) -> Any:
    """The names of one axis: the index column of the data frame `obs` or `var`."""
    if axis not in root:
        return None
    frame = root[axis]
    if hasattr(frame, "dtype"):  # before anndata 0.7: a table with a column "index"
        fields = list(frame.dtype.names or [])
        return _strings(frame["index" if "index" in fields else fields[0]])
    return _strings(frame[str(frame.attrs.get("_index", "_index"))])


def _strings(node: Any) -> npt.NDArray[np.str_]:
    if hasattr(node, "keys"):  # a categorical, or text with a mask of missing values
        if "categories" in node:
            named: npt.NDArray[np.str_] = _strings(node["categories"])[node["codes"][:]]
            return named
        return _strings(node["values"])
    return np.asarray([v.decode() if isinstance(v, bytes) else str(v) for v in node[:].tolist()], dtype=str)


def obs_of_hdf5(path: Path, column: str) -> npt.NDArray[Any]:
    """A column of `obs` of an .h5ad file."""
    h5py = require("h5py", "anndata", f"reading {path.suffix} files")
    with h5py.File(path, "r", locking="best-effort") as file:
        return _obs(path, file, column)


def obs_of_zarr(path: Path, column: str) -> npt.NDArray[Any]:
    """A column of `obs` of an AnnData object stored as zarr."""
    zarr = require("zarr", "anndata", "reading .zarr stores")
    return _obs(path, zarr.open_group(str(path), mode="r"), column)


def _obs(path: Path, root: Any, column: str) -> npt.NDArray[Any]:
    if "obs" not in root:
        raise DataError(f"{path}: it has no obs, so there is no column {column!r}")
    frame = root["obs"]
    table = hasattr(frame, "dtype")  # before anndata 0.7
    inner = {"__categories"} if table else {"__categories", str(frame.attrs.get("_index", "_index"))}
    names = sorted(set(frame.dtype.names or () if table else frame) - inner)
    if column not in names:
        raise DataError(f"{path}: obs has no column {column!r}; it has {', '.join(map(repr, names)) or 'none'}")
    values, missing = _values(frame[column])
    if missing is not None and missing.any():
        raise DataError(f"{path}: column {column!r} of obs has a missing value in row {int(np.argmax(missing))}")
    return values


def _values(node: Any) -> tuple[npt.NDArray[Any], npt.NDArray[np.bool_] | None]:
    """Numbers or strings, and a mask of the missing ones."""
    if hasattr(node, "keys"):  # a categorical, or values with a mask
        if "categories" in node:
            codes = node["codes"][:]
            return _values(node["categories"])[0][codes], codes < 0
        return _values(node["values"])[0], np.asarray(node["mask"][:], bool)
    values = np.asarray(node[:])
    return (values, None) if values.dtype.kind in "biuf" else (_strings(values), None)


def _open_10x(path: Path, file: Any, layer: str | None, closer: Callable[[], None]) -> Source:
    """Read Cell Ranger's matrix: genes x cells in CSC, which has the same arrays as cells x genes in CSR."""
    groups = [name for name in file if hasattr(file[name], "keys") and {"indptr", "barcodes"} <= set(file[name])]
    if not groups:
        raise DataError(f"{path}: neither an AnnData file (no X) nor a 10x file (no group with indptr and barcodes)")
    if groups == ["matrix"]:
        group = file["matrix"]
        features = group["features"]
        ids, names = _strings(features["id"]), _strings(features["name"])
        kinds = _strings(features["feature_type"]).tolist() if "feature_type" in features else None
        keep = select_features(path, kinds or [GENE_EXPRESSION] * len(ids), layer)
    else:
        if layer not in groups and (layer is not None or len(groups) > 1):
            no_such_layer(path, layer, groups, "genome")
        group = file[groups[0] if layer is None else layer]
        names, keep = _strings(group["gene_names"]), None
    n_genes, n_cells = (int(n) for n in group["shape"][:])
    indptr, symbols = group["indptr"][:], unique_names(names.tolist())
    check_indptr(indptr, n_cells, group["data"].shape[0], group["indices"].shape[0], str(path))
    if len(symbols) != n_genes:
        raise DataError(f"{path}: damaged: {len(symbols)} feature names for {n_genes} features")
    return CSRDiskSource(
        group["data"],
        group["indices"],
        indptr,
        n_genes,
        keep=keep,
        path=path,
        obs_names=_strings(group["barcodes"]),
        var_names=symbols if keep is None else symbols[keep],
        closer=closer,
    )


def _is_zarr(path: Path) -> bool:
    return path.suffix.lower() == ".zarr" or any((path / mark).exists() for mark in (".zgroup", "zarr.json"))


FORMATS = (
    Format(".h5ad", open_hdf5, (".h5ad",), layer="layer", read_obs=obs_of_hdf5),
    Format(".zarr", open_zarr, is_folder=_is_zarr, layer="layer", read_obs=obs_of_zarr),
    Format(
        ".h5",
        open_hdf5,
        (".h5", ".hdf5"),
        contents="10x or AnnData",
        layer="layer, feature type or genome",
        read_obs=obs_of_hdf5,
    ),
)
