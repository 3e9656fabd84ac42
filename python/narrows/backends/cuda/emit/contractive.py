"""Contractive penalties."""

from __future__ import annotations

from ....plan.ops import OpCode, jacobian_segments, padded, segments
from ..launches import ROWS, THREADS, TURNED, View, Writer
from ..table import CONTRACTED
from .registry import Operands, act, lowers

# --- the contractive penalty ------------------------------------------------------------------------------------------


@lowers(OpCode.CONTRACTIVE)
def contractive(w: Writer, o: Operands) -> None:
    norms, sums = w.temporary(1, o.W.cols), w.temporary(1, o.W.cols)
    slots = o.saved, o.noisy, o.W, o.weight, o.colrate, norms, sums
    blocks = 2 * -(-o.W.cols // CONTRACTED)
    w.launch(f"contractive_columns<{act(o)}>", blocks, THREADS, slots, (o.accumulate_colrate,), (o.strength,))
    by_row = o.dz, o.saved, o.weight, norms, o.noisy, o.dnoisy, sums, o.penalty
    w.each(f"contractive_rows<{act(o)}>", o.dz, by_row, ints=(o.accumulate_dz,), floats=(o.strength,))


@lowers(OpCode.COLUMN_DECAY)
def column_decay(w: Writer, o: Operands) -> None:
    w.each("column_decay", o.dW, (o.dW, o.W, o.colrate))


@lowers(OpCode.GRAM)
def gram(w: Writer, o: Operands) -> None:
    w.product("Store", (o.W.cols, o.W.cols, o.W.rows), (TURNED, TURNED), (o.W, o.W, o.out), floats=(1.0,))


@lowers(OpCode.SLOPES)
def slopes(w: Writer, o: Operands) -> None:
    w.each(f"slopes<{act(o)}>", o.saved, (o.saved, o.out), ints=(o.column,))


@lowers(OpCode.JACOBIAN)
def jacobian(w: Writer, o: Operands) -> None:
    # Chains of derivatives have a row for each latent of each row of the batch.
    weights = [W for W in (o.W2, o.W3, o.W4) if W is not None]
    widths = [o.gram.rows, *(W.cols for W in weights)]
    columns, parts = segments(widths), jacobian_segments(widths)
    latents, last = widths[-1], len(widths) - 1
    rows = w.m * latents
    passes = [(o.slopes, o.dslopes, 2.0)]
    if o.noisy is not None:
        passes.append((o.noisy, o.dnoisy, -2.0))
    for out in (*(() if o.accumulate else (o.dslopes, o.partial)), *(() if o.dnoisy is None else (o.dnoisy,))):
        w.each("fill", out, (out,), floats=(0.0,))

    def chain(at: View) -> tuple[list[View | None], list[View]]:
        """Derivatives of the latents by the outputs and by the pre-activations of each layer."""
        by_out: list[View | None] = [None] * len(widths)  # of the last the identity
        by_pre = [w.temporary(rows, n) for n in widths]
        w.each("jacobian_seed", by_pre[last], (at, by_pre[last]), ints=(latents, columns[last]))
        for i in range(last - 1, -1, -1):
            by_out[i] = w.temporary(rows, widths[i])
            slots = by_pre[i + 1], weights[i], at, by_out[i], by_pre[i]
            w.product("Link", (rows, widths[i], widths[i + 1]), (ROWS, ROWS), slots, (latents, columns[i]))
        return by_out, by_pre

    def add(i: int, left: View, right: View) -> None:
        """left' right to part i of the sums over rows, all of which go to the first grain."""
        to = o.partial.part(parts[i], left.cols, right.cols, padded(right.cols))
        w.product("Store", (left.cols, right.cols, rows), (TURNED, TURNED), (left, right, to), (1,), (1.0,))

    chains = [chain(at) for at, _, _ in passes]
    B = chains[0][1][0]
    if o.noisy is not None:
        w.each("subtract", B, (B, chains[1][1][0]))
    product, shared = w.temporary(rows, widths[0]), w.temporary(rows, widths[0])
    w.product("Store", (rows, widths[0], widths[0]), (ROWS, TURNED), (B, o.gram, product), floats=(1.0,))
    slots = B, product, o.weight, o.rowpenalty
    w.by_row("jacobian_norm", widths[0], slots, ints=(latents,), floats=(o.strength,))
    w.each("share_rows", B, (B, o.weight, shared), ints=(latents,), floats=(o.strength,))
    add(0, shared, B)
    for (at, dat, sign), (by_out, by_pre) in zip(passes, chains, strict=True):
        d = w.temporary(rows, widths[0])
        w.each("share_rows", product, (product, o.weight, d), ints=(latents,), floats=(sign * o.strength,))
        for i in range(last + 1):
            w.each("jacobian_slopes", (w.m, widths[i]), (d, by_out[i], dat), ints=(latents, columns[i]))
            if i == last:
                break
            w.each("times_slopes", d, (d, at), ints=(latents, columns[i]))
            add(i + 1, by_pre[i + 1], d)
            onward = w.temporary(rows, widths[i + 1])
            size = rows, widths[i + 1], widths[i]
            w.product("Store", size, (ROWS, TURNED), (d, weights[i], onward), floats=(1.0,))
            d = onward


@lowers(OpCode.CURVES)
def curves(w: Writer, o: Operands) -> None:
    w.each(f"curves<{act(o)}>", o.dz, (o.dz, o.saved, o.dslopes), ints=(o.column, o.accumulate))


@lowers(OpCode.GRAIN_SUM)
def grain_sum(w: Writer, o: Operands) -> None:
    ld = padded(o.out.rows if o.form == 1 else o.out.cols)
    ints = o.out.rows, o.out.cols, o.form, 0, o.column, ld
    w.each("grain_sum<Store>", o.out, (o.partial, None, o.out), ints=ints, floats=(1.0,))


@lowers(OpCode.GRAM_WGRAD)
def gram_wgrad(w: Writer, o: Operands) -> None:
    w.product("Store", (o.dW.rows, o.dW.cols, o.W.cols), (ROWS, TURNED), (o.W, o.dgram, o.dW), floats=(2.0,))


@lowers(OpCode.PROBE)
def probe_signs(w: Writer, o: Operands) -> None:
    w.quads("probe_signs", o.out, (o.out,), ints=(o.stream,))


@lowers(OpCode.TANGENT)
def tangent(w: Writer, o: Operands) -> None:
    w.each("tangent", o.out, (o.out, o.x, o.slopes), ints=(o.column,))


@lowers(OpCode.SQUARED_NORM)
def squared_norm(w: Writer, o: Operands) -> None:
    w.by_row("squared_norm", o.x.cols, (o.x, o.weight, o.rowpenalty), ints=(o.accumulate,), floats=(o.strength,))


@lowers(OpCode.COTANGENT)
def cotangent(w: Writer, o: Operands) -> None:
    w.each("cotangent", o.dout, (o.dout, o.x, o.slopes, o.dslopes), ints=(o.column, o.accumulate))
