"""The CUDA backend without a GPU: whole trainings with its kernels as host C++.

`cuda_device.HostDevice` runs the real kernels with threads as fibers, and checks every access. So these tests prove
indices, barriers, formulas and launches, but nothing on a GPU's compiler or memory. `agreement` has the bounds. Single
kernels are in `test_kernels`, the behaviour of programs in `test_program`.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise, product
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp

from agreement import assert_close, inference, reference_of
from cases import CASES, GRAM_CASES, MODEL_CASES, SHAPE_CASES, SPARSE_CASES
from cuda_device import HostDevice, check_agreement, named, on_host, thinned
from narrows.backends import Hyper, cuda
from narrows.backends.cuda.emit import LOWER, launches, working_sizes
from narrows.backends.cuda.launches import Area, View, Writer
from narrows.backends.cuda.memory import Arena
from narrows.backends.cuda.program import CudaProgram
from narrows.backends.cuda.table import KERNELS
from narrows.backends.reference import ReferenceProgram
from narrows.plan.ops import OpCode
from narrows.plan.plan import Mode
from narrows.plan.spec import Activation, Corruption, Loss, Precision, Solver
from narrows.random import philox
from networks import Case, network
from oracle import SEED, STEP, away_from_kinks

# --- whole programs ---------------------------------------------------------------------------------------------------

BIAS_CASES = tuple(
    # Many rows: sums take two passes
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
    # An odd number of rows, and a width with more threads per block
    Case(
        f"walk-counts-{m}x{n}-{link.name}-{'cell' if cell else 'gene'}",
        network(
            (n, 3, n), output=link, loss=loss, cell_dispersion=cell, weighted=cell, sparse_input=True, size_sum=30.0,
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


# Means are clipped to (0, 1) with the precision of the dtype.
@pytest.mark.parametrize("case", KL_CASES, ids=str)
def test_sparsity_behind_any_activation(libraries: Any, case: Case) -> None:
    test_programs_agree_with_the_reference(libraries, case, np.float64)


# The kernels of float64 differ in their tiles alone: a third of the cases shows those.
PROGRAMS = [(case, np.float32) for case in HOST_CASES] + [(case, np.float64) for case in HOST_CASES[::3]]


@pytest.mark.parametrize(("case", "dtype"), thinned(PROGRAMS, 3), ids=named)
def test_programs_agree_with_the_reference(libraries: Any, case: Case, dtype: Any) -> None:
    case = away_from_kinks(case)
    program = on_host(libraries, case, dtype)
    check_agreement(program, case, dtype)
    program.close()  # checks the guards


def test_every_kernel_of_the_table_is_used_or_tested_alone(libraries: Any) -> None:
    asked = set()
    for case in (*HOST_CASES, *KL_CASES):
        program = CudaProgram(case.plan, Precision.FLOAT32, HostDevice(libraries))
        for m, mode in product({1, case.batch}, Mode):
            asked |= {launch.kernel for launch in (*launches(case.plan, m, mode), *program.steps(mode, m))}
    assert asked <= set(KERNELS)
    # test_blas asks for the launches after products by cuBLAS.
    elsewhere = ("gemm<", "finish", "to_bfloat16", "group<Gemm<", "stack<16>", "conv")
    alone = {kernel for kernel in KERNELS if kernel.startswith(elsewhere)}
    assert set(KERNELS) - asked - alone <= {"not_finite", "activate<Linear>"}


def bits(libraries: Any, case: Case, *, reverse: bool = False) -> list[bytes]:
    program = on_host(libraries, case, reverse=reverse)
    steps = -(-case.rows // case.batch)
    terms = program.train(np.arange(case.rows), Hyper(SEED, STEP, np.full(steps, 1e-2)))
    parts = [terms, *program.state().values()]
    data = case.data(np.float32)
    parts += [program.apply(data.X, mode, data.target, data.condition) for mode in inference]
    program.close()
    return [np.ascontiguousarray(part).tobytes() for part in parts]


@pytest.mark.parametrize("case", thinned(HOST_CASES[1::2], 3), ids=str)
def test_bits_do_not_depend_on_the_order_of_threads(libraries: Any, case: Case) -> None:
    assert bits(libraries, case) == bits(libraries, case, reverse=True)


@pytest.mark.parametrize(
    "case", [*MODEL_CASES[::8], *SHAPE_CASES[::5], *SPARSE_CASES[::3], *GRAM_CASES[::4], *WALK_CASES[::2]], ids=str
)
def test_rows_do_not_depend_on_their_neighbours(libraries: Any, case: Case) -> None:
    data, single = case.data(np.float32), Case(case.name, case.spec, batch=1, rows=case.rows)
    for mode in inference:
        whole = on_host(libraries, case).apply(data.X, mode, data.target, data.condition)
        one_by_one = on_host(libraries, single).apply(data.X, mode, data.target, data.condition)
        assert whole.tobytes() == one_by_one.tobytes(), mode


@pytest.mark.parametrize("case", MODEL_CASES[::12], ids=str)
def test_bfloat16_rounds_the_factors_that_the_reference_rounds(libraries: Any, case: Case) -> None:
    """A factor near the middle may be rounded either way; a term of the next layer is then off by a unit of 2**-8."""
    case = away_from_kinks(case)
    reference = ReferenceProgram(case.plan, bfloat16=True)
    reference.load(case.state())
    reference.bind(*case.data())
    program = on_host(libraries, case, Precision.BFLOAT16)
    rows = np.arange(min(case.batch, case.rows))
    terms, gradient = program.gradient(rows, SEED, STEP)
    expected_terms, expected = reference.gradient(rows, SEED, STEP)
    np.testing.assert_allclose(terms, expected_terms, rtol=2e-3)
    for name, g in expected.items():
        assert_close(gradient[name], g, 1e-2, name)


@pytest.mark.parametrize("kind", ["csr", "dense"])
def test_sparse_and_dense_rows(libraries: Any, kind: str) -> None:
    """Rows without stored elements, and the last row of an array."""
    spec = network((33, 9, 33), loss=Loss.ZINB, output=Activation.SOFTMAX, separate_target=True, size_sum=9.0)
    case = Case("rows", spec, rows=21)
    data = case.data()
    X, target = data.X * (data.X > 2), data.target
    X[[0, 7, 20]] = 0
    reference = reference_of(case)
    reference.bind(X, target)
    given = [sp.csr_array(a.astype(np.float32)) if kind == "csr" else a.astype(np.float32) for a in (X, target)]
    program = on_host(libraries, case, X=given[0], target=given[1])
    rows = np.array([20, 0, 7, 7, 3])
    terms, gradient = program.gradient(rows, SEED, STEP)
    expected_terms, expected = reference.gradient(rows, SEED, STEP)
    np.testing.assert_allclose(terms, expected_terms, rtol=1e-5)
    for name, g in expected.items():
        assert_close(gradient[name], g, 2e-5, name)


# --- random numbers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 3, 4, 5, 127, 1029])
def test_masks_are_those_of_philox(libraries: Any, n: int) -> None:
    m, level = 3, 0.4
    spec = network((n, 1, n), corruption=Corruption.MASKING, corruption_level=level, weighted=True)
    program = on_host(libraries, Case("mask", spec, batch=m, rows=m))
    program.bind(np.ones((m, n), np.float32), weight=np.array([0, 0, 1], np.float32))
    for seed in (0, 2**32 + 1, 2**64 - 1):
        found = program.gradient(np.arange(m), seed, 11)[1]["W0"][:, 0] != 0
        np.testing.assert_array_equal(found, philox.uniform(seed, 0, 11, m, n)[2] >= level, err_msg=f"seed {seed}")


# --- lowering ---------------------------------------------------------------------------------------------------------


def test_every_op_has_launches() -> None:
    assert cuda.own_ops() == frozenset(OpCode)


def test_views_are_parts_of_an_area() -> None:
    assert View(Area.WORK, 10, 4, 5, 16).part(3, 2, 2, 4) == View(Area.WORK, 13, 2, 2, 4)


@pytest.mark.parametrize("case", thinned(HOST_CASES[::3], 2), ids=str)
def test_operands_lie_inside_their_areas_and_temporaries_apart(case: Case) -> None:
    arena = Arena(case.plan, Precision.FLOAT32)
    for mode in Mode:
        for launch in launches(case.plan, case.batch, mode):
            assert launch.blocks > 0
            assert launch.threads % 32 == 0
            for view in launch.views.values():
                extent = (view.rows - 1) * view.ld + view.cols
                assert view.offset >= 0
                assert (view.offset + extent) * arena.itemsize <= arena.sizes[view.area], (launch.kernel, view)
        for op in case.plan.ops:
            if op.modes & mode:
                w = Writer(case.plan, case.batch, mode, Precision.FLOAT32)
                LOWER[op.code](w, w.operands(op))
                views = {view for launch in w.launches for view in launch.views.values()}
                temporary = sorted(view for view in views if view.area is Area.TEMPORARY)
                for one, two in pairwise(temporary):
                    assert one.offset + one.rows * one.ld <= two.offset


@pytest.mark.parametrize("solver", list(Solver), ids=lambda solver: solver.name)
@pytest.mark.parametrize("tied", [False, True])
def test_biases_need_no_launch_of_their_own(solver: Solver, tied: bool) -> None:
    spec = network((33, 9, 33), solver=solver, alpha=0.1)
    if tied:
        spec = replace(spec, layers=(spec.layers[0], replace(spec.layers[1], tied_to=0)))
    plan = Case(f"biases-{tied}", spec).plan
    for mode in (Mode.TRAIN, Mode.GRADIENT):
        kernels = [launch.kernel for launch in launches(plan, 300, mode)]
        # For a transposed weight dz is the left factor, and its rows are the rows of the sum.
        assert sum(kernel.startswith("colsum<") for kernel in kernels) == tied, kernels
        assert sum("WithBias" in kernel for kernel in kernels) == 2 - tied
        # A network in bfloat16 sums numbers that are not rounded.
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
    """The launches of a step and its memory besides the slots, as a `part` of a dense batch, do not grow."""
    plan = Case("genes", spec, 512).plan
    assert len(launches(plan, 512, Mode.TRAIN)) <= most
    assert sum(working_sizes(plan).values()) <= part * 512 * 20000
