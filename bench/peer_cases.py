"""The networks that training is timed on, and what every library must be given and must reach.

Promises: data and first weights are the same numbers in every process; `reference_losses` is computed in float64 by
the op definitions, so it stands apart from every library that is timed.
Never: imports narrows before something of it is asked for, since the memory of a process without it is measured, too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from narrows.plan import Activation, Plan

STEPS = 20
"""Training steps of one epoch, on as many different batches."""
BETA_1, BETA_2, EPSILON = 0.9, 0.999, 1e-8
"""Of Adam, in every library."""
SEED = 0
GUARD_EPOCHS = 3
FIT_ROWS = 20480
"""Rows of the data for whole fits and their memory: more than the caches hold."""
OVERALL_TARGET = 2.5
"""For the geometric mean over the cases of the ratio to the fastest peer."""

FloatArray = NDArray[np.float32]


@dataclass(frozen=True)
class Case:
    """A fully connected autoencoder with ReLU hidden layers, trained by Adam.

    Attributes
    ----------
    target : float
        Wanted ratio of the fastest peer's time to that of narrows.
    """

    name: str
    widths: tuple[int, ...]
    batch: int
    loss: str
    target: float
    learning_rate: float = 1e-3
    precision: str = "float32"

    @property
    def tolerance(self) -> float:
        """By which a library's loss may differ from the reference, relative to it."""
        return 2e-3 if self.precision == "float32" else 1e-2

    @property
    def layers(self) -> list[tuple[int, int, Activation]]:
        """Inputs, outputs and activation of each layer."""
        from narrows.plan import Activation

        output = Activation.SIGMOID if self.loss == "bce" else Activation.LINEAR
        hidden = [Activation.RELU] * (len(self.widths) - 2)
        return list(zip(self.widths[:-1], self.widths[1:], [*hidden, output], strict=True))

    @property
    def layout(self) -> dict[str, Any]:
        """Parameters of `narrows.Autoencoder` for this network."""
        half = len(self.widths) // 2
        return {
            "n_components": self.widths[half],
            "hidden_layer_sizes": self.widths[1:half],
            "latent_activation": "relu",
            "loss": self.loss,
        }

    def plan(self) -> Plan:
        from narrows.lowering import lower
        from narrows.plan import LayerSpec, Loss, NetworkSpec

        layers = tuple(LayerSpec(*layer) for layer in self.layers)
        return lower(NetworkSpec(layers, len(layers) // 2, loss=Loss[self.loss.upper()]), self.batch)

    def weights(self) -> list[FloatArray]:
        """First weights, each (n_in, n_out), as `narrows.Autoencoder` draws them; biases start at zero."""
        from narrows.initial import initial_weight

        return [initial_weight(*layer, SEED, i).astype(np.float32) for i, layer in enumerate(self.layers)]

    def data(self, rows: int | None = None) -> FloatArray:
        """Values in (0, 1) that eight factors make, so that there is something to learn; shape (rows, n_in)."""
        rng = np.random.default_rng(SEED)
        mix = rng.standard_normal((8, self.widths[0]), dtype=np.float32)
        X = rng.standard_normal((STEPS * self.batch if rows is None else rows, 8), dtype=np.float32) @ mix
        # In place: the memory of a fit is measured on these, too.
        np.negative(X, out=X)
        np.exp(X, out=X)
        np.add(X, 1, out=X)
        return np.reciprocal(X, out=X)


_DEEP = (784, 128, 64, 32, 64, 128, 784)
_HINTON = (784, 1000, 500, 250, 30, 250, 500, 1000, 784)
CASES = (
    Case("keras-simple", (784, 32, 784), 256, "bce", 2.5),
    Case("keras-deep", _DEEP, 256, "bce", 1.6),
    Case("keras-deep-32", _DEEP, 32, "bce", 2.6),
    # At a higher rate so deep a network starts chaotically: losses then differ by how a library rounds.
    Case("hinton", _HINTON, 256, "bce", 1.25, 1e-4),
    Case("hinton-bf16", _HINTON, 256, "bce", 1.7, 1e-4, "bfloat16"),
    Case("tabular", (30, 16, 8, 16, 30), 128, "mse", 12),
)


def parameters(case: Case) -> dict[str, FloatArray]:
    """First parameters by slot name."""
    state = {f"W{i}": W for i, W in enumerate(case.weights())}
    return state | {f"b{i}": np.zeros(n, np.float32) for i, n in enumerate(case.widths[1:])}


def reference_losses(case: Case) -> list[float]:
    """Mean loss of each of the first epochs, in float64."""
    from narrows.backends import Hyper, compile_plan

    program = compile_plan(case.plan(), "reference")
    program.load(parameters(case))
    program.bind(case.data().astype(np.float64))
    rows, rates = np.arange(STEPS * case.batch), np.full(STEPS, case.learning_rate)
    return [
        float(program.train(rows, Hyper(SEED, epoch * STEPS, rates)).sum(axis=1).mean())
        for epoch in range(GUARD_EPOCHS)
    ]


def check_losses(case: Case, what: str, losses: list[float], reference: list[float]) -> None:
    """Raise unless a library has trained the network it was given.

    Raises
    ------
    RuntimeError
        The losses are not those of the reference.
    """
    for found, wanted in zip(losses, reference, strict=True):
        if not math.isclose(found, wanted, rel_tol=case.tolerance):
            raise RuntimeError(
                f"{case.name}: {what} trains another model: mean losses of the first epochs {losses}, "
                f"by the definition {reference} (tolerance {case.tolerance:g})"
            )
