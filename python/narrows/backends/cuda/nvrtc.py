"""Compiling kernels at run time, by NVRTC, which needs neither nvcc nor a GPU.

Promises: what is compiled is `table.KERNELS`, or some of them, from the sources that the package ships; the same flags
wherever it is done, those of CuPy included; a failure says what the compiler said.
Never: loads what it has compiled.
"""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

from ...plan.ops import source_folder
from ...plan.spec import Precision
from .table import PRECISION_FLAGS, constants

__all__ = ["Compiled", "Nvrtc", "digest", "flags", "source"]


def source() -> str:
    return (source_folder() / "cuda" / "narrows.cu").read_text()


@cache
def digest() -> str:
    """Of all that kernels are made of: caches of compiled code look at the one file that includes the others."""
    folder = source_folder()
    files = sorted(file for part in ("cuda", "plan", "shared") for file in (folder / part).iterdir())
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


def flags(precision: Precision) -> list[str]:
    """Of the compiler, but for the architecture."""
    folder = source_folder()
    defines = [f"-D{name}={value}" for name, value in constants().items()] + [f"-DNARROWS_SOURCES=0x{digest()}"]
    # Products and sums are fused where that is one rounding less; all else is as IEEE 754 has it. Pragmas that are the
    # host compiler's are no concern of this one's.
    include = [f"-I{folder / 'cuda'}", f"-I{folder}"]
    return ["-std=c++17", *include, "-diag-suppress=161", *defines, *PRECISION_FLAGS[precision]]


CUPYS = ["-ftz=true", "--device-as-default-execution-space"]
"""What CuPy has the compiler do besides, whatever it is asked for: subnormal numbers of float32 are zero."""


class Compiled(NamedTuple):
    """Machine code, and what the kernels are called in it."""

    code: bytes
    names: dict[str, str]
    log: str
    """Of the compiler and of the assembler, which says what each kernel takes."""


class Nvrtc:
    """The library at a path.

    Raises
    ------
    OSError
        It cannot be loaded.
    """

    def __init__(self, path: Path | str) -> None:
        self._library = ctypes.CDLL(str(path))
        self._library.nvrtcGetErrorString.restype = ctypes.c_char_p

    def _call(self, name: str, *arguments: object) -> None:
        code = getattr(self._library, name)(*arguments)
        if code:
            raise RuntimeError(f"{name}: {self._library.nvrtcGetErrorString(code).decode()}")

    def _bytes(self, of: str, program: ctypes.c_void_p) -> bytes:
        size = ctypes.c_size_t()
        self._call(f"nvrtcGet{of}Size", program, ctypes.byref(size))
        out = ctypes.create_string_buffer(size.value)
        self._call(f"nvrtcGet{of}", program, out)
        return out.raw

    def compile(self, kernels: Sequence[str], architecture: str, precision: Precision) -> Compiled:
        """Machine code of some kernels, for an architecture such as ``"sm_80"``.

        Raises
        ------
        RuntimeError
            It does not compile.
        """
        program = ctypes.c_void_p()
        text = source().encode()
        self._call("nvrtcCreateProgram", ctypes.byref(program), text, b"narrows.cu", 0, None, None)
        try:
            for kernel in kernels:
                self._call("nvrtcAddNameExpression", program, kernel.encode())
            options = [f"-arch={architecture}", "--ptxas-options=-v", *flags(precision), *CUPYS]
            array = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
            try:
                self._call("nvrtcCompileProgram", program, len(options), array)
            except RuntimeError as error:
                log = self._bytes("ProgramLog", program).decode(errors="replace").strip("\0")
                raise RuntimeError(f"for {architecture}, {error}: {' '.join(log.split())[:2000]}") from None
            return Compiled(
                self._bytes("CUBIN", program),
                {kernel: self._name(program, kernel) for kernel in kernels},
                self._bytes("ProgramLog", program).decode(errors="replace").strip("\0"),
            )
        finally:
            self._library.nvrtcDestroyProgram(ctypes.byref(program))

    def _name(self, program: ctypes.c_void_p, kernel: str) -> str:
        name = ctypes.c_char_p()
        self._call("nvrtcGetLoweredName", program, kernel.encode(), ctypes.byref(name))
        return (name.value or b"").decode()
