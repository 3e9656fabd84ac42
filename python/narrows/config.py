"""A description of this installation: versions, threads, backends, extras.

It never raises for something that is missing, and imports only what it needs for the answer.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
from typing import Any

__all__ = ["show_config"]

_CORE = ("numpy", "scipy", "scikit-learn", "numba", "safetensors", "tqdm")
_EXTRAS = {
    "anndata": ("anndata", "h5py", "zarr"),
    "frames": ("pandas", "pyarrow"),
    "plot": ("matplotlib",),
    "report": ("matplotlib", "jinja2"),
    "cuda12 or cuda13": ("cupy",),
}


class Config(dict[str, Any]):
    """A dict that prints as lines."""

    def __str__(self) -> str:
        lines = []
        for key, value in self.items():
            if isinstance(value, dict):
                lines.append(f"{key}:")
                lines += [f"  {name}: {item}" for name, item in value.items()]
            else:
                lines.append(f"{key}: {value}")
        return "\n".join(lines)

    __repr__ = __str__


def show_config() -> Config:
    """Describe this installation.

    Returns
    -------
    Config
        A dict that prints as readable lines. Keys: ``narrows``, ``python``, ``platform`` (texts); ``packages``
        (versions of the core dependencies); ``threads`` (number and its origin); ``backend`` (the choice of
        ``backend="auto"``, or why there is none); ``backends`` (by name: "ok" or "no", and the reason); ``generic ops``
        (by backend: ops that the reference computes for it); ``isa`` and ``bfloat16`` (with the C++ backend:
        instruction set, and what multiplies in bfloat16); ``extras`` (by name: "present", or what is missing).

    Examples
    --------
    >>> import narrows
    >>> str(narrows.show_config()).splitlines()[0].partition(":")[0]
    'narrows'
    """
    from ._version import __version__
    from .backends import own_ops, probe_all, resolve
    from .errors import BackendError
    from .machine import thread_choice
    from .plan.ops import OpCode

    config = Config(narrows=__version__, python=platform.python_version(), platform=platform.platform())
    config["packages"] = {name: _version(name) for name in _CORE}
    try:
        threads, origin = thread_choice()
        config["threads"] = f"{threads} ({origin})"
    except ValueError as error:
        config["threads"] = f"error: {error}"
    try:
        config["backend"] = resolve("auto")
    except (BackendError, ValueError) as error:
        config["backend"] = f"error: {error}"
    found = probe_all()
    config["backends"] = {name: f"{'ok' if p.ok else 'no'}: {p.reason}" for name, p in found.items()}
    generic = {name: sorted(op.name.lower() for op in {*OpCode} - own_ops(name)) for name, p in found.items() if p.ok}
    config["generic ops"] = {name: ", ".join(ops) or "none" for name, ops in generic.items()}
    if found["cpp"].ok:
        from .backends.cpp import bfloat16, isa

        config["isa"] = isa()
        config["bfloat16"] = bfloat16()
    config["extras"] = {name: _extra(modules) for name, modules in _EXTRAS.items()}
    return config


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


def _extra(modules: tuple[str, ...]) -> str:
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    return f"missing: {', '.join(missing)}" if missing else "present"
