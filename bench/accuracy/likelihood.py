"""How likely a variational autoencoder finds binarised MNIST: importance-sampled log-likelihood of the test images.

Usage: ``python bench/accuracy/likelihood.py [--epochs 150] [--data DIR] [--out FILE] [--lock FILE]``; DIR, by default
what
NARROWS_DATA names, holds MNIST as ``mnist/*.gz``. About four minutes on two cores.

Each epoch sees the training images binarised anew, pixels being probabilities (Salakhutdinov and Murray, ICML 2008);
the test images are binarised once. Nothing about the test images is used before the end.
"""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np
from numpy.typing import NDArray

from bench.accuracy.precision import with_mnist
from bench.support.harness import RESULTS, about, arguments, lock, store
from narrows import VariationalAutoencoder

OUT = RESULTS / "likelihood.json"
TARGET = 90.0
"""Nats; published for such models: 89.9."""

MODEL: dict[str, Any] = {
    "n_components": 40,
    "hidden_layer_sizes": (500, 500),
    "activation": "relu",
    "loss": "bce",
    "batch_size": 200,
    "kl_warmup": 10,
}
TURN = 60.0
"""Seconds after which the lock is given to others."""

RATES = 1e-3, 2e-5
"""Learning rates of the first and the last epoch, along half a cosine."""


def binarised(X: NDArray[np.float32], seed: int) -> NDArray[np.float32]:
    """Zeros and ones, drawn with the pixels as probabilities."""
    return (np.random.default_rng(seed).random(X.shape, dtype=np.float32) < X).astype(np.float32)


def rate(epoch: int, epochs: int, rates: tuple[float, float] = RATES) -> float:
    first, last = rates
    return last + (first - last) * (1 + math.cos(math.pi * epoch / epochs)) / 2


def main() -> None:
    parser = arguments(__doc__, OUT, " for a minute at a time")
    parser.add_argument("--epochs", type=int, default=150)
    parser.add_argument("--importance", type=int, default=1000, help="draws for each test image")
    parser.add_argument("--images", type=int, default=10_000, help="test images to judge, the first ones")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", type=json.loads, default={}, help="other parameters of the model, as JSON")
    options, data = with_mnist(parser)
    held = binarised(data.X_held, 1_000_000)[: options.images]
    parameters = MODEL | options.set
    model = VariationalAutoencoder(**parameters, random_state=options.seed)
    seconds = 0.0
    epoch = 0
    while epoch < options.epochs:
        with lock(options.lock):
            begin = time.perf_counter()
            while epoch < options.epochs and time.perf_counter() - begin < TURN:
                model.set_params(learning_rate_init=rate(epoch, options.epochs))
                model.partial_fit(binarised(data.X, epoch))
                epoch += 1
            seconds += time.perf_counter() - begin
        kl = model.history_["kl"][-1]
        print(f"epoch {epoch}, {seconds:.0f} s: {model.history_['loss'][-1] + kl:.2f} nats, of which kl {kl:.2f}")
    likelihoods, bounds = [], []
    for part in np.array_split(held, max(1, len(held) // 2500)):
        with lock(options.lock):
            likelihoods.append(model.log_likelihood(part, n_importance=options.importance))
            bounds.append(model.elbo(part, n_samples=10))
    values, bound = np.concatenate(likelihoods), np.concatenate(bounds)
    report = about(options) | {
        "model": parameters,
        "epochs": options.epochs,
        "seed": options.seed,
        "images": len(held),
        "importance": options.importance,
        "negative_log_likelihood": float(-values.mean()),
        "standard_error": float(values.std() / np.sqrt(len(values))),
        "negative_elbo": float(-bound.mean()),
        "target": TARGET,
        "training_loss": model.history_["loss"],
        "training_kl": model.history_["kl"],
        "training_seconds": seconds,
    }
    print({k: v for k, v in report.items() if not k.startswith("training_l") and k not in ("training_kl", "machine")})
    store(report, options.out)


if __name__ == "__main__":
    main()
