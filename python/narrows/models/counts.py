"""`CountAutoencoder`: an autoencoder of counts, such as those of genes in cells.

Promises: counts are neither copied nor made dense; the code and the mean of a row depend on that row alone.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..fitting.parameters import real
from .autoencoder import Autoencoder
from .preset import preset

__all__ = ["CountAutoencoder"]

_FIXED: dict[str, Any] = {
    "loss": property(lambda self: self.likelihood),
    "output_activation": property(lambda self: self.link),
    "huber_delta": 1.0,
    "tied_weights": False,
    "sparse_decoder": "auto",
}


@preset(fixed=_FIXED, added={"likelihood": "nb", "link": "softmax"})
class CountAutoencoder(Autoencoder):
    """Autoencoder of counts: its decoder gives each count a distribution, and the loss is minus the log-likelihood.

    The mean of a count y of a row whose counts sum to l is l times the feature's share, the softmax of the output
    layer, or with ``link="exp"`` the row's size factor, l over the median of l in training, times the exponential. The
    network sees log(1 + x) of the row's counts scaled to that median, made as they are read; what it is to give the
    distribution of are the counts themselves. Rows and features without any count are let be: such a row adds nothing
    to the loss.

    Parameters
    ----------
    likelihood : {"nb", "zinb", "poisson"}, default="nb"
        ``"nb"``: negative binomial, of variance mean + mean**2 / theta. ``"zinb"``: zero-inflated, zero with a
        probability besides that the decoder gives for each row and feature (a logit of an output of its own).
        ``"poisson"``: variance as large as the mean.
    link : {"softmax", "exp"}, default="softmax"
        How means follow from the output layer: as in scVI (Lopez et al., Nature Methods 15, 2018), or as in DCA
        (Eraslan et al., Nature Communications 10, 2019).
    dispersion : {"gene", "gene-cell"}, default="gene"
        Whether theta is a parameter for each feature, the same for all rows, or another output for each row and
        feature.
    n_components, hidden_layer_sizes, ...
        As in `Autoencoder`, less the loss and the output activation, which these stand for, tied weights,
        `huber_delta` and `sparse_decoder`.

    Attributes
    ----------
    dispersion_ : ndarray of shape (n_features,)
        Inverse dispersions theta, with ``dispersion="gene"``.
    coefs_, intercepts_ : list of ndarray
        Those of the last layer hold the columns of the means and then, where there are such, those of the logarithms of
        theta and of the logits of zeros.
    history_ : dict of list of float
        ``loss`` and ``val_loss`` are complete: minus log-probabilities in nats, summed over features.

    Notes
    -----
    ``fit(X, y)`` and ``score(X, y)`` take other counts to be explained, as in molecular cross-validation; their means
    are in proportion to the sums of y.
    """

    counts_input = True

    likelihood: str
    link: str

    def denoise(self, X: Any, *, library: float | None = None, batch: Any = None) -> NDArray[Any]:
        """Means of the counts of each row given its code: `reconstruct`, or scaled to one sum.

        Parameters
        ----------
        X : array, CSR / CSC, data frame or Source of shape (n_samples, n_features)
            Counts.
        library : float, optional
            Give the means of rows that sum to this, so that they can be compared; by default of rows that sum to what
            these do.
        batch : array-like of shape (n_samples,), or one label, optional
            As for `reconstruct`: one label gives the means that these rows would have in that batch.

        Returns
        -------
        ndarray of shape (n_samples, n_features)
            Dense: pass some rows at a time where that is too much.
        """
        means = self.reconstruct(X, batch=batch)
        if library is not None:
            real("(0, inf)")("library", library)
            sums = means.sum(axis=1, keepdims=True)
            means *= library / np.where(sums > 0, sums, 1)
        return means
