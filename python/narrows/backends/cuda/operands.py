"""The operands of a launch as the one structure that its kernel takes."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .launches import Launch, View
from .layout import layout
from .protocol import Planned
from .table import ENDS, GROUP_DTYPE, LAUNCH_DTYPE, STACK_DTYPE

__all__ = ["Where", "planned"]


class Where(NamedTuple):
    """What all launches of a run share: addresses on the device, rows of the batch, whether the step learns."""

    address: Callable[[View], int]
    step: int
    sources: int
    m: int
    learn: bool


def planned(launch: Launch, where: Where) -> Planned:
    return Planned(launch.kernel, launch.blocks, launch.threads, operands(launch, where))


def operands(launch: Launch, where: Where) -> NDArray[Any]:
    """One structure, of shape (), as the kernel takes it."""
    if launch.kernel.startswith("stack"):
        stack = np.zeros((), STACK_DTYPE)
        stack["n"], stack["m"], stack["learn"] = len(launch.members), where.m, where.learn
        stack["step"], stack["sources"] = where.step, where.sources
        for to, member in zip(stack["stages"], launch.members, strict=False):
            _place(to, member, where)
        return stack
    if launch.members:
        group = np.zeros((), GROUP_DTYPE)
        kinds = [ENDS.get(member.kernel, 0) for member in launch.members]
        # Members that end a step share a block.
        sizes = [member.blocks * (kind == 0) for member, kind in zip(launch.members, kinds, strict=True)]
        ends = [end + (kind > 0) for end, kind in zip(accumulate(sizes), kinds, strict=True)]
        for i, member in enumerate(launch.members):
            group["members"][i] = operands(member, where)
        group["ends"][: len(ends)], group["kinds"][: len(kinds)] = ends, kinds
        return group
    alone = np.zeros((), LAUNCH_DTYPE)
    _place(alone, launch, where)
    alone["step"], alone["sources"], alone["m"], alone["learn"] = where.step, where.sources, where.m, where.learn
    return alone


def _place(to: NDArray[Any], launch: Launch, where: Where) -> None:
    known = layout(launch.operands.rows)
    for name, value in launch.operands.named.items():
        if isinstance(value, View):
            slot = to["slots"][known[name].position]
            slot["data"], slot["rows"], slot["cols"], slot["ld"] = where.address(value), *value[2:]
        elif name in (to.dtype.names or ()):
            to[name] = value
        elif value is not None:
            to[known[name].kind][known[name].position] = value
