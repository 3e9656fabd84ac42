"""A file format as one record, and what the readers of all formats share.

Any error of a parser on damaged bytes becomes one line that names the file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from ..errors import DataError, NarrowsError
from .columns import listed
from .source import ArraySource, Source


@dataclass(frozen=True)
class Format:
    """One kind of file or folder that `narrows.data.open` reads; help texts and error messages list these records.

    Attributes
    ----------
    name : str
        The suffix or, for a folder, a short name.
    open : callable
        ``open(path, layer, genes_by_cells)`` returns a `Source`.
    suffixes : tuple of str
        Suffixes of its files, in lower case and without ``.gz``; none for folders.
    compressed : bool
        Whether its files may be compressed and end in ``.gz``, ``.bz2``, ``.xz`` or ``.zst``.
    is_folder : callable, optional
        Whether a folder is of this format.
    contents : str
        What is inside, where the name alone does not say it.
    layer : str
        What the argument `layer` chooses; empty if there is only one matrix.
    read_obs : callable, optional
        ``read_obs(path)`` returns the columns of `obs` by name.
    takes : tuple of str
        Further arguments of `narrows.data.open` that `open` and `read_obs` take as keywords.
    """

    name: str
    open: Callable[..., Source]
    suffixes: tuple[str, ...] = ()
    compressed: bool = False
    is_folder: Callable[[Path], bool] | None = None
    contents: str = ""
    layer: str = ""
    read_obs: Callable[..., Mapping[str, Any]] | None = None
    takes: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.name}{'[.gz]' if self.compressed else ''}{f' ({self.contents})' if self.contents else ''}"


@contextmanager
def reading(path: Path, what: str = "") -> Iterator[None]:
    """Turn any error of a parser into one line that names the file and, if it is not ours, the part that was read."""
    place = f"{path}, {what}" if what else str(path)
    try:
        yield
    except DataError as error:
        if str(path) in str(error):
            raise
        raise DataError(f"{place}: {error}") from error
    except (NarrowsError, PermissionError):
        raise
    except MemoryError as error:
        raise MemoryError(f"{place}: not enough memory to read it") from error
    except Exception as error:  # parsers of other projects raise almost anything on damaged bytes
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{place}: damaged, or not in the format of its extension ({reason[:300]})") from error


def no_such_layer(path: Path, layer: str | None, existing: list[str], what: str = "layer") -> NoReturn:
    raise DataError(f"{path}: no {what} {layer!r}; the file has {listed(layer, existing)}")


def in_memory(
    path: Path,
    matrix: Any,
    genes_by_cells: bool,
    row_names: npt.ArrayLike | None = None,
    column_names: npt.ArrayLike | None = None,
    labels: npt.ArrayLike | None = None,
    holds_floats: bool | None = None,
    **others: Any,
) -> ArraySource:
    """A source over a matrix in memory, transposed with its names if the file is genes x cells.

    `holds_floats` says what the file holds, if the dtype of the matrix does not. `others` are arguments of
    `ArraySource` about the rows of the result.
    """
    if genes_by_cells:
        matrix, row_names, column_names = matrix.T, column_names, row_names
        if isinstance(matrix, np.ndarray) and not isinstance(matrix, np.memmap):
            matrix = np.ascontiguousarray(matrix)
    return ArraySource(
        matrix,
        obs_names=row_names,
        var_names=column_names,
        labels=labels,
        path=path,
        holds_floats=holds_floats,
        **others,
    )
