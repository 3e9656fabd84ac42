"""Reading tables of text: commas, tabs, semicolons, bars or blanks stand between the cells.

The table is read into memory as float32, or as float64 if that keeps more digits.

NumPy parses the table at C speed. An error names the line and column of the first bad cell or ragged line.
"""

from __future__ import annotations

import contextlib
import csv
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import DataError
from ..rows.arrays import narrowed
from .columns import cells_of
from .formats import Format, in_memory
from .layout import MISSING, find_dialect, find_header, is_text, kind_of
from .roles import TAKES, Columns, Wish, describe_roles, split_columns, warn_of_row_numbers
from .source import Source
from .textfile import TextFile, complain, stem_and_suffix

log = logging.getLogger("narrows")

_SAMPLE_LINES = 60
_SAMPLE_CHARACTERS = 1 << 17
_USUAL = {".csv": ",", ".tsv": "\t", ".tab": "\t"}


def open_table(path: Path, layer: str | None, genes_by_cells: bool, **said: Any) -> Source:
    """Read .csv, .tsv, .tab or .txt.

    The first lines give the separator and say whether there is a header (`layout`). A column is text if most of its
    cells are; otherwise it is numbers, and a cell that is none is an error. The row names are the column that the
    caller names; otherwise the first column, if its header is empty or missing or if it is text.
    """
    file, wish = TextFile(path), Wish(**said)
    return file.read(lambda: _Table(file, genes_by_cells, wish).read())


