"""Durable files and the model format.

- A written file is the complete old file or the complete new one, even if the process is killed or the power fails.
- A model file is data and cannot run code: no pickle, no `eval`.
- A damaged, foreign or newer file is a `ModelFileError`. A file that loads holds exactly what was saved.

A model file is a safetensors file. Its ``__metadata__`` has one key ``narrows`` with a JSON text
``{"format": 1, "kind": ..., "version": ..., "meta": ..., "sha256": ...}``. The digest covers the other four entries and
the names, dtypes, shapes and bytes of all tensors.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import re
import secrets
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from ._extras import importing
from ._version import __version__
from .errors import ModelFileError, NarrowsError, OutputError

__all__ = [
    "FORMAT",
    "atomic_write",
    "file_digest",
    "load_tensors",
    "remove_temporaries",
    "save_tensors",
    "temporary",
    "written_by",
]

FORMAT = 1
_HEADER_LIMIT = 32 << 20  # bytes; a header holds names of tensors and features, and settings, but no data
_DTYPES = {"bool": "BOOL", "float16": "F16", "float32": "F32", "float64": "F64"} | {
    f"{sign}int{bits}": f"{sign or 'i'}{bits}".upper() for sign in ("", "u") for bits in (8, 16, 32, 64)
}
"""Names of NumPy's dtypes in safetensors."""
# JSON has no such floats and no tuples. Each becomes an object with one of these keys, which meta may not use.
_FLOAT, _TUPLE = "__float__", "__tuple__"


def atomic_write(
    path: str | os.PathLike[str], write: Callable[[BinaryIO], object] | bytes, *, mode: int = 0o666
) -> None:
    """Write a file so that a reader finds the old content or the new, also after a crash, but never a part.

    The content goes to a temporary file in the same folder, is flushed to the disk and moved over `path`. Then the
    folder is flushed. On any failure before the move, ``KeyboardInterrupt`` too, the temporary file is removed and
    `path` stays as it was. A symbolic link is followed: its target is replaced.

    Parameters
    ----------
    path : path
        The file to create or replace; its folder must exist.
    write : bytes or callable
        The content, or a function that writes it to a binary stream.
    mode : int
        Permissions of the file, without those in the process's umask.

    Raises
    ------
    OutputError
        The path cannot be written; the message says why. It is also an ``OSError`` with its ``errno``.
    """
    shown = os.fspath(path)
    target = os.path.realpath(shown)
    folder, base = os.path.split(target)
    scratch = temporary(folder, base)
    try:
        if os.path.isdir(target):
            raise IsADirectoryError(errno.EISDIR, "it is a folder")
        if os.path.islink(target):
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
        try:
            # os.open applies the umask. Reading the umask would change it for the whole process.
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
            with os.fdopen(os.open(scratch, flags, mode), "wb") as stream:
                if callable(write):
                    write(stream)
                else:
                    stream.write(write)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(scratch, target)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(scratch)
            raise
        _sync_folder(folder)
    except NarrowsError:
        raise
    except OSError as error:
        failure = OutputError(f"cannot write {shown}: {error.strerror or error}")
        failure.errno = error.errno
        raise failure from error


def temporary(folder: str | os.PathLike[str], base: str) -> str:
    """A new path in `folder` for the content that will become the file `base`."""
    return os.path.join(folder, f".{_shortened(base)}.{secrets.token_hex(8)}.tmp")


def _shortened(base: str) -> str:
    return os.fsdecode(os.fsencode(base)[:200])  # the name must fit into 255 bytes


def remove_temporaries(folder: str | os.PathLike[str], bases: Iterable[str], *, age: float = 0.0) -> None:
    """Remove what killed processes left of `temporary` files.

    Parameters
    ----------
    folder : path
        Need not exist.
    bases : iterable of str
        Names of the files that were to be written. Any other file stays.
    age : float
        Remove only files that nobody has written to for this many seconds.
    """
    names = {_shortened(base) for base in bases}
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            found = re.fullmatch(r"\.(.+)\.[0-9a-f]{16}\.tmp", entry.name, re.DOTALL)
            if found and found[1] in names and entry.is_file(follow_symlinks=False):
                with contextlib.suppress(OSError):
                    if time.time() - entry.stat().st_mtime >= age:
                        os.unlink(entry)


