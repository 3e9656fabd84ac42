"""The estimators: parameters, fit, transform; programs do the arithmetic.

`REGISTRY` lists every estimator once. Classes are imported when they are first used, so that the command line can name
them without loading scikit-learn.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from .._extras import importing as _importing
from .._extras import load as _load

if TYPE_CHECKING:
    from .autoencoder import (
        Autoencoder,
        ContractiveAutoencoder,
        DenoisingAutoencoder,
        LinearAutoencoder,
        SparseAutoencoder,
    )
    from .base import BaseAutoencoder
    from .convolutional import ConvAutoencoder
    from .counts import CountAutoencoder
    from .deep import DeepAutoencoder
    from .rbm import RBM
    from .variational import VariationalAutoencoder

__all__ = [
    "ESTIMATORS",
    "RBM",
    "REGISTRY",
    "Autoencoder",
    "BaseAutoencoder",
    "ContractiveAutoencoder",
    "ConvAutoencoder",
    "CountAutoencoder",
    "DeepAutoencoder",
    "DenoisingAutoencoder",
    "LinearAutoencoder",
    "SparseAutoencoder",
    "VariationalAutoencoder",
    "load",
]


class Entry(NamedTuple):
    """Where an estimator's class is."""

    cls: str
    module: str


REGISTRY: Mapping[str, Entry] = {
    "autoencoder": Entry("Autoencoder", "autoencoder"),
    "linear": Entry("LinearAutoencoder", "autoencoder"),
    "denoising": Entry("DenoisingAutoencoder", "autoencoder"),
    "sparse": Entry("SparseAutoencoder", "autoencoder"),
    "contractive": Entry("ContractiveAutoencoder", "autoencoder"),
    "variational": Entry("VariationalAutoencoder", "variational"),
    "conv": Entry("ConvAutoencoder", "convolutional"),
    "deep": Entry("DeepAutoencoder", "deep"),
    "rbm": Entry("RBM", "rbm"),
    "count": Entry("CountAutoencoder", "counts"),
}
"""Every estimator by its short name, which the command line and `narrows.scanpy` use. Model files hold the class name.
"""

_HOME_OF = {entry.cls: entry.module for entry in REGISTRY.values()} | {"BaseAutoencoder": "base"}

if TYPE_CHECKING:
    ESTIMATORS: Mapping[str, type[BaseAutoencoder]]
    """Every estimator's class by its own name."""


def __getattr__(name: str) -> Any:
    if name == "ESTIMATORS":
        value: Any = {entry.cls: estimator_class(short) for short, entry in REGISTRY.items()}
    elif name in _HOME_OF:
        value = getattr(_load(f".{_HOME_OF[name]}", __name__), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def estimator_class(short_name: str) -> type[BaseAutoencoder]:
    """The class of an estimator in `REGISTRY`."""
    entry = REGISTRY[short_name]
    cls: type[BaseAutoencoder] = getattr(_load(f".{entry.module}", __name__), entry.cls)
    return cls


def load(path: str | os.PathLike[str]) -> BaseAutoencoder:
    """Read an estimator that its `save` wrote.

    Parameters
    ----------
    path : path

    Returns
    -------
    estimator
        Fitted, of the class that was saved. If it is trained further, its optimiser starts afresh.

    Raises
    ------
    FileNotFoundError
        There is no such file.
    ModelFileError
        The file is damaged, was not written by narrows, is of a newer format, or its parts contradict each other.

    Examples
    --------
    >>> import numpy as np
    >>> X = np.random.default_rng(0).random((60, 8), dtype=np.float32)
    >>> import narrows
    >>> ae = narrows.Autoencoder(2, max_iter=2, random_state=0).fit(X)
    >>> ae.save("model.safetensors")
    >>> bool((narrows.load("model.safetensors").transform(X) == ae.transform(X)).all())
    True
    """
    with _importing:
        from ..fitting.files import read_model
    classes = {entry.cls: estimator_class(short) for short, entry in REGISTRY.items()}
    return read_model(path, classes)
