"""Lowering: from a network's specification to the op list of its plan.

Promises: the list holds the forward ops, the loss with its link, the backward ops, and the update, in the order they
run.
Never: touches data or knows a backend.

Reading order: `lower`, `Writer` (phase by phase), `oplist`, `gradients`. `contractive`, `convolution`, `counts`, and
`boltzmann` write the ops of their subject.
"""

from __future__ import annotations

from .boltzmann import check_boltzmann, on_codes, write_phases
from .contractive import Contraction, Reduction, check_contractive
from .convolution import Convolutions, check_convolutions
from .counts import Counts, check_counts
from .gradients import Gradients, SparseInput, parameters, reduce, rule
from .oplist import OpList
from .ops import OpCode, Source
from .plan import FORWARD, LEARN, Mode, Plan, Region
from .spec import Activation, NetworkSpec

__all__ = ["lower", "lower_penalty"]


def lower(spec: NetworkSpec, batch_rows: int) -> Plan:
    """Write the op list of a network for steps of up to `batch_rows` rows.

    Parameters
    ----------
    spec : NetworkSpec
    batch_rows : int
        Capacity in rows; a run may use fewer.

    Returns
    -------
    Plan

    Raises
    ------
    ValueError
        The network has no decoder, or it has dropout on the latent or the output layer. Penalties read the code itself,
        and the loss applies the output activation. A variational network has penalties on codes, or its latent layer is
        not linear or not twice as wide as the decoder's input. The contractive penalty is not defined (see
        `check_contractive`). Convolutions do not fit together. A likelihood of counts has another link (see
        `check_counts`). The layers are no Boltzmann machine (see `check_boltzmann`). The decoder cannot be conditioned
        on batches. Sparse input meets something that needs dense rows.
    """
    _check(spec, batch_rows)
    return Writer(spec, batch_rows).plan()


