"""What the CUDA backend asks of CuPy, in which order: a fake of CuPy's calls, whose kernels are the host's.

Nothing of a GPU is shown here; that the names exist in CuPy is looked up where it is installed.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import logging
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from cases import Case, network
from cuda_device import HostDevice
from narrows.backends import Hyper
from narrows.backends.cuda import data
from narrows.backends.cuda import device as module
from narrows.backends.cuda.device import CupyDevice
from narrows.backends.cuda.nvrtc import digest
from narrows.backends.cuda.program import CudaProgram, Planned
from narrows.backends.cuda.table import KERNELS, LAUNCH_DTYPE
from narrows.errors import MissingExtraError, OutOfMemoryError
from narrows.plan import Activation, Loss, Mode, Precision
from test_backends import assert_close, reference_of, tolerance


class FakeCupy:
    """CuPy's names over a `HostDevice`; `calls` has what was asked of it."""

    def __init__(self, libraries: Any, capacity: int = 2**30, captures: bool = True) -> None:
        self.host, self.calls, self.left, self.captures = HostDevice(libraries), [], capacity, captures
        self.capturing: list[Planned] | None = None
        self.n_streams = 0
        self.cuda = self
        self.memory = self
        self.runtime = self
        self.OutOfMemoryError = type("OutOfMemoryError", (MemoryError,), {})
        self.memcpyHostToDevice, self.memcpyDeviceToHost = 1, 2

    # cupy.cuda
    def Device(self, index: int) -> Any:
        outer = self

        class Device(contextlib.nullcontext):
            mem_info = property(lambda _: (outer.left, 2**30))

            def __str__(self) -> str:
                return f"<CUDA Device {index}>"

        return Device()

    def Stream(self, non_blocking: bool) -> Any:
        outer = self

        class Stream(contextlib.nullcontext):
            def __init__(self) -> None:
                super().__init__()
                outer.n_streams += 1
                self.ptr = 6 + outer.n_streams

            def record(self) -> Any:
                return SimpleNamespace(synchronize=lambda: None, stream=self.ptr)

            def wait_event(self, event: Any) -> None:
                outer.calls.append(("wait", self.ptr, event.stream))

            def synchronize(self) -> None:
                assert outer.capturing is None, "waiting while capturing"

            def begin_capture(self) -> None:
                if not outer.captures:
                    raise RuntimeError("cudaErrorStreamCaptureUnsupported")
                outer.calls.append("capture")
                outer.capturing = []

            def end_capture(self) -> Any:
                taken, outer.capturing = outer.capturing, None
                run = outer.host.graph(taken, outer.precision)

                class Graph:
                    def launch(self, stream: Any) -> None:
                        assert stream.ptr == 7
                        outer.calls.append("graph")
                        run()

                return Graph()

        assert non_blocking
        return Stream()

    def alloc(self, size: int) -> Any:
        if size > self.left:
            raise self.OutOfMemoryError
        address = self.host.allocate(size)
        outer = self

        class Pointer(int):
            ptr = address

            def __del__(self) -> None:
                outer.host.free(address)

        return Pointer(address)

    def memcpyAsync(self, to: int, origin: int, size: int, kind: int, stream: int) -> None:
        assert stream in (7, 8)
        assert self.capturing is None, "a copy while capturing"
        self.host._inside(to if kind == self.memcpyHostToDevice else origin, size)
        ctypes.memmove(to, origin, size)

    def alloc_pinned_memory(self, size: int) -> Any:
        return bytearray(size)

    # cupy
    def get_default_memory_pool(self) -> Any:
        return SimpleNamespace(free_bytes=lambda: 0)

    def RawModule(self, code: str, options: tuple[str, ...], name_expressions: tuple[str, ...]) -> Any:
        assert "#include" in code
        assert f"-DNARROWS_SOURCES=0x{digest()}" in options
        assert set(name_expressions) <= set(KERNELS)
        self.calls.append(("module", name_expressions))
        double = "-DNARROWS_DOUBLE" in options
        self.precision = Precision.FLOAT64 if double else Precision.FLOAT32

        def get_function(name: str) -> Any:
            def call(grid: Any, block: Any, arguments: Any) -> None:
                (operands,) = arguments
                assert isinstance(operands, np.ndarray)
                assert operands.shape == ()
                planned = Planned(name, *grid, *block, operands)
                if self.capturing is None:
                    self.calls.append("launch")
                    self.host.graph([planned], self.precision)()
                else:
                    self.capturing.append(planned)

            kernel = type("RawKernel", (), {"kernel": staticmethod(call)})
            return kernel()

        return type("Module", (), {"get_function": staticmethod(get_function)})()


CASE = Case("device", network((33, 9, 33), loss=Loss.BCE, output=Activation.SIGMOID, alpha=0.1), batch=8, rows=21)


