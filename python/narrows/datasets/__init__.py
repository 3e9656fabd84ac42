"""Small data sets for experiments, without a download.

`load_pbmc4k` (counts of single cells) and `load_digits` (images) return arrays, `open` returns a `Source`. The command
line and `narrows.data.open` accept the names in `NAMES`. README.md in this folder gives origins and licences.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np
import numpy.typing as npt

from ..data.bundled import NAMES, name_of, open, path

if TYPE_CHECKING:
    from scipy.sparse import csr_array

__all__ = ["NAMES", "load_digits", "load_pbmc4k", "name_of", "open", "path"]


@overload
def load_pbmc4k(return_labels: Literal[False] = False) -> csr_array: ...
@overload
def load_pbmc4k(return_labels: Literal[True]) -> tuple[csr_array, npt.NDArray[np.uint8]]: ...
def load_pbmc4k(return_labels: bool = False) -> Any:
    """Raw UMI counts of peripheral blood mononuclear cells (10x Genomics, PBMC 4k from a healthy donor).

    Parameters
    ----------
    return_labels : bool
        Also return the cell groups.

    Returns
    -------
    X : scipy.sparse.csr_array of shape (4271, 2000), float32
        Cells x the most variable genes. 10.2 % of the values are not zero; the largest is 777.
    labels : ndarray of shape (4271,), uint8, only if `return_labels`
        Cell groups 1 to 8.

    Examples
    --------
    >>> from narrows.datasets import load_pbmc4k
    >>> counts, kinds = load_pbmc4k(return_labels=True)
    >>> counts.shape, len(kinds)
    ((4271, 2000), 4271)
    """
    return _load("pbmc4k", return_labels)


@overload
def load_digits(return_labels: Literal[False] = False) -> npt.NDArray[np.float32]: ...
@overload
def load_digits(return_labels: Literal[True]) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]: ...
def load_digits(return_labels: bool = False) -> Any:
    """Handwritten digits, 8 x 8 pixels (scikit-learn's copy of the UCI set).

    Parameters
    ----------
    return_labels : bool
        Also return the digits.

    Returns
    -------
    X : ndarray of shape (1797, 64), float32
        Pixels row by row, with values 0 to 16.
    labels : ndarray of shape (1797,), int64, only if `return_labels`
        0 to 9.

    Examples
    --------
    >>> from narrows.datasets import load_digits
    >>> load_digits().shape
    (1797, 64)
    """
    return _load("digits", return_labels)


def _load(name: str, return_labels: bool) -> Any:
    with open(name) as source:
        X = source.read_rows(slice(None))
        return (X, source.labels) if return_labels else X
