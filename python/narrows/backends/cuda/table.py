"""What Python and the kernels in ``csrc/cuda`` agree on: layouts of structures, constants, and the list of instances.

Promises: `KERNELS` has every kernel that a plan can ask for, so all can be compiled and tested in advance. The compiler
compares the sizes of the layouts with C++.
Never: needs a GPU, or an array library other than NumPy.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from itertools import product
from typing import NamedTuple

import numpy as np

from ...plan import ops
from ...plan.spec import Activation, Loss, Precision, Solver

__all__ = [
    "ENDS",
    "FUNCTORS",
    "GROUP_DTYPE",
    "KERNELS",
    "LAUNCH_DTYPE",
    "PRECISION_FLAGS",
    "RULES",
    "SOURCE_DTYPE",
    "STACK_DTYPE",
    "STEP_DTYPE",
    "Tile",
    "constants",
]

MAX_MATRICES, MAX_INTEGERS, MAX_REALS = 12, 24, 8

_MATRIX = [("data", "u8"), ("rows", "i4"), ("cols", "i4"), ("ld", "i4"), ("unused", "i4")]
LAUNCH_DTYPE = np.dtype(
    [
        ("slots", _MATRIX, MAX_MATRICES),
        ("ints", "i4", MAX_INTEGERS),
        ("floats", "f8", MAX_REALS),
        ("step", "u8"),
        ("sources", "u8"),
        ("m", "i4"),
        ("learn", "i4"),
    ],
    align=True,
)
"""``Op`` of csrc/cuda/op.h; addresses are of the device."""
STEP_DTYPE = np.dtype(
    [
        ("seed", "u8"),
        ("learning_rate", "f8"),
        ("kl_factor", "f8"),
        ("momentum", "f8"),
        ("adam_rate", "f8"),
        ("adam_root", "f8"),
        ("rows", "u8"),
        ("step", "u4"),
        ("unused", "u4"),
    ],
    align=True,
)
"""``Step``: what changes from step to step. If `momentum` is negative, the op's own one holds."""
SOURCE_DTYPE = np.dtype(
    [
        ("data", "u8"),
        ("indptr", "u8"),
        ("indices", "u8"),
        ("rows", "i8"),
        ("stored", "i8"),
        ("cols", "i4"),
        ("csr", "i4"),
    ],
    align=True,
)
"""``Source``: dense rows without gaps, or CSR with 64-bit `indptr` and increasing columns."""

MOST_OPERANDS = 4096
"""Bytes that the operands of a kernel may take."""
MAX_MEMBERS = MOST_OPERANDS // (LAUNCH_DTYPE.itemsize + 8)
GROUP_DTYPE = np.dtype(
    [("members", LAUNCH_DTYPE, MAX_MEMBERS), ("ends", "i4", MAX_MEMBERS), ("kinds", "i4", MAX_MEMBERS)], align=True
)
"""``Ops`` of csrc/cuda/op.h: a group of launches."""
ENDS = {"reduce": 1, "end_step": 2}
"""Kinds of the members that end a step (see `group` in csrc/cuda/steps.cuh); others have kind 0."""
STAGE_SLOTS, MAX_STAGES, STACK_WIDTH, STACK_THREADS = 5, 24, 128, 256
STACK_ROWS = (4, 16)
"""Rows per block of a stack: few, or many."""
STAGE_DTYPE = np.dtype(
    [("slots", _MATRIX, STAGE_SLOTS), *((name, "i4") for name in ("kind", "activation", "option", "flags")),
     ("number", "f8")],
    align=True,
)  # fmt: skip
STACK_DTYPE = np.dtype(
    [("stages", STAGE_DTYPE, MAX_STAGES), ("step", "u8"), ("sources", "u8"), *((n, "i4") for n in ("n", "m", "learn")),
     ("unused", "i4")],
    align=True,
)  # fmt: skip
"""``Stack`` of csrc/cuda/stack.cuh: launches for narrow layers as stages of one launch."""

CONV_THREADS, CONV_COLUMNS = 128, (16, 8, 4, 1)
"""Threads per block of a convolution, and the choices of filters (backwards: channels) per thread."""
CONV_TILES = ((4, 8), (32, 1))
"""Choices of rows and columns of a convolution's weight per block of its gradient."""
CONTRACTED = 8
"""Columns of a layer per block of its contractive penalty."""
BAND, SPARSE_ROWS, SPARSE_THREADS = 32, 64, 512
"""Columns of CSR rows that kernels take together; rows and threads per block of a product with CSR rows."""
GRAM_TILE = 64
"""Edge of the tile per block of a weight's Gram matrix."""
COUNT_GROUP = 2
"""Rows per block of a likelihood of counts."""


