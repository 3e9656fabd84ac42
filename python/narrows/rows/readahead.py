"""Reads the next block of a data set while the current one is in use.

- Results come in order. One thread does one read at a time, and ends with the iteration.
- An error of a read is raised in place of its result.
- At most one block is read ahead, and a block that was returned is not kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

__all__ = ["read_ahead"]

T = TypeVar("T")


def read_ahead(reads: Iterable[Callable[[], T]]) -> Iterator[T]:
    """The results of `reads`, in order; another thread makes the next one while one is in use."""
    with ThreadPoolExecutor(1, "narrows-read") as reader:
        queue = (reader.submit(read) for read in reads)
        pending = next(queue, None)
        while pending is not None:
            block = [pending.result()]
            pending = next(queue, None)
            yield block.pop()
