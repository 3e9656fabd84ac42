"""Squared error against sparse rows, without an array of batch x features."""

from __future__ import annotations

from typing import Any

import numpy as np

from ...plan.ops import GRAM_GUARD, OpCode
from ...plan.plan import LEARN
from ...plan.spec import Activation
from .activations import DERIVATIVE
from .run import Array, Run, op, row_share
from .updates import decayed_step, step_rule

# Let V = [W; b], g = [h 1], Q = V V' and p = y V'. The loss of a row y is |g V - y|^2 = g Q g' - 2 g p' + |y|^2.
# Its derivatives are 2 (g Q - p) by g and 2 g' (g V - y) by V. Sums use float64, whatever the type of the slots.


def with_bias(W: Array, b: Array) -> Array:
    return np.vstack([W, b]).astype(np.float64)


def with_one(h: Array) -> Array:
    return np.column_stack([h, np.ones(len(h), h.dtype)]).astype(np.float64)


@op(OpCode.WEIGHT_GRAM)
def weight_gram(run: Run, *, W: Array, b: Array, high: Array, low: Array) -> None:
    V = with_bias(W, b)
    Q = V @ V.T
    high[...] = Q
    low[...] = Q - high


@op(OpCode.SPARSE_MSE)
def sparse_mse(
    run: Run,
    *,
    h: Array,
    W: Array,
    b: Array,
    high: Array,
    low: Array,
    saved: Array,
    weight: Array | None,
    rowloss: Array,
    out: Array,
    source: int,
    activation: int,
    scale: float,
) -> None:
    y = run.sources[source][run.rows].astype(np.float64)
    V, g, Q = with_bias(W, b), with_one(h), high.astype(np.float64) + low
    p, gQ = y @ V.T, g @ Q
    square = np.asarray(y.multiply(y).sum(axis=1)).reshape(-1)
    value, dg = (g * (gQ - 2 * p)).sum(axis=1) + square, 2 * (gQ - p)
    for i in np.flatnonzero(value < GRAM_GUARD * square):
        residual = g[i] @ V - y[[i]].toarray()[0]
        value[i], dg[i] = residual @ residual, 2 * residual @ V.T
    rowloss[:, 0] = value
    if run.mode & LEARN:
        share = row_share(run, weight, 1.0, np.float64)
        out[...] = share * dg[:, : out.shape[1]] * DERIVATIVE[Activation(activation)](saved * saved.dtype.type(scale))


@op(OpCode.ROW_GRAM)
def row_gram(run: Run, *, h: Array, weight: Array | None, out: Array) -> None:
    g = with_one(h)
    out[...] = 2 * (row_share(run, weight, 1.0, np.float64) * g).T @ g


def _sparse_mse_gradient(
    run: Run, h: Array, gram: Array, weight: Array | None, W: Array, b: Array, source: int
) -> tuple[Array, Array]:
    """The derivatives by W and by b."""
    y = run.sources[source][run.rows].astype(np.float64)
    scaled = 2 * row_share(run, weight, 1.0, np.float64) * with_one(h)
    dV = (gram.astype(np.float64) @ with_bias(W, b) - (y.T @ scaled).T).astype(W.dtype)
    return dV[:-1], dV[-1:]


@op(OpCode.SPARSE_MSE_WGRAD)
def sparse_mse_wgrad(
    run: Run, *, h: Array, gram: Array, weight: Array | None, W: Array, b: Array, dW: Array, db: Array, source: int
) -> None:
    dW[...], db[...] = _sparse_mse_gradient(run, h, gram, weight, W, b, source)


@op(OpCode.SPARSE_MSE_UPDATE)
def sparse_mse_update(
    run: Run,
    *,
    h: Array,
    gram: Array,
    weight: Array | None,
    W: Array,
    b: Array,
    b_moment1: Array,
    b_moment2: Array | None,
    shift: Array | None,
    source: int,
    solver: int,
    beta_1: float,
    beta_2: float,
    epsilon: float,
    **rule: Any,
) -> None:
    dW, db = _sparse_mse_gradient(run, h, gram, weight, W, b if shift is None else b + shift, source)
    decayed_step(run, W, dW, solver=solver, beta_1=beta_1, beta_2=beta_2, epsilon=epsilon, **rule)
    step_rule(run, b, db, b_moment1, b_moment2, solver, beta_1, beta_2, epsilon)
