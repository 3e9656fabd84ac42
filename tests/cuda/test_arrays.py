"""Arrays on a GPU as inputs and outputs, with a fake of CuPy that runs kernels on the host; see `cuda_arrays`.

These tests also check the order of work on the streams, and what is copied.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp

import cuda_arrays
from cuda_arrays import CHECKS, ESTIMATORS, elementwise, ids, same, small
from cuda_device import thinned
from estimator_cases import low_rank
from fake_cupy import Csr, FakeCupy
from narrows import functional, scanpy
from narrows.backends.cuda import launches, layers
from narrows.backends.cuda.device import CupyDevice
from narrows.errors import BackendError, DataError, OutOfMemoryError
from narrows.plan.plan import Mode

with contextlib.suppress(ImportError):
    import anndata  # noqa: F401 - its first import looks for CuPy, and must not find the fake


@pytest.fixture
def cupy(libraries: Any, monkeypatch: pytest.MonkeyPatch) -> FakeCupy:
    monkeypatch.setattr("narrows.functional.penalty._spare", {})
    return FakeCupy(libraries).install(monkeypatch)


@pytest.mark.parametrize("kind", ["dense", "csr"])
@pytest.mark.parametrize("estimator", thinned(ESTIMATORS, 3), ids=ids)
def test_estimators_take_and_return_arrays_of_the_gpu(cupy: Any, estimator: Any, kind: str) -> None:
    cuda_arrays.check_estimator(cupy, Csr, estimator, kind)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__[6:])
def test_arrays(cupy: Any, check: Callable[..., None]) -> None:
    check(cupy, Csr)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("activation", elementwise)
def test_layers(cupy: Any, activation: str, dtype: Any) -> None:
    cuda_arrays.check_dense(cupy, Csr, activation, dtype)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_penalties(cupy: Any, dtype: Any) -> None:
    cuda_arrays.check_penalty(cupy, Csr, dtype)


def test_checkpoints(cupy: Any, tmp_path: Path) -> None:
    cuda_arrays.check_checkpoints(cupy, Csr, tmp_path / "run")


@pytest.mark.parametrize("kind", ["dense", "csr"])
def test_cells_of_a_gpu_are_copied_to_the_cpu(cupy: Any, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    anndata = pytest.importorskip("anndata")
    counts = np.random.default_rng(0).poisson(0.7, (40, 12)).astype(np.float32)
    adata = anndata.AnnData(sp.csr_matrix(counts) if kind == "csr" else counts)
    settings = {"n_components": 2, "hidden_layer_sizes": (8,), "max_iter": 3, "backend": "numba"}
    expected = scanpy.autoencoder(adata, copy=True, **settings)
    there = Csr(adata.X) if kind == "csr" else cupy.asarray(adata.X)
    monkeypatch.setattr(anndata.AnnData, "X", property(lambda self: there))
    scanpy.autoencoder(adata, **settings)
    assert type(adata.obsm["X_ae"]) is np.ndarray
    assert (adata.obsm["X_ae"] == expected.obsm["X_ae"]).all()


@pytest.mark.parametrize("kind", ["dense", "csr"])
def test_rows_do_not_leave_the_gpu(cupy: Any, kind: str) -> None:
    X = low_rank()
    there = cupy.asarray(X) if kind == "dense" else Csr(sp.csr_matrix(X))
    weight = cupy.asarray(np.ones(len(X)))
    cupy.calls.clear()
    estimator = small().fit(there, sample_weight=weight)
    codes = estimator.transform(there)
    estimator.inverse_transform(codes)
    estimator.reconstruct(there)
    estimator.score_samples(there)
    estimator.feature_errors(there)
    # Row numbers go to the GPU.
    moved = [call for call in cupy.calls if call[0] in ("down", "up") and call[1] != np.dtype(np.int64)]
    assert moved == []
    assert max(call[1] for call in cupy.calls if call[0] == "memcpy") < X.nbytes


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("tile", list(launches.CLOCKS))
def test_layers_use_the_tiles_of_their_type(cupy: Any, monkeypatch: pytest.MonkeyPatch, tile: str, dtype: Any) -> None:
    monkeypatch.setattr(launches, "CLOCKS", {tile: 1})
    rng = np.random.default_rng(0)
    X, W = rng.normal(size=(201, 20)).astype(dtype), rng.normal(size=(20, 70)).astype(dtype)
    layers._forward.cache_clear()
    A = functional.dense(cupy.asarray(X), cupy.asarray(W)).get()
    layers._forward.cache_clear()
    np.testing.assert_allclose(A, X.astype(np.float64) @ W, rtol=1e-4, atol=1e-5)


def test_work_follows_the_stream_of_the_caller(cupy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    X = low_rank()
    estimator = small().fit(X)
    stream = cupy.cuda.Stream()
    with stream:
        made = cupy.asarray(X) * np.float32(2)
        codes = estimator.transform(made)
        layer = functional.dense(made, cupy.asarray(np.eye(12, dtype=np.float32)))
        same(layer, made.get())
    same(codes, estimator.transform(2 * X))
    assert any(call[0] == "wait" and call[2] == stream.ptr for call in cupy.calls)
    # The fake reports a missing wait.
    monkeypatch.setattr(CupyDevice, "follow", lambda self: None)
    with stream, pytest.raises(AssertionError, match="before what it reads is written"):
        estimator.transform(cupy.asarray(X) * np.float32(3))


def test_the_current_device_is_used(cupy: Any) -> None:
    X = low_rank()
    with cupy.cuda.Device(1):
        there = cupy.asarray(X)
        estimator = small().fit(there)
        codes = estimator.transform(there)
        assert codes.device.id == 1
    with pytest.raises(ValueError, match=r"X is on GPU 1, but CuPy's current GPU is 0: .*cupy\.cuda\.Device\(1\)"):
        estimator.transform(there)
    with pytest.raises(ValueError, match=r"an array is on GPU 0, but the network is on GPU 1: move the array with"):
        estimator.transform(cupy.asarray(X))
    with pytest.raises(ValueError, match=r"X is on GPU 1 and W on GPU 0: move one"):
        functional.dense(there, cupy.asarray(np.ones((12, 2), np.float32)))
    # A layer runs where its operands are.
    with cupy.cuda.Device(1):
        W = cupy.asarray(np.ones((12, 2), np.float32))
    A = functional.dense(there, W)
    assert A.device.id == 1
    assert cupy.device == 0


def test_auto_takes_the_gpu_and_a_cpu_backend_refuses(cupy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    there = cupy.asarray(low_rank())
    assert small(backend="auto").fit(there).backend_ == "cuda"
    monkeypatch.setenv("NARROWS_BACKEND", "reference")
    with pytest.raises(TypeError, match="runs on backend='reference'"):
        small(backend="auto").fit(there)


def test_layers_on_cpu_arrays_stay_on_the_cpu(cupy: Any) -> None:
    cupy.calls.clear()
    functional.dense(np.ones((3, 4)), np.ones((4, 2)))
    functional.contractive_penalty(np.ones((3, 4)), [np.ones((4, 2))], [None], "tanh")
    assert cupy.calls == []


def test_too_little_memory_says_what_to_do(cupy: Any) -> None:
    X = np.zeros((4000, 12), np.float32)
    estimator = small().fit(low_rank())
    whole = {"early_stopping": False}
    there, doubled = cupy.asarray(X), cupy.asarray(X.astype(np.float64))
    whole_numbers = cupy.asarray(X.astype(np.int32))
    cupy.left = X.nbytes - 1
    with pytest.raises(
        OutOfMemoryError,
        match=r"the data need 0\.183 MiB, but GPU 0 has only .* free: free GPU memory, or pass the data in the CPU",
    ):
        estimator._network.apply(doubled, Mode.ENCODE)
    cupy.left = 100
    for message, call in (
        (r"the results need .* or ask for fewer rows at a time", lambda: estimator.transform(there)),
        (r"the network and its batches need .* smaller batch_size", lambda: small(**whole).fit(there)),
        (r"the GPU has no room for a copy of some of the data .* cupy\.asnumpy\(X\)", lambda: small().fit(there)),
        (r"the GPU has no room for a copy", lambda: small().fit(whole_numbers)),
    ):
        with pytest.raises(OutOfMemoryError, match=message):
            call()


def test_sources_are_on_the_host(cupy: Any) -> None:
    from narrows.data import ArraySource

    for there in (cupy.asarray(low_rank()), Csr(sp.csr_matrix(low_rank()))):
        with pytest.raises(DataError, match=r"X: the data are on a GPU; pass cupy\.asnumpy\(X\)"):
            ArraySource(there)


def test_without_a_gpu_the_error_is_one_line(cupy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cupy.cuda.runtime, "driverGetVersion", lambda: 11080)
    with pytest.raises(BackendError, match=r"backend='cuda' cannot run here: the NVIDIA driver is for CUDA 11\.8"):
        small().fit(low_rank())
