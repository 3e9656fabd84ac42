"""The memory of a program on the device: one allocation, and where its parts begin."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from ...plan.plan import Plan
from ...plan.spec import Precision
from .data import CHUNK, N_SOURCES
from .emit import working_sizes
from .launches import Area, View
from .protocol import ALIGNMENT
from .table import SOURCE_DTYPE, STEP_DTYPE

__all__ = ["FINITE_BLOCKS", "Arena", "control_dtype"]

FINITE_BLOCKS = 256


@cache
def control_dtype(batch: int) -> np.dtype[Any]:
    """The message for a chunk of steps: the sources, and the record and the rows of each step."""
    return np.dtype(
        [
            ("sources", SOURCE_DTYPE, N_SOURCES),
            ("begun", "i8"),
            ("records", STEP_DTYPE, CHUNK),
            ("rows", "i8", CHUNK * batch),
        ],
        align=True,
    )


class Arena:
    """Where each area of a program begins, in bytes from the start of its memory."""

    def __init__(self, plan: Plan, precision: Precision, guard: int = 0, *, blas: bool = False) -> None:
        self.itemsize = itemsize = precision.dtype.itemsize
        region = plan.parameter_size * itemsize
        self.sizes: dict[Area | str, int] = {
            Area.PARAMETER: region,
            Area.GRADIENT: region,
            Area.MOMENT1: region,
            Area.MOMENT2: region if plan.n_moments > 1 else 0,
            Area.WORK: plan.work_size * itemsize,
            **{area: size * itemsize for area, size in working_sizes(plan, precision, blas=blas).items()},
            "step": STEP_DTYPE.itemsize,
            "control": control_dtype(plan.batch_rows).itemsize,
            "kept": CHUNK * plan.slots[plan.index["terms"]].cols * itemsize,
            "finite": 3 * FINITE_BLOCKS * itemsize,
        }
        self.begins: dict[Area | str, int] = {}
        self.size = 0
        for name, size in self.sizes.items():
            self.begins[name] = self.size
            self.size += -(-(size + guard) // ALIGNMENT) * ALIGNMENT
        for name, (_, offset, *_) in (control_dtype(plan.batch_rows).fields or {}).items():
            self.begins[name] = self.begins["control"] + offset

    def offset(self, view: View) -> int:
        return self.begins[view.area] + view.offset * self.itemsize

    def control(self, name: str, rows: int, cols: int) -> View:
        """A part of the memory of the steps as a matrix; it counts elements."""
        return View(Area.CONTROL, self.begins[name] // self.itemsize, rows, cols, cols)
