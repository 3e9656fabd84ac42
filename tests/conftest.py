"""Fixtures shared by the tests: the backends that can run here, files to read, the error of a command.

The whole suite (``pytest`` without paths) runs in a process for each CPU, at most eight, if there is pytest-xdist and
no GPU, whose memory they would share. Files and folders by name run in one process, as everything does with ``-n 0``.
"""

from __future__ import annotations

import os
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

# Threads that spin while they wait for work take the CPU from those that have some: OpenMP has several pools, Numba's
# and scikit-learn's among them. None is there yet.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Have the whole suite run by workers."""
    option = config.option
    whole = config.args_source is pytest.Config.ArgsSource.TESTPATHS and not option.collectonly
    asked = getattr(option, "numprocesses", 0) is not None or option.dist != "no"
    # A worker is told neither, and would have workers of its own.
    if whole and not asked and "PYTEST_XDIST_WORKER" not in os.environ and not probe("cuda").ok:
        # Neighbours share what is compiled and cached, hence long runs of tests for a worker, and no scattered ones.
        option.numprocesses, option.dist, option.maxprocesses = "auto", "worksteal", option.maxprocesses or 8
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


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
    # The workers of a run have folders side by side.
    folder = tmp_path_factory.getbasetemp()
    folder = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "cuda_host"
    folder.mkdir(exist_ok=True)
    return cache(partial(build, "host.cpp", folder))
