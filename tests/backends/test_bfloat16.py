"""``precision="bfloat16"``: products of rounded factors, summed in float32, on every backend.

Where every factor has at most 8 significant bits and every sum is exact, bfloat16 must give the very bits of float32:
that pins each element to its place, in every layout. Rounding itself is held against the reference.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import narrows
from cases import CASES
from narrows.backends import Hyper, compile_plan
from narrows.backends.reference import ReferenceProgram, bfloat16
from narrows.plan.lowering import lower
from narrows.plan.plan import Mode
from narrows.plan.spec import Activation, NetworkSpec, Precision
from networks import Case, network
from oracle import SEED, STEP, away_from_kinks

Array = NDArray[Any]

SIZES = (1, 2, 5, 7, 16, 17, 31, 33, 63, 64, 65, 97)


# --- rounding -------------------------------------------------------------------------------------------------------


def test_rounding_is_to_nearest_even_with_eight_bits() -> None:
    ulp = 2.0**-7
    x = np.array([1, 1 + ulp, 1 + 0.5 * ulp, 1 + 1.5 * ulp, 1 + 0.5001 * ulp, -1 - 0.5 * ulp, 3e38, 0, -0.0])
    expected = [1, 1 + ulp, 1, 1 + 2 * ulp, 1 + ulp, -1, 226 * 2.0**120, 0, 0]
    np.testing.assert_allclose(bfloat16(x), expected, rtol=1e-4)
    random = np.random.default_rng(0).normal(size=10000) * 10.0 ** np.arange(-20, 20).repeat(250)
    rounded = bfloat16(random)
    assert (np.abs(rounded - random) <= 2.0**-8 * np.abs(random)).all()
    assert (bfloat16(rounded) == rounded).all()
    special = bfloat16(np.array([np.inf, -np.inf, np.nan, 1e-40, -1e-40, 3.4e38], np.float32))
    assert special[0] == np.inf
    assert special[1] == -np.inf
    assert np.isnan(special[2])
    assert (special[3:5] == 0).all()
    assert np.signbit(special[4])
    assert special[5] == np.inf


# --- exact data: the bits of float32 --------------------------------------------------------------------------------


def exact_state(spec: NetworkSpec, rng: np.random.Generator) -> dict[str, Array]:
    """Weights of -1, 0 and 1; the last has one nonzero in a row, so that nothing grows on the way back."""
    state: dict[str, Array] = {}
    last = len(spec.layers) - 1
    for i, layer in enumerate(spec.layers):
        if layer.tied_to is None:
            W = rng.integers(-1, 2, (layer.n_in, layer.n_out))
            if i == last:
                W = np.zeros_like(W)
                rows = np.arange(layer.n_in)
                W[rows, rows * 7 % layer.n_out] = rng.choice([-1, 1], layer.n_in)
            state[f"W{i}"] = W.astype(np.float32)
        state[f"b{i}"] = rng.integers(-1, 2, (1, layer.n_out)).astype(np.float32)
    return state


def run_exact(spec: NetworkSpec, m: int, precision: Precision, n_threads: int) -> dict[str, Array]:
    rng = np.random.default_rng(m)
    k = spec.n_features
    X = np.zeros((m, k), np.float32)
    X[np.arange(m), rng.integers(0, k, m)] = 1
    dense = rng.integers(-1, 2, (m, k)).astype(np.float32)
    program = compile_plan(lower(spec, m), "cpp", precision=precision, n_threads=n_threads)
    program.load(exact_state(spec, rng))
    program.bind(X)
    found = dict(program.gradient(np.arange(m))[1])
    found["encoded"] = program.apply(dense, Mode.ENCODE)
    found["decoded"] = program.apply(rng.integers(-2, 3, (m, spec.n_components)).astype(np.float32), Mode.DECODE)
    return found


def assert_same_bits(spec: NetworkSpec, m: int, n_threads: int = 1) -> None:
    expected = run_exact(spec, m, Precision.FLOAT32, n_threads)
    actual = run_exact(spec, m, Precision.BFLOAT16, n_threads)
    for name, value in expected.items():
        np.testing.assert_array_equal(actual[name], value, err_msg=f"{name} of {spec.layers[0]} at {m} rows")
    assert any(np.abs(value).max() > 0 for value in actual.values())


@pytest.mark.parametrize("k", SIZES)
def test_exact_data_gives_the_bits_of_float32_at_every_edge(cpp: str, k: int) -> None:
    for n, m in itertools.product((1, 6, 17, 64, 65), (1, 2, 4, 16, 64)):
        # Batches are powers of two, because the loss divides by them.
        assert_same_bits(network((k, n, k), Activation.LINEAR), m)


@pytest.mark.parametrize(
    ("k", "n", "m"),
    [(1023, 70, 4), (1024, 6, 16), (1025, 33, 2), (3001, 65, 8), (40, 700, 512), (17, 9, 2048), (2500, 3, 256)],
)
def test_exact_data_where_products_are_cut(cpp: str, k: int, n: int, m: int) -> None:
    for threads in (1, 2):
        assert_same_bits(network((k, n, k), Activation.LINEAR), m, threads)


def test_exact_data_with_a_transposed_weight(cpp: str) -> None:
    rng = np.random.default_rng(0)
    for k, n, m in ((33, 6, 4), (65, 17, 16), (1500, 20, 2)):
        spec = network((k, n, k), Activation.LINEAR, tied=True)
        plan = lower(spec, m)
        state = {"W0": np.zeros((k, n), np.float32), "b0": np.zeros((1, n)), "b1": np.ones((1, k))}
        state["W0"][rng.permutation(k)[:n], np.arange(n)] = 1
        X = rng.integers(-1, 2, (m, k)).astype(np.float32)
        results = []
        for precision in (Precision.FLOAT32, Precision.BFLOAT16):
            program = compile_plan(plan, "cpp", precision=precision, n_threads=1)
            program.load(state)
            program.bind(X)
            results.append({**program.gradient(np.arange(m))[1], "out": program.apply(X, Mode.RECONSTRUCT)})
        for name, value in results[0].items():
            np.testing.assert_array_equal(results[1][name], value, err_msg=name)


# --- tile registers -------------------------------------------------------------------------------------------------

EXACT = """
import sys
sys.path[:0] = {path!r}
import test_bfloat16 as tests
for k, n, m in ((97, 65, 64), (1025, 33, 2), (40, 700, 512), (17, 9, 2048)):
    for threads in (1, 2):
        tests.assert_same_bits(tests.network((k, n, k), tests.Activation.LINEAR), m, threads)
