"""The contractive penalty against Jacobians in float64, against differences, and against common mistakes."""

from __future__ import annotations

import gc
import itertools
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
from numpy.typing import NDArray
from scipy import special

from formulas import ACTIVATION, SLOPE
from narrows.backends import Hyper, compile_plan
from narrows.backends.reference import CURVATURE, DERIVATIVE
from narrows.functional import penalty as functional
from narrows.plan.lowering import lower, lower_penalty
from narrows.plan.ops import OpCode
from narrows.plan.spec import Activation, LayerSpec
from networks import ELEMENTWISE, make_spec, network

Array = NDArray[Any]
Encoder = tuple[Array, list[Array], list[Array]]
WIDTHS = {1: (19, 7), 2: (19, 33, 6), 3: (19, 17, 9, 5), 4: (19, 16, 11, 8, 4)}
depths = pytest.mark.parametrize("depth", WIDTHS)
activations = pytest.mark.parametrize("activation", ELEMENTWISE, ids=lambda a: a.name.lower())


def encoder(depth: int, activation: Activation, rows: int = 23) -> Encoder:
    """Rows, weights and biases, float32 numbers, with no pre-activation near a kink."""
    rng = np.random.default_rng([depth, activation])
    widths = WIDTHS[depth]
    size = 0.5 if activation is Activation.EXP else 1.0
    while True:
        X = rng.normal(size=(rows, widths[0])).astype(np.float32)
        W = [(size * rng.normal(size=s) / np.sqrt(s[0])).astype(np.float32) for s in itertools.pairwise(widths)]
        b = [(0.3 * rng.normal(size=n)).astype(np.float32) for n in widths[1:]]
        exact = as_float64((X, W, b))
        if min(np.abs(z).min() for z in preactivations(exact, activation)) > 1e-4:
            return X, W, b


def as_float64(encoder: Encoder) -> Encoder:
    X, W, b = encoder
    return X.astype(float), [w.astype(float) for w in W], [v.astype(float) for v in b]


def preactivations(encoder: Encoder, activation: Activation) -> list[Array]:
    a, W, b = encoder
    found = []
    for w, v in zip(W, b, strict=True):
        found.append(a @ w + v)
        a = ACTIVATION[activation.name](found[-1])
    return found


def jacobians(encoder: Encoder, activation: Activation) -> Array:
    """(rows, latents, features)"""
    J = np.eye(encoder[0].shape[1])
    for z, w in zip(preactivations(encoder, activation), encoder[1], strict=True):
        J = SLOPE[activation.name](z)[:, :, None] * (w.T @ J)
    return J


def penalty(encoder: Encoder, activation: Activation) -> float:
    return float(np.square(jacobians(encoder, activation)).sum() / len(encoder[0]))


def differences(value: Callable[[], float], arrays: list[Array], h: float = 1e-6) -> list[Array]:
    """Derivatives of `value` by every element, by central differences of the fourth order."""
    found = []
    for a in arrays:
        g = np.empty(a.size)
        for i, (flat, old) in enumerate((a.reshape(-1), old) for old in a.reshape(-1).copy()):
            ends = []
            for step in (-2, -1, 1, 2):
                flat[i] = old + step * h
                ends.append(value())
            flat[i] = old
            g[i] = (ends[0] - 8 * ends[1] + 8 * ends[2] - ends[3]) / (12 * h)
        found.append(g.reshape(a.shape))
    return found


def assert_near(found: list[Array], wanted: list[Array], relative: float) -> None:
    """Each to `relative`, of the largest element of all."""
    scale = max(float(np.abs(w).max()) for w in wanted)
    for f, w in zip(found, wanted, strict=True):
        assert f.shape == w.shape
        np.testing.assert_allclose(f, w, rtol=0, atol=relative * scale)


# --- formulas -------------------------------------------------------------------------------------------------------


