"""Activations and their slopes in float64, from NumPy and SciPy: the only place where the tests write these formulas.

Promises: accurate to a few units in the last place of float64, also at infinity and for large arguments.
Never: shares code with a backend.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import special

Array = NDArray[Any]


def normal_density(z: Array) -> Array:
    density: Array = np.exp(-0.5 * z * z) / np.sqrt(2 * np.pi)
    return density


def gelu_slope(z: Array, sign: Array | float = 1) -> Array:
    """The slope of GELU; with the sign of z, the sum of the magnitudes of its two terms."""
    z = np.clip(z, -50, 50)
    slope: Array = special.ndtr(z) + sign * z * normal_density(z)
    return slope


def silu_slope(z: Array, sign: Array | float = 1) -> Array:
    """The slope of SiLU; with the sign of z, the sum of the magnitudes of its two terms."""
    z = np.clip(z, -1000, 1000)
    slope: Array = special.expit(z) + sign * z * special.expit(z) * special.expit(-z)
    return slope


ACTIVATION = {
    "LINEAR": lambda z: z,
    "RELU": lambda z: np.maximum(z, 0),
    "LEAKY_RELU": lambda z: np.where(z > 0, z, 0.01 * z),
    "ELU": lambda z: np.where(z > 0, z, np.expm1(np.minimum(z, 0))),
    "GELU": lambda z: (t := np.maximum(z, -50)) * special.ndtr(t),
    "SILU": lambda z: (t := np.maximum(z, -1000)) * special.expit(t),
    "SIGMOID": special.expit,
    "TANH": np.tanh,
    "SOFTPLUS": lambda z: np.maximum(z, 0) + np.log1p(np.exp(-np.abs(z))),
    "EXP": np.exp,
    "SOFTMAX": lambda z: special.softmax(z, axis=1),
}

SLOPE = {
    "LINEAR": np.ones_like,
    "RELU": lambda z: np.heaviside(z, np.nan),
    "LEAKY_RELU": lambda z: np.where(z > 0, 1, 0.01),
    "ELU": lambda z: np.exp(np.minimum(z, 0)),
    "GELU": gelu_slope,
    "SILU": silu_slope,
    "SIGMOID": lambda z: special.expit(z) * special.expit(-z),
    "TANH": lambda z: 1 / np.square(np.cosh(z)),
    "SOFTPLUS": special.expit,
    "EXP": np.exp,
}
"""Derivatives, as functions of the pre-activation."""
