"""Reading Matrix Market files, and 10x folders as cells x genes.

NumPy parses the entries at C speed, and they stay sparse. An error names the first bad line, index or count of entries.
"""

from __future__ import annotations

import csv
import logging
import re
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import DataError
from ..rows.arrays import narrowed
from .formats import Format, in_memory, no_such_layer
from .layout import ROW_LABEL
from .source import ArraySource, Source
from .textfile import TextFile, complain, stem_and_suffix

log = logging.getLogger("narrows")

GENE_EXPRESSION = "Gene Expression"

_PART = re.compile(r"(|.*[_.-])(matrix(?=\.mtx)|barcodes|features|genes)\.(?:mtx|tsv|csv|txt)(?:\.(?:gz|bz2|xz|zst))?")
_LARGEST_EMPTY = 10**6  # rows or columns of a matrix that has hardly any entries


def open_mtx(path: Path, layer: str | None, genes_by_cells: bool) -> Source:
    """Read a Matrix Market file."""
    beside = {kind for files in _samples(path.parent).values() if files.get("matrix") == path for kind in files}
    if {"barcodes", "features"} <= beside:
        log.warning("%s: read as rows x columns without names; give its folder to read it as 10x data", path)
    return in_memory(path, _read_mtx(path), genes_by_cells, holds_floats=False)


def _samples(folder: Path) -> dict[str, dict[str, Path]]:
    """The files of 10x data in a folder: matrix, features and barcodes, by the prefix of their names."""
    found: dict[str, dict[str, Path]] = {}
    for file in sorted(folder.iterdir()):
        parts = _PART.fullmatch(file.name)
        if parts is not None and file.is_file():
            prefix, kind = parts[1].rstrip("_.-"), parts[2].replace("genes", "features")
            if kind == "features" and parts[2] == "genes" and kind in found.get(prefix, {}):
                continue
            found.setdefault(prefix, {})[kind] = file  # the compressed one comes last
    return {prefix: files for prefix, files in found.items() if "matrix" in files}


def _all_samples(folder: Path) -> dict[str, dict[str, Path]]:
    """The same, or those of its subfolders: Cell Ranger makes one for each genome."""
    found = _samples(folder)
    if not found:
        for inner in sorted(path for path in folder.iterdir() if path.is_dir()):
            for prefix, files in _samples(inner).items():
                found["/".join(filter(None, (inner.name, prefix)))] = files
    return found


