"""Large products with cuBLAS, without a GPU: real calls to a library of the host with cuBLAS's signatures
(``cuda_host/cublas.cpp``), on the memory of a `HostDevice`.

The tests check which matrices, sizes, strides, types and modes cuBLAS gets. They say nothing on its speed and rounding.
"""

from __future__ import annotations

import ctypes
import importlib.util
import logging
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agreement import assert_close, reference_of
from cases import CASES, MODEL_CASES
from cuda_device import HERE, HostDevice, check_agreement, compiler, named, packed, program_on, thinned
from fake_cupy import FakeCupy
from narrows import Autoencoder, functional
from narrows.backends import compile_plan, cuda
from narrows.backends.cuda import blas as module
from narrows.backends.cuda import device as device_module
from narrows.backends.cuda import launches as rules
from narrows.backends.cuda.blas import MISSING, TYPES, Blas, load
from narrows.backends.cuda.device import CupyDevice
from narrows.backends.cuda.emit import launches, wants_blas
from narrows.backends.cuda.launches import BLAS, Area, Sink, View, by_blas
from narrows.backends.cuda.layout import Operands, layout
from narrows.backends.cuda.program import CudaProgram
from narrows.errors import BackendError
from narrows.plan.ops import OpCode
from narrows.plan.plan import Mode
from narrows.plan.spec import Precision
from networks import Case, network
from oracle import SEED, STEP, away_from_kinks

# The penalty of CAE+H is a difference of rounded numbers.
DENSE_CASES = [
    c for c in MODEL_CASES[::10] if any(op.code is OpCode.DENSE for op in c.plan.ops) and "hessian" not in c.name
]
WIDE = network((784, 1000, 784))


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Path of the host's library."""
    try:
        command = [compiler(), "-std=c++17", "-O1", "-fPIC", "-shared", "-fvisibility=hidden", "-Wall", "-Wextra"]
    except FileNotFoundError as error:
        pytest.skip(str(error))
    out = tmp_path_factory.mktemp("cublas") / "libcublas.so.12"
    subprocess.run([*command, str(HERE / "cublas.cpp"), "-o", str(out)], check=True)
    return out


