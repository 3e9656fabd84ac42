"""The CUDA backend without a GPU: its kernels as host C++, its plans as launches, whole trainings on this CPU.

`cuda_device.HostDevice` runs the very kernels with threads as fibers and every access checked, so these are proofs of
indices, barriers, formulas and lowering; of nothing that a GPU's compiler or memory does. Bounds are those of
`agreement`.
"""

from __future__ import annotations

import ctypes
import importlib
import logging
import os
import re
import subprocess
import sys
from dataclasses import replace
from functools import partial
from itertools import pairwise, product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
from numpy.typing import NDArray

from agreement import assert_close, dtypes, inference, reference_of
from cases import CASES, GRAM_CASES, MODEL_CASES, SHAPE_CASES, SPARSE_CASES
from cuda_device import HostDevice, LaunchError, build, check_agreement, compiler, program_on, thinned
from narrows import backends, philox
from narrows.backends import AUTO, Hyper, Probe, cuda, host_backend, resolve
from narrows.backends.cuda import data as data_module
from narrows.backends.cuda.data import CHUNK
from narrows.backends.cuda.launches import Area, View, Writer, tile_of
from narrows.backends.cuda.lowering import LOWER, launches, working_sizes
from narrows.backends.cuda.program import GRAPH_STEPS, Arena, CudaProgram, Planned
from narrows.backends.cuda.table import DOUBLE_TILES, FUNCTORS, KERNELS, LAUNCH_DTYPE, STEP_DTYPE
from narrows.backends.reference import ACTIVATE, DERIVATIVE, ReferenceProgram
from narrows.errors import BackendError
from narrows.ops import OpCode
from narrows.plan import Mode
from narrows.spec import Activation, Corruption, Loss, Precision, Solver
from networks import Case, network
from oracle import SEED, STEP, away_from_kinks

Array = NDArray[Any]


def program_of(libraries: Any, case: Case, dtype: Any = np.float32, *, reverse: bool = False, **bound: Any) -> Any:
    return program_on(HostDevice(libraries, reverse), case, dtype, **bound)


# --- whole programs ---------------------------------------------------------------------------------------------------

BIAS_CASES = tuple(
    # Many rows, whose sums take two passes
    Case(f"rows-{solver.name}", network((5, 3, 5), solver=solver, kl_sparsity=0.1, latent=Activation.SIGMOID), 300, 310)
    for solver in Solver
)
KL_CASES = tuple(
    Case(f"kl-{a.name}", network((7, 4, 7), latent=a, kl_sparsity=0.5, sparsity_target=0.2))
    for a in Activation
    if a is not Activation.SOFTMAX
)
WALK_CASES = tuple(
    # On both sides of bands and parts of columns, of tiles and chunks of rows, and of strips of outputs
    Case(
        f"walk-{m}x{k}x{n}", network((k, n, k), sparse_input=True, gram_decoder=gram, solver=solver, weighted=gram),
        batch=m, rows=m, density=density,
    )
    for gram in (False, True)
    for m, k, n, density, solver in (
        (63, 31, 33, 0.3, Solver.SGD), (65, 32, 32, 0.3, Solver.ADAM), (130, 33, 100, 0.2, Solver.SGD),
        (260, 641, 3, 0.05, Solver.ADAM), (3, 1281, 66, 0.1, Solver.SGD), (7, 64, 130, 0.5, Solver.SGD),
    )
) + tuple(
    # An odd number of rows, and a width from which on blocks have more threads
    Case(
        f"walk-counts-{m}x{n}-{link.name}-{'cell' if cell else 'gene'}",
        network(
            (n, 3, n), output=link, loss=loss, cell_dispersion=cell, weighted=cell, sparse_input=True, library=30.0,
            log_normalize=True,
        ),
        batch=m, rows=2 * m, density=density,
    )
    for m, n, link, loss, cell, density in (
        (3, 4128, Activation.SOFTMAX, Loss.NB, False, 0.05), (5, 97, Activation.EXP, Loss.NB, True, 0.5),
        (33, 64, Activation.SOFTMAX, Loss.ZINB, False, 0.3), (2, 33, Activation.EXP, Loss.ZINB, False, 1.0),
        (3, 65, Activation.SOFTMAX, Loss.ZINB, True, 0.3), (9, 40, Activation.EXP, Loss.POISSON, False, 0.3),
    )
) + (
    Case(
        "walk-shifted", network((70, 100, 70), sparse_input=True, shifted=True, solver=Solver.SGD), batch=7, rows=9,
    ),
)  # fmt: skip
HOST_CASES = (*CASES, *BIAS_CASES, *WALK_CASES)


# Means outside of (0, 1) are held inside by the dtype's own precision.
@pytest.mark.parametrize("case", KL_CASES, ids=str)
def test_sparsity_behind_any_activation(libraries: Any, case: Case) -> None:
    test_programs_agree_with_the_reference(libraries, case, np.float64)


@dtypes
@pytest.mark.parametrize("case", thinned(HOST_CASES, 2), ids=str)
def test_programs_agree_with_the_reference(libraries: Any, case: Case, dtype: Any) -> None:
    case = away_from_kinks(case)
    program = program_of(libraries, case, dtype)
    check_agreement(program, case, dtype)
    program.close()  # checks the guards


