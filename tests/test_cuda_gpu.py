"""The CUDA backend on a GPU: what `test_cuda_host` asks of it, and that it does not vary; skipped where none is."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cases import CASES, MODEL_CASES, OP_CASES, Case
from cuda_device import check_agreement, program_on
from narrows.backends import Hyper, cuda
from narrows.backends.cuda import data
from narrows.backends.cuda.device import CupyDevice
from narrows.backends.cuda.table import KERNELS
from narrows.plan import Precision
from oracle import SEED, STEP, away_from_kinks
from test_backends import clear_cases, dtypes, inference

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def device() -> Any:
    found = cuda.probe()
    if not found.ok:
        pytest.skip(found.reason)
    device = CupyDevice()
    for precision in Precision:
        # At once: by the way, each new case would have the compiler read all the sources again.
        device._functions(KERNELS, precision)
    return device


@dtypes
@pytest.mark.parametrize("case", CASES + clear_cases, ids=str)
def test_programs_agree_with_the_reference(device: Any, case: Case, dtype: Any) -> None:
    case = away_from_kinks(case)
    program = program_on(device, case, dtype)
    check_agreement(program, case, dtype)
    program.close()


def bits(device: Any, case: Case) -> list[bytes]:
    program = program_on(device, case)
    steps = -(-case.rows // case.batch)
    terms = program.train(np.arange(case.rows), Hyper(SEED, STEP, np.full(steps, 1e-3)))
    parts = [terms, *program.state().values()]
    data = case.data(np.float32)
    parts += [program.apply(data.X, mode, data.target, data.batch) for mode in inference]
    program.close()
    return [np.ascontiguousarray(part).tobytes() for part in parts]


@pytest.mark.parametrize("case", [*MODEL_CASES[::4], *OP_CASES], ids=str)
def test_the_same_bits_from_run_to_run(device: Any, case: Case) -> None:
    assert bits(device, case) == bits(device, case)


@pytest.mark.parametrize("case", MODEL_CASES[::8], ids=str)
def test_rows_do_not_depend_on_their_neighbours(device: Any, case: Case) -> None:
    data, single = case.data(np.float32), Case(case.name, case.spec, batch=1, rows=case.rows)
    for mode in inference:
        whole = program_on(device, case).apply(data.X, mode, data.target, data.batch)
        one_by_one = program_on(device, single).apply(data.X, mode, data.target, data.batch)
        assert whole.tobytes() == one_by_one.tobytes(), mode


@pytest.mark.parametrize("case", OP_CASES, ids=str)
def test_ops_run_sanitized(case: Case) -> None:
    """Each op once and no more, for compute-sanitizer, under which all that runs is slow."""
    found = cuda.probe()
    if not found.ok:
        pytest.skip(found.reason)
    assert all(bits(CupyDevice(), case))


@pytest.mark.parametrize("case", [*MODEL_CASES[::8], *OP_CASES], ids=str)
def test_data_that_stay_on_the_host_change_no_bit(device: Any, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = bits(device, case)
    monkeypatch.setattr(data, "RESIDENT_SHARE", 0)
    assert bits(device, case) == expected
