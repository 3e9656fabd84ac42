"""Activation functions, their derivatives and their curvatures, as formulas."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from ...plan.spec import Activation
from .run import Array

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
    # Derivatives from the output a; gelu and silu: from the pre-activation z.
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
    # Second derivatives, from the same values as the first. They are 0 where undefined: the slopes are constant on
    # either side.
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
