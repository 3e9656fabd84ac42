"""The training loop: epochs, validation, early stopping, learning rates, callbacks, checkpoints.

- The same data, seed and options give the same bits, on a machine of any speed, also if the run was interrupted and
  resumed.
- After an exception the trainer's state belongs to a whole step, and `Trainer.finish` returns the parameters of a whole
  epoch.
- Besides the program there are at most two copies of the parameters, and no copy of the optimiser's state.
- Only a `Program` computes on data, and nothing here knows an estimator.

Reading order: `Options`, `checkpoint.TrainingState`, `Feed`, `Trainer.run`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import FrameType, TracebackType
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from ..backends import Hyper, Program, State
from ..errors import DivergenceError
from ..plan.spec import Loss
from ..rows.readahead import read_ahead
from .callbacks import Callback, Progress
from .checkpoint import Checkpoint, TrainingState

__all__ = ["Block", "Feed", "Interrupted", "Options", "Trainer"]

CHUNK_SECONDS = 0.25
"""Target length of one call of `Program.train`. Callbacks and checkpoints run between two calls."""


class Interrupted(Exception):
    """`Checkpoint.stop` ended training, after a whole step and after the checkpoint was written.

    Attributes
    ----------
    reason : str
        The text that `Checkpoint.stop` returned.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True)
class Options:
    """How to train.

    Attributes
    ----------
    max_iter : int
        Epochs, counted from the start of this run.
    monitor : {"val_loss", "loss", None}
        The loss that decides on convergence and on the best epoch. With "val_loss" the best parameters are the result,
        otherwise the last ones. With None all `max_iter` epochs run.
    kl_warmup : int
        Epochs over which the KL term of a variational network grows linearly to its weight, counted over earlier runs
        too. Training does not converge before their end.
    initial_momentum, momentum_epochs : float, int
        The momentum of sgd in the network's first `momentum_epochs` epochs.
    """

    max_iter: int
    seed: int
    learning_rate: str = "constant"
    learning_rate_init: float = 1e-3
    monitor: Literal["val_loss", "loss"] | None = None
    n_iter_no_change: int = 10
    tol: float = 1e-4
    kl_warmup: int = 0
    initial_momentum: float = 0.0
    momentum_epochs: int = 0


@dataclass(frozen=True)
class Block:
    """A part of the training data that is in memory at once.

    Attributes
    ----------
    rows : ndarray of int64
        Rows of the block's arrays in the order in which to train on them.
    load : callable
        Returns the arrays for `Program.bind`. The same object holds the same arrays.
    """

    rows: NDArray[np.int64]
    load: Callable[[], tuple[Any, ...]]


class Feed(Protocol):
    """The training data, block by block."""

    @property
    def n_rows(self) -> int:
        """Training rows of an epoch."""

    @property
    def n_steps(self) -> int:
        """Steps of an epoch."""

    def blocks(self, epoch: int) -> Iterator[Block]:
        """The blocks of an epoch, in order. They depend on the epoch's number only."""


