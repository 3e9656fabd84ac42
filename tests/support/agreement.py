"""How a program is compared with the float64 reference: both run the same case, and the difference has a bound.

The bound of a whole model is one unit of rounding for each term on its longest chain of sums (`tolerance`). It is
relative to the largest element of each array. Weights and slopes are about 1, so the errors of layers add up. The
largest element stands for |X||W|, which is far above the result where terms cancel.

The results of the reference are kept: every backend and precision is compared with the same numbers.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from cases import CASES
from narrows.backends import Hyper, compile_plan
from narrows.backends.reference import ReferenceProgram
from narrows.plan.plan import FROM_CODES, Mode
from narrows.plan.spec import Precision
from networks import Case
from op_cases import OP_CASES
from oracle import SEED, STEP

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
    program.bind(bound.get("X", data.X), bound.get("target", data.target), data.weight, data.condition)
    return program


def reference_of(case: Case) -> ReferenceProgram:
    program = ReferenceProgram(case.plan)
    program.load(case.state())
    program.bind(*case.data())
    return program


def first_rows(case: Case) -> Array:
    """The rows of the gradient: the first batch, backwards."""
    return np.arange(min(case.batch, case.rows))[::-1].copy()


@cache
def expected_gradient(case: Case) -> tuple[Array, dict[str, Array]]:
    """Terms and gradients of `first_rows`."""
    return reference_of(case).gradient(first_rows(case), SEED, STEP)


def epoch(case: Case) -> tuple[Array, Hyper]:
    """A few steps: all rows once, in another order."""
    rates = np.linspace(2e-3, 1e-3, -(-case.rows // case.batch))
    return np.random.default_rng(1).permutation(case.rows), Hyper(SEED, STEP, rates)


@cache
def expected_epoch(case: Case) -> tuple[Array, dict[str, Array]]:
    """Terms of the steps of `epoch`, and the parameters after it."""
    program = reference_of(case)
    return program.train(*epoch(case)), program.state(optimiser=False)


@cache
def expected_outputs(case: Case, *, trained: bool = False) -> dict[Mode, Array]:
    """The output of every mode of inference, before or after `epoch`. Decoders get the codes of the reference."""
    program, data = reference_of(case), case.data()
    if trained:
        program.load(expected_epoch(case)[1])
    from_rows = set(case.plan.outputs) - set(FROM_CODES)
    outputs = {mode: program.apply(data.X, mode, data.target, data.condition) for mode in from_rows}
    target = data.X if data.target is None else data.target
    for mode in set(case.plan.outputs) & set(FROM_CODES):
        outputs[mode] = program.apply(outputs[Mode.ENCODE], mode, target, data.condition)
    return outputs


def tolerance(case: Case, dtype: Any) -> float:
    """Relative to the largest element; see the top of this file. In float64 a round 1e-9."""
    if np.dtype(dtype) == np.float64:
        return 1e-9
    chain = sum(layer.n_in + 8 for layer in case.spec.layers) + case.batch
    # The derivatives on noisy input differ from those on the input by about the noise, and their rounding errors do not
    # shrink with the difference.
    penalties = case.spec.training.penalties
    cancellation = 1 / penalties.hessian_std if penalties.contractive_hessian > 0 else 1.0
    return chain * cancellation * float(np.finfo(np.float32).eps) / 2


def assert_close(actual: Array, expected: Array, relative: float, what: str = "") -> None:
    assert actual.shape == expected.shape, what
    scale = float(np.abs(expected).max(initial=0.0))
    error = float(np.abs(actual.astype(np.float64) - expected).max(initial=0.0))
    assert error <= relative * scale + 1e-30, f"{what}: {error:.3g} off, allowed {relative * scale:.3g}"


def bits(case: Case, *, dtype: Any = np.float32, n_threads: int = 1, **options: Any) -> bytes:
    """Everything a program computes, in bytes."""
    from narrows.backends import cpp as module

    precision = Precision.of(dtype)
    program = module.compile(case.plan, precision=precision, n_threads=n_threads, **options)
    program.load(case.state(precision.dtype))
    data = case.data(precision.dtype)
    program.bind(*data)
    steps = -(-case.rows // case.batch)
    terms = program.train(np.arange(case.rows), Hyper(SEED, STEP, np.full(steps, 1e-2)))
    parts = [terms, *program.state().values()]
    parts += [program.apply(data.X, mode, data.target, data.condition) for mode in inference]
    return b"".join(np.ascontiguousarray(part).tobytes() for part in parts)
