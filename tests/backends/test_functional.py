"""Single fused layers: against NumPy in float64, over layouts, dtypes, shapes at tile edges, and namespaces."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st

import narrows
from narrows import functional, layers
from narrows.backends.reference import ACTIVATE, DERIVATIVE
from narrows.plan.spec import Activation

ELEMENTWISE = [a for a in Activation if a is not Activation.SOFTMAX]
LIPSCHITZ = {Activation.EXP: None, Activation.GELU: 1.13, Activation.SILU: 1.1}
EDGES = [1, 5, 6, 7, 15, 16, 17, 31, 33, 63, 64, 65, 129]


def layouts(a: np.ndarray) -> dict[str, np.ndarray]:
    """The same matrix in every kind of memory."""
    padded = np.zeros((a.shape[0] * 2, a.shape[1] * 3 + 1), a.dtype)
    padded[::2, 1::3] = a
    readonly = a.copy()
    readonly.flags.writeable = False
    return {
        "C": np.ascontiguousarray(a),
        "F": np.asfortranarray(a),
        "strided": padded[::2, 1::3],
        "reversed": np.ascontiguousarray(a[::-1, ::-1])[::-1, ::-1],
        "read-only": readonly,
        "byte-swapped": a.astype(a.dtype.newbyteorder()),
        "unaligned": np.frombuffer(b"\0" + a.tobytes(), a.dtype, offset=1).reshape(a.shape),
    }


def bound(X: np.ndarray, W: np.ndarray, b: np.ndarray, lipschitz: float) -> np.ndarray:
    """|computed - exact| for float32, element by element: one rounding for each product, a few for the bias and the
    activation."""
    u = np.finfo(np.float32).eps / 2
    magnitude = np.abs(X) @ np.abs(W) + np.abs(b)
    return (X.shape[1] + 8) * u * magnitude * lipschitz + 8 * u


@pytest.mark.parametrize("activation", ELEMENTWISE, ids=lambda a: a.name.lower())
def test_dense_within_the_stated_bound(activation: Activation) -> None:
    rng = np.random.default_rng(activation)
    for n, k, m in [(1, 1, 1), (7, 33, 17), (65, 129, 63), (13, 600, 70)]:
        X, W, b = (rng.normal(size=s).astype(np.float32) for s in ((n, k), (k, m), (m,)))
        if activation is Activation.EXP:
            W /= 8 * np.sqrt(k)
        exact_z = X.astype(float) @ W + b
        exact = ACTIVATE[activation](exact_z)
        lipschitz = LIPSCHITZ.get(activation, 1.0) or float(np.exp(exact_z.max()))
        got = functional.dense(X, W, b, activation.name.lower())
        assert got.dtype == np.float32
        assert (np.abs(got - exact) <= bound(X, W, b, lipschitz)).all()


@settings(max_examples=60, deadline=None)
@given(
    n=st.sampled_from(EDGES),
    k=st.sampled_from(EDGES),
    m=st.sampled_from(EDGES),
    x_layout=st.sampled_from(["C", "F", "strided", "reversed", "read-only", "byte-swapped", "unaligned"]),
    w_layout=st.sampled_from(["C", "F", "strided", "reversed", "byte-swapped"]),
    dtype=st.sampled_from([np.float32, np.float64]),
    seed=st.integers(0, 2**32),
)
def test_small_integers_are_exact_in_every_layout(
    n: int, k: int, m: int, x_layout: str, w_layout: str, dtype: Any, seed: int
) -> None:
    """Integers below 2**24 have no rounding: any misplaced element shows."""
    rng = np.random.default_rng(seed)
    X, W = (rng.integers(-8, 9, s).astype(dtype) for s in ((n, k), (k, m)))
    b = rng.integers(-8, 9, m).astype(dtype)
    dA = rng.integers(-8, 9, (n, m)).astype(dtype)
    x, w = layouts(X)[x_layout], layouts(W)[w_layout]
    A = functional.dense(x, w, b, "relu")
    np.testing.assert_array_equal(A, np.maximum(X @ W + b, 0))
    grads = functional.dense_backward(dA, x, w, A, "relu")
    dZ = dA * (A > 0)
    np.testing.assert_array_equal(grads.dX, dZ @ W.T)
    np.testing.assert_array_equal(grads.dW, X.T @ dZ)
    np.testing.assert_array_equal(grads.db, dZ.sum(axis=0))


@pytest.mark.parametrize("activation", ELEMENTWISE, ids=lambda a: a.name.lower())
def test_backward_is_the_derivative(activation: Activation) -> None:
    rng = np.random.default_rng(3)
    X, W, b = rng.normal(size=(9, 20)) * 0.3, rng.normal(size=(20, 7)), rng.normal(size=7) * 0.3
    name = activation.name.lower()
    Z = np.empty((9, 7))
    A = functional.dense(X, W, b, name, Z=Z)
    dA = rng.normal(size=A.shape)
    grads = functional.dense_backward(dA, X, W, A, name, Z=Z)
    dZ = dA * DERIVATIVE[activation](Z if activation.needs_preactivation else ACTIVATE[activation](Z))
    np.testing.assert_allclose(grads.dX, dZ @ W.T, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(grads.dW, X.T @ dZ, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(grads.db, dZ.sum(axis=0), rtol=1e-9, atol=1e-12)


def test_csr_is_taken_as_it_is() -> None:
    X = sp.random_array((40, 90), density=0.1, format="csr", rng=np.random.default_rng(0), dtype=np.float32)
    W, b = np.random.default_rng(1).normal(size=(90, 12)).astype(np.float32), np.ones(12, np.float32)
    A = functional.dense(X, W, b, "tanh")
    np.testing.assert_allclose(A, functional.dense(X.toarray(), W, b, "tanh"), rtol=2e-5, atol=2e-6)
    dense = functional.dense_backward(A, X.toarray(), W, A, "tanh")
    for need in (("W",), ("X", "b"), ("X", "W", "b")):
        grads = functional.dense_backward(A, X, W, A, "tanh", need=need)
        for name, found, expected in zip("XWb", grads, dense, strict=True):
            if name in need:
                np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5)
            else:
                assert found is None


def test_out_and_dtypes() -> None:
    X, W = np.ones((3, 4), np.float32), np.ones((4, 2), np.float64)
    assert functional.dense(X, W).dtype == np.float64
    assert functional.dense(np.ones((3, 4), int), W.astype(np.float32)).dtype == np.float32
    out = np.empty((3, 2))
    assert functional.dense(X, W, out=out) is out
    assert (out == 4).all()
    padded = np.full((3, 5), 7.0)
    functional.dense(X, W, out=padded[:, 1:3])
    assert (padded[:, 1:3] == 4).all()
    assert (padded[:, [0, 3, 4]] == 7).all(), "written outside out"
    for turned in (padded[::-1], padded[::-1, :2], np.zeros((9, 2))[::3]):
        functional.dense(X, W, out=turned[:, :2])
        assert (turned[:, :2] == 4).all()


def test_gradients_go_where_they_are_asked_to() -> None:
    rng = np.random.default_rng(0)
    X, W, dA = (rng.normal(size=s) for s in ((5, 7), (7, 3), (5, 3)))
    expected = functional.dense_backward(dA, X, W, dA, "tanh")
    whole = np.full((9, 20), 7.0)
    out = functional.DenseGrads(whole[:5, 2:9], whole[1:8, 10:13], whole[8, 15:18])
    found = functional.dense_backward(dA, X, W, dA, "tanh", out=out)
    for place, array, wanted in zip(out, found, expected, strict=True):
        assert array is place
        np.testing.assert_array_equal(array, wanted)
    assert (whole != 7).sum() == 5 * 7 + 7 * 3 + 3, "written outside out"
    found = functional.dense_backward(dA, X, W, dA, "tanh", out=(None, out.dW, None), need=("W", "b"))
    assert found.dX is None
    assert found.dW is out.dW
    np.testing.assert_array_equal(found.db, expected.db)


def test_columns_of_one_array_are_apart() -> None:
    whole = np.ones((6, 10))
    functional.dense(whole[:, :3], np.ones((3, 4)), out=whole[:, 4:8])
    assert (whole[:, 4:8] == 3).all()


def test_results_and_operands_must_be_apart(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if backend == "cuda":
        pytest.skip("arrays of a GPU are asked the same in tests/support/cuda_arrays.py")
    monkeypatch.setattr("narrows.functional.layer.layer_backend", lambda: import_module(f"narrows.backends.{backend}"))
    X, W, b = np.ones((4, 4)), np.ones((4, 4)), np.ones(4)
    for call, message in (
        (lambda: functional.dense(X, W, out=X), "out must not share memory with X"),
        (lambda: functional.dense(X[::-1], W, out=X), "out must not share memory with X"),
        (lambda: functional.dense(X, W, out=W[:4]), "out must not share memory with W"),
        (lambda: functional.dense(X, W, W[2], out=W.T.copy(), Z=W), "Z must not share memory with W"),
        (lambda: functional.dense_backward(X, X, W, X, out=(None, X, None)), "dW must not share memory with dA"),
        (lambda: functional.dense_backward(X, X, W, X, out=(None, None, W[1])), "db must not share memory with W"),
        (lambda: functional.dense_backward(X, W, W, X, out=(b * X, None, b)), None),
    ):
        if message is None:
            call()
        else:
            with pytest.raises(ValueError, match=message):
                call()
    Y = np.ones((4, 4))
    with pytest.raises(ValueError, match="dX must not share memory with dW"):
        functional.dense_backward(X, X, W, X, out=(Y, Y, None))


def test_empty_shapes() -> None:
    assert functional.dense(np.ones((0, 4)), np.ones((4, 2))).shape == (0, 2)
    np.testing.assert_array_equal(functional.dense(np.ones((3, 0)), np.ones((0, 2)), np.ones(2)), 1)
    assert functional.dense(np.ones((3, 4)), np.ones((4, 0))).shape == (3, 0)


class Exporter:
    """Another library's array: only DLPack, and a namespace that takes it back."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array
        self.dtype, self.shape = array.dtype, array.shape

    def __dlpack__(self, **options: Any) -> Any:
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self.array.__dlpack_device__()

    def __array_namespace__(self) -> Any:
        class Namespace:
            @staticmethod
            def from_dlpack(other: Any) -> Exporter:
                return Exporter(np.from_dlpack(other))

        return Namespace


