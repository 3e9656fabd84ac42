"""What the Numba backend promises of its own: kernels without a cache, exact thresholds, BLAS left alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest

import narrows
from narrows.backends import Hyper, compile_plan
from narrows.plan.plan import Mode
from networks import Case, network


def double(x: Any) -> Any:
    return x * 2


@pytest.mark.parametrize("fault", ["no folder", "no room"])
def test_numba_without_a_cache_folder(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    """No folder to cache in is a RuntimeError when a kernel is made, no room in it an OSError of its first call."""
    from narrows.backends.numba import kernels

    if fault == "no folder":
        monkeypatch.setattr(kernels._Places, "_locator_classes", [])
    else:
        monkeypatch.setattr(kernels._Cache, "save_overload", Mock(side_effect=OSError(122, "Disk quota exceeded")))
    kernel = kernels._Kernel(double, kernels._EXACT)
    assert kernel(21) == 42
    assert kernel(4) == 8
    assert fault == "no folder" or kernels._Cache.save_overload.called


def test_numba_caches_nothing_in_the_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """`pip uninstall` removes only the files that it installed. A folder with others would still be importable."""
    from narrows.backends.numba import kernels

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path))
    kernel = kernels._Kernel(kernels.momentum._run.py_func, kernels._EXACT)
    kernel(*np.ones((4, 3), np.float32)[:3], *np.ones(3, np.float32))
    cached = Path(kernel._run.stats.cache_path)
    assert list(cached.glob("*.nbi"))
    assert not cached.is_relative_to(Path(narrows.__file__).parent)


@pytest.mark.parametrize("p", [0.0, 1e-9, 2.0**-25, 2.0**-24, 0.1, 0.25, 1 / 3, 0.5, 0.9, 1 - 2.0**-25, 1.0])
def test_numba_takes_the_cells_below_a_probability(p: float) -> None:
    """Integer thresholds decide ``u < p`` as the uniform numbers do, on both sides of the edge."""
    from narrows.backends.numba.ops import _threshold, numba_kernels

    around = np.clip(int(p * 2**24) + np.arange(-3, 4), 0, 2**24 - 1)
    cells = around.astype(np.int32)[None]
    below = (cells + 0.5) * 2.0**-24 < p
    replaced, scaled = np.ones(cells.shape), np.ones(cells.shape)
    numba_kernels.replace_below(replaced, cells, _threshold(p), 5.0)
    numba_kernels.scale_above(scaled, cells, _threshold(p), 2.0)
    np.testing.assert_array_equal(replaced, np.where(below, 5.0, 1.0))
    np.testing.assert_array_equal(scaled, np.where(below, 0.0, 2.0))


def test_numba_puts_the_blas_threads_back() -> None:
    from threadpoolctl import threadpool_info

    def blas_threads() -> list[int]:
        return [pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"]

    before = blas_threads()
    case = Case("threads", network((7, 4, 7)))
    program = compile_plan(case.plan, "numba", n_threads=1)
    program.load(case.state())
    X = case.data(np.float32).X
    program.bind(X)
    inside: list[list[int]] = []
    program.train(np.arange(8), Hyper(0, 0, np.ones(1)), lambda: bool(inside.append(blas_threads())))
    program.apply(X, Mode.ENCODE)
    assert inside == [[1] * len(before)]
    assert blas_threads() == before
