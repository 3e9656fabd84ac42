"""The executable specification: every op as the formula it stands for, in NumPy.

Promises: float64 by default, each op readable on its own, no cleverness; correct for any plan `lower` writes. Other
backends are right when they agree with this one.
Never: chosen by ``backend="auto"``; fast.

The ops are written over a dtype and the arrays they are handed, so the generic ops of other array backends are these.
Names follow `ops.SIGNATURES`; ``m`` is the number of rows of the batch at hand. A module has a family of ops; reading
order: `run` (what an op is given), `activations`, `dense`, then any, and `program` (a plan run op by op).
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
    """A result is written while operands are still read."""
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
    return Probe(True, "NumPy, float64; for checking, never chosen by itself")


def compile(plan: Plan, *, precision: Precision, n_threads: int) -> ReferenceProgram:
    """The reference computes in float64 whatever the precision asked for: it is the yardstick. Of bfloat16 it takes
    the rounding of the products' factors."""
    return ReferenceProgram(plan, np.float64, bfloat16=precision is Precision.BFLOAT16)
