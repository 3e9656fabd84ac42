"""Rows as pictures: originals and reconstructions, filters, latent traversals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from .style import INK, ORANGE, dress, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_latent_traversal(
    estimator: Any,
    latents: Sequence[int] | npt.NDArray[Any] | int = 8,
    *,
    image_shape: tuple[int, ...] | None = None,
    start: npt.ArrayLike | None = None,
    span: float = 3.0,
    n_steps: int = 11,
    batch: Any = None,
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
    batch : str or int, optional
        The batch that all codes are decoded for, after a fit with batches.
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
    told = {} if batch is None else {"batch": batch}
    rows = np.asarray(estimator.inverse_transform(codes.reshape(-1, k), **told), dtype=np.float64)
    rows = rows.reshape(len(tried), n_steps, -1)
    shape = _image_shape(image_shape, rows.shape[2])
    if chosen is None:
        order = np.argsort(-rows.std(axis=1).mean(axis=1), kind="stable")[:count]
        rows, tried = rows[order], [tried[i] for i in order]
    if ax is None:
        ax = new_figure(0.55 * n_steps + 1.0, 0.55 * len(tried) * shape[0] / shape[1] + 1.1).subplots()
    images = rows.reshape(len(tried), n_steps, *shape)
    across, down = _show_grid(ax, images, float(rows.min()), float(rows.max()))
    shown = offsets[:: max(1, -(-n_steps // 11))]
    ax.set_xticks(across[np.isin(offsets, shown)], [f"{v:+.2g}" if abs(v) > 1e-12 else "0" for v in shown])
    ax.set_yticks(down, [str(i) for i in tried])
    ax.set(xlabel="value of the latent" if start is None else "change of the latent", ylabel="latent")
    ax.set_title("Latent traversal")
    return _undress(ax)


def plot_reconstructions(
    originals: Any,
    reconstructions: Any,
    *,
    noisy: Any = None,
    image_shape: tuple[int, ...] | None = None,
    n: int = 10,
    ax: Axes | None = None,
) -> Axes:
    """Rows beside what an autoencoder makes of them.

    Images stand in columns: original, noisy input, reconstruction, on the grey scale or in the colours of the
    originals. Signals are drawn as curves over each other, one strip for each row.

    Parameters
    ----------
    originals, reconstructions : array_like of shape (n_samples, n_features) or (n_samples, height, width[, channels])
    noisy : array_like of the same shape, optional
        What the reconstructions were made from, if not the originals.
    image_shape : (height, width), (height, width, channels) or (length,), optional
        Of a row; ``(length,)`` stands for a signal. By default what the shape of the arrays says; for rows of features
        a square image, or a signal where their number is no square.
    n : int
        How many to draw at most, from the top.
    ax : matplotlib.axes.Axes, optional

    Returns
    -------
    matplotlib.axes.Axes
    """
    if n < 1:
        raise ValueError(f"n={n!r}: at least one row is needed")
    named = {"original": originals, "noisy": noisy, "reconstruction": reconstructions}
    arrays = {name: np.asarray(rows, dtype=np.float64) for name, rows in named.items() if rows is not None}
    first = arrays["original"]
    if first.ndim < 2 or not first.size:
        raise ValueError(f"originals must be a non-empty table of rows or of images, got shape {first.shape}")
    if image_shape is None and first.ndim > 2:
        image_shape = first.shape[1:]
    rows = {}
    for name, array in arrays.items():
        rows[name] = array.reshape(len(array), -1)[:n]
        if array.shape[0] != first.shape[0] or rows[name].shape != rows["original"].shape:
            raise ValueError(f"{name} has shape {array.shape}, the originals {first.shape}")
    n_features = rows["original"].shape[1]
    signal = (image_shape is None and round(n_features**0.5) ** 2 != n_features) or len(image_shape or (1, 1)) == 1
    if signal:
        if image_shape is not None and image_shape[0] != n_features:
            raise ValueError(f"image_shape={image_shape} does not hold the {n_features} features of a row")
        return _signals(rows, ax)
    shape = _image_shape(image_shape, n_features)
    count = len(rows["original"])
    if ax is None:
        cell = min(1.0, 12.0 / count)
        ax = new_figure(cell * count + 1.2, cell * len(rows) * shape[0] / shape[1] + 0.4).subplots()
    low, high = float(rows["original"].min()), float(rows["original"].max())
    images = np.stack([each.reshape(count, *shape) for each in rows.values()])
    _, down = _show_grid(ax, images, low, high)
    ax.set_xticks([])
    ax.set_yticks(down, list(rows))
    ax.set_title("Reconstructions")
    return _undress(ax)


def _signals(rows: dict[str, npt.NDArray[np.float64]], ax: Axes | None) -> Axes:
    """Curves of each row over each other, one strip below the other on a common scale."""
    originals = rows["original"]
    count, length = originals.shape
    ax = new_figure(8.0, 0.75 * count + 1.2).subplots() if ax is None else ax
    looks: dict[str, dict[str, Any]] = {
        "noisy": {"color": "#b8bfc6", "lw": 0.9},
        "original": {"color": INK, "lw": 1.4},
        "reconstruction": {"color": ORANGE, "lw": 1.4},
    }
    everything = np.concatenate([each.ravel() for each in rows.values()])
    strip = 1.1 * max(float(np.ptp(everything)), np.finfo(float).tiny)
    middle = (float(everything.min()) + float(everything.max())) / 2
    for name, look in looks.items():
        for i, row in enumerate(rows.get(name, ())):
            ax.plot(np.arange(length), row - middle - i * strip, label=name if i == 0 else None, **look)
    ax.set_yticks(-np.arange(count) * strip, [str(i) for i in range(count)])
    ax.set_ylim(-(count - 0.5) * strip, 0.5 * strip)
    ax.set_xlim(0, max(1, length - 1))
    ax.legend(frameon=False, loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=3, fontsize=9, borderaxespad=0.1)
    ax.set(xlabel="feature", ylabel="row")
    ax.set_title("Reconstructions", loc="left", fontsize=12, fontweight="bold", color=INK)
    dress(ax)
    ax.grid(False, axis="y")
    ax.spines["left"].set_visible(False)
    ax.tick_params(axis="y", length=0)
    return ax


def plot_filters(
    weights: Any, *, image_shape: tuple[int, ...] | None = None, n: int = 64, ax: Axes | None = None
) -> Axes:
    """What the units of the first layer look for: their weights as images, the largest first.

    Parameters
    ----------
    weights : fitted estimator, or array_like of shape (n_features, n_units)
        Of an estimator, the first of ``coefs_``.
    image_shape : (height, width) or (height, width, channels), optional
        Of a row of the data; a square by default.
    n : int
        How many units to draw at most: those of the largest weights, in the Euclidean norm.
    ax : matplotlib.axes.Axes, optional

    Returns
    -------
    matplotlib.axes.Axes
        Zero is the middle of the scale, and each unit has a scale of its own: lighter is positive.
    """
    coefs = getattr(weights, "coefs_", None)
    W = np.asarray(weights if coefs is None else coefs[0], dtype=np.float64)
    if W.ndim != 2 or not W.size:
        raise ValueError(f"weights must have one column for each unit, got shape {W.shape}")
    if n < 1:
        raise ValueError(f"n={n!r}: at least one unit is needed")
    shape = _image_shape(image_shape, W.shape[0])
    kept = np.argsort(-(W**2).sum(axis=0), kind="stable")[:n]
    columns = int(np.ceil(np.sqrt(len(kept) * shape[0] / shape[1])))
    lines = -(-len(kept) // columns)
    largest = np.maximum(np.abs(W[:, kept]).max(axis=0), np.finfo(float).tiny)
    images = np.full((lines * columns, *shape), np.nan)
    images[: len(kept)] = (0.5 + 0.5 * W[:, kept] / largest).T.reshape(len(kept), *shape)
    ax = new_figure(5.2, 5.2 * lines * shape[0] / (columns * shape[1]) + 0.4).subplots() if ax is None else ax
    _show_grid(ax, images.reshape(lines, columns, *shape), 0.0, 1.0)
    ax.set_xticks([])
    ax.set_yticks([])
    ax.set_title("Filters of the first layer" if len(kept) == W.shape[1] else f"{len(kept)} of {W.shape[1]} filters")
    return _undress(ax)


def _show_grid(
    ax: Axes, images: npt.NDArray[np.float64], low: float, high: float
) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Draw images (lines, columns, height, width[, channels]) with gaps, from black at `low` to white at `high`.

    NaN is paper; in colour, `low` and `high` are those of each channel.

    Returns
    -------
    across, down : ndarray
        The middles of columns and lines in data coordinates.
    """
    lines, columns, height, width = images.shape[:4]
    gap = max(1, width // 14)
    canvas = np.full((lines * (height + gap) - gap, columns * (width + gap) - gap, *images.shape[4:]), np.nan)
    for i, j in np.ndindex(lines, columns):
        top, left = i * (height + gap), j * (width + gap)
        canvas[top : top + height, left : left + width] = images[i, j]
    if canvas.ndim == 3:
        scaled = np.clip((canvas - low) / max(high - low, np.finfo(float).tiny), 0.0, 1.0)
        ax.imshow(np.where(np.isnan(scaled), 1.0, scaled), interpolation="nearest")
    else:
        ax.imshow(canvas, cmap="gray", vmin=low, vmax=high, interpolation="nearest")
    return np.arange(columns) * (width + gap) + (width - 1) / 2, np.arange(lines) * (height + gap) + (height - 1) / 2


def _undress(ax: Axes) -> Axes:
    dress(ax)
    ax.grid(False)
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)
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