def program_on(fake: FakeCupy, monkeypatch: pytest.MonkeyPatch) -> CudaProgram:
    monkeypatch.setattr(module, "require", lambda *_: fake)
    program = CudaProgram(CASE.plan, Precision.FLOAT32, CupyDevice())
    program.load(CASE.state())
    program.bind(*CASE.data(np.float32))
    return program


def check_training(program: CudaProgram) -> None:
    reference, hyper = reference_of(CASE), Hyper(1, 0, np.full(3, 1e-3))
    for _ in range(2):
        expected = reference.train(np.arange(21), hyper)
        np.testing.assert_allclose(program.train(np.arange(21), hyper), expected, rtol=tolerance(CASE, np.float32))
    for name, value in reference.state().items():
        if "." not in name:
            assert_close(program.views()[name], value, tolerance(CASE, np.float32), name)
    codes = program.apply(CASE.data(np.float32).X, Mode.ENCODE)
    assert_close(codes, reference.apply(CASE.data().X, Mode.ENCODE), tolerance(CASE, np.float32))


def test_steps_are_graphs_captured_once(libraries: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeCupy(libraries)
    program = program_on(fake, monkeypatch)
    check_training(program)
    # Eight rows and five, in training and in encoding
    assert fake.calls.count("capture") == 4
    assert fake.calls.count("graph") == 2 * 3 + 3
    assert "launch" not in fake.calls
    compiled = [kernel for call in fake.calls if call[0] == "module" for kernel in call[1]]
    assert len(compiled) == len(set(compiled)), "a kernel is compiled once"
    program.close()
    assert not fake.host.memory


def test_data_that_stay_on_the_host_are_copied_on_a_stream_of_their_own(
    libraries: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeCupy(libraries)
    monkeypatch.setattr(data, "RESIDENT_SHARE", 0)
    check_training(program_on(fake, monkeypatch))
    assert ("wait", 7, 8) in fake.calls, "launches wait for what is copied ahead of them"


def test_without_graphs_it_says_so_once(
    libraries: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fake = FakeCupy(libraries, captures=False)
    with caplog.at_level(logging.WARNING, "narrows"):
        check_training(program_on(fake, monkeypatch))
    assert "launch" in fake.calls
    assert "graph" not in fake.calls
    (record,) = caplog.records
    assert "one by one and not as a graph: RuntimeError: cudaErrorStreamCaptureUnsupported" in record.getMessage()


def test_too_little_memory_is_one_clear_line(libraries: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OutOfMemoryError, match=r"MiB do not fit on <CUDA Device 0>, which has .* take a smaller batch"):
        program_on(FakeCupy(libraries, capacity=1000), monkeypatch)


@pytest.mark.skipif(importlib.util.find_spec("cupy") is not None, reason="CuPy is installed")
def test_without_cupy_the_extra_is_named() -> None:
    with pytest.raises(MissingExtraError, match=r"narrows\[cuda12\]"):
        CupyDevice()


def test_the_names_exist_in_cupy() -> None:
    cupy = pytest.importorskip("cupy", reason="CuPy is not installed")
    for owner, names in (
        (cupy.cuda.Stream, ("begin_capture", "end_capture", "synchronize", "record", "wait_event")),
        (cupy.cuda.Event, ("synchronize",)),
        (cupy.cuda, ("alloc", "alloc_pinned_memory")),
        (cupy, ("get_default_memory_pool",)),
        (cupy.cuda.Graph, ("launch",)),
        (cupy.cuda.Device, ("mem_info",)),
        (cupy.cuda.runtime, ("memcpyAsync", "memcpyHostToDevice", "memcpyDeviceToHost", "driverGetVersion")),
        (cupy.cuda.runtime, ("getDeviceCount", "getDeviceProperties")),
        (cupy.cuda.memory, ("OutOfMemoryError",)),
        (cupy.RawModule, ("get_function",)),
        (cupy.RawKernel, ("kernel",)),
    ):
        for name in names:
            assert hasattr(owner, name), f"{owner.__name__}.{name}"


def test_cupy_takes_operands_by_value() -> None:
    """A function of no kernel fails for want of a driver, after it has taken its arguments."""
    cupy = pytest.importorskip("cupy", reason="CuPy is not installed")
    if cupy.is_available():
        pytest.skip("with a GPU, tests/test_cuda_gpu.py launches kernels")
    function = cupy.cuda.function.Function.__new__(cupy.cuda.function.Function)
    stream = SimpleNamespace(ptr=0)
    with pytest.raises(TypeError, match="Unsupported type"):
        function((1,), (1,), (object(),), 0, stream)
    with pytest.raises(cupy.cuda.runtime.CUDARuntimeError):
        function((1,), (1,), (np.zeros((), LAUNCH_DTYPE),), 0, stream)
