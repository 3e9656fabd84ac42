"""Every backend computes what the float64 reference computes, within stated bounds, for any layout of data.

Bounds. A dense op is held to the textbook bound, element by element (`dense_bound`). A whole model is held to
one unit of rounding for each term on its longest chain of sums (`tolerance`), relative to the largest element
of each array: a layer's error passes through the next multiplied by weights and slopes of about 1, so errors
add up; the largest element stands for |X||W|, which cancellation may leave far above the result.
"""

from __future__ import annotations

import gc
import importlib
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
from numpy.typing import NDArray

from cases import BATCH_CASES, CASES, CPU_PRECISIONS, GRAM_CASES, MODEL_CASES, SHAPE_CASES, SHIFTED_CASES, SPARSE_CASES
from narrows import philox
from narrows.backends import AUTO, BACKENDS, Hyper, compile_plan, probe, probe_all, resolve
from narrows.backends.reference import ReferenceProgram
from narrows.errors import BackendError
from narrows.lowering import lower
from narrows.ops import OpCode
from narrows.plan import Mode
from narrows.spec import Activation, Corruption, Loss, Precision, Solver
from networks import Case, network
from op_cases import OP_CASES
from oracle import SEED, STEP, away_from_kinks

Array = NDArray[Any]
LIPSCHITZ = {Activation.GELU: 1.13, Activation.SILU: 1.1}
"""Largest slopes above 1 of the activations in `SHAPE_CASES`."""

all_cases = pytest.mark.parametrize("case", CASES, ids=str)
# Of the many numbers of conv-pool and conv-stride some always lie next to a kink; small convolutions stand for them.
clear_cases = tuple(case for case in OP_CASES if not case.name.startswith("conv-"))
trained_cases = pytest.mark.parametrize("case", CASES + clear_cases, ids=str)
inference = (Mode.ENCODE, Mode.RECONSTRUCT, Mode.SCORE)


def program_of(backend: str, case: Case, dtype: Any = np.float32, **bound: Any) -> Any:
    program = compile_plan(case.plan, backend, precision=dtype, n_threads=2)
    assert type(program).__module__.split(".")[2] == backend, "another backend ran"
    program.load(case.state(dtype))
    data = case.data(dtype)
    program.bind(bound.get("X", data.X), bound.get("target", data.target), data.weight, data.batch)
    return program


def reference_of(case: Case) -> ReferenceProgram:
    program = ReferenceProgram(case.plan)
    program.load(case.state())
    program.bind(*case.data())
    return program


def tolerance(case: Case, dtype: Any) -> float:
    """Relative to the largest element; see the top of this file. In float64 a round 1e-9."""
    if np.dtype(dtype) == np.float64:
        return 1e-9
    chain = sum(layer.n_in + 8 for layer in case.spec.layers) + case.batch
    # The derivatives on noisy input differ from those on the input by about the noise, and their rounding errors do not
    # shrink with the difference.
    cancellation = 1 / case.spec.hessian_std if case.spec.contractive_hessian > 0 else 1.0
    return chain * cancellation * float(np.finfo(np.float32).eps) / 2


def assert_close(actual: Array, expected: Array, relative: float, what: str = "") -> None:
    assert actual.shape == expected.shape, what
    scale = float(np.abs(expected).max(initial=0.0))
    error = float(np.abs(actual.astype(np.float64) - expected).max(initial=0.0))
    assert error <= relative * scale + 1e-30, f"{what}: {error:.3g} off, allowed {relative * scale:.3g}"


def dense_bound(x: Array, W: Array, b: Array, dtype: Any) -> Array:
    """|y - y64| <= (k + 8) u (|x||W| + |b|) for y = x W + b, sums of k terms in any order."""
    return (x.shape[1] + 8) * np.finfo(dtype).eps / 2 * (np.abs(x) @ np.abs(W) + np.abs(b))


dtypes = pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=["f32", "f64"])


# --- against the reference --------------------------------------------------------------------------------


