"""Denoising judged by molecular cross-validation on the bundled blood cells (Batson, Royer and Webber, 2019).

Usage: ``python bench/accuracy/thinning.py [--seeds 3] [--out FILE] [--lock FILE]``. About four minutes on two cores.

The molecules of each cell are dealt at random into two parts, nine tenths and one, which are independent given what
they were drawn from. A method sees the first part and says what the second will hold; it is judged by minus the Poisson
log-likelihood of the second part (the terms that depend on what was said) and by the squared error, both per cell. What
a method may choose is chosen by that judgement on every other cell, and the figures are those of the rest; the
autoencoder is given no choice.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np
from numpy.typing import NDArray
from sklearn.decomposition import PCA

from bench.pages import reproduction as reproduction_page
from bench.support.harness import RESULTS, lock
from narrows import Autoencoder, CountAutoencoder, __version__
from narrows.benchmark import machine
from narrows.datasets import load_pbmc4k

OUT = RESULTS / "thinning.json"
SEEN = 0.9
FLOORS = (1e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1)
"""Least means of a count, in molecules of the first part: without one a zero makes any later molecule impossible."""
COMPONENTS = (2, 5, 10, 15, 20, 30, 50)
COUNTS: dict[str, Any] = {"n_components": 16, "likelihood": "poisson", "max_iter": 150}
SQUARES: dict[str, Any] = {"n_components": 50, "hidden_layer_sizes": (), "activation": "linear", "max_iter": 300}
UNIT = 8.0
"""Molecules that the network of squared errors sees as one."""

Means = NDArray[np.float64]
Options = Iterator[tuple[str, Means]]
"""Settings of a method, and the means that it gives to the first part with each."""


def unchanged(X: Means, seed: int) -> Options:
    for floor in FLOORS:
        yield f"floor {floor:g}", np.maximum(X, floor)


def pca(X: Means, seed: int) -> Options:
    """Of square roots and of logarithms of counts scaled to one total, and back; each cell keeps its total."""
    library = X.sum(axis=1, keepdims=True)
    scale = np.median(library)
    scaled = X * (scale / library)
    forms: dict[str, tuple[Callable[[Means], Means], Callable[[Means], Means]]] = {
        "sqrt": (np.sqrt, np.square),
        "log1p": (np.log1p, np.expm1),
        "counts": (lambda x: x, lambda x: x),
    }
    for name, (there, back) in forms.items():
        Y = there(scaled)
        centre = Y.mean(axis=0)
        model = PCA(max(COMPONENTS), svd_solver="randomized", random_state=seed).fit(Y)
        Z = model.transform(Y)
        for k in COMPONENTS:
            means = back(np.maximum(Z[:, :k] @ model.components_[:k] + centre, 0)) * (library / scale)
            for floor in FLOORS:
                yield f"{name}, {k} components, floor {floor:g}", np.maximum(means, floor)


def count_autoencoder(X: Means, seed: int) -> Options:
    model = CountAutoencoder(**COUNTS, random_state=seed).fit(X.astype(np.float32))
    yield "", model.denoise(X.astype(np.float32)).astype(np.float64)


def autoencoder(X: Means, seed: int) -> Options:
    """By squared error, stopped where held-out cells are explained best."""
    seen = (X / UNIT).astype(np.float32)
    means = Autoencoder(**SQUARES, random_state=seed).fit(seen, X.astype(np.float32)).reconstruct(seen)
    yield "", np.maximum(means.astype(np.float64), min(FLOORS))


METHODS = {
    "no denoising": unchanged,
    "PCA": pca,
    "CountAutoencoder, Poisson": count_autoencoder,
    "Autoencoder, squared error": autoencoder,
}


def poisson(means: Means, Y: Means) -> NDArray[np.float64]:
    return (means - Y * np.log(means)).sum(axis=1)  # type: ignore[no-any-return]


def squared(means: Means, Y: Means) -> NDArray[np.float64]:
    return ((means - Y) ** 2).sum(axis=1)  # type: ignore[no-any-return]


JUDGES = {"poisson": poisson, "squared error": squared}


def measure(method: str, seed: int) -> dict[str, Any]:
    counts = load_pbmc4k().toarray().astype(np.int64)
    first = np.random.default_rng(seed).binomial(counts, SEEN)
    X, Y = first.astype(np.float64), (counts - first).astype(np.float64)
    chooses, judged = np.arange(len(X)) % 2 == 0, np.arange(len(X)) % 2 == 1
    best: dict[str, dict[str, Any]] = {}
    started = time.perf_counter()
    for setting, means in METHODS[method](X, seed):
        said = means * ((1 - SEEN) / SEEN)
        for name, judge in JUDGES.items():
            found = judge(said, Y)
            chosen = float(found[chooses].mean())
            if name not in best or chosen < best[name]["chosen by"]:
                best[name] = {"value": float(found[judged].mean()), "setting": setting, "chosen by": chosen}
    return best | {"seconds": time.perf_counter() - started, "seed": seed}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--lock", type=Path, help="file to hold a lock on for each method, as flock(1) does")
    options = parser.parse_args()
    report: dict[str, Any] = {
        "date": date.today().isoformat(),
        "machine": machine(),
        "narrows": __version__,
        "seen": SEEN,
        "counts": COUNTS,
        "squares": SQUARES,
        "methods": {},
    }
    for method in METHODS:
        found = []
        for seed in range(options.seeds):
            with lock(options.lock):
                found.append(measure(method, seed))
            print(method, found[-1], flush=True)
        report["methods"][method] = found
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    if options.out == OUT:
        reproduction_page.write()


if __name__ == "__main__":
    main()
