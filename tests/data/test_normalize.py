"""Normalisation: right values, the same bits for any blocks, sparse kept sparse, state that survives JSON."""

from __future__ import annotations

import json
from itertools import pairwise

import numpy as np
import pandas
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import config_context
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.exceptions import NotFittedError
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MinMaxScaler, StandardScaler

import narrows as nw
from contract import assert_contract
from narrows.data import ArraySource
from narrows.data.normalize import Normalizer
from narrows.data.normalized import NormalizedSource
from narrows.data.scan import row_blocks
from narrows.errors import DataError


def counts(n=200, d=30, seed=0, density=0.3):
    rng = np.random.default_rng(seed)
    X = rng.poisson(3.0, (n, d)) * (rng.random((n, d)) < density)
    return X.astype(np.float32)


def reals(n=300, d=7, seed=1):
    rng = np.random.default_rng(seed)
    return rng.normal(5.0, 2.0, (n, d)) * 10.0 ** np.arange(d)


def dense(block):
    return block.toarray() if sp.issparse(block) else block


@pytest.mark.parametrize("layout", [np.asarray, sp.csr_array])
def test_log1p_scales_to_the_median_total(layout):
    X = counts()
    X[3] = 0
    fitted = Normalizer("log1p").fit(ArraySource(layout(X)))
    totals = X.sum(axis=1, dtype=np.float64)
    target = np.median(totals[totals > 0])
    expected = np.log1p(X / np.where(totals > 0, totals, 1)[:, None] * target)
    out = fitted.transform(layout(X))
    assert sp.issparse(out) == sp.issparse(layout(X))
    assert out.dtype == np.float32
    np.testing.assert_allclose(dense(out), expected, rtol=1e-6)
    assert fitted.n_empty_rows_ == 1
    assert not dense(out)[3].any()
    assert "1 empty row" in fitted.describe()
    np.testing.assert_allclose(
        fitted.inverse_transform(dense(out)).sum(axis=1)[totals > 0], target, rtol=1e-4
    )  # the inverse is on the common total


