"""Operands of launches by name, and where each lies in the structure that a kernel takes.

Promises: names and positions are those that the kernels see. Those of an op come from ``csrc/plan/ops.def``, those of
other launches from ``csrc/cuda/launches.def``. Two operands of a launch never share a position.
Never: knows a kernel or a device.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

from ...plan.ops import SIGNATURES, kind_of, read_rows, source_folder

__all__ = ["Operand", "Operands", "layout"]


class Operand(NamedTuple):
    """What an operand is, and its position among the operands of its kind."""

    kind: str
    """``"slots"``, ``"ints"`` or ``"floats"``."""
    position: int
    written: bool
    optional: bool


Row = Mapping[str, Operand]
"""The operands of an op, or of a row of ``launches.def``, by name."""

_KINDS = ("slots", "ints", "floats")


def _op_rows() -> Iterator[tuple[str, Row]]:
    for code, signature in SIGNATURES.items():
        row = {}
        for kind in _KINDS:
            for i, name in enumerate(getattr(signature, kind)):
                row[name] = Operand(kind, i, name in signature.writes, name in signature.optional)
        yield code.name, row


def _launch_rows() -> Iterator[tuple[str, Row]]:
    text = (source_folder() / "cuda" / "launches.def").read_text(encoding="utf-8")
    for name, words in read_rows(text, "LAUNCH|PART").items():
        firsts = [int(word) for word, _ in words if word.isdigit()]
        free = dict(zip(_KINDS, firsts or (0, 0, 0), strict=True))
        row = {}
        for word, operand in words:
            if kind := kind_of(word):
                row[operand] = Operand(kind, free[kind], "OUT" in word, word.startswith("OPT_"))
                free[kind] += 1
        yield name, row


@cache
def _table() -> dict[str, Row]:
    return dict([*_op_rows(), *_launch_rows()])


@cache
def layout(rows: tuple[str, ...]) -> Row:
    """The operands of a launch that has those of several rows.

    Raises
    ------
    ValueError
        Two operands have the same name, or the same position.
    """
    found: dict[str, Operand] = {}
    for row in rows:
        for name, operand in _table()[row].items():
            if name in found or any(operand[:2] == other[:2] for other in found.values()):
                raise ValueError(f"operand {name!r} of {row} collides with another one of {', '.join(rows)}")
            found[name] = operand
    return found


@dataclass(frozen=True, init=False)
class Operands:
    """The operands of an op or of a launch, by name; absent slots are None.

    Parameters
    ----------
    rows : str
        Ops, and rows of ``launches.def``, that name the operands.
    """

    rows: tuple[str, ...]
    named: Mapping[str, Any]

    def __init__(self, *rows: str, **named: Any) -> None:
        object.__setattr__(self, "rows", rows)
        object.__setattr__(self, "named", named)

    def __getattr__(self, name: str) -> Any:
        try:
            return self.named[name]
        except KeyError:
            raise AttributeError(f"{', '.join(self.rows)} has no operand {name!r}") from None

    def get(self, name: str, default: Any = None) -> Any:
        return self.named.get(name, default)

    def __add__(self, other: Operands) -> Operands:
        return Operands(*self.rows, *other.rows, **self.named, **other.named)

    def checked(self) -> Operands:
        """These operands, if they are all that their rows ask for and nothing else.

        Raises
        ------
        ValueError
            An operand is missing, or has no place.
        """
        known = layout(self.rows)
        missing = {name for name, operand in known.items() if not operand.optional and self.get(name) is None}
        if wrong := missing | self.named.keys() - known.keys():
            raise ValueError(f"operands of {', '.join(self.rows)}: {', '.join(sorted(wrong))} missing or unknown")
        return self
