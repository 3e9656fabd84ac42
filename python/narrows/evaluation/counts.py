"""Measures of a count model: the negative log-likelihood of each row, beside a baseline without latent codes.

- `Baseline` gives every row the same shares of the features, taken from all training rows. The mean of a count is the
  row's total times the share of its feature. Its distribution is Poisson, or negative binomial with fitted dispersions;
  it has no zero inflation, even if the model has.
- Likelihoods are complete and in nats, so they compare across rows, models and other software.
- Rows are read block by block. Only a model that takes dense rows makes them dense.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from ..backends import Program, compile_plan
from ..data import Source
from ..data.scan import row_blocks
from ..data.source import with_names
from ..fitting.start import FIRST_DISPERSION, dispersions
from ..fitting.table import Table
from ..plan.lowering import lower
from ..plan.ops import DISPERSION_PACE, LOG_DISPERSION_LIMIT
from ..plan.plan import Mode
from ..plan.spec import Activation, Data, LayerSpec, Loss, NetworkSpec
from .metrics import sample_rows

__all__ = ["Baseline", "measure"]

#: Dispersions are fitted to at most this many rows and this many bytes of them.
DISPERSION_ROWS = 2048
DISPERSION_BYTES = 64 << 20
#: Number of bisections that find a log dispersion.
_HALVINGS = 14
_BATCH = 128
_BINS = 40


class Baseline:
    """The likelihood of counts from the feature shares alone.

    Parameters
    ----------
    table : Source
        Counts.
    rows : ndarray of int
        Sorted row numbers; the shares are learned from these rows.
    loss : Loss
        For Poisson the baseline is Poisson; for any other loss it is negative binomial.
    seed : int
        Seed of the sample of at most `DISPERSION_ROWS` rows that dispersions are fitted to.
    backend : str
    n_threads : int
    """

    def __init__(
        self, table: Source, rows: npt.NDArray[np.int64], loss: Loss, *, seed: int, backend: str, n_threads: int
    ) -> None:
        self.loss = Loss.NB if loss.info.dispersion else Loss.POISSON
        n_features = table.shape[1]
        sums = np.zeros(n_features)
        for part in row_blocks(len(rows), n_features):
            sums += np.asarray(table.read_rows(rows[part]).sum(axis=0, dtype=np.float64)).ravel()
        # Half a count more keeps every feature possible.
        shares = (sums + 0.5) / (sums + 0.5).sum()
        # A network with a zero latent code: the output bias alone gives the logits.
        layers = LayerSpec(1, 1, Activation.LINEAR), LayerSpec(1, n_features, Activation.SOFTMAX)
        spec = NetworkSpec(layers, 1, loss=self.loss, data=Data(separate_target=True))
        self._program: Program = compile_plan(lower(spec, _BATCH), backend, precision="float32", n_threads=n_threads)
        self._state = {
            **{name: np.zeros(shape, np.float32) for name, shape in spec.parameter_shapes.items()},
            "b1": np.log(shares)[None].astype(np.float32),
        }
        if self.loss.info.dispersion:
            # A feature without counts has no information about its dispersion.
            most = max(_BATCH, min(DISPERSION_ROWS, DISPERSION_BYTES // Table(table).row_bytes))
            chosen = rows[sample_rows(len(rows), seed, most)]
            self._fit_dispersions(table.read_rows(chosen), np.flatnonzero(sums))
        self._program.load(self._state)

    def _fit_dispersions(self, block: Any, features: npt.NDArray[np.int64]) -> None:
        """Find by bisection the log dispersions at which the derivative of the loss changes sign."""
        n_rows = block.shape[0]
        low = np.full(block.shape[1], -LOG_DISPERSION_LIMIT / 2)
        high = -low
        fitted = np.full((1, block.shape[1]), np.log(FIRST_DISPERSION) / DISPERSION_PACE, np.float32)
        self._program.bind(np.zeros((n_rows, 1), np.float32), block)
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            fitted[0, features] = middle[features] / DISPERSION_PACE
            self._program.load(self._state | {"log_dispersion": fitted})
            slope = np.zeros(block.shape[1])
            for first in range(0, n_rows, _BATCH):
                part = np.arange(first, min(first + _BATCH, n_rows))
                slope += self._program.gradient(part)[1]["log_dispersion"][0].astype(np.float64) * len(part)
            high = np.where(slope > 0, middle, high)
            low = np.where(slope > 0, low, middle)
        self._state["log_dispersion"] = fitted

    @property
    def dispersions(self) -> npt.NDArray[np.float64]:
        """Inverse dispersions, shape (n_features,); only for a negative binomial baseline."""
        return dispersions(self._state["log_dispersion"])

    def losses(self, block: Any) -> npt.NDArray[np.float64]:
        """The negative log-likelihood of each row of an array or CSR, in nats."""
        codes = np.zeros((block.shape[0], 1), np.float32)
        losses: npt.NDArray[np.float64] = self._program.apply(codes, Mode.SCORE, block)[:, 0].astype(np.float64)
        return losses


def measure(
    estimator: Any,
    table: Source,
    split: tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]] | None,
    batch: npt.NDArray[Any] | None = None,
    *,
    seed: int,
    n_threads: int,
    step_bytes: int,
) -> dict[str, Any]:
    """The figures that ``metrics.json`` holds for a count model.

    Parameters
    ----------
    estimator : fitted estimator with a count loss
    table : Source
        The counts.
    split : (training rows, held-out rows), optional
        Sorted row numbers; by default the model was trained on all rows.
    batch : ndarray of shape (n_rows,), optional
        Batch labels of the rows. The baseline does not use them.
    seed : int
    n_threads : int
    step_bytes : int
        Approximate bytes of one block of rows.

    Returns
    -------
    dict
        ``nll_per_row`` and ``nll_per_count`` over all rows, ``held_out_nll_...`` over the held-out rows (None without),
        ``baseline_nll_...`` of the baseline, and ``baseline``, its distribution. ``row_losses`` is a histogram over the
        held-out rows, or over all rows without such: bin ``edges``, and rows per bin for ``model`` and ``baseline``.
        For a variational model, the likelihood is the lower bound from one draw of each code.
    """
    loss = estimator.plan_.spec.loss
    trained, held = (np.arange(table.shape[0]), None) if split is None else split
    rows = trained[sample_rows(len(trained), seed)]
    baseline = Baseline(table, rows, loss, seed=seed, backend=estimator.backend_, n_threads=n_threads)
    ours, theirs, counts = (
        np.concatenate(parts) for parts in zip(*_losses(estimator, baseline, table, batch, step_bytes), strict=True)
    )
    found: dict[str, Any] = {"baseline": baseline.loss.name.lower(), "baseline_rows": len(rows)}
    for prefix, some in (("", slice(None)), ("held_out_", held)):
        for name, losses in (("nll", ours), ("baseline_nll", theirs)):
            total = None if some is None else float(losses[some].sum())
            n_counts = 0.0 if some is None else float(counts[some].sum())
            found[f"{prefix}{name}_per_row"] = None if total is None else total / len(losses[some])
            found[f"{prefix}{name}_per_count"] = total / n_counts if total is not None and n_counts else None
    shown = slice(None) if held is None else held
    edges = np.histogram_bin_edges(np.concatenate([ours[shown], theirs[shown]]), _BINS)
    found["row_losses"] = {
        "edges": edges.tolist(),
        "model": np.histogram(ours[shown], edges)[0].tolist(),
        "baseline": np.histogram(theirs[shown], edges)[0].tolist(),
    }
    return found


def _losses(
    estimator: Any, baseline: Baseline, table: Source, batch: npt.NDArray[Any] | None, step_bytes: int
) -> Iterator[tuple[Any, Any, Any]]:
    """For each block of rows: the losses of the model, the losses of the baseline, and the row totals."""
    for part in row_blocks(*table.shape, step_bytes):
        block = table.read_rows(part)
        named = with_names(block, table)
        labels = None if batch is None else batch[part]
        likelihood = estimator.elbo if estimator.variational else estimator.score_samples
        ours = -likelihood(named, batch=labels)
        yield ours.astype(np.float64), baseline.losses(block), np.asarray(block.sum(axis=1, dtype=np.float64)).ravel()
