"""Sparse rows on the native backend: the bits of dense ones, for any number of threads; the squared error in Gram form
as accurate as documented; rows that cannot be walked are refused.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from cases import GRAM_CASES, SHIFTED_CASES, SPARSE_CASES
from narrows.backends import Hyper
from narrows.backends.cpp import CppProgram
from narrows.backends.reference import ReferenceProgram
from narrows.plan.lowering import lower
from narrows.plan.plan import Mode
from narrows.plan.spec import Precision
from networks import Case, changed, network

pytestmark = pytest.mark.usefixtures("cpp")


# --- sparse input ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", [Precision.FLOAT32, Precision.FLOAT64], ids=str)
@pytest.mark.parametrize("case", SPARSE_CASES, ids=str)
def test_sparse_rows_train_to_the_bits_of_dense_ones(case: Case, precision: Precision) -> None:
    dense = dataclasses.replace(case, spec=changed(case.spec, sparse_input=False))
    data = case.data(precision.dtype)
    rows, rates = np.arange(case.rows)[::-1].copy(), np.full(-(-case.rows // case.batch), 1e-2)
    found = []
    for which, threads in ((dense, 1), (case, 1), (case, 3), (case, 64)):
        program = CppProgram(which.plan, precision, threads, threads)
        program.load(case.state(precision.dtype))
        program.bind(*data)
        terms = program.train(rows, Hyper(7, 2, rates))
        found.append(program.state() | {"terms": terms, "codes": program.apply(data.X, Mode.ENCODE)})
    for other in found[1:]:
        for name, value in found[0].items():
            np.testing.assert_array_equal(other[name], value, err_msg=name)


@pytest.mark.parametrize("case", SPARSE_CASES + GRAM_CASES + SHIFTED_CASES, ids=str)
def test_bits_of_sparse_rows_for_any_number_of_threads(case: Case) -> None:
    rows, rates = np.arange(case.rows), np.full(-(-case.rows // case.batch), 1e-2)

    def bits(threads: int, simulated: int) -> list[bytes]:
        program = CppProgram(case.plan, Precision.BFLOAT16, threads, simulated)
        program.load(case.state(np.float32))
        program.bind(*case.data(np.float32))
        terms = program.train(rows, Hyper(7, 2, rates))
        return [terms.tobytes(), *(a.tobytes() for a in program.state().values())]

    expected = bits(1, 0)
    for threads, simulated in ((2, 0), (3, 0), (1, 2), (1, 7), (1, 64)):
        assert bits(threads, simulated) == expected, (threads, simulated)


def test_a_sparse_layer_refuses_rows_it_cannot_walk() -> None:
    case = next(c for c in SPARSE_CASES if c.name == "sparse-plain-3")
    program = CppProgram(case.plan, Precision.FLOAT32, 1)._program
    values = np.ones(3, np.float32)
    with pytest.raises(ValueError, match="source 0 is dense, the plan expects CSR"):
        program.bind_dense(0, 0, np.zeros((4, 23), np.float32))
    for columns in ([1, 5, 5], [1, 5, 2]):
        with pytest.raises(ValueError, match="columns of row 1 do not increase"):
            program.bind_csr(0, 0, np.array([0, 0, 3], np.int32), np.array(columns, np.int32), values, 23)
    with pytest.raises(ValueError, match="has 22 columns, the plan expects 23"):
        program.bind_csr(0, 0, np.array([0, 0, 3], np.int32), np.array([1, 5, 6], np.int32), values, 22)
    with pytest.raises(ValueError, match="source 0 is not bound"):
        program.gradient(np.arange(2), 0, 0)


# --- squared error in Gram form -------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", [0.5, 1e-1, 1e-2, 2e-3, 5e-4, 1e-4, 1e-6])
@pytest.mark.parametrize("inner", [32, 128])
def test_the_gram_form_is_as_accurate_as_documented(inner: int, part: float) -> None:
    """Where the residuals are a `part` of |y|^2: a row's loss to 5e-7 |y|^2 and, below the guard, as the dense form's;
    gradients to 5e-6 |y| / |residual|. Rows that are all stored are the hardest: nothing of their sums is left out."""
    rng, batch, n_outputs = np.random.default_rng(0), 64, 4000
    spec = network((20, inner, n_outputs), separate_target=True, gram_decoder=True)
    state = {
        "W0": rng.normal(size=(20, inner)) / 4,
        "b0": rng.normal(size=(1, inner)),
        "W1": rng.normal(size=(inner, n_outputs)) / np.sqrt(inner),
        "b1": rng.normal(size=(1, n_outputs)),
    }
    state = {name: values.astype(np.float32) for name, values in state.items()}
    X = rng.normal(size=(batch, 20)).astype(np.float32)
    y = (X @ state["W0"].astype(np.float64) + state["b0"]) @ state["W1"] + state["b1"]
    noise = rng.normal(size=y.shape)
    y = (y + noise * np.sqrt(part * (y**2).sum() / (noise**2).sum())).astype(np.float32)

    reference = ReferenceProgram(lower(changed(spec, gram_decoder=False), batch))
    program = CppProgram(lower(spec, batch), Precision.FLOAT32, 2)
    wide = X.astype(np.float64), y.astype(np.float64)
    for p, data in ((reference, wide), (program, (X, y))):
        p.load(state)
        p.bind(*data)
    rows = np.arange(batch)
    (expected_terms, expected), (terms, gradient) = reference.gradient(rows), program.gradient(rows)
    square = (wide[1] ** 2).sum(axis=1)
    loss = reference.apply(wide[0], Mode.SCORE, wide[1])[:, 0]
    error = np.abs(program.apply(X, Mode.SCORE, y)[:, 0] - loss)
    assert (error <= 5e-7 * square).all()
    assert (error[loss < 0.9e-3 * square] <= 3e-5 * loss[loss < 0.9e-3 * square]).all()
    assert abs(terms[0] - expected_terms[0]) <= 5e-7 * square.mean()
    for name, g in expected.items():
        allowed = 5e-6 * np.sqrt(square.sum() / loss.sum())
        assert np.linalg.norm(gradient[name] - g) <= allowed * np.linalg.norm(g), name


def test_a_decoder_in_gram_form_refuses_rows_it_cannot_walk() -> None:
    case = next(c for c in GRAM_CASES if c.name == "gram-target-3")
    program = CppProgram(case.plan, Precision.FLOAT32, 1)._program
    with pytest.raises(ValueError, match="source 1 is dense, the plan expects CSR"):
        program.bind_dense(0, 1, np.zeros((4, 23), np.float32))
    with pytest.raises(ValueError, match="columns of row 1 do not increase"):
        program.bind_csr(0, 1, np.array([0, 0, 2], np.int32), np.array([5, 2], np.int32), np.ones(2, np.float32), 23)
