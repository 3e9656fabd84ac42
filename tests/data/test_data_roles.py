"""Which line is the header and what each column is: by the header, by whole columns and by what the caller says."""

from __future__ import annotations

import codecs
import datetime
import decimal
import gzip
import logging
import os
import zlib

import numpy as np
import pytest

import narrows.data as nd
from data_files import CELLS, COUNTS, GENES, dense, write_10x_folder, write_npz, write_parts
from narrows.data.columns import column_of
from narrows.errors import DataError


def opened(path, text, **options):
    path.write_text(text, encoding="utf-8")
    return nd.open(path, **options)


def facts(source):
    """Row names, column names, obs and values."""
    names = [None if found is None else found.tolist() for found in (source.obs_names, source.var_names)]
    obs = {key: column_of(source.obs, key, "").values.tolist() for key in source.obs}
    return (*names, obs, source.read_rows(slice(None)).tolist())


WAVES = "400,402.5,405"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        # A header of numbers, by the name of the first column, by its even steps, or by quotes.
        (f"sample,{WAVES}\ns1,1,3,2\ns2,4,4,5\n", (["s1", "s2"], ["400", "402.5", "405"], {}, [[1, 3, 2], [4, 4, 5]])),
        (f"what,{WAVES}\ns1,1,3,2\ns2,4,4,5\n", (["s1", "s2"], ["400", "402.5", "405"], {}, [[1, 3, 2], [4, 4, 5]])),
        (f"Sample ID,{WAVES}\n1a,1,3,2\n", (["1a"], ["400", "402.5", "405"], {}, [[1, 3, 2]])),
        (f"h2o,{WAVES}\n7,1,3,2\n8,4,4,5\n", (None, ["h2o", "400", "402.5", "405"], {}, [[7, 1, 3, 2], [8, 4, 4, 5]])),
        (f"s,kind,{WAVES}\nx,A,1,3,2\n", (["x"], ["400", "402.5", "405"], {"kind": ["A"]}, [[1, 3, 2]])),
        (f',{WAVES}\n5,1,3,2\n7,4,4,5\n', (["5", "7"], ["400", "402.5", "405"], {}, [[1, 3, 2], [4, 4, 5]])),
        ('"40","7"\n1,2\n3,4\n', (None, ["40", "7"], {}, [[1, 2], [3, 4]])),
        ('"","9","7"\n"x",1,2\n', (["x"], ["9", "7"], {}, [[1, 2]])),
        ('"9","7"\n"x",1,2\n', (["x"], ["9", "7"], {}, [[1, 2]])),
        ("9,7\n1,1,2\n2,3,4\n", (["1", "2"], ["9", "7"], {}, [[1, 2], [3, 4]])),
        ("0,1,2,3\n5,9,1,2\n4,1,7,2\n", (None, list("0123"), {}, [[5, 9, 1, 2], [4, 1, 7, 2]])),
        # Names that look like numbers or like missing values.
        ("NA,b,c\n1,2,3\n", (None, ["NA", "b", "c"], {}, [[1, 2, 3]])),
        ("cell,1E5,b\nx,2,3\n", (["x"], ["1E5", "b"], {}, [[2, 3]])),
        ("INF,NA,1E5\n1,2,3\n", (None, ["INF", "NA", "1E5"], {}, [[1, 2, 3]])),
        (",INF,NaN\nx,1,2\n", (["x"], ["INF", "NaN"], {}, [[1, 2]])),
        ("gene,c1\nNA,1\nINF,2\n1E5,3\nACTB,4\nCD4,5\nCD8,6\nB2M,7\n", (
            ["NA", "INF", "1E5", "ACTB", "CD4", "CD8", "B2M"], ["c1"], {}, [[i] for i in range(1, 8)])),
        # Data without a header.
        ("3,1,2\n1,2,3\n", (None, None, {}, [[3, 1, 2], [1, 2, 3]])),
        ("x,5,5\ny,5,6\n", (["x", "y"], None, {}, [[5, 5], [5, 6]])),
        ("x,1\ny,2\n", (["x", "y"], None, {}, [[1], [2]])),
        ("x,0,1\ny,1,0\n", (["x", "y"], None, {}, [[0, 1], [1, 0]])),
        ('1,"A",2\n3,"B",4\n', (None, None, {"1": ["A", "B"]}, [[1, 2], [3, 4]])),
        # Text columns beside the first are obs.
        ("len,wide,k\n1,2,setosa\n3,4,setosa\n", (None, ["len", "wide"], {"k": ["setosa"] * 2}, [[1, 2], [3, 4]])),
        ("id,a,site,b\nx,1,Bonn,2\ny,3,NA,4\n", (["x", "y"], ["a", "b"], {"site": ["Bonn", "NA"]}, [[1, 2], [3, 4]])),
    ],
)  # fmt: skip
def test_the_first_line_and_the_columns(tmp_path, text, expected):
    found = facts(opened(tmp_path / "a.csv", text))
    assert found == expected
    # The same table reads the same in other separators.
    for separator, name in (
        (";", "b.csv"),
        ("\t", "c.csv"),
        ("|", "d.csv"),
        ("\t", "e.tsv"),
        ("\t", "f.txt"),
        ("|", "g"),
    ):
        if '"' not in text:
            path = tmp_path / (name if "." in name else "h.txt")
            assert facts(opened(path, text.replace(",", separator))) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            'a,b\n"1,000",2\n3,4\n',
            r"line 2, column 0 \(a\): '1,000' is not a number; .*drop_columns=\['a'\].*index_col",
        ),
        ('a,b\n"1,000",2\n"2,500",4\n', r"line 2, column 0 \(a\): '1,000' is not a number"),
        ("a,b\n12%,2\n50%,4\n", r"line 2, column 0 \(a\): '12%' is not a number"),
        ("a,b\n1,2\n3,4\nx5,6\n", r"line 4, column 0 \(a\): 'x5' is not a number"),
        ("id,a,b\nx,1,one\ny,2,2\nz,3,3\n", r"line 2, column 2 \(b\): 'one' is not a number"),
        ("1,2,x\n3,4,5\n", "line 1, 'x' stands among numbers: .*header=True or header=False"),
        ("2,2,2,x\n3,4,5,1\n", "line 1, column 3: 'x' is not a number.*if this line is the header, give header=True"),
        (",2,1\n4,5,6\n7,8,9\n", "line 1, column 0: '' is a missing value"),
        ("id,kind\nx,A\n", "no column of numbers among 2"),
        ("a,b\n1,1e399\n", r"line 2, column 1 \(b\): 1e399 is too large for float64; scale the data"),
        ("a,b\n1,-1e399\n", r"line 2, column 1 \(b\): -1e399 is too large"),
    ],
)
def test_one_cell_changes_no_role(tmp_path, text, message):
    with pytest.raises(DataError, match=message) as caught:
        opened(tmp_path / "a.csv", text)
    assert "\n" not in str(caught.value)


