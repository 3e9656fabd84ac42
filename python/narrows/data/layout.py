"""The layout of a text table, from its first lines: the separator, the header, which columns are text.

- One odd cell never changes the role of a column or of the first line: most cells decide.
- What stays open is an error or a warning that names the flag.
"""

from __future__ import annotations

import csv
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

__all__ = ["MISSING", "ROW_LABEL", "Dialect", "Header", "find_dialect", "find_header", "is_text", "kind_of", "rises"]

MISSING = frozenset(["", "na", "n/a", "nan", "<na>", "null", "none", "?", "-", "."])
"""Cells without a value, in lower case."""

ROW_LABEL = re.compile(
    r"(unnamed\d*|index|key|row|rows|rownames?|obs|time|times|timepoint|date|wavelengths?|wavenumbers?|spectr(um|a)|"
    r"wells?|plate|spots?|subjects?|patients?|donors?|probes?|accession|labels?|"
    r"(.*(id|uid|name|symbol|barcode|sample|cell|gene|feature)s?))"
)
"""Headers, in lower case letters and digits, of a column that tells rows apart."""

_LETTER = re.compile(r"[^\W\d_]")

_ODD = re.compile(
    r"[+-]?\d{1,3}(?:[,'_ ]\d{3})+(?:\.\d+)?"  # thousands
    r"|[+-]?\d+,\d+"  # a decimal comma
    r"|0[xX][0-9a-fA-F]+"
    r"|[+-]?[$€£]\s?\d[\d.,]*|[+-]?\d[\d.,]*\s?[%$€£]"
)
"""Numbers in a notation that is not read."""


@dataclass(frozen=True)
class Dialect:
    """How lines become cells.

    Attributes
    ----------
    separator : str
        A blank stands for any run of blanks and tabs.
    decimal : str
        ``"."`` or ``","``.
    """

    separator: str
    decimal: str = "."

    def rows(self, lines: Iterable[str]) -> Iterator[tuple[int, list[str]]]:
        """The cells of every line that is not blank, with its (last) line number."""
        if self.separator == " ":
            lines = (line.strip().replace("\t", " ") for line in lines)
        reader = csv.reader(lines, delimiter=self.separator, skipinitialspace=self.separator == " ")
        for row in reader:
            if len(row) > 1 or (row and row[0].strip()):
                yield reader.line_num, row

    def number(self, cell: str) -> float:
        """The number in a cell; ``ValueError`` if it holds none."""
        if "_" in cell or (self.decimal == "," and "." in cell):
            raise ValueError(cell)
        return float(cell.replace(",", ".") if self.decimal == "," else cell)

    def __str__(self) -> str:
        name = {"\t": "tab", " ": "blanks"}.get(self.separator, repr(self.separator))
        return name + (" (decimal comma)" if self.decimal == "," else "")


def kind_of(cell: str, dialect: Dialect) -> str:
    """``missing``, ``number``, ``odd`` (a number in a notation that is not read) or ``text``."""
    cell = cell.strip()
    if cell.lower() in MISSING:
        return "missing"
    try:
        dialect.number(cell)
    except ValueError:
        return "odd" if _ODD.fullmatch(cell) else "text"
    return "number"


def is_text(kinds: Counter[str]) -> bool:
    """Whether a column with these kinds of cells is text: more cells are text than look like numbers."""
    return kinds["text"] > kinds["number"] + kinds["odd"]


def columns_of(rows: Sequence[Sequence[str]], n_columns: int, dialect: Dialect) -> list[Counter[str]]:
    """The kinds of the cells of each column."""
    return [Counter(kind_of(row[j], dialect) for row in rows if j < len(row)) for j in range(n_columns)]


# --- the separator


def find_dialect(lines: Sequence[str], usual: str) -> Dialect:
    """The separator of some lines, where `usual` is that of the extension (empty if it has none).

    A separator fits if it cuts all lines into equally many cells; the first line may have one cell less. Among those
    that fit, the one wins that makes the most cells numbers, then the usual one.
    """
    best, score = Dialect(usual or ","), (-1, 0.0, 0)
    for separator in dict.fromkeys((usual or ",", ",", "\t", ";", "|", " ")):
        for decimal in "." if separator == "," else ".,":
            dialect = Dialect(separator, decimal)
            try:
                rows = [row for _, row in dialect.rows(lines)]
            except csv.Error:
                continue
            if not rows or (separator == " " and score[0] > 0):
                continue
            found = _fit(rows, dialect, usual)
            if found > score:
                best, score = dialect, found
    return best


def _fit(rows: list[list[str]], dialect: Dialect, usual: str) -> tuple[int, float, int]:
    n_cells = len(rows[-1])
    even = all(len(row) == n_cells for row in rows[1:])
    if n_cells < 2 or not even or len(rows[0]) not in (n_cells, n_cells - 1):
        # The separator of the extension may have one broken line. It is not given up for that.
        common, times = Counter(map(len, rows)).most_common(1)[0]
        most = times / len(rows) if common > 1 and times > len(rows) / 2 else 0.0
        return (1 if most and dialect.separator == usual else 0), most, 0
    below = rows[1:] or rows
    kinds = Counter(kind_of(cell, dialect) for row in below for cell in row)
    if dialect.decimal == "," and not any(re.search(r"\d,\d", cell) for row in below for cell in row):
        return 0, 0.0, 0  # nothing speaks for a decimal comma
    share = (kinds["number"] + kinds["missing"]) / max(1, sum(kinds.values()))
    return (2 if len(rows[0]) == n_cells else 1), share, dialect.separator == usual


