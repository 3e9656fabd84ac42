"""A second opinion on the formulas: the forward pass and the objective written from scipy.special.

Shares no code with the backends, apart from the random numbers, which have tests of their own.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import special, stats

from formulas import ACTIVATION, SLOPE
from narrows.plan.geometry import Convolution
from narrows.plan.ops import DISPERSION_PACE
from narrows.plan.spec import Activation, Corruption, Loss, NetworkSpec, Solver
from narrows.random import philox
from narrows.rows.shifted import dense
from networks import Case

Array = NDArray[Any]
SEED, STEP = 2**63 + 12345, 3

KINKED = (Activation.RELU, Activation.LEAKY_RELU, Activation.ELU)


@dataclass
class Pass:
    """What a forward pass leaves."""

    pre: list[Array] = field(default_factory=list)
    out: list[Array] = field(default_factory=list)
    code: Array = field(default_factory=lambda: np.empty(0))
    decoded: Array = field(default_factory=lambda: np.empty(0))
    """What the code is decoded to, for all that is known of the row without it."""
    row_loss: Array = field(default_factory=lambda: np.empty(0))
    terms: dict[str, float] = field(default_factory=dict)


def row_loss(loss: Loss, z: Array, p: Array, y: Array, delta: float, logvar: Array | None) -> Array:
    if loss is Loss.GAUSSIAN:
        return -stats.norm.logpdf(y, p, np.sqrt(np.exp(logvar) + 1e-6)).sum(axis=1)
    if loss is Loss.MSE:
        return np.square(p - y).sum(axis=1)
    if loss is Loss.HUBER:
        return special.huber(delta, p - y).sum(axis=1)
    if loss is Loss.BCE:
        return -(special.xlogy(y, p) + special.xlog1py(1 - y, -p)).sum(axis=1)
    return -(y * special.log_softmax(z, axis=1)).sum(axis=1)


def log_probability(spec: NetworkSpec, z: Array, mean: Array, y: Array, state: Any) -> Array:
    """Of counts, the sum over features."""
    n = y.shape[1]
    if spec.loss is Loss.POISSON:
        return stats.poisson.logpmf(y, mean).sum(axis=1)
    theta = np.exp(z[:, n : 2 * n] if spec.cell_dispersion else DISPERSION_PACE * state["log_dispersion"])
    counted = stats.nbinom.logpmf(y, theta, theta / (theta + mean))
    if spec.loss is Loss.ZINB:
        dropped = special.expit(z[:, -n:])
        counted = np.log(np.where(y == 0, dropped, 0) + (1 - dropped) * np.exp(counted))
    return counted.sum(axis=1)


def forward(case: Case, rows: Array, *, training: bool, penalties: bool = True) -> Pass:
    """The pass over `rows` of the case's data; with corruption, dropout and penalties in training."""
    spec, data, state = case.spec, case.data(), case.state()
    a = dense(data.X[rows]).copy()
    y = a.copy() if data.target is None else data.target[rows]
    w = np.ones(len(rows)) if data.weight is None else data.weight[rows]
    stream = 0
    raw = a
    if spec.log_normalize:
        total = a.sum(axis=1, keepdims=True)
        a = np.log1p(np.divide(a * spec.data.size_sum, total, out=np.zeros_like(a), where=total > 0))
    if (noise := spec.training.corruption) is not None:
        if training:
            u = philox.uniform(SEED, stream, STEP, *a.shape)
            low, high = noise.low, noise.high
            if noise.kind is Corruption.GAUSSIAN:
                a += noise.level * special.ndtri(u)
            elif noise.kind is Corruption.MASKING:
                a = a * (u >= noise.level)
            else:
                level = noise.level
                a = np.where(u >= level, a, np.where(u < level / 2, low, high))
        stream += 1
    given = a
    result = Pass()
    for i, layer in enumerate(spec.layers):
        W = state[f"W{i}"] if layer.tied_to is None else state[f"W{layer.tied_to}"].T
        conv = layer.convolution
        z = a @ W + state[f"b{i}"] if conv is None else convolved(conv, a, W, state[f"b{i}"])
        counted = spec.loss.info.of_counts and i == len(spec.layers) - 1
        a = ACTIVATION[layer.activation.name](z[:, : spec.n_outputs] if counted else z)
        if conv is not None:
            a = pooled(conv, a)
        result.pre.append(z)
        if layer.dropout > 0:
            if training:
                u = philox.uniform(SEED, stream, STEP, *a.shape)
                if between_convolutions(spec, i):
                    height, width, channels = layer.convolution.out_shape
                    u = u.reshape(-1, channels, height, width).transpose(0, 2, 3, 1).reshape(a.shape)
                a = np.where(u < layer.dropout, 0, a / (1 - layer.dropout))
            stream += 1
        result.out.append(a)
        if i == spec.latent - 1 and spec.variational:
            mean, spread = np.split(a, 2, axis=1)
            kl = (np.square(mean) + np.exp(spread) - 1 - spread).sum(axis=1) / 2
            result.terms["kl"] = float(w @ kl) / len(rows)
            a = mean
            if training:
                a = mean + np.sqrt(np.exp(spread)) * special.ndtri(philox.uniform(SEED, stream, STEP, *mean.shape))
            stream += 1
        if i == spec.latent - 1:
            result.code = a
            if data.condition is not None:
                a = np.hstack([a, np.eye(spec.data.n_conditions)[data.condition[rows, 0].astype(int)]])
    result.decoded = a
    if spec.loss.info.of_counts:
        unit = 1.0 if layer.activation is Activation.SOFTMAX else spec.data.size_sum
        result.decoded = a * (spec.data.size_sum / unit)
        result.out[-1] = a * (raw.sum(axis=1, keepdims=True) / unit)
        result.row_loss = -log_probability(spec, z, a * (y.sum(axis=1, keepdims=True) / unit), y, state)
    else:
        result.row_loss = row_loss(spec.loss, z, a, y, spec.huber_delta, state.get("logvar"))
    result.terms["loss"] = float(w @ result.row_loss) / len(rows)
    if not penalties:
        return result
    strengths = spec.training.penalties
    if strengths.activity_l1 > 0:
        result.terms["activity_l1"] = strengths.activity_l1 * float(w @ np.abs(result.code).sum(axis=1)) / len(rows)
    if strengths.kl_sparsity > 0:
        mean, target = w @ result.code / len(rows), strengths.sparsity_target
        kl = special.rel_entr(target, mean) + special.rel_entr(1 - target, 1 - mean)
        result.terms["kl_sparsity"] = strengths.kl_sparsity * float(kl.sum())
    J = jacobian(case, result) if strengths.contractive > 0 or strengths.contractive_hessian > 0 else np.empty(0)
    if strengths.contractive_hessian > 0 and training:
        changes = []
        for _ in range(strengths.n_corruptions):
            noise = strengths.hessian_std * special.ndtri(philox.uniform(SEED, stream, STEP, *given.shape))
            changes.append(np.square(J - jacobian(case, encode(case, given + noise))).sum(axis=(1, 2)))
            stream += 1
        change = float(w @ np.mean(changes, axis=0)) / len(rows)
        result.terms["contractive_hessian"] = strengths.contractive_hessian * change
    if strengths.contractive > 0:
        square = np.square(J).sum(axis=(1, 2))
        closed = spec.latent == 1 and spec.layers[0].convolution is None
        if strengths.contractive_probes > 0 and not closed:
            estimates = []
            for _ in range(strengths.contractive_probes):
                v = np.where(philox.uniform(SEED, stream, STEP, *result.code.shape) < 0.5, -1.0, 1.0)
                estimates.append(np.square(np.einsum("nk,nki->ni", v, J)).sum(axis=1))
                stream += 1
            square = np.mean(estimates, axis=0)
        result.terms["contractive"] = strengths.contractive * float(w @ square) / len(rows)
    l2 = 0.0 if spec.training.update.solver is Solver.ADAMW else strengths.alpha
    if l2 > 0 or strengths.weight_l1 > 0:
        weights = [v for name, v in state.items() if name[0] == "W"]
        total = sum(l2 / 2 * np.square(W).sum() + strengths.weight_l1 * np.abs(W).sum() for W in weights)
        result.terms["weight_penalty"] = float(total) / len(rows)
    return result