@pytest.mark.parametrize("layout", [np.asarray, sp.csr_array])
def test_standard_and_minmax_agree_with_scikit_learn(layout):
    X = reals()
    X[:, 2] = 4.25  # a constant feature
    X[np.random.default_rng(0).random(X.shape) < 0.2] = 0
    X[:, 2] = 4.25
    for kind, scaler in (("standard", StandardScaler()), ("minmax", MinMaxScaler())):
        fitted = Normalizer(kind).fit(ArraySource(layout(X)))
        out = fitted.transform(layout(X))
        assert isinstance(out, np.ndarray)
        np.testing.assert_allclose(out, scaler.fit_transform(X), rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(fitted.inverse_transform(out), X, rtol=1e-9, atol=1e-6)
        assert fitted.n_constant_features_ == 1


def test_standard_keeps_small_variance_beside_a_large_mean():
    X = 1e8 + np.random.default_rng(0).normal(size=(5000, 3))
    out = Normalizer("standard").fit(ArraySource(X)).transform(X)
    np.testing.assert_allclose(out.std(axis=0), 1.0, rtol=1e-6)


def test_minmax_of_non_negative_sparse_stays_sparse():
    X = sp.csr_array(counts())
    fitted = Normalizer("minmax").fit(ArraySource(X))
    source = NormalizedSource(ArraySource(X), fitted)
    assert source.is_sparse
    block = source.read_rows(slice(0, 50))
    assert sp.issparse(block)
    np.testing.assert_allclose(dense(block), MinMaxScaler().fit_transform(X.toarray())[:50], rtol=1e-6)


def kinds_of_data():
    """Kinds of data by name, with what ``auto`` takes for a squared error, and the one divisor of all features."""
    rng = np.random.default_rng(0)
    cells = rng.negative_binomial(0.5, 0.1 + 0.8 * rng.random((1, 80)), (300, 80))
    strokes = rng.integers(0, 256, (100, 784)).astype(np.uint8) * (rng.random((100, 784)) < 0.2)
    photo = np.clip(rng.normal(120, 60, (100, 192)), 1, 255).astype(np.uint8)
    dark = np.minimum(rng.exponential(9, (200, 64)), 180).astype(np.uint8)
    dark[0, 0] = 180
    ratings = rng.integers(1, 6, (200, 50)) * (rng.random((200, 50)) < 0.1)
    people = np.column_stack([rng.integers(17, 90, 400), rng.integers(1, 90, 400) * 1000, rng.poisson(1.2, 400)])
    logs = np.log1p(cells / np.maximum(cells.sum(axis=1, keepdims=True), 1) * 1e4)
    tpm = cells[cells.sum(axis=1) > 0] / cells[cells.sum(axis=1) > 0].sum(axis=1, keepdims=True) * 1e6
    return {
        "digits": (load_digits().data, "minmax", 16),
        "strokes": (strokes, "minmax", 255),
        "strokes in float64": (strokes / 1.0, "minmax", 255),
        "sparse strokes": (sp.csr_array(strokes), "minmax", 255),
        "photo": (photo, "minmax", 255),
        "dark bytes": (dark, "minmax", 255),
        "the same as counts": (dark.astype(int), "log1p", None),
        "cells": (cells, "log1p", None),
        "sparse cells": (sp.csr_array(cells), "log1p", None),
        "cells in bytes": (sp.csr_array(np.minimum(cells, 255).astype(np.uint8)), "log1p", None),
        "words": (sp.csr_array(rng.poisson(0.01, (500, 300))), "log1p", None),
        "a few small counts": (rng.poisson(1.0, (6, 5)), "log1p", None),
        "likes": (sp.csr_array((rng.random((100, 60)) < 0.05).astype(int)), "none", None),
        "ratings, zeros for none": (sp.csr_array(ratings), "minmax", 5),
        "ratings": (rng.integers(1, 6, (200, 20)), "standard", None),
        "intensities": (rng.integers(200, 60_000, (50, 300)), "standard", None),
        "ages, incomes, children": (people, "standard", None),
        "log-normalised counts": (logs, "standard", None),
        "TPM": (tpm, "log1p", None),
        "whole percentages": (rng.integers(0, 101, (500, 12)), "minmax", 100),
        "percentages": (100 * rng.dirichlet(np.ones(9), 200), "standard", None),
        "temperatures": (rng.integers(-20, 35, (200, 12)), "standard", None),
        "times among small numbers": (
            np.column_stack([1_700_000_000 + rng.integers(0, 99, 200), cells[:200, :9]]),
            "standard",
            None,
        ),
        "times": (1_700_000_000 + rng.integers(0, 10**7, (200, 2)), "standard", None),
    }


def test_auto_knows_counts_from_other_whole_numbers():
    """Rows are scaled only if they hold counts, whatever holds the data; the log says what, why, and how else."""
    for name, (X, kind, divisor) in kinds_of_data().items():
        fitted = Normalizer().fit(X)
        assert fitted.resolved_ == kind, name
        assert ("rows scaled to a total" in fitted.describe()) == (kind == "log1p"), name
        assert "; kind=NAME chooses another)" in fitted.describe(), name
        assert "--normalize NAME" in NormalizedSource(ArraySource(X), fitted).describe("--normalize NAME"), name
        if divisor is not None:
            assert (
                f"not counts: whole numbers up to {X.max():g}; all features are divided by {divisor}" in fitted.reason_
            )
            out = fitted.transform(X)
            assert sp.issparse(out) == sp.issparse(X)
            np.testing.assert_allclose(dense(out), dense(X) / divisor, rtol=1e-6)
            np.testing.assert_allclose(fitted.inverse_transform(dense(out)), dense(X), rtol=1e-6, atol=1e-4)
            # A pixel that was always black may light up later. Cross-entropies get the same scale.
            assert Normalizer(loss="bce").fit(X).transform(X).max() <= 1
            assert Normalizer(loss="bce").fit(X).resolved_ == "minmax"
            assert Normalizer.from_dict(fitted.to_dict()).describe() == fitted.describe()
        elif kind == "log1p" and name != "TPM":
            assert Normalizer(loss="nb").fit(X).describe().startswith("none (the nb loss takes counts as they are)")
    assert "kind=NAME" not in Normalizer("standard").fit(np.eye(3)).describe()


def test_auto_does_not_depend_on_where_the_data_lie(tmp_path):
    """CSR, CSR that stores its zeros, and files lead to the same choice; only a dense array of bytes says more."""
    for name, (X, kind, _) in kinds_of_data().items():
        full = sp.csr_array(np.ones(X.shape))
        full.data = dense(X).ravel()
        np.save(tmp_path / "a.npy", dense(X))
        assert Normalizer().fit(nw.data.open(tmp_path / "a.npy")).resolved_ == kind, name
        for held in (full, sp.csr_array(X)):
            assert Normalizer().fit(held).resolved_ == (kind if name != "dark bytes" else "log1p"), name


def test_auto_chooses_by_loss_and_values():
    unit = np.random.default_rng(0).random((20, 4))
    for X, loss, kind in (
        (counts(), "mse", "log1p"),
        (counts(), "huber", "log1p"),
        (counts(), "multinomial", "none"),
        (counts(), "bce", "minmax"),
        (reals(), "mse", "standard"),
        (unit, "bce", "none"),
        (unit, "mse", "standard"),
        (-counts(), "mse", "standard"),
    ):
        assert Normalizer("auto", loss=loss).fit(ArraySource(X)).resolved_ == kind, (loss, kind)


@pytest.mark.parametrize("layout", [np.asarray, sp.csr_array])
def test_bad_values_are_named(layout):
    X = counts(5000, 3000)  # many blocks
    X[4321, 17] = -2
    X[4900, 1] = -1
    names = [f"gene{i}" for i in range(3000)]
    source = ArraySource(layout(X), var_names=names)
    with pytest.raises(DataError, match=r"-2 in row 4321, column 17 \(gene17\); log1p needs counts"):
        Normalizer("log1p").fit(source)
    with pytest.raises(DataError, match="4321"):
        Normalizer("none", loss="multinomial").fit(source)
    X[4000, 5] = np.nan
    for kind in ("auto", "standard", "none"):
        with pytest.raises(DataError, match="NaN in row 4000"):
            Normalizer(kind).fit(ArraySource(layout(X)))


def test_negative_value_met_while_reading_is_named_by_its_row_in_the_data():
    X = counts()
    fitted = Normalizer("log1p").fit(ArraySource(X))
    X[150, 2] = -1
    for layout in (np.asarray, sp.csr_array):
        source = NormalizedSource(ArraySource(layout(X)), fitted)
        source.read_rows(slice(0, 150))
        with pytest.raises(DataError, match="row 150, column 2"):
            source.read_rows(np.array([7, 150, 3]))


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from(["log1p", "standard", "minmax", "none"]),
    sparse=st.booleans(),
    dtype=st.sampled_from([np.float32, np.float64]),
    cuts=st.lists(st.integers(0, 120), max_size=5),
)
def test_any_split_gives_the_same_bits_and_the_input_is_untouched(kind, sparse, dtype, cuts):
    X = (counts(120, 19) * 1.37).astype(dtype)
    held = sp.csr_array(X) if sparse else X.copy()
    fitted = Normalizer(kind).fit(ArraySource(held))
    source = NormalizedSource(ArraySource(held), fitted)
    whole = dense(source.read_rows(slice(0, 120)))
    borders = [0, *sorted(cuts), 120]
    parts = [dense(source.read_rows(slice(a, b))) for a, b in pairwise(borders) if b > a]
    assert np.array_equal(np.concatenate(parts), whole)
    order = np.random.default_rng(0).permutation(120)
    assert np.array_equal(dense(source.read_rows(order)), whole[order])
    assert whole.dtype == dtype
    assert np.array_equal(dense(held), X)


