"""The native vector functions, their error bounds, and how errors are measured.

An error is given in ulp. One ulp is the gap between float32 numbers at the true value. Below 2**-126 it is the gap of
the subnormal numbers, 2**-149. Some formulas are sums whose terms cancel near a root. For them the gap is taken at the
sum of the magnitudes of the terms. Infinity counts as 2**128. NaN must come out exactly where the reference has it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numba
import numpy as np
from numpy.typing import NDArray
from scipy import special

from formulas import ACTIVATION, SLOPE, gelu_slope, silu_slope
from narrows import _core
from narrows.plan.ops import LOG_DISPERSION_LIMIT

Array = NDArray[np.float64]
INF = np.inf
CHUNK = 1 << 13
"""Values taken at once, so that they stay in cache."""


def normal_quantile(q: Array) -> Array:
    """Of 1/2 + q."""
    x: Array = np.sqrt(2) * special.erfinv(2 * q)
    return x


def bce(y: float) -> Callable[[Array], Array]:
    return lambda z: np.maximum(z, 0) - z * y + np.log1p(np.exp(-np.abs(z)))


def bce_slope(y: float) -> Callable[[Array], Array]:
    return lambda z: np.where(z < 0, special.expit(z) - y, (1 - y) - special.expit(-z))


INVERSE_DISPERSIONS = (math.exp(-LOG_DISPERSION_LIMIT), math.exp(LOG_DISPERSION_LIMIT))
MOVED = 6
"""Arguments below this are moved up by it before Stirling's series."""


def lgamma_terms(z: Array) -> Array:
    moved: Array = np.abs(special.gammaln(z)) + np.where(z < MOVED, 20, 0)
    return moved


def digamma_terms(z: Array) -> Array:
    moved: Array = np.abs(special.psi(z)) + np.where(z < MOVED, 2.5, 0)
    return moved


def log_binomial(y: float) -> Callable[[Array], Array]:
    return lambda t: special.gammaln(t + y) - special.gammaln(t) - special.gammaln(y + 1)


def log_binomial_terms(y: float) -> Callable[[Array], Array]:
    """Of Stirling's series, and of what arguments are moved up by."""

    def terms(t: Array) -> Array:
        at = np.where(t < MOVED, t + MOVED, t)
        total: Array = y * np.abs(np.log((y + t) / (y + 1))) + at * np.log1p(y / at)
        return total + (MOVED + 1) * np.log(y + MOVED + 1) + np.abs(np.log(t)) * (t < MOVED)

    return terms


def digamma_rise(y: float) -> Callable[[Array], Array]:
    return lambda t: special.psi(t + y) - special.psi(t)


@dataclass(frozen=True)
class Function:
    """A native function and what is promised of it."""

    name: str
    reference: Callable[[Array], Array]
    bound: float
    """Largest error in ulp, with fused multiply-adds."""
    unfused: float | None = None
    """Largest error without them, where that is more."""
    domain: tuple[float, float] = (-INF, INF)
    """Smallest and largest argument, both included. NaN always is one."""
    scale: Callable[[Array], Array] | None = None
    """Sum of the magnitudes of the terms that cancel; else the ulp is that of the true value."""
    target: float = 0.0
    """Of a loss; of the binomial coefficients of counts, the count."""

    @property
    def key(self) -> str:
        of_target = self.name.startswith("Bce") or self.name in ("log_binomial", "digamma_rise")
        return f"{self.name}, y = {self.target:g}" if of_target else self.name

    def bound_of(self, isa: str) -> float:
        return self.unfused or self.bound if isa == "baseline" else self.bound

    def arguments(self, bits: NDArray[np.uint32]) -> NDArray[np.float32]:
        """The numbers with these bit patterns that lie in the domain."""
        x = bits.view(np.float32)
        return x if self.domain == (-INF, INF) else x[~((x < self.domain[0]) | (x > self.domain[1]))]

    def __call__(self, x: NDArray[np.float32], isa: str) -> NDArray[np.float32]:
        out: NDArray[np.float32] = _core.evaluate(self.name, x, isa, self.target)
        return out


