"""The executable specification: every op as the formula it stands for, in NumPy.

Promises: float64 by default, each op readable on its own, no cleverness; correct for any plan `lower` writes. Other
backends are right when they agree with this one.
Never: chosen by ``backend="auto"``; fast.

The ops are written over a dtype and the arrays they are handed, so the generic ops of other array backends are these.
Names follow `plan.SIGNATURES`; ``m`` is the number of rows of the batch at hand.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import philox
from ..plan import (
    CELL_ROWS,
    DISPERSION_PACE,
    DROPOUT_LIMIT,
    FROM_CODES,
    GRAIN,
    GRAM_GUARD,
    LANES,
    LEARN,
    LOG_DISPERSION_LIMIT,
    SIGNATURES,
    VARIANCE_FLOOR,
    Activation,
    Corruption,
    Loss,
    Mode,
    Op,
    OpCode,
    Plan,
    Precision,
    Region,
    Slot,
    Units,
    jacobian_segments,
    padded,
    segments,
)
from . import BATCH, SHIFT, Hyper, Probe, State, all_finite, copies, sparse_rows, told_apart
from .convolution import OUT_LAST, Images, greatest, pixels, windows

__all__ = ["OPS", "ReferenceProgram", "Run", "compile", "probe"]

Array = NDArray[Any]


@dataclass
class Run:
    """What an op may know besides its operands: the batch, the step and the flat regions."""

    rows: NDArray[np.int64]
    mode: Mode
    sources: Mapping[int, Any]
    seed: int = 0
    step: int = 0
    learning_rate: float = 0.0
    kl_factor: float = 1.0
    momentum: float | None = None
    regions: Mapping[Region, Array] = field(default_factory=dict)
    bfloat16: bool = False

    @property
    def m(self) -> int:
        return len(self.rows)

    def factor(self, x: Array) -> Array:
        """A factor of a matrix product, in the precision that products are made in."""
        return bfloat16(x) if self.bfloat16 else x


def bfloat16(x: Array) -> Array:
    """x rounded to bfloat16 (8 significant bits, to nearest, ties to even; subnormals become zero), in x's dtype."""
    with np.errstate(over="ignore"):
        single = np.ascontiguousarray(x, np.float32)
    bits = single.view(np.uint32)
    rounded = (bits + (np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1)))) & np.uint32(0xFFFF0000)
    rounded[np.abs(single) < np.finfo(np.float32).tiny] &= np.uint32(0x80000000)
    return np.where(np.isnan(single), single, rounded.view(np.float32)).astype(x.dtype, copy=False)


# --- activations ----------------------------------------------------------------------------------------------------

LEAK = 0.01
"""Slope of leaky_relu below zero (Maas et al., 2013)."""


def sigmoid(z: Array) -> Array:
    e = np.exp(-np.abs(z))
    s: Array = np.where(z >= 0, 1 / (1 + e), e / (1 + e))
    return s


def softplus(z: Array) -> Array:
    return np.maximum(z, 0) + np.log1p(np.exp(-np.abs(z)))


def softmax(z: Array) -> Array:
    e: Array = np.exp(z - z.max(axis=1, keepdims=True))
    p: Array = e / e.sum(axis=1, keepdims=True)
    return p


def normal_cdf(z: Array) -> Array:
    from scipy.special import ndtr

    cdf: Array = ndtr(z)
    return cdf


def normal_pdf(z: Array) -> Array:
    pdf: Array = np.exp(-0.5 * z * z) * z.dtype.type(1 / np.sqrt(2 * np.pi))
    return pdf


ACTIVATE: Mapping[Activation, Callable[[Array], Array]] = {
    Activation.LINEAR: lambda z: z,
    Activation.RELU: lambda z: np.maximum(z, 0),
    Activation.LEAKY_RELU: lambda z: np.where(z > 0, z, z.dtype.type(LEAK) * z),
    Activation.ELU: lambda z: np.where(z > 0, z, np.expm1(np.minimum(z, 0))),
    Activation.GELU: lambda z: z * normal_cdf(z),
    Activation.SILU: lambda z: z * sigmoid(z),
    Activation.SIGMOID: sigmoid,
    Activation.TANH: np.tanh,
    Activation.SOFTPLUS: softplus,
    Activation.EXP: np.exp,
    Activation.SOFTMAX: softmax,
}

DERIVATIVE: Mapping[Activation, Callable[[Array], Array]] = {
    # From the output a, except for gelu and silu: from the pre-activation z.
    Activation.LINEAR: np.ones_like,
    Activation.RELU: lambda a: (a > 0).astype(a.dtype),
    Activation.LEAKY_RELU: lambda a: np.where(a > 0, a.dtype.type(1), a.dtype.type(LEAK)),
    Activation.ELU: lambda a: np.where(a > 0, a.dtype.type(1), a + 1),
    Activation.GELU: lambda z: normal_cdf(z) + z * normal_pdf(z),
    Activation.SILU: lambda z: (s := sigmoid(z)) * (1 + z * (1 - s)),
    Activation.SIGMOID: lambda a: a * (1 - a),
    Activation.TANH: lambda a: (1 - a) * (1 + a),
    Activation.SOFTPLUS: lambda a: -np.expm1(-a),
    Activation.EXP: lambda a: a,
}

CURVATURE: Mapping[Activation, Callable[[Array], Array]] = {
    # The second derivative, from what the first is told from; 0 where it is not defined, as the slopes of such
    # activations are constant on either side.
    Activation.LINEAR: np.zeros_like,
    Activation.RELU: np.zeros_like,
    Activation.LEAKY_RELU: np.zeros_like,
    Activation.ELU: lambda a: np.where(a > 0, a.dtype.type(0), a + 1),
    Activation.GELU: lambda z: normal_pdf(z) * (2 - z * z),
    Activation.SILU: lambda z: (s := sigmoid(z)) * (1 - s) * (2 + z * (1 - 2 * s)),
    Activation.SIGMOID: lambda a: a * (1 - a) * (1 - 2 * a),
    Activation.TANH: lambda a: -2 * a * (1 - a) * (1 + a),
    Activation.SOFTPLUS: lambda a: -np.expm1(-a) * np.exp(-a),
    Activation.EXP: lambda a: a,
}