def test_results_come_in_the_namespace_of_x() -> None:
    X, W = np.arange(6.0).reshape(2, 3), np.ones((3, 2))
    result = functional.dense(Exporter(X), W)
    assert isinstance(result, Exporter)
    np.testing.assert_array_equal(result.array, X @ W)


def csr(X: np.ndarray, at: int, column: int) -> sp.csr_array:
    """X as CSR, one of whose columns is another."""
    found = sp.csr_array(X)
    found.indices[at] = column
    return found


def overlapping(n: int, m: int, step: int = 3) -> np.ndarray:
    """An array of float64 whose rows begin `step` elements apart."""
    memory = np.zeros(64)[32:] if step < 0 else np.zeros(64)
    return np.lib.stride_tricks.as_strided(memory, (n, m), (8 * step, 8))


@pytest.mark.parametrize(
    ("call", "exception", "message"),
    [
        (lambda X, W: functional.dense(X, W[:2]), ValueError, "X has 3 columns but W has 2 rows"),
        (lambda X, W: functional.dense(X, W, np.ones(5)), ValueError, "b has 5 elements but W has 4"),
        (lambda X, W: functional.dense(X[0], W), ValueError, "X has 1 dimensions"),
        (lambda X, W: functional.dense(X, W, activation="swish"), ValueError, "choose from linear, relu"),
        (lambda X, W: functional.dense(X, W, activation="softmax"), ValueError, "not an elementwise"),
        (lambda X, W: functional.dense(X, W, out=np.ones((2, 5))), ValueError, "out must be a writable"),
        (lambda X, W: functional.dense(X, W, out=overlapping(2, 4)), ValueError, "the rows of out overlap in memory"),
        (lambda X, W: functional.dense(X, W, out=overlapping(2, 4, 0)), ValueError, "the rows of out overlap"),
        (lambda X, W: functional.dense(X, W, out=overlapping(2, 4, -3)), ValueError, "the rows of out overlap"),
        (lambda X, W: functional.dense(X, W, Z=overlapping(2, 4)), ValueError, "the rows of Z overlap"),
        (lambda X, W: functional.dense(X, W[:, :1], out=overlapping(2, 1, 0)), ValueError, "the rows of out overlap"),
        (
            lambda X, W: functional.dense_backward(X @ W, X, W, X @ W, out=(None, overlapping(3, 4), None)),
            ValueError,
            "the rows of dW overlap",
        ),
        (lambda X, W: functional.dense(X, W, n_threads=0), ValueError, "n_threads=0"),
        (
            lambda X, W: functional.dense(np.ones((999, 999)), np.ones((999, 999)), n_threads=2**40),
            ValueError,
            "at most 4096",
        ),
        (lambda X, W: functional.dense(X, sp.csr_array(W)), TypeError, "only X may be sparse"),
        (lambda X, W: functional.dense(sp.csc_array(X), W), TypeError, "only CSR"),
        (lambda X, W: functional.dense(sp.coo_array(X), W), TypeError, "only CSR; got coo_array"),
        (lambda X, W: functional.dense(csr(X, 0, 1 << 28), W), ValueError, "X: row 0 has column index 268435456"),
        (lambda X, W: functional.dense(csr(X, 4, -3), W), ValueError, "X: row 1 has column index -3"),
        (lambda X, W: functional.dense_backward(X @ W, csr(X, 0, 9), W, X @ W), ValueError, "column index 9"),
        (
            lambda X, W: functional.contractive_penalty(csr(X, 0, 9), [W], [None], "tanh"),
            ValueError,
            "X: row 0 has column index 9, outside 0..2",
        ),
        (lambda X, W: functional.dense(np.ma.masked_less(X, 2), W), ValueError, "X: a masked array"),
        (lambda X, W: functional.dense(X, W, np.ma.masked_less(W[0], 2)), ValueError, "b: a masked array"),
        (lambda X, W: functional.dense(X.astype(complex), W), TypeError, "complex128"),
        (lambda X, W: functional.dense(sp.csr_array(X.astype(complex)), W), TypeError, "complex128"),
        (lambda X, W: functional.dense(X.astype(object), W), TypeError, "object"),
        (lambda X, W: functional.dense_backward(X, X, W, X), ValueError, "dA has shape"),
        (lambda X, W: functional.dense_backward(X @ W, X, W, X @ W, "gelu"), ValueError, "pass Z"),
        (lambda X, W: functional.dense_backward(X @ W, X, W, X @ W, need=("Q",)), ValueError, "'Q'"),
        (lambda X, W: functional.dense_backward(X @ W, X, W, X @ W, out=W), ValueError, r"tuple \(dX, dW, db\)"),
        (
            lambda X, W: functional.dense_backward(X @ W, X, W, X @ W, need=("W",), out=(X, None, None)),
            ValueError,
            "out has dX, but need",
        ),
        (
            lambda X, W: functional.dense_backward(X @ W, X, W, X @ W, out=(None, W.T, None)),
            ValueError,
            "dW must be a writable float64 array of shape",
        ),
        (lambda X, W: layers.Dense(0, 3), ValueError, "in_features=0"),
        (lambda X, W: layers.Dense(2, 3, dtype=int), ValueError, "must be float32 or float64"),
        (lambda X, W: layers.Dense(3, 3).backward(X), RuntimeError, "call forward"),
    ],
)
def test_errors_are_one_clear_line(call: Any, exception: type[Exception], message: str) -> None:
    X, W = np.ones((2, 3)), np.ones((3, 4))
    with pytest.raises(exception, match=message) as caught:
        call(X, W)
    assert "\n" not in str(caught.value)


