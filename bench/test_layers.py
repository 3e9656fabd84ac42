"""Single fused layers from 16 to 4096 wide, beside NumPy: ``pytest bench``."""

from __future__ import annotations

import numpy as np
import pytest

from narrows import functional

ROWS = 256


@pytest.mark.parametrize("width", [16, 64, 256, 1024, 4096])
@pytest.mark.parametrize("what", ["narrows", "numpy"])
def test_dense_relu(benchmark, what: str, width: int) -> None:
    X, W, b = operands(width)
    if what == "narrows":
        out = np.empty((ROWS, width), np.float32)
        benchmark(functional.dense, X, W, b, "relu", out=out)
    else:
        benchmark(lambda: np.maximum(X @ W + b, 0))
    benchmark.extra_info["gflop"] = 2 * ROWS * width * width / 1e9


@pytest.mark.parametrize("width", [16, 64, 256, 1024, 4096])
@pytest.mark.parametrize("what", ["narrows", "numpy"])
def test_dense_relu_backward(benchmark, what: str, width: int) -> None:
    X, W, b = operands(width)
    A = functional.dense(X, W, b, "relu")
    if what == "narrows":
        benchmark(functional.dense_backward, A, X, W, A, "relu")
    else:

        def backward():
            dZ = A * (A > 0)
            return dZ @ W.T, X.T @ dZ, dZ.sum(axis=0)

        benchmark(backward)
    benchmark.extra_info["gflop"] = 4 * ROWS * width * width / 1e9


def operands(width: int):
    rng = np.random.default_rng(0)
    return (rng.standard_normal(s, dtype=np.float32) for s in ((ROWS, width), (width, width), (width,)))
