"""Whether the CUDA backend can run here, what is said where it cannot, and that asking takes nothing."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cuda_device import compiler
from narrows import backends
from narrows.backends import AUTO, Probe, cuda, host_backend, resolve
from narrows.errors import BackendError


class Runtime:
    """What `probe` asks of CuPy's runtime."""

    def __init__(
        self, driver: int, devices: int = 1, capability: tuple[int, int] = (9, 0), cupy: str = "14.2.0"
    ) -> None:
        self.driver, self.devices, self.capability, self.cupy = driver, devices, capability, cupy

    def driverGetVersion(self) -> int:
        return self.driver

    def runtimeGetVersion(self) -> int:
        return 12090

    def getDeviceCount(self) -> int:
        if self.devices < 0:
            error = ("NoDevice: no CUDA-capable device is detected", "InitializationError: initialization error")
            raise RuntimeError(f"cudaError{error[self.devices + 1]}")
        return self.devices

    def getDevice(self) -> int:
        return self.devices - 1

    def getDeviceProperties(self, device: int) -> dict[str, Any]:
        assert device == self.devices - 1
        return {"name": b"GPU", "major": self.capability[0], "minor": self.capability[1]}

    def getVersion(self) -> tuple[int, int]:
        """Of NVRTC, which is not here if there are more than two devices."""
        if self.devices > 2:
            raise RuntimeError('Failure finding "libnvrtc.so.12"')
        return 12, 9


@pytest.mark.parametrize(
    ("runtime", "reason"),
    [
        (None, r"CuPy is missing: pip install 'narrows\[cuda12\]'"),
        (Runtime(0), "no NVIDIA driver"),
        (Runtime(11080), r"the NVIDIA driver is of CUDA 11\.8: install one of CUDA 12\.0 or newer"),
        (Runtime(12040, 0), "no NVIDIA GPU"),
        (Runtime(12040, -1), r"no usable NVIDIA GPU: RuntimeError: cudaErrorNoDevice: [\w -]+$"),
        (Runtime(12040, -2), "no usable NVIDIA GPU: .* a process forked from one that uses CUDA .* by spawn"),
        (Runtime(13000, 3), r"NVRTC, .* does not load: pip install 'narrows\[cuda12\]'.* Failure finding"),
        (Runtime(13000, cupy="12.3.0"), r"CuPy 12\.3\.0 is too old, it must be 13\.0 or newer: pip install"),
        (Runtime(12040, 1, (7, 0)), r"GPU has compute capability 7\.0: it must be 7\.5 or newer"),
    ],
    ids=["no CuPy", "no driver", "old driver", "no GPU", "none usable", "forked", "no NVRTC", "old CuPy", "old GPU"],
)
def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch, runtime: Any, reason: str) -> None:
    with_cupy(monkeypatch, runtime)
    found = cuda.probe()
    assert not found.ok
    assert not found.absent
    assert re.match(reason, found.reason)


def test_headers_that_are_missing_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with_cupy(monkeypatch, Runtime(12090))
    found, where = importlib.import_module, ["/usr/include"]
    pathfinder = SimpleNamespace(find_nvidia_header_directory=lambda name: where[0])
    monkeypatch.setattr(importlib, "import_module", lambda n, *of: pathfinder if "pathfinder" in n else found(n, *of))
    assert cuda.probe().ok
    where[0] = None
    assert cuda.probe() == Probe(False, f"CUDA's headers are missing, which CuPy needs: {cuda.EXTRA}")


def test_a_driver_older_than_cupy_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = Runtime(12040)
    monkeypatch.setattr(runtime, "runtimeGetVersion", lambda: 13020)
    with_cupy(monkeypatch, runtime)
    assert re.match(
        r"the NVIDIA driver is of CUDA 12\.4 and CuPy of CUDA 13: install a newer driver, or have CuPy for CUDA 12, ",
        cuda.probe().reason,
    )


def test_a_gpu_that_is_new_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    with_cupy(monkeypatch, Runtime(12090, 2))
    found = cuda.probe()
    assert found.ok
    assert re.match(r"GPU, CUDA 12\.9, (cuBLAS 12\.|without cuBLAS, wide layers are slower: )", found.reason)
    with_cupy(monkeypatch, Runtime(12090, 2, cupy="14.1.1"))
    found = cuda.probe()
    assert found.ok
    assert found.reason.endswith("; CuPy 14.1.1 compiles the kernels in each process, 14.2 keeps them")


