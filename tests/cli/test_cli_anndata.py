"""AnnData on the command line: columns of obs in the output, classes, modalities, and links that leave the file."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import sparse

from cli_runs import SMALL, metrics, narrows, table

anndata, h5py, pandas = (pytest.importorskip(name) for name in ("anndata", "h5py", "pandas"))
pytestmark = pytest.mark.filterwarnings("ignore")

N = 90
KINDS = np.array(["T", "B", "NK"])[np.arange(N) % 3]


def cells(path, **obs):
    X = table() + 8.0 * (np.arange(N) % 3)[:, None].astype(np.float32)
    adata = anndata.AnnData(X, obs=pandas.DataFrame(obs, index=[f"c{i}" for i in range(N)]))
    if path is not None:
        adata.write_h5ad(path)
    return adata


def test_columns_of_obs_come_back_with_their_dtypes(tmp_path, capsys):
    columns = {
        "kind": KINDS,
        "stage": pandas.Categorical(["b", None, "a"] * 30, categories=["b", "a", "unused"], ordered=True),
        "cluster": pandas.Categorical([7, 5, 7] * 30),
        "barcode": [f"AC{i}" for i in range(N)],
        "n": np.arange(N, dtype=np.int16),
        "share": np.where(np.arange(N) == 4, np.nan, np.linspace(0, 1, N)).astype(np.float32),
        "ok": np.arange(N) % 2 == 0,
        "count": pandas.array([1, None, 3] * 30, dtype="Int32"),
        "flag": pandas.array([True, None, False] * 30, dtype="boolean"),
    }
    path = tmp_path / "x.H5AD"  # capitals are no other format
    cells(path, **columns)
    with h5py.File(path, "r+") as file:
        file["obs/odd"] = np.zeros((N, 2))
        file["obs"].attrs["column-order"] = [*file["obs"].attrs["column-order"], "odd"]
    assert (
        narrows("fit", path, "--out", tmp_path / "o", *SMALL[:-1], "--label-key", "kind", "--batch-key", "cluster") == 0
    )
    told = capsys.readouterr().err
    assert "warning: column 'odd' of obs is left out of the output: " in told
    assert "obs/odd: one value per row is needed, it has shape (90, 2)" in told
    assert narrows("encode", tmp_path / "o", path, "-o", tmp_path / "z.h5ad", "--quiet") == 0
    latent = tmp_path / "o" / "latent.h5ad"
    assert narrows("decode", tmp_path / "o", latent, "-o", tmp_path / "y.h5ad", "--quiet") == 0
    with h5py.File(path, "r+") as file:
        del file["obs/odd"]
        file["obs"].attrs["column-order"] = list(columns)
    expected = anndata.read_h5ad(path)
    for written in (latent, tmp_path / "z.h5ad", tmp_path / "y.h5ad"):
        pandas.testing.assert_frame_equal(anndata.read_h5ad(written).obs, expected.obs)


def test_classes_from_obs_measure_neighbours(tmp_path, capsys):
    some = np.where(np.arange(N) < 9, None, KINDS)
    adata = cells(
        tmp_path / "x.h5ad",
        kind=KINDS,
        some=pandas.Categorical(some),
        whole=np.where(np.arange(N) < 9, np.nan, np.arange(N) % 3),
    )
    adata.write_h5ad(tmp_path / "x.h5ad")
    for key, counted in (("kind", None), ("some", 9), ("whole", 9)):
        out = tmp_path / key
        assert narrows("fit", tmp_path / "x.h5ad", "--out", out, *SMALL[:-1], "--label-key", key) == 0
        found = metrics(out)
        assert found["label_key"] == key
        # 3 classes, 8 apart in every feature
        assert found["knn_accuracy_latent"] == 1.0
        assert found["knn_accuracy_pca"] == 1.0
        assert (f"9 of 90 rows have no {key}" in capsys.readouterr().err) is (counted == 9)
        for again in (False, True):
            assert not again or narrows("report", out) == 0
            assert "Colours: labels of the data." in (out / "report.html").read_text(encoding="utf-8")
    assert "label" not in anndata.read_h5ad(tmp_path / "kind" / "latent.h5ad").obs


def test_flags_of_input(tmp_path, line):
    adata = cells(tmp_path / "x.h5ad", kind=KINDS, share=np.linspace(0, 1, N))
    out = tmp_path / "o"

    def refused(code, *args, word):
        assert narrows(*args) == code
        text = line()
        assert word in text, text

    fit = [tmp_path / "x.h5ad", "--out", out, *SMALL]
    refused(
        3,
        "fit",
        *fit,
        "--label-key",
        "Kinds",
        word="obs has no column 'Kinds'; it has 'kind', 'share'; did you mean 'kind'?",
    )
    refused(3, "fit", *fit, "--label-key", "share", word="obs['share']: 0.0 in row 0: labels must be all strings or")
    refused(3, "fit", *fit, "--modality", "rna", word="it has no modalities; drop --modality rna")
    with h5py.File(tmp_path / "y.h5ad", "w") as file:
        file["X"] = h5py.ExternalLink("x.h5ad", "X")
    y = [tmp_path / "y.h5ad", *fit[1:]]
    refused(3, "fit", *y, word="X is a link to another file, x.h5ad; if you trust this, allow it with --follow-links")
    assert narrows("fit", *y, "--follow-links") == 0
    target = ["-o", tmp_path / "z.npy", "--quiet"]
    refused(3, "encode", out, tmp_path / "y.h5ad", *target, word="--follow-links")
    for command in ("encode", "score"):
        assert narrows(command, out, tmp_path / "y.h5ad", *target, "--follow-links") == 0
    codes = np.load(tmp_path / "z.npy") if narrows("encode", out, tmp_path / "x.h5ad", *target) == 0 else None
    assert narrows("encode", out, tmp_path / "x.h5ad", *target, "--untrusted") == 0
    np.testing.assert_array_equal(np.load(tmp_path / "z.npy"), codes)
    refused(3, "score", out, tmp_path / "y.h5ad", *target, "--untrusted", word="allow it with --follow-links")
    other = tmp_path / "other"
    assert narrows("fit", *fit[:-1], "--out", other, "--untrusted", "--label-key", "kind", "--quiet") == 0
    assert (other / "model.safetensors").stat().st_size > 0
    pandas.testing.assert_frame_equal(
        anndata.read_h5ad(other / "latent.h5ad").obs, anndata.read_h5ad(tmp_path / "x.h5ad").obs
    )
    with h5py.File(tmp_path / "x.h5ad", "r+") as file:
        file["X"][0, 0] += 1
    refused(5, "fit", *y, "--follow-links", word="run.input_sha256")

    with h5py.File(tmp_path / "x.h5mu", "w") as file:
        for name in ("rna", "atac"):
            with h5py.File(tmp_path / "x.h5ad") as part:
                part.copy(part["/"], file, f"mod/{name}")
    mu = [tmp_path / "x.h5mu", "--out", tmp_path / "mu", *SMALL]
    refused(3, "fit", *mu, word="choose one with --modality NAME: 'atac', 'rna'")
    assert narrows("fit", *mu, "--modality", "rna") == 0
    refused(5, "fit", *mu, "--modality", "atac", word="modality")
    assert narrows("encode", tmp_path / "mu", tmp_path / "x.h5mu", *target) == 0  # the modality of the fit
    codes = anndata.read_h5ad(tmp_path / "mu" / "latent.h5ad").X
    np.testing.assert_array_equal(np.load(tmp_path / "z.npy"), codes)
    raw = anndata.AnnData(sparse.csr_matrix(adata.X))
    raw.raw = raw
    raw.write_h5ad(tmp_path / "raw.h5ad")
    with h5py.File(tmp_path / "raw.h5ad", "r+") as file:
        del file["X"]
    refused(3, "fit", tmp_path / "raw.h5ad", *fit[1:], word="it has no X; choose a layer with --layer NAME: raw")
