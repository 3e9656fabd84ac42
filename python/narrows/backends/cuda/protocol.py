"""What a program asks of a device, and the launches that it hands over.

Never: knows which device it is.
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
"""Addresses of device memory are multiples of this many bytes."""


class Planned(NamedTuple):
    """A launch with its operands as the device takes them, one structure of shape () (see `schedule.operands`)."""

    kernel: str
    blocks: int
    threads: int
    operands: Array


class Mark(Protocol):
    """A place in the order of a device's work."""

    def wait(self) -> None:
        """Until all that came before it is done."""


class Device(Protocol):
    """What a program needs of a device. Addresses are numbers; calls take effect in the order they are made."""

    guard: int
    """Bytes to leave unused behind each area."""

    @property
    def blas(self) -> Any:
        """What runs launches of `launches.BLAS`; None if large products are to be own kernels, too."""

    def allocate(self, size: int, what: str = ...) -> int:
        """The address of `size` bytes, a multiple of `ALIGNMENT`; what they hold is not defined. `what` is to lie
        there, for the message if they are not to be had."""

    def free(self, address: int) -> None: ...

    def free_memory(self) -> int:
        """Bytes that could be allocated."""

    def pinned(self, size: int) -> Array:
        """Bytes on the host that the device reads and writes by itself."""

    def upload(self, address: int, data: Array) -> None:
        """Copy a contiguous array there; it may be changed once this returns."""

    def download(self, address: int, out: Array) -> None:
        """Wait for all that came before, and copy from there into a contiguous array."""

    def send(self, address: int, pinned: Array) -> None:
        """Have pinned memory copied there; it must stay as it is until a later mark has been waited for."""

    def send_ahead(self, address: int, pinned: Array) -> None:
        """As `send`, but beside launches that came before; those that come later wait for it."""

    def fetch(self, address: int, pinned: Array) -> None:
        """Have pinned memory overwritten from there, before a later mark."""

    def mark(self) -> Mark: ...

    def graph(self, planned: Sequence[Planned], precision: Precision) -> Callable[[], None]:
        """What runs these launches, one after the other, as often as it is called."""

    # Of arrays that lie on the device, but are others':

    def contiguous(self, array: Any, dtype: np.dtype[Any]) -> Any:
        """Such an array without gaps and of this type, itself if it is that."""

    def address(self, array: Any) -> int:
        """Where it lies."""

    def empty(self, shape: tuple[int, int], dtype: np.dtype[Any]) -> Any:
        """A new one for the caller, to be written after `follow`."""

    def store(self, array: Any, address: int, ld: int) -> None:
        """Have the rows of a matrix without gaps overwritten with those at an address, `ld` elements apart."""

    def fill(self, address: int, ld: int, array: Any) -> None:
        """The other way round."""

    def follow(self) -> None:
        """Have what comes run after all that the caller has asked of the device."""
