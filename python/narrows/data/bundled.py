"""The data sets that come with narrows: their files, and how they are opened."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import numpy as np

from .npy import open_npz
from .source import ArraySource, Source

__all__ = ["NAMES", "name_of", "open", "path"]

NAMES = ("pbmc4k", "digits")


def path(name: str) -> Path:
    """The file of a bundled data set.

    Parameters
    ----------
    name : str
        One of `NAMES`. ``"digits"`` is a file of scikit-learn whose last column is the label; `narrows.data.open` reads
        that column as `labels`.

    Raises
    ------
    ValueError
        There is no such data set.

    Examples
    --------
    >>> from narrows import datasets
    >>> datasets.path("pbmc4k").name
    'pbmc4k.npz'
    """
    if name == "pbmc4k":
        return Path(__file__).parents[1] / "datasets" / "pbmc4k.npz"
    if name == "digits":
        spec = importlib.util.find_spec("sklearn")  # finds the folder without importing the package
        assert spec is not None
        assert spec.origin is not None
        return Path(spec.origin).parent / "datasets" / "data" / "digits.csv.gz"
    raise ValueError(f"no bundled data set {name!r}; there is {', '.join(NAMES)}")


def name_of(file: str | os.PathLike[str]) -> str | None:
    """The name of the bundled data set whose `path` is `file`; None for any other file.

    Examples
    --------
    >>> from narrows.datasets import name_of, path
    >>> name_of(path("pbmc4k")), name_of("my.csv")
    ('pbmc4k', None)
    """
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
        With `labels`; the digits have `var_names` too.

    Examples
    --------
    >>> from narrows import datasets
    >>> with datasets.open("pbmc4k") as source:
    ...     source.shape
    (4271, 2000)
    """
    file = path(name)
    if name != "digits":
        return open_npz(file)
    from sklearn.datasets import load_digits

    X, labels = load_digits(return_X_y=True)
    names = [f"pixel_{i // 8}_{i % 8}" for i in range(64)]
    return ArraySource(X.astype(np.float32), labels=labels.astype(np.int64), path=file, var_names=names)
