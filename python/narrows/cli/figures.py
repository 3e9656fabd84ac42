"""The figures of a report, as SVG for the inside of an HTML page."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from . import measures

__all__ = ["figure", "fit_figures"]

MAX_POINTS = 20_000


def figure(name: str, caption: str, drawn: Any) -> dict[str, str]:
    """A matplotlib Figure as a page needs it. The same drawing gives the same bytes."""
    return {"name": name, "caption": caption, "data": _svg(drawn)}


def fit_figures(
    metrics: dict[str, Any],
    history: list[dict[str, Any]],
    codes: npt.NDArray[Any],
    labels: npt.NDArray[Any] | None,
    settings: dict[str, Any],
) -> list[dict[str, str]]:
    """The figures for one fit, in the order of the page.

    Parameters
    ----------
    metrics : dict
        The content of ``metrics.json``.
    history : list of dict
        The lines of ``history.jsonl``.
    codes : ndarray of shape (n_rows, n_components)
    labels : ndarray of shape (n_rows,), or None
        Classes of the rows.
    settings : dict
        The content of ``config.toml``.
    """
    from .. import plotting
    from ..plotting.style import GREEN

    figures: list[dict[str, str]] = []

    def add(name: str, caption: str, draw: Callable[[Any], Any], height: float = 4.2) -> None:
        drawn = plotting.new_figure(6.4, height)
        draw(drawn.subplots())
        figures.append(figure(name, caption, drawn))

    columns = {name: [line.get(name) for line in history] for name in ("loss", "val_loss")}
    variational = any("objective" in line for line in history)
    if variational:
        columns["objective"] = [line.get("objective") for line in history]
    pca_loss = metrics.get("baseline_pca_loss")
    likelihood = measures.has_likelihood(metrics)
    reference: tuple[float, str] | None = None
    if likelihood:
        reference = measures.held_out(metrics, "baseline_nll_per_row"), measures.BASELINE
    elif settings.get("loss") == "mse" and pca_loss is not None and not variational:
        reference = pca_loss * metrics["n_features"], f"PCA, {metrics['n_components']} components"

    def loss(ax: Any) -> None:
        if reference is not None:
            ax.axhline(reference[0], color=GREEN, lw=1.5, ls=(0, (4, 2)), label=reference[1])
        plotting.plot_loss(columns, ax)
        if likelihood:
            ax.set_ylabel("nats per row")

    if history:
        text = "Loss after each epoch: summed over the features, averaged over the rows."
        if likelihood:
            text = "Negative log-likelihood after each epoch, averaged over the rows, in nats."
        if variational:
            text += " It includes the weighted KL divergence of the latents from their prior."
        if likelihood:
            text += f" Dashed line: {measures.baseline_text(metrics)}{measures.held_text(metrics)}."
        elif reference is not None:
            text += " Dashed line: PCA with the same number of components, on all rows."
        add("Loss curves", text, loss)

    index = np.arange(len(codes))
    note = ""
    if len(codes) > MAX_POINTS:
        index = np.sort(np.random.default_rng(0).choice(len(codes), MAX_POINTS, replace=False))
        note = f" The figure shows a random sample of {MAX_POINTS:,} of {len(codes):,} rows."
    shown = labels[index] if labels is not None and len(labels) == len(codes) else None
    if shown is not None and shown.dtype.kind == "U":
        shown = np.where(shown == "", "no label", shown)
    colours = "Colours: labels of the data." if shown is not None else "The data have no labels."
    add(
        "Latent space",
        f"Latent codes of the rows, {measures.counted(codes.shape[1], 'component')}. {colours}{note}",
        lambda ax: plotting.plot_latent(codes[index], shown, ax),
    )
    if likelihood or (metrics.get("mse_per_feature") is not None and pca_loss is not None):
        text = "Mean squared error per feature of the normalised data. Lower is better."
        if likelihood:
            text = f"Negative log-likelihood{measures.held_text(metrics)}. Lower is better. Baseline: "
            text += f"{measures.baseline_text(metrics)}."
            if variational:
                text += " For the autoencoder it is an upper bound, from one draw of each code."
        if metrics.get("knn_accuracy_latent") is not None:
            text += " Below: accuracy of a 15-nearest-neighbour classifier of the labels, in 5-fold cross-validation."
            if likelihood:
                text += " PCA uses the logarithms of counts, with rows scaled to one total."
        if (metrics.get("baseline_pca_rows") or metrics["n_rows"]) < metrics["n_rows"]:
            text += f" PCA uses a random sample of {metrics['baseline_pca_rows']:,} rows."
        drawn = plotting.new_figure(6.4, 4.2)
        _baseline(drawn, metrics)
        figures.append(figure("Comparison with a baseline" if likelihood else "Comparison with PCA", text, drawn))
    if likelihood:
        text = f"Distribution of the negative log-likelihood of a row{measures.held_text(metrics)}. "
        text += "Rows far to the right fit the model badly or have many counts."
        losses = metrics["row_losses"]
        add(
            "Loss per row",
            text,
            lambda ax: plotting.plot_row_losses(
                losses["edges"], losses["model"], losses["baseline"], ax, baseline_name=measures.BASELINE
            ),
        )
    worst = metrics.get("worst_features") or []
    if worst:
        add(
            "Features with the largest error",
            f"Mean squared error of the {len(worst)} worst features of the normalised data.",
            lambda ax: plotting.plot_feature_errors(
                [f["mse"] for f in worst], [f["name"] for f in worst], ax=ax, mean=metrics["mse_per_feature"]
            ),
            max(2.4, 1.0 + 0.17 * len(worst)) if len(worst) < 19 else 4.2,
        )
    return figures


def _baseline(drawn: Any, metrics: dict[str, Any]) -> None:
    """Bars of the autoencoder and its baseline: the error and, if there are labels, the neighbour accuracy."""
    from ..plotting.style import BLUE, GREEN, INK, dress

    rows: list[tuple[str, str, list[float], list[str]]] = []

    def pair(title: str, other: str, values: list[float], form: str) -> None:
        rows.append((title, other, values, [form.format(value) for value in values]))

    if measures.has_likelihood(metrics):
        names = ("nll", "baseline_nll")
        pair("Nats per row", "baseline", [measures.held_out(metrics, f"{name}_per_row") for name in names], "{:.5g}")
        if metrics["nll_per_count"] is not None:
            each = (measures.held_out(metrics, f"{name}_per_count") for name in names)
            rows[0][3][:] = [f"{text}\n{value:.4f} per count" for text, value in zip(rows[0][3], each, strict=True)]
    else:
        errors = [metrics["mse_per_feature"], metrics["baseline_pca_loss"]]
        pair("Mean squared error per feature", "PCA", errors, "{:.4g}")
    accuracies: list[Any] = [metrics.get("knn_accuracy_latent"), metrics.get("knn_accuracy_pca")]
    if None not in accuracies:
        pair("Accuracy of 15 nearest neighbours", "PCA", accuracies, "{:.1%}")
    axes = np.atleast_1d(drawn.subplots(len(rows), 1))
    for ax, (title, other, values, texts) in zip(axes, rows, strict=True):
        bars = ax.barh([0, 1], values, color=[BLUE, GREEN], height=0.62)
        ax.bar_label(bars, texts, padding=4, color=INK)
        ax.set_yticks([0, 1], ["autoencoder", other])
        ax.set_ylim(1.6, -0.6)
        ax.set_xlim(0, (1.3 if "\n" in texts[0] else 1.18) * max(max(values), 1e-12))
        ax.set_title(title)
        dress(ax)
        ax.grid(False)
        ax.tick_params(axis="y", length=0)
        ax.set_xticks([])
        ax.spines["bottom"].set_visible(False)


_DARK = {"#33383d": "#d5dae0", "#e3e6e9": "#3b424a", "#5c5c5c": "#a3a9b0", "#ffffff": "#1c2126"}
"""Colours of a figure's ink, grid, greys and paper on a dark page. The other colours are clear on both."""


def _svg(figure: Any) -> str:
    import matplotlib

    out = io.BytesIO()
    # Glyphs as paths look the same everywhere; without a date the same run gives the same bytes.
    with matplotlib.rc_context({"svg.fonttype": "path", "svg.hashsalt": "narrows"}):
        figure.savefig(out, format="svg", dpi=150, metadata={"Date": None}, transparent=True)
    rules = "".join(
        f'[style*="{kind}: {light}"]{{{kind}:{dark} !important}}'
        for light, dark in _DARK.items()
        for kind in ("fill", "stroke")
    )
    text = out.getvalue().decode()
    text = text.replace("</style>", f"@media (prefers-color-scheme: dark){{{rules}}}</style>", 1)
    return base64.b64encode(text.encode()).decode()
