"""A GPU through CuPy, as `program.Device` has it.

Promises: streams of its own, so that nothing here waits for another library's work; kernels are compiled once for a
device and kept in CuPy's cache on disk, whose key has the digest of their sources; a list of launches becomes a graph.
Never: touches CuPy's current stream or device outside of a call. It has run on no GPU; the tests run it over a fake.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import cache, cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..._extras import require
from ...errors import OutOfMemoryError
from ...plan import Precision
from .blas import Blas, load
from .launches import BLAS
from .nvrtc import flags, source
from .program import Mark, Planned
from .table import PRECISION_FLAGS

__all__ = ["CupyDevice"]

log = logging.getLogger("narrows")


class CupyMark:
    def __init__(self, event: Any) -> None:
        self._event = event

    def wait(self) -> None:
        self._event.synchronize()


class CupyDevice:
    """
    Parameters
    ----------
    index : int
        Of the device, as CUDA counts them.
    """

    guard = 0

    def __init__(self, index: int = 0) -> None:
        self._cupy: Any = require("cupy", "cuda12", "the CUDA backend")
        self._device = self._cupy.cuda.Device(index)
        self._memory: dict[int, Any] = {}
        self._kernels: dict[tuple[str, ...], Any] = {}
        self._eager = False
        with self._device:
            self._stream = self._cupy.cuda.Stream(non_blocking=True)
            self._copies = self._cupy.cuda.Stream(non_blocking=True)

    def allocate(self, size: int) -> int:
        with self._device, self._stream:
            try:
                memory = self._cupy.cuda.alloc(size)
            except self._cupy.cuda.memory.OutOfMemoryError as error:
                free, total = self._device.mem_info
                raise OutOfMemoryError(
                    f"{size / 2**20:.0f} MiB do not fit on {self._device}, which has {free / 2**20:.0f} of "
                    f"{total / 2**20:.0f} MiB left; take a smaller batch_size"
                ) from error
        self._memory[int(memory.ptr)] = memory
        return int(memory.ptr)

    def free(self, address: int) -> None:
        # The pool hands it out again on this stream alone, so nothing that still runs can lose it.
        del self._memory[address]

    def free_memory(self) -> int:
        with self._device:
            return int(self._device.mem_info[0] + self._cupy.get_default_memory_pool().free_bytes())

    def pinned(self, size: int) -> NDArray[Any]:
        with self._device:
            memory = self._cupy.cuda.alloc_pinned_memory(max(size, 1))
        return np.frombuffer(memory, np.uint8, size)

    def upload(self, address: int, data: NDArray[Any]) -> None:
        self._copy(self._stream, address, data.ctypes.data, data.nbytes, "HostToDevice")
        self._stream.synchronize()

    def download(self, address: int, out: NDArray[Any]) -> None:
        self._copy(self._stream, out.ctypes.data, address, out.nbytes, "DeviceToHost")
        self._stream.synchronize()

    def send(self, address: int, pinned: NDArray[Any]) -> None:
        self._copy(self._stream, address, pinned.ctypes.data, pinned.nbytes, "HostToDevice")

    def send_ahead(self, address: int, pinned: NDArray[Any]) -> None:
        self._copy(self._copies, address, pinned.ctypes.data, pinned.nbytes, "HostToDevice")
        with self._device:
            self._stream.wait_event(self._copies.record())

    def fetch(self, address: int, pinned: NDArray[Any]) -> None:
        self._copy(self._stream, pinned.ctypes.data, address, pinned.nbytes, "DeviceToHost")

    def _copy(self, stream: Any, to: int, origin: int, size: int, direction: str) -> None:
        runtime = self._cupy.cuda.runtime
        if size:
            with self._device:
                runtime.memcpyAsync(to, origin, size, getattr(runtime, f"memcpy{direction}"), stream.ptr)

    def mark(self) -> Mark:
        with self._device:
            return CupyMark(self._stream.record())

    def graph(self, planned: Sequence[Planned], precision: Precision) -> Callable[[], None]:
        with self._device, self._stream:
            functions = self._functions([launch.kernel for launch in planned if launch.kernel != BLAS], precision)
            calls: list[tuple[Any, ...]] = [
                (self.blas.product, launch.operands)
                if launch.kernel == BLAS
                else (functions[launch.kernel], (launch.blocks,), (launch.threads,), (launch.operands,))
                for launch in planned
            ]
            captured = self._captured(calls)

        def run() -> None:
            with self._device, self._stream:
                _launch(calls) if captured is None else captured.launch(self._stream)

        return run

    def _captured(self, calls: Sequence[tuple[Any, ...]]) -> Any:
        """A graph of these calls; None, and a warning once, if they cannot be captured."""
        try:
            self._stream.begin_capture()
            try:
                _launch(calls)
            finally:
                graph = self._stream.end_capture()
        except Exception as error:
            if not self._eager:
                log.warning("launches run one by one and not as a graph: %s: %s", type(error).__name__, error)
            self._eager = True
            return None
        return graph

    @cached_property
    def blas(self) -> Any:
        """cuBLAS on our stream; None, and a warning once, if there is none."""
        try:
            with self._device:
                driver = int(self._cupy.cuda.runtime.driverGetVersion())
                return Blas(load(driver // 1000), self._stream.ptr, self.allocate)
        except (OSError, RuntimeError) as error:
            _warn_once(f"wide layers take longer than they need to, without cuBLAS: {error}")
            return None

    def _functions(self, kernels: Sequence[str], precision: Precision) -> dict[str, Any]:
        # By what they are compiled with: tf32 has the kernels of float32.
        of = tuple(PRECISION_FLAGS[precision])
        new = [kernel for kernel in dict.fromkeys(kernels) if (kernel, *of) not in self._kernels]
        if new:
            module = self._cupy.RawModule(code=source(), options=tuple(flags(precision)), name_expressions=tuple(new))
            for kernel in new:
                # Loaded now: a first call would load it, which cannot be captured.
                self._kernels[kernel, *of] = module.get_function(kernel).kernel
        return {kernel: self._kernels[kernel, *of] for kernel in kernels}


@cache
def _warn_once(line: str) -> None:
    log.warning(line)


def _launch(calls: Sequence[tuple[Any, ...]]) -> None:
    for function, *arguments in calls:
        function(*arguments)
