"""Sources and readers: every container gives the same rows; a fault of a file is named in one line."""

from __future__ import annotations

import gzip
import hashlib
import io
import logging
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy import sparse
from scipy.io import mmread, mmwrite

import narrows.data as nd
from narrows import datasets
from narrows.errors import DataError

COUNTS = np.random.default_rng(0).poisson(0.6, (7, 5)).astype(np.float32)
COUNTS[2] = 0  # an empty row
CELLS = [f"cell{i}" for i in range(7)]
GENES = [f"gene{j}" for j in range(5)]


def shared(relative: str) -> Path:
    """A file of the development data, or skip."""
    root = Path(os.environ.get("NARROWS_DATA", Path(__file__).parents[2] / "shared" / "data"))
    path = root / relative
    if not path.exists():
        pytest.skip(f"{path} is absent; NARROWS_DATA names the folder of development data")
    return path


def dense(block) -> np.ndarray:
    return block.toarray() if hasattr(block, "toarray") else np.asarray(block)


def write_csv(path: Path, matrix, rows=None, columns=None, corner: str | None = "", quote: str = "") -> Path:
    """`corner` None leaves the corner cell out, as R does."""
    separator = "\t" if ".tsv" in path.name else ","
    lines = []
    if columns is not None:
        head = [quote + c + quote for c in columns]
        lines.append(separator.join(([corner] if rows is not None and corner is not None else []) + head))
    for i, row in enumerate(matrix):
        name = [quote + rows[i] + quote] if rows is not None else []
        lines.append(separator.join(name + [f"{v:g}" for v in row]))
    text = "\n".join(lines) + "\n"
    if path.name.endswith(".gz"):
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)
    return path


def write_anndata(path: Path, X, **kwargs) -> Path:
    anndata = pytest.importorskip("anndata")
    adata = anndata.AnnData(X, **kwargs)
    adata.obs_names, adata.var_names = CELLS[: X.shape[0]], GENES[: X.shape[1]]
    adata.layers["doubled"] = X * 2
    if path.suffix == ".zarr":
        pytest.importorskip("zarr")
        import warnings

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # anndata on its choice of zarr format
            adata.write_zarr(path)
    else:
        adata.write_h5ad(path)
    return path


def write_10x_h5(path: Path, *, version: int = 3, kinds: list[str] | None = None) -> Path:
    h5py = pytest.importorskip("h5py")
    X = sparse.csr_array(COUNTS.astype(np.int32))
    with h5py.File(path, "w") as file:
        group = file.create_group("matrix" if version == 3 else "GRCh38")
        group["data"], group["indices"], group["indptr"] = X.data, X.indices.astype(np.int64), X.indptr
        group["shape"] = [5, 7]
        group["barcodes"] = np.array(CELLS, "S")
        if version == 3:
            features = group.create_group("features")
            features["id"] = np.array([f"ENSG{j}" for j in range(5)], "S")
            features["name"] = np.array(GENES, "S")
            features["feature_type"] = np.array(kinds or ["Gene Expression"] * 5, "S")
        else:
            group["genes"], group["gene_names"] = np.array(GENES, "S"), np.array(GENES, "S")
    return path


def write_10x_folder(path: Path, *, zipped: bool = True, kinds: list[str] | None = None) -> Path:
    path.mkdir()
    buffer = io.BytesIO()
    mmwrite(buffer, sparse.coo_array(COUNTS.T.astype(np.int64)))
    kinds = kinds or ["Gene Expression"] * 5
    tables = {
        "matrix.mtx": buffer.getvalue(),
        "features.tsv" if zipped else "genes.tsv": "".join(
            f"ENSG{j}\t{g}" + (f"\t{kinds[j]}\n" if zipped else "\n") for j, g in enumerate(GENES)
        ).encode(),
        "barcodes.tsv": "".join(f"{c}\n" for c in CELLS).encode(),
    }
    for name, content in tables.items():
        (path / f"{name}.gz").write_bytes(gzip.compress(content)) if zipped else (path / name).write_bytes(content)
    return path


def _npz(path, **arrays):
    np.savez_compressed(path, **arrays)
    return path


def _parts(matrix):
    X = sparse.csr_array(matrix)
    return {"data": X.data, "indices": X.indices.astype(np.uint16), "indptr": X.indptr, "shape": X.shape}


def _saved(path, matrix):
    sparse.save_npz(path, matrix)
    return path


def _npy(path, matrix):
    np.save(path, matrix)
    return path


def _mtx(path, matrix):
    with gzip.open(path, "wb") if path.suffix == ".gz" else path.open("wb") as stream:
        mmwrite(stream, matrix)
    return path


def _parquet(path, named):
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    pandas.DataFrame(COUNTS, CELLS if named else None, GENES).to_parquet(path)
    return path


