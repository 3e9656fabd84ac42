"""Errors of rows of counts, adjusted for their totals: the formula, model files, and the column of `narrows score`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
from scipy import stats

import narrows
from cli_runs import SMALL
from cli_runs import narrows as command
from narrows.data import ArraySource
from narrows.errors import ModelFileError
from narrows.evaluation.cells import CellErrors
from narrows.plan.losses import Loss


@pytest.fixture(scope="module")
def X() -> np.ndarray:
    """300 cells of two kinds, shallow and deep; cell 5 and gene 7 have no counts."""
    rng = np.random.default_rng(0)
    shares = rng.dirichlet(np.full(25, 0.5), 2)[np.arange(300) % 2]
    counts = rng.poisson(shares * np.exp(rng.uniform(2, 6, (300, 1)))).astype(np.float32)
    counts[5], counts[:, 7] = 0, 0
    return counts


@pytest.mark.parametrize("form", [np.asarray, sp.csr_array, sp.csr_matrix])
@pytest.mark.parametrize("loss", [Loss.NB, Loss.MULTINOMIAL])
def test_errors_are_their_formula(X: np.ndarray, form: Any, loss: Loss) -> None:
    """Against SciPy, and against a line through losses that lie on one."""
    rows = np.delete(np.arange(300), 5)
    sums = X[rows].sum(axis=0, dtype=float) + 0.5
    shares, totals = sums / sums.sum(), X.sum(axis=1, dtype=float)
    alone = -(X * np.log(shares)).sum(axis=1)
    if loss is Loss.NB:
        alone = -stats.poisson.logpmf(X, totals[:, None] * shares).sum(axis=1)
    losses = alone * np.exp(-0.3 - 0.1 * np.log(np.maximum(totals, 1)) + 0.02 * np.sin(np.arange(300)))
    found = CellErrors.fit(loss, ArraySource(form(X)), losses[rows], rows)
    spread = 1.4826 * np.median(np.abs(0.02 * np.sin(rows)))
    assert (found.intercept, found.slope, found.spread) == pytest.approx((-0.3, -0.1, spread), rel=0.02, abs=5e-3)
    errors = found.of(form(X), losses)
    np.testing.assert_allclose(errors[rows], 0.02 * np.sin(rows) / spread, atol=0.3)
    assert np.isnan(errors[5])
    # A few odd cells move neither line nor spread much.
    odd = losses.copy()
    odd[10:30] *= 1.5
    assert CellErrors.fit(loss, ArraySource(form(X)), odd[rows], rows).slope == pytest.approx(-0.1, abs=0.02)


def test_no_counts_at_all() -> None:
    nothing = np.zeros((4, 3), np.float32)
    assert np.isnan(CellErrors.fit(Loss.NB, ArraySource(nothing), np.zeros(4)).of(nothing, np.zeros(4))).all()


def test_a_model_file_holds_them(X: np.ndarray, tmp_path: Path) -> None:
    model = narrows.CountAutoencoder(2, hidden_layer_sizes=8, max_iter=2, random_state=0, n_threads=1).fit(X)
    assert CellErrors.of_model(model) is None
    losses = -model.score_samples(X)
    found = CellErrors.fit(Loss.NB, ArraySource(X), losses)
    model.metadata_["cell_errors"] = found.to_dict()
    model.save(tmp_path / "m.safetensors")
    again = narrows.load(tmp_path / "m.safetensors")
    np.testing.assert_array_equal(CellErrors.of_model(again).of(X, losses), found.of(X, losses))  # type: ignore[union-attr]
    for wrong in ({"log_shares": "?"}, {"log_shares": "AAAA"}, {"slope": None}, {"spread": "inf"}):
        again.metadata_["cell_errors"] = found.to_dict() | wrong
        with pytest.raises(ModelFileError, match="cell_errors"):
            CellErrors.of_model(again)


def test_scores_of_a_file_have_both_columns(X: np.ndarray, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", X)
    out = tmp_path / "run"
    assert command("fit", tmp_path / "x.npy", "--out", out, "--estimator", "count", *SMALL) == 0
    for suffix in ("csv", "npy"):
        assert command("score", out, tmp_path / "x.npy", "-o", tmp_path / f"s.{suffix}", "--quiet") == 0
    head, *lines = (tmp_path / "s.csv").read_text().splitlines()
    assert head == ",loss,loss_z"
    found = np.array([line.split(",")[1:] for line in lines], float)
    assert all(str(np.float32(cell)) == cell for line in lines for cell in line.split(",")[1:]), "the shortest texts"
    model = narrows.load(out / "model.safetensors")
    losses = -model.score_samples(X)
    np.testing.assert_allclose(found[:, 0], losses, rtol=1e-6)
    np.testing.assert_array_equal(np.load(tmp_path / "s.npy"), found[:, 0].astype(np.float32))
    np.testing.assert_allclose(found[:, 1], CellErrors.fit(Loss.NB, ArraySource(X), losses).of(X, losses), rtol=1e-4)
