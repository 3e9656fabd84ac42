"""The plan: a network as a flat list of ops over the slots of one arena.

Promises: a plan is plain data: no array and no backend inside. The same specification and rows of a step give the same
plan. Every backend runs the same list.
Never: touches data, draws numbers, imports a backend.

Reading order: `spec` (what a network is), `ops` (what each op reads, writes and computes), `Plan`; then `lowering`,
which writes the list.

A training step runs the whole list. Encoding, reconstruction, and scoring run the same list without the ops of other
modes, so the trained network is the applied network.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .geometry import Convolution
from .ops import GEOMETRY, SIGNATURES, OpCode, Source, padded
from .spec import NetworkSpec

__all__ = [
    "FORWARD",
    "FROM_CODES",
    "LEARN",
    "Gathered",
    "Mode",
    "Op",
    "Plan",
    "Region",
    "Slot",
    "gathered",
    "geometry",
    "op_flops",
    "product_size",
]


class Mode(enum.IntFlag):
    """The purpose of a run; an op runs if its modes include the mode's bit."""

    ENCODE = 1
    DECODE = 2
    RECONSTRUCT = 4
    SCORE = 8
    GRADIENT = 16
    """Forward and backward of a training step, without the update."""
    TRAIN = 32
    POSTERIOR = 64
    """For a variational network: the means and the log-variances of the latents."""
    LIKELIHOOD = 128
    """For a variational network: the loss of decoded latent codes against a target."""


FORWARD = Mode.ENCODE | Mode.RECONSTRUCT | Mode.SCORE | Mode.GRADIENT | Mode.TRAIN
LEARN = Mode.GRADIENT | Mode.TRAIN
FROM_CODES = Mode.DECODE | Mode.LIKELIHOOD
"""Modes that read latent codes instead of X."""


class Region(enum.IntEnum):
    """The memory of a slot; the first four regions have the same layout, element for element."""

    PARAMETER = 0
    GRADIENT = 1
    MOMENT1 = 2
    """First moment (adam, adamw) or velocity (sgd)."""
    MOMENT2 = 3
    BATCH = 4
    """One row for each row of the step; slots that are not in use at the same time share memory."""
    SCRATCH = 5


@dataclass(frozen=True)
class Slot:
    """A matrix in the arena.

    Attributes
    ----------
    name : str
        ``"W0"``, ``"b0"``, ``"a1"``, ...
    region : Region
    rows, cols : int
        Logical shape; for ``Region.BATCH``, `rows` is the capacity of a step.
    offset : int
        First element, counted from the start of the region (parameter-like) or of the arena's working area.
    """

    name: str
    region: Region
    rows: int
    cols: int
    offset: int

    @property
    def ld(self) -> int:
        """Elements from one row to the next."""
        return padded(self.cols)

    @property
    def size(self) -> int:
        return self.rows * self.ld


@dataclass(frozen=True)
class Op:
    """One op: its code, the modes it runs in, and its operands in the order of its signature (-1: absent)."""

    code: OpCode
    modes: Mode
    slots: tuple[int, ...]
    ints: tuple[int, ...] = ()
    floats: tuple[float, ...] = ()


@dataclass(frozen=True)
class Plan:
    """A lowered network for steps of up to `batch_rows` rows."""

    spec: NetworkSpec
    batch_rows: int
    slots: tuple[Slot, ...]
    ops: tuple[Op, ...]
    terms: tuple[str, ...]
    """Names of the values a training step reports: ``"loss"`` and the penalties."""
    parameter_size: int
    """Elements of the parameter region; the gradients and the two moments are as large."""
    work_size: int
    """Elements of the working area (batch and scratch slots)."""
    outputs: Mapping[Mode, int] = field(default_factory=dict)
    """The slot of the result, for each inference mode."""

    @cached_property
    def index(self) -> dict[str, int]:
        return {slot.name: i for i, slot in enumerate(self.slots)}

    @cached_property
    def parameters(self) -> tuple[Slot, ...]:
        return tuple(s for s in self.slots if s.region is Region.PARAMETER)

    @cached_property
    def learned(self) -> tuple[Slot, ...]:
        """The parameters that have gradients."""
        return tuple(s for s in self.parameters if f"d{s.name}" in self.index)

    @property
    def n_moments(self) -> int:
        """Regions of optimiser state."""
        return self.spec.training.update.n_moments

    @property
    def arena_size(self) -> int:
        """Elements of the whole arena: parameters, gradients, optimiser state, working area."""
        return (2 + self.n_moments) * self.parameter_size + self.work_size

    @cached_property
    def flops(self) -> int:
        """Floating-point operations of the matrix products of a full training step.

        Products with sparse rows are left out, because they depend on the data.
        """
        return sum(op_flops(self, op) for op in self.ops if op.modes & Mode.TRAIN)

    def __str__(self) -> str:
        lines = [
            f"plan: batch {self.batch_rows}, {sum(s.rows * s.cols for s in self.parameters)} parameters, "
            f"{self.flops / 1e9:.4g} GFLOP a step, arena of {self.arena_size} elements"
            + (", decoder in gram form" if self.spec.form.gram_decoder else "")
        ]
        for op in self.ops:
            signature = SIGNATURES[op.code]
            operands = [
                f"{role}={self.slots[i].name}" for role, i in zip(signature.slots, op.slots, strict=True) if i >= 0
            ]
            operands += [f"{n}={v}" for n, v in zip(signature.ints, op.ints, strict=True)]
            operands += [f"{n}={v:g}" for n, v in zip(signature.floats, op.floats, strict=True)]
            modes = "".join(m.name[0].lower() if m & op.modes and m.name else "." for m in Mode)
            lines.append(f"  {modes} {op.code.name.lower():12s} {' '.join(operands)}")
        return "\n".join(lines)

    def slot_table(self) -> NDArray[np.int64]:
        """The slots as an array for a native backend, shape (n_slots, 4): region, rows, cols, offset."""
        return np.array([(s.region, s.rows, s.cols, s.offset) for s in self.slots], np.int64).reshape(-1, 4)

    def op_table(self) -> NDArray[np.void]:
        """The ops as a structured array for a native backend; absent operands are -1."""
        table = np.zeros(len(self.ops), OP_DTYPE)
        table["slots"] = -1
        for row, op in zip(table, self.ops, strict=True):
            row["code"], row["modes"] = op.code, op.modes
            row["slots"][: len(op.slots)] = op.slots
            row["ints"][: len(op.ints)] = op.ints
            row["floats"][: len(op.floats)] = op.floats
        return table


