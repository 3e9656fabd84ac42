"""Tables as text, Matrix Market and parquet: what is understood, and faults named by their line."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.io import mmread

import narrows.data as nd
from data_files import dense, write_csv
from narrows.errors import DataError


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
        ("a,b\n", "a.csv: empty: it has a header but no rows"),
        ("a,b\n1,2\n3,x\n", r"a.csv: line 3, column 1 \(b\): 'x' is not a number"),
        ("a,b\n1,2\n\n3,NA\n", r"a.csv: line 4, column 1 \(b\): 'NA' is a missing value"),
        ("1,2\n3,\n", "a.csv: line 2, column 1: '' is a missing value"),
        ("NA,2\n3,4\n", "a.csv: line 1, column 0: 'NA' is a missing value"),
        (",a,b\nx,1,2\ny,1\n", "a.csv: line 3, 2 cells where the lines before have 3"),
        ("1,2\n3,4,5\n", "a.csv: line 2, 3 cells where"),
        ("a,b,c\n1,2\n", "a.csv: line 2, 2 cells under a header of 3"),
        ("a,b\n1,2\n1,1_0\n", r"line 3, column 1 \(b\): '1_0' is not a number"),
        ("a,b\n1,0x10\n", r"line 2, column 1 \(b\): '0x10' is not a number"),
        ("a\nx\ny\n", "a.csv: no column of numbers among 1"),
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
        ("", "line 1 is not the header of a Matrix Market matrix"),
        ("%%MatrixMarket vector coordinate real general\n", "line 1 is not"),
        (MTX.replace("real", "complex"), "of the kind 'coordinate complex general' are not supported"),
        (MTX.split("3 2 2", maxsplit=1)[0], "it ends before the line with the matrix sizes"),
        (MTX.replace("3 2 2", "3 2 -2"), "line 3: '3 2 -2' is not a line of matrix sizes"),
        (MTX.replace("3 2 2", "3 2"), "line 3: '3 2' is not a line of matrix sizes"),
        (MTX + "1 1 5\n", "it has 1 entries, its size line says 2"),
        (MTX + "1 1 5\n" * 3, "it has 3 entries, its size line says 2"),
        (MTX + "1 1 5\n4 1 5\n", r"entry 2 is at \(4, 1\), outside the matrix of 3 x 2"),
        (MTX + "1 0 5\n2 1 5\n", r"entry 1 is at \(1, 0\), outside the matrix of 3 x 2"),
        (MTX + "1 1 5\n2 1 x\n", "line 5, '2 1 x' is not an entry"),
        (MTX + "1 1 5\n\n2 1\n", "line 6, '2 1' is not an entry"),
        (MTX + "1 1 5\n2 99999999999999999999 1\n", "line 5, .* is not an entry"),
        (MTX.replace("general", "symmetric") + "1 1 5\n2 1 5\n", "a symmetric matrix cannot be 3 x 2"),
        (
            MTX.replace("3 2 2", "3 2 99999999999999") + "1 1 5\n",
            "says 99999999999999 entries, which need at least 399999999999996 bytes; the file has at most 7",
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
    assert nd.read_obs(tmp_path / "b.parquet", "kind").tolist() == ["p", "q"]
