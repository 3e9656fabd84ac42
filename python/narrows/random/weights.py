"""Seeds and first weights, the same on every backend.

Never: touches NumPy's global random state.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..plan.spec import Activation
from . import philox

__all__ = ["draw_seed", "initial_coupling", "initial_weight"]

STREAM = 2**31
"""First random stream of initial weights. The streams of a plan's ops start at 0."""

DRAWN = 1 << 15
"""Number of weights drawn at a time."""


def draw_seed(random_state: Any) -> int:
    """A 64-bit seed: the integer itself, one draw from a generator, or fresh entropy for None."""
    if random_state is None:
        entropy = np.random.SeedSequence().entropy
        assert isinstance(entropy, int)
        return entropy & (2**64 - 1)
    if isinstance(random_state, np.random.RandomState):
        return int(random_state.randint(0, 2**63 - 1, dtype=np.int64))
    if isinstance(random_state, np.random.Generator):
        return int(random_state.integers(0, 2**63 - 1))
    return int(random_state) & (2**64 - 1)


def initial_weight(
    n_in: int,
    n_out: int,
    activation: Activation,
    seed: int,
    layer: int = 0,
    dtype: Any = np.float64,
    fans: tuple[float, float] | None = None,
) -> NDArray[Any]:
    """First weight of a layer, shape (n_in, n_out): He uniform before rectifiers, Glorot uniform otherwise.

    The numbers are drawn in float64 and rounded to `dtype`. `fans` are the inputs of an output and the outputs of an
    input, if they differ from n_in and n_out.

    References: He, Zhang, Ren and Sun, ICCV 2015; Glorot and Bengio, AISTATS 2010.
    """
    fan_in, fan_out = fans or (n_in, n_out)
    fan = fan_in if activation.rectifier else fan_in + fan_out
    limit = math.sqrt(6.0 / fan)
    return _drawn(
        n_in, n_out, dtype, lambda m, first: (2 * philox.uniform(seed, STREAM + layer, 0, m, n_out, first) - 1) * limit
    )


def initial_coupling(n_visible: int, n_hidden: int, seed: int, dtype: Any = np.float64) -> NDArray[Any]:
    """First weight of a restricted Boltzmann machine, shape (n_visible, n_hidden): normal, standard deviation 0.01.

    The numbers are drawn in float64 and rounded to `dtype`.

    Reference: Hinton, "A practical guide to training restricted Boltzmann machines", UTML TR 2010-003.
    """
    return _drawn(
        n_visible, n_hidden, dtype, lambda m, first: 0.01 * philox.normal(seed, STREAM, 0, m, n_hidden, first)
    )


def _drawn(n_in: int, n_out: int, dtype: Any, draw: Callable[[int, int], NDArray[np.float64]]) -> NDArray[Any]:
    """A weight, filled in blocks: ``draw(n_rows, first)`` gives rows."""
    weight = np.empty((n_in, n_out), dtype)
    # Drawing needs many times the memory of its result.
    block = max(1, DRAWN // n_out)
    for first in range(0, n_in, block):
        rows = weight[first : first + block]
        rows[...] = draw(len(rows), first)
    return weight
