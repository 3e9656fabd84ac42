"""The PCA baseline against scikit-learn, dense and sparse, and the measures of a latent space."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp
from sklearn.decomposition import PCA

from narrows.data import ArraySource
from narrows.data.normalize import Normalizer
from narrows.data.normalized import NormalizedSource
from narrows.evaluation.baselines import pca
from narrows.evaluation.metrics import feature_errors, knn_accuracy, missing_labels, sample_rows


def table(n=700, d=90, seed=0):
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(n, 12)) @ rng.normal(size=(12, d)) + 0.8 * rng.normal(size=(n, d)) + 3
    X[X < 2] = 0
    return X


@pytest.mark.parametrize("layout", [np.asarray, sp.csr_array])
@pytest.mark.parametrize("k", [1, 8, 40, 90, 200])
def test_pca_agrees_with_scikit_learn(layout, k):
    X = table()
    exact = PCA(min(k, 90), svd_solver="full").fit(X)
    error = np.mean((exact.inverse_transform(exact.transform(X)) - X) ** 2)
    ours = pca(ArraySource(layout(X)), k)
    assert ours.mse_per_feature == pytest.approx(error, rel=1e-3, abs=1e-9)
    assert ours.mse_per_feature >= error * (1 - 1e-9) - 1e-9  # never better than the optimum
    assert ours.scores.shape == (700, min(k, 90))
    top = abs(np.corrcoef(ours.scores[:, 0], exact.transform(X)[:, 0])[0, 1])
    assert top == pytest.approx(1, abs=1e-4)


def test_pca_of_pure_noise_is_still_near_the_optimum():
    X = np.random.default_rng(1).normal(size=(800, 300))  # flat spectrum: the hard case
    exact = PCA(16, svd_solver="full").fit(X)
    error = np.mean((exact.inverse_transform(exact.transform(X)) - X) ** 2)
    assert pca(ArraySource(X), 16).mse_per_feature == pytest.approx(error, rel=5e-3)


def test_pca_on_chosen_rows_of_a_normalised_source():
    X = np.random.default_rng(0).poisson(2.0, (600, 40)).astype(np.float32)
    fitted = Normalizer("log1p").fit(ArraySource(X))
    rows = sample_rows(600, seed=3, max_rows=250)
    sparse = NormalizedSource(ArraySource(sp.csr_array(X)), fitted)
    Y = fitted.transform(X)[rows].astype(float)
    exact = PCA(5, svd_solver="full").fit(Y)
    error = np.mean((exact.inverse_transform(exact.transform(Y)) - Y) ** 2)
    result = pca(sparse, 5, rows=rows)
    assert result.n_rows == 250
    assert result.mse_per_feature == pytest.approx(error, rel=2e-3)


def test_constant_data_has_no_error():
    assert pca(ArraySource(np.full((50, 4), 2.5)), 2).mse_per_feature == pytest.approx(0, abs=1e-20)


def test_sample_rows():
    assert np.array_equal(sample_rows(10, 0), np.arange(10))
    a, b = sample_rows(10**6, 1, 500), sample_rows(10**6, 1, 500)
    assert np.array_equal(a, b)
    assert len(np.unique(a)) == 500
    assert np.all(np.diff(a) > 0)


@pytest.mark.parametrize("layout", [np.asarray, sp.csr_array])
def test_feature_errors(layout):
    X = table().astype(np.float32)

    def halve(block, rows):
        assert len(X[rows]) == block.shape[0]
        return (block.toarray() if sp.issparse(block) else block) * np.float32(0.5)

    errors = feature_errors(ArraySource(layout(X)), halve)
    np.testing.assert_allclose(errors, np.mean((X / 2) ** 2, axis=0), rtol=1e-5)


def test_knn_accuracy():
    rng = np.random.default_rng(0)
    labels = np.repeat(["a", "b", "c"], 100)
    codes = rng.normal(size=(300, 2)) + np.repeat([[0, 0], [20, 0], [0, 20]], 100, axis=0)
    assert knn_accuracy(codes, labels) == 1.0
    assert knn_accuracy(codes, rng.permutation(labels)) < 0.5
    labels[:2] = "rare"  # too small a class for five folds
    assert knn_accuracy(codes, labels) == 1.0
    assert knn_accuracy(codes, np.zeros(300, int)) is None
    assert knn_accuracy(codes[:10], np.repeat([0, 1], 5)) is None


def test_missing_labels_are_no_class():
    """A third of the rows has no label, at random: as a class it would be mixed with all others."""
    pandas = pytest.importorskip("pandas")
    rng = np.random.default_rng(0)
    classes = np.repeat([0, 1, 2], 100)
    codes = rng.normal(size=(300, 2)) + np.repeat([[0, 0], [20, 0], [0, 20]], 100, axis=0)
    gone = rng.random(300) < 0.3
    words = np.asarray(["a", "b", "none"], object)[classes]  # "none" is a class, "None" is not
    for labels in (
        np.where(gone, np.nan, classes),
        np.where(gone, -1, classes),
        np.where(gone, -1.0, classes),
        np.where(gone, None, classes),
        np.where(gone, "", words.astype(str)),
        np.where(gone, np.nan, words),
        np.where(gone, pandas.NA, words),
        np.where(gone, None, words).astype(str),
        np.where(gone, b"", words.astype("S")),
        pandas.Series(classes).astype("Int64").mask(gone).to_numpy(dtype=object),
        pandas.Categorical(np.where(gone, None, words)),
        np.where(gone, np.datetime64("NaT"), np.datetime64("2026-01-01") + classes),
    ):
        np.testing.assert_array_equal(missing_labels(labels), gone)
        assert knn_accuracy(codes, labels) == 1.0
    assert not missing_labels(np.where(gone, -1, 1)).any()
    assert not missing_labels(np.where(gone, -0.5, classes)).any()
    assert knn_accuracy(codes, np.full(300, np.nan)) is None