def test_every_kernel_that_the_table_names_is_asked_for_or_tested_alone(libraries: Any) -> None:
    asked = {
        launch.kernel
        for case in (*HOST_CASES, *KL_CASES)
        for m in {1, case.batch}
        for mode in Mode
        for launch in (
            *launches(case.plan, m, mode),
            *CudaProgram(case.plan, Precision.FLOAT32, HostDevice(libraries)).steps(mode, m),
        )
    }
    assert asked <= set(KERNELS)
    # What is behind products of cuBLAS, test_cuda_blas asks for.
    elsewhere = ("gemm<", "finish", "to_bfloat16", "group<Gemm<", "stack<16>", "conv")
    alone = {kernel for kernel in KERNELS if kernel.startswith(elsewhere)}
    assert set(KERNELS) - asked - alone <= {"not_finite", "activate<Linear>"}


def bits(libraries: Any, case: Case, *, reverse: bool = False) -> list[bytes]:
    program = program_of(libraries, case, reverse=reverse)
    steps = -(-case.rows // case.batch)
    terms = program.train(np.arange(case.rows), Hyper(SEED, STEP, np.full(steps, 1e-2)))
    parts = [terms, *program.state().values()]
    data = case.data(np.float32)
    parts += [program.apply(data.X, mode, data.target, data.batch) for mode in inference]
    program.close()
    return [np.ascontiguousarray(part).tobytes() for part in parts]


@pytest.mark.parametrize("case", thinned(HOST_CASES[1::2], 2), ids=str)
def test_bits_do_not_depend_on_the_order_of_threads(libraries: Any, case: Case) -> None:
    assert bits(libraries, case) == bits(libraries, case, reverse=True)


@pytest.mark.parametrize(
    "case", [*MODEL_CASES[::6], *SHAPE_CASES[::3], *SPARSE_CASES[::3], *GRAM_CASES[::3], *WALK_CASES[::2]], ids=str
)
def test_rows_do_not_depend_on_their_neighbours(libraries: Any, case: Case) -> None:
    data, single = case.data(np.float32), Case(case.name, case.spec, batch=1, rows=case.rows)
    for mode in inference:
        whole = program_of(libraries, case).apply(data.X, mode, data.target, data.batch)
        one_by_one = program_of(libraries, single).apply(data.X, mode, data.target, data.batch)
        assert whole.tobytes() == one_by_one.tobytes(), mode


@pytest.mark.parametrize("case", MODEL_CASES[::12], ids=str)
def test_bfloat16_rounds_the_factors_that_the_reference_rounds(libraries: Any, case: Case) -> None:
    """A factor near the middle of two may go to either, and a step on is then off by one unit of 2**-8 in a term."""
    case = away_from_kinks(case)
    reference = ReferenceProgram(case.plan, bfloat16=True)
    reference.load(case.state())
    reference.bind(*case.data())
    program = program_of(libraries, case, Precision.BFLOAT16)
    rows = np.arange(min(case.batch, case.rows))
    terms, gradient = program.gradient(rows, SEED, STEP)
    expected_terms, expected = reference.gradient(rows, SEED, STEP)
    np.testing.assert_allclose(terms, expected_terms, rtol=2e-3)
    for name, g in expected.items():
        assert_close(gradient[name], g, 1e-2, name)


@pytest.mark.parametrize("kind", ["csr", "dense"])
def test_sparse_and_dense_rows(libraries: Any, kind: str) -> None:
    """Rows without a stored element, and the last of an array."""
    spec = network((33, 9, 33), loss=Loss.ZINB, output=Activation.SOFTMAX, separate_target=True, library=9.0)
    case = Case("rows", spec, rows=21)
    data = case.data()
    X, target = data.X * (data.X > 2), data.target
    X[[0, 7, 20]] = 0
    reference = reference_of(case)
    reference.bind(X, target)
    given = [sp.csr_array(a.astype(np.float32)) if kind == "csr" else a.astype(np.float32) for a in (X, target)]
    program = program_of(libraries, case, X=given[0], target=given[1])
    rows = np.array([20, 0, 7, 7, 3])
    terms, gradient = program.gradient(rows, SEED, STEP)
    expected_terms, expected = reference.gradient(rows, SEED, STEP)
    np.testing.assert_allclose(terms, expected_terms, rtol=1e-5)
    for name, g in expected.items():
        assert_close(gradient[name], g, 2e-5, name)


# --- random numbers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 2**32 + 1, 2**64 - 1])
@pytest.mark.parametrize("n", [1, 3, 4, 5, 127, 1029])
def test_masks_are_those_of_philox(libraries: Any, seed: int, n: int) -> None:
    m, level = 3, 0.4
    spec = network((n, 1, n), corruption=Corruption.MASKING, corruption_level=level, weighted=True)
    program = program_of(libraries, Case("mask", spec, batch=m, rows=m))
    program.bind(np.ones((m, n), np.float32), weight=np.array([0, 0, 1], np.float32))
    _, gradient = program.gradient(np.arange(m), seed, 11)
    np.testing.assert_array_equal(gradient["W0"][:, 0] != 0, philox.uniform(seed, 0, 11, m, n)[2] >= level)


# --- products, tile by tile -------------------------------------------------------------------------------------------

NAMES = {name: a for a, name in FUNCTORS.items()}
PRODUCTS = tuple(kernel for kernel in KERNELS if kernel.startswith("gemm<"))


class Bench:
    """Matrices in the memory of a device, for a kernel alone; around them is garbage."""

    def __init__(self, libraries: Any) -> None:
        self.device, self.libraries = HostDevice(libraries), libraries
        self.arrays: list[Array] = []

    def matrix(self, rows: int, cols: int, rng: np.random.Generator) -> Array:
        address = self.device.allocate(rows * (cols + 3) * 8)
        array = self.device.view(address, (rows, cols), cols + 3, np.float64)
        array[...] = rng.normal(size=(rows, cols))
        self.arrays.append(array)
        return array

    def run(self, kernel: str, blocks: int, slots: Any, ints: Any, floats: Any, m: int, threads: int = 256) -> None:
        step = np.zeros(1, STEP_DTYPE)
        step["learning_rate"], step["momentum"], step["adam_rate"], step["adam_root"] = 0.1, -1, 0.2, 1.5
        operands = np.zeros((), LAUNCH_DTYPE)
        for to, array in zip(operands["slots"], slots, strict=False):
            if array is not None:
                to["data"], to["rows"], to["cols"] = array.ctypes.data, *array.shape
                to["ld"] = array.strides[0] // 8
        operands["ints"][: len(ints)], operands["floats"][: len(floats)] = ints, floats
        operands["step"], operands["m"], operands["learn"] = step.ctypes.data, m, 1
        self.device.graph([Planned(kernel, blocks, threads, operands)], Precision.FLOAT64)()


@pytest.mark.parametrize("kernel", thinned(PRODUCTS, 3))
@pytest.mark.parametrize("size", [(1, 1, 1), (65, 33, 40), (70, 129, 17), (9, 17, 300)], ids=str)
def test_products_of_any_size(libraries: Any, kernel: str, size: tuple[int, int, int]) -> None:
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
    run = partial(bench.run, kernel, blocks, m=5, threads=tile.threads)
    act = NAMES.get(epilogue.split("<")[-1].rstrip(">"), Activation.LINEAR)
    db, b, mb, vb = (new(1, cols) for _ in range(4)) if name == "WithBias" else (None,) * 4
    close = partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-11)
    if name == "Activate":
        run((A, B, row, out, other), size, ())
        close(other, C + row)
        close(out, ACTIVATE[act](C + row))
    elif name == "Slope":
        run((A, B, other, out), size, (0.7,))
        close(out, C * DERIVATIVE[act](0.7 * other))
    elif epilogue == "WithBias<Store>":
        before, sums = out.copy(), b.copy()
        run((A, B, out, *(None,) * 4, b), (*size, 1, 0), (0.5,))
        close(out[:-1], (before + 0.5 * C)[:-1])
        close(b[0], C[-1])
        run((A, B, out, *(None,) * 4, b), (*size, 0, 1), (1.0,))
        close(out[:-1], C[:-1])
        close(b[0], 2 * C[-1])
        np.testing.assert_array_equal(out[-1], before[-1])
        assert sums.shape == b.shape
    elif name == "Store":
        before = out.copy()
        run((A, B, out), (*size, 1), (0.5,))
        close(out, before + 0.5 * C)
        run((A, B, out), (*size, 0), (1.0,))
        close(out, C)
    elif name == "Link":
        latents = 2
        slopes = new(-(-rows // latents), cols + 4)
        run((A, B, slopes, out, other), (*size, latents, 4), ())
        close(out, C)
        close(other, C * np.repeat(slopes[:, 4:], latents, axis=0)[:rows])
    else:
        adam = "Adam" in epilogue
        second = new(rows, cols)
        for square in (second, *(() if vb is None else (vb,))):
            square[...] = np.abs(square)
        W, m1, m2, before = out.copy(), other.copy(), second.copy(), new(rows, cols)
        last = [None if x is None else x.copy() for x in (db, b, mb, vb)]
        moments = (other, second) if adam else (other, None)
        sums = (db, b, mb, vb if adam else None)
        run((A, B, before, out, *moments, row, *sums), (*size, 1), (0.9, 0.8, 1e-3, 0.3, 0.2, 0.5))

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
    """Deep ones whatever the number of rows; so a row's bits are its own."""
    rows, cols, depth = size
    rng, bench = np.random.default_rng(1), Bench(libraries)
    A, B = bench.matrix(rows, depth, rng), bench.matrix(depth, cols, rng)

    def bits(name: str, A: Array) -> Array:
        out, tile = bench.matrix(A.shape[0], cols, rng), DOUBLE_TILES[name]
        kernel, blocks = f"gemm<{name}, Rows, Turned, Store>", -(-A.shape[0] // tile.rows) * -(-cols // tile.cols)
        bench.run(kernel, blocks, (A, B, out), (A.shape[0], cols, depth), (1.0,), 1, threads=tile.threads)
        return out

    whole = bits("Small", A)
    for name in ("Medium", "Large"):
        np.testing.assert_array_equal(bits(name, A), whole)
    deep = bits("Deep", A)
    for i in range(0, rows, 4):
        np.testing.assert_array_equal(bits("Deep", A[i : i + 1])[0], deep[i])


def test_the_bits_of_rows_do_not_hang_on_how_many_there_are() -> None:
    for cols, depth in product((1, 30, 128, 256, 257, 1000), (1, 128, 129, 784, 5000)):
        tiles = {tile_of((rows, cols, depth), of_batch=True) for rows in (1, 16, 128, 1000, 10**6)}
        assert tiles == {"Deep"} or "Deep" not in tiles


# --- the mathematics of single numbers --------------------------------------------------------------------------------


@pytest.mark.parametrize("act", [a for a in Activation if a is not Activation.SOFTMAX], ids=lambda a: a.name)
def test_activations_over_all_numbers(libraries: Any, act: Activation) -> None:
    """Values and slopes in float32, from subnormal numbers to those that overflow, within 8 units of the last place."""
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
        # Slopes are differences where tanh is near 1 and where gelu turns: the bound is a unit of 1 there.
        turns = (kernel[0] == "s") & ((act is not Activation.GELU) | (np.abs(given[finite]) < 2))
        smallest = np.where(turns, np.spacing(np.float32(1)) / units, 0)
        assert (error <= 8 + smallest).all(), (given[finite][error.argmax()], error.max())
        infinite = np.isinf(right32)
        np.testing.assert_array_equal(actual[infinite], right32[infinite])
        if kernel[0] == "a":
            assert np.isnan(actual[np.isnan(given)]).all()


def elementwise(libraries: Any, kernel: str, given: Array) -> Array:
    out = given.copy()
    operands = np.zeros((), LAUNCH_DTYPE)
    for to, array in zip(operands["slots"], (out,) if kernel[0] == "a" else (given, out), strict=False):
        to["data"], to["rows"], to["cols"], to["ld"] = array.ctypes.data, *array.shape, array.shape[1]
    HostDevice(libraries).graph([Planned(kernel, -(-given.size // 256), 256, operands)], Precision.FLOAT32)()
    return out


# --- lowering ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", thinned(HOST_CASES[::3], 2), ids=str)
def test_operands_lie_inside_their_areas_and_temporaries_apart(case: Case) -> None:
    arena = Arena(case.plan, Precision.FLOAT32)
    for mode in Mode:
        for launch in launches(case.plan, case.batch, mode):
            assert launch.blocks > 0
            assert launch.threads % 32 == 0
            for view in filter(None, launch.slots):
                extent = (view.rows - 1) * view.ld + view.cols
                assert view.offset >= 0
                assert (view.offset + extent) * arena.itemsize <= arena.sizes[view.area], (launch.kernel, view)
        for op in case.plan.ops:
            if op.modes & mode:
                w = Writer(case.plan, case.batch, mode, Precision.FLOAT32)
                LOWER[op.code](w, w.operands(op))
                views = {view for launch in w.launches for view in filter(None, launch.slots)}
                temporary = sorted(view for view in views if view.area is Area.TEMPORARY)
                for one, two in pairwise(temporary):
                    assert one.offset + one.rows * one.ld <= two.offset


@pytest.mark.parametrize("solver", list(Solver), ids=lambda solver: solver.name)
@pytest.mark.parametrize("tied", [False, True])
def test_biases_take_no_launch_of_their_own(solver: Solver, tied: bool) -> None:
    spec = network((33, 9, 33), solver=solver, alpha=0.1)
    if tied:
        spec = replace(spec, layers=(spec.layers[0], replace(spec.layers[1], tied_to=0)))
    plan = Case(f"biases-{tied}", spec).plan
    for mode in (Mode.TRAIN, Mode.GRADIENT):
        kernels = [launch.kernel for launch in launches(plan, 300, mode)]
        # A transposed weight's dz is the left factor, whose rows are those of the sum.
        assert sum(kernel.startswith("colsum<") for kernel in kernels) == tied, kernels
        assert sum("WithBias" in kernel for kernel in kernels) == 2 - tied
        # The sums of a network in bfloat16 are of numbers that are not rounded.
        kernels = [launch.kernel for launch in launches(plan, 300, mode, Precision.BFLOAT16)]
        assert sum(kernel.startswith("colsum<") for kernel in kernels) == 2


GENES = (20000, 128, 32, 128, 20000)


@pytest.mark.parametrize(
    ("spec", "most", "part"),
    [
        (network(GENES, sparse_input=True, gram_decoder=True), 17, 0.35),
        (network(GENES, sparse_input=True, loss=Loss.NB, output=Activation.SOFTMAX, log_normalize=True), 18, 0.65),
    ],
    ids=["mse", "nb"],
)
def test_steps_of_wide_sparse_rows(spec: Any, most: int, part: float) -> None:
    """Launches of a step do not creep up, nor does what it needs besides the slots: a `part` of a dense batch."""
    plan = Case("genes", spec, 512).plan
    assert len(launches(plan, 512, Mode.TRAIN)) <= most
    assert sum(working_sizes(plan).values()) <= part * 512 * 20000


def test_a_graph_is_captured_once_for_each_number_of_rows(libraries: Any) -> None:
    case = Case("graphs", network((7, 4, 7)), batch=8, rows=21)
    program = program_of(libraries, case)
    for step in range(3):
        program.train(np.arange(21), Hyper(SEED, 3 * step, np.full(3, 1e-2)))
    assert set(program._graphs) == {(Mode.TRAIN, 8, 1), (Mode.TRAIN, 5, 1)}
    assert program.device.n_graphs == 2
    program.bind(case.data(np.float32).X * 2)
    program.train(np.arange(16), Hyper(SEED, 9, np.full(2, 1e-2)))
    assert program.device.n_graphs == 2, "data that is bound anew needs no new graph"


def test_steps_of_several_chunks_and_calls_are_the_same(libraries: Any) -> None:
    case = Case("chunks", network((7, 4, 7), corruption=Corruption.GAUSSIAN, corruption_level=0.1), batch=4, rows=20)
    n = 2 * CHUNK + 3
    rows, rates = np.arange(4 * n) % 20, np.linspace(1e-2, 1e-3, n)
    one, two = program_of(libraries, case), program_of(libraries, case)
    together = one.train(rows, Hyper(9, 5, rates))
    apart = [two.train(rows[4 * i : 4 * i + 4], Hyper(9, 5 + i, rates[i : i + 1])) for i in range(n)]
    np.testing.assert_array_equal(together, np.concatenate(apart))
    for name, value in one.state().items():
        assert value.tobytes() == two.state()[name].tobytes()
    assert len(one.train(rows, Hyper(9, 5 + n, rates), lambda: True)) == CHUNK


STREAMED = (
    Case("dense", network((33, 9, 33), separate_target=True, weighted=True), batch=4, rows=41),
    *(case for case in (*SPARSE_CASES[:6], *GRAM_CASES[:3])),
)


@pytest.mark.parametrize("case", STREAMED, ids=str)
def test_data_that_stay_on_the_host_change_no_bit(
    libraries: Any, case: Case, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Chunks of one step and of several; nothing is read or written before the device has come to it."""
    hyper = Hyper(SEED, STEP, np.full(2 * -(-case.rows // case.batch), 1e-2))
    rows = np.concatenate([np.random.default_rng(i).permutation(case.rows) for i in range(2)])
    data, expected = case.data(np.float32), None
    for left, most in ((2**40, data_module.STAGED_BYTES), (0, 1), (0, 3000), (0, data_module.STAGED_BYTES)):
        monkeypatch.setattr(data_module, "STAGED_BYTES", most)
        program = program_on(HostDevice(libraries, late=left == 0, memory_left=left), case)
        with caplog.at_level(logging.INFO, "narrows"):
            program.bind(*data)
        assert ("stay on the host" in caplog.text) == (left == 0)
        terms = program.train(rows, hyper)
        found = [terms, *program.state().values(), *program.gradient(rows[:3], SEED, STEP)[1].values()]
        found += [program.apply(data.X, mode, data.target, data.batch) for mode in inference]
        program.close()
        assert not program.device.memory
        bits = [np.ascontiguousarray(part).tobytes() for part in found]
        expected = expected or bits
        assert bits == expected, (left, most)


def test_chunks_follow_one_another_without_waiting(libraries: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a device that does nothing before it is waited for, two chunks are under way at a time."""
    case = Case("chunks", network((7, 4, 7)), batch=4, rows=20)
    device = HostDevice(libraries, late=True)
    program = program_on(device, case)
    waiting = []
    n = 4 * CHUNK + 1
    program.train(
        np.arange(4 * n) % 20, Hyper(9, 5, np.full(n, 1e-3)), lambda: waiting.append(len(device.to_do)) is not None
    )
    one, *more = waiting
    assert one == 2 + CHUNK // GRAPH_STEPS, "a message, graphs of several steps, and what they report"
    assert more[:-1] == [2 * one] * 3


@pytest.mark.parametrize("where", ["between chunks", "in a chunk"])
def test_a_run_that_ends_early_leaves_nothing_behind(
    libraries: Any, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """What the device still has to do would read what the next run changes, or what has been freed."""
    case = Case("chunks", network((7, 4, 7)), batch=4, rows=20)
    device = HostDevice(libraries, late=True)
    program, n = program_on(device, case), 3 * CHUNK

    def interrupt() -> bool:
        raise KeyboardInterrupt

    hyper = Hyper(9, 5, np.full(n, 1e-3))
    with monkeypatch.context() as during:
        if where == "in a chunk":
            during.setattr(device, "fetch", lambda address, pinned: interrupt())
        with pytest.raises(KeyboardInterrupt):
            program.train(np.arange(4 * n) % 20, hyper, interrupt)
    assert not device.to_do
    assert len(program.train(np.arange(4 * n) % 20, hyper)) == n
    assert program.apply(np.empty((0, 7), np.float32), Mode.ENCODE).shape == (0, 4)


def test_rows_outside_the_data_are_refused(libraries: Any) -> None:
    program = program_of(libraries, Case("rows", network((7, 4, 7))))
    for rows in ([21], [-1], [0, 5, 100]):
        with pytest.raises(IndexError, match="21 rows"):
            program.gradient(np.array(rows))


CSR_CASE = next(c for c in SPARSE_CASES if c.name == "sparse-plain-3")


@pytest.mark.parametrize(
    ("indptr", "indices", "message"),
    [
        ([1, 1, 3], [1, 5, 6], "begin at 0"),
        ([0, 2], [1, 5, 6], "a number more than rows"),
        ([0, 3, 2], [1, 5, 6], "never decrease"),
        ([0, 0, 9], [1, 5, 6], "past the 3 stored values"),
        ([0, 0, 3], [1, 5, 23], "a column outside of the 23"),
        ([0, 0, 3], [-1, 5, 6], "a column outside of the 23"),
    ],
)
def test_damaged_sparse_rows_are_refused(libraries: Any, indptr: Any, indices: Any, message: str) -> None:
    X = sp.csr_array((2, 23), dtype=np.float32)
    X.data, X.indices, X.indptr = np.ones(3, np.float32), np.array(indices, np.int32), np.array(indptr, np.int32)
    X.has_canonical_format = True
    program = program_of(libraries, CSR_CASE)
    with pytest.raises(ValueError, match=message):
        program.bind(X)
    program.close()
    assert not program.device.memory


def test_sources_that_do_not_fit_or_are_missing_are_refused(libraries: Any) -> None:
    program = program_of(libraries, CSR_CASE)
    with pytest.raises(ValueError, match="source 0 has 22 columns, the plan expects 23"):
        program.bind(sp.csr_array((4, 22), dtype=np.float32))
    with pytest.raises(ValueError, match="source 0 is not bound"):
        program.gradient(np.arange(2))
    spec = network((7, 4, 7), separate_target=True, weighted=True)
    program = program_of(libraries, Case("wide", spec))
    X = np.ones((5, 7), np.float32)
    for bound, message in (
        ((X[:, 1:], X, X[:, 0]), "source 0 has 6 columns, the plan expects 7"),
        ((X, X[:, 1:], X[:, 0]), "source 1 has 6 columns, the plan expects 7"),
        ((X, X, X), "source 2 has 7 columns, the plan expects 1"),
    ):
        with pytest.raises(ValueError, match=message):
            program.bind(*bound)
    program.bind(X, X)
    with pytest.raises(ValueError, match="source 2 is not bound"):
        program.train(np.arange(5), Hyper(0, 0, np.zeros(1)))
    with pytest.raises(ValueError, match="source 1 is not bound, expected 5 rows"):
        program.apply(X, Mode.SCORE)
    with pytest.raises(ValueError, match="source 1 has 4 rows, expected 5 rows"):
        program.apply(X, Mode.SCORE, X[1:])
    with pytest.raises(ValueError, match="source 3 has 7 columns, the plan expects 4"):
        program.apply(X, Mode.DECODE)


def test_state_round_trip(libraries: Any) -> None:
    case = next(c for c in MODEL_CASES if c.name == "penalty-all")
    one, two = program_of(libraries, case), program_of(libraries, case)
    one.train(np.arange(case.rows), Hyper(1, 0, np.full(3, 1e-2)))
    two.load(one.state())
    views = two.views()
    for name, value in one.state().items():
        np.testing.assert_array_equal(views[name], value)
    assert one.finite()
    for name, bad in (("W0", np.nan), ("b1", np.inf), ("moment2.W1", -np.inf), ("moment1.b0", np.nan)):
        broken = {name: value.copy() for name, value in views.items()}
        broken[name][-1, -1] = bad
        two.load(broken)
        assert not two.finite(), name
    two.load(one.state())
    assert two.finite()
    assert one.state(optimiser=False).keys() == {name for name in views if "." not in name}
    two.load({name: value for name, value in one.state().items() if "." not in name})
    assert all(not value.any() for name, value in two.state().items() if "." in name)
    handed = one.hand_over()
    assert handed.keys() == views.keys()
    assert not one.device.memory


# --- the checks themselves --------------------------------------------------------------------------------------------

FAULTS = {"strays": "j < cols", "leaves": "not all threads", "skips": "not all threads", "overruns": "size_t(i) < N"}
FAULTY = ("strays", "leaves", "skips", "races", "meets", "forgets", "overruns")


@pytest.fixture(scope="module")
def faulty(libraries: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    library = build("faulty.cpp", tmp_path_factory.mktemp("faulty"), Precision.FLOAT32)

    def run(name: str, *, reverse: bool = False) -> tuple[str, Array]:
        out, error = np.zeros((1, 64), np.float32), ctypes.create_string_buffer(256)
        operands = np.zeros((), LAUNCH_DTYPE)
        slot = operands["slots"][0]
        slot["data"], slot["rows"], slot["cols"], slot["ld"] = out.ctypes.data, 1, 64, 64
        where = ctypes.c_void_p(operands.ctypes.data)
        library.run(FAULTY.index(name), 64, where, int(reverse), error, len(error))
        return error.value.decode(), out

    return run


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_ends_the_launch(faulty: Any, name: str) -> None:
    error, _ = faulty(name)
    assert FAULTS[name] in error, error
    assert faulty("meets")[0] == "", "the next launch begins afresh"


def test_a_missing_barrier_and_unwritten_memory_show(faulty: Any) -> None:
    expected = np.arange(64)[None, ::-1]
    for reverse in (False, True):
        np.testing.assert_array_equal(faulty("meets", reverse=reverse)[1], expected)
    assert faulty("races")[1].tobytes() != faulty("races", reverse=True)[1].tobytes()
    assert np.isnan(faulty("forgets")[1]).all()


def test_a_launch_that_fails_names_its_kernel(libraries: Any) -> None:
    bench = Bench(libraries)
    x = bench.matrix(2, 3, np.random.default_rng(0))
    with pytest.raises(LaunchError, match=r"copy: .*op\.h"):
        bench.run("copy", 1, (x, x[:1]), (), (), 2)


def test_writes_behind_the_memory_are_found(libraries: Any) -> None:
    device = HostDevice(libraries)
    address = device.allocate(10)
    ctypes.memset(address + 10, 0, 1)
    with pytest.raises(AssertionError, match="behind"):
        device.free(address)


def test_views_are_parts_of_an_area() -> None:
    assert View(Area.WORK, 10, 4, 5, 16).part(3, 2, 2, 4) == View(Area.WORK, 13, 2, 2, 4)


# --- probing ----------------------------------------------------------------------------------------------------------


class Runtime:
    """What `probe` asks of CuPy's runtime."""

    def __init__(
        self, driver: int, devices: int = 1, capability: tuple[int, int] = (9, 0), cupy: str = "14.2.0"
    ) -> None:
        self.driver, self.devices, self.capability, self.cupy = driver, devices, capability, cupy

    def driverGetVersion(self) -> int:
        return self.driver

    def runtimeGetVersion(self) -> int:
        return 12090

    def getDeviceCount(self) -> int:
        if self.devices < 0:
            error = ("NoDevice: no CUDA-capable device is detected", "InitializationError: initialization error")
            raise RuntimeError(f"cudaError{error[self.devices + 1]}")
        return self.devices

    def getDevice(self) -> int:
        return self.devices - 1

    def getDeviceProperties(self, device: int) -> dict[str, Any]:
        assert device == self.devices - 1
        return {"name": b"GPU", "major": self.capability[0], "minor": self.capability[1]}

    def getVersion(self) -> tuple[int, int]:
        """Of NVRTC, which is not here if there are more than two devices."""
        if self.devices > 2:
            raise RuntimeError('Failure finding "libnvrtc.so.12"')
        return 12, 9


@pytest.mark.parametrize(
    ("runtime", "reason"),
    [
        (None, r"CuPy is missing: pip install 'narrows\[cuda12\]'"),
        (Runtime(0), "no NVIDIA driver"),
        (Runtime(11080), r"the NVIDIA driver is of CUDA 11\.8: install one of CUDA 12\.0 or newer"),
        (Runtime(12040, 0), "no NVIDIA GPU"),
        (Runtime(12040, -1), r"no usable NVIDIA GPU: RuntimeError: cudaErrorNoDevice: [\w -]+$"),
        (Runtime(12040, -2), "no usable NVIDIA GPU: .* a process forked from one that uses CUDA .* by spawn"),
        (Runtime(13000, 3), r"NVRTC, .* does not load: pip install 'narrows\[cuda12\]'.* Failure finding"),
        (Runtime(13000, cupy="12.3.0"), r"CuPy 12\.3\.0 is too old, it must be 13\.0 or newer: pip install"),
        (Runtime(12040, 1, (7, 0)), r"GPU has compute capability 7\.0: it must be 7\.5 or newer"),
    ],
    ids=str,
)
def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch, runtime: Any, reason: str) -> None:
    with_cupy(monkeypatch, runtime)
    found = cuda.probe()
    assert not found.ok
    assert not found.absent
    assert re.match(reason, found.reason)


def test_a_driver_older_than_cupy_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = Runtime(12040)
    monkeypatch.setattr(runtime, "runtimeGetVersion", lambda: 13020)
    with_cupy(monkeypatch, runtime)
    assert re.match(
        r"the NVIDIA driver is of CUDA 12\.4 and CuPy of CUDA 13: install a newer driver, or have CuPy for CUDA 12, ",
        cuda.probe().reason,
    )


def test_a_gpu_that_is_new_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    with_cupy(monkeypatch, Runtime(12090, 2))
    found = cuda.probe()
    assert found.ok
    assert re.match(r"GPU, CUDA 12\.9, (cuBLAS 12\.|without cuBLAS, wide layers are slower: )", found.reason)
    with_cupy(monkeypatch, Runtime(12090, 2, cupy="14.1.1"))
    found = cuda.probe()
    assert found.ok
    assert found.reason.endswith("; CuPy 14.1.1 compiles the kernels in each process, 14.2 keeps them")


@pytest.mark.parametrize("runtime", [None, Runtime(12090)], ids=["alone", "with CuPy"])
def test_a_machine_without_a_gpu_is_told_of_it_only_if_it_has_cupy(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, runtime: Any
) -> None:
    with_cupy(monkeypatch, runtime, gpu=False)
    found = cuda.probe()
    assert (found.ok, found.absent) == (False, runtime is None)
    check_what_auto_says(monkeypatch, caplog, "INFO" if runtime is None else "WARNING", found.reason)


@pytest.mark.parametrize("value", ["", " ", "-1", "NoDevFiles"])
def test_a_gpu_that_is_hidden_is_not_looked_for(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, value: str
) -> None:
    with_cupy(monkeypatch, Runtime(12090))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    assert cuda.probe() == Probe(False, f"CUDA_VISIBLE_DEVICES={value!r} hides every GPU", absent=True)
    check_what_auto_says(monkeypatch, caplog, "INFO", "hides every GPU")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert cuda.probe().ok


def test_a_gpu_that_cannot_be_used_is_told_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with_cupy(monkeypatch, None)
    check_what_auto_says(monkeypatch, caplog, "WARNING", "pip install 'narrows[cuda12]'")
    with pytest.raises(BackendError, match=r"backend='cuda' cannot run here: CuPy is missing: pip install"):
        resolve("cuda")
    monkeypatch.setenv("NARROWS_BACKEND", "cuda")
    with pytest.raises(BackendError, match=r"NARROWS_BACKEND='cuda' cannot run here: CuPy is missing"):
        resolve("auto")
    assert host_backend.__wrapped__() in AUTO[1:]


def check_what_auto_says(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, level: str, reason: str
) -> None:
    monkeypatch.delenv("NARROWS_BACKEND", raising=False)
    monkeypatch.setattr(backends, "_announced", set())
    with caplog.at_level("INFO", "narrows"):
        for _ in range(3):
            assert resolve("auto") in AUTO[1:]
    (record,) = caplog.records
    assert record.levelname == level
    assert "skipped cuda" in record.message
    assert reason in record.message


def test_auto_takes_the_gpu_first(monkeypatch: pytest.MonkeyPatch) -> None:
    with_cupy(monkeypatch, Runtime(12090))
    monkeypatch.delenv("NARROWS_BACKEND", raising=False)
    assert AUTO == ("cuda", "cpp", "numba")
    assert resolve("auto") == "cuda"
    # A layer of the CPU is worth no trip.
    assert host_backend.__wrapped__() in AUTO[1:]


def build_driver(folder: Path, answer: int) -> str:
    """A library with the driver's first function."""
    source, library = folder / f"driver{answer}.c", folder / f"driver{answer}.so"
    source.write_text(f"int cuInit(unsigned flags) {{ (void)flags; return {answer}; }}\n")
    subprocess.run([compiler(), "-shared", "-fPIC", "-x", "c", str(source), "-o", str(library)], check=True)
    return str(library)


def test_looking_for_a_gpu_imports_nothing_and_takes_no_time(tmp_path: Path) -> None:
    assert not cuda.has_gpu(str(tmp_path), "no such driver")
    for answer in (100, 0):  # no device; success
        library = build_driver(tmp_path, answer)
        assert cuda.has_gpu(str(tmp_path / "none"), library) == (answer == 0)
    (tmp_path / "nvidiactl").touch()
    assert cuda.has_gpu(str(tmp_path), "no such driver")
    if cuda.has_gpu():
        pytest.skip("this machine has a GPU")
    code = """
import sys, time
from narrows.backends import probe, resolve
probe("cpp"), probe("numba"), resolve("auto")
begin = time.perf_counter()
for _ in range(10):
    resolve("auto")
print((time.perf_counter() - begin) / 10, "cupy" in sys.modules, "narrows.backends.cuda.program" in sys.modules)
"""
    environment = {name: value for name, value in os.environ.items() if name != "NARROWS_BACKEND"}
    environment["PYTHONPATH"] = os.pathsep.join(str(Path(p).resolve()) for p in sys.path if p)
    found = subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True)
    seconds, *imported = found.stdout.split()
    assert imported == ["False", "False"]
    assert float(seconds) < 1e-3


def with_cupy(monkeypatch: pytest.MonkeyPatch, runtime: Any, *, gpu: bool = True) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(cuda, "has_gpu", lambda: gpu)
    cupy = None
    if runtime is not None:
        cupy = SimpleNamespace(__version__=runtime.cupy, cuda=SimpleNamespace(runtime=runtime, nvrtc=runtime))
    monkeypatch.setattr(cuda, "find_spec", lambda name: cupy)
    found = importlib.import_module
    monkeypatch.setattr(importlib, "import_module", lambda name, *of: cupy if name == "cupy" else found(name, *of))


def test_every_op_has_launches() -> None:
    assert cuda.own_ops() == frozenset(OpCode)
