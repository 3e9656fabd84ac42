"""The commands encode, decode and score: a model applied to a file.

- Encoding a file gives the same bits as the codes that fit wrote for it, with any memory limit and number of threads.
- Rows are read, computed and written block by block. The output file is either complete or absent.
- The data must have the model's features in the model's order. Otherwise an error names the first difference.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import narrows

from .. import data
from .._version import __version__
from ..data import Source
from ..data.columns import Column, column_of, complete
from ..data.normalized import NormalizedSource
from ..data.readers import has_layers
from ..data.source import with_names
from ..errors import DataError
from ..evaluation.cells import CellErrors
from ..fitting.conditions import read_labels
from ..fitting.files import stored_normalizer, stored_source
from ..fitting.inputs import read_condition
from ..fitting.table import check_values
from ..machine import thread_choice
from ..persistence import remove_temporaries
from ..plan.spec import Loss
from ..rows.readahead import read_ahead
from ..rows.shifted import dense, stored_rows
from .resources import apply_bytes, blas_threads
from .settings import READING, UsageError
from .tables import check_output, write_table

__all__ = [
    "ApplySettings",
    "decode",
    "encode",
    "encoded",
    "known_classes",
    "obs_labels",
    "open_data",
    "open_model",
    "score",
    "write_codes",
]

log = logging.getLogger("narrows")


@dataclass(frozen=True, kw_only=True)
class ApplySettings:
    """Settings of ``encode``, ``decode`` and ``score``; None means the value of the model or the machine."""

    model: Path
    data: str
    output: Path
    layer: str | None = None
    genes_by_cells: bool = False
    header: bool | None = None
    index_column: str | bool | None = None
    drop_columns: tuple[str, ...] | None = None
    modality: str | None = None
    follow_links: bool = False
    untrusted: bool = False
    batch_key: str | None = None
    batch: str | None = None
    backend: str | None = None
    threads: int | None = None
    max_memory: int | None = None


def encode(settings: ApplySettings) -> None:
    """Write the latent codes of a data set to a .npy, .h5ad or .csv file."""
    with _job(settings, ".npy", ".h5ad", ".csv") as estimator, _opened(estimator, settings) as table:
        step = apply_bytes(estimator, settings.max_memory)
        shape = (table.shape[0], estimator.plan_.spec.n_components)
        write_codes(
            settings.output, encoded(estimator, table, step), shape, table.dtype, table, estimator, table.labels
        )
    log.info("wrote %s: %d x %d", settings.output, *shape)


def decode(settings: ApplySettings) -> None:
    """Write the reconstructions of latent codes, on the scale of the data, to a .npy, .h5ad or .csv file."""
    with _job(settings, ".npy", ".h5ad", ".csv") as estimator, open_data(settings) as source:
        normalizer = stored_normalizer(estimator)
        k = estimator.plan_.spec.n_components
        if source.shape[1] != k:
            raise DataError(f"{source.name}: {source.shape[1]} columns, but the model has {k} components")
        batch = _batches(estimator, settings, source)
        shape = (source.shape[0], normalizer.n_features_)
        step = _rows_in(apply_bytes(estimator, settings.max_memory), shape[1])

        def blocks() -> Iterator[npt.NDArray[Any]]:
            for start, block in source.blocks(step):
                data.check_finite(block, start, source)
                codes = dense(block)
                labels = _some(batch, start, len(codes))
                yield normalizer.inverse_transform(estimator.inverse_transform(codes, batch=labels))

        write_table(
            settings.output,
            blocks(),
            shape,
            normalizer.inverse_dtype(source.dtype),
            row_names=source.obs_names,
            column_names=getattr(estimator, "feature_names_in_", None),
            obs=source.obs,
            about={"version": __version__, "normalize": normalizer.resolved_},
        )
    log.info("wrote %s: %d x %d", settings.output, *shape)


def score(settings: ApplySettings) -> None:
    """Write the loss of each row, summed over its features, to a .csv or .npy file. Lower is better.

    It is minus `score_samples`. A .csv of a model of counts also gets the loss adjusted for the total of the row.
    """
    with _job(settings, ".csv", ".npy") as estimator, _opened(estimator, settings) as table:
        step = _rows_in(apply_bytes(estimator, settings.max_memory), table.shape[1])
        batch = _batches(estimator, settings, table)
        errors = CellErrors.of_model(estimator) if settings.output.suffix.lower() == ".csv" else None

        def blocks() -> Iterator[npt.NDArray[Any]]:
            loss = estimator.plan_.spec.loss
            for start in range(0, table.shape[0], step):
                block = _read(table, slice(start, start + step), loss)
                _check(block, start, table, loss)
                labels = _some(batch, start, block.shape[0])
                losses = -estimator.score_samples(with_names(block, table), batch=labels)
                if errors is not None:
                    losses = np.column_stack([losses, errors.of(block, losses).astype(losses.dtype)])
                yield losses

        write_table(
            settings.output,
            blocks(),
            table.shape[:1],
            table.dtype,
            row_names=table.obs_names,
            column_names=np.array(["loss"] if errors is None else ["loss", "loss_z"]),
        )
    log.info("wrote %s: %d losses (lower is better)", settings.output, table.shape[0])


@contextlib.contextmanager
def _job(settings: ApplySettings, *suffixes: str) -> Iterator[Any]:
    """Check the output path and load the model. NumPy's BLAS uses no more threads than the job."""
    check_output(settings.output, suffixes)
    remove_temporaries(settings.output.parent, (settings.output.name,), age=86400.0)
    estimator = open_model(settings.model, settings.backend, settings.threads)
    with blas_threads(thread_choice(settings.threads)[0]):
        yield estimator


