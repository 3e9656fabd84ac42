"""Small data sets to try things on, without a download.

`load_pbmc4k` (counts of single cells) and `load_digits` (images) give arrays; `open` gives a `Source`; the
command line and `narrows.data.open` accept their bare names. Origins and licences: README.md beside this.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from scipy.sparse import csr_array

    from ..data.source import Source

__all__ = ["NAMES", "load_digits", "load_pbmc4k", "name_of", "open", "path"]

NAMES = ("pbmc4k", "digits")


@overload
def load_pbmc4k(return_labels: Literal[False] = False) -> csr_array: ...
@overload
def load_pbmc4k(return_labels: Literal[True]) -> tuple[csr_array, npt.NDArray[np.uint8]]: ...
def load_pbmc4k(return_labels: bool = False) -> Any:
    """Raw UMI counts of peripheral blood mononuclear cells (10x Genomics, PBMC 4k from a healthy donor).

    Parameters
    ----------
    return_labels : bool
        Return the cell groups too.

    Returns
    -------
    X : scipy.sparse.csr_array of shape (4271, 2000), float32
        Cells x the most variable genes, 10.2 % nonzero, at most 777.
    labels : ndarray of shape (4271,), uint8, only if `return_labels`
        Cell groups 1 to 8.
    """
    with open("pbmc4k") as source:
        X = source.read_rows(slice(None))
        return (X, source.labels) if return_labels else X


@overload
def load_digits(return_labels: Literal[False] = False) -> npt.NDArray[np.float32]: ...
@overload
def load_digits(return_labels: Literal[True]) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]: ...
def load_digits(return_labels: bool = False) -> Any:
    """Handwritten digits, 8 x 8 pixels (scikit-learn's copy of the UCI set).

    Parameters
    ----------
    return_labels : bool
        Return the digits' values too.

    Returns
    -------
    X : ndarray of shape (1797, 64), float32
        Pixels by rows, 0 to 16.
    labels : ndarray of shape (1797,), int64, only if `return_labels`
        0 to 9.
    """
    from sklearn.datasets import load_digits as load

    X, labels = load(return_X_y=True)
    X = X.astype(np.float32)
    return (X, labels.astype(np.int64)) if return_labels else X


def path(name: str) -> Path:
    """The file that holds a bundled data set.

    Parameters
    ----------
    name : str
        One of `NAMES`. ``"digits"`` lies in scikit-learn; its last column is the label, which
        `narrows.data.open` knows and takes off.

    Raises
    ------
    ValueError
        If there is no such data set.
    """
    if name == "pbmc4k":
        return Path(__file__).with_name("pbmc4k.npz")
    if name == "digits":
        spec = importlib.util.find_spec("sklearn")  # found without importing it
        assert spec is not None
        assert spec.origin is not None
        return Path(spec.origin).parent / "datasets" / "data" / "digits.csv.gz"
    raise ValueError(f"no bundled data set {name!r}; there is {', '.join(NAMES)}")


def name_of(file: str | os.PathLike[str]) -> str | None:
    """The bundled data set whose `path` is `file`, if any."""
    base = os.path.basename(file)
    return next((n for n in NAMES if path(n).name == base and os.path.samefile(path(n), file)), None)


def open(name: str) -> Source:
    """Open a bundled data set.

    Parameters
    ----------
    name : str
        One of `NAMES`.

    Returns
    -------
    Source
        With `labels`, and for the digits `var_names`.
    """
    from ..data.source import ArraySource

    file = path(name)
    if name == "digits":
        X, labels = load_digits(return_labels=True)
        return ArraySource(X, labels=labels, path=file, var_names=[f"pixel_{i // 8}_{i % 8}" for i in range(64)])
    from ..data.npy import open_npz

    return open_npz(file)
