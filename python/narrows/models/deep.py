"""`DeepAutoencoder`: many layers that are trained one by one before they are trained together.

Promises: each layer learns from the codes of those before it, held whole only if they fit into the bytes of a block and
made block by block otherwise; no codes are held but those that the layer at hand learns from.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..backends import State
from ..data.source import Source
from ..errors import DivergenceError
from ..fitting.inputs import make_table
from ..fitting.network import Network
from ..fitting.parameters import UNITS, hidden_sizes, pretrained_activations
from ..fitting.run import train
from ..fitting.table import Table
from ..plan.plan import Mode
from ..plan.spec import ACTIVATIONS, Activation, NetworkSpec
from ..rows.devices import on_gpu, rows_of
from ..training import Callback, Interrupted, Options, Progress
from .autoencoder import Autoencoder
from .preset import preset
from .rbm import RBM

__all__ = ["DeepAutoencoder"]

RATE, GAUSSIAN_RATE = 0.1, 0.001
"""Learning rates of machines of binary units, and of those with Gaussian ones."""

_SHARED = (
    "solver", "momentum", "beta_1", "beta_2", "epsilon", "clip_norm", "alpha", "weight_l1", "tied_weights",
    "corruption", "corruption_level", "huber_delta", "dispersion",
)  # fmt: skip
"""Parameters that the layers of greedy pretraining have of the whole."""


@preset(
    added={
        "pretrain": "rbm",
        "pretrain_max_iter": 10,
        "pretrain_learning_rate": None,
        "pretrain_batch_size": 100,
        "pretrain_alpha": 0.02,
    },
    n_components=30,
    hidden_layer_sizes=(1000, 500, 250),
    activation="sigmoid",
)
class DeepAutoencoder(Autoencoder):
    """Deep autoencoder whose layers are pretrained (Hinton and Salakhutdinov, Science 313, 2006).

    With ``pretrain="rbm"``, layer by layer a restricted Boltzmann machine learns from the codes of the layers before it
    (CD-1). The stack is unrolled: the encoder has its weights and the biases of the hidden units, the decoder the
    transposed weights and the biases of the visible units. Then all is trained as an `Autoencoder` is.

    With ``pretrain="greedy"`` each layer is trained as an autoencoder of one hidden layer, which denoises where
    `corruption` is set (Vincent et al., JMLR 11, 2010).

    `fit` pretrains unless it goes on (`warm_start`), and so does the first `partial_fit`.

    Parameters
    ----------
    pretrain : {"rbm", "greedy", None}, default="rbm"
        ``"rbm"`` needs sigmoid hidden layers, linear or sigmoid latents, a sigmoid or linear output, and a decoder that
        mirrors the encoder. Sigmoid layers are binary units and linear ones Gaussian with variance 1; the visible units
        are what the output layer is. With a linear output, standardise the features; with a sigmoid one they must lie
        in [0, 1].
    pretrain_max_iter : int, default=10
        Epochs of each layer.
    pretrain_learning_rate : float, optional
        By default the published rates for ``"rbm"``: 0.1, and 0.001 where units are Gaussian; for ``"greedy"``
        `learning_rate_init`, which falls along half a cosine.
    pretrain_batch_size : int, default=100
    pretrain_alpha : float, default=0.02
        L2 penalty of ``"rbm"``, divided by the batch's rows: with 100 the published weight cost of 0.0002.
    n_components, hidden_layer_sizes, ...
        As in `Autoencoder`. Dropout and the penalties on codes are for the training of the whole.

    Attributes
    ----------
    pretrain_history_ : list of dict of list of float
        ``history_`` of each layer's pretraining; not in a saved model, nor after a resume.
    coefs_, history_, ...
        As in `Autoencoder`.
    """

    _takes_batches = False

    pretrain: str | None
    pretrain_max_iter: int
    pretrain_learning_rate: float | None
    pretrain_batch_size: int
    pretrain_alpha: float

    pretrain_history_: list[dict[str, list[float]]]

    def _first_state(
        self,
        spec: NetworkSpec,
        table: Table,
        rows: NDArray[np.int64],
        seed: int,
        block_bytes: int,
        stop: Callable[[], str | None] | None,
    ) -> State:
        if self.pretrain is None:
            return super()._first_state(spec, table, rows, seed, block_bytes, stop)
        layers = self._stages(spec)
        self.pretrain_history_ = []
        trained: list[Network] = []
        for i, layer in enumerate(layers):
            if self.verbose:
                print(f"pretraining layer {i + 1} of {len(layers)}: {spec.layers[i].n_in}-{spec.layers[i].n_out}")
            if i == 0:
                paired = table.target if self.pretrain == "greedy" else None
                below, chosen = make_table(layer, table.X, paired, table.weight), rows
            else:
                weight = None if table.weight is None else table.weight[rows]
                below, chosen = make_table(layer, _Codes(table.X, rows, trained), None, weight), np.arange(len(rows))
            options = Options(
                max_iter=int(self.pretrain_max_iter),
                seed=(seed + 1 + i) % 2**64,
                learning_rate=layer.learning_rate,
                learning_rate_init=float(layer.learning_rate_init),
                **layer._first_epochs(),
            )
            try:
                train(
                    layer,
                    # On a GPU they stay, whatever a block may have of the host's memory.
                    below.loaded(sys.maxsize if on_gpu(table.X) else block_bytes),
                    chosen,
                    options,
                    again=False,
                    shuffle=self.shuffle,
                    callbacks=[] if stop is None else [_Stopper(stop)],
                    block_bytes=block_bytes,
                )
            except DivergenceError as error:
                raise DivergenceError(
                    f"pretraining layer {i + 1} of {len(layers)}, pretrain_learning_rate="
                    f"{options.learning_rate_init:g}: {error}"
                ) from None
            trained.append(layer._network)
            self.pretrain_history_.append(layer.history_)
        return self._unrolled(spec, trained)

    def _unrolled(self, spec: NetworkSpec, trained: list[Network]) -> State:
        """Parameters of the whole, from those of its layers, which are given up one by one."""
        state: State = {}
        last = len(spec.layers) - 1
        for i in range(len(trained)):
            own = trained[i].parameters
            trained[i].state = {}
            state[f"W{i}"], state[f"b{i}"], state[f"b{last - i}"] = own["W0"], own["b0"], own["b1"]
            if spec.layers[last - i].tied_to is None:
                state[f"W{last - i}"] = own["W1"] if "W1" in own else own["W0"].T.copy()
            state |= {name: own[name] for name in ("logvar", "log_dispersion") if name in own}
        for name, shape in spec.parameter_shapes.items():  # a variance is not learned by a machine
            state.setdefault(name, np.zeros(shape, state["b0"].dtype))
        return state

    def _stages(self, spec: NetworkSpec) -> list[Autoencoder]:
        """An estimator for each layer of the encoder.

        Raises
        ------
        ValueError
            A target whose width a machine's rows do not have.
        """
        widths = [*hidden_sizes("hidden_layer_sizes", self.hidden_layer_sizes), int(self.n_components)]
        codes = [*([self.activation] * (len(widths) - 1)), self.latent_activation]
        shared = {name: getattr(self, name) for name in ("precision", "backend", "n_threads", "verbose", "shuffle")}
        shared |= {"batch_size": self.pretrain_batch_size, "max_iter": self.pretrain_max_iter}
        if self.pretrain == "greedy":
            rate = self.pretrain_learning_rate or self.learning_rate_init
            shared |= {name: getattr(self, name) for name in _SHARED} | {"learning_rate_init": rate}
            shared |= {"hidden_layer_sizes": (), "learning_rate": "cosine"}
            outputs = [(self.output_activation, self.loss)]
            inner = "bce" if ACTIVATIONS[self.activation] is Activation.SIGMOID else "mse"
            outputs += [(self.activation, inner)] * (len(widths) - 1)
            return [
                Autoencoder(width, latent_activation=code, output_activation=output, loss=loss, **shared)
                for width, code, (output, loss) in zip(widths, codes, outputs, strict=True)
            ]
        named = {activation: units for units, activation in UNITS.items()}
        _, latent, output = pretrained_activations(self)
        kinds = [named[output], *(["bernoulli"] * (len(widths) - 1)), named[latent]]
        if spec.n_outputs != spec.n_features:
            raise ValueError(
                f"pretrain='rbm' needs a target as wide as X: {spec.n_outputs} columns of y, {spec.n_features} of X"
            )
        machines: list[Autoencoder] = []
        for width, visible, hidden in zip(widths, kinds, kinds[1:], strict=False):
            rate = self.pretrain_learning_rate or (GAUSSIAN_RATE if "gaussian" in (visible, hidden) else RATE)
            own: dict[str, Any] = {"visible": visible, "hidden": hidden, "sample_visible": False}
            machines.append(RBM(width, learning_rate_init=rate, alpha=self.pretrain_alpha, **own, **shared))
        return machines


class _Codes(Source):
    """The codes that layers give some rows, made as they are read.

    Parameters
    ----------
    X : ndarray, CSR or Source of shape (n_rows, n_features)
    rows : ndarray of int64
    layers : list of Network
    """

    def __init__(self, X: Any, rows: NDArray[np.int64], layers: list[Network]) -> None:
        width, dtype = layers[-1].spec.n_components, layers[-1].state["b0"].dtype
        super().__init__((len(rows), width), dtype, name="codes")
        self._X, self._rows, self._layers = X, rows, tuple(layers)
        # Rows of the data for which the widest layer takes no more than a few MiB.
        widest = max(max(layer.n_in, layer.n_out) for network in layers for layer in network.spec.layers)
        self._step = max(1, (1 << 20) // widest)

    def _slice(self, start: int, stop: int) -> Any:
        return self._take(np.arange(start, stop))

    def _take(self, index: NDArray[np.int64]) -> Any:
        shape = len(index), self.shape[1]
        out: Any = np.empty(shape, self.dtype)
        for first in range(0, len(index), self._step):
            rows = self._rows[index[first : first + self._step]]
            block = self._X.read_stored(rows) if isinstance(self._X, Source) else rows_of(self._X, rows)
            for network in self._layers:
                block = network.apply(block, Mode.ENCODE)
            if first == 0 and on_gpu(block):
                out = np.empty_like(block, shape=shape)
            out[first : first + len(rows)] = block
        return out


class _Stopper(Callback):
    """Ends the training of a layer when a checkpoint's `stop` asks for it; there is nothing to save yet."""

    def __init__(self, stop: Callable[[], str | None]) -> None:
        self.stop = stop

    def on_batch(self, progress: Progress) -> None:
        if (reason := self.stop()) is not None:
            raise Interrupted(reason)
