"""Models of counts on real cells beside scvi-tools, PyTorch and PCA: time, memory, held-out likelihood, labels.

Usage: ``python bench/speed/cells.py --data DIR [--sets pbmc4k,worm_neuron] [--models NAME,NAME] [--epochs 100]
[--threads 2]
[--out FILE] [--lock FILE]`` in an environment that holds narrows, scvi-tools and PyTorch. DIR, by default what
NARROWS_DATA names, holds ``pbmc4k/pbmc4k.npz`` and ``worm_neuron/worm_neuron.npz``. What is run replaces its entry in
FILE, by default `results/cells.json`.

Every model is fitted in a process of its own, on the same nine tenths of the cells, and judged on the others (see
`cell_models`). Codes of all cells tell labels by their 15 nearest neighbours, in five folds.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import sys
from datetime import date
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from bench.libraries.cell_models import MODELS
from bench.pages import benchmarks as page
from bench.support.harness import RESULTS, Worker, arguments, lock, prepared, script, store
from narrows import __version__
from narrows.benchmark import machine

OUT = RESULTS / "cells.json"
SETS = ("pbmc4k", "worm_neuron")


def chosen(parser: argparse.ArgumentParser, option: str, text: str, known: tuple[str, ...]) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in known]:
        parser.error(f"{option}: {unknown[0]!r} is not one of {', '.join(known)}")
    return names


def versions() -> dict[str, str]:
    found = {"narrows": __version__}
    for package in ("scvi-tools", "torch", "scikit-learn"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            sys.exit(f"error: {package} is not installed")
    return found


def main() -> None:
    parser = arguments(__doc__, OUT, " while a model is measured")
    parser.add_argument("--sets", default=",".join(SETS))
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", type=Path, default=os.environ.get("NARROWS_DATA"))
    options = prepared(parser)
    sets = chosen(parser, "--sets", options.sets, SETS)
    models = chosen(parser, "--models", options.models, tuple(MODELS))
    if options.data is None:
        parser.error("--data or NARROWS_DATA must name the folder of the data sets")
    report: dict[str, Any] = json.loads(options.out.read_text()) if options.out.exists() else {"sets": {}}
    report |= {"machine": machine(), "threads": options.threads, "versions": versions()}
    for name in sets:
        path = options.data / name / f"{name}.npz"
        if not path.exists():
            parser.error(f"there is no {path}")
        for model in models:
            with lock(options.lock), Worker("libraries.cell_models", f"{model} on {name}") as worker:
                found = worker.ask(
                    "measure",
                    model=model,
                    path=str(path.resolve()),
                    epochs=options.epochs,
                    threads=options.threads,
                    seed=options.seed,
                )
            found |= {"date": date.today().isoformat(), "seed": options.seed}
            report["sets"].setdefault(name, {})[model] = found
            print(name, model, found, flush=True)
            store(report, options.out)
    if options.out == OUT:
        page.write()


if __name__ == "__main__":
    script(main)
