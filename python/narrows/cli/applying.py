"""A model applied to a file: encode, decode and score behind the command line.

- Encoding a file gives bit for bit the codes that fit wrote for it, whatever the memory limit or the number
  of threads.
- Rows are read, worked on and written block by block; the output file is whole or is not there.
- The data must have the model's features in the model's order; anything else is an error that says where.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import narrows

from .. import data
from .._version import __version__
from ..backends import thread_choice
from ..data import Source
from ..errors import DataError
from ..models.data import check_target
from ..normalize import NormalizedSource, Normalizer
from .resources import apply_bytes, blas_threads
from .tables import check_output, write_table

__all__ = ["decode", "encode", "encoded", "open_model", "score", "with_names", "write_codes"]

log = logging.getLogger("narrows")


def encode(
    model: Path,
    data_path: str,
    out: Path,
    *,
    layer: str | None = None,
    genes_by_cells: bool = False,
    backend: str | None = None,
    threads: int | None = None,
    max_memory: int | None = None,
) -> None:
    """Write the latent codes of a data set to a .npy, .h5ad or .csv file."""
    check_output(out, (".npy", ".h5ad", ".csv"))
    estimator = open_model(model, backend, threads)
    with (
        blas_threads(thread_choice(threads)[0]),
        _opened(estimator, data_path, layer, genes_by_cells) as table,
    ):
        step = apply_bytes(estimator, max_memory)
        shape = (table.shape[0], estimator.plan_.spec.n_components)
        write_codes(out, encoded(estimator, table, step), shape, table.dtype, table, estimator)
    log.info("wrote %s: %d x %d", out, *shape)


def decode(
    model: Path,
    latent: str,
    out: Path,
    *,
    backend: str | None = None,
    threads: int | None = None,
    max_memory: int | None = None,
) -> None:
    """Write what latent codes decode to, on the scale of the data, to a .npy, .h5ad or .csv file."""
    check_output(out, (".npy", ".h5ad", ".csv"))
    estimator = open_model(model, backend, threads)
    normalizer = _normalizer_of(estimator)
    with blas_threads(thread_choice(threads)[0]), data.open(latent) as source:
        k = estimator.plan_.spec.n_components
        if source.shape[1] != k:
            raise DataError(f"{source.name}: {source.shape[1]} columns, the model has {k} components")
        shape = (source.shape[0], normalizer.n_features_)
        step = apply_bytes(estimator, max_memory)

        def blocks() -> Iterator[npt.NDArray[Any]]:
            for start, block in source.blocks(_rows_in(step, shape[1])):
                data.check_finite(block, start, source)
                codes = block.toarray() if hasattr(block, "toarray") else block
                yield normalizer.inverse(estimator.inverse_transform(codes))

        write_table(
            out,
            blocks(),
            shape,
            source.dtype,
            row_names=source.obs_names,
            column_names=getattr(estimator, "feature_names_in_", None),
            about={"version": __version__, "normalize": normalizer.resolved_},
        )
    log.info("wrote %s: %d x %d", out, *shape)


def score(
    model: Path,
    data_path: str,
    out: Path,
    *,
    layer: str | None = None,
    genes_by_cells: bool = False,
    backend: str | None = None,
    threads: int | None = None,
    max_memory: int | None = None,
) -> None:
    """Write the loss of each row, a sum over its features, to a .csv or .npy file; lower is better."""
    check_output(out, (".csv", ".npy"))
    estimator = open_model(model, backend, threads)
    with (
        blas_threads(thread_choice(threads)[0]),
        _opened(estimator, data_path, layer, genes_by_cells) as table,
    ):
        step = _rows_in(apply_bytes(estimator, max_memory), table.shape[1])
        loss = estimator.plan_.spec.loss

        def blocks() -> Iterator[npt.NDArray[Any]]:
            for start, block in table.blocks(step):
                data.check_finite(block, start, table)
                check_target(block, loss, start, table.name)
                yield -estimator.score_samples(with_names(block, table))

        write_table(
            out,
            blocks(),
            table.shape[:1],
            table.dtype,
            row_names=table.obs_names,
            column_names=np.array(["loss"]),
        )
    log.info("wrote %s: %d losses", out, table.shape[0])


def open_model(path: Path, backend: str | None = None, threads: int | None = None) -> Any:
    """The estimator of a model file, or of the folder of a fit, set to run on this machine."""
    if path.is_dir():
        if not (path / "model.safetensors").exists():
            raise DataError(f"{path} holds no model.safetensors: give a model file or the --out folder of a fit")
        path = path / "model.safetensors"
    estimator = narrows.load(path)
    # Threads and backend belong to the machine a model runs on, not to the one it was trained on.
    network = estimator._network
    network.n_threads = threads
    network.requested = network.requested if backend is None else backend
    return estimator


@contextlib.contextmanager
def _opened(estimator: Any, path: str, layer: str | None, genes_by_cells: bool) -> Iterator[NormalizedSource]:
    """The data as the model wants it: its features in its order, normalised as in training."""
    normalizer = _normalizer_of(estimator)
    if layer is None and Path(path).suffix in (".h5ad", ".zarr"):
        layer = estimator.metadata_.get("source", {}).get("layer")
    with data.open(path, layer=layer, genes_by_cells=genes_by_cells) as source:
        _check_features(estimator, source)
        yield NormalizedSource(source, normalizer)


def _check_features(estimator: Any, source: Source) -> None:
    n_features = int(estimator.n_features_in_)
    known, given = getattr(estimator, "feature_names_in_", None), source.var_names
    if known is not None and given is not None and not np.array_equal(known.astype(str), given.astype(str)):
        theirs, ours = given.astype(str), known.astype(str)
        if len(theirs) == len(ours) and np.array_equal(np.sort(theirs), np.sort(ours)):
            at = int(np.argmax(theirs != ours))
            raise DataError(
                f"{source.name}: the features are those of the model in another order (column {at} is "
                f"'{theirs[at]}' here, '{ours[at]}' in the model): reorder the columns"
            )
        n = min(len(theirs), len(ours))
        differ = theirs[:n] != ours[:n]
        at = int(np.argmax(differ)) if differ.any() else n
        here = repr(str(theirs[at])) if at < len(theirs) else "absent"
        there = repr(str(ours[at])) if at < len(ours) else "absent"
        counts = f"{len(theirs)} features, the model has {len(ours)}"
        raise DataError(
            f"{source.name}: {counts}; the first to differ is column {at}: {here} here, {there} in the "
            "model: select and order the columns as in training"
        )
    if source.shape[1] != n_features:
        hint = "; if the table is genes x cells, add --genes-by-cells" if source.shape[0] == n_features else ""
        raise DataError(f"{source.name}: {source.shape[1]} features, the model has {n_features}{hint}")


def _normalizer_of(estimator: Any) -> Normalizer:
    state = estimator.metadata_.get("normalizer")
    if state is not None:
        return Normalizer.from_dict(state)
    # Saved from Python without the command line: the user normalises, and so does whoever applies it.
    plain = Normalizer("none", loss=estimator.loss)
    plain.resolved_, plain.reason_, plain.n_features_ = "none", "as saved", int(estimator.n_features_in_)
    return plain


def encoded(estimator: Any, table: Source, step_bytes: int) -> Iterator[npt.NDArray[Any]]:
    """The codes of a normalised source, block by block."""
    for start, block in table.blocks(_rows_in(step_bytes, table.shape[1])):
        data.check_finite(block, start, table)
        yield estimator.transform(with_names(block, table))


def with_names(block: Any, table: Source) -> Source:
    """A block that still knows its features, or the estimator would warn that it does not."""
    return data.ArraySource(block, var_names=table.var_names, name=table.name)


def write_codes(out: Path, blocks: Any, shape: tuple[int, ...], dtype: Any, table: Source, estimator: Any) -> None:
    """Write codes with the names of rows and latents and, where known, the labels."""
    write_table(
        out,
        blocks,
        shape,
        dtype,
        row_names=table.obs_names,
        column_names=estimator.get_feature_names_out(),
        labels=table.labels,
        about={"version": __version__, "estimator": type(estimator).__name__},
    )


def _rows_in(n_bytes: int, n_features: int) -> int:
    return max(1, n_bytes // (4 * n_features))
