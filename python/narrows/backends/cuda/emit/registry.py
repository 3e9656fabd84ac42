"""What each op is written by."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace as Operands
from typing import Any

from ....plan.ops import OpCode
from ....plan.spec import Activation
from ..launches import Writer
from ..table import FUNCTORS

__all__ = ["LOWER", "Operands", "act", "lowers"]

LOWER: dict[OpCode, Callable[[Writer, Any], None]] = {}
"""For each op, what writes its launches."""


def lowers(code: OpCode) -> Callable[[Callable[[Writer, Any], None]], Callable[[Writer, Any], None]]:
    def keep(function: Callable[[Writer, Any], None]) -> Callable[[Writer, Any], None]:
        LOWER[code] = function
        return function

    return keep


def act(o: Operands) -> str:
    return FUNCTORS[Activation(o.activation)]
