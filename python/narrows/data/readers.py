"""Opening any data file by its name.

- HDF5, zarr, npy and folders of CSR parts are read block by block from disk; other formats are parsed once.
- Nothing is unpickled.
- A file that is missing, unknown, damaged or empty is an error of one line that names it.
"""

from __future__ import annotations

import errno
import logging
import os
from pathlib import Path
from typing import Any

import numpy.typing as npt

from ..errors import DataError
from . import bundled, hdf, mtx, npy, parquet, text
from .columns import column_of, complete
from .formats import Format, reading
from .source import ArraySource, Source
from .tree import check_folder

__all__ = ["FORMATS", "as_source", "format_of", "has_layers", "open", "read_obs"]

log = logging.getLogger("narrows")

FORMATS: tuple[Format, ...] = (*hdf.FORMATS, *mtx.FORMATS, *npy.FORMATS, *text.FORMATS, *parquet.FORMATS)
"""All formats. The first one that recognises a folder reads it."""


def format_of(path: Path) -> Format | None:
    """The format of an existing file or folder; None if nothing here reads it."""
    if path.is_dir():
        return next((f for f in FORMATS if f.is_folder is not None and f.is_folder(path)), None)
    name = path.name.lower()
    plain = name.removesuffix(".gz")
    return next((f for f in FORMATS if plain.endswith(f.suffixes) and (f.gzipped or plain == name)), None)


def has_layers(path: Path | None) -> bool:
    """Whether `path` is an AnnData file, which can hold several layers."""
    form = None if path is None else format_of(path)
    return form is not None and form.layer == "layer"


def open(
    path: str | os.PathLike[str],
    *,
    layer: str | None = None,
    genes_by_cells: bool = False,
    modality: str | None = None,
    follow_links: bool = False,
) -> Source:
    """Open a data set.

    Parameters
    ----------
    path : path
        A file: .h5ad, .h5mu, .loom, .h5 (10x or AnnData), .zarr.zip, .mtx, .npy, .npz, .csv, .tsv or .parquet; .mtx,
        .csv and .tsv may be gzipped (.gz). Or a folder: a .zarr store, a 10x folder (matrix.mtx, features.tsv,
        barcodes.tsv), or a folder of CSR parts (data.npy, indices.npy, indptr.npy, shape.npy). Or the name of a bundled
        data set, such as ``"pbmc4k"``, if no file has that name.
    layer : str, optional
        Which matrix to read: a layer of an AnnData file (``"raw"`` for its `raw.X`), an array of an .npz file, a
        feature type of 10x data (default: Gene Expression) or a genome of a 10x file of version 2.
    genes_by_cells : bool
        The table in the file is genes x cells: transpose it and its names. 10x and loom files are always transposed.
    modality : str, optional
        Which modality of MuData to read. The only one needs no name.
    follow_links : bool
        Whether to read what links inside the file or folder lead to outside of it: external links, external storage
        and virtual datasets of HDF5, and symbolic links in folders. Otherwise they are an error. `path` itself may
        always be a symbolic link.

    Returns
    -------
    Source
        Cells x genes.

    Raises
    ------
    FileNotFoundError
        There is no such file.
    DataError
        The extension is unknown, the layer does not exist, a link leaves the file, or the file is damaged, empty or
        not numeric.
    MissingExtraError
        The format needs a package that is not installed; the message names the extra.
    """
    path = Path(path)
    name = _bundled(path)
    if name is not None:
        if genes_by_cells:
            raise DataError(f"{path}: this bundled data set is cells x genes; drop genes_by_cells=True")
        if layer is not None:
            raise DataError(f"{path}: this bundled data set has no layers; drop layer={layer!r}")
        return bundled.open(name)
    if not path.exists():
        bare = path.name == str(path) and not path.suffix
        raise _missing(path, f"; bundled data sets: {', '.join(bundled.NAMES)}" if bare else "")
    form = format_of(path)
    if form is None:
        folder = path.is_dir()
        known = ", ".join(str(f) for f in FORMATS if not folder or f.is_folder)
        raise DataError(f"{path}: unknown {'folder' if folder else f'extension {path.suffix!r}'}; known: {known}")
    if layer is not None and not form.layer:
        raise DataError(f"{path}: this format has no layers; drop layer={layer!r}")
    if path.is_file():
        with path.open("rb"):  # without permission: the operating system's own error
            pass
    with reading(path):
        others = _others(path, form, modality=modality, follow_links=follow_links)
        source = form.open(path, layer, genes_by_cells, **others)
    log.debug("opened %r", source)
    return source


def _others(path: Path, form: Format, *, modality: str | None, follow_links: bool) -> dict[str, Any]:
    """The further arguments that a format takes. The links of a folder are checked."""
    if modality is not None and "modality" not in form.takes:
        raise DataError(f"{path}: this format has no modalities; drop modality={modality!r}")
    if path.is_dir() and not follow_links:
        check_folder(path)
    given = {"modality": modality, "follow_links": follow_links}
    return {name: given[name] for name in form.takes}


def _bundled(path: Path) -> str | None:
    """The name of the bundled data set at `path`. An existing file wins over a bare name."""
    if path.exists():
        return bundled.name_of(path)
    return str(path) if str(path) in bundled.NAMES else None


def _missing(path: Path, hint: str = "") -> FileNotFoundError:
    error = FileNotFoundError(f"{path}: no such file or folder{hint}")
    error.errno = errno.ENOENT
    return error


def read_obs(
    path: str | os.PathLike[str], column: str, *, modality: str | None = None, follow_links: bool = False
) -> npt.NDArray[Any]:
    """Read a column of `obs` of a data file, such as the sample that each cell comes from.

    Parameters
    ----------
    path : path
        An .h5ad, .h5mu, .loom, .h5, .zarr or .zarr.zip file.
    column : str
    modality, follow_links : str and bool, optional
        As in `open`.

    Returns
    -------
    ndarray of shape (n_rows,)
        Numbers or strings; a categorical gives the values of its categories.

    Raises
    ------
    FileNotFoundError
        There is no such file.
    DataError
        The format has no `obs`, the column does not exist or has a missing value, or the file is damaged.
    MissingExtraError
        The format needs a package that is not installed; the message names the extra.
    """
    path = Path(path)
    name = _bundled(path)
    if name is None and not path.exists():
        raise _missing(path)
    form = None if name is not None else format_of(path)
    if form is None or form.read_obs is None:
        able = ", ".join(f.name for f in FORMATS if f.read_obs)
        raise DataError(f"{path}: this format has no column {column!r} of obs; formats with obs: {able}")
    with reading(path):
        obs = form.read_obs(path, **_others(path, form, modality=modality, follow_links=follow_links))
        return complete(column_of(obs, column, str(path)), f"{path}: column {column!r} of obs")


def as_source(X: Any, *, name: str = "X") -> Source:
    """Return a `Source` over anything that holds a table of numbers.

    Parameters
    ----------
    X : Source, path, array_like, SciPy sparse, pandas or polars frame, or AnnData
        A `Source` is returned as it is; `open` opens a ``str`` or path.
    name : str
        The name of `X` in messages.

    Raises
    ------
    DataError
        It is not two-dimensional, is empty or is not numeric.
    """
    if isinstance(X, Source):
        return X
    if isinstance(X, str | Path):
        return open(X)
    return ArraySource(X, name=name)
