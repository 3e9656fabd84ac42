"""The jitted kernels of the Numba backend.

Promises: computes in the precision of the arrays; NaN stays NaN; float32 functions are within a few units in the last
place of the exact value; uses the random words of `narrows.random.philox`.
Never: checks an argument, allocates memory, knows plans or ops.

Matrices are C-contiguous. LLVM can vectorise the loops: float32 code has no branch, and calls only erfc from libm.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from typing import Any

import numba
import numpy as np
from numba import types
from numba.core import caching
from numba.extending import overload

from ...plan.spec import Activation, Loss
from ..reference import LEAK

# --- jit ----------------------------------------------------------------------------------------------------

# Flags belong to each instruction: sums may be reordered into lanes, the elementwise functions may not.
_SUMS = frozenset({"contract", "reassoc", "nsz"})
_EXACT = frozenset({"contract"})


_Places: Any = type("_Places", (caching.CompileResultCacheImpl,), {})
"""Where Numba caches machine code: not in the package, where `pip uninstall` would leave the files."""
_Places._locator_classes = [place for place in _Places._locator_classes if "InTree" not in place.__name__]

_Cache: Any = type("_Cache", (caching.FunctionCache,), {"_impl_class": _Places})


class _Kernel:
    """A jitted function; Numba caches its machine code in the user's cache folder if that is writable."""

    def __init__(self, function: Callable[..., Any], fastmath: frozenset[str]) -> None:
        jit: Callable[..., Any] = numba.njit(nogil=True, fastmath=set(fastmath), error_model="numpy")
        self._run = jit(function)
        with suppress(RuntimeError):  # no folder is writable
            self._run._cache = _Cache(function)

    def __call__(self, *arguments: Any) -> Any:
        try:
            return self._run(*arguments)
        except OSError:
            # Raised while saving the machine code (a full quota), before the kernel ran; it is compiled now.
            return self._run(*arguments)


def _kernel(fastmath: frozenset[str]) -> Callable[[Callable[..., Any]], _Kernel]:
    return lambda function: _Kernel(function, fastmath)


_inline: Callable[[Callable[..., Any]], Any] = numba.njit(nogil=True, fastmath=set(_EXACT), error_model="numpy")


# --- elementary functions: libm in float64, vectorisable polynomials in float32 -----------------------------

_f = np.float32
_LOG2E, _MAGIC = _f(1.44269504), _f(12582912.0)
_LN2_HIGH, _LN2_LOW = _f(0.693145752), _f(1.42860677e-6)
_EXP_MIN, _EXP_MAX = _f(-86.9), _f(89.0)
_ZERO, _HALF, _ONE, _TWO = _f(0), _f(0.5), _f(1), _f(2)
_E3, _E4, _E5, _E6, _E7 = (_f(1 / math.factorial(k)) for k in range(3, 8))
_A1, _A2, _A3, _A4, _A5, _A6, _A7 = (_f(1 / (2 * k + 1)) for k in range(1, 8))


@_inline
def _exp_parts(x: Any) -> Any:
    """(p, s) with exp(x) = 2 s (1 + p) and \\|p\\| < 0.42, for float32 x up to 89; NaN stays NaN."""
    x = _EXP_MIN if x < _EXP_MIN else x
    x = _EXP_MAX if x > _EXP_MAX else x
    # Adding 1.5 * 2**23 rounds to an integer and leaves it in the low bits of the mantissa.
    t = x * _LOG2E + _MAGIC
    n = t - _MAGIC
    r = (x - n * _LN2_HIGH) - n * _LN2_LOW
    p = r + r * r * (_HALF + r * (_E3 + r * (_E4 + r * (_E5 + r * (_E6 + r * _E7)))))
    # 2**(n - 1), so that n = 128 is still a number
    s = np.int32((np.float32(t).view(np.int32) + np.int32(126)) << np.int32(23)).view(np.float32)
    return p, s


def _exp(x: Any) -> Any: ...


def _expm1(x: Any) -> Any: ...


def _log1p01(x: Any) -> Any:
    """log(1 + x) for x from 0 to 1."""


def _tanh(x: Any) -> Any: ...


