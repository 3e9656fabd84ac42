"""Scaling of rows or columns, learned once from a data set and kept with the model.

- `Normalizer.fit` makes one pass over row blocks whose borders depend on the shape alone, with float64 sums. A memory
  limit or a number of threads changes no result.
- The result of a row depends on that row and the fitted state only, so any split into blocks gives the same bits.
- CSR stays CSR under ``log1p``, ``none`` and a ``minmax`` whose minima are all zero. Other scalings change zeros and
  return dense blocks; `NormalizedSource.read_stored` avoids them. Nothing densifies more than one block.
- The fitted state is plain JSON. The input is never changed.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import scipy.sparse as sp
from sklearn.base import BaseEstimator, OneToOneFeatureMixin, TransformerMixin
from sklearn.utils.validation import check_is_fitted, validate_data

from ..errors import DataError
from ..plan.losses import LOSSES, LossInfo
from ..rows.arrays import check_numbers, placing
from ..rows.devices import host_array
from ..rows.sparse import canonical, is_sparse
from . import KINDS
from .checks import check_counts, check_finite, check_representable, check_within
from .scan import LEVELS, Scan, row_blocks, row_totals
from .source import ArraySource, Source

__all__ = ["Normalizer"]

OFFSET = 2.0**14
"""From this multiple of the scale on, a shift costs float32 more than a thousandth of the scale."""


class Normalizer(OneToOneFeatureMixin, TransformerMixin, BaseEstimator):  # type: ignore[misc]
    """A scaling of rows or columns that is learned from data, can be undone, and is stored in model files.

    It is a scikit-learn transformer: use it before an autoencoder in a pipeline. It reads a `Source` block by block.

    Parameters
    ----------
    kind : {"auto", "log1p", "standard", "minmax", "none"}, default="auto"
        ``log1p`` scales each row to the sum `target_sum` and takes log(1 + x), the usual preparation of counts.
        ``standard`` scales each feature to mean 0 and variance 1, ``minmax`` to 0..1. ``auto`` chooses by `loss` and
        values. For a count loss: ``none``. For pixels (whole numbers up to 255, for 64 features and more) and other
        levels (whole numbers up to 127, of which large ones are not rare, such as ratings): ``minmax`` with one scale
        for all features. For other data and ``bce``: ``none`` if every value lies in 0..1, else ``minmax``. For other
        losses: ``log1p`` for counts (whole numbers, with zeros in most features) and for rows of one large total, as
        TPM; ``none`` for zeros and ones; else ``standard``.
    loss : str
        The loss that the model will train with; only ``auto`` uses it.
    target_sum : float, optional
        Row sum under ``log1p``; by default the median of the row totals that are not zero.

    Attributes
    ----------
    target_sum_ : float or None
        The row sum under ``log1p``.
    resolved_ : str
        The kind that ``auto`` chose; otherwise `kind`.
    reason_ : str
        Why, in a few words.
    n_features_, n_features_in_ : int
    feature_names_in_ : ndarray of str
        Columns of the frame that was fitted; `transform` takes only frames with these columns, in this order.
    n_empty_rows_ : int or None
        Rows that sum to zero; they stay zero under ``log1p``. None if no pass was needed.
    n_empty_features_ : int or None
        Features that sum to zero, if counts are used unscaled; otherwise None.
    n_constant_features_ : int or None
        Features with one value only, under ``standard`` and ``minmax``: shifted, not scaled.

    Examples
    --------
    >>> import numpy as np
    >>> from narrows import Normalizer
    >>> X = np.array([[0.5, 10.0], [1.5, 20.0], [2.5, 30.0]])
    >>> scaling = Normalizer("minmax").fit(X)
    >>> scaling.transform(X).tolist()
    [[0.0, 0.0], [0.5, 0.5], [1.0, 1.0]]
    >>> np.allclose(scaling.inverse_transform(scaling.transform(X)), X)
    True
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
            raise ValueError(f"kind={self.kind!r} must be one of {', '.join(KINDS)}")
        if self.loss not in LOSSES:
            raise ValueError(f"loss={self.loss!r} must be one of {', '.join(LOSSES)}")
        if self.target_sum is not None and not 0 < self.target_sum < np.inf:
            raise ValueError(f"target_sum={self.target_sum!r} must be positive and finite")

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
            Unknown `kind` or `loss`, or a `target_sum` that is not positive.
        DataError
            A value is NaN or infinite, or negative with ``kind="log1p"``. The message names row and column.
        """
        self._check()
        source = self._read(X, reset=True)
        n_rows, n_features = source.shape
        self._start(n_features)
        auto, loss = self.kind == "auto", LOSSES[self.loss]
        if self.kind == "none" or (auto and loss.raw_counts):
            self._check_unscaled(source, loss.raw_counts)
            self._resolve("none", f"the {loss.name} loss takes counts as they are" if auto else "as asked")
            return self
        moments = self.kind == "standard" or (auto and not loss.bounded)
        extremes = self.kind == "minmax" or (auto and loss.bounded)
        scan = Scan(n_rows, n_features, moments=moments, extremes=extremes)
        for rows in row_blocks(n_rows, n_features):
            block = canonical(source.read_rows(rows))
            check_finite(block, rows.start, source)
            if self.kind == "log1p":
                _check_not_negative(block, rows.start, source)
            scan.add(block, rows.start)
            source.release()
        self.n_empty_rows_ = int(np.count_nonzero(scan.totals == 0))
        kind, reason, top = _choice(scan, source, loss) if auto else (self.kind, "as asked", None)
        self._resolve(kind, reason)
        if self.resolved_ == "log1p" and self.target_sum_ is None:
            filled = scan.totals[scan.totals > 0]
            self.target_sum_ = float(np.median(filled)) if filled.size else 1.0
        elif self.resolved_ == "standard" and scan.mean is not None:
            # A spread that rounding of the mean alone can explain counts as zero (scikit-learn's rule).
            variance = scan.m2 / n_rows
            u = n_rows * np.finfo(np.float64).eps
            noise = u * variance + (u * scan.mean) ** 2
            self._set_columns(scan.mean, np.where(variance > noise, np.sqrt(variance), 0.0))
        elif self.resolved_ == "minmax" and top is not None:
            self._set_columns(np.zeros(n_features), np.full(n_features, top))
        elif self.resolved_ == "minmax" and scan.low is not None:
            self._set_columns(scan.low, scan.high - scan.low)
        return self

    def _check_unscaled(self, source: Source, raw_counts: bool) -> None:
        """Check data that are not scaled: finite values, or counts. For counts, note the empty rows and features."""
        n_rows, n_features = source.shape
        filled = np.zeros(n_features, bool)
        n_empty = 0
        for rows in row_blocks(n_rows, n_features):
            block = source.read_rows(rows)
            (check_counts if raw_counts else check_finite)(block, rows.start, source)
            if raw_counts:
                n_empty += int(np.count_nonzero(row_totals(block) == 0))
                filled |= np.asarray(block.sum(axis=0)).ravel() > 0
            source.release()
        if raw_counts:
            self.n_empty_rows_, self.n_empty_features_ = n_empty, n_features - int(np.count_nonzero(filled))

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
        """The vector subtracted from the scaled rows, float64 of shape (n_features,); None if zeros stay zero."""
        return None if self.keeps_sparse else np.asarray(self._shift / self._scale)

    def transform(self, block: Any, *, rows: np.ndarray | None = None, source: Source | None = None) -> Any:
        """Normalise a block of rows.

        Parameters
        ----------
        block : array, SciPy sparse matrix or data frame of shape (n, n_features)
        rows : ndarray of shape (n,), optional
            Row numbers in the data, for error messages only.
        source : Source, optional
            The source of the block, for error messages only.

        Returns
        -------
        ndarray or CSR of shape (n, n_features)
            float64 for float64 input, float32 otherwise. ``none`` keeps whole numbers that need it in float64.

        Raises
        ------
        ValueError
            The number or the names of the features differ from those of `fit`.
        DataError
            The block is not a table of finite numbers, has a negative value under ``log1p``, or a result is too large
            for float32.
        """
        check_is_fitted(self, "resolved_")
        given = self._read(block, reset=False)
        found = given.read_rows(slice(None))
        check_finite(found, 0, given)
        dtype = found.dtype if self.resolved_ == "none" else given.dtype
        return self.normalize_block(found, rows, source, dtype)

    def _read(self, X: Any, *, reset: bool) -> Source:
        """X as a source, after scikit-learn's checks; `reset` learns the names and the number of features."""
        if isinstance(X, Source):
            if reset:
                self.__dict__.pop("feature_names_in_", None)
            return X
        of_cells = hasattr(X, "obs_names")  # AnnData: only a source can read it
        if not of_cells:
            X = host_array(X)
            check_numbers(X)
        with placing(X):
            X = validate_data(
                self,
                X,
                reset=reset,
                skip_check_array=of_cells,
                **({} if of_cells else {"accept_sparse": "csr", "dtype": "numeric", "ensure_all_finite": False}),
            )
            X = X.astype(np.float64) if getattr(X, "dtype", None) == np.dtype(object) else X
        return ArraySource(X, var_names=getattr(self, "feature_names_in_", None))

    def normalize_block(self, block: Any, rows: np.ndarray | None, source: Source | None, dtype: Any) -> Any:
        """`transform` to a dtype without its checks, for an array or CSR of the right columns and exact values.

        ``set_output`` has no effect.
        """
        self._check_width(block.shape[1])
        n = block.shape[0]
        numbers = np.arange(n) if rows is None else rows
        if self.resolved_ == "none":
            check_representable(block, dtype, numbers, "X" if source is None else source)
            return block.astype(dtype, copy=False)
        block = canonical(block)
        sparse = is_sparse(block)
        if sparse and self.keeps_sparse:
            return self._scaled(block, numbers, source, dtype)
        # The arithmetic is float64; working part by part keeps its temporaries small.
        out = np.empty(block.shape, dtype)
        for part in row_blocks(n, block.shape[1]):
            piece = block[part]
            if self.resolved_ == "log1p":
                _check_not_negative(piece, numbers[part], source)
                result = np.log1p(np.multiply(piece, self._factors(piece)[:, None], order="C"))
            else:
                dense = piece.toarray() if sparse else piece
                result = np.subtract(dense, self._shift, order="C")
                result /= self._scale
            if piece.dtype == np.float64:
                check_representable(result, dtype, numbers[part], "X" if source is None else source)
            out[part] = result
        return out

    def scale(self, block: Any, dtype: Any) -> Any:
        """A CSR block with its nonzeros scaled: `transform` without subtracting the `shift`."""
        self._check_width(block.shape[1])
        return self._scaled(canonical(block), np.arange(block.shape[0]), None, dtype)

    def _scaled(self, block: Any, numbers: np.ndarray, source: Source | None, dtype: Any) -> Any:
        """A canonical CSR block with its nonzeros normalised, part by part."""
        out = np.empty(block.nnz, dtype)
        for part in row_blocks(*block.shape):
            piece = block[part]
            if self.resolved_ == "log1p":
                _check_not_negative(piece, numbers[part], source)
            out[block.indptr[part.start] : block.indptr[part.stop]] = self._scaled_values(piece)
        return sp.csr_array((out, block.indices, block.indptr), shape=block.shape)

    def _factors(self, block: Any) -> np.ndarray:
        """The factor that scales each row to the sum `target_sum`; 0 for an empty row."""
        totals = row_totals(block)
        target = float(self.target_sum_ or 0.0)
        factors: np.ndarray = np.divide(target, totals, out=np.zeros_like(totals), where=totals > 0)
        return factors

    def _scaled_values(self, block: Any) -> np.ndarray:
        """The stored values of a canonical CSR block, normalised, float64."""
        if self.resolved_ == "log1p":
            return np.asarray(np.log1p(block.data * np.repeat(self._factors(block), np.diff(block.indptr))))
        return np.asarray(block.data / self._scale[block.indices])

    def inverse_transform(self, block: Any) -> Any:
        """Undo `transform` on dense rows, for example on reconstructions.

        ``standard`` and ``minmax`` return to the original scale. ``log1p`` gives ``exp(x) - 1``: rows that sum to
        `target_sum`, because the original row totals are unknown.

        Parameters
        ----------
        block : array or data frame of shape (n, n_features)

        Returns
        -------
        ndarray of shape (n, n_features)
            Of the block's dtype if that is float32 or float64, but float64 if float32 would lose more than a
            thousandth of the scale of a feature, such as a time.
        """
        check_is_fitted(self, "resolved_")
        if type(block) is not np.ndarray or block.ndim != 2:
            block = ArraySource(block).read_rows(slice(None))
        self._check_width(block.shape[1])
        if self.resolved_ == "none":
            return block
        if self.resolved_ == "log1p":
            return np.expm1(block)
        return (block * self._scale + self._shift).astype(self.inverse_dtype(block.dtype), copy=False)

    def inverse_dtype(self, dtype: Any) -> np.dtype[Any]:
        """The dtype of what `inverse_transform` makes of a block of this float type."""
        wide = self.resolved_ in ("standard", "minmax") and bool((np.abs(self._shift) > OFFSET * self._scale).any())
        return np.dtype(np.float64 if wide else dtype)

    def _check_width(self, width: int) -> None:
        check_is_fitted(self, "resolved_")
        if width != self.n_features_:
            raise DataError(f"X has {width} features; the Normalizer was fitted on {self.n_features_}")

    def describe(self, choose: str = "kind=NAME") -> str:
        """One line for a log: which scaling, why, and how many rows or features are empty or constant.

        `choose` is how the caller chooses another scaling than that of ``auto``.
        """
        other = f"; {choose} chooses another" if self.kind == "auto" and not LOSSES[self.loss].raw_counts else ""
        text = f"{self.resolved_} ({self.reason_}{other})"
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
        """The fitted state as plain JSON values; floats keep every bit."""
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
        """A fitted `Normalizer` that changes nothing."""
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
            The state lacks a field or is inconsistent.
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
                sound = sound and bool(np.isfinite(self._shift).all() and (self._scale > 0).all())
                sound = sound and bool(np.isfinite(self._scale).all())
            if self.target_sum_ is not None:
                sound = sound and math.isfinite(self.target_sum_) and self.target_sum_ > 0
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise DataError(
                f"the normalisation in the model file is damaged ({error!r}): fit the model again"
            ) from None
        if not sound or (self.resolved_ == "log1p" and self.target_sum_ is None):
            raise DataError("the normalisation in the model file is inconsistent: fit the model again")
        return self


