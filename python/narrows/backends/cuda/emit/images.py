"""Convolutions and poolings."""

from __future__ import annotations

from ....plan.ops import GEOMETRY, POOLING, OpCode, padded
from ..launches import MULTIPROCESSORS, Writer
from ..table import CONV_COLUMNS, CONV_TILES
from .registry import Operands, act, lowers

CONV_THREADS, CONV_OVERHEAD = 128, 3
"""Threads of a block of a convolution, and what a step of its sum costs besides its columns."""

# --- images -----------------------------------------------------------------------------------------------------------


def geometry(o: Operands, names: tuple[str, ...], *before: int) -> tuple[int, ...]:
    """The integers of an op on images, which begin with the fifth."""
    return (*before, *(0,) * (4 - len(before)), *(getattr(o, name) for name in names))


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
    slots = o.x, o.W, o.b, o.out, o.pre
    w.launch(f"convolve<{each}>", blocks, CONV_THREADS, slots, geometry(o, GEOMETRY, o.activation))


@lowers(OpCode.CONV_DGRAD)
def conv_dgrad(w: Writer, o: Operands) -> None:
    each, blocks = columns_of(w, o.h * o.w, o.c)
    slots, ints = (o.dz, o.W, o.saved, o.out), geometry(o, GEOMETRY, o.activation)
    w.launch(f"conv_dgrad<{each}>", blocks, CONV_THREADS, slots, ints, (o.scale,))


@lowers(OpCode.CONV_WGRAD)
def conv_wgrad(w: Writer, o: Operands) -> None:
    weights, filters = CONV_TILES[0 if o.filters > 3 else 1]
    tiles = -(-(o.ky * o.kx * o.c + o.bias) // weights) * -(-o.filters // filters)
    ints = geometry(o, GEOMETRY, o.bias, o.accumulate, padded(o.filters))
    kernel = f"conv_wgrad<{weights}, {filters}>"
    w.launch(kernel, tiles * o.partial.rows, CONV_THREADS, (o.x, o.dz, o.partial), ints)


@lowers(OpCode.MAXPOOL)
def maxpool(w: Writer, o: Operands) -> None:
    w.each("maxpool_pick", o.out, (o.x, o.x, o.out), ints=geometry(o, POOLING))


@lowers(OpCode.MAXPOOL_PICK)
def maxpool_pick(w: Writer, o: Operands) -> None:
    w.each("maxpool_pick", o.out, (o.y, o.x, o.out), ints=geometry(o, POOLING))


@lowers(OpCode.MAXPOOL_DGRAD)
def maxpool_dgrad(w: Writer, o: Operands) -> None:
    w.each(f"maxpool_dgrad<{act(o)}>", o.out, (o.dout, o.x, o.saved, o.out), ints=geometry(o, POOLING))
