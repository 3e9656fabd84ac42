"""Sparse rows in the form that plans take."""

from __future__ import annotations

from typing import Any

from .._extras import require
from .devices import on_gpu

__all__ = ["is_sparse", "sparse_rows"]


def is_sparse(X: Any) -> bool:
    """Whether X is CSR, of SciPy or CuPy."""
    return hasattr(X, "indptr")


def sparse_rows(X: Any) -> Any:
    """X as a plan with a sparse input takes it: CSR of increasing columns, itself if it is that."""
    if getattr(X, "format", None) != "csr":
        if on_gpu(X):
            return require("cupyx.scipy.sparse", "cuda12", "sparse rows on a GPU").csr_matrix(X)
        import scipy.sparse as sp

        return sp.csr_array(X)
    if not X.has_canonical_format:
        X = X.copy()
        X.sum_duplicates()
    return X
