"""The interface of a backend: the probe, the compiled program, and the values that change from step to step.

A backend is a module with ``probe() -> Probe``, ``compile(plan, *, precision, n_threads) -> Program`` and
``own_ops() -> frozenset[OpCode]``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from ..plan.plan import Mode, Plan

__all__ = ["Hyper", "Probe", "Program", "State", "all_finite", "copies"]


class Probe(NamedTuple):
    """Whether a backend can run here, and why (not)."""

    ok: bool
    reason: str
    absent: bool = False
    """True if the hardware is absent; that is not worth a warning."""
    denied: bool = False
    """True if an environment variable asks for something impossible; no other backend replaces it then."""


@dataclass(frozen=True)
class Hyper:
    """Values that change from step to step.

    Attributes
    ----------
    seed : int
        Key of the random numbers, below 2**64.
    step : int
        Updates done before this call.
    learning_rate : ndarray of float64, shape (n_steps,)
    kl_factor : ndarray of float64, shape (n_steps,), optional
        Another factor of the KL term of a variational network; 1 by default.
    momentum : ndarray of float64, shape (n_steps,), optional
        Momentum of sgd, instead of the plan's.
    """

    seed: int
    step: int
    learning_rate: NDArray[np.float64]
    kl_factor: NDArray[np.float64] | None = None
    momentum: NDArray[np.float64] | None = None


State = dict[str, NDArray[Any]]
"""Parameters by slot name (``W0``, ``b0``, ...) and optimiser state (``moment1.W0``, ``moment2.W0``, ...)."""


class Program(Protocol):
    """A compiled plan with its own memory. Only one thread at a time may use it."""

    plan: Plan

    def load(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Set parameters, and optimiser state where present (zero otherwise)."""

    def state(self, *, optimiser: bool = True) -> State:
        """Copies of the parameters and, if `optimiser`, of the optimiser state."""

    def views(self) -> State:
        """Parameters and optimiser state, without a copy if they are in host memory.

        Such views change with the program, and are valid until it is closed.
        """

    def finite(self) -> bool:
        """Whether all parameters and all optimiser state are finite."""

    def hand_over(self) -> State:
        """Close the program and return its parameters and optimiser state, without a copy if that saves memory."""

    def bind(self, X: Any, target: Any = None, weight: Any = None, condition: Any = None) -> None:
        """Set the data for `train` and `gradient`: ndarrays with any strides, or CSR.

        X may be `Shifted` if the plan has `Data.shifted`.

        `condition` holds the batch number of each row, from 0, if the decoder is conditioned on batches.
        """

    def train(
        self, rows: NDArray[np.int64], hyper: Hyper, poll: Callable[[], bool] | None = None
    ) -> NDArray[np.float64]:
        """One update for each consecutive `plan.batch_rows` of `rows` (the last may be shorter).

        `poll` is called about every 50 ms between two steps; when it returns True, training stops there.

        Returns
        -------
        ndarray, shape (steps done, len(plan.terms))
        """

    def gradient(self, rows: NDArray[np.int64], seed: int = 0, step: int = 0) -> tuple[NDArray[np.float64], State]:
        """Terms and gradients of one training step, without the update."""

    def apply(self, X: Any, mode: Mode, target: Any = None, condition: Any = None) -> NDArray[Any]:
        """Run an inference mode over all rows of X. DECODE and LIKELIHOOD take latent codes instead of X.

        A decoder that is conditioned on batches needs `condition`, as in `bind`.
        """

    def close(self) -> None:
        """Free the memory; further calls are errors."""


def copies(views: State, optimiser: bool) -> State:
    """Copies of the parameters and, if `optimiser`, of the optimiser state."""
    return {name: view.copy() for name, view in views.items() if optimiser or "." not in name}


def all_finite(*arrays: NDArray[Any]) -> bool:
    """Whether the arrays hold neither NaN nor infinity."""
    # A finite sum proves that every value is finite, without a temporary. An infinite sum may be an overflow.
    with np.errstate(over="ignore", invalid="ignore"):
        return all(math.isfinite(array.sum()) or bool(np.isfinite(array).all()) for array in arrays)
