"""How likely binarised MNIST is under a variational autoencoder: importance-sampled log-likelihood of the test images.

Usage: ``python bench/accuracy/likelihood.py [--epochs 150] [--data DIR] [--results DIR] [--lock FILE]``; about four
minutes on two cores. DIR, by default the folder in NARROWS_DATA, holds MNIST as ``mnist/*.gz``. docs/reproduction.md
shows the result.

Each epoch binarises the training images again: a pixel is the probability of a one (Salakhutdinov and Murray, ICML
2008). The test images are binarised once. Nothing uses the test images before the end.
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

from bench.support.results import header
from bench.support.scripts import finish, images, lock, parser, script, with_data
from narrows import VariationalAutoencoder

TARGET = 90.0
"""Nats; the published figure for such models is 89.9."""

MODEL: dict[str, Any] = {
    "n_components": 40,
    "hidden_layer_sizes": (500, 500),
    "activation": "relu",
    "loss": "bce",
    "batch_size": 200,
    "kl_warmup": 10,
}
TURN = 60.0
"""Seconds after which the lock is released for others."""

RATES = 1e-3, 2e-5
"""Learning rates of the first and the last epoch; half a cosine lies between them."""


def binarised(X: NDArray[np.float32], seed: int) -> NDArray[np.float32]:
    """Zeros and ones, drawn with the pixels as probabilities."""
    return (np.random.default_rng(seed).random(X.shape, dtype=np.float32) < X).astype(np.float32)


def rate(epoch: int, epochs: int, rates: tuple[float, float] = RATES) -> float:
    """Learning rate of an epoch."""
    first, last = rates
    return last + (first - last) * (1 + math.cos(math.pi * epoch / epochs)) / 2


def main() -> None:
    options_parser = with_data(parser(__doc__, locked="for a minute at a time"))
    options_parser.add_argument("--epochs", type=int, default=150)
    options_parser.add_argument("--importance", type=int, default=1000, help="draws for each test image")
    options_parser.add_argument("--images", type=int, default=10_000, help="test images to use, the first ones")
    options_parser.add_argument("--seed", type=int, default=0)
    options_parser.add_argument("--set", type=json.loads, default={}, help="other parameters of the model, as JSON")
    options = options_parser.parse_args()
    data = images(options_parser, options)
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
    report = header(
        model=parameters,
        epochs=options.epochs,
        seed=options.seed,
        images=len(held),
        importance=options.importance,
        negative_log_likelihood=float(-values.mean()),
        standard_error=float(values.std() / np.sqrt(len(values))),
        negative_elbo=float(-bound.mean()),
        target=TARGET,
        training_loss=model.history_["loss"],
        training_kl=model.history_["kl"],
        training_seconds=seconds,
    )
    print({key: report[key] for key in ("negative_log_likelihood", "standard_error", "negative_elbo")})
    finish(report, "likelihood", options)


if __name__ == "__main__":
    script(main)
