"""How well deep autoencoders rebuild MNIST, from a random start and pretrained by Boltzmann machines, beside PCA.

Usage: ``python bench/accuracy/deep.py [--data DIR] [--results DIR] [--lock FILE]``; about eight minutes on two cores.
DIR, by default the folder in NARROWS_DATA, holds MNIST as ``mnist/*.gz``. docs/reproduction.md shows the result.

The networks are 784-1000-500-250-k, as in Hinton and Salakhutdinov, Science 313, 2006. For k = 30 they report a squared
error of 3.00 for a test image, summed over pixels from 0 to 1, and 13.87 for PCA. The pretrained networks are theirs,
with sigmoid units and a linear code. The networks with a random start have a newer activation and tied weights; without
tied weights they overfit (3.03 instead of 2.8). Within a fit, the test images decide nothing.
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

from bench.data.images import principal_axes
from bench.support.results import header
from bench.support.scripts import finish, images, lock, parser, script, with_data
from narrows import DeepAutoencoder

Floats = NDArray[np.float32]
PUBLISHED = {"autoencoder": 3.00, "pca": 13.87}
"""Squared error of a test image for 30 components."""

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
"""Epochs by number of components."""


def squared_error(rebuilt: Floats, X: Floats) -> float:
    """Squared error summed over pixels, the mean over images."""
    return float(np.square(rebuilt - X, dtype=np.float64).sum(axis=1).mean())


def pca_error(held: Floats, mean: NDArray[np.float64], axes: NDArray[np.float64]) -> float:
    """Squared error of held-out images, rebuilt from the given principal axes."""
    rest = (held - mean) - (held - mean) @ axes @ axes.T
    return float(np.square(rest).sum(axis=1).mean())


def main() -> None:
    options_parser = with_data(parser(__doc__, locked="during the run"))
    options_parser.add_argument("--components", type=int, nargs="+", default=list(EPOCHS))
    options_parser.add_argument("--starts", nargs="+", choices=list(STARTS), default=list(STARTS))
    options_parser.add_argument("--epochs", type=int, help="instead of the usual number")
    options_parser.add_argument("--seed", type=int, default=0)
    options_parser.add_argument("--set", type=json.loads, default={}, help="other parameters, as JSON")
    options = options_parser.parse_args()
    data = images(options_parser, options)
    report = header(seed=options.seed, published=PUBLISHED, pca={}, fits=[])
    with lock(options.lock):
        mean, axes = principal_axes(data.X)
        for k in options.components:
            report["pca"][str(k)] = pca_error(data.X_held, mean, axes[:, :k])
            print(f"{k} components: PCA {report['pca'][str(k)]:.2f}", flush=True)
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
    finish(report, "deep", options)


if __name__ == "__main__":
    script(main)
