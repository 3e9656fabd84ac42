"""Opening any data file by its name.

- HDF5, zarr, npy and folders of CSR parts are read block by block from disk; other formats are parsed once.
- Nothing is unpickled.
- A file that is missing, unknown, damaged or empty is an error of one line that names it.
"""

from __future__ import annotations

import errno
import logging
import operator
import os
import stat
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy.typing as npt

from ..errors import DataError
from . import bundled, hdf, isolated, mtx, npy, parquet, text
from .columns import column_of, complete
from .formats import Format, reading
from .source import ArraySource, Source
from .textfile import COMPRESSED
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
    plain = name.removesuffix(next((suffix for suffix in COMPRESSED if name.endswith(suffix)), ""))
    return next((f for f in FORMATS if plain.endswith(f.suffixes) and (f.compressed or plain == name)), None)


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
    header: bool | None = None,
    index_column: str | int | None = None,
    drop_columns: Sequence[str | int] | None = None,
    roles: Mapping[str, Any] | None = None,
    untrusted: bool = False,
) -> Source:
    """Open a data set.

    Parameters
    ----------
    path : path
        A file: .h5ad, .h5mu, .loom, .h5 (10x or AnnData), .zarr.zip, .mtx, .npy, .npz, .csv, .tsv, .tab, .txt or
        .parquet; .mtx and tables of text may be compressed (.gz, .bz2, .xz, .zst). Or a folder: a .zarr store, a 10x
        folder (matrix.mtx, features.tsv, barcodes.tsv, perhaps with a prefix such as ``GSM123_``), a folder of CSR
        parts (data.npy, indices.npy, indptr.npy, shape.npy), or a folder of the parts of a .parquet table. Or the name
        of a bundled data set, such as ``"pbmc4k"``, if no file has that name.
    layer : str, optional
        Which matrix to read: a layer of an AnnData file (``"raw"`` for its `raw.X`), an array of an .npz file, a
        feature type of 10x data (default: Gene Expression), a genome of a 10x file of version 2, or a sample of a
        folder with several 10x matrices.
    genes_by_cells : bool
        The table in the file is genes x cells: transpose it and its names. 10x and loom files are always transposed.
    modality : str, optional
        Which modality of MuData to read. The only one needs no name.
    follow_links : bool
        Whether to read what links inside the file or folder lead to outside of it: external links, external storage
        and virtual datasets of HDF5, and symbolic links in folders. Otherwise they are an error. `path` itself may
        always be a symbolic link.
    header : bool, optional
        Text only: whether the first line is a header. By default the first lines decide.
    index_column : str or int, optional
        Text and .parquet: name, or number from 0, of the column with the row names; False if none has them. By default
        the column without a header, the index that pandas stored, or a first column of text.
    drop_columns : sequence of str or int, optional
        Text and .parquet: columns to leave out, by name or by number from 0.
    roles : mapping, optional
        `Source.roles` of an earlier table: what was row names, header and text there is so here. Columns that this
        table lacks are ignored. The three parameters above come first.
    untrusted : bool
        Whether to read the file in a child process with a time limit, because the C library of its format may hang or
        crash on an altered file. That costs a copy of each block.

    Returns
    -------
    Source
        Cells x genes. Columns of text beside the numbers are in `Source.obs`, and `Source.roles` says what was what.

    Raises
    ------
    FileNotFoundError
        There is no such file.
    DataError
        The extension is unknown, the layer does not exist, a link leaves the file, or the file is damaged, empty or
        not numeric.
    MissingExtraError
        The format needs a package that is not installed; the message names the extra.

    Examples
    --------
    >>> import numpy as np
    >>> import narrows
    >>> np.save("table.npy", np.ones((10, 4), np.float32))
    >>> with narrows.data.open("table.npy") as source:
    ...     source.shape
    (10, 4)
    """
    path = Path(path)
    if isinstance(drop_columns, str):
        raise TypeError(f"drop_columns={drop_columns!r} must be a sequence of names or numbers")
    given: dict[str, Any] = {
        "header": header,
        "index_column": _column("index_column", index_column),
        "drop_columns": None if drop_columns is None else [_column("drop_columns", each) for each in drop_columns],
    }
    name = _bundled(path)
    if name is not None:
        _check_taken(path, given, ())
        if genes_by_cells:
            raise DataError(f"{path}: this bundled data set is cells x genes; drop genes_by_cells=True")
        if layer is not None:
            raise DataError(f"{path}: this bundled data set has no layers; drop layer={layer!r}")
        return bundled.open(name)
    if not path.exists():
        bare = path.name == str(path) and not path.suffix
        raise _missing(path, f"; bundled data sets: {', '.join(bundled.NAMES)}" if bare else "")
    _check_regular(path)
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
        given |= {"modality": modality, "follow_links": follow_links, "roles": roles and dict(roles)}
        others = _others(path, form, given)
        if untrusted:
            asked = {name: value for name, value in given.items() if value is not None}
            source: Source = isolated.IsolatedSource(path, layer=layer, genes_by_cells=genes_by_cells, **asked)
        else:
            source = form.open(path, layer, genes_by_cells, **others)
    log.debug("opened %r", source)
    return source


