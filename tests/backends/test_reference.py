"""The reference backend against formulas from SciPy, scikit-learn, and finite differences."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.neural_network import MLPRegressor

from cases import BATCH_CASES, GRAM_CASES, MODEL_CASES, SHIFTED_CASES, SPARSE_CASES
from narrows.backends import Hyper
from narrows.backends.reference import ReferenceProgram
from narrows.plan.lowering import lower
from narrows.plan.plan import Mode
from narrows.plan.spec import Activation, LayerSpec, Loss, Solver
from networks import Case, make_spec, network
from oracle import SEED, STEP, away_from_kinks, forward

Array = NDArray[Any]
_SMALL = SPARSE_CASES + GRAM_CASES + SHIFTED_CASES + BATCH_CASES
small = tuple(c for c in _SMALL if c.plan.parameter_size < 4000)


def program_of(case: Case) -> ReferenceProgram:
    program = ReferenceProgram(case.plan)
    program.load(case.state())
    program.bind(*case.data())
    return program


@pytest.mark.parametrize("case", MODEL_CASES + small, ids=str)
def test_a_program_computes_the_formulas(case: Case) -> None:
    check_forward(case)
    check_terms(case)
    check_gradient(away_from_kinks(case))


def check_forward(case: Case) -> None:
    """Codes, reconstructions and scores are those of `oracle.forward`."""
    program, data = program_of(case), case.data()
    expected, batch = forward(case, np.arange(case.rows), training=False), data.condition
    for name, found, wanted, relative in (
        ("codes", program.apply(data.X, Mode.ENCODE), expected.code, 1e-11),
        ("reconstructions", program.apply(data.X, Mode.RECONSTRUCT, condition=batch), expected.out[-1], 1e-11),
        ("decoded codes", program.apply(expected.code, Mode.DECODE, condition=batch), expected.decoded, 1e-11),
        ("scores", program.apply(data.X, Mode.SCORE, data.target, batch)[:, 0], expected.row_loss, 1e-10),
    ):
        np.testing.assert_allclose(found, wanted, rtol=relative, atol=1e-13, err_msg=name)


def check_terms(case: Case) -> None:
    """The terms of a training step are those of `oracle.forward`."""
    rows = np.arange(min(case.batch, case.rows))
    terms, _ = program_of(case).gradient(rows, SEED, STEP)
    expected = forward(case, rows, training=True).terms
    assert set(case.plan.terms) == set(expected), "names of the terms"
    np.testing.assert_allclose(terms, [expected[name] for name in case.plan.terms], rtol=1e-10, err_msg="terms")


def check_gradient(case: Case) -> None:
    """The gradient is the derivative of the sum of the terms, by central differences.

    Some single elements of each parameter are moved, then all elements at once, up or down at random: a wrong element
    changes the derivative along each of these directions.
    """
    program = program_of(case)
    rows, h = np.arange(min(case.batch, case.rows)), 1e-6
    _, gradient = program.gradient(rows, SEED, STEP)
    state = case.state()
    # The divergence is reported in nats, whatever it weighs.
    weights = np.array([case.spec.kl_weight if term == "kl" else 1.0 for term in case.plan.terms])
    assert set(gradient) == set(state), "names of the gradients"
    rng, n = np.random.default_rng(0), 3 if case.plan.parameter_size < 20_000 else 1
    for name, values in state.items():
        single = rng.choice(values.size, min(values.size, n), replace=False)
        directions = [*rng.choice([-1.0, 1.0], (n, values.size)), *(np.eye(1, values.size, i)[0] for i in single)]
        for direction in directions:
            step, ends = direction.reshape(values.shape) * h, []
            for moved in (values + step, values - step):
                program.load({**state, name: moved})
                ends.append(program.gradient(rows, SEED, STEP)[0] @ weights)
            numeric, exact = (ends[0] - ends[1]) / (2 * h), float(gradient[name].reshape(-1) @ direction)
            at = "all elements" if np.count_nonzero(direction) > 1 else f"element {direction.argmax()}"
            assert abs(numeric - exact) <= 1e-7 * (1 + abs(exact)), f"{name}, {at}: {exact} but {numeric}"


def test_training_ignores_what_the_gradient_does_not_show() -> None:
    """adamw decays by learning_rate * alpha, outside the gradient; biases are left alone."""
    spec = network((4, 2, 4), solver=Solver.ADAMW, alpha=0.5)
    case = Case("adamw", spec, batch=8, rows=8)
    with_decay, plain = program_of(case), program_of(Case("adamw", network((4, 2, 4)), batch=8, rows=8))
    hyper = Hyper(0, 0, np.array([0.1]))
    for program in (with_decay, plain):
        program.train(np.arange(8), hyper)
    decayed, undecayed, start = with_decay.state(), plain.state(), case.state()
    for name in start:
        shrink = 0.1 * 0.5 * start[name] if name[0] == "W" else 0
        np.testing.assert_allclose(decayed[name], undecayed[name] - shrink, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("activation", ["identity", "relu", "tanh", "logistic"])
@pytest.mark.parametrize("solver", ["sgd", "adam"])
def test_training_is_that_of_scikit_learn(activation: str, solver: str) -> None:
    """Its loss is half ours, so its learning rate (sgd) or nothing (adam, scale-free) is twice ours."""
    sizes, n, alpha, rate, steps = (7, 6, 3, 6, 7), 24, 0.4, 0.01, 5
    a = {"identity": Activation.LINEAR, "logistic": Activation.SIGMOID}.get(activation)
    a = Activation[activation.upper()] if a is None else a
    layers = tuple(
        LayerSpec(i, o, a if k < 3 else Activation.LINEAR) for k, (i, o) in enumerate(itertools.pairwise(sizes))
    )
    spec = make_spec(layers, 2, alpha=2 * alpha, solver=Solver[solver.upper()], momentum=0.8, epsilon=1e-14)
    case = Case(f"sklearn-{activation}", spec, batch=n, rows=n)
    X, state = case.data().X, case.state()
    peer = MLPRegressor(
        hidden_layer_sizes=sizes[1:-1], activation=activation, solver=solver, alpha=alpha, batch_size=n,
        learning_rate_init=rate, shuffle=False, momentum=0.8, nesterovs_momentum=False, epsilon=1e-14,
        random_state=0,
    )  # fmt: skip
    peer.partial_fit(X, X)  # draws its parameters, which are then replaced; so is its optimiser
    peer.coefs_ = [state[f"W{i}"].copy() for i in range(4)]
    peer.intercepts_ = [state[f"b{i}"][0].copy() for i in range(4)]
    del peer._optimizer
    program = program_of(case)
    np.testing.assert_allclose(program.apply(X, Mode.RECONSTRUCT), peer.predict(X), rtol=1e-12)
    ours = rate / 2 if solver == "sgd" else rate
    for step in range(steps):
        peer.partial_fit(X, X)
        program.train(np.arange(n), Hyper(0, step, np.array([ours])))
    trained = program.state()
    for i in range(4):
        np.testing.assert_allclose(trained[f"W{i}"], peer.coefs_[i], rtol=1e-9, atol=1e-10)
        np.testing.assert_allclose(trained[f"b{i}"][0], peer.intercepts_[i], rtol=1e-9, atol=1e-10)
    assert np.abs(trained["W0"] - state["W0"]).max() > 1e-3


def test_extreme_logits_keep_the_loss_finite() -> None:
    for loss, link, big in (
        (Loss.BCE, Activation.SIGMOID, 1e4),
        (Loss.MULTINOMIAL, Activation.SOFTMAX, 1e4),
        (Loss.BCE, Activation.SOFTMAX, 1e4),
    ):
        plan = lower(network((3, 2, 3), output=link, loss=loss), 4)
        program = ReferenceProgram(plan)
        signs = np.array([[1.0, -1.0, 1.0]])
        program.load({"W0": np.ones((3, 2)), "b0": np.zeros(2), "W1": big * np.ones((2, 1)) * signs, "b1": np.zeros(3)})
        program.bind(np.array([[0.0, 1.0, 0.5], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0], [1.0, 1.0, 1.0]]))
        with np.errstate(over="raise", invalid="raise", divide="raise"):
            terms, gradient = program.gradient(np.arange(4))
        assert np.isfinite(terms).all(), loss.name
        assert all(np.isfinite(g).all() for g in gradient.values()), loss.name


def test_clipping_brings_the_norm_down() -> None:
    spec = network((6, 4, 6), solver=Solver.SGD, momentum=0.0, clip_norm=0.25)
    case = Case("clip", spec, batch=8, rows=8)
    program, before = program_of(case), case.state()
    _, gradient = program.gradient(np.arange(8))
    norm = np.sqrt(sum(np.square(g).sum() for g in gradient.values()))
    assert norm > 0.25
    program.train(np.arange(8), Hyper(0, 0, np.array([1.0])))
    for name, value in program.state().items():
        if name in before:
            expected = before[name] - gradient[name] * 0.25 / norm
            np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-9)
