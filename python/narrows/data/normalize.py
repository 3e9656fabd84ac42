"""Scaling of the input, learned once from a source and kept with the model.

- A `Normalizer` is fitted in one pass over row blocks whose borders depend on the shape alone, with float64
  accumulators: the same data gives the same bits whatever the memory limit or the thread count.
- A row's result depends on that row and the fitted state only, so any split into blocks gives the same bits.
- CSR stays CSR under ``log1p``, ``none`` and a ``minmax`` whose minima are all zero. ``standard`` and any other
  ``minmax`` move zeros: they return dense blocks where rows are asked for, and `NormalizedSource.read_stored` the
  scaled nonzeros with one shift for all rows, which training and encoding take as it is (within `SHIFT_LIMIT`).
  Nothing here ever densifies more than one block.
- Pages of a memory-mapped file are given back once read: memory is bounded by the block, not by the file.
- The state is plain JSON. It never writes to its input.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from typing import Any

import numpy as np
import scipy.sparse as sp
from sklearn.base import BaseEstimator, OneToOneFeatureMixin, TransformerMixin
from sklearn.utils.validation import check_is_fitted, validate_data

from ..errors import DataError
from ..rows.shifted import Shifted
from . import ArraySource, Source, check_counts, check_finite
from .source import check_unmasked

__all__ = ["KINDS", "NormalizedSource", "Normalizer", "row_blocks"]

KINDS = ("auto", "log1p", "standard", "minmax", "none")
COUNT_LOSSES = ("multinomial", "poisson", "nb", "zinb")

#: Bytes of one dense float32 block of the fitting pass; fixed, so that sums are always cut at the same rows.
_SCAN_BYTES = 1 << 24

SHIFT_LIMIT = 256.0
"""Largest shift, on the scale of normalised features, that is left to be taken from what is stored: in float32 a value
is then off by 1.5e-5 at most. With a larger one rows are read densely."""


def row_blocks(n_rows: int, n_features: int, block_bytes: int = _SCAN_BYTES) -> Iterator[slice]:
    """Cut `n_rows` into slices of at most `block_bytes` as dense float32 (one row at least)."""
    step = max(1, block_bytes // (4 * max(1, n_features)))
    for start in range(0, n_rows, step):
        yield slice(start, min(start + step, n_rows))


class _Scan:
    """Statistics of one pass: totals of rows, moments and extremes of columns, whether values are counts."""

    def __init__(self, n_rows: int, n_features: int, *, moments: bool, extremes: bool) -> None:
        self.n_rows = 0
        self.totals = np.zeros(n_rows)
        self.counts = True  # every value so far is a non-negative integer
        self.mean = np.zeros(n_features) if moments else None
        self.m2 = np.zeros(n_features)
        self.low = np.full(n_features, np.inf) if extremes else None
        self.high = np.full(n_features, -np.inf)

    def add(self, block: Any, start: int) -> None:
        n = block.shape[0]
        values = block.data if sp.issparse(block) else block
        self.counts = self.counts and bool(values.size == 0 or (values.min() >= 0 and _integral(values)))
        self.totals[start : start + n] = _row_totals(block)
        if self.mean is not None:
            mean, m2 = _moments(block)
            # Chan, Golub and LeVeque (1979): merge two sets of centred sums without cancellation.
            delta = mean - self.mean
            total = self.n_rows + n
            self.m2 += m2 + delta**2 * (self.n_rows * n / total)
            self.mean += delta * (n / total)
        if self.low is not None:
            low, high = block.min(axis=0), block.max(axis=0)
            if sp.issparse(block):
                low, high = low.toarray().ravel(), high.toarray().ravel()
            np.minimum(self.low, low, out=self.low)
            np.maximum(self.high, high, out=self.high)
        self.n_rows += n


def _integral(values: np.ndarray) -> bool:
    return values.dtype.kind in "iub" or bool(np.array_equal(values, np.floor(values)))


def _row_totals(block: Any) -> np.ndarray:
    if sp.issparse(block):
        return np.asarray(block @ np.ones(block.shape[1]))
    return np.asarray(np.ascontiguousarray(block).sum(axis=1, dtype=np.float64))


def _moments(block: Any) -> tuple[np.ndarray, np.ndarray]:
    """Column means and centred sums of squares of one block, float64; implicit zeros count as values."""
    n, n_features = block.shape
    if not sp.issparse(block):
        dense = block.astype(np.float64)
        mean = dense.mean(axis=0)
        dense -= mean
        return mean, np.einsum("ij,ij->j", dense, dense)
    values = block.data.astype(np.float64)
    mean = np.bincount(block.indices, weights=values, minlength=n_features) / n
    stored = np.bincount(block.indices, minlength=n_features)
    m2 = np.bincount(block.indices, weights=(values - mean[block.indices]) ** 2, minlength=n_features)
    return mean, m2 + (n - stored) * mean**2


def _canonical(block: Any) -> Any:
    """The CSR block with sorted, unique indices (a copy if it was not so), or the dense block itself."""
    if sp.issparse(block) and not block.has_canonical_format:
        block = block.copy()
        block.sum_duplicates()
    return block


class Normalizer(OneToOneFeatureMixin, TransformerMixin, BaseEstimator):  # type: ignore[misc]
    """A scaling of rows or columns that is learned from data, can be undone, and is stored in a model file.

    It goes before an autoencoder in a scikit-learn pipeline, and learns from a source without loading it; the command
    line uses it, too.

    Parameters
    ----------
    kind : {"auto", "log1p", "standard", "minmax", "none"}, default="auto"
        ``log1p``: each row is scaled to the sum `target_sum`, then log(1 + x): the usual preparation of
        counts. ``standard``: each feature to mean 0 and variance 1. ``minmax``: each feature to 0..1.
        ``auto``: for a count loss ``none``; for ``bce`` ``none`` if every value lies in 0..1, else
        ``minmax``; otherwise ``log1p`` if every value is a non-negative integer, else ``standard``.
    loss : str
        The loss the data is meant for; it decides ``auto`` only.
    target_sum : float, optional
        For ``log1p``; default: the median of the row totals that are not zero.

    Attributes
    ----------
    target_sum_ : float or None
        What rows are scaled to under ``log1p``.
    resolved_ : str
        The kind that ``auto`` came to; `kind` otherwise.
    reason_ : str
        One clause that says why.
    n_features_, n_features_in_ : int
    feature_names_in_ : ndarray of str
        Where a frame was learned from: another is then taken with these columns alone, in this order.
    n_empty_rows_ : int or None
        Rows that sum to zero (None where no pass was needed). They stay zero under ``log1p``.
    n_empty_features_ : int or None
        Features that sum to zero, of counts that are taken as they are (None otherwise).
    n_constant_features_ : int or None
        Features of zero spread under ``standard`` and ``minmax``: shifted, not scaled.
    """

    def __init__(self, kind: str = "auto", *, loss: str = "mse", target_sum: float | None = None) -> None:
        self.kind = kind
        self.loss = loss
        self.target_sum = target_sum

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = True
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags

    def _check(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"normalize must be one of {', '.join(KINDS)}, got {self.kind!r}")
        if self.target_sum is not None and not 0 < self.target_sum < np.inf:
            raise ValueError(f"target_sum must be positive and finite, got {self.target_sum!r}")

    def _start(self, n_features: int) -> None:
        self.n_features_ = self.n_features_in_ = n_features
        self.target_sum_ = self.target_sum
        self.n_empty_rows_: int | None = None
        self.n_empty_features_: int | None = None
        self.n_constant_features_: int | None = None
        self._shift = np.zeros(0)
        self._scale = np.zeros(0)

    def fit(self, X: Any, y: Any = None) -> Normalizer:
        """Learn the scaling from every row.

        Parameters
        ----------
        X : Source, array, SciPy sparse matrix or data frame of shape (n_samples, n_features)
        y : None
            Ignored.

        Raises
        ------
        ValueError
            Unknown `kind`, or a `target_sum` that is not positive.
        DataError
            A value is NaN or infinite, or negative where ``log1p`` was asked for; row and column are named.
        """
        self._check()
        source = self._read(X, reset=True)
        n_rows, n_features = source.shape
        self._start(n_features)
        auto, loss = self.kind == "auto", self.loss
        if self.kind == "none" or (auto and loss in COUNT_LOSSES):
            counted = loss in COUNT_LOSSES
            filled = np.zeros(n_features, bool)
            n_empty = 0
            for rows in row_blocks(n_rows, n_features):
                block = source.read_rows(rows)
                (check_counts if counted else check_finite)(block, rows.start, source)
                if counted:
                    n_empty += int(np.count_nonzero(_row_totals(block) == 0))
                    filled |= np.asarray(block.sum(axis=0)).ravel() > 0
                _release(source)
            if counted:
                self.n_empty_rows_, self.n_empty_features_ = n_empty, n_features - int(np.count_nonzero(filled))
            self._resolve("none", f"the {loss} loss takes counts as they are" if auto else "as asked")
            return self
        moments = self.kind == "standard" or (auto and loss != "bce")
        extremes = self.kind == "minmax" or (auto and loss == "bce")
        scan = _Scan(n_rows, n_features, moments=moments, extremes=extremes)
        for rows in row_blocks(n_rows, n_features):
            block = _canonical(source.read_rows(rows))
            check_finite(block, rows.start, source)
            if self.kind == "log1p":
                _refuse_negative(block, np.arange(rows.start, rows.stop), source)
            scan.add(block, rows.start)
            _release(source)
        self.n_empty_rows_ = int(np.count_nonzero(scan.totals == 0))
        if not auto:
            self._resolve(self.kind, "as asked")
        elif loss == "bce":
            inside = bool(scan.low is not None and scan.low.min() >= 0 and scan.high.max() <= 1)
            if inside:
                self._resolve("none", "values lie in 0..1")
            else:
                self._resolve("minmax", "bce needs values in 0..1")
        elif scan.counts:
            self._resolve("log1p", "every value is a non-negative integer: counts")
        else:
            self._resolve("standard", "values are not counts")
        if self.resolved_ == "log1p" and self.target_sum_ is None:
            filled = scan.totals[scan.totals > 0]
            self.target_sum_ = float(np.median(filled)) if filled.size else 1.0
        elif self.resolved_ == "standard" and scan.mean is not None:
            # A spread below what rounding of the mean alone produces is no spread (scikit-learn's rule).
            variance = scan.m2 / n_rows
            u = n_rows * np.finfo(np.float64).eps
            noise = u * variance + (u * scan.mean) ** 2
            self._set_columns(scan.mean, np.where(variance > noise, np.sqrt(variance), 0.0))
        elif self.resolved_ == "minmax" and scan.low is not None:
            self._set_columns(scan.low, scan.high - scan.low)
        return self

    def _resolve(self, kind: str, reason: str) -> None:
        self.resolved_, self.reason_ = kind, reason

    def _set_columns(self, shift: np.ndarray, spread: np.ndarray) -> None:
        constant = spread == 0
        self.n_constant_features_ = int(np.count_nonzero(constant))
        self._shift = shift
        self._scale = np.where(constant, 1.0, spread)

    @property
    def keeps_sparse(self) -> bool:
        """Whether a CSR block stays CSR."""
        return self.resolved_ in ("none", "log1p") or (self.resolved_ == "minmax" and not self._shift.any())

    @property
    def shift(self) -> np.ndarray | None:
        """What is taken from the scaled rows, float64 of shape (n_features,); None if zeros stay."""
        return None if self.keeps_sparse else np.asarray(self._shift / self._scale)

    def transform(self, block: Any, *, rows: np.ndarray | None = None, source: Source | None = None) -> Any:
        """Normalise a block of rows.

        Parameters
        ----------
        block : array, SciPy sparse matrix or data frame of shape (n, n_features)
        rows : ndarray of shape (n,), optional
            Row numbers in the data, for the error message only.
        source : Source, optional
            Where the block came from, for the error message only.

        Returns
        -------
        ndarray or CSR of shape (n, n_features)
            float64 for float64 input, float32 otherwise.

        Raises
        ------
        ValueError
            Another width or other names than those of `fit`.
        DataError
            No table of numbers, or a negative value under ``log1p``.
        """
        check_is_fitted(self, "resolved_")
        given = self._read(block, reset=False)
        found = given.read_rows(slice(None))
        check_finite(found, 0, given)
        return self._normalized(found, rows, source)

    def _read(self, X: Any, *, reset: bool) -> Source:
        """X as a source, checked as scikit-learn checks what it is given; names and width are learned if `reset`."""
        if isinstance(X, Source):
            if reset:
                self.__dict__.pop("feature_names_in_", None)
            return X
        check_unmasked(X)
        of_cells = hasattr(X, "obs_names")  # AnnData, which only a source reads
        X = validate_data(
            self,
            X,
            reset=reset,
            skip_check_array=of_cells,
            **({} if of_cells else {"accept_sparse": "csr", "dtype": "numeric", "ensure_all_finite": False}),
        )
        return ArraySource(X, var_names=getattr(self, "feature_names_in_", None))

    def _normalized(self, block: Any, rows: np.ndarray | None, source: Source | None) -> Any:
        """`transform` of an array or CSR, whose columns are known to be the right ones, whatever `set_output` says."""
        self._check_width(block.shape[1])
        dtype = block.dtype if block.dtype in (np.float32, np.float64) else np.dtype(np.float32)
        if self.resolved_ == "none":
            return block.astype(dtype, copy=False)
        n = block.shape[0]
        numbers = np.arange(n) if rows is None else rows
        block = _canonical(block)
        sparse = sp.issparse(block)
        if sparse and self.keeps_sparse:
            return self._scaled(block, numbers, source)
        # Arithmetic is float64; going by parts keeps its temporaries small whatever the size of the block.
        out = np.empty(block.shape, dtype)
        for part in row_blocks(n, block.shape[1]):
            piece = block[part]
            if self.resolved_ == "log1p":
                _refuse_negative(piece, numbers[part], source)
                out[part] = np.log1p(np.multiply(piece, self._factors(piece)[:, None], order="C"))
            else:
                dense = piece.toarray() if sparse else piece
                out[part] = np.subtract(dense, self._shift, order="C") / self._scale
        return out

    def scale(self, block: Any) -> Any:
        """A CSR block with its nonzeros scaled: `transform` of it, but for the `shift` if there is one."""
        self._check_width(block.shape[1])
        return self._scaled(_canonical(block), np.arange(block.shape[0]), None)

    def _scaled(self, block: Any, numbers: np.ndarray, source: Source | None) -> Any:
        """A canonical CSR block with its nonzeros normalised; by parts, as in `transform`."""
        dtype = block.dtype if block.dtype == np.float64 else np.dtype(np.float32)
        out = np.empty(block.nnz, dtype)
        for part in row_blocks(*block.shape):
            piece = block[part]
            if self.resolved_ == "log1p":
                _refuse_negative(piece, numbers[part], source)
            out[block.indptr[part.start] : block.indptr[part.stop]] = self._scaled_values(piece)
        return sp.csr_array((out, block.indices, block.indptr), shape=block.shape)

    def _factors(self, block: Any) -> np.ndarray:
        """What each row is multiplied with to sum to `target_sum`; 0 for an empty row."""
        totals = _row_totals(block)
        target = float(self.target_sum_ or 0.0)
        factors: np.ndarray = np.divide(target, totals, out=np.zeros_like(totals), where=totals > 0)
        return factors

    def _scaled_values(self, block: Any) -> np.ndarray:
        """The stored values of a canonical CSR block, normalised, float64."""
        if self.resolved_ == "log1p":
            return np.asarray(np.log1p(block.data * np.repeat(self._factors(block), np.diff(block.indptr))))
        return np.asarray(block.data / self._scale[block.indices])

    def inverse_transform(self, block: Any) -> Any:
        """Undo `transform` on dense rows, e.g. on reconstructions.

        ``standard`` and ``minmax`` come back on the original scale. ``log1p`` gives ``exp(x) - 1``: values
        scaled to `target_sum` per row, since the row's own total is not known.

        Parameters
        ----------
        block : array or data frame of shape (n, n_features)

        Returns
        -------
        ndarray of shape (n, n_features)
            Of the block's dtype if that is float32 or float64.
        """
        check_is_fitted(self, "resolved_")
        if type(block) is not np.ndarray or block.ndim != 2:
            block = ArraySource(block).read_rows(slice(None))
        self._check_width(block.shape[1])
        if self.resolved_ == "none":
            return block
        if self.resolved_ == "log1p":
            return np.expm1(block)
        return (block * self._scale + self._shift).astype(block.dtype, copy=False)

    def _check_width(self, width: int) -> None:
        check_is_fitted(self, "resolved_")
        if width != self.n_features_:
            raise DataError(f"the data has {width} features, the normalisation has {self.n_features_}")

    def describe(self) -> str:
        """One line for a log: what is done, why, and what was met on the way."""
        text = f"{self.resolved_} ({self.reason_})"
        if self.resolved_ == "log1p":
            text += f", rows scaled to a total of {self.target_sum_:g}"
        if self.n_empty_rows_:
            text += f"; {self.n_empty_rows_} empty row(s) sum to zero"
        if self.n_empty_features_:
            text += f"; {self.n_empty_features_} feature(s) have no counts"
        if self.n_constant_features_:
            text += f"; {self.n_constant_features_} constant feature(s) shifted, not scaled"
        return text

    def to_dict(self) -> dict[str, Any]:
        """The fitted state as plain JSON; floats keep every bit."""
        state: dict[str, Any] = {
            "kind": self.kind,
            "loss": self.loss,
            "resolved": self.resolved_,
            "reason": self.reason_,
            "n_features": self.n_features_,
            "n_empty_rows": self.n_empty_rows_,
            "n_constant_features": self.n_constant_features_,
            "target_sum": self.target_sum_,
        }
        if self.resolved_ in ("standard", "minmax"):
            state |= {"shift": self._shift.tolist(), "scale": self._scale.tolist()}
        return state

    @classmethod
    def identity(cls, n_features: int) -> Normalizer:
        """One that is fitted and changes nothing."""
        self = cls("none")
        self._start(n_features)
        self._resolve("none", "nothing to do")
        return self

    @classmethod
    def from_dict(cls, state: dict[str, Any]) -> Normalizer:
        """Rebuild from `to_dict`.

        Raises
        ------
        DataError
            The state lacks a field or is inconsistent: the model file was made by something else.
        """
        try:
            self = cls(state["kind"], loss=state["loss"], target_sum=state["target_sum"])
            self._check()
            self._start(int(state["n_features"]))
            self._resolve(state["resolved"], state["reason"])
            self.n_empty_rows_ = state["n_empty_rows"]
            self.n_constant_features_ = state["n_constant_features"]
            sound = self.resolved_ in KINDS[1:]
            if self.resolved_ in ("standard", "minmax"):
                self._shift = np.asarray(state["shift"], dtype=np.float64)
                self._scale = np.asarray(state["scale"], dtype=np.float64)
                sound = self._shift.shape == self._scale.shape == (self.n_features_,)
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"the model's normalisation is damaged ({error!r}): fit the model again") from None
        if not sound or (self.resolved_ == "log1p" and self.target_sum_ is None):
            raise DataError("the model's normalisation is inconsistent: fit the model again")
        return self


class NormalizedSource(Source):
    """A source whose rows are normalised as they are read; nothing is kept.

    CSR whose zeros a normalisation moves is read densely by `read_rows`; `read_stored` leaves the zeros out.

    Parameters
    ----------
    source : Source
        Names, labels and path are taken from it; closing this closes it.
    normalizer : Normalizer
        Fitted.
    """

    def __init__(self, source: Source, normalizer: Normalizer) -> None:
        super().__init__(
            source.shape,
            source.dtype,
            nnz=source.nnz if normalizer.keeps_sparse else None,
            obs_names=source.obs_names,
            var_names=source.var_names,
            labels=source.labels,
            path=source.path,
            name=source.name,
        )
        self.source = source
        self.normalizer = normalizer
        shift = normalizer.shift if source.is_sparse else None
        if shift is not None and np.abs(shift).max() <= SHIFT_LIMIT:
            self.shift, self.n_stored = shift, source.nnz

    def read_stored(self, rows: Any) -> Any:
        if self.shift is None:
            return self.read_rows(rows)
        stored = self.normalizer.scale(self.source.read_rows(rows))
        _release(self.source)
        return Shifted(stored, self.shift)

    def describe(self) -> str:
        """One line for a log: what is done, and how."""
        implicit = "; implicitly, CSR stays CSR" if self.shift is not None else ""
        return self.normalizer.describe() + implicit

    def _slice(self, start: int, stop: int) -> Any:
        return self._normalize(self.source.read_rows(slice(start, stop)), np.arange(start, stop))

    def _take(self, index: np.ndarray) -> Any:
        return self._normalize(self.source.read_rows(index), index)

    def _normalize(self, block: Any, rows: np.ndarray) -> Any:
        out = self.normalizer._normalized(block, rows, self.source)
        _release(self.source)
        return out

    def sha256(self) -> str:
        """Digest of the data before normalisation."""
        return self.source.sha256()

    def close(self) -> None:
        super().close()
        self.source.close()


def _release(source: Source) -> None:
    """Let go of the pages of a memory map that were read; they stay in the system's cache."""
    pages = getattr(getattr(source, "array", None), "_mmap", None)
    if pages is not None and hasattr(mmap, "MADV_DONTNEED"):
        pages.madvise(mmap.MADV_DONTNEED)


def _refuse_negative(block: Any, rows: np.ndarray, source: Source | None) -> None:
    """Raise DataError naming row, column and value of the first negative entry."""
    values = block.data if sp.issparse(block) else block
    if values.size == 0 or values.min() >= 0:
        return
    if sp.issparse(block):
        at = int(np.flatnonzero(values < 0)[0])
        row, column = int(np.searchsorted(block.indptr, at, side="right")) - 1, int(block.indices[at])
        value = values[at]
    else:
        row, column = (int(i) for i in np.argwhere(values < 0)[0])
        value = values[row, column]
    where = "" if source is None else f"{source.name}: "
    named = f" ({source.var_names[column]})" if source is not None and source.var_names is not None else ""
    raise DataError(
        f"{where}negative value {value:g} in row {int(rows[row])}, column {column}{named}: log1p needs "
        "counts; use --normalize standard, or name the layer that holds raw counts with --layer"
    )
