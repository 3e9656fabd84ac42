"""Whether ``precision="bfloat16"`` trains as well as float32: pairs of fits on real data.

Usage: ``python bench/accuracy/precision.py [--seeds 20] [--data DIR] [--results DIR] [--lock FILE]``; about 13 minutes
of CPU time. DIR, by default the folder in NARROWS_DATA, holds MNIST as ``mnist/*.gz``; PBMC 4k comes with the package.
docs/accuracy.md shows the result.

The two fits of a pair have the same seed, so the same first weights and the same batches in the same order, and the
same number of epochs. They differ only in precision. Held-out rows give two figures: the loss, and the share of labels
that the neighbours of a row's code among the training rows predict. The comparison is the mean difference with its 95 %
confidence interval (Student's t), against the standard deviation over the seeds.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np
from scipy import stats
from sklearn.neighbors import KNeighborsClassifier

import narrows
from bench.data.images import Split, mnist
from bench.support.results import header
from bench.support.scripts import finish, images, lock, parser, script, with_data
from narrows.data import ArraySource
from narrows.data.normalize import Normalizer
from narrows.datasets import load_pbmc4k

PRECISIONS = ("float32", "bfloat16")
NEIGHBOURS = 15
CONFIDENCE = 0.95


def pbmc4k(data: Path) -> Split:
    """Logarithms of counts scaled to the median total; one cell in five is held out."""
    counts, labels = load_pbmc4k(return_labels=True)
    held, trained = np.split(np.random.default_rng(0).permutation(len(labels)), [len(labels) // 5])
    normalizer = Normalizer("log1p").fit(ArraySource(counts[trained]))
    X = normalizer.transform(counts).toarray()
    return Split(X[trained], labels[trained], X[held], labels[held])


@dataclass(frozen=True)
class Case:
    name: str
    split: Callable[[Path], Split]
    parameters: Mapping[str, Any]
    """Parameters of `narrows.Autoencoder`; the others are defaults, without early stopping."""


CASES = (
    Case("pbmc4k", pbmc4k, {"hidden_layer_sizes": (128,), "n_components": 32, "loss": "mse", "max_iter": 60}),
    Case("mnist-deep", mnist, {"hidden_layer_sizes": (128, 64), "n_components": 32, "loss": "bce", "max_iter": 10}),
    Case(
        "mnist-wide", mnist, {"hidden_layer_sizes": (1000, 500, 250), "n_components": 30, "loss": "bce", "max_iter": 3}
    ),
)


def measure(parameters: Mapping[str, Any], split: Split, seed: int, precision: str) -> dict[str, float]:
    """Fit once; the loss of a held-out row, and the share of labels that the neighbours of the codes predict."""
    model = narrows.Autoencoder(
        **parameters,
        early_stopping=False,
        n_iter_no_change=parameters["max_iter"],
        random_state=seed,
        precision=precision,
    ).fit(split.X)
    if model.n_iter_ != parameters["max_iter"]:
        raise RuntimeError(
            f"{precision}, seed {seed}: stopped after {model.n_iter_} of {parameters['max_iter']} epochs"
        )
    neighbours = KNeighborsClassifier(NEIGHBOURS).fit(model.transform(split.X), split.labels)
    return {
        "loss": -model.score(split.X_held),
        "accuracy": float(neighbours.score(model.transform(split.X_held), split.labels_held)),
    }


def compare(single: list[float], half: list[float]) -> dict[str, Any]:
    """Compare pairs of a figure, float32 and bfloat16, with the noise of the seed.

    Returns
    -------
    dict
        ``float32`` and ``bfloat16``: mean and standard deviation over the seeds. ``difference``: mean of the pairs'
        differences, bfloat16 minus float32, and both ends of its confidence interval. ``within_noise``: whether the
        whole interval is closer to zero than the standard deviation of float32.
    """
    d = np.subtract(half, single)
    margin = stats.t.ppf((1 + CONFIDENCE) / 2, len(d) - 1) * stats.sem(d)
    low, high = d.mean() - margin, d.mean() + margin
    moments = [{"mean": float(np.mean(x)), "sd": float(np.std(x, ddof=1))} for x in (single, half)]
    return dict(zip(PRECISIONS, moments, strict=True)) | {
        "difference": {"mean": float(d.mean()), "low": float(low), "high": float(high)},
        "within_noise": bool(max(-low, high) < moments[0]["sd"]),
    }


def run(case: Case, split: Split, seeds: int, lock_file: Path | None) -> dict[str, Any]:
    found: dict[str, dict[str, list[float]]] = {p: {"loss": [], "accuracy": []} for p in PRECISIONS}
    for seed in range(seeds):
        for precision in PRECISIONS:
            with lock(lock_file):
                for figure, value in measure(case.parameters, split, seed, precision).items():
                    found[precision][figure].append(value)
    single, half = (found[p] for p in PRECISIONS)
    half_width = (split.X.shape[1], *case.parameters["hidden_layer_sizes"])
    return {
        "widths": [*half_width, case.parameters["n_components"], *reversed(half_width)],
        "loss": case.parameters["loss"],
        "epochs": case.parameters["max_iter"],
        "rows": len(split.X),
        "held_out": len(split.X_held),
        "seeds": seeds,
        "values": found,
        "compared": {figure: compare(single[figure], half[figure]) for figure in single},
    }


def main() -> None:
    options_parser = with_data(parser(__doc__, locked="during each fit"))
    options_parser.add_argument("--seeds", type=int, default=20)
    options = options_parser.parse_args()
    if options.seeds < 2:
        options_parser.error("--seeds must be at least 2")
    images(options_parser, options)
    config = narrows.show_config()
    report = header(config["packages"], neighbours=NEIGHBOURS, confidence=CONFIDENCE, cases={})
    report |= {key: config[key] for key in ("backend", "bfloat16") if key in config}
    for case in CASES:
        report["cases"][case.name] = found = run(case, case.split(options.data), options.seeds, options.lock)
        print(case.name, json.dumps(found["compared"], indent=1), flush=True)
    finish(report, "precision", options)


if __name__ == "__main__":
    script(main)