# name of the file: (writer, genes_by_cells, sparse, names of cells, names of genes)
FORMATS = {
    "a.npy": (lambda p: _npy(p, COUNTS), False, False, None, None),
    "fortran.npy": (lambda p: _npy(p, np.asfortranarray(COUNTS)), False, False, None, None),
    "int.npy": (lambda p: _npy(p, COUNTS.astype(np.int64)), False, False, None, None),
    "big.npy": (lambda p: _npy(p, COUNTS.astype(">f4")), False, False, None, None),
    "turned.npy": (lambda p: _npy(p, COUNTS.T), True, False, None, None),
    "a.npz": (lambda p: _npz(p, counts=COUNTS, genes=GENES, obs_names=CELLS), False, False, CELLS, GENES),
    "turned.npz": (lambda p: _npz(p, X=COUNTS.T, var_names=GENES), True, False, None, GENES),
    "parts.npz": (lambda p: _npz(p, **_parts(COUNTS)), False, True, None, None),
    "turned_parts.npz": (lambda p: _npz(p, **_parts(COUNTS.T)), True, True, None, None),
    "csr.npz": (lambda p: _saved(p, sparse.csr_matrix(COUNTS)), False, True, None, None),
    "csc.npz": (lambda p: _saved(p, sparse.csc_array(COUNTS)), False, True, None, None),
    "coo.npz": (lambda p: _saved(p, sparse.coo_array(COUNTS)), False, True, None, None),
    "named.csv": (lambda p: write_csv(p, COUNTS, CELLS, GENES), False, False, CELLS, GENES),
    "quoted.csv": (lambda p: write_csv(p, COUNTS, CELLS, GENES, quote='"'), False, False, CELLS, GENES),
    "like_r.csv": (lambda p: write_csv(p, COUNTS, CELLS, GENES, corner=None), False, False, CELLS, GENES),
    "corner.tsv": (lambda p: write_csv(p, COUNTS, CELLS, GENES, corner="id"), False, False, CELLS, GENES),
    "header.csv": (lambda p: write_csv(p, COUNTS, None, GENES), False, False, None, GENES),
    "rows.csv": (lambda p: write_csv(p, COUNTS, CELLS), False, False, CELLS, None),
    "bare.tsv.gz": (lambda p: write_csv(p, COUNTS), False, False, None, None),
    "turned.csv.gz": (lambda p: write_csv(p, COUNTS.T, GENES, CELLS), True, False, CELLS, GENES),
    "a.mtx": (lambda p: _mtx(p, sparse.coo_array(COUNTS)), False, True, None, None),
    "a.mtx.gz": (lambda p: _mtx(p, sparse.coo_array(COUNTS)), False, True, None, None),
    "array.mtx": (lambda p: _mtx(p, COUNTS), False, False, None, None),
    "turned.mtx": (lambda p: _mtx(p, sparse.coo_array(COUNTS.T)), True, True, None, None),
    "named.parquet": (lambda p: _parquet(p, True), False, False, CELLS, GENES),
    "a.parquet": (lambda p: _parquet(p, False), False, False, None, GENES),
    "csr.h5ad": (lambda p: write_anndata(p, sparse.csr_matrix(COUNTS)), False, True, CELLS, GENES),
    "csc.h5ad": (lambda p: write_anndata(p, sparse.csc_matrix(COUNTS)), False, True, CELLS, GENES),
    "dense.h5ad": (lambda p: write_anndata(p, COUNTS), False, False, CELLS, GENES),
    "csr.zarr": (lambda p: write_anndata(p, sparse.csr_matrix(COUNTS)), False, True, CELLS, GENES),
    "csc.zarr": (lambda p: write_anndata(p, sparse.csc_matrix(COUNTS)), False, True, CELLS, GENES),
    "dense.zarr": (lambda p: write_anndata(p, COUNTS), False, False, CELLS, GENES),
    "v3.h5": (write_10x_h5, False, True, CELLS, GENES),
    "v2.h5": (lambda p: write_10x_h5(p, version=2), False, True, CELLS, GENES),
    "folder10x": (write_10x_folder, False, True, CELLS, GENES),
    "old10x": (lambda p: write_10x_folder(p, zipped=False), False, True, CELLS, GENES),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Each format's file, written on first use."""
    folder = tmp_path_factory.mktemp("formats")

    def get(name: str) -> Path:
        path = folder / name
        return path if path.exists() else FORMATS[name][0](path)

    return get


# --- every format


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_table(files, name):
    _, turned, is_sparse, cells, genes = FORMATS[name]
    path = files(name)
    with nd.open(path, genes_by_cells=turned) as source:
        assert source.shape == COUNTS.shape
        assert len(source) == 7
        assert source.dtype == np.float32
        assert source.is_sparse is is_sparse
        assert source.path == path
        for found, expected in ((source.obs_names, cells), (source.var_names, genes)):
            if expected is None:
                assert found is None
            else:
                assert found.dtype.kind == "U"
                assert found.tolist() == expected
        block = source.read_rows(slice(None))
        assert sparse.issparse(block) is is_sparse
        assert block.dtype == np.float32
        assert block.dtype.isnative
        np.testing.assert_array_equal(dense(block), COUNTS)
        if not path.is_dir():
            assert source.sha256() == hashlib.sha256(path.read_bytes()).hexdigest()
        assert path.name in repr(source)
    source.close()
    with pytest.raises(ValueError, match="closed"):
        source.read_rows([0])


ROWS = st.one_of(
    st.slices(7),
    st.lists(st.integers(0, 6), max_size=12).map(lambda rows: np.array(rows, dtype=np.int64)),
    st.lists(st.integers(0, 6), max_size=12),
    st.lists(st.booleans(), min_size=7, max_size=7).map(np.array),
)


@pytest.mark.parametrize(
    "name", ["a.npy", "int.npy", "csr.npz", "csr.h5ad", "dense.h5ad", "csr.zarr", "dense.zarr", "v3.h5"]
)
def test_any_rows_in_any_order(files, name):
    @settings(deadline=None, max_examples=40)
    @given(ROWS)
    def check(rows):
        block = source.read_rows(rows)
        expected = COUNTS[rows if isinstance(rows, slice) else np.asarray(rows, dtype=None if len(rows) else int)]
        assert block.shape == expected.shape
        np.testing.assert_array_equal(dense(block), expected)
        if source.is_sparse:
            assert block.has_canonical_format

    with nd.open(files(name)) as source:
        check()
        for rows in ([7], [-1], [0.5], np.zeros(3, bool), [[0]], "a"):
            with pytest.raises(IndexError):
                source.read_rows(rows)


@pytest.mark.parametrize("kind", ["dense", "csr"])
def test_scattered_rows_are_read_in_bounded_spans(tmp_path, monkeypatch, kind):
    """A chunked file is read by chunks, far rows are not read through, and no span exceeds the limit."""
    h5py = pytest.importorskip("h5py")
    X = np.random.default_rng(1).poisson(1.0, (400, 8)).astype(np.float32)
    with h5py.File(tmp_path / "a.h5ad", "w") as file:
        if kind == "dense":
            file.create_dataset("X", data=X, chunks=(10, 8))
        else:
            S = sparse.csr_array(X)
            group = file.create_group("X")
            group.attrs["encoding-type"], group.attrs["shape"] = "csr_matrix", X.shape
            for part in ("data", "indices", "indptr"):
                group.create_dataset(part, data=getattr(S, part), chunks=(50,))
    source = nd.open(tmp_path / "a.h5ad")
    spans = []
    read = source._slice
    monkeypatch.setattr(source, "_slice", lambda a, b: spans.append((a, b)) or read(a, b))
    rows = np.array([399, 3, 5, 5, 0, 200, 205])
    np.testing.assert_array_equal(dense(source.read_rows(rows)), X[rows])
    assert spans == [(0, 6), (200, 206), (399, 400)]
    spans.clear()
    monkeypatch.setattr("narrows.data.source._SPAN_LIMIT", 64 * source._unit_bytes())
    rows = np.random.default_rng(2).permutation(400)
    np.testing.assert_array_equal(dense(source.read_rows(rows)), X[rows])
    assert len(spans) >= 6
    assert max(b - a for a, b in spans) <= 80


# --- what is read, and how


def test_npy_is_mapped_and_64_bit_clean(tmp_path):
    """17 GB apparent size: nothing but the rows asked for is touched, and no index overflows 32 bits."""
    path, n = tmp_path / "large.npy", 2**26 + 1
    with path.open("wb") as stream:
        np.lib.format.write_array_header_1_0(stream, {"descr": "<f4", "fortran_order": False, "shape": (n, 64)})
        start = stream.tell()
        for row in (0, 2**25, 2**26):
            stream.seek(start + row * 256)
            stream.write(np.full(64, row % 1000 + 1, "<f4").tobytes())
    with nd.open(path) as source:
        rows = [2**26, 0, 2**25, 1]
        np.testing.assert_array_equal(source.read_rows(rows)[:, 63], [2**26 % 1000 + 1, 1, 2**25 % 1000 + 1, 0])
        assert source.read_rows(slice(2**26, None)).shape == (1, 64)


def test_float64_is_kept_and_other_numbers_become_float32(tmp_path):
    for dtype, read in (
        ("f8", "f8"),
        ("f4", "f4"),
        ("f2", "f4"),
        ("i8", "f4"),
        ("u1", "f4"),
        ("?", "f4"),
        (">f8", "f8"),
    ):
        source = nd.as_source(COUNTS.astype(dtype))
        for rows in (slice(1, 4), [3, 1], slice(None)):
            block = source.read_rows(rows)
            assert block.dtype == np.dtype(read)
            assert block.dtype.isnative
            np.testing.assert_array_equal(block, COUNTS.astype(dtype)[rows])
        held = sparse.csr_array(COUNTS)
        held = sparse.csr_array((held.data.astype(dtype), held.indices, held.indptr), shape=held.shape)
        source = nd.as_source(held)
        for rows in (slice(1, 4), [3, 1], slice(None)):
            assert source.read_rows(rows).dtype == np.dtype(read)
            np.testing.assert_array_equal(source.read_rows(rows).toarray(), COUNTS.astype(dtype)[rows])


def test_nothing_is_copied_where_nothing_has_to_be():
    assert np.shares_memory(nd.as_source(COUNTS).read_rows(slice(1, 5)), COUNTS)
    fortran = np.asfortranarray(COUNTS)
    assert np.shares_memory(nd.as_source(fortran).read_rows(slice(1, 5)), fortran)
    X = sparse.csr_array(COUNTS)
    assert np.shares_memory(nd.as_source(X).read_rows(slice(None)).data, X.data)


@pytest.mark.parametrize("index", [np.int32, np.int64])
@pytest.mark.parametrize("rows", [slice(None), slice(0, 1), [1, 0, 1]])
def test_unsorted_and_duplicate_csr_is_canonical_per_block_and_left_alone(index, rows):
    data = np.array([1.0, 2, 4, 8], np.float32)
    indices, indptr = np.array([2, 0, 2, 1], index), np.array([0, 3, 4], index)
    X = sparse.csr_array((data, indices, indptr), shape=(2, 3))
    source = nd.as_source(X)
    block = source.read_rows(rows)
    assert block.has_canonical_format
    np.testing.assert_array_equal(block.toarray(), np.array([[2, 0, 5], [0, 8, 0]])[rows])
    assert data.tolist() == [1, 2, 4, 8]
    assert indices.tolist() == [2, 0, 2, 1]
    assert X.indices.tolist() == [2, 0, 2, 1]
    assert X.nnz == 4


def test_frames_bring_their_names():
    pandas, polars = pytest.importorskip("pandas"), pytest.importorskip("polars")
    source = nd.as_source(pandas.DataFrame(COUNTS, CELLS, GENES))
    assert source.obs_names.tolist() == CELLS
    assert source.var_names.tolist() == GENES
    source = nd.as_source(pandas.DataFrame(COUNTS.astype(int)))
    assert source.obs_names is None
    assert source.var_names.tolist() == ["0", "1", "2", "3", "4"]
    source = nd.as_source(polars.DataFrame(COUNTS, schema=GENES))
    assert source.var_names.tolist() == GENES
    np.testing.assert_array_equal(source.read_rows([4, 0]), COUNTS[[4, 0]])
    columns = pandas.DataFrame.sparse.from_spmatrix(sparse.csr_matrix(COUNTS), columns=GENES)
    source = nd.as_source(columns)
    assert source.is_sparse
    np.testing.assert_array_equal(dense(source.read_rows(slice(None))), COUNTS)
    mixed = pandas.DataFrame({"a": [1, 2], "b": [0.5, 1.5], "c": [True, False]})
    np.testing.assert_array_equal(nd.as_source(mixed).read_rows([0]), [[1, 0.5, 1]])
    with pytest.raises(DataError, match="not a table of numbers"):
        nd.as_source(pandas.DataFrame({"a": ["x"]}))


def test_anndata_objects(files):
    anndata = pytest.importorskip("anndata")
    adata = anndata.read_h5ad(files("csr.h5ad"))
    source = nd.as_source(adata[2:])
    assert source.obs_names.tolist() == CELLS[2:]
    np.testing.assert_array_equal(dense(source.read_rows(slice(None))), COUNTS[2:])
    backed = anndata.read_h5ad(files("csr.h5ad"), backed="r")
    with pytest.raises(DataError, match=r"narrows\.data\.open"):
        nd.as_source(backed)
    backed.file.close()


def test_as_source_takes_sources_paths_and_lists(files):
    source = nd.as_source([[1, 2], [3, 4]])
    assert nd.as_source(source) is source
    assert nd.as_source(files("a.npy")).shape == (7, 5)
    assert nd.as_source(str(files("a.npy"))).shape == (7, 5)


@pytest.mark.parametrize(
    ("X", "message"),
    [
        (np.zeros(3), r"1 dimension\(s\), shape \(3,\)"),
        (np.float32(1), r"0 dimension\(s\)"),
        (np.zeros((2, 2, 2)), r"3 dimension\(s\)"),
        (np.zeros((0, 3)), "empty .0 rows, 3 columns."),
        (sparse.csr_array((3, 0)), "empty .3 rows, 0 columns."),
        (np.zeros((2, 2), complex), "numbers expected, got dtype complex128"),
        (np.array([["a"]]), "numbers expected, got dtype <U1"),
        (np.array([[object()]]), "not a table of numbers"),
        ([[1, 2], [3]], "not a table of numbers"),
        (np.ma.array([[1.0, 2.0]], mask=[[0, 1]]), "masked"),
        (None, r"0 dimension|not a table"),
        (np.zeros((2, 2), [("a", "f4")]), "numbers expected"),
    ],
)
def test_what_is_no_table_of_numbers_is_refused(X, message):
    with pytest.raises(DataError, match=message):
        nd.as_source(X)


def test_names_and_labels_must_fit():
    with pytest.raises(DataError, match=r"obs_names has shape \(2,\) for 7 rows"):
        nd.ArraySource(COUNTS, obs_names=["a", "b"])
    with pytest.raises(DataError, match=r"labels has shape \(3,\) for 7 rows"):
        nd.ArraySource(COUNTS, labels=[1, 2, 3])
    assert nd.ArraySource(COUNTS, labels=np.arange(7, dtype=np.uint8)).labels.dtype == np.uint8


def test_hash_of_memory_is_that_of_the_values():
    X = sparse.csr_array(COUNTS)
    digests = {nd.as_source(x).sha256() for x in (COUNTS, COUNTS.copy(), np.asfortranarray(COUNTS), COUNTS.astype(int))}
    assert len(digests) == 1
    wide = sparse.csr_array((X.data, X.indices.astype(np.int64), X.indptr.astype(np.int64)), shape=X.shape)
    assert nd.as_source(X).sha256() == nd.as_source(wide).sha256() == nd.as_source(X.tocsc()).sha256()
    changed = COUNTS.copy()
    changed[6, 4] += 1
    others = [nd.as_source(x).sha256() for x in (changed, sparse.csr_array(changed), X, COUNTS.T, COUNTS.astype("f8"))]
    assert len(digests | set(others)) == 6


def test_hash_of_a_folder_covers_names_and_bytes(tmp_path):
    path = write_10x_folder(tmp_path / "a", zipped=False)
    first = nd.open(path).sha256()
    assert first == nd.open(write_10x_folder(tmp_path / "b", zipped=False)).sha256()
    (path / "barcodes.tsv").write_text("".join(f"c{i}\n" for i in range(7)))
    assert nd.open(path).sha256() != first


def test_blocks_cover_all_rows_in_order(files):
    with nd.open(files("csr.h5ad")) as source:
        parts = list(source.blocks(3))
        assert [start for start, _ in parts] == [0, 3, 6]
        np.testing.assert_array_equal(np.concatenate([dense(block) for _, block in parts]), COUNTS)
        with pytest.raises(ValueError, match="at least 1"):
            next(source.blocks(0))


# --- layers, raw, feature types


@pytest.mark.parametrize("name", ["csr.h5ad", "dense.h5ad", "csc.zarr"])
def test_layers(files, name):
    with nd.open(files(name), layer="doubled") as source:
        np.testing.assert_array_equal(dense(source.read_rows(slice(None))), 2 * COUNTS)
    with pytest.raises(DataError, match="no layer 'absent'; there is 'doubled'"):
        nd.open(files(name), layer="absent")


@pytest.mark.parametrize("suffix", ["h5ad", "zarr"])
def test_raw_counts_have_their_own_genes(tmp_path, suffix):
    anndata = pytest.importorskip("anndata")
    adata = anndata.AnnData(sparse.csr_matrix(COUNTS))
    adata.obs_names, adata.var_names = CELLS, GENES
    adata.raw = adata
    small = adata[:, :2].copy()
    path = tmp_path / f"a.{suffix}"
    if suffix == "zarr":
        pytest.importorskip("zarr")
        import warnings

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            small.write_zarr(path)
    else:
        small.write_h5ad(path)
    assert nd.open(path).shape == (7, 2)
    with nd.open(path, layer="raw") as source:
        assert source.var_names.tolist() == GENES
        np.testing.assert_array_equal(dense(source.read_rows(slice(None))), COUNTS)


def test_stored_orientation_decides_whether_the_disk_is_read_by_rows(files, caplog):
    """CSC of genes x cells is CSR of cells x genes: read from disk. The other way round is turned."""
    caplog.set_level(logging.INFO, logger="narrows")
    with nd.open(files("csc.h5ad"), genes_by_cells=True) as source:
        np.testing.assert_array_equal(dense(source.read_rows([2, 0])), COUNTS.T[[2, 0]])
        assert source.obs_names.tolist() == GENES
    assert not caplog.records
    with nd.open(files("csc.h5ad")) as source:
        assert "converted to CSR in memory" in caplog.text
    caplog.clear()
    with nd.open(files("csr.h5ad"), genes_by_cells=True) as source:
        assert "converted to CSR in memory" in caplog.text
        np.testing.assert_array_equal(dense(source.read_rows(slice(None))), COUNTS.T)
        assert source.var_names.tolist() == CELLS
    with nd.open(files("dense.h5ad"), genes_by_cells=True) as source:
        np.testing.assert_array_equal(source.read_rows(slice(None)), COUNTS.T)


@pytest.mark.parametrize("write", [write_10x_h5, write_10x_folder])
def test_10x_reads_genes_and_other_features_on_request(tmp_path, write, caplog):
    caplog.set_level(logging.INFO, logger="narrows")
    kinds = ["Gene Expression", "Antibody Capture", "Gene Expression", "Gene Expression", "Antibody Capture"]
    path = write(tmp_path / "a.h5", kinds=kinds)
    for layer, columns in ((None, [0, 2, 3]), ("Antibody Capture", [1, 4]), ("Gene Expression", [0, 2, 3])):
        with nd.open(path, layer=layer) as source:
            assert source.var_names.tolist() == [GENES[j] for j in columns]
            assert source.shape == (7, len(columns))
            np.testing.assert_array_equal(dense(source.read_rows([6, 0])), COUNTS[[6, 0]][:, columns])
    assert "the 3 features of type 'Gene Expression' of 5" in caplog.text
    with pytest.raises(DataError, match="no feature type 'CRISPR'; there is 'Gene Expression', 'Antibody Capture'"):
        nd.open(path, layer="CRISPR")


def test_10x_genomes_of_version_2(tmp_path):
    path = write_10x_h5(tmp_path / "a.h5", version=2)
    assert nd.open(path, layer="GRCh38").shape == (7, 5)
    with pytest.raises(DataError, match="no genome 'mm10'; there is 'GRCh38'"):
        nd.open(path, layer="mm10")


def test_repeated_gene_symbols_become_unique(tmp_path):
    path = write_10x_folder(tmp_path / "a", zipped=False)
    (path / "genes.tsv").write_text("".join(f"E{j}\t{s}\n" for j, s in enumerate(["A", "B", "A", "A-1", "A"])))
    assert nd.open(path).var_names.tolist() == ["A", "B", "A-2", "A-1", "A-3"]


def test_npz_tables_are_chosen_by_name(tmp_path):
    path = _npz(tmp_path / "a.npz", raw=COUNTS, scaled=COUNTS * 2, labels=np.arange(7))
    with pytest.raises(DataError, match="several tables; choose one with layer=NAME among raw, scaled"):
        nd.open(path)
    source = nd.open(path, layer="scaled")
    np.testing.assert_array_equal(source.read_rows(slice(None)), COUNTS * 2)
    assert source.labels.tolist() == list(range(7))
    with pytest.raises(DataError, match="no table 'labels'; there is 'raw', 'scaled'"):
        nd.open(path, layer="labels")
    with pytest.raises(DataError, match=r"no 2-D array of numbers in it; it holds a \(3,\) float64"):
        nd.open(_npz(tmp_path / "b.npz", a=np.zeros(3)))


@pytest.mark.parametrize("name", ["a.npy", "named.csv", "a.mtx", "a.parquet", "parts.npz"])
def test_formats_without_layers_say_so(files, name):
    with pytest.raises(DataError, match="this format has no layers; drop layer='x'"):
        nd.open(files(name), layer="x")


# --- tables as text


@pytest.mark.parametrize(
    ("text", "rows", "columns", "values"),
    [
        ("1,2\n3,4\n", None, None, [[1, 2], [3, 4]]),
        ("1,2\n", None, None, [[1, 2]]),
        ("5\n6\n", None, None, [[5], [6]]),
        ("a\n6\n", None, ["a"], [[6]]),
        (",a\nx,1\n", ["x"], ["a"], [[1]]),
        (",0,1\n0,5,6\n", ["0"], ["0", "1"], [[5, 6]]),
        ("cell,0,1\nx,5,6\n", ["x"], ["0", "1"], [[5, 6]]),
        ("x,7,1\ny,5,6\n", ["x", "y"], None, [[7, 1], [5, 6]]),
        ('"a b","c,d"\n1,2\n', None, ["a b", "c,d"], [[1, 2]]),
        ('a,"say ""b"""\n1,2\n', None, ["a", 'say "b"'], [[1, 2]]),
        ("\ufeffa,b\r\n1,2\r\n", None, ["a", "b"], [[1, 2]]),
        ("\ufeff1,2\n3,4\n", None, None, [[1, 2], [3, 4]]),
        ("\n\na,b\n\n1,2\n\n", None, ["a", "b"], [[1, 2]]),
        ("a#b,c\n1e2,-.5\n", None, ["a#b", "c"], [[100, -0.5]]),
        ("é,b\nx,2\n", ["x"], ["b"], [[2]]),
    ],
)
def test_layouts_of_tables(tmp_path, text, rows, columns, values):
    (tmp_path / "a.csv").write_text(text, encoding="utf-8", newline="")
    source = nd.open(tmp_path / "a.csv")
    assert (source.obs_names is None) == (rows is None)
    assert (source.var_names is None) == (columns is None)
    assert rows is None or source.obs_names.tolist() == rows
    assert columns is None or source.var_names.tolist() == columns
    block = source.read_rows(slice(None))
    np.testing.assert_array_equal(block, np.asarray(values, np.float32))
    assert block.flags.c_contiguous


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "a.csv: empty"),
        ("\n\n", "a.csv: empty"),
        ("a,b\n", "a.csv: empty: a header and no rows"),
        ("a,b\n1,2\n3,x\n", r"a.csv: line 3, column 2 \(b\): 'x' is not a number"),
        ("a,b\n1,2\n\n3,NA\n", r"a.csv: line 4, column 2 \(b\): 'NA' is a missing value"),
        ("1,2\n3,\n", "a.csv: line 2, column 2: '' is a missing value"),
        ("NA,2\n3,4\n", "a.csv: line 1, column 1: 'NA' is a missing value"),
        (",a,b\nx,1,2\ny,1\n", "a.csv: line 3, 2 cells where the lines before have 3"),
        ("1,2\n3,4,5\n", "a.csv: line 2, 3 cells where"),
        ("a,b,c\n1,2\n", "a.csv: line 2, 2 cells under a header of 3"),
        ("a,b\n1,1_0\n", r"line 2, column 2 \(b\): '1_0' is not a number"),
        ("a,b\n1,0x10\n", r"line 2, column 2 \(b\): '0x10' is not a number"),
        ("a\nx\ny\n", "empty .2 rows, 0 columns."),
        ("1;2\n3;4\n", "line 2, column 1|empty"),
    ],
)
def test_faults_of_tables_are_named(tmp_path, text, message):
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(DataError, match=message) as caught:
        nd.open(tmp_path / "a.csv")
    assert "\n" not in str(caught.value)


@settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(st.sampled_from('01.,\n\r"ax-\t #é'), max_size=40))
def test_any_text_is_a_table_or_a_data_error(tmp_path, text):
    (tmp_path / "a.csv").write_text(text, encoding="utf-8", newline="")
    try:
        source = nd.open(tmp_path / "a.csv")
    except DataError:
        return
    assert source.read_rows(slice(None)).shape == source.shape


MTX = "%%MatrixMarket matrix coordinate real general\n% note\n3 2 2\n"


@pytest.mark.parametrize(
    "text",
    [
        MTX + "1 1 5\n3 2 -1.5e0\n",
        MTX + "\n1 1 5\n\n3 2 7\n\n",
        MTX + "1 1 5\n1 1 2\n",
        MTX.replace("real", "integer") + "2 1 5\n3 2 7",
        "%%MatrixMarket matrix coordinate pattern general\n3 2 2\n1 2\n2 1\n",
        "%%MatrixMarket matrix coordinate real symmetric\n3 3 3\n1 1 4\n2 1 5\n3 2 6\n",
        "%%MatrixMarket matrix coordinate real skew-symmetric\n3 3 1\n2 1 5\n",
        "%%MatrixMarket matrix coordinate real general\n3 2 0\n",
        "%%MatrixMarket matrix array integer general\n3 2\n1\n2\n3\n4\n5\n6\n",
    ],
)
def test_matrix_market_agrees_with_scipy(tmp_path, text):
    (tmp_path / "a.mtx").write_text(text)
    block = nd.open(tmp_path / "a.mtx").read_rows(slice(None))
    np.testing.assert_array_equal(dense(block), dense(mmread(tmp_path / "a.mtx")))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "line 1 is not that of a Matrix Market matrix"),
        ("%%MatrixMarket vector coordinate real general\n", "line 1 is not"),
        (MTX.replace("real", "complex"), "of kind coordinate complex general is not read here"),
        (MTX.split("3 2 2", maxsplit=1)[0], "it ends before the sizes"),
        (MTX.replace("3 2 2", "3 2 -2"), "line 3: '3 2 -2' are not the sizes"),
        (MTX.replace("3 2 2", "3 2"), "line 3: '3 2' are not the sizes"),
        (MTX + "1 1 5\n", "1 entries where the sizes promise 2"),
        (MTX + "1 1 5\n" * 3, "3 entries where the sizes promise 2"),
        (MTX + "1 1 5\n4 1 5\n", r"entry 2 lies at \(4, 1\), outside 3 x 2"),
        (MTX + "1 0 5\n2 1 5\n", r"entry 1 lies at \(1, 0\), outside 3 x 2"),
        (MTX + "1 1 5\n2 1 x\n", "line 5, '2 1 x' is not an entry"),
        (MTX + "1 1 5\n\n2 1\n", "line 6, '2 1' is not an entry"),
        (MTX + "1 1 5\n2 99999999999999999999 1\n", "line 5, .* is not an entry"),
        (MTX.replace("general", "symmetric") + "1 1 5\n2 1 5\n", "symmetric, but 3 x 2"),
        (
            MTX.replace("3 2 2", "3 2 99999999999999") + "1 1 5\n",
            "1 entries where the sizes promise 99999999999999",
        ),
        (MTX.replace("3 2 2", "0 2 0"), "empty .0 rows, 2 columns."),
    ],
)
def test_faults_of_matrix_market_files_are_named(tmp_path, text, message):
    (tmp_path / "a.mtx").write_text(text)
    with pytest.raises(DataError, match=message):
        nd.open(tmp_path / "a.mtx")


