"""The native vector functions: within their bound of float64 on every kind of float32, and of the same bits whatever
the vector's width. Every instruction set of this CPU is called in this process."""

from __future__ import annotations

import os

import numpy as np
import pytest

from narrows.backends import probe

if not probe("cpp").ok:
    pytest.skip(f"no native backend: {probe('cpp').reason}", allow_module_level=True)

from narrows import _core
from narrows.plan.spec import Activation
from native_functions import FUNCTIONS, Function, Measured, instruction_sets, special_bits, sweep

by_function = pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.key)
by_isa = pytest.mark.parametrize("isa", instruction_sets())
BY_NAME = {f.key: f for f in FUNCTIONS}


def assert_as_promised(function: Function, measured: Measured) -> None:
    over = {isa: w for isa, w in measured.worst.items() if not w.ulp <= function.bound_of(isa)}
    assert not over, f"bound {function.bound}"
    assert measured.same_bits, "AVX2 and AVX-512 differ"


@by_function
def test_sample(function: Function) -> None:
    """One bit pattern in 2053 of all, and each around the numbers where something changes."""
    measured = sweep(function, stride=2053)
    assert measured.count > 100_000
    assert_as_promised(function, measured)


@pytest.mark.slow
@by_function
def test_every_float32(function: Function) -> None:
    assert_as_promised(function, sweep(function, threads=os.cpu_count() or 1))


def test_every_activation_is_measured() -> None:
    functors = {"".join(part.capitalize() for part in a.name.split("_")) for a in Activation} - {"Softmax"}
    assert {f"{name}::{part}" for name in functors for part in ("value", "slope")} <= BY_NAME.keys()


def test_a_wrong_function_is_found() -> None:
    """The measure itself: a gap of one number is one ulp, at infinity and among subnormal numbers too."""
    wrong = Function("Linear::value", lambda z: np.nextafter(z.astype(np.float32), np.float32(np.inf)).astype(float), 0)
    measured = sweep(wrong, stride=2**20 - 1)
    assert all(0.5 <= w.ulp <= 1 for w in measured.worst.values())
    lost = sweep(Function("Linear::value", lambda z: np.where(z == 1, np.nan, z), 0), stride=2**20 - 1)
    assert all(w.ulp == np.inf and w.x == 1 for w in lost.worst.values())


@by_isa
def test_ranges_are_kept(isa: str) -> None:
    """A probability is never above one nor below zero, and a tangent never beyond one: slopes rely on it."""
    x = np.concatenate([special_bits().view(np.float32), np.linspace(-20, 20, 1_000_001, dtype=np.float32)])
    x = x[~np.isnan(x)]
    for name, low in (("tanh", -1), ("Sigmoid::value", 0), ("normal_cdf", 0), ("Elu::value", -1), ("exp", 0)):
        out = _core.evaluate(name, x, isa)
        assert out.min() == low, name
        assert out[x <= 0].max() <= 1, name


@by_function
def test_an_element_does_not_depend_on_its_neighbours(function: Function) -> None:
    x = function.arguments(np.random.default_rng(0).integers(0, 2**32, 400, dtype=np.uint32))
    for isa in instruction_sets():
        whole = function(x, isa)
        for shift in range(1, 17):
            np.testing.assert_array_equal(function(x[shift:].copy(), isa), whole[shift:], err_msg=f"{isa}, {shift}")
        alone = [function(x[i : i + 1], isa)[0] for i in range(len(x))]
        np.testing.assert_array_equal(alone, whole, err_msg=f"{isa}, one by one")


@by_function
def test_float64(function: Function) -> None:
    """The C library's functions, lane by lane: as accurate as the formulas, and the same for every instruction set."""
    low, high = max(function.domain[0], -30), min(function.domain[1], 30)
    x = np.linspace(low, high, 10_001)
    with np.errstate(all="ignore"):
        true = np.asarray(function.reference(x), float)
        scale = np.abs(true) + (0 if function.scale is None else function.scale(x))
    outs = [_core.evaluate(function.name, x, isa, function.target) for isa in instruction_sets()]
    np.testing.assert_array_equal(np.isnan(outs[0]), np.isnan(true))
    fine = np.isfinite(true)
    for out in outs:
        assert (np.abs(out[fine] - true[fine]) <= 1e-13 * scale[fine]).all()
        np.testing.assert_array_equal(out[~fine], true[~fine])


@by_isa
def test_the_floating_point_environment_is_left_alone(isa: str) -> None:
    x = special_bits().view(np.float32)
    for function in FUNCTIONS:
        function(function.arguments(x.view(np.uint32)), isa)
    tiny = np.full(64, 2.0**-140, np.float32)
    assert (tiny * np.float32(0.5) == np.float32(2.0**-141)).all(), "subnormal numbers are kept"
    assert np.float32(1) + np.float32(2.0**-24) == 1, "rounding is to nearest"
    assert np.float32(1) - np.float32(2.0**-26) == 1, "rounding is to nearest"


def test_errors() -> None:
    x = np.zeros(3, np.float32)
    with pytest.raises(ValueError, match="'no such' is not a function"):
        _core.evaluate("no such", x, "")
    with pytest.raises(ValueError, match="not an instruction set"):
        _core.evaluate("exp", x, "mmx")
    with pytest.raises(TypeError, match="float32 or float64"):
        _core.evaluate("exp", x.astype(np.int32), "")
