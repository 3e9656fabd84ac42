"""Rows that a normalisation shifts, of which CSR keeps the nonzeros: learned from and applied to as the dense rows."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp

import narrows
from cli_runs import SMALL, metrics
from cli_runs import narrows as command
from narrows import RBM, Autoencoder, DeepAutoencoder, VariationalAutoencoder
from narrows.data import ArraySource
from narrows.data.normalize import Normalizer
from narrows.data.normalized import NormalizedSource
from narrows.errors import DataError
from narrows.fitting.table import Table, density
from narrows.rows.shifted import Shifted
from narrows.training import Checkpoint, Interrupted

ROWS, COLUMNS = 130, 60


def values(rows: int = ROWS, seed: int = 0) -> np.ndarray:
    """Few numbers decide what is not zero, most of it is; of one feature nothing, of another everything."""
    rng = np.random.default_rng(seed)
    rates = rng.gamma(1.0, 1.0, (rows, 2)) @ rng.gamma(0.4, 1.0, (2, COLUMNS))
    X = np.log1p(rng.poisson(0.15 * rates))
    X[:, 7] = 0
    X[:, 3] = rng.uniform(1, 2, rows)
    return X


def source(X: np.ndarray, kind: str = "standard", fitted: Normalizer | None = None, **named: Any) -> NormalizedSource:
    held = ArraySource(sp.csr_array(X), **named)
    return NormalizedSource(held, fitted or Normalizer(kind).fit(held))


def plain(table: NormalizedSource) -> np.ndarray:
    return np.asarray(table.read_rows(slice(None)))


COMMON: dict[str, Any] = {
    "n_components": 3, "hidden_layer_sizes": (9,), "max_iter": 4, "batch_size": 32, "random_state": 0,
    "early_stopping": False, "n_threads": 1,
}  # fmt: skip
KINDS: dict[str, tuple[type, str, dict[str, Any]]] = {
    "gram": (Autoencoder, "standard", {"sparse_decoder": "gram"}),
    "dense decoder": (Autoencoder, "standard", {"sparse_decoder": "dense", "alpha": 0.3}),
    "held out": (Autoencoder, "standard", {"sparse_decoder": "gram", "early_stopping": True}),
    "huber": (Autoencoder, "standard", {"loss": "huber", "tied_weights": True}),
    "cross-entropy": (Autoencoder, "minmax", {"loss": "bce", "clip_norm": 1.0}),
    "salt and pepper": (Autoencoder, "standard", {"corruption": "salt_and_pepper", "corruption_level": 0.2}),
    "masking": (Autoencoder, "standard", {"corruption": "masking", "corruption_level": 0.2}),
    "variational": (VariationalAutoencoder, "standard", {"loss": "gaussian"}),
    "machine": (RBM, "standard", {"visible": "gaussian", "learning_rate_init": 1e-3}),
    "deep": (DeepAutoencoder, "standard", {"pretrain": "greedy", "pretrain_max_iter": 2}),
}


def build(name: str, **other: Any) -> Any:
    kind, _, own = KINDS[name]
    params = COMMON | own | other
    if kind is RBM:
        params = {k: v for k, v in params.items() if k in RBM().get_params()}
    return kind(**params)


def minima(X: np.ndarray) -> np.ndarray:
    """With some below zero, of which minmax makes others than zeros."""
    return X - 0.5 * (np.arange(COLUMNS) % 3 == 0) * (X > 0.7) * 3


def data_of(name: str, dtype: Any) -> NormalizedSource:
    X = values().astype(dtype)
    return source(minima(X).astype(dtype) if KINDS[name][1] == "minmax" else X, KINDS[name][1])


@pytest.mark.parametrize("precision", ["float32", "float64"])
@pytest.mark.parametrize("name", KINDS)
def test_a_fit_is_that_of_the_dense_rows(name: str, precision: str) -> None:
    table = data_of(name, precision)
    X = plain(table)
    found = build(name, precision=precision).fit(table)
    dense = {"sparse_decoder": "dense"} if "sparse_decoder" in KINDS[name][2] else {}
    expected = build(name, precision=precision, **dense).fit(X)
    assert "shift" in str(found.plan_)
    assert "shift" not in str(expected.plan_)
    assert ("sparse_dense" in str(found.plan_)) == (name not in ("salt and pepper", "masking", "machine"))
    close = {"rtol": 1e-7, "atol": 1e-9} if precision == "float64" else {"rtol": 2e-3, "atol": 2e-4}
    for a, b in zip(found.coefs_ + found.intercepts_, expected.coefs_ + expected.intercepts_, strict=True):
        np.testing.assert_allclose(a, b, **close)
    np.testing.assert_allclose(found.history_["loss"], expected.history_["loss"], rtol=close["rtol"] / 10)
    # What has been learned from either is applied to rows of either form.
    methods = ["transform", "reconstruct", "feature_errors", "latent_sensitivity"]
    methods += [] if name == "variational" else ["score_samples"]  # whose noise is of the bits of a row
    for method in methods if name != "machine" else ["transform", "reconstruct", "score_samples"]:
        wanted = getattr(found, method)(X)
        scale = np.abs(wanted).max()
        for data in (table, table.read_stored(slice(None))):
            got = getattr(found, method)(data)
            np.testing.assert_allclose(got, wanted, rtol=close["rtol"], atol=close["atol"] * scale, err_msg=method)


@pytest.mark.parametrize("name", ["gram", "dense decoder", "held out", "variational"])
def test_rows_in_batches_less_a_shift(name: str) -> None:
    table, batch = data_of(name, np.float64), np.array(["a", "b", "c"])[np.arange(ROWS) % 3]
    X = plain(table)
    dense = {"sparse_decoder": "dense"} if "sparse_decoder" in KINDS[name][2] else {}
    found = build(name, precision="float64").fit(table, batch=batch)
    expected = build(name, precision="float64", **dense).fit(X, batch=batch)
    assert "shift" in str(found.plan_)
    for a, b in zip(found.coefs_ + found.intercepts_, expected.coefs_ + expected.intercepts_, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-7, atol=1e-9)
    for method in ("reconstruct", "feature_errors", "latent_sensitivity"):
        wanted = getattr(found, method)(X, batch=batch)
        np.testing.assert_allclose(getattr(found, method)(table, batch=batch), wanted, rtol=1e-7, atol=1e-8)


def test_bounds_of_a_variational_model_are_near_those_of_dense_rows() -> None:
    table = data_of("variational", np.float32)
    model = build("variational").fit(table)
    dense, implicit = (model.elbo(data, 200).mean() for data in (plain(table), table))
    assert implicit == pytest.approx(dense, rel=2e-3)
    assert np.isfinite(model.score_samples(table)).all()


def test_rows_are_stored_as_they_are_read() -> None:
    X = values()
    table = source(X)
    assert not table.is_sparse
    assert table.n_stored == np.count_nonzero(X)
    rows = np.array([5, 2, 2, 99])
    stored = table.read_stored(rows)
    assert isinstance(stored, Shifted)
    np.testing.assert_allclose(stored.toarray(), table.read_rows(rows), atol=1e-12)
    np.testing.assert_allclose(stored[1:3].toarray(), table.read_rows(rows[1:3]), atol=1e-12)
    assert stored.extremes() == pytest.approx((stored.toarray().min(), stored.toarray().max()), rel=1e-12)
    assert density(table) == np.count_nonzero(X) / X.size
    assert Table(table).row_bytes < Table(table, implicit=False).row_bytes / 2
    far = X.copy()
    far[:, 4] = 1e5 + np.arange(ROWS)  # in float32 a scaled value would say little of what is above the mean
    for other in (source(X, "log1p"), NormalizedSource(ArraySource(X), table.normalizer), source(far)):
        assert other.shift is None
        assert type(other.read_stored(rows)) is type(other.read_rows(rows))


@pytest.mark.parametrize("name", ["gram", "dense decoder", "masking"])
def test_blocks_from_a_file_train_to_the_bits_of_memory(name: str, tmp_path: Path) -> None:
    anndata = pytest.importorskip("anndata")
    X = values().astype(np.float32)
    anndata.AnnData(sp.csr_matrix(X)).write_h5ad(tmp_path / "x.h5ad")
    with narrows.data.open(tmp_path / "x.h5ad") as file:
        fitted = Normalizer("standard").fit(file)
        options = {"shuffle": False, "n_threads": 2}
        streamed = build(name, **options).fit(NormalizedSource(file, fitted), block_bytes=4000)
        whole = build(name, **options).fit(source(X, fitted=fitted))
        for a, b in zip(streamed.coefs_ + streamed.intercepts_, whole.coefs_ + whole.intercepts_, strict=True):
            np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(streamed.transform(NormalizedSource(file, fitted)), whole.transform(source(X)))


def test_bits_do_not_depend_on_threads(cpp: str) -> None:
    table = data_of("gram", np.float32)
    one, three = (build("gram", n_threads=n, backend=cpp).fit(table) for n in (1, 3))
    for a, b in zip(one.coefs_ + one.intercepts_, three.coefs_ + three.intercepts_, strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(one.score_samples(table), three.score_samples(table))


def test_an_interrupted_fit_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    table = data_of("gram", np.float32)
    whole = build("gram").fit(table)
    asked = itertools.count()
    with pytest.raises(Interrupted):
        build("gram").fit(
            table, checkpoint=Checkpoint(tmp_path / "c", stop=lambda: "tired" if next(asked) >= 2 else None)
        )
    resumed = build("gram").fit(table, checkpoint=Checkpoint(tmp_path / "c", resume="require"))
    for a, b in zip(whole.coefs_ + whole.intercepts_, resumed.coefs_ + resumed.intercepts_, strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_saved_model_needs_no_shift(tmp_path: Path) -> None:
    table = data_of("gram", np.float32)
    model = build("gram").fit(table)
    model.save(tmp_path / "m.safetensors")
    again = narrows.load(tmp_path / "m.safetensors")
    other = source(values(seed=1))  # of other means
    for data in (table, other, plain(table)):
        for method in ("transform", "score_samples"):
            np.testing.assert_array_equal(getattr(again, method)(data), getattr(model, method)(data))
    for estimator in (again, copy.deepcopy(model)):
        before = estimator.score(table)
        estimator.partial_fit(table)
        assert estimator.score(table) > before


def test_rows_held_apart_may_be_of_either_form() -> None:
    table = data_of("gram", np.float32)
    X = plain(table)
    fits = [build("gram").fit(table, X_val=held) for held in (table, X)]
    fits += [build("dense decoder", alpha=0.0).fit(X, X_val=held) for held in (table, X)]
    for other in fits[1:]:
        np.testing.assert_allclose(other.history_["val_loss"], fits[0].history_["val_loss"], rtol=1e-4)


def test_a_target_of_its_own_is_read_as_it_is() -> None:
    X = values()
    table = source(X)
    found = build("gram", precision="float64").fit(table, sp.csr_array(X))
    expected = build("dense decoder", alpha=0.0, precision="float64").fit(plain(table), X)
    for a, b in zip(found.coefs_, expected.coefs_, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-7, atol=1e-9)
    np.testing.assert_allclose(found.score_samples(table, X), expected.score_samples(plain(table), X), rtol=1e-7)


def test_a_cross_entropy_takes_shifted_rows_between_0_and_1_alone() -> None:
    X = minima(values())
    model = build("cross-entropy").fit(source(X, "minmax"))
    fitted = source(X, "minmax").normalizer
    X[11, 3] = 9
    for apply in (model.score_samples, lambda table: build("cross-entropy").fit(table)):
        with pytest.raises(DataError, match=r"in row 11, column 3; .*needs values in"):
            apply(source(X, fitted=fitted))


def test_counts_are_not_standardised() -> None:
    with pytest.raises(DataError, match="is not a count"):
        Autoencoder(**COMMON, loss="poisson").fit(source(values()))


def test_the_command_line_standardises_implicitly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    anndata = pytest.importorskip("anndata")
    monkeypatch.chdir(tmp_path)
    X = values().astype(np.float32)
    names = {"index": [f"g{i}" for i in range(COLUMNS)]}
    import pandas as pd

    anndata.AnnData(sp.csr_matrix(X), var=pd.DataFrame(**names)).write_h5ad("x.h5ad")
    assert command("fit", "x.h5ad", "--out", "run", "--normalize", "standard", *SMALL) == 0
    assert "CSR stays CSR, with one shift" in (tmp_path / "run" / "run.log").read_text()
    model = narrows.load("run/model.safetensors")
    table = source(X, var_names=names["index"])
    assert metrics("run")["mse_per_feature"] == pytest.approx(model.feature_errors(table).mean(), rel=1e-4)
    assert command("encode", "run", "x.h5ad", "-o", "z.npy") == 0
    assert command("score", "run", "x.h5ad", "-o", "s.npy") == 0
    codes = np.load("z.npy")
    np.testing.assert_array_equal(codes, model.transform(table))
    np.testing.assert_array_equal(codes, anndata.read_h5ad("run/latent.h5ad").X)
    np.testing.assert_array_equal(np.load("s.npy").ravel(), -model.score_samples(table))