class _Table:
    """One reading of a file."""

    def __init__(self, file: TextFile, genes_by_cells: bool, wish: Wish) -> None:
        self.file, self.path, self.genes_by_cells, self.wish = file, file.path, genes_by_cells, wish
        lines, whole = _first_lines(file)
        usual = _USUAL.get(stem_and_suffix(self.path.name)[1], "")
        comments, lines = _comments(lines, usual)
        self.dialect = find_dialect([line for line in lines if line.strip()], usual)
        rows = list(self.dialect.rows(lines))
        if not whole and len(rows) > 2 and sum(line.count('"') for line in lines) % 2:
            rows.pop()  # cut inside quotes
        if not rows:
            raise DataError(f"{self.path}: empty: the file has no lines")
        first, below = rows[0][1], [row for _, row in rows[1:]]
        self.header, said = self._find_header(first, below, lines)
        if self.header and not below:
            raise DataError(f"{self.path}: empty: it has a header but no rows")
        data = below if self.header else [first, *below]
        self.skip = comments + (rows[0][0] if self.header else 0)
        self.n_cells = Counter(map(len, data)).most_common(1)[0][0] if len(data) > 2 else len(data[0])
        short = self.header and len(first) == self.n_cells - 1
        if self.header and not short and len(first) != self.n_cells:
            what = f"{len(data[0])} cells under a header of {len(first)} cells{_unclosed(data[0])}"
            complain(self.path, comments + rows[1][0], what)
        names = [cell.strip() for cell in first] if self.header else [str(j) for j in range(self.n_cells)]
        self.names = ["", *names] if short else names
        kinds = [Counter(kind_of(row[j], self.dialect) for row in data if j < len(row)) for j in range(self.n_cells)]
        self.text = {j for j, found in enumerate(kinds) if is_text(found)}
        self.said = [f"comments: {comments} line(s)"] if comments else []
        self.said += (["separator: " + str(self.dialect)] if str(self.dialect) != repr(",") else []) + [said]

    def _find_header(self, first: list[str], below: list[list[str]], lines: list[str]) -> tuple[bool, str]:
        """Whether there is a header, and how the log says it."""
        found = self.wish.header
        if found is None:
            answer = find_header(first, below, self._quoted(first, below, lines), self.dialect)
            earlier = (self.wish.roles or {}).get("header")
            found = answer.found
            if earlier or (earlier is False and not answer.text):
                found = bool(earlier)
            elif answer.conflict:
                raise DataError(f"{self.path}: line 1, {answer.conflict} say header=True or header=False")
            elif not answer.sure:
                log.warning(
                    "%s: line 1 is read as %s; if that is wrong, give header=%s",
                    self.path, "the header" if found else "data, not as a header", not found,
                )  # fmt: skip
        return found, "header: line 1" if found else "no header"

    def _quoted(self, first: list[str], below: list[list[str]], lines: list[str]) -> list[bool]:
        """Which cells of the first line have quotes; empty if the numbers of other lines have quotes too."""
        filled = [line for line in lines if line.strip()]
        quoted = [cell.startswith('"') for cell in filled[0].strip().split(self.dialect.separator)]
        if len(quoted) != len(first) or not any(quoted):
            return []
        numbers = [cell for row in below for cell in row if kind_of(cell, self.dialect) == "number"]
        text = "".join(filled[1:])
        return [] if any(f'"{cell}"' in text for cell in numbers[:200]) else quoted

    def _columns(self) -> Columns:
        unnamed = self.header and self.names[0] == "" and self.n_cells > 1
        index = 0 if unnamed or (0 in self.text and self.n_cells > 1) else None
        return split_columns(self.path, self.names, self.header, self.wish, self.text, index)

    def _check_text(self, columns: Columns, cells: dict[int, list[str]]) -> None:
        """Raise if a column that began like text is not text as a whole, unless the caller or its header says so."""
        known = [*(self.wish.roles or {}).get("text_columns", ()), (self.wish.roles or {}).get("index_column")]
        for j in sorted(self.text & cells.keys()):
            given = j == columns.index and (self.wish.index_column is not None or self.names[j] == "")
            if given or columns.key(j) in known:
                continue
            if not is_text(Counter(kind_of(cell, self.dialect) for cell in cells[j])):
                self._fault(columns, {j})

    def read(self) -> Source:
        columns = self._columns()
        try:
            table, cells = self._parse(columns)
        except (UnicodeDecodeError, DataError):
            raise
        except ValueError as error:
            self._recount(columns)
            changed = self._columns()
            if changed == columns:
                raise DataError(f"{self.path}: {error}") from error
            columns = changed
            table, cells = self._parse(columns)
        self._check_text(columns, cells)
        numbers = columns.numbers
        if numbers != list(range(table.shape[1])):
            first, last = numbers[0], numbers[-1]
            table = table[:, first : last + 1] if len(numbers) == last + 1 - first else table[:, numbers]
        self._check_range(columns, table)
        table = narrowed(table)
        if not self.genes_by_cells:  # `in_memory` makes a transposed table contiguous
            table = np.ascontiguousarray(table)
        if not self.genes_by_cells:
            warn_of_row_numbers(self.path, columns, table[:, 0])
        log.info("%s: %s", self.path, describe_roles(self.path, columns, self.genes_by_cells, *self.said))
        index = None if columns.index is None else cells[columns.index]
        source = in_memory(
            self.path,
            table,
            self.genes_by_cells,
            index,
            [self.names[j] for j in numbers] if self.header else None,
            holds_floats=False,
            obs={} if self.genes_by_cells else {str(columns.key(j)): cells_of(cells[j]) for j in sorted(columns.text)},
        )
        source.roles = columns.stored(self.header)
        return source

    def _lines(self) -> Iterator[str]:
        """The lines of the data that are not blank."""
        blank = "\n\r " + ("" if self.dialect.separator == "\t" else "\t")
        with self.file.open() as stream:
            for line in islice(stream, self.skip, None):
                if line.strip(blank):
                    yield line

    def _parse(self, columns: Columns) -> tuple[npt.NDArray[Any], dict[int, list[str]]]:
        """The numbers of all columns, zero in place of text, and the cells of the index and of text columns."""
        cells: dict[int, list[str]] = {j: [] for j in (*columns.text, columns.index) if j is not None}
        last: dict[int, str] = {}

        def keeper(j: int) -> Callable[[str], float]:
            kept = cells.get(j)

            def keep(cell: str) -> float:
                last[j] = text = cell.strip()
                if kept is not None:
                    kept.append(text)
                return 0.0

            return keep

        converters: dict[int | str, Callable[[str], float]] = {j: keeper(j) for j in {*cells, *columns.dropped}}
        if self.dialect.decimal == ",":
            converters |= {j: self.dialect.number for j in columns.numbers}
        table = np.loadtxt(
            self._lines(),
            dtype=np.float64,
            delimiter=None if self.dialect.separator == " " else self.dialect.separator,
            quotechar='"',
            comments=None,
            converters=converters or None,
            ndmin=2,
        )
        if table.shape[1] != self.n_cells:
            raise ValueError(f"{table.shape[1]} cells in the first line of data, {self.n_cells} in the others")
        if any("\n" in cell for cell in last.values()):
            self._check_end()
        return table, cells

    def _check_end(self) -> None:
        """Raise if the text ends inside quotes. The last cell would then hold all lines from the quote on."""
        before = last = 0
        with self.file.open() as stream, contextlib.suppress(csv.Error):  # of a cell that is too long
            for line, row in self.dialect.rows(chain(islice(stream, self.skip, None), ["end"])):
                if row == ["end"]:
                    return
                before, last = last, line
            last = before
        complain(self.path, self.skip + last + 1, "a quote is not closed")

    def _rows(self) -> Iterator[tuple[int, list[str]]]:
        """The rows of the data with their line numbers. A row of another width is an error."""
        with self.file.open() as stream:
            for line, row in self.dialect.rows(islice(stream, self.skip, None)):
                if len(row) != self.n_cells:
                    what = f"{len(row)} cells where the lines before have {self.n_cells}{_unclosed(row)}"
                    complain(self.path, self.skip + line, what)
                yield self.skip + line, row

    def _recount(self, columns: Columns) -> None:
        """Count the kinds of all cells of number columns. Most cells decide what a column is; the rest are faults."""
        kinds: dict[int, Counter[str]] = {j: Counter() for j in columns.numbers}
        for _, row in self._rows():
            for j, counted in kinds.items():
                counted[kind_of(row[j], self.dialect)] += 1
        text = {j for j, counted in kinds.items() if is_text(counted)}
        faulty = {j for j, counted in kinds.items() if j not in text and counted.total() > counted["number"]}
        if faulty or not text:
            self._fault(columns, faulty or set(columns.numbers))
        self.text = self.text | text

    def _fault(self, columns: Columns, where: set[int]) -> None:
        """Raise an error with the line and column of the first cell of some columns that is not a number."""
        for number, (line, row) in enumerate(self._rows()):
            for j in sorted(where):
                cell = row[j].strip()
                kind = kind_of(cell, self.dialect)
                if kind != "number":
                    what = "a missing value" if cell.lower() in MISSING else "not a number"
                    key = columns.key(j)
                    way = f"correct it, or leave the column out with drop_columns=[{key!r}]"
                    if j == 0 and kind != "missing":
                        way += f", or take it as row names with index_column={key!r}"
                    if number == 0 and not self.header and self.wish.header is None:
                        way += "; if this line is the header, give header=True"
                    complain(self.path, line, f"{columns.label(j)}: {cell[:40]!r} is {what}; {way}")

    def _check_range(self, columns: Columns, table: npt.NDArray[Any]) -> None:
        """Raise for the first number that is too large for float64."""
        with np.errstate(over="ignore", invalid="ignore"):
            if np.isfinite(table.sum()):
                return
        bad = {columns.numbers[j] for j in np.flatnonzero(np.isinf(table).any(axis=0))}
        if not bad:
            return
        for line, row in self._rows():
            for j in sorted(bad):
                if np.isinf(self.dialect.number(row[j])) and "inf" not in row[j].lower():
                    complain(
                        self.path, line, f"{columns.label(j)}: {row[j].strip()[:40]} is too large for float64; "
                        f"scale the data, or leave the column out with drop_columns=[{columns.key(j)!r}]",
                    )  # fmt: skip


