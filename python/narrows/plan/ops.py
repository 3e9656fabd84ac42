"""The op kinds: what each reads, writes and computes, and how its operands lie in memory.

Promises: `SIGNATURES` is the whole contract of an op, `backends.reference` its formula; a number that both depend on
is here, once.
Never: knows a network, or a list of ops.
"""

from __future__ import annotations

import enum
import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

__all__ = [
    "CELL_ROWS",
    "DISPERSION_PACE",
    "DROPOUT_LIMIT",
    "GEOMETRY",
    "GRAIN",
    "GRAM_GUARD",
    "JACOBIAN_LAYERS",
    "LANES",
    "LOG_DISPERSION_LIMIT",
    "POOLING",
    "SAME_SETS",
    "SIGNATURES",
    "VARIANCE_FLOOR",
    "OpCode",
    "Signature",
    "Source",
    "Units",
    "jacobian_segments",
    "padded",
    "segments",
]


class OpCode(enum.IntEnum):
    """The op kinds; `SIGNATURES` names their operands."""

    GATHER = 0
    CORRUPT = 1
    DENSE = 2
    DROPOUT = 3
    LINK = 4
    LOSS = 5
    WGRAD = 6
    COLSUM = 7
    DGRAD = 8
    ACTIVITY_L1 = 9
    KL_SPARSITY = 10
    DECAY = 11
    REDUCE = 12
    SQNORM = 13
    SHRINK = 14
    UPDATE = 15
    WGRAD_UPDATE = 16
    COLSUM_UPDATE = 17
    SAMPLE = 18
    LATENT_KL = 19
    GAUSSIAN = 20
    CONTRACTIVE = 21
    COLUMN_DECAY = 22
    GRAM = 23
    SLOPES = 24
    JACOBIAN = 25
    CURVES = 26
    GRAIN_SUM = 27
    GRAM_WGRAD = 28
    PROBE = 29
    TANGENT = 30
    SQUARED_NORM = 31
    COTANGENT = 32
    DRAW = 33
    CONTRAST = 34
    KEEP = 35
    CONVOLVE = 36
    CONV_DGRAD = 37
    CONV_WGRAD = 38
    MAXPOOL = 39
    MAXPOOL_DGRAD = 40
    GRAIN_UPDATE = 41
    MAXPOOL_PICK = 42
    SPARSE_DENSE = 43
    SPARSE_WGRAD = 44
    SPARSE_WGRAD_UPDATE = 45
    WEIGHT_GRAM = 46
    SPARSE_MSE = 47
    ROW_GRAM = 48
    SPARSE_MSE_WGRAD = 49
    SPARSE_MSE_UPDATE = 50
    LIBRARY = 51
    LOG_NORMALIZE = 52
    COUNTS = 53
    MEANS = 54
    SHIFT = 55
    CONDITION = 56


class Source(enum.IntEnum):
    """What rows are gathered from; the numbers are those of ``csrc/plan/plan.h``."""

    X = 0
    TARGET = 1
    WEIGHT = 2
    """Sample weights."""
    LATENT = 3
    """Latent codes, in place of X."""
    SHIFT = 4
    """One row, subtracted from every row of X."""
    CONDITION = 5
    """The batch number of each row."""


class Units(enum.IntEnum):
    """Stochastic units, which DRAW draws."""

    BERNOULLI = 0
    GAUSSIAN = 1


class Signature(NamedTuple):
    """Names of an op's operands: slots it reads, slots it writes, integer and float attributes.

    A slot named in both `reads` and `writes` is updated in place.
    """

    reads: tuple[str, ...]
    writes: tuple[str, ...]
    ints: tuple[str, ...] = ()
    floats: tuple[str, ...] = ()

    @property
    def slots(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(self.reads + self.writes))


GEOMETRY = (
    "h", "w", "c", "out_h", "out_w", "filters", "ky", "kx", "sy", "sx", "py", "px", "uy", "ux", "transposed", "layout",
)  # fmt: skip
"""Of a convolution (see `images.Convolution`). A row holds an image, its channels last or, inside a network, one
channel after the other: bits of `layout` say of x (1) and of the output (2) that the channels are last."""

POOLING = ("h", "w", "c", "pool_y", "pool_x", "layout")
"""Of a pooling, whose input has one channel after the other; bit 2 of `layout` says that its output has them last."""

