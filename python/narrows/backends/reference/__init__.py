"""The executable specification: every op as its formula, in NumPy.

Promises: computes in float64 by default; each op is readable on its own; correct for any plan of `lower`. Other
backends must agree with this one.
Never: chosen by ``backend="auto"``; fast.

The ops work in the dtype of their arrays, so other array backends reuse them. Names follow `ops.SIGNATURES`; ``m`` is
the number of rows in the current step. Each module holds a family of ops. Reading order: `run` (what every op gets),
`activations`, `dense`, then any, and `program` (runs a plan op by op).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ...plan.ops import OpCode
from ...plan.plan import Plan
from ...plan.spec import Activation, Precision
from .. import Probe
from . import boltzmann, contractive, counts, dense, gram, images, sparse, updates, variational  # noqa: F401 (they enter their ops in OPS)
from .activations import ACTIVATE, CURVATURE, DERIVATIVE, LEAK
from .program import ReferenceProgram
from .run import OPS, Array, Run, bfloat16

__all__ = [
    "ACTIVATE",
    "CURVATURE",
    "DERIVATIVE",
    "LEAK",
    "OPS",
    "Array",
    "ReferenceProgram",
    "Run",
    "bfloat16",
    "compile",
    "probe",
]

# --- single layers: the protocol of `narrows.functional` (see backends/cpp.py), in the operands' precision ----------


def _check_apart(results: dict[str, Any], operands: dict[str, Any]) -> None:
    """Raise ValueError if a result shares memory with an operand, which is still read while the result is written."""
    given = [(name, array) for name, array in (results | operands).items() if isinstance(array, np.ndarray)]
    for i, (name, array) in enumerate(given):
        for other_name, other in given[i + 1 :]:
            if name in results and np.shares_memory(array, other):
                raise ValueError(f"{name} must not share memory with {other_name}")


def dense_layer(X: Any, W: Any, b: Any, activation: int, out: Any, Z: Any, n_threads: int) -> None:
    _check_apart({"out": out, "Z": Z}, {"X": X, "W": W, "b": b})
    z = X @ W if b is None else X @ W + b
    if Z is not None:
        Z[...] = z
    out[...] = ACTIVATE[Activation(activation)](z)


def dense_backward_layer(
    dA: Any, X: Any, W: Any, saved: Any, activation: int, dX: Any, dW: Any, db: Any, n_threads: int
) -> None:
    _check_apart({"dX": dX, "dW": dW, "db": db}, {"dA": dA, "X": X, "W": W, "A": saved})
    dZ = dA * DERIVATIVE[Activation(activation)](saved)
    if dX is not None:
        dX[...] = dZ @ W.T
    if dW is not None:
        dW[...] = X.T @ dZ
    if db is not None:
        np.sum(dZ, axis=0, out=db)


def own_ops() -> frozenset[OpCode]:
    return frozenset(OPS)


def probe() -> Probe:
    return Probe(True, "NumPy, float64; for checks, never chosen automatically")


def compile(plan: Plan, *, precision: Precision, n_threads: int) -> ReferenceProgram:
    """Compile in float64 whatever the precision; bfloat16 still rounds the factors of matrix products."""
    return ReferenceProgram(plan, np.float64, bfloat16=precision is Precision.BFLOAT16)
