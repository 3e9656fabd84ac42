"""docs/reproduction.md from the stored results.

Promises: the page is a function of the files in `results/` alone, and needs neither data nor a native backend. Each
section is a function of an experiment's entry; one whose entry is not stored is left out. See `SECTIONS`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np

from bench.pages.benchmarks import RESULTS, ROOT, cpu, table

PAGE = ROOT / "docs" / "reproduction.md"

HINTON_PCA = 13.9
"""Squared error of a test image by 30 principal components (Hinton and Salakhutdinov, Science 313, 2006)."""
BURDA_NATS = 89.9
RIFAI = {
    "CAE": (0.73, 1.14),
    "DAE, gaussian": (0.86, 1.18),
    "DAE, masking": (7.87, 1.57),
    "AE, weight decay": (5.00, 1.68),
    "AE": (17.5, 1.78),
}
"""Mean norm of the Jacobian, in their unit of 1e-4, and test error in % (Rifai et al., ICML 2011)."""


def about(entry: dict[str, Any]) -> str:
    version = f", narrows {entry['narrows']}" if "narrows" in entry else ""
    return f"{entry['date']}, {cpu(entry)}, {entry['machine']['cores']} cores{version}."


def spread(values: list[float], form: str = ".2f") -> str:
    """Mean and, in brackets, the smallest and the largest."""
    mean = format(float(np.mean(values)), form)
    return mean if len(values) == 1 else f"{mean} [{min(values):{form}}, {max(values):{form}}]"


def stored_spread(found: dict[str, float], form: str) -> str:
    return f"{found['mean']:{form}} [{found['min']:{form}}, {found['max']:{form}}]"


def mnist_pca(entry: dict[str, Any]) -> list[str]:
    rows = [[k, f"{HINTON_PCA}" if k == "30" else "", f"{error:.2f}"] for k, error in entry["squared_error"].items()]
    return [
        "## MNIST by PCA",
        "",
        "Squared error of a test image, summed over pixels from 0 to 1, by the principal components of the training "
        "images: the yardstick of deep autoencoders, and a check that the data and the measure are those of Hinton and "
        f"Salakhutdinov (Science 313, 2006). {about(entry)}",
        "",
        *table(["components", "published", "here"], rows),
    ]


def deep(entry: dict[str, Any]) -> list[str]:
    fits = {(fit["parameters"]["n_components"], fit["start"]): fit for fit in entry["fits"]}
    most = max(k for k, _ in fits)
    rows = []
    for k in sorted({k for k, _ in fits}, reverse=True):
        found = [fits[k, start] for start in ("random", "machines")]
        cells = [f"{fit['test_error']:.2f}" for fit in found] + [f"{fit['seconds']:.0f}" for fit in found]
        published = f"{entry['published']['autoencoder']:.2f}" if k == most else ""
        rows.append([str(k), published, *cells, f"{entry['pca'][str(k)]:.2f}"])
    random, machines = (fits[most, start]["parameters"] for start in ("random", "machines"))
    widths = "-".join(map(str, (784, *random["hidden_layer_sizes"])))
    return [
        "## Deep autoencoders of MNIST",
        "",
        f"Squared error of a test image, summed over pixels from 0 to 1, by {widths}-k and its mirror. From a random "
        f"start: {random['activation']} units, {random['loss']}, tied weights; pretrained layer by layer as restricted "
        f"Boltzmann machines: {machines['activation']} units, {machines['loss']}; {random['max_iter']} epochs for "
        f"k = {most}, fewer below. Published: Hinton and Salakhutdinov, Science 313, 2006. Settings were chosen with "
        f"the test error in view. Seconds include pretraining. Seed {entry['seed']} (`bench/accuracy/deep.py`). "
        f"{about(entry)}",
        "",
        *table(
            ["k", "published", "random start", "pretrained", "seconds, random start", "seconds, pretrained", "PCA"],
            rows,
        ),
    ]


def denoising(entry: dict[str, Any]) -> list[str]:
    def row(name: str, found: dict[str, Any], seconds: str = "") -> list[str]:
        gain = found["image"] - entry["noisy"]["image"]
        return [name, f"{found['image']:.2f}", f"{found['all']:.2f}", f"{gain:+.2f}", seconds]

    titles = {
        "noisy": "PCA of noisy images",
        "clean": "PCA of clean images",
        "clean, centred": "the same, about the mean of the noisy images",
    }
    models = entry["models"]
    conv, dense = (models[name]["parameters"] for name in ("convolutional", "dense"))
    rows = [["the noisy images", f"{entry['noisy']['image']:.2f}", f"{entry['noisy']['all']:.2f}", "", ""]]
    rows += [row(f"{titles[kind]}, {found['components']} components", found) for kind, found in entry["pca"].items()]
    rows += [
        row(f"{name}, {found['weights']:,} weights", found, f"{found['seconds']:.0f}")
        for name, found in reversed(models.items())
    ]
    widths = "-".join(map(str, (784, *dense["hidden_layer_sizes"], dense["n_components"])))
    filters, strides = (", ".join(map(str, conv[key])) for key in ("filters", "strides"))
    return [
        "## Denoising Fashion-MNIST",
        "",
        f"Normal noise of standard deviation {entry['level']} on each pixel, clipped to [0, 1]; drawn once for the "
        f"{entry['images']} test images, anew in each of the {entry['epochs']} epochs for the training images. Peak "
        "signal-to-noise ratio in dB, 10 log10(1 / mean squared error): of each image, the mean over the images, which "
        "the gain over the noisy input is of, too; and of all pixels together. The convolutional autoencoder has "
        f"{filters} filters of 3 x 3 at strides {strides}, a convolutional code, and the mirror of these; the dense "
        f"one is {widths} and its mirror; both {conv['loss']}. The numbers of components, and the settings of the "
        "networks, were chosen on the last 10000 training images; PCA's images are clipped to [0, 1]. Clipped noise "
        "moves the mean of the images: the last row of PCA takes it off and puts that of the clean ones back. Seed "
        f"{entry['seed']} (`bench/accuracy/denoising.py`). {about(entry)}",
        "",
        *table(["", "of an image", "of all pixels", "gain", "seconds"], rows),
        "",
        "The first test image of each class, its noisy version, and what the convolutional autoencoder makes of that:",
        "",
        "![Ten images of clothes: clean, noisy, and with the noise taken off](images/denoising.png)",
    ]


def likelihood(entry: dict[str, Any]) -> list[str]:
    model = entry["model"]
    layers = "-".join(map(str, (784, *model["hidden_layer_sizes"], model["n_components"])))
    rows = [
        [
            f"-log p(x), {entry['importance']} draws for each image",
            f"{BURDA_NATS}",
            f"{entry['negative_log_likelihood']:.1f} (standard error {entry['standard_error']:.1f})",
        ],
        ["minus the bound", "", f"{entry['negative_elbo']:.1f}"],
    ]
    return [
        "## Binarised MNIST by a variational autoencoder",
        "",
        f"Nats for each of the {entry['images']} test images, binarised once; the training images are binarised anew "
        f"in each epoch. {layers} with {model['activation']} units, {entry['epochs']} epochs, seed {entry['seed']}, "
        f"{entry['training_seconds']:.0f} s of training (`bench/accuracy/likelihood.py`). {about(entry)}",
        "",
        *table(["", "published", "here"], rows),
    ]


def contractive(entry: dict[str, Any]) -> list[str]:
    rows, chosen = [], []
    for name, found in entry["methods"].items():
        runs = found["runs"]
        norm, error = RIFAI[name]
        rows.append(
            [
                name,
                f"{norm:.2f}e-4",
                spread([run["jacobian_norm"] for run in runs]),
                f"{error:.2f}",
                spread([100 * run["fine_tuned_error"] for run in runs]),
                spread([100 * run["linear_error"] for run in runs]),
                spread([run["seconds"] for run in runs], ".0f"),
            ]
        )
        tried = found["validation_error"]
        if len(tried) > 1:
            errors = ", ".join(f"{level}: {100 * each:.2f}" for level, each in tried.items())
            chosen.append([name, f"`{found['parameter']}`", errors, f"{found['chosen']:g}"])
    model, tuning = entry["model"], entry["fine_tuning"]
    return [
        "## Contractive autoencoders on MNIST",
        "",
        f"One layer of {model['n_components']} sigmoid units, tied weights, sigmoid outputs and cross-entropy, "
        f"{model['max_iter']} epochs of Adam; only the penalty or the corruption differs. Of the code: the mean norm "
        "of its Jacobian on the test images; the test error in % of the encoder with a softmax layer on it, trained "
        f"together for {tuning['epochs']} epochs; and that of a logistic regression on the codes. Published: Rifai, "
        "Vincent, Muller, Glorot and Bengio, *Contractive auto-encoders*, ICML 2011, whose unit of the norm is "
        "another. The networks here train for seconds and are tuned little, so it is the order that is to be compared. "
        f"{entry['seeds']} seeds. {about(entry)}",
        "",
        *table(
            ["", "norm, published", "norm", "error, published", "error, fine-tuned", "error, linear", "seconds"], rows
        ),
        "",
        "Strengths, and when to stop fine-tuning, were chosen by the error after fine-tuning on the last 10000 "
        "training images, which no classifier is trained on, with seed 0:",
        "",
        *table(["", "parameter", "candidates: validation error, %", "chosen"], chosen),
    ]


def pbmc4k(entry: dict[str, Any]) -> list[str]:
    rows = []
    for name, found in entry["models"].items():
        accuracy = found["knn_accuracy"]
        shown = (
            f"{100 * accuracy:.2f}"
            if isinstance(accuracy, float)
            else stored_spread({k: 100 * v for k, v in accuracy.items()}, ".2f")
        )
        rows.append([name, shown, stored_spread(found["seconds"], ".1f") if "seconds" in found else ""])
    return [
        "## Cell types of PBMC 4k",
        "",
        "Share of cells, in %, whose type 15 nearest neighbours in 32 dimensions tell, in 5-fold cross-validation: "
        "4271 cells x 2000 genes, log-normalised. `alpha=10` was chosen on this data, by this figure; the others are "
        f"the defaults. {entry['seeds']} seeds. {about(entry)}",
        "",
        *table(["", "accuracy", "seconds"], rows),
    ]


def thinning(entry: dict[str, Any]) -> list[str]:
    rows = [
        [
            method,
            *(spread([one[judge]["value"] for one in found], ".2f") for judge in ("poisson", "squared error")),
            "; ".join(dict.fromkeys(one[judge]["setting"] for judge in ("poisson", "squared error") for one in found)),
            f"{np.mean([one['seconds'] for one in found]):.0f}",
        ]
        for method, found in entry["methods"].items()
    ]
    seeds = len(next(iter(entry["methods"].values())))
    return [
        "## Denoising the counts of pbmc4k",
        "",
        "Molecular cross-validation (Batson, Royer and Webber, bioRxiv 786269, 2019): the molecules of each cell are "
        f"dealt into {entry['seen']:.0%} and the rest; what a method makes of the first part is judged by the second, "
        "by minus the Poisson log-likelihood (terms that depend on the method) and by the squared error of a cell. PCA "
        "is given its best transformation, number of components and least mean by each judgement, and no denoising the "
        "best least mean, chosen on every other cell; the figures are of the rest. The autoencoders are given no "
        f"choice. {seeds} ways to deal (`bench/accuracy/thinning.py`). {about(entry)}",
        "",
        *table(["method", "Poisson", "squared error", "chosen", "seconds"], rows),
    ]


def digits(entry: dict[str, Any]) -> list[str]:
    rows = [
        [
            name,
            stored_spread(found["excess_error"], ".1e"),
            stored_spread(found["angle"], ".1e"),
            stored_spread(found["seconds"], ".2f"),
        ]
        for name, found in entry["models"].items()
    ]
    return [
        "## LinearAutoencoder and PCA",
        "",
        "A linear autoencoder with squared error spans the principal subspace (Baldi and Hornik, Neural Networks 2, "
        "1989). The bundled digits: reconstruction error relative to PCA's, less one, and the largest principal "
        f"angle between the decoder and the principal axes, in radians; published: zero. "
        f"{entry['seeds']} seeds. {about(entry)}",
        "",
        *table(["data", "excess error", "angle", "seconds"], rows),
    ]


SECTIONS: tuple[tuple[str, str | None, Callable[[dict[str, Any]], list[str]]], ...] = (
    ("accuracy.json", "mnist_pca", mnist_pca),
    ("deep.json", None, deep),
    ("denoising.json", None, denoising),
    ("likelihood.json", None, likelihood),
    ("accuracy.json", "contractive", contractive),
    ("accuracy.json", "pbmc4k", pbmc4k),
    ("thinning.json", None, thinning),
    ("accuracy.json", "digits", digits),
)
"""The page from top to bottom: file, the experiment's key in it (None for all of it), and what writes the section."""


def current() -> str:
    """The page of what is stored now."""
    lines = [
        "# Reproduction",
        "",
        "What narrows reaches where others have published a figure, and beside PCA. `python bench/pages` writes this "
        "page from `bench/results/`; do not edit. `bench/README.md` says how to run the experiments. Over several "
        "seeds a figure is the mean and, in brackets, the smallest and the largest. Seconds are the time of one fit.",
    ]
    for name, key, section in SECTIONS:
        path = RESULTS / name
        found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        entry = found if key is None else found.get(key)
        if entry:
            lines += ["", *section(entry)]
    return "\n".join(lines) + "\n"


def write() -> None:
    """Write the page anew."""
    PAGE.write_text(current(), encoding="utf-8")
