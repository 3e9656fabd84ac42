"""Sources and readers: every container gives the same rows; values are checked; data sets are bundled."""

from __future__ import annotations

import hashlib
import logging
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

import narrows.data as nd
from data_files import CELLS, COUNTS, FORMATS, GENES, dense, shared, write_10x_folder, write_10x_h5, write_npz
from narrows import datasets
from narrows.data.readers import FORMATS as FORMATS_READ
from narrows.errors import DataError

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
    "name", ["a.npy", "int.npy", "csr.npz", "parts", "csr.h5ad", "dense.h5ad", "csr.zarr", "dense.zarr", "v3.h5"]
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
        (np.zeros(3), r"shape \(3,\), 1 dimension\(s\)"),
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
    with pytest.raises(DataError, match="no layer 'absent'; the file has 'doubled'"):
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
    with pytest.raises(DataError, match="no feature type 'CRISPR'; the file has 'Gene Expression', 'Antibody Capture'"):
        nd.open(path, layer="CRISPR")


def test_10x_genomes_of_version_2(tmp_path):
    path = write_10x_h5(tmp_path / "a.h5", version=2)
    assert nd.open(path, layer="GRCh38").shape == (7, 5)
    with pytest.raises(DataError, match="no genome 'mm10'; the file has 'GRCh38'"):
        nd.open(path, layer="mm10")


def test_repeated_gene_symbols_become_unique(tmp_path):
    path = write_10x_folder(tmp_path / "a", zipped=False)
    (path / "genes.tsv").write_text("".join(f"E{j}\t{s}\n" for j, s in enumerate(["A", "B", "A", "A-1", "A"])))
    assert nd.open(path).var_names.tolist() == ["A", "B", "A-2", "A-1", "A-3"]


def test_npz_tables_are_chosen_by_name(tmp_path):
    path = write_npz(tmp_path / "a.npz", raw=COUNTS, scaled=COUNTS * 2, labels=np.arange(7))
    with pytest.raises(DataError, match="several tables; choose one with layer=NAME: raw, scaled"):
        nd.open(path)
    source = nd.open(path, layer="scaled")
    np.testing.assert_array_equal(source.read_rows(slice(None)), COUNTS * 2)
    assert source.labels.tolist() == list(range(7))
    with pytest.raises(DataError, match="no table 'labels'; the file has 'raw', 'scaled'"):
        nd.open(path, layer="labels")
    with pytest.raises(DataError, match=r"it holds no 2-D array of numbers, only a \(3,\) float64"):
        nd.open(write_npz(tmp_path / "b.npz", a=np.zeros(3)))


@pytest.mark.parametrize("name", ["a.npy", "named.csv", "a.mtx", "a.parquet", "parts.npz"])
def test_formats_without_layers_say_so(files, name):
    with pytest.raises(DataError, match="no layers; drop layer='x'"):
        nd.open(files(name), layer="x")


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


# --- what is known of the rows


@pytest.mark.parametrize("suffix", ["h5ad", "zarr"])
@pytest.mark.filterwarnings("ignore")
def test_columns_of_obs(suffix, tmp_path):
    anndata, pandas = pytest.importorskip("anndata"), pytest.importorskip("pandas")
    if suffix == "zarr":
        pytest.importorskip("zarr")
    words = ["b", "a", "b", "ü"]
    columns = {
        "category": pandas.Categorical(words, categories=["z", "ü", "b", "a"]),
        "string": words,
        "numbers": pandas.Categorical([7, 5, 7, 9]),
        "int": np.array([3, -1, 3, 2], np.int16),
        "nullable": pandas.array([3, 1, 3, 2], dtype="Int64"),
        "bool": [True, False, True, True],
        "share": [0.5, 1.0, 0.25, 0.0],
    }
    some = {
        "some": pandas.Categorical(["a", "b", None, "a"]),
        "fewer": pandas.array([3, 1, None, 2], dtype="Int64"),
    }
    adata = anndata.AnnData(np.ones((4, 2), np.float32), obs=pandas.DataFrame(columns | some, index=list("wxyz")))
    path = tmp_path / f"x.{suffix}"
    getattr(adata, f"write_{suffix}")(path)
    for name, values in columns.items():
        found = nd.read_obs(path, name)
        assert found.tolist() == list(values), name
        assert found.dtype.kind == np.asarray(list(values)).dtype.kind
    for name in some:
        with pytest.raises(DataError, match=f"x.{suffix}: column '{name}' of obs has a missing value in row 2$"):
            nd.read_obs(path, name)
    for name in ("absent", "_index"):
        with pytest.raises(DataError, match=rf"obs has no column '{name}'; it has 'category', 'string', 'numbers'"):
            nd.read_obs(path, name)


def test_columns_of_obs_of_before_anndata_had_frames(tmp_path):
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "old.h5ad", "w") as file:
        file["X"] = np.ones((3, 2), np.float32)
        rows = [(b"w", 1, b"one"), (b"x", 0, b"two"), (b"y", 1, b"one")]
        file["obs"] = np.array(rows, [("index", "S1"), ("louvain", "i4"), ("name", "S3")])
    assert nd.read_obs(tmp_path / "old.h5ad", "louvain").tolist() == [1, 0, 1]
    assert nd.read_obs(tmp_path / "old.h5ad", "name").tolist() == ["one", "two", "one"]


# --- a good citizen


def test_import_is_light():
    code = (
        "import sys, narrows.data, narrows.datasets, narrows.persistence\n"
        "heavy = {'scipy.sparse', 'sklearn', 'pandas', 'anndata', 'h5py', 'zarr', 'numba', 'pyarrow'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_docstring_of_open_names_every_format():
    text = " ".join(nd.open.__doc__.split())
    for form in FORMATS_READ:
        assert form.name in text, form
        assert all(part in text for part in form.contents.split(", ")), form
