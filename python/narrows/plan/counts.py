"""Lowering of likelihoods of counts: what the network sees of them, the loss, and the means it is asked for.

Promises: rows of counts are read where they lie and never made dense; a row's mean, loss and code depend on that row
alone.
Never: touches data or knows a backend.

The mean of a count is either the row's sum times the softmax of the output layer, as in scVI (Lopez et al., Nature
Methods 15, 2018), or its size factor, the sum over `Data.size_sum`, times the exponential, as in DCA (Eraslan et
al., Nature Communications 10, 2019). Negative binomial counts of mean mu have the variance mu + mu**2 / theta; theta,
the inverse dispersion, is a parameter for each feature, the same for all rows, or comes out of the network for each
row and feature. Zero-inflated ones are zero with a probability besides that comes out of the network.
"""

from __future__ import annotations

from collections.abc import Mapping

from .oplist import OpList
from .ops import OpCode, padded
from .plan import Mode, Region
from .spec import NetworkSpec

__all__ = ["Counts", "check_counts"]


def check_counts(spec: NetworkSpec) -> None:
    """Refuse a specification whose likelihood of counts is not defined.

    Raises
    ------
    ValueError
        Another link than softmax and exp, several numbers for a feature from a layer that is tied or a convolution, or
        what belongs to counts without them.
    """
    last, loss = spec.layers[-1], spec.loss.info
    name = loss.name
    if not loss.of_counts:
        if spec.cell_dispersion or spec.log_normalize:
            raise ValueError(f"loss {name} has no counts to normalize and no dispersion")
        return
    if last.activation not in loss.links:
        raise ValueError(
            f"loss {name} needs the output activation {' or '.join(loss.link_names)}, "
            f"not {last.activation.name.lower()}"
        )
    if not spec.data.size_sum > 0:
        raise ValueError(f"size_sum={spec.data.size_sum!r} must be positive")
    if spec.cell_dispersion and not loss.dispersion:
        raise ValueError(f"loss {name} has no dispersion")
    if spec.n_heads > 1 and (last.tied_to is not None or last.convolution is not None or last.n_out % spec.n_heads):
        raise ValueError(
            f"the last layer puts out {spec.n_heads} numbers for each feature: it must be dense, untied and so many "
            f"times as wide, not {last.n_out}"
        )


class Counts:
    """The ops of a likelihood of counts, while a plan is being written."""

    def __init__(self, low: OpList, spec: NetworkSpec) -> None:
        self.low, self.spec = low, spec
        self.size_sums: dict[int, str] = {}
        self.partial: str | None = None

    def size_sum(self, modes: Mode, source: int) -> str:
        """Write the sums of the rows of a source; the slot that holds them."""
        if source not in self.size_sums:
            self.size_sums[source] = self.low.rows(f"size_sum{source}", 1)
            self.low.op(OpCode.SIZE_SUM, modes, {"out": self.size_sums[source]}, source=source)
        return self.size_sums[source]

    def loss(self, modes: Mode, slots: Mapping[str, str | None], source: int) -> None:
        """Write the loss of the logits and what lies beside them; it needs the sums of the target's rows."""
        low, spec = self.low, self.spec
        dispersion = None
        if spec.loss.info.dispersion and not spec.cell_dispersion:
            dispersion, size = "log_dispersion", padded(spec.n_outputs)
            self.partial = low.slot("dispersions", Region.SCRATCH, low.grains(size), size)
        low.op(
            OpCode.COUNTS,
            modes,
            {
                **slots,
                "size_sum": self.size_sums[source],
                "log_dispersion": dispersion,
                "partial": self.partial,
            },
            loss=spec.loss,
            activation=spec.layers[-1].activation,
            by_cell=spec.cell_dispersion,
            source=source,
            scale=spec.data.size_sum,
        )

    def means(self, z: str) -> str:
        """Write the means, of the rows of X and of codes; the slot that holds them."""
        low, spec = self.low, self.spec
        out = z if spec.n_heads == 1 else low.rows("means", spec.n_outputs)
        for mode, size_sum in ((Mode.RECONSTRUCT, self.size_sums[0]), (Mode.DECODE, None)):
            low.op(
                OpCode.MEANS,
                mode,
                {"z": z, "size_sum": size_sum, "out": out},
                activation=spec.layers[-1].activation,
                scale=spec.data.size_sum,
            )
        return out

    def gradient(self, apart: Mode, rule: Mapping[str, float], *, fused: bool) -> None:
        """Write the gradient by the dispersions of the features, and their update unless gradients are kept."""
        if self.partial is None:
            return
        name = "log_dispersion"
        self.low.op(OpCode.GRAIN_SUM, apart, {"partial": self.partial, "out": f"d{name}"}, column=0, form=2)
        if fused:
            moments = {f"moment{i + 1}": f"moment{i + 1}.{name}" for i in range(self.spec.training.update.n_moments)}
            slots = {"partial": self.partial, "W": name, **moments}
            self.low.op(OpCode.GRAIN_UPDATE, Mode.TRAIN, slots, **rule, column=0, l2=0.0, l1=0.0, rate=0.0)