@pytest.fixture
def library(path: Path, monkeypatch: pytest.MonkeyPatch) -> ctypes.CDLL:
    found = ctypes.CDLL(str(path))
    found.fake_memory.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    found.fake_reset(12, 0)
    monkeypatch.setattr(module, "WORKSPACE", 4096)
    load.cache_clear()
    return found


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every product is large enough for cuBLAS."""
    monkeypatch.setattr(rules, "BLAS_LEAST", dict.fromkeys(Precision, 0))
    monkeypatch.setattr(rules, "BLAS_SIDE", 1)


class Watched(Blas):
    """A handle that may touch only what its device has allocated."""

    def __init__(self, library: Any, allocate: Any) -> None:
        super().__init__(library, 7, allocate)
        self.device = allocate.__self__

    def product(self, operands: Any) -> None:
        for begin, (_, _, size) in self.device.memory.items():
            self._library.fake_memory(begin, size)
        super().product(operands)


def device_of(libraries: Any, library: Any) -> HostDevice:
    return HostDevice(libraries, blas=lambda allocate: Watched(library, allocate))


# --- whole programs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "dtype"),
    thinned([(case, dtype) for case in CASES[::3] for dtype in (np.float32, np.float64)], 3),
    ids=named,
)
def test_programs_agree_with_the_reference(libraries: Any, library: Any, eager: None, case: Case, dtype: Any) -> None:
    case = away_from_kinks(case)
    device = device_of(libraries, library)
    program = program_on(device, case, dtype)
    check_agreement(program, case, dtype)
    program.close()
    assert wants_blas(case.plan, Precision.of(dtype)) == (BLAS in device.launched)
    dense = [kernel for kernel in device.launched if kernel.startswith("gemm<") and "Extended" not in kernel]
    assert not dense
    assert sum(library.fake_calls(sums) for *_, sums in TYPES.values()) > 0 or BLAS not in device.launched


@pytest.mark.parametrize("case", DENSE_CASES, ids=str)
@pytest.mark.parametrize(
    ("precision", "bound"), [(Precision.TF32, 5e-3), (Precision.BFLOAT16, 3e-2)], ids=["tf32", "bfloat16"]
)
def test_rounded_factors(
    libraries: Any, library: Any, eager: None, case: Case, precision: Precision, bound: float
) -> None:
    case = away_from_kinks(case)
    device = device_of(libraries, library)
    program = program_on(device, case, precision)
    rows = np.arange(min(case.batch, case.rows))
    terms, gradient = program.gradient(rows, SEED, STEP)
    expected_terms, expected = reference_of(case).gradient(rows, SEED, STEP)
    np.testing.assert_allclose(terms, expected_terms, rtol=bound)
    exact = True
    for name, g in expected.items():
        assert_close(gradient[name], g, bound, name)
        exact = exact and np.allclose(gradient[name], g, rtol=1e-6, atol=0)
    assert not exact, "something is rounded"
    sums = module.COMPUTE_32F_FAST_TF32 if precision is Precision.TF32 else module.COMPUTE_32F
    assert library.fake_calls(sums) > 0
    assert ("to_bfloat16" in device.launched) == (precision is Precision.BFLOAT16)
    program.close()


@pytest.mark.parametrize("case", DENSE_CASES, ids=str)
def test_bfloat16_rounds_the_factors_that_own_kernels_round(
    libraries: Any, library: Any, monkeypatch: pytest.MonkeyPatch, case: Case
) -> None:
    rows = np.arange(min(case.batch, case.rows))
    own = program_on(HostDevice(libraries), case, Precision.BFLOAT16).gradient(rows, SEED, STEP)
    monkeypatch.setattr(rules, "BLAS_LEAST", dict.fromkeys(Precision, 0))
    monkeypatch.setattr(rules, "BLAS_SIDE", 1)
    blas = program_on(device_of(libraries, library), case, Precision.BFLOAT16).gradient(rows, SEED, STEP)
    np.testing.assert_allclose(blas[0], own[0], rtol=2e-3)
    for name, g in own[1].items():
        assert_close(blas[1][name], g.astype(np.float64), 1e-2, name)


def test_contractive_chains_are_not_rounded(eager: None) -> None:
    """Products that stay in float32 under bfloat16 also do so under TF32."""
    case = next(c for c in CASES if "contractive" in c.name and any(op.code is OpCode.JACOBIAN for op in c.plan.ops))
    for precision in (Precision.TF32, Precision.BFLOAT16):
        found = launches(case.plan, case.batch, Mode.TRAIN, precision, blas=True)
        kinds = {launch.operands.precision for launch in found if launch.kernel == BLAS}
        assert kinds == {Precision.FLOAT32, precision}


# --- one product ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("left_turned", [False, True])
@pytest.mark.parametrize("right_rows", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_product_of_any_layout(libraries: Any, library: Any, left_turned: bool, right_rows: bool, dtype: Any) -> None:
    rows, cols, depth = 5, 7, 11
    device, rng = device_of(libraries, library), np.random.default_rng(0)

    def matrix(rows: int, cols: int) -> Any:
        array = device.view(device.allocate(rows * (cols + 3) * 8), (rows, cols), cols + 3, dtype)
        array[...] = rng.normal(size=(rows, cols))
        return array

    A = matrix(depth, rows) if left_turned else matrix(rows, depth)
    B = matrix(cols, depth) if right_rows else matrix(depth, cols)
    C = matrix(rows, cols)
    expected = 0.5 * (A.T if left_turned else A) @ (B.T if right_rows else B) - 2 * C
    given = Operands(
        BLAS, left=A, right=B, out=C, rows=rows, cols=cols, depth=depth, left_turned=left_turned,
        right_rows=right_rows, precision=Precision.of(dtype), alpha=0.5, beta=-2,
    ).checked()  # fmt: skip
    device.blas.product(packed(given))
    np.testing.assert_allclose(C, expected, rtol=1e-5, atol=1e-6)
    beyond = packed(given)
    beyond["slots"][layout((BLAS,))["out"].position]["data"] += 4 * 8 * (cols + 3)
    with pytest.raises(RuntimeError, match="cublasGemmEx: refused"):
        device.blas.product(beyond)


def test_a_product_does_not_overwrite_what_its_epilogue_reads() -> None:
    """If the result replaces what the epilogue reads, the product lies elsewhere."""
    writer = rules.Writer(Case("own", WIDE, batch=256).plan, 256, Mode.TRAIN, Precision.FLOAT32, blas=True)
    x, W = View(Area.WORK, 0, 256, 1000, 1008), View(Area.PARAMETER, 0, 784, 1000, 1008)
    saved, out = (View(Area.WORK, offset, 256, 784, 784) for offset in (300000, 600000))

    def product(out: View) -> None:
        to = Sink("Slope<Relu>", Operands("Slope", saved=saved, out=out, scale=1.0))
        writer.product(to, (256, 784, 1000), ("Rows", "Rows"), x, W)

    product(out)
    assert writer.launches[0].operands.out == out
    product(saved.part(784, 256, 784, 784))
    assert writer.launches[2].operands.out.area is Area.TEMPORARY
    assert writer.launches[3].operands.product == writer.launches[2].operands.out
    assert [launch.kernel for launch in writer.launches] == [BLAS, "finish<Slope<Relu>>"] * 2


# --- the choice -------------------------------------------------------------------------------------------------------


def test_cublas_gets_large_products_only() -> None:
    for precision in Precision:
        assert by_blas((256, 1000, 784), precision)
        assert not by_blas((256, 128, 784), precision)
        assert not by_blas((10**6, 8, 784), precision), "a product with a short side has nothing for cuBLAS"
    assert by_blas((256, 500, 1000), Precision.TF32)
    assert not by_blas((256, 500, 1000), Precision.FLOAT32), "own kernels are as fast in float32"
    assert wants_blas(Case("wide", WIDE, batch=256).plan, Precision.FLOAT32)
    assert not wants_blas(Case("small", network((784, 32, 784)), batch=256).plan, Precision.FLOAT32)
    found = launches(Case("wide", WIDE, batch=256).plan, 256, Mode.TRAIN, blas=True)
    # Two layers forward, one backward, and two weights. An epilogue follows each and also sums for the bias.
    assert [launch.kernel.split("<")[0] for launch in found].count(BLAS) == 5
    assert sum(launch.kernel.startswith("finish") for launch in found) == 5
    assert not any(launch.kernel.startswith("colsum") for launch in found)
    assert BLAS not in {launch.kernel for launch in launches(Case("wide", WIDE, batch=256).plan, 256, Mode.TRAIN)}
    many = launches(Case("wide", WIDE, batch=4096).plan, 4096, Mode.TRAIN, blas=True)
    assert any(launch.kernel.startswith("colsum") for launch in many), "many rows are summed in two passes"


@pytest.mark.parametrize("backend", ["reference", "numba", "cpp"])
def test_tf32_needs_the_gpu(backend: str) -> None:
    with pytest.raises(BackendError, match=r"precision='tf32' needs backend='cuda'"):
        compile_plan(Case("own", network((7, 4, 7))).plan, backend, precision="tf32")
    if backend == "reference":
        with pytest.raises(BackendError, match=r"tf32.*reference"):
            Autoencoder(2, precision="tf32", backend=backend).fit(np.random.default_rng(0).random((30, 7)))


# --- the library ------------------------------------------------------------------------------------------------------


def test_the_library_is_not_newer_than_the_driver(
    library: Any, path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    wheel = tmp_path / "cublas" / "lib"
    wheel.mkdir(parents=True)
    (wheel / "libcublas.so.12").symlink_to(path)
    (wheel / "libcublas.so.13").write_text("not a library")
    package = type("Spec", (), {"submodule_search_locations": [str(tmp_path)]})()
    monkeypatch.setattr(module, "find_spec", lambda name: package)
    monkeypatch.setattr(module.importlib, "import_module", lambda name: None)
    assert load(13)._name.endswith("cublas/lib/libcublas.so.12")
    assert module.described(13) == "cuBLAS 12.9"
    library.fake_reset(13, 0)
    load.cache_clear()
    with pytest.raises(OSError, match=r"libcublas.so.12 is for CUDA 13.9, the driver for 12"):
        load(12)
    monkeypatch.setattr(module, "_candidates", lambda driver: iter(["libno-such.so.12"]))
    with pytest.raises(OSError, match=MISSING):
        load(12)
    assert module.described(12) == f"without cuBLAS, wide layers are slower: cuBLAS was not found: {MISSING}"


def test_a_handle_has_stream_and_workspace_and_is_destroyed(library: Any, libraries: Any) -> None:
    device = HostDevice(libraries)
    before = library.fake_handles()
    blas = Watched(library, device.allocate)
    assert [size for *_, size in device.memory.values()] == [module.WORKSPACE]
    assert library.fake_handles() == before + 1
    del blas
    assert library.fake_handles() == before
    library.fake_reset(12, 1)
    with pytest.raises(RuntimeError, match="cublasCreate_v2: refused by the fake"):
        Blas(library, 7, device.allocate)


def program_through(fake: FakeCupy, case: Case, monkeypatch: pytest.MonkeyPatch) -> CudaProgram:
    monkeypatch.setattr(device_module, "require", lambda *_: fake)
    fake.driverGetVersion = lambda: 12040
    program = CudaProgram(case.plan, Precision.FLOAT32, CupyDevice())
    program.load(case.state())
    program.bind(*case.data(np.float32))
    return program


def test_products_are_called_while_a_graph_is_captured(
    libraries: Any, library: Any, eager: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_module, "load", lambda driver: library)
    case, fake = Case("capture", network((33, 9, 33)), batch=8, rows=8), FakeCupy(libraries)
    library.fake_memory(None, ctypes.c_size_t(-1))
    program = program_through(fake, case, monkeypatch)
    calls = []
    product = program.device.blas.product
    monkeypatch.setattr(
        program.device.blas, "product", lambda o: (calls.append(fake.capturing is not None), product(o))
    )
    program.gradient(np.arange(8))
    assert calls
    assert all(calls)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_layers_on_gpu_arrays_use_the_current_stream(
    libraries: Any, library: Any, eager: None, monkeypatch: pytest.MonkeyPatch, dtype: Any
) -> None:
    """For transposed and other weights, without a graph."""
    monkeypatch.setattr(device_module, "load", lambda driver: library)
    library.fake_memory(None, ctypes.c_size_t(-1))
    fake = FakeCupy(libraries).install(monkeypatch)
    streams, products = [], []
    made, product = Blas.__init__, Blas.product

    def make(self: Blas, library: Any, stream: int, allocate: Any) -> None:
        streams.append(stream)
        made(self, library, stream, allocate)

    monkeypatch.setattr(Blas, "__init__", make)
    monkeypatch.setattr(Blas, "product", lambda self, o: (products.append(o), product(self, o)))
    rng = np.random.default_rng(0)
    X, W, b, dA = (rng.normal(size=size).astype(dtype) for size in ((9, 7), (7, 5), (5,), (9, 5)))
    stream = fake.cuda.Stream()
    with stream:
        for w in (fake.asarray(W), fake.asarray(np.ascontiguousarray(W.T)).T):
            A = functional.dense(fake.asarray(X), w, fake.asarray(b), "tanh")
            np.testing.assert_allclose(A.get(), np.tanh(X @ W + b), rtol=1e-5, atol=1e-5)
            grads = functional.dense_backward(fake.asarray(dA), fake.asarray(X), w, A, "tanh")
            expected = functional.dense_backward(dA, X, W, A.get(), "tanh")
            for one, other in zip(grads, expected, strict=True):
                np.testing.assert_allclose(one.get(), other, rtol=1e-4, atol=1e-5)
    assert streams == [stream.ptr]
    assert len(products) == 2 * 3
    assert fake.capturing is None


@pytest.mark.parametrize("missing", ["library", "handle"])
def test_without_the_library_own_kernels_run_and_one_warning_appears(
    libraries: Any,
    library: Any,
    eager: None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    missing: str,
) -> None:
    def fails(driver: int) -> Any:
        raise OSError("there is no cuBLAS")

    library.fake_reset(12, 1)
    monkeypatch.setattr(device_module, "load", fails if missing == "library" else lambda driver: library)
    device_module._warn_once.cache_clear()
    case = Case("without", network((33, 9, 33)), batch=8, rows=8)
    with caplog.at_level(logging.WARNING, "narrows"):
        for _ in range(2):
            fake = FakeCupy(libraries)
            program = program_through(fake, case, monkeypatch)
            terms, _ = program.gradient(np.arange(8))
            np.testing.assert_allclose(terms, reference_of(case).gradient(np.arange(8))[0], rtol=1e-5)
            assert BLAS not in fake.host.launched
    said = [record.message for record in caplog.records if "cuBLAS" in record.message]
    assert len(said) == 1, said


def test_small_networks_do_not_load_cublas(libraries: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_module, "load", lambda driver: pytest.fail("looked for"))
    case = Case("small", network((33, 9, 33)), batch=8, rows=8)
    program_through(FakeCupy(libraries), case, monkeypatch).gradient(np.arange(8))


def test_the_real_library_has_all_functions() -> None:
    load.cache_clear()
    try:
        library = load(99)
    except OSError as error:
        pytest.skip(str(error))
    for name in module.SIGNATURES:
        assert getattr(library, name).argtypes
    if not cuda.has_gpu():
        with pytest.raises(RuntimeError, match="cublasCreate_v2: "):
            Blas(library, 0, lambda size: 0)


def test_nvidias_search_function_exists_where_installed() -> None:
    if importlib.util.find_spec("cuda") is None or importlib.util.find_spec("cuda.pathfinder") is None:
        pytest.skip("cuda-pathfinder is not installed")
    from cuda import pathfinder

    assert callable(pathfinder.load_nvidia_dynamic_lib)
