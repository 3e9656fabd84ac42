"""Sweeps over the sizes at which kernels change their path, with every operand against a guarded page.

Usage: ``python edges.py OFFSET ROUND LOG SWEEP STRIDE ...``: of each sweep every STRIDE-th case from the OFFSET-th on,
with the instruction set of ``NARROWS_ISA``. A round has its own layouts and data. `test_edges.py` runs this file in a
process of its own, because a read past an array ends the process. LOG then holds the case.

Promises: a case is told by its number and round alone. Integers and powers of two keep sums exact, so that linear
layers are compared bit by bit and the others to the accuracy of their activation.
"""

from __future__ import annotations

import ctypes
import itertools
import mmap
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import scipy.sparse as sp

from agreement import tolerance
from cases import CPU_PRECISIONS
from guards import LAYOUTS, OUTPUTS, POISON, VECTORS, Array, Guarded
from narrows import _core, functional
from narrows.backends import Hyper
from narrows.backends.cpp import _APPLY, CppProgram
from narrows.backends.reference import ACTIVATE, DERIVATIVE, ReferenceProgram
from narrows.functional import layer
from narrows.plan.geometry import Convolution
from narrows.plan.ops import Source
from narrows.plan.plan import FROM_CODES, Mode, Region
from narrows.plan.spec import Activation, Corruption, LayerSpec, Loss, NetworkSpec, Precision, Solver
from narrows.rows.shifted import Shifted
from networks import Case, boltzmann, make_spec, network

MR, PACK_DEPTH = 6, 512
ROWS = (1, MR - 1, MR, MR + 1, 2 * MR + 1)
COLUMNS = (1, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129)
INNER = (1, 2, 15, 16, 17, PACK_DEPTH - 1, PACK_DEPTH, PACK_DEPTH + 1)
ACTIVATIONS = tuple(a for a in Activation if a is not Activation.SOFTMAX)
EXACT = (Activation.LINEAR, Activation.RELU)
"""Activations that round nothing."""
ACCURACY = {np.dtype(np.float32): 1e-5, np.dtype(np.float64): 1e-11}
"""Far above what activations are held to elsewhere, far below a misplaced element."""

_memory = [Guarded(6 << 20) for _ in range(12)]


