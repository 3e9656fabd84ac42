"""`RBM`: the restricted Boltzmann machine, an undirected model whose hidden units are independent given a row.

- A seed gives the same bits on any number of threads, for the chains of training and for samples.
- Free energies are exact, and the free energy of a row depends on that row only.
- Memory is bounded by blocks of rows.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri
from sklearn.utils.validation import check_is_fitted

from .. import functional
from ..fitting.inputs import encoding_table, read_condition
from ..fitting.parameters import boolean, choice, integer, randomness, real
from ..fitting.spec_of import DataFacts
from ..plan.activations import Activation
from ..plan.losses import LOSSES, Loss
from ..plan.plan import Mode
from ..plan.spec import Gibbs, LayerSpec, NetworkSpec, Penalties, Solver, Training, Update
from ..random import philox
from ..random.weights import draw_seed
from ..rows.devices import like, on_gpu
from ..rows.shifted import Shifted
from ..rows.sparse import is_sparse
from ..training import Options
from .base import BaseAutoencoder

__all__ = ["RBM", "UNITS"]

Array = NDArray[Any]

UNITS: Mapping[str, Activation] = {"bernoulli": Activation.SIGMOID, "gaussian": Activation.LINEAR}
"""Stochastic units, and the activation that gives their means."""

_HIDDEN, _VISIBLE = 0, 1
"""Streams of `RBM.sample`."""
_DRAWN_VALUES = 1 << 14
"""Random numbers of a chain that are drawn at once: many steps of few rows."""


class RBM(BaseAutoencoder):
    """Restricted Boltzmann machine (Smolensky, 1986; Hinton, Neural Computation 14, 2002).

    Visible units v and hidden units h have p(v, h) ~ exp(-E(v, h)), with E = -v'Wh - b'h - c'v for binary units. Each
    Gaussian unit u, of variance 1, adds u**2 / 2. Training takes gradient steps with momentum along an estimate of the
    gradient of the mean log-likelihood: statistics of the data minus statistics of the model. Gibbs steps sample the
    model, from the rows (contrastive divergence) or in chains that continue from step to step (`persistent`).

    Parameters
    ----------
    n_components : int, default=256
        Hidden units.
    visible : {"bernoulli", "gaussian"}, default="bernoulli"
        Binary units take values in [0, 1] as probabilities. Gaussian units have variance 1: standardise the features.
    hidden : {"bernoulli", "gaussian"}, default="bernoulli"
        Gaussian units are the linear code units of Hinton and Salakhutdinov (Science 313, 2006). Gaussian units, hidden
        or visible, need a learning rate about a hundred times lower.
    n_gibbs : int, default=1
        Gibbs steps of an update: the n of CD-n and PCD-n.
    persistent : bool, default=False
        Continue `batch_size` Markov chains from update to update (Tieleman, ICML 2008). They follow the likelihood more
        closely than chains that begin at the rows. They are part of the model and are saved with it.
    sample_visible : bool, default=True
        Draw the visible units of a chain. If False, they take their means: less noise, but not a sample of the model.
    learning_rate_init : float, default=0.05
        Learning rate for the mean gradient of a step.
    momentum : float, default=0.9
    initial_momentum, momentum_epochs : float and int, default=0.5 and 5
        Momentum of the first `momentum_epochs` epochs.
    alpha : float, default=0.0
        L2 penalty on weights, divided by the rows of a step as in `Autoencoder`. With 100 rows, ``alpha=0.02`` is a
        weight cost of 0.0002 for each update.
    batch_size : int, default=100
    max_iter : int, default=30
        Number of epochs. There is no early stopping: the likelihood is intractable.
    weight_l1, learning_rate, shuffle, warm_start, random_state, verbose, precision, backend, n_threads
        As in `Autoencoder`.
    dispersion : {"gene", "gene-cell"}, default="gene"
        Has no effect. It remains so that earlier code and model files work.

    Attributes
    ----------
    coefs_, intercepts_ : list of ndarray
        W of shape (n_features, n_components) and its transpose; the biases b of the hidden units and c of the visible
        units.
    history_ : dict of list of float
        ``loss`` is the error of rebuilding a row from hidden units, a sum over features. The units are drawn given the
        row; with `persistent` their means are used. It is the cross-entropy for binary visible units, the squared error
        for Gaussian ones. It does not bound the likelihood. The rest as in `Autoencoder`.

    Notes
    -----
    `fit` and `partial_fit` ignore y and refuse `batch`: an RBM cannot be conditioned on batches. Rows of `X_val` only
    give ``history_["val_loss"]``. Values outside [0, 1] are an error for binary visible units.

    Examples
    --------
    >>> import numpy as np
    >>> from narrows import RBM
    >>> V = np.random.default_rng(0).integers(0, 2, (60, 8)).astype(np.float32)
    >>> rbm = RBM(4, max_iter=5, random_state=0).fit(V)
    >>> rbm.free_energy(V).shape, rbm.sample(3, n_gibbs=10, random_state=0).shape
    ((60,), (3, 8))
    """

    _rebuilds_y = False
    _constraints = BaseAutoencoder._constraints | {
        "dispersion": choice(("gene", "gene-cell")),
        "visible": choice(tuple(UNITS)),
        "hidden": choice(tuple(UNITS)),
        "n_gibbs": integer(1),
        "persistent": boolean,
        "sample_visible": boolean,
        "initial_momentum": real("[0, 1)"),
        "momentum_epochs": integer(0),
    }

    def __init__(
        self,
        n_components: int = 256,
        *,
        dispersion: str = "gene",
        alpha: float = 0.0,
        weight_l1: float = 0.0,
        learning_rate_init: float = 0.05,
        momentum: float = 0.9,
        learning_rate: str = "constant",
        batch_size: int = 100,
        max_iter: int = 30,
        shuffle: bool | str = True,
        warm_start: bool = False,
        random_state: int | np.random.RandomState | np.random.Generator | None = None,
        verbose: int = 0,
        precision: str = "float32",
        backend: str = "auto",
        n_threads: int | None = None,
        visible: str = "bernoulli",
        hidden: str = "bernoulli",
        n_gibbs: int = 1,
        persistent: bool = False,
        sample_visible: bool = True,
        initial_momentum: float = 0.5,
        momentum_epochs: int = 5,
    ) -> None:
        self.n_components = n_components
        self.dispersion = dispersion
        self.alpha = alpha
        self.weight_l1 = weight_l1
        self.learning_rate_init = learning_rate_init
        self.momentum = momentum
        self.learning_rate = learning_rate
        self.batch_size = batch_size
        self.max_iter = max_iter
        self.shuffle = shuffle
        self.warm_start = warm_start
        self.random_state = random_state
        self.verbose = verbose
        self.precision = precision
        self.backend = backend
        self.n_threads = n_threads
        self.visible = visible
        self.hidden = hidden
        self.n_gibbs = n_gibbs
        self.persistent = persistent
        self.sample_visible = sample_visible
        self.initial_momentum = initial_momentum
        self.momentum_epochs = momentum_epochs

    @property
    def loss(self) -> str:
        """The loss of reconstructions: ``"bce"`` for binary visible units, ``"mse"`` for Gaussian ones."""
        return "bce" if self.visible == "bernoulli" else "mse"

    def free_energy(self, X: Any) -> Array:
        """Minus log p(v) up to a constant of the model: -log of the sum of exp(-E) over the hidden units, exactly.

        Parameters
        ----------
        X : array, CSR / CSC, data frame or Source of shape (n_samples, n_features)

        Returns
        -------
        ndarray of shape (n_samples,)
            For binary units -c'v - sum softplus(b + W'v). For Gaussian visible units sum (v - c)**2 / 2 replaces -c'v;
            for Gaussian hidden units sum (b + W'v)**2 / 2 replaces the sum of softplus. Of X's dtype if that is float32
            or float64, else the network's.

        Raises
        ------
        ValueError
            Values outside [0, 1] for binary units.
        """
        check_is_fitted(self)
        table = encoding_table(self, X)
        blocks = (block for block, *_ in table.blocks(self._block_rows()))
        parts = [self._free_energy(block.toarray() if isinstance(block, Shifted) else block) for block in blocks]
        return np.concatenate(parts).astype(table.result_dtype, copy=False)

    def score_samples(self, X: Any, y: Any = None, *, batch: Any = None) -> Array:
        """Minus the free energy of each row: log p(v) up to a constant of the model. Higher is better.

        Differences between rows are exact. Do not compare values of two models.

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
        read_condition(self, batch, 0)
        return -self.free_energy(X)

    def sample(self, n: int = 1, n_gibbs: int = 1000, random_state: Any = None, *, noise: bool = False) -> Array:
        """New rows from the model: `n` Markov chains that begin at random.

        Parameters
        ----------
        n : int
            Number of rows; each row has its own chain.
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
        randomness("random_state", random_state)
        seed, network = draw_seed(random_state), self._network
        rows = np.empty((n, network.spec.n_outputs), network.dtype)
        size = self._block_rows()
        for first in range(0, n, size):
            part = rows[first : first + size]
            part[...] = self._chains(len(part), n_gibbs, seed, first, noise)
        return rows

    def _chains(self, count: int, n_gibbs: int, seed: int, first: int, noise: bool) -> Array:
        """The visible units at the end of `count` chains, which are the rows from `first` on of a sample."""
        network, (up, down) = self._network, self._network.spec.layers
        W, (b, c) = self.coefs_[0], self.intercepts_
        hidden = _draws(up.activation, seed, _HIDDEN, first, count, up.n_out)
        visible = _draws(down.activation, seed, _VISIBLE, first, count, down.n_out)
        h: Array = np.full((count, up.n_out), 0.5 if up.activation is Activation.SIGMOID else 0.0)
        for step in range(n_gibbs):
            states = next(hidden)(h).astype(network.dtype)
            if network.backend == "cuda":
                v = network.apply(states, Mode.DECODE)
            else:  # A program costs more than the product of a few rows.
                v = functional.dense(states, W.T, c, down.activation.name.lower(), n_threads=self.n_threads)
            if step == n_gibbs - 1:
                break
            v = next(visible)(v).astype(network.dtype)
            if network.backend == "cuda":
                h = network.apply(v, Mode.ENCODE)
            else:
                h = functional.dense(v, W, b, up.activation.name.lower(), n_threads=self.n_threads)
        return next(visible)(v) if noise else v

    def _input_loss(self, loss: Loss, *, separate_target: bool) -> Loss:
        return LOSSES[self.loss].loss

    def _spec(self, data: DataFacts) -> NetworkSpec:
        if data.n_conditions:
            self._check_conditioned()
        n_hidden = int(self.n_components)
        return NetworkSpec(
            layers=(
                LayerSpec(data.n_features, n_hidden, UNITS[self.hidden]),
                LayerSpec(n_hidden, data.n_features, UNITS[self.visible], tied_to=0),
            ),
            latent=1,
            loss=LOSSES[self.loss].loss,
            training=Training(
                penalties=Penalties(alpha=float(self.alpha), weight_l1=float(self.weight_l1)),
                update=Update(Solver.SGD, momentum=float(self.momentum)),
                gibbs=Gibbs(
                    int(self.n_gibbs),
                    n_chains=int(self.batch_size) if self.persistent else 0,
                    sample_visible=bool(self.sample_visible),
                ),
            ),
            data=data.bound,
        )

    def _options(self, seed: int) -> Options:
        return dataclasses.replace(
            super()._options(seed),
            initial_momentum=float(self.initial_momentum),
            momentum_epochs=int(self.momentum_epochs),
        )

    def _free_energy(self, X: Any) -> Array:
        up, down = self._network.spec.layers
        W, (b, c) = self.coefs_[0], self.intercepts_
        if X.dtype != W.dtype:
            X = X.astype(W.dtype)
        if on_gpu(X):
            W, b, c = (like(array, X, array.dtype) for array in (W, b, c))
        binary = up.activation is Activation.SIGMOID
        terms = functional.dense(X, W, b, "softplus" if binary else "linear", n_threads=self.n_threads)
        hidden = terms if binary else terms * terms / 2
        if down.activation is Activation.SIGMOID:
            visible = X @ -c if is_sparse(X) else (X * -c).sum(axis=1, dtype=np.float64)
        else:
            visible = np.square((X.toarray() if is_sparse(X) else X) - c).sum(axis=1, dtype=np.float64) / 2
        energy: Array = visible - hidden.sum(axis=1, dtype=np.float64)
        return energy


def _draws(
    activation: Activation, seed: int, stream: int, first: int, count: int, width: int
) -> Iterator[Callable[[Array], Array]]:
    """For each step of a chain, a function from means to units drawn with them, for rows from `first` on."""
    n_steps = max(1, _DRAWN_VALUES // (count * width))
    for step in itertools.count(0, n_steps):
        uniform = philox.uniforms(seed, stream, range(step, step + n_steps), count, width, first)
        if activation is Activation.SIGMOID:
            yield from (partial(np.less, u) for u in uniform)
        else:
            yield from (partial(np.add, ndtri(u)) for u in uniform)