def test_whole_columns_decide_beyond_the_first_lines(tmp_path, caplog):
    """The first lines only begin a guess. A column is what most of its cells are."""
    many = [f"{i}.5" for i in range(300)]
    lines = [f"{name},{value},{i}" for i, (name, value) in enumerate(zip(many, ["x"] + many[1:], strict=True))]
    with pytest.raises(DataError, match=r"line 2, column 1 \(b\): 'x' is not a number"):
        opened(tmp_path / "a.csv", "a,b,c\n" + "\n".join(lines))
    late = [f"{i},{i if i < 100 else 'text'},{i}" for i in range(300)]
    source = opened(tmp_path / "b.csv", "a,b,c\n" + "\n".join(late))
    assert source.obs["b"].values.tolist() == [*map(str, range(100))] + ["text"] * 200
    assert source.var_names.tolist() == ["a", "c"]
    words = [f"{'w' if i < 100 else ''}{i},{i},{i}" for i in range(300)]
    with pytest.raises(DataError, match=r"line 2, column 0 \(a\): 'w0' is not a number; .*index_column='a'"):
        opened(tmp_path / "c.csv", "a,b,c\n" + "\n".join(words))
    assert nd.open(tmp_path / "c.csv", index_column="a").obs_names[299] == "299"


def test_flags(tmp_path):
    path = tmp_path / "a.csv"
    text = "n,a,b,kind\n1,2,3,A\n4,5,6,B\n"
    assert facts(opened(path, text, index_column="n"))[:2] == (["1", "4"], ["a", "b"])
    assert facts(opened(path, text, index_column=0)) == facts(opened(path, text, index_column="0"))
    assert facts(opened(path, text, index_column="kind"))[:3] == (["A", "B"], ["n", "a", "b"], {})
    assert facts(opened(path, text, drop_columns=["n", 2]))[1:] == (["a"], {"kind": ["A", "B"]}, [[2], [5]])
    for drop in (np.array(["n", "b"]), np.array([0, 2]), {"n", 2}, (name for name in "nb")):
        with opened(path, text, drop_columns=drop, untrusted=isinstance(drop, set)) as source:
            assert source.var_names.tolist() == ["a"]
    assert opened(path, text, index_column=np.int64(0)).obs_names.tolist() == ["1", "4"]
    for options in ({"index_column": True}, {"index_column": 1.5}, {"drop_columns": "n"}, {"drop_columns": [True]}):
        with pytest.raises(TypeError, match=next(iter(options))):
            opened(path, text, **options)
    assert facts(opened(path, "x,1\ny,2\n", index_column=False, header=False))[2] == {"0": ["x", "y"]}
    assert facts(opened(path, "1,2\n3,4\n", header=True)) == (None, ["1", "2"], {}, [[3, 4]])
    assert facts(opened(path, "7,a\n8,3\n9,4\n", header=True)) == (None, ["7", "a"], {}, [[8, 3], [9, 4]])
    assert opened(path, "400,7\n1,2\n", header=True, index_column="400").obs_names.tolist() == ["1"]
    assert opened(path, text, genes_by_cells=True, index_column="n", drop_columns=["kind"]).shape == (2, 2)
    assert opened(path, text, genes_by_cells=True, index_column="n").obs == {}
    for options, message in (
        ({"index_column": "z"}, "no column 'z' for index_column; it has 'n', 'a', 'b', 'kind'"),
        ({"drop_columns": [9]}, "no column 9 for drop_columns"),
        ({"drop_columns": ["n"], "index_column": "n"}, "in both"),
        ({"drop_columns": ["n", "a", "b"]}, "no column of numbers"),
    ):
        with pytest.raises(DataError, match=message):
            opened(path, text, **options)
    with pytest.raises(DataError, match="2 columns are called 'a'; give a number"):
        opened(path, "a,a,b\n1,2,3\n", index_column="a")
    np.save(tmp_path / "a.npy", COUNTS)
    for options in ({"header": True}, {"index_column": "a"}, {"drop_columns": ["a"]}):
        for data in (tmp_path / "a.npy", "pbmc4k"):
            with pytest.raises(DataError, match=rf"{next(iter(options))}=.* is for tables \(\.csv, "):
                nd.open(data, **options)