SIGNATURES: Mapping[OpCode, Signature] = {
    # out = rows of a bound source, less `shift` if there is one; source: 0 = X, 1 = target, 2 = sample weights, 3 =
    # latent codes (4, the shift of X, is SHIFT's, and 5, the numbers of batches, CONDITION's)
    OpCode.GATHER: Signature(("shift",), ("out",), ints=("source",)),
    # x = corrupt(x), in place
    OpCode.CORRUPT: Signature(("x",), ("x",), ints=("kind", "stream"), floats=("level", "low", "high")),
    # out = activation(x @ W + b); pre = x @ W + b where the derivative needs it; W is used transposed for tied layers
    OpCode.DENSE: Signature(("x", "W", "b"), ("out", "pre"), ints=("activation", "transposed")),
    # x = x * mask / (1 - rate), in place; the same stream gives the same mask, so it serves forward and backward
    OpCode.DROPOUT: Signature(("x",), ("x",), ints=("stream",), floats=("rate",)),
    # z = activation(z), in place: the output layer's link outside training
    OpCode.LINK: Signature(("z",), ("z",), ints=("activation",)),
    # rowloss = loss(activation(z), target); z = d(mean weighted loss)/dz in training
    OpCode.LOSS: Signature(("z", "target", "weight"), ("z", "rowloss"), ints=("loss", "activation"), floats=("delta",)),
    # dW (+)= x' dz
    OpCode.WGRAD: Signature(("x", "dz", "dW"), ("dW",), ints=("accumulate",)),
    # out (+)= column sums of x, each row times its weight if given, divided by the rows of the batch if mean
    OpCode.COLSUM: Signature(("x", "weight", "out"), ("out",), ints=("mean", "accumulate")),
    # out = (dz W') * activation'(saved), saved being the output times scale, or the pre-activation; of W as many rows
    # as `out` has columns, the first
    OpCode.DGRAD: Signature(("dz", "W", "saved"), ("out",), ints=("activation", "transposed"), floats=("scale",)),
    # dz += strength * weight / m * sign(a) * activation'(saved); rowpenalty = strength * sum |a|
    OpCode.ACTIVITY_L1: Signature(
        ("a", "saved", "weight", "dz"), ("dz", "rowpenalty"), ints=("activation",), floats=("strength",)
    ),
    # dz += d(strength * sum_j KL(target || mean_j))/da * activation'(saved); term = that penalty
    OpCode.KL_SPARSITY: Signature(
        ("saved", "mean", "weight", "dz"),
        ("dz", "penalty"),
        ints=("activation",),
        floats=("strength", "target"),
    ),
    # dW += (l2 W + l1 sign(W)) / m; penalty = (l2 / 2 |W|^2 + l1 |W|_1) / m of each cell of CELL_ROWS x LANES weights
    OpCode.DECAY: Signature(("W", "dW"), ("dW", "penalty"), floats=("l2", "l1")),
    # terms[index] += sum of x (times weight), divided by the rows of the batch if mean
    OpCode.REDUCE: Signature(("x", "weight", "terms"), ("terms",), ints=("index", "mean")),
    # partial = sums of squares of the gradient region, one per grain of GRAIN elements
    OpCode.SQNORM: Signature((), ("partial",)),
    # W *= 1 - learning_rate * rate: adamw's decoupled decay
    OpCode.SHRINK: Signature(("W",), ("W",), floats=("rate",)),
    # the update rule over the whole parameter region, gradients scaled down to norm `clip` if it is positive
    OpCode.UPDATE: Signature(("partial",), (), ints=("solver",), floats=("beta_1", "beta_2", "epsilon", "clip")),
    # WGRAD (onto what dW holds, if there is a dW), COLUMN_DECAY, DECAY, SHRINK and UPDATE of one weight, without a
    # gradient array
    OpCode.WGRAD_UPDATE: Signature(
        ("x", "dz", "dW", "W", "moment1", "moment2", "colrate"),
        ("W", "moment1", "moment2", "penalty"),
        ints=("solver",),
        floats=("beta_1", "beta_2", "epsilon", "l2", "l1", "rate"),
    ),
    # COLSUM (onto what db holds, if there is a db) and UPDATE of one bias
    OpCode.COLSUM_UPDATE: Signature(
        ("x", "db", "b", "moment1", "moment2"),
        ("b", "moment1", "moment2"),
        ints=("solver",),
        floats=("beta_1", "beta_2", "epsilon"),
    ),
    # z = mean + noise, noise = exp(log-variance / 2) * normal in training and absent otherwise; stats = (mean,
    # log-variance), side by side
    OpCode.SAMPLE: Signature(("stats",), ("z", "noise"), ints=("stream",)),
    # dstats = dz through z, and the gradient of strength * (the step's KL factor) * weight / m * rowkl; rowkl =
    # KL(N(mean, exp(log-variance)) || N(0, 1)), a sum over latents, in nats
    OpCode.LATENT_KL: Signature(("stats", "noise", "weight", "dz"), ("dstats", "rowkl"), floats=("strength",)),
    # rowloss = -log N(target; activation(z), exp(logvar) + VARIANCE_FLOOR), a sum over features; in training z =
    # d(mean weighted loss)/dz, and rates' column sums are the derivative by logvar
    OpCode.GAUSSIAN: Signature(("z", "target", "weight", "logvar"), ("z", "rowloss", "rates"), ints=("activation",)),
    # The contractive penalty of one layer, J = diag(p) W' with p = activation'(saved), in closed form: penalty =
    # strength / m * sum_n weight * p**2 * |column of W|**2 for each unit, dz (+)= its gradient by the pre-activations,
    # and W's own gradient is colrate * W. With `noisy`, saved of another input, p is the difference of both slopes.
    OpCode.CONTRACTIVE: Signature(
        ("saved", "noisy", "W", "weight", "dz", "colrate"),
        ("dz", "colrate", "dnoisy", "penalty"),
        ints=("activation", "accumulate_dz", "accumulate_colrate"),
        floats=("strength",),
    ),
    # dW += colrate * W, a rate for each column
    OpCode.COLUMN_DECAY: Signature(("W", "colrate", "dW"), ("dW",)),
    # out = W' W
    OpCode.GRAM: Signature(("W",), ("out",)),
    # out = activation'(saved), in the columns of `out` from `column` on
    OpCode.SLOPES: Signature(("saved",), ("out",), ints=("activation", "column")),
    # The contractive penalty of several layers. From the slopes p1 | p2 | ... of the layers, side by side in segments,
    # each row has B = diag(pL) WL' ... W2' diag(p1) and J = B W1', so |J|**2 = tr(B gram B'). rowpenalty = strength *
    # weight / m * |J|**2; dslopes (+)= its derivative by the slopes; partial (+)= what grains of rows add to the
    # gradients by the Gram matrix and by W2', W3', W4', one grain a row (see `jacobian_segments`). With `noisy`, the
    # slopes for another input, B is the difference of both, and dnoisy the derivative by these.
    OpCode.JACOBIAN: Signature(
        ("slopes", "noisy", "gram", "W2", "W3", "W4", "weight", "dslopes", "partial"),
        ("dslopes", "partial", "dnoisy", "rowpenalty"),
        ints=("accumulate",),
        floats=("strength",),
    ),
    # dz (+)= dslopes * activation''(saved), of the columns of `dslopes` from `column` on
    OpCode.CURVES: Signature(("dslopes", "saved", "dz"), ("dz",), ints=("activation", "column", "accumulate")),
    # out = the sum over the grains of the columns of `partial` from `column` on, which hold a matrix row by row: one
    # that is symmetric and of which the lower half may be anything (form 0), the transpose of `out` (form 1), or `out`
    # itself (form 2)
    OpCode.GRAIN_SUM: Signature(("partial",), ("out",), ints=("column", "form")),
    # dW = 2 W dgram
    OpCode.GRAM_WGRAD: Signature(("W", "dgram"), ("dW",)),
    # out = +1 or -1, each with probability 1/2
    OpCode.PROBE: Signature((), ("out",), ints=("stream",)),
    # out = x * slopes, of the columns of `slopes` from `column` on
    OpCode.TANGENT: Signature(("x", "slopes"), ("out",), ints=("column",)),
    # rowpenalty (+)= strength * weight / m * |x|**2, and x becomes its derivative
    OpCode.SQUARED_NORM: Signature(
        ("x", "weight", "rowpenalty"), ("x", "rowpenalty"), ints=("accumulate",), floats=("strength",)
    ),
    # Back through TANGENT: dslopes (+)= dout * x, and dout, the derivative by its result, becomes that by x
    OpCode.COTANGENT: Signature(("dout", "x", "slopes", "dslopes"), ("dout", "dslopes"), ints=("column", "accumulate")),
    # out = states of units with these means: 1 with the mean for its probability, else 0 (kind 0), or the mean and a
    # standard normal number (kind 1)
    OpCode.DRAW: Signature(("mean",), ("out",), ints=("kind", "stream")),
    # out = weight / m * (x - y)
    OpCode.CONTRAST: Signature(("x", "y", "weight"), ("out",)),
    # the first rows of out = x; the others stay
    OpCode.KEEP: Signature(("x",), ("out",)),
    # out = activation(convolution of x, upsampled, with W, + b), a bias for each filter, if there is one; pre as in
    # DENSE
    OpCode.CONVOLVE: Signature(("x", "W", "b"), ("out", "pre"), ints=("activation", *GEOMETRY)),
    # out = (adjoint of the convolution, applied to dz) * activation'(saved); saved and scale as in DGRAD
    OpCode.CONV_DGRAD: Signature(("dz", "W", "saved"), ("out",), ints=("activation", *GEOMETRY), floats=("scale",)),
    # partial (+)= what grains of rows add to the gradient by W and, behind it, partial = what they add to that by b, if
    # `bias`: a row for each grain, holding the rows of both, padded(filters) apart
    OpCode.CONV_WGRAD: Signature(("x", "dz", "partial"), ("partial",), ints=("bias", "accumulate", *GEOMETRY)),
    # out = the greatest of each window of x
    OpCode.MAXPOOL: Signature(("x",), ("out",), ints=POOLING),
    # out = dout where x is the greatest of its window, the first one if there are several, * activation'(saved)
    OpCode.MAXPOOL_DGRAD: Signature(("dout", "x", "saved"), ("out",), ints=("activation", *POOLING)),
    # GRAIN_SUM of form 2, DECAY, SHRINK and UPDATE of one parameter, without a gradient array
    OpCode.GRAIN_UPDATE: Signature(
        ("partial", "W", "moment1", "moment2"),
        ("W", "moment1", "moment2", "penalty"),
        ints=("solver", "column"),
        floats=("beta_1", "beta_2", "epsilon", "l2", "l1", "rate"),
    ),
    # out = what y holds where x is the greatest of its window, the first one if there are several
    OpCode.MAXPOOL_PICK: Signature(("y", "x"), ("out",), ints=POOLING),
    # DENSE of the rows of source 0, which must be sparse, with masking noise in training: GATHER, CORRUPT and DENSE
    # without dense rows; if there is a `library`, LOG_NORMALIZE as well. The rows are less `shift` if there is one.
    # Products are in the type of the slots, also under bfloat16
    OpCode.SPARSE_DENSE: Signature(
        ("W", "b", "library", "shift"), ("out", "pre"), ints=("activation", "stream"), floats=("level", "scale")
    ),
    # WGRAD, likewise
    OpCode.SPARSE_WGRAD: Signature(
        ("dz", "dW", "library", "shift"), ("dW",), ints=("accumulate", "stream"), floats=("level", "scale")
    ),
    # WGRAD_UPDATE, likewise
    OpCode.SPARSE_WGRAD_UPDATE: Signature(
        ("dz", "dW", "W", "moment1", "moment2", "colrate", "library", "shift"),
        ("W", "moment1", "moment2", "penalty"),
        ints=("solver", "stream"),
        floats=("beta_1", "beta_2", "epsilon", "l2", "l1", "rate", "level", "scale"),
    ),
    # The squared error of a linear layer against rows y of a source that must be CSR, without a dense row (see
    # `backends.reference`). With V = [W; b] and g = [h 1]: high + low = V V', summed in double
    OpCode.WEIGHT_GRAM: Signature(("W", "b"), ("high", "low")),
    # rowloss = |g V - y|^2; in training, out = d(mean weighted loss)/dh * activation'(saved * scale), by as many
    # columns of h as `out` has, the first
    OpCode.SPARSE_MSE: Signature(
        ("h", "W", "b", "high", "low", "saved", "weight"),
        ("rowloss", "out"),
        ints=("source", "activation"),
        floats=("scale",),
    ),
    # out = 2 sum over rows of (weight / m) g' g, summed in double
    OpCode.ROW_GRAM: Signature(("h", "weight"), ("out",)),
    # [dW; db] = gram V - 2 sum over rows of (weight / m) g' y, with `gram` from ROW_GRAM
    OpCode.SPARSE_MSE_WGRAD: Signature(("h", "gram", "weight", "W", "b"), ("dW", "db"), ints=("source",)),
    # The same, used up: WGRAD_UPDATE of W and COLSUM_UPDATE of b; V has b + shift in place of b if there is a `shift`
    OpCode.SPARSE_MSE_UPDATE: Signature(
        ("h", "gram", "weight", "W", "moment1", "moment2", "b", "b_moment1", "b_moment2", "shift"),
        ("W", "moment1", "moment2", "b", "b_moment1", "b_moment2", "penalty"),
        ints=("solver", "source"),
        floats=("beta_1", "beta_2", "epsilon", "l2", "l1", "rate"),
    ),
    # out = the sums of the rows of a bound source
    OpCode.LIBRARY: Signature((), ("out",), ints=("source",)),
    # x = log(1 + scale / library * x), in place; a row without counts stays
    OpCode.LOG_NORMALIZE: Signature(("x", "library"), ("x",), floats=("scale",)),
    # rowloss = minus the log-likelihood of the rows of a bound source, which are counts and never made dense, `library`
    # being their sums. z holds, side by side, logits, log inverse dispersions if they are `by_cell`, and logits of
    # dropout for ZINB; in training it becomes the derivatives by them, and the columns of `partial` that by the
    # parameter log_dispersion (in units of DISPERSION_PACE), summed over grains of rows. Means are
    # library * softmax(logits), or library / scale * exp(logits).
    OpCode.COUNTS: Signature(
        ("z", "weight", "library", "log_dispersion"),
        ("z", "rowloss", "partial"),
        ints=("loss", "activation", "by_cell", "source"),
        floats=("scale",),
    ),
    # out = these means, of the logits in z; without `library`, those of a row whose sum is `scale`
    OpCode.MEANS: Signature(("z", "library"), ("out",), ints=("activation",), floats=("scale",)),
    # out = the shift of X, a row that is bound beside it, plus `b` if there is one
    OpCode.SHIFT: Signature(("b",), ("out",)),
    # out = z and, behind it, a column for each batch: 1 for that of the row, whose number source 5 holds, 0 for others
    OpCode.CONDITION: Signature(("z",), ("out",)),
}

