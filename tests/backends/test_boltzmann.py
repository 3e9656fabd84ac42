"""Restricted Boltzmann machines: ops against closed forms, and small machines against the sum over all states."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats
from scipy.special import expit, logsumexp, softmax

from cases import BOLTZMANN_CASES
from narrows.backends import Hyper, compile_plan
from narrows.backends.reference import ReferenceProgram
from narrows.plan.lowering import lower
from narrows.plan.plan import Mode
from narrows.plan.spec import Activation, Corruption, LayerSpec, Solver
from narrows.random import philox
from networks import Case, boltzmann, changed
from oracle import SEED, STEP

Array = NDArray[Any]
boltzmann_cases = pytest.mark.parametrize("case", BOLTZMANN_CASES, ids=str)


def program_of(backend: str, case: Case, dtype: Any = np.float64, **options: Any) -> Any:
    program = compile_plan(case.plan, backend, precision=dtype, n_threads=2)
    program.load(case.state(dtype))
    program.bind(*case.data(dtype))
    return program


# --- one step ---------------------------------------------------------------------------------------------------------


def states(mean: Array, activation: Activation, stream: int) -> Array:
    if activation is Activation.SIGMOID:
        return (philox.uniform(SEED, stream, STEP, *mean.shape) < mean).astype(np.float64)
    return mean + philox.normal(SEED, stream, STEP, *mean.shape)


def step_by_hand(case: Case, rows: Array) -> dict[str, Array]:
    """Gradients of a step, by the textbook: statistics of the model less those of the data; and the chains' means."""
    spec, data, state = case.spec, case.data(), case.state()
    W, b, c = state["W0"], state["b0"], state["b1"]
    up, down = (layer.activation for layer in spec.layers)
    mean = {Activation.SIGMOID: expit, Activation.LINEAR: lambda z: z}
    v0 = data.X[rows]
    w = np.ones((len(rows), 1)) if data.weight is None else data.weight[rows, None]
    h0 = mean[up](v0 @ W + b)
    h = state["chain"][: len(rows)] if spec.n_chains else h0
    stream = itertools.count()
    for _ in range(spec.training.gibbs.n_steps):
        s = states(h, up, next(stream))
        v = mean[down](s @ W.T + c)
        if spec.training.gibbs.sample_visible:
            v = states(v, down, next(stream))
        h = mean[up](v @ W + b)
    m = len(rows)
    penalties = spec.training.penalties
    decoupled = spec.training.update.solver is Solver.ADAMW  # its decay is no part of the gradient
    decay = 0.0 if decoupled else penalties.alpha
    dW = ((w * v).T @ h - (w * v0).T @ h0 + decay * W + penalties.weight_l1 * np.sign(W)) / m
    sums = {"b0": (w * (h - h0)).sum(axis=0) / m, "b1": (w * (v - v0)).sum(axis=0) / m}
    return {"W0": dW, **{name: value[None] for name, value in sums.items()}, "chain": h}


@boltzmann_cases
def test_the_gradient_is_that_of_the_textbook(backend: str, case: Case) -> None:
    rows = np.arange(min(case.batch, case.rows))[::-1].copy()
    expected = step_by_hand(case, rows)
    program = program_of(backend, case)
    _, gradient = program.gradient(rows, SEED, STEP)
    assert gradient.keys() == {"W0", "b0", "b1"}, "chains have no gradient"
    for name, value in gradient.items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("case", [c for c in BOLTZMANN_CASES if c.spec.n_chains], ids=str)
def test_chains_go_on_in_training_alone(backend: str, case: Case) -> None:
    program, rows = program_of(backend, case), np.arange(min(case.batch, case.rows))
    before = program.state()["chain"]
    np.testing.assert_array_equal(before, case.state()["chain"])
    program.gradient(rows, SEED, STEP)
    for mode in (Mode.ENCODE, Mode.RECONSTRUCT, Mode.SCORE):
        program.apply(case.data().X, mode)
    np.testing.assert_array_equal(program.state()["chain"], before)
    program.train(rows, Hyper(SEED, STEP, np.full(1, 1e-3)))
    after = program.state()["chain"]
    np.testing.assert_allclose(after[: len(rows)], step_by_hand(case, rows)["chain"], rtol=1e-9)
    np.testing.assert_array_equal(after[len(rows) :], before[len(rows) :])


