"""Opening data files by their name: the one door to every format.

Promises: HDF5, zarr, npy and folders of CSR parts are read block by block from disk, the other formats are parsed once;
nothing is unpickled; a file that is missing, unknown, damaged or empty is an error of one line that names it.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy.typing as npt

from ..errors import DataError
from . import bundled
from .formats import no_layers, reading
from .hdf import obs_of_hdf5, obs_of_zarr, open_hdf5, open_zarr
from .mtx import find_mtx, open_10x_folder, open_mtx
from .npy import is_csr_folder, open_csr_folder, open_npy, open_npz
from .parquet import open_parquet
from .source import ArraySource, Source
from .text import open_table

__all__ = ["as_source", "open", "read_obs"]

log = logging.getLogger("narrows")

_FORMATS = (
    ".h5ad",
    ".zarr",
    ".h5 (10x or AnnData)",
    "10x folder (matrix.mtx, features.tsv, barcodes.tsv)",
    "folder of CSR parts (data.npy, indices.npy, indptr.npy, shape.npy)",
    ".mtx[.gz]",
    ".npy",
    ".npz",
    ".csv[.gz]",
    ".tsv[.gz]",
    ".parquet",
)

Reader = Callable[[Path, str | None, bool], Source]
"""Takes the path, the layer and whether the table is genes x cells."""

_READERS: Mapping[str, Reader] = {
    ".h5ad": open_hdf5,
    ".h5": open_hdf5,
    ".hdf5": open_hdf5,
    ".mtx": open_mtx,
    ".npy": open_npy,
    ".npz": open_npz,
    ".csv": open_table,
    ".tsv": open_table,
    ".parquet": open_parquet,
}
_TEXT = (".mtx", ".csv", ".tsv")
"""Extensions of files that may be gzipped."""


def open(path: str | os.PathLike[str], *, layer: str | None = None, genes_by_cells: bool = False) -> Source:
    """Open a data set.

    Parameters
    ----------
    path : path
        One of .h5ad, .zarr, .h5 (10x or AnnData), a 10x folder with matrix.mtx, a folder of the parts of a CSR matrix
        (data.npy, indices.npy, indptr.npy, shape.npy), .mtx, .npy, .npz, .csv, .tsv, .parquet, where .mtx, .csv and
        .tsv may be gzipped (.gz); or, where no file has that name, the bare name of a bundled data set such as
        ``"pbmc4k"``.
    layer : str, optional
        Which matrix to read: a layer of an AnnData file (or ``"raw"`` for its `raw.X`), an array of an .npz
        file, a feature type of 10x data (default: Gene Expression) or a genome of a 10x file of version 2.
    genes_by_cells : bool
        The table in the file is genes x cells; it is turned round, names included. 10x files, which are known
        to be that way, are turned round in any case.

    Returns
    -------
    Source
        Cells x genes.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    DataError
        If the extension is unknown, the layer does not exist, or the file is damaged, empty or not numeric.
    MissingExtraError
        If the format needs a package that is not installed; the message names the extra.
    """
    path = Path(path)
    if not path.exists():
        if str(path) in bundled.NAMES:
            return _without_layer(bundled.open(str(path)), layer, genes_by_cells)
        bare = path.name == str(path) and not path.suffix
        hint = f"; bundled data sets: {', '.join(bundled.NAMES)}" if bare else ""
        missing = FileNotFoundError(f"{path}: no such file or folder{hint}")
        missing.errno = errno.ENOENT
        raise missing
    if (name := bundled.name_of(path)) is not None:
        return _without_layer(bundled.open(name), layer, genes_by_cells)
    suffix = path.name.removesuffix(".gz").lower()
    suffix = suffix[suffix.rfind(".") :] if "." in suffix else ""
    zipped = path.name.endswith(".gz")
    reader: Reader
    if path.is_dir():
        if _is_zarr(path):
            reader = open_zarr
        elif find_mtx(path) is not None:
            reader = open_10x_folder
        elif is_csr_folder(path):
            reader = open_csr_folder
        else:
            raise DataError(f"{path}: a folder without matrix.mtx[.gz] or indptr.npy that is not a zarr store either")
    else:
        with path.open("rb"):  # no permission: the operating system's own error
            pass
        if suffix not in (_TEXT if zipped else _READERS):
            raise DataError(f"{path}: unknown extension {path.suffix!r}; known: {', '.join(_FORMATS)}")
        reader = _READERS[suffix]
    with reading(path):
        source = reader(path, layer, genes_by_cells)
    log.debug("opened %r", source)
    return source


def _is_zarr(path: Path) -> bool:
    marked = path.suffix.lower() == ".zarr" or any((path / mark).exists() for mark in (".zgroup", "zarr.json"))
    return marked and path.is_dir()


def _without_layer(source: Source, layer: str | None, genes_by_cells: bool) -> Source:
    if genes_by_cells:
        raise DataError(f"{source.name}: this bundled data set is cells x genes; drop genes_by_cells")
    no_layers(source.name, layer)
    return source


def read_obs(path: str | os.PathLike[str], column: str) -> npt.NDArray[Any]:
    """Read what an AnnData file knows of its rows: a column of its `obs`, such as the sample a cell is of.

    Parameters
    ----------
    path : path
        An .h5ad or .zarr file.
    column : str

    Returns
    -------
    ndarray of shape (n_rows,)
        Strings, those of a categorical included, or numbers.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    DataError
        If the format has no `obs`, the column does not exist or is not known for a row, or the file is damaged.
    MissingExtraError
        If the format needs a package that is not installed; the message names the extra.
    """
    path = Path(path)
    if not path.exists() and str(path) not in bundled.NAMES:
        missing = FileNotFoundError(f"{path}: no such file or folder")
        missing.errno = errno.ENOENT
        raise missing
    store = _is_zarr(path)
    if not store and path.suffix not in (".h5ad", ".h5", ".hdf5"):
        raise DataError(f"{path}: this format has no column {column!r} of obs; .h5ad and .zarr have")
    with reading(path):
        return obs_of_zarr(path, column) if store else obs_of_hdf5(path, column)


def as_source(X: Any, *, name: str = "X") -> Source:
    """Return a `Source` over anything that holds a table of numbers.

    Parameters
    ----------
    X : Source, path, array_like, SciPy sparse, pandas or polars frame, or AnnData
        A `Source` is returned as it is; a ``str`` or path is opened with `open`.
    name : str
        What messages call it.

    Raises
    ------
    DataError
        If it is not two-dimensional, is empty or is not numeric.
    """
    if isinstance(X, Source):
        return X
    if isinstance(X, str | Path):
        return open(X)
    return ArraySource(X, name=name)