class Writer:
    """Writes a network's plan, phase by phase. Later phases read what earlier ones keep in these attributes.

    Attributes
    ----------
    forward, score : Mode
        The modes that compute the output layer, and the modes that compute its loss.
    x, target, weight : str or None
        Slots of the rows of X, of the rows that the loss compares with, and of the row weights. The empty string stands
        for sparse rows, which have no slot.
    inputs, saved : list of str
        For each layer, the slot of its input, and the slot that its derivative is computed from: the output or the
        pre-activation.
    streams : list of int or None
        The random stream of each layer's dropout.
    codes, z, result, rowloss : str
        Slots of the codes, of the output layer, of the reconstruction, and of the loss of each row.
    deltas : dict of int to str
        Slots of the gradients by each layer's pre-activations.
    """

    def __init__(self, spec: NetworkSpec, batch_rows: int) -> None:
        self.spec, self.low = spec, OpList(batch_rows)
        self.last = len(spec.layers) - 1
        self.weights, self.parameter_size = parameters(self.low, spec)
        self.convolutions = Convolutions(self.low, spec, self.weights)
        # A likelihood of counts reads its target in place.
        self.counts = Counts(self.low, spec) if spec.loss.info.of_counts else None
        self.forward, self.score = FORWARD, Mode.SCORE
        if spec.variational:
            self.forward, self.score = FORWARD | Mode.POSTERIOR, Mode.SCORE | Mode.LIKELIHOOD
        self.modes = self.forward
        self.target_source = spec.target_source
        self.last_bias = f"b{self.last}"
        self.x = self.target = self.codes = self.z = self.result = self.rowloss = ""
        self.weight: str | None = None
        self.noise: str | None = None
        self.rates: str | None = None
        self.sparse = SparseInput()
        self.inputs: list[str] = []
        self.saved: list[str] = []
        self.streams: list[int | None] = []
        self.deltas: dict[int, str] = {}
        self.reductions: list[Reduction] = []

    def plan(self) -> Plan:
        """Write all phases; return the plan."""
        self._data()
        self._layers()
        self._loss()
        contraction = Contraction(self.low, self.spec, self.weights, self.saved, self.weight, self.convolutions)
        self._backward(contraction)
        self._parameters(contraction)
        spec, low = self.spec, self.low
        results = {
            Mode.ENCODE: self.codes,
            Mode.DECODE: self.result,
            Mode.RECONSTRUCT: self.result,
            Mode.SCORE: self.rowloss,
        }
        if spec.variational:
            results |= {Mode.POSTERIOR: f"a{spec.latent - 1}", Mode.LIKELIHOOD: self.rowloss}
        slots, work_size = low.assign(set(results.values()))
        index = {s.name: i for i, s in enumerate(slots)}
        outputs = {mode: index[name] for mode, name in results.items()}
        terms = tuple(low.terms)
        return Plan(spec, low.batch_rows, slots, tuple(low.ops), terms, self.parameter_size, work_size, outputs)

    def _data(self) -> None:
        """The rows of X, their targets, and their weights."""
        spec, low, forward, score = self.spec, self.low, self.forward, self.score
        source, noise = self.target_source, spec.training.corruption
        # Whether the loss cannot read its target from the slot of the input.
        own_target = noise is not None or self.counts is not None or spec.data.separate_target
        own_target = own_target or spec.form.sparse_input or spec.form.gram_decoder
        normalized: dict[str, str] = {}
        if spec.data.shifted:
            normalized["shift"] = low.slot("shift", Region.SCRATCH, 1, spec.n_features)
            low.op(OpCode.SHIFT, forward | score if source is Source.X else forward, {"out": "shift"})
            if spec.form.gram_decoder and source is Source.X:
                # |h V + b - (y - shift)|^2 = |h V + (b + shift) - y|^2: the rows as stored, with another bias.
                self.last_bias = low.slot("shifted.b", Region.SCRATCH, 1, spec.n_outputs)
                low.op(OpCode.SHIFT, score | LEARN, {"b": f"b{self.last}", "out": self.last_bias})
        if not spec.form.sparse_input:
            self.x = low.rows("x", spec.n_features)
            low.op(
                OpCode.GATHER, forward if own_target else forward | score, {"out": self.x} | normalized, source=Source.X
            )
        self.target = self.x
        if self.counts is not None:
            compared = score | LEARN
            read = forward if spec.log_normalize else Mode.RECONSTRUCT
            size_sum = self.counts.size_sum(read | compared if source is Source.X else read, Source.X)
            self.counts.size_sum(compared, source)
            if spec.log_normalize:
                normalized = {"size_sum": size_sum}
                if self.x:
                    low.op(OpCode.LOG_NORMALIZE, forward, {"x": self.x} | normalized, scale=spec.data.size_sum)
        elif own_target and not spec.form.gram_decoder:
            self.target = low.rows("target", spec.n_outputs)
            shift = normalized if source is Source.X else {}
            low.op(OpCode.GATHER, score | LEARN, {"out": self.target} | shift, source=source)
        if spec.data.weighted:
            self.weight = low.rows("weight", 1)
            low.op(OpCode.GATHER, LEARN, {"out": self.weight}, source=Source.WEIGHT)
        if noise is not None:
            low.corruption_stream = low.stream()
            if self.x:
                low.corrupt(self.x, noise, low.corruption_stream)
        level = noise.level if noise is not None else 0.0
        masking = {"stream": low.corruption_stream, "level": level, "scale": spec.data.size_sum}
        self.sparse = SparseInput(normalized, masking)

    def _layers(self) -> None:
        """The layers, the codes between encoder and decoder, and the draws from them."""
        spec, low, x = self.spec, self.low, self.x
        for i, layer in enumerate(spec.layers):
            self.inputs.append(x)
            if layer.convolution is not None:
                out, kept = self.convolutions.forward(i, self.modes, x)
            else:
                operands = {"W": self.weights[i], "b": f"b{i}", **({"x": x} if x else self.sparse.normalized)}
                # In Gram form, the loss does not need the output.
                gram = i == self.last and spec.form.gram_decoder
                out, kept = low.dense(
                    f"{i}",
                    self.modes & (Mode.DECODE | Mode.RECONSTRUCT) if gram else self.modes,
                    layer,
                    operands,
                    output=i == self.last,
                    transposed=layer.tied_to is not None,
                    masking=None if x else self.sparse.masking,
                )
            self.saved.append(kept)
            self.streams.append(low.stream() if layer.dropout > 0 else None)
            if (stream := self.streams[-1]) is not None:
                low.op(OpCode.DROPOUT, LEARN, {"x": out}, stream=stream, rate=layer.dropout)
            x = self._latent(out) if i == spec.latent - 1 else out
        self.z = x

    def _latent(self, out: str) -> str:
        """Write the codes; return the slot of the decoder's input."""
        spec, low = self.spec, self.low
        if spec.variational:
            stats, out = out, low.rows("z", spec.n_components)
            self.noise = low.rows("noise", spec.n_components)
            low.op(OpCode.SAMPLE, FORWARD, {"stats": stats, "z": out, "noise": self.noise}, stream=low.stream())
        self.codes = out
        from_codes = Mode.DECODE | (self.score & ~Mode.SCORE)
        self.modes = (FORWARD & ~Mode.ENCODE) | from_codes
        gibbs = spec.training.gibbs
        if gibbs is not None and not gibbs.n_chains:
            self.modes &= ~LEARN  # training reconstructs the row in its Gibbs chain
        low.op(OpCode.GATHER, from_codes, {"out": self.codes}, source=Source.LATENT)
        if spec.data.n_conditions:
            out = low.rows("conditioned", spec.n_components + spec.data.n_conditions)
            low.op(OpCode.CONDITION, self.modes, {"z": self.codes, "out": out})
        return out

    def _loss(self) -> None:
        """The reconstruction, and the loss. In training, the loss replaces z by the gradient by the pre-activations."""
        spec, low, z = self.spec, self.low, self.z
        self.result = z
        link = spec.layers[self.last].activation
        if self.counts is not None:
            self.result = self.counts.means(z)
        elif link is not Activation.LINEAR:
            low.op(OpCode.LINK, Mode.DECODE | Mode.RECONSTRUCT, {"z": z}, activation=link)
        self.rowloss = low.rows("rowloss", 1)
        operands = {"z": z, "target": self.target, "weight": self.weight, "rowloss": self.rowloss}
        self.score |= self.modes & LEARN
        if spec.loss.info.op is OpCode.GAUSSIAN:
            self.rates = low.rows("rates", spec.n_outputs)
            low.op(OpCode.GAUSSIAN, self.score, operands | {"logvar": "logvar", "rates": self.rates}, activation=link)
        elif self.counts is not None:
            self.counts.loss(self.score, {"z": z, "weight": self.weight, "rowloss": self.rowloss}, self.target_source)
        elif not spec.form.gram_decoder:
            low.op(OpCode.LOSS, self.score, operands, loss=spec.loss, activation=link, delta=spec.huber_delta)

    def _backward(self, contraction: Contraction) -> None:
        """From dz of the output layer down to the first layer.

        Every op reads only its own rows, so threads that share the rows need not wait for each other.
        """
        spec, low, layers = self.spec, self.low, self.spec.layers
        self.reductions = [(self.rowloss, self.weight, "loss", True)]
        self.deltas = deltas = {self.last: self.z}
        if spec.training.gibbs is not None:
            self.inputs, self.deltas = write_phases(
                low, spec, spec.training.gibbs, self.weights[0], self.inputs[0], self.codes, self.weight, self.rowloss
            )
            return
        for i in range(self.last, 0, -1):
            before = layers[i - 1]
            dx = deltas[i - 1] = low.rows(f"d{i - 1}", before.n_out)
            drawn = self.noise is not None and i == spec.latent
            saved, out = (self.codes, low.rows("dz", spec.n_components)) if drawn else (self.saved[i - 1], dx)
            if i == self.last and spec.form.gram_decoder:
                sides = {"h": self.inputs[i], "W": self.weights[i], "b": self.last_bias, "saved": saved}
                low.gram_loss(
                    self.score, {**sides, "weight": self.weight}, before, self.rowloss, out, source=self.target_source
                )
            elif layers[i].convolution is not None:
                self.convolutions.dgrad(i, deltas[i], saved, out, before.saved_scale, before.derivative_activation)
            else:
                low.dgrad(before, deltas[i], self.weights[i], saved, out, transposed=layers[i].tied_to is not None)
            if drawn:
                rowkl = low.rows("rowkl", 1)
                slots = {"stats": self.saved[i - 1], "noise": self.noise, "weight": self.weight}
                slots |= {"dz": "dz", "dstats": dx, "rowkl": rowkl}
                low.op(OpCode.LATENT_KL, LEARN, slots, strength=spec.kl_weight)
                self.reductions.append((rowkl, self.weight, "kl", True))
            if (stream := self.streams[i - 1]) is not None:
                low.op(OpCode.DROPOUT, LEARN, {"x": dx}, stream=stream, rate=before.dropout)
            if i == spec.latent:
                self.reductions += _latent_penalties(low, spec, f"a{i - 1}", self.saved[i - 1], self.weight, dx)
                contraction.penalize(dx)
                self.reductions += contraction.reductions
            deltas[i - 1] = self.convolutions.unpool(i - 1, dx)
            contraction.curve(i - 1, deltas[i - 1])

    def _parameters(self, contraction: Contraction) -> None:
        """The gradients of the parameters (sums over all rows), their updates, and the terms that the step reports."""
        spec, low = self.spec, self.low
        self.convolutions.wgrads(self.inputs, self.deltas)
        gradients = Gradients(
            low,
            spec,
            self.weights,
            self.inputs,
            self.deltas,
            contraction,
            self.convolutions,
            weight=self.weight,
            rates=self.rates,
            sparse=self.sparse,
            last_bias=self.last_bias,
        )
        gradients.write()
        if self.counts is not None:
            self.counts.gradient(gradients.gradient_modes, rule(spec.training.update), fused=gradients.fused)
        reduce(low, self.reductions + gradients.reductions)
        if spec.training.update.clip_norm is not None:
            gradients.clipped(self.parameter_size)


