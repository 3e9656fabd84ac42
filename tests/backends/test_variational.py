"""Variational networks: the draw, the divergence, the likelihoods, and the estimator built on them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from cases import BATCH_CASES, MODEL_CASES
from formulas import ACTIVATION
from narrows.backends import Hyper, compile_plan
from narrows.backends.reference import ReferenceProgram
from narrows.plan.lowering import lower
from narrows.plan.plan import Mode
from narrows.plan.spec import Activation, LayerSpec, Loss, NetworkSpec, Solver
from narrows.random import philox
from networks import Case, make_spec, network
from oracle import SEED, STEP, log_probability, row_loss

Array = NDArray[Any]
CASES = [case for case in MODEL_CASES + BATCH_CASES if case.spec.variational and not case.spec.form.gram_decoder]
variational_cases = pytest.mark.parametrize("case", CASES, ids=str)


def program_of(backend: str, case: Case, dtype: Any = np.float32) -> Any:
    program = compile_plan(case.plan, backend, precision=dtype, n_threads=2)
    program.load(case.state(dtype))
    program.bind(*case.data(dtype))
    return program


# --- ops ----------------------------------------------------------------------------------------------------


@variational_cases
def test_posterior_and_likelihood(backend: str, case: Case) -> None:
    """The encoder's output, and the loss of any codes against any target."""
    program, data, state = program_of(backend, case, np.float64), case.data(), case.state()
    k = case.spec.n_components
    found = program.apply(data.X, Mode.POSTERIOR)
    assert found.shape == (case.rows, 2 * k)
    np.testing.assert_array_equal(found[:, :k], program.apply(data.X, Mode.ENCODE))
    codes = np.random.default_rng(0).normal(size=(case.rows, k))
    target = data.X if data.target is None else data.target
    loss = program.apply(codes, Mode.LIKELIHOOD, target, data.condition)[:, 0]
    if case.spec.loss.info.of_counts:
        expected = -log_probability(case.spec, *decoded(case, codes, target), target, state)
    else:
        p = program.apply(codes, Mode.DECODE, condition=data.condition)
        expected = row_loss(case.spec.loss, np.empty(0), p, target, 1.0, state.get("logvar"))
    np.testing.assert_allclose(loss, expected, rtol=1e-9, atol=1e-12)  # a row without counts loses nothing


def decoded(case: Case, codes: Array, counts: Array) -> tuple[Array, Array]:
    """What the decoder puts out for codes, and the means of rows with as many counts as these."""
    spec, state, a = case.spec, case.state(), codes
    if spec.data.n_conditions:
        a = np.hstack([a, np.eye(spec.data.n_conditions)[case.data().condition[:, 0].astype(int)]])
    for i in range(spec.latent, len(spec.layers)):
        z = a @ state[f"W{i}"] + state[f"b{i}"]
        a = ACTIVATION[spec.layers[i].activation.name](z if i < len(spec.layers) - 1 else z[:, : spec.n_outputs])
    unit = 1.0 if spec.layers[-1].activation is Activation.SOFTMAX else spec.data.size_sum
    return z, a * (counts.sum(axis=1, keepdims=True) / unit)


@pytest.mark.parametrize("k", [1, 3, 15, 16, 17, 33, 511, 513])
@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=["f32", "f64"])
def test_the_noise_is_philox(backend: str, k: int, dtype: Any) -> None:
    """A decoder that is the identity and an encoder that gives a mean and a variance: the gradient of the decoder's
    weight is that of one row's draw."""
    layers = (LayerSpec(1, 2 * k, Activation.LINEAR), LayerSpec(k, 1, Activation.LINEAR))
    plan = lower(make_spec(layers, 1, variational=True, weighted=True), 3)
    program = compile_plan(plan, backend, precision=dtype, n_threads=2)
    mean, log_variance = 0.25, -1.5
    stats_bias = np.r_[np.full(k, mean), np.full(k, log_variance)]
    program.load({"W0": np.zeros((1, 2 * k)), "b0": stats_bias, "W1": np.zeros((k, 1)), "b1": np.full(1, -0.5)})
    program.bind(np.zeros((3, 1), dtype), weight=np.array([0, 0, 1], dtype))
    _, gradient = program.gradient(np.arange(3), SEED, STEP)
    z = mean + np.exp(log_variance / 2) * philox.normal(SEED, 0, STEP, 3, k)[2]
    # d(x' - x)^2 / dx' = 2 (-1/2), a third of the weight
    relative = 1e-6 if dtype is np.float32 else 1e-12
    np.testing.assert_allclose(gradient["W1"][:, 0], -z / 3, rtol=relative, atol=relative)