def test_damaged_gzip_does_not_abort_the_process(files, tmp_path):
    """SciPy's parser calls std::terminate when its stream raises."""
    content = bytearray(files("a.mtx.gz").read_bytes())
    content[-6] ^= 0xFF  # the checksum
    (tmp_path / "a.mtx.gz").write_bytes(content)
    with pytest.raises(DataError, match="CRC check failed"):
        nd.open(tmp_path / "a.mtx.gz")


@settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(st.sampled_from("012 \n.-e%x"), max_size=30))
def test_any_matrix_market_body_is_a_table_or_a_data_error(tmp_path, text):
    (tmp_path / "a.mtx").write_text(MTX + text)
    try:
        source = nd.open(tmp_path / "a.mtx")
    except DataError:
        return
    assert source.read_rows(slice(None)).shape == (3, 2)


def test_table_larger_than_a_read_buffer(tmp_path):
    X = np.random.default_rng(0).integers(0, 9, (3000, 40))
    names = [f"row {i}" for i in range(3000)]
    source = nd.open(write_csv(tmp_path / "a.tsv.gz", X, names, [f"g{j}" for j in range(40)]))
    assert source.obs_names.tolist() == names
    np.testing.assert_array_equal(source.read_rows(slice(None)), X)


def test_parquet_faults(tmp_path):
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    frame = pandas.DataFrame({"cell": ["x", "y"], "a": [1, 2], "b": [0.5, None]})
    frame.to_parquet(tmp_path / "a.parquet", index=False)
    source = nd.open(tmp_path / "a.parquet")
    assert source.obs_names.tolist() == ["x", "y"]
    assert source.dtype == np.float64
    with pytest.raises(DataError, match=r"NaN in row 1 \(y\), column 1 \(b\)"):
        nd.check_finite(source.read_rows(slice(None)), 0, source)
    frame["kind"] = ["p", "q"]
    frame.to_parquet(tmp_path / "b.parquet", index=False)
    with pytest.raises(DataError, match="column 'kind' is not numeric"):
        nd.open(tmp_path / "b.parquet")


