"""Rows drawn as images or signals: reconstructions, filters, latent traversals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from .style import INK, ORANGE, axes_or_new, dress

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
    """Decoded images of codes that differ in one latent: a row of images for each latent.

    Parameters
    ----------
    estimator : fitted estimator
        Best a `VariationalAutoencoder`, whose latents have the prior N(0, 1). Any object with ``inverse_transform`` and
        ``n_components`` works.
    latents : int or sequence of int
        The latents to draw, from the top; or their number, to draw those that change the images most.
    image_shape : (height, width) or (height, width, channels), optional
        Shape of a decoded row; by default that of a `ConvAutoencoder`'s images, or else a square.
    start : array_like of shape (n_components,), optional
        The code that the latents vary around; by default zero, the mean of the prior.
    span : float
        The largest change of a latent, in both directions.
    n_steps : int
        Number of images per latent.
    batch : str or int, optional
        The batch label for decoding, after a fit with batches.
    ax : matplotlib.axes.Axes, optional

    Returns
    -------
    matplotlib.axes.Axes

    Examples
    --------
    >>> import numpy as np
    >>> from narrows import Autoencoder
    >>> from narrows.plotting import plot_latent_traversal
    >>> ae = Autoencoder(3, max_iter=1, random_state=0).fit(np.random.default_rng(0).random((60, 16)))
    >>> plot_latent_traversal(ae, latents=2, n_steps=5).get_ylabel()
    'latent'
    """
    k = int(estimator.n_components)
    if isinstance(latents, int | np.integer):
        chosen, count = None, int(latents)
    else:
        chosen = [int(i) for i in latents]
        count = len(chosen)
    if count < 1:
        raise ValueError(f"latents={latents!r} must name at least one latent")
    for i in chosen or ():
        if not 0 <= i < k:
            raise ValueError(f"latents: {i} is outside 0..{k - 1}, the latents of this model")
    if not span > 0 or n_steps < 2:
        raise ValueError(f"span={span!r} must be positive and n_steps={n_steps!r} at least 2")
    centre = np.zeros(k) if start is None else np.asarray(start, dtype=np.float64)
    if centre.shape != (k,):
        raise ValueError(f"start must have shape ({k},), one value per latent; it has shape {centre.shape}")
    offsets = np.linspace(-span, span, n_steps)
    tried = list(range(k)) if chosen is None else chosen
    codes = np.tile(centre, (len(tried), n_steps, 1))
    codes[np.arange(len(tried)), :, tried] += offsets
    label = {} if batch is None else {"batch": batch}
    rows = np.asarray(estimator.inverse_transform(codes.reshape(-1, k), **label), dtype=np.float64)
    rows = rows.reshape(len(tried), n_steps, -1)
    known: tuple[int, ...] = getattr(estimator, "image_shape_", ())
    if image_shape is None and len(known) == 3 and known[2] in (1, 3):
        image_shape = known
    shape = _image_shape(image_shape, rows.shape[2])
    if chosen is None:
        order = np.argsort(-rows.std(axis=1).mean(axis=1), kind="stable")[:count]
        rows, tried = rows[order], [tried[i] for i in order]
    ax = axes_or_new(ax, 0.55 * n_steps + 1.0, 0.55 * len(tried) * shape[0] / shape[1] + 1.1)
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
    """Rows beside their reconstructions.

    Images form columns of original, noisy input and reconstruction, on the scale of the originals. Each signal is a
    strip of curves.

    Parameters
    ----------
    originals, reconstructions : array_like of shape (n_samples, n_features) or (n_samples, height, width[, channels])
    noisy : array_like of the same shape, optional
        The input of the reconstructions, if it was not the originals.
    image_shape : (height, width), (height, width, channels) or (length,), optional
        Shape of a row; ``(length,)`` means a signal. By default the shape of the arrays; for rows of features a square
        image, or a signal if their number is not a square.
    n : int
        Largest number of rows to draw.
    ax : matplotlib.axes.Axes, optional

    Returns
    -------
    matplotlib.axes.Axes

    Examples
    --------
    >>> import numpy as np
    >>> from narrows.plotting import plot_reconstructions
    >>> images = np.random.default_rng(0).random((5, 16))
    >>> [label.get_text() for label in plot_reconstructions(images, 0.9 * images).get_yticklabels()]
    ['original', 'reconstruction']
    """
    if n < 1:
        raise ValueError(f"n={n!r} must be at least 1")
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
            raise ValueError(f"{name} has shape {array.shape}, originals has shape {first.shape}; they must agree")
    n_features = rows["original"].shape[1]
    signal = (image_shape is None and round(n_features**0.5) ** 2 != n_features) or len(image_shape or (1, 1)) == 1
    if signal:
        if image_shape is not None and image_shape[0] != n_features:
            raise ValueError(f"image_shape={image_shape} does not fit rows of {n_features} features")
        return _signals(rows, ax)
    shape = _image_shape(image_shape, n_features)
    count = len(rows["original"])
    cell = min(1.0, 12.0 / count)
    ax = axes_or_new(ax, cell * count + 1.2, cell * len(rows) * shape[0] / shape[1] + 0.4)
    low, high = float(rows["original"].min()), float(rows["original"].max())
    images = np.stack([each.reshape(count, *shape) for each in rows.values()])
    _, down = _show_grid(ax, images, low, high)
    ax.set_xticks([])
    ax.set_yticks(down, list(rows))
    ax.set_title("Reconstructions")
    return _undress(ax)


def _signals(rows: dict[str, npt.NDArray[np.float64]], ax: Axes | None) -> Axes:
    """Curves of each row on top of each other, one strip per row, on a common scale."""
    originals = rows["original"]
    count, length = originals.shape
    ax = axes_or_new(ax, 8.0, 0.75 * count + 1.2)
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
    """The weights of the units of the first layer as images, the largest first.

    The filters of a convolution have the shape of its kernel. Three channels are colours. Filters of other numbers of
    channels are columns, with one image for each channel. Filters of signals have a line of pixels for each channel.

    Parameters
    ----------
    weights : fitted estimator, or array_like of shape (n_features, n_units)
        For an estimator: the first of ``coefs_``. For a convolution: of shape (kernel height, kernel width, channels,
        n_units).
    image_shape : (height, width) or (height, width, channels), optional
        Shape of a row of the data; a square by default. Not for convolutions.
    n : int
        Largest number of units to draw, in the order of the norm of their weights.
    ax : matplotlib.axes.Axes, optional

    Returns
    -------
    matplotlib.axes.Axes
        Each unit has its own scale, with zero in the middle; lighter is positive.

    Examples
    --------
    >>> import numpy as np
    >>> from narrows.plotting import plot_filters
    >>> ax = plot_filters(np.random.default_rng(0).normal(size=(16, 9)))  # nine images of 4 x 4 pixels
    >>> ax.get_title()
    'Filters of the first layer'
    """
    coefs = getattr(weights, "coefs_", None)
    W = np.asarray(weights if coefs is None else coefs[0], dtype=np.float64)
    if W.ndim not in (2, 4) or not W.size:
        raise ValueError(
            f"weights must have one column per unit, or be those of a convolution in 4 dimensions, got shape {W.shape}"
        )
    if n < 1:
        raise ValueError(f"n={n!r} must be at least 1")
    layer, by_channel = "first layer", False
    if W.ndim == 2:
        shape = _image_shape(image_shape, W.shape[0])
    elif image_shape is not None:
        raise ValueError(
            f"image_shape={image_shape}: filters of a convolution have the shape of its kernel, leave it out"
        )
    else:
        layer = "first convolution"
        height, width, channels, _ = W.shape
        by_channel = height > 1 and channels not in (1, 3)
        if height == 1:
            W, shape = W[0].swapaxes(0, 1), (channels, width)
        else:
            shape = (height, width, 3) if channels == 3 else (height, width)
    units = W.reshape(-1, W.shape[-1]).T
    kept = np.argsort(-(units**2).sum(axis=1), kind="stable")[:n]
    largest = np.maximum(np.abs(units[kept]).max(axis=1, keepdims=True), np.finfo(float).tiny)
    shown = 0.5 + 0.5 * units[kept] / largest
    if by_channel:
        images = shown.reshape(len(kept), *shape, channels).transpose(3, 0, 1, 2)
    else:
        columns = min(len(kept), int(np.ceil(np.sqrt(len(kept) * shape[0] / shape[1]))))
        images = np.full((-(-len(kept) // columns), columns, *shape), np.nan)
        images.reshape(-1, *shape)[: len(kept)] = shown.reshape(len(kept), *shape)
    lines, columns = images.shape[:2]
    ax = axes_or_new(ax, 5.2, 5.2 * lines * shape[0] / (columns * shape[1]) + 0.4)
    _, down = _show_grid(ax, images, 0.0, 1.0)
    ax.set_xticks([])
    ax.set_yticks(down if by_channel else [], [str(i) for i in range(lines)] if by_channel else [])
    ax.set_ylabel("channel" if by_channel else "")
    ax.set_title(f"Filters of the {layer}" if len(kept) == len(units) else f"{len(kept)} of {len(units)} filters")
    return _undress(ax)


def _show_grid(
    ax: Axes, images: npt.NDArray[np.float64], low: float, high: float
) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Draw images (lines, columns, height, width[, channels]) with gaps, from black at `low` to white at `high`.

    NaN is white. In colour, each channel has this scale.

    Returns
    -------
    across, down : ndarray
        The centres of columns and lines in data coordinates.
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
            raise ValueError(f"{n_features} features are not a square image: give image_shape=(height, width)")
        return side, side
    shape = tuple(int(n) for n in shape)
    if len(shape) not in (2, 3) or min(shape) < 1 or int(np.prod(shape)) != n_features:
        raise ValueError(f"image_shape={shape} does not fit rows of {n_features} features")
    if len(shape) == 3 and shape[2] not in (1, 3, 4):
        raise ValueError(f"image_shape={shape}: images have 1, 3 or 4 channels")
    return shape[:2] if len(shape) == 3 and shape[2] == 1 else shape