def _latent_penalties(
    low: OpList, spec: NetworkSpec, a: str, saved: str, weight: str | None, dz: str
) -> list[Reduction]:
    """Penalties on the latent layer; they add to its dz, which already holds the decoder's part."""
    activation, penalties = spec.layers[spec.latent - 1].derivative_activation, spec.training.penalties
    reductions: list[Reduction] = []
    if penalties.activity_l1 > 0:
        penalty = low.rows("rowpenalty", 1)
        low.op(
            OpCode.ACTIVITY_L1,
            LEARN,
            {"a": a, "saved": saved, "weight": weight, "dz": dz, "rowpenalty": penalty},
            activation=activation,
            strength=penalties.activity_l1,
        )
        reductions.append((penalty, weight, "activity_l1", True))
    if penalties.kl_sparsity > 0:
        mean = low.slot("mean_activity", Region.SCRATCH, 1, spec.n_components)
        penalty = low.slot("kl_penalty", Region.SCRATCH, 1, spec.n_components)
        low.op(OpCode.COLSUM, LEARN, {"x": a, "weight": weight, "out": mean}, mean=True, accumulate=False)
        low.op(
            OpCode.KL_SPARSITY,
            LEARN,
            {"saved": saved, "mean": mean, "weight": weight, "dz": dz, "penalty": penalty},
            activation=activation,
            strength=penalties.kl_sparsity,
            target=penalties.sparsity_target,
        )
        reductions.append((penalty, None, "kl_sparsity", False))
    return reductions


