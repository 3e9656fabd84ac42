"""A plan on a device: its memory, its graphs, and the protocol of `backends.Program` over them.

Promises: one allocation holds all of a program but its data; whatever changes from step to step lies in it, so that the
launches of a number of rows are captured once and replayed; nothing is waited for inside a chunk of steps.
Never: knows whose device it is. `Device` is what it needs of one: CuPy's, or a test's.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from ...plan import FROM_CODES, LEARN, Mode, OpCode, Plan, Precision, Slot
from .. import BATCH, SHIFT, Hyper, State, all_finite, sparse_rows, told_apart
from .launches import Area, Launch, View
from .lowering import launches, temporary_size
from .table import LAUNCH_DTYPE, SOURCE_DTYPE, STEP_DTYPE

__all__ = ["Arena", "CudaProgram", "Device", "Planned"]

Array = NDArray[Any]

CHUNK = 32
"""Steps between two looks at what they reported, and at the clock."""
ALIGNMENT = 256
N_SOURCES = 6
X, TARGET, WEIGHT, LATENT = range(4)  # and SHIFT and BATCH
TRAIN_BANK, APPLY_BANK = range(2)
"""Training keeps its sources bound while other data is applied."""


class Planned(NamedTuple):
    """A launch with its operands as the device takes them (one `LAUNCH_DTYPE`, of shape ())."""

    kernel: str
    blocks: int
    threads: int
    operands: Array


class Device(Protocol):
    """What a program needs of a device. Addresses are numbers; calls take effect in the order they are made."""

    guard: int
    """Bytes to leave unused behind each area."""

    def allocate(self, size: int) -> int:
        """The address of `size` bytes, a multiple of `ALIGNMENT`; what they hold is not defined."""

    def free(self, address: int) -> None: ...

    def upload(self, address: int, data: Array) -> None:
        """Copy a contiguous array there; it may be changed once this returns."""

    def download(self, address: int, out: Array) -> None:
        """Wait for all that came before, and copy from there into a contiguous array."""

    def view(self, address: int, shape: tuple[int, int], ld: int, dtype: Any) -> Any:
        """An array over memory of the device, its rows `ld` elements apart."""

    def graph(self, planned: Sequence[Planned], precision: Precision) -> Callable[[], None]:
        """What runs these launches, one after the other, as often as it is called."""


class Arena:
    """Where the areas of a program begin, in bytes from the start of its memory."""

    def __init__(self, plan: Plan, itemsize: int, guard: int = 0) -> None:
        self.itemsize = itemsize
        region = plan.parameter_size * itemsize
        self.sizes: dict[Area | str, int] = {
            Area.PARAMETER: region,
            Area.GRADIENT: region,
            Area.MOMENT1: region,
            Area.MOMENT2: region if plan.n_moments > 1 else 0,
            Area.WORK: plan.work_size * itemsize,
            Area.TEMPORARY: temporary_size(plan) * itemsize,
            "step": STEP_DTYPE.itemsize,
            "begun": ALIGNMENT,
            "sources": 2 * N_SOURCES * SOURCE_DTYPE.itemsize,
            "records": CHUNK * STEP_DTYPE.itemsize,
            "rows": CHUNK * plan.batch * 8,
            "kept": CHUNK * plan.slots[plan.index["terms"]].cols * itemsize,
        }
        self.begins: dict[Area | str, int] = {}
        self.size = 0
        for name, size in self.sizes.items():
            self.begins[name] = self.size
            self.size += -(-(size + guard) // ALIGNMENT) * ALIGNMENT

    def offset(self, view: View) -> int:
        return self.begins[view.area] + view.offset * self.itemsize

    def control(self, name: str, rows: int, cols: int) -> View:
        """Part of the memory of steps, in elements, as a matrix."""
        return View(Area.CONTROL, self.begins[name] // self.itemsize, rows, cols, cols)


class CudaProgram:
    """A plan compiled for a device."""

    def __init__(self, plan: Plan, precision: Precision, device: Device) -> None:
        self.plan, self.precision, self.device = plan, precision, device
        self.dtype = precision.dtype
        self.arena = Arena(plan, self.dtype.itemsize, device.guard)
        self._base = device.allocate(self.arena.size)
        self._graphs: dict[tuple[Mode, int], Callable[[], None]] = {}
        self._data: list[list[int]] = [[], []]
        self._rows_of: dict[int, int] = {}
        self._running = threading.Lock()
        for area in (Area.PARAMETER, Area.GRADIENT, Area.MOMENT1, Area.MOMENT2):
            self._put(area, np.zeros(self.arena.sizes[area], np.uint8))

    # --- memory -----------------------------------------------------------------------------------------------------

    def _at(self, name: Area | str) -> int:
        return self._base + self.arena.begins[name]

    def _put(self, name: Area | str, data: Array) -> None:
        self.device.upload(self._at(name), data)

    def _region(self, area: Area) -> Array:
        """A copy of a parameter-like region."""
        out = np.empty(self.plan.parameter_size, self.dtype)
        self.device.download(self._at(area), out)
        return out

    def _moments(self) -> tuple[tuple[str, Area], ...]:
        return (("moment1.", Area.MOMENT1), ("moment2.", Area.MOMENT2))[: self.plan.n_moments]

    def load(self, state: Mapping[str, Array]) -> None:
        for prefix, area in (("", Area.PARAMETER), *self._moments()):
            region = np.zeros(self.plan.parameter_size, self.dtype)
            for slot in self.plan.parameters:
                if (name := prefix + slot.name) in state or not prefix:
                    of(region, slot)[...] = np.reshape(state[name], (slot.rows, slot.cols))
            self._put(area, region)

    def state(self) -> State:
        regions = {prefix: self._region(area) for prefix, area in (("", Area.PARAMETER), *self._moments())}
        return {p + s.name: of(region, s).copy() for s in self.plan.parameters for p, region in regions.items()}

    def views(self) -> State:
        out: State = {}
        for slot in self.plan.parameters:
            for prefix, area in (("", Area.PARAMETER), *self._moments()):
                address = self._at(area) + slot.offset * self.dtype.itemsize
                out[prefix + slot.name] = self.device.view(address, (slot.rows, slot.cols), slot.ld, self.dtype)
        return out

    def finite(self) -> bool:
        return all_finite(*(self._region(area) for area in (Area.PARAMETER, *(area for _, area in self._moments()))))

    def hand_over(self) -> State:
        state = self.state()
        self.close()
        return state

    def close(self) -> None:
        for bank in (TRAIN_BANK, APPLY_BANK):
            self._release(bank)
        if self._base:
            self.device.free(self._base)
        self._base, self._graphs = 0, {}

    # --- data -------------------------------------------------------------------------------------------------------

    def _release(self, bank: int) -> None:
        for address in self._data[bank]:
            self.device.free(address)
        self._data[bank] = []

    def _bind(self, bank: int, sources: Mapping[int, Any]) -> None:
        """Copy data to the device, and say where it lies."""
        self._release(bank)
        rows, shift = told_apart(self.plan.spec, sources[X]) if sources.get(X) is not None else (None, None)
        sources = {**sources, X: rows, SHIFT: shift}
        table = np.zeros(N_SOURCES, SOURCE_DTYPE)
        for i, data in sources.items():
            if data is None:
                continue
            source = table[i]
            if hasattr(data, "indptr") or i in self.plan.spec.sparse_sources:
                data = sparse_rows(data)
                parts = (("data", self.dtype), ("indptr", np.dtype(np.int64)), ("indices", np.dtype(np.int32)))
                arrays = {name: np.ascontiguousarray(getattr(data, name), dtype) for name, dtype in parts}
                source["rows"], source["cols"] = data.shape
                source["stored"], source["csr"] = len(data.data), 1
            else:
                arrays = {"data": np.ascontiguousarray(np.reshape(data, (data.shape[0], -1)), self.dtype)}
                source["rows"], source["cols"] = arrays["data"].shape
            for name, array in arrays.items():
                # Something, even where nothing is stored.
                address = self.device.allocate(max(array.nbytes, 1))
                self._data[bank].append(address)
                self.device.upload(address, array)
                source[name] = address
        begin = self._at("sources") + bank * table.nbytes
        self.device.upload(begin, table)

    def bind(self, X_: Any, target: Any = None, weight: Any = None, batch: Any = None) -> None:
        self._check_batches(batch)
        sources = {X: X_, TARGET: target, WEIGHT: weight, BATCH: batch}
        self._rows_of = {i: data.shape[0] for i, data in sources.items() if data is not None}
        self._bind(TRAIN_BANK, sources)

    # --- runs -------------------------------------------------------------------------------------------------------

    def _graph(self, mode: Mode, m: int) -> Callable[[], None]:
        """What runs the launches of m rows; captured when first asked for."""
        if (mode, m) not in self._graphs:
            planned = [self._planned(launch, mode, m) for launch in self.steps(mode, m)]
            self._graphs[mode, m] = self.device.graph(planned, self.precision)
        return self._graphs[mode, m]

    def steps(self, mode: Mode, m: int) -> tuple[Launch, ...]:
        """The launches of a step, from taking its record to keeping its terms."""
        terms = self.plan.slots[self.plan.index["terms"]]
        words = STEP_DTYPE.itemsize // self.dtype.itemsize
        slots = (
            self.arena.control("records", CHUNK, words),
            self.arena.control("begun", 1, 1),
            View(Area.WORK, terms.offset, 1, terms.cols, terms.ld),
            self.arena.control("kept", CHUNK, terms.cols),
        )
        begin, end = (Launch(kernel, 1, 32, slots) for kernel in ("begin_step", "end_step"))
        return begin, *launches(self.plan, m, mode), end

    def _planned(self, launch: Launch, mode: Mode, m: int) -> Planned:
        operands = np.zeros((), LAUNCH_DTYPE)
        for to, view in zip(operands["slots"], launch.slots, strict=False):
            if view is not None:
                begin = view.offset * self.dtype.itemsize if view.area is Area.CONTROL else self.arena.offset(view)
                to["data"], to["rows"], to["cols"], to["ld"] = self._base + begin, view.rows, view.cols, view.ld
        operands["ints"][: len(launch.ints)] = launch.ints
        operands["floats"][: len(launch.floats)] = launch.floats
        bank = TRAIN_BANK if mode & LEARN else APPLY_BANK
        operands["step"] = self._at("step")
        operands["sources"] = self._at("sources") + bank * N_SOURCES * SOURCE_DTYPE.itemsize
        operands["m"], operands["learn"] = m, bool(mode & LEARN)
        return Planned(launch.kernel, launch.blocks, launch.threads, operands)

    def _chunk(self, mode: Mode, rows: Array, records: Array) -> NDArray[np.float64]:
        """Run a step for each record; what they report."""
        batch = self.plan.batch
        records["rows"] = self._at("rows") + 8 * batch * np.arange(len(records), dtype=np.uint64)
        self._put("rows", np.ascontiguousarray(rows, np.int64))
        self._put("records", records)
        self._put("begun", np.zeros(1, np.int32))
        for i in range(len(records)):
            self._graph(mode, min(batch, len(rows) - i * batch))()
        terms = np.empty((len(records), self.plan.slots[self.plan.index["terms"]].cols), self.dtype)
        self.device.download(self._at("kept"), terms)
        return terms[:, : len(self.plan.terms)].astype(np.float64)

    def _check(self, rows: NDArray[np.int64]) -> None:
        for i, n in self._rows_of.items():
            if len(rows) and not 0 <= rows.min() <= rows.max() < n:
                raise IndexError(f"rows {rows.min()} to {rows.max()} are outside the {n} rows of source {i}")

    def _alone(self) -> Alone:
        return Alone(self._running)

    def train(
        self, rows: NDArray[np.int64], hyper: Hyper, poll: Callable[[], bool] | None = None
    ) -> NDArray[np.float64]:
        self._check(rows)
        n, batch, done = -(-len(rows) // self.plan.batch), self.plan.batch, []
        with self._alone():
            for first in range(0, n, CHUNK):
                steps = np.arange(first, min(first + CHUNK, n))
                taken = rows[first * batch : (first + CHUNK) * batch]
                done.append(self._chunk(Mode.TRAIN, taken, self._records(hyper, steps)))
                if poll is not None and poll():
                    break
        return np.concatenate(done) if done else np.empty((0, len(self.plan.terms)))

    def _records(self, hyper: Hyper, steps: NDArray[np.int64]) -> Array:
        spec, records = self.plan.spec, np.zeros(len(steps), STEP_DTYPE)
        t = hyper.step + 1.0 + steps
        records["seed"], records["step"] = hyper.seed, (hyper.step + steps) & 0xFFFFFFFF
        records["learning_rate"] = hyper.learning_rate[steps]
        records["kl_factor"] = 1.0 if hyper.kl_factor is None else hyper.kl_factor[steps]
        records["momentum"] = -1.0 if hyper.momentum is None else hyper.momentum[steps]
        records["adam_rate"] = records["learning_rate"] / (1 - spec.beta_1**t)
        records["adam_root"] = 1 / np.sqrt(1 - spec.beta_2**t)
        return records

    def gradient(self, rows: NDArray[np.int64], seed: int = 0, step: int = 0) -> tuple[NDArray[np.float64], State]:
        self._check(rows)
        with self._alone():
            terms = self._chunk(Mode.GRADIENT, rows, self._records(Hyper(seed, step, np.zeros(1)), np.arange(1)))
        region = self._region(Area.GRADIENT)
        return terms[0], {slot.name: of(region, slot).copy() for slot in self.plan.learned}

    def _check_batches(self, batch: Any) -> None:
        """Refuse what is no number of a batch."""
        if batch is None:
            return
        number, n = np.asarray(batch), self.plan.spec.n_batches
        bad = ~((number >= 0) & (number < n) & (number == np.floor(number)))
        if bad.any():
            raise ValueError(f"{number[bad][0]:g} is no number of one of {n} batches")

    def apply(self, X_: Any, mode: Mode, target: Any = None, batch: Any = None) -> Array:
        self._check_batches(batch)
        if batch is None and any(op.code is OpCode.CONDITION and op.modes & mode for op in self.plan.ops):
            raise ValueError(f"{(mode.name or '').lower()} of a network with batches needs the batch of each row")
        result = self.plan.slots[self.plan.outputs[mode]]
        out = np.empty((X_.shape[0], result.cols), self.dtype)
        sources = {X: X_, TARGET: target if self.plan.spec.separate_target else None, BATCH: batch}
        if mode in FROM_CODES:
            # Without a target of its own the network judges by X, which of codes is the target.
            sources |= {X: None if self.plan.spec.separate_target else target, LATENT: X_}
        record = self._records(Hyper(0, 0, np.zeros(1)), np.arange(1))
        with self._alone():
            try:
                for begin in range(0, len(out), self.plan.batch):
                    at = slice(begin, begin + self.plan.batch)
                    self._bind(APPLY_BANK, {i: None if data is None else data[at] for i, data in sources.items()})
                    m = min(self.plan.batch, len(out) - begin)
                    self._chunk(mode, np.arange(m), record)
                    rows = np.empty((m, result.ld), self.dtype)
                    address = self._at(Area.WORK) + result.offset * self.dtype.itemsize
                    self.device.download(address, rows)
                    out[at] = rows[:, : result.cols]
            finally:
                self._release(APPLY_BANK)
        return out


class Alone:
    """Held while a program runs; a second run at the same time is an error."""

    def __init__(self, lock: threading.Lock) -> None:
        self._lock = lock

    def __enter__(self) -> None:
        if not self._lock.acquire(blocking=False):
            raise RuntimeError("this program is already running in another thread")

    def __exit__(self, *_: object) -> None:
        self._lock.release()


def of(region: Array, slot: Slot) -> Array:
    """A slot in a flat region."""
    return region[slot.offset : slot.offset + slot.size].reshape(slot.rows, slot.ld)[:, : slot.cols]
