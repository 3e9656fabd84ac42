"""`DeepAutoencoder`: layers are trained one by one, and then together.

- Each layer learns from the codes of the layers before it. The codes are in memory if they fit into a block; otherwise
  they are computed block by block.
- No other codes are kept.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..backends import State
from ..data.source import Source
from ..errors import DivergenceError
from ..fitting.inputs import make_table
from ..fitting.network import Network
from ..fitting.parameters import choice, integer, real
from ..fitting.run import train
from ..fitting.start import Start
from ..plan.activations import ACTIVATIONS, Activation
from ..plan.plan import Mode
from ..plan.spec import NetworkSpec
from ..rows.devices import on_gpu, rows_of
from ..training import Callback, Interrupted, Progress
from .autoencoder import Autoencoder
from .base import BaseAutoencoder
from .preset import preset
from .rbm import RBM, UNITS

__all__ = ["DeepAutoencoder"]

RATE, GAUSSIAN_RATE = 0.1, 0.001
"""Learning rates of RBMs with binary units only, and of RBMs with Gaussian units."""

_SHARED = (
    "solver", "momentum", "beta_1", "beta_2", "epsilon", "clip_norm", "alpha", "weight_l1", "tied_weights",
    "corruption", "corruption_level", "huber_delta", "dispersion",
)  # fmt: skip
"""Parameters that greedy pretraining passes on to each layer."""


@preset(hidden_layer_sizes=(1000, 500, 250), activation="sigmoid")
class DeepAutoencoder(Autoencoder):
    """Deep autoencoder whose layers are pretrained (Hinton and Salakhutdinov, Science 313, 2006).

    With ``pretrain="rbm"``, a restricted Boltzmann machine learns each layer from the codes of the layers before it
    (CD-1). The stack is then unrolled. The encoder takes the weights and the biases of the hidden units; the decoder
    takes the transposed weights and the biases of the visible units. Then the network is trained as in `Autoencoder`.

    With ``pretrain="greedy"`` each layer is trained as an autoencoder with one hidden layer, which denoises if
    `corruption` is set (Vincent et al., JMLR 11, 2010).

    `fit` pretrains unless `warm_start` continues an earlier fit. The first `partial_fit` pretrains too.

    Parameters
    ----------
    pretrain : {"rbm", "greedy", None}, default="rbm"
        ``"rbm"`` needs sigmoid hidden layers, linear or sigmoid latents, a sigmoid or linear output, and a decoder that
        mirrors the encoder. Sigmoid layers are binary units; linear layers are Gaussian units of variance 1. The output
        layer decides on the visible units: standardise the features for a linear output; they must lie in [0, 1] for a
        sigmoid output.
    pretrain_max_iter : int, default=10
        Epochs of each layer.
    pretrain_learning_rate : float, optional
        The default for ``"rbm"`` is the published rate: 0.1, and 0.001 for Gaussian units. The default for ``"greedy"``
        is `learning_rate_init`, which falls along half a cosine.
    pretrain_batch_size : int, default=100
    pretrain_alpha : float, default=0.02
        L2 penalty of ``"rbm"``, divided by the rows of a step: with 100 rows, the published weight cost of 0.0002.
    n_components, hidden_layer_sizes, ...
        As in `Autoencoder`. Pretraining uses neither dropout nor the penalties on codes.

    Attributes
    ----------
    pretrain_history_ : list of dict of list of float
        ``history_`` of each layer's pretraining. It is neither saved nor restored by a resume.
    coefs_, history_, ...
        As in `Autoencoder`.

    Examples
    --------
    >>> import numpy as np
    >>> X = np.random.default_rng(0).random((60, 8), dtype=np.float32)
    >>> from narrows import DeepAutoencoder
    >>> ae = DeepAutoencoder(2, hidden_layer_sizes=(6, 4), pretrain_max_iter=2, max_iter=2, random_state=0).fit(X)
    >>> [len(history["loss"]) for history in ae.pretrain_history_]
    [2, 2, 2]
    """

    _takes_conditions = False
    _constraints = Autoencoder._constraints | {
        "pretrain": choice(("rbm", "greedy"), optional=True),
        "pretrain_max_iter": integer(1),
        "pretrain_learning_rate": real("(0, inf)", optional=True),
        "pretrain_batch_size": integer(1),
        "pretrain_alpha": real("[0, inf)"),
    }

    pretrain: str | None
    pretrain_max_iter: int
    pretrain_learning_rate: float | None
    pretrain_batch_size: int
    pretrain_alpha: float

    pretrain_history_: list[dict[str, list[float]]]

    def __init__(
        self,
        n_components: int = 30,
        *,
        pretrain: str | None = "rbm",
        pretrain_max_iter: int = 10,
        pretrain_learning_rate: float | None = None,
        pretrain_batch_size: int = 100,
        pretrain_alpha: float = 0.02,
        **inherited: Any,
    ) -> None: ...

    def _check_together(self) -> None:
        super()._check_together()
        if self.pretrain is None:
            return
        self._check_mirrored(f"pretrain={self.pretrain!r}")
        hidden, latent, output = ACTIVATIONS[self.activation], ACTIVATIONS[self.latent_activation], self._output()
        binary = hidden is Activation.SIGMOID or not self._hidden_sizes()
        if self.pretrain == "rbm" and not (binary and {latent, output} <= {*UNITS.values()}):
            raise ValueError(
                f"pretrain='rbm' needs activation='sigmoid' (not {self.activation!r}), latent_activation 'linear' or "
                f"'sigmoid' (not {self.latent_activation!r}) and an output that is linear or sigmoid (not "
                f"{output.name.lower()!r}); pretrain='greedy' takes any"
            )

    def _first_state(self, start: Start) -> State:
        if self.pretrain is None:
            return super()._first_state(start)
        spec, table, rows, seed, block_bytes, stop = start
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
            options = dataclasses.replace(layer._options((seed + 1 + i) % 2**64), monitor=None)
            try:
                train(
                    layer,
                    # Rows on a GPU stay there: block_bytes limits the host's memory.
                    below.loaded(sys.maxsize if on_gpu(table.X) else block_bytes),
                    chosen,
                    options,
                    again=False,
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
        """Parameters of the deep network from the parameters of its layers, which are dropped one by one."""
        state: State = {}
        last = len(spec.layers) - 1
        for i in range(len(trained)):
            own = trained[i].parameters
            trained[i].state = {}
            state[f"W{i}"], state[f"b{i}"], state[f"b{last - i}"] = own["W0"], own["b0"], own["b1"]
            if spec.layers[last - i].tied_to is None:
                state[f"W{last - i}"] = own["W1"] if "W1" in own else own["W0"].T.copy()
            state |= {name: own[name] for name in ("logvar", "log_dispersion") if name in own}
        for name, shape in spec.parameter_shapes.items():  # an RBM learns no variance
            state.setdefault(name, np.zeros(shape, state["b0"].dtype))
        return state

    def _stages(self, spec: NetworkSpec) -> Sequence[BaseAutoencoder]:
        """An estimator for each layer of the encoder.

        Raises
        ------
        ValueError
            ``pretrain="rbm"`` and a target that is not as wide as X.
        """
        widths = [*self._hidden_sizes(), int(self.n_components)]
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
        latent = ACTIVATIONS[self.latent_activation]
        kinds = [named[self._output()], *(["bernoulli"] * (len(widths) - 1)), named[latent]]
        if spec.n_outputs != spec.n_features:
            raise ValueError(
                f"pretrain='rbm' needs a target as wide as X: y has {spec.n_outputs} columns, X has {spec.n_features}"
            )
        machines = []
        for width, visible, hidden in zip(widths, kinds, kinds[1:], strict=False):
            rate = self.pretrain_learning_rate or (GAUSSIAN_RATE if "gaussian" in (visible, hidden) else RATE)
            own: dict[str, Any] = {"visible": visible, "hidden": hidden, "sample_visible": False}
            machines.append(RBM(width, learning_rate_init=rate, alpha=self.pretrain_alpha, **own, **shared))
        return machines


class _Codes(Source):
    """The codes of some rows, computed as they are read.

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
        # Rows for which the output of the widest layer takes a few MiB at most.
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
    """Stops the training of a layer when `Checkpoint.stop` says so; there is nothing to save yet."""

    def __init__(self, stop: Callable[[], str | None]) -> None:
        self.stop = stop

    def on_batch(self, progress: Progress) -> None:
        if (reason := self.stop()) is not None:
            raise Interrupted(reason)
