"""Where the rows of a program lie: on the device from the start, or on the host, which hands them over chunk by chunk.

Promises: what a kernel would follow out of an array is refused here: rows of other widths, damaged CSR. What lies on
the device already is used where it lies; what fits there is copied once. Of what does not, the rows of a chunk of steps
are gathered into pinned memory while the device is busy with the chunk before, and copied beside its launches; the bits
are the same.
Never: changes what it was given, or knows what is done with it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from ...plan.ops import Source
from ...plan.plan import Mode, Plan, gathered
from ...rows.arrays import is_sparse
from ...rows.devices import on_gpu
from ...rows.shifted import split_shift
from ...rows.sparse import sparse_rows
from .protocol import ALIGNMENT, Device
from .table import SOURCE_DTYPE

__all__ = ["CHUNK", "N_SOURCES", "Data", "Resident", "Staged", "data_on"]

Array = NDArray[Any]

CHUNK = 32
"""Steps between two looks at what they reported, and at the clock."""
N_SOURCES = len(Source)

RESIDENT_SHARE = 0.8
"""Of the device's free memory, that data may take up for good."""
STAGED_BYTES = 64 * 2**20
"""Aim for what a chunk of steps brings along from the host: two such lie on either side."""

log = logging.getLogger("narrows")


class Taken(NamedTuple):
    """Rows for a chunk of steps: where the sources lie (`SOURCE_DTYPE`), and the numbers of the rows there."""

    table: Array
    rows: NDArray[np.int64]


class Data(Protocol):
    """The sources of a program."""

    most_steps: int
    """Of a chunk."""

    def take(self, rows: NDArray[np.int64], turn: int) -> Taken:
        """Have these rows on the device when the launches to come run. There are two turns, and one comes again only
        when the device is done with what it had."""

    def close(self) -> None: ...


def wanted(plan: Plan, modes: Mode) -> dict[int, int]:
    """The sources that ops of these modes take rows from, and how many columns each must have (any: 0)."""
    found: dict[int, int] = {}
    for op in plan.ops:
        if op.modes & modes and (taken := gathered(plan, op)) is not None:
            found[taken.source] = max(taken.columns or 0, found.get(taken.source, 0))
    return found


def check_csr(i: int, data: Any) -> None:
    """Refuse what is no CSR; whether columns increase is `sparse_rows`' affair."""
    indptr, indices = data.indptr, data.indices
    if len(indptr) != data.shape[0] + 1 or indptr[0] != 0 or bool((indptr[1:] < indptr[:-1]).any()):
        raise ValueError(f"CSR of source {i}: indptr must have a number more than rows, begin at 0 and never decrease")
    if (used := int(indptr[-1])) > min(len(indices), len(data.data)):
        raise ValueError(f"CSR of source {i}: indptr ends at {used}, past the {len(indices)} stored values")
    indices = indices[:used]
    if used and not (indices.min() >= 0 and indices.max() < data.shape[1]):
        raise ValueError(f"CSR of source {i}: a column outside of the {data.shape[1]}")


def data_on(device: Device, plan: Plan, dtype: np.dtype[Any], modes: Mode, sources: Mapping[int, Any]) -> Data:
    """Sources for ops of these modes by their numbers, absent ones None; on the device if they fit.

    Raises
    ------
    ValueError
        A source has another width than the plan expects, or is damaged.
    """
    spec = plan.spec
    rows, shift = split_shift(spec, sources[Source.X]) if sources.get(Source.X) is not None else (None, None)
    given = {i: data for i, data in {**sources, Source.X: rows, Source.SHIFT: shift}.items() if data is not None}
    for i, data in given.items():
        if getattr(data, "format", "") == "csr":
            check_csr(i, data)  # SciPy walks it without a look
        if is_sparse(data) or i in spec.sparse_sources:
            given[i] = sparse_rows(data)
        elif data.ndim == 1:
            given[i] = data[:, None]
    for i, cols in wanted(plan, modes).items():
        if i in given and cols and given[i].shape[1] != cols:
            raise ValueError(f"source {i} has {given[i].shape[1]} columns, the plan expects {cols}")
    there = [on_gpu(data) for data in given.values()]
    size = sum(stored_size(data, dtype) for data, lies in zip(given.values(), there, strict=True) if not lies)
    free = device.free_memory()
    if any(there) or size <= RESIDENT_SHARE * free:
        return Resident(device, dtype, given)
    log.info(
        "data of %.0f MiB stay on the host and are handed over batch by batch: the device has %.0f MiB free",
        size / 2**20,
        free / 2**20,
    )
    return Staged(device, dtype, plan.batch, given)


def stored_size(data: Any, dtype: np.dtype[Any]) -> int:
    """Bytes that it takes on the device."""
    if is_sparse(data):
        return len(data.indptr) * 8 + len(data.data) * (dtype.itemsize + 4)
    return int(data.size) * dtype.itemsize


def laid_out(
    data: Any, dtype: np.dtype[Any], contiguous: Callable[..., Any] = np.ascontiguousarray
) -> tuple[dict[str, Array], Array]:
    """The arrays of a source by their names in `SOURCE_DTYPE`, and its entry but for their addresses."""
    entry = np.zeros((), SOURCE_DTYPE)
    entry["rows"], entry["cols"] = data.shape
    types = {"data": dtype}
    parts = {"data": data}
    if is_sparse(data):
        entry["stored"], entry["csr"] = len(data.data), 1
        types |= {"indptr": np.dtype(np.int64), "indices": np.dtype(np.int32)}
        parts = {name: getattr(data, name) for name in types}
    return {name: contiguous(part, types[name]) for name, part in parts.items()}, entry


