"""`RBM`: the restricted Boltzmann machine, an undirected model of rows whose hidden units are independent given a row.

Promises: the seed gives the same bits on any number of threads, the chains' samples included; free energies are exact
and a row's own. Memory is bounded by blocks of rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.utils.validation import check_is_fitted

from .. import functional
from ..fitting.inputs import encoding_table, read_batch
from ..fitting.parameters import CHECKS, UNITS, integer
from ..fitting.table import BLOCK_BYTES
from ..plan.losses import LOSSES, Loss
from ..plan.plan import Mode
from ..plan.spec import Activation
from ..random import philox
from ..random.weights import draw_seed
from ..rows.devices import beside, on_gpu
from ..rows.shifted import Shifted
from ..rows.sparse import is_sparse
from ..training import Callback, Checkpoint
from .autoencoder import Autoencoder
from .preset import preset

__all__ = ["RBM"]

Array = NDArray[Any]

_HIDDEN, _VISIBLE = 0, 1
"""Streams of `RBM.sample`."""


def _activation(units: str) -> Any:
    """A property: the activation that gives the means of the units named by a parameter."""
    return property(lambda rbm: UNITS.get(getattr(rbm, units), Activation.LINEAR).name.lower())


_FIXED: dict[str, Any] = {
    "hidden_layer_sizes": (),
    "decoder_layer_sizes": None,
    "activation": "sigmoid",
    "latent_activation": _activation("hidden"),
    "output_activation": _activation("visible"),
    "loss": property(lambda rbm: "bce" if rbm.visible == "bernoulli" else "mse"),
    "huber_delta": 1.0,
    "tied_weights": True,
    "corruption": None,
    "corruption_level": 0.0,
    "dropout": 0.0,
    "contractive": 0.0,
    "contractive_method": "exact",
    "n_probes": 1,
    "contractive_hessian": 0.0,
    "n_corruptions": 1,
    "hessian_std": 0.1,
    "activity_l1": 0.0,
    "kl_sparsity": 0.0,
    "sparsity_target": 0.05,
    "sparse_decoder": "auto",
    "solver": "sgd",
    "beta_1": 0.9,
    "beta_2": 0.999,
    "epsilon": 1e-8,
    "clip_norm": None,
    "early_stopping": False,
    "validation_fraction": 0.1,
    "n_iter_no_change": 10,
    "tol": 1e-4,
}


@preset(
    fixed=_FIXED,
    added={
        "visible": "bernoulli",
        "hidden": "bernoulli",
        "n_gibbs": 1,
        "persistent": False,
        "sample_visible": True,
        "initial_momentum": 0.5,
        "momentum_epochs": 5,
    },
    n_components=256,
    learning_rate_init=0.05,
    batch_size=100,
    max_iter=30,
)
class RBM(Autoencoder):
    """Restricted Boltzmann machine (Smolensky, 1986; Hinton, Neural Computation 14, 2002).

    Visible units v and hidden units h have p(v, h) ~ exp(-E(v, h)), E = -v'Wh - b'h - c'v for binary units; to each
    Gaussian unit u, of variance 1, belongs u**2 / 2. Training follows an estimate of the gradient of the mean
    log-likelihood, by gradient steps with momentum: the statistics of the data less those of the model, sampled by
    Gibbs steps from the rows (contrastive divergence) or in chains that go on (`persistent`).

    Parameters
    ----------
    n_components : int, default=256
        Hidden units.
    visible : {"bernoulli", "gaussian"}, default="bernoulli"
        Binary units take values in [0, 1], which are read as probabilities. Gaussian units have variance 1: standardise
        the features.
    hidden : {"bernoulli", "gaussian"}, default="bernoulli"
        Gaussian ones are the linear code units of Hinton and Salakhutdinov (Science 313, 2006); they want a rate about
        a hundred times lower, as Gaussian visible units do.
    n_gibbs : int, default=1
        Gibbs steps of an update: the n of CD-n and PCD-n.
    persistent : bool, default=False
        Let `batch_size` Markov chains go on from update to update (Tieleman, ICML 2008), which follows the likelihood
        more closely than chains that begin at the rows. They are part of the model and are saved with it.
    sample_visible : bool, default=True
        Draw the visible units of a chain; if False they take their means, which is less noise, and not a sample of the
        model.
    learning_rate_init : float, default=0.05
        Of the mean gradient of a batch.
    momentum : float, default=0.9
    initial_momentum, momentum_epochs : float and int, default=0.5 and 5
        Momentum of so many first epochs.
    alpha : float, default=0.0
        L2 penalty on weights, divided by the batch's rows as in `Autoencoder`: a weight cost of 0.0002 for each update
        is ``alpha=0.02`` with 100 rows.
    batch_size : int, default=100
    max_iter : int, default=30
        Epochs, all of which are run: no loss that is cheap to have says when to stop.
    weight_l1, learning_rate, shuffle, warm_start, random_state, verbose, precision, backend, n_threads
        As in `Autoencoder`.

    Attributes
    ----------
    coefs_, intercepts_ : list of ndarray
        W and its transpose, shapes (n_features, n_components) and reverse; the biases b of the hidden and c of the
        visible units.
    history_ : dict of list of float
        ``loss`` is the error of rebuilding a row from hidden units drawn given the row, a sum over features: the
        cross-entropy for binary visible units, the squared error for Gaussian ones. (With `persistent`, from their
        means.) It is no bound of the likelihood. The rest as in `Autoencoder`.
    """

    _runs_to_the_end = True
    _takes_batches = False

    visible: str
    hidden: str
    n_gibbs: int
    persistent: bool
    sample_visible: bool
    initial_momentum: float
    momentum_epochs: int

    def fit(
        self,
        X: Any,
        y: Any = None,
        *,
        sample_weight: ArrayLike | None = None,
        batch: Any = None,
        X_val: Any = None,
        callbacks: Sequence[Callback] = (),
        checkpoint: Checkpoint | None = None,
        block_bytes: int = BLOCK_BYTES,
    ) -> Self:
        """Train the machine.

        Parameters
        ----------
        X : array, CSR / CSC, data frame or Source of shape (n_samples, n_features)
        y
            Ignored.
        sample_weight, X_val, callbacks, checkpoint, block_bytes
            As for `Autoencoder.fit`; the rows of `X_val` are rebuilt for ``history_["val_loss"]`` and decide nothing.
        batch
            Must be None: a machine is told no batches.

        Returns
        -------
        self

        Raises
        ------
        ValueError, TypeError
            A parameter or the data are not usable; values outside [0, 1] for binary units.
        DivergenceError, ResumeError
            As for `Autoencoder.fit`.
        """
        return super().fit(
            X,
            sample_weight=sample_weight,
            batch=batch,
            X_val=X_val,
            callbacks=callbacks,
            checkpoint=checkpoint,
            block_bytes=block_bytes,
        )

    def partial_fit(self, X: Any, y: Any = None, sample_weight: ArrayLike | None = None, *, batch: Any = None) -> Self:
        """Train for one pass over some rows, going on from the present state; see `Autoencoder.partial_fit`.

        Parameters
        ----------
        X, y, sample_weight, batch
            As for `fit`.

        Returns
        -------
        self
        """
        return super().partial_fit(X, sample_weight=sample_weight, batch=batch)

    def free_energy(self, X: Any) -> Array:
        """-log of the sum over the hidden units of exp(-E), exactly: minus log p(v), but for a constant of the model.

        Parameters
        ----------
        X : array, CSR / CSC, data frame or Source of shape (n_samples, n_features)

        Returns
        -------
        ndarray of shape (n_samples,)
            -c'v - sum softplus(b + W'v) for binary units. Gaussian visible units have the sum of (v - c)**2 / 2 in
            place of -c'v; Gaussian hidden units that of (b + W'v)**2 / 2 in place of the softplus. Of X's dtype if
            that is float32 or float64, else float32.

        Raises
        ------
        ValueError
            Values outside [0, 1] for binary units.
        """
        check_is_fitted(self)
        table = encoding_table(self, X)
        blocks = (block for block, *_ in table.blocks(self._block_rows()))
        parts = [self._free_energy(block.toarray() if isinstance(block, Shifted) else block) for block in blocks]
        return np.concatenate(parts).astype(np.dtype(table.X.dtype), copy=False)

    def score_samples(self, X: Any, y: Any = None, *, batch: Any = None) -> Array:
        """Minus the free energy of each row: log p(v) but for a constant of the model, higher is better.

        It ranks rows, and differences between rows are exact; values of two models are not to be compared.

        Parameters
        ----------
        X : array, CSR / CSC, data frame or Source of shape (n_samples, n_features)
        y
            Ignored.
        batch
            Must be None.

        Returns
        -------
        ndarray of shape (n_samples,)
        """
        read_batch(self, batch, 0)
        return -self.free_energy(X)

    def sample(self, n: int = 1, n_gibbs: int = 1000, random_state: Any = None, *, noise: bool = False) -> Array:
        """New rows from the model: `n` Markov chains that begin at random.

        Parameters
        ----------
        n : int
            Number of rows, one for each chain.
        n_gibbs : int
            Steps of each chain.
        random_state : int, RandomState, Generator or None
            The same integer gives the same rows.
        noise : bool
            Draw from the last p(v|h) instead of taking its mean: zeros and ones, or values with variance 1.

        Returns
        -------
        ndarray of shape (n, n_features)
        """
        check_is_fitted(self)
        integer(1)("n", n)
        integer(1)("n_gibbs", n_gibbs)
        CHECKS["random_state"]("random_state", random_state)
        seed, network = draw_seed(random_state), self._network
        up, down = network.spec.layers
        dtype = network.state["W0"].dtype
        rows = np.empty((n, down.n_out), dtype)
        size = self._block_rows()
        for first in range(0, n, size):
            count = min(size, n - first)
            h = np.full((count, up.n_out), 0.5 if up.activation is Activation.SIGMOID else 0.0)
            for step in range(n_gibbs):
                states = _drawn(h, up.activation, seed, _HIDDEN, step, first).astype(dtype)
                v = network.apply(states, Mode.DECODE)
                if noise or step < n_gibbs - 1:
                    v = _drawn(v, down.activation, seed, _VISIBLE, step, first).astype(dtype)
                if step < n_gibbs - 1:
                    h = network.apply(v, Mode.ENCODE)
            rows[first : first + count] = v
        return rows

    def _encodes(self, loss: Loss, *, separate_target: bool) -> Loss:
        return LOSSES[self.loss].loss

    def _free_energy(self, X: Any) -> Array:
        up, down = self._network.spec.layers
        W, (b, c) = self.coefs_[0], self.intercepts_
        if X.dtype != W.dtype:
            X = X.astype(W.dtype)
        if on_gpu(X):
            W, b, c = (beside(array, X, array.dtype) for array in (W, b, c))
        binary = up.activation is Activation.SIGMOID
        terms = functional.dense(X, W, b, "softplus" if binary else "linear", n_threads=self.n_threads)
        hidden = terms if binary else terms * terms / 2
        if down.activation is Activation.SIGMOID:
            visible = X @ -c if is_sparse(X) else (X * -c).sum(axis=1, dtype=np.float64)
        else:
            visible = np.square((X.toarray() if is_sparse(X) else X) - c).sum(axis=1, dtype=np.float64) / 2
        energy: Array = visible - hidden.sum(axis=1, dtype=np.float64)
        return energy


def _drawn(mean: Array, activation: Activation, seed: int, stream: int, step: int, first: int) -> Array:
    """States of units with these means, of rows from `first` on."""
    if activation is Activation.SIGMOID:
        return philox.uniform(seed, stream, step, len(mean), mean.shape[1], first) < mean
    return mean + philox.normal(seed, stream, step, len(mean), mean.shape[1], first)
