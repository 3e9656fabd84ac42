"""Single fused layers and the contractive penalty, for libraries that bring their own model.

Promises: no copy of a layer's operand that is already float32 or float64, whatever its strides (dA, A and Z with
contiguous rows); results in the namespace of X; the same bits for any number of threads on the native backend. Arrays
of a GPU are worked on by that GPU, in the order of CuPy's current stream there; those of the CPU never are.
Never: keeps an operand or a result (but memory to work in, of the last penalties' shapes); changes an input.
"""

from __future__ import annotations

import contextlib
import itertools
import sys
import threading
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..backends import Program, compile_plan, gpu_layers, host_backend, layer_backend, resolve
from ..machine import thread_count, usable_cpus
from ..plan.spec import ACTIVATIONS, Activation, LayerSpec, NetworkSpec
from ..rows.devices import gpu_array, holder

__all__ = ["DenseGrads", "Penalty", "contractive_penalty", "dense", "dense_backward"]

SERIAL = 1 << 19
"""Multiply-adds up to which one thread is as fast as two: about the time that it takes to wake the second one."""

PENALTY_ROWS = 512
"""Rows whose penalty is computed at once."""
SPARE_PROGRAMS = 2
"""Programs for penalties that are kept for the next call of the same shape."""
_spare: dict[Any, Program] = {}
_spare_lock = threading.Lock()

_FLOAT32, _FLOAT64 = np.dtype(np.float32), np.dtype(np.float64)
_ELEMENTWISE = {name: act for name, act in ACTIVATIONS.items() if act is not Activation.SOFTMAX}
_FROM_Z = frozenset(name for name, act in _ELEMENTWISE.items() if act.needs_preactivation)
_GRADIENTS = ("X", "W", "b")


class DenseGrads(NamedTuple):
    """Gradients of a dense layer; None where not asked for."""

    dX: Any
    dW: Any
    db: Any


_NEW = DenseGrads(None, None, None)


class Penalty(NamedTuple):
    """A penalty and its gradients by each layer's weight and bias; None where not asked for."""

    value: float
    dW: Any
    db: Any


def dense(
    X: Any,
    W: Any,
    b: Any = None,
    activation: str = "linear",
    *,
    out: Any = None,
    Z: Any = None,
    n_threads: int | None = None,
) -> Any:
    """A dense layer and its activation in one pass: ``activation(X @ W + b)``.

    Parameters
    ----------
    X : array-like or CSR, shape (n, k)
        NumPy array or anything with ``__dlpack__``, any strides; SciPy CSR. Or all operands are on one GPU: arrays of
        CuPy's and what DLPack makes such, CSR of CuPy's.
    W : array-like, shape (k, m)
        C- or F-order alike.
    b : array-like, shape (m,), optional
    activation : str
        An elementwise activation, see :data:`narrows.plan.spec.ACTIVATIONS`.
    out : ndarray, shape (n, m), optional
        Where to write; C-contiguous rows, of the result's dtype, in memory that no operand has a part in.
    Z : ndarray, shape (n, m), optional
        Where to write the pre-activation too, which `dense_backward` needs for gelu and silu.
    n_threads : int, optional
        Of the CPU; by default what :func:`narrows.show_config` reports.

    Returns
    -------
    A : array, shape (n, m)
        float64 if X or W is float64, else float32; `out` if given, else in X's namespace.

    Raises
    ------
    ValueError
        Shapes that do not fit, an unknown activation, or an `out` that does not fit; operands on two GPUs.
    TypeError
        Operands on a GPU and on the CPU.
    """
    act = elementwise(activation)
    if type(X) is not np.ndarray or type(W) is not np.ndarray:
        gpu = holder(X=X, W=W, b=b, out=out, Z=Z)
        if gpu is not None:
            with gpu:
                return _dense(act, X, W, b, out, Z, None, on_gpu=True)
    return _dense(act, X, W, b, out, Z, n_threads)


