"""What every op gets besides its operands, the table of ops, and functions that several ops share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...plan.ops import OpCode, padded
from ...plan.plan import Mode, Region

Array = NDArray[Any]
Function = Callable[..., None]

OPS: dict[OpCode, Function] = {}
"""Every op: a function of a `Run` and of the operands in its signature. The other modules here fill this table."""


def op(code: OpCode) -> Callable[[Function], Function]:
    """Add a function to `OPS`."""

    def enter(function: Function) -> Function:
        OPS[code] = function
        return function

    return enter


@dataclass
class Run:
    """What an op may read besides its operands: the rows, the step, and the flat regions."""

    rows: NDArray[np.int64]
    mode: Mode
    sources: Mapping[int, Any]
    seed: int = 0
    step: int = 0
    learning_rate: float = 0.0
    kl_factor: float = 1.0
    momentum: float | None = None
    regions: Mapping[Region, Array] = field(default_factory=dict)
    bfloat16: bool = False

    @property
    def m(self) -> int:
        return len(self.rows)

    def factor(self, x: Array) -> Array:
        """A factor of a matrix product, rounded as products need it."""
        return bfloat16(x) if self.bfloat16 else x


def bfloat16(x: Array) -> Array:
    """x rounded to bfloat16 (8 significant bits, to nearest, ties to even; subnormals become zero), in x's dtype."""
    with np.errstate(over="ignore"):
        single = np.ascontiguousarray(x, np.float32)
    bits = single.view(np.uint32)
    rounded = (bits + (np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1)))) & np.uint32(0xFFFF0000)
    rounded[np.abs(single) < np.finfo(np.float32).tiny] &= np.uint32(0x80000000)
    return np.where(np.isnan(single), single, rounded.view(np.float32)).astype(x.dtype, copy=False)


def row_share(run: Run, weight: Array | None, strength: float, dtype: Any) -> Array:
    """The weight of each row in a mean over the step, shape (m, 1)."""
    share = np.full((run.m, 1), strength / run.m, dtype)
    return share if weight is None else share * weight


def grain_total(partial: Array, column: int, shape: tuple[int, ...]) -> Array:
    rows, cols = shape
    end = column + rows * padded(cols)
    total: Array = partial[:, column:end].sum(axis=0).reshape(rows, padded(cols))[:, :cols]
    return total
