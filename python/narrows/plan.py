"""The plan: a network lowered, once, to a flat list of ops over the slots of one arena.

Promises: a plan is plain data (no array, no backend, no Python object inside); the same specification and batch give
the same plan; every backend runs the same list, so the network is described here and nowhere else.
Never: touches data, draws numbers, imports a backend.

Reading order: the enumerations, `SIGNATURES` (what each op reads and writes), `NetworkSpec`, `Plan`; then `lowering`,
which writes the list.

A training step is the whole list. Encoding, reconstruction and scoring are the same list with the ops of other modes
left out, so what is trained is what is applied.
"""

from __future__ import annotations

import enum
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .images import Convolution

__all__ = [
    "ACTIVATIONS",
    "LOSSES",
    "Activation",
    "Corruption",
    "LayerSpec",
    "Loss",
    "Mode",
    "NetworkSpec",
    "Op",
    "OpCode",
    "Plan",
    "Precision",
    "Region",
    "Slot",
    "Solver",
    "Units",
]

LANES = 16
"""Columns of a slot are padded to this many elements: one cache line of float32, whole vectors on every CPU."""

SAME_SETS = 256
"""Rows a multiple of this many elements apart fall on few sets of a cache (see `padded`)."""


class Activation(enum.IntEnum):
    """Elementwise activations, and softmax, which couples the elements of a row."""

    LINEAR = 0
    RELU = 1
    LEAKY_RELU = 2
    ELU = 3
    GELU = 4
    SILU = 5
    SIGMOID = 6
    TANH = 7
    SOFTPLUS = 8
    EXP = 9
    SOFTMAX = 10

    @property
    def needs_preactivation(self) -> bool:
        """Whether the derivative cannot be told from the output alone."""
        return self in (Activation.GELU, Activation.SILU)


class Loss(enum.IntEnum):
    """Losses of a row: a sum over its features (see `backends.reference` for the formulas)."""

    MSE = 0
    BCE = 1
    HUBER = 2
    MULTINOMIAL = 3
    GAUSSIAN = 4
    """Minus the log-density, with a variance for each feature that is a parameter (op GAUSSIAN)."""
    POISSON = 5
    """Minus the log-probability of counts whose mean is in proportion to the row's sum (op COUNTS)."""
    NB = 6
    """Likewise, of negative binomial counts."""
    ZINB = 7
    """Likewise, of such with a probability of being zero besides."""

    @property
    def of_counts(self) -> bool:
        """Whether it is a likelihood of counts, of op COUNTS."""
        return self in (Loss.POISSON, Loss.NB, Loss.ZINB)

    @property
    def dispersed(self) -> bool:
        """Whether it is a likelihood of counts with a dispersion."""
        return self in (Loss.NB, Loss.ZINB)


class Corruption(enum.IntEnum):
    """Input corruption of denoising autoencoders (Vincent et al., JMLR 11, 2010)."""

    GAUSSIAN = 0
    MASKING = 1
    SALT_AND_PEPPER = 2


class Units(enum.IntEnum):
    """Stochastic units, which DRAW draws."""

    BERNOULLI = 0
    GAUSSIAN = 1


class Solver(enum.IntEnum):
    """Update rules."""

    SGD = 0
    ADAM = 1
    ADAMW = 2


class Precision(enum.IntEnum):
    """Of a program's arithmetic. BFLOAT16 is FLOAT32 with its matrix products in bfloat16: operands are rounded to 8
    significant bits, sums, parameters and all else stay float32. TF32, of the CUDA backend alone, leaves it to the GPU
    to round the operands of large products to 11.
    """

    FLOAT32 = 0
    FLOAT64 = 1
    BFLOAT16 = 2
    TF32 = 3

    @classmethod
    def of(cls, name: Any) -> Precision:
        """From a precision, its name, or a NumPy dtype."""
        if isinstance(name, cls):
            return name
        return cls[(name if isinstance(name, str) else np.dtype(name).name).upper()]

    @property
    def dtype(self) -> np.dtype[Any]:
        """In which parameters and activations are held."""
        return np.dtype(np.float64 if self is Precision.FLOAT64 else np.float32)


