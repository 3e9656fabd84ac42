"""The report of a fit: one HTML page that needs nothing else, and a table for MultiQC.

- `build` reads what a fit left in its folder and writes ``report.html`` by `write_page`: figures are SVG inside the
  page; no script, no font and no address outside is used.
- `multiqc` needs no optional package.
- Neither trains, encodes or changes any other file.
"""

from __future__ import annotations

import base64
import io
import json
import tomllib
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .._extras import require
from ..errors import DataError, NarrowsError
from ..evaluation import counts
from ..persistence import atomic_write
from .rundir import read_history
from .settings import show_size

__all__ = ["build", "check_extra", "duration", "figure", "multiqc", "write_page"]

MAX_POINTS = 20_000


def check_extra() -> None:
    """Raise MissingExtraError unless the packages of the extra ``report`` are there."""
    require("jinja2", "report", "the HTML report")
    require("matplotlib", "report", "the HTML report")


def build(
    folder: Path,
    metrics: dict[str, Any] | None = None,
    *,
    codes: npt.NDArray[Any] | None = None,
    labels: npt.NDArray[Any] | None = None,
) -> Path:
    """Write ``report.html`` into the folder of a fit.

    Parameters
    ----------
    folder : Path
        What was given to ``narrows fit --out``.
    metrics : dict, optional
        The content of ``metrics.json`` where it is not written yet.
    codes, labels : ndarray, optional
        The latent codes and the classes of the rows; read from the folder and from the data by default.

    Returns
    -------
    Path
        The page.

    Raises
    ------
    DataError
        The folder holds no finished fit.
    MissingExtraError
        jinja2 or matplotlib is missing.
    """
    check_extra()
    if metrics is None:
        metrics = _read_metrics(folder)
    settings = _read_settings(folder)
    if codes is None:
        codes, labels = _read_codes(folder), _read_labels(settings)
    history = read_history(folder / "history.jsonl")
    return write_page(
        folder,
        f"{metrics['estimator']} with {metrics['n_components']} latent components, fitted to {metrics['data']} by "
        f"narrows {metrics['version']}",
        metrics["version"],
        _tiles(metrics),
        _figures(metrics, history, codes, labels, settings),
        settings,
        _facts(metrics),
    )


def write_page(
    folder: Path,
    subtitle: str,
    version: str,
    tiles: list[tuple[str, str, str]],
    figures: list[dict[str, str]],
    settings: dict[str, Any],
    run: dict[str, Any],
    *,
    table: tuple[list[str], list[list[str]]] | None = None,
) -> Path:
    """Write ``report.html`` into `folder`, whole or not at all.

    Parameters
    ----------
    folder : Path
        Its name is the page's.
    subtitle, version : str
    tiles : list of (value, what it is, remark)
        The headline figures.
    figures : list
        Made by `figure`.
    settings : dict
        The content of ``config.toml``.
    run : dict
        Facts about the run.
    table : (heads, rows), optional
        To stand below the figures.

    Returns
    -------
    Path
        The page.
    """
    jinja2 = require("jinja2", "report", "the HTML report")
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    template = environment.from_string(files(__package__).joinpath("templates/report.html").read_text(encoding="utf-8"))
    plain = {k: v for k, v in settings.items() if not isinstance(v, dict)} | {
        f"set {k}": v for k, v in settings.get("set", {}).items()
    }
    if "max-memory" in plain:
        plain["max-memory"] = show_size(plain["max-memory"])
    page: str = template.render(
        name=folder.resolve().name,
        subtitle=subtitle,
        version=version,
        tiles=tiles,
        figures=figures,
        table=table,
        settings=_cells(plain),
        run=_cells(run),
    )
    target = folder / "report.html"
    atomic_write(target, page.encode())
    return target


def figure(name: str, caption: str, drawn: Any) -> dict[str, str]:
    """A matplotlib Figure for a page: SVG inside it, the same bytes for the same drawing."""
    return {"name": name, "caption": caption, "data": _svg(drawn)}