# --- missing, unknown, damaged


def test_missing_and_unknown(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent\.csv: no such file or folder$"):
        nd.open(tmp_path / "absent.csv")
    with pytest.raises(FileNotFoundError, match="absent: no such file or folder; bundled data sets: pbmc4k, digits"):
        nd.open("absent")
    for name in ("a.xyz", "noext", "a.npy.gz", "a.tar.gz"):
        (tmp_path / name).write_bytes(b"x")
        with pytest.raises(DataError, match=r"unknown extension .*; known: \.h5ad, \.zarr"):
            nd.open(tmp_path / name)
    with pytest.raises(DataError, match=r"a folder without matrix\.mtx"):
        nd.open(tmp_path)
    (tmp_path / "empty.zarr").mkdir()
    pytest.importorskip("zarr")
    with pytest.raises(DataError, match=r"empty\.zarr"):
        nd.open(tmp_path / "empty.zarr")


DAMAGED = [name for name in FORMATS if "10x" not in name and not name.endswith((".zarr", ".csv"))]


@pytest.mark.parametrize("name", DAMAGED)
def test_truncated_files_are_data_errors(files, tmp_path, name):
    content = files(name).read_bytes()
    path = tmp_path / name
    for fraction in (0.0, 0.1, 0.5, 0.9, 1.0):
        length = min(int(fraction * len(content)), len(content) - (16 if len(content) > 1000 else 4))
        path.write_bytes(content[:length])
        with pytest.raises(DataError) as caught, nd.open(path) as source:
            source.read_rows(slice(None))
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", [n for n in DAMAGED if n.endswith((".npy", ".npz", ".gz", ".mtx"))])
def test_flipped_bytes_never_escape_as_other_errors(files, tmp_path, name):
    content = bytearray(files(name).read_bytes())
    rng = np.random.default_rng(0)
    path = tmp_path / name
    for at in rng.integers(0, len(content), 60):
        damaged = content.copy()
        damaged[at] ^= int(rng.integers(1, 256))
        path.write_bytes(damaged)
        try:
            with nd.open(path) as source:
                source.read_rows(slice(None))
        except (DataError, MemoryError):
            pass


@pytest.mark.parametrize("kind", ["npy", "npz"])
def test_objects_are_never_unpickled(tmp_path, kind):
    class Bomb:
        def __reduce__(self):
            return (pytest.fail, ("unpickled",))

    path = tmp_path / f"a.{kind}"
    array = np.empty((2, 2), object)
    array[0, 0] = Bomb()
    np.save(path, array, allow_pickle=True) if kind == "npy" else np.savez(path, X=array)
    with pytest.raises(DataError, match="could run code"):
        nd.open(path)
    import pickle

    path.write_bytes(pickle.dumps(Path("x")))
    with pytest.raises(DataError):
        nd.open(path)


def test_absurd_shapes_allocate_nothing(tmp_path):
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (2**40, 2**20)})
    (tmp_path / "a.npy").write_bytes(header.getvalue() + b"\0" * 64)
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("X.npy", header.getvalue() + b"\0" * 64)
    with pytest.raises(DataError, match="192 bytes where its header promises"):
        nd.open(tmp_path / "a.npy")
    with pytest.raises(DataError, match=r"X\.npy is not as long as its shape"):
        nd.open(tmp_path / "a.npz")


