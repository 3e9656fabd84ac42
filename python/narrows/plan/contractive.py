"""Lowering of the contractive penalties and their gradients.

One penalty is the squared Frobenius norm of the encoder's Jacobian, exact or estimated by probes. The other is the
squared norm of the Jacobian's change under noise.

Promises: the penalties use the encoder as it runs in the step, on corrupted input if there is corruption. The gradients
are complete: by the weights and, through the slopes, by all pre-activations.
Never: touches data or knows a backend.

For layers a[i] = act(z[i]), z[i] = a[i-1] W[i] + b[i] with slopes p[i] = act'(z[i]), the Jacobian of a row is
J = D[L] W[L]' ... D[1] W[1]' = B W[1]' with D[i] = diag(p[i]), and |J|**2 = tr(B W[1]'W[1] B'). So a row costs the
same for any width of the input. One layer has a closed form. A convolution is a matrix W[i] that is never written
out, and max pooling selects rows of D[i]; products J'v go through both. Sources: Rifai, Vincent, Muller,
Glorot and Bengio, "Contractive auto-encoders", ICML 2011; Rifai, Mesnil, Vincent, Muller, Bengio, Dauphin and Glorot,
"Higher order contractive auto-encoder", ECML 2011; Hutchinson, Communications in Statistics 18, 1989: E |J'v|**2 =
|J|**2 for v of independent signs.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from .convolution import Convolutions
from .oplist import OpList
from .ops import JACOBIAN_LAYERS, OpCode, Source, jacobian_segments, segments
from .plan import LEARN, Region
from .spec import Activation, Corruption, NetworkSpec, Noise

__all__ = ["Contraction", "Reduction", "check_contractive"]

Reduction = tuple[str, str | None, str, bool]
"""The operands of a REDUCE: the summed slot, the row weights, the term, and whether the term is a mean over rows."""


def check_contractive(spec: NetworkSpec) -> None:
    """Raise ValueError if the contractive penalties are not defined.

    Raises
    ------
    ValueError
        The encoder has dropout or tied layers. For the exact penalty: it has convolutions or too many layers.
    """
    penalties = spec.training.penalties
    if penalties.contractive <= 0 and penalties.contractive_hessian <= 0:
        return
    given = f"contractive={penalties.contractive:g}, contractive_hessian={penalties.contractive_hessian:g}"
    for i, layer in enumerate(spec.layers[: spec.latent]):
        if layer.dropout > 0:
            raise ValueError(
                f"{given} with dropout={layer.dropout:g} in layer {i} of the encoder: contractive penalties "
                "need an encoder without dropout"
            )
        if layer.tied_to is not None:
            raise ValueError(f"{given} with layer {i} of the encoder tied to layer {layer.tied_to}")
    exact = penalties.contractive_probes == 0 or penalties.contractive_hessian > 0
    if exact and any(layer.convolution is not None for layer in spec.layers[: spec.latent]):
        raise ValueError(
            f"{given}: the exact penalty and contractive_hessian need a dense encoder, not convolutions; "
            "contractive_method='hutchinson' takes both"
        )
    if exact and spec.latent > JACOBIAN_LAYERS:
        raise ValueError(
            f"{given}: the exact penalty takes encoders of up to {JACOBIAN_LAYERS} layers, not {spec.latent}; "
            "contractive_method='hutchinson' takes any number"
        )


@dataclass
class Contraction:
    """Writes the penalties into the backward pass.

    Parameters
    ----------
    low : OpList
    spec : NetworkSpec
    weights, saved : list of str
        Slots of each layer's weight, and of the output or pre-activation that its derivative is computed from.
    weight : str or None
        Slot of the row weights.
    convolutions : Convolutions
    """

    low: OpList
    spec: NetworkSpec
    weights: list[str]
    saved: list[str]
    weight: str | None
    convolutions: Convolutions
    reductions: list[Reduction] = field(default_factory=list)
    begun: set[str] = field(default_factory=set)
    """Parameters whose gradients are already begun; later ops add to them."""
    colrates: dict[str, str] = field(default_factory=dict)
    """For a weight, the slot of the rates: rate times column is part of its gradient."""
    dslopes: str | None = None

    def __post_init__(self) -> None:
        self.layers = self.spec.layers[: self.spec.latent]
        self.penalties = self.spec.training.penalties
        self.outputs = self.saved
        # Slopes are taken before the pooling.
        self.saved = [self.convolutions.unpooled.get(i, (s, s))[1] for i, s in enumerate(self.outputs)]
        self.widths = [self.low.shapes[s][2] for s in self.saved[: self.spec.latent]]
        self.columns = segments(self.widths)

    def penalize(self, dz: str, accumulate: bool = True) -> None:
        """Write the penalties, after the forward pass.

        Parameters
        ----------
        dz : str
            Slot of the gradient by the latent layer's pre-activations; the penalty of a single layer adds to it.
        accumulate : bool
            Whether the slot already holds a value.
        """
        penalties = self.penalties
        passes = []
        if penalties.contractive_hessian > 0:
            passes = [_NoisyPass(self, c) for c in range(penalties.n_corruptions)]
        hessian = [(penalties.contractive_hessian / penalties.n_corruptions, noisy) for noisy in passes]
        plain: list[tuple[float, _NoisyPass | None]] = (
            [(penalties.contractive, None)] if penalties.contractive > 0 else []
        )
        if len(self.layers) == 1 and self.layers[0].convolution is None:
            self._closed_form([*plain, *hessian], dz, accumulate)
        elif plain or hessian:
            slopes = self._slopes(self.saved, "slopes")
            self.dslopes = self.low.rows("dslopes", self.columns[-1])
            by_probes = penalties.contractive > 0 and penalties.contractive_probes > 0
            exact = [*(plain if not by_probes else []), *hessian]
            if exact:
                self._exact(exact, slopes)
            if by_probes:
                self._probes(slopes, accumulate=bool(exact))
        for noisy in passes:
            noisy.backward()

    def curve(self, i: int, dz: str, accumulate: bool = True) -> None:
        """Add the penalties' gradient by the pre-activations of layer i to `dz`."""
        if self.dslopes is not None and i < self.spec.latent:
            self._curve(i, self.dslopes, self.saved[i], dz, accumulate)

    def wgrad(self, x: str, dz: str, W: str) -> None:
        """dW (+)= x' dz."""
        self.low.op(OpCode.WGRAD, LEARN, {"x": x, "dz": dz, "dW": f"d{W}"}, accumulate=W in self.begun)
        self.begun.add(W)

    def linear_dgrad(self, dz: str, i: int, like: str, out: str, *, forward: bool = False) -> None:
        """out = dz W' of layer i, or dz W if `forward`; rows are as wide as the slot `like`."""
        self.low.op(
            OpCode.DGRAD,
            LEARN,
            {"dz": dz, "W": self.weights[i], "saved": like, "out": out},
            activation=Activation.LINEAR,
            transposed=forward,
            scale=1.0,
        )

    def _curve(self, i: int, dslopes: str, saved: str, dz: str, accumulate: bool) -> None:
        self.low.op(
            OpCode.CURVES,
            LEARN,
            {"dslopes": dslopes, "saved": saved, "dz": dz},
            activation=self.layers[i].activation,
            column=self.columns[i],
            accumulate=accumulate,
        )

    def _slopes(self, saved: list[str], name: str) -> str:
        """Write the slopes of all layers side by side; return their slot."""
        out = self.low.rows(name, self.columns[-1])
        for i, layer in enumerate(self.layers):
            self.low.op(
                OpCode.SLOPES,
                LEARN,
                {"saved": saved[i], "out": out},
                activation=layer.activation,
                column=self.columns[i],
            )
        return out

    def _closed_form(self, terms: list[tuple[float, _NoisyPass | None]], dz: str, accumulate: bool) -> None:
        low, n = self.low, self.widths[0]
        colrate: str | None = None
        for strength, noisy in terms:
            begun = colrate is not None
            colrate = colrate or low.slot("colrate", Region.SCRATCH, 1, n)
            penalty = low.slot("contractive" if noisy is None else f"hessian{noisy.name}", Region.SCRATCH, 1, n)
            low.op(
                OpCode.CONTRACTIVE,
                LEARN,
                {
                    "saved": self.saved[0],
                    "noisy": noisy.saved[0] if noisy else None,
                    "W": self.weights[0],
                    "weight": self.weight,
                    "dz": dz,
                    "colrate": colrate,
                    "dnoisy": noisy.delta(0) if noisy else None,
                    "penalty": penalty,
                },
                activation=self.layers[0].activation,
                accumulate_dz=accumulate or begun,
                accumulate_colrate=begun,
                strength=strength,
            )
            self.reductions.append((penalty, None, _term(noisy), False))
            self.colrates[self.weights[0]] = colrate

    def _exact(self, terms: list[tuple[float, _NoisyPass | None]], slopes: str) -> None:
        low, spec, encoder = self.low, self.spec, self.weights[: self.spec.latent]
        gram = low.slot("gram", Region.SCRATCH, self.widths[0], self.widths[0])
        low.op(OpCode.GRAM, LEARN, {"W": encoder[0], "out": gram})
        at = jacobian_segments(self.widths)
        partial = low.slot("partial", Region.SCRATCH, low.grains(at[-1]), at[-1])
        for number, (strength, noisy) in enumerate(terms):
            rowpenalty = low.rows("contractive" if noisy is None else f"hessian{noisy.name}", 1)
            noise: dict[str, str] = {}
            if noisy is not None:
                noise["noisy"] = self._slopes(noisy.saved, f"slopes{noisy.name}")
                noise["dnoisy"] = noisy.dslopes = low.rows(f"dslopes{noisy.name}", self.columns[-1])
            low.op(
                OpCode.JACOBIAN,
                LEARN,
                {
                    "slopes": slopes,
                    "gram": gram,
                    **{f"W{i + 1}": encoder[i] for i in range(1, spec.latent)},
                    "weight": self.weight,
                    "dslopes": self.dslopes,
                    "rowpenalty": rowpenalty,
                    "partial": partial,
                    **noise,
                },
                accumulate=number > 0,
                strength=strength,
            )
            self.reductions.append((rowpenalty, None, _term(noisy), False))
        for column, W in zip(at[1:-1], encoder[1:], strict=True):
            low.op(OpCode.GRAIN_SUM, LEARN, {"partial": partial, "out": f"d{W}"}, column=column, form=1)
        low.op(OpCode.GRAIN_SUM, LEARN, {"partial": partial, "out": gram}, column=0, form=0)
        low.op(OpCode.GRAM_WGRAD, LEARN, {"W": encoder[0], "dgram": gram, "dW": f"d{encoder[0]}"})
        self.begun |= set(encoder)

    def _probes(self, slopes: str, accumulate: bool) -> None:
        """For each probe v: J'v layer by layer down to the input, its squared norm, and the way back."""
        low, penalties, last = self.low, self.penalties, len(self.layers) - 1
        conv = self.convolutions
        rowpenalty = low.rows("contractive", 1)
        for r in range(penalties.contractive_probes):
            x, t = [""] * (last + 1), [""] * (last + 1)
            below = low.rows(f"probe{r}", self.spec.n_components)
            low.op(OpCode.PROBE, LEARN, {"out": below}, stream=low.stream())
            for i in range(last, -1, -1):
                x[i] = conv.spread(i, below, f"spread{i}.{r}") if i in conv.unpooled else below
                t[i] = low.rows(f"t{i}.{r}", self.widths[i])
                low.op(OpCode.TANGENT, LEARN, {"x": x[i], "slopes": slopes, "out": t[i]}, column=self.columns[i])
                name, like = (f"x{i - 1}.{r}", self.outputs[i - 1]) if i > 0 else (f"vjp{r}", "x")
                below = low.rows(name, self.layers[i].n_in)
                if self.layers[i].convolution is not None:
                    conv.dgrad(i, t[i], like, below)
                else:
                    self.linear_dgrad(t[i], i, like, below)
            low.op(
                OpCode.SQUARED_NORM,
                LEARN,
                {"x": below, "weight": self.weight, "rowpenalty": rowpenalty},
                accumulate=r > 0,
                strength=penalties.contractive / penalties.contractive_probes,
            )
            above = below
            for i in range(last + 1):
                dt = low.rows(f"dt{i}.{r}", self.widths[i])
                if self.layers[i].convolution is not None:
                    conv.wgrad(i, above, t[i], bias=False)
                    conv.linear(i, above, dt)
                else:
                    self.wgrad(above, t[i], self.weights[i])
                    self.linear_dgrad(above, i, self.saved[i], dt, forward=True)
                low.op(
                    OpCode.COTANGENT,
                    LEARN,
                    {"dout": dt, "x": x[i], "slopes": slopes, "dslopes": self.dslopes},
                    column=self.columns[i],
                    accumulate=accumulate or r > 0,
                )
                above = conv.pick(i, dt, f"picked{i}.{r}") if i in conv.unpooled and i < last else dt
        self.reductions.append((rowpenalty, None, "contractive", False))


