"""Autoencoders on AnnData, in the style of scanpy.

- An .h5ad file can store every result.
- X never changes. It is not made dense if it is sparse or on disk.
- If anything fails, the object stays as it was.
- This needs anndata objects, but not scanpy.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from sklearn.utils.validation import check_is_fitted

from . import models
from ._version import __version__
from .data import ArraySource, Source
from .data.normalize import Normalizer
from .data.normalized import NormalizedSource
from .data.source import with_names
from .errors import DataError, OutputError
from .evaluation.cells import CellErrors
from .fitting.conditions import read_labels
from .fitting.files import stored_normalizer, stored_source
from .fitting.parameters import check_parameters, plain_parameters
from .plan.spec import Precision
from .rows.devices import to_host

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = ["autoencoder", "encode"]

Genes = NDArray[np.int64] | None
"""Numbers of the genes in use; None for all."""

BLOCK_VALUES = 32 << 20
"""Values of the reconstruction that are computed at once."""

SENSITIVITY_ROWS = 1000
"""Most cells for the mean sensitivity of features to latents."""


def autoencoder(
    adata: AnnData,
    *,
    n_components: int = 32,
    estimator: str = "autoencoder",
    layer: str | None = None,
    obsm: str | None = None,
    mask_var: str | NDArray[np.bool_] | None = None,
    normalize: str = "auto",
    batch_key: str | None = None,
    layers: bool = False,
    key_added: str | None = None,
    copy: bool = False,
    model_path: str | os.PathLike[str] | None = None,
    random_state: int = 0,
    **params: Any,
) -> AnnData | None:
    """Fit an autoencoder to the cells of an AnnData and write the results into it.

    Parameters
    ----------
    adata : AnnData of shape (n_obs, n_vars)
        Cells by genes, in memory or backed. Data on a GPU are copied to the CPU and normalised there; results are NumPy
        arrays.
    n_components : int
        Width of the latent layer.
    estimator : str
        Name of the estimator, as on the command line: ``"autoencoder"``, ``"count"`` (for raw counts), ``"linear"``,
        ``"denoising"``, ``"sparse"``, ``"contractive"``, ``"variational"``, ...
    layer : str, optional
        Use ``adata.layers[layer]`` instead of ``adata.X``.
    obsm : str, optional
        Use ``adata.obsm[obsm]``, for example principal components. Results by gene are then left out.
    mask_var : str or ndarray of bool, shape (n_vars,), optional
        The genes to use: a column of ``adata.var``, for example ``"highly_variable"``, or a mask; None takes all.
    normalize : {"auto", "log1p", "standard", "minmax", "none"}
        How to normalise the data before training (see `Normalizer`). ``"auto"`` takes the logarithm of counts scaled to
        equal totals, keeps counts for losses on counts, and standardises most
        other data.
    batch_key : str, optional
        Column of ``adata.obs`` with the batch of each cell, for example ``"sample"``. The decoder is conditioned on it,
        so that codes need not hold it.
    layers : bool
        Whether to write the dense reconstruction of each cell.
    key_added : str, optional
        Name of the results instead of ``ae``; without a slash. Results of an earlier call with this name are replaced.
    copy : bool
        Write to a copy and return it.
    model_path : path, optional
        Save the fitted model to this file, with its genes and its normalisation. `encode`, `narrows.load` and the
        command line read it. An existing file is replaced.
    random_state : int
    **params
        Parameters of the estimator: ``hidden_layer_sizes``, ``loss``, ``max_iter``, ``batch_size``, ...

    Returns
    -------
    AnnData or None
        The copy with the results; None if they were written to `adata`.

        ``.obsm["X_ae" | key_added]`` : float32, (n_obs, n_components)
            Latent codes.
        ``.obs["ae_recon_error"]`` : (n_obs,)
            Loss of each cell's reconstruction, on the scale of training. For a loss of counts it is adjusted for the
            depth of the cell: the loss relative to a model without a code, as the distance from typical cells of the
            same depth in units of their spread (`narrows.evaluation.cells` has the formula). 3 or more is unusual.
            NaN for cells without counts.
        ``.obs["ae_loss"]`` : (n_obs,), with losses of counts
            The loss itself, in nats. It grows with the depth of the cell.
        ``.var["ae_recon_error"]`` : (n_vars,)
            Mean squared error of each gene, on the scale of training; NaN for genes left out.
        ``.var["ae_dispersion"]`` : (n_vars,), with ``loss`` or ``likelihood`` ``"nb"`` and ``"zinb"``
            Inverse dispersion of each gene, unless each cell has its own; NaN for genes left out.
        ``.varm["AE_sensitivity"]`` : (n_vars, n_components)
            Mean absolute derivative of each gene's reconstruction by each latent, over at most 1000 cells; zero for
            genes left out.
        ``.uns["ae" | key_added]`` : dict
            ``params``, ``history`` and ``version``.
        ``.layers["ae_denoised"]`` : float32, (n_obs, n_vars), if `layers`
            Reconstruction on the scale of the data (after ``log1p``, cells scaled to one total); NaN for genes left
            out.

        `key_added` replaces ``ae`` and ``AE`` in all names.

    Raises
    ------
    KeyError
        There is no such layer, entry of obsm, or column of var or obs.
    ValueError
        A parameter or the data cannot be used; the message says which.
    TypeError
        `adata` is not an AnnData.
    OutputError
        `model_path` cannot be written.

    See Also
    --------
    encode : Apply the model to other cells.

    Examples
    --------
    >>> import anndata, numpy as np
    >>> import narrows
    >>> counts = np.random.default_rng(0).poisson(1.0, (50, 20)).astype("float32")
    >>> adata = anndata.AnnData(counts)
    >>> narrows.scanpy.autoencoder(adata, n_components=4, estimator="count", max_iter=2)
    >>> adata.obsm["X_ae"].shape
    (50, 4)
    """
    _check_target(adata, key_added)
    model = _build(estimator, {"n_components": n_components, "random_state": random_state} | params)
    if obsm is not None and (layer is not None or mask_var is not None or layers):
        raise ValueError("obsm replaces the genes: leave out layer, mask_var and layers")
    path = None if model_path is None else _writable(model_path)
    batch = None if batch_key is None else read_labels(_column(adata, batch_key), adata.n_obs, f"obs[{batch_key!r}]")
    genes = None if mask_var is None else _mask(adata, mask_var)
    source = _source(adata, layer, obsm, genes)
    normalizer = Normalizer(normalize, loss=model.loss).fit(source)
    dtype = Precision.of(model.precision).dtype
    cells = _Cells.of(source, normalizer, dtype, genes, batch, by_gene=obsm is None)
    names, cells.table.var_names = cells.table.var_names, None  # The model is fitted to blocks, which have no names.
    model.fit(cells.X, batch=batch)
    found = _results(model, cells, adata.n_vars, layers=layers)
    settings = {
        "estimator": estimator,
        "layer": layer,
        "obsm": obsm,
        "mask_var": mask_var if isinstance(mask_var, str) else None,
        "normalize": normalizer.resolved_,
        "batch_key": batch_key,
        "model_path": None if path is None else str(path),
    }
    if names is not None:
        model.feature_names_in_ = names.astype(str).astype(object)
    model.metadata_ |= {
        "normalizer": normalizer.to_dict(),
        "source": {
            "name": source.name,
            "n_rows": source.shape[0],
            "layer": layer,
            "obsm": obsm,
            "batch_key": batch_key,
        },
    }
    if path is not None:
        model.save(path)
    # Nothing was written to adata up to here.
    return _write(adata, found | {"uns": {"": _about(model, settings)}}, key_added, copy=copy)


def encode(
    adata: AnnData,
    model: models.BaseAutoencoder | str | os.PathLike[str],
    *,
    layer: str | None = None,
    batch_key: str | None = None,
    errors: bool = True,
    layers: bool = False,
    key_added: str | None = None,
    copy: bool = False,
) -> AnnData | None:
    """Apply a fitted model to the cells of an AnnData and write the results into it.

    Genes are matched by name: their order may differ, and genes that the model does not know are left out.

    Parameters
    ----------
    adata : AnnData of shape (n_obs, n_vars)
        As for `autoencoder`.
    model : path or fitted estimator
        The file of `autoencoder` (`model_path`), of ``save`` or of ``narrows fit``, or the folder of ``narrows fit``.
    layer : str, optional
        The layer to use, ``"X"`` for ``adata.X``. By default that of the fit.
    batch_key : str, optional
        Column of ``adata.obs`` with the batch of each cell, for a model with batches. By default that of the fit.
    errors : bool
        Whether to write errors and sensitivities. Without them no batch is needed, so the cells may be of batches that
        the model does not know.
    layers, key_added, copy
        As for `autoencoder`.

    Returns
    -------
    AnnData or None
        As for `autoencoder`, of these cells.

    Raises
    ------
    DataError
        Genes of the model are missing; the message names them. Or the data cannot be used.
    ModelFileError
        The file is not a model.
    KeyError, ValueError, TypeError
        As for `autoencoder`.

    Examples
    --------
    >>> import anndata, numpy as np
    >>> import narrows
    >>> counts = np.random.default_rng(0).poisson(1.0, (60, 20)).astype("float32")
    >>> adata = anndata.AnnData(counts)
    >>> old, new = adata[:50].copy(), adata[50:, ::-1].copy()
    >>> narrows.scanpy.autoencoder(old, n_components=4, max_iter=2, model_path="cells.safetensors")
    >>> narrows.scanpy.encode(new, "cells.safetensors")
    >>> new.obsm["X_ae"].shape
    (10, 4)
    """
    _check_target(adata, key_added)
    if layers and not errors:
        raise ValueError("layers=True needs the decoder: leave out errors=False")
    path = None
    if isinstance(model, str | os.PathLike):
        path = Path(model)
        path = path / "model.safetensors" if path.is_dir() else path
        model = models.load(path).set_params(n_threads=None)  # threads belong to the machine of the fit
    elif not isinstance(model, models.BaseAutoencoder):
        raise TypeError(f"model is a {type(model).__name__}: give a path or a fitted estimator of narrows")
    check_is_fitted(model)
    fit = stored_source(model)
    obsm = fit.get("obsm")
    layer = fit.get("layer") if layer is None else layer
    layer = None if layer == "X" else layer
    genes = None if obsm is not None else _genes_of(model, adata)
    source = _source(adata, layer, obsm, genes)
    if source.shape[1] != model.n_features_in_:
        raise DataError(f"{source.name} has {source.shape[1]} columns, but the model has {model.n_features_in_}")
    batch = None
    if model._conditions is not None and errors:
        batch_key = batch_key or fit.get("batch_key")
        if batch_key is None:
            raise ValueError("the model was fitted with batches: set batch_key, or errors=False to write codes only")
        batch = read_labels(_column(adata, batch_key), adata.n_obs, f"obs[{batch_key!r}]")
    elif batch_key is not None and model._conditions is None:
        raise ValueError(f"batch_key={batch_key!r}: the model was fitted without batches; leave it out")
    normalizer = stored_normalizer(model)
    dtype = Precision.of(model.precision).dtype
    cells = _Cells.of(source, normalizer, dtype, genes, batch, by_gene=obsm is None)
    cells.table.var_names = model._feature_names if obsm is None else None
    found = _results(model, cells, adata.n_vars, layers=layers, errors=errors)
    settings = {
        "estimator": next((name for name, entry in models.REGISTRY.items() if entry.cls == type(model).__name__), None),
        "layer": layer,
        "obsm": obsm,
        "normalize": normalizer.resolved_,
        "batch_key": batch_key,
        "model_path": None if path is None else str(path),
    }
    return _write(adata, found | {"uns": {"": _about(model, settings)}}, key_added, copy=copy)


@dataclass(frozen=True)
class _Cells:
    """The rows that a model is applied to.

    Attributes
    ----------
    table : NormalizedSource
    X : Source or array
        All rows: `table`, if its rows stay where they are, or its rows in memory.
    genes : ndarray of int64, or None
        Numbers of the genes in `adata`.
    batch : ndarray of shape (n_obs,), or None
    by_gene : bool
        Whether the columns are genes.
    """

    table: NormalizedSource
    X: Any
    genes: Genes
    batch: NDArray[Any] | None
    by_gene: bool

    @classmethod
    def of(
        cls,
        source: Source,
        normalizer: Normalizer,
        dtype: np.dtype[Any],
        genes: Genes,
        batch: NDArray[Any] | None,
        *,
        by_gene: bool,
    ) -> _Cells:
        table = NormalizedSource(source, normalizer, dtype)
        stays = isinstance(source, _BackedSource) or table.shift is not None
        return cls(table, table if stays else table.read_rows(slice(None)), genes, batch, by_gene)

    def named(self, block: Any) -> Any:
        """Rows with the names that the model knows."""
        return block if block is self.table or self.table.var_names is None else with_names(block, self.table)


Found = dict[str, dict[str, Any]]
"""For each field of an AnnData: values by the end of their name."""


def _results(model: models.BaseAutoencoder, cells: _Cells, n_vars: int, *, layers: bool, errors: bool = True) -> Found:
    X, batch = cells.named(cells.X), cells.batch
    codes = model.transform(X)
    found: Found = {"obsm": {"": np.asarray(codes, dtype=np.float32)}}
    if errors:
        found["obs"] = _cell_errors(model, cells, -model.score_samples(X, batch=batch))
    if errors and cells.by_gene:
        gene_errors = model.feature_errors(X, batch=batch)
        found["var"] = {"recon_error": _among_all(gene_errors, cells.genes, n_vars, np.nan)}
        some = np.linspace(0, len(codes) - 1, min(len(codes), SENSITIVITY_ROWS)).round().astype(np.int64)
        chosen = None if batch is None else batch[some]
        moved = model.latent_sensitivity(cells.named(cells.table.read_rows(some)), batch=chosen)
        found["varm"] = {"sensitivity": _among_all(moved.T, cells.genes, n_vars, 0.0)}
        dispersions = getattr(model, "dispersion_", None)
        if dispersions is not None:
            found["var"]["dispersion"] = _among_all(dispersions, cells.genes, n_vars, np.nan)
    if layers:
        found["layers"] = {"denoised": _denoised(model, cells, n_vars)}
    return found


def _cell_errors(model: models.BaseAutoencoder, cells: _Cells, losses: NDArray[Any]) -> dict[str, NDArray[Any]]:
    """Columns of `obs`. The loss of counts is almost a measure of a cell's depth."""
    loss, table = model.plan_.spec.loss, cells.table
    if not loss.info.raw_counts:
        return {"recon_error": losses}
    errors = CellErrors.of_model(model)
    if errors is None:
        errors = CellErrors.fit(loss, table, losses)
        model.metadata_["cell_errors"] = errors.to_dict()
    adjusted = np.empty(len(losses))
    for start, block in table.blocks(max(1, BLOCK_VALUES // table.shape[1])):
        part = slice(start, start + block.shape[0])
        adjusted[part] = errors.of(block, losses[part])
    return {"recon_error": adjusted, "loss": losses}


def _about(model: models.BaseAutoencoder, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The entry of `uns`."""
    return {
        "params": _plain({**settings, **plain_parameters(model)}),
        "history": {name: np.asarray(values, dtype=np.float64) for name, values in model.history_.items()},
        "version": __version__,
    }


_FIELDS = {
    "obsm": ("",),
    "obs": ("recon_error", "loss"),
    "var": ("recon_error", "dispersion"),
    "varm": ("sensitivity",),
    "layers": ("denoised",),
    "uns": ("",),
}
"""The ends of the names of all results."""


def _write(adata: AnnData, found: Found, key_added: str | None, *, copy: bool) -> AnnData | None:
    """Write results, and remove those of an earlier call with this name that have no successor."""
    if copy:
        adata = adata.to_memory() if adata.isbacked else adata.copy()
    elif adata.is_view:
        adata._init_as_actual(adata.copy())
    for field, ends in _FIELDS.items():
        there = getattr(adata, field)
        for end in ends:
            stem = key_added or {"obsm": "X_ae", "varm": "AE"}.get(field, "ae")
            name = f"{stem}_{end}" if end else stem
            if end in found.get(field, {}):
                there[name] = found[field][end]
            elif name in there:
                del there[name]
    return adata if copy else None


def _check_target(adata: Any, key_added: Any) -> None:
    if not hasattr(adata, "obsm"):
        raise TypeError(f"adata is a {type(adata).__name__}, not an AnnData; for arrays use narrows.Autoencoder")
    if key_added is None:
        return
    if not isinstance(key_added, str):
        raise TypeError(f"key_added={key_added!r} must be a text")
    if not key_added.strip(".") or "/" in key_added or "\0" in key_added:
        raise ValueError(f"key_added={key_added!r}: give a name without a slash; .h5ad files cannot store it")


def _writable(model_path: str | os.PathLike[str]) -> Path:
    """The path of a model file; a long fit does not end at a folder that is missing."""
    path = Path(model_path)
    if path.is_dir() or not os.access(path.parent, os.W_OK | os.X_OK):
        raise OutputError(f"model_path={str(path)!r} is not a file in a writable folder")
    return path


def _genes_of(model: models.BaseAutoencoder, adata: AnnData) -> Genes:
    """Where `adata` has the genes of a model; None if it has the same genes in the same order."""
    names, here = model._feature_names, [str(name) for name in adata.var_names]
    if names is None:
        if adata.n_vars != model.n_features_in_:
            raise DataError(
                f"adata has {adata.n_vars} genes, the model has {model.n_features_in_} and does not know their names: "
                "give the genes of the fit, in their order"
            )
        return None
    wanted = [str(name) for name in names]
    if wanted == here:
        return None
    at = {name: i for i, name in enumerate(here)}
    if missing := [name for name in wanted if name not in at]:
        named = ", ".join(missing[:10]) + (", ..." if len(missing) > 10 else "")
        raise DataError(
            f"adata lacks {len(missing)} of the {len(wanted)} genes of the model: {named}; its own are {here[0]}, ...: "
            "give these genes, or fit a model to the common ones"
        )
    times, known = Counter(here), Counter(wanted)
    if repeated := [name for name in wanted if times[name] > 1 or known[name] > 1]:
        raise DataError(f"the gene name {repeated[0]} is not unique, so genes cannot be matched: make names unique")
    return np.array([at[name] for name in wanted], np.int64)


def _build(name: str, params: Mapping[str, Any]) -> models.BaseAutoencoder:
    if name not in models.REGISTRY:
        raise ValueError(f"estimator={name!r} is not one of {', '.join(models.REGISTRY)}")
    cls = models.estimator_class(name)
    known = cls().get_params()
    if unknown := sorted(params.keys() - known.keys()):
        raise ValueError(f"{cls.__name__} has no parameter {unknown[0]!r}; it takes {', '.join(sorted(known))}")
    model = cls(**params)
    check_parameters(model)
    return model


def _column(adata: AnnData, batch_key: str) -> Any:
    if batch_key not in adata.obs:
        raise KeyError(f"batch_key={batch_key!r} is not a column of adata.obs; it has {', '.join(adata.obs) or 'none'}")
    return adata.obs[batch_key]


def _mask(adata: AnnData, mask_var: str | NDArray[np.bool_]) -> Genes:
    """The numbers of the genes to use."""
    if isinstance(mask_var, str):
        if mask_var not in adata.var:
            raise KeyError(
                f"mask_var={mask_var!r} is not a column of adata.var; it has {', '.join(adata.var) or 'none'}"
            )
        name, mask = f"adata.var[{mask_var!r}]", np.asarray(adata.var[mask_var])
    else:
        name, mask = "mask_var", np.asarray(mask_var)
    if mask.dtype != bool or mask.shape != (adata.n_vars,):
        raise ValueError(f"{name} must hold {adata.n_vars} booleans, not {mask.dtype} of shape {mask.shape}")
    if not mask.any():
        raise ValueError(f"{name} selects no gene")
    return np.flatnonzero(mask)


def _source(adata: AnnData, layer: str | None, obsm: str | None, genes: Genes) -> Source:
    if obsm is not None:
        return ArraySource(to_host(_entry(adata.obsm, obsm, "obsm")), name=f"obsm[{obsm!r}]")
    name = "X" if layer is None else f"layers[{layer!r}]"
    matrix = adata.X if layer is None else _entry(adata.layers, layer, "layers")
    if matrix is None:
        raise DataError("this AnnData has no X: set layer")
    if hasattr(matrix, "file") or hasattr(matrix, "group"):  # h5py, or sparse on disk
        return _BackedSource(matrix, genes, adata, name)
    rows = ArraySource(to_host(matrix), name=name)
    names = np.asarray(adata.var_names)
    if genes is None:
        return ArraySource(rows.array, var_names=names, name=name)
    return ArraySource(rows.array[:, genes], var_names=names[genes], name=name)


def _entry(mapping: Mapping[str, Any], key: str, name: str) -> Any:
    if key not in mapping:
        raise KeyError(f"adata.{name} has no {key!r}; it has {', '.join(mapping.keys()) or 'none'}")
    return mapping[key]


class _BackedSource(Source):
    """Rows of a matrix in the file of a backed AnnData."""

    def __init__(self, matrix: Any, genes: Genes, adata: AnnData, name: str) -> None:
        form = getattr(matrix, "format", None)
        if form not in (None, "csr"):
            raise DataError(
                f"{name} is stored as {form}, which is slow to read by rows: use adata.to_memory(), or write it as csr"
            )
        if adata.is_view:
            raise DataError(f"{name}: views of a backed AnnData cannot be read: use adata.to_memory()")
        shape = (matrix.shape[0], matrix.shape[1] if genes is None else len(genes))
        stored = None if form is None else matrix.group["data"].shape[0]
        names = np.asarray(adata.var_names)
        super().__init__(shape, matrix.dtype, nnz=stored, var_names=names if genes is None else names[genes], name=name)
        self._matrix, self._genes = matrix, genes

    def _slice(self, start: int, stop: int) -> Any:
        block = ArraySource(self._matrix[start:stop]).read_rows(slice(None))
        return block if self._genes is None else block[:, self._genes]


def _denoised(model: models.BaseAutoencoder, cells: _Cells, n_vars: int) -> NDArray[np.float32]:
    table, batch, genes = cells.table, cells.batch, cells.genes
    out = np.full((table.shape[0], n_vars), np.nan, np.float32)
    for start, block in table.blocks(max(1, BLOCK_VALUES // n_vars)):
        labels = None if batch is None else batch[start : start + block.shape[0]]
        rebuilt = table.normalizer.inverse_transform(model.reconstruct(cells.named(block), batch=labels))
        out[start : start + len(rebuilt), slice(None) if genes is None else genes] = rebuilt
    return out


def _among_all(values: NDArray[Any], genes: Genes, n_vars: int, rest: float) -> NDArray[Any]:
    """An array for all genes, with the values of the genes in use."""
    if genes is None:
        return values
    out = np.full((n_vars, *values.shape[1:]), rest)
    out[genes] = values
    return out


def _plain(params: Mapping[str, Any]) -> dict[str, Any]:
    """Plain parameters in a form that .h5ad files can hold, without those that are None."""
    return {
        name: _stored(value) if isinstance(value, tuple) else value
        for name, value in params.items()
        if value is not None
    }


def _stored(value: tuple[Any, ...]) -> Any:
    """An array; text for a mix of numbers and pairs, which is no array."""
    mixed = len({isinstance(item, tuple) for item in value}) > 1
    return repr(value) if mixed else np.asarray(value)
