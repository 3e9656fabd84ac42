"""Denoising of the bundled blood cells, evaluated by molecular cross-validation (Batson, Royer and Webber, 2019).

Usage: ``python bench/accuracy/thinning.py [--seeds 3] [--results DIR] [--lock FILE]``; about four minutes on two cores.
docs/reproduction.md shows the result.

The molecules of each cell are split at random into two parts, nine tenths and one tenth, which are independent given
the cell's true expression. A method sees the first part and predicts the second. Two figures compare them, both for a
cell: minus the Poisson log-likelihood of the second part (the terms that depend on the prediction), and the squared
error. Every other cell chooses a method's settings by that figure, and the reported figures are of the other cells. The
autoencoders have fixed settings.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np
from numpy.typing import NDArray
from sklearn.decomposition import PCA

from bench.support.results import header
from bench.support.scripts import finish, lock, parser, script
from narrows import Autoencoder, CountAutoencoder
from narrows.datasets import load_pbmc4k

SEEN = 0.9
FLOORS = (1e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1)
"""Least means of a count, in molecules of the first part: with a mean of zero any later molecule is impossible."""
COMPONENTS = (2, 5, 10, 15, 20, 30, 50)
COUNTS: dict[str, Any] = {"n_components": 16, "likelihood": "poisson", "max_iter": 150}
SQUARES: dict[str, Any] = {"n_components": 50, "hidden_layer_sizes": (), "activation": "linear", "max_iter": 300}
UNIT = 8.0
"""Molecules that count as one for the network with squared error."""

Means = NDArray[np.float64]
Options = Iterator[tuple[str, Means]]
"""Settings of a method, and the means that it predicts with each of them."""


def unchanged(X: Means, seed: int) -> Options:
    for floor in FLOORS:
        yield f"floor {floor:g}", np.maximum(X, floor)


def pca(X: Means, seed: int) -> Options:
    """PCA of transformed counts, scaled to one total, and back; each cell keeps its total."""
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
    """Squared error, stopped at the best loss of held-out cells."""
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


FIGURES = {"poisson": poisson, "squared error": squared}


def measure(method: str, seed: int) -> dict[str, Any]:
    counts = load_pbmc4k().toarray().astype(np.int64)
    first = np.random.default_rng(seed).binomial(counts, SEEN)
    X, Y = first.astype(np.float64), (counts - first).astype(np.float64)
    choosing, reported = np.arange(len(X)) % 2 == 0, np.arange(len(X)) % 2 == 1
    best: dict[str, dict[str, Any]] = {}
    started = time.perf_counter()
    for setting, means in METHODS[method](X, seed):
        said = means * ((1 - SEEN) / SEEN)
        for name, figure in FIGURES.items():
            found = figure(said, Y)
            chosen = float(found[choosing].mean())
            if name not in best or chosen < best[name]["chosen by"]:
                best[name] = {"value": float(found[reported].mean()), "setting": setting, "chosen by": chosen}
    return best | {"seconds": time.perf_counter() - started, "seed": seed}


def main() -> None:
    options_parser = parser(__doc__, locked="for each method")
    options_parser.add_argument("--seeds", type=int, default=3)
    options = options_parser.parse_args()
    report = header(seen=SEEN, counts=COUNTS, squares=SQUARES, methods={})
    for method in METHODS:
        found = []
        for seed in range(options.seeds):
            with lock(options.lock):
                found.append(measure(method, seed))
            print(method, found[-1], flush=True)
        report["methods"][method] = found
    finish(report, "thinning", options)


if __name__ == "__main__":
    script(main)
