"""Launches of kernels as data, and the writer that ops use to make them.

Promises: launches are plain data: no GPU, no array library. A plan, a mode and a number of rows always give the same
list, of kernels in `table.KERNELS`.
Never: touches data, allocates, or launches anything.

The operands of a launch are matrices in the memory of the program, integers and floats. What changes from step to step
is not among them, so a list of launches can be captured as a graph and replayed. Launches run one after the other, so
the temporaries of an op share their memory with those of the next op.
"""

from __future__ import annotations

import enum
from typing import Any, NamedTuple

from ...plan.ops import LANES, SIGNATURES, padded
from ...plan.plan import LEARN, Mode, Op, Plan, Region
from ...plan.spec import Precision
from .layout import Operands
from .table import DOUBLE_TILES, TILES, Tile

__all__ = ["BLAS", "EXTENDED", "ROWS", "TURNED", "Area", "Launch", "Sink", "View", "Writer", "stored"]


class Area(enum.IntEnum):
    """The parts of a program's memory; the first four are those of `Region`."""

    PARAMETER = 0
    GRADIENT = 1
    MOMENT1 = 2
    MOMENT2 = 3
    WORK = 4
    """Batch and scratch slots."""
    TEMPORARY = 5
    """Temporaries of one op at a time."""
    CONTROL = 6
    """Messages for a chunk of steps, and terms."""
    KEPT = 7
    """Results of ops for later ops of the same run."""


class View(NamedTuple):
    """A row-major matrix in an area; `offset` and `ld` count elements."""

    area: Area
    offset: int
    rows: int
    cols: int
    ld: int

    def meets(self, other: View) -> bool:
        """Whether they share memory; gaps between rows count."""
        if self.area is not other.area:
            return False
        ends = [view.offset + (view.rows - 1) * view.ld + view.cols for view in (self, other)]
        return self.offset < ends[1] and other.offset < ends[0]

    def part(self, offset: int, rows: int, cols: int, ld: int) -> View:
        """A matrix in this one's memory from element `offset` on."""
        return View(self.area, self.offset + offset, rows, cols, ld)


class Launch(NamedTuple):
    """A kernel, by its name in `table.KERNELS`, with its blocks, threads and operands. A stack or a group of launches
    has them as members instead (see `schedule`)."""

    kernel: str
    blocks: int
    threads: int
    operands: Operands = Operands()
    members: tuple[Launch, ...] = ()

    @property
    def views(self) -> dict[str, View]:
        """The matrices by name, without absent ones."""
        return {name: value for name, value in self.operands.named.items() if isinstance(value, View)}


class Sink(NamedTuple):
    """What becomes of each sum of a product: an epilogue (a C++ class) and its operands."""

    epilogue: str
    operands: Operands


def stored(out: View, accumulate: int = 0, factor: float = 1.0) -> Sink:
    """Store each sum, times a factor, in `out`, or add it."""
    return Sink("Store", Operands("Store", out=out, accumulate=accumulate, factor=factor))


THREADS = 256
MOST_ELEMENTS = 2**31 - 2**16
"""The most elements of a matrix with a thread for each: kernels count them in 32 bits."""
GRAIN_ROWS, ONE_PASS = 64, 256
"""Rows for each partial sum over rows, and the most rows that one pass adds."""
MULTIPROCESSORS = 132
"""Those of an H100; tiles are chosen for it on every GPU."""
CLOCKS = {"Small": 6, "Medium": 12, "Large": 75}
"""Clocks of a multiprocessor for a block's work on one k, by reads of shared memory or by multiply-adds."""
LATENCY = 700
"""The fewest clocks from one slice of a sum to the next: a read from the L2 cache, and a barrier."""
LONG, DEEP_COLS, DEEP_ELEMENTS = 128, 256, 2**18
"""The warps of a block share a sum longer than LONG if the product has at most DEEP_COLS columns. If its rows are not
the batch's, at most DEEP_ELEMENTS elements suffice."""
ROWS, TURNED, EXTENDED = "Rows", "Turned", "Extended"
"""How a matrix is an operand of a product (classes of csrc/cuda/gemm.cuh). The rows of the result (left) or its columns
(right) are the matrix's rows, its columns, or its columns and one column of ones."""


BLAS = "blas"
"""In place of a kernel's name: a product by cuBLAS."""
BLAS_LEAST = {Precision.FLOAT32: 2**27, Precision.TF32: 2**26, Precision.BFLOAT16: 2**27, Precision.FLOAT64: 2**26}
BLAS_SIDE = 32
"""cuBLAS takes products with at least so many multiply-adds and sides of at least BLAS_SIDE. Estimated, not measured:
on an H100, 2**26 multiply-adds take some 2 us at the full rate of float32. Own kernels take twice that, tensor cores
almost nothing. The extra launch for the epilogue takes as long; so does the launch that rounds to bfloat16."""
BIAS_ROWS = 2048
"""The most rows that the launch after a product by cuBLAS sums for a bias: a block sums all rows of a column."""


