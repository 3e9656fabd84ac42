"""The calls of the CUDA backend to CuPy and their order, with a fake of CuPy that runs kernels on the host.

The tests say nothing on a GPU. `test_cupy` checks that CuPy has the names.
"""

from __future__ import annotations

import gc
import importlib.util
import logging
from typing import Any

import numpy as np
import pytest

from agreement import assert_close, reference_of, tolerance
from fake_cupy import FakeCupy
from narrows.backends import Hyper
from narrows.backends.cuda import data, device
from narrows.backends.cuda.device import CupyDevice
from narrows.backends.cuda.program import CudaProgram
from narrows.errors import BackendError, MissingExtraError, OutOfMemoryError
from narrows.plan.ops import source_folder
from narrows.plan.plan import Mode
from narrows.plan.spec import Activation, Loss, Precision
from networks import Case, network

CASE = Case("device", network((33, 9, 33), loss=Loss.BCE, output=Activation.SIGMOID, alpha=0.1), batch=8, rows=21)


def program_on(fake: FakeCupy, monkeypatch: pytest.MonkeyPatch) -> CudaProgram:
    fake.install(monkeypatch)
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
    assert gc.isenabled()
    assert fake.calls.count("graph") == 2 * 3 + 3
    assert "launch" not in fake.calls
    compiled = [kernel for call in fake.calls if call[0] == "module" for kernel in call[1]]
    assert len(compiled) == len(set(compiled)), "a kernel is compiled once"
    program.close()
    assert not fake.host.memory


def test_data_on_the_host_have_their_own_copy_stream(libraries: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeCupy(libraries)
    monkeypatch.setattr(data, "RESIDENT_SHARE", 0)
    check_training(program_on(fake, monkeypatch))
    assert ("wait", 7, 8) in fake.calls, "launches wait for what is copied ahead of them"


def test_without_graphs_one_warning_appears(
    libraries: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fake = FakeCupy(libraries, captures=False)
    with caplog.at_level(logging.WARNING, "narrows"):
        check_training(program_on(fake, monkeypatch))
    assert "launch" in fake.calls
    assert "graph" not in fake.calls
    (record,) = caplog.records
    assert (
        "one by one, because they could not be captured as a graph: RuntimeError: cudaErrorStreamCaptureUnsupported"
        in record.getMessage()
    )


def test_too_little_memory_is_a_one_line_error(libraries: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        OutOfMemoryError,
        match=r"network and its batches need .* MiB, but GPU 0 has only .* MiB free: set a smaller batch_size",
    ):
        program_on(FakeCupy(libraries, capacity=1000), monkeypatch)


def test_a_compiler_error_is_one_line(libraries: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeCupy(libraries)
    program = program_on(fake, monkeypatch)
    fake.log = "nvrtc: error: failed to open libnvrtc-builtins.so.13.0.\n  Make sure that it is installed.\n"
    line = r"NVRTC could not compile the CUDA kernels: nvrtc: error: .*13\.0\. Make sure that it is installed\.$"
    device._kernels.cache_clear()
    with pytest.raises(BackendError, match=line):
        program.train(np.arange(21), Hyper(1, 0, np.full(3, 1e-3)))


@pytest.mark.skipif(importlib.util.find_spec("cupy") is not None, reason="CuPy is installed")
def test_without_cupy_the_extra_is_named() -> None:
    with pytest.raises(MissingExtraError, match=r"narrows\[cuda12\]"):
        CupyDevice()


def test_the_sources_exist() -> None:
    assert (source_folder() / "cuda" / "narrows.cu").is_file()
    assert (source_folder() / "shared" / "functors.h").is_file()
