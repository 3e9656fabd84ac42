"""Single fused layers, for libraries that bring their own model.

- An operand in float32 or float64 is not copied, for any strides (dA, A and Z need contiguous rows).
- Results are arrays of X's library. The native backend gives the same bits for any number of threads.
- Arrays on a GPU are computed there, on CuPy's current stream. Arrays on the CPU are computed on the CPU.
- Inputs do not change, and no operand or result is kept.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..backends import gpu_layers, layer_backend
from ..machine import thread_count, usable_cpus
from ..plan.spec import ACTIVATIONS, Activation
from ..rows.devices import device_of
from .operands import FLOAT32, FLOAT64, cast, elementwise, in_namespace, operand

__all__ = ["DenseGrads", "dense", "dense_backward"]

SERIAL = 1 << 19
"""Up to this number of multiply-adds one thread is as fast as two: waking the second one takes as long."""
_FROM_Z = frozenset(name for name, act in ACTIVATIONS.items() if act.needs_preactivation)
_GRADIENTS = ("X", "W", "b")


class DenseGrads(NamedTuple):
    """Gradients of a dense layer; None for those that were not asked for.

    Examples
    --------
    >>> import numpy as np
    >>> from narrows.functional import dense, dense_backward
    >>> X, W = np.ones((3, 2)), np.ones((2, 4))
    >>> grads = dense_backward(np.ones((3, 4)), X, W, dense(X, W), need=("X", "W"))
    >>> grads.dW.shape, grads.db is None
    ((2, 4), True)
    """

    dX: Any
    dW: Any
    db: Any


_NEW = DenseGrads(None, None, None)


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
        A NumPy array or anything with ``__dlpack__``, with any strides; or SciPy CSR. Or all operands are on one GPU:
        arrays that CuPy can take by DLPack, or CuPy CSR.
    W : array-like, shape (k, m)
        C- or F-order alike.
    b : array-like, shape (m,), optional
    activation : str
        An elementwise activation, see :data:`narrows.plan.spec.ACTIVATIONS`.
    out : ndarray, shape (n, m), optional
        The array to write to. It has the result's dtype and C-contiguous rows, and shares no memory with an operand.
    Z : ndarray, shape (n, m), optional
        An array for the pre-activation, which `dense_backward` needs for gelu and silu.
    n_threads : int, optional
        Threads on the CPU; the default is what :func:`narrows.show_config` reports.

    Returns
    -------
    A : array, shape (n, m)
        float64 if X or W is float64, else float32; `out` if given, else an array of X's library.

    Raises
    ------
    ValueError
        Shapes or `out` do not fit, the activation is unknown, or operands are on two GPUs.
    TypeError
        Some operands are on a GPU and some on the CPU.

    Examples
    --------
    >>> import numpy as np
    >>> from narrows.functional import dense
    >>> dense(np.array([[1.0, -2.0]]), np.eye(2), activation="relu").tolist()
    [[1.0, 0.0]]
    """
    act = elementwise(activation)
    if type(X) is not np.ndarray or type(W) is not np.ndarray:
        gpu = device_of(X=X, W=W, b=b, out=out, Z=Z)
        if gpu is not None:
            with gpu:
                return _dense(act, X, W, b, out, Z, None, on_gpu=True)
    return _dense(act, X, W, b, out, Z, n_threads)


