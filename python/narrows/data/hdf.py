"""AnnData files (.h5ad, .zarr), MuData, loom and 10x .h5 files, read block by block from disk.

- CSR and dense matrices stay on disk; only the requested rows are read. A matrix stored by columns is converted once,
  in memory, and a log line says so.
- An HDF5 file and a zarr store are the same tree of groups and arrays, so the same code reads both.
- Needs h5py or zarr, not anndata.
- HDF5's own C library can hang or crash on a file with altered metadata. `untrusted` opens it in another process.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import DataError
from ..rows.arrays import exact, holds_floats
from ..rows.sparse import canonical_csr, check_indptr
from .columns import Column, listed
from .formats import Format, in_memory, no_such_layer, reading
from .frames import Frame, StoredColumns, attributes_frame, column, plain
from .mtx import GENE_EXPRESSION, select_features, unique_names
from .source import Source
from .tree import Tree, hdf5_tree, is_group, text_attribute, zarr_tree

log = logging.getLogger("narrows")

_RANGE_BYTES = 64 << 10  # in an array without chunks, reading a gap of this size is cheaper than skipping it

Opener = Callable[[], Tree]


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
    """Rows of a 2-D HDF5 dataset or zarr array, or its columns if it is `turned`."""

    def __init__(self, array: Any, *, turned: bool = False, **kwargs: Any) -> None:
        super().__init__(array.shape[::-1] if turned else array.shape, array.dtype, **kwargs)
        self._array, self._turned = array, turned

    def _slice(self, start: int, stop: int) -> Any:
        with reading(self._file_path, f"rows {start}..{stop - 1}"):
            if self._turned:
                return exact(np.ascontiguousarray(self._array[:, start:stop].T))
            return exact(self._array[start:stop])

    def _extent(self, rows: npt.NDArray[np.int64]) -> tuple[npt.NDArray[Any], npt.NDArray[Any], int]:
        chunks = self._array.chunks
        grain = chunks[int(self._turned)] if chunks else 0 if self._turned else _RANGE_BYTES // self._unit_bytes()
        return rows, rows + 1, grain


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
        where: str = "",
        path: Path,
        **kwargs: Any,
    ) -> None:
        where = where or str(path)
        check_indptr(indptr, len(indptr) - 1, data.shape[0], indices.shape[0], where)
        shape = (len(indptr) - 1, n_columns if keep is None else len(keep))
        super().__init__(shape, data.dtype, nnz=data.shape[0], path=path, **kwargs)
        self._data, self._indices, self._indptr = data, indices, indptr.astype(np.int64)
        self._n_columns, self._keep, self._where = n_columns, keep, where

    def _slice(self, start: int, stop: int) -> Any:
        first, last = int(self._indptr[start]), int(self._indptr[stop])
        with reading(self._file_path, f"rows {start}..{stop - 1}"):
            data = np.asarray(self._data[first:last])
            indices = np.asarray(self._indices[first:last])
        indptr = self._indptr[start : stop + 1] - first
        block = canonical_csr(data, indices, indptr, self._n_columns, where=self._where, row_offset=start)
        return block if self._keep is None else block[:, self._keep]

    def _extent(self, rows: npt.NDArray[np.int64]) -> tuple[npt.NDArray[Any], npt.NDArray[Any], int]:
        chunk = self._data.chunks[0] if self._data.chunks else _RANGE_BYTES // self._unit_bytes()
        return self._indptr[rows], self._indptr[rows + 1], chunk

    def _unit_bytes(self) -> int:
        return int(self._data.dtype.itemsize + self._indices.dtype.itemsize)


def open_hdf5(
    path: Path, layer: str | None, genes_by_cells: bool, *, follow_links: bool = False, modality: str | None = None
) -> Source:
    """Read an AnnData, MuData, loom or 10x file; the content decides, not the suffix."""
    return _open(partial(hdf5_tree, path, follow_links), layer, genes_by_cells, modality)


def open_zarr(
    path: Path, layer: str | None, genes_by_cells: bool, *, follow_links: bool = False, modality: str | None = None
) -> Source:
    """Read an AnnData or MuData object stored as zarr, in a folder or a zip file."""
    return _open(partial(zarr_tree, path, follow_links), layer, genes_by_cells, modality)


def obs_of_hdf5(path: Path, *, follow_links: bool = False, modality: str | None = None) -> Mapping[str, Column]:
    """The columns of `obs` of an AnnData, MuData or loom file."""
    return _obs_of(partial(hdf5_tree, path, follow_links), modality)


def obs_of_zarr(path: Path, *, follow_links: bool = False, modality: str | None = None) -> Mapping[str, Column]:
    """The columns of `obs` of an AnnData or MuData object stored as zarr."""
    return _obs_of(partial(zarr_tree, path, follow_links), modality)


def _open(opened: Opener, layer: str | None, genes_by_cells: bool, modality: str | None) -> Source:
    tree = opened()
    try:
        base = _base(tree, modality)
        if _is_loom(tree):
            source: Source = _open_loom(tree, layer, opened)
        elif _is_anndata(tree, tree.child(tree.root, base) if base else tree.root):
            source = _open_anndata(tree, base, layer, genes_by_cells, opened)
        else:
            source = _open_10x(tree, layer)
    except BaseException:
        tree.close()
        raise
    if not isinstance(source, _DiskSource):
        tree.close()
    return source


def _base(tree: Tree, modality: str | None) -> str:
    """The path of the AnnData object in the file: the top, or that of a modality of MuData."""
    group = tree.find(tree.root, "mod")
    if group is None or not is_group(group) or _is_anndata(tree, tree.root, "X", "layers"):
        if modality is not None:
            raise DataError(f"{tree.path}: it has no modalities; drop modality={modality!r}")
        return ""
    names = sorted(group)
    if modality is None and len(names) == 1:
        return f"mod/{names[0]}"
    if modality is None:
        choice = f"choose one with modality=NAME: {listed(None, names)}"
        raise DataError(f"{tree.path}: it has {len(names)} modalities; {choice}")
    if modality not in names:
        no_such_layer(tree.path, modality, names, "modality")
    return f"mod/{modality}"


_ANNDATA = ("X", "layers", "raw", "raw.X", "obs", "var")


def _is_anndata(tree: Tree, root: Any, *names: str) -> bool:
    return any(name in (names or _ANNDATA) for name in root)


def _is_loom(tree: Tree) -> bool:
    return {"matrix", "row_attrs", "col_attrs"} <= set(tree.root) and not is_group(tree.child(tree.root, "matrix"))


# --- AnnData


def _open_anndata(tree: Tree, base: str, layer: str | None, genes_by_cells: bool, opened: Opener) -> Source:
    root = _at(tree, base)
    group = tree.find(root, "layers")
    choices = {} if group is None or not is_group(group) else {name: f"layers/{name}" for name in sorted(group)}
    # scanpy keeps the counts of all genes in `raw`, with its own `var`. The names with a dot are of anndata 0.6.
    var = {}
    for raw, frame in (("raw/X", "raw/var"), ("raw.X", "raw.var")):
        if _present(tree, root, raw):
            choices.setdefault("raw", raw)
            var[raw] = frame
    if _present(tree, root, "X"):
        choices.setdefault("X", "X")
    if layer is None and "X" not in choices:
        if not choices:
            raise DataError(f"{tree.path}: it has no X and no layers")
        raise DataError(f"{tree.path}: it has no X; choose a layer with layer=NAME: {', '.join(choices)}")
    place = choices.get("X" if layer is None else layer)
    if place is None:  # a name with slashes is a group in a group
        place = f"layers/{layer}" if "/" in str(layer) else ""
        if not place or tree.find(root, place) is None:
            no_such_layer(tree.path, layer, list(choices))
    node = tree.child(root, place)
    frames = ("obs", var.get(place, "var"))
    names = [Frame(tree, root, name).index() if tree.find(root, name) is not None else None for name in frames]
    obs = _stored_columns(tree, base, frames[1] if genes_by_cells else "obs", opened)
    others: dict[str, Any] = {"obs": obs, "beside": tree.beside}
    if is_group(node):
        return _open_sparse(tree, node, genes_by_cells, names[0], names[1], others)
    _check_numbers(tree, node)
    if node.ndim != 2:
        raise DataError(f"{tree.where(node)}: the matrix must have 2 dimensions, it has shape {node.shape}")
    if genes_by_cells:
        return in_memory(tree.path, node[:], True, names[0], names[1], **others)
    return DenseDiskSource(node, obs_names=names[0], var_names=names[1], **_held(tree), **others)


def _held(tree: Tree) -> dict[str, Any]:
    """Arguments of a source that keeps the file open."""
    return {"path": tree.path, "closer": tree.close}


def _at(tree: Tree, base: str) -> Any:
    return tree.child(tree.root, base) if base else tree.root


def _present(tree: Tree, root: Any, name: str) -> bool:
    node = tree.find(root, name)
    return node is not None and text_attribute(node, "encoding-type") != "null"


def _check_numbers(tree: Tree, node: Any) -> None:
    dtype = getattr(node, "dtype", None)
    if dtype is None or dtype.kind not in "biuf":
        raise DataError(f"{tree.where(node)}: numbers expected, got dtype {dtype}")


def _open_sparse(
    tree: Tree, group: Any, genes_by_cells: bool, rows: Any, columns: Any, others: Mapping[str, Any]
) -> Source:
    where = tree.where(group)
    encoding = text_attribute(group, "h5sparse_format", "encoding-type") or ""
    shape = group.attrs.get("shape", group.attrs.get("h5sparse_shape"))
    by_rows = encoding.startswith("csr")
    if not (by_rows or encoding.startswith("csc")) or shape is None or len(shape) != 2:
        raise DataError(
            f"{where}: the matrix is stored as {encoding or 'an unknown layout'}; dense, CSR or CSC is needed"
        )
    n_rows, n_columns = int(shape[0]), int(shape[1])
    data, indices, indptr = _parts(tree, group)
    n_major, n_minor = (n_rows, n_columns) if by_rows else (n_columns, n_rows)
    check_indptr(indptr, n_major, data.shape[0], indices.shape[0], where)
    if by_rows != genes_by_cells:  # stored along the rows of the result
        names = (rows, columns) if by_rows else (columns, rows)
        return CSRDiskSource(
            data, indices, indptr, n_minor, where=where, obs_names=names[0], var_names=names[1], **_held(tree), **others
        )
    log.info("%s: stored by %s; converted to CSR in memory", tree.path, "genes" if by_rows else "columns (CSC)")
    matrix = canonical_csr(data[:], indices[:], indptr, n_minor, where=where)
    matrix = matrix if by_rows else matrix.T.tocsr()
    return in_memory(tree.path, matrix, genes_by_cells, rows, columns, holds_floats=holds_floats(data.dtype), **others)


def _parts(tree: Tree, group: Any) -> tuple[Any, Any, npt.NDArray[Any]]:
    """Values and column numbers on disk, and where each row starts."""
    data, indices, indptr = (tree.child(group, name) for name in ("data", "indices", "indptr"))
    for node in (data, indices, indptr):
        _check_numbers(tree, node)
        if node.ndim != 1:
            raise DataError(f"{tree.where(node)}: damaged: it has shape {node.shape}, one dimension is needed")
    return data, indices, indptr[:]


def _stored_columns(tree: Tree, base: str, name: str, opened: Opener) -> Mapping[str, Column]:
    """The columns of a frame. Those of a modality come before those that MuData keeps for all modalities."""
    if tree.find(_at(tree, base), name) is None:
        return {}
    frames = [(base, Frame(tree, _at(tree, base), name))]
    place = f"obsmap/{base.removeprefix('mod/')}"
    if base and name == "obs" and tree.find(tree.root, "obs") is not None and tree.find(tree.root, place) is not None:
        frames.append(("", Frame(tree, tree.root, "obs")))
    home = {column: where for where, frame in reversed(frames) for column in frame.names}
    for _, frame in frames:
        frame.visit_links()

    def read(tree: Tree, column: str) -> Column:
        found = Frame(tree, _at(tree, home[column]), name).column(column)
        if home[column] == base:
            return found
        # For each row of all modalities: its row in this one, from 1, or 0.
        rows = np.ravel(tree.child(tree.root, place)[:]).astype(np.int64)
        order = np.argsort(rows, kind="stable")[np.count_nonzero(rows == 0) :]
        return Column(
            found.values[order], None if found.mask is None else found.mask[order], found.categories, found.ordered
        )

    names = dict.fromkeys(column for _, frame in frames for column in frame.names)
    return StoredColumns(tree.path, list(names), opened, read)


def _obs_of(opened: Opener, modality: str | None) -> Mapping[str, Column]:
    with closing(opened()) as tree:
        if _is_loom(tree):
            return _loom_columns(tree, "col_attrs", _CELLS, opened)
        base = _base(tree, modality)
        if tree.find(_at(tree, base), "obs") is None:
            raise DataError(f"{tree.path}: it has no obs")
        return _stored_columns(tree, base, "obs", opened)


# --- loom

_CELLS = ("CellID", "obs_names", "cell_names", "Barcode")
_GENES = ("Gene", "var_names", "gene_names", "Accession")


def _open_loom(tree: Tree, layer: str | None, opened: Opener) -> Source:
    """Read a loom file: genes x cells, dense, with names and columns among the attributes of rows and columns."""
    group = tree.find(tree.root, "layers")
    layers = {} if group is None else {name: f"layers/{name}" for name in sorted(group)}
    if layer is not None and layer not in layers:
        no_such_layer(tree.path, layer, list(layers))
    node = tree.child(tree.root, "matrix" if layer is None else layers[layer])
    _check_numbers(tree, node)
    if node.ndim != 2:
        raise DataError(f"{tree.where(node)}: the matrix must have 2 dimensions, it has shape {node.shape}")
    names = []
    for side, candidates in (("col_attrs", _CELLS), ("row_attrs", _GENES)):
        found = attributes_frame(tree, tree.child(tree.root, side))
        name = next((name for name in candidates if name in found), None)
        names.append(None if name is None else plain(found[name][:], tree.where(found[name])).astype(str))
    obs = _loom_columns(tree, "col_attrs", _CELLS, opened)
    return DenseDiskSource(
        node, turned=True, obs_names=names[0], var_names=names[1], obs=obs, beside=tree.beside, **_held(tree)
    )


def _loom_columns(tree: Tree, side: str, index: tuple[str, ...], opened: Opener) -> Mapping[str, Column]:
    names = list(attributes_frame(tree, tree.child(tree.root, side)))
    taken = next((name for name in index if name in names), None)

    def read(tree: Tree, name: str) -> Column:
        group = tree.child(tree.root, side)
        return column(tree, group, tree.child(group, name))

    return StoredColumns(tree.path, [name for name in names if name != taken], opened, read)


# --- 10x


def _open_10x(tree: Tree, layer: str | None) -> Source:
    """Read Cell Ranger's matrix: genes x cells in CSC, which has the same arrays as cells x genes in CSR."""
    path = tree.path
    nodes = {name: tree.find(tree.root, name) for name in tree.root}
    groups = [name for name, node in nodes.items() if is_group(node) and {"indptr", "barcodes"} <= set(node)]
    if not groups:
        raise DataError(
            f"{path}: neither an AnnData file (X, layers or raw) nor a 10x file (a group with indptr and barcodes)"
        )
    if "matrix" in groups:
        group = nodes["matrix"]
        ids = _texts(tree, group, "features/id")
        names = _texts(tree, group, "features/name")
        typed = tree.find(group, "features/feature_type") is not None
        kinds = _texts(tree, group, "features/feature_type").tolist() if typed else [GENE_EXPRESSION] * len(ids)
        keep = select_features(path, kinds, layer)
    else:  # version 2: one group per genome
        if layer is None and len(groups) > 1:
            raise DataError(f"{path}: it has {len(groups)} genomes; choose one with layer=NAME: {', '.join(groups)}")
        if layer is not None and layer not in groups:
            no_such_layer(path, layer, groups, "genome")
        group = nodes[groups[0] if layer is None else layer]
        names, keep = _texts(tree, group, "gene_names"), None
    n_genes, n_cells = (int(n) for n in tree.child(group, "shape")[:])
    data, indices, indptr = _parts(tree, group)
    symbols = unique_names(names.tolist())
    check_indptr(indptr, n_cells, data.shape[0], indices.shape[0], tree.where(group))
    if len(symbols) != n_genes:
        raise DataError(f"{path}: damaged: {len(symbols)} feature names for {n_genes} features")
    return CSRDiskSource(
        data,
        indices,
        indptr,
        n_genes,
        keep=keep,
        where=tree.where(group),
        beside=tree.beside,
        obs_names=_texts(tree, group, "barcodes"),
        var_names=symbols if keep is None else symbols[keep],
        **_held(tree),
    )