def file_digest(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file's content, as hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync_folder(folder: str) -> None:
    if os.name == "nt":  # folders cannot be opened there
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems cannot sync a folder
            raise
    finally:
        os.close(descriptor)


def save_tensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, npt.NDArray[Any]],
    meta: Mapping[str, Any],
    *,
    kind: str,
) -> None:
    """Write arrays and settings to one model file, atomically.

    Parameters
    ----------
    path : path
    tensors : mapping of str to ndarray
        Any shape, also 0-d and empty; any memory layout; bool, signed and unsigned integers, float16, 32 and 64.
    meta : mapping of str to values
        None, bool, int, float (NaN and infinity too), str, and lists, tuples and dicts of these (str keys).
        NumPy scalars are stored as Python numbers; tuples come back as tuples.
    kind : str
        What the file is, for example ``"model"``; `load_tensors` needs the same word.

    Raises
    ------
    TypeError
        The format cannot hold a tensor's dtype or a value of `meta`; the message names it.
    OutputError
        The file cannot be written.
    """
    arrays: dict[str, npt.NDArray[Any]] = {}
    for name, tensor in tensors.items():
        if not isinstance(name, str) or name == "__metadata__":
            raise TypeError(f"{name!r} cannot be the name of a tensor")
        array = np.asarray(tensor)
        if array.dtype.name not in _DTYPES:
            raise TypeError(f"tensor {name!r} has dtype {array.dtype}, which a model file cannot hold")
        arrays[name] = np.asarray(array, dtype=array.dtype.newbyteorder("="), order="C")
    envelope = {"format": FORMAT, "kind": kind, "version": __version__, "meta": _encode(dict(meta), "meta")}
    envelope["sha256"] = _digest(envelope, arrays)
    parts = _serialized(arrays, _json(envelope))
    if len(parts[1]) > _HEADER_LIMIT:
        raise TypeError(f"meta is too large: names and settings may take at most {_HEADER_LIMIT >> 20} MiB")
    atomic_write(path, lambda stream: stream.writelines(parts))


def _serialized(arrays: Mapping[str, npt.NDArray[Any]], settings: str) -> list[bytes | memoryview]:
    """A safetensors file in parts: length of the header, header, and the arrays' memory, widest numbers first.

    The safetensors library would need two copies of all arrays. Without room for them it panics in Rust, which Python
    does not raise as an `Exception`. A checkpoint must work when memory is short.
    """
    header: dict[str, Any] = {"__metadata__": {"narrows": settings}}
    data: list[memoryview] = []
    end = 0
    for name, array in sorted(arrays.items(), key=lambda item: (-item[1].itemsize, item[0])):
        begin, end = end, end + array.nbytes
        header[name] = {"dtype": _DTYPES[array.dtype.name], "shape": array.shape, "data_offsets": [begin, end]}
        data.append(array.astype(array.dtype.newbyteorder("<"), copy=False).reshape(-1).view(np.uint8).data)
    text = _json(header).encode()
    text += b" " * (-len(text) % 8)  # numbers begin at a multiple of their width
    return [len(text).to_bytes(8, "little"), text, *data]


def load_tensors(path: str | os.PathLike[str], *, kind: str) -> tuple[dict[str, npt.NDArray[Any]], dict[str, Any]]:
    """Read a model file strictly.

    Parameters
    ----------
    path : path
    kind : str
        The kind given to `save_tensors`.

    Returns
    -------
    tensors : dict of str to ndarray
        Writable arrays that own their memory.
    meta : dict
        As saved.

    Raises
    ------
    FileNotFoundError
        There is no such file.
    ModelFileError
        The file is damaged, is not a model file of narrows, is of another kind or of a newer format.
    """
    shown = os.fspath(path)
    try:
        content = Path(path).read_bytes()
    except FileNotFoundError:
        missing = FileNotFoundError(f"{shown}: no such model file")
        missing.errno = errno.ENOENT
        raise missing from None
    except IsADirectoryError:
        raise ModelFileError(f"{shown}: is a folder, not a model file") from None
    envelope = _envelope(content, shown)
    number = envelope.get("format")
    if type(number) is not int or number < 1:
        raise ModelFileError(f"{shown}: damaged: format number {_short(number)}")
    if number > FORMAT:
        raise ModelFileError(
            f"{shown}: format {_short(number)}, written by narrows {_short(envelope.get('version'))}, is "
            f"newer than this narrows {__version__}, which reads format {FORMAT}: upgrade narrows"
        )
    if envelope.get("kind") != kind:
        raise ModelFileError(f"{shown}: holds a {_short(envelope.get('kind'))}, not a {kind!r}")
    tensors = _tensors(content, shown)
    claimed = envelope.pop("sha256", None)
    try:
        actual = _digest(envelope, tensors)
        meta = _decode(envelope.get("meta"))
    except (ValueError, TypeError, RecursionError) as error:
        raise ModelFileError(f"{shown}: damaged: unreadable settings ({_short(error)})") from error
    if claimed != actual or not isinstance(meta, dict):
        raise ModelFileError(f"{shown}: damaged: the content does not match its checksum")
    return tensors, meta


