"""Figures of a fit: loss, elbow, latent space, features, sensitivity, reconstructions, filters, traversals.

- Every function draws on the given `Axes` or on a new figure of pyplot, and returns the `Axes`. It does not call
  ``show`` or change matplotlib's settings. A notebook shows each new figure once, at the end of its cell.
- The colours are those of Okabe and Ito, with a darker yellow; they remain distinct for colour-blind readers.
- The first call imports matplotlib. If it is missing, the error names the extra to install.
"""

from .curves import plot_elbow, plot_feature_errors, plot_latent, plot_loss, plot_row_losses, plot_sensitivity
from .images import plot_filters, plot_latent_traversal, plot_reconstructions
from .style import new_figure

__all__ = [
    "new_figure",
    "plot_elbow",
    "plot_feature_errors",
    "plot_filters",
    "plot_latent",
    "plot_latent_traversal",
    "plot_loss",
    "plot_reconstructions",
    "plot_row_losses",
    "plot_sensitivity",
]
