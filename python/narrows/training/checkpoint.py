"""Checkpoints: the state of a training run in one file. A resumed run gives the same bits as an uninterrupted one.

- A checkpoint file is complete or absent.
- A checkpoint of another run is an error that names the differences.
- The content is checked, not only its checksum. A state that training cannot have is a `ModelFileError`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..backends import State
from ..errors import ModelFileError, ResumeError

__all__ = ["Checkpoint", "SavedRun", "TrainingState", "differences", "flat"]


@dataclass(frozen=True)
class TrainingState:
    """The state of a run besides the network. It is never changed in place.

    Attributes
    ----------
    epoch, step : int
        Completed epochs and updates, with those of earlier runs.
    first_epoch, first_step : int
        The same when this run began.
    epoch_step : int
        Updates of the current epoch.
    sums : tuple of float
        Sums over the rows of the current epoch, one for each term of the plan.
    rows : int
        Number of those rows.
    spent : float
        Seconds spent on the current epoch.
    factor : float
        Factor of the learning rate in the plateau schedule.
    best_loss, best_epoch
        Lowest monitored loss, and its epoch counted from 1.
    reference : float
        The monitored loss at the last improvement by more than `Options.tol`.
    stale, stale_rate : int
        Epochs since that improvement; and since that improvement or the last cut of the learning rate.
    finished : str
        Why training ended: "max_iter", "converged" or "callback"; "" while it runs.
    history : dict of list of float
    good : dict of ndarray, or None
        Parameters after the last completed epoch; None while the program still holds them.
    best : dict of ndarray, or None
        Parameters after the best epoch, if validation decides; None while that is the last completed epoch.
    """

    epoch: int = 0
    step: int = 0
    first_epoch: int = 0
    first_step: int = 0
    epoch_step: int = 0
    sums: tuple[float, ...] = ()
    rows: int = 0
    spent: float = 0.0
    factor: float = 1.0
    best_loss: float = math.inf
    best_epoch: int = 0
    reference: float = math.inf
    stale: int = 0
    stale_rate: int = 0
    finished: str = ""
    history: Mapping[str, list[float]] = field(default_factory=dict)
    good: State | None = None
    best: State | None = None

    @property
    def epochs_done(self) -> int:
        """Completed epochs of this run."""
        return self.epoch - self.first_epoch


_NAMED = 8  # fields that an error names
_AFRESH = "use resume='never' to start afresh"
_ARRAYS = ("good", "best")
_SCALARS = tuple(f.name for f in dataclasses.fields(TrainingState) if f.name not in _ARRAYS)


def _pack(state: TrainingState, network: State) -> tuple[State, dict[str, Any]]:
    tensors = {f"network.{name}": array for name, array in network.items()}
    for part in _ARRAYS:
        snapshot: State | None = getattr(state, part)
        if snapshot is not None:
            tensors |= {f"{part}.{name}": array for name, array in snapshot.items()}
    return tensors, {"state": {name: getattr(state, name) for name in _SCALARS}}


def _unpack(tensors: State, meta: Mapping[str, Any]) -> tuple[dict[str, Any], TrainingState, State]:
    """Identity, state and network. Raises ModelFileError for what `_pack` cannot have written."""
    if meta.keys() != {"identity", "state"}:
        raise ModelFileError(f"it has the parts {sorted(meta)}")
    identity, fields = meta["identity"], meta["state"]
    if not isinstance(identity, dict):
        raise ModelFileError(f"the identity is {_shown(identity)}")
    if not isinstance(fields, dict) or fields.keys() != set(_SCALARS):
        raise ModelFileError("it does not have the fields of a state of training")
    for name, value in fields.items():
        if not _possible(name, value):
            raise ModelFileError(f"{name} is {_shown(value)}")
    parts: dict[str, State] = {"network": {}}
    for name, array in tensors.items():
        part, _, slot = name.partition(".")
        if part not in ("network", *_ARRAYS):
            raise ModelFileError(f"it has an unknown tensor {_shown(name)}")
        if array.dtype not in (np.float32, np.float64) or not np.isfinite(array).all():
            raise ModelFileError(f"tensor {name} must hold finite floating-point numbers")
        parts.setdefault(part, {})[slot] = array
    state = TrainingState(**fields, good=parts.get("good"), best=parts.get("best"))
    done, epoch_began = state.epochs_done, state.epoch_step > 0
    contradictions = {
        "epoch": done < 0 or (state.finished != "" and done == 0),
        "step": state.step - state.epoch_step < state.first_step,
        "best_epoch": not (state.first_epoch < state.best_epoch <= state.epoch if done else state.best_epoch == 0),
        "best_loss": math.isinf(state.best_loss) == (done > 0),
        "reference": math.isinf(state.reference) == (done > 0),
        "rows": (state.rows > 0) != epoch_began,
        "sums": (len(state.sums) > 0) != epoch_began,
        "finished": state.finished != "" and epoch_began,
        "stale": max(state.stale, state.stale_rate) > done,
        "history": any(len(values) != state.epoch for values in state.history.values())
        or (state.epoch > 0 and not state.history.keys() >= {"loss", "learning_rate", "seconds"}),
        "good": state.good is None and done > 0 and epoch_began,
    }
    for name, wrong in contradictions.items():
        if wrong:
            raise ModelFileError(f"{name} contradicts the rest")
    return identity, state, parts["network"]


def _possible(name: str, value: Any) -> bool:
    """Whether a field of `TrainingState` may have this value."""

    def number(x: Any) -> bool:
        return type(x) is float and math.isfinite(x)

    if name in ("best_loss", "reference"):
        return number(value) or (type(value) is float and value == math.inf)
    if name == "spent":
        return number(value) and value >= 0
    if name == "factor":
        return number(value) and 0 < value <= 1
    if name == "sums":
        return isinstance(value, tuple) and all(map(number, value))
    if name == "finished":
        return type(value) is str and value in ("", "max_iter", "converged", "callback")
    if name == "history":
        return isinstance(value, dict) and all(
            isinstance(column, list) and all(type(x) is float and not math.isinf(x) for x in column)
            for column in value.values()
        )
    return type(value) is int and 0 <= value < 2**53


def _shown(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else text[:57] + "..."


@dataclass
class Checkpoint:
    """Where training saves its state, and whether it resumes from there.

    Attributes
    ----------
    path : Path
        The file; its folder must exist.
    minutes : float
        Shortest time between two saves. Stops, Ctrl-C and the end of training always save.
    resume : {"auto", "never", "require"}
        ``"auto"`` resumes from `path` if it exists; ``"never"`` starts afresh; ``"require"`` raises `ResumeError` if it
        does not exist.
    identity : dict
        Further values that must be the same to resume, besides the estimator's parameters, seed and data. JSON must be
        able to hold them.
    stop : callable, optional
        Called about every 50 ms. If it returns a text, training ends after the current step with `Interrupted`.

    Examples
    --------
    >>> import numpy as np
    >>> X = np.random.default_rng(0).random((60, 8), dtype=np.float32)
    >>> from narrows import Autoencoder
    >>> from narrows.training import Checkpoint
    >>> ae = Autoencoder(2, max_iter=3, random_state=0).fit(X, checkpoint=Checkpoint("run.safetensors"))
    >>> again = Autoencoder(2, max_iter=3, random_state=0).fit(X, checkpoint=Checkpoint("run.safetensors"))
    >>> bool((again.transform(X) == ae.transform(X)).all())  # nothing was trained again
    True
    """

    path: Path
    minutes: float = 10.0
    resume: Literal["auto", "never", "require"] = "auto"
    identity: dict[str, Any] = field(default_factory=dict)
    stop: Callable[[], str | None] | None = None

    def __post_init__(self) -> None:
        self.path = Path(self.path)
        if self.resume not in ("auto", "never", "require"):
            raise ValueError(f"resume={self.resume!r} must be one of auto, never, require")
        if not self.minutes >= 0:
            raise ValueError(f"minutes={self.minutes!r} must not be negative")

    def read(self) -> SavedRun | None:
        """The run saved under `path`, or None if training starts afresh.

        Raises
        ------
        ResumeError
            ``resume="require"`` and there is no checkpoint.
        ModelFileError
            The file is damaged or not a checkpoint.
        """
        from ..persistence import load_tensors

        if self.resume == "never":
            return None
        if not self.path.exists():
            if self.resume == "require":
                raise ResumeError(f"no checkpoint at {self.path} to resume from; use resume='auto' to start afresh")
            return None
        tensors, meta = load_tensors(self.path, kind="checkpoint")
        try:
            return SavedRun(self.path, *_unpack(tensors, meta))
        except ModelFileError as error:
            raise ModelFileError(f"{self.path}: not a checkpoint of training: {error}; {_AFRESH}") from None

    def write(self, identity: Mapping[str, Any], state: TrainingState, network: State) -> None:
        """Save a run durably."""
        from ..persistence import save_tensors

        tensors, meta = _pack(state, network)
        save_tensors(self.path, tensors, {"identity": dict(identity), **meta}, kind="checkpoint")


@dataclass(frozen=True)
class SavedRun:
    """A checkpoint read back."""

    path: Path
    identity: dict[str, Any]
    state: TrainingState
    network: State

    @property
    def seed(self) -> int:
        """The seed of the run. Raises `ModelFileError` if it cannot be one."""
        seed = self.identity.get("seed")
        if type(seed) is not int or not 0 <= seed < 2**64:
            raise ModelFileError(f"{self.path}: not a checkpoint of training: the seed is {_shown(seed)}; {_AFRESH}")
        return seed

    def check(self, identity: Mapping[str, Any]) -> None:
        """Raise `ResumeError` with the differing fields unless this run has this `identity`."""
        here, there = flat(identity), flat(self.identity)
        differing = differences(there, here, sorted(here.keys() | there.keys()))
        if differing:
            if len(differing) > _NAMED:
                differing[_NAMED:] = [f"{len(differing) - _NAMED} more fields"]
            raise ResumeError(
                f"checkpoint {self.path} belongs to another run, which differs in {', '.join(differing)}; {_AFRESH}"
            )

    def check_fits(
        self,
        views: State,
        *,
        first_epoch: int,
        first_steps: tuple[int, ...],
        n_rows: int,
        n_steps: int,
        n_terms: int,
        max_iter: int,
        keeps_best: bool,
    ) -> None:
        """Raise `ModelFileError` unless a run can be in this state.

        Parameters
        ----------
        views : State
            Parameters and optimiser state of the program that continues.
        first_epoch, first_steps : int, tuple of int
            Epochs before this run, and the possible numbers of steps.
        n_rows, n_steps, n_terms, max_iter : int
            Rows and steps of an epoch, terms of the loss, and epochs of the run.
        keeps_best : bool
            Whether the result is the best epoch.
        """
        s = self.state
        learned = {name: view for name, view in views.items() if not name.startswith("moment")}
        wrong = next(
            (
                f"{part}.{name}"
                for part, found, expected in (
                    ("network", self.network, views),
                    ("good", s.good, learned),
                    ("best", s.best, learned),
                )
                if found is not None
                for name in sorted(found.keys() | expected.keys())
                if name not in found
                or name not in expected
                or (found[name].shape, found[name].dtype) != (expected[name].shape, expected[name].dtype)
            ),
            None,
        )
        reason = f"tensor {wrong} does not fit the network" if wrong else ""
        steps = s.epochs_done * n_steps + s.epoch_step
        if s.first_epoch != first_epoch or s.first_step not in first_steps or s.step != s.first_step + steps:
            reason = f"{s.epoch} epochs do not have {s.step} steps here"
        elif s.rows > n_rows or s.epoch_step > n_steps or len(s.sums) not in (0, n_terms):
            reason = "its epoch has other steps, rows or terms than this run"
        elif s.epochs_done > max_iter or (s.finished == "" and s.epochs_done == max_iter):
            reason = f"{s.epochs_done} epochs are done, of at most {max_iter}"
        elif keeps_best and s.best is None and s.epochs_done and s.best_epoch < s.epoch:
            reason = "the parameters of the best epoch are missing"
        if reason:
            raise ModelFileError(f"{self.path}: not a checkpoint of training: {reason}; {_AFRESH}")


def flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables as one flat table; names are joined by dots, and sequences become lists as in files."""
    out: dict[str, Any] = {}
    for name, value in table.items():
        if isinstance(value, Mapping):
            out |= flat(value, f"{prefix}{name}.")
        else:
            out[f"{prefix}{name}"] = list(value) if isinstance(value, list | tuple) else value
    return out


def differences(there: Mapping[str, Any], here: Mapping[str, Any], names: Iterable[str]) -> list[str]:
    """The fields that differ between two flat tables, for a message; absent and None are the same."""

    def shown(value: Any) -> str:
        text = "unset" if value is None else str(value)
        return text if len(text) <= 40 else text[:37] + "..."

    return [
        f"{name} ({shown(there.get(name))} there, {shown(here.get(name))} here)"
        for name in names
        if there.get(name) != here.get(name)
    ]
