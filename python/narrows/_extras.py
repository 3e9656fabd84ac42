"""Imports when something is needed: optional dependencies, with an error that names the extra, and parts of narrows.

A fork waits until such an import in another thread has ended. Otherwise the child would wait forever for the lock of a
module, because the thread that holds it does not exist in the child.
"""

from __future__ import annotations

import importlib
import os
import sys
import threading
from types import ModuleType

from .errors import MissingExtraError

__all__ = ["importing", "load", "require"]

importing = threading.RLock()
"""Held during imports at first use, and during forks."""

_LONGEST = 60.0  # seconds that a fork waits for the imports of another thread
_held: list[bool] = []


def _before_fork() -> None:
    _held.append(importing.acquire(timeout=_LONGEST))


def _after_fork() -> None:
    if _held.pop():
        importing.release()


if hasattr(os, "register_at_fork"):
    # The last to register is the first to run. These modules hold locks during a fork, which imports need too. So they
    # register first, and take their locks when the imports have ended.
    import concurrent.futures.thread  # noqa: F401
    import logging  # noqa: F401
    import random  # noqa: F401

    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork)


def load(name: str, package: str) -> ModuleType:
    """Import a module of narrows, such as ``".autoencoder"`` of ``"narrows.models"``."""
    with importing:
        return importlib.import_module(name, package)


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
        with importing:
            return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError(f"{purpose} needs {module}: pip install 'narrows[{extra}]' ({error})") from None
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        hint = "; it may need PYTHONOPTIMIZE=1 or none" if sys.flags.optimize > 1 else ""
        raise MissingExtraError(f"{purpose} needs {module}, which cannot be imported here ({text}){hint}") from error