def test_the_loss_is_of_the_first_reconstruction(backend: str) -> None:
    case = next(c for c in BOLTZMANN_CASES if c.name == "boltzmann-3")
    rows, data, state = np.arange(8), case.data(), case.state()
    terms, _ = program_of(backend, case).gradient(rows, SEED, STEP)
    s = states(expit(data.X[rows] @ state["W0"] + state["b0"]), Activation.SIGMOID, 0)
    p = expit(s @ state["W0"].T + state["b1"])
    each = -(data.X[rows] * np.log(p) + (1 - data.X[rows]) * np.log(1 - p)).sum(axis=1)
    assert terms[case.plan.terms.index("loss")] == pytest.approx((data.weight[rows] * each).mean(), rel=1e-9)


@pytest.mark.parametrize("n", [1, 15, 16, 17, 511, 513, 1029])
@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=["f32", "f64"])
def test_draws_are_philox(backend: str, n: int, dtype: Any) -> None:
    """A hidden unit for each state, and visible ones that tell it: W is 0, so the bias gradient is the draw itself."""
    spec = boltzmann(n, 1, n_gibbs=1)
    plan = lower(spec, 1)
    p = np.random.default_rng(n).random(n)
    p[:4] = (0.0, 1.0, 0.5, 2.0**-24)[: min(n, 4)]
    program = compile_plan(plan, backend, precision=dtype, n_threads=2)
    # Logits far out are means of exactly 0 and 1.
    c = np.where(p <= 0, -1e4, np.where(p >= 1, 1e4, np.log(np.maximum(p, 1e-30) / np.maximum(1 - p, 1e-30))))
    program.load({"W0": np.zeros((n, 1)), "b0": np.zeros((1, 1)), "b1": c[None]})
    program.bind(np.zeros((1, n), dtype))
    drawn = program.gradient(np.arange(1), SEED, STEP)[1]["b1"][0]
    u = philox.uniform(SEED, 1, STEP, 1, n)[0]
    clear = np.abs(u - p) > 1e-6  # of the sigmoid's rounding
    np.testing.assert_array_equal(drawn[clear], (u < p)[clear])
    assert set(drawn) <= {0.0, 1.0}


@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=["f32", "f64"])
def test_every_cell_is_decided_exactly(backend: str, dtype: Any) -> None:
    """Means beside the centres of cells, and on the border between them, where a rounding would show."""
    n = 256
    cells = (philox.uniform(SEED, 0, STEP, 1, n)[0] * 2**24 - 0.5).round()
    for offset in (0.0, 0.5, 0.75, 1.0):
        mean = ((cells + offset) / 2**24).astype(dtype)
        spec = boltzmann(1, n, n_chains=1, n_gibbs=1)
        program = compile_plan(lower(spec, 1), backend, precision=dtype, n_threads=1)
        # The first draw is of the chain itself, and a visible unit tells whether all states are as they should be.
        states = (cells + 0.5) / 2**24 < mean.astype(np.float64)
        W = np.zeros((1, n))
        W[0] = np.where(states, 0.0, 50.0)
        program.load({"W0": W, "b0": np.zeros((1, n)), "b1": np.full((1, 1), -20.0), "chain": mean[None]})
        program.bind(np.zeros((1, 1), dtype))
        assert program.gradient(np.arange(1), SEED, STEP)[1]["b1"][0, 0] == 0, "a unit that should be off is on"
        W[0] = np.where(states, 50.0, 0.0)
        c = np.full((1, 1), 20.0 - 50.0 * states.sum())
        program.load({"W0": W, "b0": np.zeros((1, n)), "b1": c, "chain": mean[None]})
        assert program.gradient(np.arange(1), SEED, STEP)[1]["b1"][0, 0] == 1, "a unit that should be on is off"


