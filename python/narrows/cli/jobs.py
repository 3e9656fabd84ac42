"""The command fit: from a data set to a folder of results.

- It checks the settings, then the output, then the input. Only then does it write, and only under ``--out``.
- A stopped fit leaves a checkpoint and a ``metrics.json`` with the reason, but no ``_SUCCESS``.
- Nothing here parses arguments, installs signal handlers or chooses exit codes.
"""

from __future__ import annotations

import contextlib
import datetime
import logging
import platform
import shlex
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from .._version import __version__
from ..backends import check_precision, resolve
from ..data import Source
from ..data.normalize import Normalizer
from ..data.normalized import NormalizedSource
from ..data.readers import has_layers
from ..data.source import size_of
from ..errors import DataError, DivergenceError, MissingExtraError
from ..fitting.table import Table
from ..machine import thread_choice
from ..plan.spec import Precision
from ..training import Callback, Checkpoint, Interrupted
from . import measures, report
from .applying import encoded, known_classes, obs_labels, open_data, write_codes
from .resources import APPLY_BYTES, Budget, blas_threads, held_rows, peak_rss, plan_text
from .rundir import HistoryWriter, RunDir
from .settings import FitSettings, UsageError, in_flags
from .tables import check_output

__all__ = ["Input", "Stop", "fit", "fit_opened", "take_image_shape"]

log = logging.getLogger("narrows")


class Stop(Protocol):
    """Tells training when to stop; see `stopping.Stopper`."""

    signal: str | None

    def check(self) -> None:
        """Raise an exception if a signal arrived, also if a library swallowed that exception before."""

    def __call__(self) -> str | None:
        """Called about every 50 ms. A text is the reason to end training with `Interrupted`."""

    def training(self) -> AbstractContextManager[None]:
        """The context in which training calls it."""


def fit(settings: FitSettings, stop: Stop, *, callbacks: Sequence[Callback] = (), argv: Sequence[str] = ()) -> None:
    """Train, and write all results under ``settings.out``.

    Parameters
    ----------
    settings : FitSettings
    stop : Stop
    callbacks : sequence of training.Callback
        A callback with a method ``close`` is closed when training ends.
    argv : sequence of str
        The command line, for ``metrics.json`` and the log.
    """
    estimator = settings.build()
    settings = settings.resolved(estimator)
    RunDir(Path(settings.out)).inspect()
    started = time.time()
    with Input.open(settings) as given:
        fit_opened(settings, estimator, given, stop, callbacks=callbacks, argv=argv, started=started)


@dataclass
class Input:
    """The data of a job, and the threads that work on it.

    Attributes
    ----------
    source : Source
        The data before normalisation.
    digest : str
        Digest of the data.
    n_threads : int
    threads_from : str
        The flag or variable that set it, or the limit of the machine.
    batch : ndarray of str or int, or None
        Batch labels of the rows.
    """

    source: Source
    digest: str
    n_threads: int
    threads_from: str
    batch: npt.NDArray[Any] | None = None

    @classmethod
    @contextlib.contextmanager
    def open(cls, settings: FitSettings) -> Iterator[Input]:
        """Choose threads and backend, open the data, and compute its digest. NumPy's BLAS uses the job's threads."""
        try:
            threads, threads_from = thread_choice(settings.threads)
            check_precision(settings.precision, resolve(settings.backend, announce=False))
        except ValueError as error:  # an environment variable
            raise UsageError(str(error)) from None
        with (
            open_data(settings, settings.layer) as source,
            blas_threads(threads),
        ):
            if source.shape[0] < 2:
                raise DataError(f"{source.name}: {source.shape[0]} row; training and validation need at least 2")
            batch = None if settings.batch_key is None else obs_labels(settings.batch_key, source)
            if settings.label_key is not None:
                source.labels = known_classes(settings.label_key, source)
            yield cls(source, source.sha256(), threads, in_flags(threads_from), batch)

    def normalized(self, settings: FitSettings, loss: str) -> NormalizedSource:
        """The normalised source. The first call makes one pass over the data."""
        if self._table is None:
            normalizer = Normalizer(settings.normalize, loss=loss).fit(self.source)
            self._table = NormalizedSource(self.source, normalizer, Precision.of(settings.precision).dtype)
        return self._table

    _table: NormalizedSource | None = None


def take_image_shape(estimator: Any, source: Source) -> None:
    """Give a convolutional estimator the shape of the images of a source, unless the settings say it."""
    if source.image_shape is not None and getattr(estimator, "image_shape", ()) is None:
        from ..models.convolutional import shape_of_images

        estimator.set_params(image_shape=shape_of_images(source.name, source.image_shape))


