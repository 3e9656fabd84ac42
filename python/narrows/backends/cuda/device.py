"""A GPU as a `protocol.Device`, through CuPy.

Promises: it has its own streams, so it never waits for another library's work. Kernels are compiled once per device and
kept in CuPy's cache on disk, under a key with the digest of their sources. A list of launches becomes a graph.
Never: changes CuPy's current stream or device outside of a call. No GPU has run it yet; the tests run it on a fake.

The caller queues work on CuPy's current stream. Before this module reads or writes an array of the caller, its stream
waits for an event of that stream (`follow`). The host does not wait. Converted copies and results are allocated on the
caller's stream. A program returns when the event after its last chunk has come, so everything that the caller does next
comes after it. Nothing waits for the whole device.
"""

from __future__ import annotations

import contextlib
import gc
import logging
from collections.abc import Callable, Iterator, Sequence
from functools import cache, cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..._extras import require
from ...errors import BackendError, OutOfMemoryError
from ...plan.spec import Precision
from .blas import Blas, load
from .launches import BLAS
from .protocol import Mark, Planned
from .sources import flags, source
from .table import PRECISION_FLAGS

__all__ = ["CupyDevice"]

log = logging.getLogger("narrows")

WAYS_OUT = {
    "the data": "free GPU memory, or pass the data in the CPU's memory, from where they are sent in parts",
    "the results": "free GPU memory, or ask for fewer rows at a time",
    "": "set a smaller batch_size, or free GPU memory",
}
"""What to do if memory runs out, by the purpose of the memory."""


class CupyMark:
    def __init__(self, event: Any) -> None:
        self._event = event

    def wait(self) -> None:
        self._event.synchronize()