def _unclosed(row: list[str]) -> str:
    return "; a quote is not closed" if any("\n" in cell for cell in row) else ""


def _comments(lines: list[str], usual: str) -> tuple[int, list[str]]:
    """How many lines at the start are comments, after a ``#``, and the lines after them.

    The last one may be the header: as it is (``#id,a,b``), or after ``# `` as NumPy writes it.
    """
    n = next((i for i, line in enumerate(lines) if not line.startswith("#")), len(lines))
    rest = [line for line in lines[n:] if line.strip()]
    if n == 0 or not rest:
        return 0, lines
    dialect = find_dialect(rest, usual)
    width = Counter(len(row) for _, row in dialect.rows(rest)).most_common(1)[0][0]
    for i, line in enumerate(lines[:n]):
        cells = sum(len(row) for _, row in dialect.rows([line]))
        # R leaves out the header of the row names.
        if not line.startswith("# ") and (cells == width or 1 < cells == width - 1):
            return i, lines[i:]
    head = lines[n - 1].removeprefix("# ")
    if sum(len(row) for _, row in dialect.rows([head])) == width:
        return n - 1, [head, *lines[n:]]
    return n, lines[n:]


def _first_lines(file: TextFile) -> tuple[list[str], bool]:
    """The first lines of a file, and whether they are all."""
    lines, size, filled = [], 0, 0
    with file.open() as stream:
        for line in stream:
            lines.append(line)
            size, filled = size + len(line), filled + bool(line.strip())
            if filled > 2 and (filled >= _SAMPLE_LINES or size > _SAMPLE_CHARACTERS):
                return lines, False
    return lines, True


def _obs_of_table(path: Path, **said: Any) -> Mapping[str, Any]:
    """The columns of text."""
    return open_table(path, None, False, **said).obs


FORMATS = tuple(
    Format(suffix, open_table, (suffix,), compressed=True, read_obs=_obs_of_table, takes=("header", *TAKES))
    for suffix in (".csv", ".tsv", ".tab", ".txt")
)