def lower_penalty(spec: NetworkSpec, batch_rows: int, *, grads: bool = True) -> Plan:
    """Write the op list of an encoder's contractive penalties, without a loss.

    Parameters
    ----------
    spec : NetworkSpec
        All its layers belong to the encoder.
    batch_rows : int
        Capacity in rows; a run may use fewer.
    grads : bool
        Whether the list computes the gradients of the parameters.

    Returns
    -------
    Plan

    Raises
    ------
    ValueError
        The penalty is not defined (see `check_contractive`).
    """
    check_contractive(spec)
    low = OpList(batch_rows)
    weights, parameter_size = parameters(low, spec)
    x = low.rows("x", spec.n_features)
    low.op(OpCode.GATHER, Mode.GRADIENT, {"out": x}, source=Source.X)
    inputs, saved = [], []
    for i, layer in enumerate(spec.layers):
        inputs.append(x)
        x, kept = low.dense(f"{i}", Mode.GRADIENT, layer, {"x": x, "W": weights[i], "b": f"b{i}"})
        saved.append(kept)
    deltas = {i: low.rows(f"d{i}", layer.n_out) for i, layer in enumerate(spec.layers)}
    last = len(spec.layers) - 1
    none = Convolutions(low, spec, weights)
    contraction = Contraction(low, spec, weights, saved, None, none)
    contraction.penalize(deltas[last], accumulate=False)
    if grads:
        for i in range(last, -1, -1):
            if i < last:
                low.dgrad(spec.layers[i], deltas[i + 1], weights[i + 1], saved[i], deltas[i])
            contraction.curve(i, deltas[i], accumulate=i < last)
        Gradients(low, spec, weights, inputs, deltas, contraction, none, update=False).write()
    reduce(low, contraction.reductions)
    slots, work_size = low.assign(set())
    return Plan(spec, batch_rows, slots, tuple(low.ops), tuple(low.terms), parameter_size, work_size)


