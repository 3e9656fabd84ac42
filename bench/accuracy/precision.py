"""Whether ``precision="bfloat16"`` trains as well as float32: pairs of fits on real data.

Usage: ``python bench/accuracy/precision.py [--seeds 20] [--data DIR] [--out FILE] [--lock FILE]``; about 13 minutes
of CPU time. DIR, by default what NARROWS_DATA names, holds MNIST as ``mnist/*.gz``; PBMC 4k comes with the package.

The two fits of a pair have the same seed, so the same first weights and batches in the same order, and as many epochs;
then the difference is one of precision. Both are judged on rows that neither has seen: the loss, and how many labels
the neighbours of a row's code among the trained rows tell. What is compared is the mean difference with its 95 %
confidence interval (Student's t) and the standard deviation over the seeds. docs/accuracy.md is written from
the result.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from sklearn.neighbors import KNeighborsClassifier

import narrows
from bench.pages import accuracy as accuracy_page
from bench.pages.benchmarks import RESULTS, ROOT
from bench.support.harness import lock
from narrows.benchmark import machine
from narrows.data import ArraySource
from narrows.data.normalize import Normalizer
from narrows.datasets import load_pbmc4k

OUT = RESULTS / "precision.json"
PRECISIONS = ("float32", "bfloat16")
NEIGHBOURS = 15
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Split:
    """Rows to train on and rows held out, each with a label."""

    X: NDArray[np.float32]
    labels: NDArray[np.uint8]
    X_held: NDArray[np.float32]
    labels_held: NDArray[np.uint8]


def with_mnist(parser: argparse.ArgumentParser, folder: str = "mnist") -> tuple[argparse.Namespace, Split]:
    """The options of a script that works on MNIST, and the images, from --data or what NARROWS_DATA names."""
    parser.add_argument("--data", type=Path, default=os.environ.get("NARROWS_DATA"))
    options = parser.parse_args()
    if options.data is None:
        parser.error(f"--data or NARROWS_DATA must name the folder that holds {folder}/")
    return options, mnist(Path(options.data), folder)


def mnist(data: Path, folder: str = "mnist") -> Split:
    """Its 60000 and 10000 images, pixels from 0 to 1 (the idx format: a header of 16 or 8 bytes, then bytes).

    Of Fashion-MNIST if its folder is named instead.
    """

    def read(name: str, header: int) -> NDArray[np.uint8]:
        with gzip.open(data / folder / name) as file:
            return np.frombuffer(file.read(), np.uint8, offset=header)

    def images(name: str) -> NDArray[np.float32]:
        return read(f"{name}-images-idx3-ubyte.gz", 16).reshape(-1, 784).astype(np.float32) / np.float32(255)

    def labels(name: str) -> NDArray[np.uint8]:
        return read(f"{name}-labels-idx1-ubyte.gz", 8)

    return Split(images("train"), labels("train"), images("t10k"), labels("t10k"))


def pbmc4k(data: Path) -> Split:
    """Logarithms of counts scaled to the median library; one cell in five is held out."""
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
    """Of `narrows.Autoencoder`; the others are its defaults, without early stopping."""


CASES = (
    Case("pbmc4k", pbmc4k, {"hidden_layer_sizes": (128,), "n_components": 32, "loss": "mse", "max_iter": 60}),
    Case("mnist-deep", mnist, {"hidden_layer_sizes": (128, 64), "n_components": 32, "loss": "bce", "max_iter": 10}),
    Case(
        "mnist-wide", mnist, {"hidden_layer_sizes": (1000, 500, 250), "n_components": 30, "loss": "bce", "max_iter": 3}
    ),
)


def measure(parameters: Mapping[str, Any], split: Split, seed: int, precision: str) -> dict[str, float]:
    """Of one fit, on the rows held out: loss of a row, and share of labels told by the neighbours of the codes."""
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
    """Pairs of a figure, float32 and bfloat16, against the noise of the seed.

    Returns
    -------
    dict
        ``float32`` and ``bfloat16``: mean and standard deviation over the seeds; ``difference``: mean of the pairs'
        differences, bfloat16 less float32, and both ends of its confidence interval; ``within_noise``: whether all of
        the interval is nearer to zero than the standard deviation of float32.
    """
    d = np.subtract(half, single)
    low, high = stats.t.interval(CONFIDENCE, len(d) - 1, d.mean(), stats.sem(d))
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--data", type=Path, default=os.environ.get("NARROWS_DATA", ROOT.parent / "shared" / "data"))
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--lock", type=Path, help="file to hold a lock on during each fit, as flock(1) does")
    options = parser.parse_args()
    if options.seeds < 2:
        parser.error("--seeds must be at least 2")
    if not (options.data / "mnist").is_dir():
        parser.error(
            f"{options.data / 'mnist'} is absent: give --data, or let NARROWS_DATA name the folder with mnist/"
        )
    config = narrows.show_config()
    report: dict[str, Any] = {"date": date.today().isoformat(), "machine": machine(), "narrows": narrows.__version__}
    report |= {key: config[key] for key in ("packages", "backend", "isa", "bfloat16") if key in config}
    report |= {"neighbours": NEIGHBOURS, "confidence": CONFIDENCE, "cases": {}}
    for case in CASES:
        report["cases"][case.name] = found = run(case, case.split(options.data), options.seeds, options.lock)
        print(case.name, json.dumps(found["compared"], indent=1), flush=True)
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    if options.out == OUT:
        accuracy_page.write()


if __name__ == "__main__":
    main()