@activations
def test_second_derivatives_are_the_derivatives_of_the_first(activation: Activation) -> None:
    z = np.r_[np.linspace(-9, 9, 400), 1e-3, -1e-3]
    h = 1e-5

    def slope(z: Array) -> Array:
        return DERIVATIVE[activation](z if activation.needs_preactivation else ACTIVATION[activation.name](z))

    saved = z if activation.needs_preactivation else ACTIVATION[activation.name](z)
    numeric = (slope(z - 2 * h) - 8 * slope(z - h) + 8 * slope(z + h) - slope(z + 2 * h)) / (12 * h)
    np.testing.assert_allclose(CURVATURE[activation](saved), numeric, rtol=1e-6, atol=2e-9 * max(1, numeric.max()))


@activations
def test_native_second_derivatives(cpp: str, activation: Activation) -> None:
    """To a few units in the last place of what they are made of, for every size of argument."""
    from narrows import _core

    x = np.r_[np.linspace(-30, 30, 4001), [-1e4, 1e4, 0, -100, 100]].astype(np.float32)
    saved = x
    if not activation.needs_preactivation:
        with np.errstate(over="ignore"):
            saved = ACTIVATION[activation.name](x.astype(float))
        saved = saved[np.abs(saved) < 1e30].astype(np.float32)
    found = np.asarray(_core.evaluate(f"{FUNCTORS[activation]}::curve", saved, ""))
    with np.errstate(over="ignore", under="ignore"):
        exact = CURVATURE[activation](saved.astype(float))
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found, exact, rtol=2e-6, atol=2e-6 * min(1, np.abs(exact).max(initial=0)))


FUNCTORS = {a: "".join(word.capitalize() for word in a.name.split("_")) for a in ELEMENTWISE}


@depths
@activations
def test_value_is_that_of_jacobians_by_differences(depth: int, activation: Activation) -> None:
    """Of the encoder itself, which knows no formula of a derivative."""
    X, W, b = as_float64(encoder(depth, activation, rows=5))
    h = 1e-4
    total = 0.0
    for i in range(X.shape[1]):
        ends = []
        for step in (-2, -1, 1, 2):
            moved = X.copy()
            moved[:, i] += step * h / 100
            ends.append(ACTIVATION[activation.name](preactivations((moved, W, b), activation)[-1]))
        total += np.square((ends[0] - 8 * ends[1] + 8 * ends[2] - ends[3]) / (12 * h / 100)).sum()
    found = functional.contractive_penalty(X, W, b, activation.name.lower(), grads=False)
    assert found.value == pytest.approx(total / len(X), rel=1e-7)


@depths
@activations
def test_float64_is_exact(depth: int, activation: Activation) -> None:
    exact = as_float64(encoder(depth, activation))
    found = functional.contractive_penalty(*exact, activation.name.lower())
    assert found.value == pytest.approx(penalty(exact, activation), rel=1e-12)
    wanted = differences(lambda: penalty(exact, activation), [*exact[1], *exact[2]])
    assert_near([*found.dW, *found.db], wanted, 1e-8)


@depths
@activations
@pytest.mark.parametrize("form", ["dense", "csr"])
def test_float32_to_five_digits(depth: int, activation: Activation, form: str) -> None:
    X, W, b = encoder(depth, activation)
    if form == "csr":
        X = X * (np.random.default_rng(0).random(X.shape) < 0.4)
    exact = as_float64((X, W, b))
    found = functional.contractive_penalty(sp.csr_array(X) if form == "csr" else X, W, b, activation.name.lower())
    wanted = functional.contractive_penalty(*exact, activation.name.lower())
    assert found.value == pytest.approx(penalty(exact, activation), rel=1e-5)
    assert all(g.dtype == np.float32 for g in (*found.dW, *found.db))
    assert_near([*found.dW, *found.db], [*wanted.dW, *wanted.db], 1e-5)


def test_float32_at_the_sizes_of_images() -> None:
    rng = np.random.default_rng(0)
    X = rng.random((256, 784), dtype=np.float32)
    for widths in ((784, 256), (784, 256, 32), (784, 200, 100, 32), (784, 128, 96, 64, 32)):
        W = [(rng.normal(size=s) / np.sqrt(s[0])).astype(np.float32) for s in itertools.pairwise(widths)]
        b = [rng.normal(size=n).astype(np.float32) for n in widths[1:]]
        found = functional.contractive_penalty(X, W, b, "sigmoid")
        wanted = functional.contractive_penalty(*as_float64((X, W, b)), "sigmoid")
        assert found.value == pytest.approx(wanted.value, rel=1e-5)
        for f, w in zip([*found.dW, *found.db], [*wanted.dW, *wanted.db], strict=True):
            assert np.linalg.norm(f - w) <= 1e-5 * np.linalg.norm(w)


