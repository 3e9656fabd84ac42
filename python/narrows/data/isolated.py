"""Data files that nobody vouches for, read in a child process with a time limit.

- The C libraries behind HDF5, zarr and Parquet can hang or crash on altered files. Here only the child does, and the
  reader raises one line.
- The child sends JSON and arrays. Nothing that it sends is unpickled, and sparse rows are checked again.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt

from .. import errors
from ..errors import DataError
from ..rows.sparse import canonical_csr, check_indptr
from .columns import Column, column_of
from .source import Source, size_of

__all__ = ["IsolatedSource", "read_column"]

log = logging.getLogger("narrows")

SECONDS = 60.0
"""Time limit of one answer of the child: a block of rows or a column."""
BYTES_PER_SECOND = 10e6
"""Opening may take longer, because it may convert the matrix: one second for so many bytes of the file or folder."""
PIECE_BYTES = 16 << 20
"""Rows of about this size are asked for at once."""

_CHILD = "import sys, json; sys.path[:] = json.loads(sys.argv[1]); from narrows.data.child import serve; serve()"

Answer = tuple[dict[str, Any], list[npt.NDArray[Any]]]


class _Child:
    """A process that reads one file."""

    def __init__(self, path: Path, **options: Any) -> None:
        self._path = path
        self._lock = threading.Lock()
        command = [sys.executable, "-c", _CHILD, json.dumps([str(place) for place in sys.path])]
        pipe = subprocess.PIPE
        seconds = SECONDS + size_of(path) / BYTES_PER_SECOND
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL)
        try:
            self.opened = self.ask(seconds, do="open", path=os.fspath(path), **options)
        except BaseException:
            self.close()
            raise

    def ask(self, seconds: float, **request: Any) -> Answer:
        """Send a request and wait for the answer, at most `seconds`."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        if stdin.closed:
            raise ValueError(f"{self._path}: this source is closed")
        line = json.dumps(request | {"seconds": seconds}).encode() + b"\n"
        late = threading.Event()

        def stop() -> None:
            late.set()
            self._process.kill()

        with self._lock:
            timer = threading.Timer(seconds, stop)
            timer.daemon = True
            timer.start()
            try:
                stdin.write(line)
                stdin.flush()
                answer = json.loads(stdout.readline())
                stream: Any = SimpleNamespace(read=stdout.read)  # a pipe has no position
                arrays = [np.lib.format.read_array(stream, allow_pickle=False) for _ in range(answer["arrays"])]
            except (OSError, ValueError, EOFError, KeyError, TypeError) as error:
                raise DataError(f"{self._path}: damaged: its reader {self._end(late.is_set(), seconds)}") from error
            finally:
                timer.cancel()
        for level, text in answer["log"]:
            if level:
                log.log(level, "%s", text)
            else:
                warnings.warn(text, UserWarning, stacklevel=3)
        if "error" in answer:
            if answer["error"] in _ERRORS:
                raise _ERRORS[answer["error"]](answer["message"])
            raise DataError(f"{self._path}: damaged, or not in the format of its extension ({answer['message']})")
        return answer, arrays

    def _end(self, late: bool, seconds: float) -> str:
        """End a child that gave no answer, and say what it did."""
        try:
            code = self._process.wait(1.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            code = None
        alarm = getattr(signal, "SIGALRM", None)
        if late or (alarm is not None and code == -alarm):
            return f"did not answer within {seconds:.0f} seconds"
        if code is None:
            return "gave an answer that makes no sense"
        return f"crashed ({signal.Signals(-code).name if code < 0 else f'exit code {code}'})"

    def column(self, name: str) -> Column:
        answer, arrays = self.ask(SECONDS, do="column", name=name)
        parts = dict(zip(answer["parts"], arrays, strict=True))
        return Column(parts["values"], parts.get("mask"), parts.get("categories"), bool(answer["ordered"]))

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


_ERRORS: dict[str, type[Exception]] = {
    kind.__name__: kind for kind in (errors.DataError, errors.MissingExtraError, MemoryError, PermissionError)
}


class _Columns(Mapping[str, Column]):
    def __init__(self, child: _Child, names: list[str]) -> None:
        self._child, self._names = child, dict.fromkeys(names)

    def __getitem__(self, name: str) -> Column:
        if name not in self._names:
            raise KeyError(name)
        return self._child.column(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class IsolatedSource(Source):
    """A file that a child process reads. `options` are arguments of `narrows.data.open`."""

    def __init__(self, path: Path, **options: Any) -> None:
        self._child = _Child(path, **options)
        try:
            facts, arrays = self._child.opened
            names = dict(zip(facts["parts"], arrays, strict=True))
            super().__init__(
                facts["shape"],
                facts["dtype"],
                nnz=facts["nnz"],
                obs=_Columns(self._child, facts["obs"]),
                path=path,
                beside=[Path(name) for name in facts["beside"]],
                holds_floats=facts["holds_floats"],
                **names,
            )
            self.roles = facts["roles"]
            self.image_shape = None if facts["image_shape"] is None else tuple(facts["image_shape"])
        except BaseException:
            self._child.close()
            raise

    def _slice(self, start: int, stop: int) -> Any:
        n_rows, n_columns = self.shape
        row_bytes = 8 * n_columns if self.nnz is None else 16 * (self.nnz // n_rows + 1)
        step = max(1, PIECE_BYTES // row_bytes)
        pieces = [self._piece(at, min(at + step, stop)) for at in range(start, stop, step)] or [
            self._piece(start, stop)
        ]
        if len(pieces) == 1:
            return pieces[0]
        if self.is_sparse:
            from scipy import sparse

            return sparse.vstack(pieces, format="csr")
        return np.concatenate(pieces)

    def _piece(self, start: int, stop: int) -> Any:
        _, arrays = self._child.ask(SECONDS, do="rows", start=start, stop=stop)
        n_rows, n_columns = stop - start, self.shape[1]
        if self.is_sparse:
            data, indices, indptr = arrays
            check_indptr(indptr, n_rows, len(data), len(indices), self.name)
            return canonical_csr(data, indices, indptr, n_columns, where=self.name, row_offset=start)
        (block,) = arrays
        if block.shape != (n_rows, n_columns) or block.dtype.kind != "f":
            raise DataError(f"{self.name}: damaged: rows {start}..{stop - 1} came as {block.dtype} {block.shape}")
        return block

    def close(self) -> None:
        """End the child process."""
        if not self._closed:
            super().close()
            self._child.close()


def read_column(path: Path, name: str, **options: Any) -> Column:
    """A column of `obs`; `options` are arguments of `narrows.data.read_obs`."""
    child = _Child(path, columns=True, **options)
    try:
        column_of(dict.fromkeys(child.opened[0]["obs"], 0), name, str(path))
        return child.column(name)
    finally:
        child.close()
