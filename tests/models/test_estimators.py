"""The estimator contract: scikit-learn's checks, and what narrows promises beyond them."""

from __future__ import annotations

import copy
import pickle
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
from scipy.linalg import subspace_angles
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.validation import has_fit_parameter

import narrows
from contract import assert_contract
from estimator_cases import BACKEND, ESTIMATORS, SMALL, fitting, ids, low_rank, same_rows, small
from narrows import (
    RBM,
    Autoencoder,
    ContractiveAutoencoder,
    DenoisingAutoencoder,
    LinearAutoencoder,
    SparseAutoencoder,
    VariationalAutoencoder,
)
from narrows.backends import probe
from narrows.data import ArraySource
from narrows.errors import BackendError, ModelFileError
from narrows.fitting.feed import even_batch, shuffled, split_rows
from narrows.fitting.start import initial_state
from narrows.persistence import load_tensors, save_tensors
from narrows.plan.plan import Mode
from narrows.plan.spec import ACTIVATIONS
from narrows.random import philox
from narrows.random.weights import STREAM, initial_weight


@pytest.fixture(scope="module")
def X() -> np.ndarray:
    return low_rank()


def expected_failures(estimator: Any) -> dict[str, str]:
    if isinstance(estimator, RBM):
        why = "units are drawn for each row: a row twice is drawn twice"
    elif estimator.early_stopping:
        why = "held-out rows are drawn by number: a row twice and a row of weight two are not held out alike"
    else:
        return {}
    return {
        "check_sample_weight_equivalence_on_dense_data": why,
        "check_sample_weight_equivalence_on_sparse_data": why,
    }


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=ids)
def test_scikit_learn_contract(estimator: Any) -> None:
    assert_contract(estimator, expected_failures(estimator))


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=ids)
def test_weights_can_be_routed(estimator: Any) -> None:
    """Searches and pipelines look for the parameter by its name in the signature."""
    assert has_fit_parameter(estimator, "sample_weight")
    assert has_fit_parameter(estimator, "X_val")


# --- targets, weights, going on -----------------------------------------------------------------------------


def test_labels_are_ignored(X: np.ndarray) -> None:
    labels = np.arange(200) % 3
    a, b = small().fit(X), small().fit(X, labels)
    assert (a.transform(X) == b.transform(X)).all()
    assert a.score(X, labels) == b.score(X)


def test_pairs(X: np.ndarray) -> None:
    noisy = X + np.random.default_rng(0).normal(0, 0.3, X.shape).astype(np.float32)
    ae = DenoisingAutoencoder(3, **(SMALL | {"max_iter": 60})).fit(noisy, X)
    assert ae.plan_.spec.training.corruption is None
    assert ae.plan_.spec.data.separate_target
    assert ((ae.reconstruct(noisy) - X) ** 2).sum(1).mean() == pytest.approx(-ae.score(noisy, X), rel=1e-4)
    assert -ae.score(noisy, X) < ((noisy - X) ** 2).sum(1).mean() / 2
    assert ae.score(noisy) == ae.score(noisy, noisy), "X is its own target unless y is given"


def test_target_of_another_width(X: np.ndarray) -> None:
    coarse = X.reshape(200, 6, 2).mean(2)
    ae = small().fit(coarse, X, X_val=(coarse[:20], X[:20]))
    assert ae.reconstruct(coarse).shape == X.shape
    assert ae.inverse_transform(ae.transform(coarse)).shape == X.shape
    assert ae.latent_sensitivity(coarse).shape == (3, 12)
    with pytest.raises(ValueError, match="12 columns and X has 6: pass the y to compare with"):
        ae.score(coarse)
    with pytest.raises(ValueError, match="tied_weights=True needs a target as wide"):
        small(tied_weights=True).fit(coarse, X)


def test_score_against_clean_rows(X: np.ndarray) -> None:
    ae = small().fit(X)
    target = X[::-1].copy()
    expected = ((ae.reconstruct(X) - target) ** 2).sum(1)
    np.testing.assert_allclose(-ae.score_samples(X, target), expected, rtol=1e-4)


