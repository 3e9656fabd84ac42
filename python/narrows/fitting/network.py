"""From parameters to a network: its specification, its first weights, and the fitted network that is applied.

Promises: the same parameters and seed give the same specification and, to the last bit, the same first
weights on every backend; `Network.apply` may be called from several threads and equals the serial result.
Never: trains.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
import threading
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..backends import Program, State, compile_plan, resolve
from ..plan.lowering import lower
from ..plan.ops import DISPERSION_PACE, LOG_DISPERSION_LIMIT
from ..plan.plan import FROM_CODES, Mode, Plan
from ..plan.spec import ACTIVATIONS, Activation, LayerSpec, Loss, NetworkSpec, Precision, Solver
from ..random.weights import initial_coupling, initial_weight
from ..rows.shifted import Shifted, stored_rows
from .parameters import CORRUPTIONS, check_takes_batches, decoder_sizes, hidden_sizes, output_activation
from .table import Totals, is_sparse

__all__ = ["SPARSE_DENSITY", "Network", "begin_counts", "build_spec", "dense_layers", "dispersions", "initial_state"]

SPARSE_DENSITY = 0.15
"""Training works on sparse rows if at most this part of the data is stored: measured, see ``docs/architecture.md``."""
FIRST_DISPERSION = 5.0
"""First inverse dispersion of counts, as of those of genes given the kind of cell. Moments would not do, which the
differences between kinds swell; and from lesser ones codes learn more slowly at first.
"""
FIRST_DROPOUT = -3.0
"""First logit of a count being zero by dropout: one in twenty."""


def build_spec(
    estimator: Any,
    n_features: int,
    n_outputs: int,
    *,
    corruption_range: tuple[float, float] = (0.0, 1.0),
    separate_target: bool = False,
    weighted: bool = False,
    density: float = 1.0,
    shifted: bool = False,
    library: float = 1.0,
    target_density: float = 1.0,
    batch: int = 1,
    n_batches: int = 0,
) -> NetworkSpec:
    """The network that an estimator's (checked) parameters describe, for batches of `batch` rows of data of which the
    part `density` is stored (less a shift, if `shifted`), and of targets of which the part `target_density` is.

    Raises
    ------
    ValueError
        If the weights are tied and the target's width is not the input's, images do not fit the layers, a decoder
        in Gram form is asked for dense targets, or a decoder cannot be told batches.
    """
    e = estimator
    layers, latent = e._layers(n_features, n_outputs)
    if n_batches:
        check_takes_batches(e)
        first = layers[latent]
        told = dataclasses.replace(first, n_in=first.n_in + n_batches)
        layers = (*layers[:latent], told, *layers[latent + 1 :])
    loss = Loss[e.loss.upper()]
    cell_dispersion = loss.dispersed and getattr(e, "dispersion", "gene") == "gene-cell"
    heads = 1 + cell_dispersion + (loss is Loss.ZINB)
    if heads > 1:
        layers = (*layers[:-1], dataclasses.replace(layers[-1], n_out=heads * layers[-1].n_out))
    # With a target of its own the noise is in the pairs.
    corruption = None if e.corruption is None or separate_target else CORRUPTIONS[e.corruption]
    spec = NetworkSpec(
        layers=layers,
        latent=latent,
        loss=loss,
        huber_delta=float(e.huber_delta),
        corruption=corruption,
        corruption_level=float(e.corruption_level) if corruption is not None else 0.0,
        corruption_range=corruption_range,
        activity_l1=float(e.activity_l1),
        kl_sparsity=float(e.kl_sparsity),
        sparsity_target=float(e.sparsity_target),
        contractive=float(e.contractive),
        contractive_probes=int(e.n_probes) if e.contractive_method == "hutchinson" else 0,
        contractive_hessian=float(e.contractive_hessian),
        hessian_std=float(e.hessian_std),
        n_corruptions=int(e.n_corruptions),
        alpha=float(e.alpha),
        weight_l1=float(e.weight_l1),
        solver=Solver[e.solver.upper()],
        momentum=float(e.momentum),
        beta_1=float(e.beta_1),
        beta_2=float(e.beta_2),
        epsilon=float(e.epsilon),
        clip_norm=None if e.clip_norm is None else float(e.clip_norm),
        separate_target=separate_target,
        weighted=weighted,
        variational=e.variational,
        kl_weight=kl_weight(e) if e.variational else 1.0,
        n_gibbs=int(getattr(e, "n_gibbs", 0)),
        n_chains=int(e.batch_size) if getattr(e, "persistent", False) else 0,
        sample_visible=bool(getattr(e, "sample_visible", True)),
        cell_dispersion=cell_dispersion,
        # A target of its own says nothing of what X is.
        log_normalize=loss.of_counts and (e.counts_input or not separate_target),
        library=library,
        shifted=shifted,
        n_batches=n_batches,
    )
    if e.sparse_decoder == "gram" and target_density == 1:
        raise ValueError(
            f"sparse_decoder='gram' needs sparse {'y' if separate_target else 'X'} (CSR), of which not all is stored; "
            "'auto' takes dense rows, too"
        )
    gram = e.sparse_decoder == "gram" or (
        e.sparse_decoder == "auto" and target_density < 1 and gram_pays(batch, layers[-1].n_in, target_density)
    )
    return dataclasses.replace(
        spec,
        sparse_input=density <= SPARSE_DENSITY and spec.takes_sparse_input,
        gram_decoder=gram and spec.takes_gram_decoder,
    )


def gram_pays(batch: int, inner: int, density: float) -> bool:
    """Whether the squared error of a layer with `inner` inputs costs less in Gram form.

    Both are counted for each output, in multiply-adds of a dense product: three products and the passes over the array
    of outputs; or two products with Gram matrices and two with the nonzeros, whose multiply-adds cost six times as
    much. Measured, see ``docs/architecture.md``.
    """
    dense = batch * (3 * inner + 96)
    gram = 2 * inner * inner + 12 * density * batch * (inner + 16)
    return gram < dense


def dense_layers(e: Any, n_features: int, n_outputs: int) -> tuple[tuple[LayerSpec, ...], int]:
    """The layers of an estimator that has dense ones alone, and how many of them are the encoder's."""
    hidden, decoder = hidden_sizes("hidden_layer_sizes", e.hidden_layer_sizes), decoder_sizes(e)
    if e.tied_weights and n_outputs != n_features:
        raise ValueError(f"tied_weights=True needs a target as wide as X: {n_outputs} columns of y, {n_features} of X")
    latent = len(hidden) + 1
    widths = (n_features, *hidden, int(e.n_components), *decoder, n_outputs)
    last = len(widths) - 2
    layers = []
    for i, (n_in, n_out) in enumerate(itertools.pairwise(widths)):
        named = e.latent_activation if i == latent - 1 else e.activation
        between = i not in (latent - 1, last)
        layers.append(
            LayerSpec(
                n_in,
                # Means and log-variances.
                2 * n_out if e.variational and i == latent - 1 else n_out,
                output_activation(e) if i == last else ACTIVATIONS[named],
                dropout=float(e.dropout) if between else 0.0,
                tied_to=last - i if e.tied_weights and i >= latent else None,
            )
        )
    return tuple(layers), latent