# --- ops: data in ---------------------------------------------------------------------------------------------------


def picked(run: Run, source: int) -> Array:
    """The rows of the batch of a bound source, dense."""
    rows: Any = run.sources[source][run.rows]
    dense: Array = rows.toarray() if hasattr(rows, "toarray") else rows
    return dense


def gather(run: Run, *, shift: Array | None, out: Array, source: int) -> None:
    out[...] = picked(run, source).reshape(out.shape)
    if shift is not None:
        out -= shift


def shift(run: Run, *, b: Array | None, out: Array) -> None:
    out[...] = run.sources[SHIFT]
    if b is not None:
        out += b


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


# --- ops: forward ---------------------------------------------------------------------------------------------------


def dense(
    run: Run, *, x: Array, W: Array, b: Array, out: Array, pre: Array | None, activation: int, transposed: int
) -> None:
    z = run.factor(x) @ run.factor(W.T if transposed else W) + b
    if pre is not None:
        pre[...] = z
    out[...] = ACTIVATE[Activation(activation)](z)


def dropout(run: Run, *, x: Array, stream: int, rate: float) -> None:
    keep = philox.uniform(run.seed, stream, run.step, *x.shape) >= rate
    x *= keep * x.dtype.type(1 / (1 - rate))


def link(run: Run, *, z: Array, activation: int) -> None:
    z[...] = ACTIVATE[Activation(activation)](z)


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
        # -sum_j y_j log p_j, p = softmax(z); the multinomial coefficient does not depend on p and is left out
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
        # Logarithms are held above -100, so that p = 0 or 1 costs a finite amount.
        tiny = z.dtype.type(np.exp(-100.0)) if z.dtype == np.float64 else np.finfo(z.dtype).tiny
        q = 1 - p
        value = -(y * np.log(np.maximum(p, tiny)) + (1 - y) * np.log(np.maximum(q, tiny)))
        dp = (1 - y) / np.maximum(q, tiny) - y / np.maximum(p, tiny)
    else:
        raise ValueError(f"loss {loss.name} has no form for the output activation {activation.name}")
    if activation is Activation.SOFTMAX:
        return value.sum(axis=1), p * (dp - (p * dp).sum(axis=1, keepdims=True))
    saved = z if activation.needs_preactivation else p
    return value.sum(axis=1), dp * DERIVATIVE[activation](saved)


def condition(run: Run, *, z: Array, out: Array) -> None:
    n = z.shape[1]
    number = picked(run, BATCH).reshape(-1, 1)
    check_numbers(number, out.shape[1] - n)
    out[:, :n] = z
    out[:, n:] = number == np.arange(out.shape[1] - n)


def check_numbers(number: Array, n_batches: int) -> None:
    """Refuse what is no number of a batch."""
    bad = ~((number >= 0) & (number < n_batches) & (number == np.floor(number)))
    if bad.any():
        raise ValueError(f"{number[bad][0]:g} is no number of one of {n_batches} batches")


# --- ops: backward --------------------------------------------------------------------------------------------------


def wgrad(run: Run, *, x: Array, dz: Array, dW: Array, accumulate: int) -> None:
    product = run.factor(x).T @ run.factor(dz)
    dW[...] = dW + product if accumulate else product


def colsum(run: Run, *, x: Array, weight: Array | None, out: Array, mean: int, accumulate: int) -> None:
    total = (x if weight is None else x * weight).sum(axis=0)
    total = total / run.m if mean else total
    out[0] = out[0] + total if accumulate else total


def dgrad(
    run: Run, *, dz: Array, W: Array, saved: Array, out: Array, activation: int, transposed: int, scale: float
) -> None:
    slope = DERIVATIVE[Activation(activation)](saved * saved.dtype.type(scale))
    out[...] = (run.factor(dz) @ run.factor(W if transposed else W[: out.shape[1]].T)) * slope


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


def decay(run: Run, *, W: Array, dW: Array, penalty: Array, l2: float, l1: float) -> None:
    # Divided by the batch size, as scikit-learn's multilayer perceptrons do
    s2, s1 = W.dtype.type(l2 / run.m), W.dtype.type(l1 / run.m)
    dW += s2 * W + s1 * np.sign(W)
    each = 0.5 * s2 * W * W + s1 * np.abs(W)
    rows = np.add.reduceat(each, np.arange(0, W.shape[0], CELL_ROWS), axis=0)
    penalty[...] = np.add.reduceat(rows, np.arange(0, W.shape[1], LANES), axis=1)


# --- ops: the contractive penalty (Rifai et al., ICML 2011) ----------------------------------------------------------


def row_share(run: Run, weight: Array | None, strength: float, dtype: Any) -> Array:
    """What each row's square counts, shape (m, 1)."""
    share = np.full((run.m, 1), strength / run.m, dtype)
    return share if weight is None else share * weight


