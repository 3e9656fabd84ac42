"""narrows: autoencoders as fast as the machine allows, without a deep-learning framework.

Names are imported when first used: ``import narrows`` is quick, and it loads neither scikit-learn nor SciPy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ._extras import load as _load
from ._version import __version__

if TYPE_CHECKING:
    from . import config, data, datasets, errors, functional, layers, plotting, scanpy, training
    from .config import show_config
    from .data.normalize import Normalizer
    from .models import (
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
        load,
    )

__all__ = [
    "RBM",
    "Autoencoder",
    "ContractiveAutoencoder",
    "ConvAutoencoder",
    "CountAutoencoder",
    "DeepAutoencoder",
    "DenoisingAutoencoder",
    "LinearAutoencoder",
    "Normalizer",
    "SparseAutoencoder",
    "VariationalAutoencoder",
    "__version__",
    "config",
    "data",
    "datasets",
    "errors",
    "functional",
    "layers",
    "load",
    "plotting",
    "scanpy",
    "show_config",
    "training",
]

_MODULES = frozenset(["config", "data", "datasets", "errors", "functional", "layers", "plotting", "scanpy", "training"])
_HOME_OF = {"Normalizer": "data.normalize", "show_config": "config"}
"""Where a name comes from that is neither a module nor a name of `models`."""


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        value = _load(f".{name}", __name__)
    elif name in __all__:
        value = getattr(_load(f".{_HOME_OF.get(name, 'models')}", __name__), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
