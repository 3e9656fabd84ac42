"""When a fit has to stop early: signals of the batch system, Ctrl-C, the end of the allotted time.

- While training, a signal is only noted; training asks, finishes its step, saves and ends with `Interrupted`.
- At any other time a signal raises `Stopped` at once: nothing is half-written, and the checkpoint stays.
- Handlers are put back as they were found.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any, Self

from .settings import UsageError

__all__ = ["Stopped", "Stopper", "exit_code"]

_SIGNALS = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2")
WALLTIME = "walltime"


class Stopped(BaseException):
    """A signal arrived outside training. Not an Exception: no library on the way may take it for an error."""


class Stopper:
    """Asked by training whether to stop; a context manager that owns the signal handlers meanwhile.

    Parameters
    ----------
    margin : float
        Seconds before ``SLURM_JOB_END_TIME`` at which to stop; the variable may be absent.
    """

    def __init__(self, margin: float = 120.0) -> None:
        self._end = _job_end()
        self._margin = margin
        self._noted: str | None = None
        self._training = False
        self._previous: dict[int, Any] = {}

    def __call__(self) -> str | None:
        """Why to stop: the name of a signal or "walltime"; None to go on."""
        if self._noted is None and self._end is not None and time.time() >= self._end - self._margin:
            self._noted = WALLTIME
        return self._noted

    @contextlib.contextmanager
    def training(self) -> Iterator[None]:
        """Signals are noted, not raised, in here; one that nobody asked about is raised at the end."""
        self._training = True
        try:
            yield
        finally:
            self._training = False
        if self._noted is not None and self._noted != WALLTIME:
            raise Stopped(self._noted)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if not self._training or (name == "SIGINT" and self._noted == name):
            raise Stopped(name)  # the second Ctrl-C does not wait for anything
        self._noted = name

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for name in _SIGNALS:
                number = getattr(signal, name, None)
                # What a parent told us to ignore, as nohup and shells do, stays ignored.
                if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while self._previous:
            number, handler = self._previous.popitem()
            signal.signal(number, handler)


def exit_code(reason: str) -> int:
    """128 + the signal; the end of the allotted time counts as TERM, which the batch system would send."""
    return 128 + int(signal.SIGTERM if reason == WALLTIME else signal.Signals[reason])


def _job_end() -> float | None:
    text = os.environ.get("SLURM_JOB_END_TIME")
    if not text:
        return None
    try:
        return float(text)
    except ValueError:
        raise UsageError(f"SLURM_JOB_END_TIME={text!r} is not a time in seconds") from None
