"""Data in, dense layers, losses and penalties: forward and backward."""

from __future__ import annotations

from typing import Any

import numpy as np

from ...plan.ops import CELL_ROWS, LANES, OpCode, Source
from ...plan.plan import Mode
from ...plan.spec import Activation, Corruption, Loss
from ...random import philox
from .activations import ACTIVATE, DERIVATIVE, sigmoid
from .run import Array, Run, op


def picked(run: Run, source: int) -> Array:
    """The current rows of a bound source, dense."""
    rows: Any = run.sources[source][run.rows]
    dense: Array = rows.toarray() if hasattr(rows, "toarray") else rows
    return dense


@op(OpCode.GATHER)
def gather(run: Run, *, shift: Array | None, out: Array, source: int) -> None:
    out[...] = picked(run, source).reshape(out.shape)
    if shift is not None:
        out -= shift


@op(OpCode.SHIFT)
def shift(run: Run, *, b: Array | None, out: Array) -> None:
    out[...] = run.sources[Source.SHIFT]
    if b is not None:
        out += b


@op(OpCode.CORRUPT)
def corrupt(run: Run, *, x: Array, kind: int, stream: int, level: float, low: float, high: float) -> None:
    if kind == Corruption.GAUSSIAN:
        x += (level * philox.normal(run.seed, stream, run.step, *x.shape)).astype(x.dtype)
        return
    u = philox.uniform(run.seed, stream, run.step, *x.shape)
    if kind == Corruption.MASKING:
        x[u < level] = 0
    else:
        x[u < level] = high
        x[u < level / 2] = low


@op(OpCode.DENSE)
def dense(
    run: Run, *, x: Array, W: Array, b: Array, out: Array, pre: Array | None, activation: int, transposed: int
) -> None:
    z = run.factor(x) @ run.factor(W.T if transposed else W) + b
    if pre is not None:
        pre[...] = z
    out[...] = ACTIVATE[Activation(activation)](z)


@op(OpCode.DROPOUT)
def dropout(run: Run, *, x: Array, stream: int, rate: float) -> None:
    keep = philox.uniform(run.seed, stream, run.step, *x.shape) >= rate
    x *= keep * x.dtype.type(1 / (1 - rate))


@op(OpCode.LINK)
def link(run: Run, *, z: Array, activation: int) -> None:
    z[...] = ACTIVATE[Activation(activation)](z)


@op(OpCode.LOSS)
def loss(
    run: Run,
    *,
    z: Array,
    target: Array,
    weight: Array | None,
    rowloss: Array,
    loss: int,
    activation: int,
    delta: float,
) -> None:
    value, dz = _loss_of_logits(Loss(loss), Activation(activation), z, target, delta)
    rowloss[:, 0] = value
    if run.mode & (Mode.TRAIN | Mode.GRADIENT):
        scale = z.dtype.type(1 / run.m)
        z[...] = dz * (scale if weight is None else scale * weight)


def _loss_of_logits(loss: Loss, activation: Activation, z: Array, y: Array, delta: float) -> tuple[Array, Array]:
    """Loss of each row and its derivative by the pre-activation z.

    With the matching link the stable joint form is used; otherwise the chain rule through the output.
    """
    if loss is Loss.BCE and activation is Activation.SIGMOID:
        # -y log p - (1 - y) log(1 - p), p = sigmoid(z)
        value = np.maximum(z, 0) - z * y + np.log1p(np.exp(-np.abs(z)))
        return value.sum(axis=1), sigmoid(z) - y
    if loss is Loss.MULTINOMIAL and activation is Activation.SOFTMAX:
        # -sum_j y_j log p_j, p = softmax(z); the multinomial coefficient does not depend on p, so it is left out
        shifted = z - z.max(axis=1, keepdims=True)
        log_p = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
        return -(y * log_p).sum(axis=1), np.exp(log_p) * y.sum(axis=1, keepdims=True) - y
    p = ACTIVATE[activation](z)
    if loss is Loss.MSE:
        value, dp = (p - y) ** 2, 2 * (p - y)
    elif loss is Loss.HUBER:
        # Huber (1964): quadratic within delta of the target, linear beyond
        d = p - y
        value = np.where(np.abs(d) <= delta, 0.5 * d * d, delta * (np.abs(d) - 0.5 * delta))
        dp = np.clip(d, -delta, delta)
    elif loss is Loss.BCE:
        # Logarithms stay above -100, so that p = 0 or 1 has a finite loss.
        tiny = z.dtype.type(np.exp(-100.0)) if z.dtype == np.float64 else np.finfo(z.dtype).tiny
        q = 1 - p
        value = -(y * np.log(np.maximum(p, tiny)) + (1 - y) * np.log(np.maximum(q, tiny)))
        dp = (1 - y) / np.maximum(q, tiny) - y / np.maximum(p, tiny)
    else:
        raise ValueError(f"loss {loss.name} does not take the output activation {activation.name}")
    if activation is Activation.SOFTMAX:
        return value.sum(axis=1), p * (dp - (p * dp).sum(axis=1, keepdims=True))
    saved = z if activation.needs_preactivation else p
    return value.sum(axis=1), dp * DERIVATIVE[activation](saved)


