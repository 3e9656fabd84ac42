"""The contractive penalty, for libraries that bring their own model."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..backends import Program, compile_plan, gpu_layers, host_backend, resolve
from ..machine import thread_count
from ..plan.spec import LayerSpec, NetworkSpec, Penalties, Training
from ..random.weights import draw_seed
from ..rows.devices import device_of
from .operands import FLOAT32, FLOAT64, cast, elementwise, in_namespace, operand

__all__ = ["Penalty", "contractive_penalty"]

PENALTY_ROWS = 512
"""Rows of one run of the program."""
SPARE_PROGRAMS = 2
"""Programs that are kept for the next call of the same shape."""
_spare: dict[Any, Program] = {}
_spare_lock = threading.Lock()


class Penalty(NamedTuple):
    """A penalty and its gradients by each layer's weight and bias; None if they were not asked for.

    Examples
    --------
    >>> import numpy as np
    >>> from narrows.functional import contractive_penalty
    >>> penalty = contractive_penalty(np.ones((3, 2)), [np.eye(2)], [np.zeros(2)], ["linear"])
    >>> penalty.dW[0].tolist()
    [[2.0, 0.0], [0.0, 2.0]]
    """

    value: float
    dW: Any
    db: Any


def contractive_penalty(
    X: Any,
    weights: Sequence[Any],
    biases: Sequence[Any],
    activations: str | Sequence[str],
    *,
    method: str = "exact",
    n_probes: int = 1,
    random_state: Any = None,
    grads: bool = True,
    n_threads: int | None = None,
) -> Penalty:
    """The contractive penalty of an encoder: the mean over rows of ``|J|**2`` (Rifai et al., ICML 2011).

    J holds the derivatives of the last layer's outputs by the input, and ``|J|`` is its Frobenius norm.

    Parameters
    ----------
    X : array-like or CSR, shape (n, n_in)
        float32 or float64, any strides; at least one row.
    weights : sequence of array-like, shape (n_in, n_out) each
        The encoder's weights, from the input on.
    biases : sequence of array-like, shape (n_out,) each, or None
    activations : str or sequence of str
        One for all layers or one for each. They are elementwise, see :data:`narrows.plan.spec.ACTIVATIONS`.
    method : {"exact", "hutchinson"}
        ``"exact"`` takes up to four layers. ``"hutchinson"`` is the unbiased estimate ``mean over v of |J'v|**2`` with
        random signs v. One layer always uses a closed form.
    n_probes : int
        Vectors v for each row.
    random_state : int, RandomState, Generator or None
        Seed of the probes.
    grads : bool
        Whether to compute the gradients.
    n_threads : int, optional
        Threads on the CPU.

    Returns
    -------
    Penalty
        ``(value, dW, db)``, with lists of gradients as arrays of X's library. They are float64 if X or a weight is,
        else float32.

    Raises
    ------
    ValueError
        Shapes do not fit. The activation or the method is unknown. The exact penalty does not take so many layers.
        Operands are on two GPUs.
    TypeError
        Some operands are on a GPU and some on the CPU.

    Examples
    --------
    >>> import numpy as np
    >>> from narrows.functional import contractive_penalty
    >>> X = np.random.default_rng(0).normal(size=(5, 3))
    >>> float(contractive_penalty(X, [2 * np.eye(3)], [np.zeros(3)], ["linear"]).value)
    12.0
    """
    if method not in ("exact", "hutchinson"):
        raise ValueError(f"method={method!r} must be 'exact' or 'hutchinson'")
    if n_probes < 1:
        raise ValueError(f"n_probes={n_probes!r} must be at least 1")
    names = [activations] * len(weights) if isinstance(activations, str) else list(activations)
    if not len(weights) == len(biases) == len(names) >= 1:
        raise ValueError(
            f"{len(weights)} weights, {len(biases)} biases and {len(names)} activations: one for each layer"
        )
    gpu = device_of(
        X=X,
        **{f"weights[{i}]": w for i, w in enumerate(weights)},
        **{f"biases[{i}]": b for i, b in enumerate(biases)},
    )
    with gpu or contextlib.nullcontext():
        return _penalty(X, weights, biases, names, method, n_probes, random_state, grads, n_threads, gpu is not None)


def _penalty(
    X: Any,
    weights: Sequence[Any],
    biases: Sequence[Any],
    names: Sequence[str],
    method: str,
    n_probes: int,
    random_state: Any,
    grads: bool,
    n_threads: int | None,
    on_gpu: bool,
) -> Penalty:
    x = operand(X, "X", 2, on_gpu)
    if x.shape[0] < 1:
        raise ValueError("X must have at least one row")
    W = [operand(w, f"weights[{i}]", 2, on_gpu) for i, w in enumerate(weights)]
    dtype = FLOAT64 if any(a.dtype.char == "d" for a in (x, *W)) else FLOAT32
    state: dict[str, NDArray[Any]] = {}
    widths = [x.shape[1], *(w.shape[1] for w in W)]
    for i, w in enumerate(W):
        if w.shape[0] != widths[i]:
            before = "X" if i == 0 else f"weights[{i - 1}]"
            raise ValueError(f"weights[{i}] has {w.shape[0]} rows but {before} has {widths[i]} columns")
    for i, (w, b) in enumerate(zip(W, biases, strict=True)):
        bias = np.zeros(widths[i + 1]) if b is None else operand(b, f"biases[{i}]", 1, on_gpu)
        if len(bias) != widths[i + 1]:
            raise ValueError(f"biases[{i}] has {len(bias)} elements but weights[{i}] has {widths[i + 1]} columns")
        state |= {f"W{i}": w, f"b{i}": bias}
    layers = tuple(LayerSpec(*n, elementwise(a)) for n, a in zip(itertools.pairwise(widths), names, strict=True))
    probes = n_probes if method == "hutchinson" else 0
    seed = draw_seed(random_state) if probes else 0
    penalties = Penalties(contractive=1.0, contractive_probes=probes)
    spec = NetworkSpec(layers, len(layers), training=Training(penalties=penalties))
    n = x.shape[0]
    # Parts of nearly equal size.
    parts = -(-n // PENALTY_ROWS)
    value = 0.0
    total: dict[str, NDArray[Any]] = {}
    with _penalty_program(spec, -(-n // parts), grads, dtype, thread_count(n_threads), on_gpu) as program:
        program.load(state)
        program.bind(cast(x, dtype))
        for part in range(parts):
            rows = np.arange(n * part // parts, n * (part + 1) // parts)
            # The gradients stay on the device of the arrays.
            terms, gradient = program.gradient(rows, seed, part, **({"there": True} if on_gpu else {}))
            value += float(terms[0]) * (len(rows) / n)
            for name, g in gradient.items() if grads else ():
                if parts > 1:
                    g *= dtype.type(len(rows) / n)
                total[name] = g if part == 0 else total[name] + g
    if not grads:
        return Penalty(value, None, None)
    dW = [in_namespace(X, total[f"W{i}"].astype(dtype, copy=False)) for i in range(len(layers))]
    db = [in_namespace(X, total[f"b{i}"].reshape(-1).astype(dtype, copy=False)) for i in range(len(layers))]
    return Penalty(value, dW, db)


@contextlib.contextmanager
def _penalty_program(
    spec: NetworkSpec, batch: int, grads: bool, dtype: np.dtype[Any], n_threads: int, on_gpu: bool
) -> Iterator[Any]:
    """A program for `contractive_penalty`: a spare one of an earlier call, or a new one.

    Compiling takes longer than running, mostly because new memory is touched for the first time.
    """
    from ..plan.lowering import lower_penalty

    backend = resolve("cuda") if on_gpu else host_backend()
    # CuPy's current GPU.
    place = gpu_layers().current() if on_gpu else None
    key = (spec, batch, grads, dtype, n_threads, backend, place)
    with _spare_lock:
        program = _spare.pop(key, None)
    if program is None:
        plan = lower_penalty(spec, batch, grads=grads)
        program = compile_plan(plan, backend, precision=dtype, n_threads=n_threads)
    yield program
    # The spare program must not keep the caller's data.
    program.bind(np.zeros((1, spec.n_features), dtype))
    with _spare_lock:
        _spare[key] = program
        while len(_spare) > SPARE_PROGRAMS:
            _spare.pop(next(iter(_spare)))