@overload(_exp)
def _overload_exp(x: Any) -> Any:
    def single(x: Any) -> Any:
        p, s = _exp_parts(x)
        return ((_ONE + p) * s) * _TWO

    def double(x: Any) -> Any:
        return math.exp(x)

    return single if x == types.float32 else double


@overload(_expm1)
def _overload_expm1(x: Any) -> Any:
    def single(x: Any) -> Any:
        p, s = _exp_parts(x)
        return _TWO * (s * p + (s - _HALF))

    def double(x: Any) -> Any:
        return math.expm1(x)

    return single if x == types.float32 else double


@overload(_log1p01)
def _overload_log1p01(x: Any) -> Any:
    def single(x: Any) -> Any:
        # 2 artanh(x / (2 + x)), whose argument is at most 1/3
        a = x / (_TWO + x)
        q = a * a
        tail = _A1 + q * (_A2 + q * (_A3 + q * (_A4 + q * (_A5 + q * (_A6 + q * _A7)))))
        return _TWO * (a + a * q * tail)

    def double(x: Any) -> Any:
        return math.log1p(x)

    return single if x == types.float32 else double


@overload(_tanh)
def _overload_tanh(x: Any) -> Any:
    def single(x: Any) -> Any:
        q = _expm1(-_TWO * abs(x))
        return math.copysign(q / (_TWO + q), x)

    def double(x: Any) -> Any:
        return math.tanh(x)

    return single if x == types.float32 else double


def _sigmoid(z: Any) -> Any: ...


@overload(_sigmoid)
def _overload_sigmoid(z: Any) -> Any:
    one, zero = _constants(z, 1, 0)

    def sigmoid(z: Any) -> Any:
        e = _exp(-abs(z))
        r = one / (one + e)
        return r if z >= zero else e * r

    return sigmoid


def _activate(z: Any, code: int) -> Any:
    """The activation. Callers pass a constant `code`, so the compiler keeps one branch."""


@overload(_activate)
def _overload_activate(z: Any, code: Any) -> Any:
    zero, half, leak, root = _constants(z, 0, 0.5, LEAK, -math.sqrt(0.5))

    def activate(z: Any, code: Any) -> Any:
        if code == _RELU:
            return zero if z <= zero else z
        if code == _LEAKY_RELU:
            return z if z > zero else leak * z
        if code == _ELU:
            return z if z > zero else _expm1(z)
        if code == _GELU:
            return z * half * math.erfc(z * root)
        if code == _SILU:
            return z * _sigmoid(z)
        if code == _SIGMOID:
            return _sigmoid(z)
        if code == _TANH:
            return _tanh(z)
        if code == _SOFTPLUS:
            return (zero if z <= zero else z) + _log1p01(_exp(-abs(z)))
        if code == _EXP:
            return _exp(z)
        return z

    return activate


def _slope(a: Any, code: int) -> Any:
    """The derivative, from the output; for gelu and silu, from the pre-activation."""


@overload(_slope)
def _overload_slope(a: Any, code: Any) -> Any:
    zero, half, one, leak = _constants(a, 0, 0.5, 1, LEAK)
    root, density = _constants(a, -math.sqrt(0.5), 1 / math.sqrt(2 * math.pi))

    def slope(a: Any, code: Any) -> Any:
        if code == _RELU:
            return one if a > zero else zero
        if code == _LEAKY_RELU:
            return one if a > zero else leak
        if code == _ELU:
            return one if a > zero else a + one
        if code == _GELU:
            return half * math.erfc(a * root) + a * density * _exp(-half * a * a)
        if code == _SILU:
            s = _sigmoid(a)
            return s * (one + a * (one - s))
        if code == _SIGMOID:
            return a * (one - a)
        if code == _TANH:
            return (one - a) * (one + a)
        if code == _SOFTPLUS:
            return -_expm1(-a)
        if code == _EXP:
            return a
        return one

    return slope


def _constants(like: Any, *values: float) -> tuple[Any, ...]:
    """Constants in the precision of a Numba scalar type; a bare literal would make float64 of float32."""
    scalar = np.float32 if like == types.float32 else np.float64
    return tuple(scalar(v) for v in values)


