"""CuPy's names over a `HostDevice`: arrays in its memory, and streams and events that record the order of work.

Promises: refuses what CuPy and CUDA refuse: a NumPy array together with its own arrays, its own array where NumPy needs
one, an array of a device that is not current, addresses as NumPy numbers, rows wider than their stride. A program fails
if it reads an array before it waited for the stream that wrote it, or returns one before it is written. A byte written
behind an array is found when the array is freed.
Never: proves that CuPy has these names; `NAMES` lists them, and a test looks them up where CuPy is installed.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys
import weakref
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp

from cuda_device import HostDevice
from narrows.backends import cuda
from narrows.backends.cuda.protocol import Planned
from narrows.backends.cuda.sources import digest
from narrows.backends.cuda.table import KERNELS
from narrows.plan.spec import Precision

NAMES = {
    "": (
        "RawKernel", "RawModule", "arange", "array", "asarray", "ascontiguousarray", "asnumpy", "empty", "from_dlpack",
        "get_default_memory_pool", "ndarray",
    ),
    "cuda": ("Device", "Event", "Graph", "Stream", "alloc", "alloc_pinned_memory", "get_current_stream"),
    "cuda.Device": ("id", "mem_info"),
    "cuda.Event": ("synchronize",),
    "cuda.Graph": ("launch",),
    "cuda.Stream": ("begin_capture", "end_capture", "record", "synchronize", "wait_event"),
    "cuda.compiler": ("CompileException",),
    "cuda.memory": ("OutOfMemoryError",),
    "cuda.runtime": (
        "driverGetVersion", "getDevice", "getDeviceCount", "getDeviceProperties", "memcpy2DAsync", "memcpyAsync",
        "memcpyDeviceToDevice", "memcpyDeviceToHost", "memcpyHostToDevice", "runtimeGetVersion",
    ),
    "cuda.nvrtc": ("getVersion",),
    "RawModule": ("get_function",),
    "RawKernel": ("kernel",),
}  # fmt: skip
"""The names of CuPy that narrows uses."""
METHODS = (
    "__array_function__", "__array_ufunc__", "__cuda_array_interface__", "__dlpack__", "__dlpack_device__", "all",
    "any", "argmax", "argmin", "astype", "copy", "cumsum", "data", "device", "dtype", "flags", "get", "item", "max",
    "mean", "min", "nbytes", "ndim", "reshape", "shape", "size", "strides", "sum", "T", "tobytes", "view",
)  # fmt: skip
"""The attributes of CuPy's arrays that narrows and its tests use."""
FUNCTIONS = ("bincount", "concatenate", "empty_like", "reshape", "split", "zeros_like")
"""NumPy's functions that CuPy implements for its arrays."""


class Stream(contextlib.AbstractContextManager["Stream"]):
    def __init__(self, fake: FakeCupy, number: int) -> None:
        self.fake, self.ptr, self.device = fake, number, fake.device
        self.asked = 0
        """Calls on this stream so far."""
        self.seen: dict[int, int] = {}
        """For each other stream, the number of its calls that come before this stream's next call."""
        self.n_entered: list[Stream] = []

    def __enter__(self) -> Stream:
        assert self.ptr == 0 or self.device == self.fake.device, (
            "The device that the stream is created on does not match"
        )
        self.n_entered.append(self.fake.current)
        self.fake.current = self
        return self

    def __exit__(self, *_: object) -> None:
        self.fake.current = self.n_entered.pop()

    def record(self) -> Any:
        asked = self.asked

        def synchronize() -> None:
            self.fake.calls.append(("wait", "host", self.ptr))
            self.fake.settled[self.ptr] = max(asked, self.fake.settled.get(self.ptr, 0))

        return SimpleNamespace(synchronize=synchronize, stream=self.ptr, asked=asked)

    def wait_event(self, event: Any) -> None:
        self.fake.calls.append(("wait", self.ptr, event.stream))
        self.seen[event.stream] = max(event.asked, self.seen.get(event.stream, 0))

    def synchronize(self) -> None:
        assert self.fake.capturing is None, "waiting while capturing"
        self.fake.settled[self.ptr] = self.asked

    def begin_capture(self) -> None:
        if not self.fake.captures:
            raise RuntimeError("cudaErrorStreamCaptureUnsupported")
        self.fake.calls.append("capture")
        self.fake.capturing = []

    def end_capture(self) -> Any:
        fake, taken = self.fake, self.fake.capturing
        fake.capturing = None
        run = fake.host.graph(taken, fake.precision)

        def launch(stream: Stream) -> None:
            fake.calls.append("graph")
            fake.runs_on(stream)
            run()

        return SimpleNamespace(launch=launch)


