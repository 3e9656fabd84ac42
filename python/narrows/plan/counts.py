"""Lowering of likelihoods of counts: the input, the loss, and the means.

Promises: the loss reads rows of counts in place and never makes them dense. The mean, loss, and code of a row depend on
that row alone.
Never: touches data or knows a backend.

The mean of a count is the row's sum times the softmax of the output layer, as in scVI. Or it is the row's size factor
times the exponential of the output layer, as in DCA. The size factor is the row's sum over `Data.size_sum`. Negative
binomial counts of mean mu have the variance mu + mu**2 / theta. The inverse dispersion theta is a parameter for each
feature, or the network predicts it for each row and feature. For zero-inflated counts, the network also predicts the
probability of an additional zero. Sources: Lopez et al., Nature Methods 15, 2018 (scVI); Eraslan et al., Nature
Communications 10, 2019 (DCA).
"""

from __future__ import annotations

from collections.abc import Mapping

from .oplist import OpList
from .ops import OpCode, padded
from .plan import Mode, Region
from .spec import NetworkSpec

__all__ = ["Counts", "check_counts"]


def check_counts(spec: NetworkSpec) -> None:
    """Raise ValueError if the likelihood of counts is not defined.

    Raises
    ------
    ValueError
        The output activation is not softmax or exp. The last layer needs several heads but is tied or a convolution.
        Another loss has settings of counts.
    """
    last, loss = spec.layers[-1], spec.loss.info
    name = loss.name
    if not loss.of_counts:
        if spec.cell_dispersion or spec.log_normalize:
            raise ValueError(
                f"loss {name} is not a likelihood of counts: it takes no cell_dispersion and no log_normalize"
            )
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
            f"the last layer computes {spec.n_heads} numbers for each feature: it must be dense and untied, and its "
            f"width a multiple of {spec.n_heads}, not {last.n_out}"
        )


class Counts:
    """Writes the ops of a likelihood of counts."""

    def __init__(self, low: OpList, spec: NetworkSpec) -> None:
        self.low, self.spec = low, spec
        self.size_sums: dict[int, str] = {}
        self.partial: str | None = None

    def size_sum(self, modes: Mode, source: int) -> str:
        """Write the sums of the rows of a source, once for each source; return their slot."""
        if source not in self.size_sums:
            self.size_sums[source] = self.low.rows(f"size_sum{source}", 1)
            self.low.op(OpCode.SIZE_SUM, modes, {"out": self.size_sums[source]}, source=source)
        return self.size_sums[source]

    def loss(self, modes: Mode, slots: Mapping[str, str | None], source: int) -> None:
        """Write the loss; `size_sum` must have been called for the target."""
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
        """Write the means for rows of X and for codes; return their slot."""
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

    def gradient(self, gradient_modes: Mode, rule: Mapping[str, float], *, fused: bool) -> None:
        """Write the gradient by the features' dispersions, and their update if `fused`."""
        if self.partial is None:
            return
        name = "log_dispersion"
        self.low.op(OpCode.GRAIN_SUM, gradient_modes, {"partial": self.partial, "out": f"d{name}"}, column=0, form=2)
        if fused:
            moments = {f"moment{i + 1}": f"moment{i + 1}.{name}" for i in range(self.spec.training.update.n_moments)}
            slots = {"partial": self.partial, "W": name, **moments}
            self.low.op(OpCode.GRAIN_UPDATE, Mode.TRAIN, slots, **rule, column=0, l2=0.0, l1=0.0, rate=0.0)
