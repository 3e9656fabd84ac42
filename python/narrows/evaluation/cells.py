"""The error of each row of counts under a model, adjusted for the total of the row.

The loss of counts is almost a measure of a row's total, which is a cell's depth. `CellErrors` removes it in two steps:

- The loss is divided by that of a model without a code, whose means are the row's total times the share of each feature
  in all counts, with Poisson's distribution (for the multinomial loss, with that loss). The quotient is 1 minus the R
  squared of McFadden, "Conditional logit analysis of qualitative choice behavior", in Frontiers in Econometrics (1974).
- A robust line of the logarithm of the quotient against the logarithm of the total is subtracted, and the rest is
  divided by its robust spread. The line minimises Huber's loss (Annals of Mathematical Statistics 35, 1964); the spread
  is 1.4826 times the median absolute deviation. Both come from rows of the fit.

So typical rows have errors about 0, with spread 1, at any total.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from scipy.special import gammaln

from ..data import Source
from ..data.scan import row_blocks
from ..errors import ModelFileError
from ..plan.losses import Loss
from ..rows.sparse import is_sparse

__all__ = ["CellErrors"]

Array = npt.NDArray[np.float64]

_HUBER = 1.345
"""Residuals beyond this many spreads weigh less: 95 % efficiency for normal ones."""
_ROUNDS = 30


@dataclass(frozen=True)
class CellErrors:
    """Errors of rows relative to those of the fit at the same total.

    Attributes
    ----------
    constants : bool
        Whether the loss is a whole likelihood, with its constants.
    log_shares : ndarray of float32, shape (n_features,)
        Logarithm of each feature's share of all counts.
    intercept, slope, spread : float
        Of the logarithm of the quotient of losses, against the logarithm of the total.
    """

    constants: bool
    log_shares: npt.NDArray[np.float32]
    intercept: float
    slope: float
    spread: float

    @classmethod
    def fit(
        cls, loss: Loss, table: Source, losses: npt.NDArray[Any], rows: npt.NDArray[np.int64] | None = None
    ) -> Self:
        """Learn shares, line and spread.

        Parameters
        ----------
        loss : Loss
        table : Source
            Counts.
        losses : ndarray of shape (n_rows,)
            Losses of the rows under the model.
        rows : ndarray of int, optional
            Sorted numbers of the rows; by default all.
        """
        rows = np.arange(table.shape[0]) if rows is None else rows
        parts = list(row_blocks(len(rows), table.shape[1]))
        sums = np.zeros(table.shape[1])
        for part in parts:
            sums += np.asarray(table.read_rows(rows[part]).sum(axis=0, dtype=np.float64)).ravel()
        # Half a count more keeps every feature possible.
        shares = (sums + 0.5) / (sums + 0.5).sum()
        found = cls(loss.info.likelihood, np.log(shares).astype(np.float32), 0.0, 0.0, 1.0)
        logs = [found._logs(table.read_rows(rows[part]), losses[part]) for part in parts]
        x, y = (np.concatenate(part) for part in zip(*logs, strict=True))
        known = np.isfinite(y)
        return cls(found.constants, found.log_shares, *_robust_line(x[known], y[known]))

    def of(self, block: Any, losses: npt.NDArray[Any]) -> Array:
        """Errors of rows, from their counts (array or CSR) and their losses; NaN for a row without counts."""
        x, y = self._logs(block, losses)
        return (y - self.intercept - self.slope * x) / self.spread

    def _logs(self, block: Any, losses: npt.NDArray[Any]) -> tuple[Array, Array]:
        """Logarithms of the rows' totals, and of their losses divided by those without a code."""
        totals = np.asarray(block.sum(axis=1, dtype=np.float64)).ravel()
        alone = -np.asarray(block @ self.log_shares.astype(np.float64), np.float64).ravel()
        if self.constants:
            alone += totals - totals * np.log(np.maximum(totals, 1))
            if is_sparse(block):
                block = block.copy()
                block.data = gammaln(block.data.astype(np.float64) + 1)
                alone += np.asarray(block.sum(axis=1)).ravel()
            else:
                alone += gammaln(np.asarray(block, np.float64) + 1).sum(axis=1)
        known = (totals > 0) & (alone > 0) & (losses > 0)
        x, y = np.zeros(len(totals)), np.full(len(totals), np.nan)
        x[known] = np.log(totals[known])
        y[known] = np.log(losses[known] / alone[known])
        return x, y

    def to_dict(self) -> dict[str, Any]:
        """As JSON, for the metadata of a model file."""
        shares = base64.b64encode(self.log_shares.astype("<f4").tobytes()).decode()
        return {**vars(self), "log_shares": shares}

    @classmethod
    def of_model(cls, estimator: Any) -> CellErrors | None:
        """Those in the metadata of a fitted estimator; None if it has none.

        Raises
        ------
        ModelFileError
            The entry is damaged or does not fit the model.
        """
        stored = estimator.metadata_.get("cell_errors")
        if stored is None:
            return None
        try:
            shares = np.frombuffer(base64.b64decode(stored["log_shares"], validate=True), "<f4")
            numbers = [float(stored[name]) for name in ("intercept", "slope", "spread")]
            if shares.shape != (int(estimator.n_features_in_),) or not np.isfinite([*shares, *numbers]).all():
                raise ValueError("wrong numbers")
            return cls(bool(stored["constants"]), shares, *numbers)
        except (KeyError, TypeError, ValueError) as error:
            raise ModelFileError(f"the entry cell_errors of this model file is damaged ({error})") from None


def _robust_line(x: Array, y: Array) -> tuple[float, float, float]:
    """Intercept, slope and spread of a robust line."""
    if not len(x):
        return 0.0, 0.0, 1.0
    A = np.column_stack([np.ones(len(x)), x - x.mean()])
    line, spread = np.array([np.median(y), 0.0]), 0.0
    for _ in range(_ROUNDS):
        rest = y - A @ line
        spread = 1.4826 * float(np.median(np.abs(rest)))
        weight = np.sqrt(1 / np.maximum(1, np.abs(rest) / max(_HUBER * spread, np.finfo(float).tiny)))
        line = np.linalg.lstsq(A * weight[:, None], y * weight, rcond=None)[0]
    return float(line[0] - line[1] * x.mean()), float(line[1]), spread or 1.0