def contractive(
    run: Run,
    *,
    saved: Array,
    noisy: Array | None,
    W: Array,
    weight: Array | None,
    dz: Array,
    colrate: Array,
    dnoisy: Array | None,
    penalty: Array,
    activation: int,
    accumulate_dz: int,
    accumulate_colrate: int,
    strength: float,
) -> None:
    derivative, curvature = DERIVATIVE[Activation(activation)], CURVATURE[Activation(activation)]
    share = row_share(run, weight, strength, W.dtype)
    slope = derivative(saved) if noisy is None else derivative(saved) - derivative(noisy)
    norms, squares = (W * W).sum(axis=0), (share * slope * slope).sum(axis=0)
    penalty[0] = norms * squares
    by_slope = 2 * share * norms * slope
    by_pre = by_slope * curvature(saved)
    dz[...] = dz + by_pre if accumulate_dz else by_pre
    if noisy is not None and dnoisy is not None:
        dnoisy[...] = -by_slope * curvature(noisy)
    colrate[0] = (colrate[0] if accumulate_colrate else 0) + 2 * squares


def column_decay(run: Run, *, W: Array, colrate: Array, dW: Array) -> None:
    dW += W * colrate


def gram(run: Run, *, W: Array, out: Array) -> None:
    out[...] = W.T @ W


def slopes(run: Run, *, saved: Array, out: Array, activation: int, column: int) -> None:
    out[:, column : column + saved.shape[1]] = DERIVATIVE[Activation(activation)](saved)


def jacobian(
    run: Run,
    *,
    slopes: Array,
    noisy: Array | None,
    gram: Array,
    W2: Array,
    W3: Array | None,
    W4: Array | None,
    weight: Array | None,
    dslopes: Array,
    partial: Array,
    dnoisy: Array | None,
    rowpenalty: Array,
    accumulate: int,
    strength: float,
) -> None:
    weights = [W for W in (W2, W3, W4) if W is not None]
    widths = [len(gram), *(W.shape[1] for W in weights)]
    columns, parts = segments(widths), jacobian_segments(widths)
    share = row_share(run, weight, strength, gram.dtype)
    passes = [(slopes, dslopes, 2.0)]
    if noisy is not None and dnoisy is not None:
        passes.append((noisy, dnoisy, -2.0))
    if not accumulate:
        dslopes[...] = 0
        partial[...] = 0
    if dnoisy is not None:
        dnoisy[...] = 0

    def part(i: int, rows: int, cols: int) -> Array:
        # All of the sums over rows go to the first grain.
        return partial[0, parts[i] : parts[i + 1]].reshape(rows, padded(cols))[:, :cols]

    chains = [_derivatives(weights, p, columns, widths) for p, _, _ in passes]
    B = chains[0][1][0] if noisy is None else chains[0][1][0] - chains[1][1][0]
    product = B @ gram
    rowpenalty[:, 0] = share[:, 0] * (B * product).sum(axis=(1, 2))
    rows = B.reshape(-1, widths[0])
    part(0, widths[0], widths[0])[...] += (rows * np.repeat(share, widths[-1], axis=0)).T @ rows
    for (p, dp, sign), (by_out, by_pre) in zip(passes, chains, strict=True):
        d = (gram.dtype.type(sign) * share[:, :, None]) * product  # by by_pre[0], then by those of the layers above
        for i, W in enumerate([*weights, None]):
            at = slice(columns[i], columns[i] + widths[i])
            dp[:, at] += (d * by_out[i]).sum(axis=1)
            if W is None:
                break
            d = d * p[:, None, at]
            above = by_pre[i + 1].reshape(-1, widths[i + 1])
            part(i + 1, widths[i + 1], widths[i])[...] += above.T @ d.reshape(-1, widths[i])
            d = d @ W


def _derivatives(
    weights: list[Array], slopes: Array, columns: list[int], widths: list[int]
) -> tuple[list[Array], list[Array]]:
    """Derivatives of the latents by the outputs and by the pre-activations of each layer, (rows, latents, units)."""
    p = [slopes[:, None, at : at + n] for at, n in zip(columns, widths, strict=False)]
    by_out = [np.broadcast_to(np.eye(widths[-1], dtype=slopes.dtype), (len(slopes), widths[-1], widths[-1]))]
    by_pre = [by_out[0] * p[-1]]
    for W, slope in zip(weights[::-1], p[-2::-1], strict=True):
        by_out.insert(0, by_pre[0] @ W.T)
        by_pre.insert(0, by_out[0] * slope)
    return by_out, by_pre


def curves(run: Run, *, dslopes: Array, saved: Array, dz: Array, activation: int, column: int, accumulate: int) -> None:
    by_pre = dslopes[:, column : column + saved.shape[1]] * CURVATURE[Activation(activation)](saved)
    dz[...] = dz + by_pre if accumulate else by_pre


def grain_sum(run: Run, *, partial: Array, out: Array, column: int, form: int) -> None:
    total = _grain_total(partial, column, out.shape[::-1] if form == 1 else out.shape)
    if form == 0:
        out[...] = np.triu(total) + np.triu(total, 1).T
    else:
        out[...] = total.T if form == 1 else total


def _grain_total(partial: Array, column: int, shape: tuple[int, ...]) -> Array:
    rows, cols = shape
    end = column + rows * padded(cols)
    total: Array = partial[:, column:end].sum(axis=0).reshape(rows, padded(cols))[:, :cols]
    return total


def gram_wgrad(run: Run, *, W: Array, dgram: Array, dW: Array) -> None:
    dW[...] = 2 * (W @ dgram)


def probe_signs(run: Run, *, out: Array, stream: int) -> None:
    out[...] = np.where(philox.uniform(run.seed, stream, run.step, *out.shape) < 0.5, -1, 1)


def tangent(run: Run, *, x: Array, slopes: Array, out: Array, column: int) -> None:
    out[...] = x * slopes[:, column : column + x.shape[1]]


def squared_norm(
    run: Run, *, x: Array, weight: Array | None, rowpenalty: Array, accumulate: int, strength: float
) -> None:
    share = row_share(run, weight, strength, x.dtype)
    value = share[:, 0] * (x * x).sum(axis=1)
    rowpenalty[:, 0] = rowpenalty[:, 0] + value if accumulate else value
    x *= 2 * share


