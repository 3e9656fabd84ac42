"""Ops on dense rows."""

from __future__ import annotations

from ....plan.ops import OpCode, Source, Units
from ....plan.spec import Activation, Corruption, Loss
from ..launches import ROWS, TURNED, Writer
from ..table import BOOL, loss_name
from .registry import Operands, act, lowers

# --- data in and forward ----------------------------------------------------------------------------------------------


@lowers(OpCode.GATHER)
def gather(w: Writer, o: Operands) -> None:
    w.by_row("gather", o.out.cols, (o.out, o.shift), ints=(o.source,))


@lowers(OpCode.SHIFT)
def shift(w: Writer, o: Operands) -> None:
    w.each("shift", o.out, (o.out, o.b), ints=(Source.SHIFT,))


@lowers(OpCode.CONDITION)
def condition(w: Writer, o: Operands) -> None:
    w.each("condition", o.out, (o.out, o.z), ints=(Source.CONDITION,))


@lowers(OpCode.CORRUPT)
def corrupt(w: Writer, o: Operands) -> None:
    kernel = f"corrupt_{Corruption(o.kind).name.lower()}"
    w.quads(kernel, o.x, (o.x,), ints=(o.stream,), floats=(o.level, o.low, o.high))


@lowers(OpCode.DENSE)
def dense(w: Writer, o: Operands) -> None:
    size = w.m, o.out.cols, o.x.cols
    sides, slots = (ROWS, ROWS if o.transposed else TURNED), (o.x, o.W, o.b, o.out, o.pre)
    w.product(f"Activate<{act(o)}>", size, sides, slots, rounds=True)


@lowers(OpCode.DROPOUT)
def dropout(w: Writer, o: Operands) -> None:
    w.quads("dropout", o.x, (o.x,), ints=(o.stream,), floats=(o.rate,))


@lowers(OpCode.LINK)
def link(w: Writer, o: Operands) -> None:
    if o.activation == Activation.SOFTMAX:
        w.by_row("activate_softmax", o.z.cols, (o.z,))
    else:
        w.each(f"activate<{act(o)}>", o.z, (o.z,))


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
    w.by_row(kernel, o.z.cols, (o.z, o.target, o.weight, o.rowloss), floats=(o.delta,))


# --- backward


@lowers(OpCode.DGRAD)
def dgrad(w: Writer, o: Operands) -> None:
    size = w.m, o.out.cols, o.dz.cols
    sides, slots = (ROWS, TURNED if o.transposed else ROWS), (o.dz, o.W, o.saved, o.out)
    w.product(f"Slope<{act(o)}>", size, sides, slots, floats=(o.scale,), rounds=True)


@lowers(OpCode.ACTIVITY_L1)
def activity_l1(w: Writer, o: Operands) -> None:
    slots = o.a, o.saved, o.weight, o.dz, o.rowpenalty
    w.by_row(f"activity_l1<{act(o)}>", o.a.cols, slots, floats=(o.strength,))


@lowers(OpCode.KL_SPARSITY)
def kl_sparsity(w: Writer, o: Operands) -> None:
    slots = o.saved, o.mean, o.weight, o.dz, o.penalty
    w.each(f"kl_sparsity<{act(o)}>", o.saved, slots, floats=(o.strength, o.target))


# --- variational networks ---------------------------------------------------------------------------------------------


@lowers(OpCode.SAMPLE)
def sample(w: Writer, o: Operands) -> None:
    w.quads("sample", o.z, (o.stats, o.z, o.noise), ints=(o.stream,))


@lowers(OpCode.LATENT_KL)
def latent_kl(w: Writer, o: Operands) -> None:
    slots = o.stats, o.noise, o.weight, o.dz, o.dstats, o.rowkl
    w.by_row("latent_kl", o.noise.cols, slots, floats=(o.strength,))


@lowers(OpCode.GAUSSIAN)
def gaussian(w: Writer, o: Operands) -> None:
    w.by_row(f"gaussian<{act(o)}>", o.z.cols, (o.z, o.target, o.weight, o.logvar, o.rowloss, o.rates))


@lowers(OpCode.LOG_NORMALIZE)
def log_normalize(w: Writer, o: Operands) -> None:
    w.each("log_normalize", o.x, (o.x, o.size_sum), floats=(o.scale,))


@lowers(OpCode.MEANS)
def means(w: Writer, o: Operands) -> None:
    kernel = f"means<{BOOL[o.activation == Activation.SOFTMAX]}>"
    w.by_row(kernel, o.out.cols, (o.z, o.size_sum, o.out), floats=(o.scale,))


# --- restricted Boltzmann machines ------------------------------------------------------------------------------------


@lowers(OpCode.DRAW)
def draw(w: Writer, o: Operands) -> None:
    kernel = "draw_binary" if o.kind == Units.BERNOULLI else "draw_normal"
    w.quads(kernel, o.out, (o.mean, o.out), ints=(o.stream,))


@lowers(OpCode.CONTRAST)
def contrast(w: Writer, o: Operands) -> None:
    w.each("contrast", o.out, (o.out, o.x, o.y, o.weight))


@lowers(OpCode.KEEP)
def keep(w: Writer, o: Operands) -> None:
    w.each("copy", o.x, (o.x, o.out))
