"""How good a model of counts is: the negative log-likelihood of each row, beside a baseline without a code.

- `Baseline`: each row has the same shares of the features, those of all rows trained on, and the mean of a count is the
  row's sum times its feature's share. Its distribution is Poisson's, or negative binomial with the inverse dispersions
  under which these means explain the rows best, whether or not the model has zeros besides.
- Everything is in nats and complete, so that rows, models and other software can be compared.
- Rows are read block by block, and none is made dense but by a model that takes dense rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from ..backends import Program, compile_plan
from ..cli.applying import with_names
from ..cli.resources import APPLY_BYTES
from ..data import Source
from ..data.normalize import row_blocks
from ..fitting.start import FIRST_DISPERSION, dispersions
from ..fitting.table import Table
from ..plan.lowering import lower
from ..plan.ops import DISPERSION_PACE, LOG_DISPERSION_LIMIT
from ..plan.plan import Mode
from ..plan.spec import Activation, LayerSpec, Loss, NetworkSpec
from .baselines import sample_rows

__all__ = ["BASELINE", "Baseline", "baseline_text", "counted", "held_text", "judged", "measure", "plot_losses"]

#: What the baseline is called in figures.
BASELINE = "shares of features alone"

#: Rows that dispersions are fitted to, at most; fewer where they take more than a block.
DISPERSION_ROWS = 2048
#: Halvings of the range of their logarithms, which leave a thousandth of it.
_HALVINGS = 14
_BATCH = 128
_BINS = 40


class Baseline:
    """The likelihood of counts by the shares of their features alone.

    Parameters
    ----------
    table : Source
        Counts.
    rows : ndarray of int
        Those to learn the shares from, sorted.
    loss : Loss
        Poisson, or another for which the baseline is negative binomial.
    seed : int
        Chooses the rows that dispersions are fitted to, where there are more than `DISPERSION_ROWS`.
    backend : str
    n_threads : int
    """

    def __init__(
        self, table: Source, rows: npt.NDArray[np.int64], loss: Loss, *, seed: int, backend: str, n_threads: int
    ) -> None:
        self.loss = Loss.POISSON if loss is Loss.POISSON else Loss.NB
        n_features = table.shape[1]
        sums = np.zeros(n_features)
        for part in row_blocks(len(rows), n_features):
            sums += np.asarray(table.read_rows(rows[part]).sum(axis=0, dtype=np.float64)).ravel()
        # Half a count more, so that no feature is impossible.
        shares = (sums + 0.5) / (sums + 0.5).sum()
        # A network whose code is nothing; the logits are those of the last layer's bias.
        layers = LayerSpec(1, 1, Activation.LINEAR), LayerSpec(1, n_features, Activation.SOFTMAX)
        spec = NetworkSpec(layers, 1, loss=self.loss, separate_target=True)
        self._program: Program = compile_plan(lower(spec, _BATCH), backend, precision="float32", n_threads=n_threads)
        self._state = {
            **{name: np.zeros(shape, np.float32) for name, shape in spec.parameter_shapes.items()},
            "b1": np.log(shares)[None].astype(np.float32),
        }
        if self.loss is Loss.NB:
            # Features without counts say nothing of theirs.
            most = max(_BATCH, min(DISPERSION_ROWS, APPLY_BYTES // Table(table).row_bytes))
            chosen = rows[sample_rows(len(rows), seed, most)]
            self._fit_dispersions(table.read_rows(chosen), np.flatnonzero(sums))
        self._program.load(self._state)

    def _fit_dispersions(self, block: Any, features: npt.NDArray[np.int64]) -> None:
        """The logarithms at which the derivative of the loss changes its sign, by halving their range."""
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
        """Inverse dispersions, shape (n_features,); only where it is negative binomial."""
        return dispersions(self._state["log_dispersion"])

    def losses(self, block: Any) -> npt.NDArray[np.float64]:
        """The negative log-likelihood of each row of an array or CSR, nats."""
        nothing = np.zeros((block.shape[0], 1), np.float32)
        losses: npt.NDArray[np.float64] = self._program.apply(nothing, Mode.SCORE, block)[:, 0].astype(np.float64)
        return losses


def measure(
    estimator: Any,
    table: Source,
    held: tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]] | None,
    batch: npt.NDArray[Any] | None = None,
    *,
    seed: int,
    n_threads: int,
    step_bytes: int,
) -> dict[str, Any]:
    """Figures for ``metrics.json``.

    Parameters
    ----------
    estimator : fitted estimator with a loss of counts
    table : Source
        The counts.
    held : (rows trained on, rows held out), optional
    batch : ndarray of shape (n_rows,), optional
        Labels of the rows' batches, which the baseline does not know.
    seed : int
    n_threads : int
    step_bytes : int
        About the bytes of a block of rows.

    Returns
    -------
    dict
        ``nll_per_row`` and ``nll_per_count``, over all rows; the same with ``held_out_`` of the rows held out (None
        without), and with ``baseline_`` before ``nll`` of the baseline; ``baseline``: its distribution; ``row_losses``:
        ``edges`` of bins, and the numbers of rows, of those held out if there are such, in each by ``model`` and
        ``baseline``. Of a variational model, the likelihood is its lower bound by one draw of each code.
    """
    loss = estimator.plan_.spec.loss
    trained = np.arange(table.shape[0]) if held is None else held[0]
    rows = trained[sample_rows(len(trained), seed)]
    baseline = Baseline(table, rows, loss, seed=seed, backend=estimator.backend_, n_threads=n_threads)
    ours, theirs, counts = (
        np.concatenate(parts) for parts in zip(*_losses(estimator, baseline, table, batch, step_bytes), strict=True)
    )
    found: dict[str, Any] = {"baseline": baseline.loss.name.lower(), "baseline_rows": len(rows)}
    for prefix, some in (("", slice(None)), ("held_out_", None if held is None else held[1])):
        for name, losses in (("nll", ours), ("baseline_nll", theirs)):
            total = None if some is None else float(losses[some].sum())
            n_counts = 0.0 if some is None else float(counts[some].sum())
            found[f"{prefix}{name}_per_row"] = None if total is None else total / len(losses[some])
            found[f"{prefix}{name}_per_count"] = total / n_counts if total is not None and n_counts else None
    shown = slice(None) if held is None else held[1]
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
    """Of each block of rows: the losses by the model and by the baseline, and the sums of counts."""
    for part in row_blocks(*table.shape, step_bytes):
        block = table.read_rows(part)
        named = with_names(block, table)
        told = None if batch is None else batch[part]
        judge = estimator.elbo if estimator.variational else estimator.score_samples
        ours = -judge(named, batch=told)
        yield ours.astype(np.float64), baseline.losses(block), np.asarray(block.sum(axis=1, dtype=np.float64)).ravel()


# --- for the report --------------------------------------------------------------------------------------------------


def counted(metrics: dict[str, Any]) -> bool:
    """Whether `measure` has made them."""
    return metrics.get("nll_per_row") is not None


def judged(metrics: dict[str, Any], name: str) -> float:
    """A figure, of the rows held out if there are such."""
    held = metrics[f"held_out_{name}"]
    value: float = metrics[name] if held is None else held
    return value


def held_text(metrics: dict[str, Any]) -> str:
    """Of which rows the figures are that `judged` gives."""
    return "" if metrics["held_out_nll_per_row"] is None else " of the rows held out"


def baseline_text(metrics: dict[str, Any]) -> str:
    """What the baseline is."""
    kind = "Poisson" if metrics["baseline"] == "poisson" else "negative binomial, its dispersions fitted"
    return f"that of each feature's share in all counts times the row's sum ({kind})"


def plot_losses(ax: Any, losses: dict[str, list[float]]) -> None:
    """Draw ``row_losses``."""
    from ..plotting.style import BLUE, GREEN, dress

    ax.stairs(losses["baseline"], losses["edges"], color=GREEN, lw=1.5, ls=(0, (4, 2)), label=BASELINE)
    ax.stairs(losses["model"], losses["edges"], color=BLUE, alpha=0.35, fill=True)
    ax.stairs(losses["model"], losses["edges"], color=BLUE, lw=1.5, label="autoencoder")
    ax.legend(frameon=False, loc="upper right")
    ax.set(xlabel="nats per row", ylabel="rows", title="Losses of rows")
    dress(ax)