def fit_opened(
    settings: FitSettings,
    estimator: Any,
    given: Input,
    stop: Stop,
    *,
    callbacks: Sequence[Callback] = (),
    argv: Sequence[str] = (),
    started: float | None = None,
) -> None:
    """`fit` with resolved settings on open data, which several fits may share."""
    run = RunDir(Path(settings.out))
    started = time.time() if started is None else started
    take_image_shape(estimator, given.source)
    identity = settings.identity() | {"run.input_sha256": given.digest}
    if run.resumes(identity, settings.resume) and run.finished:
        run.note_finished()
        return
    table = given.normalized(settings, estimator.loss)
    budget = Budget.of(estimator, table, settings.max_memory)
    if settings.dry_run:
        print(plan_text(settings, estimator, table, budget, f"{given.n_threads} ({given.threads_from})"))
        return
    metrics = _known_facts(settings, estimator, given, table, started, argv)
    with run.claimed(), _logged(run):
        # Another run may have finished here before this one got the lock.
        known = run.resumes(identity, settings.resume)
        if known and run.finished:
            run.note_finished()
            return
        if not known:
            run.clear()
        elif run.succeeded:
            log.warning(
                "%s was finished, but %s is missing or damaged: writing it again", run.path, ", ".join(run.missing)
            )
            (run / "_SUCCESS").unlink()
        facts = ("version", "input_sha256", "n_rows", "n_features")
        run.write_config(settings.stored() | {"run": {name: metrics[name] for name in facts}})
        log.debug("narrows %s: %s", __version__, shlex.join(argv))
        if table.roles is not None:
            log.debug("roles of the columns: %s", table.roles)
        chosen = table.describe("--normalize NAME")
        log.info("%s: %d rows x %d features, normalisation: %s", settings.data, *table.shape, chosen)
        try:
            _train(settings, estimator, given, table, run, budget.block_bytes, stop, callbacks)
            metrics |= {"status": "finished"}
            _finish(settings, estimator, given, table, run, budget.block_bytes, metrics)
            stop.check()
        except BaseException as error:
            if hasattr(estimator, "history_"):
                metrics |= _training_facts(estimator, table.shape[0])
            metrics["status"], metrics["exit_reason"] = ("interrupted", stop.signal) if stop.signal else _failure(error)
            raise
        finally:
            metrics["wall_s"] = round(time.time() - started, 3)
            metrics["peak_rss_bytes"] = peak_rss()
            if metrics["status"] != "finished":
                with contextlib.suppress(OSError):  # the first error is the important one
                    run.write_json("metrics.json", metrics)
        _conclude(run, metrics)


def _known_facts(
    settings: FitSettings, estimator: Any, given: Input, table: NormalizedSource, started: float, argv: Sequence[str]
) -> dict[str, Any]:
    """The part of ``metrics.json`` that is known before training."""
    source, normalizer = given.source, table.normalizer
    return {
        "status": "running",
        "exit_reason": None,
        "estimator": type(estimator).__name__,
        "data": source.name if source.path is None else str(settings.data),
        "n_rows": table.shape[0],
        "n_features": table.shape[1],
        "n_components": int(estimator.n_components),
        "batch_key": settings.batch_key,
        "label_key": settings.label_key,
        "n_batches": None if given.batch is None else len(np.unique(given.batch)),
        "loss": estimator.loss,
        "normalize": normalizer.resolved_,
        "n_empty_rows": normalizer.n_empty_rows_,
        "n_empty_features": normalizer.n_empty_features_,
        "n_threads": given.n_threads,
        "threads_from": given.threads_from,
        "precision": estimator.precision,
        "seed": settings.seed,
        "input_sha256": given.digest,
        "bytes_in": _bytes_of(source),
        "version": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "started": datetime.datetime.fromtimestamp(started, datetime.UTC).isoformat(timespec="seconds"),
        "argv": list(argv),
    }


def _train(
    settings: FitSettings, estimator: Any, given: Input, table: Source, run: RunDir, block_bytes: int, stop: Stop,
    callbacks: Sequence[Callback],
) -> None:  # fmt: skip
    if run.checkpoint.exists():
        log.info("resuming from %s", run.checkpoint)
    checkpoint = Checkpoint(
        run.checkpoint,
        minutes=settings.checkpoint_minutes,
        resume="auto",
        identity={"input_sha256": given.digest, "normalize": settings.normalize},
        stop=stop,
    )
    writer = HistoryWriter(run / "history.jsonl")
    try:
        with stop.training():
            watching = [writer, *callbacks]
            estimator.fit(table, batch=given.batch, callbacks=watching, checkpoint=checkpoint, block_bytes=block_bytes)
    finally:
        for callback in (writer, *callbacks):
            getattr(callback, "close", lambda: None)()


