"""Arrays in memory that tells when it is touched where it should not be.

Promises: an array lies against a page that may not be touched, at its end or at its start, so that reading or writing
past it ends the process; everything else around and between its elements holds a poison (NaN, or -1) and is compared
byte by byte.
Never: leaves a gap between the guarded page and the array.
"""

from __future__ import annotations

import ctypes
import mmap
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
POISON = 0xFF
MARGIN = 4096
"""Bytes of poison on the side of an array that has no guarded page."""
_PROT_NONE = 0

LAYOUTS = {
    "C": lambda r, c: (c, 1),
    "F": lambda r, c: (1, r),
    "C of a wider": lambda r, c: (c + 3, 1),
    "F of a taller": lambda r, c: (1, r + 5),
    "every third": lambda r, c: (3 * c + 1, 3),
    "every second of F": lambda r, c: (2, 2 * r + 1),
    "rows backwards": lambda r, c: (-c, 1),
    "columns backwards": lambda r, c: (c + 1, -1),
    "F backwards": lambda r, c: (-1, -r),
    "F with columns backwards": lambda r, c: (1, -(r + 2)),
    "every second backwards": lambda r, c: (-(2 * c + 1), -2),
    "one row repeated": lambda r, c: (0, 1),
    "one column repeated": lambda r, c: (1, 0),
    "one element repeated": lambda r, c: (0, 0),
}
"""Strides, in elements, of a matrix with so many rows and columns."""
VECTORS = {
    "contiguous": lambda n: (1,),
    "every third": lambda n: (3,),
    "backwards": lambda n: (-1,),
    "every second backwards": lambda n: (-2,),
    "one element repeated": lambda n: (0,),
}
OUTPUTS = {
    "C": lambda r, c: (c, 1),
    "C of a wider": lambda r, c: (c + 3, 1),
    "rows backwards": lambda r, c: (-c, 1),
    "rows backwards of a wider": lambda r, c: (-(c + 5), 1),
}
"""Those with rows that can be written: contiguous and apart."""


class Guarded:
    """Memory for one array at a time.

    Parameters
    ----------
    size : int
        Bytes that the largest array spans.
    """

    def __init__(self, size: int) -> None:
        page = mmap.PAGESIZE
        inner = -(-(size + MARGIN) // page) * page
        self._map = mmap.mmap(-1, inner + 2 * page, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        whole = np.frombuffer(self._map, np.uint8)
        protect = ctypes.CDLL(None, use_errno=True).mprotect
        for start in (whole.ctypes.data, whole.ctypes.data + page + inner):
            if protect(ctypes.c_void_p(start), ctypes.c_size_t(page), _PROT_NONE) != 0:
                raise OSError(ctypes.get_errno(), "mprotect")
        self._bytes = whole[page : page + inner]

    def place(
        self, values: Any, strides: tuple[int, ...] | None = None, *, at_end: bool = True, shift: int = 0
    ) -> Array:
        """A copy of `values`, with these strides (in elements; C order by default).

        `shift` moves it by so many bytes away from the guarded page. Where elements share memory, one of their values
        stays.
        """
        values = np.array(values)  # it may lie in this very memory
        shape, size = values.shape, values.itemsize
        if strides is None:
            strides = tuple(int(np.prod(shape[i + 1 :])) for i in range(len(shape)))
        reach = [(n - 1) * s * size for n, s in zip(shape, strides, strict=True)]
        low, high = sum(min(r, 0) for r in reach), sum(max(r, 0) for r in reach) + size
        if values.size == 0:
            low = high = 0
        room = self._bytes[-(high - low + shift + MARGIN) :] if at_end else self._bytes[: high - low + shift + MARGIN]
        start = len(room) - shift - high if at_end else shift - low
        room[:] = POISON
        self.array = self._view(room, values, strides, start)
        self.array[...] = values
        self._room, self._start, self._strides = room, start, strides
        self._before = room.copy()
        return self.array

    @staticmethod
    def _view(room: Array, like: Array, strides: tuple[int, ...], start: int) -> Array:
        return np.ndarray(like.shape, like.dtype, room, start, tuple(s * like.itemsize for s in strides))

    def check(self, *, written: bool = False) -> None:
        """Raise AssertionError unless nothing changed; of an array that was `written`, nothing around its elements."""
        if written:
            self._view(self._before, self.array, self._strides, self._start)[...] = self.array
        if not np.array_equal(self._room, self._before):
            at = np.flatnonzero(self._room != self._before) - self._start
            raise AssertionError(f"{at.size} bytes changed, from byte {at[0]} to {at[-1]} of {self.array.shape}")
