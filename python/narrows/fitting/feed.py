"""The order of training: which rows are held out, and in which order training visits the others.

- A source that fits into one block is trained on exactly as the same array in memory.
- The order of rows depends on the seed and the number of the epoch only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..backends import Program
from ..plan.spec import NetworkSpec
from ..training import Block
from .table import BLOCK_BYTES, Rows, Table

__all__ = ["RowLosses", "TrainingFeed", "even_batch", "shuffled", "split_rows", "validator"]

RowLosses = Callable[[Callable[..., NDArray[Any]], NetworkSpec, Any, Any, Any], NDArray[Any]]
"""Losses of rows, from a program's `apply`, its network, the rows, their target (None: the rows) and conditions."""


def split_rows(n_rows: int, fraction: float, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Training rows and held-out rows, both sorted; at least one of each."""
    n_held = min(max(1, round(fraction * n_rows)), n_rows - 1)
    order = _generator(seed, 0).permutation(n_rows)
    return np.sort(order[n_held:]), np.sort(order[:n_held])


def even_batch(n_rows: int, limit: int) -> int:
    """Rows per step: at most `limit`, at least half of it, and chosen so that the last step is not much smaller.

    In a step of few rows each row has many times the weight of other rows, and the gradient many times the variance.
    Adaptive solvers then end measurably off the minimum.
    """
    limit = min(limit, n_rows)
    sizes = range(limit, (limit - 1) // 2, -1)
    fill = {size: ((n_rows - 1) % size + 1) / size for size in sizes}
    return next((size for size in sizes if fill[size] >= 0.75), max(sizes, key=lambda size: fill[size]))


def _generator(seed: int, number: int) -> np.random.Generator:
    return np.random.Generator(np.random.SFC64(np.random.SeedSequence([seed, number])))


def shuffled(rows: NDArray[np.int64], generator: np.random.Generator) -> NDArray[np.int64]:
    """Sorted `rows`, not negative and without duplicates, in random order.

    Each row becomes a word with 32 random bits above the row's number; the words are sorted. Where NumPy sorts with
    vector instructions this takes half the time of exchanging rows. No two words are equal, so the order is the same on
    every machine. It does not change if a constant is added to all rows.
    """
    bits = np.uint64(int(rows[-1]).bit_length())
    drawn = generator.bit_generator.random_raw(-(-len(rows) // 2)).view(np.uint32)
    words = drawn[: len(rows)].astype(np.uint64)
    words <<= bits
    words |= rows.view(np.uint64)
    words.sort()
    words &= (np.uint64(1) << bits) - np.uint64(1)
    return words.view(np.int64)


@dataclass
class TrainingFeed:
    """A `training.Feed` over a table.

    Attributes
    ----------
    table : Table
    rows : ndarray of int64
        The training rows, sorted.
    batch_rows : int
        Rows of a step.
    seed : int
    shuffle : bool or "blocks"
        Visit blocks, and the rows inside them, in a new random order in each epoch.
    block_bytes : int
        A table of sources is visited in blocks of about this size, of whole steps. A table in memory is one block,
        unless it is shuffled by blocks.
    """

    table: Table
    rows: NDArray[np.int64]
    batch_rows: int
    seed: int
    shuffle: bool | str
    block_bytes: int = BLOCK_BYTES
    _resident: Rows | None = field(default=None, init=False, repr=False)

    @property
    def n_rows(self) -> int:
        return len(self.rows)

    @cached_property
    def block_rows(self) -> int:
        """Rows of the table in a block."""
        if self.table.in_memory and self.shuffle != "blocks":
            return self.table.n_rows
        steps = max(1, self.block_bytes // max(1, self.table.row_bytes) // self.batch_rows)
        return steps * self.batch_rows

    @cached_property
    def borders(self) -> NDArray[np.int64]:
        """Where each block's rows begin in `rows`; the last border is the end of `rows`."""
        starts = np.arange(0, self.table.n_rows, self.block_rows)
        return np.append(np.searchsorted(self.rows, starts), len(self.rows))

    @property
    def n_steps(self) -> int:
        return int((-(-np.diff(self.borders) // self.batch_rows)).sum())

    def blocks(self, epoch: int) -> Iterator[Block]:
        generator = _generator(self.seed, epoch + 1)
        n_blocks = len(self.borders) - 1
        order = generator.permutation(n_blocks) if self.shuffle and n_blocks > 1 else np.arange(n_blocks)
        for b in order.tolist():
            first = b * self.block_rows
            rows = self.rows[self.borders[b] : self.borders[b + 1]]
            if first and not self.table.in_memory:
                rows = rows - first
            if len(rows):
                if self.shuffle:
                    rows = shuffled(rows, generator)
                yield Block(rows, lambda first=first: self._load(first))  # type: ignore[misc]

    def _load(self, first: int) -> Rows:
        if self.table.in_memory:
            if self._resident is None:
                self._resident = Rows(self.table.X, self.table.target, self.table.weight, self.table.condition)
            return self._resident
        return self.table.read(slice(first, first + self.block_rows))


def validator(
    table: Table, rows: NDArray[np.int64] | None, block_bytes: int, row_losses: RowLosses
) -> Callable[[Program], float]:
    """A function that returns a program's mean loss over `rows`; the rows stay in memory if they fit."""
    n_rows = table.n_rows if rows is None else len(rows)
    if rows is not None and (table.in_memory or n_rows * table.row_bytes <= block_bytes):
        table, rows = Table(*table.read(rows)), None
    block_rows = n_rows if table.in_memory else max(1, block_bytes // max(1, table.row_bytes))
    if table.weight is not None and table.weight.sum() == 0:
        table = dataclasses.replace(table, weight=None)

    def validate(program: Program) -> float:
        total = weights = 0.0
        for X, target, weight, condition in table.blocks(block_rows, rows):
            losses = row_losses(program.apply, program.plan.spec, X, target, condition).astype(np.float64)
            total += float(losses.sum() if weight is None else losses @ weight)
            weights += float(len(losses) if weight is None else weight.sum())
        return total / weights

    return validate
