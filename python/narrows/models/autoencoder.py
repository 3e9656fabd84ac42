"""`Autoencoder`, which has every parameter, and the estimators that preset some of them."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ..backends import State
from ..fitting.parameters import boolean, choice, hidden_sizes, integer, layer_sizes, real
from ..fitting.spec_of import DataFacts, conditioned, with_sparse_forms
from ..fitting.start import Start, begin_counts, dispersions
from ..plan.activations import ACTIVATIONS, Activation
from ..plan.losses import LOSSES, Loss, LossInfo
from ..plan.ops import JACOBIAN_LAYERS
from ..plan.spec import Corruption, LayerSpec, NetworkSpec, Noise, Penalties, Solver, Training, Update
from ..training import Options
from .base import BaseAutoencoder
from .preset import preset

__all__ = [
    "Autoencoder",
    "ContractiveAutoencoder",
    "DenoisingAutoencoder",
    "LinearAutoencoder",
    "SparseAutoencoder",
]

_HIDDEN = tuple(name for name, a in ACTIVATIONS.items() if a not in (Activation.SOFTMAX, Activation.EXP))
_CORRUPTIONS = {c.name.lower(): c for c in Corruption}


class Autoencoder(BaseAutoencoder):
    """Autoencoder: an encoder to a few latents, and a decoder that rebuilds the input from them.

    Each layer computes ``activation(X @ W + b)``. The loss is the mean over samples of the sum over features;
    penalties are added to it.

    Parameters
    ----------
    n_components : int, default=32
        Width of the latent layer; may exceed the number of features.
    hidden_layer_sizes : int or sequence of int, default=(128,)
        Widths of the encoder's hidden layers, from the input on; ``()`` for none.
    decoder_layer_sizes : int or sequence of int, optional
        Widths of the decoder's hidden layers, from the latent on; the encoder's in reverse by default.
    activation : str, default="relu"
        Activation of all hidden layers: linear (identity), relu, leaky_relu, elu, gelu, silu, sigmoid (logistic), tanh,
        softplus.
    latent_activation : str, default="linear"
        Activation of the latent layer; the same choices.
    output_activation : str, default="auto"
        Activation of the output layer; also softmax and exp. ``"auto"`` is linear for mse, huber and gaussian, sigmoid
        for bce, softmax for multinomial, poisson, nb and zinb. The loss bce also takes softmax. The losses poisson, nb
        and zinb also take exp.
    loss : {"mse", "bce", "huber", "multinomial", "gaussian", "poisson", "nb", "zinb"}, default="mse"
        A sum over features. ``"mse"``: squared errors. ``"bce"``: cross-entropies; targets lie in [0, 1]. ``"huber"``:
        Huber's function of the errors. ``"multinomial"``: minus the multinomial log-likelihood of non-negative counts,
        without the coefficient. ``"gaussian"``: minus the log-density of a normal distribution with one learned
        variance for each feature, which starts at 1 and stays above 1e-6. ``"poisson"``, ``"nb"``, ``"zinb"``: minus
        the log-likelihood of the counts in X, see `CountAutoencoder`.
    dispersion : {"gene", "gene-cell"}, default="gene"
        For nb and zinb: one parameter for each feature, or one output for each row and feature.
    huber_delta : float, default=1.0
        Huber's function is linear for larger errors.
    tied_weights : bool, default=False
        Each decoder layer uses the transposed weight of its encoder layer, with its own bias. Needs a decoder that
        mirrors the encoder.
    corruption : {"gaussian", "masking", "salt_and_pepper"}, optional
        Noise on the input, drawn anew in each step; the target stays clean. ``"gaussian"`` adds noise, ``"masking"``
        sets features to zero, ``"salt_and_pepper"`` sets features to the smallest or largest value of the training
        data. Not applied if fit gets a y to reconstruct.
    corruption_level : float, default=0.0
        Standard deviation of gaussian noise, in the data's units, or the probability that a feature is changed.
    dropout : float, default=0.0
        Probability that an output of a hidden layer is dropped in a training step. The latent layer has no dropout.
    contractive : float, default=0.0
        Strength of the contractive penalty (Rifai et al., ICML 2011). It is the squared Frobenius norm of each row's
        derivatives of the latents by the encoder's input. An encoder with hidden layers then needs ``dropout=0``.
    contractive_method : {"exact", "hutchinson"}, default="exact"
        ``"exact"`` takes encoders of up to four layers. ``"hutchinson"`` is an unbiased estimate from `n_probes` random
        combinations of the latents for each row; it costs less if there are many latents. An encoder of one layer
        always uses a closed form, which is cheaper than both.
    n_probes : int, default=1
    contractive_hessian : float, default=0.0
        Strength of a second penalty, which approximates second derivatives (Rifai et al., ECML 2011). It is the squared
        Frobenius norm of the change of the derivatives under gaussian noise on the input, exact for the noise drawn.
    n_corruptions : int, default=1
        Draws of that noise for each row and step; the penalty is their mean.
    hessian_std : float, default=0.1
        Standard deviation of that noise, in the data's units.
    activity_l1 : float, default=0.0
        Strength of the L1 penalty on the latents, a sum for each row.
    kl_sparsity : float, default=0.0
        Strength of the Kullback-Leibler penalty between `sparsity_target` and the mean of each latent over the rows
        of a step; needs ``latent_activation="sigmoid"``.
    sparsity_target : float, default=0.05
    sparse_decoder : {"auto", "gram", "dense"}, default="auto"
        How to compute the squared error of a linear output against CSR rows. ``"gram"`` uses Gram matrices and the
        stored values, and needs no dense array of rows by features. In float32 the loss of a row y is then accurate to
        5e-7 of |y|^2, and gradients to 5e-6 |y| / |error| of their size. ``"dense"`` goes feature by feature.
        ``"auto"`` takes the one that should be faster; `plan_` shows which.
    alpha : float, default=0.0
        L2 penalty on weights, not on biases: ``alpha / 2`` times the sum of squares, divided by the rows of a step, as
        in scikit-learn's multilayer perceptrons. With adamw, the rate of its decoupled decay.
    weight_l1 : float, default=0.0
        L1 penalty on weights, also divided by the rows of a step.
    solver : {"adam", "adamw", "sgd"}, default="adam"
    learning_rate_init : float, default=1e-3
    momentum : float, default=0.9
        For sgd.
    beta_1, beta_2, epsilon : float, default=0.9, 0.999, 1e-8
        For adam and adamw.
    clip_norm : float, optional
        A larger gradient is scaled down to this norm.
    learning_rate : {"constant", "cosine", "plateau"}, default="constant"
        ``"cosine"`` goes from `learning_rate_init` to zero along half a cosine over `max_iter` epochs, step by step.
        ``"plateau"`` halves the rate after each ``n_iter_no_change // 2`` epochs without improvement.
    batch_size : int, default=256
        Most rows of a step. Steps may have fewer, so that the last step of an epoch is about as full as the others.
    max_iter : int, default=100
        Epochs.
    shuffle : bool or "blocks", default=True
        Visit the rows in a new random order in each epoch. A source on disk is visited in random order of its blocks,
        and of the rows inside a block. ``"blocks"`` does the same for data in memory, so that the bits are the same.
    early_stopping : bool, default=True
        Hold rows out, stop when their loss has not improved for `n_iter_no_change` epochs, and keep the parameters of
        the best epoch. If False, stop when the training loss has not improved, and keep the last parameters. With
        ``learning_rate="cosine"`` the training loss stops nothing.
    validation_fraction : float, default=0.1
        Part of the rows to hold out: at least one row, and not all.
    n_iter_no_change : int, default=10
    tol : float, default=1e-4
        The loss must fall by more than this part of the loss at the last improvement.
    warm_start : bool, default=False
        Let fit continue from the present parameters and optimiser state. The optimiser starts afresh if its state was
        not kept: with another solver, after loading, or if fit went back to an earlier epoch. That is the best epoch,
        or the last one before an interruption.
    random_state : int, RandomState, Generator or None
        An integer below 2**64 gives the same bits on every run and any number of threads. None draws a new seed.
        NumPy's global state is never used.
    verbose : int, default=0
        1 or True shows a bar in terminals and notebooks, and a line for each epoch elsewhere; 2 always shows lines.
    precision : {"float32", "float64", "bfloat16", "tf32"}, default="float32"
        Precision of the arithmetic. ``"bfloat16"`` is float32 with the factors of matrix products rounded to bfloat16.
        Wide layers take about half the time on CPUs with such instructions (see `narrows doctor`). ``"tf32"``,
        only with ``backend="cuda"``, lets cuBLAS round the factors of large products to 11 significant bits. Outputs
        have the dtype of X in any case.
    backend : {"auto", "cuda", "cpp", "numba", "reference"}, default="auto"
        ``"auto"`` takes an NVIDIA GPU if it can, see ``docs/gpu.md``.
    n_threads : int, optional
        Threads on the CPU. The default is ``NARROWS_NUM_THREADS``, ``SLURM_CPUS_PER_TASK``, or the CPUs that the
        process may use. joblib in its workers, threadpoolctl and ``OMP_NUM_THREADS`` lower it.

    Attributes
    ----------
    batches_ : ndarray of str or int
        The sorted labels of the batches, after a fit with `batch`.
    coefs_ : list of ndarray of shape (n_in, n_out)
        Weights of each layer, read-only.
    intercepts_ : list of ndarray of shape (n_out,)
    history_ : dict of list of float
        One value for each epoch: ``loss``, ``learning_rate``, ``seconds``, and if they exist ``val_loss``,
        ``mse_per_feature``, ``penalty`` and its parts: ``contractive``, ``contractive_hessian``, ``activity_l1``,
        ``kl_sparsity``, ``weight_penalty``.
    n_iter_ : int
        Epochs, with those of earlier calls that training continued.
    loss_, best_loss_ : float
        Training loss of the last epoch; lowest monitored loss (the validation loss, or the training loss with
        penalties).
    n_features_in_ : int
    feature_names_in_ : ndarray of str
        If X has names.
    backend_ : str
    plan_ : narrows.plan.Plan
    metadata_ : dict
        Values of the user that JSON can hold; saved with the model.

    Examples
    --------
    >>> import numpy as np
    >>> X = np.random.default_rng(0).random((60, 8), dtype=np.float32)
    >>> from narrows import Autoencoder
    >>> ae = Autoencoder(n_components=2, hidden_layer_sizes=4, max_iter=5, random_state=0).fit(X)
    >>> ae.transform(X).shape
    (60, 2)
    >>> ae.reconstruct(X).shape
    (60, 8)
    """

    _constraints = BaseAutoencoder._constraints | {
        "hidden_layer_sizes": layer_sizes(),
        "decoder_layer_sizes": layer_sizes(optional=True),
        "activation": choice(_HIDDEN),
        "latent_activation": choice(_HIDDEN),
        "output_activation": choice(("auto", *ACTIVATIONS)),
        "loss": choice(tuple(LOSSES)),
        "dispersion": choice(("gene", "gene-cell")),
        "huber_delta": real("(0, inf)"),
        "tied_weights": boolean,
        "corruption": choice(tuple(_CORRUPTIONS), optional=True),
        "corruption_level": real("[0, inf)"),
        "dropout": real("[0, 1)"),
        "contractive": real("[0, inf)"),
        "contractive_method": choice(("exact", "hutchinson")),
        "n_probes": integer(1),
        "contractive_hessian": real("[0, inf)"),
        "n_corruptions": integer(1),
        "hessian_std": real("(0, inf)"),
        "activity_l1": real("[0, inf)"),
        "kl_sparsity": real("[0, inf)"),
        "sparsity_target": real("(0, 1)"),
        "sparse_decoder": choice(("auto", "gram", "dense")),
        "solver": choice(("sgd", "adam", "adamw")),
        "beta_1": real("[0, 1)"),
        "beta_2": real("[0, 1)"),
        "epsilon": real("(0, inf)"),
        "clip_norm": real("(0, inf)", optional=True),
        "early_stopping": boolean,
        "validation_fraction": real("(0, 1)"),
        "n_iter_no_change": integer(1),
        "tol": real("[0, inf)"),
    }
    _takes_conditions = True
    """Whether the decoder can be conditioned on batches, if its weights are not tied."""

    def __init__(
        self,
        n_components: int = 32,
        *,
        hidden_layer_sizes: int | Sequence[int] = (128,),
        decoder_layer_sizes: int | Sequence[int] | None = None,
        activation: str = "relu",
        latent_activation: str = "linear",
        output_activation: str = "auto",
        loss: str = "mse",
        dispersion: str = "gene",
        huber_delta: float = 1.0,
        tied_weights: bool = False,
        corruption: str | None = None,
        corruption_level: float = 0.0,
        dropout: float = 0.0,
        contractive: float = 0.0,
        contractive_method: str = "exact",
        n_probes: int = 1,
        contractive_hessian: float = 0.0,
        n_corruptions: int = 1,
        hessian_std: float = 0.1,
        activity_l1: float = 0.0,
        kl_sparsity: float = 0.0,
        sparsity_target: float = 0.05,
        sparse_decoder: str = "auto",
        alpha: float = 0.0,
        weight_l1: float = 0.0,
        solver: str = "adam",
        learning_rate_init: float = 1e-3,
        momentum: float = 0.9,
        beta_1: float = 0.9,
        beta_2: float = 0.999,
        epsilon: float = 1e-8,
        clip_norm: float | None = None,
        learning_rate: str = "constant",
        batch_size: int = 256,
        max_iter: int = 100,
        shuffle: bool | str = True,
        early_stopping: bool = True,
        validation_fraction: float = 0.1,
        n_iter_no_change: int = 10,
        tol: float = 1e-4,
        warm_start: bool = False,
        random_state: int | np.random.RandomState | np.random.Generator | None = None,
        verbose: int = 0,
        precision: str = "float32",
        backend: str = "auto",
        n_threads: int | None = None,
    ) -> None:
        self.n_components = n_components
        self.hidden_layer_sizes = hidden_layer_sizes
        self.decoder_layer_sizes = decoder_layer_sizes
        self.activation = activation
        self.latent_activation = latent_activation
        self.output_activation = output_activation
        self.loss = loss
        self.dispersion = dispersion
        self.huber_delta = huber_delta
        self.tied_weights = tied_weights
        self.corruption = corruption
        self.corruption_level = corruption_level
        self.dropout = dropout
        self.contractive = contractive
        self.contractive_method = contractive_method
        self.n_probes = n_probes
        self.contractive_hessian = contractive_hessian
        self.n_corruptions = n_corruptions
        self.hessian_std = hessian_std
        self.activity_l1 = activity_l1
        self.kl_sparsity = kl_sparsity
        self.sparsity_target = sparsity_target
        self.sparse_decoder = sparse_decoder
        self.alpha = alpha
        self.weight_l1 = weight_l1
        self.solver = solver
        self.learning_rate_init = learning_rate_init
        self.momentum = momentum
        self.beta_1 = beta_1
        self.beta_2 = beta_2
        self.epsilon = epsilon
        self.clip_norm = clip_norm
        self.learning_rate = learning_rate
        self.batch_size = batch_size
        self.max_iter = max_iter
        self.shuffle = shuffle
        self.early_stopping = early_stopping
        self.validation_fraction = validation_fraction
        self.n_iter_no_change = n_iter_no_change
        self.tol = tol
        self.warm_start = warm_start
        self.random_state = random_state
        self.verbose = verbose
        self.precision = precision
        self.backend = backend
        self.n_threads = n_threads

    @property
    def dispersion_(self) -> NDArray[Any]:
        """Inverse dispersion of each feature's counts, shape (n_outputs,), with ``dispersion="gene"``."""
        state = self._fitted_network().state
        if "log_dispersion" not in state:
            raise AttributeError(
                f"loss={self.loss!r}, dispersion={self.dispersion!r}: the model has no dispersion for each feature"
            )
        return dispersions(state["log_dispersion"])

    # --- what the parameters are together -------------------------------------------------------------------

    def _check_together(self) -> None:
        loss = LOSSES[self.loss]
        if self.output_activation != "auto" and self.output_activation not in loss.link_names:
            raise ValueError(
                f"output_activation={self.output_activation!r} does not go with loss={self.loss!r}; "
                f"choose from auto, {', '.join(loss.link_names)}"
            )
        if loss.of_counts:
            self._check_counts(loss)
        if self.corruption in ("masking", "salt_and_pepper") and self.corruption_level > 1:
            raise ValueError(
                f"corruption_level={self.corruption_level!r} must be in [0, 1]: it is a probability for "
                f"corruption={self.corruption!r}"
            )
        if self.kl_sparsity > 0 and ACTIVATIONS[self.latent_activation] is not Activation.SIGMOID:
            raise ValueError(
                "kl_sparsity needs latent_activation='sigmoid', whose outputs are rates, "
                f"not {self.latent_activation!r}"
            )
        self._check_contractive()
        if self.sparse_decoder == "gram" and (
            loss.loss is not Loss.MSE or self._output() is not Activation.LINEAR or self.tied_weights
        ):
            raise ValueError(
                f"sparse_decoder='gram' needs loss='mse', a linear output and untied weights, not loss={self.loss!r}, "
                f"output_activation={self.output_activation!r}, tied_weights={self.tied_weights!r}"
            )
        if self.tied_weights:
            self._check_mirrored("tied_weights=True")

    def _check_mirrored(self, given: str) -> None:
        """Raise ValueError, naming the parameter `given`, if the decoder's widths are not the encoder's in reverse."""
        mirrored = self._hidden_sizes()[::-1]
        if self._decoder_sizes() != mirrored:
            raise ValueError(
                f"{given} needs a decoder that mirrors the encoder: decoder_layer_sizes="
                f"{self.decoder_layer_sizes!r} must be None or {mirrored!r}"
            )

    def _check_counts(self, loss: LossInfo) -> None:
        """What the likelihoods of counts need."""
        if self.tied_weights and (several := self._several_heads(loss)):
            raise ValueError(
                f"{several}: the output layer has several outputs for each feature: set tied_weights=False"
            )
        if self.corruption == "salt_and_pepper":
            raise ValueError(f"corruption='salt_and_pepper' cannot be used for counts, loss={self.loss!r}")

    def _several_heads(self, loss: LossInfo) -> str:
        """The parameters that give each feature several outputs, for messages; empty if each has one."""
        if loss.heads > 1:
            return f"loss={self.loss!r}"
        return f"loss={self.loss!r}, dispersion='gene-cell'" if self._cell_dispersion(loss) else ""

    def _check_contractive(self) -> None:
        """What the contractive penalties need of the encoder."""
        depth = len(self._hidden_sizes()) + 1
        self._check_undropped(depth, " or hidden_layer_sizes=()")
        if self._exact_penalty() and depth > JACOBIAN_LAYERS:
            raise ValueError(
                f"{self._contractive_given()}: the exact penalty needs an encoder of at most {JACOBIAN_LAYERS} layers, "
                f"not {depth} (hidden_layer_sizes={self.hidden_layer_sizes!r}); contractive_method='hutchinson' takes "
                "any number"
            )

    def _check_undropped(self, depth: int, otherwise: str) -> None:
        """A contractive penalty needs an encoder without dropout."""
        if (self._exact_penalty() or self.contractive > 0) and self.dropout > 0 and depth > 1:
            raise ValueError(
                f"{self._contractive_given()} with dropout={self.dropout!r} and hidden_layer_sizes="
                f"{self.hidden_layer_sizes!r}: the penalty needs an encoder without dropout; set dropout=0{otherwise}"
            )

    def _exact_penalty(self) -> bool:
        return self.contractive_hessian > 0 or (self.contractive > 0 and self.contractive_method == "exact")

    def _contractive_given(self) -> str:
        return f"contractive={self.contractive!r}, contractive_hessian={self.contractive_hessian!r}"

    def _check_conditioned(self) -> None:
        if not self._takes_conditions:
            super()._check_conditioned()
        if self.tied_weights:
            raise ValueError(
                f"the decoder of {type(self).__name__} cannot be conditioned on batches with tied_weights=True: set it "
                "to False, or leave batch out"
            )

    # --- the network ----------------------------------------------------------------------------------------

    def _hidden_sizes(self) -> tuple[int, ...]:
        """Widths of the encoder's hidden layers."""
        return hidden_sizes("hidden_layer_sizes", self.hidden_layer_sizes)

    def _decoder_sizes(self) -> tuple[int, ...]:
        """Widths of the decoder's hidden layers: as given, or the encoder's in reverse."""
        if self.decoder_layer_sizes is None:
            return self._hidden_sizes()[::-1]
        return hidden_sizes("decoder_layer_sizes", self.decoder_layer_sizes)

    def _output(self) -> Activation:
        """The output layer's activation, ``"auto"`` resolved."""
        name = self.output_activation
        return LOSSES[self.loss].links[0] if name == "auto" else ACTIVATIONS[name]

    def _cell_dispersion(self, loss: LossInfo) -> bool:
        """Whether the network outputs a dispersion for each row and feature."""
        return loss.dispersion and self.dispersion == "gene-cell"

    def _layers(self, n_features: int, n_outputs: int) -> tuple[tuple[LayerSpec, ...], int]:
        """The network's layers, and how many of them are the encoder's."""
        if self.tied_weights and n_outputs != n_features:
            raise ValueError(
                f"tied_weights=True needs a target as wide as X: y has {n_outputs} columns, X has {n_features}"
            )
        hidden = self._hidden_sizes()
        latent = len(hidden) + 1
        widths = (n_features, *hidden, int(self.n_components), *self._decoder_sizes(), n_outputs)
        last = len(widths) - 2
        layers = []
        for i, (n_in, n_out) in enumerate(itertools.pairwise(widths)):
            named = ACTIVATIONS[self.latent_activation if i == latent - 1 else self.activation]
            layers.append(
                LayerSpec(
                    n_in,
                    n_out,
                    self._output() if i == last else named,
                    dropout=0.0 if i in (latent - 1, last) else float(self.dropout),
                    tied_to=last - i if self.tied_weights and i >= latent else None,
                )
            )
        return tuple(layers), latent

    def _spec(self, data: DataFacts) -> NetworkSpec:
        layers, latent = self._layers(data.n_features, data.n_outputs)
        if data.n_conditions:
            self._check_conditioned()
            layers = conditioned(layers, latent, data.n_conditions)
        loss = LOSSES[self.loss]
        heads = loss.heads + self._cell_dispersion(loss)
        if heads > 1:
            layers = (*layers[:-1], dataclasses.replace(layers[-1], n_out=heads * layers[-1].n_out))
        noise = None
        if self.corruption is not None and not data.separate_target:  # a separate target brings its own noise
            noise = Noise(_CORRUPTIONS[self.corruption], float(self.corruption_level))
        penalties = Penalties(
            activity_l1=float(self.activity_l1),
            kl_sparsity=float(self.kl_sparsity),
            sparsity_target=float(self.sparsity_target),
            contractive=float(self.contractive),
            contractive_probes=int(self.n_probes) if self.contractive_method == "hutchinson" else 0,
            contractive_hessian=float(self.contractive_hessian),
            hessian_std=float(self.hessian_std),
            n_corruptions=int(self.n_corruptions),
            alpha=float(self.alpha),
            weight_l1=float(self.weight_l1),
        )
        update = Update(
            solver=Solver[self.solver.upper()],
            momentum=float(self.momentum),
            beta_1=float(self.beta_1),
            beta_2=float(self.beta_2),
            epsilon=float(self.epsilon),
            clip_norm=None if self.clip_norm is None else float(self.clip_norm),
        )
        spec = NetworkSpec(
            layers=layers,
            latent=latent,
            loss=loss.loss,
            huber_delta=float(self.huber_delta),
            cell_dispersion=self._cell_dispersion(loss),
            # X need not hold counts if the target is separate.
            log_normalize=loss.of_counts and (self.counts_input or not data.separate_target),
            training=Training(noise, penalties, update),
            data=data.bound,
        )
        return with_sparse_forms(spec, data, self.sparse_decoder)

    def _first_state(self, start: Start) -> State:
        state = super()._first_state(start)
        if start.spec.loss.info.of_counts:
            begin_counts(start.spec, state, start.table.totals(start.rows, start.block_bytes))
        return state

    def _validation_part(self) -> float | None:
        return float(self.validation_fraction) if self.early_stopping else None

    def _options(self, seed: int) -> Options:
        # The cosine schedule needs all its epochs: an early stop would waste the low rates at its end.
        monitored: Literal["loss"] | None = None if self.learning_rate == "cosine" else "loss"
        return dataclasses.replace(
            super()._options(seed),
            monitor="val_loss" if self.early_stopping else monitored,
            n_iter_no_change=int(self.n_iter_no_change),
            tol=float(self.tol),
        )


