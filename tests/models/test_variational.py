"""`VariationalAutoencoder`: what it learns, its bounds and likelihoods, and the promises of every estimator."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
from numpy.typing import NDArray
from scipy import stats

import narrows
from estimator_cases import BACKEND, SMALL, low_rank, same_rows
from narrows import VariationalAutoencoder
from narrows.backends import compile_plan
from narrows.data import ArraySource
from narrows.fitting import run as fitting
from narrows.fitting.feed import split_rows
from narrows.models.variational import row_keys
from narrows.plan.lowering import lower
from narrows.plan.spec import Activation, LayerSpec, NetworkSpec
from narrows.random import philox
from narrows.training import Callback, Checkpoint, Progress
from networks import make_spec

Array = NDArray[Any]


@pytest.fixture(scope="module")
def X() -> Array:
    return low_rank()


def vae(n_components: int = 3, **params: Any) -> VariationalAutoencoder:
    defaults = {"hidden_layer_sizes": 8, "batch_size": 32, "learning_rate_init": 1e-2}
    return VariationalAutoencoder(n_components, **(SMALL | defaults | params))


def bits(estimator: VariationalAutoencoder) -> bytes:
    return b"".join(np.ascontiguousarray(a).tobytes() for a in estimator.coefs_ + estimator.intercepts_)


# --- likelihoods --------------------------------------------------------------------------------------------


def marginal(model: VariationalAutoencoder) -> Any:
    """p(x) of a linear decoder: probabilistic principal components (Tipping and Bishop, 1999)."""
    W, b = model.coefs_[-1].astype(np.float64), model.intercepts_[-1].astype(np.float64)
    return stats.multivariate_normal(b, W.T @ W + np.diag(model.decoder_variance_))


@pytest.mark.parametrize(
    "params", [{"loss": "mse", "decoder_variance": 0.05}, {"loss": "gaussian"}], ids=lambda params: params["loss"]
)
@pytest.mark.parametrize("sparse", [False, True])
def test_likelihood_of_a_linear_decoder_is_the_integral(params: dict[str, Any], sparse: bool, X: Array) -> None:
    D = sp.csr_array(np.where(np.median(X) < X, X, 0)) if sparse else X
    rows = D.toarray() if sparse else D
    model = vae(2, hidden_layer_sizes=(), max_iter=60, precision="float64", **params).fit(D)
    exact = marginal(model).logpdf(rows)
    found = model.log_likelihood(D, n_importance=4000)
    np.testing.assert_allclose(found, exact, atol=0.15)
    assert abs((found - exact).mean()) < 0.01
    few, bound = model.log_likelihood(D, n_importance=10), model.elbo(D, n_samples=400)
    noise = 0.02  # of ten samples a row, where the posterior leaves a narrow gap
    assert bound.mean() < few.mean() + noise
    assert few.mean() < found.mean() + noise
    # KL(q(z|x) || p(z|x)), exactly, is what the bound lacks.
    W, v = model.coefs_[-1].astype(np.float64), model.decoder_variance_
    precision = np.eye(2) + (W / v) @ W.T
    centre = np.linalg.solve(precision, (W / v) @ (rows - model.intercepts_[-1]).T).T
    mean, log_variance = np.split(rows @ model.coefs_[0] + model.intercepts_[0], 2, axis=1)
    off = mean - centre
    gap = 0.5 * (
        np.exp(log_variance) @ np.diag(precision)
        + np.einsum("ni,ij,nj->n", off, precision, off)
        - 2
        - np.linalg.slogdet(precision)[1]
        - log_variance.sum(axis=1)
    )
    np.testing.assert_allclose((exact - bound).mean(), gap.mean(), atol=0.02)


def test_bernoulli_likelihood_by_enumeration(X: Array) -> None:
    """One latent integrates on a grid."""
    D = (np.median(X) < X).astype(np.float32)
    model = vae(1, loss="bce", max_iter=40, precision="float64").fit(D)
    grid = np.linspace(-8, 8, 4001)
    p = np.clip(model.inverse_transform(grid[:, None]), 1e-300, 1 - 2**-53)
    log_density = D @ np.log(p).T + (1 - D) @ np.log1p(-p).T + stats.norm.logpdf(grid)
    top = log_density.max(axis=1, keepdims=True)
    exact = top[:, 0] + np.log(np.exp(log_density - top).sum(axis=1) * (grid[1] - grid[0]))
    found = model.log_likelihood(D, n_importance=8000)
    np.testing.assert_allclose(found, exact, atol=0.2)
    assert abs((found - exact).mean()) < 0.02
    # All 2**12 rows together are certain.
    every = ((np.arange(4096)[:, None] >> np.arange(12)) & 1).astype(np.float32)
    assert np.exp(model.log_likelihood(every, n_importance=200)).sum() == pytest.approx(1, abs=0.03)


def test_score_is_minus_the_objective(X: Array) -> None:
    for params in ({"loss": "mse", "decoder_variance": 0.1, "beta": 0.5}, {"loss": "gaussian", "beta": 2.0}):
        model = vae(**params, precision="float64").fit(X)
        one = model.elbo(X, n_samples=1)
        if params["loss"] == "mse":
            # -elbo = error / (2 v) + constant + kl, and the score -(error + 2 v beta kl)
            v, constant = 0.1, 6 * np.log(2 * np.pi * 0.1)
            expected = 2 * v * (one + constant + (1 - 0.5) * divergence(model, X))
        else:
            expected = one - divergence(model, X)
        np.testing.assert_allclose(model.score_samples(X), expected, rtol=1e-4, atol=1e-5)
        assert model.score(X) == pytest.approx(model.score_samples(X).mean(), rel=1e-5)


def divergence(model: VariationalAutoencoder, X: Array) -> Array:
    h = X.astype(np.float64)
    for W, b in zip(model.coefs_[:1], model.intercepts_[:1], strict=True):
        h = np.maximum(h @ W + b, 0)
    mean, log_variance = np.split(h @ model.coefs_[1] + model.intercepts_[1], 2, axis=1)
    kl: Array = (mean**2 + np.exp(log_variance) - 1 - log_variance).sum(axis=1) / 2
    return kl


# --- fits ---------------------------------------------------------------------------------------------------


def test_codes_are_the_means(X: Array) -> None:
    model = vae().fit(X)
    h = np.maximum(X @ model.coefs_[0] + model.intercepts_[0], 0)
    mean = (h @ model.coefs_[1] + model.intercepts_[1])[:, :3]
    np.testing.assert_allclose(model.transform(X), mean, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(model.inverse_transform(model.transform(X)), model.reconstruct(X), rtol=1e-5, atol=1e-6)
    assert [W.shape for W in model.coefs_] == [(12, 8), (8, 6), (3, 8), (8, 12)]
    assert model.latent_sensitivity(X).shape == (3, 12)


def test_history(X: Array) -> None:
    model = vae(alpha=0.1, max_iter=8).fit(X)
    assert {"loss", "kl", "penalty", "objective", "val_loss", "mse_per_feature"} <= model.history_.keys()
    assert all(len(values) == 8 for values in model.history_.values())
    parts = {name: np.array(model.history_[name]) for name in ("loss", "penalty", "kl")}
    np.testing.assert_allclose(model.history_["objective"], parts["loss"] + parts["penalty"] + 2 * parts["kl"])
    held = split_rows(200, 0.1, 0)[1]
    assert model.best_loss_ == min(model.history_["val_loss"])
    assert -model.score(X[held]) == pytest.approx(model.best_loss_, rel=1e-5)
    given = vae().fit(X, X_val=X[:30])
    assert -given.score(X[:30]) == pytest.approx(given.best_loss_, rel=1e-5)


def test_a_heavier_divergence_is_smaller(X: Array) -> None:
    kl = [vae(loss="gaussian", beta=beta, max_iter=40).fit(X).history_["kl"][-1] for beta in (0.0, 1.0, 10.0)]
    assert kl[0] > 1.5 * kl[1] > 2 * kl[2]


def test_without_noise_and_divergence_it_is_an_autoencoder(backend: str, X: Array) -> None:
    """beta = 0 and log-variances of -80: the loss and the gradient are those of the plain network."""
    shapes = ((12, 6, Activation.TANH), (6, 3, Activation.LINEAR), (3, 12, Activation.LINEAR))
    plain = NetworkSpec(tuple(LayerSpec(*shape) for shape in shapes), 2)
    widened = make_spec(
        (LayerSpec(*shapes[0]), LayerSpec(6, 6, Activation.LINEAR), LayerSpec(*shapes[2])),
        2,
        variational=True,
        kl_weight=0.0,
    )
    rng = np.random.default_rng(0)
    state = {name: rng.normal(size=shape) for name, shape in plain.parameter_shapes.items()}
    wide = state | {
        "W1": np.c_[state["W1"], np.zeros((6, 3))],
        "b1": np.c_[state["b1"], np.full((1, 3), -80.0)],
    }
    found = []
    for spec, parameters in ((plain, state), (widened, wide)):
        program = compile_plan(lower(spec, 32), backend, precision="float64", n_threads=1)
        program.load(parameters)
        program.bind(X.astype(np.float64))
        found.append(program.gradient(np.arange(32)))
    (terms, gradient), (wide_terms, wide_gradient) = found
    np.testing.assert_allclose(wide_terms[0], terms[0], rtol=1e-12)
    for name, value in gradient.items():
        np.testing.assert_allclose(wide_gradient[name][:, : value.shape[1]], value, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(wide_gradient["W1"][:, 3:], 0, atol=1e-12)


class Recorder:
    """Programs that keep what their steps were given."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.factors: list[float] = []

        def compiled(*args: Any, **options: Any) -> Any:
            program = compile_plan(*args, **options)
            train = program.train

            def recorded(rows: Array, hyper: Any, poll: Any = None) -> Array:
                terms: Array = train(rows, hyper, poll)
                factors = np.ones(len(terms)) if hyper.kl_factor is None else hyper.kl_factor[: len(terms)]
                self.factors += factors.tolist()
                return terms

            program.train = recorded
            return program

        monkeypatch.setattr(fitting, "compile_plan", compiled)


