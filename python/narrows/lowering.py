"""Lowering: from a network's specification to the op list of its plan.

Promises: the forward ops, the loss with its link, the backward ops and the update, in the order they run; slots that
are not alive together share memory.
Never: touches data or knows a backend.
"""

from __future__ import annotations

from collections.abc import Mapping

from .boltzmann import check_boltzmann, write_phases
from .contractive import Contraction, Reduction, check_contractive
from .convolution import Convolutions, check_convolutions, outward
from .counts import Counts, check_counts
from .plan import (
    CELL_ROWS,
    FORWARD,
    GRAIN,
    LANES,
    LEARN,
    SIGNATURES,
    Activation,
    Corruption,
    LayerSpec,
    Loss,
    Mode,
    NetworkSpec,
    Op,
    OpCode,
    Plan,
    Region,
    Slot,
    Solver,
    padded,
)

__all__ = ["lower", "lower_penalty"]

_STATE = (("d", Region.GRADIENT), ("moment1.", Region.MOMENT1), ("moment2.", Region.MOMENT2))
"""Slots beside each parameter, by what is put before its name."""


class Lowering:
    """The op list while it is being written. Slots are named; offsets are given out at the end."""

    def __init__(self, batch: int) -> None:
        self.batch = batch
        self.shapes: dict[str, tuple[Region, int, int]] = {}
        self.ops: list[Op] = []
        self.names: list[str] = []
        self.terms: list[str] = []
        self.n_streams = 0
        self.corruption_stream = 0

    def slot(self, name: str, region: Region, rows: int, cols: int) -> str:
        self.shapes[name] = (region, rows, cols)
        self.names.append(name)
        return name

    def rows(self, name: str, cols: int) -> str:
        """A slot with one row per sample."""
        return self.slot(name, Region.BATCH, self.batch, cols)

    def op(self, code: OpCode, modes: Mode, slots: Mapping[str, str | None], **attributes: float) -> None:
        signature = SIGNATURES[code]
        unknown = (set(slots) - set(signature.slots)) | (set(attributes) ^ {*signature.ints, *signature.floats})
        if unknown:
            raise TypeError(f"{code.name}: operands {sorted(unknown)} do not fit its signature")
        indices = tuple(-1 if (name := slots.get(role)) is None else self.names.index(name) for role in signature.slots)
        self.ops.append(
            Op(
                code,
                modes,
                indices,
                tuple(int(attributes[n]) for n in signature.ints),
                tuple(float(attributes[n]) for n in signature.floats),
            )
        )

    def stream(self) -> int:
        """A random stream of its own for the op being written."""
        self.n_streams += 1
        return self.n_streams - 1

    def corrupt(self, x: str, kind: Corruption, level: float, bounds: tuple[float, float], stream: int) -> None:
        low, high = bounds
        self.op(OpCode.CORRUPT, LEARN, {"x": x}, kind=kind, stream=stream, level=level, low=low, high=high)

    def dense(
        self,
        name: str,
        modes: Mode,
        layer: LayerSpec,
        operands: Mapping[str, str],
        *,
        output: bool = False,
        transposed: bool = False,
        masking: Mapping[str, float] | None = None,
    ) -> tuple[str, str]:
        """Write a layer whose slots end in `name`; return that of its output, and what its derivative is told from.

        The output layer stops at the pre-activation: its activation is the loss's link. With `masking`, the attributes
        of the noise and the scale of counts, the layer works on sparse rows of X.
        """
        activation = Activation.LINEAR if output else layer.activation
        out = self.rows(f"a{name}", layer.n_out)
        pre = self.rows(f"z{name}", layer.n_out) if activation.needs_preactivation else None
        slots = {**operands, "out": out, "pre": pre}
        if masking is None:
            self.op(OpCode.DENSE, modes, slots, activation=activation, transposed=transposed)
        else:
            self.op(OpCode.SPARSE_DENSE, modes, slots, activation=activation, **masking)
        return out, pre or out

    def dgrad(self, before: LayerSpec, dz: str, W: str, saved: str, out: str, *, transposed: bool = False) -> None:
        """Write the gradient by the pre-activations of the layer `before` (by its output, if that is pooled), from `dz`
        of the layer with weight `W`.
        """
        self.op(
            OpCode.DGRAD,
            LEARN,
            {"dz": dz, "W": W, "saved": saved, "out": out},
            activation=outward(before),
            transposed=transposed,
            scale=saved_scale(before),
        )

    def gram_loss(
        self, modes: Mode, operands: dict[str, str | None], before: LayerSpec, rowloss: str, out: str, *, source: int
    ) -> None:
        """Write the squared error of a layer against CSR rows, and the gradient by the pre-activations of the layer
        `before` (by its output, if that is pooled).
        """
        _, inner, _ = self.shapes[str(operands["W"])]
        gram = {part: self.slot(f"gram.{part}", Region.SCRATCH, inner + 1, inner + 1) for part in ("high", "low")}
        self.op(OpCode.WEIGHT_GRAM, modes, {"W": operands["W"], "b": operands["b"], **gram})
        self.op(
            OpCode.SPARSE_MSE,
            modes,
            {**operands, **gram, "rowloss": rowloss, "out": out},
            source=source,
            activation=outward(before),
            scale=saved_scale(before),
        )

    def term(self, name: str) -> int:
        if name not in self.terms:
            self.terms.append(name)
        return self.terms.index(name)

    def assign(self, keep: set[str]) -> tuple[tuple[Slot, ...], int]:
        """Give every slot its offset; batch slots share memory when no op needs both.

        Slots in `keep` (results of a mode) are held to the end of the list.
        """
        first: dict[int, int] = {}
        last: dict[int, int] = {}
        for position, op in enumerate(self.ops):
            for i in op.slots:
                first.setdefault(i, position)
                last[i] = position
        slots: list[Slot] = []
        size = dict.fromkeys(Region, 0)
        placed: list[tuple[int, int, int, int]] = []  # offset, end, first op, last op
        for i, name in enumerate(self.names):
            region, rows, cols = self.shapes[name]
            extent = rows * padded(cols)
            if region < Region.BATCH:
                offset = size[region]
                size[region] += extent
            else:
                shared = region is Region.BATCH
                begin = first.get(i, 0) if shared else 0
                end = last.get(i, 0) if shared and name not in keep else len(self.ops)
                offset = 0
                for o, e, f, to in sorted(placed):
                    if f <= end and begin <= to and offset < e and o < offset + extent:
                        offset = e
                placed.append((offset, offset + extent, begin, end))
            slots.append(Slot(name, region, rows, cols, offset))
        return tuple(slots), max((p[1] for p in placed), default=0)


