"""Launches of ops that walk sparse rows: products, squared error in Gram form, likelihoods of counts.

Promises: what a product asks of the rows of a source, where each band of columns begins, is noted once in a run; no
array of rows x features is made, nor the gradient of a weight that is used up at once.
Never: knows the plan's ops; `lowering` reads their operands and says what becomes of a gradient.
"""

from __future__ import annotations

from typing import NamedTuple

from ....plan.ops import OpCode
from ....plan.spec import Activation, Loss
from ..launches import THREADS, View, Writer, whole_warps
from ..table import BOOL, RULES, loss_name
from .registry import Operands, act, lowers
from .updates import Sink, descent, stored

BAND = 32
"""Columns that kernels take together."""
TILE_ROWS, PART = 64, 640
"""Rows and columns of X that a block of a product of sparse rows has; another launch adds a row's parts."""
GRAM_TILE, GRAM_COLUMNS = 64, 256
"""Edge of the tile of a weight's Gram matrix that a block has, and the columns of the weight that it adds there."""
COUNT_GROUP = 2
"""Rows of a block that judges counts."""
WIDE_ROW = 4096
"""Features from which on such a block has twice the threads."""


class Noise(NamedTuple):
    """What the network sees of stored elements: masked by `level` with random numbers of `stream`, and normalised to
    `scale` if there are the sums of their rows."""

    library: View | None = None
    stream: int = 0
    level: float = 0.0
    scale: float = 1.0


AS_STORED = Noise()


