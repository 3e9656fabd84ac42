"""Single dense layers on a GPU, for `narrows.functional`: the launches of an op, over arrays of CuPy's.

Promises: the kernels and the ops are those of programs; they run on CuPy's current stream, so that they are in order
with whatever else is asked for there, and nothing is waited for; a matrix is used where it lies, turned or not, if its
rows or its columns have no gaps, and is copied once on the GPU if not.
Never: an array of the CPU, or of another GPU than the current one (`narrows.functional` sees to that).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

import numpy as np

from ..._extras import require
from ...plan.ops import OpCode
from ...plan.plan import Mode
from ...plan.spec import Activation, Loss, Precision
from ...rows.arrays import is_sparse
from ...rows.sparse import sparse_rows
from .data import N_SOURCES, check_csr, laid_out
from .device import blas_on, calls_of, launch
from .emit import LOWER
from .launches import Area, Launch, View, Writer, by_blas
from .layout import Operands
from .operands import Where, planned
from .table import SOURCE_DTYPE, STEP_DTYPE

__all__ = ["array_type", "current", "dense_backward_layer", "dense_layer", "empty"]


class Shape(NamedTuple):
    """Of a matrix; it is stored `turned` if its columns have no gaps, and not its rows."""

    rows: int
    cols: int
    ld: int
    turned: bool = False


class Layer(NamedTuple):
    """What the launches of a layer depend on: its type, its activation, and the shapes of its operands, absent ones
    None.
    """

    precision: Precision
    activation: Activation
    X: Shape | None
    """None for sparse rows."""
    columns: int
    """Of X."""
    W: Shape
    of: tuple[Shape | None, ...]
    """Of `dense_layer`: b, out, Z; of `dense_backward_layer`: dA, saved, dX, dW, db."""
    blas: bool
    """Whether large products are cuBLAS's."""


class Written(NamedTuple):
    """Launches, and the elements of the areas that they work in."""

    launches: tuple[Launch, ...]
    sizes: dict[int, int]


class Operand:
    """The places of a layer's operands, as areas of views."""

    X, W, B, OUT, Z = range(100, 105)
    DA, SAVED, DX, DW, DB = range(105, 110)


def dense_layer(X: Any, W: Any, b: Any, activation: int, out: Any, Z: Any, n_threads: int) -> None:
    """out = activation(X @ W + b); Z, if given, takes the pre-activation."""
    sparse = is_sparse(X)
    _check_apart({"out": out, "Z": Z}, {"X": X, "W": W, "b": b})
    x, w = None if sparse else _matrix(X), _matrix(W, turned=not sparse)
    places = {Operand.X: x, Operand.W: w, Operand.B: _row(b), Operand.OUT: _matrix(out), Operand.Z: _matrix(Z)}
    layer = Layer(
        Precision.of(out.dtype),
        Activation(activation),
        _shape(x),
        int(X.shape[1]),
        _shape(w),
        tuple(_shape(places[i]) for i in (Operand.B, Operand.OUT, Operand.Z)),
        (blas := _blas((*X.shape, W.shape[1]), out.dtype)) is not None,
    )
    _run(_forward(layer), places, X if sparse else None, out, blas)


@lru_cache(maxsize=256)
def _forward(layer: Layer) -> Written:
    b, out, Z = (_view(at, shape) for at, shape in zip((Operand.B, Operand.OUT, Operand.Z), layer.of, strict=True))
    assert out is not None
    W = _view(Operand.W, layer.W)

    def write(w: Writer) -> None:
        given = {"W": W, "b": b, "out": out, "pre": Z, "activation": layer.activation}
        if layer.X is None:
            _lower(w, OpCode.SPARSE_DENSE, **given, **PLAIN_ROWS)
        else:
            _lower(w, OpCode.DENSE, **given, x=_view(Operand.X, layer.X), transposed=int(layer.W.turned))

    return _written(layer, out.rows, write)