class Tile(NamedTuple):
    """The part of a product that a block computes (``Tile`` of csrc/cuda/gemm.cuh)."""

    rows: int
    cols: int
    depth: int
    """Terms of the sum at a time."""
    each_row: int
    each_col: int
    """Elements per thread."""
    ways: int
    """Groups of threads that share the depth."""

    @property
    def threads(self) -> int:
        return self.rows // self.each_row * (self.cols // self.each_col) * self.ways


TILES = {
    "Small": Tile(16, 16, 32, 2, 2, 1),
    "Medium": Tile(32, 32, 32, 4, 4, 1),
    "Large": Tile(128, 64, 8, 8, 8, 1),
    "Deep": Tile(8, 16, 256, 2, 2, 8),
}
"""Deep is for long sums of few elements; other tiles would keep few multiprocessors busy. They differ in size alone."""
DOUBLE_TILES = TILES | {
    "Medium": Tile(32, 32, 16, 4, 4, 1),
    "Large": Tile(64, 64, 8, 8, 4, 1),
    "Deep": Tile(8, 16, 128, 2, 2, 8),
}
"""For float64, whose numbers take twice the registers and shared memory."""


def constants() -> dict[str, float | str]:
    """Macros for the compiler: constants of `plan.ops` and of this module, tiles, and sizes to check layouts with."""
    ops_names = (
        "CELL_ROWS", "DISPERSION_PACE", "DROPOUT_LIMIT", "GRAIN", "GRAM_GUARD", "LANES", "LOG_DISPERSION_LIMIT",
        "VARIANCE_FLOOR",
    )  # fmt: skip
    numbers = {f"SOURCE_{source.name}": int(source) for source in (ops.Source.SHIFT, ops.Source.CONDITION)}
    numbers |= {f"LOSS_{loss.name}": int(loss) for loss in (Loss.MSE, Loss.BCE)}
    sizes = {
        "LAUNCH": LAUNCH_DTYPE, "STEP": STEP_DTYPE, "SOURCE": SOURCE_DTYPE, "GROUP": GROUP_DTYPE, "STACK": STACK_DTYPE,
    }  # fmt: skip
    own_names = (
        "BAND", "CONTRACTED", "CONV_THREADS", "COUNT_GROUP", "GRAM_TILE", "MAX_MEMBERS", "MAX_STAGES", "SPARSE_ROWS",
        "SPARSE_THREADS", "STACK_THREADS", "STACK_WIDTH",
    )  # fmt: skip
    tiles = TILES | {f"{name}_DOUBLE": tile for name, tile in DOUBLE_TILES.items()}
    return (
        {f"NARROWS_{name}": getattr(ops, name) for name in ops_names}
        | {f"NARROWS_{name}": globals()[name] for name in own_names}
        | {f"NARROWS_{name}": value for name, value in numbers.items()}
        | {f"NARROWS_{name}_SIZE": dtype.itemsize for name, dtype in sizes.items()}
        | {f"NARROWS_TILE_{name.upper()}": ",".join(map(str, tile)) for name, tile in tiles.items()}
    )


PRECISION_FLAGS: Mapping[Precision, list[str]] = {
    Precision.FLOAT32: [],
    Precision.FLOAT64: ["-DNARROWS_DOUBLE"],
    Precision.BFLOAT16: ["-DNARROWS_BFLOAT16"],
    Precision.TF32: [],
}
"""Compiler flags per precision."""


# --- the table of kernels -------------------------------------------------------------------------------------------

FUNCTORS: Mapping[Activation, str] = {
    a: "".join(part.title() for part in a.name.split("_")) for a in Activation if a is not Activation.SOFTMAX
}
_ACTS = tuple(FUNCTORS.values())
RULES = {Solver.SGD: "Sgd", Solver.ADAM: "Adam", Solver.ADAMW: "Adam"}
_RULES = tuple(dict.fromkeys(RULES.values()))
_DESCENTS = tuple(f"Descend<{rule}>" for rule in _RULES)
BOOL = ("false", "true")


