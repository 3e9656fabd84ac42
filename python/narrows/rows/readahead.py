"""Reading the next block of a data set while the present one is worked on.

Promises: results come in order, one read at a time, in one thread that ends with the iteration; what a read raises is
raised where its result would have come. Never: holds a block that has been handed out, or reads more than one ahead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

__all__ = ["read_ahead"]

T = TypeVar("T")


def read_ahead(reads: Iterable[Callable[[], T]]) -> Iterator[T]:
    """The results of `reads`, in order; while one is used, the next is made in another thread."""
    with ThreadPoolExecutor(1, "narrows-read") as reader:
        queue = (reader.submit(read) for read in reads)
        pending = next(queue, None)
        while pending is not None:
            block = [pending.result()]
            pending = next(queue, None)
            yield block.pop()
