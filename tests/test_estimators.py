"""The estimator contract: scikit-learn's checks, and what narrows promises beyond them."""

from __future__ import annotations

import copy
import pickle
import threading
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
from sklearn.utils.estimator_checks import parametrize_with_checks

import narrows
from narrows import Autoencoder, DenoisingAutoencoder, LinearAutoencoder, SparseAutoencoder
from narrows.backends import AUTO, probe, resolve
from narrows.data import ArraySource
from narrows.errors import ModelFileError
from narrows.models.data import even_batch, split_rows
from narrows.models.network import initial_state
from narrows.persistence import load_tensors, save_tensors
from narrows.plan import ACTIVATIONS, Mode

BACKEND = resolve("auto") if any(probe(name).ok for name in AUTO) else "reference"
SMALL: dict[str, Any] = {"max_iter": 5, "backend": BACKEND, "n_threads": 1, "random_state": 0}
ESTIMATORS = [
    Autoencoder(2, hidden_layer_sizes=8, **SMALL),
    LinearAutoencoder(2, precision="float64", **SMALL),
    DenoisingAutoencoder(2, hidden_layer_sizes=8, **SMALL),
    SparseAutoencoder(6, **SMALL),
]
ids = [type(e).__name__ for e in ESTIMATORS]


def small(n_components: int = 3, **params: Any) -> Autoencoder:
    return Autoencoder(n_components, **({"hidden_layer_sizes": 8, "batch_size": 32} | SMALL | params))


@pytest.fixture(scope="module")
def X() -> np.ndarray:
    rng = np.random.default_rng(1)
    codes = rng.random((200, 3))
    return (codes @ rng.random((3, 12)) / 3).astype(np.float32)


