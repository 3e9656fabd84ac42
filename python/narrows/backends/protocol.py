"""What a backend is: the probe, the compiled program, and what changes from step to step.

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
    """Whether it cannot because this machine has not got what it is for, which nobody need be told."""
    denied: bool = False
    """Whether it cannot because of what the environment asks of it, for which no other stands in."""


@dataclass(frozen=True)
class Hyper:
    """What changes from step to step.

    Attributes
    ----------
    seed : int
        Key of the random numbers, below 2**64.
    step : int
        Updates done before this call; counts on inside it.
    learning_rate : ndarray of float64, shape (n_steps,)
    kl_factor : ndarray of float64, shape (n_steps,), optional
        What the KL term of a variational network is multiplied with besides its weight; 1 by default.
    momentum : ndarray of float64, shape (n_steps,), optional
        Of sgd, in place of the plan's.
    """

    seed: int
    step: int
    learning_rate: NDArray[np.float64]
    kl_factor: NDArray[np.float64] | None = None
    momentum: NDArray[np.float64] | None = None


State = dict[str, NDArray[Any]]
"""Parameters by slot name (``W0``, ``b0``, ...) and optimiser state (``moment1.W0``, ``moment2.W0``, ...)."""


class Program(Protocol):
    """A compiled plan with its own memory. Not for two threads at once."""

    plan: Plan

    def load(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Set parameters, and optimiser state where present (zero otherwise)."""

    def state(self, *, optimiser: bool = True) -> State:
        """Copies of parameters and, if it is wanted, of optimiser state."""

    def views(self) -> State:
        """Parameters and optimiser state, not copied if they lie in this machine's memory, where they change with the
        program; valid until it is closed."""

    def finite(self) -> bool:
        """Whether all parameters and all optimiser state are finite."""

    def hand_over(self) -> State:
        """Close the program and return its parameters and optimiser state, without a copy where that takes less
        memory."""

    def bind(self, X: Any, target: Any = None, weight: Any = None, condition: Any = None) -> None:
        """Set the data that `train` and `gradient` take their rows from: ndarray (any strides) or CSR; X may be
        `Shifted` rows of such if the plan is of shifted rows.

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
        """Run an inference mode over all rows of X; DECODE and LIKELIHOOD take latent codes for X. A decoder that is
        conditioned on batches needs `condition`, as in `bind`."""

    def close(self) -> None:
        """Free the memory; further calls are errors."""


def copies(views: State, optimiser: bool) -> State:
    """Of parameters and, if it is wanted, of optimiser state."""
    return {name: view.copy() for name, view in views.items() if optimiser or "." not in name}


def all_finite(*arrays: NDArray[Any]) -> bool:
    """Whether there is neither NaN nor infinity in them."""
    # A sum is finite only if every value is, and needs no temporary; whether it overflowed is asked then.
    with np.errstate(over="ignore", invalid="ignore"):
        return all(math.isfinite(array.sum()) or bool(np.isfinite(array).all()) for array in arrays)
