"""CountAutoencoder, and the other estimators with a loss of counts."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from scipy import special

import narrows
from estimator_cases import SMALL, same_rows
from narrows import Autoencoder, CountAutoencoder, VariationalAutoencoder, cli
from narrows.data import ArraySource
from narrows.plan.ops import DISPERSION_PACE

KINDS = [
    ("poisson", "gene"),
    ("nb", "gene"),
    ("nb", "gene-cell"),
    ("zinb", "gene"),
    ("zinb", "gene-cell"),
]
kinds = pytest.mark.parametrize(("likelihood", "dispersion"), KINDS)
links = pytest.mark.parametrize("link", ["softmax", "exp"])


@pytest.fixture(scope="module")
def X() -> sp.csr_array:
    """Counts of 300 cells of three kinds and 40 genes; cell 7 and gene 11 have none."""
    rng = np.random.default_rng(0)
    shares = rng.dirichlet(np.full(40, 0.3), 3)
    mean = shares[np.arange(300) % 3] * rng.gamma(4, 50, (300, 1))
    counts = rng.poisson(mean * rng.gamma(5, 0.2, mean.shape)).astype(np.float32)
    counts[7], counts[:, 11] = 0, 0
    return sp.csr_array(counts)


def small(likelihood: str = "nb", **params: Any) -> CountAutoencoder:
    given = {"hidden_layer_sizes": 8, "batch_size": 32, "likelihood": likelihood}
    return CountAutoencoder(3, **(SMALL | given | params))


@links
@kinds
def test_learns_and_is_saved(X: sp.csr_array, likelihood: str, dispersion: str, link: str, tmp_path: Path) -> None:
    params = {"likelihood": likelihood, "dispersion": dispersion, "link": link, "early_stopping": False}
    model = small(**params, max_iter=40, learning_rate_init=1e-2).fit(X)
    losses = model.history_["loss"]
    assert losses[-1] < losses[0] - 20
    # The score is complete: minus the log-likelihood of rows.
    assert -model.score(X) == pytest.approx(losses[-1], rel=0.05)
    path = tmp_path / "model.safetensors"
    model.save(path)
    loaded = narrows.load(path)
    for one, other in (
        (model.transform(X), loaded.transform(X)),
        (model.denoise(X), loaded.denoise(X)),
        (model.score_samples(X), loaded.score_samples(X)),
    ):
        np.testing.assert_array_equal(one, other)
    size_sum = np.median(X.sum(axis=1)[X.sum(axis=1) > 0])
    assert loaded.plan_.spec.data.size_sum == model.plan_.spec.data.size_sum == size_sum


@links
def test_sparse_and_dense_are_one(X: sp.csr_array, link: str) -> None:
    sparse, dense = small(link=link).fit(X), small(link=link).fit(X.toarray())
    np.testing.assert_allclose(sparse.history_["loss"], dense.history_["loss"], rtol=1e-5)
    np.testing.assert_allclose(sparse.transform(X), dense.transform(X.toarray()), rtol=1e-3, atol=1e-4)
    streamed = small(link=link).fit(ArraySource(X))
    assert same_rows(streamed.transform(X), sparse.transform(X))


@kinds
def test_a_row_stands_alone(X: sp.csr_array, likelihood: str, dispersion: str) -> None:
    model = small(likelihood, dispersion=dispersion).fit(X)
    for method in (model.transform, model.denoise, model.score_samples):
        whole = method(X)
        assert same_rows(method(X[5:9]), whole[5:9])
        assert same_rows(method(X[7:8]), whole[7:8])


def test_denoised_rows_keep_their_sums(X: sp.csr_array) -> None:
    model = small().fit(X)
    np.testing.assert_allclose(model.denoise(X).sum(axis=1), X.sum(axis=1), rtol=1e-5)
    for link in ("softmax", "exp"):
        scaled = small(link=link).fit(X).denoise(X, library=1e4).sum(axis=1)
        np.testing.assert_allclose(np.delete(scaled, 7), 1e4, rtol=1e-5)
        assert scaled[7] == 0
    with pytest.raises(ValueError, match="library=-1"):
        model.denoise(X, library=-1)
    decoded = model.inverse_transform(model.transform(X))
    np.testing.assert_allclose(decoded.sum(axis=1), model.plan_.spec.data.size_sum, rtol=1e-5)


def test_denoising_explains_counts_left_out() -> None:
    """Molecular cross-validation (Batson, Royer and Webber, 2019): counts are split in two, of which one is explained
    by means that the other gave."""
    rng = np.random.default_rng(3)
    shares = rng.dirichlet(np.full(60, 0.3), 4)
    counts = rng.poisson(shares[np.arange(800) % 4] * 120).astype(np.float32)
    seen = rng.binomial(counts.astype(int), 0.5).astype(np.float32)
    left = counts - seen
    model = CountAutoencoder(4, hidden_layer_sizes=16, likelihood="poisson", **(SMALL | {"max_iter": 80})).fit(seen)

    def loss(mean: Any) -> float:
        return float((mean - special.xlogy(left, np.maximum(mean, 1e-3))).mean())

    assert loss(model.denoise(seen)) < loss(np.broadcast_to(seen.mean(axis=0), seen.shape)) < loss(seen)


def test_rows_and_features_without_counts(X: sp.csr_array, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "narrows"):
        model = small(early_stopping=False).fit(X)
    messages = [record.message for record in caplog.records]
    assert "1 of 300 rows to train on have no counts" in messages
    assert "1 of 40 features to train on have no counts" in messages
    assert model.score_samples(X)[7] == 0
    assert (model.denoise(X)[7] == 0).all()
    assert np.isfinite(model.transform(X)).all()
    nothing = small(early_stopping=False).fit(np.zeros((10, 5)))
    assert nothing.loss_ == 0


@pytest.mark.parametrize("value", [-1.0, 0.5])
@pytest.mark.parametrize("form", [sp.csr_array, np.asarray])
def test_what_is_no_count_is_named(X: sp.csr_array, form: Any, value: float) -> None:
    bad = X.toarray()
    bad[20, 5] = value
    model = small().fit(X)
    for call in (small().fit, model.transform, model.denoise, model.score_samples):
        with pytest.raises(narrows.errors.DataError, match=f"X: {value:g} in row 20, column 5 is not a count"):
            call(form(bad))
    names = [f"gene{i}" for i in range(40)]
    with pytest.raises(narrows.errors.DataError, match=r"in row 20, column 5 \(gene5\) is not a count"):
        small().fit(pd.DataFrame(bad, columns=names))


def test_counts_of_other_genes_can_be_explained(X: sp.csr_array) -> None:
    target = X[:, :25]
    model = small("zinb", link="exp", early_stopping=False).fit(X, target)
    assert model.denoise(X).shape == (300, 25)
    assert model.plan_.spec.log_normalize
    assert model.plan_.spec.data.size_sum == np.median(target.sum(axis=1)[target.sum(axis=1) > 0])
    assert np.isfinite(model.score_samples(X, target)).all()
    plain = Autoencoder(2, loss="nb", **SMALL).fit(np.random.default_rng(0).normal(size=(300, 6)), target)
    assert not plain.plan_.spec.log_normalize


@links
@pytest.mark.parametrize("loss", ["poisson", "nb", "zinb"])
def test_the_other_estimators_take_the_losses(X: sp.csr_array, loss: str, link: str) -> None:
    params = {"hidden_layer_sizes": 8, "batch_size": 32, "loss": loss, "output_activation": link}
    one = Autoencoder(3, **(SMALL | params)).fit(X)
    other = small(loss, link=link).fit(X)
    np.testing.assert_array_equal(one.transform(X), other.transform(X))
    assert Autoencoder(3, **(SMALL | params | {"output_activation": "auto"})).fit(X).plan_.spec.layers[-1].activation
    drawn = VariationalAutoencoder(3, **(SMALL | params)).fit(X)
    bound, likelihood = drawn.elbo(X, 20), drawn.log_likelihood(X, 200)
    assert (likelihood > bound - 1).all()
    assert likelihood.mean() > bound.mean()
    assert drawn.sample(5, 0).shape == (5, 40)
    assert drawn.sample(5, 0, noise=True).shape == (5, 40)


@links
@kinds
def test_samples_have_the_moments_of_the_likelihood(
    X: sp.csr_array, likelihood: str, dispersion: str, link: str
) -> None:
    params = {"hidden_layer_sizes": 8, "batch_size": 32, "output_activation": link, "activation": "tanh"}
    model = VariationalAutoencoder(3, loss=likelihood, dispersion=dispersion, **(SMALL | params)).fit(X[:, :12])
    state = model._network.state
    state["W2"][...], state["b2"][...] = 0, np.linspace(-2, 2, 8)  # codes do not matter: one distribution for all rows
    if "log_dispersion" in state:  # moderate ones, so that few draws know the variance
        state["log_dispersion"][...] = np.linspace(0, 2, 12) / DISPERSION_PACE
    n, library = 10_000, 300.0
    means = model.sample(n, 0, library=library)
    assert (means == means[0]).all()
    outputs = np.tanh(state["b2"][0].astype(np.float64)) @ state["W3"] + state["b3"][0]
    logits, *others = np.split(outputs, len(outputs) // 12)
    mean = special.softmax(logits) * library
    if link == "exp":
        mean = np.exp(logits) * library / model.plan_.spec.data.size_sum
    np.testing.assert_allclose(means[0], mean, rtol=1e-4)
    theta, zero = np.inf, 0.0
    if likelihood != "poisson":
        theta = np.exp(others[0]) if dispersion == "gene-cell" else model.dispersion_.astype(np.float64)
    if likelihood == "zinb":
        zero = special.expit(others[-1])
    variance = mean + mean**2 / theta
    empty = np.exp(-mean) if likelihood == "poisson" else (theta / (theta + mean)) ** theta
    empty = zero + (1 - zero) * empty
    variance = (1 - zero) * (variance + mean**2) - ((1 - zero) * mean) ** 2

    drawn = model.sample(n, 0, noise=True, library=library)
    assert (drawn == np.floor(drawn)).all()
    assert (drawn.min() >= 0) & np.isfinite(drawn).all()
    assert (np.abs(drawn.mean(axis=0) - (1 - zero) * mean) < 5 * np.sqrt(variance / n)).all()
    np.testing.assert_allclose(drawn.var(axis=0), variance, rtol=0.2, atol=5e-3)
    assert (np.abs((drawn == 0).mean(axis=0) - empty) < 5 * np.sqrt(empty * (1 - empty) / n) + 1e-3).all()
    assert (np.abs(np.corrcoef(drawn[:, mean > 1].T) - np.eye((mean > 1).sum())) < 0.06).all()
    assert (drawn[:7] == model.sample(7, 0, noise=True, library=library)).all()
    assert (drawn != model.sample(n, 1, noise=True, library=library)).any()


def test_libraries_of_samples(X: sp.csr_array) -> None:
    model = VariationalAutoencoder(3, loss="nb", hidden_layer_sizes=8, batch_size=32, **SMALL).fit(X)
    library = np.array([0.0, 10.0, 1e4])
    np.testing.assert_allclose(model.sample(3, 0).sum(axis=1), model.plan_.spec.data.size_sum, rtol=1e-5)
    np.testing.assert_allclose(model.sample(3, 0, library=library).sum(axis=1), library, rtol=1e-5)
    drawn = model.sample(3, 0, noise=True, library=library).sum(axis=1)
    assert drawn[0] == 0
    assert 8e3 < drawn[2] < 1.2e4
    for wrong, message in ((np.ones(2), "shape"), (-1.0, "not negative"), (np.nan, "finite")):
        with pytest.raises(ValueError, match=message):
            model.sample(3, library=wrong)
    plain = VariationalAutoencoder(3, hidden_layer_sizes=8, **SMALL).fit(X)
    with pytest.raises(ValueError, match="library needs a loss on counts, not loss='mse'"):
        plain.sample(3, library=10.0)


def test_going_on_keeps_the_library(X: sp.csr_array) -> None:
    model = small(warm_start=True).fit(X)
    library = model.plan_.spec.data.size_sum
    model.fit(X[:100])
    assert model.plan_.spec.data.size_sum == library
    model.partial_fit(X[:50])
    assert model.plan_.spec.data.size_sum == library


@links
@kinds
def test_sensitivity_is_the_derivative(X: sp.csr_array, likelihood: str, dispersion: str, link: str) -> None:
    model = small(likelihood, dispersion=dispersion, link=link, precision="float64", activation="tanh").fit(X)
    row, h = X[3:4].toarray().astype(np.float64), 1e-6
    code = model.transform(row)
    ends = [model.inverse_transform(code + s * h * np.eye(3)) for s in (1, -1)]
    np.testing.assert_allclose(model.latent_sensitivity(row), np.abs(ends[0] - ends[1]) / (2 * h), rtol=1e-4, atol=1e-6)


def test_bad_parameters(X: sp.csr_array) -> None:
    for params, message in (
        ({"likelihood": "mse"}, "likelihood='mse' must be one of poisson, nb, zinb"),
        ({"link": "linear"}, "link='linear' must be one of softmax, exp"),
        ({"dispersion": "cell"}, "dispersion='cell' must be one of gene, gene-cell"),
        ({"corruption": "salt_and_pepper", "corruption_level": 0.1}, "cannot be used for counts"),
    ):
        with pytest.raises(ValueError, match=message):
            small(**params).fit(X)
    with pytest.raises(ValueError, match="output_activation='linear' does not go with loss='nb'"):
        Autoencoder(2, loss="nb", output_activation="linear").fit(X)
    with pytest.raises(ValueError, match="loss='zinb': the output layer has several outputs"):
        Autoencoder(2, loss="zinb", tied_weights=True).fit(X)
    with pytest.raises(AttributeError, match="no dispersion for each feature"):
        small("poisson").fit(X).dispersion_  # noqa: B018
    assert small().fit(X).dispersion_.shape == (40,)


def test_command_line(X: sp.csr_array, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, out = tmp_path / "counts.npz", tmp_path / "run"
    sp.save_npz(data, X)
    fit = ["fit", str(data), "--epochs", "2", "--components", "2", "--hidden", "8", "--threads", "1", "--quiet"]
    assert cli.main([*fit, "--out", str(out), "--estimator", "count", "--loss", "zinb"]) == 0
    model = narrows.load(out / "model.safetensors")
    assert isinstance(model, CountAutoencoder)
    assert model.likelihood == "zinb"
    assert cli.main(["encode", str(out), str(data), "-o", str(tmp_path / "Z.npy")]) == 0
    np.testing.assert_array_equal(np.load(tmp_path / "Z.npy"), model.transform(X))
    assert cli.main([*fit, "--out", str(tmp_path / "other"), "--loss", "nb", "--estimator", "variational"]) == 0
    capsys.readouterr()
    assert cli.main([*fit, "--out", str(tmp_path / "bad"), "--estimator", "count", "--loss", "mse"]) == 2
    assert "--loss mse must be one of poisson, nb, zinb" in capsys.readouterr().err
    assert cli.main([*fit, "--out", str(tmp_path / "bad"), "--loss", "nb", "--normalize", "log1p"]) == 2
    assert "needs raw counts" in capsys.readouterr().err
    bad = X.copy()
    bad.data[0] = 0.5
    sp.save_npz(data, bad)
    assert cli.main([*fit, "--out", str(tmp_path / "bad"), "--loss", "nb"]) == 3
    assert "0.5 in row 0, column" in capsys.readouterr().err
