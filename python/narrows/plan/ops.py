"""The op kinds: the operands of each, and how they lie in memory.

Promises: `SIGNATURES` is the table ``csrc/plan/ops.def``, which the C++ code is compiled from, too; the formulas are
there, and in `backends.reference`. A number that both sides depend on is here, once.
Never: knows a network, or a list of ops.
"""

from __future__ import annotations

import enum
import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

__all__ = [
    "CELL_ROWS",
    "DISPERSION_PACE",
    "DROPOUT_LIMIT",
    "GEOMETRY",
    "GRAIN",
    "GRAM_GUARD",
    "JACOBIAN_LAYERS",
    "LANES",
    "LOG_DISPERSION_LIMIT",
    "POOLING",
    "SAME_SETS",
    "SIGNATURES",
    "VARIANCE_FLOOR",
    "Gathers",
    "OpCode",
    "Signature",
    "Source",
    "Units",
    "jacobian_segments",
    "kind_of",
    "padded",
    "read_rows",
    "segments",
    "source_folder",
]


def source_folder() -> Path:
    """The folder ``csrc``: of the installed package, or of the source tree that narrows runs from."""
    package = Path(__file__).resolve().parents[1]
    shipped = package / "csrc"
    return shipped if shipped.is_dir() else package.parents[1] / "csrc"


class Source(enum.IntEnum):
    """What rows are gathered from. The numbers are those of ``csrc/plan/plan.h``."""

    X = 0
    TARGET = 1
    WEIGHT = 2
    """Sample weights."""
    LATENT = 3
    """Latent codes, in place of X."""
    SHIFT = 4
    """One row, subtracted from every row of X."""
    CONDITION = 5
    """The batch number of each row."""


class Units(enum.IntEnum):
    """Kinds of stochastic units, for DRAW."""

    BERNOULLI = 0
    GAUSSIAN = 1


class Gathers(NamedTuple):
    """The rows of a bound source that an op takes."""

    source: Source | str
    """The source, or the integer attribute that holds its number."""
    columns: Literal["any", "one", "columns", "rows", "features"]
    """How many columns the source must have: any number, one, as many as `slot` has columns or rows, or the features
    whose likelihood `slot` describes."""
    slot: str
    csr: bool
    """Whether the source must be CSR."""


class Signature(NamedTuple):
    """A row of ``ops.def``: the names of an op's operands, and their use.

    A slot named in both `reads` and `writes` is updated in place.
    """

    reads: tuple[str, ...]
    writes: tuple[str, ...]
    ints: tuple[str, ...]
    floats: tuple[str, ...]
    optional: frozenset[str]
    """Slots that may be absent."""
    share: Literal["rows", "tiles", "first", "all"]
    """How the threads of the C++ backend share what the op writes."""
    gathers: Gathers | None

    @property
    def slots(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(self.reads + self.writes))


_SLOTS = {"IN", "OUT", "OUT_OR_FIRST", "INOUT"}
_INTEGERS = {"INT", "FLAG", "POSITIVE", "CHOICE", "SOLVER"}
_FLOATS = {"FLOAT", "POSITIVE_FLOAT", "FRACTION"}
_COLUMNS = {"ANY_COLUMNS", "ONE_COLUMN", "COLUMNS_OF", "ROWS_OF", "FEATURES_OF"}


def kind_of(word: str) -> str | None:
    """Whether a word of a row names a slot, an integer or a float: ``"slots"``, ``"ints"``, ``"floats"``, or None."""
    kinds = {"slots": _SLOTS, "ints": _INTEGERS, "floats": _FLOATS}
    return next((kind for kind, words in kinds.items() if word.removeprefix("OPT_") in words), None)


_Items = list[tuple[str, str]]
"""The words of a row, each with its argument."""


def _items(text: str, macros: Mapping[str, _Items]) -> _Items:
    found = re.findall(r"(\w+)(?:\((\w+)[^()]*\))?", text)
    return [item for word, argument in found for item in macros.get(word, [(word, argument)])]


def _signature(items: _Items) -> Signature:
    """The signature of an op, from the words of its row after its name."""
    slots = {name: word for word, name in items if kind_of(word) == "slots"}
    gathers = None
    words = dict(items)
    if "GATHERS" in words or "GATHERS_CSR" in words:
        source = Source[words["ONLY"]] if "ONLY" in words else words["BY"]
        (columns,) = words.keys() & _COLUMNS
        extent: Any = columns.split("_")[0].lower()
        gathers = Gathers(source, extent, words[columns], "GATHERS_CSR" in words)
    (share,) = (word for word in words if word.startswith("SHARE_"))
    sharing: Any = share.removeprefix("SHARE_").lower()
    return Signature(
        tuple(name for name, word in slots.items() if word.endswith(("IN", "INOUT"))),
        tuple(name for name, word in slots.items() if "OUT" in word),
        tuple(name for word, name in items if kind_of(word) == "ints"),
        tuple(name for word, name in items if kind_of(word) == "floats"),
        frozenset(name for name, word in slots.items() if word.startswith("OPT_")),
        sharing,
        gathers,
    )


