"""Text files as they come: compressed or not, in UTF-8, UTF-16 or Latin-1, with any line ends.

- The first bytes decide about compression and encoding; the extension does not.
- Bytes that are not UTF-8 are read as Latin-1, and a warning says so.
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import importlib
import io
import logging
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, NoReturn, TypeVar, cast

import numpy as np
import numpy.typing as npt

from .._extras import require
from ..errors import DataError

__all__ = ["COMPRESSED", "TextFile", "complain", "decoded", "stem_and_suffix"]

log = logging.getLogger("narrows")

T = TypeVar("T")

COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
"""Suffixes of compressed text."""

_BOMS = (  # UTF-32 first: its mark starts with that of UTF-16
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
    (codecs.BOM_UTF8, "utf-8-sig"),
)
_MOST_PER_BYTE = 1100  # no compressor of these shrinks text of numbers more than this


def _zstandard(path: Path) -> IO[bytes]:
    try:
        module = importlib.import_module("compression.zstd")  # Python 3.14
    except ImportError:
        pyarrow = require("pyarrow", "frames", "reading .zst files")
        return cast(IO[bytes], pyarrow.input_stream(str(path), compression="zstd"))
    return cast(IO[bytes], module.open(path))


_OPENERS: dict[bytes, Callable[[Path], Any]] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ\x00": lzma.open,
    b"\x28\xb5\x2f\xfd": _zstandard,
}
"""How a file is opened, by its first bytes."""


def stem_and_suffix(name: str) -> tuple[str, str, str]:
    """``Counts.CSV.gz`` as ``("Counts", ".csv", ".gz")``: the name, its suffix and that of the compression."""
    packed = next((suffix for suffix in COMPRESSED if name.lower().endswith(suffix)), "")
    stem, dot, suffix = name.removesuffix(name[len(name) - len(packed) :]).rpartition(".")
    return (stem, f".{suffix.lower()}", packed) if dot else (suffix, "", packed)


class TextFile:
    """A text file that may be compressed.

    Parameters
    ----------
    path : Path

    Attributes
    ----------
    encoding : str
        As its first bytes say; Latin-1 after `read` met bytes that are not UTF-8.

    Raises
    ------
    DataError
        The file is binary.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as stream:
            head = stream.read(8)
        self._opener = next((opener for magic, opener in _OPENERS.items() if head.startswith(magic)), None)
        with self._binary() as stream:
            start = stream.read(4096)
        if start.startswith(b"PK\x03\x04"):
            raise DataError(f"{path}: a zip archive or an Excel sheet, not text; unpack it, or save it as .csv")
        self.encoding = next((name for mark, name in _BOMS if start.startswith(mark)), "")
        if not self.encoding:
            # In UTF-16 every other byte of plain text is zero.
            even, odd = start[::2].count(0), start[1::2].count(0)
            if max(even, odd) > 0.4 * (len(start) // 2) and min(even, odd) <= 0.01 * len(start):
                self.encoding = "utf-16-be" if even > odd else "utf-16-le"
            elif even or odd:
                raise DataError(f"{path}: a binary file, not text as its extension says")
            else:
                self.encoding = "utf-8"

    def _binary(self) -> IO[bytes]:
        return cast(IO[bytes], self.path.open("rb") if self._opener is None else self._opener(self.path))

    def open(self) -> IO[str]:
        """The text, with every line end as a newline."""
        return io.TextIOWrapper(self._binary(), encoding=self.encoding)

    def read(self, parse: Callable[[], T]) -> T:
        """The result of `parse`, which opens this file; once more as Latin-1 if it is not UTF-8."""
        try:
            return parse()
        except UnicodeDecodeError as error:
            if not self.encoding.startswith("utf-8"):
                raise DataError(f"{self.path}: damaged: not {self.encoding.upper()} ({error.reason})") from error
        log.warning("%s: not UTF-8: read as Latin-1; save it as UTF-8 if names look wrong", self.path)
        self.encoding = "latin-1"
        return parse()

    def most_bytes(self) -> int:
        """An upper bound of the length of the text in bytes."""
        return self.path.stat().st_size * (1 if self._opener is None else _MOST_PER_BYTE)


def complain(path: Path, line: int, what: str) -> NoReturn:
    raise DataError(f"{path}: line {line}, {what}")


def decoded(values: npt.ArrayLike, where: str) -> npt.NDArray[Any]:
    """Names or labels as an array; bytes become text, as UTF-8 or else, with a warning, as Latin-1."""
    array = np.asarray(values)
    if array.dtype.kind not in "SO":
        return array
    items = array.ravel().tolist()
    try:
        items = [item.decode() if isinstance(item, bytes) else item for item in items]
    except UnicodeDecodeError:
        log.warning("%s: bytes that are not UTF-8: read as Latin-1", where)
        items = [item.decode("latin-1") if isinstance(item, bytes) else item for item in items]
    if array.dtype.kind == "S":
        return np.asarray(items, dtype=str).reshape(array.shape)
    result = np.empty(len(items), dtype=object)
    result[:] = items
    return result.reshape(array.shape)
