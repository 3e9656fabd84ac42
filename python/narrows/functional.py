"""Single fused layers, for libraries that bring their own model.

Promises: no copy of an operand that is already float32 or float64, whatever its strides; results in the namespace of X;
the same bits for any number of threads on the native backend.
Never: keeps state between calls; changes an input.
"""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .backends import layer_backend, thread_count
from .plan import ACTIVATIONS, Activation

__all__ = ["DenseGrads", "dense", "dense_backward"]

SMALL = 1 << 16
"""Multiply-adds below which a layer runs on one thread, so that it need not be found out how many there are."""

_FLOAT32, _FLOAT64 = np.dtype(np.float32), np.dtype(np.float64)
_GRADIENTS = ("X", "W", "b")


class DenseGrads(NamedTuple):
    """Gradients of a dense layer; None where not asked for."""

    dX: Any
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
        NumPy array or anything with ``__dlpack__``, any strides; SciPy CSR.
    W : array-like, shape (k, m)
        C- or F-order alike.
    b : array-like, shape (m,), optional
    activation : str
        An elementwise activation, see :data:`narrows.plan.ACTIVATIONS`.
    out : ndarray, shape (n, m), optional
        Where to write; C-contiguous rows, of the result's dtype.
    Z : ndarray, shape (n, m), optional
        Where to write the pre-activation too, which `dense_backward` needs for gelu and silu.
    n_threads : int, optional
        By default what :func:`narrows.show_config` reports.

    Returns
    -------
    A : array, shape (n, m)
        float64 if X or W is float64, else float32; `out` if given, else in X's namespace.

    Raises
    ------
    ValueError
        Shapes that do not fit, an unknown activation, or an `out` that does not fit.
    """
    act = elementwise(activation)
    x, w, dtype = _operands(X, W)
    shape = (x.shape[0], w.shape[1])
    if x.shape[1] != w.shape[0]:
        raise ValueError(f"X has {x.shape[1]} columns but W has {w.shape[0]} rows")
    bias = None
    if b is not None:
        bias = b if _ready(b) and b.dtype is dtype and b.ndim == 1 else _cast(_operand(b, "b", ndim=1), dtype)
        if not bias.flags.c_contiguous:
            bias = bias.copy()
        if len(bias) != shape[1]:
            raise ValueError(f"b has {len(bias)} elements but W has {shape[1]} columns")
    result = np.empty(shape, dtype) if out is None else _output(out, shape, dtype, "out")
    if Z is not None:
        _output(Z, shape, dtype, "Z")
    threads = _threads(n_threads, shape[0] * shape[1] * w.shape[0])
    layer_backend().dense_layer(x, w, bias, act, result, Z, threads)
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
    need: tuple[str, ...] = ("X", "W", "b"),
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
    n_threads : int, optional

    Returns
    -------
    DenseGrads
        ``(dX, dW, db)``, None where not needed; dX is dense, in X's namespace.
    """
    act = elementwise(activation)
    for name in need:
        if name not in _GRADIENTS:
            raise ValueError(f"need={need!r}: {name!r} is not one of 'X', 'W', 'b'")
    if act.needs_preactivation and Z is None:
        raise ValueError(f"activation={activation!r} needs the pre-activation: pass Z, as written by dense(..., Z=Z)")
    x, w, dtype = _operands(X, W)
    shape = (x.shape[0], w.shape[1])
    saved_name, saved = ("Z", Z) if act.needs_preactivation else ("A", A)
    d, s = _same(dA, "dA", dtype), _same(saved, saved_name, dtype)
    for array, name in ((d, "dA"), (s, saved_name)):
        if array.shape != shape:
            raise ValueError(f"{name} has shape {array.shape}, expected {shape} from X and W")
    backend, threads = layer_backend(), _threads(n_threads, shape[0] * shape[1] * w.shape[0])
    dZ: NDArray[Any] = np.empty(shape, dtype)
    backend.slope_layer(d, s, act, dZ, threads)
    dX: Any = None
    dW: Any = None
    db: Any = None
    if "X" in need:
        dX = np.empty((shape[0], w.shape[0]), dtype)
        backend.dense_layer(dZ, w.T, None, Activation.LINEAR, dX, None, threads)
    if "W" in need:
        if hasattr(x, "indptr"):
            dW = x.T @ dZ
        else:
            dW = np.empty(w.shape, dtype)
            backend.dense_layer(x.T, dZ, None, Activation.LINEAR, dW, None, threads)
    if "b" in need:
        db = np.empty(shape[1], dtype)
        backend.colsum_layer(dZ, db, threads)
    if x is X:
        return DenseGrads(dX, dW, db)
    return DenseGrads(*(None if g is None else _like(X, g) for g in (dX, dW, db)))