def _dense(
    act: Activation, X: Any, W: Any, b: Any, out: Any, Z: Any, n_threads: int | None, on_gpu: bool = False
) -> Any:
    x, w, dtype = _operands(X, W, on_gpu)
    (n, inner), (k, m) = x.shape, w.shape
    if inner != k:
        raise ValueError(f"X has {inner} columns but W has {k} rows")
    bias = None
    if b is not None:
        bias = b if _ready(b) and b.dtype is dtype and b.ndim == 1 else _cast(_operand(b, "b", 1, on_gpu), dtype)
        if not bias.flags.c_contiguous:
            bias = bias.copy()
        if len(bias) != m:
            raise ValueError(f"b has {len(bias)} elements but W has {m} columns")
    _expect(n * m * dtype.itemsize)
    result = _empty((n, m), dtype, on_gpu) if out is None else _output(out, (n, m), dtype, "out", on_gpu)
    if Z is not None:
        _output(Z, (n, m), dtype, "Z", on_gpu)
    backend = gpu_layers() if on_gpu else layer_backend()
    backend.dense_layer(x, w, bias, act, result, Z, _threads(n_threads, n * k * m))
    if out is not None:
        return out
    return result if x is X else _like(X, result)


def dense_backward(
    dA: Any,
    X: Any,
    W: Any,
    A: Any,
    activation: str = "linear",
    *,
    Z: Any = None,
    need: tuple[str, ...] = _GRADIENTS,
    out: tuple[Any, Any, Any] | None = None,
    n_threads: int | None = None,
) -> DenseGrads:
    """Gradients of :func:`dense`.

    With ``dZ = dA * activation'``: ``dX = dZ @ W.T``, ``dW = X.T @ dZ``, ``db = dZ.sum(axis=0)``.

    Parameters
    ----------
    dA : array-like, shape (n, m)
        Gradient of the loss by the layer's output.
    X, W : array-like
        As given to :func:`dense`; X may be CSR.
    A : array-like, shape (n, m)
        What :func:`dense` returned.
    activation : str
    Z : array-like, shape (n, m), optional
        The pre-activation; needed for gelu and silu, whose derivative cannot be told from A.
    need : tuple of {"X", "W", "b"}
        Which gradients to compute.
    out : DenseGrads or tuple (dX, dW, db), optional
        Where to write; None in it for what is not needed or is to be a new array. As `out` of :func:`dense`.
    n_threads : int, optional
        Of the CPU.

    Returns
    -------
    DenseGrads
        ``(dX, dW, db)``, None where not needed; dX is dense; those of `out` if given, else in X's namespace.

    Raises
    ------
    ValueError
        Shapes that do not fit, an unknown activation, a missing Z, or an `out` that does not fit; operands on two GPUs.
    TypeError
        Operands on a GPU and on the CPU.
    """
    act = elementwise(activation)
    if need is not _GRADIENTS:
        for name in need:
            if name not in _GRADIENTS:
                raise ValueError(f"need={need!r}: {name!r} is not one of 'X', 'W', 'b'")
    from_z = activation in _FROM_Z
    if from_z and Z is None:
        raise ValueError(f"activation={activation!r} needs the pre-activation: pass Z, as written by dense(..., Z=Z)")
    saved_name, saved = ("Z", Z) if from_z else ("A", A)
    if type(X) is not np.ndarray or type(W) is not np.ndarray:
        gpu = holder(X=X, W=W, dA=dA, **{saved_name: saved})
        if gpu is not None:
            with gpu:
                return _dense_backward(act, dA, X, W, saved_name, saved, need, out, None, on_gpu=True)
    return _dense_backward(act, dA, X, W, saved_name, saved, need, out, n_threads)


