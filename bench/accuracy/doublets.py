"""Which score of a cell under a model of counts finds doublets, and does not measure depth instead?

Usage: ``python bench/accuracy/doublets.py [--seeds 3] [--results DIR] [--lock FILE]``; a few minutes on two cores.
docs/reproduction.md shows the result.

The data are the bundled blood cells and, for each ten of them, one simulated doublet: the sum of two random cells. Its
molecules are all kept, or half of them at random, so that a doublet is as deep as a cell. `narrows.scanpy.autoencoder`
is fitted to cells and doublets together, as on real data. Each score is computed from what it writes.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import anndata
import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray
from scipy.special import xlogy
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score

import narrows
from bench.support.results import header
from bench.support.scripts import finish, lock, parser, script
from narrows.datasets import load_pbmc4k

MODEL: dict[str, Any] = {"estimator": "count", "n_components": 32, "max_iter": 20}
SHARE = 0.1
"""Doublets for each cell."""
NEIGHBOURS = 200
"""Cells of the same depth, for the z-score."""
DRAWS = 3
"""Simulated counts of each cell, for the expected deviance."""

Scores = NDArray[np.float64]


def z_score(losses: Scores, depth: Scores) -> Scores:
    """Distance from the median loss of the cells of nearest depth, in units of their deviation from it."""
    order = np.argsort(depth, kind="stable")
    found = np.empty(len(losses))
    for place, cell in enumerate(order):
        first = min(max(0, place - NEIGHBOURS // 2), max(0, len(order) - NEIGHBOURS))
        near = losses[order[first : first + NEIGHBOURS]]
        middle = np.median(near)
        found[cell] = (losses[cell] - middle) / (1.4826 * np.median(np.abs(near - middle)))
    return found


def deviance(y: Any, mean: Any, theta: Any) -> Any:
    """Deviance residuals of negative binomial counts, squared (McCullagh and Nelder, 1989)."""
    return 2 * (xlogy(y, y / mean) - (y + theta) * np.log((y + theta) / (mean + theta)))


def against_expectation(y: Scores, mean: Scores, theta: Scores, seed: int) -> Scores:
    """Deviance of each cell minus its expectation under the model, in units of its standard deviation."""
    rng = np.random.default_rng(seed)
    found = np.empty(len(y))
    for i in range(len(y)):
        m = mean[i] + 1e-10
        drawn = deviance(rng.poisson(rng.gamma(theta, m / theta, (DRAWS, len(m)))), m, theta)
        variance = drawn.var(axis=0, ddof=1).sum()
        found[i] = (deviance(y[i], m, theta).sum() - drawn.mean(axis=0).sum()) / np.sqrt(variance)
    return found


def measure(kept: float, seed: int) -> dict[str, Any]:
    stored, kinds = load_pbmc4k(return_labels=True)
    counts, rng = stored.toarray().astype(np.int64), np.random.default_rng(seed)
    n_cells = len(counts)
    parents = rng.choice(n_cells, (int(SHARE * n_cells), 2))
    doublets = rng.binomial(counts[parents[:, 0]] + counts[parents[:, 1]], kept)
    mixed = kinds[parents[:, 0]] != kinds[parents[:, 1]]
    y = np.vstack([counts, doublets]).astype(np.float32)
    adata = anndata.AnnData(sp.csr_matrix(y))
    narrows.scanpy.autoencoder(adata, layers=True, random_state=seed, **MODEL)
    losses, depth, detected = np.asarray(adata.obs["ae_loss"], np.float64), y.sum(axis=1), (y > 0).sum(axis=1)
    means, theta = adata.layers["ae_denoised"].astype(np.float64), np.asarray(adata.var["ae_dispersion"])
    scores = {
        "loss": losses,
        "z-score against cells of the same depth": z_score(losses, depth),
        "deviance against its expectation": against_expectation(y.astype(np.float64), means, theta, seed),
        "adjusted relative loss": np.asarray(adata.obs["ae_recon_error"], np.float64),
    }
    doublet = np.arange(len(y)) >= n_cells
    between = np.concatenate([np.ones(n_cells, bool), mixed])
    return {
        name: {
            "auc": float(roc_auc_score(doublet, score)),
            "auc_mixed": float(roc_auc_score(doublet[between], score[between])),
            "spearman_depth": float(spearmanr(score[:n_cells], depth[:n_cells])[0]),
            "spearman_detected": float(spearmanr(score[:n_cells], detected[:n_cells])[0]),
        }
        for name, score in scores.items()
    }


def main() -> None:
    options_parser = parser(__doc__, locked="for each fit")
    options_parser.add_argument("--seeds", type=int, default=3)
    options = options_parser.parse_args()
    report = header(["anndata"], model=MODEL, share=SHARE, cases={})
    for name, kept in (("all molecules", 1.0), ("half of the molecules", 0.5)):
        found = []
        for seed in range(options.seeds):
            with lock(options.lock):
                found.append(measure(kept, seed))
            print(name, found[-1], flush=True)
        report["cases"][name] = found
    finish(report, "doublets", options)


if __name__ == "__main__":
    script(main)
