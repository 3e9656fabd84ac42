"""Autoencoders on AnnData, in the manner of scanpy: results go where its users look for them.

Promises: what is written can be stored in an .h5ad file; X is never written to nor, if sparse or on disk, densified;
the object is unchanged if anything fails. Needs anndata objects, not scanpy. Never: draws.
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
from .rows.devices import to_host

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = ["autoencoder"]

Genes = NDArray[np.int64] | None
"""Numbers of the genes used; None: all."""

BLOCK_VALUES = 32 << 20
"""Of the reconstruction, that are made at once."""

SENSITIVITY_ROWS = 1000
"""Cells over which the sensitivity of features to latents is averaged, at most."""


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
    """Fit an autoencoder to the cells of an AnnData and write what it finds beside them.

    Parameters
    ----------
    adata : AnnData of shape (n_obs, n_vars)
        Cells by genes, in memory or backed. Of what is on a GPU a copy in the CPU's memory is used, in which it is
        normalised; results are NumPy's.
    n_components : int
        Width of the latent layer.
    estimator : str
        Which one, as the command line names them: ``"autoencoder"``, ``"count"`` (of raw counts), ``"linear"``,
        ``"denoising"``, ``"sparse"``, ``"contractive"``, ``"variational"``, ...
    layer : str, optional
        Use ``adata.layers[layer]`` instead of ``adata.X``.
    obsm : str, optional
        Use ``adata.obsm[obsm]``, for example principal components; nothing is then written by gene.
    mask_var : str or ndarray of bool, shape (n_vars,), optional
        The genes to use: a column of ``adata.var``, for example ``"highly_variable"``, or a mask; None takes all.
    normalize : {"auto", "log1p", "standard", "minmax", "none"}
        Done to the data before training (see `Normalizer`); ``"auto"`` takes the logarithm of counts scaled to equal
        totals, for losses on counts the counts themselves, and standardises what are no counts.
    batch_key : str, optional
        Column of ``adata.obs`` that says which batch a cell is of, for example ``"sample"``. The decoder is told, so
        that codes need not tell it.
    layers : bool
        Write the reconstruction of each cell, too. It is dense.
    key_added : str, optional
        Write under this name instead.
    copy : bool
        Write to a copy and return it.
    random_state : int
    **params
        Of the estimator: ``hidden_layer_sizes``, ``loss``, ``max_iter``, ``batch_size``, ...

    Returns
    -------
    AnnData or None
        The copy, with these fields; None if they were written to `adata`.

        ``.obsm["X_ae" | key_added]`` : float32, (n_obs, n_components)
            Latent codes.
        ``.obs["ae_recon_error"]`` : (n_obs,)
            Loss of the reconstruction of a cell, on the scale of training.
        ``.var["ae_recon_error"]`` : (n_vars,)
            Mean squared error of a gene, on the scale of training; NaN for those left out.
        ``.var["ae_dispersion"]`` : (n_vars,), with ``loss`` or ``likelihood`` ``"nb"`` and ``"zinb"``
            Inverse dispersion of a gene, unless there is one for each cell; NaN for genes left out.
        ``.varm["AE_sensitivity"]`` : (n_vars, n_components)
            Mean absolute derivative of the reconstruction of a gene by each latent, over at most 1000 cells; zero for
            genes left out.
        ``.uns["ae" | key_added]`` : dict
            ``params``, ``history`` and ``version``.
        ``.layers["ae_denoised"]`` : float32, (n_obs, n_vars), if `layers`
            Reconstruction on the scale of the data (after ``log1p``: cells scaled to one total); NaN for genes left
            out.

        With `key_added`, ``ae`` and ``AE`` are replaced by it in the other names, too.

    Raises
    ------
    KeyError
        There is no such layer, entry of obsm, or column of var or obs.
    ValueError
        A parameter or the data do not fit; the message says which.
    TypeError
        This is no AnnData.
    """
    if not hasattr(adata, "obsm"):
        raise TypeError(f"adata is a {type(adata).__name__}, not an AnnData: narrows.Autoencoder takes arrays")
    model = _build(estimator, {"n_components": n_components, "random_state": random_state} | params)
    if obsm is not None and (layer is not None or mask_var is not None or layers):
        raise ValueError("obsm is used instead of genes: it goes with neither layer, mask_var nor layers=True")
    batch = None if batch_key is None else read_labels(_column(adata, batch_key), adata.n_obs, f"obs[{batch_key!r}]")
    genes = None if mask_var is None else _mask(adata, mask_var)
    source = _source(adata, layer, obsm, genes)
    normalizer = Normalizer(normalize, loss=model.loss).fit(source)
    table = NormalizedSource(source, normalizer)
    table.var_names = None  # The model is applied to blocks, which have none.
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
        told = None if batch is None else batch[some]
        moved = model.latent_sensitivity(table.read_rows(some), batch=told)
        sensitivity = _among_all(moved.T, genes, adata.n_vars, 0.0)
        dispersions = getattr(model, "dispersion_", None)
    if layers:
        denoised = _denoised(model, normalizer, table, batch, genes, adata.n_vars)

    # Nothing has been written so far.
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
        raise DataError("this AnnData has no X: name the layer to use")
    if hasattr(matrix, "file") or hasattr(matrix, "group"):  # of h5py, or sparse on disk
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
    """Rows of a matrix that AnnData keeps in its file."""

    def __init__(self, matrix: Any, genes: Genes, adata: AnnData, name: str) -> None:
        form = getattr(matrix, "format", None)
        if form not in (None, "csr"):
            raise DataError(
                f"{name} is stored by {form}, which is slow to read by rows: adata.to_memory(), or write it as csr"
            )
        if adata.is_view:
            raise DataError(f"{name}: a view of a backed AnnData is not read from its file: take adata.to_memory()")
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
        told = None if batch is None else batch[start : start + block.shape[0]]
        rebuilt = normalizer.inverse_transform(model.reconstruct(block, batch=told))
        out[start : start + len(rebuilt), slice(None) if genes is None else genes] = rebuilt
    return out


def _among_all(values: NDArray[Any], genes: Genes, n_vars: int, rest: float) -> NDArray[Any]:
    """Values of the genes used, at their places among all."""
    if genes is None:
        return values
    out = np.full((n_vars, *values.shape[1:]), rest)
    out[genes] = values
    return out


def _plain(params: Mapping[str, Any]) -> dict[str, Any]:
    """Plain parameters in a form that .h5ad files hold; those that are None are left out."""
    return {
        name: _stored(value) if isinstance(value, tuple) else value
        for name, value in params.items()
        if value is not None
    }


def _stored(value: tuple[Any, ...]) -> Any:
    """An array, or text for what is none: numbers beside pairs of them."""
    mixed = len({isinstance(item, tuple) for item in value}) > 1
    return repr(value) if mixed else np.asarray(value)
