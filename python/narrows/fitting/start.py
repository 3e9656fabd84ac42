"""The parameters that training begins with.

The same specification and seed give the same first weights, bit for bit, on every backend.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..backends import State
from ..plan.ops import DISPERSION_PACE, LOG_DISPERSION_LIMIT
from ..plan.spec import Activation, NetworkSpec
from ..random.weights import initial_coupling, initial_weight
from .table import Table, Totals

__all__ = ["FIRST_DISPERSION", "Start", "begin_counts", "dispersions", "initial_state"]

FIRST_DISPERSION = 5.0
"""First inverse dispersion of counts: typical of genes within one kind of cell. Moments of the data are too small,
because they include the differences between kinds; with smaller values codes learn more slowly at first.
"""
FIRST_DROPOUT = -3.0
"""First logit of an additional zero (zinb): one in twenty."""


class Start(NamedTuple):
    """What the first parameters of a network may depend on."""

    spec: NetworkSpec
    table: Table
    rows: NDArray[np.int64]
    """The rows to train on."""
    seed: int
    block_bytes: int
    """Bytes of a source that are in memory at once."""
    stop: Callable[[], str | None] | None
    """`Checkpoint.stop`, if there is a checkpoint."""


def begin_counts(spec: NetworkSpec, state: State, totals: Totals) -> None:
    """Set the output biases: each row begins as the mean of all rows, with the first dispersion and few extra zeros."""
    last, n = spec.layers[-1], spec.n_outputs
    if last.convolution is not None:  # it has one bias for each filter, not for each feature
        return
    bias = state[f"b{len(spec.layers) - 1}"][0]
    bias[:n] = np.log(totals.shares * (spec.data.size_sum if last.activation is Activation.EXP else 1.0))
    if spec.cell_dispersion:
        bias[n : 2 * n] = math.log(FIRST_DISPERSION)
    if spec.loss.info.heads > 1:
        bias[-n:] = FIRST_DROPOUT


def initial_state(spec: NetworkSpec, seed: int, dtype: Any = np.float64) -> State:
    """Random weights; biases are zero, learned variances one, inverse dispersions `FIRST_DISPERSION`."""
    state: State = {}
    for i, layer in enumerate(spec.layers):
        n_in, n_out = layer.weight_shape
        state[f"b{i}"] = np.zeros((1, n_out), dtype)
        if layer.tied_to is None and spec.training.gibbs is not None:
            state[f"W{i}"] = initial_coupling(n_in, n_out, seed, dtype)
        elif layer.tied_to is None:
            fans = None if layer.convolution is None else layer.convolution.fans
            state[f"W{i}"] = initial_weight(n_in, n_out, layer.activation, seed, i, dtype, fans)
    if "logvar" in spec.parameter_shapes:
        state["logvar"] = np.zeros((1, spec.n_outputs), dtype)
    if "log_dispersion" in spec.parameter_shapes:
        state["log_dispersion"] = np.full((1, spec.n_outputs), math.log(FIRST_DISPERSION) / DISPERSION_PACE, dtype)
    if spec.n_chains:
        mean = 0.5 if spec.layers[0].activation is Activation.SIGMOID else 0.0
        state["chain"] = np.full((spec.n_chains, spec.n_components), mean, dtype)
    return state


def dispersions(parameter: NDArray[Any]) -> NDArray[np.float64]:
    """Inverse dispersion of each feature, from the parameter ``log_dispersion``; shape (n_features,)."""
    logarithms = DISPERSION_PACE * parameter.reshape(-1).astype(np.float64)
    found: NDArray[np.float64] = np.exp(np.clip(logarithms, -LOG_DISPERSION_LIMIT, LOG_DISPERSION_LIMIT))
    return found
