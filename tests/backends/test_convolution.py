"""Convolutions: their geometry, their ops where nothing else shows them, and the estimator built on them."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
from numpy.typing import NDArray
from scipy.signal import correlate

import agreement
import narrows
from cases import CPU_PRECISIONS, convolutional
from estimator_cases import BACKEND, SMALL, same_rows
from narrows import ConvAutoencoder
from narrows.backends import Hyper, compile_plan
from narrows.data import ArraySource
from narrows.plan.geometry import Convolution
from narrows.plan.lowering import lower
from narrows.plan.plan import Mode
from narrows.plan.spec import Activation, LayerSpec, Precision, Solver
from networks import Case, conv, images
from oracle import SEED, STEP, forward, jacobian

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


# --- geometry -----------------------------------------------------------------------------------------------


def test_sizes() -> None:
    of = Convolution.of
    assert of((28, 28, 1), 16, (3, 3)).out_shape == (28, 28, 16)
    assert of((28, 28, 1), 16, (3, 3), strides=(2, 2), pool=(2, 7)).out_shape == (7, 2, 16)
    assert of((9, 7, 3), 4, (3, 2), strides=(2, 1), padding="valid").out_shape == (4, 6, 4)
    assert of((4, 5, 3), 4, (3, 3), upsample=(2, 3)).out_shape == (8, 15, 4)
    assert of((4, 6, 3), 4, (3, 2), strides=(2, 1), padding="valid", transposed=True).out_shape == (9, 7, 4)
    assert of((7, 7, 3), 4, (5, 5), strides=(2, 2), transposed=True).out_shape == (14, 14, 4)
    assert of((7, 7, 3), 4, (5, 5)).weight_shape == (75, 4)


def test_geometry_that_cannot_be() -> None:
    with pytest.raises(ValueError, match=r"kernel \(9, 3\) is larger than the image of 8 x 8 pixels"):
        Convolution.of((8, 8, 1), 2, (9, 3), padding="valid")
    with pytest.raises(ValueError, match="pools of 3 x 2 do not divide an image of"):
        Convolution.of((8, 8, 1), 2, (3, 3), pool=(3, 2))


@pytest.mark.parametrize(
    ("layer", "changes", "message"),
    [
        (1, {"n_in": 81}, "layer 1: images of 80 and 12 values in rows of 81"),
        (
            1,
            {"convolution": Convolution.of((4, 5, 4), 3, (3, 3), pool=(4, 5)), "n_out": 3},
            r"reads images \(4, 5, 4\)",
        ),
        (3, {"tied_to": 0}, "layer 3: a convolution has no tied weight"),
    ],
)
def test_layers_that_do_not_fit(layer: int, changes: dict[str, Any], message: str) -> None:
    spec = convolutional("pool")
    layers = [*spec.layers]
    layers[layer] = replace(layers[layer], **changes)
    with pytest.raises(ValueError, match=message):
        lower(replace(spec, layers=tuple(layers)), 4)


def test_what_convolutions_do_not_go_with() -> None:
    with pytest.raises(ValueError, match="the output layer takes no pooling"):
        lower(images((4, 4, 1), conv(2), conv(4, pool=2), latent=1), 4)
    with pytest.raises(ValueError, match="latent layer of a variational network is dense"):
        lower(replace(convolutional("gaussian"), latent=1), 4)
    for options in ({}, {"contractive_probes": 1, "contractive_hessian": 0.1}):
        with pytest.raises(ValueError, match=r"contractive=0.5.*not of convolutions.*method='hutchinson' takes both"):
            lower(images((4, 4, 1), conv(2), 16, latent=1, contractive=0.5, **options), 4)
    spec = images((2, 2, 1), conv(1), 4, latent=1)
    tied = LayerSpec(4, 4, Activation.LINEAR, tied_to=0)
    with pytest.raises(ValueError, match="dense layer cannot be tied to a convolution"):
        lower(replace(spec, layers=(spec.layers[0], tied)), 4)


# --- ops ----------------------------------------------------------------------------------------------------


def applied(backend: str, spec: Any, state: dict[str, Array], X: Array, mode: Mode, dtype: Any = np.float64) -> Array:
    program = compile_plan(lower(spec, 5), backend, precision=dtype, n_threads=1)
    program.load({name: value.astype(dtype) for name, value in state.items()})
    out: Array = program.apply(X.reshape(len(X), -1).astype(dtype), mode)
    return out


@pytest.mark.parametrize("width", [1, 2, 7, 15, 16, 17, 31, 33, 65])
@pytest.mark.parametrize("filters", [1, 5, 6, 7, 13])
def test_a_convolution_is_a_correlation(backend: str, width: int, filters: int) -> None:
    rng = np.random.default_rng(width)
    spec = images((3, width, 2), conv(filters, (3, 5)), 6 * width, latent=1)
    state = Case("correlation", spec).state()
    x = rng.normal(size=(3, 3, width, 2))
    found = applied(backend, spec, state, x, Mode.ENCODE).reshape(3, 3, width, filters)
    K = state["W0"].reshape(3, 5, 2, filters)
    for i, f in itertools.product(range(3), range(filters)):
        padded = np.pad(x[i], ((1, 1), (2, 2), (0, 0)))
        expected = correlate(padded, K[..., f], "valid")[:, :, 0] + state["b0"][0, f]
        np.testing.assert_allclose(found[i, :, :, f], expected, rtol=1e-10, atol=1e-10)


def test_the_first_of_the_greatest_takes_the_gradient(backend: str) -> None:
    """A pooling over equal values, seen in the gradient by the weight of a convolution of one pixel."""
    spec = images((2, 4, 2), conv(1, 1, pool=2), conv(2, 1, upsample=2), latent=1, solver=Solver.SGD)
    X = np.zeros((1, 2, 4, 2))
    X[0, :, :, 1] = [[1, 2, 3, 4], [5, 6, 7, 8]]
    program = compile_plan(lower(spec, 1), backend, precision="float64", n_threads=1)
    # The first channel alone is pooled, and is the same everywhere.
    program.load({"W0": np.array([[1.0], [0.0]]), "b0": np.ones(1), "W1": np.ones((1, 2)), "b1": np.zeros(2)})
    program.bind(X.reshape(1, -1))
    _, gradient = program.gradient(np.arange(1))
    # Windows begin at 1 and 3, where the error 2 (1 - x) is summed over both channels of their four pixels.
    d = [2 * (4 * 1 + 4 * 1 - sum(window)) for window in ((1, 2, 5, 6), (3, 4, 7, 8))]
    np.testing.assert_allclose(gradient["W0"][1, 0], 1 * d[0] + 3 * d[1])


def test_nan_comes_through_a_pooling(backend: str) -> None:
    spec = images((2, 6, 1), conv(1, 1, pool=2), conv(1, 1, upsample=2), latent=1)
    state = {"W0": np.ones((1, 1)), "b0": np.zeros(1), "W1": np.ones((1, 1)), "b1": np.zeros(1)}
    for y, x in itertools.product(range(2), range(6)):
        image = np.arange(12.0).reshape(1, 2, 6, 1)
        image[0, y, x] = np.nan
        found = applied(backend, spec, state, image, Mode.ENCODE)[0]
        np.testing.assert_array_equal(np.isnan(found), np.arange(3) == x // 2)


@pytest.mark.parametrize("name", ["contractive", "contractive-pool", "contractive-code", "contractive-back"])
def test_probes_estimate_the_squared_jacobian(backend: str, name: str) -> None:
    """The mean over many probes is the norm of Jacobians written out, within five standard errors."""
    spec = replace(convolutional(name), contractive_probes=4, contractive=1.0, corruption=None)
    case = Case("probes", spec, batch=12, rows=12)
    square = np.square(jacobian(case, forward(case, np.arange(12), training=True))).sum(axis=(1, 2))
    weight = case.data().weight
    exact = float(np.mean(square if weight is None else square * weight))
    program = compile_plan(case.plan, backend, precision="float64", n_threads=1)
    program.load(case.state())
    program.bind(*case.data())
    at = program.plan.terms.index("contractive")
    drawn = np.array([program.gradient(np.arange(12), SEED, step)[0][at] for step in range(200)])
    error = drawn.std(ddof=1) / np.sqrt(len(drawn))
    assert 0 < error < 0.1 * exact
    assert abs(drawn.mean() - exact) <= 5 * error


@pytest.mark.parametrize("dtype", CPU_PRECISIONS, ids=str)
@pytest.mark.parametrize("name", ["pool", "stride", "all", "contractive", "contractive-pool"])
def test_bits_for_any_simulated_team(cpp: str, name: str, dtype: Precision) -> None:
    case = Case("team", convolutional(name), batch=70, rows=150)
    expected = agreement.bits(case, dtype=dtype)
    for n in (2, 3, 5, 7, 16, 17, 64):
        assert agreement.bits(case, dtype=dtype, simulate_threads=n) == expected, f"{n} simulated threads"


@pytest.mark.parametrize("size", [40, 90])
def test_images_larger_than_a_block_of_them(backend: str, size: int) -> None:
    """The gradient of a weight is then summed over several blocks of a grain, down to one image at a time."""
    spec = images((size, size, 3), conv(4, 5, strides=2), conv(3, strides=2, transposed=True), latent=1)
    case = Case("large", spec, batch=19, rows=19)
    programs = [compile_plan(case.plan, name, precision="float64", n_threads=2) for name in (backend, "reference")]
    found = []
    for program in programs:
        program.load(case.state())
        program.bind(case.data().X)
        found.append(program.gradient(np.arange(19), SEED, STEP)[1])
    for name, g in found[1].items():
        np.testing.assert_allclose(found[0][name], g, rtol=1e-9, atol=1e-9 * np.abs(g).max())


def test_flops() -> None:
    plan = lower(images((8, 8, 2), conv(5, strides=2), conv(2, strides=2, transposed=True), latent=1), 3)
    # forward and weight gradients of both, the input gradient of the second; 16 pixels, 9 * 2 * 5 weights each
    assert plan.flops == 5 * 2 * 3 * 16 * 9 * 2 * 5


# --- the estimator ------------------------------------------------------------------------------------------


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
    # Without a shape a row is a signal of one channel.
    one = small(image_shape=None, **params).fit(X[:, :, 0])
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
        ({"padding": "valid", "pooling": 2}, "padding='valid' goes without pooling"),
        ({"n_components": None, "hidden_layer_sizes": 9}, "n_components=None is a convolutional code"),
        ({"strides": (2, 2, 2)}, r"strides=\(2, 2, 2\) has 3 items, filters are 2"),
        ({"kernel_size": ((3, 3, 3), 1)}, "kernel_size=.* must be a positive integer"),
        ({"pooling": 0}, "pooling=0 must be a positive integer"),
        ({"filters": ()}, r"filters=\(\) must have an item"),
        ({"image_shape": (8, 8, 2, 1)}, r"image_shape=\(8, 8, 2, 1\) must be"),
        ({"padding": "full"}, "padding='full' must be one of same, valid"),
        ({"n_components": 0}, "n_components=0 must be at least 1"),
        ({"contractive": 0.1, "contractive_method": "exact"}, "contractive_method='hutchinson' takes them"),
        ({"contractive": 0.1, "dropout": 0.2}, "drops nothing; set dropout=0$"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_bad_parameters(params: dict[str, Any], message: str, X: Array) -> None:
    if params.get("image_shape") == (16, 8):
        params = params | {"padding": "valid", "kernel_size": 9, "strides": 1}
    with pytest.raises(ValueError, match=message):
        small(**params).fit(X.reshape(200, -1))


def test_bad_images(X: Array) -> None:
    with pytest.raises(ValueError, match=r"images of shape \(8, 4, 4\), not image_shape=\(8, 8, 2\)"):
        small().fit(X.reshape(200, 8, 4, 4))
    with pytest.raises(ValueError, match=r"say image_shape=\(8, 8, 2\)"):
        small(image_shape=None).fit(X)
    with pytest.raises(ValueError, match="y has 64 columns: a target must be images as X, of 128 values"):
        small().fit(X, X.reshape(200, -1)[:, :64])
    with pytest.raises(ValueError, match="y has images of shape"):
        small().fit(X, X[:, :4])
    with pytest.raises(TypeError, match="kernel_size='3' must be"):
        small(kernel_size="3").fit(X)


def test_a_step_allocates_nothing(cpp: str) -> None:
    """Its memory is that of the plan and the threads: it stays where it is."""
    case = Case("memory", convolutional("pool"), batch=17, rows=17)
    program = compile_plan(case.plan, "cpp", n_threads=2)
    program.load(case.state(np.float32))
    program.bind(case.data(np.float32).X)
    at = program.arena().ctypes.data
    program.train(np.tile(np.arange(17), 50), Hyper(SEED, STEP, np.full(50, 1e-3)))
    assert program.arena().ctypes.data == at