ACTIVATIONS: Mapping[str, Activation] = {
    **{a.name.lower(): a for a in Activation},
    "identity": Activation.LINEAR,
    "logistic": Activation.SIGMOID,
}
LOSSES: Mapping[str, Loss] = {loss.name.lower(): loss for loss in Loss}


class Mode(enum.IntFlag):
    """What a run of the op list is for; an op runs if it carries the mode's bit."""

    ENCODE = 1
    DECODE = 2
    RECONSTRUCT = 4
    SCORE = 8
    GRADIENT = 16
    """Forward and backward of a training step, without the update."""
    TRAIN = 32
    POSTERIOR = 64
    """Of a variational network: what its encoder puts out, the means and the log-variances of the latents."""
    LIKELIHOOD = 128
    """Of a variational network: the loss of decoded latent codes against a target."""


FORWARD = Mode.ENCODE | Mode.RECONSTRUCT | Mode.SCORE | Mode.GRADIENT | Mode.TRAIN
LEARN = Mode.GRADIENT | Mode.TRAIN
FROM_CODES = Mode.DECODE | Mode.LIKELIHOOD
"""Modes that begin with latent codes in place of X."""


class Region(enum.IntEnum):
    """What a slot's memory is; the first four have the same layout, element for element."""

    PARAMETER = 0
    GRADIENT = 1
    MOMENT1 = 2
    """First moment (adam, adamw) or velocity (sgd)."""
    MOMENT2 = 3
    BATCH = 4
    """One row per sample of the batch; memory is shared between slots that are not alive together."""
    SCRATCH = 5


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

CELL_ROWS = 6
"""Rows of the cells, LANES columns wide, by which the penalties of a weight matrix are summed."""

JACOBIAN_LAYERS = 4
"""Layers of an encoder of which JACOBIAN takes the exact penalty, at most."""

GRAIN = 4096
"""Elements of a flat region that one thread takes at a time; fixes the order of `SQNORM`'s sums."""


@dataclass(frozen=True)
class Slot:
    """A matrix in the arena.

    Attributes
    ----------
    name : str
        ``"W0"``, ``"b0"``, ``"a1"``, ...
    region : Region
    rows, cols : int
        Logical shape; `rows` is the batch capacity for ``Region.BATCH``.
    offset : int
        First element, counted from the start of the region (parameter-like) or of the arena's working area.
    """

    name: str
    region: Region
    rows: int
    cols: int
    offset: int

    @property
    def ld(self) -> int:
        """Elements from one row to the next."""
        return padded(self.cols)

    @property
    def size(self) -> int:
        return self.rows * self.ld


@dataclass(frozen=True)
class Op:
    """One op: what it does, when it runs, and its operands in the order of its signature (-1: absent)."""

    code: OpCode
    modes: Mode
    slots: tuple[int, ...]
    ints: tuple[int, ...] = ()
    floats: tuple[float, ...] = ()


@dataclass(frozen=True)
class LayerSpec:
    """A layer of the specification: dense, or a convolution of flattened images; `tied_to` is the index of the layer
    whose weight it uses transposed.
    """

    n_in: int
    n_out: int
    activation: Activation
    dropout: float = 0.0
    tied_to: int | None = None
    convolution: Convolution | None = None

    @property
    def weight_shape(self) -> tuple[int, int]:
        return (self.n_in, self.n_out) if self.convolution is None else self.convolution.weight_shape


