"""Products with sparse rows."""

from __future__ import annotations

from typing import Any

import numpy as np

from ...plan.ops import OpCode
from ...plan.plan import LEARN
from ...plan.spec import Activation
from ...random import philox
from .activations import ACTIVATE
from .counts import size_factors
from .run import Array, Run, op
from .updates import descend


def masked_rows(run: Run, stream: int, level: float, size_sum: Array | None, scale: float, dtype: Any) -> Any:
    """Rows of X as CSR, normalised as in LOG_NORMALIZE if `size_sum` is given.

    In training, masking noise hits the same elements as in CORRUPT.
    """
    X = run.sources[0][run.rows].astype(dtype)
    if size_sum is not None:
        X.data = np.log1p(X.data * np.repeat(size_factors(size_sum, scale), np.diff(X.indptr)))
    if level > 0 and run.mode & LEARN:
        u = philox.uniform(run.seed, stream, run.step, *X.shape)
        rows = np.repeat(np.arange(X.shape[0]), np.diff(X.indptr))
        X.data[u[rows, X.indices] < level] = 0
    return X


@op(OpCode.SPARSE_DENSE)
def sparse_dense(
    run: Run,
    *,
    W: Array,
    b: Array,
    size_sum: Array | None,
    shift: Array | None,
    out: Array,
    pre: Array | None,
    activation: int,
    stream: int,
    level: float,
    scale: float,
) -> None:
    z = masked_rows(run, stream, level, size_sum, scale, W.dtype) @ W
    if shift is not None:
        z -= shift @ W
    z += b
    if pre is not None:
        pre[...] = z
    out[...] = ACTIVATE[Activation(activation)](z)


@op(OpCode.SPARSE_WGRAD)
def sparse_wgrad(run: Run, *, dz: Array, dW: Array, accumulate: int, **rows: Any) -> None:
    product = _sparse_outer(run, dz, **rows)
    dW[...] = dW + product if accumulate else product


@op(OpCode.SPARSE_WGRAD_UPDATE)
def sparse_wgrad_update(
    run: Run,
    *,
    dz: Array,
    size_sum: Array | None,
    shift: Array | None,
    stream: int,
    level: float,
    scale: float,
    **rule: Any,
) -> None:
    descend(run, _sparse_outer(run, dz, size_sum, shift, stream, level, scale), **rule)


def _sparse_outer(
    run: Run, dz: Array, size_sum: Array | None, shift: Array | None, stream: int, level: float, scale: float
) -> Array:
    product: Array = masked_rows(run, stream, level, size_sum, scale, dz.dtype).T @ dz
    if shift is not None:
        product -= shift.T @ dz.sum(axis=0, keepdims=True)
    return product
