"""What the models reach on real data, beside PCA.

Usage: ``python bench/accuracy.py [--seeds 5] [--out bench/results/accuracy.json]``. Each figure is the mean over seeds
with the smallest and the largest. The penalty ``alpha=10`` of the main job was chosen on this data set, by this figure;
the other models are the defaults.
"""

from __future__ import annotations

import argparse
import json
import time
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from scipy.linalg import subspace_angles
from sklearn.decomposition import PCA

import narrows
from harness import machine
from narrows.cli.evaluation import knn_accuracy
from narrows.data import ArraySource
from narrows.datasets import load_digits, load_pbmc4k
from narrows.normalize import Normalizer


def spread(values: list[float]) -> dict[str, float]:
    return {"mean": float(np.mean(values)), "min": float(np.min(values)), "max": float(np.max(values))}


def pbmc4k(seeds: int) -> dict[str, Any]:
    """Cell types from the 32-dimensional code: 15 nearest neighbours, 5 folds, against 32 principal components."""
    counts, labels = load_pbmc4k(return_labels=True)
    source = ArraySource(counts)
    X = Normalizer("log1p").fit(source).transform(counts).toarray()
    codes = PCA(32, random_state=0).fit_transform(X)
    result: dict[str, Any] = {"PCA": {"knn_accuracy": knn_accuracy(codes, labels)}}
    models = {
        "Autoencoder": narrows.Autoencoder(32),
        "DenoisingAutoencoder": narrows.DenoisingAutoencoder(32),
        "DenoisingAutoencoder, alpha=10": narrows.DenoisingAutoencoder(32, alpha=10.0),
    }
    for name, model in models.items():
        accuracy, seconds = [], []
        for seed in range(seeds):
            start = time.perf_counter()
            Z = model.set_params(random_state=seed).fit_transform(X)
            seconds.append(time.perf_counter() - start)
            accuracy.append(knn_accuracy(Z, labels))
        result[name] = {"knn_accuracy": spread(accuracy), "seconds": spread(seconds)}
    return result


def digits(seeds: int) -> dict[str, Any]:
    """LinearAutoencoder against PCA: excess reconstruction error, and the largest principal angle in radians."""
    raw = load_digits()
    result: dict[str, Any] = {}
    for scale, X in {"raw": raw, "over 16": raw / 16}.items():
        for k in (10, 16, 32):
            pca = PCA(k).fit(X)
            best = float(((X - pca.inverse_transform(pca.transform(X))) ** 2).mean())
            excess, angle = [], []
            for seed in range(seeds):
                ae = narrows.LinearAutoencoder(k, random_state=seed).fit(X)
                excess.append(float(((X - ae.reconstruct(X)) ** 2).mean()) / best - 1)
                angle.append(float(subspace_angles(ae.coefs_[-1].T.astype(float), pca.components_.T)[0]))
            result[f"{scale}, {k} components"] = {"excess_error": spread(excess), "angle": spread(angle)}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "accuracy.json")
    options = parser.parse_args()
    report = {"date": date.today().isoformat(), "machine": machine(), "narrows": narrows.__version__}
    for experiment in (pbmc4k, digits):
        report[experiment.__name__] = experiment(options.seeds)
        print(experiment.__name__, json.dumps(report[experiment.__name__], indent=1))
    options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
