"""A plan on a device: its memory and its graphs, as a `backends.Program`.

Promises: one allocation holds everything but the data. What changes from step to step lies in it, so the launches for a
number of rows are captured once and replayed. The host does not wait inside a chunk of steps, and sends a chunk before
it reads the report of the chunk before.
Never: knows which device it is (see `protocol.Device`).
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...plan.ops import OpCode, Source
from ...plan.plan import FROM_CODES, LEARN, Mode, Plan, Slot
from ...plan.spec import Precision
from ...rows.devices import on_gpu
from .. import Hyper, State
from .data import CHUNK, Data, data_on, wanted
from .emit import launches, wants_blas
from .launches import Area, Launch, View
from .layout import Operands
from .memory import FINITE_BLOCKS, Arena, control_dtype
from .operands import Where, planned
from .protocol import Device, Mark, Planned
from .schedule import schedule
from .table import STEP_DTYPE

__all__ = ["CudaProgram"]

Array = NDArray[Any]

GRAPH_STEPS = 8
"""Training steps in a graph, where so many of the same size follow each other. The host needs longer to launch a graph
than the device needs for a step of a small network."""
RESULT_BYTES = 64 * 2**20
"""Aim for the results of a chunk of steps."""
FINITE_THREADS = 256


@dataclass
class Turn:
    """Host memory of a chunk of steps, which the host must not touch until the device is done with it."""

    control: Array
    """The message, one `control_dtype` in pinned memory."""
    kept: Array
    """The terms of the steps, in pinned memory."""
    results: Array
    """The results of the steps as bytes, in pinned memory."""
    mark: Mark | None = None
    taken: Callable[[], None] = lambda: None
    """Takes the terms and results out of this memory."""

    def settle(self) -> None:
        """Wait for the device, and take the terms and results."""
        if self.mark is not None:
            self.mark.wait()
            self.mark = None
            self.taken()


class CudaProgram:
    """A plan compiled for a device."""

    def __init__(self, plan: Plan, precision: Precision, device: Device) -> None:
        self.plan, self.precision, self.device = plan, precision, device
        self.dtype = precision.dtype
        self._blas = wants_blas(plan, precision) and device.blas is not None
        self.arena = Arena(plan, precision, device.guard, blas=self._blas)
        self._base = device.allocate(self.arena.size)
        self._graphs: dict[tuple[Mode, int, int], Callable[[], None]] = {}
        self._finite: Callable[[], None] | None = None
        self._data: Data | None = None
        self._rows_of: dict[int, int] = {}
        self._running = threading.Lock()
        self._turns = self._new_turns()
        for area in (Area.PARAMETER, Area.GRADIENT, Area.MOMENT1, Area.MOMENT2):
            self._put(area, np.zeros(self.arena.sizes[area], np.uint8))

    def _new_turns(self) -> tuple[Turn, Turn]:
        control, terms = control_dtype(self.plan.batch_rows), self.plan.slots[self.plan.index["terms"]].cols

        def turn() -> Turn:
            of_control = self.device.pinned(control.itemsize)
            of_kept = self.device.pinned(CHUNK * terms * self.dtype.itemsize)
            return Turn(of_control.view(control), of_kept.view(self.dtype).reshape(CHUNK, terms), np.empty(0, np.uint8))

        return turn(), turn()

    # --- memory -----------------------------------------------------------------------------------------------------

    def _at(self, name: Area | str) -> int:
        return self._base + self.arena.begins[name]

    def _put(self, name: Area | str, data: Array) -> None:
        self.device.upload(self._at(name), data)

    def _region(self, area: Area) -> Array:
        """A copy of a region of the layout of the parameters."""
        out = np.empty(self.plan.parameter_size, self.dtype)
        self.device.download(self._at(area), out)
        return out

    def _regions(self, optimiser: bool = True) -> tuple[tuple[str, Area], ...]:
        """The regions of parameters and optimiser state, each with the prefix of its names."""
        moments = (("moment1.", Area.MOMENT1), ("moment2.", Area.MOMENT2))
        return (("", Area.PARAMETER), *(moments[: self.plan.n_moments] if optimiser else ()))

    def load(self, state: Mapping[str, Array]) -> None:
        for prefix, area in self._regions():
            region = np.zeros(self.plan.parameter_size, self.dtype)
            for slot in self.plan.parameters:
                name = prefix + slot.name
                if (name in state or not prefix) and not on_gpu(state[name]):
                    of(region, slot)[...] = np.reshape(state[name], (slot.rows, slot.cols))
            self._put(area, region)
            for slot in self.plan.parameters:
                if on_gpu(given := state.get(prefix + slot.name)):
                    array = self.device.contiguous(given, self.dtype).reshape(slot.rows, slot.cols)
                    self.device.follow()
                    self.device.fill(self._at(area) + slot.offset * self.dtype.itemsize, slot.ld, array)
                    # The caller may change the array when this returns.
                    self.device.mark().wait()

    def state(self, *, optimiser: bool = True) -> State:
        regions = {prefix: self._region(area) for prefix, area in self._regions(optimiser)}
        return {p + s.name: of(region, s).copy() for s in self.plan.parameters for p, region in regions.items()}

    def views(self) -> State:
        return self.state()

    def finite(self) -> bool:
        regions = [area for _, area in self._regions()]
        if self._finite is None:
            looks = [self._not_finite(i, area) for i, area in enumerate(regions)]
            self._finite = self.device.graph(looks, self.precision)
        self._finite()
        found = np.empty((3, FINITE_BLOCKS), self.dtype)
        self.device.download(self._at("finite"), found)
        return not found[: len(regions)].any()

    def _not_finite(self, i: int, area: Area) -> Planned:
        """The launch that stores in row i of "finite" which blocks found a number in `area` that is not finite."""
        size = self.plan.parameter_size
        found = self.arena.control("finite", 3, FINITE_BLOCKS)
        operands = Operands("not_finite", x=View(area, 0, 1, size, size), found=found, row=i)
        return self._planned(Launch("not_finite", FINITE_BLOCKS, FINITE_THREADS, operands), Mode.TRAIN, 1)

    def hand_over(self) -> State:
        state = self.state()
        self.close()
        return state

    def close(self) -> None:
        self._unbind()
        if self._base:
            self.device.free(self._base)
        self._base, self._graphs, self._finite = 0, {}, None

    # --- data -------------------------------------------------------------------------------------------------------

    def _unbind(self) -> None:
        if self._data is not None:
            self._data.close()
        self._data = None

    def _data_of(self, modes: Mode, sources: Mapping[int, Any]) -> Data:
        return data_on(self.device, self.plan, self.dtype, modes, sources)

    def bind(self, X_: Any, target: Any = None, weight: Any = None, condition: Any = None) -> None:
        self._check_conditions(condition)
        sources: dict[int, Any] = {
            Source.X: X_,
            Source.TARGET: target,
            Source.WEIGHT: weight,
            Source.CONDITION: condition,
        }
        self._rows_of = {i: data.shape[0] for i, data in sources.items() if data is not None}
        self._unbind()
        self._data = self._data_of(LEARN, sources)

    # --- runs -------------------------------------------------------------------------------------------------------

    def _graph(self, mode: Mode, m: int, steps: int = 1) -> Callable[[], None]:
        """A function that runs so many steps of m rows; captured on the first call."""
        if (mode, m, steps) not in self._graphs:
            of_step = [self._planned(launch, mode, m) for launch in self.steps(mode, m)]
            self._graphs[mode, m, steps] = self.device.graph(of_step * steps, self.precision)
        return self._graphs[mode, m, steps]

    def steps(self, mode: Mode, m: int) -> tuple[Launch, ...]:
        """The launches of a step, from reading its record to storing its terms."""
        terms = self.plan.slots[self.plan.index["terms"]]
        words = STEP_DTYPE.itemsize // self.dtype.itemsize
        operands = Operands(
            "step",
            records=self.arena.control("records", CHUNK, words),
            begun=self.arena.control("begun", 1, 1),
            terms=View(Area.WORK, terms.offset, 1, terms.cols, terms.ld),
            kept=self.arena.control("kept", CHUNK, terms.cols),
        )
        begin, end = (Launch(kernel, 1, 32, operands) for kernel in ("begin_step", "end_step"))
        own = launches(self.plan, m, mode, self.precision, blas=self._blas)
        return schedule(own, begin, end)

    def _planned(self, launch: Launch, mode: Mode, m: int) -> Planned:
        where = Where(self._address, self._at("step"), self._at("sources"), m, bool(mode & LEARN))
        return planned(launch, where)

    def _address(self, view: View) -> int:
        in_arena = view.offset * self.dtype.itemsize if view.area is Area.CONTROL else self.arena.offset(view)
        return self._base + in_arena

    def _run(
        self,
        mode: Mode,
        data: Data,
        rows: NDArray[np.int64],
        records: Array,
        poll: Callable[[], bool] | None = None,
        out: Array | None = None,
    ) -> NDArray[np.float64]:
        """Run a step for each record, over consecutive batches of rows, and return the terms. `out` takes the mode's
        result."""
        batch, most = self.plan.batch_rows, data.most_steps
        terms = np.empty((len(records), len(self.plan.terms)))
        done = 0
        if isinstance(out, np.ndarray):
            result = self.plan.slots[self.plan.outputs[mode]]
            most = max(1, min(most, RESULT_BYTES // (batch * result.ld * self.dtype.itemsize)))
        try:
            for i, turn in cycle(enumerate(self._turns)):
                turn.settle()
                if done == len(records):
                    break
                end = min(done + most, len(records))
                self._send(turn, data.take(rows[done * batch : end * batch], i), records[done:end])
                turn.taken = self._steps(turn, mode, slice(done, end), len(rows), terms, out)
                turn.mark = self.device.mark()
                done = end
                if poll is not None and poll():
                    break
        except BaseException:
            # An interrupted chunk has no mark, and its memory will be changed and freed.
            with contextlib.suppress(Exception):  # the first error says more
                self.device.mark().wait()
            raise
        finally:
            for turn in self._turns:
                turn.settle()
        return terms[:done]

    def _send(self, turn: Turn, taken: Any, records: Array) -> None:
        """Send the message for a chunk of steps."""
        control = turn.control[0]
        control["sources"], control["begun"] = taken.table, 0
        records = records.copy()
        records["rows"] = self._at("rows") + 8 * self.plan.batch_rows * np.arange(len(records), dtype=np.uint64)
        control["records"][: len(records)], control["rows"][: len(taken.rows)] = records, taken.rows
        used = self.arena.begins["rows"] - self.arena.begins["control"] + 8 * len(taken.rows)
        self.device.send(self._at("control"), turn.control.view(np.uint8)[:used])

    def _steps(
        self, turn: Turn, mode: Mode, steps: slice, n_rows: int, terms: NDArray[np.float64], out: Array | None
    ) -> Callable[[], None]:
        """Launch these steps. Returns the function that takes their terms and, for `out`, their results."""
        batch, n = self.plan.batch_rows, steps.stop - steps.start
        whole = min(steps.stop, n_rows // batch)
        first, last = steps.start * batch, min(steps.stop * batch, n_rows)
        if out is None:
            at = steps.start
            while at < steps.stop:
                together = GRAPH_STEPS if whole - at >= GRAPH_STEPS else 1
                self._graph(mode, min(batch, n_rows - at * batch), together)()
                at += together
        else:
            result = self.plan.slots[self.plan.outputs[mode]]
            of_row, there = result.ld * self.dtype.itemsize, not isinstance(out, np.ndarray)
            if not there and len(turn.results) < (last - first) * of_row:
                turn.results = self.device.pinned((last - first) * of_row)
            for begin in range(first, last, batch):
                m = min(batch, last - begin)
                self._graph(mode, m)()
                address = self._at(Area.WORK) + result.offset * self.dtype.itemsize
                if there:
                    self.device.store(out[begin : begin + m], address, result.ld)
                else:
                    self.device.fetch(address, turn.results[(begin - first) * of_row :][: m * of_row])
        self.device.fetch(self._at("kept"), turn.kept[:n].reshape(-1).view(np.uint8))

        def take() -> None:
            terms[steps] = turn.kept[:n, : terms.shape[1]]
            if isinstance(out, np.ndarray):
                results = turn.results[: (last - first) * of_row].view(self.dtype).reshape(-1, result.ld)
                out[first:last] = results[:, : result.cols]

        return take

    def _bound(self, rows: NDArray[np.int64]) -> Data:
        """The bound data; checks the rows."""
        for i in wanted(self.plan, LEARN):
            if i == Source.SHIFT:
                continue  # bound together with X
            if self._data is None or i not in self._rows_of:
                raise ValueError(f"source {i} is not bound")
            n = self._rows_of[i]
            if len(rows) and not 0 <= rows.min() <= rows.max() < n:
                raise IndexError(f"rows {rows.min()} to {rows.max()} are outside the {n} rows of source {i}")
        assert self._data is not None  # every network has a source to learn from
        return self._data

    def _alone(self) -> Alone:
        return Alone(self._running)

    def train(
        self, rows: NDArray[np.int64], hyper: Hyper, poll: Callable[[], bool] | None = None
    ) -> NDArray[np.float64]:
        data, steps = self._bound(rows), np.arange(-(-len(rows) // self.plan.batch_rows))
        with self._alone():
            return self._run(Mode.TRAIN, data, rows, self._records(hyper, steps), poll)

    def _records(self, hyper: Hyper, steps: NDArray[np.int64]) -> Array:
        spec, records = self.plan.spec, np.zeros(len(steps), STEP_DTYPE)
        t = hyper.step + 1.0 + steps
        records["seed"], records["step"] = hyper.seed, (hyper.step + steps) & 0xFFFFFFFF
        records["learning_rate"] = hyper.learning_rate[steps]
        records["kl_factor"] = 1.0 if hyper.kl_factor is None else hyper.kl_factor[steps]
        records["momentum"] = -1.0 if hyper.momentum is None else hyper.momentum[steps]
        records["adam_rate"] = records["learning_rate"] / (1 - spec.training.update.beta_1**t)
        records["adam_root"] = 1 / np.sqrt(1 - spec.training.update.beta_2**t)
        return records

    def gradient(
        self, rows: NDArray[np.int64], seed: int = 0, step: int = 0, *, there: bool = False
    ) -> tuple[NDArray[np.float64], State]:
        """See `Program.gradient`; with `there`, gradients stay on the device."""
        data, record = self._bound(rows), self._records(Hyper(seed, step, np.zeros(1)), np.arange(1))
        with self._alone():
            terms = self._run(Mode.GRADIENT, data, rows, record)
            if not there:
                region = self._region(Area.GRADIENT)
                return terms[0], {slot.name: of(region, slot).copy() for slot in self.plan.learned}
            arrays = {slot.name: self.device.empty((slot.rows, slot.cols), self.dtype) for slot in self.plan.learned}
            self.device.follow()
            for slot in self.plan.learned:
                address = self._at(Area.GRADIENT) + slot.offset * self.dtype.itemsize
                self.device.store(arrays[slot.name], address, slot.ld)
            self.device.mark().wait()
        return terms[0], arrays

    def _check_conditions(self, condition: Any) -> None:
        """Refuse batch numbers that the network does not know."""
        if condition is None:
            return
        number, n = np.asarray(condition), self.plan.spec.data.n_conditions
        bad = ~((number >= 0) & (number < n) & (number == np.floor(number)))
        if bad.any():
            raise ValueError(f"batch number {number[bad][0]:g} is outside 0..{n - 1}")

    def apply(self, X_: Any, mode: Mode, target: Any = None, condition: Any = None) -> Array:
        self._check_conditions(condition)
        if condition is None and any(op.code is OpCode.CONDITION and op.modes & mode for op in self.plan.ops):
            raise ValueError(
                f"{(mode.name or '').lower()} of a network with batches needs the batch number of each row"
            )
        shape, there = (X_.shape[0], self.plan.slots[self.plan.outputs[mode]].cols), on_gpu(X_)
        out = self.device.empty(shape, self.dtype) if there else np.empty(shape, self.dtype)
        if not shape[0]:
            return out
        apart = target if self.plan.spec.data.separate_target else None
        sources: dict[int, Any] = {Source.X: X_, Source.TARGET: apart, Source.CONDITION: condition}
        if mode in FROM_CODES:
            # Without a separate target the loss compares with X. For codes, that is the target.
            sources |= {Source.X: None if self.plan.spec.data.separate_target else target, Source.LATENT: X_}
        for i in wanted(self.plan, mode):
            if i != Source.SHIFT and (sources.get(i) is None or sources[i].shape[0] != len(out)):
                found = "is not bound" if sources.get(i) is None else f"has {sources[i].shape[0]} rows"
                raise ValueError(f"source {i} {found}, expected {len(out)} rows")
        # All steps of inference are the same.
        record = self._records(Hyper(0, 0, np.zeros(1)), np.zeros(-(-shape[0] // self.plan.batch_rows), np.int64))
        with self._alone():
            data = self._data_of(mode, sources)
            try:
                self._run(mode, data, np.arange(shape[0]), record, out=out)
            finally:
                data.close()
        return out


class Alone:
    """Held while a program runs. A second run at the same time is an error."""

    def __init__(self, lock: threading.Lock) -> None:
        self._lock = lock

    def __enter__(self) -> None:
        if not self._lock.acquire(blocking=False):
            raise RuntimeError("this program is already running in another thread")

    def __exit__(self, *_: object) -> None:
        self._lock.release()


def of(region: Array, slot: Slot) -> Array:
    """The part of a flat region that is a slot."""
    return region[slot.offset : slot.offset + slot.size].reshape(slot.rows, slot.ld)[:, : slot.cols]