def open_model(path: Path, backend: str | None = None, threads: int | None = None) -> Any:
    """The estimator of a model file or of the folder of a fit, set up for this machine."""
    if path.is_dir():
        if not (path / "model.safetensors").exists():
            raise DataError(f"{path} has no model.safetensors: give a model file or the --out folder of a fit")
        path = path / "model.safetensors"
    estimator = narrows.load(path)
    # Threads and backend belong to this machine, not to the machine of the training.
    return estimator.set_params(n_threads=threads, **({} if backend is None else {"backend": backend}))


@contextlib.contextmanager
def _opened(estimator: Any, settings: ApplySettings) -> Iterator[NormalizedSource]:
    """The data, checked for the model's features and normalised as in training."""
    normalizer = stored_normalizer(estimator)
    layer = settings.layer
    fitted = stored_source(estimator)
    if layer is None and has_layers(Path(settings.data)):
        layer = fitted.get("layer")
    if settings.modality is None and settings.data.lower().endswith(".h5mu"):
        settings = dataclasses.replace(settings, modality=fitted.get("modality"))
    with open_data(settings, layer, fitted.get("roles")) as source:
        _check_features(estimator, source)
        yield NormalizedSource(source, normalizer, estimator._network.dtype)


def open_data(settings: Any, layer: str | None = None, roles: Mapping[str, Any] | None = None) -> Source:
    """The data of a job; `settings` has the field `data` and those of `READING`, `roles` are those of the fit."""
    reading = {name: getattr(settings, name) for name in READING}
    return data.open(settings.data, layer=layer, roles=roles, **reading)


def obs_labels(key: str, source: Source) -> npt.NDArray[Any]:
    """The labels in a column of `obs`, one for each row of a source."""
    column = _labels(key, source)
    complete(column, f"{source.name}: column {key!r} of obs")
    return read_labels(column.decoded(), len(column), f"{source.name}: obs[{key!r}]")


def known_classes(key: str, source: Source) -> npt.NDArray[Any]:
    """The classes in a column of `obs`; if some are missing, strings that are empty there."""
    column = _labels(key, source)
    name = f"{source.name}: obs[{key!r}]"
    missing = column.missing
    if missing.all():
        raise DataError(f"{name} has no value in any row")
    known = column.decoded()[~missing]
    if known.dtype.kind == "f" and (known == np.round(known)).all():  # whole numbers, as pandas stores them beside NaN
        known = known.astype(np.int64)
    labels = read_labels(known, len(known), name)
    if len(labels) == len(column):
        return labels
    log.info("%s: %d of %d rows have no %s", source.name, missing.sum(), len(column), key)
    classes = np.full(len(column), "", dtype=labels.astype(str).dtype)
    classes[~missing] = labels
    return classes


def _labels(key: str, source: Source) -> Column:
    column = column_of(source.obs, key, source.name)
    if len(column) != source.shape[0]:
        raise DataError(f"{source.name}: obs[{key!r}] has {len(column)} labels, the data have {source.shape[0]} rows")
    return column


