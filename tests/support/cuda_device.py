"""A device for `backends.cuda` on this CPU: kernels as host C++, memory with guards, launches one by one.

Promises: runs the kernels of ``csrc/cuda``, compiled by g++ with ``cuda_host/simt_host.h``, which checks every access.
Memory that nobody wrote is NaN. A byte written behind an area is found when the memory is freed or used.
Never: counts as a GPU. `test_gpu` runs the same checks on one.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.lib.stride_tricks import as_strided

from agreement import (
    assert_close,
    epoch,
    expected_epoch,
    expected_gradient,
    expected_outputs,
    first_rows,
    tolerance,
)
from narrows.backends.cuda.layout import Operands, layout
from narrows.backends.cuda.program import CudaProgram
from narrows.backends.cuda.protocol import ALIGNMENT, Device, Planned
from narrows.backends.cuda.table import KERNELS, LAUNCH_DTYPE, PRECISION_FLAGS, constants
from narrows.plan.ops import source_folder
from narrows.plan.plan import FROM_CODES, Mode
from narrows.plan.spec import Precision
from networks import Case
from oracle import SEED, STEP

HERE = Path(__file__).parent / "cuda_host"
INDEX = {kernel: i for i, kernel in enumerate(KERNELS)}
PLANNED = np.dtype([("kernel", "i4"), ("blocks", "i4"), ("threads", "i4"), ("unused", "i4"), ("operands", "u8")])
GARBAGE = 0xFF


def thinned(cases: Sequence[Any], step: int) -> list[Any]:
    """Cases of a test: every `step`-th runs at each commit, the others run nightly. A tuple holds several arguments."""
    given = [case if isinstance(case, tuple) else (case,) for case in cases]
    return [pytest.param(*one, marks=pytest.mark.slow if i % step else ()) for i, one in enumerate(given)]


def named(value: Any) -> str:
    """The name of a case or a dtype in the id of a test."""
    return getattr(value, "__name__", str(value))


def compiler() -> str:
    """The C++ compiler of this machine.

    Raises
    ------
    FileNotFoundError
        There is no compiler, or the system is not Linux, which the fibers need.
    """
    if sys.platform != "linux":
        raise FileNotFoundError("threads as fibers need Linux")
    found = shutil.which("g++") or shutil.which("clang++")
    if found is None:
        raise FileNotFoundError("no C++ compiler (g++ or clang++) on this machine")
    return found


def build(source: str, folder: Path, precision: Precision) -> ctypes.CDLL:
    """A file of ``cuda_host``, compiled by the first caller for a folder. All kernels take some ten seconds."""
    import fcntl

    library = folder / f"{source}-{precision.name}.so"
    with library.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            _compile(source, library, precision)
    return ctypes.CDLL(str(library))


def _compile(source: str, library: Path, precision: Precision) -> None:
    kernels = library.with_suffix(".inc")
    kernels.write_text("".join(f"call<{kernel}>,\n" for kernel in KERNELS))
    defines = constants() | {
        "NARROWS_SIMT_HOST": f'"{HERE / "simt_host.h"}"',
        "NARROWS_KERNELS": f'"{kernels}"',
    }
    # Most tests run float32. For the other precisions a quick compilation saves more time than quick kernels.
    optimisation = "-O1" if precision is Precision.FLOAT32 else "-Og"
    flags = [f"-D{name}={value}" for name, value in defines.items()] + PRECISION_FLAGS[precision]
    # Hidden, or the linker would use the shared arrays of another library.
    flags += [
        f"-I{source_folder()}",
        "-std=c++17",
        optimisation,
        "-fPIC",
        "-shared",
        "-fvisibility=hidden",
        "-Wall",
        "-Wextra",
    ]
    # Some distributions check jumps, and report those between fibers as errors.
    flags += ["-U_FORTIFY_SOURCE"]
    command = [compiler(), *flags]
    unfinished = library.with_suffix(".part")
    subprocess.run([*command, str(HERE / source), "-o", str(unfinished)], check=True)
    unfinished.rename(library)


def program_on(device: Device, case: Case, dtype: Any = np.float32, **bound: Any) -> CudaProgram:
    """The program of a case with its state and its data; `bound` replaces some of the data."""
    precision = Precision.of(dtype)
    program = CudaProgram(case.plan, precision, device)
    program.load(case.state(precision.dtype))
    data = case.data(precision.dtype)
    program.bind(bound.get("X", data.X), bound.get("target", data.target), data.weight, data.condition)
    return program


def check_agreement(program: CudaProgram, case: Case, dtype: Any) -> None:
    """Compare gradients, a few steps and all modes of inference with the reference, within `agreement`'s bounds."""
    relative = tolerance(case, dtype)
    terms, gradient = program.gradient(first_rows(case), SEED, STEP)
    expected_terms, expected = expected_gradient(case)
    np.testing.assert_allclose(terms, expected_terms, rtol=relative)
    assert set(gradient) == set(expected)
    largest = max(float(np.abs(g).max()) for g in expected.values())
    for name, g in expected.items():
        # As in test_backends: biases sum over the batch what may cancel.
        scale = largest / max(float(np.abs(g).max()), 1e-30) if name[0] == "b" else 1.0
        # Likewise a dispersion's, each term of which is a difference, too: without fused multiply-adds, as on the host,
        # it is up to 1.2 times as far off as the bound, where cpp has 0.8.
        scale = 2.0 if name == "log_dispersion" else scale
        assert_close(gradient[name], g, relative * max(scale, 1.0), f"d{name}")

    expected_terms, expected = expected_epoch(case)
    np.testing.assert_allclose(program.train(*epoch(case)), expected_terms, rtol=relative)
    state = program.state()
    for name, value in expected.items():
        assert_close(state[name], value, relative, name)

    data, outputs = case.data(dtype), expected_outputs(case, trained=True)
    codes, target_of_codes = outputs[Mode.ENCODE].astype(dtype), data.X if data.target is None else data.target
    for mode, value in outputs.items():
        X, target = (codes, target_of_codes) if mode in FROM_CODES else (data.X, data.target)
        assert_close(program.apply(X, mode, target, data.condition), value, relative, str(mode))


