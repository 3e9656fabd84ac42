"""The protocol of programs, on every backend: state, steps, polls, rows and rates; and which backend is taken."""

from __future__ import annotations

import gc
import importlib
import itertools
import weakref
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp

from agreement import dtypes, inference, program_of
from cases import MODEL_CASES
from narrows.backends import AUTO, BACKENDS, Hyper, compile_plan, probe, probe_all, resolve
from narrows.errors import BackendError
from narrows.plan.ops import OpCode
from narrows.plan.plan import Mode
from narrows.plan.spec import Corruption, Solver
from networks import Case, network
from oracle import SEED, STEP

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


def test_finite_sees_every_element(backend: str) -> None:
    program = program_of(backend, step_case)
    assert program.finite()
    state = program.state()
    for name, array in state.items():
        for at, value in itertools.product(((0, 0), (-1, -1)), (np.nan, np.inf, -np.inf)):
            kept, array[at] = array[at].copy(), value
            program.load(state)
            assert not program.finite(), f"{value} at {at} of {name}"
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


def test_apply_takes_any_number_of_rows(backend: str) -> None:
    case = Case("any", network((7, 4, 7)), batch=8, rows=21)
    program, X = program_of(backend, case), case.data(np.float32).X
    whole = program.apply(X, Mode.ENCODE)
    for n in (0, 1, 7, 8, 9, 21):
        part = program.apply(X[:n], Mode.ENCODE)
        assert part.shape == (n, 4)
        np.testing.assert_allclose(part, whole[:n], rtol=1e-5, atol=1e-6, err_msg=f"{n} rows")


def test_what_is_no_number_of_a_batch_is_refused(backend: str) -> None:
    case = Case("numbers", network((7, 4, 7), n_conditions=3), batch=8, rows=21)
    program, data = program_of(backend, case), case.data(np.float32)
    for value in (3.0, -1.0, 0.5, np.nan):
        batch = data.condition.copy()
        batch[5] = value
        with pytest.raises(ValueError, match=r"batch number .* is outside 0\.\.2"):
            program.apply(data.X, Mode.RECONSTRUCT, condition=batch)
    with pytest.raises((ValueError, TypeError)):
        program.apply(data.X, Mode.RECONSTRUCT)
    found = program.apply(data.X, Mode.RECONSTRUCT, condition=data.condition[:, 0].astype(np.float64))
    np.testing.assert_array_equal(found, program.apply(data.X, Mode.RECONSTRUCT, condition=data.condition))


def test_the_one_batch_of_a_decoder_is_another_bias(backend: str) -> None:
    case = Case("bias", network((7, 4, 7), n_conditions=1), batch=8, rows=21)
    program, data, state = program_of(backend, case, np.float64), case.data(), case.state()
    assert state["W1"].shape == (5, 7)
    codes = program.apply(data.X, Mode.ENCODE)
    found = program.apply(codes, Mode.DECODE, condition=data.condition)
    np.testing.assert_allclose(found, codes @ state["W1"][:4] + state["W1"][4] + state["b1"], rtol=1e-12)


def test_numba_rejects_rows_outside_sparse_data() -> None:
    case = Case("rows", network((7, 4, 7)))
    program = program_of("numba", case, X=sp.csr_array(case.data(np.float32).X))
    for rows in ([21], [-1], [0, 5, 100]):
        with pytest.raises(IndexError, match="21 rows"):
            program.gradient(np.array(rows))


# --- which backend is taken ----------------------------------------------------------------------------


def test_own_ops_are_op_codes(fast_backend: str) -> None:
    own = importlib.import_module(f"narrows.backends.{fast_backend}").own_ops()
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
