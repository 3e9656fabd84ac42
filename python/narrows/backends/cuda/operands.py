"""The operands of a launch as its kernel takes them: one structure."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .launches import Launch, View
from .protocol import Planned
from .table import ENDS, GROUP_DTYPE, LAUNCH_DTYPE, STACK_DTYPE

__all__ = ["Where", "planned"]


class Where(NamedTuple):
    """What launches are handed besides matrices and numbers of their own; addresses are of the device."""

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
            _matrices(to["slots"], member, where)
            to["kind"], to["activation"], to["option"], to["flags"] = member.ints
            to["number"] = member.floats[0] if member.floats else 0.0
        return stack
    if launch.members:
        group = np.zeros((), GROUP_DTYPE)
        kinds = [ENDS.get(member.kernel, 0) for member in launch.members]
        # Those that end a step share a block.
        sizes = [member.blocks * (kind == 0) for member, kind in zip(launch.members, kinds, strict=True)]
        ends = [end + (kind > 0) for end, kind in zip(accumulate(sizes), kinds, strict=True)]
        for i, member in enumerate(launch.members):
            group["members"][i] = operands(member, where)
        group["ends"][: len(ends)], group["kinds"][: len(kinds)] = ends, kinds
        return group
    alone = np.zeros((), LAUNCH_DTYPE)
    _matrices(alone["slots"], launch, where)
    alone["ints"][: len(launch.ints)] = launch.ints
    alone["floats"][: len(launch.floats)] = launch.floats
    alone["step"], alone["sources"], alone["m"], alone["learn"] = where.step, where.sources, where.m, where.learn
    return alone


def _matrices(slots: NDArray[Any], launch: Launch, where: Where) -> None:
    for to, view in zip(slots, launch.slots, strict=False):
        if view is not None:
            to["data"], to["rows"], to["cols"], to["ld"] = where.address(view), view.rows, view.cols, view.ld
