"""`VariationalAutoencoder`: an autoencoder whose code is a distribution, with likelihoods and samples.

- Outside training, noise depends on the content of a row, the seed and the number of the draw only. So the bounds and
  likelihoods of a row do not depend on the other rows or on the run.
- Memory is bounded by blocks of rows, for any number of draws.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.utils.validation import check_is_fitted

from ..fitting.inputs import read_condition, scoring_table
from ..fitting.parameters import integer, randomness, real
from ..fitting.spec_of import DataFacts
from ..fitting.start import dispersions
from ..plan.losses import LOSSES, Loss
from ..plan.ops import DROPOUT_LIMIT, LOG_DISPERSION_LIMIT, VARIANCE_FLOOR
from ..plan.plan import Mode
from ..plan.spec import LayerSpec, NetworkSpec
from ..random import philox
from ..random.weights import draw_seed
from ..rows.devices import like, on_gpu, to_host
from ..rows.shifted import stored_rows
from ..rows.sparse import is_sparse
from ..training import Options
from .autoencoder import Autoencoder
from .preset import preset

__all__ = ["VariationalAutoencoder"]

Array = NDArray[Any]

_CODES, _OBSERVATIONS, _ZEROS = 0, 1, 2
"""Streams of `VariationalAutoencoder.sample`."""

_FIXED: dict[str, Any] = {
    "latent_activation": "linear",
    "huber_delta": 1.0,
    "tied_weights": False,
    "activity_l1": 0.0,
    "kl_sparsity": 0.0,
    "sparsity_target": 0.05,
}


@preset(fixed=_FIXED)
class VariationalAutoencoder(Autoencoder):
    """Variational autoencoder (Kingma and Welling, "Auto-encoding variational Bayes", ICLR 2014).

    The encoder gives each row x a normal distribution q(z|x), with a mean and a variance for each latent. The decoder
    gives each z a distribution p(x|z) of rows. The prior p(z) of the latents is N(0, 1). Training draws z once for each
    row and step, and minimises the mean over rows of

        -log p(x|z) + beta KL(q(z|x) || p(z)),   KL = 1/2 sum (mean^2 + variance - 1 - log variance),

    For ``beta=1`` this is minus a lower bound of log p(x), in nats.

    Parameters
    ----------
    loss : {"mse", "bce", "gaussian", "poisson", "nb", "zinb"}, default="mse"
        The decoder's distribution. ``"poisson"``, ``"nb"``, ``"zinb"``: counts, as in `CountAutoencoder`. With ``"nb"``
        or ``"zinb"`` this is scVI with the observed sums of rows; fit's `batch` is scVI's `batch_key`.
        ``"bce"``: Bernoulli, for binary features; for other features between 0 and 1 it is the cross-entropy, not a
        likelihood. ``"mse"``: normal with variance `decoder_variance`. ``"gaussian"``: normal; each feature has
        a learned variance, shared by all rows. It starts at 1 and stays above 1e-6: standardise the features, or scale
        them to order one.
    beta : float, default=1.0
        Weight of the divergence (Higgins et al., ICLR 2017). With 0 the latents' variances are free to shrink.
    kl_warmup : int, default=0
        Epochs over which the weight of the divergence grows linearly, step by step, from 0 to `beta`. They are counted
        from the network's first epoch, over several calls of fit too. Early stopping begins after them.
    decoder_variance : float, default=1.0
        Variance v of each feature with ``loss="mse"``. Minus the log-likelihood is ``squared error / (2 v) + n_features
        / 2 log(2 pi v)``. ``history_["loss"]`` is the squared error, and the objective is in its units: squared error +
        2 v beta KL. `elbo` and `log_likelihood` are in nats, with the constant.
    n_components, hidden_layer_sizes, ...
        As in `Autoencoder`, without the latents' activation and penalties, tied weights and `huber_delta`.

    Attributes
    ----------
    history_ : dict of list of float
        ``loss`` is the decoder's term, and ``kl`` the unweighted divergence in nats. ``objective`` is the sum of both
        and the penalties, with the full weight of the divergence. ``val_loss`` is the objective of the held-out rows
        without penalties; each row has one draw, the same in every epoch. The rest as in `Autoencoder`.
    coefs_, intercepts_ : list of ndarray
        In the encoder's last layer, the columns of the means come first, then those of the log-variances.
    decoder_variance_ : ndarray of shape (n_outputs,)
        Variance of each feature given the latents; not with ``loss="bce"``.

    Examples
    --------
    >>> import numpy as np
    >>> X = np.random.default_rng(0).random((60, 8), dtype=np.float32)
    >>> from narrows import VariationalAutoencoder
    >>> vae = VariationalAutoencoder(2, hidden_layer_sizes=4, max_iter=5, random_state=0).fit(X)
    >>> vae.elbo(X).shape, vae.sample(3, random_state=0).shape
    ((60,), (3, 8))
    """

    variational = True
    _constraints = Autoencoder._constraints | {
        "beta": real("[0, inf)"),
        "kl_warmup": integer(0),
        "decoder_variance": real("(0, inf)"),
    }

    beta: float
    kl_warmup: int
    decoder_variance: float

    def __init__(
        self,
        n_components: int = 32,
        *,
        beta: float = 1.0,
        kl_warmup: int = 0,
        decoder_variance: float = 1.0,
        **inherited: Any,
    ) -> None: ...

    def _check_together(self) -> None:
        super()._check_together()
        if not LOSSES[self.loss].likelihood:
            raise ValueError(
                f"loss={self.loss!r} is not a likelihood, which a variational decoder needs; choose from "
                + ", ".join(name for name, known in LOSSES.items() if known.likelihood)
            )
        if self.loss != "mse" and self.decoder_variance != 1.0:
            raise ValueError(
                f"decoder_variance={self.decoder_variance!r} needs loss='mse': leave it at 1.0 with loss={self.loss!r}"
            )

    def _layers(self, n_features: int, n_outputs: int) -> tuple[tuple[LayerSpec, ...], int]:
        layers, latent = super()._layers(n_features, n_outputs)
        # Means and log-variances.
        code = dataclasses.replace(layers[latent - 1], n_out=2 * layers[latent - 1].n_out)
        return (*layers[: latent - 1], code, *layers[latent:]), latent

    def _spec(self, data: DataFacts) -> NetworkSpec:
        # Minus the log-likelihood of a Gaussian decoder of variance v is the squared error over 2 v, and a constant. So
        # its sum with beta times the divergence is minimised as squared error + 2 v beta divergence.
        scale = 2 * float(self.decoder_variance) if self.loss == "mse" else 1.0
        return dataclasses.replace(super()._spec(data), variational=True, kl_weight=scale * float(self.beta))

    def _options(self, seed: int) -> Options:
        return dataclasses.replace(super()._options(seed), kl_warmup=int(self.kl_warmup))

    @property
    def decoder_variance_(self) -> Array:
        """Variance of each feature given the latents, shape (n_outputs,); learned with ``loss="gaussian"``."""
        network = self._fitted_network()
        if network.spec.loss.info.parameter == "logvar":
            learned: Array = np.exp(network.state["logvar"].reshape(-1)) + VARIANCE_FLOOR
            return learned
        if network.spec.loss is Loss.MSE:
            return np.full(network.spec.n_outputs, float(self.decoder_variance))
        raise AttributeError(f"the decoder of loss={self.loss!r} has no variances")

    def score_samples(self, X: Any, y: Any = None, *, batch: Any = None) -> Array:
        """Minus the loss and the weighted divergence of each row: higher is better.

        The latents of each row are drawn once; every call uses the same draw. With ``loss="bce"`` or ``"gaussian"``
        and ``beta=1`` this is the evidence lower bound, `elbo` of one sample.

        Parameters
        ----------
        X : array, CSR / CSC, data frame or Source of shape (n_samples, n_features)
        y : the same, of shape (n_samples, n_outputs), optional
            What to compare the reconstruction with; X itself by default.
        batch : array-like of shape (n_samples,), or one label for all rows, optional
            As for `reconstruct`.

        Returns
        -------
        ndarray of shape (n_samples,)
        """
        return super().score_samples(X, y, batch=batch)

    def _row_losses(self, apply: Callable[..., Array], spec: NetworkSpec, X: Any, target: Any, condition: Any) -> Array:
        posterior = _Posterior(apply(X, Mode.POSTERIOR), X)
        z, _ = posterior.draw(0, 0)
        loss = apply(z, Mode.LIKELIHOOD, X if target is None else target, condition)[:, 0]
        weighted: Array = loss + spec.kl_weight * posterior.divergence()
        return weighted

    def elbo(
        self, X: Any, n_samples: int = 1, *, y: Any = None, batch: Any = None, random_state: Any = 0
    ) -> NDArray[np.float64]:
        """Evidence lower bound of each row: E log p(x|z) - KL(q(z|x) || p(z)), in nats, whatever `beta` is.

        Parameters
        ----------
        X : array, CSR / CSC, data frame or Source of shape (n_samples, n_features)
        n_samples : int
            Draws of the latents for the mean of log p(x|z); the divergence is exact.
        y : as X, of shape (n_samples, n_outputs), optional
            The rows to bound the probability of; X itself by default.
        batch : array-like of shape (n_samples,), or one label for all rows, optional
            As for `reconstruct`.
        random_state : int, RandomState, Generator or None
            The same integer gives the same draws.

        Returns
        -------
        ndarray of float64, shape (n_samples,)
        """
        integer(1)("n_samples", n_samples)

        def bound(posterior: _Posterior, density: Callable[[Array], Array], seed: int) -> Array:
            total: Any = 0.0
            for draw in range(n_samples):
                total = total + density(posterior.draw(seed, draw)[0])
            averaged: Array = total / n_samples - posterior.divergence()
            return averaged

        return self._integrated(X, y, batch, random_state, bound)

    def log_likelihood(
        self, X: Any, n_importance: int = 100, *, y: Any = None, batch: Any = None, random_state: Any = 0
    ) -> NDArray[np.float64]:
        """Log-likelihood of each row by importance sampling, in nats.

        The estimate is log 1/K sum p(x|z) p(z) / q(z|x) over K draws of q(z|x). Its expectation is a lower bound of
        log p(x), which grows with K. For K = 1 it is the evidence lower bound (Burda, Grosse and Salakhutdinov, ICLR
        2016).

        Parameters
        ----------
        X : array, CSR / CSC, data frame or Source of shape (n_samples, n_features)
        n_importance : int
            Number K of draws.
        y, batch
            As for `elbo`.
        random_state : int, RandomState, Generator or None
            The same integer gives the same draws.

        Returns
        -------
        ndarray of float64, shape (n_samples,)
        """
        integer(1)("n_importance", n_importance)

        def weighted(posterior: _Posterior, density: Callable[[Array], Array], seed: int) -> Array:
            # A running sum of exponentials, scaled by the greatest so far.
            total = np.zeros_like(posterior.mean[:, 0])
            top = total - np.inf
            for draw in range(n_importance):
                z, log_ratio = posterior.draw(seed, draw)
                value = density(z) + log_ratio
                above = np.maximum(top, value)
                total = total * np.exp(top - above) + np.exp(value - above)
                top = above
            likelihood: Array = top + np.log(total / n_importance)
            return likelihood

        return self._integrated(X, y, batch, random_state, weighted)

    def _integrated(
        self,
        X: Any,
        y: Any,
        batch: Any,
        random_state: Any,
        integral: Callable[[_Posterior, Callable[[Array], Array], int], Array],
    ) -> NDArray[np.float64]:
        """An integral over q(z|x) for each row; `integral` gets the posterior, log p(x|z) as a function, and a seed."""
        check_is_fitted(self)
        randomness("random_state", random_state)
        seed = draw_seed(random_state)
        table, network = scoring_table(self, X, y, batch), self._network
        scale, offset = 1.0, 0.0
        if network.spec.loss is Loss.MSE:
            v = float(self.decoder_variance)
            scale, offset = 1 / (2 * v), network.spec.n_outputs / 2 * np.log(2 * np.pi * v)
        parts = []
        for block, target, _, condition in table.blocks(self._block_rows()):
            wanted = block if target is None else target

            def density(z: Array, wanted: Any = wanted, condition: Any = condition) -> Array:
                loss = network.apply(z, Mode.LIKELIHOOD, wanted, condition)[:, 0].astype(np.float64)
                log_density: Array = -(scale * loss + offset)
                return log_density

            parts.append(integral(_Posterior(network.apply(block, Mode.POSTERIOR), block), density, seed))
        return np.concatenate(parts)

    def sample(
        self,
        n: int = 1,
        random_state: Any = None,
        *,
        noise: bool = False,
        library: ArrayLike | None = None,
        batch: Any = None,
    ) -> Array:
        """New rows from the model: draw latents from the prior N(0, 1) and decode them.

        Parameters
        ----------
        n : int
            Number of rows.
        random_state : int, RandomState, Generator or None
            The same integer gives the same rows.
        noise : bool
            Draw from p(x|z) instead of taking its mean: zeros and ones, values with the decoder's variance, or counts.
            For ``"zinb"`` the mean is the mean of the negative binomial, without the additional zeros.
        library : float or array of shape (n,), optional
            For counts: the sum of a row's means (with ``output_activation="exp"``, relative to the default). By default
            the median sum of a training row.
        batch : array-like of shape (n,), or one label for all rows, optional
            As for `reconstruct`.

        Returns
        -------
        ndarray of shape (n, n_outputs)
        """
        check_is_fitted(self)
        integer(1)("n", n)
        randomness("random_state", random_state)
        seed, network = draw_seed(random_state), self._network
        factors = _size_factors(network.spec, library, n)
        conditions = read_condition(self, batch, n)
        dtype = network.state["W0"].dtype
        rows = np.empty((n, network.spec.n_outputs), dtype)
        step = self._block_rows()
        for first in range(0, n, step):
            count = min(step, n - first)
            z = philox.normal(seed, _CODES, 0, count, network.spec.n_components, first)
            z = z.astype(dtype)
            condition = None if conditions is None else conditions[first : first + count]
            p = network.apply(z, Mode.DECODE, condition=condition)
            if factors is not None:
                p = p * factors[first : first + count, None]
            if noise and network.spec.loss.info.of_counts:
                p = self._counts(p, z, condition, seed, first)
            elif noise and network.spec.loss is Loss.BCE:
                p = philox.uniform(seed, _OBSERVATIONS, 0, count, p.shape[1], first) < p
            elif noise:
                p = p + np.sqrt(self.decoder_variance_) * philox.normal(
                    seed, _OBSERVATIONS, 0, count, p.shape[1], first
                )
            rows[first : first + count] = p
        return rows

    def _counts(self, mean: Array, z: Array, condition: Array | None, seed: int, first: int) -> Array:
        """Counts drawn with these means, for the codes of rows from `first` on, as quantiles of uniform numbers."""
        from scipy import special, stats

        network, (count, n) = self._network, mean.shape
        spec, mean = network.spec, mean.astype(np.float64)
        heads = network.decoder_outputs(z, condition).astype(np.float64) if spec.n_heads > 1 else None
        u = philox.uniform(seed, _OBSERVATIONS, 0, count, n, first)
        if not spec.loss.info.dispersion:
            drawn: Array = stats.poisson.ppf(u, mean)
        else:
            if heads is None or not spec.cell_dispersion:
                theta = dispersions(network.state["log_dispersion"])
            else:
                theta = np.exp(np.clip(heads[:, n : 2 * n], -LOG_DISPERSION_LIMIT, LOG_DISPERSION_LIMIT))
            drawn = stats.nbinom.ppf(u, theta, theta / (theta + mean))
        if heads is not None and spec.loss.info.heads > 1:
            zero = special.expit(np.clip(heads[:, -n:], -DROPOUT_LIMIT, DROPOUT_LIMIT))
            drawn[philox.uniform(seed, _ZEROS, 0, count, n, first) < zero] = 0
        return drawn


def _size_factors(spec: NetworkSpec, library: Any, n: int) -> NDArray[np.float64] | None:
    """The factors that scale the means of rows from the default sum to the sums asked for.

    Raises
    ------
    ValueError
        The model is not of counts, or the sums have another shape, are negative or are not finite.
    """
    if library is None:
        return None
    if not spec.loss.info.of_counts:
        raise ValueError(f"library needs a loss on counts, not loss={spec.loss.info.name!r}")
    sums = np.asarray(library, dtype=np.float64)
    if sums.shape not in ((), (n,)):
        raise ValueError(f"library has shape {sums.shape}; a number or shape ({n},) is needed")
    if not (np.isfinite(sums) & (sums >= 0)).all():
        raise ValueError("library must be finite and not negative")
    return np.broadcast_to(sums / spec.data.size_sum, (n,))


class _Posterior:
    """The distribution q(z|x) for some rows.

    Parameters
    ----------
    stats : ndarray of shape (n_rows, 2 * n_components)
        Means and log-variances.
    X : ndarray or CSR of shape (n_rows, n_features)
        The rows; their content seeds their noise.
    """

    def __init__(self, stats: Array, X: Any) -> None:
        self.dtype = stats.dtype
        self.mean, self.log_variance = np.split(stats.astype(np.float64), 2, axis=1)
        self.deviation = np.exp(self.log_variance / 2)
        self.keys = row_keys(X)

    def divergence(self) -> NDArray[np.float64]:
        """KL(q || N(0, 1)) of each row."""
        terms = self.mean**2 + (np.expm1(self.log_variance) - self.log_variance)
        total: NDArray[np.float64] = terms.sum(axis=1) / 2
        return total

    def draw(self, seed: int, number: int) -> tuple[Array, NDArray[np.float64]]:
        """Codes, and the logarithm of p(z) / q(z|x) at each."""
        e = philox.keyed_normal(seed, number, self.keys, self.mean.shape[1])
        if on_gpu(self.mean):
            e = like(e, self.mean, np.float64)
        z = self.mean + self.deviation * e
        return z.astype(self.dtype), (e * e + self.log_variance - z * z).sum(axis=1) / 2


def row_keys(X: Any) -> NDArray[np.uint64]:
    """A 64-bit key of each row's content in float32, the same for dense rows and CSR.

    The key is a sum, modulo 2**64, of the values' bits times odd random numbers. The finaliser of splitmix64 then mixes
    every bit into every bit (Steele, Lea and Flood, OOPSLA 2014). A key only chooses noise: two rows may share one. The
    key of a shifted row is the key of its stored values.
    """
    X = stored_rows(X)
    halves = philox.words(0, 0, 0, 2, X.shape[1]).astype(np.uint64)
    factors = (halves[0] << np.uint64(32) | halves[1]) | np.uint64(1)
    if on_gpu(X):
        keys = to_host(_gpu_keys(X, factors))
    elif is_sparse(X):
        bits = type(X)((_bits(X.data), X.indices, X.indptr), X.shape)
        keys = bits @ factors
    else:
        step = max(1, (1 << 20) // X.shape[1])
        keys = np.concatenate([_bits(X[i : i + step]) @ factors for i in range(0, max(1, X.shape[0]), step)])
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        keys = (keys ^ keys >> np.uint64(shift)) * np.uint64(factor)
    mixed: NDArray[np.uint64] = keys ^ keys >> np.uint64(31)
    return mixed


def _gpu_keys(X: Any, factors: NDArray[np.uint64]) -> Any:
    """The sums of `row_keys` for rows on a GPU, which has no matrix product of integers."""
    factors = like(factors, X, np.uint64)
    if not is_sparse(X):
        step = max(1, (1 << 24) // X.shape[1])
        return np.concatenate([(_bits(X[i : i + step]) * factors).sum(axis=1) for i in range(0, X.shape[0], step)])
    sums = np.concatenate([np.zeros_like(factors[:1]), (_bits(X.data) * factors[X.indices]).cumsum()])
    return sums[X.indptr[1:]] - sums[X.indptr[:-1]]


def _bits(values: Array) -> NDArray[np.uint64]:
    """The float32 bits of values; -0.0 has the bits of 0.0."""
    return (values.astype(np.float32, copy=False) + np.float32(0)).view(np.uint32).astype(np.uint64)