# --- the header


@dataclass(frozen=True)
class Header:
    """Whether the first line is a header, and how sure that is.

    Attributes
    ----------
    found : bool
    sure : bool
        False if another reading of the file makes sense.
    conflict : str
        Why the question stays open; empty if it does not.
    text : bool
        Whether most of its cells over columns of numbers are text: it cannot be data.
    """

    found: bool
    sure: bool = True
    conflict: str = ""
    text: bool = False


def find_header(
    first: Sequence[str], rows: Sequence[Sequence[str]], quoted: Sequence[bool], dialect: Dialect
) -> Header:
    """Whether `first`, the first line of a table, is its header; `rows` are the next lines.

    Columns that are text below prove nothing. In the others a header holds text. If it holds numbers, such as
    wavelengths or 0, 1, 2, ..., what speaks for a header is the name of the first column, and numbers that rise evenly
    while those of other lines do not. `quoted` are the cells with quotes, if only the first line has quotes
    around numbers: that marks a header.
    """
    head = [cell.strip() for cell in first]
    kinds = [
        "text" if j < len(quoted) and quoted[j] and cell else kind_of(cell, dialect) for j, cell in enumerate(head)
    ]
    if not rows:
        present = {*kinds} - {"missing"}
        return Header(present == {"text"})
    width = Counter(map(len, rows)).most_common(1)[0][0]
    below = columns_of(rows, width, dialect)
    if len(head) == width - 1:
        # R leaves out the header of the row names.
        every = len(rows) > 1 and all(len(row) == width for row in rows)
        return Header("text" in kinds or is_text(below[0]) or every)
    numeric = [j for j in range(min(len(head), width)) if not is_text(below[j])]
    if not numeric:
        return Header(True)
    label = head[0] == "" or ROW_LABEL.fullmatch(re.sub(r"[^a-z0-9]", "", head[0].lower())) is not None
    unnamed = head[0] == "" and len(head) > 1
    words = sum(kinds[j] == "text" for j in numeric)
    labels = [dialect.number(head[j]) for j in numeric if kinds[j] == "number"]
    others = [_numbers(row, numeric, dialect) for row in rows]
    if words and words >= len(labels):
        return Header(True, text=True)
    # Genes called NA, INF or 1E5 are names where all of the line looks like names, and no number below has letters.
    cells = [head[j] for j in numeric]
    named = all(map(_LETTER.search, cells)) and len({*cells}) == len(cells) > 1
    if named and not any(_LETTER.search(row[j]) for row in rows for j in numeric if j < len(row)):
        return Header(True, not all(kinds[j] == "number" and math.isfinite(dialect.number(head[j])) for j in numeric))
    counted = any(labels == [float(i + base) for i in range(len(labels))] for base in (0, 1))
    graded = _graded(labels) and sum(map(_graded, others)) <= len(others) / 2
    if words:
        if label or graded:
            return Header(True)
        if len(set(labels)) < len(labels):
            return Header(False)
        odd = next(head[j] for j in numeric if kinds[j] == "text")
        return Header(False, False, f"{odd[:40]!r} stands among numbers: a header, or data with a fault?")
    if not labels:
        return Header(unnamed and is_text(below[0]))
    if unnamed:
        numbered = [row[0].strip() for row in rows[:2]] in (["0", "1"][: len(rows)], ["1", "2"][: len(rows)])
        return Header(is_text(below[0]) or numbered or graded or counted)
    if 0 not in numeric and kinds[0] != "missing":
        if label or (counted and len(labels) > 2) or graded:
            return Header(True, label)
        return Header(False, len(set(labels)) < len(labels))
    # Numbers only. A row of data may rise too, so few numbers prove nothing.
    rising = rises(labels) and not any(rises(other) for other in others)
    if rising and len(others) > 1 and ((counted and len(labels) > 3) or len(labels) > 7):
        return Header(True, False)
    return Header(False, not (graded and rising))


def _numbers(row: Sequence[str], columns: Sequence[int], dialect: Dialect) -> list[float]:
    cells = [row[j] for j in columns if j < len(row)]
    return [dialect.number(cell) for cell in cells if kind_of(cell, dialect) == "number"]


def rises(values: Sequence[float] | Any) -> bool:
    """Whether each value is larger than the one before, or each is smaller."""
    steps = [b - a for a, b in pairwise(values)]
    return bool(steps) and (all(step > 0 for step in steps) or all(step < 0 for step in steps))


def _graded(values: Sequence[float]) -> bool:
    """Whether three or more values rise or fall like a scale: in equal steps, or many in steps of similar size."""
    if len(values) < 3 or not rises(values):
        return False
    steps = sorted(abs(b - a) for a, b in pairwise(values))
    return steps[-1] <= (1 + 1e-6 if len(values) < 6 else 4) * steps[0]
