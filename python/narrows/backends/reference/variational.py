"""Variational networks: samples of the latents, their divergence, a Gaussian likelihood."""

from __future__ import annotations

import numpy as np

from ...plan.ops import VARIANCE_FLOOR, OpCode
from ...plan.plan import LEARN
from ...plan.spec import Activation
from ...random import philox
from .activations import ACTIVATE, DERIVATIVE
from .run import Array, Run, op


@op(OpCode.SAMPLE)
def sample(run: Run, *, stats: Array, z: Array, noise: Array, stream: int) -> None:
    # Kingma and Welling, "Auto-encoding variational Bayes", ICLR 2014: the reparameterisation
    k = z.shape[1]
    z[...] = stats[:, :k]
    if run.mode & LEARN:
        noise[...] = np.exp(stats[:, k:] / 2) * philox.normal(run.seed, stream, run.step, *z.shape)
        z += noise


@op(OpCode.LATENT_KL)
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


@op(OpCode.GAUSSIAN)
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