def test_roles_of_one_table_hold_in_the_next(tmp_path):
    first = opened(tmp_path / "a.csv", f"thing,{WAVES},kind,extra\n1,1,3,2,A,0\n2,4,4,5,B,0\n", index_column="thing",
                   drop_columns=["extra"])  # fmt: skip
    assert first.roles == {
        "header": True, "index_column": "thing", "drop_columns": ["extra"], "text_columns": ["kind"],
    }  # fmt: skip
    # One row, whose kind looks like a number, without the column that was dropped, in another order.
    again = opened(tmp_path / "b.csv", f"kind,{WAVES},thing\n7,1,3,2,12\n", roles=first.roles)
    assert facts(again) == (["12"], ["400", "402.5", "405"], {"kind": ["7"]}, [[1, 3, 2]])
    # Without them this line of numbers would be data, or the header; both files say so in a warning.
    bare = opened(tmp_path / "c.csv", "1,2,3,4\n9,3,5,1\n7,3,9,1\n", header=False)
    assert bare.shape == (3, 4)
    assert opened(tmp_path / "c.csv", "1,2,3,4\n9,3,5,1\n7,3,9,1\n").shape == (2, 4)
    assert opened(tmp_path / "c.csv", "1,2,3,4\n9,3,5,1\n7,3,9,1\n", roles=bare.roles).shape == (3, 4)
    assert opened(tmp_path / "c.csv", "a,b,c,d\n9,3,5,1\n", roles=bare.roles).var_names.tolist() == list("abcd")
    # An index without a name is absent in other tables: no feature takes its place.
    unnamed = opened(tmp_path / "d.csv", ",a,b\n7,5,6\n9,7,8\n")
    assert facts(opened(tmp_path / "e.csv", "a,b\n5,6\n", roles=unnamed.roles)) == (None, ["a", "b"], {}, [[5, 6]])
    # Columns called 0 and 1 are not mixed up with numbers of columns.
    indexed = opened(tmp_path / "d.csv", ",0,1\n0,5,6\n1,7,8\n")
    assert indexed.obs_names.tolist() == ["0", "1"]
    assert facts(opened(tmp_path / "e.csv", ",0,1\n9,5,6\n", roles=indexed.roles)) == (["9"], ["0", "1"], {}, [[5, 6]])