class Room:
    """Places arrays, each in guarded memory of its own, and checks them all."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng
        self.used: list[tuple[Guarded, bool]] = []

    def place(self, values: Any, layouts: Any = None, *, written: bool = False, shift: int = 0) -> Array:
        """A copy of `values` in one of the layouts, C order by default."""
        guarded = _memory[len(self.used)]
        self.used.append((guarded, written))
        strides = layouts[self.rng.choice(list(layouts))](*np.shape(values)) if layouts else None
        return guarded.place(values, strides, at_end=bool(self.rng.random() < 0.7), shift=shift)

    def operand(self, values: Any) -> Array:
        """In any layout; now and then where no element is aligned."""
        return self.place(values, LAYOUTS if np.ndim(values) == 2 else VECTORS, shift=int(self.rng.random() < 0.1))

    def output(self, shape: tuple[int, ...], dtype: Any) -> Array:
        return self.place(np.full(shape, np.nan, dtype), OUTPUTS if len(shape) == 2 else None, written=True)

    def check(self) -> None:
        for guarded, written in self.used:
            guarded.check(written=written)


def csr(room: Room, values: Array) -> Any:
    matrix = sp.csr_array(values)
    index = room.rng.choice([np.int32, np.int64])
    # Set one by one, because the constructor copies.
    matrix.indptr, matrix.indices = room.place(matrix.indptr.astype(index)), room.place(matrix.indices.astype(index))
    matrix.data = room.place(matrix.data)
    return matrix


def plain(data: Any) -> Any:
    """The same numbers in memory of their own."""
    if isinstance(data, Shifted):
        return Shifted(plain(data.rows), np.array(data.shift))
    return None if data is None else data.toarray() if hasattr(data, "indptr") else np.array(data)


def double(data: Any) -> Array:
    """The same numbers, dense and in double."""
    if isinstance(data, Shifted):
        return double(data.rows) - data.shift
    return np.asarray(plain(data), np.float64)


def close(found: Array, expected: Array, activation: Activation, magnitude: Array) -> None:
    if activation in EXACT:
        np.testing.assert_array_equal(found, expected)
    else:
        error = np.abs(found - expected) / (magnitude + 1)
        assert error.max() <= ACCURACY[found.dtype], f"{error.max():.3g} off"


# --- single layers --------------------------------------------------------------------------------------------------


def layer_cases() -> Iterator[tuple[int, int, int, Any]]:
    yield from itertools.product(ROWS, INNER, COLUMNS, (np.float32, np.float64))


def run_layer(rng: np.random.Generator, n: int, k: int, m: int, dtype: Any) -> None:
    """dense and dense_backward of one shape."""
    number = int(rng.integers(60))
    activation = ACTIVATIONS[number % len(ACTIVATIONS)] if number % 3 else EXACT[number % 2]
    name, threads = activation.name.lower(), int(rng.choice([1, 1, 2, 3]))
    room = Room(rng)
    values = rng.integers(-3, 4, (n, k)).astype(dtype)
    X = csr(room, values) if rng.random() < 0.1 else room.operand(values)
    W = room.operand(rng.integers(-2, 3, (k, m)).astype(dtype) / 64)
    b = room.operand(rng.integers(-3, 4, m).astype(dtype) / 64)
    x, w, bias = (plain(a).astype(np.float64) for a in (X, W, b))
    out, Z = room.output((n, m), dtype), room.output((n, m), dtype)
    z = x @ w + bias
    functional.dense(X, W, b, name, out=out, Z=Z, n_threads=threads)
    room.check()
    np.testing.assert_array_equal(Z, z)
    expected = ACTIVATE[activation](z)
    close(out, expected, activation, np.abs(expected))

    x, w, a, z = (plain(array) for array in (X, W, out, Z))  # before their memory is used again
    room = Room(rng)
    X = csr(room, x) if rng.random() < 0.1 else room.operand(x)
    W, A, Z = room.operand(w), room.operand(a), room.operand(z)
    dA = room.operand(rng.integers(-3, 4, (n, m)).astype(dtype) / 4)
    saved = Z if activation.needs_preactivation else A
    x, w, s, d = (plain(a).astype(np.float64) for a in (X, W, saved, dA))
    shapes = {"X": (n, k), "W": (k, m), "b": (m,)}
    need = tuple(which for which in shapes if rng.random() < 0.8)
    places = [room.output(shape, dtype) if which in need else None for which, shape in shapes.items()]
    if not hasattr(X, "indptr") and all(a.flags.aligned for a in (X, W, saved, dA)) and rng.random() < 0.2:
        # What lies in the thread's own memory otherwise, against a guarded page, too.
        dZ = room.output((n, m), dtype)
        _core.dense_backward(dA, X, W, saved, activation, *places, dZ, threads)
    else:
        functional.dense_backward(dA, X, W, A, name, Z=Z, need=need, out=tuple(places), n_threads=threads)
    room.check()
    dZ = d * DERIVATIVE[activation](s)
    for found, expected, magnitude in zip(
        places,
        (dZ @ w.T, x.T @ dZ, dZ.sum(axis=0)),
        (np.abs(dZ) @ np.abs(w.T), np.abs(x.T) @ np.abs(dZ), np.abs(dZ).sum(axis=0)),
        strict=True,
    ):
        if found is not None:
            close(found, expected, activation, magnitude)


# --- programs -------------------------------------------------------------------------------------------------------

FEATURES = (1, 2, 15, 16, 17, 33, 63, 64, 65, 127, 129, PACK_DEPTH - 1, PACK_DEPTH, PACK_DEPTH + 1)
HIDDEN = (1, 5, 6, 7, 16, 17, 31, 47, 48, 49, 64, 65, PACK_DEPTH - 1, PACK_DEPTH + 1)
BATCHES = (1, 5, 6, 7, 13, 24, 25, 31, 32, 33, 64, 65)
SMOOTH = (Activation.LINEAR, Activation.GELU, Activation.SILU, Activation.SIGMOID, Activation.TANH, Activation.SOFTPLUS)
LINKS = (
    (Loss.MSE, Activation.LINEAR),
    (Loss.HUBER, Activation.SOFTPLUS),
    (Loss.BCE, Activation.SIGMOID),
    (Loss.HUBER, Activation.SOFTMAX),
    (Loss.MULTINOMIAL, Activation.SOFTMAX),
    (Loss.GAUSSIAN, Activation.LINEAR),
    (Loss.GAUSSIAN, Activation.SIGMOID),
    (Loss.POISSON, Activation.SOFTMAX),
    (Loss.NB, Activation.SOFTMAX),
    (Loss.NB, Activation.EXP),
    (Loss.ZINB, Activation.SOFTMAX),
    (Loss.ZINB, Activation.EXP),
)
SEED, STEP = 2**63 + 5, 3


def program_cases() -> Iterator[tuple[int, int, int, Precision]]:
    yield from itertools.product(FEATURES, HIDDEN, BATCHES, CPU_PRECISIONS)


def pair_cases() -> Iterator[tuple[int, int, int, Precision]]:
    """The programs with products in bfloat16."""
    return (case for case in program_cases() if case[-1] is Precision.BFLOAT16)


def random_spec(rng: np.random.Generator, k: int, n: int, m: int) -> NetworkSpec:
    def sometimes(value: Any, otherwise: Any, probability: float = 0.3) -> Any:
        return value if rng.random() < probability else otherwise

    if rng.random() < 0.15:
        return boltzmann(
            k,
            n,
            "bg"[rng.integers(2)],
            "bg"[rng.integers(2)],
            n_gibbs=int(rng.integers(1, 3)),
            n_chains=int(sometimes(m, 0)),
            sample_visible=bool(rng.random() < 0.7),
            alpha=sometimes(0.1, 0.0),
            solver=list(Solver)[rng.integers(len(Solver))],
            clip_norm=sometimes(1.0, None),
            weighted=bool(rng.random() < 0.3),
        )
    loss, output = LINKS[rng.integers(len(LINKS))]
    sizes = (k, n, k) if rng.random() < 0.5 else (k, n, 3, n, k)
    variational = bool(rng.random() < 0.3)
    kl = not variational and rng.random() < 0.2
    latent = Activation.LINEAR if variational else Activation.SIGMOID if kl else SMOOTH[rng.integers(len(SMOOTH))]
    corruption = sometimes(list(Corruption)[rng.integers(3)], None)
    by_cell = loss.info.dispersion and rng.random() < 0.4
    tied = not (variational or by_cell or loss is Loss.ZINB) and bool(rng.random() < 0.3)
    # Of the others, values that are not negative and not above 1 are wanted.
    shifted = loss in (Loss.MSE, Loss.GAUSSIAN) and bool(rng.random() < 0.4)
    return network(
        sizes,
        n_conditions=0 if tied else int(sometimes(rng.choice([1, 2, 3, 15, 16, 17, 33]), 0)),
        hidden=ACTIVATIONS[rng.integers(len(ACTIVATIONS) - 1)],  # exp of exp leaves the range
        latent=latent,
        output=output,
        variational=variational,
        kl_weight=0.3,
        tied=tied,
        dropout=sometimes(0.2, 0.0),
        loss=loss,
        cell_dispersion=by_cell,
        # The exponential of a sum of raw counts leaves the range.
        log_normalize=loss.info.of_counts and (output is Activation.EXP or bool(rng.random() < 0.7)),
        size_sum=20.0,
        corruption=corruption,
        sparse_input=corruption in (None,) + (Corruption.MASKING,) * (not shifted) and bool(rng.random() < 0.3),
        shifted=shifted,
        gram_decoder=loss is Loss.MSE and not tied and bool(rng.random() < 0.6),
        corruption_level=0.2,
        activity_l1=0.0 if variational else sometimes(0.1, 0.0),
        kl_sparsity=0.1 if kl else 0.0,
        alpha=sometimes(0.1, 0.0),
        weight_l1=sometimes(0.1, 0.0),
        solver=list(Solver)[rng.integers(len(Solver))],
        clip_norm=sometimes(1.0, None),
        weighted=bool(rng.random() < 0.3),
        separate_target=bool(rng.random() < 0.3),
    )


def work_of(program: CppProgram) -> Array:
    """What holds nothing between two calls: the batch, and the gradients but for their padding."""
    plan = program.plan
    return program.arena()[(2 + plan.n_moments) * plan.parameter_size :]


def poison(program: CppProgram) -> None:
    work_of(program)[:] = np.nan
    for i, slot in enumerate(program.plan.slots):
        if slot.region is Region.GRADIENT:
            program._slot(program._program, i)[...] = np.nan


def source(room: Room, values: Any) -> Any:
    """The same numbers as a matrix of either dtype in any layout, or as CSR; less the same shift, if there is one."""
    if isinstance(values, Shifted):
        shift = values.shift.astype(room.rng.choice([np.float32, np.float64]))
        return Shifted(source(room, values.rows), room.place(shift))
    kind = room.rng.choice(["dense", "other dtype", "csr"])
    if kind == "csr":
        return csr(room, values)
    if kind == "other dtype":
        values = values.astype(np.float64 if values.dtype == np.float32 else np.float32)
    return room.operand(values)


def numbers(room: Room, values: Array) -> Array:
    """The same numbers as a vector or a column of either dtype."""
    values = values.astype(room.rng.choice([np.float32, np.float64]))
    return room.operand(values[:, 0] if room.rng.random() < 0.5 else values)


def run_program(rng: np.random.Generator, k: int, n: int, m: int, precision: Precision) -> None:
    run_network(rng, random_spec(rng, k, n, m), m, precision)


def image_cases() -> Iterator[tuple[int, int, int, Precision]]:
    yield from itertools.product((1, 2, 3, 6, 8), (1, 7, 8, 15, 16, 17, 33, 66), (1, 5, 6, 13, 24), CPU_PRECISIONS)


def random_images(rng: np.random.Generator, height: int, width: int) -> NetworkSpec:
    """An encoder of one or two convolutions, and a decoder that mirrors it."""

    def divisor(n: int) -> int:
        return int(rng.choice([d for d in (1, 1, 2, 3, 4) if n % d == 0]))

    shape = (height, width, int(rng.choice([1, 2, 3, 16])))
    at, encoder, decoder = shape, [], []
    for _ in range(int(rng.integers(1, 3))):
        kernel, filters = tuple(int(k) for k in rng.integers(1, 6, 2)), int(rng.integers(1, 20))
        steps = divisor(at[0]), divisor(at[1])
        pooled = rng.random() < 0.4
        conv = Convolution.of(at, filters, kernel, **{"pool" if pooled else "strides": steps})
        back = {"upsample": steps} if pooled else {"strides": steps, "transposed": True}
        encoder.append(conv)
        decoder.insert(0, Convolution.of(conv.out_shape, at[2], kernel, **back))
        at = conv.out_shape
    activations = [SMOOTH[i] for i in rng.integers(0, len(SMOOTH), len(encoder) + len(decoder))]
    layers = [
        LayerSpec(c.n_in, c.n_out, a, convolution=c) for c, a in zip([*encoder, *decoder], activations, strict=True)
    ]
    latent = len(encoder)
    if rng.random() < 0.5:
        n = int(rng.integers(1, 9))
        flat = encoder[-1].n_out
        layers[latent:latent] = [LayerSpec(flat, n, Activation.TANH), LayerSpec(n, flat, Activation.TANH)]
        latent += 1
    loss, output = LINKS[rng.integers(3)]
    layers[-1] = replace(layers[-1], activation=output)
    return make_spec(
        tuple(layers),
        latent,
        loss=loss,
        epsilon=1e-3,
        alpha=float(rng.choice([0, 0.1])),
        solver=list(Solver)[rng.integers(len(Solver))],
        clip_norm=float(rng.choice([1.0, 2.0])) if rng.random() < 0.2 else None,
        weighted=bool(rng.random() < 0.3),
        separate_target=bool(rng.random() < 0.3),
        contractive=0.1 * float(rng.random() < 0.4),
        contractive_probes=int(rng.integers(1, 3)),
    )


def run_images(rng: np.random.Generator, height: int, width: int, m: int, precision: Precision) -> None:
    # A pooling leads elsewhere where two pixels are nearly equal, a bfloat16 where one is on the verge.
    run_network(rng, random_images(rng, height, width), m, precision)


def run_network(rng: np.random.Generator, spec: NetworkSpec, m: int, precision: Precision) -> None:
    """A random network on guarded data in odd layouts, with garbage in its memory, has the bits of one on plain data;
    and those are near the reference's where a rounding cannot lead it elsewhere.
    """
    case = Case(f"edge-{rng.integers(2**32)}", spec, batch=m, rows=m + 3)
    spec, plan, dtype = case.spec, case.plan, precision.dtype
    program = CppProgram(plan, precision, int(rng.choice([1, 2, 3])), int(rng.choice([0, 0, 3])))
    other = CppProgram(plan, precision, 1)
    arena = program.arena()
    tail = np.frombuffer(
        (ctypes.c_uint8 * (-arena.nbytes % mmap.PAGESIZE)).from_address(arena.ctypes.data + arena.nbytes), np.uint8
    )
    tail[:] = POISON
    for p in (program, other):
        p.load(case.state(dtype))

    room = Room(rng)
    data = case.data(dtype)
    kept = rng.random(data.X.shape) < 0.7
    X = source(room, Shifted(data.X.rows * kept, data.X.shift) if spec.data.shifted else data.X * kept)
    target = None if data.target is None else source(room, data.target)
    weight = None if data.weight is None else room.operand(data.weight)
    batch = None if data.condition is None else numbers(room, data.condition)
    program.bind(X, target, weight, batch)
    other.bind(plain(X), plain(target), plain(weight), plain(batch))

    poison(program)
    rows = room.place(rng.permutation(m + 3)[:m])
    terms, gradient = program.gradient(rows, SEED, STEP)
    expected_terms, expected = other.gradient(np.array(rows), SEED, STEP)
    same({"terms": terms} | gradient, {"terms": expected_terms} | expected)
    reference = None
    if comparable(spec):
        reference = ReferenceProgram(plan, bfloat16=precision is Precision.BFLOAT16)
        reference.load(case.state())
        reference.bind(*(None if a is None else double(a) for a in (X, target, weight, batch)))
        expected_terms, expected = reference.gradient(np.array(rows), SEED, STEP)
        near({"terms": terms}, {"terms": expected_terms}, case, precision)
        near(gradient, expected, case, precision)

    poison(program)
    rows = room.place(rng.integers(0, m + 3, m + 1))
    rates = room.place(np.array([1e-4, 1e-5]))
    terms = program.train(rows, Hyper(SEED, STEP, rates))
    expected_terms = other.train(np.array(rows), Hyper(SEED, STEP, np.array(rates)))
    same({"terms": terms} | program.state(), {"terms": expected_terms} | other.state())
    if reference is not None:
        expected_terms = reference.train(np.array(rows), Hyper(SEED, STEP, np.array(rates)))
        for i in range(len(plan.terms)):  # each apart, since one may be far larger
            near({"": terms[:1, i]}, {"": expected_terms[:1, i]}, case, precision)
    room.check()

    for mode, result in plan.outputs.items():
        room = Room(rng)
        codes = mode in FROM_CODES
        X = source(room, rng.random((m + 3, spec.n_components)).astype(dtype) if codes else data.X)
        target = None
        if mode is Mode.LIKELIHOOD or (mode is Mode.SCORE and spec.data.separate_target):
            target = source(room, data.target if spec.data.separate_target else data.X)
        out = room.place(np.full((m + 3, plan.slots[result].cols), np.nan, dtype), written=True)
        poison(program)
        # CppProgram.apply, but for the array that the result goes to.
        program._bind(_APPLY, Source.LATENT if codes else Source.X, X)
        if target is not None:
            program._bind(_APPLY, Source.TARGET if spec.data.separate_target else Source.X, target)
        if data.condition is not None:
            batch = numbers(room, data.condition)
            program._bind(_APPLY, Source.CONDITION, batch)
        program._program.apply(int(mode), result, out)
        program._program.release(_APPLY)
        same({mode.name: out}, {mode.name: other.apply(plain(X), mode, plain(target), plain(batch))})
        room.check()

    assert (tail == POISON).all(), "written behind the arena"
    regions = arena[: (2 + plan.n_moments) * plan.parameter_size].reshape(-1, plan.parameter_size)
    for slot in plan.parameters:
        padding = regions[:, slot.offset : slot.offset + slot.size].reshape(-1, slot.rows, slot.ld)[:, :, slot.cols :]
        assert not padding.any(), f"padding of {slot.name}"


def comparable(spec: NetworkSpec) -> bool:
    """Whether a rounding leads to no other result than a rounding: no kink, and nothing that is clipped."""
    smooth = {layer.activation for layer in spec.layers} <= {*SMOOTH, Activation.SOFTMAX}
    clipped = spec.training.penalties.kl_sparsity > 0 and spec.data.weighted  # a mean activity above 1
    clipped = clipped or any(layer.convolution is not None and layer.convolution.pooled for layer in spec.layers)
    drawn = spec.training.gibbs is not None  # a state on the verge is drawn to either side
    return not drawn and smooth and spec.training.penalties.activity_l1 == 0 and not clipped


def same(found: dict[str, Array], expected: dict[str, Array]) -> None:
    """Bit by bit, and finite."""
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)
        assert np.isfinite(value).all(), name


def near(found: dict[str, Array], expected: dict[str, Array], case: Case, precision: Precision) -> None:
    """Relative to all of it, or to 1; bfloat16 rounds a value on the verge to either side."""
    allowed = 0.02 if precision is Precision.BFLOAT16 else tolerance(case, precision.dtype)
    norm = 1 + np.sqrt(sum(np.square(g).sum() for g in expected.values()))
    for name, g in expected.items():
        error = np.sqrt(np.square(found[name] - g).sum())
        assert error <= allowed * norm, f"{name}: {error:.3g} off, allowed {allowed * norm:.3g}"


def penalty_cases() -> Iterator[tuple[int, int, Any, int]]:
    yield from itertools.product((1, 5, 13, 40), (3, 8, 15, 16, 17, 40), (np.float32, np.float64), (1, 2, 3))


def run_penalty(rng: np.random.Generator, k: int, n: int, dtype: Any, threads: int) -> None:
    """Where tiles are narrower than the cells in which a fused update sums the weights' penalty, a cell is of several
    tiles.
    """
    case = Case("penalty", network((k, n, k), alpha=0.5, weight_l1=0.1), batch=9, rows=9)
    term = case.plan.terms.index("weight_penalty")
    program, reference = CppProgram(case.plan, Precision.of(dtype), threads, threads), ReferenceProgram(case.plan)
    program.load(case.state(dtype))
    reference.load(case.state())
    program.bind(*case.data(dtype))
    reference.bind(*case.data())
    found, expected = (
        p.train(np.arange(9), Hyper(SEED, STEP, np.array([1e-3])))[0, term] for p in (program, reference)
    )
    assert abs(found - expected) <= 1e-5 * expected, f"penalty {found}, expected {expected}"


SWEEPS: dict[str, tuple[Callable[[], Iterator[tuple[Any, ...]]], Callable[..., None]]] = {
    "layers": (layer_cases, run_layer),
    "programs": (program_cases, run_program),
    "pairs": (pair_cases, run_program),
    "images": (image_cases, run_images),
    "penalties": (penalty_cases, run_penalty),
}


def main(offset: int, round_: int, log: str, *sweeps: str) -> None:
    layer.SERIAL = -1  # small layers on as many threads as asked for
    file = os.open(log, os.O_WRONLY | os.O_CREAT)
    for sweep, stride in zip(sweeps[::2], map(int, sweeps[1::2]), strict=True):
        run_sweep(sweep, stride, offset, round_, file)


def run_sweep(sweep: str, stride: int, offset: int, round_: int, file: int) -> None:
    cases, run = SWEEPS[sweep]
    for number, case in enumerate(cases()):
        if number % stride == offset % stride:
            os.pwrite(file, f"{sweep} {number}, round {round_}: {case}".ljust(120).encode(), 0)
            run(np.random.default_rng([number, round_]), *case)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
