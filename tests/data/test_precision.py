"""No digit of a number is lost before the network: from every container, through normalisation, to results."""

from __future__ import annotations

import decimal
import tracemalloc
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
from scipy import sparse
from scipy.io import mmwrite
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import narrows.data as nd
from data_files import dense
from estimator_cases import small
from narrows.data.normalize import Normalizer
from narrows.data.normalized import NormalizedSource
from narrows.errors import DataError

TIMES = np.column_stack([1_700_000_000 + 3 * np.arange(290) ** 2 % 997, np.arange(290) % 7 + 1]).astype(np.int64)
"""Seconds, of which float32 keeps one in 128; and a small whole number."""


def anndata_file(path: Path, X: Any) -> None:
    anndata = pytest.importorskip("anndata")
    found = anndata.AnnData(X)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # anndata on its choice of zarr format
        found.write_zarr(path) if path.suffix == ".zarr" else found.write_h5ad(path)


def parts(path: Path, X: Any) -> None:
    path.mkdir()
    for name in ("data", "indices", "indptr"):
        np.save(path / f"{name}.npy", getattr(X, name))
    np.save(path / "shape.npy", X.shape)


def cell_ranger(path: Path, X: Any) -> None:
    h5py = pytest.importorskip("h5py")
    with h5py.File(path, "w") as file:
        group = file.create_group("matrix")
        group["data"], group["indices"], group["indptr"], group["shape"] = X.data, X.indices, X.indptr, X.shape[::-1]
        group["barcodes"] = np.array([f"c{i}" for i in range(X.shape[0])], "S")
        group["features/id"] = group["features/name"] = np.array(["g0", "g1"], "S")


FILES: dict[str, Any] = {
    "int.npy": lambda p: np.save(p, TIMES),
    "uint.npy": lambda p: np.save(p, TIMES.astype(np.uint32)),
    "big.npy": lambda p: np.save(p, TIMES.astype(">i4")),
    "a.npz": lambda p: np.savez(p, X=TIMES.astype(np.uint64)),
    "csr.npz": lambda p: sparse.save_npz(p, sparse.csr_array(TIMES)),
    "csc.npz": lambda p: sparse.save_npz(p, sparse.csc_array(TIMES)),
    "parts": lambda p: parts(p, sparse.csr_array(TIMES.astype(np.int32))),
    "a.csv": lambda p: p.write_text("".join(f"{a},{b}\n" for a, b in TIMES)),
    "names.tsv": lambda p: p.write_text("\tt\tn\n" + "".join(f"r{a}\t{a}\t{b}\n" for a, b in TIMES)),
    "a.mtx": lambda p: mmwrite(p, sparse.coo_array(TIMES)),
    "array.mtx": lambda p: mmwrite(p, TIMES),
    "int.parquet": lambda p: pandas.DataFrame(TIMES, columns=["t", "n"]).to_parquet(p),
    "decimal.parquet": lambda p: pandas.DataFrame(
        {"t": [decimal.Decimal(int(t)) for t in TIMES[:, 0]], "n": TIMES[:, 1].astype(np.int8)}
    ).to_parquet(p),
    "dense.h5ad": lambda p: anndata_file(p, TIMES),
    "csr.h5ad": lambda p: anndata_file(p, sparse.csr_matrix(TIMES)),
    "csc.h5ad": lambda p: anndata_file(p, sparse.csc_matrix(TIMES)),
    "csr.zarr": lambda p: anndata_file(p, sparse.csr_matrix(TIMES)),
    "v3.h5": lambda p: cell_ranger(p, sparse.csr_array(TIMES)),
}
ARRAYS: dict[str, Any] = {
    "int64": TIMES,
    "uint32": TIMES.astype(np.uint32),
    "float64": TIMES.astype(float),
    "longdouble": TIMES.astype(np.longdouble),
    "objects": TIMES.astype(object),
    "fortran": np.asfortranarray(TIMES),
    "csr": sparse.csr_array(TIMES),
    "coo": sparse.coo_array(TIMES),
    "frame": pandas.DataFrame(TIMES, columns=["t", "n"]),
    "nullable": pandas.DataFrame(TIMES, columns=["t", "n"]).astype("Int64"),
}


def exactly(source: nd.Source) -> None:
    """Rows are exact however they are read, and are normalised from exact values."""
    for rows in (slice(None), slice(3, 90), [5, 280, 5], np.arange(290) % 3 == 0):
        np.testing.assert_array_equal(dense(source.read_rows(rows)), TIMES[rows])
    for kind in ("standard", "minmax"):
        fitted = Normalizer(kind).fit(source)
        if kind == "standard":
            wanted = StandardScaler().fit_transform(TIMES)
        else:
            wanted = (TIMES - TIMES.min(axis=0)) / np.ptp(TIMES, axis=0)
        for dtype, error in ((np.float32, 2e-7), (np.float64, 1e-12)):
            table = NormalizedSource(source, fitted, dtype)
            assert table.dtype == (np.float64 if source.dtype == np.float64 else dtype)
            for rows in (slice(None), [7, 2]):
                for block in (table.read_rows(rows), table.read_stored(rows)):
                    assert block.dtype == table.dtype
                    np.testing.assert_allclose(dense(block), wanted[rows], rtol=error, atol=error)


