"""What the models reach on real data, beside PCA and published figures.

Usage: ``python bench/accuracy/real_data.py [--only NAME,NAME] [--seeds 5] [--data DIR] [--results DIR] [--lock FILE]``.
DIR, by default the folder in NARROWS_DATA, holds MNIST as ``mnist/*.gz``; only some experiments need it. Each
experiment has its own result. docs/reproduction.md shows the results.

The penalty ``alpha=10`` in `pbmc4k` was chosen on its data set by the reported figure. All other models have default
settings.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np
from scipy.linalg import subspace_angles
from sklearn.decomposition import PCA

import narrows
from bench.accuracy import invariance
from bench.accuracy.deep import pca_error
from bench.data.images import Split, principal_axes
from bench.support.results import header
from bench.support.scripts import chosen, finish, images, lock, parser, script, with_data
from narrows.data import ArraySource
from narrows.data.normalize import Normalizer
from narrows.datasets import load_digits, load_pbmc4k
from narrows.evaluation.metrics import knn_accuracy


@dataclass
class Given:
    """What an experiment gets."""

    seeds: int
    mnist: Split | None
    """Only for the experiments in `NEED_MNIST`."""
    turn: Callable[[], AbstractContextManager[None]]
    """A context for work that needs the machine: the fits of one model and its evaluation."""


def spread(values: list[float]) -> dict[str, float]:
    return {"mean": float(np.mean(values)), "min": float(np.min(values)), "max": float(np.max(values))}


def pbmc4k(given: Given) -> dict[str, Any]:
    """Cell types predicted from 32-dimensional codes by 15 nearest neighbours, in 5 folds, beside PCA."""
    counts, labels = load_pbmc4k(return_labels=True)
    X = Normalizer("log1p").fit(ArraySource(counts)).transform(counts).toarray()
    with given.turn():
        result: dict[str, Any] = {
            "PCA": {"knn_accuracy": knn_accuracy(PCA(32, random_state=0).fit_transform(X), labels)}
        }
    models = {
        "Autoencoder": narrows.Autoencoder(32),
        "DenoisingAutoencoder": narrows.DenoisingAutoencoder(32),
        "DenoisingAutoencoder, alpha=10": narrows.DenoisingAutoencoder(32, alpha=10.0),
    }
    for name, model in models.items():
        accuracy: list[float] = []
        seconds: list[float] = []
        with given.turn():
            for seed in range(given.seeds):
                start = time.perf_counter()
                Z = model.set_params(random_state=seed).fit_transform(X)
                seconds.append(time.perf_counter() - start)
                accuracy.append(knn_accuracy(Z, labels) or 0.0)
        result[name] = {"knn_accuracy": spread(accuracy), "seconds": spread(seconds)}
    return {"seeds": given.seeds, "models": result}


def digits(given: Given) -> dict[str, Any]:
    """LinearAutoencoder beside PCA: excess reconstruction error, and the largest principal angle in radians."""
    raw = load_digits()
    result: dict[str, Any] = {}
    for scale, X in {"raw": raw, "over 16": raw / 16}.items():
        with given.turn():
            for k in (10, 16, 32):
                pca = PCA(k).fit(X)
                best = float(((X - pca.inverse_transform(pca.transform(X))) ** 2).mean())
                excess, angle, seconds = [], [], []
                for seed in range(given.seeds):
                    start = time.perf_counter()
                    ae = narrows.LinearAutoencoder(k, random_state=seed).fit(X)
                    seconds.append(time.perf_counter() - start)
                    excess.append(float(((X - ae.reconstruct(X)) ** 2).mean()) / best - 1)
                    angle.append(float(subspace_angles(ae.coefs_[-1].T.astype(float), pca.components_.T)[0]))
                result[f"{scale}, {k} components"] = {
                    "excess_error": spread(excess),
                    "angle": spread(angle),
                    "seconds": spread(seconds),
                }
    return {"seeds": given.seeds, "models": result}


def mnist_pca(given: Given) -> dict[str, Any]:
    """Squared error of a test image, summed over pixels from 0 to 1, by principal components of the training set."""
    data, errors = given.mnist, {}
    assert data is not None
    with given.turn():
        start = time.perf_counter()
        mean, axes = principal_axes(data.X)
        for k in (2, 6, 30):
            errors[str(k)] = pca_error(data.X_held, mean, axes[:, :k])
        seconds = time.perf_counter() - start
    return {"squared_error": errors, "seconds": seconds}


def contractive_codes(given: Given) -> dict[str, Any]:
    """Norms of Jacobians and errors of classifiers, see `invariance`."""
    assert given.mnist is not None
    return invariance.measure(given.mnist, min(given.seeds, 3), given.turn)


EXPERIMENTS = {f.__name__: f for f in (pbmc4k, digits, mnist_pca, contractive_codes)}
NEED_MNIST = {"mnist_pca", "contractive_codes"}


def main() -> None:
    options_parser = with_data(parser(__doc__, locked="for some minutes at a time"))
    options_parser.add_argument("--only", help=f"comma-separated, by default all: {', '.join(EXPERIMENTS)}")
    options_parser.add_argument("--seeds", type=int, default=5)
    options = options_parser.parse_args()
    names = chosen(options_parser, "--only", options.only, tuple(EXPERIMENTS))
    mnist = images(options_parser, options) if NEED_MNIST & set(names) else None
    given = Given(options.seeds, mnist, lambda: lock(options.lock))
    for name in names:
        found = EXPERIMENTS[name](given)
        finish(header(**found), name, options)
        print(name, json.dumps(found, indent=1), flush=True)


if __name__ == "__main__":
    script(main)