def begin_counts(spec: NetworkSpec, state: State, totals: Totals) -> None:
    """Let every row begin as the mean of all, with the first dispersions and with little dropout."""
    last, n = spec.layers[-1], spec.n_outputs
    if last.convolution is not None:  # which has a bias for each filter
        return
    bias = state[f"b{len(spec.layers) - 1}"][0]
    bias[:n] = np.log(totals.shares * (spec.library if last.activation is Activation.EXP else 1.0))
    if spec.cell_dispersion:
        bias[n : 2 * n] = math.log(FIRST_DISPERSION)
    if spec.loss is Loss.ZINB:
        bias[-n:] = FIRST_DROPOUT


def kl_weight(estimator: Any) -> float:
    """What the divergence weighs beside the loss of a variational estimator, in the loss's units.

    Minus the log-likelihood of a Gaussian decoder of variance v is the squared error over 2 v, and a constant: there,
    the sum of it and beta times the divergence is minimised as squared error + 2 v beta divergence.
    """
    scale = 2 * float(estimator.decoder_variance) if estimator.loss == "mse" else 1.0
    return scale * float(estimator.beta)


def initial_state(spec: NetworkSpec, seed: int, dtype: Any = np.float64) -> State:
    """First weights; biases zero, learned variances one, inverse dispersions `FIRST_DISPERSION`."""
    state: State = {}
    for i, layer in enumerate(spec.layers):
        n_in, n_out = layer.weight_shape
        state[f"b{i}"] = np.zeros((1, n_out), dtype)
        if layer.tied_to is None and spec.n_gibbs:
            state[f"W{i}"] = initial_coupling(n_in, n_out, seed, dtype)
        elif layer.tied_to is None:
            fans = None if layer.convolution is None else layer.convolution.fans
            state[f"W{i}"] = initial_weight(n_in, n_out, layer.activation, seed, i, dtype, fans)
    if spec.loss is Loss.GAUSSIAN:
        state["logvar"] = np.zeros((1, spec.n_outputs), dtype)
    if "log_dispersion" in spec.parameter_shapes:
        state["log_dispersion"] = np.full((1, spec.n_outputs), math.log(FIRST_DISPERSION) / DISPERSION_PACE, dtype)
    if spec.n_chains:
        mean = 0.5 if spec.layers[0].activation is Activation.SIGMOID else 0.0
        state["chain"] = np.full((spec.n_chains, spec.n_components), mean, dtype)
    return state


