"""Small networks, and cases: a network with its data.

Promises: a case is data, the same on every machine; `lower` takes whatever `specs` draws.
Never: imports a backend or asserts anything.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from narrows.plan.geometry import Convolution
from narrows.plan.lowering import lower
from narrows.plan.ops import DISPERSION_PACE
from narrows.plan.plan import Plan
from narrows.plan.spec import (
    Activation,
    Corruption,
    Form,
    Gibbs,
    LayerSpec,
    Loss,
    NetworkSpec,
    Noise,
    Penalties,
    Solver,
    Update,
)
from narrows.plan.spec import (
    Data as DataSpec,
)
from narrows.rows.shifted import Shifted

Array = NDArray[Any]


class Data(NamedTuple):
    X: Any
    """An array, or `Shifted` rows of one."""
    target: Array | None
    weight: Array | None
    condition: Array | None


@dataclass(frozen=True)
class Case:
    """A network and the shape of its data.

    Attributes
    ----------
    name : str
        Unique; seeds the data.
    spec : NetworkSpec
    batch : int
        Capacity of the plan.
    rows : int
        Rows of the data; not a multiple of `batch` where a short last batch is wanted.
    density : float
        Of a sparse input or target: the part of its elements that are not zero, but for an empty row and column.
    """

    name: str
    spec: NetworkSpec
    batch: int = 8
    rows: int = 21
    draw: int = 0
    density: float = 0.3

    def __str__(self) -> str:
        return self.name

    @cached_property
    def plan(self) -> Plan:
        return lower(self.spec, self.batch)

    def another(self) -> Case:
        """The same network with other numbers."""
        return replace(self, draw=self.draw + 1)

    def _rng(self, purpose: int) -> np.random.Generator:
        return np.random.default_rng([zlib.crc32(self.name.encode()), self.draw, purpose])

    def data(self, dtype: Any = np.float64) -> Data:
        """Values are float32 numbers in every dtype, so that every backend sees the same data."""
        rng, spec = self._rng(0), self.spec
        X: Any = self._values(rng, spec.n_features)
        target = self._values(rng, spec.n_outputs) if spec.data.separate_target else None
        for source, rows in enumerate((X, target)):
            if source in spec.sparse_sources:
                rows *= self._rng(2).random(rows.shape) < self.density
                rows[self.rows // 2], rows[:, rows.shape[1] // 2] = 0, 0
        weight = rng.uniform(0.5, 2.0, self.rows).astype(np.float32) if spec.data.weighted else None
        # The last batch has no row where there are few.
        n = spec.data.n_conditions
        batch = self._rng(3).integers(0, n, (self.rows, 1)).astype(np.float32) if n else None
        X, *others = [None if a is None else a.astype(dtype) for a in (X, target, weight, batch)]
        if spec.data.shifted:
            shift = self._rng(4).uniform(-0.4, 0.4, spec.n_features).astype(np.float32)
            X = Shifted(X, shift.astype(dtype))
        return Data(X, *others)

    def _values(self, rng: np.random.Generator, columns: int) -> Array:
        shape = (self.rows, columns)
        if self.spec.loss is Loss.BCE:
            return rng.uniform(0.02, 0.98, shape).astype(np.float32)
        if self.spec.loss is Loss.MULTINOMIAL:
            return rng.poisson(2.0, shape).astype(np.float32)
        if self.spec.loss.info.of_counts:
            # Zeros, ones, many, and a row without any
            counts = rng.poisson(rng.gamma(0.5, 3.0, shape) * rng.gamma(0.5, 2.0, columns))
            counts[self.rows // 3] = 0
            return counts.astype(np.float32)
        return rng.normal(size=shape).astype(np.float32)

    def state(self, dtype: Any = np.float64) -> dict[str, Array]:
        """Parameters of moderate size and none near zero (|W| has a kink there), float32 numbers."""
        rng = self._rng(1)
        state = {}
        for slot in self.plan.parameters:
            scale = 1.0 / np.sqrt(slot.rows) if slot.name[0] == "W" else 0.3
            if slot.name == "log_dispersion":
                scale /= DISPERSION_PACE
            values = rng.uniform(0.1, 1.5, (slot.rows, slot.cols)) * rng.choice([-1, 1], (slot.rows, slot.cols))
            state[slot.name] = (scale * values).astype(np.float32).astype(dtype)
        return state


ELEMENTWISE = tuple(a for a in Activation if a is not Activation.SOFTMAX)


def allowed(loss: Loss, link: Activation) -> bool:
    """Whether the loss takes this output link."""
    return link in loss.info.links


def make_spec(layers: Sequence[LayerSpec], latent: int, **options: Any) -> NetworkSpec:
    """A specification from the fields of all its groups, without the groups (see `changed`)."""
    return changed(NetworkSpec(tuple(layers), latent), **options)


def changed(spec: NetworkSpec, **options: Any) -> NetworkSpec:
    """The specification with other values: the fields of any group, or `corruption`, `corruption_level`,
    `corruption_range`, and `n_gibbs`, `n_chains`, `sample_visible`.
    """
    training = spec.training
    kind, level = options.pop("corruption", None), options.pop("corruption_level", 0.0)
    bounds = options.pop("corruption_range", (0.0, 1.0))
    if kind is not None:
        training = replace(training, corruption=Noise(kind, level, *bounds))
    if "n_gibbs" in options:
        training = replace(training, gibbs=Gibbs(options.pop("n_gibbs")))
    if training.gibbs is not None:
        training = replace(training, gibbs=replace(training.gibbs, **_taken(Gibbs, options)))
    training = replace(
        training,
        penalties=replace(training.penalties, **_taken(Penalties, options)),
        update=replace(training.update, **_taken(Update, options)),
    )
    data, form = replace(spec.data, **_taken(DataSpec, options)), replace(spec.form, **_taken(Form, options))
    return replace(spec, training=training, data=data, form=form, **options)


def _taken(group: type[Any], options: dict[str, Any]) -> dict[str, Any]:
    """Remove and return the options that are fields of a group."""
    return {field.name: options.pop(field.name) for field in fields(group) if field.name in options}


def network(
    sizes: Sequence[int],
    hidden: Activation = Activation.TANH,
    latent: Activation = Activation.LINEAR,
    output: Activation = Activation.LINEAR,
    *,
    tied: bool = False,
    dropout: float = 0.0,
    variational: bool = False,
    **options: Any,
) -> NetworkSpec:
    """A symmetric network: the middle of `sizes` is the code; dropout is for the hidden layers alone.

    The decoder's first layer takes the `n_batches`, too.
    """
    n = len(sizes) - 1
    middle = n // 2
    heads = options.get("loss", Loss.MSE).info.heads + options.get("cell_dispersion", False)
    layers = []
    for i in range(n):
        activation = output if i == n - 1 else latent if i == middle - 1 else hidden
        layers.append(
            LayerSpec(
                sizes[i] + (options.get("n_conditions", 0) if i == middle else 0),
                sizes[i + 1] * (heads if i == n - 1 else 2 if variational and i == middle - 1 else 1),
                activation,
                dropout=dropout if i not in (middle - 1, n - 1) else 0.0,
                tied_to=n - 1 - i if tied and i >= middle else None,
            )
        )
    # Adam's usual epsilon makes a whole step of a rounding error in a small gradient; this one does not.
    return make_spec(layers, middle, variational=variational, **{"epsilon": 1e-3, **options})


def images(
    shape: tuple[int, int, int],
    *layers: dict[str, Any] | int,
    latent: int,
    hidden: Activation = Activation.TANH,
    code: Activation = Activation.LINEAR,
    output: Activation = Activation.LINEAR,
    dropout: float = 0.0,
    **options: Any,
) -> NetworkSpec:
    """A network of convolutions (arguments of `Convolution.of`) and dense layers (widths) on images."""
    at: Any = shape
    specs = []
    for i, layer in enumerate(layers):
        n_in = at if isinstance(at, int) else int(np.prod(at))
        activation = output if i == len(layers) - 1 else code if i == latent - 1 else hidden
        rate = dropout if i not in (latent - 1, len(layers) - 1) else 0.0
        if isinstance(layer, int):
            drawn = options.get("variational", False) and i == latent - 1
            specs.append(LayerSpec(n_in, 2 * layer if drawn else layer, activation, rate))
            at = layer
            continue
        given = dict(layer)
        conv = Convolution.of(given.pop("shape", at), **given)
        specs.append(LayerSpec(n_in, conv.n_out, activation, rate, convolution=conv))
        at = conv.out_shape
    return make_spec(specs, latent, **{"epsilon": 1e-3, **options})


def conv(filters: int, kernel: int | tuple[int, int] = 3, **options: Any) -> dict[str, Any]:
    """Arguments of `Convolution.of`; a number stands for height and width."""
    given = {"kernel": kernel, **options}
    for name in ("kernel", "strides", "upsample", "pool"):
        if isinstance(given.get(name), int):
            given[name] = (given[name], given[name])
    return {"filters": filters, **given}


def boltzmann(n_visible: int, n_hidden: int, visible: str = "b", hidden: str = "b", **options: Any) -> NetworkSpec:
    """A restricted Boltzmann machine of binary (b) or Gaussian (g) units."""
    units = {"b": Activation.SIGMOID, "g": Activation.LINEAR}
    layers = LayerSpec(n_visible, n_hidden, units[hidden]), LayerSpec(n_hidden, n_visible, units[visible], tied_to=0)
    loss = Loss.BCE if visible == "b" else Loss.MSE
    return make_spec(layers, 1, **{"loss": loss, "n_gibbs": 1, "solver": Solver.SGD, "epsilon": 1e-3, **options})


@st.composite
def specs(draw: st.DrawFn) -> NetworkSpec:
    """Any network that `lower` takes."""
    depth = draw(st.integers(1, 3))
    width = st.integers(1, 40)
    sizes = [draw(width) for _ in range(depth + 1)]
    tied = draw(st.booleans())
    mirrored = sizes[-2::-1] if tied else [draw(width) for _ in range(depth)]
    separate = draw(st.booleans())
    if not separate:
        mirrored[-1] = sizes[0]
    tied = tied and mirrored == sizes[-2::-1]
    loss = draw(st.sampled_from(Loss))
    output = draw(st.sampled_from([a for a in Activation if allowed(loss, a)]))
    variational = draw(st.booleans())
    cell_dispersion = draw(st.booleans()) and loss.info.dispersion
    tied = tied and not variational and not cell_dispersion and loss.info.heads == 1
    kl = draw(st.booleans()) and not variational
    elementwise = st.sampled_from(ELEMENTWISE)
    strength = st.sampled_from([0.0, 0.1])
    dropout = draw(st.sampled_from([0.0, 0.3]))
    contracts = (dropout == 0 or depth == 1) and not variational
    corruption = draw(st.sampled_from([None, *Corruption]))
    hessian = draw(strength) if contracts else 0.0
    spec = network(
        sizes + mirrored,
        draw(elementwise),
        Activation.LINEAR if variational else Activation.SIGMOID if kl else draw(elementwise),
        output,
        tied=tied,
        dropout=dropout,
        loss=loss,
        cell_dispersion=cell_dispersion,
        log_normalize=draw(st.booleans()) and loss.info.of_counts,
        size_sum=draw(st.sampled_from([1.0, 30.0])),
        corruption=corruption,
        corruption_level=0.2,
        activity_l1=0.0 if variational else draw(strength),
        variational=variational,
        kl_sparsity=0.1 if kl else 0.0,
        contractive=draw(strength) if contracts else 0.0,
        contractive_probes=draw(st.integers(0, 2)),
        contractive_hessian=hessian,
        n_corruptions=draw(st.integers(1, 2)),
        alpha=draw(strength),
        weight_l1=draw(strength),
        n_conditions=0 if tied else draw(st.sampled_from([0, 0, 1, 3])),
        solver=draw(st.sampled_from(Solver)),
        clip_norm=draw(st.sampled_from([None, 1.0])),
        separate_target=separate,
        weighted=draw(st.booleans()),
        shifted=draw(st.booleans()) and not loss.info.of_counts,
    )
    return changed(
        spec,
        sparse_input=spec.takes_sparse_input and draw(st.booleans()),
        gram_decoder=spec.takes_gram_decoder and draw(st.booleans()),
    )