def _dense(
    act: Activation, X: Any, W: Any, b: Any, out: Any, Z: Any, n_threads: int | None, on_gpu: bool = False
) -> Any:
    x, w, dtype = _operands(X, W, on_gpu)
    (n, k), m = x.shape, w.shape[1]
    bias = None
    if b is not None:
        bias = b if _ready(b) and b.dtype is dtype and b.ndim == 1 else cast(operand(b, "b", 1, on_gpu), dtype)
        if not bias.flags.c_contiguous:
            bias = bias.copy()
        if len(bias) != m:
            raise ValueError(f"b has {len(bias)} elements but W has {m} columns")
    hint_malloc(n * m * dtype.itemsize)
    result = _empty((n, m), dtype, on_gpu) if out is None else _output(out, (n, m), dtype, "out", on_gpu)
    if Z is not None:
        _output(Z, (n, m), dtype, "Z", on_gpu)
    backend = gpu_layers() if on_gpu else layer_backend()
    backend.dense_layer(x, w, bias, act, result, Z, _threads(n_threads, n * k * m))
    if out is not None:
        return out
    return result if x is X else in_namespace(X, result)


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
        The output of :func:`dense`.
    activation : str
    Z : array-like, shape (n, m), optional
        The pre-activation; needed for gelu and silu, whose derivative does not follow from A.
    need : tuple of {"X", "W", "b"}
        The gradients to compute.
    out : DenseGrads or tuple (dX, dW, db), optional
        Arrays to write to, as `out` of :func:`dense`. None stands for a new array, or for a gradient not needed.
    n_threads : int, optional
        Threads on the CPU.

    Returns
    -------
    DenseGrads
        ``(dX, dW, db)``, None where not needed. dX is dense. They are those of `out` if given, else of X's library.

    Raises
    ------
    ValueError
        Shapes or `out` do not fit, the activation is unknown, Z is missing, or operands are on two GPUs.
    TypeError
        Some operands are on a GPU and some on the CPU.

    Examples
    --------
    >>> import numpy as np
    >>> from narrows.functional import dense, dense_backward
    >>> X, W = np.array([[1.0, -2.0]]), np.eye(2)
    >>> A = dense(X, W, activation="relu")
    >>> dense_backward(np.ones((1, 2)), X, W, A, "relu").dX.tolist()
    [[1.0, 0.0]]
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
        gpu = device_of(X=X, W=W, dA=dA, **{saved_name: saved})
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
    (n, k), m = x.shape, w.shape[1]
    d, s = _same(dA, "dA", dtype, on_gpu), _same(saved, saved_name, dtype, on_gpu)
    if d.shape != (n, m) or s.shape != (n, m):
        name, shape = ("dA", d.shape) if d.shape != (n, m) else (saved_name, s.shape)
        raise ValueError(f"{name} has shape {shape}, expected {(n, m)} from X and W")
    given = _NEW if out is None else _outputs(out, need, ((n, k), (k, m), (m,)), dtype, on_gpu)
    hint_malloc((n * k + k * m) * dtype.itemsize)
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
    return DenseGrads(*(r if r is g else in_namespace(X, r) for r, g in zip((dX, dW, db), given, strict=True)))


_most = 0
"""Bytes of the largest results of a call so far."""


def hint_malloc(size: int) -> None:
    """Make malloc keep memory for a few results of `size` bytes between calls.

    glibc returns free memory at the end of the heap once it exceeds twice the largest block ever freed. That block
    counts up to 32 MiB (see mallopt(3), M_MMAP_THRESHOLD). The results of a call, freed together, exceed that. Each
    call would then get its memory again page by page, which costs as much as the products of a layer.
    """
    global _most
    if size > _most:
        _most = size
        np.empty(min(8 * size, 31 << 20), np.uint8)


def _threads(n_threads: int | None, work: int) -> int:
    """At most `n_threads`; one if two would not be faster."""
    if n_threads is None:
        return 1 if work <= SERIAL else _default_threads(usable_cpus()[0])
    threads = thread_count(n_threads)
    return 1 if work <= SERIAL else threads


@cache
def _default_threads(usable: int) -> int:
    """`thread_count`, kept for each number of usable CPUs: reading the environment takes as long as a small layer."""
    return thread_count()


def _ready(value: Any) -> bool:
    """Whether the native layers take `value`, apart from its shape. Small layers need cheap checks."""
    if type(value) is not np.ndarray:
        return False
    dtype = value.dtype
    return (dtype is FLOAT32 or dtype is FLOAT64) and value.flags.aligned


def _operands(X: Any, W: Any, on_gpu: bool) -> tuple[Any, NDArray[Any], np.dtype[Any]]:
    """X and W as matrices of one dtype, whose product exists."""
    if _ready(X) and _ready(W) and X.dtype is W.dtype and X.ndim == W.ndim == 2:
        x, w, dtype = X, W, X.dtype
    else:
        x, w = operand(X, "X", 2, on_gpu), operand(W, "W", 2, on_gpu)
        dtype = FLOAT64 if "d" in (x.dtype.char, w.dtype.char) else FLOAT32
        x, w = cast(x, dtype), cast(w, dtype)
    if x.shape[1] != w.shape[0]:
        raise ValueError(f"X has {x.shape[1]} columns but W has {w.shape[0]} rows")
    return x, w, dtype


def _same(value: Any, name: str, dtype: np.dtype[Any], on_gpu: bool) -> Any:
    return value if _ready(value) and value.dtype is dtype else cast(operand(value, name, 2, on_gpu), dtype)


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
    if len(shape) == 2 and shape[0] > 1 and abs(array.strides[0]) < shape[1] * dtype.itemsize:
        raise ValueError(f"the rows of {name} overlap in memory (strides {array.strides}): pass an array of its own")
    return array


def _outputs(out: Any, need: tuple[str, ...], shapes: Any, dtype: np.dtype[Any], on_gpu: bool) -> DenseGrads:
    """The arrays of `out`, checked."""
    if not isinstance(out, tuple) or len(out) != 3:
        raise ValueError("out must be a tuple (dX, dW, db), with None for a missing array")
    for name, array, shape in zip(_GRADIENTS, out, shapes, strict=True):
        if array is not None:
            if name not in need:
                raise ValueError(f"out has d{name}, but need={need!r} does not name {name!r}")
            _output(array, shape, dtype, f"d{name}", on_gpu)
    return DenseGrads(*out)
