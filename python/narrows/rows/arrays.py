"""Questions to an array alone: is it sparse, what is its dtype, are values masked."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import DataError

__all__ = ["any_sparse", "check_unmasked", "float_dtype", "is_sparse"]


def is_sparse(X: Any) -> bool:
    """Whether X is CSR, of SciPy or CuPy."""
    return hasattr(X, "indptr")


def any_sparse(X: Any) -> bool:
    """Whether X is sparse in any layout, of SciPy or CuPy."""
    # Duck typing avoids the import of scipy.sparse for dense data.
    return hasattr(X, "tocsr") and hasattr(X, "nnz")


def float_dtype(dtype: npt.DTypeLike) -> np.dtype[Any]:
    """The dtype in which numbers of `dtype` are read: float64 stays float64, everything else becomes float32."""
    given = np.dtype(dtype)
    if given.kind not in "biuf":
        raise DataError(f"numbers expected, got dtype {given}")
    return np.dtype(np.float64 if given.kind == "f" and given.itemsize == 8 else np.float32)


def check_unmasked(X: Any, where: str = "X") -> None:
    """Raise `DataError` for a masked array with masked values, whose hidden numbers would be used otherwise."""
    if isinstance(X, np.ma.MaskedArray) and np.ma.is_masked(X):
        raise DataError(f"{where}: a masked array with masked values; fill them first")
