"""Single kernels of the CUDA backend as host C++: products by tile, activations over all numbers; and the checks of the
host's device, which must find faults.
"""

from __future__ import annotations

import ctypes
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from cuda_device import HostDevice, LaunchError, build, packed, thinned
from narrows.backends.cuda.launches import tile_of
from narrows.backends.cuda.layout import Operands
from narrows.backends.cuda.protocol import Planned
from narrows.backends.cuda.table import DOUBLE_TILES, FUNCTORS, KERNELS, STEP_DTYPE
from narrows.backends.reference import ACTIVATE, DERIVATIVE
from narrows.plan.spec import Activation, Precision

Array = NDArray[Any]

# --- products, tile by tile -------------------------------------------------------------------------------------------

NAMES = {name: a for a, name in FUNCTORS.items()}
PRODUCTS = tuple(kernel for kernel in KERNELS if kernel.startswith("gemm<"))


class Bench:
    """Matrices on a device for a single kernel, surrounded by garbage."""

    def __init__(self, libraries: Any) -> None:
        self.device, self.libraries = HostDevice(libraries), libraries
        self.arrays: list[Array] = []

    def matrix(self, rows: int, cols: int, rng: np.random.Generator) -> Array:
        address = self.device.allocate(rows * (cols + 3) * 8)
        array = self.device.view(address, (rows, cols), cols + 3, np.float64)
        array[...] = rng.normal(size=(rows, cols))
        self.arrays.append(array)
        return array

    def run(self, kernel: str, blocks: int, given: Operands, m: int, threads: int = 256) -> None:
        step = np.zeros(1, STEP_DTYPE)
        step["learning_rate"], step["momentum"], step["adam_rate"], step["adam_root"] = 0.1, -1, 0.2, 1.5
        operands = packed(given.checked())
        operands["step"], operands["m"], operands["learn"] = step.ctypes.data, m, 1
        self.device.graph([Planned(kernel, blocks, threads, operands)], Precision.FLOAT64)()


@pytest.mark.parametrize("kernel", thinned(PRODUCTS, 3))
def test_products_of_any_size(libraries: Any, kernel: str) -> None:
    for size in ((1, 1, 1), (65, 33, 40), (70, 129, 17), (9, 17, 300)):
        check_product(libraries, kernel, size)


