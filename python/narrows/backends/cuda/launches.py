"""Launches of kernels, and how an op writes its own.

Promises: plain data, no GPU and no array library: the launches of a plan, a mode and a number of rows are always the
same list, of kernels that `table.KERNELS` names.
Never: touches data, allocates, or launches anything.

A launch has one structure of operands (`table.LAUNCH_DTYPE`): matrices in the arena, integers, numbers. What changes
from step to step is not among them, so a list of launches can be captured as a graph and replayed. Launches run one
after the other, so the temporaries of an op share their memory with those of the next.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

from ... import plan as p
from ...plan import Mode, Op, Plan, Precision, Region
from .table import DOUBLE_TILES, TILES, Tile

__all__ = ["EXTENDED", "ROWS", "TURNED", "Area", "Launch", "View", "Writer"]


class Area(enum.IntEnum):
    """Where a matrix lies in the memory of a program; the first four are those of `Region`."""

    PARAMETER = 0
    GRADIENT = 1
    MOMENT1 = 2
    MOMENT2 = 3
    WORK = 4
    """Batch and scratch slots."""
    TEMPORARY = 5
    """Of one op at a time."""
    CONTROL = 6
    """Steps, rows and terms."""


class View(NamedTuple):
    """A row-major matrix in an area; `offset` and `ld` count elements."""

    area: Area
    offset: int
    rows: int
    cols: int
    ld: int

    def part(self, offset: int, rows: int, cols: int, ld: int) -> View:
        """A matrix that lies in this one's elements from `offset` on."""
        return View(self.area, self.offset + offset, rows, cols, ld)


Slots = Sequence[View | None]


class Launch(NamedTuple):
    """A kernel, by its name in the table, over blocks of threads, and its operands; an absent matrix is None."""

    kernel: str
    blocks: int
    threads: int
    slots: tuple[View | None, ...] = ()
    ints: tuple[int, ...] = ()
    floats: tuple[float, ...] = ()


THREADS = 256
MOST_ELEMENTS = 2**31 - 2**16
"""Of a matrix whose elements have a thread each: what blocks can count."""
GRAIN_ROWS, ONE_PASS = 64, 256
"""Rows of a partial sum over rows, and as many as one pass adds."""
MULTIPROCESSORS = 132
"""That tiles are chosen for, wherever they run: those of an H100."""
CLOCKS = {"Small": 6, "Medium": 12, "Large": 75}
"""Of a multiprocessor, for what a block adds for one k: by the reads of shared memory, or by the multiply-adds."""
LATENCY = 700
"""Clocks from one slice of a sum to the next, at the least: the way to the L2 cache and back, and a barrier."""
LONG, DEEP_COLS, DEEP_ELEMENTS = 128, 256, 2**18
"""A sum longer than this is shared by the warps of a block, if the product has no more columns (or, where its rows are
not the batch's, elements) than these."""
ROWS, TURNED, EXTENDED = "Rows", "Turned", "Extended"
"""Matrices as operands of a product: whose rows, or whose columns, are the rows of the result on the left, or its
columns on the right; whose columns and a column of ones."""


