"""Likelihoods of counts: Poisson, negative binomial, zero-inflated."""

from __future__ import annotations

from typing import Any

import numpy as np

from ...plan.ops import DISPERSION_PACE, DROPOUT_LIMIT, LOG_DISPERSION_LIMIT, OpCode
from ...plan.plan import LEARN
from ...plan.spec import Activation, Loss
from .activations import ACTIVATE, sigmoid, softmax
from .dense import picked
from .run import Array, Run, op


@op(OpCode.SIZE_SUM)
def size_sum(run: Run, *, out: Array, source: int) -> None:
    out[:, 0] = picked(run, source).sum(axis=1, dtype=np.float64)


@op(OpCode.LOG_NORMALIZE)
def log_normalize(run: Run, *, x: Array, size_sum: Array, scale: float) -> None:
    x[...] = np.log1p(x * size_factors(size_sum, scale))


def size_factors(size_sum: Array, scale: float) -> Array:
    factors: Array = size_sum.dtype.type(scale) / np.where(size_sum > 0, size_sum, 1)
    return factors


@op(OpCode.MEANS)
def means(run: Run, *, z: Array, size_sum: Array | None, out: Array, activation: int, scale: float) -> None:
    act, rows = Activation(activation), scale if size_sum is None else size_sum
    out[...] = ACTIVATE[act](z[:, : out.shape[1]]) * (rows if act is Activation.SOFTMAX else rows / scale)


@op(OpCode.COUNTS)
def counts(
    run: Run,
    *,
    z: Array,
    weight: Array | None,
    size_sum: Array,
    log_dispersion: Array | None,
    rowloss: Array,
    partial: Array | None,
    loss: int,
    activation: int,
    by_cell: int,
    source: int,
    scale: float,
) -> None:
    # Differences of log-gamma functions need float64 in every precision.
    kind, act = Loss(loss), Activation(activation)
    y = picked(run, source).astype(np.float64)
    n = y.shape[1]
    logits, tau, zeta = z[:, :n].astype(np.float64), None, None
    if kind.info.dispersion:
        tau = z[:, n : 2 * n].astype(np.float64)
        if log_dispersion is not None:
            tau = DISPERSION_PACE * log_dispersion.astype(np.float64)
    if kind.info.heads > 1:
        zeta = z[:, -n:].astype(np.float64)
    factor = size_sum if act is Activation.SOFTMAX else size_sum / scale
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
    """Minus the log-likelihood of counts y of mean mu, and its derivatives by log mu, tau and zeta.

    tau holds the logarithms of the inverse dispersions, and zeta the logits of dropout.

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