def dense_backward_layer(
    dA: Any, X: Any, W: Any, saved: Any, activation: int, dX: Any, dW: Any, db: Any, n_threads: int
) -> None:
    """Gradients of `dense_layer` into those of dX, dW and db that are not None; `saved` is what the activation's
    derivative follows from.
    """
    _check_apart({"dX": dX, "dW": dW, "db": db}, {"dA": dA, "X": X, "W": W, "A": saved})
    sparse = is_sparse(X) and dW is not None
    x, w = None if is_sparse(X) else _matrix(X), _matrix(W, turned=True)
    places = {
        Operand.X: x,
        Operand.W: w,
        Operand.DA: _matrix(dA),
        Operand.SAVED: _matrix(saved),
        Operand.DX: _matrix(dX),
        Operand.DW: _matrix(dW),
        Operand.DB: _row(db),
    }
    of = (Operand.DA, Operand.SAVED, Operand.DX, Operand.DW, Operand.DB)
    shapes, blas = tuple(_shape(places[i]) for i in of), _blas((*X.shape, W.shape[1]), dA.dtype)
    of_x = _shape(x), int(X.shape[1])
    layer = Layer(Precision.of(dA.dtype), Activation(activation), *of_x, _shape(w), shapes, blas is not None)
    _run(_backward(layer), places, X if sparse else None, dA, blas)


@lru_cache(maxsize=256)
def _backward(layer: Layer) -> Written:
    of = (Operand.DA, Operand.SAVED, Operand.DX, Operand.DW, Operand.DB)
    dA, saved, dX, dW, db = (_view(at, shape) for at, shape in zip(of, layer.of, strict=True))
    assert dA is not None

    def write(w: Writer) -> None:
        dz = dA
        if layer.activation is not Activation.LINEAR:
            slopes, dz = w.temporary(dA.rows, dA.cols), w.temporary(dA.rows, dA.cols)
            _lower(w, OpCode.SLOPES, saved=saved, out=slopes, activation=layer.activation, column=0)
            _lower(w, OpCode.TANGENT, x=dA, slopes=slopes, out=dz, column=0)
        if dX is not None:
            # What a linear layer's slopes would follow from is not looked at.
            of_input = {"saved": dX, "activation": Activation.LINEAR, "scale": 1.0}
            _lower(w, OpCode.DGRAD, dz=dz, W=_view(Operand.W, layer.W), out=dX, transposed=layer.W.turned, **of_input)
        if dW is not None and layer.X is None:
            _lower(w, OpCode.SPARSE_WGRAD, dz=dz, dW=dW, accumulate=0, **PLAIN_ROWS)
        elif dW is not None:
            _lower(w, OpCode.WGRAD, x=_view(Operand.X, layer.X), dz=dz, dW=dW, accumulate=0)
        if db is not None:
            _lower(w, OpCode.COLSUM, x=dz, weight=None, out=db, accumulate=0, mean=0)

    return _written(layer, dA.rows, write)


PLAIN_ROWS = {"size_sum": None, "shift": None, "stream": 0, "level": 0.0, "scale": 1.0}
"""Sparse rows that nothing is done to."""


def _lower(w: Writer, code: OpCode, **operands: Any) -> None:
    LOWER[code](w, Operands(code.name, **operands))


def _written(layer: Layer, m: int, write: Callable[[Writer], None]) -> Written:
    # There is no plan to look operands up in: they are views already. Sparse rows ask one for their width.
    plan: Any = SimpleNamespace(spec=SimpleNamespace(n_features=layer.columns, loss=Loss.MSE))
    w = Writer(plan, m, Mode.GRADIENT, layer.precision, blas=layer.blas)
    write(w)
    return Written(tuple(w.launches), {Area.TEMPORARY: w.most_used, Area.KEPT: w.most_kept})


# --- operands ---------------------------------------------------------------------------------------------------------


def _cupy() -> Any:
    return require("cupy", "cuda12", "a layer on a GPU")


def array_type() -> type:
    kind: type = _cupy().ndarray
    return kind


