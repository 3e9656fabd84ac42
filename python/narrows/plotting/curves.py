"""Curves, bars and points: loss, elbow of the bottleneck, latent space, features, sensitivity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from .style import BLUE, GREEN, INK, ORANGE, PALETTE, axes_or_new, dress, floats, legend_above, literal, side_legend

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MARKERS = "os^Dv"
#: More points than this are drawn as pixels; a vector figure would grow to megabytes.
_RASTER_POINTS = 2000


def plot_loss(history: Any, ax: Axes | None = None) -> Axes:
    """Training and validation loss against the epoch.

    Parameters
    ----------
    history : fitted estimator, or mapping of str to sequence of float
        ``history_`` of an estimator: ``loss`` and, if present, ``val_loss``, one value per epoch. For a variational
        model, the training curve is ``objective``, which is comparable with ``val_loss``.
    ax : matplotlib.axes.Axes, optional

    Returns
    -------
    matplotlib.axes.Axes

    Examples
    --------
    >>> from narrows.plotting import plot_loss
    >>> ax = plot_loss({"loss": [3.0, 2.0, 1.5], "val_loss": [3.1, 2.2, 2.3]})
    >>> [text.get_text() for text in ax.get_legend().get_texts()]
    ['training', 'validation, best 2.2 (epoch 2)']
    """
    history = getattr(history, "history_", history)
    if not isinstance(history, Mapping) or "loss" not in history:
        raise TypeError("history must be a fitted estimator or a mapping with the key 'loss'")
    ax = axes_or_new(ax)
    loss = floats(history.get("objective") or history["loss"])
    validation = floats(history.get("val_loss") or [])
    epochs = np.arange(1, len(loss) + 1)
    few = "o" if len(loss) < 15 else None
    ax.plot(epochs, loss, color=BLUE, lw=1.8, marker=few, ms=4, label="training")
    if np.isfinite(validation).any():
        at = np.arange(1, len(validation) + 1)
        best = int(np.nanargmin(validation))
        label = f"validation, best {validation[best]:.4g} (epoch {best + 1})"
        ax.plot(at, validation, color=ORANGE, lw=1.8, marker=few, ms=4, label=label)
        ax.plot(best + 1, validation[best], "o", ms=7, mfc="white", mec=ORANGE, mew=1.8, zorder=3)
    shown = np.concatenate([loss, validation])
    shown = shown[np.isfinite(shown)]
    if shown.size and shown.min() > 0 and shown.max() > 20 * shown.min():
        ax.set_yscale("log")
    ax.locator_params(axis="x", integer=True)
    ax.set(xlabel="epoch", ylabel="loss (mean over samples)", title="Loss")
    if len(ax.get_legend_handles_labels()[1]) > 1:
        legend_above(ax)
    return dress(ax)


def plot_elbow(
    n_components: Sequence[int],
    losses: npt.ArrayLike,
    baseline: npt.ArrayLike | None = None,
    ax: Axes | None = None,
    *,
    elbow: int | None = None,
    ylabel: str = "held-out loss",
    baseline_name: str = "PCA",
) -> Axes:
    """The loss against the number of latent components, beside a baseline.

    Parameters
    ----------
    n_components : sequence of int
        The numbers of components, on a logarithmic axis.
    losses : array_like of the same length
        Best on held-out rows, where more components are not always better.
    baseline : array_like of the same length, optional
        The same for PCA, or for the baseline that `baseline_name` names.
    ax : matplotlib.axes.Axes, optional
    elbow : int, optional
        One of `n_components`, to be marked.
    ylabel, baseline_name : str

    Returns
    -------
    matplotlib.axes.Axes

    Examples
    --------
    >>> from narrows.plotting import plot_elbow
    >>> ax = plot_elbow([2, 4, 8], [3.0, 1.2, 1.0], [4.0, 2.0, 1.5], elbow=4)
    >>> ax.get_xlabel()
    'latent components'
    """
    sizes = [int(size) for size in n_components]
    if not sizes or min(sizes) < 1:
        raise ValueError(f"n_components={n_components!r} must be one or more integers of at least 1")
    curves: dict[str, tuple[npt.NDArray[np.float64], str, Any, str]] = {"autoencoder": (floats(losses), BLUE, "-", "o")}
    if baseline is not None:
        curves[baseline_name] = (floats(baseline), GREEN, (0, (4, 2)), "s")
    for name, (values, *_) in curves.items():
        if values.shape != (len(sizes),):
            raise ValueError(f"{name} has {values.size} values for {len(sizes)} numbers of components")
    if elbow is not None and elbow not in sizes:
        raise ValueError(f"elbow={elbow} must be one of n_components={sizes}")
    ax = axes_or_new(ax)
    for name, (values, colour, dashes, marker) in curves.items():
        ax.plot(sizes, values, color=colour, lw=1.8, ls=dashes, marker=marker, ms=5, label=name)
    if elbow is not None:
        at = curves["autoencoder"][0][sizes.index(elbow)]
        ax.plot(elbow, at, "o", ms=11, mfc="none", mec=ORANGE, mew=1.8, zorder=3)
        # The curve falls, so there is room below it on the left, and above it on the right if PCA is below.
        below = baseline is None or not curves[baseline_name][0][sizes.index(elbow)] < at
        ax.annotate(
            f"elbow: {elbow}",
            (elbow, at),
            xytext=(-9, -9) if below else (9, 9),
            textcoords="offset points",
            ha="right" if below else "left",
            va="top" if below else "bottom",
            fontsize=9,
            color=INK,
        )
    ax.set_xscale("log", base=2)
    ax.set_xticks(sizes, [str(size) for size in sizes])
    ax.set_xticks([], minor=True)
    if len(sizes) == 1:
        ax.set_xlim(sizes[0] / 2, sizes[0] * 2)
    ax.set(xlabel="latent components", ylabel=ylabel, title="Elbow of the bottleneck")
    if len(curves) > 1:
        legend_above(ax)
    return dress(ax)


def plot_row_losses(
    edges: Sequence[float],
    model: Sequence[float],
    baseline: Sequence[float],
    ax: Axes | None = None,
    *,
    baseline_name: str = "baseline",
) -> Axes:
    """Histograms of the loss per row, of a model and of a baseline.

    Parameters
    ----------
    edges : sequence of float
        Borders of the bins, one more than bins.
    model, baseline : sequence of float
        Number of rows per bin.
    ax : matplotlib.axes.Axes, optional
    baseline_name : str

    Returns
    -------
    matplotlib.axes.Axes

    Examples
    --------
    >>> from narrows.plotting import plot_row_losses
    >>> plot_row_losses([0, 10, 20], [5, 1], [2, 4]).get_xlabel()
    'nats per row'
    """
    ax = axes_or_new(ax)
    ax.stairs(baseline, edges, color=GREEN, lw=1.5, ls=(0, (4, 2)), label=baseline_name)
    ax.stairs(model, edges, color=BLUE, alpha=0.35, fill=True)
    ax.stairs(model, edges, color=BLUE, lw=1.5, label="autoencoder")
    ax.set(xlabel="nats per row", ylabel="rows", title="Loss per row")
    ax.locator_params(axis="y", integer=True)
    legend_above(ax)
    return dress(ax)


def plot_latent(codes: npt.ArrayLike, labels: npt.ArrayLike | None = None, ax: Axes | None = None) -> Axes:
    """The latent codes as points. More than two components are projected on their first two principal axes.

    Parameters
    ----------
    codes : array_like of shape (n_samples, n_components)
        One component gives a histogram.
    labels : array_like of shape (n_samples,), optional
        Classes get distinct colours, and distinct markers from the ninth on. Floats get a colour scale.
    ax : matplotlib.axes.Axes, optional

    Returns
    -------
    matplotlib.axes.Axes

    Examples
    --------
    >>> import numpy as np
    >>> from narrows.plotting import plot_latent
    >>> codes = np.random.default_rng(0).normal(size=(30, 2))
    >>> plot_latent(codes, ["left", "right"] * 15).get_xlabel()
    'latent 1'
    """
    codes = np.asarray(codes, dtype=np.float64)
    if codes.ndim != 2 or codes.shape[0] < 1 or codes.shape[1] < 1:
        raise ValueError(f"codes must be a non-empty table of samples and components, got shape {codes.shape}")
    values = None if labels is None else np.asarray(labels)
    if values is not None and values.shape != (len(codes),):
        raise ValueError(f"labels has shape {values.shape} for {len(codes)} codes")
    ax = axes_or_new(ax)
    points, names = _two_axes(codes)
    if points.shape[1] == 1:
        groups = [(None, slice(None))] if values is None else [(c, values == c) for c in np.unique(values)]
        edges = np.histogram_bin_edges(points[:, 0], bins="auto" if len(points) < 10**5 else 200).tolist()
        for i, (name, mask) in enumerate(groups):
            ax.hist(points[mask, 0], edges, color=PALETTE[i % 8], alpha=0.65, label=literal(name))
        ax.set(xlabel=names[0], ylabel="samples")
        if values is not None:
            side_legend(ax, len(groups))
    else:
        _scatter(ax, points, values)
        ax.set(xlabel=names[0], ylabel=names[1], aspect="auto")
    ax.set_title("Latent space")
    return dress(ax)


def plot_feature_errors(
    errors: npt.ArrayLike,
    names: Sequence[str] | npt.NDArray[Any] | None = None,
    top: int = 20,
    ax: Axes | None = None,
    *,
    mean: float | None = None,
) -> Axes:
    """The features with the largest reconstruction error, as bars.

    Parameters
    ----------
    errors : array_like of shape (n_features,)
        For example the result of ``feature_errors`` of an estimator.
    names : sequence of str, optional
        Names of the features; their numbers by default.
    top : int
        Number of features to show.
    ax : matplotlib.axes.Axes, optional
    mean : float, optional
        The mean over all features, if `errors` holds only some of them.

    Returns
    -------
    matplotlib.axes.Axes

    Examples
    --------
    >>> from narrows.plotting import plot_feature_errors
    >>> ax = plot_feature_errors([0.1, 0.5, 0.3], ["a", "b", "c"], top=2)
    >>> [label.get_text() for label in ax.get_yticklabels()]
    ['b', 'c']
    """
    values = floats(errors)
    if values.ndim != 1 or not values.size:
        raise ValueError(f"errors must have one value per feature, got shape {values.shape}")
    worst = np.argsort(-np.nan_to_num(values, nan=-np.inf), kind="stable")[:top]
    labels = _feature_labels(names, worst, len(values), top)
    ax = axes_or_new(ax)
    places = np.arange(len(worst))
    ax.barh(places, values[worst], color=BLUE, height=0.72)
    mean = float(np.nanmean(values)) if mean is None else mean
    ax.axvline(mean, color=ORANGE, lw=1.5, ls=(0, (4, 2)), label="mean of all features")
    ax.set_yticks(places, labels, fontsize=8.5)
    ax.set_ylim(len(worst) - 0.4, -0.6)
    ax.set(xlabel="mean squared error", title="Worst-reconstructed features")
    legend_above(ax)
    dress(ax)
    ax.grid(False, axis="y")
    ax.tick_params(axis="y", length=0)
    return ax


def plot_sensitivity(
    sensitivity: npt.ArrayLike,
    names: Sequence[str] | npt.NDArray[Any] | None = None,
    top: int = 30,
    ax: Axes | None = None,
) -> Axes:
    """A heat map of the effect of each latent (column) on each feature (row).

    Parameters
    ----------
    sensitivity : array_like of shape (n_components, n_features)
        The result of ``latent_sensitivity`` of an estimator.
    names : sequence of str, optional
        Names of the features; their numbers by default.
    top : int
        Number of features to show: the most sensitive ones, grouped by the latent with the largest effect.
    ax : matplotlib.axes.Axes, optional

    Returns
    -------
    matplotlib.axes.Axes

    Examples
    --------
    >>> import numpy as np
    >>> from narrows.plotting import plot_sensitivity
    >>> plot_sensitivity(np.random.default_rng(0).random((3, 10)), top=5).get_xlabel()
    'latent'
    """
    table = np.asarray(sensitivity, dtype=np.float64)
    if table.ndim != 2 or not table.size:
        raise ValueError(f"sensitivity must be a table of latents and features, got shape {table.shape}")
    n_latents, n_features = table.shape
    most = table.max(axis=0)
    kept = np.argsort(-most, kind="stable")[:top]
    kept = kept[np.lexsort((-most[kept], table[:, kept].argmax(axis=0)))]
    labels = _feature_labels(names, kept, n_features, top)
    ax = axes_or_new(ax, np.clip(2.6 + 0.28 * n_latents, 4.5, 11.0), np.clip(1.3 + 0.19 * len(kept), 3.0, 8.0))
    drawn = ax.imshow(table[:, kept].T, cmap="Blues", vmin=0.0, aspect="auto", interpolation="nearest")
    bar = ax.figure.colorbar(drawn, ax=ax, label="mean |d feature / d latent|", fraction=0.04, pad=0.02)
    bar.outline.set_visible(False)
    step = -(-n_latents // 32)
    ax.set_xticks(np.arange(0, n_latents, step), [str(i) for i in range(0, n_latents, step)], fontsize=8.5)
    ax.set_yticks(np.arange(len(kept)) if len(kept) <= 40 else [], labels if len(kept) <= 40 else [], fontsize=8.5)
    ax.set(xlabel="latent", ylabel="" if len(kept) <= 40 else "feature")
    ax.set_title("Latent sensitivity" if len(kept) == n_features else f"Latent sensitivity, {len(kept)} features")
    dress(ax)
    ax.grid(False)
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)
    return ax


def _feature_labels(names: Any, chosen: npt.NDArray[np.intp], n_features: int, top: int) -> list[str]:
    """Labels of the `chosen` features: their names, or their numbers.

    Raises
    ------
    ValueError
        `names` does not name every feature, or `top` is not positive.
    """
    if names is not None and len(names) != n_features:
        raise ValueError(f"names has {len(names)} entries for {n_features} features")
    if top < 1:
        raise ValueError(f"top must be at least 1, got {top}")
    return [f"feature {i}" if names is None else literal(names[i]) for i in chosen]


def _two_axes(codes: npt.NDArray[np.float64]) -> tuple[npt.NDArray[np.float64], list[str]]:
    n_components = codes.shape[1]
    if n_components <= 2:
        return codes, [f"latent {i + 1}" for i in range(n_components)]
    centred = codes - codes.mean(axis=0)
    variance, axes = np.linalg.eigh(centred.T @ centred)
    share = 100 * variance[::-1] / max(float(variance.sum()), np.finfo(float).tiny)
    # The sign of an axis is arbitrary. The larger side is drawn as positive, so that two runs look alike.
    axes = axes[:, ::-1][:, :2]
    axes = axes * np.where(axes[np.abs(axes).argmax(axis=0), [0, 1]] < 0, -1.0, 1.0)
    return centred @ axes, [f"latent principal axis {i + 1} ({share[i]:.0f} % of variance)" for i in range(2)]


def _scatter(ax: Axes, points: npt.NDArray[np.float64], values: npt.NDArray[Any] | None) -> None:
    n = len(points)
    size = float(np.clip(20000 / n, 5, 30))
    style: dict[str, Any] = {"s": size, "linewidths": 0, "alpha": 0.8, "rasterized": n > _RASTER_POINTS}
    if values is None:
        ax.scatter(points[:, 0], points[:, 1], color=BLUE, **style)
        return
    if values.dtype.kind == "f" and len(np.unique(values)) > len(PALETTE):
        drawn = ax.scatter(points[:, 0], points[:, 1], c=values, cmap="viridis", **style)
        ax.figure.colorbar(drawn, ax=ax, label="label")
        return
    classes, inverse = np.unique(values.astype(str) if values.dtype.kind == "O" else values, return_inverse=True)
    for i, name in enumerate(classes):
        mask = inverse == i
        marker = _MARKERS[(i // len(PALETTE)) % len(_MARKERS)]
        colour = PALETTE[i % len(PALETTE)]
        ax.scatter(*points[mask].T, color=colour, marker=marker, label=literal(name), **style)
    side_legend(ax, len(classes))
