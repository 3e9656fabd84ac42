"""Results that are equal bit by bit: with any number of threads (C++), and for a row alone or among other rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from agreement import all_cases, bits, inference, program_of
from cases import BATCH_CASES, CPU_PRECISIONS, GRAM_CASES, MODEL_CASES, SHAPE_CASES, SHIFTED_CASES, SPARSE_CASES
from narrows.backends import Hyper
from narrows.plan.spec import Activation, Precision
from networks import Case, network
from oracle import SEED, STEP


@all_cases
def test_cpp_bits_do_not_depend_on_threads(cpp: str, case: Case) -> None:
    expected = bits(case)
    for n in (2, 3):
        assert bits(case, n_threads=n) == expected, f"{n} threads"
    for n in (2, 5, 64):
        assert bits(case, simulate_threads=n) == expected, f"{n} simulated threads"


@pytest.mark.parametrize("dtype", CPU_PRECISIONS, ids=str)
def test_cpp_bits_for_any_simulated_team(cpp: str, dtype: Any) -> None:
    # The input gradient of a layer of 150 is computed in one of two ways, depending on the rows of a thread.
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
    """The input gradient is a transposed product with one thread, and a plain one with five."""
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
def test_rows_do_not_depend_on_their_neighbours(fast_backend: str, case: Case) -> None:
    """The reference is NumPy, which makes no such promise."""
    data = case.data(np.float32)
    program = program_of(fast_backend, case)
    single = Case(case.name, case.spec, batch=1, rows=case.rows)
    for mode in inference:
        whole = program.apply(data.X, mode, data.target, data.condition)
        one_by_one = program_of(fast_backend, single).apply(data.X, mode, data.target, data.condition)
        assert whole.tobytes() == one_by_one.tobytes(), mode
        i = case.rows // 2
        target, batch = (None if part is None else part[i : i + 1] for part in (data.target, data.condition))
        assert program.apply(data.X[i : i + 1], mode, target, batch).tobytes() == whole[i : i + 1].tobytes(), mode
