"""How well deep autoencoders rebuild MNIST, from a random start and pretrained by Boltzmann machines, beside PCA.

Usage: ``python bench/accuracy/deep.py [--data DIR] [--out FILE] [--lock FILE]``; DIR, by default what NARROWS_DATA
names, holds
MNIST as ``mnist/*.gz``. About eight minutes on two cores.

The networks are 784-1000-500-250-k, as in Hinton and Salakhutdinov, Science 313, 2006, who report for k = 30 a squared
error of 3.00 an image, summed over pixels from 0 to 1, of the 10000 test images; and 13.87 for PCA. The pretrained ones
are theirs, of sigmoid units and a linear code; those from a random start have an activation of later years, and tied
weights, without which they overfit (3.03 instead of 2.8). The test images decide nothing within a fit.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np
from numpy.typing import NDArray

from bench.accuracy.precision import with_mnist
from bench.support.harness import RESULTS, about, arguments, lock, store
from narrows import DeepAutoencoder

OUT = RESULTS / "deep.json"
PUBLISHED = {"autoencoder": 3.00, "pca": 13.87}
"""Squared error of a test image, for 30 components."""

SHARED: dict[str, Any] = {
    "hidden_layer_sizes": (1000, 500, 250),
    "output_activation": "sigmoid",
    "learning_rate": "cosine",
    "learning_rate_init": 3e-3,
    "early_stopping": False,
    "batch_size": 256,
    "n_threads": 2,
}
STARTS: dict[str, dict[str, Any]] = {
    "random": {
        "pretrain": None,
        "activation": "silu",
        "tied_weights": True,
        "loss": "mse",
        "learning_rate_init": 2e-3,
    },
    "machines": {"pretrain": "rbm", "activation": "sigmoid", "loss": "bce"},
}
EPOCHS = {30: 50, 6: 20, 2: 20}
"""By components."""


def squared_error(rebuilt: NDArray[np.float32], X: NDArray[np.float32]) -> float:
    """Sum over pixels, mean over images."""
    return float(np.square(rebuilt - X, dtype=np.float64).sum(axis=1).mean())


def pca_error(X: NDArray[np.float32], held: NDArray[np.float32], n_components: int) -> float:
    mean = X.mean(axis=0, dtype=np.float64)
    centred = X - mean
    axes = np.linalg.eigh(centred.T @ centred)[1][:, -n_components:]
    rest = (held - mean) - (held - mean) @ axes @ axes.T
    return float(np.square(rest).sum(axis=1).mean())


def main() -> None:
    parser = arguments(__doc__, OUT, "")
    parser.add_argument("--components", type=int, nargs="+", default=list(EPOCHS))
    parser.add_argument("--starts", nargs="+", choices=list(STARTS), default=list(STARTS))
    parser.add_argument("--epochs", type=int, help="instead of the usual number")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", type=json.loads, default={}, help="other parameters, as JSON")
    options, data = with_mnist(parser)
    report = about(options) | {
        "seed": options.seed,
        "published": PUBLISHED,
        "pca": {},
        "fits": [],
    }
    with lock(options.lock):
        for k in options.components:
            report["pca"][k] = pca_error(data.X, data.X_held, k)
            print(f"{k} components: PCA {report['pca'][k]:.2f}", flush=True)
            for start in options.starts:
                epochs = options.epochs or EPOCHS.get(k, 50)
                parameters = SHARED | STARTS[start] | {"n_components": k, "max_iter": epochs} | options.set
                model = DeepAutoencoder(**parameters, random_state=options.seed)
                begin = time.perf_counter()
                model.fit(data.X)
                seconds = time.perf_counter() - begin
                layers = getattr(model, "pretrain_history_", [])
                found = {
                    "start": start,
                    "parameters": parameters,
                    "seconds": seconds,
                    "pretraining_seconds": sum(sum(layer["seconds"]) for layer in layers),
                    "test_error": squared_error(model.reconstruct(data.X_held), data.X_held),
                    "training_error": squared_error(model.reconstruct(data.X[:10_000]), data.X[:10_000]),
                    "training_loss": model.history_["loss"],
                }
                report["fits"].append(found)
                print(f"  {start}: test {found['test_error']:.3f}, {epochs} epochs, {seconds:.0f} s", flush=True)
            store(report, options.out)


if __name__ == "__main__":
    main()