def multiqc(folder: Path, metrics: dict[str, Any]) -> Path:
    """Write ``narrows_mqc.json``: the run as one row of a MultiQC table (custom content)."""
    columns = {
        "held_out_nll_per_row": ("NLL", "Negative log-likelihood of a held-out row, nats", "{:,.5g}"),
        "held_out_baseline_nll_per_row": ("Baseline NLL", "The same by the features' shares alone", "{:,.5g}"),
        "mse_per_feature": (
            "Reconstruction error",
            "Mean squared error per feature of the autoencoder",
            "{:,.4g}",
        ),
        "baseline_pca_loss": ("PCA error", "The same for PCA with as many components", "{:,.4g}"),
        "train_loss": ("Training loss", "Mean over samples", "{:,.4g}"),
        "val_loss": ("Validation loss", "Mean over held-out samples", "{:,.4g}"),
        "knn_accuracy_latent": ("kNN accuracy", "15 nearest neighbours in the latent space", "{:,.3f}"),
        "knn_accuracy_pca": ("kNN accuracy (PCA)", "The same on the PCA scores", "{:,.3f}"),
        "epochs_run": ("Epochs", "Epochs of training", "{:,.0f}"),
        "wall_s": ("Seconds", "Wall time", "{:,.1f}"),
    }
    known = {name: metrics[name] for name in columns if metrics.get(name) is not None}
    content = {
        "id": "narrows",
        "section_name": "narrows",
        "description": "Autoencoders fitted by narrows, beside PCA with as many components or, of counts, a baseline.",
        "plot_type": "table",
        "pconfig": {"id": "narrows_table", "title": "narrows: fits", "namespace": "narrows"},
        "headers": {
            name: {"title": title, "description": text, "format": form}
            for name, (title, text, form) in columns.items()
            if name in known
        },
        "data": {folder.resolve().name: known},
    }
    target = folder / "narrows_mqc.json"
    atomic_write(target, (json.dumps(content, indent=1, allow_nan=False) + "\n").encode())
    return target


def _read_metrics(folder: Path) -> dict[str, Any]:
    path = folder / "metrics.json"
    if not path.exists():
        raise DataError(f"{folder} holds no metrics.json: give the --out folder of a finished `narrows fit`")
    try:
        metrics = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path} is damaged ({error}): fit again") from None
    if not isinstance(metrics, dict) or metrics.get("status") != "finished":
        raise DataError(f"the fit in {folder} is not finished: repeat its command to resume it")
    return metrics