def _texts(tree: Tree, group: Any, name: str) -> npt.NDArray[np.str_]:
    node = tree.child(group, name)
    return plain(node[:], tree.where(node)).astype(str)


def _is_zarr(path: Path) -> bool:
    return path.suffix.lower() == ".zarr" or any((path / mark).exists() for mark in (".zgroup", "zarr.json"))


_TAKES = ("follow_links", "modality")

FORMATS = (
    Format(".h5ad", open_hdf5, (".h5ad",), layer="layer", read_obs=obs_of_hdf5, takes=_TAKES),
    Format(".zarr", open_zarr, is_folder=_is_zarr, layer="layer", read_obs=obs_of_zarr, takes=_TAKES),
    Format(".zarr.zip", open_zarr, (".zarr.zip",), layer="layer", read_obs=obs_of_zarr, takes=_TAKES),
    Format(".h5mu", open_hdf5, (".h5mu",), layer="layer", read_obs=obs_of_hdf5, takes=_TAKES),
    Format(".loom", open_hdf5, (".loom",), layer="layer", read_obs=obs_of_hdf5, takes=_TAKES),
    Format(
        ".h5",
        open_hdf5,
        (".h5", ".hdf5"),
        contents="10x or AnnData",
        layer="layer, feature type or genome",
        read_obs=obs_of_hdf5,
        takes=_TAKES,
    ),
)