def _finish(
    settings: FitSettings, estimator: Any, given: Input, table: NormalizedSource, run: RunDir, block_bytes: int,
    metrics: dict[str, Any],
) -> None:  # fmt: skip
    """Write the model, then the codes, the measures and the report."""
    estimator.metadata_ = {
        "normalizer": table.normalizer.to_dict(),
        "source": {
            "name": table.name,
            "n_rows": table.shape[0],
            "layer": settings.layer,
            "modality": settings.modality,
            "roles": table.roles,
            "batch_key": settings.batch_key,
            "sha256": given.digest,
        },
    }
    measures.store_cell_errors(estimator, table, given.batch)
    estimator.save(run / "model.safetensors")
    run.write_history(estimator.history_)
    step = min(APPLY_BYTES, block_bytes)
    codes = np.concatenate(list(encoded(estimator, table, step)))
    # The column of --label-key is among those of obs.
    latent = _write_latent(run, codes, table, estimator, None if settings.label_key else table.labels)
    begin = time.perf_counter()
    metrics |= _training_facts(estimator, table.shape[0])
    metrics |= measures.measure(
        estimator,
        table,
        given.batch,
        codes,
        seed=settings.seed,
        n_threads=given.n_threads,
        step_bytes=step,
        cache_bytes=block_bytes,
    )
    log.debug("measured in %.1f s", time.perf_counter() - begin)
    metrics["report"] = _write_report(run, metrics, codes, table.labels)
    metrics["latent"] = latent


def _write_report(run: RunDir, metrics: dict[str, Any], codes: Any, labels: Any) -> str | None:
    try:
        report.check_extra()
    except MissingExtraError as error:
        log.warning("no report.html: %s", error)
        return None
    preview = metrics | {"wall_s": time.time() - _epoch_of(metrics["started"]), "peak_rss_bytes": peak_rss()}
    return report.build(run.path, preview, codes=codes, labels=labels).name


def _conclude(run: RunDir, metrics: dict[str, Any]) -> None:
    """Write the last files: the table for MultiQC, the metrics, and then ``_SUCCESS``."""
    report.multiqc(run.path, metrics)
    metrics["bytes_out"] = size_of(run.path)
    run.write_json("metrics.json", metrics)
    log.info(
        "wrote %s: %s, model.safetensors%s; %d epochs (%s), %s",
        run.path,
        metrics["latent"],
        ", report.html" if metrics["report"] else "",
        metrics["epochs_run"],
        report.REASONS[metrics["exit_reason"]],
        measures.in_short(metrics),
    )
    for hint in measures.hints(metrics):
        log.info("%s", hint)
    run.write_success()


def _write_latent(
    run: RunDir, codes: npt.NDArray[Any], table: Source, estimator: Any, labels: npt.NDArray[Any] | None
) -> str:
    """Write latent.h5ad if rows have names or columns, or the input is AnnData, and anndata is installed; else .npy."""
    if table.obs_names is not None or table.obs or has_layers(table.path):
        try:
            check_output(run / "latent.h5ad", [".h5ad"])
        except MissingExtraError as error:
            log.warning("writing latent.npy and latent_obs_names.txt instead of latent.h5ad: %s", error)
            if table.obs_names is not None:
                run.write_lines("latent_obs_names.txt", table.obs_names)
        else:
            write_codes(run / "latent.h5ad", [codes], codes.shape, codes.dtype, table, estimator, labels)
            return "latent.h5ad"
    write_codes(run / "latent.npy", [codes], codes.shape, codes.dtype, table, estimator)
    return "latent.npy"


def _training_facts(estimator: Any, n_rows: int) -> dict[str, Any]:
    history = estimator.history_
    losses = history.get("val_loss") if estimator._validation_part() is not None else history["loss"]
    best = int(np.nanargmin(losses)) if losses and np.isfinite(losses).any() else len(history["loss"]) - 1
    held = held_rows(estimator, n_rows)
    seconds = sum(history["seconds"])
    kept = best if estimator._validation_part() is not None else -1
    return {
        "epochs_run": len(history["loss"]),
        "best_epoch": best + 1,
        "train_loss": history["loss"][kept],
        "val_loss": history["val_loss"][kept] if "val_loss" in history else None,
        "samples_per_s": (len(held[0]) if held else n_rows) * len(history["loss"]) / seconds if seconds > 0 else None,
        "n_parameters": int(sum(w.size for w in estimator.coefs_) + sum(b.size for b in estimator.intercepts_)),
        "backend": estimator.backend_,
        "isa": _isa(estimator.backend_),
        "exit_reason": "max_iter" if len(history["loss"]) >= estimator.max_iter else "converged",
    }


def _failure(error: BaseException) -> tuple[str, str]:
    if isinstance(error, Interrupted):
        return "interrupted", error.reason
    if isinstance(error, DivergenceError):
        return "diverged", str(error)
    if isinstance(error, Exception):
        return "failed", str(error) or type(error).__name__
    return "interrupted", str(error) or type(error).__name__


@contextlib.contextmanager
def _logged(run: RunDir) -> Iterator[None]:
    """Also send the log, with debug messages, to ``run.log``."""
    handler = run.log_handler()
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.DEBUG)
    try:
        yield
    except BaseException as error:
        log.debug("stopped: %s: %s", type(error).__name__, error)
        raise
    finally:
        log.setLevel(level)
        log.removeHandler(handler)
        handler.close()


def _isa(backend: str) -> str | None:
    if backend != "cpp":
        return None
    from ..backends import cpp

    return cpp.isa()


def _bytes_of(source: Source) -> int:
    return source.shape[0] * Table(source).row_bytes if source.path is None else size_of(source.path)


def _epoch_of(iso: str) -> float:
    return datetime.datetime.fromisoformat(iso).timestamp()