def _read_settings(folder: Path) -> dict[str, Any]:
    try:
        return tomllib.loads((folder / "config.toml").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{folder / 'config.toml'} cannot be read ({error})") from None


def _read_codes(folder: Path) -> npt.NDArray[Any]:
    from ..data import open as open_data

    for name in ("latent.h5ad", "latent.npy"):
        if (folder / name).exists():
            with open_data(folder / name) as source:
                return np.asarray(source.read_rows(slice(None)))
    raise DataError(f"{folder} holds no latent.h5ad or latent.npy: fit again")


def _read_labels(settings: dict[str, Any]) -> npt.NDArray[Any] | None:
    """Classes of the rows if the data is still where it was; else the points have no colours."""
    from ..data import open as open_data

    try:
        with open_data(
            settings["data"],
            layer=settings.get("layer"),
            genes_by_cells=settings.get("genes-by-cells", False),
        ) as source:
            return source.labels
    except (OSError, NarrowsError, KeyError):
        return None


def _figures(
    metrics: dict[str, Any],
    history: list[dict[str, Any]],
    codes: npt.NDArray[Any],
    labels: npt.NDArray[Any] | None,
    settings: dict[str, Any],
) -> list[dict[str, str]]:
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
    counted = counts.counted(metrics)
    reference: tuple[float, str] | None = None
    if counted:
        reference = counts.judged(metrics, "baseline_nll_per_row"), counts.BASELINE
    elif settings.get("loss") == "mse" and pca_loss is not None and not variational:
        reference = pca_loss * metrics["n_features"], f"PCA, {metrics['n_components']} components"

    def loss(ax: Any) -> None:
        if reference is not None:
            ax.axhline(reference[0], color=GREEN, lw=1.5, ls=(0, (4, 2)), label=reference[1])
        plotting.plot_loss(columns, ax)
        if counted:
            ax.set_ylabel("nats per row")

    if history:
        text = "Loss after each epoch: mean over the samples of the sum over the features."
        if counted:
            text = "Negative log-likelihood after each epoch, complete: mean over the rows, in nats."
        if variational:
            text += " The divergence of the latents from their prior is included, with its weight."
        if counted:
            text += f" The dashed line is {counts.baseline_text(metrics)}{counts.held_text(metrics)}."
        elif reference is not None:
            text += " The dashed line is the error of PCA with as many components, over all rows."
        add("Loss curves", text, loss)

    index = np.arange(len(codes))
    note = ""
    if len(codes) > MAX_POINTS:
        index = np.sort(np.random.default_rng(0).choice(len(codes), MAX_POINTS, replace=False))
        note = f" A random {MAX_POINTS:,} of {len(codes):,} rows are drawn."
    shown = labels[index] if labels is not None and len(labels) == len(codes) else None
    colours = "Colours: labels of the data." if shown is not None else "The data has no labels."
    add(
        "Latent space",
        f"The {codes.shape[1]} latent component(s) of each row. {colours}{note}",
        lambda ax: plotting.plot_latent(codes[index], shown, ax),
    )
    if counted or (metrics.get("mse_per_feature") is not None and pca_loss is not None):
        text = "Mean squared error per feature on the normalised data; shorter is better."
        if counted:
            text = f"Negative log-likelihood{counts.held_text(metrics)}; shorter is better. The baseline is "
            text += f"{counts.baseline_text(metrics)}."
            if variational:
                text += " Of the autoencoder it is the upper bound by one draw of each code."
        if metrics.get("knn_accuracy_latent") is not None:
            text += " Below: share of rows whose label 15 neighbours tell, in 5-fold cross-validation."
            if counted:
                text += " PCA is that of the logarithms of counts scaled to one total."
        if (metrics.get("baseline_pca_rows") or metrics["n_rows"]) < metrics["n_rows"]:
            text += f" PCA was computed on a random {metrics['baseline_pca_rows']:,} rows."
        drawn = plotting.new_figure(6.4, 4.2)
        _baseline(drawn, metrics)
        figures.append(figure("Against a baseline" if counted else "Against PCA", text, drawn))
    if counted:
        text = f"Negative log-likelihoods{counts.held_text(metrics) or ' of the rows'}: those far to the right are "
        text += "explained badly, or have many counts."
        add("Losses of rows", text, lambda ax: counts.plot_losses(ax, metrics["row_losses"]))
    worst = metrics.get("worst_features") or []
    if worst:
        add(
            "Worst-reconstructed features",
            f"The {len(worst)} features with the largest mean squared error, on the normalised data.",
            lambda ax: plotting.plot_feature_errors(
                [f["mse"] for f in worst], [f["name"] for f in worst], ax=ax, mean=metrics["mse_per_feature"]
            ),
            max(2.4, 1.0 + 0.17 * len(worst)) if len(worst) < 19 else 4.2,
        )
    return figures


def _baseline(drawn: Any, metrics: dict[str, Any]) -> None:
    """Bars: the autoencoder beside its baselines, for the error and, where there are labels, for the neighbours."""
    from ..plotting.style import BLUE, GREEN, INK, dress

    rows: list[tuple[str, str, list[float], list[str]]] = []

    def pair(title: str, other: str, values: list[float], form: str) -> None:
        rows.append((title, other, values, [form.format(value) for value in values]))

    if counts.counted(metrics):
        names = ("nll", "baseline_nll")
        pair("Nats per row", "shares alone", [counts.judged(metrics, f"{name}_per_row") for name in names], "{:.5g}")
        if metrics["nll_per_count"] is not None:
            each = (counts.judged(metrics, f"{name}_per_count") for name in names)
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


def _svg(figure: Any) -> str:
    import matplotlib

    out = io.BytesIO()
    # Glyphs as paths look the same everywhere; without a date the same run gives the same bytes.
    with matplotlib.rc_context({"svg.fonttype": "path", "svg.hashsalt": "narrows"}):
        figure.savefig(out, format="svg", dpi=150, metadata={"Date": None})
    return base64.b64encode(out.getvalue()).decode()


def _tiles(m: dict[str, Any]) -> list[tuple[str, str, str]]:
    """The headline figures: value, what it is, and a remark."""
    remark = m["normalize"]
    if counts.counted(m):
        empty = [f"{m[f'n_empty_{what}']:,} empty {what}" for what in ("rows", "features") if m.get(f"n_empty_{what}")]
        remark = "; ".join(["counts", *empty])
    tiles = [(f"{m['n_rows']:,} × {m['n_features']:,}", "rows × features", remark)]
    tiles.append((str(m["n_components"]), "latent components", m["estimator"]))
    if m.get("mse_per_feature") is not None:
        note = ""
        if (m.get("baseline_pca_loss") or 0.0) > 1e-9 * m["mse_per_feature"]:  # else PCA is exact
            change = m["mse_per_feature"] / m["baseline_pca_loss"] - 1
            note = f"{abs(change):.1%} {'below' if change < 0 else 'above'} PCA"
            if change > 1:
                note = f"{change + 1:.3g} times that of PCA"
        tiles.append((f"{m['mse_per_feature']:.4g}", "squared error per feature", note))
    if counts.counted(m):
        ours, theirs = (counts.judged(m, name) for name in ("nll_per_row", "baseline_nll_per_row"))
        held = " held out" if m["held_out_nll_per_row"] is not None else ""
        tiles.append((f"{ours:.5g}", f"nats per row{held}", f"baseline {theirs:.5g}"))
        if m["nll_per_count"] is not None:
            tiles.append(
                (f"{counts.judged(m, 'nll_per_count'):.4f}", f"nats per count{held}", f"epoch {m['best_epoch']}")
            )
    elif m.get("val_loss") is not None:
        tiles.append((f"{m['val_loss']:.5g}", "validation loss", f"epoch {m['best_epoch']}"))
    reason = _REASONS.get(m["exit_reason"], m["exit_reason"])
    tiles.append((str(m["epochs_run"]), "epochs", reason))
    tiles.append((duration(m["wall_s"]), "wall time", _rate(m.get("samples_per_s"))))
    tiles.append((f"{m['peak_rss_bytes'] / 1e9:.2f} GB", "peak memory", f"{m['backend']}, {m['n_threads']} thread(s)"))
    return tiles


_REASONS = {"max_iter": "all that were allowed", "converged": "until no improvement"}


def duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def _rate(samples_per_s: float | None) -> str:
    return "" if not samples_per_s else f"{samples_per_s:,.0f} samples/s"


def _facts(m: dict[str, Any]) -> dict[str, Any]:
    names = (
        "version", "backend", "isa", "precision", "n_threads", "threads_from", "seed", "input_sha256",
        "bytes_in", "bytes_out", "n_empty_rows", "n_empty_features", "n_parameters", "python", "platform", "started",
    )  # fmt: skip
    facts = {name.replace("_", " "): m[name] for name in names if m.get(name) is not None}
    facts |= {name: show_size(facts[name]) for name in ("bytes in", "bytes out") if name in facts}
    return facts | {"command": " ".join(map(str, m["argv"]))}


def _cells(table: dict[str, Any]) -> list[tuple[str, str]]:
    def text(value: Any) -> str:
        if isinstance(value, bool):
            return "yes" if value else "no"
        if isinstance(value, int):
            return str(value)
        if isinstance(value, list):
            return ", ".join(map(str, value)) or "none"
        return str(value)

    return [(name, text(value)) for name, value in table.items()]
