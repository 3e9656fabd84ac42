"""Derivatives of the decoder: how the reconstruction changes with each latent.

Forward mode in float64 over blocks of rows; only the Jacobians of one block are in memory.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..backends.reference import ACTIVATE, DERIVATIVE
from ..backends.reference.patches import Images
from ..plan.spec import Activation, LayerSpec, NetworkSpec

__all__ = ["absolute_jacobian"]

_ELEMENTS = 1 << 22
"""Elements of the largest temporary array."""


def absolute_jacobian(
    spec: NetworkSpec,
    coefs: Sequence[NDArray[Any]],
    intercepts: Sequence[NDArray[Any]],
    codes: NDArray[Any],
    condition: NDArray[Any] | None = None,
) -> NDArray[np.float64]:
    """Sum over rows of |d reconstruction / d latent|.

    Parameters
    ----------
    spec : NetworkSpec
    coefs, intercepts : sequences of ndarray
        Weights and biases of all layers.
    codes : ndarray of shape (n_rows, n_components)
    condition : ndarray of shape (n_rows, 1), optional
        Number of each row's batch.

    Returns
    -------
    ndarray of float64, shape (n_components, n_outputs)
        Rows of counts are scaled to the sum ``spec.data.size_sum``.
    """
    decoder = [
        (layer, W.astype(np.float64), b.astype(np.float64))
        for layer, W, b in list(zip(spec.layers, coefs, intercepts, strict=True))[spec.latent :]
    ]
    scale = spec.data.size_sum if spec.loss.info.of_counts and spec.layers[-1].activation is Activation.SOFTMAX else 1.0
    if spec.n_heads > 1:  # the first head gives the means
        layer, W, b = decoder[-1]
        n = spec.n_outputs
        decoder[-1] = dataclasses.replace(layer, n_out=n), W[:, :n], b[:n]
    widest = max(layer.n_out for layer, _, _ in decoder)
    step = max(1, _ELEMENTS // (spec.n_components * widest))
    total = np.zeros((spec.n_components, spec.n_outputs))
    for start in range(0, len(codes), step):
        a = codes[start : start + step].astype(np.float64)
        if condition is not None:
            a = np.hstack([a, condition[start : start + step] == np.arange(spec.data.n_conditions)])
        tangent = np.broadcast_to(np.eye(spec.n_components, a.shape[1]), (len(a), spec.n_components, a.shape[1]))
        for layer, W, b in decoder:
            activation = layer.activation
            z = _linear(layer, a, W) + np.repeat(b[None], layer.n_out // len(b), axis=0).reshape(-1)
            a = ACTIVATE[activation](z)
            tangent = _linear(layer, tangent.reshape(-1, layer.n_in), W).reshape(*tangent.shape[:2], layer.n_out)
            if activation is Activation.SOFTMAX:
                tangent = a[:, None] * (tangent - (a[:, None] * tangent).sum(axis=2, keepdims=True))
            elif activation is not Activation.LINEAR:
                slope = DERIVATIVE[activation](z if activation.needs_preactivation else a)
                tangent = tangent * slope[:, None]
        total += np.abs(tangent).sum(axis=0)
    return scale * total


def _linear(layer: LayerSpec, rows: NDArray[np.float64], W: NDArray[np.float64]) -> NDArray[np.float64]:
    """Rows through a layer's weight."""
    if layer.convolution is None:
        return rows @ W
    out: NDArray[np.float64] = Images.of(layer.convolution).convolve(rows.reshape(-1, *layer.convolution.shape), W)
    return out.reshape(len(rows), layer.n_out)