class CupyDevice:
    """
    Parameters
    ----------
    index : int, optional
        CUDA's number of the device; CuPy's current device by default.
    """

    guard = 0

    def __init__(self, index: int | None = None) -> None:
        self._cupy: Any = require("cupy", "cuda12", "the CUDA backend")
        self._device = self._cupy.cuda.Device(index)
        self.index = int(self._device.id)
        self._memory: dict[int, Any] = {}
        self._eager = False
        with self._device:
            self._stream = self._cupy.cuda.Stream(non_blocking=True)
            self._copies = self._cupy.cuda.Stream(non_blocking=True)

    def allocate(self, size: int, what: str = "the network and its batches") -> int:
        with self._room(size, what), self._stream:
            memory = self._cupy.cuda.alloc(size)
        self._memory[int(memory.ptr)] = memory
        return int(memory.ptr)

    @contextlib.contextmanager
    def _room(self, size: int, what: str) -> Iterator[None]:
        """On this device; says what to do if so many bytes cannot be allocated."""
        with self._device:
            try:
                yield
            except self._cupy.cuda.memory.OutOfMemoryError as error:
                free, total = self._device.mem_info
                raise OutOfMemoryError(
                    f"{what} need {size / 2**20:.3g} MiB, but GPU {self.index} has only {free / 2**20:.0f} of "
                    f"{total / 2**20:.0f} MiB free: {WAYS_OUT.get(what, WAYS_OUT[''])}"
                ) from error

    def free(self, address: int) -> None:
        # The pool reuses the memory on this stream alone, so running work cannot lose it.
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
            calls = calls_of(self._cupy, planned, precision, lambda operands: self.blas.product(operands))
            captured = self._captured(calls)

        def run() -> None:
            with self._device, self._stream:
                launch(calls) if captured is None else captured.launch(self._stream)

        return run

    def _captured(self, calls: Sequence[tuple[Any, ...]]) -> Any:
        """A graph of these calls; None, with one warning, if they cannot be captured."""
        try:
            with _uncollected():
                self._stream.begin_capture()
                try:
                    launch(calls)
                finally:
                    graph = self._stream.end_capture()
        except Exception as error:
            if not self._eager:
                log.warning(
                    "the GPU runs launches one by one, because they could not be captured as a graph: %s: %s",
                    type(error).__name__,
                    error,
                )
            self._eager = True
            return None
        return graph

    @cached_property
    def blas(self) -> Any:
        """cuBLAS on our stream; None, with one warning, if there is none."""
        with self._device:
            return blas_on(self._cupy, self._stream.ptr, self.allocate)

    def contiguous(self, array: Any, dtype: np.dtype[Any]) -> Any:
        self.address(array)
        with self._room(array.size * dtype.itemsize, "the data"):
            return self._cupy.ascontiguousarray(array, dtype)

    def address(self, array: Any) -> int:
        if (own := int(array.device.id)) != self.index:
            raise ValueError(
                f"an array is on GPU {own}, but the network is on GPU {self.index}: move the array with "
                f"cupy.asarray(array) inside `with cupy.cuda.Device({self.index}):`"
            )
        return int(array.data.ptr)

    def empty(self, shape: tuple[int, int], dtype: np.dtype[Any]) -> Any:
        with self._room(shape[0] * shape[1] * dtype.itemsize, "the results"):
            return self._cupy.empty(shape, dtype)

    def store(self, array: Any, address: int, ld: int) -> None:
        self._copy_rows(array, address, ld, into=True)

    def fill(self, address: int, ld: int, array: Any) -> None:
        self._copy_rows(array, address, ld, into=False)

    def _copy_rows(self, array: Any, address: int, ld: int, *, into: bool) -> None:
        """Copy rows into an array without gaps, or out of it. A row of one element has no meaningful stride."""
        runtime, (rows, cols), size = self._cupy.cuda.runtime, array.shape, array.dtype.itemsize
        outside, inside = (address, ld * size), (int(array.data.ptr), cols * size)
        to, origin = (inside, outside) if into else (outside, inside)
        with self._device:
            runtime.memcpy2DAsync(*to, *origin, cols * size, rows, runtime.memcpyDeviceToDevice, self._stream.ptr)

    def follow(self) -> None:
        with self._device:
            self._stream.wait_event(self._cupy.cuda.get_current_stream().record())


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """Without garbage collection. If it freed a cuBLAS handle, that would wait for the device and end a capture."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@cache
def _warn_once(line: str) -> None:
    log.warning(line)


def blas_on(cupy: Any, stream: int, allocate: Callable[[int], int]) -> Blas | None:
    """cuBLAS on a stream of the current device; None, with one warning, if there is none."""
    try:
        return Blas(load(int(cupy.cuda.runtime.driverGetVersion()) // 1000), stream, allocate)
    except (OSError, RuntimeError) as error:
        _warn_once(f"wide layers are slower on the GPU without cuBLAS: {error}")
        return None


@cache
def _kernels(cupy: Any, index: int) -> dict[tuple[str, ...], Any]:
    """The loaded kernels of a device, for all programs of this process, by name and compiler flags."""
    return {}


def calls_of(
    cupy: Any, planned: Sequence[Planned], precision: Precision, product: Callable[[Any], None] | None = None
) -> list[tuple[Any, ...]]:
    """Launches on the current device as calls, with kernels compiled and loaded. `product` runs those of cuBLAS."""
    known, of = _kernels(cupy, int(cupy.cuda.Device().id)), tuple(PRECISION_FLAGS[precision])
    wanted = dict.fromkeys(call.kernel for call in planned if call.kernel != BLAS)
    if new := [kernel for kernel in wanted if (kernel, *of) not in known]:
        module = cupy.RawModule(code=source(), options=tuple(flags(precision)), name_expressions=tuple(new))
        try:
            for kernel in new:
                # Load it now, because a load during the first call cannot be captured.
                known[kernel, *of] = module.get_function(kernel).kernel
        except cupy.cuda.compiler.CompileException as error:
            raise BackendError(
                f"NVRTC could not compile the CUDA kernels: {' '.join(str(error).split())[:500]}"
            ) from None
    return [
        (product, call.operands)
        if call.kernel == BLAS
        else (known[call.kernel, *of], (call.blocks,), (call.threads,), (call.operands,))
        for call in planned
    ]


def launch(calls: Sequence[tuple[Any, ...]]) -> None:
    """Run the calls on the current stream."""
    for function, *arguments in calls:
        function(*arguments)
