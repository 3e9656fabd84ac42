"""Autoencoders on AnnData, in the style of scanpy.

- An .h5ad file can store every result.
- X never changes. It is not made dense if it is sparse or on disk.
- If anything fails, the object stays as it was.
- This needs anndata objects, but not scanpy.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from . import models
from ._version import __version__
from .data import ArraySource, Source
from .data.normalize import Normalizer
from .data.normalized import NormalizedSource
from .errors import DataError
from .fitting.conditions import read_labels
from .fitting.parameters import check_parameters, plain_parameters
from .plan.spec import Precision
from .rows.devices import to_host

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = ["autoencoder"]

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
        Name of the results instead of ``ae``.
    copy : bool
        Write to a copy and return it.
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
            Loss of each cell's reconstruction, on the scale of training.
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
    """
    if not hasattr(adata, "obsm"):
        raise TypeError(f"adata is a {type(adata).__name__}, not an AnnData; for arrays use narrows.Autoencoder")
    model = _build(estimator, {"n_components": n_components, "random_state": random_state} | params)
    if obsm is not None and (layer is not None or mask_var is not None or layers):
        raise ValueError("obsm replaces the genes: leave out layer, mask_var and layers")
    batch = None if batch_key is None else read_labels(_column(adata, batch_key), adata.n_obs, f"obs[{batch_key!r}]")
    genes = None if mask_var is None else _mask(adata, mask_var)
    source = _source(adata, layer, obsm, genes)
    normalizer = Normalizer(normalize, loss=model.loss).fit(source)
    table = NormalizedSource(source, normalizer, Precision.of(model.precision).dtype)
    table.var_names = None  # The model is applied to blocks, and blocks have no names.
    stays = isinstance(source, _BackedSource) or table.shift is not None
    X: Any = table if stays else table.read_rows(slice(None))
    model.fit(X, batch=batch)

    key = key_added or "ae"
    found = {
        "params": _plain(
            {
                "estimator": estimator,
                "layer": layer,
                "obsm": obsm,
                "mask_var": mask_var if isinstance(mask_var, str) else None,
                "normalize": normalizer.resolved_,
                "batch_key": batch_key,
                **plain_parameters(model),
            }
        ),
        "history": {name: np.asarray(values, dtype=np.float64) for name, values in model.history_.items()},
        "version": __version__,
    }
    codes = model.transform(X).astype(np.float32, copy=False)
    errors = -model.score_samples(X, batch=batch)
    if obsm is None:
        gene_errors = _among_all(model.feature_errors(X, batch=batch), genes, adata.n_vars, np.nan)
        some = np.linspace(0, len(codes) - 1, min(len(codes), SENSITIVITY_ROWS)).round().astype(np.int64)
        chosen = None if batch is None else batch[some]
        moved = model.latent_sensitivity(table.read_rows(some), batch=chosen)
        sensitivity = _among_all(moved.T, genes, adata.n_vars, 0.0)
        dispersions = getattr(model, "dispersion_", None)
    if layers:
        denoised = _denoised(model, normalizer, table, batch, genes, adata.n_vars)

    # Nothing was written to adata up to here.
    if copy:
        adata = adata.to_memory() if adata.isbacked else adata.copy()
    elif adata.is_view:
        adata._init_as_actual(adata.copy())
    adata.obsm[key_added or "X_ae"] = codes
    adata.obs[f"{key}_recon_error"] = errors
    if obsm is None:
        adata.var[f"{key}_recon_error"] = gene_errors
        if dispersions is not None:
            adata.var[f"{key}_dispersion"] = _among_all(dispersions, genes, adata.n_vars, np.nan)
        adata.varm[f"{key_added or 'AE'}_sensitivity"] = sensitivity
    if layers:
        adata.layers[f"{key}_denoised"] = denoised
    adata.uns[key] = found
    return adata if copy else None


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


def _denoised(
    model: models.BaseAutoencoder,
    normalizer: Normalizer,
    table: Source,
    batch: NDArray[Any] | None,
    genes: Genes,
    n_vars: int,
) -> NDArray[np.float32]:
    out = np.full((table.shape[0], n_vars), np.nan, np.float32)
    for start, block in table.blocks(max(1, BLOCK_VALUES // n_vars)):
        labels = None if batch is None else batch[start : start + block.shape[0]]
        rebuilt = normalizer.inverse_transform(model.reconstruct(block, batch=labels))
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