@pytest.mark.parametrize("runtime", [None, Runtime(12090)], ids=["alone", "with CuPy"])
def test_a_machine_without_a_gpu_is_told_of_it_only_if_it_has_cupy(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, runtime: Any
) -> None:
    with_cupy(monkeypatch, runtime, gpu=False)
    found = cuda.probe()
    assert (found.ok, found.absent) == (False, runtime is None)
    check_what_auto_says(monkeypatch, caplog, "INFO" if runtime is None else "WARNING", found.reason)


@pytest.mark.parametrize("value", ["", " ", "-1", "NoDevFiles"])
def test_a_gpu_that_is_hidden_is_not_looked_for(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, value: str
) -> None:
    with_cupy(monkeypatch, Runtime(12090))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    assert cuda.probe() == Probe(False, f"CUDA_VISIBLE_DEVICES={value!r} hides every GPU", absent=True)
    check_what_auto_says(monkeypatch, caplog, "INFO", "hides every GPU")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert cuda.probe().ok


def test_a_gpu_that_cannot_be_used_is_told_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with_cupy(monkeypatch, None)
    check_what_auto_says(monkeypatch, caplog, "WARNING", "pip install 'narrows[cuda12]'")
    with pytest.raises(BackendError, match=r"backend='cuda' cannot run here: CuPy is missing: pip install"):
        resolve("cuda")
    monkeypatch.setenv("NARROWS_BACKEND", "cuda")
    with pytest.raises(BackendError, match=r"NARROWS_BACKEND='cuda' cannot run here: CuPy is missing"):
        resolve("auto")
    assert host_backend.__wrapped__() in AUTO[1:]


def check_what_auto_says(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, level: str, reason: str
) -> None:
    monkeypatch.delenv("NARROWS_BACKEND", raising=False)
    monkeypatch.setattr(backends, "_announced", set())
    with caplog.at_level("INFO", "narrows"):
        for _ in range(3):
            assert resolve("auto") in AUTO[1:]
    (record,) = caplog.records
    assert record.levelname == level
    assert "skipped cuda" in record.message
    assert reason in record.message


def test_auto_takes_the_gpu_first(monkeypatch: pytest.MonkeyPatch) -> None:
    with_cupy(monkeypatch, Runtime(12090))
    monkeypatch.delenv("NARROWS_BACKEND", raising=False)
    assert AUTO == ("cuda", "cpp", "numba")
    assert resolve("auto") == "cuda"
    # A layer of the CPU is worth no trip.
    assert host_backend.__wrapped__() in AUTO[1:]


def build_driver(folder: Path, answer: int) -> str:
    """A library with the driver's first function."""
    source, library = folder / f"driver{answer}.c", folder / f"driver{answer}.so"
    source.write_text(f"int cuInit(unsigned flags) {{ (void)flags; return {answer}; }}\n")
    subprocess.run([compiler(), "-shared", "-fPIC", "-x", "c", str(source), "-o", str(library)], check=True)
    return str(library)


def test_looking_for_a_gpu_imports_nothing_and_takes_no_time(tmp_path: Path) -> None:
    assert not cuda.has_gpu(str(tmp_path), "no such driver")
    for answer in (100, 0):  # no device; success
        library = build_driver(tmp_path, answer)
        assert cuda.has_gpu(str(tmp_path / "none"), library) == (answer == 0)
    (tmp_path / "nvidiactl").touch()
    assert cuda.has_gpu(str(tmp_path), "no such driver")
    if cuda.has_gpu():
        pytest.skip("this machine has a GPU")
    code = """
import sys, time
from narrows.backends import probe, resolve
probe("cpp"), probe("numba"), resolve("auto")
begin = time.perf_counter()
for _ in range(10):
    resolve("auto")
print((time.perf_counter() - begin) / 10, "cupy" in sys.modules, "narrows.backends.cuda.program" in sys.modules)
"""
    environment = {name: value for name, value in os.environ.items() if name != "NARROWS_BACKEND"}
    environment["PYTHONPATH"] = os.pathsep.join(str(Path(p).resolve()) for p in sys.path if p)
    found = subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True)
    seconds, *imported = found.stdout.split()
    assert imported == ["False", "False"]
    assert float(seconds) < 1e-3


def with_cupy(monkeypatch: pytest.MonkeyPatch, runtime: Any, *, gpu: bool = True) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(cuda, "has_gpu", lambda: gpu)
    cupy = None
    if runtime is not None:
        cupy = SimpleNamespace(__version__=runtime.cupy, cuda=SimpleNamespace(runtime=runtime, nvrtc=runtime))
    monkeypatch.setattr(cuda, "find_spec", lambda name: cupy)
    found = importlib.import_module
    monkeypatch.setattr(importlib, "import_module", lambda name, *of: cupy if name == "cupy" else found(name, *of))