def lanes_of(cols: int) -> tuple[int, int]:
    """Outputs of each lane, of 1, 2 or 4, and strips of 32 lanes that outputs of a row make."""
    each = 1 if cols <= 32 else 2 if cols <= 64 else 4
    return each, -(-cols // (32 * each))


def places(w: Writer, source: int, library: View | None = None) -> tuple[View, View | None]:
    """Where the rows of a source have their bands and, for likelihoods, which elements are not zero; `library` gets
    their sums."""
    columns = w.plan.spec.n_outputs if source else w.plan.spec.n_features
    starts, new = w.kept(f"starts{source}", -(-columns // BAND) + 1, w.m, wide=True)
    found = w.kept(f"found{source}", starts.rows - 1, w.m)[0] if w.plan.spec.loss.info.of_counts else None
    if new or library is not None:
        w.launch("scan_rows", w.m, whole_warps(-(-columns // 64)), (library, starts, found), (source,))
    return starts, found


def parts(w: Writer, W: View, *, turned: bool, source: int, noise: Noise = AS_STORED) -> View:
    """The sums that make the rows of a source times W, or W', PART columns each."""
    starts, _ = places(w, source)
    columns, cols = (W.cols, W.rows) if turned else (W.rows, W.cols)
    out = w.temporary(-(-columns // PART) * w.m, cols)
    each, strips = lanes_of(cols)
    blocks = -(-w.m // TILE_ROWS) * (out.rows // w.m) * strips
    ints, floats = (source, int(turned), PART, 0, 0, noise.stream), (0.0,) * 6 + (noise.level, noise.scale)
    w.launch(f"sparse_parts<{each}>", blocks, 512, (W, noise.library, starts, out), ints, floats)
    return out


def outer(
    w: Writer, to: Sink, dz: View, columns: int, *, source: int = 0, bias: Sink | None = None,
    shift: View | None = None, noise: Noise = AS_STORED,
) -> None:  # fmt: skip
    """The gradient of a weight by the rows of a source, and the sums of dz for its `bias` if they are not shifted."""
    starts, _ = places(w, source)
    sums, (each, strips) = None, lanes_of(dz.cols)
    if shift is not None:
        sums = w.temporary(1, dz.cols)
        w.column_sums("Store", dz, None, (sums,), floats=(1.0,))
    floats = *to.floats, *(0.0,) * (6 - len(to.floats)), noise.level, noise.scale
    last = (shift, sums) if bias is None else bias.slots[:4]  # biases have no rates of columns
    slots = dz, noise.library, *filled(to.slots, 5), *filled(last, 4), starts
    rows, flag, epilogue = columns + (bias is not None), bias.flag if bias else 0, to.epilogue
    kernel = f"sparse_outer<{each}, {f'WithBias<{epilogue}>' if bias else epilogue}>"
    blocks = (-(-columns // BAND) + (bias is not None)) * strips
    w.launch(kernel, blocks, THREADS, slots, (rows, source, 0, to.flag, flag, noise.stream), floats)


def filled(slots: tuple[View | None, ...], n: int) -> tuple[View | None, ...]:
    return *slots, *(None,) * (n - len(slots))


def gram_slopes(
    w: Writer, to: str, slots: tuple[View | None, ...], W: View, shift: View | None, source: int,
    flag: int = 0, floats: tuple[float, ...] = (),
) -> None:  # fmt: skip
    """The gradient of a decoder in Gram form, by `to` of csrc/cuda/gram.cuh; `slots` are its first nine."""
    starts, _ = places(w, source)
    each, strips = lanes_of(W.rows)
    kept = w.temporary(W.rows, W.cols) if strips > 1 and to != "GramStore" else None
    kernel = f"sparse_mse_slopes<{each}, {to}>"
    w.launch(kernel, -(-W.cols // BAND), THREADS, (*slots, shift, starts, kept), (source, 0, 0, flag), floats)


@lowers(OpCode.SIZE_SUM)
def size_sum(w: Writer, o: Operands) -> None:
    places(w, o.source, o.out)


@lowers(OpCode.COUNTS)
def counts(w: Writer, o: Operands) -> None:
    loss, softmax = Loss(o.loss), o.activation == Activation.SOFTMAX
    n = o.z.cols // (loss.info.heads + o.by_cell)
    groups = -(-w.m // COUNT_GROUP)
    sums = w.temporary(groups, n) if o.partial is not None and w.learns else None
    threads = 2 * THREADS if n >= WIDE_ROW else whole_warps(-(-n // 4))
    kernel = f"counts<{loss_name(loss)}, {BOOL[softmax]}, {BOOL[o.by_cell]}>"
    slots = o.z, o.weight, o.size_sum, o.log_dispersion, o.rowloss, places(w, o.source)[1], sums
    w.launch(kernel, groups, threads, slots, (o.source, n), (o.scale,))
    if sums is not None:
        grain, blocks = -(-groups // o.partial.rows), -(-n // 32) * o.partial.rows
        w.launch("colsum_grains", blocks, THREADS, (sums, None, o.partial), (grain,))


# --- sparse rows ------------------------------------------------------------------------------------------------------


def noise(o: Operands) -> Noise:
    return Noise(o.size_sum, o.stream, o.level, o.scale)


@lowers(OpCode.SPARSE_DENSE)
def sparse_dense(w: Writer, o: Operands) -> None:
    moved = None
    if o.shift is not None:
        moved = w.temporary(1, o.W.cols)
        w.column_sums("Store", o.W, o.shift.part(0, o.W.rows, 1, 1), (moved,), floats=(1.0,))
    sums = parts(w, o.W, turned=False, source=0, noise=noise(o))
    w.each(f"sparse_dense<{act(o)}>", (w.m, o.W.cols), (sums, moved, o.b, o.out, o.pre))


@lowers(OpCode.SPARSE_WGRAD)
def sparse_wgrad(w: Writer, o: Operands) -> None:
    sums = getattr(o, "sums", None)
    bias = None if sums is None else stored(sums.out, sums.accumulate)
    outer(w, stored(o.dW, o.accumulate), o.dz, o.dW.rows, bias=bias, shift=o.shift, noise=noise(o))


@lowers(OpCode.SPARSE_WGRAD_UPDATE)
def sparse_wgrad_update(w: Writer, o: Operands) -> None:
    sums, to = getattr(o, "sums", None), descent(w, o)
    bias = None if sums is None else descent(w, sums)
    outer(w, to, o.dz, o.W.rows, bias=bias, shift=o.shift, noise=noise(o))


# --- squared error against sparse rows --------------------------------------------------------------------------------


@lowers(OpCode.WEIGHT_GRAM)
def weight_gram(w: Writer, o: Operands) -> None:
    tiles = -(-o.W.rows // GRAM_TILE)
    sums = w.temporary(-(-o.W.cols // GRAM_COLUMNS), o.high.rows**2, wide=True)
    blocks = (tiles * (tiles + 1) // 2 + 1) * sums.rows
    w.launch("weight_gram_grains", blocks, THREADS, (o.W, o.b, sums), (GRAM_COLUMNS,))
    w.each("weight_gram", o.high, (sums, o.high, o.low))


@lowers(OpCode.SPARSE_MSE)
def sparse_mse(w: Writer, o: Operands) -> None:
    sums, slope = parts(w, o.W, turned=True, source=o.source), w.temporary(w.m, o.high.cols, wide=True)
    slots = o.h, o.W, o.high, o.low, o.saved, o.weight, o.rowloss, o.out, slope, o.b, sums
    w.launch(f"sparse_mse<{act(o)}>", w.m, whole_warps(o.high.cols), slots, (o.source,), (o.scale,))


@lowers(OpCode.ROW_GRAM)
def row_gram(w: Writer, o: Operands) -> None:
    w.launch("row_gram", (-(-o.out.rows // 32)) ** 2, THREADS, (o.h, o.weight, o.out))


@lowers(OpCode.SPARSE_MSE_WGRAD)
def sparse_mse_wgrad(w: Writer, o: Operands) -> None:
    slots = o.h, o.gram, o.weight, o.W, o.dW, o.db, o.b, None, None
    gram_slopes(w, "GramStore", slots, o.W, None, o.source)


@lowers(OpCode.SPARSE_MSE_UPDATE)
def sparse_mse_update(w: Writer, o: Operands) -> None:
    to = descent(w, o)
    slots = o.h, o.gram, o.weight, o.W, o.moment1, o.moment2, o.b, o.b_moment1, o.b_moment2
    gram_slopes(w, f"GramDescend<{RULES[o.solver]}>", slots, o.W, o.shift, o.source, to.flag, to.floats)