def between_convolutions(spec: NetworkSpec, i: int) -> bool:
    """Whether rows behind layer i hold one channel after the other, by which noise is then numbered."""
    both = all(layer.convolution is not None for layer in spec.layers[i : i + 2])
    return both and i not in (spec.latent - 1, len(spec.layers) - 1)


def convolved(conv: Convolution, rows: Array, W: Array, b: Array) -> Array:
    """Pixel by pixel; rows of flattened images in and out, channels last."""
    h, w, c = conv.shape
    x = rows.reshape(-1, h, w, c)
    K = W.reshape(*conv.kernel, c, conv.filters)
    out = np.zeros((len(x), *conv.size, conv.filters))
    if not conv.transposed:
        x = np.kron(x, np.ones((1, *conv.upsample, 1)))
    coarse, fine = (x, out) if conv.transposed else (out, x)
    for y, v, i, j in np.ndindex(*coarse.shape[1:3], *conv.kernel):
        Y, V = (s * n + k - p for s, n, k, p in zip(conv.strides, (y, v), (i, j), conv.padding, strict=True))
        if 0 <= Y < fine.shape[1] and 0 <= V < fine.shape[2]:
            if conv.transposed:
                out[:, Y, V] += x[:, y, v] @ K[i, j]
            else:
                out[:, y, v] += x[:, Y, V] @ K[i, j]
    return (out + b).reshape(len(x), -1)


