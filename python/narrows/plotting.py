"""The figures of a fit: loss curves, latent space, worst-reconstructed features, latent traversals.

- Every function draws on the `Axes` it is given, or on a new figure of its own, and returns the `Axes`; none
  calls ``show``, touches ``pyplot`` or changes matplotlib's settings.
- Colours are those of Okabe and Ito (the yellow darkened for white paper), which stay apart under the common
  kinds of colour blindness.
- matplotlib is imported on the first call; without it the error names the extra to install.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ._extras import require

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_feature_errors", "plot_latent", "plot_latent_traversal", "plot_loss"]

BLUE, ORANGE, GREEN = "#0072B2", "#E69F00", "#009E73"
PALETTE = (BLUE, ORANGE, GREEN, "#CC79A7", "#56B4E9", "#D55E00", "#5C5C5C", "#E0D000")
INK, GRID = "#33383d", "#e3e6e9"
_MARKERS = "os^Dv"
_MAX_LEGEND = 24
#: Above this many points they become pixels inside a vector figure, which would grow to megabytes otherwise.
_RASTER_POINTS = 2000


def plot_loss(history: Any, ax: Axes | None = None) -> Axes:
    """Training and validation loss against the epoch.

    Parameters
    ----------
    history : fitted estimator, or mapping of str to sequence of float
        ``history_`` of an estimator: ``loss`` and, if present, ``val_loss``, one value per epoch. Of a variational
        one, the training curve is that of ``objective``, with which ``val_loss`` is to be compared.
    ax : matplotlib.axes.Axes, optional

    Returns
    -------
    matplotlib.axes.Axes
    """
    history = getattr(history, "history_", history)
    if not isinstance(history, Mapping) or "loss" not in history:
        raise TypeError("history must be a fitted estimator or a mapping with the key 'loss'")
    ax = _axes(ax)
    loss = _floats(history.get("objective") or history["loss"])
    validation = _floats(history.get("val_loss") or [])
    epochs = np.arange(1, len(loss) + 1)
    few = "o" if len(loss) < 15 else None
    ax.plot(epochs, loss, color=BLUE, lw=1.8, marker=few, ms=4, label="training")
    if np.isfinite(validation).any():
        at = np.arange(1, len(validation) + 1)
        ax.plot(at, validation, color=ORANGE, lw=1.8, marker=few, ms=4, label="validation")
        best = int(np.nanargmin(validation))
        ax.plot(best + 1, validation[best], "o", ms=7, mfc="white", mec=ORANGE, mew=1.8, zorder=3)
        ax.annotate(
            f"best: {validation[best]:.4g}\n(epoch {best + 1})",
            (best + 1, validation[best]),
            xytext=(0, 14),
            textcoords="offset points",
            ha="right" if best > len(loss) / 2 else "left",
            va="bottom",
            fontsize=9,
            color=INK,
        )
        ax.legend(frameon=False, loc="upper right")
    shown = np.concatenate([loss, validation])
    shown = shown[np.isfinite(shown)]
    if shown.size and shown.min() > 0 and shown.max() > 20 * shown.min():
        ax.set_yscale("log")
    ax.locator_params(axis="x", integer=True)
    ax.set(xlabel="epoch", ylabel="loss (mean over samples)", title="Loss")
    return _dress(ax)


def plot_latent(codes: npt.ArrayLike, labels: npt.ArrayLike | None = None, ax: Axes | None = None) -> Axes:
    """The latent codes as points; more than two components are shown along their first two principal axes.

    Parameters
    ----------
    codes : array_like of shape (n_samples, n_components)
        A single component is drawn as a histogram.
    labels : array_like of shape (n_samples,), optional
        Classes, drawn in distinct colours (and marks beyond eight); floats are drawn on a colour scale.
    ax : matplotlib.axes.Axes, optional

    Returns
    -------
    matplotlib.axes.Axes
    """
    codes = np.asarray(codes, dtype=np.float64)
    if codes.ndim != 2 or codes.shape[0] < 1 or codes.shape[1] < 1:
        raise ValueError(f"codes must be a non-empty table of samples and components, got shape {codes.shape}")
    values = None if labels is None else np.asarray(labels)
    if values is not None and values.shape != (len(codes),):
        raise ValueError(f"labels has shape {values.shape} for {len(codes)} codes")
    ax = _axes(ax)
    points, names = _two_axes(codes)
    if points.shape[1] == 1:
        groups = [(None, slice(None))] if values is None else [(c, values == c) for c in np.unique(values)]
        edges = np.histogram_bin_edges(points[:, 0], bins="auto" if len(points) < 10**5 else 200).tolist()
        for i, (name, mask) in enumerate(groups):
            ax.hist(points[mask, 0], edges, color=PALETTE[i % 8], alpha=0.65, label=_text(name))
        ax.set(xlabel=names[0], ylabel="samples")
        if values is not None:
            _legend(ax, len(groups))
    else:
        _scatter(ax, points, values)
        ax.set(xlabel=names[0], ylabel=names[1], aspect="auto")
    ax.set_title("Latent space")
    return _dress(ax)


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
        For example what ``feature_errors`` of an estimator returns.
    names : sequence of str, optional
        Names of the features; default: their numbers.
    top : int
        How many to show.
    ax : matplotlib.axes.Axes, optional
    mean : float, optional
        The mean over all features, where `errors` holds only some of them.

    Returns
    -------
    matplotlib.axes.Axes
    """
    values = _floats(errors)
    if values.ndim != 1 or not values.size:
        raise ValueError(f"errors must have one value per feature, got shape {values.shape}")
    if names is not None and len(names) != len(values):
        raise ValueError(f"names has {len(names)} entries for {len(values)} features")
    if top < 1:
        raise ValueError(f"top must be at least 1, got {top}")
    ax = _axes(ax)
    worst = np.argsort(-np.nan_to_num(values, nan=-np.inf), kind="stable")[:top]
    labels = [_text(names[i]) if names is not None else f"feature {i}" for i in worst]
    places = np.arange(len(worst))
    ax.barh(places, values[worst], color=BLUE, height=0.72)
    mean = float(np.nanmean(values)) if mean is None else mean
    ax.axvline(mean, color=ORANGE, lw=1.5, ls=(0, (4, 2)), label="mean of all features")
    ax.legend(frameon=True, framealpha=0.9, edgecolor="none", loc="lower right", fontsize=9)
    ax.set_yticks(places, labels, fontsize=8.5)
    ax.set_ylim(len(worst) - 0.4, -0.6)
    ax.set(xlabel="mean squared error", title="Worst-reconstructed features")
    _dress(ax)
    ax.grid(False, axis="y")
    ax.tick_params(axis="y", length=0)
    return ax