GRAM_GUARD = 1e-3
"""A row whose loss comes out below this part of |y|^2 is taken from its residuals, feature by feature: the sums of the
Gram form cancel there."""

VARIANCE_FLOOR = 1e-6
"""Added to the learned variances, so that the density of a constant feature stays bounded."""

DISPERSION_PACE = 30.0
"""The logarithm of a feature's inverse dispersion, by the parameter that holds it. Adam moves parameters by about the
learning rate in a step; these have further to go than weights, and alone, so they go faster."""

LOG_DISPERSION_LIMIT = 14.0
"""Logarithms of inverse dispersions count as far as this to either side; from there on nothing can be told of them."""

DROPOUT_LIMIT = 60.0
"""Likewise of the logits of dropout."""

JACOBIAN_LAYERS = 4
"""Layers of an encoder of which JACOBIAN takes the exact penalty, at most."""

LANES = 16
"""Columns of a slot are padded to this many elements: one cache line of float32, whole vectors on every CPU."""

SAME_SETS = 256
"""Rows a multiple of this many elements apart fall on few sets of a cache (see `padded`)."""

CELL_ROWS = 6
"""Rows of the cells, LANES columns wide, by which the penalties of a weight matrix are summed."""

GRAIN = 4096
"""Elements of a flat region that one thread takes at a time; fixes the order of `SQNORM`'s sums."""