def _batches(estimator: Any, settings: ApplySettings, source: Source) -> Any:
    """Batch labels of all rows, or one label for all; None for a model without batches."""
    known = getattr(estimator, "batches_", None)
    if known is None:
        if settings.batch is None and settings.batch_key is None:
            return None
        flag = "--batch-key" if settings.batch is None else "--batch"
        raise UsageError(f"{flag}: {settings.model} was fitted without batches; leave the flag out")
    key = settings.batch_key or stored_source(estimator).get("batch_key")
    label: Any = settings.batch
    if label is not None:
        name = "--batch"
        if known.dtype.kind == "i" and label.removeprefix("-").isdecimal():
            label = int(label)
    elif key is None:
        raise UsageError(f"{settings.model} was fitted with batches: give --batch-key NAME or --batch LABEL")
    else:
        name, label = f"{source.name}: obs[{key!r}]", obs_labels(key, source)
    read_condition(estimator, label, source.shape[0], name)
    return label


def _some(batch: Any, start: int, count: int) -> Any:
    """The labels of `count` rows."""
    return batch[start : start + count] if isinstance(batch, np.ndarray) else batch


def _check_features(estimator: Any, source: Source) -> None:
    n_features = int(estimator.n_features_in_)
    known, given = getattr(estimator, "feature_names_in_", None), source.var_names
    if known is not None and given is not None and not np.array_equal(known.astype(str), given.astype(str)):
        theirs, ours = given.astype(str), known.astype(str)
        if len(theirs) == len(ours) and np.array_equal(np.sort(theirs), np.sort(ours)):
            at = int(np.argmax(theirs != ours))
            raise DataError(
                f"{source.name}: the features are in another order than in the model (column {at} is "
                f"'{theirs[at]}' here, '{ours[at]}' in the model): reorder the columns"
            )
        n = min(len(theirs), len(ours))
        differ = theirs[:n] != ours[:n]
        at = int(np.argmax(differ)) if differ.any() else n
        here = repr(str(theirs[at])) if at < len(theirs) else "absent"
        there = repr(str(ours[at])) if at < len(ours) else "absent"
        counts = f"{len(theirs)} features, the model has {len(ours)}"
        raise DataError(
            f"{source.name}: {counts}; the first difference is column {at}: {here} here, {there} in the "
            "model: select and order the columns as in training"
        )
    if source.shape[1] != n_features:
        hint = "; if the table is genes x cells, add --genes-by-cells" if source.shape[0] == n_features else ""
        raise DataError(f"{source.name}: {source.shape[1]} features, the model has {n_features}{hint}")


def encoded(estimator: Any, table: Source, step_bytes: int) -> Iterator[npt.NDArray[Any]]:
    """The codes of a normalised source, block by block. The next block is read in the background."""
    spec, n_rows = estimator.plan_.spec, _rows_in(step_bytes, table.shape[1])
    domain = estimator._input_loss(spec.loss, separate_target=not spec.log_normalize)
    starts = range(0, table.shape[0], n_rows)
    blocks = read_ahead(partial(_read, table, slice(start, start + n_rows), spec.loss) for start in starts)
    for start, block in zip(starts, blocks, strict=True):
        _check(block, start, table, domain)
        yield estimator.transform(with_names(block, table))


def _read(table: Source, rows: slice, loss: Loss) -> Any:
    """Some rows in the form that a network with this loss takes."""
    return table.read_rows(rows) if loss.info.of_counts else table.read_stored(rows)


def _check(block: Any, start: int, table: Source, domain: Loss) -> None:
    """Raise for values outside the domain of a loss, with row numbers of the whole data."""
    data.check_finite(stored_rows(block), start, table)
    check_values(block, domain, start, table)


def write_codes(
    out: Path,
    blocks: Any,
    shape: tuple[int, ...],
    dtype: Any,
    table: Source,
    estimator: Any,
    labels: npt.NDArray[Any] | None = None,
) -> None:
    """Write codes with the names of rows and latents and, if known, labels and the columns of `obs`."""
    write_table(
        out,
        blocks,
        shape,
        dtype,
        row_names=table.obs_names,
        column_names=estimator.get_feature_names_out(),
        labels=labels,
        obs=table.obs,
        about={"version": __version__, "estimator": type(estimator).__name__},
    )


def _rows_in(n_bytes: int, n_features: int) -> int:
    return max(1, n_bytes // (4 * n_features))