@op(OpCode.CONDITION)
def condition(run: Run, *, z: Array, out: Array) -> None:
    n = z.shape[1]
    number = picked(run, Source.CONDITION).reshape(-1, 1)
    check_numbers(number, out.shape[1] - n)
    out[:, :n] = z
    out[:, n:] = number == np.arange(out.shape[1] - n)


def check_numbers(number: Array, n_conditions: int) -> None:
    """Raise ValueError for the first batch number that the network does not know."""
    bad = ~((number >= 0) & (number < n_conditions) & (number == np.floor(number)))
    if bad.any():
        raise ValueError(f"batch number {number[bad][0]:g} is outside 0..{n_conditions - 1}")


@op(OpCode.WGRAD)
def wgrad(run: Run, *, x: Array, dz: Array, dW: Array, accumulate: int) -> None:
    product = run.factor(x).T @ run.factor(dz)
    dW[...] = dW + product if accumulate else product


@op(OpCode.COLSUM)
def colsum(run: Run, *, x: Array, weight: Array | None, out: Array, mean: int, accumulate: int) -> None:
    total = (x if weight is None else x * weight).sum(axis=0)
    total = total / run.m if mean else total
    out[0] = out[0] + total if accumulate else total


@op(OpCode.DGRAD)
def dgrad(
    run: Run, *, dz: Array, W: Array, saved: Array, out: Array, activation: int, transposed: int, scale: float
) -> None:
    slope = DERIVATIVE[Activation(activation)](saved * saved.dtype.type(scale))
    out[...] = (run.factor(dz) @ run.factor(W if transposed else W[: out.shape[1]].T)) * slope


@op(OpCode.ACTIVITY_L1)
def activity_l1(
    run: Run,
    *,
    a: Array,
    saved: Array,
    weight: Array | None,
    dz: Array,
    rowpenalty: Array,
    activation: int,
    strength: float,
) -> None:
    scale = a.dtype.type(strength / run.m)
    slope = np.sign(a) * DERIVATIVE[Activation(activation)](saved)
    dz += scale * slope * (1 if weight is None else weight)
    rowpenalty[:, 0] = a.dtype.type(strength) * np.abs(a).sum(axis=1)


@op(OpCode.KL_SPARSITY)
def kl_sparsity(
    run: Run,
    *,
    saved: Array,
    mean: Array,
    weight: Array | None,
    dz: Array,
    penalty: Array,
    activation: int,
    strength: float,
    target: float,
) -> None:
    # KL(target || mean) of Bernoulli variables for each unit (Ng, CS294A notes on sparse autoencoders, 2011)
    tiny = np.finfo(mean.dtype).eps
    rho = np.clip(mean, tiny, 1 - tiny)
    penalty[...] = strength * (target * np.log(target / rho) + (1 - target) * np.log((1 - target) / (1 - rho)))
    slope = ((1 - target) / (1 - rho) - target / rho) * mean.dtype.type(strength / run.m)
    dz += slope * DERIVATIVE[Activation(activation)](saved) * (1 if weight is None else weight)


@op(OpCode.DECAY)
def decay(run: Run, *, W: Array, dW: Array, penalty: Array, l2: float, l1: float) -> None:
    # Divided by the rows of the step, as in scikit-learn's multilayer perceptrons
    s2, s1 = W.dtype.type(l2 / run.m), W.dtype.type(l1 / run.m)
    dW += s2 * W + s1 * np.sign(W)
    each = 0.5 * s2 * W * W + s1 * np.abs(W)
    rows = np.add.reduceat(each, np.arange(0, W.shape[0], CELL_ROWS), axis=0)
    penalty[...] = np.add.reduceat(rows, np.arange(0, W.shape[1], LANES), axis=1)