@pytest.mark.parametrize("name", FILES)
def test_files_keep_every_digit(tmp_path: Path, name: str) -> None:
    if "parquet" in name:
        pytest.importorskip("pyarrow")
    FILES[name](tmp_path / name)
    with nd.open(tmp_path / name) as source:
        assert source.dtype == np.float32  # of results
        exactly(source)


def test_arrays_keep_every_digit() -> None:
    for name, X in ARRAYS.items():
        exactly(nd.as_source(X))
        # Another block, later.
        fitted = Normalizer("standard").fit(X)
        later = X.iloc[100:] if hasattr(X, "iloc") else X.tocsr()[100:] if sparse.issparse(X) else X[100:]
        wanted = StandardScaler().fit(TIMES).transform(TIMES[100:])
        np.testing.assert_allclose(fitted.transform(later), wanted, rtol=2e-7, atol=2e-7, err_msg=name)
    digests = {nd.as_source(TIMES + [[step, 0]]).sha256() for step in range(3)}
    assert len(digests) == 3


def test_what_float32_holds_is_read_as_float32(tmp_path: Path) -> None:
    counts = np.random.default_rng(0).poisson(2.0, (40, 2)) + [2**24 - 20, 0]
    for X in (counts, sparse.csr_array(counts)):
        assert nd.as_source(X).read_rows(slice(None)).dtype == np.float32
    (tmp_path / "a.csv").write_text("0.5,16777216\n-2,1e30\n".replace("1e30", str(float(np.float32(1e30)))))
    assert nd.open(tmp_path / "a.csv").read_rows(slice(None)).dtype == np.float32
    (tmp_path / "b.csv").write_text("0.1,16777217\n")
    source = nd.open(tmp_path / "b.csv")
    assert source.read_rows(slice(None)).tolist() == [[0.1, 16777217]]
    assert source.dtype == np.float32


def test_an_inverse_gives_the_times_back() -> None:
    for kind in ("standard", "minmax"):
        fitted = Normalizer(kind).fit(TIMES)
        out = fitted.inverse_transform(fitted.transform(TIMES))
        assert out.dtype == np.float64
        np.testing.assert_array_equal(np.round(out), TIMES)
        same = Normalizer.from_dict(fitted.to_dict())
        assert same.inverse_dtype(np.float32) == np.float64
        assert Normalizer(kind).fit(TIMES[:, 1:]).inverse_dtype(np.float32) == np.float32


