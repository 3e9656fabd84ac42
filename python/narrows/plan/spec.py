"""What a network is: the specification that an estimator makes and `lowering.lower` takes.

Promises: a specification is plain data; equal ones give the same plan.
Never: refuses anything (`lowering` does), knows an op.

The numbers of the enumerations are those of ``csrc/plan.h``.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any

import numpy as np

from .activations import ACTIVATIONS, Activation
from .geometry import Convolution
from .losses import LOSSES, Loss

__all__ = [
    "ACTIVATIONS",
    "LOSSES",
    "Activation",
    "Corruption",
    "LayerSpec",
    "Loss",
    "NetworkSpec",
    "Precision",
    "Solver",
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
    """Of a program's arithmetic. BFLOAT16 is FLOAT32 with its matrix products in bfloat16: operands are rounded to 8
    significant bits, sums, parameters and all else stay float32. TF32, of the CUDA backend alone, leaves it to the GPU
    to round the operands of large products to 11.
    """

    FLOAT32 = 0
    FLOAT64 = 1
    BFLOAT16 = 2
    TF32 = 3

    @classmethod
    def of(cls, name: Any) -> Precision:
        """From a precision, its name, or a NumPy dtype."""
        if isinstance(name, cls):
            return name
        return cls[(name if isinstance(name, str) else np.dtype(name).name).upper()]

    @property
    def dtype(self) -> np.dtype[Any]:
        """In which parameters and activations are held."""
        return np.dtype(np.float64 if self is Precision.FLOAT64 else np.float32)


@dataclass(frozen=True)
class LayerSpec:
    """A layer of the specification: dense, or a convolution of flattened images; `tied_to` is the index of the layer
    whose weight it uses transposed.
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


@dataclass(frozen=True)
class NetworkSpec:
    """Everything `lower` needs to know about a model.

    `latent` counts the encoder's layers: layer ``latent - 1`` writes the code. `separate_target` says that the target
    is bound apart from the input (denoising pairs, super-resolution). `contractive_probes` of 0 stands for the exact
    penalty.
    """

    layers: tuple[LayerSpec, ...]
    latent: int
    loss: Loss = Loss.MSE
    huber_delta: float = 1.0
    corruption: Corruption | None = None
    corruption_level: float = 0.0
    corruption_range: tuple[float, float] = (0.0, 1.0)
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
    solver: Solver = Solver.ADAM
    momentum: float = 0.9
    beta_1: float = 0.9
    beta_2: float = 0.999
    epsilon: float = 1e-8
    clip_norm: float | None = None
    separate_target: bool = False
    weighted: bool = False
    variational: bool = False
    """The encoder's last layer, linear, puts out the means and the log-variances of half as many latents, of which
    training draws (Kingma and Welling, 2014)."""
    kl_weight: float = 1.0
    """What the divergence of the latents from N(0, 1), in nats, is multiplied with in the objective."""
    n_gibbs: int = 0
    """If not 0, the two layers, of one weight, are a restricted Boltzmann machine, which learns from so many steps of
    Gibbs sampling (see `boltzmann`); sigmoid units are binary, linear ones normal with variance 1."""
    n_chains: int = 0
    """Markov chains that go on from step to step, at least as many as a batch has rows; 0 if each begins at its row."""
    sample_visible: bool = True
    """Whether visible units are drawn in a chain, or take their means."""
    cell_dispersion: bool = False
    """Of a likelihood of counts: whether the network puts out the dispersions, or they are a parameter for each
    feature."""
    log_normalize: bool = False
    """Whether the network sees log(1 + x) of counts x scaled to the sum `library`, in place of them."""
    library: float = 1.0
    """Of counts: the sum of a row whose size factor is 1."""
    sparse_input: bool = False
    """Whether the first layer works on CSR rows, which are then never dense (see `takes_sparse_input`)."""
    n_batches: int = 0
    """Batches of rows, of which the decoder is told the row's own: its first layer has so many inputs beside the code,
    one for each batch."""
    gram_decoder: bool = False
    """Whether the squared error is taken from Gram matrices and the nonzeros of CSR targets, which are then never dense
    (see `takes_gram_decoder`)."""
    shifted: bool = False
    """Whether rows of X, which may be their own target, are those that are bound less a shift (see `shifted.Shifted`):
    sparse rows that are standardised, of which no zero is a zero any more."""

    @property
    def takes_sparse_input(self) -> bool:
        """Whether the network can have a `sparse_input`: a dense first layer, and nothing else that needs the rows of
        its input or fills them."""
        filled = self.corruption not in (None, Corruption.MASKING) or self.contractive_hessian > 0
        filled = filled or (self.corruption is not None and self.shifted)  # what is masked is zero after the shift
        # Probes are rows of the input's width; an encoder of one layer has none (its penalty has a closed form).
        filled = filled or (self.contractive > 0 and self.contractive_probes > 0 and self.latent > 1)
        return self.layers[0].convolution is None and not filled and self.n_gibbs == 0

    @property
    def takes_gram_decoder(self) -> bool:
        """Whether the network can have a `gram_decoder`: squared error of a dense linear layer with its own weight."""
        last = self.layers[-1]
        linear = last.activation is Activation.LINEAR and last.convolution is None and last.tied_to is None
        return self.loss is Loss.MSE and linear and self.n_gibbs == 0

    @property
    def sparse_sources(self) -> frozenset[int]:
        """The sources that must be CSR of increasing columns: 0 is X, 1 the target."""
        judged = {1 if self.separate_target else 0} if self.gram_decoder else set()
        return frozenset(judged | ({0} if self.sparse_input else set()))

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
        """Numbers that the last layer puts out for each feature, side by side: logit of the mean, logarithm of the
        inverse dispersion if that is of the cell, logit of dropout."""
        return self.loss.info.heads + self.cell_dispersion

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
            # Last, since it has no gradient: the means of the chains' hidden units.
            shapes["chain"] = (self.n_chains, self.n_components)
        return shapes

    @property
    def n_moments(self) -> int:
        """Numbers of optimiser state beside each parameter."""
        return 1 if self.solver is Solver.SGD else 2
