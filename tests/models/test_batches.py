"""Estimators whose decoder is told the batch of a row: labels, what they are used for, and where they are kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score
from sklearn.neighbors import KNeighborsClassifier

import narrows
from estimator_cases import SMALL, same_rows, small
from narrows import (
    RBM,
    Autoencoder,
    ContractiveAutoencoder,
    ConvAutoencoder,
    CountAutoencoder,
    DeepAutoencoder,
    DenoisingAutoencoder,
    LinearAutoencoder,
    SparseAutoencoder,
    VariationalAutoencoder,
)
from narrows.data import ArraySource
from narrows.errors import DataError, ModelFileError, ResumeError
from narrows.fitting.conditions import condition_numbers, declared_labels, read_labels
from narrows.fitting.feed import split_rows
from narrows.persistence import load_tensors, save_tensors
from narrows.training import Checkpoint

Array = NDArray[Any]
TOLD = [
    Autoencoder(3, hidden_layer_sizes=8, **SMALL),
    LinearAutoencoder(3, precision="float64", **SMALL),
    DenoisingAutoencoder(3, hidden_layer_sizes=8, **SMALL),
    SparseAutoencoder(6, **SMALL),
    ContractiveAutoencoder(3, tied_weights=False, **SMALL),
    VariationalAutoencoder(3, hidden_layer_sizes=8, **SMALL),
    CountAutoencoder(3, hidden_layer_sizes=8, **SMALL),
    CountAutoencoder(3, hidden_layer_sizes=8, likelihood="zinb", link="exp", dispersion="gene-cell", **SMALL),
]
told = pytest.mark.parametrize("estimator", TOLD, ids=[f"{type(e).__name__}-{i}" for i, e in enumerate(TOLD)])


def rows_in_batches(n: int = 90, d: int = 12) -> tuple[Array, Array]:
    """Counts, and the batch of each row."""
    rng = np.random.default_rng(0)
    batch = np.array(["day 1", "day 2", "day 10"])[rng.integers(0, 3, n)]
    mean = rng.gamma(2.0, 2.0, d) * np.where(batch == "day 2", 3.0, 1.0)[:, None]
    return rng.poisson(mean).astype(np.float32), batch


def fresh(estimator: Any, **params: Any) -> Any:
    from sklearn.base import clone

    return clone(estimator).set_params(**params)


# --- what they are for ----------------------------------------------------------------------------------------------


def two_samples(n: int = 2000, d: int = 60) -> tuple[Array, Array, Array]:
    """Cells of four kinds, whose genes the second sample has more or less of than the first; kinds and samples."""
    rng = np.random.default_rng(0)
    programs = rng.gamma(0.6, 1.5, (4, d)) + 0.05
    kind, batch = rng.integers(4, size=n), np.array(["A", "B"])[rng.integers(2, size=n)]
    mean = programs[kind] * np.where((batch == "B")[:, None], np.exp(0.7 * rng.normal(size=d)), 1)
    mean *= rng.lognormal(1, 0.3, (n, 1))
    return rng.poisson(rng.gamma(5, mean / 5)).astype(np.float32), kind, batch


@pytest.mark.parametrize("variational", [False, True], ids=["count", "variational"])
def test_codes_need_not_tell_what_the_decoder_is_told(variational: bool) -> None:
    X, kind, batch = two_samples()
    rows, held = np.arange(1500), np.arange(1500, 2000)
    params: dict[str, Any] = {
        "hidden_layer_sizes": 32,
        "batch_size": 128,
        "learning_rate_init": 3e-3,
        "random_state": 0,
    }
    model: Any = CountAutoencoder(2, max_iter=100, **params)
    if variational:
        model = VariationalAutoencoder(4, loss="nb", max_iter=200, **params)
    found = {}
    for name, labels in (("without", None), ("with", batch)):
        model.fit(sp.csr_array(X[rows]), batch=None if labels is None else labels[rows])
        codes = model.transform(X[held])
        score = model.score(X[held], batch=None if labels is None else labels[held])
        near = KNeighborsClassifier(15)
        found[name] = (
            cross_val_score(near, codes, batch[held], cv=5).mean(),
            cross_val_score(LogisticRegression(max_iter=1000), codes, batch[held], cv=5).mean(),
            cross_val_score(near, codes, kind[held], cv=5).mean(),
            score,
        )
    assert found["without"][0] > 0.8, "neighbours tell the sample"
    assert found["with"][0] < 0.65
    assert found["with"][1] < 0.6
    assert found["with"][2] > 0.98, "and the kind of cell all the better"
    assert found["with"][3] > found["without"][3]


def test_denoising_as_another_batch_moves_means_there() -> None:
    X, _, batch = two_samples()
    model = CountAutoencoder(2, hidden_layer_sizes=32, batch_size=128, learning_rate_init=3e-3, random_state=0)
    model.fit(X, batch=batch)

    def profile(means: Array, of: str) -> Array:
        return (100 * means / means.sum(axis=1, keepdims=True))[batch == of].mean(axis=0)

    def distance(means: Array) -> float:
        """Of cells of B, from what cells of A look like."""
        return float(np.abs(profile(means, "B") - profile(X, "A")).sum())

    as_one_is, as_the_other = model.denoise(X, batch=batch), model.denoise(X, library=1e3, batch="A")
    np.testing.assert_allclose(as_the_other.sum(axis=1), 1e3, rtol=1e-4)
    assert distance(as_the_other) < 0.3 * distance(as_one_is)
    assert distance(as_one_is) == pytest.approx(distance(X), rel=0.1)


# --- every estimator ------------------------------------------------------------------------------------------------


@told
def test_methods_take_labels_and_say_so_without(estimator: Any) -> None:
    X, batch = rows_in_batches()
    model = fresh(estimator).fit(X, batch=batch)
    np.testing.assert_array_equal(model.batches_, ["day 1", "day 10", "day 2"])
    width = model.plan_.spec.n_components
    assert model.coefs_[model.plan_.spec.latent].shape[0] == width + 3
    codes = model.transform(X)
    assert codes.shape == (90, width)
    methods = {
        "reconstruct": X, "inverse_transform": codes, "score_samples": X, "score": X, "feature_errors": X,
        "latent_sensitivity": X,
    }  # fmt: skip
    for name, given in methods.items():
        method = getattr(model, name)
        found = method(given, batch=batch)
        assert np.isfinite(found).all(), name
        np.testing.assert_array_equal(found, method(given, batch=list(batch)), err_msg=name)
        for one in ("day 1", np.str_("day 10")):
            np.testing.assert_array_equal(method(given, batch=one), method(given, batch=[one] * 90), err_msg=name)
        with pytest.raises(ValueError, match=r"was fitted with batches, .* give batch"):
            method(given)
        with pytest.raises(DataError, match=r"'day 3' in row 41 is none of the batches of the fit: 'day 1', 'day 10'"):
            method(given, batch=[*batch[:41], "day 3", *batch[42:]])
    assert not np.array_equal(model.reconstruct(X, batch="day 1"), model.reconstruct(X, batch="day 2"))
    rebuilt = model.reconstruct(X, batch=batch)
    if not isinstance(estimator, CountAutoencoder):  # whose codes do not hold the sums of rows
        np.testing.assert_allclose(model.inverse_transform(codes, batch=batch), rebuilt, rtol=1e-5, atol=1e-5)
    assert same_rows(model.reconstruct(X[5:9], batch=batch[5:9]), rebuilt[5:9])
    assert model.score(X, batch=batch) == pytest.approx(float(model.score_samples(X, batch=batch).mean()))


@told
def test_without_labels_nothing_is_told(estimator: Any) -> None:
    X, batch = rows_in_batches()
    model = fresh(estimator).fit(X)
    assert not hasattr(model, "batches_")
    assert model.plan_.spec.data.n_conditions == 0
    for name in ("reconstruct", "score_samples", "latent_sensitivity"):
        with pytest.raises(ValueError, match=r"batch is given to a .* that was fitted without"):
            getattr(model, name)(X, batch=batch)
    again = fresh(estimator).fit(X, batch=batch).fit(X)
    assert not hasattr(again, "batches_")
    np.testing.assert_array_equal(again.reconstruct(X), model.reconstruct(X))


@told
def test_a_source_in_blocks_is_told_the_same(estimator: Any) -> None:
    X, batch = rows_in_batches()
    params = {"shuffle": False, "early_stopping": False, "batch_size": 16}
    whole = fresh(estimator, **params).fit(X, batch=batch)
    blocks = fresh(estimator, **params).fit(ArraySource(X), batch=batch, block_bytes=16 * 48 * 2)
    for one, other in zip(whole.coefs_, blocks.coefs_, strict=True):
        np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(
        whole.score_samples(X, batch=batch), blocks.score_samples(ArraySource(X), batch=batch)
    )


def test_bounds_and_samples_of_a_variational_one() -> None:
    X, batch = rows_in_batches()
    model = VariationalAutoencoder(3, loss="nb", hidden_layer_sizes=8, **SMALL).fit(X, batch=batch)
    for bound in (model.elbo, model.log_likelihood):
        assert bound(X, 3, batch=batch).shape == (90,)
        assert not np.array_equal(bound(X, 3, batch="day 1"), bound(X, 3, batch="day 2"))
        with pytest.raises(ValueError, match="give batch"):
            bound(X, 3)
    np.testing.assert_allclose(
        model.elbo(X, batch=batch, random_state=0), model.score_samples(X, batch=batch), rtol=1e-4
    )
    np.testing.assert_array_equal(model.sample(4, 0, batch="day 1"), model.sample(4, 0, batch=["day 1"] * 4))
    assert not np.array_equal(model.sample(4, 0, batch="day 1"), model.sample(4, 0, batch="day 2"))
    for inflated in (False, True):
        loss = {"loss": "zinb", "dispersion": "gene-cell"} if inflated else {"loss": "nb"}
        model = VariationalAutoencoder(3, hidden_layer_sizes=8, **loss, **SMALL).fit(X, batch=batch)
        drawn = model.sample(40, 0, noise=True, library=100.0, batch=["day 1", "day 2"] * 20)
        assert (drawn == np.round(drawn)).all()
        np.testing.assert_array_equal(drawn[::2], model.sample(40, 0, noise=True, library=100.0, batch="day 1")[::2])
        assert not np.array_equal(drawn[1::2], model.sample(40, 0, noise=True, library=100.0, batch="day 1")[1::2])
    for given, message in ((None, "give batch"), (["day 1"] * 3, r"shape \(3,\), but X has 4 rows")):
        with pytest.raises(ValueError, match=message):
            model.sample(4, batch=given)


def test_sensitivity_is_the_derivative_given_the_batch() -> None:
    X, batch = rows_in_batches()
    model = small(activation="tanh", precision="float64").fit(X, batch=batch)
    codes, h = model.transform(X).astype(np.float64), 1e-6
    for labels in (batch, "day 2"):
        found = model.latent_sensitivity(X, batch=labels)
        for k in range(3):
            ends = [model.inverse_transform(codes + s * h * np.eye(3)[k], batch=labels) for s in (1, -1)]
            np.testing.assert_allclose(found[k], np.abs(ends[0] - ends[1]).mean(axis=0) / (2 * h), rtol=1e-5, atol=1e-7)


def test_a_traversal_is_of_one_batch() -> None:
    pytest.importorskip("matplotlib")
    X, batch = rows_in_batches()
    model = VariationalAutoencoder(3, hidden_layer_sizes=8, **SMALL).fit(X, batch=batch)
    shown = [
        narrows.plotting.plot_latent_traversal(model, image_shape=(3, 4), batch=b).images[0].get_array()
        for b in ("day 1", "day 2")
    ]
    assert shown[0].shape == shown[1].shape
    assert not np.array_equal(*shown)
    with pytest.raises(ValueError, match="give batch"):
        narrows.plotting.plot_latent_traversal(model, image_shape=(3, 4))


@pytest.mark.parametrize(
    "model",
    [
        small(tied_weights=True),
        ContractiveAutoencoder(3, **SMALL),
        RBM(3, visible="gaussian", **SMALL),
        ConvAutoencoder(2, image_shape=(-1, 1), filters=4, strides=1, **SMALL),
        DeepAutoencoder(2, hidden_layer_sizes=4, **SMALL),
    ],
    ids=lambda model: type(model).__name__,
)
def test_a_decoder_without_a_place_for_them_refuses(model: Any) -> None:
    X, batch = rows_in_batches()
    for fit in (model.fit, model.partial_fit):
        with pytest.raises(ValueError, match=rf"decoder of {type(model).__name__} cannot be conditioned on.*leave"):
            fit(X, batch=batch)
        assert not hasattr(model, "batches_")
        assert not hasattr(model, "n_features_in_")
    model.fit(X)
    with pytest.raises(ValueError, match="fitted without"):
        model.score_samples(X, batch=batch)


# --- labels ---------------------------------------------------------------------------------------------------------


def test_labels_of_every_kind() -> None:
    pandas, polars = pytest.importorskip("pandas"), pytest.importorskip("polars")
    words, ints = ["b", "a", "b", "c"], [10, 9, 10, -1]
    for given in (
        words,
        tuple(words),
        np.array(words),
        np.array(words, object),
        pandas.Series(words, index=list("wxyz")),
        pandas.Categorical(words, categories=["c", "b", "a", "z"]),
        pandas.Series(words, dtype="category"),
        pandas.array(words, dtype="string"),
        polars.Series(words),
    ):
        labels = read_labels(given, 4)
        assert labels.dtype.kind == "U"
        np.testing.assert_array_equal(condition_numbers(labels, np.array(["a", "b", "c"]), 4), [[1], [0], [1], [2]])
    for given in (
        ints,
        np.array(ints, np.int8),
        pandas.Series(ints),
        pandas.array(ints, dtype="Int64"),
        pandas.Categorical(ints),
    ):
        labels = read_labels(given, 4)
        assert labels.dtype == np.int64
        np.testing.assert_array_equal(condition_numbers(labels, np.array([-1, 9, 10]), 4), [[2], [1], [2], [0]])
    np.testing.assert_array_equal(read_labels([True, False], 2), ["True", "False"])
    np.testing.assert_array_equal(read_labels(np.array([True, False], object), 2), ["True", "False"])
    assert condition_numbers(read_labels("b", 4), np.array(["a", "b"]), 4).tolist() == [[1]] * 4
    assert condition_numbers(read_labels(9, 2), np.array([-1, 9]), 2).tolist() == [[1]] * 2
    assert declared_labels(pandas.Series(words, dtype="category")).tolist() == ["a", "b", "c"]
    assert declared_labels(words) is None


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (["a", None, "b"], "None in row 1"),
        (["a", "b", np.nan], "nan in row 2"),
        (["a", "b", 3.5], "3.5 in row 2"),
        (np.array(["a", 7, "b"], object), "7 in row 1"),
        (np.array([1, "a", 2], object), "'a' in row 1"),
        (np.array([1, True, 2], object), "True in row 1"),
        ([0.5, 1.0, 2.0], "0.5 in row 0"),
        (np.array([b"a", b"b", b"c"]), "b'a' in row 0"),
        (np.array(["a", "b"]), r"shape \(2,\), but X has 3 rows"),
        (np.array([["a"], ["b"], ["c"]]), r"shape \(3, 1\), but X has 3 rows"),
        (1.5, "1.5 in row 0"),
        (np.array([1, 2**63, 3], np.uint64), "9223372036854775808 in row 1"),
        ([1, 2, 10**30], "10{30} in row 2"),
    ],
)
def test_what_is_no_label_is_refused(batch: Any, message: str) -> None:
    if isinstance(batch, list) and isinstance(batch[0], str):
        batch = np.array(batch, object)
    with pytest.raises(ValueError, match=message):
        read_labels(batch, 3)


def test_a_number_is_no_string() -> None:
    X, _ = rows_in_batches()
    model = small().fit(X, batch=np.arange(90) % 2)
    np.testing.assert_array_equal(model.batches_, [0, 1])
    with pytest.raises(DataError, match="'1' is none of the batches of the fit: 0, 1"):
        model.reconstruct(X, batch="1")
    assert np.array_equal(model.reconstruct(X, batch=1), model.reconstruct(X, batch=np.ones(90, np.uint8)))


def test_many_batches_are_not_all_named() -> None:
    X, _ = rows_in_batches()
    model = small().fit(X, batch=np.arange(90) % 30)
    with pytest.raises(DataError, match=r"none of the batches of the fit: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, \.\.\.$"):
        model.score(X, batch=77)


# --- training on ----------------------------------------------------------------------------------------------------


def test_training_goes_on_with_the_same_batches() -> None:
    pandas = pytest.importorskip("pandas")
    X, batch = rows_in_batches()
    model = small(warm_start=True).fit(X, batch=batch)
    few = batch != "day 2"
    for fit in (model.fit, model.partial_fit):
        fit(X[few], batch=batch[few])
        np.testing.assert_array_equal(model.batches_, ["day 1", "day 10", "day 2"])
        before = model.reconstruct(X, batch=batch)
        with pytest.raises(DataError, match="'day 4' in row 3 is none of"):
            fit(X[:5], batch=[*batch[:3], "day 4", batch[4]])
        with pytest.raises(ValueError, match="give batch"):
            fit(X)
        np.testing.assert_array_equal(model.reconstruct(X, batch=batch), before)
    model.partial_fit(X[:7], batch="day 10")

    # The first call says which there are.
    for labels, known in ((batch[:1], 1), (pandas.Categorical(batch)[:1], 3)):
        model = small().partial_fit(X[:1], batch=labels)
        assert len(model.batches_) == known
    model.partial_fit(X, batch=batch)
    # Batches without rows would be decoded by weights that have not been trained.
    assert len(small().fit(X[few], batch=pandas.Categorical(batch)[few]).batches_) == 2
    with pytest.raises(ValueError, match="fitted without"):
        small().partial_fit(X).partial_fit(X, batch=batch)


def test_rows_held_out_bring_their_labels() -> None:
    X, batch = rows_in_batches()
    model = small(max_iter=1).fit(X, batch=batch)
    _, held = split_rows(90, 0.1, 0)
    expected = -model.score(X[held], batch=batch[held])
    assert model.history_["val_loss"][-1] == pytest.approx(expected, rel=1e-5)
    rows = slice(0, 60)
    model = small(max_iter=1).fit(X[rows], batch=batch[rows], X_val=(X[60:], None, batch[60:]))
    assert model.history_["val_loss"][-1] == pytest.approx(-model.score(X[60:], batch=batch[60:]), rel=1e-5)
    model = small(max_iter=1).fit(X[rows], X[rows, :5], batch=batch[rows], X_val=(X[60:], X[60:, :5], "day 1"))
    expected = -model.score(X[60:], X[60:, :5], batch="day 1")
    assert model.history_["val_loss"][-1] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("X_val", "message"),
    [
        (lambda X, b: X, r"must be a tuple \(X_val, y_val, batch_val\) if, and only if, fit has a batch"),
        (lambda X, b: (X, None), r"must be a tuple \(X_val, y_val, batch_val\)"),
        (lambda X, b: (X, X, b), "X_val must be a pair|only if, fit has a y"),
        (lambda X, b: (X, None, b[:3]), r"batch_val has shape \(3,\), but X has 90 rows"),
        (lambda X, b: (X, None, "day 7"), "batch_val: 'day 7' is none of the batches"),
        (lambda X, b: (X, None, b, b), "4 parts"),
    ],
)
def test_validation_rows_without_their_labels_are_refused(X_val: Any, message: str) -> None:
    X, batch = rows_in_batches()
    with pytest.raises(ValueError, match=message):
        small().fit(X, batch=batch, X_val=X_val(X, batch))
    with pytest.raises(ValueError, match="if, and only if, fit has a batch"):
        small().fit(X, X_val=(X, None, batch))


def test_weights_and_targets_go_with_labels() -> None:
    X, batch = rows_in_batches()
    weight = np.arange(90) % 3 / 2.0
    model = small().fit(X, X[:, :4], batch=batch, sample_weight=weight)
    assert model.reconstruct(X, batch=batch).shape == (90, 4)
    # What has no weight has no influence, nor has its label.
    other = np.where(weight == 0, "day 1", batch)
    model, same = (small(early_stopping=False).fit(X, batch=b, sample_weight=weight) for b in (batch, other))
    np.testing.assert_allclose(model.coefs_[-1], same.coefs_[-1], rtol=1e-6)


# --- kept -----------------------------------------------------------------------------------------------------------


@told
def test_model_files_keep_the_batches(estimator: Any, tmp_path: Path) -> None:
    X, batch = rows_in_batches()
    for labels in (batch, np.arange(90) % 4 - 2):
        model = fresh(estimator).fit(X, batch=labels)
        model.save(tmp_path / "m")
        loaded = narrows.load(tmp_path / "m")
        np.testing.assert_array_equal(loaded.batches_, model.batches_)
        assert loaded.batches_.dtype == model.batches_.dtype
        np.testing.assert_array_equal(loaded.reconstruct(X, batch=labels), model.reconstruct(X, batch=labels))
        loaded.partial_fit(X, batch=labels)
    fresh(estimator).fit(X).save(tmp_path / "m")
    assert not hasattr(narrows.load(tmp_path / "m"), "batches_")


@pytest.mark.parametrize(
    "damage",
    [
        ["day 1", "day 10"],
        ["day 1", "day 10", "day 2", "day 3"],
        ["day 1", "day 2", "day 10"],
        ["day 1", "day 1", "day 2"],
        ["day 1", "day 2", 3],
        [0.5, 1.5, 2.5],
        [True, False, True],
        [],
        "abc",
        7,
        {"a": 1, "b": 2, "c": 3},
        None,
    ],
    ids=str,
)
def test_a_model_file_with_other_batches_is_refused(damage: Any, tmp_path: Path) -> None:
    X, batch = rows_in_batches()
    small().fit(X, batch=batch).save(tmp_path / "m")
    tensors, meta = load_tensors(tmp_path / "m", kind="model")
    meta["network"]["batches"] = damage
    save_tensors(tmp_path / "m", tensors, meta, kind="model")
    with pytest.raises(ModelFileError):
        narrows.load(tmp_path / "m")


def test_a_model_file_of_before_there_were_batches_is_read(tmp_path: Path) -> None:
    X, _ = rows_in_batches()
    model = small().fit(X)
    model.save(tmp_path / "m")
    tensors, meta = load_tensors(tmp_path / "m", kind="model")
    del meta["network"]["batches"]
    save_tensors(tmp_path / "m", tensors, meta, kind="model")
    np.testing.assert_array_equal(narrows.load(tmp_path / "m").reconstruct(X), model.reconstruct(X))
    meta["network"]["batches"] = ["a"]
    meta["params"]["tied_weights"] = True
    save_tensors(tmp_path / "m", tensors, meta, kind="model")
    with pytest.raises(ModelFileError, match="cannot be conditioned on batches"):
        narrows.load(tmp_path / "m")


def test_a_checkpoint_is_of_its_labels(tmp_path: Path) -> None:
    X, batch = rows_in_batches()
    path = tmp_path / "c"
    model = small().fit(X, batch=batch, checkpoint=Checkpoint(path))
    again = small().fit(X, batch=list(batch), checkpoint=Checkpoint(path, resume="require"))
    np.testing.assert_array_equal(again.coefs_[-1], model.coefs_[-1])
    moved = batch.copy()
    moved[[0, 1]] = moved[[1, 0]] if batch[0] != batch[1] else ["day 1", "day 2"]
    for other in (moved, np.where(batch == "day 1", "day 0", batch), None):
        with pytest.raises(ResumeError, match=r"differs in .*batch"):
            small().fit(X, batch=other, checkpoint=Checkpoint(path))