def test_the_divergence_warms_up_step_by_step(X: Array, monkeypatch: pytest.MonkeyPatch) -> None:
    record = Recorder(monkeypatch)
    model = vae(kl_warmup=4, max_iter=6, early_stopping=False).fit(X)
    n_steps = len(record.factors) // 6
    np.testing.assert_allclose(record.factors, np.minimum(1, np.arange(6 * n_steps) / (4 * n_steps)), atol=1e-15)
    assert (np.diff(record.factors) >= 0).all()
    # Going on goes on.
    record.factors.clear()
    model = vae(kl_warmup=4, max_iter=2, early_stopping=False, warm_start=True).fit(X).fit(X)
    model.partial_fit(X)
    np.testing.assert_allclose(record.factors, np.minimum(1, np.arange(5 * n_steps) / (4 * n_steps)), atol=1e-15)
    assert model.n_iter_ == 5


def test_convergence_is_not_judged_in_the_warm_up(X: Array) -> None:
    options = {"n_iter_no_change": 1, "tol": 0.9, "max_iter": 30}
    assert vae(**options).fit(X).n_iter_ < 6
    assert 6 < vae(**options, kl_warmup=6).fit(X).n_iter_ < 12


@pytest.mark.parametrize("threads", [2, 3])
@pytest.mark.parametrize("loss", ["mse", "bce", "gaussian"])
def test_bits_do_not_depend_on_threads(loss: str, threads: int) -> None:
    if BACKEND != "cpp":
        pytest.skip("a promise of the C++ backend")
    D = np.random.default_rng(0).random((300, 70)).astype(np.float32)
    options = {"loss": loss, "hidden_layer_sizes": (64, 40), "batch_size": 100, "max_iter": 2, "kl_warmup": 1}
    one, other = (vae(9, **options, n_threads=n).fit(D) for n in (1, threads))
    assert bits(one) == bits(other)
    assert one.history_["val_loss"] == other.history_["val_loss"]
    assert (one.elbo(D) == other.elbo(D)).all()


