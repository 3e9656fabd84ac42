"""The probe of the CUDA backend: whether it can run here, and the message if it cannot. Probing is cheap."""

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
    """The part of CuPy's runtime that `probe` calls."""

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
        """The version of NVRTC, which is missing if there are more than two devices."""
        if self.devices > 2:
            raise RuntimeError('Failure finding "libnvrtc.so.12"')
        return 12, 9


@pytest.mark.parametrize(
    ("runtime", "reason"),
    [
        (None, r"CuPy is missing: pip install 'narrows\[cuda12\]'"),
        (Runtime(0), "no NVIDIA driver"),
        (Runtime(11080), r"the NVIDIA driver is for CUDA 11\.8: install a driver for CUDA 12\.0 or newer"),
        (Runtime(12040, 0), "no NVIDIA GPU"),
        (Runtime(12040, -1), r"no usable NVIDIA GPU: RuntimeError: cudaErrorNoDevice: [\w -]+$"),
        (Runtime(12040, -2), "no usable NVIDIA GPU: .* a forked process cannot use CUDA if its parent does: .* spawn"),
        (Runtime(13000, 3), r"NVRTC, .* does not load: pip install 'narrows\[cuda12\]'.* Failure finding"),
        (Runtime(13000, cupy="12.3.0"), r"CuPy 12\.3\.0 is too old, it must be 13\.0 or newer: pip install"),
        (Runtime(12040, 1, (7, 0)), r"GPU has compute capability 7\.0; narrows needs 7\.5 or newer"),
    ],
    ids=["no CuPy", "no driver", "old driver", "no GPU", "none usable", "forked", "no NVRTC", "old CuPy", "old GPU"],
)
def test_the_probe_names_what_is_missing(monkeypatch: pytest.MonkeyPatch, runtime: Any, reason: str) -> None:
    with_cupy(monkeypatch, runtime)
    found = cuda.probe()
    assert not found.ok
    assert not found.absent
    assert re.match(reason, found.reason)


def test_the_probe_names_missing_headers(monkeypatch: pytest.MonkeyPatch) -> None:
    with_cupy(monkeypatch, Runtime(12090))
    found, where = importlib.import_module, ["/usr/include"]
    pathfinder = SimpleNamespace(find_nvidia_header_directory=lambda name: where[0])
    monkeypatch.setattr(importlib, "import_module", lambda n, *of: pathfinder if "pathfinder" in n else found(n, *of))
    assert cuda.probe().ok
    where[0] = None
    assert cuda.probe() == Probe(False, f"CUDA's headers, which CuPy needs, are missing: {cuda.EXTRA}")


def test_the_probe_names_a_driver_older_than_cupy(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = Runtime(12040)
    monkeypatch.setattr(runtime, "runtimeGetVersion", lambda: 13020)
    with_cupy(monkeypatch, runtime)
    assert re.match(
        r"the NVIDIA driver is for CUDA 12\.4, CuPy for CUDA 13: install a newer driver, or CuPy for CUDA 12, ",
        cuda.probe().reason,
    )


def test_a_new_enough_gpu_is_usable(monkeypatch: pytest.MonkeyPatch) -> None:
    with_cupy(monkeypatch, Runtime(12090, 2))
    found = cuda.probe()
    assert found.ok
    assert re.match(r"GPU, CUDA 12\.9, (cuBLAS 12\.|without cuBLAS, wide layers are slower: )", found.reason)
    with_cupy(monkeypatch, Runtime(12090, 2, cupy="14.1.1"))
    found = cuda.probe()
    assert found.ok
    assert found.reason.endswith("; CuPy 14.1.1 compiles the kernels in each process, CuPy 14.2 keeps them")


@pytest.mark.parametrize("runtime", [None, Runtime(12090)], ids=["alone", "with CuPy"])
def test_a_missing_gpu_is_reported_only_with_cupy(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, runtime: Any
) -> None:
    with_cupy(monkeypatch, runtime, gpu=False)
    found = cuda.probe()
    assert (found.ok, found.absent) == (False, runtime is None)
    check_what_auto_says(monkeypatch, caplog, "INFO" if runtime is None else "WARNING", found.reason)


@pytest.mark.parametrize("value", ["", " ", "-1", "NoDevFiles"])
def test_a_hidden_gpu_is_not_searched(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, value: str
) -> None:
    with_cupy(monkeypatch, Runtime(12090))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    assert cuda.probe() == Probe(False, f"CUDA_VISIBLE_DEVICES={value!r} hides every GPU", absent=True)
    check_what_auto_says(monkeypatch, caplog, "INFO", "hides every GPU")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert cuda.probe().ok


def test_an_unusable_gpu_is_reported_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
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
    # A layer on CPU arrays stays on the CPU.
    assert host_backend.__wrapped__() in AUTO[1:]


def build_driver(folder: Path, answer: int) -> str:
    """A library with the first function of the driver."""
    source, library = folder / f"driver{answer}.c", folder / f"driver{answer}.so"
    source.write_text(f"int cuInit(unsigned flags) {{ (void)flags; return {answer}; }}\n")
    subprocess.run([compiler(), "-shared", "-fPIC", "-x", "c", str(source), "-o", str(library)], check=True)
    return str(library)


def test_probing_imports_nothing(tmp_path: Path) -> None:
    assert not cuda.has_gpu(str(tmp_path), "no such driver")
    for answer in (100, 0):  # no device; success
        library = build_driver(tmp_path, answer)
        assert cuda.has_gpu(str(tmp_path / "none"), library) == (answer == 0)
    (tmp_path / "nvidiactl").touch()
    assert cuda.has_gpu(str(tmp_path), "no such driver")
    if cuda.has_gpu():
        pytest.skip("this machine has a GPU")
    code = """
import sys
from narrows.backends import resolve
resolve("auto")
print("cupy" in sys.modules, "narrows.backends.cuda.program" in sys.modules)
"""
    environment = {name: value for name, value in os.environ.items() if name != "NARROWS_BACKEND"}
    environment["PYTHONPATH"] = os.pathsep.join(str(Path(p).resolve()) for p in sys.path if p)
    found = subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True)
    assert found.stdout.split() == ["False", "False"]


def with_cupy(monkeypatch: pytest.MonkeyPatch, runtime: Any, *, gpu: bool = True) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(cuda, "has_gpu", lambda: gpu)
    cupy = None
    if runtime is not None:
        cupy = SimpleNamespace(__version__=runtime.cupy, cuda=SimpleNamespace(runtime=runtime, nvrtc=runtime))
    monkeypatch.setattr(cuda, "find_spec", lambda name: cupy)
    found = importlib.import_module
    monkeypatch.setattr(importlib, "import_module", lambda name, *of: cupy if name == "cupy" else found(name, *of))
