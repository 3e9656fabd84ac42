"""The sources of the kernels, and the flags that the compiler NVRTC takes.

The sources are those of the package. The flags are the same wherever kernels are compiled.
"""

from __future__ import annotations

import hashlib
from functools import cache

from ...plan.ops import source_folder
from ...plan.spec import Precision
from .table import PRECISION_FLAGS, constants

__all__ = ["digest", "flags", "source"]


def source() -> str:
    return (source_folder() / "cuda" / "narrows.cu").read_text()


@cache
def digest() -> str:
    """Of all sources of the kernels. Caches of compiled code look only at the one file that includes the others."""
    folder = source_folder()
    files = sorted(file for part in ("cuda", "plan", "shared") for file in (folder / part).iterdir())
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


def flags(precision: Precision) -> list[str]:
    """The compiler's flags, without the architecture."""
    folder = source_folder()
    defines = [f"-D{name}={value}" for name, value in constants().items()] + [f"-DNARROWS_SOURCES=0x{digest()}"]
    # The compiler fuses multiply-adds; everything else follows IEEE 754. It need not warn about pragmas for the host's
    # compiler.
    include = [f"-I{folder / 'cuda'}", f"-I{folder}"]
    return ["-std=c++17", *include, "-diag-suppress=161", *defines, *PRECISION_FLAGS[precision]]
