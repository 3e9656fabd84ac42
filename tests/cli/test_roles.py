"""The flags of reading tables: what a fit takes as names and features holds in encode and score."""

from __future__ import annotations

import json

import numpy as np
import pytest

import narrows
import narrows.data as nd
from cli_runs import SMALL, metrics, table
from cli_runs import narrows as run


def spectra(path, X, *, rows=slice(None)):
    """Wavelengths in the header, names that are numbers, one text column that is numbers in some rows."""
    lines = ["nr,site," + ",".join(f"{400 + 2.5 * j:g}" for j in range(X.shape[1])) + ",extra"]
    sites = ["7" if i % 9 == 0 else "AB"[i % 2] for i in range(len(X))]
    lines += [f"{i},{sites[i]}," + ",".join(map(str, X[i].tolist())) + ",x" for i in range(len(X))[rows]]
    path.write_text("\n".join(lines) + "\n")
    return path


def test_roles_of_a_fit_hold_in_encode_and_score(tmp_path):
    X = table(40, 5)
    data = spectra(tmp_path / "a.csv", X)
    flags = ["--index-column", "nr", "--drop-columns", "extra,405", "--header"]
    assert run("fit", data, "--out", tmp_path / "out", *SMALL, *flags) == 0
    assert (metrics(tmp_path / "out")["n_rows"], metrics(tmp_path / "out")["n_features"]) == (40, 4)
    model = narrows.load(tmp_path / "out" / "model.safetensors")
    assert model.feature_names_in_.tolist() == ["400", "402.5", "407.5", "410"]
    kept = X[:, [0, 1, 3, 4]]
    codes = model.transform(nd.ArraySource((kept - kept.mean(0)) / kept.std(0), var_names=model.feature_names_in_))
    # One row: its name, its site and the header look like numbers. Only the roles of the fit tell them apart.
    one = spectra(tmp_path / "one.csv", X, rows=slice(9, 10))
    for source, rows in ((data, slice(None)), (one, slice(9, 10))):
        assert run("encode", tmp_path / "out", source, "-o", tmp_path / "c.csv") == 0
        found = nd.open(tmp_path / "c.csv", index_column=0)
        assert found.obs_names.tolist() == [str(i) for i in range(40)][rows]
        np.testing.assert_allclose(found.read_rows(slice(None)), codes[rows], rtol=1e-4, atol=1e-5)
        assert run("score", tmp_path / "out", source, "-o", tmp_path / "s.csv") == 0
    # Flags come before the roles of the fit.
    assert run("encode", tmp_path / "out", one, "-o", tmp_path / "d.csv", "--index-column", "site") == 3
    assert run("encode", tmp_path / "out", one, "-o", tmp_path / "d.csv", "--index-column", "site", "--drop-columns",
               "nr,extra,405") == 0  # fmt: skip
    assert nd.open(tmp_path / "d.csv", index_column=0).obs_names.tolist() == ["7"]
    # The settings of the run repeat it, and text columns serve as batches.
    config = tmp_path / "out" / "config.toml"
    assert run("fit", "--config", config, "--out", tmp_path / "again", "--batch-key", "site", "--quiet") == 0
    assert metrics(tmp_path / "again")["n_features"] == 4
    assert metrics(tmp_path / "again")["n_batches"] == 3
    sweep = ["--components", "1,2", "--hidden", "none", "--epochs", "1", "--quiet"]
    assert run("sweep", data, "--out", tmp_path / "sweep", *sweep, *flags) == 0
    assert json.loads((tmp_path / "sweep" / "sweep.json").read_text())


def test_warnings_name_the_flags(tmp_path, capsys):
    for text, *said in (
        (
            "id,a\n1,3\n2,4\n3,9\n",
            "column 0 (id) is used as a feature",
            "give --index-column id or --drop-columns 'id'",
        ),
        ("x,7,1\ny,5,6\nz,5,7\n", "line 1 is read as data, not as a header; if that is wrong, give --header"),
        ("0,1,2,3\n5,9,1,2\n4,1,7,2\n", "line 1 is read as the header; if that is wrong, give --no-header"),
    ):
        (tmp_path / "a.csv").write_text(text)
        assert run("fit", tmp_path / "a.csv", "--out", tmp_path / "out", "--dry-run", "--quiet") == 0
        warned = capsys.readouterr().err
        assert warned.count("narrows: warning: ") == 1
        assert all(part in warned for part in said)


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (["--drop-columns", "z"], 3, "no column 'z' for --drop-columns; it has 'nr', 'site', '400'"),
        (["--drop-columns", "a,,b"], 2, "'a,,b' is not a list of columns"),
        (["--drop-columns", "a\rb"], 2, "is not a list of columns"),
        (["--index-column", "99"], 3, "no column '99' for --index-column"),
        (["--index-column", "none"], 3, "column 0 (nr): "),
    ],
)
def test_flags_of_tables_name_what_is_wrong(tmp_path, capsys, flags, code, message):
    data = tmp_path / "a.csv"
    data.write_text("nr,site,400\n1,A,3\n2,B,4\nx,A,5\n")
    assert run("fit", data, "--out", tmp_path / "out", *SMALL, *flags) == code
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_conv_takes_the_shape_of_images(tmp_path):
    images = np.random.default_rng(0).random((24, 8, 8)).astype(np.float32)
    np.save(tmp_path / "a.npy", images)
    conv = ["--estimator", "conv", "--components", "2", "--epochs", "1", "--quiet", "--set", "filters=2"]
    assert run("fit", tmp_path / "a.npy", "--out", tmp_path / "out", *conv) == 0
    assert (
        run("sweep", tmp_path / "a.npy", "--out", tmp_path / "sizes", *conv[:2], *conv[4:], "--components", "1,2") == 0
    )
    model = narrows.load(tmp_path / "out" / "model.safetensors")
    assert tuple(model.image_shape) == (8, 8, 1)
    assert run("encode", tmp_path / "out", tmp_path / "a.npy", "-o", tmp_path / "c.npy") == 0
    assert np.load(tmp_path / "c.npy").shape == (24, 2)
    assert narrows.ConvAutoencoder(2, filters=2, max_iter=1).fit(nd.open(tmp_path / "a.npy")).image_shape_ == (8, 8, 1)


def test_conv_asks_for_the_shape_of_what_may_be_signals(tmp_path, capsys):
    np.save(tmp_path / "a.npy", np.random.default_rng(0).random((24, 8, 6)).astype(np.float32))
    conv = ["--estimator", "conv", "--components", "2", "--epochs", "1", "--quiet", "--set", "filters=2"]
    assert run("fit", tmp_path / "a.npy", "--out", tmp_path / "out", *conv) != 0
    assert (
        "give --set image_shape=8,6,1 if they are grey images, or --set image_shape=8,6 if" in capsys.readouterr().err
    )
    assert run("fit", tmp_path / "a.npy", "--out", tmp_path / "out", *conv, "--set", "image_shape=8,6,1") == 0
    np.save(tmp_path / "b.npy", np.zeros((24, 3, 8, 8), np.float32))
    capsys.readouterr()
    assert run("fit", tmp_path / "b.npy", "--out", tmp_path / "first", *conv) == 3
    assert "with channels first: pass np.moveaxis(array, 1, -1), which puts them last" in capsys.readouterr().err
