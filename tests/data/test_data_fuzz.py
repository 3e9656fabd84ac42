"""Drawn files for each reader: layouts, encodings and types in every combination, compared with pandas and SciPy.

A failure names its seed: ``draw_text(np.random.default_rng(seed), ...)`` writes the file again. `slow` draws more.
"""

from __future__ import annotations

import bz2
import csv
import decimal
import gzip
import io
import lzma
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import sparse
from scipy.io import mmread, mmwrite

import narrows.data as nd
from data_files import dense
from narrows.data.columns import column_of
from narrows.errors import DataError

MANY = pytest.param(3000, marks=pytest.mark.slow)
Draw = Callable[[np.random.Generator, Path], None]


def seeds(draw: Draw, count: int, folder: Path) -> None:
    for seed in range(count):
        inner = folder / str(seed)
        inner.mkdir()
        try:
            draw(np.random.default_rng(seed), inner)
        except BaseException as error:
            error.add_note(f"seed {seed}: {[path.name for path in inner.iterdir()]}")
            raise


def one_of(rng: np.random.Generator, *options: Any) -> Any:
    return options[rng.integers(len(options))]


# --- text

PACK: dict[str, Callable[[bytes], bytes]] = {
    "": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress,
}  # fmt: skip


def numbers(rng: np.random.Generator, n: int, style: str) -> list[str]:
    values = {
        "whole": rng.integers(-50, 5000, n),
        "large": rng.integers(2**24, 2**53, n),
        "share": rng.random(n),
        "wide": rng.normal(size=n) * 10.0 ** rng.integers(-30, 30, n),
    }[style]
    form = one_of(rng, repr, lambda v: f" {v!r}", lambda v: f"{v:.3e}", lambda v: f"{v:+}")
    return [form(value) for value in values.tolist()]


def draw_text(rng: np.random.Generator, folder: Path) -> None:
    pandas = pytest.importorskip("pandas")
    n, m = int(rng.integers(4, 12)), int(rng.integers(2, 7))
    separator = one_of(rng, ",", ",", "\t", ";", "|", " ")
    named, header = one_of(rng, "no", "headed", "unnamed", "short"), one_of(rng, "words", "numbers", "no")
    if named in ("unnamed", "short") and header == "no":
        named = "headed"  # then the names alone are there
    columns = [numbers(rng, n, one_of(rng, "whole", "large", "share", "wide")) for _ in range(m)]
    labels = [f"{400 + 2.5 * j:g}" for j in range(m)]
    if header == "words":
        labels = [one_of(rng, "g", "é", "1E", "NA", "a b", "#") + str(j) for j in range(m)]
    rows = [f"{one_of(rng, 'r', 'ü ', 'cell-', 'NA')}{i}" for i in range(n)]
    # A text column among the numbers, never first.
    place = int(rng.integers(1, m + 1)) if rng.random() < 0.4 else None
    kinds = [one_of(rng, "A", "b c", "ß", "") + "x" for _ in range(n)]
    table = [[column[i] for column in columns] for i in range(n)]
    head = list(labels)
    if place is not None:
        head.insert(place, "kind")
        for cells, kind in zip(table, kinds, strict=True):
            cells.insert(place, kind)
    if named != "no":
        head = {"headed": ["sample", *head], "unnamed": ["", *head], "short": head}[named]
        table = [[row, *cells] for row, cells in zip(rows, table, strict=True)]
    quoting = one_of(rng, csv.QUOTE_MINIMAL, csv.QUOTE_NONNUMERIC, csv.QUOTE_ALL)
    if header == "numbers" and named == "no":
        quoting = csv.QUOTE_NONNUMERIC  # what tells this header from data, as R writes it
    out = io.StringIO()
    writer = csv.writer(out, delimiter=separator, quoting=quoting, lineterminator="\n")
    if header != "no":
        writer.writerow(head)
    # Strings that hold numbers would get quotes from QUOTE_NONNUMERIC.
    for cells in table:
        writer.writerow([_Bare(c) if quoting == csv.QUOTE_NONNUMERIC and _is_number(c) else c.strip() for c in cells])
    lines = out.getvalue().split("\n")
    if rng.random() < 0.3:
        lines.insert(int(rng.integers(len(lines))), one_of(rng, "", "  "))
    text = one_of(rng, "\n", "\r\n", "\r").join(lines)
    encoding = one_of(rng, "utf-8", "utf-8-sig", "utf-16", "latin-1")
    suffix, packed = one_of(rng, ".csv", ".tsv", ".txt", ".TAB"), one_of(rng, *PACK)
    path = folder / f"a{suffix}{packed}"
    path.write_bytes(PACK[packed](text.encode(encoding)))
    # Names that look like numbers prove nothing if they are many, and numbers after names may look like a header.
    unsure = header == "words" and 2 * sum(label.startswith("1E") for label in labels) >= m
    said = {"header": header != "no"} if unsure or (header == "no" and named != "no") else {}
    source = nd.open(path, **said)
    found = source.read_rows(slice(None))

    index = {"no": False, "headed": 0, "unnamed": 0, "short": None}[named]
    frame = pandas.read_csv(
        io.StringIO(out.getvalue()), sep=separator, header=None if header == "no" else 0, index_col=index,
        float_precision="round_trip", skipinitialspace=True, keep_default_na=False,
    )  # fmt: skip
    wanted = frame.select_dtypes("number")
    np.testing.assert_array_equal(found, wanted.to_numpy(dtype=np.float64))
    assert (None if source.obs_names is None else source.obs_names.tolist()) == (None if named == "no" else rows)
    assert (None if source.var_names is None else source.var_names.tolist()) == (None if header == "no" else labels)
    assert [column_of(source.obs, key, "").decoded().tolist() for key in source.obs] == (
        [] if place is None else [kinds]
    )
    again = nd.open(path, roles=source.roles)
    np.testing.assert_array_equal(again.read_rows(slice(None)), found)

    # One cell that is no number is an error that names its line, wherever it stands.
    i, j = int(rng.integers(n)), int(rng.integers(m))
    at = j + (place is not None and j >= place) + (named != "no")
    table[i][at] = one_of(rng, "x", "n.a.", "1_0", "12%", "NA", "0x1")
    lines = ([separator.join(head)] if header != "no" else []) + [
        separator.join(c.strip() for c in row) for row in table
    ]
    if separator == " ":
        lines = [line.replace("  ", " _ ") for line in lines]
    path = folder / "b.csv"
    if not any(separator in cell.strip() or not cell.strip() for row in [*table, head] for cell in row):
        path.write_text("\n".join(lines), encoding="utf-8")
        with pytest.raises(DataError, match=rf"b\.csv: line {i + 1 + (header != 'no')}, .*") as caught:
            nd.open(path, header=header != "no")
        assert header == "no" or f"column {at} ({labels[j]})" in str(caught.value)


