"""Sums over rows, decays, clipping, and optimiser steps."""

from __future__ import annotations

from typing import Any

import numpy as np

from ...plan.ops import GRAIN, OpCode
from ...plan.plan import Region
from .contractive import column_decay
from .dense import decay
from .run import Array, Run, grain_total, op


@op(OpCode.REDUCE)
def reduce(run: Run, *, x: Array, weight: Array | None, terms: Array, index: int, mean: int) -> None:
    total = (x if weight is None else x * weight).sum(dtype=np.float64)
    terms[0, index] += total / run.m if mean else total


@op(OpCode.SQNORM)
def sqnorm(run: Run, *, partial: Array) -> None:
    g = run.regions[Region.GRADIENT]
    for i in range(partial.shape[1]):
        partial[0, i] = np.sum(g[i * GRAIN : (i + 1) * GRAIN] ** 2, dtype=np.float64)


@op(OpCode.SHRINK)
def shrink(run: Run, *, W: Array, rate: float) -> None:
    W *= W.dtype.type(1 - run.learning_rate * rate)


def step_rule(
    run: Run, W: Array, g: Array, m1: Array, m2: Array | None, solver: int, beta_1: float, beta_2: float, epsilon: float
) -> None:
    """Parameters and optimiser state after a step with gradient g."""
    T = W.dtype.type
    lr, t = run.learning_rate, run.step + 1
    if m2 is None:
        # With momentum (Polyak, 1964)
        m1[...] = T(beta_1 if run.momentum is None else run.momentum) * m1 - T(lr) * g
        W += m1
        return
    # Adam (Kingma and Ba, 2015), the bias corrections folded into two scalars
    m1[...] = T(beta_1) * m1 + T(1 - beta_1) * g
    m2[...] = T(beta_2) * m2 + T(1 - beta_2) * (g * g)
    rate, root = T(lr / (1 - beta_1**t)), T(1 / np.sqrt(1 - beta_2**t))
    W -= rate * m1 / (np.sqrt(m2) * root + T(epsilon))


@op(OpCode.UPDATE)
def update(
    run: Run, *, partial: Array | None, solver: int, beta_1: float, beta_2: float, epsilon: float, clip: float
) -> None:
    W, g, m1 = (run.regions[r] for r in (Region.PARAMETER, Region.GRADIENT, Region.MOMENT1))
    if partial is not None:
        g = g * W.dtype.type(clip_scale(float(partial.sum(dtype=np.float64)), clip))
    step_rule(run, W, g, m1, run.regions.get(Region.MOMENT2), solver, beta_1, beta_2, epsilon)


@op(OpCode.WGRAD_UPDATE)
def wgrad_update(run: Run, *, x: Array, dz: Array, **rule: Any) -> None:
    descend(run, run.factor(x).T @ run.factor(dz), **rule)


def descend(run: Run, g: Array, *, dW: Array | None, W: Array, colrate: Array | None, **rule: Any) -> None:
    """The decays and the step of a weight; g is the last product of its gradient."""
    if dW is not None:
        g += dW
    if colrate is not None:
        column_decay(run, W=W, colrate=colrate, dW=g)
    decayed_step(run, W, g, **rule)


def decayed_step(
    run: Run,
    W: Array,
    g: Array,
    *,
    moment1: Array,
    moment2: Array | None,
    penalty: Array | None,
    solver: int,
    beta_1: float,
    beta_2: float,
    epsilon: float,
    l2: float,
    l1: float,
    rate: float,
) -> None:
    """Add a weight's penalties to its gradient, decay it, and step."""
    if penalty is not None:
        decay(run, W=W, dW=g, penalty=penalty, l2=l2, l1=l1)
    if rate:
        shrink(run, W=W, rate=rate)
    step_rule(run, W, g, moment1, moment2, solver, beta_1, beta_2, epsilon)


@op(OpCode.GRAIN_UPDATE)
def grain_update(run: Run, *, partial: Array, W: Array, column: int, **rule: Any) -> None:
    decayed_step(run, W, grain_total(partial, column, W.shape), **rule)


@op(OpCode.COLSUM_UPDATE)
def colsum_update(
    run: Run,
    *,
    x: Array,
    db: Array | None,
    b: Array,
    moment1: Array,
    moment2: Array | None,
    solver: int,
    beta_1: float,
    beta_2: float,
    epsilon: float,
) -> None:
    g = x.sum(axis=0, keepdims=True)
    step_rule(run, b, g if db is None else g + db, moment1, moment2, solver, beta_1, beta_2, epsilon)


def clip_scale(sum_of_squares: float, clip: float) -> float:
    """The factor that reduces a gradient to norm `clip`; 1 if its norm is smaller."""
    norm = float(np.sqrt(sum_of_squares))
    return min(1.0, clip / (norm + 1e-6))
