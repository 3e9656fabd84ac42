"""Sparse rows: what is sparse, the canonical form of CSR, and checks of its parts."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from .._extras import require
from ..errors import DataError
from .arrays import any_sparse, exact_dtype, float_dtype, holds_floats, is_sparse
from .devices import on_gpu

__all__ = [
    "any_sparse",
    "canonical",
    "canonical_csr",
    "check_csr",
    "check_indices",
    "check_indptr",
    "is_sparse",
    "sound_rows",
    "sparse_rows",
]


def canonical(X: Any) -> Any:
    """CSR with sorted, unique indices (a copy if it had others); a dense array is returned as it is."""
    if is_sparse(X) and not X.has_canonical_format:
        X = X.copy()
        X.sum_duplicates()
    return X


def sparse_rows(X: Any) -> Any:
    """X in the form of a plan's sparse input: canonical CSR, without a copy if it is that already."""
    if getattr(X, "format", None) == "csr":
        return canonical(X)
    if on_gpu(X):
        return require("cupyx.scipy.sparse", "cuda12", "sparse rows on a GPU").csr_matrix(X)
    import scipy.sparse as sp

    return sp.csr_array(X)


def sound_rows(X: Any, name: str = "X", dtype: npt.DTypeLike = np.float32) -> Any:
    """An array or CSR as the backends take it, without a copy if X is that already.

    `dtype` is the network's: whole numbers, which have no float type of their own, take it.

    Returns
    -------
    ndarray or CSR, of NumPy and SciPy or of CuPy
        float32 or float64 in native byte order; CSR is canonical.

    Raises
    ------
    DataError
        X holds no numbers, or the parts of a CSR do not fit its shape.
    """
    own = float_dtype(X.dtype)
    dtype = own if holds_floats(X.dtype) else np.dtype(dtype)
    if is_sparse(X) and not on_gpu(X):
        check_csr(X, name)
        if len(X.data) > X.indptr[-1]:
            X = X.copy()
            X.prune()
    if X.dtype != dtype or not X.dtype.isnative:
        X = X.astype(dtype)
    return canonical(X)


def canonical_csr(
    data: npt.NDArray[Any],
    indices: npt.NDArray[Any],
    indptr: npt.NDArray[Any],
    n_columns: int,
    *,
    where: str = "X",
    row_offset: int = 0,
) -> Any:
    """Build a CSR block of floats with sorted, unique indices. It may change `data` and `indices`.

    No value changes: the block is float64 if float32 does not hold every whole number of `data`.

    Parameters
    ----------
    data, indices : ndarray of shape (nnz,)
    indptr : ndarray of shape (n_rows + 1,)
        Starts at 0, never decreases and ends at ``nnz`` (see `check_indptr`).
    where, row_offset : str, int
        Name of the matrix and number of its first row, for messages.

    Returns
    -------
    scipy.sparse.csr_array of shape (n_rows, n_columns)

    Raises
    ------
    DataError
        An index is outside ``0..n_columns - 1``; the message names its row.
    """
    from scipy import sparse

    check_indices(indices, indptr, n_columns, where, row_offset)
    small = max(n_columns, len(indices)) <= np.iinfo(np.int32).max
    index_dtype = np.int32 if small else np.int64
    block = sparse.csr_array(
        (
            data.astype(exact_dtype(data), copy=False),
            indices.astype(index_dtype, copy=False),
            indptr.astype(index_dtype, copy=False),
        ),
        shape=(len(indptr) - 1, n_columns),
    )
    if not block.has_canonical_format:
        block.sum_duplicates()
    return block


def check_indptr(indptr: npt.NDArray[Any], n_rows: int, n_data: int, n_indices: int, where: str) -> None:
    """Raise `DataError` unless `indptr` describes `n_rows` rows over the stored values."""
    if indptr.ndim != 1 or indptr.dtype.kind not in "iu":
        raise DataError(f"{where}: indptr must be a 1-D array of integers, not {indptr.ndim}-D {indptr.dtype}")
    if len(indptr) != n_rows + 1:
        raise DataError(f"{where}: indptr has {len(indptr)} entries; {n_rows} rows need {n_rows + 1}")
    if n_data != n_indices:
        raise DataError(f"{where}: {n_data} values but {n_indices} column indices")
    falls = np.flatnonzero(indptr[1:] < indptr[:-1])
    if len(falls):
        raise DataError(f"{where}: indptr decreases at row {falls[0]}")
    if int(indptr[0]) != 0 or int(indptr[-1]) != n_data:
        raise DataError(f"{where}: indptr runs from {indptr[0]} to {indptr[-1]}, but {n_data} values are stored")


def check_indices(
    indices: npt.NDArray[Any], indptr: npt.NDArray[Any], n_columns: int, where: str, row_offset: int = 0
) -> None:
    """Raise `DataError` for the first column index outside the matrix; `indptr` must be valid."""
    if indices.dtype.kind not in "iu":
        raise DataError(f"{where}: column indices must be integers, they are {indices.dtype}")
    if len(indices) and (int(indices.min()) < 0 or int(indices.max()) >= n_columns):
        at = int(np.flatnonzero((indices < 0) | (indices >= n_columns))[0])
        row = int(np.searchsorted(indptr, at, side="right")) - 1 + row_offset
        raise DataError(f"{where}: row {row} has column index {indices[at]}, outside 0..{n_columns - 1}")


def check_csr(X: Any, where: str = "X") -> None:
    """Raise `DataError` unless the parts of a SciPy CSR fit its shape.

    SciPy's own routines trust these parts and would read out of bounds. Unused room behind the values, which `prune`
    removes, is allowed.
    """
    used = min(int(X.indptr[-1]), len(X.data), len(X.indices))
    check_indptr(X.indptr, X.shape[0], used, used, where)
    check_indices(X.indices[:used], X.indptr, X.shape[1], where)