class Trainer:
    """Trains a program on a feed.

    Parameters
    ----------
    program : Program
        Holds the parameters that belong to `state`.
    feed : Feed
    options : Options
    state : TrainingState, optional
        The state to continue from; a new run by default.
    validate : callable, optional
        Returns the validation loss of a program.
    callbacks : sequence of Callback
    checkpoint : Checkpoint, optional
    identity : mapping, optional
        What the checkpoint is to be recognised by.
    snapshot : callable, optional
        Makes the model of `Progress` from this trainer.
    """

    def __init__(
        self,
        program: Program,
        feed: Feed,
        options: Options,
        *,
        state: TrainingState | None = None,
        validate: Callable[[Program], float] | None = None,
        callbacks: Sequence[Callback] = (),
        checkpoint: Checkpoint | None = None,
        identity: Mapping[str, Any] | None = None,
        snapshot: Callable[[Trainer], Any] | None = None,
    ) -> None:
        self.program = program
        self.feed = feed
        self.options = options
        self.state = state or TrainingState()
        self.validate = validate
        self.callbacks = tuple(callbacks)
        self.checkpoint = checkpoint
        self.identity = dict(identity or {})
        self.snapshot = snapshot
        self._batch = program.plan.batch_rows
        self._n_steps = feed.n_steps
        self._bound: tuple[Any, ...] | None = None
        self._chunk = 1
        self._reason: str | None = None
        self._stepping = False  # whether the program may be ahead of the state
        self._begun = self._saved = time.perf_counter()

    def finish(self) -> State | None:
        """Close the program and return the parameters to keep; None before the end of the first epoch.

        They are those of the best epoch if validation is monitored, otherwise of the last completed epoch. The
        optimiser's state comes with them if no step was made since.
        """
        s = self.state
        if s.epochs_done and s.best is None and s.good is None:
            return self.program.hand_over()
        self.program.close()
        return s.best or s.good

    def run(self) -> None:
        """Train until `max_iter`, convergence or a callback ends it.

        Raises
        ------
        DivergenceError
            A loss or a parameter is not finite.
        Interrupted
            `Checkpoint.stop` returned a text.
        KeyboardInterrupt
            After the current step, and after the checkpoint was written if there is one.
        """
        self._begun = self._saved = time.perf_counter()
        try:
            if self.state.finished:
                return
            while self._epoch():
                pass
        except KeyboardInterrupt:
            if not self._stepping:
                self._save()
            raise
        self._save()

    def _epoch(self) -> bool:
        """Train for the rest of an epoch; return whether another epoch follows."""
        s = self.state
        if s.epochs_done and s.good is None:
            # Until the first step the program itself holds the parameters of the last completed epoch.
            self.state = dataclasses.replace(s, good=self.program.state(optimiser=False))
        with contextlib.closing(self._loaded(list(self._left()))) as blocks:
            for rows, arrays in blocks:
                if arrays is not self._bound:
                    self.program.bind(*arrays)
                    self._bound = arrays
                del arrays
                while len(rows):
                    rows = rows[self._steps(rows) * self._batch :]
        self._end_epoch()
        return not self.state.finished

    def _left(self) -> Iterator[Block]:
        """The blocks of the current epoch, without the rows that were trained on."""
        skip = self.state.epoch_step
        for block in self.feed.blocks(self.state.epoch):
            n_steps = -(-len(block.rows) // self._batch)
            if skip < n_steps:
                yield dataclasses.replace(block, rows=block.rows[skip * self._batch :])
            skip = max(0, skip - n_steps)

    def _loaded(self, blocks: list[Block]) -> Generator[tuple[NDArray[np.int64], tuple[Any, ...]]]:
        """Rows and arrays of each block. If there are several, the next one is read ahead."""
        if len(blocks) == 1:
            yield blocks[0].rows, blocks[0].load()
        else:
            yield from zip((block.rows for block in blocks), read_ahead([block.load for block in blocks]), strict=True)

    def _steps(self, rows: NDArray[np.int64]) -> int:
        """Train on the first of `rows` for one chunk of steps; return the number of steps done."""
        rows = rows[: self._chunk * self._batch]
        count = -(-len(rows) // self._batch)
        s = self.state
        rates, factors, momenta = self._rates(s.step, count), self._kl_factors(count), self._momenta(count)
        hyper = Hyper(self.options.seed, s.step, rates, factors, momenta)
        begin = time.perf_counter()
        with _DelayedInterrupt() as interrupt, np.errstate(over="ignore", invalid="ignore"):
            self._stepping = True
            terms = self.program.train(rows, hyper, lambda: interrupt.pending or self._asked_to_stop())
            done = len(terms)
            seconds = time.perf_counter() - begin
            trained = min(len(rows), done * self._batch)
            weighted = terms * float(self._batch)
            weighted[-1] = terms[-1] * (trained - (done - 1) * self._batch)
            weighted[0] += s.sums or 0.0
            self.state = dataclasses.replace(
                s,
                step=s.step + done,
                epoch_step=s.epoch_step + done,
                # cumsum adds step after step, so the sums do not depend on the chunks.
                sums=tuple(weighted.cumsum(axis=0)[-1].tolist()),
                rows=s.rows + trained,
                spent=s.spent + seconds,
            )
            self._stepping = False
            if not np.isfinite(terms).all():
                self._diverged(float(terms[~np.isfinite(terms).all(axis=1)][0].sum()), "loss")
        self._chunk = max(1, int(CHUNK_SECONDS * done / max(seconds, 1e-6)))
        if self.callbacks:
            progress = self._progress()
            for callback in self.callbacks:
                callback.on_batch(progress)
        if self.checkpoint is not None:
            if self._asked_to_stop() and self._reason is not None:
                self._save()
                raise Interrupted(self._reason)
            if time.perf_counter() - self._saved >= 60 * self.checkpoint.minutes:
                self._save()
        return done

    def _asked_to_stop(self) -> bool:
        if self._reason is None and self.checkpoint is not None and self.checkpoint.stop is not None:
            self._reason = self.checkpoint.stop()
        return self._reason is not None

    def _rate(self, step: int) -> float:
        """Learning rate of a step of the current epoch."""
        o, s = self.options, self.state
        if o.learning_rate != "cosine":
            return o.learning_rate_init * s.factor
        part = (step - s.first_step) / (o.max_iter * self._n_steps)
        return 0.5 * o.learning_rate_init * (1 + math.cos(math.pi * part))

    def _rates(self, first: int, count: int) -> NDArray[np.float64]:
        """Learning rates of consecutive steps."""
        if self.options.learning_rate != "cosine":
            return np.full(count, self._rate(first))
        # One by one: the bits of a vector's cosine could depend on the length of the chunk.
        return np.array([self._rate(first + i) for i in range(count)])

    def _kl_factors(self, count: int) -> NDArray[np.float64] | None:
        """The part of the KL term's weight in each of the next steps; None for all of it."""
        s, warmup = self.state, self.options.kl_warmup
        if s.epoch >= warmup:
            return None
        return np.minimum(1.0, (s.epoch + (s.epoch_step + np.arange(count)) / self._n_steps) / warmup)

    def _momenta(self, count: int) -> NDArray[np.float64] | None:
        """Momentum of each of the next steps; None for the plan's momentum."""
        early = self.state.epoch < self.options.momentum_epochs
        return np.full(count, self.options.initial_momentum) if early else None

    def _end_epoch(self) -> None:
        o, s = self.options, self.state
        begin = time.perf_counter()
        if not self.program.finite():
            self._diverged(math.nan, "network")
        terms = dict(zip(self.program.plan.terms, (np.array(s.sums) / self.feed.n_rows).tolist(), strict=True))
        loss, kl = terms.pop("loss"), terms.pop("kl", None)
        penalty = sum(terms.values())
        values = {"loss": loss, "learning_rate": self._rate(s.step - 1)}
        spec = self.program.plan.spec
        if spec.loss is Loss.MSE:
            values["mse_per_feature"] = loss / spec.n_outputs
        objective = loss + penalty
        if kl is not None:
            values["kl"] = kl
            values["objective"] = objective = objective + spec.kl_weight * kl
        if terms:
            values |= terms
            values["penalty"] = penalty
        if self.validate is not None:
            with np.errstate(over="ignore", invalid="ignore"):
                values["val_loss"] = self.validate(self.program)
            if not math.isfinite(values["val_loss"]):
                self._diverged(values["val_loss"], "validation loss")
        values["seconds"] = s.spent + time.perf_counter() - begin
        self.state = dataclasses.replace(
            s,
            epoch=s.epoch + 1,
            epoch_step=0,
            sums=(),
            rows=0,
            spent=0.0,
            good=None,
            history=extended(s.history, values, s.epoch),
            **self._progressed(values["val_loss"] if o.monitor == "val_loss" else objective),
        )
        if self.callbacks:
            progress = self._progress()
            if any([callback.on_epoch_end(progress) for callback in self.callbacks]):
                self.state = dataclasses.replace(self.state, finished=self.state.finished or "callback")

    def _progressed(self, loss: float) -> dict[str, Any]:
        """The changes of the state that follow from the monitored `loss` of the epoch that ends."""
        o, s = self.options, self.state
        epoch = s.epoch + 1
        changes: dict[str, Any] = {"finished": "max_iter" if epoch - s.first_epoch >= o.max_iter else ""}
        if loss < s.best_loss:
            changes |= {"best_loss": loss, "best_epoch": epoch, "best": None}
        elif o.monitor == "val_loss" and s.best is None:
            changes["best"] = s.good
        if s.reference == math.inf or epoch <= o.kl_warmup or loss < s.reference - o.tol * abs(s.reference):
            return changes | {"reference": loss, "stale": 0, "stale_rate": 0}
        stale, stale_rate = s.stale + 1, s.stale_rate + 1
        if o.learning_rate == "plateau" and stale_rate >= max(1, o.n_iter_no_change // 2):
            changes["factor"], stale_rate = s.factor / 2, 0
        if o.monitor is not None and stale >= o.n_iter_no_change:
            changes["finished"] = "converged"
        return changes | {"stale": stale, "stale_rate": stale_rate}

    def _diverged(self, value: float, what: str) -> None:
        epochs = self.state.epochs_done
        kept = f"the parameters after epoch {epochs} are kept" if epochs else "no epoch was completed"
        finding = "a parameter is not finite" if what == "network" else f"the {what} is {value}"
        raise DivergenceError(
            f"training diverged in epoch {epochs + 1}: {finding}; {kept}; lower learning_rate_init "
            f"(now {self.options.learning_rate_init:g}), set clip_norm, or scale the data"
        )

    def _progress(self) -> Progress:
        s = self.state
        if s.epoch_step:
            step, loss, rate = s.epoch_step, s.sums[0] / s.rows, self._rate(s.step - 1)
        else:
            step, loss, rate = self._n_steps, s.history["loss"][-1], s.history["learning_rate"][-1]
        validated = s.history.get("val_loss")
        return Progress(
            epoch=s.epochs_done,
            max_iter=self.options.max_iter,
            step=step,
            steps_per_epoch=self._n_steps,
            loss=loss,
            val_loss=validated[-1] if validated else None,
            seconds=time.perf_counter() - self._begun,
            learning_rate=rate,
            best_epoch=max(0, s.best_epoch - s.first_epoch),
            _snapshot=None if self.snapshot is None else partial(self.snapshot, self),
        )

    def _save(self) -> None:
        if self.checkpoint is not None:
            self.checkpoint.write(self.identity, self.state, self.program.views())
            self._saved = time.perf_counter()


def extended(history: Mapping[str, list[float]], values: Mapping[str, float], epoch: int) -> dict[str, list[float]]:
    """`history` with one more epoch. A missing value becomes NaN, so that all lists have the same length."""
    names = dict.fromkeys([*history, *values])
    return {n: [*history.get(n, [math.nan] * epoch), values.get(n, math.nan)] for n in names}


class _DelayedInterrupt:
    """Delays Ctrl-C until the steps and their bookkeeping are done.

    It only acts in the main thread, and only on Python's own handler.
    """

    def __init__(self) -> None:
        self.pending = False
        self._previous: Any = None

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.pending = True

    def __enter__(self) -> _DelayedInterrupt:
        main = threading.current_thread() is threading.main_thread()
        if main and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            self._previous = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)
        if self.pending and kind is None:
            raise KeyboardInterrupt
