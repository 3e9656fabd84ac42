"""`CountAutoencoder`: an autoencoder of counts, such as those of genes in cells.

- Counts are neither copied nor made dense.
- The code and the mean of a row depend on that row only.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..fitting.parameters import choice, real
from ..plan.losses import LOSSES
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


@preset(fixed=_FIXED)
class CountAutoencoder(Autoencoder):
    """Autoencoder of counts: its decoder gives each count a distribution, and the loss is minus the log-likelihood.

    Let l be the sum of a row's counts. The mean of a count is l times the feature's share, which is the softmax of the
    output layer. With ``link="exp"`` it is the row's size factor (l over the median of l in training) times the
    exponential. The network reads log(1 + x) of the row's counts x scaled to that median; the likelihood is taken of
    the counts themselves. Rows and features may be empty: an empty row adds nothing to the loss.

    Parameters
    ----------
    likelihood : {"nb", "zinb", "poisson"}, default="nb"
        ``"nb"``: negative binomial with variance mean + mean**2 / theta. ``"zinb"``: zero-inflated; the decoder gives
        each row and feature the logit of the probability of an additional zero. ``"poisson"``: the variance is the
        mean.
    link : {"softmax", "exp"}, default="softmax"
        How the output layer gives the means. ``"softmax"``: as in scVI (Lopez et al., Nature Methods 15, 2018).
        ``"exp"``: as in DCA (Eraslan et al., Nature Communications 10, 2019).
    dispersion : {"gene", "gene-cell"}, default="gene"
        Whether theta is one parameter for each feature, or an output of the network for each row and feature.
    n_components, hidden_layer_sizes, ...
        As in `Autoencoder`, without tied weights, `huber_delta` and `sparse_decoder`. `likelihood` and `link` replace
        the loss and the output activation.

    Attributes
    ----------
    dispersion_ : ndarray of shape (n_features,)
        Inverse dispersions theta, with ``dispersion="gene"``.
    coefs_, intercepts_ : list of ndarray
        In the last layer the columns of the means come first, then those of log(theta), then those of the logits of
        zeros, where these exist.
    history_ : dict of list of float
        ``loss`` and ``val_loss`` are minus log-probabilities in nats with all constants, summed over features.

    Notes
    -----
    ``fit(X, y)`` and ``score(X, y)`` explain other counts y, as in molecular cross-validation. Their means are in
    proportion to the row sums of y.

    Examples
    --------
    >>> import numpy as np
    >>> from narrows import CountAutoencoder
    >>> counts = np.random.default_rng(0).poisson(2.0, (60, 8))
    >>> model = CountAutoencoder(2, hidden_layer_sizes=4, max_iter=5, random_state=0).fit(counts)
    >>> means = model.denoise(counts)
    >>> np.allclose(means.sum(axis=1), counts.sum(axis=1), rtol=1e-4)
    True
    """

    counts_input = True
    _constraints = {
        "likelihood": choice(tuple(name for name, loss in LOSSES.items() if loss.of_counts)),
        "link": choice(("softmax", "exp")),
    } | Autoencoder._constraints

    likelihood: str
    link: str

    def __init__(
        self, n_components: int = 32, *, likelihood: str = "nb", link: str = "softmax", **inherited: Any
    ) -> None: ...

    def denoise(self, X: Any, *, library: float | None = None, batch: Any = None) -> NDArray[Any]:
        """The means of each row's counts, given its code.

        Parameters
        ----------
        X : array, CSR / CSC, data frame or Source of shape (n_samples, n_features)
            Counts.
        library : float, optional
            Scale the means of every row to this sum, so that rows can be compared. By default each row keeps its sum.
        batch : array-like of shape (n_samples,), or one label, optional
            As for `reconstruct`; one label gives the means of the rows in that batch.

        Returns
        -------
        ndarray of shape (n_samples, n_features)
            Dense: pass some rows at a time if memory is short.
        """
        means = self.reconstruct(X, batch=batch)
        if library is not None:
            real("(0, inf)")("library", library)
            sums = means.sum(axis=1, keepdims=True)
            means *= library / np.where(sums > 0, sums, 1)
        return means