def test_weight_two_is_the_row_twice(X: np.ndarray) -> None:
    """For one step of sgd over all rows."""
    params = {"early_stopping": False, "max_iter": 1, "solver": "sgd", "precision": "float64"}
    weight = np.array([1.0, 2.0] * 10)
    a = small(**params, batch_size=20).fit(X[:20], sample_weight=weight)
    b = small(**params, batch_size=30).fit(np.repeat(X[:20], weight.astype(int), axis=0))
    for u, v in zip(a.coefs_ + a.intercepts_, b.coefs_ + b.intercepts_, strict=True):
        np.testing.assert_allclose(u, v, rtol=1e-10, atol=1e-14)
    assert a.loss_ == pytest.approx(b.loss_, rel=1e-10)


def test_rows_of_weight_zero_do_not_matter(X: np.ndarray) -> None:
    weight = np.r_[np.ones(100), np.zeros(100)]
    other = np.r_[X[:100], 1 - X[100:]]
    a, b = (small().fit(D, sample_weight=weight, X_val=X[:10]) for D in (X, other))
    assert (a.transform(X) == b.transform(X)).all()


def test_partial_fit_goes_on(X: np.ndarray) -> None:
    ae = small()
    for _ in range(40):
        ae.partial_fit(X)
    assert ae.n_iter_ == 40 == len(ae.history_["loss"])
    assert ae.history_["loss"][-1] < ae.history_["loss"][0] / 2
    twin = small().partial_fit(X)
    twin = pickle.loads(pickle.dumps(twin))
    for _ in range(39):
        twin.partial_fit(X)
    assert (twin.transform(X) == ae.transform(X)).all()


def test_warm_start_goes_on(X: np.ndarray) -> None:
    params = {"early_stopping": False, "tol": 0.0}
    whole = small(**params, max_iter=6).fit(X)
    parts = small(**params, max_iter=3, warm_start=True).fit(X).fit(X)
    assert parts.n_iter_ == 6
    assert parts.history_["loss"] == whole.history_["loss"]
    assert (parts.transform(X) == whole.transform(X)).all()
    with pytest.raises(ValueError, match="warm_start=False"):
        parts.set_params(n_components=4).fit(X)
    assert parts.transform(X).shape == (200, 3)


def test_seeds(X: np.ndarray) -> None:
    def codes(seed: Any) -> np.ndarray:
        return small(random_state=seed).fit(X).transform(X)

    before = np.random.get_state()[1].copy()  # noqa: NPY002
    assert (codes(0) == codes(0)).all()
    assert (codes(2**64 - 1) != codes(0)).any()
    assert (codes(None) != codes(None)).any()
    assert (codes(np.random.RandomState(3)) == codes(np.random.RandomState(3))).all()
    assert (codes(np.random.default_rng(3)) == codes(np.random.default_rng(3))).all()
    assert (np.random.get_state()[1] == before).all()  # noqa: NPY002


def test_early_stopping_keeps_the_best(X: np.ndarray) -> None:
    ae = small(max_iter=60, learning_rate_init=0.1, n_iter_no_change=5).fit(X)
    train, held = split_rows(200, 0.1, 0)
    assert sorted([*train, *held]) == list(range(200))
    assert ae.best_loss_ == min(ae.history_["val_loss"])
    assert -ae.score(X[held]) == pytest.approx(ae.best_loss_, rel=1e-5)
    given = small().fit(X, X_val=X[:30])
    assert -given.score(X[:30]) == pytest.approx(given.best_loss_, rel=1e-5)


# --- parameters ---------------------------------------------------------------------------------------------


def test_presets() -> None:
    names = LinearAutoencoder().get_params().keys()
    assert not names & {"activation", "latent_activation", "output_activation", "hidden_layer_sizes"}
    with pytest.raises(TypeError, match=r"LinearAutoencoder.*'activation'"):
        LinearAutoencoder(activation="relu")
    assert DenoisingAutoencoder().corruption == "masking"
    assert ContractiveAutoencoder().contractive > 0
    assert Autoencoder().corruption is None
    for estimator in ESTIMATORS:
        twin = clone(estimator)
        assert twin.get_params() == estimator.get_params()
        assert eval(repr(estimator), vars(narrows)).get_params() == estimator.get_params()
        assert pickle.loads(pickle.dumps(estimator)).get_params() == estimator.get_params()


