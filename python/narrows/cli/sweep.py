"""The elbow of the bottleneck: one fit for each number of components, beside PCA.

- Each size is an ordinary fit, in a folder of its own below ``--out``, with its checkpoint; the data is opened and
  normalised once. Stopped and started again, a sweep goes on with the sizes that are not finished.
- All sizes hold out the same rows. PCA, of what are no counts, is computed once, on the rows that are trained on (a
  sample of many), by blocks and without densifying, and judged on those held out, as the autoencoders are.
- ``sweep.json`` is whole after each size and lists those that are finished; ``_SUCCESS`` comes last.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import shutil
import time
import tomllib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

from .._version import __version__
from ..data.normalized import NormalizedSource
from ..errors import DataError, MissingExtraError, NarrowsError, ResumeError
from ..evaluation.baselines import pca, pca_errors
from ..evaluation.metrics import elbow, sample_rows
from ..plan.losses import LOSSES
from ..training import Callback
from . import measures, report
from .figures import figure
from .jobs import Input, Stop, fit_opened
from .resources import Budget, held_rows
from .rundir import RunDir
from .settings import FitSettings, UsageError

__all__ = ["SweepDir", "build_report", "sweep"]

log = logging.getLogger("narrows")

_FOLDER = "components-"
_TAKEN = (
    "n_components", "loss", "normalize", "val_loss", "train_loss", "held_out_mse_per_feature", "mse_per_feature",
    "held_out_nll_per_row", "held_out_nll_per_count", "held_out_baseline_nll_per_row", "baseline",
    "knn_accuracy_latent", "knn_accuracy_pca", "epochs_run", "best_epoch", "exit_reason", "n_parameters", "wall_s",
)  # fmt: skip


class SweepDir(RunDir):
    """The output folder of one sweep, which holds those of its fits."""

    command: ClassVar[str] = "sweep"
    made: ClassVar[tuple[str, ...]] = ("_SUCCESS", "sweep.json", "report.html")
    needed: ClassVar[tuple[tuple[str, ...], ...]] = (("sweep.json",),)

    @property
    def begun(self) -> bool:
        return self.succeeded or any(True for _ in self._folders())

    def folder(self, size: int) -> Path:
        return self / f"{_FOLDER}{size}"

    def _folders(self) -> Iterator[Path]:
        return (p for p in self.path.glob(f"{_FOLDER}*") if p.name.removeprefix(_FOLDER).isdigit())

    def holds(self, sizes: Sequence[int]) -> bool:
        """Whether a sweep that has ended was of these sizes, and their fits are still there."""
        found = [row["n_components"] for row in read(self.path)["sizes"]]
        return found == list(sizes) and all(RunDir(self.folder(size)).finished for size in sizes)

    def _subfolders(self) -> None:
        pass

    def clear(self) -> None:
        """Remove what an earlier sweep made, its fits included, ``_SUCCESS`` first."""
        for name in self.made:
            (self / name).unlink(missing_ok=True)
        for folder in self._folders():
            RunDir(folder).inspect()  # only what fits made
            shutil.rmtree(folder)


def sweep(
    settings: FitSettings,
    sizes: Sequence[int],
    stop: Stop,
    *,
    callbacks: Callable[[], Sequence[Callback]] = lambda: (),
    argv: Sequence[str] = (),
) -> None:
    """Fit each number of components, and write everything under ``settings.out``.

    Parameters
    ----------
    settings : FitSettings
        Those of each fit, but for `components` and the folder.
    sizes : sequence of int
        Sorted and without repetition once it is here.
    stop : jobs.Stop
    callbacks : callable
        Makes the training callbacks of a fit.
    argv : sequence of str
        The command line, for the record.
    """
    sizes = sorted(set(sizes))
    fits = [dataclasses.replace(settings, components=size) for size in sizes]
    estimators = [each.build() for each in fits]
    if not estimators[0].early_stopping:
        raise UsageError("a sweep compares sizes on held-out rows: it needs --set early_stopping=true")
    fits = [each.resolved(estimator) for each, estimator in zip(fits, estimators, strict=True)]
    whole = fits[0]
    run = SweepDir(Path(whole.out))
    run.inspect()
    started = time.time()
    with Input.open(whole) as given, contextlib.ExitStack() as held:
        identity = whole.identity() | {"run.input_sha256": given.digest}
        del identity["components"]
        known = settings.resume != "never" and run.check_same(identity)
        if settings.resume == "require" and not known:
            raise ResumeError(f"--out {run.path} holds no sweep to resume: use --resume auto to start one")
        if known and run.finished and run.holds(sizes):
            log.info("%s is finished already: nothing to do (--resume never starts afresh)", run.path)
            return
        table = given.normalized(whole, estimators[0].loss)
        # All sizes must fit, and not only those that come first.
        room = [Budget.of(each, table, settings.max_memory).block_bytes for each in estimators][-1]
        if not settings.dry_run:
            held.enter_context(run.claimed())
            # Another sweep may have ended here since it was looked at.
            if settings.resume == "never" or not run.check_same(identity):
                run.clear()
            (run / "_SUCCESS").unlink(missing_ok=True)
            facts = {"version": __version__, "input_sha256": given.digest}
            run.write_config(whole.stored() | {"components": sizes, "run": facts})
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
                    # What is there of this sweep is resumed: the sweep itself has refused or removed anything else.
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
            # PCA has no more components than there are features and rows; more of them would change nothing.
            row["pca_held_out_mse_per_feature"] = (
                None if baseline is None else float(baseline[min(size, len(baseline)) - 1])
            )
            rows.append(row | {"folder": folder.name})
            run.write_json("sweep.json", result)
        if settings.dry_run:
            return
        result["elbow"] = elbow(sizes, [row["val_loss"] for row in rows])
        result["status"] = "finished"
        result["wall_s"] = round(time.time() - started, 3)
        run.write_json("sweep.json", result)
    try:
        build_report(run.path)
    except MissingExtraError as error:
        log.warning("no report.html: %s", error)
    print(table_text(result))
    log.info("wrote %s: %d fits, sweep.json", run.path, len(rows))
    run.write_success()


def _baseline(estimator: Any, table: NormalizedSource, largest: int, room: int, result: dict[str, Any]) -> Any:
    """Errors of 1, 2, ... principal components on the held-out rows, noting in `result` what they were taken of.

    None for counts, of which each fit has a baseline of its own.
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
    """Heads and rows of the table of sizes; columns that nothing fills are left out."""
    columns = [c for c in _COLUMNS if any(row.get(c[1]) is not None for row in result["sizes"])]
    rows = [
        ["" if row.get(name) is None else format(row[name], form) for _, name, form in columns]
        for row in result["sizes"]
    ]
    return [head for head, _, _ in columns], rows


