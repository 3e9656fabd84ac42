"""Lowering of the contractive penalty: the squared Frobenius norm of the encoder's Jacobian, and its gradient.

Promises: the penalty is of the encoder as it runs in the step (on corrupted input, if there is corruption), exact,
with every term of its gradient: by the weights it is made of and, through the slopes, by all pre-activations.
Never: touches data or knows a backend.

For layers a[i] = act(z[i]), z[i] = a[i-1] W[i] + b[i] with slopes p[i] = act'(z[i]), the Jacobian of a row is
J = D[L] W[L]' ... D[1] W[1]' = B W[1]' with D[i] = diag(p[i]), and |J|**2 = tr(B W[1]'W[1] B'): the width of the input
drops out of what a row costs. One layer has a closed form (Rifai et al., ICML 2011), which the op CONTRACTIVE takes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .plan import JACOBIAN_LAYERS, LEARN, NetworkSpec, OpCode, Region, jacobian_segments, padded, segments

if TYPE_CHECKING:
    from .lowering import Lowering

__all__ = ["Contraction", "Reduction", "check_contractive", "contract"]

MAX_GRAINS = 16
"""Grains of rows whose partial sums are kept apart: as many threads can share the rows."""
MIN_ROWS = 8
"""Rows of a batch that are worth a grain."""
PARTIAL_SIZE = 1 << 23
"""Elements that the partial sums may take, if more than two grains are to be kept."""

Reduction = tuple[str, str | None, str, bool]
"""What a REDUCE adds to the terms: its slot, a weight for each row, the term, and whether it is a mean."""


@dataclass
class Contraction:
    """The penalty's ops that stand in the backward pass, and what they leave for those that follow."""

    low: Lowering
    spec: NetworkSpec
    weights: list[str]
    saved: list[str]
    reductions: list[Reduction] = field(default_factory=list)
    colrates: dict[str, str] = field(default_factory=dict)
    """Slot of the rates by which the columns of a weight are its own gradient."""
    dslopes: str | None = None
    partial: str | None = None

    @property
    def widths(self) -> list[int]:
        return [layer.n_out for layer in self.spec.layers[: self.spec.latent]]

    def curve(self, i: int, dz: str) -> None:
        """Add what the penalty has by the pre-activations of layer i, once the layers above are in `dz`."""
        if self.dslopes is not None and i < self.spec.latent:
            self.low.op(
                OpCode.CURVES,
                LEARN,
                {"dslopes": self.dslopes, "saved": self.saved[i], "dz": dz},
                activation=self.spec.layers[i].activation,
                column=segments(self.widths)[i],
            )

    def begin_weights(self) -> set[str]:
        """Write what the penalty has by the weights of several layers; return the weights whose gradients hold it."""
        if self.partial is None:
            return set()
        low, encoder = self.low, self.weights[: self.spec.latent]
        columns = jacobian_segments(self.widths)
        for column, W in zip(columns[1:-1], encoder[1:], strict=True):
            low.op(OpCode.GRAIN_SUM, LEARN, {"partial": self.partial, "out": f"d{W}"}, column=column, form=1)
        low.op(OpCode.GRAIN_SUM, LEARN, {"partial": self.partial, "out": "gram"}, column=0, form=0)
        low.op(OpCode.GRAM_WGRAD, LEARN, {"W": encoder[0], "dgram": "gram", "dW": f"d{encoder[0]}"})
        return set(encoder)


def check_contractive(spec: NetworkSpec) -> None:
    """Refuse a specification whose contractive penalty is not defined.

    Raises
    ------
    ValueError
        Dropout in the encoder, or more layers in it than the exact penalty takes.
    """
    if spec.contractive <= 0:
        return
    for i, layer in enumerate(spec.layers[: spec.latent]):
        if layer.dropout > 0:
            raise ValueError(
                f"contractive={spec.contractive:g} with dropout={layer.dropout:g} in layer {i} of the encoder: the "
                "penalty is of an encoder that drops nothing"
            )
    if spec.latent > JACOBIAN_LAYERS:
        raise ValueError(
            f"contractive={spec.contractive:g}: the exact penalty is for encoders of up to {JACOBIAN_LAYERS} layers, "
            f"not {spec.latent}"
        )


def contract(
    low: Lowering, spec: NetworkSpec, weights: list[str], saved: list[str], weight: str | None, dz: str
) -> Contraction:
    """Write the penalty of the encoder and its derivatives by what the forward pass has left.

    Parameters
    ----------
    low : Lowering
    spec : NetworkSpec
    weights, saved : list of str
        Slots of each layer's weight and of what its derivative is told from.
    weight : str or None
        Slot of the rows' weights.
    dz : str
        Gradient by the latent layer's pre-activations, to which one layer's penalty is added.
    """
    result = Contraction(low, spec, weights, saved)
    if spec.contractive <= 0:
        return result
    widths = result.widths
    if spec.latent == 1:
        colrate = low.slot("colrate", Region.SCRATCH, 1, widths[0])
        penalty = low.slot("contractive", Region.SCRATCH, 1, widths[0])
        low.op(
            OpCode.CONTRACTIVE,
            LEARN,
            {"saved": saved[0], "W": weights[0], "weight": weight, "dz": dz, "colrate": colrate, "penalty": penalty},
            activation=spec.layers[0].activation,
            strength=spec.contractive,
        )
        result.colrates[weights[0]] = colrate
        result.reductions.append((penalty, None, "contractive", False))
        return result
    gram = low.slot("gram", Region.SCRATCH, widths[0], widths[0])
    low.op(OpCode.GRAM, LEARN, {"W": weights[0], "out": gram})
    columns = segments(widths)
    slopes = low.rows("slopes", columns[-1])
    for i in range(spec.latent):
        low.op(
            OpCode.SLOPES,
            LEARN,
            {"saved": saved[i], "out": slopes},
            activation=spec.layers[i].activation,
            column=columns[i],
        )
    size = jacobian_segments(widths)[-1]
    result.partial = low.slot("partial", Region.SCRATCH, grains(low.batch, size), size)
    result.dslopes = low.rows("dslopes", columns[-1])
    rowpenalty = low.rows("contractive", 1)
    low.op(
        OpCode.JACOBIAN,
        LEARN,
        {
            "slopes": slopes,
            "gram": gram,
            **{f"W{i + 1}": weights[i] for i in range(1, spec.latent)},
            "weight": weight,
            "dslopes": result.dslopes,
            "rowpenalty": rowpenalty,
            "partial": result.partial,
        },
        strength=spec.contractive,
    )
    result.reductions.append((rowpenalty, None, "contractive", False))
    return result


def grains(batch: int, size: int) -> int:
    """Into how many grains the rows of a batch are cut, if each has partial sums of `size` elements."""
    wanted = min(MAX_GRAINS, max(1, batch // MIN_ROWS))
    return min(wanted, max(2, PARTIAL_SIZE // padded(size)))