def test_network_shapes(X: np.ndarray) -> None:
    ae = small(2, hidden_layer_sizes=(8, 5)).fit(X)
    assert [W.shape for W in ae.coefs_] == [(12, 8), (8, 5), (5, 2), (2, 5), (5, 8), (8, 12)]
    assert [b.shape for b in ae.intercepts_] == [(8,), (5,), (2,), (5,), (8,), (12,)]
    ae = small(2, hidden_layer_sizes=(8, 5), decoder_layer_sizes=[7]).fit(X)
    assert [W.shape for W in ae.coefs_] == [(12, 8), (8, 5), (5, 2), (2, 7), (7, 12)]
    ae = small(2, hidden_layer_sizes=(8, 5), tied_weights=True).fit(X)
    for i in range(3):
        assert (ae.coefs_[5 - i] == ae.coefs_[i].T).all()
    with pytest.raises(ValueError, match="read-only"):
        ae.coefs_[0][0, 0] = 1


def test_coefs_are_what_transform_applies(X: np.ndarray) -> None:
    ae = small(activation="tanh", latent_activation="sigmoid").fit(X)
    (W0, W1, *_), (b0, b1, *_) = ae.coefs_, ae.intercepts_
    expected = 1 / (1 + np.exp(-(np.tanh(X @ W0 + b0) @ W1 + b1)))
    np.testing.assert_allclose(ae.transform(X), expected, rtol=1e-5)


@pytest.mark.parametrize(("activation", "glorot"), [("relu", False), ("gelu", False), ("tanh", True)])
def test_initial_weights(activation: str, glorot: bool, X: np.ndarray) -> None:
    spec = small(hidden_layer_sizes=500, activation=activation).fit(X).plan_.spec
    assert spec.layers[0].activation is ACTIVATIONS[activation]
    W = initial_state(spec, 5)["W0"]
    limit = np.sqrt(6 / (512 if glorot else 12))
    assert abs(W).max() <= limit
    assert abs(W).max() > 0.99 * limit
    assert W.std() == pytest.approx(limit / np.sqrt(3), rel=0.03)
    assert (initial_state(spec, 6)["W0"] != W).any()
    assert (initial_state(spec, 5, np.float32)["W0"] == W.astype(np.float32)).all()