@pytest.mark.parametrize("kind", ["log1p", "standard", "minmax", "none"])
def test_state_survives_json_bit_for_bit(kind):
    X = counts() * np.float32(1.1)
    fitted = Normalizer(kind).fit(ArraySource(X))
    again = Normalizer.from_dict(json.loads(json.dumps(fitted.to_dict(), allow_nan=False)))
    assert np.array_equal(again.transform(X), fitted.transform(X))
    assert again.describe() == fitted.describe()
    with pytest.raises(ValueError, match="29 features"):
        again.transform(X[:, :29])


@pytest.mark.parametrize(
    "change",
    [{"kind": "other"}, {"resolved": "auto"}, {"scale": [1.0]}, {"shift": "x"}, {"n_features": None}],
)
def test_damaged_state_is_an_error(change):
    state = Normalizer("standard").fit(ArraySource(reals())).to_dict()
    with pytest.raises(DataError, match="fit the model again"):
        Normalizer.from_dict(state | change)
    del state["scale"]
    with pytest.raises(DataError, match="fit the model again"):
        Normalizer.from_dict(state)


def test_unfitted_and_unknown():
    with pytest.raises(NotFittedError, match="not fitted"):
        Normalizer("standard").transform(reals())
    with pytest.raises(ValueError, match="kind='zscore' must be one of"):
        Normalizer("zscore").fit(reals())
    with pytest.raises(ValueError, match="target_sum"):
        Normalizer("log1p", target_sum=0).fit(reals())