_LINEAR: dict[str, Any] = {
    "hidden_layer_sizes": (),
    "decoder_layer_sizes": None,
    "activation": "linear",
    "latent_activation": "linear",
    "output_activation": "linear",
    "loss": "mse",
    "dispersion": "gene",
    "huber_delta": 1.0,
    "dropout": 0.0,
    "kl_sparsity": 0.0,
    "sparsity_target": 0.05,
}


@preset(
    fixed=_LINEAR,
    learning_rate="cosine",
    learning_rate_init=0.03,
    beta_1=0.99,
    batch_size=64,
    max_iter=1000,
    early_stopping=False,
)
class LinearAutoencoder(Autoencoder):
    """Linear autoencoder with squared error: its decoder spans the principal subspace.

    It learns by gradient steps from a random start. Without corruption and penalties, the decoder's rows span the space
    of the leading principal components at every minimum (Baldi and Hornik, Neural Networks 2, 1989). The biases hold
    the mean. The latents are coordinates in this space, not the components themselves.

    The parameters are those of `Autoencoder` without activations, hidden layers, dropout, loss and rate-based sparsity.
    The defaults (a long cosine schedule from a high rate) converge on some thousand rows in a second. Standardise
    columns of very different scales first. Large data need fewer epochs.

    Examples
    --------
    >>> import numpy as np
    >>> X = np.random.default_rng(0).random((60, 8), dtype=np.float32)
    >>> from narrows import LinearAutoencoder
    >>> LinearAutoencoder(2, max_iter=5, random_state=0).fit_transform(X).shape
    (60, 2)
    """


