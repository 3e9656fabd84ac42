"""Shared by all figures: colours, new figures, plain axes, literal labels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from .._extras import require

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BLUE, ORANGE, GREEN = "#0072B2", "#E69F00", "#009E73"
PALETTE = (BLUE, ORANGE, GREEN, "#CC79A7", "#56B4E9", "#D55E00", "#5C5C5C", "#E0D000")
INK, GRID = "#33383d", "#e3e6e9"
_MAX_LEGEND = 24


def new_figure(width: float = 6.4, height: float = 4.2) -> Any:
    """A new matplotlib Figure (size in inches), without a window and outside pyplot's registry.

    Draw on its Axes where nothing shall be shown: in scripts that write files, and in threads.

    Examples
    --------
    >>> from narrows import plotting
    >>> figure = plotting.new_figure(5, 3)
    >>> ax = plotting.plot_loss({"loss": [3.0, 2.0]}, ax=figure.subplots())
    >>> figure.savefig("loss.png")
    """
    require("matplotlib", "plot", "plotting")
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def axes_or_new(ax: Axes | None, width: float = 6.4, height: float = 4.2) -> Axes:
    """`ax`, or the Axes of a new figure of pyplot, which notebooks show once and `pyplot.show` shows in a window."""
    if ax is not None:
        return ax
    pyplot = require("matplotlib.pyplot", "plot", "plotting")
    made: Axes = pyplot.figure(figsize=(width, height), layout="constrained").subplots()
    return made


def dress(ax: Axes) -> Axes:
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(INK)
    ax.tick_params(colors=INK)
    ax.grid(True, color=GRID, lw=0.8)
    ax.set_axisbelow(True)
    ax.title.set(fontsize=12, fontweight="bold", color=INK)
    for label in (ax.xaxis.label, ax.yaxis.label):
        label.set_color(INK)
    return ax


def floats(values: Any) -> npt.NDArray[np.float64]:
    """Numbers as an array; None, as in JSON, becomes NaN."""
    return np.asarray([np.nan if v is None else v for v in values], dtype=np.float64)


def literal(value: Any) -> str:
    """A label that matplotlib shows literally: "$" would start mathematics and a leading "_" would hide the label."""
    text = str(value)
    text = text if len(text) <= 28 else text[:26] + "…"
    return ("\u2009" if text.startswith("_") else "") + text.replace("$", r"\$")


def legend_above(ax: Axes) -> None:
    """A legend between the axes and their title, where it hides no data."""
    handles, names = ax.get_legend_handles_labels()
    narrow = len(names) > 2 and sum(map(len, names)) > 60
    rows = -(-len(names) // 2) if narrow else 1
    ax.legend(
        handles,
        names,
        frameon=False,
        loc="lower center",
        bbox_to_anchor=(0.5, 1.0),
        ncols=2 if narrow else len(names),
        fontsize=9,
        labelcolor=INK,
        columnspacing=1.4,
        borderaxespad=0.2,
    )
    ax.set_title(ax.get_title(), pad=10 + 15 * rows)


def side_legend(ax: Axes, n: int) -> None:
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
        labelcolor=INK,
        handletextpad=0.3,
        borderaxespad=0.2,
    )
    for handle in legend.legend_handles:
        if handle is not None and hasattr(handle, "set_sizes"):
            handle.set_alpha(1)
            handle.set_sizes([28])