def test_sequential_trains() -> None:
    """A linear regression through two layers by plain gradient descent, the user's own loop."""
    rng = np.random.default_rng(0)
    X = rng.normal(size=(200, 6)).astype(np.float32)
    y = X @ rng.normal(size=(6, 2)).astype(np.float32)
    net = layers.Sequential([layers.Dense(6, 16, "silu", random_state=1), layers.Dense(16, 2, random_state=2)])
    losses = []
    for _ in range(300):
        error = net.forward(X) - y
        losses.append(float((error**2).mean()))
        net.backward(2 * error / len(X))
        for params, grads in zip(net.params, net.grads, strict=True):
            for name in params:
                params[name] -= 0.05 * grads[name]
    assert losses[-1] < 0.05 * losses[0]


@pytest.mark.parametrize("activation", ["tanh", "gelu"])
def test_layers_take_lists_as_dense_does(activation: str) -> None:
    X = np.arange(6.0).reshape(2, 3)
    given, listed = (layers.Dense(3, 2, activation, random_state=0, dtype=np.float64) for _ in range(2))
    np.testing.assert_array_equal(listed.forward(X.tolist()), given.forward(X))
    np.testing.assert_array_equal(listed.backward(np.ones((2, 2))), given.backward(np.ones((2, 2))))


def test_layers_are_public_and_seeded() -> None:
    a, b = (narrows.layers.Dense(5, 4, "relu", random_state=3).params["W"] for _ in range(2))
    np.testing.assert_array_equal(a, b)
    assert np.abs(a).max() <= np.sqrt(6 / 5)
