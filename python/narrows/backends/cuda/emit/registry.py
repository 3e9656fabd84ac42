"""The functions that write the launches of each op.

Never: knows what they write.
"""

from __future__ import annotations

from collections.abc import Callable

from ....plan.ops import OpCode
from ....plan.spec import Activation
from ..layout import Operands
from ..table import FUNCTORS

__all__ = ["LOWER", "act", "lowers"]

Function = Callable[..., None]

LOWER: dict[OpCode, Function] = {}
"""For each op the function that writes its launches, of a `launches.Writer` and the op's operands. Gradients of weights
take as a third argument the operands of the op that sums the same dz for the bias, if they are to do that, too."""


def lowers(code: OpCode) -> Callable[[Function], Function]:
    """Makes a function the one of an op."""

    def keep(function: Function) -> Function:
        LOWER[code] = function
        return function

    return keep


def act(o: Operands) -> str:
    """The C++ class of an op's activation."""
    return FUNCTORS[Activation(o.activation)]
