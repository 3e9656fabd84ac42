"""Single fused layers from 16 to 4096 wide, beside NumPy; on a GPU beside CuPy: ``pytest bench``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from narrows import functional
from narrows.backends import probe

ROWS = 256
widths = pytest.mark.parametrize("width", [16, 64, 256, 1024, 4096])
contenders = pytest.mark.parametrize("what", ["narrows", "numpy", "narrows on a GPU", "cupy"])


@widths
@contenders
def test_dense_relu(benchmark: Any, what: str, width: int) -> None:
    xp = arrays(what)
    X, W, b = operands(xp, width)
    if what.startswith("narrows"):
        out = xp.empty((ROWS, width), np.float32)
        benchmark(finished(xp, lambda: functional.dense(X, W, b, "relu", out=out)))
    else:
        benchmark(finished(xp, lambda: xp.maximum(X @ W + b, 0)))
    benchmark.extra_info["gflop"] = 2 * ROWS * width * width / 1e9


@widths
@contenders
def test_dense_relu_backward(benchmark: Any, what: str, width: int) -> None:
    xp = arrays(what)
    X, W, b = operands(xp, width)
    A = functional.dense(X, W, b, "relu")
    if what.startswith("narrows"):
        benchmark(finished(xp, lambda: functional.dense_backward(A, X, W, A, "relu")))
    else:

        def backward() -> tuple[Any, Any, Any]:
            dZ = A * (A > 0)
            return dZ @ W.T, X.T @ dZ, dZ.sum(axis=0)

        benchmark(finished(xp, backward))
    benchmark.extra_info["gflop"] = 4 * ROWS * width * width / 1e9


def arrays(what: str) -> Any:
    """The array library of a contender."""
    if what in ("narrows", "numpy"):
        return np
    found = probe("cuda")
    if not found.ok:
        pytest.skip(found.reason)
    import cupy

    return cupy


def operands(xp: Any, width: int) -> Iterator[Any]:
    rng = np.random.default_rng(0)
    shapes = (ROWS, width), (width, width), (width,)
    return (xp.asarray(rng.standard_normal(shape, dtype=np.float32)) for shape in shapes)


def finished(xp: Any, work: Callable[[], Any]) -> Callable[[], Any]:
    """`work`, followed by a wait until the GPU has finished it."""
    if xp is np:
        return work

    def run() -> Any:
        result = work()
        xp.cuda.get_current_stream().synchronize()
        return result

    return run
