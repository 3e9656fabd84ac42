"""Reading comma and tab separated tables into memory: as float32, or as float64 if that keeps more digits.

NumPy parses the table at C speed. An error names the line and column of the first bad cell or ragged line.
"""

from __future__ import annotations

import csv
import gzip
import io
from collections.abc import Generator
from pathlib import Path
from typing import IO, NoReturn, cast

import numpy as np

from ..errors import DataError
from ..rows.arrays import narrowed
from .formats import Format, in_memory
from .source import Source

_MISSING = frozenset(["", "na", "n/a", "null", "none", "?", "-", "."])


def open_table(path: Path, layer: str | None, genes_by_cells: bool) -> Source:
    """Read .csv or .tsv.

    The first line is a header in four cases: a cell after the first is neither a number nor a sign for a missing value;
    its first cell is empty; it is one cell shorter than the next line, as R writes it; or it reads ``name,0,1,2,...``,
    as pandas writes unnamed columns. The first column names the rows if its header is empty or missing, or if its first
    value is not a number.
    """
    separator = "\t" if path.name.lower().removesuffix(".gz").endswith(".tsv") else ","
    rows = _rows(path, separator)
    first, second = next(rows, (0, [])), next(rows, (0, []))
    rows.close()
    if not first[1]:
        raise DataError(f"{path}: empty: the file has no lines")
    header, named = _layout(first[1], second[1])
    if header is not None and not second[1]:
        raise DataError(f"{path}: empty: it has a header but no rows")
    n_cells = len(second[1] if header is not None else first[1])
    if header is not None and len(header) not in (n_cells, n_cells - named):
        complain(path, second[0], f"{n_cells} cells under a header of {len(header)} cells")
    names: list[str] = []

    def keep(name: str) -> float:
        names.append(name.strip())
        return 0.0

    try:
        table = np.loadtxt(
            path,
            dtype=np.float64,
            delimiter=separator,
            quotechar='"',
            comments=None,
            skiprows=first[0] if header is not None else 0,
            converters={0: keep} if named else None,
            encoding="utf-8-sig",
            ndmin=2,
        )
    except ValueError as error:
        _diagnose(path, separator, header is not None, named, n_cells)
        raise DataError(f"{path}: {error}") from error
    columns = header[-(n_cells - named) :] if header is not None and n_cells > named else None
    numbers = narrowed(table[:, named:])
    if named and not genes_by_cells:  # `in_memory` makes a transposed table contiguous
        numbers = np.ascontiguousarray(numbers)
    return in_memory(path, numbers, genes_by_cells, names or None, columns, holds_floats=False)


def _rows(path: Path, separator: str) -> Generator[tuple[int, list[str]], None, None]:
    """The cells of every line that is not blank, with its (last) line number in the file."""
    with text_stream(path) as stream:
        reader = csv.reader(stream, delimiter=separator)
        for row in reader:
            if any(cell.strip() for cell in row) or len(row) > 1:
                yield reader.line_num, row


def _layout(first: list[str], second: list[str]) -> tuple[list[str] | None, int]:
    """The header if `first` is one, else None; and 1 if the first column holds names, else 0."""
    head = [cell.strip() for cell in first]
    # A column of row names has no header of its own: pandas leaves the cell empty, R leaves it out.
    text = [not _is_datum(cell) for cell in head]
    short = len(second) == len(head) + 1 and (any(text) or not _is_datum(second[0].strip()))
    unnamed = short or (head[0] == "" and len(head) > 1)
    numbered = text[0] and head[1:] in ([str(i + base) for i in range(len(head) - 1)] for base in (0, 1))
    if not (unnamed or numbered or any(text[1:]) or (len(head) == 1 and text[0])):
        return None, int(text[0])
    return head, int(unnamed or (bool(second) and not _is_datum(second[0].strip())))


def _is_datum(cell: str) -> bool:
    if cell.lower() in _MISSING:
        return True
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _diagnose(path: Path, separator: str, header: bool, named: int, n_cells: int) -> None:
    """Read the table again, slowly, and raise an error with the line and column of the first fault."""
    columns: list[str] = []
    for number, (line, row) in enumerate(_rows(path, separator)):
        if number == 0 and header:
            columns = [""] * (n_cells - len(row)) + row
            continue
        if len(row) != n_cells:
            complain(path, line, f"{len(row)} cells where the lines before have {n_cells}")
        for j, cell in enumerate(row[named:], start=named):
            try:
                float(cell.replace("_", "x"))  # Python accepts 1_000, a table does not
            except ValueError:
                name = f" ({columns[j].strip()})" if columns else ""
                what = "a missing value" if cell.strip().lower() in _MISSING else "not a number"
                complain(path, line, f"column {j + 1}{name}: {cell.strip()[:40]!r} is {what}")


def complain(path: Path, line: int, what: str) -> NoReturn:
    raise DataError(f"{path}: line {line}, {what}")


def _binary(path: Path) -> IO[bytes]:
    return cast(IO[bytes], gzip.open(path)) if path.name.endswith(".gz") else path.open("rb")


def text_stream(path: Path) -> IO[str]:
    return io.TextIOWrapper(_binary(path), encoding="utf-8-sig", newline="")


FORMATS = (
    Format(".csv", open_table, (".csv",), gzipped=True),
    Format(".tsv", open_table, (".tsv",), gzipped=True),
)
