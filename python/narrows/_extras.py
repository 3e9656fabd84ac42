"""Import of optional dependencies when they are needed, with an error that names the extra to install."""

from __future__ import annotations

import importlib
from types import ModuleType

from .errors import MissingExtraError


def require(module: str, extra: str, purpose: str) -> ModuleType:
    """Import `module`; the error names the extra that installs it.

    Parameters
    ----------
    module : str
        Importable name, e.g. ``"h5py"``.
    extra : str
        The extra of narrows that installs it, e.g. ``"anndata"``.
    purpose : str
        What needs the module, as the start of the message: ``"reading .h5ad files"``.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError(f"{purpose} needs {module}: pip install 'narrows[{extra}]' ({error})") from None
