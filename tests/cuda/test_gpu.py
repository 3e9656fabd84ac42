"""The CUDA backend on a GPU: the checks of `test_host`, and the same bits in every run."""

from __future__ import annotations

import importlib
import logging
import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cuda_arrays
from agreement import assert_close, clear_cases, dtypes, inference, reference_of
from cases import CASES, MODEL_CASES
from cuda_arrays import CHECKS, ESTIMATORS, elementwise, ids
from cuda_device import check_agreement, program_on
from narrows import functional
from narrows.backends import Hyper, cuda
from narrows.backends.cuda import data, launches
from narrows.backends.cuda.device import CupyDevice, calls_of
from narrows.backends.cuda.emit import wants_blas
from narrows.backends.cuda.protocol import Planned
from narrows.backends.cuda.table import KERNELS
from narrows.backends.reference import ACTIVATE
from narrows.plan.spec import ACTIVATIONS, Precision
from networks import Case
from op_cases import OP_CASES
from oracle import SEED, STEP, away_from_kinks

pytestmark = pytest.mark.gpu
if not (_found := cuda.probe()).ok:
    pytest.skip(_found.reason, allow_module_level=True)


PARTS = 8
"""Parts of the kernels of a precision; a process compiles each part."""


def compile_part(precision: Precision, part: int) -> None:
    device = CupyDevice()
    with device._device:
        calls_of(device._cupy, [Planned(kernel, 1, 1, np.empty(0)) for kernel in KERNELS[part::PARTS]], precision)


@pytest.fixture(scope="module")
def device() -> Any:
    # All at once, because each later compilation would read all sources again; and in parallel, because one process
    # would need minutes. CuPy keeps the results of the other processes on disk.
    parts = list(product((Precision.FLOAT32, Precision.FLOAT64, Precision.BFLOAT16), range(PARTS)))
    with ProcessPoolExecutor(min(PARTS, os.cpu_count() or 1), multiprocessing.get_context("spawn")) as pool:
        list(pool.map(compile_part, *zip(*parts, strict=True)))
    for part in parts:
        compile_part(*part)
    return CupyDevice()


@pytest.fixture(scope="module")
def cupy(device: Any) -> Any:
    return importlib.import_module("cupy")


@pytest.fixture(scope="module")
def csr(device: Any) -> Any:
    return importlib.import_module("cupyx.scipy.sparse").csr_matrix


@dtypes
@pytest.mark.parametrize("case", CASES + clear_cases, ids=str)
def test_programs_agree_with_the_reference(device: Any, case: Case, dtype: Any) -> None:
    case = away_from_kinks(case)
    program = program_on(device, case, dtype)
    check_agreement(program, case, dtype)
    program.close()


@pytest.mark.parametrize("products", ["own", "cuBLAS"])
def test_launches_are_captured(
    device: Any, products: str, request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture
) -> None:
    """Otherwise they would run one by one with the same results."""
    if products == "cuBLAS":
        request.getfixturevalue("eager")
    with caplog.at_level(logging.WARNING, "narrows"):
        # A new device, whose handle has not multiplied yet.
        bits(CupyDevice(), MODEL_CASES[0])
    assert caplog.records == []


