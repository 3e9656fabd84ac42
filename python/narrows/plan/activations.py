"""The elementwise activations and softmax, and the names that users write.

Never: knows a formula (`backends.reference` has them) or an op.

The numbers are those of ``csrc/plan/plan.h``.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping

__all__ = ["ACTIVATIONS", "Activation"]


class Activation(enum.IntEnum):
    """Elementwise activations, and softmax, which couples the elements of a row."""

    LINEAR = 0
    RELU = 1
    LEAKY_RELU = 2
    ELU = 3
    GELU = 4
    SILU = 5
    SIGMOID = 6
    TANH = 7
    SOFTPLUS = 8
    EXP = 9
    SOFTMAX = 10

    @property
    def needs_preactivation(self) -> bool:
        """Whether the derivative needs the input of the activation, not its output alone."""
        return self in (Activation.GELU, Activation.SILU)

    @property
    def rectifier(self) -> bool:
        """Whether it is close to zero for negative inputs, so that first weights are He uniform."""
        return self in (Activation.RELU, Activation.LEAKY_RELU, Activation.ELU, Activation.GELU, Activation.SILU)


ACTIVATIONS: Mapping[str, Activation] = {
    **{a.name.lower(): a for a in Activation},
    "identity": Activation.LINEAR,
    "logistic": Activation.SIGMOID,
}
"""Every name of an activation, aliases included."""