def test_seeds(X: Array) -> None:
    one, same, other = (vae(random_state=seed).fit(X) for seed in (0, 0, 1))
    assert bits(one) == bits(same) != bits(other)
    assert one.history_["kl"] == same.history_["kl"]


class Ctrl_C(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_batch(self, progress: Progress) -> None:
        if progress.epoch * progress.steps_per_epoch + progress.step >= self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize("step", [3, 17, 31])
def test_resuming_is_exact(step: int, X: Array, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("narrows.training.trainer.CHUNK_SECONDS", 0.0)
    model = vae(loss="gaussian", kl_warmup=4, max_iter=8)
    whole = model.fit(X)
    expected, history = bits(whole), whole.history_
    again = vae(loss="gaussian", kl_warmup=4, max_iter=8)
    with pytest.raises(KeyboardInterrupt):
        again.fit(X, checkpoint=Checkpoint(tmp_path / "c"), callbacks=[Ctrl_C(step)])
    again.fit(X, checkpoint=Checkpoint(tmp_path / "c", resume="require"))
    assert bits(again) == expected
    assert {k: v for k, v in again.history_.items() if k != "seconds"} == {
        k: v for k, v in history.items() if k != "seconds"
    }
    assert (again.decoder_variance_ == whole.decoder_variance_).all()


@pytest.mark.parametrize("loss", ["mse", "bce", "gaussian"])
def test_files_hold_all_of_it(loss: str, X: Array, tmp_path: Path) -> None:
    model = vae(loss=loss, beta=0.5, kl_warmup=2).fit(X)
    model.save(tmp_path / "m")
    twin = narrows.load(tmp_path / "m")
    assert isinstance(twin, VariationalAutoencoder)
    assert twin.get_params() == model.get_params()
    assert bits(twin) == bits(model)
    for name in ("transform", "score_samples", "elbo", "log_likelihood"):
        assert (getattr(twin, name)(X) == getattr(model, name)(X)).all(), name
    assert (twin.sample(5, 1) == model.sample(5, 1)).all()
    if loss != "bce":
        assert (twin.decoder_variance_ == model.decoder_variance_).all()


def test_an_autoencoder_learns_variances_too(X: Array, tmp_path: Path) -> None:
    D = (X - X.mean(axis=0)) / X.std(axis=0)
    model = narrows.Autoencoder(2, hidden_layer_sizes=8, loss="gaussian", **(SMALL | {"max_iter": 300})).fit(D)
    model.save(tmp_path / "m")
    assert (narrows.load(tmp_path / "m").score_samples(D) == model.score_samples(D)).all()
    variance = np.exp(model._network.state["logvar"][0])
    expected = model.feature_errors(D)
    assert np.corrcoef(np.log(variance), np.log(expected))[0, 1] > 0.5
    assert model.history_["loss"][-1] < model.history_["loss"][0]


# --- noise --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["mse", "bce", "gaussian"])
def test_rows_do_not_depend_on_each_other(loss: str, X: Array, monkeypatch: pytest.MonkeyPatch) -> None:
    model = vae(loss=loss).fit(X)
    methods = (model.score_samples, model.elbo, lambda D: model.log_likelihood(D, n_importance=3))
    for method in methods:
        whole = method(X)
        assert (method(X) == whole).all()
        for i in (0, 31, 32, 199):
            assert same_rows(method(X[i : i + 1]), whole[i : i + 1])
        assert same_rows(method(X[::-1]), whole[::-1])
        with monkeypatch.context() as context:
            context.setattr("narrows.models.base.BLOCK_BYTES", 3000)
            assert same_rows(method(ArraySource(X)), whole)


def test_draws_differ_by_row_number_and_seed(X: Array) -> None:
    model = vae().fit(X)
    assert (model.elbo(X) != model.elbo(X, random_state=1)).mean() > 0.9
    assert len(np.unique(row_keys(X))) == 200
    noise = philox.keyed_normal(0, 0, row_keys(X), 500)
    assert abs(np.corrcoef(noise[:, 0], noise[:, 1])[0, 1]) < 0.25
    assert stats.kstest(noise.reshape(-1), "norm").pvalue > 1e-3
    assert (philox.keyed_normal(0, 1, row_keys(X), 3) != noise[:, :3]).all()
    assert (philox.keyed_normal(1, 0, row_keys(X), 3) != noise[:, :3]).all()


def test_keys_are_of_the_content(X: Array) -> None:
    D = np.where(np.median(X) < X, X, 0)
    expected = row_keys(D)
    for same in (D.astype(np.float64), np.asfortranarray(D), sp.csr_array(D), sp.csr_matrix(D.astype(np.float64))):
        assert (row_keys(same) == expected).all()
    assert (row_keys(np.where(D == 0, -0.0, D)) == expected).all()
    assert (row_keys(D[[3, 3, 5]]) == expected[[3, 3, 5]]).all()
    moved = D.copy()
    moved[:, [0, 1]] = moved[:, [1, 0]]
    assert (row_keys(moved) != expected).mean() > 0.5
    assert row_keys(D[:0]).shape == (0,)


def test_sample(X: Array) -> None:
    model = vae(loss="gaussian", precision="float64").fit(X)
    rows = model.sample(4000, 0)
    assert rows.shape == (4000, 12)
    assert (rows == model.sample(4000, 0)).all()
    assert (rows[:7] == model.sample(7, 0)).all()
    assert (rows != model.sample(4000, 1)).any()
    noisy = model.sample(4000, 0, noise=True) - rows
    np.testing.assert_allclose(noisy.var(axis=0), model.decoder_variance_, rtol=0.15)
    linear = vae(2, hidden_layer_sizes=(), loss="gaussian", precision="float64", max_iter=30).fit(X)
    drawn = linear.sample(20_000, 3, noise=True)
    expected = marginal(linear)
    np.testing.assert_allclose(drawn.mean(axis=0), expected.mean, atol=0.05)
    np.testing.assert_allclose(np.cov(drawn.T), expected.cov, atol=0.06)
    binary = vae(loss="bce").fit(X)
    p, drawn = binary.sample(20_000, 0), binary.sample(20_000, 0, noise=True)
    assert set(np.unique(drawn)) == {0.0, 1.0}
    np.testing.assert_allclose(drawn.mean(axis=0), p.mean(axis=0), atol=0.02)
    with pytest.raises(AttributeError, match="decoder of loss='bce'"):
        _ = binary.decoder_variance_


def test_pairs_and_weights(X: Array) -> None:
    noisy = X + np.random.default_rng(0).normal(0, 0.2, X.shape).astype(np.float32)
    model = vae(decoder_variance=0.01, max_iter=60).fit(noisy, X)
    assert model.plan_.spec.data.separate_target
    assert model.elbo(noisy, 3, y=X).shape == (200,)
    assert model.score(noisy, X) > model.score(noisy)
    weight = np.r_[np.ones(100), np.zeros(100)]
    other = np.r_[X[:100], 1 - X[100:]]
    a, b = (vae().fit(D, sample_weight=weight, X_val=X[:10]) for D in (X, other))
    assert bits(a) == bits(b)


def test_corruption_is_of_the_input_alone(X: Array) -> None:
    model = vae(corruption="masking", corruption_level=0.3, dropout=0.1, loss="gaussian", max_iter=30).fit(X)
    assert model.history_["val_loss"][-1] < model.history_["val_loss"][0]
    assert (model.transform(X) == model.transform(X)).all()


# --- refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("params", "error", "message"),
    [
        ({"beta": -0.5}, ValueError, r"beta=-0.5 must be in \[0, inf\)"),
        ({"beta": float("inf")}, ValueError, "beta=inf"),
        ({"beta": "1"}, TypeError, "beta='1' must be a number"),
        ({"kl_warmup": -1}, ValueError, "kl_warmup=-1 must be at least 0"),
        ({"kl_warmup": 2.5}, TypeError, "kl_warmup=2.5 must be an integer"),
        ({"decoder_variance": 0.0}, ValueError, r"decoder_variance=0.0 must be in \(0, inf\)"),
        ({"decoder_variance": 0.1, "loss": "bce"}, ValueError, "decoder_variance=0.1 needs loss='mse'"),
        (
            {"loss": "huber"},
            ValueError,
            "loss='huber' is not a likelihood, which .*; choose from mse, bce, gaussian",
        ),
        (
            {"loss": "gaussian", "output_activation": "softmax"},
            ValueError,
            "'softmax' does not go with loss='gaussian'",
        ),
        ({"dropout": 1.0}, ValueError, "dropout=1.0"),
    ],
)
def test_bad_parameters(params: dict[str, Any], error: type[Exception], message: str, X: Array) -> None:
    with pytest.raises(error, match=message):
        vae(**params).fit(X)


def test_parameters_of_codes_that_are_no_distributions() -> None:
    for name in ("latent_activation", "tied_weights", "activity_l1", "kl_sparsity"):
        with pytest.raises(TypeError, match=f"VariationalAutoencoder.*'{name}'"):
            VariationalAutoencoder(**{name: 1})


def test_bad_arguments(X: Array) -> None:
    model = vae(loss="bce").fit(X)
    for call, message in (
        (lambda: model.sample(0), "n=0 must be at least 1"),
        (lambda: model.sample(3, -1), r"random_state=-1 must be in \[0, 2\*\*64\)"),
        (lambda: model.elbo(X, n_samples=0), "n_samples=0"),
        (lambda: model.log_likelihood(X, n_importance=-5), "n_importance=-5"),
        (lambda: model.elbo(X[:, :5]), "X has 5 features"),
        (lambda: model.log_likelihood(2 * X + 1), r"X: .* needs values in \[0, 1\]"),
        (lambda: vae(loss="bce").fit(X - 1), r"X: .* needs values in \[0, 1\]"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
