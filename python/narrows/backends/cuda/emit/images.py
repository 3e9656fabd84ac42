"""Convolutions and poolings."""

from __future__ import annotations

from ....plan.ops import OpCode, padded
from ..launches import MULTIPROCESSORS, Writer
from ..layout import Operands
from ..table import CONV_COLUMNS, CONV_TILES
from .registry import lowers

CONV_THREADS, CONV_OVERHEAD = 128, 3
"""Threads of a block of a convolution, and what a step of its sum costs besides its columns."""


def columns_of(w: Writer, pixels: int, columns: int) -> tuple[int, int]:
    """Columns that a thread of a convolution has, of which its bits know nothing, and blocks: as a multiprocessor takes
    the fewest steps, four blocks at a time, a step costing its columns and `CONV_OVERHEAD`."""

    def blocks(each: int) -> int:
        return -(-w.m * pixels // CONV_THREADS) * -(-columns // each)

    each = min(CONV_COLUMNS, key=lambda n: -(-blocks(n) // (4 * MULTIPROCESSORS)) * (n + CONV_OVERHEAD))
    return each, blocks(each)


@lowers(OpCode.CONVOLVE)
def convolve(w: Writer, o: Operands) -> None:
    each, blocks = columns_of(w, o.out_h * o.out_w, o.filters)
    w.launch(f"convolve<{each}>", blocks, CONV_THREADS, o)


@lowers(OpCode.CONV_DGRAD)
def conv_dgrad(w: Writer, o: Operands) -> None:
    each, blocks = columns_of(w, o.h * o.w, o.c)
    w.launch(f"conv_dgrad<{each}>", blocks, CONV_THREADS, o)


@lowers(OpCode.CONV_WGRAD)
def conv_wgrad(w: Writer, o: Operands) -> None:
    weights, filters = CONV_TILES[0 if o.filters > 3 else 1]
    tiles = -(-(o.ky * o.kx * o.c + o.bias) // weights) * -(-o.filters // filters)
    kernel = f"conv_wgrad<{weights}, {filters}>"
    w.launch(kernel, tiles * o.partial.rows, CONV_THREADS, o, ld=padded(o.filters))


@lowers(OpCode.MAXPOOL)
def maxpool(w: Writer, o: Operands) -> None:
    w.each("maxpool_pick", o.out, Operands("MAXPOOL_PICK", y=o.x, **o.named))
