"""`read_ahead`: order, one block ahead and no more, errors in their place, no thread left behind."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable

import numpy as np
import pytest

from narrows.rows.readahead import read_ahead


def reader_threads() -> int:
    return sum(thread.name.startswith("narrows-read") for thread in threading.enumerate())


def test_results_are_in_order_and_made_elsewhere() -> None:
    makers: list[Callable[[], tuple[int, int]]] = [lambda i=i: (i, threading.get_ident()) for i in range(20)]  # type: ignore[misc]
    found = list(read_ahead(makers))
    assert [number for number, _ in found] == list(range(20))
    assert {thread for _, thread in found}.isdisjoint({threading.get_ident()})
    assert reader_threads() == 0
    assert list(read_ahead([])) == []


def test_the_next_is_read_while_one_is_used_and_no_other() -> None:
    begun = [threading.Event() for _ in range(5)]
    for number, _ in enumerate(read_ahead([event.set for event in begun])):
        if number < 4:
            assert begun[number + 1].wait(10)
        assert [event.is_set() for event in begun] == [i <= number + 1 for i in range(5)]


def test_a_block_handed_out_is_not_held() -> None:
    blocks = read_ahead([lambda: np.zeros(1000) for _ in range(3)])
    for block in blocks:
        seen = weakref.ref(block)
        del block
        gc.collect()
        assert seen() is None


def test_an_error_comes_in_its_place() -> None:
    def fail() -> int:
        raise OSError("no such block")

    found: list[int] = []
    with pytest.raises(OSError, match="no such block"):
        found.extend(read_ahead([lambda: 1, fail, lambda: 3]))
    assert found == [1]
    assert reader_threads() == 0


def test_leaving_early_ends_the_thread() -> None:
    blocks = read_ahead([lambda: 0] * 5)
    assert next(iter(blocks)) == 0
    assert reader_threads() == 1
    blocks.close()  # type: ignore[attr-defined]
    assert reader_threads() == 0
