"""`narrows.scanpy`: what it writes, where, and that an AnnData is whole when it fails."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp

import narrows
from estimator_cases import BACKEND
from narrows.data import ArraySource
from narrows.errors import DataError, ModelFileError, OutputError
from narrows.evaluation.cells import CellErrors
from narrows.plan.losses import Loss

ad = pytest.importorskip("anndata")
FIT: dict[str, Any] = {"n_components": 3, "hidden_layer_sizes": (8,), "max_iter": 3, "backend": BACKEND, "n_threads": 1}


def cells(n_obs: int = 60, n_vars: int = 20) -> Any:
    counts = np.random.default_rng(0).poisson(0.7, (n_obs, n_vars)).astype(np.float32)
    adata = ad.AnnData(sp.csr_matrix(counts))
    adata.obs_names = [f"cell{i}" for i in range(n_obs)]
    adata.var_names = [f"gene{i}" for i in range(n_vars)]
    adata.layers["counts"] = adata.X.copy()
    adata.obsm["X_pca"] = np.random.default_rng(1).normal(size=(n_obs, 5)).astype(np.float32)
    adata.var["some"] = np.arange(n_vars) % 3 != 0
    return adata


def fields(adata: Any) -> dict[str, set[str]]:
    return {name: set(getattr(adata, name).keys()) for name in ("obs", "var", "obsm", "varm", "layers", "uns")}


def added(before: dict[str, set[str]], adata: Any) -> dict[str, set[str]]:
    return {name: now - before[name] for name, now in fields(adata).items() if now - before[name]}


def test_fields_have_the_names_and_forms_that_are_promised() -> None:
    adata = cells()
    before = fields(adata)
    assert narrows.scanpy.autoencoder(adata, **FIT) is None
    assert added(before, adata) == {
        "obs": {"ae_recon_error"},
        "var": {"ae_recon_error"},
        "obsm": {"X_ae"},
        "varm": {"AE_sensitivity"},
        "uns": {"ae"},
    }
    assert adata.obsm["X_ae"].shape == (60, 3)
    assert adata.obsm["X_ae"].dtype == np.float32
    assert adata.varm["AE_sensitivity"].shape == (20, 3)
    assert set(adata.uns["ae"]) == {"params", "history", "version"}
    assert adata.uns["ae"]["params"]["normalize"] == "log1p"
    assert len(adata.uns["ae"]["history"]["loss"]) == 3


def test_results_are_those_of_the_estimator() -> None:
    adata = cells()
    narrows.scanpy.autoencoder(adata, layers=True, **FIT)
    scaling = narrows.Normalizer().fit(adata.X)
    X = scaling.transform(adata.X)
    ae = narrows.Autoencoder(**FIT, random_state=0).fit(X)
    np.testing.assert_array_equal(adata.obsm["X_ae"], ae.transform(X))
    np.testing.assert_array_equal(adata.obs["ae_recon_error"], -ae.score_samples(X))
    np.testing.assert_array_equal(adata.var["ae_recon_error"], ae.feature_errors(X))
    np.testing.assert_array_equal(adata.varm["AE_sensitivity"], ae.latent_sensitivity(X).T)
    np.testing.assert_array_equal(adata.layers["ae_denoised"], np.expm1(ae.reconstruct(X)))


def test_key_added_names_everything() -> None:
    adata = cells()
    before = fields(adata)
    narrows.scanpy.autoencoder(adata, key_added="deep", layers=True, **FIT)
    assert added(before, adata) == {
        "obs": {"deep_recon_error"},
        "var": {"deep_recon_error"},
        "obsm": {"deep"},
        "varm": {"deep_sensitivity"},
        "layers": {"deep_denoised"},
        "uns": {"deep"},
    }


def test_a_copy_leaves_the_original() -> None:
    adata = cells()
    before = fields(adata)
    copied = narrows.scanpy.autoencoder(adata, copy=True, **FIT)
    assert added(before, adata) == {}
    assert copied is not None
    assert "X_ae" in copied.obsm
    assert copied.X is not adata.X


def test_a_view_becomes_a_whole() -> None:
    adata = cells()
    view = adata[:40]
    narrows.scanpy.autoencoder(view, **FIT)
    assert not view.is_view
    assert view.obsm["X_ae"].shape == (40, 3)
    assert "X_ae" not in adata.obsm


@pytest.mark.parametrize("form", ["column", "mask"])
def test_some_genes(form: str) -> None:
    adata = cells()
    used = adata.var["some"].to_numpy()
    narrows.scanpy.autoencoder(adata, mask_var="some" if form == "column" else used, layers=True, **FIT)
    alone = cells()[:, used].copy()
    narrows.scanpy.autoencoder(alone, layers=True, **FIT)
    np.testing.assert_array_equal(adata.obsm["X_ae"], alone.obsm["X_ae"])
    for whole, part, rest in (
        (adata.var["ae_recon_error"], alone.var["ae_recon_error"], np.isnan),
        (adata.varm["AE_sensitivity"], alone.varm["AE_sensitivity"], np.logical_not),
        (adata.layers["ae_denoised"].T, alone.layers["ae_denoised"].T, np.isnan),
    ):
        np.testing.assert_array_equal(np.asarray(whole)[used], part)
        assert rest(np.asarray(whole)[~used]).all()


def test_layer_and_obsm() -> None:
    adata = cells()
    narrows.scanpy.autoencoder(adata, **FIT)
    codes = adata.obsm["X_ae"]
    adata.X = adata.X * 0
    narrows.scanpy.autoencoder(adata, layer="counts", **FIT)
    np.testing.assert_array_equal(adata.obsm["X_ae"], codes)
    before = fields(adata)
    narrows.scanpy.autoencoder(adata, obsm="X_pca", key_added="of_pca", **FIT)
    assert added(before, adata) == {"obs": {"of_pca_recon_error"}, "obsm": {"of_pca"}, "uns": {"of_pca"}}
    assert adata.uns["of_pca"]["params"]["normalize"] == "standard"


@pytest.mark.parametrize("form", ["sparse", "dense"])
def test_stored_and_backed(tmp_path: Path, form: str) -> None:
    adata = cells()
    if form == "dense":
        adata.X = adata.X.toarray()
    narrows.scanpy.autoencoder(adata, mask_var="some", layers=True, **FIT)
    adata.write_h5ad(tmp_path / "a.h5ad")
    stored = ad.read_h5ad(tmp_path / "a.h5ad")
    np.testing.assert_array_equal(stored.uns["ae"]["history"]["loss"], adata.uns["ae"]["history"]["loss"])
    assert stored.uns["ae"]["params"]["hidden_layer_sizes"].tolist() == [8]
    backed = ad.read_h5ad(tmp_path / "a.h5ad", backed="r")
    narrows.scanpy.autoencoder(backed, mask_var="some", key_added="again", **FIT)
    assert backed.isbacked
    np.testing.assert_array_equal(backed.obsm["again"], adata.obsm["X_ae"])
    copied = narrows.scanpy.autoencoder(backed, mask_var="some", key_added="copied", copy=True, **FIT)
    assert copied is not None
    assert not copied.isbacked
    backed.file.close()


@pytest.mark.parametrize("backed", [False, True])
def test_sparse_cells_are_standardised_as_dense_ones(backed: bool, tmp_path: Path) -> None:
    sparse, dense = cells(), cells()
    dense.X = dense.X.toarray()
    if backed:
        sparse.write_h5ad(tmp_path / "cells.h5ad")
        sparse = ad.read_h5ad(tmp_path / "cells.h5ad", backed="r")
    for adata in (sparse, dense):
        narrows.scanpy.autoencoder(adata, normalize="standard", layers=True, **FIT)
    np.testing.assert_allclose(sparse.obsm["X_ae"], dense.obsm["X_ae"], rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(sparse.obs["ae_recon_error"], dense.obs["ae_recon_error"], rtol=1e-4)
    np.testing.assert_allclose(sparse.var["ae_recon_error"], dense.var["ae_recon_error"], rtol=1e-3)
    np.testing.assert_allclose(sparse.layers["ae_denoised"], dense.layers["ae_denoised"], rtol=1e-3, atol=1e-3)


def test_other_estimators() -> None:
    adata = cells()
    narrows.scanpy.autoencoder(adata, estimator="variational", beta=0.5, **FIT)
    assert adata.uns["ae"]["params"]["beta"] == 0.5


def test_counts() -> None:
    adata = cells()
    narrows.scanpy.autoencoder(adata, estimator="count", likelihood="poisson", layers=True, **FIT)
    assert adata.uns["ae"]["params"]["normalize"] == "none"
    model = narrows.CountAutoencoder(**FIT, likelihood="poisson", random_state=0).fit(cells().X)
    np.testing.assert_array_equal(adata.layers["ae_denoised"], model.denoise(adata.X))
    np.testing.assert_allclose(adata.layers["ae_denoised"].sum(axis=1), adata.X.sum(axis=1).A1, rtol=1e-4)
    assert "ae_dispersion" not in adata.var
    losses = -model.score_samples(adata.X)
    np.testing.assert_array_equal(adata.obs["ae_loss"], losses)
    errors = CellErrors.fit(Loss.POISSON, ArraySource(adata.X), losses).of(adata.X, losses)
    np.testing.assert_allclose(adata.obs["ae_recon_error"], errors, rtol=1e-6)
    mask = np.arange(adata.n_vars) % 3 > 0
    narrows.scanpy.autoencoder(adata, estimator="count", mask_var=mask, **FIT)
    alone = narrows.CountAutoencoder(**FIT, random_state=0).fit(adata.X[:, mask])
    np.testing.assert_array_equal(adata.var["ae_dispersion"][mask], alone.dispersion_)
    assert adata.var["ae_dispersion"][~mask].isna().all()


@pytest.mark.parametrize("params", [{}, {"estimator": "count", "mask_var": "some"}, {"normalize": "standard"}])
def test_a_stored_model_maps_other_cells(params: dict[str, Any], tmp_path: Path) -> None:
    """Genes are matched by name: in another order, and with others between them, on disk as in memory."""
    adata, path = cells(), tmp_path / "cells.safetensors"
    narrows.scanpy.autoencoder(adata, layers=True, model_path=path, **FIT | params)
    assert adata.uns["ae"]["params"]["model_path"] == str(path)
    some = adata[20:35]
    others = ad.AnnData(np.ones((15, 3), np.float32), some.obs)
    others.var_names = list("xyz")
    new = ad.concat([some, others], axis=1)
    new = new[:, np.random.default_rng(0).permutation(new.n_vars)].copy()
    new.X = sp.csr_matrix(new.X)
    new.write_h5ad(tmp_path / "new.h5ad")
    backed = ad.read_h5ad(tmp_path / "new.h5ad", backed="r")
    given = {name: value for name, value in narrows.load(path).metadata_["source"].items() if name != "name"}
    assert given == {"n_rows": 60, "layer": None, "obsm": None, "batch_key": None}
    for found, model in ((new, path), (backed, str(path)), (new.copy(), narrows.load(path))):
        before = fields(found)
        narrows.scanpy.encode(found, model, layers=not found.isbacked, key_added="mapped")
        np.testing.assert_array_equal(found.obsm["mapped"], some.obsm["X_ae"])
        np.testing.assert_array_equal(found.obs["mapped_recon_error"], some.obs["ae_recon_error"])
        assert np.isnan(found.var["mapped_recon_error"]["x"])
        assert {"obs", "varm"} <= added(before, found).keys()
        if not found.isbacked:
            np.testing.assert_array_equal(
                found[:, some.var_names].layers["mapped_denoised"], some.layers["ae_denoised"]
            )
        found.copy(tmp_path / "all.h5ad") if found.isbacked else found.write_h5ad(tmp_path / "all.h5ad")
    backed.file.close()
    lacking = new[:, ~new.var_names.isin(["gene4", "gene7"])].copy()
    with pytest.raises(DataError, match=r"lacks 2 of the \d+ genes of the model: gene4, gene7;"):
        narrows.scanpy.encode(lacking, path)
    new.var_names = ["gene4" if name == "x" else name for name in new.var_names]
    with pytest.raises(DataError, match="gene4 is not unique"):
        narrows.scanpy.encode(new, path)


def test_a_model_of_the_command_line_maps_cells(tmp_path: Path) -> None:
    from cli_runs import narrows as command

    adata = cells()
    adata.write_h5ad(tmp_path / "x.h5ad")
    args = ["--layer", "counts", "--components", 3, "--hidden", 8, "--epochs", 3, "--quiet", "--estimator", "count"]
    assert command("fit", tmp_path / "x.h5ad", "--out", tmp_path / "run", *args) == 0
    adata.X = None
    narrows.scanpy.encode(adata, tmp_path / "run")
    np.testing.assert_array_equal(adata.obsm["X_ae"], ad.read_h5ad(tmp_path / "run" / "latent.h5ad").X)
    with pytest.raises(DataError, match="no X"):
        narrows.scanpy.encode(adata, tmp_path / "run", layer="X")
    with pytest.raises(ModelFileError, match="x\\.h5ad"):
        narrows.scanpy.encode(adata, tmp_path / "x.h5ad")
    with pytest.raises(TypeError, match="model is a PCA"):
        narrows.scanpy.encode(adata, type("PCA", (), {})())


def test_cells_of_unknown_batches_get_codes_only(tmp_path: Path) -> None:
    adata = cells()
    adata.obs["sample"] = np.array(["a", "b"])[np.arange(60) % 2]
    narrows.scanpy.autoencoder(adata, batch_key="sample", model_path=tmp_path / "m.safetensors", **FIT)
    codes = adata.obsm["X_ae"].copy()
    narrows.scanpy.encode(adata, tmp_path / "m.safetensors", key_added="again")
    np.testing.assert_array_equal(adata.obs["again_recon_error"], adata.obs["ae_recon_error"])
    adata.obs["sample"] = "c"
    with pytest.raises(ValueError, match="'c'"):
        narrows.scanpy.encode(adata, tmp_path / "m.safetensors")
    before = fields(adata)
    narrows.scanpy.encode(adata, tmp_path / "m.safetensors", errors=False, key_added="codes")
    np.testing.assert_array_equal(adata.obsm["codes"], codes)
    assert added(before, adata) == {"obsm": {"codes"}, "uns": {"codes"}}


def test_results_of_an_earlier_call_do_not_stay() -> None:
    adata = cells()
    narrows.scanpy.autoencoder(adata, estimator="count", layers=True, key_added="k", **FIT)
    assert {"k_dispersion", "k_recon_error"} <= set(adata.var)
    other = cells()
    for params in ({}, {"obsm": "X_pca"}):
        for each in (adata, other):
            narrows.scanpy.autoencoder(each, key_added="k", **FIT | params)
        assert fields(adata) == fields(other)


def test_a_wrong_key_or_path_is_refused_before_the_fit(tmp_path: Path) -> None:
    adata = cells()
    before = fields(adata)
    for key, error in (("a/b", ValueError), ("/", ValueError), ("", ValueError), (".", ValueError), (3, TypeError)):
        with pytest.raises(error, match="key_added"):
            narrows.scanpy.autoencoder(adata, key_added=key, **FIT)
        with pytest.raises(error, match="key_added"):
            narrows.scanpy.encode(adata, tmp_path / "none", key_added=key)
    for path in (tmp_path, tmp_path / "none" / "m.safetensors"):
        with pytest.raises(OutputError, match="model_path"):
            narrows.scanpy.autoencoder(adata, model_path=path, **FIT)
    assert added(before, adata) == {}


@pytest.mark.parametrize("kind", ["category", "str", "int"])
def test_batch_key(kind: str, tmp_path: Path) -> None:
    adata, numbers = cells(), np.arange(60) % 3
    adata.obs["sample"] = numbers if kind == "int" else np.array(["a", "b", "c"])[numbers]
    if kind == "category":
        adata.obs["sample"] = adata.obs["sample"].astype("category")
    adata.write_h5ad(tmp_path / "a.h5ad")
    params: dict[str, Any] = {"estimator": "count", "mask_var": "some", "layers": True, "batch_key": "sample", **FIT}
    narrows.scanpy.autoencoder(adata, **params)
    assert adata.uns["ae"]["params"]["batch_key"] == "sample"
    X, labels = cells().X[:, np.arange(20) % 3 != 0], np.asarray(adata.obs["sample"])
    model = narrows.CountAutoencoder(**FIT, random_state=0).fit(X, batch=labels)
    assert len(model.batches_) == 3
    np.testing.assert_array_equal(adata.obsm["X_ae"], model.transform(X))
    np.testing.assert_array_equal(adata.obs["ae_loss"], -model.score_samples(X, batch=labels))
    used = np.asarray(adata.var["some"])
    np.testing.assert_array_equal(adata.var["ae_recon_error"][used], model.feature_errors(X, batch=labels))
    np.testing.assert_array_equal(adata.varm["AE_sensitivity"][used], model.latent_sensitivity(X, batch=labels).T)
    np.testing.assert_array_equal(adata.layers["ae_denoised"][:, used], model.denoise(X, batch=labels))
    backed = ad.read_h5ad(tmp_path / "a.h5ad", backed="r")
    narrows.scanpy.autoencoder(backed, **params)
    np.testing.assert_array_equal(backed.obsm["X_ae"], adata.obsm["X_ae"])
    backed.file.close()


@pytest.mark.parametrize(
    ("params", "error", "text"),
    [
        ({"batch_key": "none"}, KeyError, "batch_key='none' is not a column of adata.obs; it has half"),
        ({"batch_key": "half"}, DataError, "obs['half']: nan in row 30"),
        ({"layer": "none"}, KeyError, "counts"),
        ({"obsm": "none"}, KeyError, "X_pca"),
        ({"mask_var": "none"}, KeyError, "some"),
        ({"mask_var": np.ones(3, bool)}, ValueError, "20 booleans"),
        ({"mask_var": np.zeros(20, bool)}, ValueError, "no gene"),
        ({"obsm": "X_pca", "layers": True}, ValueError, "replaces the genes"),
        ({"estimator": "none"}, ValueError, "variational"),
        ({"betta": 3}, ValueError, "betta"),
        ({"n_components": 0}, ValueError, "n_components=0"),
        ({"loss": "bce", "normalize": "none"}, DataError, "[0, 1]"),
        ({"estimator": "count", "obsm": "X_pca"}, DataError, "counts"),
    ],
)
def test_what_cannot_be_done_leaves_the_object_whole(params: dict[str, Any], error: type[Exception], text: str) -> None:
    adata = cells()
    adata.obs["half"] = ["known"] * 30 + [np.nan] * 30
    before = fields(adata)
    with pytest.raises(error) as raised:
        narrows.scanpy.autoencoder(adata, **FIT | params)
    assert text in str(raised.value)
    assert added(before, adata) == {}


@pytest.mark.parametrize(
    "params",
    [
        {"random_state": np.random.default_rng(0)},
        {"random_state": np.random.RandomState(0), "alpha": np.float32(0.1)},
        {"estimator": "conv", "image_shape": (4, 5, 1), "filters": (2, 2), "kernel_size": (3, (3, 1)), "strides": 1},
        {
            "estimator": "conv",
            "image_shape": [4, 5, 1],
            "filters": (2, 2),
            "kernel_size": ((3, 1), (1, 3)),
            "strides": 1,
        },
    ],
    ids=["generator", "scalars", "mixed", "pairs"],
)
def test_whatever_the_parameters_are_they_can_be_stored(params: dict[str, Any], tmp_path: Path) -> None:
    adata = cells()
    narrows.scanpy.autoencoder(adata, **(FIT | params))
    adata.write_h5ad(tmp_path / "cells.h5ad")
    stored = ad.read_h5ad(tmp_path / "cells.h5ad").uns["ae"]["params"]
    assert stored["n_components"] == 3
    assert "random_state" not in stored or isinstance(stored["random_state"], int | np.integer)


def test_what_is_no_anndata_is_said() -> None:
    with pytest.raises(TypeError, match="adata is a ndarray, not an AnnData"):
        narrows.scanpy.autoencoder(np.ones((5, 3)), **FIT)


def test_without_x() -> None:
    with pytest.raises(DataError, match="no X"):
        narrows.scanpy.autoencoder(ad.AnnData(obs=cells().obs), **FIT)


def test_scanpy_is_not_imported() -> None:
    code = "import narrows.scanpy, sys; assert 'scanpy' not in sys.modules and 'anndata' not in sys.modules"
    path = str(Path(narrows.__file__).parent.parent)
    subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": path}, check=True, timeout=60)