def by_blas(size: tuple[int, int, int], precision: Precision) -> bool:
    rows, cols, depth = size
    return rows * cols * depth >= BLAS_LEAST[precision] and min(size) >= BLAS_SIDE


def tile_of(size: tuple[int, int, int], *, of_batch: bool) -> str:
    """The tile for a product; shapes alone decide.

    Deep gives other bits than the other tiles. So if the rows are those `of_batch`, their number does not decide
    whether it is taken. The others give the same bits. The one is taken whose waves of blocks need the fewest clocks; a
    slice of the sum needs at least `LATENCY`.
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
    """Collects the launches of a run over `m` rows; `blas` says whether cuBLAS may do products."""

    def __init__(self, plan: Plan, m: int, mode: Mode, precision: Precision, *, blas: bool = False) -> None:
        self.plan, self.m, self.precision, self.blas = plan, m, precision, blas
        self.learns = bool(mode & LEARN)
        self.launches: list[Launch] = []
        self.most_used = 0
        """The most elements that the temporaries of an op take."""
        self.most_kept = 0
        """Elements that stay until the end of the run."""
        self._used = 0
        self._kept: dict[str, View] = {}

    def operands(self, op: Op) -> Operands:
        """The operands of an op, by the names of its signature."""
        signature = SIGNATURES[op.code]
        views = zip(signature.slots, map(self.view, op.slots), strict=True)
        numbers = zip((*signature.ints, *signature.floats), (*op.ints, *op.floats), strict=True)
        self._used = 0
        return Operands(op.code.name, **dict(views), **dict(numbers))

    def view(self, index: int) -> View | None:
        if index < 0:
            return None
        slot = self.plan.slots[index]
        rows = self.m if slot.region is Region.BATCH else slot.rows
        return View(Area(min(slot.region, Area.WORK)), slot.offset, rows, slot.cols, slot.ld)

    def region(self, area: Area) -> View:
        """A region of the layout of the parameters, as one row."""
        size = self.plan.parameter_size
        return View(area, 0, 1, size, size)

    def temporary(self, rows: int, cols: int, *, wide: bool = False) -> View:
        """A matrix for this op alone, in double if `wide`."""
        view = View(Area.TEMPORARY, self._used, rows, cols, cols)
        self._used += room(view, wide)
        self.most_used = max(self.most_used, self._used)
        return view

    def kept(self, name: str, rows: int, cols: int, *, wide: bool = False) -> tuple[View, bool]:
        """A matrix for this op and later ones, and whether this op is the first to ask for it."""
        new = name not in self._kept
        if new:
            self._kept[name] = View(Area.KEPT, self.most_kept, rows, cols, cols)
            self.most_kept += room(self._kept[name], wide)
        return self._kept[name], new

    def launch(self, kernel: str, blocks: int, threads: int, *given: Operands, **own: Any) -> None:
        """Add a launch with `given` operands (of an op, of an epilogue) and its `own`, from the kernel's row of
        ``launches.def``."""
        if own:
            given = (*given, Operands(kernel.partition("<")[0], **own))
        self.launches.append(Launch(kernel, blocks, threads, sum(given, Operands()).checked()))

    def each(self, kernel: str, shape: View | tuple[int, int], *given: Operands, **own: Any) -> None:
        """Add a launch with a thread for each element."""
        rows, cols = (shape.rows, shape.cols) if isinstance(shape, View) else shape
        if rows * cols > MOST_ELEMENTS:
            raise ValueError(
                f"a matrix of {rows} x {cols} elements is too large for the CUDA backend: reduce batch_size"
            )
        threads = whole_warps(rows * cols)
        self.launch(kernel, -(-rows * cols // threads), threads, *given, **own)

    def quads(self, kernel: str, x: View, *given: Operands) -> None:
        """Add a launch with a thread for each four columns: one Philox block."""
        self.each(kernel, (x.rows, -(-x.cols // 4)), *given)

    def by_row(self, kernel: str, x: View, *given: Operands, **own: Any) -> None:
        """Add a launch with a block for each row of the batch; the width of x alone decides the size of a block."""
        self.launch(kernel, self.m, whole_warps(-(-x.cols // 4)), *given, **own)

    def product(
        self,
        to: Sink,
        size: tuple[int, int, int],
        sides: tuple[str, str],
        left: View,
        right: View,
        *,
        rounds: bool = False,
        dz: View | None = None,
    ) -> None:
        """Add a product. `size` is rows, columns and depth; `sides` is how left and right are operands (`ROWS`,
        `TURNED`, `EXTENDED`). With `rounds`, bfloat16 programs round the factors. `dz` is for a product by cuBLAS whose
        sink has a bias."""
        rows, cols, depth = size
        if self.by_blas(size, rounds) and set(sides) <= {ROWS, TURNED}:
            self._product_by_blas(to, size, sides, left, right, rounds, dz)
            return
        assert dz is None
        name = tile_of(size, of_batch=sides[0] not in (TURNED, EXTENDED))
        tile = (DOUBLE_TILES if self.precision is Precision.FLOAT64 else TILES)[name]
        kernel, blocks = f"gemm<{name}, {', '.join(sides)}, {to.epilogue}>", blocks_of(tile, rows, cols)
        own = Operands("gemm", left=left, right=right, rows=rows, cols=cols, depth=depth, rounds=int(rounds))
        self.launch(kernel, blocks, tile.threads, own, to.operands)

    def by_blas(self, size: tuple[int, int, int], rounds: bool) -> bool:
        return self.blas and by_blas(size, self._precision(rounds))

    def _precision(self, rounds: bool) -> Precision:
        """The precision of a product."""
        return self.precision if rounds or self.precision is Precision.FLOAT64 else Precision.FLOAT32

    def _product_by_blas(
        self,
        to: Sink,
        size: tuple[int, int, int],
        sides: tuple[str, str],
        left: View,
        right: View,
        rounds: bool,
        dz: View | None,
    ) -> None:
        (rows, cols, depth), precision, (epilogue, operands) = size, self._precision(rounds), to
        if precision is Precision.BFLOAT16:
            left, right = self._in_bfloat16(left, right)

        def multiply(out: View, alpha: float = 1.0, beta: float = 0.0) -> None:
            turned, by_rows = int(sides[0] == TURNED), int(sides[1] == ROWS)
            self.launch(
                BLAS, 0, 0, left=left, right=right, out=out, rows=rows, cols=cols, depth=depth, left_turned=turned,
                right_rows=by_rows, precision=int(precision), alpha=alpha, beta=beta,
            )  # fmt: skip

        if epilogue == "Store":
            multiply(operands.out, operands.factor, float(operands.accumulate))
            return
        # The product may lie where the epilogue stores its result, unless the epilogue reads something there.
        out = operands.get("out")
        others = [view for view in operands.named.values() if isinstance(view, View) and view is not out]
        if out is None or any(view.meets(out) for view in others):
            out = self.temporary(rows, padded(cols)).part(0, rows, cols, padded(cols))
        multiply(out)
        if dz is None:
            self.each(f"finish<{epilogue}>", (rows, cols), operands, product=out, rows=rows, cols=cols)
        else:
            blocks = -(-cols // 32) + -(-rows * cols // THREADS)
            kernel = f"finish_with_bias<{epilogue}>"
            self.launch(kernel, blocks, THREADS, operands, product=out, dz=dz, rows=rows, cols=cols)

    def _in_bfloat16(self, left: View, right: View) -> tuple[View, View]:
        """Round both factors; two numbers per element, rows at multiples of 16 bytes."""
        halves = [self.temporary(x.rows, -(-x.cols // 8) * 4) for x in (left, right)]
        pairs = sum(half.rows * half.cols for half in halves)
        one, other = halves
        self.each("to_bfloat16", (1, pairs), left=left, left_rounded=one, right=right, right_rounded=other)
        return one, other

    def column_sums(self, to: Sink, x: View, weight: View | None = None) -> None:
        """Add the column sums of x, each row times its weight, in one pass or two."""
        strips = -(-x.cols // 32)
        if x.rows > ONE_PASS:
            partial = self.temporary(-(-x.rows // GRAIN_ROWS), x.cols)
            blocks = strips * partial.rows
            self.launch("colsum_grains", blocks, THREADS, x=x, weight=weight, partial=partial, rows=GRAIN_ROWS)
            x, weight = partial, None
        threads = min(THREADS, 32 * x.rows)
        self.launch(f"colsum<{to.epilogue}>", strips, threads, to.operands, x=x, weight=weight)


def room(view: View, wide: bool) -> int:
    """Elements of memory for a matrix without gaps, in double if `wide`."""
    return -(-view.rows * view.cols * (2 if wide else 1) // LANES) * LANES


def whole_warps(threads: int) -> int:
    """So many threads, rounded up to whole warps, at most those of a block."""
    return min(THREADS, -(-threads // 32) * 32)
