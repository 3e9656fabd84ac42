"""The command sweep: one fit for each number of components, compared with PCA, to find the elbow.

- Each size is an ordinary fit with its own folder and checkpoint under ``--out``. The data are opened and normalised
  once. A sweep that starts again continues with the unfinished sizes.
- All sizes hold out the same rows. PCA is fitted once to the training rows, or to a sample of them, and compared on the
  held-out rows. Count models have their own baseline instead.
- ``sweep.json`` is complete after each size and lists the finished ones. ``_SUCCESS`` is the last file.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import shlex
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

from .._version import __version__
from ..data.normalized import NormalizedSource
from ..errors import DataError, MissingExtraError, NarrowsError
from ..evaluation.baselines import pca, pca_errors
from ..evaluation.metrics import elbow, sample_rows
from ..plan.losses import LOSSES
from ..training import Callback
from . import measures, report
from .figures import figure
from .jobs import Input, Stop, fit_opened, take_image_shape
from .resources import Budget, held_rows
from .rundir import RunDir
from .settings import FitSettings, UsageError, read_toml

__all__ = ["SweepDir", "build_report", "sweep"]

log = logging.getLogger("narrows")

_FOLDER = "components-"
_TAKEN = (
    "n_components", "loss", "normalize", "val_loss", "train_loss", "held_out_mse_per_feature", "mse_per_feature",
    "held_out_nll_per_row", "held_out_nll_per_count", "held_out_baseline_nll_per_row", "baseline",
    "knn_accuracy_latent", "knn_accuracy_pca", "epochs_run", "best_epoch", "exit_reason", "n_parameters", "wall_s",
)  # fmt: skip


class SweepDir(RunDir):
    """The output folder of one sweep, with the folders of its fits."""

    command: ClassVar[str] = "sweep"
    made: ClassVar[tuple[str, ...]] = ("_SUCCESS", "sweep.json", "report.html")
    needed: ClassVar[tuple[tuple[str, ...], ...]] = (("sweep.json",),)
    kept: ClassVar[tuple[str, ...]] = ("sweep.json",)

    @property
    def begun(self) -> bool:
        return self.succeeded or any(True for _ in self._folders())

    def folder(self, size: int) -> Path:
        return self / f"{_FOLDER}{size}"

    def _folders(self) -> Iterator[Path]:
        return (p for p in self.path.glob(f"{_FOLDER}*") if p.name.removeprefix(_FOLDER).isdigit())

    def holds(self, sizes: Sequence[int]) -> bool:
        """Whether the finished sweep had these sizes and their fits still exist."""
        found = [row["n_components"] for row in read(self.path)["sizes"]]
        return found == list(sizes) and all(RunDir(self.folder(size)).finished for size in sizes)

    def _subfolders(self) -> None:
        pass

    def clear(self) -> None:
        """Remove the files of an earlier sweep and its fits, ``_SUCCESS`` first."""
        for name in self.made:
            (self / name).unlink(missing_ok=True)
        for folder in self._folders():
            RunDir(folder).inspect()  # raises unless a fit made the folder
            shutil.rmtree(folder)


def sweep(
    settings: FitSettings,
    sizes: Sequence[int],
    stop: Stop,
    *,
    callbacks: Callable[[], Sequence[Callback]] = lambda: (),
    argv: Sequence[str] = (),
) -> None:
    """Fit each number of components, and write all results under ``settings.out``.

    Parameters
    ----------
    settings : FitSettings
        The settings of each fit, except `components` and the folder.
    sizes : sequence of int
        Numbers of components; repeated ones are used once.
    stop : jobs.Stop
    callbacks : callable
        Returns the training callbacks of one fit.
    argv : sequence of str
        The command line, for ``sweep.json``.
    """
    sizes = sorted(set(sizes))
    fits = [dataclasses.replace(settings, components=size) for size in sizes]
    estimators = [each.build() for each in fits]
    if estimators[0]._validation_part() is None:
        raise UsageError("a sweep compares sizes on held-out rows: use --set early_stopping=true")
    fits = [each.resolved(estimator) for each, estimator in zip(fits, estimators, strict=True)]
    shared = fits[0]
    run = SweepDir(Path(shared.out))
    run.inspect()
    started = time.time()
    with Input.open(shared) as given, contextlib.ExitStack() as held:
        identity = shared.identity() | {"run.input_sha256": given.digest}
        del identity["components"]
        if run.resumes(identity, settings.resume) and run.finished and run.holds(sizes):
            run.note_finished()
            return
        table = given.normalized(shared, estimators[0].loss)
        for each in estimators:
            take_image_shape(each, given.source)
        # Check that every size fits into memory before the first one starts.
        room = [Budget.of(each, table, settings.max_memory).block_bytes for each in estimators][-1]
        if not settings.dry_run:
            held.enter_context(run.claimed())
            # Another sweep may have finished here before this one got the lock.
            if not run.resumes(identity, settings.resume):
                run.clear()
            (run / "_SUCCESS").unlink(missing_ok=True)
            facts = {"version": __version__, "input_sha256": given.digest}
            run.write_config(shared.stored() | {"components": sizes, "run": facts})
        rows: list[dict[str, Any]] = []
        source = given.source
        result: dict[str, Any] = {
            "status": "running",
            "data": source.name if source.path is None else settings.data,
            "n_rows": source.shape[0],
            "n_features": source.shape[1],
            "estimator": type(estimators[0]).__name__,
            "loss": estimators[0].loss,
            "seed": settings.seed,
            "input_sha256": given.digest,
            "version": __version__,
            "elbow": None,
            "sizes": rows,
            "argv": list(argv),
        }
        baseline: Any = None
        for i, (size, each, estimator) in enumerate(zip(sizes, fits, estimators, strict=True)):
            folder = run.folder(size)
            log.info("%d components, %d of %d sizes", size, i + 1, len(sizes))
            try:
                fit_opened(
                    # Resume the fits of this sweep; the sweep has already refused or removed all others.
                    dataclasses.replace(each, out=str(folder), resume="auto"),
                    estimator,
                    given,
                    stop,
                    callbacks=callbacks(),
                    argv=argv,
                )
            except NarrowsError as error:
                error.args = (f"{size} components: {error}",)
                raise
            if settings.dry_run:
                continue
            if not i:
                baseline = _baseline(estimators[0], table, sizes[-1], room, result)
            metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
            row = {name: metrics.get(name) for name in _TAKEN}
            # PCA has at most as many components as features and rows.
            row["pca_held_out_mse_per_feature"] = (
                None if baseline is None else float(baseline[min(size, len(baseline)) - 1])
            )
            rows.append(row | {"folder": folder.name})
            run.write_json("sweep.json", result)
        if settings.dry_run:
            return
        worse = _all_worse(rows)
        result["elbow"] = None if worse else elbow(sizes, [row["val_loss"] for row in rows])
        result["status"] = "finished"
        result["wall_s"] = round(time.time() - started, 3)
        run.write_json("sweep.json", result)
    try:
        build_report(run.path)
    except MissingExtraError as error:
        log.warning("no report.html: %s", error)
    print(table_text(result))
    log.info("wrote %s: %d fits, sweep.json", run.path, len(rows))
    for hint in _hints(result):
        log.info("%s", hint)
    stop.check()
    run.write_success()


def _baseline(estimator: Any, table: NormalizedSource, largest: int, room: int, result: dict[str, Any]) -> Any:
    """Errors of 1, 2, ... principal components on the held-out rows; None for counts, whose fits have a baseline.

    `result` gets the numbers of rows that were used.
    """
    split = held_rows(estimator, table.shape[0])
    assert split is not None
    trained, held = split
    result |= {"normalize": table.normalizer.resolved_, "n_held_out": len(held), "pca_rows": None}
    if LOSSES[estimator.loss].of_counts:
        return None
    seed = int(estimator.random_state)
    rows = trained[sample_rows(len(trained), seed)]
    principal = pca(table, largest, rows=rows, seed=seed, cache_bytes=room)
    result["pca_rows"] = len(rows)
    return pca_errors(principal, table, held)


_COLUMNS = (
    ("components", "n_components", "d"),
    ("validation loss", "val_loss", ".5g"),
    ("held-out NLL", "held_out_nll_per_row", ".5g"),
    ("baseline", "held_out_baseline_nll_per_row", ".5g"),
    ("held-out MSE", "held_out_mse_per_feature", ".4g"),
    ("PCA", "pca_held_out_mse_per_feature", ".4g"),
    ("kNN", "knn_accuracy_latent", ".3f"),
    ("kNN, PCA", "knn_accuracy_pca", ".3f"),
    ("epochs", "epochs_run", "d"),
    ("seconds", "wall_s", ".1f"),
)


def _cells(result: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table of sizes, without empty columns."""
    columns = [c for c in _COLUMNS if any(row.get(c[1]) is not None for row in result["sizes"])]
    rows = [
        ["" if row.get(name) is None else format(row[name], form) for _, name, form in columns]
        for row in result["sizes"]
    ]
    return [head for head, _, _ in columns], rows