@dataclass(frozen=True)
class NetworkSpec:
    """Everything `lower` needs to know about a model.

    `latent` counts the encoder's layers: layer ``latent - 1`` writes the code. `separate_target` says that the target
    is bound apart from the input (denoising pairs, super-resolution). `contractive_probes` of 0 stands for the exact
    penalty.
    """

    layers: tuple[LayerSpec, ...]
    latent: int
    loss: Loss = Loss.MSE
    huber_delta: float = 1.0
    corruption: Corruption | None = None
    corruption_level: float = 0.0
    corruption_range: tuple[float, float] = (0.0, 1.0)
    activity_l1: float = 0.0
    kl_sparsity: float = 0.0
    sparsity_target: float = 0.05
    contractive: float = 0.0
    contractive_probes: int = 0
    contractive_hessian: float = 0.0
    hessian_std: float = 0.1
    n_corruptions: int = 1
    alpha: float = 0.0
    weight_l1: float = 0.0
    solver: Solver = Solver.ADAM
    momentum: float = 0.9
    beta_1: float = 0.9
    beta_2: float = 0.999
    epsilon: float = 1e-8
    clip_norm: float | None = None
    separate_target: bool = False
    weighted: bool = False
    variational: bool = False
    """The encoder's last layer, linear, puts out the means and the log-variances of half as many latents, of which
    training draws (Kingma and Welling, 2014)."""
    kl_weight: float = 1.0
    """What the divergence of the latents from N(0, 1), in nats, is multiplied with in the objective."""
    n_gibbs: int = 0
    """If not 0, the two layers, of one weight, are a restricted Boltzmann machine, which learns from so many steps of
    Gibbs sampling (see `boltzmann`); sigmoid units are binary, linear ones normal with variance 1."""
    n_chains: int = 0
    """Markov chains that go on from step to step, at least as many as a batch has rows; 0 if each begins at its row."""
    sample_visible: bool = True
    """Whether visible units are drawn in a chain, or take their means."""
    cell_dispersion: bool = False
    """Of a likelihood of counts: whether the network puts out the dispersions, or they are a parameter for each
    feature."""
    log_normalize: bool = False
    """Whether the network sees log(1 + x) of counts x scaled to the sum `library`, in place of them."""
    library: float = 1.0
    """Of counts: the sum of a row whose size factor is 1."""
    sparse_input: bool = False
    """Whether the first layer works on CSR rows, which are then never dense (see `takes_sparse_input`)."""
    n_batches: int = 0
    """Batches of rows, of which the decoder is told the row's own: its first layer has so many inputs beside the code,
    one for each batch."""
    gram_decoder: bool = False
    """Whether the squared error is taken from Gram matrices and the nonzeros of CSR targets, which are then never dense
    (see `takes_gram_decoder`)."""
    shifted: bool = False
    """Whether rows of X, which may be their own target, are those that are bound less a shift (see `shifted.Shifted`):
    sparse rows that are standardised, of which no zero is a zero any more."""

    @property
    def takes_sparse_input(self) -> bool:
        """Whether the network can have a `sparse_input`: a dense first layer, and nothing else that needs the rows of
        its input or fills them."""
        filled = self.corruption not in (None, Corruption.MASKING) or self.contractive_hessian > 0
        filled = filled or (self.corruption is not None and self.shifted)  # what is masked is zero after the shift
        # Probes are rows of the input's width; an encoder of one layer has none (its penalty has a closed form).
        filled = filled or (self.contractive > 0 and self.contractive_probes > 0 and self.latent > 1)
        return self.layers[0].convolution is None and not filled and self.n_gibbs == 0

    @property
    def takes_gram_decoder(self) -> bool:
        """Whether the network can have a `gram_decoder`: squared error of a dense linear layer with its own weight."""
        last = self.layers[-1]
        linear = last.activation is Activation.LINEAR and last.convolution is None and last.tied_to is None
        return self.loss is Loss.MSE and linear and self.n_gibbs == 0

    @property
    def sparse_sources(self) -> frozenset[int]:
        """The sources that must be CSR of increasing columns: 0 is X, 1 the target."""
        judged = {1 if self.separate_target else 0} if self.gram_decoder else set()
        return frozenset(judged | ({0} if self.sparse_input else set()))

    @property
    def n_features(self) -> int:
        return self.layers[0].n_in

    @property
    def n_components(self) -> int:
        return self.layers[self.latent - 1].n_out // (2 if self.variational else 1)

    @property
    def n_outputs(self) -> int:
        return self.layers[-1].n_out // self.n_heads

    @property
    def n_heads(self) -> int:
        """Numbers that the last layer puts out for each feature, side by side: logit of the mean, logarithm of the
        inverse dispersion if that is of the cell, logit of dropout."""
        return 1 + self.cell_dispersion + (self.loss is Loss.ZINB)

    @property
    def parameter_shapes(self) -> dict[str, tuple[int, int]]:
        """Rows and columns of each parameter, in the order of memory."""
        shapes: dict[str, tuple[int, int]] = {}
        for i, layer in enumerate(self.layers):
            if layer.tied_to is None:
                shapes[f"W{i}"] = layer.weight_shape
            shapes[f"b{i}"] = (1, layer.weight_shape[1])
        if self.loss is Loss.GAUSSIAN:
            shapes["logvar"] = (1, self.n_outputs)
        if self.loss.dispersed and not self.cell_dispersion:
            shapes["log_dispersion"] = (1, self.n_outputs)
        if self.n_chains:
            # Last, since it has no gradient: the means of the chains' hidden units.
            shapes["chain"] = (self.n_chains, self.n_components)
        return shapes

    @property
    def n_moments(self) -> int:
        """Numbers of optimiser state beside each parameter."""
        return 1 if self.solver is Solver.SGD else 2