def bits(device: Any, case: Case) -> list[bytes]:
    program = program_on(device, case)
    steps = -(-case.rows // case.batch)
    terms = program.train(np.arange(case.rows), Hyper(SEED, STEP, np.full(steps, 1e-3)))
    parts = [terms, *program.state().values()]
    data = case.data(np.float32)
    parts += [program.apply(data.X, mode, data.target, data.condition) for mode in inference]
    program.close()
    return [np.ascontiguousarray(part).tobytes() for part in parts]


@pytest.mark.parametrize("case", [*MODEL_CASES[::4], *OP_CASES], ids=str)
def test_the_same_bits_from_run_to_run(device: Any, case: Case) -> None:
    assert bits(device, case) == bits(device, case)


@pytest.fixture
def eager(device: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every product is large enough for cuBLAS."""
    if device.blas is None:
        pytest.skip("without cuBLAS")
    monkeypatch.setattr(launches, "BLAS_LEAST", dict.fromkeys(Precision, 0))
    monkeypatch.setattr(launches, "BLAS_SIDE", 1)


@dtypes
@pytest.mark.parametrize("case", MODEL_CASES[::3], ids=str)
def test_products_by_cublas_agree_with_the_reference(device: Any, eager: None, case: Case, dtype: Any) -> None:
    test_programs_agree_with_the_reference(device, case, dtype)


@pytest.mark.parametrize("precision", [Precision.TF32, Precision.BFLOAT16], ids=["tf32", "bfloat16"])
@pytest.mark.parametrize("case", [case for case in MODEL_CASES[::10] if "hessian" not in case.name], ids=str)
def test_tensor_cores_round_the_factors_alone(device: Any, eager: None, case: Case, precision: Precision) -> None:
    case = away_from_kinks(case)
    program = program_on(device, case, precision)
    rows = np.arange(min(case.batch, case.rows))
    terms, gradient = program.gradient(rows, SEED, STEP)
    expected_terms, expected = reference_of(case).gradient(rows, SEED, STEP)
    np.testing.assert_allclose(terms, expected_terms, rtol=3e-2)
    for name, g in expected.items():
        assert_close(gradient[name], g, 3e-2, name)


@pytest.mark.parametrize("case", MODEL_CASES[::8], ids=str)
def test_cublas_gives_the_same_bits_from_run_to_run(device: Any, eager: None, case: Case) -> None:
    assert bits(device, case) == bits(device, case)


# Results of cuBLAS may depend on the size of the batch.
OWN_CASES = [case for case in MODEL_CASES[::8] if not wants_blas(case.plan, Precision.FLOAT32)]


@pytest.mark.parametrize("case", OWN_CASES, ids=str)
def test_rows_do_not_depend_on_their_neighbours(device: Any, case: Case) -> None:
    data, single = case.data(np.float32), Case(case.name, case.spec, batch=1, rows=case.rows)
    for mode in inference:
        whole = program_on(device, case).apply(data.X, mode, data.target, data.condition)
        one_by_one = program_on(device, single).apply(data.X, mode, data.target, data.condition)
        assert whole.tobytes() == one_by_one.tobytes(), mode


@pytest.mark.parametrize("case", OP_CASES, ids=str)
def test_ops_run_sanitized(case: Case) -> None:
    """Each op just once, because compute-sanitizer is slow."""
    found = cuda.probe()
    if not found.ok:
        pytest.skip(found.reason)
    # Without CuPy's pool, which hides accesses out of bounds.
    with importlib.import_module("cupy").cuda.using_allocator(None):
        assert all(bits(CupyDevice(), case))


@pytest.mark.parametrize("case", [*MODEL_CASES[::8], *OP_CASES], ids=str)
def test_data_that_stay_on_the_host_change_no_bit(device: Any, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = bits(device, case)
    monkeypatch.setattr(data, "RESIDENT_SHARE", 0)
    assert bits(device, case) == expected


# --- arrays of CuPy's -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["dense", "csr"])
@pytest.mark.parametrize("estimator", ESTIMATORS, ids=ids)
def test_estimators_take_and_return_arrays_of_the_gpu(cupy: Any, csr: Any, estimator: Any, kind: str) -> None:
    cuda_arrays.check_estimator(cupy, csr, estimator, kind)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__[6:])
def test_arrays(cupy: Any, csr: Any, check: Callable[..., None]) -> None:
    check(cupy, csr)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("activation", elementwise)
def test_layers(cupy: Any, csr: Any, activation: str, dtype: Any) -> None:
    cuda_arrays.check_dense(cupy, csr, activation, dtype)


@pytest.mark.parametrize("activation", elementwise)
def test_activations_over_all_numbers(cupy: Any, activation: str) -> None:
    """In float32, as compiled for the GPU: within 8 units of the last place, or of the smallest normal number, because
    smaller numbers are zero."""
    z = np.concatenate([np.geomspace(1e-44, 3e38, 3000), np.linspace(0.001, 120, 6001), [0.0]]).astype(np.float32)
    z = np.concatenate([z, -z, np.array([np.nan, np.inf, -np.inf], np.float32)])
    found = functional.dense(cupy.asarray(z[:, None]), cupy.ones((1, 1), np.float32), activation=activation).get()[:, 0]
    with np.errstate(all="ignore"):
        exact = ACTIVATE[ACTIVATIONS[activation]](z.astype(np.float64))
        rounded = exact.astype(np.float32)
        finite = np.isfinite(rounded)
        units = np.maximum(np.spacing(np.abs(rounded[finite])), np.finfo(np.float32).tiny / 8).astype(np.float64)
        error = np.abs(found[finite].astype(np.float64) - exact[finite]) / units
    assert (error <= 8).all(), (z[finite][error.argmax()], error.max())
    np.testing.assert_array_equal(found[np.isinf(rounded)], rounded[np.isinf(rounded)])
    assert np.isnan(found[np.isnan(z)]).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_penalties(cupy: Any, csr: Any, dtype: Any) -> None:
    cuda_arrays.check_penalty(cupy, csr, dtype)


def test_checkpoints(cupy: Any, csr: Any, tmp_path: Path) -> None:
    cuda_arrays.check_checkpoints(cupy, csr, tmp_path / "run")


def test_work_follows_the_stream_of_the_caller(cupy: Any) -> None:
    """Arrays are written on the caller's stream after long work, and read on another stream."""
    X = np.random.default_rng(0).random((2000, 12)).astype(np.float32)
    estimator = cuda_arrays.small().fit(X)
    expected = estimator.transform(X)
    stream = cupy.cuda.Stream(non_blocking=True)
    for _ in range(20):
        there = cupy.zeros(X.shape, np.float32)
        cupy.cuda.runtime.deviceSynchronize()
        with stream:
            busy = cupy.ones((2000, 2000), np.float32)
            for _ in range(10):
                busy = busy @ busy * np.float32(5e-4)
            there += cupy.asarray(X)
            codes = estimator.transform(there)
            there[...] = 0
        assert codes.get().tobytes() == expected.tobytes()