def table_text(result: dict[str, Any]) -> str:
    """The table of sizes as text, and the elbow."""
    head, rows = _cells(result)
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in [head, *rows]]
    if result["elbow"] is not None:
        lines.append(f"elbow of the validation loss: {result['elbow']} components")
    elif len(result["sizes"]) > 2:
        lines.append(f"no elbow: {_no_elbow(result)}")
    return "\n".join(lines)


def _all_worse(rows: Sequence[dict[str, Any]]) -> str:
    """The name of the baseline if each size is worse than it; else empty."""
    pairs = [measures.against(row) for row in rows]
    known = [(ours, theirs) for ours, theirs, _ in pairs if ours is not None and theirs is not None]
    return pairs[0][2] if known and all(ours > theirs for ours, theirs in known) else ""


def _no_elbow(result: dict[str, Any]) -> str:
    worse = _all_worse(result["sizes"])
    return f"every size is worse than {worse}" if worse else "the loss falls evenly, or not at all"


def _hints(result: dict[str, Any]) -> list[str]:
    """What a user may want to change, one sentence each."""
    rows = result["sizes"]
    told = []
    if worse := _all_worse(rows):
        told.append(f"every size is worse than {worse}, so no elbow is marked: {measures.BETTER}")
    short = [str(row["n_components"]) for row in rows if measures.still_fell(row)]
    if short:
        sizes = ", ".join(short)
        told.append(f"the loss still fell when --epochs ended the training of {sizes} components: try more epochs")
    return told


