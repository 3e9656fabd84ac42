"""ConvAutoencoder: shapes, layouts, training, and errors."""

from __future__ import annotations

import itertools
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
import scipy.sparse as sp
from numpy.typing import NDArray

import narrows
from estimator_cases import BACKEND, SMALL, same_rows
from narrows import ConvAutoencoder
from narrows.data import ArraySource

Array = NDArray[Any]


@pytest.fixture(scope="module")
def X() -> Array:
    """200 images of 8 x 8 pixels and 2 channels: blobs at random places."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:8, :8]
    at, size = rng.uniform(1, 6, (2, 200, 1, 1, 2)), rng.uniform(1, 2, (200, 1, 1, 2))
    return np.exp(-((y[:, :, None] - at[0]) ** 2 + (x[:, :, None] - at[1]) ** 2) / size).astype(np.float32)


def small(n_components: int | None = 4, **params: Any) -> ConvAutoencoder:
    defaults = {"image_shape": (8, 8, 2), "filters": (6, 5), "batch_size": 32, "learning_rate_init": 1e-2}
    return ConvAutoencoder(n_components, **(SMALL | defaults | params))


def bits(estimator: ConvAutoencoder) -> bytes:
    return b"".join(np.ascontiguousarray(a).tobytes() for a in estimator.coefs_ + estimator.intercepts_)


def test_images_and_flat_rows_are_the_same(X: Array) -> None:
    ae, flat = small().fit(X, X_val=X[:20]), X.reshape(200, -1)
    twin = small().fit(flat, X_val=flat[:20])
    assert bits(ae) == bits(twin)
    Z = ae.transform(X)
    assert Z.shape == (200, 4)
    assert (ae.transform(flat) == Z).all()
    assert ae.reconstruct(X).shape == X.shape
    assert ae.reconstruct(flat).shape == flat.shape
    assert (ae.reconstruct(X).reshape(200, -1) == ae.reconstruct(flat)).all()
    assert ae.inverse_transform(Z).shape == flat.shape
    assert (ae.score_samples(X, X[::-1].copy()) == ae.score_samples(flat, flat[::-1].copy())).all()
    assert same_rows(ae.transform(ArraySource(flat)), Z)
    np.testing.assert_allclose(ae.transform(sp.csr_array(flat)), Z, rtol=1e-4, atol=1e-5)
    noisy = X + np.float32(0.1)
    assert bits(small().fit(noisy, X)) == bits(small().fit(noisy.reshape(200, -1), flat))


def test_layouts_of_images(X: Array) -> None:
    expected = bits(small().fit(X))
    for other in (np.asfortranarray(X), X[:, ::-1].copy()[:, ::-1], X.astype(">f4")):
        assert bits(small().fit(other)) == expected


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"pooling": 2, "strides": 1, "loss": "mse", "activation": "silu"},
        {"n_components": None, "filters": (6, 3)},
        {"hidden_layer_sizes": 20, "kernel_size": (3, (5, 1)), "strides": (2, (2, 1)), "dropout": 0.02},
        {"padding": "valid", "kernel_size": 2, "filters": 6},
        {"corruption": "masking", "corruption_level": 0.2, "weight_l1": 0.01, "solver": "adamw", "alpha": 1e-3},
        {"contractive": 1e-3, "n_probes": 2, "pooling": (2, 1), "strides": (1, 2), "activation": "elu"},
    ],
    ids=str,
)
def test_it_learns(params: dict[str, Any], X: Array, tmp_path: Path) -> None:
    ae = small(**{"n_components": 8, "max_iter": 60, "early_stopping": False, **params}).fit(X)
    variance = ((X - X.mean(axis=0)) ** 2).sum(axis=(1, 2, 3)).mean()
    assert -ae.score(X) < 0.7 * variance
    np.testing.assert_allclose(ae.inverse_transform(ae.transform(X)), ae.reconstruct(X).reshape(200, -1), atol=1e-5)
    ae.save(tmp_path / "m")
    twin = narrows.load(tmp_path / "m")
    assert isinstance(twin, ConvAutoencoder)
    assert bits(twin) == bits(ae)
    for name in ("transform", "reconstruct", "score_samples"):
        assert (getattr(twin, name)(X) == getattr(ae, name)(X)).all(), name
    assert twin.latent_shape_ == ae.latent_shape_


def test_shapes(X: Array) -> None:
    ae = small(hidden_layer_sizes=7).fit(X)
    shapes = [(3, 3, 2, 6), (3, 3, 6, 5), (20, 7), (7, 4), (4, 7), (7, 20), (3, 3, 5, 6), (3, 3, 6, 2)]
    assert [W.shape for W in ae.coefs_] == shapes
    assert [b.shape for b in ae.intercepts_] == [(s[-1],) for s in shapes]
    assert ae.latent_shape_ == (4,)
    ae = small(None, filters=(6, 3), latent_activation="sigmoid").fit(X)
    assert ae.latent_shape_ == (2, 2, 3)
    Z = ae.transform(X)
    assert Z.shape == (200, 12)
    assert 0 < Z.min() < Z.max() < 1
    assert len(ae.get_feature_names_out()) == 12


def test_a_convolutional_code_has_its_channels_last(X: Array) -> None:
    ae = small(None, filters=3, strides=2).fit(X)
    (K, _), (b, _) = ae.coefs_, ae.intercepts_
    padded = np.pad(X[:3], ((0, 0), (1, 1), (1, 1), (0, 0)))
    Z = ae.transform(X[:3]).reshape(3, 4, 4, 3)
    for y, x in itertools.product(range(4), range(4)):
        window = padded[:, 2 * y : 2 * y + 3, 2 * x : 2 * x + 3]
        np.testing.assert_allclose(Z[:, y, x], np.tensordot(window, K, 3) + b, rtol=1e-4, atol=1e-5)


def test_signals() -> None:
    t = np.linspace(0, 1, 24, dtype=np.float32)
    X = np.sin(np.random.default_rng(0).uniform(3, 9, (150, 1, 2)) * t[:, None])  # (150, 24, 2)
    params = {"strides": (2, 3), "kernel_size": (5, 3)}
    ae = small(image_shape=(24, 2), **params).fit(X)
    assert ae.reconstruct(X).shape == X.shape
    assert [W.shape for W in ae.coefs_][:2] == [(1, 5, 2, 6), (1, 3, 6, 5)]
    tall = {name: tuple((1, n) for n in value) for name, value in params.items()}
    as_images = small(image_shape=(1, 24, 2), **tall).fit(X[:, None])
    assert bits(as_images) == bits(ae)
    # -1 stands for any length.
    one = small(image_shape=(-1, 1), **params).fit(X[:, :, 0])
    assert bits(one) == bits(small(image_shape=(24, 1), **params).fit(X[:, :, :1]))
    with pytest.raises(ValueError, match="a signal has height 1"):
        small(image_shape=(24, 2), kernel_size=((3, 3), (1, 3))).fit(X)


def test_sensitivity_is_the_derivative(X: Array) -> None:
    ae = small(activation="tanh", precision="float64", pooling=(2, 1), strides=(1, 2), filters=(4, 3)).fit(X)
    D = X[:5].astype(np.float64)
    Z, h = ae.transform(D), 1e-6
    expected = np.empty((4, 128))
    for k in range(4):
        step = h * np.eye(4)[k]
        moved = [ae.inverse_transform(Z + sign * step) for sign in (1, -1)]
        expected[k] = np.abs((moved[0] - moved[1]) / (2 * h)).mean(axis=0)
    np.testing.assert_allclose(ae.latent_sensitivity(D), expected, rtol=1e-5, atol=1e-7)


def test_going_on(X: Array) -> None:
    params = {"early_stopping": False, "tol": 0.0}
    whole = small(**params, max_iter=6).fit(X)
    parts = small(**params, max_iter=3, warm_start=True).fit(X).fit(X)
    assert bits(parts) == bits(whole)
    with pytest.raises(ValueError, match="warm_start=False"):
        parts.set_params(strides=(4, 1)).fit(X)
    ae = small().partial_fit(X).partial_fit(X)
    assert ae.n_iter_ == 2


@pytest.mark.parametrize("threads", [2, 3])
def test_bits_do_not_depend_on_threads(threads: int, X: Array) -> None:
    if BACKEND != "cpp":
        pytest.skip("a promise of the C++ backend")
    for params in ({}, {"pooling": 2, "strides": 1, "n_components": None}, {"contractive": 0.1, "pooling": (1, 2)}):
        assert bits(small(**params).fit(X)) == bits(small(**params, n_threads=threads).fit(X))


@pytest.mark.parametrize("pooling", [1, 2])
def test_contracting(pooling: int, X: Array) -> None:
    """Codes move less with the input, against their size, and the history says what is left of it."""
    params = {"pooling": pooling, "strides": 1, "activation": "tanh", "max_iter": 40, "early_stopping": False}
    moved = []
    for strength in (0.0, 0.3):
        ae = small(**params, contractive=strength, precision="float64").fit(X)
        D, h = X[:20].astype(np.float64), 1e-6
        Z = ae.transform(D)
        square = 0.0
        for at in np.ndindex(X.shape[1:]):
            step = D.copy()
            step[:, *at] += h
            square += float(np.square((ae.transform(step) - Z) / h).sum()) / 20
        moved.append(square)
        assert ("contractive" in ae.history_) == (strength > 0)
    assert moved[1] < 0.5 * moved[0]
    assert ae.history_["contractive"][-1] == pytest.approx(0.3 * moved[1], rel=0.3)


def test_rows_do_not_depend_on_each_other(X: Array) -> None:
    ae = small(pooling=(2, 1), strides=(1, 2)).fit(X)
    whole = ae.reconstruct(X)
    for i in (0, 31, 32, 199):
        assert same_rows(ae.reconstruct(X[i : i + 1]), whole[i : i + 1])


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"image_shape": (8, 8, 1)}, r"image_shape=\(8, 8, 1\) has 64 values, X has 128 features"),
        ({"image_shape": (16, 8)}, r"convolution 2 of 2: kernel \(1, 9\) is larger than the image of 1 x 8 pixels"),
        ({"strides": 3}, "strides of 3 x 3 do not divide an image of 8 x 8 pixels"),
        ({"strides": 2, "pooling": (1, 3)}, "convolution 2 of 2: strides of 2 x 2 and pools of 3 x 3 do not divide"),
        ({"padding": "valid", "kernel_size": 9}, r"kernel \(9, 9\) is larger than the image of 8 x 8 pixels"),
        ({"padding": "valid", "kernel_size": 3, "filters": 2}, "strides of 2 x 2 with kernels of 3 x 3 do not divide"),
        ({"padding": "valid", "pooling": 2}, "padding='valid' needs pooling=1"),
        ({"n_components": None, "hidden_layer_sizes": 9}, "n_components=None gives a convolutional code"),
        ({"strides": (2, 2, 2)}, r"strides=\(2, 2, 2\) has 3 items, but filters has 2"),
        ({"kernel_size": ((3, 3, 3), 1)}, "kernel_size=.* must be a positive integer"),
        ({"pooling": 0}, "pooling=0 must be a positive integer"),
        ({"filters": ()}, r"filters=\(\) must have one item"),
        ({"image_shape": (8, 8, 2, 1)}, r"image_shape=\(8, 8, 2, 1\) must be"),
        ({"image_shape": (-1, -1, 2)}, r"image_shape=\(-1, -1, 2\) must be .* with at most one -1"),
        ({"image_shape": (-1, 7)}, r"image_shape=\(-1, 7\) does not divide the 128 features"),
        ({"padding": "full"}, "padding='full' must be one of same, valid"),
        ({"n_components": 0}, "n_components=0 must be at least 1"),
        ({"contractive": 0.1, "contractive_method": "exact"}, "contractive_method='hutchinson' takes convolutions"),
        ({"contractive": 0.1, "dropout": 0.2}, "without dropout; set dropout=0$"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_bad_parameters(params: dict[str, Any], message: str, X: Array) -> None:
    if params.get("image_shape") == (16, 8):
        params = params | {"padding": "valid", "kernel_size": 9, "strides": 1}
    with pytest.raises(ValueError, match=message):
        small(**params).fit(X.reshape(200, -1))


def test_the_shape_of_X_says_what_it_holds(X: Array, tmp_path: Path) -> None:
    """Without an `image_shape`: images with few channels, and square grey images; the model file knows the shape."""
    grey = X[..., 0]
    for given, shape in ((X, (8, 8, 2)), (grey, (8, 8, 1)), (X[..., :1], (8, 8, 1)), (grey.tolist(), (8, 8, 1))):
        ae = small(image_shape=None).fit(given)
        assert ae.image_shape_ == shape
        wanted = small(image_shape=shape).fit(np.reshape(given, (len(X), -1)))
        assert bits(ae) == bits(wanted)
        ae.save(tmp_path / "m.safetensors")
        twin = narrows.load(tmp_path / "m.safetensors")
        flat = np.reshape(np.asarray(given, np.float32), (len(X), -1))
        for model in (ae, twin, pickle.loads(pickle.dumps(ae))):
            assert model.reconstruct(np.asarray(given)).shape == np.shape(given)
            np.testing.assert_array_equal(model.transform(given), wanted.transform(flat))
            model.partial_fit(given)
    # What was learned does not outlive the next fit. Other shapes than the learned one are refused.
    ae = small(image_shape=None).fit(grey)
    assert ae.transform(grey[..., None]).tobytes() == ae.transform(grey).tobytes()
    with pytest.raises(ValueError, match=r"X has images of shape \(8, 8, 2\), not image_shape=\(8, 8, 1\)"):
        ae.transform(X)
    assert ae.fit(X).image_shape_ == (8, 8, 2)
    assert ae.fit(grey, X_val=grey[:9]).image_shape_ == (8, 8, 1)
    assert small(image_shape=(-1, 8, 2)).fit(X).image_shape_ == (8, 8, 2)
    with pytest.raises(ValueError, match="set image_shape"):
        ae.fit(grey.reshape(200, -1))
    assert ae.image_shape_ == (8, 8, 1)  # as before the failed fit


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((64,), r"rows of 64 values: set image_shape=\(8, 8, 1\) if .* images, or image_shape=\(64, 1\) if .* signals"),
        ((48,), r"set image_shape=\(4, 4, 3\) if they are images, or image_shape=\(48, 1\)"),
        ((20,), r"set image_shape=\(height, width, channels\) if they are images, or image_shape=\(20, 1\)"),
        (
            (8, 12),
            r"set image_shape=\(8, 12, 1\) if they are grey images, or image_shape=\(8, 12\) if they are signals",
        ),
        ((3, 24), r"pass np.moveaxis\(X, 1, -1\) with image_shape=\(24, 3\) if they are signals of 3 channels"),
        ((3, 8, 8), r"\(3, 8, 8\), with channels first: pass np.moveaxis\(X, 1, -1\), which puts them last"),
        ((1, 8, 8), "with channels first"),
        ((3, 4, 4), "with channels first"),
        ((16, 8, 8), r"set image_shape=\(16, 8, 8\) if channels are last, or .* with image_shape=\(8, 8, 16\)"),
        ((8, 8, 8, 2), r"rows of shape \(8, 8, 8, 2\): images have shape"),
        ((), r"Expected 2D array, got 1D array instead. Reshape your data: X.reshape\(-1, 1\)"),
    ],
    ids=str,
)
def test_other_shapes_are_asked_for(shape: tuple[int, ...], message: str) -> None:
    X = np.random.default_rng(0).random((30, *shape))
    given = [X, ArraySource(X), sp.csr_array(X), pandas.DataFrame(X)] if len(shape) == 1 else [X]
    for rows in given:
        with pytest.raises(ValueError, match=message) as raised:
            small(image_shape=None).fit(rows)
        assert "\n" not in str(raised.value)


def test_channels_first_with_a_known_shape(X: Array) -> None:
    with pytest.raises(ValueError, match=r"not image_shape=\(8, 8, 2\): channels are last here, pass np.moveaxis"):
        small().fit(np.moveaxis(X, -1, 1))


def test_bad_images(X: Array) -> None:
    with pytest.raises(ValueError, match=r"images of shape \(8, 4, 4\), not image_shape=\(8, 8, 2\)"):
        small().fit(X.reshape(200, 8, 4, 4))
    with pytest.raises(ValueError, match="y has 64 columns, but a target must be images like X, of 128 values"):
        small().fit(X, X.reshape(200, -1)[:, :64])
    with pytest.raises(ValueError, match="y has images of shape"):
        small().fit(X, X[:, :4])
    with pytest.raises(TypeError, match="kernel_size='3' must be"):
        small(kernel_size="3").fit(X)
