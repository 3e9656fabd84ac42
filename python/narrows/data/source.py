"""A data set as rows of numbers that can be read block by block.

- `read_rows` returns cells x genes blocks in float32 or float64, dense or canonical CSR, for every format.
- Reading changes no number: a block is float64 if float32 would lose digits of whole numbers or of text.
- A sparse matrix is never densified.
- The caller's array is never changed, and is copied only if its dtype requires it.
"""

from __future__ import annotations

import hashlib
import math
import mmap
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from ..errors import DataError
from ..rows import arrays
from ..rows.arrays import check_numbers, check_unmasked, exact, float_dtype, placing
from ..rows.devices import host_array, on_gpu
from ..rows.shifted import Shifted
from ..rows.sparse import any_sparse, canonical_csr, check_indices, check_indptr
from .textfile import decoded

__all__ = ["ArraySource", "Source", "with_names"]

_HASH_BLOCK = 1 << 20
_SPAN_LIMIT = 32 << 20  # bytes that one read of scattered rows may span in a file


class Source(ABC):
    """Rows of a data set, read on demand.

    Attributes
    ----------
    shape : tuple of (int, int)
        Rows (samples, cells) and columns (features, genes).
    dtype : numpy.dtype
        float64 if the data are float64, else float32: the dtype of results. Blocks have it too, but a block of whole
        numbers or of text is float64 if float32 would change a value.
    stored_dtype : numpy.dtype
        The dtype of the numbers in the file or the array.
    holds_floats : bool
        Whether the data are stored as float32 or float64, and not as whole numbers or text.
    is_sparse : bool
        Whether `read_rows` returns CSR arrays.
    nnz : int or None
        Number of stored values of a sparse source.
    n_stored : int or None
        Number of stored values of what `read_stored` returns; None if that is dense.
    shift : ndarray of float64, shape (n_columns,), or None
        Vector to subtract from the rows that `read_stored` returns, if any.
    obs_names, var_names : ndarray of str, or None
        Names of the rows and of the columns.
    labels : ndarray of shape (n_rows,), or None
        Known classes of the rows, if the file holds them.
    obs : mapping of str to ndarray or Column
        What is known of the rows, by name. Columns may be read from the file when they are looked up.
    path : pathlib.Path or None
        The file or folder read.
    beside : list of pathlib.Path
        Other files read, which links in `path` led to.
    roles : mapping or None
        Which columns of a table became row names, text and features; `narrows.data.open` applies it to another table.
    image_shape : tuple of int or None
        Height, width and perhaps channels of the images that the rows are.

    Examples
    --------
    >>> import numpy as np
    >>> import narrows
    >>> np.save("rows.npy", np.ones((10, 4), np.float32))
    >>> with narrows.data.open("rows.npy") as source:
    ...     [(start, len(block)) for start, block in source.blocks(4)]
    [(0, 4), (4, 4), (8, 2)]
    """

    roles: Mapping[str, Any] | None = None
    image_shape: tuple[int, ...] | None = None

    def __init__(
        self,
        shape: tuple[int, int],
        dtype: npt.DTypeLike,
        *,
        nnz: int | None = None,
        obs_names: npt.ArrayLike | None = None,
        var_names: npt.ArrayLike | None = None,
        labels: npt.ArrayLike | None = None,
        obs: Mapping[str, Any] | None = None,
        path: Path | None = None,
        beside: list[Path] | None = None,
        name: str = "X",
        holds_floats: bool | None = None,
    ) -> None:
        self.path, self.beside = path, [] if beside is None else beside
        self.obs: Mapping[str, Any] = {} if obs is None else obs
        self.name = str(path) if path is not None else name
        self.shape = (int(shape[0]), int(shape[1]))
        if min(self.shape) < 1:
            raise DataError(f"{self.name}: the data are empty ({self.shape[0]} rows, {self.shape[1]} columns)")
        self.stored_dtype = np.dtype(dtype)
        self.holds_floats = arrays.holds_floats(dtype) if holds_floats is None else holds_floats
        given = float_dtype(dtype)  # raises for what is not a number
        self.dtype = given if self.holds_floats else np.dtype(np.float32)
        self.nnz = self.n_stored = nnz
        self.shift: npt.NDArray[np.float64] | None = None
        self.obs_names = self._per("obs_names", obs_names, 0)
        self.var_names = self._per("var_names", var_names, 1)
        self.labels = self._per("labels", labels, 0)
        self._digest: str | None = None
        self._closed = False

    def _per(self, what: str, values: npt.ArrayLike | None, axis: int) -> npt.NDArray[Any] | None:
        if values is None:
            return None
        array = decoded(values, f"{self.name}: {what}")
        if array.dtype.kind != "U" and (what != "labels" or array.dtype.kind in "OT"):
            array = np.asarray([str(value) for value in array.tolist()])
        if array.shape != (self.shape[axis],):
            side = ("rows", "columns")[axis]
            raise DataError(f"{self.name}: {what} has shape {array.shape} for {self.shape[axis]} {side}")
        return array

    @property
    def is_sparse(self) -> bool:
        return self.nnz is not None

    def read_rows(self, rows: slice | npt.ArrayLike) -> Any:
        """Read some rows.

        Parameters
        ----------
        rows : slice, or array of int or bool
            Row numbers from 0, in any order and possibly repeated; or one bool per row.

        Returns
        -------
        ndarray or scipy.sparse.csr_array of shape (n_selected, n_columns)
            float32 or float64, see `dtype`; CSR has sorted, unique indices. Data in memory may be a view: do not
            change it.

        Raises
        ------
        IndexError
            A row does not exist.
        DataError
            The file is damaged; the message names it.
        """
        if self._closed:
            raise ValueError(f"{self.name}: this source is closed")
        n_rows = self.shape[0]
        if isinstance(rows, slice):
            start, stop, step = rows.indices(n_rows)
            if step == 1:
                return self._slice(start, max(start, stop))
            index: npt.NDArray[Any] = np.arange(start, stop, step)
        else:
            index = np.asarray(rows)
            if index.dtype == bool:
                if index.shape != (n_rows,):
                    raise IndexError(f"a mask of shape {index.shape} does not select among {n_rows} rows")
                index = np.flatnonzero(index)
            elif index.size == 0:
                index = index.reshape(-1).astype(np.int64)
            if index.ndim != 1 or index.dtype.kind not in "iu":
                raise IndexError(f"rows must be a slice or a 1-D array of integers, not {index.ndim}-D {index.dtype}")
            outside = (index < 0) | (index >= n_rows)
            if outside.any():
                raise IndexError(f"row {index[outside][0]} is outside 0..{n_rows - 1} of {self.name}")
        return self._take(index.astype(np.int64, copy=False))

    def read_stored(self, rows: slice | npt.ArrayLike) -> Any:
        """Read some rows in the form that needs the least memory.

        Returns
        -------
        ndarray or scipy.sparse.csr_array, or `Shifted` rows of a CSR, of shape (n_selected, n_columns)
            `Shifted` if the source has a `shift`; otherwise what `read_rows` returns.
        """
        return self.read_rows(rows)

    @abstractmethod
    def _slice(self, start: int, stop: int) -> Any:
        """Rows ``start:stop``, ``0 <= start <= stop <= n_rows``, in the form that `read_rows` promises."""

    def _take(self, index: npt.NDArray[np.int64]) -> Any:
        """Scattered rows. Reads are contiguous and skip only gaps that are worth skipping."""
        if len(index) == 0:
            return self._slice(0, 0)
        unique, inverse = np.unique(index, return_inverse=True)
        first, last, grain = self._extent(unique)
        limit = max(1, _SPAN_LIMIT // max(1, self._unit_bytes()))
        cuts = np.flatnonzero((first[1:] - last[:-1] > grain) | (first[1:] // limit != first[:-1] // limit)) + 1
        parts = []
        for wanted in np.split(unique, cuts):
            block = self._slice(int(wanted[0]), int(wanted[-1]) + 1)
            parts.append(block if len(wanted) == block.shape[0] else block[wanted - wanted[0]])
        if len(parts) == 1:
            block = parts[0]
        elif self.is_sparse:
            from scipy import sparse

            block = sparse.vstack(parts, format="csr")
        else:
            block = np.concatenate(parts)
        return block if len(unique) == len(index) and np.all(unique == index) else block[inverse]

    def _extent(self, rows: npt.NDArray[np.int64]) -> tuple[npt.NDArray[Any], npt.NDArray[Any], int]:
        """Start and end of each row in the file, and the largest gap that is cheaper to read than to skip."""
        return rows, rows + 1, 0

    def _unit_bytes(self) -> int:
        """Bytes per unit of `_extent`."""
        return self.shape[1] * self.dtype.itemsize

    def blocks(self, n_rows: int) -> Iterator[tuple[int, Any]]:
        """Iterate over ``(first_row, block)``, `n_rows` rows at a time, in order."""
        if n_rows < 1:
            raise ValueError(f"n_rows must be at least 1, got {n_rows}")
        for start in range(0, self.shape[0], n_rows):
            yield start, self.read_rows(slice(start, start + n_rows))

    def sha256(self) -> str:
        """Hex SHA-256 of the content, computed once.

        For a file: its bytes. For a folder: the relative names and the bytes of its files. Files that links lead to
        count too. For data in memory: the shape, dtype and values.
        """
        if self._digest is None:
            self._digest = self._hash_rows() if self.path is None else _hash_path(self.path, self.beside)
        return self._digest

    def _hash_rows(self) -> str:
        digest = hashlib.sha256(f"{self.shape} {self.dtype.name} {self.is_sparse}".encode())
        for _, block in self.blocks(max(1, _HASH_BLOCK // self.shape[1])):
            if self.is_sparse:
                digest.update(np.diff(block.indptr).astype("<i8").data)
                digest.update(block.indices.astype("<i8").data)
                block = block.data
            digest.update(np.ascontiguousarray(block, dtype=block.dtype.newbyteorder("<")).reshape(-1).data)
        return digest.hexdigest()

    def release(self) -> None:  # noqa: B027
        """Free what earlier reads keep in memory, such as the pages of a memory-mapped file."""

    def close(self) -> None:
        """Close the file; reading afterwards is a ``ValueError``. Closing twice is allowed."""
        self._closed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __len__(self) -> int:
        return self.shape[0]

    def __repr__(self) -> str:
        layout = "dense"
        if self.nnz is not None:
            layout = f"CSR, {100 * self.nnz / math.prod(self.shape):.3g} % stored"
        state = ", closed" if self._closed else ""
        name = self.path.name if self.path is not None else self.name
        rows, columns = self.shape
        return f"<{type(self).__name__} {name}: {rows} x {columns} {self.dtype}, {layout}{state}>"


def with_names(block: Any, source: Source) -> Any:
    """A block of `source` with its feature names, which estimators compare with their own. Shifted rows need none."""
    return block if isinstance(block, Shifted) else ArraySource(block, var_names=source.var_names, name=source.name)


class ArraySource(Source):
    """A `Source` over an array in memory or mapped into it.

    Parameters
    ----------
    X : array_like, memory map, SciPy sparse matrix or array, pandas or polars frame, or AnnData
        Two-dimensional numbers. CSR is used without a copy; other sparse layouts are converted to CSR once. A frame
        gives its column names, and its index unless that is a plain range.
    obs_names, var_names, labels, obs : array_like, and mapping of str to array_like; optional
        See `Source`; the names replace those found in a frame.
    path, beside : path and list of path, optional
        The files of `X`; `sha256` is then their digest.
    name : str
        The name of `X` in messages, if there is no path.
    holds_floats : bool, optional
        Whether the data hold floats, as the attribute of `Source`; by default what the dtype of `X` says.

    Attributes
    ----------
    array : ndarray or scipy.sparse.csr_array
        The data without a copy, in its own dtype. CSR may be unsorted or have duplicates here; `read_rows` returns it
        in canonical form.

    Raises
    ------
    DataError
        `X` is not two-dimensional, is empty or is not numeric.

    Examples
    --------
    >>> import numpy as np
    >>> from narrows.data import ArraySource
    >>> source = ArraySource(np.eye(3), var_names=["a", "b", "c"])
    >>> source.shape, source.read_rows(slice(0, 1)).tolist()
    ((3, 3), [[1.0, 0.0, 0.0]])
    """

    array: Any

    def __init__(
        self,
        X: Any,
        *,
        obs_names: npt.ArrayLike | None = None,
        var_names: npt.ArrayLike | None = None,
        labels: npt.ArrayLike | None = None,
        obs: Mapping[str, Any] | None = None,
        path: Path | None = None,
        beside: list[Path] | None = None,
        name: str = "X",
        holds_floats: bool | None = None,
    ) -> None:
        name = str(path) if path is not None else name
        array, found_obs, found_var = _plain_array(X, name)
        if array.ndim != 2:
            raise DataError(f"{name}: rows and columns are needed, got shape {array.shape}, {array.ndim} dimension(s)")
        if array.dtype.kind not in "biuf":
            raise DataError(f"{name}: numbers expected, got dtype {array.dtype}")
        nnz = None
        if any_sparse(array):
            from scipy import sparse

            if array.format != "csr":
                array = array.tocsr()
            nnz = len(array.indices)
            check_indptr(array.indptr, array.shape[0], len(array.data), nnz, name)
            data = array.data
            if not data.dtype.isnative or data.dtype == np.float16:  # SciPy's routines accept neither
                data = data.astype(data.dtype.newbyteorder("=") if data.dtype != np.float16 else np.float32)
            # A new object on the same buffers: nothing below can change the caller's object.
            array = sparse.csr_array((data, array.indices, array.indptr), shape=array.shape, copy=False)
            check_indices(array.indices, array.indptr, array.shape[1], name)
        self.array = array
        super().__init__(
            array.shape,
            array.dtype,
            nnz=nnz,
            obs_names=found_obs if obs_names is None else obs_names,
            var_names=found_var if var_names is None else var_names,
            labels=labels,
            obs=obs,
            path=path,
            beside=beside,
            name=name,
            holds_floats=holds_floats,
        )

    def _slice(self, start: int, stop: int) -> Any:
        X = self.array
        if not self.is_sparse:
            return exact(X[start:stop])
        if start == 0 and stop == self.shape[0] and X.dtype in (np.float32, np.float64) and X.has_canonical_format:
            return X
        first, last = int(X.indptr[start]), int(X.indptr[stop])
        data, indices = X.data[first:last], X.indices[first:last]
        if not X.has_canonical_format:
            data, indices = data.copy(), indices.copy()  # canonical_csr sorts in place
        indptr = X.indptr[start : stop + 1] - X.indptr[start]
        return canonical_csr(data, indices, indptr, self.shape[1], where=self.name, row_offset=start)

    def _take(self, index: npt.NDArray[np.int64]) -> Any:
        if not self.is_sparse:
            return exact(np.asarray(self.array)[index])
        block = self.array[index]
        return canonical_csr(block.data, block.indices, block.indptr, self.shape[1], where=self.name)

    def release(self) -> None:
        pages = getattr(self.array, "_mmap", None)
        if pages is not None and hasattr(mmap, "MADV_DONTNEED"):
            pages.madvise(mmap.MADV_DONTNEED)  # the pages stay in the system's cache

    def close(self) -> None:
        """Drop the array. This unmaps a memory-mapped file that nothing else uses."""
        super().close()
        self.array = None


def _plain_array(X: Any, name: str) -> tuple[Any, Any, Any]:
    """`X` as an ndarray or SciPy sparse object, and its row and column names."""
    obs_names = var_names = None
    if hasattr(X, "obs_names") and hasattr(X, "var_names") and hasattr(X, "X"):  # AnnData
        if getattr(X, "isbacked", False):
            raise DataError(f"{name}: this AnnData is backed by a file: use narrows.data.open({str(X.filename)!r})")
        if X.X is None:
            raise DataError(f"{name}: this AnnData has no X; pass one of its layers")
        obs_names, var_names, X = np.asarray(X.obs_names), np.asarray(X.var_names), X.X
    elif hasattr(X, "columns") and hasattr(X, "to_numpy"):  # pandas, polars
        var_names = np.asarray([str(column) for column in X.columns])
        index = getattr(X, "index", None)
        if index is not None and type(index).__name__ != "RangeIndex":
            obs_names = np.asarray([str(label) for label in index])
        pandas_sparse = index is not None and all(hasattr(dtype, "fill_value") for dtype in X.dtypes)
        check_numbers(X, name)
        frame, X = X, X.sparse.to_coo() if pandas_sparse and len(X.columns) else X.to_numpy()
        if X.dtype == object and index is not None:
            X = _converted(frame, lambda: frame.to_numpy(np.float64, na_value=np.nan), name)
    if on_gpu(X):
        raise DataError(f"{name}: the data are on a GPU; pass cupy.asnumpy({name})")
    if any_sparse(X):
        return X, obs_names, var_names
    check_unmasked(X, name)
    X = host_array(X, name)
    array = _converted(X, lambda: np.asanyarray(X), name)
    if array.dtype.kind == "O":
        array = _converted(array, lambda: array.astype(np.float64), name)
    return array, obs_names, var_names


def _converted(X: Any, convert: Callable[[], Any], name: str) -> Any:
    """What `convert` makes of X; a `DataError` names the first object that is no number."""
    try:
        with placing(X, name):
            return convert()
    except (TypeError, ValueError) as error:
        raise DataError(f"{name}: not a table of numbers ({str(error).removeprefix(f'{name}: ')})") from error


def files_of(folder: Path, *, follow: bool) -> list[tuple[str, Path]]:
    """The files below a folder with their relative names, sorted; symbolic links to folders are listed like files.

    With `follow`, links to folders outside of `folder` are entered instead, each folder once.
    """
    root, entered = folder.resolve(), set[Path]()
    found: list[tuple[str, Path]] = []

    def visit(at: Path, names: tuple[str, ...]) -> None:
        with os.scandir(at) as entries:
            for entry in entries:
                path, link = Path(entry.path), entry.is_symlink()
                below = (*names, entry.name)
                if entry.is_dir():
                    target = path.resolve() if link else path
                    if link and (not follow or target.is_relative_to(root) or target in entered):
                        found.append(("/".join(below), path))
                        continue
                    if link:
                        entered.add(target)
                    visit(path, below)
                elif link or entry.is_file():
                    found.append(("/".join(below), path))

    visit(folder, ())
    return sorted(found, key=lambda item: item[0].split("/"))


def size_of(path: Path) -> int:
    """Bytes of a file, or of the files below a folder."""
    return sum(p.stat().st_size for p in path.rglob("*") if p.is_file()) if path.is_dir() else path.stat().st_size


def _hash_path(path: Path, beside: Iterable[Path] = ()) -> str:
    digest = hashlib.sha256()
    if not path.is_dir():
        _hash_file(digest, path)
    else:
        for name, file in files_of(path, follow=True):
            if file.is_file():
                digest.update(f"{name}\0{file.stat().st_size}\0".encode())
                _hash_file(digest, file)
            else:  # to a folder whose files are hashed by another name, or to nothing
                digest.update(f"{name}\0{os.path.relpath(os.path.realpath(file), os.path.realpath(path))}\0".encode())
    for file in beside:
        digest.update(f"\0{file.stat().st_size}\0".encode())
        _hash_file(digest, file)
    return digest.hexdigest()


def _hash_file(digest: Any, path: Path) -> None:
    with path.open("rb") as stream:
        while chunk := stream.read(_HASH_BLOCK):
            digest.update(chunk)
