"""Compiles kernels with NVRTC, which needs neither nvcc nor a GPU, as CuPy compiles them. Loads nothing."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from narrows.backends.cuda.sources import flags, source
from narrows.plan.spec import Precision

CUPYS = ["-ftz=true", "--device-as-default-execution-space"]
"""Flags that CuPy always adds: subnormal numbers of float32 become zero."""


class Compiled(NamedTuple):
    """Machine code, and the names of the kernels in it."""

    code: bytes
    names: dict[str, str]
    log: str
    """Messages of the compiler, and of the assembler on the registers and memory of each kernel."""


class Nvrtc:
    """The NVRTC library at a path.

    Raises
    ------
    OSError
        The library cannot be loaded.
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
        """Compile some kernels for an architecture such as ``"sm_80"``.

        Raises
        ------
        RuntimeError
            The compiler reports an error.
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