def cotangent(run: Run, *, dout: Array, x: Array, slopes: Array, dslopes: Array, column: int, accumulate: int) -> None:
    at = slice(column, column + x.shape[1])
    dslopes[:, at] = dslopes[:, at] + dout * x if accumulate else dout * x
    dout *= slopes[:, at]


# --- ops: sums and updates ------------------------------------------------------------------------------------------


def reduce(run: Run, *, x: Array, weight: Array | None, terms: Array, index: int, mean: int) -> None:
    total = (x if weight is None else x * weight).sum(dtype=np.float64)
    terms[0, index] += total / run.m if mean else total


def sqnorm(run: Run, *, partial: Array) -> None:
    g = run.regions[Region.GRADIENT]
    for i in range(partial.shape[1]):
        partial[0, i] = np.sum(g[i * GRAIN : (i + 1) * GRAIN] ** 2, dtype=np.float64)


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


def update(
    run: Run, *, partial: Array | None, solver: int, beta_1: float, beta_2: float, epsilon: float, clip: float
) -> None:
    W, g, m1 = (run.regions[r] for r in (Region.PARAMETER, Region.GRADIENT, Region.MOMENT1))
    if partial is not None:
        g = g * W.dtype.type(clip_scale(float(partial.sum(dtype=np.float64)), clip))
    step_rule(run, W, g, m1, run.regions.get(Region.MOMENT2), solver, beta_1, beta_2, epsilon)


def wgrad_update(run: Run, *, x: Array, dz: Array, **rule: Any) -> None:
    _descend(run, run.factor(x).T @ run.factor(dz), **rule)


def _descend(run: Run, g: Array, *, dW: Array | None, W: Array, colrate: Array | None, **rule: Any) -> None:
    """The decays and the step of a weight, g being what its last product adds to its gradient."""
    if dW is not None:
        g += dW
    if colrate is not None:
        column_decay(run, W=W, colrate=colrate, dW=g)
    _decayed_step(run, W, g, **rule)


