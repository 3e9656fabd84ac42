"""Plans that between them have every op, each small, and programs of the C++ backend that are ready to run them."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from narrows.backends.cpp import CppProgram
from narrows.plan.geometry import Convolution
from narrows.plan.lowering import lower
from narrows.plan.plan import Plan
from narrows.plan.spec import Activation, Corruption, LayerSpec, Loss, NetworkSpec, Precision, Solver
from networks import changed, make_spec


def small_spec(**changes: object) -> NetworkSpec:
    layers = (
        LayerSpec(37, 70, Activation.GELU, dropout=0.2),
        LayerSpec(70, 19, Activation.SIGMOID),
        LayerSpec(19, 70, Activation.TANH, dropout=0.1),
        LayerSpec(70, 37, Activation.LINEAR),
    )
    return make_spec(layers, 2, **changes)


def rich_plan(batch: int = 29) -> Plan:
    return lower(
        small_spec(
            activity_l1=0.1,
            kl_sparsity=0.2,
            alpha=0.1,
            weight_l1=0.1,
            clip_norm=1.0,
            weighted=True,
            solver=Solver.ADAMW,
            corruption=Corruption.GAUSSIAN,
            corruption_level=0.3,
        ),
        batch,
    )


def variational_plan(batch: int = 29) -> Plan:
    layers = (
        LayerSpec(37, 70, Activation.GELU, dropout=0.2),
        LayerSpec(70, 38, Activation.LINEAR),
        LayerSpec(19, 37, Activation.TANH),
    )
    return lower(make_spec(layers, 2, loss=Loss.GAUSSIAN, variational=True, weighted=True), batch)


def contractive_plan(batch: int = 29) -> Plan:
    layers = (
        LayerSpec(37, 70, Activation.GELU),
        LayerSpec(70, 33, Activation.SIGMOID),
        LayerSpec(33, 19, Activation.TANH),
        LayerSpec(19, 37, Activation.LINEAR),
    )
    penalties = {"contractive": 0.3, "contractive_hessian": 0.2, "n_corruptions": 2}
    return lower(make_spec(layers, 3, weighted=True, **penalties), batch)


def probing_plan(batch: int = 29) -> Plan:
    spec = changed(contractive_plan(batch).spec, contractive_hessian=0.0, contractive_probes=2)
    return lower(spec, batch)


def closed_plan(batch: int = 29) -> Plan:
    layers = (LayerSpec(37, 70, Activation.SOFTPLUS), LayerSpec(70, 37, Activation.LINEAR))
    return lower(make_spec(layers, 1, contractive=0.3, contractive_hessian=0.2, weighted=True), batch)


def boltzmann_plan(batch: int = 29) -> Plan:
    layers = LayerSpec(37, 70, Activation.SIGMOID), LayerSpec(70, 37, Activation.LINEAR, tied_to=0)
    spec = make_spec(layers, 1, n_gibbs=2, n_chains=batch + 3, weighted=True, alpha=0.1, solver=Solver.SGD)
    return lower(spec, batch)


def convolution_plan(batch: int = 29) -> Plan:
    def conv(shape: tuple[int, int, int], filters: int, kernel: int, **options: Any) -> Convolution:
        return Convolution.of(shape, filters, (1, kernel), **options)

    layers = (
        conv((1, 37, 1), 17, 2, padding="valid", pool=(1, 3)),
        conv((1, 12, 17), 5, 3, strides=(1, 2)),
        19,
        10,
        conv((1, 1, 10), 3, 2, upsample=(1, 19)),
        conv((1, 19, 3), 1, 1, strides=(1, 2), padding="valid", transposed=True),
    )
    specs, width = [], 37
    for i, layer in enumerate(layers):
        n_out = layer if isinstance(layer, int) else layer.n_out
        activation = Activation.GELU if i < len(layers) - 1 else Activation.LINEAR
        specs.append(LayerSpec(width, n_out, activation, convolution=None if isinstance(layer, int) else layer))
        width = n_out
    return lower(make_spec(tuple(specs), 3, weighted=True, alpha=0.1), batch)


def probing_convolution_plan(batch: int = 29) -> Plan:
    return lower(changed(convolution_plan().spec, contractive=0.3, contractive_probes=2), batch)


def sparse_plan(batch: int = 20) -> Plan:
    noise = {"corruption": Corruption.MASKING, "corruption_level": 0.2}
    return lower(small_spec(sparse_input=True, weighted=True, alpha=0.1, weight_l1=0.01, **noise), batch)


def gram_plan(batch: int = 20) -> Plan:
    spec = small_spec(sparse_input=True, weighted=True, alpha=0.1, loss=Loss.MSE, gram_decoder=True)
    layers = (*spec.layers[:-1], dataclasses.replace(spec.layers[-1], activation=Activation.LINEAR, tied_to=None))
    return lower(dataclasses.replace(spec, layers=layers), batch)


def shifted_plan(batch: int = 20) -> Plan:
    return lower(changed(gram_plan().spec, shifted=True), batch)


def counts_plan(batch: int = 29) -> Plan:
    layers = (
        LayerSpec(37, 19, Activation.TANH),
        LayerSpec(19, 5, Activation.LINEAR),
        LayerSpec(5, 19, Activation.TANH),
        LayerSpec(19, 37, Activation.SOFTMAX),
    )
    options = {"loss": Loss.NB, "log_normalize": True, "size_sum": 40.0}
    return lower(make_spec(layers, 2, weighted=True, sparse_input=True, **options), batch)


def inflated_plan(batch: int = 29) -> Plan:
    layers = LayerSpec(37, 19, Activation.TANH), LayerSpec(19, 3 * 37, Activation.EXP)
    options = {"loss": Loss.ZINB, "cell_dispersion": True, "log_normalize": True, "size_sum": 40.0}
    return lower(make_spec(layers, 1, weighted=True, **options), batch)


def batches_plan(batch: int = 29) -> Plan:
    layers = (
        LayerSpec(37, 19, Activation.TANH),
        LayerSpec(19, 10, Activation.LINEAR),
        LayerSpec(5 + 3, 19, Activation.TANH),
        LayerSpec(19, 37, Activation.SOFTMAX),
    )
    options = {"loss": Loss.NB, "log_normalize": True, "size_sum": 40.0, "variational": True, "n_conditions": 3}
    return lower(make_spec(layers, 2, weighted=True, **options), batch)


def gram_batches_plan(batch: int = 29) -> Plan:
    layers = LayerSpec(37, 5, Activation.TANH), LayerSpec(5 + 17, 37, Activation.LINEAR)
    options = {"weighted": True, "sparse_input": True, "gram_decoder": True, "n_conditions": 17}
    return lower(make_spec(layers, 1, **options), batch)


PLANS = (
    rich_plan, variational_plan, contractive_plan, probing_plan, closed_plan, boltzmann_plan, convolution_plan,
    probing_convolution_plan,
    sparse_plan, gram_plan, shifted_plan, counts_plan, inflated_plan, batches_plan, gram_batches_plan,
)  # fmt: skip
every_plan = pytest.mark.parametrize("make", PLANS, ids=lambda make: make.__name__)


def started(plan: Plan, dtype: Any = np.float32, n_rows: int = 60, **options: int) -> CppProgram:
    """A program with parameters and data."""
    rng = np.random.default_rng(0)
    precision = Precision.of(dtype)
    program = CppProgram(plan, precision, **{"n_threads": 2, **options})
    program.load({s.name: rng.normal(size=(s.rows, s.cols)) * 0.3 for s in plan.parameters})
    data = rng.random((n_rows, plan.spec.n_features)).astype(precision.dtype)
    if plan.spec.loss.info.of_counts:
        data = np.floor(2 * data / (1.1 - data))
    program.bind(data, weight=np.ones(n_rows, precision.dtype), condition=numbers_of(plan, n_rows))
    return program


def numbers_of(plan: Plan, n_rows: int) -> np.ndarray | None:
    """Of batches."""
    return np.arange(n_rows, dtype=np.float32) % plan.spec.data.n_conditions if plan.spec.data.n_conditions else None