_LINEAR, _RELU, _LEAKY_RELU, _ELU, _GELU, _SILU, _SIGMOID, _TANH, _SOFTPLUS, _EXP = (
    int(a) for a in Activation if a is not Activation.SOFTMAX
)
_MSE, _BCE, _HUBER = int(Loss.MSE), int(Loss.BCE), int(Loss.HUBER)


# --- data in ------------------------------------------------------------------------------------------------


@_kernel(_EXACT)
def gather_csr(indptr: Any, indices: Any, data: Any, rows: Any, out: Any) -> None:
    for i in range(rows.size):
        out[i] = 0
        for k in range(indptr[rows[i]], indptr[rows[i] + 1]):
            out[i, indices[k]] += data[k]


@_kernel(_EXACT)
def segments(of: Any, first: Any, begins: Any, out: Any) -> None:
    """Segment i of `out`, from begins[i] to begins[i + 1], is what `of` has from first[i] on."""
    for i in range(first.size):
        # Signed indices would need a check for negative values, and the loops would not vectorise.
        at, to, n = np.uint64(first[i]), np.uint64(begins[i]), np.uint64(begins[i + 1] - begins[i])
        for k in range(n):
            out[to + k] = of[at + k]


# --- random numbers -----------------------------------------------------------------------------------------


@_inline
def _philox(c0: Any, c1: Any, c2: Any, c3: Any, k0: Any, k1: Any) -> Any:
    """One block: see `narrows.random.philox`. All arguments are uint64 holding 32 bits."""
    low, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
    for _ in range(10):
        p0, p1 = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1, c2, c3 = (p1 >> shift) ^ c1 ^ k0, p1 & low, (p0 >> shift) ^ c3 ^ k1, p0 & low
        k0, k1 = (k0 + np.uint64(0x9E3779B9)) & low, (k1 + np.uint64(0xBB67AE85)) & low
    return c0, c1, c2, c3


@_kernel(_EXACT)
def cells(key: Any, step: Any, stream: Any, out: Any) -> None:
    """out = `philox.words` >> 8: the cells whose centres are the uniform numbers; int32, (rows, columns)."""
    k0, k1 = key & np.uint64(0xFFFFFFFF), key >> np.uint64(32)
    rows, columns = out.shape
    whole = columns // 4
    for i in range(rows):
        row = out[i]
        for j in range(whole):
            w = _philox(np.uint64(j), np.uint64(i), step, stream, k0, k1)
            row[4 * j] = w[0] >> np.uint64(8)
            row[4 * j + 1] = w[1] >> np.uint64(8)
            row[4 * j + 2] = w[2] >> np.uint64(8)
            row[4 * j + 3] = w[3] >> np.uint64(8)
        if 4 * whole < columns:
            w = _philox(np.uint64(whole), np.uint64(i), step, stream, k0, k1)
            for j in range(4 * whole, columns):
                row[j] = w[j - 4 * whole] >> np.uint64(8)


# Wichura, algorithm AS 241 (PPND16), Applied Statistics 37, 1988; highest power first
_CENTRE = (
    (2509.0809287301226727, 33430.575583588128105, 67265.770927008700853, 45921.953931549871457,
     13731.693765509461125, 1971.5909503065514427, 133.14166789178437745, 3.3871328727963666080),
    (5226.4952788528545610, 28729.085735721942674, 39307.895800092710610, 21213.794301586595867,
     5394.1960214247511077, 687.18700749205790830, 42.313330701600911252, 1.0),
)  # fmt: skip
_TAIL = (
    (7.74545014278341407640e-4, 0.0227238449892691845833, 0.241780725177450611770, 1.27045825245236838258,
     3.64784832476320460504, 5.76949722146069140550, 4.63033784615654529590, 1.42343711074968357734),
    (1.05075007164441684324e-9, 5.47593808499534494600e-4, 0.0151986665636164571966, 0.148103976427480074590,
     0.689767334985100004550, 1.67638483018380384940, 2.05319162663775882187, 1.0),
)  # fmt: skip


@_inline
def _ratio(x: Any, coefficients: Any) -> Any:
    above, below = 0.0, 0.0
    for k in range(8):
        above = above * x + coefficients[0][k]
        below = below * x + coefficients[1][k]
    return above / below


