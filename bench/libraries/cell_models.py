"""Models of counts, each in its own process (see `harness`): their speed, their memory and what they learn.

All models read log(1 + counts scaled to one total) and have one hidden layer of 128 units on each side of 32 latents.
Counts are negative binomial: the mean is the cell's total times a softmax, and each gene has a dispersion. Batches of
128 cells, Adam at 1e-3, a dropout of 0.1 (scvi-tools' default). scvi-tools also has batch normalisation, its default.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from bench.libraries.memory import status
from bench.support.harness import serve

LATENTS, HIDDEN, BATCH, IMPORTANCE = 32, 128, 128, 100
SPLIT_SEED = 0
DROPOUT = 0.1
LAYOUT: dict[str, Any] = {
    "hidden_layer_sizes": HIDDEN,
    "dropout": DROPOUT,
    "batch_size": BATCH,
    "early_stopping": False,
}


class Data(NamedTuple):
    """Counts of all cells (CSR, float32), their labels, and a mask of the held-out cells."""

    X: Any
    labels: NDArray[Any]
    held: NDArray[np.bool_]


def load(path: str) -> Data:
    parts = np.load(path, allow_pickle=False)
    X = sp.csr_array((parts["data"].astype(np.float32), parts["indices"], parts["indptr"]), shape=tuple(parts["shape"]))
    held = np.zeros(X.shape[0], bool)
    held[np.random.default_rng(SPLIT_SEED).permutation(len(held))[: len(held) // 10]] = True
    return Data(X, parts["labels"], held)


class Fitted(NamedTuple):
    """What a trained model gives.

    Attributes
    ----------
    codes : callable
        Codes of cells.
    given_code : callable, optional
        Minus the log-likelihood of a cell given its own code.
    marginal : callable, optional
        Minus the log-likelihood of a cell by importance sampling.
    peak_mib : float, optional
        Most MiB of the model's process, if that was another process.
    epochs : int, optional
        Epochs, if the model stopped by itself.
    """

    codes: Callable[[Any], NDArray[Any]]
    given_code: Callable[[Any], float] | None = None
    marginal: Callable[[Any], float] | None = None
    peak_mib: float | None = None
    epochs: int | None = None


def count_autoencoder(X: Any, epochs: int, threads: int, seed: int) -> Callable[[], Fitted]:
    import narrows

    layout = LAYOUT | {"likelihood": "nb"}
    model = narrows.CountAutoencoder(LATENTS, max_iter=epochs, random_state=seed, n_threads=threads, **layout)

    def fit() -> Fitted:
        model.fit(X)
        return Fitted(model.transform, lambda Y: -model.score(Y))

    return fit


def command(X: Any, epochs: int, threads: int, seed: int) -> Callable[[], Fitted]:
    """`count_autoencoder` as a batch job: all of ``narrows fit``, from reading the file to writing the report.

    By default the command holds out a tenth of its cells and stops when their loss stops falling.
    """
    folder = tempfile.TemporaryDirectory()

    def path(name: str) -> Path:
        return Path(folder.name, name)

    def narrows(*words: object) -> None:
        line = [sys.executable, "-m", "narrows", *map(str, words), "--threads", str(threads), "--quiet"]
        done = subprocess.run(line, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"narrows {words[0]}: {done.stderr.strip()}")

    def applied(what: str, Y: Any) -> NDArray[Any]:
        sp.save_npz(path("cells.npz"), Y)
        narrows(what, path("run/model.safetensors"), path("cells.npz"), "-o", path("out.npy"))
        found: NDArray[Any] = np.load(path("out.npy"))
        return found

    def fit() -> Fitted:
        layout = ("--components", LATENTS, "--hidden", HIDDEN, "--batch-size", BATCH, "--epochs", epochs)
        chosen = ("--set", f"dropout={DROPOUT}", "--seed", seed)
        model = ("--estimator", "count", "--loss", "nb")
        narrows("fit", path("cells.npz"), "--out", path("run"), *model, *layout, *chosen)
        metrics = json.loads(path("run/metrics.json").read_text())
        return Fitted(
            lambda Y: applied("encode", Y),
            lambda Y: float(applied("score", Y).mean()),
            peak_mib=metrics["peak_rss_bytes"] / 2**20,
            epochs=metrics["epochs_run"],
        )

    sp.save_npz(path("cells.npz"), X)
    return fit


def variational(X: Any, epochs: int, threads: int, seed: int) -> Callable[[], Fitted]:
    import narrows

    layout = LAYOUT | {"loss": "nb", "kl_warmup": epochs // 2}
    model = narrows.VariationalAutoencoder(LATENTS, max_iter=epochs, random_state=seed, n_threads=threads, **layout)

    def fit() -> Fitted:
        model.fit(X)
        return Fitted(
            model.transform,
            lambda Y: -model.score(Y),
            lambda Y: -float(model.log_likelihood(Y, n_importance=IMPORTANCE).mean()),
        )

    return fit


def scvi(X: Any, epochs: int, threads: int, seed: int) -> Callable[[], Fitted]:
    import logging

    import anndata
    import scvi
    import torch

    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(threads)
    scvi.settings.seed = seed

    def cells(Y: Any) -> Any:
        return anndata.AnnData(sp.csr_matrix(Y))

    adata = cells(X)
    scvi.model.SCVI.setup_anndata(adata)
    model = scvi.model.SCVI(adata, n_hidden=HIDDEN, n_latent=LATENTS, gene_likelihood="nb")

    def given_code(Y: Any) -> float:
        module, total = model.module.eval(), 0.0
        with torch.no_grad():
            for tensors in model._make_data_loader(adata=model._validate_anndata(cells(Y))):
                inferred = module.inference(**module._get_inference_input(tensors))
                inferred["z"] = inferred["qz"].loc
                counts = module.generative(**module._get_generative_input(tensors, inferred))["px"]
                total -= float(counts.log_prob(tensors["X"]).sum())
        return float(total / Y.shape[0])

    def fit() -> Fitted:
        model.train(
            max_epochs=epochs,
            accelerator="cpu",
            train_size=1.0,
            batch_size=BATCH,
            enable_progress_bar=False,
            logger=False,
            plan_kwargs={"n_epochs_kl_warmup": max(1, epochs // 2)},
        )
        return Fitted(
            lambda Y: model.get_latent_representation(cells(Y)),
            given_code,
            lambda Y: -float(model.get_marginal_ll(cells(Y), n_mc_samples=IMPORTANCE)),
        )

    return fit


def pytorch(X: Any, epochs: int, threads: int, seed: int) -> Callable[[], Fitted]:
    """The network of `count_autoencoder` as PyTorch users write it: dense batches, and torch.lgamma of all counts."""
    import torch
    from torch import nn
    from torch.nn import functional as F

    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    n_genes = X.shape[1]
    encoder = nn.Sequential(nn.Linear(n_genes, HIDDEN), nn.ReLU(), nn.Dropout(DROPOUT), nn.Linear(HIDDEN, LATENTS))
    decoder = nn.Sequential(nn.Linear(LATENTS, HIDDEN), nn.ReLU(), nn.Dropout(DROPOUT), nn.Linear(HIDDEN, n_genes))
    log_theta = nn.Parameter(torch.zeros(n_genes))
    scale = float(np.median(X.sum(axis=1)))

    def encoded(x: torch.Tensor) -> torch.Tensor:
        library = x.sum(1, keepdim=True)
        return encoder(torch.log1p(x * (scale / library.clamp(min=1))))

    def losses(x: torch.Tensor) -> torch.Tensor:
        mu = x.sum(1, keepdim=True) * F.softmax(decoder(encoded(x)), dim=1)
        theta = log_theta.exp()
        both = torch.log(theta + mu + 1e-8)
        found = theta * (log_theta - both) + x * (torch.log(mu + 1e-8) - both)
        return -(found + torch.lgamma(x + theta) - torch.lgamma(theta) - torch.lgamma(x + 1)).sum(1)

    def dense(Y: Any) -> torch.Tensor:
        return torch.from_numpy(Y.toarray())

    def blocks(Y: Any) -> list[Any]:
        return [Y[start : start + BATCH] for start in range(0, Y.shape[0], BATCH)]

    def fit() -> Fitted:
        adam = torch.optim.Adam([*encoder.parameters(), *decoder.parameters(), log_theta], lr=1e-3, fused=True)
        for _ in range(epochs):
            for rows in torch.randperm(X.shape[0]).split(BATCH):
                adam.zero_grad()
                losses(dense(X[rows.numpy()])).mean().backward()
                adam.step()
        encoder.eval()
        decoder.eval()
        return Fitted(
            lambda Y: torch.cat([encoded(dense(block)).detach() for block in blocks(Y)]).numpy(),
            lambda Y: float(torch.cat([losses(dense(block)).detach() for block in blocks(Y)]).mean()),
        )

    return fit


def pca(X: Any, epochs: int, threads: int, seed: int) -> Callable[[], Fitted]:
    from sklearn.decomposition import PCA

    from narrows import Normalizer

    scaling = Normalizer("log1p").fit(X)
    model = PCA(LATENTS, random_state=seed)

    def fit() -> Fitted:
        model.fit(scaling.transform(X))
        return Fitted(lambda Y: model.transform(scaling.transform(Y)))

    return fit


MODELS = {
    "narrows": count_autoencoder,
    "narrows fit": command,
    "narrows variational": variational,
    "scvi-tools": scvi,
    "pytorch": pytorch,
    "PCA": pca,
}


def measure(model: str, path: str, epochs: int, threads: int, seed: int) -> dict[str, Any]:
    """Time of an epoch, memory that the fit added, nats of a held-out cell, and how well codes predict labels."""
    from narrows.evaluation.metrics import knn_accuracy

    data = load(path)
    # The first fit of a process loads and compiles; that is not the time of an epoch.
    MODELS[model](data.X[~data.held][: 4 * BATCH], 1, threads, seed)()
    prepared = MODELS[model](data.X[~data.held], epochs, threads, seed)
    before = status("VmRSS")
    start = time.perf_counter()
    fitted = prepared()
    seconds = time.perf_counter() - start
    peak = status("VmHWM")
    held = data.X[data.held]
    return {
        "seconds": seconds,
        "epoch_seconds": seconds / (fitted.epochs or epochs) if model != "PCA" else None,
        "epochs": None if model == "PCA" else fitted.epochs or epochs,
        "added_mib": peak - before if fitted.peak_mib is None else fitted.peak_mib,
        "given_code": None if fitted.given_code is None else fitted.given_code(held),
        "marginal": None if fitted.marginal is None else fitted.marginal(held),
        "knn_accuracy": knn_accuracy(fitted.codes(data.X), data.labels),
        "cells": int(data.X.shape[0]),
        "genes": int(data.X.shape[1]),
    }


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    serve({"measure": measure})