def saved_scale(layer: LayerSpec) -> float:
    """Dropout scaled the saved output in place; the activation's derivative is wanted before that."""
    return 1.0 if layer.activation.needs_preactivation else 1.0 - layer.dropout


def lower(spec: NetworkSpec, batch: int) -> Plan:
    """Write the op list of a network for batches of up to `batch` rows.

    Parameters
    ----------
    spec : NetworkSpec
    batch : int
        Capacity in rows; a run may use fewer.

    Returns
    -------
    Plan

    Raises
    ------
    ValueError
        A specification without a decoder, or with dropout on the latent or the output layer: the latent penalties are
        of the code itself, and the output layer's activation belongs to the loss. A variational network with such
        penalties, or whose latent layer is not linear or not twice as wide as the decoder's input. A contractive
        penalty that is not defined (see `check_contractive`), convolutions that do not fit together, a likelihood of
        counts without its link (see `check_counts`), what is no Boltzmann machine (see `check_boltzmann`), a decoder
        that cannot be told batches, or a sparse input to what needs dense rows.
    """
    layers = spec.layers
    last = len(layers) - 1
    if not 1 <= spec.latent <= last:
        raise ValueError(f"latent={spec.latent} must leave at least one of {last + 1} layers to the decoder")
    for i in (spec.latent - 1, last):
        if layers[i].dropout > 0:
            raise ValueError(f"layer {i} is the latent or the output layer and takes no dropout")
    check_contractive(spec)
    check_convolutions(spec)
    check_counts(spec)
    if spec.variational:
        _check_variational(spec)
    if spec.n_batches:
        _check_batches(spec)
    if spec.n_gibbs:
        check_boltzmann(spec, batch)
    if spec.gram_decoder and not spec.takes_gram_decoder:
        raise ValueError(
            "gram_decoder needs the squared error of a dense linear output layer with a weight of its own: no other "
            "loss or output activation, no tied weight, convolution or Gibbs sampling"
        )
    if spec.sparse_input and not spec.takes_sparse_input:
        raise ValueError(
            "sparse_input needs a dense first layer and no noise but masking: convolutions, gaussian and "
            "salt-and-pepper corruption, contractive_hessian, contractive probes, Gibbs sampling and any corruption of "
            "shifted rows work on dense rows"
        )
    if spec.shifted and spec.loss.of_counts:
        raise ValueError(f"loss {spec.loss.name} is of counts, and shifted rows are none")
    low = Lowering(batch)

    weights, parameter_size = _parameters(low, spec)

    # Forward. Saved: what the backward pass reads of each layer, its output or its pre-activation.
    forward, score = FORWARD, Mode.SCORE
    if spec.variational:
        forward, score = forward | Mode.POSTERIOR, score | Mode.LIKELIHOOD
    x = ""  # none: sparse rows
    # Counts are judged where they lie.
    counts = Counts(low, spec) if spec.loss.of_counts else None
    apart = spec.corruption is not None or spec.separate_target or spec.sparse_input or counts is not None
    apart = apart or spec.gram_decoder
    goal = 1 if spec.separate_target else 0
    normalized: dict[str, str] = {}
    last_bias = f"b{last}"
    if spec.shifted:
        normalized["shift"] = low.slot("shift", Region.SCRATCH, 1, spec.n_features)
        low.op(OpCode.SHIFT, forward | score if goal == 0 else forward, {"out": "shift"})
        if spec.gram_decoder and goal == 0:
            # |h V + b - (y - shift)|^2: of the rows as they are stored, with another bias.
            last_bias = low.slot("shifted.b", Region.SCRATCH, 1, spec.n_outputs)
            low.op(OpCode.SHIFT, score | LEARN, {"b": f"b{last}", "out": last_bias})
    if not spec.sparse_input:
        x = low.rows("x", spec.n_features)
        low.op(OpCode.GATHER, forward if apart else forward | score, {"out": x} | normalized, source=0)
    target = x
    if counts is not None:
        judged_by = score | LEARN
        seen = forward if spec.log_normalize else Mode.RECONSTRUCT
        library = counts.library(seen | judged_by if goal == 0 else seen, 0)
        counts.library(judged_by, goal)
        if spec.log_normalize:
            normalized = {"library": library}
            if x:
                low.op(OpCode.LOG_NORMALIZE, forward, {"x": x} | normalized, scale=spec.library)
    elif apart and not spec.gram_decoder:
        target = low.rows("target", spec.n_outputs)
        low.op(OpCode.GATHER, score | LEARN, {"out": target} | (normalized if goal == 0 else {}), source=goal)
    weight = None
    if spec.weighted:
        weight = low.rows("weight", 1)
        low.op(OpCode.GATHER, LEARN, {"out": weight}, source=2)
    if spec.corruption is not None:
        low.corruption_stream = low.stream()
        if x:
            low.corrupt(x, spec.corruption, spec.corruption_level, spec.corruption_range, low.corruption_stream)
    masking = {
        "stream": low.corruption_stream,
        "level": spec.corruption_level if spec.corruption is not None else 0.0,
        "scale": spec.library,
    }
    inputs: list[str] = []
    saved: list[str] = []
    streams: list[int | None] = []
    modes = forward
    noise = None
    convolutions = Convolutions(low, spec, weights)
    for i, layer in enumerate(layers):
        inputs.append(x)
        if layer.convolution is not None:
            out, kept = convolutions.forward(i, modes, x)
        else:
            operands = {"W": weights[i], "b": f"b{i}"} | ({"x": x} if x else normalized)
            out, kept = low.dense(
                f"{i}",
                # What is judged in Gram form is not computed.
                modes & (Mode.DECODE | Mode.RECONSTRUCT) if i == last and spec.gram_decoder else modes,
                layer,
                operands,
                output=i == last,
                transposed=layer.tied_to is not None,
                masking=None if x else masking,
            )
        saved.append(kept)
        streams.append(low.stream() if layer.dropout > 0 else None)
        if (stream := streams[-1]) is not None:
            low.op(OpCode.DROPOUT, LEARN, {"x": out}, stream=stream, rate=layer.dropout)
        if i == spec.latent - 1:
            if spec.variational:
                stats, out = out, low.rows("z", spec.n_components)
                noise = low.rows("noise", spec.n_components)
                low.op(OpCode.SAMPLE, FORWARD, {"stats": stats, "z": out, "noise": noise}, stream=low.stream())
            codes = out
            from_codes = Mode.DECODE | (score & ~Mode.SCORE)
            modes = (FORWARD & ~Mode.ENCODE) | from_codes
            if spec.n_gibbs and not spec.n_chains:
                modes &= ~LEARN  # the chain from each row rebuilds it
            low.op(OpCode.GATHER, from_codes, {"out": codes}, source=3)
            if spec.n_batches:
                out = low.rows("conditioned", spec.n_components + spec.n_batches)
                low.op(OpCode.CONDITION, modes, {"z": codes, "out": out})
        x = out

    z = result = x
    if counts is not None:
        result = counts.means(z)
    elif layers[last].activation is not Activation.LINEAR:
        low.op(OpCode.LINK, Mode.DECODE | Mode.RECONSTRUCT, {"z": z}, activation=layers[last].activation)
    rowloss = low.rows("rowloss", 1)
    judged = {"z": z, "target": target, "weight": weight, "rowloss": rowloss}
    link = layers[last].activation
    rates = None
    score |= modes & LEARN
    if spec.loss is Loss.GAUSSIAN:
        rates = low.rows("rates", spec.n_outputs)
        low.op(OpCode.GAUSSIAN, score, judged | {"logvar": "logvar", "rates": rates}, activation=link)
    elif counts is not None:
        counts.loss(score, {"z": z, "weight": weight, "rowloss": rowloss}, goal)
    elif not spec.gram_decoder:
        low.op(OpCode.LOSS, score, judged, loss=spec.loss, activation=link, delta=spec.huber_delta)

    # Backward, from dz of the output layer, which the loss has left in z. First the chain down to the first layer,
    # every op of which needs its own rows alone, so that threads sharing the rows need not wait for each other; then
    # the gradients of the parameters, which are sums over all rows.
    reductions: list[Reduction] = [(rowloss, weight, "loss", True)]
    deltas = {last: z}
    contraction = Contraction(low, spec, weights, saved, weight, convolutions)
    if spec.n_gibbs:
        inputs, deltas = write_phases(low, spec, weights[0], inputs[0], codes, weight, rowloss)
    for i in range(last if not spec.n_gibbs else 0, 0, -1):
        before = layers[i - 1]
        dx = deltas[i - 1] = low.rows(f"d{i - 1}", before.n_out)
        drawn = noise is not None and i == spec.latent
        by, onto = (codes, low.rows("dz", spec.n_components)) if drawn else (saved[i - 1], dx)
        if i == last and spec.gram_decoder:
            sides = {"h": inputs[i], "W": weights[i], "b": last_bias, "saved": by, "weight": weight}
            low.gram_loss(score, sides, before, rowloss, onto, source=int(spec.separate_target))
        elif layers[i].convolution is not None:
            convolutions.dgrad(i, deltas[i], by, onto, saved_scale(before), outward(before))
        else:
            low.dgrad(before, deltas[i], weights[i], by, onto, transposed=layers[i].tied_to is not None)
        if drawn:
            rowkl = low.rows("rowkl", 1)
            low.op(
                OpCode.LATENT_KL,
                LEARN,
                {"stats": saved[i - 1], "noise": noise, "weight": weight, "dz": "dz", "dstats": dx, "rowkl": rowkl},
                strength=spec.kl_weight,
            )
            reductions.append((rowkl, weight, "kl", True))
        if (stream := streams[i - 1]) is not None:
            low.op(OpCode.DROPOUT, LEARN, {"x": dx}, stream=stream, rate=before.dropout)
        if i == spec.latent:
            reductions += _latent_penalties(low, spec, f"a{i - 1}", saved[i - 1], weight, dx)
            contraction.penalise(dx)
            reductions += contraction.reductions
        deltas[i - 1] = convolutions.unpool(i - 1, dx)
        contraction.curve(i - 1, deltas[i - 1])
    convolutions.wgrads(inputs, deltas)
    reductions += _parameter_gradients(
        low,
        spec,
        weights,
        inputs,
        deltas,
        contraction,
        convolutions,
        weight=weight,
        rates=rates,
        masking=masking,
        normalized=normalized,
        last_bias=last_bias,
    )
    if counts is not None:
        fused = spec.clip_norm is None
        counts.gradient(Mode.GRADIENT if fused else LEARN, _rule(spec), fused=fused)

    _reduce(low, reductions)
    if spec.clip_norm is not None:
        partial = low.slot("gradnorm", Region.SCRATCH, 1, -(-parameter_size // GRAIN))
        low.op(OpCode.SQNORM, LEARN, {"partial": partial})
        if spec.solver is Solver.ADAMW and spec.alpha > 0:
            for name in dict.fromkeys(weights):
                low.op(OpCode.SHRINK, Mode.TRAIN, {"W": name}, rate=spec.alpha)
        low.op(OpCode.UPDATE, Mode.TRAIN, {"partial": partial}, **_rule(spec), clip=spec.clip_norm)
    results = {Mode.ENCODE: codes, Mode.DECODE: result, Mode.RECONSTRUCT: result, Mode.SCORE: rowloss}
    if spec.variational:
        results |= {Mode.POSTERIOR: f"a{spec.latent - 1}", Mode.LIKELIHOOD: rowloss}
    plan_slots, work_size = low.assign(set(results.values()))
    index = {s.name: i for i, s in enumerate(plan_slots)}
    outputs = {mode: index[name] for mode, name in results.items()}
    return Plan(spec, batch, plan_slots, tuple(low.ops), tuple(low.terms), parameter_size, work_size, outputs)


def _check_variational(spec: NetworkSpec) -> None:
    latent, after = spec.layers[spec.latent - 1], spec.layers[spec.latent]
    penalties = ("activity_l1", "kl_sparsity", "contractive", "contractive_hessian")
    if any(getattr(spec, name) > 0 for name in penalties):
        given = ", ".join(f"{name}={getattr(spec, name):g}" for name in penalties if getattr(spec, name) > 0)
        raise ValueError(f"{given}: a penalty on codes, of which a variational network has distributions; must be 0")
    n_latents = after.n_in - spec.n_batches
    if latent.n_out != 2 * n_latents or latent.activation is not Activation.LINEAR or latent.tied_to or after.tied_to:
        raise ValueError(
            f"a variational network's latent layer must be linear, untied and twice as wide as the decoder's input: "
            f"{latent.n_out} {latent.activation.name.lower()} outputs for {n_latents} latents"
        )


def _check_batches(spec: NetworkSpec) -> None:
    """The decoder's first layer takes the code and the batches; tied, or a convolution, it has no place for them."""
    first = spec.layers[spec.latent]
    if spec.n_gibbs or any(layer.tied_to is not None for layer in spec.layers) or first.convolution is not None:
        raise ValueError("a decoder with tied weights, convolutional or of a Boltzmann machine cannot be told batches")
    if spec.n_batches < 0 or first.n_in != spec.n_components + spec.n_batches:
        raise ValueError(
            f"the decoder's first layer has {first.n_in} inputs for {spec.n_components} latents and {spec.n_batches} "
            "batches"
        )


def lower_penalty(spec: NetworkSpec, batch: int, *, grads: bool = True) -> Plan:
    """Write the op list of an encoder's contractive penalties alone, to be run for their gradient.

    Parameters
    ----------
    spec : NetworkSpec
        All of its layers are the encoder.
    batch : int
        Capacity in rows; a run may use fewer.
    grads : bool
        Whether the gradients of the parameters are wanted.

    Returns
    -------
    Plan

    Raises
    ------
    ValueError
        The penalty is not defined (see `check_contractive`).
    """
    check_contractive(spec)
    low = Lowering(batch)
    weights, parameter_size = _parameters(low, spec)
    x = low.rows("x", spec.n_features)
    low.op(OpCode.GATHER, Mode.GRADIENT, {"out": x}, source=0)
    inputs, saved = [], []
    for i, layer in enumerate(spec.layers):
        inputs.append(x)
        x, kept = low.dense(f"{i}", Mode.GRADIENT, layer, {"x": x, "W": weights[i], "b": f"b{i}"})
        saved.append(kept)
    deltas = {i: low.rows(f"d{i}", layer.n_out) for i, layer in enumerate(spec.layers)}
    last = len(spec.layers) - 1
    none = Convolutions(low, spec, weights)
    contraction = Contraction(low, spec, weights, saved, None, none)
    contraction.penalise(deltas[last], onto=False)
    if grads:
        for i in range(last, -1, -1):
            if i < last:
                low.dgrad(spec.layers[i], deltas[i + 1], weights[i + 1], saved[i], deltas[i])
            contraction.curve(i, deltas[i], onto=i < last)
        _parameter_gradients(low, spec, weights, inputs, deltas, contraction, none, update=False)
    _reduce(low, contraction.reductions)
    slots, work_size = low.assign(set())
    return Plan(spec, batch, slots, tuple(low.ops), tuple(low.terms), parameter_size, work_size)


def _parameters(low: Lowering, spec: NetworkSpec) -> tuple[list[str], int]:
    """Slots of the parameters and of their state; those of the layers' weights, and the elements of the region."""
    weights = [f"W{i if layer.tied_to is None else layer.tied_to}" for i, layer in enumerate(spec.layers)]
    for name, (rows, cols) in spec.parameter_shapes.items():
        low.slot(name, Region.PARAMETER, rows, cols)
    parameter_size = 0
    for name in list(low.names):
        _, rows, cols = low.shapes[name]
        if name != "chain":
            for prefix, region in _STATE[: 1 + spec.n_moments]:
                low.slot(f"{prefix}{name}", region, rows, cols)
        parameter_size += rows * padded(cols)
    return weights, parameter_size


def _reduce(low: Lowering, reductions: list[Reduction]) -> None:
    """Sum what the step reports."""
    terms = low.slot("terms", Region.SCRATCH, 1, max(1, len({r[2] for r in reductions})))
    for name, row_weight, term, mean in reductions:
        low.op(
            OpCode.REDUCE,
            LEARN,
            {"x": name, "weight": row_weight, "terms": terms},
            index=low.term(term),
            mean=mean,
        )


def _latent_penalties(
    low: Lowering, spec: NetworkSpec, a: str, saved: str, weight: str | None, dz: str
) -> list[Reduction]:
    """Penalties on the latent layer, added to its dz once the decoder's part is there."""
    activation = outward(spec.layers[spec.latent - 1])
    reductions: list[Reduction] = []
    if spec.activity_l1 > 0:
        penalty = low.rows("rowpenalty", 1)
        low.op(
            OpCode.ACTIVITY_L1,
            LEARN,
            {"a": a, "saved": saved, "weight": weight, "dz": dz, "rowpenalty": penalty},
            activation=activation,
            strength=spec.activity_l1,
        )
        reductions.append((penalty, weight, "activity_l1", True))
    if spec.kl_sparsity > 0:
        mean = low.slot("mean_activity", Region.SCRATCH, 1, spec.n_components)
        penalty = low.slot("kl_penalty", Region.SCRATCH, 1, spec.n_components)
        low.op(OpCode.COLSUM, LEARN, {"x": a, "weight": weight, "out": mean}, mean=True, accumulate=False)
        low.op(
            OpCode.KL_SPARSITY,
            LEARN,
            {"saved": saved, "mean": mean, "weight": weight, "dz": dz, "penalty": penalty},
            activation=activation,
            strength=spec.kl_sparsity,
            target=spec.sparsity_target,
        )
        reductions.append((penalty, None, "kl_sparsity", False))
    return reductions


def _rule(spec: NetworkSpec) -> dict[str, float]:
    """The attributes of the update rule."""
    beta_1 = spec.momentum if spec.solver is Solver.SGD else spec.beta_1
    return {"solver": spec.solver, "beta_1": beta_1, "beta_2": spec.beta_2, "epsilon": spec.epsilon}


def _parameter_gradients(
    low: Lowering,
    spec: NetworkSpec,
    weights: list[str],
    inputs: list[str],
    deltas: Mapping[int, str],
    contraction: Contraction,
    convolutions: Convolutions,
    *,
    weight: str | None = None,
    rates: str | None = None,
    update: bool = True,
    masking: Mapping[str, float] | None = None,
    normalized: Mapping[str, str] | None = None,
    last_bias: str = "",
) -> list[Reduction]:
    """Gradients of weights and biases; in training each is used up where it arises, unless all are wanted at once for
    their norm or there is no `update`.

    `weight` holds the rows' weights, which the gradients in `deltas` have in them already; `rates` what sums to the
    gradient of the learned variances, row by row; an input without a name stands for sparse rows of X with noise of the
    attributes `masking`, and the slots `normalized` of their normalisation; `last_bias` is that by which an output
    layer in Gram form is judged. L2 and L1 are on weights, never on biases or variances; adamw takes its L2 as
    decoupled decay instead of as a gradient.
    """
    fused = update and spec.clip_norm is None
    apart = Mode.GRADIENT if fused else LEARN
    decoupled = spec.solver is Solver.ADAMW
    decay = {"l2": 0.0 if decoupled else spec.alpha, "l1": spec.weight_l1}
    penalised = any(decay.values())
    reductions: list[Reduction] = []

    def state(name: str) -> dict[str, str]:
        return {f"moment{i + 1}": f"moment{i + 1}.{name}" for i in range(spec.n_moments)}

    def summed(name: str, rows: str) -> None:
        again = name in seen
        low.op(OpCode.COLSUM, apart, {"x": rows, "out": f"d{name}"}, mean=False, accumulate=again)
        if fused:
            low.op(
                OpCode.COLSUM_UPDATE,
                Mode.TRAIN,
                {"x": rows, "db": f"d{name}" if again else None, "b": name, **state(name)},
                **_rule(spec),
            )

    def decayed(W: str) -> str | None:
        """The slot of a weight's penalty, if it has one."""
        if not penalised:
            return None
        _, rows, cols = low.shapes[W]
        penalty = low.slot(f"penalty.{W}", Region.SCRATCH, -(-rows // CELL_ROWS), -(-cols // LANES))
        low.op(OpCode.DECAY, apart, {"W": W, "dW": f"d{W}", "penalty": penalty}, **decay)
        reductions.append((penalty, None, "weight_penalty", False))
        return penalty

    rate = spec.alpha if decoupled else 0.0
    seen = set(contraction.begun)
    for i in range(len(weights) - 1, -1, -1):
        if spec.layers[i].convolution is not None:
            convolutions.gradient(i, apart)
            penalty = decayed(weights[i])
            if fused:
                convolutions.update(i, penalty, {**decay, "rate": rate}, _rule(spec))
            continue
        if spec.gram_decoder and i == len(weights) - 1:
            sides = {"h": inputs[i], "weight": weight, "W": weights[i]}
            sides["gram"] = low.slot("gram.rows", Region.SCRATCH, spec.layers[i].n_in + 1, spec.layers[i].n_in + 1)
            judged = int(spec.separate_target)
            low.op(OpCode.ROW_GRAM, LEARN, {"h": inputs[i], "weight": weight, "out": sides["gram"]})
            results = {"b": last_bias, "dW": f"d{weights[i]}", "db": f"db{i}"}
            low.op(OpCode.SPARSE_MSE_WGRAD, apart, {**sides, **results}, source=judged)
            penalty = decayed(weights[i])
            if fused:
                moments = {f"b_{role}": name for role, name in state(f"b{i}").items()} | state(weights[i])
                moments |= {"b": f"b{i}"} | ({"shift": "shift"} if last_bias != f"b{i}" else {})
                low.op(
                    OpCode.SPARSE_MSE_UPDATE,
                    Mode.TRAIN,
                    {**sides, **moments, "penalty": penalty},
                    source=judged,
                    **_rule(spec),
                    **decay,
                    rate=rate,
                )
            continue
        tied = spec.layers[i].tied_to is not None
        source, sink = (deltas[i], inputs[i]) if tied else (inputs[i], deltas[i])
        W, again = weights[i], weights[i] in seen
        # A tied weight has two products, of which the second is followed by all else.
        final = weights.index(W) == i
        seen.add(W)
        # Sparse rows are those of the first layer, whose weight is nobody else's transposed.
        products = OpCode.WGRAD, OpCode.WGRAD_UPDATE
        slots: dict[str, str] = {"x": source, "dz": sink}
        noise: dict[str, float] = {}
        if not source:
            products = OpCode.SPARSE_WGRAD, OpCode.SPARSE_WGRAD_UPDATE
            slots, noise = {"dz": sink, **(normalized or {})}, dict(masking or {})
        low.op(products[0], apart if final else LEARN, {**slots, "dW": f"d{W}"}, accumulate=again, **noise)
        if final:
            colrate = contraction.colrates.get(W)
            if colrate is not None:
                low.op(OpCode.COLUMN_DECAY, apart, {"W": W, "colrate": colrate, "dW": f"d{W}"})
            penalty = decayed(W)
            if fused:
                low.op(
                    products[1],
                    Mode.TRAIN,
                    {
                        **slots,
                        "dW": f"d{W}" if again else None,
                        "W": W,
                        "colrate": colrate,
                        "penalty": penalty,
                        **state(W),
                    },
                    **_rule(spec),
                    **decay,
                    **noise,
                    rate=rate,
                )
        summed(f"b{i}", deltas[i])
    if rates is not None:
        summed("logvar", rates)
    return reductions