@dataclass(frozen=True)
class Plan:
    """A lowered network for batches of up to `batch` rows."""

    spec: NetworkSpec
    batch: int
    slots: tuple[Slot, ...]
    ops: tuple[Op, ...]
    terms: tuple[str, ...]
    """Names of the values a training step reports: ``"loss"`` and the penalties."""
    parameter_size: int
    """Elements of the parameter region, and so of each of the three with the same layout."""
    work_size: int
    """Elements of the working area (batch and scratch slots)."""
    outputs: Mapping[Mode, int] = field(default_factory=dict)
    """The slot that holds the result of a run in each inference mode."""

    @cached_property
    def index(self) -> dict[str, int]:
        return {slot.name: i for i, slot in enumerate(self.slots)}

    @cached_property
    def parameters(self) -> tuple[Slot, ...]:
        return tuple(s for s in self.slots if s.region is Region.PARAMETER)

    @cached_property
    def learned(self) -> tuple[Slot, ...]:
        """The parameters that have gradients."""
        return tuple(s for s in self.parameters if f"d{s.name}" in self.index)

    @property
    def n_moments(self) -> int:
        """Regions of optimiser state."""
        return self.spec.n_moments

    @property
    def arena_size(self) -> int:
        """Elements of the whole arena: parameters, gradients, optimiser state, working area."""
        return (2 + self.n_moments) * self.parameter_size + self.work_size

    @cached_property
    def flops(self) -> int:
        """Floating-point operations of the matrix products of one training step of a full batch, but for those with
        sparse rows, which depend on the data."""
        return sum(op_flops(self, op) for op in self.ops if op.modes & Mode.TRAIN)

    def __str__(self) -> str:
        lines = [
            f"plan: batch {self.batch}, {sum(s.rows * s.cols for s in self.parameters)} parameters, "
            f"{self.flops / 1e9:.4g} GFLOP a step, arena of {self.arena_size} elements"
            + (", decoder in gram form" if self.spec.gram_decoder else "")
        ]
        for op in self.ops:
            signature = SIGNATURES[op.code]
            operands = [
                f"{role}={self.slots[i].name}" for role, i in zip(signature.slots, op.slots, strict=True) if i >= 0
            ]
            operands += [f"{n}={v}" for n, v in zip(signature.ints, op.ints, strict=True)]
            operands += [f"{n}={v:g}" for n, v in zip(signature.floats, op.floats, strict=True)]
            modes = "".join(m.name[0].lower() if m & op.modes and m.name else "." for m in Mode)
            lines.append(f"  {modes} {op.code.name.lower():12s} {' '.join(operands)}")
        return "\n".join(lines)

    def slot_table(self) -> NDArray[np.int64]:
        """The slots as an array for a native backend, shape (n_slots, 4): region, rows, cols, offset."""
        return np.array([(s.region, s.rows, s.cols, s.offset) for s in self.slots], np.int64).reshape(-1, 4)

    def op_table(self) -> NDArray[np.void]:
        """The ops as a structured array for a native backend; absent operands are -1."""
        table = np.zeros(len(self.ops), OP_DTYPE)
        table["slots"] = -1
        for row, op in zip(table, self.ops, strict=True):
            row["code"], row["modes"] = op.code, op.modes
            row["slots"][: len(op.slots)] = op.slots
            row["ints"][: len(op.ints)] = op.ints
            row["floats"][: len(op.floats)] = op.floats
        return table