tests.test_exact_data_with_a_transposed_weight("cpp")
tests.encode_by_tiles({out!r})
"""


def tile_case() -> tuple[Array, Array]:
    rng = np.random.default_rng(0)
    return rng.normal(size=(37, 70)).astype(np.float32), rng.normal(size=(70, 45)).astype(np.float32)


def encode_by_tiles(out: str) -> None:
    """Save the product of `tile_case` with one and with three threads."""
    X, W = tile_case()
    spec = network((70, 45, 70), Activation.LINEAR)
    products = []
    for threads in (1, 3):
        program = compile_plan(lower(spec, len(X)), "cpp", precision="bfloat16", n_threads=threads)
        state = {slot.name: np.zeros((slot.rows, slot.cols), np.float32) for slot in program.plan.parameters}
        program.load(state | {"W0": W})
        products.append(program.apply(X, Mode.ENCODE))
    np.save(out, products)


def documented(X: Array, W: Array) -> Array:
    """X W as TDPBF16PS sums it: blocks of 32 terms, in each the even and the odd terms apart, in float32."""
    a, b = bfloat16(X).astype(np.float64), bfloat16(W).astype(np.float64)
    total = np.zeros((len(a), b.shape[1]), np.float32)
    for block in range(0, a.shape[1], 32):
        part = np.zeros((2, *total.shape), np.float32)
        for k in range(block, min(block + 32, a.shape[1])):
            part[k % 2] = part[k % 2] + np.outer(a[:, k], b[k])  # exact in float64, rounded once
        total += part[0] + part[1]
    return total


def test_tile_registers_sum_as_documented(cpp: str, tmp_path: Path) -> None:
    """The model of the instructions runs the product of AMX. On a CPU with AMX the instructions run it as well."""
    from native_functions import pair_sets

    for isa in pair_sets():
        if isa == "avx512bf16":
            continue
        out = tmp_path / f"{isa}.npy"
        code = EXACT.format(path=[str(Path(__file__).parent), *sys.path], out=str(out))
        command = [sys.executable, "-c", code]
        result = subprocess.run(command, env=os.environ | {"NARROWS_ISA": isa}, text=True, capture_output=True)
        assert result.returncode == 0, result.stderr
        for product in np.load(out):
            np.testing.assert_array_equal(product, documented(*tile_case()), err_msg=isa)


# --- rounded data: the reference ------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [c for c in CASES if "clip" not in c.name][::2], ids=str)
def test_gradients_agree_with_the_reference(fast_backend: str, case: Case) -> None:
    """A value on the verge rounds to either side, and is 2**-8 off then; few do."""
    case = away_from_kinks(case)
    program = compile_plan(case.plan, fast_backend, precision="bfloat16", n_threads=2)
    reference = ReferenceProgram(case.plan, bfloat16=True)
    for p, dtype in ((program, np.float32), (reference, np.float64)):
        p.load(case.state(dtype))
        p.bind(*case.data(dtype))
    rows = np.arange(min(case.batch, case.rows))
    terms, gradient = program.gradient(rows, SEED, STEP)
    expected_terms, expected = reference.gradient(rows, SEED, STEP)
    np.testing.assert_allclose(terms, expected_terms, rtol=0.02)
    norm = np.sqrt(sum(np.square(g).sum() for g in expected.values()))
    error = np.sqrt(sum(np.square(gradient[name] - g).sum() for name, g in expected.items()))
    assert error <= 0.01 * norm


@pytest.mark.parametrize("case", [Case("wide", network((300, 70, 300)), 64, 64)], ids=str)
def test_factors_are_rounded(backend: str, case: Case) -> None:
    """Neither the bits of float32 nor far from them."""
    data, outputs = case.data(np.float32), []
    for precision in ("float32", "bfloat16"):
        program = compile_plan(case.plan, backend, precision=precision, n_threads=1)
        program.load(case.state(np.float32))
        outputs.append(program.apply(data.X, Mode.ENCODE))
    error = np.abs(outputs[1] - outputs[0]).max() / np.abs(outputs[0]).max()
    assert 1e-4 < error < 2e-2


def test_training_on_every_backend_goes_the_same_way(backend: str) -> None:
    case = Case("way", network((60, 20, 60), Activation.TANH), 32, 320)
    losses = []
    for precision in ("float32", "bfloat16"):
        program = compile_plan(case.plan, backend, precision=precision, n_threads=1)
        program.load(case.state(np.float32))
        program.bind(*case.data(np.float32))
        for epoch in range(5):
            terms = program.train(np.arange(320), Hyper(SEED, 10 * epoch, np.full(10, 3e-3)))
        losses.append(terms[:, 0].mean())
    assert losses[1] == pytest.approx(losses[0], rel=0.01)
    assert losses[1] != losses[0] or backend == "reference"


def test_estimators_take_it_and_keep_float32(tmp_path: Any) -> None:
    X = np.random.default_rng(0).random((200, 30)).astype(np.float32)
    options: dict[str, Any] = {"n_components": 4, "max_iter": 20, "random_state": 0}
    single = narrows.Autoencoder(**options).fit(X)
    half = narrows.Autoencoder(**options, precision="bfloat16").fit(X)
    assert half.transform(X).dtype == np.float32
    assert all(W.dtype == np.float32 for W in half.coefs_)
    assert half.loss_ == pytest.approx(single.loss_, rel=0.02)
    half.save(tmp_path / "model.safetensors")
    loaded = narrows.load(tmp_path / "model.safetensors")
    assert loaded.precision == "bfloat16"
    np.testing.assert_array_equal(loaded.transform(X), half.transform(X))
    with pytest.raises(ValueError, match="bfloat16"):
        narrows.Autoencoder(precision="float16").fit(X)