def test_momentum_is_per_step(backend: str) -> None:
    case = next(c for c in BOLTZMANN_CASES if c.name == "boltzmann-3")
    rows, rates = np.arange(16), np.full(2, 0.1)
    runs = {}
    for name, momentum in (("plan", None), ("same", np.full(2, 0.5)), ("none", np.array([0.5, 0.0]))):
        program = program_of(backend, case)
        program.train(rows, Hyper(SEED, STEP, rates, momentum=momentum))
        runs[name] = program.state()
    np.testing.assert_array_equal(runs["plan"]["W0"], runs["same"]["W0"])
    first = program_of(backend, case)
    first.train(rows[:8], Hyper(SEED, STEP, rates[:1]))
    change = runs["plan"]["W0"] - runs["none"]["W0"]
    np.testing.assert_allclose(change, 0.5 * first.state()["moment1.W0"], rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("case", [c for c in BOLTZMANN_CASES if "x" in c.name] + [BOLTZMANN_CASES[0]], ids=str)
@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=["f32", "f64"])
def test_any_number_of_threads_gives_the_same_bits(cpp: str, case: Case, dtype: Any) -> None:
    from narrows.backends.cpp import CppProgram
    from narrows.plan.spec import Precision

    rows, data = np.tile(np.arange(case.rows), 3), case.data(dtype)
    found = []
    for simulated in (1, 2, 3, 5, 64):
        program = CppProgram(case.plan, Precision.of(dtype), 1, simulated)
        program.load(case.state(dtype))
        program.bind(*data)
        program.train(rows, Hyper(SEED, STEP, np.full(-(-len(rows) // case.batch), 0.05)))
        found.append(b"".join(value.tobytes() for value in program.state().values()))
    assert len(set(found)) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": (LayerSpec(3, 2, Activation.TANH), LayerSpec(2, 3, Activation.SIGMOID, tied_to=0))}, "2 tanh"),
        ({"layers": (LayerSpec(3, 2, Activation.SIGMOID), LayerSpec(2, 3, Activation.SIGMOID))}, "one weight"),
        ({"corruption": Corruption.MASKING}, "corruption=.* has no meaning"),
        ({"kl_sparsity": 0.5}, "kl_sparsity=0.5 has no meaning"),
        ({"n_chains": 3}, "n_chains=3 must not be less than the rows of a step, 4"),
    ],
)
def test_what_is_no_machine_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lower(changed(boltzmann(3, 2), **changes), 4)


# --- the likelihood ---------------------------------------------------------------------------------------------------


def binary(n: int) -> Array:
    return np.array(list(itertools.product((0.0, 1.0), repeat=n)))


class Exact:
    """A machine of binary units, by the sum over all its states."""

    def __init__(self, state: dict[str, Array]) -> None:
        self.W, self.b, self.c = state["W0"], state["b0"][0], state["b1"][0]
        n_visible, n_hidden = self.W.shape
        self.v, self.h = binary(n_visible), binary(n_hidden)
        energy = -(self.v @ self.W @ self.h.T) - (self.v @ self.c)[:, None] - (self.h @ self.b)[None]
        self.joint = softmax(-energy.ravel()).reshape(energy.shape)

    @property
    def visible(self) -> Array:
        return self.joint.sum(axis=1)

    def statistics(self) -> Array:
        return self.v.T @ self.joint @ self.h

    def log_likelihood(self, X: Array) -> float:
        z = np.logaddexp(0, self.v @ self.W + self.b).sum(axis=1) + self.v @ self.c
        own = np.logaddexp(0, X @ self.W + self.b).sum(axis=1) + X @ self.c
        return float((own - logsumexp(z)).mean())


def small_machine(n_visible: int = 5, n_hidden: int = 3) -> tuple[dict[str, Array], Array]:
    rng = np.random.default_rng(4)
    state = {
        "W0": rng.normal(0, 1.0, (n_visible, n_hidden)),
        "b0": rng.normal(0, 0.5, (1, n_hidden)),
        "b1": rng.normal(0, 0.5, (1, n_visible)),
    }
    return state, (rng.random((16, n_visible)) < 0.4).astype(np.float64)


def test_the_exact_gradient_is_the_derivative_of_the_likelihood() -> None:
    """The yardstick of what follows, by differences."""
    state, X = small_machine()
    exact = Exact(state)
    expected = exact.statistics() - X.T @ expit(X @ state["W0"] + state["b0"]) / len(X)
    for i, j in itertools.product(range(5), range(3)):
        ends = []
        for h in (1e-6, -1e-6):
            W = state["W0"].copy()
            W[i, j] += h
            ends.append(-Exact({**state, "W0": W}).log_likelihood(X))
        assert (ends[0] - ends[1]) / 2e-6 == pytest.approx(expected[i, j], abs=1e-8)


@pytest.mark.parametrize("chains", [False, True])
def test_the_mean_gradient_is_that_of_the_likelihood(chains: bool) -> None:
    """Long chains, or chains that are already at equilibrium: the estimate has no bias but its variance."""
    state, X = small_machine()
    m, steps, repeats = 4096, 1 if chains else 40, 40
    exact = Exact(state)
    expected = exact.statistics() - X.T @ expit(X @ state["W0"] + state["b0"]) / len(X)
    spec = boltzmann(5, 3, n_gibbs=steps, n_chains=m if chains else 0)
    program = ReferenceProgram(lower(spec, m))
    program.bind(np.tile(X, (m // len(X), 1)))
    rng = np.random.default_rng(0)
    found = []
    for repeat in range(repeats):
        if chains:
            v = exact.v[rng.choice(len(exact.v), m, p=exact.visible)]
            state["chain"] = expit(v @ state["W0"] + state["b0"])
        program.load(state)
        found.append(program.gradient(np.arange(m), SEED, repeat)[1]["W0"])
    error = np.mean(found, axis=0) - expected
    deviation = np.std(found, axis=0, ddof=1) / np.sqrt(repeats)
    assert (np.abs(error) < 4.5 * deviation).all()
    assert deviation.max() < 0.002


def test_training_raises_the_likelihood(backend: str) -> None:
    """PCD comes near the best that is possible for a distribution a machine can have."""
    true, _ = small_machine()
    rng = np.random.default_rng(1)
    exact = Exact(true)
    X = exact.v[rng.choice(len(exact.v), 4000, p=exact.visible)].astype(np.float32)
    spec = boltzmann(5, 3, n_chains=200, momentum=0.5)
    program = compile_plan(lower(spec, 200), backend, n_threads=1)
    start = {"W0": 0.1 * rng.normal(size=(5, 3)), "b0": np.zeros((1, 3)), "b1": np.zeros((1, 5))}
    program.load({**start, "chain": np.full((200, 3), 0.5)})
    program.bind(X)
    for epoch in range(60):
        program.train(rng.permutation(4000), Hyper(0, 20 * epoch, np.full(20, 0.1 * (1 - epoch / 60))))
    before, after, best = (Exact(s).log_likelihood(X) for s in (start, program.state(), true))
    assert before < best - 0.3
    assert after > best - 0.02


def test_a_long_chain_visits_states_as_often_as_the_model_says() -> None:
    state, _ = small_machine()
    m = 3000
    program = ReferenceProgram(lower(boltzmann(5, 3, n_gibbs=60), m))
    program.load(state)
    program.bind(np.zeros((m, 5)))
    program.gradient(np.arange(m), SEED, STEP)
    last = program.arrays[program.plan.index["state59"]]
    found = np.bincount((last @ 2.0 ** np.arange(4, -1, -1)).astype(int), minlength=32)
    assert stats.chisquare(found, m * Exact(state).visible).pvalue > 1e-3


def test_gaussian_units_have_their_conditional_distributions() -> None:
    """Given the hidden states, visible ones are N(c + Wh, 1)."""
    rng = np.random.default_rng(3)
    m = 4000
    program = ReferenceProgram(lower(boltzmann(3, 2, "g", "g"), m))
    state = {"W0": rng.normal(size=(3, 2)), "b0": rng.normal(size=(1, 2)), "b1": rng.normal(size=(1, 3))}
    X = rng.normal(size=(m, 3))
    program.load(state)
    program.bind(X)
    program.gradient(np.arange(m), SEED, STEP)
    h, v = (program.arrays[program.plan.index[name]] for name in ("hidden0", "state0"))
    for noise in (h - (X @ state["W0"] + state["b0"]), v - (h @ state["W0"].T + state["b1"])):
        assert stats.kstest(noise.ravel(), "norm").pvalue > 1e-3
        np.testing.assert_allclose(np.corrcoef(noise.T), np.eye(noise.shape[1]), atol=0.06)


def test_any_solver_updates(backend: str) -> None:
    for solver in Solver:
        case = Case("solver", boltzmann(6, 4, solver=solver, alpha=0.1), batch=8, rows=8)
        program = program_of(backend, case)
        program.train(np.arange(8), Hyper(SEED, STEP, np.full(1, 0.1)))
        assert not np.array_equal(program.state()["W0"], case.state()["W0"])
