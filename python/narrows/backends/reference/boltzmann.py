"""Restricted Boltzmann machines."""

from __future__ import annotations

from ...plan.ops import OpCode, Units
from ...random import philox
from .run import Array, Run, op


@op(OpCode.DRAW)
def draw(run: Run, *, mean: Array, out: Array, kind: int, stream: int) -> None:
    p = mean[: run.m]
    if kind == Units.BERNOULLI:
        out[...] = philox.uniform(run.seed, stream, run.step, *p.shape) < p
    else:
        out[...] = p + philox.normal(run.seed, stream, run.step, *p.shape)


@op(OpCode.CONTRAST)
def contrast(run: Run, *, x: Array, y: Array, weight: Array | None, out: Array) -> None:
    out[...] = x.dtype.type(1 / run.m) * (1 if weight is None else weight) * (x - y)


@op(OpCode.KEEP)
def keep(run: Run, *, x: Array, out: Array) -> None:
    out[: run.m] = x