FUNCTIONS = (
    Function("exp", np.exp, 1.1),
    Function("expm1", np.expm1, 1.75, domain=(-INF, 88)),
    Function("log", np.log, 1.0),
    Function("log1p", np.log1p, 1.5, domain=(0, INF)),
    Function("tanh", np.tanh, 1.5),
    Function("sqrt", np.sqrt, 0.5),
    Function("normal_cdf", special.ndtr, 4.0, unfused=4.5),
    Function("normal_quantile", normal_quantile, 5.0, unfused=5.5, domain=(-0.5 + 2**-25, 0.5 - 2**-25)),
    Function("lgamma", special.gammaln, 3.0, unfused=4.0, domain=(2.0**-149, 1e36), scale=lgamma_terms),
    Function("digamma", special.psi, 6.5, unfused=8.0, domain=(2.0**-149, INF), scale=digamma_terms),
    *(
        Function("log_binomial", log_binomial(y), 3.0, 3.25, INVERSE_DISPERSIONS, log_binomial_terms(y), y)
        for y in (1.0, 5.0, 1000.0)
    ),
    *(
        Function("digamma_rise", digamma_rise(y), bound, 1.2 * bound, INVERSE_DISPERSIONS, target=y)
        for y, bound in ((1.0, 27.0), (5.0, 7.5), (1000.0, 7.5))
    ),
    Function("Linear::value", ACTIVATION["LINEAR"], 0.0),
    Function("Linear::slope", SLOPE["LINEAR"], 0.0),
    Function("Relu::value", ACTIVATION["RELU"], 0.0),
    Function("Relu::slope", lambda a: (a > 0).astype(float), 0.0),
    Function("LeakyRelu::value", ACTIVATION["LEAKY_RELU"], 1.0),
    Function("LeakyRelu::slope", SLOPE["LEAKY_RELU"], 0.5),
    Function("Elu::value", ACTIVATION["ELU"], 1.1),
    Function("Elu::slope", lambda a: np.where(a > 0, 1, a + 1), 0.5, domain=(-1, INF)),
    Function("Gelu::value", ACTIVATION["GELU"], 4.0, unfused=4.5),
    Function("Gelu::slope", SLOPE["GELU"], 4.0, scale=lambda z: gelu_slope(z, np.sign(z))),
    Function("Silu::value", ACTIVATION["SILU"], 3.5),
    Function("Silu::slope", SLOPE["SILU"], 4.0, scale=lambda z: silu_slope(z, np.sign(z))),
    Function("Sigmoid::value", ACTIVATION["SIGMOID"], 2.5),
    Function("Sigmoid::slope", lambda a: a * (1 - a), 1.5, domain=(0, 1)),
    Function("Tanh::value", ACTIVATION["TANH"], 1.5),
    Function("Tanh::slope", lambda a: (1 - a) * (1 + a), 2.0, domain=(-1, 1)),
    Function("Softplus::value", ACTIVATION["SOFTPLUS"], 2.0),
    Function("Softplus::slope", lambda a: -np.expm1(-a), 1.1, domain=(0, INF)),
    Function("Exp::value", ACTIVATION["EXP"], 1.1),
    Function("Exp::slope", lambda a: a, 0.0),
    Function("BceSigmoid::value", bce(0.0), 2.0),
    Function("BceSigmoid::value", bce(1.0), 2.0, target=1.0),
    Function("BceSigmoid::value", bce(0.25), 2.0, target=0.25),
    Function("BceSigmoid::slope", bce_slope(0.0), 2.5),
    Function("BceSigmoid::slope", bce_slope(1.0), 2.5, target=1.0),
    Function("BceSigmoid::slope", bce_slope(0.25), 2.0, target=0.25, scale=lambda z: special.expit(z) + 0.25),
)


PAIR_SETS = ("amx", "avx512bf16", "amx-model")
"""Instruction sets with their own products in bfloat16. All else is AVX-512's."""


def instruction_sets() -> list[str]:
    """Those of this build with functions of their own that this CPU has, best first."""
    tables = _core.build_info()["isa_tables"]
    return [name for name, supported in tables if supported and name not in PAIR_SETS]


def pair_sets() -> list[str]:
    """Those of `PAIR_SETS` in this build that this CPU has."""
    return [name for name, supported in _core.build_info()["isa_tables"] if supported and name in PAIR_SETS]


