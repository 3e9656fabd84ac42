"""Reading Matrix Market files, and 10x folders as cells x genes.

NumPy parses the entries at C speed, and they stay sparse. An error names the first bad line, index or count of entries.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import DataError
from ..rows.arrays import narrowed
from .formats import Format, in_memory, no_such_layer
from .source import ArraySource, Source
from .text import complain, text_stream

log = logging.getLogger("narrows")

GENE_EXPRESSION = "Gene Expression"


def open_mtx(path: Path, layer: str | None, genes_by_cells: bool) -> Source:
    """Read a Matrix Market file."""
    return in_memory(path, _read_mtx(path), genes_by_cells, holds_floats=False)


def find_mtx(folder: Path) -> Path | None:
    return next((folder / name for name in ("matrix.mtx.gz", "matrix.mtx") if (folder / name).is_file()), None)


def open_10x_folder(path: Path, layer: str | None, genes_by_cells: bool) -> Source:
    """Read matrix.mtx, features.tsv (or genes.tsv) and barcodes.tsv; the matrix is genes x cells and is transposed."""
    matrix_path = find_mtx(path)
    assert matrix_path is not None
    features = _tsv(path, "features.tsv", "genes.tsv")
    barcodes = np.asarray([row[0] for row in _tsv(path, "barcodes.tsv")])
    X = _read_mtx(matrix_path).T.tocsr()
    if X.shape != (len(barcodes), len(features)):
        raise DataError(
            f"{path}: matrix.mtx is {X.shape[1]} x {X.shape[0]}, but there are {len(features)} features and "
            f"{len(barcodes)} barcodes: the files do not belong together"
        )
    keep = select_features(path, [row[2] if len(row) > 2 else GENE_EXPRESSION for row in features], layer)
    symbols = unique_names([row[1] if len(row) > 1 else row[0] for row in features])
    return ArraySource(
        X if keep is None else X[:, keep],
        obs_names=barcodes,
        var_names=symbols if keep is None else symbols[keep],
        path=path,
        holds_floats=False,
    )


def select_features(path: Path, types: list[str], layer: str | None) -> npt.NDArray[np.intp] | None:
    """Columns of the feature type `layer`; by default the genes if there are several types. None means all."""
    kinds = list(dict.fromkeys(types))
    if layer is None and (len(kinds) < 2 or GENE_EXPRESSION not in kinds):
        return None
    wanted = GENE_EXPRESSION if layer is None else layer
    if wanted not in kinds:
        no_such_layer(path, layer, kinds, "feature type")
    columns = np.flatnonzero(np.asarray(types) == wanted)
    if len(columns) < len(types):
        log.info("%s: reading the %d features of type %r of %d", path, len(columns), wanted, len(types))
    return columns


def unique_names(names: list[str]) -> npt.NDArray[np.str_]:
    """The names, with -1, -2, ... appended to repeats, as AnnData does it."""
    taken, used = set(names), dict.fromkeys(names, -1)
    result = []
    for name in names:
        used[name] += 1
        candidate = name
        while used[name] and (candidate := f"{name}-{used[name]}") in taken:
            used[name] += 1
        taken.add(candidate)
        result.append(candidate)
    return np.asarray(result)


def _tsv(folder: Path, *stems: str) -> list[list[str]]:
    for stem in stems:
        for file in (folder / f"{stem}.gz", folder / stem):
            if file.is_file():
                with text_stream(file) as stream:
                    return [line.rstrip("\r\n").split("\t") for line in stream]
    raise DataError(f"{folder}: a 10x folder needs {' or '.join(stems)} (or .gz) beside matrix.mtx")


def _read_mtx(path: Path) -> Any:
    """A Matrix Market file as CSR for the coordinate layout, as an array for the dense one.

    Values are float32, or float64 if that keeps more digits.

    NumPy parses it: SciPy's parser aborts the process on a damaged gzip file and on some damaged numbers.
    """
    with text_stream(path) as stream:
        words = stream.readline().lower().split()
        if len(words) != 5 or words[:2] != ["%%matrixmarket", "matrix"]:
            raise DataError(f"{path}: line 1 is not the header of a Matrix Market matrix")
        layout, field, symmetry = words[2:]
        coordinate = layout == "coordinate"
        readable = ("coordinate", "array") if symmetry == "general" else ("coordinate",)
        if (
            layout not in readable
            or field not in ("real", "double", "integer", "unsigned-integer", "pattern")
            or symmetry not in ("general", "symmetric", "skew-symmetric")
            or (field == "pattern" and not coordinate)
        ):
            raise DataError(f"{path}: Matrix Market files of the kind '{layout} {field} {symmetry}' are not supported")
        skip, sizes = 1, "%"
        while sizes.startswith("%") or not sizes.strip():
            skip, sizes = skip + 1, stream.readline()
            if not sizes:
                raise DataError(f"{path}: damaged: it ends before the line with the matrix sizes")
        numbers = sizes.split()
        if len(numbers) != 2 + coordinate or not all(number.isdecimal() for number in numbers):
            raise DataError(f"{path}: line {skip}: {sizes.strip()[:40]!r} is not a line of matrix sizes")
        n_rows, n_columns = int(numbers[0]), int(numbers[1])
        expected = int(numbers[2]) if coordinate else n_rows * n_columns
        has_entries = any(line.strip() for line in stream)  # stops at the first
    index = np.int32 if max(n_rows, n_columns) <= np.iinfo(np.int32).max else np.int64
    columns: list[tuple[str, Any]] = [("row", index), ("column", index)] if coordinate else []
    if field != "pattern":
        columns.append(("value", np.float64))
    dtype = np.dtype(columns)
    entries = np.empty(0, dtype)
    if has_entries:
        try:
            entries = np.loadtxt(path, dtype=dtype, comments=None, skiprows=skip, encoding="utf-8-sig", ndmin=1)
        except ValueError as error:
            _diagnose_mtx(path, skip, dtype)
            raise DataError(f"{path}: {error}") from error
    if len(entries) != expected:
        raise DataError(f"{path}: damaged: it has {len(entries)} entries, its size line says {expected}")
    if not coordinate:
        return np.ascontiguousarray(narrowed(entries["value"]).reshape(n_columns, n_rows).T)
    return _coordinates(path, entries, (n_rows, n_columns), symmetry)


def _coordinates(path: Path, entries: npt.NDArray[Any], shape: tuple[int, int], symmetry: str) -> Any:
    """CSR from entries with row and column numbers from 1. A symmetric matrix lists one triangle."""
    from scipy import sparse

    rows, columns = entries["row"] - 1, entries["column"] - 1
    bad = (rows < 0) | (rows >= shape[0]) | (columns < 0) | (columns >= shape[1])
    if bad.any():
        at = int(np.argmax(bad))
        raise DataError(
            f"{path}: entry {at + 1} is at ({entries['row'][at]}, {entries['column'][at]}), "
            f"outside the matrix of {shape[0]} x {shape[1]}"
        )
    has_values = "value" in (entries.dtype.names or ())
    values = np.ascontiguousarray(narrowed(entries["value"])) if has_values else np.ones(len(entries), np.float32)
    if symmetry != "general":
        if shape[0] != shape[1]:
            raise DataError(f"{path}: damaged: a {symmetry} matrix cannot be {shape[0]} x {shape[1]}")
        off = rows != columns
        sign = -1 if symmetry.startswith("skew") else 1
        values = np.concatenate([values, sign * values[off]])
        rows, columns = np.concatenate([rows, columns[off]]), np.concatenate([columns, rows[off]])
    return sparse.coo_array((values, (rows, columns)), shape=shape).tocsr()


def _diagnose_mtx(path: Path, skip: int, dtype: np.dtype[Any]) -> None:
    """Read the entries again, slowly, and raise an error with the line number of the first bad one."""
    with text_stream(path) as stream:
        for line, text in enumerate(stream, start=1):
            cells = text.split()
            if line <= skip or not cells:
                continue
            try:
                if len(cells) != len(dtype.names or ()):
                    raise ValueError
                np.loadtxt([text], dtype=dtype, comments=None)
            except ValueError:
                complain(path, line, f"{text.strip()[:40]!r} is not an entry of this matrix")


FORMATS = (
    Format(
        "10x folder",
        open_10x_folder,
        is_folder=lambda path: find_mtx(path) is not None,
        contents="matrix.mtx, features.tsv, barcodes.tsv",
        layer="feature type",
    ),
    Format(".mtx", open_mtx, (".mtx",), gzipped=True),
)