@dtypes
@all_cases
def test_inference_agrees(backend: str, case: Case, dtype: Any) -> None:
    program, reference, data = program_of(backend, case, dtype), reference_of(case), case.data(dtype)
    exact = case.data()
    for mode in inference:
        expected = reference.apply(exact.X, mode, exact.target, exact.batch)
        actual = program.apply(data.X, mode, data.target, data.batch)
        assert actual.dtype == (np.float64 if backend == "reference" else dtype)
        assert_close(actual, expected, tolerance(case, dtype), mode.name or "")
    codes = reference.apply(exact.X, Mode.ENCODE)
    assert_close(
        program.apply(codes.astype(dtype), Mode.DECODE, batch=data.batch),
        reference.apply(codes, Mode.DECODE, batch=exact.batch),
        tolerance(case, dtype),
        "DECODE",
    )


@dtypes
@trained_cases
def test_terms_and_gradients_agree(backend: str, case: Case, dtype: Any) -> None:
    case = away_from_kinks(case)
    program, reference = program_of(backend, case, dtype), reference_of(case)
    rows = np.arange(min(case.batch, case.rows))[::-1].copy()
    terms, gradient = program.gradient(rows, SEED, STEP)
    expected_terms, expected = reference.gradient(rows, SEED, STEP)
    np.testing.assert_allclose(terms, expected_terms, rtol=tolerance(case, dtype))
    assert set(gradient) == set(expected)
    largest = max(float(np.abs(g).max()) for g in expected.values())
    for name, g in expected.items():
        # Biases sum over the batch what may cancel: the size of the whole gradient is the measure there.
        scale = largest / max(float(np.abs(g).max()), 1e-30) if name[0] == "b" else 1.0
        assert_close(gradient[name], g, tolerance(case, dtype) * max(scale, 1.0), f"d{name}")