class _NoisyPass:
    """A second pass of the encoder, with noise added to its input."""

    def __init__(self, contraction: Contraction, number: int) -> None:
        self.of = contraction
        self.name = f".n{number}"
        self.dslopes: str | None = None
        low, spec = contraction.low, contraction.spec
        x = low.rows(f"x{self.name}", spec.n_features)
        low.op(OpCode.GATHER, LEARN, {"out": x, "shift": "shift" if spec.data.shifted else None}, source=Source.X)
        if spec.training.corruption is not None:
            # The same stream gives the same corruption as in the step.
            low.corrupt(x, spec.training.corruption, low.corruption_stream)
        low.corrupt(x, Noise(Corruption.GAUSSIAN, contraction.penalties.hessian_std), low.stream())
        self.inputs: list[str] = []
        self.saved: list[str] = []
        self.deltas: dict[int, str] = {}
        for i, layer in enumerate(contraction.layers):
            self.inputs.append(x)
            operands = {"x": x, "W": contraction.weights[i], "b": f"b{i}"}
            x, kept = low.dense(f"{i}{self.name}", LEARN, layer, operands)
            self.saved.append(kept)

    def delta(self, i: int) -> str:
        """The slot of the gradient by the pre-activations of layer i."""
        if i not in self.deltas:
            self.deltas[i] = self.of.low.rows(f"d{i}{self.name}", self.of.widths[i])
        return self.deltas[i]

    def backward(self) -> None:
        """Write the parameters' gradients from those by the slopes, or by the pre-activations of a single layer."""
        of, low = self.of, self.of.low
        last = len(of.layers) - 1
        for i in range(last, -1, -1):
            if i < last:
                low.dgrad(of.layers[i], self.delta(i + 1), of.weights[i + 1], self.saved[i], self.delta(i))
            if self.dslopes is not None:
                of._curve(i, self.dslopes, self.saved[i], self.delta(i), i < last)
        for i in range(last + 1):
            of.wgrad(self.inputs[i], self.delta(i), of.weights[i])
            b = f"b{i}"
            low.op(OpCode.COLSUM, LEARN, {"x": self.delta(i), "out": f"d{b}"}, mean=False, accumulate=b in of.begun)
            of.begun.add(b)


def _term(noisy: _NoisyPass | None) -> str:
    return "contractive" if noisy is None else "contractive_hessian"
