"""Likelihoods of counts against scipy.stats and central differences, also at extreme values."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
from scipy import special, stats

from estimator_cases import BACKEND
from narrows.backends import compile_plan
from narrows.plan.lowering import lower
from narrows.plan.ops import LOG_DISPERSION_LIMIT
from narrows.plan.plan import Mode
from narrows.plan.spec import Activation, LayerSpec, Loss
from networks import Case, make_spec, network

# --- the op, far from where networks are -----------------------------------------------------------------------------


def judged(
    loss: Loss, link: Activation, y: Any, mean: Any, theta: Any, zeta: Any, backend: str = BACKEND
) -> tuple[Any, Any]:
    """One decoder for all: hidden units that are on for one row each put the logits of that row into a weight."""
    m, n = y.shape
    heads = 3 if loss is Loss.ZINB else 2 if loss is Loss.NB else 1
    logits = np.log(mean)
    if link is Activation.EXP:
        logits = logits - np.log(y.sum(axis=1, keepdims=True))
    W1 = np.concatenate([logits, np.log(theta), zeta][:heads], axis=1)
    layers = LayerSpec(m, m, Activation.LINEAR), LayerSpec(m, heads * n, link)
    spec = make_spec(layers, 1, loss=loss, cell_dispersion=heads > 1, separate_target=True)
    program = compile_plan(lower(spec, m), backend, precision=np.float32, n_threads=1)
    zero = {"b0": np.zeros((1, m)), "b1": np.zeros((1, heads * n))}
    program.load({"W0": np.eye(m), "W1": W1, **zero})
    eye = np.eye(m, dtype=np.float32)
    score = program.apply(eye, Mode.SCORE, y.astype(np.float32))[:, 0]
    program.bind(eye, y.astype(np.float32))
    _, gradient = program.gradient(np.arange(m))
    return score, gradient["W1"] * m


@pytest.mark.parametrize("backend", sorted({BACKEND, "numba"}))
@pytest.mark.parametrize("link", [Activation.SOFTMAX, Activation.EXP])
@pytest.mark.parametrize("loss", [Loss.POISSON, Loss.NB, Loss.ZINB])
@pytest.mark.parametrize(("scale", "most"), [(1e-2, 12), (1.0, 12), (1e2, 12), (1e4, 6)])
def test_value_and_gradient_against_scipy(
    backend: str, loss: Loss, link: Activation, scale: float, most: float
) -> None:
    """To 1e-5, for counts of few and of many molecules; inverse dispersions are e**-3 to e**most."""
    rng = np.random.default_rng(1)
    m, n = 5, 200
    shares = rng.dirichlet(np.full(n, 0.8), m)
    theta = np.exp(rng.uniform(-3, most, (m, n)))
    zeta = rng.normal(-1, 3, (m, n))
    y = rng.poisson(shares * n * scale * rng.gamma(theta) / theta).astype(float)
    y[:, 0] = 1.0  # a row without counts has no mean
    # What float32 makes of the numbers is what is judged.
    theta, zeta = np.exp(np.log(theta).astype(np.float32).astype(float)), zeta.astype(np.float32).astype(float)
    logits = np.log(shares).astype(np.float32).astype(float)
    total = y.sum(axis=1, keepdims=True)
    mean = special.softmax(logits, axis=1) * total
    if link is Activation.EXP:
        logits = np.log(mean) - np.log(total)
        mean = np.exp(logits.astype(np.float32).astype(float)) * total
    score, gradient = judged(loss, link, y, mean, theta, zeta, backend)

    def terms(log_mean: Any, log_theta: Any, zeta: Any) -> Any:
        mu = np.exp(log_mean)
        if loss is Loss.POISSON:
            return -stats.poisson.logpmf(y, mu)
        t = np.exp(log_theta)
        value = -stats.nbinom.logpmf(y, t, t / (t + mu))
        if loss is Loss.ZINB:
            kept = special.log_expit(-zeta) - value
            value = -np.where(y == 0, np.logaddexp(special.log_expit(zeta), kept), kept)
        return value

    at = [np.log(mean), np.log(theta), zeta]
    expected = terms(*at).sum(axis=1)
    np.testing.assert_allclose(score, expected, rtol=1e-5)
    heads = gradient.shape[1] // n
    h = 1e-5
    for head in range(heads):
        ends = [terms(*[a + s * h * (i == head) for i, a in enumerate(at)]) for s in (1, -1)]
        slope = (ends[0] - ends[1]) / (2 * h)
        if head == 0 and link is Activation.SOFTMAX:
            slope -= mean / total * slope.sum(axis=1, keepdims=True)
        found = gradient[:, head * n : (head + 1) * n]
        # Differences of logarithms of probabilities know their own digits.
        noise = 1e-9 * np.abs(terms(*at)).max() / h
        assert np.abs(found - slope).max() <= 1e-5 * np.abs(slope).max() + noise, f"head {head}"


def test_dispersions_beyond_the_limit_are_at_the_limit() -> None:
    y, mean = np.array([[0.0, 3.0, 40.0]]), np.array([[1.0, 2.0, 40.0]])
    zeta = np.zeros((1, 3))
    for sign in (1, -1):
        at, beyond = (np.full((1, 3), np.exp(sign * limit)) for limit in (LOG_DISPERSION_LIMIT, 30.0))
        one, other = (judged(Loss.NB, Activation.EXP, y, mean, t, zeta) for t in (at, beyond))
        np.testing.assert_allclose(one[0], other[0], rtol=1e-6)
        assert np.isfinite(other[1]).all()


@pytest.mark.parametrize("backend", sorted({BACKEND, "numba"}))
@pytest.mark.parametrize("index", [np.int32, np.int64])
@pytest.mark.parametrize("value", [np.float32, np.float64])
def test_targets_are_read_as_they_lie(backend: str, index: Any, value: Any) -> None:
    """Unsorted columns, stored zeros, and several values of one, which add up; more of them than there are columns."""
    rng = np.random.default_rng(5)
    case = Case("csr", network((9, 4, 33), output=Activation.SOFTMAX, loss=Loss.ZINB, separate_target=True), rows=21)
    counts = np.full(21, 40)
    counts[4] = 0
    indptr = np.append(0, counts.cumsum())
    indices, data = rng.integers(0, 33, indptr[-1]), rng.integers(0, 5, indptr[-1])
    loose = sp.csr_array((data.astype(value), indices.astype(index), indptr.astype(index)), (21, 33))
    sorted_, dense = loose.copy(), loose.toarray()
    sorted_.sum_duplicates()
    strided = np.zeros((21, 2 * 33 + 1), value)[:, ::-2][:, :33]
    strided[...] = dense
    found = []
    for target in (loose, sorted_, dense, np.asfortranarray(dense), strided):
        program = compile_plan(case.plan, backend, n_threads=1)
        program.load(case.state(np.float32))
        X = case.data(np.float32).X
        program.bind(X, target)
        terms, gradient = program.gradient(np.arange(8))
        found.append([terms, *gradient.values(), program.apply(X, Mode.SCORE, target)])
    for other in found[1:]:
        for one, same in zip(found[0], other, strict=True):
            np.testing.assert_array_equal(one, same)