def test_divergence_by_closed_form_and_by_monte_carlo(backend: str) -> None:
    k = 5
    rng = np.random.default_rng(3)
    layers = (LayerSpec(1, 2 * k, Activation.LINEAR), LayerSpec(k, 1, Activation.LINEAR))
    plan = lower(make_spec(layers, 1, variational=True), 4)
    mean, log_variance = rng.normal(size=k), rng.normal(size=k)
    program = compile_plan(plan, backend, precision="float64", n_threads=1)
    program.load(
        {"W0": np.zeros((1, 2 * k)), "b0": np.r_[mean, log_variance], "W1": np.ones((k, 1)), "b1": np.zeros(1)}
    )
    program.bind(np.zeros((4, 1)))
    found = program.gradient(np.arange(4))[0][plan.terms.index("kl")]
    q = stats.norm(mean, np.exp(log_variance / 2))
    draws = q.rvs((200_000, k), random_state=rng)
    ratio = (q.logpdf(draws) - stats.norm.logpdf(draws)).sum(axis=1)
    assert abs(found - ratio.mean()) < 5 * ratio.std() / np.sqrt(len(ratio))
    np.testing.assert_allclose(found, (mean**2 + np.exp(log_variance) - 1 - log_variance).sum() / 2, rtol=1e-12)


def test_the_kl_factor_is_per_step(backend: str) -> None:
    """A step moves the parameters along the gradient of loss + kl_weight * factor * kl."""

    def spec(weight: float) -> NetworkSpec:
        return network((7, 6, 3, 6, 7), variational=True, kl_weight=weight, solver=Solver.SGD, momentum=0.0)

    case = Case("factors", spec(2.0), batch=8, rows=16)
    moved = program_of(backend, case, np.float64)
    start = moved.state()
    moved.train(np.arange(16), Hyper(SEED, STEP, np.array([0.0, 0.5]), np.array([1.0, 0.25])))
    reference = ReferenceProgram(lower(spec(0.5), 8))
    reference.load(start)
    reference.bind(*case.data())
    _, gradient = reference.gradient(np.arange(8, 16), SEED, STEP + 1)
    for name, value in moved.state().items():
        if "." not in name:
            np.testing.assert_allclose(value, start[name] - 0.5 * gradient[name], rtol=1e-9, atol=1e-12)
    again = program_of(backend, case, np.float64)
    again.train(np.arange(16), Hyper(SEED, STEP, np.array([0.0, 0.5]), np.ones(2)))
    plain = program_of(backend, case, np.float64)
    plain.train(np.arange(16), Hyper(SEED, STEP, np.array([0.0, 0.5])))
    for name, value in plain.state().items():
        assert value.tobytes() == again.state()[name].tobytes()


def test_a_variance_has_a_floor(backend: str) -> None:
    """A feature that is reconstructed exactly has a finite density, and a gradient of zero below the floor."""
    plan = lower(network((3, 2, 3), loss=Loss.GAUSSIAN), 4)
    program = compile_plan(plan, backend, n_threads=1)
    program.load(
        {
            "W0": np.zeros((3, 2)),
            "b0": np.zeros(2),
            "W1": np.zeros((2, 3)),
            "b1": np.zeros(3),
            "logvar": np.full(3, -80.0),
        }
    )
    program.bind(np.zeros((4, 3), np.float32))
    terms, gradient = program.gradient(np.arange(4))
    np.testing.assert_allclose(terms, [1.5 * np.log(2 * np.pi * 1e-6)], rtol=1e-6)
    np.testing.assert_allclose(gradient["logvar"], 0, atol=1e-20)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activity_l1": 0.5, "contractive": 0.1}, "activity_l1=0.5, contractive=0.1 must be 0"),
        (
            {"layers": (LayerSpec(5, 3, Activation.LINEAR), LayerSpec(3, 5, Activation.LINEAR))},
            "3 linear outputs for 3",
        ),
        ({"layers": (LayerSpec(5, 6, Activation.TANH), LayerSpec(3, 5, Activation.LINEAR))}, "6 tanh outputs for 3"),
        (
            {"layers": (LayerSpec(5, 6, Activation.LINEAR, dropout=0.5), LayerSpec(3, 5, Activation.LINEAR))},
            "layer 0 is the latent or the output layer and takes no dropout",
        ),
    ],
)
def test_networks_that_are_not_variational(changes: dict[str, Any], message: str) -> None:
    layers = (LayerSpec(5, 6, Activation.LINEAR), LayerSpec(3, 5, Activation.LINEAR))
    with pytest.raises(ValueError, match=message):
        lower(make_spec(**({"layers": layers, "latent": 1, "variational": True} | changes)), 4)
