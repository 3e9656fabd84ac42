"""The losses: one record holds everything about a loss except its formula.

Promises: parameter checks, data checks, lowering, the command line, and the documentation read these records.
Never: computes a loss (`backends.reference` has the formulas).

The numbers are those of ``csrc/plan/plan.h``. A new loss needs a member of `Loss`, a record in `_RECORDS`, and its
formulas.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping
from dataclasses import dataclass

from .activations import ACTIVATIONS, Activation
from .ops import OpCode

__all__ = ["LOSSES", "Loss", "LossInfo"]


class Loss(enum.IntEnum):
    """The loss of a row: a sum over its features."""

    MSE = 0
    BCE = 1
    """Binary cross-entropy."""
    HUBER = 2
    MULTINOMIAL = 3
    """Cross-entropy of the shares of a row's features."""
    GAUSSIAN = 4
    """Minus the log-density of normal values; each feature has a learned variance."""
    POISSON = 5
    """Minus the log-probability of counts; their mean is proportional to the sum of the row."""
    NB = 6
    """The same for negative binomial counts."""
    ZINB = 7
    """The same for zero-inflated negative binomial counts: the network also predicts additional zeros."""

    @property
    def info(self) -> LossInfo:
        """The facts about this loss."""
        return _INFO[self]


@dataclass(frozen=True)
class LossInfo:
    """What the library needs to know about a loss.

    Attributes
    ----------
    loss : Loss
    links : tuple of Activation
        Output activations that the loss accepts. ``output_activation="auto"`` means the first.
    low, high : float
        The range that the target's values must lie in.
    whole : bool
        Whether the target's values must be whole numbers.
    raw_counts : bool
        Whether ``normalize="auto"`` leaves the data as they are, because the loss needs raw counts.
    likelihood : bool
        Whether the loss is minus a log-likelihood, up to a factor and a constant that does not depend on the network.
        Variational decoders need one.
    op : OpCode
        The op that computes the loss: LOSS, GAUSSIAN, or COUNTS.
    parameter : str or None
        A parameter that the loss learns for each feature: ``"logvar"`` or ``"log_dispersion"``.
    alias : str
        A parameter of `RBM` that selects the loss, for messages.
    heads : int
        Numbers that the last layer computes for each feature. Dispersions from the network add one more.
    """

    loss: Loss
    links: tuple[Activation, ...]
    low: float = -math.inf
    high: float = math.inf
    whole: bool = False
    raw_counts: bool = False
    likelihood: bool = False
    op: OpCode = OpCode.LOSS
    parameter: str | None = None
    alias: str = ""
    heads: int = 1

    @property
    def name(self) -> str:
        """The name that users write: ``loss="mse"``."""
        return self.loss.name.lower()

    @property
    def link_names(self) -> tuple[str, ...]:
        """Every name of the accepted output activations, the default first."""
        return tuple(name for link in self.links for name, activation in ACTIVATIONS.items() if activation is link)

    @property
    def bounded(self) -> bool:
        """Whether the target's values must lie in a finite range."""
        return self.high < math.inf

    @property
    def needs(self) -> str:
        """What the target's values must be, for error messages; the empty string if any number will do."""
        if self.low == -math.inf:
            return ""
        given = f"loss={self.name!r}" + (f" ({self.alias})" if self.alias else "")
        values = (
            f"values in [{self.low:g}, {self.high:g}]: scale them"
            if self.bounded
            else f"values of at least {self.low:g}"
        )
        return f"{given} needs {values}"

    @property
    def of_counts(self) -> bool:
        """Whether it is a likelihood of counts, computed by op COUNTS."""
        return self.op is OpCode.COUNTS

    @property
    def dispersion(self) -> bool:
        """Whether its counts have a dispersion."""
        return self.parameter == "log_dispersion"


def _of_counts(loss: Loss, *, dispersion: bool, heads: int = 1) -> LossInfo:
    """A likelihood of counts, whose mean is proportional to the sum of the row."""
    return LossInfo(
        loss,
        (Activation.SOFTMAX, Activation.EXP),
        low=0,
        whole=True,
        raw_counts=True,
        likelihood=True,
        op=OpCode.COUNTS,
        parameter="log_dispersion" if dispersion else None,
        heads=heads,
    )


_RECORDS = (
    LossInfo(Loss.MSE, tuple(Activation), likelihood=True),
    LossInfo(
        Loss.BCE,
        (Activation.SIGMOID, Activation.SOFTMAX),
        low=0,
        high=1,
        likelihood=True,
        alias="visible='bernoulli'",
    ),
    LossInfo(Loss.HUBER, tuple(Activation)),
    LossInfo(Loss.MULTINOMIAL, (Activation.SOFTMAX,), low=0, raw_counts=True),
    LossInfo(
        Loss.GAUSSIAN,
        tuple(a for a in Activation if a is not Activation.SOFTMAX),
        likelihood=True,
        op=OpCode.GAUSSIAN,
        parameter="logvar",
    ),
    _of_counts(Loss.POISSON, dispersion=False),
    _of_counts(Loss.NB, dispersion=True),
    # The second head is the logit of the probability of an additional zero.
    _of_counts(Loss.ZINB, dispersion=True, heads=2),
)
_INFO: Mapping[Loss, LossInfo] = {info.loss: info for info in _RECORDS}

LOSSES: Mapping[str, LossInfo] = {info.name: info for info in _RECORDS}
"""The record of each loss by the name that users write."""
