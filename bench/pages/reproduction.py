"""docs/reproduction.md from the results of the experiments in `bench/accuracy/`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from bench.pages.tables import Part, section
from bench.support.results import Report, reports

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
"""Mean norm of the Jacobian in units of 1e-4, and test error in % (Rifai et al., ICML 2011)."""


def spread(values: Sequence[float], form: str = ".2f") -> str:
    """Mean and, in brackets, the smallest and the largest."""
    mean = format(float(np.mean(values)), form)
    return mean if len(values) == 1 else f"{mean} [{min(values):{form}}, {max(values):{form}}]"


def stored_spread(found: Mapping[str, float], form: str, scale: float = 1) -> str:
    mean, low, high = (format(scale * found[key], form) for key in ("mean", "min", "max"))
    return f"{mean} [{low}, {high}]"


def mnist_pca(entry: Report) -> Part:
    rows = [[k, f"{HINTON_PCA}" if k == "30" else "", f"{error:.2f}"] for k, error in entry["squared_error"].items()]
    text = [
        "Squared error of a test image, summed over pixels from 0 to 1, by the principal components of the training "
        "images. Deep autoencoders are compared with this figure. It also checks that the data and the measure are "
        "those of Hinton and Salakhutdinov (Science 313, 2006)."
    ]
    return Part(text, ["components", "published", "here"], rows, keys=2)


def deep(entry: Report) -> Part:
    fits = {(fit["parameters"]["n_components"], fit["start"]): fit for fit in entry["fits"]}
    most = max(k for k, _ in fits)
    starts = list(dict.fromkeys(start for _, start in fits))
    rows = []
    for k in sorted({k for k, _ in fits}, reverse=True):
        found = [fits[k, start] for start in starts]
        cells = [f"{fit['test_error']:.2f}" for fit in found] + [f"{fit['seconds']:.0f}" for fit in found]
        published = f"{entry['published']['autoencoder']:.2f}" if k == most else ""
        rows.append([str(k), published, *cells, f"{entry['pca'][str(k)]:.2f}"])
    first = fits[most, starts[0]]["parameters"]
    widths = "-".join(map(str, (784, *first["hidden_layer_sizes"])))
    titles = {"random": "random start", "machines": "pretrained"}
    settings = []
    for start in starts:
        parameters = fits[most, start]["parameters"]
        tied = ", tied weights" if parameters.get("tied_weights") else ""
        settings.append(f"- {titles[start]}: {parameters['activation']} units, {parameters['loss']}{tied}")
    text = [
        f"Squared error of a test image, summed over pixels from 0 to 1, by {widths}-k and its mirror. "
        f"{first['max_iter']} epochs for k = {most}, fewer for smaller k. Pretraining is layer by layer, as restricted "
        "Boltzmann machines; its time is part of the seconds. Published: Hinton and Salakhutdinov, Science 313, 2006. "
        f"The settings were chosen with the test error in view. Seed {entry['seed']} (`bench/accuracy/deep.py`).",
        "",
        *settings,
    ]
    named = [titles[start] for start in starts]
    return Part(text, ["k", "published", *named, *(f"seconds, {name}" for name in named), "PCA"], rows, keys=2)


def denoising(entry: Report) -> Part:
    def row(name: str, found: Report, seconds: str = "") -> list[str]:
        gain = found["image"] - entry["noisy"]["image"]
        return [name, f"{found['image']:.2f}", f"{found['all']:.2f}", f"{gain:+.2f}", seconds]

    titles = {
        "noisy": "PCA of noisy images",
        "clean": "PCA of clean images",
        "clean, centred": "PCA of clean images about the mean of the noisy images",
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
    text = [
        f"Each pixel gets normal noise of standard deviation {entry['level']} and is clipped to [0, 1]. The "
        f"{entry['images']} test images get their noise once. The training images get new noise in each of the "
        f"{entry['epochs']} epochs.",
        "",
        "- The figures are peak signal-to-noise ratios in dB, 10 log10(1 / mean squared error). `of an image` is the "
        "mean over the images; the gain over the noisy images refers to it. `of all pixels` has one mean squared error "
        "for all images.",
        f"- The convolutional autoencoder has {filters} filters of 3 x 3 at strides {strides}, a convolutional code, "
        f"and the mirror of these. The dense one is {widths} and its mirror. Both have the loss {conv['loss']}.",
        "- The numbers of components and the settings of the networks were chosen on the last 10000 training images. "
        "Images rebuilt by PCA are clipped to [0, 1].",
        "- Clipping moves the mean of the noisy images. The last row of PCA subtracts that mean and adds the mean of "
        "the clean images.",
        f"- Seed {entry['seed']} (`bench/accuracy/denoising.py`).",
    ]
    return Part(text, ["", "of an image", "of all pixels", "gain", "seconds"], rows)


def likelihood(entry: Report) -> Part:
    model = entry["model"]
    widths = "-".join(map(str, (784, *model["hidden_layer_sizes"], model["n_components"])))
    rows = [
        [
            f"-log p(x), {entry['importance']} draws for each image",
            f"{BURDA_NATS}",
            f"{entry['negative_log_likelihood']:.1f} (standard error {entry['standard_error']:.1f})",
        ],
        ["minus the bound", "", f"{entry['negative_elbo']:.1f}"],
        ["seconds of training", "", f"{entry['training_seconds']:.0f}"],
    ]
    text = [
        f"Nats for each of the {entry['images']} test images, which are binarised once. The training images are "
        f"binarised again in each epoch. {widths} with {model['activation']} units, {entry['epochs']} epochs, seed "
        f"{entry['seed']} (`bench/accuracy/likelihood.py`)."
    ]
    return Part(text, ["", "published", "here"], rows, keys=2)


def contractive(entry: Report) -> Part:
    rows = []
    for name, found in entry["methods"].items():
        runs = found["runs"]
        norm, error = RIFAI[name]
        rows.append(
            [
                name,
                f"{norm:.2f}e-4",
                f"{error:.2f}",
                spread([run["jacobian_norm"] for run in runs]),
                spread([100 * run["fine_tuned_error"] for run in runs]),
                spread([100 * run["linear_error"] for run in runs]),
                spread([run["seconds"] for run in runs], ".0f"),
            ]
        )
    model, tuning = entry["model"], entry["fine_tuning"]
    text = [
        f"One layer of {model['n_components']} sigmoid units, tied weights, sigmoid outputs and cross-entropy, "
        f"{model['max_iter']} epochs of Adam, {entry['seeds']} seeds. Only the penalty or the corruption differs.",
        "",
        "- `norm`: mean norm of the code's Jacobian on the test images. The published norms have another unit.",
        "- `error, fine-tuned`: test error in % of the encoder with a softmax layer, after training both for "
        f"{tuning['epochs']} epochs. `error, linear`: that of a logistic regression on the codes.",
        "- Published: Rifai, Vincent, Muller, Glorot and Bengio, *Contractive auto-encoders*, ICML 2011. The networks "
        "here train for seconds and are tuned little, so compare the order of the rows, not the figures.",
    ]
    head = ["", "norm, published", "error, published", "norm", "error, fine-tuned", "error, linear", "seconds"]
    return Part(text, head, rows, keys=3)


def strengths(entry: Report) -> Part:
    rows = []
    for name, found in entry["methods"].items():
        tried = found["validation_error"]
        if len(tried) > 1:
            errors = ", ".join(f"{level}: {100 * each:.2f}" for level, each in tried.items())
            rows.append([name, f"`{found['parameter']}`", errors, f"{found['chosen']:g}"])
    text = [
        "Each strength, and the epoch at which fine-tuning stops, has the least error after fine-tuning on the last "
        "10000 training images, with seed 0. No classifier is trained on these images."
    ]
    return Part(text, ["", "parameter", "candidates: validation error, %", "chosen"], rows, keys=2)


def pbmc4k(entry: Report) -> Part:
    rows = []
    for name, found in entry["models"].items():
        accuracy = found["knn_accuracy"]
        shown = f"{100 * accuracy:.2f}" if isinstance(accuracy, float) else stored_spread(accuracy, ".2f", 100)
        rows.append([name, shown, stored_spread(found["seconds"], ".1f") if "seconds" in found else ""])
    text = [
        "Share of cells, in %, whose type their 15 nearest neighbours in 32 dimensions predict, in 5-fold "
        "cross-validation: 4271 cells x 2000 genes, log-normalised. `alpha=10` was chosen on this data by this figure; "
        f"the other models have default settings. {entry['seeds']} seeds."
    ]
    return Part(text, ["", "accuracy", "seconds"], rows)


def thinning(entry: Report) -> Part:
    rows = [
        [
            method,
            *(spread([one[figure]["value"] for one in found]) for figure in ("poisson", "squared error")),
            "; ".join(
                dict.fromkeys(one[figure]["setting"] for figure in ("poisson", "squared error") for one in found)
            ),
            f"{np.mean([one['seconds'] for one in found]):.0f}",
        ]
        for method, found in entry["methods"].items()
    ]
    seeds = len(next(iter(entry["methods"].values())))
    text = [
        "Molecular cross-validation (Batson, Royer and Webber, bioRxiv 786269, 2019). The molecules of each cell are "
        f"split at random: a method sees {entry['seen']:.0%} of them and predicts the rest. Two figures compare the "
        "prediction with the rest: minus the Poisson log-likelihood (without terms that no method changes), and the "
        "squared error of a cell.",
        "",
        "Every other cell chooses settings, separately for each figure. For PCA they are the transformation, the "
        "number of components and the least mean. For no denoising it is the least mean. The figures are of the other "
        f"cells. The autoencoders have fixed settings. {seeds} random splits (`bench/accuracy/thinning.py`).",
    ]
    return Part(text, ["method", "Poisson", "squared error", "chosen", "seconds"], rows)


def doublets(entry: Report) -> Part:
    rows = []
    for case, runs in entry["cases"].items():
        for score in runs[0]:
            found = {figure: [run[score][figure] for run in runs] for figure in runs[0][score]}
            areas = [spread(found[figure]) for figure in ("auc", "auc_mixed")]
            ranks = [spread(found[figure], "+.2f") for figure in ("spearman_depth", "spearman_detected")]
            rows.append([score, case, *areas, *ranks])
    model, seeds = entry["model"], len(next(iter(entry["cases"].values())))
    text = [
        "Which score of a cell under a model of counts finds doublets? A simulated doublet is the sum of two random "
        f"cells, with all its molecules or half of them. There are {entry['share']:.0%} as many as cells. "
        f"`narrows.scanpy.autoencoder` with {model['n_components']} components is fitted to cells and doublets "
        f"together, {model['max_iter']} epochs. {seeds} seeds (`bench/accuracy/doublets.py`).",
        "",
        "- `AUC`: area under the ROC curve, doublets against cells. `of two types`: only doublets of two cell types.",
        "- `rank correlation`: Spearman's, among the cells, of the score with their molecules and their detected "
        "genes. A score that follows the depth finds doublets only because they are deep.",
        "- `loss`: minus the log-likelihood, `obs['ae_loss']`. `adjusted relative loss`: `obs['ae_recon_error']`, the "
        "loss divided by that of a model without a code, beside cells of the same depth. The others compare the loss "
        "itself with cells of the same depth, or the deviance with what the model expects.",
    ]
    head = ["score", "doublets have", "AUC", "AUC, of two types", "rank correlation, molecules", "detected genes"]
    return Part(text, head, rows, keys=2)


def digits(entry: Report) -> Part:
    rows = [
        [
            name,
            stored_spread(found["excess_error"], ".1e"),
            stored_spread(found["angle"], ".1e"),
            stored_spread(found["seconds"], ".2f"),
        ]
        for name, found in entry["models"].items()
    ]
    text = [
        "A linear autoencoder with squared error spans the principal subspace (Baldi and Hornik, Neural Networks 2, "
        "1989), so both figures should be zero. Data: the bundled digits. `excess error`: reconstruction error "
        "relative to that of PCA, minus one. `angle`: the largest principal angle between the decoder and the "
        f"principal axes, in radians. {entry['seeds']} seeds."
    ]
    return Part(text, ["data", "excess error", "angle", "seconds"], rows)


SECTIONS: tuple[tuple[str, str, Callable[[Report], Part]], ...] = (
    ("## MNIST by PCA", "mnist_pca", mnist_pca),
    ("## Deep autoencoders of MNIST", "deep", deep),
    ("## Denoising Fashion-MNIST", "denoising", denoising),
    ("## Binarised MNIST by a variational autoencoder", "likelihood", likelihood),
    ("## Contractive autoencoders on MNIST", "contractive_codes", contractive),
    ("### Strengths of the penalties", "contractive_codes", strengths),
    ("## Cell types of PBMC 4k", "pbmc4k", pbmc4k),
    ("## Denoising the counts of pbmc4k", "thinning", thinning),
    ("## Simulated doublets in pbmc4k", "doublets", doublets),
    ("## LinearAutoencoder and PCA", "digits", digits),
)
"""The page from top to bottom: title, experiment, and the function that writes the section."""
PICTURE = [
    "",
    "The first test image of each class, its noisy version, and what the convolutional autoencoder makes of it:",
    "",
    "![Ten images of clothes: clean, noisy, and denoised](images/denoising.png)",
]


def render(results: Path) -> str:
    lines = [
        "# Reproduction",
        "",
        "What narrows reaches where others have published a figure, and beside PCA. `python bench/pages` writes this "
        "page from stored results; do not edit it. `bench/README.md` says how to run the experiments. Over several "
        "seeds a figure is the mean and, in brackets, the smallest and the largest. Seconds are the time of one fit.",
    ]
    for title, name, part in SECTIONS:
        found = section(title, reports(name, results), part)
        lines += [*found, *(PICTURE if found and part is denoising else [])]
    return "\n".join(lines) + "\n"
