"""The backend without a compiler: NumPy and BLAS in float32, and jitted kernels for the ops that they speed up.

Promises: runs every plan, because it starts from the reference's ops and overrides some of them (`own_ops`). It draws
the same random numbers as every backend, releases the GIL inside a kernel, and works without a writable cache folder.
Never: starts its own threads. Matrix products use `n_threads` threads of the BLAS library; the setting is global and is
restored after every call. Kernels are serial, because Numba's thread pool survives neither a fork nor two Python
threads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray
from threadpoolctl import ThreadpoolController

from ...plan.ops import CELL_ROWS, DISPERSION_PACE, GEOMETRY, GRAIN, LANES, VARIANCE_FLOOR, OpCode, Units
from ...plan.plan import LEARN, Mode, Plan, Region
from ...plan.spec import Activation, Corruption, Loss, Precision
from ...rows.sparse import sparse_rows
from .. import Hyper, Probe, State
from ..reference import OPS, Array, ReferenceProgram, Run, dense_backward_layer, dense_layer
from ..reference.patches import Images, Pooling
from ..reference.updates import clip_scale
from . import counts as numba_counts
from . import images as numba_images
from . import kernels as numba_kernels

__all__ = [
    "OVERRIDES",
    "NumbaProgram",
    "compile",
    "dense_backward_layer",
    "dense_layer",
    "own_ops",
    "probe",
]


# --- ops with kernels, under the reference's names -----------------------------------------------------------------


def _frozen(array: Array) -> Array:
    """A read-only contiguous view, so that writable and read-only arrays share one signature."""
    view = np.ascontiguousarray(array).view()
    view.flags.writeable = False
    return view


def gather(run: Run, *, shift: Array | None, out: Array, source: int) -> None:
    data = run.sources[source]
    if getattr(data, "format", None) != "csr" or data.dtype not in (np.float32, np.float64):
        OPS[OpCode.GATHER](run, shift=shift, out=out, source=source)
        return
    if len(run.rows) and not 0 <= run.rows.min() <= run.rows.max() < data.shape[0]:
        raise IndexError(f"rows outside the {data.shape[0]} rows of the data")
    parts = (_frozen(a) for a in (data.indptr, data.indices, data.data, run.rows))
    numba_kernels.gather_csr(*parts, out)
    if shift is not None:
        out -= shift


def _random_cells(run: Run, stream: int, shape: tuple[int, ...]) -> NDArray[np.int32]:
    cells = np.empty(shape, np.int32)
    numba_kernels.cells(np.uint64(run.seed), np.uint64(run.step), np.uint64(stream), cells)
    return cells


def _threshold(p: float) -> int:
    """The first cell whose centre is not below p. So ``u < p`` is ``cell < threshold``, without rounding."""
    return max(0, math.ceil(p * 2**24 - 0.5))


def corrupt(run: Run, *, x: Array, kind: int, stream: int, level: float, low: float, high: float) -> None:
    cells = _random_cells(run, stream, x.shape)
    if kind == Corruption.GAUSSIAN:
        numba_kernels.add_normal(x, cells, level)
    elif kind == Corruption.MASKING:
        numba_kernels.replace_below(x, cells, _threshold(level), x.dtype.type(0))
    else:
        numba_kernels.replace_below(x, cells, _threshold(level), x.dtype.type(high))
        numba_kernels.replace_below(x, cells, _threshold(level / 2), x.dtype.type(low))


def dropout(run: Run, *, x: Array, stream: int, rate: float) -> None:
    numba_kernels.scale_above(x, _random_cells(run, stream, x.shape), _threshold(rate), x.dtype.type(1 / (1 - rate)))


def dense(
    run: Run, *, x: Array, W: Array, b: Array, out: Array, pre: Array | None, activation: int, transposed: int
) -> None:
    z = out if pre is None else pre
    x, weight = run.factor(x), run.factor(W.T if transposed else W)
    if run.mode & LEARN:
        np.matmul(x, weight, out=z)
    else:
        # BLAS rounds a row differently beside other rows; results of inference must not depend on them.
        numba_kernels.product_by_rows(x, np.ascontiguousarray(weight), z)
    if pre is not None:
        numba_kernels.bias_activate_from(activation)(z, b[0], out)
    else:
        numba_kernels.bias_activate(activation)(z, b[0])


def link(run: Run, *, z: Array, activation: int) -> None:
    if activation == Activation.SOFTMAX:
        OPS[OpCode.LINK](run, z=z, activation=activation)
    else:
        numba_kernels.bias_activate(activation)(z, np.zeros(z.shape[1], z.dtype))


def loss(run: Run, *, loss: int, activation: int, **operands: Any) -> None:
    has_kernel = loss in (Loss.MSE, Loss.HUBER) or (loss == Loss.BCE and activation == Activation.SIGMOID)
    form = _loss if has_kernel and activation != Activation.SOFTMAX else OPS[OpCode.LOSS]
    form(run, loss=loss, activation=activation, **operands)


def _loss(
    run: Run, *, z: Array, target: Array, weight: Array | None, rowloss: Array, loss: int, activation: int, delta: float
) -> None:
    T = z.dtype.type
    learn = bool(run.mode & LEARN)
    scale = _row_scale(run, weight if learn else None, T)
    numba_kernels.loss_rows(loss, activation)(z, target, scale, rowloss, T(delta), learn)


def _row_scale(run: Run, weight: Array | None, T: Any) -> Array:
    """Factor of each row's gradient: d(mean over the step)/d(row's loss)."""
    scale = np.full(run.m, T(1 / run.m))
    if weight is not None:
        scale *= weight[:, 0]
    return scale


def wgrad(run: Run, *, x: Array, dz: Array, dW: Array, accumulate: int) -> None:
    left, right = run.factor(x).T, run.factor(dz)
    if accumulate:
        dW += left @ right
    else:
        np.matmul(left, right, out=dW)


def dgrad(
    run: Run, *, dz: Array, W: Array, saved: Array, out: Array, activation: int, transposed: int, scale: float
) -> None:
    np.matmul(run.factor(dz), run.factor(W if transposed else W[: out.shape[1]].T), out=out)
    numba_kernels.times_slope(activation)(out, saved, saved.dtype.type(scale))


def decay(run: Run, *, W: Array, dW: Array, penalty: Array, l2: float, l1: float) -> None:
    T = W.dtype.type
    numba_kernels.decay_cells(
        _padded_rows(W), _padded_rows(dW), W.shape[1], T(l2 / run.m), T(l1 / run.m), CELL_ROWS, LANES, penalty
    )


def _padded_rows(W: Array) -> Array:
    """A slot with the padding of its rows: C-contiguous, so loops vectorise."""
    return np.lib.stride_tricks.as_strided(W, (W.shape[0], W.strides[0] // W.itemsize))


def sqnorm(run: Run, *, partial: Array) -> None:
    numba_kernels.grain_norms(run.regions[Region.GRADIENT], GRAIN, partial[0])


def _step_rule(
    run: Run, w: Array, g: Array, m1: Array, m2: Array | None, factor: Any, beta_1: float, beta_2: float, epsilon: float
) -> None:
    """`reference.updates.step_rule` over flat arrays, with the gradient times `factor`."""
    T = w.dtype.type
    lr, t = run.learning_rate, run.step + 1
    if m2 is None:
        momentum = beta_1 if run.momentum is None else run.momentum
        numba_kernels.momentum(w, g, m1, factor, T(momentum), T(lr))
        return
    rate, root = T(lr / (1 - beta_1**t)), T(1 / np.sqrt(1 - beta_2**t))
    numba_kernels.adam(w, g, m1, m2, factor, T(beta_1), T(beta_2), T(1 - beta_1), T(1 - beta_2), rate, root, T(epsilon))


def update(
    run: Run, *, partial: Array | None, solver: int, beta_1: float, beta_2: float, epsilon: float, clip: float
) -> None:
    w, g, m1 = (run.regions[r] for r in (Region.PARAMETER, Region.GRADIENT, Region.MOMENT1))
    factor = w.dtype.type(1 if partial is None else clip_scale(float(partial.sum(dtype=np.float64)), clip))
    _step_rule(run, w, g, m1, run.regions.get(Region.MOMENT2), factor, beta_1, beta_2, epsilon)


def wgrad_update(
    run: Run,
    *,
    x: Array,
    dz: Array,
    dW: Array | None,
    W: Array,
    moment1: Array,
    moment2: Array | None,
    colrate: Array | None,
    penalty: Array | None,
    solver: int,
    beta_1: float,
    beta_2: float,
    epsilon: float,
    l2: float,
    l1: float,
    rate: float,
) -> None:
    w = _padded_rows(W)
    padded = np.zeros_like(w)
    g = padded[:, : W.shape[1]]
    np.matmul(run.factor(x).T, run.factor(dz), out=g)
    if dW is not None:
        g += dW
    if colrate is not None:
        OPS[OpCode.COLUMN_DECAY](run, W=W, colrate=colrate, dW=g)
    if penalty is not None:
        decay(run, W=W, dW=g, penalty=penalty, l2=l2, l1=l1)
    if rate:
        OPS[OpCode.SHRINK](run, W=W, rate=rate)
    m1, m2 = _padded_rows(moment1).reshape(-1), None if moment2 is None else _padded_rows(moment2).reshape(-1)
    _step_rule(run, w.reshape(-1), padded.reshape(-1), m1, m2, w.dtype.type(1), beta_1, beta_2, epsilon)


def sample(run: Run, *, stats: Array, z: Array, noise: Array, stream: int) -> None:
    if run.mode & LEARN:
        numba_kernels.draw_latents(stats, _random_cells(run, stream, z.shape), z, noise)
    else:
        z[...] = stats[:, : z.shape[1]]


def draw(run: Run, *, mean: Array, out: Array, kind: int, stream: int) -> None:
    p, cells = mean[: run.m], _random_cells(run, stream, out.shape)
    if kind == Units.BERNOULLI:
        numba_kernels.draw_binary(p, cells, out)
    else:
        out[...] = p
        numba_kernels.add_normal(out, cells, 1.0)


def gaussian(
    run: Run,
    *,
    z: Array,
    target: Array,
    weight: Array | None,
    logvar: Array,
    rowloss: Array,
    rates: Array,
    activation: int,
) -> None:
    T = z.dtype.type
    learn = bool(run.mode & LEARN)
    scale = _row_scale(run, weight if learn else None, T)
    grown = np.exp(logvar[0])
    variance = grown + T(VARIANCE_FLOOR)
    numba_kernels.gaussian_rows(activation)(
        z, target, scale, 1 / variance, grown / (2 * variance), rowloss, rates, learn
    )
    rowloss += T(np.log(2 * np.pi * variance, dtype=np.float64).sum() / 2)


def counts(run: Run, *, loss: int, **operands: Any) -> None:
    form = _counts if loss in numba_counts.LOSSES else OPS[OpCode.COUNTS]
    form(run, loss=loss, **operands)


def _counts(
    run: Run,
    *,
    z: Array,
    weight: Array | None,
    size_sum: Array,
    log_dispersion: Array | None,
    rowloss: Array,
    partial: Array | None,
    loss: int,
    activation: int,
    by_cell: int,
    source: int,
    scale: float,
) -> None:
    y = sparse_rows(run.sources[source][run.rows])
    y.eliminate_zeros()  # the rows are a copy
    n, T, softmax = y.shape[1], z.dtype.type, activation == Activation.SOFTMAX
    sums = np.zeros(n, T)
    numba_counts.count_rows(loss, softmax, bool(by_cell))(
        *(_frozen(a) for a in (y.indptr, y.indices, y.data)),
        z,
        np.zeros(n, T) if log_dispersion is None else T(DISPERSION_PACE) * log_dispersion[0],
        _row_scale(run, weight, T),
        (size_sum[:, 0] if softmax else size_sum[:, 0] / scale).astype(np.float64),
        rowloss,
        sums,
        np.empty((4, n), T),
        np.empty((3, max(1, int(np.diff(y.indptr).max(initial=0))))),
        bool(run.mode & LEARN),
    )
    if partial is not None and run.mode & LEARN:
        partial[...] = 0
        partial[0, :n] = T(DISPERSION_PACE) * sums


class Patches(Images):
    """Convolutions as products over the patches of images, a few images at a time."""

    PATCHES = 1 << 22
    """Elements of patches in memory at a time."""

    def __init__(self, learn: bool, **values: int) -> None:
        super().__init__(**values)
        self.learn = learn

    def _blocks(self, images: int, size: tuple[int, ...], channels: int) -> Any:
        """Some of the images, with memory for their patches."""
        ky, kx = self.conv.kernel
        one = size[0] * size[1], ky * kx * channels
        step = max(1, self.PATCHES // (one[0] * one[1]))
        for i in range(0, images, step):
            rows = slice(i, min(i + step, images))
            yield rows, ((rows.stop - i) * one[0], one[1])

    def _window(self, size: tuple[int, ...]) -> tuple[int, ...]:
        return (*size[:2], *self.conv.kernel, *self.conv.strides, *self.conv.padding)

    def _product(self, x: Array, W: Array, out: Array) -> Array:
        if self.learn:
            np.matmul(x, W, out=out)
        else:
            numba_kernels.product_by_rows(x, np.ascontiguousarray(W), out)
        return out

    def gather(self, wide: Array, K: Array, size: tuple[int, int]) -> Array:
        wide, W = np.ascontiguousarray(wide), K.reshape(-1, K.shape[3])
        out = np.empty((len(wide), *size, K.shape[3]), wide.dtype)
        for rows, shape in self._blocks(len(wide), size, wide.shape[3]):
            parts = np.empty(shape, wide.dtype)
            numba_images.patches(wide[rows], parts, *self._window(size))
            self._product(parts, W, out[rows].reshape(len(parts), -1))
        return out

    def scatter(self, narrow: Array, K: Array, size: tuple[int, int]) -> Array:
        narrow, W = np.ascontiguousarray(narrow), K.reshape(-1, K.shape[3]).T
        out = np.empty((len(narrow), *size, K.shape[2]), narrow.dtype)
        for rows, shape in self._blocks(len(narrow), narrow.shape[1:3], K.shape[2]):
            flat = narrow[rows].reshape(-1, narrow.shape[3])
            parts = self._product(flat, W, np.empty(shape, narrow.dtype))
            numba_images.fold(parts, out[rows], *self._window(narrow.shape[1:3]))
        return out

    def gradient(self, x: Array, dz: Array) -> Array:
        wide, narrow = (dz, x) if self.conv.transposed else (self.upsampled(x), dz)
        wide, narrow = np.ascontiguousarray(wide), np.ascontiguousarray(narrow)
        K = np.zeros((*self.conv.kernel, wide.shape[3], narrow.shape[3]), x.dtype)
        for rows, shape in self._blocks(len(wide), narrow.shape[1:3], wide.shape[3]):
            parts = np.empty(shape, wide.dtype)
            numba_images.patches(wide[rows], parts, *self._window(narrow.shape[1:3]))
            K += (parts.T @ narrow[rows].reshape(len(parts), -1)).reshape(K.shape)
        if self.conv.transposed:
            K = K.transpose(0, 1, 3, 2)
        return K.reshape(self.conv.weight_shape)


def convolve(
    run: Run, *, x: Array, W: Array, b: Array | None, out: Array, pre: Array | None, activation: int, **geometry: int
) -> None:
    images = Patches(bool(run.mode & LEARN), **geometry)
    z = images.convolve(images.x(x), W)
    flat = z.reshape(-1, z.shape[3])
    if b is None:
        b = np.zeros((1, flat.shape[1]), z.dtype)
    if pre is not None:
        a = np.empty_like(z)
        numba_kernels.bias_activate_from(activation)(flat, b[0], a.reshape(flat.shape))
        images.out(pre)[...] = z
        z = a
    else:
        numba_kernels.bias_activate(activation)(flat, b[0])
    images.out(out)[...] = z


def conv_dgrad(
    run: Run, *, dz: Array, W: Array, saved: Array, out: Array, activation: int, scale: float, **geometry: int
) -> None:
    images = Patches(True, **geometry)
    images.x(out)[...] = images.adjoint(images.out(dz), W)
    numba_kernels.times_slope(activation)(out, saved, saved.dtype.type(scale))


def conv_wgrad(run: Run, **operands: Any) -> None:
    geometry = {name: operands[name] for name in GEOMETRY}
    OPS[OpCode.CONV_WGRAD](run, images=Patches(True, **geometry), **operands)


def _planes(x: Array, pool: Pooling) -> Array:
    """Rows of the larger images, (rows times channels, height, width)."""
    return x.reshape(-1, pool.h, pool.w)


def _windows(x: Array, pool: Pooling) -> tuple[Array, Array]:
    """The greatest value of each window and its index, (rows times channels, height, width)."""
    images = _planes(x, pool)
    out = np.empty((len(images), *pool.size), x.dtype)
    first = np.empty(out.shape, np.int64)
    numba_images.max_windows(images, pool.pool_y, pool.pool_x, out, first)
    return out, first


def maxpool(run: Run, *, x: Array, out: Array, **values: int) -> None:
    pool = Pooling(**values)
    pooled, _ = _windows(x, pool)
    pool.out(out)[...] = pooled.reshape(-1, pool.c, *pool.size).transpose(0, 2, 3, 1)


def maxpool_dgrad(run: Run, *, dout: Array, x: Array, saved: Array, out: Array, activation: int, **values: int) -> None:
    pool = Pooling(**values)
    _, first = _windows(x, pool)
    d = np.ascontiguousarray(pool.out(dout).transpose(0, 3, 1, 2)).reshape(first.shape)
    numba_images.unpool(d, first, pool.pool_y, pool.pool_x, _planes(out, pool))
    numba_kernels.times_slope(activation)(out, saved, saved.dtype.type(1))


def maxpool_pick(run: Run, *, y: Array, x: Array, out: Array, **values: int) -> None:
    pool = Pooling(**values)
    _, first = _windows(x, pool)
    picked = np.empty(first.shape, out.dtype)
    numba_images.pick(_planes(y, pool), first, pool.pool_y, pool.pool_x, picked)
    pool.out(out)[...] = picked.reshape(-1, pool.c, *pool.size).transpose(0, 2, 3, 1)


OVERRIDES: Mapping[OpCode, Callable[..., None]] = {
    OpCode[function.__name__.upper()]: function
    for function in (
        gather, corrupt, dense, dropout, link, loss, wgrad, dgrad, decay, sqnorm, update, wgrad_update, sample,
        gaussian, draw, counts, convolve, conv_dgrad, conv_wgrad, maxpool, maxpool_dgrad, maxpool_pick,
    )
}  # fmt: skip


# --- the program --------------------------------------------------------------------------------------------


@cache
def _blas() -> ThreadpoolController:
    return ThreadpoolController()


class NumbaProgram(ReferenceProgram):
    """Runs a plan op by op over NumPy arrays, with `OVERRIDES` for ops that have kernels."""

    def __init__(self, plan: Plan, precision: Precision, n_threads: int) -> None:
        super().__init__(plan, precision.dtype, {**OPS, **OVERRIDES}, bfloat16=precision is Precision.BFLOAT16)
        self.n_threads = n_threads

    def train(
        self, rows: NDArray[np.int64], hyper: Hyper, poll: Callable[[], bool] | None = None
    ) -> NDArray[np.float64]:
        with _blas().limit(limits=self.n_threads, user_api="blas"):
            return super().train(rows, hyper, poll)

    def gradient(self, rows: NDArray[np.int64], seed: int = 0, step: int = 0) -> tuple[NDArray[np.float64], State]:
        with _blas().limit(limits=self.n_threads, user_api="blas"):
            return super().gradient(rows, seed, step)

    def apply(self, X: Any, mode: Mode, target: Any = None, condition: Any = None) -> Array:
        with _blas().limit(limits=self.n_threads, user_api="blas"):
            return super().apply(X, mode, target, condition)


def own_ops() -> frozenset[OpCode]:
    """Ops with their own form here; the others are the reference's, in the program's precision."""
    return frozenset(OVERRIDES)


def probe() -> Probe:
    return Probe(True, f"Numba {numba.__version__}, NumPy {np.__version__}")


def compile(plan: Plan, *, precision: Precision, n_threads: int) -> NumbaProgram:
    """Compile the plan. Numba compiles kernels at their first run, or loads them from its cache."""
    return NumbaProgram(plan, precision, n_threads)