def test_common_mistakes_are_told_apart() -> None:
    """Weights held constant, slopes left out, the square of the sum for the sum of squares: each is another number."""
    X, W, b = exact = as_float64(encoder(2, Activation.SIGMOID))
    found = functional.contractive_penalty(X, W, b, "sigmoid")
    J = jacobians(exact, Activation.SIGMOID)
    product = W[0] @ W[1]
    for wrong in (np.square(product).sum(), np.square(J.sum(axis=(1, 2))).mean(), np.square(J.mean(axis=0)).sum()):
        assert abs(wrong - found.value) > 0.05 * found.value
    # The penalty moves with the pre-activations alone if the weights of the Jacobian are constants.
    frozen = [w.copy() for w in W]

    def with_constants() -> float:
        moving = jacobians_of(preactivations((X, W, b), Activation.SIGMOID), frozen)
        return float(np.square(moving).sum() / len(X))

    wrong_gradient = differences(with_constants, W)
    for f, w in zip(found.dW, wrong_gradient, strict=True):
        assert np.linalg.norm(f - w) > 0.5 * np.linalg.norm(f)
    # And with the weights alone if the slopes are constants: no gradient by a bias is left.
    assert all(np.linalg.norm(g) > 0.02 * found.value for g in found.db)


def jacobians_of(pre: list[Array], W: list[Array]) -> Array:
    J = np.eye(len(W[0]))
    for z, w in zip(pre, W, strict=True):
        J = (special.expit(z) * special.expit(-z))[:, :, None] * (w.T @ J)
    return J


# --- estimates ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [2, 3, 4])
def test_probes_estimate_without_bias(depth: int) -> None:
    """Value and gradients: the mean over many probes is the exact one, within five standard errors."""
    X, W, b = encoder(depth, Activation.TANH)
    exact = functional.contractive_penalty(X, W, b, "tanh")
    drawn = [
        functional.contractive_penalty(X, W, b, "tanh", method="hutchinson", n_probes=8, random_state=i)
        for i in range(150)
    ]
    pairs = [(np.array([d.value for d in drawn]), exact.value)]
    for i in range(depth):
        pairs += [(np.array([d.dW[i] for d in drawn]), exact.dW[i]), (np.array([d.db[i] for d in drawn]), exact.db[i])]
    for found, wanted in pairs:
        error = found.std(axis=0, ddof=1) / np.sqrt(len(found))
        assert (np.abs(found.mean(axis=0) - wanted) <= 5 * error + 1e-7).all()
        assert np.max(error) > 0


def test_more_probes_scatter_less() -> None:
    X, W, b = encoder(2, Activation.TANH)

    def scatter(n_probes: int) -> float:
        return float(
            np.std(
                [
                    functional.contractive_penalty(
                        X, W, b, "tanh", method="hutchinson", n_probes=n_probes, random_state=i, grads=False
                    ).value
                    for i in range(80)
                ]
            )
        )

    assert scatter(16) < 0.4 * scatter(1)


def test_probes_come_from_the_seed() -> None:
    X, W, b = encoder(3, Activation.SIGMOID)
    one, two, other = (
        functional.contractive_penalty(X, W, b, "sigmoid", method="hutchinson", random_state=seed) for seed in (1, 1, 2)
    )
    assert one.value == two.value
    assert all((u == v).all() for u, v in zip(one.dW, two.dW, strict=True))
    assert one.value != other.value


def test_one_layer_needs_no_probe() -> None:
    X, W, b = encoder(1, Activation.SILU)
    exact, estimate = (functional.contractive_penalty(X, W, b, "silu", method=m) for m in ("exact", "hutchinson"))
    assert exact.value == estimate.value


# --- the function ---------------------------------------------------------------------------------------------------