def test_the_log_says_what_was_taken(tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="narrows")

    def said(text, **options):
        caplog.clear()
        opened(tmp_path / "a.csv", text, **options)
        return [(r.levelname, r.getMessage().split("a.csv: ")[1]) for r in caplog.records]

    assert said("s;kind;a\nx;A;1\n") == [
        ("INFO", "separator: ';'; header: line 1; row names: column 0 (s); text columns kept in obs: kind")
    ]
    assert said("1,2\n1,1\n", drop_columns=["1"]) == [("INFO", "no header; row names: none; dropped: 1")]
    for text, key in (
        ("Unnamed: 0,a\n0,1\n1,5\n", "'Unnamed: 0'"),
        ("cell_id,a\n7,1\n5,1\n", "'cell_id'"),
        ("time,a\n0.5,1\n0.5,5\n", "'time'"),
        ("a,b\n" + "".join(f"{i * i},1\n" for i in range(20)), "'a'"),
        ("".join(f"{i},{5 - i}\n" for i in range(1, 7)), "0"),
    ):
        level, message = said(text)[0]
        assert level == "WARNING"
        assert f"is used as a feature; if it only tells rows apart, give index_column={key}" in message
    for text in ("a,b\n3,1\n1,2\n", "b,id\n5,0\n5,1\n", "id,a\nx,1\n"):
        assert [level for level, _ in said(text)] == ["INFO"]
    for text, word in (
        ("x,7,1\ny,5,6\n", "data, not as a header; if that is wrong, give header=True"),
        ("0,1,2,3\n5,9,1,2\n4,1,7,2\n", "the header; if that is wrong, give header=False"),
        (f"{WAVES}\n1,5,2\n7,1,8\n", "data, not as a header; if that is wrong, give header=True"),
    ):
        assert ("WARNING", f"line 1 is read as {word}") in said(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a;b\n1,5;2,5\n3;4e1\n", [[1.5, 2.5], [3, 40]]),
        ("1,5;2,5\n3,5;4,5\n", [[1.5, 2.5], [3.5, 4.5]]),
        ("a\tb\n1,5\t2,5\n", [[1.5, 2.5]]),
        ("a;b\n1.5;2\n", [[1.5, 2]]),
        ("a b\n1 2\n  3\t 4 \n", [[1, 2], [3, 4]]),
        ('"a" "b"\n"r 1" 1 2\n', [[1, 2]]),
        ('name,x\n"A;B",1\n"C;D",2\n', [[1], [2]]),
        ("a|b|c\n1|2|3\n", [[1, 2, 3]]),
        ("a\n5\n6\n", [[5], [6]]),
    ],
)
def test_separators_are_found(tmp_path, text, expected):
    assert opened(tmp_path / "a.csv", text).read_rows(slice(None)).tolist() == expected


