"""What a network is: the specification that an estimator makes and `lowering.lower` takes.

Promises: a specification is plain data; equal ones give the same plan.
Never: refuses a specification (`lowering` does).

The numbers of the enumerations are those of ``csrc/plan/plan.h``.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any

import numpy as np

from .activations import ACTIVATIONS, Activation
from .geometry import Convolution
from .losses import LOSSES, Loss
from .ops import Source

__all__ = [
    "ACTIVATIONS",
    "LOSSES",
    "Activation",
    "Corruption",
    "Data",
    "Form",
    "Gibbs",
    "LayerSpec",
    "Loss",
    "NetworkSpec",
    "Noise",
    "Penalties",
    "Precision",
    "Solver",
    "Training",
    "Update",
]


class Corruption(enum.IntEnum):
    """Input corruption of denoising autoencoders (Vincent et al., JMLR 11, 2010)."""

    GAUSSIAN = 0
    MASKING = 1
    SALT_AND_PEPPER = 2


class Solver(enum.IntEnum):
    """Update rules."""

    SGD = 0
    ADAM = 1
    ADAMW = 2


class Precision(enum.IntEnum):
    """The precision of a program's arithmetic.

    BFLOAT16 rounds the operands of matrix products to 8 significant bits; everything else stays float32. TF32 exists
    only on the CUDA backend: the GPU may round the operands of large products to 11 significant bits.
    """

    FLOAT32 = 0
    FLOAT64 = 1
    BFLOAT16 = 2
    TF32 = 3

    @classmethod
    def of(cls, name: Any) -> Precision:
        """The precision for a precision, its name, or a NumPy dtype."""
        if isinstance(name, cls):
            return name
        return cls[(name if isinstance(name, str) else np.dtype(name).name).upper()]

    @property
    def dtype(self) -> np.dtype[Any]:
        """The type of parameters and activations."""
        return np.dtype(np.float64 if self is Precision.FLOAT64 else np.float32)


@dataclass(frozen=True)
class LayerSpec:
    """A layer of the network: dense, or a convolution of flattened images.

    A layer with `tied_to` uses the transposed weight of the layer with that index.
    """

    n_in: int
    n_out: int
    activation: Activation
    dropout: float = 0.0
    tied_to: int | None = None
    convolution: Convolution | None = None

    @property
    def weight_shape(self) -> tuple[int, int]:
        return (self.n_in, self.n_out) if self.convolution is None else self.convolution.weight_shape

    @property
    def derivative_activation(self) -> Activation:
        """The activation between the layer's output and its pre-activations; LINEAR where pooling comes between them,
        because the pooling op applies the activation's derivative."""
        pooled = self.convolution is not None and self.convolution.pooled
        return Activation.LINEAR if pooled else self.activation

    @property
    def saved_scale(self) -> float:
        """What the saved output is multiplied by before the derivative of the activation is taken of it.

        Dropout has scaled the saved output in place; a saved pre-activation stays as it is.
        """
        return 1.0 if self.activation.needs_preactivation else 1.0 - self.dropout


@dataclass(frozen=True)
class Noise:
    """Corruption of the input in training. Salt-and-pepper noise sets values to `low` or `high`."""

    kind: Corruption
    level: float
    low: float = 0.0
    high: float = 1.0


@dataclass(frozen=True)
class Penalties:
    """What training adds to the loss. A penalty of 0 is absent.

    Attributes
    ----------
    activity_l1 : float
        Factor of the sum of the codes' absolute values.
    kl_sparsity, sparsity_target : float
        Factor of the divergence of the mean activities from the target.
    contractive : float
        Factor of the squared Frobenius norm of the encoder's Jacobian.
    contractive_probes : int
        Random probes that estimate this norm; 0 computes it exactly.
    contractive_hessian : float
        Factor of the squared change of the Jacobian under noise.
    hessian_std : float
        Standard deviation of that noise.
    n_corruptions : int
        Noisy inputs for each row.
    alpha, weight_l1 : float
        L2 and L1 penalties of the weights.
    """

    activity_l1: float = 0.0
    kl_sparsity: float = 0.0
    sparsity_target: float = 0.05
    contractive: float = 0.0
    contractive_probes: int = 0
    contractive_hessian: float = 0.0
    hessian_std: float = 0.1
    n_corruptions: int = 1
    alpha: float = 0.0
    weight_l1: float = 0.0


@dataclass(frozen=True)
class Update:
    """The update rule and its settings."""

    solver: Solver = Solver.ADAM
    momentum: float = 0.9
    beta_1: float = 0.9
    beta_2: float = 0.999
    epsilon: float = 1e-8
    clip_norm: float | None = None

    @property
    def n_moments(self) -> int:
        """Numbers of optimiser state for each parameter."""
        return 1 if self.solver is Solver.SGD else 2


@dataclass(frozen=True)
class Gibbs:
    """Gibbs sampling: a restricted Boltzmann machine learns from it (see `boltzmann`).

    The network has two layers that share one weight. Sigmoid units are binary, linear units are normal with variance 1.

    Attributes
    ----------
    n_steps : int
        Gibbs steps for each update.
    n_chains : int
        Markov chains that continue from update to update, at least as many as a step has rows; 0 starts a new chain at
        each row.
    sample_visible : bool
        Whether a chain draws its visible units; otherwise they take their means.
    """

    n_steps: int
    n_chains: int = 0
    sample_visible: bool = True