def empty(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Any:
    """A new array on the current device."""
    return _cupy().empty(shape, dtype)


def current() -> int:
    """The number of the current device."""
    return int(_cupy().cuda.Device().id)


def _check_apart(results: dict[str, Any], operands: dict[str, Any]) -> None:
    """Refuse a result that shares memory with an operand or with a result before it."""
    others = {name: array.data if is_sparse(array) else array for name, array in operands.items()}
    for name, array in results.items():
        for other, theirs in others.items():
            if array is not None and theirs is not None and _overlap(array, theirs):
                raise ValueError(f"{name} must not share memory with {other}")
        others[name] = array


def _overlap(one: Any, other: Any) -> bool:
    """By addresses alone: NumPy is given arrays that it never reads."""
    ends = []
    for array in (one, other):
        low = int(array.data.ptr) + sum((n - 1) * s for n, s in zip(array.shape, array.strides, strict=True) if s < 0)
        high = int(array.data.ptr) + sum((n - 1) * s for n, s in zip(array.shape, array.strides, strict=True) if s > 0)
        ends.append((low, high + array.dtype.itemsize))
    (low, high), (begin, end) = ends
    if not one.size or not other.size or high <= begin or end <= low:
        return False
    return bool(np.shares_memory(np.asarray(_Placed(one)), np.asarray(_Placed(other))))


class _Placed:
    """An address with a shape."""

    def __init__(self, array: Any) -> None:
        self.__array_interface__ = {
            "version": 3,
            "data": (int(array.data.ptr), True),
            "shape": array.shape,
            "strides": array.strides,
            "typestr": array.dtype.str,
        }


def _matrix(array: Any, *, turned: bool = False) -> Any:
    """A matrix as kernels take it: itself if its rows have no gaps, or may be `turned` and its columns have none."""
    if array is None or _ld(array) or (turned and _ld(array.T)):
        return array
    return _cupy().ascontiguousarray(array, array.dtype)


def _row(array: Any) -> Any:
    """A vector as a matrix of one row."""
    return None if array is None else array[None]


def _ld(array: Any) -> Any:
    """Elements from one row to the next, 0 if a row has gaps or rows overlap."""
    (rows, cols), (down, across), size = array.shape, array.strides, array.dtype.itemsize
    if cols > 1 and across != size:
        return 0
    if rows <= 1:
        return max(cols, 1)
    ld: int = down // size if down >= cols * size and down % size == 0 else 0
    return ld


def _shape(array: Any) -> Any:
    if array is None:
        return None
    rows, cols = array.shape
    ld = _ld(array)
    return Shape(rows, cols, ld) if ld else Shape(rows, cols, _ld(array.T), turned=True)


def _view(at: int, shape: Shape | None) -> Any:
    """As it lies in memory."""
    if shape is None:
        return None
    rows, cols = (shape.cols, shape.rows) if shape.turned else (shape.rows, shape.cols)
    return View(cast(Area, at), 0, rows, cols, shape.ld)


# --- runs -------------------------------------------------------------------------------------------------------------


def _blas(size: tuple[int, int, int], dtype: np.dtype[Any]) -> Any:
    """cuBLAS on the current stream, if a product of this size, in whichever order, is one for it."""
    if not by_blas(size, Precision.of(dtype)):
        return None
    cupy = _cupy()
    return _blas_on(cupy, current(), int(cupy.cuda.get_current_stream().ptr))[0]


@lru_cache(maxsize=4)
def _blas_on(cupy: Any, device: int, stream: int) -> tuple[Any, list[Any]]:
    """It, and the memory that it works in."""
    kept: list[Any] = []

    def allocate(size: int) -> int:
        kept.append(cupy.cuda.alloc(size))
        return int(kept[-1].ptr)

    return blas_on(cupy, stream, allocate), kept


def _run(written: Written, places: dict[int, Any], X: Any, like: Any, blas: Any) -> None:
    """Launch on the current stream; X are the sparse rows that launches look up, if they do."""
    launches, sizes = written
    if not launches or not len(like):
        return
    cupy, dtype = _cupy(), like.dtype
    # Freed when this returns, and handed out again on this stream alone.
    working: dict[int, Any] = {area: cupy.empty(max(size, 1), dtype) for area, size in sizes.items()}
    bases = {at: int(array.data.ptr) for at, array in (places | working).items() if array is not None}
    step, sources, kept = _rows_of(X, dtype)

    def address(view: View) -> int:
        return bases[view.area] + view.offset * int(dtype.itemsize)

    calls = [planned(one, Where(address, step, sources, len(like), True)) for one in launches]
    launch(calls_of(cupy, calls, Precision.of(dtype), blas and blas.product))
    del working, kept


def _rows_of(X: Any, dtype: np.dtype[Any]) -> tuple[int, int, Any]:
    """Where a step that takes all rows of a sparse X is told of, and its sources; and what keeps them there."""
    if X is None:
        return 0, 0, None
    cupy = _cupy()
    X = sparse_rows(X)
    check_csr(0, X)
    arrays, entry = laid_out(X, dtype, cupy.ascontiguousarray)
    array: Any
    for name, array in arrays.items():
        entry[name] = int(array.data.ptr)
    rows = cupy.arange(X.shape[0], dtype=np.int64)
    step, sources = np.zeros(1, STEP_DTYPE), np.zeros(N_SOURCES, SOURCE_DTYPE)
    step["rows"], sources[0] = rows.data.ptr, entry
    told = cupy.asarray(np.concatenate([step.view(np.uint8), sources.view(np.uint8)]))
    return int(told.data.ptr), int(told.data.ptr) + STEP_DTYPE.itemsize, (arrays, rows, told)
