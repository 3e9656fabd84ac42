"""CuPy itself, where it is installed: it has the names and takes the arguments that `fake_cupy` stands for."""

from __future__ import annotations

import ctypes
import inspect
import operator
from types import SimpleNamespace

import numpy as np
import pytest

from fake_cupy import FUNCTIONS, METHODS, NAMES
from narrows.backends.cuda.table import LAUNCH_DTYPE
from nvrtc import CUPYS

cupy = pytest.importorskip("cupy", reason="CuPy is not installed")


def test_the_names_exist_in_cupy() -> None:
    for path, names in NAMES.items():
        owner = operator.attrgetter(path)(cupy) if path else cupy
        for name in names:
            assert hasattr(owner, name), f"cupy.{path}.{name}"
    for name in (*METHODS, *FUNCTIONS):
        owner = cupy.ndarray if name in METHODS else cupy
        assert hasattr(owner, name), f"{owner.__name__}.{name}"


def test_cupy_compiles_with_the_flags_that_the_tests_compile_with() -> None:
    source = inspect.getsource(cupy.cuda.compiler)
    for flag in CUPYS:
        assert f"'{flag}'" in source


def test_cupy_accepts_plain_integers() -> None:
    """Without a GPU, calls accept their arguments and then fail because there is no driver."""
    if cupy.is_available():
        pytest.skip("with a GPU, tests/cuda/test_gpu.py makes such calls")
    runtime = cupy.cuda.runtime
    for call, *arguments in (
        (runtime.memcpyAsync, 2**40, 2**40, 8, runtime.memcpyHostToDevice, 7),
        (runtime.memcpy2DAsync, 2**40, 16, 2**40, 16, 8, 2, runtime.memcpyDeviceToDevice, 7),
        (cupy.cuda.alloc, 8),
        (cupy.cuda.alloc_pinned_memory, 8),
        (cupy.empty, (3, 2), np.dtype(np.float32)),
    ):
        with pytest.raises(runtime.CUDARuntimeError):
            call(*arguments)
    with pytest.raises(TypeError):
        runtime.memcpyAsync(np.uint64(2**40), 2**40, 8, runtime.memcpyHostToDevice, 7)
    assert runtime.driverGetVersion() == 0
    # The capture mode must allow allocations meanwhile.
    assert "streamCaptureModeRelaxed" in cupy.cuda.Stream.begin_capture.__doc__


def test_cupy_takes_operands_by_value() -> None:
    """A function without a kernel accepts its arguments and then fails because there is no driver."""
    if cupy.is_available():
        pytest.skip("with a GPU, tests/cuda/test_gpu.py launches kernels")
    function = cupy.cuda.function.Function.__new__(cupy.cuda.function.Function)
    stream = SimpleNamespace(ptr=0)
    with pytest.raises(TypeError, match="Unsupported type"):
        function((1,), (1,), (object(),), 0, stream)
    operands = np.zeros((), LAUNCH_DTYPE)
    with pytest.raises(cupy.cuda.runtime.CUDARuntimeError):
        function((1,), (1,), (operands,), 0, stream)
    # A kernel reads them there: a Cython object has a head, then its functions and the address.
    taken = cupy.cuda.function.CNumpyArray(operands)
    words = (ctypes.c_size_t * 4).from_address(id(taken))
    assert operands.ctypes.data in words
    del taken