def open_10x_folder(path: Path, layer: str | None, genes_by_cells: bool) -> Source:
    """Read matrix.mtx, features.tsv (or genes.tsv) and barcodes.tsv; the matrix is genes x cells and is transposed.

    `layer` is a sample, if there are several, or a feature type, or both: ``SAMPLE/Antibody Capture``.
    """
    samples = _all_samples(path)
    sample = next((s for s in samples if layer is not None and (layer + "/").startswith(s + "/")), None)
    if sample is not None:
        layer = (layer or "")[len(sample) + 1 :] or None
    elif len(samples) == 1:
        sample = next(iter(samples))
    elif layer is not None:
        no_such_layer(path, layer, list(samples), "sample")
    else:
        raise DataError(f"{path}: {len(samples)} samples; choose one with layer=NAME: {', '.join(samples)}")
    files = samples[sample]
    for kind, name in (("features", "features.tsv or genes.tsv"), ("barcodes", "barcodes.tsv")):
        if kind not in files:
            raise DataError(f"{path}: a 10x folder needs {name} (or .gz) beside {files['matrix'].name}")
    X = _read_mtx(files["matrix"]).T.tocsr()
    features = _names(files["features"], X.shape[1])
    barcodes = np.asarray([row[0] for row in _names(files["barcodes"], X.shape[0])])
    if X.shape != (len(barcodes), len(features)):
        raise DataError(
            f"{path}: {files['matrix'].name} is {X.shape[1]} x {X.shape[0]}, but there are {len(features)} features "
            f"and {len(barcodes)} barcodes: the files do not belong together"
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


def _names(path: Path, expected: int) -> list[list[str]]:
    """The lines of features.tsv or barcodes.tsv, without a header and without row numbers, as R and pandas add them."""
    file = TextFile(path)
    separator = "," if stem_and_suffix(path.name)[1] == ".csv" else "\t"

    def lines() -> list[str]:
        with file.open() as stream:
            return [line for line in stream if line.strip()]

    text = file.read(lines)
    rows = list(csv.reader(text, delimiter=separator))
    if len(rows) != len(text):  # a lone quote belongs to a name
        rows = [line.rstrip("\n").split(separator) for line in text]
    rows = [[cell.strip() for cell in row] for row in rows]
    short = len(rows) > 1 and len(rows[0]) == len(rows[1]) - 1
    label = re.sub(r"[^a-z0-9]", "", rows[0][0].lower()) if rows else ""
    if len(rows) == expected + 1 and (short or label in ("", "0", "x", "v1") or ROW_LABEL.fullmatch(label)):
        log.info("%s: the first line is a header: %s", path, text[0].strip()[:80])
        rows = rows[1:]
    else:
        short = False
    firsts = [row[0] for row in rows]
    if all(len(row) > 1 for row in rows) and (
        short or any(firsts == [str(i + base) for i in range(len(rows))] for base in (0, 1))
    ):
        rows = [row[1:] for row in rows]
    return rows


def _read_mtx(path: Path) -> Any:
    """A Matrix Market file as CSR for the coordinate layout, as an array for the dense one.

    Values are float32, or float64 if that keeps more digits.

    NumPy parses it: SciPy's parser aborts the process on a damaged gzip file and on some damaged numbers.
    """
    file = TextFile(path)
    return file.read(lambda: _parse_mtx(file))


def _parse_mtx(file: TextFile) -> Any:
    path = file.path
    with file.open() as stream:
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
        _check_sizes(file, (n_rows, n_columns), expected, 4 if coordinate else 2)
        index = np.int32 if max(n_rows, n_columns) <= np.iinfo(np.int32).max else np.int64
        columns: list[tuple[str, Any]] = [("row", index), ("column", index)] if coordinate else []
        if field != "pattern":
            columns.append(("value", np.float64))
        dtype = np.dtype(columns)
        lines = (line for line in stream if not line.isspace())
        first = next(lines, None)
        entries = np.empty(0, dtype)
        if first is not None:
            try:
                entries = np.loadtxt(chain([first], lines), dtype=dtype, comments=None, ndmin=1)
            except UnicodeDecodeError:
                raise
            except ValueError as error:
                _diagnose_mtx(file, skip, dtype)
                raise DataError(f"{path}: {error}") from error
    if len(entries) != expected:
        raise DataError(f"{path}: damaged: it has {len(entries)} entries, its size line says {expected}")
    if field != "pattern" and np.isinf(entries["value"]).any():
        _diagnose_mtx(file, skip, dtype)
    if not coordinate:
        return np.ascontiguousarray(narrowed(entries["value"]).reshape(n_columns, n_rows).T)
    return _coordinates(path, entries, (n_rows, n_columns), symmetry)


def _check_sizes(file: TextFile, shape: tuple[int, int], expected: int, shortest: int) -> None:
    """Refuse sizes that the file cannot hold, before anything is allocated. A line has `shortest` bytes or more."""
    size = file.most_bytes()
    if expected * shortest > size + shortest:
        raise DataError(
            f"{file.path}: damaged: its size line says {expected} entries, which need at least {expected * shortest} "
            f"bytes; the file has at most {size}"
        )
    if max(shape) > _LARGEST_EMPTY + 100 * expected:
        raise DataError(
            f"{file.path}: damaged, or not a data matrix: its size line says {shape[0]} x {shape[1]} with {expected} "
            "entries"
        )


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


def _diagnose_mtx(file: TextFile, skip: int, dtype: np.dtype[Any]) -> None:
    """Read the entries again, slowly, and raise an error with the line number of the first bad one."""
    with file.open() as stream:
        for line, text in enumerate(stream, start=1):
            cells = text.split()
            if line <= skip or not cells:
                continue
            try:
                if len(cells) != len(dtype.names or ()):
                    raise ValueError
                entry = np.loadtxt([text], dtype=dtype, comments=None)
            except ValueError:
                complain(file.path, line, f"{text.strip()[:40]!r} is not an entry of this matrix")
            if "value" in (dtype.names or ()) and np.isinf(entry["value"]) and "inf" not in cells[-1].lower():
                complain(file.path, line, f"{cells[-1][:40]} is too large for float64; scale the data")


def _is_10x_folder(path: Path) -> bool:
    return bool(_all_samples(path))


FORMATS = (
    Format(
        "10x folder",
        open_10x_folder,
        is_folder=_is_10x_folder,
        contents="matrix.mtx, features.tsv, barcodes.tsv",
        layer="feature type or sample",
    ),
    Format(".mtx", open_mtx, (".mtx",), compressed=True),
)