def read(folder: Path) -> dict[str, Any]:
    """The content of ``sweep.json`` of a finished sweep.

    Raises
    ------
    DataError
        The file is missing or damaged, or the sweep is not finished.
    """
    path = folder / "sweep.json"
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{folder} has no sweep.json: repeat the sweep to finish it") from None
    except ValueError as error:
        raise DataError(f"{path} is damaged ({error}): repeat the sweep") from None
    if not isinstance(result, dict) or result.get("status") != "finished":
        raise DataError(f"the sweep in {folder} is not finished: repeat its command to resume it")
    return result


def build_report(folder: Path) -> Path:
    """Write ``report.html`` of a finished sweep.

    Raises
    ------
    DataError
        The folder holds no finished sweep.
    MissingExtraError
        jinja2 or matplotlib is missing.
    """
    report.check_extra()
    from .. import plotting

    result = read(folder)
    sizes = [row["n_components"] for row in result["sizes"]]
    variational = result["estimator"].startswith("Variational")

    def column(name: str) -> list[Any]:
        return [row.get(name) for row in result["sizes"]]

    likelihood = all(value is not None for value in column("held_out_nll_per_row"))
    if likelihood:
        names, ylabel, title = ("held_out_nll_per_row", "held_out_baseline_nll_per_row"), "nats per row", "likelihood"
        text = (
            f"Negative log-likelihood on the {result['n_held_out']:,} held-out rows, in nats. Baseline: "
            f"{measures.baseline_text(result['sizes'][0])}."
        )
    else:
        names = ("held_out_mse_per_feature", "pca_held_out_mse_per_feature")
        ylabel, title = "squared error per feature", "error"
        text = (
            f"Mean squared error per feature of the normalised data, on the {result['n_held_out']:,} held-out rows. "
            f"PCA was fitted to {result['pca_rows']:,} training rows."
        )
    main = plotting.plot_elbow(
        sizes,
        column(names[0]),
        column(names[1]),
        plotting.new_figure().subplots(),
        elbow=result["elbow"],
        ylabel=ylabel,
        baseline_name=measures.BASELINE if likelihood else "PCA",
    )
    main.title.set_text(f"Held-out {title}")
    figures = [figure(f"Held-out {title}", text, main.figure)]
    if (result["loss"] != "mse" and not likelihood) or variational:
        own = plotting.plot_elbow(
            sizes,
            column("val_loss"),
            ax=plotting.new_figure().subplots(),
            elbow=result["elbow"],
            ylabel=f"loss ({result['loss']})",
        )
        text = "Training loss, averaged over the same rows" + (
            ", with the KL divergence of the latents." if variational else "."
        )
        own.title.set_text("Validation loss")
        figures.append(figure("Validation loss", text, own.figure))
    if any(value is not None for value in column("knn_accuracy_latent")):
        neighbours = plotting.plot_elbow(
            sizes,
            column("knn_accuracy_latent"),
            column("knn_accuracy_pca"),
            plotting.new_figure().subplots(),
            ylabel="accuracy of 15 neighbours",
        )
        neighbours.title.set_text("Accuracy of nearest neighbours")
        text = "Accuracy of a 15-nearest-neighbour classifier of the labels, in 5-fold cross-validation."
        figures.append(figure("Neighbours", text, neighbours.figure))
    best = min(result["sizes"], key=lambda row: row["val_loss"])
    tiles = [
        (f"{result['n_rows']:,} × {result['n_features']:,}", "rows × features", result["normalize"]),
        (str(len(sizes)), "sizes", f"{sizes[0]} to {sizes[-1]} components"),
        (
            str(result["elbow"] or "none"),
            "components at the elbow",
            "of the validation loss" if result["elbow"] else _no_elbow(result),
        ),
        (str(best["n_components"]), "components with the lowest loss", f"{best['val_loss']:.5g}"),
        (report.duration(result["wall_s"]), "wall time", "of the last command"),
    ]
    settings = read_toml(folder / "config.toml")
    run = {"version": result["version"], "input sha256": result["input_sha256"], "command": shlex.join(result["argv"])}
    return report.write_page(
        folder,
        f"{result['estimator']} with {', '.join(map(str, sizes))} latent components, fitted to {result['data']} by "
        f"narrows {result['version']}",
        result["version"],
        tiles,
        figures,
        settings,
        run,
        table=_cells(result),
        hints=_hints(result),
    )
