"""What a fit of counts is measured by: the baseline against SciPy, and the figures of `metrics.json`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
from scipy import optimize, stats

import narrows
from estimator_cases import BACKEND
from narrows import cli
from narrows.data import ArraySource
from narrows.evaluation.counts import Baseline, measure
from narrows.fitting.feed import split_rows
from narrows.plan.spec import Loss


@pytest.fixture(scope="module")
def X() -> np.ndarray:
    """Counts of 400 cells of two kinds and 25 genes, more or less dispersed; cell 5 and gene 7 have none."""
    rng = np.random.default_rng(0)
    shares = rng.dirichlet(np.full(25, 0.5), 2)[np.arange(400) % 2]
    theta = np.exp(rng.uniform(-1, 2, 25))
    mean = shares * rng.gamma(4, 50, (400, 1))
    counts = rng.poisson(mean * rng.gamma(theta, 1 / theta, mean.shape)).astype(np.float32)
    counts[5], counts[:, 7] = 0, 0
    return counts


def baseline(X: Any, rows: Any, loss: Loss) -> Baseline:
    return Baseline(ArraySource(X), rows, loss, seed=0, backend=BACKEND, n_threads=1)


def means(X: np.ndarray, rows: Any) -> np.ndarray:
    sums = X[rows].sum(axis=0, dtype=np.float64) + 0.5
    return X.sum(axis=1, dtype=np.float64, keepdims=True) * sums / sums.sum()


@pytest.mark.parametrize("form", [np.asarray, sp.csr_array])
def test_poisson_baseline_is_its_definition(X: np.ndarray, form: Any) -> None:
    rows = np.arange(0, 400, 2)
    found = baseline(form(X), rows, Loss.POISSON).losses(form(X))
    np.testing.assert_allclose(found, -stats.poisson.logpmf(X, means(X, rows)).sum(axis=1), rtol=1e-5)
    assert found[5] == 0


@pytest.mark.parametrize("loss", [Loss.NB, Loss.ZINB])
def test_dispersions_of_the_baseline_are_the_likeliest(X: np.ndarray, loss: Loss) -> None:
    rows = np.arange(0, 400, 2)
    model = baseline(sp.csr_array(X), rows, loss)
    assert model.loss is Loss.NB
    mean, t = means(X, rows), model.dispersions
    expected = -np.nan_to_num(stats.nbinom.logpmf(X, t, t / (t + mean))).sum(axis=1)
    np.testing.assert_allclose(model.losses(sp.csr_array(X)), expected, rtol=1e-4)
    for j in np.delete(np.arange(25), 7):

        def loss_of(log_t: float, j: int = j) -> float:
            t = np.exp(log_t)
            return -float(np.nan_to_num(stats.nbinom.logpmf(X[rows, j], t, t / (t + mean[rows, j]))).sum())

        best = optimize.minimize_scalar(loss_of, bounds=(-7, 7), method="bounded")
        assert loss_of(np.log(t[j])) <= best.fun + 1e-3


FIT = ["--components", "3", "--hidden", "16", "--epochs", "8", "--threads", "1", "--quiet", "--batch-size", "32"]


@pytest.mark.parametrize("estimator", ["count", "variational"])
@pytest.mark.parametrize("loss", ["poisson", "zinb"])
def test_figures_of_a_fit(X: np.ndarray, estimator: str, loss: str, tmp_path: Path) -> None:
    sp.save_npz(tmp_path / "x.npz", sp.csr_matrix(X))
    out = tmp_path / "run"
    assert (
        cli.main(["fit", str(tmp_path / "x.npz"), "--out", str(out), "--estimator", estimator, "--loss", loss, *FIT])
        == 0
    )
    metrics = json.loads((out / "metrics.json").read_text())
    model = narrows.load(out / "model.safetensors")
    trained, held = split_rows(400, 0.1, 0)
    scores = -(model.elbo(X) if estimator == "variational" else model.score_samples(X))
    assert metrics["held_out_nll_per_row"] == pytest.approx(scores[held].mean(), rel=1e-5)
    assert metrics["held_out_nll_per_row"] == pytest.approx(metrics["val_loss"], rel=1e-5)
    assert metrics["nll_per_row"] == pytest.approx(scores.mean(), rel=1e-5)
    assert metrics["nll_per_count"] == pytest.approx(scores.sum() / X.sum(), rel=1e-5)
    alone = baseline(X, trained, Loss[loss.upper()]).losses(X)
    assert metrics["held_out_baseline_nll_per_row"] == pytest.approx(alone[held].mean(), rel=1e-5)
    assert metrics["baseline_nll_per_count"] == pytest.approx(alone.sum() / X.sum(), rel=1e-5)
    assert metrics["baseline"] == ("poisson" if loss == "poisson" else "nb")
    rows = metrics["row_losses"]
    assert sum(rows["model"]) == sum(rows["baseline"]) == len(held)
    assert len(rows["edges"]) == len(rows["model"]) + 1
    assert "mse_per_feature" not in metrics
    assert metrics["baseline_pca_loss"] is None
    logged = (out / "run.log").read_text()
    assert f"{metrics['held_out_nll_per_row']:.5g} nats per row on held-out rows" in logged


def test_without_rows_held_out(X: np.ndarray) -> None:
    model = narrows.CountAutoencoder(2, hidden_layer_sizes=8, max_iter=2, early_stopping=False, random_state=0).fit(X)
    found = measure(model, ArraySource(X), None, seed=0, n_threads=1, step_bytes=10_000)
    assert found["held_out_nll_per_row"] is None
    assert found["held_out_baseline_nll_per_count"] is None
    assert found["nll_per_row"] == pytest.approx(-model.score(X), rel=1e-5)
    assert sum(found["row_losses"]["model"]) == 400
    nothing = np.zeros((20, 4), np.float32)
    model = narrows.CountAutoencoder(2, hidden_layer_sizes=4, max_iter=1, early_stopping=False).fit(nothing)
    found = measure(model, ArraySource(nothing), None, seed=0, n_threads=1, step_bytes=10_000)
    assert found["nll_per_row"] == found["baseline_nll_per_row"] == 0
    assert found["nll_per_count"] is None


def test_neighbours_are_told_beside_pca_of_logarithms(X: np.ndarray, tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", X=X, labels=np.arange(400) % 2)
    options = ["--out", str(tmp_path / "o"), "--loss", "nb", *FIT, "--epochs", "30"]
    assert cli.main(["fit", str(tmp_path / "x.npz"), *options]) == 0
    metrics = json.loads((tmp_path / "o" / "metrics.json").read_text())
    assert metrics["knn_accuracy_pca"] > 0.9
    assert metrics["knn_accuracy_latent"] > 0.9
    assert metrics["baseline_pca_rows"] == 400


def test_sweep_of_counts(X: np.ndarray, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    sp.save_npz(tmp_path / "x.npz", sp.csr_matrix(X))
    args = [a for a in FIT if a not in ("--components", "3")]
    out = tmp_path / "o"
    assert (
        cli.main(["sweep", str(tmp_path / "x.npz"), "--out", str(out), "--components", "1,2", "--loss", "nb", *args])
        == 0
    )
    found = json.loads((out / "sweep.json").read_text())
    assert found["pca_rows"] is None
    for row in found["sizes"]:
        assert row["held_out_nll_per_row"] == pytest.approx(row["val_loss"], rel=1e-5)
        assert row["pca_held_out_mse_per_feature"] is None
    head = capsys.readouterr().out.splitlines()[0]
    assert "held-out NLL" in head
    assert "MSE" not in head
    text = (out / "report.html").read_text()
    assert "each feature's share" in text.replace("&#39;", "'")
