"""The jitted likelihoods of counts of the Numba backend.

Promises: as `numba_kernels`. A zero needs no gamma function. The terms of other counts are taken in float64, whatever
the arrays hold, because differences of log-gamma functions lose what their terms have in common.
Never: makes a row of counts dense.

The formulas are those of `reference.counts.count_terms`.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np
from numba import types
from numba.extending import overload

from ...plan.ops import DROPOUT_LIMIT, LOG_DISPERSION_LIMIT
from ...plan.spec import Loss
from .kernels import _ONE, _SUMS, _constants, _exp, _expm1, _inline, _Kernel, _kernel, _log1p01

__all__ = ["LOSSES", "count_rows"]

LOSSES = (Loss.POISSON, Loss.NB, Loss.ZINB)
"""The losses that the kernel computes; any other runs in the reference's form."""

_POISSON, _ZINB = int(Loss.POISSON), int(Loss.ZINB)
_ROOT, _LN2, _LARGE = np.float32(math.sqrt(2)), np.float32(math.log(2)), np.float32(2**24)
_LIMIT = np.float32(LOG_DISPERSION_LIMIT)


def _log1p(x: Any) -> Any:
    """log(1 + x) for x >= 0."""


@overload(_log1p)
def _overload_log1p(x: Any) -> Any:
    def single(x: Any) -> Any:
        # 1 + x = 2**k m, m from 1/sqrt(2) to sqrt(2), where log m is an odd function of (m - 1) / (m + 1).
        u = _ONE + x
        k = (np.float32(u * _ROOT).view(np.int32) >> np.int32(23)) - np.int32(127)
        m = u * np.int32((np.int32(127) - k) << np.int32(23)).view(np.float32)
        size = _log1p01(max(m, _ONE / m) - _ONE)
        # The rounding error of 1 + x.
        lost = (x - (u - _ONE)) / u if x < _LARGE else np.float32(0)
        above = np.float32(k) * _LN2 + ((size if m >= _ONE else -size) + lost)
        return _log1p01(x) if x < _ONE else above

    def double(x: Any) -> Any:
        return math.log1p(x)

    return single if x == types.float32 else double


@_inline
def _digamma(z: Any) -> Any:
    """The derivative of the log-gamma function, float64, z > 0 (Abramowitz and Stegun, 6.3.5 and 6.3.18)."""
    total = 0.0
    while z < 10.0:
        total -= 1.0 / z
        z += 1.0
    w = 1.0 / (z * z)
    series = w * (1 / 12 - w * (1 / 120 - w * (1 / 252 - w * (1 / 240 - w * (1 / 132 - w * (691 / 32760))))))
    return total + math.log(z) - 0.5 / z - series


def _zero(mu: Any, theta: Any, inverse: Any, zeta: Any, loss: int) -> Any:
    """Minus the log-probability of a zero, and its derivatives by log mu, log theta and zeta.

    Callers pass a constant `loss`, so the compiler keeps one branch; `inverse` is 1 / theta.
    """


@overload(_zero)
def _overload_zero(mu: Any, theta: Any, inverse: Any, zeta: Any, loss: Any) -> Any:
    zero, one, limit = _constants(mu, 0, 1, DROPOUT_LIMIT)

    def terms(mu: Any, theta: Any, inverse: Any, zeta: Any, loss: Any) -> Any:
        if loss == _POISSON:
            return mu, mu, zero, zero
        q = mu * inverse
        value = theta * _log1p(q)
        by_mean = mu / (one + q)
        by_dispersion = value - by_mean
        if loss != _ZINB:
            return value, by_mean, by_dispersion, zero
        # It has the probability w = pi + (1 - pi) P(0), pi = sigmoid(zeta).
        e = _exp(-min(abs(zeta), limit))
        part = one / (one + e)
        dropped, kept = (part, e * part) if zeta >= zero else (e * part, part)
        expected = kept * _exp(-value)
        inverse_w = one / (dropped + expected)
        odds, share = -kept * _expm1(-value) * inverse_w, expected * inverse_w
        return _log1p(odds), share * by_mean, share * by_dispersion, -dropped * odds

    return terms


def _count(y: Any, log_mu: Any, tau: Any, zeta: Any, loss: int) -> Any:
    """As `_zero`, of a count y > 0 and in float64; `tau` is log theta."""


