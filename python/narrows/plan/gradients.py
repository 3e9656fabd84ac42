"""Lowering of the parameters: their slots, their gradients, and the updates.

Promises: training applies each gradient as soon as it is computed, unless the update needs the norm of all gradients.
L2 and L1 apply to weights, never to biases or variances. adamw applies its L2 as decoupled decay, not as a gradient.
Never: writes an op that runs before the gradients by the layers' pre-activations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from .contractive import Contraction, Reduction
from .convolution import Convolutions
from .oplist import OpList
from .ops import CELL_ROWS, GRAIN, LANES, OpCode, padded
from .plan import LEARN, Mode, Region
from .spec import NetworkSpec, Solver, Update

__all__ = ["Gradients", "SparseInput", "parameters", "reduce", "rule"]

_STATE = (("d", Region.GRADIENT), ("moment1.", Region.MOMENT1), ("moment2.", Region.MOMENT2))
"""Prefix and region of the slots that accompany each parameter."""


def parameters(low: OpList, spec: NetworkSpec) -> tuple[list[str], int]:
    """Make the slots of the parameters and their state; return the weight slot of each layer and the region's size."""
    weights = [f"W{i if layer.tied_to is None else layer.tied_to}" for i, layer in enumerate(spec.layers)]
    for name, (rows, cols) in spec.parameter_shapes.items():
        low.slot(name, Region.PARAMETER, rows, cols)
    parameter_size = 0
    for name in list(low.names):
        _, rows, cols = low.shapes[name]
        if name != "chain":
            for prefix, region in _STATE[: 1 + spec.training.update.n_moments]:
                low.slot(f"{prefix}{name}", region, rows, cols)
        parameter_size += rows * padded(cols)
    return weights, parameter_size


def reduce(low: OpList, reductions: Sequence[Reduction]) -> None:
    """Write the sums that the step reports."""
    terms = low.slot("terms", Region.SCRATCH, 1, max(1, len({r[2] for r in reductions})))
    for name, row_weight, term, mean in reductions:
        slots = {"x": name, "weight": row_weight, "terms": terms}
        low.op(OpCode.REDUCE, LEARN, slots, index=low.term(term), mean=mean)


def rule(update: Update) -> dict[str, float]:
    """The attributes of the update rule."""
    beta_1 = update.momentum if update.solver is Solver.SGD else update.beta_1
    return {"solver": update.solver, "beta_1": beta_1, "beta_2": update.beta_2, "epsilon": update.epsilon}


@dataclass(frozen=True)
class SparseInput:
    """How the first layer sees sparse rows of X.

    Attributes
    ----------
    normalized : mapping
        Slots that normalize them.
    masking : mapping
        Attributes of the masking noise, and the scale of counts.
    """

    normalized: Mapping[str, str] = field(default_factory=dict)
    masking: Mapping[str, float] = field(default_factory=dict)


