"""Draw docs/images/pbmc4k_umap.png: a UMAP of the codes of the bundled blood cells, for docs/genomics.md.

Usage: ``python bench/pages/umap_figure.py [--out FILE]`` in an environment that holds narrows, scanpy and umap-learn.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import anndata
import matplotlib.pyplot as plt
import scanpy as sc
import scipy.sparse as sp

import narrows
from narrows.datasets import load_pbmc4k
from narrows.plotting.style import PALETTE

OUT = Path(__file__).parents[2] / "docs" / "images" / "pbmc4k_umap.png"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    counts, kinds = load_pbmc4k(return_labels=True)
    adata = anndata.AnnData(sp.csr_matrix(counts), obs={"kind": kinds.astype(str)})
    narrows.scanpy.autoencoder(adata, n_components=32, estimator="count", max_iter=20)
    sc.pp.neighbors(adata, use_rep="X_ae", n_neighbors=15)
    sc.tl.umap(adata, random_state=0)
    figure, ax = plt.subplots(figsize=(6, 5), layout="constrained")
    for i, kind in enumerate(sorted(adata.obs["kind"].unique())):
        x, y = adata.obsm["X_umap"][(adata.obs["kind"] == kind).to_numpy()].T
        ax.scatter(x, y, s=3, color=PALETTE[i % len(PALETTE)], linewidths=0, label=f"type {kind}")
    ax.set(xlabel="UMAP 1", ylabel="UMAP 2", xticks=[], yticks=[])
    ax.set_title("4271 blood cells: UMAP of 32 latents of a count autoencoder", loc="left", fontsize=10)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False, markerscale=4, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(options.out, dpi=110)
    print(options.out)


if __name__ == "__main__":
    main()
