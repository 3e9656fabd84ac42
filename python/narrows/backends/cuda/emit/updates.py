"""Gradients of weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from ....plan.ops import OpCode, padded
from ....plan.spec import Precision
from ..launches import BIAS_ROWS, EXTENDED, TURNED, Area, View, Writer
from ..table import RULES
from .registry import Operands, lowers

# --- sums and updates -------------------------------------------------------------------------------------------------


@lowers(OpCode.REDUCE)
def reduce(w: Writer, o: Operands) -> None:
    w.launch("reduce", 1, 64, (o.x, o.weight, o.terms.part(o.index, 1, 1, 1)), (0, o.mean))


@lowers(OpCode.SQNORM)
def sqnorm(w: Writer, o: Operands) -> None:
    w.launch("sqnorm", o.partial.cols, 256, (w.region(Area.GRADIENT), o.partial))


@lowers(OpCode.SHRINK)
def shrink(w: Writer, o: Operands) -> None:
    w.each("shrink", o.W, (o.W,), floats=(o.rate,))


@lowers(OpCode.UPDATE)
def update(w: Writer, o: Operands) -> None:
    moments = [w.region(area) for area in (Area.MOMENT1, Area.MOMENT2)[: w.plan.n_moments]]
    slots = w.region(Area.GRADIENT), o.partial, None, w.region(Area.PARAMETER), *moments
    w.each(f"update<{RULES[o.solver]}>", slots[0], slots, floats=(o.beta_1, o.beta_2, o.epsilon, o.clip))


class Sink(NamedTuple):
    """What becomes of a gradient: an epilogue, its slots from the third on, its flag and its numbers."""

    epilogue: str
    slots: tuple[View | None, ...]
    flag: int
    floats: tuple[float, ...]


def stored(out: View, accumulate: int = 0) -> Sink:
    """It is kept."""
    return Sink("Store", (out,), accumulate, (1.0,))


def descent(w: Writer, o: Operands) -> Sink:
    """It is used up by the parameter that `o` names W, or b; their penalties, which are of the weight as it was, are
    written at once."""
    given = vars(o)
    W, penalty = given.get("W"), given.get("penalty")
    decays = given.get("l2", 0.0), given.get("l1", 0.0), given.get("rate", 0.0)
    before, colrate = given.get("dW"), given.get("colrate")
    if W is None:
        W, penalty, decays, before, colrate = o.b, None, (0.0, 0.0, 0.0), given.get("db"), None
    else:
        penalties(w, W, penalty, *decays[:2])
    floats = o.beta_1, o.beta_2, o.epsilon, *decays
    return Sink(
        f"Descend<{RULES[o.solver]}>", (before, W, o.moment1, o.moment2, colrate), int(penalty is not None), floats
    )


@lowers(OpCode.WGRAD_UPDATE)
def wgrad_update(w: Writer, o: Operands) -> None:
    weight_gradient(w, o, descent(w, o), o.W, lambda sums: descent(w, sums), colsum_update)


@lowers(OpCode.COLSUM_UPDATE)
def colsum_update(w: Writer, o: Operands) -> None:
    to = descent(w, o)
    w.column_sums(to.epilogue, o.x, None, to.slots, (to.flag,), to.floats)


@lowers(OpCode.GRAIN_UPDATE)
def grain_update(w: Writer, o: Operands) -> None:
    to = descent(w, o)
    ints = o.W.rows, o.W.cols, 2, to.flag, o.column, padded(o.W.cols)
    w.each(f"grain_sum<{to.epilogue}>", o.W, (o.partial, None, *to.slots), ints=ints, floats=to.floats)


@lowers(OpCode.WGRAD)
def wgrad(w: Writer, o: Operands) -> None:
    to = stored(o.dW, o.accumulate)
    weight_gradient(w, o, to, o.dW, lambda sums: stored(sums.out, sums.accumulate), colsum)


def with_bias(o: Operands, sums: Operands) -> Operands:
    """A weight gradient with the op that sums its dz."""
    return Operands(**vars(o), sums=sums)


def weight_gradient(
    w: Writer,
    o: Operands,
    to: Sink,
    W: View,
    bias: Callable[[Operands], Sink],
    apart: Callable[[Writer, Operands], None],
) -> None:
    """x' dz, and the sums of dz if the op comes `with_bias`: with the product, where `bias` makes their sink, or
    `apart`, where that would take long or round them."""
    sums, size = getattr(o, "sums", None), (W.rows, W.cols, w.m)
    blas = w.by_blas(size, rounds=True)
    together = to.epilogue != "Store" and w.m <= BIAS_ROWS if blas else w.precision is not Precision.BFLOAT16
    if sums is None or not together:
        slots = o.x, o.dz, *to.slots
        w.product(to.epilogue, size, (TURNED, TURNED), slots, (to.flag,), to.floats, rounds=True)
        if sums is not None:
            apart(w, sums)
        return
    last = bias(sums)
    slots = o.x, o.dz, *to.slots, *(None,) * (5 - len(to.slots)), *last.slots
    flags = to.flag, last.flag
    if blas:
        w.product(to.epilogue, size, (TURNED, TURNED), slots, flags, to.floats, rounds=True, dz=o.dz)
    else:
        size = W.rows + 1, W.cols, w.m
        w.product(f"WithBias<{to.epilogue}>", size, (EXTENDED, TURNED), slots, flags, to.floats, rounds=True)


@lowers(OpCode.COLSUM)
def colsum(w: Writer, o: Operands) -> None:
    w.column_sums("Store", o.x, o.weight, (o.out,), (o.accumulate,), (1 / w.m if o.mean else 1.0,))


@lowers(OpCode.DECAY)
def decay(w: Writer, o: Operands) -> None:
    penalties(w, o.W, o.penalty, o.l2, o.l1)
    w.each("decay", o.W, (o.dW, o.W), floats=(o.l2, o.l1))


def penalties(w: Writer, W: View, penalty: View | None, l2: float, l1: float) -> None:
    if penalty is not None:
        w.by_warp("penalties", penalty.rows * penalty.cols, (W, penalty), floats=(l2, l1))
