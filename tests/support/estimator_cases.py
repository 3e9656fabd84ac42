"""One small estimator of each class, and data to fit them on."""

from __future__ import annotations

from typing import Any

import numpy as np

from narrows import (
    RBM,
    Autoencoder,
    ContractiveAutoencoder,
    ConvAutoencoder,
    CountAutoencoder,
    DeepAutoencoder,
    DenoisingAutoencoder,
    LinearAutoencoder,
    SparseAutoencoder,
    VariationalAutoencoder,
)
from narrows.backends import AUTO, probe, resolve

BACKEND = resolve("auto") if any(probe(name).ok for name in AUTO) else "reference"
SMALL: dict[str, Any] = {"max_iter": 5, "backend": BACKEND, "n_threads": 1, "random_state": 0}
ESTIMATORS = [
    Autoencoder(2, hidden_layer_sizes=8, **SMALL),
    LinearAutoencoder(2, precision="float64", **SMALL),
    DenoisingAutoencoder(2, hidden_layer_sizes=8, **SMALL),
    SparseAutoencoder(6, **SMALL),
    ContractiveAutoencoder(3, contractive_hessian=0.1, **SMALL),
    ContractiveAutoencoder(2, hidden_layer_sizes=5, activation="tanh", **SMALL),
    VariationalAutoencoder(2, hidden_layer_sizes=8, **SMALL),
    RBM(3, visible="gaussian", learning_rate_init=1e-3, batch_size=32, **SMALL),
    RBM(3, visible="gaussian", learning_rate_init=1e-3, batch_size=32, persistent=True, **SMALL),
    DeepAutoencoder(2, hidden_layer_sizes=(8, 4), pretrain_max_iter=2, **SMALL),
    DeepAutoencoder(2, hidden_layer_sizes=8, pretrain="greedy", activation="tanh", pretrain_max_iter=2, **SMALL),
    CountAutoencoder(2, hidden_layer_sizes=8, **SMALL),
    CountAutoencoder(2, hidden_layer_sizes=8, likelihood="zinb", link="exp", dispersion="gene-cell", **SMALL),
    ConvAutoencoder(2, image_shape=(-1, 1), filters=4, strides=1, **SMALL),
    ConvAutoencoder(
        2, image_shape=(-1, 1), filters=(3, 2), kernel_size=(5, 2), strides=1, hidden_layer_sizes=6, **SMALL
    ),
    ConvAutoencoder(2, image_shape=(-1, 1), filters=4, strides=1, activation="tanh", contractive=0.1, **SMALL),
]
ids = [f"{type(e).__name__}-{i}" for i, e in enumerate(ESTIMATORS)]


def small(n_components: int = 3, **params: Any) -> Autoencoder:
    return Autoencoder(n_components, **({"hidden_layer_sizes": 8, "batch_size": 32} | SMALL | params))


def fitting(estimator: Any, X: np.ndarray) -> np.ndarray:
    """X, or counts of about its size for an estimator that needs such."""
    return np.round(4 * X - 4 * X.min()) if isinstance(estimator, CountAutoencoder) else X


def same_rows(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether results of rows are equal that were computed among other rows: to the bit where that is promised."""
    if BACKEND in ("cpp", "numba"):
        return bool((one == other).all())
    return bool(np.allclose(one, other, rtol=1e-4, atol=1e-6))


def low_rank() -> np.ndarray:
    """200 rows of 12 numbers that depend on 3."""
    rng = np.random.default_rng(1)
    codes = rng.random((200, 3))
    return (codes @ rng.random((3, 12)) / 3).astype(np.float32)
