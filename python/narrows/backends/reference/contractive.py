"""The contractive penalty (Rifai et al., ICML 2011), exact and by probes."""

from __future__ import annotations

import numpy as np

from ...plan.ops import OpCode, jacobian_segments, padded, segments
from ...plan.spec import Activation
from ...random import philox
from .activations import CURVATURE, DERIVATIVE
from .run import Array, Run, grain_total, op, row_share


@op(OpCode.CONTRACTIVE)
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


@op(OpCode.COLUMN_DECAY)
def column_decay(run: Run, *, W: Array, colrate: Array, dW: Array) -> None:
    dW += W * colrate


@op(OpCode.GRAM)
def gram(run: Run, *, W: Array, out: Array) -> None:
    out[...] = W.T @ W


@op(OpCode.SLOPES)
def slopes(run: Run, *, saved: Array, out: Array, activation: int, column: int) -> None:
    out[:, column : column + saved.shape[1]] = DERIVATIVE[Activation(activation)](saved)


@op(OpCode.JACOBIAN)
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
        # The first grain holds the whole sum over rows.
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


@op(OpCode.CURVES)
def curves(run: Run, *, dslopes: Array, saved: Array, dz: Array, activation: int, column: int, accumulate: int) -> None:
    by_pre = dslopes[:, column : column + saved.shape[1]] * CURVATURE[Activation(activation)](saved)
    dz[...] = dz + by_pre if accumulate else by_pre


@op(OpCode.GRAIN_SUM)
def grain_sum(run: Run, *, partial: Array, out: Array, column: int, form: int) -> None:
    total = grain_total(partial, column, out.shape[::-1] if form == 1 else out.shape)
    if form == 0:
        out[...] = np.triu(total) + np.triu(total, 1).T
    else:
        out[...] = total.T if form == 1 else total


@op(OpCode.GRAM_WGRAD)
def gram_wgrad(run: Run, *, W: Array, dgram: Array, dW: Array) -> None:
    dW[...] = 2 * (W @ dgram)


@op(OpCode.PROBE)
def probe_signs(run: Run, *, out: Array, stream: int) -> None:
    out[...] = np.where(philox.uniform(run.seed, stream, run.step, *out.shape) < 0.5, -1, 1)


@op(OpCode.TANGENT)
def tangent(run: Run, *, x: Array, slopes: Array, out: Array, column: int) -> None:
    out[...] = x * slopes[:, column : column + x.shape[1]]


@op(OpCode.SQUARED_NORM)
def squared_norm(
    run: Run, *, x: Array, weight: Array | None, rowpenalty: Array, accumulate: int, strength: float
) -> None:
    share = row_share(run, weight, strength, x.dtype)
    value = share[:, 0] * (x * x).sum(axis=1)
    rowpenalty[:, 0] = rowpenalty[:, 0] + value if accumulate else value
    x *= 2 * share


@op(OpCode.COTANGENT)
def cotangent(run: Run, *, dout: Array, x: Array, slopes: Array, dslopes: Array, column: int, accumulate: int) -> None:
    at = slice(column, column + x.shape[1])
    dslopes[:, at] = dslopes[:, at] + dout * x if accumulate else dout * x
    dout *= slopes[:, at]
