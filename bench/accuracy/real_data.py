"""What the models reach on real data, beside PCA and published figures.

Usage: ``python bench/accuracy/real_data.py [--only NAME,NAME] [--seeds 5] [--data DIR] [--out FILE] [--lock FILE]``.
DIR, by
default what NARROWS_DATA names, holds MNIST as ``mnist/*.gz``; without it the experiments that need it are left out. An
experiment that is run replaces its entry in FILE, by default `results/accuracy.json`, from which
docs/reproduction.md is written anew.

The penalty ``alpha=10`` of the main job was chosen on its data set, by the figure that is reported; the other models of
`pbmc4k` and `digits` are the defaults.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import date
from functools import cached_property
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np
from scipy.linalg import subspace_angles
from sklearn.decomposition import PCA

import narrows
from bench.accuracy import invariance
from bench.accuracy.precision import Split, mnist
from bench.pages import reproduction as reproduction_page
from bench.pages.benchmarks import RESULTS, ROOT
from bench.support.harness import lock
from narrows.benchmark import machine
from narrows.data import ArraySource
from narrows.data.normalize import Normalizer
from narrows.datasets import load_digits, load_pbmc4k
from narrows.evaluation.metrics import knn_accuracy

OUT = RESULTS / "accuracy.json"


@dataclass
class Given:
    """What an experiment may use."""

    seeds: int
    data: Path
    turn: Callable[[], AbstractContextManager[None]]
    """A context for what takes the machine: the fits of one model, and what judges them."""

    @cached_property
    def mnist(self) -> Split:
        return mnist(self.data)


def spread(values: list[float]) -> dict[str, float]:
    return {"mean": float(np.mean(values)), "min": float(np.min(values)), "max": float(np.max(values))}


def pbmc4k(given: Given) -> dict[str, Any]:
    """Cell types from the 32-dimensional code: 15 nearest neighbours, 5 folds, against 32 principal components."""
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
        accuracy, seconds = [], []
        with given.turn():
            for seed in range(given.seeds):
                start = time.perf_counter()
                Z = model.set_params(random_state=seed).fit_transform(X)
                seconds.append(time.perf_counter() - start)
                accuracy.append(knn_accuracy(Z, labels))
        result[name] = {"knn_accuracy": spread(accuracy), "seconds": spread(seconds)}
    return {"seeds": given.seeds, "models": result}


def digits(given: Given) -> dict[str, Any]:
    """LinearAutoencoder against PCA: excess reconstruction error, and the largest principal angle in radians."""
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
    """Squared error of a test image, summed over its pixels (0 to 1), by principal components of the training set."""
    data, errors = given.mnist, {}
    with given.turn():
        start = time.perf_counter()
        mean = data.X.mean(axis=0, dtype=np.float64)
        centred = data.X - mean
        axes = np.linalg.eigh(centred.T @ centred)[1][:, ::-1]
        test = data.X_held - mean
        for k in (2, 6, 30):
            rest = test - test @ axes[:, :k] @ axes[:, :k].T
            errors[str(k)] = float((rest**2).sum(axis=1).mean())
        seconds = time.perf_counter() - start
    return {"squared_error": errors, "seconds": seconds}


def contractive(given: Given) -> dict[str, Any]:
    """Norms of Jacobians and errors of classifiers, see `invariance`."""
    return invariance.measure(given.mnist, min(given.seeds, 3), given.turn)


EXPERIMENTS = {f.__name__: f for f in (pbmc4k, digits, mnist_pca, contractive)}
NEED_DATA = {"mnist_pca", "contractive"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help=f"which, of {', '.join(EXPERIMENTS)}")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--data", type=Path, default=os.environ.get("NARROWS_DATA", ROOT.parent / "shared" / "data"))
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--lock", type=Path, help="file to hold a lock on for some minutes at a time, as flock(1) does")
    options = parser.parse_args()
    names = list(EXPERIMENTS) if options.only is None else options.only.split(",")
    if unknown := [name for name in names if name not in EXPERIMENTS]:
        parser.error(f"--only {unknown[0]}: choose from {', '.join(EXPERIMENTS)}")
    if not (options.data / "mnist").is_dir() and NEED_DATA & set(names):
        if options.only is not None:
            parser.error(f"{options.data / 'mnist'} is absent: give --data, or let NARROWS_DATA name its folder")
        names = [name for name in names if name not in NEED_DATA]
        print(f"left out, since there is no folder mnist: {', '.join(sorted(NEED_DATA))}")
    given = Given(options.seeds, options.data, lambda: lock(options.lock))
    for name in names:
        found = EXPERIMENTS[name](given)
        about = {"date": date.today().isoformat(), "machine": machine(), "narrows": narrows.__version__}
        stored = json.loads(options.out.read_text()) if options.out.exists() else {}
        options.out.write_text(json.dumps(stored | {name: about | found}, indent=1) + "\n")
        print(name, json.dumps(found, indent=1), flush=True)
    if options.out == OUT:
        reproduction_page.write()


if __name__ == "__main__":
    main()
