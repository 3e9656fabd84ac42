"""A count matrix of any size, like those of single-cell experiments, written as .h5ad block by block.

Usage: ``python bench/data/synthetic.py OUT.h5ad [--cells 200000] [--genes 20000] [--types 12] [--density 0.05]
[--seed 0]``

- Counts are negative binomial. The mean is the cell's library size times the expression of the gene in the cell's type.
- Library sizes are log-normal; `--density` sets their scale. Expression is log-normal over genes, and each type shifts
  a fifth of the genes. Dispersions fall with the mean expression, as in UMI data.
- A negative binomial count is a Poisson number of bursts of logarithmic size (Quenouille 1949). Drawing bursts makes
  the work proportional to the nonzeros.
- ``obs["label"]`` holds the types. The same seed gives the same counts.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

LIBRARIES = 64
"""Classes of library size; all cells of one class and type have the same means."""
ROWS = 4096
"""Cells that are drawn and written together."""


class Experiment:
    """The distributions: expression and dispersion of each gene, library sizes, bursts of each class of cells."""

    def __init__(self, genes: int, types: int, density: float, rng: np.random.Generator) -> None:
        base = rng.lognormal(0.0, 1.6, genes)
        shift = np.where(rng.random((types, genes)) < 0.2, rng.normal(0.0, 1.2, (types, genes)), 0.0)
        expression = base * np.exp(shift)
        self.expression = expression / expression.sum(axis=1, keepdims=True)
        # Bursts are larger for genes that are expressed more: theta around 1, from 0.3 to 10.
        self.theta = np.clip(rng.lognormal(0.0, 0.5, genes) * (base / np.median(base)) ** 0.25, 0.3, 10.0)
        spread = np.exp(0.45 * np.quantile(rng.standard_normal(100_000), (np.arange(LIBRARIES) + 0.5) / LIBRARIES))
        low, high = 1.0, 1e6
        for _ in range(60):
            middle = np.sqrt(low * high)
            low, high = (middle, high) if self._density(middle * spread) < density else (low, middle)
        self.libraries = low * spread

    def _rates(self, library: float, kind: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Number of bursts of each gene, and the parameter of their sizes."""
        ratio = library * self.expression[kind] / self.theta
        return self.theta * np.log1p(ratio), ratio / (1 + ratio)

    def _density(self, libraries: NDArray[np.float64]) -> float:
        kinds = range(len(self.expression))
        some = libraries[:: LIBRARIES // 8]
        return float(np.mean([-np.expm1(-self._rates(size, kind)[0]).mean() for size in some for kind in kinds]))

    def draw(
        self, kinds: NDArray[np.int64], sizes: NDArray[np.int64], rng: np.random.Generator
    ) -> tuple[Any, Any, Any]:
        """CSR parts of the counts of cells, given each cell's type and class of library size."""
        classes, members = np.unique(kinds * LIBRARIES + sizes, return_inverse=True)
        keys, values = [], []
        genes = self.expression.shape[1]
        for number, one in enumerate(classes.tolist()):
            cells = np.flatnonzero(members == number)
            rate, shape = self._rates(self.libraries[one % LIBRARIES], one // LIBRARIES)
            edges = np.cumsum(rate)
            bursts = rng.poisson(edges[-1], len(cells))
            drawn = np.searchsorted(edges, np.sort(rng.random(bursts.sum())) * edges[-1], side="right")
            gene = np.minimum(drawn, genes - 1)
            # Sorted draws are dealt to the cells in random order.
            cell = rng.permutation(np.repeat(cells, bursts))
            keys.append(cell * genes + gene)
            values.append(rng.logseries(shape[gene]))
        key, value = np.concatenate(keys), np.concatenate(values)
        order = np.argsort(key, kind="stable")
        key, value = key[order], value[order]
        first = np.flatnonzero(np.diff(key, prepend=-1))
        counts = np.add.reduceat(value, first).astype(np.float32)
        key = key[first]
        return counts, (key % genes).astype(np.int32), np.bincount(key // genes, minlength=len(kinds))


def write(path: Path, cells: int, genes: int, types: int, density: float, seed: int) -> int:
    """Write the file; returns the number of counts in it."""
    import anndata
    import h5py
    import pandas as pd

    rng = np.random.default_rng(seed)
    experiment = Experiment(genes, types, density, rng)
    kinds = rng.choice(types, cells, p=rng.dirichlet(np.full(types, 3.0)))
    sizes = rng.integers(0, LIBRARIES, cells)
    obs = pd.DataFrame({"label": pd.Categorical([f"type{k}" for k in kinds])}, index=[f"cell{i}" for i in range(cells)])
    var = pd.DataFrame(index=[f"gene{i}" for i in range(genes)])
    anndata.AnnData(obs=obs, var=var, shape=(cells, genes)).write_h5ad(path)
    with h5py.File(path, "a") as file:
        file.pop("X", None)
        X = file.create_group("X")
        X.attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0", "shape": (cells, genes)})
        options = {"shape": (0,), "maxshape": (None,), "chunks": (1 << 18,), "compression": "lzf"}
        data = X.create_dataset("data", dtype=np.float32, **options)
        indices = X.create_dataset("indices", dtype=np.int32, **options)
        lengths = []
        for start in range(0, cells, ROWS):
            rows = slice(start, min(start + ROWS, cells))
            counts, columns, filled = experiment.draw(kinds[rows], sizes[rows], rng)
            stored = data.shape[0]
            for dataset, part in ((data, counts), (indices, columns)):
                dataset.resize((stored + len(part),))
                dataset[stored:] = part
            lengths.append(filled)
        X.create_dataset("indptr", data=np.concatenate([[0], np.cumsum(np.concatenate(lengths))]).astype(np.int64))
        return int(data.shape[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--cells", type=int, default=200_000)
    parser.add_argument("--genes", type=int, default=20_000)
    parser.add_argument("--types", type=int, default=12)
    parser.add_argument("--density", type=float, default=0.05)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if min(options.cells, options.genes, options.types) < 1 or not 0 < options.density < 0.9:
        parser.error("--cells, --genes and --types must be at least 1, --density between 0 and 0.9")
    started = time.perf_counter()
    stored = write(options.out, options.cells, options.genes, options.types, options.density, options.seed)
    share = stored / (options.cells * options.genes)
    print(
        f"{options.out}: {options.cells} x {options.genes}, {share:.2%} nonzero, {time.perf_counter() - started:.0f} s"
    )


if __name__ == "__main__":
    main()