def dispersions(parameter: NDArray[Any]) -> NDArray[np.float64]:
    """Inverse dispersions of features, of the parameter ``log_dispersion``; shape (n_features,)."""
    held = DISPERSION_PACE * parameter.reshape(-1).astype(np.float64)
    found: NDArray[np.float64] = np.exp(np.clip(held, -LOG_DISPERSION_LIMIT, LOG_DISPERSION_LIMIT))
    return found


class Network:
    """A fitted network: parameters, and a program to apply them that is made when first needed.

    Parameters
    ----------
    spec : NetworkSpec
        As trained.
    batch : int
        Rows per step, in training and when applied.
    state : dict of ndarray
        Parameters and, where known, optimiser state: the network's own from here on.
    precision : {"float32", "float64", "bfloat16", "tf32"}
    requested : str
        The backend's name as given to the estimator, or to `run_on`.
    n_threads : int or None
    """

    def __init__(
        self,
        spec: NetworkSpec,
        batch: int,
        state: State,
        *,
        precision: str,
        requested: str,
        n_threads: int | None,
    ) -> None:
        self.spec = spec
        self.batch = batch
        self.state = state
        self.precision = precision
        self.requested = requested
        self.n_threads = n_threads
        self._forget()

    def run_on(self, requested: str, n_threads: int | None) -> None:
        """From now on run on this backend, with so many threads."""
        if (requested, n_threads) != (self.requested, self.n_threads):
            self.requested, self.n_threads = requested, n_threads
            self._forget()

    def _forget(self) -> None:
        self._lock = threading.Lock()
        # By whether input and target are taken as sparse rows, less a shift, and are the same.
        self._programs: dict[tuple[bool, ...], Program] = {}
        self._plan: Plan | None = None
        self._decoder: Network | None = None
        self._backend: str | None = None

    def __getstate__(self) -> dict[str, Any]:
        # Programs and locks belong to a process, and the best backend to a machine.
        return {name: value for name, value in vars(self).items() if not name.startswith("_")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    def __deepcopy__(self, memo: dict[int, Any]) -> Network:
        other = copy.copy(self)
        other.state = {name: array.copy() for name, array in self.state.items()}
        return other

    @property
    def backend(self) -> str:
        """The backend that runs it here."""
        if self._backend is None:
            self._backend = resolve(self.requested)
        return self._backend

    @property
    def dtype(self) -> np.dtype[Any]:
        """In which it holds its parameters and activations."""
        return Precision.of(self.precision).dtype

    @property
    def plan(self) -> Plan:
        """The plan of training."""
        if self._plan is None:
            self._plan = lower(self.spec, self.batch)
        return self._plan

    @property
    def parameters(self) -> State:
        """Weights and biases by slot name."""
        return {slot.name: self.state[slot.name] for slot in self.plan.parameters}

    def coefs(self) -> list[NDArray[Any]]:
        """Read-only weights of every layer, shape (n_in, n_out); a tied layer's are a transposed view. Those of a
        convolution have shape (kernel height, kernel width, channels in, channels out).
        """
        weights: list[NDArray[Any]] = []
        for i, layer in enumerate(self.spec.layers):
            tied, conv = layer.tied_to, layer.convolution
            weights.append(self.state[f"W{i}"].view() if tied is None else self.state[f"W{tied}"].T)
            if conv is not None:
                weights[-1] = weights[-1].reshape(*conv.kernel, conv.shape[2], conv.filters)
            weights[-1].flags.writeable = False
        return weights

    def intercepts(self) -> list[NDArray[Any]]:
        """Read-only biases of every layer, shape (n_out,)."""
        biases = [self.state[f"b{i}"].reshape(-1) for i in range(len(self.spec.layers))]
        for bias in biases:
            bias.flags.writeable = False
        return biases

    def apply(self, X: Any, mode: Mode, target: Any = None, batch: Any = None) -> NDArray[Any]:
        """Run an inference mode over the rows of an array, CSR or Shifted; SCORE needs a target, which may be X, and
        must be if it is Shifted.

        What decodes needs the numbers of batches if the network knows such.
        """
        with self._lock:
            own = isinstance(target, Shifted)
            shifted = own or isinstance(X, Shifted)
            spec = dataclasses.replace(_without_training(self.spec), shifted=shifted, separate_target=not own)
            # By the form alone: by its density, a row's last bits could depend on the rows beside it.
            sparse = is_sparse(stored_rows(X)) and mode not in FROM_CODES and spec.takes_sparse_input
            gram = is_sparse(stored_rows(target)) and spec.gram_decoder
            program = self._programs.get((sparse, gram, shifted, own))
            if program is None:
                program = compile_plan(
                    lower(dataclasses.replace(spec, sparse_input=sparse, gram_decoder=gram), self.batch),
                    self.backend,
                    # Without tensor cores nothing need be rounded for them: a model of a GPU runs on any machine.
                    precision="float32" if self.precision == "tf32" and self.backend != "cuda" else self.precision,
                    n_threads=self.n_threads,
                )
                program.load(self.parameters)
                self._programs[sparse, gram, shifted, own] = program
            return program.apply(X, mode, target, batch)

    def decoder_outputs(self, Z: Any, batch: Any = None) -> NDArray[Any]:
        """What the last layer puts out for codes before its activation, shape (n_rows, n_heads * n_outputs)."""
        with self._lock:
            if self._decoder is None:
                last = dataclasses.replace(self.spec.layers[-1], activation=Activation.LINEAR)
                spec = dataclasses.replace(
                    self.spec,
                    layers=(*self.spec.layers[:-1], last),
                    loss=Loss.MSE,
                    cell_dispersion=False,
                    log_normalize=False,
                    library=1.0,
                )
                self._decoder = Network(
                    spec,
                    self.batch,
                    self.parameters,
                    precision=self.precision,
                    requested=self.requested,
                    n_threads=self.n_threads,
                )
        return self._decoder.apply(Z, Mode.DECODE, batch=batch)


def _without_training(spec: NetworkSpec) -> NetworkSpec:
    """The same network with a target of its own and as little memory for training as a plan can have."""
    return dataclasses.replace(
        spec,
        separate_target=True,
        corruption=None,
        weighted=False,
        n_gibbs=0,
        n_chains=0,
        activity_l1=0.0,
        kl_sparsity=0.0,
        contractive=0.0,
        contractive_hessian=0.0,
        alpha=0.0,
        weight_l1=0.0,
        solver=Solver.SGD,
        clip_norm=None,
    )