class Resident:
    """Sources on the device."""

    most_steps = CHUNK

    def __init__(self, device: Device, dtype: np.dtype[Any], sources: Mapping[int, Any]) -> None:
        self._device = device
        self._addresses: list[int] = []
        self._kept: list[Any] = []
        """Arrays of others on the device."""
        self.table = np.zeros(N_SOURCES, SOURCE_DTYPE)
        try:
            for i, data in sources.items():
                there = on_gpu(data)
                arrays, self.table[i] = laid_out(data, dtype, *([device.contiguous] if there else []))
                for name, array in arrays.items():
                    self.table[i][name] = self._lent(array) if there else self._copied(array)
        except BaseException:
            self.close()
            raise
        if self._kept:
            device.follow()

    def _copied(self, array: Array) -> int:
        # Something, even where nothing is stored.
        address = self._device.allocate(max(array.nbytes, 1), "the data")
        self._addresses.append(address)
        self._device.upload(address, array)
        return address

    def _lent(self, array: Any) -> int:
        self._kept.append(array)
        return self._device.address(array)

    def take(self, rows: NDArray[np.int64], turn: int) -> Taken:
        return Taken(self.table, rows)

    def close(self) -> None:
        for address in self._addresses:
            self._device.free(address)
        self._addresses, self._kept = [], []


class Picked(NamedTuple):
    """An array of some rows of a source: how large it is, and what writes it where it is wanted."""

    size: int
    dtype: np.dtype[Any]
    put: Callable[[Array], object]

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize


def dense_rows(data: Array, rows: NDArray[np.int64], dtype: np.dtype[Any]) -> dict[str, Picked]:
    shape = len(rows), data.shape[1]

    def put(out: Array) -> None:
        out = out.reshape(shape)
        if data.dtype == dtype:
            data.take(rows, axis=0, out=out, mode="clip")  # they are inside; "raise" would have them copied twice
        else:
            out[...] = data[rows]

    return {"data": Picked(shape[0] * shape[1], dtype, put)}


def csr_rows(data: Any, rows: NDArray[np.int64], dtype: np.dtype[Any]) -> dict[str, Picked]:
    """SciPy would copy what is stored three times, and with 64-bit indices, which large matrices have, slowly."""
    # Numba takes its time to be imported, and only data that stay on the host want it.
    from ..numba.kernels import segments

    first = data.indptr[rows]
    begins = np.zeros(len(rows) + 1, np.int64)
    np.cumsum(data.indptr[rows + 1] - first, out=begins[1:])

    def put(of: Array) -> Callable[[Array], object]:
        return lambda out: segments(of, first, begins, out)

    return {
        "data": Picked(int(begins[-1]), dtype, put(data.data)),
        "indptr": Picked(len(begins), begins.dtype, lambda out: np.copyto(out, begins)),
        "indices": Picked(int(begins[-1]), np.dtype(np.int32), put(data.indices)),
    }


class Staged:
    """Sources on the host, but for the shift of rows."""

    def __init__(self, device: Device, dtype: np.dtype[Any], batch: int, sources: Mapping[int, Any]) -> None:
        self._device, self._dtype = device, dtype
        self._sources = {i: data for i, data in sources.items() if i != Source.SHIFT}
        self._shift = Resident(device, dtype, {i: data for i, data in sources.items() if i == Source.SHIFT})
        of_row = sum(stored_size(data, dtype) / max(data.shape[0], 1) for data in self._sources.values())
        self.most_steps = int(max(1, min(CHUNK, STAGED_BYTES / max(of_row * batch, 1))))
        self._stages = (Stage(device), Stage(device))

    def take(self, rows: NDArray[np.int64], turn: int) -> Taken:
        table, size = self._shift.table.copy(), 0
        picked: list[tuple[int, Picked]] = []
        for i, data in self._sources.items():
            pick = csr_rows if is_sparse(data) else dense_rows
            parts = pick(data, rows, self._dtype)
            table[i]["rows"], table[i]["cols"] = len(rows), data.shape[1]
            if "indptr" in parts:
                table[i]["stored"], table[i]["csr"] = parts["data"].size, 1
            for name, part in parts.items():
                table[i][name] = size
                picked.append((size, part))
                size += -(-max(part.nbytes, 1) // ALIGNMENT) * ALIGNMENT
        stage = self._stages[turn]
        stage.fit(size)
        for i in self._sources:
            for name in ("data", "indptr", "indices") if table[i]["csr"] else ("data",):
                table[i][name] += np.uint64(stage.address)
        for begin, part in picked:
            part.put(stage.pinned[begin : begin + part.nbytes].view(part.dtype))
        self._device.send_ahead(stage.address, stage.pinned[:size])
        return Taken(table, np.arange(len(rows)))

    def close(self) -> None:
        self._shift.close()
        for stage in self._stages:
            stage.fit(0)


class Stage:
    """Memory on both sides, for what a chunk of steps brings along."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self.address, self.pinned = 0, np.empty(0, np.uint8)

    def fit(self, size: int) -> None:
        """Have as many bytes as this, or none."""
        if 0 < size <= len(self.pinned):
            return
        if self.address:
            self._device.free(self.address)
            self.address, self.pinned = 0, np.empty(0, np.uint8)
        if size:
            # A little more, since chunks of sparse rows differ in size.
            size += size // 8
            self.address, self.pinned = self._device.allocate(size), self._device.pinned(size)