def written_by(path: str | os.PathLike[str]) -> str:
    """The version of narrows that wrote a model file, which `load_tensors` has accepted."""
    return str(_envelope(Path(path).read_bytes(), os.fspath(path)).get("version"))


def _envelope(content: bytes, shown: str) -> dict[str, Any]:
    """The JSON object of narrows in the safetensors header. The header's size is checked before it is parsed."""
    if len(content) < 8:
        raise ModelFileError(f"{shown}: damaged or not a model file: {len(content)} bytes long")
    size = int.from_bytes(content[:8], "little")
    if size > min(_HEADER_LIMIT, len(content) - 8):
        raise ModelFileError(f"{shown}: damaged or not a model file: its header is cut off or of another format")
    try:
        header = json.loads(content[8 : 8 + size], parse_constant=_refuse)
        text = header["__metadata__"]["narrows"]
    except (KeyError, TypeError):
        raise ModelFileError(f"{shown}: not a model file of narrows (safetensors of another program?)") from None
    except (ValueError, RecursionError):
        raise ModelFileError(f"{shown}: damaged or not a model file: its header is not JSON") from None
    try:
        envelope = json.loads(text, parse_constant=_refuse)
    except (ValueError, TypeError, RecursionError):
        envelope = None
    if not isinstance(envelope, dict):
        raise ModelFileError(f"{shown}: damaged: the settings are not JSON")
    return envelope


def _tensors(content: bytes, shown: str) -> dict[str, npt.NDArray[Any]]:
    with importing:
        from safetensors.numpy import load

    try:
        views = load(content)
        # One after the other, so that only the tensors not yet copied are in memory twice.
        return {name: np.array(views.pop(name), order="C", copy=True) for name in list(views)}
    except MemoryError:
        raise
    except Exception as error:  # hostile bytes may raise anything in the parser
        raise ModelFileError(f"{shown}: damaged: {_short(error)}") from error


def _digest(envelope: Mapping[str, Any], arrays: Mapping[str, npt.NDArray[Any]]) -> str:
    digest = hashlib.sha256(_json(envelope).encode())
    for name in sorted(arrays):
        array = arrays[name]
        digest.update(f"\n{json.dumps(name)} {array.dtype.name} {array.shape}\n".encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _json(value: object) -> str:
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


def _encode(value: Any, place: str) -> Any:
    """`value` in strict JSON types."""
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {_FLOAT: str(value)}
    if isinstance(value, tuple):
        return {_TUPLE: [_encode(item, f"{place}[{i}]") for i, item in enumerate(value)]}
    if isinstance(value, list):
        return [_encode(item, f"{place}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str) or key in (_FLOAT, _TUPLE):
                raise TypeError(f"{place}: {key!r} cannot be a key in a model file")
        return {key: _encode(item, f"{place}.{key}") for key, item in value.items()}
    raise TypeError(f"{place} is a {type(value).__name__}, which a model file cannot hold")


def _decode(value: Any) -> Any:
    if isinstance(value, list):
        return [_decode(item) for item in value]
    if isinstance(value, dict):
        if value.keys() == {_FLOAT}:
            return {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}.get(value[_FLOAT])
        if value.keys() == {_TUPLE}:
            return tuple(_decode(item) for item in value[_TUPLE])
        return {key: _decode(item) for key, item in value.items()}
    return value


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _short(value: object) -> str:
    text = value if isinstance(value, str) else repr(value) if not isinstance(value, Exception) else str(value)
    text = " ".join(text.split())
    return text if len(text) <= 120 else text[:117] + "..."
