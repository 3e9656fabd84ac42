"""How well autoencoders remove noise from Fashion-MNIST, beside PCA; and a picture of it.

Usage: ``python bench/accuracy/denoising.py [--data DIR] [--results DIR] [--picture FILE] [--lock FILE]``; about six
minutes on two cores. DIR, by default the folder in NARROWS_DATA, holds the images as ``fashion_mnist/*.gz``.
docs/reproduction.md shows the result.

The noise is that of the tutorials: a normal draw of standard deviation 0.5 on each pixel, then clipped to [0, 1]. The
test images get their noise once. The training images get new noise in each epoch, as pairs of noisy and clean images,
because the corruption within a fit does not clip. The last 10000 training images chose the settings of the networks,
and choose the numbers of components in each run; then everything is fitted to all 60000. Nothing uses the test images
before the end.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np
from numpy.typing import NDArray

import narrows
from bench.accuracy.likelihood import rate
from bench.data.images import Split, principal_axes
from bench.support.results import DOCS, header
from bench.support.scripts import finish, images, lock, parser, script, with_data
from narrows.plotting import plot_reconstructions

PICTURE = DOCS / "images" / "denoising.png"
LEVEL = 0.5
HELD = 10_000
"""Number of training images, the last ones, that choose the number of components."""
TEST_NOISE, HELD_NOISE = 1_000_000, 1_000_001
"""Seeds of the noise; that of the training images is the epoch."""
COMPONENTS = 5, 10, 20, 30, 40, 50, 60, 80, 100, 150
KINDS = "noisy", "clean", "clean, centred"
"""Axes and mean of noisy images; of clean images; or axes of clean images, with the mean of the noisy images before and
that of the clean images after projection. Clipping the noise moves the mean."""

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
"""Learning rates of the first and the last epoch; half a cosine lies between them."""

Array = NDArray[Any]


def noisy(X: NDArray[np.float32], seed: int) -> NDArray[np.float32]:
    noise = np.random.default_rng(seed).standard_normal(X.shape, dtype=np.float32)
    return np.clip(X + np.float32(LEVEL) * noise, 0, 1)


def psnr(rebuilt: Array, X: Array) -> dict[str, float]:
    """Peak signal-to-noise ratio in dB, 10 log10(1 / mean squared error) of pixels from 0 to 1.

    Returns
    -------
    dict
        ``image``: the ratio of each image, the mean over images; ``all``: the ratio of all pixels.
    """
    errors = np.square(np.subtract(rebuilt, X, dtype=np.float64)).mean(axis=1)
    return {"image": float(-10 * np.log10(errors).mean()), "all": float(-10 * np.log10(errors.mean()))}


def pca(clean: Array, corrupted: Array) -> Callable[[str, int, Array], Array]:
    """A function that denoises images by PCA of a kind and a number of components, and clips them to [0, 1]."""
    of_clean, of_noisy = principal_axes(clean), principal_axes(corrupted)
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
    """All figures, the noisy test images, and the test images that the convolutional autoencoder denoised."""
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
    """Draw the first test image of each kind, so that nothing is picked."""
    first = np.unique(data.labels_held, return_index=True)[1]
    ax = plot_reconstructions(
        data.X_held[first], np.asarray(rebuilt)[first], noisy=test[first], image_shape=(28, 28), n=len(first)
    )
    ax.set_title(f"Test images, noise of standard deviation {LEVEL}")
    path.parent.mkdir(exist_ok=True)
    ax.figure.savefig(path, dpi=100)  # type: ignore[union-attr]


def main() -> None:
    options_parser = with_data(parser(__doc__, locked="for an epoch at a time"))
    options_parser.add_argument("--epochs", type=int, default=12)
    options_parser.add_argument("--seed", type=int, default=0)
    options_parser.add_argument("--picture", type=Path, default=PICTURE)
    options = options_parser.parse_args()
    data = images(options_parser, options, "fashion_mnist")
    found, test, rebuilt = measure(data, options.epochs, options.seed, lambda: lock(options.lock))
    draw(data, test, rebuilt, options.picture)
    report = header(seed=options.seed, epochs=options.epochs, level=LEVEL, images=len(test)) | found
    finish(report, "denoising", options)


if __name__ == "__main__":
    script(main)
