"""Contractive penalties."""

from __future__ import annotations

from ....plan.ops import OpCode, jacobian_segments, padded, segments
from ..launches import ROWS, THREADS, TURNED, Sink, View, Writer, stored
from ..layout import Operands
from ..table import CONTRACTED
from .registry import act, lowers


@lowers(OpCode.CONTRACTIVE)
def contractive(w: Writer, o: Operands) -> None:
    sums = Operands("contractive", norms=w.temporary(1, o.W.cols), sums=w.temporary(1, o.W.cols))
    w.launch(f"contractive_columns<{act(o)}>", 2 * -(-o.W.cols // CONTRACTED), THREADS, o, sums)
    w.each(f"contractive_rows<{act(o)}>", o.dz, o, sums)


@lowers(OpCode.GRAM)
def gram(w: Writer, o: Operands) -> None:
    w.product(stored(o.out), (o.W.cols, o.W.cols, o.W.rows), (TURNED, TURNED), o.W, o.W)


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
        w.each("fill", out, out=out, value=0.0)

    def chain(at: View) -> tuple[list[View | None], list[View]]:
        """Derivatives of the latents by the outputs and by the pre-activations of each layer."""
        by_out: list[View | None] = [None] * len(widths)  # of the last the identity
        by_pre = [w.temporary(rows, n) for n in widths]
        w.each("jacobian_seed", by_pre[last], slopes=at, out=by_pre[last], latents=latents, column=columns[last])
        for i in range(last - 1, -1, -1):
            by_out[i] = w.temporary(rows, widths[i])
            link = Operands("Link", slopes=at, out=by_out[i], scaled=by_pre[i], latents=latents, column=columns[i])
            size = rows, widths[i], widths[i + 1]
            w.product(Sink("Link", link), size, (ROWS, ROWS), by_pre[i + 1], weights[i])
        return by_out, by_pre

    def add(i: int, left: View, right: View) -> None:
        """left' right to part i of the sums over rows, all of which go to the first grain."""
        to = o.partial.part(parts[i], left.cols, right.cols, padded(right.cols))
        w.product(stored(to, accumulate=1), (left.cols, right.cols, rows), (TURNED, TURNED), left, right)

    chains = [chain(at) for at, _, _ in passes]
    B = chains[0][1][0]
    if o.noisy is not None:
        w.each("subtract", B, x=B, y=chains[1][1][0])
    product, shared = w.temporary(rows, widths[0]), w.temporary(rows, widths[0])
    w.product(stored(product), (rows, widths[0], widths[0]), (ROWS, TURNED), B, o.gram)
    sums = {"weight": o.weight, "rowpenalty": o.rowpenalty, "latents": latents, "strength": o.strength}
    w.by_row("jacobian_norm", B, B=B, product=product, **sums)
    w.each("share_rows", B, x=B, weight=o.weight, out=shared, latents=latents, factor=o.strength)
    add(0, shared, B)
    for (at, dat, sign), (by_out, by_pre) in zip(passes, chains, strict=True):
        d = w.temporary(rows, widths[0])
        factor = sign * o.strength
        w.each("share_rows", product, x=product, weight=o.weight, out=d, latents=latents, factor=factor)
        for i in range(last + 1):
            place = {"latents": latents, "column": columns[i]}
            w.each("jacobian_slopes", (w.m, widths[i]), d=d, by_out=by_out[i], dslopes=dat, **place)
            if i == last:
                break
            w.each("times_slopes", d, x=d, slopes=at, **place)
            add(i + 1, by_pre[i + 1], d)
            onward = w.temporary(rows, widths[i + 1])
            w.product(stored(onward), (rows, widths[i + 1], widths[i]), (ROWS, TURNED), d, weights[i])
            d = onward


@lowers(OpCode.GRAM_WGRAD)
def gram_wgrad(w: Writer, o: Operands) -> None:
    w.product(stored(o.dW, factor=2.0), (o.dW.rows, o.dW.cols, o.W.cols), (ROWS, TURNED), o.W, o.dgram)