def _others(path: Path, form: Format, given: Mapping[str, Any]) -> dict[str, Any]:
    """The further arguments that a format takes. The files and links of a folder are checked."""
    if given["modality"] is not None and "modality" not in form.takes:
        raise DataError(f"{path}: this format has no modalities; drop modality={given['modality']!r}")
    _check_taken(path, {name: given.get(name) for name in ("header", "index_column", "drop_columns")}, form.takes)
    for folder, _, names in os.walk(path):  # nothing if the path is a file
        for name in names:
            with suppress(OSError):  # a broken link: it matters only if the file is needed
                _check_regular(Path(folder, name))
    if path.is_dir() and not given["follow_links"]:
        check_folder(path)
    return {name: given.get(name) for name in form.takes}


def _check_taken(path: Path, given: Mapping[str, Any], takes: Sequence[str]) -> None:
    """Refuse what is said about the columns of a file that has none."""
    for name, value in given.items():
        if value is None:
            continue
        if name not in takes:
            able = ", ".join(f.name for f in FORMATS if name in f.takes)
            raise DataError(f"{path}: {name}={value!r} is for tables ({able}); leave it out")


def _column(what: str, given: Any) -> str | int | None:
    """The name or the number of a column; None and False as they are."""
    if given is None or given is False or isinstance(given, str):
        return given
    if given is True or not hasattr(given, "__index__"):
        raise TypeError(f"{what}: {given!r} is not the name or the number of a column")
    return operator.index(given)


def _check_regular(path: Path) -> None:
    """Refuse pipes and devices: they would block, and data are read more than once."""
    mode = path.stat().st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        kind = "a pipe" if stat.S_ISFIFO(mode) else "a device or socket"
        raise DataError(f"{path}: {kind}, not a file; data are read more than once: write them to a file first")


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
    path: str | os.PathLike[str],
    column: str,
    *,
    modality: str | None = None,
    follow_links: bool = False,
    untrusted: bool = False,
) -> npt.NDArray[Any]:
    """Read a column of `obs` of a data file, such as the sample that each cell comes from.

    Parameters
    ----------
    path : path
        An .h5ad, .h5mu, .loom, .h5, .zarr or .zarr.zip file, or a table: its columns of text.
    column : str
    modality, follow_links, untrusted : str, bool and bool, optional
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

    Examples
    --------
    >>> import numpy as np
    >>> import anndata
    >>> from narrows.data import read_obs
    >>> adata = anndata.AnnData(np.ones((2, 3), np.float32), obs={"sample": ["a", "b"]})
    >>> adata.write_h5ad("cells.h5ad")
    >>> read_obs("cells.h5ad", "sample").tolist()
    ['a', 'b']
    """
    path = Path(path)
    name = _bundled(path)
    if name is None and not path.exists():
        raise _missing(path)
    if name is None:
        _check_regular(path)
    form = None if name is not None else format_of(path)
    if form is None or form.read_obs is None:
        able = ", ".join(f.name for f in FORMATS if f.read_obs)
        raise DataError(f"{path}: this format has no column {column!r} of obs; formats with obs: {able}")
    with reading(path):
        asked: dict[str, Any] = {"modality": modality, "follow_links": follow_links}
        if untrusted:
            found = isolated.read_column(path, column, **asked)
        else:
            found = column_of(columns_of(path, form, **asked), column, str(path))
        return complete(found, f"{path}: column {column!r} of obs")


def columns_of(path: Path, form: Format, **given: Any) -> Mapping[str, Any]:
    """The columns of `obs` of a file of a format that has them."""
    assert form.read_obs is not None
    return form.read_obs(path, **_others(path, form, given))


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

    Examples
    --------
    >>> import numpy as np
    >>> from narrows.data import as_source
    >>> as_source(np.eye(3)).shape
    (3, 3)
    """
    if isinstance(X, Source):
        return X
    if isinstance(X, str | Path):
        return open(X)
    return ArraySource(X, name=name)