PIXEL = 255.0
"""The largest value of a pixel in 8 bits."""
IMAGE = 64
"""Features of the smallest image that is recognised: 8 x 8 pixels."""


def _top_level(scan: Scan, source: Source) -> float | None:
    """The end of the scale of pixels and other levels; None for other data.

    Counts are many small numbers and few large ones. On a scale large values are not rare.
    """
    n_features = source.shape[1]
    if not scan.whole or scan.greatest <= 1:
        return None
    if LEVELS <= scan.greatest <= PIXEL:
        bright = scan.totals.sum() >= 0.15 * scan.greatest * scan.filled.sum()
        square = any(n * math.isqrt(n_features // n) ** 2 == n_features for n in (1, 3))
        bytes_of_image = source.stored_dtype == np.uint8 and not source.is_sparse and square
        return PIXEL if n_features >= IMAGE and (bright or bytes_of_image) else None
    if scan.greatest > PIXEL or _zeros(scan)[1] < 0.75:
        return None
    high = int(scan.levels[int(0.75 * scan.greatest) + 1 :].sum())
    return float(scan.greatest) if high >= max(10, 0.1 * int(scan.levels[1:].sum())) else None


def _zeros(scan: Scan) -> tuple[float, float]:
    """The part of the values that are zero, and the part of the features that have a zero."""
    n_rows, n_features = len(scan.totals), len(scan.filled)
    return 1 - float(scan.filled.sum()) / (n_rows * n_features), float(np.mean(scan.filled < n_rows))


def _choice(scan: Scan, source: Source, loss: LossInfo) -> tuple[str, str, float | None]:
    """The kind that ``auto`` takes for a loss that is not for raw counts, why, and the end of the scale of levels."""
    if loss.bounded and scan.least >= 0 and scan.greatest <= 1:
        return "none", "values lie in 0..1", None
    top = _top_level(scan, source)
    if top is not None:
        what = "pixels" if top == PIXEL else "levels"
        reason = f"{what}, not counts: whole numbers up to {scan.greatest:g}; all features are divided by {top:g}"
        return "minmax", reason, top
    if loss.bounded:
        return "minmax", f"{loss.name} needs values in 0..1", None
    return *_kind_for_any(scan), None


def _kind_for_any(scan: Scan) -> tuple[str, str]:
    """The kind for a loss that takes any values, and why."""
    if scan.least < 0:
        return "standard", "not counts: there are negative values"
    if not scan.whole:
        low, high = scan.totals.min(), scan.totals.max()
        if low >= 1e4 and high - low <= 0.01 * high:
            return "log1p", f"each row sums to {high:.3g}, as in TPM and CPM"
        return "standard", "not counts: there are decimals"
    if scan.greatest <= 1:
        return "none", "values are 0 and 1"
    zeros, with_zeros = _zeros(scan)
    if scan.mean is not None and scan.mean[scan.filled == len(scan.totals)].max(initial=0) > 0.5 * scan.mean.sum():
        return "standard", "not counts: one feature without zeros is more than half of the total"
    if zeros >= 0.02 and with_zeros >= 0.75:
        return "log1p", f"counts: whole numbers, {zeros:.1%} zeros"
    return "standard", f"not counts: {zeros:.1%} zeros, and {1 - with_zeros:.0%} of the features have none"


def _check_not_negative(block: Any, rows: Any, source: Source | None) -> None:
    """Raise `DataError` for the first negative value; `rows` are the block's row numbers or its first one."""
    needed = "log1p needs counts: use kind='standard', or the layer that holds raw counts (layer=NAME)"
    check_within(block, 0.0, np.inf, needed, rows, "X" if source is None else source)