@_inline
def _normal(cell: Any) -> Any:
    """The normal quantile of the centre of a cell."""
    q = (cell + 0.5) * 2.0**-24 - 0.5
    if abs(q) <= 0.425:
        return q * _ratio(0.180625 - q * q, _CENTRE)
    # The cells end 2**-25 from 0 and 1, short of the third region of the algorithm.
    return math.copysign(_ratio(math.sqrt(-math.log(0.5 - abs(q))) - 1.6, _TAIL), q)


@_kernel(_EXACT)
def draw_binary(p: Any, cells: Any, out: Any) -> None:
    """1 where the centre of the cell is below p, and 0 elsewhere."""
    one, zero, half = out.dtype.type(1), out.dtype.type(0), out.dtype.type(-0.5)
    size = out.dtype.type(2**24)
    for i in range(out.shape[0]):
        for j in range(out.shape[1]):
            # The comparison is exact: near -1/2 the difference of neighbours is not rounded.
            out[i, j] = one if out.dtype.type(cells[i, j]) - p[i, j] * size < half else zero


@_kernel(_EXACT)
def add_normal(x: Any, cells: Any, level: float) -> None:
    """x += level * normal quantile of the centres of the cells."""
    for i in range(x.shape[0]):
        for j in range(x.shape[1]):
            x[i, j] += level * _normal(cells[i, j])


@_kernel(_EXACT)
def draw_latents(stats: Any, cells: Any, z: Any, noise: Any) -> None:
    """z = mean + noise, noise = exp(log-variance / 2) * normal quantile of the centres of the cells."""
    k = z.shape[1]
    half = z.dtype.type(0.5)
    for i in range(z.shape[0]):
        for j in range(k):
            noise[i, j] = _exp(half * stats[i, k + j]) * _normal(cells[i, j])
            z[i, j] = stats[i, j] + noise[i, j]


@_kernel(_EXACT)
def replace_below(x: Any, cells: Any, threshold: int, value: Any) -> None:
    for i in range(x.shape[0]):
        for j in range(x.shape[1]):
            x[i, j] = value if cells[i, j] < threshold else x[i, j]


@_kernel(_EXACT)
def scale_above(x: Any, cells: Any, threshold: int, scale: Any) -> None:
    """x *= scale in the cells from `threshold` on, 0 below."""
    for i in range(x.shape[0]):
        for j in range(x.shape[1]):
            x[i, j] *= scale if cells[i, j] >= threshold else x.dtype.type(0)


# --- elementwise kernels of the network ---------------------------------------------------------------------


@_kernel(_EXACT)
def product_by_rows(x: Any, W: Any, out: Any) -> None:
    """out = x @ W; each row sums in the order of k, whatever the other rows are. Four rows share a row of W."""
    m, n = out.shape
    out[:] = 0
    i = 0
    while i + 4 <= m:
        for k in range(x.shape[1]):
            x0, x1, x2, x3 = x[i, k], x[i + 1, k], x[i + 2, k], x[i + 3, k]
            for j in range(n):
                w = W[k, j]
                out[i, j] += x0 * w
                out[i + 1, j] += x1 * w
                out[i + 2, j] += x2 * w
                out[i + 3, j] += x3 * w
        i += 4
    while i < m:
        for k in range(x.shape[1]):
            x0 = x[i, k]
            for j in range(n):
                out[i, j] += x0 * W[k, j]
        i += 1


@cache
def bias_activate(activation: int) -> _Kernel:
    @_kernel(_EXACT)
    def kernel(z: Any, b: Any) -> None:
        for i in range(z.shape[0]):
            for j in range(z.shape[1]):
                z[i, j] = _activate(z[i, j] + b[j], activation)

    return kernel


@cache
def bias_activate_from(activation: int) -> _Kernel:
    @_kernel(_EXACT)
    def kernel(z: Any, b: Any, out: Any) -> None:
        for i in range(z.shape[0]):
            for j in range(z.shape[1]):
                z[i, j] += b[j]
                out[i, j] = _activate(z[i, j], activation)

    return kernel


@cache
def times_slope(activation: int) -> _Kernel:
    @_kernel(_EXACT)
    def kernel(x: Any, saved: Any, scale: Any) -> None:
        for i in range(x.shape[0]):
            for j in range(x.shape[1]):
                x[i, j] *= _slope(saved[i, j] * scale, activation)

    return kernel