OP_DTYPE = np.dtype(
    [
        ("code", "i4"),
        ("modes", "i4"),
        ("slots", "i4", max(len(s.slots) for s in SIGNATURES.values())),
        ("ints", "i4", max(len(s.ints) for s in SIGNATURES.values())),
        ("floats", "f8", max(len(s.floats) for s in SIGNATURES.values())),
    ],
    align=True,
)
"""``OpDesc`` of ``csrc/plan/plan.h``."""


class Gathered(NamedTuple):
    """What an op needs of the source that it takes rows from."""

    source: Source
    columns: int | None
    """How many columns the source must have; None: any number."""
    csr: bool
    """Whether the source must be CSR."""


def gathered(plan: Plan, op: Op) -> Gathered | None:
    """The source that an op takes rows from; None if it takes none."""
    signature = SIGNATURES[op.code]
    if (gathers := signature.gathers) is None:
        return None
    source = gathers.source
    if not isinstance(source, Source):
        source = Source(op.ints[signature.ints.index(source)])
    slot = plan.slots[op.slots[signature.slots.index(gathers.slot)]] if gathers.slot else None
    columns = None
    if gathers.columns == "one":
        columns = 1
    elif gathers.columns == "features":
        columns = plan.spec.n_outputs
    elif slot is not None:
        columns = slot.rows if gathers.columns == "rows" else slot.cols
    return Gathered(source, columns, gathers.csr)


PRODUCTS = {
    OpCode.DENSE: "W",
    OpCode.DGRAD: "W",
    OpCode.WGRAD: "dW",
    OpCode.WGRAD_UPDATE: "W",
    OpCode.GRAM: "W",
    OpCode.GRAM_WGRAD: "W",
}
"""Ops that are one matrix product, and the name of their weight (or weight gradient)."""


CONVOLUTIONS = (OpCode.CONVOLVE, OpCode.CONV_DGRAD, OpCode.CONV_WGRAD)

GRAMS = (OpCode.WEIGHT_GRAM, OpCode.ROW_GRAM, OpCode.SPARSE_MSE_WGRAD, OpCode.SPARSE_MSE_UPDATE)
"""Ops that multiply with a Gram matrix or compute one."""


def geometry(op: Op) -> Convolution:
    """The convolution of an op in `CONVOLUTIONS`."""
    h, w, c, oh, ow, f, ky, kx, sy, sx, py, px, uy, ux, transposed, _ = op.ints[-len(GEOMETRY) :]
    return Convolution((h, w, c), f, (ky, kx), (sy, sx), (py, px), (oh, ow), (uy, ux), transposed=bool(transposed))


def op_flops(plan: Plan, op: Op) -> int:
    """Floating-point operations of an op's matrix products in a full step; 0 for none, or for sparse rows."""
    slots = {role: plan.slots[i] for role, i in zip(SIGNATURES[op.code].slots, op.slots, strict=True) if i >= 0}
    if op.code is OpCode.JACOBIAN:
        # One row for each row of the step and latent; half of a symmetric product. The last weight needs no product.
        weights = [slots[role] for role in ("W2", "W3", "W4") if role in slots]
        inner = sum(W.rows * W.cols for W in weights[:-1])
        chains = 2 if "noisy" in slots else 1
        return plan.batch_rows * weights[-1].cols * (3 * slots["gram"].rows ** 2 + 6 * chains * inner)
    if op.code in CONVOLUTIONS:
        return plan.batch_rows * geometry(op).flops
    if op.code in GRAMS:
        inner, outer = (slots["W"].rows, slots["W"].cols) if "W" in slots else (slots["h"].cols, plan.batch_rows)
        return 2 * (inner + 1) ** 2 * outer
    if op.code not in PRODUCTS:
        return 0
    m, k, n = product_size(plan, op)
    return 2 * m * k * n


def product_size(plan: Plan, op: Op) -> tuple[int, int, int]:
    """For an op in `PRODUCTS`: the rows of its product in a full step, and the shape of its weight."""
    roles = SIGNATURES[op.code].slots
    weight = plan.slots[op.slots[roles.index(PRODUCTS[op.code])]]
    if op.code is OpCode.DGRAD and not op.ints[1]:
        return plan.batch_rows, plan.slots[op.slots[roles.index("out")]].cols, weight.cols
    square = op.code in (OpCode.GRAM, OpCode.GRAM_WGRAD)
    return weight.cols if square else plan.batch_rows, weight.rows, weight.cols