def pooled(conv: Convolution, rows: Array) -> Array:
    """The greatest of each window."""
    return np.take_along_axis(rows, greatest(conv, rows), axis=1)


def greatest(conv: Convolution, rows: Array) -> Array:
    """Where in a row the greatest of each window lies, the first one if there are several."""
    a = rows.reshape(-1, *conv.image)
    number = np.arange(rows.shape[1]).reshape(conv.image)
    (py, px), out = conv.pool, np.empty((len(a), *conv.out_shape), int)
    for y, v in np.ndindex(*conv.out_shape[:2]):
        window = slice(y * py, (y + 1) * py), slice(v * px, (v + 1) * px)
        first = a[:, *window].reshape(len(a), py * px, -1).argmax(axis=1)
        out[:, y, v] = np.take_along_axis(number[window].reshape(py * px, -1), first, axis=0)
    return out.reshape(len(a), -1)


def window_gap(conv: Convolution, rows: Array) -> float:
    """The least distance between the two greatest of a window."""
    a = rows.reshape(-1, *conv.image)
    (py, px), (h, w, _) = conv.pool, conv.out_shape
    split = a.reshape(len(a), h, py, w, px, -1).transpose(0, 1, 3, 5, 2, 4).reshape(-1, py * px)
    first, second = np.sort(split, axis=1)[:, -1], np.sort(split, axis=1)[:, -2]
    return float((first - second)[first > 0].min(initial=np.inf))


def encode(case: Case, a: Array) -> Pass:
    """The encoder alone."""
    result = Pass()
    for i, layer in enumerate(case.spec.layers[: case.spec.latent]):
        result.pre.append(a @ case.state()[f"W{i}"] + case.state()[f"b{i}"])
        a = ACTIVATION[layer.activation.name](result.pre[-1])
    return result


def jacobian(case: Case, run: Pass) -> Array:
    """d code / d input of each row of a pass, shape (rows, components, features), written out."""
    J = np.eye(case.spec.n_features)
    for i, layer in enumerate(case.spec.layers[: case.spec.latent]):
        W, conv = case.state()[f"W{i}"], layer.convolution
        if conv is not None:
            W = convolved(conv, np.eye(layer.n_in), W, np.zeros(conv.filters))
        J = SLOPE[layer.activation.name](run.pre[i])[:, :, None] * (W.T @ J)
        if conv is not None:
            chosen = greatest(conv, ACTIVATION[layer.activation.name](run.pre[i]))
            J = np.take_along_axis(J, chosen[:, :, None], axis=1)
    return J


def kink_distance(case: Case) -> float:
    """How far the first batch keeps from where a derivative jumps."""
    rows = np.arange(min(case.batch, case.rows))
    run, spec = forward(case, rows, training=True, penalties=False), case.spec
    distances = [np.abs(z).min() for z, layer in zip(run.pre, spec.layers, strict=True) if layer.activation in KINKED]
    for z, layer in zip(run.pre, spec.layers, strict=True):
        if layer.convolution is not None and layer.convolution.pooled:
            distances.append(window_gap(layer.convolution, ACTIVATION[layer.activation.name](z)))
    if spec.training.penalties.activity_l1 > 0 and spec.layers[spec.latent - 1].activation not in KINKED:
        distances.append(np.abs(run.pre[spec.latent - 1]).min())
    if spec.loss is Loss.HUBER:
        y = dense(case.data().X[rows])
        distances.append(np.abs(np.abs(run.out[-1] - y) - spec.huber_delta).min())
    return float(min(distances, default=np.inf))


@cache
def away_from_kinks(case: Case, distance: float = 1e-4) -> Case:
    """The case with numbers that keep its first batch clear of kinks; large ones want activations without any."""
    for _ in range(200):
        if kink_distance(case) >= distance:
            return case
        case = case.another()
    raise AssertionError(f"{case}: no numbers found that keep it clear of kinks")