class Memory:
    """Memory of a `HostDevice`, freed with its last reference."""

    def __init__(self, fake: FakeCupy, size: int) -> None:
        host = fake.host
        self.ptr = host.allocate(size)
        self.inside = host._inside(self.ptr, size)
        self.touched(fake.current)
        # Check now, because a NumPy array may outlive the memory.
        weakref.finalize(self, host.free, self.ptr)

    def touched(self, stream: Stream) -> None:
        """Record that this stream's last call wrote the memory."""
        self.written = stream.ptr, stream.asked


class Array(np.lib.mixins.NDArrayOperatorsMixin):
    """An array in a device's memory, which NumPy cannot read."""

    fake: FakeCupy

    def __init__(self, inner: Any, memory: Memory | None = None, number: int | None = None) -> None:
        fake = self.fake
        if memory is None:
            values = np.asarray(inner)
            memory = fake.memory_of(values.nbytes)
            inner = memory.inside[: values.nbytes].view(values.dtype).reshape(values.shape)
            inner[...] = values
        self.inner, self.memory = inner, memory
        self.number = fake.device if number is None else number

    def of(self) -> Any:
        """The values, for work on the current stream of the current device."""
        fake = self.fake
        assert self.number == fake.device, f"array of device {self.number} used on {fake.device}"
        stream, asked = self.memory.written
        own = fake.current
        settled = fake.settled.get(stream, 0) >= asked
        assert settled or stream == own.ptr or own.seen.get(stream, 0) >= asked, "read before it is written"
        own.asked += 1
        return self.inner

    shape, dtype, ndim = (property(lambda self, n=n: getattr(self.inner, n)) for n in ("shape", "dtype", "ndim"))
    size, strides, nbytes = (property(lambda self, n=n: getattr(self.inner, n)) for n in ("size", "strides", "nbytes"))
    flags = property(lambda self: self.inner.flags)
    device = property(lambda self: SimpleNamespace(id=self.number))
    T = property(lambda self: Array(self.inner.T, self.memory, self.number))

    @property
    def data(self) -> Any:
        return SimpleNamespace(ptr=self._address())

    def _address(self) -> int:
        # The caller will read or write there, on a stream that must come after.
        self.fake.expected.append(self.memory.written)
        self.fake.lent[self.inner.ctypes.data] = self.memory
        return int(self.inner.ctypes.data)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {"shape": self.shape, "typestr": self.dtype.str, "data": (self.inner.ctypes.data, False), "version": 3}

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, self.number

    def __dlpack__(self, stream: Any = None, **_: Any) -> Any:
        if stream is None:
            raise BufferError("Unsupported device in DLTensor.")
        return self

    def __array__(self, *_: Any, **__: Any) -> Any:
        raise TypeError("Implicit conversion to a NumPy array is not allowed. Please use `.get()`")

    def get(self) -> Any:
        self.fake.calls.append(("down", self.nbytes))
        return np.array(self.of())

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **options: Any) -> Any:
        return wrapped(getattr(ufunc, method)(*map(inside, inputs), **{n: inside(v) for n, v in options.items()}))

    def __array_function__(self, function: Any, _: Any, args: Any, options: Any) -> Any:
        if function.__name__ not in FUNCTIONS:
            return NotImplemented
        return wrapped(function(*inside(args), **inside(options)))

    def __getitem__(self, at: Any) -> Any:
        parts = at if isinstance(at, tuple) else (at,)
        if all(part is None or isinstance(part, slice) for part in parts):  # a view, so nothing is read
            return wrapped(self.inner[at], self)
        return wrapped(self.of()[inside(at, of_numpy=True)], self)

    def __setitem__(self, at: Any, values: Any) -> None:
        self.of()[inside(at, of_numpy=True)] = inside(values)
        self.memory.touched(self.fake.current)

    def __len__(self) -> int:
        return len(self.inner)

    def __bool__(self) -> bool:
        return bool(self.of())

    def __int__(self) -> int:
        return int(self.of())

    __index__ = __int__

    def __float__(self) -> float:
        return float(self.of())

    def __getattr__(self, name: str) -> Any:
        if name not in METHODS:
            raise AttributeError(f"the fake of CuPy's arrays has no {name}")

        def call(*args: Any, **options: Any) -> Any:
            found = getattr(self.of(), name)(*inside(args), **inside(options))
            if name in ("item", "tobytes"):
                return found
            return wrapped(found, self)

        return call


