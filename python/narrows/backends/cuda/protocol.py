"""What a program needs of a device, and the launches that it hands over.

Never: knows which device it is: CuPy's, or a test's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from ...plan.spec import Precision

__all__ = ["ALIGNMENT", "Device", "Mark", "Planned"]

Array = NDArray[Any]

ALIGNMENT = 256
"""Bytes; addresses of device memory are multiples of it."""


class Planned(NamedTuple):
    """A launch with its operands as one structure, of shape () (see `operands.operands`)."""

    kernel: str
    blocks: int
    threads: int
    operands: Array


class Mark(Protocol):
    """A point in the order of a device's work."""

    def wait(self) -> None:
        """Wait until all earlier work is done."""


class Device(Protocol):
    """What a program needs of a device. Addresses are numbers. Calls take effect in their order."""

    guard: int
    """Unused bytes after each area."""

    @property
    def blas(self) -> Any:
        """What runs launches of `launches.BLAS`; None if own kernels do large products, too."""

    def allocate(self, size: int, what: str = ...) -> int:
        """The address of `size` bytes, a multiple of `ALIGNMENT`, with undefined content. `what` names their purpose
        in the message if there is not enough memory."""

    def free(self, address: int) -> None: ...

    def free_memory(self) -> int:
        """Bytes that can still be allocated."""

    def pinned(self, size: int) -> Array:
        """Pinned bytes on the host, which the device can read and write."""

    def upload(self, address: int, data: Array) -> None:
        """Copy a contiguous array to the device. The array may be changed when this returns."""

    def download(self, address: int, out: Array) -> None:
        """Wait for all earlier work, then copy from the device into a contiguous array."""

    def send(self, address: int, pinned: Array) -> None:
        """Queue a copy of pinned memory. The memory must not change until a later mark was waited for."""

    def send_ahead(self, address: int, pinned: Array) -> None:
        """Like `send`, but in parallel with earlier launches. Later launches wait for it."""

    def fetch(self, address: int, pinned: Array) -> None:
        """Queue a copy into pinned memory, done before a later mark."""

    def mark(self) -> Mark: ...

    def graph(self, planned: Sequence[Planned], precision: Precision) -> Callable[[], None]:
        """A function that runs these launches, one after the other, each time it is called."""

    # For arrays of the caller on the device:

    def contiguous(self, array: Any, dtype: np.dtype[Any]) -> Any:
        """The array without gaps and in this type, without a copy if it is that already."""

    def address(self, array: Any) -> int:
        """The address of the array."""

    def empty(self, shape: tuple[int, int], dtype: np.dtype[Any]) -> Any:
        """A new array for the caller, to be written after `follow`."""

    def store(self, array: Any, address: int, ld: int) -> None:
        """Queue a copy into a matrix without gaps, from rows at an address that are `ld` elements apart."""

    def fill(self, address: int, ld: int, array: Any) -> None:
        """Queue the copy in the other direction."""

    def follow(self) -> None:
        """Run later work after all work that the caller has queued on the device."""