def test_one_dimensional_and_empty_files(tmp_path):
    with pytest.raises(DataError, match=r"1 dimension\(s\), shape \(3,\)"):
        nd.open(_npy(tmp_path / "a.npy", np.zeros(3)))
    with pytest.raises(DataError, match="empty"):
        nd.open(_npy(tmp_path / "b.npy", np.zeros((0, 3))))
    with pytest.raises(DataError, match="empty"):
        nd.open(_npz(tmp_path / "c.npz", **_parts(np.zeros((3, 0)))))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"indices": [0, 9, 1]}, "row 1 has column index 9, outside 0..2"),
        ({"indices": [0, -1, 1]}, "row 1 has column index -1"),
        ({"indptr": [0, 2, 1, 3]}, "indptr decreases at row 1"),
        ({"indptr": [0, 1, 2, 4]}, "indptr runs 0..4, 3 values are stored"),
        ({"indptr": [1, 1, 2, 3]}, "indptr runs 1..3"),
        ({"indptr": [0, 3]}, "indptr has 2 entries, 3 rows need 4"),
        ({"data": [1.0, 2.0]}, "2 values but 3 column indices"),
        ({"indices": [0.0, 1.0, 2.0]}, "not integers"),
    ],
)
@pytest.mark.parametrize("container", ["npz", "h5ad"])
def test_inconsistent_csr_parts_are_named(tmp_path, change, message, container):
    parts = {"data": [1.0, 2.0, 3.0], "indices": [0, 1, 2], "indptr": [0, 1, 2, 3]} | change
    path = tmp_path / f"a.{container}"
    if container == "npz":
        _npz(path, shape=[3, 3], **parts)
    else:
        h5py = pytest.importorskip("h5py")
        with h5py.File(path, "w") as file:
            group = file.create_group("X")
            group.attrs["encoding-type"], group.attrs["shape"] = "csr_matrix", [3, 3]
            for key, value in parts.items():
                group[key] = value
    with pytest.raises(DataError, match=message), nd.open(path) as source:
        source.read_rows(slice(None))


