"""The networks on which libraries are compared, and the losses that each library must reach.

Promises:

- Data and first weights are the same numbers in every process.
- `reference_losses` computes in float64 by the op definitions, independently of every library that is timed.

Never: imports narrows before a case needs it, because the memory of a process without narrows is measured too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from narrows.plan.plan import Plan
    from narrows.plan.spec import Activation, LayerSpec, NetworkSpec

BETA_1, BETA_2, EPSILON = 0.9, 0.999, 1e-8
"""Adam's parameters in every library."""
SEED = 0
GUARD_EPOCHS = 3
FIT_ROWS = 20480
"""Rows of the data for whole fits and their memory: more than fits into the caches."""
OVERALL_TARGET = 2.5
"""Target of the geometric mean over the cases of the ratio to the fastest library."""

FloatArray = NDArray[np.float32]


@dataclass(frozen=True)
class Case:
    """A fully connected autoencoder with ReLU hidden layers, trained by Adam.

    Attributes
    ----------
    target : float
        Target of the ratio of the fastest library's time to that of narrows.
    gpu_target : float
        The same on a GPU, where PyTorch is compiled and replayed as a CUDA graph.
    steps : int
        Training steps of one epoch, each on another batch.
    """

    name: str
    widths: tuple[int, ...]
    batch: int
    loss: str
    target: float
    learning_rate: float = 1e-3
    precision: str = "float32"
    steps: int = 20
    gpu_target: float = 1.0

    @property
    def tolerance(self) -> float:
        """Relative difference that a library's loss may have from the reference."""
        return 2e-3 if self.precision == "float32" else 1e-2

    @property
    def layers(self) -> list[tuple[int, int, Activation]]:
        """Inputs, outputs and activation of each layer."""
        from narrows.plan.spec import Activation

        output = Activation.SIGMOID if self.loss == "bce" else Activation.LINEAR
        hidden = [Activation.RELU] * (len(self.widths) - 2)
        return list(zip(self.widths[:-1], self.widths[1:], [*hidden, output], strict=True))

    @property
    def layout(self) -> dict[str, Any]:
        """Parameters of the estimator for this network; empty if no estimator has this network."""
        half = len(self.widths) // 2
        return {
            "n_components": self.widths[half],
            "hidden_layer_sizes": self.widths[1:half],
            "latent_activation": "relu",
            "loss": self.loss,
        }

    @property
    def spec(self) -> NetworkSpec:
        from narrows.plan.spec import LayerSpec, Loss, NetworkSpec

        layers = tuple(LayerSpec(*layer) for layer in self.layers)
        return NetworkSpec(layers, len(layers) // 2, loss=Loss[self.loss.upper()])

    def plan(self) -> Plan:
        from narrows.plan.lowering import lower

        return lower(self.spec, self.batch)

    def parameters(self) -> dict[str, FloatArray]:
        """First parameters by slot name, as `narrows.Autoencoder` draws them."""
        from narrows.fitting.start import initial_state

        return initial_state(self.spec, SEED, np.float32)

    def weights(self) -> list[FloatArray]:
        """First weights of the layers; biases start at zero."""
        found = self.parameters()
        return [found[f"W{i}"] for i in range(len(self.widths) - 1)]

    def data(self, rows: int | None = None) -> FloatArray:
        """Values in (0, 1) that eight factors generate, so there is something to learn; shape (rows, n_in)."""
        rng = np.random.default_rng(SEED)
        mix = rng.standard_normal((8, self.widths[0]), dtype=np.float32)
        X = rng.standard_normal((self.steps * self.batch if rows is None else rows, 8), dtype=np.float32) @ mix
        # In place: the memory of a fit is measured on these data.
        np.negative(X, out=X)
        np.exp(X, out=X)
        np.add(X, 1, out=X)
        np.reciprocal(X, out=X)
        return X

    def dense(self) -> FloatArray:
        """The data for libraries that train on dense rows only."""
        return self.data()


@dataclass(frozen=True)
class SparseCase(Case):
    """Sparse rows, like logarithms of gene counts; the share of nonzeros differs from gene to gene.

    Attributes
    ----------
    density : float
        Share of the values that are stored.
    """

    density: float = 0.07

    @property
    def spec(self) -> NetworkSpec:
        from narrows.plan.spec import Form

        return replace(super().spec, form=Form(sparse_input=True, gram_decoder=True))

    def data(self, rows: int | None = None) -> Any:
        import scipy.sparse as sp

        rng, n_genes = np.random.default_rng(SEED), self.widths[0]
        shares = rng.beta(0.4, 4.0, n_genes)
        shares = np.minimum(shares * (self.density / shares.mean()), 0.95).astype(np.float32)
        found = [
            np.flatnonzero(rng.random(n_genes, np.float32) < shares) for _ in range(rows or self.steps * self.batch)
        ]
        indptr = np.cumsum([0, *map(len, found)]).astype(np.int32)
        values = np.log1p(rng.poisson(2.0, indptr[-1]) + 1).astype(np.float32)
        return sp.csr_array((values, np.concatenate(found).astype(np.int32), indptr), (len(found), n_genes))

    def dense(self) -> FloatArray:
        rows: FloatArray = self.data().toarray()
        return rows


@dataclass(frozen=True)
class ImageCase(Case):
    """Convolutions of 3 x 3 pixels with the same padding, on images of 28 x 28 pixels, and dense layers.

    Attributes
    ----------
    stack : tuple
        For each layer the width of a dense layer, or filters and options of a convolution; `widths` must fit.
    latent : int
        Layers of the encoder.
    estimator : tuple
        Parameters of `narrows.ConvAutoencoder` for this network, empty if it cannot build the network.
    """

    stack: tuple[Any, ...] = ()
    latent: int = 0
    estimator: tuple[tuple[str, Any], ...] = ()

    @property
    def layout(self) -> dict[str, Any]:
        return dict(self.estimator) | {"loss": self.loss} if self.estimator else {}

    @property
    def spec(self) -> NetworkSpec:
        from narrows.plan.geometry import Convolution
        from narrows.plan.spec import Activation, LayerSpec, Loss, NetworkSpec

        layers: list[LayerSpec] = []
        shape: tuple[int, int, int] = (28, 28, 1)
        for i, layer in enumerate(self.stack):
            n_in = self.widths[i]
            output = Activation.SIGMOID if self.loss == "bce" else Activation.LINEAR
            activation = output if i == len(self.stack) - 1 else Activation.RELU
            if isinstance(layer, int):
                layers.append(LayerSpec(n_in, layer, activation))
                continue
            filters, options = layer
            conv = Convolution.of(shape, filters, (3, 3), **options)
            layers.append(LayerSpec(n_in, conv.n_out, activation, convolution=conv))
            shape = conv.out_shape
        return NetworkSpec(tuple(layers), self.latent, loss=Loss[self.loss.upper()])


_DEEP = (784, 128, 64, 32, 64, 128, 784)
_TWO = (2, 2)
_HINTON = (784, 1000, 500, 250, 30, 250, 500, 1000, 784)
_GENES = (20000, 128, 32, 128, 20000)
CASES = (
    Case("keras-simple", (784, 32, 784), 256, "bce", 2.5, gpu_target=1.5),
    Case("keras-deep", _DEEP, 256, "bce", 1.6, gpu_target=1.5),
    Case("keras-deep-32", _DEEP, 32, "bce", 2.6, gpu_target=1.5),
    # At a higher rate so deep a network starts chaotically, and losses then depend on rounding.
    Case("hinton", _HINTON, 256, "bce", 1.25, 1e-4),
    Case("hinton-bf16", _HINTON, 256, "bce", 1.7, 1e-4, "bfloat16"),
    Case("hinton-tf32", _HINTON, 256, "bce", 1, 1e-4, "tf32"),
    Case("tabular", (30, 16, 8, 16, 30), 128, "mse", 12, gpu_target=1.5),
    # A batch of dense rows is larger than the caches, so a few batches stand for many.
    SparseCase("genomics-mse", _GENES, 512, "mse", 6, 1e-4, steps=4, gpu_target=2),
    SparseCase("genomics-mse-2048", _GENES, 2048, "mse", 7, 1e-4, steps=4, gpu_target=2),
    ImageCase(
        "conv-pool", (784, 3136, 392, 392, 3136, 784), 128, "bce", 4,
        stack=((16, {"pool": _TWO}), (8, {"pool": _TWO}), (8, {}), (16, {"upsample": _TWO}), (1, {"upsample": _TWO})),
        latent=2,
    ),
    ImageCase(
        "conv-stride", (784, 6272, 3136, 32, 3136, 6272, 784), 128, "bce", 2,
        stack=((32, {"strides": _TWO}), (64, {"strides": _TWO}), 32, 3136,
               (32, {"strides": _TWO, "transposed": True}), (1, {"strides": _TWO, "transposed": True})),
        latent=3,
        estimator=(("n_components", 32), ("image_shape", (28, 28, 1)), ("filters", (32, 64)),
                   ("latent_activation", "relu")),
    ),
)  # fmt: skip


def reference_losses(case: Case) -> list[float]:
    """Mean loss of each of the first epochs, in float64."""
    from narrows.backends import Hyper, compile_plan

    program = compile_plan(case.plan(), "reference")
    program.load(case.parameters())
    program.bind(case.data().astype(np.float64))
    rows, rates = np.arange(case.steps * case.batch), np.full(case.steps, case.learning_rate)
    return [
        float(program.train(rows, Hyper(SEED, epoch * case.steps, rates)).sum(axis=1).mean())
        for epoch in range(GUARD_EPOCHS)
    ]


def check_losses(case: Case, what: str, losses: list[float], reference: list[float]) -> None:
    """Check that a library has trained the given network.

    Raises
    ------
    RuntimeError
        The losses differ from the reference.
    """
    for found, wanted in zip(losses, reference, strict=True):
        if not math.isclose(found, wanted, rel_tol=case.tolerance):
            raise RuntimeError(
                f"{case.name}: {what} trains another model: its mean losses of the first epochs are {losses}, those of "
                f"the reference {reference} (relative tolerance {case.tolerance:g})"
            )
