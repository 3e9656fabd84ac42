"""Reading NumPy's .npy and .npz files, and folders of the parts of a CSR matrix.

- An .npy file is mapped into memory. Of a folder of parts, only the requested rows are read.
- Nothing is unpickled. No array is allocated before its size is checked against the length of the file.
"""

from __future__ import annotations

import math
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DataError
from ..rows.arrays import holds_floats
from ..rows.sparse import canonical_csr, check_indptr
from .formats import Format, in_memory, no_such_layer
from .hdf import CSRDiskSource
from .source import Source

_BESIDE = ("labels", "obs_names", "var_names", "feature_names", "genes")


def open_npy(path: Path, layer: str | None, genes_by_cells: bool) -> Source:
    """Map one array into memory. Images, N x height x width (x channels), become rows."""
    with path.open("rb") as stream:
        shape, _, end = _npy_header(stream, path)
    if end > path.stat().st_size:
        raise DataError(f"{path}: damaged: {path.stat().st_size} bytes; its header says {end}")
    if math.prod(shape) == 0:
        raise DataError(f"{path}: the array is empty (shape {shape})")
    return _table(path, np.load(path, mmap_mode="r", allow_pickle=False), genes_by_cells)


def _table(path: Path, array: Any, genes_by_cells: bool, *names: Any) -> Source:
    """A source over a table, or over images as rows."""
    if array.ndim not in (2, 3, 4):
        way = "; save it as array.reshape(-1, 1) for one column" if array.ndim == 1 else ""
        raise DataError(f"{path}: an array of shape {array.shape}, {array.ndim} dimension(s); a table has 2{way}")
    if array.ndim == 2:
        return in_memory(path, array, genes_by_cells, *names)
    if genes_by_cells:
        raise DataError(f"{path}: images of shape {array.shape[1:]} cannot be transposed; drop genes_by_cells=True")
    source = in_memory(path, array.reshape(len(array), math.prod(array.shape[1:])), False, *names)
    source.image_shape = tuple(array.shape[1:])
    return source


def _npy_header(stream: Any, name: object) -> tuple[tuple[int, ...], np.dtype[Any], int]:
    """Shape and dtype of an npy stream, and its length in bytes according to them."""
    version = np.lib.format.read_magic(stream)
    if version == (1, 0):
        shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
    elif version == (2, 0):
        shape, _, dtype = np.lib.format.read_array_header_2_0(stream)
    else:
        raise DataError(f"{name}: damaged, or of version {version} of the npy format, which is not supported")
    if dtype.hasobject:
        raise DataError(f"{name}: holds Python objects, which could run code; save numbers only")
    return shape, dtype, stream.tell() + math.prod(shape) * dtype.itemsize


class _Vector:
    """A 1-D array in an .npy file. Slices are read on demand."""

    chunks = None

    def __init__(self, path: Path) -> None:
        if not path.exists():
            raise DataError(f"{path}: missing; CSR needs data.npy, indices.npy, indptr.npy and shape.npy")
        with path.open("rb") as stream:
            self.shape, self.dtype, end = _npy_header(stream, path)
            self._start = stream.tell()
        if len(self.shape) != 1:
            raise DataError(f"{path}: a 1-D array is expected, its shape is {self.shape}")
        if end > path.stat().st_size:
            raise DataError(f"{path}: damaged: {path.stat().st_size} bytes; its header says {end}")
        self._path = path

    def __getitem__(self, part: slice) -> np.ndarray:
        start, stop, _ = part.indices(self.shape[0])
        offset = self._start + start * self.dtype.itemsize
        return np.fromfile(self._path, self.dtype, max(0, stop - start), offset=offset)