def inside(value: Any, *, of_numpy: bool = False) -> Any:
    """An argument of CuPy as an argument of NumPy."""
    if isinstance(value, Array):
        return value.of()
    if isinstance(value, list | tuple):
        return type(value)(inside(v, of_numpy=of_numpy) for v in value)
    if isinstance(value, dict):
        return {name: inside(v) for name, v in value.items()}
    if isinstance(value, np.ndarray) and value.ndim and not of_numpy:
        raise TypeError(f"Unsupported type {type(value)}")
    return value


def wrapped(value: Any, owner: Array | None = None) -> Any:
    """A result of NumPy as a result of CuPy."""
    if isinstance(value, tuple | list):
        return type(value)(wrapped(v, owner) for v in value)
    if owner is not None and isinstance(value, np.ndarray) and np.may_share_memory(value, owner.inner):
        return Array(value, owner.memory, owner.number)
    return Array(value) if isinstance(value, np.ndarray | np.generic) else value


class Csr:
    """``cupyx.scipy.sparse.csr_matrix``, with three arrays."""

    format, ndim = "csr", 2

    def __init__(self, X: Any, shape: Any = None, canonical: bool | None = None) -> None:
        if isinstance(X, Array):
            X = sp.csr_matrix(X.of())
        if isinstance(X, tuple):
            self.data, self.indices, self.indptr = X
        else:
            self.data, self.indices, self.indptr = (Array(a) for a in (X.data, X.indices, X.indptr))
            shape = X.shape
        self.shape = tuple(shape)

    dtype = property(lambda self: self.data.dtype)
    nnz = property(lambda self: self.data.size)
    has_canonical_format = property(lambda self: bool(self.scipy().has_canonical_format))

    def scipy(self) -> Any:
        parts = tuple(a.of() for a in (self.data, self.indices, self.indptr))
        return sp.csr_matrix(parts, shape=self.shape)

    def get(self) -> Any:
        return sp.csr_matrix(tuple(a.get() for a in (self.data, self.indices, self.indptr)), shape=self.shape)

    def tocsr(self) -> Csr:
        return self

    def copy(self) -> Csr:
        return Csr(self.scipy().copy())

    def sum_duplicates(self) -> None:
        X = self.scipy().copy()
        X.sum_duplicates()
        self.data, self.indices, self.indptr = (Array(a) for a in (X.data, X.indices, X.indptr))

    def astype(self, dtype: Any) -> Csr:
        return Csr((self.data.astype(dtype), self.indices, self.indptr), self.shape)

    def toarray(self) -> Array:
        return Array(self.scipy().toarray())

    def __getitem__(self, rows: Any) -> Csr:
        assert isinstance(rows, slice | Array)
        return Csr(self.scipy()[inside(rows)])

    def __matmul__(self, other: Array) -> Array:
        return Array(self.scipy() @ inside(other))


