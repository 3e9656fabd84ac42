"""Each op of a plan as launches: what the kernels of ``csrc/cuda`` are given, op by op.

Promises: an op of `ops.SIGNATURES` has one function here, which reads its operands by the names of its signature and
names the slots, integers and numbers of its kernels in their order (see the comments there).
Never: touches data or knows a device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace as Operands
from typing import Any, NamedTuple

from ...plan.ops import GEOMETRY, POOLING, SIGNATURES, OpCode, Source, Units, jacobian_segments, padded, segments
from ...plan.plan import Mode, Op, Plan
from ...plan.spec import Activation, Corruption, Loss, Precision
from . import sparse
from .launches import (
    BIAS_ROWS,
    BLAS,
    EXTENDED,
    MULTIPROCESSORS,
    ROWS,
    THREADS,
    TURNED,
    Area,
    Launch,
    View,
    Writer,
    whole_warps,
)
from .table import BOOL, CONTRACTED, CONV_COLUMNS, CONV_TILES, FUNCTORS, RULES, loss_name

__all__ = ["LOWER", "launches", "working_sizes"]

CONV_THREADS, CONV_OVERHEAD = 128, 3
"""Threads of a block of a convolution, and what a step of its sum costs besides its columns."""

LOWER: dict[OpCode, Callable[[Writer, Any], None]] = {}
"""For each op, what writes its launches."""


def launches(
    plan: Plan, m: int, mode: Mode, precision: Precision = Precision.FLOAT32, *, blas: bool = False
) -> tuple[Launch, ...]:
    """The launches of a run over m rows, in the order they run; with cuBLAS for large products, if there is one."""
    return tuple(_written(plan, m, mode, precision, blas).launches)


def working_sizes(plan: Plan, precision: Precision = Precision.FLOAT32, *, blas: bool = False) -> dict[Area, int]:
    """Elements that the temporaries of any op take, and what is kept through a run, for up to `plan.batch` rows."""
    written = [_written(plan, plan.batch, mode, precision, blas) for mode in Mode]
    return {Area.TEMPORARY: max(w.most_used for w in written), Area.KEPT: max(w.most_kept for w in written)}


def wants_blas(plan: Plan, precision: Precision) -> bool:
    """Whether a product of the plan is large enough for cuBLAS."""
    written = (launches(plan, plan.batch, mode, precision, blas=True) for mode in Mode)
    return any(launch.kernel == BLAS for found in written for launch in found)


def _written(plan: Plan, m: int, mode: Mode, precision: Precision, blas: bool) -> Writer:
    w = Writer(plan, m, mode, precision, blas=blas)
    ops = [op for op in plan.ops if op.modes & mode]
    biases = _biases(ops)
    for i, op in enumerate(ops):
        if i in biases:
            LOWER[op.code](w, with_bias(w.operands(op), w.operands(ops[biases[i]])))
        elif i not in biases.values():
            LOWER[op.code](w, w.operands(op))
    return w


def _biases(ops: Sequence[Op]) -> dict[int, int]:
    """For weight gradients the op that sums the same dz over the rows for the bias: it takes one more row of the
    product. What stands between the two touches neither dz nor the bias."""
    sums_of = {
        OpCode.WGRAD: OpCode.COLSUM,
        OpCode.WGRAD_UPDATE: OpCode.COLSUM_UPDATE,
        OpCode.SPARSE_WGRAD: OpCode.COLSUM,
        OpCode.SPARSE_WGRAD_UPDATE: OpCode.COLSUM_UPDATE,
    }
    between = {OpCode.COLUMN_DECAY, OpCode.DECAY}
    out = {}
    for i, op in enumerate(ops):
        if op.code in sums_of:
            j = next((j for j in range(i + 1, len(ops)) if ops[j].code not in between), i)
            dz, sums = op.slots[_slot(op, "dz")], ops[j]
            plain = sums.code is sums_of[op.code] and sums.slots[_slot(sums, "x")] == dz
            # Shifted rows need the sums themselves.
            plain = plain and ("shift" not in SIGNATURES[op.code].slots or op.slots[_slot(op, "shift")] < 0)
            if plain and (sums.code is OpCode.COLSUM_UPDATE or not _scaled(sums)):
                out[i] = j
    return out


def _slot(op: Op, name: str) -> int:
    return SIGNATURES[op.code].slots.index(name)


def _scaled(colsum: Op) -> bool:
    return colsum.slots[_slot(colsum, "weight")] >= 0 or bool(colsum.ints[SIGNATURES[colsum.code].ints.index("mean")])


def lowers(code: OpCode) -> Callable[[Callable[[Writer, Any], None]], Callable[[Writer, Any], None]]:
    def keep(function: Callable[[Writer, Any], None]) -> Callable[[Writer, Any], None]:
        LOWER[code] = function
        return function

    return keep


def act(o: Operands) -> str:
    return FUNCTORS[Activation(o.activation)]


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


# --- backward ---------------------------------------------------------------------------------------------------------


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


@lowers(OpCode.DECAY)
def decay(w: Writer, o: Operands) -> None:
    penalties(w, o.W, o.penalty, o.l2, o.l1)
    w.each("decay", o.W, (o.dW, o.W), floats=(o.l2, o.l1))


def penalties(w: Writer, W: View, penalty: View | None, l2: float, l1: float) -> None:
    if penalty is not None:
        w.by_warp("penalties", penalty.rows * penalty.cols, (W, penalty), floats=(l2, l1))


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


# --- counts -----------------------------------------------------------------------------------------------------------


@lowers(OpCode.LIBRARY)
def library(w: Writer, o: Operands) -> None:
    sparse.places(w, o.source, o.out)


@lowers(OpCode.LOG_NORMALIZE)
def log_normalize(w: Writer, o: Operands) -> None:
    w.each("log_normalize", o.x, (o.x, o.library), floats=(o.scale,))


@lowers(OpCode.MEANS)
def means(w: Writer, o: Operands) -> None:
    kernel = f"means<{BOOL[o.activation == Activation.SOFTMAX]}>"
    w.by_row(kernel, o.out.cols, (o.z, o.library, o.out), floats=(o.scale,))


@lowers(OpCode.COUNTS)
def counts(w: Writer, o: Operands) -> None:
    n = o.z.cols // (1 + o.by_cell + (o.loss == Loss.ZINB))
    kind, slots = loss_name(Loss(o.loss)), (o.z, o.weight, o.library, o.log_dispersion, o.rowloss)
    softmax, by_cell = o.activation == Activation.SOFTMAX, bool(o.by_cell)
    sparse.counts(w, kind, slots, n, o.partial, softmax=softmax, by_cell=by_cell, source=o.source, scale=o.scale)


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


# --- images -----------------------------------------------------------------------------------------------------------


def geometry(o: Operands, names: tuple[str, ...], *before: int) -> tuple[int, ...]:
    """The integers of an op on images, which begin with the fifth."""
    return (*before, *(0,) * (4 - len(before)), *(getattr(o, name) for name in names))


def columns_of(w: Writer, pixels: int, columns: int) -> tuple[int, int]:
    """Columns that a thread of a convolution has, of which its bits know nothing, and blocks: as a multiprocessor takes
    the fewest steps, four blocks at a time, a step costing its columns and `CONV_OVERHEAD`."""

    def blocks(each: int) -> int:
        return -(-w.m * pixels // CONV_THREADS) * -(-columns // each)

    each = min(CONV_COLUMNS, key=lambda n: -(-blocks(n) // (4 * MULTIPROCESSORS)) * (n + CONV_OVERHEAD))
    return each, blocks(each)


@lowers(OpCode.CONVOLVE)
def convolve(w: Writer, o: Operands) -> None:
    each, blocks = columns_of(w, o.out_h * o.out_w, o.filters)
    slots = o.x, o.W, o.b, o.out, o.pre
    w.launch(f"convolve<{each}>", blocks, CONV_THREADS, slots, geometry(o, GEOMETRY, o.activation))


@lowers(OpCode.CONV_DGRAD)
def conv_dgrad(w: Writer, o: Operands) -> None:
    each, blocks = columns_of(w, o.h * o.w, o.c)
    slots, ints = (o.dz, o.W, o.saved, o.out), geometry(o, GEOMETRY, o.activation)
    w.launch(f"conv_dgrad<{each}>", blocks, CONV_THREADS, slots, ints, (o.scale,))


@lowers(OpCode.CONV_WGRAD)
def conv_wgrad(w: Writer, o: Operands) -> None:
    weights, filters = CONV_TILES[0 if o.filters > 3 else 1]
    tiles = -(-(o.ky * o.kx * o.c + o.bias) // weights) * -(-o.filters // filters)
    ints = geometry(o, GEOMETRY, o.bias, o.accumulate, padded(o.filters))
    kernel = f"conv_wgrad<{weights}, {filters}>"
    w.launch(kernel, tiles * o.partial.rows, CONV_THREADS, (o.x, o.dz, o.partial), ints)


@lowers(OpCode.MAXPOOL)
def maxpool(w: Writer, o: Operands) -> None:
    w.each("maxpool_pick", o.out, (o.x, o.x, o.out), ints=geometry(o, POOLING))


@lowers(OpCode.MAXPOOL_PICK)
def maxpool_pick(w: Writer, o: Operands) -> None:
    w.each("maxpool_pick", o.out, (o.y, o.x, o.out), ints=geometry(o, POOLING))


@lowers(OpCode.MAXPOOL_DGRAD)
def maxpool_dgrad(w: Writer, o: Operands) -> None:
    w.each(f"maxpool_dgrad<{act(o)}>", o.out, (o.dout, o.x, o.saved, o.out), ints=geometry(o, POOLING))


# --- sparse rows ------------------------------------------------------------------------------------------------------


def noise(o: Operands) -> sparse.Noise:
    return sparse.Noise(o.library, o.stream, o.level, o.scale)


@lowers(OpCode.SPARSE_DENSE)
def sparse_dense(w: Writer, o: Operands) -> None:
    moved = None
    if o.shift is not None:
        moved = w.temporary(1, o.W.cols)
        w.column_sums("Store", o.W, o.shift.part(0, o.W.rows, 1, 1), (moved,), floats=(1.0,))
    parts = sparse.parts(w, o.W, turned=False, source=0, noise=noise(o))
    w.each(f"sparse_dense<{act(o)}>", (w.m, o.W.cols), (parts, moved, o.b, o.out, o.pre))


@lowers(OpCode.SPARSE_WGRAD)
def sparse_wgrad(w: Writer, o: Operands) -> None:
    sums = getattr(o, "sums", None)
    bias = None if sums is None else stored(sums.out, sums.accumulate)
    sparse.outer(w, stored(o.dW, o.accumulate), o.dz, o.dW.rows, bias=bias, shift=o.shift, noise=noise(o))


@lowers(OpCode.SPARSE_WGRAD_UPDATE)
def sparse_wgrad_update(w: Writer, o: Operands) -> None:
    sums, to = getattr(o, "sums", None), descent(w, o)
    bias = None if sums is None else descent(w, sums)
    sparse.outer(w, to, o.dz, o.W.rows, bias=bias, shift=o.shift, noise=noise(o))


# --- squared error against sparse rows --------------------------------------------------------------------------------


@lowers(OpCode.WEIGHT_GRAM)
def weight_gram(w: Writer, o: Operands) -> None:
    sparse.weight_gram(w, o.W, o.b, o.high, o.low)


@lowers(OpCode.SPARSE_MSE)
def sparse_mse(w: Writer, o: Operands) -> None:
    parts, slope = sparse.parts(w, o.W, turned=True, source=o.source), w.temporary(w.m, o.high.cols, wide=True)
    slots = o.h, o.W, o.high, o.low, o.saved, o.weight, o.rowloss, o.out, slope, o.b, parts
    w.launch(f"sparse_mse<{act(o)}>", w.m, whole_warps(o.high.cols), slots, (o.source,), (o.scale,))


@lowers(OpCode.ROW_GRAM)
def row_gram(w: Writer, o: Operands) -> None:
    sparse.row_gram(w, o.h, o.weight, o.out)


@lowers(OpCode.SPARSE_MSE_WGRAD)
def sparse_mse_wgrad(w: Writer, o: Operands) -> None:
    slots = o.h, o.gram, o.weight, o.W, o.dW, o.db, o.b, None, None
    sparse.gram_slopes(w, "GramStore", slots, o.W, None, o.source)


@lowers(OpCode.SPARSE_MSE_UPDATE)
def sparse_mse_update(w: Writer, o: Operands) -> None:
    to = descent(w, o)
    slots = o.h, o.gram, o.weight, o.W, o.moment1, o.moment2, o.b, o.b_moment1, o.b_moment2
    sparse.gram_slopes(w, f"GramDescend<{RULES[o.solver]}>", slots, o.W, o.shift, o.source, to.flag, to.floats)
