"""The figures of a fit: loss, elbow, latent space, features, sensitivity, reconstructions, filters, traversals.

- Every function draws on the `Axes` it is given, or on a new figure of its own, and returns the `Axes`; none
  calls ``show``, touches ``pyplot`` or changes matplotlib's settings.
- Colours are those of Okabe and Ito (the yellow darkened for white paper), which stay apart under the common
  kinds of colour blindness.
- matplotlib is imported on the first call; without it the error names the extra to install.
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