@overload(_count)
def _overload_count(y: Any, log_mu: Any, tau: Any, zeta: Any, loss: Any) -> Any:
    def terms(y: Any, log_mu: Any, tau: Any, zeta: Any, loss: Any) -> Any:
        mu = math.exp(log_mu)
        if loss == _POISSON:
            return mu - y * log_mu + math.lgamma(y + 1.0), mu - y, 0.0, 0.0
        theta, q = math.exp(tau), math.exp(log_mu - tau)
        grown = math.log1p(q)
        binomial = math.lgamma(y + theta) - math.lgamma(theta) - math.lgamma(y + 1.0)
        value = (theta + y) * grown - y * (log_mu - tau) - binomial
        by_mean = (mu - y) / (1.0 + q)
        by_dispersion = theta * (grown - (_digamma(y + theta) - _digamma(theta))) - by_mean
        if loss != _ZINB:
            return value, by_mean, by_dispersion, 0.0
        z = max(-DROPOUT_LIMIT, min(DROPOUT_LIMIT, zeta))
        e = math.exp(-abs(z))
        return value + max(z, 0.0) + math.log1p(e), by_mean, by_dispersion, (1.0 if z >= 0 else e) / (1.0 + e)

    return terms


@_inline
def _dispersions(tau: Any, theta: Any, inverse: Any) -> None:
    one = tau.dtype.type(1)
    for j in range(theta.size):
        theta[j] = _exp(_within(tau[j]))
        inverse[j] = one / theta[j]


@_inline
def _within(tau: Any) -> Any:
    return max(-_LIMIT, min(_LIMIT, tau))


@cache
def count_rows(loss: int, softmax: bool, by_cell: bool) -> _Kernel:
    """Losses of rows of counts, which are CSR with increasing columns and no stored zeros.

    z holds the logit of each mean, log theta if `by_cell`, and the logit of dropout. If `learn`, gradients times the
    row's scale replace them. `factors` are the sums of the rows; with the exponential link, they are divided by the
    sum of size factor 1. Unless `by_cell`, `tau` holds log theta of the features, and `sums` takes its gradient.
    Scratch memory: `row` has four numbers for each feature, `found` three for each stored count of a row.
    """
    dispersed, dropout = loss != _POISSON, loss == _ZINB

    @_kernel(_SUMS)
    def kernel(
        indptr: Any, indices: Any, data: Any, z: Any, tau: Any, scale: Any, factors: Any, rowloss: Any, sums: Any,
        row: Any, found: Any, learn: bool,
    ) -> None:  # fmt: skip
        n = row.shape[1]
        means, slopes, theta, inverse = row[0], row[1], row[2], row[3]
        if dispersed and not by_cell:
            _dispersions(tau, theta, inverse)
        for i in range(z.shape[0]):
            first, count = indptr[i], indptr[i + 1] - indptr[i]
            logits, taus, zetas = z[i, :n], z[i, n : 2 * n] if by_cell else tau, z[i, z.shape[1] - n :]
            if dispersed and by_cell:
                _dispersions(taus, theta, inverse)
            most, total = logits[0] - logits[0], 1.0
            if softmax:
                most = logits[0]
                for j in range(n):
                    most = max(most, logits[j])
                total = 0.0
                for j in range(n):
                    means[j] = _exp(logits[j] - most)
                    total += np.float64(means[j])
            else:
                for j in range(n):
                    means[j] = _exp(logits[j])
            # Means are factor * means[j], and their logarithms logits[j] + shift.
            factor = z.dtype.type(factors[i] / total)
            shift = (math.log(factors[i] / total) if factors[i] > 0 else -np.inf) - np.float64(most)
            value, pull = 0.0, 0.0

            for k in range(count):
                y, j = np.float64(data[first + k]), indices[first + k]
                old = _zero(factor * means[j], theta[j], inverse[j], zetas[j], loss)
                log_mu, log_theta = np.float64(logits[j]) + shift, np.float64(_within(taus[j])) if dispersed else 0.0
                new = _count(y, log_mu, log_theta, np.float64(zetas[j]), loss)
                value += new[0] - np.float64(old[0])
                pull += new[1] - np.float64(old[1])
                found[0, k], found[1, k], found[2, k] = new[1], new[2], new[3]
                if dispersed and not by_cell:
                    found[1, k] -= np.float64(old[2])

            for j in range(n):
                zero = _zero(factor * means[j], theta[j], inverse[j], zetas[j], loss)
                value += np.float64(zero[0])
                pull += np.float64(zero[1])
                slopes[j] = zero[1]
                if learn:
                    if dropout:
                        zetas[j] = zero[3] * scale[i]
                    if dispersed:
                        if by_cell:
                            taus[j] = zero[2] * scale[i]
                        else:
                            sums[j] += zero[2] * scale[i]
            rowloss[i, 0] = value
            if not learn:
                continue

            for k in range(count):
                j = indices[first + k]
                slopes[j] = found[0, k]
                if dropout:
                    zetas[j] = found[2, k] * scale[i]
                if dispersed:
                    if by_cell:
                        taus[j] = found[1, k] * scale[i]
                    else:
                        sums[j] += found[1, k] * scale[i]
            # Back through the softmax p: d_j - p_j sum d.
            part = z.dtype.type(pull / total if softmax else 0.0)
            for j in range(n):
                logits[j] = (slopes[j] - means[j] * part) * scale[i]

    return kernel