@dataclass(frozen=True)
class Training:
    """How the network is trained."""

    corruption: Noise | None = None
    penalties: Penalties = Penalties()
    update: Update = Update()
    gibbs: Gibbs | None = None


@dataclass(frozen=True)
class Data:
    """What the program is given.

    Attributes
    ----------
    separate_target : bool
        Whether the target is bound separately from X (denoising pairs, super-resolution).
    weighted : bool
        Whether rows have weights.
    shifted : bool
        Whether a vector is subtracted from every row of X, and of the target if that is X (see `rows.shifted`). This
        standardises sparse rows without making them dense.
    size_sum : float
        The sum of a row of counts whose size factor is 1.
    n_conditions : int
        Number of conditions (batches of rows). If not 0, the first decoder layer also reads one input for each
        condition: 1 for the condition of the row, 0 for the others.
    """

    separate_target: bool = False
    weighted: bool = False
    shifted: bool = False
    size_sum: float = 1.0
    n_conditions: int = 0


@dataclass(frozen=True)
class Form:
    """How the program computes; the result is the same up to rounding.

    Attributes
    ----------
    sparse_input : bool
        Whether the first layer reads CSR rows and never makes them dense (see `NetworkSpec.takes_sparse_input`).
    gram_decoder : bool
        Whether the squared error is computed from Gram matrices and the nonzeros of CSR targets, which never become
        dense (see `NetworkSpec.takes_gram_decoder`).
    """

    sparse_input: bool = False
    gram_decoder: bool = False


@dataclass(frozen=True)
class NetworkSpec:
    """Everything `lower` needs to know about a model.

    Attributes
    ----------
    layers : tuple of LayerSpec
    latent : int
        Number of encoder layers: layer ``latent - 1`` writes the code.
    variational : bool
        Whether the encoder's last layer, which is linear, computes means and log-variances of half as many latents.
        Training draws the latents from them (Kingma and Welling, 2014).
    kl_weight : float
        Factor of the divergence of the latents from N(0, 1), in nats, in a variational network.
    loss : Loss
    huber_delta : float
    cell_dispersion : bool
        Whether the network computes the dispersions of counts; otherwise they are a parameter for each feature.
    log_normalize : bool
        Whether the network reads log(1 + x) of counts x that are scaled to the sum `Data.size_sum`.
    training : Training
    data : Data
    form : Form
    """

    layers: tuple[LayerSpec, ...]
    latent: int
    variational: bool = False
    kl_weight: float = 1.0
    loss: Loss = Loss.MSE
    huber_delta: float = 1.0
    cell_dispersion: bool = False
    log_normalize: bool = False
    training: Training = Training()
    data: Data = Data()
    form: Form = Form()

    @property
    def takes_sparse_input(self) -> bool:
        """Whether `Form.sparse_input` is possible: the first layer is dense, and nothing needs dense rows of X."""
        noise, penalties = self.training.corruption, self.training.penalties
        if noise is not None and (noise.kind is not Corruption.MASKING or self.data.shifted):
            return False  # masked values are zero after the shift
        # Probes are rows as wide as the input. An encoder of one layer has none: its penalty has a closed form.
        probes = penalties.contractive > 0 and penalties.contractive_probes > 0 and self.latent > 1
        dense = penalties.contractive_hessian > 0 or probes or self.training.gibbs is not None
        return self.layers[0].convolution is None and not dense

    @property
    def takes_gram_decoder(self) -> bool:
        """Whether `Form.gram_decoder` is possible: squared error of a dense linear layer with its own weight."""
        last = self.layers[-1]
        linear = last.activation is Activation.LINEAR and last.convolution is None and last.tied_to is None
        return self.loss is Loss.MSE and linear and self.training.gibbs is None

    @property
    def target_source(self) -> Source:
        """Where the rows come from that the loss compares with."""
        return Source.TARGET if self.data.separate_target else Source.X

    @property
    def sparse_sources(self) -> frozenset[Source]:
        """The sources that must be CSR with increasing columns."""
        found = {Source.X} if self.form.sparse_input else set()
        return frozenset(found | ({self.target_source} if self.form.gram_decoder else set()))

    @property
    def n_features(self) -> int:
        return self.layers[0].n_in

    @property
    def n_components(self) -> int:
        return self.layers[self.latent - 1].n_out // (2 if self.variational else 1)

    @property
    def n_outputs(self) -> int:
        return self.layers[-1].n_out // self.n_heads

    @property
    def n_heads(self) -> int:
        """Numbers that the last layer computes for each feature. The first is the logit of the mean. The logarithm of
        the inverse dispersion and the logit of dropout follow if the network computes them."""
        return self.loss.info.heads + self.cell_dispersion

    @property
    def n_chains(self) -> int:
        """Markov chains that continue from update to update."""
        return 0 if self.training.gibbs is None else self.training.gibbs.n_chains

    @property
    def parameter_shapes(self) -> dict[str, tuple[int, int]]:
        """Rows and columns of each parameter, in the order of memory."""
        shapes: dict[str, tuple[int, int]] = {}
        for i, layer in enumerate(self.layers):
            if layer.tied_to is None:
                shapes[f"W{i}"] = layer.weight_shape
            shapes[f"b{i}"] = (1, layer.weight_shape[1])
        if self.loss.info.parameter and not self.cell_dispersion:
            shapes[self.loss.info.parameter] = (1, self.n_outputs)
        if self.n_chains:
            # Means of the chains' hidden units; last, because they have no gradient.
            shapes["chain"] = (self.n_chains, self.n_components)
        return shapes