def packed(operands: Operands) -> Any:
    """The structure of a launch with host arrays as operands."""
    found, known = np.zeros((), LAUNCH_DTYPE), layout(operands.rows)
    for name, value in operands.named.items():
        kind, position, *_ = known[name]
        if isinstance(value, np.ndarray):
            slot = found[kind][position]
            slot["data"], slot["ld"] = value.ctypes.data, value.strides[0] // value.itemsize
            slot["rows"], slot["cols"] = value.shape
        elif value is not None:
            found[kind][position] = value
    return found


class LaunchError(RuntimeError):
    """A check ended a launch."""


class HostDevice:
    """Parameters
    ----------
    libraries : callable
        The kernels of a precision (see `build`).
    reverse : bool
        Whether blocks and threads take turns from the last to the first.
    late : bool
        Whether what may be done later is done when it is waited for, and no earlier.
    memory_left : int
        What `free_memory` says.
    blas : callable, optional
        Makes what runs products of cuBLAS, of what allocates memory.
    """

    guard = 256

    def __init__(
        self,
        libraries: Callable[[Precision], ctypes.CDLL],
        reverse: bool = False,
        late: bool = False,
        memory_left: int = 2**40,
        blas: Callable[[Callable[[int], int]], Any] | None = None,
    ) -> None:
        self.libraries, self.reverse, self.late, self.memory_left = libraries, reverse, late, memory_left
        self.memory: dict[int, Any] = {}
        self.to_do: list[Callable[[], None]] = []
        self.done = 0
        self.launched: set[str] = set()
        self.blas = blas and blas(self.allocate)
        self.n_graphs = 0

    def allocate(self, size: int, what: str = "") -> int:
        memory = np.full(size + self.guard + ALIGNMENT, GARBAGE, np.uint8)
        address = -(-memory.ctypes.data // ALIGNMENT) * ALIGNMENT
        self.memory[address] = memory[address - memory.ctypes.data :][: size + self.guard], memory, size
        return address

    def free(self, address: int) -> None:
        self.catch_up()
        inside, _, size = self.memory.pop(address)
        assert (inside[size:] == GARBAGE).all(), "a write behind the memory"

    def _inside(self, address: int, size: int) -> Any:
        for begin, (inside, _, length) in self.memory.items():
            if begin <= address and address + size <= begin + length:
                return inside[address - begin : address - begin + size]
        raise AssertionError(f"{size} bytes at {address} are not the device's")

    def free_memory(self) -> int:
        return self.memory_left

    def pinned(self, size: int) -> Any:
        return np.full(size, GARBAGE, np.uint8)

    def upload(self, address: int, data: Any) -> None:
        self.catch_up()
        self._copy_to(address, np.ascontiguousarray(data).reshape(-1).view(np.uint8))

    def download(self, address: int, out: Any) -> None:
        self.catch_up()
        self._copy_from(address, out.reshape(-1).view(np.uint8))

    def send(self, address: int, pinned: Any) -> None:
        self._do(lambda: self._copy_to(address, pinned))

    def send_ahead(self, address: int, pinned: Any) -> None:
        self._do(lambda: self._copy_to(address, pinned))

    def fetch(self, address: int, pinned: Any) -> None:
        self._do(lambda: self._copy_from(address, pinned))

    def _copy_to(self, address: int, data: Any) -> None:
        self._inside(address, data.nbytes)[...] = data

    def _copy_from(self, address: int, out: Any) -> None:
        out[...] = self._inside(address, out.nbytes)

    def _do(self, work: Callable[[], None]) -> None:
        self.to_do.append(work)
        if not self.late:
            self.catch_up()

    def catch_up(self, until: int | None = None) -> None:
        """Do the queued work, or the work of the first `until` calls."""
        while self.to_do and (until is None or self.done < until):
            self.done += 1
            self.to_do.pop(0)()

    def mark(self) -> Any:
        return SimpleNamespace(wait=partial(self.catch_up, self.done + len(self.to_do)))

    def view(self, address: int, shape: tuple[int, int], ld: int, dtype: Any) -> Any:
        memory = self._inside(address, shape[0] * ld * np.dtype(dtype).itemsize).view(dtype)
        return as_strided(memory, shape, (ld * memory.itemsize, memory.itemsize))

    def graph(self, planned: Sequence[Planned], precision: Precision) -> Callable[[], None]:
        library = self.libraries(Precision.FLOAT32 if precision is Precision.TF32 else precision)
        table = np.zeros(len(planned), PLANNED)
        for row, launch in zip(table, planned, strict=True):
            row["kernel"] = INDEX.get(launch.kernel, -1)
            row["blocks"], row["threads"] = launch.blocks, launch.threads
            row["operands"] = launch.operands.ctypes.data
        self.launched |= {launch.kernel for launch in planned}
        self.n_graphs += 1
        # Kernels between two calls of cuBLAS run together.
        parts = [
            (is_blas, list(part))
            for is_blas, part in groupby(range(len(table)), lambda i: bool(table[i]["kernel"] < 0))
        ]

        def run() -> None:
            for is_blas, part in parts:
                if is_blas:
                    for i in part:
                        self.blas.product(planned[i].operands)
                else:
                    kernels(table[part[0] : part[-1] + 1])

        def kernels(table: Any) -> None:
            error = ctypes.create_string_buffer(512)
            where = ctypes.c_void_p(table.ctypes.data)
            failed = library.run(where, len(table), int(self.reverse), error, len(error))
            if failed >= 0:
                raise LaunchError(f"{KERNELS[table[failed]['kernel']]}: {error.value.decode()}")

        return partial(self._do, run)


def on_host(libraries: Any, case: Case, dtype: Any = np.float32, *, reverse: bool = False, **bound: Any) -> CudaProgram:
    """`program_on` a host device."""
    return program_on(HostDevice(libraries, reverse), case, dtype, **bound)
