"""The child process of `isolated`: it reads one file and answers on standard output.

- It ends with its standard input, and each answer has a time limit even if the parent is gone.
- Signals to the job are the parent's business.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import signal
import sys
import warnings
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from .._process import own_signals
from . import readers
from .columns import column_of

__all__ = ["serve"]

log = logging.getLogger("narrows")


def serve() -> None:
    """Answer the requests on standard input until it ends."""
    for number in own_signals():  # the parent decides when the job ends
        signal.signal(number, signal.SIG_IGN)
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not mix with the answers
    told: list[tuple[int, str]] = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append((record.levelno, record.getMessage()))  # type: ignore[method-assign]
    log.addHandler(handler)
    log.setLevel(logging.DEBUG)
    warnings.simplefilter("always")
    warnings.showwarning = lambda message, *_: told.append((0, str(message)))
    source: Any = None
    for line in sys.stdin.buffer:
        request = json.loads(line)
        seconds = int(request.pop("seconds"))
        if hasattr(signal, "alarm"):
            signal.alarm(seconds + 10)  # if the parent is gone
        answer: dict[str, Any] = {}
        arrays: list[npt.NDArray[Any]] = []
        try:
            source, answer, arrays = _answer(source, request)
        except Exception as error:
            answer = {"error": type(error).__name__, "message": str(error)}
        _send(out, answer | {"log": told, "arrays": len(arrays)}, arrays)
        told.clear()
        if hasattr(signal, "alarm"):
            signal.alarm(0)


def _answer(source: Any, request: dict[str, Any]) -> tuple[Any, dict[str, Any], list[npt.NDArray[Any]]]:
    match request.pop("do"):
        case "open":
            path, columns = request.pop("path"), request.pop("columns", False)
            if columns:
                form = readers.format_of(Path(path))
                assert form is not None
                source = readers.columns_of(Path(path), form, **request)
                return source, {"obs": list(source)}, []
            source = readers.open(path, **request)
            named = {name: getattr(source, name) for name in ("obs_names", "var_names", "labels")}
            named = {name: values for name, values in named.items() if values is not None}
            facts = {
                "shape": source.shape,
                "dtype": source.stored_dtype.name,
                "nnz": source.nnz,
                "holds_floats": source.holds_floats,
                "obs": list(source.obs),
                "roles": None if source.roles is None else dict(source.roles),
                "image_shape": source.image_shape,
                "beside": [os.fspath(file) for file in source.beside],
                "parts": list(named),
            }
            return source, facts, list(named.values())
        case "rows":
            block = source.read_rows(slice(request["start"], request["stop"]))
            source.release()
            return source, {}, [block.data, block.indices, block.indptr] if source.is_sparse else [block]
        case _:
            found = column_of(getattr(source, "obs", source), request["name"], "obs")
            given = {"values": found.values, "mask": found.mask, "categories": found.categories}
            parts = {name: values for name, values in given.items() if values is not None}
            return source, {"parts": list(parts), "ordered": found.ordered}, list(parts.values())


def _send(out: BinaryIO, answer: dict[str, Any], arrays: list[npt.NDArray[Any]]) -> None:
    out.write(json.dumps(answer).encode() + b"\n")
    for array in arrays:
        buffer = io.BytesIO()  # NumPy writes to a file by its position, which a pipe has not
        np.save(buffer, array, allow_pickle=False)
        out.write(buffer.getbuffer())
    out.flush()
