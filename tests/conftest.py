"""Fixtures shared by the tests: the backends that can run here, files to read, the error of a command."""

from __future__ import annotations

import signal
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cli_runs import table
from data_files import FORMATS
from narrows import backends
from narrows.backends import BACKENDS, probe


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """Each backend in turn; one that cannot run here is skipped with its reason."""
    name: str = request.param
    found = probe(name)
    if not found.ok:
        pytest.skip(f"backend {name}: {found.reason}")
    return name


@pytest.fixture
def cpp() -> str:
    """For promises that the C++ backend alone makes."""
    found = probe("cpp")
    if not found.ok:
        pytest.skip(f"backend cpp: {found.reason}")
    return "cpp"


@pytest.fixture(autouse=True, scope="session")
def interruptible() -> None:
    """A shell starts its background jobs with SIGINT ignored, and children inherit that; the tests send it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Each format's file, written on first use."""
    folder = tmp_path_factory.mktemp("formats")

    def get(name: str) -> Path:
        path = folder / name
        return path if path.exists() else FORMATS[name][0](path)

    return get


@pytest.fixture
def npy(tmp_path):
    np.save(tmp_path / "x.npy", table())
    return tmp_path / "x.npy"


@pytest.fixture
def line(capsys, monkeypatch):
    """The one line that a failed command leaves on standard error, were it the first of its process."""
    monkeypatch.setattr(backends, "_announced", set())

    def read():
        out = capsys.readouterr()
        assert out.out == ""
        assert out.err.count("\n") == 1, out.err
        assert out.err.startswith("narrows: error: ")
        return out.err

    return read


@pytest.fixture(scope="session")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The CUDA kernels as host code, compiled for a precision when first asked for; see `cuda_device.build`."""
    from cuda_device import build, compiler

    try:
        compiler()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    return cache(partial(build, "host.cpp", tmp_path_factory.mktemp("cuda_host")))