def test_10x_folder_that_does_not_fit_together(tmp_path):
    path = write_10x_folder(tmp_path / "a", zipped=False)
    (path / "barcodes.tsv").write_text("x\ny\n")
    with pytest.raises(DataError, match="there are 5 features and 2 barcodes"):
        nd.open(path)
    (path / "barcodes.tsv").unlink()
    with pytest.raises(DataError, match=r"no barcodes\.tsv .* beside matrix\.mtx"):
        nd.open(path)


def test_hdf5_that_is_neither_anndata_nor_10x(tmp_path):
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["other"] = np.zeros((2, 2))
    with pytest.raises(DataError, match="neither an AnnData file"):
        nd.open(tmp_path / "a.h5")


# --- checks


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_first_value_that_is_not_finite_is_named(value, dtype):
    X = np.ones((4, 3), dtype)
    X[1, 2] = X[2, 0] = value
    word = "NaN" if np.isnan(value) else "-inf" if value < 0 else "inf"
    source = nd.ArraySource(X, obs_names=list("abcd"), var_names=list("xyz"))
    for block in (X, np.asfortranarray(X), sparse.csr_array(X), sparse.csr_matrix(X)):
        with pytest.raises(ValueError, match=f"^X: {word} in row 1, column 2; "):
            nd.check_finite(block)
        with pytest.raises(DataError, match=rf"^mine: {word} in row 11, column 2; "):
            nd.check_finite(block, 10, "mine")
        with pytest.raises(DataError, match=r"in row 1 \(b\), column 2 \(z\); "):
            nd.check_finite(block, 0, source)
        with pytest.raises(DataError, match=r"in row 0 \(a\), column 2 \(z\); "):
            nd.check_finite(block, np.array([3, 0, 1, 2]), source)


