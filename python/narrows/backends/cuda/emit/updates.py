"""Gradients of weights and of biases, their penalties, and what uses them up: sums over rows, updates.

Promises: a gradient that is used up at once is never in memory. The product for a weight also gives the sums for its
bias, where that changes no bit and takes no longer.
"""

from __future__ import annotations

from ....plan.ops import OpCode, padded
from ....plan.spec import Precision
from ..launches import BIAS_ROWS, EXTENDED, THREADS, TURNED, Area, Sink, View, Writer, stored
from ..layout import Operands
from ..table import RULES
from .registry import lowers

__all__ = ["descent", "rule", "with_bias"]


# --- what becomes of a gradient ---------------------------------------------------------------------------------------


def descent(w: Writer, o: Operands) -> Sink:
    """An update of the parameter W of an op, or b. Penalties, which are of the weight before the update, are written
    at once."""
    W, before = (o.b, o.get("db")) if o.get("W") is None else (o.W, o.get("dW"))
    slots = Operands("Descend", dW=before, W=W, moment1=o.moment1, moment2=o.moment2, colrate=o.get("colrate"))
    return Sink(f"Descend<{RULES[o.solver]}>", slots + rule(w, o))


def rule(w: Writer, o: Operands) -> Operands:
    """The numbers of an update, for the penalties of W, too, if the op has a W."""
    rule = Operands("Rule", beta_1=o.beta_1, beta_2=o.beta_2, epsilon=o.epsilon)
    if o.get("W") is None:
        return rule + Operands("Decays", penalised=0, l2=0.0, l1=0.0, rate=0.0)
    penalties(w, o.W, o.penalty, o.l2, o.l1)
    return rule + Operands("Decays", penalised=int(o.penalty is not None), l2=o.l2, l1=o.l1, rate=o.rate)


def with_bias(sums: Operands, row: int) -> Operands:
    """Operands of a sink for the op that sums dz for a bias: row `row` of the product is the gradient of the bias."""
    if sums.rows == (OpCode.COLSUM.name,):
        return Operands("StoreBias", bias=sums.out, bias_row=row, accumulate_bias=sums.accumulate)
    moments = {"b_moment1": sums.moment1, "b_moment2": sums.moment2}
    return Operands("DescendBias", db=sums.db, b=sums.b, **moments, bias_row=row)


def penalties(w: Writer, W: View, penalty: View | None, l2: float, l1: float) -> None:
    """The penalty of each cell of a weight; a warp has a cell."""
    if penalty is not None:
        blocks = -(-penalty.rows * penalty.cols * 32 // THREADS)
        w.launch("penalties", blocks, THREADS, W=W, penalty=penalty, l2=l2, l1=l1)


# --- gradients of weights ---------------------------------------------------------------------------------------------


@lowers(OpCode.WGRAD)
def wgrad(w: Writer, o: Operands, sums: Operands | None = None) -> None:
    weight_gradient(w, o, stored(o.dW, o.accumulate), o.dW, sums)


@lowers(OpCode.WGRAD_UPDATE)
def wgrad_update(w: Writer, o: Operands, sums: Operands | None = None) -> None:
    weight_gradient(w, o, descent(w, o), o.W, sums)


def weight_gradient(w: Writer, o: Operands, to: Sink, W: View, sums: Operands | None) -> None:
    """x' dz, and the `sums` of dz: with the product, or in a launch of their own where that would take long or round
    them."""
    size = W.rows, W.cols, w.m
    blas = w.by_blas(size, rounds=True)
    together = to.epilogue != "Store" and w.m <= BIAS_ROWS if blas else w.precision is not Precision.BFLOAT16
    if sums is None or not together:
        w.product(to, size, (TURNED, TURNED), o.x, o.dz, rounds=True)
        if sums is not None:
            (colsum if to.epilogue == "Store" else colsum_update)(w, sums)
        return
    operands = to.operands + with_bias(sums, W.rows)
    if blas:
        w.product(Sink(to.epilogue, operands), size, (TURNED, TURNED), o.x, o.dz, rounds=True, dz=o.dz)
    else:
        size = W.rows + 1, W.cols, w.m
        w.product(Sink(f"WithBias<{to.epilogue}>", operands), size, (EXTENDED, TURNED), o.x, o.dz, rounds=True)


# --- sums over rows, and updates --------------------------------------------------------------------------------------


@lowers(OpCode.COLSUM)
def colsum(w: Writer, o: Operands) -> None:
    w.column_sums(stored(o.out, o.accumulate, 1 / w.m if o.mean else 1.0), o.x, o.weight)


@lowers(OpCode.COLSUM_UPDATE)
def colsum_update(w: Writer, o: Operands) -> None:
    w.column_sums(descent(w, o), o.x)


@lowers(OpCode.GRAIN_SUM)
def grain_sum(w: Writer, o: Operands) -> None:
    sum_grains(w, o, stored(o.out), o.out, o.form)


@lowers(OpCode.GRAIN_UPDATE)
def grain_update(w: Writer, o: Operands) -> None:
    sum_grains(w, o, descent(w, o), o.W, 2)


def sum_grains(w: Writer, o: Operands, to: Sink, out: View, form: int) -> None:
    w.each(
        f"grain_sum<{to.epilogue}>", out, to.operands, partial=o.partial, rows=out.rows, cols=out.cols, form=form,
        column=o.column, ld=padded(out.rows if form == 1 else out.cols),
    )  # fmt: skip


@lowers(OpCode.DECAY)
def decay(w: Writer, o: Operands) -> None:
    penalties(w, o.W, o.penalty, o.l2, o.l1)
    w.each("decay", o.W, o)


@lowers(OpCode.REDUCE)
def reduce(w: Writer, o: Operands) -> None:
    w.launch("reduce", 1, 64, o)


@lowers(OpCode.SQNORM)
def sqnorm(w: Writer, o: Operands) -> None:
    w.launch("sqnorm", o.partial.cols, 256, gradient=w.region(Area.GRADIENT), partial=o.partial)


@lowers(OpCode.UPDATE)
def update(w: Writer, o: Operands) -> None:
    gradient = w.region(Area.GRADIENT)
    w.each(
        f"update<{RULES[o.solver]}>", gradient, Operands("Rule", beta_1=o.beta_1, beta_2=o.beta_2, epsilon=o.epsilon),
        gradient=gradient, partial=o.partial, W=w.region(Area.PARAMETER), moment1=w.region(Area.MOMENT1),
        moment2=w.region(Area.MOMENT2) if w.plan.n_moments > 1 else None, clip=o.clip,
    )  # fmt: skip
