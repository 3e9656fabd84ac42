"""The data of a program: on the device, or on the host, which sends the rows of a chunk of steps at a time.

Promises: this module refuses rows of a wrong width and damaged CSR, so kernels stay inside their arrays. Arrays on the
device are used in place. Other data are copied there once if they fit. If they do not, the rows of a chunk are gathered
into pinned memory and copied while the device works on the chunk before. The bits are the same in all cases.
Never: changes the data; knows what is done with them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from ...errors import DataError
from ...plan.ops import Source
from ...plan.plan import Mode, Plan, gathered
from ...rows.arrays import is_sparse
from ...rows.devices import on_gpu
from ...rows.shifted import split_shift
from ...rows.sparse import check_csr, sparse_rows
from .protocol import ALIGNMENT, Device
from .table import SOURCE_DTYPE

__all__ = ["CHUNK", "N_SOURCES", "Data", "Resident", "Staged", "data_on"]

Array = NDArray[Any]

CHUNK = 32
"""Steps of a chunk. Between two chunks the host reads the terms and looks at the clock."""
N_SOURCES = len(Source)

RESIDENT_SHARE = 0.8
"""Share of the device's free memory that data may take."""
STAGED_BYTES = 64 * 2**20
"""Aim for the data that a chunk sends. The host and the device have room for two such chunks."""

log = logging.getLogger("narrows")


class Taken(NamedTuple):
    """Rows for a chunk of steps: the sources (`SOURCE_DTYPE`), and the numbers of the rows there."""

    table: Array
    rows: NDArray[np.int64]


class Data(Protocol):
    """The bound sources of a program."""

    most_steps: int
    """The most steps that a chunk may have."""

    def take(self, rows: NDArray[np.int64], turn: int) -> Taken:
        """Have these rows on the device for the next launches. There are two turns. A turn is used again only when the
        device no longer needs its rows."""

    def close(self) -> None: ...


def wanted(plan: Plan, modes: Mode) -> dict[int, int]:
    """The sources that ops of these modes gather from, and how many columns each must have (0: any number)."""
    found: dict[int, int] = {}
    for op in plan.ops:
        if op.modes & modes and (taken := gathered(plan, op)) is not None:
            found[taken.source] = max(taken.columns or 0, found.get(taken.source, 0))
    return found


def check_csr_there(data: Any, where: str) -> None:
    """`rows.sparse.check_csr` for CSR on a GPU: a few reductions that run there, so nothing is copied to the host."""
    indptr, indices = data.indptr, data.indices
    if len(indptr) != data.shape[0] + 1 or indptr[0] != 0 or bool((indptr[1:] < indptr[:-1]).any()):
        raise DataError(f"{where}: indptr must have {data.shape[0] + 1} entries, start at 0 and never decrease")
    if (used := int(indptr[-1])) > min(len(indices), len(data.data)):
        raise DataError(f"{where}: indptr runs to {used}, but {len(indices)} values are stored")
    indices = indices[:used]
    if used and not (indices.min() >= 0 and indices.max() < data.shape[1]):
        raise DataError(f"{where}: a column index is outside 0..{data.shape[1] - 1}")


def data_on(device: Device, plan: Plan, dtype: np.dtype[Any], modes: Mode, sources: Mapping[int, Any]) -> Data:
    """Bind sources, given by their numbers, for ops of these modes; on the device if they fit.

    Raises
    ------
    ValueError
        A source has a wrong width, or is damaged CSR.
    """
    spec = plan.spec
    rows, shift = split_shift(spec, sources[Source.X]) if sources.get(Source.X) is not None else (None, None)
    given = {i: data for i, data in {**sources, Source.X: rows, Source.SHIFT: shift}.items() if data is not None}
    for i, data in given.items():
        if getattr(data, "format", "") == "csr":
            # Before `sparse_rows`, since SciPy does not check what it sorts.
            (check_csr_there if on_gpu(data) else check_csr)(data, f"source {i}")
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
        "the data (%.0f MiB) stay on the host and are sent batch by batch: the device has %.0f MiB free",
        size / 2**20,
        free / 2**20,
    )
    return Staged(device, dtype, plan.batch_rows, given)


def stored_size(data: Any, dtype: np.dtype[Any]) -> int:
    """Bytes of a source on the device."""
    if is_sparse(data):
        return len(data.indptr) * 8 + len(data.data) * (dtype.itemsize + 4)
    return int(data.size) * dtype.itemsize


def laid_out(
    data: Any, dtype: np.dtype[Any], contiguous: Callable[..., Any] = np.ascontiguousarray
) -> tuple[dict[str, Array], Array]:
    """The arrays of a source by their names in `SOURCE_DTYPE`, and its entry without their addresses."""
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
        """Arrays of the caller on the device."""
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
        # An empty array needs an address, too.
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
    """An array of some rows of a source: its size, and the function that writes it into pinned memory."""

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
            data.take(rows, axis=0, out=out, mode="clip")  # rows are valid; "raise" would copy them twice
        else:
            out[...] = data[rows]

    return {"data": Picked(shape[0] * shape[1], dtype, put)}


def csr_rows(data: Any, rows: NDArray[np.int64], dtype: np.dtype[Any]) -> dict[str, Picked]:
    """Like indexing with SciPy, which copies the stored values three times, and slowly with 64-bit indices."""
    # Imported here, because Numba takes long to import and only data on the host need it.
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
    """Sources on the host, except the shift of rows."""

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
    """Memory on both sides for the data that a chunk sends."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self.address, self.pinned = 0, np.empty(0, np.uint8)

    def fit(self, size: int) -> None:
        """Have at least this many bytes; 0 frees the memory."""
        if 0 < size <= len(self.pinned):
            return
        if self.address:
            self._device.free(self.address)
            self.address, self.pinned = 0, np.empty(0, np.uint8)
        if size:
            # A little more, because chunks of sparse rows differ in size.
            size += size // 8
            self.address, self.pinned = self._device.allocate(size), self._device.pinned(size)
