"""Runs a plan op by op.

Promises: the protocol `backends.Program`, with any table of ops.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...plan.ops import SIGNATURES, OpCode, Source
from ...plan.plan import FROM_CODES, Mode, Op, Plan, Region, Slot
from ...rows.shifted import split_shift
from ...rows.sparse import sparse_rows
from .. import Hyper, State
from ..protocol import all_finite, copies
from .run import OPS, Array, Run


class ReferenceProgram:
    """Runs a plan op by op over NumPy arrays.

    Every slot has its own memory. If another backend shares arena memory wrongly, it differs from this one.
    """

    def __init__(
        self,
        plan: Plan,
        dtype: Any = np.float64,
        ops: Mapping[OpCode, Callable[..., None]] = OPS,
        bfloat16: bool = False,
    ) -> None:
        self.plan = plan
        self.bfloat16 = bfloat16
        self.dtype = np.dtype(dtype)
        self.ops = ops
        self.regions = {
            r: np.zeros(plan.parameter_size, self.dtype)
            for r in (Region.PARAMETER, Region.GRADIENT, Region.MOMENT1, Region.MOMENT2)[: 2 + plan.n_moments]
        }
        self.arrays = [
            self._view(self.regions[s.region], s) if s.region < Region.BATCH else np.zeros((s.rows, s.cols), self.dtype)
            for s in plan.slots
        ]
        self.sources: dict[int, Any] = {}
        self._running = threading.Lock()

    @staticmethod
    def _view(region: Array, slot: Slot) -> Array:
        return region[slot.offset : slot.offset + slot.size].reshape(slot.rows, slot.ld)[:, : slot.cols]

    def _moments(self, slot: Slot) -> dict[str, Array]:
        pairs = ((Region.MOMENT1, "moment1"), (Region.MOMENT2, "moment2"))[: self.plan.n_moments]
        return {f"{name}.{slot.name}": self._view(self.regions[region], slot) for region, name in pairs}

    def load(self, state: Mapping[str, Array]) -> None:
        for slot in self.plan.parameters:
            self.arrays[self.plan.index[slot.name]][...] = np.reshape(state[slot.name], (slot.rows, slot.cols))
            for name, view in self._moments(slot).items():
                view[...] = np.reshape(state[name], view.shape) if name in state else 0

    def state(self, *, optimiser: bool = True) -> State:
        return copies(self.views(), optimiser)

    def views(self) -> State:
        out: State = {}
        for slot in self.plan.parameters:
            out[slot.name] = self.arrays[self.plan.index[slot.name]]
            out |= self._moments(slot)
        return out

    def finite(self) -> bool:
        return all_finite(*(values for region, values in self.regions.items() if region is not Region.GRADIENT))

    def hand_over(self) -> State:
        views = self.views()
        self.close()
        return views

    def bind(self, X: Any, target: Any = None, weight: Any = None, condition: Any = None) -> None:
        self.sources = self._sources(X, target) | {Source.WEIGHT: weight, Source.CONDITION: condition}

    def _sources(self, X: Any, target: Any) -> dict[int, Any]:
        rows, shift = split_shift(self.plan.spec, X)
        given = {Source.X: rows, Source.TARGET: target if self.plan.spec.data.separate_target else None}
        wanted = self.plan.spec.sparse_sources
        sources = {i: sparse_rows(data) if i in wanted and data is not None else data for i, data in given.items()}
        return sources | {Source.SHIFT: shift}

    def train(
        self, rows: NDArray[np.int64], hyper: Hyper, poll: Callable[[], bool] | None = None
    ) -> NDArray[np.float64]:
        batch_rows = self.plan.batch_rows
        done: list[Array] = []
        for i, start in enumerate(range(0, len(rows), batch_rows)):
            run = Run(
                rows[start : start + batch_rows],
                Mode.TRAIN,
                self.sources,
                hyper.seed,
                hyper.step + i,
                float(hyper.learning_rate[i]),
                1.0 if hyper.kl_factor is None else float(hyper.kl_factor[i]),
                None if hyper.momentum is None else float(hyper.momentum[i]),
                self.regions,
                self.bfloat16,
            )
            done.append(self._step(run))
            if poll is not None and poll():
                break
        return np.array(done, np.float64).reshape(len(done), len(self.plan.terms))

    def gradient(self, rows: NDArray[np.int64], seed: int = 0, step: int = 0) -> tuple[NDArray[np.float64], State]:
        terms = self._step(
            Run(rows, Mode.GRADIENT, self.sources, seed, step, regions=self.regions, bfloat16=self.bfloat16)
        )
        return terms, {s.name: self.arrays[self.plan.index[f"d{s.name}"]].copy() for s in self.plan.learned}

    def _step(self, run: Run) -> NDArray[np.float64]:
        terms = self.arrays[self.plan.index["terms"]]
        terms[...] = 0
        self._run(run)
        return terms[0, : len(self.plan.terms)].astype(np.float64)

    def apply(self, X: Any, mode: Mode, target: Any = None, condition: Any = None) -> Array:
        result = self.plan.slots[slot := self.plan.outputs[mode]]
        n = X.shape[0]
        out = np.empty((n, result.cols), self.dtype)
        apart = self.plan.spec.data.separate_target
        inputs, codes = (None if apart else target, X) if mode in FROM_CODES else (X, None)
        sources = self._sources(inputs, target) | {Source.LATENT: codes, Source.CONDITION: condition}
        for start in range(0, n, self.plan.batch_rows):
            rows = np.arange(start, min(start + self.plan.batch_rows, n))
            self._run(Run(rows, mode, sources, regions=self.regions, bfloat16=self.bfloat16))
            out[rows] = self.arrays[slot][: len(rows)]
        return out

    def _run(self, run: Run) -> None:
        if not self._running.acquire(blocking=False):
            raise RuntimeError("this program is already running in another thread")
        try:
            for op in self.plan.ops:
                if op.modes & run.mode:
                    self.ops[op.code](run, **self._operands(op, run.m))
        finally:
            self._running.release()

    def _operands(self, op: Op, m: int) -> dict[str, Any]:
        signature = SIGNATURES[op.code]
        operands: dict[str, Any] = {}
        for role, i in zip(signature.slots, op.slots, strict=True):
            is_batch = i >= 0 and self.plan.slots[i].region is Region.BATCH
            operands[role] = None if i < 0 else self.arrays[i][:m] if is_batch else self.arrays[i]
        operands |= zip(signature.ints, op.ints, strict=True)
        operands |= zip(signature.floats, op.floats, strict=True)
        return operands

    def close(self) -> None:
        self.arrays, self.regions, self.sources = [], {}, {}