def _check(spec: NetworkSpec, batch_rows: int) -> None:
    """Raise the errors that `lower` documents."""
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
    if spec.data.n_conditions:
        _check_batches(spec)
    if spec.training.gibbs is not None:
        check_boltzmann(spec, batch_rows)
    if spec.form.gram_decoder and not spec.takes_gram_decoder:
        raise ValueError(
            "gram_decoder needs squared error and a dense linear output layer with its own weight: no other loss or "
            "output activation, no tied weight, no convolution, no Gibbs sampling"
        )
    if spec.form.sparse_input and not spec.takes_sparse_input:
        raise ValueError(
            "sparse_input needs a dense first layer, and no noise except masking: convolutions, gaussian and "
            "salt-and-pepper corruption, contractive_hessian, contractive probes, Gibbs sampling, and corruption of "
            "shifted rows need dense rows"
        )
    if spec.data.shifted and spec.loss.info.of_counts:
        raise ValueError(f"loss {spec.loss.info.name} needs counts, and shifted rows are not counts")


def _check_variational(spec: NetworkSpec) -> None:
    latent, after = spec.layers[spec.latent - 1], spec.layers[spec.latent]
    if given := on_codes(spec.training.penalties):
        raise ValueError(f"{', '.join(given)} must be 0: a variational network has no penalty on codes")
    n_latents = after.n_in - spec.data.n_conditions
    if latent.n_out != 2 * n_latents or latent.activation is not Activation.LINEAR or latent.tied_to or after.tied_to:
        raise ValueError(
            f"a variational network's latent layer must be linear, untied and twice as wide as the decoder's input: "
            f"{latent.n_out} {latent.activation.name.lower()} outputs for {n_latents} latents"
        )


def _check_batches(spec: NetworkSpec) -> None:
    """The decoder's first layer needs inputs for the conditions; a tied layer or a convolution has no room for them."""
    first = spec.layers[spec.latent]
    if (
        spec.training.gibbs is not None
        or any(layer.tied_to is not None for layer in spec.layers)
        or first.convolution is not None
    ):
        raise ValueError(
            "a convolutional decoder, tied weights, or a Boltzmann machine cannot be conditioned on batches"
        )
    latents, conditions = spec.n_components, spec.data.n_conditions
    if conditions < 0 or first.n_in != latents + conditions:
        raise ValueError(
            f"the decoder's first layer has {first.n_in} inputs for {latents} latents and {conditions} batches"
        )