@preset(corruption="masking", corruption_level=0.3)
class DenoisingAutoencoder(Autoencoder):
    """Autoencoder that rebuilds clean rows from corrupted ones (Vincent et al., JMLR 11, 2010).

    ``fit(X)`` corrupts X anew in each step. ``fit(X_noisy, X_clean)`` learns from given pairs and adds no noise. The
    fitted estimator adds no noise either. ``score(X_noisy, X_clean)`` says how well it removes noise.

    The parameters are those of `Autoencoder`, with ``corruption="masking"`` and ``corruption_level=0.3`` by
    default.

    Examples
    --------
    >>> import numpy as np
    >>> X = np.random.default_rng(0).random((60, 8), dtype=np.float32)
    >>> from narrows import DenoisingAutoencoder
    >>> noisy = X + 0.1 * np.random.default_rng(1).normal(size=X.shape)
    >>> DenoisingAutoencoder(4, max_iter=5, random_state=0).fit(X).reconstruct(noisy).shape
    (60, 8)
    """


@preset(hidden_layer_sizes=(), latent_activation="relu", activity_l1=0.1)
class SparseAutoencoder(Autoencoder):
    """Autoencoder with few active latents for each row; it may have more latents than features.

    The default is an L1 penalty on rectified latents. Its strength suits features of order one, because it weighs
    latents, in the data's units, against the squared error, a sum over features. To train for rates near a target
    instead, set ``activity_l1=0``, ``latent_activation="sigmoid"``, `kl_sparsity` and `sparsity_target` (Ng, CS294A
    lecture notes, 2011).

    The parameters are those of `Autoencoder`, with other defaults: see the signature.

    Examples
    --------
    >>> import numpy as np
    >>> X = np.random.default_rng(0).random((60, 8), dtype=np.float32)
    >>> from narrows import SparseAutoencoder
    >>> SparseAutoencoder(16, max_iter=5, random_state=0).fit_transform(X).shape
    (60, 16)
    """


@preset(hidden_layer_sizes=(), activation="sigmoid", latent_activation="sigmoid", tied_weights=True, contractive=0.1)
class ContractiveAutoencoder(Autoencoder):
    """Autoencoder whose codes change little with the input, except in directions that the reconstruction needs.

    The penalty is the squared Frobenius norm of the Jacobian of the latents by the input (Rifai et al., ICML 2011). Its
    gradient is exact for encoders of one to four layers. `contractive_hessian` also penalises the change of the
    Jacobian. Penalties are weighed against the loss, a sum over features.

    The parameters are those of `Autoencoder`. The default is one layer of sigmoid units with tied weights, as in the
    paper.

    Examples
    --------
    >>> import numpy as np
    >>> X = np.random.default_rng(0).random((60, 8), dtype=np.float32)
    >>> from narrows import ContractiveAutoencoder
    >>> ae = ContractiveAutoencoder(4, contractive=0.1, max_iter=5, random_state=0).fit(X)
    >>> "penalty" in ae.history_
    True
    """
