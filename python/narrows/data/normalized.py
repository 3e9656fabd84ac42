"""A `Source` whose rows are normalised as they are read. Nothing is kept."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ..rows.shifted import Shifted
from .checks import warn_collapsed
from .normalize import Normalizer
from .source import Source

__all__ = ["NormalizedSource"]

SHIFT_LIMIT = 256.0
"""Largest shift, in normalised units, that `NormalizedSource.read_stored` leaves to be subtracted later. Up to it the
float32 error of a value is at most 1.5e-5. With a larger shift, rows are read as dense blocks."""


class NormalizedSource(Source):
    """A source whose rows are normalised as they are read.

    ``standard``, and ``minmax`` with a minimum other than zero, turn zeros into other values. For CSR, `read_rows` then
    returns dense blocks, and `read_stored` returns the scaled nonzeros with one shift for all rows.

    Parameters
    ----------
    source : Source
        Gives the names, labels and path. Closing this source closes it too.
    normalizer : Normalizer
        Fitted.
    dtype : dtype
        The network's dtype. Rows of whole numbers and of text are rounded to it, after they are normalised in float64;
        rows of floats keep their own type.
    """

    def __init__(self, source: Source, normalizer: Normalizer, dtype: npt.DTypeLike = np.float32) -> None:
        super().__init__(
            source.shape,
            source.dtype if source.holds_floats else dtype,
            nnz=source.nnz if normalizer.keeps_sparse else None,
            obs_names=source.obs_names,
            var_names=source.var_names,
            labels=source.labels,
            obs=source.obs,
            path=source.path,
            name=source.name,
        )
        self.roles, self.image_shape = source.roles, source.image_shape
        self.source = source
        self.normalizer = normalizer
        self._looked = False  # for values that become equal in float32
        shift = normalizer.shift if source.is_sparse else None
        if shift is not None and np.abs(shift).max() <= SHIFT_LIMIT:
            self.shift, self.n_stored = shift, source.nnz

    def read_stored(self, rows: Any) -> Any:
        if self.shift is None:
            return self.read_rows(rows)
        stored = self.normalizer.scale(self.source.read_rows(rows), self.dtype)
        self.source.release()
        return Shifted(stored, self.shift)

    def describe(self, choose: str = "kind=NAME") -> str:
        """One line for a log: which normalisation, why, how to choose another, and how CSR is treated."""
        return self.normalizer.describe(choose) + ("; CSR stays CSR, with one shift" if self.shift is not None else "")

    def _slice(self, start: int, stop: int) -> Any:
        return self._normalize(self.source.read_rows(slice(start, stop)), np.arange(start, stop))

    def _take(self, index: np.ndarray) -> Any:
        return self._normalize(self.source.read_rows(index), index)

    def _normalize(self, block: Any, rows: np.ndarray) -> Any:
        if not self._looked and self.normalizer.resolved_ == "none" and self.dtype == np.float32:
            self._looked = True
            warn_collapsed(block, self.var_names, self.name)
        out = self.normalizer.normalize_block(block, rows, self.source, self.dtype)
        self.release()
        return out

    def sha256(self) -> str:
        """The digest of the data before normalisation."""
        return self.source.sha256()

    def release(self) -> None:
        self.source.release()

    def close(self) -> None:
        super().close()
        self.source.close()
