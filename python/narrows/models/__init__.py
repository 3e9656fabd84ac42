"""The estimators: parameters, fit, transform; arithmetic is left to programs."""

from __future__ import annotations

import os
from collections.abc import Mapping

from ..fitting.files import read_model
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

ESTIMATORS: Mapping[str, type[BaseAutoencoder]] = {
    cls.__name__: cls
    for cls in (
        Autoencoder,
        LinearAutoencoder,
        DenoisingAutoencoder,
        SparseAutoencoder,
        ContractiveAutoencoder,
        VariationalAutoencoder,
        ConvAutoencoder,
        RBM,
        DeepAutoencoder,
        CountAutoencoder,
    )
}
"""The classes that a model file may name."""


def load(path: str | os.PathLike[str]) -> BaseAutoencoder:
    """Read an estimator that its `save` wrote.

    Parameters
    ----------
    path : path

    Returns
    -------
    estimator
        Fitted, of the class that was saved. Training it further starts the optimiser afresh.

    Raises
    ------
    FileNotFoundError
        No such file.
    ModelFileError
        The file is damaged, foreign, newer, or its parts contradict each other.
    """
    estimator: BaseAutoencoder = read_model(path, ESTIMATORS)
    return estimator
