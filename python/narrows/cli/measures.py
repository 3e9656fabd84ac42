"""How good a fit is: the figures that ``metrics.json`` gets after training, and the words for them."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import numpy.typing as npt

from ..data import Source
from ..data.normalize import Normalizer
from ..data.normalized import NormalizedSource
from ..data.scan import row_blocks
from ..data.source import with_names
from ..evaluation import baselines, counts, metrics
from ..evaluation.cells import CellErrors
from .resources import held_rows

__all__ = [
    "BASELINE",
    "BETTER",
    "against",
    "baseline_text",
    "counted",
    "has_likelihood",
    "held_out",
    "held_text",
    "hints",
    "in_short",
    "measure",
    "still_fell",
    "store_cell_errors",
]

log = logging.getLogger("narrows")

BASELINE = "feature shares alone"
"""Name of the baseline of a count model."""


def measure(
    estimator: Any,
    table: NormalizedSource,
    batch: npt.NDArray[Any] | None,
    codes: npt.NDArray[Any],
    *,
    seed: int,
    n_threads: int,
    step_bytes: int,
    cache_bytes: int,
) -> dict[str, Any]:
    """Measure a fitted model on its data, beside a baseline.

    Parameters
    ----------
    estimator : fitted estimator
    table : NormalizedSource
        The data of the fit.
    batch : ndarray of shape (n_rows,), or None
        Batch labels of the rows.
    codes : ndarray of shape (n_rows, n_components)
        Latent codes of the rows.
    seed, n_threads : int
    step_bytes : int
        Approximate bytes of one block of rows.
    cache_bytes : int
        Bytes of the data that PCA may keep in memory.
    """
    of_counts = estimator.plan_.spec.loss.info.of_counts
    split = held_rows(estimator, table.shape[0])
    if of_counts:
        found = counts.measure(estimator, table, split, batch, seed=seed, n_threads=n_threads, step_bytes=step_bytes)
    else:
        found = _squared_errors(estimator, table, batch, None if split is None else split[1])
    found |= dict.fromkeys(("baseline_pca_loss", "baseline_pca_rows", "knn_accuracy_latent", "knn_accuracy_pca"))
    if table.labels is not None or not of_counts:
        found |= _against_pca(table, codes, seed, cache_bytes, errors=not of_counts)
    return found


def store_cell_errors(estimator: Any, table: NormalizedSource, batch: npt.NDArray[Any] | None) -> None:
    """Give a model of raw counts what ``narrows score`` compares the loss of a row with."""
    loss = estimator.plan_.spec.loss
    if not loss.info.raw_counts:
        return
    rows = metrics.sample_rows(table.shape[0], estimator._seed)
    losses = np.empty(len(rows))
    for part in row_blocks(len(rows), table.shape[1]):
        labels = None if batch is None else batch[rows[part]]
        losses[part] = -estimator.score_samples(with_names(table.read_rows(rows[part]), table), batch=labels)
    estimator.metadata_["cell_errors"] = CellErrors.fit(loss, table, losses, rows).to_dict()


def _squared_errors(
    estimator: Any, table: NormalizedSource, batch: npt.NDArray[Any] | None, held: npt.NDArray[np.int64] | None
) -> dict[str, Any]:
    """Mean squared errors over all rows and over the held-out rows, and the features with the largest errors."""

    def reconstruct(block: Any, rows: Any) -> npt.NDArray[Any]:
        labels = None if batch is None else batch[rows]
        return estimator.reconstruct(with_names(block, table), batch=labels)  # type: ignore[no-any-return]

    errors = metrics.feature_errors(table, reconstruct)
    names = estimator.feature_names_in_ if hasattr(estimator, "feature_names_in_") else None
    worst = np.argsort(-errors, kind="stable")[:20]
    return {
        "mse_per_feature": float(errors.mean()),
        "held_out_mse_per_feature": (
            None if held is None else float(metrics.feature_errors(table, reconstruct, held).mean())
        ),
        "worst_features": [
            {"name": f"feature {i}" if names is None else str(names[i]), "mse": float(errors[i])} for i in worst
        ],
    }


def _against_pca(
    table: NormalizedSource, codes: npt.NDArray[Any], seed: int, cache_bytes: int, *, errors: bool
) -> dict[str, Any]:
    """The error of PCA, and the accuracy of nearest neighbours on the codes and on the PCA scores.

    Without `errors`, the data are counts: PCA then uses their logarithms, with rows scaled to one total.
    """
    rows = metrics.sample_rows(table.shape[0], seed)
    analysed: Source = table
    if not errors:
        analysed = NormalizedSource(table.source, Normalizer("log1p").fit(table.source))
    pca = baselines.pca(analysed, codes.shape[1], rows=rows, seed=seed, cache_bytes=cache_bytes)
    found: dict[str, Any] = {"baseline_pca_rows": pca.n_rows}
    if errors:
        found["baseline_pca_loss"] = pca.mse_per_feature
    if pca.n_rows < table.shape[0]:
        log.info("the PCA baseline uses a random sample of %d of %d rows", pca.n_rows, table.shape[0])
    if table.labels is not None:
        labels = table.labels[rows]
        missing = int(np.count_nonzero(metrics.missing_labels(labels)))
        if missing:
            log.info("the accuracy of neighbours leaves out %d of %d rows, which have no label", missing, len(labels))
        for name, points in (("latent", codes[rows]), ("pca", pca.scores)):
            found[f"knn_accuracy_{name}"] = metrics.knn_accuracy(points, labels, seed=seed % 2**32)
    return found


def has_likelihood(found: dict[str, Any]) -> bool:
    """Whether the figures are likelihoods of counts, not squared errors."""
    return found.get("nll_per_row") is not None or found.get("held_out_nll_per_row") is not None


def held_out(found: dict[str, Any], name: str) -> float:
    """A figure over the held-out rows, or over all rows if none were held out."""
    held = found[f"held_out_{name}"]
    value: float = found[name] if held is None else held
    return value


def held_text(found: dict[str, Any]) -> str:
    """The rows that `held_out` uses, as the end of a phrase."""
    return "" if found["held_out_nll_per_row"] is None else " on held-out rows"


def baseline_text(found: dict[str, Any]) -> str:
    """The baseline of a count model, in words."""
    kind = "Poisson" if found["baseline"] == "poisson" else "negative binomial with fitted dispersions"
    return f"a model without latent codes: each feature's share of all counts, times the row total ({kind})"


def in_short(found: dict[str, Any]) -> str:
    """The main figure and the figure of the baseline, for a log line."""
    if not has_likelihood(found):
        return f"squared error {found['mse_per_feature']:.4g} per feature, PCA {found['baseline_pca_loss']:.4g}"
    ours, theirs = (held_out(found, name) for name in ("nll_per_row", "baseline_nll_per_row"))
    return f"{ours:.5g} nats per row{held_text(found)}, {BASELINE} {theirs:.5g}"


def hints(found: dict[str, Any]) -> list[str]:
    """What a user may want to change, one sentence each, from the content of ``metrics.json``."""
    ours, theirs, name = against(found)
    told = []
    if theirs is not None and ours > theirs > 1e-9 * ours:  # else PCA is exact
        what = "likelihood" if has_likelihood(found) else "error"
        told.append(f"the {what} is worse than that of {name} ({ours:.5g}, {theirs:.5g}): {BETTER}")
    if still_fell(found):
        told.append(f"the loss still fell when --epochs {found['epochs_run']} ended training: try more epochs")
    return told


def still_fell(found: dict[str, Any]) -> bool:
    """Whether the largest number of epochs ended training while the loss still fell."""
    return bool(found["exit_reason"] == "max_iter" and found["best_epoch"] > 0.9 * found["epochs_run"])


BETTER = "try another --hidden, --estimator or learning_rate_init"


def counted(n: int, what: str) -> str:
    """``1 thread``, ``2 threads``."""
    return f"{n} {what}{'' if n == 1 else 's'}"


def against(found: dict[str, Any]) -> tuple[Any, Any, str]:
    """The figure of a fit, that of its baseline (None if there is none), and the name of the baseline."""
    if has_likelihood(found):
        ours, theirs = "held_out_nll_per_row", "held_out_baseline_nll_per_row"
        if found.get(ours) is None:
            ours, theirs = "nll_per_row", "baseline_nll_per_row"
        return found[ours], found[theirs], BASELINE
    if "pca_held_out_mse_per_feature" in found:
        return found.get("held_out_mse_per_feature"), found["pca_held_out_mse_per_feature"], "PCA"
    return found.get("mse_per_feature"), found.get("baseline_pca_loss"), "PCA"