def plot_latent_traversal(
    estimator: Any,
    latents: Sequence[int] | npt.NDArray[Any] | int = 8,
    *,
    image_shape: tuple[int, ...] | None = None,
    start: npt.ArrayLike | None = None,
    span: float = 3.0,
    n_steps: int = 11,
    ax: Axes | None = None,
) -> Axes:
    """What the decoder makes of codes that differ in one latent: a row of images for each latent.

    Parameters
    ----------
    estimator : fitted estimator
        Made for `VariationalAutoencoder`, whose latents have the prior N(0, 1); anything with ``inverse_transform``
        and ``n_components`` will do.
    latents : int or sequence of int
        Which latents, from the top; or how many, taken where the images change most.
    image_shape : (height, width) or (height, width, channels), optional
        Of a decoded row; a square by default.
    start : array_like of shape (n_components,), optional
        The code from which each latent departs, for example of a row to vary; the prior's mean, zero, by default.
    span : float
        How far a latent goes to both sides of `start`.
    n_steps : int
        Images in a row.
    ax : matplotlib.axes.Axes, optional

    Returns
    -------
    matplotlib.axes.Axes
    """
    k = int(estimator.n_components)
    if isinstance(latents, int | np.integer):
        chosen, count = None, int(latents)
    else:
        chosen = [int(i) for i in latents]
        count = len(chosen)
    if count < 1:
        raise ValueError(f"latents={latents!r}: at least one is needed")
    for i in chosen or ():
        if not 0 <= i < k:
            raise ValueError(f"latents: there is no latent {i}; n_components={k} are numbered from 0")
    if not span > 0 or n_steps < 2:
        raise ValueError(f"span={span!r} must be positive and n_steps={n_steps!r} at least 2")
    centre = np.zeros(k) if start is None else np.asarray(start, dtype=np.float64)
    if centre.shape != (k,):
        raise ValueError(f"start has shape {centre.shape}, expected ({k},): one value for each latent")
    offsets = np.linspace(-span, span, n_steps)
    tried = list(range(k)) if chosen is None else chosen
    codes = np.tile(centre, (len(tried), n_steps, 1))
    codes[np.arange(len(tried)), :, tried] += offsets
    rows = np.asarray(estimator.inverse_transform(codes.reshape(-1, k)), dtype=np.float64)
    rows = rows.reshape(len(tried), n_steps, -1)
    shape = _image_shape(image_shape, rows.shape[2])
    if chosen is None:
        order = np.argsort(-rows.std(axis=1).mean(axis=1), kind="stable")[:count]
        rows, tried = rows[order], [tried[i] for i in order]
    ax = (
        new_figure(0.55 * n_steps + 1.0, 0.55 * len(tried) * shape[0] / shape[1] + 1.1).subplots() if ax is None else ax
    )
    height, width, gap = shape[0], shape[1], max(1, shape[1] // 14)
    low, high = float(rows.min()), float(rows.max())
    canvas = np.full((len(tried) * (height + gap) - gap, n_steps * (width + gap) - gap, *shape[2:]), np.nan)
    for i, j in np.ndindex(len(tried), n_steps):
        top, left = i * (height + gap), j * (width + gap)
        canvas[top : top + height, left : left + width] = rows[i, j].reshape(shape)
    if len(shape) == 3:
        scaled = np.clip((canvas - low) / max(high - low, np.finfo(float).tiny), 0, 1)
        ax.imshow(np.where(np.isnan(scaled), 1.0, scaled), interpolation="nearest")
    else:
        ax.imshow(canvas, cmap="gray", vmin=low, vmax=high, interpolation="nearest")
    shown = offsets[:: max(1, -(-n_steps // 11))]
    places = np.flatnonzero(np.isin(offsets, shown)) * (width + gap) + (width - 1) / 2
    ax.set_xticks(places, [f"{v:+.2g}" if abs(v) > 1e-12 else "0" for v in shown])
    ax.set_yticks(np.arange(len(tried)) * (height + gap) + (height - 1) / 2, [str(i) for i in tried])
    ax.set(xlabel="value of the latent" if start is None else "change of the latent", ylabel="latent")
    ax.set_title("Latent traversal")
    _dress(ax)
    ax.grid(False)
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)
    return ax


def new_figure(width: float = 6.4, height: float = 4.2) -> Any:
    """A matplotlib Figure of its own, in no window and known to no global registry (inches)."""
    require("matplotlib", "plot", "plotting")
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _axes(ax: Axes | None) -> Axes:
    if ax is not None:
        return ax
    made: Axes = new_figure().subplots()
    return made


def _dress(ax: Axes) -> Axes:
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(INK)
    ax.tick_params(colors=INK)
    ax.grid(True, color=GRID, lw=0.8)
    ax.set_axisbelow(True)
    ax.title.set(fontsize=12, fontweight="bold", color=INK)
    for label in (ax.xaxis.label, ax.yaxis.label):
        label.set_color(INK)
    return ax


def _image_shape(shape: tuple[int, ...] | None, n_features: int) -> tuple[int, ...]:
    if shape is None:
        side = round(n_features**0.5)
        if side * side != n_features:
            raise ValueError(f"{n_features} features make no square image: give image_shape=(height, width)")
        return side, side
    shape = tuple(int(n) for n in shape)
    if len(shape) not in (2, 3) or min(shape) < 1 or int(np.prod(shape)) != n_features:
        raise ValueError(f"image_shape={shape} does not hold the {n_features} features of a decoded row")
    if len(shape) == 3 and shape[2] not in (1, 3, 4):
        raise ValueError(f"image_shape={shape}: images have 1, 3 or 4 channels")
    return shape[:2] if len(shape) == 3 and shape[2] == 1 else shape


def _floats(values: Any) -> npt.NDArray[np.float64]:
    """Numbers with None, as JSON has it, for a missing one."""
    return np.asarray([np.nan if v is None else v for v in values], dtype=np.float64)


def _text(value: Any) -> str:
    """A label that matplotlib takes literally: "$" starts mathematics, a leading "_" hides it."""
    text = str(value)
    text = text if len(text) <= 28 else text[:26] + "…"
    return ("\u2009" if text.startswith("_") else "") + text.replace("$", r"\$")


def _two_axes(codes: npt.NDArray[np.float64]) -> tuple[npt.NDArray[np.float64], list[str]]:
    n_components = codes.shape[1]
    if n_components <= 2:
        return codes, [f"latent {i + 1}" for i in range(n_components)]
    centred = codes - codes.mean(axis=0)
    variance, axes = np.linalg.eigh(centred.T @ centred)
    share = 100 * variance[::-1] / max(float(variance.sum()), np.finfo(float).tiny)
    # The sign of an axis is arbitrary; the larger side is shown positive so that two runs look alike.
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
        ax.scatter(*points[mask].T, color=colour, marker=marker, label=_text(name), **style)
    _legend(ax, len(classes))


def _legend(ax: Axes, n: int) -> None:
    handles, names = ax.get_legend_handles_labels()
    if n > _MAX_LEGEND:
        handles, names = handles[:_MAX_LEGEND], [*names[: _MAX_LEGEND - 1], f"… {n - _MAX_LEGEND + 1} more"]
    legend = ax.legend(
        handles,
        names,
        frameon=False,
        loc="upper left",
        bbox_to_anchor=(1.0, 1.0),
        fontsize=8.5,
        handletextpad=0.3,
        borderaxespad=0.2,
    )
    for handle in legend.legend_handles:
        if handle is not None and hasattr(handle, "set_sizes"):
            handle.set_alpha(1)
            handle.set_sizes([28])
