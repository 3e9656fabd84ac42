"""Every backend agrees with the float64 reference within a stated bound, for any layout of the data.

A dense op keeps the textbook bound element by element (`dense_bound`). A whole model keeps the bound of `agreement`.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp

from agreement import (
    Array,
    assert_close,
    clear_cases,
    dtypes,
    epoch,
    expected_epoch,
    expected_gradient,
    expected_outputs,
    first_rows,
    inference,
    program_of,
    reference_of,
    tolerance,
)
from cases import CASES, MODEL_CASES, SHAPE_CASES
from narrows.backends import Hyper, compile_plan
from narrows.plan.lowering import lower
from narrows.plan.plan import Mode
from narrows.plan.spec import Activation, Corruption, Loss
from narrows.random import philox
from networks import Case, network
from oracle import SEED, STEP, away_from_kinks

LIPSCHITZ = {Activation.GELU: 1.13, Activation.SILU: 1.1}
"""Largest slopes above 1 of the activations in `SHAPE_CASES`."""


def dense_bound(x: Array, W: Array, b: Array, dtype: Any) -> Array:
    """|y - y64| <= (k + 8) u (|x||W| + |b|) for y = x W + b, sums of k terms in any order."""
    return (x.shape[1] + 8) * np.finfo(dtype).eps / 2 * (np.abs(x) @ np.abs(W) + np.abs(b))


# --- against the reference --------------------------------------------------------------------------------


# Ninety rows are several tiles, as more rows are, and keep the float64 reference quick.
wide_cases = tuple(replace(case, batch=min(case.batch, 90), rows=min(case.rows, 90)) for case in clear_cases)


@dtypes
@pytest.mark.parametrize("case", CASES + wide_cases, ids=str)
def test_a_program_agrees_with_the_reference(fast_backend: str, case: Case, dtype: Any) -> None:
    """Every mode of inference, the terms and gradients of one batch, and a few training steps."""
    check_inference(program_of(fast_backend, case, dtype), case, dtype)
    case = away_from_kinks(case)
    program = program_of(fast_backend, case, dtype)
    check_gradient(program, case, dtype)
    check_steps(program, case, dtype)


def check_inference(program: Any, case: Case, dtype: Any) -> None:
    data, expected, relative = case.data(dtype), expected_outputs(case), tolerance(case, dtype)
    for mode in inference:
        actual = program.apply(data.X, mode, data.target, data.condition)
        assert actual.dtype == dtype, f"dtype of {mode.name}"
        assert_close(actual, expected[mode], relative, f"{mode.name}")
    actual = program.apply(expected[Mode.ENCODE].astype(dtype), Mode.DECODE, condition=data.condition)
    assert_close(actual, expected[Mode.DECODE], relative, "DECODE")


def check_gradient(program: Any, case: Case, dtype: Any) -> None:
    relative = tolerance(case, dtype)
    terms, gradient = program.gradient(first_rows(case), SEED, STEP)
    expected_terms, expected = expected_gradient(case)
    np.testing.assert_allclose(terms, expected_terms, rtol=relative, err_msg="terms of the loss of one batch")
    assert set(gradient) == set(expected), "names of the gradients"
    largest = max(float(np.abs(g).max()) for g in expected.values())
    for name, g in expected.items():
        # The sum of a bias over the batch may cancel: the size of the whole gradient is the measure there.
        scale = largest / max(float(np.abs(g).max()), 1e-30) if name[0] == "b" else 1.0
        assert_close(gradient[name], g, relative * max(scale, 1.0), f"gradient of {name}")


def check_steps(program: Any, case: Case, dtype: Any) -> None:
    relative = tolerance(case, dtype)
    terms = program.train(*epoch(case))
    expected_terms, expected = expected_epoch(case)
    assert terms.shape == (-(-case.rows // case.batch), len(case.plan.terms)), "one row of terms for each step"
    np.testing.assert_allclose(terms, expected_terms, rtol=relative, err_msg="terms of the training steps")
    state = program.state()
    for name, value in expected.items():
        assert_close(state[name], value, relative, f"{name} after training")


@pytest.mark.parametrize("case", SHAPE_CASES, ids=str)
def test_one_dense_op_keeps_the_textbook_bound(fast_backend: str, case: Case) -> None:
    X, state = case.data().X, case.state()
    activation = case.spec.layers[0].activation
    expected = reference_of(case).apply(X, Mode.ENCODE)
    actual = program_of(fast_backend, case).apply(X.astype(np.float32), Mode.ENCODE)
    bound = dense_bound(X, state["W0"], state["b0"], np.float32) * LIPSCHITZ.get(activation, 1.0)
    assert (np.abs(actual - expected) <= bound).all()


@pytest.mark.parametrize("case", SHAPE_CASES[::3], ids=str)
def test_small_integers_are_exact(backend: str, case: Case) -> None:
    """Products and sums of small integers are exact in float32."""
    rng = np.random.default_rng(0)
    k, n = case.spec.n_features, case.spec.n_components
    plan = lower(network((k, n, k), alpha=0.0), case.batch)
    state = {s.name: rng.integers(-3, 4, (s.rows, s.cols)).astype(np.float32) for s in plan.parameters}
    X = rng.integers(-4, 5, (case.rows, k)).astype(np.float32)
    program = compile_plan(plan, backend, n_threads=2)
    program.load(state)
    code = X @ state["W0"] + state["b0"]
    np.testing.assert_array_equal(program.apply(X, Mode.ENCODE), code)
    np.testing.assert_array_equal(program.apply(X, Mode.RECONSTRUCT), code @ state["W1"] + state["b1"])


@dtypes
@pytest.mark.parametrize("loss", [Loss.BCE, Loss.MULTINOMIAL, Loss.MSE])
def test_extreme_logits(fast_backend: str, loss: Loss, dtype: Any) -> None:
    link = {Loss.BCE: Activation.SIGMOID, Loss.MULTINOMIAL: Activation.SOFTMAX}.get(loss, Activation.TANH)
    plan = lower(network((3, 2, 3), output=link, loss=loss), 4)
    W0, W1 = np.ones((3, 2)), 1e4 * np.ones((2, 1)) * np.array([[1.0, -1.0, 1.0]])
    state = {"W0": W0, "b0": np.zeros((1, 2)), "W1": W1, "b1": np.zeros((1, 3))}
    X = np.array([[0.0, 1.0, 0.5], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0], [1.0, 1.0, 1.0]])
    results = []
    for name, precision in ((fast_backend, dtype), ("reference", np.float64)):
        program = compile_plan(plan, name, precision=precision, n_threads=1)
        program.load({k: v.astype(precision) for k, v in state.items()})
        program.bind(X.astype(precision))
        results.append(program.gradient(np.arange(4)))
    (terms, gradient), (expected_terms, expected) = results
    np.testing.assert_allclose(terms, expected_terms, rtol=1e-5)
    for name, g in expected.items():
        assert_close(gradient[name], g, 1e-5, name)


@dtypes
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_and_infinity_come_through(backend: str, bad: float, dtype: Any) -> None:
    case = next(c for c in MODEL_CASES if c.name == "weighted-bce")
    data = case.data(dtype)
    X = data.X.copy()
    X[2, 3] = bad
    program = program_of(backend, case, dtype, X=X)
    with np.errstate(all="ignore"):
        assert not np.isfinite(program.gradient(np.arange(8))[0]).all()
        scores = program.apply(X, Mode.SCORE)[:, 0]
    np.testing.assert_array_equal(np.flatnonzero(~np.isfinite(scores)), [2])


# --- random numbers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 7, 2**32 + 1, 2**64 - 1])
def test_corruption_masks_are_philox(backend: str, seed: int) -> None:
    """Row r has its values in block r of the columns, so dW0 shows which values were kept."""
    m, width, level = 4, 53, 0.4
    spec = network((m * width, 3, m * width), corruption=Corruption.MASKING, corruption_level=level)
    case = Case("mask", spec, batch=m, rows=m)
    X = np.kron(np.eye(m), np.ones((1, width))).astype(np.float32)
    _, gradient = program_of(backend, case, X=X).gradient(np.arange(m), seed, 11)
    kept = philox.uniform(seed, 0, 11, m, m * width) >= level
    own = np.concatenate([kept[r, r * width : (r + 1) * width] for r in range(m)])
    np.testing.assert_array_equal((gradient["W0"] != 0).all(axis=1), own)
    np.testing.assert_array_equal((gradient["W0"] == 0).all(axis=1), ~own)


@pytest.mark.parametrize("seed", [0, 7, 2**32 + 1, 2**64 - 1])
def test_dropout_masks_are_philox(backend: str, seed: int) -> None:
    spec = network((3, 203, 2, 203, 3), Activation.SIGMOID, dropout=0.3)
    case = Case("dropout", spec, batch=1, rows=1)
    _, gradient = program_of(backend, case).gradient(np.arange(1), seed, 11)
    for stream, name in ((0, "W1"), (1, "W3")):
        kept = philox.uniform(seed, stream, 11, 1, 203)[0] >= 0.3
        np.testing.assert_array_equal((gradient[name] != 0).any(axis=1), kept)


NOISE_WIDTHS = (1, 3, 4, 15, 17, 31, 33, 63, 65, 127, 129, 511, 513, 1029)
"""Numbers of columns below and above what a backend draws at once."""


@dtypes
@pytest.mark.parametrize("kind", Corruption, ids=lambda kind: kind.name)
def test_corruption_is_philox(backend: str, kind: Corruption, dtype: Any) -> None:
    for n in NOISE_WIDTHS:
        check_corruption(backend, n, kind, dtype)


def check_corruption(backend: str, n: int, kind: Corruption, dtype: Any) -> None:
    """One component, and only one row has a weight: dW0 is that corrupted row times a number."""
    m, level = 3, 0.5
    spec = network((n, 1, n), corruption=kind, corruption_level=level, corruption_range=(-1, 2), weighted=True)
    program = program_of(backend, Case("noise", spec, batch=m, rows=m), dtype)
    program.bind(np.full((m, n), float(kind is not Corruption.GAUSSIAN), dtype), weight=np.array([0, 0, 1], dtype))
    actual = program.gradient(np.arange(m), SEED, STEP)[1]["W0"][:, 0].astype(np.float64)
    u = philox.uniform(SEED, 0, STEP, m, n)[2]
    corrupted = {
        Corruption.GAUSSIAN: level * philox.normal(SEED, 0, STEP, m, n)[2],
        Corruption.MASKING: np.where(u < level, 0.0, 1.0),
        Corruption.SALT_AND_PEPPER: np.where(u < level / 2, -1.0, np.where(u < level, 2.0, 1.0)),
    }[kind]
    number = actual @ corrupted / max(corrupted @ corrupted, 1e-30)
    np.testing.assert_allclose(
        actual, number * corrupted, rtol=1e-6 if dtype is np.float32 else 1e-12, err_msg=f"{n} columns"
    )
    assert number != 0 or not corrupted.any(), f"{n} columns"


# --- layouts of the data ----------------------------------------------------------------------------------


def layouts(X: Array, folder: Path) -> dict[str, Array]:
    """The same numbers in other memory layouts."""
    n, k = X.shape
    wide = np.full((2 * n, 3 * k), np.nan, X.dtype)
    wide[::2, 1::3] = X
    frozen = X.copy()
    frozen.flags.writeable = False
    X.tofile(folder / "x.bin")
    shifted = np.frombuffer(bytearray(X.nbytes + 4), X.dtype, offset=4, count=X.size).reshape(X.shape)
    shifted[...] = X
    return {
        "F": np.asfortranarray(X),
        "backwards": X[::-1, ::-1].copy()[::-1, ::-1],
        "slice": wide[::2, 1::3],
        "read-only": frozen,
        "memmap": np.memmap(folder / "x.bin", X.dtype, "r", shape=X.shape),
        "float64": X.astype(np.float64),
        "unaligned by 4": shifted,
    }


@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=["f32", "f64"])
def test_strides_do_not_matter(backend: str, dtype: Any, tmp_path: Path) -> None:
    case = next(c for c in MODEL_CASES if c.name == "tied")
    X = case.data(np.float32).X
    rows, hyper = np.arange(case.rows)[::-1].copy(), Hyper(3, 0, np.full(3, 1e-2))
    expected = program_of(backend, case, dtype, X=X)
    expected.train(rows, hyper)
    for name, other in layouts(X, tmp_path).items():
        program = program_of(backend, case, dtype, X=other)
        program.train(rows, hyper)
        for key, value in expected.state().items():
            np.testing.assert_array_equal(program.state()[key], value, err_msg=f"{name} {key}")
        for mode in inference:
            np.testing.assert_array_equal(program.apply(other, mode), expected.apply(X, mode), err_msg=name)


def test_broadcast_rows(backend: str) -> None:
    case = next(c for c in MODEL_CASES if c.name == "tied")
    X = np.broadcast_to(case.data(np.float32).X[:1], (5, 7))
    program = program_of(backend, case)
    np.testing.assert_array_equal(program.apply(X, Mode.ENCODE), program.apply(X.copy(), Mode.ENCODE))


def test_csr_equals_dense(backend: str) -> None:
    for form, value, index in itertools.product(
        (sp.csr_matrix, sp.csr_array), (np.float32, np.float64), (np.int32, np.int64)
    ):
        check_csr(backend, form, value, index)


def check_csr(backend: str, form: Any, value: Any, index: Any) -> None:
    case = Case("csr", network((33, 9, 33), separate_target=True), batch=8, rows=21)
    rng = np.random.default_rng(2)
    X = (case.data().X * (rng.random((21, 33)) < 0.2)).astype(value)
    X[4] = 0
    target = (case.data().target * (rng.random((21, 33)) < 0.2)).astype(value)
    sparse = []
    for dense in (X, target):
        csr = form(dense)
        csr.indices, csr.indptr = csr.indices.astype(index), csr.indptr.astype(index)
        for part in (csr.data, csr.indices, csr.indptr):
            part.flags.writeable = False
        sparse.append(csr)
    compare_sparse(backend, case, X, target, *sparse)


def test_csr_unsorted_with_duplicates(backend: str) -> None:
    case = Case("csr", network((33, 9, 33), separate_target=True), batch=8, rows=21)
    rng = np.random.default_rng(2)
    indptr = np.arange(22) * 12
    indices = rng.integers(0, 33, 21 * 12)
    data = rng.integers(-8, 9, 21 * 12).astype(np.float32) / 8
    csr = sp.csr_array((data, indices, indptr), (21, 33))
    assert not csr.has_canonical_format
    target = case.data(np.float32).target
    compare_sparse(backend, case, csr.toarray(), target, csr, target)


def compare_sparse(backend: str, case: Case, X: Array, target: Array, sparse_X: Any, sparse_target: Any) -> None:
    rows, hyper = np.arange(21)[::-1].copy(), Hyper(3, 0, np.full(3, 1e-2))
    dense, sparse = (
        program_of(backend, case, X=X, target=target),
        program_of(backend, case, X=sparse_X, target=sparse_target),
    )
    relative = tolerance(case, np.float32)
    assert_close(sparse.train(rows, hyper), dense.train(rows, hyper), relative, "terms")
    for name, value in dense.state().items():
        assert_close(sparse.state()[name], value, 4 * relative, name)
    for mode in inference:
        assert_close(sparse.apply(sparse_X, mode, sparse_target), dense.apply(X, mode, target), relative, str(mode))
