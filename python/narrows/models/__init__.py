"""The estimators: parameters, fit, transform; arithmetic is left to programs."""

from __future__ import annotations

from collections.abc import Mapping

from .autoencoder import Autoencoder, DenoisingAutoencoder, LinearAutoencoder, SparseAutoencoder
from .base import BaseAutoencoder
from .files import load

__all__ = [
    "ESTIMATORS",
    "Autoencoder",
    "BaseAutoencoder",
    "DenoisingAutoencoder",
    "LinearAutoencoder",
    "SparseAutoencoder",
    "load",
]

ESTIMATORS: Mapping[str, type[BaseAutoencoder]] = {
    cls.__name__: cls for cls in (Autoencoder, LinearAutoencoder, DenoisingAutoencoder, SparseAutoencoder)
}
"""The classes that a model file may name."""
