"""Combines the launches of a step into fewer: stacks, groups, and launches that also begin or end the step.

Promises: memory holds the same bits as after the single launches. A launch moves only past launches that share no
memory with it which either of them writes. The rows of operands say what a launch reads and writes.
Never: decides by the number of rows, except how many rows a block of a stack has.

A *stack* is a run of launches on layers up to `STACK_WIDTH` wide in which no row needs another row. A block keeps its
rows from the first launch to the last (csrc/cuda/stack.cuh). A *group* is several independent launches of one kernel,
each with its own blocks (`group` in csrc/cuda/steps.cuh).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import product
from typing import Any, NamedTuple

from ...plan.ops import OpCode
from ...plan.spec import Activation
from .launches import THREADS, Area, Launch, View
from .layout import Operands, layout
from .table import (
    FUNCTORS,
    KERNELS,
    MAX_MEMBERS,
    MAX_STAGES,
    STACK_ROWS,
    STACK_THREADS,
    STACK_WIDTH,
)

__all__ = ["schedule"]

BEGIN = -1
LOADS, WEIGHT_TURNED, ROUNDS = 1, 2, 4
"""The kind of a stage that is not an op, and the flags, as in csrc/cuda/stack.cuh."""
BODIES = {
    "gemm": "Gemm",
    "colsum": "ColSum",
    "grain_sum": "GrainSum",
    "penalties": "Penalties",
    "conv_wgrad": "ConvWgrad",
}
"""Kernels that can be members of a group, and their C++ classes."""
ENDING = 64
"""The fewest threads of a block that ends a step."""
FEW_BLOCKS = 264
"""Blocks of a stack take few rows each up to this number: two for each multiprocessor of a large GPU."""


def schedule(launches: Sequence[Launch], begin: Launch, end: Launch) -> tuple[Launch, ...]:
    """The launches of a step; `begin` comes first and `end` last."""
    rest, reduces = parted(launches)
    return with_end(grouped(with_begin(stacked(rest), begin)), [*reduces, end])


# --- what a launch touches --------------------------------------------------------------------------------------------


class Touched(NamedTuple):
    view: View
    begin: int
    end: int
    written: bool

    def meets(self, other: Touched) -> bool:
        """Whether the order of both matters."""
        apart = self.view.area != other.view.area or self.end <= other.begin or other.end <= self.begin
        return not apart and (self.written or other.written)


def touched(launch: Launch) -> list[Touched]:
    """Temporaries and kept matrices may have other types, so each of these areas counts as a whole."""
    if launch.members:
        return [part for member in launch.members for part in touched(member)]
    known, found = layout(launch.operands.rows), []
    for name, view in launch.views.items():
        begin, size = view.offset, (view.rows - 1) * view.ld + view.cols
        whole = view.area in (Area.TEMPORARY, Area.KEPT)
        begin, end = (0, 2**63) if whole else (begin, begin + size)
        found.append(Touched(view, begin, end, known[name].written))
    return found


def independent(one: Launch, other: Launch) -> bool:
    return not any(a.meets(b) for a, b in product(touched(one), touched(other)))


# --- stacks -----------------------------------------------------------------------------------------------------------

_PRODUCT = re.compile(r"gemm<\w+, Rows, (Rows|Turned), (Activate|Slope)<(\w+)>>")
_LOSS = re.compile(r"loss<(?:Linked<(Mse|Huber), (\w+)>|Logistic)>")
_NUMBERS = {functor: int(activation) for activation, functor in FUNCTORS.items()} | {None: int(Activation.SIGMOID)}


class Stage(NamedTuple):
    """A launch as a stage of a stack: its op, and the rows that it reads and leaves."""

    launch: Launch
    op: OpCode
    named: dict[str, Any]
    """Its operands by the names of the op, and the other fields of a stage (see `table.STACK_DTYPE`)."""
    needs: View | None
    leaves: View


def stage_of(launch: Launch) -> Stage | None:
    """The launch as a stage; None if it cannot be one."""
    o = launch.operands
    if launch.kernel == "gather" and o.out.cols <= STACK_WIDTH:
        named = {"out": o.out, "shift": o.shift, "option": o.source}
        return Stage(launch, OpCode.GATHER, named, None, o.out)
    if (found := _PRODUCT.fullmatch(launch.kernel)) and max(o.cols, o.depth) <= STACK_WIDTH:
        right, epilogue, activation = found.groups()
        flags = (WEIGHT_TURNED if right == "Rows" else 0) | (ROUNDS if o.rounds else 0)
        named = {"W": o.right, "out": o.out, "activation": _NUMBERS[activation], "flags": flags}
        if epilogue == "Activate":
            return Stage(launch, OpCode.DENSE, named | {"x": o.left, "b": o.b, "pre": o.pre}, o.left, o.out)
        return Stage(launch, OpCode.DGRAD, named | {"dz": o.left, "saved": o.saved, "number": o.scale}, o.left, o.out)
    if (found := _LOSS.fullmatch(launch.kernel)) and o.z.cols <= STACK_WIDTH:
        _, activation = found.groups()
        named = {name: o.get(name) for name in ("z", "target", "weight", "rowloss")}
        named |= {"activation": _NUMBERS[activation], "option": o.loss, "number": o.delta}
        return Stage(launch, OpCode.LOSS, named, o.z, o.z)
    return None


def by_rows(one: Launch, other: Launch) -> bool:
    """Whether all memory that both touch and one writes is the same matrix, so each block needs its own rows alone."""
    meeting = (pair for pair in product(touched(one), touched(other)) if pair[0].meets(pair[1]))
    return all((a.view.offset, a.view.ld, a.view.rows) == (b.view.offset, b.view.ld, b.view.rows) for a, b in meeting)


def stacked(launches: Iterable[Launch]) -> list[Launch]:
    out: list[Launch] = []
    run: list[Stage] = []

    def close() -> None:
        out.extend([stack_of(run)] if len(run) > 1 else [stage.launch for stage in run])
        run.clear()

    for launch in launches:
        stage = stage_of(launch)
        # Leave room for one more stage, which begins the step.
        if stage is None or len(run) == MAX_STAGES - 1 or not all(by_rows(s.launch, launch) for s in run):
            close()
        if stage is None:
            out.append(launch)
        else:
            run.append(stage)
    close()
    return out


def stack_of(run: Sequence[Stage]) -> Launch:
    m = run[0].leaves.rows
    few, many = STACK_ROWS
    rows = few if m <= few * FEW_BLOCKS else many
    members, held = [], None
    for stage in run:
        loads = LOADS if stage.needs is not None and stage.needs != held else 0
        held = stage.leaves
        named = {**stage.named, "kind": stage.op, "flags": stage.named.get("flags", 0) | loads}
        members.append(stage.launch._replace(operands=Operands(stage.op.name, **named)))
    return Launch(f"stack<{rows}>", -(-m // rows), STACK_THREADS, members=tuple(members))


# --- beginning and end ------------------------------------------------------------------------------------------------


def with_begin(launches: Sequence[Launch], begin: Launch) -> list[Launch]:
    """Let the first launch begin the step, if it can."""
    if not launches:
        return [begin]
    first, *rest = launches
    if first.kernel.startswith("stack"):
        opening = begin._replace(operands=Operands(*begin.operands.rows, **begin.operands.named, kind=BEGIN))
        return [first._replace(members=(opening, *first.members)), *rest]
    if first.kernel == "gather":
        return [Launch("begin_gather", first.blocks, first.threads, members=(begin, first)), *rest]
    return [begin, first, *rest]


def parted(launches: Sequence[Launch]) -> tuple[list[Launch], list[Launch]]:
    """Split off the reductions to terms that can move to the end of the step."""
    rest: list[Launch] = []
    ends: list[Launch] = []
    for launch in reversed(launches):
        last = launch.kernel == "reduce" and all(independent(launch, other) for other in rest)
        (ends if last else rest).append(launch)
    return rest[::-1], ends[::-1]


def with_end(launches: Sequence[Launch], ends: Sequence[Launch]) -> tuple[Launch, ...]:
    """Let one more block of the last launch end the step, if it can."""
    spared = max(0, len(ends) - MAX_MEMBERS)
    alone, ends = [*launches, *ends[:spared]], ends[spared:]
    last = alone[-1]
    members = last.members if last.kernel.startswith("group") else (last,)
    fits = group_name(last) is not None and last.threads >= ENDING and len(members) + len(ends) <= MAX_MEMBERS
    if fits and all(independent(a, b) for a, b in product(members, ends)):
        return (*alone[:-1], group_of(members, ends))
    if len(ends) == 1:
        return (*alone, *ends)
    return (*alone, Launch("group<Nothing>", 1, ENDING, members=tuple(ends)))


# --- groups -----------------------------------------------------------------------------------------------------------

_NAMES = frozenset(KERNELS)


def group_name(launch: Launch) -> str | None:
    """The kernel for a group of such launches; None if there is none."""
    if launch.kernel.startswith("group"):
        return launch.kernel
    name, _, rest = launch.kernel.partition("<")
    grouped_as = f"group<{BODIES.get(name)}{'<' + rest if rest else ''}>"
    return grouped_as if grouped_as in _NAMES else None


def grouped(launches: Iterable[Launch]) -> list[Launch]:
    together: list[list[Launch]] = []
    for launch in map(whole, launches):
        for group in reversed(together) if group_name(launch) else ():
            if not all(independent(launch, other) for other in group):
                together.append([launch])
                break
            if len(group) < MAX_MEMBERS and (group[0].kernel, group[0].threads) == (launch.kernel, launch.threads):
                group.append(launch)
                break
        else:
            together.append([launch])
    return [group_of(group) if len(group) > 1 else group[0] for group in together]


def whole(launch: Launch) -> Launch:
    """With full blocks, for kernels whose threads have one element each."""
    if launch.kernel.startswith("grain_sum"):
        return launch._replace(threads=THREADS, blocks=-(-launch.blocks * launch.threads // THREADS))
    return launch


def group_of(members: Sequence[Launch], ends: Sequence[Launch] = ()) -> Launch:
    blocks = sum(member.blocks for member in members) + bool(ends)
    return Launch(str(group_name(members[0])), blocks, members[0].threads, members=(*members, *ends))
