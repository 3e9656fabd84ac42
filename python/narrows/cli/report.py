"""The report of a fit: one HTML page that needs nothing else, and a table for MultiQC.

- `build` reads the folder of a fit and writes ``report.html``. The figures are SVG inside the page. The page uses no
  script, no font and no other address.
- `multiqc` needs no optional package.
- Neither trains, encodes or changes another file.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .._extras import require
from ..errors import DataError, NarrowsError
from ..persistence import atomic_write
from . import measures
from .figures import fit_figures
from .rundir import read_history
from .settings import READING, read_toml, show_size

__all__ = ["build", "check_extra", "duration", "multiqc", "write_page"]


def check_extra() -> None:
    """Raise MissingExtraError unless the packages of the extra ``report`` are installed."""
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
        The folder ``--out`` of the fit.
    metrics : dict, optional
        The content of ``metrics.json``, if that is not written yet.
    codes, labels : ndarray, optional
        The latent codes and the classes of the rows. By default they are read from the folder and from the data.

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
        fit_figures(metrics, history, codes, labels, settings),
        settings,
        _facts(metrics),
        hints=measures.hints(metrics),
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
    hints: Sequence[str] = (),
) -> Path:
    """Write ``report.html`` into `folder`, complete or not at all.

    Parameters
    ----------
    folder : Path
        Its name is the title of the page.
    subtitle, version : str
    tiles : list of (value, name, remark)
        The headline figures.
    figures : list
        Results of `figure`.
    settings : dict
        The content of ``config.toml``.
    run : dict
        Facts about the run.
    table : (heads, rows), optional
        A table below the figures.
    hints : sequence of str
        What a user may want to change.

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
        hints=hints,
        settings=_cells(plain),
        run=_cells(run),
    )
    target = folder / "report.html"
    atomic_write(target, page.encode(errors="backslashreplace"))
    return target


def multiqc(folder: Path, metrics: dict[str, Any]) -> Path:
    """Write ``narrows_mqc.json``: the run as one row of a MultiQC table (custom content)."""
    columns = {
        "held_out_nll_per_row": ("NLL", "Negative log-likelihood per held-out row, nats", "{:,.5g}"),
        "held_out_baseline_nll_per_row": ("Baseline NLL", "The same for feature shares alone", "{:,.5g}"),
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
        "description": "Autoencoders fitted by narrows, compared with PCA or, for counts, with feature shares alone.",
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
        raise DataError(f"{folder} has no metrics.json: give the --out folder of a finished fit")
    try:
        metrics = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path} is damaged ({error}): fit again") from None
    if not isinstance(metrics, dict) or metrics.get("status") != "finished":
        raise DataError(f"the fit in {folder} is not finished: repeat its command to resume it")
    return metrics


def _read_settings(folder: Path) -> dict[str, Any]:
    try:
        return read_toml(folder / "config.toml")
    except (OSError, ValueError) as error:
        raise DataError(f"{folder / 'config.toml'} cannot be read ({error})") from None


def _read_codes(folder: Path) -> npt.NDArray[Any]:
    from ..data import open as open_data

    for name in ("latent.h5ad", "latent.npy"):
        if (folder / name).exists():
            with open_data(folder / name) as source:
                return np.asarray(source.read_rows(slice(None)))
    raise DataError(f"{folder} has no latent.h5ad or latent.npy: fit again")


def _read_labels(settings: dict[str, Any]) -> npt.NDArray[Any] | None:
    """The classes of the rows; None if the data have none or are no longer at their path."""
    from ..data import open as open_data
    from .applying import known_classes

    key = settings.get("label-key")
    try:
        reading: dict[str, Any] = {name: settings.get(name.replace("_", "-")) for name in ("layer", *READING)}
        with open_data(settings["data"], **reading) as source:
            return source.labels if key is None else known_classes(key, source)
    except (OSError, NarrowsError, KeyError):
        return None


def _tiles(m: dict[str, Any]) -> list[tuple[str, str, str]]:
    """The headline figures: a value, its name and a remark."""
    remark = m["normalize"]
    if measures.has_likelihood(m):
        empty = [f"{m[f'n_empty_{what}']:,} empty {what}" for what in ("rows", "features") if m.get(f"n_empty_{what}")]
        remark = "; ".join(["counts", *empty])
    tiles = [(f"{m['n_rows']:,} × {m['n_features']:,}", "rows × features", remark)]
    tiles.append((str(m["n_components"]), "latent components", _breakable(m["estimator"])))
    if m.get("mse_per_feature") is not None:
        note = ""
        if (m.get("baseline_pca_loss") or 0.0) > 1e-9 * m["mse_per_feature"]:  # else PCA is exact
            change = m["mse_per_feature"] / m["baseline_pca_loss"] - 1
            note = f"{abs(change):.1%} {'below' if change < 0 else 'above'} PCA"
            if change > 1:
                note = f"{change + 1:.3g} times the error of PCA"
        tiles.append((f"{m['mse_per_feature']:.4g}", "squared error per feature", note))
    if measures.has_likelihood(m):
        ours, theirs = (measures.held_out(m, name) for name in ("nll_per_row", "baseline_nll_per_row"))
        held = " held out" if m["held_out_nll_per_row"] is not None else ""
        tiles.append((f"{ours:.5g}", f"nats per row{held}", f"baseline {theirs:.5g}"))
        if m["nll_per_count"] is not None:
            tiles.append(
                (f"{measures.held_out(m, 'nll_per_count'):.4f}", f"nats per count{held}", f"epoch {m['best_epoch']}")
            )
    elif m.get("val_loss") is not None:
        tiles.append((f"{m['val_loss']:.5g}", "validation loss", f"epoch {m['best_epoch']}"))
    reason = REASONS.get(m["exit_reason"], m["exit_reason"])
    tiles.append((str(m["epochs_run"]), "epochs", reason))
    tiles.append((duration(m["wall_s"]), "wall time", _rate(m.get("samples_per_s"))))
    tiles.append(
        (
            f"{m['peak_rss_bytes'] / 1e9:.2f} GB",
            "peak memory",
            f"{m['backend']}, {measures.counted(m['n_threads'], 'thread')}",
        )
    )
    return tiles


def _breakable(name: str) -> str:
    """The name of a class, which may break before its last word."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "\u200b", name)


REASONS = {"max_iter": "limit reached", "converged": "no more improvement"}


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
    if "n parameters" in facts:
        facts["n parameters"] = f"{facts['n parameters']:,}"
    return facts | {"command": shlex.join(map(str, m["argv"]))}


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
