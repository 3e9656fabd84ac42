"""How well autoencoders take noise off Fashion-MNIST, beside PCA; and a picture of it.

Usage: ``python bench/accuracy/denoising.py [--data DIR] [--out FILE] [--picture FILE] [--lock FILE]``; DIR, by default
what
NARROWS_DATA names, holds the images as ``fashion_mnist/*.gz``. About six minutes on two cores.

The noise is that of the tutorials: a normal draw of standard deviation 0.5 on each pixel, then clipped to [0, 1]. The
training images have new noise in each epoch, given as pairs, since the corruption within a fit does not clip; the test
images have theirs once. The number of components and the networks' settings were chosen on the last 10000 training
images, on which the former are chosen anew in each run; then everything is fitted to all 60000. Nothing about the test
images is used before the end.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from datetime import date
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np
from numpy.typing import NDArray

import narrows
from bench.accuracy.likelihood import rate
from bench.accuracy.precision import Split, mnist
from bench.pages.benchmarks import RESULTS, ROOT
from bench.support.harness import lock
from narrows.benchmark import machine
from narrows.plotting import plot_reconstructions

OUT = RESULTS / "denoising.json"
PICTURE = ROOT / "docs" / "images" / "denoising.png"
LEVEL = 0.5
HELD = 10_000
"""The last so many training images choose the number of components."""
TEST_NOISE, HELD_NOISE = 1_000_000, 1_000_001
"""Seeds; that of the training images is the epoch."""
COMPONENTS = 5, 10, 20, 30, 40, 50, 60, 80, 100, 150
KINDS = "noisy", "clean", "clean, centred"
"""Principal axes and means of noisy images; of clean ones; or axes of clean images, about the mean of the noisy ones
before, and that of the clean ones after projection: the noise is clipped, so it moves the mean."""

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "convolutional": (
        "ConvAutoencoder",
        {
            "n_components": None,
            "image_shape": (28, 28, 1),
            "filters": (32, 64, 64),
            "strides": (2, 2, 1),
            "latent_activation": "relu",
            "loss": "bce",
            "batch_size": 128,
        },
    ),
    "dense": (
        "DenoisingAutoencoder",
        {"n_components": 256, "hidden_layer_sizes": (1000,), "loss": "bce", "batch_size": 128},
    ),
}
RATES = {"convolutional": (2e-3, 2e-5), "dense": (1e-3, 1e-5)}
"""Learning rates of the first and the last epoch, along half a cosine."""

Array = NDArray[Any]


def noisy(X: NDArray[np.float32], seed: int) -> NDArray[np.float32]:
    noise = np.random.default_rng(seed).standard_normal(X.shape, dtype=np.float32)
    return np.clip(X + np.float32(LEVEL) * noise, 0, 1)


def psnr(rebuilt: Array, X: Array) -> dict[str, float]:
    """Peak signal-to-noise ratio in dB, 10 log10(1 / mean squared error) of pixels from 0 to 1.

    Returns
    -------
    dict
        ``image``: that of each image, the mean over them; ``all``: that of all pixels.
    """
    errors = np.square(np.subtract(rebuilt, X, dtype=np.float64)).mean(axis=1)
    return {"image": float(-10 * np.log10(errors).mean()), "all": float(-10 * np.log10(errors.mean()))}


def principal(X: Array) -> tuple[Array, Array]:
    """Mean and axes, the first ones first."""
    mean = X.mean(axis=0, dtype=np.float64)
    centred = X - mean
    return mean, np.linalg.eigh(centred.T @ centred)[1][:, ::-1]


def pca(clean: Array, corrupted: Array) -> Callable[[str, int, Array], Array]:
    """What takes the noise off images by the given kind and number of components, clipped to [0, 1]."""
    of_clean, of_noisy = principal(clean), principal(corrupted)
    parts = {
        "noisy": (of_noisy[0], of_noisy[1], of_noisy[0]),
        "clean": (of_clean[0], of_clean[1], of_clean[0]),
        "clean, centred": (of_noisy[0], of_clean[1], of_clean[0]),
    }

    def rebuild(kind: str, k: int, X: Array) -> Array:
        before, axes, after = parts[kind]
        return np.clip(after + (X - before) @ axes[:, :k] @ axes[:, :k].T, 0, 1)

    return rebuild


def measure(
    data: Split, epochs: int, seed: int, turn: Callable[[], AbstractContextManager[None]]
) -> tuple[dict[str, Any], Array, Array]:
    """All figures, the noisy test images, and what the convolutional autoencoder makes of them."""
    clean, held = data.X[:-HELD], data.X[-HELD:]
    test = noisy(data.X_held, TEST_NOISE)
    report: dict[str, Any] = {"noisy": psnr(test, data.X_held), "pca": {}, "models": {}}
    with turn():
        rebuild = pca(clean, noisy(clean, 0))
        held_noisy = noisy(held, HELD_NOISE)
        sizes = [k for k in COMPONENTS if k <= clean.shape[1]]
        swept = {kind: {k: psnr(rebuild(kind, k, held_noisy), held)["image"] for k in sizes} for kind in KINDS}
        rebuild = pca(data.X, noisy(data.X, 0))
        for kind, found in swept.items():
            best = max(found, key=found.__getitem__)
            result = psnr(rebuild(kind, best, test), data.X_held)
            report["pca"][kind] = {"components": best, "validation": found, **result}
            print(f"PCA, {kind}, {best} components: {result['image']:.2f} dB", flush=True)
    rebuilt = {}
    for name, (estimator, parameters) in MODELS.items():
        model = getattr(narrows, estimator)(**parameters, random_state=seed)
        seconds = 0.0
        for epoch in range(epochs):
            with turn():
                corrupted = noisy(data.X, epoch)
                begin = time.perf_counter()
                model.set_params(learning_rate_init=rate(epoch, epochs, RATES[name]))
                model.partial_fit(corrupted, data.X)
                seconds += time.perf_counter() - begin
            print(f"{name}, epoch {epoch + 1}, {seconds:.0f} s: {model.history_['loss'][-1]:.2f}", flush=True)
        with turn():
            rebuilt[name] = model.reconstruct(test)
        report["models"][name] = {
            "estimator": estimator,
            "parameters": parameters,
            "rates": RATES[name],
            "weights": sum(W.size for W in (*model.coefs_, *model.intercepts_)),
            "seconds": seconds,
            "training_loss": model.history_["loss"],
            **psnr(rebuilt[name], data.X_held),
        }
        print(f"{name}: {report['models'][name]['image']:.2f} dB", flush=True)
    return report, test, rebuilt["convolutional"]


def draw(data: Split, test: Array, rebuilt: Array, path: Path) -> None:
    """The first test image of each kind, not a choice."""
    first = np.unique(data.labels_held, return_index=True)[1]
    ax = plot_reconstructions(
        data.X_held[first], np.asarray(rebuilt)[first], noisy=test[first], image_shape=(28, 28), n=len(first)
    )
    ax.set_title(f"Test images, noise of standard deviation {LEVEL}")
    path.parent.mkdir(exist_ok=True)
    ax.figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", type=Path, default=os.environ.get("NARROWS_DATA"))
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--picture", type=Path, default=PICTURE)
    parser.add_argument("--lock", type=Path, help="file to hold a lock on for an epoch at a time, as flock(1) does")
    options = parser.parse_args()
    if options.data is None:
        parser.error("--data or NARROWS_DATA must name the folder that holds fashion_mnist/")
    data = mnist(Path(options.data), "fashion_mnist")
    found, test, rebuilt = measure(data, options.epochs, options.seed, lambda: lock(options.lock))
    about = {
        "date": date.today().isoformat(),
        "machine": machine(),
        "narrows": narrows.__version__,
        "seed": options.seed,
        "epochs": options.epochs,
        "level": LEVEL,
        "images": len(test),
    }
    options.out.write_text(json.dumps(about | found, indent=1) + "\n")
    draw(data, test, rebuilt, options.picture)


if __name__ == "__main__":
    main()
