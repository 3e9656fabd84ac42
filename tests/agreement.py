"""What it is for a program to agree with the float64 reference: the same case on both, and the bounds.

A whole model is held to one unit of rounding for each term on its longest chain of sums (`tolerance`), relative to the
largest element of each array: a layer's error passes through the next multiplied by weights and slopes of about 1, so
errors add up; the largest element stands for |X||W|, which cancellation may leave far above the result.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from cases import CASES
from narrows.backends import compile_plan
from narrows.backends.reference import ReferenceProgram
from narrows.plan import Mode
from networks import Case
from op_cases import OP_CASES

Array = NDArray[Any]

inference = (Mode.ENCODE, Mode.RECONSTRUCT, Mode.SCORE)

dtypes = pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=["f32", "f64"])

all_cases = pytest.mark.parametrize("case", CASES, ids=str)

# Of the many numbers of conv-pool and conv-stride some always lie next to a kink; small convolutions stand for them.
clear_cases = tuple(case for case in OP_CASES if not case.name.startswith("conv-"))


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