def test_comments_before_a_table(tmp_path):
    """As NumPy's savetxt and tools such as featureCounts write them."""
    np.savetxt(tmp_path / "a.txt", [[1, 2, 3], [4, 5, 7]], header="a b c")
    assert facts(nd.open(tmp_path / "a.txt")) == (None, ["a", "b", "c"], {}, [[1, 2, 3], [4, 5, 7]])
    np.savetxt(tmp_path / "b.csv", [[1, 2], [4, 9]], delimiter=",", header="two lines\nof notes")
    assert facts(nd.open(tmp_path / "b.csv")) == (None, None, {}, [[1, 2], [4, 9]])
    counts = '# Program: "x" v1; a, b\nGeneid\tChr\ts1\nG1\tchr1;chr1\t5\nG2\tchr2\t6\n'
    assert facts(opened(tmp_path / "c.txt", counts)) == (
        ["G1", "G2"],
        ["s1"],
        {"Chr": ["chr1;chr1", "chr2"]},
        [[5], [6]],
    )
    assert facts(opened(tmp_path / "d.csv", "#id,a\nx,1\n#y,2\n")) == (["x", "#y"], ["a"], {}, [[1], [2]])
    assert opened(tmp_path / "d.csv", "#x,1\n#y,5\nz,2\n").obs_names.tolist() == ["#x", "#y", "z"]
    with pytest.raises(DataError, match=r"line 4, column 1 \(a\): 'z' is not a number"):
        opened(tmp_path / "e.csv", "# note\nid,a\nx,1\ny,z\nw,2\n")
    with pytest.raises(DataError, match="line 3, 1 cells under a header of 2 cells; a quote is not closed"):
        opened(tmp_path / "f.csv", 'a,b\n"x,1\ny,2\n')


def test_a_quote_that_is_not_closed_hides_no_rows(tmp_path):
    for n, options in ((9, {}), (200, {}), (200, {"drop_columns": ["note"]}), (40_000, {})):
        notes = ["word"] * n
        notes[7] = '"open'
        text = "id,a,note\n" + "".join(f"r{i},{i * i},{note}\n" for i, note in enumerate(notes))
        with pytest.raises(DataError, match=r"^\S*a.csv: line 9, a quote is not closed$"):
            opened(tmp_path / "a.csv", text, **options)
    source = opened(tmp_path / "b.csv", 'id,a,note\nx,1,"one\ntwo"\ny,5,"three\nend"\n')
    assert source.obs["note"].values.tolist() == ["one\ntwo", "three\nend"]


def test_a_separator_is_not_given_up_for_a_broken_line(tmp_path):
    for separator in ",;\t|":
        rows = [separator.join(row) for row in ("abc", "123", "12", "456")]
        with pytest.raises(DataError, match="line 3, 2 cells where the lines before have 3"):
            opened(tmp_path / "a.csv", "\n".join(rows))
    with pytest.raises(DataError, match=r"column 1 \(b\): '1.500' is not a number"):
        opened(tmp_path / "a.csv", "a;b\n1,5;2\n3,5;1.500\n")


