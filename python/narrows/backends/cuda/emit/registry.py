"""The registry of the functions that write the launches of each op."""

from __future__ import annotations

from collections.abc import Callable

from ....plan.ops import SIGNATURES, OpCode
from ....plan.spec import Activation
from ..layout import Operands
from ..table import FUNCTORS, KERNELS

__all__ = ["LOWER", "act", "lowers"]

Function = Callable[..., None]


def _each(kernel: str) -> Function:
    return lambda w, o: w.each(kernel, o.out, o)


LOWER: dict[OpCode, Function] = {
    code: _each(code.name.lower())
    for code, signature in SIGNATURES.items()
    if code.name.lower() in KERNELS and "out" in signature.writes
}
"""The function that writes the launches of an op, from a `launches.Writer` and the op's operands. Gradients of weights
take a third argument if they also sum dz for the bias: the operands of the op that would do it. An op with a kernel of
its own name and a thread for each element of `out` needs no function: it is here already."""


def lowers(code: OpCode) -> Callable[[Function], Function]:
    """Register a function for an op."""

    def keep(function: Function) -> Function:
        LOWER[code] = function
        return function

    return keep


def act(o: Operands) -> str:
    """The C++ class of an op's activation."""
    return FUNCTORS[Activation(o.activation)]