def _dense_backward(
    act: Activation,
    dA: Any,
    X: Any,
    W: Any,
    saved_name: str,
    saved: Any,
    need: tuple[str, ...],
    out: Any,
    n_threads: int | None,
    on_gpu: bool = False,
) -> DenseGrads:
    x, w, dtype = _operands(X, W, on_gpu)
    (n, inner), (k, m) = x.shape, w.shape
    if inner != k:
        raise ValueError(f"X has {inner} columns but W has {k} rows")
    d, s = _same(dA, "dA", dtype, on_gpu), _same(saved, saved_name, dtype, on_gpu)
    if d.shape != (n, m) or s.shape != (n, m):
        name, shape = ("dA", d.shape) if d.shape != (n, m) else (saved_name, s.shape)
        raise ValueError(f"{name} has shape {shape}, expected {(n, m)} from X and W")
    given = _NEW if out is None else _outputs(out, need, ((n, k), (k, m), (m,)), dtype, on_gpu)
    _expect((n * k + k * m) * dtype.itemsize)
    dX, dW, db = given
    if dX is None and "X" in need:
        dX = _empty((n, k), dtype, on_gpu)
    if dW is None and "W" in need:
        dW = _empty((k, m), dtype, on_gpu)
    if db is None and "b" in need:
        db = _empty((m,), dtype, on_gpu)
    backend = gpu_layers() if on_gpu else layer_backend()
    backend.dense_backward_layer(d, x, w, s, act, dX, dW, db, _threads(n_threads, 2 * n * k * m))
    if x is X:
        return DenseGrads(dX, dW, db)
    return DenseGrads(*(r if r is g else _like(X, r) for r, g in zip((dX, dW, db), given, strict=True)))


_most = 0
"""Bytes of the largest results of one call so far."""


