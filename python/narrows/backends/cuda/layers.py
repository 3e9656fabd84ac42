"""Single dense layers on a GPU, for `narrows.functional`: the launches of ops on CuPy arrays.

Promises: runs the ops and kernels of programs, on CuPy's current stream, and does not wait for them.
Never: takes an array on the CPU or on another GPU; `narrows.functional` refuses those.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

from ...plan.ops import OpCode
from ...plan.plan import Mode
from ...plan.spec import Activation, Loss, Precision
from ...rows.arrays import is_sparse
from ...rows.sparse import sparse_rows
from .data import N_SOURCES, check_csr_there, laid_out
from .device import blas_on, calls_of, launch
from .emit import LOWER
from .launches import Area, Launch, View, Writer, by_blas
from .layout import Operands
from .matrices import Shape, check_apart, matrix, require_cupy, row, shape_of, view_of
from .operands import Where, planned
from .table import SOURCE_DTYPE, STEP_DTYPE

__all__ = ["array_type", "current", "dense_backward_layer", "dense_layer", "empty"]


class Layer(NamedTuple):
    """Everything that the launches of a layer depend on. Absent operands have no shape."""

    precision: Precision
    activation: Activation
    X: Shape | None
    """None for sparse rows."""
    columns: int
    """Columns of X."""
    W: Shape
    of: tuple[Shape | None, ...]
    """b, out, Z in `dense_layer`; dA, saved, dX, dW, db in `dense_backward_layer`."""
    blas: bool
    """Whether cuBLAS does large products."""


class Written(NamedTuple):
    """The launches of a layer, and the elements of their temporary areas."""

    launches: tuple[Launch, ...]
    sizes: dict[int, int]


class Operand:
    """Numbers for the operands of a layer, used as areas of views."""

    X, W, B, OUT, Z = range(100, 105)
    DA, SAVED, DX, DW, DB = range(105, 110)


def dense_layer(X: Any, W: Any, b: Any, activation: int, out: Any, Z: Any, n_threads: int) -> None:
    """out = activation(X @ W + b); Z, if given, takes the pre-activation."""
    sparse = is_sparse(X)
    check_apart({"out": out, "Z": Z}, {"X": X, "W": W, "b": b})
    x, w = None if sparse else matrix(X), matrix(W, turned=not sparse)
    places = {Operand.X: x, Operand.W: w, Operand.B: row(b), Operand.OUT: matrix(out), Operand.Z: matrix(Z)}
    layer = Layer(
        Precision.of(out.dtype),
        Activation(activation),
        shape_of(x),
        int(X.shape[1]),
        shape_of(w),
        tuple(shape_of(places[i]) for i in (Operand.B, Operand.OUT, Operand.Z)),
        (blas := _blas((*X.shape, W.shape[1]), out.dtype)) is not None,
    )
    _run(_forward(layer), places, X if sparse else None, out, blas)


@lru_cache(maxsize=256)
def _forward(layer: Layer) -> Written:
    b, out, Z = (view_of(at, shape) for at, shape in zip((Operand.B, Operand.OUT, Operand.Z), layer.of, strict=True))
    assert out is not None
    W = view_of(Operand.W, layer.W)

    def write(w: Writer) -> None:
        given = {"W": W, "b": b, "out": out, "pre": Z, "activation": layer.activation}
        if layer.X is None:
            _lower(w, OpCode.SPARSE_DENSE, **given, **PLAIN_ROWS)
        else:
            _lower(w, OpCode.DENSE, **given, x=view_of(Operand.X, layer.X), transposed=int(layer.W.turned))

    return _written(layer, out.rows, write)


def dense_backward_layer(
    dA: Any, X: Any, W: Any, saved: Any, activation: int, dX: Any, dW: Any, db: Any, n_threads: int
) -> None:
    """Gradients of `dense_layer`, into dX, dW and db unless they are None. The derivative of the activation is computed
    from `saved`.
    """
    check_apart({"dX": dX, "dW": dW, "db": db}, {"dA": dA, "X": X, "W": W, "A": saved})
    sparse = is_sparse(X) and dW is not None
    x, w = None if is_sparse(X) else matrix(X), matrix(W, turned=True)
    places = {
        Operand.X: x,
        Operand.W: w,
        Operand.DA: matrix(dA),
        Operand.SAVED: matrix(saved),
        Operand.DX: matrix(dX),
        Operand.DW: matrix(dW),
        Operand.DB: row(db),
    }
    of = (Operand.DA, Operand.SAVED, Operand.DX, Operand.DW, Operand.DB)
    shapes, blas = tuple(shape_of(places[i]) for i in of), _blas((*X.shape, W.shape[1]), dA.dtype)
    of_x = shape_of(x), int(X.shape[1])
    layer = Layer(Precision.of(dA.dtype), Activation(activation), *of_x, shape_of(w), shapes, blas is not None)
    _run(_backward(layer), places, X if sparse else None, dA, blas)


@lru_cache(maxsize=256)
def _backward(layer: Layer) -> Written:
    of = (Operand.DA, Operand.SAVED, Operand.DX, Operand.DW, Operand.DB)
    dA, saved, dX, dW, db = (view_of(at, shape) for at, shape in zip(of, layer.of, strict=True))
    assert dA is not None

    def write(w: Writer) -> None:
        dz = dA
        if layer.activation is not Activation.LINEAR:
            slopes, dz = w.temporary(dA.rows, dA.cols), w.temporary(dA.rows, dA.cols)
            _lower(w, OpCode.SLOPES, saved=saved, out=slopes, activation=layer.activation, column=0)
            _lower(w, OpCode.TANGENT, x=dA, slopes=slopes, out=dz, column=0)
        if dX is not None:
            # A linear layer does not read `saved`.
            of_input = {"saved": dX, "activation": Activation.LINEAR, "scale": 1.0}
            _lower(w, OpCode.DGRAD, dz=dz, W=view_of(Operand.W, layer.W), out=dX, transposed=layer.W.turned, **of_input)
        if dW is not None and layer.X is None:
            _lower(w, OpCode.SPARSE_WGRAD, dz=dz, dW=dW, accumulate=0, **PLAIN_ROWS)
        elif dW is not None:
            _lower(w, OpCode.WGRAD, x=view_of(Operand.X, layer.X), dz=dz, dW=dW, accumulate=0)
        if db is not None:
            _lower(w, OpCode.COLSUM, x=dz, weight=None, out=db, accumulate=0, mean=0)

    return _written(layer, dA.rows, write)


PLAIN_ROWS = {"size_sum": None, "shift": None, "stream": 0, "level": 0.0, "scale": 1.0}
"""Sparse rows without noise, normalisation and shift."""


def _lower(w: Writer, code: OpCode, **operands: Any) -> None:
    LOWER[code](w, Operands(code.name, **operands))


def _written(layer: Layer, m: int, write: Callable[[Writer], None]) -> Written:
    # The operands are views already, so there is no plan. Ops on sparse rows read its number of features.
    plan: Any = SimpleNamespace(spec=SimpleNamespace(n_features=layer.columns, loss=Loss.MSE))
    w = Writer(plan, m, Mode.GRADIENT, layer.precision, blas=layer.blas)
    write(w)
    return Written(tuple(w.launches), {Area.TEMPORARY: w.most_used, Area.KEPT: w.most_kept})


def array_type() -> type:
    kind: type = require_cupy().ndarray
    return kind


def empty(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Any:
    """A new array on the current device."""
    return require_cupy().empty(shape, dtype)


def current() -> int:
    """The number of the current device."""
    return int(require_cupy().cuda.Device().id)


# --- runs -------------------------------------------------------------------------------------------------------------


def _blas(size: tuple[int, int, int], dtype: np.dtype[Any]) -> Any:
    """cuBLAS on the current stream, if a product of this size is large enough for it."""
    if not by_blas(size, Precision.of(dtype)):
        return None
    cupy = require_cupy()
    return _blas_on(cupy, current(), int(cupy.cuda.get_current_stream().ptr))[0]


@lru_cache(maxsize=4)
def _blas_on(cupy: Any, device: int, stream: int) -> tuple[Any, list[Any]]:
    """cuBLAS, and the memory of its workspace."""
    kept: list[Any] = []

    def allocate(size: int) -> int:
        kept.append(cupy.cuda.alloc(size))
        return int(kept[-1].ptr)

    return blas_on(cupy, stream, allocate), kept


def _run(written: Written, places: dict[int, Any], X: Any, like: Any, blas: Any) -> None:
    """Launch on the current stream. X is for launches that read sparse rows."""
    launches, sizes = written
    if not launches or not len(like):
        return
    cupy, dtype = require_cupy(), like.dtype
    # Freed on return. CuPy reuses the memory on this stream alone.
    working: dict[int, Any] = {area: cupy.empty(max(size, 1), dtype) for area, size in sizes.items()}
    bases = {at: int(array.data.ptr) for at, array in (places | working).items() if array is not None}
    step, sources, kept = _rows_of(X, dtype)

    def address(view: View) -> int:
        return bases[view.area] + view.offset * int(dtype.itemsize)

    calls = [planned(one, Where(address, step, sources, len(like), True)) for one in launches]
    launch(calls_of(cupy, calls, Precision.of(dtype), blas and blas.product))
    del working, kept


def _rows_of(X: Any, dtype: np.dtype[Any]) -> tuple[int, int, Any]:
    """The addresses of a step over all rows of a sparse X and of its sources, and the arrays that own this memory."""
    if X is None:
        return 0, 0, None
    cupy = require_cupy()
    X = sparse_rows(X)
    check_csr_there(X, "X")
    arrays, entry = laid_out(X, dtype, cupy.ascontiguousarray)
    array: Any
    for name, array in arrays.items():
        entry[name] = int(array.data.ptr)
    rows = cupy.arange(X.shape[0], dtype=np.int64)
    step, sources = np.zeros(1, STEP_DTYPE), np.zeros(N_SOURCES, SOURCE_DTYPE)
    step["rows"], sources[0] = rows.data.ptr, entry
    message = cupy.asarray(np.concatenate([step.view(np.uint8), sources.view(np.uint8)]))
    return int(message.data.ptr), int(message.data.ptr) + STEP_DTYPE.itemsize, (arrays, rows, message)