def same_rows(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether results of rows are equal that were computed among other rows: to the bit where that is promised."""
    if BACKEND in ("cpp", "numba"):
        return bool((one == other).all())
    return bool(np.allclose(one, other, rtol=1e-4, atol=1e-6))


def expected_failures(estimator: Any) -> dict[str, str]:
    if not estimator.early_stopping:
        return {}
    why = "held-out rows are drawn by number: a row twice and a row of weight two are not held out alike"
    return {
        "check_sample_weight_equivalence_on_dense_data": why,
        "check_sample_weight_equivalence_on_sparse_data": why,
    }


@parametrize_with_checks(ESTIMATORS, expected_failed_checks=expected_failures)
def test_scikit_learn_contract(estimator: Any, check: Callable[[Any], None]) -> None:
    check(estimator)


# --- shapes, dtypes, containers -----------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=ids)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_shapes_and_dtypes(estimator: Any, dtype: Any, X: np.ndarray) -> None:
    X = X.astype(dtype)
    ae = clone(estimator).fit(X)
    Z = ae.transform(X)
    assert Z.shape == (200, ae.n_components)
    for rows in (Z, ae.inverse_transform(Z), ae.reconstruct(X), ae.score_samples(X)):
        assert rows.dtype == dtype
        assert len(rows) == 200
        assert np.isfinite(rows).all()
    np.testing.assert_allclose(ae.inverse_transform(Z), ae.reconstruct(X), rtol=1e-5, atol=1e-6)
    assert ae.score(X) == pytest.approx(ae.score_samples(X).mean(), rel=1e-5)
    errors = ae.feature_errors(X)
    assert errors.shape == (12,)
    assert errors.sum() == pytest.approx(-ae.score(X), rel=1e-4)
    assert ae.backend_ == BACKEND
    assert ae.get_feature_names_out()[0] == f"{type(ae).__name__.lower()}0"


@pytest.mark.parametrize("dtype", [np.float16, np.int32, np.uint8, bool])
def test_other_dtypes_become_float32(dtype: Any, X: np.ndarray) -> None:
    D = (X.mean() < X).astype(dtype)
    assert small().fit(D).transform(D).dtype == np.float32


@pytest.mark.parametrize("layout", ["F", "reversed", "byte-swapped", "read-only"])
def test_layouts_give_the_same_bits(layout: str, X: np.ndarray) -> None:
    given = {
        "F": np.asfortranarray(X),
        "reversed": X[::-1, ::-1].copy()[::-1, ::-1],
        "byte-swapped": X.astype(">f4"),
        "read-only": X.copy(),
    }[layout]
    given.flags.writeable = False
    expected = small().fit(X)
    ae = small().fit(given)
    assert (ae.transform(given) == expected.transform(X)).all()
    assert ae.history_["loss"] == expected.history_["loss"]


def test_memory_map(tmp_path: Path, X: np.ndarray) -> None:
    np.save(tmp_path / "x.npy", X)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    assert (small().fit(mapped).transform(mapped) == small().fit(X).transform(X)).all()


@pytest.mark.parametrize("kind", [sp.csr_array, sp.csr_matrix, sp.csc_array, sp.csc_matrix])
@pytest.mark.parametrize("corruption", [None, "salt_and_pepper"])
def test_sparse_is_close_to_dense(kind: Any, corruption: str | None, X: np.ndarray) -> None:
    D = np.where(np.median(X) < X, X, 0)
    params = {"corruption": corruption, "corruption_level": 0.1}
    dense, sparse = small(**params).fit(D), small(**params).fit(kind(D))
    np.testing.assert_allclose(sparse.transform(kind(D)), dense.transform(D), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(sparse.feature_errors(kind(D)), dense.feature_errors(D), rtol=1e-4)
    assert sparse.score(kind(D)) == pytest.approx(dense.score(D), rel=1e-4)


def test_unsorted_csr_with_duplicates_is_left_alone(X: np.ndarray) -> None:
    D = np.where(np.median(X) < X, X, 0)
    C = sp.csr_array(D)
    data, indices = C.data.copy(), C.indices.copy()
    for i in range(C.shape[0]):
        row = slice(C.indptr[i], C.indptr[i + 1])
        data[row], indices[row] = data[row][::-1], indices[row][::-1]
    messy = sp.csr_array((data, indices, C.indptr.astype(np.int64)), shape=C.shape)
    before = messy.data.copy(), messy.indices.copy()
    assert (small().fit(messy).transform(messy) == small().fit(C).transform(C)).all()
    assert (messy.data == before[0]).all()
    assert (messy.indices == before[1]).all()


def test_frames(X: np.ndarray) -> None:
    pd, pl = pytest.importorskip("pandas"), pytest.importorskip("polars")
    names = [f"g{i}" for i in range(12)]
    frame = pd.DataFrame(X, columns=names, index=[f"c{i}" for i in range(200)])
    ae = small().fit(frame)
    assert list(ae.feature_names_in_) == names
    assert (ae.transform(frame) == small().fit(X).transform(X)).all()
    out = ae.set_output(transform="pandas").transform(frame)
    assert list(out.columns) == list(ae.get_feature_names_out())
    assert list(out.index) == list(frame.index)
    with pytest.raises(ValueError, match="feature names should match"):
        ae.transform(frame[names[::-1]])
    polars = pl.DataFrame(X, schema=names)
    assert (small().fit(polars).transform(polars) == small().fit(X).transform(X)).all()


def test_source_names_are_checked(X: np.ndarray) -> None:
    names = np.array([f"g{i}" for i in range(12)])
    ae = small().fit(ArraySource(X, var_names=names))
    assert list(ae.feature_names_in_) == list(names)
    with pytest.raises(ValueError, match="column 0 is 'g11', not 'g0'"):
        ae.transform(ArraySource(X, var_names=names[::-1]))
    with pytest.raises(ValueError, match="X has 5 features, but Autoencoder is expecting 12"):
        ae.transform(ArraySource(X[:, :5]))


@pytest.mark.parametrize("sparse", [False, True])
def test_source_in_one_block_equals_the_array(sparse: bool, X: np.ndarray) -> None:
    data = sp.csr_array(np.where(np.median(X) < X, X, 0)) if sparse else X
    a, b = small().fit(data), small().fit(ArraySource(data))
    assert all((u == v).all() for u, v in zip(a.coefs_, b.coefs_, strict=True))
    assert (a.transform(data) == b.transform(ArraySource(data))).all()


@pytest.mark.parametrize("sparse", [False, True])
def test_source_in_blocks(sparse: bool, X: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    data = sp.csr_array(np.where(np.median(X) < X, X, 0)) if sparse else X
    source = ArraySource(data)
    ae = small(max_iter=30).fit(source, block_bytes=3000)
    assert ae.history_["loss"][-1] < ae.history_["loss"][0]
    assert ae.history_["loss"][-1] == pytest.approx(small(max_iter=30).fit(data).history_["loss"][-1], rel=0.3)
    whole = [ae.transform(data), ae.reconstruct(data), ae.score_samples(data), ae.feature_errors(data)]
    monkeypatch.setattr("narrows.models.base.BLOCK_BYTES", 3000)
    parts = [
        ae.transform(source),
        ae.reconstruct(source),
        ae.score_samples(source),
        ae.feature_errors(source),
    ]
    for one, other in zip(whole[:3], parts[:3], strict=True):
        assert same_rows(one, other)
    np.testing.assert_allclose(whole[3], parts[3], rtol=1e-12 if BACKEND == "cpp" else 1e-4)


# --- targets, weights, going on -----------------------------------------------------------------------------


def test_labels_are_ignored(X: np.ndarray) -> None:
    labels = np.arange(200) % 3
    a, b = small().fit(X), small().fit(X, labels)
    assert (a.transform(X) == b.transform(X)).all()
    assert a.score(X, labels) == b.score(X)


def test_pairs(X: np.ndarray) -> None:
    noisy = X + np.random.default_rng(0).normal(0, 0.3, X.shape).astype(np.float32)
    ae = DenoisingAutoencoder(3, **(SMALL | {"max_iter": 60})).fit(noisy, X)
    assert ae.plan_.spec.corruption is None
    assert ae.plan_.spec.separate_target
    assert ((ae.reconstruct(noisy) - X) ** 2).sum(1).mean() == pytest.approx(-ae.score(noisy, X), rel=1e-4)
    assert -ae.score(noisy, X) < ((noisy - X) ** 2).sum(1).mean() / 2
    with pytest.raises(ValueError, match="scoring needs y"):
        ae.score(noisy)


def test_target_of_another_width(X: np.ndarray) -> None:
    coarse = X.reshape(200, 6, 2).mean(2)
    ae = small().fit(coarse, X, X_val=(coarse[:20], X[:20]))
    assert ae.reconstruct(coarse).shape == X.shape
    assert ae.inverse_transform(ae.transform(coarse)).shape == X.shape
    assert ae.latent_sensitivity(coarse).shape == (3, 12)
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
    assert Autoencoder().corruption is None
    for estimator in ESTIMATORS:
        twin = clone(estimator)
        assert twin.get_params() == estimator.get_params()
        assert eval(repr(estimator)).get_params() == estimator.get_params()
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


BAD_PARAMETERS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"n_components": 0}, ValueError, "n_components=0 must be at least 1"),
    ({"n_components": 2.5}, TypeError, "n_components=2.5 must be an integer"),
    ({"n_components": True}, TypeError, "n_components=True"),
    ({"hidden_layer_sizes": (8, 0)}, ValueError, "hidden_layer_sizes"),
    ({"hidden_layer_sizes": "8"}, TypeError, "hidden_layer_sizes='8'"),
    ({"decoder_layer_sizes": 1.5}, TypeError, "decoder_layer_sizes=1.5"),
    ({"activation": "softmax"}, ValueError, "activation='softmax' must be one of linear, relu"),
    ({"latent_activation": None}, TypeError, "latent_activation=None"),
    ({"loss": "poison"}, ValueError, "loss='poison' must be one of mse, bce, huber, multinomial"),
    ({"loss": "bce", "output_activation": "relu"}, ValueError, "choose from auto, sigmoid"),
    ({"loss": "multinomial", "output_activation": "linear"}, ValueError, "choose from auto, softmax"),
    ({"corruption": "rain"}, ValueError, "must be one of gaussian, masking, salt_and_pepper, None"),
    ({"corruption": "masking", "corruption_level": 1.5}, ValueError, r"must be in \[0, 1\]: a probability"),
    ({"corruption_level": -1}, ValueError, "corruption_level=-1"),
    ({"dropout": 1.0}, ValueError, r"dropout=1.0 must be in \[0, 1\)"),
    ({"kl_sparsity": 1.0}, ValueError, "kl_sparsity needs latent_activation='sigmoid'"),
    ({"tied_weights": True, "decoder_layer_sizes": (4,)}, ValueError, r"must be None or \(8,\)"),
    ({"tied_weights": 1}, TypeError, "tied_weights=1 must be True or False"),
    ({"alpha": float("nan")}, ValueError, "alpha=nan"),
    ({"solver": "lbfgs"}, ValueError, "solver='lbfgs' must be one of sgd, adam, adamw"),
    ({"learning_rate_init": 0}, ValueError, "learning_rate_init=0 must be in"),
    ({"learning_rate_init": "fast"}, TypeError, "learning_rate_init='fast' must be a number"),
    ({"clip_norm": 0.0}, ValueError, "clip_norm=0.0"),
    ({"learning_rate": "warm"}, ValueError, "constant, cosine, plateau"),
    ({"batch_size": 0}, ValueError, "batch_size=0"),
    ({"max_iter": 0}, ValueError, "max_iter=0"),
    ({"validation_fraction": 1.0}, ValueError, r"validation_fraction=1.0 must be in \(0, 1\)"),
    ({"random_state": -1}, ValueError, "random_state=-1"),
    ({"random_state": "lucky"}, TypeError, "random_state='lucky'"),
    ({"precision": "float16"}, ValueError, "precision='float16' must be one of float32, float64"),
    ({"backend": "abacus"}, ValueError, "backend='abacus' is not a backend"),
    ({"n_threads": 0}, ValueError, "n_threads=0"),
]


@pytest.mark.parametrize(("params", "error", "message"), BAD_PARAMETERS, ids=lambda v: str(v)[:40])
def test_bad_parameters(params: dict[str, Any], error: type[Exception], message: str, X: np.ndarray) -> None:
    ae = small(**params)
    with pytest.raises(error, match=message) as raised:
        ae.fit(X)
    assert "\n" not in str(raised.value)
    with pytest.raises(NotFittedError):
        ae.transform(X)


def _with(X: np.ndarray, row: int, column: int, value: float) -> np.ndarray:
    X = X.copy()
    X[row, column] = value
    return X


BAD_DATA: list[tuple[str, Callable[[np.ndarray], Any], str]] = [
    ("nan", lambda X: small().fit(_with(X, 7, 3, np.nan)), "X: NaN in row 7, column 3"),
    ("inf", lambda X: small().fit(_with(X, 7, 3, np.inf)), "X: inf in row 7, column 3"),
    ("sparse nan", lambda X: small().fit(sp.csr_array(_with(X, 7, 3, np.nan))), "NaN in row 7, column 3"),
    ("source nan", lambda X: small().fit(ArraySource(_with(X, 7, 3, np.nan))), "NaN in row 7, column 3"),
    (
        "later block nan",
        lambda X: small().fit(ArraySource(_with(X, 170, 3, np.nan)), block_bytes=2000),
        "NaN in row 170, column 3",
    ),
    ("val nan", lambda X: small().fit(X, X_val=_with(X, 7, 3, np.nan)), "NaN in row 7, column 3"),
    ("bce", lambda X: small(loss="bce").fit(_with(X, 9, 2, 1.5)), r"1.5 in row 9, column 2; loss='bce'"),
    (
        "sparse bce",
        lambda X: small(loss="bce").fit(sp.csr_array(_with(X, 9, 2, 1.5))),
        r"1.5 in row 9, column 2; loss='bce'",
    ),
    (
        "source bce",
        lambda X: small(loss="bce").fit(ArraySource(_with(X, 150, 2, 1.5)), block_bytes=2000),
        "1.5 in row 150, column 2",
    ),
    ("multinomial", lambda X: small(loss="multinomial").fit(_with(X, 9, 2, -1)), "-1 in row 9, column 2"),
    ("target", lambda X: small(loss="bce").fit(X, _with(X, 9, 2, 1.5)), "y: 1.5 in row 9, column 2"),
    ("score", lambda X: small(loss="bce").fit(X).score(_with(X, 9, 2, 1.5)), "X: 1.5 in row 9, column 2"),
    ("y rows", lambda X: small().fit(X, X[:5]), "y has 5 rows, X has 200"),
    ("y nan", lambda X: small().fit(X, _with(X, 7, 3, np.nan)), "y: NaN in row 7, column 3"),
    ("weight shape", lambda X: small().fit(X, sample_weight=np.ones(5)), r"sample_weight has shape \(5,\)"),
    ("weight sign", lambda X: small().fit(X, sample_weight=-np.ones(200)), "sample_weight: -1 at row 0"),
    (
        "no weight",
        lambda X: small().fit(X, sample_weight=np.zeros(200)),
        "sample_weight is zero for every row",
    ),
    ("one row", lambda X: small().fit(X[:1]), "minimum of 2 is required"),
    ("one source row", lambda X: small().fit(ArraySource(X[:1])), "minimum of 2 is required"),
    (
        "features",
        lambda X: small().fit(X).transform(X[:, :5]),
        "X has 5 features, but Autoencoder is expecting 12",
    ),
    ("codes", lambda X: small().fit(X).inverse_transform(X), "Z has 12 columns, but Autoencoder has 3"),
    ("val width", lambda X: small().fit(X, X_val=X[:, :5]), "X has 5 features"),
    ("val pair", lambda X: small().fit(X, X, X_val=X), r"X_val must be a pair"),
    (
        "score width",
        lambda X: small().fit(X).score(X, X[:, :5]),
        "y has 5 columns, the reconstruction has 12",
    ),
]


@pytest.mark.parametrize(("call", "message"), [b[1:] for b in BAD_DATA], ids=[b[0] for b in BAD_DATA])
def test_bad_data(call: Callable[[np.ndarray], Any], message: str, X: np.ndarray) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        call(X)
    assert "\n" not in str(raised.value)


def test_a_failed_fit_leaves_the_earlier_one(X: np.ndarray) -> None:
    ae = small().fit(X)
    before = ae.transform(X)
    with pytest.raises(ValueError, match="NaN"):
        ae.fit(_with(X[:, :5], 0, 0, np.nan))
    assert (ae.transform(X) == before).all()
    assert ae.n_features_in_ == 12


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


@pytest.mark.parametrize("output", ["linear", "gelu", "softmax"])
def test_latent_sensitivity_is_the_derivative(output: str, X: np.ndarray) -> None:
    ae = small(precision="float64", output_activation=output, activation="silu").fit(X)
    D = X[:9].astype(np.float64)
    found = ae.latent_sensitivity(D)
    Z, h = ae.transform(D), 1e-6
    for j in range(3):
        step = h * np.eye(3)[j]
        slope = (ae.inverse_transform(Z + step) - ae.inverse_transform(Z - step)) / (2 * h)
        np.testing.assert_allclose(found[j], abs(slope).mean(axis=0), rtol=1e-5, atol=1e-9)


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
        (lambda t, m: m["params"].update(n_components=4), "tensor .* has shape .* the parameters ask for"),
        (lambda t, m: m["params"].update(magic=4), "magic"),
        (lambda t, m: m["params"].update(loss="bad"), "loss='bad'"),
        (lambda t, m: m["fitted"].update(n_features_in_=13), "tensor W0 has shape"),
        (lambda t, m: m["fitted"].update(n_iter_=True), "n_iter_ is True"),
        (lambda t, m: m["fitted"].update(transform=3), "fitted attributes"),
        (lambda t, m: m["history"].update(loss=[1.0]), "history"),
        (lambda t, m: m.pop("network"), "network"),
        (lambda t, m: t.pop("b0"), "tensor b0 has shape None"),
        (lambda t, m: t["W0"].__setitem__(0, np.nan), "tensor W0 is not of finite"),
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
