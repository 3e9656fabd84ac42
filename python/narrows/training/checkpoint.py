"""Checkpoints: the state of a training run in one file. A resumed run gives the same bits as an uninterrupted one.

- A checkpoint file is complete or absent.
- A checkpoint of another run is an error that names the differences.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

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


_ARRAYS = ("good", "best")
_SCALARS = tuple(f.name for f in dataclasses.fields(TrainingState) if f.name not in _ARRAYS)


def _pack(state: TrainingState, network: State) -> tuple[State, dict[str, Any]]:
    tensors = {f"network.{name}": array for name, array in network.items()}
    for part in _ARRAYS:
        snapshot: State | None = getattr(state, part)
        if snapshot is not None:
            tensors |= {f"{part}.{name}": array for name, array in snapshot.items()}
    return tensors, {"state": {name: getattr(state, name) for name in _SCALARS}}


def _unpack(tensors: State, meta: Mapping[str, Any]) -> tuple[TrainingState, State]:
    parts: dict[str, State] = {}
    for name, array in tensors.items():
        part, _, slot = name.partition(".")
        parts.setdefault(part, {})[slot] = array
    fields = {name: meta["state"][name] for name in _SCALARS}
    return TrainingState(**fields, good=parts.get("good"), best=parts.get("best")), parts["network"]


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
            return SavedRun(self.path, dict(meta["identity"]), *_unpack(tensors, meta))
        except (KeyError, TypeError, ValueError) as error:
            raise ModelFileError(f"{self.path}: not a checkpoint of training ({error})") from error

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

    def check(self, identity: Mapping[str, Any]) -> None:
        """Raise `ResumeError` with the differing fields unless this run has this `identity`."""
        here, there = flat(identity), flat(self.identity)
        differing = differences(there, here, sorted(here.keys() | there.keys()))
        if differing:
            raise ResumeError(
                f"checkpoint {self.path} belongs to another run, which differs in {', '.join(differing)}; "
                "use resume='never' to start afresh"
            )


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
