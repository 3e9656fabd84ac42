"""Early stops of a fit: signals of the batch system, Ctrl-C, and the end of the allotted time.

- During training, a signal is only recorded. Training finishes its step, saves a checkpoint and raises `Interrupted`.
- At any other time, a signal raises `Stopped` at once. No file is left half-written, and the checkpoint stays.
- The previous signal handlers are restored at the end.
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
    """A signal arrived outside training. It is not an Exception, so that no library catches it."""


class Stopper:
    """Training calls it to learn whether to stop. As a context manager, it installs the signal handlers.

    Parameters
    ----------
    margin : float
        Stop this many seconds before ``SLURM_JOB_END_TIME``, if that variable is set.
    """

    def __init__(self, margin: float = 120.0) -> None:
        self._end = _job_end()
        self._margin = margin
        self._noted: str | None = None
        self._training = False
        self._previous: dict[int, Any] = {}

    def __call__(self) -> str | None:
        """The reason to stop, a signal name or "walltime"; None to continue."""
        if self._noted is None and self._end is not None and time.time() >= self._end - self._margin:
            self._noted = WALLTIME
        return self._noted

    @contextlib.contextmanager
    def training(self) -> Iterator[None]:
        """Record signals instead of raising them. A signal that training did not see is raised at the end."""
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
            raise Stopped(name)  # a second Ctrl-C stops at once
        self._noted = name

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for name in _SIGNALS:
                number = getattr(signal, name, None)
                # Signals that a parent such as nohup told us to ignore stay ignored.
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
    """128 + the signal number. The end of the allotted time counts as TERM, the signal that SLURM sends."""
    return 128 + int(signal.SIGTERM if reason == WALLTIME else signal.Signals[reason])


def _job_end() -> float | None:
    text = os.environ.get("SLURM_JOB_END_TIME")
    if not text:
        return None
    try:
        return float(text)
    except ValueError:
        raise UsageError(f"SLURM_JOB_END_TIME={text!r} must be a time in seconds since 1970") from None