def _decayed_step(
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
    """A weight's penalties added to its gradient, its decay, and its step."""
    if penalty is not None:
        decay(run, W=W, dW=g, penalty=penalty, l2=l2, l1=l1)
    if rate:
        shrink(run, W=W, rate=rate)
    step_rule(run, W, g, moment1, moment2, solver, beta_1, beta_2, epsilon)


def grain_update(run: Run, *, partial: Array, W: Array, column: int, **rule: Any) -> None:
    _decayed_step(run, W, _grain_total(partial, column, W.shape), **rule)


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


# --- ops: variational networks ---------------------------------------------------------------------------------------


def sample(run: Run, *, stats: Array, z: Array, noise: Array, stream: int) -> None:
    # Kingma and Welling, "Auto-encoding variational Bayes", ICLR 2014: the reparameterisation
    k = z.shape[1]
    z[...] = stats[:, :k]
    if run.mode & LEARN:
        noise[...] = np.exp(stats[:, k:] / 2) * philox.normal(run.seed, stream, run.step, *z.shape)
        z += noise


def latent_kl(
    run: Run,
    *,
    stats: Array,
    noise: Array,
    weight: Array | None,
    dz: Array,
    dstats: Array,
    rowkl: Array,
    strength: float,
) -> None:
    # KL(N(m, v) || N(0, 1)) = (m^2 + v - 1 - log v) / 2 (appendix B of the same paper); dz/d log v = noise / 2
    k = noise.shape[1]
    mean, log_variance = stats[:, :k], stats[:, k:]
    grown = np.expm1(log_variance)
    rowkl[:, 0] = (mean * mean + (grown - log_variance)).sum(axis=1) / 2
    scale = stats.dtype.type(strength * run.kl_factor / run.m) * (1 if weight is None else weight)
    dstats[:, :k] = dz + scale * mean
    dstats[:, k:] = (dz * noise + scale * grown) / 2


def gaussian(
    run: Run,
    *,
    z: Array,
    target: Array,
    weight: Array | None,
    logvar: Array,
    rowloss: Array,
    rates: Array,
    activation: int,
) -> None:
    # -log N(y; p, v) = (y - p)^2 / (2 v) + log(2 pi v) / 2 with v = exp(logvar) + floor, shared by the rows
    act, T = Activation(activation), z.dtype.type
    grown = np.exp(logvar)
    variance = grown + T(VARIANCE_FLOOR)
    p = ACTIVATE[act](z)
    d = p - target
    square = d * d / variance
    rowloss[:, 0] = (square.sum(axis=1) + np.log(T(2 * np.pi) * variance).sum()) / 2
    if run.mode & LEARN:
        scale = T(1 / run.m) * (1 if weight is None else weight)
        rates[...] = scale * (1 - square) * (grown / (2 * variance))
        z[...] = scale * d / variance * DERIVATIVE[act](z if act.needs_preactivation else p)


# --- ops: counts ------------------------------------------------------------------------------------------------------


def library(run: Run, *, out: Array, source: int) -> None:
    out[:, 0] = picked(run, source).sum(axis=1, dtype=np.float64)


def log_normalize(run: Run, *, x: Array, library: Array, scale: float) -> None:
    x[...] = np.log1p(x * size_factors(library, scale))


def size_factors(library: Array, scale: float) -> Array:
    factors: Array = library.dtype.type(scale) / np.where(library > 0, library, 1)
    return factors


def means(run: Run, *, z: Array, library: Array | None, out: Array, activation: int, scale: float) -> None:
    act, rows = Activation(activation), scale if library is None else library
    out[...] = ACTIVATE[act](z[:, : out.shape[1]]) * (rows if act is Activation.SOFTMAX else rows / scale)


def counts(
    run: Run,
    *,
    z: Array,
    weight: Array | None,
    library: Array,
    log_dispersion: Array | None,
    rowloss: Array,
    partial: Array | None,
    loss: int,
    activation: int,
    by_cell: int,
    source: int,
    scale: float,
) -> None:
    # Differences of log-gamma functions are taken in float64 whatever the precision.
    kind, act = Loss(loss), Activation(activation)
    y = picked(run, source).astype(np.float64)
    n = y.shape[1]
    logits, tau, zeta = z[:, :n].astype(np.float64), None, None
    if kind.dispersed:
        tau = z[:, n : 2 * n].astype(np.float64)
        if log_dispersion is not None:
            tau = DISPERSION_PACE * log_dispersion.astype(np.float64)
    if kind is Loss.ZINB:
        zeta = z[:, -n:].astype(np.float64)
    factor = library if act is Activation.SOFTMAX else library / scale
    mu = ACTIVATE[act](logits) * factor
    value, by_mean, by_dispersion, by_dropout = count_terms(y, mu, tau, zeta)
    rowloss[:, 0] = value.sum(axis=1)
    if not run.mode & LEARN:
        return
    share = (1 if weight is None else weight.astype(np.float64)) / run.m
    if act is Activation.SOFTMAX:
        by_mean = by_mean - softmax(logits) * by_mean.sum(axis=1, keepdims=True)
    z[:, :n] = share * by_mean
    if zeta is not None:
        z[:, -n:] = share * by_dropout
    if by_cell:
        z[:, n : 2 * n] = share * by_dispersion
    elif partial is not None:
        partial[...] = 0
        partial[0, :n] = DISPERSION_PACE * (share * by_dispersion).sum(axis=0)


def count_terms(y: Array, mu: Array, tau: Array | None, zeta: Array | None) -> tuple[Array, Array, Any, Any]:
    """Minus the log-likelihood of counts y of mean mu, and its derivatives by log mu, the logarithms of the inverse
    dispersions, tau, and the logits of dropout, zeta.

    Poisson without tau: mu - y log mu + log y!. Negative binomial: with q = mu / theta, theta = exp(tau),
    (theta + y) log(1 + q) - y log q - log(Gamma(y + theta) / (Gamma(theta) y!)). With zeta a zero has the probability
    pi + (1 - pi) P(0), pi = sigmoid(zeta), and other counts 1 - pi times theirs.
    """
    from scipy.special import gammaln, log_expit, psi, xlogy

    if tau is None:
        return mu - xlogy(y, mu) + gammaln(y + 1), mu - y, None, None
    theta = np.exp(np.clip(tau, -LOG_DISPERSION_LIMIT, LOG_DISPERSION_LIMIT)).astype(np.float64)
    q = mu / theta
    grown = np.log1p(q)
    binomial = gammaln(y + theta) - gammaln(theta) - gammaln(y + 1)
    value = (theta + y) * grown - xlogy(y, q) - binomial
    by_mean = (mu - y) / (1 + q)
    by_dispersion = theta * (grown - (psi(y + theta) - psi(theta))) - by_mean
    if zeta is None:
        return value, by_mean, by_dispersion, None
    zeta = np.clip(zeta, -DROPOUT_LIMIT, DROPOUT_LIMIT)
    # log(pi + (1 - pi) P(0)), and the share of P(0) in it
    log_zero = np.logaddexp(log_expit(zeta), log_expit(-zeta) - value)
    expected = np.where(y == 0, np.exp(log_expit(-zeta) - value - log_zero), 1.0)
    by_dropout = np.where(y == 0, expected - sigmoid(-zeta), sigmoid(zeta))
    value = np.where(y == 0, -log_zero, value - log_expit(-zeta))
    return value, expected * by_mean, expected * by_dispersion, by_dropout


# --- ops: restricted Boltzmann machines -------------------------------------------------------------------------------


def draw(run: Run, *, mean: Array, out: Array, kind: int, stream: int) -> None:
    p = mean[: run.m]
    if kind == Units.BERNOULLI:
        out[...] = philox.uniform(run.seed, stream, run.step, *p.shape) < p
    else:
        out[...] = p + philox.normal(run.seed, stream, run.step, *p.shape)


def contrast(run: Run, *, x: Array, y: Array, weight: Array | None, out: Array) -> None:
    out[...] = x.dtype.type(1 / run.m) * (1 if weight is None else weight) * (x - y)


def keep(run: Run, *, x: Array, out: Array) -> None:
    out[: run.m] = x


# --- ops: images -----------------------------------------------------------------------------------------------------


def convolve(
    run: Run, *, x: Array, W: Array, b: Array | None, out: Array, pre: Array | None, activation: int, **geometry: int
) -> None:
    images = Images(**geometry)
    z = images.convolve(images.x(x), W)
    if b is not None:
        z += b
    if pre is not None:
        images.out(pre)[...] = z
    images.out(out)[...] = ACTIVATE[Activation(activation)](z)


def conv_dgrad(
    run: Run, *, dz: Array, W: Array, saved: Array, out: Array, activation: int, scale: float, **geometry: int
) -> None:
    images = Images(**geometry)
    images.x(out)[...] = images.adjoint(images.out(dz), W)
    out *= DERIVATIVE[Activation(activation)](saved * saved.dtype.type(scale))


def conv_wgrad(
    run: Run,
    *,
    x: Array,
    dz: Array,
    partial: Array,
    bias: int,
    accumulate: int,
    images: Images | None = None,
    **geometry: int,
) -> None:
    # All of the sums over rows go to the first grain.
    images = images or Images(**geometry)
    rows, filters = images.conv.weight_shape
    dout = images.out(dz)
    if not accumulate:
        partial[...] = 0
    sums = partial[0, : (rows + 1) * padded(filters)].reshape(rows + 1, padded(filters))
    sums[:rows, :filters] += images.gradient(images.x(x), dout)
    if bias:
        sums[rows, :filters] = dout.sum(axis=(0, 1, 2))


def maxpool(run: Run, *, x: Array, out: Array, h: int, w: int, c: int, pool_y: int, pool_x: int, layout: int) -> None:
    pooled = pixels(out, h // pool_y, w // pool_x, c, layout & OUT_LAST)
    pooled[...] = windows(pixels(x, h, w, c, 0), pool_y, pool_x).max(axis=3)


def maxpool_dgrad(
    run: Run,
    *,
    dout: Array,
    x: Array,
    saved: Array,
    out: Array,
    activation: int,
    h: int,
    w: int,
    c: int,
    pool_y: int,
    pool_x: int,
    layout: int,
) -> None:
    d = pixels(dout, h // pool_y, w // pool_x, c, layout & OUT_LAST)
    chosen = greatest(pixels(x, h, w, c, 0), pool_y, pool_x)
    pixels(out, h, w, c, 0)[...] = d.repeat(pool_y, axis=1).repeat(pool_x, axis=2) * chosen
    out *= DERIVATIVE[Activation(activation)](saved)


def maxpool_pick(
    run: Run, *, y: Array, x: Array, out: Array, h: int, w: int, c: int, pool_y: int, pool_x: int, layout: int
) -> None:
    picked = pixels(out, h // pool_y, w // pool_x, c, layout & OUT_LAST)
    chosen = greatest(pixels(x, h, w, c, 0), pool_y, pool_x)
    picked[...] = windows(np.where(chosen, pixels(y, h, w, c, 0), 0), pool_y, pool_x).sum(axis=3)


# --- ops: sparse rows -------------------------------------------------------------------------------------------------


def masked_rows(run: Run, stream: int, level: float, library: Array | None, scale: float, dtype: Any) -> Any:
    """Rows of X as CSR, normalised as by LOG_NORMALIZE if there is a `library`; in training, masking noise falls on the
    same elements as CORRUPT's."""
    X = run.sources[0][run.rows].astype(dtype)
    if library is not None:
        X.data = np.log1p(X.data * np.repeat(size_factors(library, scale), np.diff(X.indptr)))
    if level > 0 and run.mode & LEARN:
        u = philox.uniform(run.seed, stream, run.step, *X.shape)
        rows = np.repeat(np.arange(X.shape[0]), np.diff(X.indptr))
        X.data[u[rows, X.indices] < level] = 0
    return X


def sparse_dense(
    run: Run,
    *,
    W: Array,
    b: Array,
    library: Array | None,
    shift: Array | None,
    out: Array,
    pre: Array | None,
    activation: int,
    stream: int,
    level: float,
    scale: float,
) -> None:
    z = masked_rows(run, stream, level, library, scale, W.dtype) @ W
    if shift is not None:
        z -= shift @ W
    z += b
    if pre is not None:
        pre[...] = z
    out[...] = ACTIVATE[Activation(activation)](z)


def sparse_wgrad(run: Run, *, dz: Array, dW: Array, accumulate: int, **rows: Any) -> None:
    product = _sparse_outer(run, dz, **rows)
    dW[...] = dW + product if accumulate else product


def sparse_wgrad_update(
    run: Run,
    *,
    dz: Array,
    library: Array | None,
    shift: Array | None,
    stream: int,
    level: float,
    scale: float,
    **rule: Any,
) -> None:
    _descend(run, _sparse_outer(run, dz, library, shift, stream, level, scale), **rule)


def _sparse_outer(
    run: Run, dz: Array, library: Array | None, shift: Array | None, stream: int, level: float, scale: float
) -> Array:
    product: Array = masked_rows(run, stream, level, library, scale, dz.dtype).T @ dz
    if shift is not None:
        product -= shift.T @ dz.sum(axis=0, keepdims=True)
    return product


# --- ops: squared error against sparse rows --------------------------------------------------------------------------
#
# With V = [W; b] and g = [h 1], the loss of a row y is |g V - y|^2 = g Q g' - 2 g p' + |y|^2, Q = V V' and p = y V'.
# Its derivatives are 2 (g Q - p) by g and 2 g' (g V - y) by V. Sums are in double, whatever the type of the slots.


def with_bias(W: Array, b: Array) -> Array:
    return np.vstack([W, b]).astype(np.float64)


def with_one(h: Array) -> Array:
    return np.column_stack([h, np.ones(len(h), h.dtype)]).astype(np.float64)


def weight_gram(run: Run, *, W: Array, b: Array, high: Array, low: Array) -> None:
    V = with_bias(W, b)
    Q = V @ V.T
    high[...] = Q
    low[...] = Q - high


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


def row_gram(run: Run, *, h: Array, weight: Array | None, out: Array) -> None:
    g = with_one(h)
    out[...] = 2 * (row_share(run, weight, 1.0, np.float64) * g).T @ g


def _sparse_mse_gradient(
    run: Run, h: Array, gram: Array, weight: Array | None, W: Array, b: Array, source: int
) -> tuple[Array, Array]:
    """By W and by b."""
    y = run.sources[source][run.rows].astype(np.float64)
    scaled = 2 * row_share(run, weight, 1.0, np.float64) * with_one(h)
    dV = (gram.astype(np.float64) @ with_bias(W, b) - (y.T @ scaled).T).astype(W.dtype)
    return dV[:-1], dV[-1:]


def sparse_mse_wgrad(
    run: Run, *, h: Array, gram: Array, weight: Array | None, W: Array, b: Array, dW: Array, db: Array, source: int
) -> None:
    dW[...], db[...] = _sparse_mse_gradient(run, h, gram, weight, W, b, source)


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
    _decayed_step(run, W, dW, solver=solver, beta_1=beta_1, beta_2=beta_2, epsilon=epsilon, **rule)
    step_rule(run, b, db, b_moment1, b_moment2, solver, beta_1, beta_2, epsilon)


def clip_scale(sum_of_squares: float, clip: float) -> float:
    """The factor that brings a gradient down to norm `clip` (1 if it is there already)."""
    norm = float(np.sqrt(sum_of_squares))
    return min(1.0, clip / (norm + 1e-6))


OPS: Mapping[OpCode, Callable[..., None]] = {
    OpCode.GATHER: gather,
    OpCode.CORRUPT: corrupt,
    OpCode.DENSE: dense,
    OpCode.DROPOUT: dropout,
    OpCode.LINK: link,
    OpCode.LOSS: loss,
    OpCode.WGRAD: wgrad,
    OpCode.COLSUM: colsum,
    OpCode.DGRAD: dgrad,
    OpCode.ACTIVITY_L1: activity_l1,
    OpCode.KL_SPARSITY: kl_sparsity,
    OpCode.DECAY: decay,
    OpCode.REDUCE: reduce,
    OpCode.SQNORM: sqnorm,
    OpCode.SHRINK: shrink,
    OpCode.UPDATE: update,
    OpCode.WGRAD_UPDATE: wgrad_update,
    OpCode.COLSUM_UPDATE: colsum_update,
    OpCode.SAMPLE: sample,
    OpCode.LATENT_KL: latent_kl,
    OpCode.GAUSSIAN: gaussian,
    OpCode.CONTRACTIVE: contractive,
    OpCode.COLUMN_DECAY: column_decay,
    OpCode.GRAM: gram,
    OpCode.SLOPES: slopes,
    OpCode.JACOBIAN: jacobian,
    OpCode.CURVES: curves,
    OpCode.GRAIN_SUM: grain_sum,
    OpCode.GRAM_WGRAD: gram_wgrad,
    OpCode.PROBE: probe_signs,
    OpCode.TANGENT: tangent,
    OpCode.SQUARED_NORM: squared_norm,
    OpCode.COTANGENT: cotangent,
    OpCode.DRAW: draw,
    OpCode.CONTRAST: contrast,
    OpCode.KEEP: keep,
    OpCode.CONVOLVE: convolve,
    OpCode.CONV_DGRAD: conv_dgrad,
    OpCode.CONV_WGRAD: conv_wgrad,
    OpCode.MAXPOOL: maxpool,
    OpCode.MAXPOOL_DGRAD: maxpool_dgrad,
    OpCode.GRAIN_UPDATE: grain_update,
    OpCode.MAXPOOL_PICK: maxpool_pick,
    OpCode.SPARSE_DENSE: sparse_dense,
    OpCode.SPARSE_WGRAD: sparse_wgrad,
    OpCode.SPARSE_WGRAD_UPDATE: sparse_wgrad_update,
    OpCode.WEIGHT_GRAM: weight_gram,
    OpCode.SPARSE_MSE: sparse_mse,
    OpCode.ROW_GRAM: row_gram,
    OpCode.SPARSE_MSE_WGRAD: sparse_mse_wgrad,
    OpCode.SPARSE_MSE_UPDATE: sparse_mse_update,
    OpCode.LIBRARY: library,
    OpCode.LOG_NORMALIZE: log_normalize,
    OpCode.COUNTS: counts,
    OpCode.MEANS: means,
    OpCode.SHIFT: shift,
    OpCode.CONDITION: condition,
}


# --- the program ----------------------------------------------------------------------------------------------------


class ReferenceProgram:
    """A plan run op by op over NumPy arrays; every slot has memory of its own, so a fault in the sharing of arena
    memory shows as a difference from this backend."""

    def __init__(
        self,
        plan: Plan,
        dtype: Any = np.float64,
        ops: Mapping[OpCode, Callable[..., None]] = OPS,
        bfloat16: bool = False,
    ) -> None:
        self.plan = plan
        self.bfloat16 = bfloat16
        self.dtype = np.dtype(dtype)
        self.ops = ops
        self.regions = {
            r: np.zeros(plan.parameter_size, self.dtype)
            for r in (Region.PARAMETER, Region.GRADIENT, Region.MOMENT1, Region.MOMENT2)[: 2 + plan.n_moments]
        }
        self.arrays = [
            self._view(self.regions[s.region], s) if s.region < Region.BATCH else np.zeros((s.rows, s.cols), self.dtype)
            for s in plan.slots
        ]
        self.sources: dict[int, Any] = {}
        self._running = threading.Lock()

    @staticmethod
    def _view(region: Array, slot: Slot) -> Array:
        return region[slot.offset : slot.offset + slot.size].reshape(slot.rows, slot.ld)[:, : slot.cols]

    def _moments(self, slot: Slot) -> dict[str, Array]:
        pairs = ((Region.MOMENT1, "moment1"), (Region.MOMENT2, "moment2"))[: self.plan.n_moments]
        return {f"{name}.{slot.name}": self._view(self.regions[region], slot) for region, name in pairs}

    def load(self, state: Mapping[str, Array]) -> None:
        for slot in self.plan.parameters:
            self.arrays[self.plan.index[slot.name]][...] = np.reshape(state[slot.name], (slot.rows, slot.cols))
            for name, view in self._moments(slot).items():
                view[...] = np.reshape(state[name], view.shape) if name in state else 0

    def state(self, *, optimiser: bool = True) -> State:
        return copies(self.views(), optimiser)

    def views(self) -> State:
        out: State = {}
        for slot in self.plan.parameters:
            out[slot.name] = self.arrays[self.plan.index[slot.name]]
            out |= self._moments(slot)
        return out

    def finite(self) -> bool:
        return all_finite(*(values for region, values in self.regions.items() if region is not Region.GRADIENT))

    def hand_over(self) -> State:
        views = self.views()
        self.close()
        return views

    def bind(self, X: Any, target: Any = None, weight: Any = None, batch: Any = None) -> None:
        self.sources = self._sources(X, target) | {2: weight, BATCH: batch}

    def _sources(self, X: Any, target: Any) -> dict[int, Any]:
        rows, shift = told_apart(self.plan.spec, X)
        given = {0: rows, 1: target if self.plan.spec.separate_target else None}
        wanted = self.plan.spec.sparse_sources
        sources = {i: sparse_rows(data) if i in wanted and data is not None else data for i, data in given.items()}
        return sources | {SHIFT: shift}

    def train(
        self, rows: NDArray[np.int64], hyper: Hyper, poll: Callable[[], bool] | None = None
    ) -> NDArray[np.float64]:
        batch = self.plan.batch
        done: list[Array] = []
        for i, start in enumerate(range(0, len(rows), batch)):
            run = Run(
                rows[start : start + batch],
                Mode.TRAIN,
                self.sources,
                hyper.seed,
                hyper.step + i,
                float(hyper.learning_rate[i]),
                1.0 if hyper.kl_factor is None else float(hyper.kl_factor[i]),
                None if hyper.momentum is None else float(hyper.momentum[i]),
                self.regions,
                self.bfloat16,
            )
            done.append(self._step(run))
            if poll is not None and poll():
                break
        return np.array(done, np.float64).reshape(len(done), len(self.plan.terms))

    def gradient(self, rows: NDArray[np.int64], seed: int = 0, step: int = 0) -> tuple[NDArray[np.float64], State]:
        terms = self._step(
            Run(rows, Mode.GRADIENT, self.sources, seed, step, regions=self.regions, bfloat16=self.bfloat16)
        )
        return terms, {s.name: self.arrays[self.plan.index[f"d{s.name}"]].copy() for s in self.plan.learned}

    def _step(self, run: Run) -> NDArray[np.float64]:
        terms = self.arrays[self.plan.index["terms"]]
        terms[...] = 0
        self._run(run)
        return terms[0, : len(self.plan.terms)].astype(np.float64)

    def apply(self, X: Any, mode: Mode, target: Any = None, batch: Any = None) -> Array:
        result = self.plan.slots[slot := self.plan.outputs[mode]]
        n = X.shape[0]
        out = np.empty((n, result.cols), self.dtype)
        if mode in FROM_CODES:
            sources = self._sources(None if self.plan.spec.separate_target else target, target) | {3: X, BATCH: batch}
        else:
            sources = self._sources(X, target) | {BATCH: batch}
        for start in range(0, n, self.plan.batch):
            rows = np.arange(start, min(start + self.plan.batch, n))
            self._run(Run(rows, mode, sources, regions=self.regions, bfloat16=self.bfloat16))
            out[rows] = self.arrays[slot][: len(rows)]
        return out

    def _run(self, run: Run) -> None:
        if not self._running.acquire(blocking=False):
            raise RuntimeError("this program is already running in another thread")
        try:
            for op in self.plan.ops:
                if op.modes & run.mode:
                    self.ops[op.code](run, **self._operands(op, run.m))
        finally:
            self._running.release()

    def _operands(self, op: Op, m: int) -> dict[str, Any]:
        signature = SIGNATURES[op.code]
        operands: dict[str, Any] = {}
        for role, i in zip(signature.slots, op.slots, strict=True):
            is_batch = i >= 0 and self.plan.slots[i].region is Region.BATCH
            operands[role] = None if i < 0 else self.arrays[i][:m] if is_batch else self.arrays[i]
        operands |= zip(signature.ints, op.ints, strict=True)
        operands |= zip(signature.floats, op.floats, strict=True)
        return operands

    def close(self) -> None:
        self.arrays, self.regions, self.sources = [], {}, {}


# --- single layers: the protocol of `narrows.functional` (see backends/cpp.py), in the operands' precision ----------


def _check_apart(results: dict[str, Any], operands: dict[str, Any]) -> None:
    """A result is written while operands are still read."""
    given = [(name, array) for name, array in (results | operands).items() if isinstance(array, np.ndarray)]
    for i, (name, array) in enumerate(given):
        for other_name, other in given[i + 1 :]:
            if name in results and np.shares_memory(array, other):
                raise ValueError(f"{name} must not share memory with {other_name}")


def dense_layer(X: Any, W: Any, b: Any, activation: int, out: Any, Z: Any, n_threads: int) -> None:
    _check_apart({"out": out, "Z": Z}, {"X": X, "W": W, "b": b})
    z = X @ W if b is None else X @ W + b
    if Z is not None:
        Z[...] = z
    out[...] = ACTIVATE[Activation(activation)](z)


def dense_backward_layer(
    dA: Any, X: Any, W: Any, saved: Any, activation: int, dX: Any, dW: Any, db: Any, n_threads: int
) -> None:
    _check_apart({"dX": dX, "dW": dW, "db": db}, {"dA": dA, "X": X, "W": W, "A": saved})
    dZ = dA * DERIVATIVE[Activation(activation)](saved)
    if dX is not None:
        dX[...] = dZ @ W.T
    if dW is not None:
        dW[...] = X.T @ dZ
    if db is not None:
        np.sum(dZ, axis=0, out=db)


def own_ops() -> frozenset[OpCode]:
    return frozenset(OPS)


def probe() -> Probe:
    return Probe(True, "NumPy, float64; for checking, never chosen by itself")


def compile(plan: Plan, *, precision: Precision, n_threads: int) -> ReferenceProgram:
    """The reference computes in float64 whatever the precision asked for: it is the yardstick. Of bfloat16 it takes
    the rounding of the products' factors."""
    return ReferenceProgram(plan, np.float64, bfloat16=precision is Precision.BFLOAT16)