def test_parts_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    X, W, b = as_float64(encoder(2, Activation.GELU, rows=50))
    whole = functional.contractive_penalty(X, W, b, "gelu")
    monkeypatch.setattr(functional, "PENALTY_ROWS", 7)
    parts = functional.contractive_penalty(X, W, b, "gelu")
    assert parts.value == pytest.approx(whole.value, rel=1e-12)
    assert_near([*parts.dW, *parts.db], [*whole.dW, *whole.db], 1e-12)


def test_activations_layer_by_layer_and_no_biases() -> None:
    X, W, _ = as_float64(encoder(2, Activation.TANH))
    found = functional.contractive_penalty(X, W, [None, None], ["tanh", "linear"])
    J = (1 - np.tanh(X @ W[0]) ** 2)[:, None, :] * W[1].T @ W[0].T
    assert found.value == pytest.approx(np.square(J).sum() / len(X), rel=1e-12)
    assert functional.contractive_penalty(X, W, [None, None], "tanh", grads=False)[1:] == (None, None)


def test_kept_programs_keep_nothing_of_a_call() -> None:
    """Not the data, and no result of one call is touched by the next; calls in several threads are apart."""
    X, W, b = encoder(2, Activation.TANH)
    expected = functional.contractive_penalty(X, W, b, "tanh")
    copies = [g.copy() for g in (*expected.dW, *expected.db)]
    other = functional.contractive_penalty(2 * X, [2 * w for w in W], b, "tanh")
    assert other.value != expected.value
    for g, copy in zip((*expected.dW, *expected.db), copies, strict=True):
        np.testing.assert_array_equal(g, copy)
    data = X.copy()
    gone = weakref.ref(data)
    assert functional.contractive_penalty(data, W, b, "tanh").value == expected.value
    del data
    gc.collect()
    assert gone() is None
    for i in range(5):
        functional.contractive_penalty(X[: i + 2], W, b, "tanh")
    assert len(functional._spare) <= functional.SPARE_PROGRAMS
    with ThreadPoolExecutor(4) as pool:
        values = pool.map(lambda _: functional.contractive_penalty(X, W, b, "tanh").value, range(40))
        assert set(values) == {expected.value}


def test_the_same_bits_for_any_number_of_threads(cpp: str) -> None:
    rng = np.random.default_rng(0)
    X = rng.random((300, 64), dtype=np.float32)
    W = [rng.normal(size=s).astype(np.float32) / 8 for s in ((64, 70), (70, 21))]
    results = [functional.contractive_penalty(X, W, [None, None], "tanh", n_threads=n) for n in (1, 2, 3)]
    for other in results[1:]:
        assert other.value == results[0].value
        for u, v in zip([*other.dW, *other.db], [*results[0].dW, *results[0].db], strict=True):
            assert u.tobytes() == v.tobytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "guess"}, "method='guess' must be 'exact' or 'hutchinson'"),
        ({"n_probes": 0}, "n_probes=0 must be at least 1"),
        ({"biases": [None]}, "2 weights, 1 biases and 2 activations"),
        ({"activations": ["tanh"]}, "2 weights, 2 biases and 1 activations"),
        ({"activations": "softmax"}, "activation='softmax' is not an elementwise"),
        ({"X": np.ones((3, 4))}, r"weights\[0\] has 19 rows but X has 4 columns"),
        ({"X": np.ones((0, 19))}, "X must have at least one row"),
        ({"biases": [None, np.ones(2)]}, r"biases\[1\] has 2 elements but weights\[1\] has 6 columns"),
        ({"weights": [np.ones((19, 3)), np.ones((4, 6))]}, r"weights\[1\] has 4 rows but weights\[0\] has 3 columns"),
        ({"weights": [np.eye(19)] * 5, "biases": [None] * 5}, "encoders of up to 4 layers, not 5"),
    ],
)
def test_what_does_not_fit(change: dict[str, Any], message: str) -> None:
    X, W, b = encoder(2, Activation.TANH)
    given = {"X": X, "weights": W, "biases": b, "activations": "tanh"} | change
    with pytest.raises(ValueError, match=message):
        functional.contractive_penalty(**given)