def test_finite_data_pass_even_where_their_sum_overflows():
    nd.check_finite(np.full((2, 2), 3e38, np.float32))
    nd.check_finite(np.array([[3e38, 3e38], [-3e38, -3e38]], np.float32))
    nd.check_finite(np.arange(4).reshape(2, 2))
    nd.check_finite(sparse.csr_array((3, 3), dtype=np.float32))
    with pytest.raises(DataError, match="inf in row 1, column 0"):
        nd.check_finite(np.array([[3e38, 3e38], [np.inf, 0]], np.float32))


@pytest.mark.parametrize("value", [-1.0, 0.5, np.nan, np.inf, -np.inf])
def test_first_value_that_is_no_count_is_named(value):
    X = np.ones((4, 3), np.float32)
    X[1, 2] = X[2, 0] = value
    for block in (X, sparse.csr_array(X)):
        with pytest.raises(DataError, match=rf"^f: {value:.9g} in row 6, column 2 is not a count"):
            nd.check_counts(block, 5, "f")


def test_counts_pass():
    for X in (COUNTS, COUNTS.astype(int), COUNTS.astype(np.uint8), COUNTS > 0, sparse.csr_array(COUNTS)):
        nd.check_counts(X)
    with pytest.raises(DataError, match="-3 in row 0, column 1"):
        nd.check_counts(np.array([[1, -3]]))


def test_bad_value_of_an_unsorted_row_is_the_leftmost():
    X = sparse.csr_array((np.array([np.nan, np.nan, 1.0]), np.array([2, 0, 1]), np.array([0, 0, 3])), shape=(2, 3))
    with pytest.raises(DataError, match="row 1, column 0"):
        nd.check_finite(X)


# --- bundled data


def test_pbmc4k():
    X, labels = datasets.load_pbmc4k(return_labels=True)
    assert isinstance(X, sparse.csr_array)
    assert X.shape == (4271, 2000)
    assert X.dtype == np.float32
    assert X.has_canonical_format
    assert X.max() == 777
    assert X.nnz == 870065
    assert np.unique(labels).tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    assert (datasets.load_pbmc4k() != X).nnz == 0
    nd.check_counts(X)
    readme = (datasets.path("pbmc4k").parent / "README.md").read_text(encoding="utf-8")
    assert "10x Genomics" in readme
    assert "ttgump/scDCC" in readme


def test_digits():
    X, labels = datasets.load_digits(return_labels=True)
    assert X.shape == (1797, 64)
    assert X.dtype == np.float32
    assert (X.min(), X.max()) == (0, 16)
    assert np.unique(labels).tolist() == list(range(10))
    np.testing.assert_array_equal(datasets.load_digits(), X)


@pytest.mark.parametrize(("name", "shape"), [("pbmc4k", (4271, 2000)), ("digits", (1797, 64))])
def test_bundled_names_and_paths_open_alike(name, shape, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    by_name, by_path = nd.open(name), nd.open(datasets.path(name))
    assert by_name.shape == by_path.shape == datasets.open(name).shape == shape
    assert by_name.labels.shape == (shape[0],)
    assert by_name.sha256() == by_path.sha256() == hashlib.sha256(datasets.path(name).read_bytes()).hexdigest()
    with pytest.raises(DataError, match="cells x genes"):
        nd.open(name, genes_by_cells=True)
    np.savez(tmp_path / "x.npz", X=COUNTS)
    (tmp_path / "x.npz").rename(tmp_path / name)
    with pytest.raises(DataError, match="unknown extension"):  # a file of that name comes first
        nd.open(name)


def test_unknown_bundled_name():
    for call in (datasets.path, datasets.open):
        with pytest.raises(ValueError, match="no bundled data set 'pbmc'; there is pbmc4k, digits"):
            call("pbmc")


# --- the development data


def test_sc_mixology_is_turned():
    source = nd.open(shared("sc_mixology/sc_celseq2.count.csv.gz"), genes_by_cells=True)
    assert source.shape == (274, 28204)
    assert source.obs_names[0] == "A1"
    assert source.var_names[0] == "ENSG00000281131"
    X = source.read_rows(slice(None))
    assert X.sum(dtype=np.float64) == 10321416
    nd.check_counts(X, 0, source)


def test_scanpy_and_worm_counts():
    source = nd.open(shared("pbmc68k_reduced/counts.npz"))
    assert source.shape == (700, 765)
    assert source.var_names[0] == "HES4"
    assert source.labels.shape == (700,)
    worm = nd.open(shared("worm_neuron/worm_neuron.npz"))
    assert worm.shape == (4186, 13488)
    nd.check_counts(worm.read_rows(slice(None)), 0, worm)


def test_pbmc4k_is_the_development_copy():
    assert shared("pbmc4k/pbmc4k.npz").read_bytes() == datasets.path("pbmc4k").read_bytes()


# --- a good citizen


def test_import_is_light():
    code = (
        "import sys, narrows.data, narrows.datasets, narrows.persistence\n"
        "heavy = {'scipy.sparse', 'sklearn', 'pandas', 'anndata', 'h5py', 'zarr', 'numba', 'pyarrow'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
