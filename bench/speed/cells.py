"""Models of counts on real cells beside scvi-tools, PyTorch and PCA: time, memory, held-out likelihood, labels.

Usage: ``python bench/speed/cells.py --data DIR [--sets pbmc4k,worm_neuron] [--models NAME,NAME] [--epochs 100]
[--threads 2] [--results DIR] [--lock FILE]`` in an environment that holds narrows and what the models need (see
`MODELS`). DIR, by default the folder in NARROWS_DATA, holds ``pbmc4k/pbmc4k.npz`` and ``worm_neuron/worm_neuron.npz``.
A run replaces the entries of its models in the stored result. docs/benchmarks.md shows the result.

Each model is fitted in its own process, on the same nine tenths of the cells; the other cells give its likelihood (see
`cell_models`). The codes of all cells predict labels by their 15 nearest neighbours, in five folds.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from bench.libraries.cell_models import MODELS
from bench.support.harness import Worker
from bench.support.results import header, load, path_of, store
from bench.support.scripts import chosen, finish, lock, parsed, parser, script, with_data, with_threads

PACKAGES = {"scvi-tools": ["scvi-tools", "torch"], "pytorch": ["torch"], "PCA": ["scikit-learn"]}
"""What a model needs besides narrows."""
SETS = ("pbmc4k", "worm_neuron")


def main() -> None:
    options_parser = with_data(with_threads(parser(__doc__, locked="while a model is measured")))
    options_parser.add_argument("--sets")
    options_parser.add_argument("--models")
    options_parser.add_argument("--epochs", type=int, default=100)
    options_parser.add_argument("--seed", type=int, default=0)
    options = parsed(options_parser)
    sets = chosen(options_parser, "--sets", options.sets, SETS)
    models = chosen(options_parser, "--models", options.models, tuple(MODELS))
    if options.data is None:
        options_parser.error("--data or NARROWS_DATA must name the folder of the data sets")
    packages = dict.fromkeys(package for model in models for package in PACKAGES.get(model, ()))
    report = header(packages, threads=options.threads, sets={})
    stored = load(path_of(report, "cells", options.results))
    report["versions"] = stored.get("versions", {}) | report["versions"]
    report["sets"] = stored.get("sets", {})
    for name in sets:
        path = options.data / name / f"{name}.npz"
        if not path.exists():
            options_parser.error(f"there is no file {path}")
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
            found |= {"date": report["date"], "seed": options.seed}
            report["sets"].setdefault(name, {})[model] = found
            print(name, model, found, flush=True)
            store(report, "cells", options.results)
    finish(report, "cells", options)


if __name__ == "__main__":
    script(main)