def _expect(size: int) -> None:
    """Have malloc keep the memory of a few results of so many bytes between one use and the next.

    glibc hands memory at the end of the heap back to the system as soon as there is more of it than twice the largest
    block ever freed (up to 32 MiB, see mallopt(3), M_MMAP_THRESHOLD). Results that are freed together are more than
    that, and every call would take them anew, page by page, which costs as much as the products of a layer.
    """
    global _most
    if size > _most:
        _most = size
        np.empty(min(8 * size, 31 << 20), np.uint8)


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
    """The contractive penalty of an encoder: the mean over rows of ``|J|**2``, J being the derivatives of its last
    layer's outputs by its input and ``|J|`` their Frobenius norm (Rifai et al., ICML 2011).

    Parameters
    ----------
    X : array-like or CSR, shape (n, n_in)
        float32 or float64, any strides; at least one row.
    weights : sequence of array-like, shape (n_in, n_out) each
        Of the encoder's layers, from the input on.
    biases : sequence of array-like, shape (n_out,) each, or None
    activations : str or sequence of str
        One for all layers, or one for each; elementwise, see :data:`narrows.plan.spec.ACTIVATIONS`.
    method : {"exact", "hutchinson"}
        Exact, for up to four layers; or the unbiased estimate ``mean over v of |J'v|**2`` with random signs v. One
        layer has a closed form, which is taken in either case.
    n_probes : int
        Vectors v for each row.
    random_state : int, RandomState, Generator or None
        Of the probes.
    grads : bool
        False leaves the gradients out.
    n_threads : int, optional
        Of the CPU.

    Returns
    -------
    Penalty
        ``(value, dW, db)``, with the gradients of the value in lists, in X's namespace; computed in float64 if X or a
        weight is, else in float32.

    Raises
    ------
    ValueError
        Shapes that do not fit, an unknown activation or method, or more layers than the exact penalty takes; operands
        on two GPUs.
    TypeError
        Operands on a GPU and on the CPU.
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
    gpu = holder(
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
    from ..random.weights import draw_seed

    x = _operand(X, "X", 2, on_gpu)
    if x.shape[0] < 1:
        raise ValueError("X has no rows, whose penalties could be averaged")
    W = [_operand(w, f"weights[{i}]", 2, on_gpu) for i, w in enumerate(weights)]
    dtype = _FLOAT64 if any(a.dtype.char == "d" for a in (x, *W)) else _FLOAT32
    state: dict[str, NDArray[Any]] = {}
    widths = [x.shape[1], *(w.shape[1] for w in W)]
    for i, w in enumerate(W):
        if w.shape[0] != widths[i]:
            before = "X" if i == 0 else f"weights[{i - 1}]"
            raise ValueError(f"weights[{i}] has {w.shape[0]} rows but {before} has {widths[i]} columns")
    for i, (w, b) in enumerate(zip(W, biases, strict=True)):
        bias = np.zeros(widths[i + 1]) if b is None else _operand(b, f"biases[{i}]", 1, on_gpu)
        if len(bias) != widths[i + 1]:
            raise ValueError(f"biases[{i}] has {len(bias)} elements but weights[{i}] has {widths[i + 1]} columns")
        state |= {f"W{i}": w, f"b{i}": bias}
    layers = tuple(LayerSpec(*n, elementwise(a)) for n, a in zip(itertools.pairwise(widths), names, strict=True))
    probes = n_probes if method == "hutchinson" else 0
    seed = draw_seed(random_state) if probes else 0
    spec = NetworkSpec(layers, len(layers), contractive=1.0, contractive_probes=probes)
    n = x.shape[0]
    # Parts of nearly equal size, as many as it takes
    parts = -(-n // PENALTY_ROWS)
    value = 0.0
    total: dict[str, NDArray[Any]] = {}
    with _penalty_program(spec, -(-n // parts), grads, dtype, thread_count(n_threads), on_gpu) as program:
        program.load(state)
        program.bind(_cast(x, dtype))
        for part in range(parts):
            rows = np.arange(n * part // parts, n * (part + 1) // parts)
            # Where the arrays are, the gradients are wanted.
            terms, gradient = program.gradient(rows, seed, part, **({"there": True} if on_gpu else {}))
            value += float(terms[0]) * (len(rows) / n)
            for name, g in gradient.items() if grads else ():
                if parts > 1:
                    g *= dtype.type(len(rows) / n)
                total[name] = g if part == 0 else total[name] + g
    if not grads:
        return Penalty(value, None, None)
    dW = [_like(X, total[f"W{i}"].astype(dtype, copy=False)) for i in range(len(layers))]
    db = [_like(X, total[f"b{i}"].reshape(-1).astype(dtype, copy=False)) for i in range(len(layers))]
    return Penalty(value, dW, db)


@contextlib.contextmanager
def _penalty_program(
    spec: NetworkSpec, batch: int, grads: bool, dtype: np.dtype[Any], n_threads: int, on_gpu: bool
) -> Iterator[Any]:
    """A program for `contractive_penalty`: one that an earlier call has left, or a new one.

    To make one takes longer than to run it, most of it for memory that is touched for the first time.
    """
    from ..plan.lowering import lower_penalty

    backend = resolve("cuda") if on_gpu else host_backend()
    # Of a GPU, the current one.
    place = gpu_layers().current() if on_gpu else None
    key = (spec, batch, grads, dtype, n_threads, backend, place)
    with _spare_lock:
        program = _spare.pop(key, None)
    if program is None:
        plan = lower_penalty(spec, batch, grads=grads)
        program = compile_plan(plan, backend, precision=dtype, n_threads=n_threads)
    yield program
    # The data are not the program's to keep.
    program.bind(np.zeros((1, spec.n_features), dtype))
    with _spare_lock:
        _spare[key] = program
        while len(_spare) > SPARE_PROGRAMS:
            _spare.pop(next(iter(_spare)))


def _threads(n_threads: int | None, work: int) -> int:
    """At most `n_threads`; one where two would not be faster."""
    if n_threads is None:
        return 1 if work <= SERIAL else _default_threads(usable_cpus()[0])
    threads = thread_count(n_threads)
    return 1 if work <= SERIAL else threads


@cache
def _default_threads(usable: int) -> int:
    """`thread_count` where so many CPUs are usable: to read the environment again takes as long as a small layer."""
    return thread_count()


def elementwise(name: str) -> Activation:
    """The activation called `name`, or a ValueError with the choices; softmax couples a row and is none."""
    act = _ELEMENTWISE.get(name)
    if act is None:
        raise ValueError(f"activation={name!r} is not an elementwise activation; choose from {', '.join(_ELEMENTWISE)}")
    return act


def _operand(value: Any, name: str, ndim: int = 2, on_gpu: bool = False) -> Any:
    """`value` as an ndarray or CSR, or that of CuPy, without a copy where there is one in it."""
    if isinstance(value, np.ndarray):
        array = value
        if isinstance(value, np.ma.MaskedArray):
            from ..data.source import check_unmasked

            check_unmasked(value, name)
    elif hasattr(value, "tocsr"):
        if getattr(value, "format", None) != "csr" or name != "X":
            raise TypeError(f"{name}: only X may be sparse, and only CSR; got {type(value).__name__}")
        if on_gpu:
            return value
        array = value
    elif on_gpu:
        array = gpu_array(value, name)
    elif hasattr(value, "__dlpack__"):
        try:
            array = np.from_dlpack(value)
        except (BufferError, RuntimeError) as error:
            raise TypeError(f"{name}: not in the memory of this CPU ({error})") from None
    else:
        array = np.asarray(value)
    if array.ndim != ndim:
        raise ValueError(f"{name} has {array.ndim} dimensions, expected {ndim}")
    if array.dtype.kind not in "fiub":
        raise TypeError(f"{name} has dtype {array.dtype}, expected numbers")
    if hasattr(array, "indptr"):
        from ..data.source import check_csr

        check_csr(array)
    return array


def _ready(value: Any) -> bool:
    """Whether `value` is what the native layers take, but for its shape. Small layers live from asking little."""
    if type(value) is not np.ndarray:
        return False
    dtype = value.dtype
    return (dtype is _FLOAT32 or dtype is _FLOAT64) and value.flags.aligned


def _operands(X: Any, W: Any, on_gpu: bool) -> tuple[Any, NDArray[Any], np.dtype[Any]]:
    """X and W as matrices of their common dtype."""
    if _ready(X) and _ready(W) and X.dtype is W.dtype and X.ndim == W.ndim == 2:
        return X, W, X.dtype
    x, w = _operand(X, "X", 2, on_gpu), _operand(W, "W", 2, on_gpu)
    dtype = _FLOAT64 if "d" in (x.dtype.char, w.dtype.char) else _FLOAT32
    return _cast(x, dtype), _cast(w, dtype), dtype


def _same(value: Any, name: str, dtype: np.dtype[Any], on_gpu: bool) -> Any:
    return value if _ready(value) and value.dtype is dtype else _cast(_operand(value, name, 2, on_gpu), dtype)


def _cast(array: Any, dtype: np.dtype[Any]) -> Any:
    """The native dtype, without a copy where it is that already (with aligned elements and strides)."""
    if array.dtype is not dtype and (array.dtype != dtype or not array.dtype.isnative):
        return array.astype(dtype)
    if isinstance(array, np.ndarray) and not array.flags.aligned:
        return array.copy()
    return array


def _empty(shape: tuple[int, ...], dtype: np.dtype[Any], on_gpu: bool) -> Any:
    return gpu_layers().empty(shape, dtype) if on_gpu else np.empty(shape, dtype)


def _output(array: Any, shape: tuple[int, ...], dtype: np.dtype[Any], name: str, on_gpu: bool) -> Any:
    known = isinstance(array, gpu_layers().array_type() if on_gpu else np.ndarray)
    if (
        not known
        or array.shape != shape
        or array.dtype != dtype
        or not getattr(array.flags, "writeable", True)
        or (shape[-1] > 1 and array.strides[-1] != dtype.itemsize)
    ):
        found = f"{array.dtype} of shape {array.shape}" if known else type(array).__name__
        raise ValueError(f"{name} must be a writable {dtype} array of shape {shape} with contiguous rows, got {found}")
    return array


def _outputs(out: Any, need: tuple[str, ...], shapes: Any, dtype: np.dtype[Any], on_gpu: bool) -> DenseGrads:
    """The gradients that the caller has a place for."""
    if not isinstance(out, tuple) or len(out) != 3:
        raise ValueError("out must be a tuple (dX, dW, db), with None for what is not given")
    for name, array, shape in zip(_GRADIENTS, out, shapes, strict=True):
        if array is not None:
            if name not in need:
                raise ValueError(f"out has d{name}, but need={need!r} does not name {name!r}")
            _output(array, shape, dtype, f"d{name}", on_gpu)
    return DenseGrads(*out)


def _like(X: Any, result: NDArray[Any]) -> Any:
    """`result` in the namespace of X."""
    if type(X) is type(result) or hasattr(X, "indptr") or not hasattr(X, "__dlpack__"):
        return result
    namespace = (
        X.__array_namespace__() if hasattr(X, "__array_namespace__") else sys.modules[type(X).__module__.split(".")[0]]
    )
    return namespace.from_dlpack(result) if hasattr(namespace, "from_dlpack") else result