def loss_name(loss: Loss) -> str:
    return loss.name.title()


def _instances() -> Iterator[str]:
    yield from _alone()
    yield from (f"{kernel}<{columns}>" for kernel in ("convolve", "conv_dgrad") for columns in CONV_COLUMNS)
    yield from (f"conv_wgrad<{weights}, {filters}>" for weights, filters in CONV_TILES)
    yield from (f"loss<Linked<{loss_name(loss)}, {act}>>" for loss in (Loss.MSE, Loss.HUBER) for act in _ACTS)
    yield "loss<Logistic>"
    yield from (f"loss_softmax<{loss_name(loss)}>" for loss in (Loss.MSE, Loss.HUBER, Loss.BCE))
    yield from (f"means<{link}>" for link in BOOL)
    yield from (f"update<{rule}>" for rule in _RULES)
    yield from (f"{kernel}<{to}>" for kernel in ("colsum", "grain_sum") for to in ("Store", *_DESCENTS))
    yield from _products()
    yield from _sparse()
    yield from _several()


def _alone() -> Iterator[str]:
    """Kernels without template parameters, and an instance per activation of those that take only an activation."""
    for file in sorted((ops.source_folder() / "cuda").glob("*.cuh")):
        text = file.read_text(encoding="utf-8")
        found = re.finditer(r"^(template <.*>\n)?KERNEL(?:_OF\(.*\))? (\w+)\(", text, re.MULTILINE)
        for parameters, kernel in (match.groups() for match in found):
            if parameters is None:
                yield kernel
            elif parameters == "template <class Act>\n":
                yield from (f"{kernel}<{act}>" for act in _ACTS)


def _sparse() -> Iterator[str]:
    """By outputs per lane; likelihoods by link, and by whether each cell or each gene has a dispersion."""
    for each in (1, 2, 4):
        yield f"sparse_parts<{each}>"
        for to in ("Store", *_DESCENTS):
            yield from (f"sparse_outer<{each}, {to}>", f"sparse_outer<{each}, WithBias<{to}>>")
        slopes = "GramStore", *(f"GramDescend<{rule}>" for rule in _RULES)
        yield from (f"sparse_mse_slopes<{each}, {to}>" for to in slopes)
    for loss, softmax in product((loss for loss in Loss if loss.info.of_counts), BOOL):
        yield f"counts<{loss_name(loss)}, {softmax}, false>"
        if loss.info.dispersion:
            yield f"counts<{loss_name(loss)}, {softmax}, true>"


def _several() -> Iterator[str]:
    """Kernels that stand for several launches; see `schedule`."""
    yield from (f"stack<{rows}>" for rows in STACK_ROWS)
    yield from (f"group<{body}>" for body in ("Nothing", "Penalties"))
    yield from (f"group<ConvWgrad<{weights}, {filters}>>" for weights, filters in CONV_TILES)
    for to in ("Store", *_DESCENTS):
        yield from (f"group<{body}<{to}>>" for body in ("ColSum", "GrainSum"))
        for tile in TILES:
            yield f"group<Gemm<{tile}, Turned, Turned, {to}>>"
            yield f"group<Gemm<{tile}, Extended, Turned, WithBias<{to}>>>"


def _products() -> Iterator[str]:
    """By tile, operand classes and epilogue."""
    for tile in TILES:
        for right, act in product(("Rows", "Turned"), _ACTS):
            yield f"gemm<{tile}, Rows, {right}, Activate<{act}>>"
            yield f"gemm<{tile}, Rows, {right}, Slope<{act}>>"
        yield from (f"gemm<{tile}, Turned, Turned, {to}>" for to in ("Store", *_DESCENTS))
        yield from (f"gemm<{tile}, Extended, Turned, WithBias<{to}>>" for to in ("Store", *_DESCENTS))
        yield f"gemm<{tile}, Rows, Turned, Store>"
        yield f"gemm<{tile}, Rows, Rows, Link>"
    yield from (f"finish<{epilogue}<{act}>>" for epilogue in ("Activate", "Slope") for act in _ACTS)
    yield from (f"finish<{to}>" for to in (*_DESCENTS, "Link"))
    yield from (f"finish_with_bias<{to}>" for to in _DESCENTS)


KERNELS: tuple[str, ...] = tuple(_instances())
"""Every instance of a kernel that a plan can ask for, as a C++ expression."""