def tile_of(size: tuple[int, int, int], *, of_batch: bool) -> str:
    """The tile by which a product is cut, by shapes alone. Deep has bits of its own: where rows are those `of_batch`,
    their number has no say in it.

    The others have the same bits: of these the one whose blocks, a wave for each multiprocessor at a time, take the
    fewest clocks, of which a slice of the sum takes `LATENCY` at the least.
    """
    rows, cols, depth = size
    if depth > LONG and (cols <= DEEP_COLS if of_batch else rows * cols <= DEEP_ELEMENTS):
        return "Deep"

    def clocks(name: str) -> int:
        tile = TILES[name]
        waves = -(-blocks_of(tile, rows, cols) // MULTIPROCESSORS)
        return -(-depth // tile.depth) * max(waves * tile.depth * CLOCKS[name], LATENCY)

    return min(CLOCKS, key=clocks)


def blocks_of(tile: Tile, rows: int, cols: int) -> int:
    return -(-rows // tile.rows) * -(-cols // tile.cols)


class Writer:
    """The launches of a run over `m` rows while they are being written."""

    def __init__(self, plan: Plan, m: int, mode: Mode, precision: Precision = Precision.FLOAT32) -> None:
        self.plan, self.m, self.precision = plan, m, precision
        self.learns = bool(mode & p.LEARN)
        self.launches: list[Launch] = []
        self.most_used = 0
        """Elements that the temporaries of any op take."""
        self._used = 0

    def operands(self, op: Op) -> SimpleNamespace:
        """Views, integers and numbers by the names of the op's signature."""
        signature = p.SIGNATURES[op.code]
        views = zip(signature.slots, map(self.view, op.slots), strict=True)
        numbers = zip((*signature.ints, *signature.floats), (*op.ints, *op.floats), strict=True)
        self._used = 0
        return SimpleNamespace(**dict(views), **dict(numbers))

    def view(self, index: int) -> View | None:
        if index < 0:
            return None
        slot = self.plan.slots[index]
        rows = self.m if slot.region is Region.BATCH else slot.rows
        return View(Area(min(slot.region, Area.WORK)), slot.offset, rows, slot.cols, slot.ld)

    def region(self, area: Area) -> View:
        """All of a parameter-like region as one row."""
        size = self.plan.parameter_size
        return View(area, 0, 1, size, size)

    def temporary(self, rows: int, cols: int, *, wide: bool = False) -> View:
        """A matrix for the op at hand, in double if it is to be `wide`."""
        view = View(Area.TEMPORARY, self._used, rows, cols, cols)
        self._used += -(-rows * cols * (2 if wide else 1) // p.LANES) * p.LANES
        self.most_used = max(self.most_used, self._used)
        return view

    def launch(
        self,
        kernel: str,
        blocks: int,
        threads: int,
        slots: Slots,
        ints: Sequence[int] = (),
        floats: Sequence[float] = (),
    ) -> None:
        self.launches.append(Launch(kernel, blocks, threads, tuple(slots), tuple(ints), tuple(floats)))

    def each(self, kernel: str, shape: View | tuple[int, int], slots: Slots, **numbers: Any) -> None:
        """A thread for each element."""
        rows, cols = (shape.rows, shape.cols) if isinstance(shape, View) else shape
        if rows * cols > MOST_ELEMENTS:
            raise ValueError(f"a matrix of {rows} x {cols} elements is too large for the CUDA backend")
        threads = whole_warps(rows * cols)
        self.launch(kernel, -(-rows * cols // threads), threads, slots, **numbers)

    def quads(self, kernel: str, x: View, slots: Slots, **numbers: Any) -> None:
        """A thread for each four columns, which one block of Philox serves."""
        self.each(kernel, (x.rows, -(-x.cols // 4)), slots, **numbers)

    def by_row(self, kernel: str, cols: int, slots: Slots, **numbers: Any) -> None:
        """A block for each row of the batch, whose size its width alone decides."""
        self.launch(kernel, self.m, whole_warps(-(-cols // 4)), slots, **numbers)

    def by_warp(self, kernel: str, n: int, slots: Slots, **numbers: Any) -> None:
        """A warp for each of n."""
        self.launch(kernel, -(-n * 32 // THREADS), THREADS, slots, **numbers)

    def product(
        self,
        epilogue: str,
        size: tuple[int, int, int],
        operands: tuple[str, str],
        slots: Slots,
        ints: Sequence[int] = (),
        floats: Sequence[float] = (),
        *,
        rounds: bool = False,
    ) -> None:
        """Of two operands, classes of csrc/cuda/gemm.cuh (`ROWS`, `TURNED`, `EXTENDED` are the first two slots);
        `size` is rows, columns and depth. Programs in bfloat16 round the factors if the product `rounds` them."""
        rows, cols, _ = size
        left, right = operands
        name = tile_of(size, of_batch=left not in (TURNED, EXTENDED))
        tile = (DOUBLE_TILES if self.precision is Precision.FLOAT64 else TILES)[name]
        numbers = (*size, *ints, *(0,) * (2 - len(ints)), int(rounds))
        kernel = f"gemm<{name}, {left}, {right}, {epilogue}>"
        self.launch(kernel, blocks_of(tile, rows, cols), tile.threads, slots, numbers, floats)

    def column_sums(
        self,
        finish: str,
        x: View,
        weight: View | None,
        slots: Slots,
        ints: Sequence[int] = (0,),
        floats: Sequence[float] = (),
    ) -> None:
        """Of x, in one pass or two."""
        strips = -(-x.cols // 32)
        if x.rows > ONE_PASS:
            partial = self.temporary(-(-x.rows // GRAIN_ROWS), x.cols)
            self.launch("colsum_grains", strips * partial.rows, THREADS, (x, weight, partial), (GRAIN_ROWS,))
            x, weight = partial, None
        threads = min(THREADS, 32 * x.rows)
        self.launch(f"colsum<{finish}>", strips, threads, (x, weight, *slots), (0, 0, 0, *ints), floats)


def whole_warps(threads: int) -> int:
    """As many threads, in whole warps, and no more than a block has."""
    return min(THREADS, -(-threads // 32) * 32)
