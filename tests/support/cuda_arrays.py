"""Checks of arrays on a GPU: `test_arrays` runs them with a fake of CuPy, `test_gpu` with CuPy.

Each check takes CuPy, or the fake, and its CSR class.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
from sklearn.base import clone

from estimator_cases import ESTIMATORS as ALL
from estimator_cases import fitting, low_rank
from narrows import Autoencoder, ConvAutoencoder, CountAutoencoder, VariationalAutoencoder, functional, layers
from narrows.backends.reference import ACTIVATE
from narrows.errors import DataError
from narrows.plan.spec import ACTIVATIONS, Activation
from narrows.training import Checkpoint

ESTIMATORS = [clone(e).set_params(max_iter=2, backend="cuda", n_threads=None, batch_size=64) for e in ALL]
ids = [f"{type(e).__name__}-{i}" for i, e in enumerate(ESTIMATORS)]
ROW_METHODS = ("transform", "reconstruct", "score_samples", "feature_errors")
elementwise = [name for name, a in ACTIVATIONS.items() if a is not Activation.SOFTMAX]


def small(**params: Any) -> Autoencoder:
    given = {"hidden_layer_sizes": 8, "batch_size": 64, "max_iter": 2, "backend": "cuda", "random_state": 0}
    return Autoencoder(3, **given | params)


def same(there: Any, here: Any) -> None:
    """Both are the same, bit for bit; the first is on a GPU."""
    np.testing.assert_array_equal(there.get(), here)


# --- estimators -------------------------------------------------------------------------------------------------------


def check_estimator(cupy: Any, csr: Any, estimator: Any, kind: str) -> None:
    """An estimator gives the same bits for arrays on the GPU as on the CPU, and returns arrays on the GPU."""
    X = fitting(estimator, low_rank()[:100]).astype(np.float32)
    if kind == "csr":
        X[np.median(X) > X] = 0
        X = sp.csr_matrix(X)
    there = csr(X) if kind == "csr" else cupy.asarray(X)
    here = clone(estimator).fit(X)
    found = clone(estimator).fit(there)
    for one, other in zip(here.coefs_ + here.intercepts_, found.coefs_ + found.intercepts_, strict=True):
        np.testing.assert_array_equal(one, other)
    assert here.history_["loss"] == found.history_["loss"]
    for name in ROW_METHODS:
        expected, result = getattr(here, name)(X), getattr(found, name)(there)
        assert isinstance(expected, np.ndarray)
        assert isinstance(result, cupy.ndarray), name
        assert result.dtype == expected.dtype
        np.testing.assert_allclose(result.get(), expected, rtol=1e-6, atol=1e-6, err_msg=name)
    np.testing.assert_allclose(found.score(there), here.score(X), rtol=1e-6)
    codes = found.transform(there)
    same(found.inverse_transform(codes), here.inverse_transform(here.transform(X)))


def check_all_that_fit_takes(cupy: Any, csr: Any) -> None:
    X = low_rank()[:100]
    y, weight = X[:, ::-1].copy(), np.linspace(0.5, 2, len(X))
    up = cupy.asarray
    for held in ({"early_stopping": True}, {}):
        estimator = small(**held)
        given = {} if held else {"X_val": (X[:40], y[:40])}
        here = clone(estimator).fit(X, y, sample_weight=weight, **given)
        for weights in (up(weight), weight):
            given = {} if held else {"X_val": (up(X[:40]), up(y[:40]))}
            there = clone(estimator).fit(up(X), up(y), sample_weight=weights, **given)
            assert there.history_["loss"] == here.history_["loss"]
            np.testing.assert_allclose(there.history_["val_loss"], here.history_["val_loss"], rtol=1e-6)
    same(there.score_samples(up(X), up(y)), here.score_samples(X, y))
    same(there.score_samples(up(X), up(y[:, 0])), here.score_samples(X))
    np.testing.assert_allclose(there.feature_errors(up(X), up(y)).get(), here.feature_errors(X, y), rtol=1e-6)


def check_training_curves(cupy: Any, csr: Any) -> None:
    """Training and validation losses of five epochs are within 0.1 % of the float64 reference."""
    X = low_rank()[:100]
    counts = np.random.default_rng(0).poisson(np.exp(np.abs(X))).astype(np.float32)
    for estimator, data in (
        (small(max_iter=5, early_stopping=True), X),
        (small(max_iter=5, loss="bce", corruption="masking", corruption_level=0.2), 1 / (1 + np.exp(-X))),
        (VariationalAutoencoder(3, hidden_layer_sizes=8, batch_size=64, max_iter=5, random_state=0), X),
        (CountAutoencoder(3, hidden_layer_sizes=8, batch_size=64, max_iter=5, random_state=0), counts),
    ):
        found, exact = (clone(estimator).set_params(backend=name).fit(data) for name in ("cuda", "reference"))
        assert found.history_.keys() == exact.history_.keys()
        for name in {"loss", "val_loss"} & exact.history_.keys():
            assert len(found.history_[name]) == 5
            np.testing.assert_allclose(found.history_[name], exact.history_[name], rtol=1e-3, err_msg=str(estimator))


def check_partial_fit(cupy: Any, csr: Any) -> None:
    X, up = low_rank().astype(np.float64), cupy.asarray
    labels = np.arange(len(X)) % 3
    here, there = (small(precision="float64") for _ in range(2))
    for begin in (0, 100):
        part = slice(begin, begin + 100)
        here.partial_fit(X[part], batch=labels[part])
        there.partial_fit(up(X)[part], batch=up(labels)[part])
    assert there.transform(up(X)).dtype == np.float64
    same(there.transform(up(X)), here.transform(X))
    same(there.reconstruct(up(X), batch=up(labels)), here.reconstruct(X, batch=labels))
    same(there.inverse_transform(there.transform(up(X)), batch=1), here.inverse_transform(here.transform(X), batch=1))


def check_layouts(cupy: Any, csr: Any) -> None:
    """Arrays of all types and orders; sparse rows with repeated and unsorted columns."""
    X, up = low_rank(), cupy.asarray
    estimator = small().fit(X)
    expected = estimator.transform(X)
    wide = up(np.ascontiguousarray(np.repeat(X, 2, axis=1)))
    for there in (
        up(np.asfortranarray(X)),
        wide[:, ::2],
        up(X[::-1].copy())[::-1],
        up(np.hstack([X, X]))[:, : X.shape[1]],
    ):
        same(estimator.transform(there), expected)
    counts = np.round(9 * X)
    for dtype in (np.int8, np.uint16, np.int64, np.float16, np.float64):
        same(estimator.transform(up(counts.astype(dtype))), estimator.transform(counts.astype(dtype)))
    twice = sp.csr_matrix((np.float32([1, 2, 4]), [5, 1, 5], [0, 3]), shape=(1, X.shape[1]))
    parts = up(twice.data), up(twice.indices), up(twice.indptr)
    there = csr(parts, shape=twice.shape)
    np.testing.assert_allclose(estimator.transform(there).get(), estimator.transform(twice), rtol=1e-6)
    same(there.data, np.float32([1, 2, 4]))


def check_images(cupy: Any, csr: Any) -> None:
    images = np.random.default_rng(0).random((20, 6, 6, 1)).astype(np.float32)
    estimator = ConvAutoencoder(
        2, image_shape=(6, 6, 1), filters=2, max_iter=1, backend="cuda", random_state=0, batch_size=8
    )
    here, there = clone(estimator).fit(images), clone(estimator).fit(cupy.asarray(images))
    assert there.reconstruct(cupy.asarray(images)).shape == images.shape
    same(there.reconstruct(cupy.asarray(images)), here.reconstruct(images))


def check_integrals(cupy: Any, csr: Any) -> None:
    """Scores of a variational network, with noise keyed by the content of rows."""
    X, up = low_rank()[:100], cupy.asarray
    for there in (up(X), csr(sp.csr_matrix(X))):
        estimator = VariationalAutoencoder(2, hidden_layer_sizes=8, max_iter=2, backend="cuda", random_state=0)
        estimator.fit(X if there is not None else there)
        for name in ("elbo", "log_likelihood"):
            found = getattr(estimator, name)(there, 3)
            assert isinstance(found, cupy.ndarray)
            np.testing.assert_allclose(found.get(), getattr(estimator, name)(X, 3), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(estimator.latent_sensitivity(up(X)), estimator.latent_sensitivity(X), rtol=1e-5)


def check_frames(cupy: Any, csr: Any) -> None:
    pd = pytest.importorskip("pandas")
    X = low_rank()
    estimator = small().fit(cupy.asarray(X)).set_output(transform="pandas")
    codes = estimator.transform(cupy.asarray(X))
    assert isinstance(codes, pd.DataFrame)
    pd.testing.assert_frame_equal(codes, estimator.transform(X))


def check_checkpoints(cupy: Any, csr: Any, path: Any) -> None:
    """A checkpoint recognises data by their content, on any device."""
    X = low_rank()[:100]
    whole = small(max_iter=4).fit(cupy.asarray(X))
    small(max_iter=2).fit(cupy.asarray(X), checkpoint=Checkpoint(path))
    with pytest.raises(Exception, match="belongs to another run"):
        small(max_iter=2).fit(cupy.asarray(X + 1), checkpoint=Checkpoint(path))
    again = small(max_iter=2).fit(X, checkpoint=Checkpoint(path, resume="require"))
    assert again.history_["loss"] == whole.history_["loss"][:2]


class Tensor:
    """An array of a library that knows DLPack but not CuPy."""

    def __init__(self, array: Any) -> None:
        self.array, self.dtype, self.shape = array, array.dtype, array.shape

    def __dlpack__(self, **options: Any) -> Any:
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self.array.__dlpack_device__()

    def __array_namespace__(self) -> Any:
        class namespace:
            from_dlpack = Tensor

        return namespace


def check_dlpack(cupy: Any, csr: Any) -> None:
    X, up = low_rank(), cupy.asarray
    tensor = Tensor(up(X))
    estimator = small().fit(tensor)
    found = estimator.transform(tensor)
    assert isinstance(found, cupy.ndarray)
    same(found, estimator.transform(X))
    W, b = np.float32(np.random.default_rng(0).normal(size=(12, 5))), np.ones(5, np.float32)
    A = functional.dense(tensor, Tensor(up(W)), Tensor(up(b)), "tanh")
    assert isinstance(A, Tensor)
    np.testing.assert_allclose(A.array.get(), np.tanh(X @ W + b), rtol=1e-5, atol=1e-6)
    grads = functional.dense_backward(A, tensor, Tensor(up(W)), A, "tanh")
    assert all(isinstance(g, Tensor) for g in grads)


def check_bad_input(cupy: Any, csr: Any) -> None:
    X, up = low_rank(), cupy.asarray
    there = up(X)
    estimator = small().fit(there)
    spoiled = X.copy()
    spoiled[7, 3] = np.nan
    sparse = sp.csr_matrix(spoiled)
    plain = small(backend="reference").fit(X)
    counts = CountAutoencoder(2, backend="cuda", max_iter=1)
    for error, message, call in (
        (DataError, r"X: NaN in row 7, column 3; remove or impute it", lambda: estimator.transform(up(spoiled))),
        (DataError, r"X: NaN in row 7, column 3; remove or impute it", lambda: estimator.transform(csr(sparse))),
        (DataError, r"Z: NaN in row 7, column 1", lambda: estimator.inverse_transform(up(spoiled[:, 2:5]))),
        (DataError, r"y: NaN in row 7, column 3", lambda: estimator.score(there, up(spoiled))),
        (DataError, r"X: 0\.\d+ in row 0, column 0 is not a count", lambda: counts.fit(there)),
        (ValueError, r"X: expected 2D array, got 1D", lambda: estimator.transform(there[0])),
        (ValueError, r"X: numbers expected, got dtype complex", lambda: small().fit(up(X.astype(np.complex64)))),
        (ValueError, r"0 sample\(s\) .* a minimum of 1", lambda: estimator.transform(there[:0])),
        (ValueError, r"X has 11 features, but Autoencoder is expecting 12", lambda: estimator.transform(there[:, 1:])),
        (ValueError, r"Z has 12 columns, but Autoencoder has 3", lambda: estimator.inverse_transform(there)),
        (ValueError, r"sample_weight has shape \(3,\)", lambda: small().fit(there, sample_weight=up(np.ones(3)))),
        (
            ValueError,
            r"sample_weight: -1 at row 0 is negative",
            lambda: small().fit(there, sample_weight=up(-np.ones(200))),
        ),
        (TypeError, r"X is on a GPU and y is not: pass cupy\.asarray\(y\)", lambda: small().fit(there, X)),
        (TypeError, r"y is on a GPU and X is not: pass cupy\.asarray\(X\)", lambda: small().fit(X, there)),
        (TypeError, r"X is on a GPU and y is not", lambda: estimator.score(there, X)),
        (TypeError, r"X is on a GPU and X_val is not", lambda: small().fit(there, X_val=X)),
        (
            TypeError,
            r"X is on a GPU and Autoencoder runs on backend='reference': pass cupy\.asnumpy\(X\), or fit with backend=",
            lambda: plain.transform(there),
        ),
        (TypeError, r"Z is on a GPU and Autoencoder runs on", lambda: plain.inverse_transform(there)),
        (TypeError, r"X is on a GPU .* backend='reference'", lambda: small(backend="reference").fit(there)),
    ):
        with pytest.raises(error, match=message):
            call()


# --- layers -----------------------------------------------------------------------------------------------------------


def operands(dtype: Any, n: int = 37, k: int = 33, m: int = 21) -> tuple[Any, ...]:
    rng = np.random.default_rng(n)
    return tuple((rng.normal(size=size) / 4).astype(dtype) for size in ((n, k), (k, m), (m,), (n, m)))


def placed(cupy: Any, a: Any) -> dict[str, Any]:
    """The same matrix in each layout on the device."""
    padded = np.zeros((2 * a.shape[0], 3 * a.shape[1] + 1), a.dtype)
    padded[::2, 1::3] = a
    doubled = np.hstack([a, a])
    return {
        "C": cupy.asarray(a),
        "F": cupy.asarray(np.ascontiguousarray(a.T)).T,
        "strided": cupy.asarray(padded)[::2][:, 1::3],
        "reversed": cupy.asarray(np.ascontiguousarray(a[::-1]))[::-1],
        "part": cupy.asarray(doubled)[:, : a.shape[1]],
        "turned part": cupy.asarray(np.ascontiguousarray(doubled.T))[: a.shape[1]].T,
    }


def check_dense(cupy: Any, csr: Any, activation: str, dtype: Any) -> None:
    """A layer and its gradients agree with NumPy in float64."""
    relative = 2e-5 if dtype is np.float32 else 1e-12
    X, W, b, dA = operands(dtype)
    up = cupy.asarray
    Z = cupy.empty((37, 21), dtype)
    A = functional.dense(up(X), up(W), up(b), activation, Z=Z)
    pre = X.astype(float) @ W + b
    np.testing.assert_allclose(Z.get(), pre, rtol=relative, atol=relative)
    np.testing.assert_allclose(A.get(), ACTIVATE[ACTIVATIONS[activation]](pre), rtol=relative, atol=relative)
    assert A.dtype == dtype
    expected = functional.dense_backward(dA, X, W, A.get(), activation, Z=Z.get())
    found = functional.dense_backward(up(dA), up(X), up(W), A, activation, Z=Z)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one.get(), other, rtol=20 * relative, atol=20 * relative)
    for need in (("X",), ("W", "b"), ()):
        some = functional.dense_backward(up(dA), up(X), up(W), A, activation, Z=Z, need=need)
        for name, one, other in zip("XWb", some, found, strict=True):
            assert (one is None) == (name not in need)
            if one is not None:
                same(one, other.get())


def check_layer_layouts(cupy: Any, csr: Any) -> None:
    X, W, b, dA = operands(np.float32)
    up = cupy.asarray
    A = functional.dense(up(X), up(W), up(b), "tanh")
    grads = functional.dense_backward(up(dA), up(X), up(W), A, "tanh")
    for name, x in placed(cupy, X).items():
        for other, w in placed(cupy, W).items():
            found = functional.dense(x, w, up(np.repeat(b, 2))[::2], "tanh")
            np.testing.assert_allclose(found.get(), A.get(), rtol=1e-6, atol=1e-7, err_msg=f"{name} {other}")
            for one, expected in zip(functional.dense_backward(up(dA), x, w, A, "tanh"), grads, strict=True):
                np.testing.assert_allclose(one.get(), expected.get(), rtol=1e-5, atol=1e-6, err_msg=f"{name} {other}")
    for size in ((1, 1, 1), (1, 33, 5), (33, 1, 5), (300, 7, 1), (0, 4, 3)):
        X, W, b, dA = operands(np.float32, *size)
        found = functional.dense(up(X), up(W), up(b), "relu")
        np.testing.assert_allclose(found.get(), np.maximum(X @ W + b, 0), rtol=1e-5, atol=1e-6)
        if size[0]:
            db = functional.dense_backward(up(dA), up(X), up(W), found, "relu").db
            np.testing.assert_allclose(db.get(), (dA * (found.get() > 0)).sum(axis=0), rtol=1e-4, atol=1e-5)
    # Tiles of every size; float64 has its own
    for size in ((70, 300, 20), (130, 90, 200), (9, 260, 300)):
        for dtype, relative in ((np.float32, 1e-4), (np.float64, 1e-12)):
            big, W64, _, d64 = operands(dtype, *size)
            np.testing.assert_allclose(
                functional.dense(up(big), up(W64)).get(), big @ W64, rtol=relative, atol=relative
            )
            grads = functional.dense_backward(up(d64), up(big), up(W64), up(d64))
            for one, other in zip(grads, (d64 @ W64.T, big.T @ d64, d64.sum(axis=0)), strict=True):
                np.testing.assert_allclose(one.get(), other, rtol=relative, atol=relative)
    # Mixed types, and integers
    assert functional.dense(up(X.astype(np.int32)), up(W)).dtype == np.float32
    assert functional.dense(up(X), up(W.astype(np.float64))).dtype == np.float64


def check_sparse_layers(cupy: Any, csr: Any) -> None:
    X, W, b, dA = operands(np.float32)
    X[np.abs(X) < 0.2] = 0
    X[5] = 0
    up = cupy.asarray
    for w in placed(cupy, W).values():
        A = functional.dense(csr(sp.csr_matrix(X)), w, up(b), "sigmoid")
        np.testing.assert_allclose(A.get(), 1 / (1 + np.exp(-(X @ W + b))), rtol=1e-5, atol=1e-6)
    astray = csr((up(np.float32([1, 2])), up(np.int32([3, 40])), up(np.int32([0, 2]))), shape=(1, 33))
    with pytest.raises(ValueError, match=r"column|index"):
        functional.dense(astray, up(W))
    expected = functional.dense_backward(dA, X, W, A.get(), "sigmoid")
    found = functional.dense_backward(up(dA), csr(sp.csr_matrix(X)), up(W), A, "sigmoid")
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one.get(), other, rtol=1e-4, atol=1e-5)


def check_layer_results(cupy: Any, csr: Any) -> None:
    """`out` is written and returned, and nothing else changes; unfit arrays are refused."""
    X, W, b, dA = (cupy.asarray(a) for a in operands(np.float32))
    whole = cupy.asarray(np.full((40, 60), 7, np.float32))
    out = whole[1:38][:, 3:24]
    assert functional.dense(X, W, b, out=out) is out
    same(out, functional.dense(X, W, b).get())
    assert (whole.get() != 7).sum() == 37 * 21
    square = cupy.asarray(np.ones((4, 4), np.float32))
    apart = cupy.asarray(np.ones((6, 10), np.float32))
    functional.dense(apart[:, :3], cupy.asarray(np.ones((3, 4), np.float32)), out=apart[:, 4:8])
    assert (apart.get()[:, 4:8] == 3).all()
    eye = cupy.asarray(np.eye(4, dtype=np.float32))
    for error, message, call in (
        (ValueError, "out must not share memory with X", lambda: functional.dense(square, eye, out=square)),
        (ValueError, "out must not share memory with W", lambda: functional.dense(square, eye, out=eye[:4])),
        (
            ValueError,
            "dW must not share memory with dA",
            lambda: functional.dense_backward(square, eye, eye, eye, out=(None, square, None)),
        ),
        (
            ValueError,
            r"out must be a writable float32 array of shape \(4, 4\)",
            lambda: functional.dense(square, eye, out=cupy.empty((4, 4), np.float64)),
        ),
        (ValueError, r"contiguous rows", lambda: functional.dense(square, eye, out=cupy.empty((4, 4), np.float32).T)),
        (ValueError, "X has 4 columns but W has 33 rows", lambda: functional.dense(square, W)),
        (ValueError, "b has 21 elements but W has 4 columns", lambda: functional.dense(square, eye, b)),
        (TypeError, r"X is on a GPU and W is not: pass cupy\.asarray\(W\)", lambda: functional.dense(X, W.get())),
        (TypeError, r"W is on a GPU and X is not: pass cupy\.asarray\(X\)", lambda: functional.dense(X.get(), W)),
        (TypeError, r"X is on a GPU and b is not", lambda: functional.dense(X, W, b.get())),
        (TypeError, "not in the memory of this CPU", lambda: functional.dense(X.get(), W.get(), b)),
        (TypeError, r"X is on a GPU and dA is not", lambda: functional.dense_backward(dA.get(), X, W, dA)),
        (
            TypeError,
            r"X is on a GPU and biases\[0\] is not",
            lambda: functional.contractive_penalty(X, [W], [b.get()], "tanh"),
        ),
    ):
        with pytest.raises(error, match=message):
            call()


def check_penalty(cupy: Any, csr: Any, dtype: Any) -> None:
    X, W, b, _ = operands(dtype, 700)
    V, c = np.random.default_rng(1).normal(size=(21, 4)).astype(dtype), np.zeros(4, dtype)
    up, relative = cupy.asarray, 1e-4 if dtype is np.float32 else 1e-10
    for weights, biases in (([W], [b]), ([W, V], [b, c]), ([W, V], [None, c])):
        for options in ({}, {"method": "hutchinson", "n_probes": 2, "random_state": 3}):
            expected = functional.contractive_penalty(X, weights, biases, "tanh", **options)
            given = [None if one is None else up(one) for one in biases]
            found = functional.contractive_penalty(up(X), [up(w) for w in weights], given, "tanh", **options)
            np.testing.assert_allclose(found.value, expected.value, rtol=relative)
            for one, other in zip(found.dW + found.db, expected.dW + expected.db, strict=True):
                assert isinstance(one, cupy.ndarray)
                assert one.shape == other.shape
                np.testing.assert_allclose(one.get(), other, rtol=relative, atol=relative * np.abs(other).max())
    assert functional.contractive_penalty(up(X), [up(W)], [None], "tanh", grads=False).dW is None
    # A weight of one row, with any stride between rows
    expected = functional.contractive_penalty(X[:, :1], [W[:1]], [b], "tanh")
    for name, one in placed(cupy, W[:1]).items():
        found = functional.contractive_penalty(up(X[:, :1]), [one], [up(b)], "tanh")
        np.testing.assert_allclose(found.value, expected.value, rtol=relative, err_msg=name)


def check_layer_objects(cupy: Any, csr: Any) -> None:
    X = low_rank()

    def network(device: str) -> Any:
        first = layers.Dense(12, 7, "gelu", random_state=0, device=device)
        return layers.Sequential([first, layers.Dense(7, 12, "sigmoid", random_state=1, device=device)])

    here, there = network("cpu"), network("cuda")
    one, other = here.forward(X), there.forward(cupy.asarray(X))
    np.testing.assert_allclose(other.get(), one, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(there.backward(other).get(), here.backward(one), rtol=1e-4, atol=1e-5)
    for expected, found in zip(here.grads, there.grads, strict=True):
        for name in ("W", "b"):
            np.testing.assert_allclose(found[name].get(), expected[name], rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="device='gpu' must be 'cpu' or 'cuda'"):
        layers.Dense(3, 2, device="gpu")


CHECKS = [
    check_training_curves,
    check_all_that_fit_takes,
    check_partial_fit,
    check_layouts,
    check_images,
    check_integrals,
    check_frames,
    check_dlpack,
    check_bad_input,
    check_layer_layouts,
    check_sparse_layers,
    check_layer_results,
    check_layer_objects,
]