def open_csr_folder(path: Path, layer: str | None, genes_by_cells: bool) -> Source:
    """Read CSR whose parts are .npy files, named as in `scipy.sparse.save_npz`, beside names and labels."""
    data, indices, indptr, shape = (_Vector(path / f"{name}.npy") for name in ("data", "indices", "indptr", "shape"))
    if shape.shape != (2,):
        raise DataError(f"{path / 'shape.npy'}: two numbers are expected, rows and columns; it holds {shape.shape[0]}")
    n_rows, n_columns = (int(n) for n in shape[:])
    starts = indptr[:]
    check_indptr(starts, n_rows, data.shape[0], indices.shape[0], str(path))
    beside = {name: _Vector(path / f"{name}.npy")[:] for name in _BESIDE if (path / f"{name}.npy").exists()}
    genes = next((beside[name] for name in _BESIDE[2:] if name in beside), None)
    if genes_by_cells:
        matrix = canonical_csr(data[:], indices[:], starts, n_columns, where=str(path))
        return in_memory(
            path, matrix, True, genes, beside.get("obs_names"), beside.get("labels"), holds_floats(data.dtype)
        )
    return CSRDiskSource(
        data,
        indices,
        starts,
        n_columns,
        path=path,
        obs_names=beside.get("obs_names"),
        var_names=genes,
        labels=beside.get("labels"),
        closer=lambda: None,
    )


def open_npz(path: Path, layer: str | None = None, genes_by_cells: bool = False) -> Source:
    """Read one 2-D array or the parts of a sparse matrix, and the names and labels beside it."""
    headers = _npz_headers(path)
    with np.load(path, allow_pickle=False) as file:
        if headers.keys() >= {"data", "indices", "indptr", "shape"} or headers.keys() >= {"format", "shape"}:
            if layer is not None:
                raise DataError(f"{path}: it holds one sparse matrix and no layers; drop layer={layer!r}")
            matrix, key = _npz_sparse(path, file), "data"
        else:
            key = _npz_dense_key(path, headers, layer)
            matrix = file[key]
        beside = {name: file[name] for name in headers if name in _BESIDE}
    genes = next((beside[name] for name in _BESIDE[2:] if name in beside), None)
    rows, columns = beside.get("obs_names"), genes
    if genes_by_cells:
        rows, columns = columns, rows
    return _table(path, matrix, genes_by_cells, rows, columns, beside.get("labels"), holds_floats(headers[key][1]))


def _npz_headers(path: Path) -> dict[str, tuple[tuple[int, ...], np.dtype[Any]]]:
    """Shape and dtype of each array, checked against its size in the archive before anything is allocated."""
    headers = {}
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            with archive.open(info) as stream:
                shape, dtype, end = _npy_header(stream, f"{path}, {info.filename}")
            if end != info.file_size:
                raise DataError(
                    f"{path}: damaged: {info.filename} has {info.file_size} bytes, its shape {shape} needs {end}"
                )
            headers[info.filename.removesuffix(".npy")] = (shape, dtype)
    return headers


def _npz_dense_key(path: Path, headers: dict[str, tuple[tuple[int, ...], np.dtype[Any]]], layer: str | None) -> str:
    numbers = {name: len(shape) for name, (shape, dtype) in headers.items() if dtype.kind in "biuf"}
    tables = [name for name, ndim in numbers.items() if ndim == 2]
    if not tables or layer in numbers.keys() - tables:  # images
        tables += [name for name, ndim in numbers.items() if ndim in (3, 4)]
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
        raise DataError(f"{path}: it holds no 2-D array of numbers, only {found}")
    raise DataError(f"{path}: several tables; choose one with layer=NAME: {', '.join(tables)}")


def _npz_sparse(path: Path, file: Any) -> Any:
    """CSR from the parts that `scipy.sparse.save_npz` writes; without `format` they are CSR."""
    from scipy import sparse

    form = "csr"
    if "format" in file.files:
        value = file["format"].item()
        form = value.decode("ascii") if isinstance(value, bytes) else str(value)
    if form not in ("csr", "csc"):
        return sparse.load_npz(path).tocsr()
    shape = tuple(int(n) for n in file["shape"])
    if len(shape) != 2:
        raise DataError(f"{path}: a sparse matrix must have 2 dimensions, this one has {len(shape)}")
    data, indices, indptr = file["data"], file["indices"], file["indptr"]
    n_major, n_minor = shape if form == "csr" else shape[::-1]
    check_indptr(indptr, n_major, len(data), len(indices), str(path))
    block = canonical_csr(data, indices, indptr, n_minor, where=str(path))
    return block if form == "csr" else block.T.tocsr()


FORMATS = (
    Format(
        "folder of CSR parts",
        open_csr_folder,
        is_folder=lambda path: (path / "indptr.npy").exists(),
        contents="data.npy, indices.npy, indptr.npy, shape.npy",
    ),
    Format(".npy", open_npy, (".npy",)),
    Format(".npz", open_npz, (".npz",), layer="array"),
)