@pytest.mark.parametrize("name", ["int64", "csr", "frame", "source", "blocks", "csr source"])
def test_a_network_in_float64_sees_every_digit(name: str) -> None:
    """Without a normaliser: rows that float32 takes for one have codes of their own."""
    given = {"source": nd.as_source(TIMES), "blocks": nd.as_source(TIMES), "csr source": nd.as_source(ARRAYS["csr"])}
    X = (ARRAYS | given)[name]
    ae = small(1, precision="float64", max_iter=1, loss="huber", activation="linear", early_stopping=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ae.fit(X, **({"block_bytes": 16 * 32} if name == "blocks" else {}))
    codes = ae.transform(X)
    assert codes.dtype == np.float64
    assert len(np.unique(codes)) == len(np.unique(TIMES, axis=0))
    assert ae.reconstruct(X).dtype == np.float64
    if name != "blocks":
        reference = small(1, **{n: ae.get_params()[n] for n in ("precision", "loss", "activation", "early_stopping")})
        reference.set_params(max_iter=1).fit(TIMES.astype(float))
        np.testing.assert_allclose(codes, reference.transform(TIMES.astype(float)), rtol=1e-9)


def test_a_pipeline_keeps_them_too() -> None:
    for kind in ("none", "standard"):
        pipe = make_pipeline(Normalizer(kind), small(1, precision="float64", max_iter=1, loss="huber"))
        assert len(np.unique(pipe.fit(TIMES).transform(TIMES))) == len(np.unique(TIMES, axis=0))


def test_whole_numbers_give_results_in_the_precision_of_the_network() -> None:
    X = np.random.default_rng(0).integers(0, 9, (60, 5))
    for given in (X, X.astype(np.uint8), sparse.csr_array(X), nd.as_source(X)):
        for precision in ("float32", "float64"):
            ae = small(2, precision=precision, max_iter=1).fit(given)
            assert ae.transform(given).dtype == ae.reconstruct(given).dtype == precision
    assert small(2, precision="float64", max_iter=1).fit(X.astype("f4")).transform(X.astype("f4")).dtype == np.float32


def test_blocks_of_whole_numbers_are_rounded_block_by_block(tmp_path: Path) -> None:
    """Neither a raw source nor a normalised one is ever in memory as a whole, in float64 or at all."""
    X = 1_700_000_000 + np.random.default_rng(0).integers(0, 10**6, (4000, 250))
    np.save(tmp_path / "a.npy", X.astype(np.int32))
    source = nd.open(tmp_path / "a.npy")
    fitted = Normalizer("standard").fit(X[:500])
    for table in (source, NormalizedSource(source, fitted)):
        ae = small(1, max_iter=1, loss="huber")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ae.fit(nd.as_source(X[:300]), block_bytes=1 << 18)  # what is loaded once
            tracemalloc.start()
            ae.fit(table, block_bytes=1 << 18)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < X.nbytes / 4  # half a copy in float32


def found_warnings(X: Any, **params: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ae = small(1, loss="huber", **({"max_iter": 2} | params)).fit(X)
        ae.transform(X)
    return [str(each.message) for each in caught]


def test_a_column_that_collapses_is_named_once() -> None:
    rng = np.random.default_rng(0)
    said = r"X: column 0 (t) has 98 distinct values in 290 rows, and 9 in float32: standardise the data before, or"
    distinct = len(np.unique(TIMES[:, 0])), len(np.unique(TIMES[:, 0].astype(np.float32)))
    said = said.replace("98", str(distinct[0])).replace("and 9 ", f"and {distinct[1]} ")
    for X in (ARRAYS["frame"], nd.as_source(ARRAYS["frame"])):
        (line,) = found_warnings(X)
        assert line.startswith(said)
    unnamed = [
        TIMES, ARRAYS["csr"], ARRAYS["longdouble"], nd.as_source(ARRAYS["csr"]),
        np.array([[0, 1], [1, 2], [2**24, 3], [2**24 + 1, 4]]),
        1e8 + rng.normal(size=(300, 2)),
    ]  # fmt: skip
    for X in unnamed:
        (line,) = found_warnings(X)
        assert "column 0 has" in line
    (line,) = found_warnings(np.column_stack([TIMES[:, 1], TIMES[:, 0], TIMES[:, 0] + 7]))
    assert "column 1 has" in line
    assert "and 1 more column(s)" in line
    # In blocks and in one sample of many rows.
    (line,) = found_warnings(np.column_stack([1_700_000_000 + np.arange(50_000), np.zeros(50_000)]), max_iter=1)
    assert "column 0" in line


def test_other_columns_give_no_warning() -> None:
    rng = np.random.default_rng(0)
    silent = [
        rng.random((5000, 3)),
        rng.normal(100, 10, (5000, 2)),
        rng.integers(0, 1000, (500, 3)),
        rng.normal(size=(300, 2)).astype(np.float32) + np.float32(1e8),
        np.full((50, 2), 1.7e9 + 0.1),
        2**25 + 4 * np.arange(400).reshape(200, 2),
        sparse.random_array((300, 20), density=0.1, rng=rng),
    ]
    for X in silent:
        assert not found_warnings(X)
    normalised = NormalizedSource(nd.as_source(TIMES), Normalizer("standard").fit(TIMES))
    assert not found_warnings(normalised)
    (line,) = found_warnings(NormalizedSource(nd.as_source(TIMES), Normalizer("none").fit(TIMES)))
    assert "column 0" in line


def test_too_large_for_float32_is_refused_with_its_place(tmp_path: Path) -> None:
    rows = "0.5,1\n" * 20
    (tmp_path / "a.csv").write_text(rows + "0.5,1e39\n" + rows)
    source = nd.open(tmp_path / "a.csv")
    place = r"1e\+39 in row 20, column 1; too large for float32"
    with pytest.raises(DataError, match=place):
        small(1).fit(source)
    none = NormalizedSource(source, Normalizer("none").fit(source))
    for read in (none.read_rows, none.read_stored):
        with pytest.raises(DataError, match=place):
            read(slice(10, None))
    X = source.read_rows(slice(None))
    with pytest.raises(DataError, match=place):
        small(1).fit(X)
    wide = NormalizedSource(source, Normalizer("none").fit(source), np.float64)
    np.testing.assert_array_equal(wide.read_rows(slice(None)), X)
    # Normalised, it fits; a later row need not.
    fitted = Normalizer("standard").fit(source)
    np.testing.assert_allclose(
        NormalizedSource(source, fitted).read_rows(slice(None)), StandardScaler().fit_transform(X), rtol=1e-6, atol=1e-6
    )
    later = NormalizedSource(source, Normalizer("standard").fit(X[:20] + 0.01 * np.arange(20)[:, None]))
    with pytest.raises(DataError, match="in row 20, column 1; too large for float32"):
        later.read_rows(slice(None))