def read_rows(text: str, head: str, shared: Mapping[str, _Items] = {}) -> dict[str, _Items]:
    """The rows of a table such as ``ops.def`` that begin with `head`, a regular expression: the words of each behind
    its name. Words that are in `shared` stand for several."""
    rows = {}
    for row in re.findall(rf"^(?:{head})\((.*?)\)\n(?! )", re.sub(r"^(//|#).*\n", "", text, flags=re.M), re.M | re.S):
        (name, _), *rows[name] = _items(row, shared)
    return rows


def _shared(text: str) -> dict[str, _Items]:
    """The lists of operands that several ops share."""
    text = re.sub(r"\\\n", "", text)
    return {name: _items(re.search(rf"#define {name} (.*)", text)[1], {}) for name in ("GEOMETRY", "POOLING")}  # type: ignore[index]


_TEXT = (source_folder() / "plan" / "ops.def").read_text(encoding="utf-8")
_SHARED = _shared(_TEXT)
_ROWS = {name: _signature(items) for name, items in read_rows(_TEXT, "OP", _SHARED).items()}

if TYPE_CHECKING:

    class _Members(enum.EnumMeta):
        def __getattr__(cls, name: str) -> OpCode: ...

    class OpCode(enum.IntEnum, metaclass=_Members):
        """The op kinds, by their numbers in a plan; `SIGNATURES` names their operands."""

else:
    OpCode = enum.IntEnum("OpCode", list(_ROWS), start=0, module=__name__)

SIGNATURES: Mapping[OpCode, Signature] = dict(zip(OpCode, _ROWS.values(), strict=True))

GEOMETRY = tuple(name for _, name in _SHARED["GEOMETRY"])
"""The integer attributes of a convolution (see `geometry.Convolution`)."""

POOLING = tuple(name for _, name in _SHARED["POOLING"])
"""The integer attributes of a pooling."""

GRAM_GUARD = 1e-3
"""If the loss of a row is below this part of |y|^2, the sums of the Gram form cancel. Then the loss comes from the
residuals of the features."""

VARIANCE_FLOOR = 1e-6
"""Added to the learned variances, so that the density of a constant feature stays bounded."""

DISPERSION_PACE = 30.0
"""The logarithm of a feature's inverse dispersion is this times its parameter. Adam moves a parameter by about the
learning rate in a step, and these parameters have further to go than weights."""

LOG_DISPERSION_LIMIT = 14.0
"""Logarithms of inverse dispersions are cut off at plus and minus this. Beyond, the likelihood does not change."""

DROPOUT_LIMIT = 60.0
"""The same for the logits of dropout."""

JACOBIAN_LAYERS = 4
"""The most layers of an encoder whose exact penalty JACOBIAN computes."""

LANES = 16
"""Columns of a slot are padded to a multiple of this: a cache line of float32, and whole vectors on every CPU."""

SAME_SETS = 256
"""Rows whose distance is a multiple of this many elements share few sets of a cache (see `padded`)."""

CELL_ROWS = 6
"""The penalties of a weight matrix are summed by cells of this many rows and LANES columns."""

GRAIN = 4096
"""Elements of a flat region that one thread takes at a time. It fixes the order of the sums of SQNORM."""


def padded(cols: int) -> int:
    """Elements from one row of `cols` columns to the next.

    Whole cache lines. From `SAME_SETS` on whole pairs of lines, because CPUs fetch pairs. Never a multiple of
    `SAME_SETS`, because such rows share few sets of a cache and evict each other.
    """
    lines = -(-cols // LANES) * LANES
    if lines < SAME_SETS:
        return lines
    pairs = -(-lines // (2 * LANES)) * (2 * LANES)
    return pairs if pairs % SAME_SETS else pairs + 2 * LANES


def segments(widths: Sequence[int]) -> list[int]:
    """First columns of matrices with these widths, side by side, each at the start of a cache line; then the end."""
    return [0, *itertools.accumulate(-(-n // LANES) * LANES for n in widths)]


def jacobian_segments(widths: Sequence[int]) -> list[int]:
    """The layout of a row of JACOBIAN's partial sums, for an encoder with layers of these widths.

    The first columns of the gradients by the Gram matrix and by W2', W3', ..., then the end. Rows of a gradient lie
    `padded(columns)` apart.
    """
    rows_of, columns_of = (widths[0], *widths[1:]), (widths[0], *widths[:-1])
    sizes = (rows * padded(columns) for rows, columns in zip(rows_of, columns_of, strict=True))
    return [0, *itertools.accumulate(sizes)]