def test_encodings_and_compression(tmp_path, caplog):
    text = "name,größe,b\nä,1.5,2\n"
    path = tmp_path / "a.csv"
    for encoding in ("utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "latin-1"):
        for pack in (bytes, gzip.compress):
            path.write_bytes(pack(text.encode(encoding)))
            caplog.clear()
            assert facts(nd.open(path)) == (["ä"], ["größe", "b"], {}, [[1.5, 2]])
            warned = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
            assert len(warned) == (encoding == "latin-1"), (encoding, warned)
            assert not warned or "not UTF-8: read as Latin-1" in warned[0]
    path = tmp_path / "a.CSV.GZ"
    for content in (text.encode(), gzip.compress(text.encode())):
        path.write_bytes(content)
        assert nd.open(path).shape == (1, 2)
    try:
        import pyarrow
    except ImportError:
        pass
    else:
        (tmp_path / "a.csv.zst").write_bytes(pyarrow.compress(text.encode(), codec="zstd", asbytes=True))
        assert nd.open(tmp_path / "a.csv.zst").shape == (1, 2)
    for content, message in (
        (b"PK\x03\x04 and more", "a zip archive or an Excel sheet"),
        (zlib.compress(b"1,2\n" * 99) + bytes(9), "a binary file, not text"),
        (codecs.BOM_UTF16_LE + b"a", "not UTF-16"),
    ):
        (tmp_path / "b.csv").write_bytes(content)
        with pytest.raises(DataError, match=f"b.csv: .*{message}"):
            nd.open(tmp_path / "b.csv")


def test_pipes_and_devices_are_refused(tmp_path):
    os.mkfifo(tmp_path / "a.csv")
    for call in (nd.open, lambda path: nd.read_obs(path, "x")):
        with pytest.raises(DataError, match=r"a\.csv: a pipe, not a file"):
            call(tmp_path / "a.csv")
    (tmp_path / "b.csv").symlink_to("/dev/null")
    with pytest.raises(DataError, match=r"b\.csv: a device"):
        nd.open(tmp_path / "b.csv")
    for name in ("data", "genes"):  # needed, and absent otherwise
        folder = write_parts(tmp_path / name, COUNTS)
        (folder / f"{name}.npy").unlink(missing_ok=True)
        os.mkfifo(folder / f"{name}.npy")
        with pytest.raises(DataError, match=rf"{name}\.npy: a pipe, not a file"):
            nd.open(folder)


# --- parquet


def test_types_of_parquet_columns(tmp_path, caplog):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"

    def written(table, **options):
        parquet.write_table(table, path)
        return nd.open(path, **options)

    money = pyarrow.array([decimal.Decimal("1.50"), decimal.Decimal("-2.25")], pyarrow.decimal128(7, 2))
    assert facts(written(pyarrow.table({"price": money, "n": [1, 2]}))) == (
        None, ["price", "n"], {}, [[1.5, 1], [-2.25, 2]],
    )  # fmt: skip
    kinds = pyarrow.array(["A", None]).dictionary_encode()
    days = [datetime.date(2026, 1, 2)] * 2
    table = pyarrow.table({"id": ["x", "y"], "ok": [True, False], "kind": kinds, "day": days, "half": [0.5, 1.5]})
    expected = (["x", "y"], ["ok", "half"], {"kind": ["A", ""], "day": ["2026-01-02"] * 2}, [[1, 0.5], [0, 1.5]])
    source = written(table)
    assert facts(source) == expected
    assert facts(nd.open(path, roles=source.roles)) == expected
    assert facts(nd.open(path, index_column="kind", drop_columns=["id", "day"]))[:3] == (["A", ""], ["ok", "half"], {})
    # Text after the numbers is not row names, whatever the other columns are.
    assert facts(written(table.select(["half", "id"])))[:3] == (None, ["half"], {"id": ["x", "y"]})
    # Two columns of one name, and names with dots.
    twice = pyarrow.Table.from_arrays([pyarrow.array([1, 2]), pyarrow.array([3, 4])], ["a", "a"])
    assert facts(written(twice))[1:] == (["a", "a"], {}, [[1, 3], [2, 4]])
    assert facts(written(twice, drop_columns=[0]))[1:] == (["a"], {}, [[3], [4]])
    assert facts(written(pyarrow.table({"a.b": [1, 2]})))[1:] == (["a.b"], {}, [[1], [2]])
    with pytest.raises(DataError, match=r"column 1 \(l\) holds list<.*leave it out with drop_columns=\['l'\]"):
        written(pyarrow.table({"a": [1, 2], "l": [[1], [2]]}))
    assert nd.open(path, drop_columns=["l"]).shape == (2, 1)
    caplog.clear()
    written(pyarrow.table({"Unnamed: 0": [0, 1], "a": [1, 2]}))
    assert "column 0 (Unnamed: 0) is used as a feature" in caplog.text
    with pytest.raises(DataError, match="header=True is for tables"):
        nd.open(path, header=True)


def test_indices_of_pandas_are_no_features(tmp_path):
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    frame = pandas.DataFrame({"a": [1.0, 2], "b": [3.0, 4]})
    for index, names, obs in (
        (pandas.Index([7, 8], name="n"), ["7", "8"], {}),
        (pandas.date_range("2026-01-01", periods=2), ["2026-01-01 00:00:00", "2026-01-02 00:00:00"], {}),
        (pandas.MultiIndex.from_tuples([("x", 1), ("y", 2)], names=["k", "n"]), ["x", "y"], {"n": ["1", "2"]}),
    ):
        frame.set_index(index).to_parquet(tmp_path / "a.parquet")
        assert facts(nd.open(tmp_path / "a.parquet")) == (names, ["a", "b"], obs, [[1, 3], [2, 4]])


def test_parts_of_a_parquet_table_must_fit(tmp_path):
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    for name, frame, message in (
        (
            "types",
            {"a": [1.5], "b": [2]},
            r"part-1.parquet: column 0 is a \(double\), but a \(int64\) in the first part",
        ),
        ("names", {"a": [1], "c": [2]}, r"column 1 is c \(int64\), but b \(int64\)"),
        ("fewer", {"a": [1]}, r"column 1 is absent, but b \(int64\)"),
    ):
        (tmp_path / name).mkdir()
        pandas.DataFrame({"a": [1], "b": [2]}).to_parquet(tmp_path / name / "part-0.parquet", index=False)
        pandas.DataFrame(frame).to_parquet(tmp_path / name / "part-1.parquet", index=False)
        with pytest.raises(DataError, match=message):
            nd.open(tmp_path / name)
    (tmp_path / "names" / "part-1.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"part-1\.parquet: damaged"):
        nd.open(tmp_path / "names")
    pandas.DataFrame({"a": [1], "k": ["x"]}).to_parquet(tmp_path / "cut", partition_cols=["k"])
    with pytest.raises(DataError, match="cut: partitioned by folders"):
        nd.open(tmp_path / "cut")


# --- names in bytes, images, 10x folders


def test_names_in_bytes_are_text(tmp_path, caplog):
    beside = {"genes": np.array([g.encode() for g in GENES]), "obs_names": np.array([c.encode() for c in CELLS])}
    labels = np.array(["B", "é", "B", "T", "T", "", "B"])
    for encoding in ("utf-8", "latin-1"):
        coded = np.array([label.encode(encoding) for label in labels])
        for source in (
            nd.open(write_npz(tmp_path / f"{encoding}.npz", X=COUNTS, labels=coded, **beside)),
            nd.open(write_parts(tmp_path / encoding, COUNTS, labels=coded, **beside)),
            nd.ArraySource(COUNTS, obs_names=beside["obs_names"], var_names=beside["genes"], labels=coded),
        ):
            assert (source.obs_names.tolist(), source.var_names.tolist()) == (CELLS, GENES)
            assert source.labels.tolist() == labels.tolist()
        assert ("not UTF-8: read as Latin-1" in caplog.text) == (encoding == "latin-1")


def test_images_are_rows(tmp_path):
    for shape in ((5, 4, 3), (5, 4, 3, 2)):
        X = np.random.default_rng(0).random(shape).astype(np.float32)
        np.save(tmp_path / "a.npy", X)
        for source in (nd.open(tmp_path / "a.npy"), nd.open(write_npz(tmp_path / "a.npz", X=X, y=np.zeros(5)))):
            assert source.image_shape == shape[1:]
            np.testing.assert_array_equal(source.read_rows(slice(None)), X.reshape(5, -1))
        with pytest.raises(DataError, match="cannot be transposed"):
            nd.open(tmp_path / "a.npy", genes_by_cells=True)
    for array, message in (
        (np.zeros(3), r"a.npy: an array of shape \(3,\), 1 dimension.*array.reshape\(-1, 1\)"),
        (np.array(3.0), r"a.npy: an array of shape \(\), 0 dimension"),
        (np.zeros((2, 2, 2, 2, 2)), "a.npy: an array of shape .*5 dimension"),
        (np.zeros((2, 2), complex), "a.npy: numbers expected, got dtype complex128"),
        (np.array([["a"]]), "a.npy: numbers expected, got dtype <U1"),
    ):
        np.save(tmp_path / "a.npy", array)
        with pytest.raises(DataError, match=message):
            nd.open(tmp_path / "a.npy")
    folder = write_parts(tmp_path / "parts", COUNTS)
    np.save(folder / "data.npy", np.array(["x"] * np.count_nonzero(COUNTS)))
    with pytest.raises(DataError, match="parts: numbers expected, got dtype <U1"):
        nd.open(folder)


def test_10x_folders_of_several_samples(tmp_path, caplog):
    for k in (1, 2):
        write_10x_folder(tmp_path / "geo", prefix=f"GSM{k}_", factor=k, kinds=["Gene Expression"] * 3 + ["ADT"] * 2)
        (tmp_path / "ranger").mkdir(exist_ok=True)
        write_10x_folder(tmp_path / "ranger" / f"genome{k}", factor=k)
    for folder, names in (("geo", "GSM1, GSM2"), ("ranger", "genome1, genome2")):
        with pytest.raises(DataError, match=f"2 samples; choose one with layer=NAME: {names}"):
            nd.open(tmp_path / folder)
        with pytest.raises(DataError, match="no sample 'GSM'; the file has "):
            nd.open(tmp_path / folder, layer="GSM")
        source = nd.open(tmp_path / folder, layer=names.split(", ")[1])
        wanted = 2 * COUNTS[:, :3] if folder == "geo" else 2 * COUNTS
        np.testing.assert_array_equal(dense(source.read_rows(slice(None))), wanted)
        assert source.obs_names.tolist() == CELLS
    assert nd.open(tmp_path / "geo", layer="GSM1/ADT").var_names.tolist() == GENES[3:]
    nd.open(tmp_path / "geo" / "GSM1_matrix.mtx.gz")
    assert "read as rows x columns without names; give its folder to read it as 10x data" in caplog.text
    (tmp_path / "geo" / "GSM2_barcodes.tsv.gz").unlink()
    with pytest.raises(DataError, match=r"needs barcodes.tsv \(or .gz\) beside GSM2_matrix.mtx.gz"):
        nd.open(tmp_path / "geo", layer="GSM2")


@pytest.mark.parametrize(
    "barcodes",
    [
        "\n".join(CELLS) + "\n\n",
        "\n" + "\r\n".join(CELLS),
        "barcode\n" + "\n".join(CELLS),
        '"x"\n' + "".join(f'"{i + 1}"\t"{c}"\n' for i, c in enumerate(CELLS)),
        "".join(f'"{c}"\n' for c in CELLS),
        "\t0\n" + "".join(f"{i}\t{c}\n" for i, c in enumerate(CELLS)),
        "".join(f"{i + 1}\t{c}\n" for i, c in enumerate(CELLS)),
        "\ufeff" + "\n".join(CELLS),
    ],
)
def test_barcodes_as_others_write_them(tmp_path, barcodes):
    folder = write_10x_folder(tmp_path / "a", zipped=False)
    (folder / "barcodes.tsv").write_bytes(barcodes.encode())
    features = "gene_id\tgene_name\tfeature_type\n" + "".join(
        f'"E{j}"\t"{g}"\tGene Expression\n\n' for j, g in enumerate(GENES)
    )
    (folder / "genes.tsv").write_text(features)
    source = nd.open(folder)
    assert (source.obs_names.tolist(), source.var_names.tolist()) == (CELLS, GENES)


def test_a_lone_quote_belongs_to_a_name(tmp_path):
    folder = write_10x_folder(tmp_path / "a", zipped=False)
    names = ['"a', "b", 'c"', "d'", "e"]
    (folder / "genes.tsv").write_text("".join(f"E{j}\t{name}\n" for j, name in enumerate(names)))
    assert nd.open(folder).var_names.tolist() == names


def test_matrix_market_sizes_that_cannot_be(tmp_path):
    head = "%%MatrixMarket matrix {} real general\n"
    for text, message in (
        (
            head.format("coordinate") + "900000000 5 2\n1 1 1\n2 2 2\n",
            "its size line says 900000000 x 5 with 2 entries",
        ),
        (head.format("coordinate") + "5 900000000 2\n1 1 1\n2 2 2\n", "its size line says 5 x 900000000"),
        (head.format("coordinate") + "9 9 5000\n1 1 1\n", "5000 entries, which need at least 20000 bytes"),
        (head.format("array") + "30000 30000\n1\n", "900000000 entries, which need"),
        (head.format("coordinate") + "2 2 1\n1 1 1e399\n", "line 3, 1e399 is too large for float64"),
    ):
        (tmp_path / "a.mtx").write_text(text)
        with pytest.raises(DataError, match=f"a.mtx: .*{message}"):
            nd.open(tmp_path / "a.mtx")


def test_cells_without_a_value_are_missing_as_in_pandas(tmp_path):
    pandas = pytest.importorskip("pandas")
    words = ["x", "", "y", "NA", "-", "nan", "N/A", "na", "None", "null", " ", "?"]
    path = tmp_path / "a.csv"
    path.write_text("id,batch,g\n" + "".join(f"r{i},{word},{i}\n" for i, word in enumerate(words)))
    expected = pandas.read_csv(path, skipinitialspace=True)["batch"]
    assert nd.open(path).obs["batch"].missing.tolist() == expected.isna().tolist()
    with pytest.raises(DataError, match=r"a\.csv: column 'batch' of obs has a missing value in row 1$"):
        nd.read_obs(path, "batch")
