"""The process of the command: signals before and after a job, standard streams, and the exit code.

- A signal ends the process with 128 + its number and one line, at any moment from here to the end of the process. A job
  has handlers of its own, in `cli.stopping`. A signal that is ignored at the start, as under nohup, stays ignored.
- A standard stream that cannot be written (a full disk, a reader that is gone, a closed descriptor) stops no job.
- Importing this module loads neither NumPy nor another part of narrows, so that the handlers are set early.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import io
import os
import signal
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, NoReturn, TextIO

__all__ = ["SIGNALS", "Tolerant", "own_signals", "run", "standard_streams"]

SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU")
"""Signals by which people and batch systems end a job."""

_code: int | None = None
"""The exit code of the job; None before its end."""


def run(main: Callable[[], int]) -> NoReturn:
    """Call `main`, which returns an exit code, and end the process. `main` may import what takes time."""
    global _code
    _open_descriptors()
    atexit.register(_leave)  # the first to register is the last to run
    for number in own_signals():
        signal.signal(number, _end)
    try:
        _code = main()
    except SystemExit as error:  # --help and --version
        _code = error.code if isinstance(error.code, int) else int(error.code is not None)
    sys.exit(_code)


def own_signals() -> list[int]:
    """The numbers of `SIGNALS` that exist here and are not ignored."""
    numbers = [int(getattr(signal, name)) for name in SIGNALS if hasattr(signal, name)]
    return [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]


def _end(number: int, frame: FrameType | None) -> NoReturn:
    """Handle a signal before or after a job. No file is open then, and no library may turn it into its own error."""
    if not _code:
        when = "" if _code is None else " after the end of the job"
        with contextlib.suppress(OSError):
            os.write(2, f"narrows: stopped by {signal.Signals(number).name}{when}\n".encode())
    os._exit(_code or 128 + number)


def _leave() -> NoReturn:
    """End the process. The interpreter's own end would give other exit codes for signals and for unwritable streams."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()
    os._exit(1 if _code is None else _code)


def _open_descriptors() -> None:
    """Open the standard descriptors that are closed. Otherwise a result file would get one of these numbers, and then
    also the messages of libraries.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # takes the lowest free number


class Tolerant(io.TextIOBase):
    """A standard stream whose failures stop nobody.

    Attributes
    ----------
    error : OSError or None
        The first failure to write.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream
        self.error: OSError | None = None

    @property
    def lost(self) -> str | None:
        """Why text was lost, after a flush; None if all was written, or if the reader wanted no more."""
        self.flush()
        if self.error is None or self.error.errno == errno.EPIPE:
            return None
        return self.error.strerror or str(self.error)

    @contextlib.contextmanager
    def _noting(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.error = self.error or error
        except ValueError as error:  # the stream is closed
            self.error = self.error or OSError(errno.EBADF, str(error))

    def write(self, text: str) -> int:
        with self._noting():
            if self._stream is None:
                raise OSError(errno.EBADF, os.strerror(errno.EBADF))
            try:
                self._stream.write(text)
            except UnicodeEncodeError:  # such as the name of a file that is not UTF-8
                code = self.encoding
                self._stream.write(text.encode(code, "backslashreplace").decode(code))
        return len(text)

    def flush(self) -> None:
        if self._stream is not None:
            with self._noting():
                self._stream.flush()

    def isatty(self) -> bool:
        try:
            return self._stream is not None and self._stream.isatty()
        except (OSError, ValueError):
            return False

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        if self._stream is None:
            raise io.UnsupportedOperation("fileno")
        return self._stream.fileno()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return getattr(self._stream, "encoding", None) or "utf-8"

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def standard_streams() -> Iterator[Tolerant]:
    """Make standard output and standard error tolerant, and return standard output."""
    before = sys.stdout, sys.stderr
    output, errors = Tolerant(before[0]), Tolerant(before[1])
    sys.stdout, sys.stderr = output, errors
    try:
        yield output
    finally:
        output.flush()
        errors.flush()
        sys.stdout, sys.stderr = before