@dataclass
class Gradients:
    """Writes the gradients of weights and biases.

    Attributes
    ----------
    inputs : sequence of str
        Slot of each layer's input; the empty string stands for sparse rows of X.
    deltas : mapping
        Slots of the gradients by the layers' pre-activations; they include the row weights.
    weight : str, optional
        Slot of the rows' weights.
    rates : str, optional
        Slot whose column sums are the gradient of the learned variances.
    last_bias : str
        Slot of the bias that the loss in Gram form uses.
    update : bool
        Whether the list ends with an update.
    reductions : list
        Sums of the weight penalties, for the step's report.
    """

    low: OpList
    spec: NetworkSpec
    weights: list[str]
    inputs: Sequence[str]
    deltas: Mapping[int, str]
    contraction: Contraction
    convolutions: Convolutions
    weight: str | None = None
    rates: str | None = None
    sparse: SparseInput = field(default_factory=SparseInput)
    last_bias: str = ""
    update: bool = True
    reductions: list[Reduction] = field(default_factory=list)

    def __post_init__(self) -> None:
        update, penalties = self.spec.training.update, self.spec.training.penalties
        self.fused = self.update and update.clip_norm is None
        self.gradient_modes = Mode.GRADIENT if self.fused else LEARN
        decoupled = update.solver is Solver.ADAMW
        self.decay = {"l2": 0.0 if decoupled else penalties.alpha, "l1": penalties.weight_l1}
        self.step = {**rule(update), **self.decay, "rate": penalties.alpha if decoupled else 0.0}
        self.begun = set(self.contraction.begun)

    def write(self) -> None:
        """Write all gradients and updates, from the last layer to the first."""
        last = len(self.weights) - 1
        for i in range(last, -1, -1):
            if self.spec.layers[i].convolution is not None:
                self._convolution(i)
            elif self.spec.form.gram_decoder and i == last:
                self._gram(i)
            else:
                self._product(i)
                self._summed(f"b{i}", self.deltas[i])
        if self.rates is not None:
            self._summed("logvar", self.rates)

    def clipped(self, parameter_size: int) -> None:
        """Write one update of all parameters, with the norm of the gradients clipped."""
        low, update = self.low, self.spec.training.update
        partial = low.slot("gradnorm", Region.SCRATCH, 1, -(-parameter_size // GRAIN))
        low.op(OpCode.SQNORM, LEARN, {"partial": partial})
        if self.step["rate"] > 0:
            for name in dict.fromkeys(self.weights):
                low.op(OpCode.SHRINK, Mode.TRAIN, {"W": name}, rate=self.step["rate"])
        low.op(OpCode.UPDATE, Mode.TRAIN, {"partial": partial}, **rule(update), clip=float(update.clip_norm or 0))

    def _convolution(self, i: int) -> None:
        self.convolutions.gradient(i, self.gradient_modes)
        penalty = self._decayed(self.weights[i])
        if self.fused:
            decays = {name: self.step[name] for name in ("l2", "l1", "rate")}
            self.convolutions.update(i, penalty, decays, rule(self.spec.training.update))

    def _gram(self, i: int) -> None:
        """The gradient of an output layer in Gram form."""
        low, spec, W = self.low, self.spec, self.weights[i]
        inner, source = spec.layers[i].n_in + 1, spec.target_source
        gram = low.slot("gram.rows", Region.SCRATCH, inner, inner)
        sides = {"h": self.inputs[i], "weight": self.weight}
        low.op(OpCode.ROW_GRAM, LEARN, {**sides, "out": gram})
        sides |= {"W": W, "gram": gram}
        results = {"b": self.last_bias, "dW": f"d{W}", "db": f"db{i}"}
        low.op(OpCode.SPARSE_MSE_WGRAD, self.gradient_modes, {**sides, **results}, source=source)
        penalty = self._decayed(W)
        if self.fused:
            moments = {f"b_{role}": name for role, name in self._state(f"b{i}").items()} | self._state(W)
            moments |= {"b": f"b{i}"} | ({"shift": "shift"} if self.last_bias != f"b{i}" else {})
            slots = {**sides, **moments, "penalty": penalty}
            low.op(OpCode.SPARSE_MSE_UPDATE, Mode.TRAIN, slots, source=source, **self.step)

    def _product(self, i: int) -> None:
        """The gradient of a dense layer's weight."""
        low, W = self.low, self.weights[i]
        tied = self.spec.layers[i].tied_to is not None
        source, sink = (self.deltas[i], self.inputs[i]) if tied else (self.inputs[i], self.deltas[i])
        again = W in self.begun
        # A tied weight has two products. Decay and update follow the second.
        final = self.weights.index(W) == i
        self.begun.add(W)
        # Only the first layer reads sparse rows, and no other layer uses its weight transposed.
        products = OpCode.WGRAD, OpCode.WGRAD_UPDATE
        slots: dict[str, str] = {"x": source, "dz": sink}
        noise: dict[str, float] = {}
        if not source:
            products = OpCode.SPARSE_WGRAD, OpCode.SPARSE_WGRAD_UPDATE
            slots, noise = {"dz": sink, **self.sparse.normalized}, dict(self.sparse.masking)
        low.op(
            products[0], self.gradient_modes if final else LEARN, {**slots, "dW": f"d{W}"}, accumulate=again, **noise
        )
        if not final:
            return
        colrate = self.contraction.colrates.get(W)
        if colrate is not None:
            low.op(OpCode.COLUMN_DECAY, self.gradient_modes, {"W": W, "colrate": colrate, "dW": f"d{W}"})
        penalty = self._decayed(W)
        if self.fused:
            used = {"dW": f"d{W}" if again else None, "W": W, "colrate": colrate, "penalty": penalty}
            low.op(products[1], Mode.TRAIN, {**slots, **used, **self._state(W)}, **self.step, **noise)

    def _summed(self, name: str, rows: str) -> None:
        """The gradient of a parameter that sums over rows: a bias, or the variances."""
        again = name in self.begun
        self.low.op(OpCode.COLSUM, self.gradient_modes, {"x": rows, "out": f"d{name}"}, mean=False, accumulate=again)
        if self.fused:
            slots = {"x": rows, "db": f"d{name}" if again else None, "b": name, **self._state(name)}
            self.low.op(OpCode.COLSUM_UPDATE, Mode.TRAIN, slots, **rule(self.spec.training.update))

    def _state(self, name: str) -> dict[str, str]:
        return {f"moment{i + 1}": f"moment{i + 1}.{name}" for i in range(self.spec.training.update.n_moments)}

    def _decayed(self, W: str) -> str | None:
        """Write a weight's decay; return the slot of its penalty, or None without decay."""
        if not any(self.decay.values()):
            return None
        _, rows, cols = self.low.shapes[W]
        penalty = self.low.slot(f"penalty.{W}", Region.SCRATCH, -(-rows // CELL_ROWS), -(-cols // LANES))
        self.low.op(OpCode.DECAY, self.gradient_modes, {"W": W, "dW": f"d{W}", "penalty": penalty}, **self.decay)
        self.reductions.append((penalty, None, "weight_penalty", False))
        return penalty