def table_text(result: dict[str, Any]) -> str:
    """The table of sizes in columns, and the elbow."""
    head, rows = _cells(result)
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in [head, *rows]]
    if result["elbow"] is not None:
        lines.append(f"elbow of the validation loss: {result['elbow']} components")
    return "\n".join(lines)


def read(folder: Path) -> dict[str, Any]:
    """What ``sweep.json`` of a finished sweep holds.

    Raises
    ------
    DataError
        It is missing, damaged or of a sweep that is not finished.
    """
    path = folder / "sweep.json"
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{folder} holds no sweep.json: repeat the sweep to finish it") from None
    except ValueError as error:
        raise DataError(f"{path} is damaged ({error}): sweep again") from None
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

    counted = all(value is not None for value in column("held_out_nll_per_row"))
    if counted:
        names, ylabel, title = ("held_out_nll_per_row", "held_out_baseline_nll_per_row"), "nats per row", "likelihood"
        text = (
            f"Negative log-likelihood of the {result['n_held_out']:,} rows held out, in nats. The baseline is "
            f"{measures.baseline_text(result['sizes'][0])}."
        )
    else:
        names = ("held_out_mse_per_feature", "pca_held_out_mse_per_feature")
        ylabel, title = "squared error per feature", "error"
        text = (
            f"Mean squared error per feature, on the normalised data, of the {result['n_held_out']:,} rows held out. "
            f"PCA is that of {result['pca_rows']:,} rows that were trained on."
        )
    judged = plotting.plot_elbow(
        sizes,
        column(names[0]),
        column(names[1]),
        elbow=result["elbow"],
        ylabel=ylabel,
        baseline_name=measures.BASELINE if counted else "PCA",
    )
    judged.title.set_text(f"Held-out {title}")
    figures = [figure(f"Held-out {title}", text, judged.figure)]
    if (result["loss"] != "mse" and not counted) or variational:
        own = plotting.plot_elbow(sizes, column("val_loss"), elbow=result["elbow"], ylabel=f"loss ({result['loss']})")
        text = "Mean loss of the same rows, as trained" + (
            ", the divergence of the latents included." if variational else "."
        )
        own.title.set_text("Validation loss")
        figures.append(figure("Validation loss", text, own.figure))
    if any(value is not None for value in column("knn_accuracy_latent")):
        told = plotting.plot_elbow(
            sizes, column("knn_accuracy_latent"), column("knn_accuracy_pca"), ylabel="accuracy of 15 neighbours"
        )
        told.title.set_text("Labels told by neighbours")
        text = (
            "Share of all rows whose label 15 nearest neighbours in the latent space tell, in 5-fold cross-validation."
        )
        figures.append(figure("Neighbours", text, told.figure))
    best = min(result["sizes"], key=lambda row: row["val_loss"])
    tiles = [
        (f"{result['n_rows']:,} × {result['n_features']:,}", "rows × features", result["normalize"]),
        (str(len(sizes)), "sizes", f"{sizes[0]} to {sizes[-1]} components"),
        (
            str(result["elbow"] or "none"),
            "components at the elbow",
            "of the validation loss",
        ),
        (str(best["n_components"]), "components at the least loss", f"{best['val_loss']:.5g}"),
        (report.duration(result["wall_s"]), "wall time", "of the last call"),
    ]
    settings = tomllib.loads((folder / "config.toml").read_text(encoding="utf-8"))
    run = {"version": result["version"], "input sha256": result["input_sha256"], "command": " ".join(result["argv"])}
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
    )
