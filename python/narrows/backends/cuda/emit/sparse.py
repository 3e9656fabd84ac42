"""Ops that read rows of a source in place: products with CSR rows, squared error in Gram form, likelihoods of counts.

Promises: the beginning of each band of columns in a row is found once in a run. There is no array of rows x features,
and no gradient of a weight if an update uses it up at once.
"""

from __future__ import annotations

from typing import Any

from ....plan.ops import OpCode, Source
from ....plan.spec import Activation, Loss
from ..launches import THREADS, Sink, View, Writer, stored, whole_warps
from ..layout import Operands
from ..table import BAND, BOOL, COUNT_GROUP, GRAM_TILE, RULES, SPARSE_ROWS, SPARSE_THREADS, loss_name
from .registry import act, lowers
from .updates import descent, rule, with_bias

PART = 640
"""Columns of X for each block of a product of CSR rows; another launch adds the parts of a row."""
GRAM_COLUMNS = 256
"""Columns of a weight for each block of its Gram matrix."""
WIDE_ROW = 4096
"""Blocks of a likelihood of counts have twice the threads from this many features on."""


def lanes_of(cols: int) -> tuple[int, int]:
    """Outputs of each lane (1, 2 or 4), and the number of strips of 32 lanes for the outputs of a row."""
    each = 1 if cols <= 32 else 2 if cols <= 64 else 4
    return each, -(-cols // (32 * each))


def scanned(w: Writer, source: int, size_sum: View | None = None) -> tuple[View, View | None]:
    """Where the bands of the rows of a source begin and, for likelihoods, which elements are not zero. The sums of the
    rows go to `size_sum`."""
    columns = w.plan.spec.n_outputs if source else w.plan.spec.n_features
    starts, new = w.kept(f"starts{source}", -(-columns // BAND) + 1, w.m, wide=True)
    found = w.kept(f"found{source}", starts.rows - 1, w.m)[0] if w.plan.spec.loss.info.of_counts else None
    if new or size_sum is not None:
        threads = whole_warps(-(-columns // 64))
        w.launch("scan_rows", w.m, threads, size_sum=size_sum, starts=starts, found=found, source=source)
    return starts, found


def noise(o: Operands) -> dict[str, Any]:
    """What SPARSE_DENSE and its gradients do to stored elements."""
    return {name: o.get(name) for name in ("size_sum", "stream", "level", "scale")}


AS_STORED: dict[str, Any] = {"size_sum": None, "stream": 0, "level": 0.0, "scale": 1.0}


def parts(w: Writer, W: View, *, turned: bool, source: int, noise: dict[str, Any] = AS_STORED) -> View:
    """The parts of the rows of a source times W, or W', for PART columns each."""
    starts, _ = scanned(w, source)
    columns, cols = (W.cols, W.rows) if turned else (W.rows, W.cols)
    out = w.temporary(-(-columns // PART) * w.m, cols)
    each, strips = lanes_of(cols)
    blocks = -(-w.m // SPARSE_ROWS) * (out.rows // w.m) * strips
    own = {"W": W, "starts": starts, "parts": out, "source": source, "turned": int(turned), "width": PART}
    w.launch(f"sparse_parts<{each}>", blocks, SPARSE_THREADS, **own, **noise)
    return out


# --- products with CSR rows -------------------------------------------------------------------------------------------


@lowers(OpCode.SPARSE_DENSE)
def sparse_dense(w: Writer, o: Operands) -> None:
    moved = None
    if o.shift is not None:
        moved = w.temporary(1, o.W.cols)
        w.column_sums(stored(moved), o.W, o.shift.part(0, o.W.rows, 1, 1))
    sums = parts(w, o.W, turned=False, source=Source.X, noise=noise(o))
    to = Operands("Activate", b=o.b, out=o.out, pre=o.pre)
    w.each(f"sparse_dense<{act(o)}>", (w.m, o.W.cols), to, parts=sums, moved=moved)


@lowers(OpCode.SPARSE_WGRAD)
def sparse_wgrad(w: Writer, o: Operands, sums: Operands | None = None) -> None:
    weight_gradient(w, o, stored(o.dW, o.accumulate), o.dW.rows, sums)


@lowers(OpCode.SPARSE_WGRAD_UPDATE)
def sparse_wgrad_update(w: Writer, o: Operands, sums: Operands | None = None) -> None:
    weight_gradient(w, o, descent(w, o), o.W.rows, sums)


def weight_gradient(w: Writer, o: Operands, to: Sink, columns: int, sums: Operands | None) -> None:
    """X' dz, and the `sums` of dz for a bias if the rows are not shifted."""
    starts, _ = scanned(w, Source.X)
    epilogue, operands = to
    if o.shift is not None:
        of_dz = w.temporary(1, o.dz.cols)
        w.column_sums(stored(of_dz), o.dz)
        operands += Operands("Shifted", shift=o.shift, sums=of_dz)
    elif sums is not None:
        epilogue, operands = f"WithBias<{epilogue}>", operands + with_bias(sums, columns)
    each, strips = lanes_of(o.dz.cols)
    blocks = (-(-columns // BAND) + (sums is not None)) * strips
    own = {"dz": o.dz, "starts": starts, "columns": columns, "source": Source.X}
    w.launch(f"sparse_outer<{each}, {epilogue}>", blocks, THREADS, operands, **own, **noise(o))


# --- squared error against CSR rows -----------------------------------------------------------------------------------


@lowers(OpCode.WEIGHT_GRAM)
def weight_gram(w: Writer, o: Operands) -> None:
    tiles = -(-o.W.rows // GRAM_TILE)
    sums = w.temporary(-(-o.W.cols // GRAM_COLUMNS), o.high.rows**2, wide=True)
    blocks = (tiles * (tiles + 1) // 2 + 1) * sums.rows
    w.launch("weight_gram_grains", blocks, THREADS, W=o.W, b=o.b, sums=sums, columns=GRAM_COLUMNS)
    w.each("weight_gram", o.high, sums=sums, high=o.high, low=o.low)


@lowers(OpCode.SPARSE_MSE)
def sparse_mse(w: Writer, o: Operands) -> None:
    sums, slope = parts(w, o.W, turned=True, source=o.source), w.temporary(w.m, o.high.cols, wide=True)
    w.launch(f"sparse_mse<{act(o)}>", w.m, whole_warps(o.high.cols), o, slope=slope, parts=sums)


@lowers(OpCode.ROW_GRAM)
def row_gram(w: Writer, o: Operands) -> None:
    w.launch("row_gram", (-(-o.out.rows // 32)) ** 2, THREADS, o)


@lowers(OpCode.SPARSE_MSE_WGRAD)
def sparse_mse_wgrad(w: Writer, o: Operands) -> None:
    gram_slopes(w, o, Sink("GramStore", Operands("GramStore", dW=o.dW, db=o.db)))


@lowers(OpCode.SPARSE_MSE_UPDATE)
def sparse_mse_update(w: Writer, o: Operands) -> None:
    moments = {name: o.get(name) for name in ("moment1", "moment2", "b_moment1", "b_moment2")}
    gram_slopes(w, o, Sink(f"GramDescend<{RULES[o.solver]}>", Operands("GramDescend", **moments) + rule(w, o)))


def gram_slopes(w: Writer, o: Operands, to: Sink) -> None:
    """The gradient of a decoder in Gram form, and what becomes of it."""
    starts, _ = scanned(w, o.source)
    each, strips = lanes_of(o.W.rows)
    kept = w.temporary(o.W.rows, o.W.cols) if strips > 1 and to.epilogue != "GramStore" else None
    own = {"h": o.h, "gram": o.gram, "weight": o.weight, "W": o.W, "b": o.b, "shift": o.get("shift"), "starts": starts}
    kernel, blocks = f"sparse_mse_slopes<{each}, {to.epilogue}>", -(-o.W.cols // BAND)
    w.launch(kernel, blocks, THREADS, to.operands, **own, kept=kept, source=o.source)


# --- counts -----------------------------------------------------------------------------------------------------------


@lowers(OpCode.SIZE_SUM)
def size_sum(w: Writer, o: Operands) -> None:
    scanned(w, o.source, o.out)


@lowers(OpCode.COUNTS)
def counts(w: Writer, o: Operands) -> None:
    loss, softmax = Loss(o.loss), o.activation == Activation.SOFTMAX
    features = o.z.cols // (loss.info.heads + o.by_cell)
    groups = -(-w.m // COUNT_GROUP)
    sums = w.temporary(groups, features) if o.partial is not None and w.learns else None
    threads = 2 * THREADS if features >= WIDE_ROW else whole_warps(-(-features // 4))
    kernel = f"counts<{loss_name(loss)}, {BOOL[softmax]}, {BOOL[o.by_cell]}>"
    w.launch(kernel, groups, threads, o, found=scanned(w, o.source)[1], sums=sums, features=features)
    if sums is not None:
        grain, blocks = -(-groups // o.partial.rows), -(-features // 32) * o.partial.rows
        w.launch("colsum_grains", blocks, THREADS, x=sums, weight=None, partial=o.partial, rows=grain)
