"""Ops on dense rows: products, losses, links, noise, and all ops that are one launch of their own operands."""

from __future__ import annotations

from collections.abc import Callable

from ....plan.ops import OpCode, Units
from ....plan.spec import Activation, Corruption, Loss
from ..launches import ROWS, TURNED, Sink, Writer
from ..layout import Operands
from ..table import BOOL, loss_name
from .registry import LOWER, act, lowers

PLAIN: dict[OpCode, tuple[Callable[..., None], str, str]] = {
    OpCode.ACTIVITY_L1: (Writer.by_row, "activity_l1<{act}>", "a"),
    OpCode.COLUMN_DECAY: (Writer.each, "column_decay", "dW"),
    OpCode.COTANGENT: (Writer.each, "cotangent", "dout"),
    OpCode.CURVES: (Writer.each, "curves<{act}>", "dz"),
    OpCode.DROPOUT: (Writer.quads, "dropout", "x"),
    OpCode.GATHER: (Writer.by_row, "gather", "out"),
    OpCode.GAUSSIAN: (Writer.by_row, "gaussian<{act}>", "z"),
    OpCode.KEEP: (Writer.each, "copy", "x"),
    OpCode.KL_SPARSITY: (Writer.each, "kl_sparsity<{act}>", "saved"),
    OpCode.LATENT_KL: (Writer.by_row, "latent_kl", "noise"),
    OpCode.LOG_NORMALIZE: (Writer.each, "log_normalize", "x"),
    OpCode.MAXPOOL_DGRAD: (Writer.each, "maxpool_dgrad<{act}>", "out"),
    OpCode.PROBE: (Writer.quads, "probe_signs", "out"),
    OpCode.SAMPLE: (Writer.quads, "sample", "z"),
    OpCode.SHRINK: (Writer.each, "shrink", "W"),
    OpCode.SLOPES: (Writer.each, "slopes<{act}>", "saved"),
    OpCode.SQUARED_NORM: (Writer.by_row, "squared_norm", "x"),
}
"""Other ops that are one launch: how threads share it, its kernel, and the operand that has as many elements."""


def plain(code: OpCode) -> Callable[[Writer, Operands], None]:
    how, kernel, name = PLAIN[code]

    def write(w: Writer, o: Operands) -> None:
        how(w, kernel.format(act=act(o)) if "{act}" in kernel else kernel, getattr(o, name), o)

    return write


LOWER.update({code: plain(code) for code in PLAIN})


@lowers(OpCode.CORRUPT)
def corrupt(w: Writer, o: Operands) -> None:
    w.quads(f"corrupt_{Corruption(o.kind).name.lower()}", o.x, o)


@lowers(OpCode.DENSE)
def dense(w: Writer, o: Operands) -> None:
    to = Sink(f"Activate<{act(o)}>", Operands("Activate", b=o.b, out=o.out, pre=o.pre))
    w.product(to, (w.m, o.out.cols, o.x.cols), (ROWS, ROWS if o.transposed else TURNED), o.x, o.W, rounds=True)


@lowers(OpCode.DGRAD)
def dgrad(w: Writer, o: Operands) -> None:
    to = Sink(f"Slope<{act(o)}>", Operands("Slope", saved=o.saved, out=o.out, scale=o.scale))
    w.product(to, (w.m, o.out.cols, o.dz.cols), (ROWS, TURNED if o.transposed else ROWS), o.dz, o.W, rounds=True)


@lowers(OpCode.LINK)
def link(w: Writer, o: Operands) -> None:
    if o.activation == Activation.SOFTMAX:
        w.by_row("activate_softmax", o.z, o)
    else:
        w.each(f"activate<{act(o)}>", o.z, o)


@lowers(OpCode.LOSS)
def loss(w: Writer, o: Operands) -> None:
    kind = Loss(o.loss)
    if kind is Loss.MULTINOMIAL:
        kernel = "loss_multinomial"
    elif o.activation == Activation.SOFTMAX:
        kernel = f"loss_softmax<{loss_name(kind)}>"
    elif kind is Loss.BCE:
        kernel = "loss<Logistic>"
    else:
        kernel = f"loss<Linked<{loss_name(kind)}, {act(o)}>>"
    w.by_row(kernel, o.z, o)


@lowers(OpCode.MEANS)
def means(w: Writer, o: Operands) -> None:
    w.by_row(f"means<{BOOL[o.activation == Activation.SOFTMAX]}>", o.out, o)


@lowers(OpCode.DRAW)
def draw(w: Writer, o: Operands) -> None:
    w.quads("draw_binary" if o.kind == Units.BERNOULLI else "draw_normal", o.out, o)
