"""Fixtures of all tests, and what is collected: only tests that can run on this machine.

The whole suite (``pytest`` without paths) runs in one process for each CPU, at most eight. That needs pytest-xdist. A
machine with a GPU runs the suite in one process, because the processes would share the GPU's memory. Files and folders
given by name run in one process. ``-n 0`` runs everything in one process.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

# Threads that spin while they wait for work take the CPU from threads that have work. OpenMP, Numba and scikit-learn
# each have a pool of threads. OpenBLAS reads its number of threads when it is loaded: a plugin may have loaded NumPy's.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "agg")  # figures open no windows

import numpy as np
import pytest
from threadpoolctl import threadpool_limits

from cli_runs import table
from data_files import FORMATS
from narrows import backends
from narrows.backends import BACKENDS, probe

ROOT = Path(__file__).parents[1]
threadpool_limits(1, user_api="blas")

PROBES = {name: probe(name) for name in BACKENDS}
AVAILABLE = [name for name, found in PROBES.items() if found.ok]


def missing() -> dict[str, str]:
    """Fixtures that cannot be provided here, and the reason. Tests that use one of them are not collected."""
    found = {}
    if not PROBES["cpp"].ok:
        found["cpp"] = f"no C++ backend: {PROBES['cpp'].reason}"
    if sys.platform != "linux" or not (shutil.which("g++") or shutil.which("clang++")):
        found["libraries"] = "CUDA kernels run on the CPU only on Linux with g++ or clang++"
    if not (ROOT / ".ci").exists():
        found["repository"] = "not a checkout of the repository"
    return found


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Run the whole suite in several processes."""
    option = config.option
    whole = config.args_source is pytest.Config.ArgsSource.TESTPATHS and not option.collectonly
    asked = getattr(option, "numprocesses", 0) is not None or option.dist != "no"
    # A worker process gets neither option. It must not start workers of its own.
    if whole and not asked and "PYTEST_XDIST_WORKER" not in os.environ and not PROBES["cuda"].ok:
        # Tests next to each other share compiled and cached things: a worker gets long runs of tests.
        option.numprocesses, option.dist, option.maxprocesses = "auto", "worksteal", option.maxprocesses or 8


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the tests that cannot run here; the header of the report says which and why."""
    absent = missing().keys()

    def runs(item: pytest.Item) -> bool:
        return absent.isdisjoint(getattr(item, "fixturenames", ()))

    left_out = [item for item in items if not runs(item)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if runs(item)]


def pytest_report_header() -> list[str]:
    without = [f"{name} ({found.reason})" for name, found in PROBES.items() if not found.ok]
    lines = [f"backends: {', '.join(AVAILABLE)}" + (f"; not here: {', '.join(without)}" if without else "")]
    return lines + [f"tests of {name!r} are left out: {reason}" for name, reason in missing().items()]


@pytest.fixture(params=AVAILABLE)
def backend(request: pytest.FixtureRequest) -> str:
    """Each backend that can run here, the reference included."""
    name: str = request.param
    return name


@pytest.fixture(params=[name for name in AVAILABLE if name != "reference"])
def fast_backend(request: pytest.FixtureRequest) -> str:
    """Each backend that can run here, for tests that compare it with the reference."""
    name: str = request.param
    return name


@pytest.fixture
def cpp() -> str:
    """For tests of the C++ backend alone."""
    return "cpp"


@pytest.fixture
def repository() -> Path:
    """For tests of files that are in the repository but not in a source distribution."""
    return ROOT


@pytest.fixture(autouse=True)
def closed_figures() -> Iterator[None]:
    """pyplot keeps each new figure until it is closed, and warns after twenty."""
    yield
    if (pyplot := sys.modules.get("matplotlib.pyplot")) is not None:
        pyplot.close("all")


@pytest.fixture(autouse=True, scope="session")
def interruptible() -> None:
    """Restore Ctrl-C: a shell starts background jobs with SIGINT ignored, children inherit that, and tests send it."""
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
    """Read the single line that a failed command prints on standard error."""
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
    """The CUDA kernels as host code, one library per precision; see `cuda_device.build`."""
    from cuda_device import build

    # The folders of the workers of one run lie side by side.
    folder = tmp_path_factory.getbasetemp()
    folder = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "cuda_host"
    folder.mkdir(exist_ok=True)
    return cache(partial(build, "host.cpp", folder))
