"""Messages and progress of a run, on standard error.

- A terminal shows a tqdm bar. A batch log gets a plain line every 30 seconds and one at the end.
- A message is one line: ``narrows: ...``, ``narrows: warning: ...`` or ``narrows: error: ...``.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import time
import warnings
from collections.abc import Iterator
from typing import Any, TextIO

from ..training import Callback, Progress, ProgressBar
from ..training.callbacks import losses_text
from .settings import in_flags

__all__ = ["LineProgress", "messages", "progress"]

INTERVAL = 30.0


def progress(quiet: bool) -> list[Callback]:
    """The callbacks that show progress: a bar, lines or nothing."""
    if quiet:
        return []
    return [ProgressBar() if sys.stderr.isatty() else LineProgress()]


class LineProgress(Callback):
    """Plain lines at intervals, for logs.

    Parameters
    ----------
    stream : file, optional
        Standard error by default.
    interval : float
        Seconds between two lines.
    """

    def __init__(self, stream: TextIO | None = None, interval: float = INTERVAL) -> None:
        self._stream = stream
        self._interval = interval
        self._last = time.monotonic()
        self._pending: str | None = None

    def on_batch(self, progress: Progress) -> None:
        if progress.step < progress.steps_per_epoch:
            at = f"step {progress.step}/{progress.steps_per_epoch}"
            text = f"epoch {progress.epoch + 1}/{progress.max_iter}, {at}, {losses_text(progress)}"
            self._note(f"{text}, {progress.seconds:.0f} s")

    def on_epoch_end(self, progress: Progress) -> None:
        self._note(f"epoch {progress.epoch}/{progress.max_iter}, {losses_text(progress)}, {progress.seconds:.0f} s")

    def _note(self, text: str) -> None:
        self._pending = text
        if time.monotonic() - self._last >= self._interval:
            self.close()

    def close(self) -> None:
        """Write the last line if it was not written yet."""
        if self._pending is not None:
            print(f"narrows: {self._pending}", file=self._stream or sys.stderr, flush=True)
            self._last, self._pending = time.monotonic(), None


class _OneLine(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        mark = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        return f"narrows: {mark}{in_flags(' '.join(record.getMessage().split()))}"


@contextlib.contextmanager
def messages(quiet: bool) -> Iterator[None]:
    """Show the log and Python's warnings on standard error; `quiet` shows only warnings and errors."""
    log = logging.getLogger("narrows")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_OneLine())
    handler.setLevel(logging.WARNING if quiet else logging.INFO)
    level, propagate = log.level, log.propagate
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False

    def show(message: Any, category: Any, filename: str, lineno: int, file: Any = None, line: Any = None) -> None:
        log.warning("%s", message)

    with warnings.catch_warnings():
        warnings.showwarning = show
        try:
            yield
        finally:
            log.removeHandler(handler)
            log.setLevel(level)
            log.propagate = propagate
