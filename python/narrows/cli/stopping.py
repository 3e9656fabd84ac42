"""Early stops of a fit: signals of the batch system, Ctrl-C, and the end of the allotted time.

- During training, a signal is only recorded. Training finishes its step, saves a checkpoint and raises `Interrupted`.
- At any other time, a signal raises `Stopped` at once. No file is left half-written, and the checkpoint stays.
- No signal is lost: `Stopper.signal` names it even if a library swallows `Stopped` or turns it into its own error.
- The previous signal handlers are restored at the end.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any, Self

from .._process import own_signals
from .settings import UsageError

__all__ = ["Stopped", "Stopper", "exit_code"]

#: Seconds in which a repeated signal counts as one: a batch system may send it, and the shell forward it too.
_ONE = 2.0
WALLTIME = "walltime"


class Stopped(BaseException):
    """A signal arrived outside training. It is not an Exception, so that no library catches it."""


class Stopper:
    """Training calls it to learn whether to stop. As a context manager, it installs the signal handlers.

    Parameters
    ----------
    margin : float
        Stop this many seconds before ``SLURM_JOB_END_TIME``, if that variable is set.

    Attributes
    ----------
    signal : str or None
        The first signal that arrived.
    """

    signal: str | None = None

    def __init__(self, margin: float = 120.0) -> None:
        self._end = _job_end()
        self._margin = margin
        self._ended = False
        self._raised = -math.inf
        self._training = False
        self._previous: dict[int, Any] = {}

    def __call__(self) -> str | None:
        """The reason to stop, a signal name or "walltime"; None to continue."""
        if self._end is not None and time.time() >= self._end - self._margin:
            self._ended = True
        return self.signal or (WALLTIME if self._ended else None)

    def check(self) -> None:
        """Raise `Stopped` if a signal arrived."""
        if self.signal is not None:
            raise Stopped(self.signal)

    @contextlib.contextmanager
    def training(self) -> Iterator[None]:
        """Record signals instead of raising them. A signal that training did not see is raised at the end."""
        self._training = True
        try:
            yield
        finally:
            self._training = False
        self.check()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        again = name == "SIGINT" and self.signal == name  # a second Ctrl-C stops at once
        self.signal = self.signal or name
        now = time.monotonic()
        if again or (not self._training and now - self._raised >= _ONE):
            self._raised = now
            raise Stopped(self.signal)

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in own_signals():
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
