"""Convolutions and poolings."""

from __future__ import annotations

import numpy as np

from ...plan.ops import OpCode, padded
from ...plan.spec import Activation
from .activations import ACTIVATE, DERIVATIVE
from .patches import Images, Pooling
from .run import Array, Run, op


@op(OpCode.CONVOLVE)
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


@op(OpCode.CONV_DGRAD)
def conv_dgrad(
    run: Run, *, dz: Array, W: Array, saved: Array, out: Array, activation: int, scale: float, **geometry: int
) -> None:
    images = Images(**geometry)
    images.x(out)[...] = images.adjoint(images.out(dz), W)
    out *= DERIVATIVE[Activation(activation)](saved * saved.dtype.type(scale))


@op(OpCode.CONV_WGRAD)
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
    # The first grain holds the whole sum over rows.
    images = images or Images(**geometry)
    rows, filters = images.conv.weight_shape
    dout = images.out(dz)
    if not accumulate:
        partial[...] = 0
    sums = partial[0, : (rows + 1) * padded(filters)].reshape(rows + 1, padded(filters))
    sums[:rows, :filters] += images.gradient(images.x(x), dout)
    if bias:
        sums[rows, :filters] = dout.sum(axis=(0, 1, 2))


@op(OpCode.MAXPOOL)
def maxpool(run: Run, *, x: Array, out: Array, **values: int) -> None:
    pool = Pooling(**values)
    pool.out(out)[...] = pool.windows(pool.x(x)).max(axis=3)


@op(OpCode.MAXPOOL_DGRAD)
def maxpool_dgrad(run: Run, *, dout: Array, x: Array, saved: Array, out: Array, activation: int, **values: int) -> None:
    pool = Pooling(**values)
    spread = pool.out(dout).repeat(pool.pool_y, axis=1).repeat(pool.pool_x, axis=2)
    pool.x(out)[...] = spread * pool.greatest(pool.x(x))
    out *= DERIVATIVE[Activation(activation)](saved)


@op(OpCode.MAXPOOL_PICK)
def maxpool_pick(run: Run, *, y: Array, x: Array, out: Array, **values: int) -> None:
    pool = Pooling(**values)
    pool.out(out)[...] = pool.windows(np.where(pool.greatest(pool.x(x)), pool.x(y), 0)).sum(axis=3)
