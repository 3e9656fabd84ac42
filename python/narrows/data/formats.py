"""What the readers of all formats share: their errors, and the way a matrix in memory becomes a source.

Promises: whatever a parser raises on damaged bytes comes out as one line that names the file.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from ..errors import DataError, NarrowsError
from .source import ArraySource


@contextmanager
def reading(path: Path, what: str = "") -> Iterator[None]:
    """Turn what libraries raise for damaged files into one line that names the file."""
    place = f"{path}, {what}" if what else str(path)
    try:
        yield
    except (NarrowsError, PermissionError):
        raise
    except MemoryError as error:
        raise MemoryError(f"{place}: not enough memory to read it") from error
    except Exception as error:  # parsers of other projects raise about anything on damaged bytes
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{place}: damaged or not readable as this format ({reason[:300]})") from error


def no_layers(name: object, layer: str | None) -> None:
    """Raise if a layer is asked of a format that has none."""
    if layer is not None:
        raise DataError(f"{name}: this format has no layers; drop layer={layer!r}")


def no_such_layer(path: Path, layer: str | None, existing: list[str], what: str = "layer") -> NoReturn:
    raise DataError(f"{path}: no {what} {layer!r}; there is {', '.join(map(repr, existing)) or 'none'}")


def held(
    path: Path,
    matrix: Any,
    genes_by_cells: bool,
    row_names: npt.ArrayLike | None = None,
    column_names: npt.ArrayLike | None = None,
    labels: npt.ArrayLike | None = None,
) -> ArraySource:
    """A source over a matrix in memory, turned round if it is genes x cells. Names are those of the file."""
    if genes_by_cells:
        matrix, row_names, column_names = matrix.T, column_names, row_names
        if isinstance(matrix, np.ndarray) and not isinstance(matrix, np.memmap):
            matrix = np.ascontiguousarray(matrix)
    return ArraySource(matrix, obs_names=row_names, var_names=column_names, labels=labels, path=path)