OP_DTYPE = np.dtype(
    [("code", "i4"), ("modes", "i4"), ("slots", "i4", 11), ("ints", "i4", 18), ("floats", "f8", 8)], align=True
)


PRODUCTS = {
    OpCode.DENSE: "W",
    OpCode.DGRAD: "W",
    OpCode.WGRAD: "dW",
    OpCode.WGRAD_UPDATE: "W",
    OpCode.GRAM: "W",
    OpCode.GRAM_WGRAD: "W",
}
"""Ops that are matrix products, and their operand that is a weight or its gradient."""


CONVOLUTIONS = (OpCode.CONVOLVE, OpCode.CONV_DGRAD, OpCode.CONV_WGRAD)

GRAMS = (OpCode.WEIGHT_GRAM, OpCode.ROW_GRAM, OpCode.SPARSE_MSE_WGRAD, OpCode.SPARSE_MSE_UPDATE)
"""Ops that multiply with a Gram matrix, or make one."""


def geometry(op: Op) -> Convolution:
    """Of an op in `CONVOLUTIONS`."""
    h, w, c, oh, ow, f, ky, kx, sy, sx, py, px, uy, ux, transposed, _ = op.ints[-len(GEOMETRY) :]
    return Convolution((h, w, c), f, (ky, kx), (sy, sx), (py, px), (oh, ow), (uy, ux), transposed=bool(transposed))


def op_flops(plan: Plan, op: Op) -> int:
    """Floating-point operations of an op's matrix products on a full batch; 0 if it has none, or with sparse rows."""
    slots = {role: plan.slots[i] for role, i in zip(SIGNATURES[op.code].slots, op.slots, strict=True) if i >= 0}
    if op.code is OpCode.JACOBIAN:
        # A row for each row of the batch and latent; half of a symmetric product. The last weight takes none.
        weights = [slots[role] for role in ("W2", "W3", "W4") if role in slots]
        inner = sum(W.rows * W.cols for W in weights[:-1])
        chains = 2 if "noisy" in slots else 1
        return plan.batch * weights[-1].cols * (3 * slots["gram"].rows ** 2 + 6 * chains * inner)
    if op.code in CONVOLUTIONS:
        return plan.batch * geometry(op).flops
    if op.code in GRAMS:
        inner, outer = (slots["W"].rows, slots["W"].cols) if "W" in slots else (slots["h"].cols, plan.batch)
        return 2 * (inner + 1) ** 2 * outer
    if op.code not in PRODUCTS:
        return 0
    m, k, n = product_size(plan, op)
    return 2 * m * k * n


def product_size(plan: Plan, op: Op) -> tuple[int, int, int]:
    """Rows that a product has on a full batch, and the shape of its weight, of an op in `PRODUCTS`."""
    roles = SIGNATURES[op.code].slots
    weight = plan.slots[op.slots[roles.index(PRODUCTS[op.code])]]
    if op.code is OpCode.DGRAD and not op.ints[1]:
        return plan.batch, plan.slots[op.slots[roles.index("out")]].cols, weight.cols
    square = op.code in (OpCode.GRAM, OpCode.GRAM_WGRAD)
    return weight.cols if square else plan.batch, weight.rows, weight.cols


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