def _threads(n_threads: int | None, work: int) -> int:
    return 1 if n_threads is None and work < SMALL else thread_count(n_threads)


def elementwise(name: str) -> Activation:
    """The activation called `name`, or a ValueError with the choices; softmax couples a row and is none."""
    act = ACTIVATIONS.get(name)
    if act is None or act is Activation.SOFTMAX:
        choices = ", ".join(n for n, a in ACTIVATIONS.items() if a is not Activation.SOFTMAX)
        raise ValueError(f"activation={name!r} is not an elementwise activation; choose from {choices}")
    return act


def _operand(value: Any, name: str, ndim: int = 2) -> Any:
    """`value` as an ndarray or CSR, without a copy where there is one in it."""
    if isinstance(value, np.ndarray):
        array = value
    elif hasattr(value, "indptr"):
        if getattr(value, "format", None) != "csr" or name != "X":
            raise TypeError(f"{name}: only X may be sparse, and only CSR; got {type(value).__name__}")
        return value
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
    return array


def _ready(value: Any) -> bool:
    """Whether `value` is what the native layers take, but for its shape. Small layers live from asking little."""
    if type(value) is not np.ndarray:
        return False
    dtype = value.dtype
    return (dtype is _FLOAT32 or dtype is _FLOAT64) and value.flags.aligned


def _operands(X: Any, W: Any) -> tuple[Any, NDArray[Any], np.dtype[Any]]:
    """X and W as matrices of their common dtype."""
    if _ready(X) and _ready(W) and X.dtype is W.dtype and X.ndim == W.ndim == 2:
        return X, W, X.dtype
    x, w = _operand(X, "X"), _operand(W, "W")
    dtype = _FLOAT64 if "d" in (x.dtype.char, w.dtype.char) else _FLOAT32
    return _cast(x, dtype), _cast(w, dtype), dtype


def _same(value: Any, name: str, dtype: np.dtype[Any]) -> Any:
    return value if _ready(value) and value.dtype is dtype else _cast(_operand(value, name), dtype)


def _cast(array: Any, dtype: np.dtype[Any]) -> Any:
    """The native dtype, without a copy where it is that already (with aligned elements and strides)."""
    if array.dtype is not dtype and (array.dtype != dtype or not array.dtype.isnative):
        return array.astype(dtype)
    if isinstance(array, np.ndarray) and not array.flags.aligned:
        return array.copy()
    return array


def _output(array: Any, shape: tuple[int, int], dtype: np.dtype[Any], name: str) -> NDArray[Any]:
    if (
        not isinstance(array, np.ndarray)
        or array.shape != shape
        or array.dtype != dtype
        or not array.flags.writeable
        or (shape[1] > 1 and array.strides[1] != dtype.itemsize)
    ):
        found = f"{array.dtype} of shape {array.shape}" if isinstance(array, np.ndarray) else type(array).__name__
        raise ValueError(f"{name} must be a writable {dtype} array of shape {shape} with contiguous rows, got {found}")
    return array


def _like(X: Any, result: NDArray[Any]) -> Any:
    """`result` in the namespace of X."""
    if isinstance(X, np.ndarray) or hasattr(X, "indptr") or not hasattr(X, "__dlpack__"):
        return result
    namespace = (
        X.__array_namespace__() if hasattr(X, "__array_namespace__") else sys.modules[type(X).__module__.split(".")[0]]
    )
    return namespace.from_dlpack(result)