@cache
def loss_rows(loss: int, activation: int) -> _Kernel:
    """Row losses; z becomes dz times the row's scale if `learn`. bce is the joint form with the sigmoid."""
    from_z = Activation(activation).needs_preactivation

    @_kernel(_SUMS)
    def kernel(z: Any, target: Any, scale: Any, rowloss: Any, delta: Any, learn: bool) -> None:
        one, two = z.dtype.type(1), z.dtype.type(2)
        half, zero = z.dtype.type(0.5), z.dtype.type(0)
        for i in range(z.shape[0]):
            total = zero
            for j in range(z.shape[1]):
                x, y = z[i, j], target[i, j]
                if loss == _BCE:
                    e = _exp(-abs(x))
                    r = one / (one + e)
                    total += (zero if x <= zero else x) - x * y + _log1p01(e)
                    dx = (r if x >= zero else e * r) - y
                else:
                    p = _activate(x, activation)
                    d = p - y
                    if loss == _MSE:
                        total += d * d
                        dx = two * d
                    else:
                        clipped = -delta if d < -delta else (delta if d > delta else d)
                        total += clipped * (d - half * clipped)
                        dx = clipped
                    dx *= _slope(x if from_z else p, activation)
                if learn:
                    z[i, j] = dx * scale[i]
            rowloss[i, 0] = total

    return kernel


@cache
def gaussian_rows(activation: int) -> _Kernel:
    """Minus log-densities without their constants; z and rates become gradients times the row's scale if `learn`."""
    from_z = Activation(activation).needs_preactivation

    @_kernel(_SUMS)
    def kernel(
        z: Any, target: Any, scale: Any, precision: Any, rate: Any, rowloss: Any, rates: Any, learn: bool
    ) -> None:
        half = z.dtype.type(0.5)
        for i in range(z.shape[0]):
            total = z.dtype.type(0)
            for j in range(z.shape[1]):
                x = z[i, j]
                p = _activate(x, activation)
                d = p - target[i, j]
                pull = d * precision[j]
                total += d * pull
                if learn:
                    z[i, j] = scale[i] * pull * _slope(x if from_z else p, activation)
                    rates[i, j] = (scale[i] - scale[i] * (d * pull)) * rate[j]
            rowloss[i, 0] = half * total

    return kernel


# --- kernels over the flat regions --------------------------------------------------------------------------


@_kernel(_EXACT)
def adam(
    w: Any, g: Any, m1: Any, m2: Any, factor: Any, beta_1: Any, beta_2: Any, rest_1: Any, rest_2: Any,
    rate: Any, root: Any, epsilon: Any,
) -> None:  # fmt: skip
    for i in range(w.size):
        d = g[i] * factor
        m = beta_1 * m1[i] + rest_1 * d
        v = beta_2 * m2[i] + rest_2 * (d * d)
        m1[i], m2[i] = m, v
        w[i] -= rate * m / (np.sqrt(v) * root + epsilon)


@_kernel(_EXACT)
def momentum(w: Any, g: Any, v: Any, factor: Any, momentum: Any, rate: Any) -> None:
    for i in range(w.size):
        v[i] = momentum * v[i] - rate * (g[i] * factor)
        w[i] += v[i]


@_kernel(_SUMS)
def decay_cells(w: Any, dw: Any, columns: int, s2: Any, s1: Any, rows: int, lanes: int, penalty: Any) -> None:
    half = s2 * w.dtype.type(0.5)
    penalty[...] = 0
    for i in range(w.shape[0]):
        for c in range(penalty.shape[1]):
            total = w.dtype.type(0)
            for j in range(c * lanes, min(columns, (c + 1) * lanes)):
                v = w[i, j]
                total += half * v * v + s1 * abs(v)
                dw[i, j] += s2 * v + (s1 if v > 0 else (-s1 if v < 0 else s1 * v))
            penalty[i // rows, c] += total


@_kernel(_SUMS)
def grain_norms(g: Any, grain: int, partial: Any) -> None:
    for k in range(partial.size):
        total = 0.0
        for i in range(k * grain, min(g.size, (k + 1) * grain)):
            total += np.float64(g[i] * g[i])
        partial[k] = total
