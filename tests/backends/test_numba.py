"""What the Numba backend promises of its own: kernels without a cache, exact thresholds, BLAS left alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from narrows.backends import Hyper, compile_plan
from narrows.plan.plan import Mode
from networks import Case, network


@pytest.mark.parametrize("error", [RuntimeError, OSError])
def test_numba_without_a_cache_folder(monkeypatch: pytest.MonkeyPatch, error: type[Exception]) -> None:
    """No folder to cache in (RuntimeError when decorated), or no room in it (OSError on the first call)."""
    import numba

    from narrows.backends.numba.kernels import _EXACT, _Kernel

    original, calls = numba.njit, []

    def njit(*args: Any, cache: bool = False, **options: Any) -> Any:
        if cache and error is RuntimeError:
            raise RuntimeError("cannot cache function: no locator available")
        decorate = original(*args, **options)
        if not cache:
            return decorate

        def failing_once(function: Any) -> Any:
            jitted = decorate(function)

            def call(*arguments: Any) -> Any:
                calls.append(arguments)
                if len(calls) == 1:
                    raise OSError(122, "Disk quota exceeded")
                return jitted(*arguments)

            return call

        return failing_once

    monkeypatch.setattr(numba, "njit", njit)
    double = _Kernel(lambda x: x * 2, _EXACT)
    assert double(21) == 42
    assert double(4) == 8


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