def check_product(libraries: Any, kernel: str, size: tuple[int, int, int]) -> None:
    name, left, right, epilogue = kernel[len("gemm<") : -1].split(", ", 3)
    tile, (rows, cols, depth) = DOUBLE_TILES[name], size
    rng, bench = np.random.default_rng(0), Bench(libraries)
    given = rows - (left == "Extended")
    A = bench.matrix(*((given, depth) if left == "Rows" else (depth, given)), rng)
    B = bench.matrix(*((cols, depth) if right == "Rows" else (depth, cols)), rng)
    L = A if left == "Rows" else A.T
    C = (L if left != "Extended" else np.vstack([L, np.ones(depth)])) @ (B.T if right == "Rows" else B)
    new = partial(bench.matrix, rng=rng)
    out, other, row = new(rows, cols), new(rows, cols), new(1, cols)
    blocks, name = -(-rows // tile.rows) * -(-cols // tile.cols), epilogue.split("<")[0]
    sizes = {"rows": rows, "cols": cols, "depth": depth, "rounds": 0}

    def run(*given: Operands) -> None:
        own = Operands("gemm", left=A, right=B, **sizes)
        bench.run(kernel, blocks, sum(given, own), m=5, threads=tile.threads)

    act = NAMES.get(epilogue.split("<")[-1].rstrip(">"), Activation.LINEAR)
    db, b, mb, vb = (new(1, cols) for _ in range(4)) if name == "WithBias" else (None,) * 4
    close = partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-11, err_msg=f"rows, columns, depth: {size}")
    if name == "Activate":
        run(Operands("Activate", b=row, out=out, pre=other))
        close(other, C + row)
        close(out, ACTIVATE[act](C + row))
    elif name == "Slope":
        run(Operands("Slope", saved=other, out=out, scale=0.7))
        close(out, C * DERIVATIVE[act](0.7 * other))
    elif epilogue == "WithBias<Store>":
        before, sums = out.copy(), b.copy()
        bias = {"bias": b, "bias_row": rows - 1}
        store = Operands("Store", out=out, accumulate=1, factor=0.5)
        run(store, Operands("StoreBias", **bias, accumulate_bias=0))
        close(out[:-1], (before + 0.5 * C)[:-1])
        close(b[0], C[-1])
        store = Operands("Store", out=out, accumulate=0, factor=1.0)
        run(store, Operands("StoreBias", **bias, accumulate_bias=1))
        close(out[:-1], C[:-1])
        close(b[0], 2 * C[-1])
        np.testing.assert_array_equal(out[-1], before[-1])
        assert sums.shape == b.shape
    elif name == "Store":
        before = out.copy()
        run(Operands("Store", out=out, accumulate=1, factor=0.5))
        close(out, before + 0.5 * C)
        run(Operands("Store", out=out, accumulate=0, factor=1.0))
        close(out, C)
    elif name == "Link":
        latents = 2
        slopes = new(-(-rows // latents), cols + 4)
        run(Operands("Link", slopes=slopes, out=out, scaled=other, latents=latents, column=4))
        close(out, C)
        close(other, C * np.repeat(slopes[:, 4:], latents, axis=0)[:rows])
    else:
        adam = "Adam" in epilogue
        second = new(rows, cols)
        for square in (second, *(() if vb is None else (vb,))):
            square[...] = np.abs(square)
        W, m1, m2, before = out.copy(), other.copy(), second.copy(), new(rows, cols)
        last = [None if x is None else x.copy() for x in (db, b, mb, vb)]
        parts = [
            Operands("Descend", dW=before, W=out, moment1=other, moment2=second if adam else None, colrate=row),
            Operands("Rule", beta_1=0.9, beta_2=0.8, epsilon=1e-3),
            Operands("Decays", penalised=1, l2=0.3, l1=0.2, rate=0.5),
        ]
        if name == "WithBias":
            moments = {"b_moment1": mb, "b_moment2": vb if adam else None}
            parts.append(Operands("DescendBias", db=db, b=b, **moments, bias_row=rows - 1))
        run(*parts)

        def stepped(W: Array, g: Array, m1: Array, m2: Array) -> tuple[Array, Array, Array]:
            if not adam:
                m1 = 0.9 * m1 - 0.1 * g
                return W + m1, m1, m2
            m1, m2 = 0.9 * m1 + 0.1 * g, 0.8 * m2 + 0.2 * g * g
            return W - 0.2 * m1 / (np.sqrt(m2) * 1.5 + 1e-3), m1, m2

        g = C + before + row * W + (0.3 * W + 0.2 * np.sign(W)) / 5
        expected = stepped(W * (1 - 0.1 * 0.5), g, m1, m2)
        if name == "WithBias":
            by_bias = stepped(last[1], C[-1:] + last[0], *last[2:])
            for found, right_one in zip((b, mb, vb), by_bias, strict=True):
                close(found, right_one)
        within = slice(None, given)
        for found, right_one in zip((out, other, second), expected, strict=True):
            close(found[within], right_one[within])


@pytest.mark.parametrize("size", [(70, 129, 17), (5, 33, 300), (130, 65, 64)], ids=str)
def test_tiles_of_one_kind_have_the_same_bits(libraries: Any, size: tuple[int, int, int]) -> None:
    """Also Deep, for any number of rows; so a row's bits do not depend on other rows."""
    rows, cols, depth = size
    rng, bench = np.random.default_rng(1), Bench(libraries)
    A, B = bench.matrix(rows, depth, rng), bench.matrix(depth, cols, rng)

    def bits(name: str, A: Array) -> Array:
        out, tile = bench.matrix(A.shape[0], cols, rng), DOUBLE_TILES[name]
        kernel, blocks = f"gemm<{name}, Rows, Turned, Store>", -(-A.shape[0] // tile.rows) * -(-cols // tile.cols)
        own = Operands("gemm", left=A, right=B, rows=A.shape[0], cols=cols, depth=depth, rounds=0)
        store = Operands("Store", out=out, accumulate=0, factor=1.0)
        bench.run(kernel, blocks, own + store, 1, threads=tile.threads)
        return out

    whole = bits("Small", A)
    for name in ("Medium", "Large"):
        np.testing.assert_array_equal(bits(name, A), whole)
    deep = bits("Deep", A)
    for i in range(0, rows, 4):
        np.testing.assert_array_equal(bits("Deep", A[i : i + 1])[0], deep[i])


def test_the_number_of_rows_does_not_choose_the_tile_deep() -> None:
    for cols, depth in product((1, 30, 128, 256, 257, 1000), (1, 128, 129, 784, 5000)):
        tiles = {tile_of((rows, cols, depth), of_batch=True) for rows in (1, 16, 128, 1000, 10**6)}
        assert tiles == {"Deep"} or "Deep" not in tiles


# --- the mathematics of single numbers --------------------------------------------------------------------------------


@pytest.mark.parametrize("act", [a for a in Activation if a is not Activation.SOFTMAX], ids=lambda a: a.name)
def test_activations_over_all_numbers(libraries: Any, act: Activation) -> None:
    """Values and slopes in float32, from subnormal numbers to overflow, within 8 units of the last place."""
    z = np.concatenate([np.geomspace(1e-44, 3e38, 3000), np.linspace(0.001, 120, 6001), [0.0]]).astype(np.float32)
    z = np.concatenate([z, -z, np.array([np.nan, np.inf, -np.inf], np.float32)])[None]
    name, exact = FUNCTORS[act], z.astype(np.float64)
    with np.errstate(all="ignore"):
        expected = ACTIVATE[act](exact)
        kept = z if act.needs_preactivation else expected.astype(np.float32)
        slope = DERIVATIVE[act](kept.astype(np.float64))
    for kernel, given, right in ((f"activate<{name}>", z, expected), (f"slopes<{name}>", kept, slope)):
        actual = elementwise(libraries, kernel, given)
        with np.errstate(all="ignore"):
            right32 = right.astype(np.float32)
        finite = np.isfinite(right32)
        units = np.spacing(np.abs(right32[finite])).astype(np.float64)
        error = np.abs(actual[finite].astype(np.float64) - right[finite]) / units
        # Slopes are differences where tanh is near 1 and where gelu turns, so the bound there is a unit of 1.
        turns = (kernel[0] == "s") & ((act is not Activation.GELU) | (np.abs(given[finite]) < 2))
        smallest = np.where(turns, np.spacing(np.float32(1)) / units, 0)
        assert (error <= 8 + smallest).all(), (given[finite][error.argmax()], error.max())
        infinite = np.isinf(right32)
        np.testing.assert_array_equal(actual[infinite], right32[infinite])
        if kernel[0] == "a":
            assert np.isnan(actual[np.isnan(given)]).all()


def elementwise(libraries: Any, kernel: str, given: Array) -> Array:
    out = given.copy()
    link = Operands("LINK", z=out, activation=0)
    operands = packed(link if kernel[0] == "a" else Operands("SLOPES", saved=given, out=out, activation=0, column=0))
    HostDevice(libraries).graph([Planned(kernel, -(-given.size // 256), 256, operands)], Precision.FLOAT32)()
    return out


# --- the checks themselves --------------------------------------------------------------------------------------------

FAULTS = {"strays": "j < cols", "leaves": "not all threads", "skips": "not all threads", "overruns": "size_t(i) < N"}
FAULTY = ("strays", "leaves", "skips", "races", "meets", "forgets", "overruns")


@pytest.fixture(scope="module")
def faulty(libraries: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    library = build("faulty.cpp", tmp_path_factory.mktemp("faulty"), Precision.FLOAT32)

    def run(name: str, *, reverse: bool = False) -> tuple[str, Array]:
        out, error = np.zeros((1, 64), np.float32), ctypes.create_string_buffer(256)
        operands = packed(Operands("fill", out=out, value=0.0))
        where = ctypes.c_void_p(operands.ctypes.data)
        library.run(FAULTY.index(name), 64, where, int(reverse), error, len(error))
        return error.value.decode(), out

    return run


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_ends_the_launch(faulty: Any, name: str) -> None:
    error, _ = faulty(name)
    assert FAULTS[name] in error, error
    assert faulty("meets")[0] == "", "the next launch begins afresh"


def test_a_missing_barrier_and_unwritten_memory_are_visible(faulty: Any) -> None:
    expected = np.arange(64)[None, ::-1]
    for reverse in (False, True):
        np.testing.assert_array_equal(faulty("meets", reverse=reverse)[1], expected)
    assert faulty("races")[1].tobytes() != faulty("races", reverse=True)[1].tobytes()
    assert np.isnan(faulty("forgets")[1]).all()


def test_a_launch_that_fails_names_its_kernel(libraries: Any) -> None:
    bench = Bench(libraries)
    x = bench.matrix(2, 3, np.random.default_rng(0))
    with pytest.raises(LaunchError, match=r"copy: .*op\.h"):
        bench.run("copy", 1, Operands("KEEP", x=x, out=x[:1]), 2)


def test_writes_behind_the_memory_are_found(libraries: Any) -> None:
    device = HostDevice(libraries)
    address = device.allocate(10)
    ctypes.memset(address + 10, 0, 1)
    with pytest.raises(AssertionError, match="behind"):
        device.free(address)