def padded(cols: int) -> int:
    """Elements from one row of `cols` columns to the next.

    Whole cache lines; from `SAME_SETS` on whole pairs of them, because CPUs fetch pairs, and never a multiple of
    `SAME_SETS`, whose rows would fall on few sets of a cache and evict each other.
    """
    lines = -(-cols // LANES) * LANES
    if lines < SAME_SETS:
        return lines
    pairs = -(-lines // (2 * LANES)) * (2 * LANES)
    return pairs if pairs % SAME_SETS else pairs + 2 * LANES


def segments(widths: Sequence[int]) -> list[int]:
    """First columns of matrices of these widths side by side, each at the start of a cache line, and the end."""
    return [0, *itertools.accumulate(-(-n // LANES) * LANES for n in widths)]


def jacobian_segments(widths: Sequence[int]) -> list[int]:
    """First columns, in a row of JACOBIAN's partial sums, of the gradients by the Gram matrix and by W2', W3', ..., and
    their end; `widths` are those of the encoder's layers. A matrix lies row by row, `padded(columns)` apart.
    """
    rows_of, columns_of = (widths[0], *widths[1:]), (widths[0], *widths[:-1])
    sizes = (rows * padded(columns) for rows, columns in zip(rows_of, columns_of, strict=True))
    return [0, *itertools.accumulate(sizes)]