@dtypes
@trained_cases
def test_a_few_steps_agree(backend: str, case: Case, dtype: Any) -> None:
    case = away_from_kinks(case)
    program, reference = program_of(backend, case, dtype), reference_of(case)
    rows = np.random.default_rng(1).permutation(case.rows)
    hyper = Hyper(SEED, STEP, np.linspace(2e-3, 1e-3, -(-case.rows // case.batch)))
    terms, expected_terms = program.train(rows, hyper), reference.train(rows, hyper)
    assert terms.shape == (len(hyper.learning_rate), len(case.plan.terms))
    np.testing.assert_allclose(terms, expected_terms, rtol=tolerance(case, dtype))
    state = program.state()
    for name, value in reference.state().items():
        if "." not in name:
            assert_close(state[name], value, tolerance(case, dtype), name)


@pytest.mark.parametrize("case", SHAPE_CASES, ids=str)
def test_one_dense_op_keeps_the_textbook_bound(backend: str, case: Case) -> None:
    X, state = case.data().X, case.state()
    activation = case.spec.layers[0].activation
    expected = reference_of(case).apply(X, Mode.ENCODE)
    actual = program_of(backend, case).apply(X.astype(np.float32), Mode.ENCODE)
    bound = dense_bound(X, state["W0"], state["b0"], np.float32) * LIPSCHITZ.get(activation, 1.0)
    assert (np.abs(actual - expected) <= bound).all()


@pytest.mark.parametrize("case", SHAPE_CASES[::3], ids=str)
def test_small_integers_are_exact(backend: str, case: Case) -> None:
    """Products and sums that float32 holds exactly leave no room for error."""
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
def test_extreme_logits(backend: str, loss: Loss, dtype: Any) -> None:
    link = {Loss.BCE: Activation.SIGMOID, Loss.MULTINOMIAL: Activation.SOFTMAX}.get(loss, Activation.TANH)
    plan = lower(network((3, 2, 3), output=link, loss=loss), 4)
    W0, W1 = np.ones((3, 2)), 1e4 * np.ones((2, 1)) * np.array([[1.0, -1.0, 1.0]])
    state = {"W0": W0, "b0": np.zeros((1, 2)), "W1": W1, "b1": np.zeros((1, 3))}
    X = np.array([[0.0, 1.0, 0.5], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0], [1.0, 1.0, 1.0]])
    results = []
    for name, precision in ((backend, dtype), ("reference", np.float64)):
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
    """Row r has its values in block r of the columns, so that dW0 shows which of them were kept."""
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
"""Columns on both sides of what a backend may draw at once."""


@dtypes
@pytest.mark.parametrize("kind", Corruption, ids=lambda kind: kind.name)
@pytest.mark.parametrize("n", NOISE_WIDTHS)
def test_corruption_is_philox(backend: str, n: int, kind: Corruption, dtype: Any) -> None:
    """One component and one row that counts: dW0 is that row, corrupted, times a number."""
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
    np.testing.assert_allclose(actual, number * corrupted, rtol=1e-6 if dtype is np.float32 else 1e-12)
    assert number != 0 or not corrupted.any()


# --- layouts of the data ----------------------------------------------------------------------------------


def layouts(X: Array, folder: Path) -> dict[str, Array]:
    """The same numbers in other clothes."""
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


@pytest.mark.parametrize("index", [np.int32, np.int64])
@pytest.mark.parametrize("value", [np.float32, np.float64])
@pytest.mark.parametrize("form", [sp.csr_matrix, sp.csr_array])
def test_csr_equals_dense(backend: str, form: Any, value: Any, index: Any) -> None:
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


# --- the protocol -----------------------------------------------------------------------------------------

step_case = next(c for c in MODEL_CASES if c.name == "penalty-all")


def assert_same_state(a: Any, b: Any) -> None:
    one, two = a.state(), b.state()
    assert set(one) == set(two)
    for name, value in one.items():
        assert value.tobytes() == two[name].tobytes(), name


@pytest.mark.parametrize("solver", Solver)
def test_two_steps_in_two_calls_are_two_steps_in_one(backend: str, solver: Solver) -> None:
    spec = network((33, 9, 33), solver=solver, alpha=0.1, corruption=Corruption.GAUSSIAN, corruption_level=0.1)
    case = Case("calls", spec, batch=8, rows=16)
    one, two = program_of(backend, case), program_of(backend, case)
    rows, rates = np.arange(16), np.array([1e-2, 3e-3])
    together = one.train(rows, Hyper(9, 5, rates))
    apart = [two.train(rows[8 * i : 8 * i + 8], Hyper(9, 5 + i, rates[i : i + 1])) for i in range(2)]
    np.testing.assert_array_equal(together, np.concatenate(apart))
    assert_same_state(one, two)


def test_the_same_call_gives_the_same_bits(backend: str) -> None:
    programs = [program_of(backend, step_case) for _ in range(2)]
    for program in programs:
        program.train(np.arange(step_case.rows), Hyper(1, 2, np.full(3, 1e-2)))
    assert_same_state(*programs)


@dtypes
def test_state_round_trip(backend: str, dtype: Any) -> None:
    rows, hyper = np.arange(step_case.rows), Hyper(1, 0, np.full(3, 1e-2))
    first, second = program_of(backend, step_case, dtype), program_of(backend, step_case, dtype)
    first.train(rows, hyper)
    saved = first.state()
    copies = {name: value.copy() for name, value in saved.items()}
    second.train(rows[::-1].copy(), hyper)
    second.load(saved)
    assert_same_state(first, second)
    for program in (first, second):
        program.train(rows, Hyper(1, 3, hyper.learning_rate))
    assert_same_state(first, second)
    for name, value in saved.items():
        assert value.tobytes() == copies[name].tobytes(), "state() must be copies"
    # Parameters alone: the optimiser starts afresh.
    second.load({name: value for name, value in saved.items() if "." not in name})
    assert all(not value.any() for name, value in second.state().items() if "." in name)


def test_memory_is_zeroed_for_an_optimiser_that_starts_afresh(backend: str) -> None:
    program = compile_plan(step_case.plan, backend)
    data = step_case.data(np.float32)
    program.bind(data.X, data.target, data.weight)
    program.train(np.arange(step_case.rows), Hyper(1, 0, np.full(3, 1e-2)))  # before anything is loaded
    program.load(step_case.state())
    assert all(not value.any() for name, value in program.state().items() if "." in name)


@dtypes
def test_views_are_the_memory_itself(backend: str, dtype: Any) -> None:
    program = program_of(backend, step_case, dtype)
    views = program.views()
    program.train(np.arange(step_case.rows), Hyper(1, 0, np.full(3, 1e-2)))
    if backend == "cuda":
        views = program.views()  # what is on a device is copied when it is asked for
    state = program.state()
    assert views.keys() == state.keys()
    for name, value in state.items():
        assert views[name].tobytes() == value.tobytes()
        assert not np.shares_memory(views[name], value)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_finite_sees_every_element(backend: str, value: float) -> None:
    program = program_of(backend, step_case)
    assert program.finite()
    state = program.state()
    for array in state.values():
        for at in ((0, 0), (-1, -1)):
            kept, array[at] = array[at].copy(), value
            program.load(state)
            assert not program.finite()
            array[at] = kept
    # A sum of finite values may overflow, or two infinities cancel.
    W = state["W0"]
    W[:] = np.finfo(W.dtype).max
    program.load(state)
    assert program.finite()
    W[0, :2] = np.inf, -np.inf
    program.load(state)
    assert not program.finite()


@pytest.mark.parametrize("batch", [8, 4096])
def test_what_is_handed_over_lives_on(backend: str, batch: int) -> None:
    """Without the data, and without a working area that outweighs it."""
    case = Case("hand over", network((130, 33, 130)), batch=batch, rows=16)
    program = program_of(backend, case)
    X = case.data(np.float32).X
    data = weakref.ref(X)
    program.bind(X)
    program.train(np.arange(16), Hyper(1, 0, np.full(2, 1e-2)))
    expected, address = program.state(), program.views()["W0"].ctypes.data
    state = program.hand_over()
    del program, X
    gc.collect()
    assert data() is None
    assert state.keys() == expected.keys()
    for name, value in expected.items():
        assert state[name].tobytes() == value.tobytes()
    if backend == "cpp":
        assert (state["W0"].ctypes.data == address) == (batch == 8)


def test_inference_leaves_the_state_alone(backend: str) -> None:
    program, untouched = program_of(backend, step_case), program_of(backend, step_case)
    for mode in inference:
        program.apply(step_case.data(np.float32).X, mode)
    program.gradient(np.arange(5), SEED, STEP)
    assert_same_state(program, untouched)


# Steps enough for a second on any backend, so that a poll falls between two of them.
long_case = Case("long", network((64, 64, 64)), batch=32, rows=32)
long_run = np.tile(np.arange(32), 50_000), Hyper(1, 0, np.full(50_000, 1e-5))


def test_poll_stops_after_a_whole_step(backend: str) -> None:
    program, again = program_of(backend, long_case), program_of(backend, long_case)
    rows, hyper = long_run
    done = len(program.train(rows, hyper, lambda: True))
    assert 1 <= done < len(hyper.learning_rate)
    assert len(again.train(rows[: 32 * done], hyper, lambda: False)) == done
    assert_same_state(program, again)


def test_what_poll_raises_comes_out(backend: str) -> None:
    def interrupt() -> bool:
        raise KeyboardInterrupt

    program = program_of(backend, long_case)
    with pytest.raises(KeyboardInterrupt):
        program.train(*long_run, interrupt)
    assert all(np.isfinite(value).all() for value in program.state().values())


def test_learning_rates_are_per_step(backend: str) -> None:
    case = Case("rates", network((7, 4, 7), solver=Solver.SGD, momentum=0.0), batch=8, rows=16)
    program = program_of(backend, case)
    start = program.state()
    program.train(np.arange(16), Hyper(1, 0, np.zeros(2)))
    for name, value in program.state().items():
        np.testing.assert_array_equal(value, start[name])
    _, gradient = program.gradient(np.arange(8, 16))
    program.train(np.arange(16), Hyper(1, 0, np.array([0.0, 0.5])))
    moved = program.state()
    for name, g in gradient.items():
        np.testing.assert_allclose(moved[name], start[name] - 0.5 * g, rtol=1e-5, atol=1e-6)


def test_clipping(backend: str) -> None:
    spec = network((130, 33, 130), solver=Solver.SGD, momentum=0.0, clip_norm=0.25)
    case = Case("clip", spec, batch=8, rows=8)
    program = program_of(backend, case)
    start = program.state()
    program.train(np.arange(8), Hyper(1, 0, np.array([1.0])))
    moved = program.state()
    square = sum(np.square(moved[name].astype(float) - start[name]).sum() for name in start if "." not in name)
    assert np.sqrt(square) == pytest.approx(0.25, rel=1e-4)


def test_rows_select_and_repeat(backend: str) -> None:
    case = Case("rows", network((7, 4, 7)), batch=8, rows=21)
    X = case.data(np.float32).X
    rows = np.array([20, 3, 3, 0, 7])
    selected = program_of(backend, case).gradient(rows)
    taken = program_of(backend, case, X=X[rows]).gradient(np.arange(5))
    np.testing.assert_array_equal(selected[0], taken[0])
    for name, g in taken[1].items():
        np.testing.assert_array_equal(selected[1][name], g)


@pytest.mark.parametrize("n", [0, 1, 7, 8, 9, 21])
def test_apply_takes_any_number_of_rows(backend: str, n: int) -> None:
    case = Case("any", network((7, 4, 7)), batch=8, rows=21)
    program, X = program_of(backend, case), case.data(np.float32).X
    whole = program.apply(X, Mode.ENCODE)
    part = program.apply(X[:n], Mode.ENCODE)
    assert part.shape == (n, 4)
    np.testing.assert_allclose(part, whole[:n], rtol=1e-5, atol=1e-6)


def test_own_ops_are_op_codes(backend: str) -> None:
    if backend == "reference":
        pytest.skip("the reference is the generic ops")
    own = importlib.import_module(f"narrows.backends.{backend}").own_ops()
    assert {OpCode.DENSE, OpCode.LOSS, OpCode.UPDATE} <= own <= set(OpCode)


def test_resolution(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NARROWS_BACKEND", raising=False)
    assert resolve("auto") == next(name for name in AUTO if probe(name).ok)
    assert resolve("reference") == "reference"
    monkeypatch.setenv("NARROWS_BACKEND", "numba")
    assert resolve("auto") == "numba"
    assert resolve("reference") == "reference"
    monkeypatch.setenv("NARROWS_BACKEND", "abacus")
    with pytest.raises(ValueError, match="NARROWS_BACKEND='abacus'"):
        resolve("auto")
    with pytest.raises(ValueError, match="backend='abacus'"):
        resolve("abacus")
    assert list(probe_all()) == list(BACKENDS)


def test_a_backend_that_cannot_run_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    from narrows.backends import Probe, numba

    monkeypatch.setattr(numba, "probe", lambda: Probe(False, "no such luck"))
    with pytest.raises(BackendError, match="no such luck"):
        resolve("numba")


def test_what_is_no_number_of_a_batch_is_refused(backend: str) -> None:
    case = Case("numbers", network((7, 4, 7), n_batches=3), batch=8, rows=21)
    program, data = program_of(backend, case), case.data(np.float32)
    for value in (3.0, -1.0, 0.5, np.nan):
        batch = data.batch.copy()
        batch[5] = value
        with pytest.raises(ValueError, match="is no number of one of 3 batches"):
            program.apply(data.X, Mode.RECONSTRUCT, batch=batch)
    with pytest.raises((ValueError, TypeError)):
        program.apply(data.X, Mode.RECONSTRUCT)
    found = program.apply(data.X, Mode.RECONSTRUCT, batch=data.batch[:, 0].astype(np.float64))
    np.testing.assert_array_equal(found, program.apply(data.X, Mode.RECONSTRUCT, batch=data.batch))


def test_the_one_batch_of_a_decoder_is_another_bias(backend: str) -> None:
    case = Case("bias", network((7, 4, 7), n_batches=1), batch=8, rows=21)
    program, data, state = program_of(backend, case, np.float64), case.data(), case.state()
    assert state["W1"].shape == (5, 7)
    codes = program.apply(data.X, Mode.ENCODE)
    found = program.apply(codes, Mode.DECODE, batch=data.batch)
    np.testing.assert_allclose(found, codes @ state["W1"][:4] + state["W1"][4] + state["b1"], rtol=1e-12)


def test_numba_rejects_rows_outside_sparse_data() -> None:
    case = Case("rows", network((7, 4, 7)))
    program = program_of("numba", case, X=sp.csr_array(case.data(np.float32).X))
    for rows in ([21], [-1], [0, 5, 100]):
        with pytest.raises(IndexError, match="21 rows"):
            program.gradient(np.array(rows))


# --- cpp: promises of its own -----------------------------------------------------------------------------


def bits(case: Case, *, dtype: Any = np.float32, n_threads: int = 1, **options: Any) -> bytes:
    """Everything a program computes, in bytes."""
    from narrows.backends import cpp as module

    precision = Precision.of(dtype)
    program = module.compile(case.plan, precision=precision, n_threads=n_threads, **options)
    program.load(case.state(precision.dtype))
    data = case.data(precision.dtype)
    program.bind(*data)
    steps = -(-case.rows // case.batch)
    terms = program.train(np.arange(case.rows), Hyper(SEED, STEP, np.full(steps, 1e-2)))
    parts = [terms, *program.state().values()]
    parts += [program.apply(data.X, mode, data.target, data.batch) for mode in inference]
    return b"".join(np.ascontiguousarray(part).tobytes() for part in parts)


@all_cases
def test_cpp_bits_do_not_depend_on_threads(cpp: str, case: Case) -> None:
    expected = bits(case)
    for n in (2, 3):
        assert bits(case, n_threads=n) == expected, f"{n} threads"
    for n in (2, 5, 64):
        assert bits(case, simulate_threads=n) == expected, f"{n} simulated threads"


@pytest.mark.parametrize("dtype", CPU_PRECISIONS, ids=str)
def test_cpp_bits_for_any_simulated_team(cpp: str, dtype: Any) -> None:
    # The input gradient of a layer of 150 is computed in either of two ways, by the rows of a thread.
    spec = network(
        (200, 150, 17, 150, 200),
        Activation.GELU,
        dropout=0.2,
        clip_norm=0.5,
        alpha=0.1,
        weighted=True,
        activity_l1=0.1,
    )
    case = Case("team", spec, batch=70, rows=150)
    expected = bits(case, dtype=dtype)
    for n in range(1, 65):
        assert bits(case, dtype=dtype, simulate_threads=n) == expected, f"{n} simulated threads"


@pytest.mark.parametrize("dtype", CPU_PRECISIONS, ids=str)
def test_cpp_bits_of_a_layer_larger_than_an_image_of_it(cpp: str, dtype: Any) -> None:
    """An input gradient that is turned where one thread has the rows, and is not where five share them."""
    case = Case("wide", network((900, 300, 17, 300, 900), Activation.GELU), batch=70, rows=150)
    expected = bits(case, dtype=dtype)
    for n in (2, 5):
        assert bits(case, dtype=dtype, simulate_threads=n) == expected, f"{n} simulated threads"


@pytest.mark.parametrize("precision", CPU_PRECISIONS, ids=str)
def test_cpp_cuts_are_tuned_without_a_bit(cpp: str, precision: Precision) -> None:
    from narrows.backends import cpp as module

    spec = network((120, 90, 11, 90, 120), Activation.GELU, dropout=0.2, alpha=0.1, epsilon=1.1e-6)
    case = Case("tuned", spec, batch=40, rows=100)
    data, hyper = case.data(precision.dtype), Hyper(SEED, STEP, np.full(30, 1e-2))
    rows = np.arange(30 * case.batch) % case.rows

    def trained(n_threads: int, *, tune: bool) -> tuple[list[bytes], Any]:
        program = module.compile(case.plan, precision=precision, n_threads=n_threads, tune=tune)
        program.load(case.state(precision.dtype))
        program.bind(*data)
        begins = program.blocking
        terms = program.train(rows, hyper)
        return [terms.tobytes(), *(array.tobytes() for array in program.state().values())], (begins, program.blocking)

    expected, (_, untuned) = trained(1, tune=False)
    assert untuned.tuned  # nothing to find
    for n in (1, 2, 3):
        bits, (begins, ends) = trained(n, tune=True)
        assert bits == expected, f"{n} threads"
        assert not begins.tuned
        assert ends.tuned
        again, (known, _) = trained(n, tune=True)
        assert known == ends
        assert again == expected


@pytest.mark.parametrize(
    "case",
    [*MODEL_CASES[::4], *SHAPE_CASES, *SPARSE_CASES, *GRAM_CASES, *SHIFTED_CASES, *BATCH_CASES],
    ids=str,
)
def test_rows_do_not_depend_on_their_neighbours(backend: str, case: Case) -> None:
    if backend == "reference":
        pytest.skip("the reference is NumPy, which makes no such promise")
    data = case.data(np.float32)
    program = program_of(backend, case)
    single = Case(case.name, case.spec, batch=1, rows=case.rows)
    for mode in inference:
        whole = program.apply(data.X, mode, data.target, data.batch)
        one_by_one = program_of(backend, single).apply(data.X, mode, data.target, data.batch)
        assert whole.tobytes() == one_by_one.tobytes(), mode
        i = case.rows // 2
        target, batch = (None if part is None else part[i : i + 1] for part in (data.target, data.batch))
        assert program.apply(data.X[i : i + 1], mode, target, batch).tobytes() == whole[i : i + 1].tobytes(), mode