@numba.njit(nogil=True)
def _worst(got: NDArray[np.float32], true: Array, scale: Array) -> tuple[float, int]:
    """The largest error in ulp, and where it is."""
    worst, at, limit = -1.0, 0, 2.0**128
    for i in range(len(got)):
        g, t = np.float64(got[i]), true[i]
        if np.isnan(g) or np.isnan(t):
            error = 0.0 if np.isnan(g) and np.isnan(t) else np.inf
        else:
            size = min(max(abs(t), scale[i], 2.0**-126), 2.0**127)
            power = np.int64(np.float64(size).view(np.int64) & 0x7FF0000000000000).view(np.float64)
            error = abs(max(min(g, limit), -limit) - max(min(t, limit), -limit)) / (power * 2.0**-23)
        if error > worst:
            worst, at = error, i
    return worst, at


@dataclass
class Worst:
    ulp: float = -1.0
    x: float = 0.0
    """The argument where it is."""

    def update(self, other: Worst) -> None:
        if other.ulp > self.ulp:
            self.ulp, self.x = other.ulp, other.x


@dataclass
class Measured:
    """Of a function on some numbers: how many, the worst by instruction set, and whether those with fused multiply-adds
    gave the same bits."""

    count: int
    worst: dict[str, Worst]
    same_bits: bool = True

    def update(self, other: Measured) -> None:
        self.count += other.count
        self.same_bits &= other.same_bits
        for isa, worst in other.worst.items():
            self.worst[isa].update(worst)


def measure(function: Function, bits: NDArray[np.uint32]) -> Measured:
    """The function on the numbers with these bit patterns, by every instruction set."""
    isas = instruction_sets()
    result = Measured(0, {isa: Worst() for isa in isas})
    for begin in range(0, len(bits), CHUNK):
        x = function.arguments(bits[begin : begin + CHUNK])
        if not len(x):
            continue
        result.count += len(x)
        with np.errstate(all="ignore"):
            wide = x.astype(np.float64)
            true = np.asarray(function.reference(wide), np.float64)
            scale = true if function.scale is None else function.scale(wide)
        fused = None
        for isa in isas:
            got = function(x, isa)
            if isa != "baseline":
                if fused is not None:
                    # One NaN is as good as another.
                    differ = fused.view(np.uint32) != got.view(np.uint32)
                    result.same_bits &= not np.any(differ & ~(np.isnan(fused) & np.isnan(got)))
                fused = got
            ulp, at = _worst(got, true, scale)
            result.worst[isa].update(Worst(ulp, float(x[at])))
    return result


def sweep(function: Function, stride: int = 1, threads: int = 1) -> Measured:
    """The function on every stride-th bit pattern, and on all of those around the numbers where something changes."""
    with ThreadPoolExecutor(threads) as pool:
        parts = pool.map(lambda bits: measure(function, bits), blocks(stride))
        result = next(parts)
        for part in parts:
            result.update(part)
    return result


def blocks(stride: int) -> Iterator[NDArray[np.uint32]]:
    size = 1 << 24
    yield special_bits()
    for begin in range(0, 1 << 32, size):
        yield np.arange(begin + -begin % stride, begin + size, stride, dtype=np.uint64).astype(np.uint32)


def special_bits(width: int = 200) -> NDArray[np.uint32]:
    """Bit patterns around zeros, subnormal numbers, ones, limits of ranges, infinities and NaN, of both signs."""
    limits = [0, 2**-149, 2**-126, 2**-24, 0.3466, 0.625, 0.7071068, 1, 1.4142135, 2, 9.1, 14.5, 15, 17.4, 20, 40]
    limits += [87.33655, 88.72284, 103.97208, 115, 800, 2.0**126, 2.0**127, 2.0**128 - 2.0**104, np.inf]
    at = np.array(limits, np.float32).view(np.uint32).astype(np.int64)
    near = (at[:, None] + np.arange(-width, width + 1)).ravel()
    near = np.append(near[near >= 0], [0x7FC00000, 0x7FFFFFFF])
    return np.concatenate([near, near + (1 << 31)]).astype(np.uint32)