@pytest.mark.parametrize("drawn", [1, 64, 1 << 20])
def test_weights_are_the_same_however_many_are_drawn_at_a_time(drawn: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("narrows.random.weights.DRAWN", drawn)
    limit = np.sqrt(6 / 37)
    expected = (2 * philox.uniform(9, STREAM + 2, 0, 37, 21) - 1) * limit
    np.testing.assert_array_equal(initial_weight(37, 21, ACTIVATIONS["relu"], 9, 2), expected)


def test_every_order_of_rows_is_as_likely() -> None:
    rows = np.array([2, 3, 5, 1 << 40])
    generator = np.random.default_rng(0)
    orders = Counter(tuple(shuffled(rows, generator)) for _ in range(24_000))
    assert all(sorted(order) == rows.tolist() for order in orders)
    assert len(orders) == 24
    # Each a binomial count of mean 1000 and standard deviation 31.
    assert all(abs(n - 1000) < 5 * 31 for n in orders.values())
    assert shuffled(np.array([0]), generator).tolist() == [0]


def test_even_batches() -> None:
    for n in [*range(1, 400), 1797, 4271, 10**6 + 1]:
        for limit in (1, 2, 3, 16, 64, 256):
            batch = even_batch(n, limit)
            assert 1 <= batch <= min(limit, n)
            assert batch >= 0.5 * min(limit, n)
            if limit >= 16:
                assert (n - 1) % batch + 1 >= 0.5 * batch


@pytest.mark.parametrize("loss", ["mse", "bce", "huber", "multinomial"])
def test_losses_fall(loss: str, X: np.ndarray) -> None:
    D = np.round(20 * X) if loss == "multinomial" else X
    ae = small(loss=loss, max_iter=30).fit(D)
    assert ae.history_["loss"][-1] < ae.history_["loss"][0]
    R = ae.reconstruct(D)
    if loss == "bce":
        assert 0 <= R.min() <= R.max() <= 1
    if loss == "multinomial":
        np.testing.assert_allclose(R.sum(1), 1, rtol=1e-5)
    assert ("mse_per_feature" in ae.history_) == (loss == "mse")


def test_sparse_autoencoder_is_sparse(X: np.ndarray) -> None:
    def active(**params: Any) -> float:
        ae = SparseAutoencoder(40, **(SMALL | {"max_iter": 100} | params)).fit(X)
        assert ("penalty" in ae.history_) == (ae.activity_l1 > 0)
        return float((ae.transform(X) > 1e-6).mean())

    assert active(activity_l1=1.0) < 0.5 * active(activity_l1=0.0)
    rates = SparseAutoencoder(
        40,
        activity_l1=0,
        latent_activation="sigmoid",
        kl_sparsity=1.0,
        **(SMALL | {"max_iter": 300, "learning_rate_init": 0.02, "early_stopping": False}),
    ).fit(X)
    assert abs(rates.transform(X).mean(axis=0) - 0.05).max() < 0.03


# --- what it is for -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("scaling", ["raw", "unit", "standard"])
@pytest.mark.parametrize("n_components", [10, 16])
def test_linear_autoencoder_finds_the_principal_subspace(scaling: str, n_components: int) -> None:
    if BACKEND == "reference":
        pytest.skip("needs a fast backend")
    X = load_digits().data
    X = {"raw": X, "unit": X / 16, "standard": StandardScaler().fit_transform(X)}[scaling]
    pca = PCA(n_components).fit(X)
    best = ((X - pca.inverse_transform(pca.transform(X))) ** 2).sum(axis=1).mean()
    ae = LinearAutoencoder(n_components=n_components, random_state=0).fit(X)
    assert best * (1 - 1e-6) <= -ae.score(X) <= best * 1.001
    angles = subspace_angles(ae.coefs_[-1].T.astype(np.float64), pca.components_.T)
    assert angles.max() < 0.02


OUTPUTS = [small(output_activation=output, activation="silu") for output in ("linear", "gelu", "softmax")]


@pytest.mark.parametrize("estimator", [*ESTIMATORS, *OUTPUTS])
def test_latent_sensitivity_is_the_derivative(estimator: Any, X: np.ndarray) -> None:
    X = fitting(estimator, X.astype(np.float64))
    D = X[:9]
    ae = clone(estimator).set_params(precision="float64").fit(X)
    found = ae.latent_sensitivity(D)
    Z, h = ae.transform(D), 1e-6
    assert found.shape == (Z.shape[1], X.shape[1])
    for j, unit in enumerate(np.eye(Z.shape[1])):
        slope = (ae.inverse_transform(Z + h * unit) - ae.inverse_transform(Z - h * unit)) / (2 * h)
        np.testing.assert_allclose(found[j], abs(slope).mean(axis=0), rtol=1e-5, atol=1e-8)


def test_pipeline_and_search(X: np.ndarray) -> None:
    search = GridSearchCV(make_pipeline(StandardScaler(), small()), {"autoencoder__n_components": [1, 3]}, cv=2).fit(
        X, np.arange(200) % 2
    )
    assert search.best_params_ == {"autoencoder__n_components": 3}
    assert GridSearchCV(LinearAutoencoder(2, **SMALL), {"tied_weights": [True, False]}, cv=2).fit(X)


def test_rows_do_not_depend_on_each_other(X: np.ndarray) -> None:
    ae = small().fit(X)
    whole = ae.transform(X), ae.score_samples(X)
    for i in (0, 31, 32, 199):
        assert same_rows(ae.transform(X[i : i + 1]), whole[0][i])
        assert same_rows(ae.score_samples(X[i : i + 1]), whole[1][i])


def test_two_threads_transform_at_once(X: np.ndarray) -> None:
    ae = small().fit(X)
    parts = [X[:70].copy(), X[70:].copy()]
    expected = [ae.transform(part) for part in parts]
    ae = copy.deepcopy(ae)
    wrong: list[int] = []

    def work(i: int) -> None:
        wrong.extend(i for _ in range(100) if not (ae.transform(parts[i]) == expected[i]).all())

    threads = [threading.Thread(target=work, args=(i,)) for i in (0, 1)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


# --- files --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=ids)
def test_round_trips(estimator: Any, X: np.ndarray, tmp_path: Path) -> None:
    X = fitting(estimator, X)
    ae = clone(estimator).fit(X)
    ae.metadata_["normalize"] = {"kind": "log1p", "target": 1e4}
    ae.save(tmp_path / "m.safetensors")
    for twin in (narrows.load(tmp_path / "m.safetensors"), pickle.loads(pickle.dumps(ae)), copy.deepcopy(ae)):
        assert type(twin) is type(ae)
        assert twin.get_params() == ae.get_params()
        assert (twin.transform(X) == ae.transform(X)).all()
        assert (twin.reconstruct(X) == ae.reconstruct(X)).all()
        assert (twin.score_samples(X) == ae.score_samples(X)).all()
        for name in ("history_", "n_iter_", "loss_", "best_loss_", "metadata_", "n_features_in_", "plan_"):
            assert getattr(twin, name) == getattr(ae, name)
        twin.partial_fit(X)
        assert not (twin.transform(X) == ae.transform(X)).all()


def test_a_model_runs_on_the_machine_it_is_loaded_on(X: np.ndarray, tmp_path: Path) -> None:
    """Whatever was there where it was fitted."""
    ae = small(backend="numba").fit(X)
    codes = ae.transform(X)
    ae.set_params(backend="cuda", precision="tf32").save(tmp_path / "m")
    twin = narrows.load(tmp_path / "m")
    if not probe("cuda").ok:
        with pytest.raises(BackendError, match="backend='cuda' cannot run here"):
            twin.transform(X)
    twin.set_params(backend="reference", n_threads=1)
    assert twin.backend_ == "reference"
    np.testing.assert_allclose(twin.transform(X), codes, rtol=1e-5, atol=1e-6)
    twin.set_params(backend="numba", n_threads=2)
    assert twin.backend_ == "numba"
    assert twin.transform(X).tobytes() == codes.tobytes(), "tf32 is of a GPU's products alone"


@pytest.mark.parametrize("params", [{"activation": "tanh"}, {"hidden_layer_sizes": (9,)}, {"loss": "huber"}], ids=str)
def test_a_network_that_was_not_trained_cannot_be_saved(params: dict[str, Any], X: np.ndarray, tmp_path: Path) -> None:
    ae = small().fit(X)
    ae.set_params(learning_rate_init=0.5, alpha=1.0, dropout=0.1, max_iter=1).save(tmp_path / "m")
    before = {name: ae.get_params()[name] for name in params}
    with pytest.raises(ValueError, match="set after the fit"):
        ae.set_params(**params).save(tmp_path / "m")
    ae.set_params(**before).save(tmp_path / "m")
    assert narrows.load(tmp_path / "m").transform(X).tobytes() == ae.transform(X).tobytes()


def test_saved_generator_is_a_seed_no_more(X: np.ndarray, tmp_path: Path) -> None:
    ae = small(random_state=np.random.default_rng(0), hidden_layer_sizes=np.array([8])).fit(X)
    ae.save(tmp_path / "m")
    twin = narrows.load(tmp_path / "m")
    assert twin.random_state is None
    assert twin.hidden_layer_sizes == (8,)


def test_names_are_saved(X: np.ndarray, tmp_path: Path) -> None:
    names = [f"g{i}" for i in range(12)]
    small().fit(ArraySource(X, var_names=names)).save(tmp_path / "m")
    assert list(narrows.load(tmp_path / "m").feature_names_in_) == names


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, m: m.update({"class": "os.system"}), "unknown estimator 'os.system'"),
        (lambda t, m: m["params"].update(n_components=4), "tensor .* has shape .* the parameters need"),
        (lambda t, m: m["params"].update(magic=4), "magic"),
        (lambda t, m: m["params"].update(loss="bad"), "loss='bad'"),
        (lambda t, m: m["fitted"].update(n_features_in_=13), "tensor W0 has shape"),
        (lambda t, m: m["fitted"].update(n_iter_=True), "n_iter_ is True"),
        (lambda t, m: m["fitted"].update(transform=3), "fitted attributes"),
        (lambda t, m: m["history"].update(loss=[1.0]), "history"),
        (lambda t, m: m.pop("network"), "network"),
        (lambda t, m: t.pop("b0"), "tensor b0 has shape None"),
        (lambda t, m: t["W0"].__setitem__(0, np.nan), "tensor W0 must hold finite"),
        (lambda t, m: m.update(feature_names=["a"]), "1 feature names for 12"),
    ],
)
def test_contradictory_files(change: Callable[..., Any], message: str, X: np.ndarray, tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    small().fit(X).save(path)
    tensors, meta = load_tensors(path, kind="model")
    change(tensors, meta)
    save_tensors(path, tensors, meta, kind="model")
    with pytest.raises(ModelFileError, match=message) as raised:
        narrows.load(path)
    assert str(path) in str(raised.value)


def test_unfitted_cannot_be_saved(tmp_path: Path) -> None:
    with pytest.raises(NotFittedError):
        small().save(tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_the_program_trained_is_the_one_applied(X: np.ndarray) -> None:
    """Dropout, corruption and penalties leave transform alone."""
    ae = small(
        dropout=0.5,
        corruption="gaussian",
        corruption_level=1.0,
        activity_l1=1.0,
        clip_norm=1.0,
        weight_l1=0.1,
    ).fit(X)
    assert (ae.transform(X) == ae.transform(X)).all()
    assert ae.plan_.outputs[Mode.ENCODE] >= 0
    h = np.maximum(X @ ae.coefs_[0] + ae.intercepts_[0], 0) @ ae.coefs_[1] + ae.intercepts_[1]
    np.testing.assert_allclose(ae.transform(X), h, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("corruption", [None, "masking"])
def test_sparse_rows_are_trained_on_as_they_are(corruption: str | None) -> None:
    dense = np.random.default_rng(0).random((60, 40)).astype(np.float32)
    dense[np.random.default_rng(1).random(dense.shape) < 0.9] = 0
    X = sp.csr_array(dense)
    options = {"n_components": 3, "max_iter": 4, "random_state": 0, "corruption": corruption}
    options |= {"corruption_level": 0.3, "backend": "cpp"}
    sparse, peer = Autoencoder(**options).fit(X), Autoencoder(**options).fit(dense)
    assert "sparse_dense" in str(sparse.plan_)
    assert "sparse_dense" not in str(peer.plan_)
    for a, b in zip(sparse.coefs_, peer.coefs_, strict=True):
        np.testing.assert_array_equal(a, b)
    for method in ("transform", "score_samples", "reconstruct"):
        # What either has learned is applied to rows of either form.
        expected = getattr(peer, method)(dense)
        for estimator in (sparse, peer):
            for rows in (X, dense):
                np.testing.assert_array_equal(getattr(estimator, method)(rows), expected, err_msg=method)
    sparse.partial_fit(dense)
    peer.partial_fit(X)
    np.testing.assert_array_equal(sparse.coefs_[0], peer.coefs_[0])


def test_rows_that_fill_up_are_trained_on_as_dense_ones() -> None:
    X = sp.random_array((60, 40), density=0.05, format="csr", rng=np.random.default_rng(0))
    full = sp.random_array((60, 40), density=0.5, format="csr", rng=np.random.default_rng(0))
    options = {"n_components": 3, "max_iter": 1, "random_state": 0}
    probes = {"contractive": 0.1, "contractive_method": "hutchinson"}
    for other, data in (({"corruption": "gaussian"}, X), ({"contractive_hessian": 0.1}, X), ({}, full), (probes, X)):
        assert "sparse_dense" not in str(Autoencoder(**options, **other).fit(data).plan_), other


# --- decoders in Gram form ------------------------------------------------------------------------------------------


def counts(rows: int = 120, columns: int = 300) -> sp.csr_array:
    """Rows of which most is zero and the rest depends on few numbers."""
    rng = np.random.default_rng(4)
    rates = rng.gamma(1.0, 1.0, (rows, 3)) @ rng.gamma(0.3, 1.0, (3, columns))
    return sp.csr_array(np.log1p(rng.poisson(0.1 * rates)).astype(np.float32))


GRAM = {"n_components": 3, "hidden_layer_sizes": 8, "max_iter": 6, "batch_size": 64, "random_state": 0}


@pytest.mark.parametrize("kind", [Autoencoder, DenoisingAutoencoder, VariationalAutoencoder])
def test_a_decoder_in_gram_form_learns_what_a_dense_one_does(kind: type[Autoencoder]) -> None:
    X = counts()
    gram, dense = (kind(sparse_decoder=form, **GRAM).fit(X) for form in ("gram", "dense"))
    assert "decoder in gram form" in str(gram.plan_)
    assert "decoder in gram form" not in str(dense.plan_)
    np.testing.assert_allclose(gram.history_["loss"], dense.history_["loss"], rtol=1e-4)
    np.testing.assert_allclose(gram.history_["val_loss"], dense.history_["val_loss"], rtol=1e-4)
    for a, b in zip(gram.coefs_, dense.coefs_, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-3)
    # The same network scores rows of either form alike, within the bound of the Gram form.
    square = X.multiply(X).sum(axis=1)
    error = np.abs(gram.score_samples(X) - gram.score_samples(X.toarray()))
    if kind is not VariationalAutoencoder:
        assert (error <= 5e-7 * square + 1e-6).all()


def test_a_decoder_in_gram_form_has_the_same_bits_on_any_number_of_threads_and_when_loaded(tmp_path: Path) -> None:
    X = counts()
    one, three = (Autoencoder(sparse_decoder="gram", n_threads=n, backend="cpp", **GRAM).fit(X) for n in (1, 3))
    for a, b in zip(one.coefs_ + one.intercepts_, three.coefs_ + three.intercepts_, strict=True):
        np.testing.assert_array_equal(a, b)
    one.save(tmp_path / "model.safetensors")
    again = narrows.load(tmp_path / "model.safetensors")
    np.testing.assert_array_equal(again.score_samples(X), one.score_samples(X))
    np.testing.assert_array_equal(one.score_samples(X[:7]), one.score_samples(X)[:7])


def test_a_target_of_its_own_in_gram_form() -> None:
    X = counts()
    y = X[:, :200].multiply(2.0).tocsr()
    gram, dense = (Autoencoder(sparse_decoder=form, **GRAM).fit(X, y) for form in ("gram", "dense"))
    np.testing.assert_allclose(gram.history_["loss"], dense.history_["loss"], rtol=1e-4)
    np.testing.assert_allclose(gram.score(X, y), dense.score(X, y), rtol=1e-3)


def test_the_form_of_a_decoder_is_chosen_by_what_it_costs() -> None:
    X = counts(600, 300)
    options = GRAM | {"max_iter": 1, "batch_size": 512}
    assert "decoder in gram form" in str(Autoencoder(**options).fit(X).plan_)
    wide = Autoencoder(**options | {"hidden_layer_sizes": 1024, "batch_size": 32}).fit(X)
    assert "decoder in gram form" not in str(wide.plan_)
    for other in ({"loss": "huber"}, {"output_activation": "softplus"}, {"tied_weights": True}):
        assert "decoder in gram form" not in str(Autoencoder(**options, **other).fit(X).plan_), other
    assert "decoder in gram form" not in str(Autoencoder(**options).fit(X.toarray()).plan_)


@pytest.mark.parametrize(
    "wrong", [{"loss": "huber"}, {"output_activation": "relu"}, {"tied_weights": True}], ids=lambda w: next(iter(w))
)
def test_a_decoder_in_gram_form_that_cannot_be(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="sparse_decoder='gram' needs loss='mse', a linear output and untied weights"):
        Autoencoder(sparse_decoder="gram", **GRAM, **wrong).fit(counts())


def test_a_decoder_in_gram_form_needs_sparse_rows() -> None:
    with pytest.raises(ValueError, match=r"sparse_decoder='gram' needs sparse X \(CSR\)"):
        Autoencoder(sparse_decoder="gram", **GRAM).fit(counts().toarray())
    with pytest.raises(ValueError, match="sparse_decoder='csr' must be one of auto, gram, dense"):
        Autoencoder(sparse_decoder="csr", **GRAM).fit(counts())