@pytest.mark.parametrize("kind", ["standard", "minmax"])
def test_in_a_pipeline_that_rebuilds_on_the_scale_of_the_data(kind):
    X = 50 + 20 * reals()
    model = make_pipeline(nw.Normalizer(kind), nw.LinearAutoencoder(3, max_iter=60, random_state=0))
    codes = clone(model).fit_transform(X)
    assert codes.shape == (len(X), 3)
    rebuilt = model.fit(X).inverse_transform(codes)
    scaled = model[0].transform(X)
    np.testing.assert_allclose(rebuilt, model[0].inverse_transform(model[1].reconstruct(scaled)), rtol=1e-5)
    assert np.mean((rebuilt - X) ** 2) < X.var(axis=0).mean()
    frame = pandas.DataFrame(X)
    assert np.array_equal(nw.Normalizer(kind).fit_transform(frame), scaled)
    assert model[0].get_params() == {"kind": kind, "loss": "mse", "target_sum": None}


def test_fit_again_learns_again():
    counts = np.random.default_rng(0).poisson(3.0, (30, 8))
    fitted = Normalizer("log1p").fit(counts)
    assert fitted.fit(10 * counts).target_sum_ == np.median(10 * counts.sum(axis=1))


def test_all_zero_data_and_duplicate_entries():
    zero = sp.csr_array((40, 5), dtype=np.float32)
    fitted = Normalizer("auto").fit(ArraySource(zero))
    assert fitted.n_empty_rows_ == 40
    assert fitted.transform(zero).nnz == 0
    # 1 + 1 stored twice in one place is 2, not two ones
    twice = sp.csr_array((np.ones(3, np.float32), [0, 0, 1], [0, 2, 3]), shape=(2, 2))
    single = sp.csr_array(np.array([[2, 0], [0, 1]], np.float32))
    for kind in ("log1p", "standard", "minmax"):
        a, b = Normalizer(kind).fit(ArraySource(twice)), Normalizer(kind).fit(ArraySource(single))
        assert np.array_equal(dense(a.transform(twice)), dense(b.transform(single)))
    assert twice.nnz == 3  # the caller's object is as it was


@given(n=st.integers(1, 10**6), d=st.integers(1, 10**5))
@settings(max_examples=30, deadline=None)
def test_row_blocks_cover_every_row_once(n, d):
    blocks = list(row_blocks(n, d, 1 << 26))
    assert blocks[0].start == 0
    assert blocks[-1].stop == n
    assert all(a.stop == b.start and a.stop > a.start for a, b in pairwise(blocks))


# --- scikit-learn -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["standard", "minmax", "none"])
def test_it_is_an_estimator(kind):
    assert_contract(Normalizer(kind))


def test_columns_of_a_frame_keep_their_order():
    frame = pandas.DataFrame(reals(), columns=list("abcdefg"))
    fitted = Normalizer("standard").fit(frame)
    assert np.array_equal(fitted.transform(frame), Normalizer("standard").fit_transform(frame.to_numpy()))
    with pytest.raises(ValueError, match="feature names should match"):
        fitted.transform(frame[frame.columns[::-1]])
    back = fitted.inverse_transform(pandas.DataFrame(fitted.transform(frame)))
    np.testing.assert_allclose(back, frame, rtol=1e-4, atol=1e-5)


def test_pipelines_know_its_features_and_make_frames():
    frame = pandas.DataFrame(reals(), columns=list("abcdefg"))
    pipe = make_pipeline(Normalizer("minmax"), nw.Autoencoder(2, loss="bce", max_iter=1, random_state=0))
    plain = pipe.fit(frame).transform(frame)
    assert pipe.n_features_in_ == 7
    assert list(pipe[:-1].get_feature_names_out()) == list(frame.columns)
    codes = clone(pipe).set_output(transform="pandas").fit_transform(frame)
    assert list(codes.columns) == ["autoencoder0", "autoencoder1"]
    assert np.array_equal(codes, plain)


def test_frames_asked_of_all_transformers_are_not_what_a_source_reads():
    source = ArraySource(reals())
    with config_context(transform_output="pandas"):
        table = NormalizedSource(source, Normalizer("standard").fit(source))
        assert isinstance(table.read_rows(slice(0, 5)), np.ndarray)


@pytest.mark.parametrize(
    ("X", "message"),
    [
        (np.ma.masked_less(np.ones((4, 7)), 2), "masked"),
        (np.full((4, 7), np.nan), "NaN in row 0, column 0"),
        (np.ones(7), "Expected 2D array"),
    ],
    ids=["masked", "nan", "1-d"],
)
def test_rows_to_transform_are_checked(X, message):
    with pytest.raises(ValueError, match=message):
        Normalizer("standard").fit(reals()).transform(X)