class FakeCupy:
    """CuPy's names; `calls` records the calls.

    Parameters
    ----------
    libraries : callable
        The kernels of a precision (see `cuda_device.build`).
    capacity : int
        Bytes that can be allocated at once.
    captures : bool
        Whether launches can be captured as a graph.
    devices : int
    """

    __spec__: Any = SimpleNamespace()
    __version__ = "14.2.0"
    ndarray = Array

    def __init__(self, libraries: Any, capacity: int = 2**30, captures: bool = True, devices: int = 2) -> None:
        self.host, self.calls, self.left, self.captures = HostDevice(libraries), [], capacity, captures
        self.capturing: list[Planned] | None = None
        self.device, self.devices = 0, devices
        self.current = Stream(self, 0)
        self.streams: dict[int, Stream] = {}
        self.settled: dict[int, int] = {}
        """For each stream, the number of calls that the host has waited for."""
        self.expected: list[tuple[int, int]] = []
        """The calls, by stream and number, that must come before the next launches."""
        self.lent: weakref.WeakValueDictionary[int, Memory] = weakref.WeakValueDictionary()
        self.precision = Precision.FLOAT32
        self.log: str | None = None
        """The message of a compiler that fails."""
        Array.fake = self
        memory = SimpleNamespace(
            OutOfMemoryError=type("OutOfMemoryError", (MemoryError,), {"__module__": "cupy.cuda.memory"})
        )
        runtime = SimpleNamespace(
            memcpyHostToDevice=1,
            memcpyDeviceToHost=2,
            memcpyDeviceToDevice=3,
            memcpyAsync=self.memcpy,
            memcpy2DAsync=self.memcpy_2d,
            driverGetVersion=lambda: 12090,
            runtimeGetVersion=lambda: 12090,
            getDeviceCount=lambda: devices,
            getDevice=lambda: self.device,
            getDeviceProperties=lambda _: {"name": b"Fake", "major": 9, "minor": 0},
        )
        self.cuda = SimpleNamespace(
            Device=self.Device,
            Stream=self.Stream,
            alloc=self.memory_of,
            alloc_pinned_memory=bytearray,
            compiler=SimpleNamespace(CompileException=type("CompileException", (Exception,), {})),
            get_current_stream=lambda: self.current,
            memory=memory,
            nvrtc=SimpleNamespace(getVersion=lambda: (12, 9)),
            runtime=runtime,
        )

    def install(self, monkeypatch: pytest.MonkeyPatch) -> FakeCupy:
        """Make narrows import this as CuPy, on a machine with a GPU."""
        monkeypatch.setitem(sys.modules, "cupy", self)
        monkeypatch.setitem(sys.modules, "cupyx.scipy.sparse", SimpleNamespace(csr_matrix=Csr))
        monkeypatch.setattr(cuda, "has_gpu", lambda: True)
        for name in ("CUDA_VISIBLE_DEVICES", "NARROWS_BACKEND"):
            monkeypatch.delenv(name, raising=False)
        return self

    # --- cupy.cuda --------------------------------------------------------------------------------------------------

    def Device(self, index: int | None = None) -> Any:
        fake = self

        class Device:
            id = fake.device if index is None else index
            mem_info = property(lambda _: (fake.left, 2**30))

            def __init__(self) -> None:
                self.before: list[int] = []

            def __enter__(self) -> None:
                self.before.append(fake.device)
                fake.device = self.id

            def __exit__(self, *_: object) -> None:
                fake.device = self.before.pop()

        assert 0 <= Device.id < self.devices
        return Device()

    def Stream(self, non_blocking: bool = False) -> Stream:
        number = 7 + len(self.streams)
        self.streams[number] = Stream(self, number)
        return self.streams[number]

    def memory_of(self, size: int) -> Memory:
        if size > self.left:
            raise self.cuda.memory.OutOfMemoryError
        return Memory(self, size)

    def runs_on(self, stream: Stream) -> None:
        """Make a function of narrows record its reads and writes of lent arrays."""
        for written_on, asked in self.expected:
            later = stream.ptr == written_on or stream.seen.get(written_on, 0) >= asked
            assert later or self.settled.get(written_on, 0) >= asked, "launched before what it reads is written"
        self.expected = []
        stream.asked += 1

    def memcpy(self, to: int, origin: int, size: int, kind: int, stream: int) -> None:
        assert type(to) is type(origin) is int, "CuPy takes no other integers for addresses"
        assert self.capturing is None, "a copy while capturing"
        self.calls.append(("memcpy", size))
        self.host._inside(to if kind == 1 else origin, size)
        ctypes.memmove(to, origin, size)

    def memcpy_2d(
        self, to: int, to_pitch: int, origin: int, pitch: int, width: int, height: int, kind: int, stream: int
    ) -> None:
        assert type(to) is type(origin) is int, "CuPy takes no other integers for addresses"
        assert kind == 3
        assert width <= min(to_pitch, pitch), "cudaErrorInvalidPitchValue"
        for i in range(height):
            for address in (to + i * to_pitch, origin + i * pitch):
                self.host._inside(address, width)
            ctypes.memmove(to + i * to_pitch, origin + i * pitch, width)
        self.runs_on(self.streams[stream])
        if to in self.lent:
            self.lent[to].touched(self.streams[stream])

    # --- cupy -------------------------------------------------------------------------------------------------------

    def get_default_memory_pool(self) -> Any:
        return SimpleNamespace(free_bytes=lambda: 0)

    def array(self, values: Any, dtype: Any = None) -> Array:
        if not isinstance(values, Array):
            self.calls.append(("up", np.asarray(values).dtype))
        return Array(np.array(values.of() if isinstance(values, Array) else values, dtype=dtype))

    def asarray(self, values: Any, dtype: Any = None) -> Array:
        if isinstance(values, Array) and dtype in (None, values.dtype):
            return values
        return self.array(values, dtype)

    def ascontiguousarray(self, values: Array, dtype: Any = None) -> Array:
        assert isinstance(values, Array), "an array of NumPy's, which would be copied to the device"
        if values.flags.c_contiguous and values.dtype == dtype:
            return values
        return Array(np.ascontiguousarray(values.of(), dtype))

    def arange(self, n: int, dtype: Any) -> Array:
        return Array(np.arange(n, dtype=dtype))

    def asnumpy(self, values: Any) -> Any:
        return values.get()

    def empty(self, shape: Any, dtype: Any = np.float64) -> Array:
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        memory = self.memory_of(size)
        return Array(memory.inside[:size].view(dtype).reshape(shape), memory)

    def from_dlpack(self, other: Any) -> Array:
        assert other.__dlpack_device__()[0] == 2
        return other.__dlpack__(stream=self.current.ptr)

    def RawModule(self, code: str, options: tuple[str, ...], name_expressions: tuple[str, ...]) -> Any:
        assert "#include" in code
        assert f"-DNARROWS_SOURCES=0x{digest()}" in options
        assert set(name_expressions) <= set(KERNELS)
        self.calls.append(("module", name_expressions))
        precision = Precision.FLOAT64 if "-DNARROWS_DOUBLE" in options else Precision.FLOAT32

        def get_function(name: str) -> Any:
            if self.log is not None:
                raise self.cuda.compiler.CompileException(self.log)

            def call(grid: Any, block: Any, arguments: Any) -> None:
                (operands,) = arguments
                assert isinstance(operands, np.ndarray)
                assert operands.shape == ()
                planned = Planned(name, *grid, *block, operands)
                self.precision = precision
                if self.capturing is None:
                    self.calls.append("launch")
                    self.runs_on(self.current)
                    self.host.graph([planned], precision)()
                else:
                    assert not gc.isenabled(), "what is collected while capturing may wait for the device"
                    self.capturing.append(planned)

            return SimpleNamespace(kernel=call)

        return SimpleNamespace(get_function=get_function)