class _Bare(float):
    """A number that `csv` writes as it was drawn."""

    def __new__(cls, text: str) -> _Bare:
        made = super().__new__(cls, text)
        made.text = text.strip()  # type: ignore[attr-defined]
        return made

    def __repr__(self) -> str:
        return str(self.text)  # type: ignore[attr-defined]

    __str__ = __repr__


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


@pytest.mark.parametrize("count", [120, MANY])
def test_text(count, tmp_path):
    seeds(draw_text, count, tmp_path)


# --- parquet

KINDS = (
    "int8", "uint16", "int32", "int64", "uint64", "float16", "float32", "float64", "bool", "decimal", "string",
    "large_string", "category", "date32", "binary",
)  # fmt: skip


def draw_parquet(rng: np.random.Generator, folder: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    n = int(rng.integers(1, 30))
    arrays, names, wanted, texts = [], [], {}, {}
    for j in range(int(rng.integers(1, 8))):
        name = one_of(rng, "a", "b.c", "ü", "", "0") + str(j)
        kind = one_of(rng, *KINDS)
        numeric: Any = rng.integers(0, 100, n) if kind[0] in "iu" else rng.random(n).round(2)
        if kind == "decimal":
            array = pyarrow.array([decimal.Decimal(str(v)) for v in numeric.tolist()], pyarrow.decimal128(9, 3))
        elif kind == "bool":
            array = pyarrow.array((numeric > 0.5).tolist())
        elif kind[:3] in ("int", "uin", "flo"):
            numeric = numeric.astype(kind)
            array = pyarrow.array(numeric)
        else:
            words = [None if rng.random() < 0.1 and names else f"w{int(v * 9)}" for v in numeric]
            array = pyarrow.array(words, pyarrow.string())
            if kind == "category":
                array = array.dictionary_encode()
            elif kind == "date32":
                array = pyarrow.array((numeric * 9).astype("datetime64[D]"))
                words = [str(day) for day in array.to_pylist()]
            else:
                array = array.cast(kind)
            texts[name] = ["" if word is None else word for word in words]
        if name not in texts:
            wanted[name] = (numeric > 0.5 if kind == "bool" else numeric).astype(np.float64)
        arrays.append(array)
        names.append(name)
    table = pyarrow.Table.from_arrays(arrays, names)
    path = folder / "a.parquet"
    if rng.random() < 0.5:
        parquet.write_table(table, path, row_group_size=int(rng.integers(1, n + 1)))
    else:
        path.mkdir()
        cut = int(rng.integers(0, n + 1))
        for part, rows in enumerate((table[:cut], table[cut:])):
            parquet.write_table(rows, path / f"part-{part + 9}.parquet")
    if not wanted:
        with pytest.raises(DataError, match="no column of numbers"):
            nd.open(path)
        return
    source = nd.open(path)
    np.testing.assert_array_equal(source.read_rows(slice(None)), np.column_stack(list(wanted.values())))
    assert source.var_names.tolist() == list(wanted)
    rows = texts.pop(names[0], None) if len(names) > 1 else None
    assert (None if source.obs_names is None else source.obs_names.tolist()) == rows
    assert {key: column_of(source.obs, key, "").decoded().tolist() for key in source.obs} == texts
    kept = one_of(rng, *wanted)
    only = nd.open(path, drop_columns=[name for name in wanted if name != kept], index_column=False)
    np.testing.assert_array_equal(only.read_rows(slice(None))[:, 0], wanted[kept])


@pytest.mark.parametrize("count", [120, MANY])
def test_parquet(count, tmp_path):
    seeds(draw_parquet, count, tmp_path)


# --- npy and npz


def draw_npz(rng: np.random.Generator, folder: Path) -> None:
    n, m = int(rng.integers(1, 12)), int(rng.integers(1, 9))
    dtype = one_of(rng, "?", "u1", "i2", "<i4", ">i4", "i8", "u8", "f2", "<f4", ">f4", "<f8", ">f8")
    X = (rng.integers(0, 5, (n, m)) * (rng.random((n, m)) < 0.6)).astype(dtype)
    path = folder / "a.npz"
    turned = bool(rng.random() < 0.3)
    names = {"obs_names": [f"ü{i}" for i in range(n)], "genes": [f"g{j}" for j in range(m)]}
    beside = {key: np.asarray(value) for key, value in names.items() if rng.random() < 0.6}
    coding = one_of(rng, "utf-8", "latin-1", None)
    coded = {key: np.char.encode(v, coding) if coding else v for key, v in beside.items()}
    labels = one_of(rng, None, np.arange(n), np.asarray([b"x"] * n))
    if labels is not None:
        coded["labels"] = labels
    kind = one_of(rng, "dense", "sparse", "parts")
    if kind == "dense":
        stored = np.asfortranarray(X.T if turned else X) if rng.random() < 0.5 else X.T if turned else X
        one_of(rng, np.savez, np.savez_compressed)(path, **{one_of(rng, "X", "counts"): stored}, **coded)
    elif kind == "sparse":
        whole = X.astype(one_of(rng, "f4", "f8", "i4", "i8", "?"))
        X = whole
        form = one_of(rng, "csr", "csc", "coo", "bsr", "dia")
        held = sparse.coo_array(whole.T if turned else whole).asformat(form)
        sparse.save_npz(path, one_of(rng, held, sparse.csr_matrix(held)), compressed=bool(rng.random() < 0.5))
        np.testing.assert_array_equal(sparse.load_npz(path).toarray(), whole.T if turned else whole)
        beside, labels = {}, None
    else:
        held = sparse.csr_array(X.T.astype("f4") if turned else X.astype("f4"))
        order = one_of(rng, np.int32, np.int64, np.uint16)
        parts = {"data": held.data, "indices": held.indices.astype(order), "indptr": held.indptr, "shape": held.shape}
        np.savez(path, **parts, **coded)
    with nd.open(path, genes_by_cells=turned) as source:
        np.testing.assert_array_equal(dense(source.read_rows(slice(None))), X.astype(np.float64))
        rows = rng.integers(0, n, 3)
        np.testing.assert_array_equal(dense(source.read_rows(rows)), X[rows].astype(np.float64))
        assert source.is_sparse == (kind != "dense")
        for given, key in ((source.obs_names, "obs_names"), (source.var_names, "genes")):
            assert (given is None) == (key not in beside)
            assert given is None or given.tolist() == names[key]
        assert labels is None or source.labels.tolist() == (["x"] * n if labels.dtype.kind == "S" else list(range(n)))
    np.save(folder / "a.npy", X)
    np.testing.assert_array_equal(nd.open(folder / "a.npy").read_rows(slice(None)), np.load(folder / "a.npy"))


@pytest.mark.parametrize("count", [150, MANY])
def test_npz(count, tmp_path):
    seeds(draw_npz, count, tmp_path)


# --- Matrix Market and 10x folders


def draw_mtx(rng: np.random.Generator, folder: Path) -> None:
    n = int(rng.integers(1, 9))
    symmetry = one_of(rng, "general", "general", "symmetric", "skew-symmetric")
    m = n if symmetry != "general" else int(rng.integers(1, 9))
    X = rng.integers(-3, 9, (n, m)) * (rng.random((n, m)) < 0.4)
    if symmetry == "symmetric":
        X = X + X.T
    elif symmetry == "skew-symmetric":
        X = X - X.T
    field = one_of(rng, "integer", "real") if symmetry != "general" else one_of(rng, "integer", "real", "pattern")
    held: Any = sparse.coo_array(X * 0.37 if field == "real" else X)
    if symmetry == "general" and field != "pattern" and rng.random() < 0.3:
        held = held.toarray()
    buffer = io.BytesIO()
    mmwrite(buffer, held, comment=one_of(rng, "", "é%", "two\nlines"), field=field, symmetry=symmetry)
    lines = buffer.getvalue().decode().splitlines()
    start = next(i for i, line in enumerate(lines) if not line.startswith("%"))
    if rng.random() < 0.4:
        lines[start + 1 :] = [
            one_of(rng, "{}", " {}", "{}\t").format(x) for line in lines[start + 1 :] for x in (line, "")
        ]
    text = one_of(rng, "\n", "\r\n").join(lines) + one_of(rng, "", "\n", "\n\n")
    packed = one_of(rng, *PACK)
    path = folder / f"a.mtx{packed}"
    path.write_bytes(PACK[packed](text.encode(one_of(rng, "utf-8", "utf-8-sig", "latin-1"))))
    (folder / "plain").mkdir()
    (folder / "plain" / "a.mtx").write_bytes(buffer.getvalue())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wanted = dense(mmread(folder / "plain" / "a.mtx"))
    np.testing.assert_array_equal(dense(nd.open(path).read_rows(slice(None))), wanted)
    np.testing.assert_array_equal(dense(nd.open(path, genes_by_cells=True).read_rows(slice(None))), wanted.T)

    # The same matrix as a 10x folder.
    prefix, end = one_of(rng, "", "GSM1_", "a.b-"), one_of(rng, *PACK)
    inner = folder / "tenx"
    inner.mkdir()
    plain = io.BytesIO()
    mmwrite(plain, sparse.coo_array(X))
    cells, genes = [f"c{i}-1" for i in range(m)], [f"g{j}" for j in range(n)]
    quote = one_of(rng, "", '"')
    barcodes = [f"{quote}{cell}{quote}" for cell in cells]
    features = [f"{quote}E{j}{quote}\t{quote}{gene}{quote}\tGene Expression" for j, gene in enumerate(genes)]
    style = one_of(rng, "bare", "header", "numbered", "R")
    if style in ("numbered", "R"):
        barcodes = [f"{i + 1}\t{cell}" for i, cell in enumerate(barcodes)]
    if style in ("header", "R"):
        barcodes.insert(0, one_of(rng, "barcode", "x") if style == "header" else '"x"')
        features.insert(0, "gene_id\tgene_name\ttype")
    if rng.random() < 0.3:
        features.append("")
        barcodes.insert(0, "")
    for name, content in (
        ("matrix.mtx", plain.getvalue()),
        ("barcodes.tsv", "\n".join(barcodes).encode()),
        (one_of(rng, "features.tsv", "genes.tsv"), "\n".join(features).encode()),
    ):
        (inner / f"{prefix}{name}{end}").write_bytes(PACK[end](content))
    source = nd.open(inner)
    np.testing.assert_array_equal(dense(source.read_rows(slice(None))), X.T)
    assert (source.obs_names.tolist(), source.var_names.tolist()) == (cells, genes)


@pytest.mark.parametrize("count", [120, MANY])
def test_mtx(count, tmp_path):
    seeds(draw_mtx, count, tmp_path)
