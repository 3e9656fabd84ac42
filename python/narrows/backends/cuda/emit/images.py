"""Convolutions and max pooling."""

from __future__ import annotations

from ....plan.ops import OpCode, padded
from ..launches import MULTIPROCESSORS, Writer
from ..layout import Operands
from ..table import CONV_COLUMNS, CONV_THREADS, CONV_TILES
from .registry import lowers

CONV_OVERHEAD = 3
"""Cost of a step of a convolution's sum, in columns, besides the columns of a thread."""


def columns_of(w: Writer, pixels: int, columns: int) -> tuple[int, int]:
    """Columns per thread and number of blocks; neither changes a result. They minimise the time of a multiprocessor,
    which runs four blocks at a time: each step of a block costs its columns plus `CONV_OVERHEAD`."""

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