# --- plans ----------------------------------------------------------------------------------------------------------


def test_one_layer_needs_no_gradient_array() -> None:
    plan = lower(network((9, 4, 9), contractive=1.0), 8)
    update = next(op for op in plan.ops if op.code is OpCode.WGRAD_UPDATE and plan.slots[op.slots[3]].name == "W0")
    assert update.slots[2] == -1
    assert plan.slots[update.slots[6]].name == "colrate"


def test_only_what_is_asked_for_is_lowered() -> None:
    contractive = {op for op in OpCode if op >= OpCode.CONTRACTIVE}
    assert not contractive & {op.code for op in lower(network((9, 4, 9)), 8).ops}
    layers = (LayerSpec(9, 6, Activation.TANH), LayerSpec(6, 3, Activation.TANH))
    value = lower_penalty(make_spec(layers, 2, contractive=1.0), 8, grads=False)
    assert not {OpCode.CURVES, OpCode.WGRAD, OpCode.COLSUM} & {op.code for op in value.ops}


@pytest.mark.parametrize("strength", [{"contractive": 1.0}, {"contractive_hessian": 1.0}])
def test_specifications_without_a_meaning(strength: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"dropout=0.3 in layer 0 of the encoder"):
        lower(network((7, 6, 3, 6, 7), dropout=0.3, **strength), 4)
    deep = (9, 8, 7, 6, 5, 4, 5, 6, 7, 8, 9)
    with pytest.raises(ValueError, match="up to 4 layers, not 5"):
        lower(network(deep, **strength), 4)
    lower(network(deep, contractive=1.0, contractive_probes=1), 4)


def test_noise_of_no_size_changes_nothing(backend: str) -> None:
    spec = network((9, 6, 3, 6, 9), contractive_hessian=1.0, hessian_std=1e-30)
    program = compile_plan(lower(spec, 8), backend, n_threads=2)
    rng = np.random.default_rng(0)
    program.load({s.name: rng.normal(size=(s.rows, s.cols)) for s in program.plan.parameters})
    program.bind(rng.random((8, 9), dtype=np.float32))
    terms, _ = program.gradient(np.arange(8))
    assert terms[program.plan.terms.index("contractive_hessian")] == pytest.approx(0, abs=1e-9)


def test_noise_is_that_of_the_second_derivatives() -> None:
    """For little noise E |J(x) - J(x + noise)|**2 is the variance times the squared norm of the second derivatives."""
    rng = np.random.default_rng(0)
    X, W, b = rng.random((64, 5)), rng.normal(size=(5, 3)), rng.normal(size=3)
    std, draws = 1e-3, 400
    layers = (LayerSpec(5, 3, Activation.TANH), LayerSpec(3, 5, Activation.LINEAR))
    spec = make_spec(layers, 1, contractive_hessian=1.0, hessian_std=std, n_corruptions=draws)
    program = compile_plan(lower(spec, 64), "reference")
    program.load({"W0": W, "b0": b, "W1": np.zeros((3, 5)), "b1": np.zeros(5)})
    program.bind(X)
    terms, _ = program.gradient(np.arange(64), 1)
    a = np.tanh(X @ W + b)
    # d2 h_j / dx_i dx_k = act''(z_j) W_ij W_kj
    hessian = np.square(-2 * a * (1 - a**2)) @ np.square(np.square(W).sum(axis=0))
    assert terms[1] / std**2 == pytest.approx(hessian.mean(), rel=0.02)


def test_rates_of_many_steps_stay_finite(backend: str) -> None:
    """Weights that grow or slopes that vanish leave no NaN."""
    spec = network((9, 6, 3, 6, 9), Activation.EXP, Activation.SIGMOID, contractive=1.0)
    program = compile_plan(lower(spec, 8), backend, n_threads=1)
    program.load({s.name: np.full((s.rows, s.cols), -5.0) for s in program.plan.parameters})
    program.bind(np.ones((8, 9), np.float32))
    terms = program.train(np.tile(np.arange(8), 5), Hyper(0, 0, np.full(5, 1e-3)))
    assert np.isfinite(terms).all()
